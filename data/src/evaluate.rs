//! COCO and LVIS evaluation of boxes or masks. `hotcoco` does the matching and the AP arithmetic; this module sets its parameters,
//! slices classes into groups, and returns `None` where a group has no ground truth.
//!
//! Detections are added some images at a time ([`Evaluator::judge`]): a matched detection takes some 20 bytes.
//!
//! As in the OADP reference, all classes compete; base and novel are slices of the class axis of *one* accumulation. COCO: AP over at
//! most 100 detections per image; AP50, AP75 and the sizes over at most 1,000 (maxDets 100, 300, 1000). LVIS: 300 detections per
//! image, federated.
//!
//! Crowds: as in pycocotools, a COCO crowd need not be found, and detections in it are ignored; lvis-api does not know `iscrowd`, so in
//! LVIS a crowd is an object like any other.
//!
//! Masks: every object must have an outline ([`check_outlines`]), except COCO's crowds, whose `segmentation` may be empty.
//!
//! LVIS ignores detections and objects without area, such as empty masks (lvis-api's `get_ann_ids`), but a detection still takes a
//! place among the 300 of its image. COCO counts them.
//!
//! Masks: a detection's size is the area of its mask (mmdet and detectron2 remove the boxes from the results to get this; otherwise
//! pycocotools and lvis-api would use the box).

mod checks;
mod metrics;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet};

use hotcoco::{
    AccumulatedEval, Annotation as CocoAnnotation, AreaRange, Category as CocoCategory, EvalMode, Image as CocoImage,
    IouType as HotcocoIouType, StreamingEval,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::checks::{Strays, check_runs};
pub use self::metrics::{ClassResult, Evaluation, GROUPS, METRICS, Metric, Summary};
use crate::{
    annotations::{Annotation, Annotations, Category, CategoryId, Frequency, ImageId, ImageInfo},
    boxes::{Xyxy, xyxy_to_xywh},
    classes::ClassSplit,
    masks::{PackedMask, check_outlines},
    warnings::warnings,
};

/// The rules of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// pycocotools' `COCOeval`, maxDets 100, 300, 1000; as `eval/coco`.
    #[default]
    Coco,
    /// lvis-api's `LVISEval`; as `eval/lvis`.
    Lvis,
}

/// What the intersection over union is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IouType {
    /// Boxes.
    #[default]
    Boxes,
    /// Masks: detections need masks, and annotations a `segmentation`. An object's size is that of its mask.
    Masks,
}

/// A scored box with its class, and its mask if the detector has a mask head.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// The image.
    pub image_id: ImageId,
    /// The class.
    pub category_id: CategoryId,
    /// The box.
    pub xyxy: Xyxy,
    /// Higher is surer.
    pub score: f32,
    /// Its pixels. Boxed: there are millions of detections, mostly without.
    pub mask: Option<Box<PackedMask>>,
}

/// Detections of a class in an image that count, in COCO: AP itself is stated for [`COCO_AP_LIMIT`], recall for each, all else for the last.
const COCO_LIMITS: [usize; 5] = [1, 10, 100, 300, 1000];
const COCO_AP_LIMIT: usize = 100;
/// Detections of an image that count, in LVIS.
const LVIS_LIMIT: usize = 300;
/// The version of [`Evaluation`].
const FORMAT: u32 = 2;

/// An evaluation to which detections are still added.
pub struct Evaluator<'a> {
    protocol: Protocol,
    iou_type: IouType,
    annotations: &'a Annotations,
    classes: &'a ClassSplit,
    /// The ids of the classes, base ++ novel.
    ids: Vec<CategoryId>,
    /// With their numbers in the matching, from 1: it reserves 0 for unmatched, and files may count from 0.
    objects: BTreeMap<ImageId, Vec<(u64, &'a Annotation)>>,
    judged: BTreeSet<ImageId>,
    strays: Strays,
    matches: StreamingEval,
}

