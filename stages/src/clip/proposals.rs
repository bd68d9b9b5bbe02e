//! `clip/proposals`: embeddings of crops of proposals.

use std::{ops::Range, sync::Arc};

use ovenbird_data::{
    annotations::{ImageId, ImageInfo},
    boxes::{Xyxy, clipped_rectangle},
    images::Image,
    training::Placement,
};
use ovenbird_models::{detection::boxes::ImageSize, raf};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    encoder::{Clip, Cropper, InputMode, Pixels, View},
    features::{ANNOTATIONS, CHECKPOINT, IMAGES, ImageProposals, PROPOSALS, REGIONS, consumer, region_units, regions},
};
use crate::{
    Context, ImageConsumer, ImageStage, Inputs, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Dtype, Row, RowKind},
    contract::{is_default, run_alone},
    detector::images::Normalisation,
    pass::{Cut, Views},
};

/// How crops of proposals are cut, and how the embeddings of a proposal's crops become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CropRule {
    /// Boxes are clipped to the image and their corners rounded half to even. Embeddings are normalised, added and normalised again.
    #[default]
    Vild,
    /// Corners are moved 0.001 px outwards and rounded outwards, then clipped to the image. Embeddings are added as the network computes them,
    /// and normalised once. (LP-OVOD, sections 3.2 and 3.3.)
    LpOvod,
    /// As `lp-ovod`, with corners computed in f32. (Fixes defects 1 and 3 in docs/recipes/detpro-ralf.md.)
    Detpro,
    /// As DetPro's training cut them: from the image as a training step shows it, resized to a shorter side of 640 to 800 px and mirrored or not, by
    /// one draw from the image's id; crops leave the picture, by a pixel or by what they grew, and are black there. (DetPro, section 2.)
    DetproReference,
    /// As RAF cuts a detector's proposals: from the image as the detector gets it, corners truncated to whole pixels, the crop as large as fits into
    /// the network's square, in the middle between bars: see `letterbox`. With `min_side: 0.0` the detector keeps all its proposals. (RALF,
    /// section 9.)
    Ralf,
}

/// How rule `ralf` makes squares. The defaults are RALF's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Letterbox {
    /// Maximum lengths of the longer and the shorter side of the detector's images, in px: those that it was trained with. Others show CLIP
    /// other crops than the detector looks at.
    pub max_size: [u32; 2],
    /// How colours are normalised.
    pub normalisation: raf::Normalisation,
    /// How crops are made smaller.
    pub antialias: raf::Antialias,
}

impl Default for Letterbox {
    fn default() -> Self {
        let raf::CropRule { normalisation, antialias } = raf::CropRule::default();
        Self { max_size: [1333, 800], normalisation, antialias }
    }
}

impl CropRule {
    /// Whether the network's outputs are added before they are normalised.
    fn adds_raw(self) -> bool {
        match self {
            Self::Vild | Self::Ralf => false,
            Self::LpOvod | Self::Detpro | Self::DetproReference => true,
        }
    }
}

/// CLIP embeddings of crops of proposals.
///
/// Each proposal is expanded about its centre and clipped to the image, then the crop is resized and centre-cropped as CLIP does. The
/// embeddings of several crops are added and normalised: see `rule`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Proposals {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// How crops are cut, and how the embeddings of a proposal's crops become one.
    pub rule: CropRule,
    /// How rule `ralf` makes squares.
    #[serde(skip_serializing_if = "is_default")]
    pub letterbox: Letterbox,
    /// The factors by which boxes grow on each axis; one crop for each. Without it `[1.0]`; with `lp-ovod`, `detpro` and `detpro-reference`
    /// `[1.0, 1.5]`. Rule `ralf` takes boxes as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand: Option<Vec<f32>>,
    /// Proposals smaller than this on either side are skipped, in px.
    pub min_side: f32,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

impl Default for Proposals {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            rule: CropRule::default(),
            letterbox: Letterbox::default(),
            expand: None,
            min_side: 4.0,
            dtype: Dtype::default(),
        }
    }
}

impl Proposals {
    fn factors(&self) -> &[f32] {
        match (&self.expand, self.rule) {
            (Some(factors), _) => factors,
            (None, CropRule::Vild | CropRule::Ralf) => &[1.0],
            (None, CropRule::LpOvod | CropRule::Detpro | CropRule::DetproReference) => &[1.0, 1.5],
        }
    }
}

struct ProposalViews<'a> {
    rule: CropRule,
    letterbox: Letterbox,
    factors: &'a [f32],
    cropper: Cropper,
    proposals: ImageProposals,
}

