//! Stages that make and change annotations.

pub mod folder;
pub mod pseudo_labels;
pub mod relabel;
pub mod split;
pub mod web;
