//! `ovenbird status`: the state of a run.

use std::path::Path;

use jiff::Timestamp;
use ovenbird_cache::{Ledger, Store};

use crate::{
    error::Result,
    event,
    output::{clock, count, duration, print, to_json},
    run_state::{RunState, StepState, StepStatus, find_run, state_in},
};

/// Show the state of the latest run, or of another one
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run's id [default: the latest that computed something or failed]
    run: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn status(home: &Path, Args { run, json }: &Args) -> Result<()> {
    let run = find_run(home, run.as_deref())?;
    let store = Store::open(home)?;
    let state = state_in(&store, &run)?;
    if *json {
        return Ok(print(&to_json("run", &state))?);
    }
    let mut text = format!("run {} of `{}`: {}, {}\n", state.run, state.pipeline, state.outcome_words(), duration(state.wall_s));
    text.extend(state.process_words().map(|words| format!("{words}\n")));
    let width = state.steps.iter().map(|step| step.id.to_string().len()).max().unwrap_or(0);
    for step in &state.steps {
        let (word, words) = step_words(&state, step);
        text.push_str(format!("  {:width$}  {word:8} {words}", step.id).trim_end());
        text.push('\n');
    }
    if let Some(ends) = state.ends {
        let left_s = ends.duration_since(Timestamp::now()).as_secs_f64().max(0.0);
        text.push_str(&format!("running steps: left {}, ends {}\n", duration(left_s), clock(ends)));
    }
    let n_damaged = event::log_damage(home, &run)?;
    if n_damaged > 0 {
        let lines = count(n_damaged, "line");
        text.push_str(&format!("{lines} of the run's log are damaged and not shown: `ovenbird verify --fix` repairs the log\n"));
    }
    text.push_str(&verified_words(&store)?);
    Ok(print(&text)?)
}

/// The state of a step in one word, and more about it.
fn step_words(state: &RunState, step: &StepState) -> (String, String) {
    let amount = match (step.state, step.done, step.total) {
        (StepStatus::Running, done, total) if total > 0 => format!("{done}/{total} ({:.0} %)", 100.0 * done as f64 / total as f64),
        (StepStatus::Waiting, ..) if !step.waits_for.is_empty() => {
            format!("for {}", step.waits_for.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
        }
        (StepStatus::Done, ..) => step.wall_s.map(duration).unwrap_or_default(),
        (StepStatus::Failed | StepStatus::Skipped, ..) => step.words.clone(),
        _ => String::new(),
    };
    let failed = if step.failed > 0 { format!(", {} skipped", count(step.failed as usize, "item")) } else { String::new() };
    let word = if step.state == StepStatus::Waiting && !state.may_go_on() { "not run".into() } else { step.state.to_string() };
    (word, format!("{amount}{failed}"))
}

/// How many results a home holds, and when they were checked.
fn verified_words(store: &Store) -> Result<String> {
    let units = store.unit_names()?;
    let verified = Ledger::of(store).verified();
    let times: Vec<i64> = units.iter().filter_map(|unit| Some(verified.get(unit)?.at)).collect();
    let oldest = times.iter().min().and_then(|oldest| Timestamp::from_second(*oldest).ok()).map(clock);
    let stored = format!("{} stored", count(units.len(), "result"));
    Ok(match (oldest, units.len() - times.len()) {
        _ if units.is_empty() => "no results stored\n".into(),
        (None, _) => format!("{stored}, none checked with `verify` yet\n"),
        (Some(oldest), 0) => format!("{stored}, all checked with `verify` since {oldest}\n"),
        (Some(oldest), n_left) => format!("{stored}, {} checked with `verify` since {oldest}, {n_left} not yet\n", times.len()),
    })
}
