//! The optimizer of a training: gradients become steps, with learning rates, weight decay, clipping, loss scaling and averaged weights.

use std::collections::BTreeMap;

use ovenbird_models::{
    checkpoint::Checkpoint,
    detr::average::{Average, Averaging},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use super::{algorithm::Algorithm, schedule::Schedule};
use crate::{Error, Result, error::malformed};

/// The loss scale of half precision (Micikevicius et al. 2018, section 3.2; the numbers are those of PyTorch's `GradScaler`, and OADP's first).
const FIRST_SCALE: f64 = 64.0;
const SCALE_FACTOR: f64 = 2.0;
/// After so many steps without an overflow the scale grows.
const STEPS_TO_GROW: i64 = 2000;
/// The name under which a state keeps the numbers of [`Progress`].
const PROGRESS: &str = "progress";

/// How gradients become steps.
#[derive(Debug, Clone)]
pub(crate) struct OptimizerConfig {
    pub(crate) algorithm: Algorithm,
    pub(crate) schedule: Schedule,
    pub(crate) weight_decay: f64,
    /// Batches whose mean gradient makes a step.
    pub(crate) accumulation_steps: u32,
    /// The gradient of all parameters together is shortened to this length.
    pub(crate) clip_grad_norm: Option<f64>,
    /// How weights are averaged, where they are.
    pub(crate) ema: Option<Ema>,
    /// Whether losses are scaled so that gradients in f16 neither vanish nor overflow.
    pub(crate) scales_losses: bool,
}

/// A moving average of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ema {
    /// The part of it that stays at each step.
    pub(crate) decay: f64,
    pub(crate) rule: EmaRule,
}

/// How a moving average of weights begins, and how it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EmaRule {
    /// It begins with the weights after the first step, in f32, as PyTorch's `AveragedModel`.
    #[default]
    FirstStep,
    /// It begins with the initial weights, in f32; of CORA's localizer heads of boxes are averaged twice in each step. (Defects 6 and 29 in
    /// docs/recipes/cora.md.)
    Reference,
    /// It begins with the initial weights, in f64, in which it never stands still.
    Fixed,
}

impl EmaRule {
    fn averaging(self) -> Averaging {
        match self {
            Self::FirstStep | Self::Reference => Averaging::Reference,
            Self::Fixed => Averaging::Fixed,
        }
    }
}

/// A tensor of a network, and how it is trained.
pub(crate) struct Parameter {
    /// Trained if it requires a gradient.
    pub(crate) tensor: Tensor,
    /// Factor of the learning rate.
    pub(crate) lr_mult: f64,
    /// Factor of the weight decay.
    pub(crate) decay_mult: f64,
    /// i64 `[R]`: the only rows that ever have a gradient, where these are few; the others are left out of every step.
    pub(crate) rows: Option<Tensor>,
    /// After each step the numbers are clamped to these.
    pub(crate) bounds: Option<[f64; 2]>,
}

impl Parameter {
    /// A tensor that is trained as the others are.
    pub(crate) fn plain(tensor: &Tensor) -> Self {
        Self { tensor: tensor.shallow_clone(), lr_mult: 1.0, decay_mult: 1.0, rows: None, bounds: None }
    }

    /// The rows of a tensor of this shape that take part.
    fn rows_of(&self, whole: &Tensor) -> Tensor {
        self.rows.as_ref().map_or_else(|| whole.shallow_clone(), |rows| whole.index_select(0, rows))
    }
}

/// The state of an optimizer.
pub(crate) struct Optimizer<'a> {
    config: &'a OptimizerConfig,
    parameters: BTreeMap<String, Parameter>,
    /// By the name of each trained parameter, in the shape of its rows that take part.
    moments: BTreeMap<String, Vec<Tensor>>,
    /// Of each trained parameter, where weights are averaged.
    average: Option<Average>,
    progress: Progress,
}

