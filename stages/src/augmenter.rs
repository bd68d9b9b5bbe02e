//! Stages around the network that mixes regions with concepts.

pub mod apply;
pub(crate) mod network;
pub mod train;
