//! How a detector is run on images, as an operator writes it.

use ovenbird_models::rcnn::classifier::Ensemble;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Problem;

/// The heads that classify regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Heads {
    /// The box head and, if the detector has one, the object head; `ensemble` combines their scores.
    #[default]
    Both,
    /// The box head alone.
    Box,
}

/// Detects objects of base and novel classes with a trained detector.
///
/// Images are resized as in training. NMS is per class; boxes are xyxy in px of the original image. A mask head predicts 28 x 28 probabilities
/// in each box; pixels of the original image with 0.5 or more belong to the mask. (OADP, section 6.6.)
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestOptions {
    /// Heads that classify regions.
    pub heads: Heads,
    /// How the scores of both heads are combined.
    pub ensemble: Ensemble,
    /// Proposals kept per pyramid level before NMS, and per image after it.
    pub proposals: usize,
    /// NMS removes a proposal whose IoU with a better one of its level is greater.
    pub proposal_iou: f32,
    /// Only detections with a greater score are kept.
    pub score_threshold: f32,
    /// NMS removes a box whose IoU with a better one of its class is greater.
    pub nms_iou: f32,
    /// Detections kept per image.
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
