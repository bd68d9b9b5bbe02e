//! The feature pyramid (Lin et al. 2017): five maps of one width, each of which has seen the coarser ones.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::layers::ConvModule;
use crate::{Phase, layers::ConvShape, parameters::Parameters};

/// The stride of the finest level, px; each further level doubles it.
pub const FINEST_STRIDE: i64 = 4;
/// P2 to P6.
pub const N_LEVELS: usize = 5;

/// The configuration of a pyramid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The channels of every level.
    pub channels: i64,
    /// The normalisation after each convolution; there is no activation.
    pub norm: Norm,
}

/// The normalisation after a convolution of a pyramid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// A bias.
    Bias,
    /// Batch normalisation, by batch statistics in training (OADP; over one device, where the reference synchronises several).
    Batch,
}

/// The pyramid.
#[derive(Debug)]
pub struct Fpn {
    lateral_convs: [ConvModule; 4],
    fpn_convs: [ConvModule; 4],
}

impl Fpn {
    pub(crate) fn declare(at: &Parameters<'_>, config: &Config, channels: [i64; 4]) -> Self {
        let convs = |name: &str, side: i64, n_in: [i64; 4]| {
            [0, 1, 2, 3].map(|level: usize| {
                let (at, shape) = (&(at / name) / level, ConvShape::new(n_in[level], config.channels, side));
                match config.norm {
                    Norm::Bias => ConvModule::plain(&at, shape, shape.xavier()),
                    Norm::Batch => ConvModule::normalised(&at, shape, shape.xavier()),
                }
            })
        };
        Self { lateral_convs: convs("lateral_convs", 1, channels), fpn_convs: convs("fpn_convs", 3, [config.channels; 4]) }
    }

    /// Returns P2 to P6, `[B, C, h, w]` of strides 4 to 64; P6 is every other cell of P5.
    ///
    /// `maps`: C2 to C5 of a backbone.
    pub(crate) fn forward(&self, maps: &[Tensor; 4], phase: Phase) -> [Tensor; N_LEVELS] {
        let mut laterals = [0, 1, 2, 3].map(|level: usize| self.lateral_convs[level].forward(&maps[level], phase));
        for level in [2, 1, 0] {
            let finer = &laterals[level];
            let coarser = laterals[level + 1].upsample_nearest2d(&finer.size()[2..], None, None);
            laterals[level] = finer + coarser;
        }
        let [p2, p3, p4, p5] = [0, 1, 2, 3].map(|level: usize| self.fpn_convs[level].forward(&laterals[level], phase));
        let p6 = p5.max_pool2d(1, 2, 0, 1, false);
        [p2, p3, p4, p5, p6]
    }
}
