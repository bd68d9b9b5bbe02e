//! Errors of checkpoints and of the inputs of networks.

use std::{fmt, io, path::PathBuf};

use tch::Tensor;

use crate::Result;

/// Why weights cannot be loaded or a network cannot run.
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
    /// The file exists, but has another format than its name says, or is damaged.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The place in the file, what was expected, and what was found.
        problem: String,
        /// The next step for the user.
        hint: Option<String>,
    },
    /// Tensors of a checkpoint that do not fit the network.
    #[error("{}: {} tensors do not fit the network: {}", path.display(), problems.len(), join(problems))]
    Misfits {
        /// The file.
        path: PathBuf,
        /// All tensors that do not fit, by name.
        problems: Vec<Misfit>,
    },
    /// An input that a network does not accept.
    #[error("{what}: expected {expected}, found {found}")]
    Input {
        /// The argument or field.
        what: &'static str,
        /// Kind, shape, range.
        expected: String,
        /// The same properties of the input.
        found: String,
    },
    /// Libtorch refused; shapes are checked before it is asked, so this is memory or a device.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// A tensor that is missing, unexpected, or of another shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// The tensor's name.
    pub name: String,
    /// The shape that the network needs, -1 where any size will do; none if it needs no such tensor.
    pub expected: Option<Vec<i64>>,
    /// The shape that the checkpoint has; none if it has no such tensor.
    pub found: Option<Vec<i64>>,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = |shape: &Option<Vec<i64>>| shape.as_ref().map_or_else(|| "nothing".to_owned(), |shape| format!("{shape:?}"));
        write!(f, "{}: expected {}, found {}", self.name, shape(&self.expected), shape(&self.found))
    }
}

fn join(problems: &[Misfit]) -> String {
    problems.iter().map(Misfit::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// The next step for the user, as an imperative.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("check the path, or download the checkpoint first".into())
            }
            Self::Read { .. } | Self::Torch(_) | Self::Input { .. } => None,
            Self::Misfits { problems, .. } if problems.iter().all(|problem| problem.expected.is_none()) => Some(
                "the weights have parts that the network has not, and results may depend on them: if they do not, save the weights without them"
                    .into(),
            ),
            Self::Misfits { .. } => Some("check that the checkpoint has a known layout, and that it is the right one".into()),
            Self::Malformed { hint, .. } => hint.clone(),
        }
    }
}

pub(crate) fn check_sizes(sizes: impl IntoIterator<Item = (&'static str, i64)>) -> Result<()> {
    match sizes.into_iter().find(|&(_, size)| size < 1) {
        Some((what, found)) => Err(Error::Input { what, expected: "at least 1".into(), found: found.to_string() }),
        None => Ok(()),
    }
}

/// Refuses a list that has not an entry for each image.
pub(crate) fn check_count(what: &'static str, expected: i64, found: usize) -> Result<()> {
    if found as i64 == expected {
        return Ok(());
    }
    Err(Error::Input { what, expected: format!("{expected}, one for each image"), found: found.to_string() })
}

/// Refuses a tensor that is not as a function needs it.
pub(crate) fn ensure(is_fine: bool, what: &'static str, expected: &str, found: &Tensor) -> Result<()> {
    if is_fine {
        return Ok(());
    }
    Err(Error::Input { what, expected: expected.to_owned(), found: format!("{:?} {:?}", found.kind(), found.size()) })
}
