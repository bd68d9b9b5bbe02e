//! How networks that find objects are trained: the same loop, whatever they are.
//!
//! The work is a chain of units. What a step sees (which images, their sizes, which are mirrored, which boxes are learned from) follows
//! from the recipe and the step's number alone; with the weights and the optimizer's state of the link before, a training that was
//! killed anywhere ends with the same bytes.

mod course;
mod descent;

use std::collections::{BTreeMap, VecDeque};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{
    annotations::Annotations,
    training::{self, Sample},
};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

pub(super) use self::course::{Batch, Course, Shown, ShownRegions};
use self::{
    course::{Lesson, Random},
    descent::Descent,
};
use crate::{
    Artifact, Context, Error, Inputs, Out, Problem, Result, Unit, UnitDraft, Units,
    artifacts::{Curve, TrainingState},
    detector::ANNOTATIONS,
    feed::stream,
};

/// Bytes of batches that may be ahead of the network.
const ROOM: usize = 128 << 20;
/// Above this a loss has exploded.
const MOST_LOSS: f64 = 1e4;
/// Steps between two rows of the curve.
const ROW_STEPS: u32 = 10;

/// Which way weights go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
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
    /// Along half a cosine, to 0 at the end.
    Cosine,
}

/// In which numbers a network computes. Weights, gradients, losses and boxes are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainPrecision {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision; losses are scaled so that small gradients survive. The scale begins at 64, doubles after 2,000 fine steps, and
    /// halves when a gradient overflows, whose step is left out. A loss that overflows ends the training.
    F16,
}

impl TrainPrecision {
    fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

/// How some parameters differ from the others.
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

/// How a network is trained. The defaults are OADP's for COCO, 16 images a step (methods, sections 6.2 and 6.5).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// First values, order, sizes and samples follow from it.
    pub seed: u64,
    /// Steps of the optimizer.
    pub steps: u32,
    /// Instead of `steps`: how often all images are seen, rare ones more often each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
    /// Steps between units: a training that is killed loses at most these.
    pub checkpoint_every: u32,
    /// How many units, evenly spaced, stay to choose from (`detector/select`), the last one among them; of `epochs`
    /// all where there are not more.
    pub keep_checkpoints: u32,
    /// Images that a network sees at once.
    pub batch_size: usize,
    /// Batches whose gradients a step adds up (their mean is what it descends along).
    pub accumulation_steps: u32,
    /// Images are fitted into a longer side drawn from here, from the first to the last, in px; detection takes the last.
    pub max_size: [u32; 2],
    /// And into a shorter side drawn from here.
    pub min_size: [u32; 2],
    /// Images of classes in less than this part of the images are seen more often (LVIS: 0.001); 0 for none.
    pub repeat_threshold: f64,
    /// In which numbers the network computes.
    pub precision: TrainPrecision,
    /// Which way weights go down.
    pub optimizer: Optimizer,
    /// Of SGD: of the gradients' moving sum.
    pub momentum: f64,
    /// Of AdamW: of the moving averages of gradients and of their squares.
    pub betas: [f64; 2],
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the learning rate grows from a thousandth of the peak.
    pub warmup_steps: u32,
    /// How the learning rate falls.
    pub lr_schedule: LrSchedule,
    /// At these steps the learning rate falls to a tenth.
    pub lr_steps: Vec<u32>,
    /// Instead of `lr_steps`, where there are `epochs`: after these it falls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lr_epochs: Vec<u32>,
    /// LrSchedule of every parameter.
    pub weight_decay: f64,
    /// Parameters whose names hold a key differ so from the others; the longest key counts.
    pub groups: BTreeMap<String, Group>,
    /// Gradients are shortened to this length all together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_grad_norm: Option<f64>,
    /// The network in the end has weights averaged over the steps: after each, this part of the average stays. Running statistics are
    /// those of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            seed: 3407,
            steps: 40_000,
            epochs: None,
            checkpoint_every: 1000,
            keep_checkpoints: 1,
            batch_size: 16,
            accumulation_steps: 1,
            max_size: [1330, 1333],
            min_size: [640, 800],
            repeat_threshold: 0.0,
            precision: TrainPrecision::F32,
            optimizer: Optimizer::Sgd,
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
        }
    }
}

