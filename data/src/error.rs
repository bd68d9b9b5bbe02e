//! Errors of the user's files, in messages that name the file, the place in it, what was expected and
//! what was found.

use std::{io, path::PathBuf};

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Writing failed half-way.
    #[error("cannot write {what}")]
    Write {
        /// The file that was being written.
        what: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file exists, but its content is wrong.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The place in the file, what was expected, and what was found.
        problem: String,
        /// The next step for the user.
        hint: Option<String>,
    },
}

impl Error {
    /// The next step for the user, as an imperative.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Some("check the path, or make the file first".into()),
            Self::Read { .. } | Self::Write { .. } => None,
            Self::Malformed { hint, .. } => hint.clone(),
        }
    }
}
