//! Operations on boxes: overlap, deltas between boxes, suppression of duplicates.
//!
//! Boxes are xyxy, half-open, in px. Overlaps and suppression are plain loops on the CPU in f32, in the order of operations of torchvision's
//! kernels, so that the same boxes are kept to the last bit. Unlike torchvision's, suppression ends once enough boxes are kept.

use std::{cmp::Ordering, collections::BinaryHeap};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use crate::{Result, error::ensure};

/// One box, xyxy in px.
pub type Corners = [f32; 4];

/// The largest |log| of a change of width or height: a box becomes at most 62.5 times as wide (Faster R-CNN's 1000 / 16).
const MAX_LOG_SCALE: f64 = 4.135_166_556_742_356;

/// The size of an image inside its batch, px: what is to its right and below is padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSize {
    /// The width.
    pub width: i64,
    /// The height.
    pub height: i64,
}

/// `[width, height]` px.
impl From<[u32; 2]> for ImageSize {
    fn from([width, height]: [u32; 2]) -> Self {
        Self { width: width.into(), height: height.into() }
    }
}

/// The boxes of a tensor `[N, 4]`, as plain data.
pub fn corners(boxes: &Tensor, what: &'static str) -> Result<Vec<Corners>> {
    ensure(matches!(boxes.size()[..], [_, 4]) && is_floating(boxes), what, "floating [N, 4]", boxes)?;
    Ok(floats(boxes).as_chunks().0.to_vec())
}

/// Boxes as a tensor, f32 `[N, 4]` on the CPU.
pub fn boxes_tensor(boxes: &[Corners]) -> Tensor {
    Tensor::from_slice(boxes.as_flattened()).reshape([-1, 4])
}

/// All numbers of a tensor, row by row.
pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view(-1);
    Vec::try_from(flat).expect("BUG: a flat f32 tensor on the CPU becomes a vector")
}

pub(crate) fn integers(tensor: &Tensor) -> Vec<i64> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Int64).contiguous().view(-1);
    Vec::try_from(flat).expect("BUG: a flat i64 tensor on the CPU becomes a vector")
}

pub(crate) fn is_floating(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
}

fn area([x1, y1, x2, y2]: Corners) -> f32 {
    (x2 - x1) * (y2 - y1)
}

fn intersection(a: Corners, b: Corners) -> f32 {
    let width = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let height = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    width * height
}

/// Intersection over union; 0 where both boxes are empty.
pub(crate) fn iou(a: Corners, b: Corners) -> f32 {
    let shared = intersection(a, b);
    let union = area(a) + area(b) - shared;
    if union > 0.0 { shared / union } else { 0.0 }
}

/// The share of the area of `inner` within `outer`; 0 if it is empty.
pub(crate) fn share_within(inner: Corners, outer: Corners) -> f32 {
    let area = area(inner);
    if area > 0.0 { intersection(inner, outer) / area } else { 0.0 }
}

/// Returns the intersection over union of each of `a` `[N, 4]` with each of `b` `[M, 4]`: f32 `[N, M]` on the CPU.
pub fn iou_matrix(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (corners(a, "boxes")?, corners(b, "boxes")?);
    let all: Vec<f32> = a.iter().flat_map(|&a| b.iter().map(move |&b| iou(a, b))).collect();
    Ok(Tensor::from_slice(&all).reshape([a.len() as i64, b.len() as i64]))
}

/// The corners, xyxy, of boxes `[N, 4]` that are given by centre, width and height.
pub(crate) fn cxcywh_to_xyxy(boxes: &Tensor) -> Tensor {
    let (centre, half) = (boxes.narrow(1, 0, 2), boxes.narrow(1, 2, 2) * 0.5);
    Tensor::cat(&[&centre - &half, centre + half], 1)
}

/// Moves the corners of `boxes` `[N, 4]` into the image; a box outside becomes empty.
pub(crate) fn clip_to_image(boxes: &Tensor, size: ImageSize) -> Tensor {
    let limit = Tensor::from_slice(&[size.width as f32, size.height as f32, size.width as f32, size.height as f32]);
    boxes.clamp_min(0.0).minimum(&limit.to_device(boxes.device()).to_kind(boxes.kind()))
}