impl Training {
    /// What is wrong, by the names that an operator writes.
    pub(super) fn check(&self) -> Vec<Problem> {
        let is_range = |[low, high]: [u32; 2]| low <= high && low >= 32;
        let is_part = |number: f64| (0.0..1.0).contains(&number);
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let is_factor = |number: f64| number >= 0.0 && number.is_finite();
        let most_checkpoints = if self.epochs.is_some() { u32::MAX } else { self.n_links() };
        Problem::unless(&[
            ("training.steps", self.steps > 0, "at least 1"),
            ("training.epochs", self.epochs.is_none_or(|epochs| (1..=1000).contains(&epochs)), "from 1 to 1000"),
            ("training.lr_epochs", self.lr_epochs.is_empty() || self.epochs.is_some(), "none without `epochs`"),
            ("training.checkpoint_every", self.checkpoint_every > 0, "at least 1"),
            // How many units epochs make, the images say.
            ("training.keep_checkpoints", (1..=most_checkpoints).contains(&self.keep_checkpoints), "from 1 to the number of units"),
            ("training.batch_size", self.batch_size > 0, "at least 1"),
            ("training.accumulation_steps", self.accumulation_steps > 0, "at least 1"),
            ("training.max_size", is_range(self.max_size), "two sides from 32 px on, the smaller first"),
            ("training.min_size", is_range(self.min_size), "two sides from 32 px on, the smaller first"),
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
        ])
    }

    fn n_links(&self) -> u32 {
        self.steps.div_ceil(self.checkpoint_every.max(1))
    }

    /// The chain of a training on the images at the ports `annotations` and `classes`.
    pub(super) fn units(&self, inputs: &Inputs) -> Result<Units> {
        match self.epochs {
            Some(_) => Ok(self.in_steps(&inputs.read(ANNOTATIONS)?.load()?, inputs)?.chain()),
            None => Ok(self.chain()),
        }
    }

    /// The same with a length in steps, where it is in epochs of the images of some annotations.
    fn in_steps(&self, annotations: &Annotations, inputs: &Inputs) -> Result<Self> {
        match self.epochs {
            Some(epochs) => Ok(self.of_epochs(epochs, self.copies(&course::samples(annotations, inputs)?).len())),
            None => Ok(self.clone()),
        }
    }

    fn of_epochs(&self, epochs: u32, n_images: usize) -> Self {
        let n_batches = n_images.div_ceil(self.batch_size);
        let steps =
            |epochs: u32| u32::try_from((epochs as usize * n_batches).div_ceil(self.accumulation_steps as usize)).unwrap_or(u32::MAX);
        let lr_steps = self.lr_epochs.iter().map(|epochs| steps(*epochs)).collect();
        Self { steps: steps(epochs), epochs: None, lr_steps, lr_epochs: Vec::new(), ..self.clone() }
    }

    /// Places in some samples: each once, those with rare classes more often.
    fn copies(&self, samples: &[Sample]) -> Vec<usize> {
        let repeats = match self.repeat_threshold {
            0.0 => vec![1; samples.len()],
            threshold => training::repeats(samples, threshold),
        };
        repeats.into_iter().enumerate().flat_map(|(place, n)| std::iter::repeat_n(place, n)).collect()
    }

    /// Of a length in steps.
    fn chain(&self) -> Units {
        let links = self.n_links();
        let n = self.keep_checkpoints.min(links);
        let stay = (1..n).map(|place| (links * place).div_ceil(n) - 1).collect();
        Units::Chain { links, steps: self.steps, stay }
    }

