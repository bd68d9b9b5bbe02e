//! What class embeddings say of labelled regions.

use std::collections::BTreeMap;

use ovenbird_data::{
    annotations::{Annotations, CategoryId},
    classes::ClassSplit,
};
use ovenbird_models::to_unit_length;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{Result, artifacts::PromptEmbeddings};

/// Rows that are compared at once.
pub(crate) const ROWS: usize = 4096;
/// How many of the best classes of a row are known.
const BEST: i64 = 5;

/// What was said of a region.
pub(crate) struct Said {
    /// The classes of the largest cosines, at most five, largest first.
    pub(crate) best: Vec<i64>,
    /// The largest probability.
    pub(crate) probability: f64,
}

impl Said {
    /// Of regions whose cosines are `[N, K]`.
    pub(crate) fn of(cosines: &Tensor, temperature: f64) -> Result<Vec<Self>> {
        let n_best = BEST.min(cosines.size()[1]);
        let (_, best) = cosines.topk(n_best, 1, true, true);
        let (probabilities, _) = (cosines / temperature).softmax(-1, Kind::Double).max_dim(1, false);
        let flat = |tensor: &Tensor| tensor.to_device(Device::Cpu).contiguous().view(-1);
        let best = Vec::<i64>::try_from(flat(&best)).map_err(ovenbird_models::Error::from)?;
        let probabilities = Vec::<f64>::try_from(flat(&probabilities)).map_err(ovenbird_models::Error::from)?;
        let said = best.chunks(n_best as usize).zip(probabilities);
        Ok(said.map(|(best, probability)| Self { best: best.to_vec(), probability }).collect())
    }
}

/// Compares all rows with class embeddings `[K, D]` of unit length, on their device, and tells `hear` what is said of each.
///
/// `proceed`: called before each of some thousands of rows, with their number.
pub(crate) fn name_rows(
    embeddings: &PromptEmbeddings,
    classes: &Tensor,
    temperature: f64,
    proceed: &dyn Fn(usize) -> Result<()>,
    mut hear: impl FnMut(usize, &Said),
) -> Result<()> {
    for first in (0..embeddings.n_rows).step_by(ROWS) {
        let rows = first..embeddings.n_rows.min(first + ROWS);
        proceed(rows.len())?;
        let regions = Tensor::from_slice(&embeddings.gather(rows.clone())).view([-1, embeddings.dim as i64]);
        let cosines = no_grad(|| to_unit_length(&regions.to_device(classes.device())).matmul(&classes.tr()));
        for (row, said) in rows.zip(Said::of(&cosines, temperature)?) {
            hear(row, &said);
        }
    }
    Ok(())
}

/// The place of each category among these names, where its name is one of them.
pub(crate) fn places_of_categories<'a>(annotations: &Annotations, names: impl Iterator<Item = &'a String>) -> BTreeMap<CategoryId, usize> {
    let places: BTreeMap<&String, usize> = names.enumerate().map(|(place, name)| (name, place)).collect();
    annotations.categories.iter().filter_map(|category| Some((category.id, *places.get(&category.name)?))).collect()
}

/// The place of each name among base and novel classes; that of a name which is neither is beyond both.
pub(crate) fn places(names: &[String], classes: &ClassSplit) -> Vec<usize> {
    let places: BTreeMap<&String, usize> = classes.all().enumerate().map(|(place, name)| (name, place)).collect();
    names.iter().map(|name| places.get(name).copied().unwrap_or(places.len())).collect()
}
