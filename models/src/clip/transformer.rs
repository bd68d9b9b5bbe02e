//! The pre-norm transformer that both towers share, and the layers that it is made of.
//!
//! Matrices and their biases hold the tower's compute kind; LayerNorm stays in f32 whatever the tower computes in.

use tch::{Device, Kind, Tensor};

use super::{Activation, QUICK_GELU_SLOPE};
use crate::{
    layers::{CUDNN, Linear},
    parameters::{Init, Parameters},
};

/// The epsilon of every LayerNorm in CLIP.
pub(crate) const LAYER_NORM_EPS: f64 = 1e-5;

/// LayerNorm over the last dimension, computed in f32 and cast back.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    /// `[C]`, f32.
    pub(crate) weight: Tensor,
    /// `[C]`, f32.
    pub(crate) bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn declare(at: &Parameters<'_>, width: i64, eps: f64) -> Self {
        let (one, zero) = (Init::Constant(1.0), Init::Constant(0.0));
        Self { weight: at.trainable("weight", &[width], one), bias: at.trainable("bias", &[width], zero), eps }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let norm = |x: &Tensor| x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, CUDNN);
        // On a CPU libtorch itself computes in f32 where the weights are f32; that saves two passes.
        if x.device() == Device::Cpu { norm(x) } else { norm(&x.to_kind(Kind::Float)).to_kind(x.kind()) }
    }
}

/// The tokens that a token attends to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Attention<'a> {
    /// All tokens.
    Full,
    /// Itself and those before it.
    Causal,
    /// Tokens with 0 in its row of `[L, L]`, not those with minus infinity.
    Masked(&'a Tensor),
}

/// Multi-head self-attention with one matrix for queries, keys and values, laid out as PyTorch's `nn.MultiheadAttention`.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    /// `[3 C, C]` and `[3 C]`: queries, keys, values in this order.
    pub(crate) in_proj: Linear,
    /// `[C, C]` and `[C]`.
    pub(crate) out_proj: Linear,
    pub(crate) heads: i64,
}

impl SelfAttention {
    pub(super) fn declare(at: &Parameters<'_>, width: i64, heads: i64, init: &BlockInit) -> Self {
        let in_proj = Linear {
            weight: at.trainable("in_proj_weight", &[3 * width, width], init.attention_in),
            bias: at.trainable("in_proj_bias", &[3 * width], Init::Constant(0.0)),
        };
        let out_proj = Linear::declare(&(at / "out_proj"), width, width, init.attention_out, Init::Constant(0.0));
        Self { in_proj, out_proj, heads }
    }

    /// `x`: `[B, L, C]`.
    fn forward(&self, x: &Tensor, attention: Attention<'_>) -> Tensor {
        let (b, l, c) = x.size3().expect("BUG: tokens are [B, L, C]");
        let qkv = self.projected(x, 0, 3);
        let mixed = attend(&qkv.get(0), &qkv.get(1), &qkv.get(2), attention);
        self.out_proj.forward(&mixed.transpose(1, 2).reshape([b, l, c]))
    }

    /// Attention of some tokens to others: `queries` `[B, Q, C]`, `keys` `[B, K, C]`, `bias` added to the scaled logits,
    /// `[B, 1, Q, K]`.
    pub(super) fn take(&self, queries: &Tensor, keys: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (q, kv) = (self.projected(queries, 0, 1), self.projected(keys, 1, 2));
        let mixed = Tensor::scaled_dot_product_attention(&q.get(0), &kv.get(0), &kv.get(1), bias, 0.0, false, None, false);
        self.out_proj.forward(&mixed.transpose(1, 2).reshape(queries.size()))
    }

    /// Some of queries, keys and values, `n` from the `first` on: `[n, B, heads, L, C / heads]`.
    fn projected(&self, x: &Tensor, first: i64, n: i64) -> Tensor {
        let (b, l, c) = x.size3().expect("BUG: tokens are [B, L, C]");
        let Linear { weight, bias } = &self.in_proj;
        let projected = x.linear(&weight.narrow(0, first * c, n * c), Some(&bias.narrow(0, first * c, n * c)));
        projected.view([b, l, n, self.heads, c / self.heads]).permute([2, 0, 3, 1, 4])
    }

