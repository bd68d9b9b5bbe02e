//! The layers that all networks have in common.
//!
//! A layer takes what it is given in any kind, and casts its weights to that: f32 weights and half images make mixed precision (Micikevicius
//! et al. 2018), in which weights and their gradients are f32.

use rand_chacha::{ChaCha8Rng, rand_core::RngCore};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::parameters::{Init, Parameters};

/// Whether libtorch may use cuDNN's kernels where it has them.
pub(crate) const CUDNN: bool = true;

/// `y = x W^T + b`.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out, in]`.
    pub(crate) weight: Tensor,
    /// `[out]`.
    pub(crate) bias: Tensor,
}

impl Linear {
    pub(crate) fn declare(at: &Parameters<'_>, n_in: i64, n_out: i64, weight: Init, bias: Init) -> Self {
        Self { weight: at.trainable("weight", &[n_out, n_in], weight), bias: at.trainable("bias", &[n_out], bias) }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight.to_kind(x.kind()), Some(&self.bias.to_kind(x.kind())))
    }

    pub(crate) fn cast(&mut self, kind: Kind) {
        self.weight = self.weight.to_kind(kind);
        self.bias = self.bias.to_kind(kind);
    }
}

/// PyTorch's default for batch normalisation.
const BATCH_NORM_MOMENTUM: f64 = 0.1;
/// PyTorch's default for what batch normalisation adds to a variance.
pub(crate) const BATCH_NORM_EPS: f64 = 1e-5;

/// The purpose of a forward pass. It is always an argument: no part of a network stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Training: batch statistics; in a detector also training temperatures, and only the base classes.
    Train,
    /// Embedding or predicting: running statistics.
    Test,
}

/// The statistics that batch normalisation uses in training; in testing it always uses the running statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistics {
    /// The running statistics of pretraining, which never change; scale and shift are trained (mmdet's `norm_eval`).
    Frozen,
    /// The same, and scale and shift are not trained either (torchvision's `FrozenBatchNorm2d`).
    Fixed,
    /// The statistics of the batch, which also update the running statistics.
    Batch,
}

/// The shape of a convolution, whose output keeps the input's side (over the stride).
#[derive(Clone, Copy)]
pub(crate) struct ConvShape {
    pub(crate) n_in: i64,
    pub(crate) n_out: i64,
    /// The kernel's side, odd.
    pub(crate) side: i64,
    pub(crate) stride: i64,
}

impl ConvShape {
    pub(crate) fn new(n_in: i64, n_out: i64, side: i64) -> Self {
        Self { n_in, n_out, side, stride: 1 }
    }

    /// PyTorch's default.
    pub(crate) fn fan_in(&self) -> Init {
        Init::fan_in(self.n_in * self.side * self.side)
    }

    pub(crate) fn kaiming(&self) -> Init {
        Init::fan_out(self.n_out * self.side * self.side)
    }

    pub(crate) fn xavier(&self) -> Init {
        Init::xavier(self.n_in * self.side * self.side, self.n_out * self.side * self.side)
    }
}

/// A convolution.
#[derive(Debug)]
pub(crate) struct Conv {
    /// `[out, in, side, side]`.
    pub(crate) weight: Tensor,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    stride: i64,
    padding: i64,
}

impl Conv {
    /// A convolution that a normalisation follows.
    pub(crate) fn without_bias(at: &Parameters<'_>, shape: ConvShape, weight: Init) -> Self {
        let ConvShape { n_in, n_out, side, stride } = shape;
        Self { weight: at.trainable("weight", &[n_out, n_in, side, side], weight), bias: None, stride, padding: side / 2 }
    }

    /// A convolution whose bias begins at 0.
    pub(crate) fn with_bias(at: &Parameters<'_>, shape: ConvShape, weight: Init) -> Self {
        let bias = at.trainable("bias", &[shape.n_out], Init::Constant(0.0));
        Self { bias: Some(bias), ..Self::without_bias(at, shape, weight) }
    }

