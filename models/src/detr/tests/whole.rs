//! The whole detector by CORA's own code, in f32: a small CLIP, anchors and their classes, the localizer, boxes and their classes. (Sections 7
//! and 9.)

use tch::IndexOp as _;

use super::*;
use crate::{
    clip::regions::{
        Regions,
        tests::{SIZES, check, images, tiny},
    },
    detection::boxes::ImageSize,
    detr::{
        prematch::{Favour, classify},
        scores::{Background, Selection, scores},
    },
    golden::cora_weights,
};

/// Nine layers in f32: five to ten times what CORA's own code has between f32 and f64.
const TOLERANCE: f64 = 2e-5;
/// Stored logits are 100 times cosines.
const OF_LOGITS: f64 = 5e-4;

/// The localizer of the golden data.
fn localizer() -> (nn::VarStore, Localizer) {
    let store = nn::VarStore::new(Device::Cpu);
    let localizer = Localizer::blank(&store.root(), &Config { queries: 24, ..Config::cora(64, 16) }).unwrap();
    for (name, values) in cora_weights("det") {
        set(&localizer, &name, &values);
    }
    (store, localizer)
}

/// What it makes of some images.
struct Found {
    classes: Tensor,
    memory: Memory,
    outputs: Outputs,
    /// Scores of the last layer's boxes, `[B, N, C]`.
    features: Tensor,
    scores: Tensor,
}

fn found(localizer: &Localizer, regions: &Regions<'_>, images: &Tensor, sizes: &[ImageSize], texts: &Tensor, factor: f64) -> Found {
    let layer3 = regions.layer3(images, sizes).unwrap();
    let novel = Vec::<i64>::try_from(&cora("prematch")["coco65_factor8.novel"]).unwrap();
    let anchors = regions.fast(&regions.layer4(&layer3).unwrap(), &localizer.anchors().sigmoid()).unwrap();
    let favour = Favour { factor, classes: &novel };
    let classes = classify(&anchors.matmul(&texts.tr()), 100.0, Some(favour), None).unwrap().classes;
    let memory = localizer.encode(&layer3.features, &layer3.valid(), None).unwrap();
    let outputs = localizer.decode(&memory, texts, &classes, None).unwrap();
    let boxes: Vec<Tensor> = (0..sizes.len() as i64).map(|image| outputs.boxes.i((-1, image))).collect();
    let features = regions.exact(&layer3, &boxes).unwrap().view([sizes.len() as i64, -1, texts.size()[1]]);
    let of_image = |image: i64| {
        let (cosines, objectness) = (features.get(image).matmul(&texts.tr()), outputs.objectness.i((-1, image)));
        scores(&cosines, &objectness, 100.0, Background::Reference).unwrap()
    };
    let scores = Tensor::stack(&(0..sizes.len() as i64).map(of_image).collect::<Vec<_>>(), 0);
    Found { classes, memory, outputs, features, scores }
}

/// As which CORA's code stores scores.
fn logits(scores: &Tensor) -> Tensor {
    let rest: Tensor = 1.0 - scores;
    (scores / rest).log()
}

/// Gathers `[B, N, ..]` in an order of queries, `[B, N]`.
fn in_order(tensor: &Tensor, order: &Tensor) -> Tensor {
    let of_image = |image: i64| tensor.get(image).index_select(0, &order.get(image));
    Tensor::stack(&(0..order.size()[0]).map(of_image).collect::<Vec<_>>(), 0)
}

/// The same of each layer.
fn layers_in_order(tensor: &Tensor, order: &Tensor) -> Tensor {
    Tensor::stack(&(0..tensor.size()[0]).map(|layer| in_order(&tensor.get(layer), order)).collect::<Vec<_>>(), 0)
}

/// An order of queries, `[B, N]`, in which they have these classes and boxes: where CORA's code does not say how it has sorted those of a class.
fn order_of(found: &Found, classes: &Tensor, boxes: &Tensor) -> Tensor {
    let far = found.classes.unsqueeze(1).not_equal_tensor(&classes.unsqueeze(2)).to_kind(Kind::Float) * 10.0;
    let own = found.outputs.boxes.get(-1).detach();
    // [B, N, N], expected by found.
    let apart = (boxes.unsqueeze(2) - own.unsqueeze(1)).abs().amax([3], false) + far;
    let order = apart.argmin(2, false);
    let (sorted, _) = order.sort(1, false);
    assert_eq!(sorted, Tensor::arange(24, (Kind::Int64, Device::Cpu)).expand_as(&order), "each query is one of ours");
    order
}

