//! Fingerprints, feature shards, the artifact store and the ledger: what makes work survive.
//!
//! ```text
//! recipe.rs    identity as data: Recipe -> Fingerprint, and the difference between two recipes in words
//! publish.rs   the only code that creates, renames or removes files: temporary name, fsync, rename, fsync of the folder
//! shard.rs     feature shards: Arrow IPC files with a BLAKE3 per record batch, read through a memory map
//! store.rs     where units and artifacts lie on disk; what is valid, damaged or absent
//! ledger.rs    sled: an index that can be lost (digests of input files)
//! inputs.rs    content digests of the files a user brings
//! chunk.rs     item lists cut into units by content
//! ```
//!
//! This crate knows nothing of images, tensors or stages.

pub mod chunk;
mod error;
pub mod inputs;
mod ledger;
pub mod publish;
mod recipe;
pub mod shard;
mod store;

pub use error::Error;
pub use ledger::Ledger;
pub use publish::{Draft, DraftFile, FileRecord};
pub use recipe::{Change, Digest, Fingerprint, Recipe};
pub use store::{Artifact, Manifest, Provenance, RunLock, Status, Store, UnitRecord, files_digest};

/// What every function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