impl ProposalViews<'_> {
    /// How the image is shown, unless as it is.
    fn placement(&self, info: &ImageInfo) -> Option<Placement> {
        let size = [info.width, info.height];
        match self.rule {
            CropRule::Vild | CropRule::LpOvod | CropRule::Detpro => None,
            CropRule::DetproReference => Some(drawn_placement(info.id, size)),
            CropRule::Ralf => Some(Placement::fitting(size, self.letterbox.max_size[0], self.letterbox.max_size[1])),
        }
    }

    /// A proposal of a detector as RAF shows it to CLIP; `image`: as the detector gets it.
    fn letterboxed(&self, image: &Image, xyxy: Xyxy) -> Pixels {
        let size = ImageSize::from([image.width, image.height]);
        let rectangle = raf::whole_pixels([xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2], size);
        let Letterbox { normalisation, antialias, .. } = self.letterbox;
        let crop = Normalisation::IMAGENET.crop(image, rectangle);
        let square = raf::CropRule { normalisation, antialias }.square(&crop, self.cropper.side_px().into());
        Pixels::Input(square.expect("BUG: a crop has at least one pixel"))
    }
}

impl Views for ProposalViews<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals.n_views(place, self.factors.len())
    }

    fn refusal(&self, place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        self.proposals.refusal(place)
    }

    fn number_bytes(&self) -> usize {
        if self.rule == CropRule::Ralf { size_of::<f32>() } else { 1 }
    }

    fn shown(&self, info: &ImageInfo, image: Arc<Image>) -> Arc<Image> {
        self.placement(info).map_or(image.clone(), |placement| Arc::new(placement.pixels(&image)))
    }

    fn cut(&self, place: usize, info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let (size, placement) = ([image.width, image.height], self.placement(info));
        let view = |view: usize| {
            let (proposal, factor) = (&self.proposals.of(place)[view / self.factors.len()], self.factors[view % self.factors.len()]);
            let xyxy = placement.map_or(proposal.xyxy, |placement| placement.show(&proposal.xyxy));
            let square = |rectangle| self.cropper.square(image, rectangle);
            let pixels = match self.rule {
                CropRule::Vild => square(xyxy.expanded(factor, size)),
                CropRule::LpOvod => square(xyxy.expanded_outwards(factor.into(), size)),
                CropRule::Detpro => square(clipped_rectangle(xyxy.rounded_outwards(factor), size)),
                CropRule::DetproReference => square(xyxy.rounded_outwards(factor)),
                CropRule::Ralf => self.letterboxed(image, xyxy),
            };
            View { pixels, background: None }
        };
        Cut::Views(views.map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row {
        let of_proposals = embeddings.chunks_exact((self.factors.len() * dim).max(1));
        let embeddings = match self.rule {
            // One embedding of unit norm stays as it is.
            CropRule::Vild | CropRule::Ralf if self.factors.len() == 1 => embeddings.to_vec(),
            _ => of_proposals.flat_map(|crops| normalised_sum(crops, dim)).collect(),
        };
        Row::Regions(regions(info, self.proposals.of(place), embeddings))
    }
}

impl Stage for Proposals {
    const KIND: &'static str = "clip/proposals";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let are_factors = !self.factors().is_empty() && self.factors().iter().all(|factor| factor.is_finite() && *factor > 0.0);
        let is_ralf = self.rule == CropRule::Ralf;
        Problem::unless(&[
            ("expand", are_factors, "factors above 0"),
            ("expand", !is_ralf || self.expand.is_none(), "none with `rule: ralf`, which takes boxes as they are"),
            ("letterbox", is_ralf || self.letterbox == Letterbox::default(), "none but with `rule: ralf`"),
            ("letterbox.max_size", self.letterbox.max_size.iter().all(|side| *side > 0), "two lengths above 0 px"),
            ("min_side", self.min_side >= 0.0, "0 px or more"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        run_alone(self, units, cx)
    }
}

impl ImageStage for Proposals {
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
        let (annotations, proposals) = ImageProposals::large(self.min_side, cx)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, InputMode::Squares, cx)?;
        let encoder = if self.rule.adds_raw() { encoder.unnormalised() } else { encoder };
        let (factors, cropper) = (self.factors(), encoder.cropper());
        let views = ProposalViews { rule: self.rule, letterbox: self.letterbox, factors, cropper, proposals };
        consumer((units, cx), annotations, encoder, views, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
}

/// How a training step of DetPro shows an image of `[width, height]` px; the draw follows from its id. (DetPro, section 2.)
fn drawn_placement(image: ImageId, size: [u32; 2]) -> Placement {
    const SHORTER_PX: [u32; 6] = [640, 672, 704, 736, 768, 800];
    let mut random = ChaCha8Rng::seed_from_u64(image.0);
    let placement = Placement::fitting(size, 1333, SHORTER_PX[random.random_range(0..SHORTER_PX.len())]);
    if random.random_bool(0.5) { placement.mirrored() } else { placement }
}

/// The sum of a region's embeddings `[V, D]`, of unit norm.
fn normalised_sum(crops: &[f32], dim: usize) -> Vec<f32> {
    let mut sum = vec![0.0; dim];
    for crop in crops.chunks_exact(dim) {
        sum.iter_mut().zip(crop).for_each(|(sum, number)| *sum += number);
    }
    let norm = sum.iter().map(|number| number * number).sum::<f32>().sqrt().max(1e-12);
    sum.into_iter().map(|number| number / norm).collect()
}

#[cfg(test)]
mod tests {
    use half::f16;
    use ovenbird_data::{
        boxes::Xyxy,
        images::{Preprocess, SquareResize},
    };

    use super::*;
    use crate::golden::{detpro_ralf, lp_ovod, numbers};

    #[test]
    fn the_sum_of_several_crops_has_unit_norm() {
        let mean = normalised_sum(&[1.0, 0.0, 0.0, 1.0], 2);
        assert!(mean.iter().all(|number| (number - 0.5_f32.sqrt()).abs() < 1e-6), "{mean:?}");
    }

    /// The rectangles of LP-OVOD's own code, 32 boxes among them of which arithmetic in f32 would cut others.
    #[test]
    fn rectangles_of_lp_ovod_are_those_of_its_code() {
        let golden = lp_ovod();
        let [boxes, sizes] = ["crop/boxes", "crop/image_wh"].map(|name| numbers(&golden[name]));
        for (factor, expected) in [(1.0, "crop/b1"), (1.5, "crop/b15")] {
            let expected = numbers(&golden[expected]);
            assert_eq!(expected.len(), 289 * 4);
            let of_each = boxes.chunks_exact(4).zip(sizes.chunks_exact(2)).zip(expected.chunks_exact(4));
            for ((corners, size), expected) in of_each {
                let xyxy = Xyxy::from([corners[0] as f32, corners[1] as f32, corners[2] as f32, corners[3] as f32]);
                let found = xyxy.expanded_outwards(factor, [size[0] as u32, size[1] as u32]);
                assert_eq!(found.to_vec(), expected.iter().map(|side| *side as i64).collect::<Vec<_>>(), "{xyxy:?} x {factor}");
            }
        }
    }

    /// The rectangles of DetPro's own code, and those of parity check 1 of its specification, within the image and not.
    #[test]
    fn rectangles_of_detpro_are_those_of_its_code() {
        let golden = detpro_ralf("detector");
        let boxes = numbers(&golden["crop/boxes"]);
        for (factor, expected) in [(1.0, "crop/detector"), (1.5, "crop/detector15")] {
            let expected = numbers(&golden[expected]);
            assert_eq!(expected.len(), 400 * 4);
            for (corners, expected) in boxes.as_chunks::<4>().0.iter().zip(expected.as_chunks::<4>().0) {
                let xyxy = Xyxy::from(corners.map(|corner| corner as f32));
                assert_eq!(xyxy.rounded_outwards(factor), expected.map(|corner| corner as i64), "{xyxy:?} x {factor}");
            }
        }
        for (corners, factor, expected, inside) in [
            ([0.0, 0.0, 50.2, 40.0], 1.0, [-1, -1, 51, 41], [0, 0, 51, 41]),
            ([0.0, 0.0, 50.2, 40.0], 1.5, [-13, -11, 63, 51], [0, 0, 63, 51]),
            ([100.0, 80.0, 220.0, 160.0], 1.5, [69, 59, 251, 181], [69, 59, 251, 181]),
            ([600.5, 400.25, 640.0, 480.0], 1.5, [590, 380, 650, 500], [590, 380, 640, 480]),
            ([0.0; 4], 1.0, [-1, -1, 1, 1], [0, 0, 1, 1]),
        ] {
            let found = Xyxy::from(corners).rounded_outwards(factor);
            assert_eq!((found, clipped_rectangle(found, [640, 480])), (expected, inside), "{corners:?} x {factor}");
        }
    }

    #[test]
    fn an_image_is_drawn_alike_every_time_and_images_differ() {
        let drawn: Vec<Placement> = (0..64).map(|id| drawn_placement(ImageId(id), [640, 480])).collect();
        assert_eq!(drawn, (0..64).map(|id| drawn_placement(ImageId(id), [640, 480])).collect::<Vec<_>>());
        let shorter: std::collections::BTreeSet<u32> = drawn.iter().map(|placement| placement.to[1]).collect();
        assert_eq!(shorter.into_iter().collect::<Vec<_>>(), [640, 672, 704, 736, 768, 800]);
        assert!((10..54).contains(&drawn.iter().filter(|placement| placement.is_mirrored).count()));
    }

    /// Pixels of DetPro's preprocessing, every sixteenth of both axes, and the means of all; black where a crop leaves the picture.
    #[test]
    fn crops_are_prepared_as_in_detpro() {
        let golden = detpro_ralf("detector");
        let rgb = numbers(&golden["preprocess/image"]).into_iter().map(|level| level as u8).collect();
        let image = Image { width: 90, height: 60, rgb };
        let boxes = numbers(&golden["preprocess/boxes"]);
        let rectangles = boxes.as_chunks::<4>().0.iter().map(|corners| corners.map(|corner| corner as i64));
        let (expected, means) = (numbers(&golden["preprocess/out_every16"]), numbers(&golden["preprocess/out_mean"]));
        assert_prepared(&image, rectangles, &expected, &means, 16);
    }

    /// Pixels of LP-OVOD's preprocessing, every eighth of both axes.
    #[test]
    fn crops_are_prepared_as_in_lp_ovod() {
        let golden = lp_ovod();
        let rgb = numbers(&golden["preprocess/image"]).into_iter().map(|level| level as u8).collect();
        let image = Image { width: 130, height: 96, rgb };
        let boxes = numbers(&golden["preprocess/boxes"]);
        let rectangles = boxes.as_chunks::<4>().0.iter().map(|corners| corners.map(|corner| corner as i64));
        let (expected, means) = (numbers(&golden["preprocess/out_every8"]), numbers(&golden["preprocess/mean"]));
        assert_prepared(&image, rectangles, &expected, &means, 8);
    }

    /// Compares some pixels of what CLIP sees of rectangles, every so many of both axes, and the means of channels; two hundredths are a grey level in
    /// units of the standard deviation.
    fn assert_prepared(image: &Image, rectangles: impl Iterator<Item = [i64; 4]>, expected: &[f64], means: &[f64], step: usize) {
        let [mean, std] = [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]];
        let preprocess = Preprocess { side_px: 224, resize: SquareResize::Shortest, mean, std };
        let n = 224 / step;
        for (place, rectangle) in rectangles.enumerate() {
            let square = preprocess.square_of(image, rectangle);
            let mut pixels = vec![0.0; 3 * 224 * 224];
            preprocess.normalise(&square, &mut pixels);
            for (channel, plane) in pixels.chunks_exact(224 * 224).enumerate() {
                let mean = plane.iter().map(|number| f64::from(*number)).sum::<f64>() / plane.len() as f64;
                assert!((mean - means[3 * place + channel]).abs() < 2e-3, "{place}: {mean}");
                for (row, column) in (0..n).flat_map(|row| (0..n).map(move |column| (row, column))) {
                    let found = f64::from(plane[step * row * 224 + step * column]);
                    let expected = expected[((3 * place + channel) * n + row) * n + column];
                    assert!((found - expected).abs() < 0.02, "{place}, {channel}, {row}, {column}: {found} {expected}");
                }
            }
        }
    }

    /// Two raw outputs are added, then normalised; normalising each first gives other embeddings.
    #[test]
    fn embeddings_of_lp_ovod_are_those_of_its_code() {
        let golden = lp_ovod();
        let [near, far, expected, halves] = ["embed/f1", "embed/f15", "embed/out", "embed/out_f16"].map(|name| numbers(&golden[name]));
        let mut is_other = false;
        for row in 0..7 {
            let part = |all: &[f64]| all[16 * row..][..16].iter().map(|number| *number as f32).collect::<Vec<f32>>();
            let found = normalised_sum(&[part(&near), part(&far)].concat(), 16);
            for (place, number) in found.iter().enumerate() {
                assert!((f64::from(*number) - expected[16 * row + place]).abs() < 1e-6);
                assert!((f16::from_f32(*number).to_f64() - halves[16 * row + place]).abs() < 5e-4);
            }
            let each_first = [part(&near), part(&far)].map(|crop| normalised_sum(&crop, 16)).concat();
            is_other |= normalised_sum(&each_first, 16).iter().zip(&found).any(|(one, other)| (one - other).abs() > 1e-3);
        }
        assert!(is_other, "the order of sum and norm does not show");
    }
}
