//! The detector of LP-OVOD: a two-stage detector whose classes are the rows of a linear classifier with a sigmoid for each.
//!
//! Two trunks look at the same pooled regions. Trunk A detects: `u` `[N, W]`, of which the logits of base classes are products with learned
//! rows, without bias, normalisation or temperature. Trunk B learns CLIP's embeddings: `v = L2(W v0 + b)`. Novel classes get rows of their own
//! afterwards, by training on the frozen `u` ("probing"). Parameters have the reference's names. (LP-OVOD, sections 5 to 8.)
//!
//! Differences from the reference: batch normalisation uses the statistics of one device; the classification loss is divided by at least 1
//! where no region matches an object (its defect 12); losses of proposals are divided by the number of sampled anchors ([`super::rpn`]).

use std::{cell::RefCell, collections::BTreeMap};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor, nn};

use super::{
    heads::{DetectionRule, RegionSample, Trunk, TrunkConfig, box_regressor, detect_regions, labels_of, region_box_loss},
    regions::{POOL, Pyramid, REGION_CODER, RegionNetwork, Regions, RegionsConfig},
    rpn::{ProposalRule, Proposals},
};
use crate::{
    Error, Phase, Result,
    detection::{
        Detections,
        boxes::{BoxLoss, ImageSize},
        resnet,
        roi_align::RoiAlign,
    },
    error::{check_sizes, ensure},
    layers::{Linear, to_unit_length},
    parameters::{Fill, Init, Parameters},
};

/// The weight of positives in the focal loss, and its exponent. (Lin et al. 2017; LP-OVOD, section 5.2.)
const ALPHA: f64 = 0.25;
const GAMMA: f64 = 2.0;

/// The size of a detector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The first stage.
    pub regions: RegionsConfig,
    /// How regions are pooled.
    pub pool: RoiAlign,
    /// The layers of each trunk.
    pub trunk: TrunkConfig,
    /// The number of base classes.
    pub n_base: i64,
    /// The classifier of novel classes, if they were probed.
    pub novel: Option<NovelConfig>,
    /// The dimension D of the embeddings that trunk B learns, if there is one.
    pub embed_dim: Option<i64>,
}

/// The classifier of novel classes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NovelConfig {
    /// The number of novel classes.
    pub n_classes: i64,
    /// How products with its rows become scores.
    pub activation: Activation,
}

/// How products of features with the rows of novel classes become scores.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Each by its own sigmoid.
    Sigmoid,
    /// By a softmax over the novel classes and a last row for background, of features of unit length divided by a temperature.
    Softmax {
        /// In training.
        train: f64,
        /// In detection.
        test: f64,
    },
}

impl Config {
    /// LP-OVOD's for COCO: a ResNet-50 of caffe style, trained completely, a pyramid of 256 channels with batch normalisation, two trunks of
    /// four convolutions and 1,024 features. (Section 5.1.)
    pub fn r50(n_base: i64, embed_dim: Option<i64>) -> Self {
        let oadp = RegionsConfig::oadp();
        Self {
            regions: RegionsConfig { backbone: resnet::Config { trainable_parts: 5, ..oadp.backbone }, ..oadp },
            pool: POOL,
            trunk: TrunkConfig { n_convs: 4, n_fcs: 1, width: 1024 },
            n_base,
            novel: None,
            embed_dim,
        }
    }

    /// For a toy world, small enough to train in minutes on two cores.
    pub fn toy(n_base: i64, embed_dim: Option<i64>) -> Self {
        Self {
            regions: RegionsConfig::toy(),
            pool: RoiAlign { finest_scale: 28.0, ..POOL },
            trunk: TrunkConfig { n_convs: 1, n_fcs: 1, width: 256 },
            n_base,
            novel: None,
            embed_dim,
        }
    }

