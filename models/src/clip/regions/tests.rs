//! Regions against the published code of CORA (`tests/golden/cora`) and against the formulas of its specification, section 15.

use std::{collections::BTreeMap, path::Path};

use tch::{IndexOp, Reduction, nn};

use super::*;
use crate::{
    clip::{Activation, Config, ImageConfig, TextConfig, tokenizer::Overlong},
    detection::boxes::boxes_tensor,
    detr::{
        prematch::{Favour, classify},
        scores::{Background, Selection, scores},
    },
    golden::{cora, cora_values, cora_weights, error},
    layers::Linear,
};

/// Features differ by less; with the mean as a key and a value or without, they differ by about a hundred times as much.
const TOLERANCE: f64 = 5e-6;
/// The sizes of the two golden images, padded to 131 x 101.
pub(crate) const SIZES: [ImageSize; 2] = [ImageSize { width: 131, height: 101 }, ImageSize { width: 107, height: 93 }];

/// A CLIP ResNet of width 4 with golden weights, and a text tower.
fn clip(stream: &str, blocks: [usize; 4], grid: i64, text: (TextConfig, &BTreeMap<String, Tensor>)) -> Clip {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::ResNet { image_side: 32 * grid, layers: blocks, width: 4, heads: 2 },
        text: text.0,
        activation: Activation::QuickGelu,
    };
    let store = nn::VarStore::new(Device::Cpu);
    Clip::new(&store.root(), &config, 1).unwrap();
    let mut weights: BTreeMap<String, Tensor> = store.variables().into_iter().collect();
    weights.extend(cora_weights(stream).into_iter().map(|(name, tensor)| (format!("visual.{name}"), tensor)));
    weights.extend(text.1.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
    Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap()
}

fn no_texts() -> (TextConfig, BTreeMap<String, Tensor>) {
    (TextConfig { context: 4, vocabulary: 8, width: 64, heads: 1, depth: 1 }, BTreeMap::new())
}

/// The CLIP of the golden data, grid of 7.
pub(crate) fn tiny() -> Clip {
    let (config, weights) = no_texts();
    clip("tiny", [1, 2, 1, 2], 7, (config, &weights))
}

fn tiny9() -> Clip {
    let (config, weights) = no_texts();
    clip("tiny9", [1, 1, 1, 1], 9, (config, &weights))
}

/// Both golden images, padded.
pub(crate) fn images() -> Tensor {
    let trunk = cora("trunk");
    let padded = |name: &str, size: ImageSize| trunk[name].constant_pad_nd([0, 131 - size.width, 0, 101 - size.height]);
    Tensor::stack(&[padded("image0", SIZES[0]), padded("image1", SIZES[1])], 0)
}

fn layer3(features: &Tensor) -> Layer3 {
    Layer3 { features: features.shallow_clone(), sizes: BatchSizes::of(SIZES.to_vec()) }
}

fn layer4(features: &Tensor) -> Layer4 {
    Layer4 { features: features.shallow_clone(), sizes: BatchSizes::of(SIZES.to_vec()) }
}

/// Fails where numbers are farther apart than a tolerance.
#[track_caller]
pub(crate) fn check(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = error(found, expected);
    println!("{what}: {error:.1e}");
    assert!(error < tolerance, "{what}: {error:.1e}");
}

/// Ones where `valid` says that a map of `like`'s size is padding.
fn mask(valid: &[[i64; 2]], like: &Tensor) -> Tensor {
    let mask = like.ones_like();
    for (image, &[rows, columns]) in valid.iter().enumerate() {
        mask.i((image as i64, ..rows, ..columns)).copy_(&Tensor::from(0_i64));
    }
    mask
}

