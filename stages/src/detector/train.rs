//! `detector/train`: a two-stage detector, trained on base classes.

use std::collections::BTreeMap;

use ovenbird_data::{boxes::Xyxy, training::ShownMask};
use ovenbird_models::{
    Misfit, Phase,
    checkpoint::Checkpoint,
    detector::{
        Config, Detector, REGION_CODER,
        boxes::{BoxLoss, ImageSize, Suppression, boxes_tensor},
        classifier::{LogitScale, Vocabulary},
        heads::{MaskRule, ObjectMask, RegionRule, mask_loss, region_losses},
        layout,
        matching::{Assigner, Sampler},
        rpn::ProposalRule,
    },
};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use super::{
    ANNOTATIONS, CARD_KEY, CLASSES, Card, DetectorFile, IMAGES, PRETRAINED, PROMPTS, class_embeddings,
    training::{Batch, Course, Learner, Ports, Training, train},
};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, RegionFeatures},
};

/// How large the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// ResNet-50 of caffe style, a pyramid of 256 channels with batch normalisation, heads of four convolutions: OADP's.
    #[default]
    R50,
    /// A ResNet-18 of a quarter of the width, 64 channels, for images of 128 to 320 px: learns from nothing in minutes on two cores.
    Toy,
}

/// A factor of a loss that grows linearly to its full size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LossWeight {
    /// The factor in the end.
    pub gain: f64,
    /// After how many steps; 0 for at once.
    pub warm_up_steps: u32,
}

impl LossWeight {
    /// At a step, counted from 1. (OADP, section 6.4.)
    fn at(self, step: u32) -> f64 {
        self.gain * (f64::from(step) / f64::from(self.warm_up_steps.max(1))).min(1.0)
    }
}

/// Trains an open-vocabulary two-stage detector on base classes: ViLD's text branch, and with `features` its image branch.
///
/// The box head tells base classes apart by their embeddings and corrects boxes; the object head learns to give regions the embeddings that
/// CLIP gave them. The defaults are ViLD's for COCO. (Gu et al. 2022; OADP, sections 6.1 to 6.5.)
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
    /// Of the mean absolute difference between the object head's embeddings and CLIP's.
    pub object_loss: LossWeight,
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
            object_loss: LossWeight { gain: 256.0, warm_up_steps: 200 },
            training: Training::default(),
        }
    }
}

const FEATURES: In<RegionFeatures> =
    In::optional("features", "CLIP embeddings of regions of the same images (`clip/objects`), for the object head to learn.");
const PORTS: Ports<DetectorFile> = Ports::new(Out::new(
    "detector",
    "Weights under mmdet's names, safetensors, f32, and how the network is built; of every unit that stays.",
));

impl Stage for Train {
    const KIND: &'static str = "detector/train";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), PROMPTS.info(), FEATURES.info(), PRETRAINED.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let mut problems = Problem::unless(&[
            ("train_temperature", is_positive(self.train_temperature), "a number above 0"),
            ("test_temperature", is_positive(self.test_temperature), "a number above 0"),
            ("object_loss", self.object_loss.gain >= 0.0 && self.object_loss.gain.is_finite(), "a gain from 0 on"),
        ]);
        problems.extend(self.training.check());
        problems
    }

    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(self.training.units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let learner = ViLd::begin(self, units, cx)?;
        let mut course = Course::of(&self.training, cx)?;
        if let Some(features) = cx.inputs.read_if_given(FEATURES)? {
            course = course.with_embeddings(&features, learner.card.config.embed_dim, FEATURES.info().name)?;
        }
        if self.masks {
            course = course.with_masks();
        }
        let card = serde_json::to_string(&learner.card).expect("BUG: a card is plain JSON");
        train(&self.training, &learner, &course, &PORTS, &BTreeMap::from([(CARD_KEY.to_owned(), card)]), units, cx)
    }
}

impl Train {
    fn config(&self, embed_dim: i64, has_features: bool) -> Config {
        let config = match self.network {
            Network::R50 => Config::oadp(embed_dim),
            Network::Toy => Config::toy(embed_dim),
        };
        let object_head = config.object_head.filter(|_| has_features);
        let config = Config { object_head, block_head: None, has_global_head: false, ..config };
        if self.masks { config.with_masks() } else { config }
    }

    fn card(&self, embed_dim: i64, inputs: &Inputs) -> Card {
        let is_given = |port: PortInfo| inputs.ports.contains_key(port.name);
        Card {
            config: self.config(embed_dim, is_given(FEATURES.info())),
            has_prompts: is_given(PROMPTS.info()),
            fits: self.training.fits(),
            scale: LogitScale::Temperature { train: self.train_temperature, test: self.test_temperature },
        }
    }
}

