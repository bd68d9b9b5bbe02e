//! COCO and LVIS evaluation of boxes or masks. The matching and the AP arithmetic are `hotcoco`'s; this module chooses what is
//! asked of it, slices classes into groups, and says `None` where there is no data.
//!
//! Detections come some images at a time ([`Evaluator::judge`]): once an image is matched, some 20 bytes of each are left.
//!
//! The metrics follow the OADP reference: all classes compete; base and novel are slices of the class axis of *one*
//! accumulation. COCO: AP over at most 100 detections an image; AP50, AP75 and the sizes over at most 1,000 (maxDets 100,
//! 300, 1000). LVIS: 300 detections an image, federated.
//!
//! Crowds: as pycocotools, COCO neither wants them found nor minds when they are; lvis-api does not know `iscrowd`, so in
//! LVIS a crowd is an object like others.
//!
//! Masks: every object must have an outline ([`check_outlines`]), but for COCO's crowds, whose `segmentation` may draw nothing.
//!
//! LVIS: what has no area, such as an empty mask, is not seen (lvis-api's `get_ann_ids`), though it takes its place among the 300 of
//! its image. COCO counts it.
//!
//! Masks: a detection is as large as its mask (mmdet and detectron2 take the boxes out of the results for that; pycocotools and
//! lvis-api would else go by the box).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use hotcoco::{
    AccumulatedEval, Annotation as CocoAnnotation, AreaRange, Category as CocoCategory, EvalMode, Image as CocoImage, IouType,
    StreamingEval,
};
use serde::{Deserialize, Serialize};

use crate::{
    annotations::{Annotation, Annotations, Category, CategoryId, Frequency, ImageId, ImageInfo},
    boxes::{Xyxy, xyxy_to_xywh},
    classes::ClassSplit,
    masks::{Mask, Outline, PackedMask, Segmentation, check_outlines},
    warnings::{TOLERANCE_PX, warnings},
};

/// A scored box with its class, and the mask within it where a detector draws some.
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

/// Which protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// pycocotools' `COCOeval`, maxDets 100, 300, 1000.
    Coco,
    /// lvis-api's `LVISEval`.
    Lvis,
}

/// What of an object has to lie in the right place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Its box.
    #[default]
    Boxes,
    /// Its pixels.
    Masks,
}

/// The numbers of a group of classes, each in [0, 1]; `None` where the group has no ground truth for it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Mean over IoU 0.50 to 0.95.
    pub ap: Option<f64>,
    /// At IoU 0.50.
    pub ap50: Option<f64>,
    /// At IoU 0.75.
    pub ap75: Option<f64>,
    /// Of objects below 32² px.
    pub ap_small: Option<f64>,
    /// Of objects between 32² and 96² px.
    pub ap_medium: Option<f64>,
    /// Of objects above 96² px.
    pub ap_large: Option<f64>,
    /// Recall with at most 100 detections an image and class; `None` also where the protocol has no such limit (LVIS).
    pub ar_100: Option<f64>,
    /// Recall with at most 300: an image and class (COCO), an image (LVIS).
    pub ar_300: Option<f64>,
    /// Recall with the most detections an image that the protocol allows: 1,000 a class (COCO), 300 (LVIS).
    pub ar: Option<f64>,
    /// The same, small objects.
    pub ar_small: Option<f64>,
    /// The same, medium objects.
    pub ar_medium: Option<f64>,
    /// The same, large objects.
    pub ar_large: Option<f64>,
}

/// One class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassResult {
    /// Its name.
    pub name: String,
    /// Whether it had no labels in training.
    pub is_novel: bool,
    /// Objects to be found: without crowds, except in LVIS, which has no crowds.
    pub n_ground_truth: usize,
    /// Mean over IoU 0.50 to 0.95.
    pub ap: Option<f64>,
    /// At IoU 0.50.
    pub ap50: Option<f64>,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Version of this layout.
    pub format: u32,
    /// Which protocol.
    pub metric: Metric,
    /// Of boxes or of masks; files that do not say are of boxes.
    #[serde(default)]
    pub of: Shape,
    /// `all`, `base`, `novel`; LVIS: also `rare`, `common`, `frequent`.
    pub groups: BTreeMap<String, Summary>,
    /// Every class, base ++ novel.
    pub classes: Vec<ClassResult>,
    /// Precision at IoU 0.50 and recall 0.00, 0.01, ..., 1.00, mean over the classes of a group; groups without data are
    /// absent.
    pub curves: BTreeMap<String, Vec<f64>>,
    /// Why the numbers may mean less than they seem to, with counts; files that do not say have none.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Detections of a class in an image that count, in COCO: AP itself is stated for the first limit, all else for the last.
