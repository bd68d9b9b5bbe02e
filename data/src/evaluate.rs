//! COCO and LVIS evaluation of boxes. The matching and the AP arithmetic are `hotcoco`'s; this module chooses what is
//! asked of it, slices classes into groups, and says `None` where there is no data.
//!
//! The metrics follow the OADP reference: all classes compete; base and novel are slices of the class axis of *one*
//! accumulation. COCO: AP over at most 100 detections an image; AP50, AP75 and the sizes over at most 1,000 (maxDets 100,
//! 300, 1000). LVIS: 300 detections an image, federated.
//!
//! Crowds: as pycocotools, COCO neither wants them found nor minds when they are; lvis-api does not know `iscrowd`, so in
//! LVIS a crowd is an object like others.

use std::{collections::BTreeMap, fmt::Write as _};

use hotcoco::{
    Annotation as CocoAnnotation, AreaRange, COCO, Category as CocoCategory, Dataset, Image as CocoImage, IouType,
    detection::{AccumulatedEval, COCOeval},
};
use serde::{Deserialize, Serialize};

use crate::{
    annotations::{Annotation, Annotations, Category, CategoryId, Frequency, ImageId, ImageInfo},
    boxes::{Xyxy, xyxy_to_xywh},
    classes::ClassSplit,
};

/// A scored box with its class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// The image.
    pub image_id: ImageId,
    /// The class.
    pub category_id: CategoryId,
    /// The box.
    pub xyxy: Xyxy,
    /// Higher is surer.
    pub score: f32,
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
    /// `all`, `base`, `novel`; LVIS: also `rare`, `common`, `frequent`.
    pub groups: BTreeMap<String, Summary>,
    /// Every class, base ++ novel.
    pub classes: Vec<ClassResult>,
    /// Precision at IoU 0.50 and recall 0.00, 0.01, ..., 1.00, mean over the classes of a group; groups without data are
    /// absent.
    pub curves: BTreeMap<String, Vec<f64>>,
}

/// Detections of a class in an image that count, in COCO: AP itself is stated for the first limit, all else for the last.
const COCO_LIMITS: [usize; 3] = [100, 300, 1000];
/// The version of [`Evaluation`].
const FORMAT: u32 = 1;

/// Evaluates by the COCO protocol. Classes are found by name; `annotations` must have every class of the split.
pub fn evaluate_coco(annotations: &Annotations, detections: &[Detection], classes: &ClassSplit) -> Result<Evaluation, String> {
    evaluate(Metric::Coco, annotations, detections, classes)
}

/// Evaluates by the LVIS protocol.
pub fn evaluate_lvis(annotations: &Annotations, detections: &[Detection], classes: &ClassSplit) -> Result<Evaluation, String> {
    evaluate(Metric::Lvis, annotations, detections, classes)
}

