//! The crate's error type.

use std::{io, path::Path, path::PathBuf};

use crate::recipe::Digest;

/// Why a file cannot be read, written or trusted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system could not read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The operating system could not write.
    #[error("{}: cannot write", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A published file has other bytes than when it was published.
    #[error("{}: {what} does not match its digest: expected {expected}, found {found}", path.display())]
    Flipped {
        /// The file.
        path: PathBuf,
        /// The part of the file: `content`, `batch 3`, `the footer`.
        what: String,
        /// The published digest.
        expected: Digest,
        /// The digest of the bytes on disk.
        found: Digest,
    },
    /// A file of the user changed after the run began.
    #[error("{}: changed after it was hashed: expected {expected}, found {found}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The digest when the run began.
        expected: Digest,
        /// The digest of the bytes now.
        found: Digest,
    },
    /// A file of the user was deleted after the run began.
    #[error("{}: no longer exists; it was there when the run began", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// The operator asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// A new result with invalid values, such as NaN; it is not published.
    #[error("{what}: {problem}: not published")]
    Unsound {
        /// The result, in words.
        what: String,
        /// The expected and the found values.
        problem: String,
    },
    /// A file of the home cannot be parsed.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected and the found content.
        problem: String,
    },
    /// A folder with other files should become a home.
    #[error("{}: is no home of ovenbird: it has `{found}` and no `format.json`", path.display())]
    NotAHome {
        /// The folder.
        path: PathBuf,
        /// A file or folder in it.
        found: String,
    },
    /// A file of the home has another format version.
    #[error("{}: written by {} version (format {found}, this program reads {known})", path.display(), if found > known { "a newer" } else { "an older" })]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// The file's format.
        found: u32,
        /// The format that this program reads.
        known: u32,
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), problem: problem.into() }
    }

    /// The file or folder that the error is about.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::Flipped { path, .. }
            | Self::Changed { path, .. }
            | Self::Gone { path }
            | Self::Malformed { path, .. }
            | Self::NotAHome { path, .. }
            | Self::OtherFormat { path, .. } => Some(path),
            Self::Unsound { .. } | Self::Stopped => None,
        }
    }

    /// The next thing to do, as an imperative.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => "check the path".into(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::InvalidInput => "name a regular file, or a link to one".into(),
            Self::Read { .. } => "check the permissions of the file".into(),
            Self::Write { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "free some space and type the same command again; everything committed so far is kept".into()
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory => {
                    "make it a folder that can be written, or choose another with `--home FOLDER`".into()
                }
                _ => "type the same command again; everything committed so far is kept".into(),
            },
            Self::Changed { .. } => "do not change the file while a run reads it, and type the same command again".into(),
            Self::Gone { .. } => "restore the file, or remove it from the annotations, and type the same command again".into(),
            Self::Stopped => "type the same command again to continue".into(),
            Self::Unsound { .. } => "check the inputs: the checkpoint, the learning rate, the images".into(),
            Self::Flipped { .. } | Self::Malformed { .. } => {
                "`ovenbird verify --full --fix` moves it to `quarantine/` and recomputes it; `ovenbird run PIPELINE` does so if a step reads it"
                    .into()
            }
            Self::NotAHome { .. } => "choose a new or empty folder with `--home FOLDER`".into(),
            Self::OtherFormat { found, known, .. } if found > known => {
                "update ovenbird, or choose another home with `--home FOLDER`".into()
            }
            Self::OtherFormat { .. } => "choose another home with `--home FOLDER`; results of the older version are recomputed there".into(),
        })
    }
}
