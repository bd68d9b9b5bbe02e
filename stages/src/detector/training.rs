//! How a detector is trained, as an operator writes it under `training`.

use std::collections::BTreeMap;

use ovenbird_data::training::{self, Sample};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Context, Error, Problem, Result,
    contract::is_default,
    training::{Algorithm, Decay, Ema, EmaRule, OptimizerConfig, Parameter, Schedule, TrainingConfig, Warmup},
};

/// A loss above this has exploded.
const MAX_LOSS: f64 = 1e4;
/// AdamW's, as PyTorch's default.
const EPSILON: f64 = 1e-8;

/// The algorithm that changes the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Stochastic gradient descent with `momentum`.
    #[default]
    Sgd,
    /// AdamW (Loshchilov and Hutter 2019) with `betas`.
    Adamw,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// To a tenth at each of `lr_steps`.
    #[default]
    Steps,
    /// Along half a cosine, to 0 at the end of the training.
    Cosine,
}

/// The precision in which a network computes. Weights, gradients, losses and boxes are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainPrecision {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision, with loss scaling: the scale begins at 64, doubles after 2,000 steps without an overflow, and halves when a
    /// gradient overflows; that step is skipped. A loss that overflows ends the training.
    F16,
}

impl TrainPrecision {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

/// The classes by whose rarity images are repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RepeatClasses {
    /// Base classes: labels of others are not read.
    #[default]
    Base,
    /// All classes of the annotations, as in DetPro: novel labels decide which images are seen more often. (Defect 10 in
    /// docs/recipes/detpro-ralf.md.)
    All,
}

/// How a group of parameters is trained differently from the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Group {
    /// Factor of the learning rate.
    pub lr_mult: f64,
    /// Factor of the weight decay.
    pub decay_mult: f64,
}

impl Default for Group {
    fn default() -> Self {
        Self { lr_mult: 1.0, decay_mult: 1.0 }
    }
}

/// What the epochs of a training are, besides its images and batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Epochs {
    /// How many of them another training has made, without images of the web.
    pub(crate) start: u32,
    /// Batches of images of the web in each of the others. Each step is of batches of one sort: the last one of each sort in an epoch is filled with its first
    /// batches.
    pub(crate) n_web_batches: usize,
}

/// How a detector is trained. The defaults are OADP's for COCO, 16 images a step (methods, sections 6.2 and 6.5).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// Seed of the initial weights, the order and the sizes of images, and the sampled boxes.
    pub seed: u64,
    /// Optimizer steps.
    pub steps: u32,
    /// Passes over all images, instead of `steps`; images of rare classes count more than once (`repeat_threshold`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
    /// Steps between checkpoints: a training that is killed loses at most these.
    pub checkpoint_every: u32,
    /// Epochs between checkpoints, instead of `checkpoint_every`, where the length is given in `epochs`: with as many `keep_checkpoints` as there are, another
    /// training can start after each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_epochs: Option<u32>,
    /// Checkpoints to keep for `detector/select`, evenly spaced, the last one among them; with `epochs` all of them, if there are not more.
    pub keep_checkpoints: u32,
    /// Images per batch.
    pub batch_size: usize,
    /// Batches per step; their gradients are averaged.
    pub accumulation_steps: u32,
    /// Range from which the maximum length of the longer side is drawn for each image, in px; detection uses its upper end.
    pub max_size: [u32; 2],
    /// Range from which the length of the shorter side is drawn for each image, in px; detection uses its upper end.
    pub min_size: [u32; 2],
    /// Lengths are drawn this far apart, from the lower ends of their ranges on, in px.
    #[serde(skip_serializing_if = "is_one")]
    pub size_step: u32,
    /// Maximum lengths of the longer and the shorter side of images in detection, in px, instead of the upper ends of `max_size` and `min_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_size: Option<[u32; 2]>,
    /// Images with a class that fewer than this fraction of the images show are repeated (LVIS: 0.001); 0 for no repetition.
    pub repeat_threshold: f64,
    /// The classes that `repeat_threshold` is about.
    #[serde(skip_serializing_if = "is_default")]
    pub repeat_classes: RepeatClasses,
    /// Precision in which the network computes.
    pub precision: TrainPrecision,
    /// Algorithm that changes the weights.
    pub optimizer: OptimizerKind,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Decay rates of AdamW's two moments.
    pub betas: [f64; 2],
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the learning rate grows linearly from a thousandth of the peak.
    pub warmup_steps: u32,
    /// How the learning rate falls.
    pub lr_schedule: LrSchedule,
    /// Steps at which the learning rate falls to a tenth.
    pub lr_steps: Vec<u32>,
    /// Epochs after which the learning rate falls to a tenth, instead of `lr_steps`, where the length is given in `epochs`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lr_epochs: Vec<u32>,
    /// Weight decay of all parameters.
    pub weight_decay: f64,
    /// Parameters with other learning rates or decays, by a part of their names; where several keys match, the longest counts:
    /// `{backbone: {lr_mult: 0.1}, norm: {decay_mult: 0}}`.
    pub groups: BTreeMap<String, Group>,
    /// Maximum norm of the gradient of all parameters together; longer gradients are scaled down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// Write an exponential moving average of the weights, with this decay a step, instead of the last weights. Running statistics are those
    /// of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// How that average begins and is computed.
    #[serde(skip_serializing_if = "is_default")]
    pub averaging: EmaRule,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            seed: 3407,
            steps: 40_000,
            epochs: None,
            checkpoint_every: 1000,
            checkpoint_epochs: None,
            keep_checkpoints: 1,
            batch_size: 16,
            accumulation_steps: 1,
            max_size: [1330, 1333],
            min_size: [640, 800],
            size_step: 1,
            test_size: None,
            repeat_threshold: 0.0,
            repeat_classes: RepeatClasses::default(),
            precision: TrainPrecision::F32,
            optimizer: OptimizerKind::Sgd,
            momentum: 0.9,
            betas: [0.9, 0.999],
            lr: 0.02,
            warmup_steps: 500,
            lr_schedule: LrSchedule::Steps,
            lr_steps: vec![30_000],
            lr_epochs: Vec::new(),
            weight_decay: 2.5e-5,
            groups: BTreeMap::new(),
            clip_grad_norm: None,
            ema_decay: None,
            averaging: EmaRule::default(),
        }
    }
}

