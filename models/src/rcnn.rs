//! Two-stage detectors: a backbone, a feature pyramid, region proposals, and heads that look at regions.
//!
//! [`Detector`] has an open vocabulary (ViLD, OADP), [`CosineDetector`](cosine::CosineDetector) one without background (PromptDet),
//! [`SigmoidDetector`](sigmoid::SigmoidDetector) a row for each class (LP-OVOD),
//! [`MaskRcnn`](mask_rcnn::MaskRcnn) classes of its own, [`Oln`](oln::Oln) none. They are declared under mmdet's parameter names; [`layout`] translates torchvision's. Images are normalised, padded with zeros on the right and
//! at the bottom. Decoding and normalising images, and the training loop, are elsewhere.
//!
//! Differences from mmdet and OADP: batch normalisation uses the statistics of one device (the reference synchronises several); the scores
//! of two heads are combined as probabilities, not as logits ([`classifier::SumAboveOne`]); losses of proposals are divided by the number of
//! sampled anchors ([`rpn`]). Every normalisation starts with weight 1, where mmdet starts the last one of a residual block at 0, which only
//! matters without pretraining.
//!
//! Parameters are f32. With images in bf16 or f16, everything up to a head's last layer is computed in that kind; batch statistics, logits,
//! deltas, embeddings, losses, box arithmetic and gradients of parameters are always f32.
//!
//! No part stores whether it trains or predicts: [`Phase`] is an argument. Random choices use the generator that is passed in.

pub mod classifier;
pub mod cosine;
pub mod distillation;
pub mod heads;
pub mod layout;
pub mod mask_head;
pub mod mask_rcnn;
pub mod oln;
pub mod regions;
pub mod rpn;
pub mod sigmoid;

#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use self::{
    classifier::{Background, Ensemble, Vocabulary},
    heads::{Boxes, DetectionRule, GlobalHead, OpenHead, OpenHeadConfig, TrunkConfig, detect_regions},
    mask_head::{MaskConfig, MaskHead, MaskHeadConfig, with_masks},
    regions::{POOL, REGION_CODER, RegionNetwork, Regions, RegionsConfig},
    rpn::{ProposalRule, Proposals},
};
use crate::{
    Error, Phase, Result,
    detection::{
        Detections,
        boxes::{ImageSize, Suppression, clip_to_image},
        roi_align::RoiAlign,
    },
    error::{check_count, check_sizes},
    parameters::{Fill, Parameters},
    raf,
};

/// An open-vocabulary detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The first stage.
    pub regions: RegionsConfig,
    /// How regions are pooled for all heads but the mask head.
    pub pool: RoiAlign,
    /// The dimension D of the space that classes lie in.
    pub embed_dim: i64,
    /// The head that detects: classes, background and boxes (ViLD-text).
    pub bbox_head: OpenHeadConfig,
    /// The head that is trained on an image tower's embeddings of objects (ViLD-image).
    pub object_head: Option<OpenHeadConfig>,
    /// The head that is trained on embeddings of blocks (OADP).
    pub block_head: Option<OpenHeadConfig>,
    /// Whether there is a head that is trained on embeddings of whole images (OADP).
    pub has_global_head: bool,
    /// The mask head, and how its regions are pooled.
    pub mask_head: Option<MaskConfig>,
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

    /// OADP for a toy world, small enough to train in minutes on two cores.
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

