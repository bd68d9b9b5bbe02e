//! Stages of CORA's localizer. (CORA, sections 7 to 10.)

pub(crate) mod batches;
pub(crate) mod options;
pub(crate) mod predictor;
pub(crate) mod spec;
pub mod test;
pub mod train;
