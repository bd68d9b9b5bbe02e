//! Which steps of a pipeline can be reused, which have to run and why, and which depend on others.
//!
//! [`check`] alone decides whether a step runs; `plan` and `run` both call it.

pub(crate) mod previous_run;

use std::{collections::BTreeMap, path::PathBuf};

use ovenbird_cache::{Artifact, Digest, Ledger, Recipe, Status, Store, UnitRecord, files_digest, inputs};
use ovenbird_stages::{FAILED_FILE, Inputs, OnBadItem, Unit, Units, count_failed, refuse_too_many};
use serde::Serialize;

use crate::{
    error::Result,
    pipeline::{Pipeline, Source, Step, step_id::StepId},
};
use previous_run::PreviousRun;

/// Every file and folder that a pipeline reads, with digests.
pub(crate) type FileInputs = BTreeMap<PathBuf, Vec<inputs::InputFile>>;

/// Hashes the user's files that some steps read, each once.
pub(crate) fn digest_files(steps: &[&Step], ledger: Option<&Ledger>) -> Result<FileInputs> {
    let now_ns = jiff::Timestamp::now().as_nanosecond();
    let mut files = BTreeMap::new();
    for step in steps {
        for source in step.inputs.values() {
            if let Source::File(path) = source
                && !files.contains_key(path)
            {
                files.insert(path.clone(), inputs::digest_path(path, ledger, now_ns)?);
            }
        }
    }
    Ok(files)
}

/// The artifacts of steps that are done, by place.
pub(crate) type Made = BTreeMap<usize, Artifact>;

/// The result of [`check`].
pub(crate) enum Checked {
    /// The artifact is stored and can be reused.
    Reused(Box<Artifact>),
    /// The step has to run.
    Run(Box<Work>),
    /// The step has to run, for these reasons, and reads from steps whose bytes were dropped.
    Lacks { sources: Vec<usize>, reasons: Vec<String> },
}

/// A step that has to run, with everything the run needs.
pub(crate) struct Work {
    pub(crate) recipe: Recipe,
    pub(crate) inputs: Inputs,
    /// All units.
    pub(crate) units: Vec<Unit>,
    /// Every item; units hold ranges of them.
    pub(crate) items: Vec<Digest>,
    /// Indices of the units that have to be made.
    pub(crate) missing: Vec<usize>,
    /// How many items there are, or steps of a training, or 1.
    pub(crate) n_made: usize,
    /// The same without the limit of a dry run.
    pub(crate) n_whole: usize,
    /// Whether each unit continues the one before.
    pub(crate) is_chain: bool,
    /// Why, in words.
    pub(crate) reasons: Vec<String>,
    /// The artifact as it was before its bytes were dropped or damaged: steps that read from it can be checked already.
    pub(crate) was: Option<Artifact>,
    /// The stored artifact, where the step is computed again by force: it stays until the new one is there.
    pub(crate) stored: Option<Box<Artifact>>,
}

/// The recipe of a step whose inputs are all known, and its input files.
pub(crate) fn identify(step: &Step, files: &FileInputs, made: &Made) -> (Recipe, Inputs) {
    let mut inputs = Inputs::default();
    let mut digests: BTreeMap<String, Digest> = BTreeMap::new();
    for (port, source) in &step.inputs {
        let (found, digest) = match source {
            Source::File(path) => {
                let found = files.get(path).expect("BUG: the files of a step are hashed before it is checked");
                (found.clone(), files_digest(found))
            }
            Source::Step { step, port } => {
                let artifact = made.get(step).expect("BUG: a step is checked after those it reads from");
                (artifact.port(port), artifact.manifest.ports[port])
            }
        };
        inputs.ports.insert(port.clone(), found);
        digests.insert(port.clone(), digest);
    }
    let (kind, version) = (step.entry.kind.to_owned(), step.entry.version);
    (Recipe { kind, version, params: step.stage.params(), inputs: digests }, inputs)
}

