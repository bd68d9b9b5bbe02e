//! Matching of queries to objects in training: the cheapest assignment among queries and objects of the same class. (Section 8.)
//!
//! Plain loops on the CPU in f32, in the reference's order of operations, so that equal costs are equal here too.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::assignment::{Costs, assign};
use crate::{
    Error, Result,
    detection::boxes::{floats, integers, is_floating},
    error::{check_count, ensure},
};

/// The weights of the parts of a cost.
const BOX_COST: f32 = 5.0;
const CLASS_COST: f32 = 2.0;
const OVERLAP_COST: f32 = 2.0;
/// The weight of positives in the focal cost.
const ALPHA: f32 = 0.25;
/// What is added to a share before its logarithm is taken.
const LOG_EPS: f32 = 1e-8;
/// The cost of pairs that are not allowed: more than that of any other.
const FORBIDDEN: f32 = 99.0;

/// The objects of an image.
#[derive(Debug)]
pub struct Target {
    /// `[T, 4]`: cxcywh in [0, 1] of the unpadded image.
    pub boxes: Tensor,
    /// i64 `[T]`: classes, in the numbers of the anchors' classes.
    pub labels: Tensor,
}

/// The pairs that are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MatchRule {
    /// Whether a query must have the class of its object.
    pub class_test: ClassTest,
    /// Whether a query must overlap its object.
    pub overlap: Overlap,
}

/// Whether a query must have the class of its object (the reference's `remove_misclassified`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ClassTest {
    /// It must, and objects that no query of their class overlaps are left out.
    #[default]
    SameClass,
    /// It need not, and no object is left out.
    Off,
}

/// Whether a query must overlap its object: a generalised IoU above 0. (Defect 9.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Overlap {
    /// It need not if another query of the class does, as in the reference.
    #[default]
    Reference,
    /// It must, also without the test of classes.
    Fixed,
}

/// A query and its object, by their places in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The place among the anchors.
    pub query: usize,
    /// The place among the objects.
    pub object: usize,
}

/// Matches the queries of a layer of the decoder to objects: for each image its pairs, by query.
///
/// `boxes`: `[B, N, 4]`, cxcywh; `objectness`: logits `[B, N]`; `classes`: i64 `[B, N]`; `targets`: one for each image. Of assignments of the
/// same cost it finds the one that scipy finds in the same order of queries. Fails where a number is not finite.
pub fn match_queries(
    boxes: &Tensor,
    objectness: &Tensor,
    classes: &Tensor,
    targets: &[Target],
    rule: &MatchRule,
) -> Result<Vec<Vec<Pair>>> {
    let pairs = |costs: Costs| {
        let kept =
            assign(&costs).into_iter().filter(|&(query, object)| costs.values[query * costs.n_columns + object] < f64::from(FORBIDDEN));
        kept.map(|(query, object)| Pair { query, object }).collect()
    };
    Ok(costs(boxes, objectness, classes, targets, rule)?.into_iter().map(pairs).collect())
}

/// Which objects of an image have an anchor of their class that overlaps them: a generalised IoU above 0. Others teach nothing. (Specification, section 14.)
///
/// `anchors`: `[N, 4]`, cxcywh; `classes`: i64 `[N]`.
pub fn covered(anchors: &Tensor, classes: &Tensor, target: &Target) -> Result<Vec<bool>> {
    ensure(matches!(anchors.size()[..], [_, 4]) && is_floating(anchors), "anchors", "floating [N, 4]", anchors)?;
    let n = anchors.size()[0];
    ensure(classes.size() == [n] && classes.kind() == Kind::Int64, "classes of anchors", &format!("i64 [{n}]"), classes)?;
    let (anchors, objects) = (finite("anchors", anchors)?, finite("boxes of objects", &target.boxes)?);
    let (classes, labels) = (integers(classes), integers(&target.labels));
    let has_anchor = |(object, label): (&[f32; 4], &i64)| {
        anchors.as_chunks().0.iter().zip(&classes).any(|(anchor, class)| class == label && generalised_iou(*anchor, *object) > 0.0)
    };
    Ok(objects.as_chunks().0.iter().zip(&labels).map(has_anchor).collect())
}

