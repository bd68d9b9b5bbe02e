//! Fingerprints, feature shards, the artifact store and the ledger: what makes work survive.
//!
//! ```text
//! recipe.rs    identity as data: Recipe -> Fingerprint, and the difference between two recipes in words
//! disk.rs      what is asked of a file system; the only code that creates, renames or removes files
//! publish.rs   how everything that lasts gets there: temporary name, fsync, rename, fsync of the folder
//! journal.rs   append-only files of sealed lines
//! lease.rs     which process is making what
//! shard.rs     feature shards: Arrow IPC files with a BLAKE3 per record batch, read through a memory map
//! stats.rs     what a shard's rows look like, for its footer
//! record.rs    what is written of units and artifacts
//! records.rs   what is to be kept: pins, pipelines, plans, requests, logs, and the journal that knows of all of it
//! store.rs     where units and artifacts lie on disk; what is valid, damaged or absent
//! choice.rs    what is chosen once for all units of a family
//! donors.rs    results of single items that other units hold already
//! verify.rs    whether what lies in a home is what was published
//! ledger.rs    sled: an index that can be lost (digests of input files)
//! inputs.rs    content digests of the files a user brings
//! chunk.rs     item lists cut into units by content
//! ```
//!
//! This crate knows nothing of images, tensors or stages.

mod choice;
pub mod chunk;
mod disk;
mod donors;
mod error;
pub mod inputs;
pub mod journal;
mod lease;
mod ledger;
pub mod publish;
mod recipe;
mod record;
mod records;
pub mod shard;
#[cfg(test)]
mod simulation;
mod stats;
mod store;
pub mod verify;

pub use disk::crash_at;
pub use donors::Donors;
pub use error::Error;
pub use lease::{Lease, Owner, Session, Watch};
pub use ledger::{Ledger, Verified};
pub use publish::{Draft, DraftFile, FileRecord, Publisher};
pub use recipe::{Change, Digest, Fingerprint, Recipe};
pub use record::{Manifest, Provenance, UnitKey, UnitRecord, files_digest};
pub use records::{CURSOR, Noted};
pub use stats::{Stats, VectorStats};
pub use store::{Artifact, Claim, Recovered, Status, Store, unit_name};

/// What every function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
