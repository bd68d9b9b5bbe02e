//! Stages that make proposals, and carry them in and out.

pub mod export;
pub mod import;
pub mod oln;
pub(crate) mod order;
