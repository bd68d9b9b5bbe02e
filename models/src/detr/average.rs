//! The moving average of weights. (Section 10.)

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Result, error::ensure};

/// Tensors that the reference has under two names, below this prefix. (Defect 6.)
const TWICE: &str = "bbox_embed.";

/// The arithmetic of an average. (Defects 6 and 29.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Averaging {
    /// In f32, which at a decay of 0.99996 does not move an average that is within 0.1 % of its weight; heads of boxes are averaged twice in
    /// each step.
    #[default]
    Reference,
    /// In f64, each tensor once.
    Fixed,
}

/// A moving average of weights.
#[derive(Debug)]
pub struct Average {
    averages: BTreeMap<String, Tensor>,
    decay: f64,
    averaging: Averaging,
}

impl Average {
    /// An average that begins as these weights. `decay`: the part of it that stays in each step.
    pub fn new(parameters: &BTreeMap<String, Tensor>, decay: f64, averaging: Averaging) -> Self {
        let kind = averaging.kind();
        // Of the average's own memory, also where the kind is that of the weights.
        let averages = parameters.iter().map(|(name, tensor)| (name.clone(), tensor.detach().to_kind(kind).copy())).collect();
        Self { averages, decay, averaging }
    }

    /// Continues from [`Self::averages`], f32 or f64 as `averaging` has them.
    pub fn resume(averages: BTreeMap<String, Tensor>, decay: f64, averaging: Averaging) -> Result<Self> {
        let kind = averaging.kind();
        for tensor in averages.values() {
            ensure(tensor.kind() == kind, "averages of weights", &format!("{kind:?}"), tensor)?;
        }
        Ok(Self { averages, decay, averaging })
    }

    /// Moves the average towards the weights of a step. They must have the names and shapes of the first ones.
    pub fn update(&mut self, parameters: &BTreeMap<String, Tensor>) {
        assert!(parameters.keys().eq(self.averages.keys()), "BUG: averaged weights have always the same names");
        tch::no_grad(|| {
            for ((name, average), weights) in self.averages.iter_mut().zip(parameters.values()) {
                let weights = weights.to_kind(average.kind()) * (1.0 - self.decay);
                let times = if self.averaging == Averaging::Reference && name.starts_with(TWICE) { 2 } else { 1 };
                for _ in 0..times {
                    *average *= self.decay;
                    *average += &weights;
                }
            }
        });
    }

    /// The averages by name, in the kind that they are computed in: what must be kept to continue.
    pub fn averages(&self) -> &BTreeMap<String, Tensor> {
        &self.averages
    }

    /// The averages by name, f32: what a network computes with.
    pub fn weights(&self) -> BTreeMap<String, Tensor> {
        self.averages.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Float))).collect()
    }
}

impl Averaging {
    fn kind(self) -> Kind {
        match self {
            Self::Reference => Kind::Float,
            Self::Fixed => Kind::Double,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{cora, cora_values, error};

    const HEAD: &str = "bbox_embed.0.layers.0.weight";

    fn named(p: &Tensor, h: &Tensor) -> BTreeMap<String, Tensor> {
        [("query_embed.weight", p), (HEAD, h)].into_iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
    }

    /// The same products in f32 and the same sums: no number differs.
    #[test]
    fn averages_are_those_of_cora_s_code() {
        let golden = cora("optim_ema");
        let mut average = Average::new(&named(&golden["p0"], &golden["h0"]), 0.99996, Averaging::Reference);
        for step in 0..50 {
            average.update(&named(&golden["p"].get(step), &golden["h"].get(step)));
            assert!(error(&average.averages()["query_embed.weight"], &golden["ema_p"].get(step)) <= 0.0, "{step}");
            assert!(error(&average.averages()[HEAD], &golden["ema_h"].get(step)) <= 0.0, "{step}");
        }
    }

    /// O2 of the specification, and its dead zone.
    #[test]
    fn a_fixed_average_moves_and_counts_heads_once() {
        let number = |value: f64| Tensor::from_slice(&[value as f32]);
        let after = |averaging, weight: f64, n_steps: usize| {
            let mut average = Average::new(&named(&number(1.0), &number(1.0)), 0.99996, averaging);
            (0..n_steps).for_each(|_| average.update(&named(&number(weight), &number(weight))));
            ["query_embed.weight", HEAD].map(|name| average.averages()[name].double_value(&[0]))
        };
        let close = |found: [f64; 2], expected: [f64; 2], most: f64| {
            assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < most), "{found:?}");
        };
        // A step of f32 at 1 is 1.2e-7.
        close(after(Averaging::Reference, 2.0, 1), [1.00004, 1.00008], 2e-7);
        close(after(Averaging::Fixed, 2.0, 1), [1.00004, 1.00004], 1e-12);
        close(after(Averaging::Reference, 1.0005, 2000), [1.0, 1.0], 1e-12);
        let moved = 1.0 + f64::from(1.0005_f32 - 1.0) * (1.0 - 0.99996_f64.powi(2000));
        close(after(Averaging::Fixed, 1.0005, 2000), [moved; 2], 1e-12);
    }

    #[test]
    fn an_average_that_continues_is_one_that_was_never_stopped() {
        for averaging in [Averaging::Reference, Averaging::Fixed] {
            let weights = |step: usize| named(&cora_values(&format!("p{step}"), &[4], 1.0, 0.0), &cora_values("h", &[3], 1.0, 0.0));
            let mut whole = Average::new(&weights(0), 0.9, averaging);
            whole.update(&weights(1));
            let kept = whole.averages().iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect();
            let mut part = Average::resume(kept, 0.9, averaging).unwrap();
            [&mut whole, &mut part].into_iter().for_each(|average| average.update(&weights(2)));
            assert_eq!(whole.averages(), part.averages());
            assert!(whole.weights().values().all(|tensor| tensor.kind() == Kind::Float));
            let other = if averaging == Averaging::Fixed { Averaging::Reference } else { Averaging::Fixed };
            let kept = whole.averages().iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect();
            assert!(Average::resume(kept, 0.9, other).is_err());
        }
    }
}