impl Training {
    /// What is wrong with the parameters; fields are named below the stage's.
    pub(crate) fn check(&self) -> Vec<Problem> {
        let is_range = |[low, high]: [u32; 2]| low <= high && low >= 32;
        let is_part = |number: f64| (0.0..1.0).contains(&number);
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let is_factor = |number: f64| number >= 0.0 && number.is_finite();
        let most_checkpoints = if self.epochs.is_some() { u32::MAX } else { self.steps.div_ceil(self.checkpoint_every.max(1)) };
        Problem::unless(&[
            ("training.steps", self.steps > 0, "at least 1"),
            ("training.epochs", self.epochs.is_none_or(|epochs| (1..=1000).contains(&epochs)), "from 1 to 1000"),
            ("training.lr_epochs", self.lr_epochs.is_empty() || self.epochs.is_some(), "none without `epochs`"),
            ("training.checkpoint_every", self.checkpoint_every > 0, "at least 1"),
            (
                "training.checkpoint_epochs",
                self.checkpoint_epochs.is_none_or(|n| n > 0 && self.epochs.is_some()),
                "at least 1, and none without `epochs`",
            ),
            // The number of checkpoints of an epoch depends on the images.
            ("training.keep_checkpoints", (1..=most_checkpoints).contains(&self.keep_checkpoints), "from 1 to the number of checkpoints"),
            ("training.batch_size", self.batch_size > 0, "at least 1"),
            ("training.accumulation_steps", self.accumulation_steps > 0, "at least 1"),
            ("training.max_size", is_range(self.max_size), "two sides from 32 px on, the smaller first"),
            ("training.min_size", is_range(self.min_size), "two sides from 32 px on, the smaller first"),
            (
                "training.test_size",
                self.test_size.is_none_or(|[longer, shorter]| shorter >= 32 && longer >= shorter),
                "the longer side, then the shorter, from 32 px on",
            ),
            ("training.size_step", self.size_step > 0, "at least 1"),
            ("training.repeat_threshold", is_part(self.repeat_threshold), "a number from 0 to below 1"),
            ("training.momentum", is_part(self.momentum), "a number from 0 to below 1"),
            ("training.betas", self.betas.into_iter().all(is_part), "two numbers from 0 to below 1"),
            ("training.lr", is_positive(self.lr), "a number above 0"),
            ("training.weight_decay", is_part(self.weight_decay), "a number from 0 to below 1"),
            (
                "training.groups",
                self.groups.values().all(|group| is_factor(group.lr_mult) && is_factor(group.decay_mult)),
                "factors from 0 on",
            ),
            ("training.clip_grad_norm", self.clip_grad_norm.is_none_or(is_positive), "a number above 0"),
            ("training.ema_decay", self.ema_decay.is_none_or(is_part), "a number from 0 to below 1"),
            ("training.averaging", is_default(&self.averaging) || self.ema_decay.is_some(), "none without `ema_decay`"),
        ])
    }

