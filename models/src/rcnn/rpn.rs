//! The region proposal network (Faster R-CNN, section 3): at each anchor, whether an object is there and how its box differs.
//!
//! Unlike mmdet, which counts an image without objects as if it had one, losses are divided by the anchors that were sampled.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use crate::{
    Result,
    detection::{
        anchors::{Anchors, Cells},
        boxes::{BoxCoder, BoxLoss, Corners, ImageSize, Suppression, boxes_tensor, clip_to_image, corners, integers},
        fpn::{FINEST_STRIDE, N_LEVELS},
        layers::sum_over,
        matching::{Assigner, Claim, Match, Sampler, Truth},
    },
    error::check_count,
    layers::{Conv, ConvShape},
    parameters::{Init, Parameters},
};

/// Images are padded to a multiple of this, px.
const PADDING: i64 = 32;

/// The configuration of a region proposal network and its training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where boxes start from.
    pub anchors: Anchors,
    /// How boxes differ from anchors.
    pub coder: BoxCoder,
    /// Matches anchors to objects.
    pub assigner: Assigner,
    /// Samples the matched anchors.
    pub sampler: Sampler,
    /// Differences of training between mmdet and torchvision.
    #[serde(default, skip_serializing_if = "Learning::is_mmdets")]
    pub learning: Learning,
}

/// The training of a proposal network, as far as mmdet (the default) and torchvision differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learning {
    /// The match of an anchor that is among the best of an object.
    pub claim: Claim,
    /// The area whose anchors are used in training.
    pub reach: Reach,
    /// The loss of box deltas.
    pub box_loss: BoxLoss,
}

impl Learning {
    /// torchvision's.
    pub const TORCHVISION: Self = Self { claim: Claim::Nearest, reach: Reach::Batch, box_loss: BoxLoss::Smooth { beta: 1.0 / 9.0 } };

    fn is_mmdets(&self) -> bool {
        *self == Self::default()
    }
}

/// The area whose anchors are used in training, to the right and below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// Up to the cells that the image covers, padded to a multiple of 32 px (mmdet).
    #[default]
    Image,
    /// All of them, though only padding may lie under them (torchvision).
    Batch,
}

/// The choice of an image's proposals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProposalRule {
    /// The best of each level that go on.
    pub per_level: usize,
    /// Suppresses duplicates within a level; limits the proposals of an image.
    pub suppression: Suppression,
    /// Boxes go whose width or height is not more than this, px.
    pub least_side: f32,
}

/// The network.
#[derive(Debug)]
pub struct Rpn {
    rpn_conv: Conv,
    rpn_cls: Conv,
    rpn_reg: Conv,
    config: Config,
}

/// The predictions for each anchor.
#[derive(Debug)]
pub struct Predictions {
    /// For each level, logits `[B, A]`, A anchors in order of rows, columns, ratios.
    pub objectness: Vec<Tensor>,
    /// For each level, `[B, A, 4]`.
    pub deltas: Vec<Tensor>,
    /// For each level, its anchors.
    anchors: Vec<Vec<Corners>>,
    cells: Vec<Cells>,
}

/// The proposals of an image, best first.
#[derive(Debug)]
pub struct Proposals {
    /// f32 `[N, 4]` on the CPU, px, within the image.
    pub boxes: Tensor,
    /// f32 `[N]` on the CPU, in (0, 1).
    pub scores: Tensor,
}

/// The losses of the network, f32 scalars.
#[derive(Debug)]
pub struct Losses {
    /// Cross entropy of objectness.
    pub objectness: Tensor,
    /// The part of it that anchors with an object have: what images of the web, whose other objects nobody knows, may teach. (PromptDet, section 9.4.)
    pub objectness_of_objects: Tensor,
    /// The differences of deltas.
    pub boxes: Tensor,
}

impl Rpn {
    pub(crate) fn declare(at: &Parameters<'_>, config: &Config, channels: i64) -> Self {
        let n_ratios = config.anchors.ratios.len() as i64;
        // mmdet begins all three with a standard deviation of 0.01.
        let conv = |name: &str, n_out, side| Conv::with_bias(&(at / name), ConvShape::new(channels, n_out, side), Init::Normal(0.01));
        Self {
            rpn_conv: conv("rpn_conv", channels, 3),
            rpn_cls: conv("rpn_cls", n_ratios, 1),
            rpn_reg: conv("rpn_reg", 4 * n_ratios, 1),
            config: config.clone(),
        }
    }

