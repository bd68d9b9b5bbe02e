//! The state of a run and of its steps, computed from its events.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use ovenbird_cache::{Owner, Store};
use serde::Serialize;

use crate::{
    error::{Error, Result},
    event::{self, Event, Outcome, Stamped, Verdict, runs},
    output::{clock, duration},
    pipeline::{matrix::Matrix, step_id::StepId},
    reason::{self, Sources},
};

/// A process is called silent after this time without a sign of life.
const SILENCE_S: f64 = 60.0;

/// The id of the given run, or of the latest one that computed something, failed or is still executed; of the latest where none did. Fails
/// where there is no run.
pub(crate) fn find_run(home: &Path, run: Option<&str>) -> Result<String> {
    if !home.exists() {
        return Err(Error::NoHome { home: home.to_owned() });
    }
    let known = runs(home);
    let found = match run {
        Some(run) => known.iter().find(|known| *known == run),
        None => {
            let store = Store::open(home)?;
            // Where a log cannot be read, the command that wants it says so.
            let did_something = |run: &&String| state_in(&store, run).map_or(true, |state| state.did_something());
            known.iter().rev().find(did_something).or(known.last())
        }
    };
    let found = found.cloned().ok_or_else(|| Error::Usage {
        problem: match run {
            Some(run) => format!("{}: no run `{run}`", home.display()),
            None => format!("{}: no run yet", home.display()),
        },
        hint: match known.last() {
            None => "there is no run yet: `ovenbird run quickstart` makes one".into(),
            Some(latest) => format!("`ovenbird log` lists all runs; the latest is {latest}"),
        },
    })?;
    match event::read_start(home, &found)? {
        Some(Event::RunStarted { .. }) => Ok(found),
        _ => Err(Error::DamagedLog { log: home.join(event::log_path(&found)) }),
    }
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
    /// The steps without a result that a waiting step reads from.
    pub(crate) waits_for: Vec<StepId>,
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
            waits_for: Vec::new(),
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
    /// The time of the last event.
    pub(crate) last_event: String,
    /// Whether a run without an end is still executed; `None` for a run that has ended.
    pub(crate) life: Option<Life>,
    /// `None` for a run that has ended, and in logs of older versions.
    pub(crate) process: Option<Process>,
    /// When the running steps will have ended, all of them, at their rate so far.
    pub(crate) ends: Option<Timestamp>,
    pub(crate) steps: Vec<StepState>,
    pub(crate) notices: Vec<String>,
    /// `None` where the pipeline has neither variants nor seeds.
    #[serde(skip)]
    pub(crate) matrix: Option<Matrix>,
}

/// Whether a run without an end is still executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Life {
    Alive,
    Died,
    /// The log does not say which process executes it, and processes are at work in the home.
    Unknown,
}

/// The process that executes a run.
#[derive(Debug, Serialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) host: String,
    /// The time since its last sign of life; `None` where it has ended.
    pub(crate) silent_s: Option<f64>,
    #[serde(skip)]
    owner: Owner,
}

/// The state of a run from its log, and from the processes at work in its home.
pub(crate) fn state_in(store: &Store, run: &str) -> Result<RunState> {
    let mut state = state(&event::read_log(store.home(), run)?);
    if state.outcome.is_some() {
        return Ok(state);
    }
    let at_work = store.at_work();
    let life = match &mut state.process {
        Some(process) if at_work.contains(&process.owner) => {
            process.silent_s = store.silence_of(&process.owner).as_ref().map(Duration::as_secs_f64);
            Life::Alive
        }
        None if !at_work.is_empty() => Life::Unknown,
        Some(_) | None => Life::Died,
    };
    state.life = Some(life);
    if life == Life::Died {
        state.cut_off();
    }
    Ok(state)
}

