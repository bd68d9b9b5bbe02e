//! The spool: what was fetched from elsewhere and cannot be computed again, by content, and one record for each name that was asked for.
//!
//! ```text
//! HOME/web/files/AB/SHA256          bytes as they came
//! HOME/web/records/AB/DIGEST.json   a sealed record of what came of a name
//! ```
//!
//! Every write is a temporary file, an fsync and a rename: after `kill -9` an entry is there whole or not at all. Folders are not synced, which would
//! cost as much again for each image: after a power cut entries of the last seconds may be gone. A record's seal and the digest
//! that it states of its file tell damage, and what is damaged counts as not there. Units share files with the spool by hard links.
//! Deleting the folder loses no result, but names are then asked for again, and the web may have changed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{Digest, Result, Store, inputs::read_file};

/// The folder of the spool.
pub(crate) const SPOOL: &str = "web";
/// The folders below it that have folders of entries.
pub(crate) const SPOOL_FOLDERS: [&str; 2] = ["web/files", "web/records"];

/// The spool of a home.
#[derive(Debug, Clone)]
pub struct Spool {
    store: Store,
}

impl Store {
    /// The spool of this home.
    pub fn spool(&self) -> Spool {
        Spool { store: self.clone() }
    }
}

impl Spool {
    fn place(name: &str) -> String {
        let digest = Digest::of(name.as_bytes()).to_hex();
        format!("{}/{}/{digest}.json", SPOOL_FOLDERS[1], &digest[..2])
    }

    /// The record of a name. Fails where it is damaged.
    pub fn record<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        self.store.kept(&Self::place(name))
    }

    /// Writes the record of a name.
    pub fn keep<T: Serialize>(&self, name: &str, record: &T) -> Result<()> {
        self.store.place_unnoted(&Self::place(name), record)
    }

    /// Deletes the record of a name.
    pub fn forget(&self, name: &str) -> Result<()> {
        let path = self.store.home().join(Self::place(name));
        if path.exists() { self.store.publisher().remove(&path) } else { Ok(()) }
    }

    /// Where the file with this content is; `sha256` in hexadecimal digits.
    pub fn path(&self, sha256: &str) -> PathBuf {
        self.store.home().join(SPOOL_FOLDERS[0]).join(sha256.get(..2).unwrap_or("00")).join(sha256)
    }

    /// Writes a file by the digest of its content.
    pub fn put(&self, sha256: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(sha256);
        // Another name may have led to the same content.
        if read_file(&path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        self.store.check_there()?;
        self.store.publisher().place(&path, bytes)
    }

    /// Whether a file is there with the content that a record states.
    pub fn holds(&self, sha256: &str, content: &Digest) -> bool {
        read_file(&self.path(sha256)).is_ok_and(|bytes| Digest::of(&bytes) == *content)
    }

    /// Bytes of the spool that no unit shares; 0 without a spool.
    pub fn own_bytes(&self) -> u64 {
        own_bytes(&self.store.home().join(SPOOL))
    }

    /// Deletes the spool. Units keep their files.
    pub fn clear(&self) -> Result<()> {
        let path = self.store.home().join(SPOOL);
        if path.exists() { self.store.publisher().remove(&path) } else { Ok(()) }
    }
}

fn own_bytes(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => own_bytes(&entry.path()),
        Ok(metadata) if metadata.nlink() > 1 => 0,
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_there_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("home")).unwrap();
        let _session = store.enter().unwrap();
        let spool = store.spool();
        assert_eq!(spool.record::<u32>("http://a/b").unwrap(), None);
        spool.put("abcd", b"content").unwrap();
        spool.keep("http://a/b", &7_u32).unwrap();
        assert_eq!(spool.record::<u32>("http://a/b").unwrap(), Some(7));
        assert!(spool.holds("abcd", &Digest::of(b"content")) && !spool.holds("abce", &Digest::of(b"content")));
        assert!(store.verify_records().unwrap().is_empty() && store.verify_house().unwrap().is_empty());

        store.publisher().replace(&spool.path("abcd"), b"contend").unwrap();
        assert!(!spool.holds("abcd", &Digest::of(b"content")));
        spool.put("abcd", b"content").unwrap();
        assert!(spool.holds("abcd", &Digest::of(b"content")));

        let record = store.home().join(Spool::place("http://a/b"));
        let flipped = fs::read_to_string(&record).unwrap().replace('7', "8");
        store.publisher().replace(&record, flipped.as_bytes()).unwrap();
        assert!(spool.record::<u32>("http://a/b").is_err());
        spool.forget("http://a/b").unwrap();
        assert_eq!(spool.record::<u32>("http://a/b").unwrap(), None);
        spool.clear().unwrap();
        assert!(!spool.holds("abcd", &Digest::of(b"content")) && spool.own_bytes() == 0);
    }
}