    /// The longer and the shorter side that a trained network's images are fitted into, px.
    pub(super) fn fits(&self) -> [u32; 2] {
        [self.max_size[1], self.min_size[1]]
    }

    /// The learning rate of a step, counted from 0. (mmdet; OADP, section 6.5; the cosine of Loshchilov and Hutter 2017, equation 5.)
    fn lr_at(&self, step: u32) -> f64 {
        let part = |of: u32, all: u32| f64::from(of) / f64::from(all);
        if step < self.warmup_steps {
            return self.lr * (0.001 + 0.999 * part(step, self.warmup_steps));
        }
        self.lr
            * match self.lr_schedule {
                LrSchedule::Steps => 0.1_f64.powi(self.lr_steps.iter().filter(|at| step >= **at).count() as i32),
                LrSchedule::Cosine => {
                    let done = part(step - self.warmup_steps, self.steps.saturating_sub(self.warmup_steps).max(1));
                    0.5 * (1.0 + (std::f64::consts::PI * done).cos())
                }
            }
    }
}

/// A network that is trained.
pub(super) trait Learner {
    /// Every tensor by name; those with gradients are trained.
    fn parameters(&self) -> &BTreeMap<String, Tensor>;

    /// What there is to learn from a batch. `images`: its pictures, `[B, 3, H, W]`, normalised.
    fn assess(&self, images: &Tensor, batch: &Batch, random: &mut ChaCha8Rng) -> Result<Assessment>;
}

