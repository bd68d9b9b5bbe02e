//! The layers that backbone, pyramid and heads are made of, besides those of all networks.

use tch::{Kind, Tensor};

use crate::{
    layers::{BATCH_NORM_EPS, BatchNorm, Conv, ConvShape, Phase, Statistics},
    parameters::{Init, Parameters},
};

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
        Self { conv, bn: Some(BatchNorm::declare(&(at / "bn"), shape.n_out, Init::Constant(1.0), Statistics::Batch, BATCH_NORM_EPS)) }
    }

    pub(crate) fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        match &self.bn {
            // Without a row there are no batch statistics.
            Some(bn) if x.numel() > 0 => self.conv.normalised(bn, x, phase),
            _ => self.conv.forward(x),
        }
    }
}

/// The same numbers laid out channels-last, which the kernels of a CPU prefer and which pooling reads without a copy.
pub(crate) fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

/// The mean over `n`, or of nothing 0.
pub(crate) fn sum_over(losses: &Tensor, n: usize) -> Tensor {
    losses.sum(Kind::Float) / n.max(1) as f64
}
