//! `ovenbird run`: runs a pipeline, or continues it; a dry run; an estimate.

mod estimate;

use std::{path::Path, sync::Arc, time::Duration};

use ovenbird_cache::Store;

use super::report;
use crate::{
    chosen::{Chosen, Wanted, places},
    error::{Error, Result},
    output::{as_typed, print},
    pipeline::Pipeline,
    progress::RunProgress,
    quantities::time,
    results,
    run::{self, local::Options},
    run_args::RunArgs,
    run_state,
};

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
    /// How long running steps have, after Ctrl-C, SIGTERM or SIGUSR1, to keep what they have finished. A second signal stops at once
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = time)]
    grace: Duration,
    /// Process only the first N items of every step, and as many steps of a training as see N images; results are stored separately and mean
    /// nothing
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    dry_run: Option<u32>,
    /// Predict time, bytes and memory of every step from dry runs of growing sizes, one step after the other; with `--dry-run N`, up to N
    /// items
    #[arg(long)]
    estimate: bool,
}

pub(crate) fn run(home: &Path, Args { wanted, machine, rehash, force, grace, dry_run, estimate }: &Args) -> Result<()> {
    let sample = dry_run.map(|n| n as usize);
    let forced = forced(wanted, force)?;
    let options = Options { rehash: *rehash, is_measuring: *estimate, forced, grace: *grace, ..machine.options() };
    if *estimate {
        return estimate::estimate(home, wanted, &options, sample);
    }
    match sample {
        Some(n) => run_and_report(&home.join("dry-run").join(n.to_string()), wanted, &options, sample),
        None => run_and_report(home, wanted, &options, None),
    }
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
        text.push_str(&format!("a dry run with {n} items a step: its numbers mean nothing; its results are in {}\n", home.display()));
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
