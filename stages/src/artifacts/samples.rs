//! Features of a frozen detector for regions that were sampled for training, in Arrow shards.
//!
//! `region-samples`: one row per view of an image, views of an image one after the other: `image_id` u64, and lists: `feature` `[N, W]` of
//! the sampled regions, those that match an object first, and `category_id` u64 `[O]` of these objects; the others are background. The schema's
//! metadata has the digest of the detector (`ovenbird.detector`).

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use arrow::{
    array::{ArrayRef, AsArray, ListArray, RecordBatch, UInt64Array},
    buffer::OffsetBuffer,
    datatypes::{DataType, Field, FieldRef, Schema, UInt64Type},
};
use ovenbird_cache::{
    Digest, DraftFile, Fingerprint,
    inputs::InputFile,
    shard::{Compression, ShardWriter},
};
use ovenbird_data::annotations::{CategoryId, ImageId};

use super::features::{Dtype, batches, embedding_field, list_column, list_field, u64_column, vector_array, vector_column};
use crate::{Artifact, Result, error::malformed};

/// The metadata key of the digest of the detector.
const DETECTOR_KEY: &str = "ovenbird.detector";
/// Rows of a record batch, which is checked as a whole; a row may have 512 features.
const ROWS_PER_BATCH: usize = 24;

/// The sampled regions of one view of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionSample {
    /// The image.
    pub image_id: ImageId,
    /// `[N, W]`, row by row.
    pub features: Vec<f32>,
    /// The categories of the objects that the first regions match, `[O]`.
    pub categories: Vec<CategoryId>,
}

/// Writes `region-samples`.
pub struct RegionSamplesWriter {
    shard: ShardWriter,
    dtype: Dtype,
    width: usize,
    rows: Vec<RegionSample>,
}

impl RegionSamplesWriter {
    /// Begins the shard of a unit with features of `width` numbers, by a detector with this digest.
    pub fn new(file: DraftFile, unit: &Fingerprint, dtype: Dtype, width: usize, detector: &Digest) -> Result<Self> {
        let schema = Schema::new(vec![
            Field::new("image_id", DataType::UInt64, false),
            list_field("feature", embedding_field(dtype, width)),
            list_field("category_id", category_field()),
        ])
        .with_metadata([(DETECTOR_KEY.to_owned(), detector.to_hex())].into());
        Ok(Self { shard: ShardWriter::new(file, &schema, unit, Compression::None)?, dtype, width, rows: Vec::new() })
    }

    /// Appends a view.
    pub fn push(&mut self, sample: RegionSample) -> Result<()> {
        assert_eq!(sample.features.len() % self.width, 0, "BUG: features of another width");
        self.rows.push(sample);
        if self.rows.len() == ROWS_PER_BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        let list = |item: FieldRef, lengths: Vec<usize>, values: ArrayRef| -> ArrayRef {
            Arc::new(ListArray::new(item, OffsetBuffer::<i32>::from_lengths(lengths), values, None))
        };
        let features = self.dtype.array(&rows.iter().map(|row| row.features.as_slice()).collect::<Vec<_>>().concat());
        let features = vector_array(self.dtype.field("item"), self.width, features);
        let categories = UInt64Array::from_iter_values(rows.iter().flat_map(|row| row.categories.iter().map(|id| id.0)));
        let n_features = rows.iter().map(|row| row.features.len() / self.width).collect();
        let columns: [(&str, ArrayRef); 3] = [
            ("image_id", Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| row.image_id.0)))),
            ("feature", list(embedding_field(self.dtype, self.width), n_features, Arc::new(features))),
            ("category_id", list(category_field(), rows.iter().map(|row| row.categories.len()).collect(), Arc::new(categories))),
        ];
        Ok(self.shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length"))?)
    }

    /// Writes what is left and finishes the file.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        Ok(self.shard.finish()?)
    }
}

