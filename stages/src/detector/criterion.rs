//! The losses of a two-stage detector: base classes and boxes, masks, and CLIP's embeddings of proposals, blocks and whole images.
//!
//! Written after OADP's distillation pyramid (Wang et al. 2023; methods, sections 6.3 and 6.4).

use std::{collections::BTreeMap, ops::Range};

use ovenbird_data::training::ShownMask;
use ovenbird_models::{
    Phase,
    detection::{
        boxes::{BoxLoss, ImageSize, Suppression},
        matching::{Assigner, Sampler, Truth},
    },
    multilabel::asymmetric_loss,
    ral::{self, BatchNorm, Ral},
    rcnn::{
        Detector,
        classifier::{LogitScale, Vocabulary},
        distillation::{embedding_loss, image_embedding_loss, mean_over_groups, recall, relation_loss},
        heads::{OpenHead, RegionRule, RegionSample, region_losses},
        mask_head::{MaskConfig, MaskHead, MaskRule, ObjectMask, mask_loss},
        regions::{Pyramid, REGION_CODER, RegionNetwork},
        rpn::{self, ProposalRule, Proposals},
    },
};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, nn, no_grad};

use super::{
    batches::{Batch, RegionTargets, TrainingImage, boxes},
    classes::ClassTables,
    distillation::Distillation,
    spec::{DetectorSpec, MaskRcnnSpec},
    training::Training,
};
use crate::{
    Result,
    training::{Criterion, Losses, Parameter, Weights},
};

/// The proposals in training.
pub(super) const PROPOSALS: ProposalRule =
    ProposalRule { per_level: 2000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 };
/// Recall is taken of so many of the best classes of a block, and of an image.
const BLOCK_BEST: i64 = 5;
const IMAGE_BEST: i64 = 20;

/// How regions of many objects (`iscrowd`) count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Crowds {
    /// As background, as in OADP and most detectors. (Defect 13 in docs/recipes/oadp.md.)
    #[default]
    Background,
    /// Not at all: boxes with half of their area in a crowd that match no object are left out of the losses.
    Ignored,
}

/// A two-stage detector in training.
pub(super) struct MaskRcnnCriterion {
    detector: Detector,
    spec: MaskRcnnSpec,
    classes: ClassTables,
    /// The classes for the global head.
    global_classes: Vocabulary,
    /// Which regions are sampled for the heads.
    rule: RegionRule,
    crowds: Crowds,
    distillation: Distillation,
    /// Retrieved words that the embeddings of objects are kept apart from.
    ral: Option<Ral>,
    training: Training,
    /// Owns the weights.
    store: nn::VarStore,
}

impl MaskRcnnCriterion {
    /// A detector with initial weights. `rule`: which regions are sampled for the heads.
    pub(super) fn new(
        spec: MaskRcnnSpec,
        classes: ClassTables,
        rule: RegionRule,
        crowds: Crowds,
        (distillation, ral): (&Distillation, Option<Ral>),
        training: &Training,
        device: Device,
    ) -> Result<Self> {
        let global_classes = match classes.image.scale() {
            LogitScale::Temperature { test, .. } => {
                let scale = LogitScale::Temperature { train: distillation.global_temperature, test };
                Vocabulary::new(classes.image.embeddings().shallow_clone(), classes.image.n_base(), scale)?
            }
            LogitScale::Affine { .. } => classes.image.clone(),
        };
        let store = nn::VarStore::new(device);
        let detector = Detector::new(&store.root(), &spec.config, training.seed)?;
        let (distillation, training) = (distillation.clone(), training.clone());
        Ok(Self { detector, spec, classes, global_classes, rule, crowds, distillation, ral, training, store })
    }

    /// Every tensor of the detector by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        self.detector.parameters()
    }
}

