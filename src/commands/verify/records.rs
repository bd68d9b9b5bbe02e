//! Repairs records: pins, plans, requests, logs, the records of previous runs, the journal, the home's format.
//!
//! Damaged records are set aside. They are written again from other records where possible; otherwise they are reported as lost and
//! noted as removed, so that `cache gc` works again.

use std::path::Path;

use ovenbird_cache::{Store, verify::Finding};

use crate::{
    error::Result,
    event::{self, Event},
    pins::write_pin,
    plan::{self, Seen, previous_run::PreviousRun},
    request::read_request,
};

/// The outcome of a repair, in words.
pub(super) enum Outcome {
    Repaired(String),
    Lost(String),
}

/// Repairs a record.
pub(super) fn repair(store: &Store, finding: &Finding) -> Result<Outcome> {
    let place = store.place_of(&finding.path);
    let parts: Vec<&str> = place.split('/').collect();
    let why = finding.problem.as_str();
    let outcome = match parts.as_slice() {
        ["format.json"] => match store.mend_home_format()? {
            true => Outcome::Repaired("written again: the files in the home have this format".into()),
            false => Outcome::Lost("the format of the home cannot be determined; choose another home with `--home FOLDER`".into()),
        },
        ["commits.jsonl"] if store.at_work().len() > 1 => Outcome::Lost("other processes use the home; verify again later".into()),
        ["commits.jsonl"] => {
            store.mend_journal(&place, why)?;
            let (_session, _recovered) = store.enter()?;
            Outcome::Repaired("its sound lines are kept, and stored units are noted again".into())
        }
        ["pins", _] => {
            let run = name_of(&place);
            store.set_record_aside(&place, why)?;
            match write_pin(store, &run) {
                Ok(()) => Outcome::Repaired("pinned again from the run's log".into()),
                Err(error) => Outcome::Lost(format!("the results of run {run} are not known: {}", error.message())),
            }
        }
        ["pipelines", _] => {
            store.set_record_aside(&place, why)?;
            match from_logs(store, &place)? {
                Some(last) => {
                    store.keep(&place, &last)?;
                    Outcome::Repaired("written again from the logs of its runs".into())
                }
                None => Outcome::Lost("there is no run of this pipeline; its next run writes it again".into()),
            }
        }
        ["plans", _, _] => {
            store.set_record_aside(&place, why)?;
            match planned(store, &name_of(&place)) {
                Ok(true) => Outcome::Repaired("planned again".into()),
                Ok(false) => Outcome::Lost("no run that planned it can be planned again: units that only it needs are not kept".into()),
                Err(error) => Outcome::Lost(format!("{}; run its pipeline again", error.message())),
            }
        }
        ["runs", run, "events.jsonl"] if finding.path.exists() => {
            store.mend_journal(&place, why)?;
            Outcome::Lost(format!("a part of run {run}'s log is lost; its sound lines are kept"))
        }
        ["runs", run, "request.json"] => {
            store.set_record_aside(&place, why)?;
            Outcome::Lost(format!("the request of run {run}; run its pipeline again to recompute results that only this run had"))
        }
        ["verify.json"] => {
            store.set_record_aside(&place, why)?;
            Outcome::Repaired("set aside: the next scan starts from the beginning".into())
        }
        _ => {
            store.set_record_aside(&place, why)?;
            Outcome::Lost("it was the only copy".into())
        }
    };
    if !finding.path.exists() {
        let (Outcome::Repaired(why) | Outcome::Lost(why)) = &outcome;
        store.note_removed(&place, why)?;
    }
    Ok(outcome)
}

/// A record's name without `.json`.
fn name_of(place: &str) -> String {
    Path::new(place).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The record of a pipeline, given its path, from the logs.
fn from_logs(store: &Store, place: &str) -> Result<Option<PreviousRun>> {
    for run in event::runs(store.home()).into_iter().rev() {
        if let Some(Event::RunStarted { pipeline, file, .. }) = event::read_start(store.home(), &run)?
            && PreviousRun::path(&pipeline, file.as_deref()) == place
        {
            return PreviousRun::from_logs(store, &pipeline, file.as_deref()).map(Some);
        }
    }
    Ok(None)
}

/// Writes the plan of an unfinished artifact again, from the request of the latest run that planned it.
fn planned(store: &Store, artifact: &str) -> Result<bool> {
    for run in event::runs(store.home()).into_iter().rev() {
        let step = event::read_log(store.home(), &run)?.into_iter().find_map(|stamped| match stamped.event {
            Event::StepChecked { step, fingerprint, .. } if fingerprint.short() == artifact => Some(step),
            _ => None,
        });
        let Some(step) = step else { continue };
        let pipeline = read_request(store, &run)?;
        let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| pipeline.steps[*place].id == step).collect();
        for seen in plan::look(&pipeline, &pipeline.needed(&places), store, None)?.into_values() {
            match seen {
                Seen::Runs(work) if work.recipe.fingerprint().short() == artifact => {
                    let units: Vec<_> = work.units.iter().map(|unit| unit.fingerprint).collect();
                    store.write_plan(&work.recipe, &units)?;
                    return Ok(true);
                }
                Seen::Stored(stored) if stored.manifest.fingerprint.short() == artifact => return Ok(true),
                _ => {}
            }
        }
    }
    Ok(false)
}
