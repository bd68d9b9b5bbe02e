//! Box heads, embedding heads and the head for whole images, with their training samples and losses.
//!
//! Labels of regions are 0 to K - 1 for classes, and K for background, as in mmdet.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use super::classifier::{Background, EmbeddingClassifier};
use crate::{
    Error, Phase, Result,
    detection::{
        boxes::{BoxCoder, BoxLoss, Corners, ImageSize, Kept, Suppression, boxes_tensor, clip_to_image, corners, integers},
        layers::{ConvModule, sum_over},
        matching::{Assigner, Match, Sampler, Truth},
    },
    error::ensure,
    layers::{ConvShape, Linear},
    parameters::{Init, Parameters},
};

/// The layers between pooled features and a classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrunkConfig {
    /// 3 x 3 convolutions with batch normalisation and ReLU, of the pyramid's channels.
    pub n_convs: usize,
    /// Fully connected layers with ReLU, at least one.
    pub n_fcs: usize,
    /// The outputs of each fully connected layer.
    pub width: i64,
}

/// Convolutions, then fully connected layers.
#[derive(Debug)]
pub(super) struct Trunk {
    shared_convs: Vec<ConvModule>,
    shared_fcs: Vec<Linear>,
    /// C, side, side.
    input: [i64; 3],
}

impl Trunk {
    pub(super) fn declare(at: &Parameters<'_>, config: &TrunkConfig, input: [i64; 3]) -> Self {
        let xavier = |n_in| [Init::xavier(n_in, config.width), Init::Constant(0.0)];
        Self::declare_as([&(at / "shared_convs"), &(at / "shared_fcs")], config, input, xavier)
    }

    /// The same with other names and, of the fully connected layers with so many inputs, other first weights and biases.
    pub(super) fn declare_as(
        [convs, fcs]: [&Parameters<'_>; 2],
        config: &TrunkConfig,
        [channels, side, _]: [i64; 3],
        init: impl Fn(i64) -> [Init; 2],
    ) -> Self {
        let shape = ConvShape::new(channels, channels, 3);
        let shared_convs = (0..config.n_convs).map(|index| ConvModule::normalised(&(convs / index), shape, shape.kaiming())).collect();
        let linear = |index| {
            let n_in = if index == 0 { channels * side * side } else { config.width };
            let [weight, bias] = init(n_in);
            Linear::declare(&(fcs / index), n_in, config.width, weight, bias)
        };
        Self { shared_convs, shared_fcs: (0..config.n_fcs).map(linear).collect(), input: [channels, side, side] }
    }

    /// Returns `[N, width]`; `pooled`: `[N, C, side, side]`, flattened channel by channel.
    pub(super) fn forward(&self, pooled: &Tensor, phase: Phase) -> Result<Tensor> {
        let [channels, side, _] = self.input;
        let fits = pooled.size().get(1..) == Some(&self.input[..]);
        ensure(fits, "pooled features", &format!("[N, {channels}, {side}, {side}]"), pooled)?;
        let maps = self.shared_convs.iter().fold(pooled.shallow_clone(), |x, conv| conv.forward(&x, phase).relu());
        Ok(self.shared_fcs.iter().fold(maps.flatten(1, 3), |x, fc| fc.forward(&x).relu()))
    }
}

/// A head with an open vocabulary: ViLD's text branch (with boxes), its image branch and OADP's block head (without).
#[derive(Debug)]
pub struct OpenHead {
    trunk: Trunk,
    /// The classifier, on embeddings that [`Self::forward`] returns.
    pub classifier: EmbeddingClassifier,
    fc_reg: Option<Linear>,
}

/// The configuration of an [`OpenHead`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenHeadConfig {
    /// The layers before the classifier.
    pub trunk: TrunkConfig,
    /// The treatment of background.
    pub background: Background,
    /// Whether the head corrects boxes.
    pub boxes: Boxes,
}

/// Whether a head corrects boxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boxes {
    /// One box for all classes.
    Agnostic,
    /// It classifies only.
    None,
}

