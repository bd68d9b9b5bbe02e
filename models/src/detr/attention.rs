//! What the layers of encoder and decoder have in common: attention of several heads, and two kinds of perceptron.

use tch::Tensor;

use crate::{
    layers::{Dropout, Linear},
    parameters::{Init, Parameters},
};

/// A linear layer inside the transformer. (Section 7.6.)
pub(super) fn xavier_linear(at: &Parameters<'_>, n_in: i64, n_out: i64) -> Linear {
    Linear::declare(at, n_in, n_out, Init::xavier(n_in, n_out), Init::fan_in(n_in))
}

/// The linear layer behind the heads of an attention.
pub(super) fn output_linear(at: &Parameters<'_>, hidden: i64) -> Linear {
    Linear::declare(&(at / "out_proj"), hidden, hidden, Init::xavier(hidden, hidden), Init::Constant(0.0))
}

/// Makes heads of tokens: `[B, L, heads W]` to `[B, heads, L, W]`.
pub(super) fn to_heads(tokens: &Tensor, heads: i64) -> Tensor {
    let (b, l, c) = tokens.size3().expect("BUG: tokens are [B, L, C]");
    tokens.view([b, l, heads, c / heads]).transpose(1, 2)
}

/// The inverse of [`to_heads`].
pub(super) fn from_heads(tokens: &Tensor) -> Tensor {
    tokens.transpose(1, 2).flatten(2, 3)
}

/// Attention of `q` `[B, heads, Q, W]` to `k` `[B, heads, K, W]` with values `v` `[B, heads, K, V]`, V at most W: `[B, heads, Q, V]`.
///
/// `bias`: `[B, 1, 1, K]`, added to the scaled products.
///
/// Without dropout libtorch's fused kernels compute it, whose memory does not grow with Q K: with an image of 4,150 tokens CORA's network
/// takes 0.8 GB for results and gradients. The kernels want values as wide as keys, so narrower ones are filled up with zeros.
///
/// With dropout it is computed plainly: draws must come from the given generator, which the kernels do not take, and tch offers no backward
/// pass of our own in which the weights of a chunk of queries could be computed again. At 4,150 tokens and 8 heads that keeps two times
/// 551 MB and a mask of 138 MB for each image and layer of the encoder.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, dropout: &mut Dropout<'_>) -> Tensor {
    let (width, of_values) = (q.size()[3], v.size()[3]);
    if dropout.0.is_none() {
        let filled = if of_values < width { v.constant_pad_nd([0, width - of_values]) } else { v.shallow_clone() };
        return Tensor::scaled_dot_product_attention(q, k, &filled, bias, 0.0, false, None, false).narrow(3, 0, of_values);
    }
    let logits = (q / (width as f64).sqrt()).matmul(&k.transpose(2, 3));
    let logits = match bias {
        Some(bias) => logits + bias,
        None => logits,
    };
    let kind = logits.kind();
    dropout.apply(logits.softmax(-1, kind)).matmul(v)
}

/// Linear layers with ReLU between them.
#[derive(Debug)]
pub(super) struct Perceptron(Vec<Linear>);

impl Perceptron {
    /// `widths`: of the input and of each layer's output. `weight`: how a matrix begins, by its inputs and outputs.
    pub(super) fn declare(at: &Parameters<'_>, widths: &[i64], weight: impl Fn(i64, i64) -> Init) -> Self {
        let at = &(at / "layers");
        let layer = |(index, pair): (usize, &[i64])| {
            Linear::declare(&(at / index), pair[0], pair[1], weight(pair[0], pair[1]), Init::fan_in(pair[0]))
        };
        Self(widths.windows(2).enumerate().map(layer).collect())
    }