/// Numbers that change with the steps.
struct Progress {
    /// How often weights changed.
    n_updates: i64,
    loss_scale: f64,
    /// Steps since the loss scale changed.
    n_since_scaled: i64,
}

impl<'a> Optimizer<'a> {
    /// An optimizer that has done no step.
    pub(crate) fn new(config: &'a OptimizerConfig, parameters: BTreeMap<String, Parameter>) -> Self {
        let trained = || parameters.iter().filter(|(_, parameter)| parameter.tensor.requires_grad());
        let zeros = |parameter: &Parameter| {
            let rows = no_grad(|| parameter.rows_of(&parameter.tensor));
            (0..config.algorithm.n_moments()).map(|_| rows.detach().zeros_like()).collect()
        };
        let moments = trained().map(|(name, parameter)| (name.clone(), zeros(parameter))).collect();
        let average = config.ema.map(|ema| begun(&parameters, ema));
        let loss_scale = if config.scales_losses { FIRST_SCALE } else { 1.0 };
        Self { config, parameters, moments, average, progress: Progress { n_updates: 0, loss_scale, n_since_scaled: 0 } }
    }

    /// The number by which a batch's loss is multiplied before its gradients are taken.
    pub(crate) fn loss_factor(&self) -> f64 {
        self.progress.loss_scale / f64::from(self.config.accumulation_steps)
    }

    /// Makes a step, counted from 0, by the gradients that have added up, and sets them to zero. Returns the gradient's length before clipping;
    /// fails where it is not finite, unless losses are scaled: then the step is left out and the scale becomes smaller.
    ///
    /// A parameter that no loss of the step depends on has a gradient of zero, whether an earlier step has left it one or not: otherwise a
    /// training that continues from a checkpoint would have other moments than one that was not interrupted.
    pub(crate) fn step(&mut self, step: u32) -> Result<f64> {
        no_grad(|| {
            let gradients: BTreeMap<&String, Tensor> = self
                .parameters
                .iter()
                .filter(|(_, parameter)| parameter.tensor.requires_grad())
                .map(|(name, parameter)| {
                    let gradient = parameter.tensor.grad();
                    let gradient = if gradient.defined() { gradient } else { parameter.tensor.zeros_like() };
                    (name, parameter.rows_of(&gradient))
                })
                .collect();
            let Progress { loss_scale, .. } = self.progress;
            let lengths: Vec<Tensor> = gradients.values().map(Tensor::norm).collect();
            let length = Tensor::stack(&lengths, 0).to_kind(Kind::Double).norm().double_value(&[]) / loss_scale;
            if length.is_finite() {
                let clipping = self.config.clip_grad_norm.map_or(1.0, |most| (most / (length + 1e-6)).min(1.0));
                self.progress.n_updates += 1;
                let n_updates = self.progress.n_updates;
                for (name, gradient) in gradients {
                    let parameter = &self.parameters[name];
                    let moments = self.moments.get_mut(name).expect("BUG: every trained parameter has moments");
                    update(self.config, parameter, &(gradient * (clipping / loss_scale)), moments, [step, n_updates as u32]);
                }
                match (&mut self.average, self.config.ema) {
                    (Some(average), Some(ema)) if ema.rule == EmaRule::FirstStep && n_updates == 1 => {
                        *average = begun(&self.parameters, ema);
                    }
                    (Some(average), _) => average.update(&trained(&self.parameters)),
                    (None, _) => (),
                }
                self.progress.n_since_scaled += 1;
                if self.config.scales_losses && self.progress.n_since_scaled == STEPS_TO_GROW {
                    (self.progress.loss_scale, self.progress.n_since_scaled) = (loss_scale * SCALE_FACTOR, 0);
                }
            } else if self.config.scales_losses && loss_scale > f64::MIN_POSITIVE {
                (self.progress.loss_scale, self.progress.n_since_scaled) = (loss_scale / SCALE_FACTOR, 0);
            } else {
                let problem = format!("the gradient's length is {length} at step {step}");
                return Err(Error::Input { port: "lr", problem, hint: "lower `lr`; the last checkpoint is kept".into() });
            }
            for parameter in self.parameters.values() {
                parameter.tensor.shallow_clone().zero_grad();
            }
            Ok(length)
        })
    }

