//! `detector/probe`: a classifier of novel classes, trained on features of a frozen detector.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId},
    classes::ClassSplit,
    training::Sample,
};
use ovenbird_models::{
    Phase,
    checkpoint::Checkpoint,
    rcnn::sigmoid::{Activation, NovelConfig, focal_loss, novel_logits},
};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use super::{
    labelled::Labelled,
    ports::{ANNOTATIONS, CLASSES},
    spec::{DetectorFile, DetectorSpec, SigmoidSpec},
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, RegionSample, RegionSamples, SamplesByImage},
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, train,
    },
};

/// A loss above this has exploded.
const MAX_LOSS: f64 = 1e4;
/// The name of the rows of novel classes in a detector.
const ROWS: &str = "roi_head.prototype_novel";

/// The classifier of novel classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Classifier {
    /// A sigmoid for each class, with a focal loss.
    #[default]
    Sigmoid,
    /// A softmax over the novel classes and background, with cross entropy: of features of unit length divided by a temperature. The paper's
    /// baseline.
    Softmax,
}

/// Trains a linear classifier of novel classes on features of a frozen detector, and adds it to the detector: linear probing.
///
/// The rows of the classifier begin at zero and are all that is trained. A step sees some images, each in one of its views, and their sampled
/// regions; those that match no labelled object are background. The defaults are LP-OVOD's for COCO. (LP-OVOD, section 7.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Probe {
    /// The classifier of novel classes.
    pub classifier: Classifier,
    /// Temperature of a softmax in training.
    pub train_temperature: f64,
    /// Temperature of a softmax in detection.
    pub test_temperature: f64,
    /// Seed of the order of images and of their views.
    pub seed: u64,
    /// Passes over all images.
    pub epochs: u32,
    /// Images per step.
    pub batch_size: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: u32,
    /// Peak learning rate.
    pub lr: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Steps over which the learning rate grows linearly.
    pub warmup_steps: u32,
    /// The part of the peak at which it begins.
    pub warmup_from: f64,
    /// Epochs after which the learning rate falls to a tenth.
    pub lr_epochs: Vec<u32>,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            classifier: Classifier::Sigmoid,
            train_temperature: 0.1,
            test_temperature: 0.07,
            seed: 3407,
            epochs: 12,
            batch_size: 2,
            checkpoint_every: 2000,
            lr: 0.001,
            momentum: 0.9,
            weight_decay: 2.5e-5,
            warmup_steps: 20,
            warmup_from: 0.1,
            lr_epochs: vec![8, 11],
        }
    }
}

const FEATURES: In<RegionSamples> = In::required("features", "Features of regions of these images (`detector/features`).");
const DETECTOR: In<DetectorFile> = In::required("detector", "The detector that made the features.");
const PORTS: Ports<DetectorFile> = Ports::new(
    Out::new("detector", "The detector with rows of novel classes, safetensors, f32; one file for each checkpoint kept."),
    "network.safetensors",
);