    /// A head of boxes, whose answer begins as 0.
    pub(super) fn declare_box_head(at: &Parameters<'_>, hidden: i64) -> Self {
        let Self(mut layers) = Self::declare(at, &[hidden, hidden, hidden], |n_in, _| Init::fan_in(n_in));
        let zero = Init::Constant(0.0);
        layers.push(Linear::declare(&(&(at / "layers") / layers.len()), hidden, 4, zero, zero));
        Self(layers)
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let (last, first) = self.0.split_last().expect("BUG: a perceptron has layers");
        last.forward(&first.iter().fold(x.shallow_clone(), |x, layer| layer.forward(&x).relu()))
    }
}

/// The perceptron of a layer of the transformer, with a learned slope of negative numbers.
#[derive(Debug)]
pub(super) struct FeedForward {
    linear1: Linear,
    linear2: Linear,
    /// `[1]`.
    slope: Tensor,
}

/// PyTorch's default for the slope of a PReLU.
const SLOPE: f64 = 0.25;

impl FeedForward {
    pub(super) fn declare(at: &Parameters<'_>, hidden: i64, mlp_width: i64) -> Self {
        Self {
            linear1: xavier_linear(&(at / "linear1"), hidden, mlp_width),
            linear2: xavier_linear(&(at / "linear2"), mlp_width, hidden),
            slope: (at / "activation").trainable("weight", &[1], Init::Constant(SLOPE)),
        }
    }

    pub(super) fn forward(&self, x: &Tensor, dropout: &mut Dropout<'_>) -> Tensor {
        let inner = dropout.apply(self.linear1.forward(x).prelu(&self.slope.to_kind(x.kind())));
        dropout.apply(self.linear2.forward(&inner))
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng as _};
    use tch::{Device, Kind};

    use super::*;
    use crate::golden::{cora_values, error};

    /// The plain way with weights that are all kept is the fused way. Products of 48 numbers in f32 differ by 1e-6.
    #[test]
    fn fused_attention_is_plain_attention() {
        let leaf = |name: &str, shape: &[i64]| cora_values(name, shape, 1.0, 0.0).set_requires_grad(true);
        let [q, k, v] = [("q", [2, 3, 5, 16]), ("k", [2, 3, 7, 16]), ("v", [2, 3, 7, 8])].map(|(name, shape)| leaf(name, &shape));
        let bias = Tensor::zeros([2, 1, 1, 7], (Kind::Float, Device::Cpu));
        drop(bias.get(1).narrow(2, 4, 3).fill_(f64::NEG_INFINITY));
        let probe = cora_values("probe", &[2, 3, 5, 8], 1.0, 0.0);
        for bias in [None, Some(&bias)] {
            let fused = attend(&q, &k, &v, bias, &mut Dropout(None));
            let logits = q.matmul(&k.transpose(2, 3)) / 4.0;
            let logits = bias.map_or_else(|| logits.shallow_clone(), |bias| &logits + bias);
            let plain = logits.softmax(-1, Kind::Float).matmul(&v);
            assert!(error(&fused, &plain) < 1e-6);
            let gradients = |out: &Tensor| Tensor::run_backward(&[(out * &probe).sum(Kind::Float)], &[&q, &k, &v], false, false);
            for (fused, plain) in gradients(&fused).iter().zip(gradients(&plain)) {
                assert!(error(fused, &plain) < 2e-6);
            }
        }
    }

    #[test]
    fn attention_with_dropout_has_the_mean_of_attention_without() {
        let [q, k, v] = ["q", "k", "v"].map(|name| cora_values(name, &[1, 2, 4, 8], 1.0, 0.0));
        let whole = attend(&q, &k, &v, None, &mut Dropout(None));
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let copies = |x: &Tensor| x.repeat([4000, 1, 1, 1]);
        let dropped = attend(&copies(&q), &copies(&k), &copies(&v), None, &mut Dropout(Some(&mut random)));
        // A result deviates by at most 1 x sqrt(4 x 0.09 / 16) / 0.9 = 0.17, so that the mean of 4,000 by 0.003; four times that.
        assert!(error(&dropped.mean_dim(0, true, Kind::Float), &whole) < 0.012);
        assert!(error(&dropped.narrow(0, 0, 1), &whole) > 0.01);
    }
}
