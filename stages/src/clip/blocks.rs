//! `clip/blocks`: embeddings of the overlapping blocks of an image pyramid.

use std::{ops::Range, sync::Arc};

use ovenbird_data::{
    annotations::ImageInfo,
    boxes::Xyxy,
    images::{Image, Preprocess},
    views,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    encoder::{Clip, InputMode, Pixels, View},
    features::{ANNOTATIONS, CHECKPOINT, IMAGES, REGIONS, consumer, image_units},
};
use crate::{
    Context, ImageConsumer, ImageStage, Inputs, PortInfo, Result, Stage, Unit, Units,
    artifacts::{Dtype, Regions, Row, RowKind, WholeBox},
    contract::run_alone,
    pass::{Cut, Views},
};

/// CLIP embeddings of overlapping blocks of an image pyramid.
///
/// The first block is the centre square of the whole image. The others have the network's input size and overlap by at least half; they
/// cover the image, then the image shrunk by 1.5, and so on, as long as a block fits. Boxes are in px of the original image, `objectness`
/// is 1.
/// (OADP, section 4.2: blocks.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Blocks {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The box of the first block.
    pub whole_box: WholeBox,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

struct BlockViews {
    whole_box: WholeBox,
    preprocess: Preprocess,
}

impl BlockViews {
    fn levels(&self, size: [u32; 2]) -> Vec<views::Level> {
        views::pyramid(size, self.preprocess.side_px)
    }
}

impl Views for BlockViews {
    fn n_views(&self, _place: usize, info: &ImageInfo) -> usize {
        1 + self.levels([info.width, info.height]).iter().map(|level| level.corners.len()).sum::<usize>()
    }

    fn cut(&self, _place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let side = i64::from(self.preprocess.side_px);
        let view = |pixels: Image| View { pixels: Pixels::Ready(pixels), background: None };
        let mut cut = Vec::with_capacity(views.len());
        if views.start == 0 {
            cut.push(view(self.preprocess.square(image)));
        }
        // Each level is resized from the one before.
        let (mut level_image, mut first) = (Arc::clone(image), 1);
        for level in self.levels([image.width, image.height]) {
            if first >= views.end {
                break;
            }
            if level.size != [level_image.width, level_image.height] {
                level_image = Arc::new(level_image.resize(level.size[0], level.size[1]));
            }
            for block in views.start.max(first)..views.end.min(first + level.corners.len()) {
                let [x, y] = level.corners[block - first].map(i64::from);
                cut.push(view(level_image.crop([x, y, x + side, y + side])));
            }
            first += level.corners.len();
        }
        Cut::Views(cut)
    }

    fn row(&self, _place: usize, info: &ImageInfo, embeddings: &[f32], _dim: usize) -> Row {
        let (size, side) = ([info.width, info.height], self.preprocess.side_px);
        let whole = self.whole_box.of(size);
        let of_level = |level: views::Level| level.corners.iter().map(|corner| level.xyxy(*corner, side)).collect::<Vec<Xyxy>>();
        let boxes: Vec<Xyxy> = std::iter::once(whole).chain(self.levels(size).into_iter().flat_map(of_level)).collect();
        let objectness = vec![1.0; boxes.len()];
        Row::Regions(Regions { image_id: info.id, size_px: size, boxes, objectness, embeddings: embeddings.to_vec() })
    }
}

impl Stage for Blocks {
    const KIND: &'static str = "clip/blocks";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        image_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        run_alone(self, units, cx)
    }
}

impl ImageStage for Blocks {
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, InputMode::Squares, cx)?;
        let views = BlockViews { whole_box: self.whole_box, preprocess: encoder.preprocess };
        consumer((units, cx), annotations, encoder, views, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}