impl Stage for Probe {
    const KIND: &'static str = "detector/probe";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), ANNOTATIONS.info(), CLASSES.info(), DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let is_part = |number: f64| (0.0..1.0).contains(&number);
        Problem::unless(&[
            ("train_temperature", is_positive(self.train_temperature), "a number above 0"),
            ("test_temperature", is_positive(self.test_temperature), "a number above 0"),
            ("epochs", (1..=10_000).contains(&self.epochs), "from 1 to 10000"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("momentum", is_part(self.momentum), "a number from 0 to below 1"),
            ("weight_decay", is_part(self.weight_decay), "a number from 0 to below 1"),
            ("lr_epochs", self.lr_epochs.is_sorted(), "epochs in ascending order"),
            ("warmup_from", self.warmup_from > 0.0 && self.warmup_from <= 1.0, "a number above 0, at most 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let Labelled { samples, .. } = Labelled::of(&inputs.read(ANNOTATIONS)?.load()?);
        Ok(self.config(samples.len()).units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let (features, detector) = (cx.inputs.read(FEATURES)?, cx.inputs.read(DETECTOR)?);
        if !features.are_by(&detector.file.digest)? {
            let problem = "made by another detector than the one at `detector`: their numbers mean nothing to it".into();
            let hint = "give the detector that `detector/features` read".into();
            return Err(Error::Input { port: FEATURES.info().name, problem, hint });
        }
        let (labelled, samples) = (Labelled::of(&annotations), features.by_image()?);
        let n_images = labelled.samples.len();
        check_labels(&labelled, &samples)?;
        let class_of = class_of(&classes, &annotations, &labelled, &samples.categories()?, cx)?;
        let criterion = ProbeCriterion::new(self, &detector, &classes, cx)?;
        let images: Vec<(ImageId, usize)> = samples.images().collect();
        if images.is_empty() {
            let problem = "expected features of at least one image, found none".into();
            let hint = "look at the step that made them: all its images may have been skipped".into();
            return Err(Error::Input { port: FEATURES.info().name, problem, hint });
        }
        if images.len() < n_images {
            cx.note(format!("features of {} of {n_images} labelled images: the others were skipped", images.len()));
        }
        let width = criterion.rows.size()[1] as usize;
        let random = cx.rng(&cx.units[0]);
        let loader = ProbeLoader { samples, images, class_of, n_classes: classes.novel.len() as i64, width, stage: self, random };
        train(&self.config(n_images), &loader, &criterion, &PORTS, units, cx)
    }
}

impl Probe {
    /// The training on so many images.
    fn config(&self, n_images: usize) -> TrainingConfig {
        let per_epoch = n_images.div_ceil(self.batch_size);
        let steps = |epochs: u32| u32::try_from(per_epoch.saturating_mul(epochs as usize)).unwrap_or(u32::MAX);
        let optimizer = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: self.momentum },
            schedule: Schedule {
                peak: self.lr,
                warmup: Warmup::From { part: self.warmup_from, steps: self.warmup_steps.into() },
                decay: Decay::Tenths(self.lr_epochs.iter().map(|epoch| steps(*epoch)).collect()),
            },
            weight_decay: self.weight_decay,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        TrainingConfig {
            first_step: 0,
            steps: steps(self.epochs),
            checkpoint_every: self.checkpoint_every,
            images_per_step: u32::try_from(self.batch_size).unwrap_or(u32::MAX),
            keep_checkpoints: 1,
            optimizer,
            max_loss: MAX_LOSS,
        }
    }
}

/// Fails where features are of other images, or of other labels, than the annotations have.
fn check_labels(labelled: &Labelled, samples: &SamplesByImage) -> Result<()> {
    let of_image = |sample: &Sample| {
        let categories: BTreeSet<CategoryId> = sample.objects.iter().map(|object| labelled.categories[object.class]).collect();
        (sample.info.id, categories)
    };
    let labels: BTreeMap<ImageId, BTreeSet<CategoryId>> = labelled.samples.iter().map(of_image).collect();
    for (image, n_views) in samples.images() {
        let refused = |problem: String| {
            let hint = "give the annotations that `detector/features` read".into();
            Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint })
        };
        let Some(known) = labels.get(&image) else {
            return refused(format!("no label in image {image}, of which there are features"));
        };
        for view in 0..n_views {
            if let Some(other) = samples.categories_of(image, view)?.into_iter().find(|id| !known.contains(id)) {
                return refused(format!("image {image} has no label of category {other}, of which there are features"));
            }
        }
    }
    Ok(())
}

/// The class of each category that occurs in the labels, as a place among novel classes. Fails where one is no novel class, and notes novel
/// classes without a label.
fn class_of(
    classes: &ClassSplit,
    annotations: &Annotations,
    labelled: &Labelled,
    sampled: &[CategoryId],
    cx: &Context<'_>,
) -> Result<BTreeMap<CategoryId, i64>> {
    let objects = labelled.samples.iter().flat_map(|sample| &sample.objects);
    let labels: BTreeSet<CategoryId> = objects.map(|object| labelled.categories[object.class]).collect();
    let mut class_of = BTreeMap::new();
    for id in &labels {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint: hint.into() });
        let Some(category) = annotations.category(*id) else {
            return refused(
                format!("the features have labels of category {id}, which the annotations lack"),
                "give the annotations that the features were made with",
            );
        };
        match classes.novel.iter().position(|name| *name == category.name) {
            Some(place) => drop(class_of.insert(*id, place as i64)),
            None if classes.base.contains(&category.name) => {
                let problem = format!("a label of `{}`, which is a base class: probing learns novel classes alone", category.name);
                return refused(problem, "retrieve boxes of novel classes alone (`retrieve/boxes`), or remove these labels");
            }
            None => {
                let problem = format!("a label of `{}`, which is not among the classes", category.name);
                return refused(problem, "give classes and annotations of the same split");
            }
        }
    }
    let places: Vec<i64> = sampled.iter().map(|id| class_of[id]).collect();
    let without = classes.novel.iter().enumerate().filter(|(place, _)| !places.contains(&(*place as i64))).map(|(_, name)| name.as_str());
    let without: Vec<&str> = without.collect();
    if !without.is_empty() {
        cx.note(format!(
            "no sampled region of {} of {} novel classes, which learn only what they are not: {}",
            without.len(),
            classes.novel.len(),
            without.join(", ")
        ));
    }
    Ok(class_of)
}

