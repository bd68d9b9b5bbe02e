//! `ovenbird run`: runs a pipeline, or continues it; a dry run; an estimate.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use indicatif::HumanBytes;
use ovenbird_cache::Store;

use super::report;
use crate::{
    chosen::{Chosen, Wanted, places},
    error::{Error, Result},
    event::{self, Event, Verdict},
    output::{as_typed, duration, print},
    pipeline::{Pipeline, step_id::StepId},
    progress::RunProgress,
    results,
    run::{self, local::Options},
    run_args::RunArgs,
    run_state,
};

/// How many items of each step `--estimate` measures without `--dry-run`.
const SAMPLE: usize = 64;

/// Run a pipeline, or continue it; stored results are reused
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    pub(crate) machine: RunArgs,
    /// Hash every input file again, even where its size and times are unchanged
    #[arg(long)]
    rehash: bool,
    /// Compute a step again even if it is up to date, and say whether the result is the same; may be repeated. Later steps run only if it
    /// differs. The earlier result moves to quarantine only when another one is complete
    #[arg(long, value_name = "STEP", conflicts_with_all = ["dry_run", "estimate"])]
    force: Vec<String>,
    /// Process only the first N items of every step, and one unit of a training; results are stored separately
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    dry_run: Option<u32>,
    /// Predict time, bytes and memory of every step from a dry run, one step after the other [default: of 64 items]
    #[arg(long)]
    estimate: bool,
}

pub(crate) fn run(home: &Path, Args { wanted, machine, rehash, force, dry_run, estimate }: &Args) -> Result<()> {
    let sample = dry_run.map(|n| n as usize).or(estimate.then_some(SAMPLE));
    let forced = forced(wanted, force)?;
    let options = Options { rehash: *rehash, is_measuring: *estimate, forced, ..machine.options() };
    let Some(n) = sample else { return run_and_report(home, wanted, &options, None) };
    let name = if *estimate { "estimate".to_owned() } else { n.to_string() };
    let separate = home.join("dry-run").join(name);
    if *estimate {
        // Reused results would not be measured.
        Store::open(&separate)?.publisher().remove(&separate)?;
    }
    run_and_report(&separate, wanted, &options, Some(n))
}

/// The places of the steps that are to be computed again.
fn forced(wanted: &Wanted, names: &[String]) -> Result<Vec<usize>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let (pipeline, wanted) = wanted.load()?;
    let mut forced = Vec::new();
    for name in names {
        for place in places(&pipeline, name)? {
            if !wanted.contains(&place) {
                let problem = format!("--force {name}: this run does not include the step");
                return Err(Error::Usage { problem, hint: "leave out `--until`, or give a later step".into() });
            }
            forced.push(place);
        }
    }
    Ok(forced)
}

/// Runs the wanted steps, writes the report and prints the tables. `most_items` limits a dry run.
pub(crate) fn run_and_report(home: &Path, wanted: &Wanted, options: &Options, most_items: Option<usize>) -> Result<()> {
    let chosen = &wanted.chosen;
    let (mut pipeline, wanted) = wanted.load()?;
    pipeline.steps.iter_mut().for_each(|step| step.most_items = most_items);
    let store = Store::open(home)?;
    let pipeline = Arc::new(pipeline);
    let mut progress = RunProgress::new();
    let ended = run::run(&pipeline, &wanted, &store, options, &mut |event| progress.show(event))?;
    let (report, _is_new) = report::write(&store, &ended.run, None)?;
    let mut text = results::tables(&store, &ended.run)?;
    if let Some(error) = ended.error {
        print(&text)?;
        return Err(error);
    }
    let n_made = run_state::n_made(home, &ended.run)?;
    if n_made == 0 {
        text.push_str("nothing to do: the results of every step are stored already\n");
    }
    if let Some(n) = most_items {
        text.push_str(&format!("a dry run with {n} items a step; its results are in {}\n", home.display()));
    }
    if options.is_measuring {
        text.push_str(&estimate(home, &ended.run)?);
    }
    text.push_str(&format!("report: {}\n", report.display()));
    if most_items.is_none() {
        text.push_str(&next_commands(home, chosen, &pipeline));
    }
    Ok(print(&text)?)
}

/// Three commands worth typing after a run, with the program and the home as this run was started.
fn next_commands(home: &Path, chosen: &Chosen, pipeline: &Pipeline) -> String {
    let tunable = pipeline.steps.iter().rev().find(|step| step.entry.kind.starts_with("detect/"));
    let key = tunable.map(|step| format!("{}.nms_iou", step.id.stage)).filter(|key| !chosen.changes(key));
    let change = key.map(|key| format!("{key}=0.4"));
    let plan = [vec!["plan".to_owned()], chosen.as_typed(change.as_deref().as_slice())].concat();
    let line = |words: &[String], meaning: &str| format!("  {}    {meaning}\n", as_typed(home, words));
    [
        "next:\n".into(),
        line(&plan, if change.is_some() { "what a changed parameter would run again" } else { "what would run again" }),
        line(&["log".into()], "past runs"),
        line(&["stages".into()], "all stages and their parameters"),
    ]
    .concat()
}

/// A table with a line for each step: what the sample took, and a prediction for all items. Time and bytes are taken to grow with the
/// number of items; start-up is counted with them, so a small sample predicts too much rather than too little.
fn estimate(home: &Path, run: &str) -> Result<String> {
    let mut samples: BTreeMap<StepId, (u64, u64)> = BTreeMap::new();
    let log = event::read_log(home, run)?;
    let ids = log
        .iter()
        .filter_map(|stamped| if let Event::StepDone { step, .. } = &stamped.event { Some(step.to_string().len()) } else { None });
    let width = ids.max().unwrap_or(0).max(12);
    let mut text = format!("\n{:width$} {:>9} {:>10} {:>12} {:>12} {:>12}\n", "step", "sample", "whole", "time", "written", "memory");
    let (mut all_s, mut all_bytes, mut most) = (0.0, 0, 0);
    for stamped in log {
        match stamped.event {
            Event::StepChecked { step, verdict: Verdict::Run { sample: Some(sample), .. }, .. } => drop(samples.insert(step, sample)),
            Event::StepDone { step, bytes, wall_s, peak_bytes, .. } => {
                let (sample, whole) = samples.get(&step).copied().unwrap_or((1, 1));
                let scale = whole as f64 / sample.max(1) as f64;
                let (seconds, bytes) = (wall_s * scale, (bytes as f64 * scale) as u64);
                (all_s, all_bytes, most) = (all_s + seconds, all_bytes + bytes, most.max(peak_bytes));
                let (written, memory) = (HumanBytes(bytes).to_string(), HumanBytes(peak_bytes).to_string());
                text.push_str(&format!("{step:width$} {sample:>9} {whole:>10} {:>12} {written:>12} {memory:>12}\n", duration(seconds)));
            }
            _ => {}
        }
    }
    let (written, memory) = (HumanBytes(all_bytes).to_string(), HumanBytes(most).to_string());
    text.push_str(&format!("{:width$} {:>9} {:>10} {:>12} {written:>12} {memory:>12}\n", "all", "", "", duration(all_s)));
    text.push_str("steps run one after the other; steps without items are listed as measured, reused steps are not listed\n");
    Ok(text)
}
