//! Embeddings of proposals as one matrix, from and for LP-OVOD.

pub mod export;
pub mod import;
