//! `objects/import` and `objects/export`: embeddings of objects from and for the OADP reference.

use ovenbird_data::annotations::ImageInfo;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    In, Out, PortInfo, Result,
    artifacts::{
        Dtype, FeatureFiles, Piece, Places, RegionFeatures, Row, RowKind,
        feature_files::{Holds, Read, box_problem, write_regions},
    },
    exchange::{FileWriter, Readable, Writable},
};

const IMPORTED: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` f16 [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Embeddings of objects that the OADP reference extracted, checked.
///
/// Reads the file `{id:012}.pth` of every image of the annotations: a dict of `embeddings` f16 [N, D] of unit norm, `bboxes` f16 [N, 4] in
/// the image and `objectness` f16 [N, 1] in [0, 1]. All rows are kept, also boxes that rounding to f16 made smaller than 4 px, which the
/// reference drops once more when it trains (defect 4 in docs/recipes/oadp.md). (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FromFiles {}

impl Readable for FromFiles {
    const KIND: &'static str = "objects/import";
    const FEATURES: PortInfo = IMPORTED.info();
    const ROWS: RowKind = RowKind::Regions(Dtype::F16);

    fn read(&self, files: &FeatureFiles, image: &ImageInfo) -> Result<Read<Row>> {
        let Read { row, dim } = files.regions(image, Holds::Objects)?;
        if let Some(problem) = box_problem(&row.boxes, 0, row.size_px) {
            let hint = "these objects seem to be of another image: give the annotations that they were extracted for";
            return Err(files.malformed(image, problem, hint));
        }
        Ok(Read { row: Row::Regions(row), dim })
    }
}

/// Embeddings of objects as files that the OADP reference reads.
///
/// Writes the file `{id:012}.pth` of each image: a dict of `embeddings` f16 [N, D], `bboxes` f16 [N, 4] and `objectness` f16 [N, 1], which
/// `torch.load(weights_only=True)` reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ToFiles {}

impl Writable for ToFiles {
    type Features = RegionFeatures;

    const KIND: &'static str = "objects/export";
    const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of regions.");

    fn places(features: &RegionFeatures) -> Result<Places<'_>> {
        features.places()
    }

    fn write(&self, places: &Places<'_>, piece: &Piece, files: &FileWriter<'_>) -> Result<()> {
        let (mut rows, dim) = places.regions(piece)?;
        rows.try_for_each(|objects| {
            let objects = objects?;
            files.write(objects.image_id, |out| write_regions(&objects, dim, Holds::Objects, out))
        })
    }
}