#[test]
fn maps_and_what_of_them_is_padding_equal_the_references() {
    let (golden, clip) = (cora("trunk"), tiny());
    let weights = cora_weights("tiny");
    for (name, tensor) in golden.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("w:")?, tensor))) {
        assert_eq!(weights[name], *tensor, "{name}");
    }
    let resnet = clip.towers.image.resnet().unwrap();
    let mut map = resnet.stem(&images(), Phase::Test);
    check("stem", &map, &golden["stem"], 1e-5);
    for index in 0..4 {
        map = resnet.layer(index, &map, Phase::Test);
        let name = format!("layer{}", index + 1);
        check(&name, &map, &golden[name.as_str()], 1e-5);
    }

    let regions = clip.regions().unwrap();
    let layer3 = regions.layer3(&images(), &SIZES).unwrap();
    check("layer 3", &layer3.features, &golden["layer3"], 1e-5);
    assert_eq!(mask(&layer3.valid(), &golden["mask3"]), golden["mask3"]);
    let layer4 = regions.layer4(&layer3).unwrap();
    check("layer 4", &layer4.features, &golden["layer4"], 1e-5);
    assert_eq!(mask(&layer4.valid(), &golden["mask4"]), golden["mask4"]);
}

#[test]
fn a_whole_image_has_the_references_embedding() {
    let image = cora_values("image2", &[1, 3, 224, 224], 1.5, 0.0);
    let found = tiny().encode_image(&image, Phase::Test).unwrap();
    check("embedding", &found, &cora("encodings")["clip_image_embedding"], 2e-5);
}

#[test]
fn texts_of_eighty_templates_have_the_references_tokens_and_embeddings() {
    let golden = cora("text");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/strings.json");
    let strings: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let strings: BTreeMap<String, Vec<String>> = serde_json::from_value(strings["text.npz"].clone()).unwrap();
    let (words, some) = (&strings["names"], &strings["templates_used_for_tokens"]);
    let config = TextConfig { context: 77, vocabulary: 49_408, width: 64, heads: 1, depth: 1 };
    let text = cora_weights("text");
    let rows = text["token_embedding.weight"].index_select(0, &golden["w_check_token_rows"]);
    assert_eq!(rows, golden["w_check_token_embedding"]);
    let clip = clip("tiny", [1, 2, 1, 2], 7, (config, &text));
    let templates = templates();
    for context in [15, 25, 77] {
        let tokenizer = clip.architecture.network.tokenizer().with_context(context).with_padding(crate::clip::tokenizer::Padding::Context);
        let named = |templates: &[String], word: &String| -> Vec<String> {
            templates.iter().map(|template| template.replace("{}", word)).collect()
        };
        let texts: Vec<String> = words.iter().flat_map(|word| named(some, word)).collect();
        assert_eq!(tokenizer.batch(&texts, Overlong::Truncate).unwrap(), golden[format!("tokens_{context}").as_str()]);

        let mean = |word: &String| {
            let tokens = tokenizer.batch(&named(&templates, word), Overlong::Truncate).unwrap();
            to_unit_length(&clip.encode_text_features(&tokens).unwrap().mean_dim(0, false, None::<Kind>))
        };
        let found = Tensor::stack(&words.iter().map(mean).collect::<Vec<_>>(), 0);
        check(&format!("context {context}"), &found, &golden[format!("embedding_{context}").as_str()], 1e-5);
    }
    // T2 of the specification: a mean of texts of unit length.
    let two = Tensor::from_slice(&[1.0_f32, 0.0, 0.6, 0.8]).view([2, 2]).mean_dim(0, false, None::<Kind>);
    check("T2", &to_unit_length(&two), &Tensor::from_slice(&[0.894427_f32, 0.447214]), 1e-5);
    // T3, between the ids of the beginning and the end.
    let tokenizer = clip.architecture.network.tokenizer();
    for (text, ids) in [("a photo of a skateboard.", vec![320, 1125, 539, 320, 31777, 269]), ("a origami tv.", vec![320, 31832, 1583, 269])]
    {
        let found = Vec::<i64>::try_from(tokenizer.batch(&[text], Overlong::Truncate).unwrap().get(0)).unwrap();
        assert_eq!(found[..ids.len() + 2], [[49_406].as_slice(), &ids, &[49_407]].concat());
    }
}

