//! Repairs what a scan found: sets damaged units aside and runs their steps again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ovenbird_cache::{
    Fingerprint, Manifest, Status, Store,
    verify::{Class, Depth, Finding},
};

use super::{
    records::{self, Outcome},
    report::{Lost, Report, VerifyOptions},
};
use crate::{
    commands::predict,
    error::{Error, Result},
    event::{self, Event},
    pipeline::step_id::StepId,
    plan::previous_run::PreviousRun,
    progress::RunProgress,
    request::{read_request, request_path},
    run::{self, Ended, local::Options},
};

/// Sets damaged and wrong results aside, recomputes them, and checks them again. Everything else stays as it is.
pub(super) fn repair(store: &Store, options: &VerifyOptions, report: &mut Report) -> Result<()> {
    let manifests = store.manifests()?;
    let is_record = |finding: &&Finding| finding.class == Class::Record;
    // The home's format first: the home cannot be opened without it.
    let mut records: Vec<Finding> = report.findings.iter().filter(is_record).cloned().collect();
    records.sort_by_key(|finding| !finding.path.ends_with("format.json"));
    for finding in records {
        let what = finding.path.display().to_string();
        match records::repair(store, &finding) {
            Ok(Outcome::Repaired(how)) => report.repaired.push(format!("{what}: {how}")),
            Ok(Outcome::Lost(why)) => report.lost.push(Lost { what, why }),
            Err(error) => report.lost.push(Lost { what, why: error.message() }),
        }
    }
    let (_session, _swept) = store.enter()?;
    let mut bad_units: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // Names of artifacts to recompute.
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for finding in &report.findings {
        match (finding.class, &finding.unit) {
            (Class::Damaged | Class::Wrong | Class::Missing, Some(unit)) => {
                bad_units.entry(unit.clone()).or_default().push(format!("{}: {}", finding.path.display(), finding.problem));
            }
            (Class::Choice, _) => drop(store.publisher().set_aside(&finding.path, &store.home().join("quarantine").join("choices"))?),
            (Class::Foreign, _) => drop(store.publisher().set_aside(&finding.path, &store.home().join("quarantine").join("foreign"))?),
            (Class::Part, _) => {
                if let Some(part) = store.part_of(&finding.path) {
                    store.set_part_aside(&part, &finding.problem)?;
                }
            }
            (Class::Manifest | Class::Tainted, _) => {
                // If the artifact does not change, it is published again from its units.
                store.quarantine_manifest(&finding.path, &finding.problem)?;
                wanted.extend(finding.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
            }
            (Class::Input, _) => {
                let why = format!("{}; restore the file: no other copy is known", finding.problem);
                report.lost.push(Lost { what: finding.path.display().to_string(), why });
            }
            (Class::Damaged | Class::Wrong | Class::Missing | Class::Record | Class::Leftover | Class::Ledger | Class::Suspect, _) => {}
        }
    }
    for (unit, problems) in &bad_units {
        let is_wrong = report.findings.iter().any(|finding| finding.class == Class::Wrong && finding.unit.as_ref() == Some(unit));
        match store.lease(unit)? {
            Err(holder) => {
                let why = format!("{} is computing it; verify again later", holder.words());
                report.lost.push(Lost { what: unit.clone(), why });
            }
            Ok(_lease) => {
                let aside = if is_wrong { store.condemn(unit, problems)? } else { store.quarantine(unit, problems)? };
                if aside.is_none() {
                    store.note_gone(unit, &problems.join("; "))?;
                }
            }
        }
        for manifest in manifests.iter().filter(|manifest| manifest.unit_names().any(|listed| listed == *unit)) {
            wanted.insert(manifest.fingerprint.short());
            // The correct content has another digest: steps that read it have to run again.
            if is_wrong {
                let path = store.manifest_path(&manifest.recipe.kind, &manifest.fingerprint);
                store.quarantine_manifest(&path, &format!("the content of its unit {unit} is wrong"))?;
            }
        }
    }
    // Predictions belong to no run: the next one computes what is missing.
    let is_wanted = |manifest: &&Manifest| manifest.made.run == predict::RUN && wanted.contains(&manifest.fingerprint.short());
    let predicted: Vec<&Manifest> = manifests.iter().filter(is_wanted).collect();
    for Manifest { recipe, fingerprint, .. } in predicted {
        wanted.remove(&fingerprint.short());
        store.quarantine_manifest(&store.manifest_path(&recipe.kind, fingerprint), "a unit of a prediction is damaged")?;
    }
    for (run, steps) in runs_of(store, &wanted, &mut report.lost) {
        let made = read_request(store, &run).and_then(|pipeline| {
            let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| steps.contains(&pipeline.steps[*place].id)).collect();
            let needed = pipeline.needed(&places);
            let mut progress = RunProgress::new();
            run::run(&Arc::new(pipeline), &needed, store, &Options { is_repair: true, ..options.run.clone() }, &mut |event| {
                progress.show(event);
            })
        });
        match made {
            // Nothing is lost: what was set aside is found missing by the next check, and recomputed.
            Ok(Ended { error: Some(Error::Interrupted), .. }) => return Err(Error::Interrupted),
            Ok(ended) => {
                if let Some(error) = ended.error {
                    report.lost.push(Lost { what: format!("{} of run {run}", names(&steps)), why: error.message() });
                }
            }
            Err(error) => report.lost.push(Lost { what: format!("{} of run {run}", names(&steps)), why: error.message() }),
        }
    }
    // Check again what was damaged.
    let listed_now: BTreeSet<String> = store.manifests()?.iter().flat_map(Manifest::unit_names).collect();
    for unit in bad_units.keys() {
        let listed = manifests.iter().flat_map(|manifest| {
            let kind = &manifest.recipe.kind;
            manifest.units.iter().filter(move |listed| ovenbird_cache::unit_name(kind, &listed.key.fingerprint) == *unit)
        });
        let before = listed.into_iter().next().map(|listed| listed.files.clone());
        let still = store.verify_unit(unit, options.depth.max(Depth::Full), &|_| {})?;
        if let Some(finding) = still.iter().find(|finding| finding.class == Class::Wrong) {
            let why = format!("recomputed, and wrong again: {}; check its inputs", finding.problem);
            report.lost.push(Lost { what: unit.clone(), why });
            continue;
        }
        let still_bad = still.iter().any(|finding| finding.class == Class::Damaged);
        match (store.unit_at(unit)?, before) {
            (Status::Valid(now), Some(before)) if !still_bad && now.files == before => {
                report.repaired.push(format!("{unit}: recomputed, with the same digests"));
            }
            (Status::Valid(_), Some(_)) if !still_bad => report.repaired.push(format!("{unit}: recomputed, with other digests")),
            (Status::Valid(_), None) if !still_bad => report.repaired.push(format!("{unit}: is sound again")),
            // Computed from corrected inputs, it has another name now.
            (Status::Absent, _) if !listed_now.contains(unit) => report.repaired.push(format!("{unit}: set aside; no artifact needs it")),
            _ => {
                let why = "could not be recomputed; results that depend on it cannot be read".to_owned();
                report.lost.push(Lost { what: unit.clone(), why });
            }
        }
    }
    Ok(())
}

