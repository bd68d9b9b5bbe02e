//! Boxes: xyxy, f32, pixels of the original image, half-open; their overlap, and suppression of duplicates.

/// A box: left, top, right, bottom in px of the original image; `x2` and `y2` are outside.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xyxy {
    /// Left.
    pub x1: f32,
    /// Top.
    pub y1: f32,
    /// Right.
    pub x2: f32,
    /// Bottom.
    pub y2: f32,
}

impl From<[f32; 4]> for Xyxy {
    /// From left, top, right, bottom.
    fn from([x1, y1, x2, y2]: [f32; 4]) -> Self {
        Self { x1, y1, x2, y2 }
    }
}

impl Xyxy {
    /// Width in px; negative for a box that is inside out.
    pub fn width(&self) -> f32 {
        self.x2 - self.x1
    }

    /// Height in px; negative for a box that is inside out.
    pub fn height(&self) -> f32 {
        self.y2 - self.y1
    }

    /// Area in px².
    pub fn area(&self) -> f32 {
        self.width() * self.height()
    }

    /// The part of it inside an image of `[width, height]` px; without area if it is outside.
    pub fn clipped(&self, [width, height]: [u32; 2]) -> Self {
        let [width, height] = [width as f32, height as f32];
        let Self { x1, y1, x2, y2 } = *self;
        Self { x1: x1.clamp(0.0, width), y1: y1.clamp(0.0, height), x2: x2.clamp(0.0, width), y2: y2.clamp(0.0, height) }
    }

    /// Intersection over union, in [0, 1]; 0 where both boxes are empty.
    pub fn iou(&self, other: &Self) -> f32 {
        let width = (self.x2.min(other.x2) - self.x1.max(other.x1)).max(0.0);
        let height = (self.y2.min(other.y2) - self.y1.max(other.y1)).max(0.0);
        let intersection = width * height;
        let union = self.area() + other.area() - intersection;
        if union > 0.0 { intersection / union } else { 0.0 }
    }

    /// The whole pixels to cut out: the box grown by a factor about its centre, clipped to an image `[width, height]`, corners
    /// rounded half to even; at least one pixel on each side. `[x1, y1, x2, y2]`, half-open.
    pub fn expanded(&self, factor: f32, [width, height]: [u32; 2]) -> [i64; 4] {
        let axis = |low: f32, high: f32, side: u32| {
            let (centre, half) = ((low + high) / 2.0, (high - low) * factor / 2.0);
            let round = |value: f32| value.clamp(0.0, side as f32).round_ties_even() as i64;
            let low = round(centre - half).min(i64::from(side) - 1);
            [low, round(centre + half).max(low + 1)]
        };
        let ([x1, x2], [y1, y2]) = (axis(self.x1, self.x2, width), axis(self.y1, self.y2, height));
        [x1, y1, x2, y2]
    }

    /// The whole pixels to cut out as LP-OVOD does: the box grown by a factor about its centre, its corners moved 0.001 px outwards and
    /// rounded outwards, so that a side on a whole pixel gets one pixel more, then clipped to an image of `size`: see [`clipped_rectangle`]. `[x1, y1, x2, y2]`, half-open. (LP-OVOD, section 3.2; in f64, as there: in f32 other pixels come out near the margin.)
    pub fn expanded_outwards(&self, factor: f64, size: [u32; 2]) -> [i64; 4] {
        const MARGIN_PX: f64 = 0.001;
        let (near, far) = ((1.0 + factor) / 2.0, (1.0 - factor) / 2.0);
        let axis = |low: f32, high: f32| {
            let (low, high) = (f64::from(low), f64::from(high));
            [(near * low + far * high - MARGIN_PX).floor() as i64, (near * high + far * low + MARGIN_PX).ceil() as i64]
        };
        let ([x1, x2], [y1, y2]) = (axis(self.x1, self.x2), axis(self.y1, self.y2));
        clipped_rectangle([x1, y1, x2, y2], size)
    }

