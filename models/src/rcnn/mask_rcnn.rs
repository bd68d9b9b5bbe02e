//! Mask R-CNN (He et al., ICCV 2017) with classes of its own, as torchvision's `maskrcnn_resnet50_fpn`.

use std::{cell::RefCell, collections::BTreeMap};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use super::{
    heads::{ClosedHead, DetectionRule, RegionLosses, RegionRule, TrunkConfig, detect_regions, region_losses},
    mask_head::{MaskConfig, MaskHead, MaskHeadConfig, MaskRule, ObjectMask, mask_loss, with_masks},
    regions::{POOL, REGION_CODER, RegionNetwork, RegionsConfig},
    rpn::{self, ProposalRule},
};
use crate::{
    Error, Phase, Result,
    detection::{
        Detections,
        boxes::{BoxLoss, ImageSize, Suppression, integers},
        matching::{Assigner, Sampler, Truth},
        roi_align::{Alignment, RoiAlign, Sampling},
    },
    error::{check_sizes, ensure},
    parameters::{Fill, Parameters},
};

/// A Mask R-CNN with K classes of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRcnnConfig {
    /// The first stage.
    pub regions: RegionsConfig,
    /// The choice of proposals.
    pub proposals: ProposalRule,
    /// How regions are pooled for the box head.
    pub pool: RoiAlign,
    /// The number K of classes, background not counted.
    pub n_classes: i64,
    /// The layers before the classifier.
    pub trunk: TrunkConfig,
    /// The choice of detections.
    pub detections: DetectionRule,
    /// The mask head.
    pub mask: MaskConfig,
    /// The choice of proposals in training.
    pub training_proposals: ProposalRule,
    /// The choice of training regions; its box encoding is used in testing too.
    pub regions_rule: RegionRule,
    /// The loss of box deltas.
    pub box_loss: BoxLoss,
    /// The targets of the mask head.
    pub mask_rule: MaskRule,
}

impl MaskRcnnConfig {
    /// torchvision's `maskrcnn_resnet50_fpn`.
    pub fn torchvision(n_classes: i64) -> Self {
        let pool = RoiAlign { sampling: Sampling::Fixed(2), alignment: Alignment::Corner, ..POOL };
        let proposals = |n| ProposalRule { per_level: n, suppression: Suppression { iou: 0.7, keep: n }, least_side: 1e-3 };
        Self {
            regions: RegionsConfig::torchvision(),
            proposals: proposals(1000),
            pool,
            n_classes,
            trunk: TrunkConfig { n_convs: 0, n_fcs: 2, width: 1024 },
            detections: DetectionRule { threshold: 0.05, suppression: Suppression { iou: 0.5, keep: 100 } },
            mask: MaskConfig {
                pool: RoiAlign { side: 14, ..pool },
                head: MaskHeadConfig { n_convs: 4, channels: 256, n_masks: n_classes },
            },
            training_proposals: proposals(2000),
            regions_rule: RegionRule {
                assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
                sampler: Sampler { n: 512, object_fraction: 0.25, background_per_object: None },
                coder: REGION_CODER,
            },
            box_loss: BoxLoss::Smooth { beta: 1.0 / 9.0 },
            mask_rule: MaskRule::TORCHVISION,
        }
    }

    /// Checks that all sizes are positive.
    pub fn check(&self) -> Result<()> {
        let sizes = [("n_classes", self.n_classes), ("pool.side", self.pool.side)];
        check_sizes(sizes.into_iter().chain(self.regions.sizes()).chain(self.trunk.sizes()).chain(self.mask.sizes()))?;
        let n_masks = self.mask.head.n_masks;
        if n_masks == 1 || n_masks == self.n_classes {
            return Ok(());
        }
        Err(Error::Input { what: "mask head.n_masks", expected: format!("1 or {}", self.n_classes), found: n_masks.to_string() })
    }
}

/// A Mask R-CNN.
#[derive(Debug)]
pub struct MaskRcnn {
    /// The first stage.
    pub regions: RegionNetwork,
    /// Classes and boxes.
    pub bbox_head: ClosedHead,
    /// Masks.
    pub mask_head: MaskHead,
    parameters: BTreeMap<String, Tensor>,
    config: MaskRcnnConfig,
}

impl MaskRcnn {
    /// Declares a Mask R-CNN under `path`, in f32, with first values that depend on `seed` and the parameters' names alone.
    pub fn new(path: &nn::Path<'_>, config: &MaskRcnnConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, Fill::Seed(seed), &declared);
        let channels = config.regions.neck.channels;
        let heads = &(root / "roi_head");
        let input = [channels, config.pool.side, config.pool.side];
        let network = Self {
            regions: RegionNetwork::declare(root, &config.regions),
            bbox_head: ClosedHead::declare(&(heads / "bbox_head"), &config.trunk, input, config.n_classes),
            mask_head: MaskHead::declare(&(heads / "mask_head"), &config.mask.head, channels),
            parameters: BTreeMap::new(),
            config: config.clone(),
        };
        Ok(Self { parameters: declared.into_inner(), ..network })
    }

