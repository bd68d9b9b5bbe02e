//! OpenAI's modified ResNet: a three-convolution stem, average pooling before every strided convolution, and attention pooling at the end.
//!
//! Batch normalisation keeps its parameters in f32 whatever the tower computes in. Images of another size than the checkpoint's are
//! taken too: the pooling's position table is resized as that of the vision transformer (OpenAI's code refuses them).

use tch::{Kind, Tensor};

use super::{
    architecture::ImageTower,
    transformer::{Attention, attend},
    vision::resize_positions,
};
use crate::{
    layers::{BATCH_NORM_EPS, BatchNorm, Conv, ConvShape, Linear, Phase, Statistics},
    parameters::{Init, Parameters},
};

/// Channels leave a bottleneck this many times wider than they are inside it.
const EXPANSION: i64 = 4;
/// How many times smaller than the image the last feature map is.
pub(super) const REDUCTION: i64 = 32;

/// The modified ResNet.
#[derive(Debug)]
pub struct ModifiedResNet {
    pub(crate) stem: [(Conv, BatchNorm); 3],
    /// Strides 1, 2, 2, 2.
    pub(crate) layers: [Vec<Bottleneck>; 4],
    pub(crate) attnpool: AttentionPool,
}

impl ModifiedResNet {
    pub(super) fn declare(at: &Parameters<'_>, image_side: i64, layers: &[usize; 4], width: i64, heads: i64, embed_dim: i64) -> Self {
        let half = width / 2;
        let stem = [(1, 3, half, 2), (2, half, half, 1), (3, half, width, 1)].map(|(index, n_in, n_out, stride)| {
            let conv = conv(&(at / format!("conv{index}").as_str()), [n_in, n_out], 3, stride);
            (conv, norm(&(at / format!("bn{index}").as_str()), n_out, Init::Constant(1.0)))
        });
        let mut n_in = width;
        let layers = [0, 1, 2, 3].map(|level: usize| {
            let at = &(at / format!("layer{}", level + 1).as_str());
            let planes = width << level;
            (0..layers[level])
                .map(|index| {
                    let stride = if level > 0 && index == 0 { 2 } else { 1 };
                    let block = Bottleneck::declare(&(at / index), n_in, planes, stride);
                    n_in = planes * EXPANSION;
                    block
                })
                .collect()
        });
        let attnpool = AttentionPool::declare(&(at / "attnpool"), image_side / REDUCTION, REDUCTION * width, heads, embed_dim);
        Self { stem, layers, attnpool }
    }

    /// The stem with its pooling: `[B, width, H / 4, W / 4]`.
    pub(super) fn stem(&self, images: &Tensor, phase: Phase) -> Tensor {
        let x = self.stem.iter().fold(images.shallow_clone(), |x, (conv, bn)| bn.forward(&conv.forward(&x), phase).relu());
        average_pool(&x, 2)
    }

    /// One of the four layers, of what the one before it returns.
    pub(super) fn layer(&self, index: usize, x: &Tensor, phase: Phase) -> Tensor {
        self.layers[index].iter().fold(x.shallow_clone(), |x, block| block.forward(&x, phase))
    }
}

impl ImageTower for ModifiedResNet {
    fn least_side(&self) -> i64 {
        REDUCTION
    }

    fn forward(&self, images: &Tensor, phase: Phase) -> Tensor {
        let map = (0..self.layers.len()).fold(self.stem(images, phase), |x, index| self.layer(index, &x, phase));
        self.attnpool.forward(&map)
    }

    fn resnet(&self) -> Option<&ModifiedResNet> {
        Some(self)
    }

    fn cast(&mut self, kind: Kind) {
        for (conv, _) in &mut self.stem {
            conv.cast(kind);
        }
        for block in self.layers.iter_mut().flatten() {
            for conv in [&mut block.conv1, &mut block.conv2, &mut block.conv3] {
                conv.cast(kind);
            }
            if let Some((conv, _)) = &mut block.downsample {
                conv.cast(kind);
            }
        }
        for linear in [&mut self.attnpool.q_proj, &mut self.attnpool.k_proj, &mut self.attnpool.v_proj, &mut self.attnpool.c_proj] {
            linear.cast(kind);
        }
    }
}

/// A residual block of three convolutions: 1 x 1, 3 x 3, 1 x 1.
#[derive(Debug)]
pub(crate) struct Bottleneck {
    pub(crate) conv1: Conv,
    pub(crate) bn1: BatchNorm,
    pub(crate) conv2: Conv,
    pub(crate) bn2: BatchNorm,
    pub(crate) conv3: Conv,
    pub(crate) bn3: BatchNorm,
    /// Fits the input to the output where channels or sides differ.
    pub(crate) downsample: Option<(Conv, BatchNorm)>,
    pub(crate) stride: i64,
}

