//! DetPro's detector: its losses by its own code, and its scores by its specification.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::{
    super::{
        classifier::{Background, EmbeddingClassifier, Ensemble, HeadWeight, LogitScale, Vocabulary},
        distillation::embedding_loss,
    },
    networks::declare,
};
use crate::{
    Phase,
    detection::boxes::{floats, integers},
    golden::{detpro_ralf, error},
};

/// Temperatures of cosines in training and in detection.
const SCALE: LogitScale = LogitScale::Temperature { train: 0.01, test: 0.007 };

fn set(parameter: &Tensor, value: &Tensor) {
    tch::no_grad(|| parameter.shallow_clone().copy_(value));
}

/// Classes with base ones first, and where each class then is.
fn base_first(n_classes: i64, novel: &[i64]) -> (Vec<i64>, Vec<i64>) {
    let mut order: Vec<i64> = (0..n_classes).filter(|class| !novel.contains(class)).collect();
    order.extend(novel);
    let mut places = vec![0; n_classes as usize + 1];
    order.iter().enumerate().for_each(|(place, class)| places[*class as usize] = place as i64);
    places[n_classes as usize] = n_classes;
    (order, places)
}

/// Losses to 1e-4, gradients to 1e-3.
#[test]
fn losses_and_gradients_are_those_of_detpros_code() {
    let golden = detpro_ralf("detector");
    let input = |name: &str| golden[&format!("losses/{name}")].shallow_clone();
    let expected = |name: &str| golden[&format!("losses_detpro/{name}")].shallow_clone();
    let gradient = |found: &Tensor, loss: &str, of: &str| {
        let expected = expected(&format!("d_{loss}_d_{of}"));
        let apart = error(found, &expected) / expected.abs().max().double_value(&[]).max(1.0);
        assert!(apart < 1e-3, "{loss}, {of}: {apart}");
    };
    let branch = |background, [weight, bias]: [&str; 2]| -> (_, EmbeddingClassifier, BTreeMap<String, Tensor>) {
        let (store, classifier, parameters) = declare("detpro", |at| EmbeddingClassifier::of_regions(at, 12, 16, background));
        set(&parameters["detpro._linear.weight"], &input(weight));
        set(&parameters["detpro._linear.bias"], &input(bias));
        (store, classifier, parameters)
    };

    let (_store, text, parameters) = branch(Background::Learned, ["Wt", "bt"]);
    set(&parameters["detpro._bg_embedding"], &(input("bgw").squeeze_dim(1) + input("bgb")).unsqueeze(0));
    let (order, places) = base_first(9, &integers(&input("novel")));
    let n_base = 9 - input("novel").size()[0];
    let classes = Vocabulary::new(input("T").index_select(0, &Tensor::from_slice(&order)), n_base, SCALE).unwrap();
    let labels: Vec<i64> = integers(&input("labels")).into_iter().map(|label| places[label as usize]).collect();
    let x = input("xt").set_requires_grad(true);
    let logits = text.logits(&text.embed(&x), &classes, Phase::Train).unwrap();
    let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&labels));
    assert!(error(&loss, &expected("text_cls_loss")) < 1e-4 * loss.double_value(&[]));
    loss.backward();
    gradient(&x.grad(), "text_cls_loss", "xt");
    gradient(&parameters["detpro._linear.weight"].grad(), "text_cls_loss", "Wt");
    gradient(&parameters["detpro._linear.bias"].grad(), "text_cls_loss", "bt");
    // One embedding here, a weight and a bias there: both get its gradient.
    let of_background = parameters["detpro._bg_embedding"].grad();
    gradient(&of_background.tr(), "text_cls_loss", "bgw");
    gradient(&of_background.squeeze_dim(0), "text_cls_loss", "bgb");

    let (_store, image, parameters) = branch(Background::Masked, ["Wi", "bi"]);
    let x = input("xi").set_requires_grad(true);
    let loss = embedding_loss(&image.embed(&x), &input("teacher")).unwrap() * 256.0;
    assert!(error(&loss, &expected("kd_loss")) < 1e-4 * loss.double_value(&[]));
    loss.backward();
    gradient(&x.grad(), "kd_loss", "xi");
    gradient(&parameters["detpro._linear.weight"].grad(), "kd_loss", "Wi");
    gradient(&parameters["detpro._linear.bias"].grad(), "kd_loss", "bi");
}

/// Parity check 9: the loss of two regions from cosines, the second of which is background; and what a novel column would change.
#[test]
fn novel_columns_take_no_part_in_the_loss() {
    let cosines = Tensor::from_slice(&[0.30_f32, 0.32, 0.34, 0.29, 0.28, 0.25, 0.22, 0.31, 0.24, 0.26]).view([2, 5]);
    let columns = |order: [i64; 4]| cosines.index_select(1, &Tensor::from_slice(&order));
    let loss = |columns: &Tensor, tau: f64, labels: [i64; 2]| (columns / tau).cross_entropy_for_logits(&Tensor::from_slice(&labels));
    assert!((loss(&columns([0, 1, 3, 4]), 0.01, [1, 3]).double_value(&[]) - 0.302_450).abs() < 1e-5);
    assert!((loss(&columns([0, 1, 3, 4]), 0.007, [1, 3]).double_value(&[]) - 0.167_254).abs() < 1e-5);
    assert!((loss(&cosines, 0.01, [1, 4]).double_value(&[]) - 3.580_544).abs() < 1e-5);
}

/// Parity check 11: scores of four classes, the third of which is novel, so that it is the last here.
#[test]
fn scores_are_those_of_the_specification() {
    let columns = |cosines: [f64; 4]| Tensor::from_slice(&cosines).view([1, 4]) / 0.007;
    let text = Tensor::cat(&[columns([0.30, 0.28, 0.29, 0.25]), Tensor::full([1, 1], 0.20 / 0.007, (Kind::Double, tch::Device::Cpu))], 1);
    let image =
        Tensor::cat(&[columns([0.27, 0.29, 0.26, 0.31]), Tensor::full([1, 1], f64::NEG_INFINITY, (Kind::Double, tch::Device::Cpu))], 1);
    let scores = |ensemble: Ensemble| {
        let found = ensemble.scores(&text, &image, &Tensor::from_slice(&[0.3_f32]), 3).unwrap();
        floats(&found)
    };
    let near = |found: &[f32], expected: [f32; 4]| found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5);
    assert!(near(&scores(Ensemble::default()), [0.122_642, 0.047_318, 0.029_391, 0.081_458]));
    // A fixed lambda of 0.6: the text head's exponent for all classes.
    let (text_head, image_head) = (HeadWeight::of(0.6), HeadWeight::of(0.4));
    let fixed =
        Ensemble { box_base: text_head, box_novel: text_head, object_base: image_head, object_novel: image_head, ..Ensemble::default() };
    assert!(near(&scores(fixed), [0.084_921, 0.047_956, 0.020_351, 0.011_493]));
}

/// Parity check 10.
#[test]
fn distillation_is_the_mean_difference_of_all_numbers() {
    let unit = |rows: [[f32; 3]; 2]| crate::to_unit_length(&Tensor::from_slice(&rows.concat()).view([2, 3]));
    let [said, taught] = [[[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]], [[2.0, 2.0, 1.0], [0.0, 4.0, 3.0]]].map(unit);
    assert!((256.0 * embedding_loss(&said, &taught).unwrap().double_value(&[]) - 45.511_111).abs() < 1e-4);
}