    /// Every parameter and running statistic by mmdet's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Detects objects in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients; `sizes`: of each, without padding.
    pub fn detect(&self, images: &Tensor, sizes: &[ImageSize]) -> Result<Vec<Detections>> {
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let proposals = self.regions.rpn.proposals(&pyramid.predictions, sizes, &self.config.proposals)?;
            let boxes: Vec<Tensor> = proposals.into_iter().map(|proposals| proposals.boxes).collect();
            let (logits, deltas) = self.bbox_head.forward(&pyramid.pool(&self.config.pool, &boxes)?, Phase::Test)?;
            let scores = logits.softmax(-1, Kind::Float).narrow(1, 0, self.config.n_classes);
            let kept = detect_regions(&self.config.detections, &self.config.regions_rule.coder, &boxes, &deltas, &scores, sizes)?;
            with_masks(kept, &pyramid, Some((&self.mask_head, &self.config.mask.pool)))
        })
    }

    /// Computes the losses against the objects of each image; `rng` samples anchors and regions.
    ///
    /// `images`: f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32; `sizes`: of each, without padding.
    pub fn losses(&self, images: &Tensor, sizes: &[ImageSize], objects: &[Objects], rng: &mut ChaCha8Rng) -> Result<MaskRcnnLosses> {
        for Objects { boxes, masks, .. } in objects {
            ensure(boxes.size() == [masks.len() as i64, 4], "objects", &format!("[{}, 4], a box for each mask", masks.len()), boxes)?;
        }
        let pyramid = self.regions.forward(images, Phase::Train)?;
        let truths: Vec<Truth> = objects.iter().map(|objects| objects.boxes.shallow_clone().into()).collect();
        let proposal_losses = self.regions.rpn.losses(&pyramid.predictions, sizes, &truths, rng)?;

        let proposals = self.regions.rpn.proposals(&pyramid.predictions, sizes, &self.config.training_proposals)?;
        let choose = |((found, truth), objects): ((&rpn::Proposals, &Truth), &Objects)| {
            self.config.regions_rule.choose(&found.boxes, truth, &objects.labels, self.config.n_classes, rng)
        };
        let samples = proposals.iter().zip(&truths).zip(objects).map(choose).collect::<Result<Vec<_>>>()?;
        let regions: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let (logits, deltas) = self.bbox_head.forward(&pyramid.pool(&self.config.pool, &regions)?, Phase::Train)?;
        let region_losses = region_losses(self.config.box_loss, &logits, &deltas, &samples)?;

        let (mut on_objects, mut classes, mut targets) = (vec![], vec![], vec![]);
        for (sample, objects) in samples.iter().zip(objects) {
            let n = sample.objects.len() as i64;
            let boxes = sample.boxes.narrow(0, 0, n);
            classes.extend(integers(&sample.labels.narrow(0, 0, n)));
            targets.push(self.config.mask_rule.targets(&objects.masks, &boxes, &sample.objects, 2 * self.config.mask.pool.side)?);
            on_objects.push(boxes);
        }
        let drawn = self.mask_head.forward(&pyramid.pool(&self.config.mask.pool, &on_objects)?, &classes)?;
        Ok(MaskRcnnLosses { proposals: proposal_losses, regions: region_losses, masks: mask_loss(&drawn, &Tensor::cat(&targets, 0))? })
    }
}

/// The objects of a training image of a [`MaskRcnn`].
#[derive(Debug)]
pub struct Objects {
    /// `[G, 4]`, px.
    pub boxes: Tensor,
    /// i64 `[G]`, from 0 to K - 1.
    pub labels: Tensor,
    /// The mask of each.
    pub masks: Vec<ObjectMask>,
}

/// The losses of a [`MaskRcnn`].
#[derive(Debug)]
pub struct MaskRcnnLosses {
    /// The losses of the proposal network.
    pub proposals: rpn::Losses,
    /// The losses of the box head.
    pub regions: RegionLosses,
    /// The loss of the mask head, f32 scalar: cross entropy.
    pub masks: Tensor,
}

impl MaskRcnnLosses {
    /// Their sum.
    pub fn total(&self) -> Tensor {
        &self.proposals.objectness + &self.proposals.boxes + &self.regions.classes + &self.regions.boxes + &self.masks
    }
}
