//! Atomic writes: every file and folder of a home is published by this module.
//!
//! [`Draft`] publishes a folder and [`Publisher::replace`] a single file; each appears whole or not at all. Both write under a
//! temporary name in the target's parent folder, fsync every file, rename, and fsync the parent. A reader never sees half a
//! file. A crash leaves only entries whose names begin with [`TEMPORARY`] and contain the writing process;
//! [`Publisher::sweep`] removes them once that process is dead. Append-only files are in `journal.rs`.
//!
//! An fsync that failed is never retried on the same file: the kernel may have dropped the pages. The draft is discarded and
//! the unit recomputed.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Error, Result,
    disk::{Disk, DiskFile, Found, OsDisk},
    lease::Owner,
};

/// The prefix of the names of unfinished files and folders.
pub const TEMPORARY: &str = ".tmp-";

/// One published file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Path inside the unit's folder: `port/name`.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of all bytes, to find damage.
    pub digest: Digest,
    /// BLAKE3 of the content that downstream recipes depend on, if some bytes do not belong to it (a shard contains the
    /// fingerprint of its unit). `None`: the same as `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
}

impl FileRecord {
    /// The digest that goes into the recipes of downstream stages.
    pub fn content(&self) -> Digest {
        self.content.unwrap_or(self.digest)
    }
}

/// Writes a file atomically, replacing an existing one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    Publisher::default().replace(path, bytes)
}

/// Writes to a disk in the name of a process.
#[derive(Debug, Clone)]
pub struct Publisher {
    disk: Arc<dyn Disk>,
    owner: Owner,
}

/// Writes to the operating system's file system in the name of this process.
impl Default for Publisher {
    fn default() -> Self {
        Self { disk: Arc::new(OsDisk), owner: Owner::me().clone() }
    }
}

impl Publisher {
    /// Uses another disk and another process, for simulations.
    #[cfg(test)]
    pub(crate) fn new(disk: Arc<dyn Disk>, owner: Owner) -> Self {
        Self { disk, owner }
    }

    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Opens a draft of the folder `target`.
    pub fn begin(&self, target: &Path) -> Result<Draft> {
        let (parent, name) = parent_and_name(target);
        self.create_dir_all(parent)?;
        let folder = parent.join(self.temporary(&name));
        self.disk.create_dir(&folder).map_err(|source| Error::write(&folder, source))?;
        Ok(Draft {
            publisher: self.clone(),
            folder,
            target: target.to_owned(),
            replaces: false,
            files: Arc::default(),
            is_committed: false,
        })
    }

