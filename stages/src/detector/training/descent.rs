//! The way down: gradients, the optimizer's state, averaged weights.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::rcnn::layout;
use tch::{Kind, Tensor, no_grad};

use super::{super::STEP_KEY, Group, Optimizer, TrainPrecision, Training};
use crate::{
    Error, Out, Result, UnitDraft,
    artifacts::{TrainingState, read_weights},
    optimizer::{AdamW, Sgd},
};

/// The loss scale of half precision (Micikevicius et al. 2018, section 3.2; the numbers are those of PyTorch's `GradScaler`, and OADP's first).
const FIRST_SCALE: f64 = 64.0;
const SCALE_FACTOR: f64 = 2.0;
const FINE_STEPS: i64 = 2000;
/// AdamW's, as PyTorch's default.
const EPSILON: f64 = 1e-8;
/// Under which a state keeps numbers that are no tensors of the network.
const PROGRESS: &str = "progress";

/// What a training is besides the network.
pub(super) struct Descent<'a> {
    training: &'a Training,
    /// The network's, all of them.
    parameters: &'a BTreeMap<String, Tensor>,
    /// Of each trained parameter: the velocity (SGD), or two moments (AdamW).
    moments: BTreeMap<String, Vec<Tensor>>,
    /// Of each trained parameter, if averages are wanted.
    averages: BTreeMap<String, Tensor>,
    progress: Progress,
}

/// What changes with the steps.
struct Progress {
    /// How often weights changed.
    n_descents: i64,
    scale: f64,
    /// Steps since the scale changed.
    n_fine: i64,
}

