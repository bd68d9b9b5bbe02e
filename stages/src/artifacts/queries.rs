//! What queries of CORA's localizer began with and found, in a Parquet table with zstd.
//!
//! One row per query, image by image, the surest first: `image_id` u64, `query` u64 (its place among the anchors), `class` utf8 (the class that its anchor got),
//! `x1 y1 x2 y2` f32 (its box) and `anchor_x1 anchor_y1 anchor_x2 anchor_y2` f32 (its anchor) in px of the original image, `score` f32 (objectness).

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, AsArray, Float32Array, RecordBatch, StringArray, UInt64Array},
    datatypes::Float32Type,
};
use ovenbird_cache::{DraftFile, inputs::InputFile};
use ovenbird_data::{annotations::ImageId, boxes::Xyxy};

use super::tables::{Table, box_columns, boxes, check_numbers, ids, write_table};
use crate::{Artifact, Result, error::malformed};

const FORMAT: u32 = 1;
const ANCHOR: [&str; 4] = ["anchor_x1", "anchor_y1", "anchor_x2", "anchor_y2"];

/// A query.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// Its image.
    pub image_id: ImageId,
    /// Its place among the anchors.
    pub query: u64,
    /// The class that its anchor got.
    pub class: String,
    /// Its anchor, px of the original image; it may leave it.
    pub anchor: Xyxy,
    /// Its box, px of the original image.
    pub xyxy: Xyxy,
    /// How sure it is of an object, from 0 to 1.
    pub objectness: f32,
}

/// The surest queries of some images.
#[derive(Debug, Clone, PartialEq)]
pub struct Queries(pub Vec<Query>);

impl Artifact for Queries {
    const KIND: &'static str = "queries";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str = "a table that `localizer/test` made (Parquet)";

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut all = Vec::new();
        for file in files {
            for batch in Table::open(file, FORMAT, None)? {
                all.extend(queries(file, &batch?)?);
            }
        }
        Ok(Self(all))
    }
}

fn queries(file: &InputFile, batch: &RecordBatch) -> Result<Vec<Query>> {
    let path = &file.path;
    let (images, queries, boxes) = (ids(path, batch, "image_id")?, ids(path, batch, "query")?, boxes(path, batch)?);
    let classes = batch.column_by_name("class").and_then(|column| column.as_string_opt::<i32>());
    let corners = ANCHOR.map(|name| batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float32Type>()));
    let (Some(classes), [Some(x1), Some(y1), Some(x2), Some(y2)]) = (classes, corners) else {
        return Err(malformed(path, format!("expected columns `class` of utf8 and {} of f32", ANCHOR.join(", "))));
    };
    let mut all = Vec::new();
    for (row, ((image, query), (xyxy, objectness))) in images.into_iter().zip(queries).zip(boxes).enumerate() {
        let xyxy = xyxy.ok_or_else(|| malformed(path, format!("row {row}: expected a box, found none")))?;
        let anchor = Xyxy { x1: x1.value(row), y1: y1.value(row), x2: x2.value(row), y2: y2.value(row) };
        all.push(Query { image_id: ImageId(image), query, class: classes.value(row).to_owned(), anchor, xyxy, objectness });
    }
    Ok(all)
}

impl Queries {
    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let Self(all) = self;
        let boxes: Vec<Option<(Xyxy, f32)>> = all.iter().map(|query| Some((query.xyxy, query.objectness))).collect();
        check_numbers(&boxes)?;
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            ("image_id", Arc::new(all.iter().map(|query| query.image_id.0).collect::<UInt64Array>())),
            ("query", Arc::new(all.iter().map(|query| query.query).collect::<UInt64Array>())),
            ("class", Arc::new(all.iter().map(|query| Some(&query.class)).collect::<StringArray>())),
        ];
        columns.extend(box_columns(&boxes));
        let corner = |corner: fn(&Xyxy) -> f32| Arc::new(all.iter().map(|query| Some(corner(&query.anchor))).collect::<Float32Array>());
        let corners: [ArrayRef; 4] = [corner(|xyxy| xyxy.x1), corner(|xyxy| xyxy.y1), corner(|xyxy| xyxy.x2), corner(|xyxy| xyxy.y2)];
        columns.extend(ANCHOR.into_iter().zip(corners));
        write_table(file, columns, FORMAT, Vec::new())
    }
}