/// Loads the features of a step.
struct ProbeLoader<'a> {
    samples: SamplesByImage,
    /// With the number of views of each.
    images: Vec<(ImageId, usize)>,
    class_of: BTreeMap<CategoryId, i64>,
    n_classes: i64,
    width: usize,
    stage: &'a Probe,
    random: ChaCha8Rng,
}

/// Regions of some images.
struct ProbeBatch {
    /// `[N, W]`.
    features: Vec<f32>,
    /// `[N]`; the number of classes is background.
    labels: Vec<i64>,
}

impl DataLoader for ProbeLoader<'_> {
    /// Images and their views.
    type Spec = Vec<(ImageId, usize)>;
    type Batch = ProbeBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Self::Spec, usize)> + Send {
        let epoch = |epoch: u64| {
            let mut random = self.random.clone();
            random.set_stream(epoch);
            let mut images = self.images.clone();
            images.shuffle(&mut random);
            let seen: Vec<(ImageId, usize)> = images.into_iter().map(|(image, n_views)| (image, random.random_range(0..n_views))).collect();
            seen.chunks(self.stage.batch_size).map(<[_]>::to_vec).collect::<Vec<_>>()
        };
        let batches = (0..).flat_map(epoch).skip(steps.start as usize).take(steps.len());
        batches.map(|images| {
            // An image has some hundred regions.
            let bytes = images.len() * 256 * self.width * 4;
            (images, bytes)
        })
    }

    fn load(&self, images: Self::Spec, _cx: &Context<'_>) -> Result<Loaded<ProbeBatch>> {
        let mut batch = ProbeBatch { features: Vec::new(), labels: Vec::new() };
        for (image, view) in &images {
            let RegionSample { features, categories, .. } = self.samples.get(*image, *view)?;
            let n_background = features.len() / self.width - categories.len();
            batch.labels.extend(categories.iter().map(|id| self.class_of[id]));
            batch.labels.extend(std::iter::repeat_n(self.n_classes, n_background));
            batch.features.extend(features);
        }
        let images = images.iter().map(|(image, _)| image.to_string()).collect();
        Ok(Loaded { batch: Some(batch), images, unreadable: Vec::new() })
    }

    fn n_images(&self) -> usize {
        self.images.len()
    }
}

/// The rows of novel classes in training.
struct ProbeCriterion {
    rows: Tensor,
    activation: Activation,
    /// The detector, which stays as it is.
    detector: Checkpoint,
    spec: SigmoidSpec,
}