    /// The same with a length in steps, where it is in epochs of some samples, and the first of these steps.
    pub(crate) fn in_steps(&self, samples: &[Sample], epochs: Epochs) -> Result<(Self, u32)> {
        match self.epochs {
            Some(n) => self.of_epochs(n, self.copies(samples).len(), epochs),
            None => Ok((self.clone(), 0)),
        }
    }

    /// The same; in a dry run on the CPU, which emulates half precision many times slower, in f32.
    pub(crate) fn light(&self, cx: &Context<'_>) -> Self {
        if self.precision == TrainPrecision::F32 || !cx.is_light() {
            return self.clone();
        }
        cx.note("a dry run on the CPU: computes in f32, since half precision is slow here");
        Self { precision: TrainPrecision::F32, ..self.clone() }
    }

    fn of_epochs(&self, n_epochs: u32, n_images: usize, epochs: Epochs) -> Result<(Self, u32)> {
        let (n_batches, per_step) = (n_images.div_ceil(self.batch_size), self.accumulation_steps as usize);
        let steps = |n: u32| {
            let web = match epochs.n_web_batches {
                0 => 0,
                n_web => n.saturating_sub(epochs.start) as usize * (n_batches.div_ceil(per_step) + n_web.div_ceil(per_step)),
            };
            let base = if web == 0 { n } else { epochs.start };
            u32::try_from((base as usize * n_batches).div_ceil(per_step) + web).unwrap_or(u32::MAX)
        };
        let checkpoint_every = match self.checkpoint_epochs {
            Some(_) if n_batches % per_step != 0 && epochs.n_web_batches == 0 => {
                return Err(Error::Input {
                    port: "training.checkpoint_epochs",
                    problem: format!("an epoch is {n_batches} batches, which `accumulation_steps: {per_step}` does not divide into steps"),
                    hint: "set `checkpoint_every`, in steps, or another `batch_size`".into(),
                });
            }
            Some(n) => steps(epochs.start.saturating_add(n)) - steps(epochs.start),
            None => self.checkpoint_every,
        };
        let lr_steps = self.lr_epochs.iter().map(|n| steps(*n)).collect();
        let (lr_epochs, checkpoint_epochs) = (Vec::new(), None);
        let whole = Self { steps: steps(n_epochs), epochs: None, lr_steps, lr_epochs, checkpoint_every, checkpoint_epochs, ..self.clone() };
        Ok((whole, steps(epochs.start)))
    }

    /// Places in some samples: each once, those with rare classes more often.
    pub(crate) fn copies(&self, samples: &[Sample]) -> Vec<usize> {
        let base = |sample: &Sample| sample.objects.iter().map(|object| object.class).collect();
        let repeats = match (self.repeat_threshold, self.repeat_classes) {
            (0.0, _) => vec![1; samples.len()],
            (threshold, RepeatClasses::Base) => training::repeats(samples.iter().map(base), threshold),
            (threshold, RepeatClasses::All) => training::repeats(samples.iter().map(|sample| sample.categories.clone()), threshold),
        };
        repeats.into_iter().enumerate().flat_map(|(place, n)| std::iter::repeat_n(place, n)).collect()
    }

    /// The maximum lengths of the longer and the shorter side of the images of a trained detector, px.
    pub(crate) fn fits(&self) -> [u32; 2] {
        self.test_size.unwrap_or([self.max_size[1], self.min_size[1]])
    }

    /// The same for the training loop. The length must be in steps: see [`Self::in_steps`]. (mmdet; OADP, section 6.5.)
    pub(crate) fn config(&self) -> TrainingConfig {
        let decay = match self.lr_schedule {
            LrSchedule::Steps => Decay::Tenths(self.lr_steps.clone()),
            LrSchedule::Cosine => Decay::Cosine { steps: self.steps },
        };
        let warmup = Warmup::From { part: 0.001, steps: self.warmup_steps.into() };
        let optimizer = OptimizerConfig {
            algorithm: match self.optimizer {
                OptimizerKind::Sgd => Algorithm::Sgd { momentum: self.momentum },
                OptimizerKind::Adamw => Algorithm::AdamW { betas: self.betas, epsilon: EPSILON },
            },
            schedule: Schedule { peak: self.lr, warmup, decay },
            weight_decay: self.weight_decay,
            accumulation_steps: self.accumulation_steps,
            clip_grad_norm: self.clip_grad_norm,
            ema: self.ema_decay.map(|decay| Ema { decay, rule: self.averaging }),
            scales_losses: self.precision == TrainPrecision::F16,
        };
        let Self { steps, checkpoint_every, keep_checkpoints, .. } = *self;
        let images_per_step = u32::try_from(self.batch_size).unwrap_or(u32::MAX).saturating_mul(self.accumulation_steps);
        TrainingConfig { first_step: 0, steps, checkpoint_every, images_per_step, keep_checkpoints, optimizer, max_loss: MAX_LOSS }
    }

