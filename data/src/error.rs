//! What can be wrong with the files a user brings, in words that name the file, the place in it, what was expected and
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
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed half-way.
    #[error("cannot write {what}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is there, but says something it may not.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file, what was expected, what was found.
        problem: String,
        /// What the operator can do about it.
        hint: Option<String>,
    },
}

impl Error {
    /// What the operator can do next, as an imperative.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Some("check the path, or make the file first".into()),
            Self::Read { .. } | Self::Write { .. } => None,
            Self::Malformed { hint, .. } => hint.clone(),
        }
    }
}
