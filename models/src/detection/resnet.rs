//! ResNet (He et al. 2016) as a backbone: four feature maps, without pooling or classes at the end.
//!
//! Parameter names are torchvision's and mmdet's, which agree.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::layers::channels_last;
use crate::{
    Phase, Result, Statistics,
    error::ensure,
    layers::{BatchNorm, Conv, ConvShape},
    parameters::{Init, Parameters},
};

/// The configuration of a ResNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The number and kind of blocks.
    pub depth: Depth,
    /// The channels that leave the stem, and those inside a block of the first stage; 64 in all published networks.
    pub width: i64,
    /// Where the first bottleneck of a stage halves the side; blocks of two convolutions do it in the first.
    pub stride: StridePlace,
    /// The number of trained parts, counted from the last stage: 4 are all stages, 5 the stem too.
    pub trainable_parts: usize,
    /// The statistics of batch normalisation in training.
    pub statistics: Statistics,
    /// The epsilon of batch normalisation; 1e-5, but 0 in torchvision's published Mask R-CNN.
    pub norm_eps: f64,
}

/// The number and kind of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Depth {
    /// 2, 2, 2, 2 blocks of two convolutions.
    #[serde(rename = "resnet-18")]
    R18,
    /// 3, 4, 6, 3 bottlenecks.
    #[serde(rename = "resnet-50")]
    R50,
    /// 3, 4, 23, 3 bottlenecks.
    #[serde(rename = "resnet-101")]
    R101,
}

/// Where the first bottleneck of a stage halves the side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StridePlace {
    /// The first 1 x 1 convolution ("caffe style").
    First,
    /// The 3 x 3 convolution (torchvision, "pytorch style").
    Middle,
}

impl Depth {
    fn blocks(self) -> [usize; 4] {
        match self {
            Self::R18 => [2, 2, 2, 2],
            Self::R50 => [3, 4, 6, 3],
            Self::R101 => [3, 4, 23, 3],
        }
    }

    /// How many times wider a block's output is than its inside.
    fn expansion(self) -> i64 {
        match self {
            Self::R18 => 1,
            Self::R50 | Self::R101 => 4,
        }
    }
}

impl Config {
    /// The channels of C2, C3, C4, C5.
    pub fn channels(&self) -> [i64; 4] {
        [1, 2, 4, 8].map(|times| times * self.width * self.depth.expansion())
    }
}

/// The network.
#[derive(Debug)]
pub struct ResNet {
    conv1: Conv,
    bn1: BatchNorm,
    stages: [Vec<Block>; 4],
}

impl ResNet {
    pub(crate) fn declare(at: &Parameters<'_>, config: &Config) -> Self {
        let place = |part: usize| if part < 5 - config.trainable_parts.min(5) { at.frozen() } else { at.clone() };
        let stem = &place(0);
        let shape = ConvShape { n_in: 3, n_out: config.width, side: 7, stride: 2 };
        let conv1 = Conv::without_bias(&(stem / "conv1"), shape, shape.kaiming());
        let bn1 = BatchNorm::declare(&(stem / "bn1"), config.width, Init::Constant(1.0), config.statistics, config.norm_eps);
        let mut n_in = config.width;
        let stages = [0, 1, 2, 3].map(|stage: usize| {
            let at = &(&place(stage + 1) / format!("layer{}", stage + 1).as_str());
            let planes = config.width << stage;
            (0..config.depth.blocks()[stage])
                .map(|index| {
                    let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                    let block = Block::declare(&(at / index), config, n_in, planes, stride);
                    n_in = planes * config.depth.expansion();
                    block
                })
                .collect()
        });
        Self { conv1, bn1, stages }
    }

    /// Returns C2 to C5, of strides 4, 8, 16, 32, channels-last in memory.
    ///
    /// `images`: f32, bf16 or f16 `[B, 3, H, W]`, normalised as the weights want them; H and W at least 32. The maps are of their kind.
    pub fn forward(&self, images: &Tensor, phase: Phase) -> Result<[Tensor; 4]> {
        let fits = matches!(images.size()[..], [b, 3, h, w] if b > 0 && h >= 32 && w >= 32);
        let fits = fits && matches!(images.kind(), Kind::Float | Kind::BFloat16 | Kind::Half);
        ensure(fits, "images", "f32, bf16 or f16 [B, 3, H, W], B at least 1, H and W at least 32", images)?;
        let x = self.conv1.normalised(&self.bn1, &channels_last(images), phase).relu_();
        let mut x = x.max_pool2d(3, 2, 1, 1, false);
        Ok([0, 1, 2, 3].map(|stage: usize| {
            for block in &self.stages[stage] {
                x = block.forward(&x, phase);
            }
            x.shallow_clone()
        }))
    }
}

/// A residual block: two or three convolutions, and what fits the input to the output where channels or sides differ.
#[derive(Debug)]
struct Block {
    inner: Vec<(Conv, BatchNorm)>,
    downsample: Option<(Conv, BatchNorm)>,
}

impl Block {
    fn declare(at: &Parameters<'_>, config: &Config, n_in: i64, planes: i64, stride: i64) -> Self {
        let n_out = planes * config.depth.expansion();
        let normalised = |conv: &Parameters<'_>, bn: &Parameters<'_>, shape: ConvShape| {
            let conv = Conv::without_bias(conv, shape, shape.kaiming());
            (conv, BatchNorm::declare(bn, shape.n_out, Init::Constant(1.0), config.statistics, config.norm_eps))
        };
        let shapes: &[ConvShape] = match (config.depth, config.stride) {
            (Depth::R18, _) => &[ConvShape { n_in, n_out, side: 3, stride }, ConvShape::new(n_out, n_out, 3)],
            (Depth::R50 | Depth::R101, StridePlace::First) => {
                &[ConvShape { n_in, n_out: planes, side: 1, stride }, ConvShape::new(planes, planes, 3), ConvShape::new(planes, n_out, 1)]
            }
            (Depth::R50 | Depth::R101, StridePlace::Middle) => &[
                ConvShape::new(n_in, planes, 1),
                ConvShape { n_in: planes, n_out: planes, side: 3, stride },
                ConvShape::new(planes, n_out, 1),
            ],
        };
        let inner = shapes.iter().enumerate().map(|(place, &shape)| {
            normalised(&(at / format!("conv{}", place + 1).as_str()), &(at / format!("bn{}", place + 1).as_str()), shape)
        });
        let downsample = (stride > 1 || n_in != n_out).then(|| {
            let at = &(at / "downsample");
            normalised(&(at / 0), &(at / 1), ConvShape { n_in, n_out, side: 1, stride })
        });
        Self { inner: inner.collect(), downsample }
    }

    fn forward(&self, x: &Tensor, phase: Phase) -> Tensor {
        let last = self.inner.len() - 1;
        let mut inner = x.shallow_clone();
        for (place, (conv, bn)) in self.inner.iter().enumerate() {
            inner = conv.normalised(bn, &inner, phase);
            if place < last {
                inner = inner.relu_();
            }
        }
        match &self.downsample {
            Some((conv, bn)) => inner.g_add_(&conv.normalised(bn, x, phase)).relu_(),
            None => inner.g_add_(x).relu_(),
        }
    }
}
