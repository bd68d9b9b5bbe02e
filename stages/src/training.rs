//! The one loop that trains networks.
//!
//! A stage brings three things: a [`DataLoader`], which gives the batches of each step; a [`Criterion`], which is the network with its losses;
//! and a [`TrainingConfig`]. The loop does the rest: it loads batches ahead of the network, makes steps, refuses losses that are no numbers,
//! records the curve, and publishes the checkpoints of the chain.
//!
//! A batch must follow from the recipe and the step's number alone. Then a training that was killed anywhere continues at its last checkpoint,
//! with the weights and the optimizer's state of that checkpoint, and ends with the same bytes. One that is asked to stop keeps its state
//! after the present step, and continues there.

mod algorithm;
mod optimizer;
mod schedule;

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    ops::Range,
    path::Path,
};

use ovenbird_cache::{UnitRecord, inputs::InputFile};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

pub(crate) use self::{
    algorithm::Algorithm,
    optimizer::{Ema, EmaRule, Optimizer, OptimizerConfig, Parameter},
    schedule::{Decay, Schedule, Warmup},
};
use crate::{
    Artifact, Context, Error, Out, Result, Unit, UnitDraft, Units,
    artifacts::{Curve, TrainingState, read_weights},
    context::FailedItem,
    error::malformed,
    feed::stream,
    units::steps_for,
};

/// Bytes of batches that may be loaded ahead of the network.
const ROOM: usize = 128 << 20;
/// Steps between two rows of the curve.
const ROW_STEPS: u32 = 10;
/// How many images an error names.
pub(crate) const MOST_NAMED: usize = 16;
/// The metadata key of a weights file that says after how many steps it was written.
pub(crate) const STEP_KEY: &str = "ovenbird.step";

/// How long a training is, and how it makes steps.
#[derive(Debug, Clone)]
pub(crate) struct TrainingConfig {
    /// Steps of the optimizer, those before the first one among them.
    pub(crate) steps: u32,
    /// The first step, counted from 0: earlier ones are those of the training that it goes on from.
    pub(crate) first_step: u32,
    /// Steps between checkpoints.
    pub(crate) checkpoint_every: u32,
    /// Images that a step sees.
    pub(crate) images_per_step: u32,
    /// Checkpoints that stay in the artifact, evenly spaced, the last one among them.
    pub(crate) keep_checkpoints: u32,
    pub(crate) optimizer: OptimizerConfig,
    /// A loss above this has exploded.
    pub(crate) max_loss: f64,
}

impl TrainingConfig {
    /// The chain of the training's checkpoints.
    pub(crate) fn units(&self) -> Units {
        let steps = self.steps.saturating_sub(self.first_step);
        let checkpoints = steps.div_ceil(self.checkpoint_every.max(1));
        let n = self.keep_checkpoints.min(checkpoints);
        let stay = (1..n).map(|place| (checkpoints * place).div_ceil(n) - 1).collect();
        Units::Chain { checkpoints, steps, images_per_step: self.images_per_step, stay }
    }
}

/// Gives the batches of a training.
pub(crate) trait DataLoader: Sync {
    /// Says what a batch is to hold, before anything is decoded.
    type Spec: Send;
    /// The input of a [`Criterion`].
    type Batch: Send;

    /// The batches of some steps, in order, as many a step as it accumulates, each with the bytes that it will take.
    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Self::Spec, usize)> + Send;

    /// Loads a batch. Several threads call it at once.
    fn load(&self, spec: Self::Spec, cx: &Context<'_>) -> Result<Loaded<Self::Batch>>;

    /// How many images there are to draw from.
    fn n_images(&self) -> usize;
}

/// A batch, and the images that it was made from.
pub(crate) struct Loaded<B> {
    /// None where no image could be read.
    pub(crate) batch: Option<B>,
    /// The names of the images in the batch.
    pub(crate) images: Vec<String>,
    /// The images that could not be read: name, error, how often each was tried.
    pub(crate) unreadable: Vec<(String, Error, u32)>,
}

/// A network that is trained, with its losses.
pub(crate) trait Criterion {
    /// The output of a [`DataLoader`].
    type Batch;

    /// Every tensor of the network by name; those that require a gradient are trained.
    fn parameters(&self) -> Result<BTreeMap<String, Parameter>>;

    /// The losses of a batch. `step`: counted from 0.
    fn losses(&self, step: u32, batch: Self::Batch) -> Result<Losses>;

    /// The content of the weights file.
    fn weights(&self) -> Result<Weights>;

