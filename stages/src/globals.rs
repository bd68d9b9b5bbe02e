//! `globals/import` and `globals/export`: embeddings of whole images from and for the OADP reference.

use ovenbird_data::annotations::ImageInfo;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    In, Out, PortInfo, Result,
    artifacts::{
        Dtype, FeatureFiles, ImageFeatures, Piece, Places, Row, RowKind,
        feature_files::{Read, write_global},
    },
    exchange::{FileWriter, Readable, Writable},
};

const IMPORTED: Out<ImageFeatures> = Out::new("features", "By image: `image_id` u64, `embedding` f16 [D], unit norm.");

/// Embeddings of whole images that the OADP reference extracted, checked.
///
/// Reads the file `{id:012}.pth` of every image of the annotations: a tensor f16 [D] of unit norm. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FromFiles {}

impl Readable for FromFiles {
    const KIND: &'static str = "globals/import";
    const FEATURES: PortInfo = IMPORTED.info();
    const ROWS: RowKind = RowKind::Image(Dtype::F16);

    fn read(&self, files: &FeatureFiles, image: &ImageInfo) -> Result<Read<Row>> {
        let Read { row, dim } = files.global(image)?;
        Ok(Read { row: Row::Image(image.id, row), dim })
    }
}

/// Embeddings of whole images as files that the OADP reference reads.
///
/// Writes the file `{id:012}.pth` of each image: a tensor f16 [D], which `torch.load(weights_only=True)` reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ToFiles {}

impl Writable for ToFiles {
    type Features = ImageFeatures;

    const KIND: &'static str = "globals/export";
    const FEATURES: In<ImageFeatures> = In::required("features", "Embeddings of whole images.");

    fn places(features: &ImageFeatures) -> Result<Places<'_>> {
        features.places()
    }

    fn write(&self, places: &Places<'_>, piece: &Piece, files: &FileWriter<'_>) -> Result<()> {
        let mut images = places.images(piece)?.into_iter();
        images.try_for_each(|(image, embedding)| files.write(image, |out| write_global(&embedding, out)))
    }
}