/// An open-vocabulary detector.
#[derive(Debug)]
pub struct Detector {
    /// The first stage.
    pub regions: RegionNetwork,
    /// The head that detects.
    pub bbox_head: OpenHead,
    /// The head that is trained on embeddings of objects.
    pub object_head: Option<OpenHead>,
    /// The head that is trained on embeddings of blocks.
    pub block_head: Option<OpenHead>,
    /// The head that is trained on embeddings of whole images.
    pub global_head: Option<GlobalHead>,
    /// The mask head.
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

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter and running statistic by mmdet's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Detects objects in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients.
    ///
    /// `sizes`: of each, without padding. Scores are those of the box head; if `vocabularies` has classes for the object head, both heads'
    /// scores are combined; if there are augmented embeddings, these correct them.
    pub fn detect(
        &self,
        images: &Tensor,
        sizes: &[ImageSize],
        vocabularies: &Vocabularies<'_>,
        given: Option<Given>,
        rule: &TestRule,
    ) -> Result<Vec<Detections>> {
        let (given, augmented) = given.map_or((None, None), |given| (Some(given.proposals), given.augmented));
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let Regions { boxes, objectness } = self.regions.regions(&pyramid, sizes, given, &rule.proposals)?;
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
            let (scores, threshold) = match &augmented {
                None => (scores, rule.detections.threshold),
                Some(embeddings) => {
                    let products = self.bbox_head.classifier.products(embeddings, vocabularies.bbox)?;
                    let before = match rule.raf.fusion {
                        raf::Fusion::Sum => logits,
                        raf::Fusion::Gate | raf::Fusion::Softmax => with_background(&scores),
                    };
                    let after = rule.raf.fuse(&before, &products)?.narrow(1, 0, n_classes);
                    (after, rule.raf.threshold(rule.detections.threshold))
                }
            };
            let deltas = regions.deltas.expect("BUG: Config::check requires boxes of the box head");
            let detections = DetectionRule { threshold, ..rule.detections };
            let kept = detect_regions(&detections, &REGION_CODER, &boxes, &deltas, &scores, sizes)?;
            let mask_head = self.mask_head.as_ref().zip(self.config.mask_head.as_ref());
            with_masks(kept, &pyramid, mask_head.map(|(head, config)| (head, &config.pool)))
        })
    }

    /// The box head's embeddings of boxes in images as in [`Self::detect`], clipped to these: f32 `[N, D]` of unit length, image after image, without
    /// gradients.
    ///
    /// `boxes`: for each image `[N_b, 4]`, px.
    pub fn embed(&self, images: &Tensor, sizes: &[ImageSize], boxes: &[Tensor]) -> Result<Tensor> {
        check_count("images with boxes", sizes.len() as i64, boxes.len())?;
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let clipped: Vec<Tensor> = boxes.iter().zip(sizes).map(|(boxes, size)| clip_to_image(boxes, *size)).collect();
            Ok(self.bbox_head.forward(&pyramid.pool(&self.config.pool, &clipped)?, Phase::Test)?.embeddings)
        })
    }
}

/// Scores `[N, K]` with a last column for background, what they lack of 1.
fn with_background(scores: &Tensor) -> Tensor {
    let rest: Tensor = 1.0 - scores.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
    Tensor::cat(&[scores.shallow_clone(), rest.clamp_min(0.0)], 1)
}

/// Proposals to look at instead of a [`Detector`]'s own.
#[derive(Debug)]
pub struct Given {
    /// For each image, in px of what the network gets.
    pub proposals: Vec<Proposals>,
    /// Their augmented embeddings, f32 `[N, D]` of unit length, image after image, to correct scores by [`TestRule::raf`].
    pub augmented: Option<Tensor>,
}

/// The classes of the heads of a [`Detector`]; all heads have the same ones in the same order.
#[derive(Clone, Copy, Debug)]
pub struct Vocabularies<'a> {
    /// For the box head.
    pub bbox: &'a Vocabulary,
    /// For the object head; `None` does not use that head.
    pub object: Option<&'a Vocabulary>,
}

/// The test settings of a [`Detector`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRule {
    /// The choice of proposals.
    pub proposals: ProposalRule,
    /// How the scores of two heads are combined.
    pub ensemble: Ensemble,
    /// How augmented embeddings correct scores, where there are some.
    pub raf: raf::Rule,
    /// The choice of detections.
    pub detections: DetectionRule,
}

impl Default for TestRule {
    /// OADP's.
    fn default() -> Self {
        Self {
            proposals: ProposalRule { per_level: 1000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 },
            ensemble: Ensemble::default(),
            raf: raf::Rule::default(),
            detections: DetectionRule { threshold: 0.0, suppression: Suppression { iou: 0.5, keep: 300 } },
        }
    }
}
