//! Errors that end a command: each has one message (what, where), one hint (what to type next) and one exit code.
//!
//! Only this file renders errors and chooses exit codes.

use std::{
    error::Error as _,
    fmt::Write as _,
    path::{Path, PathBuf, absolute},
    time::Duration,
};

use ovenbird_cache::verify::Finding;

use crate::{
    output::count,
    pipeline::{
        problem::Problem,
        step_id::{StepId, labels},
    },
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The pipeline file is wrong, or files that it names are missing.
    #[error("{} in {origin}", count(problems.len(), "problem"))]
    Pipeline { origin: String, problems: Vec<Problem> },
    /// There is no pipeline with this name.
    #[error("no pipeline `{name}`")]
    UnknownPipeline { name: String, nearest: Option<String> },
    /// A command-line value that clap cannot check.
    #[error("{problem}")]
    Usage { problem: String, hint: String },
    /// There is no folder where the home should be.
    #[error("{}: there is no home here", home.display())]
    NoHome { home: PathBuf },
    /// Some stages failed; each was reported when it failed.
    #[error("{} failed: {}", count(failed.len(), "step"), listed(failed))]
    StagesFailed { failed: Vec<StepId>, skipped: Vec<StepId>, worst: ExitCode },
    /// A command reads the result of a step that is not stored.
    #[error("there is no stored result of `{step}` for the pipeline as it is now")]
    NotRun {
        step: StepId,
        /// The command that computes it.
        command: String,
    },
    /// `check` or `predict` found problems of inputs, and printed them.
    #[error("{} of the inputs", count(*n_problems, "problem"))]
    Inputs { n_problems: usize },
    /// The log of a run does not say what the run was.
    #[error("{}: the first line of the run's log is missing or damaged", log.display())]
    DamagedLog { log: PathBuf },
    /// Another process computes the step by force.
    #[error("{holder} computes it with `--force` already; the earlier result is kept")]
    ForcedElsewhere { holder: String },
    /// Stored results are damaged.
    #[error("{} {}", count(*n_left, "problem"), if *is_fixed { "could not be repaired" } else { "found in the home" })]
    Damage { n_left: usize, is_fixed: bool },
    /// A record that names results to keep is damaged or missing.
    #[error("nothing is deleted while records of what to keep are damaged or missing: {}", found(findings))]
    DamagedRecords { findings: Vec<Finding> },
    /// A stage made no progress for too long.
    #[error("no progress for {} s: it hangs", after.as_secs())]
    Hangs { after: Duration },
    /// Too few devices are left for a step.
    #[error("needs {} and only {n_left} can be used: steps that hang hold the others", count(*needed, "device"))]
    LacksDevices { needed: usize, n_left: usize },
    /// The user asked to stop.
    #[error("stopped on request; finished units are kept")]
    Interrupted,
    /// An error of a stage or a library.
    #[error(transparent)]
    Stage(#[from] ovenbird_stages::Error),
}

impl From<ovenbird_cache::Error> for Error {
    fn from(error: ovenbird_cache::Error) -> Self {
        Self::Stage(error.into())
    }
}

/// The result of every command.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// How the program ends: `ovenbird --help` prints this table, and README has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ExitCode {
    Success = 0,
    Stage = 1,
    Usage = 2,
    Pipeline = 3,
    Input = 4,
    Store = 5,
    Damage = 6,
    Interrupted = 130,
}

impl ExitCode {
    /// Every code with its meaning, ascending.
    pub(crate) const TABLE: &'static [(Self, &'static str)] = &[
        (Self::Success, "everything requested is done"),
        (Self::Stage, "a step failed: a bug, memory or a device; finished results are kept"),
        (Self::Usage, "the command line is wrong"),
        (Self::Pipeline, "the pipeline file is wrong; nothing was run"),
        (Self::Input, "an input file is missing, damaged or of the wrong kind; finished results are kept"),
        (Self::Store, "the home cannot be used: not writable, full, damaged, missing, or of another version"),
        (Self::Damage, "`verify` or `cache gc` found damage and did not repair it"),
        (Self::Interrupted, "interrupted (Ctrl-C, SIGTERM, SIGUSR1): type the same command again to continue"),
    ];
}