impl Criterion for MaskRcnnCriterion {
    type Batch = Batch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        self.training.grouped(self.tensors())
    }

    fn losses(&self, step: u32, batch: Batch) -> Result<Losses> {
        let mut random = batch.random.clone();
        let images = batch.pixels.on(self.store.device()).to_kind(self.training.precision.kind());
        let pyramid = self.detector.regions.forward(&images, Phase::Train)?;
        // Weights of losses count steps from 1.
        let step = step + 1;
        let mut losses = Losses::default();
        let samples = self.base_classes(&pyramid, &batch, &mut random, &mut losses)?;
        self.masks(&pyramid, &batch, &samples, &mut losses)?;
        self.proposals(&pyramid, &batch, step, &mut losses)?;
        self.images(&pyramid, &batch, step, &mut losses)?;
        self.blocks(&pyramid, &batch, step, &mut losses)?;
        self.words(&pyramid, &batch, &mut random, &mut losses)?;
        Ok(losses)
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: DetectorSpec::MaskRcnn(self.spec.clone()).metadata() })
    }
}

impl MaskRcnnCriterion {
    /// The losses of every detector: boxes and base classes. Returns the sampled regions.
    fn base_classes(&self, pyramid: &Pyramid, batch: &Batch, random: &mut ChaCha8Rng, losses: &mut Losses) -> Result<Vec<RegionSample>> {
        let Detector { regions: network, bbox_head, .. } = &self.detector;
        let (rpn, samples) = sampled(network, pyramid, batch, (&self.rule, self.crowds), self.classes.text.n_classes(), random)?;
        let chosen: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let said = bbox_head.forward(&pyramid.pool(&self.spec.config.pool, &chosen)?, Phase::Train)?;
        let logits = bbox_head.classifier.logits(&said.embeddings, &self.classes.text, Phase::Train)?;
        let deltas = said.deltas.expect("BUG: the box head has boxes");
        let of_regions = region_losses(BoxLoss::Absolute, &logits, &deltas, &samples)?;
        losses.terms.extend([
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", of_regions.classes),
            ("boxes", of_regions.boxes),
        ]);
        Ok(samples)
    }

    /// The loss of masks within the regions that match objects.
    fn masks(&self, pyramid: &Pyramid, batch: &Batch, samples: &[RegionSample], losses: &mut Losses) -> Result<()> {
        let (Some(head), Some(config)) = (&self.detector.mask_head, &self.spec.config.mask_head) else { return Ok(()) };
        losses.terms.push(("masks", loss_of_masks(head, config, pyramid, batch, samples)?));
        Ok(())
    }

    /// The loss of CLIP's embeddings of proposals.
    fn proposals(&self, pyramid: &Pyramid, batch: &Batch, step: u32, losses: &mut Losses) -> Result<()> {
        let Some(head) = &self.detector.object_head else { return Ok(()) };
        let Compared { said, expected, n_rows } = self.compare(head, pyramid, batch, |image| &image.proposals)?;
        let apart = self.over_groups(embedding_loss, [&said, &expected], &n_rows)?;
        losses.terms.push(("objects", apart * self.distillation.objects.at(step)));
        Ok(())
    }

    /// The losses of CLIP's embeddings of whole images and of the classes that these show.
    fn images(&self, pyramid: &Pyramid, batch: &Batch, step: u32, losses: &mut Losses) -> Result<()> {
        let Some(head) = &self.detector.global_head else { return Ok(()) };
        let said = head.embed(&pyramid.levels[pyramid.levels.len() - 1])?;
        let expected = rows_of(batch.images.iter().map(|image| image.embedding.as_slice()), said.size()[1], said.device());
        let logits = head.classifier.logits(&said, &self.global_classes, Phase::Train)?;
        let labels = labels(batch.images.iter().map(|image| image.classes.as_slice()), logits.size()[1], logits.device());
        let n_rows = vec![1; batch.images.len()];
        let apart = self.over_groups(image_embedding_loss, [&said, &expected], &n_rows)?;
        let wrong = self.over_groups(asymmetric_loss, [&logits, &labels], &n_rows)?;
        let weights = &self.distillation;
        losses.terms.push(("globals", apart * weights.globals.at(step)));
        losses.terms.push(("global_labels", wrong * weights.label_weight(weights.global_labels, step)));
        losses.measures.push(("recall.globals", recall(&logits, &labels, IMAGE_BEST)));
        Ok(())
    }

