//! The parts that have parameters: backbone, pyramid, proposals, classifier.

use std::{cell::RefCell, collections::BTreeMap};

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Device, Kind, Tensor, nn};

use super::super::{
    classifier::{Background, EmbeddingClassifier, Ensemble, HeadWeight, LogitScale, SumAboveOne, Vocabulary},
    heads::{Trunk, TrunkConfig},
    regions::RegionsConfig,
    rpn::{self, ProposalRule, Rpn},
};
use crate::{
    Phase,
    detection::{
        boxes::{ImageSize, Suppression, boxes_tensor, floats},
        fpn::{self, Fpn},
        golden::{Golden, boxes_of, field, fill, images},
        matching::{Sampler, Truth},
        resnet::{self, Depth, ResNet, StridePlace},
    },
    golden::{error, unit},
    parameters::{Fill, Parameters},
};

/// Declares a part of a network under its mmdet name.
pub(super) fn declare<T>(name: &str, part: impl FnOnce(&Parameters<'_>) -> T) -> (nn::VarStore, T, BTreeMap<String, Tensor>) {
    let store = nn::VarStore::new(Device::Cpu);
    let declared = RefCell::default();
    let part = part(&(&Parameters::new(&store.root(), Fill::Seed(1), &declared) / name));
    (store, part, declared.into_inner())
}

/// Compares a map with its summary; the error is relative to the spread.
fn summary_error(found: &Tensor, expected: &Golden) -> f64 {
    assert_eq!(found.size(), expected.integers("shape"));
    let flat = found.contiguous().view(-1);
    let step = (flat.size()[0] / 200).max(1);
    let some = flat.slice(0, 0, None, step);
    let spread = expected.0["std"].as_f64().unwrap();
    error(&some, &expected.tensor("values", &some.size())) / spread
}

#[track_caller]
fn check_maps(found: &[Tensor], golden: &Golden, case: &str) {
    let expected = golden.parts(case);
    assert_eq!(found.len(), expected.len());
    let errors: Vec<f64> = found.iter().zip(&expected).map(|(found, expected)| summary_error(found, expected)).collect();
    println!("{case}: {errors:?}");
    assert!(errors.iter().all(|error| *error < 1e-4), "{case}: {errors:?}");
}

#[test]
fn feature_maps_equal_torchvisions() {
    let golden = Golden::read("backbones");
    let config = RegionsConfig::oadp().backbone;
    for (case, depth, stride) in [
        ("middle", Depth::R50, StridePlace::Middle),
        ("first", Depth::R50, StridePlace::First),
        ("18", Depth::R18, StridePlace::First),
        ("101", Depth::R101, StridePlace::Middle),
    ] {
        let config = resnet::Config { depth, stride, ..config.clone() };
        let (_store, resnet, parameters) = declare("backbone", |at| ResNet::declare(at, &config));
        fill(&parameters, "backbone.");
        // Frozen statistics: training makes no difference.
        for phase in [Phase::Test, Phase::Train] {
            let maps = resnet.forward(&images("images.backbone", [2, 3, 96, 128]), phase).unwrap();
            assert_eq!([0, 1, 2, 3].map(|map: usize| maps[map].size()[1]), config.channels());
            check_maps(&maps, &golden, case);
        }
    }
}

#[test]
fn resnet_101_has_torchvisions_tensors() {
    let config = resnet::Config { depth: Depth::R101, ..RegionsConfig::oadp().backbone };
    let (_store, _, parameters) = declare("backbone", |at| ResNet::declare(at, &config));
    let found: BTreeMap<String, Vec<i64>> = parameters.iter().map(|(name, t)| (name.replacen("backbone.", "", 1), t.size())).collect();
    let golden = Golden::read("backbones");
    let expected = golden.0["names.resnet101"].as_array().unwrap().iter().map(|entry| {
        let shape = entry[1].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect();
        (entry[0].as_str().unwrap().to_owned(), shape)
    });
    assert_eq!(found, expected.collect());
}

#[test]
fn stem_and_first_stage_do_not_learn_and_the_others_do() {
    let (store, resnet, parameters) = declare("backbone", |at| ResNet::declare(at, &RegionsConfig::oadp().backbone));
    let learning = store.trainable_variables().len();
    let is_low = |name: &str| name.starts_with("backbone.layer1.") || !name.starts_with("backbone.layer");
    let is_running = |name: &str| name.contains("running_");
    assert_eq!(learning, parameters.keys().filter(|name| !is_low(name) && !is_running(name)).count());
    let mean = parameters["backbone.layer2.0.bn1.running_mean"].copy();
    resnet.forward(&images("images.train", [1, 3, 64, 64]), Phase::Train).unwrap()[3].sum(Kind::Float).backward();
    assert!(parameters["backbone.layer2.0.bn1.weight"].grad().abs().max().double_value(&[]) > 0.0);
    assert!(!parameters["backbone.layer1.0.conv1.weight"].grad().defined());
    assert_eq!(parameters["backbone.layer2.0.bn1.running_mean"], mean);
}

#[test]
fn pyramids_equal_torchvisions() {
    let golden = Golden::read("backbones");
    let widths = [8, 12, 16, 20];
    let sides = [(25, 19), (13, 10), (7, 5), (4, 3)];
    let maps = [0, 1, 2, 3].map(|level: usize| field(&format!("pyramid.{level}"), &[2, widths[level], sides[level].0, sides[level].1]));
    for (norm, case) in [(fpn::Norm::Bias, "pyramid.bias"), (fpn::Norm::Batch, "pyramid.batch")] {
        let (_store, neck, parameters) = declare("neck", |at| Fpn::declare(at, &fpn::Config { channels: 16, norm }, widths));
        fill(&parameters, "");
        check_maps(&neck.forward(&maps, Phase::Test), &golden, case);
        if norm == fpn::Norm::Batch {
            check_maps(&neck.forward(&maps, Phase::Train), &golden, "pyramid.batch.train");
        }
    }
}

/// The proposal network of `make_rpn`, and what it says of two images.
fn small_rpn(sampler: Sampler) -> (nn::VarStore, Rpn, [Tensor; 5], [ImageSize; 2]) {
    let config = RegionsConfig::oadp().rpn;
    let (store, rpn, parameters) = declare("rpn_head", |at| Rpn::declare(at, &rpn::Config { sampler, ..config }, 16));
    fill(&parameters, "");
    let sides = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)];
    let pyramid = [0, 1, 2, 3, 4].map(|level: usize| field(&format!("rpn.{level}"), &[2, 16, sides[level].0, sides[level].1]));
    (store, rpn, pyramid, [ImageSize { width: 160, height: 128 }, ImageSize { width: 90, height: 100 }])
}

