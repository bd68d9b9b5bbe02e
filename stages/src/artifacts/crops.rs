//! Cut-out objects in Arrow shards.
//!
//! `crops`: one row per object: `image_id` u64, `annotation_id` u64, `category_id` u64, `jpeg` bytes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{ArrayRef, AsArray, BinaryArray, RecordBatch, UInt64Array},
    datatypes::{DataType, Field, Schema},
};
use ovenbird_cache::{
    DraftFile, Fingerprint,
    inputs::InputFile,
    shard::{Compression, ShardWriter},
};
use ovenbird_data::annotations::{AnnotationId, Annotations, CategoryId, ImageId};

use super::features::{self, ROWS_PER_BATCH, column, rows_of, u64_column};
use crate::{Artifact, Error, Result, error::malformed};

/// One annotated object, cut out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crop {
    /// Its image.
    pub image_id: ImageId,
    /// Its annotation.
    pub annotation_id: AnnotationId,
    /// Its class.
    pub category_id: CategoryId,
    /// The pixels, encoded.
    pub jpeg: Vec<u8>,
}

/// Writes `crops`.
pub struct CropsWriter {
    shard: ShardWriter,
    crops: Vec<Crop>,
}

impl CropsWriter {
    /// Begins the shard of a unit.
    pub fn new(file: DraftFile, unit: &Fingerprint) -> Result<Self> {
        let id = |name| Field::new(name, DataType::UInt64, false);
        let jpeg = Field::new("jpeg", DataType::Binary, false);
        let schema = Schema::new(vec![id("image_id"), id("annotation_id"), id("category_id"), jpeg]);
        Ok(Self { shard: ShardWriter::new(file, &schema, unit, Compression::None)?, crops: Vec::new() })
    }

    /// Appends one crop.
    pub fn push(&mut self, crop: Crop) -> Result<()> {
        self.crops.push(crop);
        if self.crops.len() == ROWS_PER_BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.crops.is_empty() {
            return Ok(());
        }
        let crops = std::mem::take(&mut self.crops);
        let ids = |id: fn(&Crop) -> u64| -> ArrayRef { Arc::new(UInt64Array::from_iter_values(crops.iter().map(id))) };
        let columns: [(&str, ArrayRef); 4] = [
            ("image_id", ids(|crop| crop.image_id.0)),
            ("annotation_id", ids(|crop| crop.annotation_id.0)),
            ("category_id", ids(|crop| crop.category_id.0)),
            ("jpeg", Arc::new(BinaryArray::from_iter_values(crops.iter().map(|crop| &crop.jpeg)))),
        ];
        Ok(self.shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length"))?)
    }

    /// Writes what is left and finishes the file.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        Ok(self.shard.finish()?)
    }
}

/// Cut-out objects.
#[derive(Debug, Clone)]
pub struct Crops {
    shards: Vec<InputFile>,
}

impl Artifact for Crops {
    const KIND: &'static str = "crops";
    const EXTENSIONS: &'static [&'static str] = &["arrow", "/"];
    const SHAPE: &'static str = "crops that `crops/objects` made (Arrow)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { shards: files.to_vec() })
    }
}

impl Crops {
    /// Every crop in order; each batch is checked as it is reached.
    pub fn rows(&self) -> impl Iterator<Item = Result<Crop>> {
        rows_of(&self.shards, crop_rows)
    }

    /// Checks every crop once, and finds them later one by one.
    pub fn index(&self) -> Result<CropIndex> {
        let (mut batches, mut first_rows, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for batch in features::batches(&self.shards) {
            let (path, batch) = batch?;
            first_rows.push(ids.len());
            ids.extend(crop_ids(&path, &batch)?);
            jpegs(&path, &batch)?;
            batches.push((path, batch));
        }
        Ok(CropIndex { ids, batches, first_rows })
    }
}

/// All crops, read from the memory map when they are asked for.
pub struct CropIndex {
    /// The image, the annotation and the class of each.
    pub ids: Vec<(ImageId, AnnotationId, CategoryId)>,
    batches: Vec<(PathBuf, RecordBatch)>,
    /// The first crop of each batch.
    first_rows: Vec<usize>,
}

impl CropIndex {
    /// The pixels of a crop, encoded, and the file that they are in.
    pub fn jpeg(&self, place: usize) -> (&[u8], &Path) {
        let batch_idx = self.first_rows.partition_point(|first| *first <= place) - 1;
        let (path, batch) = &self.batches[batch_idx];
        let jpegs = jpegs(path, batch).expect("BUG: every batch was checked");
        (jpegs.value(place - self.first_rows[batch_idx]), path)
    }
}

/// The objects of some annotations, to tell whether crops are theirs.
pub(crate) struct Annotated(BTreeMap<AnnotationId, (ImageId, CategoryId)>);

impl Annotated {
    pub(crate) fn of(annotations: &Annotations) -> Self {
        Self(annotations.annotations.iter().map(|object| (object.id, (object.image_id, object.category_id))).collect())
    }

    /// Fails where a crop is of no object of the annotations at `port`, or of one of another image or class.
    pub(crate) fn check(&self, (image, annotation, category): (ImageId, AnnotationId, CategoryId), port: &'static str) -> Result<()> {
        let found = match self.0.get(&annotation) {
            Some(known) if *known == (image, category) => return Ok(()),
            Some((image, category)) => format!("which is in image {image} and of class {category} there"),
            None => "which is not there".into(),
        };
        let problem = format!("a crop is of annotation {annotation} in image {image}, of class {category}, {found}");
        Err(Error::Input { port, problem, hint: "use the annotations that the crops were made from".into() })
    }
}

fn crop_rows(path: &Path, batch: &RecordBatch) -> Result<Vec<Crop>> {
    let jpegs = jpegs(path, batch)?;
    let crop =
        |(row, (image_id, annotation_id, category_id))| Crop { image_id, annotation_id, category_id, jpeg: jpegs.value(row).to_vec() };
    Ok(crop_ids(path, batch)?.into_iter().enumerate().map(crop).collect())
}

fn crop_ids(path: &Path, batch: &RecordBatch) -> Result<Vec<(ImageId, AnnotationId, CategoryId)>> {
    let ids = |name| u64_column(path, batch, name);
    let (images, annotations, categories) = (ids("image_id")?, ids("annotation_id")?, ids("category_id")?);
    let of_row = |row: usize| (ImageId(images[row]), AnnotationId(annotations[row]), CategoryId(categories[row]));
    Ok((0..images.len()).map(of_row).collect())
}

fn jpegs<'a>(path: &Path, batch: &'a RecordBatch) -> Result<&'a BinaryArray> {
    column(path, batch, "jpeg")?.as_binary_opt::<i32>().ok_or_else(|| malformed(path, "expected bytes in `jpeg`"))
}