const COCO_LIMITS: [usize; 3] = [100, 300, 1000];
/// Detections of an image that count, in LVIS.
const LVIS_LIMIT: usize = 300;
/// The version of [`Evaluation`].
const FORMAT: u32 = 1;

/// An evaluation that detections are still coming to.
pub struct Evaluator<'a> {
    metric: Metric,
    of: Shape,
    annotations: &'a Annotations,
    classes: &'a ClassSplit,
    /// Of the classes, base ++ novel.
    ids: Vec<CategoryId>,
    /// With the numbers that matching knows them by, from 1: it takes 0 for unmatched, and files may count from 0.
    objects: BTreeMap<ImageId, Vec<(u64, &'a Annotation)>>,
    judged: BTreeSet<ImageId>,
    strays: Strays,
    matches: StreamingEval,
}

impl<'a> Evaluator<'a> {
    /// Begins. Classes are found by name; `annotations` must have every class of the split and, for masks, an outline of every object.
    pub fn new(metric: Metric, of: Shape, annotations: &'a Annotations, classes: &'a ClassSplit) -> Result<Self, String> {
        let by_name: BTreeMap<&str, CategoryId> =
            annotations.categories.iter().map(|category| (category.name.as_str(), category.id)).collect();
        let id = |name: &String| by_name.get(name.as_str()).copied().ok_or_else(|| format!("the annotations have no class `{name}`"));
        let ids = classes.all().map(id).collect::<Result<Vec<CategoryId>, String>>()?;
        if of == Shape::Masks {
            annotations.annotations.iter().try_for_each(|annotation| check_runs(annotations, annotation))?;
            let is_needed = |annotation: &&Annotation| !is_ignored(metric, annotation) || annotation.segmentation.drawn().is_none();
            let objects = annotations.annotations.iter().filter(is_needed);
            check_outlines(objects.map(|object| (object.id, object.image_id, &object.segmentation)))?;
        }
        let mode = match metric {
            Metric::Coco => EvalMode::Coco,
            Metric::Lvis => EvalMode::Lvis,
        };
        let mut params = mode.default_params(match of {
            Shape::Boxes => IouType::Bbox,
            Shape::Masks => IouType::Segm,
        });
        if metric == Metric::Coco {
            params.max_dets = COCO_LIMITS.to_vec();
        }
        params.cat_ids = ids.iter().map(|id| id.0).collect();
        let categories = annotations.categories.iter().map(coco_category).collect();
        let matches = StreamingEval::new(params, mode, categories).map_err(|error| error.to_string())?;
        let mut objects: BTreeMap<ImageId, Vec<(u64, &Annotation)>> = BTreeMap::new();
        for (number, object) in (1..).zip(&annotations.annotations).filter(|(_, object)| is_known(metric, object)) {
            objects.entry(object.image_id).or_default().push((number, object));
        }
        Ok(Self { metric, of, annotations, classes, ids, objects, judged: BTreeSet::new(), strays: Strays::default(), matches })
    }