    /// The whole pixels to cut out as DetPro does: the box grown by a factor about its centre, its corners moved 0.001 px outwards and rounded
    /// outwards. It may leave the image, by one pixel or by what the box grew. `[x1, y1, x2, y2]`, half-open. (DetPro, section 2; in f32, as there:
    /// in f64 other pixels come out near the margin.)
    pub fn rounded_outwards(&self, factor: f32) -> [i64; 4] {
        const MARGIN_PX: f32 = 0.001;
        let (near, far) = ((1.0 + factor) / 2.0, (1.0 - factor) / 2.0);
        let axis = |low: f32, high: f32| {
            let (first, last) = (near * low + far * high, near * high + far * low);
            [(first - MARGIN_PX).floor() as i64, (last + MARGIN_PX).ceil() as i64]
        };
        let ([x1, x2], [y1, y2]) = (axis(self.x1, self.x2), axis(self.y1, self.y2));
        [x1, y1, x2, y2]
    }
}

/// The part of a rectangle `[x1, y1, x2, y2]` px, half-open, inside an image `[width, height]` px; at least one pixel on each side.
pub fn clipped_rectangle([x1, y1, x2, y2]: [i64; 4], [width, height]: [u32; 2]) -> [i64; 4] {
    let axis = |low: i64, high: i64, side: u32| {
        let low = low.clamp(0, i64::from(side) - 1);
        [low, high.clamp(low + 1, i64::from(side))]
    };
    let ([x1, x2], [y1, y2]) = (axis(x1, x2, width), axis(y1, y2, height));
    [x1, y1, x2, y2]
}

/// A box of COCO json, `[x, y, width, height]`, as xyxy.
pub fn xywh_to_xyxy([x, y, width, height]: [f64; 4]) -> Xyxy {
    Xyxy { x1: x as f32, y1: y as f32, x2: (x + width) as f32, y2: (y + height) as f32 }
}

/// A box as COCO json writes it, `[x, y, width, height]`.
pub fn xyxy_to_xywh(xyxy: &Xyxy) -> [f64; 4] {
    let [x1, y1, x2, y2] = [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2].map(f64::from);
    [x1, y1, x2 - x1, y2 - y1]
}

/// Greedy non-maximum suppression within each class; returns the places of the boxes that stay, best score first, the lower
/// place first where scores are equal.
///
/// A box falls when its IoU with a better one of its class is *above* `iou_threshold`, as in torchvision. The three slices
/// have equal length, below 2³². Takes O(N log N + sum over classes of kept x N): about a second for 1,000 boxes x
/// 1,203 classes, all of them kept.
pub fn nms_by_class(boxes: &[Xyxy], scores: &[f32], classes: &[u32], iou_threshold: f32) -> Vec<usize> {
    assert!(boxes.len() == scores.len() && boxes.len() == classes.len(), "BUG: boxes, scores and classes of different lengths");
    assert!(u32::try_from(boxes.len()).is_ok(), "BUG: more boxes than places");
    let mut order: Vec<(u32, Rank)> = (0..boxes.len()).map(|place| (classes[place], Rank::new(scores[place], place))).collect();
    order.sort_unstable();
    let (mut kept, mut candidates, mut fallen) = (Vec::new(), Vec::new(), Vec::new());
    for of_class in order.chunk_by(|(a, _), (b, _)| a == b) {
        candidates.clear();
        candidates.extend(of_class.chunks(LANES).map(|ranked| Block::new(ranked.iter().map(|(_, rank)| &boxes[rank.place()]))));
        fallen.clear();
        fallen.resize(candidates.len(), [false; LANES]);
        for (at, (_, rank)) in of_class.iter().enumerate() {
            let first = at / LANES;
            if fallen[first][at % LANES] {
                continue;
            }
            kept.push(*rank);
            for (block, fallen) in candidates[first..].iter().zip(&mut fallen[first..]) {
                block.mark_overlapping(&boxes[rank.place()], iou_threshold, fallen);
            }
        }
    }
    kept.sort_unstable();
    kept.into_iter().map(Rank::place).collect()
}

/// A box's turn: better scores first, then lower places. One number, because numbers sort faster than look-ups.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u64);

impl Rank {
    fn new(score: f32, place: usize) -> Self {
        let bits = score.to_bits();
        // Ascends with the score: all bits of negative numbers flip, of others the sign.
        let ascending = if score.is_sign_negative() { !bits } else { bits | (1 << 31) };
        Self((u64::from(!ascending) << 32) | place as u64)
    }