/// The predictions of a head for regions.
#[derive(Debug)]
pub struct Regions {
    /// f32 `[N, D]`, of unit length.
    pub embeddings: Tensor,
    /// f32 `[N, 4]`; none if the head only classifies.
    pub deltas: Option<Tensor>,
}

impl OpenHead {
    pub(crate) fn declare(at: &Parameters<'_>, config: &OpenHeadConfig, input: [i64; 3], embed_dim: i64) -> Self {
        let width = config.trunk.width;
        Self {
            trunk: Trunk::declare(at, &config.trunk, input),
            classifier: EmbeddingClassifier::of_regions(&(at / "fc_cls"), width, embed_dim, config.background),
            fc_reg: match config.boxes {
                Boxes::Agnostic => Some(box_regressor(at, width, 4)),
                Boxes::None => None,
            },
        }
    }

    /// Looks at regions; `pooled`: `[N, C, side, side]`. In training it updates the running statistics.
    pub fn forward(&self, pooled: &Tensor, phase: Phase) -> Result<Regions> {
        let hidden = self.trunk.forward(pooled, phase)?;
        let deltas = self.fc_reg.as_ref().map(|fc_reg| fc_reg.forward(&hidden).to_kind(Kind::Float));
        Ok(Regions { embeddings: self.classifier.embed(&hidden), deltas })
    }
}

pub(super) fn box_regressor(at: &Parameters<'_>, width: i64, n_out: i64) -> Linear {
    Linear::declare(&(at / "fc_reg"), width, n_out, Init::Normal(0.001), Init::Constant(0.0))
}

/// A head with classes of its own and a box for each of them (Fast R-CNN).
#[derive(Debug)]
pub struct ClosedHead {
    trunk: Trunk,
    fc_cls: Linear,
    fc_reg: Linear,
}

impl ClosedHead {
    pub(crate) fn declare(at: &Parameters<'_>, trunk: &TrunkConfig, input: [i64; 3], n_classes: i64) -> Self {
        Self {
            trunk: Trunk::declare(at, trunk, input),
            fc_cls: Linear::declare(&(at / "fc_cls"), trunk.width, n_classes + 1, Init::Normal(0.01), Init::Constant(0.0)),
            fc_reg: box_regressor(at, trunk.width, 4 * n_classes),
        }
    }

    /// Returns logits f32 `[N, K + 1]`, the last column background, and deltas f32 `[N, 4 K]`; `pooled`: `[N, C, side, side]`.
    pub fn forward(&self, pooled: &Tensor, phase: Phase) -> Result<(Tensor, Tensor)> {
        let hidden = self.trunk.forward(pooled, phase)?;
        Ok((self.fc_cls.forward(&hidden).to_kind(Kind::Float), self.fc_reg.forward(&hidden).to_kind(Kind::Float)))
    }
}

/// OADP's head for whole images.
#[derive(Debug)]
pub struct GlobalHead {
    /// The classifier, on what [`Self::embed`] returns.
    pub classifier: EmbeddingClassifier,
    channels: i64,
}

impl GlobalHead {
    pub(crate) fn declare(at: &Parameters<'_>, channels: i64, embed_dim: i64) -> Self {
        Self { classifier: EmbeddingClassifier::of_images(&(at / "_classifier"), channels, embed_dim), channels }
    }

    /// Returns embeddings f32 `[B, D]` of unit length; `coarsest`: P6, of which all cells count, those of padding too.
    pub fn embed(&self, coarsest: &Tensor) -> Result<Tensor> {
        let fits = matches!(coarsest.size()[..], [_, c, h, w] if c == self.channels && h > 0 && w > 0);
        ensure(fits, "coarsest level", &format!("[B, {}, h, w]", self.channels), coarsest)?;
        Ok(self.classifier.embed(&coarsest.mean_dim([2_i64, 3].as_slice(), false, Kind::Float)))
    }
}

