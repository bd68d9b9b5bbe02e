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
/// have equal length. Takes O(N log N + sum over classes of kept x N), so 1,000 boxes x 1,203 classes do not hurt unless
/// all are kept.
pub fn nms_by_class(boxes: &[Xyxy], scores: &[f32], classes: &[u32], iou_threshold: f32) -> Vec<usize> {
    assert!(boxes.len() == scores.len() && boxes.len() == classes.len(), "BUG: boxes, scores and classes of different lengths");
    let mut order: Vec<usize> = (0..boxes.len()).collect();
    order.sort_by(|&a, &b| classes[a].cmp(&classes[b]).then(scores[b].total_cmp(&scores[a])).then(a.cmp(&b)));
    let mut kept = Vec::new();
    for of_class in order.chunk_by(|&a, &b| classes[a] == classes[b]) {
        let first = kept.len();
        for &candidate in of_class {
            if kept[first..].iter().all(|&better: &usize| boxes[better].iou(&boxes[candidate]) <= iou_threshold) {
                kept.push(candidate);
            }
        }
    }
    kept.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    kept
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

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
        let boxes = golden.boxes.iter().map(|[x1, y1, x2, y2]| Xyxy { x1: *x1, y1: *y1, x2: *x2, y2: *y2 }).collect();
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

    #[test]
    fn a_box_survives_the_format_of_json() {
        let xyxy = Xyxy { x1: 1.5, y1: 2.0, x2: 4.0, y2: 8.25 };
        assert_eq!(xywh_to_xyxy(xyxy_to_xywh(&xyxy)), xyxy);
    }
}
