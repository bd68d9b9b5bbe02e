//! Stages that make class embeddings, and carry them in and out.

mod ensemble;
mod exchange;
#[cfg(test)]
mod golden;
mod multilabel;
mod templates;

use std::collections::BTreeMap;

use serde_json::Value;
use tch::{Kind, Tensor};

pub use ensemble::Ensemble;
pub(crate) use ensemble::ensemble;
pub use exchange::{Export, Import};
pub use multilabel::Multilabel;
pub use templates::Templates;

/// The lengths of rows `[K, D]`, as metrics.
fn norms(rows: &Tensor) -> BTreeMap<String, Value> {
    let norms = rows.norm_scalaropt_dim(2.0, [-1], false);
    let metrics = [("min_norm", norms.min()), ("mean_norm", norms.mean(Kind::Float)), ("max_norm", norms.max())];
    metrics.map(|(name, norm)| (name.to_owned(), norm.double_value(&[]).into())).into()
}