    /// Writes a file atomically, replacing an existing one.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.place(path, bytes)?;
        self.sync_dir(parent_and_name(path).0)
    }

    /// As [`Self::replace`], but for what can be fetched again: after a power cut the file of the last seconds may be the one before, or none.
    pub(crate) fn place(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let (parent, name) = parent_and_name(path);
        self.create_dir_all(parent)?;
        let temporary = parent.join(self.temporary(&name));
        let written = self
            .write_synced(&temporary, bytes)
            .and_then(|()| self.disk.rename(&temporary, path).map_err(|source| Error::write(path, source)));
        if written.is_err() {
            let _swept_later = self.disk.remove_file(&temporary);
        }
        written
    }

    /// Moves a file or folder into the folder `place`, under a free name, and returns its new path; `None` if it does not exist.
    pub fn set_aside(&self, path: &Path, place: &Path) -> Result<Option<PathBuf>> {
        self.create_dir_all(place)?;
        let (parent, name) = parent_and_name(path);
        let mut target = place.join(&name);
        let mut serial = 1;
        while self.disk.look(&target).is_ok() {
            serial += 1;
            target = place.join(format!("{name}-{serial}"));
        }
        match self.disk.rename(path, &target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::write(path, source)),
        }
        // The new folder first: after a power cut in between, the entry may be in both folders, but never in neither.
        self.sync_dir(place)?;
        self.sync_dir(parent)?;
        Ok(Some(target))
    }

    /// Removes a file, or a folder with its content. It is renamed to a temporary name first, so that no reader sees half of
    /// the folder and [`Self::sweep`] removes the rest after a crash.
    pub fn remove(&self, path: &Path) -> Result<()> {
        let (parent, name) = parent_and_name(path);
        let temporary = parent.join(self.temporary(&name));
        match self.disk.rename(path, &temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::write(path, source)),
        }
        self.sync_dir(parent)?;
        self.remove_tree(&temporary).map_err(|source| Error::write(&temporary, source))
    }

    /// Removes the unfinished entries of a folder whose writing process `is_over`; returns their number.
    pub fn sweep(&self, folder: &Path, is_over: &dyn Fn(&Owner) -> bool) -> Result<usize> {
        let mut n_swept = 0;
        for (name, _) in self.list(folder)? {
            let Some(rest) = name.strip_prefix(TEMPORARY) else { continue };
            // Names without an owner were written by an earlier version.
            let owner = rest.rsplit('-').nth(1).and_then(|owner| owner.parse::<Owner>().ok());
            if owner.is_none_or(|owner| is_over(&owner)) {
                let path = folder.join(&name);
                match self.remove_tree(&path) {
                    Ok(()) => n_swept += 1,
                    // Another process removed it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(source) => return Err(Error::write(&path, source)),
                }
            }
        }
        Ok(n_swept)
    }

    /// The entries of a folder in ascending order: name, and whether it is a folder. Empty if the folder is missing or is a file.
    pub(crate) fn list(&self, folder: &Path) -> Result<Vec<(String, bool)>> {
        match self.disk.list(folder) {
            Ok(entries) => Ok(entries),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
            Err(source) => Err(Error::read(folder, source)),
        }
    }

    /// Creates a folder and its missing parents, and fsyncs each.
    pub fn create_dir_all(&self, folder: &Path) -> Result<()> {
        match self.disk.look(folder) {
            Ok(Found::Folder) => return Ok(()),
            Ok(Found::File(_)) => return Err(Error::write(folder, io::ErrorKind::NotADirectory.into())),
            Err(_) => {}
        }
        let (parent, _) = parent_and_name(folder);
        if parent != folder {
            self.create_dir_all(parent)?;
        }
        match self.disk.create_dir(folder) {
            Ok(()) => {}
            // Another process created it, and may not have fsynced it yet.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::write(folder, source)),
        }
        self.sync_dir(parent)
    }

    fn temporary(&self, name: &str) -> String {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        format!("{TEMPORARY}{name}-{}-{}", self.owner, SERIAL.fetch_add(1, Ordering::Relaxed))
    }

    fn write_synced(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = self.disk.create_new(path)?;
            file.write_all(bytes)?;
            file.sync()
        };
        write().map_err(|source| Error::write(path, source))
    }

    pub(crate) fn sync_dir(&self, folder: &Path) -> Result<()> {
        self.disk.sync_dir(folder).map_err(|source| Error::write(folder, source))
    }

    /// Fsyncs a folder and its subfolders; their files are fsynced already.
    fn sync_tree(&self, folder: &Path) -> Result<()> {
        for (name, is_folder) in self.list(folder)? {
            if is_folder {
                self.sync_tree(&folder.join(name))?;
            }
        }
        self.sync_dir(folder)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        if self.disk.look(path)? != Found::Folder {
            return self.disk.remove_file(path);
        }
        for (name, _) in self.disk.list(path)? {
            self.remove_tree(&path.join(name))?;
        }
        self.disk.remove_dir(path)
    }
}