/// CORA's eighty templates (section 3.3).
fn templates() -> Vec<String> {
    const PHOTOS: &str = "bad photo,low resolution photo,rendering,cropped photo,tattoo,bright photo,dark photo,drawing,close-up photo,\
        black and white photo,painting,pixelated photo,sculpture,blurry photo,jpeg corrupted photo,good photo,doodle,sketch,rendition,photo";
    let mut all: Vec<String> =
        ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."].map(String::from).into();
    for article in ["a", "the"] {
        all.extend(PHOTOS.split(',').map(|photo| format!("a {photo} of {article} {{}}.")));
        all.extend(["graffiti", "art", "itap"].map(|art| format!("{art} of {article} {{}}.")));
        let looks = ["hard to see", "clean", "dirty", "cool", "nice", "weird", "small", "large"];
        all.extend(looks.map(|look| format!("a photo of {article} {look} {{}}.")));
        let materials = ["plastic", "embroidered", "origami", "toy", "plushie", "cartoon"];
        all.extend(materials.map(|material| format!("{article} {material} {{}}.")));
        all.push(format!("{article} {{}} in a video game."));
    }
    assert_eq!(all.len(), 80);
    all
}

#[test]
fn boxes_outside_and_without_area_are_pooled_as_torchvision_does() {
    let golden = cora("roialign");
    let boxes = golden["boxes"].shallow_clone();
    for side in [2, 7, 14] {
        let map = golden["map"].detach().set_requires_grad(true);
        let pooled = roi_align(side, &map, &[boxes.shallow_clone()]).unwrap();
        check(&format!("side {side}"), &pooled, &golden[format!("out{side}").as_str()], 2e-6);
        if side == 7 {
            let weights = Tensor::arange(49, (Kind::Float, Device::Cpu)).view([7, 7]) * (2.0 / 48.0) - 1.0;
            (pooled * weights).sum(Kind::Float).backward();
            check("gradient", &map.grad(), &golden["grad7"], 2e-6);
        }
    }
    // R1 of the specification.
    let map = field(&[4, 5], |index| (0.7 * index[0] + 0.4 * index[1]).sin()).view([1, 1, 4, 5]);
    let boxes = [[1.0, 0.5, 4.0, 3.5], [-3.0, -2.5, 2.0, 1.5], [2.0, 1.0, 2.0, 3.0], [0.2, 0.1, 0.9, 0.6]];
    let expected = [[0.771910, 0.901696, 0.790737, 0.406356], [0.0, 0.0, 0.0, 0.316046], [0.0; 4], [0.0, 0.087619, 0.0, 0.087619]];
    check("R1", &roi_align(2, &map, &[boxes_tensor(&boxes)]).unwrap().view([4, 4]), &boxes_tensor(&expected), 1e-5);
}

#[test]
fn both_ways_give_the_references_features_and_not_each_others() {
    let (golden, clip) = (cora("roi_features"), tiny());
    let regions = clip.regions().unwrap();
    let (layer3, layer4, boxes) = (layer3(&golden["layer3"]), layer4(&golden["layer4"]), &golden["boxes"]);
    assert_eq!(layer3.valid(), [[6, 8], [6, 7]]);
    assert_eq!(layer4.valid(), [[3, 4], [3, 4]], "more than 107 / 32 cells");

    let fast = regions.fast(&layer4, boxes).unwrap();
    check("fast", &fast, &golden["fast"], TOLERANCE);
    let per_image = [boxes.shallow_clone(), boxes.shallow_clone()];
    let exact = regions.exact(&layer3, &per_image).unwrap().view([2, 12, 16]);
    check("exact", &exact, &golden["exact"], TOLERANCE);
    let grids = regions.grids(&layer3, &per_image).unwrap();
    check("layer 4 of boxes", &grids.view([2, 12, 128, 7, 7]).i((.., [0_i64, 3].as_slice())), &golden["layer4_of_roi"], 1e-5);
    let raw = regions.pool.pool(&grids, regions.table()).view([2, 12, 16]);
    check("without unit length", &raw, &golden["exact_unnormalised"], 2e-5);

    // Intermediates: boxes in cells of layer 3 and of layer 4.
    let relative = cxcywh_to_xyxy(boxes);
    let in_both = |valid: &[[i64; 2]]| -> Vec<Tensor> {
        valid.iter().map(|&[rows, columns]| in_cells(&relative, [columns as f32, rows as f32])).collect()
    };
    let pooled = roi_align(14, &layer3.features, &in_both(&layer3.valid())).unwrap().view([2, 12, 64, 14, 14]);
    check("layer 3 of boxes", &pooled.i((.., [0_i64, 3, 6].as_slice())), &golden["roi3_14"], 1e-5);
    let pooled = roi_align(7, &layer4.features, &in_both(&layer4.valid())).unwrap();
    check("boxes on layer 4", &pooled.view([2, 12, 128, 7, 7]).i((.., [0_i64, 3, 8].as_slice())), &golden["roi4_7"], 1e-5);

    // The same map and boxes, with the mean as a key and a value.
    let full = to_unit_length(&regions.pool.pool(&pooled, regions.table())).view([2, 12, 16]);
    check("full pooling of layer 4", &full, &golden["no_efficient"], TOLERANCE);
    for (image, of_box) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
        let difference = error(&full.i((image, of_box)), &fast.i((image, of_box)));
        println!("box {of_box} of image {image}: {difference:.1e}");
        assert!(difference > 80.0 * TOLERANCE, "box {of_box} of image {image}: {difference:.1e}");
    }
    // Boxes without area: the biases and the table are left.
    assert_eq!(fast.i((0, 8)), fast.i((1, 9)));
    assert!(error(&exact.i((0, 8)), &exact.i((1, 9))) < 1e-6);
}

