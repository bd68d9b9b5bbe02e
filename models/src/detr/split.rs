//! The steps of training in which classes are split in two. (Section 7.2.)

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How steps are chosen. (Defect 13.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SplitSteps {
    /// By the number of the step within its epoch alone: the same steps in each epoch, 21.35 % of 3,367 for a share of 0.2.
    #[default]
    Reference,
    /// By the seed, the epoch and the step.
    Fixed,
}

impl SplitSteps {
    /// Whether classes are split in a step; `share`: of the steps in which they are, from 0 to 1; `step`: within the epoch, from 0.
    pub fn splits(self, share: f64, seed: u64, epoch: u32, step: u32) -> bool {
        let drawn = match self {
            Self::Reference => first_double(step),
            Self::Fixed => {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(u64::from(epoch) << 32 | u64::from(step));
                (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
            }
        };
        drawn < share
    }
}

/// The length of the generator's state, and the place of the number that a new one is mixed with.
const LENGTH: usize = 624;
const MIXED: usize = 397;

/// The first double in [0, 1) of the Mersenne Twister that Python seeds with a number. (Matsumoto and Nishimura 1998, MT19937, seeded by an
/// array of one number.)
pub fn first_double(seed: u32) -> f64 {
    let state = seeded(seed);
    let word = |place: usize| {
        let joined = state[place] & 0x8000_0000 | state[place + 1] & 0x7fff_ffff;
        let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
        let mut y = state[place + MIXED] ^ (joined >> 1) ^ twist;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    };
    (f64::from(word(0) >> 5) * f64::from(1 << 26) + f64::from(word(1) >> 6)) / (1_u64 << 53) as f64
}

fn seeded(seed: u32) -> [u32; LENGTH] {
    let mut state = [19_650_218_u32; LENGTH];
    let mixed = |state: &[u32; LENGTH], place: usize| state[place - 1] ^ (state[place - 1] >> 30);
    for place in 1..LENGTH {
        state[place] = mixed(&state, place).wrapping_mul(1_812_433_253).wrapping_add(place as u32);
    }
    let mut place = 1;
    // Each round fills a number from the one before; behind the last it begins again at the second.
    let next = |state: &mut [u32; LENGTH], place: usize| {
        if place + 1 < LENGTH {
            return place + 1;
        }
        state[0] = state[LENGTH - 1];
        1
    };
    for _ in 0..LENGTH {
        state[place] = (state[place] ^ mixed(&state, place).wrapping_mul(1_664_525)).wrapping_add(seed);
        place = next(&mut state, place);
    }
    for _ in 1..LENGTH {
        state[place] = (state[place] ^ mixed(&state, place).wrapping_mul(1_566_083_941)).wrapping_sub(place as u32);
        place = next(&mut state, place);
    }
    state[0] = 0x8000_0000;
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{cora, error};
    use tch::Tensor;

    #[test]
    fn steps_are_those_of_cora_s_code() {
        let golden = cora("split_steps");
        let doubles: Vec<f64> = (0..64).map(first_double).collect();
        assert!(error(&Tensor::from_slice(&doubles), &golden["first_double_of_seed_0_63"]) <= 0.0);
        let steps: Vec<i64> = (0..3367).filter(|&step| SplitSteps::Reference.splits(0.2, 1, 2, step)).map(i64::from).collect();
        assert_eq!(Tensor::from_slice(&steps), golden["split_steps_of_3367_p02"]);
    }

    #[test]
    fn fixed_steps_depend_on_seed_and_epoch_and_have_their_share() {
        let steps = |seed, epoch| (0..10_000).filter(|&step| SplitSteps::Fixed.splits(0.2, seed, epoch, step)).collect::<Vec<u32>>();
        assert!(steps(1, 0) != steps(1, 1) && steps(1, 0) != steps(2, 0));
        assert_eq!(steps(1, 0), steps(1, 0));
        // The deviation of a number of 10,000 is 40.
        assert!(steps(1, 0).len().abs_diff(2000) < 160);
        assert!((0..100).all(|step| !SplitSteps::Fixed.splits(0.0, 1, 0, step) && SplitSteps::Fixed.splits(1.0, 1, 0, step)));
    }
}
