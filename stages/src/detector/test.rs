//! `detector/test`: what a trained detector sees.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, CategoryId},
    boxes::Xyxy,
    evaluate::Detection,
    masks::{Mask, PackedMask},
};
use ovenbird_models::{
    detection::boxes::{Suppression, corners},
    rcnn::{Detector, TestRule, Vocabularies, classifier::Ensemble, heads::DetectionRule, layout, rpn::ProposalRule},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use super::{ANNOTATIONS, CLASSES, ClassTables, DetectorFile, IMAGES, MULTILABEL_PROMPTS, PROMPTS, View, Viewing, class_embeddings};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Detections, category_names, read_weights},
    feed::in_parallel,
};

/// Which heads say what a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Heads {
    /// The box head and, where the detector has one, the object head, combined as `ensemble` says.
    #[default]
    Both,
    /// The box head alone.
    Box,
}

/// Detects objects of base and novel classes with a trained detector.
///
/// Images one by one, fitted into the sides that the detector was trained with. Class-aware NMS; boxes are xyxy in px of the image. A mask
/// head draws 28 x 28 probabilities in each box, which become pixels of the image from 0.5 on.
/// (OADP, section 6.6.)
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Test {
    /// Which heads say what a region is.
    pub heads: Heads,
    /// How the scores of both heads become one.
    pub ensemble: Ensemble,
    /// Proposals of each pyramid level before NMS, and of an image after it.
    pub proposals: usize,
    /// A proposal falls when it overlaps a better one of its level by more.
    pub proposal_iou: f32,
    /// Detections with this score or less are dropped.
    pub score_threshold: f32,
    /// A box falls when it overlaps a better one of its class by more.
    pub nms_iou: f32,
    /// Detections kept an image.
    pub max_per_image: usize,
}

impl Default for Test {
    fn default() -> Self {
        Self {
            heads: Heads::Both,
            ensemble: Ensemble::default(),
            proposals: 1000,
            proposal_iou: 0.7,
            score_threshold: 0.0,
            nms_iou: 0.5,
            max_per_image: 300,
        }
    }
}

const DETECTOR: In<DetectorFile> = In::required("detector", "What `detector/train` made.");
const DETECTIONS: Out<Detections> =
    Out::new("detections", "Boxes (xyxy, px), categories and scores by image, best first; masks, if the detector has a mask head.");

