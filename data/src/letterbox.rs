//! Images of the web as img2dataset leaves them: on white, the longest side 1024 px, in a white square. (PromptDet, section 8.)
//!
//! The resize is OpenCV's Lanczos over 8 x 8 pixels in fixed point: every output pixel looks at eight rows and columns, however much the image
//! shrinks, so that there is no antialiasing. Borders repeat. Not reproduced: the JPEG of quality 95 that img2dataset stores.

use std::{collections::BTreeMap, f64::consts::PI, path::Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Result, images::Image};

/// The longest side, and that of the square, px.
const SIDE: u32 = 1024;
/// Pixels that an output pixel looks at on each axis.
const TAPS: usize = 8;
/// Weights are multiples of 2^-11. (OpenCV's `INTER_RESIZE_COEF_BITS`.)
const WEIGHT_BITS: u32 = 11;

/// What is done with an image of the web before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Letterbox {
    /// It is used as it is.
    #[default]
    None,
    /// On white, with the longest side 1024 px, in the middle of a white square of 1024 px, as PromptDet's images are.
    White1024,
    /// On white, with the longest side 1024 px.
    Longest1024,
}

/// Where an image is in its letterbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// `[width, height]` px of the resized image.
    pub resized: [u32; 2],
    /// `[x, y]` px of its corner.
    pub offset: [u32; 2],
    /// `[width, height]` px of the whole.
    pub whole: [u32; 2],
}

impl Letterbox {
    /// The geometry for an image of `[width, height]` px. Sides are rounded half to even; of an odd rest the smaller part comes before.
    pub fn placement(self, size: [u32; 2]) -> Placement {
        let scale = f64::from(SIDE) / f64::from(size[0].max(size[1]).max(1));
        let resized = size.map(|side| ((f64::from(side) * scale).round_ties_even() as u32).clamp(1, SIDE));
        match self {
            Self::None => Placement { resized: size, offset: [0, 0], whole: size },
            Self::Longest1024 => Placement { resized, offset: [0, 0], whole: resized },
            Self::White1024 => Placement { resized, offset: resized.map(|side| (SIDE - side) / 2), whole: [SIDE, SIDE] },
        }
    }

    /// Decodes an image whose size is known, `[width, height]` px, and puts it into its letterbox; `path` is for the message.
    pub fn decode(self, bytes: &[u8], path: &Path, stated: [u32; 2]) -> Result<Image> {
        match self {
            Self::None => Image::decode_sized(bytes, path, stated),
            Self::White1024 | Self::Longest1024 => Ok(self.of(&Image::decode_on_white(bytes, path, stated)?)),
        }
    }

    /// The image in its letterbox.
    pub fn of(self, image: &Image) -> Image {
        let Placement { resized, offset, whole } = self.placement([image.width, image.height]);
        if self == Self::None {
            return image.clone();
        }
        let inner = lanczos(image, resized);
        if whole == resized {
            return inner;
        }
        let row_bytes = 3 * resized[0] as usize;
        let mut rgb = vec![u8::MAX; 3 * whole[0] as usize * whole[1] as usize];
        for (y, row) in inner.rgb.chunks_exact(row_bytes).enumerate() {
            let from = 3 * ((offset[1] as usize + y) * whole[0] as usize + offset[0] as usize);
            rgb[from..from + row_bytes].copy_from_slice(row);
        }
        Image { width: whole[0], height: whole[1], rgb }
    }
}

/// The first pixel that an output pixel looks at, which may lie before the image, and the weights of it and the seven after it.
fn taps(to: u32, from: u32) -> Vec<(i64, [i32; TAPS])> {
    let scale = f64::from(from) / f64::from(to);
    let of = |place: u32| {
        let at = ((f64::from(place) + 0.5) * scale - 0.5) as f32;
        let first = at.floor();
        (first as i64 - 3, weights(at - first))
    };
    (0..to).map(of).collect()
}

/// Lanczos' weights at a distance in [0, 1) from the fourth of eight pixels.
fn weights(distance: f32) -> [i32; TAPS] {
    let lanczos = |tap: usize| {
        let x = f64::from(distance) + 3.0 - tap as f64;
        // The sinus of pi x differs between taps in its sign alone, so that it cancels in the sum.
        let sign = if tap.is_multiple_of(2) { 1.0 } else { -1.0 };
        if x.abs() < 1e-6 { None } else { Some((sign * (PI * x / 4.0).sin() / (x * x)) as f32) }
    };
    let found: [Option<f32>; TAPS] = std::array::from_fn(lanczos);
    if let Some(tap) = found.iter().position(Option::is_none) {
        return std::array::from_fn(|other| i32::from(other == tap) << WEIGHT_BITS);
    }
    let found = found.map(Option::unwrap_or_default);
    let sum: f32 = found.iter().sum();
    let unit = (1_i32 << WEIGHT_BITS) as f32;
    found.map(|weight| (weight / sum * unit).round_ties_even() as i32)
}

