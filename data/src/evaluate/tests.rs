//! Against pycocotools and lvis-api on the same files, and what is refused.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::*;
use crate::{
    boxes::Xyxy,
    masks::{Mask, Outline, Segmentation},
};

/// Evaluates all detections at once.
pub(crate) fn evaluate(
    protocol: Protocol,
    iou_type: IouType,
    annotations: &Annotations,
    detections: &[Detection],
    classes: &ClassSplit,
) -> Result<Evaluation, String> {
    let mut evaluator = Evaluator::new(protocol, iou_type, annotations, classes)?;
    evaluator.judge(detections)?;
    evaluator.finish(None)
}

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
    evaluate(Protocol::Coco, IouType::Boxes, annotations, detections, classes)
}

fn load(name: &str) -> Annotations {
    Annotations::load(&folder().join(format!("{name}.json"))).unwrap()
}

fn result(name: &str) -> Evaluation {
    let (file, iou_type) = name.strip_suffix(".masks").map_or((name, IouType::Boxes), |file| (file, IouType::Masks));
    let protocol = if file == "coco" { Protocol::Coco } else { Protocol::Lvis };
    evaluate(protocol, iou_type, &load(file), &detections(name), &classes()).unwrap()
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
        assert!(pairs.all(|(found, expected)| (found - expected).abs() < 1e-6), "{name} {group}: {:?} {expected:?}", found.curves[&group]);
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

/// A file of CORA's evaluator.
#[derive(Deserialize)]
struct CoraGolden {
    detections: Vec<CoraDetections>,
    /// The 12 usual numbers; AP50 of base and of novel classes, AR50 of base and of novel classes, in percent; none where a group has no objects.
    stats: Vec<Option<f64>>,
}

#[derive(Deserialize)]
struct CoraDetections {
    image_id: u64,
    /// Places among the categories in order of their ids.
    labels: Vec<usize>,
    scores: Vec<f32>,
    boxes_xyxy: Vec<[f32; 4]>,
}

/// F3 of CORA's specification. AR50 is no metric of ours, so it is read off what the others are computed from.
#[test]
fn numbers_of_cora_s_evaluator_are_ours() {
    const NOVEL: [u64; 17] = [5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/evaluator");
    for name in ["base_only", "mixed"] {
        let annotations = Annotations::load(&folder.join(format!("{name}_gt.json"))).unwrap();
        let golden: CoraGolden = serde_json::from_slice(&fs::read(folder.join(format!("{name}_det.json"))).unwrap()).unwrap();
        let mut categories: Vec<&Category> = annotations.categories.iter().collect();
        categories.sort_by_key(|category| category.id);
        let names = |is_novel: bool| {
            let group = categories.iter().filter(|category| NOVEL.contains(&category.id.0) == is_novel);
            group.map(|category| category.name.clone()).collect::<Vec<String>>()
        };
        let split = ClassSplit { base: names(false), novel: names(true) };
        assert_eq!((split.base.len(), split.novel.len()), (48, 17));
        let of_image = |found: &CoraDetections| {
            let all = found.labels.iter().zip(&found.scores).zip(&found.boxes_xyxy);
            let detection = |((label, score), corners): ((&usize, &f32), &[f32; 4])| Detection {
                image_id: ImageId(found.image_id),
                category_id: categories[*label].id,
                xyxy: Xyxy::from(*corners),
                score: *score,
                mask: None,
            };
            all.map(detection).collect::<Vec<_>>()
        };
        let detections: Vec<Detection> = golden.detections.iter().flat_map(of_image).collect();
        let groups = evaluate_coco(&annotations, &detections, &split).unwrap().groups;
        let usual =
            ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"];
        let mut ours: Vec<Option<f64>> = usual.iter().map(|name| groups["all"].get(Metric::named(name).unwrap())).collect();
        let ap50 = |group: &str| groups[group].get(Metric::AP50);
        let ar50 = ["base", "novel"].map(|group| recall_at_50(&annotations, &detections, &split, group == "novel"));
        ours.extend([ap50("base"), ap50("novel"), ar50[0], ar50[1]].map(|value| value.map(|value| 100.0 * value)));
        assert_eq!(ours.len(), golden.stats.len());
        for (place, (found, expected)) in ours.iter().zip(&golden.stats).enumerate() {
            // The usual numbers are -1 there.
            let expected = expected.filter(|value| *value > -1.0);
            assert_eq!(found.is_some(), expected.is_some(), "{name} {place}: {found:?} {expected:?}");
            let apart = found.unwrap_or(0.0) - expected.unwrap_or(0.0);
            assert!(apart.abs() < 1e-9, "{name} {place}: {found:?} {expected:?}");
        }
        assert_eq!(name == "base_only", groups["novel"] == Summary::default());
    }
}

/// The recall of base or novel classes at an IoU of 0.5 and 100 detections an image and class.
fn recall_at_50(annotations: &Annotations, detections: &[Detection], split: &ClassSplit, is_novel: bool) -> Option<f64> {
    let mut evaluator = Evaluator::new(Protocol::Coco, IouType::Boxes, annotations, split).unwrap();
    evaluator.judge(detections).unwrap();
    let left = annotations.images.iter().map(|image| image.id).filter(|image| !evaluator.judged.contains(image)).collect();
    evaluator.judge_images(&left, Vec::new()).unwrap();
    let ids = if is_novel { &evaluator.ids[split.base.len()..] } else { &evaluator.ids[..split.base.len()] };
    let ids: Vec<u64> = ids.iter().map(|id| id.0).collect();
    let mut eval = evaluator.matches.finalize();
    eval.accumulate();
    let accumulated = eval.accumulated().unwrap();
    let slices = Slices { accumulated, areas: &eval.params.area_ranges, limits: &eval.params.max_dets };
    let places: Vec<usize> = ids.iter().map(|id| accumulated.cat_ids.iter().position(|known| known == id).unwrap()).collect();
    slices.recall(&places, Some(0), "all", slices.ap_limit())
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
    assert!(evaluation.groups["base"].get(Metric::AP).is_some());
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
        let (file, iou_type) = if name == "coco" { ("coco", IouType::Boxes) } else { ("lvis", IouType::Masks) };
        let (annotations, classes, whole) = (load(file), classes(), result(name));
        let mut by_image: BTreeMap<ImageId, Vec<Detection>> = BTreeMap::new();
        for detection in detections(name) {
            by_image.entry(detection.image_id).or_default().push(detection);
        }
        let mut evaluator = Evaluator::new(whole.protocol, iou_type, &annotations, &classes).unwrap();
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
        let mut evaluator = Evaluator::new(Protocol::Coco, IouType::Boxes, &annotations, &classes).unwrap();
        evaluator.judge(&corners.iter().map(detection).collect::<Vec<_>>())?;
        let remarks = evaluator.remarks()?;
        Ok::<_, String>((remarks, evaluator.finish(None)?.groups["all"].get(Metric::AP)))
    };
    // The one object has the id 0, which matching would take for none.
    let right = ([2.0, 3.0, 22.0, 19.0], 0.9);
    let (remarks, ap) = judged(&[right]).unwrap();
    assert!(remarks.is_none() && ap.is_some_and(|ap| ap > 0.999), "{ap:?}");
    let (remarks, _) = judged(&[right, ([-2.0, 3.0, 22.0, 19.0], 0.5), ([70.0, 3.0, 72.0, 19.0], 0.5)]).unwrap();
    assert_eq!(remarks.unwrap(), "2 of 3 detections reach more than 1 px outside their image; 1 of them lie outside it");
    for (corners, problem) in [
        (([2.0, 3.0, 22.0, 19.0], 7.0), "1 of 1 scores are not in [0, 1], that of image 1 is 7"),
        (([22.0, 3.0, 2.0, 19.0], 0.5), "image 1: a detection [22, 3, 2, 19]: expected x1 <= x2 and y1 <= y2"),
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
        evaluate(Protocol::Coco, IouType::Masks, annotations, detections, &classes).unwrap_err()
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
    assert!(evaluate(Protocol::Coco, IouType::Masks, &crowds, &detections, &classes).is_ok());
    assert!(evaluate(Protocol::Coco, IouType::Masks, &all, &detections, &classes).is_err());
}

#[test]
fn files_that_do_not_say_are_of_boxes_and_have_no_warnings() {
    let mut json = serde_json::to_value(result("coco")).unwrap();
    assert_eq!(json.as_object_mut().unwrap().remove("iou_type"), Some("boxes".into()));
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
    assert_eq!(evaluate_coco(&annotations, &[], &classes()).unwrap().groups["all"].get(Metric::AP), Some(0.0));
}