    /// The losses of CLIP's embeddings of blocks, of the cosines among them, and of the classes that they show.
    fn blocks(&self, pyramid: &Pyramid, batch: &Batch, step: u32, losses: &mut Losses) -> Result<()> {
        let Some(head) = &self.detector.block_head else { return Ok(()) };
        let Compared { said, expected, n_rows } = self.compare(head, pyramid, batch, |image| &image.blocks)?;
        let logits = head.classifier.logits(&said, &self.classes.image, Phase::Train)?;
        let classes = batch.images.iter().flat_map(|image| image.block_classes.iter().map(Vec::as_slice));
        let labels = labels(classes, logits.size()[1], logits.device());
        let apart = self.over_groups(embedding_loss, [&said, &expected], &n_rows)?;
        let askew = self.over_groups(relation_loss, [&said, &expected], &n_rows)?;
        let wrong = self.over_groups(asymmetric_loss, [&logits, &labels], &n_rows)?;
        let weights = &self.distillation;
        losses.terms.push(("blocks", apart * weights.blocks.at(step)));
        losses.terms.push(("relations", askew * weights.relation_loss.at(step)));
        losses.terms.push(("block_labels", wrong * weights.label_weight(weights.block_labels, step)));
        losses.measures.push(("recall.blocks", recall(&logits, &labels, BLOCK_BEST)));
        Ok(())
    }

    /// The losses of annotated objects against retrieved words. (RALF, section 7.)
    fn words(&self, pyramid: &Pyramid, batch: &Batch, random: &mut ChaCha8Rng, losses: &mut Losses) -> Result<()> {
        let Some(ral) = &self.ral else { return Ok(()) };
        let labels: Vec<i64> = batch.images.iter().flat_map(|image| &image.classes).map(|class| *class as i64).collect();
        if labels.is_empty() {
            return Ok(());
        }
        let on: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.objects)).collect();
        let pooled = pyramid.pool(&self.spec.config.pool, &on)?;
        let said = match ral.config().batch_norm {
            BatchNorm::Reference => self.detector.bbox_head.forward(&pooled, Phase::Train)?,
            BatchNorm::BatchOnly => {
                let running =
                    self.tensors().iter().filter(|(name, _)| name.starts_with("roi_head.bbox_head.") && name.contains(".running_"));
                let before: Vec<(&Tensor, Tensor)> = running.map(|(_, tensor)| (tensor, tensor.copy())).collect();
                let said = self.detector.bbox_head.forward(&pooled, Phase::Train)?;
                // By a view that autograd does not watch: the pass before has yet to be differentiated.
                no_grad(|| before.into_iter().for_each(|(tensor, before)| tensor.data().copy_(&before)));
                said
            }
        };
        let drawn = ral.draw(&labels, random)?;
        let labels = Tensor::from_slice(&labels);
        let n_rows: Vec<i64> = batch.images.iter().map(|image| image.objects.len() as i64).collect();
        let of_group = |rows: Range<i64>, loss: fn(ral::Losses) -> Tensor| {
            let part = |of: &Tensor| of.narrow(0, rows.start, rows.end - rows.start);
            let drawn = drawn.of(rows.start as usize..rows.end as usize);
            Ok(loss(ral.losses(&part(&said.embeddings), &part(&labels), &drawn)?))
        };
        let mean = |loss| mean_over_groups(&n_rows, self.distillation.images_per_group, |rows| of_group(rows, loss));
        losses.terms.extend([("hard_words", mean(|losses| losses.hard)?), ("easy_words", mean(|losses| losses.easy)?)]);
        let [hard, easy] = ral.losses(&said.embeddings.detach(), &labels, &drawn)?.active;
        losses.measures.extend([("active.hard_words", hard), ("active.easy_words", easy)]);
        Ok(())
    }

    /// The embeddings of the regions of all images, by a head and by CLIP.
    fn compare(
        &self,
        head: &OpenHead,
        pyramid: &Pyramid,
        batch: &Batch,
        regions: fn(&TrainingImage) -> &RegionTargets,
    ) -> Result<Compared> {
        let shown: Vec<&RegionTargets> = batch.images.iter().map(regions).collect();
        let on: Vec<Tensor> = shown.iter().map(|shown| boxes(&shown.boxes)).collect();
        let said = head.forward(&pyramid.pool(&self.spec.config.pool, &on)?, Phase::Train)?.embeddings;
        let expected = rows_of(shown.iter().map(|shown| shown.embeddings.as_slice()), said.size()[1], said.device());
        Ok(Compared { said, expected, n_rows: shown.iter().map(|shown| shown.boxes.len() as i64).collect() })
    }

    /// The mean over groups of images of a loss between predictions and targets, both with rows in the order of the images.
    fn over_groups(&self, loss: Loss, [said, expected]: [&Tensor; 2], n_rows: &[i64]) -> Result<Tensor> {
        let of_rows = |Range { start, end }: Range<i64>| {
            let part = |of: &Tensor| of.narrow(0, start, end - start);
            loss(&part(said), &part(expected))
        };
        Ok(mean_over_groups(n_rows, self.distillation.images_per_group, of_rows)?)
    }
}

