//! The detector of PromptDet: a two-stage detector whose class scores are sigmoids of scaled cosines to class embeddings.
//!
//! The logit of a class is `scale (f . L2(E)) + bias`: `f` is the embedding of a region, of unit length; `scale` and `bias` are learned numbers; there is
//! no background. So base and novel classes do not compete, and images of the web with one label each can teach the novel ones: of such an image only
//! regions that match the network's own choice of a box count. Parameters have the reference's names. (PromptDet, sections 9.2 to 9.4.)
//!
//! Differences from the reference: fewer than 20 proposals, or none, end nothing (its defect 12).

use std::{cell::RefCell, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor, nn};

use super::{
    heads::{DetectionRule, RegionLosses, RegionSample, Trunk, TrunkConfig, box_regressor, detect_regions, labels_of, region_box_loss},
    mask_head::{MaskConfig, MaskHead, MaskHeadConfig, with_masks},
    regions::{POOL, Pyramid, REGION_CODER, RegionNetwork, Regions, RegionsConfig},
    rpn::{ProposalRule, Proposals},
};
use crate::{
    Phase, Result,
    detection::{
        Detections,
        boxes::{BoxLoss, Corners, ImageSize, corners, floats},
        fpn,
        layers::sum_over,
        resnet::{self, StridePlace},
        roi_align::RoiAlign,
    },
    error::{check_count, check_sizes, ensure},
    layers::{Linear, to_unit_length},
    parameters::{Fill, Init, Parameters},
};

/// The first bias: a probability of 0.01.
const FIRST_BIAS: f64 = -4.595_119_850_134_59;
/// Of so many proposals of an image of the web, those with the highest objectness, one is chosen.
pub const CHOSEN_AMONG: i64 = 20;

/// The size of a detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The first stage.
    pub regions: RegionsConfig,
    /// How regions are pooled for the box head.
    pub pool: RoiAlign,
    /// The layers of the box head.
    pub trunk: TrunkConfig,
    /// The dimension D of class embeddings.
    pub embed_dim: i64,
    /// The mask head, if there is one.
    pub mask_head: Option<MaskConfig>,
}

impl Config {
    /// PromptDet's: a ResNet-50 of pytorch style, whose last three stages are trained with scales and shifts, a pyramid of 256 channels with biases, mmdet's
    /// proposals, and two fully connected layers of 1,024. (Section 9.2.)
    pub fn r50(embed_dim: i64) -> Self {
        let mmdet = RegionsConfig::oadp();
        let regions = RegionsConfig {
            backbone: resnet::Config { stride: StridePlace::Middle, ..mmdet.backbone },
            neck: fpn::Config { norm: fpn::Norm::Bias, ..mmdet.neck },
            ..mmdet
        };
        let trunk = TrunkConfig { n_convs: 0, n_fcs: 2, width: 1024 };
        Self { regions, pool: POOL, trunk, embed_dim, mask_head: None }
    }

    /// For a toy world, small enough to train in minutes on two cores.
    pub fn toy(embed_dim: i64) -> Self {
        let trunk = TrunkConfig { n_convs: 0, n_fcs: 2, width: 256 };
        Self { regions: RegionsConfig::toy(), pool: RoiAlign { finest_scale: 28.0, ..POOL }, trunk, embed_dim, mask_head: None }
    }

    /// The same with a mask head of four convolutions and one mask for all classes.
    pub fn with_masks(self) -> Self {
        let head = MaskHeadConfig { n_convs: 4, channels: self.regions.neck.channels, n_masks: 1 };
        Self { mask_head: Some(MaskConfig { pool: RoiAlign { side: 14, ..self.pool }, head }), ..self }
    }

    /// Checks that all sizes are positive.
    pub fn check(&self) -> Result<()> {
        let masks = self.mask_head.iter().flat_map(MaskConfig::sizes);
        let sizes = [("embed_dim", self.embed_dim), ("pool.side", self.pool.side)];
        check_sizes(sizes.into_iter().chain(self.regions.sizes()).chain(self.trunk.sizes()).chain(masks))
    }
}