/// The choice of training regions, and the encoding of their boxes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRule {
    /// Matches regions to objects.
    pub assigner: Assigner,
    /// Samples the matched regions.
    pub sampler: Sampler,
    /// How boxes differ from regions.
    pub coder: BoxCoder,
}

/// The training regions of an image: first those that match objects, then background.
#[derive(Debug)]
pub struct RegionSample {
    /// f32 `[N, 4]` on the CPU, px.
    pub boxes: Tensor,
    /// i64 `[N]` on the CPU; K is background.
    pub labels: Tensor,
    /// f32 `[O, 4]` on the CPU, for the first O regions.
    pub deltas: Tensor,
    /// For the first O regions, which object each stands for.
    pub objects: Vec<usize>,
}

impl RegionRule {
    /// Chooses among the proposals of an image and its objects, which are proposals too (as in mmdet, they come first).
    ///
    /// `proposals`: `[N, 4]`; `labels`: i64 `[G]`, of each object, from 0 to `n_classes` - 1.
    pub fn choose(&self, proposals: &Tensor, truth: &Truth, labels: &Tensor, n_classes: i64, rng: &mut ChaCha8Rng) -> Result<RegionSample> {
        let objects = corners(&truth.objects, "objects")?;
        let fits = labels.size() == [objects.len() as i64] && labels.kind() == Kind::Int64;
        ensure(fits, "labels", &format!("i64 [{}], one for each object", objects.len()), labels)?;
        let labels = integers(labels);
        if let Some(label) = labels.iter().find(|label| !(0..n_classes).contains(label)) {
            return Err(Error::Input { what: "labels", expected: format!("0 to {}", n_classes - 1), found: label.to_string() });
        }
        let regions: Vec<Corners> = objects.iter().copied().chain(corners(proposals, "proposals")?).collect();
        let mut matches = self.assigner.assign(&regions, &objects);
        truth.ignore_crowded(&regions, &mut matches)?;
        let sample = self.sampler.draw(&matches, rng);
        let chosen: Vec<usize> = sample.objects.iter().chain(&sample.background).copied().collect();
        let object_of = |&region: &usize| match matches[region] {
            Match::Object(object) => Some(object),
            Match::Background | Match::Ignored => None,
        };
        let stands_for: Vec<usize> = sample.objects.iter().filter_map(object_of).collect();
        let from = boxes_tensor(&sample.objects.iter().map(|&region| regions[region]).collect::<Vec<_>>());
        let to = boxes_tensor(&stands_for.iter().map(|&object| objects[object]).collect::<Vec<_>>());
        let label_of = |region: &usize| object_of(region).map_or(n_classes, |object| labels[object]);
        Ok(RegionSample {
            boxes: boxes_tensor(&chosen.iter().map(|&region| regions[region]).collect::<Vec<_>>()),
            labels: Tensor::from_slice(&chosen.iter().map(label_of).collect::<Vec<_>>()),
            deltas: self.coder.encode(&from, &to)?,
            objects: stands_for,
        })
    }
}

/// The losses of a head, f32 scalars.
#[derive(Debug)]
pub struct RegionLosses {
    /// Cross entropy over classes and background.
    pub classes: Tensor,
    /// The differences of deltas.
    pub boxes: Tensor,
}

/// The losses of a head over the regions of all images, in their order; both are divided by the number of regions.
///
/// `logits`: f32 `[N, K + 1]`; `deltas`: f32 `[N, 4]`, or `[N, 4 K]` where each class has its own.
pub fn region_losses(box_loss: BoxLoss, logits: &Tensor, deltas: &Tensor, samples: &[RegionSample]) -> Result<RegionLosses> {
    let n = samples.iter().map(|sample| sample.labels.size()[0]).sum::<i64>();
    ensure(matches!(logits.size()[..], [rows, _] if rows == n), "logits", &format!("[{n}, K + 1], a row for each region"), logits)?;
    let k = logits.size()[1] - 1;
    let labels = labels_of(samples, k)?;
    let boxes = region_box_loss(box_loss, deltas, samples, k)?;
    let entropy = logits.cross_entropy_loss(&labels.to_device(logits.device()), None::<&Tensor>, Reduction::None, -100, 0.0);
    Ok(RegionLosses { classes: sum_over(&entropy, n as usize), boxes })
}

