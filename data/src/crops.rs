//! Rectangles of crops that RPL trains on. (PromptDet, sections 3 and 5.)

use std::ops::RangeInclusive;

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

/// The window about a box `[x, y, width, height]` that reaches `reach` widths and heights beyond it on each side, clipped to an image of `size` px:
/// `[x1, y1, x2, y2]`, half-open, its corners truncated. With a reach of 1 it is 3 x 3 boxes. Of an empty window x2 <= x1 or y2 <= y1.
pub fn window([x, y, width, height]: [f64; 4], reach: f64, size: [u32; 2]) -> [i64; 4] {
    let low = |corner: f64| (corner.trunc() as i64).max(0);
    let high = |corner: f64, side: u32| (corner.trunc() as i64).min(side.into());
    [low(x - reach * width), low(y - reach * height), high(x + (1.0 + reach) * width, size[0]), high(y + (1.0 + reach) * height, size[1])]
}

/// Parts of an image's area that a random crop takes.
const AREA: RangeInclusive<f32> = 0.4..=1.0;
/// The least and the greatest width of a random crop, in heights.
const RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Draws before the whole image is taken, as far as its shape allows.
const ATTEMPTS: usize = 10;

/// What a random crop draws.
trait Draws {
    /// A part of the area, and the natural logarithm of width / height.
    fn shape(&mut self) -> [f32; 2];

    /// A number from 0 to below `n`.
    fn place(&mut self, n: i64) -> i64;
}

impl Draws for ChaCha8Rng {
    fn shape(&mut self) -> [f32; 2] {
        let [low, high] = RATIO.map(|ratio| ratio.ln() as f32);
        [self.random_range(AREA), self.random_range(low..=high)]
    }

    fn place(&mut self, n: i64) -> i64 {
        self.random_range(0..n)
    }
}

/// A random rectangle `[x1, y1, x2, y2]` px in an image of `[width, height]` px, half-open: 0.4 to 1 of its area, 3/4 to 4/3 as wide as high
/// (torchvision's `RandomResizedCrop`). In an image that is too long for that, after ten draws, the largest such rectangle in its middle.
pub fn random_crop(size: [u32; 2], random: &mut ChaCha8Rng) -> [i64; 4] {
    crop(size, random)
}

