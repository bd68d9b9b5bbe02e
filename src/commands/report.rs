//! `ovenbird report`: one self-contained HTML file about a run, which needs neither network nor scripts; or its numbers as JSON.

mod contact;
mod gallery;
mod html;
mod origins;
mod page;
mod picture;
mod queries;
mod relabelled;
mod retrieved;
mod web;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use ovenbird_cache::{Artifact, Status, Store, publish};
use ovenbird_stages::{Artifact as _, FailedItem, artifacts::Curve, failed_items, find};
use serde_json::json;

use crate::{
    error::{Error, Result},
    event::{self, Event, Stamped},
    output::{count, print, to_json},
    pipeline::step_id::StepId,
    results::{self, Evaluated, compare},
    run_state::{self, RunState, StepStatus, find_run},
};
use origins::Origins;
use page::{Gathered, Section, parts_of, render};

/// Write an HTML file about a run: graph, tables, curves, images, manifests
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run's id [default: the latest that computed something or failed]
    run: Option<String>,
    /// The file to write [default: report.html beside the run's log]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print JSON instead: the numbers of every evaluation, and variants side by side
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

pub(crate) fn report(home: &Path, Args { run, output, json }: &Args) -> Result<()> {
    let run = find_run(home, run.as_deref())?;
    let store = Store::open(home)?;
    if *json {
        return numbers(&store, &run);
    }
    let (path, note) = write(&store, &run, output.as_deref())?;
    Ok(print(&format!("{}\n{}", path.display(), note.map_or_else(String::new, |note| format!("{note}\n"))))?)
}

/// Writes the report of a run; returns its path. The report beside the run's log is not replaced by one that shows less; the second
/// value says so.
pub(crate) fn write(store: &Store, run: &str, output: Option<&Path>) -> Result<(PathBuf, Option<String>)> {
    let gathered = gather(store, run)?;
    if let Some(path) = output {
        publish::replace(path, render(&gathered).as_bytes())?;
        return Ok((path.to_owned(), None));
    }
    store.check_there()?;
    let path = event::run_folder(store.home(), run).join("report.html");
    let (before, now) = (parts_of(&fs::read_to_string(&path).unwrap_or_default()), gathered.shown());
    let lost: Vec<&String> = before.difference(&now).collect();
    if !lost.is_empty() {
        let lost = lost.iter().map(|part| part.as_str()).collect::<Vec<_>>().join(", ");
        let words =
            format!("not replaced, because a new report would not show {lost}; `ovenbird report {run} -o FILE` writes one elsewhere");
        return Ok((path, Some(words)));
    }
    publish::replace(&path, render(&gathered).as_bytes())?;
    Ok((path, None))
}

/// `ovenbird report --json`.
fn numbers(store: &Store, run: &str) -> Result<()> {
    let state = run_state::state(&event::read_log(store.home(), run)?);
    let mut evaluated = Vec::new();
    for step in &state.steps {
        evaluated.extend(results::evaluations(store, step)?);
    }
    let comparisons = state.matrix.as_ref().map_or_else(Vec::new, |matrix| compare(matrix, &state.steps, &evaluated));
    let as_json = |Evaluated { step, kind, port, evaluation }: &Evaluated| {
        json!({
            "step": step,
            "use": kind,
            "output": port,
            "of": evaluation.title(),
            "groups": evaluation.groups,
            "warnings": evaluation.warnings,
            "n_images_without_detections": evaluation.n_images_without_detections,
        })
    };
    let evaluations: Vec<_> = evaluated.iter().map(as_json).collect();
    let not_shown = unread(store, &state)?;
    let report = json!({"run": state.run, "pipeline": state.pipeline, "evaluations": evaluations, "comparisons": comparisons, "not_shown": not_shown});
    Ok(print(&to_json("report", &report))?)
}

/// The parts that the report cannot show, because the log or results are damaged or missing.
fn unread(store: &Store, run: &RunState) -> Result<Vec<String>> {
    let mut unread = Vec::new();
    let n_damaged = event::log_damage(store.home(), &run.run)?;
    if n_damaged > 0 {
        unread.push(format!("{} of the run's log damaged", count(n_damaged, "line")));
    }
    for step in run.steps.iter().filter(|step| matches!(step.state, StepStatus::Done | StepStatus::Reused | StepStatus::Dropped)) {
        let Some(fingerprint) = &step.fingerprint else { continue };
        match store.artifact(&step.kind, fingerprint)? {
            Status::Valid(artifact) if artifact.is_dropped => unread.push(format!("`{}`: its bytes were dropped", step.id)),
            Status::Valid(_) => {}
            Status::Damaged(findings) => unread.push(format!("`{}`: {}", step.id, findings.join("; "))),
            Status::Absent => unread.push(format!("`{}`: its results are no longer in the home", step.id)),
        }
    }
    Ok(unread)
}

