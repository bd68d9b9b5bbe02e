//! Stages of CORA's localizer. (CORA, sections 7 to 10.)

pub(crate) mod batches;
pub mod export;
pub mod import;
pub(crate) mod options;
pub(crate) mod predictor;
mod published;
pub(crate) mod spec;
pub mod test;
pub mod train;