    /// Looks at every anchor.
    ///
    /// `pyramid`: P2 to P6; `batch`: height and width of the images, padding included, px.
    pub(crate) fn forward(&self, pyramid: &[Tensor; N_LEVELS], batch: [i64; 2]) -> Predictions {
        let mut predictions = Predictions { objectness: vec![], deltas: vec![], anchors: vec![], cells: vec![] };
        for (place, level) in pyramid.iter().enumerate() {
            let (b, _, height, width) = level.size4().expect("BUG: a level of a pyramid is [B, C, h, w]");
            let hidden = self.rpn_conv.forward(level).relu();
            // Rows, columns, ratios.
            predictions.objectness.push(self.rpn_cls.forward(&hidden).permute([0, 2, 3, 1]).reshape([b, -1]));
            predictions.deltas.push(self.rpn_reg.forward(&hidden).permute([0, 2, 3, 1]).reshape([b, -1, 4]));
            let cells = Cells { height, width, stride: FINEST_STRIDE << place };
            predictions.anchors.push(self.config.anchors.of_level(cells, batch));
            predictions.cells.push(cells);
        }
        predictions
    }

    /// Makes proposals for each image, without gradients.
    ///
    /// `sizes`: of each image, without padding.
    pub fn proposals(&self, predictions: &Predictions, sizes: &[ImageSize], rule: &ProposalRule) -> Result<Vec<Proposals>> {
        check_count("image sizes", predictions.objectness[0].size()[0], sizes.len())?;
        tch::no_grad(|| {
            sizes.iter().enumerate().map(|(image, &size)| self.proposals_of_image(predictions, image as i64, size, rule)).collect()
        })
    }

    fn proposals_of_image(&self, predictions: &Predictions, image: i64, size: ImageSize, rule: &ProposalRule) -> Result<Proposals> {
        let (mut boxes, mut scores, mut levels) = (vec![], vec![], vec![]);
        for (level, anchors) in predictions.anchors.iter().enumerate() {
            let logits = predictions.objectness[level].get(image);
            let (logits, best) = logits.topk((rule.per_level as i64).min(logits.size()[0]), 0, true, true);
            let deltas = predictions.deltas[level].get(image).index_select(0, &best);
            // From here on there is little work for a device, and much for plain loops.
            let [logits, deltas] = [logits, deltas].map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Float));
            let anchors: Vec<Corners> = integers(&best).into_iter().map(|place| anchors[place as usize]).collect();
            boxes.push(clip_to_image(&self.config.coder.decode(&boxes_tensor(&anchors), &deltas)?, size));
            scores.push(logits.sigmoid());
            levels.push(Tensor::full([anchors.len() as i64], level as i64, (Kind::Int64, Device::Cpu)));
        }
        let [boxes, scores, levels] = [boxes, scores, levels].map(|parts| Tensor::cat(&parts, 0));
        let sides = boxes.narrow(1, 2, 2) - boxes.narrow(1, 0, 2);
        let is_large = sides.gt(f64::from(rule.least_side)).all_dim(1, false).nonzero().squeeze_dim(1);
        let [boxes, scores, levels] = [boxes, scores, levels].map(|all| all.index_select(0, &is_large));
        let kept = Tensor::from_slice(&rule.suppression.of_groups(&boxes, &scores, &levels)?);
        Ok(Proposals { boxes: boxes.index_select(0, &kept), scores: scores.index_select(0, &kept) })
    }

    /// Computes the losses against the objects of each image; `rng` samples the anchors.
    ///
    /// `sizes`: of each image, without padding.
    pub fn losses(&self, predictions: &Predictions, sizes: &[ImageSize], truths: &[Truth], rng: &mut ChaCha8Rng) -> Result<Losses> {
        let b = predictions.objectness[0].size()[0];
        check_count("image sizes", b, sizes.len())?;
        check_count("images with objects", b, truths.len())?;
        let n_anchors = predictions.anchors.iter().map(Vec::len).sum::<usize>();
        let (mut positive, mut all, mut labels) = (vec![], vec![], vec![]);
        let (mut from, mut to) = (vec![], vec![]);
        for (image, (&size, truth)) in sizes.iter().zip(truths).enumerate() {
            let objects = corners(&truth.objects, "objects")?;
            let places = predictions.learned_from(size, self.config.learning.reach);
            let anchors: Vec<Corners> = places.iter().map(|&(_, anchor)| anchor).collect();
            let mut matches = self.config.assigner.assign_claims(&anchors, &objects, self.config.learning.claim);
            truth.ignore_crowded(&anchors, &mut matches)?;
            let sample = self.config.sampler.draw(&matches, rng);
            let row = |&place: &usize| (image * n_anchors + places[place].0) as i64;
            positive.extend(sample.objects.iter().map(row));
            all.extend(sample.objects.iter().chain(&sample.background).map(row));
            labels.extend(sample.objects.iter().map(|_| 1.0_f32).chain(sample.background.iter().map(|_| 0.0)));
            for &place in &sample.objects {
                if let Match::Object(object) = matches[place] {
                    from.push(anchors[place]);
                    to.push(objects[object]);
                }
            }
        }
        let objectness = Tensor::cat(&predictions.objectness, 1).flatten(0, 1).to_kind(Kind::Float);
        let deltas = Tensor::cat(&predictions.deltas, 1).flatten(0, 1).to_kind(Kind::Float);
        let on_device = |tensor: Tensor| tensor.to_device(objectness.device());
        let targets = on_device(self.config.coder.encode(&boxes_tensor(&from), &boxes_tensor(&to))?);
        let logits = objectness.index_select(0, &on_device(Tensor::from_slice(&all)));
        let labels_of = on_device(Tensor::from_slice(&labels));
        let [objectness_loss, of_objects] = objectness_losses(&logits, &labels_of);
        let deltas = deltas.index_select(0, &on_device(Tensor::from_slice(&positive)));
        let differences = self.config.learning.box_loss.between(&deltas, &targets);
        Ok(Losses { objectness: objectness_loss, objectness_of_objects: of_objects, boxes: sum_over(&differences, all.len()) })
    }
}

