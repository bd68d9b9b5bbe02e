//! The only code that creates, renames or removes files.
//!
//! Two shapes of publishing: [`Draft`], a folder that appears whole or not at all, and [`replace`], one file likewise.
//! Both write under a temporary name in the target's own folder, fsync every file, rename, and fsync the folder. A reader
//! never sees half a file; a crash at any instruction leaves at most a folder whose name begins with [`TEMPORARY`], which
//! [`sweep`] removes at the start of the next run. [`Journal`] is the one append-only file (event logs); its last line may
//! be torn, and its readers know.
//!
//! An fsync that failed is never tried again on the same file: the kernel may have dropped the pages. The draft is lost and
//! the unit is made again.
#![expect(clippy::disallowed_methods, reason = "this is the module that creates, renames and removes")]

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, Result};

/// How the name of everything unfinished begins.
pub const TEMPORARY: &str = ".tmp-";

/// Counts down at every step of publishing; the process aborts when it reaches zero. Negative: never.
static CRASH_IN: AtomicI64 = AtomicI64::new(-1);

/// Lets the process die, as by `kill -9`, at the `step`-th step of publishing from here on (0: the next one). For tests of
/// crash safety.
pub fn crash_at(step: u32) {
    CRASH_IN.store(i64::from(step), Ordering::SeqCst);
}

fn fault_point() {
    if CRASH_IN.load(Ordering::Relaxed) >= 0 && CRASH_IN.fetch_sub(1, Ordering::SeqCst) == 0 {
        process::abort();
    }
}

/// One published file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Path inside the unit's folder: `port/name`.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of every byte, for integrity.
    pub digest: Digest,
    /// BLAKE3 of what the file means to a reader, where that leaves out bytes that say who wrote it (a shard carries the
    /// fingerprint of its unit). `None`: the same as `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
}

impl FileRecord {
    /// The digest by which readers downstream know this file.
    pub fn content(&self) -> Digest {
        self.content.unwrap_or(self.digest)
    }
}

/// A folder in the making. Dropping it aborts: nothing of it stays.
#[derive(Debug)]
pub struct Draft {
    folder: PathBuf,
    target: PathBuf,
    /// Filled by `DraftFile::finish`, possibly from several threads; held for the push alone.
    files: Mutex<Vec<FileRecord>>,
    is_committed: bool,
}

impl Draft {
    /// Opens a draft that will appear at `target`.
    pub fn begin(target: &Path) -> Result<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let (parent, name) = parent_and_name(target);
        create_dir_all(parent)?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("{TEMPORARY}{name}-{}-{serial}", process::id()));
        fs::create_dir(&folder).map_err(|source| Error::write(&folder, source))?;
        Ok(Self { folder, target: target.to_owned(), files: Mutex::new(Vec::new()), is_committed: false })
    }

    /// Opens a file of the draft, `name` being its path inside the folder. May be called from several threads.
    pub fn create(&self, name: &str) -> Result<DraftFile<'_>> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            create_dir_all(parent)?;
        }
        let file = File::create_new(&path).map_err(|source| Error::write(&path, source))?;
        let writer = BufWriter::with_capacity(1 << 18, file);
        Ok(DraftFile { draft: self, name: name.into(), path, writer, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Writes a whole file of the draft.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|source| Error::write(&file.path, source))?;
        file.finish()
    }

    /// The files finished so far, sorted by name.
    pub fn files(&self) -> Vec<FileRecord> {
        let mut files = self.files.lock().expect("BUG: a thread panicked while it added a file").clone();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// Publishes the folder with one more file, the record that describes it.
    ///
    /// If the target is there already (another process made the same thing), this draft is dropped and the target stays.
    pub fn commit(mut self, record_name: &str, record: &[u8]) -> Result<()> {
        write_synced(&self.folder.join(record_name), record)?;
        sync_tree(&self.folder)?;
        fault_point();
        match fs::rename(&self.folder, &self.target) {
            Ok(()) => self.is_committed = true,
            Err(_) if self.target.join(record_name).exists() => return Ok(()),
            Err(source) => return Err(Error::write(&self.target, source)),
        }
        fault_point();
        sync_folder(parent_and_name(&self.target).0)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_committed {
            // What cannot be removed here is swept at the start of the next run.
            let _swept_later = fs::remove_dir_all(&self.folder);
        }
    }
}

/// A file of a [`Draft`], hashed as it is written. Dropping it without [`DraftFile::finish`] leaves it out of the record.
#[derive(Debug)]
pub struct DraftFile<'a> {
    draft: &'a Draft,
    name: String,
    path: PathBuf,
    writer: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl DraftFile<'_> {
    /// Where the file lies for now, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes, fsyncs, and records the file.
    pub fn finish(self) -> Result<()> {
        self.finish_with(None)
    }

    /// As [`Self::finish`], for a file whose meaning is less than its bytes.
    pub fn finish_with(self, content: Option<Digest>) -> Result<()> {
        let Self { draft, name, path, writer, hasher, bytes } = self;
        fault_point();
        let file = writer.into_inner().map_err(|error| Error::write(&path, error.into_error()))?;
        file.sync_all().map_err(|source| Error::write(&path, source))?;
        let record = FileRecord { name, bytes, digest: hasher.finalize().into(), content };
        draft.files.lock().expect("BUG: a thread panicked while it added a file").push(record);
        Ok(())
    }
}

impl Write for DraftFile<'_> {
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

