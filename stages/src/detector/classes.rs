//! The classes that a detector tells apart, and their embeddings.

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    rcnn::classifier::{LogitScale, Vocabulary},
    to_unit_length,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::{
    ports::{MULTILABEL_PROMPTS, PROMPTS},
    spec::MaskRcnnSpec,
};
use crate::{
    Error, In, Inputs, Result,
    artifacts::Prompts,
    clip::{Space, space},
};

/// The dimension of class embeddings where there are no prompts.
const DIM_WITHOUT_PROMPTS: i64 = 128;

/// The classes that a detector tells apart, base ++ novel.
pub(super) struct ClassTables {
    /// For the box head.
    pub(super) text: Vocabulary,
    /// For the heads that learned CLIP's embeddings of images.
    pub(super) image: Vocabulary,
}

/// Class embeddings f32 `[K, D]` of base ++ novel: those at the port `prompts`, or else random directions for base classes and zeros for novel ones.
pub(super) fn class_embeddings(inputs: &Inputs, classes: &ClassSplit) -> Result<Tensor> {
    if let Some(prompts) = inputs.read_if_given(PROMPTS)? {
        return selected_prompts(&prompts, classes);
    }
    // Novel classes get zeros: training keeps no region away from a random direction, so one novel class would win all regions.
    let direction = |name: &String| {
        let mut random = ChaCha8Rng::from_seed(*ovenbird_cache::Digest::of(name.as_bytes()).as_bytes());
        let numbers: Vec<f32> = (0..DIM_WITHOUT_PROMPTS).map(|_| random.random_range(-1.0..1.0)).collect();
        Tensor::from_slice(&numbers)
    };
    let rows = Tensor::stack(&classes.base.iter().map(direction).collect::<Vec<_>>(), 0);
    Ok(to_unit_length(&rows).constant_pad_nd([0, 0, 0, classes.novel.len() as i64]))
}

/// The embeddings f32 `[K, D]` of base ++ novel among some.
pub(super) fn selected_prompts(prompts: &Prompts, classes: &ClassSplit) -> Result<Tensor> {
    let names: Vec<String> = classes.all().cloned().collect();
    Ok(prompts.select(&names)?.to_kind(Kind::Float))
}

/// The CLIP of the class embeddings at each port, where they are given and say it.
pub(super) fn spaces_of_prompts(inputs: &Inputs) -> Result<[(&'static str, Option<Space>); 2]> {
    let [text, image] = [PROMPTS, MULTILABEL_PROMPTS]
        .map(|port| Ok::<_, Error>((port.info().name, inputs.read_if_given(port)?.and_then(|prompts| prompts.clip))));
    Ok([text?, image?])
}

impl MaskRcnnSpec {
    /// Refuses class embeddings of another CLIP than that of the detector at a port.
    pub(super) fn check_clip(&self, port: &'static str, inputs: &Inputs) -> Result<()> {
        let [text, image] = spaces_of_prompts(inputs)?;
        space::common(&[(port, self.clip), text, image]).map(drop)
    }

    /// The classes with their embeddings; `embeddings`: the result of [`class_embeddings`]. Refuses embeddings that the detector was not trained for.
    pub(super) fn tables(&self, embeddings: Tensor, inputs: &Inputs, classes: &ClassSplit, device: Device) -> Result<ClassTables> {
        check_given(PROMPTS, self.has_prompts, inputs)?;
        check_given(MULTILABEL_PROMPTS, self.has_multilabel_prompts, inputs)?;
        let vocabulary = |port: In<Prompts>, embeddings: Tensor, scale: LogitScale| {
            let (dim, expected) = (embeddings.size()[1], self.config.embed_dim);
            if dim != expected {
                let problem = format!("class embeddings have {dim} numbers, the detector's space has {expected}");
                return Err(Error::Input { port: port.info().name, problem, hint: PROMPTS_HINT.into() });
            }
            Ok(Vocabulary::new(embeddings.to_device(device), classes.base.len() as i64, scale)?)
        };
        let text = vocabulary(PROMPTS, embeddings, self.scale)?;
        let image = match inputs.read_if_given(MULTILABEL_PROMPTS)? {
            Some(prompts) => {
                let embeddings = selected_prompts(&prompts, classes)?;
                vocabulary(MULTILABEL_PROMPTS, embeddings, prompts.scale.unwrap_or(self.scale))?
            }
            None => text.clone(),
        };
        Ok(ClassTables { text, image })
    }
}

/// Refuses class embeddings where a detector was trained without, and the other way round.
fn check_given(port: In<Prompts>, was_given: bool, inputs: &Inputs) -> Result<()> {
    let port = port.info().name;
    let problem = match (was_given, inputs.ports.contains_key(port)) {
        (true, false) => format!("the detector was trained with `{port}`, but none are given"),
        (false, true) => format!("the detector was trained without `{port}`, but some are given"),
        (true, true) | (false, false) => return Ok(()),
    };
    Err(Error::Input { port, problem, hint: PROMPTS_HINT.into() })
}

const PROMPTS_HINT: &str = "use the prompts (or none) that the detector was trained with, or others of the same CLIP";