/// The head that detects.
#[derive(Debug)]
pub struct CosineHead {
    trunk: Trunk,
    fc_cls: Linear,
    fc_reg: Linear,
    /// `[1]`.
    scale: Tensor,
    /// `[1]`.
    bias: Tensor,
}

/// What the head says of regions.
#[derive(Debug)]
pub struct Said {
    /// f32 `[N, K]`.
    pub logits: Tensor,
    /// f32 `[N, 4]`.
    pub deltas: Tensor,
}

impl CosineHead {
    fn declare(at: &Parameters<'_>, trunk: &TrunkConfig, input: [i64; 3], embed_dim: i64) -> Self {
        Self {
            trunk: Trunk::declare(at, trunk, input),
            fc_cls: Linear::declare(&(at / "fc_cls"), trunk.width, embed_dim, Init::Normal(0.01), Init::Constant(0.0)),
            fc_reg: box_regressor(at, trunk.width, 4),
            scale: at.trainable("scale", &[1], Init::Constant(1.0)),
            bias: at.trainable("bias", &[1], Init::Constant(FIRST_BIAS)),
        }
    }

    /// Looks at regions; `pooled`: `[N, C, side, side]`; `classes`: embeddings f32 `[K, D]`, of any lengths, on the device.
    pub fn forward(&self, pooled: &Tensor, classes: &Tensor, phase: Phase) -> Result<Said> {
        let hidden = self.trunk.forward(pooled, phase)?;
        let embeddings = to_unit_length(&self.fc_cls.forward(&hidden).to_kind(Kind::Float));
        let d = embeddings.size()[1];
        ensure(matches!(classes.size()[..], [k, found] if k > 0 && found == d), "class embeddings", &format!("[K, {d}]"), classes)?;
        let logits = embeddings.matmul(&to_unit_length(classes).tr()) * &self.scale + &self.bias;
        Ok(Said { logits, deltas: self.fc_reg.forward(&hidden).to_kind(Kind::Float) })
    }
}

/// The detector.
#[derive(Debug)]
pub struct CosineDetector {
    /// The first stage.
    pub regions: RegionNetwork,
    /// The head that detects.
    pub bbox_head: CosineHead,
    /// The mask head.
    pub mask_head: Option<MaskHead>,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

impl CosineDetector {
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
        let (channels, heads) = (config.regions.neck.channels, &(root / "roi_head"));
        let input = [channels, config.pool.side, config.pool.side];
        let detector = Self {
            regions: RegionNetwork::declare(root, &config.regions),
            bbox_head: CosineHead::declare(&(heads / "bbox_head"), &config.trunk, input, config.embed_dim),
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

    /// Every parameter and running statistic by the reference's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// Looks at boxes; `boxes`: for each image `[N_b, 4]`, px; `classes`: f32 `[K, D]`, on the device.
    pub fn look(&self, pyramid: &Pyramid, boxes: &[Tensor], classes: &Tensor, phase: Phase) -> Result<Said> {
        self.bbox_head.forward(&pyramid.pool(&self.config.pool, boxes)?, classes, phase)
    }

    /// The box of each image of the web that teaches its label, and the label's logit there: see [`pseudo_box`]. None where there is no proposal. Without
    /// gradients.
    ///
    /// `proposals`: as in training; `labels`: of each image its row of `classes`, which is f32 `[K, D]`, on the device.
    pub fn pseudo_boxes(
        &self,
        pyramid: &Pyramid,
        proposals: &[Proposals],
        labels: &[usize],
        classes: &Tensor,
    ) -> Result<Vec<Option<(Corners, f32)>>> {
        check_count("images with a label", proposals.len() as i64, labels.len())?;
        tch::no_grad(|| {
            let best = |found: &Proposals| found.boxes.narrow(0, 0, found.boxes.size()[0].min(CHOSEN_AMONG));
            let best: Vec<Tensor> = proposals.iter().map(best).collect();
            let said = self.look(pyramid, &best, classes, Phase::Test)?;
            let (mut first, mut found) = (0, Vec::new());
            for (boxes, label) in best.iter().zip(labels) {
                let n = boxes.size()[0];
                let part = Said { logits: said.logits.narrow(0, first, n), deltas: said.deltas.narrow(0, first, n) };
                found.push(match pseudo_box(boxes, &part, *label as i64)? {
                    Some((moved, logit)) => Some((corners(&moved.unsqueeze(0), "pseudo boxes")?[0], logit)),
                    None => None,
                });
                first += n;
            }
            Ok(found)
        })
    }

    /// Detects objects in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients.
    ///
    /// `sizes`: of each, without padding; `classes`: f32 `[K, D]`; `given`: proposals to use instead of the network's own, in px of these images.
    pub fn detect(
        &self,
        images: &Tensor,
        sizes: &[ImageSize],
        classes: &Tensor,
        given: Option<Vec<Proposals>>,
        (proposals, detections): (&ProposalRule, &DetectionRule),
    ) -> Result<Vec<Detections>> {
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let Regions { boxes, .. } = self.regions.regions(&pyramid, sizes, given, proposals)?;
            let Said { logits, deltas } = self.look(&pyramid, &boxes, &classes.to_device(images.device()), Phase::Test)?;
            let kept = detect_regions(detections, &REGION_CODER, &boxes, &deltas, &logits.sigmoid(), sizes)?;
            let mask_head = self.mask_head.as_ref().zip(self.config.mask_head.as_ref());
            with_masks(kept, &pyramid, mask_head.map(|(head, config)| (head, &config.pool)))
        })
    }
}

