//! Pillow's antialiased bicubic resize, to the last bit.
//!
//! A `fast_image_resize` of the same kernel differs by one grey level where an image grows (16-bit coefficients); Pillow's
//! arithmetic is this: coefficients in f64, normalised, rounded to 22 fractional bits; a horizontal pass over all rows, an
//! 8-bit rounding, a vertical pass.

/// Fractional bits of a coefficient: 32 bits, less 8 of the pixel and 2 of head room (Pillow, `Resample.c`).
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Reach of the bicubic kernel, in source pixels at scale 1.
const SUPPORT: f64 = 2.0;

/// Which source pixels make one target pixel, and with which weights.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Resizes packed RGB `[H, W, 3]`.
pub(crate) fn bicubic(rgb: &[u8], [width, height]: [usize; 2], [to_width, to_height]: [usize; 2]) -> Vec<u8> {
    assert!(width > 0 && height > 0 && to_width > 0 && to_height > 0 && rgb.len() == 3 * width * height, "BUG: an image without pixels");
    let narrowed = if width == to_width { rgb.to_vec() } else { horizontal(rgb, width, &taps(width, to_width)) };
    if height == to_height { narrowed } else { vertical(&narrowed, 3 * to_width, &taps(height, to_height)) }
}

fn taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let reduction = scale.max(1.0);
    let reach = SUPPORT * reduction;
    let of_target = |target: usize| {
        let centre = (target as f64 + 0.5) * scale;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let last = ((centre + reach + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..last).map(|source| cubic((source as f64 - centre + 0.5) / reduction)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: f64| (weight / sum * f64::from(1 << PRECISION_BITS)).round() as i32;
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(of_target).collect()
}

/// Keys' cubic convolution with a = -0.5.
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

fn horizontal(rgb: &[u8], width: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(rgb.len() / width * taps.len());
    for row in rgb.chunks_exact(3 * width) {
        for Taps { first, weights } in taps {
            let mut sums = [1 << (PRECISION_BITS - 1); 3];
            for (pixel, weight) in row[3 * first..].chunks_exact(3).zip(weights) {
                for channel in 0..3 {
                    sums[channel] += i32::from(pixel[channel]) * weight;
                }
            }
            out.extend(sums.map(to_level));
        }
    }
    out
}

fn vertical(rows: &[u8], row_bytes: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(row_bytes * taps.len());
    let mut sums = vec![0_i32; row_bytes];
    for Taps { first, weights } in taps {
        sums.fill(1 << (PRECISION_BITS - 1));
        for (row, weight) in rows[first * row_bytes..].chunks_exact(row_bytes).zip(weights) {
            for (sum, level) in sums.iter_mut().zip(row) {
                *sum += i32::from(*level) * weight;
            }
        }
        out.extend(sums.iter().map(|sum| to_level(*sum)));
    }
    out
}
