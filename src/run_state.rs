//! The state of a run and of its steps, computed from its events.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::Serialize;

use crate::{
    error::{Error, Result},
    event::{self, Event, Outcome, Stamped, Verdict, runs},
    pipeline::{matrix::Matrix, step_id::StepId},
};

/// The id of the given run, or of the latest one. Fails where there is none.
pub(crate) fn find_run(home: &Path, run: Option<&str>) -> Result<String> {
    let known = runs(home);
    let found = match run {
        Some(run) => known.iter().find(|known| *known == run),
        None => known.last(),
    };
    found.cloned().ok_or_else(|| Error::Usage {
        problem: match run {
            Some(run) => format!("{}: no run `{run}`", home.display()),
            None => format!("{}: no run yet", home.display()),
        },
        hint: match known.last() {
            None => "there is no run yet: `ovenbird run quickstart` makes one".into(),
            Some(latest) => format!("`ovenbird log` lists all runs; the latest is {latest}"),
        },
    })
}

/// The state of a step in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepStatus {
    Waiting,
    Running,
    Reused,
    /// Its bytes were dropped, and no step needed them.
    Dropped,
    Done,
    Failed,
    /// It did not run because another step failed.
    Skipped,
    /// The run ended while the step was running.
    #[serde(rename = "cut off")]
    CutOff,
}

impl fmt::Display for StepStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Reused => "reused",
            Self::Dropped => "dropped",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::CutOff => "cut off",
        })
    }
}

/// A step of a run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StepState {
    pub(crate) id: StepId,
    pub(crate) kind: String,
    pub(crate) state: StepStatus,
    pub(crate) done: u64,
    pub(crate) total: u64,
    /// How many items failed and were skipped.
    pub(crate) failed: u64,
    pub(crate) wall_s: Option<f64>,
    /// The error, or why it runs.
    pub(crate) words: String,
    pub(crate) fingerprint: Option<ovenbird_cache::Fingerprint>,
}

impl StepState {
    /// A step without events so far.
    pub(crate) fn waiting(id: StepId, kind: &str) -> Self {
        Self {
            id,
            kind: kind.into(),
            state: StepStatus::Waiting,
            done: 0,
            total: 0,
            failed: 0,
            wall_s: None,
            words: String::new(),
            fingerprint: None,
        }
    }
}

/// A run.
#[derive(Debug, Serialize)]
pub(crate) struct RunState {
    pub(crate) run: String,
    pub(crate) pipeline: String,
    pub(crate) description: String,
    pub(crate) command: String,
    pub(crate) started: String,
    /// `None` while it is running, and where it was cut off.
    pub(crate) outcome: Option<Outcome>,
    pub(crate) wall_s: f64,
    pub(crate) steps: Vec<StepState>,
    pub(crate) notices: Vec<String>,
    /// `None` where the pipeline has neither variants nor seeds.
    #[serde(skip)]
    pub(crate) matrix: Option<Matrix>,
}

/// Computes the state of a run from its events.
pub(crate) fn state(log: &[Stamped]) -> RunState {
    let mut state = RunState {
        run: String::new(),
        pipeline: String::new(),
        description: String::new(),
        command: String::new(),
        started: log.first().map_or_else(String::new, |first| first.at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()),
        outcome: None,
        wall_s: 0.0,
        steps: Vec::new(),
        notices: Vec::new(),
        matrix: None,
    };
    if let (Some(first), Some(last)) = (log.first(), log.last()) {
        state.wall_s = (last.at.as_millisecond() - first.at.as_millisecond()) as f64 / 1e3;
    }
    let mut places: BTreeMap<StepId, usize> = BTreeMap::new();
    for Stamped { event, .. } in log {
        let mut with = |step: &StepId, change: &dyn Fn(&mut StepState)| {
            if let Some(place) = places.get(step) {
                change(&mut state.steps[*place]);
            }
        };
        match event {
            Event::RunStarted { run, pipeline, description, command, steps, matrix, .. } => {
                state.matrix.clone_from(matrix);
                (state.run, state.pipeline) = (run.clone(), pipeline.clone());
                (state.description, state.command) = (description.clone(), command.clone());
                for step in steps {
                    places.insert(step.id.clone(), state.steps.len());
                    state.steps.push(StepState::waiting(step.id.clone(), &step.kind));
                }
            }
            Event::StepChecked { step, fingerprint, verdict } => with(step, &|step| {
                step.fingerprint = Some(*fingerprint);
                match verdict {
                    Verdict::Reused => step.state = StepStatus::Reused,
                    Verdict::Dropped => step.state = StepStatus::Dropped,
                    Verdict::Run { reasons, .. } => step.words = reasons.join("; "),
                }
            }),
            Event::StepStarted { step } => with(step, &|step| step.state = StepStatus::Running),
            Event::StepProgress { step, done, total, .. } => with(step, &|step| (step.done, step.total) = (*done, *total)),
            Event::StepDone { step, items, wall_s, .. } => with(step, &|step| {
                step.state = StepStatus::Done;
                (step.done, step.wall_s) = (*items, Some(*wall_s));
            }),
            Event::StepFailed { step, error, .. } => with(step, &|step| {
                step.state = StepStatus::Failed;
                step.words.clone_from(error);
            }),
            Event::StepSkipped { step, because } => with(step, &|step| {
                step.state = StepStatus::Skipped;
                step.words = format!("it needs `{because}`, which has no result");
            }),
            Event::Notice { words } => state.notices.push(words.clone()),
            Event::StepNote { step, words } => state.notices.push(format!("{step}: {words}")),
            Event::RunEnded { outcome, wall_s } => (state.outcome, state.wall_s) = (Some(*outcome), *wall_s),
            Event::ItemFailed { step, .. } => with(step, &|step| step.failed += 1),
            Event::Measured { .. } | Event::UnitCommitted { .. } | Event::Interrupted => {}
        }
    }
    if state.outcome.is_some() {
        for step in state.steps.iter_mut().filter(|step| step.state == StepStatus::Running) {
            step.state = StepStatus::CutOff;
        }
    }
    state
}

impl RunState {
    /// How the run ended, in words.
    pub(crate) fn outcome_words(&self) -> &'static str {
        match self.outcome {
            Some(Outcome::Done) => "done",
            Some(Outcome::Failed) => "failed",
            Some(Outcome::Interrupted) => "stopped",
            None => "running or cut off",
        }
    }
}

/// How many steps of a run were not reused.
pub(crate) fn n_made(home: &Path, run: &str) -> Result<usize> {
    Ok(state(&event::read_log(home, run)?).steps.iter().filter(|step| step.state == StepStatus::Done).count())
}
