//! What past runs did: `status`, `log`, and the tables a run ends with. Folds over events and manifests.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use jiff::Timestamp;
use ovenbird_cache::{Artifact, Ledger, Status, Store};
use ovenbird_data::evaluate::{Evaluation, IouType};
use ovenbird_stages::{
    Artifact as _, PortInfo, StageEntry,
    artifacts::{Curve, EvaluationFile},
    find,
};
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::{known_runs, print, to_json},
    comparison::{Comparison, compare},
    error::{Error, Result, count},
    event::{self, Event, Outcome, Stamped, Verdict, runs},
    pipeline::matrix::Matrix,
    screen::duration,
};

/// How often a log that is followed is read again.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// The id of the run that was asked for, or the latest.
pub(crate) fn chosen(home: &Path, run: Option<&str>) -> Result<String> {
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
        hint: known_runs(home),
    })
}

/// How a step of a run stands.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StepState {
    pub(crate) id: String,
    pub(crate) kind: String,
    /// `waiting`, `running`, `reused`, `dropped`, `done`, `failed`, `skipped`, `cut off`.
    pub(crate) state: &'static str,
    pub(crate) done: u64,
    pub(crate) total: u64,
    /// Items that were left out.
    pub(crate) failed: u64,
    pub(crate) wall_s: Option<f64>,
    /// The error, or why it runs.
    pub(crate) words: String,
    pub(crate) fingerprint: Option<ovenbird_cache::Fingerprint>,
}

impl StepState {
    /// One of which nothing is known so far.
    pub(crate) fn waiting(id: &str, kind: &str) -> Self {
        Self {
            id: id.into(),
            kind: kind.into(),
            state: "waiting",
            done: 0,
            total: 0,
            failed: 0,
            wall_s: None,
            words: String::new(),
            fingerprint: None,
        }
    }
}

/// How a run stands.
#[derive(Debug, Serialize)]
pub(crate) struct RunState {
    pub(crate) run: String,
    pub(crate) pipeline: String,
    pub(crate) description: String,
    pub(crate) command: String,
    pub(crate) started: String,
    /// `None`: it is running, or was cut off.
    pub(crate) outcome: Option<Outcome>,
    pub(crate) wall_s: f64,
    pub(crate) steps: Vec<StepState>,
    pub(crate) notices: Vec<String>,
    /// Of a pipeline with variants or seeds.
    #[serde(skip)]
    pub(crate) matrix: Option<Matrix>,
}

/// Folds a log.
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
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for Stamped { event, .. } in log {
        let mut with = |step: &String, change: &dyn Fn(&mut StepState)| {
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
                    state.steps.push(StepState::waiting(&step.id, &step.kind));
                }
            }
            Event::StepChecked { step, fingerprint, verdict } => with(step, &|step| {
                step.fingerprint = Some(*fingerprint);
                match verdict {
                    Verdict::Reused => step.state = "reused",
                    Verdict::Dropped => step.state = "dropped",
                    Verdict::Run { reasons, .. } => step.words = reasons.join("; "),
                }
            }),
            Event::StepStarted { step } => with(step, &|step| step.state = "running"),
            Event::StepProgress { step, done, total, .. } => with(step, &|step| (step.done, step.total) = (*done, *total)),
            Event::StepDone { step, items, wall_s, .. } => with(step, &|step| {
                step.state = "done";
                (step.done, step.wall_s) = (*items, Some(*wall_s));
            }),
            Event::StepFailed { step, error, .. } => with(step, &|step| {
                step.state = "failed";
                step.words.clone_from(error);
            }),
            Event::StepSkipped { step, because } => with(step, &|step| {
                step.state = "skipped";
                step.words = format!("`{because}` is not there");
            }),
            Event::Notice { words } => state.notices.push(words.clone()),
            Event::StepNote { step, words } => state.notices.push(format!("{step}: {words}")),
            Event::RunEnded { outcome, wall_s } => (state.outcome, state.wall_s) = (Some(*outcome), *wall_s),
            Event::ItemFailed { step, .. } => with(step, &|step| step.failed += 1),
            Event::Measured { .. } | Event::UnitCommitted { .. } | Event::Interrupted => {}
        }
    }
    if state.outcome.is_some() {
        for step in state.steps.iter_mut().filter(|step| step.state == "running") {
            step.state = "cut off";
        }
    }
    state
}

