//! Detectors: trained, imported, exported, and run on images. Written after ViLD (Gu et al. 2022) and OADP (methods, section 6).
//!
//! A detector's file says how its network is built and used ([`spec::DetectorSpec`]), so that nothing has to be repeated where it is used.

pub(crate) mod batches;
mod classes;
mod cosine;
pub mod criterion;
pub mod distillation;
pub mod embed;
pub mod export;
pub mod features;
pub(crate) mod images;
pub mod import;
mod labelled;
pub(crate) mod load;
mod mask_rcnn;
pub mod options;
pub(crate) mod ports;
pub(crate) mod predictor;
pub(crate) mod pretrained;
pub mod probe;
pub mod select;
mod sigmoid;
pub mod spec;
mod start;
pub mod test;
pub mod train;
pub mod training;
pub mod web;
