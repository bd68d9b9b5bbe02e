//! Two-stage detectors: a backbone, a feature pyramid, region proposals, and heads that look at regions.
//!
//! [`Detector`] has an open vocabulary (ViLD, OADP), [`MaskRcnn`] classes of its own. Both are declared under mmdet's parameter names;
//! [`layout`] translates torchvision's. Images arrive normalised, right and below padded with zeros. Boxes are xyxy, half-open, f32, in
//! px of the image as the network sees it. How an image becomes a tensor, and in which order losses are taken, is not known here.
//!
//! What differs from mmdet and OADP: batch normalisation sees one device (the reference synchronises several); joined scores are products, not
//! logits made of them ([`classifier::Overfull`]); losses of proposals are divided by what was sampled ([`rpn`]). Residual blocks begin with
//! all weights of normalisation at 1, where mmdet begins the last of a block at 0, which only matters without pretraining.
//!
//! Parameters are f32. Images in bf16 or f16 make everything up to a head's last layer be computed in that kind; batch statistics, logits,
//! deltas, embeddings, losses and box arithmetic are f32 in any case, and so are gradients of parameters.
//!
//! No part remembers whether it learns or detects: [`Phase`] is an argument. Random choices come from the generator that is passed in.

pub mod anchors;
pub mod boxes;
pub mod classifier;
pub mod distillation;
pub mod fpn;
pub mod heads;
mod layers;
pub mod layout;
pub mod matching;
pub mod oln;
pub mod resnet;
pub mod roi_align;
pub mod rpn;

#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeMap};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use self::{
    anchors::{Anchors, Grid},
    boxes::{BoxCoder, BoxLoss, ImageSize, Kept, Suppression, integers},
    classifier::{Background, Ensemble, Vocabulary},
    fpn::{FINEST_STRIDE, Fpn, N_LEVELS},
    heads::{
        Boxes, ClosedHead, DetectionRule, GlobalHead, MaskHead, MaskHeadConfig, MaskRule, ObjectMask, OpenHead, OpenHeadConfig,
        RegionLosses, RegionRule, TrunkConfig, mask_loss, region_losses,
    },
    matching::{Assigner, Sampler, Truth},
    resnet::{Depth, ResNet, StridePlace},
    roi_align::{Alignment, Level, RoiAlign, Sampling},
    rpn::{ProposalRule, Rpn},
};
use crate::{
    Error, Phase, Result, Statistics,
    layers::BATCH_NORM_EPS,
    parameters::{Fill, Parameters},
};

/// What finds regions, without heads.
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

/// An open-vocabulary detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What finds regions.
    pub regions: RegionsConfig,
    /// How regions are pooled for all heads but the mask head.
    pub pool: RoiAlign,
    /// The dimension D of the space that classes lie in.
    pub embed_dim: i64,
    /// The head that detects: classes, background and boxes (ViLD-text).
    pub bbox_head: OpenHeadConfig,
    /// The head that learns from an image tower's embeddings of objects (ViLD-image).
    pub object_head: Option<OpenHeadConfig>,
    /// The head that learns from embeddings of blocks (OADP).
    pub block_head: Option<OpenHeadConfig>,
    /// Whether there is a head that learns from embeddings of whole images (OADP).
    pub has_global_head: bool,
    /// The head that draws masks, and how its regions are pooled.
    pub mask_head: Option<MaskConfig>,
}

/// A mask head, and how its regions are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskConfig {
    /// How its regions are pooled.
    pub pool: RoiAlign,
    /// The head.
    pub head: MaskHeadConfig,
}

/// A Mask R-CNN with K classes of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRcnnConfig {
    /// What finds regions.
    pub regions: RegionsConfig,
    /// How many proposals are made.
    pub proposals: ProposalRule,
    /// How regions are pooled for the box head.
    pub pool: RoiAlign,
    /// The number K of classes, background not counted.
    pub n_classes: i64,
    /// What lies before the classifier.
    pub trunk: TrunkConfig,
    /// Which detections are made.
    pub detections: DetectionRule,
    /// The mask head.
    pub mask: MaskConfig,
    /// How many proposals are made in training.
    pub training_proposals: ProposalRule,
    /// Which regions are learned from; in detection too, how boxes differ from regions.
    pub regions_rule: RegionRule,
    /// How far deltas are off.
    pub box_loss: BoxLoss,
    /// What the mask head is to draw.
    pub mask_rule: MaskRule,
}

