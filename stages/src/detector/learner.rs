//! What an open detector learns from a batch: base classes and boxes, and what CLIP says of proposals, blocks and whole images.
//!
//! Written after OADP's distillation pyramid (Wang et al. 2023; methods, sections 6.3 and 6.4).

use std::{collections::BTreeMap, ops::Range};

use ovenbird_data::{boxes::Xyxy, training::ShownMask};
use ovenbird_models::{
    Misfit, Phase,
    detection::{
        boxes::{BoxLoss, ImageSize, Suppression, boxes_tensor},
        matching::{Assigner, Sampler, Truth},
    },
    multilabel::asymmetric_loss,
    rcnn::{
        Detector,
        classifier::{LogitScale, Vocabulary},
        distillation::{embedding_loss, image_embedding_loss, mean_over_groups, recall, relation_loss},
        heads::{OpenHead, RegionRule, RegionSample, region_losses},
        layout,
        mask_head::{MaskRule, ObjectMask, mask_loss},
        regions::{Pyramid, REGION_CODER},
        rpn::ProposalRule,
    },
};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor, nn};

use super::{
    CLASSES, Card, ClassTables, PRETRAINED, class_embeddings,
    train::{Crowds, Distillation, Train},
    training::{Assessment, Batch, Learner, Shown, ShownRegions},
};
use crate::{
    Context, Result, Unit,
    artifacts::{Classes, read_weights},
};

/// Which proposals are made in training.
const PROPOSALS: ProposalRule = ProposalRule { per_level: 2000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 };
/// Of how many of the best classes of a block, and of an image, the recall is taken.
const BLOCK_BEST: i64 = 5;
const IMAGE_BEST: i64 = 20;

/// A detector that learns.
pub(super) struct OpenLearner {
    detector: Detector,
    pub(super) card: Card,
    tables: ClassTables,
    /// Classes as the global head compares with them.
    of_images: Vocabulary,
    /// Which regions are learned from.
    rule: RegionRule,
    crowds: Crowds,
    distillation: Distillation,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl OpenLearner {
    pub(super) fn begin(stage: &Train, units: &[Unit], cx: &Context<'_>) -> Result<Self> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let embeddings = class_embeddings(cx.inputs, &classes)?;
        let card = stage.card(embeddings.size()[1], cx.inputs)?;
        let tables = card.tables(embeddings, cx.inputs, &classes, cx.device)?;
        let of_images = match tables.image.scale() {
            LogitScale::Temperature { test, .. } => {
                let scale = LogitScale::Temperature { train: stage.distillation.global_temperature, test };
                Vocabulary::new(tables.image.embeddings().shallow_clone(), tables.image.n_base(), scale)?
            }
            LogitScale::Affine { .. } => tables.image.clone(),
        };
        let store = nn::VarStore::new(cx.device);
        let detector = Detector::new(&store.root(), &card.config, stage.training.seed)?;
        begin_with_pretrained(detector.parameters(), units, cx)?;
        let rule = RegionRule {
            assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
            sampler: Sampler { n: stage.network.regions_per_image(), object_fraction: 0.25 },
            coder: REGION_CODER,
        };
        let (crowds, distillation) = (stage.crowds, stage.distillation.clone());
        Ok(Self { detector, card, tables, of_images, rule, crowds, distillation, _store: store })
    }
}

/// Lays the checkpoint at the port `pretrained`, if there is one, over a network whose training is about to begin, and says what did not fit.
/// A training that goes on has weights of its own.
pub(super) fn begin_with_pretrained(parameters: &BTreeMap<String, Tensor>, units: &[Unit], cx: &Context<'_>) -> Result<()> {
    if units.first().is_none_or(|unit| unit.index > 0) {
        return Ok(());
    }
    let Some(file) = cx.inputs.read_if_given(PRETRAINED)? else { return Ok(()) };
    let report = layout::load(read_weights(&file.file)?.tensors(), parameters, &file.file.path)?;
    let names = |misfits: &[Misfit]| misfits.iter().map(|misfit| misfit.name.as_str()).collect::<Vec<_>>().join(", ");
    cx.note(format!("begins with {} tensors of {}", report.loaded.len(), file.file.path.display()));
    report.place.note().into_iter().for_each(|words| cx.note(words));
    for (what, misfits) in [
        ("begin without them, which are not in the file", &report.missing),
        ("of the file have no place in the network", &report.unmatched),
        ("have another shape in the file, and begin without it", &report.misshaped),
    ] {
        if !misfits.is_empty() {
            cx.note(format!("{} tensors {what}: {}", misfits.len(), names(misfits)));
        }
    }
    Ok(())
}

impl Learner for OpenLearner {
    fn parameters(&self) -> &BTreeMap<String, Tensor> {
        self.detector.parameters()
    }