/// Computes the state of a run from its events alone.
pub(crate) fn state(log: &[Stamped]) -> RunState {
    let mut state = RunState {
        run: String::new(),
        pipeline: String::new(),
        description: String::new(),
        command: String::new(),
        started: log.first().map_or_else(String::new, |first| first.at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()),
        outcome: None,
        wall_s: 0.0,
        last_event: log.last().map_or_else(String::new, |last| last.at.to_string()),
        life: None,
        process: None,
        ends: None,
        steps: Vec::new(),
        notices: Vec::new(),
        matrix: None,
    };
    if let (Some(first), Some(last)) = (log.first(), log.last()) {
        state.wall_s = (last.at.as_millisecond() - first.at.as_millisecond()) as f64 / 1e3;
    }
    let mut places: BTreeMap<StepId, usize> = BTreeMap::new();
    let (mut after, mut began) = (Vec::new(), BTreeMap::new());
    let mut sources: BTreeMap<&StepId, &Sources> = BTreeMap::new();
    // When each running step ends at its rate so far.
    let mut ends: BTreeMap<&StepId, Timestamp> = BTreeMap::new();
    for Stamped { at, event } in log {
        let mut with = |step: &StepId, change: &dyn Fn(&mut StepState)| {
            if let Some(place) = places.get(step) {
                change(&mut state.steps[*place]);
            }
        };
        match event {
            Event::RunStarted { run, pipeline, description, command, steps, matrix, process, host, .. } => {
                let owner = process.as_ref().and_then(|process| process.parse::<Owner>().ok());
                let host = host.clone().unwrap_or_default();
                state.process = owner.map(|owner| Process { pid: owner.pid(), host, silent_s: None, owner });
                after = steps.iter().map(|step| step.after.clone()).collect();
                state.matrix.clone_from(matrix);
                (state.run, state.pipeline) = (run.clone(), pipeline.clone());
                (state.description, state.command) = (description.clone(), command.clone());
                for step in steps {
                    sources.insert(&step.id, &step.inputs);
                    places.insert(step.id.clone(), state.steps.len());
                    state.steps.push(StepState::waiting(step.id.clone(), &step.kind));
                }
            }
            Event::StepChecked { step: id, fingerprint, verdict } => with(id, &|step| {
                step.fingerprint = Some(*fingerprint);
                match verdict {
                    Verdict::Reused => step.state = StepStatus::Reused,
                    Verdict::Dropped => step.state = StepStatus::Dropped,
                    Verdict::Run { reasons, .. } => {
                        step.words = sources.get(id).map_or_else(|| reasons.join("; "), |sources| reason::listed(reasons, sources));
                    }
                }
            }),
            Event::StepStarted { step } => {
                began.insert(step, *at);
                with(step, &|step| step.state = StepStatus::Running);
            }
            Event::StepProgress { step, done, total, .. } => {
                with(step, &|step| (step.done, step.total) = (*done, *total));
                let elapsed_s = began.get(step).map_or(0.0, |began| at.duration_since(*began).as_secs_f64());
                if *done > 0 && *total > 0 {
                    ends.insert(step, *at + time_left(elapsed_s, *done, *total));
                }
            }
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
        state.process = None;
        state.cut_off();
        return state;
    }
    let has_result = |step: &&StepState| matches!(step.state, StepStatus::Done | StepStatus::Reused | StepStatus::Dropped);
    let there: BTreeSet<StepId> = state.steps.iter().filter(has_result).map(|step| step.id.clone()).collect();
    for (step, after) in state.steps.iter_mut().zip(after).filter(|(step, _)| step.state == StepStatus::Waiting) {
        step.waits_for = after.into_iter().filter(|source| !there.contains(source)).collect();
    }
    let running = state.steps.iter().filter(|step| step.state == StepStatus::Running);
    state.ends = running.filter_map(|step| ends.get(&step.id).copied()).max();
    state
}

/// The time that a step has left at its rate so far.
pub(crate) fn time_left(elapsed_s: f64, done: u64, total: u64) -> Duration {
    Duration::from_secs_f64((elapsed_s * total.saturating_sub(done) as f64 / done.max(1) as f64).clamp(0.0, 1e8))
}

impl RunState {
    /// The run has ended, and with it its running steps.
    fn cut_off(&mut self) {
        self.ends = None;
        for step in &mut self.steps {
            step.waits_for.clear();
            if step.state == StepStatus::Running {
                step.state = StepStatus::CutOff;
            }
        }
    }

    /// Whether the run computed something, failed, or is still executed.
    fn did_something(&self) -> bool {
        let ran = |step: &StepState| matches!(step.state, StepStatus::Running | StepStatus::Done | StepStatus::Failed | StepStatus::CutOff);
        matches!(self.outcome, Some(Outcome::Failed)) || self.life.is_some_and(|life| life != Life::Died) || self.steps.iter().any(ran)
    }

    /// Whether the run still goes on, or may.
    pub(crate) fn may_go_on(&self) -> bool {
        self.outcome.is_none() && self.life != Some(Life::Died)
    }

    /// How the run ended, in words.
    pub(crate) fn outcome_words(&self) -> String {
        match (self.outcome, self.life) {
            (Some(Outcome::Done), _) => "done".into(),
            (Some(Outcome::Failed), _) => "failed".into(),
            (Some(Outcome::Interrupted), _) => "stopped".into(),
            (None, Some(Life::Alive)) => "running".into(),
            (None, Some(Life::Died)) => match self.last_event.parse() {
                Ok(last) => format!("died at {}", clock(last)),
                Err(_) => "died".into(),
            },
            (None, Some(Life::Unknown) | None) => "running or cut off".into(),
        }
    }

    /// The process that executes the run, and how long ago it gave a sign of life, in words.
    pub(crate) fn process_words(&self) -> Option<String> {
        let Process { pid, host, silent_s, .. } = self.process.as_ref()?;
        let who = format!("process {pid} on {host}");
        Some(match (self.life?, silent_s) {
            (Life::Died, _) => format!("{who} has ended: type the same command again to continue"),
            (_, Some(silent_s)) if *silent_s > SILENCE_S => format!("{who} has given no sign of life for {}", duration(*silent_s)),
            (_, Some(silent_s)) => format!("{who} is alive: last sign of life {} ago", duration(*silent_s)),
            (_, None) => format!("{who} is alive"),
        })
    }
}

/// How many steps of a run were not reused.
pub(crate) fn n_made(home: &Path, run: &str) -> Result<usize> {
    Ok(state(&event::read_log(home, run)?).steps.iter().filter(|step| step.state == StepStatus::Done).count())
}