    /// Puts averaged weights, where weights are averaged, in place of the last ones.
    pub(crate) fn average(&self, tensors: &mut BTreeMap<String, Tensor>) {
        if let Some(average) = &self.average {
            tensors.extend(average.weights());
        }
    }

    /// The tensors that a training continues from, together with those `in_weights`: the tensors that the weights file holds.
    pub(crate) fn state(&self, in_weights: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for (name, moments) in &self.moments {
            state.extend(moments.iter().enumerate().map(|(place, moment)| (moment_key(place, name), moment.shallow_clone())));
        }
        for (name, Parameter { tensor, .. }) in &self.parameters {
            let is_written = in_weights.get(name).is_some_and(|written| written.data_ptr() == tensor.data_ptr());
            if !is_written {
                state.insert(raw_key(name), tensor.shallow_clone());
            }
        }
        let averages = self.average.iter().flat_map(Average::averages).filter(|(_, average)| average.kind() != Kind::Float);
        state.extend(averages.map(|(name, average)| (average_key(name), average.shallow_clone())));
        let Progress { n_updates, loss_scale, n_since_scaled } = self.progress;
        state.insert(PROGRESS.into(), Tensor::from_slice(&[n_updates as f64, loss_scale, n_since_scaled as f64]));
        state
    }

    /// Continues from a weights file and the state that was written with it.
    pub(crate) fn restore(&mut self, weights: &Checkpoint, state: &Checkpoint) -> Result<()> {
        no_grad(|| -> Result<()> {
            for (name, parameter) in &self.parameters {
                let raw = raw_key(name);
                let written = if state.tensors().contains_key(&raw) { state.tensor(&raw)? } else { weights.tensor(name)? };
                copy(&parameter.tensor, &written, name, if state.tensors().contains_key(&raw) { state } else { weights })?;
            }
            for (name, average) in self.average.iter().flat_map(Average::averages) {
                let key = average_key(name);
                match average.kind() {
                    Kind::Float => copy(average, &weights.tensor(name)?, name, weights)?,
                    _ => copy(average, &state.tensor(&key)?, &key, state)?,
                }
            }
            for (name, moments) in &mut self.moments {
                for (place, moment) in moments.iter_mut().enumerate() {
                    let key = moment_key(place, name);
                    copy(moment, &state.tensor(&key)?, &key, state)?;
                }
            }
            Ok(())
        })?;
        let progress = state.tensor(PROGRESS)?;
        let [n_updates, loss_scale, n_since_scaled] = [0, 1, 2].map(|place| progress.double_value(&[place]));
        self.progress = Progress { n_updates: n_updates as i64, loss_scale, n_since_scaled: n_since_scaled as i64 };
        Ok(())
    }
}

/// The trained parameters, by name.
fn trained(parameters: &BTreeMap<String, Parameter>) -> BTreeMap<String, Tensor> {
    let trained = parameters.iter().filter(|(_, parameter)| parameter.tensor.requires_grad());
    trained.map(|(name, parameter)| (name.clone(), parameter.tensor.shallow_clone())).collect()
}

/// An average that begins with the present weights.
fn begun(parameters: &BTreeMap<String, Parameter>, ema: Ema) -> Average {
    no_grad(|| Average::new(&trained(parameters), ema.decay, ema.rule.averaging()))
}

/// Changes one parameter by its gradient. `step`: counted from 0, and how many steps changed weights, this one among them.
fn update(config: &OptimizerConfig, parameter: &Parameter, gradient: &Tensor, moments: &mut [Tensor], [step, n_updates]: [u32; 2]) {
    let (lr, decay) = (config.schedule.lr_at(step) * parameter.lr_mult, config.weight_decay * parameter.decay_mult);
    let mut whole = parameter.tensor.shallow_clone();
    let mut weights = parameter.rows_of(&whole);
    config.algorithm.step(n_updates as i32, lr, decay, &mut weights, gradient, moments);
    if let Some(rows) = &parameter.rows {
        let _in_place = whole.index_copy_(0, rows, &weights);
    }
    if let Some([least, most]) = parameter.bounds {
        let _in_place = whole.clamp_(least, most);
    }
}

