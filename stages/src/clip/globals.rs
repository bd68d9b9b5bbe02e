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

/// How an image is resized for the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// Not at all: the network gets the image at its own size, and position embeddings are interpolated (OADP's adaptive preprocessing).
    #[default]
    Native,
    /// To CLIP's input size: the shorter side is resized, the centre square cropped.
    Square,
    /// As `square`, but JPEGs are decoded at a half, a quarter or an eighth of their size where that is large enough, which saves a fifth of
    /// the preparation time. Embeddings differ slightly from those of `square`: cosine 0.999 on average and 0.98 at least (300 toy scenes,
    /// the quickstart's CLIP). Use it if the accelerator waits for images.
    Draft,
}

/// CLIP embeddings of whole images.
///
/// One unit-norm embedding per image, in ascending image id. (OADP, section 4.1: globals.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Globals {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// How an image is resized for the network.
    pub resize: Resize,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

struct GlobalViews {
    resize: Resize,
    preprocess: Preprocess,
    /// The least side of an image at its own size, in px.
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
        is_too_small.then_some((problem, "skip it: `on_bad_item: skip`, or resize all images to squares: `with: {resize: square}`"))
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
    const SKIPS_ITEMS: bool = true;

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
