//! What the store asks of a file system, and nothing more: the seam at which crashes and failures are simulated.
//!
//! [`OsDisk`] is the operating system's. Tests put a recorder in its place that can say what a disk may hold after a power
//! cut at any moment, and one that fails at every call in turn.
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
    /// Creates one folder, whose parent is there.
    fn create_dir(&self, folder: &Path) -> io::Result<()>;
    /// Creates a file that must not be there.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file for appending, creating it where it is missing.
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Reads a file whole.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// What lies at a path.
    fn look(&self, path: &Path) -> io::Result<Found>;
    /// Names in a folder, ascending, each with whether it is a folder.
    fn list(&self, folder: &Path) -> io::Result<Vec<(String, bool)>>;
    /// Renames a file or folder; a file replaces a file.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, folder: &Path) -> io::Result<()>;
    /// Makes the entries of a folder survive a power cut.
    fn sync_dir(&self, folder: &Path) -> io::Result<()>;
}

/// An open file of a [`Disk`].
pub(crate) trait DiskFile: Write + Debug + Send + Sync {
    /// Makes what was written survive a power cut.
    fn sync(&mut self) -> io::Result<()>;
}

/// What lies at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// A file of so many bytes.
    File(u64),
    /// A folder.
    Folder,
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OsDisk;

/// Counts down at every step that changes the disk; the process aborts when it reaches zero. Negative: never.
static CRASH_IN: AtomicI64 = AtomicI64::new(-1);

/// Lets the process die, as by `kill -9`, just before the `step`-th change of the disk from here on (0: the next one). For
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
