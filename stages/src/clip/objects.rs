//! `clip/objects`: embeddings of objects in their surroundings.

use std::{ops::Range, sync::Arc};

use ovenbird_data::{annotations::ImageInfo, images::Image, proposals::Proposal, views};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    encoder::{Clip, Cropper, Encoder, InputMode, View},
    features::{ANNOTATIONS, CHECKPOINT, IMAGES, ImageProposals, PROPOSALS, REGIONS, consumer, region_units, regions},
};
use crate::{
    Context, Error, ImageConsumer, ImageStage, Inputs, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Dtype, Row, RowKind},
    contract::run_alone,
    pass::{Cut, Views},
};

/// The size of the square around an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Square {
    /// Eight times the object's area, regardless of the image, as in published features. An object more than eight times as long as wide is
    /// cut off; the square around a large object reaches beyond the image and is black there (defect 6 in docs/recipes/oadp.md).
    #[default]
    Reference,
    /// The same, but at most the image's shorter side and at least the object's longer side.
    Fixed,
}

/// CLIP embeddings of objects with their surroundings, by masked attention of an object token.
///
/// Each proposal is cropped with a square around it, of which the object fills an eighth. The network takes patches at half of CLIP's
/// stride, and an additional token, which begins as the class token and attends only to patches of the object. Vision transformers only.
/// (OADP, section 4.3: objects.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The size of the square around an object.
    pub square: Square,
    /// Proposals smaller than this on either side are skipped, in px.
    pub min_side: f32,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

impl Default for Objects {
    fn default() -> Self {
        Self { clip: Clip::default(), square: Square::default(), min_side: 4.0, dtype: Dtype::default() }
    }
}

struct ObjectViews {
    square: Square,
    cropper: Cropper,
    grid: usize,
    proposals: ImageProposals,
}

impl Views for ObjectViews {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals.n_views(place, 1)
    }

    fn refusal(&self, place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        self.proposals.refusal(place)
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let size = [image.width, image.height];
        let view = |proposal: &Proposal| {
            let square = match self.square {
                Square::Reference => views::object_square(&proposal.xyxy, size),
                Square::Fixed => views::clamped_object_square(&proposal.xyxy, size),
            };
            let background = views::background(&proposal.xyxy, &square, self.grid);
            View { pixels: self.cropper.square(image, views::rounded(&square)), background: Some(background) }
        };
        Cut::Views(self.proposals.of(place)[views].iter().map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], _dim: usize) -> Row {
        Row::Regions(regions(info, self.proposals.of(place), embeddings.to_vec()))
    }
}

impl Stage for Objects {
    const KIND: &'static str = "clip/objects";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        // A box without an area has no square.
        Problem::unless(&[("min_side", self.min_side > 0.0, "a side above 0 px")])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        run_alone(self, units, cx)
    }
}

impl ImageStage for Objects {
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
        let (annotations, proposals) = ImageProposals::large(self.min_side, cx)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, InputMode::Objects, cx)?;
        let grid = object_grid(&encoder)?;
        let views = ObjectViews { square: self.square, cropper: encoder.cropper(), grid, proposals };
        consumer((units, cx), annotations, encoder, views, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}

fn object_grid(encoder: &Encoder) -> Result<usize> {
    encoder.object_grid().ok_or_else(|| Error::Input {
        port: CHECKPOINT.info().name,
        problem: "a ResNet: the object token needs the patches of a vision transformer".into(),
        hint: "use a ViT, or `clip/proposals`".into(),
    })
}
