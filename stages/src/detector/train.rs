//! `detector/train`: a two-stage detector, trained on base classes.

use std::collections::BTreeMap;

use ovenbird_models::rcnn::{Config, classifier::LogitScale};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ANNOTATIONS, CARD_KEY, CLASSES, Card, DetectorFile, IMAGES, MULTILABEL_PROMPTS, PRETRAINED, PROMPTS,
    learner::OpenLearner,
    spaces_of_prompts,
    training::{Course, Ports, Training, train},
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{ImageFeatures, RegionFeatures},
    clip::{Space, space},
};

/// How large the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// ResNet-50 of caffe style, a pyramid of 256 channels with batch normalisation, heads of four convolutions, which learn from 512 regions
    /// of an image: OADP's.
    #[default]
    R50,
    /// A ResNet-18 of a quarter of the width, 64 channels, heads of one convolution, 128 regions, for images of 128 to 320 px: learns from
    /// nothing in minutes on two cores.
    Toy,
}

/// A factor of a loss that grows linearly to its full size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LossWeight {
    /// The factor in the end.
    pub weight: f64,
    /// After how many steps; 0 for at once.
    pub warmup_steps: u32,
}

impl LossWeight {
    /// At a step, counted from 1. (OADP, section 6.4.)
    pub(super) fn at(self, step: u32) -> f64 {
        self.weight * (f64::from(step) / f64::from(self.warmup_steps.max(1))).min(1.0)
    }
}

/// How the weights of label losses warm up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LabelWarmup {
    /// As written down: they grow with the steps. (The reference's defect 1, mended.)
    #[default]
    Fixed,
    /// They stay at the first step's, a thousandth or less of the weight: published OADP was trained so.
    Reference,
}

/// What regions of many objects (`iscrowd`) are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Crowds {
    /// Nothing: boxes that lie in them and are no object are background. (OADP, as most detectors: the reference's defect 13.)
    #[default]
    Background,
    /// Boxes that lie in them with half of their area, and are no object, are not learned from.
    Ignored,
}

/// What is learned from CLIP's embeddings of proposals, blocks and whole images, and of which classes blocks and images show. The defaults are
/// OADP's. (Section 6.4.)
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Distillation {
    /// Weighs the mean absolute difference between the object head's embeddings of proposals and CLIP's.
    pub objects: LossWeight,
    /// The same of the block head's of blocks.
    pub blocks: LossWeight,
    /// Weighs the mean squared difference between the cosines of blocks among each other, as the head has them and as CLIP does.
    pub relation_loss: LossWeight,
    /// Weighs the asymmetric loss of the base classes that blocks show.
    pub block_labels: LossWeight,
    /// Weighs the summed squared difference between the global head's embeddings of images and CLIP's.
    pub globals: LossWeight,
    /// Weighs the asymmetric loss of the base classes that images show.
    pub global_labels: LossWeight,
    /// How the weights of both label losses warm up.
    pub label_warmup: LabelWarmup,
    /// Divides cosines of whole images in training, where there are no `multilabel_prompts`.
    pub global_temperature: f64,
    /// Images that are taken together: all their blocks are related, and what is summed is summed over them; the groups of a batch are
    /// averaged. The reference trains with two images on each of eight devices.
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
    fn check(&self) -> Vec<Problem> {
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
    pub(super) fn of_labels(&self, loss: LossWeight, step: u32) -> f64 {
        match self.label_warmup {
            LabelWarmup::Fixed => loss.at(step),
            LabelWarmup::Reference => loss.at(1),
        }
    }
}

/// Trains an open-vocabulary two-stage detector on base classes: ViLD, and with `blocks` and `globals` OADP's distillation pyramid.
///
/// The box head tells base classes apart by their embeddings and corrects boxes. For each of `features`, `blocks` and `globals` that is
/// given there is one head more, which learns to give the same embeddings as CLIP; those of blocks and images learn which base classes these
/// show, too. Of these heads only the object head is asked in detection. The defaults are ViLD's for COCO and, where OADP has more, OADP's.
/// (Gu et al. 2022; Wang et al. 2023; OADP, sections 6.1 to 6.5.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// How large the network is.
    pub network: Network,
    /// Whether masks are learned and drawn too, one for all classes (OADP for LVIS).
    pub masks: bool,
    /// Divides cosines in training.
    pub train_temperature: f64,
    /// Divides cosines in detection.
    pub test_temperature: f64,
    /// What regions of many objects are.
    pub crowds: Crowds,
    /// What is learned from CLIP's embeddings, where there are any.
    pub distillation: Distillation,
    /// How it is trained.
    pub training: Training,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            network: Network::R50,
            masks: false,
            train_temperature: 0.01,
            test_temperature: 0.007,
            crowds: Crowds::default(),
            distillation: Distillation::default(),
            training: Training::default(),
        }
    }
}