/// Which regions count in the loss of classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// All: a region of background is of no class. For annotated images, with the logits of base classes alone.
    All,
    /// Those that match an object. For images of the web, with the logits of all classes.
    Objects,
}

/// The loss of classes: the cross entropy of each sigmoid, summed over classes and the regions that count, and divided by the number of all regions.
/// (PromptDet, sections 9.3 and 9.4.)
///
/// `logits`: f32 `[N, K]`; `labels`: i64 `[N]`, 0 to K - 1, and K for background.
pub fn class_loss(logits: &Tensor, labels: &Tensor, counted: Counted) -> Result<Tensor> {
    let fits = matches!(logits.size()[..], [n, k] if k > 0 && labels.size() == [n]) && labels.kind() == Kind::Int64;
    ensure(fits, "labels", &format!("i64 [N], one for each row of logits {:?}", logits.size()), labels)?;
    let (n, k, labels) = (logits.size()[0], logits.size()[1], labels.to_device(logits.device()));
    let targets = labels.one_hot(k + 1).narrow(1, 0, k).to_kind(Kind::Float);
    let entropy = logits.binary_cross_entropy_with_logits(&targets, None::<&Tensor>, None::<&Tensor>, Reduction::None);
    let counts = match counted {
        Counted::All => entropy,
        Counted::Objects => entropy * labels.lt(k).to_kind(Kind::Float).unsqueeze(1),
    };
    Ok(sum_over(&counts, n as usize))
}

/// The losses of the head over the regions of all images, in their order; both are divided by the number of regions. (PromptDet, sections 9.3 and 9.4.)
///
/// `said`: of the regions of `samples`, whose labels are the first `n_classes` columns: other columns have no part.
pub fn region_losses(said: &Said, samples: &[RegionSample], n_classes: i64, counted: Counted) -> Result<RegionLosses> {
    let labels = labels_of(samples, n_classes)?;
    Ok(RegionLosses {
        classes: class_loss(&said.logits.narrow(1, 0, n_classes), &labels, counted)?,
        boxes: region_box_loss(BoxLoss::Absolute, &said.deltas, samples, n_classes)?,
    })
}

