//! The decoder: queries, each with a box and a content, look at each other and at the tokens of the encoder, and move their boxes. (Section 7.4.)

use tch::Tensor;

use super::{
    Config, Memory,
    attention::{FeedForward, Perceptron, attend, from_heads, output_linear, to_heads, xavier_linear},
    encodings::{REFINEMENT_EPS, box_encoding, logit},
};
use crate::{
    clip::transformer::{LAYER_NORM_EPS, LayerNorm},
    layers::{Dropout, Linear},
    parameters::{Init, Parameters},
};

#[derive(Debug)]
pub(super) struct Decoder {
    layers: Vec<Layer>,
    query_scale: Perceptron,
    ref_point_head: Perceptron,
    ref_anchor_head: Perceptron,
    norm: LayerNorm,
    hidden: i64,
}

/// The queries behind a layer.
pub(super) struct Level {
    /// Normalised, `[B, N, d]`.
    pub(super) state: Tensor,
    /// The boxes from which the layer began, `[B, N, 4]`, cxcywh in [0, 1], with a gradient to the layer before.
    pub(super) reference: Tensor,
}

impl Decoder {
    pub(super) fn declare(at: &Parameters<'_>, config: &Config) -> Self {
        let hidden = config.hidden;
        let layers = &(at / "layers");
        let head = |name: &str, widths: &[i64]| Perceptron::declare(&(at / name), widths, Init::xavier);
        Self {
            layers: (0..config.decoder_layers).map(|index| Layer::declare(&(layers / index), config, index == 0)).collect(),
            query_scale: head("query_scale", &[hidden; 3]),
            ref_point_head: head("ref_point_head", &[2 * hidden, hidden, hidden]),
            ref_anchor_head: head("ref_anchor_head", &[hidden, hidden, 2]),
            norm: LayerNorm::declare(&(at / "norm"), hidden, LAYER_NORM_EPS),
            hidden,
        }
    }

    /// `content`: `[B, N, d]`; `boxes`: `[B, N, 4]`, cxcywh in [0, 1]; `box_heads`: one for each layer.
    pub(super) fn forward(
        &self,
        content: &Tensor,
        boxes: Tensor,
        memory: &Memory,
        box_heads: &[Perceptron],
        dropout: &mut Dropout<'_>,
    ) -> Vec<Level> {
        let (mut state, mut reference) = (content.shallow_clone(), boxes);
        let mut levels = Vec::with_capacity(self.layers.len());
        for (index, (layer, box_head)) in self.layers.iter().zip(box_heads).enumerate() {
            // The first layer's gradient reaches the anchors; a later one's stops at the boxes that it begins from.
            let from = if index == 0 { reference.shallow_clone() } else { reference.detach() };
            let encoding = box_encoding(&from, self.hidden);
            let places = self.ref_point_head.forward(&encoding);
            let centres = encoding.narrow(2, 0, self.hidden);
            let scaled = if index == 0 { centres } else { centres * self.query_scale.forward(&state) };
            let sines = self.modulated(&scaled, &state, &from);
            state = layer.forward(&state, &places, &sines, memory, dropout);
            levels.push(Level { state: self.norm.forward(&state), reference: reference.shallow_clone() });
            // The last layer's own boxes are only read out.
            if index + 1 < self.layers.len() {
                reference = (box_head.forward(&state) + logit(&from, REFINEMENT_EPS)).sigmoid();
            }
        }
        levels
    }

    /// The encoding of centres `[B, N, d]`, with the half of an axis multiplied by the ratio of a side guessed from the query and the box's.
    fn modulated(&self, centres: &Tensor, state: &Tensor, boxes: &Tensor) -> Tensor {
        // Width, height: [B, N, 2]
        let ratios = self.ref_anchor_head.forward(state).sigmoid() / boxes.narrow(2, 2, 2);
        let half = self.hidden / 2;
        let [y, x] = [(0, 1), (half, 0)].map(|(first, side)| centres.narrow(2, first, half) * ratios.narrow(2, side, 1));
        Tensor::cat(&[y, x], 2)
    }
}