    /// As [`Self::forward`] for all tokens but the last, which looks at all tokens but the first, with a bias `[B, 1, 1, L - 1]`.
    /// Keys and values are shared.
    fn forward_with_object(&self, z: &Tensor, bias: &Tensor) -> Tensor {
        let (b, l, c) = z.size3().expect("BUG: tokens are [B, L, C]");
        let qkv = self.projected(z, 0, 3);
        let (q, k, v) = (qkv.get(0), qkv.get(1), qkv.get(2));
        let n = l - 1;
        let scene = attend(&q.narrow(2, 0, n), &k.narrow(2, 0, n), &v.narrow(2, 0, n), Attention::Full);
        let (k, v) = (k.narrow(2, 1, n), v.narrow(2, 1, n));
        let object = Tensor::scaled_dot_product_attention(&q.narrow(2, n, 1), &k, &v, Some(bias), 0.0, false, None, false);
        self.out_proj.forward(&Tensor::cat(&[scene, object], 2).transpose(1, 2).reshape([b, l, c]))
    }
}

/// Scaled dot-product attention, no dropout; `q`, `k`, `v`: `[B, heads, L, C / heads]`.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, attention: Attention<'_>) -> Tensor {
    let (mask, is_causal) = match attention {
        Attention::Full => (None, false),
        Attention::Causal => (None, true),
        Attention::Masked(mask) => (Some(mask), false),
    };
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, None, false)
}

/// One residual block: attention, then a two-layer perceptron, each on a normalised copy of the stream.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ln_1: LayerNorm,
    pub(crate) attn: SelfAttention,
    pub(crate) ln_2: LayerNorm,
    pub(crate) c_fc: Linear,
    pub(crate) c_proj: Linear,
    pub(crate) activation: Activation,
    /// Whether the matrices around the activation hold its slope.
    holds_slope: bool,
}

impl Block {
    fn declare(at: &Parameters<'_>, shape: &Shape, activation: Activation, init: &BlockInit) -> Self {
        let mlp = &(at / "mlp");
        Self {
            ln_1: LayerNorm::declare(&(at / "ln_1"), shape.width, shape.eps),
            attn: SelfAttention::declare(&(at / "attn"), shape.width, shape.heads, init),
            ln_2: LayerNorm::declare(&(at / "ln_2"), shape.width, shape.eps),
            c_fc: Linear::declare(&(mlp / "c_fc"), shape.width, shape.mlp_width, init.mlp_in, Init::fan_in(shape.width)),
            c_proj: Linear::declare(&(mlp / "c_proj"), shape.mlp_width, shape.width, init.mlp_out, Init::fan_in(shape.mlp_width)),
            activation,
            holds_slope: false,
        }
    }

    /// `x`: `[B, L, C]`.
    pub(crate) fn forward(&self, x: &Tensor, attention: Attention<'_>) -> Tensor {
        let x = x + self.attn.forward(&self.ln_1.forward(x), attention);
        let perceived = self.mlp(&self.ln_2.forward(&x));
        x + perceived
    }

    /// The first token alone, `[B, 1, C]`, of what [`Self::forward`] returns: the others are computed only as keys and values.
    pub(crate) fn forward_first(&self, x: &Tensor) -> Tensor {
        self.forward_token(x, &x.narrow(1, 0, 1), None)
    }

    /// The stream of a scene and, as the last of `z` `[B, L, C]`, of an object in it (OADP, section 4.3): the scene's tokens look
    /// at each other and never at the object, the object at all but the first, with a bias `[B, 1, 1, L - 1]`.
    pub(crate) fn forward_with_object(&self, z: &Tensor, bias: &Tensor) -> Tensor {
        let z = z + self.attn.forward_with_object(&self.ln_1.forward(z), bias);
        let perceived = self.mlp(&self.ln_2.forward(&z));
        z + perceived
    }

    /// The object alone, `[B, 1, C]`, of what [`Self::forward_with_object`] returns.
    pub(crate) fn forward_object(&self, z: &Tensor, bias: &Tensor) -> Tensor {
        let n = z.size()[1] - 1;
        self.forward_token(&z.narrow(1, 1, n), &z.narrow(1, n, 1), Some(bias))
    }

    fn forward_token(&self, keys: &Tensor, token: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let y = token + self.attn.take(&self.ln_1.forward(token), &self.ln_1.forward(keys), bias);
        let perceived = self.mlp(&self.ln_2.forward(&y));
        y + perceived
    }

