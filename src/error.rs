//! What ends a command without success: one message (what, where), one hint (what to type next), one exit code.
//!
//! Nothing else in the program renders errors or knows exit codes.

use std::{
    error::Error as _,
    fmt::Write as _,
    path::{Path, absolute},
    time::Duration,
};

use ovenbird_cache::verify::Finding;

use crate::pipeline::{NO_FILE, Problem, matrix::labels, with_line};

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The pipeline file, the names in it, or the files it points to.
    #[error("{} in {origin}", count(problems.len(), "problem"))]
    Pipeline { origin: String, problems: Vec<Problem> },
    /// No pipeline of that name.
    #[error("no pipeline `{name}`")]
    UnknownPipeline { name: String, nearest: Option<String> },
    /// A command-line value that clap cannot check.
    #[error("{problem}")]
    Usage { problem: String, hint: String },
    /// Some stages failed; each was reported when it did.
    #[error("{} failed: {}", count(failed.len(), "stage"), listed(failed))]
    StagesFailed { failed: Vec<String>, skipped: Vec<String>, worst: ExitCode },
    /// What lies in the home is not what was published.
    #[error("{} {}", count(*n_left, "thing"), if *is_fixed { "could not be put right" } else { "found that should not be" })]
    Damage { n_left: usize, is_fixed: bool },
    /// What says what is to be kept is damaged or gone.
    #[error("nothing is removed while what says what is to be kept is damaged or gone: {}", found(findings))]
    Unkept { findings: Vec<Finding> },
    /// A stage gave no sign of life.
    #[error("no sign of life for {} s: it hangs", after.as_secs())]
    Hangs { after: Duration },
    /// Too few devices are left for a step.
    #[error("needs {} and {n_left} of the run's can be had: stages that hang keep the others", count(*needed, "device"))]
    LacksDevices { needed: usize, n_left: usize },
    /// The operator asked to stop.
    #[error("stopped on request; everything committed is kept")]
    Interrupted,
    /// Something below.
    #[error(transparent)]
    Stage(#[from] ovenbird_stages::Error),
}

impl From<ovenbird_cache::Error> for Error {
    fn from(error: ovenbird_cache::Error) -> Self {
        Self::Stage(error.into())
    }
}

/// What every command returns.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// How the program ends. README's table and `ovenbird help` are made from this.
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
        (Self::Success, "everything asked for is done"),
        (Self::Stage, "a stage failed for a reason of its own (a bug, memory, a device); the others are kept"),
        (Self::Usage, "the command line is wrong"),
        (Self::Pipeline, "the pipeline file is wrong; nothing was run"),
        (Self::Input, "a file you brought is missing or damaged, or an input does not fit; what was made is kept"),
        (Self::Store, "the home cannot be used: not writable, full, damaged, gone, or of another version"),
        (Self::Damage, "`verify` or `cache gc` found something that is not as it was published, and left it so"),
        (Self::Interrupted, "interrupted, resumable (Ctrl-C, SIGTERM, SIGUSR1): type the same command again"),
    ];
}

impl Error {
    /// Which exit code this is. Whose file it was decides: one that lies in the home is never one that the user brought.
    pub(crate) fn exit_code(&self, home: &Path) -> ExitCode {
        match self {
            Self::Pipeline { .. } | Self::UnknownPipeline { .. } => ExitCode::Pipeline,
            Self::Usage { .. } => ExitCode::Usage,
            Self::StagesFailed { worst, .. } => *worst,
            Self::Damage { .. } | Self::Unkept { .. } => ExitCode::Damage,
            Self::Hangs { .. } | Self::LacksDevices { .. } => ExitCode::Stage,
            Self::Interrupted => ExitCode::Interrupted,
            Self::Stage(error) => stage_exit_code(error, home),
        }
    }

    /// The message with its causes, on one line.
    pub(crate) fn words(&self) -> String {
        let mut text = self.to_string();
        if let Self::Pipeline { problems, .. } = self {
            text.extend(problems.iter().map(|problem| format!("; {}: {}", problem.path, problem.problem)));
        }
        let mut source = self.source();
        while let Some(cause) = source {
            let _infallible = write!(text, ": {cause}");
            source = cause.source();
        }
        text
    }