pub(crate) fn outcome_words(state: &RunState) -> &'static str {
    match state.outcome {
        Some(Outcome::Done) => "done",
        Some(Outcome::Failed) => "failed",
        Some(Outcome::Interrupted) => "stopped",
        None => "running or cut off",
    }
}

/// `ovenbird status`.
pub(crate) fn status(home: &Path, run: Option<&str>, json: bool) -> Result<()> {
    let run = chosen(home, run)?;
    let state = state(&event::read_log(home, &run)?);
    if json {
        return print(&to_json("run", &state));
    }
    let mut text = format!("run {} of `{}`: {}, {}\n", state.run, state.pipeline, outcome_words(&state), duration(state.wall_s));
    let width = state.steps.iter().map(|step| step.id.len()).max().unwrap_or(0);
    for step in &state.steps {
        let amount = match (step.state, step.done, step.total) {
            ("running", done, total) if total > 0 => format!("{done}/{total} ({:.0} %)", 100.0 * done as f64 / total as f64),
            ("done", ..) => step.wall_s.map(duration).unwrap_or_default(),
            ("failed" | "skipped", ..) => step.words.clone(),
            _ => String::new(),
        };
        let failed = if step.failed > 0 { format!(", {} left out", count(step.failed as usize, "item")) } else { String::new() };
        text.push_str(format!("  {:width$}  {:8} {amount}{failed}", step.id, step.state).trim_end());
        text.push('\n');
    }
    let n_damaged = event::log_damage(home, &run)?;
    if n_damaged > 0 {
        let lines = count(n_damaged, "line");
        text.push_str(&format!("{lines} of the run's log damaged and left out: `ovenbird verify --fix`\n"));
    }
    text.push_str(&verified_words(&Store::open(home)?)?);
    print(&text)
}

/// How many units a home holds, and how long ago they were verified.
fn verified_words(store: &Store) -> Result<String> {
    let units = store.unit_names()?;
    let verified = Ledger::of(store).verified();
    let times: Vec<i64> = units.iter().filter_map(|unit| Some(verified.get(unit)?.at)).collect();
    let oldest = times.iter().min().and_then(|oldest| Timestamp::from_second(*oldest).ok());
    let oldest = oldest.map_or_else(String::new, |oldest| format!(", the others since {}", oldest.strftime("%Y-%m-%d %H:%M UTC")));
    Ok(format!("{}, {} never verified{oldest}\n", count(units.len(), "unit"), units.len() - times.len()))
}

/// `ovenbird log`.
pub(crate) fn log(home: &Path, run: Option<&str>, json: bool, follow: bool) -> Result<()> {
    if let Some(run) = run {
        let run = chosen(home, Some(run))?;
        let mut n_shown = 0;
        loop {
            let log = event::read_log(home, &run)?;
            let lines = log[n_shown.min(log.len())..].iter().map(|stamped| {
                let line = serde_json::to_string(stamped).expect("BUG: events are plain JSON");
                if json { format!("{line}\n") } else { format!("{:.0}  {}\n", stamped.at, words(&stamped.event)) }
            });
            print(&lines.collect::<String>())?;
            n_shown = log.len();
            let is_over = log.iter().any(|stamped| matches!(stamped.event, Event::RunEnded { .. }));
            if !follow || is_over || Store::open(home)?.at_work().is_empty() {
                return Ok(());
            }
            thread::sleep(FOLLOW_EVERY);
        }
    }
    let states = runs(home).iter().map(|run| Ok(state(&event::read_log(home, run)?))).collect::<Result<Vec<_>>>()?;
    if json {
        let list: Vec<_> = states
            .iter()
            .map(|state| json!({"run": state.run, "pipeline": state.pipeline, "started": state.started, "outcome": state.outcome, "wall_s": state.wall_s}))
            .collect();
        return print(&to_json("runs", &list));
    }
    let line = |state: &RunState| {
        let n_made = state.steps.iter().filter(|step| step.state == "done").count();
        let of = state.steps.len();
        format!("{}  {}  {}, {n_made} of {of} stages made, {}\n", state.run, state.pipeline, outcome_words(state), duration(state.wall_s))
    };
    print(&states.iter().map(line).collect::<String>())
}

