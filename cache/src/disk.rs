//! The file-system calls that the store uses, as a trait, so that tests can simulate crashes and errors.
//!
//! [`OsDisk`] is the operating system's file system. `simulation.rs` has one in memory, which gives every state that a power
//! cut may leave on a disk, and which can let any call fail.
#![expect(clippy::disallowed_methods, reason = "this is the module that creates, renames and removes")]

use std::{
    fmt::Debug,
    fs::{self, File},
    io::{self, Write},
    path::Path,
    process,
    sync::atomic::{AtomicI64, Ordering},
};

use crate::inputs::read_file;

/// A file system.
pub(crate) trait Disk: Debug + Send + Sync {
    /// Creates one folder, whose parent exists.
    fn create_dir(&self, folder: &Path) -> io::Result<()>;
    /// Creates a file; fails if it exists.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file for appending; creates it if it is missing.
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Reads a whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The kind of the entry at a path, and a file's size; fails with `NotFound` if there is none.
    fn look(&self, path: &Path) -> io::Result<Found>;
    /// The entries of a folder in ascending order: name, and whether it is a folder.
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, bool)>>;
    /// Renames a file or folder; an existing file is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name. A disk may refuse it.
    fn hard_link(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, folder: &Path) -> io::Result<()>;
    /// Fsyncs a folder, so that its entries survive a power cut.
    fn sync_dir(&self, folder: &Path) -> io::Result<()>;
}

/// An open file of a [`Disk`].
pub(crate) trait DiskFile: Write + Debug + Send + Sync {
    /// Fsyncs the file, so that all bytes written survive a power cut.
    fn sync(&mut self) -> io::Result<()>;
}

/// The kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// A file, with its size in bytes.
    File(u64),
    /// A folder.
    Folder,
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OsDisk;

/// Changes of the disk until the process aborts. Negative: it never does.
static CRASH_IN: AtomicI64 = AtomicI64::new(-1);

/// Aborts the process, as `kill -9` would, just before the `step`-th change of the disk from now on (0: the next one). For
/// tests of crash safety.
pub fn crash_at(step: u32) {
    CRASH_IN.store(i64::from(step), Ordering::SeqCst);
}

fn fault_point() {
    if CRASH_IN.load(Ordering::Relaxed) >= 0 && CRASH_IN.fetch_sub(1, Ordering::SeqCst) == 0 {
        process::abort();
    }
}

impl Disk for OsDisk {
    fn create_dir(&self, folder: &Path) -> io::Result<()> {
        fault_point();
        fs::create_dir(folder)
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        fault_point();
        Ok(Box::new(File::create_new(path)?))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(File::options().create(true).append(true).open(path)?))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        read_file(path)
    }

    fn look(&self, path: &Path) -> io::Result<Found> {
        let metadata = fs::metadata(path)?;
        Ok(if metadata.is_dir() { Found::Folder } else { Found::File(metadata.len()) })
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, bool)>> {
        let entry = |entry: io::Result<fs::DirEntry>| {
            let entry = entry?;
            Ok((entry.file_name().to_string_lossy().into_owned(), entry.file_type()?.is_dir()))
        };
        let mut entries = fs::read_dir(folder)?.map(entry).collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        Ok(entries)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fault_point();
        fs::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fault_point();
        fs::hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fault_point();
        fs::remove_file(path)
    }

    fn remove_dir(&self, folder: &Path) -> io::Result<()> {
        fault_point();
        fs::remove_dir(folder)
    }

    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        fault_point();
        File::open(folder)?.sync_all()
    }
}

impl DiskFile for File {
    fn sync(&mut self) -> io::Result<()> {
        fault_point();
        self.sync_all()
    }
}