/// Writes one file whole, replacing what was there.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let (parent, name) = parent_and_name(path);
    create_dir_all(parent)?;
    let temporary = parent.join(format!("{TEMPORARY}{name}-{}", process::id()));
    let written = write_synced(&temporary, bytes).and_then(|()| {
        fault_point();
        fs::rename(&temporary, path).map_err(|source| Error::write(path, source))
    });
    if written.is_err() {
        let _swept_later = fs::remove_file(&temporary);
    }
    written?;
    fault_point();
    sync_folder(parent)
}

/// Moves something damaged out of the way, never deleting it. `place` is a folder of quarantined things.
pub fn quarantine(path: &Path, place: &Path) -> Result<PathBuf> {
    create_dir_all(place)?;
    let (parent, name) = parent_and_name(path);
    let mut target = place.join(&name);
    let mut serial = 1;
    while target.exists() {
        serial += 1;
        target = place.join(format!("{name}-{serial}"));
    }
    fault_point();
    fs::rename(path, &target).map_err(|source| Error::write(path, source))?;
    sync_folder(parent)?;
    Ok(target)
}

/// Removes what interrupted processes left unfinished below a folder; returns how many things that were.
///
/// The caller holds the home's lock: no one is writing.
pub fn sweep(folder: &Path) -> Result<usize> {
    let mut n_swept = 0;
    for entry in read_dir(folder)? {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|source| Error::write(&path, source))?;
            n_swept += 1;
        }
    }
    Ok(n_swept)
}

/// The entries of a folder sorted by name; none where there is no folder.
pub(crate) fn read_dir(folder: &Path) -> Result<Vec<fs::DirEntry>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::read(folder, source)),
    };
    let mut entries: Vec<_> = entries.collect::<io::Result<_>>().map_err(|source| Error::read(folder, source))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// Creates a folder and those above it.
pub fn create_dir_all(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))
}

/// An append-only file of lines. A line is written in one call, so that a crash tears at most the last one.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Creates the file, which must not be there.
    pub fn create(path: &Path) -> Result<Self> {
        create_dir_all(parent_and_name(path).0)?;
        let file = File::create_new(path).map_err(|source| Error::write(path, source))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends one line.
    pub fn append(&mut self, line: &str) -> Result<()> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(|source| Error::write(&self.path, source))
    }

    /// Makes everything appended so far survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::write(&self.path, source))
    }
}

/// Opens a file for locking, creating it where it is missing; its content is the holder's to replace.
pub(crate) fn open_lock(path: &Path) -> Result<File> {
    create_dir_all(parent_and_name(path).0)?;
    File::options().create(true).read(true).write(true).truncate(false).open(path).map_err(|source| Error::write(path, source))
}

fn parent_and_name(path: &Path) -> (&Path, String) {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    (parent, path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    fault_point();
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| Error::write(path, source))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| Error::write(folder, source))
}

/// Fsyncs a folder and the folders below it; their files have been fsynced one by one.
fn sync_tree(folder: &Path) -> Result<()> {
    for entry in read_dir(folder)? {
        if entry.path().is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let draft = Draft::begin(&home.path().join("unit")).unwrap();
        draft.write("features/a", b"half").unwrap();
        drop(draft);
        assert_eq!(read_dir(home.path()).unwrap().len(), 0);
    }

    #[test]
    fn a_committed_draft_appears_whole_and_its_records_say_what_it_holds() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("unit");
        let draft = Draft::begin(&target).unwrap();
        draft.write("features/b", b"bb").unwrap();
        draft.write("features/a", b"a").unwrap();
        let files = draft.files();
        assert!(!target.exists());
        draft.commit("unit.json", b"{}").unwrap();

        let names: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.bytes, file.digest)).collect();
        assert_eq!(names, [("features/a", 1, Digest::of(b"a")), ("features/b", 2, Digest::of(b"bb"))]);
        assert_eq!(fs::read(target.join("features/b")).unwrap(), b"bb");
        assert_eq!(fs::read(target.join("unit.json")).unwrap(), b"{}");
    }

    #[test]
    fn the_first_of_two_drafts_of_the_same_thing_stays() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("unit");
        let (first, second) = (Draft::begin(&target).unwrap(), Draft::begin(&target).unwrap());
        first.commit("unit.json", b"first").unwrap();
        second.commit("unit.json", b"second").unwrap();
        assert_eq!(fs::read(target.join("unit.json")).unwrap(), b"first");
        assert_eq!(read_dir(home.path()).unwrap().len(), 1);
    }

    #[test]
    fn what_a_crash_left_is_swept_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        std::mem::forget(Draft::begin(&home.path().join("lost")).unwrap());
        replace(&home.path().join("kept"), b"kept").unwrap();
        assert_eq!(sweep(home.path()).unwrap(), 1);
        assert_eq!(sweep(home.path()).unwrap(), 0);
        assert_eq!(fs::read(home.path().join("kept")).unwrap(), b"kept");
    }

    #[test]
    fn a_quarantined_thing_is_moved_not_deleted_even_twice() {
        let home = tempfile::tempdir().unwrap();
        let (thing, place) = (home.path().join("thing"), home.path().join("quarantine"));
        for content in [b"1", b"2"] {
            replace(&thing, content).unwrap();
            quarantine(&thing, &place).unwrap();
        }
        assert_eq!(fs::read(place.join("thing")).unwrap(), b"1");
        assert_eq!(fs::read(place.join("thing-2")).unwrap(), b"2");
    }
}