    /// Matches all detections of some images with their objects.
    ///
    /// Fails for an image that has been judged before, for images and categories that the annotations do not have, for numbers that
    /// are not finite, boxes that are inside out, and, where masks are evaluated, for a detection without a sound
    /// one.
    pub fn judge(&mut self, detections: &[Detection]) -> Result<(), String> {
        let mut by_image: BTreeMap<ImageId, Vec<(&Detection, f64)>> = BTreeMap::new();
        for detection in detections {
            let area = self.check(detection)?;
            by_image.entry(detection.image_id).or_default().push((detection, area));
        }
        if let Some(image) = by_image.keys().find(|image| self.judged.contains(*image)) {
            return Err(format!("image {image}: expected its detections one after the other, found some in two places"));
        }
        if self.metric == Metric::Lvis {
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
            match self.of {
                Shape::Boxes => found.bbox = Some(xyxy_to_xywh(&detection.xyxy)),
                // Given a box, too, hotcoco would take that for its area.
                Shape::Masks => found.segmentation = detection.mask.as_ref().map(|mask| mask.to_segmentation()),
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
        let objects = objects.map(|(number, object)| coco_annotation(self.metric, self.of, *number, object));
        self.matches.update(known.map(coco_image).collect(), objects.collect(), found).map_err(|error| error.to_string())
    }

    /// Finds what hotcoco would only warn about, or count silently as wrong; otherwise, returns the area of what is compared, in px².
    fn check(&mut self, detection: &Detection) -> Result<f64, String> {
        let Detection { image_id, category_id, xyxy, score, mask } = detection;
        let image = self
            .annotations
            .image(*image_id)
            .ok_or_else(|| format!("a detection in image {image_id}, which the annotations do not have"))?;
        if self.annotations.category(*category_id).is_none() {
            return Err(format!("image {image_id}: a detection of category {category_id}, which the annotations do not have"));
        }
        let Xyxy { x1, y1, x2, y2 } = *xyxy;
        if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
            return Err(format!("image {image_id}: expected finite numbers, found a detection [{x1}, {y1}, {x2}, {y2}], score {score}"));
        }
        if x2 < x1 || y2 < y1 {
            return Err(format!("image {image_id}: a detection [{x1}, {y1}, {x2}, {y2}] is inside out: expected x1, y1, x2, y2"));
        }
        self.strays.count(detection, image);
        match (self.of, mask) {
            (Shape::Boxes, _) => Ok(f64::from(x2 - x1) * f64::from(y2 - y1)),
            (Shape::Masks, Some(mask)) => {
                let area = mask.area_in([image.width, image.height]);
                area.map(|area| area as f64).map_err(|problem| format!("image {image_id}: {problem}"))
            }
            (Shape::Masks, None) => Err(format!("image {image_id}: a detection without a mask")),
        }
    }

    /// What to know of the detections that were judged, in words with counts. Fails for scores outside [0, 1], by which AP would be the
    /// same and which no detector here gives, and where most boxes lie outside their images.
    pub fn remarks(&self) -> Result<Option<String>, String> {
        let Strays { n_boxes, n_leaving, n_outside, n_other_scores, first_score } = self.strays;
        if let Some((image, score)) = first_score {
            return Err(format!("{n_other_scores} of {n_boxes} scores are not in [0, 1], that of image {image} is {score}"));
        }
        if 2 * n_outside > n_boxes {
            let problem = "they seem to be of other images, or of resized ones";
            return Err(format!("{n_outside} of {n_boxes} detections lie outside their image: {problem}"));
        }
        let leaving = format!("{n_leaving} of {n_boxes} detections reach more than {TOLERANCE_PX} px outside their image");
        Ok((n_leaving > 0).then(|| format!("{leaving}; {n_outside} of them lie outside it")))
    }

    /// The numbers, once every detection is judged: images that had none count, too. `looked_at`: the images that were searched for
    /// objects, where that is known; the others are counted in a warning.
    pub fn finish(mut self, looked_at: Option<&BTreeSet<ImageId>>) -> Result<Evaluation, String> {
        let left = self.annotations.images.iter().map(|image| image.id).filter(|image| !self.judged.contains(image)).collect();
        self.judge_images(&left, Vec::new())?;
        let Self { metric, of, annotations, classes, ids, objects: _, judged: _, strays: _, matches } = self;
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
        if metric == Metric::Lvis {
            for (name, frequency) in [("rare", Frequency::Rare), ("common", Frequency::Common), ("frequent", Frequency::Frequent)] {
                let is_member = |id: &CategoryId| annotations.category(*id).is_some_and(|category| category.frequency == Some(frequency));
                let of_frequency = ids.iter().zip(&places).filter(|(id, _)| is_member(id)).map(|(_, place)| *place);
                members.insert(name.into(), of_frequency.collect());
            }
        }
        let mut n_ground_truth: BTreeMap<CategoryId, usize> = BTreeMap::new();
        for annotation in
            annotations.annotations.iter().filter(|annotation| is_known(metric, annotation) && !is_ignored(metric, annotation))
        {
            *n_ground_truth.entry(annotation.category_id).or_default() += 1;
        }
        let class = |(row, (name, id)): (usize, (&String, &CategoryId))| {
            let of_class = [places[row]];
            ClassResult {
                name: name.clone(),
                is_novel: row >= n_base,
                n_ground_truth: n_ground_truth.get(id).copied().unwrap_or(0),
                ap: slices.precision(&of_class, None, "all", Slices::first_limit()),
                ap50: slices.precision(&of_class, Some(0), "all", slices.last_limit()),
            }
        };
        Ok(Evaluation {
            format: FORMAT,
            metric,
            of,
            groups: members.iter().map(|(name, of_group)| (name.clone(), slices.summary(of_group))).collect(),
            classes: classes.all().zip(&ids).enumerate().map(class).collect(),
            curves: members.iter().filter_map(|(name, of_group)| Some((name.clone(), slices.curve(of_group)?))).collect(),
            warnings: warnings(metric, annotations, &ids.into_iter().collect(), looked_at),
        })
    }
}

/// How many detections leave their images or have scores of another kind.
#[derive(Debug, Clone, Copy, Default)]
struct Strays {
    n_boxes: usize,
    /// By more than [`TOLERANCE_PX`].
    n_leaving: usize,
    /// Which share no part with it.
    n_outside: usize,
    n_other_scores: usize,
    first_score: Option<(ImageId, f32)>,
}

impl Strays {
    fn count(&mut self, Detection { image_id, xyxy: Xyxy { x1, y1, x2, y2 }, score, .. }: &Detection, image: &ImageInfo) {
        let [width, height] = [image.width as f32, image.height as f32];
        let slack = TOLERANCE_PX as f32;
        self.n_boxes += 1;
        self.n_leaving += usize::from(*x1 < -slack || *y1 < -slack || *x2 > width + slack || *y2 > height + slack);
        self.n_outside += usize::from(*x1 > width || *y1 > height || *x2 < 0.0 || *y2 < 0.0);
        if !(0.0..=1.0).contains(score) {
            self.n_other_scores += 1;
            self.first_score.get_or_insert((*image_id, *score));
        }
    }
}

/// Checks that run lengths are sound and of the image's size.
fn check_runs(annotations: &Annotations, annotation: &Annotation) -> Result<(), String> {
    match (&annotation.segmentation, annotations.image(annotation.image_id)) {
        (Outline::Drawn(runs @ (Segmentation::CompressedRle { .. } | Segmentation::UncompressedRle { .. })), Some(image)) => {
            let drawn = Mask::from_segmentation(runs, [image.width, image.height]);
            drawn.map(drop).map_err(|problem| format!("annotation {}: {problem}", annotation.id))
        }
        _ => Ok(()),
    }
}

/// lvis-api does not see what has no area.
fn is_known(metric: Metric, annotation: &Annotation) -> bool {
    annotation.area > 0.0 || metric == Metric::Coco
}

pub(crate) fn is_ignored(metric: Metric, annotation: &Annotation) -> bool {
    annotation.is_crowd && metric == Metric::Coco
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

fn coco_annotation(metric: Metric, of: Shape, number: u64, annotation: &Annotation) -> CocoAnnotation {
    CocoAnnotation {
        id: number,
        image_id: annotation.image_id.0,
        category_id: annotation.category_id.0,
        bbox: Some(annotation.bbox),
        area: Some(annotation.area),
        segmentation: annotation.segmentation.drawn().filter(|_| of == Shape::Masks).cloned(),
        iscrowd: is_ignored(metric, annotation),
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
    fn first_limit() -> usize {
        0
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

    fn recall(&self, classes: &[usize], area: &str, limit: usize) -> Option<f64> {
        let (shape, area) = (self.accumulated.shape, self.area(area));
        let cells = (0..shape.t).flat_map(|t| classes.iter().map(move |k| (t, *k)));
        mean(cells.map(|(t, k)| self.accumulated.recall[self.accumulated.recall_idx(t, k, area, limit)]))
    }

    fn summary(&self, classes: &[usize]) -> Summary {
        let last = self.last_limit();
        let of_size = |area: &str| self.precision(classes, None, area, last);
        let at_limit = |limit: usize| self.recall(classes, "all", self.limits.iter().position(|known| *known == limit)?);
        Summary {
            ap: self.precision(classes, None, "all", Self::first_limit()),
            ap50: self.precision(classes, Some(0), "all", last),
            ap75: self.precision(classes, Some(5), "all", last),
            ap_small: of_size("small"),
            ap_medium: of_size("medium"),
            ap_large: of_size("large"),
            ar_100: at_limit(100),
            ar_300: at_limit(300),
            ar: self.recall(classes, "all", last),
            ar_small: self.recall(classes, "small", last),
            ar_medium: self.recall(classes, "medium", last),
            ar_large: self.recall(classes, "large", last),
        }
    }

    fn curve(&self, classes: &[usize]) -> Option<Vec<f64>> {
        let (shape, area, limit) = (self.accumulated.shape, self.area("all"), self.last_limit());
        let at = |r: usize| mean(classes.iter().map(|k| self.accumulated.precision[self.accumulated.precision_idx(0, r, *k, area, limit)]));
        (0..shape.r).map(at).collect()
    }
}

/// The mean of what is there, in a fixed order.
fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.filter(|value| *value > -1.0).fold((0.0, 0_usize), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / n as f64)
}

impl Evaluation {
    /// What it is of: `LVIS, boxes`.
    pub fn words(&self) -> &'static str {
        match (self.metric, self.of) {
            (Metric::Coco, Shape::Boxes) => "COCO, boxes",
            (Metric::Coco, Shape::Masks) => "COCO, masks",
            (Metric::Lvis, Shape::Boxes) => "LVIS, boxes",
            (Metric::Lvis, Shape::Masks) => "LVIS, masks",
        }
    }

    /// The groups as a plain text table, numbers x 100, novel first; then the warnings, a line each.
    pub fn table(&self) -> String {
        let mut text = String::from("           AP  AP50  AP75   APs   APm   APl    AR\n");
        for name in ["novel", "base", "all", "rare", "common", "frequent"] {
            let Some(group) = self.groups.get(name) else { continue };
            let cells = [group.ap, group.ap50, group.ap75, group.ap_small, group.ap_medium, group.ap_large, group.ar];
            let _infallible = write!(text, "{name:<8}");
            for cell in cells {
                let _infallible = match cell {
                    Some(value) => write!(text, " {:5.1}", 100.0 * value),
                    None => write!(text, "     –"),
                };
            }
            text.push('\n');
        }
        text.extend(self.warnings.iter().map(|words| format!("warning: {words}\n")));
        text
    }
}

/// Judges everything at once.
#[cfg(test)]
pub(crate) fn evaluate(
    metric: Metric,
    of: Shape,
    annotations: &Annotations,
    detections: &[Detection],
    classes: &ClassSplit,
) -> Result<Evaluation, String> {
    let mut evaluator = Evaluator::new(metric, of, annotations, classes)?;
    evaluator.judge(detections)?;
    evaluator.finish(None)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/evaluate")
    }

    #[derive(Deserialize)]
    struct Golden {
        groups: BTreeMap<String, BTreeMap<String, f64>>,
        class_ap: Vec<f64>,
        class_ap50: Vec<f64>,
        curves: BTreeMap<String, Vec<f64>>,
    }

    fn golden(name: &str) -> Golden {
        serde_json::from_slice(&fs::read(folder().join(format!("{name}.golden.json"))).unwrap()).unwrap()
    }

    fn classes() -> ClassSplit {
        let names = |range: std::ops::Range<usize>| range.map(|class| format!("class {class}")).collect();
        ClassSplit { base: names(0..6), novel: names(6..9) }
    }

    /// `coco`, `lvis`, or these with masks: `coco.masks`, `lvis.masks`.
    fn detections(name: &str) -> Vec<Detection> {
        if let Some(of_boxes) = name.strip_suffix(".masks") {
            let packed: Vec<String> = serde_json::from_slice(&fs::read(folder().join(format!("{name}.json"))).unwrap()).unwrap();
            let mask = |counts: String| Some(Box::new(PackedMask { size: [400, 300], counts: counts.into() }));
            let boxes = detections(of_boxes);
            assert_eq!(boxes.len(), packed.len());
            return boxes.into_iter().zip(packed).map(|(detection, counts)| Detection { mask: mask(counts), ..detection }).collect();
        }
        let rows: Vec<(u64, u64, [f64; 4], f32)> =
            serde_json::from_slice(&fs::read(folder().join(format!("{name}.detections.json"))).unwrap()).unwrap();
        let detection = |(image, category, [x, y, width, height], score): (u64, u64, [f64; 4], f32)| Detection {
            image_id: ImageId(image),
            category_id: CategoryId(category),
            xyxy: crate::boxes::xywh_to_xyxy([x, y, width, height]),
            score,
            mask: None,
        };
        rows.into_iter().map(detection).collect()
    }

    fn evaluate_coco(annotations: &Annotations, detections: &[Detection], classes: &ClassSplit) -> Result<Evaluation, String> {
        evaluate(Metric::Coco, Shape::Boxes, annotations, detections, classes)
    }

    fn load(name: &str) -> Annotations {
        Annotations::load(&folder().join(format!("{name}.json"))).unwrap()
    }

    fn result(name: &str) -> Evaluation {
        let (file, of) = name.strip_suffix(".masks").map_or((name, Shape::Boxes), |file| (file, Shape::Masks));
        let metric = if file == "coco" { Metric::Coco } else { Metric::Lvis };
        evaluate(metric, of, &load(file), &detections(name), &classes()).unwrap()
    }

    fn none_is_minus_one(value: Option<f64>) -> f64 {
        value.unwrap_or(-1.0)
    }

    fn check_groups(name: &str) {
        let (found, expected) = (result(name), golden(name));
        for (group, numbers) in expected.groups {
            let json = serde_json::to_value(found.groups[&group]).unwrap();
            for (number, expected) in numbers {
                let found = none_is_minus_one(json[&number].as_f64());
                assert!((found - expected).abs() < 1e-6, "{name} {group} {number}: expected {expected}, found {found}");
            }
        }
    }

    fn check_classes(name: &str) {
        let (found, expected) = (result(name), golden(name));
        for (class, expected) in found.classes.iter().zip(expected.class_ap.iter().zip(expected.class_ap50)) {
            let found = (none_is_minus_one(class.ap), none_is_minus_one(class.ap50));
            let is_equal = (found.0 - expected.0).abs() < 1e-6 && (found.1 - expected.1).abs() < 1e-6;
            assert!(is_equal, "{name} {}: expected {expected:?}, found {found:?}", class.name);
        }
    }

    fn check_curves(name: &str) {
        let (found, expected) = (result(name), golden(name));
        for (group, expected) in expected.curves {
            assert_eq!(found.curves[&group].len(), expected.len());
            let mut pairs = found.curves[&group].iter().zip(&expected);
            assert!(
                pairs.all(|(found, expected)| (found - expected).abs() < 1e-6),
                "{name} {group}: {:?} {expected:?}",
                found.curves[&group]
            );
        }
    }

    #[test]
    fn coco_numbers_equal_pycocotools_in_every_group() {
        check_groups("coco");
        check_groups("coco.masks");
    }

    #[test]
    fn lvis_numbers_equal_lvis_api_in_every_group() {
        check_groups("lvis");
        check_groups("lvis.masks");
    }

    #[test]
    fn every_class_has_the_numbers_that_python_gives() {
        ["coco", "coco.masks", "lvis", "lvis.masks"].into_iter().for_each(check_classes);
    }

    #[test]
    fn precision_over_recall_equals_python() {
        ["coco", "coco.masks", "lvis", "lvis.masks"].into_iter().for_each(check_curves);
    }

    #[test]
    fn the_same_evaluation_has_the_same_bytes() {
        let json = || serde_json::to_string(&result("coco")).unwrap();
        let first = json();
        assert_eq!(first, json());
        assert_eq!(serde_json::from_str::<Evaluation>(&first).unwrap(), result("coco"));
    }

    #[test]
    fn a_group_without_ground_truth_has_no_number() {
        let mut annotations = load("coco");
        annotations.annotations.retain(|annotation| annotation.category_id.0 < 60);
        let evaluation = evaluate_coco(&annotations, &detections("coco"), &classes()).unwrap();
        assert_eq!((evaluation.groups["novel"], evaluation.curves.get("novel")), (Summary::default(), None));
        assert!(evaluation.groups["base"].ap.is_some());
        assert!(evaluation.table().contains("novel        –"), "{}", evaluation.table());
    }

    #[test]
    fn a_class_or_an_image_that_is_not_there_is_named() {
        let annotations = load("coco");
        let split = ClassSplit { novel: vec!["heron".into()], ..classes() };
        assert_eq!(evaluate_coco(&annotations, &[], &split).unwrap_err(), "the annotations have no class `heron`");
        let stray = Detection { image_id: ImageId(999_999), ..detections("coco").remove(0) };
        assert_eq!(
            evaluate_coco(&annotations, &[stray], &classes()).unwrap_err(),
            "a detection in image 999999, which the annotations do not have"
        );
        let stray = Detection { category_id: CategoryId(5), image_id: ImageId(1), ..detections("coco").remove(0) };
        assert_eq!(
            evaluate_coco(&annotations, &[stray], &classes()).unwrap_err(),
            "image 1: a detection of category 5, which the annotations do not have"
        );
    }

    #[test]
    fn images_may_come_in_any_pieces_and_order_but_only_once() {
        for name in ["coco", "lvis.masks"] {
            let (file, of) = if name == "coco" { ("coco", Shape::Boxes) } else { ("lvis", Shape::Masks) };
            let (annotations, classes, whole) = (load(file), classes(), result(name));
            let mut by_image: BTreeMap<ImageId, Vec<Detection>> = BTreeMap::new();
            for detection in detections(name) {
                by_image.entry(detection.image_id).or_default().push(detection);
            }
            let mut evaluator = Evaluator::new(whole.metric, of, &annotations, &classes).unwrap();
            let images: Vec<Vec<Detection>> = by_image.into_values().rev().collect();
            images.chunks(7).for_each(|piece| evaluator.judge(&piece.concat()).unwrap());
            let image = images[3][0].image_id;
            assert_eq!(
                evaluator.judge(&images[3]).unwrap_err(),
                format!("image {image}: expected its detections one after the other, found some in two places")
            );
            assert_eq!(evaluator.finish(None).unwrap(), whole);
        }
    }

    #[test]
    fn detections_are_checked_as_proposals_are() {
        let json = br#"{"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}], "categories": [{"id": 5, "name": "owl"}],
            "annotations": [{"id": 0, "image_id": 1, "category_id": 5, "bbox": [2, 3, 20, 16], "area": 320}]}"#;
        let annotations = Annotations::parse(json, Path::new("a.json")).unwrap();
        let classes = ClassSplit { base: vec!["owl".into()], novel: Vec::new() };
        let judged = |corners: &[([f32; 4], f32)]| {
            let detection = |(corners, score): &([f32; 4], f32)| Detection {
                image_id: ImageId(1),
                category_id: CategoryId(5),
                xyxy: Xyxy::from(*corners),
                score: *score,
                mask: None,
            };
            let mut evaluator = Evaluator::new(Metric::Coco, Shape::Boxes, &annotations, &classes).unwrap();
            evaluator.judge(&corners.iter().map(detection).collect::<Vec<_>>())?;
            let remarks = evaluator.remarks()?;
            Ok::<_, String>((remarks, evaluator.finish(None)?.groups["all"].ap))
        };
        // The one object has the id 0, which matching would take for none.
        let right = ([2.0, 3.0, 22.0, 19.0], 0.9);
        let (remarks, ap) = judged(&[right]).unwrap();
        assert!(remarks.is_none() && ap.is_some_and(|ap| ap > 0.999), "{ap:?}");
        let (remarks, _) = judged(&[right, ([-2.0, 3.0, 22.0, 19.0], 0.5), ([70.0, 3.0, 72.0, 19.0], 0.5)]).unwrap();
        assert_eq!(remarks.unwrap(), "2 of 3 detections reach more than 1 px outside their image; 1 of them lie outside it");
        for (corners, problem) in [
            (([2.0, 3.0, 22.0, 19.0], 7.0), "1 of 1 scores are not in [0, 1], that of image 1 is 7"),
            (([22.0, 3.0, 2.0, 19.0], 0.5), "image 1: a detection [22, 3, 2, 19] is inside out: expected x1, y1, x2, y2"),
            (([2.0, 3.0, f32::INFINITY, 19.0], 0.5), "image 1: expected finite numbers, found a detection [2, 3, inf, 19], score 0.5"),
            (
                ([200.0, 3.0, 220.0, 19.0], 0.5),
                "1 of 1 detections lie outside their image: they seem to be of other images, or of resized ones",
            ),
        ] {
            assert_eq!(judged(&[corners]).unwrap_err(), problem);
        }
    }