/// A detector that learns.
struct ViLd {
    detector: Detector,
    card: Card,
    vocabulary: Vocabulary,
    n_classes: i64,
    object_loss: LossWeight,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl ViLd {
    fn begin(stage: &Train, units: &[Unit], cx: &Context<'_>) -> Result<Self> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let embeddings = class_embeddings(cx.inputs, &classes)?;
        let card = stage.card(embeddings.size()[1], cx.inputs);
        let store = nn::VarStore::new(cx.device);
        let detector = Detector::new(&store.root(), &card.config, stage.training.seed)?;
        begin_with_pretrained(detector.parameters(), units, cx)?;
        let (n_classes, n_base) = (classes.all().count() as i64, classes.base.len() as i64);
        let vocabulary = Vocabulary::new(embeddings.to_device(cx.device), n_base, card.scale)?;
        Ok(Self { detector, card, vocabulary, n_classes, object_loss: stage.object_loss, _store: store })
    }
}

/// Lays the checkpoint at the port `pretrained`, if there is one, over a network whose training is about to begin, and says what did not fit.
/// A training that goes on has weights of its own.
pub(super) fn begin_with_pretrained(parameters: &BTreeMap<String, Tensor>, units: &[Unit], cx: &Context<'_>) -> Result<()> {
    if units.first().is_none_or(|unit| unit.index > 0) {
        return Ok(());
    }
    let Some(file) = cx.inputs.read_if_given(PRETRAINED)? else { return Ok(()) };
    let report = layout::load(Checkpoint::open(&file.path)?.tensors(), parameters, &file.path)?;
    let names = |misfits: &[Misfit]| misfits.iter().map(|misfit| misfit.name.as_str()).collect::<Vec<_>>().join(", ");
    cx.note(format!("begins with {} tensors of {}", report.loaded.len(), file.path.display()));
    for (what, misfits) in [
        ("begin without them, which are not in the file", &report.missing),
        ("of the file have no place in the network", &report.unmatched),
        ("have another shape in the file, and begin without it", &report.misshaped),
    ] {
        if !misfits.is_empty() {
            cx.note(format!("{} tensors {what}: {}", misfits.len(), names(misfits)));
        }
    }
    Ok(())
}

impl Learner for ViLd {
    fn parameters(&self) -> &BTreeMap<String, Tensor> {
        self.detector.parameters()
    }

    fn losses(&self, images: &Tensor, batch: &Batch, step: u32, random: &mut ChaCha8Rng) -> Result<Vec<(&'static str, Tensor)>> {
        let Detector { regions: network, bbox_head, object_head, mask_head, .. } = &self.detector;
        let pyramid = network.forward(images, Phase::Train)?;
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
        let objects: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.objects)).collect();
        let rpn = network.rpn.losses(&pyramid.predictions, &sizes, &objects, random)?;

        let proposals = network.rpn.proposals(&pyramid.predictions, &sizes, &PROPOSALS)?;
        let mut samples = Vec::new();
        for ((found, objects), image) in proposals.iter().zip(&objects).zip(&batch.images) {
            let classes = Tensor::from_slice(&image.classes);
            samples.push(SAMPLES.choose(&found.boxes, objects, &classes, self.n_classes, random)?);
        }
        let chosen: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let said = bbox_head.forward(&pyramid.pool(&self.card.config.pool, &chosen)?, Phase::Train)?;
        let logits = bbox_head.classifier.logits(&said.embeddings, &self.vocabulary, Phase::Train)?;
        let deltas = said.deltas.expect("BUG: the box head has boxes");
        let of_regions = region_losses(BoxLoss::Absolute, &logits, &deltas, &samples)?;
        let mut losses = vec![
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", of_regions.classes),
            ("boxes", of_regions.boxes),
        ];

        if let (Some(head), Some(config)) = (mask_head, &self.card.config.mask_head) {
            let (mut on_objects, mut expected) = (Vec::new(), Vec::new());
            for (sample, image) in samples.iter().zip(&batch.images) {
                let boxes = sample.boxes.narrow(0, 0, sample.objects.len() as i64);
                let masks: Vec<ObjectMask> = image.masks.iter().map(object_mask).collect();
                expected.push(MaskRule::MMDET.targets(&masks, &boxes, &sample.objects, 2 * config.pool.side)?);
                on_objects.push(boxes);
            }
            // One mask for all classes: which they are does not matter.
            let classes = vec![0; samples.iter().map(|sample| sample.objects.len()).sum()];
            let drawn = head.forward(&pyramid.pool(&config.pool, &on_objects)?, &classes)?;
            losses.push(("masks", mask_loss(&drawn, &Tensor::cat(&expected, 0))?));
        }

        if let Some(head) = object_head {
            let regions: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.regions)).collect();
            let said = head.forward(&pyramid.pool(&self.card.config.pool, &regions)?, Phase::Train)?;
            let embeddings: Vec<f32> = batch.images.iter().flat_map(|image| &image.embeddings).copied().collect();
            let expected = Tensor::from_slice(&embeddings).view([-1, self.card.config.embed_dim]).to_device(images.device());
            // The mean of nothing is not a number.
            let n_numbers = expected.numel().max(1) as f64;
            let apart = (said.embeddings - expected).abs().sum(Kind::Float) / n_numbers;
            losses.push(("objects", apart * self.object_loss.at(step + 1)));
        }
        Ok(losses)
    }
}

/// Which proposals are made in training.
const PROPOSALS: ProposalRule = ProposalRule { per_level: 2000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 };
/// Which regions are learned from.
const SAMPLES: RegionRule = RegionRule {
    assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
    sampler: Sampler { n: 512, object_fraction: 0.25 },
    coder: REGION_CODER,
};

fn object_mask(mask: &ShownMask) -> ObjectMask {
    let [[left, top], [width, height]] = [mask.from, mask.size].map(|pair| pair.map(i64::from));
    ObjectMask { pixels: Tensor::from_slice(&mask.pixels).view([height, width]), left, top }
}

/// `[N, 4]`.
pub(super) fn boxes(boxes: &[Xyxy]) -> Tensor {
    boxes_tensor(&boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parity check D7 of OADP's specification.
    #[test]
    fn weights_of_losses_are_those_of_the_specification() {
        for (step, weight) in [(1, 1.28), (100, 128.0), (200, 256.0), (300, 256.0)] {
            assert!((Train::default().object_loss.at(step) - weight).abs() < 1e-9, "{step}");
        }
        let at_once = LossWeight { gain: 3.0, warm_up_steps: 0 };
        assert!((at_once.at(1) - 3.0).abs() < 1e-12);
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
    }
}