fn crop(size: [u32; 2], draws: &mut impl Draws) -> [i64; 4] {
    let [width, height] = size.map(i64::from);
    let area = (width * height) as f64;
    for _ in 0..ATTEMPTS {
        let [part, log_ratio] = draws.shape();
        let (part, ratio) = (area * f64::from(part), f64::from(log_ratio.exp()));
        let [w, h] = [part * ratio, part / ratio].map(|squared| squared.sqrt().round_ties_even() as i64);
        if 0 < w && w <= width && 0 < h && h <= height {
            let y = draws.place(height - h + 1);
            let x = draws.place(width - w + 1);
            return [x, y, x + w, y + h];
        }
    }
    let ratio = width as f64 / height as f64;
    let [w, h] = if ratio < RATIO[0] {
        [width, ((width as f64 / RATIO[0]).round_ties_even() as i64).min(height)]
    } else if ratio > RATIO[1] {
        [((height as f64 * RATIO[1]).round_ties_even() as i64).min(width), height]
    } else {
        [width, height]
    };
    let [x, y] = [(width - w) / 2, (height - h) / 2];
    [x, y, x + w, y + h]
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use rand::SeedableRng as _;

    use super::*;

    /// The arrays of `tests/golden/promptdet/make.py`, row by row; NaN where nothing was drawn.
    fn golden() -> BTreeMap<String, Vec<f64>> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/promptdet/crops.json");
        let arrays: BTreeMap<String, Vec<Option<f64>>> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let numbers = |array: Vec<Option<f64>>| array.into_iter().map(|number| number.unwrap_or(f64::NAN)).collect();
        arrays.into_iter().map(|(name, array)| (name, numbers(array))).collect()
    }

    /// The windows of RPL's own code about 300 boxes in an image of 640 x 480 px; those of other boxes it skips before.
    #[test]
    fn windows_are_those_of_rpl_s_code() {
        let golden = golden();
        let boxes = &golden["crop/boxes_xywh"];
        let mut n_empty = 0;
        for (reach, name) in [(0.0, "crop/s0.0"), (0.5, "crop/s0.5"), (1.0, "crop/s1.0")] {
            let expected = &golden[name];
            for (xywh, expected) in boxes.as_chunks::<4>().0.iter().zip(expected.as_chunks::<4>().0) {
                let expected = expected.map(|corner| corner as i64);
                assert_eq!(expected == [-1; 4], xywh[2] * xywh[3] < 20.0, "{xywh:?}");
                if expected != [-1; 4] {
                    let found = window(*xywh, reach, [640, 480]);
                    assert_eq!(found, expected, "{xywh:?}, {reach}");
                    n_empty += usize::from(found[2] <= found[0] || found[3] <= found[1]);
                }
            }
        }
        assert!(n_empty > 0);
        for (xywh, expected) in [
            ([100.6, 50.2, 30.5, 20.7], [70, 29, 161, 91]),
            ([5.0, 5.0, 20.0, 10.0], [0, 0, 45, 25]),
            ([600.0, 440.0, 40.0, 40.0], [560, 400, 640, 480]),
        ] {
            assert_eq!(window(xywh, 1.0, [640, 480]), expected);
        }
    }

    /// Draws that are given.
    struct Given<'a> {
        shapes: &'a [f64],
        /// How many places there are for the upper side, the one that is drawn, and the same for the left side.
        places: &'a [f64],
    }

    impl Draws for Given<'_> {
        fn shape(&mut self) -> [f32; 2] {
            let (shape, rest) = self.shapes.split_at(2);
            self.shapes = rest;
            [shape[0] as f32, shape[1] as f32]
        }

        fn place(&mut self, n: i64) -> i64 {
            let (place, rest) = self.places.split_at(2);
            self.places = rest;
            assert_eq!(n, place[0] as i64);
            place[1] as i64
        }
    }

    /// Parity check P9 of PromptDet's specification: 200 images, with what torchvision drew for each.
    #[test]
    fn random_crops_are_torchvision_s_for_the_same_draws() {
        let golden = golden();
        let [sizes, shapes, places, expected] =
            ["size_wh", "uniform_draws", "int_draws", "top_left_h_w"].map(|name| &golden[&format!("rrc/{name}")]);
        let mut n_whole = 0;
        for image in 0..200 {
            let size = [sizes[2 * image] as u32, sizes[2 * image + 1] as u32];
            let mut draws = Given { shapes: &shapes[20 * image..][..20], places: &places[4 * image..][..4] };
            let found = crop(size, &mut draws);
            let [top, left, height, width] = [0, 1, 2, 3].map(|place| expected[4 * image + place] as i64);
            assert_eq!(found, [left, top, left + width, top + height], "image {image} of {size:?} px");
            assert!(draws.shapes.first().is_none_or(|next| next.is_nan()), "torchvision drew more often");
            n_whole += usize::from(draws.places.len() == 4);
        }
        assert!(n_whole > 0, "no image is too long");
    }

    #[test]
    fn random_crops_have_the_area_and_the_shape_that_they_may_have() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut logarithms = Vec::new();
        for _ in 0..4000 {
            let [x1, y1, x2, y2] = random_crop([400, 300], &mut random);
            let [width, height] = [(x2 - x1) as f64, (y2 - y1) as f64];
            assert!(0 <= x1 && 0 <= y1 && x2 <= 400 && y2 <= 300);
            // Sides are whole pixels.
            assert!(
                (0.395..=1.0).contains(&(width * height / 120_000.0)) && (0.74..1.35).contains(&(width / height)),
                "{width} x {height}"
            );
            logarithms.push((width / height).ln());
        }
        assert!(logarithms.iter().any(|log| *log < -0.25) && logarithms.iter().any(|log| *log > 0.25));
        assert_eq!(random_crop([1000, 10], &mut random)[1], 0);
        assert_eq!(random_crop([1, 1], &mut random), [0, 0, 1, 1]);
    }
}
