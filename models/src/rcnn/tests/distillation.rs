//! What heads learn from embeddings, against torch and scikit-learn.

use tch::{Device, Kind, Tensor};

use super::super::distillation::{embedding_loss, image_embedding_loss, mean_over_groups, recall, relation_loss};
use crate::{
    detection::golden::{Golden, field},
    golden::error,
    multilabel::asymmetric_loss,
    to_unit_length,
};

fn unit_rows(name: &str) -> Tensor {
    to_unit_length(&field(name, &[9, 6]))
}

#[test]
fn losses_and_gradients_equal_torchs() {
    let golden = Golden::read("distillation");
    let expected = unit_rows("distillation.expected");
    type Loss = fn(&Tensor, &Tensor) -> crate::Result<Tensor>;
    for (name, loss) in
        [("embeddings", embedding_loss as Loss), ("relations", relation_loss as Loss), ("images", image_embedding_loss as Loss)]
    {
        for (case, n_images_together) in [("", 2), ("_groups", 1)] {
            let said = unit_rows("distillation.said").set_requires_grad(true);
            let of_rows = |rows: std::ops::Range<i64>| {
                let part = |of: &Tensor| of.slice(0, rows.start, rows.end, 1);
                loss(&part(&said), &part(&expected))
            };
            let found = mean_over_groups(&[4, 5], n_images_together, of_rows).unwrap();
            found.backward();
            let golden = golden.part(&format!("{name}{case}"));
            let expected = golden.tensor("loss", &[1]);
            let relative = error(&found.detach().view(-1), &expected) / expected.double_value(&[0]);
            let errors = [relative, error(&said.grad(), &golden.tensor("gradient", &[9, 6]))];
            assert!(errors.into_iter().all(|error| error < 1e-6), "{name}{case}: {errors:?}");
        }
    }
}

#[test]
fn the_asymmetric_loss_and_recall_are_those_of_the_golden_file() {
    let golden = Golden::read("distillation");
    let (logits, labels) = (field("distillation.logits", &[9, 7]), golden.tensor("labels", &[9, 7]));
    assert!((recall(&logits, &labels, 2).double_value(&[]) - f64::from(golden.floats("recall")[0])).abs() < 1e-6);

    let logits = (logits * 5.0).index_fill(1, &Tensor::from_slice(&[6_i64]), f64::NEG_INFINITY).set_requires_grad(true);
    let loss = asymmetric_loss(&logits, &labels).unwrap();
    loss.backward();
    let golden = golden.part("asymmetric");
    assert!(error(&loss.detach().view(-1), &golden.tensor("loss", &[1])) < 1e-6);
    assert!(error(&logits.grad(), &golden.tensor("gradient", &[9, 7])) < 1e-6);
}

/// Parity check D6 of OADP's specification.
#[test]
fn losses_have_the_values_of_the_specification() {
    let orthonormal = Tensor::eye(6, (Kind::Float, Device::Cpu));
    let equal = orthonormal.narrow(0, 0, 1).repeat([6, 1]);
    assert!(relation_loss(&equal, &equal).unwrap().double_value(&[]).abs() < 1e-9);
    assert!((relation_loss(&orthonormal, &equal).unwrap().double_value(&[]) - 5.0 / 6.0).abs() < 1e-6);

    let [said, expected] = ["distillation.said", "distillation.expected"].map(unit_rows);
    let once = image_embedding_loss(&said, &expected).unwrap().double_value(&[]);
    let twice = |rows: &Tensor| Tensor::cat(&[rows, rows], 0);
    assert!((image_embedding_loss(&twice(&said), &twice(&expected)).unwrap().double_value(&[]) - 2.0 * once).abs() < 1e-5);
}

#[test]
fn nothing_to_learn_is_no_loss_and_other_shapes_are_refused() {
    let none = Tensor::zeros([0, 6], (Kind::Float, Device::Cpu));
    for loss in [embedding_loss, relation_loss, image_embedding_loss] {
        assert!(loss(&none, &none).unwrap().double_value(&[]).abs() < 1e-9);
        let error = loss(&none, &unit_rows("distillation.expected")).unwrap_err().to_string();
        assert_eq!(error, "embeddings to learn: expected [0, 6], as the head's, found Float [9, 6]");
    }
    let labels = Tensor::zeros([0, 4], (Kind::Float, Device::Cpu));
    assert!(recall(&labels, &labels, 5).double_value(&[]).abs() < 1e-9);
}
