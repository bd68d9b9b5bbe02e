//! How a detector is run on images, as an operator writes it.

use ovenbird_models::{
    detection::boxes::Suppression,
    raf,
    rcnn::{classifier::Ensemble, heads::DetectionRule, rpn::ProposalRule, sigmoid::Fusion},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    images::Padding,
    ports::{AUGMENTED, PROPOSALS},
};
use crate::{Error, Inputs, Problem, Result, contract::is_default};

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
/// in each box; pixels of the original image with 0.5 or more belong to the mask. (OADP, section 6.6; detectors with a linear classifier:
/// LP-OVOD, section 8; augmented scores: RALF, sections 9 and 10.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestOptions {
    /// Heads that classify regions.
    pub heads: Heads,
    /// How the scores of both heads are combined, of a detector whose box head compares with class embeddings.
    pub ensemble: Ensemble,
    /// How the scores of both heads and of proposals are combined, of a detector with a linear classifier (`head: sigmoid`).
    #[serde(skip_serializing_if = "is_default")]
    pub fusion: Fusion,
    /// How augmented embeddings of proposals correct scores, where `augmented` is an input; without it as for DetPro on LVIS. (RALF, sections 9
    /// and 10.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raf: Option<raf::Rule>,
    /// What fills images up to a multiple of 32 px.
    #[serde(skip_serializing_if = "is_default")]
    pub padding: Padding,
    /// The detector's own proposals kept per pyramid level before NMS, and per image after it; unused where `proposals` are an input.
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
            fusion: Fusion::default(),
            raf: None,
            padding: Padding::default(),
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
        let Fusion { alpha, beta, novel_temperature, image_temperature } = self.fusion;
        let raf = self.raf.unwrap_or_default();
        let is_above_0 = |number: f64| number > 0.0 && number.is_finite();
        Problem::unless(&[
            ("fusion.alpha", (0.0..=1.0).contains(&alpha), "a number from 0 to 1"),
            ("fusion.beta", (0.0..=1.0).contains(&beta), "a number from 0 to 1"),
            ("fusion.novel_temperature", is_above_0(novel_temperature), "a number above 0"),
            ("fusion.image_temperature", is_above_0(image_temperature), "a number above 0"),
            ("ensemble", are_weights && is_positive(objectness), "scales above 0, exponents from 0 on"),
            ("raf.top_k", raf.top_k > 0, "at least 1"),
            (
                "raf.threshold",
                raf.threshold == raf::Threshold::Reference || raf.fusion == raf::Fusion::Gate,
                "`scaled` with `fusion: gate` alone, which makes scores smaller",
            ),
            (
                "raf.fusion",
                raf.fusion != raf::Fusion::Sum || self.heads == Heads::Box,
                "`sum` with `heads: box` alone, whose logits it adds to",
            ),
            ("proposals", self.proposals > 0, "at least 1"),
            ("proposal_iou", (0.0..=1.0).contains(&self.proposal_iou), "a number from 0 to 1"),
            ("score_threshold", (0.0..1.0).contains(&self.score_threshold), "a number from 0 to below 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    /// Fails where a rule is given that is for detectors with a linear classifier alone.
    pub(super) fn refuse_fusion(&self) -> Result<()> {
        match self.fusion == Fusion::default() {
            true => Ok(()),
            false => Err(Self::other_rule("fusion", "the detector compares with class embeddings", "ensemble")),
        }
    }

    /// Fails where a rule is given that is not for detectors with a linear classifier.
    pub(super) fn refuse_ensemble(&self) -> Result<()> {
        match self.ensemble == Ensemble::default() {
            true => Ok(()),
            false => Err(Self::other_rule("ensemble", "the detector has a linear classifier (`head: sigmoid`)", "fusion")),
        }
    }

    /// Fails where a rule is given that combines scores of heads, of a detector that has one head.
    pub(super) fn refuse_combining(&self) -> Result<()> {
        let is_given =
            [("ensemble", self.ensemble != Ensemble::default()), ("fusion", self.fusion != Fusion::default()), ("raf", self.raf.is_some())];
        match is_given.into_iter().find(|(_, is_given)| *is_given) {
            None => Ok(()),
            Some((given, _)) => {
                let problem = "given, but the detector has one head alone that classifies (`head: cosine`)".into();
                Err(Error::Input { port: given, problem, hint: "leave it out".into() })
            }
        }
    }

    /// Fails where a rule for augmented embeddings is given, but none of these, or where proposals are given twice.
    pub(super) fn check_augmented(&self, inputs: &Inputs) -> Result<()> {
        let is_given = |port: &str| inputs.ports.contains_key(port);
        let (problem, hint) = match (is_given(AUGMENTED.info().name), is_given(PROPOSALS.info().name)) {
            (true, true) => ("given together with `proposals`", "give one of both: augmented embeddings have their proposals' boxes"),
            (false, _) if self.raf.is_some() => ("none are given, but `raf` is set", "give augmented embeddings, or leave out `raf`"),
            _ => return Ok(()),
        };
        Err(Error::Input { port: AUGMENTED.info().name, problem: problem.into(), hint: hint.into() })
    }

    fn other_rule(given: &'static str, why: &str, other: &str) -> Error {
        let (problem, hint) = (format!("given, but {why}"), format!("set `{other}` instead"));
        Error::Input { port: given, problem, hint }
    }

    /// How the detector's own proposals are chosen.
    pub(super) fn proposal_rule(&self) -> ProposalRule {
        let suppression = Suppression { iou: self.proposal_iou, keep: self.proposals };
        ProposalRule { per_level: self.proposals, suppression, least_side: 0.0 }
    }

    /// How detections are chosen.
    pub(super) fn detection_rule(&self) -> DetectionRule {
        let suppression = Suppression { iou: self.nms_iou, keep: self.max_per_image };
        DetectionRule { threshold: self.score_threshold, suppression }
    }
}