    /// The parameters of a network with the factors of their groups. Fails if there is a group of none.
    pub(crate) fn grouped(&self, parameters: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Parameter>> {
        if let Some(key) = self.groups.keys().find(|key| !parameters.keys().any(|name| name.contains(*key))) {
            let names: Vec<&str> = parameters.keys().map(String::as_str).take(3).collect();
            let hint = format!("use a part of their names: `{}`, ...", names.join("`, `"));
            return Err(Error::Input { port: "training.groups", problem: format!("no parameter has `{key}` in its name"), hint });
        }
        let parameter = |(name, tensor): (&String, &Tensor)| {
            let Group { lr_mult, decay_mult } = group_of(&self.groups, name);
            (name.clone(), Parameter { lr_mult, decay_mult, ..Parameter::plain(tensor) })
        };
        Ok(parameters.iter().map(parameter).collect())
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(number: &u32) -> bool {
    *number == 1
}

/// The group of the longest key that is a part of a parameter's name.
fn group_of(groups: &BTreeMap<String, Group>, name: &str) -> Group {
    let group = groups.iter().filter(|(key, _)| name.contains(*key)).max_by_key(|(key, _)| key.len());
    group.map_or_else(Group::default, |(_, group)| *group)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::golden::{detpro_ralf, numbers};

    /// The copies of mmdet's `ClassBalancedDataset`, by its own code.
    #[test]
    fn images_of_rare_classes_are_copied_as_in_mmdet() {
        let golden = detpro_ralf("detector");
        let integers = |name: &str| numbers(&golden[name]).into_iter().map(|number| number as usize).collect::<Vec<_>>();
        let (cats, offsets, copies) = (integers("repeat/cats"), integers("repeat/offsets"), integers("repeat/copies"));
        let threshold = golden.get("repeat/threshold").map_or(0.05, |threshold| numbers(threshold)[0]);
        let shown = offsets.windows(2).map(|ends| cats[ends[0]..ends[1]].iter().copied().collect::<BTreeSet<usize>>());
        assert_eq!(training::repeats(shown, threshold), copies);
        assert!(copies.len() == 3000 && copies.iter().any(|n| *n > 1));
    }

    #[test]
    fn epochs_are_as_long_as_their_images_are_many() {
        let training = Training { epochs: Some(24), lr_epochs: vec![16, 19], ..Training::default() };
        let counted = |training: &Training| {
            let (Training { steps, lr_steps, .. }, first) = training.of_epochs(24, 2001, Epochs::default()).unwrap();
            assert_eq!(first, 0);
            (steps, lr_steps)
        };
        // 2,001 images in batches of 16 are 126.
        assert_eq!(counted(&training), (24 * 126, vec![16 * 126, 19 * 126]));
        assert_eq!(counted(&Training { accumulation_steps: 2, ..training }), (12 * 126, vec![8 * 126, 1197]));
        let without = Training { lr_epochs: vec![3], ..Training::default() };
        assert_eq!(without.check().into_iter().map(|problem| problem.field).collect::<Vec<_>>(), ["training.lr_epochs"]);
    }

    /// O3 of CORA's specification: the localizer's rate is constant over 35 epochs, a region prompt's falls to a tenth after 4 of 5. Of 107,761 images in
    /// batches of 16 these are 33,680 steps.
    #[test]
    fn rates_of_cora_are_those_of_its_specification() {
        let of = |training: Training, epochs: u32| training.of_epochs(epochs, 107_761, Epochs::default()).unwrap().0;
        let localizer = of(crate::localizer::train::Train::default().training, 35);
        assert_eq!((localizer.lr_steps.len(), localizer.batch_size, localizer.steps), (0, 32, 35 * 3368));
        let prompt = of(crate::region::prompt::Prompt::default().training, 5);
        assert_eq!((prompt.steps, prompt.lr_steps.as_slice()), (5 * 6736, [4 * 6736].as_slice()));
        for (training, step, lr) in [(&localizer, 0, 1e-4), (&localizer, 117_879, 1e-4), (&prompt, 26_943, 1e-4), (&prompt, 26_944, 1e-5)] {
            assert!((training.config().optimizer.schedule.lr_at(step) - lr).abs() < 1e-12, "{step}");
        }
    }

    /// PromptDet's: 12 epochs, of which those from the 7th on have images of the web, and a tenth of the rate after 8 and 11. (Section 9.5.)
    #[test]
    fn epochs_with_images_of_the_web_are_longer() {
        let training =
            Training { epochs: Some(12), lr_epochs: vec![8, 11], checkpoint_epochs: Some(1), warmup_steps: 5, ..Training::default() };
        let counted = |training: &Training, epochs| {
            let (Training { steps, lr_steps, checkpoint_every, .. }, first) = training.of_epochs(12, 160, epochs).unwrap();
            ([first, steps, checkpoint_every], lr_steps)
        };
        // An epoch is 10 batches.
        assert_eq!(counted(&training, Epochs::default()), ([0, 120, 10], vec![80, 110]));
        assert_eq!(counted(&training, Epochs { start: 6, n_web_batches: 0 }), ([60, 120, 10], vec![80, 110]));
        assert_eq!(counted(&training, Epochs { start: 6, n_web_batches: 4 }), ([60, 144, 14], vec![88, 130]));
        let half = Training { accumulation_steps: 4, ..training.clone() };
        assert_eq!(counted(&half, Epochs { start: 6, n_web_batches: 5 }), ([15, 45, 5], vec![25, 40]));
        assert!(half.of_epochs(12, 160, Epochs::default()).unwrap_err().to_string().contains("10 batches"));
        // The rate goes on where it was: there is no second warm-up.
        let (whole, first_step) = training.of_epochs(12, 160, Epochs { start: 6, n_web_batches: 4 }).unwrap();
        let schedule = whole.config().optimizer.schedule;
        for (step, tenths) in [(first_step, 0), (87, 0), (88, 1), (129, 1), (130, 2), (143, 2)] {
            assert!((schedule.lr_at(step) - 0.02 * 0.1_f64.powi(tenths)).abs() < 1e-12, "{step}");
        }
    }

    /// Of OADP for COCO, the box head learns at half the rate of the others: parity check D7 of its specification.
    #[test]
    fn groups_are_found_by_the_longest_part_of_a_name() {
        let rate = |lr_mult: f64| Group { lr_mult, decay_mult: 1.0 };
        let groups =
            BTreeMap::from([("bbox_head".into(), rate(0.5)), ("roi_head.bbox_head.fc_reg".into(), rate(0.25)), ("fc".into(), rate(2.0))]);
        for (name, expected) in [
            ("roi_head.bbox_head.shared_convs.0.conv.weight", 0.5),
            ("roi_head.bbox_head.fc_cls._linear.weight", 0.5),
            ("roi_head.bbox_head.fc_reg.bias", 0.25),
            ("roi_head._object_head.fc_cls._linear.weight", 2.0),
            ("roi_head._object_head.shared_convs.0.conv.weight", 1.0),
            ("rpn_head.rpn_conv.weight", 1.0),
        ] {
            assert!((group_of(&groups, name).lr_mult - expected).abs() < 1e-12, "{name}");
        }
    }

    #[test]
    fn a_group_of_no_parameter_is_refused() {
        let training = Training { groups: BTreeMap::from([("bone".into(), Group::default())]), ..Training::default() };
        let parameters = ["backbone.conv1.weight", "rpn.weight"].map(|name| (name.to_owned(), Tensor::from(0.0)));
        assert_eq!(training.grouped(&parameters.into()).unwrap().len(), 2);
        let others = BTreeMap::from([("rpn.weight".into(), Tensor::from(0.0))]);
        let refusal = training.grouped(&others).map(|_| ()).unwrap_err();
        assert_eq!(refusal.to_string(), "training.groups: no parameter has `bone` in its name");
        assert_eq!(refusal.hint().unwrap(), "use a part of their names: `rpn.weight`, ...");
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Training::default().check().is_empty());
        let wrong = Training { batch_size: 0, min_size: [800, 640], momentum: 1.0, keep_checkpoints: 41, ..Training::default() };
        let fields: Vec<String> = wrong.check().into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["training.keep_checkpoints", "training.batch_size", "training.min_size", "training.momentum"]);
    }
}