#[test]
fn the_grid_of_nine_gives_the_references_features() {
    let (golden, clip) = (cora("roi_features_s9"), tiny9());
    let regions = clip.regions().unwrap();
    assert_eq!((regions.side(), regions.table().size()), (9, vec![82, 128]));
    let boxes = golden["boxes"].shallow_clone();
    // The maps are of no image and have valid sizes of their own, W and H.
    let valid = |name: &str| <[f32; 2]>::try_from(Vec::<f32>::try_from(golden[name].to_kind(Kind::Float)).unwrap()).unwrap();
    let fast = regions.pool.fast(&golden["layer4"], &[valid("valid4")], &boxes, regions.table(), Overhang::Reference).unwrap();
    check("fast", &fast, &golden["fast"], TOLERANCE);
    let pooled = roi_align(18, &golden["layer3"], &[in_cells(&cxcywh_to_xyxy(&boxes), valid("valid3"))]).unwrap();
    let grids = regions.resnet.layer(3, &pooled, Phase::Test);
    check("exact", &regions.pool(regions.table(), &grids).unwrap().view([1, 4, 16]), &golden["exact"], TOLERANCE);
}

#[test]
fn the_detectors_anchors_and_boxes_get_the_references_classes_and_detections() {
    let (golden, clip) = (cora("detector_eval"), tiny());
    let regions = clip.regions().unwrap();
    let layer3 = regions.layer3(&images(), &SIZES).unwrap();
    let anchors = cora_weights("det")["query_embed.weight"].narrow(0, 0, 24).sigmoid();
    let features = regions.fast(&regions.layer4(&layer3).unwrap(), &anchors).unwrap();
    check("anchors", &features, &golden["fast_features"], TOLERANCE);
    let cosines = features.matmul(&golden["text"].tr());
    let novel = Vec::<i64>::try_from(&cora("prematch")["coco65_factor8.novel"]).unwrap();
    for factor in [1.0, 8.0] {
        let found = classify(&cosines, 100.0, Some(Favour { factor, classes: &novel }), None).unwrap();
        assert_eq!(found.classes, golden[format!("anchor_class_factor{factor}").as_str()]);
    }

    let boxes: Vec<Tensor> = (0..2).map(|image| golden["boxes_levels"].i((5, image))).collect();
    let features = regions.exact(&layer3, &boxes).unwrap().view([2, 24, 16]);
    check("boxes", &features, &golden["final_features"], 2e-5);
    let sizes = Vec::<Vec<i64>>::try_from(&golden["orig_sizes"]).unwrap();
    for (image, boxes) in boxes.iter().enumerate() {
        let at = image as i64;
        let cosines = features.get(at).matmul(&golden["text"].tr());
        let objectness = golden["objectness_levels"].i((5, at, .., 0));
        let scores = scores(&cosines, &objectness, 100.0, Background::Reference).unwrap();
        check("scores", &scores, &golden["stored_logits"].get(at).sigmoid(), 2e-5);
        let size = ImageSize { width: sizes[image][1], height: sizes[image][0] };
        let kept = Selection::default().detections(boxes, &scores, size).unwrap();
        assert_eq!(Tensor::from_slice(&kept.classes), golden[format!("det_labels{image}").as_str()]);
        check("detections", &kept.boxes, &golden[format!("det_boxes{image}").as_str()], 1e-3);
        check("scores", &Tensor::from_slice(&kept.scores), &golden[format!("det_scores{image}").as_str()], 2e-5);
    }
}

