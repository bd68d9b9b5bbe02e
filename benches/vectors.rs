//! Random vectors for benches of searches.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// `n` vectors of unit length, of `D` numbers each.
pub(crate) fn vectors<const D: usize>(seed: u64, n: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers: Vec<f32> = (0..n * D).map(|_| random.random_range(-1.0..1.0_f32)).collect();
    for row in numbers.chunks_mut(D) {
        let length = row.iter().map(|number| number * number).sum::<f32>().sqrt();
        row.iter_mut().for_each(|number| *number /= length);
    }
    numbers
}
