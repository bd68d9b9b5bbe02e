//! What can be wrong with a pipeline.

use std::fmt;

/// Something wrong with a pipeline, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Where: `stages.objects.with.expand`.
    pub(crate) path: String,
    /// The line in the file, from 1, where it has one.
    pub(crate) line: Option<usize>,
    pub(crate) fault: Fault,
    /// Which variants or seeds have this problem, where not all have it: ` (with the seed 8)`.
    pub(crate) only_with: String,
}

impl Problem {
    /// Whether the pipeline is right and a file that it names does not exist.
    pub(crate) fn is_missing_file(&self) -> bool {
        matches!(self.fault, Fault::NoFile(_))
    }

    /// Whether it is something that was typed, such as `--set seed`, and not in the file.
    pub(crate) fn is_of_command_line(&self) -> bool {
        self.path.starts_with("--")
    }
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The pipeline is right, and a file or folder that it names does not exist.
    NoFile(String),
    /// The pipeline is wrong: the text gives what was expected and what was found.
    Wrong(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFile(path) => write!(f, "no file or folder `{path}`"),
            Self::Wrong(problem) => f.write_str(problem),
        }
    }
}

impl From<String> for Fault {
    fn from(problem: String) -> Self {
        Self::Wrong(problem)
    }
}

impl From<&str> for Fault {
    fn from(problem: &str) -> Self {
        Self::Wrong(problem.into())
    }
}

impl fmt::Display for Problem {
    /// One line: `line 7: stages.objects.with.expand: expected ...`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, fault, only_with } = self;
        let line = line.map_or_else(String::new, |line| format!("line {line}: "));
        write!(f, "{line}{path}: {fault}{only_with}")
    }
}