/// Resizes as OpenCV's `INTER_LANCZOS4`.
fn lanczos(image: &Image, [width, height]: [u32; 2]) -> Image {
    if [width, height] == [image.width, image.height] {
        return image.clone();
    }
    let (columns, rows) = (taps(width, image.width), taps(height, image.height));
    let row_bytes = 3 * image.width as usize;
    let clamped = |place: i64, side: u32| place.clamp(0, i64::from(side) - 1) as usize;
    let across = |y: usize| -> Vec<i32> {
        let row = &image.rgb[y * row_bytes..][..row_bytes];
        let pixel = |(first, weights): &(i64, [i32; TAPS])| -> [i32; 3] {
            let mut sums = [0; 3];
            for (tap, weight) in weights.iter().enumerate() {
                let x = 3 * clamped(first + tap as i64, image.width);
                for (sum, level) in sums.iter_mut().zip(&row[x..x + 3]) {
                    *sum += weight * i32::from(*level);
                }
            }
            sums
        };
        columns.iter().flat_map(pixel).collect()
    };
    // Rows of the image, resized across, that the current output row looks at.
    let mut near: BTreeMap<usize, Vec<i32>> = BTreeMap::new();
    let mut rgb = Vec::with_capacity(3 * width as usize * height as usize);
    for (first, weights) in &rows {
        let places: [usize; TAPS] = std::array::from_fn(|tap| clamped(first + tap as i64, image.height));
        near = near.split_off(&places[0]);
        for place in places {
            near.entry(place).or_insert_with(|| across(place));
        }
        let rows = places.map(|place| near[&place].as_slice());
        for place in 0..3 * width as usize {
            let sum: i64 = rows.iter().zip(weights).map(|(row, weight)| i64::from(*weight) * i64::from(row[place])).sum();
            let half = 1_i64 << (2 * WEIGHT_BITS - 1);
            rgb.push(((sum + half) >> (2 * WEIGHT_BITS)).clamp(0, 255) as u8);
        }
    }
    Image { width, height, rgb }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::images::on_white;

    #[derive(Deserialize)]
    struct Golden {
        cases: Vec<Case>,
        white_sums: Vec<u32>,
        white: Vec<Vec<u8>>,
    }

    #[derive(Deserialize)]
    struct Case {
        size: [u32; 2],
        resized: [u32; 2],
        offset: [u32; 2],
        /// x, y, red, green, blue.
        pixels: Vec<[u32; 5]>,
    }

    fn golden() -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/letterbox/golden.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// The picture of make.py.
    fn smooth([width, height]: [u32; 2]) -> Image {
        let pixel = |x: u32, y: u32| {
            let wave = (x * 510 / width + y * 510 / height) % 510;
            [x * 255 / (width - 1).max(1), y * 255 / (height - 1).max(1), wave.min(510 - wave)].map(|level| level as u8)
        };
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn sizes_and_places_are_those_of_albumentations() {
        let cases = golden().cases;
        assert_eq!(cases.len(), 200);
        for Case { size, resized, offset, .. } in cases {
            assert_eq!(Letterbox::White1024.placement(size), Placement { resized, offset, whole: [1024, 1024] }, "{size:?}");
            assert_eq!(Letterbox::Longest1024.placement(size), Placement { resized, offset: [0, 0], whole: resized }, "{size:?}");
            assert_eq!(Letterbox::None.placement(size), Placement { resized: size, offset: [0, 0], whole: size });
        }
        assert_eq!(Letterbox::White1024.placement([1, 5000]).resized, [1, 1024]);
    }

    #[test]
    fn pixels_are_within_two_levels_of_opencv() {
        for Case { size, pixels, .. } in golden().cases {
            let square = Letterbox::White1024.of(&smooth(size));
            for [x, y, levels @ ..] in pixels {
                let found = &square.rgb[3 * (y * 1024 + x) as usize..][..3];
                assert!(
                    found.iter().zip(levels).all(|(found, level)| u32::from(*found).abs_diff(level) <= 2),
                    "{size:?} {x} {y}: {found:?}, {levels:?}"
                );
            }
        }
    }

    #[test]
    fn transparency_is_blended_with_white_for_every_level_and_opacity() {
        let Golden { white_sums, white, .. } = golden();
        for (opacity, (sum, levels)) in (0..=255).zip(white_sums.iter().zip(&white)) {
            let found: Vec<u8> = (0..=255).map(|level| on_white(level, opacity)).collect();
            assert_eq!(
                (found.iter().map(|level| u32::from(*level)).sum::<u32>(), found.iter().copied().step_by(17).collect()),
                (*sum, levels.clone())
            );
        }
    }

    #[test]
    fn a_transparent_png_is_on_white_in_its_letterbox_and_loses_its_transparency_without() {
        let mut png = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut png);
        let pixels = [[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128], [0, 0, 0, 64]].concat();
        image::ImageEncoder::write_image(encoder, &pixels, 2, 2, image::ExtendedColorType::Rgba8).unwrap();
        let path = Path::new("a.png");
        assert_eq!(&Letterbox::None.decode(&png, path, [2, 2]).unwrap().rgb[..6], [10, 20, 30, 10, 20, 30]);
        assert_eq!(Image::decode_on_white(&png, path, [2, 2]).unwrap().rgb, [255, 255, 255, 10, 20, 30, 132, 137, 142, 191, 191, 191]);
        let longest = Letterbox::Longest1024.decode(&png, path, [2, 2]).unwrap();
        assert_eq!(([longest.width, longest.height], &longest.rgb[..3]), ([1024, 1024], &[255_u8; 3][..]));
        assert!(Letterbox::White1024.decode(&png, path, [2, 3]).is_err());
    }
}