    fn assess(&self, images: &Tensor, batch: &Batch, random: &mut ChaCha8Rng) -> Result<Assessment> {
        let pyramid = self.detector.regions.forward(images, Phase::Train)?;
        let mut assessment = Assessment::default();
        let samples = self.base_classes(&pyramid, batch, random, &mut assessment)?;
        self.masks(&pyramid, batch, &samples, &mut assessment)?;
        self.proposals(&pyramid, batch, &mut assessment)?;
        self.images(&pyramid, batch, &mut assessment)?;
        self.blocks(&pyramid, batch, &mut assessment)?;
        Ok(assessment)
    }
}

impl OpenLearner {
    /// Boxes, and which base classes they show: what every detector learns.
    fn base_classes(
        &self,
        pyramid: &Pyramid,
        batch: &Batch,
        random: &mut ChaCha8Rng,
        assessment: &mut Assessment,
    ) -> Result<Vec<RegionSample>> {
        let Detector { regions: network, bbox_head, .. } = &self.detector;
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
        let truths: Vec<Truth> = batch.images.iter().map(|image| truth(image, self.crowds)).collect();
        let rpn = network.rpn.losses(&pyramid.predictions, &sizes, &truths, random)?;
        let proposals = network.rpn.proposals(&pyramid.predictions, &sizes, &PROPOSALS)?;
        let mut samples = Vec::new();
        for ((found, truth), image) in proposals.iter().zip(&truths).zip(&batch.images) {
            let classes = Tensor::from_slice(&image.classes.iter().map(|class| *class as i64).collect::<Vec<_>>());
            samples.push(self.rule.choose(&found.boxes, truth, &classes, self.tables.text.n_classes(), random)?);
        }
        let chosen: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let said = bbox_head.forward(&pyramid.pool(&self.card.config.pool, &chosen)?, Phase::Train)?;
        let logits = bbox_head.classifier.logits(&said.embeddings, &self.tables.text, Phase::Train)?;
        let deltas = said.deltas.expect("BUG: the box head has boxes");
        let of_regions = region_losses(BoxLoss::Absolute, &logits, &deltas, &samples)?;
        assessment.losses.extend([
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", of_regions.classes),
            ("boxes", of_regions.boxes),
        ]);
        Ok(samples)
    }

    /// The masks of objects within the regions that stand for them.
    fn masks(&self, pyramid: &Pyramid, batch: &Batch, samples: &[RegionSample], assessment: &mut Assessment) -> Result<()> {
        let (Some(head), Some(config)) = (&self.detector.mask_head, &self.card.config.mask_head) else { return Ok(()) };
        let (mut on_objects, mut expected) = (Vec::new(), Vec::new());
        for (sample, image) in samples.iter().zip(&batch.images) {
            let boxes = sample.boxes.narrow(0, 0, sample.objects.len() as i64);
            let masks: Vec<ObjectMask> = image.masks.iter().map(object_mask).collect();
            expected.push(MaskRule::MMDET.targets(&masks, &boxes, &sample.objects, 2 * config.pool.side)?);
            on_objects.push(boxes);
        }
        // One mask for all classes: which they are does not matter.
        let classes = vec![0; samples.iter().map(|sample| sample.objects.len()).sum()];
        let drawn = head.forward(&pyramid.pool(&config.pool, &on_objects)?, &classes)?;
        assessment.losses.push(("masks", mask_loss(&drawn, &Tensor::cat(&expected, 0))?));
        Ok(())
    }

    /// CLIP's embeddings of proposals.
    fn proposals(&self, pyramid: &Pyramid, batch: &Batch, assessment: &mut Assessment) -> Result<()> {
        let Some(head) = &self.detector.object_head else { return Ok(()) };
        let Compared { said, expected, n_rows } = self.compare(head, pyramid, batch, |image| &image.proposals)?;
        let apart = self.over_groups(embedding_loss, [&said, &expected], &n_rows)?;
        assessment.losses.push(("objects", apart * self.distillation.objects.at(batch.step + 1)));
        Ok(())
    }

    /// CLIP's embeddings of whole images, and the classes that these show.
    fn images(&self, pyramid: &Pyramid, batch: &Batch, assessment: &mut Assessment) -> Result<()> {
        let Some(head) = &self.detector.global_head else { return Ok(()) };
        let said = head.embed(&pyramid.levels[pyramid.levels.len() - 1])?;
        let expected = rows_of(batch.images.iter().map(|image| image.embedding.as_slice()), said.size()[1], said.device());
        let logits = head.classifier.logits(&said, &self.of_images, Phase::Train)?;
        let labels = labels(batch.images.iter().map(|image| image.classes.as_slice()), logits.size()[1], logits.device());
        let n_rows = vec![1; batch.images.len()];
        let apart = self.over_groups(image_embedding_loss, [&said, &expected], &n_rows)?;
        let wrong = self.over_groups(asymmetric_loss, [&logits, &labels], &n_rows)?;
        let weights = &self.distillation;
        assessment.losses.push(("globals", apart * weights.globals.at(batch.step + 1)));
        assessment.losses.push(("global_labels", wrong * weights.of_labels(weights.global_labels, batch.step + 1)));
        assessment.measures.push(("recall.globals", recall(&logits, &labels, IMAGE_BEST)));
        Ok(())
    }

