//! The losses of training: of objectness, boxes and overlaps, at each layer of the decoder. (Section 8.)

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{
    Outputs,
    matching::{MatchRule, Pair, Target, match_queries},
};
use crate::{Result, detection::boxes::cxcywh_to_xyxy, error::ensure, rcnn::sigmoid::focal_terms};

/// The weights of the losses.
const OBJECTNESS_WEIGHT: f64 = 2.0;
const BOX_WEIGHT: f64 = 5.0;
const OVERLAP_WEIGHT: f64 = 2.0;

/// What the sums of a layer's losses are divided by. (Defect 10.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Divisor {
    /// The number of pairs of the last layer, as in the reference.
    #[default]
    Reference,
    /// The number of its own pairs.
    OwnLayer,
}

/// The losses of a layer, scalars, without their weights.
#[derive(Debug)]
pub struct LayerLosses {
    /// The focal loss of all queries: those of a pair are positive.
    pub objectness: Tensor,
    /// The absolute differences of cxcywh.
    pub boxes: Tensor,
    /// One minus the generalised IoU.
    pub overlaps: Tensor,
}

/// The losses of a batch.
#[derive(Debug)]
pub struct Losses {
    /// Of each layer, the last one last.
    pub layers: Vec<LayerLosses>,
    /// The pairs of each layer, for each image.
    pub pairs: Vec<Vec<Vec<Pair>>>,
    /// The number of objects of all images; where classes are split, each counts in each copy.
    pub n_objects: usize,
}

impl Losses {
    /// The weighted losses, each summed over all layers: of objectness, boxes and overlaps.
    pub fn weighted(&self) -> [Tensor; 3] {
        let sum = |of: fn(&LayerLosses) -> &Tensor, weight: f64| self.layers.iter().map(|layer| of(layer) * weight).sum::<Tensor>();
        [
            sum(|layer| &layer.objectness, OBJECTNESS_WEIGHT),
            sum(|layer| &layer.boxes, BOX_WEIGHT),
            sum(|layer| &layer.overlaps, OVERLAP_WEIGHT),
        ]
    }

    /// The weighted sum of all losses over all layers, a scalar.
    pub fn total(&self) -> Tensor {
        let weighted = |LayerLosses { objectness, boxes, overlaps }: &LayerLosses| {
            objectness * OBJECTNESS_WEIGHT + boxes * BOX_WEIGHT + overlaps * OVERLAP_WEIGHT
        };
        self.layers.iter().map(weighted).sum()
    }

    /// The number of pairs of the last layer.
    pub fn n_matched(&self) -> usize {
        self.pairs.last().map_or(0, |images| count(images))
    }

    /// The share of objects that the last layer has a query for, the health measure of anchors' classes; none without objects. In the reference
    /// it is 1 where one object has no query.
    pub fn matched_share(&self) -> Option<f64> {
        (self.n_objects > 0).then(|| self.n_matched() as f64 / self.n_objects as f64)
    }
}

fn count(images: &[Vec<Pair>]) -> usize {
    images.iter().map(Vec::len).sum()
}

/// The losses of a batch. Where nothing matches, and where there are no objects (the reference's defect 16), sums are divided by 1.
///
/// `classes`: i64 `[B, N]`, of the anchors; `targets`: one for each image. Fails where a number is not finite.
pub fn losses(outputs: &Outputs, classes: &Tensor, targets: &[Target], rule: &MatchRule, divisor: Divisor) -> Result<Losses> {
    let Outputs { boxes, objectness, .. } = outputs;
    ensure(matches!(boxes.size()[..], [l, _, _, 4] if l > 0), "boxes of queries", "[L, B, N, 4], L at least 1", boxes)?;
    let (l, b, n, _) = boxes.size4()?;
    ensure(objectness.size() == [l, b, n], "objectness", &format!("[{l}, {b}, {n}]"), objectness)?;
    let matched = |layer| match_queries(&boxes.get(layer), &objectness.get(layer), classes, targets, rule);
    let pairs = (0..l).map(matched).collect::<Result<Vec<_>>>()?;
    let n_last = pairs.last().map_or(0, |images| count(images));
    let of_layer = |(layer, images): (i64, &Vec<Vec<Pair>>)| {
        let n_matched = match divisor {
            Divisor::Reference => n_last,
            Divisor::OwnLayer => count(images),
        };
        layer_losses(&boxes.get(layer), &objectness.get(layer), targets, images, n_matched.max(1) as f64)
    };
    let layers: Vec<LayerLosses> = (0..l).zip(&pairs).map(of_layer).collect();
    let n_objects = targets.iter().map(|target| target.labels.numel()).sum();
    Ok(Losses { layers, pairs, n_objects })
}

