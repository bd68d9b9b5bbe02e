//! The views of an image that OADP embeds with CLIP: overlapping blocks of a pyramid, and squares around objects with a mask of the
//! object (sections 4.2 and 4.3 there).
//!
//! Geometry alone; pixels are cut by [`crate::images`]. All of it is in f32, as in the reference.
//!
//! Where this differs from the reference, by choice of the caller: [`whole_box`] and [`clamped_object_square`].

use crate::boxes::Xyxy;

/// The sides of two consecutive levels of the pyramid.
const PYRAMID_RATIO: f32 = 1.5;

/// Where windows of `side` px begin that cover a length and overlap by half at least: the first at 0, the last ends with it.
/// None where the length is shorter than a window.
pub fn partition(length: u32, side: u32) -> Vec<u32> {
    match length.checked_sub(side) {
        None => Vec::new(),
        Some(0) => vec![0],
        Some(room) => {
            let n_steps = room.div_ceil(side / 2);
            let (step, n_longer) = (room / n_steps, room % n_steps);
            // The first steps are the longer ones.
            (0..=n_steps).map(|index| index * step + index.min(n_longer)).collect()
        }
    }
}

/// One level of an image's pyramid.
#[derive(Debug, Clone, PartialEq)]
pub struct Level {
    /// Width and height, each level resized from the one before; the first is the image.
    pub size: [u32; 2],
    /// By how much the image is larger, nominally: what block coordinates are multiplied by.
    pub scale: f32,
    /// The upper left corners of blocks, by x and then by y.
    pub corners: Vec<[u32; 2]>,
}

/// The pyramid of an image whose blocks have a side of `side` px: levels 1.5 times smaller each, as long as a block fits.
pub fn pyramid([width, height]: [u32; 2], side: u32) -> Vec<Level> {
    let smaller = |Level { size, scale, .. }: &Level| {
        level(size.map(|length| (f64::from(length) / f64::from(PYRAMID_RATIO)) as u32), scale * PYRAMID_RATIO, side)
    };
    std::iter::successors(level([width, height], 1.0, side), smaller).collect()
}

fn level(size: [u32; 2], scale: f32, side: u32) -> Option<Level> {
    let [columns, rows] = size.map(|length| partition(length, side));
    let corners: Vec<[u32; 2]> = columns.iter().flat_map(|x| rows.iter().map(|y| [*x, *y])).collect();
    (!corners.is_empty()).then_some(Level { size, scale, corners })
}

impl Level {
    /// The box of a block in the image.
    pub fn xyxy(&self, [x, y]: [u32; 2], side: u32) -> Xyxy {
        let [x1, y1, x2, y2] = [x, y, x + side, y + side].map(|length| length as f32 * self.scale);
        Xyxy { x1, y1, x2, y2 }
    }
}

/// The box that stands for the whole image among its blocks: its centre square, which is what the network sees.
pub fn whole_box([width, height]: [u32; 2]) -> Xyxy {
    let [width, height] = [width as f32, height as f32];
    let side = width.min(height);
    let (x1, y1) = ((width - side) / 2.0, (height - side) / 2.0);
    Xyxy { x1, y1, x2: x1 + side, y2: y1 + side }
}

/// Left, top, side, side of [`whole_box`]: the reference stores a width and a height where it reads a corner.
pub fn reference_whole_box(size: [u32; 2]) -> Xyxy {
    let whole = whole_box(size);
    Xyxy { x2: whole.width(), y2: whole.height(), ..whole }
}

/// The square that shows an object in its surroundings, which may leave the image: of eight times the object's area, so that a
/// large object is shrunk inside black margins, and a long one is cut.
///
/// Its centre is the box's, moved on each axis so that the square lies in the image, unless it is too large for that.
pub fn object_square(xyxy: &Xyxy, size: [u32; 2]) -> Xyxy {
    square_about(xyxy, size, eighth(xyxy))
}

/// As [`object_square`], but at most as large as the image's shorter side, and at least as the object's longer one.
pub fn clamped_object_square(xyxy: &Xyxy, size: [u32; 2]) -> Xyxy {
    let shorter = size[0].min(size[1]) as f32;
    square_about(xyxy, size, eighth(xyxy).min(shorter).max(xyxy.width().max(xyxy.height())))
}

/// The side of a square that a box fills an eighth of.
fn eighth(xyxy: &Xyxy) -> f32 {
    (8.0 * xyxy.width() * xyxy.height()).sqrt()
}