/// Which regions are sampled for the heads: so many of an image, of which at most a quarter match an object with an IoU of 0.5.
pub(super) fn region_rule(n_regions: usize, background_per_object: Option<usize>) -> RegionRule {
    RegionRule {
        assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
        sampler: Sampler { n: n_regions, object_fraction: 0.25, background_per_object },
        coder: REGION_CODER,
    }
}

/// The loss of masks within the regions that match objects, of a head with one mask for all classes.
pub(super) fn loss_of_masks(
    head: &MaskHead,
    config: &MaskConfig,
    pyramid: &Pyramid,
    batch: &Batch,
    samples: &[RegionSample],
) -> Result<Tensor> {
    let (mut on_objects, mut expected) = (Vec::new(), Vec::new());
    for (sample, image) in samples.iter().zip(&batch.images) {
        let boxes = sample.boxes.narrow(0, 0, sample.objects.len() as i64);
        let masks: Vec<ObjectMask> = image.masks.iter().map(object_mask).collect();
        expected.push(MaskRule::MMDET.targets(&masks, &boxes, &sample.objects, 2 * config.pool.side)?);
        on_objects.push(boxes);
    }
    // The classes do not matter.
    let classes = vec![0; samples.iter().map(|sample| sample.objects.len()).sum()];
    let drawn = head.forward(&pyramid.pool(&config.pool, &on_objects)?, &classes)?;
    Ok(mask_loss(&drawn, &Tensor::cat(&expected, 0))?)
}

/// An image with the objects that it teaches.
pub(super) struct Taught {
    pub(super) size: ImageSize,
    pub(super) truth: Truth,
    /// The class of each object.
    pub(super) classes: Vec<i64>,
}

/// The losses of the proposal network, and the regions of each image that are sampled for the heads, of `n_classes` classes.
pub(super) fn sampled(
    network: &RegionNetwork,
    pyramid: &Pyramid,
    batch: &Batch,
    (rule, crowds): (&RegionRule, Crowds),
    n_classes: i64,
    random: &mut ChaCha8Rng,
) -> Result<(rpn::Losses, Vec<RegionSample>)> {
    let taught = |image: &TrainingImage| Taught {
        size: image.size,
        truth: truth(image, crowds),
        classes: image.classes.iter().map(|class| *class as i64).collect(),
    };
    let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
    let proposals = network.rpn.proposals(&pyramid.predictions, &sizes, &PROPOSALS)?;
    sampled_among(network, pyramid, &proposals, batch.images.iter().map(taught).collect(), rule, n_classes, random)
}

