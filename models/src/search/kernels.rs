//! The loops of a search, and the memory that they share with libtorch.

use std::{marker::PhantomData, slice};

use half::f16;
use tch::{Device, Kind, Tensor};

use super::Product;

/// Sums are added up in this many lanes.
const LANES: usize = 16;
/// Numbers that are compared before any of them is looked at, and those of a part of them, in which the first is looked for.
const CHUNK: usize = 256;
const PART: usize = 16;

/// The work space of a kind of product.
#[derive(Debug)]
pub(super) enum Space {
    F32(Buffers<f32>),
    Bf16(Buffers<Bf16Bits>),
}

impl Space {
    pub(super) fn new(product: Product, n_queries: usize, dimension: usize, n_rows: usize) -> Self {
        match product {
            Product::F32 => Self::F32(Buffers::new(n_queries, dimension, n_rows)),
            Product::Bf16 => Self::Bf16(Buffers::new(n_queries, dimension, n_rows)),
        }
    }
}

#[derive(Debug)]
pub(super) struct Buffers<T> {
    /// `[rows, D]`, as the product takes them.
    pub(super) rows: Buffer<T>,
    /// `[Q, rows]`, fast scores; not used where these stay on a device.
    pub(super) scores: Buffer<T>,
}

impl<T: Number> Buffers<T> {
    pub(super) fn new(n_queries: usize, dimension: usize, n_rows: usize) -> Self {
        Self { rows: Buffer::new(dimension * n_rows), scores: Buffer::new(n_queries * n_rows) }
    }
}

/// Memory that libtorch and plain loops both work on, without a copy in between.
#[derive(Debug)]
pub(super) struct Buffer<T> {
    /// Flat, on the CPU, never resized, and shared with nobody but views that last as long as a product.
    memory: Tensor,
    numbers: PhantomData<T>,
}

impl<T: Number> Buffer<T> {
    fn new(n_numbers: usize) -> Self {
        Self { memory: Tensor::zeros([n_numbers as i64], (T::KIND, Device::Cpu)), numbers: PhantomData }
    }

    /// The first numbers as a matrix.
    pub(super) fn view(&self, [height, width]: [i64; 2]) -> Tensor {
        self.memory.narrow(0, 0, height * width).view([height, width])
    }

    /// The first numbers as plain ones.
    #[expect(unsafe_code, reason = "a copy of all scores would take as long as comparing them")]
    pub(super) fn numbers(&mut self, n_numbers: usize) -> &mut [T] {
        assert!(n_numbers <= self.memory.numel(), "BUG: a buffer is as large as its block");
        // SAFETY: the tensor is flat, contiguous, on the CPU, initialised, at least so long, and of `T::KIND`, whose numbers are `T`s for
        // libtorch too, any bits being one. It is borrowed for as long as the slice lives, and no view of it is used meanwhile.
        unsafe { slice::from_raw_parts_mut(self.memory.data_ptr().cast::<T>(), n_numbers) }
    }
}

/// A number of the fast product.
pub(super) trait Number: Copy + Send + Sync {
    const KIND: Kind;
    const ZERO: Self;
    /// The most that rounding to this kind changes of a number, of its size.
    const ROUNDING: f64;
    /// What is compared with: a number is not below it if it came from a score of at least `floor`.
    fn floor(floor: f32) -> Self;
    /// The first of `scores` that is not below `floor`; a NaN is not.
    fn first_not_below(floor: Self, scores: &[Self]) -> Option<usize>;
    /// The least and the most that the score was before it was rounded to this kind.
    fn bounds(self) -> [f32; 2];
    /// `row` times `factor`; all are finite. Returns the squared length, in f32, of what rounding to this kind has changed.
    fn scale(row: &[f32], factor: f32, out: &mut [Self]) -> f32;
}

impl Number for f32 {
    const KIND: Kind = Kind::Float;
    const ZERO: Self = 0.0;
    const ROUNDING: f64 = 0.0;

    fn floor(floor: f32) -> Self {
        floor
    }

    fn first_not_below(floor: Self, scores: &[Self]) -> Option<usize> {
        first_f32(floor, scores)
    }

    fn bounds(self) -> [f32; 2] {
        [self; 2]
    }

    fn scale(row: &[f32], factor: f32, out: &mut [Self]) -> f32 {
        scale_f32(row, factor, out);
        0.0
    }
}

/// bf16 as its bits.
type Bf16Bits = i16;

impl Number for Bf16Bits {
    const KIND: Kind = Kind::BFloat16;
    const ZERO: Self = 0;
    const ROUNDING: f64 = 1.0 / 256.0;