fn square_about(xyxy: &Xyxy, size: [u32; 2], side: f32) -> Xyxy {
    let image = size.map(|side| side as f32);
    let axis = |low: f32, high: f32, length: f32| {
        let centre = (low + high) / 2.0;
        let (low, high) = (centre - side / 2.0, centre + side / 2.0);
        let shift = if side > length {
            0.0
        } else if low < 0.0 {
            -low
        } else if high > length {
            length - high
        } else {
            0.0
        };
        [low + shift, high + shift]
    };
    let ([x1, x2], [y1, y2]) = (axis(xyxy.x1, xyxy.x2, image[0]), axis(xyxy.y1, xyxy.y2, image[1]));
    Xyxy { x1, y1, x2, y2 }
}

/// The whole pixels of a square: each corner rounded half to even.
pub fn rounded(square: &Xyxy) -> [i64; 4] {
    [square.x1, square.y1, square.x2, square.y2].map(|corner| corner.round_ties_even() as i64)
}

/// The mask of an object on a grid over a square: `[grid, grid]`, row by row, 0 object, 1 background.
///
/// The square is sampled at whole pixels, `ceil(side)` of them on an axis; each cell takes the nearest sample before it, as
/// PyTorch's `interpolate(mode="nearest")` does.
pub fn background(xyxy: &Xyxy, square: &Xyxy, grid: usize) -> Vec<u8> {
    let axis = |from: f32, low: f32, high: f32, to: f32| -> Vec<bool> {
        let n_samples = (to - from).ceil();
        let inside = |cell: usize| {
            let sample = nearest(cell, n_samples as usize, grid) as f32;
            low - from <= sample && sample <= high - from
        };
        (0..grid).map(inside).collect()
    };
    let columns = axis(square.x1, xyxy.x1, xyxy.x2, square.x2);
    let rows = axis(square.y1, xyxy.y1, xyxy.y2, square.y2);
    rows.iter().flat_map(|row| columns.iter().map(move |column| u8::from(!(*row && *column)))).collect()
}