/// The cross entropy of sampled anchors, and the part of it that those with an object have, both divided by the number of all.
///
/// `logits`, `labels`: f32 `[N]`, 1 for an object.
fn objectness_losses(logits: &Tensor, labels: &Tensor) -> [Tensor; 2] {
    let entropy = logits.binary_cross_entropy_with_logits(labels, None::<&Tensor>, None::<&Tensor>, Reduction::None);
    [sum_over(&entropy, entropy.numel()), sum_over(&(&entropy * labels), entropy.numel())]
}

impl Predictions {
    /// The anchors that an image teaches, with their places among all anchors.
    fn learned_from(&self, size: ImageSize, reach: Reach) -> Vec<(usize, Corners)> {
        if reach == Reach::Batch {
            return self.anchors.iter().flatten().copied().enumerate().collect();
        }
        let mut covered = Vec::new();
        let mut first = 0;
        for (cells, anchors) in self.cells.iter().zip(&self.anchors) {
            let covers = |side: i64| ((side + PADDING - 1) / PADDING * PADDING + cells.stride - 1) / cells.stride;
            let (height, width) = (covers(size.height), covers(size.width));
            let n_ratios = anchors.len() / (cells.height * cells.width) as usize;
            covered.extend(anchors.iter().enumerate().filter_map(|(place, &anchor)| {
                let cell = (place / n_ratios) as i64;
                (cell / cells.width < height && cell % cells.width < width).then_some((first + place, anchor))
            }));
            first += anchors.len();
        }
        covered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{error, promptdet};

    /// PromptDet's own code on the anchors of one level, eight of them sampled, with and without those that show background.
    #[test]
    fn losses_of_objects_alone_are_those_of_promptdet_s_code() {
        let golden = promptdet("promptdet");
        let scores = golden["rpn/scores_nchw"].copy().set_requires_grad(true);
        // Flattened as (h, w, anchor).
        let flat = scores.permute([0, 2, 3, 1]).flatten(0, -1);
        let sampled = golden["rpn/weight"].flatten(0, -1).gt(0.0).nonzero().squeeze_dim(1);
        assert_eq!(sampled.size(), [8]);
        let labels = golden["rpn/is_positive"].flatten(0, -1).to_kind(Kind::Float).index_select(0, &sampled);
        let losses = objectness_losses(&flat.index_select(0, &sampled), &labels);
        for (ignored, loss) in losses.iter().enumerate() {
            assert!(error(loss, &golden[&format!("rpn/loss_ignore_neg_{ignored}")]) < 1e-5);
            let gradient = Tensor::run_backward(&[loss], &[&scores], true, false).remove(0);
            assert!(error(&gradient, &golden[&format!("rpn/grad_ignore_neg_{ignored}")]) < 1e-5);
        }
    }
}