/// The costs of each image, queries by objects.
fn costs(boxes: &Tensor, objectness: &Tensor, classes: &Tensor, targets: &[Target], rule: &MatchRule) -> Result<Vec<Costs>> {
    ensure(matches!(boxes.size()[..], [_, _, 4]) && is_floating(boxes), "boxes of queries", "floating [B, N, 4]", boxes)?;
    let (b, n) = (boxes.size()[0], boxes.size()[1]);
    ensure(objectness.size() == [b, n] && is_floating(objectness), "objectness", &format!("floating [{b}, {n}]"), objectness)?;
    ensure(classes.size() == [b, n] && classes.kind() == Kind::Int64, "classes of anchors", &format!("i64 [{b}, {n}]"), classes)?;
    check_count("targets", b, targets.len())?;
    let of_image = |(image, target): (i64, &Target)| {
        let Target { boxes: objects, labels } = target;
        ensure(matches!(objects.size()[..], [_, 4]) && is_floating(objects), "boxes of objects", "floating [T, 4]", objects)?;
        let t = objects.size()[0];
        ensure(labels.size() == [t] && labels.kind() == Kind::Int64, "labels", &format!("i64 [{t}], one for each object"), labels)?;
        let queries = Queries {
            boxes: finite("boxes of queries", &boxes.get(image))?.as_chunks().0.to_vec(),
            objectness: finite("objectness", &objectness.get(image))?,
            classes: integers(&classes.get(image)),
        };
        let objects = finite("boxes of objects", objects)?;
        Ok(queries.costs(objects.as_chunks().0, &integers(labels), rule))
    };
    (0..b).zip(targets).map(of_image).collect()
}

fn finite(what: &'static str, numbers: &Tensor) -> Result<Vec<f32>> {
    let numbers = floats(numbers);
    match numbers.iter().find(|number| !number.is_finite()) {
        Some(found) => Err(Error::Input { what, expected: "finite numbers".into(), found: found.to_string() }),
        None => Ok(numbers),
    }
}

/// The queries of an image.
struct Queries {
    /// cxcywh.
    boxes: Vec<[f32; 4]>,
    objectness: Vec<f32>,
    classes: Vec<i64>,
}

impl Queries {
    fn costs(&self, objects: &[[f32; 4]], labels: &[i64], rule: &MatchRule) -> Costs {
        let (n_rows, n_columns) = (self.boxes.len(), objects.len());
        let mut values = vec![f64::from(FORBIDDEN); n_rows * n_columns];
        let of_objectness: Vec<f32> = self.objectness.iter().map(|&logit| focal_cost(logit)).collect();
        for (column, (&object, &label)) in objects.iter().zip(labels).enumerate() {
            let is_allowed = |&query: &usize| rule.class_test == ClassTest::Off || self.classes[query] == label;
            let overlaps: Vec<(usize, f32)> =
                (0..n_rows).filter(is_allowed).map(|query| (query, generalised_iou(self.boxes[query], object))).collect();
            let is_left_out = rule.class_test == ClassTest::SameClass && !overlaps.iter().any(|&(_, overlap)| overlap > 0.0);
            for (query, overlap) in overlaps {
                if is_left_out || rule.overlap == Overlap::Fixed && overlap <= 0.0 {
                    continue;
                }
                let apart: f32 = self.boxes[query].iter().zip(object).map(|(a, b)| (a - b).abs()).sum();
                let cost = BOX_COST * apart + CLASS_COST * of_objectness[query] + OVERLAP_COST * -overlap;
                values[query * n_columns + column] = f64::from(cost);
            }
        }
        Costs { n_rows, n_columns, values }
    }
}

/// The part of the cost that objectness has, from its logit.
fn focal_cost(logit: f32) -> f32 {
    let p = 1.0 / (1.0 + (-logit).exp());
    let positive = ALPHA * ((1.0 - p) * (1.0 - p)) * -(p + LOG_EPS).ln();
    let negative = (1.0 - ALPHA) * (p * p) * -(1.0 - p + LOG_EPS).ln();
    positive - negative
}

fn corners([cx, cy, w, h]: [f32; 4]) -> [f32; 4] {
    [cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h]
}

