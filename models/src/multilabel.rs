//! Multilabel classification: the classes that an image or a block of an image shows.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The exponent by which easy negatives lose weight; positives keep theirs.
const FOCUS: i64 = 4;
/// Negatives below this probability are no loss.
const MARGIN: f64 = 0.05;
/// Probabilities are at least this, where their logarithm is taken.
const LEAST: f64 = 1e-8;

/// The asymmetric loss of `logits` f32 `[N, K]` against `targets` of the same shape, 1 where a label is there and 0 elsewhere: the mean over
/// all N x K numbers, and 0 where there are none.
///
/// A positive of probability p costs `-ln p`, a negative `-(1 - q)^4 ln q` with `q = min(1 - p + 0.05, 1)`, whose weight has no gradient. A
/// logit of minus infinity costs nothing as a negative, and no logit gets a gradient from it.
/// (Ridnik et al. 2021, equations 4 to 6; OADP, section 6.4.)
pub fn asymmetric_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if logits.size() != targets.size() {
        let (expected, found) = (format!("{:?}, as the logits", logits.size()), format!("{:?}", targets.size()));
        return Err(Error::Input { what: "labels", expected, found });
    }
    let p = logits.to_kind(Kind::Float).sigmoid();
    let targets = targets.to_device(p.device()).to_kind(Kind::Float);
    let q = (1.0_f64 - &p + MARGIN).clamp_max(1.0);
    let weight = (1.0_f64 - q.detach()).pow_tensor_scalar(FOCUS);
    let positive = p.clamp_min(LEAST).log();
    let negative = weight * q.clamp_min(LEAST).log();
    let cost = -(&targets * positive + (1.0_f64 - &targets) * negative);
    Ok(cost.sum(Kind::Float) / cost.numel().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parity check D6 of OADP's specification.
    #[test]
    fn losses_are_those_of_the_specification() {
        let loss = |p: f64, label: f64| {
            let logit = Tensor::from_slice(&[(p / (1.0 - p)).ln()]).view([1, 1]);
            asymmetric_loss(&logit.to_kind(Kind::Float), &Tensor::from_slice(&[label]).view([1, 1])).unwrap().double_value(&[])
        };
        for (p, label, expected) in
            [(0.5, 1.0, std::f64::consts::LN_2), (0.5, 0.0, 0.024_515_1), (0.9, 0.0, 0.990_308), (0.05, 0.0, 0.0), (0.01, 0.0, 0.0)]
        {
            assert!((loss(p, label) - expected).abs() < 2e-6, "{p} {label}: {}", loss(p, label));
        }
    }

    #[test]
    fn impossible_labels_cost_nothing_and_get_no_gradient() {
        let logits = Tensor::from_slice(&[0.3_f32, f32::NEG_INFINITY]).view([1, 2]).set_requires_grad(true);
        let loss = asymmetric_loss(&logits, &Tensor::zeros([1, 2], (Kind::Float, tch::Device::Cpu))).unwrap();
        loss.backward();
        let gradient = Vec::<f32>::try_from(logits.grad().view(-1)).unwrap();
        assert!(gradient[0] > 0.0 && gradient[1].abs() < 1e-12, "{gradient:?}");
        let alone = asymmetric_loss(&logits.narrow(1, 0, 1), &Tensor::zeros([1, 1], (Kind::Float, tch::Device::Cpu))).unwrap();
        // Half as much: the impossible one counts in the mean.
        assert!((alone.double_value(&[]) - 2.0 * loss.double_value(&[])).abs() < 1e-6);
        let none = Tensor::zeros([0, 2], (Kind::Float, tch::Device::Cpu));
        assert!(asymmetric_loss(&none, &none).unwrap().double_value(&[]).abs() < 1e-12);
    }
}
