//! Stages that make class embeddings, and carry them in and out.

mod ensemble;
mod templates;

pub use ensemble::Ensemble;
pub(crate) use ensemble::ensemble;
pub use templates::Templates;