#[test]
fn valid_sizes_are_counted_as_the_reference_counts_them() {
    let table = cora("roi_features")["valid_table"].shallow_clone();
    for row in Vec::<Vec<i64>>::try_from(table).unwrap() {
        let [padded, image, layer3, layer4] = row[..] else { panic!("four columns") };
        assert_eq!([16, 32].map(|stride| valid_cells(image, padded, stride)), [layer3, layer4], "{image} of {padded}");
    }
    // Section 2.3 of the specification.
    for (padded, image, expected) in [(1333, 1066, [67, 33]), (1333, 800, [50, 25]), (1066, 1066, [66, 33]), (1199, 1066, [67, 33])] {
        assert_eq!([16, 32].map(|stride| valid_cells(image, padded, stride)), expected, "{image} of {padded}");
    }
    let sides = [(480, 30, 15), (600, 37, 18), (749, 46, 23), (800, 50, 25), (1066, 66, 33), (1199, 75, 37), (1333, 83, 41)];
    for (px, layer3, layer4) in sides {
        assert_eq!([16, 32].map(|stride| n_cells(px, stride)), [layer3, layer4], "{px}");
    }
}

/// What an optimizer makes of these gradients is tested with the stage.
#[test]
fn a_table_gets_the_references_gradients() {
    let (golden, clip) = (cora("prompt_train"), tiny());
    let regions = clip.regions().unwrap();
    let layer3 = regions.layer3(&images(), &SIZES).unwrap();
    let named = |name: &str| golden[name].shallow_clone();
    let (a, b) =
        ([named("boxes_a_image0"), named("boxes_a_image1")], [Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)), named("boxes_b_image1")]);
    let grids = [regions.grids(&layer3, &a).unwrap(), regions.grids(&layer3, &b).unwrap()];
    check("grids of A", &grids[0], &golden["grid_a"], 1e-5);
    check("grids of B", &grids[1], &golden["grid_b"], 1e-5);
    check("features of A", &regions.exact(&layer3, &a).unwrap(), &golden["feat_a"], TOLERANCE);
    check("features of B", &regions.exact(&layer3, &b).unwrap(), &golden["feat_b"], TOLERANCE);
    assert_eq!(*regions.table(), golden["table0"]);

    for (step, batch, name) in [(0, 0, "a"), (1, 1, "b"), (2, 0, "a")] {
        let values = named(&format!("table{step}")).set_requires_grad(true);
        let logits = regions.pool(&values, &grids[batch]).unwrap().matmul(&golden["text"].tr()) * 100.0;
        check(&format!("logits {step}"), &logits, &golden[format!("logits_step{step}").as_str()], 1e-4);
        if step < 2 {
            logits.cross_entropy_loss(&named(&format!("labels_{name}")), None::<&Tensor>, Reduction::Mean, -100, 0.0).backward();
            check(&format!("gradient {step}"), &values.grad(), &golden[format!("grad_step{step}").as_str()], 1e-5);
        }
    }
}

/// A tensor f32 of a formula over indices.
fn field(shape: &[i64], formula: impl Fn(&[f64]) -> f64) -> Tensor {
    let n = shape.iter().product::<i64>();
    let value = |flat: i64| {
        let mut index = vec![0.0; shape.len()];
        let mut rest = flat;
        for (place, &size) in shape.iter().enumerate().rev() {
            index[place] = (rest % size) as f64;
            rest /= size;
        }
        formula(&index) as f32
    };
    Tensor::from_slice(&(0..n).map(value).collect::<Vec<f32>>()).reshape(shape)
}