/// The generalised IoU of boxes, cxcywh. (Rezatofighi et al. 2019.)
fn generalised_iou(a: [f32; 4], b: [f32; 4]) -> f32 {
    let (a, b) = (corners(a), corners(b));
    let area = |[x1, y1, x2, y2]: [f32; 4]| (x2 - x1) * (y2 - y1);
    let inner = [a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])];
    let shared = (inner[2] - inner[0]).max(0.0) * (inner[3] - inner[1]).max(0.0);
    let union = area(a) + area(b) - shared;
    let around = area([a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])]);
    shared / union - (around - union) / around
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{RngCore as _, SeedableRng as _},
    };

    use super::*;
    use crate::golden::cora;

    /// CORA's own costs; 1e-5 of themselves is a hundred roundings of f32.
    #[test]
    fn costs_are_those_of_cora_s_code() {
        let golden = cora("matching");
        let mut n_compared = 0;
        for (name, expected) in &golden {
            let Some((case, image)) = name.split_once(".cost_last_img") else { continue };
            let (array, image) = (|name: &str| &golden[&format!("{case}.{name}")], image.parse().unwrap());
            let boxes = array("boxes");
            let last = boxes.size()[0] - 1;
            let queries = Queries {
                boxes: floats(&boxes.get(last).get(image)).as_chunks().0.to_vec(),
                objectness: floats(&array("logits").get(last).get(image)),
                classes: integers(&array("classes").get(image)),
            };
            let class_test = if case == "c4_agnostic" { ClassTest::Off } else { ClassTest::SameClass };
            let rule = MatchRule { class_test, overlap: Overlap::Reference };
            let (objects, labels) = (floats(array(&format!("gt{image}"))), integers(array(&format!("labels{image}"))));
            let costs = queries.costs(objects.as_chunks().0, &labels, &rule);
            for (found, expected) in costs.values.iter().zip(floats(expected)) {
                assert!((found - f64::from(expected)).abs() < 2e-6 + 1e-5 * f64::from(expected).abs(), "{name}: {found} {expected}");
                n_compared += 1;
            }
        }
        assert!(n_compared > 800, "{n_compared}");
    }

    #[test]
    fn an_object_is_covered_by_an_anchor_of_its_class_that_overlaps_it() {
        let tensor = |boxes: &[[f32; 4]]| Tensor::from_slice(boxes.as_flattened()).view([-1, 4]);
        let anchors = tensor(&[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]);
        let labels = Tensor::from_slice(&[4_i64, 5, 4, 5]);
        let target =
            Target { boxes: tensor(&[[0.35, 0.3, 0.2, 0.2], [0.35, 0.3, 0.2, 0.2], [0.9, 0.1, 0.1, 0.1], [0.65, 0.7, 0.1, 0.1]]), labels };
        let found = covered(&anchors, &Tensor::from_slice(&[4_i64, 5]), &target).unwrap();
        assert_eq!(found, [true, false, false, true]);
    }

    /// C1, C3 and C4 of the specification, printed to six digits.
    #[test]
    fn costs_have_the_values_of_the_specification() {
        let close = |found: f32, expected: f32| assert!((found - expected).abs() < 2e-6, "{found} {expected}");
        for (logit, expected) in [(-2.0, 0.411_167), (0.0, -0.086_643), (1.5, -0.851_278)] {
            close(focal_cost(logit), expected);
        }
        let a = [0.5, 0.5, 0.2, 0.4];
        close(generalised_iou(a, [0.55, 0.45, 0.2, 0.2]), 0.233_333);
        close(generalised_iou(a, [0.9, 0.9, 0.1, 0.1]), -0.748_252);
    }

    fn random_case(random: &mut ChaCha8Rng) -> (Queries, Vec<[f32; 4]>, Vec<i64>) {
        let mut even = || (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
        let n_classes = 1.0 + 4.0 * even();
        let mut boxes =
            |n: f32| (0..1 + (n * even()) as usize).map(|_| [even(), even(), 0.05 + 0.4 * even(), 0.05 + 0.4 * even()]).collect();
        let (queries, objects): (Vec<_>, Vec<_>) = (boxes(24.0), boxes(10.0));
        let mut classes = |n: usize| (0..n).map(|_| (n_classes * even()) as i64).collect();
        let (classes, labels): (Vec<_>, Vec<_>) = (classes(queries.len()), classes(objects.len()));
        let objectness = (0..queries.len()).map(|_| 6.0 * even() - 3.0).collect();
        (Queries { boxes: queries, objectness, classes }, objects, labels)
    }

    /// The lowest sum of costs of pairs of rows and columns, as many as the shorter list has, by trying all.
    fn lowest(costs: &Costs, rows: &[usize], columns: &[usize]) -> f64 {
        let cost = |row: usize, column: usize| costs.values[row * costs.n_columns + column];
        // Of the columns taken so far, the rows already used as bits: the lowest sum.
        let (short, long) = if rows.len() < columns.len() { (rows, columns) } else { (columns, rows) };
        let by_row = rows.len() < columns.len();
        let mut sums = BTreeMap::from([(0_u32, 0.0)]);
        for &one in short {
            let mut next = BTreeMap::new();
            for (used, sum) in &sums {
                for (bit, &other) in long.iter().enumerate().filter(|(bit, _)| used & (1 << bit) == 0) {
                    let sum = sum + if by_row { cost(one, other) } else { cost(other, one) };
                    let lowest = next.entry(used | 1 << bit).or_insert(sum);
                    *lowest = sum.min(*lowest);
                }
            }
            sums = next;
        }
        sums.into_values().fold(f64::INFINITY, f64::min)
    }

    /// C5 of the specification. Costs are f32, sums are of at most ten f64.
    #[test]
    fn pairs_are_the_cheapest_of_each_class() {
        let mut random = ChaCha8Rng::seed_from_u64(8);
        let mut n_pairs = 0;
        for case in 0..200 {
            let (queries, objects, labels) = random_case(&mut random);
            let costs = queries.costs(&objects, &labels, &MatchRule::default());
            let pairs: Vec<_> =
                assign(&costs).into_iter().filter(|&(row, column)| costs.values[row * objects.len() + column] < 99.0).collect();
            assert!(pairs.iter().all(|&(row, column)| queries.classes[row] == labels[column]), "{case}");
            for class in 0..5 {
                let rows: Vec<usize> = (0..queries.boxes.len()).filter(|&row| queries.classes[row] == class).collect();
                let is_seen = |&column: &usize| {
                    labels[column] == class && rows.iter().any(|&row| generalised_iou(queries.boxes[row], objects[column]) > 0.0)
                };
                let columns: Vec<usize> = (0..objects.len()).filter(is_seen).collect();
                let of_class: Vec<_> = pairs.iter().filter(|&&(row, _)| queries.classes[row] == class).collect();
                assert_eq!(of_class.len(), rows.len().min(columns.len()), "{case}");
                let found: f64 = of_class.iter().map(|&&(row, column)| costs.values[row * objects.len() + column]).sum();
                if !of_class.is_empty() {
                    assert!((found - lowest(&costs, &rows, &columns)).abs() < 1e-9, "{case}");
                }
                n_pairs += of_class.len();
            }
        }
        assert!(n_pairs > 200, "{n_pairs}");
    }

    /// Defect 9.
    #[test]
    fn a_query_that_does_not_overlap_is_matched_only_by_the_reference() {
        let tensor = |numbers: &[f32], shape: &[i64]| Tensor::from_slice(numbers).view(shape);
        let boxes = tensor(&[0.2, 0.2, 0.2, 0.2, 0.9, 0.9, 0.1, 0.1], &[1, 2, 4]);
        let (objectness, classes) = (tensor(&[0.0, 0.0], &[1, 2]), Tensor::from_slice(&[3_i64, 3]).view([1, 2]));
        let objects = tensor(&[0.2, 0.2, 0.2, 0.2, 0.25, 0.2, 0.2, 0.2], &[2, 4]);
        let targets = [Target { boxes: objects, labels: Tensor::from_slice(&[3_i64, 3]) }];
        let found =
            |class_test, overlap| match_queries(&boxes, &objectness, &classes, &targets, &MatchRule { class_test, overlap }).unwrap();
        for class_test in [ClassTest::SameClass, ClassTest::Off] {
            assert_eq!(found(class_test, Overlap::Reference)[0].len(), 2);
            assert_eq!(found(class_test, Overlap::Fixed), [[Pair { query: 0, object: 0 }]]);
        }
        let broken = (&boxes / 0.0).set_requires_grad(false);
        let refusal = match_queries(&broken, &objectness, &classes, &targets, &MatchRule::default()).unwrap_err();
        assert_eq!(refusal.to_string(), "boxes of queries: expected finite numbers, found inf");
    }
}