/// Reads the log, manifests and tables of a run. Parts that cannot be read are left out and named.
fn gather(store: &Store, run: &str) -> Result<Gathered> {
    let log = &event::read_log(store.home(), run)?;
    let run = run_state::state_in(store, run)?;
    let start_ms = log.first().map_or(0, |first| first.at.as_millisecond());
    let (mut after, mut spans, mut bytes) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let mut skipped: BTreeMap<StepId, Vec<FailedItem>> = BTreeMap::new();
    let mut flow: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for Stamped { at, event } in log {
        let now = (at.as_millisecond() - start_ms) as f64 / 1e3;
        match event {
            Event::RunStarted { steps, .. } => after = steps.iter().map(|step| step.after.clone()).collect(),
            Event::StepStarted { step } => drop(spans.insert(step.clone(), (now, now))),
            Event::StepDone { step, bytes: of_step, .. } => {
                bytes.insert(step.clone(), *of_step);
                spans.entry(step.clone()).and_modify(|span| span.1 = now);
            }
            Event::StepProgress { step, done, views, ready, .. } => {
                spans.entry(step.clone()).and_modify(|span| span.1 = now);
                flow.entry(step.clone()).or_default().push((now, *done, *views, *ready));
            }
            Event::ItemFailed { step, item, reason, attempts } => {
                let item = FailedItem { item: item.clone(), reason: reason.clone(), attempts: *attempts };
                skipped.entry(step.clone()).or_default().push(item);
            }
            Event::StepFailed { step, .. } => drop(spans.entry(step.clone()).and_modify(|span| span.1 = now)),
            _ => {}
        }
    }
    let mut artifacts = BTreeMap::new();
    let (mut evaluations, mut trainings, mut unread) = (Vec::new(), Vec::new(), unread(store, &run)?);
    for step in &run.steps {
        let Some(fingerprint) = &step.fingerprint else { continue };
        if let Status::Valid(artifact) = store.artifact(&step.kind, fingerprint)? {
            for port in find(&step.kind).into_iter().flat_map(|entry| entry.outputs) {
                if port.kind == Curve::KIND && !artifact.is_dropped {
                    match Curve::open(&artifact.port(port.name)) {
                        Ok(curve) => trainings.push((step.id.clone(), curve)),
                        Err(error) => unread.push(Error::from(error).message()),
                    }
                }
            }
            match results::evaluations(store, step) {
                Ok(found) => evaluations.extend(found),
                Err(error) => unread.push(error.message()),
            }
            match skipped_items(store, &artifact) {
                Ok(items) if items.is_empty() => drop(skipped.remove(&step.id)),
                Ok(items) => drop(skipped.insert(step.id.clone(), items)),
                Err(error) => unread.push(error.message()),
            }
            artifacts.insert(step.id.clone(), artifact);
        }
    }
    let sources = log.first().map_or_else(BTreeMap::new, |first| first.event.sources());
    let origins = Origins::of(store, &run.run, sources, &run.steps, &artifacts);
    let mut sections: Vec<Box<dyn Section>> = Vec::new();
    if let Ok(origins) = &origins {
        let mut add = |what: &str, found: Result<Box<dyn Section>>| match found {
            Ok(section) => sections.push(section),
            Err(error) => unread.push(format!("{what}: {}", error.message())),
        };
        for found in retrieved::retrieved(origins) {
            add("retrieved boxes", found.map(|found| Box::new(found) as Box<dyn Section>));
        }
        for found in web::web_images(origins) {
            add("images of the web", found.map(|found| Box::new(found) as Box<dyn Section>));
        }
        for found in queries::drawn(origins) {
            add("queries", found.map(|found| Box::new(found) as Box<dyn Section>));
        }
        for found in relabelled::changed(origins) {
            add("classes by CLIP", found.map(|found| Box::new(found) as Box<dyn Section>));
        }
    }
    let pictures = origins.and_then(|origins| gallery::gallery(&run.steps, &artifacts, &origins)).unwrap_or_else(|error| {
        unread.push(format!("pictures: {}", error.message()));
        None
    });
    Ok(Gathered { run, after, spans, bytes, flow, artifacts, evaluations, trainings, sections, pictures, skipped, unread })
}

/// The items that a step skipped, whichever run did; each once, in ascending name.
fn skipped_items(store: &Store, artifact: &Artifact) -> Result<Vec<FailedItem>> {
    let mut items = BTreeMap::new();
    // Each checkpoint of a training lists the items of those before it.
    for unit in artifact.manifest.units.iter().filter(|_| !artifact.is_dropped) {
        items.extend(failed_items(store, unit)?.into_iter().map(|failed| (failed.item.clone(), failed)));
    }
    Ok(items.into_values().collect())
}
