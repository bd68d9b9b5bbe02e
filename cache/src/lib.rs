//! Fingerprints, feature shards, the artifact store and the ledger: results that survive crashes and damage.
//!
//! ```text
//! recipe.rs    Recipe -> Fingerprint, and the fields in which two recipes differ
//! disk.rs      the file-system calls that the store uses; the only code that creates, renames or removes files
//! publish.rs   atomic writes: temporary name, fsync, rename, fsync of the folder
//! journal.rs   append-only files of sealed lines
//! lease.rs     the right of one process to make a unit; the processes at work in a home
//! shard.rs     feature shards: Arrow IPC files with a BLAKE3 per record batch, read through a memory map
//! stats.rs     statistics of a shard's rows, for its footer
//! record.rs    the records of units and artifacts (`unit.json`, manifests)
//! records.rs   the records that garbage collection relies on: pins, pipelines, plans, requests, logs, the journal of commits
//! store.rs     the layout of a home; units and artifacts, each valid, damaged or absent
//! choice.rs    a choice that holds for all units with the same item key
//! parts.rs     the finished work of units that were cut off, from which the next run continues
//! spool.rs     what was fetched from elsewhere: files by content, and a record for each name
//! reusable.rs  results of single items that can be reused from other units
//! verify.rs    checks of units, manifests and the folders of a home
//! ledger.rs    sled: an index that can be deleted (digests of input files)
//! inputs.rs    content digests of the user's files
//! chunk.rs     item lists cut into units by content
//! ```
//!
//! This crate knows nothing of images, tensors or stages.

mod choice;
pub mod chunk;
mod disk;
mod error;
pub mod inputs;
pub mod journal;
mod lease;
mod ledger;
mod parts;
pub mod publish;
mod recipe;
mod record;
mod records;
mod reusable;
pub mod shard;
#[cfg(test)]
mod simulation;
mod spool;
mod stats;
mod store;
pub mod verify;

pub use disk::crash_at;
pub use error::Error;
pub use lease::{Lease, Owner, Session, Watch};
pub use ledger::{Ledger, Verified};
pub use publish::{Draft, DraftFile, FileRecord, Publisher};
pub use recipe::{Change, Digest, Fingerprint, Recipe, shown};
pub use record::{Manifest, Provenance, UnitKey, UnitRecord, files_digest};
pub use records::{CURSOR, Noted};
pub use reusable::ReusableItems;
pub use spool::Spool;
pub use stats::{Stats, VectorStats};
pub use store::{Artifact, Claim, Recovered, Status, Store, unit_name};

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
