//! The shared first stage of two-stage detectors: backbone, pyramid and region proposals.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::rpn::{self, ProposalRule, Proposals, Rpn};
use crate::{
    Phase, Result, Statistics,
    detection::{
        anchors::{Anchors, Grid},
        boxes::{BoxCoder, ImageSize, clip_to_image},
        fpn::{self, FINEST_STRIDE, Fpn, N_LEVELS},
        matching::{Assigner, Sampler},
        resnet::{self, Depth, ResNet, StridePlace},
        roi_align::{Alignment, Level, RoiAlign, Sampling},
    },
    error::check_count,
    layers::BATCH_NORM_EPS,
    parameters::Parameters,
};

/// The configuration of the first stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionsConfig {
    /// The backbone.
    pub backbone: resnet::Config,
    /// The pyramid.
    pub neck: fpn::Config,
    /// The proposals.
    pub rpn: rpn::Config,
}

/// The coder of all heads that look at regions (Faster R-CNN).
pub const REGION_CODER: BoxCoder = BoxCoder { stds: [0.1, 0.1, 0.2, 0.2] };

/// The pooling of mmdet's heads, for boxes of 7 cells.
pub const POOL: RoiAlign = RoiAlign { side: 7, sampling: Sampling::Adaptive, alignment: Alignment::Centre, finest_scale: 56.0 };

impl RegionsConfig {
    /// OADP's: a ResNet-50 of caffe style, whose last three stages are trained, and a pyramid of 256 channels with batch normalisation.
    pub fn oadp() -> Self {
        Self {
            backbone: resnet::Config {
                depth: Depth::R50,
                width: 64,
                stride: StridePlace::First,
                trainable_parts: 3,
                statistics: Statistics::Frozen,
                norm_eps: BATCH_NORM_EPS,
            },
            neck: fpn::Config { channels: 256, norm: fpn::Norm::Batch },
            rpn: rpn::Config {
                anchors: Anchors { scale: 8.0, ratios: vec![0.5, 1.0, 2.0], grid: Grid::Exact },
                coder: BoxCoder { stds: [1.0; 4] },
                assigner: Assigner { object_iou: 0.7, background_iou: 0.3, best_of_object_iou: Some(0.3) },
                sampler: Sampler { n: 256, object_fraction: 0.5, background_per_object: None },
                learning: rpn::Learning::default(),
            },
        }
    }

    /// torchvision's `maskrcnn_resnet50_fpn`.
    pub fn torchvision() -> Self {
        let oadp = Self::oadp();
        Self {
            backbone: resnet::Config { stride: StridePlace::Middle, statistics: Statistics::Fixed, ..oadp.backbone },
            neck: fpn::Config { norm: fpn::Norm::Bias, ..oadp.neck },
            rpn: rpn::Config {
                anchors: Anchors { grid: Grid::Rounded, ..oadp.rpn.anchors },
                // An object claims the anchors that overlap it most, however little.
                assigner: Assigner { best_of_object_iou: Some(0.0), ..oadp.rpn.assigner },
                learning: rpn::Learning::TORCHVISION,
                ..oadp.rpn
            },
        }
    }

    /// For images of 128 to 256 px of a toy world, from scratch: a ResNet-18 of a quarter of the width, trained completely, 64 channels.
    pub fn toy() -> Self {
        let oadp = Self::oadp();
        let backbone = resnet::Config { depth: Depth::R18, width: 16, trainable_parts: 5, statistics: Statistics::Batch, ..oadp.backbone };
        Self {
            backbone,
            neck: fpn::Config { channels: 64, norm: fpn::Norm::Batch },
            rpn: rpn::Config { anchors: Anchors { scale: 4.0, ..oadp.rpn.anchors }, ..oadp.rpn },
        }
    }

