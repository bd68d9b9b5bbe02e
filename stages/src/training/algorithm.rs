//! One step of an optimization algorithm, for one tensor.

use tch::Tensor;

/// Which algorithm changes the weights, with its constants. Each is PyTorch's.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Algorithm {
    /// Stochastic gradient descent: one moment, the velocity.
    Sgd { momentum: f64 },
    /// Adam (Kingma and Ba 2015), the weight decay added to the gradient: two moments.
    Adam { betas: [f64; 2], epsilon: f64 },
    /// AdamW (Loshchilov and Hutter 2019, algorithm 2): two moments.
    AdamW { betas: [f64; 2], epsilon: f64 },
}

impl Algorithm {
    /// How many tensors, zeros at first, go with each tensor of weights.
    pub(crate) fn n_moments(self) -> usize {
        match self {
            Self::Sgd { .. } => 1,
            Self::Adam { .. } | Self::AdamW { .. } => 2,
        }
    }

    /// Changes weights and moments; all tensors have one shape. `n_steps`: counted from 1. Call without gradients.
    pub(crate) fn step(self, n_steps: i32, lr: f64, decay: f64, weights: &mut Tensor, gradient: &Tensor, moments: &mut [Tensor]) {
        match (self, moments) {
            (Self::Sgd { momentum }, [velocity]) => {
                *velocity *= momentum;
                *velocity += gradient + &*weights * decay;
                *weights -= &*velocity * lr;
            }
            (Self::Adam { betas, epsilon }, [first, second]) => {
                let gradient = gradient + &*weights * decay;
                adaptive_step(betas, epsilon, n_steps, lr, weights, &gradient, [first, second]);
            }
            (Self::AdamW { betas, epsilon }, [first, second]) => {
                *weights *= 1.0 - lr * decay;
                adaptive_step(betas, epsilon, n_steps, lr, weights, gradient, [first, second]);
            }
            (_, moments) => panic!("BUG: {} moments for {self:?}", moments.len()),
        }
    }
}

/// What Adam and AdamW have in common: a step by the first moment over the root of the second, both corrected for their first values.
fn adaptive_step(
    betas: [f64; 2],
    epsilon: f64,
    n_steps: i32,
    lr: f64,
    weights: &mut Tensor,
    gradient: &Tensor,
    [first, second]: [&mut Tensor; 2],
) {
    let correction = betas.map(|beta| 1.0 - beta.powi(n_steps));
    *first *= betas[0];
    *first += gradient * (1.0 - betas[0]);
    *second *= betas[1];
    *second += gradient * gradient * (1.0 - betas[1]);
    let denominator = (&*second / correction[1]).sqrt() + epsilon;
    *weights -= &*first / denominator * (lr / correction[0]);
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use tch::{Device, Kind, no_grad};

    use super::*;

    #[derive(Deserialize)]
    struct Step {
        a: [f32; 3],
        b: [f32; 3],
    }

    #[test]
    fn adamw_descends_as_torch_s() {
        let (optimizer, rates) = (Algorithm::AdamW { betas: [0.9, 0.98], epsilon: 1e-6 }, [0.1, 0.1, 0.01]);
        let mut tensors = [[0.5_f32, -1.0, 2.0], [1.5, 0.25, -0.75]].map(|numbers| Tensor::from_slice(&numbers).set_requires_grad(true));
        let mut moments = [(); 2].map(|()| [(); 2].map(|()| Tensor::zeros([3], (Kind::Float, Device::Cpu))));
        let expected: Vec<Step> = serde_json::from_str(include_str!("../../../tests/golden/training/adamw.json")).unwrap();
        for (step, (expected, rate)) in expected.iter().zip(rates).enumerate() {
            let [a, b] = &mut tensors;
            a.zero_grad();
            b.zero_grad();
            ((&*a * &*a * &*b).sum(Kind::Float) + (&*b * &*b).sum(Kind::Float)).backward();
            for (tensor, moments) in tensors.iter_mut().zip(&mut moments) {
                let gradient = tensor.grad();
                no_grad(|| optimizer.step(step as i32 + 1, rate, 0.05, tensor, &gradient, moments));
            }
            for (found, expected) in tensors.iter().zip([expected.a, expected.b]) {
                let apart = (found - Tensor::from_slice(&expected)).abs().max().double_value(&[]);
                assert!(apart < 1e-6, "step {step}: {apart}");
            }
        }
    }
}
