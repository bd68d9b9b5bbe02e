//! The parts that every detector needs: boxes, anchors and matching, a ResNet, a feature pyramid, RoIAlign, and the detections themselves.
//!
//! Boxes are xyxy, half-open, f32, in px of the image as the network sees it. No network is put together here: see [`rcnn`](crate::rcnn).

pub mod anchors;
pub mod boxes;
pub mod fpn;
#[cfg(test)]
pub(crate) mod golden;
pub(crate) mod layers;
pub mod matching;
pub mod resnet;
pub mod roi_align;

#[cfg(test)]
mod tests;

use tch::Tensor;

use self::boxes::Kept;

/// The detections of one image.
#[derive(Debug)]
pub struct Detections {
    /// Boxes, classes and scores, best first.
    pub kept: Kept,
    /// Mask logits f32 `[M, 28, 28]`, each as wide and high as its box; none if the detector has no mask head.
    pub masks: Option<Tensor>,
}