impl Error {
    /// The exit code. A damaged file in the home is never the user's mistake; the user's own files are inputs.
    pub(crate) fn exit_code(&self, home: &Path) -> ExitCode {
        match self {
            Self::Pipeline { problems, .. } if problems.iter().all(Problem::is_missing_file) => ExitCode::Input,
            Self::Pipeline { problems, .. } if problems.iter().all(Problem::is_of_command_line) => ExitCode::Usage,
            Self::Pipeline { .. } => ExitCode::Pipeline,
            Self::UnknownPipeline { .. } | Self::Usage { .. } => ExitCode::Usage,
            Self::NoHome { .. } | Self::DamagedLog { .. } => ExitCode::Store,
            Self::StagesFailed { worst, .. } => *worst,
            Self::NotRun { .. } | Self::Inputs { .. } => ExitCode::Input,
            Self::Damage { .. } | Self::DamagedRecords { .. } => ExitCode::Damage,
            Self::Hangs { .. } | Self::LacksDevices { .. } | Self::ForcedElsewhere { .. } => ExitCode::Stage,
            Self::Interrupted => ExitCode::Interrupted,
            Self::Stage(error) => stage_exit_code(error, home),
        }
    }

    /// The message with its causes, on one line.
    pub(crate) fn message(&self) -> String {
        let mut text = self.to_string();
        if let Self::Pipeline { problems, .. } = self {
            text.extend(problems.iter().map(|problem| format!("; {}: {}", problem.path, problem.fault)));
        }
        let mut source = self.source();
        while let Some(cause) = source {
            let _infallible = write!(text, ": {cause}");
            source = cause.source();
        }
        text
    }

    /// What the user can type next.
    pub(crate) fn hint(&self, home: &Path) -> Option<String> {
        match self {
            Self::Pipeline { problems, .. } if problems.iter().all(Problem::is_missing_file) => Some(
                "put the files there, or set the pipeline's variables to where they are with `--set NAME=VALUE`; \
                 `ovenbird pipelines NAME` prints a named pipeline"
                    .into(),
            ),
            Self::Pipeline { problems, .. } if problems.iter().all(Problem::is_of_command_line) => {
                Some("correct the command line; `ovenbird stages KIND` documents every parameter".into())
            }
            Self::Pipeline { .. } => Some("correct the pipeline file; `ovenbird stages KIND` documents every parameter".into()),
            Self::UnknownPipeline { nearest, .. } => Some(match nearest {
                Some(nearest) => {
                    format!("did you mean `{nearest}`? `ovenbird pipelines` lists all; write a file with a slash: ./my.yaml")
                }
                None => "`ovenbird pipelines` lists all; write a file with a slash: ./my.yaml".into(),
            }),
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::NoHome { .. } => Some("choose one with `--home FOLDER`; `ovenbird run quickstart` makes one".into()),
            Self::StagesFailed { skipped, .. } => {
                let skipped = if skipped.is_empty() { String::new() } else { format!("; steps that did not run because of this: {}", listed(skipped)) };
                Some(format!("fix the cause above and type the same command again: the run continues{skipped}"))
            }
            Self::NotRun { command, .. } => Some(format!("run it first: `{command}`")),
            Self::Inputs { .. } => Some("mend what is named above, and type the same command again".into()),
            Self::DamagedRecords { .. } => {
                Some("`ovenbird verify --fix` repairs them or names what is lost; then type the same command again".into())
            }
            Self::Damage { is_fixed: false, .. } => Some("`ovenbird verify --fix` moves damaged files to `quarantine/` and recomputes them".into()),
            Self::Damage { is_fixed: true, .. } => {
                Some("restore the inputs of what is named above and type the same command again".into())
            }
            Self::Hangs { .. } => {
                Some("check that its disk or network responds, and type the same command again; `max_silence_s` in the pipeline allows a longer wait".into())
            }
            Self::LacksDevices { .. } => Some("type the same command again: a new run can use all devices".into()),
            Self::Interrupted => Some("type the same command again to continue".into()),
            Self::DamagedLog { .. } => Some("`ovenbird verify --full --fix` repairs logs; `ovenbird log` lists the other runs".into()),
            Self::ForcedElsewhere { .. } => Some("wait for it to end, and type the same command again".into()),
            Self::Stage(ovenbird_stages::Error::Cache(error)) => cache_hint(error, home),
            Self::Stage(error) => error.hint(),
        }
    }