/// The same among given proposals.
pub(super) fn sampled_among(
    network: &RegionNetwork,
    pyramid: &Pyramid,
    proposals: &[Proposals],
    images: Vec<Taught>,
    rule: &RegionRule,
    n_classes: i64,
    random: &mut ChaCha8Rng,
) -> Result<(rpn::Losses, Vec<RegionSample>)> {
    let sizes: Vec<ImageSize> = images.iter().map(|image| image.size).collect();
    let (truths, classes): (Vec<Truth>, Vec<Vec<i64>>) = images.into_iter().map(|image| (image.truth, image.classes)).unzip();
    let losses = network.rpn.losses(&pyramid.predictions, &sizes, &truths, random)?;
    let mut samples = Vec::new();
    for ((found, truth), classes) in proposals.iter().zip(&truths).zip(classes) {
        samples.push(rule.choose(&found.boxes, truth, &Tensor::from_slice(&classes), n_classes, random)?);
    }
    Ok((losses, samples))
}

/// The objects on an image, and its crowds if they are ignored.
fn truth(image: &TrainingImage, crowds: Crowds) -> Truth {
    let objects = boxes(&image.objects);
    match crowds {
        Crowds::Background => objects.into(),
        Crowds::Ignored => Truth { objects, crowds: boxes(&image.crowds) },
    }
}

type Loss = fn(&Tensor, &Tensor) -> ovenbird_models::Result<Tensor>;

/// Embeddings of the same regions, image after image.
struct Compared {
    /// By the head, f32 `[N, D]`.
    said: Tensor,
    /// By CLIP, f32 `[N, D]`.
    expected: Tensor,
    /// The number of regions of each image.
    n_rows: Vec<i64>,
}

/// `[N, D]`.
pub(super) fn rows_of<'a>(parts: impl Iterator<Item = &'a [f32]>, dim: i64, device: Device) -> Tensor {
    let numbers: Vec<f32> = parts.flatten().copied().collect();
    Tensor::from_slice(&numbers).view([-1, dim]).to_device(device)
}

/// `[N, K]`: 1 where a row shows a class, else 0.
fn labels<'a>(classes: impl Iterator<Item = &'a [usize]>, n_classes: i64, device: Device) -> Tensor {
    let mut numbers = Vec::new();
    for shown in classes {
        let first = numbers.len();
        numbers.resize(first + n_classes as usize, 0.0_f32);
        for class in shown {
            numbers[first + class] = 1.0;
        }
    }
    Tensor::from_slice(&numbers).view([-1, n_classes]).to_device(device)
}

fn object_mask(mask: &ShownMask) -> ObjectMask {
    let [[left, top], [width, height]] = [mask.from, mask.size].map(|pair| pair.map(i64::from));
    ObjectMask { pixels: Tensor::from_slice(&mask.pixels).view([height, width]), left, top }
}

#[cfg(test)]
mod tests {
    use ovenbird_data::{annotations::ImageId, boxes::Xyxy};
    use ovenbird_models::rcnn::Config;

    use super::*;
    use crate::golden::unit;

    #[test]
    fn crowds_are_background_or_ignored() {
        let image = TrainingImage {
            id: ImageId(1),
            size: ImageSize { width: 90, height: 60 },
            objects: vec![Xyxy { x1: 1.0, y1: 2.0, x2: 30.0, y2: 40.0 }],
            crowds: vec![Xyxy { x1: 40.0, y1: 2.0, x2: 90.0, y2: 60.0 }],
            classes: vec![0],
            masks: Vec::new(),
            proposals: RegionTargets::default(),
            blocks: RegionTargets::default(),
            block_classes: Vec::new(),
            embedding: Vec::new(),
        };
        for (crowds, ignored) in [(Crowds::Background, boxes(&[])), (Crowds::Ignored, boxes(&image.crowds))] {
            let found = truth(&image, crowds);
            assert_eq!((found.objects, found.crowds), (boxes(&image.objects), ignored));
        }
    }

