//! The events of a run, one JSON line each.
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

use crate::pipeline::{matrix::Matrix, step_id::StepId};

/// The version of the event log.
pub(crate) const VERSION: u32 = 1;

/// An event with its time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stamped {
    pub(crate) at: Timestamp,
    pub(crate) event: Event,
}

/// Something that happened in a run.
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
        /// Whether `verify --fix` started it: such a run does not count as the pipeline's latest.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_repair: bool,
        /// The process that executes the run: an [`ovenbird_cache::Owner`] as text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        process: Option<String>,
        /// The name of its machine.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host: Option<String>,
        steps: Vec<StepInfo>,
        /// Present where the pipeline has variants or seeds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        matrix: Option<Matrix>,
    },
    /// Something about the run as a whole that the operator should read.
    Notice { words: String },
    /// A step whose inputs are all known was checked.
    StepChecked { step: StepId, fingerprint: Fingerprint, verdict: Verdict },
    /// A step started.
    StepStarted { step: StepId },
    /// Progress of a step. `total` is 0 while unknown. For networks: how many crops or images (`views`) went through, and how many
    /// batches were ready at the end; 0 means that the network waits for decoding.
    StepProgress {
        step: StepId,
        done: u64,
        total: u64,
        #[serde(default)]
        views: u64,
        #[serde(default)]
        ready: u64,
    },
    /// Losses and learning rate at a training step, counted from 1.
    Measured { step: StepId, at_step: u64, values: BTreeMap<String, f64> },
    /// A unit was published.
    UnitCommitted { step: StepId, unit: usize, bytes: u64 },
    /// An item failed and was skipped.
    ItemFailed { step: StepId, item: String, reason: String, attempts: u32 },
    /// A message of a stage.
    StepNote { step: StepId, words: String },
    /// A step published its artifact.
    StepDone {
        step: StepId,
        fingerprint: Fingerprint,
        ports: BTreeMap<String, Digest>,
        items: u64,
        #[serde(default)]
        failed: u64,
        bytes: u64,
        wall_s: f64,
        /// Peak memory of the program up to the end of the step.
        #[serde(default)]
        peak_bytes: u64,
    },
    /// A step failed.
    StepFailed { step: StepId, error: String, hint: Option<String> },
    /// A step did not run because another one failed.
    StepSkipped { step: StepId, because: StepId },
    /// The operator asked to stop.
    Interrupted,
    /// The last line of a log that was not cut off.
    RunEnded { outcome: Outcome, wall_s: f64 },
}

impl Event {
    /// For the start of a run, the sources of the inputs of each step: see [`StepInfo::inputs`]; otherwise empty.
    pub(crate) fn sources(&self) -> BTreeMap<StepId, BTreeMap<String, String>> {
        let Self::RunStarted { steps, .. } = self else { return BTreeMap::new() };
        steps.iter().map(|step| (step.id.clone(), step.inputs.clone())).collect()
    }
}

/// A step as it stands in the pipeline.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StepInfo {
    pub(crate) id: StepId,
    pub(crate) kind: String,
    /// The steps that it reads from.
    pub(crate) after: Vec<StepId>,
    /// The source of each input: `world.train`, `./labels.json`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) inputs: BTreeMap<String, String>,
}

/// The result of checking a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// Its artifact is stored.
    Reused,
    /// Its bytes were dropped, and no step has needed them so far.
    Dropped,
    /// It has to run, for these reasons; `units_done` units are stored already.
    Run {
        units_done: usize,
        units_total: usize,
        reasons: Vec<String>,
        /// In a dry run: how many items or training steps it processes, and how many a full run would.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sample: Option<(u64, u64)>,
    },
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Everything requested is done.
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
    /// Lines that did not fit on a full disk.
    waiting: Vec<String>,
}

impl EventLog {
    /// Creates the log of a run.
    pub(crate) fn create(store: &Store, run: &str) -> ovenbird_cache::Result<Self> {
        Ok(Self { store: store.clone(), run: run.into(), journal: store.begin_log(&log_path(run))?, waiting: Vec::new() })
    }

    /// Appends an event. Events that end a step or the run are synced to the disk.
    pub(crate) fn append(&mut self, event: &Stamped) -> ovenbird_cache::Result<()> {
        self.waiting.push(serde_json::to_string(event).expect("BUG: events are plain JSON"));
        while let Some(line) = self.waiting.first() {
            match self.journal.append(line) {
                Ok(()) => drop(self.waiting.remove(0)),
                // A full disk pauses the stages; their events wait.
                Err(ovenbird_cache::Error::Write { source, .. }) if source.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        match event.event {
            Event::StepDone { .. } | Event::StepFailed { .. } => self.journal.sync(),
            Event::RunEnded { .. } => {
                self.journal.sync()?;
                self.store.end_log(&log_path(&self.run))
            }
            _ => Ok(()),
        }
    }
}

/// The path of a run's log in the home.
pub(crate) fn log_path(run: &str) -> String {
    format!("runs/{run}/events.jsonl")
}

/// The folder of a run.
pub(crate) fn run_folder(home: &Path, run: &str) -> PathBuf {
    home.join("runs").join(run)
}

/// The ids of all runs of a home, oldest first.
pub(crate) fn runs(home: &Path) -> Vec<String> {
    let entries = fs::read_dir(home.join("runs")).into_iter().flatten().flatten();
    let mut ids: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|id| home.join(log_path(id)).is_file()).collect();
    ids.sort();
    ids
}

/// The events of a run, without an incomplete last line, damaged lines (counted by [`log_damage`]) and unknown events.
pub(crate) fn read_log(home: &Path, run: &str) -> ovenbird_cache::Result<Vec<Stamped>> {
    Ok(lines(home, run)?.sound().filter_map(|line| serde_json::from_str(&line).ok()).collect())
}

/// The first event of a run.
pub(crate) fn read_start(home: &Path, run: &str) -> ovenbird_cache::Result<Option<Event>> {
    let first = Lines::first(home, &log_path(run))?;
    Ok(first.and_then(|line| serde_json::from_str::<Stamped>(&line).ok()).map(|stamped| stamped.event))
}

/// How many lines of a run's log are damaged.
pub(crate) fn log_damage(home: &Path, run: &str) -> ovenbird_cache::Result<usize> {
    Ok(lines(home, run)?.damaged().iter().filter(|line| !line.has_zeros).count())
}

fn lines(home: &Path, run: &str) -> ovenbird_cache::Result<Lines> {
    let lines = Lines::read(&Publisher::default(), home, &log_path(run))?;
    lines.ok_or_else(|| ovenbird_cache::Error::Read { path: home.join(log_path(run)), source: io::ErrorKind::NotFound.into() })
}
