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
