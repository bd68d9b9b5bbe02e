//! Stages that search embeddings.

pub mod boxes;
pub mod statistics;