/// The coder of all heads that look at regions (Faster R-CNN).
pub const REGION_CODER: BoxCoder = BoxCoder { stds: [0.1, 0.1, 0.2, 0.2] };
/// The pooling of mmdet's heads, for boxes of 7 cells.
pub const POOL: RoiAlign = RoiAlign { side: 7, sampling: Sampling::Adaptive, alignment: Alignment::Centre, finest_scale: 56.0 };

impl RegionsConfig {
    /// OADP's: a ResNet-50 of caffe style, of which the last three stages learn, and a pyramid of 256 channels with batch normalisation.
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
                sampler: Sampler { n: 256, object_fraction: 0.5 },
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

    /// For images of 128 to 256 px of a toy world, from scratch: a ResNet-18 of a quarter of the width that learns everything, 64 channels.
    pub fn toy() -> Self {
        let oadp = Self::oadp();
        let backbone = resnet::Config { depth: Depth::R18, width: 16, trainable_parts: 5, statistics: Statistics::Batch, ..oadp.backbone };
        Self {
            backbone,
            neck: fpn::Config { channels: 64, norm: fpn::Norm::Batch },
            rpn: rpn::Config { anchors: Anchors { scale: 4.0, ..oadp.rpn.anchors }, ..oadp.rpn },
        }
    }
}

impl Config {
    /// OADP for COCO, with embeddings of `embed_dim` dimensions: all heads but masks.
    pub fn oadp(embed_dim: i64) -> Self {
        let trunk = TrunkConfig { n_convs: 4, n_fcs: 1, width: 1024 };
        let bbox_head = OpenHeadConfig { trunk, background: Background::Learned, boxes: Boxes::Agnostic };
        let object_head = OpenHeadConfig { trunk, background: Background::Masked, boxes: Boxes::None };
        let block_trunk = TrunkConfig { n_convs: 0, n_fcs: 2, width: 1024 };
        let block_head = OpenHeadConfig { trunk: block_trunk, background: Background::Dropped, boxes: Boxes::None };
        Self {
            regions: RegionsConfig::oadp(),
            pool: POOL,
            embed_dim,
            bbox_head,
            object_head: Some(object_head),
            block_head: Some(block_head),
            has_global_head: true,
            mask_head: None,
        }
    }

    /// The same with a class-agnostic mask head, as OADP's for LVIS: as many convolutions as the box head, of the pyramid's channels.
    pub fn with_masks(self) -> Self {
        let head = MaskHeadConfig { n_convs: self.bbox_head.trunk.n_convs, channels: self.regions.neck.channels, n_masks: 1 };
        Self { mask_head: Some(MaskConfig { pool: RoiAlign { side: 14, ..self.pool }, head }), ..self }
    }

    /// OADP for a toy world, small enough to learn in minutes on two cores.
    pub fn toy(embed_dim: i64) -> Self {
        let slim = |head: OpenHeadConfig| OpenHeadConfig {
            trunk: TrunkConfig { n_convs: head.trunk.n_convs.min(1), width: 256, ..head.trunk },
            ..head
        };
        let oadp = Self::oadp(embed_dim);
        Self {
            regions: RegionsConfig::toy(),
            pool: RoiAlign { finest_scale: 28.0, ..POOL },
            bbox_head: slim(oadp.bbox_head),
            object_head: oadp.object_head.map(slim),
            block_head: oadp.block_head.map(slim),
            ..oadp
        }
    }
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
                sampler: Sampler { n: 512, object_fraction: 0.25 },
                coder: REGION_CODER,
            },
            box_loss: BoxLoss::Smooth { beta: 1.0 / 9.0 },
            mask_rule: MaskRule::TORCHVISION,
        }
    }
}

/// What finds regions: backbone, pyramid, proposals.
#[derive(Debug)]
pub struct RegionNetwork {
    /// The backbone.
    pub backbone: ResNet,
    /// The pyramid.
    pub neck: Fpn,
    /// The proposals.
    pub rpn: Rpn,
}

