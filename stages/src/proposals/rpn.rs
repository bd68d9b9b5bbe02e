//! `proposals/rpn`: a trained detector's own proposals.

use ovenbird_models::{detection::boxes::Suppression, rcnn::rpn::ProposalRule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{found, network_units, propose};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::Proposals,
    detector::{
        images::{Normalisation, TestImage},
        load::FirstStage,
        ports::{ANNOTATIONS, IMAGES},
        predictor::{Found, Predictor},
        spec::DetectorFile,
    },
};

/// The proposals that a trained detector makes for itself, from its first stage.
///
/// With the same numbers as `detector/test` has they are those that it looks at, but for rounding; as an input of `clip/proposals` they get
/// embeddings, by which RAF corrects scores. Scores are objectness; boxes are xyxy in px of the original image. (RALF, section 9.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rpn {
    /// NMS removes a box whose IoU with a better one of its pyramid level is greater.
    pub nms_iou: f32,
    /// Proposals kept per pyramid level before NMS, and per image after it.
    pub max_per_image: usize,
}

impl Default for Rpn {
    fn default() -> Self {
        Self { nms_iou: 0.7, max_per_image: 1000 }
    }
}

const DETECTOR: In<DetectorFile> = In::required("detector", "A detector from `detector/train`, `detector/import` or `detector/select`.");
const PROPOSALS: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) and scores by image, best first.");

impl Stage for Rpn {
    const KIND: &'static str = "proposals/rpn";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROPOSALS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        network_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let suppression = Suppression { iou: self.nms_iou, keep: self.max_per_image };
        let rule = ProposalRule { per_level: self.max_per_image, suppression, least_side: 0.0 };
        let predictor = RpnPredictor { first: FirstStage::load(&cx.inputs.read(DETECTOR)?, cx.device)?, rule };
        propose(&predictor, PROPOSALS, units, cx)
    }
}

struct RpnPredictor {
    first: FirstStage,
    rule: ProposalRule,
}

impl Predictor for RpnPredictor {
    fn fits(&self) -> [u32; 2] {
        self.first.fits
    }

    fn normalisation(&self) -> Normalisation {
        self.first.normalisation
    }

    fn predict(&self, TestImage { placement, size, pixels, .. }: &TestImage<'_>, _n_threads: usize) -> Result<Vec<Found>> {
        found(&self.first.network.propose(pixels, &[*size], &self.rule)?[0], placement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detector::options::TestOptions;

    #[test]
    fn the_defaults_are_those_of_a_detector_in_its_test() {
        assert!(Stage::check(&Rpn::default()).is_empty());
        let (Rpn { nms_iou, max_per_image }, test) = (Rpn::default(), TestOptions::default());
        assert_eq!((nms_iou.to_bits(), max_per_image), (test.proposal_iou.to_bits(), test.proposals));
    }
}
