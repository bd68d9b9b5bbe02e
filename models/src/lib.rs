//! Networks on libtorch: CLIP towers and their tokenizer, two-stage detectors and a DETR, and the readers of published checkpoints.
//!
//! This crate knows tensors and weights. It knows nothing of what files mean to a pipeline, nor of stages or the store.

pub mod augmenter;
pub mod checkpoint;
pub mod clip;
pub mod detection;
pub mod detpro;
pub mod detr;
mod error;
#[cfg(test)]
mod golden;
mod layers;
pub mod multilabel;
pub mod negatives;
mod parameters;
pub mod raf;
pub mod ral;
pub mod rcnn;
pub mod search;
#[cfg(test)]
#[path = "../../tests/support/skip.rs"]
mod skip;

pub use error::{Error, Misfit};
pub use layers::{Phase, Statistics, to_unit_length};

/// The version of libtorch that the program is built against.
pub const LIBTORCH: &str = "2.11.0";

/// The result of every function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
