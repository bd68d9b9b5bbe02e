//! The ledger: an index that can be deleted, with the digests of input files and the time when each unit was last verified.
//!
//! It is a database of sled 0.34, which only one process at a time can open: each access opens it for a moment under a lease
//! and closes it again, so that any number of processes can share it. No result depends on it. A damaged ledger is moved to
//! quarantine and recreated, with a notice; then the inputs are hashed once more. A process that cannot open it in time works
//! without it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Lease, Result, Store, publish::Publisher, verify::Depth};

/// The longest wait for other processes that have the ledger open.
const PATIENCE: Duration = Duration::from_secs(20);

/// The last verification of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The depth of the check.
    pub depth: Depth,
    /// The time, in s since 1970.
    pub at: i64,
}

/// The ledger of a home.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    lease: PathBuf,
    quarantine: PathBuf,
    publisher: Publisher,
    notices: Mutex<Vec<String>>,
    is_rehashing: bool,
    doubted: Mutex<BTreeSet<PathBuf>>,
    stop: Arc<AtomicBool>,
}

impl Ledger {
    /// The ledger of a store; it is created at the first write.
    pub fn of(store: &Store) -> Self {
        Self {
            folder: store.home().join("ledger"),
            lease: store.home().join("leases").join("ledger"),
            quarantine: store.home().join("quarantine"),
            publisher: store.publisher().clone(),
            notices: Mutex::default(),
            is_rehashing: false,
            doubted: Mutex::default(),
            stop: Arc::default(),
        }
    }

    /// With `true`, every input file is hashed again, whether the ledger has its digest or not.
    #[must_use]
    pub fn rehashing(self, is_rehashing: bool) -> Self {
        Self { is_rehashing, ..self }
    }

    /// Hashing of input files stops as soon as `stop` is set.
    #[must_use]
    pub fn stopped_by(self, stop: Arc<AtomicBool>) -> Self {
        Self { stop, ..self }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn is_rehashing(&self) -> bool {
        self.is_rehashing
    }

    /// Input files at these paths are hashed again, even if the ledger has their digest: they were found changed.
    pub fn doubt(&self, paths: impl IntoIterator<Item = PathBuf>) {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner).extend(paths);
    }

    pub(crate) fn doubted(&self) -> BTreeSet<PathBuf> {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The notices since the last call: damage of the ledger, skipped entries of input folders.
    pub fn notices(&self) -> Vec<String> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn say(&self, words: String) {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(words);
    }

    /// Creates the ledger if it is missing.
    pub fn begin(&self) {
        if !self.folder.exists() {
            let _without = self.with(|_| Ok(()));
        }
    }

    /// Deletes the ledger.
    pub fn forget(&self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Ok(_lease) = Lease::take(&self.lease)? {
                return self.publisher.remove(&self.folder);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(Error::malformed(&self.folder, "is in use by another process"))
    }

    /// Records that units were verified at a time `at` in s since 1970.
    pub fn note_verified(&self, units: &[String], depth: Depth, at: i64) {
        let value = serde_json::to_vec(&Verified { depth, at }).expect("BUG: plain data is plain JSON");
        let _lost = self.with(|db| {
            for unit in units {
                db.insert([b"verified:", unit.as_bytes()].concat(), &value[..])?;
            }
            Ok(())
        });
    }

    /// The last verification of each unit, by name, as far as the ledger knows it.
    pub fn verified(&self) -> BTreeMap<String, Verified> {
        let read = |db: &sled::Db| db.scan_prefix("verified:").collect::<sled::Result<Vec<_>>>();
        let entry = |(key, value): (sled::IVec, sled::IVec)| {
            Some((String::from_utf8(key["verified:".len()..].to_vec()).ok()?, serde_json::from_slice(&value).ok()?))
        };
        self.with(read).unwrap_or_default().into_iter().filter_map(entry).collect()
    }

    /// Opens the ledger and calls `work` with it. `None` if it cannot be opened: then nothing is known, and what should have
    /// been written is lost.
    pub(crate) fn with<T>(&self, work: impl Fn(&sled::Db) -> sled::Result<T>) -> Option<T> {
        let started = Instant::now();
        let _lease = loop {
            match Lease::take(&self.lease) {
                Ok(Ok(lease)) => break lease,
                Ok(Err(_)) if started.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(5)),
                Ok(Err(holder)) => {
                    self.say(format!("{} has had the ledger open for {} s: inputs are hashed again", holder.words(), PATIENCE.as_secs()));
                    return None;
                }
                // The home is read-only: work without a ledger.
                Err(_) => return None,
            }
        };
        for is_second_try in [false, true] {
            // sled panics on some kinds of damage.
            let worked = catch_unwind(AssertUnwindSafe(|| {
                let db = sled::Config::new().path(&self.folder).cache_capacity(256 << 20).flush_every_ms(None).open()?;
                let result = work(&db)?;
                db.flush()?;
                Ok::<T, sled::Error>(result)
            }));
            match worked {
                Ok(Ok(result)) => return Some(result),
                Ok(Err(sled::Error::Io(error))) if is_the_disk_s(&error) => {
                    self.say(format!("{}: {error}: inputs are hashed again", self.folder.display()));
                    return None;
                }
                _ if is_second_try => {}
                _ => match self.publisher.set_aside(&self.folder, &self.quarantine) {
                    Ok(Some(aside)) => self.say(format!("the ledger was damaged and is recreated; the old one is at {}", aside.display())),
                    Ok(None) => {}
                    Err(_) => return None,
                },
            }
        }
        None
    }
}

/// Whether an error is one of the disk and not damage of the ledger, so that a new ledger would not help.
fn is_the_disk_s(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::StorageFull | Kind::QuotaExceeded | Kind::PermissionDenied | Kind::ReadOnlyFilesystem)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::publish::replace;

    fn read(ledger: &Ledger) -> Option<Option<Vec<u8>>> {
        ledger.with(|db| Ok(db.get("a")?.map(|value| value.to_vec())))
    }

    fn write(ledger: &Ledger) {
        ledger.with(|db| db.insert("a", b"7")).unwrap();
    }

    #[test]
    fn values_are_kept_and_several_users_share_the_ledger() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (one, two) = (Ledger::of(&store), Ledger::of(&store));
        write(&one);
        assert_eq!(read(&two), Some(Some(b"7".to_vec())));
        assert!(one.notices().is_empty() && two.notices().is_empty());
        one.forget().unwrap();
        assert_eq!(read(&two), Some(None));
    }

    #[test]
    fn a_damaged_ledger_is_moved_to_quarantine_and_recreated() {
        for name in ["db", "conf"] {
            let home = tempfile::tempdir().unwrap();
            let ledger = Ledger::of(&Store::open(home.path()).unwrap());
            write(&ledger);
            let path = home.path().join("ledger").join(name);
            let length = fs::metadata(&path).unwrap().len() as usize;
            replace(&path, &b"garbage!".repeat(length.div_ceil(8))[..length.max(8)]).unwrap();
            // However sled reacts: the ledger works again, and its answers are true or unknown.
            assert!(matches!(read(&ledger), Some(None)), "{name}");
            write(&ledger);
            assert_eq!(read(&ledger), Some(Some(b"7".to_vec())), "{name}");
        }
    }

    #[test]
    fn a_file_in_the_place_of_the_ledger_is_damage_like_any_other() {
        let home = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(&Store::open(home.path()).unwrap());
        replace(&home.path().join("ledger"), b"this is not a folder").unwrap();
        write(&ledger);
        assert!(ledger.notices()[0].contains("is recreated"));
        assert!(home.path().join("quarantine/ledger").exists());
    }
}