/// The pooling of checks P1 to P6: 4 channels, 2 heads, a grid of 2 x 2, D = 3.
fn small_pool() -> AttentionPool {
    let linear = |k: f64, rows: i64| Linear {
        weight: field(&[rows, 4], |index| 4.0 * 0.25 * (k + 1.3 * index[0] + 0.7 * index[1]).sin()),
        bias: field(&[rows], |index| 0.1 * (k + index[0]).cos()),
    };
    AttentionPool {
        positional_embedding: field(&[5, 4], |index| (0.9 * index[0] + 0.6 * index[1]).sin()),
        q_proj: linear(1.0, 4),
        k_proj: linear(2.0, 4),
        v_proj: linear(3.0, 4),
        c_proj: linear(4.0, 3),
        heads: 2,
    }
}

fn small_map(h: i64, w: i64) -> Tensor {
    field(&[1, 4, h, w], |index| (0.5 * index[1] + 0.8 * index[2] - 0.3 * index[3]).cos())
}

fn row(numbers: [f64; 3]) -> Tensor {
    to_unit_length(&Tensor::from_slice(&numbers).to_kind(Kind::Float).view([1, 3]))
}

#[test]
fn small_poolings_have_the_numbers_of_the_specification() {
    let pool = small_pool();
    let table = &pool.positional_embedding;
    let full = pool.pool(&small_map(2, 2), table);
    check("P1", &full, &Tensor::from_slice(&[4.074616_f32, 4.595473, -1.600572]).view([1, 3]), 1e-5);
    let cases = [
        ("P2", (2, 2), [0.0, 0.0, 2.0, 2.0], [4.076444, 4.578969, -1.611229], [4.074616, 4.595473, -1.600572]),
        ("P3", (4, 5), [0.8, 0.4, 3.9, 3.1], [4.104500, 4.817416, -1.511717], [4.082939, 4.826383, -1.485358]),
        ("P4", (4, 5), [-3.0, -2.5, 2.0, 1.5], [2.186321, 2.054536, -1.071672], [2.345701, 2.551497, -0.965180]),
    ];
    for (name, (h, w), [x1, y1, x2, y2], fast, full) in cases {
        let map = small_map(h, w);
        let relative: [f32; 4] = [(x1 + x2) / 2.0 / w as f32, (y1 + y2) / 2.0 / h as f32, (x2 - x1) / w as f32, (y2 - y1) / h as f32];
        let found = pool.fast(&map, &[[w as f32, h as f32]], &boxes_tensor(&[relative]), table, Overhang::Reference).unwrap();
        check(name, &found.view([1, 3]), &row(fast), 1e-5);
        let pooled = roi_align(2, &map, &[boxes_tensor(&[[x1, y1, x2, y2]])]).unwrap();
        check(&format!("{name}, full"), &to_unit_length(&pool.pool(&pooled, table)), &row(full), 1e-5);
    }
}

#[test]
fn gradients_to_a_table_are_those_of_finite_differences() {
    // P6, in f64.
    let mut pool = small_pool();
    for linear in [&mut pool.q_proj, &mut pool.k_proj, &mut pool.v_proj, &mut pool.c_proj] {
        linear.cast(Kind::Double);
    }
    let grids =
        field(&[3, 4, 2, 2], |index| (0.9 * index[0] + 0.5 * index[1] + 0.8 * index[2] - 0.3 * index[3]).cos()).to_kind(Kind::Double);
    let texts = to_unit_length(&field(&[4, 3], |index| (1.0 + 2.0 * index[0] + index[1]).sin()).to_kind(Kind::Double));
    let labels = Tensor::from_slice(&[0_i64, 2, 3]);
    let loss = |table: &Tensor| {
        let logits = to_unit_length(&pool.pool(&grids, table)).matmul(&texts.tr()) * 10.0;
        logits.cross_entropy_loss(&labels, None::<&Tensor>, Reduction::Mean, -100, 0.0)
    };
    let table = pool.positional_embedding.to_kind(Kind::Double).set_requires_grad(true);
    loss(&table).backward();
    let table = no_grad(|| table.copy()).set_requires_grad(true);
    let gradient = Tensor::run_backward(&[loss(&table)], &[&table], false, false).remove(0);
    for row in [0, 3] {
        for column in 0..4 {
            let moved = |by: f64| {
                let moved = table.detach().copy();
                let value = moved.double_value(&[row, column]);
                moved.i((row, column)).copy_(&Tensor::from(value + by));
                loss(&moved).double_value(&[])
            };
            let (found, expected) = (gradient.double_value(&[row, column]), (moved(1e-5) - moved(-1e-5)) / 2e-5);
            assert!((found - expected).abs() < 1e-3 * expected.abs() + 1e-9, "{row}, {column}: {found} and {expected}");
        }
    }
}

