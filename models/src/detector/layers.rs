//! The layers that backbone, pyramid and heads are made of, besides those of all networks.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    layers::CUDNN,
    parameters::{Init, Parameters},
};

/// PyTorch's default for batch normalisation.
const BATCH_NORM_MOMENTUM: f64 = 0.1;
/// PyTorch's default for what batch normalisation adds to a variance.
pub(crate) const BATCH_NORM_EPS: f64 = 1e-5;

/// What a forward pass is for. It is always an argument: no part of a network remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Learning: batch statistics, training temperatures, and only the base classes.
    Train,
    /// Detecting.
    Test,
}

/// What batch normalisation normalises by while a network learns; when it detects, always by the running statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistics {
    /// The running statistics of pretraining, which never change.
    Frozen,
    /// Those of the batch, which the running ones follow.
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
        x.conv2d(&self.weight, self.bias.as_ref(), self.stride, self.padding, 1, 1)
    }
}

/// Batch normalisation over `[B, C, H, W]`; all four tensors `[C]`, f32.
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
    pub(crate) fn declare(at: &Parameters<'_>, channels: i64, statistics: Statistics, eps: f64) -> Self {
        Self {
            weight: at.trainable("weight", &[channels], Init::Constant(1.0)),
            bias: at.trainable("bias", &[channels], Init::Constant(0.0)),
            running_mean: at.running("running_mean", &[channels], 0.0),
            running_var: at.running("running_var", &[channels], 1.0),
            statistics,
            eps,
        }
    }

    pub(crate) fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            phase == Phase::Train && self.statistics == Statistics::Batch,
            BATCH_NORM_MOMENTUM,
            self.eps,
            CUDNN,
        )
    }
}

/// A convolution with what follows it, under mmdet's names `conv` and `bn`.
#[derive(Debug)]
pub(crate) struct ConvModule {
    pub(crate) conv: Conv,
    pub(crate) bn: Option<BatchNorm>,
}

impl ConvModule {
    /// A convolution with a bias.
    pub(crate) fn plain(at: &Parameters<'_>, shape: ConvShape, weight: Init) -> Self {
        Self { conv: Conv::with_bias(&(at / "conv"), shape, weight), bn: None }
    }

    /// A convolution with batch normalisation.
    pub(crate) fn normalised(at: &Parameters<'_>, shape: ConvShape, weight: Init) -> Self {
        let conv = Conv::without_bias(&(at / "conv"), shape, weight);
        Self { conv, bn: Some(BatchNorm::declare(&(at / "bn"), shape.n_out, Statistics::Batch, BATCH_NORM_EPS)) }
    }

    pub(crate) fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        let x = self.conv.forward(x);
        match &self.bn {
            // Batch statistics of nothing are none: without a row there is nothing to normalise.
            Some(bn) if x.numel() > 0 => bn.forward(&x, phase),
            _ => x,
        }
    }
}

/// The same numbers laid out channels-last, which the kernels of a CPU prefer and which pooling reads without a copy.
pub(crate) fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

/// Scales each row of `[N, D]` to unit length; a row of zeros stays one.
pub(crate) fn to_unit_length(rows: &Tensor) -> Tensor {
    rows / rows.norm_scalaropt_dim(2.0, -1_i64, true).clamp_min(1e-12)
}

/// The mean over `n`, or of nothing 0.
pub(crate) fn sum_over(losses: &Tensor, n: usize) -> Tensor {
    losses.sum(Kind::Float) / n.max(1) as f64
}
