//! `ovenbird explain`: why a stage, or a unit of it, would run or would not, with the chain of causes.

use std::collections::BTreeMap;

use ovenbird_cache::{Ledger, Status, Store, unit_name};
use serde_json::json;

use crate::{
    cli::{print, to_json},
    error::{Error, Result, count},
    pipeline::{Pipeline, Source, Step},
    plan::{self, Seen, upstream},
};

/// Explains a step, or the copies of one, and those of the steps before them that are causes.
pub(crate) fn explain(pipeline: &Pipeline, places: &[usize], unit: Option<usize>, store: &Store, json: bool) -> Result<()> {
    let ledger = store.home().exists().then(|| Ledger::of(store));
    let seen = plan::look(pipeline, &plan::needed(pipeline, places), store, ledger.as_ref())?;
    if let Some(unit) = unit {
        let of_step = |place: &usize| explain_unit(&pipeline.steps[*place], &seen[place], unit, store, ledger.as_ref());
        return places.iter().try_for_each(of_step);
    }
    let mut causes = Vec::new();
    places.iter().for_each(|place| chain(pipeline, &seen, *place, 0, &mut causes));
    if json {
        let list: Vec<_> = causes.iter().map(|(depth, step, words)| json!({"depth": depth, "step": step, "words": words})).collect();
        return print(&to_json("explain", &list));
    }
    let line = |(depth, step, words): &(usize, String, Vec<String>)| {
        let indent = "  ".repeat(*depth);
        let because = if *depth == 0 { "" } else { "because " };
        let more: String = words[1..].iter().map(|words| format!("{indent}    {words}\n")).collect();
        format!("{indent}{because}{step}: {}\n{more}", words[0])
    };
    print(&causes.iter().map(line).collect::<String>())
}

/// A step and, below it, those that make it run.
fn chain(pipeline: &Pipeline, seen: &BTreeMap<usize, Seen>, place: usize, depth: usize, causes: &mut Vec<(usize, String, Vec<String>)>) {
    let step = &pipeline.steps[place];
    if causes.iter().any(|(_, id, _)| *id == step.id) {
        return;
    }
    match &seen[&place] {
        Seen::There(artifact) => {
            let made = &artifact.manifest.made;
            let is_there = if artifact.is_dropped { "was dropped, and nothing needs it" } else { "is there" };
            let words = vec![
                format!("{is_there}: nothing it is made from has changed ({})", artifact.manifest.fingerprint),
                format!("made by run {} on {} with {}, {}", made.run, made.host, made.program, made.device),
            ];
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Runs(work) => {
            let n_done = work.units.len() - work.missing.len();
            let mut words = vec![format!("would run, {n_done} of {} are there", count(work.units.len(), "unit"))];
            words.extend(work.reasons.iter().map(|reason| named_source(pipeline, step, reason)));
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Waits { steps, reasons } => {
            let whether = if reasons.is_empty() { "would run if what it reads changes: it waits for" } else { "would run after" };
            let mut words = vec![format!("{whether} {}", steps.join(", "))];
            words.extend(reasons.iter().map(|reason| named_source(pipeline, step, reason)));
            causes.push((depth, step.id.clone(), words));
            for source in upstream(step).into_iter().filter(|source| !matches!(seen[source], Seen::There(_))) {
                chain(pipeline, seen, source, depth + 1, causes);
            }
        }
    }
}

/// A reason `in.PORT: was -> is` with where the port comes from.
fn named_source(pipeline: &Pipeline, step: &Step, reason: &str) -> String {
    let port = reason.strip_prefix("in.").and_then(|rest| rest.split_once(':')).map(|(port, _)| port);
    match port.and_then(|port| step.inputs.get(port)) {
        Some(Source::File(path)) => format!("{reason} (the file or folder {} has changed)", path.display()),
        Some(Source::Step { step, port }) => format!("{reason} (`{}.{port}` has come out different)", pipeline.steps[*step].id),
        None => reason.to_owned(),
    }
}

fn explain_unit(step: &Step, seen: &Seen, unit: usize, store: &Store, ledger: Option<&Ledger>) -> Result<()> {
    let kind = step.entry.kind;
    let fingerprint = match seen {
        Seen::There(artifact) => artifact.manifest.units.get(unit).map(|unit| unit.key.fingerprint),
        Seen::Runs(work) => work.units.get(unit).map(|unit| unit.fingerprint),
        Seen::Waits { steps, .. } => {
            return print(&format!("{}: its units are not known before {} ran\n", step.id, steps.join(", ")));
        }
    };
    let fingerprint = fingerprint.ok_or_else(|| Error::Usage {
        problem: format!("{}: there is no unit {unit}", step.id),
        hint: "units are counted from 0".into(),
    })?;
    let name = unit_name(kind, &fingerprint);
    let of = if step.id == step.plain_id { String::new() } else { format!("{}: ", step.id) };
    let text = match store.unit(kind, &fingerprint)? {
        Status::Absent => format!("{of}{name}: has to be made\n"),
        Status::Damaged(findings) => format!("{of}{name}: is damaged and is made again\n  {}\n", findings.join("\n  ")),
        Status::Valid(record) => {
            let n_items = store.items_of(&record)?.len();
            let files: String =
                record.files.iter().map(|file| format!("  {}  {} bytes  {}\n", file.name, file.bytes, file.digest)).collect();
            let verified = ledger.and_then(|ledger| ledger.verified().get(&name).copied());
            let verified = verified.and_then(|was| Some((was.depth, jiff::Timestamp::from_second(was.at).ok()?)));
            let verified =
                verified.map_or_else(|| "never verified".into(), |(depth, at)| format!("last verified {at} ({depth:?})").to_lowercase());
            format!("{of}{name}: is there, {n_items} items, {verified}\n{files}")
        }
    };
    print(&text)
}
