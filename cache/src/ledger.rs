//! An index that can be lost: digests of input files that were hashed before.
//!
//! Kept in sled 0.34, which belongs to one process: only a caller that holds the home's [`RunLock`](crate::RunLock) opens
//! it. It is never the truth. A damaged ledger is set aside and begun anew, and the caller is told; the price is hashing
//! the inputs once more.

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result, publish};

/// The open ledger.
#[derive(Debug)]
pub struct Ledger {
    db: sled::Db,
}

impl Ledger {
    /// Opens or creates the ledger in a folder. The second value says, in words, that a damaged one was set aside.
    pub fn open(folder: &Path, quarantine: &Path) -> Result<(Self, Option<String>)> {
        match Self::try_open(folder) {
            Ok(ledger) => Ok((ledger, None)),
            Err(_) if folder.exists() => {
                let aside = publish::quarantine(folder, quarantine)?;
                let ledger = Self::try_open(folder).map_err(|error| Error::malformed(folder, error.to_string()))?;
                Ok((ledger, Some(format!("the ledger was damaged and is begun anew; the old one is at {}", aside.display()))))
            }
            Err(error) => Err(Error::malformed(folder, error.to_string())),
        }
    }

    fn try_open(folder: &Path) -> sled::Result<Self> {
        // A plain file where the folder belongs is damage like any other.
        let db = sled::Config::new().path(folder).cache_capacity(64 << 20).flush_every_ms(None).open()?;
        Ok(Self { db })
    }

    /// Reads a value; one that cannot be read or understood is as good as absent.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        let bytes = self.db.get(key).ok()??;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes a value. It survives a crash once [`Self::flush`] has returned.
    pub fn put<T: Serialize>(&self, key: &str, value: &T) {
        let bytes = serde_json::to_vec(value).expect("BUG: ledger values are plain JSON");
        // The ledger may always be lost, so a failed write costs a hash, not a run.
        let _lost = self.db.insert(key, bytes);
    }

    /// Makes everything put so far survive.
    pub fn flush(&self) {
        let _lost = self.db.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_closing() {
        let home = tempfile::tempdir().unwrap();
        let (folder, aside) = (home.path().join("ledger"), home.path().join("quarantine"));
        let (ledger, _) = Ledger::open(&folder, &aside).unwrap();
        ledger.put("a", &7_u32);
        ledger.flush();
        drop(ledger);
        let (ledger, said) = Ledger::open(&folder, &aside).unwrap();
        assert_eq!((ledger.get("a"), ledger.get::<u32>("b"), said), (Some(7_u32), None, None));
    }

    #[test]
    fn a_damaged_ledger_is_set_aside_aloud() {
        let home = tempfile::tempdir().unwrap();
        let (folder, aside) = (home.path().join("ledger"), home.path().join("quarantine"));
        publish::replace(&folder, b"this is not a folder").unwrap();
        let (ledger, said) = Ledger::open(&folder, &aside).unwrap();
        assert_eq!(ledger.get::<u32>("a"), None);
        assert!(said.unwrap().contains("begun anew"));
        assert!(aside.join("ledger").exists());
    }
}
