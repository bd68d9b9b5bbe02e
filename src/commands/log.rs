//! `ovenbird log`: past runs, and the events of one.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use ovenbird_cache::Store;
use serde_json::json;

use crate::{
    error::{Error, Result},
    event::{self, Event, Stamped, Verdict, runs},
    output::{count, duration, print, to_json},
    pipeline::step_id::StepId,
    reason::{self, Sources},
    run_state::{RunState, StepStatus, find_run, state_in},
};

/// How often `--follow` reads the log again.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// List runs, or the events of one run
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run's id
    run: Option<String>,
    /// Print JSON; with a run's id, one event per line
    #[arg(long)]
    json: bool,
    /// Continue printing until the run ends
    #[arg(long, short, requires = "run")]
    follow: bool,
}

pub(crate) fn log(home: &Path, Args { run, json, follow }: &Args) -> Result<()> {
    if let Some(run) = run {
        let run = find_run(home, Some(run))?;
        let mut n_shown = 0;
        loop {
            let log = event::read_log(home, &run)?;
            let sources = sources_of(&log);
            let lines = log[n_shown.min(log.len())..].iter().map(|stamped| {
                let line = serde_json::to_string(stamped).expect("BUG: events are plain JSON");
                if *json { format!("{line}\n") } else { format!("{:.0}  {}\n", stamped.at, words(&stamped.event, &sources)) }
            });
            print(&lines.collect::<String>())?;
            n_shown = log.len();
            let is_over = log.iter().any(|stamped| matches!(stamped.event, Event::RunEnded { .. }));
            if !*follow || is_over || Store::open(home)?.at_work().is_empty() {
                return Ok(());
            }
            thread::sleep(FOLLOW_EVERY);
        }
    }
    if !home.exists() {
        return Err(Error::NoHome { home: home.to_owned() });
    }
    let store = Store::open(home)?;
    let states = runs(home).iter().map(|run| state_in(&store, run)).collect::<Result<Vec<_>>>()?;
    if *json {
        let list: Vec<_> = states
            .iter()
            .map(|state| json!({"run": state.run, "pipeline": state.pipeline, "started": state.started, "outcome": state.outcome, "wall_s": state.wall_s}))
            .collect();
        return Ok(print(&to_json("runs", &list))?);
    }
    let line = |state: &RunState| {
        let n_made = state.steps.iter().filter(|step| step.state == StepStatus::Done).count();
        let of = state.steps.len();
        format!("{}  {}  {}, {n_made} of {of} steps run, {}\n", state.run, state.pipeline, state.outcome_words(), duration(state.wall_s))
    };
    Ok(print(&states.iter().map(line).collect::<String>())?)
}

/// The sources of the inputs of each step of a run.
fn sources_of(log: &[Stamped]) -> BTreeMap<StepId, Sources> {
    let start = log.iter().find_map(|stamped| if let Event::RunStarted { steps, .. } = &stamped.event { Some(steps) } else { None });
    start.into_iter().flatten().map(|step| (step.id.clone(), step.inputs.clone())).collect()
}

/// An event in words.
fn words(event: &Event, sources: &BTreeMap<StepId, Sources>) -> String {
    match event {
        Event::RunStarted { run, pipeline, .. } => format!("run {run} of `{pipeline}` started"),
        Event::Notice { words } => words.clone(),
        Event::StepChecked { step, verdict: Verdict::Reused, .. } => format!("{step}: reused"),
        Event::StepChecked { step, verdict: Verdict::Dropped, .. } => format!("{step}: dropped, not needed"),
        Event::StepChecked { step, verdict: Verdict::Run { units_done, units_total, reasons, .. }, .. } => {
            format!("{step}: will run, {units_done} of {units_total} units done: {}", reason::listed(reasons, sources.get(step).unwrap_or(&Sources::new())))
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
            format!("{step}: skipped {item} after {}: {reason}", count(*attempts as usize, "attempt"))
        }
        Event::StepNote { step, words } => format!("{step}: {words}"),
        Event::StepDone { step, items, wall_s, .. } => format!("{step}: done, {items} items in {}", duration(*wall_s)),
        Event::StepFailed { step, error, .. } => format!("{step}: failed: {error}"),
        Event::StepSkipped { step, because } => format!("{step}: not run: it needs `{because}`, which has no result"),
        Event::Interrupted => "stop requested".into(),
        Event::RunEnded { outcome, wall_s } => format!("ended: {outcome:?} after {}", duration(*wall_s)).to_lowercase(),
    }
}