#[test]
fn gradients_flow_to_the_table_alone_even_where_the_tower_is_trained() {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::ResNet { image_side: 64, layers: [1, 1, 1, 1], width: 4, heads: 2 },
        text: no_texts().0,
        activation: Activation::QuickGelu,
    };
    let store = nn::VarStore::new(Device::Cpu);
    let clip = Clip::new(&store.root(), &config, 1).unwrap();
    let regions = clip.regions().unwrap();
    let size = ImageSize { width: 64, height: 96 };
    let layer3 = regions.layer3(&cora_values("image", &[1, 3, 96, 64], 2.0, 0.0), &[size]).unwrap();
    let boxes = boxes_tensor(&[[0.5, 0.5, 0.6, 0.5], [0.2, 0.3, 0.2, 0.1]]);
    let fast = regions.fast(&regions.layer4(&layer3).unwrap(), &boxes).unwrap();
    let grids = regions.grids(&layer3, &[boxes]).unwrap();
    assert!(!fast.requires_grad() && !grids.requires_grad() && !regions.table().requires_grad());
    let table = regions.table().copy().set_requires_grad(true);
    let features = regions.pool(&table, &grids).unwrap();
    features.i((.., 0)).sum(Kind::Float).backward();
    assert!(table.grad().abs().max().double_value(&[]) > 0.0);
    assert!(store.variables().values().all(|variable| !variable.grad().defined()));
}

#[test]
fn a_table_changes_both_ways_and_a_wrong_shape_is_refused() {
    let (golden, clip) = (cora("roi_features"), tiny());
    let boxes = golden["boxes"].shallow_clone();
    let per_image = [boxes.shallow_clone(), boxes.shallow_clone()];
    let (layer3, layer4) = (layer3(&golden["layer3"]), layer4(&golden["layer4"]));
    let plain = clip.regions().unwrap();
    let prompted = clip.regions().unwrap().with_table(&(plain.table() * 0.5)).unwrap();
    assert!(error(&prompted.fast(&layer4, &boxes).unwrap(), &golden["fast"]) > 1e-3);
    let exact = prompted.exact(&layer3, &per_image).unwrap();
    assert!(error(&exact.view([2, 12, 16]), &golden["exact"]) > 1e-3);
    let pooled = plain.pool(prompted.table(), &plain.grids(&layer3, &per_image).unwrap()).unwrap();
    assert_eq!(pooled, exact);

    let error = clip.regions().unwrap().with_table(&Tensor::zeros([82, 128], (Kind::Float, Device::Cpu))).unwrap_err();
    assert_eq!(error.to_string(), "region prompt: expected floating [50, 128], found Float [82, 128]");
}

#[test]
fn a_vision_transformer_has_no_regions() {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::Vit { image_side: 32, patch: 16, width: 64, depth: 1, heads: 1, mlp_width: 64 },
        text: no_texts().0,
        activation: Activation::QuickGelu,
    };
    let clip = Clip::new(&nn::VarStore::new(Device::Cpu).root(), &config, 1).unwrap();
    assert_eq!(
        clip.regions().unwrap_err().to_string(),
        "image tower: expected a modified ResNet, whose layers regions are pooled from, found ViT/16 at 32 px: 1 blocks of width 64, 1 heads"
    );
}

