//! Stages that make class embeddings, and carry them in and out.

pub mod ensemble;
pub mod export;
#[cfg(test)]
mod golden;
pub mod import;
mod multilabel;
mod published;
mod templates;
pub(crate) mod texts;

pub use multilabel::Multilabel;
pub use templates::Templates;
