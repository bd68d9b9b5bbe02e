//! The rows that a pass over images makes, of any kind, and those that other units hold already.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use ovenbird_cache::{Digest, DraftFile, Fingerprint, ReusableItems, shard::ShardReader};
use ovenbird_data::annotations::{ImageId, ImageInfo};

use super::{
    crops::{Crop, CropsWriter},
    features::{Dtype, ImageFeaturesWriter, RegionFeaturesWriter, Regions, image_rows, region_rows, u64_column},
};
use crate::{Result, clip::space::Space};

/// The results for one image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Row {
    /// The image's own embedding `[D]`.
    Image(ImageId, Vec<f32>),
    /// Its regions.
    Regions(Regions),
    /// Its annotated objects.
    Crops(Vec<Crop>),
}

/// The kind of rows in a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowKind {
    /// [`Row::Image`].
    Image(Dtype),
    /// [`Row::Regions`].
    Regions(Dtype),
    /// [`Row::Crops`].
    Crops,
}

impl RowKind {
    /// The name of a unit's shard.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::Image(_) => "globals.arrow",
            Self::Regions(_) => "regions.arrow",
            Self::Crops => "crops.arrow",
        }
    }
}

/// Writes the rows of a unit.
pub(crate) enum RowWriter {
    Image(ImageFeaturesWriter),
    Regions(RegionFeaturesWriter),
    Crops(CropsWriter),
}

impl RowWriter {
    /// Begins the shard of a unit with embeddings of `dim` numbers, where its rows have any, of the embedding space `clip`, if known.
    pub(crate) fn new(kind: RowKind, file: DraftFile, unit: &Fingerprint, dim: usize, clip: Option<Space>) -> Result<Self> {
        Ok(match kind {
            RowKind::Image(dtype) => Self::Image(ImageFeaturesWriter::new(file, unit, dtype, dim, clip)?),
            RowKind::Regions(dtype) => Self::Regions(RegionFeaturesWriter::new(file, unit, dtype, dim, clip)?),
            RowKind::Crops => Self::Crops(CropsWriter::new(file, unit)?),
        })
    }

    /// Appends an image's row.
    pub(crate) fn push(&mut self, row: Row) -> Result<()> {
        match (self, row) {
            (Self::Image(shard), Row::Image(image, embedding)) => shard.push(image, &embedding),
            (Self::Regions(shard), Row::Regions(regions)) => shard.push(regions),
            (Self::Crops(shard), Row::Crops(crops)) => crops.into_iter().try_for_each(|crop| shard.push(crop)),
            _ => panic!("BUG: a row of another kind than its unit's"),
        }
    }

    /// Writes what is left and finishes the file.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Image(shard) => shard.finish(),
            Self::Regions(shard) => shard.finish(),
            Self::Crops(shard) => shard.finish(),
        }
    }
}

impl Row {
    /// How many rows of embeddings or crops it is.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Image(..) => 1,
            Self::Regions(regions) => regions.boxes.len(),
            Self::Crops(crops) => crops.len(),
        }
    }
}

/// Rows of single images that other units hold already, read when they are asked for.
pub(crate) struct ReusedRows {
    kind: RowKind,
    shards: Vec<(PathBuf, ShardReader)>,
    /// By item: shard and record batch, of batches that are sound.
    places: HashMap<Digest, (usize, usize)>,
    open: Option<((usize, usize), HashMap<ImageId, Row>)>,
}

impl ReusedRows {
    /// How many items have a row.
    pub(crate) fn n_items(&self) -> usize {
        self.places.len()
    }

    /// Finds the rows of some items among reusable items. Rows that cannot be read are not reused.
    pub(crate) fn new(kind: RowKind, reusable: &ReusableItems, items: &[Digest], images: &[ImageInfo], port: &str) -> Self {
        let mut reused = Self { kind, shards: Vec::new(), places: HashMap::new(), open: None };
        if kind == RowKind::Crops {
            return reused;
        }
        let mut wanted: BTreeMap<usize, HashMap<ImageId, Digest>> = BTreeMap::new();
        for (item, image) in items.iter().zip(images) {
            if let Some(unit) = reusable.of(item) {
                wanted.entry(unit).or_default().insert(image.id, *item);
            }
        }
        for (unit, wanted) in wanted {
            for file in reusable.port(unit, port) {
                let Ok(shard) = file.shard() else { continue };
                for batch_idx in 0..shard.n_batches() {
                    let ids = shard.batch(batch_idx).ok().and_then(|batch| u64_column(&file.path, &batch, "image_id").ok());
                    let found = ids.into_iter().flatten().filter_map(|id| wanted.get(&ImageId(id)));
                    reused.places.extend(found.map(|item| (*item, (reused.shards.len(), batch_idx))));
                }
                reused.shards.push((file.path, shard));
            }
        }
        reused
    }

    /// Whether an item has a row to reuse.
    pub(crate) fn has(&self, item: &Digest) -> bool {
        self.places.contains_key(item)
    }

    /// Removes and returns the row of an item that has one.
    pub(crate) fn take(&mut self, item: &Digest, image: ImageId) -> Result<Row> {
        let place = self.places[item];
        if self.open.as_ref().is_none_or(|(open, _)| *open != place) {
            let (path, shard) = &self.shards[place.0];
            let batch = shard.batch(place.1)?;
            let rows = match self.kind {
                RowKind::Regions(_) => region_rows(path, &batch)?.into_iter().map(|row| (row.image_id, Row::Regions(row))).collect(),
                _ => image_rows(path, &batch)?.into_iter().map(|(image, row)| (image, Row::Image(image, row))).collect(),
            };
            self.open = Some((place, rows));
        }
        let (_, rows) = self.open.as_mut().expect("BUG: it was opened just now");
        Ok(rows.remove(&image).expect("BUG: an image is taken once"))
    }
}
