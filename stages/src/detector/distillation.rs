//! The weights of the losses by which a detector learns CLIP's embeddings (OADP, section 6.4).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Problem;

/// The weight of a loss, which grows linearly to its full size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LossWeight {
    /// The weight after the warm-up.
    pub weight: f64,
    /// Steps over which the weight grows from 0; 0 for the full weight at once.
    pub warmup_steps: u32,
}

impl LossWeight {
    /// The weight at a step, counted from 1. (OADP, section 6.4.)
    pub(super) fn at(self, step: u32) -> f64 {
        self.weight * (f64::from(step) / f64::from(self.warmup_steps.max(1))).min(1.0)
    }
}

/// How the weights of label losses warm up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LabelWarmup {
    /// They grow with the steps, as the paper says. (Fixes defect 1 in docs/recipes/oadp.md.)
    #[default]
    Fixed,
    /// They stay at the first step's weight, a thousandth of the full weight or less, as in the published OADP.
    Reference,
}

/// Losses by which the detector learns CLIP's embeddings of proposals, blocks and whole images, and the classes that blocks and images
/// show. The defaults are OADP's. (Section 6.4.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Distillation {
    /// Weight of the mean absolute difference between the object head's embeddings of proposals and CLIP's.
    pub objects: LossWeight,
    /// Weight of the mean absolute difference between the block head's embeddings of blocks and CLIP's.
    pub blocks: LossWeight,
    /// Weight of the mean squared difference between the cosines among an image group's blocks by the block head and by CLIP.
    pub relation_loss: LossWeight,
    /// Weight of the asymmetric loss over the base classes that blocks show.
    pub block_labels: LossWeight,
    /// Weight of the summed squared difference between the global head's embeddings of images and CLIP's.
    pub globals: LossWeight,
    /// Weight of the asymmetric loss over the base classes that images show.
    pub global_labels: LossWeight,
    /// How the weights of both label losses warm up.
    pub label_warmup: LabelWarmup,
    /// Temperature of the global head's cosines in training, unless there are `multilabel_prompts`.
    pub global_temperature: f64,
    /// Images per group. Losses of embeddings and labels are taken over each group of a batch and averaged over the groups; relations are
    /// among the blocks of a group. The reference trains with two images on each of eight devices.
    pub images_per_group: usize,
}

impl Default for Distillation {
    fn default() -> Self {
        let weight = |weight, warmup_steps| LossWeight { weight, warmup_steps };
        Self {
            objects: weight(256.0, 200),
            blocks: weight(128.0, 200),
            relation_loss: weight(8.0, 200),
            block_labels: weight(16.0, 1000),
            globals: weight(0.5, 200),
            global_labels: weight(4.0, 2000),
            label_warmup: LabelWarmup::default(),
            global_temperature: 0.007,
            images_per_group: 2,
        }
    }
}

impl Distillation {
    pub(super) fn check(&self) -> Vec<Problem> {
        let is_weight = |weight: LossWeight| weight.weight >= 0.0 && weight.weight.is_finite();
        let is_temperature = self.global_temperature > 0.0 && self.global_temperature.is_finite();
        Problem::unless(&[
            ("distillation.objects", is_weight(self.objects), "a weight from 0 on"),
            ("distillation.blocks", is_weight(self.blocks), "a weight from 0 on"),
            ("distillation.relation_loss", is_weight(self.relation_loss), "a weight from 0 on"),
            ("distillation.block_labels", is_weight(self.block_labels), "a weight from 0 on"),
            ("distillation.globals", is_weight(self.globals), "a weight from 0 on"),
            ("distillation.global_labels", is_weight(self.global_labels), "a weight from 0 on"),
            ("distillation.global_temperature", is_temperature, "a number above 0"),
            ("distillation.images_per_group", self.images_per_group > 0, "at least 1"),
        ])
    }

    /// The weight of a label loss at a step, counted from 1.
    pub(super) fn label_weight(&self, loss: LossWeight, step: u32) -> f64 {
        match self.label_warmup {
            LabelWarmup::Fixed => loss.at(step),
            LabelWarmup::Reference => loss.at(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parity check D7 of OADP's specification.
    #[test]
    fn weights_of_losses_are_those_of_the_specification() {
        let fixed = Distillation::default();
        for (step, weight) in [(1, 1.28), (100, 128.0), (200, 256.0), (300, 256.0)] {
            assert!((fixed.objects.at(step) - weight).abs() < 1e-9, "{step}");
        }
        // Published OADP's label losses never left their first step (defect 1).
        let reference = Distillation { label_warmup: LabelWarmup::Reference, ..Distillation::default() };
        for (loss, stuck, in_the_end) in [(fixed.block_labels, 0.016, 16.0), (fixed.global_labels, 0.002, 4.0)] {
            assert!((fixed.label_weight(loss, 5000) - in_the_end).abs() < 1e-12);
            assert!((reference.label_weight(loss, 5000) - stuck).abs() < 1e-12);
        }
        let at_once = LossWeight { weight: 3.0, warmup_steps: 0 };
        assert!((at_once.at(1) - 3.0).abs() < 1e-12);
    }
}
