//! Parquet tables with zstd: proposals and detections.
//!
//! Both hold one row a box, grouped by image in ascending id: `image_id` u64, [`category_id` u64,] `x1 y1 x2 y2` f32 in px
//! of the original image, `score` f32. The version is in the file's key-value metadata.

use std::{collections::BTreeMap, fs::File, path::Path, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, Float32Array, RecordBatch, UInt64Array},
    datatypes::{Float32Type, UInt64Type},
};
use ovenbird_cache::{DraftFile, inputs::InputFile};
use ovenbird_data::{
    annotations::{CategoryId, ImageId},
    boxes::Xyxy,
    evaluate::Detection,
    proposals::Proposal,
};
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};

use super::Artifact;
use crate::{Result, contract::write_error, error::malformed};

const FORMAT_KEY: &str = "ovenbird.table";
const FORMAT: &str = "1";

/// Class-agnostic boxes of every image, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposals {
    /// By image; an image without proposals has an empty list.
    pub by_image: BTreeMap<ImageId, Vec<Proposal>>,
}

impl Artifact for Proposals {
    const KIND: &'static str = "proposals";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut by_image: BTreeMap<ImageId, Vec<Proposal>> = BTreeMap::new();
        for InputFile { path, .. } in files {
            for batch in read_table(path)? {
                let (ids, boxes) = (ids(path, &batch, "image_id")?, boxes(path, &batch)?);
                for (image, (xyxy, score)) in ids.into_iter().zip(boxes) {
                    let of_image = by_image.entry(ImageId(image)).or_default();
                    // An image without proposals is kept as one row without a box.
                    if let Some(xyxy) = xyxy {
                        of_image.push(Proposal { xyxy, score });
                    }
                }
            }
        }
        Ok(Self { by_image })
    }
}

impl Proposals {
    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let (mut images, mut boxes) = (Vec::new(), Vec::new());
        for (image, proposals) in &self.by_image {
            if proposals.is_empty() {
                images.push(image.0);
                boxes.push(None);
            }
            for proposal in proposals {
                images.push(image.0);
                boxes.push(Some((proposal.xyxy, proposal.score)));
            }
        }
        write_table(file, vec![("image_id", images)], &boxes)
    }
}

/// Scored boxes with their classes.
#[derive(Debug, Clone, PartialEq)]
pub struct Detections(pub Vec<Detection>);

impl Artifact for Detections {
    const KIND: &'static str = "detections";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut detections = Vec::new();
        for InputFile { path, .. } in files {
            for batch in read_table(path)? {
                let (images, categories) = (ids(path, &batch, "image_id")?, ids(path, &batch, "category_id")?);
                for ((image, category), (xyxy, score)) in images.into_iter().zip(categories).zip(boxes(path, &batch)?) {
                    let xyxy = xyxy.ok_or_else(|| malformed(path, "a detection without a box"))?;
                    detections.push(Detection { image_id: ImageId(image), category_id: CategoryId(category), xyxy, score });
                }
            }
        }
        Ok(Self(detections))
    }
}

impl Detections {
    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let images = self.0.iter().map(|detection| detection.image_id.0).collect();
        let categories = self.0.iter().map(|detection| detection.category_id.0).collect();
        let boxes: Vec<_> = self.0.iter().map(|detection| Some((detection.xyxy, detection.score))).collect();
        write_table(file, vec![("image_id", images), ("category_id", categories)], &boxes)
    }
}

fn write_table(mut file: DraftFile, ids: Vec<(&str, Vec<u64>)>, boxes: &[Option<(Xyxy, f32)>]) -> Result<()> {
    let column = |value: fn(&(Xyxy, f32)) -> f32| -> ArrayRef {
        Arc::new(boxes.iter().map(|row| row.as_ref().map(value)).collect::<Float32Array>())
    };
    let mut columns: Vec<(&str, ArrayRef)> = Vec::new();
    for (name, values) in ids {
        columns.push((name, Arc::new(UInt64Array::from(values))));
    }
    columns.push(("x1", column(|row| row.0.x1)));
    columns.push(("y1", column(|row| row.0.y1)));
    columns.push(("x2", column(|row| row.0.x2)));
    columns.push(("y2", column(|row| row.0.y2)));
    columns.push(("score", column(|row| row.1)));
    let nullable = columns.into_iter().map(|(name, array)| (name, array, true));
    let batch = RecordBatch::try_from_iter_with_nullable(nullable).expect("BUG: all columns have one value a row");

    let path = file.path().to_owned();
    let mut write = || -> Result<(), ParquetError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_key_value_metadata(Some(vec![KeyValue::new(FORMAT_KEY.to_owned(), FORMAT.to_owned())]))
            .build();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(())
    };
    write().map_err(|error| write_error(&path, std::io::Error::other(error)))?;
    Ok(file.finish()?)
}

fn read_table(path: &Path) -> Result<Vec<RecordBatch>> {
    let file = File::open(path).map_err(|source| ovenbird_data::Error::Read { path: path.to_owned(), source })?;
    let damaged = |error: &dyn std::fmt::Display| malformed(path, error.to_string());
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| damaged(&error))?;
    let entries = builder.metadata().file_metadata().key_value_metadata();
    let format = entries.and_then(|entries| entries.iter().find(|entry| entry.key == FORMAT_KEY)).and_then(|entry| entry.value.clone());
    if format.as_deref() != Some(FORMAT) {
        let found = format.unwrap_or_else(|| "none".into());
        return Err(malformed(path, format!("expected a table of format {FORMAT}, found {found}")));
    }
    let reader = builder.build().map_err(|error| damaged(&error))?;
    reader.map(|batch| batch.map_err(|error| damaged(&error))).collect()
}

fn ids(path: &Path, batch: &RecordBatch, name: &str) -> Result<Vec<u64>> {
    let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let column = column.ok_or_else(|| malformed(path, format!("expected a u64 column `{name}`")))?;
    Ok(column.values().to_vec())
}

fn boxes(path: &Path, batch: &RecordBatch) -> Result<Vec<(Option<Xyxy>, f32)>> {
    let column = |name: &str| -> Result<Float32Array> {
        let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float32Type>());
        column.cloned().ok_or_else(|| malformed(path, format!("expected an f32 column `{name}`")))
    };
    let (x1, y1, x2, y2, score) = (column("x1")?, column("y1")?, column("x2")?, column("y2")?, column("score")?);
    let row = |row: usize| {
        let xyxy = x1.is_valid(row).then(|| Xyxy { x1: x1.value(row), y1: y1.value(row), x2: x2.value(row), y2: y2.value(row) });
        (xyxy, score.value(row))
    };
    Ok((0..batch.num_rows()).map(row).collect())
}
