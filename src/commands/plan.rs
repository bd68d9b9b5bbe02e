//! `ovenbird plan`: what a run would do, step by step.

use std::path::Path;

use ovenbird_cache::{Ledger, Store};
use serde_json::json;

use crate::{
    chosen::Wanted,
    error::Result,
    output::{print, to_json},
    pipeline::{
        Pipeline,
        step_id::{StepId, labels},
    },
    plan::{self, Outlook},
};

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
    let outlooks = plan::outlook(&pipeline, &wanted, &store, ledger.as_ref())?;
    if *json {
        let steps: Vec<_> = outlooks
            .iter()
            .map(|(step, outlook)| json!({"step": pipeline.steps[*step].id, "use": pipeline.steps[*step].entry.kind, "outlook": outlook}))
            .collect();
        return Ok(print(&to_json("plan", &steps))?);
    }
    let mut text = plan_lines(&pipeline, &outlooks);
    let n_of = |wanted: fn(&Outlook) -> bool| outlooks.iter().filter(|(_, outlook)| wanted(outlook)).count();
    let (reused, run) =
        (n_of(|outlook| matches!(outlook, Outlook::Reused | Outlook::Dropped)), n_of(|outlook| matches!(outlook, Outlook::Run { .. })));
    text.push_str(&format!("{reused} reused, {run} to run, {} depending on these\n", outlooks.len() - reused - run));
    Ok(print(&text)?)
}

/// A line for each step; instances of a stage with the same outlook share a line.
fn plan_lines(pipeline: &Pipeline, outlooks: &[(usize, Outlook)]) -> String {
    let mut lines: Vec<(&str, String, Vec<&StepId>)> = Vec::new();
    for (place, outlook) in outlooks {
        let id = &pipeline.steps[*place].id;
        let words = outlook_words(pipeline, outlook);
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
fn outlook_words(pipeline: &Pipeline, outlook: &Outlook) -> String {
    // The ids of stages are enough: the instances are those that the step reads from.
    let stages = |steps: &[StepId]| {
        let mut stages: Vec<&str> = steps.iter().map(|step| step.stage.as_str()).collect();
        stages.sort_by_key(|stage| pipeline.steps.iter().position(|step| step.id.stage == *stage));
        stages.join(", ")
    };
    match outlook {
        Outlook::Reused => "reused".to_owned(),
        Outlook::Dropped => "dropped  earlier; no step that would run needs it".to_owned(),
        Outlook::Run { units_done: 0, reasons, .. } => format!("run      {}", reasons.join("; ")),
        Outlook::Run { units_done, units_total, reasons } => {
            format!("resume   {units_done} of {units_total} units done; {}", reasons.join("; "))
        }
        Outlook::DependsOn { steps, reasons } if reasons.is_empty() => format!("depends  on the result of {}", stages(steps)),
        Outlook::DependsOn { steps, reasons } => format!("run      after {}; {}", stages(steps), reasons.join("; ")),
    }
}