    /// CLIP's embeddings of blocks, how these lie to each other, and the classes that they show.
    fn blocks(&self, pyramid: &Pyramid, batch: &Batch, assessment: &mut Assessment) -> Result<()> {
        let Some(head) = &self.detector.block_head else { return Ok(()) };
        let Compared { said, expected, n_rows } = self.compare(head, pyramid, batch, |image| &image.blocks)?;
        let logits = head.classifier.logits(&said, &self.tables.image, Phase::Train)?;
        let classes = batch.images.iter().flat_map(|image| image.block_classes.iter().map(Vec::as_slice));
        let labels = labels(classes, logits.size()[1], logits.device());
        let apart = self.over_groups(embedding_loss, [&said, &expected], &n_rows)?;
        let askew = self.over_groups(relation_loss, [&said, &expected], &n_rows)?;
        let wrong = self.over_groups(asymmetric_loss, [&logits, &labels], &n_rows)?;
        let weights = &self.distillation;
        assessment.losses.push(("blocks", apart * weights.blocks.at(batch.step + 1)));
        assessment.losses.push(("relations", askew * weights.relation_loss.at(batch.step + 1)));
        assessment.losses.push(("block_labels", wrong * weights.of_labels(weights.block_labels, batch.step + 1)));
        assessment.measures.push(("recall.blocks", recall(&logits, &labels, BLOCK_BEST)));
        Ok(())
    }

    /// What a head says of regions of all images, and what CLIP does.
    fn compare(&self, head: &OpenHead, pyramid: &Pyramid, batch: &Batch, regions: fn(&Shown) -> &ShownRegions) -> Result<Compared> {
        let shown: Vec<&ShownRegions> = batch.images.iter().map(regions).collect();
        let on: Vec<Tensor> = shown.iter().map(|shown| boxes(&shown.boxes)).collect();
        let said = head.forward(&pyramid.pool(&self.card.config.pool, &on)?, Phase::Train)?.embeddings;
        let expected = rows_of(shown.iter().map(|shown| shown.embeddings.as_slice()), said.size()[1], said.device());
        Ok(Compared { said, expected, n_rows: shown.iter().map(|shown| shown.boxes.len() as i64).collect() })
    }

    /// A loss of what is said and what is expected, both row by row of the images in their order.
    fn over_groups(&self, loss: Loss, [said, expected]: [&Tensor; 2], n_rows: &[i64]) -> Result<Tensor> {
        let of_rows = |Range { start, end }: Range<i64>| {
            let part = |of: &Tensor| of.narrow(0, start, end - start);
            loss(&part(said), &part(expected))
        };
        Ok(mean_over_groups(n_rows, self.distillation.images_per_group, of_rows)?)
    }
}

/// What is on an image.
fn truth(image: &Shown, crowds: Crowds) -> Truth {
    let objects = boxes(&image.objects);
    match crowds {
        Crowds::Background => objects.into(),
        Crowds::Ignored => Truth { objects, crowds: boxes(&image.crowds) },
    }
}

type Loss = fn(&Tensor, &Tensor) -> ovenbird_models::Result<Tensor>;

/// Embeddings of the same regions, image after image.
struct Compared {
    /// The head's, f32 `[N, D]`.
    said: Tensor,
    /// CLIP's, of the same shape.
    expected: Tensor,
    /// How many are of each image.
    n_rows: Vec<i64>,
}

/// `[N, D]`.
fn rows_of<'a>(parts: impl Iterator<Item = &'a [f32]>, dim: i64, device: Device) -> Tensor {
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

/// `[N, 4]`.
pub(super) fn boxes(boxes: &[Xyxy]) -> Tensor {
    boxes_tensor(&boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use ovenbird_data::annotations::ImageId;

    use super::*;

    #[test]
    fn crowds_are_background_or_ignored() {
        let image = Shown {
            id: ImageId(1),
            size: ImageSize { width: 90, height: 60 },
            objects: vec![Xyxy { x1: 1.0, y1: 2.0, x2: 30.0, y2: 40.0 }],
            crowds: vec![Xyxy { x1: 40.0, y1: 2.0, x2: 90.0, y2: 60.0 }],
            classes: vec![0],
            masks: Vec::new(),
            proposals: ShownRegions::default(),
            blocks: ShownRegions::default(),
            block_classes: Vec::new(),
            embedding: Vec::new(),
        };
        for (crowds, ignored) in [(Crowds::Background, boxes(&[])), (Crowds::Ignored, boxes(&image.crowds))] {
            let found = truth(&image, crowds);
            assert_eq!((found.objects, found.crowds), (boxes(&image.objects), ignored));
        }
    }
}