    /// `x`: `[B, in, H, W]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(x.kind()));
        x.conv2d(&self.weight.to_kind(x.kind()), bias, self.stride, self.padding, 1, 1)
    }

    /// The convolution, then the normalisation.
    ///
    /// Where that is a scale and a shift of each channel, it is part of the convolution: of its weights and its bias.
    pub(crate) fn normalised(&self, bn: &BatchNorm, x: &Tensor, phase: Phase) -> Tensor {
        if bn.learns_statistics(phase) || self.bias.is_some() {
            return bn.forward(&self.forward(x), phase);
        }
        let (scale, shift) = bn.scale_and_shift();
        let weight = (&self.weight * scale.view([-1, 1, 1, 1])).to_kind(x.kind());
        x.conv2d(&weight, Some(shift.to_kind(x.kind())), self.stride, self.padding, 1, 1)
    }

    pub(crate) fn cast(&mut self, kind: Kind) {
        self.weight = self.weight.to_kind(kind);
        self.bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
    }
}

/// Batch normalisation over `[B, C, H, W]` of any kind; all four tensors `[C]`, f32.
#[derive(Debug)]
pub(crate) struct BatchNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) running_mean: Tensor,
    pub(crate) running_var: Tensor,
    statistics: Statistics,
    eps: f64,
}

impl BatchNorm {
    pub(crate) fn declare(at: &Parameters<'_>, channels: i64, weight: Init, statistics: Statistics, eps: f64) -> Self {
        let at = &if statistics == Statistics::Fixed { at.frozen() } else { at.clone() };
        Self {
            weight: at.trainable("weight", &[channels], weight),
            bias: at.trainable("bias", &[channels], Init::Constant(0.0)),
            running_mean: at.running("running_mean", &[channels], 0.0),
            running_var: at.running("running_var", &[channels], 1.0),
            statistics,
            eps,
        }
    }

    fn learns_statistics(&self, phase: Phase) -> bool {
        phase == Phase::Train && self.statistics == Statistics::Batch
    }

    /// The factor and the summand of each channel, `[C]` each, when it uses the running statistics.
    fn scale_and_shift(&self) -> (Tensor, Tensor) {
        let scale = &self.weight * (&self.running_var + self.eps).rsqrt();
        let shift = &self.bias - &self.running_mean * &scale;
        (scale, shift)
    }

    pub(crate) fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            self.learns_statistics(phase),
            BATCH_NORM_MOMENTUM,
            self.eps,
            CUDNN,
        )
    }
}

/// The probability of dropout, in 65,536ths: one tenth.
const DROPPED: u16 = 6554;

/// Dropout with its generator, or none.
pub(crate) struct Dropout<'a>(pub(crate) Option<&'a mut ChaCha8Rng>);

impl Dropout<'_> {
    pub(crate) fn apply(&mut self, x: Tensor) -> Tensor {
        let Some(random) = &mut self.0 else { return x };
        let mut bytes = vec![0; 2 * x.numel()];
        random.fill_bytes(&mut bytes);
        // Sixteen bits, from -32,768 on. Autograd keeps a byte for each number of `x`.
        let drawn = Tensor::from_data_size(&bytes, &x.size(), Kind::Int16).to_device(x.device());
        let is_dropped = drawn.lt(i64::from(DROPPED) - 32_768);
        x.masked_fill(&is_dropped, 0.0) / (1.0 - f64::from(DROPPED) / 65_536.0)
    }
}

/// Scales each row of `[N, D]` to unit length; a row of zeros is unchanged.
pub fn to_unit_length(rows: &Tensor) -> Tensor {
    rows / rows.norm_scalaropt_dim(2.0, -1_i64, true).clamp_min(1e-12)
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng as _;
    use tch::Device;

    use super::*;

    #[test]
    fn dropout_keeps_nine_tenths_and_their_mean() {
        let ones = || Tensor::ones([200, 100], (Kind::Float, Device::Cpu));
        let dropped = |seed| Dropout(Some(&mut ChaCha8Rng::seed_from_u64(seed))).apply(ones());
        let share = dropped(1).gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        // The deviation of a share of 20,000 is 0.002.
        assert!((share - 0.9).abs() < 0.01, "{share}");
        assert!((dropped(1).max().double_value(&[]) - 1.0 / 0.9).abs() < 1e-4);
    }
}