/// The box that an image of the web teaches its label on: of the 20 proposals with the highest objectness that of the largest logit of the label, as the
/// head moves it, f32 `[4]` px, not clipped to the image; with that logit. None without proposals. (PromptDet, section 9.4.)
///
/// `proposals`: `[N, 4]`, the highest objectness first; `said`: of them; `label`: a column of the logits.
pub fn pseudo_box(proposals: &Tensor, said: &Said, label: i64) -> Result<Option<(Tensor, f32)>> {
    let n = proposals.size()[0];
    ensure(
        said.logits.size()[0] == n && said.deltas.size() == [n, 4],
        "deltas",
        &format!("[{n}, 4], one for each proposal"),
        &said.deltas,
    )?;
    let logits = floats(&said.logits.narrow(0, 0, n.min(CHOSEN_AMONG)).select(1, label).contiguous());
    // Of equal logits the first.
    let best = (0..logits.len()).reduce(|best, place| if logits[place] > logits[best] { place } else { best });
    let Some(best) = best else { return Ok(None) };
    let row = |tensor: &Tensor| tensor.detach().narrow(0, best as i64, 1).to_kind(Kind::Float);
    let moved = REGION_CODER.decode(&row(proposals), &row(&said.deltas).to_device(proposals.device()))?;
    Ok(Some((moved.squeeze_dim(0), logits[best])))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::golden::{error, promptdet};

    type Golden = BTreeMap<String, Tensor>;

    /// The head of the golden data with its parameters.
    fn head(golden: &Golden) -> (nn::VarStore, CosineHead) {
        let store = nn::VarStore::new(Device::Cpu);
        let declared = RefCell::default();
        let root = Parameters::new(&store.root(), Fill::Seed(1), &declared);
        let head = CosineHead::declare(&root, &TrunkConfig { n_convs: 0, n_fcs: 2, width: 20 }, [3, 2, 2], 12);
        let declared = declared.borrow();
        // T2: probabilities begin at 0.01.
        assert!((declared["bias"].double_value(&[0]).exp() - 1.0 / 99.0).abs() < 1e-6);
        assert!((declared["scale"].double_value(&[0]) - 1.0).abs() < 1e-12);
        tch::no_grad(|| {
            for (name, tensor) in declared.iter() {
                tensor.shallow_clone().copy_(&golden[&format!("head/param/{name}")]);
            }
        });
        (store, head)
    }

    /// The golden logits with base classes first, and the labels that go with them.
    fn base_first(golden: &Golden, logits: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
        let base: Vec<i64> = Vec::try_from(&golden["head/base_indices"]).unwrap();
        let order: Vec<i64> = base.iter().copied().chain((0..10).filter(|class| !base.contains(class))).collect();
        let place = |label: i64| order.iter().position(|class| *class == label).map_or(10, |place| place as i64);
        let labels: Vec<i64> = Vec::<i64>::try_from(labels).unwrap().into_iter().map(place).collect();
        (logits.index_select(1, &Tensor::from_slice(&order)), Tensor::from_slice(&labels))
    }

    #[track_caller]
    fn near(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
        let apart = error(found, expected) / (1.0 + expected.abs().max().double_value(&[]));
        assert!(apart <= tolerance, "{what}: {apart:.1e}");
    }

    /// T1 to T4 of PromptDet's specification, with its own code's numbers: what the head says, the losses of annotated images and of images of the web, and
    /// the gradients of all parameters.
    #[test]
    fn logits_losses_and_gradients_are_those_of_promptdet_s_code() {
        let golden = promptdet("promptdet");
        for (kind, counted) in [("base", Counted::All), ("web", Counted::Objects)] {
            let (store, head) = head(&golden);
            // The length of class embeddings does not matter.
            let classes = &golden["head/category_embeddings"] * if kind == "web" { 7.5 } else { 1.0 };
            let Said { logits, deltas } = head.forward(&golden["head/roi_features"], &classes, Phase::Train).unwrap();
            near(&logits, &golden["head/z"], 1e-4, "z");
            near(&deltas, &golden["head/deltas"], 1e-4, "deltas");
            let expected = |name: &str| &golden[&format!("{kind}/{name}")];
            let (ordered, labels) = base_first(&golden, &logits, expected("labels"));
            let (counted_logits, labels) = match counted {
                // Novel columns take no part.
                Counted::All => (ordered.narrow(1, 0, 6), labels.clamp_max(6)),
                Counted::Objects => (ordered, labels),
            };
            let classes = class_loss(&counted_logits, &labels, counted).unwrap();
            near(&classes, expected("loss_cls"), 1e-4, kind);
            let is_object = expected("labels").lt(10).to_kind(Kind::Float).unsqueeze(1);
            let boxes = sum_over(&((&deltas - expected("bbox_targets")).abs() * is_object), 9);
            near(&boxes, expected("loss_bbox"), 1e-4, kind);
            let d_logits = Tensor::run_backward(&[&classes], &[&logits], true, false).remove(0);
            near(&d_logits, expected("d_z"), 1e-3, "d_z");
            (classes + boxes).backward();
            for (name, tensor) in store.variables().into_iter().collect::<BTreeMap<_, _>>() {
                near(&tensor.grad(), &golden[&format!("{kind}/grad/{name}")], 1e-3, &name);
            }
        }
    }

    /// T7: among the first 20 that of the largest logit, though a later one has a larger.
    #[test]
    fn pseudo_boxes_are_those_of_promptdet_s_code() {
        let golden = promptdet("promptdet");
        for image in 0..2 {
            let of_image = |name: &str| golden[&format!("pseudo/{name}")].get(image);
            let proposals = of_image("proposals").narrow(1, 0, 4);
            let said = Said { logits: of_image("z"), deltas: of_image("deltas") };
            let label = golden["pseudo/labels"].int64_value(&[image]);
            let (found, logit) = pseudo_box(&proposals, &said, label).unwrap().unwrap();
            near(&found, &of_image("box"), 1e-4, "box");
            assert!((f64::from(logit) - golden["pseudo/score"].double_value(&[image])).abs() < 1e-4);
            let few = Said { logits: said.logits.narrow(0, 0, 3), deltas: said.deltas.narrow(0, 0, 3) };
            assert!(pseudo_box(&proposals.narrow(0, 0, 3), &few, label).unwrap().is_some());
            let none = Said { logits: said.logits.narrow(0, 0, 0), deltas: said.deltas.narrow(0, 0, 0) };
            assert!(pseudo_box(&proposals.narrow(0, 0, 0), &none, label).unwrap().is_none());
        }
    }

    /// T2: losses at initialisation, where every cosine is 0.
    #[test]
    fn losses_begin_where_the_specification_says() {
        let logits = |k: i64| Tensor::full([2, k], FIRST_BIAS, (Kind::Float, Device::Cpu));
        let loss = |k, labels: [i64; 2], counted| class_loss(&logits(k), &Tensor::from_slice(&labels), counted).unwrap().double_value(&[]);
        assert!((loss(866, [866, 866], Counted::All) - 8.703_591).abs() < 1e-4);
        assert!((loss(866, [5, 5], Counted::All) - 13.298_711).abs() < 1e-4);
        // One object and one region of background, divided by both.
        assert!((loss(1203, [5, 1203], Counted::Objects) - 16.685_674 / 2.0).abs() < 1e-4);
        assert!(class_loss(&logits(3), &Tensor::from_slice(&[0_i64]), Counted::All).is_err());
    }

    #[test]
    fn a_detector_has_the_reference_s_parameters_and_detects() {
        let store = nn::VarStore::new(Device::Cpu);
        let detector = CosineDetector::new(&store.root(), &Config::toy(16).with_masks(), 1).unwrap();
        for name in ["shared_fcs.1.weight", "fc_cls.bias", "fc_reg.weight", "scale", "bias"] {
            assert!(detector.parameters().contains_key(&format!("roi_head.bbox_head.{name}")), "{name}");
        }
        assert!(detector.parameters().contains_key("roi_head.mask_head.conv_logits.weight"));
        let images = Tensor::rand([1, 3, 96, 128], (Kind::Float, Device::Cpu));
        let sizes = [ImageSize { width: 120, height: 96 }];
        let classes = Tensor::eye(16, (Kind::Float, Device::Cpu)).narrow(0, 0, 5);
        let suppression = crate::detection::boxes::Suppression { iou: 0.7, keep: 50 };
        let proposals = ProposalRule { per_level: 50, suppression, least_side: 0.0 };
        let rule = DetectionRule { threshold: 0.001, suppression };
        let found = detector.detect(&images, &sizes, &classes, None, (&proposals, &rule)).unwrap().remove(0);
        assert!(
            !found.kept.scores.is_empty() && found.kept.scores.iter().all(|score| (0.005..0.03).contains(score)),
            "{:?}",
            found.kept.scores
        );
        assert_eq!(found.masks.unwrap().size()[0], found.kept.scores.len() as i64);
        assert!(CosineDetector::blank(&nn::VarStore::new(Device::Cpu).root(), &Config { embed_dim: 0, ..Config::r50(1) }).is_err());
    }
}