    /// Checks that all sizes are positive.
    pub fn check(&self) -> Result<()> {
        let sizes =
            [("n_base", Some(self.n_base)), ("novel.n_classes", self.novel.map(|novel| novel.n_classes)), ("embed_dim", self.embed_dim)];
        let sizes = sizes.into_iter().filter_map(|(name, size)| Some((name, size?)));
        check_sizes(sizes.chain([("pool.side", self.pool.side)]).chain(self.regions.sizes()).chain(self.trunk.sizes()))
    }
}

/// A detector with a linear classifier.
#[derive(Debug)]
pub struct SigmoidDetector {
    /// The first stage.
    pub regions: RegionNetwork,
    trunk: Trunk,
    fc_reg: Linear,
    /// `[Kb, W]`.
    prototype: Tensor,
    /// `[Kn, W]`, and under a softmax a last row for background.
    prototype_novel: Option<Tensor>,
    image_branch: Option<ImageBranch>,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

/// Trunk B with its projection.
#[derive(Debug)]
struct ImageBranch {
    trunk: Trunk,
    projection: Linear,
}

/// What trunk A says of regions.
#[derive(Debug)]
pub struct Features {
    /// `u`, f32 `[N, W]`.
    pub features: Tensor,
    /// f32 `[N, 4]`.
    pub deltas: Tensor,
}

/// The losses of trunk A, f32 scalars.
#[derive(Debug)]
pub struct Losses {
    /// The focal loss over base classes.
    pub classes: Tensor,
    /// The differences of deltas.
    pub boxes: Tensor,
}

impl SigmoidDetector {
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
        let (channels, width) = (config.regions.neck.channels, config.trunk.width);
        let input = [channels, config.pool.side, config.pool.side];
        let heads = &(root / "roi_head");
        let bbox_head = &(heads / "bbox_head");
        let novel_rows = config.novel.map(|novel| match novel.activation {
            Activation::Sigmoid => novel.n_classes,
            Activation::Softmax { .. } => novel.n_classes + 1,
        });
        let detector = Self {
            regions: RegionNetwork::declare(root, &config.regions),
            trunk: Trunk::declare(bbox_head, &config.trunk, input),
            fc_reg: box_regressor(bbox_head, width, 4),
            prototype: heads.trainable("prototype", &[config.n_base, width], Init::xavier(config.n_base, width)),
            prototype_novel: novel_rows.map(|rows| heads.trainable("prototype_novel", &[rows, width], Init::Constant(0.0))),
            image_branch: config.embed_dim.map(|dim| {
                let at = [&(bbox_head / "shared_convs_for_image"), &(bbox_head / "shared_fcs_for_image")];
                let trunk = Trunk::declare_as(at, &config.trunk, input, |n_in| [Init::fan_in(n_in); 2]);
                let at = &(heads / "projection_for_image");
                ImageBranch { trunk, projection: Linear::declare(at, width, dim, Init::xavier(width, dim), Init::Constant(0.0)) }
            }),
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

    /// Looks at boxes with trunk A; `boxes`: for each image `[N_b, 4]`, px. In training it updates the running statistics.
    pub fn features(&self, pyramid: &Pyramid, boxes: &[Tensor], phase: Phase) -> Result<Features> {
        self.features_of(&pyramid.pool(&self.config.pool, boxes)?, phase)
    }

    fn features_of(&self, pooled: &Tensor, phase: Phase) -> Result<Features> {
        let hidden = self.trunk.forward(pooled, phase)?;
        let deltas = self.fc_reg.forward(&hidden).to_kind(Kind::Float);
        Ok(Features { features: hidden.to_kind(Kind::Float), deltas })
    }

    /// Embeddings of boxes by trunk B, f32 `[N, D]` of unit length; `None` without that trunk.
    pub fn embeddings(&self, pyramid: &Pyramid, boxes: &[Tensor], phase: Phase) -> Result<Option<Tensor>> {
        self.embeddings_of(&pyramid.pool(&self.config.pool, boxes)?, phase)
    }

    fn embeddings_of(&self, pooled: &Tensor, phase: Phase) -> Result<Option<Tensor>> {
        let Some(ImageBranch { trunk, projection }) = &self.image_branch else { return Ok(None) };
        Ok(Some(to_unit_length(&projection.forward(&trunk.forward(pooled, phase)?).to_kind(Kind::Float))))
    }

    /// The losses of base classes and boxes over the sampled regions of some images, whose features these are, in their order.
    ///
    /// The loss of classes is divided by the number of regions that match an object, that of boxes by the number of all. (Section 5.2.)
    pub fn losses(&self, Features { features, deltas }: &Features, samples: &[RegionSample]) -> Result<Losses> {
        let labels = labels_of(samples, self.config.n_base)?;
        let classes = focal_loss(&features.matmul(&self.prototype.tr()), &labels)?;
        Ok(Losses { classes, boxes: region_box_loss(BoxLoss::Absolute, deltas, samples, self.config.n_base)? })
    }

    /// The scores of all classes of the detector, base ++ novel, f32 `[N, Kb + Kn]`; `features`: f32 `[N, W]`.
    fn class_scores(&self, features: &Tensor, novel_temperature: f64) -> Tensor {
        let base = features.matmul(&self.prototype.tr()).sigmoid();
        let novel = self.config.novel.zip(self.prototype_novel.as_ref()).map(|(novel, rows)| match novel.activation {
            Activation::Sigmoid => (features.matmul(&rows.tr()) / novel_temperature).sigmoid(),
            Activation::Softmax { .. } => {
                novel_logits(novel.activation, features, rows, Phase::Test).softmax(-1, Kind::Float).narrow(1, 0, novel.n_classes)
            }
        });
        Tensor::cat(&[Some(base), novel].into_iter().flatten().collect::<Vec<_>>(), 1)
    }

    /// Detects objects in images f32, bf16 or f16 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients.
    ///
    /// `sizes`: of each, without padding; `given`: proposals to use instead of the network's own, in px of these images.
    pub fn detect(
        &self,
        images: &Tensor,
        sizes: &[ImageSize],
        classes: &Classes,
        given: Option<Vec<Proposals>>,
        rule: &TestRule,
    ) -> Result<Vec<Detections>> {
        tch::no_grad(|| {
            let pyramid = self.regions.forward(images, Phase::Test)?;
            let Regions { boxes, objectness } = self.regions.regions(&pyramid, sizes, given, &rule.proposals)?;
            let pooled = pyramid.pool(&self.config.pool, &boxes)?;
            let Features { features, deltas } = self.features_of(&pooled, Phase::Test)?;
            let scores = self.class_scores(&features, rule.fusion.novel_temperature);
            // A class that the detector has no row for gets 1 everywhere.
            let all = Tensor::cat(&[&scores, &scores.narrow(1, 0, 1).ones_like()], 1);
            let detected = all.index_select(1, &classes.columns(scores.size()[1])?.to_device(images.device()));
            let shown = match (&classes.embeddings, self.embeddings_of(&pooled, Phase::Test)?) {
                (Some(table), Some(embeddings)) => Some(rule.fusion.image_scores(&embeddings, &table.to_device(images.device()))?),
                (None, _) => None,
                (Some(_), None) => {
                    let expected = "none: the detector did not learn CLIP's embeddings".into();
                    return Err(Error::Input { what: "class embeddings", expected, found: "some".into() });
                }
            };
            let scores = rule.fusion.scores(&detected, shown.as_ref(), &objectness, classes.n_base)?;
            let kept = detect_regions(&rule.detections, &REGION_CODER, &boxes, &deltas, &scores, sizes)?;
            Ok(kept.into_iter().map(|kept| Detections { kept, masks: None }).collect())
        })
    }
}

/// The logits of novel classes of a softmax, with a last column for background: f32 `[N, Kn + 1]`; of sigmoids f32 `[N, Kn]`.
///
/// `features`: f32 `[N, W]`; `rows`: of [`SigmoidDetector`]'s `prototype_novel`.
pub fn novel_logits(activation: Activation, features: &Tensor, rows: &Tensor, phase: Phase) -> Tensor {
    match (activation, phase) {
        (Activation::Sigmoid, _) => features.matmul(&rows.tr()),
        (Activation::Softmax { train, .. }, Phase::Train) => to_unit_length(features).matmul(&rows.tr()) / train,
        (Activation::Softmax { test, .. }, Phase::Test) => to_unit_length(features).matmul(&rows.tr()) / test,
    }
}

/// The focal loss, summed over regions and classes and divided by the number of regions with a class, at least 1; an f32 scalar. (Lin et al.
/// 2017, equation 5; LP-OVOD, section 5.2.)
///
/// `logits`: `[N, K]`; `labels`: i64 `[N]`, 0 to K - 1, and K for background.
pub fn focal_loss(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let fits = matches!(logits.size()[..], [n, k] if k > 0 && labels.size() == [n]) && labels.kind() == Kind::Int64;
    ensure(fits, "labels", &format!("i64 [N], one for each row of logits {:?}", logits.size()), labels)?;
    let (k, labels) = (logits.size()[1], labels.to_device(logits.device()));
    let targets = labels.one_hot(k + 1).narrow(1, 0, k).to_kind(logits.kind());
    let n_positive = targets.sum(Kind::Float).clamp_min(1.0);
    Ok(focal_terms(logits, &targets).sum(logits.kind()) / n_positive.to_kind(logits.kind()))
}

/// The focal loss of each logit, in their shape; `targets`: 1 for positives, 0 for the others. (Lin et al. 2017, equation 5.)
pub(crate) fn focal_terms(logits: &Tensor, targets: &Tensor) -> Tensor {
    let entropy = logits.binary_cross_entropy_with_logits(targets, None::<&Tensor>, None::<&Tensor>, Reduction::None);
    let probabilities = logits.sigmoid();
    let wrong: Tensor = (1.0 - targets) * &probabilities + (1.0 - &probabilities) * targets;
    let weights: Tensor = targets * ALPHA + (1.0 - targets) * (1.0 - ALPHA);
    entropy * wrong.pow_tensor_scalar(GAMMA) * weights
}

/// The classes that a detector looks for.
#[derive(Debug)]
pub struct Classes {
    /// Of each class, which row of the detector's classifier, base ++ novel, it is; none for a class that was not probed.
    pub rows: Vec<Option<i64>>,
    /// The number of base classes, which come first.
    pub n_base: i64,
    /// Class embeddings f32 `[K, D]` for trunk B; without them its scores are not used.
    pub embeddings: Option<Tensor>,
}

impl Classes {
    /// The columns of the classes among `n` scores and a last one. Fails where a row is not there.
    fn columns(&self, n: i64) -> Result<Tensor> {
        match self.rows.iter().flatten().find(|row| !(0..n).contains(*row)) {
            Some(row) => Err(Error::Input { what: "rows of classes", expected: format!("from 0 to {}", n - 1), found: row.to_string() }),
            None => Ok(Tensor::from_slice(&self.rows.iter().map(|row| row.unwrap_or(n)).collect::<Vec<_>>())),
        }
    }
}

/// How the scores of the classifier and of CLIP's embeddings are combined: products of powers, and the root of their product with the
/// proposal's objectness. (LP-OVOD, section 8.)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fusion {
    /// Exponent of the image score of base classes; that of the classifier is 1 - alpha.
    pub alpha: f64,
    /// Exponent of the classifier of novel classes; that of the image score is 1 - beta.
    pub beta: f64,
    /// Divides the logits of novel classes before their sigmoid.
    pub novel_temperature: f64,
    /// Divides cosines before the softmax over all classes that makes them image scores.
    pub image_temperature: f64,
}

impl Default for Fusion {
    fn default() -> Self {
        Self { alpha: 0.0, beta: 0.8, novel_temperature: 1.0, image_temperature: 0.01 }
    }
}

impl Fusion {
    /// Image scores f32 `[N, K]`: the softmax over all classes. `embeddings`: f32 `[N, D]` of unit length; `table`: class embeddings `[K, D]`,
    /// used as they are.
    pub fn image_scores(&self, embeddings: &Tensor, table: &Tensor) -> Result<Tensor> {
        let d = table.size()[1];
        ensure(
            matches!(embeddings.size()[..], [_, found] if found == d),
            "embeddings",
            &format!("[N, {d}], as those of classes"),
            embeddings,
        )?;
        Ok((embeddings.matmul(&table.tr()) / self.image_temperature).softmax(-1, Kind::Float))
    }

