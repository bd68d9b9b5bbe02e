//! Why something cannot be kept or cannot be trusted.

use std::{io, path::Path, path::PathBuf};

use crate::recipe::Digest;

/// Why something cannot be kept or cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused to write.
    #[error("{}: cannot write", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Bytes are not what was committed.
    #[error("{}: {what} does not match its digest: expected {expected}, found {found}", path.display())]
    Flipped {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// The committed digest.
        expected: Digest,
        /// The digest of what lies there.
        found: Digest,
    },
    /// A file that the user brings is not what it was when the run began.
    #[error("{}: changed after it was hashed: expected {expected}, found {found}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The digest that was taken.
        expected: Digest,
        /// The digest of what was read.
        found: Digest,
    },
    /// A file that the user brings was there when the run began.
    #[error("{}: is gone; it was there when the run began", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// The operator asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// Something that was made and makes no sense; it is not published.
    #[error("{what}: {problem}: not published")]
    Unsound {
        /// What was made.
        what: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// A file of ours cannot be understood.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
    },
    /// A file of ours has another format.
    #[error("{}: written by {} version (format {found}, this program reads {known})", path.display(), if found > known { "a newer" } else { "an older" })]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The format this program knows.
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

    /// The file that it is about.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::Flipped { path, .. }
            | Self::Changed { path, .. }
            | Self::Gone { path }
            | Self::Malformed { path, .. }
            | Self::OtherFormat { path, .. } => Some(path),
            Self::Unsound { .. } | Self::Stopped => None,
        }
    }

    /// What the operator can do next, as an imperative.
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
            Self::Changed { .. } => "leave the file alone while a run reads it, and type the same command again".into(),
            Self::Gone { .. } => "bring the file back, or leave it out of the annotations, and type the same command again".into(),
            Self::Stopped => "type the same command again to continue".into(),
            Self::Unsound { .. } => "look at what it was made from: the checkpoint, the learning rate, the images".into(),
            Self::Flipped { .. } | Self::Malformed { .. } => {
                "`ovenbird verify --full --fix` sets it aside and makes it again; so does `ovenbird run PIPELINE` where a step reads it"
                    .into()
            }
            Self::OtherFormat { found, known, .. } if found > known => {
                "update ovenbird, or choose another home with `--home FOLDER`".into()
            }
            Self::OtherFormat { .. } => "choose another home with `--home FOLDER`: what the older version made is made again there".into(),
        })
    }
}
