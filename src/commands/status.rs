//! `ovenbird status`: the state of a run.

use std::path::Path;

use jiff::Timestamp;
use ovenbird_cache::{Ledger, Store};

use crate::{
    error::Result,
    event,
    output::{count, duration, print, to_json},
    run_state::{StepStatus, find_run, state},
};

/// Show the state of the latest run, or of another one
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run's id [default: the latest]
    run: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn status(home: &Path, Args { run, json }: &Args) -> Result<()> {
    let run = find_run(home, run.as_deref())?;
    let state = state(&event::read_log(home, &run)?);
    if *json {
        return Ok(print(&to_json("run", &state))?);
    }
    let mut text = format!("run {} of `{}`: {}, {}\n", state.run, state.pipeline, state.outcome_words(), duration(state.wall_s));
    let width = state.steps.iter().map(|step| step.id.to_string().len()).max().unwrap_or(0);
    for step in &state.steps {
        let amount = match (step.state, step.done, step.total) {
            (StepStatus::Running, done, total) if total > 0 => format!("{done}/{total} ({:.0} %)", 100.0 * done as f64 / total as f64),
            (StepStatus::Done, ..) => step.wall_s.map(duration).unwrap_or_default(),
            (StepStatus::Failed | StepStatus::Skipped, ..) => step.words.clone(),
            _ => String::new(),
        };
        let failed = if step.failed > 0 { format!(", {} skipped", count(step.failed as usize, "item")) } else { String::new() };
        text.push_str(format!("  {:width$}  {:8} {amount}{failed}", step.id, step.state).trim_end());
        text.push('\n');
    }
    let n_damaged = event::log_damage(home, &run)?;
    if n_damaged > 0 {
        let lines = count(n_damaged, "line");
        text.push_str(&format!("{lines} of the run's log are damaged and not shown: `ovenbird verify --fix` repairs the log\n"));
    }
    text.push_str(&verified_words(&Store::open(home)?)?);
    Ok(print(&text)?)
}

/// How many units a home holds, and when they were verified.
fn verified_words(store: &Store) -> Result<String> {
    let units = store.unit_names()?;
    let verified = Ledger::of(store).verified();
    let times: Vec<i64> = units.iter().filter_map(|unit| Some(verified.get(unit)?.at)).collect();
    let oldest = times.iter().min().and_then(|oldest| Timestamp::from_second(*oldest).ok());
    let oldest = oldest.map_or_else(String::new, |oldest| format!(", the others since {}", oldest.strftime("%Y-%m-%d %H:%M UTC")));
    Ok(format!("{}, {} never verified{oldest}\n", count(units.len(), "unit"), units.len() - times.len()))
}