    /// The whole message, as printed to stderr.
    pub(crate) fn render(&self, home: &Path) -> String {
        let mut text = match self {
            Self::Pipeline { problems, .. } => {
                let lines: String = problems.iter().map(|problem| format!("  {problem}\n")).collect();
                format!("error: {self}\n{lines}")
            }
            _ => format!("error: {}\n", self.message()),
        };
        if let Some(hint) = self.hint(home) {
            let _infallible = writeln!(text, "hint: {hint}");
        }
        text
    }
}

/// The exit code of a failed stage.
fn stage_exit_code(error: &ovenbird_stages::Error, home: &Path) -> ExitCode {
    use ovenbird_cache::Error as Cache;
    use ovenbird_data::Error as Data;
    use ovenbird_stages::Error as Stage;
    match error {
        Stage::Stopped => ExitCode::Interrupted,
        Stage::Models(ovenbird_models::Error::Torch(_)) => ExitCode::Stage,
        Stage::Data(Data::Write { .. }) => ExitCode::Store,
        Stage::Cache(Cache::Changed { .. } | Cache::Gone { .. } | Cache::Unsound { .. }) => ExitCode::Input,
        // A stored result that is sound and does not fit where it is used is an input error: `error.file()` is `None`.
        Stage::Cache(_) | Stage::Data(Data::Read { .. }) | Stage::Models(ovenbird_models::Error::Read { .. })
            if error.file().is_some_and(|file| is_below(file, home)) =>
        {
            ExitCode::Store
        }
        Stage::Cache(_) | Stage::Data(_) | Stage::Models(_) | Stage::Input { .. } | Stage::TooManyFailed { .. } => ExitCode::Input,
    }
}

/// The hint for a file of the home, or for a file of the user.
fn cache_hint(error: &ovenbird_cache::Error, home: &Path) -> Option<String> {
    use ovenbird_cache::Error as Cache;
    let is_ours = error.file().is_some_and(|file| is_below(file, home));
    match error {
        Cache::Read { source, .. } if is_ours && source.kind() == std::io::ErrorKind::NotFound => {
            Some("it was deleted: `ovenbird verify` lists what else is missing, and the next run recomputes it".into())
        }
        Cache::Read { source, .. } if is_ours && source.kind() != std::io::ErrorKind::PermissionDenied => {
            Some("`ovenbird verify --fix` moves anything that is not a file to `quarantine/`, and recomputes it".into())
        }
        Cache::Malformed { path, .. } if path == home => Some("check that its disk is mounted, and type the same command again".into()),
        Cache::Flipped { .. } | Cache::Malformed { .. } if !is_ours => Some("repair the file, or restore it from its source".into()),
        Cache::Write { .. } if !is_ours => Some("check that the folder exists and is writable, and that the disk is not full".into()),
        _ => error.hint(),
    }
}

fn is_below(file: &Path, home: &Path) -> bool {
    let full = |path: &Path| absolute(path).unwrap_or_else(|_| path.to_owned());
    full(file).starts_with(full(home))
}

/// The first few findings in one line.
fn found(findings: &[Finding]) -> String {
    const SHOWN: usize = 3;
    let shown = findings.iter().take(SHOWN).map(|finding| format!("{}: {}", finding.path.display(), finding.problem));
    let more = (findings.len() > SHOWN).then(|| format!("and {} more", findings.len() - SHOWN));
    shown.chain(more).collect::<Vec<_>>().join("; ")
}

/// Ids of steps, the instances of a stage together.
fn listed(ids: &[StepId]) -> String {
    labels(ids).join(", ")
}
