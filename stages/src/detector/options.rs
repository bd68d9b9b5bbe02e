//! How a detector is run on images, as an operator writes it.

use ovenbird_models::detector::classifier::{self, Shares};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Problem;

/// Which heads say what a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Heads {
    /// The box head and, where the detector has one, the object head, combined as `ensemble` says.
    #[default]
    Both,
    /// The box head alone.
    Box,
}

/// What a head's logits of some classes contribute to a combined score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeadWeight {
    /// Multiplies the logits before the softmax.
    pub scale: f64,
    /// Of the probability.
    pub exponent: f64,
}

/// What becomes of a region whose combined scores sum to more than 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SumAboveOne {
    /// It is detected by its scores. (The reference's defect 3, mended.)
    #[default]
    Fixed,
    /// It is not detected.
    Reference,
}

/// How the scores of both heads become one: a product of powers. By default a geometric mean, in which the box head weighs two thirds for
/// base classes and a third for novel ones. (ViLD, equation 5; OADP, section 6.6, whose tuned scores are other numbers here.)
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ensemble {
    /// Of the box head, for base classes.
    pub box_base: HeadWeight,
    /// Of the box head, for novel classes.
    pub box_novel: HeadWeight,
    /// Of the object head, for base classes.
    pub object_base: HeadWeight,
    /// Of the object head, for novel classes.
    pub object_novel: HeadWeight,
    /// The exponent of the proposal's objectness; 0 leaves it out.
    pub objectness: f64,
    /// What becomes of a region whose combined scores sum to more than 1.
    pub sum_above_one: SumAboveOne,
}

impl Default for Ensemble {
    fn default() -> Self {
        let weight = |exponent| HeadWeight { scale: 1.0, exponent };
        let (most, least) = (weight(2.0 / 3.0), weight(1.0 / 3.0));
        Self {
            box_base: most,
            box_novel: least,
            object_base: least,
            object_novel: most,
            objectness: 0.0,
            sum_above_one: SumAboveOne::default(),
        }
    }
}

impl Ensemble {
    pub(super) fn build(&self) -> classifier::Ensemble {
        let weight = |HeadWeight { scale, exponent }| classifier::Share { scale, exponent };
        classifier::Ensemble {
            bbox: Shares { base: weight(self.box_base), novel: weight(self.box_novel) },
            object: Shares { base: weight(self.object_base), novel: weight(self.object_novel) },
            objectness: self.objectness,
            overfull: match self.sum_above_one {
                SumAboveOne::Fixed => classifier::Overfull::Kept,
                SumAboveOne::Reference => classifier::Overfull::Dropped,
            },
        }
    }
}

/// Detects objects of base and novel classes with a trained detector.
///
/// Images one by one, fitted into the sides that the detector was trained with. Class-aware NMS; boxes are xyxy in px of the image. A mask
/// head draws 28 x 28 probabilities in each box, which become pixels of the image from 0.5 on.
/// (OADP, section 6.6.)
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestOptions {
    /// Which heads say what a region is.
    pub heads: Heads,
    /// How the scores of both heads become one.
    pub ensemble: Ensemble,
    /// Proposals of each pyramid level before NMS, and of an image after it.
    pub proposals: usize,
    /// A proposal falls when it overlaps a better one of its level by more.
    pub proposal_iou: f32,
    /// Detections with this score or less are dropped.
    pub score_threshold: f32,
    /// A box falls when it overlaps a better one of its class by more.
    pub nms_iou: f32,
    /// Detections kept an image.
    pub max_per_image: usize,
}

impl Default for TestOptions {
    fn default() -> Self {
        Self {
            heads: Heads::Both,
            ensemble: Ensemble::default(),
            proposals: 1000,
            proposal_iou: 0.7,
            score_threshold: 0.0,
            nms_iou: 0.5,
            max_per_image: 300,
        }
    }
}

impl TestOptions {
    /// What is wrong with the options.
    pub(super) fn check(&self) -> Vec<Problem> {
        let Ensemble { box_base, box_novel, object_base, object_novel, objectness, sum_above_one: _ } = self.ensemble;
        let is_positive = |number: f64| number >= 0.0 && number.is_finite();
        let are_weights = [box_base, box_novel, object_base, object_novel]
            .iter()
            .all(|weight| weight.scale > 0.0 && weight.scale.is_finite() && is_positive(weight.exponent));
        Problem::unless(&[
            ("ensemble", are_weights && is_positive(objectness), "scales above 0, exponents from 0 on"),
            ("proposals", self.proposals > 0, "at least 1"),
            ("proposal_iou", (0.0..=1.0).contains(&self.proposal_iou), "a number from 0 to 1"),
            ("score_threshold", (0.0..1.0).contains(&self.score_threshold), "a number from 0 to below 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }
}