/// What a [`RegionNetwork`] sees in a batch of images.
#[derive(Debug)]
pub struct Pyramid {
    /// P2 to P6, `[B, C, h, w]` of strides 4 to 64.
    pub levels: [Tensor; N_LEVELS],
    /// What the proposal network says of each anchor.
    pub predictions: rpn::Predictions,
}

impl RegionNetwork {
    fn declare(at: &Parameters<'_>, config: &RegionsConfig) -> Self {
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
}

impl Pyramid {
    /// Pools boxes from P2 to P5: `[N, C, side, side]`, image after image; `boxes`: for each image `[N_b, 4]`, px.
    pub fn pool(&self, rule: &RoiAlign, boxes: &[Tensor]) -> Result<Tensor> {
        pool(&self.levels, rule, boxes)
    }
}

fn pool(levels: &[Tensor; N_LEVELS], rule: &RoiAlign, boxes: &[Tensor]) -> Result<Tensor> {
    let levels = levels[..N_LEVELS - 1].iter().enumerate();
    let levels: Vec<Level<'_>> = levels.map(|(place, features)| Level { features, stride: FINEST_STRIDE << place }).collect();
    rule.forward(&levels, boxes)
}

/// An open-vocabulary detector.
#[derive(Debug)]
pub struct Detector {
    /// What finds regions.
    pub regions: RegionNetwork,
    /// The head that detects.
    pub bbox_head: OpenHead,
    /// The head that learns from embeddings of objects.
    pub object_head: Option<OpenHead>,
    /// The head that learns from embeddings of blocks.
    pub block_head: Option<OpenHead>,
    /// The head that learns from embeddings of whole images.
    pub global_head: Option<GlobalHead>,
    /// The head that draws masks.
    pub mask_head: Option<MaskHead>,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

impl Detector {
    /// Declares a detector under `path`, in f32, with first values that depend on `seed` and the parameters' names alone.
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        Self::declare(path, config, Fill::Seed(seed))
    }

    /// Declares a detector of zeros, which a checkpoint is about to overwrite.
    pub fn blank(path: &nn::Path<'_>, config: &Config) -> Result<Self> {
        Self::declare(path, config, Fill::Blank)
    }

    fn declare(path: &nn::Path<'_>, config: &Config, fill: Fill) -> Result<Self> {
        config.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let channels = config.regions.neck.channels;
        let heads = &(root / "roi_head");
        let head = |name: &str, head: &OpenHeadConfig| {
            OpenHead::declare(&(heads / name), head, [channels, config.pool.side, config.pool.side], config.embed_dim)
        };
        let detector = Self {
            regions: RegionNetwork::declare(root, &config.regions),
            bbox_head: head("bbox_head", &config.bbox_head),
            object_head: config.object_head.as_ref().map(|config| head("_object_head", config)),
            block_head: config.block_head.as_ref().map(|config| head("_block_head", config)),
            global_head: config.has_global_head.then(|| GlobalHead::declare(&(root / "_global_head"), channels, config.embed_dim)),
            mask_head: config.mask_head.as_ref().map(|mask| MaskHead::declare(&(heads / "mask_head"), &mask.head, channels)),
            parameters: BTreeMap::new(),
            config: config.clone(),
        };
        Ok(Self { parameters: declared.into_inner(), ..detector })
    }