#[test]
fn losses_of_proposals_equal_torchvisions() {
    let everything = Sampler { n: 100_000, object_fraction: 1.0, background_per_object: None };
    let (_store, rpn, pyramid, sizes) = small_rpn(everything);
    let predictions = rpn.forward(&pyramid, [128, 160]);
    let truths = [boxes_of("rpn.objects.0", 4, 70.0, 20.0, 60.0), boxes_of("rpn.objects.1", 2, 30.0, 20.0, 50.0)]
        .map(|boxes| boxes_tensor(&boxes).into());
    let losses = rpn.losses(&predictions, &sizes, &truths, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
    let golden = Golden::read("rpn");
    for (found, name) in [(losses.objectness, "objectness"), (losses.boxes, "boxes")] {
        let (found, expected) = (found.double_value(&[]), golden.0[name].as_f64().unwrap());
        assert!((found / expected - 1.0).abs() < 1e-5, "{name}: {found} {expected}");
    }
}

#[test]
fn proposals_equal_torchvisions() {
    let (_store, rpn, pyramid, sizes) = small_rpn(RegionsConfig::oadp().rpn.sampler);
    let rule = ProposalRule { per_level: 300, suppression: Suppression { iou: 0.7, keep: 100 }, least_side: 1e-3 };
    let found = rpn.proposals(&rpn.forward(&pyramid, [128, 160]), &sizes, &rule).unwrap();
    for (found, expected) in found.iter().zip(Golden::read("rpn").parts("proposals")) {
        assert!(error(&found.boxes, &expected.tensor("boxes", &[100, 4])) < 1e-3);
        assert!(error(&found.scores, &expected.tensor("scores", &[100])) < 1e-5);
    }
}

#[test]
fn images_without_objects_teach_background_only() {
    let (_store, rpn, pyramid, sizes) = small_rpn(RegionsConfig::oadp().rpn.sampler);
    let predictions = rpn.forward(&pyramid, [128, 160]);
    let none = || Truth::from(Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)));
    let draw = |seed| rpn.losses(&predictions, &sizes, &[none(), none()], &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
    let losses = draw(1);
    assert_eq!(floats(&losses.boxes), [0.0]);
    assert_eq!(losses.objectness, draw(1).objectness);
    assert_ne!(losses.objectness, draw(2).objectness);
    (losses.objectness + losses.boxes).backward();
    let refusal = rpn.losses(&predictions, &sizes, &[none()], &mut ChaCha8Rng::seed_from_u64(1)).unwrap_err().to_string();
    assert_eq!(refusal, "images with objects: expected 2, one for each image, found 1");
}