/// A folder that is being written. Dropping it before [`Draft::commit`] deletes it.
#[derive(Debug)]
pub struct Draft {
    publisher: Publisher,
    folder: PathBuf,
    target: PathBuf,
    replaces: bool,
    /// `DraftFile::finish` appends to it, possibly from several threads; the lock is held only for that.
    files: Arc<Mutex<Vec<FileRecord>>>,
    is_committed: bool,
}

impl Draft {
    /// Creates a file of the draft; `name` is its path inside the folder. May be called from several threads.
    pub fn create(&self, name: &str) -> Result<DraftFile> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            self.publisher.create_dir_all(parent)?;
        }
        let file = self.publisher.disk.create_new(&path).map_err(|source| Error::write(&path, source))?;
        let writer = BufWriter::with_capacity(1 << 18, file);
        Ok(DraftFile { files: Arc::clone(&self.files), name: name.into(), path, writer, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Writes a file of the draft.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|source| Error::write(&file.path, source))?;
        file.finish()
    }

    /// Adds a file that is on this disk already, fsynced, with this content: by a hard link, or as a copy where the disk refuses links.
    pub fn link(&self, name: &str, source: &Path, digest: Digest) -> Result<()> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            self.publisher.create_dir_all(parent)?;
        }
        let disk = self.publisher.disk();
        if disk.hard_link(source, &path).is_ok()
            && let Ok(Found::File(bytes)) = disk.look(&path)
        {
            let record = FileRecord { name: name.into(), bytes, digest, content: None };
            self.files.lock().expect("BUG: a thread panicked while it added a file").push(record);
            return Ok(());
        }
        let bytes = disk.read(source).map_err(|error| Error::read(source, error))?;
        self.write(name, &bytes)
    }

    /// The files finished so far, sorted by name.
    pub fn files(&self) -> Vec<FileRecord> {
        let mut files = self.files.lock().expect("BUG: a thread panicked while it added a file").clone();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// The same draft, to be published as another folder of the same disk, in place of what is there.
    pub(crate) fn over(mut self, target: &Path) -> Result<Self> {
        self.publisher.create_dir_all(parent_and_name(target).0)?;
        (self.target, self.replaces) = (target.to_owned(), true);
        Ok(self)
    }

    /// Adds the record that describes the folder, and publishes the folder.
    ///
    /// Returns false if another process published the same target; this draft is then deleted and the target stays.
    pub fn commit(mut self, record_name: &str, record: &[u8]) -> Result<bool> {
        let publisher = self.publisher.clone();
        publisher.write_synced(&self.folder.join(record_name), record)?;
        publisher.sync_tree(&self.folder)?;
        // Not before the draft is complete: the disk may be full.
        if self.replaces {
            publisher.remove(&self.target)?;
        }
        match publisher.disk.rename(&self.folder, &self.target) {
            Ok(()) => self.is_committed = true,
            Err(_) if publisher.disk.look(&self.target.join(record_name)).is_ok() => return Ok(false),
            Err(source) => return Err(Error::write(&self.target, source)),
        }
        publisher.sync_dir(parent_and_name(&self.target).0)?;
        Ok(true)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_committed {
            // If this fails, a later run sweeps it.
            let _swept_later = self.publisher.remove_tree(&self.folder);
        }
    }
}