/// Encodes boxes as changes of other boxes (R-CNN, appendix C): centre shifts in widths and heights, logarithms of scales, each divided by
/// its standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoxCoder {
    /// The divisors of dx, dy, dw, dh.
    pub stds: [f64; 4],
}

impl BoxCoder {
    /// Returns the deltas `[N, 4]` that turn `from` `[N, 4]` into `to` `[N, 4]`; both must have a positive width and height to be finite.
    pub fn encode(&self, from: &Tensor, to: &Tensor) -> Result<Tensor> {
        ensure(matches!(from.size()[..], [_, 4]) && is_floating(from), "boxes to encode from", "floating [N, 4]", from)?;
        ensure(to.size() == from.size() && is_floating(to), "boxes to encode", "as many boxes [N, 4]", to)?;
        let (from_centre, from_size) = centre_and_size(from);
        let (to_centre, to_size) = centre_and_size(to);
        let deltas = Tensor::cat(&[(to_centre - from_centre) / &from_size, (to_size / from_size).log()], 1);
        Ok(deltas / self.stds_like(from))
    }

    /// Returns the boxes that `deltas` `[N, 4 K]` (K of them for each box, class by class) make of `boxes` `[N, 4]`: `[N, 4 K]`.
    ///
    /// Scales are limited to between 16 / 1000 and 1000 / 16, as mmdet does (torchvision limits only growth).
    pub fn decode(&self, boxes: &Tensor, deltas: &Tensor) -> Result<Tensor> {
        ensure(matches!(boxes.size()[..], [_, 4]) && is_floating(boxes), "boxes to decode from", "floating [N, 4]", boxes)?;
        let n = boxes.size()[0];
        ensure(matches!(deltas.size()[..], [rows, k4] if rows == n && k4 % 4 == 0), "box deltas", "[N, 4 K], N as of the boxes", deltas)?;
        let (centre, size) = centre_and_size(boxes);
        // [N, K, 2] each.
        let deltas = deltas.reshape([n, deltas.size()[1] / 4, 4]) * self.stds_like(deltas);
        let (centre, size) = (centre.unsqueeze(1), size.unsqueeze(1));
        let centre = deltas.narrow(2, 0, 2) * &size + centre;
        let half = deltas.narrow(2, 2, 2).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * size * 0.5;
        Ok(Tensor::cat(&[&centre - &half, centre + half], 2).flatten(1, 2))
    }

    fn stds_like(&self, like: &Tensor) -> Tensor {
        Tensor::from_slice(&self.stds).to_kind(like.kind()).to_device(like.device())
    }
}

/// The loss of box deltas, number by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxLoss {
    /// The absolute difference (mmdet's Faster R-CNN).
    #[default]
    Absolute,
    /// A parabola up to a difference of `beta`, and from there the absolute difference less half of `beta` (Fast R-CNN, equation 3).
    Smooth {
        /// Where the parabola ends; torchvision's is 1 / 9.
        beta: f64,
    },
}

impl BoxLoss {
    /// Both f32, of one shape.
    pub(crate) fn between(self, found: &Tensor, expected: &Tensor) -> Tensor {
        match self {
            Self::Absolute => (found - expected).abs(),
            Self::Smooth { beta } => found.smooth_l1_loss(expected, Reduction::None, beta),
        }
    }
}

fn centre_and_size(boxes: &Tensor) -> (Tensor, Tensor) {
    let (low, high) = (boxes.narrow(1, 0, 2), boxes.narrow(1, 2, 2));
    let size = &high - &low;
    (low + &size * 0.5, size)
}

