//! COCO and LVIS evaluation of boxes. The matching and the AP arithmetic are `hotcoco`'s; this module chooses what is
//! asked of it, slices classes into groups, and says `None` where there is no data.
//!
//! The metrics follow the OADP reference: all classes compete; base and novel are slices of the class axis of *one*
//! accumulation. COCO: AP over at most 100 detections an image; AP50, AP75 and the sizes over at most 1,000 (maxDets 100,
//! 300, 1000). LVIS: 300 detections an image, federated.

use std::{collections::BTreeMap, fmt::Write as _};

use hotcoco::{
    Annotation as CocoAnnotation, AreaRange, COCO, Category as CocoCategory, Dataset, Image as CocoImage, IouType,
    detection::{AccumulatedEval, COCOeval},
};
use serde::{Deserialize, Serialize};

use crate::{
    annotations::{Annotations, CategoryId, Frequency, ImageId},
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
    /// Recall with the most detections an image that the protocol allows.
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
    /// Objects to be found, without crowds.
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
    if let Some(stray) = detections.iter().find(|detection| annotations.image(detection.image_id).is_none()) {
        return Err(format!("a detection in image {}, which the annotations do not have", stray.image_id));
    }

    let truth = COCO::from_dataset(ground_truth(annotations));
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
        eval.params.max_dets = vec![100, 300, 1000];
    }
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
    let slices = Slices { accumulated, areas: &areas };
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
    let class = |(row, (name, id)): (usize, (&String, &CategoryId))| {
        let of_class = [places[row]];
        ClassResult {
            name: name.clone(),
            is_novel: row >= n_base,
            n_ground_truth: annotations.annotations.iter().filter(|annotation| annotation.category_id == *id && !annotation.is_crowd).count(),
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

fn ground_truth(annotations: &Annotations) -> Dataset {
    let ids = |ids: &[CategoryId]| ids.iter().map(|id| id.0).collect();
    let image = |image: &crate::annotations::ImageInfo| CocoImage {
        id: image.id.0,
        file_name: image.file_name.clone(),
        height: image.height,
        width: image.width,
        neg_category_ids: ids(&image.neg_category_ids),
        not_exhaustive_category_ids: ids(&image.not_exhaustive_category_ids),
        ..CocoImage::default()
    };
    let category = |category: &crate::annotations::Category| CocoCategory {
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
    let annotation = |annotation: &crate::annotations::Annotation| CocoAnnotation {
        id: annotation.id.0,
        image_id: annotation.image_id.0,
        category_id: annotation.category_id.0,
        bbox: Some(annotation.bbox),
        area: Some(annotation.area),
        iscrowd: annotation.is_crowd,
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

    fn recall(&self, classes: &[usize], area: &str) -> Option<f64> {
        let (shape, area) = (self.accumulated.shape, self.area(area));
        let cells = (0..shape.t).flat_map(|t| classes.iter().map(move |k| (t, *k)));
        mean(cells.map(|(t, k)| self.accumulated.recall[self.accumulated.recall_idx(t, k, area, self.last_limit())]))
    }

    fn summary(&self, classes: &[usize]) -> Summary {
        let last = self.last_limit();
        let of_size = |area: &str| self.precision(classes, None, area, last);
        Summary {
            ap: self.precision(classes, None, "all", Self::first_limit()),
            ap50: self.precision(classes, Some(0), "all", last),
            ap75: self.precision(classes, Some(5), "all", last),
            ap_small: of_size("small"),
            ap_medium: of_size("medium"),
            ap_large: of_size("large"),
            ar: self.recall(classes, "all"),
            ar_small: self.recall(classes, "small"),
            ar_medium: self.recall(classes, "medium"),
            ar_large: self.recall(classes, "large"),
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

    fn check(name: &str) {
        let (found, expected) = (result(name), golden(name));
        let none_is_minus_one = |value: Option<f64>| value.unwrap_or(-1.0);
        for (group, numbers) in expected.groups {
            let json = serde_json::to_value(found.groups[&group]).unwrap();
            for (number, expected) in numbers {
                let found = none_is_minus_one(json[&number].as_f64());
                assert!((found - expected).abs() < 1e-6, "{name} {group} {number}: expected {expected}, found {found}");
            }
        }
        for (class, expected) in found.classes.iter().zip(expected.class_ap) {
            assert!((none_is_minus_one(class.ap) - expected).abs() < 1e-6, "{name} {}: expected {expected}, found {:?}", class.name, class.ap);
        }
    }

    #[test]
    fn coco_numbers_equal_pycocotools_in_every_group() {
        check("coco");
    }

    #[test]
    fn lvis_numbers_equal_lvis_api_in_every_group() {
        check("lvis");
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
    }

    #[test]
    fn no_detections_are_an_ap_of_zero() {
        let annotations = Annotations::load(&folder().join("coco.json")).unwrap();
        assert_eq!(evaluate_coco(&annotations, &[], &classes()).unwrap().groups["all"].ap, Some(0.0));
    }
}