fn classifier(background: Background) -> (nn::VarStore, EmbeddingClassifier) {
    let (store, classifier, parameters) = declare("classifier", |at| EmbeddingClassifier::of_regions(at, 12, 8, background));
    for (name, parameter) in &parameters {
        tch::no_grad(|| parameter.shallow_clone().copy_(&field(name, &parameter.size())));
    }
    (store, classifier)
}

const TEMPERATURE: LogitScale = LogitScale::Temperature { train: 0.007, test: 0.01 };

fn vocabulary(scale: LogitScale) -> Vocabulary {
    Vocabulary::new(field("classifier.classes", &[7, 8]), 4, scale).unwrap()
}

#[test]
fn logits_are_cosines_over_a_temperature_or_scaled_and_biased() {
    let golden = Golden::read("classifier");
    let (_store, classifier) = classifier(Background::Learned);
    let embeddings = classifier.embed(&field("classifier.x", &[5, 12]));
    assert!(error(&embeddings, &golden.tensor("embeddings", &[5, 8])) < 1e-6);
    let logits = |scale, phase| classifier.logits(&embeddings, &vocabulary(scale), phase).unwrap();
    assert!(error(&logits(TEMPERATURE, Phase::Test), &golden.tensor("test", &[5, 8])) < 1e-4);
    assert!(error(&logits(LogitScale::Affine { scaler: 20.0, bias: 4.0 }, Phase::Test), &golden.tensor("affine", &[5, 8])) < 1e-4);
    // In training classes 0 to 3 and background are live.
    let (train, expected) = (logits(TEMPERATURE, Phase::Train), golden.tensor("train", &[5, 8]));
    for column in [0, 1, 2, 3, 7] {
        assert!(error(&train.select(1, column), &expected.select(1, column)) < 1e-4);
    }
    assert_eq!(floats(&train.narrow(1, 4, 3)), [f32::NEG_INFINITY; 15]);
}

#[test]
fn novel_classes_get_no_gradient_and_do_not_disturb_that_of_others() {
    let (_store, classifier) = classifier(Background::Learned);
    let table = field("classifier.classes", &[7, 8]).set_requires_grad(true);
    let vocabulary = Vocabulary::new(table.shallow_clone(), 4, TEMPERATURE).unwrap();
    let embeddings = classifier.embed(&field("classifier.x", &[5, 12]));
    let logits = classifier.logits(&embeddings, &vocabulary, Phase::Train).unwrap();
    logits.cross_entropy_for_logits(&Tensor::from_slice(&[0_i64, 1, 2, 3, 7])).backward();
    assert_eq!(floats(&table.grad().narrow(0, 4, 3)), [0.0; 24]);
    assert!(table.grad().narrow(0, 0, 4).abs().max().double_value(&[]) > 0.0);
    assert!(table.grad().isfinite().all().int64_value(&[]) == 1);
}

#[test]
fn background_is_learned_masked_dropped_or_absent() {
    let x = field("classifier.x", &[5, 12]);
    for (background, n_columns, n_learning) in
        [(Background::Learned, 8, 3), (Background::Masked, 8, 2), (Background::Dropped, 7, 2), (Background::Absent, 7, 2)]
    {
        let (store, classifier) = classifier(background);
        let logits = classifier.logits(&classifier.embed(&x), &vocabulary(TEMPERATURE), Phase::Test).unwrap();
        assert_eq!((logits.size(), store.trainable_variables().len()), (vec![5, n_columns], n_learning), "{background:?}");
        assert_eq!(store.variables().len() == 3, background != Background::Absent);
        if background == Background::Masked {
            assert_eq!(floats(&logits.select(1, 7)), [f32::NEG_INFINITY; 5]);
        }
    }
}

#[test]
fn vocabularies_that_make_no_sense_are_refused() {
    let refusal = |n_base, scale| Vocabulary::new(field("classifier.classes", &[7, 8]), n_base, scale).unwrap_err().to_string();
    let expected = "class embeddings: expected f32 [K, D], K at least 1 and at least the 8 base classes, found Float [7, 8]";
    assert_eq!(refusal(8, TEMPERATURE), expected);
    assert!(refusal(-1, TEMPERATURE).starts_with("class embeddings: "));
    assert!(refusal(4, LogitScale::Temperature { train: 0.0, test: 0.01 }).starts_with("logit scale: expected positive numbers"));
    let (_store, classifier) = classifier(Background::Learned);
    let error = classifier.logits(&field("e", &[2, 5]), &vocabulary(TEMPERATURE), Phase::Test).unwrap_err().to_string();
    assert_eq!(error, "embeddings: expected [N, 8], as those of classes, found Float [2, 5]");
}