/// A box that may be kept. The greatest has the highest score, and among equals the lowest index.
#[derive(PartialEq)]
struct Candidate {
    score: f32,
    index: usize,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Non-maximum suppression, and the number of boxes to keep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suppression {
    /// A box goes if its intersection over union with a better one of its group is more than this.
    pub iou: f32,
    /// The most boxes that are kept, over all groups.
    pub keep: usize,
}

impl Suppression {
    /// Keeps the best of `boxes` `[N, 4]` by `scores` `[N]`, where boxes of different `groups` (i64 `[N]`) do not compete.
    ///
    /// Returns the indices of the kept boxes, best first; among equal scores the lowest index first.
    pub fn of_groups(&self, boxes: &Tensor, scores: &Tensor, groups: &Tensor) -> Result<Vec<i64>> {
        let corners = corners(boxes, "boxes")?;
        let n = corners.len() as i64;
        ensure(scores.size() == [n] && is_floating(scores), "scores", "floating [N], N as of the boxes", scores)?;
        ensure(groups.size() == [n] && groups.kind() == Kind::Int64, "groups", "i64 [N], N as of the boxes", groups)?;
        let groups = integers(groups);
        let mut distinct = groups.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let group_of = |index: usize| distinct.binary_search(&groups[index]).expect("BUG: every group is among the distinct ones");
        let candidates = floats(scores).into_iter().enumerate().map(|(index, score)| Candidate { score, index }).collect();
        let kept = self.greedy(candidates, distinct.len(), group_of, |index| corners[index]);
        Ok(kept.into_iter().map(|candidate| candidate.index as i64).collect())
    }

    /// Keeps the best classes of boxes, where boxes compete within a class.
    ///
    /// `boxes`: `[N, 4]`, or `[N, 4 K]` where each class has its own; `scores`: `[N, K]`. Only scores above `threshold` take part. The list is
    /// never written out class by class, so that 1,000 boxes of 1,203 classes cost little more than what is kept.
    pub fn of_classes(&self, boxes: &Tensor, scores: &Tensor, threshold: f32) -> Result<Kept> {
        ensure(matches!(scores.size()[..], [_, k] if k > 0) && is_floating(scores), "scores", "floating [N, K], K at least 1", scores)?;
        let (n, k) = (scores.size()[0], scores.size()[1] as usize);
        let has_own = k > 1 && boxes.size() == [n, 4 * k as i64];
        ensure((has_own || boxes.size() == [n, 4]) && is_floating(boxes), "boxes", "floating [N, 4] or [N, 4 K], as the scores", boxes)?;
        let coordinates = floats(boxes);
        let corners = coordinates.as_chunks::<4>().0;
        let box_of = |index: usize| if has_own { corners[index] } else { corners[index / k] };
        let candidates = floats(scores)
            .into_iter()
            .enumerate()
            .filter(|&(_, score)| score > threshold)
            .map(|(index, score)| Candidate { score, index })
            .collect();
        let kept = self.greedy(candidates, k, |index| index % k, box_of);
        Ok(Kept {
            boxes: boxes_tensor(&kept.iter().map(|candidate| box_of(candidate.index)).collect::<Vec<_>>()),
            rows: kept.iter().map(|candidate| (candidate.index / k) as i64).collect(),
            classes: kept.iter().map(|candidate| (candidate.index % k) as i64).collect(),
            scores: kept.iter().map(|candidate| candidate.score).collect(),
        })
    }

    /// Visits candidates from the best on; each is compared with the kept boxes of its group.
    fn greedy(
        &self,
        candidates: Vec<Candidate>,
        n_groups: usize,
        group_of: impl Fn(usize) -> usize,
        box_of: impl Fn(usize) -> Corners,
    ) -> Vec<Candidate> {
        let mut kept = Vec::new();
        let mut kept_boxes: Vec<Vec<Corners>> = vec![Vec::new(); n_groups];
        let mut heap = BinaryHeap::from(candidates);
        while kept.len() < self.keep
            && let Some(candidate) = heap.pop()
        {
            let (group, corners) = (&mut kept_boxes[group_of(candidate.index)], box_of(candidate.index));
            if group.iter().all(|&better| iou(better, corners) <= self.iou) {
                group.push(corners);
                kept.push(candidate);
            }
        }
        kept
    }
}

/// The boxes that survive suppression, with their classes, best first.
#[derive(Debug)]
pub struct Kept {
    /// f32 `[M, 4]` on the CPU, px.
    pub boxes: Tensor,
    /// The row of each in the input.
    pub rows: Vec<i64>,
    /// The class of each.
    pub classes: Vec<i64>,
    /// The score of each.
    pub scores: Vec<f32>,
}