impl<'a> Evaluator<'a> {
    /// Starts an evaluation. Classes are found by name; `annotations` must have every class of the split and, for masks, an outline of every object.
    pub fn new(protocol: Protocol, iou_type: IouType, annotations: &'a Annotations, classes: &'a ClassSplit) -> Result<Self, String> {
        let by_name: BTreeMap<&str, CategoryId> =
            annotations.categories.iter().map(|category| (category.name.as_str(), category.id)).collect();
        let id = |name: &String| by_name.get(name.as_str()).copied().ok_or_else(|| format!("the annotations have no class `{name}`"));
        let ids = classes.all().map(id).collect::<Result<Vec<CategoryId>, String>>()?;
        if iou_type == IouType::Masks {
            annotations.annotations.iter().try_for_each(|annotation| check_runs(annotations, annotation))?;
            let is_needed = |annotation: &&Annotation| !is_ignored(protocol, annotation) || annotation.segmentation.drawn().is_none();
            let objects = annotations.annotations.iter().filter(is_needed);
            check_outlines(objects.map(|object| (object.id, object.image_id, &object.segmentation)))?;
        }
        let mode = match protocol {
            Protocol::Coco => EvalMode::Coco,
            Protocol::Lvis => EvalMode::Lvis,
        };
        let mut params = mode.default_params(match iou_type {
            IouType::Boxes => HotcocoIouType::Bbox,
            IouType::Masks => HotcocoIouType::Segm,
        });
        if protocol == Protocol::Coco {
            params.max_dets = COCO_LIMITS.to_vec();
        }
        params.cat_ids = ids.iter().map(|id| id.0).collect();
        let categories = annotations.categories.iter().map(coco_category).collect();
        let matches = StreamingEval::new(params, mode, categories).map_err(|error| error.to_string())?;
        let mut objects: BTreeMap<ImageId, Vec<(u64, &Annotation)>> = BTreeMap::new();
        for (number, object) in (1..).zip(&annotations.annotations).filter(|(_, object)| is_known(protocol, object)) {
            objects.entry(object.image_id).or_default().push((number, object));
        }
        Ok(Self { protocol, iou_type, annotations, classes, ids, objects, judged: BTreeSet::new(), strays: Strays::default(), matches })
    }

    /// Matches all detections of some images to their objects.
    ///
    /// Fails for an image that has been judged before, for images and categories that the annotations do not have, for numbers that
    /// are not finite, boxes that are inside out, and, where masks are evaluated, for a detection without a sound
    /// one.
    pub fn judge(&mut self, detections: &[Detection]) -> Result<(), String> {
        let mut by_image: BTreeMap<ImageId, Vec<(&Detection, f64)>> = BTreeMap::new();
        for detection in detections {
            let area = self.strays.check(detection, self.iou_type, self.annotations)?;
            by_image.entry(detection.image_id).or_default().push((detection, area));
        }
        if let Some(image) = by_image.keys().find(|image| self.judged.contains(*image)) {
            return Err(format!("image {image}: expected its detections one after the other, found some in two places"));
        }
        if self.protocol == Protocol::Lvis {
            for of_image in by_image.values_mut() {
                // The sort is stable, as lvis-api's.
                of_image.sort_by(|(a, _), (b, _)| b.score.total_cmp(&a.score));
                of_image.truncate(LVIS_LIMIT);
                of_image.retain(|(_, area)| *area > 0.0);
            }
        }
        let images = by_image.keys().copied().collect();
        let found = by_image.into_values().flatten().map(|(detection, _)| {
            let mut found = CocoAnnotation {
                image_id: detection.image_id.0,
                category_id: detection.category_id.0,
                score: Some(f64::from(detection.score)),
                ..CocoAnnotation::default()
            };
            match self.iou_type {
                IouType::Boxes => found.bbox = Some(xyxy_to_xywh(&detection.xyxy)),
                // Given a box, too, hotcoco would take that for its area.
                IouType::Masks => found.segmentation = detection.mask.as_ref().map(|mask| mask.to_segmentation()),
            }
            found
        });
        let found = found.collect();
        self.judge_images(&images, found)?;
        self.judged.extend(images);
        Ok(())
    }