fn words(event: &Event) -> String {
    match event {
        Event::RunStarted { run, pipeline, .. } => format!("run {run} of `{pipeline}` started"),
        Event::Notice { words } => words.clone(),
        Event::StepChecked { step, verdict: Verdict::Reused, .. } => format!("{step}: reused"),
        Event::StepChecked { step, verdict: Verdict::Dropped, .. } => format!("{step}: dropped, not needed"),
        Event::StepChecked { step, verdict: Verdict::Run { units_done, units_total, reasons, .. }, .. } => {
            format!("{step}: will run, {units_done} of {units_total} units are there: {}", reasons.join("; "))
        }
        Event::StepStarted { step } => format!("{step}: started"),
        Event::StepProgress { step, done, total, views: 0, .. } => format!("{step}: {done} of {total}"),
        Event::StepProgress { step, done, total, views, ready } => format!("{step}: {done} of {total}, {views} views, {ready} ready"),
        Event::Measured { step, at_step, values } => {
            let values: Vec<String> = values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            format!("{step}: step {at_step}: {}", values.join(", "))
        }
        Event::UnitCommitted { step, unit, bytes } => format!("{step}: unit {unit} committed, {bytes} bytes"),
        Event::ItemFailed { step, item, reason, attempts } => {
            format!("{step}: left out {item} after {}: {reason}", count(*attempts as usize, "attempt"))
        }
        Event::StepNote { step, words } => format!("{step}: {words}"),
        Event::StepDone { step, items, wall_s, .. } => format!("{step}: done, {items} items in {}", duration(*wall_s)),
        Event::StepFailed { step, error, .. } => format!("{step}: failed: {error}"),
        Event::StepSkipped { step, because } => format!("{step}: not run, because `{because}` is not there"),
        Event::Interrupted => "stop requested".into(),
        Event::RunEnded { outcome, wall_s } => format!("ended: {outcome:?} after {}", duration(*wall_s)).to_lowercase(),
    }
}

/// How many steps of a run had to be made.
pub(crate) fn n_made(home: &Path, run: &str) -> Result<usize> {
    Ok(state(&event::read_log(home, run)?).steps.iter().filter(|step| step.state == "done").count())
}

/// An evaluation that a run made or found.
pub(crate) struct Evaluated {
    pub(crate) step: String,
    pub(crate) kind: String,
    /// The step's output that it is.
    pub(crate) port: &'static str,
    pub(crate) evaluation: Evaluation,
}

/// The evaluations among what a step of a run came to.
pub(crate) fn evaluations(store: &Store, step: &StepState) -> Result<Vec<Evaluated>> {
    let outputs = find(&step.kind).into_iter().flat_map(|entry| entry.outputs);
    let ports: Vec<&'static str> = outputs.filter(|port| port.kind == EvaluationFile::KIND).map(|port| port.name).collect();
    let Some(fingerprint) = step.fingerprint.filter(|_| !ports.is_empty()) else { return Ok(Vec::new()) };
    let Status::Valid(artifact) = store.artifact(&step.kind, &fingerprint)? else { return Ok(Vec::new()) };
    if artifact.is_dropped {
        return Ok(Vec::new());
    }
    let open = |port: &'static str| {
        let EvaluationFile(evaluation) = EvaluationFile::open(&artifact.port(port))?;
        Ok(Evaluated { step: step.id.clone(), kind: step.kind.clone(), port, evaluation })
    };
    ports.into_iter().map(open).collect()
}

/// Fails where an output that is shown when a run has ended, of an artifact that was there before, is not what was published.
pub(crate) fn check_shown(entry: &StageEntry, artifact: &Artifact) -> Result<()> {
    let is_shown = |port: &&PortInfo| [EvaluationFile::KIND, Curve::KIND].contains(&port.kind) && !artifact.is_dropped;
    for port in entry.outputs.iter().filter(is_shown) {
        artifact.port(port.name).iter().try_for_each(|file| file.check().map(drop))?;
    }
    Ok(())
}

/// What a run's evaluations came to: a table for each, or, with variants or seeds, one for all of their copies.
pub(crate) fn tables(store: &Store, run: &str) -> Result<String> {
    let RunState { steps, matrix, .. } = state(&event::read_log(store.home(), run)?);
    let mut evaluated = Vec::new();
    for step in &steps {
        evaluated.extend(evaluations(store, step)?);
    }
    if let Some(matrix) = matrix {
        return Ok(compare(&matrix, &steps, &evaluated).iter().map(Comparison::text).collect());
    }
    let table = |Evaluated { step, kind, evaluation, .. }: &Evaluated| {
        let of = match evaluation.iou_type {
            IouType::Boxes => "",
            IouType::Masks => ", masks",
        };
        format!("\n{step} ({kind}{of})\n{}\n", evaluation.table())
    };
    Ok(evaluated.iter().map(table).collect())
}