/// `boxes`: `[B, N, 4]`; `objectness`: `[B, N]`.
fn layer_losses(boxes: &Tensor, objectness: &Tensor, targets: &[Target], images: &[Vec<Pair>], divisor: f64) -> LayerLosses {
    let (kind, device) = (boxes.kind(), boxes.device());
    let n = boxes.size()[1];
    let places = (0..).zip(images).flat_map(|(image, pairs)| pairs.iter().map(move |pair| image * n + pair.query as i64));
    let places = Tensor::from_slice(&places.collect::<Vec<i64>>()).to_device(device);
    let positives = Tensor::zeros([boxes.size()[0] * n], (objectness.kind(), device)).index_fill(0, &places, 1.0);
    let predicted = boxes.reshape([-1, 4]).index_select(0, &places);
    let wanted = |(target, pairs): (&Target, &Vec<Pair>)| {
        let objects: Vec<i64> = pairs.iter().map(|pair| pair.object as i64).collect();
        target.boxes.to_device(Device::Cpu).to_kind(kind).index_select(0, &Tensor::from_slice(&objects))
    };
    let wanted = Tensor::cat(&targets.iter().zip(images).map(wanted).collect::<Vec<_>>(), 0).to_device(device);
    let overlaps: Tensor = 1.0 - generalised_iou(&cxcywh_to_xyxy(&predicted), &cxcywh_to_xyxy(&wanted));
    LayerLosses {
        objectness: focal_terms(objectness, &positives.view_as(objectness)).sum(objectness.kind()) / divisor,
        boxes: (predicted - wanted).abs().sum(kind) / divisor,
        overlaps: overlaps.sum(kind) / divisor,
    }
}