/// Which of `from` samples stands for a cell of `to`, computed in f32.
fn nearest(cell: usize, from: usize, to: usize) -> usize {
    let scale = from as f32 / to as f32;
    ((cell as f32 * scale).floor() as usize).min(from.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn blocks_cover_images_as_in_the_specification() {
        let table: [([u32; 2], &[usize]); 8] = [
            ([640, 480], &[20, 6]),
            ([500, 375], &[12, 4]),
            ([640, 427], &[15, 6]),
            ([640, 640], &[25, 9, 4]),
            ([500, 333], &[8]),
            ([225, 224], &[2]),
            ([224, 224], &[1]),
            ([640, 223], &[]),
        ];
        for (size, expected) in table {
            let found: Vec<usize> = pyramid(size, 224).iter().map(|level| level.corners.len()).collect();
            assert_eq!(found, expected, "{size:?}");
        }
        let levels = pyramid([640, 480], 224);
        assert_eq!(partition(640, 224), [0, 104, 208, 312, 416]);
        assert_eq!(partition(480, 224), [0, 86, 171, 256]);
        assert_eq!((levels[1].size, levels[1].scale), ([426, 320], 1.5));
        assert_eq!((partition(426, 224), partition(320, 224)), (vec![0, 101, 202], vec![0, 96]));
        // x outside, y inside.
        assert_eq!(levels[0].corners[..5], [[0, 0], [0, 86], [0, 171], [0, 256], [104, 0]]);
        assert_eq!(levels[1].xyxy([101, 96], 224), Xyxy { x1: 151.5, y1: 144.0, x2: 487.5, y2: 480.0 });
    }

    #[test]
    fn windows_begin_at_the_start_end_at_the_end_and_overlap_by_half_at_least() {
        for length in 224..=2000 {
            let starts = partition(length, 224);
            let gaps: Vec<u32> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            assert_eq!((starts[0], starts[starts.len() - 1]), (0, length - 224));
            assert!(gaps.iter().all(|gap| (1..=112).contains(gap)) && gaps.is_sorted_by(|a, b| a >= b), "{length}: {gaps:?}");
            assert!(gaps.first().zip(gaps.last()).is_none_or(|(first, last)| first - last <= 1), "{length}: {gaps:?}");
        }
    }

    #[test]
    fn the_whole_image_s_box_is_its_centre_square() {
        assert_eq!(whole_box([640, 480]), Xyxy { x1: 80.0, y1: 0.0, x2: 560.0, y2: 480.0 });
        assert_eq!(reference_whole_box([640, 480]), Xyxy { x1: 80.0, y1: 0.0, x2: 480.0, y2: 480.0 });
        assert_eq!(whole_box([333, 500]), Xyxy { x1: 0.0, y1: 83.5, x2: 333.0, y2: 416.5 });
    }

    /// Image, proposal, S, crop, columns and rows of the mask's object: the specification's table.
    type Case = ([u32; 2], [f32; 4], f32, [i64; 4], [usize; 2], [usize; 2]);
    const GEOMETRY: [Case; 8] = [
        ([640, 480], [100.0, 100.0, 200.0, 160.0], 219.089, [40, 20, 260, 240], [4, 10], [6, 8]),
        ([640, 480], [5.0, 10.0, 65.0, 50.0], 138.564, [0, 0, 139, 139], [1, 6], [2, 5]),
        ([640, 480], [560.0, 400.0, 639.0, 479.0], 223.446, [417, 257, 640, 480], [9, 13], [9, 13]),
        ([640, 480], [50.0, 40.0, 600.0, 440.0], 1326.65, [-338, -423, 988, 903], [5, 9], [5, 9]),
        ([640, 480], [10.0, 200.0, 630.0, 220.0], 314.960, [163, 53, 477, 367], [0, 13], [7, 7]),
        ([640, 480], [300.0, 10.0, 304.0, 470.0], 121.326, [241, 179, 363, 301], [7, 7], [0, 13]),
        ([640, 480], [100.0, 100.0, 104.0, 104.0], 11.314, [96, 96, 108, 108], [5, 9], [5, 9]),
        ([640, 427], [0.0, 0.0, 300.0, 200.0], 692.820, [-196, -246, 496, 446], [4, 10], [5, 9]),
    ];

    #[test]
    fn squares_and_masks_of_objects_are_as_in_the_specification() {
        for (size, proposal, side, crop, columns, rows) in GEOMETRY {
            let proposal = Xyxy::from(proposal);
            let square = object_square(&proposal, size);
            assert!((square.width() - side).abs() < 1e-3 && (square.height() - side).abs() < 1e-3, "{proposal:?}: {square:?}");
            assert_eq!(rounded(&square), crop, "{proposal:?}");
            let expected =
                |row: usize, column: usize| u8::from(!((columns[0]..=columns[1]).contains(&column) && (rows[0]..=rows[1]).contains(&row)));
            let expected: Vec<u8> = (0..14).flat_map(|row| (0..14).map(move |column| expected(row, column))).collect();
            assert_eq!(background(&proposal, &square, 14), expected, "{proposal:?}");
        }
    }

    #[test]
    fn a_clamped_square_fits_the_image_and_holds_the_object() {
        let large = clamped_object_square(&Xyxy::from([50.0, 40.0, 600.0, 440.0]), [640, 480]);
        assert!((large.width() - 550.0).abs() < 1e-3 && (large.x1 - 50.0).abs() < 1e-3, "{large:?}");
        let long = clamped_object_square(&Xyxy::from([300.0, 10.0, 304.0, 470.0]), [640, 480]);
        assert!((long.y1 - 10.0).abs() < 1e-3 && (long.y2 - 470.0).abs() < 1e-3, "{long:?}");
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        nearest_sha256: String,
        geometry: Vec<Value>,
    }

    /// PyTorch's nearest interpolation from 4 to 1,400 samples, and random boxes through a transcription of the rule in NumPy.
    #[test]
    fn masks_equal_those_of_pytorch() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/views/golden.json");
        let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let indices = (4..=1400_usize).flat_map(|n| (0..14).map(move |cell| nearest(cell, n, 14) as u16));
        let bytes: Vec<u8> = indices.flat_map(u16::to_le_bytes).collect();
        assert_eq!(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>(), golden.nearest_sha256);
        assert!(golden.geometry.len() >= 200);
        for case in golden.geometry {
            let (size, proposal, square, mask): ([u32; 2], [f32; 4], [f32; 4], String) = serde_json::from_value(case).unwrap();
            let proposal = Xyxy::from(proposal);
            let found = object_square(&proposal, size);
            let corners = [found.x1, found.y1, found.x2, found.y2];
            assert!(
                corners.iter().zip(square).all(|(found, expected)| (found - expected).abs() <= 1e-3),
                "{proposal:?}: {corners:?} {square:?}"
            );
            let found: String = background(&proposal, &Xyxy::from(square), 14).iter().map(|cell| char::from(b'0' + cell)).collect();
            assert_eq!(found, mask, "{size:?} {proposal:?}");
        }
    }
}