/// Anchors with their classes, all outputs of the localizer, and detections, of two images in one batch; the order of queries is CORA's.
#[test]
fn a_detector_is_that_of_cora_s_code() {
    let (golden, clip, (_store, localizer)) = (cora("detector_eval"), tiny(), localizer());
    let regions = clip.regions().unwrap();
    let (order, texts) = (&golden["order"], &golden["text"]);
    let found = found(&localizer, &regions, &images(), &SIZES, texts, 8.0);
    let Found { classes, memory, outputs, features, scores } = &found;
    assert_eq!(*classes, golden["anchor_class_factor8"]);
    assert_eq!(in_order(classes, order), golden["sorted_class"]);

    let layer3 = regions.layer3(&images(), &SIZES).unwrap();
    let Linear { weight, bias } = &localizer.projection;
    check("projected map", &layer3.features.conv2d(weight, Some(bias), 1, 0, 1, 1), &golden["input_proj"], TOLERANCE);
    let content = localizer.content([2, 24], texts, classes).unwrap();
    check("content", &in_order(&content, order), &golden["tgt"], TOLERANCE);
    // Tokens of padding have no meaning.
    for (image, [rows, columns]) in (0..).zip(layer3.valid()) {
        let cut = |tokens: &Tensor| tokens.reshape([6, 8, 256]).narrow(0, 0, rows).narrow(1, 0, columns);
        check("memory", &cut(&memory.tokens.get(image)), &cut(&golden["memory"].select(1, image)), TOLERANCE);
    }
    let levels = Tensor::from_slice(&[0_i64, 1, 5]);
    check("states", &layers_in_order(&outputs.states.index_select(0, &levels), order), &golden["hs"], TOLERANCE);
    check("references", &layers_in_order(&outputs.references, order), &golden["references"], TOLERANCE);
    check("anchors", &in_order(&outputs.references.get(0), order), &golden["proposal"].transpose(0, 1), 1e-6);
    check("boxes", &layers_in_order(&outputs.boxes, order), &golden["boxes_levels"], TOLERANCE);
    check("objectness", &layers_in_order(&outputs.objectness, order), &golden["objectness_levels"].squeeze_dim(3), TOLERANCE);
    check("features of boxes", &in_order(features, order), &golden["final_features"], TOLERANCE);
    check("stored logits", &in_order(&logits(scores), order), &golden["stored_logits"], OF_LOGITS);

    for (image, size) in (0..).zip(Vec::<Vec<i64>>::try_from(&golden["orig_sizes"]).unwrap()) {
        let size = ImageSize { width: size[1], height: size[0] };
        let kept = Selection::default().detections(&outputs.boxes.i((-1, image)), &scores.get(image), size).unwrap();
        let of = |name: &str| &golden[&format!("det_{name}{image}")];
        assert_eq!(Tensor::from_slice(&kept.classes), *of("labels"));
        check("detections", &kept.boxes, of("boxes"), 640.0 * TOLERANCE);
        check("scores", &Tensor::from_slice(&kept.scores), of("scores"), TOLERANCE);
    }
}

/// Without a favour of novel classes.
#[test]
fn a_detector_without_a_factor_is_that_of_cora_s_code() {
    let (golden, clip, (_store, localizer)) = (cora("detector_eval"), tiny(), localizer());
    let found = found(&localizer, &clip.regions().unwrap(), &images(), &SIZES, &golden["text"], 1.0);
    assert_eq!(found.classes, golden["anchor_class_factor1"]);
    let (classes, boxes) = (&golden["factor1_sorted_class"], &golden["factor1_boxes"]);
    let order = order_of(&found, classes, boxes);
    check("boxes", &in_order(&found.outputs.boxes.get(-1), &order), boxes, TOLERANCE);
}

/// Defect 14: without the other image, which is larger, even the classes of anchors are others.
#[test]
fn an_image_alone_is_found_as_by_cora_s_code() {
    let (golden, clip, (_store, localizer)) = (cora("detector_eval"), tiny(), localizer());
    let image = cora("trunk")["image1"].unsqueeze(0);
    let found = found(&localizer, &clip.regions().unwrap(), &image, &SIZES[1..], &golden["text"], 8.0);
    let (classes, boxes) = (&golden["alone_image1_sorted_class"], &golden["alone_image1_boxes"]);
    let order = order_of(&found, classes, boxes);
    assert_eq!(in_order(&found.classes, &order), *classes);
    assert!(found.classes != golden["anchor_class_factor8"].narrow(0, 1, 1));
    check("boxes", &in_order(&found.outputs.boxes.get(-1), &order), boxes, TOLERANCE);
    check("stored logits", &in_order(&logits(&found.scores), &order), &golden["alone_image1_logits"], OF_LOGITS);
}