    fn judge_images(&mut self, images: &BTreeSet<ImageId>, found: Vec<CocoAnnotation>) -> Result<(), String> {
        let known = images.iter().filter_map(|image| self.annotations.image(*image));
        let objects = images.iter().filter_map(|image| self.objects.get(image)).flatten();
        let objects = objects.map(|(number, object)| coco_annotation(self.protocol, self.iou_type, *number, object));
        self.matches.update(known.map(coco_image).collect(), objects.collect(), found).map_err(|error| error.to_string())
    }

    /// A warning about detections that leave their images, with counts, if there are any. Fails for scores outside [0, 1], which would
    /// not change AP and which no detector here gives, and if most boxes lie outside their images.
    pub fn remarks(&self) -> Result<Option<String>, String> {
        self.strays.remarks()
    }

    /// Computes the metrics over all images, also those without detections. `looked_at`: the images that the detector was run on, if
    /// known; a warning counts the others.
    pub fn finish(mut self, looked_at: Option<&BTreeSet<ImageId>>) -> Result<Evaluation, String> {
        let left = self.annotations.images.iter().map(|image| image.id).filter(|image| !self.judged.contains(image)).collect();
        self.judge_images(&left, Vec::new())?;
        let Self { protocol, iou_type, annotations, classes, ids, objects: _, judged: _, strays: _, matches } = self;
        let mut eval = matches.finalize();
        eval.accumulate();
        let accumulated = eval.accumulated().ok_or("the evaluation came to nothing")?;
        let place = |id: &CategoryId| accumulated.cat_ids.iter().position(|known| *known == id.0);
        let places: Vec<usize> = ids.iter().filter_map(place).collect();
        if places.len() != ids.len() {
            return Err("the evaluation lost a class".into());
        }
        let slices = Slices { accumulated, areas: &eval.params.area_ranges, limits: &eval.params.max_dets };
        let n_base = classes.base.len();
        let mut members: BTreeMap<String, Vec<usize>> = BTreeMap::from([
            ("all".into(), places.clone()),
            ("base".into(), places[..n_base].to_vec()),
            ("novel".into(), places[n_base..].to_vec()),
        ]);
        if protocol == Protocol::Lvis {
            for (name, frequency) in [("rare", Frequency::Rare), ("common", Frequency::Common), ("frequent", Frequency::Frequent)] {
                let is_member = |id: &CategoryId| annotations.category(*id).is_some_and(|category| category.frequency == Some(frequency));
                let of_frequency = ids.iter().zip(&places).filter(|(id, _)| is_member(id)).map(|(_, place)| *place);
                members.insert(name.into(), of_frequency.collect());
            }
        }
        let mut n_ground_truth: BTreeMap<CategoryId, usize> = BTreeMap::new();
        for annotation in
            annotations.annotations.iter().filter(|annotation| is_known(protocol, annotation) && !is_ignored(protocol, annotation))
        {
            *n_ground_truth.entry(annotation.category_id).or_default() += 1;
        }
        let class = |(row, (name, id)): (usize, (&String, &CategoryId))| {
            let of_class = [places[row]];
            ClassResult {
                name: name.clone(),
                is_novel: row >= n_base,
                n_ground_truth: n_ground_truth.get(id).copied().unwrap_or(0),
                ap: slices.precision(&of_class, None, "all", slices.ap_limit()),
                ap50: slices.precision(&of_class, Some(0), "all", slices.last_limit()),
            }
        };
        let is_left = |image: &&ImageInfo, looked_at: &BTreeSet<ImageId>| !looked_at.contains(&image.id);
        let n_images_without_detections =
            looked_at.map(|looked_at| annotations.images.iter().filter(|image| is_left(image, looked_at)).count());
        Ok(Evaluation {
            format: FORMAT,
            protocol,
            iou_type,
            groups: members.iter().map(|(name, of_group)| (name.clone(), Summary::of(&slices, of_group))).collect(),
            classes: classes.all().zip(&ids).enumerate().map(class).collect(),
            curves: members.iter().filter_map(|(name, of_group)| Some((name.clone(), slices.curve(of_group)?))).collect(),
            warnings: warnings(protocol, annotations, &ids.into_iter().collect(), looked_at),
            n_images_without_detections,
        })
    }
}

/// lvis-api does not see what has no area.
fn is_known(protocol: Protocol, annotation: &Annotation) -> bool {
    annotation.area > 0.0 || protocol == Protocol::Coco
}

