//! Stages around the network that mixes regions with concepts.

pub mod apply;
pub mod export;
pub mod import;
pub(crate) mod network;
pub mod train;