    /// As a key.
    fn floor(floor: f32) -> Self {
        let bits = floor.to_bits();
        let cut = (bits >> 16) as u16;
        match cut {
            // Everything passes, also a NaN.
            _ if floor.is_infinite() && floor < 0.0 => Self::MIN,
            // Below -0 as well as 0.
            0 => key(0x8000_u16.cast_signed()),
            // Cutting goes towards zero.
            _ if floor < 0.0 && bits & 0xffff != 0 => key((cut + 1).cast_signed()),
            _ => key(cut.cast_signed()),
        }
    }

    fn first_not_below(floor: Self, scores: &[Self]) -> Option<usize> {
        first_bf16(floor, scores)
    }

    fn bounds(self) -> [f32; 2] {
        // Half a unit in the last place is at most 2^-8 of a number; what it is of numbers below 2^-126, (4) of the bound allows for.
        let score = f32::from_bits(u32::from(self.cast_unsigned()) << 16);
        let rounding = 2_f32.powi(-8) * score.abs();
        [score - rounding, score + rounding]
    }

    fn scale(row: &[f32], factor: f32, out: &mut [Self]) -> f32 {
        scale_bf16(row, factor, out)
    }
}

/// An integer in the order of the bf16 numbers of these bits.
fn key(bits: Bf16Bits) -> i16 {
    bits ^ ((bits >> 15) & 0x7fff)
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn first_f32(floor: f32, scores: &[f32]) -> Option<usize> {
    let passes = |score: &f32| (*score >= floor) | score.is_nan();
    let (chunks, rest) = scores.as_chunks::<CHUNK>();
    for (place, chunk) in chunks.iter().enumerate() {
        if chunk.iter().fold(false, |any, score| any | passes(score)) {
            let has_one = |part: &[f32; PART]| part.iter().fold(false, |any, score| any | passes(score));
            let part = chunk.as_chunks::<PART>().0.iter().position(has_one)?;
            let from = place * CHUNK + part * PART;
            return scores[from..].iter().position(passes).map(|within| from + within);
        }
    }
    rest.iter().position(passes).map(|within| chunks.len() * CHUNK + within)
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn first_bf16(floor: i16, scores: &[Bf16Bits]) -> Option<usize> {
    let passes = |score: &Bf16Bits| *score ^ ((*score >> 15) & 0x7fff) >= floor;
    let (chunks, rest) = scores.as_chunks::<CHUNK>();
    for (place, chunk) in chunks.iter().enumerate() {
        if chunk.iter().fold(false, |any, score| any | passes(score)) {
            let has_one = |part: &[Bf16Bits; PART]| part.iter().fold(false, |any, score| any | passes(score));
            let part = chunk.as_chunks::<PART>().0.iter().position(has_one)?;
            let from = place * CHUNK + part * PART;
            return scores[from..].iter().position(passes).map(|within| from + within);
        }
    }
    rest.iter().position(passes).map(|within| chunks.len() * CHUNK + within)
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn scale_f32(row: &[f32], factor: f32, out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = value * factor;
    }
}

/// Rounds to the nearest bf16, of two to the even one. What that changes is exact in f32.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn scale_bf16(row: &[f32], factor: f32, out: &mut [Bf16Bits]) -> f32 {
    let round = |value: f32, out: &mut Bf16Bits| {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        *out = rounded as i16;
        (value - f32::from_bits(rounded << 16)).powi(2)
    };
    let mut sums = [0.0_f32; 4 * LANES];
    let ((chunks, rest), (out_chunks, out_rest)) = (row.as_chunks::<{ 4 * LANES }>(), out.as_chunks_mut::<{ 4 * LANES }>());
    for (chunk, out) in chunks.iter().zip(out_chunks) {
        for lane in 0..4 * LANES {
            sums[lane] += round(chunk[lane] * factor, &mut out[lane]);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().zip(out_rest).map(|(value, out)| round(value * factor, out)).sum::<f32>()
}

/// The squared length, in f32: infinite or NaN if that does not hold it.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn fast_square(row: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 4 * LANES];
    let (chunks, rest) = row.as_chunks::<{ 4 * LANES }>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value * value;
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>()
}

/// Every f16 as f32, exactly.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn widen(row: &[f16], out: &mut [f32]) {
    // What the exponents of the two differ by, in place; and a number whose last bit is the last bit of f16.
    const BIAS: u32 = 112 << 23;
    const SMALL: u32 = 113 << 23;
    for (out, half) in out.iter_mut().zip(row) {
        let half = u32::from(half.to_bits());
        let (size, sign) = ((half & 0x7fff) << 13, (half & 0x8000) << 16);
        let subnormal = f32::from_bits(size.wrapping_add(SMALL)) - f32::from_bits(SMALL);
        let is_finite = size < 31 << 23;
        let normal = size.wrapping_add(if is_finite { BIAS } else { 2 * BIAS });
        *out = f32::from_bits(sign | if size < 1 << 23 { subnormal.to_bits() } else { normal });
    }
}

/// The inner product in f64, always in the same order: number i is added to sum i mod 16; then the sums are added up, one after another.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    sums.iter().sum()
}