const FEATURES: In<RegionFeatures> =
    In::optional("features", "CLIP embeddings of proposals on the same images (`clip/objects`), for the object head to learn.");
const BLOCKS: In<RegionFeatures> =
    In::optional("blocks", "CLIP embeddings of blocks of the same images (`clip/blocks`), for the block head to learn.");
const GLOBALS: In<ImageFeatures> =
    In::optional("globals", "CLIP embeddings of the same images (`clip/globals`), for the global head to learn.");
const PORTS: Ports<DetectorFile> = Ports::new(Out::new(
    "detector",
    "Weights under mmdet's names, safetensors, f32, and how the network is built; of every unit that stays.",
));

impl Stage for Train {
    const KIND: &'static str = "detector/train";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] = &[
        IMAGES.info(),
        ANNOTATIONS.info(),
        CLASSES.info(),
        PROMPTS.info(),
        MULTILABEL_PROMPTS.info(),
        FEATURES.info(),
        BLOCKS.info(),
        GLOBALS.info(),
        PRETRAINED.info(),
    ];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let mut problems = Problem::unless(&[
            ("train_temperature", is_positive(self.train_temperature), "a number above 0"),
            ("test_temperature", is_positive(self.test_temperature), "a number above 0"),
        ]);
        problems.extend(self.distillation.check());
        problems.extend(self.training.check());
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        self.training.units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let learner = OpenLearner::begin(self, units, cx)?;
        let dim = learner.card.config.embed_dim;
        let mut course = Course::of(&self.training, cx)?.with_features([FEATURES, BLOCKS], GLOBALS, dim, cx)?;
        if self.masks {
            course = course.with_masks()?;
        }
        let card = serde_json::to_string(&learner.card).expect("BUG: a card is plain JSON");
        train(&learner, &course, &PORTS, &BTreeMap::from([(CARD_KEY.to_owned(), card)]), units, cx)
    }
}

/// Which heads a detector has besides the box head.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) object: bool,
    pub(super) block: bool,
    pub(super) global: bool,
    pub(super) mask: bool,
}

impl Network {
    /// A detector of this size for class embeddings of `embed_dim` numbers.
    pub(super) fn config(self, embed_dim: i64, heads: Heads) -> Config {
        let all = match self {
            Self::R50 => Config::oadp(embed_dim),
            Self::Toy => Config::toy(embed_dim),
        };
        let config = Config {
            object_head: all.object_head.filter(|_| heads.object),
            block_head: all.block_head.filter(|_| heads.block),
            has_global_head: heads.global,
            ..all
        };
        if heads.mask { config.with_masks() } else { config }
    }

    /// How many regions of an image are learned from.
    pub(super) fn regions_per_image(self) -> usize {
        match self {
            Self::R50 => 512,
            Self::Toy => 128,
        }
    }
}

impl Train {
    /// How a detector for class embeddings of `embed_dim` numbers is built and asked.
    pub(super) fn card(&self, embed_dim: i64, inputs: &Inputs) -> Result<Card> {
        let is_given = |port: PortInfo| inputs.ports.contains_key(port.name);
        let heads =
            Heads { object: is_given(FEATURES.info()), block: is_given(BLOCKS.info()), global: is_given(GLOBALS.info()), mask: self.masks };
        Ok(Card {
            config: self.network.config(embed_dim, heads),
            has_prompts: is_given(PROMPTS.info()),
            has_multilabel_prompts: is_given(MULTILABEL_PROMPTS.info()),
            fits: self.training.fits(),
            scale: LogitScale::Temperature { train: self.train_temperature, test: self.test_temperature },
            clip: clip_of(inputs)?,
        })
    }
}

/// The CLIP of all embeddings that are learned from. Fails where they are of several.
fn clip_of(inputs: &Inputs) -> Result<Option<Space>> {
    let [text, image] = spaces_of_prompts(inputs)?;
    let regions = |port: In<RegionFeatures>| {
        let clip = inputs.read_if_given(port)?.map(|features| features.clip()).transpose()?;
        Ok::<_, Error>((port.info().name, clip.flatten()))
    };
    let globals = inputs.read_if_given(GLOBALS)?.map(|features| features.clip()).transpose()?.flatten();
    space::common(&[text, image, regions(FEATURES)?, regions(BLOCKS)?, (GLOBALS.info().name, globals)])
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
            assert!((fixed.of_labels(loss, 5000) - in_the_end).abs() < 1e-12);
            assert!((reference.of_labels(loss, 5000) - stuck).abs() < 1e-12);
        }
        let at_once = LossWeight { weight: 3.0, warmup_steps: 0 };
        assert!((at_once.at(1) - 3.0).abs() < 1e-12);
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
    }
}