impl<'a> Descent<'a> {
    /// With no step done.
    pub(super) fn begin(training: &'a Training, parameters: &'a BTreeMap<String, Tensor>) -> Self {
        let n_moments = match training.optimizer {
            Optimizer::Sgd => 1,
            Optimizer::Adamw => 2,
        };
        let zeros = |tensor: &Tensor| (0..n_moments).map(|_| tensor.detach().zeros_like()).collect();
        let scale = if training.precision == TrainPrecision::F16 { FIRST_SCALE } else { 1.0 };
        let average = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.detach().copy());
        Self {
            training,
            parameters,
            moments: trained(parameters).map(|(name, tensor)| (name.clone(), zeros(tensor))).collect(),
            averages: training.ema_decay.map(|_| trained(parameters).map(average).collect()).unwrap_or_default(),
            progress: Progress { n_descents: 0, scale, n_fine: 0 },
        }
    }

    /// What a batch's loss is multiplied by before gradients are taken.
    pub(super) fn factor(&self) -> f64 {
        self.progress.scale / f64::from(self.training.accumulation_steps)
    }

    /// Goes a step, counted from 0, down the gradients that have added up, and forgets them. Returns their length before it was shortened.
    pub(super) fn step(&mut self, step: u32) -> Result<f64> {
        no_grad(|| {
            let gradients: Vec<(&String, &Tensor, Tensor)> = trained(self.parameters)
                .map(|(name, tensor)| (name, tensor, tensor.grad()))
                .filter(|(.., gradient)| gradient.defined())
                .collect();
            if gradients.is_empty() {
                return Ok(0.0);
            }
            let lengths: Vec<Tensor> = gradients.iter().map(|(.., gradient)| gradient.norm()).collect();
            let length = Tensor::stack(&lengths, 0).to_kind(Kind::Double).norm().double_value(&[]) / self.progress.scale;
            if length.is_finite() {
                let shortening = self.training.clip_grad_norm.map_or(1.0, |most| (most / (length + 1e-6)).min(1.0));
                self.progress.n_descents += 1;
                for (name, tensor, gradient) in &gradients {
                    self.descend(name, tensor, &(gradient * (shortening / self.progress.scale)), step);
                }
                self.progress.n_fine += 1;
                if self.training.precision == TrainPrecision::F16 && self.progress.n_fine == FINE_STEPS {
                    (self.progress.scale, self.progress.n_fine) = (self.progress.scale * SCALE_FACTOR, 0);
                }
            } else if self.training.precision == TrainPrecision::F16 && self.progress.scale > f64::MIN_POSITIVE {
                (self.progress.scale, self.progress.n_fine) = (self.progress.scale / SCALE_FACTOR, 0);
            } else {
                let problem = format!("the gradient's length is {length} at step {step}");
                return Err(Error::Input { port: "lr", problem, hint: "lower `lr`; the last checkpoint is kept".into() });
            }
            for (_, tensor, _) in gradients {
                tensor.shallow_clone().zero_grad();
            }
            Ok(length)
        })
    }

    fn descend(&mut self, name: &str, tensor: &Tensor, gradient: &Tensor, step: u32) {
        let training = self.training;
        let group = group_of(&training.groups, name);
        let (rate, decay) = (training.lr_at(step) * group.lr_mult, training.weight_decay * group.decay_mult);
        let mut weights = tensor.shallow_clone();
        match self.moments.get_mut(name).expect("BUG: every trained parameter has moments").as_mut_slice() {
            [velocity] => Sgd { momentum: training.momentum }.step(rate, decay, &mut weights, gradient, velocity),
            moments => {
                let moments = moments.as_mut_array().expect("BUG: AdamW has two moments");
                let optimizer = AdamW { betas: training.betas, epsilon: EPSILON };
                optimizer.step(self.progress.n_descents as i32, rate, decay, &mut weights, gradient, moments);
            }
        }
        if let (Some(stays), Some(average)) = (training.ema_decay, self.averages.get_mut(name)) {
            // As PyTorch's AveragedModel: the average begins with the weights of the first step.
            let stays = if self.progress.n_descents == 1 { 0.0 } else { stays };
            *average *= stays;
            *average += weights * (1.0 - stays);
        }
    }

    /// Writes the network after `step` steps, of averaged weights where these are wanted, and what the next link continues from.
    pub(super) fn save<W>(
        &self,
        draft: &UnitDraft,
        weights: Out<W>,
        state: Out<TrainingState>,
        step: u32,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let mut metadata = metadata.clone();
        metadata.insert(STEP_KEY.into(), step.to_string());
        let mut network: BTreeMap<String, Tensor> = shallow(self.parameters);
        network.append(&mut shallow(&self.averages));
        draft.write_tensors(weights, "network.safetensors", &network, &metadata)?;
        let moment = |(name, moments): (&String, &Vec<Tensor>)| -> Vec<(String, Tensor)> {
            moments.iter().enumerate().map(|(place, tensor)| (format!("moment{place}.{name}"), tensor.shallow_clone())).collect()
        };
        let mut tensors: BTreeMap<String, Tensor> = self.moments.iter().flat_map(moment).collect();
        let raw = self.averages.keys().map(|name| (format!("raw.{name}"), self.parameters[name].shallow_clone()));
        tensors.extend(raw);
        let Progress { n_descents, scale, n_fine } = self.progress;
        tensors.insert(PROGRESS.into(), Tensor::from_slice(&[n_descents as f64, scale, n_fine as f64]));
        draft.write_tensors(state, "state.safetensors", &tensors, &BTreeMap::new())
    }

    /// Goes on from what was written.
    pub(super) fn restore(&mut self, weights: &InputFile, state: &TrainingState) -> Result<()> {
        layout::load(read_weights(weights)?.tensors(), self.parameters, &weights.path)?.require_all(&weights.path)?;
        let state = read_weights(&state.file)?;
        no_grad(|| -> Result<()> {
            for (name, average) in &mut self.averages {
                average.copy_(&self.parameters[name]);
                self.parameters[name].shallow_clone().copy_(&state.tensor(&format!("raw.{name}"))?);
            }
            for (name, moments) in &mut self.moments {
                for (place, moment) in moments.iter_mut().enumerate() {
                    moment.copy_(&state.tensor(&format!("moment{place}.{name}"))?);
                }
            }
            Ok(())
        })?;
        let progress = state.tensor(PROGRESS)?;
        let [n_descents, scale, n_fine] = [0, 1, 2].map(|place| progress.double_value(&[place]));
        self.progress = Progress { n_descents: n_descents as i64, scale, n_fine: n_fine as i64 };
        Ok(())
    }
}

