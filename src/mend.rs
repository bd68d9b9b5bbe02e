//! What `verify --fix` does about records: pins, plans, requests, logs, what pipelines came to, the journal, the home's format.
//!
//! Everything that is damaged is set aside. What other records tell is written anew; what nothing tells is lost, is said to be, and is
//! noted as gone, so that a garbage collection may go on.

use std::path::Path;

use ovenbird_cache::{Store, verify::Finding};

use crate::{
    error::Result,
    event::{self, Event},
    keep,
    plan::{self, Last, Seen},
    verify::read_request,
};

/// What became of a record.
pub(crate) enum Mended {
    Again(String),
    Lost(String),
}

/// Puts a record right.
pub(crate) fn mend(store: &Store, finding: &Finding) -> Result<Mended> {
    let place = store.place_of(&finding.path);
    let parts: Vec<&str> = place.split('/').collect();
    let why = finding.problem.as_str();
    let mended = match parts.as_slice() {
        ["format.json"] => match store.mend_home_format()? {
            true => Mended::Again("written again, as what lies in the home is of this format".into()),
            false => Mended::Lost("nothing in the home shows of which format it is; choose another with `--home FOLDER`".into()),
        },
        ["commits.jsonl"] if store.at_work().len() > 1 => Mended::Lost("other processes are at work; verify again later".into()),
        ["commits.jsonl"] => {
            store.mend_journal(&place, why)?;
            // What is there and not noted is noted.
            let (_session, _recovered) = store.enter()?;
            Mended::Again("its sound lines are kept, and what is there is noted again".into())
        }
        ["pins", _] => {
            let run = name_of(&place);
            store.set_record_aside(&place, why)?;
            match keep::write_pin(store, &run) {
                Ok(()) => Mended::Again("pinned again, as the run's log tells".into()),
                Err(error) => Mended::Lost(format!("what run {run} used is not known: {}", error.words())),
            }
        }
        ["pipelines", _] => {
            store.set_record_aside(&place, why)?;
            match told(store, &place)? {
                Some(last) => {
                    store.keep(&place, &last)?;
                    Mended::Again("written again, as the logs of its runs tell".into())
                }
                None => Mended::Lost("no run of this pipeline is there; its next run writes it again".into()),
            }
        }
        ["plans", _, _] => {
            store.set_record_aside(&place, why)?;
            match planned(store, &name_of(&place)) {
                Ok(true) => Mended::Again("planned again, as far as it is not made".into()),
                Ok(false) => Mended::Lost("no run that began it can be planned again: units that only it needed are not kept".into()),
                Err(error) => Mended::Lost(format!("{}; run its pipeline again", error.words())),
            }
        }
        ["runs", run, "events.jsonl"] if finding.path.exists() => {
            store.mend_journal(&place, why)?;
            Mended::Lost(format!("a part of what run {run} did is not known; the sound lines of its log are kept"))
        }
        ["runs", run, "request.json"] => {
            store.set_record_aside(&place, why)?;
            Mended::Lost(format!("what run {run} was asked; what only it made can be made again by running its pipeline"))
        }
        ["verify.json"] => {
            store.set_record_aside(&place, why)?;
            Mended::Again("set aside: the next scan begins at the beginning".into())
        }
        _ => {
            store.set_record_aside(&place, why)?;
            Mended::Lost("it was the only copy".into())
        }
    };
    if !finding.path.exists() {
        let (Mended::Again(why) | Mended::Lost(why)) = &mended;
        store.note_removed(&place, why)?;
    }
    Ok(mended)
}

/// A record's name without `.json`.
fn name_of(place: &str) -> String {
    Path::new(place).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// What the logs tell of the pipeline that has a place.
fn told(store: &Store, place: &str) -> Result<Option<Last>> {
    for run in event::runs(store.home()).into_iter().rev() {
        if let Some(Event::RunStarted { pipeline, file, .. }) = event::read_start(store.home(), &run)?
            && Last::place(&pipeline, file.as_deref()) == place
        {
            return Last::told(store, &pipeline, file.as_deref()).map(Some);
        }
    }
    Ok(None)
}

/// Plans an artifact in the making again, from what the latest run was asked that began it.
fn planned(store: &Store, artifact: &str) -> Result<bool> {
    for run in event::runs(store.home()).into_iter().rev() {
        let step = event::read_log(store.home(), &run)?.into_iter().find_map(|stamped| match stamped.event {
            Event::StepChecked { step, fingerprint, .. } if fingerprint.short() == artifact => Some(step),
            _ => None,
        });
        let Some(step) = step else { continue };
        let pipeline = read_request(store, &run)?;
        let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| pipeline.steps[*place].id == step).collect();
        for seen in plan::look(&pipeline, &plan::needed(&pipeline, &places), store, None)?.into_values() {
            match seen {
                Seen::Runs(work) if work.recipe.fingerprint().short() == artifact => {
                    let units: Vec<_> = work.units.iter().map(|unit| unit.fingerprint).collect();
                    store.write_plan(&work.recipe, &units)?;
                    return Ok(true);
                }
                Seen::There(artifact_there) if artifact_there.manifest.fingerprint.short() == artifact => return Ok(true),
                _ => {}
            }
        }
    }
    Ok(false)
}
