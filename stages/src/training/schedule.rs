//! The learning rate over a training.

use std::f64::consts::PI;

/// The learning rate by step.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    /// The learning rate after the warm-up.
    pub(crate) peak: f64,
    pub(crate) warmup: Warmup,
    pub(crate) decay: Decay,
}

/// How the learning rate grows in the first steps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Warmup {
    /// Linearly from a part of the peak at step 0 (mmdet).
    From { part: f64, steps: f64 },
    /// Linearly; step 0 is the first of as many equal parts as there are steps (CLIP).
    FromFirstPart { steps: f64 },
    /// The same rate in every step (Dassl).
    Constant { lr: f64, steps: f64 },
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone)]
pub(crate) enum Decay {
    Constant,
    /// To a tenth at each of these steps.
    Tenths(Vec<u32>),
    /// Along half a cosine, to 0 after as many steps in all. (Loshchilov and Hutter 2017, equation 5.)
    Cosine {
        steps: u32,
    },
    /// The same, at the first step of each epoch, counted from the end of the warm-up (PyTorch's `CosineAnnealingLR`, stepped once an epoch).
    CosineOfEpochs {
        epochs: u32,
        steps_per_epoch: u32,
    },
}

impl Warmup {
    /// No warm-up.
    pub(crate) const NONE: Self = Self::From { part: 1.0, steps: 0.0 };

    fn steps(self) -> f64 {
        match self {
            Self::From { steps, .. } | Self::FromFirstPart { steps } | Self::Constant { steps, .. } => steps,
        }
    }
}

impl Schedule {
    /// The learning rate of a step, counted from 0.
    pub(crate) fn lr_at(&self, step: u32) -> f64 {
        let (step_number, n_warmup) = (f64::from(step), self.warmup.steps());
        if step_number < n_warmup {
            return match self.warmup {
                Warmup::From { part, .. } => self.peak * (part + (1.0 - part) * (step_number / n_warmup)),
                Warmup::FromFirstPart { .. } => self.peak * (step_number + 1.0) / n_warmup,
                Warmup::Constant { lr, .. } => lr,
            };
        }
        self.peak
            * match &self.decay {
                Decay::Constant => 1.0,
                Decay::Tenths(steps) => 0.1_f64.powi(steps.iter().filter(|at| step >= **at).count() as i32),
                Decay::Cosine { steps } => half_cosine((step_number - n_warmup) / (f64::from(*steps) - n_warmup).max(1.0)),
                Decay::CosineOfEpochs { epochs, steps_per_epoch } => {
                    half_cosine(f64::from((step - n_warmup as u32) / (*steps_per_epoch).max(1)) / f64::from(*epochs))
                }
            }
    }
}