    fn place(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }
}

/// Boxes compared at once.
const LANES: usize = 8;

/// Some boxes side by side, so that one instruction compares several of them.
struct Block {
    x1: [f32; LANES],
    y1: [f32; LANES],
    x2: [f32; LANES],
    y2: [f32; LANES],
    area: [f32; LANES],
}

impl Block {
    /// At most [`LANES`] boxes; the rest are empty.
    fn new<'a>(boxes: impl Iterator<Item = &'a Xyxy>) -> Self {
        let mut block = Self { x1: [0.0; LANES], y1: [0.0; LANES], x2: [0.0; LANES], y2: [0.0; LANES], area: [0.0; LANES] };
        for (lane, xyxy) in boxes.enumerate() {
            (block.x1[lane], block.y1[lane], block.x2[lane], block.y2[lane]) = (xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2);
            block.area[lane] = xyxy.area();
        }
        block
    }

    /// Marks the lanes whose IoU with a box is above a threshold, by the arithmetic of [`Xyxy::iou`].
    fn mark_overlapping(&self, xyxy: &Xyxy, threshold: f32, marked: &mut [bool; LANES]) {
        // Unlike f32::min, a single instruction; NaN needs no special result here.
        let (min, max) = (|a: f32, b: f32| if a < b { a } else { b }, |a: f32, b: f32| if a > b { a } else { b });
        let area = xyxy.area();
        let is_above: [bool; LANES] = std::array::from_fn(|lane| {
            let width = max(min(xyxy.x2, self.x2[lane]) - max(xyxy.x1, self.x1[lane]), 0.0);
            let height = max(min(xyxy.y2, self.y2[lane]) - max(xyxy.y1, self.y1[lane]), 0.0);
            let intersection = width * height;
            intersection / (area + self.area[lane] - intersection) > threshold
        });
        for (marked, is_above) in marked.iter_mut().zip(is_above) {
            *marked |= is_above;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        boxes: Vec<[f32; 4]>,
        scores: Vec<f32>,
        classes: Vec<u32>,
        threshold: f32,
        kept: Vec<usize>,
        /// Of boxes 0..20 against each other.
        iou: Vec<f32>,
    }

    fn golden() -> (Golden, Vec<Xyxy>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/boxes/golden.json");
        let golden: Golden = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let boxes = golden.boxes.iter().map(|xyxy| Xyxy::from(*xyxy)).collect();
        (golden, boxes)
    }

    #[test]
    fn nms_keeps_the_boxes_that_torchvision_keeps() {
        let (golden, boxes) = golden();
        assert_eq!(nms_by_class(&boxes, &golden.scores, &golden.classes, golden.threshold), golden.kept);
    }

    #[test]
    fn iou_equals_torchvision() {
        let (golden, boxes) = golden();
        for (pair, expected) in golden.iou.iter().enumerate() {
            assert!((boxes[pair / 20].iou(&boxes[pair % 20]) - expected).abs() < 1e-6);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The definition, in the plainest words.
        #[test]
        fn no_kept_box_overlaps_a_better_one_and_every_fallen_box_does(
            rows in prop::collection::vec((0..20_u8, 0..20_u8, 1..9_u8, 1..9_u8, -3..4_i8, 0..3_u32), 0..60),
        ) {
            let boxes: Vec<Xyxy> = rows.iter().map(|row| xywh_to_xyxy([row.0, row.1, row.2, row.3].map(f64::from))).collect();
            let scores: Vec<f32> = rows.iter().map(|row| f32::from(row.4) / 4.0).collect();
            let classes: Vec<u32> = rows.iter().map(|row| row.5).collect();
            let mut order: Vec<usize> = (0..rows.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let mut expected: Vec<usize> = Vec::new();
            for place in order {
                if expected.iter().all(|&better| classes[better] != classes[place] || boxes[better].iou(&boxes[place]) <= 0.3) {
                    expected.push(place);
                }
            }
            prop_assert_eq!(nms_by_class(&boxes, &scores, &classes, 0.3), expected);
        }
    }

    #[test]
    fn equal_scores_keep_the_lower_place_and_equal_overlap_keeps_both() {
        let xyxy = |x1: f32| Xyxy { x1, y1: 0.0, x2: x1 + 2.0, y2: 1.0 };
        let boxes = [xyxy(0.0), xyxy(0.0), xyxy(1.0)];
        assert_eq!(nms_by_class(&boxes, &[0.5; 3], &[0; 3], 1.0 / 3.0), [0, 2]);
        assert_eq!(nms_by_class(&boxes, &[0.5; 3], &[0, 1, 2], 0.1), [0, 1, 2]);
        assert!(nms_by_class(&[], &[], &[], 0.5).is_empty());
    }

    #[test]
    fn boxes_grow_about_their_centre_and_stay_in_the_image() {
        let xyxy = |x1, y1, x2, y2| Xyxy { x1, y1, x2, y2 };
        let size = [100, 80];
        assert_eq!(xyxy(10.5, 20.5, 30.0, 41.5).expanded(1.0, size), [10, 20, 30, 42]);
        assert_eq!(xyxy(10.0, 20.0, 30.0, 40.0).expanded(1.5, size), [5, 15, 35, 45]);
        assert_eq!(xyxy(80.0, 70.0, 100.0, 80.0).expanded(2.0, size), [70, 65, 100, 80]);
        assert_eq!(xyxy(99.8, 79.9, 100.0, 80.0).expanded(1.0, size), [99, 79, 100, 80]);
    }

    /// The table of LP-OVOD's specification, section 3.2, and what follows from the rule.
    #[test]
    fn crops_of_lp_ovod_grow_outwards_and_stay_in_the_image() {
        for (corners, plain, grown) in [
            ([10.0, 20.0, 110.0, 70.0], [9, 19, 111, 71], [0, 7, 136, 83]),
            ([0.4, 0.2, 31.9995, 64.0], [0, 0, 33, 65], [0, 0, 40, 80]),
            ([600.2, 400.7, 640.0, 480.0], [600, 400, 640, 480], [590, 380, 640, 480]),
            ([100.5, 100.5, 101.2, 101.2], [100, 100, 102, 102], [100, 100, 102, 102]),
        ] {
            let xyxy = Xyxy::from(corners);
            assert_eq!([xyxy.expanded_outwards(1.0, [640, 480]), xyxy.expanded_outwards(1.5, [640, 480])], [plain, grown], "{corners:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        /// The rule in the plainest words, in f64.
        #[test]
        fn outward_crops_are_as_written_down(x in 0.0_f32..639.0, y in 0.0_f32..479.0, w in 0.0_f32..300.0, h in 0.0_f32..300.0) {
            let xyxy = Xyxy { x1: x, y1: y, x2: (x + w).min(640.0), y2: (y + h).min(480.0) };
            let [x1, y1, x2, y2] = [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2].map(f64::from);
            let rounded = |[x1, y1, x2, y2]: [f64; 4]| {
                [(x1 - 0.001).floor().max(0.0), (y1 - 0.001).floor().max(0.0), (x2 + 0.001).ceil().min(640.0), (y2 + 0.001).ceil().min(480.0)].map(|side| side as i64)
            };
            let half = [1.25 * x1 - 0.25 * x2, 1.25 * y1 - 0.25 * y2, 1.25 * x2 - 0.25 * x1, 1.25 * y2 - 0.25 * y1];
            let (plain, grown) = (xyxy.expanded_outwards(1.0, [640, 480]), xyxy.expanded_outwards(1.5, [640, 480]));
            prop_assert_eq!(plain, rounded([x1, y1, x2, y2]));
            prop_assert_eq!(grown, rounded(half));
            prop_assert!(grown[0] <= plain[0] && grown[1] <= plain[1] && plain[2] <= grown[2] && plain[3] <= grown[3]);
            prop_assert!(grown[0] >= 0 && grown[1] >= 0 && grown[2] <= 640 && grown[3] <= 480);
            prop_assert!(plain[2] > plain[0] && plain[3] > plain[1]);
        }
    }

    #[test]
    fn a_box_survives_the_format_of_json() {
        let xyxy = Xyxy { x1: 1.5, y1: 2.0, x2: 4.0, y2: 8.25 };
        assert_eq!(xywh_to_xyxy(xyxy_to_xywh(&xyxy)), xyxy);
    }
}