/// Checks whether a step has to run, given all its inputs. Dropped bytes are recomputed only where `is_demanded`.
pub(crate) fn check(
    step: &Step,
    is_demanded: bool,
    files: &FileInputs,
    made: &Made,
    store: &Store,
    previous: &PreviousRun,
) -> Result<Checked> {
    let (recipe, inputs) = identify(step, files, made);
    let as_it_was = || store.artifact_as_it_was(step.entry.kind, &recipe.fingerprint());
    let (mut reasons, was) = match store.artifact(step.entry.kind, &recipe.fingerprint())? {
        Status::Valid(artifact) if artifact.is_dropped && is_demanded => {
            (vec!["its bytes were dropped, and are needed".into()], Some(artifact))
        }
        Status::Valid(artifact) if artifact.manifest.units.iter().all(|unit| is_whole(step, unit)) => {
            match too_many_failed(step, store, &artifact)? {
                None => return Ok(Checked::Reused(Box::new(artifact))),
                Some(words) => (vec![words], None),
            }
        }
        Status::Valid(_) => (vec!["some items failed, which `on_bad_item: fail` does not allow".into()], None),
        Status::Damaged(findings) => (findings.into_iter().map(|finding| format!("damaged: {finding}")).collect(), as_it_was()),
        Status::Absent => (Vec::new(), None),
    };
    if reasons.is_empty() {
        reasons = previous.reasons(step, &recipe, store)?;
    }
    let sources: Vec<usize> = step.upstream().into_iter().filter(|source| made[source].is_dropped).collect();
    if !sources.is_empty() {
        return Ok(Checked::Lacks { sources, reasons });
    }
    let mut divided = step.stage.units(&inputs)?;
    let is_chain = matches!(divided, Units::Chain { .. });
    let n_whole = divided.count();
    if let Some(most) = step.most_items {
        divided.truncate(most);
    }
    let n_made = divided.count();
    let (units, items) = divided.of(&recipe);
    let missing = missing(step, store, &units, is_chain)?;
    reasons.extend(reused_items(step, store, &units, &items, &missing)?);
    Ok(Checked::Run(Box::new(Work { recipe, inputs, units, items, missing, n_made, n_whole, is_chain, reasons, was, stored: None })))
}

/// The work of a step whose artifact is stored, to compute it again by force.
pub(crate) fn anew(step: &Step, files: &FileInputs, made: &Made, stored: Box<Artifact>) -> Result<Checked> {
    let sources: Vec<usize> = step.upstream().into_iter().filter(|source| made[source].is_dropped).collect();
    let reasons = vec!["forced (`--force`)".to_owned()];
    if !sources.is_empty() {
        return Ok(Checked::Lacks { sources, reasons });
    }
    let (recipe, inputs) = identify(step, files, made);
    let divided = step.stage.units(&inputs)?;
    let (is_chain, n_made) = (matches!(divided, Units::Chain { .. }), divided.count());
    let (units, items) = divided.of(&recipe);
    let missing = (0..units.len()).collect();
    let stored = Some(stored);
    Ok(Checked::Run(Box::new(Work {
        recipe,
        inputs,
        units,
        items,
        missing,
        n_made,
        n_whole: n_made,
        is_chain,
        reasons,
        was: None,
        stored,
    })))
}

/// Indices of the units that have to be made. In a chain, a checkpoint needs only the one before it, and those that are not kept may be
/// missing.
pub(crate) fn missing(step: &Step, store: &Store, units: &[Unit], is_chain: bool) -> Result<Vec<usize>> {
    let mut missing = Vec::new();
    // The unit after the last sound checkpoint: work on the next missing one begins there.
    let mut begin = 0;
    for unit in units {
        let is_there = match store.unit(step.entry.kind, &unit.fingerprint)? {
            Status::Valid(record) => is_whole(step, &record),
            Status::Absent | Status::Damaged(_) => false,
        };
        match (is_there, is_chain) {
            (false, true) if unit.stays => return Ok((begin..units.len()).collect()),
            (false, false) => missing.push(unit.index),
            (true, _) => begin = unit.index + 1,
            (false, true) => {}
        }
    }
    Ok(missing)
}

/// A reason to run, where more items of an artifact failed than the step allows: another pipeline may have made it.
fn too_many_failed(step: &Step, store: &Store, artifact: &Artifact) -> Result<Option<String>> {
    let OnBadItem::Skip { max_failed_ratio } = step.on_bad_item else { return Ok(None) };
    if artifact.is_dropped {
        return Ok(None);
    }
    let units = &artifact.manifest.units;
    let n_items: u64 = units.iter().map(UnitRecord::n_items).sum();
    let ([n_failed, n_items], _) = count_failed(store, units, n_items as usize)?;
    let is_too_many = refuse_too_many([n_failed, n_items], max_failed_ratio, "").is_err();
    Ok(is_too_many.then(|| format!("{n_failed} of {n_items} items failed, more than max_failed_ratio {max_failed_ratio} allows")))
}

