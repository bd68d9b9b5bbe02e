//! Pillow's antialiased resizes, to the last bit, bicubic for what CLIP is shown and bilinear for CORA's detector; and OpenCV's bilinear one, which other
//! detectors are shown.
//!
//! A `fast_image_resize` of the same kernel differs by one grey level where an image grows (16-bit coefficients); Pillow's
//! arithmetic is this: coefficients in f64, normalised, rounded to 22 fractional bits; a horizontal pass over all rows, an
//! 8-bit rounding, a vertical pass.

/// Fractional bits of a coefficient: 32 bits, less 8 of the pixel and 2 of head room (Pillow, `Resample.c`).
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// How near source pixels count for a target pixel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Keys' cubic convolution with a = -0.5.
    Bicubic,
    /// A triangle.
    Bilinear,
}

impl Kernel {
    /// How far it reaches, in source pixels at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Bicubic => 2.0,
            Self::Bilinear => 1.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        match self {
            Self::Bicubic => cubic(x),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
        }
    }
}

/// The source pixels of one target pixel, and their weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes a rectangle `[x1, y1, x2, y2]` of packed RGB `[H, W, 3]`, which is black outside of it.
///
/// Only the window `[x1, y1, x2, y2]` of the result, `to` in width and height, is computed. Black adds nothing to a sum: pixels outside
/// the image are never read, and take no memory.
pub(crate) fn antialiased(
    kernel: Kernel,
    rgb: &[u8],
    [width, height]: [usize; 2],
    rectangle: [i64; 4],
    to: [usize; 2],
    window: [usize; 4],
) -> Vec<u8> {
    let [x1, y1, x2, y2] = rectangle;
    assert!(x1 < x2 && y1 < y2 && rgb.len() == 3 * width * height, "BUG: an image without pixels");
    let columns = within(&taps(kernel, (x2 - x1) as usize, to[0])[window[0]..window[2]], x1, width);
    let rows = within(&taps(kernel, (y2 - y1) as usize, to[1])[window[1]..window[3]], y1, height);
    let to_width = columns.len();
    let (first_column, end_column) = reach(&columns);
    let (first_row, end_row) = reach(&rows);
    let window = [first_column, first_row, end_column, end_row];
    // Along rows first. An axis is summed as columns of whole rows, which processors do many at once: the image lies on its side.
    let narrowed = combine(&transposed(rgb, width, window), 3 * (end_row - first_row), first_column, &columns);
    let narrowed = transposed(&narrowed, end_row - first_row, [0, 0, end_row - first_row, to_width]);
    combine(&narrowed, 3 * to_width, first_row, &rows)
}

/// From where to where some target looks.
fn reach(taps: &[Taps]) -> (usize, usize) {
    let first = taps.iter().filter(|taps| !taps.weights.is_empty()).map(|taps| taps.first).min().unwrap_or(0);
    (first, taps.iter().map(|taps| taps.first + taps.weights.len()).max().unwrap_or(0).max(first))
}

/// Pixels a side that are turned at once: their rows stay in the first cache.
const TILE: usize = 16;

/// A window `[x1, y1, x2, y2]` of packed RGB of some width, with rows and columns exchanged.
fn transposed(rgb: &[u8], width: usize, [x1, y1, x2, y2]: [usize; 4]) -> Vec<u8> {
    let n_rows = y2 - y1;
    let mut out = vec![0; 3 * (x2 - x1) * n_rows];
    for tile_y in (y1..y2).step_by(TILE) {
        for tile_x in (x1..x2).step_by(TILE) {
            for y in tile_y..y2.min(tile_y + TILE) {
                let row = &rgb[3 * (y * width + tile_x)..3 * (y * width + x2.min(tile_x + TILE))];
                for (column, pixel) in row.chunks_exact(3).enumerate() {
                    let to = 3 * ((tile_x - x1 + column) * n_rows + y - y1);
                    out[to..to + 3].copy_from_slice(pixel);
                }
            }
        }
    }
    out
}

/// Taps of a rectangle that begins at `start`, as taps of the `length` pixels there are.
fn within(taps: &[Taps], start: i64, length: usize) -> Vec<Taps> {
    let inside = |Taps { first, weights }: &Taps| {
        let (low, high) = (*first as i64 + start, *first as i64 + start + weights.len() as i64);
        let (from, to) = (low.clamp(0, length as i64), high.clamp(0, length as i64));
        let weights = if from < to { weights[(from - low) as usize..(to - low) as usize].to_vec() } else { Vec::new() };
        Taps { first: from as usize, weights }
    };
    taps.iter().map(inside).collect()
}