    #[test]
    fn masks_that_are_missing_or_do_not_fit_are_named() {
        let (annotations, classes) = (load("coco"), classes());
        let evaluate = |annotations: &Annotations, detections: &[Detection]| {
            evaluate(Metric::Coco, Shape::Masks, annotations, detections, &classes).unwrap_err()
        };
        let found = detections("coco.masks").remove(0);
        let with = |mask: Option<PackedMask>| [Detection { mask: mask.map(Box::new), ..found.clone() }];
        let image = found.image_id;
        assert_eq!(evaluate(&annotations, &with(None)), format!("image {image}: a detection without a mask"));
        let other = PackedMask { size: [300, 400], counts: "".into() };
        let expected = format!("image {image}: expected a mask of 400 x 300 px, found 300 x 400");
        assert_eq!(evaluate(&annotations, &with(Some(other))), expected);
        let counts = Mask::from_pixels(&[true; 400 * 301], [400, 301]).unwrap().to_packed().counts;
        let runs = PackedMask { size: [400, 300], counts };
        assert!(evaluate(&annotations, &with(Some(runs))).starts_with(&format!("image {image}: mask: ")));

        let mut without = annotations.clone();
        let Annotation { id, image_id, .. } = without.annotations[3];
        let n_objects = without.annotations.iter().filter(|object| !object.is_crowd).count();
        let missing = |what: &str| format!("annotation {id} of image {image_id} has {what}; 1 of {n_objects} annotations have no outline");
        without.annotations[3].segmentation = Outline::Missing;
        assert_eq!(evaluate(&without, &[]), missing("no `segmentation`"));
        without.annotations[3].segmentation = Segmentation::Polygon(Vec::new()).into();
        assert_eq!(evaluate(&without, &[]), missing("an empty list as `segmentation`"));
        without.annotations[3].segmentation = Segmentation::UncompressedRle { size: [3, 4], counts: vec![12] }.into();
        let expected = format!("annotation {}: segmentation: expected run lengths of 400 x 300 px, found 4 x 3", without.annotations[3].id);
        assert_eq!(evaluate(&without, &[]), expected);
    }

