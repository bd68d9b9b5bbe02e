//! Why a stage ended without its result.

use std::path::Path;

/// Why a stage ended without its result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store.
    #[error(transparent)]
    Cache(#[from] ovenbird_cache::Error),
    /// A file the user brought.
    #[error(transparent)]
    Data(#[from] ovenbird_data::Error),
    /// A checkpoint or a network.
    #[error(transparent)]
    Models(#[from] ovenbird_models::Error),
    /// Inputs that do not fit each other or the parameters.
    #[error("{port}: {problem}")]
    Input {
        /// The port, or the parameter.
        port: &'static str,
        /// What was expected and what was found.
        problem: String,
        /// What the operator can do about it.
        hint: String,
    },
    /// More items failed than the stage's policy allows.
    #[error("{n_failed} of {n_items} items failed, more than max_failed_ratio {max_failed_ratio} allows; the last: {last}")]
    TooManyFailed {
        /// How many failed so far.
        n_failed: u64,
        /// How many there are.
        n_items: usize,
        /// How many were allowed, from 0 to 1.
        max_failed_ratio: f64,
        /// Why the last one failed.
        last: String,
    },
    /// The operator asked to stop; everything committed is kept.
    #[error("stopped on request")]
    Stopped,
}

impl Error {
    /// What the operator can do next, as an imperative.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Cache(error) => error.hint(),
            Self::Data(error) => error.hint(),
            Self::Models(error) => error.hint(),
            Self::Input { hint, .. } => Some(hint.clone()),
            Self::TooManyFailed { .. } => Some("repair the files, or raise `max_failed_ratio` of the stage".into()),
            Self::Stopped => Some("type the same command again to continue".into()),
        }
    }

    /// The same about another port, where it is about one.
    #[must_use]
    pub(crate) fn at_port(self, port: &'static str) -> Self {
        match self {
            Self::Input { problem, hint, .. } => Self::Input { port, problem, hint },
            other => other,
        }
    }

    /// The file that the error is about, if any.
    pub fn file(&self) -> Option<&Path> {
        use ovenbird_data::Error as Data;
        use ovenbird_models::Error as Models;
        match self {
            Self::Cache(error) => error.file(),
            Self::Data(Data::Read { path, .. } | Data::Malformed { path, .. })
            | Self::Models(Models::Read { path, .. } | Models::Malformed { path, .. } | Models::Misfits { path, .. }) => Some(path),
            Self::Data(Data::Write { .. }) | Self::Models(_) | Self::Input { .. } | Self::TooManyFailed { .. } | Self::Stopped => None,
        }
    }

    /// Whether the disk was full.
    pub fn is_disk_full(&self) -> bool {
        use std::io::ErrorKind as Kind;
        let (Self::Cache(ovenbird_cache::Error::Write { source, .. }) | Self::Data(ovenbird_data::Error::Write { source, .. })) = self
        else {
            return false;
        };
        matches!(source.kind(), Kind::StorageFull | Kind::QuotaExceeded)
    }

    /// Whether the failure may be transient, so that a retry may succeed.
    pub(crate) fn is_transient(&self) -> bool {
        let (Self::Data(ovenbird_data::Error::Read { source, .. })
        | Self::Cache(ovenbird_cache::Error::Read { source, .. })
        | Self::Models(ovenbird_models::Error::Read { source, .. })) = self
        else {
            return false;
        };
        use std::io::ErrorKind as Kind;
        !matches!(
            source.kind(),
            Kind::NotFound | Kind::PermissionDenied | Kind::IsADirectory | Kind::NotADirectory | Kind::InvalidData | Kind::InvalidInput
        )
    }

    /// The user's file that changed since the run began, if that is the error.
    pub fn changed_file(&self) -> Option<&Path> {
        match self {
            Self::Cache(ovenbird_cache::Error::Changed { path, .. } | ovenbird_cache::Error::Gone { path }) => Some(path),
            _ => None,
        }
    }

    /// The file that is damaged, if that is the error.
    pub fn damaged_file(&self) -> Option<&Path> {
        match self {
            Self::Cache(ovenbird_cache::Error::Flipped { path, .. } | ovenbird_cache::Error::Malformed { path, .. })
            | Self::Data(ovenbird_data::Error::Malformed { path, .. })
            | Self::Models(ovenbird_models::Error::Malformed { path, .. }) => Some(path),
            Self::Cache(_) | Self::Data(_) | Self::Models(_) | Self::Input { .. } | Self::TooManyFailed { .. } | Self::Stopped => None,
        }
    }
}

/// The error of a file whose content is not as expected.
pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Error {
    Error::Cache(ovenbird_cache::Error::Malformed { path: path.to_owned(), problem: problem.into() })
}

/// An IO error of a file being written into a draft, in the store's words.
pub(crate) fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::Cache(ovenbird_cache::Error::Write { path: path.to_owned(), source })
}
