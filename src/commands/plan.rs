//! `ovenbird plan`: what a run would do, step by step.

use std::{collections::BTreeMap, path::Path};

use ovenbird_cache::{Ledger, Store};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{WebCounts, WebTable},
};
use serde_json::json;

use crate::{
    chosen::Wanted,
    error::Result,
    output::{print, to_json},
    pipeline::{
        Pipeline,
        step_id::{StepId, labels},
    },
    plan::{self, Outlook, Seen, previous_run::PreviousRun},
    reason,
};

/// Classes with few images that are named.
const MAX_CLASSES: usize = 10;

/// Show what a run would do, step by step, and why
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn plan(home: &Path, Args { wanted, json }: &Args) -> Result<()> {
    let (pipeline, wanted) = wanted.load()?;
    let store = Store::open(home)?;
    // `plan` does not create a home.
    let ledger = home.exists().then(|| Ledger::of(&store));
    let seen = plan::look(&pipeline, &wanted, &store, ledger.as_ref())?;
    let web_images = web_images(&pipeline, &seen)?;
    let outlooks: Vec<(usize, Outlook)> = seen.into_iter().map(|(place, seen)| (place, Outlook::of(seen))).collect();
    if *json {
        let steps: Vec<_> = outlooks
            .iter()
            .map(|(step, outlook)| json!({"step": pipeline.steps[*step].id, "use": pipeline.steps[*step].entry.kind, "outlook": outlook}))
            .collect();
        return Ok(print(&to_json("plan", &steps))?);
    }
    let previous = PreviousRun::of(&store, &pipeline)?;
    let mut text = plan_lines(&pipeline, &outlooks, &previous);
    let n_of = |wanted: fn(&Outlook) -> bool| outlooks.iter().filter(|(_, outlook)| wanted(outlook)).count();
    let (reused, run) =
        (n_of(|outlook| matches!(outlook, Outlook::Reused | Outlook::Dropped)), n_of(|outlook| matches!(outlook, Outlook::Run { .. })));
    text.push_str(&summary(reused, run, outlooks.len() - reused - run));
    text.push_str(&web_images);
    Ok(print(&text)?)
}

/// What became of links to images of the web, by step; the classes with fewer images than wanted are named.
fn web_images(pipeline: &Pipeline, seen: &BTreeMap<usize, Seen>) -> Result<String> {
    let mut text = String::new();
    for (place, seen) in seen {
        let has_table = pipeline.steps[*place].entry.outputs.iter().any(|port| port.kind == WebTable::KIND);
        let Seen::Stored(artifact) = seen else { continue };
        if !has_table || artifact.is_dropped {
            continue;
        }
        let table = WebTable::open(&artifact.port("table"))?;
        let WebCounts { wanted, retrieved, downloaded, used, .. } = table.total();
        let mut classes = table.classes;
        text.push_str(&format!(
            "{}: images of the web: {wanted} wanted, {retrieved} links, {downloaded} downloaded, {used} used\n",
            pipeline.steps[*place].id,
        ));
        classes.retain(|counts| counts.used < counts.wanted);
        classes.sort_by_key(|counts| counts.used);
        let width = classes.iter().take(MAX_CLASSES).map(|counts| counts.class.chars().count()).max().unwrap_or(0);
        for WebCounts { class, wanted, retrieved, downloaded, used, .. } in classes.iter().take(MAX_CLASSES) {
            text.push_str(&format!(
                "  {class:width$}  {wanted:>5} wanted, {retrieved:>5} links, {downloaded:>5} downloaded, {used:>5} used\n"
            ));
        }
        if classes.len() > MAX_CLASSES {
            text.push_str(&format!("  and {} more with fewer than wanted: the report lists all\n", classes.len() - MAX_CLASSES));
        }
    }
    Ok(text)
}

/// How many steps are up to date, how many run, and how many may run after those.
fn summary(n_reused: usize, n_run: usize, n_after: usize) -> String {
    let run = if n_run == 0 { "nothing to run".to_owned() } else { format!("{n_run} to run") };
    let after =
        if n_after == 0 { String::new() } else { format!(", up to {n_after} more after {}", if n_run == 1 { "it" } else { "them" }) };
    format!("{n_reused} up to date, {run}{after}\n")
}

/// A line for each step; instances of a stage with the same outlook share a line.
fn plan_lines(pipeline: &Pipeline, outlooks: &[(usize, Outlook)], previous: &PreviousRun) -> String {
    let mut lines: Vec<(&str, String, Vec<&StepId>)> = Vec::new();
    for (place, outlook) in outlooks {
        let id = &pipeline.steps[*place].id;
        let words = outlook_words(pipeline, *place, outlook, previous);
        match lines.iter_mut().find(|(stage, known, _)| *stage == id.stage && *known == words) {
            Some((_, _, ids)) => ids.push(id),
            None => lines.push((&id.stage, words, vec![id])),
        }
    }
    let n_instances = |stage: &str| outlooks.iter().filter(|(place, _)| pipeline.steps[*place].id.stage == stage).count();
    let labelled = |(stage, words, ids): (&str, String, Vec<&StepId>)| {
        let are_all = ids.len() > 1 && ids.len() == n_instances(stage);
        let labels = if are_all { vec![format!("{stage} ({})", ids.len())] } else { labels(ids) };
        labels.into_iter().map(move |label| (label, words.clone()))
    };
    let lines: Vec<(String, String)> = lines.into_iter().flat_map(labelled).collect();
    let width = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    lines.iter().map(|(label, words)| format!("{label:width$}  {words}\n")).collect()
}

/// What a run would do with a step, in words.
fn outlook_words(pipeline: &Pipeline, place: usize, outlook: &Outlook, previous: &PreviousRun) -> String {
    let step = &pipeline.steps[place];
    let words = |reasons: &[String]| reason::listed(reasons, &reason::sources(pipeline, step));
    // The ids of stages are enough: the instances are those that the step reads from.
    let stages = |steps: &[StepId]| {
        let mut stages: Vec<&str> = steps.iter().map(|step| step.stage.as_str()).collect();
        stages.sort_by_key(|stage| pipeline.steps.iter().position(|step| step.id.stage == *stage));
        stages.join(", ")
    };
    match outlook {
        Outlook::Reused => "up to date".to_owned(),
        Outlook::Dropped => "dropped  earlier; no step that would run needs it".to_owned(),
        Outlook::Run { units_done: 0, reasons, .. } => format!("run      {}", words(reasons)),
        Outlook::Run { units_done, units_total, reasons } => {
            format!("resume   {units_done} of {units_total} units done; {}", words(reasons))
        }
        Outlook::DependsOn { steps, reasons } if reasons.is_empty() && previous.steps.contains_key(&step.id) => {
            let output = if steps.len() == 1 { "its output changes" } else { "one of their outputs changes" };
            format!("waits    for {}; runs again only if {output}", stages(steps))
        }
        Outlook::DependsOn { steps, reasons } if reasons.is_empty() => format!("waits    for {}", stages(steps)),
        Outlook::DependsOn { steps, reasons } => format!("run      after {}; {}", stages(steps), words(reasons)),
    }
}