#[test]
fn scores_of_two_heads_are_geometric_means() {
    let logits = |probabilities: &[f64]| Tensor::from_slice(probabilities).log().to_kind(Kind::Float).reshape([1, -1]);
    let quarter = logits(&[0.25; 4]);
    let third = logits(&[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0]);
    let objectness = Tensor::from_slice(&[0.25_f32]);
    let check = |ensemble: Ensemble, [text, image]: [&Tensor; 2], expected: &[f32]| {
        let found = floats(&ensemble.scores(text, image, &objectness, 1).unwrap());
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(|(found, e)| (found - e).abs() < 1e-5), "{found:?}");
    };
    let ensemble = Ensemble::default();
    check(ensemble, [&quarter, &third], &[0.27516, 0.30285, 0.30285]);
    // The scores of this region sum to more than 1, which the reference turns into no number.
    let sure = [&logits(&[0.99, 0.01, 0.0]), &logits(&[0.92, 0.08, 0.0])];
    check(ensemble, sure, &[0.96609, 0.04]);
    check(Ensemble { sum_above_one: SumAboveOne::Reference, ..ensemble }, sure, &[0.0, 0.0]);
    check(Ensemble { sum_above_one: SumAboveOne::Reference, ..ensemble }, [&quarter, &third], &[0.27516, 0.30285, 0.30285]);
    // Objectness 0.25, of which the root is taken; and the novel class of the text head, whose logit is doubled: 0.01^2 / (0.99 + 0.01^2).
    check(Ensemble { objectness: 0.5, ..ensemble }, sure, &[0.48304, 0.02]);
    let (one, none) = (HeadWeight::of(1.0), HeadWeight::of(0.0));
    let mut doubled = Ensemble { box_base: one, box_novel: one, object_base: none, object_novel: none, ..ensemble };
    doubled.box_novel.scale = 2.0;
    check(doubled, sure, &[0.999_899, 0.000_101]);
}

/// `trunk.py` says what was computed, and how far f32 may be from it.
#[test]
fn trunks_equal_those_written_down_in_numpy() {
    let config = TrunkConfig { n_convs: 4, n_fcs: 1, width: 8 };
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../../../tests/golden/detector/trunk.json")).unwrap();
    let numbers = |value: &serde_json::Value| serde_json::from_value::<Vec<f32>>(value.clone()).unwrap();
    let filled = |name: &str, size: &[i64]| {
        Tensor::from_slice(&unit(name, size.iter().product::<i64>() as usize).collect::<Vec<f32>>()).reshape(size)
    };
    let pooled = filled("trunk.input", &[16, 4, 7, 7]);
    for (phase, case) in [(Phase::Test, "test"), (Phase::Train, "train")] {
        let store = nn::VarStore::new(Device::Cpu);
        let declared = RefCell::default();
        let trunk = Trunk::declare(&Parameters::new(&store.root(), Fill::Seed(1), &declared), &config, [4, 7, 7]);
        let tensors = declared.into_inner();
        tch::no_grad(|| {
            for (name, tensor) in &tensors {
                // Variances and scales are positive.
                let is_positive = name.ends_with("running_var") || name.ends_with("bn.weight");
                let numbers = filled(name, &tensor.size()) + if is_positive { 1.5 } else { 0.0 };
                tensor.shallow_clone().copy_(&numbers);
            }
        });
        let found = trunk.forward(&pooled, phase).unwrap();
        let apart = error(&found.detach(), &Tensor::from_slice(&numbers(&golden[case])).view([16, 8]));
        let size = found.abs().max().double_value(&[]);
        assert!(apart < 1e-4 * size.max(1.0), "{case}: {apart} of {size}");
        if phase == Phase::Train {
            for layer in 0..4 {
                for (place, name) in ["running_mean", "running_var"].into_iter().enumerate() {
                    let found = &tensors[&format!("shared_convs.{layer}.bn.{name}")];
                    let expected = Tensor::from_slice(&numbers(&golden["running"][2 * layer + place]));
                    assert!(error(found, &expected) < 1e-4 * found.abs().max().double_value(&[]).max(1.0), "{layer} {name}");
                }
            }
        }
    }
}