fn category_field() -> FieldRef {
    Arc::new(Field::new("item", DataType::UInt64, false))
}

/// Features of sampled regions, not yet read.
#[derive(Debug, Clone)]
pub struct RegionSamples {
    shards: Vec<InputFile>,
}

impl Artifact for RegionSamples {
    const KIND: &'static str = "region-samples";
    const EXTENSIONS: &'static [&'static str] = &["arrow", "/"];
    const SHAPE: &'static str = "features that `detector/features` made (Arrow)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { shards: files.to_vec() })
    }
}

/// The rows of some shards by image, read from the memory map when they are asked for.
pub(crate) struct SamplesByImage {
    batches: Vec<(PathBuf, RecordBatch)>,
    /// Batch and row of each view of each image.
    places: BTreeMap<ImageId, Vec<(usize, usize)>>,
}

impl RegionSamples {
    /// Whether all of them are by a detector with this digest.
    pub(crate) fn are_by(&self, detector: &Digest) -> Result<bool> {
        for file in &self.shards {
            if file.shard()?.schema().metadata().get(DETECTOR_KEY) != Some(&detector.to_hex()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks every batch once, and indexes the images.
    pub(crate) fn by_image(&self) -> Result<SamplesByImage> {
        let batches = batches(&self.shards).collect::<Result<Vec<_>>>()?;
        let mut places: BTreeMap<ImageId, Vec<(usize, usize)>> = BTreeMap::new();
        for (batch_idx, (path, batch)) in batches.iter().enumerate() {
            for (row_idx, image) in u64_column(path, batch, "image_id")?.into_iter().enumerate() {
                places.entry(ImageId(image)).or_default().push((batch_idx, row_idx));
            }
        }
        Ok(SamplesByImage { batches, places })
    }
}

impl SamplesByImage {
    /// The images that have samples, ascending, with the number of their views.
    pub(crate) fn images(&self) -> impl Iterator<Item = (ImageId, usize)> {
        self.places.iter().map(|(image, views)| (*image, views.len()))
    }

    /// The number of views of an image that has samples.
    pub(crate) fn n_views(&self, image: ImageId) -> Option<usize> {
        self.places.get(&image).map(Vec::len)
    }

    /// The categories of all samples.
    pub(crate) fn categories(&self) -> Result<Vec<CategoryId>> {
        let mut all = Vec::new();
        for (path, batch) in &self.batches {
            let lists = list_column(path, batch, "category_id")?;
            let ids = lists.values().as_primitive_opt::<UInt64Type>();
            let ids = ids.ok_or_else(|| malformed(path, "expected lists of u64 in `category_id`"))?;
            all.extend(ids.values().iter().copied().map(CategoryId));
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// The categories of the objects that the first regions of a view match.
    pub(crate) fn categories_of(&self, image: ImageId, view: usize) -> Result<Vec<CategoryId>> {
        let (batch_idx, row_idx) = self.places[&image][view];
        let (path, batch) = &self.batches[batch_idx];
        let categories = list_column(path, batch, "category_id")?.value(row_idx);
        let ids = categories.as_primitive_opt::<UInt64Type>();
        let ids = ids.ok_or_else(|| malformed(path, "expected lists of u64 in `category_id`"))?;
        Ok(ids.values().iter().copied().map(CategoryId).collect())
    }

    /// A view of an image that has one.
    pub(crate) fn get(&self, image: ImageId, view: usize) -> Result<RegionSample> {
        let categories = self.categories_of(image, view)?;
        let (batch_idx, row_idx) = self.places[&image][view];
        let (path, batch) = &self.batches[batch_idx];
        let (features, width) = vector_column(path, &list_column(path, batch, "feature")?.value(row_idx))?;
        if width == 0 || categories.len() > features.len() / width {
            return Err(malformed(path, format!("image {image}: more objects than regions")));
        }
        Ok(RegionSample { image_id: image, features, categories })
    }
}
