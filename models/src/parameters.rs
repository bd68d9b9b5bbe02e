//! Declares a network's parameters by name, and gives them their first values.
//!
//! Every tensor draws from its own ChaCha8 stream, keyed by the seed and the tensor's name. So the first values depend on nothing
//! else: not on libtorch's global generator (which is never touched), not on the order of declaration, not on threads or device.
//! Normal draws come from the Box-Muller transform in f64, with the logarithm and cosine of the platform's mathematics library.

use std::{cell::RefCell, collections::BTreeMap, f64::consts::TAU, ops::Div};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use tch::{Tensor, nn};

/// The first value of a parameter.
#[derive(Clone, Copy)]
pub(crate) enum Init {
    /// The same number everywhere.
    Constant(f64),
    /// Zero mean, this standard deviation.
    Normal(f64),
    /// Even between minus and plus this bound.
    Uniform(f64),
}

impl Init {
    /// PyTorch's default for the weights and biases of linear and convolution layers.
    pub(crate) fn fan_in(n_inputs: i64) -> Self {
        Self::Uniform((n_inputs as f64).powf(-0.5))
    }

    /// Kaiming's normal for what follows a layer with this many outputs and is a ReLU.
    pub(crate) fn fan_out(n_outputs: i64) -> Self {
        Self::Normal((2.0 / n_outputs as f64).sqrt())
    }

    /// Xavier's uniform.
    pub(crate) fn xavier(n_inputs: i64, n_outputs: i64) -> Self {
        Self::Uniform((6.0 / (n_inputs + n_outputs) as f64).sqrt())
    }
}

/// Where first values come from.
#[derive(Clone, Copy)]
pub(crate) enum Fill {
    /// From the rules of [`Init`] and this seed.
    Seed(u64),
    /// Nowhere: zeros, which a checkpoint is about to overwrite.
    Blank,
}

/// Whether the tensors at a place are trained.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Learning {
    Trains,
    Frozen,
}

/// A place in the tree of names under which parameters are declared.
#[derive(Clone)]
pub(crate) struct Parameters<'a> {
    path: nn::Path<'a>,
    prefix: String,
    fill: Fill,
    learning: Learning,
    /// Everything declared so far, by its full name below the root.
    declared: &'a RefCell<BTreeMap<String, Tensor>>,
}

impl<'a> Parameters<'a> {
    pub(crate) fn new(path: &nn::Path<'a>, fill: Fill, declared: &'a RefCell<BTreeMap<String, Tensor>>) -> Self {
        Self { path: path.clone(), prefix: String::new(), fill, learning: Learning::Trains, declared }
    }

    /// The same place, where tensors have the first values of trainable ones and keep them.
    pub(crate) fn frozen(&self) -> Self {
        Self { learning: Learning::Frozen, ..self.clone() }
    }

    /// Declares a trainable tensor (at a frozen place, one that could be), f32.
    pub(crate) fn trainable(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let mut tensor = match self.learning {
            Learning::Trains => self.path.zeros(name, shape),
            Learning::Frozen => self.path.zeros_no_train(name, shape),
        };
        if let Fill::Seed(seed) = self.fill {
            let values = draw(seed, &self.full(name), shape.iter().product::<i64>() as usize, init);
            tch::no_grad(|| tensor.copy_(&Tensor::from_slice(&values).reshape(shape)));
        }
        self.declared.borrow_mut().insert(self.full(name), tensor.shallow_clone());
        tensor
    }

    /// Declares a tensor that is saved and loaded, but not trained, f32.
    pub(crate) fn running(&self, name: &str, shape: &[i64], value: f64) -> Tensor {
        let mut tensor = self.path.zeros_no_train(name, shape);
        let tensor = tch::no_grad(|| tensor.fill_(value));
        self.declared.borrow_mut().insert(self.full(name), tensor.shallow_clone());
        tensor
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl<'a> Div<&str> for &Parameters<'a> {
    type Output = Parameters<'a>;

    fn div(self, name: &str) -> Parameters<'a> {
        Parameters { path: &self.path / name, prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }
}

impl<'a> Div<usize> for &Parameters<'a> {
    type Output = Parameters<'a>;

    fn div(self, index: usize) -> Parameters<'a> {
        self / index.to_string().as_str()
    }
}

fn draw(seed: u64, name: &str, n_values: usize, init: Init) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name));
    match init {
        Init::Constant(value) => vec![value as f32; n_values],
        Init::Uniform(bound) => (0..n_values).map(|_| ((2.0 * unit(&mut rng) - 1.0) * bound) as f32).collect(),
        Init::Normal(std) => normal(&mut rng, n_values, std),
    }
}

/// An even draw from [0, 1).
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Draws from a normal distribution with zero mean.
pub(crate) fn normal(rng: &mut ChaCha8Rng, n_values: usize, std: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(n_values + 1);
    while values.len() < n_values {
        // One minus the draw lies in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - unit(rng)).ln()).sqrt() * std;
        let (sine, cosine) = (TAU * unit(rng)).sin_cos();
        values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    values.truncate(n_values);
    values
}

/// The 64-bit FNV-1a hash.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