    #[test]
    fn outlines_that_draw_nothing_are_no_matter_to_boxes_nor_where_they_are_of_crowds() {
        let (annotations, classes) = (load("coco"), classes());
        let detections = detections("coco.masks");
        let emptied = |is_one: fn(&Annotation) -> bool| {
            let mut emptied = annotations.clone();
            emptied
                .annotations
                .iter_mut()
                .filter(|object| is_one(object))
                .for_each(|object| object.segmentation = Segmentation::Polygon(Vec::new()).into());
            emptied
        };
        let all = emptied(|_| true);
        assert_eq!(evaluate_coco(&all, &detections, &classes).unwrap(), evaluate_coco(&annotations, &detections, &classes).unwrap());
        let crowds = emptied(|object| object.is_crowd);
        assert!(evaluate(Metric::Coco, Shape::Masks, &crowds, &detections, &classes).is_ok());
        assert!(evaluate(Metric::Coco, Shape::Masks, &all, &detections, &classes).is_err());
    }

    #[test]
    fn files_that_do_not_say_are_of_boxes_and_have_no_warnings() {
        let mut json = serde_json::to_value(result("coco")).unwrap();
        assert_eq!(json.as_object_mut().unwrap().remove("of"), Some("boxes".into()));
        assert_eq!(json.as_object_mut().unwrap().remove("warnings"), Some(serde_json::json!([])));
        assert_eq!(serde_json::from_value::<Evaluation>(json).unwrap(), result("coco"));
    }

    #[test]
    fn a_score_that_is_no_number_is_named() {
        let annotations = load("coco");
        let xyxy = Xyxy { x1: 0.0, y1: 0.0, x2: 1.0, y2: 2.0 };
        let detection = Detection { image_id: ImageId(1), category_id: CategoryId(0), xyxy, score: f32::NAN, mask: None };
        assert_eq!(
            evaluate_coco(&annotations, &[detection], &classes()).unwrap_err(),
            "image 1: expected finite numbers, found a detection [0, 0, 1, 2], score NaN"
        );
    }

    #[test]
    fn no_detections_are_an_ap_of_zero() {
        let annotations = load("coco");
        assert_eq!(evaluate_coco(&annotations, &[], &classes()).unwrap().groups["all"].ap, Some(0.0));
    }
}