/// Whether a step accepts a published unit: an item may have failed only with `on_bad_item: skip`.
pub(crate) fn is_whole(step: &Step, record: &UnitRecord) -> bool {
    step.on_bad_item != OnBadItem::Fail || !record.files.iter().any(|file| file.name == FAILED_FILE)
}

/// How many of the missing items other units hold already, in words.
fn reused_items(step: &Step, store: &Store, units: &[Unit], items: &[Digest], missing: &[usize]) -> Result<Option<String>> {
    let Some(item_key) = units.first().and_then(|unit| unit.item_key) else { return Ok(None) };
    let wanted: Vec<Digest> = missing.iter().flat_map(|unit| items[units[*unit].items.clone()].iter().copied()).collect();
    let reusable = store.reusable_items(step.entry.kind, &item_key, &wanted.iter().copied().collect(), None)?;
    let n_taken = reusable.count(&wanted);
    let names: Vec<String> = reusable.names().collect();
    // Damage in a unit that was set aside shows when it is read.
    let copied = |from: &str| format!("{n_taken} of {} items copied from {from} after checking", wanted.len());
    Ok(match names.as_slice() {
        [] => None,
        [name] => Some(copied(name)),
        names => Some(copied(&format!("{} earlier units", names.len()))),
    })
}

/// What `plan` prints about a step.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outlook {
    /// Its artifact is stored.
    Reused,
    /// Its bytes were dropped, and no step that would run needs them.
    Dropped,
    /// It will run.
    Run {
        /// Units that are stored already.
        units_done: usize,
        /// All units.
        units_total: usize,
        /// Why.
        reasons: Vec<String>,
    },
    /// Whether it runs depends on the results of other steps; or it runs after them.
    DependsOn {
        /// Their ids.
        steps: Vec<StepId>,
        /// Why it runs in any case; empty where that is not known.
        reasons: Vec<String>,
    },
}

impl Outlook {
    pub(crate) fn of(seen: Seen) -> Self {
        match seen {
            Seen::Stored(artifact) if artifact.is_dropped => Self::Dropped,
            Seen::Stored(_) => Self::Reused,
            Seen::Runs(work) => {
                let Work { units, missing, reasons, .. } = *work;
                Self::Run { units_done: units.len() - missing.len(), units_total: units.len(), reasons }
            }
            Seen::Waits { steps, reasons } => Self::DependsOn { steps, reasons },
        }
    }
}

/// The state of one step, found without running anything.
pub(crate) enum Seen {
    Stored(Box<Artifact>),
    Runs(Box<Work>),
    /// It reads from steps that run. The reasons are given where it will run in any case.
    Waits {
        steps: Vec<StepId>,
        reasons: Vec<String>,
    },
}

/// Checks every wanted step, in order, without running anything.
pub(crate) fn look(pipeline: &Pipeline, wanted: &[usize], store: &Store, ledger: Option<&Ledger>) -> Result<BTreeMap<usize, Seen>> {
    let steps: Vec<&Step> = wanted.iter().map(|step| &pipeline.steps[*step]).collect();
    let files = digest_files(&steps, ledger)?;
    let previous = PreviousRun::of(store, pipeline)?;
    let mut demanded = pipeline.ends(wanted);
    'again: loop {
        let (mut made, mut seen) = (Made::new(), BTreeMap::new());
        for &place in wanted {
            let step = &pipeline.steps[place];
            let unknown = step.upstream().into_iter().filter(|step| !made.contains_key(step));
            let unknown: Vec<StepId> = unknown.map(|step| pipeline.steps[step].id.clone()).collect();
            let found = if unknown.is_empty() {
                match check(step, demanded.contains(&place), &files, &made, store, &previous)? {
                    Checked::Reused(artifact) => {
                        made.insert(place, (*artifact).clone());
                        Seen::Stored(artifact)
                    }
                    Checked::Run(work) => {
                        made.extend(work.was.clone().map(|artifact| (place, artifact)));
                        Seen::Runs(work)
                    }
                    Checked::Lacks { sources, reasons } => {
                        let n_demanded = demanded.len();
                        demanded.extend(&sources);
                        if demanded.len() > n_demanded {
                            continue 'again;
                        }
                        Seen::Waits { steps: sources.into_iter().map(|step| pipeline.steps[step].id.clone()).collect(), reasons }
                    }
                }
            } else {
                Seen::Waits { steps: unknown, reasons: Vec::new() }
            };
            seen.insert(place, found);
        }
        return Ok(seen);
    }
}