impl ProbeCriterion {
    fn new(stage: &Probe, file: &DetectorFile, classes: &ClassSplit, cx: &Context<'_>) -> Result<Self> {
        let (detector, mut spec) = file.read_sigmoid(DETECTOR.info().name)?;
        if classes.novel.is_empty() {
            let problem = "expected at least one novel class, found none".into();
            let hint = "name the classes to learn under `novel`".into();
            return Err(Error::Input { port: CLASSES.info().name, problem, hint });
        }
        if !spec.novel.is_empty() {
            cx.note(format!("the detector has rows of {} probed classes: they are replaced", spec.novel.len()));
        }
        let n_classes = classes.novel.len() as i64;
        let (activation, n_rows) = match stage.classifier {
            Classifier::Sigmoid => (Activation::Sigmoid, n_classes),
            Classifier::Softmax => (Activation::Softmax { train: stage.train_temperature, test: stage.test_temperature }, n_classes + 1),
        };
        spec.config.novel = Some(NovelConfig { n_classes, activation });
        spec.novel.clone_from(&classes.novel);
        let rows = Tensor::zeros([n_rows, spec.config.trunk.width], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        Ok(Self { rows, activation, detector, spec })
    }
}

/// The loss of regions; `features`: `[N, W]`; `labels`: i64 `[N]`.
fn probe_loss(rows: &Tensor, activation: Activation, features: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let logits = novel_logits(activation, features, rows, Phase::Train);
    Ok(match activation {
        Activation::Sigmoid => focal_loss(&logits, labels)?,
        Activation::Softmax { .. } => logits.cross_entropy_loss(labels, None::<&Tensor>, Reduction::Mean, -100, 0.0),
    })
}

impl Criterion for ProbeCriterion {
    type Batch = ProbeBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(BTreeMap::from([(ROWS.to_owned(), Parameter::plain(&self.rows))]))
    }

