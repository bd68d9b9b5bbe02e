//! The Stage contract, the registry and every stage.
//!
//! A stage is where files ([`ovenbird_data`]), networks ([`ovenbird_models`]) and the store ([`ovenbird_cache`]) meet. It
//! knows nothing of pipelines: the graph, the plan and the run loop are the program's.
//!
//! The file of the stage `a/b-c` is `a/b_c.rs`, or `a.rs` where the family is small. No stage reads another stage's file: what several
//! stages need is in a file that defines none.

pub mod annotations;
pub mod artifacts;
pub mod augmenter;
pub mod blocks;
mod class_folder;
pub mod clip;
pub mod concepts;
mod context;
mod contract;
pub mod crops;
pub mod detect;
pub mod detections;
pub mod detector;
pub mod embeddings;
mod error;
pub mod eval;
mod exchange;
mod feed;
pub mod globals;
#[cfg(test)]
mod golden;
pub mod localizer;
pub mod negatives;
pub mod objects;
pub mod oln;
mod pass;
pub mod pool;
mod ports;
pub mod prompts;
pub mod proposals;
pub mod region;
mod registry;
mod renamed;
pub mod retrieve;
#[cfg(test)]
#[path = "../../tests/support/skip.rs"]
mod skip;
pub mod toy;
mod training;
mod units;
pub mod vocabulary;
pub mod web;

pub use context::{
    Context, FAILED_FILE, FailedItem, OnBadItem, Progress, RETRY_FILE, UnitDraft, count_failed, failed_items, refuse_too_many,
};
pub use contract::{AnyStage, ImageStage, Problem, Stage};
pub use error::Error;
pub use pass::ImageConsumer;
pub use ports::{Artifact, In, Inputs, Out, PortInfo, Presence};
pub use registry::{STAGES, StageEntry, find, run_together};
pub use renamed::{renamed_kind, renamed_parameter};
pub use units::{Unit, Units};

/// What every function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