impl Bottleneck {
    fn declare(at: &Parameters<'_>, n_in: i64, planes: i64, stride: i64) -> Self {
        let n_out = planes * EXPANSION;
        let ones = Init::Constant(1.0);
        let downsample = (stride > 1 || n_in != n_out).then(|| {
            let at = &(at / "downsample");
            (conv(&(at / 0), [n_in, n_out], 1, 1), norm(&(at / 1), n_out, ones))
        });
        Self {
            conv1: conv(&(at / "conv1"), [n_in, planes], 1, 1),
            bn1: norm(&(at / "bn1"), planes, ones),
            conv2: conv(&(at / "conv2"), [planes, planes], 3, 1),
            bn2: norm(&(at / "bn2"), planes, ones),
            conv3: conv(&(at / "conv3"), [planes, n_out], 1, 1),
            // Zero, so that at first every block passes its input through.
            bn3: norm(&(at / "bn3"), n_out, Init::Constant(0.0)),
            downsample,
            stride,
        }
    }

    fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        let inner = self.bn1.forward(&self.conv1.forward(x), phase).relu();
        let inner = self.bn2.forward(&self.conv2.forward(&inner), phase).relu();
        let inner = self.bn3.forward(&self.conv3.forward(&average_pool(&inner, self.stride)), phase);
        match &self.downsample {
            Some((conv, bn)) => (inner + bn.forward(&conv.forward(&average_pool(x, self.stride)), phase)).relu(),
            None => (inner + x).relu(),
        }
    }
}

/// Pools a feature map by letting its mean attend to every cell.
#[derive(Debug)]
pub(crate) struct AttentionPool {
    /// `[1 + grid * grid, C]`, f32; row 0 is the mean's.
    pub(crate) positional_embedding: Tensor,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) c_proj: Linear,
    pub(crate) heads: i64,
}

impl AttentionPool {
    fn declare(at: &Parameters<'_>, grid: i64, width: i64, heads: i64, embed_dim: i64) -> Self {
        let scaled = Init::Normal((width as f64).powf(-0.5));
        let linear = |name: &str, n_out| Linear::declare(&(at / name), width, n_out, scaled, Init::fan_in(width));
        Self {
            positional_embedding: at.trainable("positional_embedding", &[1 + grid * grid, width], scaled),
            q_proj: linear("q_proj", width),
            k_proj: linear("k_proj", width),
            v_proj: linear("v_proj", width),
            c_proj: linear("c_proj", embed_dim),
            heads,
        }
    }

    /// `map`: `[B, C, h, w]`; returns `[B, D]`.
    fn forward(&self, map: &Tensor) -> Tensor {
        let [h, w] = [2, 3].map(|dimension| map.size()[dimension]);
        self.pool(map, &resize_positions(&self.positional_embedding, h, w))
    }

    /// As [`Self::forward`], with `positions` `[1 + h w, C]` in place of its own.
    pub(super) fn pool(&self, map: &Tensor, positions: &Tensor) -> Tensor {
        let cells = map.flatten(2, 3).transpose(1, 2);
        let mean = cells.mean_dim(1, true, None::<Kind>);
        let x = Tensor::cat(&[mean, cells], 1) + positions.to_kind(map.kind());
        self.mix(&self.q_proj.forward(&x.narrow(1, 0, 1)), &self.k_proj.forward(&x), &self.v_proj.forward(&x))
    }

    /// Attention of one query to the tokens, and the projection of what it takes: `[B, D]`; `q` `[B, 1, C]`, `k` and `v` `[B, L, C]`.
    pub(super) fn mix(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (b, _, c) = q.size3().expect("BUG: a query is [B, 1, C]");
        let split = |tokens: &Tensor| tokens.view([b, tokens.size()[1], self.heads, c / self.heads]).transpose(1, 2);
        let pooled = attend(&split(q), &split(k), &split(v), Attention::Full);
        self.c_proj.forward(&pooled.transpose(1, 2).reshape([b, c]))
    }

    /// The same pooling, whose weights get no gradients.
    pub(super) fn detached(&self) -> Self {
        let detached = |linear: &Linear| Linear { weight: linear.weight.detach(), bias: linear.bias.detach() };
        Self {
            positional_embedding: self.positional_embedding.detach(),
            q_proj: detached(&self.q_proj),
            k_proj: detached(&self.k_proj),
            v_proj: detached(&self.v_proj),
            c_proj: detached(&self.c_proj),
            heads: self.heads,
        }
    }
}

fn average_pool(x: &Tensor, stride: i64) -> Tensor {
    if stride == 1 { x.shallow_clone() } else { x.avg_pool2d(stride, stride, 0, false, true, None) }
}

/// A convolution without bias.
fn conv(at: &Parameters<'_>, [n_in, n_out]: [i64; 2], side: i64, stride: i64) -> Conv {
    let shape = ConvShape { stride, ..ConvShape::new(n_in, n_out, side) };
    Conv::without_bias(at, shape, shape.fan_in())
}

fn norm(at: &Parameters<'_>, channels: i64, weight: Init) -> BatchNorm {
    BatchNorm::declare(at, channels, weight, Statistics::Batch, BATCH_NORM_EPS)
}
