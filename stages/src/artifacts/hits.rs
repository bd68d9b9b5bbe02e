//! What a search found: for each class the best regions, in a Parquet table with zstd.
//!
//! One row per hit, class by class, best first: `class` utf8, `place` u64 (of the region among all that were searched), `image_id` u64,
//! `x1 y1 x2 y2` f32 in px of the original image, `score` f32 (objectness), `cosine` f32. The metadata describes the search (`ovenbird.search`):
//! the classes, those without a hit among them, and how much was searched.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, AsArray, Float32Array, StringArray, UInt64Array},
    datatypes::Float32Type,
};
use ovenbird_cache::{DraftFile, inputs::InputFile};
use ovenbird_data::{
    annotations::{ImageId, ImageInfo},
    boxes::Xyxy,
};
use ovenbird_models::search::BadRows;
use serde::{Deserialize, Serialize};

use super::tables::{Table, box_columns, boxes, check_numbers, described, ids, write_table};
use crate::{Artifact, Result, error::malformed, ports::last_file};

const FORMAT: u32 = 1;

/// A region that a search found for a class.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionHit {
    /// Its place among all regions that were searched.
    pub place: u64,
    /// Its image.
    pub image_id: ImageId,
    /// Its box, px of the original image.
    pub xyxy: Xyxy,
    /// Its objectness.
    pub objectness: f32,
    /// Its cosine to the class's embedding.
    pub cosine: f32,
}

/// How much was searched.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Searched {
    /// All regions.
    pub regions: u64,
    /// Those that were candidates.
    pub candidates: u64,
    /// Candidates without a direction.
    pub bad_rows: BadRows,
}

/// The hits of a search by class; of a search in several parts, all so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Hits {
    /// By class, best first.
    pub by_class: Vec<(String, Vec<RegionHit>)>,
    /// How much was searched.
    pub searched: Searched,
}

/// The metadata of the table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    classes: Vec<String>,
    searched: Searched,
}

impl Artifact for Hits {
    const KIND: &'static str = "hits";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str = "a table that `retrieve/boxes` made (Parquet)";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = last_file(Self::KIND, files)?;
        let (path, table) = (&file.path, Table::open(file, FORMAT, None)?);
        let Description { classes, searched } = table.description()?;
        let mut by_class: Vec<(String, Vec<RegionHit>)> = classes.into_iter().map(|class| (class, Vec::new())).collect();
        for batch in table {
            let batch = batch?;
            let (places, images, boxes) = (ids(path, &batch, "place")?, ids(path, &batch, "image_id")?, boxes(path, &batch)?);
            let classes = batch.column_by_name("class").and_then(|column| column.as_string_opt::<i32>());
            let cosines = batch.column_by_name("cosine").and_then(|column| column.as_primitive_opt::<Float32Type>());
            let (Some(classes), Some(cosines)) = (classes, cosines) else {
                return Err(malformed(path, "expected columns `class` of utf8 and `cosine` of f32"));
            };
            for (row, ((place, image), (xyxy, objectness))) in places.into_iter().zip(images).zip(boxes).enumerate() {
                let class = by_class.iter_mut().find(|(class, _)| class == classes.value(row));
                let (Some((_, hits)), Some(xyxy)) = (class, xyxy) else {
                    return Err(malformed(path, format!("row {row}: expected a box and a class that the metadata names")));
                };
                hits.push(RegionHit { place, image_id: ImageId(image), xyxy, objectness, cosine: cosines.value(row) });
            }
        }
        Ok(Self { by_class, searched })
    }
}

impl Hits {
    /// Gives classes without a hit a whole image, so that later steps have something to do in a dry run.
    pub(crate) fn fill_up(&mut self, image: &ImageInfo) {
        let xyxy = Xyxy { x1: 0.0, y1: 0.0, x2: image.width as f32, y2: image.height as f32 };
        for (_, hits) in self.by_class.iter_mut().filter(|(_, hits)| hits.is_empty()) {
            hits.push(RegionHit { place: 0, image_id: image.id, xyxy, objectness: 1.0, cosine: 0.0 });
        }
    }

    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let rows = || self.by_class.iter().flat_map(|(class, hits)| hits.iter().map(move |hit| (class, hit)));
        let boxes: Vec<Option<(Xyxy, f32)>> = rows().map(|(_, hit)| Some((hit.xyxy, hit.objectness))).collect();
        check_numbers(&boxes)?;
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            ("class", Arc::new(rows().map(|(class, _)| Some(class)).collect::<StringArray>())),
            ("place", Arc::new(rows().map(|(_, hit)| hit.place).collect::<UInt64Array>())),
            ("image_id", Arc::new(rows().map(|(_, hit)| hit.image_id.0).collect::<UInt64Array>())),
        ];
        columns.extend(box_columns(&boxes));
        columns.push(("cosine", Arc::new(rows().map(|(_, hit)| Some(hit.cosine)).collect::<Float32Array>())));
        let classes = self.by_class.iter().map(|(class, _)| class.clone()).collect();
        let description = Description { classes, searched: self.searched.clone() };
        write_table(file, columns, FORMAT, vec![described(&description)])
    }
}
