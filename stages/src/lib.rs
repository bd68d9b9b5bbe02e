//! The Stage contract, the registry and every stage.
//!
//! A stage is where files ([`ovenbird_data`]), networks ([`ovenbird_models`]) and the store ([`ovenbird_cache`]) meet. It
//! knows nothing of pipelines: the graph, the plan and the run loop are the program's.

pub mod annotations;
pub mod artifacts;
pub mod clip;
mod contract;
pub mod crops;
pub mod detect;
pub mod detector;
mod error;
pub mod export;
mod feed;
pub mod interchange;
mod optimizer;
mod pass;
pub mod prompts;
pub mod pseudo_labels;
mod registry;
mod renamed;
#[cfg(test)]
#[path = "../../tests/support/skip.rs"]
mod skip;
pub mod toy;

pub use contract::{
    AnyStage, Context, FAILED_FILE, FailedItem, In, Inputs, OnBadItem, Out, PortInfo, Presence, Problem, Progress, Stage, Unit, UnitDraft,
    Units, failed_items, refuse_too_many,
};
pub use error::Error;
pub use pass::{Rider, run_together};
pub use registry::{STAGES, StageEntry, find};
pub use renamed::renamed_kind;

/// What every function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