    /// What it is made of.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter and running statistic by mmdet's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Detects objects in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients; `sizes`: of each, without padding.
    ///
    /// Scores are those of the box head; where `vocabularies` has classes for the object head, they are joined with that head's.
    pub fn detect(
        &self,
        images: &Tensor,
        sizes: &[ImageSize],
        vocabularies: &Vocabularies<'_>,
        rule: &TestRule,
    ) -> Result<Vec<Detections>> {
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let proposals = self.regions.rpn.proposals(&pyramid.predictions, sizes, &rule.proposals)?;
            let objectness = Tensor::cat(&proposals.iter().map(|proposals| &proposals.scores).collect::<Vec<_>>(), 0);
            let boxes: Vec<Tensor> = proposals.into_iter().map(|proposals| proposals.boxes).collect();
            let pooled = pyramid.pool(&self.config.pool, &boxes)?;
            let regions = self.bbox_head.forward(&pooled, Phase::Test)?;
            let logits = self.bbox_head.classifier.logits(&regions.embeddings, vocabularies.bbox, Phase::Test)?;
            let n_classes = vocabularies.bbox.n_classes();
            let scores = match (vocabularies.object, &self.object_head) {
                (None, _) => logits.softmax(-1, Kind::Float).narrow(1, 0, n_classes),
                (Some(vocabulary), Some(head)) => {
                    let embeddings = head.forward(&pooled, Phase::Test)?.embeddings;
                    let object_logits = head.classifier.logits(&embeddings, vocabulary, Phase::Test)?;
                    rule.ensemble.scores(&logits, &object_logits, &objectness, vocabularies.bbox.n_base())?
                }
                (Some(_), None) => {
                    let expected = "none: the detector has no object head".into();
                    return Err(Error::Input { what: "classes of the object head", expected, found: "a vocabulary".into() });
                }
            };
            let deltas = regions.deltas.expect("BUG: Config::check requires boxes of the box head");
            let kept = detect_regions(&rule.detections, &REGION_CODER, &boxes, &deltas, &scores, sizes)?;
            let mask_head = self.mask_head.as_ref().zip(self.config.mask_head.as_ref());
            with_masks(kept, &pyramid, mask_head.map(|(head, config)| (head, &config.pool)))
        })
    }
}

/// The classes that the heads of a [`Detector`] tell apart, the same ones in the same order.
#[derive(Clone, Copy, Debug)]
pub struct Vocabularies<'a> {
    /// For the box head.
    pub bbox: &'a Vocabulary,
    /// For the object head; none leaves it out.
    pub object: Option<&'a Vocabulary>,
}

/// How a [`Detector`] detects.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRule {
    /// How many proposals are made.
    pub proposals: ProposalRule,
    /// How the scores of two heads are joined.
    pub ensemble: Ensemble,
    /// Which detections are made.
    pub detections: DetectionRule,
}

impl Default for TestRule {
    /// OADP's.
    fn default() -> Self {
        Self {
            proposals: ProposalRule { per_level: 1000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 },
            ensemble: Ensemble::default(),
            detections: DetectionRule { threshold: 0.0, suppression: Suppression { iou: 0.5, keep: 300 } },
        }
    }
}

/// A Mask R-CNN.
#[derive(Debug)]
pub struct MaskRcnn {
    /// What finds regions.
    pub regions: RegionNetwork,
    /// Classes and boxes.
    pub bbox_head: ClosedHead,
    /// Masks.
    pub mask_head: MaskHead,
    parameters: BTreeMap<String, Tensor>,
    config: MaskRcnnConfig,
}

/// What is detected in an image.
#[derive(Debug)]
pub struct Detections {
    /// Boxes, classes and scores, best first.
    pub kept: Kept,
    /// Logits of the masks, f32 `[M, 28, 28]`, each as wide and high as its box; none without a mask head.
    pub masks: Option<Tensor>,
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