    /// Scores f32 `[N, K]`. `detected`: of the classifier, `[N, K]`; `shown`: image scores, `[N, K]`, without which the classifier's stay as
    /// they are; `objectness`: `[N]`; the first `n_base` classes are base.
    pub fn scores(&self, detected: &Tensor, shown: Option<&Tensor>, objectness: &Tensor, n_base: i64) -> Result<Tensor> {
        let fits = matches!(detected.size()[..], [_, k] if (0..=k).contains(&n_base));
        ensure(fits, "scores of the classifier", &format!("[N, K], K at least {n_base}"), detected)?;
        let (n, k) = (detected.size()[0], detected.size()[1]);
        ensure(objectness.size() == [n], "objectness", &format!("[{n}], one for each region"), objectness)?;
        let scores = match shown {
            None => detected.shallow_clone(),
            Some(shown) => {
                ensure(shown.size() == detected.size(), "image scores", "the shape of the classifier's", shown)?;
                let groups = [(1.0 - self.alpha, self.alpha, 0, n_base), (self.beta, 1.0 - self.beta, n_base, k - n_base)];
                let fused = |(of_detected, of_shown, first, n)| {
                    let power = |of: &Tensor, exponent: f64| of.narrow(1, first, n).pow_tensor_scalar(exponent);
                    power(detected, of_detected) * power(shown, of_shown)
                };
                Tensor::cat(&groups.map(fused), 1)
            }
        };
        Ok((scores * objectness.unsqueeze(1)).sqrt())
    }
}

/// The test settings of a [`SigmoidDetector`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TestRule {
    /// The choice of the network's own proposals.
    pub proposals: ProposalRule,
    /// How scores are combined.
    pub fusion: Fusion,
    /// The choice of detections.
    pub detections: DetectionRule,
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::golden::{error, lp_ovod};

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    /// Constants of LP-OVOD's specification, section 7.
    #[test]
    fn the_focal_loss_has_the_values_of_the_specification() {
        let z = Tensor::zeros([1, 1], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        for (label, loss, slope) in [(0_i64, 0.043_321_7, -0.074_571_7), (1, 0.129_965_1, 0.223_715_1)] {
            let found = focal_loss(&z, &Tensor::from_slice(&[label])).unwrap();
            assert!((scalar(&found) - loss).abs() < 1e-7, "{label}: {}", scalar(&found));
            let gradient = Tensor::run_backward(&[&found], &[&z], false, false).remove(0);
            assert!((scalar(&gradient.sum(Kind::Double)) - slope).abs() < 1e-7);
        }
        // Four positives, forty negatives, seventeen classes, whatever the features: divided by the positives.
        let labels: Vec<i64> = (0..44).map(|row| if row < 4 { row } else { 17 }).collect();
        let found = focal_loss(&Tensor::zeros([44, 17], (Kind::Double, Device::Cpu)), &Tensor::from_slice(&labels)).unwrap();
        assert!((scalar(&found) - 24.216_830).abs() < 1e-5, "{}", scalar(&found));
        let nothing = focal_loss(&Tensor::zeros([3, 17], (Kind::Float, Device::Cpu)), &Tensor::from_slice(&[17_i64; 3])).unwrap();
        assert!(scalar(&nothing).is_finite());
    }

    /// Element losses and gradients, and the loss of 20 regions over 48 prototypes, by LP-OVOD's own code. Sums of a thousand numbers of f32
    /// differ by 1,000 x 2^-24 = 6e-5 of themselves at most.
    #[test]
    fn the_loss_of_base_classes_is_that_of_lp_ovod_s_code() {
        let golden = lp_ovod();
        let (z, t) = (golden["focal/z"].copy().set_requires_grad(true), &golden["focal/t"]);
        for row in 0..3 {
            for column in 0..2 {
                let one = z.get(row).get(column).view([1, 1]);
                let label = 1 - t.get(row).int64_value(&[column]);
                let loss = focal_loss(&one, &Tensor::from_slice(&[label])).unwrap();
                let gradient = Tensor::run_backward(&[&loss], &[&z], true, false).remove(0).get(row).double_value(&[column]);
                assert!((scalar(&loss) - golden["focal/loss"].get(row).double_value(&[column])).abs() < 1e-5);
                assert!((gradient - golden["focal/grad"].get(row).double_value(&[column])).abs() < 1e-5);
            }
        }
        let [u, prototype] = ["base/u", "base/prototype"].map(|name| golden[name].copy().set_requires_grad(true));
        let loss = focal_loss(&u.matmul(&prototype.tr()), &golden["base/labels"]).unwrap();
        let expected = scalar(&golden["base/cls_loss"]);
        assert!((scalar(&loss) / expected - 1.0).abs() < 1e-4, "{} {expected}", scalar(&loss));
        let gradients = Tensor::run_backward(&[&loss], &[&u, &prototype], false, false);
        for (gradient, name) in gradients.iter().zip(["base/d_u", "base/d_prototype"]) {
            let apart = error(gradient, &golden[name]) / golden[name].abs().max().double_value(&[]);
            assert!(apart < 1e-3, "{name}: {apart}");
        }
    }

    /// The distillation loss: 256 times the mean absolute difference.
    #[test]
    fn the_loss_of_embeddings_is_that_of_lp_ovod_s_code() {
        let golden = lp_ovod();
        let [v0, weight, bias] = ["kd/v0", "kd/W", "kd/b"].map(|name| golden[name].copy().set_requires_grad(true));
        let said = to_unit_length(&v0.linear(&weight, Some(&bias)));
        let loss = crate::rcnn::distillation::embedding_loss(&said, &golden["kd/teacher"]).unwrap() * 256.0;
        assert!((scalar(&loss) / scalar(&golden["kd/loss"]) - 1.0).abs() < 1e-4);
        let gradients = Tensor::run_backward(&[&loss], &[&v0, &weight, &bias], false, false);
        for (gradient, name) in gradients.iter().zip(["kd/d_v0", "kd/d_W", "kd/d_b"]) {
            let apart = error(gradient, &golden[name]) / golden[name].abs().max().double_value(&[]);
            assert!(apart < 1e-3, "{name}: {apart}");
        }
    }

    /// Final scores by LP-OVOD's own code, with and without probed classes. There classes are in ascending id of COCO; here base classes come first.
    #[test]
    fn fused_scores_are_those_of_lp_ovod_s_code() {
        let golden = lp_ovod();
        let novel = [4_i64, 5, 11, 12, 15, 16, 21, 23, 27, 29, 32, 34, 45, 47, 54, 58, 63];
        let order: Vec<i64> = (0..65).filter(|place| !novel.contains(place)).chain(novel).collect();
        let columns = Tensor::from_slice(&order);
        let [u, v, objectness] = ["u", "v_raw", "objectness"].map(|name| golden[&format!("fusion/{name}")].shallow_clone());
        let text = golden["fusion/text"].index_select(0, &columns);
        let base = u.matmul(&golden["fusion/prototype"].tr()).sigmoid();
        let probed = |temperature: f64| (u.matmul(&golden["fusion/prototype_novel"].tr()) / temperature).sigmoid();
        let ones = Tensor::ones([6, 17], (Kind::Float, Device::Cpu));
        let fusion = |alpha, beta, novel_temperature| Fusion { alpha, beta, novel_temperature, image_temperature: 0.01 };
        for (name, fusion, novel) in [
            ("score_probed", fusion(0.0, 0.8, 1.0), probed(1.0)),
            ("score_probed_a03_b05_t2", fusion(0.3, 0.5, 2.0), probed(2.0)),
            ("score_pretrained_b04", fusion(0.0, 0.4, 1.0), ones),
        ] {
            let shown = fusion.image_scores(&to_unit_length(&v), &text).unwrap();
            let found = fusion.scores(&Tensor::cat(&[&base, &novel], 1), Some(&shown), &objectness, 48).unwrap();
            let expected = golden[&format!("fusion/{name}")].index_select(1, &columns);
            assert!(error(&found, &expected) < 1e-4, "{name}: {}", error(&found, &expected));
        }
    }

    /// Closed forms of LP-OVOD's specification, section 8 (S1 and S2).
    #[test]
    fn fused_scores_have_the_values_of_the_specification() {
        let row = |numbers: [f32; 2]| Tensor::from_slice(&numbers).view([1, 2]);
        let objectness = Tensor::from_slice(&[0.8_f32]);
        let scores = |detected: [f32; 2], shown: Option<[f32; 2]>, alpha, beta| {
            let fusion = Fusion { alpha, beta, ..Fusion::default() };
            let scores = fusion.scores(&row(detected), shown.map(row).as_ref(), &objectness, 1).unwrap();
            [scores.double_value(&[0, 0]), scores.double_value(&[0, 1])]
        };
        let close = |found: [f64; 2], expected: [f64; 2]| found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
        let shown = Some([0.3, 0.3]);
        assert!(close(scores([0.6, 0.6], shown, 0.0, 0.8), [0.692_820, 0.646_424]));
        assert!(close(scores([0.6, 1.0], shown, 0.0, 0.4), [0.692_820, 0.623_277]));
        let root = |score: f64| (score * f64::from(0.8_f32)).sqrt();
        assert!(close(scores([0.6, 0.6], shown, 1.0, 0.0), [root(0.3), root(0.3)]));
        assert!(close(scores([0.6, 0.6], shown, 0.0, 1.0), [root(0.6), root(0.6)]));
        assert!(close(scores([0.6, 0.6], None, 0.5, 0.5), [root(0.6), root(0.6)]));
        let cosines = Tensor::from_slice(&(0..65).map(|class| if class == 0 { 0.33_f32 } else { 0.2 }).collect::<Vec<_>>()).view([65, 1]);
        let shown = Fusion::default().image_scores(&Tensor::from_slice(&[1.0_f32]).view([1, 1]), &cosines).unwrap();
        assert!((shown.double_value(&[0, 0]) - 0.999_855).abs() < 1e-6);
    }

    fn detector(novel: Option<NovelConfig>) -> (nn::VarStore, SigmoidDetector) {
        let store = nn::VarStore::new(Device::Cpu);
        let config = Config { novel, ..Config::toy(3, Some(8)) };
        let detector = SigmoidDetector::new(&store.root(), &config, 5).unwrap();
        (store, detector)
    }

    fn rule(threshold: f32) -> TestRule {
        let suppression = crate::detection::boxes::Suppression { iou: 0.5, keep: 100 };
        TestRule {
            proposals: ProposalRule { per_level: 100, suppression, least_side: 0.0 },
            fusion: Fusion::default(),
            detections: DetectionRule { threshold, suppression },
        }
    }

    /// The names and shapes of the reference's checkpoints.
    #[test]
    fn parameters_have_the_names_of_the_reference() {
        let store = nn::VarStore::new(Device::Cpu);
        let novel = Some(NovelConfig { n_classes: 17, activation: Activation::Sigmoid });
        let detector = SigmoidDetector::blank(&store.root(), &Config { novel, ..Config::r50(48, Some(512)) }).unwrap();
        for (name, shape) in [
            ("backbone.conv1.weight", vec![64, 3, 7, 7]),
            ("neck.lateral_convs.0.bn.weight", vec![256]),
            ("rpn_head.rpn_conv.weight", vec![256, 256, 3, 3]),
            ("roi_head.bbox_head.shared_convs.3.conv.weight", vec![256, 256, 3, 3]),
            ("roi_head.bbox_head.shared_convs_for_image.0.bn.running_var", vec![256]),
            ("roi_head.bbox_head.shared_fcs.0.weight", vec![1024, 12_544]),
            ("roi_head.bbox_head.shared_fcs_for_image.0.bias", vec![1024]),
            ("roi_head.bbox_head.fc_reg.weight", vec![4, 1024]),
            ("roi_head.prototype", vec![48, 1024]),
            ("roi_head.prototype_novel", vec![17, 1024]),
            ("roi_head.projection_for_image.weight", vec![512, 1024]),
        ] {
            assert_eq!(detector.parameters()[name].size(), shape, "{name}");
        }
        assert!(!detector.parameters().keys().any(|name| name.contains("fc_cls")));
    }

    /// S3 and S5: a class without a row has a score that depends on the image alone; images may have 0 or 1 proposals.
    #[test]
    fn proposals_may_be_given_and_few() {
        let (_store, detector) = detector(None);
        let images = Tensor::ones([1, 3, 64, 96], (Kind::Float, Device::Cpu));
        let size = ImageSize { width: 90, height: 60 };
        let classes = |embeddings| Classes { rows: vec![Some(0), Some(2), None], n_base: 2, embeddings };
        for n in [0_i64, 1, 3] {
            let corners: Vec<f32> = (0..n).flat_map(|place| [place as f32, 1.0, 40.0 + place as f32, 50.0]).collect();
            let boxes = Tensor::from_slice(&corners).view([n, 4]);
            let scores = Tensor::full([n], 0.81, (Kind::Float, Device::Cpu));
            let given = || Some(vec![Proposals { boxes: boxes.shallow_clone(), scores: scores.shallow_clone() }]);
            let found = detector.detect(&images, &[size], &classes(None), given(), &rule(0.0)).unwrap().remove(0);
            let unseen: Vec<f32> =
                found.kept.classes.iter().zip(&found.kept.scores).filter(|(class, _)| **class == 2).map(|(_, score)| *score).collect();
            assert!(unseen.len() >= n.min(1) as usize && unseen.iter().all(|score| (score - 0.9).abs() < 1e-6), "{unseen:?}");
            let table = Tensor::ones([3, 8], (Kind::Float, Device::Cpu));
            let found = detector.detect(&images, &[size], &classes(Some(table)), given(), &rule(0.0)).unwrap().remove(0);
            assert!(n > 0 || found.kept.scores.is_empty());
        }
        let missing = Classes { rows: vec![Some(3)], n_base: 1, embeddings: None };
        let refusal = detector.detect(&images, &[size], &missing, None, &rule(0.0)).unwrap_err().to_string();
        assert_eq!(refusal, "rows of classes: expected from 0 to 2, found 3");
    }

    #[test]
    fn a_softmax_has_a_column_for_background() {
        let activation = Activation::Softmax { train: 0.1, test: 0.07 };
        let (_store, detector) = detector(Some(NovelConfig { n_classes: 2, activation }));
        let features = Tensor::ones([4, 256], (Kind::Float, Device::Cpu));
        let scores = detector.class_scores(&features, 1.0);
        assert_eq!(scores.size(), [4, 5]);
        assert!((scores.double_value(&[0, 4]) - 1.0 / 3.0).abs() < 1e-6);
    }
}
