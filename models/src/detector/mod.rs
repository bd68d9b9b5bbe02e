//! Two-stage detectors: a backbone, a feature pyramid, region proposals, and heads that look at regions.
//!
//! Boxes are xyxy, half-open, f32, in px of the image as the network sees it.

pub mod anchors;
pub mod boxes;
pub mod matching;
pub mod roi_align;

#[cfg(test)]
mod tests;

use tch::Tensor;

use crate::{Error, Result};

/// Refuses a tensor that is not as a function needs it.
fn ensure(is_fine: bool, what: &'static str, expected: &str, found: &Tensor) -> Result<()> {
    if is_fine {
        return Ok(());
    }
    Err(Error::Input { what, expected: expected.to_owned(), found: format!("{:?} {:?}", found.kind(), found.size()) })
}
