//! The layers that all networks have in common.

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
        x.linear(&self.weight, Some(&self.bias))
    }

    pub(crate) fn cast(&mut self, kind: Kind) {
        self.weight = self.weight.to_kind(kind);
        self.bias = self.bias.to_kind(kind);
    }
}
