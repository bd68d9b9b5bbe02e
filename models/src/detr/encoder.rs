//! The encoder: layers of self-attention over the cells of a map, whose normalisations follow the sums. (Section 7.3.)

use tch::Tensor;

use super::{
    Config,
    attention::{FeedForward, Perceptron, attend, from_heads, output_linear, to_heads},
};
use crate::{
    clip::transformer::{LAYER_NORM_EPS, LayerNorm},
    layers::{Dropout, Linear},
    parameters::{Init, Parameters},
};

#[derive(Debug)]
pub(super) struct Encoder {
    layers: Vec<Layer>,
    /// Scales the encoding of places; all layers share it.
    query_scale: Perceptron,
}

impl Encoder {
    pub(super) fn declare(at: &Parameters<'_>, config: &Config) -> Self {
        let hidden = config.hidden;
        let layers = &(at / "layers");
        Self {
            layers: (0..config.encoder_layers).map(|index| Layer::declare(&(layers / index), config)).collect(),
            query_scale: Perceptron::declare(&(at / "query_scale"), &[hidden; 3], Init::xavier),
        }
    }

    /// `tokens`, `encoding`: `[B, L, d]`. Padded tokens are computed, but no token looks at them.
    pub(super) fn forward(&self, tokens: Tensor, encoding: &Tensor, bias: Option<&Tensor>, dropout: &mut Dropout<'_>) -> Tensor {
        self.layers.iter().fold(tokens, |x, layer| {
            let places = encoding * self.query_scale.forward(&x);
            layer.forward(&x, &places, bias, dropout)
        })
    }
}

#[derive(Debug)]
struct Layer {
    /// `[3 d, d]` and `[3 d]`: queries, keys, values in this order.
    in_proj: Linear,
    out_proj: Linear,
    feed_forward: FeedForward,
    norms: [LayerNorm; 2],
    heads: i64,
}

impl Layer {
    fn declare(at: &Parameters<'_>, &Config { hidden, heads, mlp_width, .. }: &Config) -> Self {
        let attention = &(at / "self_attn");
        Self {
            in_proj: Linear {
                weight: attention.trainable("in_proj_weight", &[3 * hidden, hidden], Init::xavier(hidden, 3 * hidden)),
                bias: attention.trainable("in_proj_bias", &[3 * hidden], Init::Constant(0.0)),
            },
            out_proj: output_linear(attention, hidden),
            feed_forward: FeedForward::declare(at, hidden, mlp_width),
            norms: ["norm1", "norm2"].map(|name| LayerNorm::declare(&(at / name), hidden, LAYER_NORM_EPS)),
            heads,
        }
    }

    /// `x`, `places`: `[B, L, d]`.
    fn forward(&self, x: &Tensor, places: &Tensor, bias: Option<&Tensor>, dropout: &mut Dropout<'_>) -> Tensor {
        let hidden = x.size()[2];
        let project = |x: &Tensor, first: i64, n: i64| {
            let [weight, bias] = [&self.in_proj.weight, &self.in_proj.bias].map(|part| part.narrow(0, first * hidden, n * hidden));
            x.linear(&weight, Some(&bias))
        };
        let placed = project(&(x + places), 0, 2).chunk(2, 2);
        let [q, k, v] = [&placed[0], &placed[1], &project(x, 2, 1)].map(|x| to_heads(&x.contiguous(), self.heads));
        let seen = self.out_proj.forward(&from_heads(&attend(&q, &k, &v, bias, dropout)));
        let x = self.norms[0].forward(&(x + dropout.apply(seen)));
        self.norms[1].forward(&(&x + self.feed_forward.forward(&x, dropout)))
    }
}
