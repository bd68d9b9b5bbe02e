//! `clip/proposals`: embeddings of crops of proposals.

use std::{ops::Range, sync::Arc};

use ovenbird_data::{annotations::ImageInfo, images::Image};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    encoder::{Clip, Cropper, InputMode, View},
    features::{ANNOTATIONS, CHECKPOINT, IMAGES, ImageProposals, PROPOSALS, REGIONS, consumer, region_units, regions},
};
use crate::{
    Context, ImageConsumer, ImageStage, Inputs, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Dtype, Row, RowKind},
    contract::run_alone,
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
    /// The factors by which boxes grow on each axis; one crop for each. Without it `[1.0]`; with `rule: lp-ovod` `[1.0, 1.5]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand: Option<Vec<f32>>,
    /// Proposals smaller than this on either side are skipped, in px.
    pub min_side: f32,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

impl Default for Proposals {
    fn default() -> Self {
        Self { clip: Clip::default(), rule: CropRule::default(), expand: None, min_side: 4.0, dtype: Dtype::default() }
    }
}

impl Proposals {
    fn factors(&self) -> &[f32] {
        match (&self.expand, self.rule) {
            (Some(factors), _) => factors,
            (None, CropRule::Vild) => &[1.0],
            (None, CropRule::LpOvod) => &[1.0, 1.5],
        }
    }
}

struct ProposalViews<'a> {
    rule: CropRule,
    factors: &'a [f32],
    cropper: Cropper,
    proposals: ImageProposals,
}

impl Views for ProposalViews<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals.n_views(place, self.factors.len())
    }

    fn refusal(&self, place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        self.proposals.refusal(place)
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let size = [image.width, image.height];
        let view = |view: usize| {
            let (proposal, factor) = (&self.proposals.of(place)[view / self.factors.len()], self.factors[view % self.factors.len()]);
            let rectangle = match self.rule {
                CropRule::Vild => proposal.xyxy.expanded(factor, size),
                CropRule::LpOvod => proposal.xyxy.expanded_outwards(factor.into(), size),
            };
            View { pixels: self.cropper.square(image, rectangle), background: None }
        };
        Cut::Views(views.map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row {
        let of_proposals = embeddings.chunks_exact((self.factors.len() * dim).max(1));
        let embeddings = match self.rule {
            // One embedding of unit norm stays as it is.
            CropRule::Vild if self.factors.len() == 1 => embeddings.to_vec(),
            CropRule::Vild | CropRule::LpOvod => of_proposals.flat_map(|crops| normalised_sum(crops, dim)).collect(),
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
        Problem::unless(&[("expand", are_factors, "factors above 0"), ("min_side", self.min_side >= 0.0, "0 px or more")])
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
        let encoder = match self.rule {
            CropRule::Vild => encoder,
            CropRule::LpOvod => encoder.unnormalised(),
        };
        let views = ProposalViews { rule: self.rule, factors: self.factors(), cropper: encoder.cropper(), proposals };
        consumer((units, cx), annotations, encoder, views, REGIONS.info().name, RowKind::Regions(self.dtype))
    }
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
    use crate::golden::{lp_ovod, numbers};

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

    /// Pixels of LP-OVOD's preprocessing, every eighth of both axes; two hundredths are a grey level in units of the standard deviation.
    #[test]
    fn crops_are_prepared_as_in_lp_ovod() {
        let golden = lp_ovod();
        let rgb = numbers(&golden["preprocess/image"]).into_iter().map(|level| level as u8).collect();
        let image = Image { width: 130, height: 96, rgb };
        let [mean, std] = [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]];
        let preprocess = Preprocess { side_px: 224, resize: SquareResize::Shortest, mean, std };
        let (expected, means) = (numbers(&golden["preprocess/out_every8"]), numbers(&golden["preprocess/mean"]));
        for (place, rectangle) in numbers(&golden["preprocess/boxes"]).chunks_exact(4).enumerate() {
            let square = preprocess.square_of(&image, [0, 1, 2, 3].map(|corner| rectangle[corner] as i64));
            let mut pixels = vec![0.0; 3 * 224 * 224];
            preprocess.normalise(&square, &mut pixels);
            for (channel, plane) in pixels.chunks_exact(224 * 224).enumerate() {
                let mean = plane.iter().map(|number| f64::from(*number)).sum::<f64>() / plane.len() as f64;
                assert!((mean - means[3 * place + channel]).abs() < 2e-3, "{place}: {mean}");
                for row in 0..28 {
                    for column in 0..28 {
                        let (found, expected) =
                            (plane[8 * row * 224 + 8 * column], expected[((3 * place + channel) * 28 + row) * 28 + column]);
                        assert!((f64::from(found) - expected).abs() < 0.02, "{place}, {channel}, {row}, {column}: {found} {expected}");
                    }
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