    /// Measures the network on other data at a checkpoint, by name, where there is such data. `is_last`: whether the training ends here.
    fn validate(&self, _is_last: bool, _cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        Ok(BTreeMap::new())
    }
}

/// Scalars of a batch, by name.
#[derive(Default)]
pub(crate) struct Losses {
    /// Weighted losses; their sum is minimised. The curve shows each as `loss.NAME`.
    pub(crate) terms: Vec<(&'static str, Tensor)>,
    /// Other numbers for the curve, such as `recall.blocks`.
    pub(crate) measures: Vec<(&'static str, Tensor)>,
}

/// The content of a weights file. A parameter that is not in `tensors` under its name is kept with the optimizer's state.
pub(crate) struct Weights {
    pub(crate) tensors: BTreeMap<String, Tensor>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// The output ports of a training.
pub(crate) struct Ports<W> {
    /// The weights.
    pub(crate) weights: Out<W>,
    /// How the weights file is called.
    pub(crate) file_name: &'static str,
    /// The optimizer's state.
    pub(crate) state: Out<TrainingState>,
    /// Losses and measures by step.
    pub(crate) curve: Out<Curve>,
}

impl<W: Artifact> Ports<W> {
    /// The ports of every training; only the one of the weights differs.
    pub(crate) const fn new(weights: Out<W>, file_name: &'static str) -> Self {
        let state = Out::new("state", "The optimizer's state, from which the next checkpoint continues.");
        let curve = Out::new("curve", "Losses, gradient norm, learning rate and measures by step: means over ten steps.");
        Self { weights, file_name, state, curve }
    }

    /// The weights as a file, whatever they are to others.
    fn weights_file(&self) -> Out<TrainingState> {
        Out::new(self.weights.info().name, "")
    }
}

/// A checkpoint of another training, from which one goes on.
pub(crate) struct Start {
    pub(crate) weights: InputFile,
    /// The optimizer's state.
    pub(crate) state: InputFile,
}

/// Computes the given checkpoints.
pub(crate) fn train<L: DataLoader, W: Artifact>(
    config: &TrainingConfig,
    loader: &L,
    criterion: &impl Criterion<Batch = L::Batch>,
    ports: &Ports<W>,
    units: &[Unit],
    cx: &Context<'_>,
) -> Result<()> {
    train_from(None, config, loader, criterion, ports, units, cx)
}

/// Computes the given checkpoints; the first one begins with the weights and the state of `start`, where that is given.
pub(crate) fn train_from<L: DataLoader, W: Artifact>(
    start: Option<&Start>,
    config: &TrainingConfig,
    loader: &L,
    criterion: &impl Criterion<Batch = L::Batch>,
    ports: &Ports<W>,
    units: &[Unit],
    cx: &Context<'_>,
) -> Result<()> {
    let Some(first) = units.first() else { return Ok(()) };
    let (all, n_pieces) = (steps_of(config, units, cx.most_items), config.optimizer.accumulation_steps);
    let mut optimizer = Optimizer::new(&config.optimizer, criterion.parameters()?);
    let mut curve = Curve::default();
    // Images that could not be read so far: each checkpoint lists all of them, because a training sees them again and again.
    let mut unreadable = Vec::new();
    let (mut of_unit, mut of_row, mut step) = (Means::default(), Means::default(), all.start);
    if let Some(part) = cx.part(first)? {
        let port = |port: &str| cx.store.part_port(&part, port);
        let weights = read_weights(&TrainingState::open(&port(ports.weights.info().name))?.file)?;
        optimizer.restore(&weights, &read_weights(&TrainingState::open(&port(ports.state.info().name))?.file)?)?;
        curve = Curve::open(&port(ports.curve.info().name))?;
        Halfway { step, of_unit, of_row, failed: unreadable } = Halfway::of(&part)?;
        cx.note(format!("continues after step {step}, where a run was stopped"));
    } else if let Some(before) = first.index.checked_sub(1) {
        let weights = read_weights(&cx.published(before, ports.weights_file())?.file)?;
        optimizer.restore(&weights, &read_weights(&cx.published(before, ports.state)?.file)?)?;
        curve = cx.published(before, ports.curve)?;
        unreadable = cx.failed_before(before)?;
    } else if let Some(Start { weights, state }) = start {
        optimizer.restore(&read_weights(weights)?, &read_weights(state)?)?;
    }
    cx.total(u64::from(all.end - step));
    let mut specs = loader.specs(all.clone()).skip((step - all.start) as usize * n_pieces as usize);
    let (mut units, mut draft): (VecDeque<&Unit>, Option<UnitDraft>) = (units.iter().collect(), None);
    let (mut n_accumulated, mut has_gradient) = (0, false);
    stream(
        cx.threads,
        ROOM,
        || Ok(specs.next()),
        |spec: L::Spec| loader.load(spec, cx),
        |loaded, n_ready| {
            let Loaded { batch, images, unreadable: failed } = loaded?;
            if draft.is_none() {
                let begun = cx.begin(units.pop_front().expect("BUG: as many units as their steps"))?;
                begun.carry(unreadable.drain(..), loader.n_images());
                draft = Some(begun);
            }
            let unit = draft.as_ref().expect("BUG: a unit is open");
            for (name, error, attempts) in failed {
                let known = unit.failed();
                if !known.iter().any(|failed| failed.item == name) {
                    cx.skip(unit, &name, error, attempts, [known.len() + 1, loader.n_images()])?;
                }
            }
            let mut values = match batch {
                Some(batch) => {
                    has_gradient = true;
                    backward(criterion.losses(step, batch)?, optimizer.loss_factor(), config.max_loss, (step, &images))?
                }
                None => Vec::new(),
            };
            cx.flow(images.len(), n_ready);
            n_accumulated += 1;
            let is_whole = n_accumulated == n_pieces;
            if is_whole {
                // A step whose images are all skipped changes nothing.
                let gradient = if mem::take(&mut has_gradient) { optimizer.step(step)? } else { 0.0 };
                values.push(("gradient".to_owned(), gradient));
            }
            of_unit.add(&values);
            of_row.add(&values);
            if !is_whole {
                return Ok(());
            }
            cx.tick(1);
            let lr = config.optimizer.schedule.lr_at(step);
            (step, n_accumulated) = (step + 1, 0);
            let ends_unit = (step - config.first_step).is_multiple_of(config.checkpoint_every) || step == all.end;
            let measured = match ends_unit {
                true => criterion.validate(unit.unit().index + 1 == cx.units.len(), cx)?,
                false => BTreeMap::new(),
            };
            if step % ROW_STEPS == 0 || ends_unit {
                let mut row = mem::take(&mut of_row).taken();
                row.insert("lr".into(), lr);
                row.extend(measured.clone());
                cx.measured(u64::from(step), &row);
                curve.rows.push((u64::from(step), row));
            }
            if ends_unit {
                let draft = draft.take().expect("BUG: a unit is open");
                unreadable = draft.failed();
                write(&draft, ports, criterion.weights()?, &optimizer, step)?;
                draft.write(ports.curve, "curve.csv", curve.to_csv().as_bytes())?;
                let mut metrics = mem::take(&mut of_unit).taken();
                metrics.insert("lr".into(), lr);
                metrics.extend(measured);
                cx.commit(draft, metrics.into_iter().map(|(name, value)| (name, value.into())).collect())?;
            } else if cx.proceed().is_err() && cx.most_items.is_none() {
                let draft = draft.take().expect("BUG: a unit is open");
                write(&draft, ports, criterion.weights()?, &optimizer, step)?;
                draft.write(ports.curve, "curve.csv", curve.to_csv().as_bytes())?;
                let halfway = Halfway { step, of_unit: mem::take(&mut of_unit), of_row: mem::take(&mut of_row), failed: draft.failed() };
                cx.keep_part(draft, &[], halfway.metrics(), format!("the state after step {step} is kept for the next run"))?;
            }
            cx.proceed()
        },
    )
}

/// The steps of some consecutive checkpoints; of a dry run the first ones.
fn steps_of(config: &TrainingConfig, units: &[Unit], most_items: Option<usize>) -> Range<u32> {
    let start = config.first_step + units[0].index as u32 * config.checkpoint_every;
    let end = config.steps.min(start + units.len() as u32 * config.checkpoint_every);
    start..most_items.map_or(end, |most| end.min(start + steps_for(most, config.images_per_step)))
}

/// Adds up the gradients of a batch, whose loss is multiplied by `factor`, and returns its losses and measures. Fails where the loss is no
/// number or above a limit, and names the step and the images.
fn backward(
    Losses { terms, measures }: Losses,
    factor: f64,
    max_loss: f64,
    (step, images): (u32, &[String]),
) -> Result<Vec<(String, f64)>> {
    let scalars: Vec<Tensor> = terms.iter().chain(&measures).map(|(_, scalar)| scalar.to_kind(Kind::Float)).collect();
    let all = Tensor::stack(&scalars, 0);
    let values = all.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let values = Vec::<f64>::try_from(values).map_err(ovenbird_models::Error::from)?;
    let total: f64 = values[..terms.len()].iter().sum();
    if !total.is_finite() || total > max_loss {
        return Err(Error::Input {
            port: "lr",
            problem: format!("the loss is {total} at step {step}, on images {}", named(images, MOST_NAMED)),
            hint: "lower `lr`, or look at these images; the last checkpoint is kept".into(),
        });
    }
    (all.narrow(0, 0, terms.len() as i64).sum(Kind::Float) * factor).backward();
    let names = terms.iter().map(|(name, _)| format!("loss.{name}")).chain(measures.iter().map(|(name, _)| (*name).to_owned()));
    Ok(names.zip(values).collect())
}

/// The first names, at most so many, and how many more there are.
pub(crate) fn named(names: &[impl AsRef<str>], most: usize) -> String {
    let first = names.iter().take(most).map(AsRef::as_ref).collect::<Vec<&str>>().join(", ");
    if names.len() > most { format!("{first} and {} more", names.len() - most) } else { first }
}

/// Writes the weights after `step` steps, and the state with which a training continues from them.
fn write<W>(draft: &UnitDraft, ports: &Ports<W>, weights: Weights, optimizer: &Optimizer<'_>, step: u32) -> Result<()> {
    let Weights { mut tensors, mut metadata } = weights;
    optimizer.average(&mut tensors);
    metadata.insert(STEP_KEY.into(), step.to_string());
    draft.write_tensors(ports.weights, ports.file_name, &tensors, &metadata)?;
    draft.write_tensors(ports.state, "state.safetensors", &optimizer.state(&tensors), &BTreeMap::new())
}

/// Where a training was stopped between two checkpoints, besides its weights and its curve.
#[derive(Serialize, Deserialize)]
struct Halfway {
    step: u32,
    of_unit: Means,
    of_row: Means,
    failed: Vec<FailedItem>,
}

impl Halfway {
    /// The metric of a part that holds it.
    const METRIC: &'static str = "halfway";

    fn metrics(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([(Self::METRIC.to_owned(), serde_json::to_value(self).expect("BUG: numbers and names are plain JSON"))])
    }

    fn of(part: &UnitRecord) -> Result<Self> {
        let halfway = part.metrics.get(Self::METRIC).cloned().unwrap_or_default();
        serde_json::from_value(halfway).map_err(|error| malformed(Path::new(Self::METRIC), error.to_string()))
    }
}

/// Means of named numbers: for each the bits of the sum, since JSON has no NaN, and how many were added.
#[derive(Default, Serialize, Deserialize)]
struct Means(BTreeMap<String, (u64, u32)>);

impl Means {
    fn add(&mut self, values: &[(String, f64)]) {
        for (name, value) in values {
            let (sum, n) = self.0.entry(name.clone()).or_default();
            (*sum, *n) = ((f64::from_bits(*sum) + value).to_bits(), *n + 1);
        }
    }

    fn taken(self) -> BTreeMap<String, f64> {
        self.0.into_iter().map(|(name, (sum, n))| (name, f64::from_bits(sum) / f64::from(n))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_that_stay_are_evenly_spaced() {
        let schedule = Schedule { peak: 0.1, warmup: Warmup::NONE, decay: Decay::Constant };
        let optimizer = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: 0.9 },
            schedule,
            weight_decay: 0.0,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        let stay_from = |first_step, steps, keep_checkpoints| {
            let config = TrainingConfig {
                steps: first_step + steps,
                first_step,
                checkpoint_every: 1000,
                images_per_step: 16,
                keep_checkpoints,
                optimizer: optimizer.clone(),
                max_loss: f64::INFINITY,
            };
            let Units::Chain { checkpoints, stay, .. } = config.units() else { panic!() };
            (checkpoints, stay)
        };
        let stay = |steps, keep_checkpoints| stay_from(0, steps, keep_checkpoints);
        // Those of a training that goes on from another are its own.
        assert_eq!(stay_from(5_000, 10_000, 3), (10, vec![3, 6]));
        assert_eq!(stay(40_000, 20), (40, (0..19).map(|place| 2 * place + 1).collect()));
        assert_eq!(stay(10_000, 3), (10, vec![3, 6]));
        assert_eq!(stay(10_000, 1), (10, vec![]));
        assert_eq!(stay(2_500, 6), (3, vec![0, 1]));
    }

    #[test]
    fn an_error_names_the_first_images() {
        let images: Vec<String> = (0..18).map(|place| place.to_string()).collect();
        assert_eq!(named(&images[..3], MOST_NAMED), "0, 1, 2");
        assert!(named(&images, MOST_NAMED).ends_with("14, 15 and 2 more"));
    }
}
