//! One step of an optimizer, for one tensor. What a training does around it (schedules, groups, clipping) is the training's.

use tch::Tensor;

/// SGD with momentum, as PyTorch's: the gradient, with the decay, joins a moving sum that the weights go down along.
pub(crate) struct Sgd {
    pub(crate) momentum: f64,
}

impl Sgd {
    /// `decay`: of the weights, added to the gradient; `velocity`: the moving sum, zeros at first. All tensors have one shape. Call without gradients.
    pub(crate) fn step(&self, rate: f64, decay: f64, weights: &mut Tensor, gradient: &Tensor, velocity: &mut Tensor) {
        *velocity *= self.momentum;
        *velocity += gradient + &*weights * decay;
        *weights -= &*velocity * rate;
    }
}

/// AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch's.
pub(crate) struct AdamW {
    pub(crate) betas: [f64; 2],
    pub(crate) epsilon: f64,
}

impl AdamW {
    /// `n_steps`: counted from 1; `moments`: the first and the second, zeros at first. All tensors have one shape. Call without gradients.
    pub(crate) fn step(&self, n_steps: i32, rate: f64, decay: f64, weights: &mut Tensor, gradient: &Tensor, moments: &mut [Tensor; 2]) {
        let [first, second] = moments;
        let correction = self.betas.map(|beta| 1.0 - beta.powi(n_steps));
        *weights *= 1.0 - rate * decay;
        *first *= self.betas[0];
        *first += gradient * (1.0 - self.betas[0]);
        *second *= self.betas[1];
        *second += gradient * gradient * (1.0 - self.betas[1]);
        let denominator = (&*second / correction[1]).sqrt() + self.epsilon;
        *weights -= &*first / denominator * (rate / correction[0]);
    }
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
        let (optimizer, rates) = (AdamW { betas: [0.9, 0.98], epsilon: 1e-6 }, [0.1, 0.1, 0.01]);
        let mut tensors = [[0.5_f32, -1.0, 2.0], [1.5, 0.25, -0.75]].map(|numbers| Tensor::from_slice(&numbers).set_requires_grad(true));
        let mut moments = [(); 2].map(|()| [(); 2].map(|()| Tensor::zeros([3], (Kind::Float, Device::Cpu))));
        let expected: Vec<Step> = serde_json::from_str(include_str!("../../tests/golden/training/adamw.json")).unwrap();
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