/// What there is to learn from a batch: f32 scalars by name.
#[derive(Default)]
pub(super) struct Assessment {
    /// Weighted losses, whose sum is descended along.
    pub(super) losses: Vec<(&'static str, Tensor)>,
    /// What is only looked at; `recall.blocks`.
    pub(super) measures: Vec<(&'static str, Tensor)>,
}

/// The file of a trained network.
pub(super) trait NetworkFile: Artifact {
    /// Where it lies, and what it is to hold.
    fn file(&self) -> &InputFile;
}

/// Where a training writes.
pub(super) struct Ports<W> {
    /// The weights.
    pub(super) weights: Out<W>,
    /// What the next unit continues from besides the weights.
    pub(super) state: Out<TrainingState>,
    /// How it went.
    pub(super) curve: Out<Curve>,
}

impl<W: Artifact> Ports<W> {
    /// By the names that all trainings have; `weights` names the network.
    pub(super) const fn new(weights: Out<W>) -> Self {
        let state = Out::new("state", "What the next unit continues from besides the weights: the optimizer's.");
        let curve = Out::new("curve", "Losses, gradient and learning rate, means over ten steps.");
        Self { weights, state, curve }
    }
}

/// Makes the links of a chain. `metadata` goes with the weights: how the network is built.
pub(super) fn train<W: NetworkFile>(
    learner: &impl Learner,
    course: &Course,
    ports: &Ports<W>,
    metadata: &BTreeMap<String, String>,
    units: &[Unit],
    cx: &Context<'_>,
) -> Result<()> {
    let Some(first) = units.first() else { return Ok(()) };
    course.look_for_images(cx)?;
    let training = course.training();
    let mut descent = Descent::begin(training, learner.parameters());
    let mut curve = Curve::default();
    if let Some(before) = first.index.checked_sub(1) {
        descent.restore(cx.published(before, ports.weights)?.file(), &cx.published(before, ports.state)?)?;
        curve = cx.published(before, ports.curve)?;
    }
    let last = units[units.len() - 1].index as u32;
    let steps = first.index as u32 * training.checkpoint_every..training.steps.min((last + 1) * training.checkpoint_every);
    let end = cx.most_items.map_or(steps.end, |most| steps.end.min(steps.start + most as u32));
    let steps = steps.start..end;
    cx.total(steps.len() as u64);
    cx.note(format!("an epoch is {} batches of {} images", course.n_batches(), course.n_images()));
    let (mut units, mut draft): (VecDeque<&Unit>, Option<UnitDraft>) = (units.iter().collect(), None);
    let (mut of_unit, mut of_row) = (Means::default(), Means::default());
    // Images that could not be read so far: a training sees them again and again, and each link lists all of them.
    let mut unreadable = match first.index.checked_sub(1) {
        Some(before) => cx.failed_before(before)?,
        None => Vec::new(),
    };
    let mut lessons = course.lessons(steps);
    stream(
        cx.threads,
        ROOM,
        || Ok(lessons.next()),
        |lesson: Lesson| course.batch(lesson, cx),
        |batch, n_ready| {
            if draft.is_none() {
                let begun = cx.begin(units.pop_front().expect("BUG: as many units as their steps"))?;
                begun.carry(unreadable.drain(..));
                draft = Some(begun);
            }
            let unit = draft.as_ref().expect("BUG: a unit is open");
            let mut batch = batch?;
            let step = batch.step;
            for (name, error, attempts) in batch.unreadable.drain(..) {
                let known = unit.failed();
                if !known.iter().any(|failed| failed.item == name) {
                    cx.skip(unit, &name, error, attempts, [known.len() + 1, course.n_images()])?;
                }
            }
            let mut values = learn(learner, descent.factor(), &batch, course, cx.device)?;
            cx.flow(batch.images.len(), n_ready);
            let is_whole = batch.piece + 1 == training.accumulation_steps;
            if is_whole {
                values.push(("gradient", descent.step(step)?));
            }
            of_unit.add(&values);
            of_row.add(&values);
            if !is_whole {
                return cx.proceed();
            }
            cx.tick(1);
            let is_last = (step + 1) % training.checkpoint_every == 0 || step + 1 == end;
            if (step + 1) % ROW_STEPS == 0 || is_last {
                let mut row = std::mem::take(&mut of_row).taken();
                row.insert("lr".into(), training.lr_at(step));
                cx.measured(u64::from(step) + 1, &row);
                curve.rows.push((u64::from(step) + 1, row));
            }
            if is_last {
                let draft = draft.take().expect("BUG: a unit is open");
                unreadable = draft.failed();
                descent.save(&draft, ports.weights, ports.state, step + 1, metadata)?;
                draft.write(ports.curve, "curve.csv", curve.to_csv().as_bytes())?;
                let mut metrics = std::mem::take(&mut of_unit).taken();
                metrics.insert("lr".into(), training.lr_at(step));
                cx.commit(draft, metrics.into_iter().map(|(name, value)| (name, value.into())).collect())?;
            }
            cx.proceed()
        },
    )
}

/// Adds up the gradients of a batch, whose loss is multiplied by `factor`; returns each loss, weighted, and each measure: none where no image
/// can be read.
fn learn(learner: &impl Learner, factor: f64, batch: &Batch, course: &Course, device: Device) -> Result<Vec<(&'static str, f64)>> {
    if batch.images.is_empty() {
        return Ok(Vec::new());
    }
    let images = batch.pixels.on(device).to_kind(course.training().precision.kind());
    let Assessment { losses, measures } = learner.assess(&images, batch, &mut course.random(Random::Samples(batch.step, batch.piece)))?;
    let scalars = losses.iter().chain(&measures).map(|(_, scalar)| scalar.to_kind(Kind::Float)).collect::<Vec<_>>();
    let all = Tensor::stack(&scalars, 0);
    let values = all.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let values = Vec::<f64>::try_from(values).map_err(ovenbird_models::Error::from)?;
    let total: f64 = values[..losses.len()].iter().sum();
    if !total.is_finite() || total > MOST_LOSS {
        let images: Vec<String> = batch.images.iter().map(|image| image.id.to_string()).collect();
        return Err(Error::Input {
            port: "lr",
            problem: format!("the loss is {total} at step {}, on images {}", batch.step, images.join(", ")),
            hint: "lower `lr`, or look at these images; the last checkpoint is kept".into(),
        });
    }
    (all.narrow(0, 0, losses.len() as i64).sum(Kind::Float) * factor).backward();
    Ok(losses.iter().chain(&measures).map(|(name, _)| *name).zip(values).collect())
}

/// Means of named numbers.
#[derive(Default)]
struct Means(BTreeMap<&'static str, (f64, u32)>);

impl Means {
    fn add(&mut self, values: &[(&'static str, f64)]) {
        for (name, value) in values {
            let (sum, n) = self.0.entry(name).or_default();
            (*sum, *n) = (*sum + value, *n + 1);
        }
    }

    /// All means; losses are called so.
    fn taken(self) -> BTreeMap<String, f64> {
        let name = |name: &str| if name == "gradient" || name.contains('.') { name.to_owned() } else { format!("loss.{name}") };
        self.0.into_iter().map(|(of, (sum, n))| (name(of), sum / f64::from(n))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The schedules of OADP for COCO: parity check D7 of its specification.
    #[test]
    fn rates_are_those_of_the_specification() {
        let training = Training::default();
        for (step, rate) in [(0, 2e-5), (250, 0.010_01), (499, 0.019_960_04), (500, 0.02), (29_999, 0.02), (30_000, 0.002)] {
            assert!((training.lr_at(step) - rate).abs() < 1e-12, "{step}: {}", training.lr_at(step));
        }
    }

    #[test]
    fn a_cosine_is_torch_s() {
        let training = Training { steps: 9, warmup_steps: 0, lr_schedule: LrSchedule::Cosine, ..Training::default() };
        let expected: Vec<f64> = serde_json::from_str(include_str!("../../../../tests/golden/training/cosine.json")).unwrap();
        for (step, rate) in expected.into_iter().enumerate() {
            assert!((training.lr_at(step as u32) - rate).abs() < 1e-12, "{step}");
        }
        assert!((Training { warmup_steps: 5, ..training }.lr_at(5) - 0.02).abs() < 1e-12);
    }

    #[test]
    fn epochs_are_as_long_as_their_images_are_many() {
        let training = Training { epochs: Some(24), lr_epochs: vec![16, 19], ..Training::default() };
        let counted = |training: &Training| {
            let Training { steps, lr_steps, .. } = training.of_epochs(24, 2001);
            (steps, lr_steps)
        };
        // 2,001 images in batches of 16 are 126.
        assert_eq!(counted(&training), (24 * 126, vec![16 * 126, 19 * 126]));
        assert_eq!(counted(&Training { accumulation_steps: 2, ..training }), (12 * 126, vec![8 * 126, 1197]));
        let without = Training { lr_epochs: vec![3], ..Training::default() };
        assert_eq!(without.check().into_iter().map(|problem| problem.field).collect::<Vec<_>>(), ["training.lr_epochs"]);
    }

    #[test]
    fn checkpoints_that_stay_are_evenly_spaced() {
        let stay = |steps, checkpoints| {
            let Units::Chain { links, stay, .. } = (Training { steps, keep_checkpoints: checkpoints, ..Training::default() }).chain()
            else {
                panic!()
            };
            (links, stay)
        };
        assert_eq!(stay(40_000, 20), (40, (0..19).map(|place| 2 * place + 1).collect()));
        assert_eq!(stay(10_000, 3), (10, vec![3, 6]));
        assert_eq!(stay(10_000, 1), (10, vec![]));
        assert_eq!(stay(2_500, 6), (3, vec![0, 1]));
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Training::default().check().is_empty());
        let wrong = Training { batch_size: 0, min_size: [800, 640], momentum: 1.0, keep_checkpoints: 41, ..Training::default() };
        let fields: Vec<String> = wrong.check().into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["training.keep_checkpoints", "training.batch_size", "training.min_size", "training.momentum"]);
    }
}