/// From 1 to 0 as `done` goes from 0 to 1.
fn half_cosine(done: f64) -> f64 {
    0.5 * (1.0 + (PI * done).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{detpro_ralf, numbers, promptdet};

    /// The schedules of OADP for COCO: parity check D7 of its specification.
    #[test]
    fn rates_are_those_of_the_specification() {
        let schedule = Schedule { peak: 0.02, warmup: Warmup::From { part: 0.001, steps: 500.0 }, decay: Decay::Tenths(vec![30_000]) };
        for (step, lr) in [(0, 2e-5), (250, 0.010_01), (499, 0.019_960_04), (500, 0.02), (29_999, 0.02), (30_000, 0.002)] {
            assert!((schedule.lr_at(step) - lr).abs() < 1e-12, "{step}: {}", schedule.lr_at(step));
        }
    }

    /// LP-OVOD's schedules, of its training on base classes and of probing (L7 and L8).
    #[test]
    fn rates_of_lp_ovod_are_those_of_its_specification() {
        let training =
            Schedule { peak: 0.02, warmup: Warmup::From { part: 0.001, steps: 500.0 }, decay: Decay::Tenths(vec![16 * 6736, 19 * 6736]) };
        for (step, lr) in
            [(0, 2e-5), (250, 0.010_01), (499, 0.019_960_04), (500, 0.02), (107_775, 0.02), (107_776, 0.002), (127_984, 0.0002)]
        {
            assert!((training.lr_at(step) - lr).abs() < 1e-12, "{step}: {}", training.lr_at(step));
        }
        let probing =
            Schedule { peak: 0.001, warmup: Warmup::From { part: 0.1, steps: 20.0 }, decay: Decay::Tenths(vec![8 * 642, 11 * 642]) };
        for (step, lr) in [(0, 1e-4), (10, 5.5e-4), (19, 9.55e-4), (20, 1e-3), (5135, 1e-3), (5136, 1e-4), (7062, 1e-5)] {
            assert!((probing.lr_at(step) - lr).abs() < 1e-12, "{step}: {}", probing.lr_at(step));
        }
    }

    #[test]
    fn a_cosine_is_torch_s() {
        let schedule = Schedule { peak: 0.02, warmup: Warmup::NONE, decay: Decay::Cosine { steps: 9 } };
        let expected: Vec<f64> = serde_json::from_str(include_str!("../../../tests/golden/training/cosine.json")).unwrap();
        for (step, lr) in expected.into_iter().enumerate() {
            assert!((schedule.lr_at(step as u32) - lr).abs() < 1e-12, "{step}");
        }
        let warmed_up = Schedule { warmup: Warmup::From { part: 0.001, steps: 5.0 }, ..schedule };
        assert!((warmed_up.lr_at(5) - 0.02).abs() < 1e-12);
    }

    /// Parity check 6 of DetPro's specification.
    #[test]
    fn a_cosine_of_epochs_is_detpro_s() {
        let decay = Decay::CosineOfEpochs { epochs: 6, steps_per_epoch: 40 };
        let schedule = Schedule { peak: 2e-3, warmup: Warmup::NONE, decay };
        for (epoch, lr) in numbers(&detpro_ralf("detpro")["train/lr_per_epoch"]).into_iter().enumerate() {
            for step in [0, 1, 39] {
                let found = schedule.lr_at(40 * epoch as u32 + step);
                assert!((found - lr).abs() < 1e-12, "epoch {epoch}, step {step}: {found}");
            }
        }
    }

    /// Dassl's scheduler as RPL runs it, of 10 epochs, and parity check P5 of PromptDet's specification.
    #[test]
    fn a_constant_warm_up_is_rpl_s() {
        let check = |epochs, n_warmup: u32, expected: &[f64]| {
            let warmup = Warmup::Constant { lr: 1e-5, steps: f64::from(7 * n_warmup) };
            let schedule = Schedule { peak: 2e-3, warmup, decay: Decay::CosineOfEpochs { epochs, steps_per_epoch: 7 } };
            for (epoch, lr) in expected.iter().enumerate() {
                for step in [0, 1, 6] {
                    let found = schedule.lr_at(7 * epoch as u32 + step);
                    assert!((found - lr).abs() < 1e-10, "epoch {epoch}, step {step}: {found}");
                }
            }
        };
        check(6, 1, &[1e-5, 2e-3, 1.866_025_403_8e-3, 1.5e-3, 1e-3, 5e-4]);
        let golden = promptdet("rpl");
        for n_warmup in [1, 3] {
            check(10, n_warmup, &numbers(&golden[&format!("schedule/max_epoch_10_warmup_{n_warmup}")]));
        }
    }

    #[test]
    fn the_first_part_of_a_warm_up_is_that_of_step_0() {
        let schedule = Schedule { peak: 1.0, warmup: Warmup::FromFirstPart { steps: 4.0 }, decay: Decay::Constant };
        for (step, lr) in [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (400, 1.0)] {
            assert!((schedule.lr_at(step) - lr).abs() < 1e-12, "{step}");
        }
    }
}