/// Copies a tensor of a file. Fails where it has another shape, since the file may be one that the user names.
fn copy(to: &Tensor, from: &Tensor, name: &str, file: &Checkpoint) -> Result<()> {
    if from.size() != to.size() {
        let problem = format!("{name}: expected {:?}, found {:?}: it is of another network", to.size(), from.size());
        return Err(malformed(file.path(), problem));
    }
    to.shallow_clone().copy_(from);
    Ok(())
}

fn average_key(name: &str) -> String {
    format!("average.{name}")
}

fn moment_key(place: usize, name: &str) -> String {
    format!("moment{place}.{name}")
}

/// The name of a parameter that is not, or not in this form, in the weights file.
fn raw_key(name: &str) -> String {
    format!("raw.{name}")
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use serde::Deserialize;
    use tch::Kind;

    use super::{
        super::schedule::{Decay, Warmup},
        *,
    };
    use crate::golden::{cora, cora_values, error, numbers};

    #[derive(Deserialize)]
    struct Expected {
        rate: f64,
        a: [f32; 3],
        b: [f32; 3],
        average: Option<[f32; 3]>,
    }

    fn parameters() -> BTreeMap<String, Tensor> {
        let tensor = |numbers: [f32; 3]| Tensor::from_slice(&numbers).set_requires_grad(true);
        BTreeMap::from([("a".into(), tensor([0.5, -1.0, 2.0])), ("b".into(), tensor([1.5, 0.25, -0.75]))])
    }

    fn loss(parameters: &BTreeMap<String, Tensor>) -> Tensor {
        let (a, b) = (&parameters["a"], &parameters["b"]);
        (a * a * b).sum(Kind::Float) + (b * b).sum(Kind::Float)
    }

    fn assert_near(found: &Tensor, expected: [f32; 3]) {
        let apart = (found - Tensor::from_slice(&expected)).abs().max().double_value(&[]);
        assert!(apart < 1e-6, "{apart}");
    }

    fn plain(parameters: &BTreeMap<String, Tensor>) -> BTreeMap<String, Parameter> {
        parameters.iter().map(|(name, tensor)| (name.clone(), Parameter::plain(tensor))).collect()
    }

    fn config(algorithm: Algorithm) -> OptimizerConfig {
        let schedule = Schedule { peak: 0.1, warmup: Warmup::NONE, decay: Decay::Tenths(vec![2]) };
        let (clip_grad_norm, ema) = (None, None);
        OptimizerConfig { algorithm, schedule, weight_decay: 0.0, accumulation_steps: 1, clip_grad_norm, ema, scales_losses: false }
    }

    const SGD: Algorithm = Algorithm::Sgd { momentum: 0.9 };

    fn follow(config: &OptimizerConfig, expected: &str) {
        let parameters = parameters();
        let mut optimizer = Optimizer::new(config, plain(&parameters));
        for (step, expected) in serde_json::from_str::<Vec<Expected>>(expected).unwrap().into_iter().enumerate() {
            assert!((config.schedule.lr_at(step as u32) - expected.rate).abs() < 1e-12);
            // Gradients add up, and are scaled, without a trace.
            for _ in 0..config.accumulation_steps {
                (loss(&parameters) * optimizer.loss_factor()).backward();
            }
            optimizer.step(step as u32).unwrap();
            assert_near(&parameters["a"], expected.a);
            assert_near(&parameters["b"], expected.b);
            if let Some(average) = expected.average {
                assert_near(&averages(&optimizer)["a"], average);
            }
        }
    }

    /// What is written of averaged weights.
    fn averages(optimizer: &Optimizer<'_>) -> BTreeMap<String, Tensor> {
        let mut averages = BTreeMap::new();
        optimizer.average(&mut averages);
        averages
    }

    #[test]
    fn steps_are_those_of_torch() {
        let sgd = OptimizerConfig { weight_decay: 0.01, clip_grad_norm: Some(2.0), ..config(SGD) };
        follow(&sgd, include_str!("../../../tests/golden/training/sgd.json"));
        let adamw = Algorithm::AdamW { betas: [0.9, 0.98], epsilon: 1e-8 };
        let ema = Some(Ema { decay: 0.9, rule: EmaRule::FirstStep });
        let averaged = OptimizerConfig { weight_decay: 0.05, ema, ..config(adamw) };
        follow(&averaged, include_str!("../../../tests/golden/training/adamw.json"));
        let scaled = OptimizerConfig { accumulation_steps: 3, scales_losses: true, ..sgd };
        follow(&scaled, include_str!("../../../tests/golden/training/sgd.json"));
    }

    #[test]
    fn a_gradient_that_overflows_costs_a_step_and_half_the_scale() {
        let scaled = OptimizerConfig { scales_losses: true, ..config(SGD) };
        let parameters = parameters();
        let mut optimizer = Optimizer::new(&scaled, plain(&parameters));
        (loss(&parameters) * f64::INFINITY).backward();
        assert!(!optimizer.step(0).unwrap().is_finite());
        assert_near(&parameters["a"], [0.5, -1.0, 2.0]);
        assert!((optimizer.loss_factor() - 32.0).abs() < 1e-9);
        (loss(&parameters) * optimizer.loss_factor()).backward();
        let with_half = optimizer.step(1).unwrap();
        assert!((with_half - (loss_gradient_length())).abs() < 1e-4, "{with_half}");

        let unscaled = config(SGD);
        let mut optimizer = Optimizer::new(&unscaled, plain(&parameters));
        (loss(&parameters) * f64::NAN).backward();
        assert!(optimizer.step(0).unwrap_err().to_string().contains("gradient"));
    }

    /// Of the loss at the first values: (2ab, a^2 + 2b).
    fn loss_gradient_length() -> f64 {
        let gradient = [1.5, -0.5, -3.0, 3.25, 1.5, 2.5_f64];
        gradient.iter().map(|part| part * part).sum::<f64>().sqrt()
    }

    #[test]
    fn a_parameter_has_its_own_rate_rows_and_bounds() {
        let parameters = parameters();
        let of = |name: &str| Parameter::plain(&parameters[name]);
        let own = BTreeMap::from([
            ("a".into(), Parameter { lr_mult: 0.0, ..of("a") }),
            ("b".into(), Parameter { rows: Some(Tensor::from_slice(&[0_i64, 2])), bounds: Some([-0.5, 1.0]), ..of("b") }),
        ]);
        let config = config(SGD);
        let mut optimizer = Optimizer::new(&config, own);
        assert_eq!(optimizer.moments["b"][0].size(), [2]);
        loss(&parameters).backward();
        optimizer.step(0).unwrap();
        assert_near(&parameters["a"], [0.5, -1.0, 2.0]);
        // The gradient of b is a^2 + 2 b: 3.25, 1.5, 2.5.
        assert_near(&parameters["b"], [1.0, 0.25, -0.5]);
    }

    #[test]
    fn a_state_holds_what_the_weights_do_not() {
        let parameters = parameters();
        let config = config(SGD);
        let optimizer = Optimizer::new(&config, plain(&parameters));
        let weights = BTreeMap::from([("a".to_owned(), parameters["a"].shallow_clone()), ("b".to_owned(), parameters["b"].copy())]);
        assert_eq!(optimizer.state(&weights).into_keys().collect::<Vec<_>>(), ["moment0.a", "moment0.b", "progress", "raw.b"]);
    }

    /// CORA's: a constant rate, gradients clipped, and an average.
    fn cora_s(decay: f64, rule: EmaRule) -> OptimizerConfig {
        OptimizerConfig {
            algorithm: Algorithm::AdamW { betas: [0.9, 0.999], epsilon: 1e-8 },
            schedule: Schedule { peak: 1e-4, warmup: Warmup::NONE, decay: Decay::Constant },
            weight_decay: 1e-4,
            accumulation_steps: 1,
            clip_grad_norm: Some(0.1),
            ema: Some(Ema { decay, rule }),
            scales_losses: false,
        }
    }

    /// The gradient of a parameter in a step.
    fn set_gradient(tensor: &Tensor, gradient: &Tensor) {
        (tensor * gradient).sum(Kind::Float).backward();
    }

    /// The name of a tensor that CORA's code has twice.
    const HEAD: &str = "bbox_embed.0.layers.0.weight";

    /// O1 and O2 of CORA's specification over 50 steps of its own code: clipping, AdamW in f32, and both averages.
    #[test]
    fn steps_and_averages_are_those_of_cora_s_code() {
        let golden = cora("optim_ema");
        let tensors = BTreeMap::from(
            [("query_embed.weight", "p"), (HEAD, "h")]
                .map(|(name, letter)| (name.to_owned(), golden[&format!("{letter}0")].copy().set_requires_grad(true))),
        );
        let config = cora_s(0.99996, EmaRule::Reference);
        let mut optimizer = Optimizer::new(&config, plain(&tensors));
        for step in 0..50 {
            let scale = 0.2 * f64::from(1 + step % 3);
            set_gradient(&tensors["query_embed.weight"], &cora_values(&format!("opt/gp{step}"), &[6], scale, 0.0));
            set_gradient(&tensors[HEAD], &cora_values(&format!("opt/gh{step}"), &[4], 0.05, 0.0));
            let length = optimizer.step(step as u32).unwrap();
            assert!((length - numbers(&golden["norm"])[step as usize]).abs() < 3e-7, "{step}: {length}");
            let averages = averages(&optimizer);
            for (name, letter) in [("query_embed.weight", "p"), (HEAD, "h")] {
                let expected = [letter.to_owned(), format!("ema_{letter}")].map(|name| golden[&name].get(step.into()));
                assert!(error(&tensors[name].detach(), &expected[0]) < 3e-7, "{step} {name}");
                assert!(error(&averages[name], &expected[1]) < 3e-7, "{step} {name}");
            }
        }
    }

    /// O1 of CORA's specification. The weight decay is a factor of 1 - 1e-8, which f32 rounds to 1. (Defect 28.)
    #[test]
    fn a_first_step_of_cora_s_has_the_numbers_of_the_specification() {
        let step = |weight_decay: f64, n_steps: u32| {
            let config = OptimizerConfig { weight_decay, ..cora_s(0.9, EmaRule::Reference) };
            let table = Tensor::from_slice(&[1.0_f32, -2.0]).set_requires_grad(true);
            let mut optimizer = Optimizer::new(&config, BTreeMap::from([("a".to_owned(), Parameter::plain(&table))]));
            for step in 0..n_steps {
                set_gradient(&table, &Tensor::from_slice(&[0.3_f32, -0.4]));
                assert!((optimizer.step(step).unwrap() - 0.5).abs() < 1e-7);
            }
            let clipped = optimizer.moments["a"][0].copy() / 0.1;
            (table.detach(), clipped)
        };
        let (table, clipped) = step(1e-4, 1);
        let apart = |found: &Tensor, expected: [f32; 2]| error(found, &Tensor::from_slice(&expected));
        // The specification's numbers are of f64 and have a decay of 1e-8.
        assert!(apart(&clipped, [0.06, -0.08]) < 1e-6 && apart(&table, [0.999_9, -1.999_9]) < 2e-7);
        assert_eq!(step(1e-4, 1000).0, step(0.0, 1000).0);
    }

    /// O4 of CORA's specification: a training that continues from its files has the bits of one that was never stopped, whatever its average.
    #[test]
    fn a_training_that_continues_has_the_same_bits() {
        let files = tempfile::tempdir().unwrap();
        let write = |name: &str, tensors: &BTreeMap<String, Tensor>| {
            let path = files.path().join(format!("{name}.safetensors"));
            Tensor::write_safetensors(&tensors.iter().collect::<Vec<_>>(), &path).unwrap();
            Checkpoint::open(&path).unwrap()
        };
        for rule in [EmaRule::FirstStep, EmaRule::Reference, EmaRule::Fixed] {
            let config = cora_s(0.99996, rule);
            let fresh = || {
                BTreeMap::from(
                    [HEAD, "query_embed.weight"].map(|name| (name.to_owned(), cora_values(name, &[7], 1.0, 0.0).set_requires_grad(true))),
                )
            };
            let make_steps = |optimizer: &mut Optimizer<'_>, tensors: &BTreeMap<String, Tensor>, steps: Range<u32>| {
                for step in steps {
                    tensors.iter().for_each(|(name, tensor)| set_gradient(tensor, &cora_values(&format!("{name}{step}"), &[7], 1.0, 0.0)));
                    optimizer.step(step).unwrap();
                }
            };
            let whole = fresh();
            let mut optimizer = Optimizer::new(&config, plain(&whole));
            make_steps(&mut optimizer, &whole, 0..3);
            let mut written: BTreeMap<String, Tensor> = whole.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            optimizer.average(&mut written);
            let (weights, state) = (write("weights", &written), write("state", &optimizer.state(&written)));
            assert_eq!(state.tensors().contains_key(&average_key(HEAD)), rule == EmaRule::Fixed);
            make_steps(&mut optimizer, &whole, 3..6);

            let part = fresh();
            let mut continued = Optimizer::new(&config, plain(&part));
            continued.restore(&weights, &state).unwrap();
            make_steps(&mut continued, &part, 3..6);
            assert_eq!(part, whole, "{rule:?}");
            assert_eq!(averages(&continued), averages(&optimizer), "{rule:?}");
            let kept = |optimizer: &Optimizer<'_>| optimizer.state(&BTreeMap::new());
            assert_eq!(kept(&continued), kept(&optimizer), "{rule:?}");
        }
    }

    /// A training that continues does not remember which gradients earlier steps left.
    #[test]
    fn a_parameter_without_a_gradient_is_the_same_after_a_restart() {
        let config = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: 0.9 },
            schedule: Schedule { peak: 0.1, warmup: Warmup::NONE, decay: Decay::Constant },
            weight_decay: 0.01,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        let after = |is_restarted: bool| {
            let tensors = ["a", "b"].map(|name| (name, Tensor::from_slice(&[1.0_f32, -2.0]).set_requires_grad(true)));
            let parameters = || tensors.iter().map(|(name, tensor)| ((*name).to_owned(), Parameter::plain(tensor))).collect();
            let mut optimizer = Optimizer::new(&config, parameters());
            let [(_, a), (_, b)] = &tensors;
            (a * a + b * b).sum(Kind::Float).backward();
            optimizer.step(0).unwrap();
            if is_restarted {
                let moments: Vec<(String, Vec<Tensor>)> = optimizer.moments.into_iter().collect();
                let tensors = tensors.each_ref().map(|(name, tensor)| (*name, tensor.detach().copy().set_requires_grad(true)));
                let fresh = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), Parameter::plain(tensor))).collect();
                let mut restarted = Optimizer::new(&config, fresh);
                restarted.moments = moments.into_iter().collect();
                let [(_, a), (_, b)] = &tensors;
                (a * a).sum(Kind::Float).backward();
                restarted.step(1).unwrap();
                return Vec::<f32>::try_from(b.detach()).unwrap();
            }
            (a * a).sum(Kind::Float).backward();
            optimizer.step(1).unwrap();
            Vec::<f32>::try_from(b.detach()).unwrap()
        };
        assert_eq!(after(false), after(true));
    }
}
