//! `clip/globals`: embeddings of whole images.

use std::{ops::Range, sync::Arc};

use ovenbird_data::{
    annotations::ImageInfo,
    images::{Image, Preprocess},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    encoder::{Clip, InputMode, Pixels, View},
    features::{ANNOTATIONS, CHECKPOINT, GLOBALS, IMAGES, consumer, image_units},
};
use crate::{
    Context, ImageConsumer, ImageStage, Inputs, PortInfo, Result, Stage, Unit, Units,
    artifacts::{Dtype, Row, RowKind},
    contract::run_alone,
    pass::{Cut, Views},
};

/// What the network sees of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// The whole image at its own size; positions are interpolated (OADP's adaptive preprocessing).
    #[default]
    Native,
    /// The centre square at the size of CLIP's training.
    Square,
    /// As `square`, of JPEGs decoded at a half, a quarter or an eighth of their size where that is still enough: their preparation takes
    /// four fifths of the time. Embeddings keep a cosine of 0.999 to those of `square` on the average, and of 0.98 at the least (300
    /// scenes of the toy world, the quickstart's CLIP). For accelerators that wait for pictures.
    Draft,
}

/// CLIP embeddings of whole images.
///
/// One unit-norm embedding an image, in ascending image id. (OADP, section 4.1: globals.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Globals {
    /// How CLIP is run.
    pub clip: Clip,
    /// What the network sees of an image.
    pub resize: Resize,
    /// How embeddings are stored.
    pub dtype: Dtype,
}

struct GlobalViews {
    resize: Resize,
    preprocess: Preprocess,
    /// Of images that the network sees at their own size, px.
    least_side: u32,
}

impl Views for GlobalViews {
    fn n_views(&self, _place: usize, _info: &ImageInfo) -> usize {
        1
    }

    fn refusal(&self, _place: usize, info: &ImageInfo) -> Option<(String, &'static str)> {
        let is_too_small = self.resize == Resize::Native && info.width.min(info.height) < self.least_side;
        let (width, height, least) = (info.width, info.height, self.least_side);
        let problem = format!("{width} x {height} px, but the network needs {least} px on both sides of an image at its own size");
        is_too_small.then_some((problem, "leave it out: `on_bad_item: skip`, or resize all images to squares: `with: {resize: square}`"))
    }

    fn cut(&self, _place: usize, info: &ImageInfo, image: &Arc<Image>, _views: Range<usize>) -> Cut {
        let pixels = match self.resize {
            Resize::Native => Image::clone(image),
            Resize::Square => self.preprocess.square(image),
            Resize::Draft => self.preprocess.square_of_draft(image, [info.width, info.height]),
        };
        Cut::Views(vec![View { pixels: Pixels::Ready(pixels), background: None }])
    }

    fn draft_side(&self) -> Option<u32> {
        (self.resize == Resize::Draft).then_some(self.preprocess.side_px)
    }

    fn row(&self, _place: usize, info: &ImageInfo, embeddings: &[f32], _dim: usize) -> Row {
        Row::Image(info.id, embeddings.to_vec())
    }
}

impl Stage for Globals {
    const KIND: &'static str = "clip/globals";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[GLOBALS.info()];
    const USES_DEVICE: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        image_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        run_alone(self, units, cx)
    }
}

impl ImageStage for Globals {
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let mode = match self.resize {
            Resize::Native => InputMode::Native,
            Resize::Square | Resize::Draft => InputMode::Squares,
        };
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, mode, cx)?;
        let views = GlobalViews { resize: self.resize, preprocess: encoder.preprocess, least_side: encoder.least_side() };
        consumer((units, cx), annotations, encoder, views, GLOBALS.info().name, RowKind::Image(self.dtype))
    }
}
