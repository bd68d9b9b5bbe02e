//! What happened in a run: one enum, one JSON line each.
//!
//! Bars, plain lines, `log`, `status`, `report` and `--json` are folds over events; a log can be replayed. Fields and
//! variants are added, never changed or removed; [`VERSION`] is raised when a reader of the older form would be misled.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use ovenbird_cache::{
    Digest, Fingerprint, Publisher, Store,
    journal::{Journal, Lines},
};
use serde::{Deserialize, Serialize};

use crate::pipeline::matrix::Matrix;

/// The version of the event log.
pub(crate) const VERSION: u32 = 1;

/// One thing that happened, and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stamped {
    /// When.
    pub(crate) at: Timestamp,
    /// What.
    pub(crate) event: Event,
}

/// What can happen.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// The first line of every log.
    RunStarted {
        version: u32,
        run: String,
        pipeline: String,
        /// The pipeline's file, as an absolute path; a named one has none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<PathBuf>,
        description: String,
        command: String,
        /// Whether it makes again what was damaged: it says nothing of how the pipeline stands now.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_repair: bool,
        steps: Vec<StepInfo>,
        /// Of a pipeline with variants or seeds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        matrix: Option<Matrix>,
    },
    /// Something about the run as a whole that the operator should read.
    Notice { words: String },
    /// A step was looked up: all its inputs are there.
    StepChecked { step: String, fingerprint: Fingerprint, verdict: Verdict },
    /// A step began to work.
    StepStarted { step: String },
    /// How far a step is. `total` is 0 while unknown. Where a network works: how many crops or images (`views`) it has seen, and how
    /// many pieces of work were ready for it at last; none means that it waits for decoding and cutting.
    StepProgress {
        step: String,
        done: u64,
        total: u64,
        #[serde(default)]
        views: u64,
        #[serde(default)]
        ready: u64,
    },
    /// What was measured at a step of a training, counted from 1: losses, learning rate.
    Measured { step: String, at_step: u64, values: BTreeMap<String, f64> },
    /// A unit was published.
    UnitCommitted { step: String, unit: usize, bytes: u64 },
    /// An item has no result and was left out.
    ItemFailed { step: String, item: String, reason: String, attempts: u32 },
    /// A stage said something.
    StepNote { step: String, words: String },
    /// A step's artifact is there.
    StepDone {
        step: String,
        fingerprint: Fingerprint,
        ports: BTreeMap<String, Digest>,
        items: u64,
        #[serde(default)]
        failed: u64,
        bytes: u64,
        wall_s: f64,
        /// The most memory that the program held while or before it worked.
        #[serde(default)]
        peak_bytes: u64,
    },
    /// A step ended without its artifact.
    StepFailed { step: String, error: String, hint: Option<String> },
    /// A step could not run because another failed.
    StepSkipped { step: String, because: String },
    /// The operator asked to stop.
    Interrupted,
    /// The last line of a log that was not cut off.
    RunEnded { outcome: Outcome, wall_s: f64 },
}

/// A step as it stands in the pipeline.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StepInfo {
    pub(crate) id: String,
    pub(crate) kind: String,
    /// Steps whose outputs it reads.
    pub(crate) after: Vec<String>,
}

/// What a look-up said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// It is there.
    Reused,
    /// Its bytes were let go, and nothing has needed them so far.
    Dropped,
    /// It has to be made, from this many units on, for these reasons.
    Run {
        units_done: usize,
        units_total: usize,
        reasons: Vec<String>,
        /// In a dry run: how many items, or steps of a training, are made, and how many there are in earnest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sample: Option<(u64, u64)>,
    },
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Everything asked for is there.
    Done,
    /// Some steps failed.
    Failed,
    /// The operator asked to stop.
    Interrupted,
}

/// The event log of one run.
pub(crate) struct EventLog {
    store: Store,
    run: String,
    journal: Journal,
    /// Lines for which the disk had no room.
    waiting: Vec<String>,
}

impl EventLog {
    /// Creates the log of a run.
    pub(crate) fn create(store: &Store, run: &str) -> ovenbird_cache::Result<Self> {
        Ok(Self { store: store.clone(), run: run.into(), journal: store.begin_log(&log_place(run))?, waiting: Vec::new() })
    }

    /// Appends an event. What ends a step or the run survives a power cut.
    pub(crate) fn append(&mut self, event: &Stamped) -> ovenbird_cache::Result<()> {
        self.waiting.push(serde_json::to_string(event).expect("BUG: events are plain JSON"));
        while let Some(line) = self.waiting.first() {
            match self.journal.append(line) {
                Ok(()) => drop(self.waiting.remove(0)),
                // A full disk pauses the stages that write results; what is to be told waits with them.
                Err(ovenbird_cache::Error::Write { source, .. }) if source.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        match event.event {
            Event::StepDone { .. } | Event::StepFailed { .. } => self.journal.sync(),
            Event::RunEnded { .. } => {
                self.journal.sync()?;
                self.store.end_log(&log_place(&self.run))
            }
            _ => Ok(()),
        }
    }
}

/// Where the log of a run lies in the home.
pub(crate) fn log_place(run: &str) -> String {
    format!("runs/{run}/events.jsonl")
}

/// Where everything of a run lies.
pub(crate) fn run_folder(home: &Path, run: &str) -> PathBuf {
    home.join("runs").join(run)
}

/// The ids of all runs of a home, oldest first.
pub(crate) fn runs(home: &Path) -> Vec<String> {
    let entries = fs::read_dir(home.join("runs")).into_iter().flatten().flatten();
    let mut ids: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|id| home.join(log_place(id)).is_file()).collect();
    ids.sort();
    ids
}

/// Every event of a run. A torn last line, left by a crash or still being written, is left out; so are damaged lines, of which
/// [`log_damage`] tells, and lines of events that this program does not know.
pub(crate) fn read_log(home: &Path, run: &str) -> ovenbird_cache::Result<Vec<Stamped>> {
    Ok(lines(home, run)?.sound().filter_map(|line| serde_json::from_str(&line).ok()).collect())
}

/// The first event of a run: what it was started for.
pub(crate) fn read_start(home: &Path, run: &str) -> ovenbird_cache::Result<Option<Event>> {
    let first = Lines::first(home, &log_place(run))?;
    Ok(first.and_then(|line| serde_json::from_str::<Stamped>(&line).ok()).map(|stamped| stamped.event))
}

/// How many lines of a run's log are damaged.
pub(crate) fn log_damage(home: &Path, run: &str) -> ovenbird_cache::Result<usize> {
    Ok(lines(home, run)?.damaged().iter().filter(|line| !line.has_zeros).count())
}

fn lines(home: &Path, run: &str) -> ovenbird_cache::Result<Lines> {
    let lines = Lines::read(&Publisher::default(), home, &log_place(run))?;
    lines.ok_or_else(|| ovenbird_cache::Error::Read { path: home.join(log_place(run)), source: io::ErrorKind::NotFound.into() })
}