/// The generalised IoU of boxes, xyxy, `[..., 4]` each: `[...]`. (Rezatofighi et al. 2019.)
fn generalised_iou(a: &Tensor, b: &Tensor) -> Tensor {
    let low = |boxes: &Tensor| boxes.narrow(-1, 0, 2);
    let high = |boxes: &Tensor| boxes.narrow(-1, 2, 2);
    let area = |sides: &Tensor| sides.select(-1, 0) * sides.select(-1, 1);
    let shared = area(&(high(a).minimum(&high(b)) - low(a).maximum(&low(b))).clamp_min(0.0));
    let around = area(&(high(a).maximum(&high(b)) - low(a).minimum(&low(b))).clamp_min(0.0));
    let union = area(&(high(a) - low(a))) + area(&(high(b) - low(b))) - &shared;
    shared / &union - (&around - &union) / &around
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::Kind;

    use super::*;
    use crate::{
        detr::matching::{ClassTest, Overlap},
        golden::{cora, error},
    };

    /// The cases of the golden data, but the one in which the reference stops.
    const CASES: [&str; 12] = [
        "c4_spec",
        "c4_agnostic",
        "negative_giou_kept",
        "no_overlap_dropped",
        "levels_empty_image",
        "m_last_level_only",
        "more_boxes_than_queries",
        "all_queries_one_class",
        "nothing_matched",
        "split_two_copies",
        "no_boxes_split",
        "random_3levels",
    ];

    struct Case {
        outputs: Outputs,
        classes: Tensor,
        targets: Vec<Target>,
        rule: MatchRule,
    }

    impl Case {
        fn read(golden: &BTreeMap<String, Tensor>, case: &str) -> Self {
            let array = |name: &str| golden[&format!("{case}.{name}")].shallow_clone();
            let [boxes, objectness] = ["boxes", "logits"].map(|name| array(name).copy().set_requires_grad(true));
            let targets =
                (0..boxes.size()[1]).map(|image| Target { boxes: array(&format!("gt{image}")), labels: array(&format!("labels{image}")) });
            let targets = targets.collect();
            let class_test = if case == "c4_agnostic" { ClassTest::Off } else { ClassTest::SameClass };
            let [references, states] = [(); 2].map(|()| boxes.zeros_like());
            let outputs = Outputs { boxes, objectness, references, states };
            Self { outputs, classes: array("classes"), targets, rule: MatchRule { class_test, overlap: Overlap::Reference } }
        }

        fn losses(&self, divisor: Divisor) -> Losses {
            losses(&self.outputs, &self.classes, &self.targets, &self.rule, divisor).unwrap()
        }
    }

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    /// Pairs exactly; values and gradients to five to ten times the difference that CORA's own code has between f32 and f64.
    #[test]
    fn pairs_losses_and_gradients_are_those_of_cora_s_code() {
        let golden = cora("matching");
        let strings = include_str!("../../../tests/golden/cora/strings.json");
        let strings: serde_json::Value = serde_json::from_str(strings).unwrap();
        for case in CASES {
            let read = Case::read(&golden, case);
            let found = read.losses(Divisor::Reference);
            let last = found.layers.len() - 1;
            for (layer, images) in found.pairs.iter().enumerate() {
                for (image, pairs) in images.iter().enumerate() {
                    let [queries, objects]: [Vec<i64>; 2] =
                        [|pair: &Pair| pair.query as i64, |pair: &Pair| pair.object as i64].map(|of| pairs.iter().map(of).collect());
                    let pairs = Tensor::from_slice(&[queries, objects].concat()).view([2, -1]);
                    assert_eq!(pairs, golden[&format!("{case}.match_l{layer}_img{image}")], "{case} {layer} {image}");
                }
            }
            let names: Vec<String> = serde_json::from_value(strings["matching.npz"][format!("{case}.names")].clone()).unwrap();
            let mut n_compared = 0;
            for (name, expected) in names.iter().zip(Vec::<f64>::try_from(&golden[&format!("{case}.values")]).unwrap()) {
                let (name, layer) = match name.rsplit_once('_') {
                    Some((name, layer)) if layer.parse::<usize>().is_ok() => (name, layer.parse().unwrap()),
                    _ => (name.as_str(), last),
                };
                let LayerLosses { objectness, boxes, overlaps } = &found.layers[layer];
                let value = match name {
                    "loss_ce" => scalar(objectness),
                    "loss_bbox" => scalar(boxes),
                    "loss_giou" => scalar(overlaps),
                    // The reference counts at least one pair.
                    "matched_gt" => found.matched_share().unwrap().max(1.0 / found.n_objects as f64),
                    _ => continue,
                };
                assert!((value - expected).abs() < 2e-6 + 1e-5 * expected.abs(), "{case} {name} {layer}: {value} {expected}");
                n_compared += 1;
            }
            assert!(n_compared >= 3 * found.layers.len());
            let expected = golden[&format!("{case}.total")].double_value(&[0]);
            assert!((scalar(&found.total()) - expected).abs() < 2e-6 + 1e-5 * expected, "{case}: {} {expected}", scalar(&found.total()));
            let leaves = [&read.outputs.boxes, &read.outputs.objectness];
            for (gradient, name) in Tensor::run_backward(&[found.total()], &leaves, false, false).iter().zip(["grad_boxes", "grad_logits"])
            {
                let expected = &golden[&format!("{case}.{name}")];
                let most = 2e-6 + 1e-5 * scalar(&expected.abs().max());
                assert!(error(gradient, expected) < most, "{case} {name}: {}", error(gradient, expected));
            }
        }
    }

    /// Defect 16: CORA's own code stops here.
    #[test]
    fn a_batch_without_objects_trains_objectness() {
        let read = Case::read(&cora("matching"), "no_boxes_unsplit");
        let found = read.losses(Divisor::Reference);
        assert_eq!((found.n_matched(), found.n_objects, found.matched_share()), (0, 0, None));
        assert!(scalar(&found.total()) > 0.0 && scalar(&found.total()).is_finite());
        let gradients = Tensor::run_backward(&[found.total()], &[&read.outputs.boxes, &read.outputs.objectness], false, false);
        assert!(scalar(&gradients[0].abs().max()) <= 0.0 && scalar(&gradients[1].min()) > 0.0);
    }

    /// Defect 10, and the share that the reference gives as 1.
    #[test]
    fn layers_can_be_divided_by_their_own_pairs() {
        let read = Case::read(&cora("matching"), "m_last_level_only");
        let [reference, own] = [Divisor::Reference, Divisor::OwnLayer].map(|divisor| read.losses(divisor));
        assert_eq!((reference.n_matched(), reference.matched_share(), count(&reference.pairs[0])), (0, Some(0.0), 3));
        let [reference, own] = [reference, own].map(|losses| losses.layers.iter().map(|layer| scalar(&layer.boxes)).collect::<Vec<f64>>());
        assert!((reference[0] / own[0] - 3.0).abs() < 1e-6 && reference[1].abs() < 1e-9 && own[1].abs() < 1e-9);
    }

    /// Tables of CORA's code; a gradient is that of a sum over seven boxes.
    #[test]
    fn focal_losses_and_overlaps_are_those_of_cora_s_code() {
        let golden = cora("matching");
        for (name, target) in [("0", 0.0), ("1", 1.0)] {
            let logits = golden["focal.logit"].copy().set_requires_grad(true);
            let terms = focal_terms(&logits, &logits.full_like(target));
            assert!(error(&terms, &golden[&format!("focal.target{name}")]) < 2e-6);
            let gradient = Tensor::run_backward(&[terms.sum(Kind::Float)], &[&logits], false, false).remove(0);
            assert!(error(&gradient, &golden[&format!("focal.grad{name}")]) < 2e-6);
        }
        let (a, b) = (golden["giou.a"].copy().set_requires_grad(true), &golden["giou.b"]);
        let table = generalised_iou(&cxcywh_to_xyxy(&a).unsqueeze(1), &cxcywh_to_xyxy(b).unsqueeze(0));
        assert!(error(&table, &golden["giou.giou"]) < 2e-6);
        let gradient = Tensor::run_backward(&[table.sum(Kind::Float)], &[&a], false, false).remove(0);
        let expected = &golden["giou.grad_a_of_sum"];
        assert!(error(&gradient, expected) < 2e-6 + 1e-5 * scalar(&expected.abs().max()), "{}", error(&gradient, expected));
    }
}