#[test]
fn maps_and_boxes_that_do_not_fit_are_refused() {
    let clip = tiny();
    let regions = clip.regions().unwrap();
    let golden = cora("roi_features");
    let boxes = golden["boxes"].shallow_clone();
    let refused = |result: Result<Tensor>| result.unwrap_err().to_string();
    let of_layer4 = layer3(&golden["layer4"]);
    assert_eq!(
        refused(regions.exact(&of_layer4, &[boxes.shallow_clone(), boxes.shallow_clone()])),
        "layer 3: expected floating [B, 64, 6, 8], of images of 131 x 101 px, found Float [2, 128, 3, 4]"
    );
    assert_eq!(
        refused(regions.exact(&layer3(&golden["layer3"]), &[boxes.shallow_clone()])),
        "boxes: expected 2, one for each image, found 1"
    );
    assert_eq!(
        refused(regions.fast(&layer4(&golden["layer4"]), &(&boxes / 0.0))),
        "boxes to pool: expected corners between -1000000 and 1000000 px, found NaN"
    );
    let large = [ImageSize { width: 132, height: 101 }, SIZES[1]];
    assert_eq!(
        regions.layer3(&images(), &large).unwrap_err().to_string(),
        "image sizes: expected from 1 x 1 to 131 x 101 px, the size of the batch, found 132 x 101 px"
    );
}

#[test]
fn pieces_of_boxes_and_images_without_any_give_the_same_features() {
    let boxes = [3, 0, 4].map(|n| Tensor::arange(4 * n, (Kind::Float, Device::Cpu)).view([n, 4]));
    for most in [1, 2, 5, 100] {
        let pieces = chunks(&boxes, most);
        assert_eq!(pieces.len() as i64, (7 + most - 1) / most);
        assert!(pieces.iter().all(|piece| piece.iter().map(|boxes| boxes.size()[0]).sum::<i64>() <= most));
        for (image, expected) in boxes.iter().enumerate() {
            let joined = Tensor::cat(&pieces.iter().map(|piece| piece[image].shallow_clone()).collect::<Vec<_>>(), 0);
            assert_eq!(joined, *expected);
        }
    }
    let (golden, clip) = (cora("roi_features"), tiny());
    let regions = clip.regions().unwrap();
    let none = golden["boxes"].narrow(0, 0, 0);
    let [layer3, layer4] = [layer3(&golden["layer3"]).features, layer4(&golden["layer4"]).features];
    let (layer3, layer4) = (self::layer3(&layer3), self::layer4(&layer4));
    assert_eq!(regions.exact(&layer3, &[none.shallow_clone(), none.shallow_clone()]).unwrap().size(), [0, 16]);
    assert_eq!(regions.grids(&layer3, &[none.shallow_clone(), none.shallow_clone()]).unwrap().size(), [0, 128, 7, 7]);
    assert_eq!(regions.fast(&layer4, &none).unwrap().size(), [2, 0, 16]);
    let some = regions.exact(&layer3, &[none, golden["boxes"].shallow_clone()]).unwrap();
    check("second image alone", &some, &golden["exact"].get(1), TOLERANCE);
}

#[test]
fn fixed_rules_cut_anchors_off_and_take_extents_from_px() {
    let (golden, clip) = (cora("roi_features"), tiny());
    let (layer4, boxes) = (layer4(&golden["layer4"]), &golden["boxes"]);
    let fast = |overhang, extent| clip.regions().unwrap().with_rules(Rules { overhang, extent }).fast(&layer4, boxes).unwrap();
    let cut = fast(Overhang::Fixed, Extent::Reference);
    // Box 5 ends below the image, but all that it pools there is the last row, cut off or not.
    let changed: Vec<i64> =
        (0..12).filter(|&index| error(&cut.i((.., index)), &golden["fast"].i((.., index))) > 100.0 * TOLERANCE).collect();
    assert_eq!(changed, [3, 4, 6, 10, 11]);

    let by_px = fast(Overhang::Reference, Extent::Fixed);
    let expected = [[131.0, 101.0], [107.0, 93.0]].map(|size| size.map(|px: f32| px / 32.0));
    assert_eq!(layer4.sizes.extents(STRIDE_4, Extent::Fixed), expected);
    assert!(error(&by_px.i((1, 0)), &golden["fast"].i((1, 0))) > 1e-4);
}