/// The parameters that are trained, by name.
fn trained(parameters: &BTreeMap<String, Tensor>) -> impl Iterator<Item = (&String, &Tensor)> {
    parameters.iter().filter(|(_, tensor)| tensor.requires_grad())
}

fn shallow(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// That of the longest key which the name of a parameter holds.
fn group_of(groups: &BTreeMap<String, Group>, name: &str) -> Group {
    let group = groups.iter().filter(|(key, _)| name.contains(*key)).max_by_key(|(key, _)| key.len());
    group.map_or_else(Group::default, |(_, group)| *group)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

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

    fn follow(training: &Training, expected: &str) {
        let parameters = parameters();
        let mut descent = Descent::begin(training, &parameters);
        for (step, expected) in serde_json::from_str::<Vec<Expected>>(expected).unwrap().into_iter().enumerate() {
            assert!((training.lr_at(step as u32) - expected.rate).abs() < 1e-12);
            // Gradients add up, and are scaled, without a trace.
            for _ in 0..training.accumulation_steps {
                (loss(&parameters) * descent.factor()).backward();
            }
            descent.step(step as u32).unwrap();
            assert_near(&parameters["a"], expected.a);
            assert_near(&parameters["b"], expected.b);
            if let Some(average) = expected.average {
                assert_near(&descent.averages["a"], average);
            }
        }
    }

    #[test]
    fn steps_are_those_of_torch() {
        let training = Training { lr: 0.1, warmup_steps: 0, lr_steps: vec![2], ..Training::default() };
        let sgd = Training { weight_decay: 0.01, clip_grad_norm: Some(2.0), ..training.clone() };
        follow(&sgd, include_str!("../../../../tests/golden/training/sgd.json"));
        let adamw = Training { optimizer: Optimizer::Adamw, betas: [0.9, 0.98], weight_decay: 0.05, ema_decay: Some(0.9), ..training };
        follow(&adamw, include_str!("../../../../tests/golden/training/adamw.json"));
        follow(
            &Training { accumulation_steps: 3, precision: TrainPrecision::F16, ..sgd },
            include_str!("../../../../tests/golden/training/sgd.json"),
        );
    }

    #[test]
    fn a_gradient_that_overflows_costs_a_step_and_half_the_scale() {
        let training = Training { precision: TrainPrecision::F16, warmup_steps: 0, ..Training::default() };
        let parameters = parameters();
        let mut descent = Descent::begin(&training, &parameters);
        (loss(&parameters) * f64::INFINITY).backward();
        assert!(!descent.step(0).unwrap().is_finite());
        assert_near(&parameters["a"], [0.5, -1.0, 2.0]);
        assert!((descent.factor() - 32.0).abs() < 1e-9);
        (loss(&parameters) * descent.factor()).backward();
        let with_half = descent.step(1).unwrap();
        assert!((with_half - (loss_gradient_length())).abs() < 1e-4, "{with_half}");

        let training = Training { precision: TrainPrecision::F32, ..training };
        let mut descent = Descent::begin(&training, &parameters);
        (loss(&parameters) * f64::NAN).backward();
        assert!(descent.step(0).unwrap_err().to_string().contains("gradient"));
    }

    /// Of the loss at the first values: (2ab, a^2 + 2b).
    fn loss_gradient_length() -> f64 {
        let gradient = [1.5, -0.5, -3.0, 3.25, 1.5, 2.5_f64];
        gradient.iter().map(|part| part * part).sum::<f64>().sqrt()
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
    fn a_group_goes_at_its_own_rate() {
        let groups = BTreeMap::from([("a".into(), Group { lr_mult: 0.0, decay_mult: 1.0 })]);
        let training = Training { warmup_steps: 0, groups, ..Training::default() };
        let parameters = parameters();
        let mut descent = Descent::begin(&training, &parameters);
        loss(&parameters).backward();
        descent.step(0).unwrap();
        assert_near(&parameters["a"], [0.5, -1.0, 2.0]);
        assert!(parameters["b"].double_value(&[0]) < 1.5);
    }
}