    pub(crate) fn mlp(&self, x: &Tensor) -> Tensor {
        let hidden = self.c_fc.forward(x);
        let active = if self.holds_slope { { hidden }.silu_() } else { self.activation.apply(hidden) };
        self.c_proj.forward(&active)
    }

    /// Folds the slope s of the activation into the matrices around it, for good: silu(s x) / s needs no passes of its own for s.
    fn fold_slope(&mut self) {
        if self.activation == Activation::QuickGelu && !self.holds_slope {
            self.holds_slope = true;
            self.c_fc = Linear { weight: &self.c_fc.weight * QUICK_GELU_SLOPE, bias: &self.c_fc.bias * QUICK_GELU_SLOPE };
            self.c_proj.weight = &self.c_proj.weight / QUICK_GELU_SLOPE;
        }
    }

    fn cast(&mut self, kind: Kind) {
        self.fold_slope();
        for linear in [&mut self.attn.in_proj, &mut self.attn.out_proj, &mut self.c_fc, &mut self.c_proj] {
            linear.cast(kind);
        }
    }
}

/// The sizes of a transformer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) width: i64,
    pub(super) heads: i64,
    pub(super) depth: usize,
    pub(super) mlp_width: i64,
    /// The epsilon of LayerNorm.
    pub(super) eps: f64,
}

/// How the matrices of a block begin.
pub(super) struct BlockInit {
    attention_in: Init,
    attention_out: Init,
    mlp_in: Init,
    mlp_out: Init,
}

impl BlockInit {
    /// PyTorch's defaults, which OpenAI and open_clip leave in place in the image tower: Xavier for the queries, keys and values.
    pub(super) fn default_of(shape: &Shape) -> Self {
        Self {
            attention_in: Init::Uniform((6.0 / (4 * shape.width) as f64).sqrt()),
            attention_out: Init::fan_in(shape.width),
            mlp_in: Init::fan_in(shape.width),
            mlp_out: Init::fan_in(shape.mlp_width),
        }
    }

    /// The rule of the text tower: residual branches start smaller in deeper networks.
    pub(super) fn scaled_by_depth(shape: &Shape) -> Self {
        let width = shape.width as f64;
        let residual = Init::Normal(width.powf(-0.5) * (2.0 * shape.depth as f64).powf(-0.5));
        Self {
            attention_in: Init::Normal(width.powf(-0.5)),
            attention_out: residual,
            mlp_in: Init::Normal((2.0 * width).powf(-0.5)),
            mlp_out: residual,
        }
    }
}

/// A stack of residual blocks.
#[derive(Debug)]
pub(crate) struct Transformer {
    pub(crate) blocks: Vec<Block>,
}

impl Transformer {
    pub(super) fn declare(at: &Parameters<'_>, shape: &Shape, activation: Activation, init: &BlockInit) -> Self {
        let at = &(at / "resblocks");
        Self { blocks: (0..shape.depth).map(|index| Block::declare(&(at / index), shape, activation, init)).collect() }
    }

    /// `x`: `[B, L, C]`.
    pub(crate) fn forward(&self, x: Tensor, attention: Attention<'_>) -> Tensor {
        self.blocks.iter().fold(x, |x, block| block.forward(&x, attention))
    }

    /// The first token alone, `[B, 1, C]`, of what [`Self::forward`] returns with full attention: of the last block nothing else is
    /// needed, which saves 10 of its 12 C² multiplications a token.
    pub(crate) fn forward_first(&self, x: Tensor) -> Tensor {
        let Some((last, blocks)) = self.blocks.split_last() else { return x.narrow(1, 0, 1) };
        last.forward_first(&blocks.iter().fold(x, |x, block| block.forward(&x, Attention::Full)))
    }

    /// The object, `[B, 1, C]`, that begins as the last token of `z`; see [`Block::forward_with_object`].
    pub(crate) fn forward_object(&self, z: Tensor, bias: &Tensor) -> Tensor {
        let Some((last, blocks)) = self.blocks.split_last() else { return z.narrow(1, z.size()[1] - 1, 1) };
        last.forward_object(&blocks.iter().fold(z, |z, block| block.forward_with_object(&z, bias)), bias)
    }

    pub(super) fn cast(&mut self, kind: Kind) {
        for block in &mut self.blocks {
            block.cast(kind);
        }
    }
}