/// The labels of the regions of all images, in their order, i64 `[N]` on the CPU, of `k` classes; `k` is background.
pub(super) fn labels_of(samples: &[RegionSample], k: i64) -> Result<Tensor> {
    let labels: Vec<i64> = samples.iter().flat_map(|sample| integers(&sample.labels)).collect();
    match labels.iter().find(|label| !(0..=k).contains(*label)) {
        Some(label) => Err(Error::Input { what: "labels", expected: format!("0 to {k}, which is background"), found: label.to_string() }),
        None => Ok(Tensor::from_slice(&labels)),
    }
}

/// The differences of deltas of the regions that match objects, divided by the number of all regions.
///
/// `deltas`: f32 `[N, 4]`, or `[N, 4 K]` where each of the `k` classes has its own.
pub(super) fn region_box_loss(box_loss: BoxLoss, deltas: &Tensor, samples: &[RegionSample], k: i64) -> Result<Tensor> {
    let n = samples.iter().map(|sample| sample.labels.size()[0]).sum::<i64>();
    let n_boxes = deltas.size().get(1).map_or(0, |columns| columns / 4);
    let fits = deltas.size() == [n, 4 * n_boxes] && (n_boxes == 1 || n_boxes == k);
    ensure(fits, "box deltas", &format!("[{n}, 4] or [{n}, {}]", 4 * k), deltas)?;
    let on_device = |tensor: Tensor| tensor.to_device(deltas.device());
    let (mut places, mut targets) = (vec![], vec![]);
    let mut first = 0;
    for sample in samples {
        let classes = integers(&sample.labels);
        // Rows of [N boxes, 4]: a region's own, or that of its class.
        let place = |row: usize| (first + row as i64) * n_boxes + if n_boxes > 1 { classes[row] } else { 0 };
        places.extend((0..sample.objects.len()).map(place));
        first += classes.len() as i64;
        targets.push(sample.deltas.shallow_clone());
    }
    let said = deltas.reshape([-1, 4]).index_select(0, &on_device(Tensor::from_slice(&places)));
    let targets = if targets.is_empty() { said.detach() } else { on_device(Tensor::cat(&targets, 0)) };
    Ok(sum_over(&box_loss.between(&said, &targets), n as usize))
}

/// The choice of an image's detections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectionRule {
    /// Only classes with a score above this.
    pub threshold: f32,
    /// Suppresses duplicates within a class; limits the detections of an image.
    pub suppression: Suppression,
}

impl DetectionRule {
    /// Makes detections of the regions of one image.
    ///
    /// `regions`: `[N, 4]`, px; `deltas`: `[N, 4]` or `[N, 4 K]`; `scores`: `[N, K]`, without background; `size`: without padding.
    pub fn detect(&self, coder: &BoxCoder, regions: &Tensor, deltas: &Tensor, scores: &Tensor, size: ImageSize) -> Result<Kept> {
        let [deltas, scores] = [deltas, scores].map(|tensor| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float));
        let boxes = coder.decode(&regions.to_device(Device::Cpu).to_kind(Kind::Float), &deltas)?;
        let (n, columns) = (boxes.size()[0], boxes.size()[1]);
        let boxes = clip_to_image(&boxes.reshape([-1, 4]), size).reshape([n, columns]);
        self.suppression.of_classes(&boxes, &scores, self.threshold)
    }
}

impl TrunkConfig {
    pub(super) fn sizes(&self) -> [(&'static str, i64); 2] {
        [("trunk.n_fcs", self.n_fcs as i64), ("trunk.width", self.width)]
    }
}

/// Makes detections of the regions of each image; `deltas` and `scores` are of the regions of all images, in their order.
pub(super) fn detect_regions(
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