fn evaluate(metric: Metric, annotations: &Annotations, detections: &[Detection], classes: &ClassSplit) -> Result<Evaluation, String> {
    let by_name: BTreeMap<&str, CategoryId> = annotations.categories.iter().map(|category| (category.name.as_str(), category.id)).collect();
    let id = |name: &String| by_name.get(name.as_str()).copied().ok_or_else(|| format!("the annotations have no class `{name}`"));
    let ids = classes.all().map(id).collect::<Result<Vec<CategoryId>, String>>()?;
    check(annotations, detections)?;
    let truth = COCO::from_dataset(ground_truth(metric, annotations));
    let found = detections.iter().map(|detection| CocoAnnotation {
        image_id: detection.image_id.0,
        category_id: detection.category_id.0,
        bbox: Some(xyxy_to_xywh(&detection.xyxy)),
        score: Some(f64::from(detection.score)),
        ..CocoAnnotation::default()
    });
    let found = truth.load_res_anns(found.collect()).map_err(|error| error.to_string())?;
    let mut eval = match metric {
        Metric::Coco => COCOeval::new(truth, found, IouType::Bbox),
        Metric::Lvis => COCOeval::new_lvis(truth, found, IouType::Bbox),
    };
    if metric == Metric::Coco {
        eval.params.max_dets = COCO_LIMITS.to_vec();
    }
    let limits = eval.params.max_dets.clone();
    eval.params.cat_ids = ids.iter().map(|id| id.0).collect();
    eval.evaluate().map_err(|error| error.to_string())?;
    eval.accumulate();
    let areas = eval.params.area_ranges.clone();
    let accumulated = eval.accumulated().ok_or("the evaluation came to nothing")?;
    let place = |id: &CategoryId| accumulated.cat_ids.iter().position(|known| *known == id.0);
    let places: Vec<usize> = ids.iter().filter_map(place).collect();
    if places.len() != ids.len() {
        return Err("the evaluation lost a class".into());
    }
    let slices = Slices { accumulated, areas: &areas, limits: &limits };
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
    for annotation in annotations.annotations.iter().filter(|annotation| !is_ignored(metric, annotation)) {
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
        groups: members.iter().map(|(name, of_group)| (name.clone(), slices.summary(of_group))).collect(),
        classes: classes.all().zip(&ids).enumerate().map(class).collect(),
        curves: members.iter().filter_map(|(name, of_group)| Some((name.clone(), slices.curve(of_group)?))).collect(),
    })
}

/// What the evaluator would only warn about, or count silently as wrong.
fn check(annotations: &Annotations, detections: &[Detection]) -> Result<(), String> {
    for Detection { image_id, category_id, xyxy, score } in detections {
        if annotations.image(*image_id).is_none() {
            return Err(format!("a detection in image {image_id}, which the annotations do not have"));
        }
        if annotations.category(*category_id).is_none() {
            return Err(format!("image {image_id}: a detection of category {category_id}, which the annotations do not have"));
        }
        let Xyxy { x1, y1, x2, y2 } = *xyxy;
        if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
            return Err(format!("image {image_id}: expected finite numbers, found a detection [{x1}, {y1}, {x2}, {y2}], score {score}"));
        }
    }
    Ok(())
}

fn is_ignored(metric: Metric, annotation: &Annotation) -> bool {
    annotation.is_crowd && metric == Metric::Coco
}

