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

/// CLIP embeddings of crops of proposals.
///
/// Each proposal is expanded about its centre, clipped to the image, its corners rounded half to even, then resized and centre-cropped as
/// CLIP does. With several expansions the unit-norm embeddings are added and normalised again (ViLD uses 1.0 and 1.5).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Proposals {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The factors by which boxes grow on each axis; one crop for each.
    pub expand: Vec<f32>,
    /// Proposals smaller than this on either side are skipped, in px.
    pub min_side: f32,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

impl Default for Proposals {
    fn default() -> Self {
        Self { clip: Clip::default(), expand: vec![1.0], min_side: 4.0, dtype: Dtype::default() }
    }
}

struct ProposalViews<'a> {
    expand: &'a [f32],
    cropper: Cropper,
    proposals: ImageProposals,
}

impl Views for ProposalViews<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        self.proposals.n_views(place, self.expand.len())
    }

    fn refusal(&self, place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        self.proposals.refusal(place)
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut {
        let view = |view: usize| {
            let (proposal, factor) = (&self.proposals.of(place)[view / self.expand.len()], self.expand[view % self.expand.len()]);
            let pixels = self.cropper.square(image, proposal.xyxy.expanded(factor, [image.width, image.height]));
            View { pixels, background: None }
        };
        Cut::Views(views.map(view).collect())
    }

    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row {
        let embeddings = embeddings.chunks_exact((self.expand.len() * dim).max(1)).flat_map(|crops| averaged(crops, dim)).collect();
        Row::Regions(regions(info, self.proposals.of(place), embeddings))
    }
}

impl Stage for Proposals {
    const KIND: &'static str = "clip/proposals";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let are_factors = !self.expand.is_empty() && self.expand.iter().all(|factor| factor.is_finite() && *factor > 0.0);
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
        let views = ProposalViews { expand: &self.expand, cropper: encoder.cropper(), proposals };
        consumer((units, cx), annotations, encoder, views, REGIONS.info().name, RowKind::Regions(self.dtype))
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