fn taps(kernel: Kernel, from: usize, to: usize) -> Vec<Taps> {
    if from == to {
        // Pillow leaves an axis alone that keeps its length.
        return (0..to).map(|first| Taps { first, weights: vec![1 << PRECISION_BITS] }).collect();
    }
    let scale = from as f64 / to as f64;
    let reduction = scale.max(1.0);
    let reach = kernel.support() * reduction;
    let of_target = |target: usize| {
        let centre = (target as f64 + 0.5) * scale;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let last = ((centre + reach + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..last).map(|source| kernel.at((source as f64 - centre + 0.5) / reduction)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| (weight / sum * f64::from(1 << PRECISION_BITS)).round() as i32;
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(of_target).collect()
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn to_level(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Bytes that are summed at once.
const LANES: usize = 64;

/// Rows as weighted sums of rows; the first of `rows` is the image's row `first_row`.
#[multiversion::multiversion(targets = "simd")]
fn combine(rows: &[u8], row_bytes: usize, first_row: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(row_bytes * taps.len());
    for Taps { first, weights } in taps {
        let rows = if weights.is_empty() { &[] } else { &rows[(first - first_row) * row_bytes..] };
        let n_whole = row_bytes / LANES * LANES;
        for start in (0..n_whole).step_by(LANES) {
            let mut sums = [1_i32 << (PRECISION_BITS - 1); LANES];
            for (row, weight) in weights.iter().enumerate() {
                let levels = &rows[row * row_bytes + start..][..LANES];
                for (sum, level) in sums.iter_mut().zip(levels) {
                    // Never wraps: 255 times the sum of all weights' sizes, at most 1.5 x 2^22, is below 2^31. A check for it would keep
                    // the loop from being done in vectors.
                    *sum = sum.wrapping_add(i32::from(*level).wrapping_mul(*weight));
                }
            }
            out.extend(sums.map(to_level));
        }
        for byte in n_whole..row_bytes {
            let sum = weights.iter().enumerate().map(|(row, weight)| i32::from(rows[row * row_bytes + byte]) * weight);
            out.push(to_level((1 << (PRECISION_BITS - 1)) + sum.sum::<i32>()));
        }
    }
    out
}

/// Fractional bits of a bilinear coefficient (OpenCV, `INTER_RESIZE_COEF_BITS`).
const LINEAR_BITS: u32 = 11;

/// The two source pixels of a target pixel and their weights, which add up to 2^11.
struct Pair {
    low: usize,
    high: usize,
    weights: [i32; 2],
}

fn pairs(from: usize, to: usize) -> Vec<Pair> {
    let scale = from as f64 / to as f64;
    let of_target = |target: usize| {
        let source = ((target as f64 + 0.5) * scale - 0.5) as f32;
        let low = source.floor().clamp(0.0, (from - 1) as f32);
        let part = if low as usize == from - 1 { 0.0 } else { (source - low).max(0.0) };
        let fixed = |weight: f32| (weight * (1 << LINEAR_BITS) as f32).round_ties_even() as i32;
        Pair { low: low as usize, high: (low as usize + 1).min(from - 1), weights: [fixed(1.0 - part), fixed(part)] }
    };
    (0..to).map(of_target).collect()
}

/// Resizes packed RGB `[H, W, 3]`, `from` and `to` in width and height, as OpenCV's `INTER_LINEAR`: no antialiasing, a level apart in
/// less than a hundredth of the pixels (its vector code rounds in another order).
#[multiversion::multiversion(targets = "simd")]
pub(crate) fn bilinear(rgb: &[u8], from: [usize; 2], to: [usize; 2]) -> Vec<u8> {
    assert!(rgb.len() == 3 * from[0] * from[1] && from[0] > 0 && from[1] > 0, "BUG: an image without pixels");
    let columns = pairs(from[0], to[0]);
    let widened = |row: usize| -> Vec<i32> {
        let row = &rgb[3 * row * from[0]..][..3 * from[0]];
        let channels = |Pair { low, high, weights }: &Pair| {
            let (low, high) = (&row[3 * low..][..3], &row[3 * high..][..3]);
            [0, 1, 2].map(|channel| i32::from(low[channel]) * weights[0] + i32::from(high[channel]) * weights[1])
        };
        columns.iter().flat_map(channels).collect()
    };
    let mut out = Vec::with_capacity(3 * to[0] * to[1]);
    // Rows come in ascending order: the last two are all that is ever needed.
    let mut last: [(usize, Vec<i32>); 2] = [(usize::MAX, Vec::new()), (usize::MAX, Vec::new())];
    for Pair { low, high, weights } in pairs(from[1], to[1]) {
        if last[1].0 == low {
            last.swap(0, 1);
        }
        for (held, row) in last.iter_mut().zip([low, high]) {
            if held.0 != row {
                *held = (row, widened(row));
            }
        }
        let level = |(low, high): (&i32, &i32)| {
            let sum = (((low >> 4) * weights[0]) >> 16) + (((high >> 4) * weights[1]) >> 16);
            ((sum + 2) >> 2) as u8
        };
        out.extend(last[0].1.iter().zip(&last[1].1).map(level));
    }
    out
}
