//! `clip/globals`, `clip/blocks`, `clip/objects` and `clip/proposals`: embeddings of whole images, of overlapping blocks, of objects in
//! their surroundings, and of what proposals cut out.
//!
//! What differs from the OADP reference is a parameter each, and its default is said there; in every case boxes are stored in f32
//! (there: f16), an image without proposals has an empty row (there: a crash), and proposals are matched to images by id.

use std::{ops::Range, sync::Arc};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, ImageInfo},
    boxes::Xyxy,
    images::{Image, Preprocess},
    proposals::Proposal,
    views,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::encoder::{Clip, Cutter, Encoder, Manner};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Rider, Stage, Unit, Units,
    artifacts::{
        AnnotationFile, CheckpointFile, Dtype, ImageFeatures, Images, Proposals as ProposalTable, RegionFeatures, Regions, Row, RowKind,
    },
    pass::{self, Cut, Frames, Pixels, Sight},
};

const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const PROPOSALS: In<ProposalTable> = In::required("proposals", "The boxes, of the same images as `annotations`.");

const GLOBALS: Out<ImageFeatures> = Out::new("features", "By image: `image_id` u64, `embedding` [D], unit norm.");
const REGIONS: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Units of stages whose items are images alone.
fn image_units(inputs: &Inputs) -> Result<Units> {
    let items = inputs.read(IMAGES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?)?;
    Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
}

/// Units of stages whose items are images with their proposals.
fn region_units(inputs: &Inputs) -> Result<Units> {
    let annotations = inputs.read(ANNOTATIONS)?.load_images()?;
    let proposals = inputs.read(PROPOSALS)?.of_images(&annotations.images)?;
    let images = inputs.read(IMAGES)?.items(&annotations)?;
    let item = |(image, proposals): (Digest, &Vec<Proposal>)| {
        let numbers = proposals.iter().flat_map(|Proposal { xyxy, score }| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2, *score]);
        let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
        Digest::of_list("ovenbird regions 1", [("image", image), ("proposals", Digest::of(&bytes))])
    };
    let items = images.into_iter().zip(&proposals).map(item).collect();
    Ok(Units::Independent { items, replaces: vec!["images", "annotations", "proposals"] })
}

/// The proposals of every image that are large enough on both sides.
fn kept(inputs: &Inputs, min_side: f32) -> Result<(Annotations, Vec<Vec<Proposal>>)> {
    let annotations = inputs.read(ANNOTATIONS)?.load_images()?;
    let mut proposals = inputs.read(PROPOSALS)?.of_images(&annotations.images)?;
    for of_image in &mut proposals {
        of_image.retain(|proposal| proposal.xyxy.width() >= min_side && proposal.xyxy.height() >= min_side);
    }
    Ok((annotations, proposals))
}

/// A rider with a network over the images of some annotations.
fn rider<'a>(
    (units, cx): (&'a [Unit], &'a Context<'a>),
    annotations: Annotations,
    encoder: Encoder,
    sight: impl Sight + 'a,
    port: &'static str,
    rows: RowKind,
) -> Result<Rider<'a>> {
    let frames = Frames { images: cx.inputs.read(IMAGES)?, infos: annotations.images };
    Ok(Rider { cx, units, frames, sight: Box::new(sight), encoder: Some(encoder), port, rows })
}

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

struct GlobalSight {
    resize: Resize,
    preprocess: Preprocess,
    /// Of images that the network sees at their own size, px.
    least_side: u32,
}

impl Sight for GlobalSight {
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
        Cut::Views(vec![pass::View { pixels: Pixels::Ready(pixels), background: None }])
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
    const RIDES: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        image_units(inputs)
    }

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let manner = match self.resize {
            Resize::Native => Manner::Native,
            Resize::Square | Resize::Draft => Manner::Squares,
        };
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, manner, cx)?;
        let sight = GlobalSight { resize: self.resize, preprocess: encoder.preprocess, least_side: encoder.least_side() };
        rider((units, cx), annotations, encoder, sight, GLOBALS.info().name, RowKind::Image(self.dtype))
    }
}