    fn losses(&self, _step: u32, batch: ProbeBatch) -> Result<Losses> {
        let features = Tensor::from_slice(&batch.features).view([-1, self.rows.size()[1]]);
        let loss = probe_loss(&self.rows, self.activation, &features, &Tensor::from_slice(&batch.labels))?;
        Ok(Losses { terms: vec![("classes", loss)], measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let mut tensors: BTreeMap<String, Tensor> =
            self.detector.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        tensors.insert(ROWS.to_owned(), self.rows.shallow_clone());
        Ok(Weights { tensors, metadata: DetectorSpec::Sigmoid(self.spec.clone()).metadata() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        golden::{error, lp_ovod, numbers},
        training::Optimizer,
    };

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Probe::default()).is_empty());
        // 1,284 images in pairs, as the published pseudo labels have them.
        let config = Probe::default().config(1284);
        assert_eq!(config.steps, 12 * 642);
        assert!((config.optimizer.schedule.lr_at(8 * 642) - 1e-4).abs() < 1e-12);
    }

    /// Twenty-five steps by LP-OVOD's own code, from zero, on three batches in turn: losses, weights and the first gradient.
    #[test]
    fn steps_are_those_of_lp_ovod_s_code() {
        let golden = lp_ovod();
        let novel = [4_i64, 5, 11, 12, 15, 16, 21, 23, 27, 29, 32, 34, 45, 47, 54, 58, 63];
        let place = |label: f64| novel.iter().position(|class| *class == label as i64).map_or(17, |place| place as i64);
        let labels: Vec<i64> = numbers(&golden["probe/labels65"]).into_iter().map(place).collect();
        let config = Probe::default().config(1284);
        let rows = Tensor::zeros([17, 12], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut optimizer = Optimizer::new(&config.optimizer, BTreeMap::from([("rows".to_owned(), Parameter::plain(&rows))]));
        let (losses, steps) = (numbers(&golden["probe/loss"]), numbers(&golden["probe/weights_steps"]));
        assert_eq!((losses.len(), steps.len()), (25, 5));
        let mut n_compared = 0;
        for (step, expected) in losses.into_iter().enumerate() {
            let batch = step % 3;
            let of_batch = Tensor::from_slice(&labels[44 * batch..][..44]);
            let loss = probe_loss(&rows, Activation::Sigmoid, &golden["probe/u"].get(batch as i64), &of_batch).unwrap();
            assert!((loss.double_value(&[]) / expected - 1.0).abs() < 1e-4, "{step}: {} {expected}", loss.double_value(&[]));
            loss.backward();
            if step == 0 {
                let apart = error(&rows.grad(), &golden["probe/grad_first"]) / golden["probe/grad_first"].abs().max().double_value(&[]);
                assert!(apart < 1e-3, "{apart}");
            }
            optimizer.step(step as u32).unwrap();
            if let Some(place) = steps.iter().position(|at| *at as usize == step) {
                let expected = golden["probe/weights"].get(place as i64);
                let apart = error(&rows.detach(), &expected) / expected.abs().max().double_value(&[]);
                assert!(apart < 1e-3, "after step {step}: {apart}");
                n_compared += 1;
            }
        }
        assert_eq!(n_compared, 5);
    }

    /// The closed form of the first step, in f64 (L3 of LP-OVOD's specification; a tenth of the peak of 1e-3).
    #[test]
    fn the_first_step_is_that_of_the_closed_form() {
        let rows = Tensor::zeros([3, 2], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let features = Tensor::from_slice(&[1.0_f64, 0.5, 0.0, 2.0, 3.0, 0.25, 0.5, 0.5]).view([4, 2]);
        let labels = [0_i64, 2, 3, 3];
        let loss = probe_loss(&rows, Activation::Sigmoid, &features, &Tensor::from_slice(&labels)).unwrap();
        loss.backward();
        // Slopes of the focal loss at 0: -0.0745717 and 0.2237151.
        let slope = 0.25 * 0.5_f64.ln() - 0.125;
        let (own, other) = (0.25 * slope, -0.75 * slope);
        for class in 0..3_i64 {
            for column in 0..2_i64 {
                let sum: f64 =
                    (0..4).map(|row| features.double_value(&[row, column]) * if labels[row as usize] == class { own } else { other }).sum();
                assert!((rows.grad().double_value(&[class, column]) - sum / 2.0).abs() < 1e-9);
            }
        }
    }

    /// L10: seventeen clusters in 1,024 dimensions, as of features after a ReLU, are told apart, each by its own sigmoid alone.
    #[test]
    fn clusters_are_told_apart() {
        let noise = |name: &str, shape: [i64; 2]| {
            Tensor::from_slice(&crate::golden::unit(name, (shape[0] * shape[1]) as usize).collect::<Vec<f32>>()).view(shape)
        };
        let centres = noise("centres", [17, 1024]).relu();
        let labels: Vec<i64> = (0..340).map(|row| row % 17).collect();
        let labels = Tensor::from_slice(&labels);
        let drawn = |name: &str| (centres.index_select(0, &labels) + noise(name, [340, 1024]) * 0.5).relu();
        let (seen, unseen) = (drawn("seen"), drawn("unseen"));
        let stage = Probe { lr: 0.01, ..Probe::default() };
        let config = stage.config(2);
        let optimizer_config =
            OptimizerConfig { schedule: Schedule { peak: 0.01, warmup: Warmup::NONE, decay: Decay::Constant }, ..config.optimizer };
        let rows = Tensor::zeros([17, 1024], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut optimizer = Optimizer::new(&optimizer_config, BTreeMap::from([("rows".to_owned(), Parameter::plain(&rows))]));
        for step in 0..300 {
            probe_loss(&rows, Activation::Sigmoid, &seen, &labels).unwrap().backward();
            optimizer.step(step).unwrap();
        }
        let logits = unseen.matmul(&rows.detach().tr());
        let right = logits.argmax(1, false).eq_tensor(&labels).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        let above = logits.gt(0.0).to_kind(Kind::Float).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
        let alone = above.eq(1.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!(right > 0.99 && alone > 0.99, "{right}, {alone}");
    }
}
