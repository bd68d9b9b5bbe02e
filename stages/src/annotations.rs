//! Stages that change annotations.

pub mod pseudo_labels;
pub mod split;