impl Stage for Test {
    const KIND: &'static str = "detector/test";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), PROMPTS.info(), MULTILABEL_PROMPTS.info(), DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTIONS.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        let Ensemble { box_base, box_novel, object_base, object_novel, objectness, sum_above_one: _ } = self.ensemble;
        let is_positive = |number: f64| number >= 0.0 && number.is_finite();
        let are_weights = [box_base, box_novel, object_base, object_novel]
            .iter()
            .all(|weight| weight.scale > 0.0 && weight.scale.is_finite() && is_positive(weight.exponent));
        Problem::unless(&[
            ("ensemble", are_weights && is_positive(objectness), "scales above 0, exponents from 0 on"),
            ("proposals", self.proposals > 0, "at least 1"),
            ("proposal_iou", (0.0..=1.0).contains(&self.proposal_iou), "a number from 0 to 1"),
            ("score_threshold", (0.0..1.0).contains(&self.score_threshold), "a number from 0 to below 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let annotations = inputs.read(ANNOTATIONS)?.load_categories()?;
        let Classes(classes) = inputs.read(CLASSES)?;
        let ids: Vec<u8> = Classes::category_ids(&annotations, classes.all())?.iter().flat_map(|id| id.0.to_le_bytes()).collect();
        let ids = Digest::of(&ids);
        let images = inputs.read(IMAGES)?.items(&annotations)?;
        let item = |image: Digest| Digest::of_list("ovenbird detection 1", [("image", image), ("categories", ids)]);
        Ok(Units::Independent { items: images.into_iter().map(item).collect(), replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
        let observer = Observer::of(self, (DETECTOR.info().name, &cx.inputs.read(DETECTOR)?), &annotations, cx)?;
        let categories: BTreeMap<CategoryId, String> = category_names(&annotations, &observer.ids);
        let viewing = Viewing::of(cx.inputs.read(IMAGES)?, annotations, cx)?;
        for unit in units {
            // One that another process or device makes is passed by.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let (mut detections, mut looked_at) = (Vec::new(), BTreeSet::new());
            viewing.each(unit.items.clone(), observer.fits, &draft, cx, |view| {
                looked_at.insert(view.info.id);
                detections.extend(observer.see(&view, cx.threads)?);
                Ok(())
            })?;
            Detections::write(&detections, &looked_at, &categories, draft.create(DETECTIONS, "detections.parquet")?)?;
            cx.commit(draft, [("detections".into(), detections.len().into())].into())?;
        }
        Ok(())
    }
}

/// A trained detector that is asked what it sees.
pub(super) struct Observer {
    detector: Detector,
    tables: ClassTables,
    asks_object_head: bool,
    rule: TestRule,
    /// The category of each class.
    ids: Vec<CategoryId>,
    /// Longer and shorter side that images are fitted into, in px.
    pub(super) fits: [u32; 2],
    /// Owns the weights.
    _store: nn::VarStore,
}

impl Observer {
    /// Loads the detector at a port, for the classes at the port `classes`.
    pub(super) fn of(
        test: &Test,
        (port, file): (&'static str, &DetectorFile),
        annotations: &Annotations,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let checkpoint = read_weights(&file.file)?;
        let card = file.card(&checkpoint)?;
        card.check_clip(port, cx.inputs)?;
        let store = nn::VarStore::new(cx.device);
        let detector = Detector::blank(&store.root(), &card.config)?;
        layout::load(checkpoint.tensors(), detector.parameters(), &file.file.path)?.require_all(&file.file.path)?;
        Ok(Self {
            tables: card.tables(class_embeddings(cx.inputs, &classes)?, cx.inputs, &classes, cx.device)?,
            asks_object_head: test.heads == Heads::Both && detector.object_head.is_some(),
            detector,
            rule: test.rule(),
            ids: Classes::category_ids(annotations, classes.all())?,
            fits: card.fits,
            _store: store,
        })
    }

    /// What it sees in an image; masks are pasted on `n_threads`.
    pub(super) fn see(&self, View { info, placement, size, pixels }: &View<'_>, n_threads: usize) -> Result<Vec<Detection>> {
        let vocabularies = Vocabularies { bbox: &self.tables.text, object: self.asks_object_head.then_some(&self.tables.image) };
        let mut detections = Vec::new();
        for found in self.detector.detect(pixels, &[*size], &vocabularies, &self.rule)? {
            let boxes = corners(&found.kept.boxes, "detections")?;
            let boxes: Vec<Xyxy> = boxes.into_iter().map(|corners| placement.find(&Xyxy::from(corners))).collect();
            let masks = match &found.masks {
                Some(logits) => masks(logits, &boxes, placement.from, n_threads)?,
                None => vec![None; boxes.len()],
            };
            let named = found.kept.classes.into_iter().zip(found.kept.scores);
            detections.extend(boxes.into_iter().zip(masks).zip(named).map(|((xyxy, mask), (class, score))| Detection {
                image_id: info.id,
                category_id: self.ids[class as usize],
                xyxy,
                score,
                mask,
            }));
        }
        Ok(detections)
    }
}

/// Masks of the boxes of an image of `size` px, from logits `[M, side, side]`.
fn masks(logits: &Tensor, boxes: &[Xyxy], size: [u32; 2], n_threads: usize) -> Result<Vec<Option<Box<PackedMask>>>> {
    let side = logits.size()[2] as usize;
    let probabilities = logits.sigmoid().to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
    let mut flat = vec![0.0_f32; probabilities.numel()];
    probabilities.copy_data(&mut flat, probabilities.numel());
    // 300 masks take one core some 10 ms, in which the network waits.
    in_parallel(boxes.len(), n_threads, |place| {
        let pasted = Mask::paste(&flat[place * side * side..][..side * side], side, &boxes[place], size);
        let mask = pasted.map_err(|problem| Error::Input { port: "images", problem, hint: "use smaller images".into() })?;
        Ok(Some(Box::new(mask.to_packed())))
    })
}

impl Test {
    fn rule(&self) -> TestRule {
        let proposals = Suppression { iou: self.proposal_iou, keep: self.proposals };
        let detections = Suppression { iou: self.nms_iou, keep: self.max_per_image };
        TestRule {
            proposals: ProposalRule { per_level: self.proposals, suppression: proposals, least_side: 0.0 },
            ensemble: self.ensemble,
            detections: DetectionRule { threshold: self.score_threshold, suppression: detections },
        }
    }
}