pub(crate) fn is_ignored(protocol: Protocol, annotation: &Annotation) -> bool {
    annotation.is_crowd && protocol == Protocol::Coco
}

fn coco_image(image: &ImageInfo) -> CocoImage {
    let ids = |ids: &[CategoryId]| ids.iter().map(|id| id.0).collect();
    CocoImage {
        id: image.id.0,
        height: image.height,
        width: image.width,
        neg_category_ids: ids(&image.neg_category_ids),
        not_exhaustive_category_ids: ids(&image.not_exhaustive_category_ids),
        ..CocoImage::default()
    }
}

fn coco_category(category: &Category) -> CocoCategory {
    CocoCategory { id: category.id.0, name: category.name.clone(), ..CocoCategory::default() }
}

fn coco_annotation(protocol: Protocol, iou_type: IouType, number: u64, annotation: &Annotation) -> CocoAnnotation {
    CocoAnnotation {
        id: number,
        image_id: annotation.image_id.0,
        category_id: annotation.category_id.0,
        bbox: Some(annotation.bbox),
        area: Some(annotation.area),
        segmentation: annotation.segmentation.drawn().filter(|_| iou_type == IouType::Masks).cloned(),
        iscrowd: is_ignored(protocol, annotation),
        ..CocoAnnotation::default()
    }
}

/// Means over parts of an accumulation.
struct Slices<'a> {
    accumulated: &'a AccumulatedEval,
    areas: &'a [AreaRange],
    /// Detections an image, along the last axis; ascending.
    limits: &'a [usize],
}

impl Slices<'_> {
    /// The limit of detections that AP itself is stated for.
    fn ap_limit(&self) -> usize {
        self.limits.iter().position(|limit| *limit == COCO_AP_LIMIT).unwrap_or(0)
    }

    /// The limit of everything else.
    fn last_limit(&self) -> usize {
        self.accumulated.shape.m - 1
    }

    fn area(&self, label: &str) -> usize {
        self.areas.iter().position(|area| area.label == label).expect("BUG: both protocols have four sizes")
    }

    /// Mean precision over recall, some classes, and one or all IoU thresholds; -1 stands for no data and is left out.
    fn precision(&self, classes: &[usize], threshold: Option<usize>, area: &str, limit: usize) -> Option<f64> {
        let (shape, area) = (self.accumulated.shape, self.area(area));
        let thresholds = threshold.map_or(0..shape.t, |threshold| threshold..threshold + 1);
        let cells = thresholds.flat_map(|t| (0..shape.r).flat_map(move |r| classes.iter().map(move |k| (t, r, *k))));
        mean(cells.map(|(t, r, k)| self.accumulated.precision[self.accumulated.precision_idx(t, r, k, area, limit)]))
    }

    /// Mean recall of some classes at one or all IoU thresholds.
    fn recall(&self, classes: &[usize], threshold: Option<usize>, area: &str, limit: usize) -> Option<f64> {
        let (shape, area) = (self.accumulated.shape, self.area(area));
        let thresholds = threshold.map_or(0..shape.t, |threshold| threshold..threshold + 1);
        let cells = thresholds.flat_map(|t| classes.iter().map(move |k| (t, *k)));
        mean(cells.map(|(t, k)| self.accumulated.recall[self.accumulated.recall_idx(t, k, area, limit)]))
    }

    fn recall_at(&self, classes: &[usize], limit: usize) -> Option<f64> {
        self.recall(classes, None, "all", self.limits.iter().position(|known| *known == limit)?)
    }

    fn curve(&self, classes: &[usize]) -> Option<Vec<f64>> {
        let (shape, area, limit) = (self.accumulated.shape, self.area("all"), self.last_limit());
        let at = |r: usize| mean(classes.iter().map(|k| self.accumulated.precision[self.accumulated.precision_idx(0, r, *k, area, limit)]));
        (0..shape.r).map(at).collect()
    }
}

/// The mean of the values that exist, in a fixed order.
fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.filter(|value| *value > -1.0).fold((0.0, 0_usize), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / n as f64)
}