#[derive(Debug)]
struct Layer {
    sa_qcontent_proj: Linear,
    sa_qpos_proj: Linear,
    sa_kcontent_proj: Linear,
    sa_kpos_proj: Linear,
    sa_v_proj: Linear,
    self_out_proj: Linear,
    ca_qcontent_proj: Linear,
    /// Only of the first layer, in whose contents of queries and keys the places are too.
    ca_qpos_proj: Option<Linear>,
    ca_kcontent_proj: Linear,
    ca_kpos_proj: Linear,
    ca_v_proj: Linear,
    ca_qpos_sine_proj: Linear,
    cross_out_proj: Linear,
    feed_forward: FeedForward,
    norms: [LayerNorm; 3],
    heads: i64,
}

impl Layer {
    fn declare(at: &Parameters<'_>, &Config { hidden, heads, mlp_width, .. }: &Config, is_first: bool) -> Self {
        let linear = |name: &str| xavier_linear(&(at / name), hidden, hidden);
        Self {
            sa_qcontent_proj: linear("sa_qcontent_proj"),
            sa_qpos_proj: linear("sa_qpos_proj"),
            sa_kcontent_proj: linear("sa_kcontent_proj"),
            sa_kpos_proj: linear("sa_kpos_proj"),
            sa_v_proj: linear("sa_v_proj"),
            self_out_proj: output_linear(&(at / "self_attn"), hidden),
            ca_qcontent_proj: linear("ca_qcontent_proj"),
            ca_qpos_proj: is_first.then(|| linear("ca_qpos_proj")),
            ca_kcontent_proj: linear("ca_kcontent_proj"),
            ca_kpos_proj: linear("ca_kpos_proj"),
            ca_v_proj: linear("ca_v_proj"),
            ca_qpos_sine_proj: linear("ca_qpos_sine_proj"),
            cross_out_proj: output_linear(&(at / "cross_attn"), hidden),
            feed_forward: FeedForward::declare(at, hidden, mlp_width),
            norms: ["norm1", "norm2", "norm3"].map(|name| LayerNorm::declare(&(at / name), hidden, LAYER_NORM_EPS)),
            heads,
        }
    }

    /// `state`, `places`, `sines`: `[B, N, d]`.
    fn forward(&self, state: &Tensor, places: &Tensor, sines: &Tensor, memory: &Memory, dropout: &mut Dropout<'_>) -> Tensor {
        let seen = self.self_attention(state, places, dropout);
        let state = self.norms[0].forward(&(state + dropout.apply(seen)));
        let seen = self.cross_attention(&state, places, sines, memory, dropout);
        let state = self.norms[1].forward(&(&state + dropout.apply(seen)));
        self.norms[2].forward(&(&state + self.feed_forward.forward(&state, dropout)))
    }

    fn self_attention(&self, state: &Tensor, places: &Tensor, dropout: &mut Dropout<'_>) -> Tensor {
        let q = self.sa_qcontent_proj.forward(state) + self.sa_qpos_proj.forward(places);
        let k = self.sa_kcontent_proj.forward(state) + self.sa_kpos_proj.forward(places);
        let v = self.sa_v_proj.forward(state);
        let [q, k, v] = [q, k, v].map(|x| to_heads(&x, self.heads));
        self.self_out_proj.forward(&from_heads(&attend(&q, &k, &v, None, dropout)))
    }

    /// Of each head, the first half of queries and keys are contents, the second half places.
    fn cross_attention(&self, state: &Tensor, places: &Tensor, sines: &Tensor, memory: &Memory, dropout: &mut Dropout<'_>) -> Tensor {
        let Memory { tokens, encoding, bias } = memory;
        let k_places = self.ca_kpos_proj.forward(encoding);
        let (q, k) = (self.ca_qcontent_proj.forward(state), self.ca_kcontent_proj.forward(tokens));
        let (q, k) = match &self.ca_qpos_proj {
            Some(ca_qpos_proj) => (q + ca_qpos_proj.forward(places), k + &k_places),
            None => (q, k),
        };
        let joined = |content: &Tensor, place: &Tensor| Tensor::cat(&[content, place].map(|x| to_heads(x, self.heads)), 3);
        let (q, k) = (joined(&q, &self.ca_qpos_sine_proj.forward(sines)), joined(&k, &k_places));
        let v = to_heads(&self.ca_v_proj.forward(tokens), self.heads);
        self.cross_out_proj.forward(&from_heads(&attend(&q, &k, &v, bias.as_ref(), dropout)))
    }
}