/// The box that stands for the whole image among its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WholeBox {
    /// The centre square that the network sees. (The reference's defect 2, mended.)
    #[default]
    Fixed,
    /// Left, top, side, side of it: what the reference stores as xyxy.
    Reference,
}

impl WholeBox {
    /// The box of an image of `[width, height]` px.
    pub(crate) fn of(self, size: [u32; 2]) -> Xyxy {
        match self {
            Self::Fixed => views::whole_box(size),
            Self::Reference => views::reference_whole_box(size),
        }
    }
}

/// CLIP embeddings of overlapping blocks of an image pyramid.
///
/// First the whole image as its centre square, then blocks of the network's size without resizing, overlapping by half at least, of
/// levels that are 1.5 times smaller each, as long as a block fits. Boxes are px of the original image, `objectness` is 1.
/// (OADP, section 4.2: blocks.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Blocks {
    /// How CLIP is run.
    pub clip: Clip,
    /// The first row's box.
    pub whole_box: WholeBox,
    /// How embeddings are stored.
    pub dtype: Dtype,
}

struct BlockSight {
    whole_box: WholeBox,
    preprocess: Preprocess,
}

impl BlockSight {
    fn levels(&self, size: [u32; 2]) -> Vec<views::Level> {
        views::pyramid(size, self.preprocess.side_px)
    }
}

impl Sight for BlockSight {
    fn n_views(&self, _place: usize, info: &ImageInfo) -> usize {
        1 + self.levels([info.width, info.height]).iter().map(|level| level.corners.len()).sum::<usize>()
    }

    fn cut(&self, _place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let side = i64::from(self.preprocess.side_px);
        let view = |pixels: Image| pass::View { pixels: Pixels::Ready(pixels), background: None };
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
    const RIDES: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        image_units(inputs)
    }

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, Manner::Squares, cx)?;
        let sight = BlockSight { whole_box: self.whole_box, preprocess: encoder.preprocess };
        rider((units, cx), annotations, encoder, sight, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}

/// How large the square around an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Square {
    /// Eight times the object's area, whatever the image: published features are made so. An object longer than eight times its
    /// width is cut, a large one is shrunk inside black margins (the reference's defect 6).
    #[default]
    Reference,
    /// The same, but at most the image's shorter side and at least the object's longer one.
    Fixed,
}

/// CLIP embeddings of objects in their surroundings, by object-token mask attention.
///
/// For each proposal at least `min_side` px on both sides: a square around it, of which the object fills an eighth; patches twice as
/// dense as CLIP's; and a token that begins as the class token and looks only at patches of the object. Vision transformers only.
/// (OADP, section 4.3: objects.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// How CLIP is run.
    pub clip: Clip,
    /// How large the square is.
    pub square: Square,
    /// Proposals smaller than this on either side are left out, in px.
    pub min_side: f32,
    /// How embeddings are stored.
    pub dtype: Dtype,
}

impl Default for Objects {
    fn default() -> Self {
        Self { clip: Clip::default(), square: Square::default(), min_side: 4.0, dtype: Dtype::default() }
    }
}

struct ObjectSight {
    square: Square,
    cutter: Cutter,
    grid: usize,
    proposals: Vec<Vec<Proposal>>,
}

impl Sight for ObjectSight {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals[place].len()
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let size = [image.width, image.height];
        let view = |proposal: &Proposal| {
            let square = match self.square {
                Square::Reference => views::object_square(&proposal.xyxy, size),
                Square::Fixed => views::clamped_object_square(&proposal.xyxy, size),
            };
            let background = views::background(&proposal.xyxy, &square, self.grid);
            pass::View { pixels: self.cutter.square(image, views::rounded(&square)), background: Some(background) }
        };
        Cut::Views(self.proposals[place][views].iter().map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], _dim: usize) -> Row {
        Row::Regions(regions(info, &self.proposals[place], embeddings.to_vec()))
    }
}

fn regions(info: &ImageInfo, proposals: &[Proposal], embeddings: Vec<f32>) -> Regions {
    Regions {
        image_id: info.id,
        size_px: [info.width, info.height],
        boxes: proposals.iter().map(|proposal| proposal.xyxy).collect(),
        objectness: proposals.iter().map(|proposal| proposal.score).collect(),
        embeddings,
    }
}