    /// A criterion after one step's losses, and these.
    fn after_a_step(ral: Option<ral::Config>) -> (MaskRcnnCriterion, Losses) {
        let table = |n: i64, name: &str| {
            let numbers: Vec<f32> = unit(name, n as usize * 16).collect();
            ovenbird_models::to_unit_length(&Tensor::from_slice(&numbers).view([n, 16]))
        };
        let scale = LogitScale::Temperature { train: 0.02, test: 0.02 };
        let text = Vocabulary::new(table(4, "ral/classes"), 3, scale).unwrap();
        let config = Config { object_head: None, block_head: None, has_global_head: false, ..Config::toy(16) };
        let spec = MaskRcnnSpec { config, fits: [96, 64], has_prompts: true, has_multilabel_prompts: false, scale, clip: None };
        let words = |first: u32| (0..4).map(|class| (0..10).map(|word| first + 10 * class + word).collect()).collect();
        let negatives =
            || ral::Negatives { anchors: table(4, "ral/anchors"), words: table(80, "ral/words"), hard: words(0), easy: words(40) };
        let criterion = MaskRcnnCriterion::new(
            spec,
            ClassTables { image: text.clone(), text },
            region_rule(64, None),
            Crowds::Background,
            (&Distillation::default(), ral.map(|config| Ral::new(config, negatives()).unwrap())),
            &Training::default(),
            Device::Cpu,
        )
        .unwrap();
        let losses = criterion.losses(0, Batch::of_two()).unwrap();
        let all: Vec<&Tensor> = losses.terms.iter().map(|(_, term)| term).collect();
        Tensor::stack(&all, 0).sum(tch::Kind::Float).backward();
        (criterion, losses)
    }

    /// RALF's parity check 23: without weight, and with statistics of the sampled regions alone, RAL changes no bit of gradients and statistics; the
    /// reference changes the statistics of the box head all the same (its defect 20).
    #[test]
    fn ral_without_weight_is_no_ral_but_for_the_statistics_of_the_reference() {
        let (plain, _) = after_a_step(None);
        let none = ral::Config { beta_sim: 0.0, beta_dis: 0.0, ..ral::Config::default() };
        for (batch_norm, changes) in [(BatchNorm::BatchOnly, false), (BatchNorm::Reference, true)] {
            let (with, losses) = after_a_step(Some(ral::Config { batch_norm, ..none }));
            assert!(losses.terms.iter().any(|(name, _)| *name == "easy_words"));
            let mut changed = Vec::new();
            for (name, tensor) in with.tensors() {
                let before = &plain.tensors()[name];
                if !tensor.equal(before) {
                    changed.push(name.as_str());
                }
                let gradients = [tensor, before].map(Tensor::grad);
                assert_eq!(gradients[0].defined(), gradients[1].defined(), "{name}");
                assert!(!gradients[0].defined() || gradients[0].equal(&gradients[1]), "{name}");
            }
            assert!(changed.iter().all(|name| name.starts_with("roi_head.bbox_head.") && name.contains(".running_")), "{changed:?}");
            assert_eq!(!changed.is_empty(), changes, "{batch_norm:?}");
        }
    }

    #[test]
    fn ral_teaches_the_box_head_and_what_is_below() {
        let ((plain, _), (with, losses)) = (after_a_step(None), after_a_step(Some(ral::Config::default())));
        let value = |wanted: &str| losses.terms.iter().find(|(name, _)| *name == wanted).unwrap().1.double_value(&[]);
        assert!(value("hard_words") >= 0.0 && value("easy_words") > 0.0);
        for name in ["roi_head.bbox_head.fc_cls._linear.weight", "roi_head.bbox_head.shared_fcs.0.weight", "backbone.layer4.0.conv1.weight"]
        {
            assert!(!with.tensors()[name].grad().equal(&plain.tensors()[name].grad()), "{name}");
        }
        // Background has no part in it.
        let name = "roi_head.bbox_head.fc_cls._bg_embedding";
        assert!(with.tensors()[name].grad().equal(&plain.tensors()[name].grad()));
    }
}