/// A file of a [`Draft`], hashed while it is written. If it is dropped without [`DraftFile::finish`], the record does not list it.
#[derive(Debug)]
pub struct DraftFile {
    /// The list of its draft.
    files: Arc<Mutex<Vec<FileRecord>>>,
    name: String,
    path: PathBuf,
    writer: BufWriter<Box<dyn DiskFile>>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl DraftFile {
    /// The temporary path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes and fsyncs the file, and adds it to the draft's record.
    pub fn finish(self) -> Result<()> {
        self.finish_with(None)
    }

    /// As [`Self::finish`]; `content` is the digest for downstream recipes (see [`FileRecord::content`]).
    pub fn finish_with(self, content: Option<Digest>) -> Result<()> {
        let Self { files, name, path, writer, hasher, bytes } = self;
        let mut file = writer.into_inner().map_err(|error| Error::write(&path, error.into_error()))?;
        file.sync().map_err(|source| Error::write(&path, source))?;
        let record = FileRecord { name, bytes, digest: hasher.finalize().into(), content };
        files.lock().expect("BUG: a thread panicked while it added a file").push(record);
        Ok(())
    }
}

impl Write for DraftFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n_written = self.writer.write(bytes)?;
        self.hasher.update(&bytes[..n_written]);
        self.bytes += n_written as u64;
        Ok(n_written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

pub(crate) fn parent_and_name(path: &Path) -> (&Path, String) {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    (parent, path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn begin(target: &Path) -> Draft {
        Publisher::default().begin(target).unwrap()
    }

    fn n_entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let draft = begin(&home.path().join("unit"));
        draft.write("features/a", b"half").unwrap();
        drop(draft);
        assert_eq!(n_entries(home.path()), 0);
    }

    #[test]
    fn a_committed_draft_appears_whole_and_its_records_say_what_it_holds() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("unit");
        let draft = begin(&target);
        draft.write("features/b", b"bb").unwrap();
        draft.write("features/a", b"a").unwrap();
        let files = draft.files();
        assert!(!target.exists());
        assert!(draft.commit("unit.json", b"{}").unwrap());

        let names: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.bytes, file.digest)).collect();
        assert_eq!(names, [("features/a", 1, Digest::of(b"a")), ("features/b", 2, Digest::of(b"bb"))]);
        assert_eq!(fs::read(target.join("features/b")).unwrap(), b"bb");
        assert_eq!(fs::read(target.join("unit.json")).unwrap(), b"{}");
    }

    #[test]
    fn the_first_of_two_drafts_of_the_same_thing_stays() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("unit");
        let (first, second) = (begin(&target), begin(&target));
        assert!(first.commit("unit.json", b"first").unwrap());
        assert!(!second.commit("unit.json", b"second").unwrap());
        assert_eq!(fs::read(target.join("unit.json")).unwrap(), b"first");
        assert_eq!(n_entries(home.path()), 1);
    }

    #[test]
    fn unfinished_files_of_dead_processes_are_swept_and_those_of_running_ones_are_not() {
        let home = tempfile::tempdir().unwrap();
        let dead = Publisher::new(Arc::new(OsDisk), Owner::dead(1));
        std::mem::forget(dead.begin(&home.path().join("lost")).unwrap());
        let living = begin(&home.path().join("unit"));
        replace(&home.path().join("kept"), b"kept").unwrap();
        let sweep = || Publisher::default().sweep(home.path(), &Owner::is_dead).unwrap();
        assert_eq!((sweep(), sweep()), (1, 0));
        assert!(living.commit("unit.json", b"{}").unwrap());
        assert_eq!(fs::read(home.path().join("kept")).unwrap(), b"kept");
    }

    #[test]
    fn files_set_aside_are_moved_not_deleted_even_twice() {
        let home = tempfile::tempdir().unwrap();
        let (thing, place) = (home.path().join("thing"), home.path().join("quarantine"));
        for content in [b"1", b"2"] {
            replace(&thing, content).unwrap();
            assert!(Publisher::default().set_aside(&thing, &place).unwrap().is_some());
        }
        assert_eq!(Publisher::default().set_aside(&thing, &place).unwrap(), None);
        assert_eq!(fs::read(place.join("thing")).unwrap(), b"1");
        assert_eq!(fs::read(place.join("thing-2")).unwrap(), b"2");
    }

    #[test]
    fn a_removed_folder_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        replace(&home.path().join("unit/features/a"), b"a").unwrap();
        Publisher::default().remove(&home.path().join("unit")).unwrap();
        Publisher::default().remove(&home.path().join("unit")).unwrap();
        assert_eq!(n_entries(home.path()), 0);
    }
}
