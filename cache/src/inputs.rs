//! Content digests of the files a user brings.
//!
//! A file is hashed once and remembered by device, inode, size, mtime and ctime. As in git, an entry recorded within
//! [`RACY_NS`] of the file's own mtime is not trusted: the file may have changed again within the clock's grain.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, Ledger, Result};

/// How long after its last change a file must have been hashed for the digest to be remembered, in ns.
const RACY_NS: i128 = 2_000_000_000;

/// One file of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// Path below the input's folder, with `/`; the file's own name for a single file.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub digest: Digest,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stat {
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i128,
    ctime_ns: i128,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    stat: Stat,
    digest: Digest,
}

/// Digests of a file, or of every file below a folder in ascending order of name; hidden files are left out.
///
/// `now_ns` is the time in ns since 1970, for the guard against racy timestamps. Without a ledger everything is hashed.
pub fn digest_path(path: &Path, ledger: Option<&Ledger>, now_ns: i128) -> Result<Vec<InputFile>> {
    let mut found = Vec::new();
    if path.is_dir() {
        walk(path, "", &mut found)?;
    } else {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        found.push((name, path.to_owned()));
    }
    let digests = digest_all(&found, ledger, now_ns)?;
    Ok(found.into_iter().zip(digests).map(|((name, path), (bytes, digest))| InputFile { name, path, bytes, digest }).collect())
}

fn walk(folder: &Path, prefix: &str, found: &mut Vec<(String, PathBuf)>) -> Result<()> {
    for entry in crate::publish::read_dir(folder)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let (name, path) = (format!("{prefix}{name}"), entry.path());
        if path.is_dir() {
            walk(&path, &format!("{name}/"), found)?;
        } else {
            found.push((name, path));
        }
    }
    Ok(())
}

fn digest_all(found: &[(String, PathBuf)], ledger: Option<&Ledger>, now_ns: i128) -> Result<Vec<(u64, Digest)>> {
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(found.len().max(1));
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut digests = Vec::new();
        loop {
            let file_idx = next.fetch_add(1, Ordering::Relaxed);
            let Some((_, path)) = found.get(file_idx) else { return Ok(digests) };
            digests.push((file_idx, digest_one(path, ledger, now_ns)?));
        }
    };
    let mut digests = thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(worker)).collect();
        let finished = workers.into_iter().map(|worker| worker.join().expect("BUG: hashing does not panic"));
        finished.collect::<Result<Vec<_>>>().map(|lists| lists.concat())
    })?;
    digests.sort_by_key(|(file_idx, _)| *file_idx);
    Ok(digests.into_iter().map(|(_, digest)| digest).collect())
}

fn digest_one(path: &Path, ledger: Option<&Ledger>, now_ns: i128) -> Result<(u64, Digest)> {
    let metadata = fs::metadata(path).map_err(|source| Error::read(path, source))?;
    let stat = Stat {
        dev: metadata.dev(),
        ino: metadata.ino(),
        size: metadata.size(),
        mtime_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        ctime_ns: i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec()),
    };
    let key = format!("stat:{}", path.canonicalize().map_err(|source| Error::read(path, source))?.display());
    if let Some(remembered) = ledger.and_then(|ledger| ledger.get::<Remembered>(&key))
        && remembered.stat == stat
    {
        return Ok((stat.size, remembered.digest));
    }
    let digest = digest_file(path)?;
    let size = stat.size;
    if let Some(ledger) = ledger
        && now_ns - stat.mtime_ns.max(stat.ctime_ns) > RACY_NS
    {
        ledger.put(&key, &Remembered { stat, digest });
    }
    Ok((size, digest))
}

/// The BLAKE3 of a file's content.
pub fn digest_file(path: &Path) -> Result<Digest> {
    let hash = || -> io::Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(hasher.finalize().into())
    };
    hash().map_err(|source| Error::read(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::replace;

    const LATER: i128 = 1 << 100;

    #[test]
    fn a_folder_lists_its_files_by_name_without_hidden_ones() {
        let home = tempfile::tempdir().unwrap();
        for name in ["b.jpg", "a/2.jpg", "a/1.jpg", ".hidden"] {
            replace(&home.path().join(name), name.as_bytes()).unwrap();
        }
        let files = digest_path(home.path(), None, LATER).unwrap();
        let names: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.digest)).collect();
        assert_eq!(names, ["a/1.jpg", "a/2.jpg", "b.jpg"].map(|name| (name, Digest::of(name.as_bytes()))));
    }

    #[test]
    fn a_remembered_digest_is_used_until_the_file_changes() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        let (ledger, _) = Ledger::open(&home.path().join("ledger"), &home.path().join("quarantine")).unwrap();
        replace(&path, b"one").unwrap();
        let first = digest_path(&path, Some(&ledger), LATER).unwrap()[0].digest;

        // Proof that the ledger is asked: it answers what it was told, not what the file holds.
        let key = format!("stat:{}", path.canonicalize().unwrap().display());
        let mut remembered: Remembered = ledger.get(&key).unwrap();
        remembered.digest = Digest::of(b"remembered");
        ledger.put(&key, &remembered);
        assert_eq!(digest_path(&path, Some(&ledger), LATER).unwrap()[0].digest, Digest::of(b"remembered"));

        replace(&path, b"two").unwrap();
        let second = digest_path(&path, Some(&ledger), LATER).unwrap()[0].digest;
        assert_eq!((first, second), (Digest::of(b"one"), Digest::of(b"two")));
    }

    #[test]
    fn a_file_changed_just_now_is_not_remembered() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        let (ledger, _) = Ledger::open(&home.path().join("ledger"), &home.path().join("quarantine")).unwrap();
        replace(&path, b"one").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        let now_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        digest_path(&path, Some(&ledger), now_ns).unwrap();
        assert!(ledger.get::<Remembered>(&format!("stat:{}", path.canonicalize().unwrap().display())).is_none());
    }
}