    pub(super) fn sizes(&self) -> [(&'static str, i64); 3] {
        [
            ("backbone.width", self.backbone.width),
            ("neck.channels", self.neck.channels),
            ("rpn.anchors.ratios", self.rpn.anchors.ratios.len() as i64),
        ]
    }
}

/// The regions of a batch of images that its heads look at.
pub(super) struct Regions {
    /// Of each image f32 `[N, 4]` on the CPU, px.
    pub(super) boxes: Vec<Tensor>,
    /// Of all images f32 `[N]`, on the network's device.
    pub(super) objectness: Tensor,
}

/// The first stage: backbone, pyramid, region proposals.
#[derive(Debug)]
pub struct RegionNetwork {
    /// The backbone.
    pub backbone: ResNet,
    /// The pyramid.
    pub neck: Fpn,
    /// The proposals.
    pub rpn: Rpn,
}

/// The output of a [`RegionNetwork`] for a batch of images.
#[derive(Debug)]
pub struct Pyramid {
    /// P2 to P6, `[B, C, h, w]` of strides 4 to 64.
    pub levels: [Tensor; N_LEVELS],
    /// The predictions of the proposal network for each anchor.
    pub predictions: rpn::Predictions,
}

impl RegionNetwork {
    pub(super) fn declare(at: &Parameters<'_>, config: &RegionsConfig) -> Self {
        Self {
            backbone: ResNet::declare(&(at / "backbone"), &config.backbone),
            neck: Fpn::declare(&(at / "neck"), &config.neck, config.backbone.channels()),
            rpn: Rpn::declare(&(at / "rpn_head"), &config.rpn, config.neck.channels),
        }
    }

    /// Looks at images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32.
    pub fn forward(&self, images: &Tensor, phase: Phase) -> Result<Pyramid> {
        let levels = self.neck.forward(&self.backbone.forward(images, phase)?, phase);
        let batch = [images.size()[2], images.size()[3]];
        Ok(Pyramid { predictions: self.rpn.forward(&levels, batch), levels })
    }

    /// Proposals in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients. `sizes`: of each, without
    /// padding.
    pub fn propose(&self, images: &Tensor, sizes: &[ImageSize], rule: &ProposalRule) -> Result<Vec<Proposals>> {
        tch::no_grad(|| self.rpn.proposals(&self.forward(images, Phase::Test)?.predictions, sizes, rule))
    }

    /// The proposals of each image: those that are given, clipped to it, or else the network's own.
    ///
    /// `sizes`: of each image, without padding.
    pub(super) fn regions(
        &self,
        pyramid: &Pyramid,
        sizes: &[ImageSize],
        given: Option<Vec<Proposals>>,
        rule: &ProposalRule,
    ) -> Result<Regions> {
        let proposals = match given {
            Some(given) => {
                check_count("images with proposals", sizes.len() as i64, given.len())?;
                let clipped = |(one, &size): (Proposals, &ImageSize)| Proposals { boxes: clip_to_image(&one.boxes, size), ..one };
                given.into_iter().zip(sizes).map(clipped).collect()
            }
            None => self.rpn.proposals(&pyramid.predictions, sizes, rule)?,
        };
        let objectness = Tensor::cat(&proposals.iter().map(|one| &one.scores).collect::<Vec<_>>(), 0);
        let boxes = proposals.into_iter().map(|one| one.boxes).collect();
        Ok(Regions { boxes, objectness: objectness.to_device(pyramid.levels[0].device()) })
    }
}

impl Pyramid {
    /// Pools boxes from P2 to P5: `[N, C, side, side]`, image after image; `boxes`: for each image `[N_b, 4]`, px.
    pub fn pool(&self, rule: &RoiAlign, boxes: &[Tensor]) -> Result<Tensor> {
        pool(&self.levels, rule, boxes)
    }
}

pub(super) fn pool(levels: &[Tensor; N_LEVELS], rule: &RoiAlign, boxes: &[Tensor]) -> Result<Tensor> {
    let levels = levels[..N_LEVELS - 1].iter().enumerate();
    let levels: Vec<Level<'_>> = levels.map(|(place, features)| Level { features, stride: FINEST_STRIDE << place }).collect();
    rule.forward(&levels, boxes)
}
