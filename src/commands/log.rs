//! `ovenbird log`: past runs, and the events of one.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use ovenbird_cache::Store;
use serde_json::json;

use crate::{
    error::{Error, Result},
    event::{self, Event, Verdict, runs},
    output::{count, duration, print, to_json},
    pipeline::step_id::{StepId, labels},
    reason::{self, Sources},
    results::{Headline, headlines},
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
            let sources = log.first().map_or_else(BTreeMap::new, |start| start.event.sources());
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
    let lines: Vec<Line> = states.iter().map(|state| Line::of(&store, state)).collect();
    if *json {
        let fields = |(state, line): (&RunState, &Line)| json!({"run": state.run, "pipeline": state.pipeline, "started": state.started, "outcome": state.outcome, "wall_s": state.wall_s, "command": state.command, "life": state.life, "headlines": line.headlines, "steps_run": line.made, "steps": state.steps.len()});
        let list: Vec<_> = states.iter().zip(&lines).map(fields).collect();
        return Ok(print(&to_json("runs", &list))?);
    }
    let cells: Vec<[String; 4]> = states.iter().zip(&lines).map(|(state, line)| line.cells(state)).collect();
    let width = |column: usize| cells.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
    let widths = [0, 1, 2].map(width);
    let line = |[run, command, headlines, end]: &[String; 4]| {
        format!("{run:0$}  {command:1$}  {headlines:2$}  {end}\n", widths[0], widths[1], widths[2])
    };
    Ok(print(&cells.iter().map(line).collect::<String>())?)
}

/// How many steps and evaluations a line of the list names.
const NAMED: usize = 3;

/// A run in the list.
struct Line {
    headlines: Vec<Headline>,
    /// The steps that ran.
    made: Vec<StepId>,
}

impl Line {
    fn of(store: &Store, state: &RunState) -> Self {
        let made = state.steps.iter().filter(|step| step.state == StepStatus::Done).map(|step| step.id.clone()).collect();
        Self { headlines: headlines(store, &state.steps), made }
    }

    /// The run, the command, the metrics, and the end.
    fn cells(&self, state: &RunState) -> [String; 4] {
        let mut headlines: Vec<String> = self.headlines.iter().take(NAMED).map(ToString::to_string).collect();
        headlines.extend((self.headlines.len() > NAMED).then(|| format!("{} more", self.headlines.len() - NAMED)));
        let made = match self.made.len() {
            0 => "no step run".to_owned(),
            1..=NAMED => format!("ran {}", labels(&self.made).join(", ")),
            n_made => format!("ran {n_made} of {} steps", state.steps.len()),
        };
        let end = format!("{}, {made}, {}", state.outcome_words(), duration(state.wall_s));
        let headlines = if headlines.is_empty() { "–".to_owned() } else { headlines.join(", ") };
        [state.run.clone(), state.command.replace('\n', " "), headlines, end]
    }
}

/// An event in words.
fn words(event: &Event, sources: &BTreeMap<StepId, Sources>) -> String {
    match event {
        Event::RunStarted { run, pipeline, .. } => format!("run {run} of `{pipeline}` started"),
        Event::Notice { words } => words.clone(),
        Event::StepChecked { step, verdict: Verdict::Reused, .. } => format!("{step}: reused"),
        Event::StepChecked { step, verdict: Verdict::Dropped, .. } => format!("{step}: dropped, not needed"),
        Event::StepChecked { step, verdict: Verdict::Run { units_done, units_total, reasons, .. }, .. } => {
            format!(
                "{step}: will run, {units_done} of {units_total} units done: {}",
                reason::listed(reasons, sources.get(step).unwrap_or(&Sources::new()))
            )
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