fn ground_truth(metric: Metric, annotations: &Annotations) -> Dataset {
    let ids = |ids: &[CategoryId]| ids.iter().map(|id| id.0).collect();
    let image = |image: &ImageInfo| CocoImage {
        id: image.id.0,
        file_name: image.file_name.clone(),
        height: image.height,
        width: image.width,
        neg_category_ids: ids(&image.neg_category_ids),
        not_exhaustive_category_ids: ids(&image.not_exhaustive_category_ids),
        ..CocoImage::default()
    };
    let category = |category: &Category| CocoCategory {
        id: category.id.0,
        name: category.name.clone(),
        supercategory: None,
        skeleton: None,
        keypoints: None,
        frequency: category.frequency.map(|frequency| match frequency {
            Frequency::Rare => "r".into(),
            Frequency::Common => "c".into(),
            Frequency::Frequent => "f".into(),
        }),
        isthing: None,
        extra: hotcoco::Extra::default(),
    };
    let annotation = |annotation: &Annotation| CocoAnnotation {
        id: annotation.id.0,
        image_id: annotation.image_id.0,
        category_id: annotation.category_id.0,
        bbox: Some(annotation.bbox),
        area: Some(annotation.area),
        iscrowd: is_ignored(metric, annotation),
        ..CocoAnnotation::default()
    };
    Dataset {
        images: annotations.images.iter().map(image).collect(),
        categories: annotations.categories.iter().map(category).collect(),
        annotations: annotations.annotations.iter().map(annotation).collect(),
        ..Dataset::default()
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
    /// The groups as a plain text table, numbers x 100, novel first.
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
        text
    }
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

    fn detections(name: &str) -> Vec<Detection> {
        let rows: Vec<(u64, u64, [f64; 4], f32)> =
            serde_json::from_slice(&fs::read(folder().join(format!("{name}.detections.json"))).unwrap()).unwrap();
        let detection = |(image, category, [x, y, width, height], score): (u64, u64, [f64; 4], f32)| Detection {
            image_id: ImageId(image),
            category_id: CategoryId(category),
            xyxy: crate::boxes::xywh_to_xyxy([x, y, width, height]),
            score,
        };
        rows.into_iter().map(detection).collect()
    }

    fn result(name: &str) -> Evaluation {
        let annotations = Annotations::load(&folder().join(format!("{name}.json"))).unwrap();
        let evaluate = if name == "coco" { evaluate_coco } else { evaluate_lvis };
        evaluate(&annotations, &detections(name), &classes()).unwrap()
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
            let difference =
                found.curves[&group].iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max);
            assert!(difference < 1e-6, "{name} {group}: {difference}");
        }
    }

    #[test]
    fn coco_numbers_equal_pycocotools_in_every_group() {
        check_groups("coco");
    }

    #[test]
    fn lvis_numbers_equal_lvis_api_in_every_group() {
        check_groups("lvis");
    }

    #[test]
    fn every_class_has_the_numbers_that_python_gives() {
        check_classes("coco");
        check_classes("lvis");
    }

    #[test]
    fn precision_over_recall_equals_python() {
        check_curves("coco");
        check_curves("lvis");
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
        let mut annotations = Annotations::load(&folder().join("coco.json")).unwrap();
        annotations.annotations.retain(|annotation| annotation.category_id.0 < 60);
        let evaluation = evaluate_coco(&annotations, &detections("coco"), &classes()).unwrap();
        assert_eq!((evaluation.groups["novel"], evaluation.curves.get("novel")), (Summary::default(), None));
        assert!(evaluation.groups["base"].ap.is_some());
        assert!(evaluation.table().contains("novel        –"), "{}", evaluation.table());
    }

    #[test]
    fn a_class_or_an_image_that_is_not_there_is_named() {
        let annotations = Annotations::load(&folder().join("coco.json")).unwrap();
        let split = ClassSplit { novel: vec!["heron".into()], ..classes() };
        assert_eq!(evaluate_coco(&annotations, &[], &split).unwrap_err(), "the annotations have no class `heron`");
        let stray = Detection { image_id: ImageId(999_999), ..detections("coco")[0] };
        assert_eq!(
            evaluate_coco(&annotations, &[stray], &classes()).unwrap_err(),
            "a detection in image 999999, which the annotations do not have"
        );
        let stray = Detection { category_id: CategoryId(5), image_id: ImageId(1), ..detections("coco")[0] };
        assert_eq!(
            evaluate_coco(&annotations, &[stray], &classes()).unwrap_err(),
            "image 1: a detection of category 5, which the annotations do not have"
        );
    }

    #[test]
    fn a_score_that_is_no_number_is_named() {
        let annotations = Annotations::load(&folder().join("coco.json")).unwrap();
        let xyxy = Xyxy { x1: 0.0, y1: 0.0, x2: 1.0, y2: 2.0 };
        let detection = Detection { image_id: ImageId(1), category_id: CategoryId(0), xyxy, score: f32::NAN };
        assert_eq!(
            evaluate_coco(&annotations, &[detection], &classes()).unwrap_err(),
            "image 1: expected finite numbers, found a detection [0, 0, 1, 2], score NaN"
        );
    }

    #[test]
    fn no_detections_are_an_ap_of_zero() {
        let annotations = Annotations::load(&folder().join("coco.json")).unwrap();
        assert_eq!(evaluate_coco(&annotations, &[], &classes()).unwrap().groups["all"].ap, Some(0.0));
    }
}