    /// What the operator can type next.
    pub(crate) fn hint(&self, home: &Path) -> Option<String> {
        match self {
            Self::Pipeline { problems, .. } if problems.iter().all(|problem| problem.problem.starts_with(NO_FILE)) => Some(
                "put the files there, or say where they are: a variable of the pipeline is set by `--set NAME=VALUE`, and \
                 `ovenbird pipelines NAME` prints a named one"
                    .into(),
            ),
            Self::Pipeline { .. } => Some("correct the file; `ovenbird stages KIND` documents every parameter".into()),
            Self::UnknownPipeline { nearest, .. } => Some(match nearest {
                Some(nearest) => {
                    format!("did you mean `{nearest}`? `ovenbird pipelines` lists them; a file is written with a slash: ./my.yaml")
                }
                None => "`ovenbird pipelines` lists them; a file is written with a slash: ./my.yaml".into(),
            }),
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::StagesFailed { skipped, .. } => {
                let skipped = if skipped.is_empty() { String::new() } else { format!("; not run because of it: {}", listed(skipped)) };
                Some(format!("mend the cause above and type the same command again: it continues where it was{skipped}"))
            }
            Self::Unkept { .. } => {
                Some("`ovenbird verify --fix` mends them, or says what is lost; then type the same command again".into())
            }
            Self::Damage { is_fixed: false, .. } => Some("`ovenbird verify --fix` sets it aside and makes it again".into()),
            Self::Damage { is_fixed: true, .. } => {
                Some("what is named above was lost with its inputs; bring these back and type the same command again".into())
            }
            Self::Hangs { .. } => {
                Some("look whether its disk or network answers, and type the same command again; `max_silence_s` gives it longer".into())
            }
            Self::LacksDevices { .. } => Some("type the same command again: a new run begins with all of its devices".into()),
            Self::Interrupted => Some("type the same command again to continue".into()),
            Self::Stage(ovenbird_stages::Error::Cache(error)) => cache_hint(error, home),
            Self::Stage(error) => error.hint(),
        }
    }

    /// The whole message, as printed to stderr.
    pub(crate) fn render(&self, home: &Path) -> String {
        let mut text = match self {
            Self::Pipeline { problems, .. } => format!("error: {self}\n{}", problems.iter().map(with_line).collect::<String>()),
            _ => format!("error: {}\n", self.words()),
        };
        if let Some(hint) = self.hint(home) {
            let _infallible = writeln!(text, "hint: {hint}");
        }
        text
    }
}

/// Which exit code a failed stage asks for.
fn stage_exit_code(error: &ovenbird_stages::Error, home: &Path) -> ExitCode {
    use ovenbird_cache::Error as Cache;
    use ovenbird_data::Error as Data;
    use ovenbird_stages::Error as Stage;
    match error {
        Stage::Stopped => ExitCode::Interrupted,
        Stage::Models(ovenbird_models::Error::Torch(_)) => ExitCode::Stage,
        Stage::Data(Data::Write { .. }) => ExitCode::Store,
        Stage::Cache(Cache::Changed { .. } | Cache::Gone { .. } | Cache::Unsound { .. }) => ExitCode::Input,
        // What was made and is sound, and does not fit where it is used, is no fault of the home: who reads it has compared its digest.
        Stage::Cache(_) | Stage::Data(Data::Read { .. }) | Stage::Models(ovenbird_models::Error::Read { .. })
            if error.file().is_some_and(|file| is_below(file, home)) =>
        {
            ExitCode::Store
        }
        Stage::Cache(_) | Stage::Data(_) | Stage::Models(_) | Stage::Input { .. } | Stage::TooManyFailed { .. } => ExitCode::Input,
    }
}

/// What to do about a file, by whose it is.
fn cache_hint(error: &ovenbird_cache::Error, home: &Path) -> Option<String> {
    use ovenbird_cache::Error as Cache;
    let is_ours = error.file().is_some_and(|file| is_below(file, home));
    match error {
        Cache::Read { source, .. } if is_ours && source.kind() == std::io::ErrorKind::NotFound => {
            Some("it was there: `ovenbird verify` says what else is gone; what is gone is made again by the next run".into())
        }
        Cache::Read { source, .. } if is_ours && source.kind() != std::io::ErrorKind::PermissionDenied => {
            Some("`ovenbird verify --fix` sets aside what is no file, and makes it again".into())
        }
        Cache::Malformed { path, .. } if path == home => Some("look whether its disk is there, and type the same command again".into()),
        Cache::Flipped { .. } | Cache::Malformed { .. } if !is_ours => Some("mend the file, or make it again from its source".into()),
        Cache::Write { .. } if !is_ours => {
            Some("look whether the folder is there and can be written, and whether the disk has room".into())
        }
        _ => error.hint(),
    }
}

fn is_below(file: &Path, home: &Path) -> bool {
    let full = |path: &Path| absolute(path).unwrap_or_else(|_| path.to_owned());
    full(file).starts_with(full(home))
}

/// Findings in one line; the first few of many.
fn found(findings: &[Finding]) -> String {
    const SHOWN: usize = 3;
    let shown = findings.iter().take(SHOWN).map(|finding| format!("{}: {}", finding.path.display(), finding.problem));
    let more = (findings.len() > SHOWN).then(|| format!("and {} more", findings.len() - SHOWN));
    shown.chain(more).collect::<Vec<_>>().join("; ")
}

/// Steps by their ids, copies of a stage together.
fn listed(ids: &[String]) -> String {
    labels(ids.iter().map(String::as_str)).join(", ")
}

/// `1 problem`, `2 problems`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}