    /// Compares what the network says of images with the objects on them; `rng` chooses the anchors and regions that are learned from.
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

/// The objects of an image, for a [`MaskRcnn`] to learn.
#[derive(Debug)]
pub struct Objects {
    /// `[G, 4]`, px.
    pub boxes: Tensor,
    /// i64 `[G]`, from 0 to K - 1.
    pub labels: Tensor,
    /// The mask of each.
    pub masks: Vec<ObjectMask>,
}

/// What a [`MaskRcnn`] learns from.
#[derive(Debug)]
pub struct MaskRcnnLosses {
    /// Of the proposal network.
    pub proposals: rpn::Losses,
    /// Of the box head.
    pub regions: RegionLosses,
    /// Of the mask head, f32 scalar: cross entropy.
    pub masks: Tensor,
}

impl MaskRcnnLosses {
    /// Their sum.
    pub fn total(&self) -> Tensor {
        &self.proposals.objectness + &self.proposals.boxes + &self.regions.classes + &self.regions.boxes + &self.masks
    }
}

/// Makes detections of the regions of each image; `deltas` and `scores` are of the regions of all images, in their order.
fn detect_regions(
    rule: &DetectionRule,
    coder: &BoxCoder,
    regions: &[Tensor],
    deltas: &Tensor,
    scores: &Tensor,
    sizes: &[ImageSize],
) -> Result<Vec<Kept>> {
    let mut first = 0;
    let detect = |(regions, &size): (&Tensor, &ImageSize)| {
        let n = regions.size()[0];
        let [deltas, scores] = [deltas, scores].map(|all| all.narrow(0, first, n));
        first += n;
        rule.detect(coder, regions, &deltas, &scores, size)
    };
    regions.iter().zip(sizes).map(detect).collect()
}

/// Draws the mask of every detection, where there is a head for it.
fn with_masks(kept: Vec<Kept>, pyramid: &Pyramid, head: Option<(&MaskHead, &RoiAlign)>) -> Result<Vec<Detections>> {
    let Some((head, pool)) = head else { return Ok(kept.into_iter().map(|kept| Detections { kept, masks: None }).collect()) };
    let pooled = pyramid.pool(pool, &kept.iter().map(|kept| kept.boxes.shallow_clone()).collect::<Vec<_>>())?;
    let classes: Vec<i64> = kept.iter().flat_map(|kept| &kept.classes).copied().collect();
    let counts: Vec<i64> = kept.iter().map(|kept| kept.rows.len() as i64).collect();
    let masks = head.forward(&pooled, &classes)?.split_with_sizes(counts, 0);
    Ok(kept.into_iter().zip(masks).map(|(kept, masks)| Detections { kept, masks: Some(masks) }).collect())
}

impl RegionsConfig {
    fn sizes(&self) -> [(&'static str, i64); 3] {
        [
            ("backbone.width", self.backbone.width),
            ("neck.channels", self.neck.channels),
            ("rpn.anchors.ratios", self.rpn.anchors.ratios.len() as i64),
        ]
    }
}

impl TrunkConfig {
    fn sizes(&self) -> [(&'static str, i64); 2] {
        [("trunk.n_fcs", self.n_fcs as i64), ("trunk.width", self.width)]
    }
}

impl MaskConfig {
    fn sizes(&self) -> [(&'static str, i64); 3] {
        [("mask pool.side", self.pool.side), ("mask head.channels", self.head.channels), ("mask head.n_masks", self.head.n_masks)]
    }
}

impl Config {
    /// Checks that all sizes are positive.
    pub fn check(&self) -> Result<()> {
        let heads = [Some(&self.bbox_head), self.object_head.as_ref(), self.block_head.as_ref()];
        let heads = heads.into_iter().flatten().flat_map(|head| head.trunk.sizes());
        let masks = self.mask_head.iter().flat_map(MaskConfig::sizes);
        let sizes = [("embed_dim", self.embed_dim), ("pool.side", self.pool.side)];
        check_sizes(sizes.into_iter().chain(self.regions.sizes()).chain(heads).chain(masks))?;
        match self.bbox_head.boxes {
            Boxes::Agnostic => Ok(()),
            Boxes::None => {
                Err(Error::Input { what: "bbox_head.boxes", expected: "agnostic: it is what detects".into(), found: "none".into() })
            }
        }
    }
}

impl MaskRcnnConfig {
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

fn check_sizes(sizes: impl IntoIterator<Item = (&'static str, i64)>) -> Result<()> {
    match sizes.into_iter().find(|&(_, size)| size < 1) {
        Some((what, found)) => Err(Error::Input { what, expected: "at least 1".into(), found: found.to_string() }),
        None => Ok(()),
    }
}

/// Refuses a list that has not an entry for each image.
fn check_count(what: &'static str, expected: i64, found: usize) -> Result<()> {
    if found as i64 == expected {
        return Ok(());
    }
    Err(Error::Input { what, expected: format!("{expected}, one for each image"), found: found.to_string() })
}

/// Refuses a tensor that is not as a function needs it.
fn ensure(is_fine: bool, what: &'static str, expected: &str, found: &Tensor) -> Result<()> {
    if is_fine {
        return Ok(());
    }
    Err(Error::Input { what, expected: expected.to_owned(), found: format!("{:?} {:?}", found.kind(), found.size()) })
}
