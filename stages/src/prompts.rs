//! Stages that make, learn, import and export class embeddings.

mod described;
mod detpro;
pub mod detpro_data;
pub mod embed;
pub mod ensemble;
pub mod export;
#[cfg(test)]
mod golden;
pub mod import;
pub mod mean;
mod multilabel;
pub(crate) mod naming;
mod published;
mod rpl;
mod templates;
pub(crate) mod texts;

pub use detpro::Detpro;
pub use multilabel::Multilabel;
pub use rpl::Rpl;
pub use templates::Templates;
