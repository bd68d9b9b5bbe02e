//! Training and evaluation data of detectors: COCO / LVIS annotations, class splits, images, boxes and masks, proposals,
//! evaluation, and the toy world.
//!
//! This crate knows files and their meaning. It knows nothing of networks, stages or the store.

pub mod additions;
pub mod annotations;
pub mod boxes;
pub mod classes;
pub mod content;
pub mod crops;
pub mod cut;
pub mod draw;
mod error;
pub mod evaluate;
pub mod images;
pub mod json;
pub mod letterbox;
pub mod masks;
pub mod proposals;
pub mod relabelled;
mod resize;
pub mod split;
pub mod toy;
pub mod training;
pub mod views;
pub mod warnings;
pub mod words;

pub use error::Error;

/// The result of every function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