/// The runs to repeat to recompute some artifacts, with the steps of each: for every pipeline that currently has an artifact, its latest
/// run with it; otherwise the latest run of any pipeline.
fn runs_of(store: &Store, wanted: &BTreeSet<String>, lost: &mut Vec<Lost>) -> BTreeMap<String, BTreeSet<StepId>> {
    let latest = PreviousRun::of_all(store).unwrap_or_default().into_iter();
    let now: BTreeMap<String, BTreeMap<StepId, Fingerprint>> =
        latest.map(|run| (PreviousRun::path(&run.pipeline, run.file.as_deref()), run.steps)).collect();
    // By artifact, the latest first: run, pipeline, step, and whether the pipeline currently has the artifact in this step.
    let mut had: BTreeMap<String, Vec<(String, String, StepId, bool)>> = BTreeMap::new();
    for run in event::runs(store.home()).into_iter().rev().filter(|run| store.home().join(request_path(run)).exists()) {
        let mut pipeline = String::new();
        for stamped in event::read_log(store.home(), &run).unwrap_or_default() {
            match stamped.event {
                Event::RunStarted { pipeline: name, file, .. } => pipeline = PreviousRun::path(&name, file.as_deref()),
                Event::StepChecked { step, fingerprint, .. } if wanted.contains(&fingerprint.short()) => {
                    let is_now = now.get(&pipeline).and_then(|steps| steps.get(&step)) == Some(&fingerprint);
                    had.entry(fingerprint.short()).or_default().push((run.clone(), pipeline.clone(), step, is_now));
                }
                _ => {}
            }
        }
    }
    let mut runs: BTreeMap<String, BTreeSet<StepId>> = BTreeMap::new();
    for artifact in wanted {
        let Some(candidates) = had.get(artifact) else {
            let why = "no recorded run computed it; run its pipeline again".to_owned();
            lost.push(Lost { what: format!("artifact {artifact}"), why });
            continue;
        };
        let mut pipelines = BTreeSet::new();
        let now = candidates.iter().filter(|(_, pipeline, step, is_now)| *is_now && pipelines.insert((pipeline, step)));
        let mut chosen: Vec<_> = now.collect();
        chosen.extend(candidates.first().filter(|_| chosen.is_empty()));
        for (run, _, step, _) in chosen {
            runs.entry(run.clone()).or_default().insert(step.clone());
        }
    }
    runs
}

/// Ids of steps in one line.
fn names(steps: &BTreeSet<StepId>) -> String {
    steps.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