impl Stage for Objects {
    const KIND: &'static str = "clip/objects";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const RIDES: bool = true;

    fn check(&self) -> Vec<Problem> {
        // A box without an area has no square.
        Problem::unless(&[("min_side", self.min_side > 0.0, "a side above 0 px")])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        let (annotations, proposals) = kept(cx.inputs, self.min_side)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, Manner::Objects, cx)?;
        let grid = object_grid(&encoder)?;
        let sight = ObjectSight { square: self.square, cutter: encoder.cutter(), grid, proposals };
        rider((units, cx), annotations, encoder, sight, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}

fn object_grid(encoder: &Encoder) -> Result<usize> {
    encoder.object_grid().ok_or_else(|| Error::Input {
        port: CHECKPOINT.info().name,
        problem: "a ResNet: the object token looks at the patches of a vision transformer".into(),
        hint: "use a ViT, or `clip/proposals`".into(),
    })
}

/// CLIP embeddings of what proposals cut out.
///
/// For each proposal at least `min_side` px on both sides: expand the box about its centre, clip it to the image, round its
/// corners half to even, resize and centre-crop as CLIP does, encode. With several expansions the unit-norm embeddings are
/// added and normalised again (ViLD uses 1.0 and 1.5).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Proposals {
    /// How CLIP is run.
    pub clip: Clip,
    /// By how much boxes grow on each axis, one crop an entry.
    pub expand: Vec<f32>,
    /// Proposals smaller than this on either side are left out, in px.
    pub min_side: f32,
    /// How embeddings are stored.
    pub dtype: Dtype,
}

impl Default for Proposals {
    fn default() -> Self {
        Self { clip: Clip::default(), expand: vec![1.0], min_side: 4.0, dtype: Dtype::default() }
    }
}

struct ProposalSight<'a> {
    expand: &'a [f32],
    cutter: Cutter,
    proposals: Vec<Vec<Proposal>>,
}

impl Sight for ProposalSight<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals[place].len() * self.expand.len()
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let view = |view: usize| {
            let (proposal, factor) = (&self.proposals[place][view / self.expand.len()], self.expand[view % self.expand.len()]);
            let pixels = self.cutter.square(image, proposal.xyxy.expanded(factor, [image.width, image.height]));
            pass::View { pixels, background: None }
        };
        Cut::Views(views.map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row {
        let embeddings = embeddings.chunks_exact((self.expand.len() * dim).max(1)).flat_map(|crops| averaged(crops, dim)).collect();
        Row::Regions(regions(info, &self.proposals[place], embeddings))
    }
}

impl Stage for Proposals {
    const KIND: &'static str = "clip/proposals";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const RIDES: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.expand.is_empty() || self.expand.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            problems.push(Problem::new("expand", format!("expected factors above 0, found {:?}", self.expand)));
        }
        if self.min_side.is_nan() || self.min_side < 0.0 {
            problems.push(Problem::new("min_side", format!("expected 0 or more, found {}", self.min_side)));
        }
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        let (annotations, proposals) = kept(cx.inputs, self.min_side)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, Manner::Squares, cx)?;
        let sight = ProposalSight { expand: &self.expand, cutter: encoder.cutter(), proposals };
        rider((units, cx), annotations, encoder, sight, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}

/// The normalised sum of unit-norm embeddings of one region; one embedding stays as it is.
fn averaged(crops: &[f32], dim: usize) -> Vec<f32> {
    if crops.len() == dim {
        return crops.to_vec();
    }
    let mut sum = vec![0.0; dim];
    for crop in crops.chunks_exact(dim) {
        sum.iter_mut().zip(crop).for_each(|(sum, number)| *sum += number);
    }
    let norm = sum.iter().map(|number| number * number).sum::<f32>().sqrt().max(1e-12);
    sum.into_iter().map(|number| number / norm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_crops_are_averaged_to_unit_norm() {
        assert_eq!(averaged(&[0.6, 0.8], 2), [0.6, 0.8]);
        let mean = averaged(&[1.0, 0.0, 0.0, 1.0], 2);
        assert!(mean.iter().all(|number| (number - 0.5_f32.sqrt()).abs() < 1e-6), "{mean:?}");
    }
}
