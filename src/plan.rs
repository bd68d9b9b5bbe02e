//! What a pipeline would do: which steps are there already, which have to run and why, which cannot be known yet.
//!
//! [`check`] is the one place that decides whether a step runs; `plan` and `run` both ask it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use ovenbird_cache::{Artifact, Digest, Fingerprint, Ledger, Recipe, Status, Store, UnitRecord, files_digest, inputs, unit_name};
use ovenbird_stages::{FAILED_FILE, Inputs, OnBadItem, Unit, Units, failed_items, refuse_too_many};
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    event::{self, Event, Stamped, Verdict},
    pipeline::{Pipeline, Source, Step},
};

/// The digested content of every file and folder that a pipeline reads.
pub(crate) type FileInputs = BTreeMap<PathBuf, Vec<inputs::InputFile>>;

/// Hashes what the given steps read from the user's files, each once.
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

/// What is known of an upstream step's artifact.
pub(crate) type Made = BTreeMap<usize, Artifact>;

/// What a look-up came to.
pub(crate) enum Checked {
    /// The artifact is there.
    Reused(Box<Artifact>),
    /// It has to be made.
    Run(Box<Work>),
    /// It has to be made, for these reasons, from the bytes of these steps, which were let go.
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
    /// Places of the units that have to be made.
    pub(crate) missing: Vec<usize>,
    /// How many items there are, or steps of a training, or 1.
    pub(crate) n_made: usize,
    /// And how many outside of dry runs.
    pub(crate) n_whole: usize,
    /// Whether each unit continues the one before.
    pub(crate) is_chain: bool,
    /// Why, in words.
    pub(crate) reasons: Vec<String>,
    /// What it will be to those that read it, where that is known: it was there before.
    pub(crate) was: Option<Artifact>,
}

/// What a step whose inputs are all known is made from, and the files behind its inputs.
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

/// Looks a step up whose inputs are all known. One whose bytes were let go is there unless they are demanded.
pub(crate) fn check(step: &Step, is_demanded: bool, files: &FileInputs, made: &Made, store: &Store, last: &Last) -> Result<Checked> {
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
        reasons = last.reasons(step, &recipe, store)?;
    }
    let sources: Vec<usize> = upstream(step).into_iter().filter(|source| made[source].is_dropped).collect();
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
    reasons.extend(taken_from(step, store, &units, &items, &missing)?);
    Ok(Checked::Run(Box::new(Work { recipe, inputs, units, items, missing, n_made, n_whole, is_chain, reasons, was })))
}

/// Places of the units that have to be made. A link of a chain needs only the one before it, and what does not stay need not be there.
pub(crate) fn missing(step: &Step, store: &Store, units: &[Unit], is_chain: bool) -> Result<Vec<usize>> {
    let mut missing = Vec::new();
    // After the last sound link: where the work on the next missing one begins.
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

/// Says so where more items of an artifact failed than the step allows: another pipeline may have made it.
fn too_many_failed(step: &Step, store: &Store, artifact: &Artifact) -> Result<Option<String>> {
    let OnBadItem::Skip { max_failed_ratio } = step.on_bad_item else { return Ok(None) };
    let n_items: u64 = artifact.manifest.units.iter().map(UnitRecord::n_items).sum();
    let failed = artifact.manifest.units.iter().map(|unit| Ok(failed_items(store, unit)?.len()));
    let n_failed: usize = if n_items == 0 || artifact.is_dropped { 0 } else { failed.sum::<Result<_>>()? };
    let is_too_many = refuse_too_many([n_failed, n_items as usize], max_failed_ratio, "").is_err();
    Ok(is_too_many.then(|| format!("{n_failed} of {n_items} items failed, more than max_failed_ratio {max_failed_ratio} allows")))
}

/// Whether a published unit is what the step asks for: an item may have failed only where the step allows it.
pub(crate) fn is_whole(step: &Step, record: &UnitRecord) -> bool {
    step.on_bad_item != OnBadItem::Fail || !record.files.iter().any(|file| file.name == FAILED_FILE)
}

/// Sets aside the units of some steps of a pipeline, as it was last there, in which items failed; says how many. Their artifacts may come
/// out different and lose their identity.
pub(crate) fn forget_failed(pipeline: &Pipeline, wanted: &[usize], store: &Store) -> Result<usize> {
    let last = Last::of(store, pipeline)?;
    let mut n_set_aside = 0;
    for step in wanted.iter().map(|place| &pipeline.steps[*place]) {
        let Some(fingerprint) = last.steps.get(&step.id) else { continue };
        let Some(manifest) = store.manifest(step.entry.kind, fingerprint)? else { continue };
        let failed: Vec<&UnitRecord> =
            manifest.units.iter().filter(|unit| unit.files.iter().any(|file| file.name == FAILED_FILE)).collect();
        for unit in &failed {
            store.quarantine(&unit_name(step.entry.kind, &unit.key.fingerprint), &["its failed items are tried again".into()])?;
        }
        if !failed.is_empty() {
            store.quarantine_manifest(&store.manifest_path(step.entry.kind, fingerprint), "its failed items are tried again")?;
        }
        n_set_aside += failed.len();
    }
    Ok(n_set_aside)
}

/// Says how many of the items to do other units hold already.
fn taken_from(step: &Step, store: &Store, units: &[Unit], items: &[Digest], missing: &[usize]) -> Result<Option<String>> {
    let Some(family) = units.first().and_then(|unit| unit.family) else { return Ok(None) };
    let wanted: Vec<Digest> = missing.iter().flat_map(|unit| items[units[*unit].items.clone()].iter().copied()).collect();
    let donors = store.donors(step.entry.kind, &family, &wanted.iter().copied().collect(), None)?;
    let n_taken = donors.count(&wanted);
    let names: Vec<String> = donors.names().collect();
    Ok(match names.as_slice() {
        [] => None,
        // What is damaged in a unit that was set aside shows when it is read.
        [name] => Some(format!("{n_taken} of {} items taken from {name} as far as they are sound", wanted.len())),
        [name, rest @ ..] => {
            Some(format!("{n_taken} of {} items taken from {name} and {} more as far as they are sound", wanted.len(), rest.len()))
        }
    })
}

/// Which artifact each step of a pipeline came to when it was last there.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Last {
    pub(crate) pipeline: String,
    /// The pipeline's file; a named one has none. Two of one name are two.
    pub(crate) file: Option<PathBuf>,
    pub(crate) steps: BTreeMap<String, Fingerprint>,
    /// What is wrong with the record, where it was told from the logs instead.
    #[serde(skip)]
    pub(crate) damage: Option<String>,
}

impl Last {
    /// Where it is written in the home.
    pub(crate) fn place(pipeline: &str, file: Option<&Path>) -> String {
        let which = file.map(|file| format!("-{}", &Digest::of(file.as_os_str().as_encoded_bytes()).to_hex()[..8]));
        format!("pipelines/{pipeline}{}.json", which.unwrap_or_default())
    }

    /// What is remembered of a pipeline; by the logs of its runs where the record is damaged or gone.
    pub(crate) fn of(store: &Store, pipeline: &Pipeline) -> Result<Self> {
        let (name, file) = (pipeline.name.as_str(), pipeline.request.file.as_deref());
        match store.kept(&Self::place(name, file)) {
            Ok(Some(last)) => Ok(last),
            Ok(None) => Self::told(store, name, file),
            Err(error @ (ovenbird_cache::Error::OtherFormat { .. } | ovenbird_cache::Error::Read { .. })) => Err(error.into()),
            Err(error) => Ok(Self { damage: Some(error.to_string()), ..Self::told(store, name, file)? }),
        }
    }

    /// What the logs tell of the runs of a pipeline.
    pub(crate) fn told(store: &Store, name: &str, file: Option<&Path>) -> Result<Self> {
        let mut last = Self { pipeline: name.into(), file: file.map(Path::to_owned), ..Self::default() };
        for run in event::runs(store.home()) {
            match event::read_start(store.home(), &run)? {
                Some(Event::RunStarted { pipeline, file: of, is_repair: false, .. }) if pipeline == name && of.as_deref() == file => {}
                _ => continue,
            }
            for Stamped { event, .. } in event::read_log(store.home(), &run)? {
                match event {
                    Event::StepChecked { step, fingerprint, verdict: Verdict::Reused | Verdict::Dropped }
                    | Event::StepDone { step, fingerprint, .. } => drop(last.steps.insert(step, fingerprint)),
                    _ => {}
                }
            }
        }
        Ok(last)
    }

    /// What is remembered of every pipeline of a home. A record that is damaged is a finding of its own.
    pub(crate) fn of_all(store: &Store) -> Result<Vec<Self>> {
        let places = store.record_places()?.into_iter().filter(|place| place.starts_with("pipelines/"));
        Ok(places.filter_map(|place| store.kept(&place).ok().flatten()).collect())
    }

    /// Remembers a step.
    pub(crate) fn remember(&mut self, store: &Store, step: &str, fingerprint: Fingerprint) -> Result<()> {
        let place = Self::place(&self.pipeline, self.file.as_deref());
        let is_new = self.steps.insert(step.to_owned(), fingerprint) != Some(fingerprint);
        let damage = self.damage.take();
        if let Some(why) = &damage {
            store.set_record_aside(&place, why)?;
        }
        if is_new || damage.is_some() { Ok(store.keep(&place, self)?) } else { Ok(()) }
    }

    fn reasons(&self, step: &Step, recipe: &Recipe, store: &Store) -> Result<Vec<String>> {
        let Some(fingerprint) = self.steps.get(&step.id) else { return Ok(vec!["first run".into()]) };
        let Some(was) = store.manifest(step.entry.kind, fingerprint)? else { return Ok(vec!["not in the store any more".into()]) };
        Ok(recipe.diff(&was.recipe).iter().map(ToString::to_string).collect())
    }
}

/// What `plan` says of a step.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outlook {
    /// It is there.
    Reused,
    /// Its bytes were let go, and nothing that would run needs them.
    Dropped,
    /// It will run.
    Run {
        /// Units that need not be made.
        units_done: usize,
        /// All units.
        units_total: usize,
        /// Why.
        reasons: Vec<String>,
    },
    /// Whether it runs depends on what other steps come to; or it runs after them.
    DependsOn {
        /// Their ids.
        steps: Vec<String>,
        /// Why it runs in any case, if it does.
        reasons: Vec<String>,
    },
}

/// What a look at one step came to, without running anything.
pub(crate) enum Seen {
    There(Box<Artifact>),
    Runs(Box<Work>),
    /// It reads from steps that run. Where it is known already that it will, too: why.
    Waits {
        steps: Vec<String>,
        reasons: Vec<String>,
    },
}

/// Looks at every wanted step, in order.
pub(crate) fn look(pipeline: &Pipeline, wanted: &[usize], store: &Store, ledger: Option<&Ledger>) -> Result<BTreeMap<usize, Seen>> {
    let steps: Vec<&Step> = wanted.iter().map(|step| &pipeline.steps[*step]).collect();
    let files = digest_files(&steps, ledger)?;
    let last = Last::of(store, pipeline)?;
    let mut demanded = ends(pipeline, wanted);
    'again: loop {
        let (mut made, mut seen) = (Made::new(), BTreeMap::new());
        for &place in wanted {
            let step = &pipeline.steps[place];
            let unknown = upstream(step).into_iter().filter(|step| !made.contains_key(step));
            let unknown: Vec<String> = unknown.map(|step| pipeline.steps[step].id.clone()).collect();
            let found = if unknown.is_empty() {
                match check(step, demanded.contains(&place), &files, &made, store, &last)? {
                    Checked::Reused(artifact) => {
                        made.insert(place, (*artifact).clone());
                        Seen::There(artifact)
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

/// Says of every step what a run would do, without doing it.
pub(crate) fn outlook(pipeline: &Pipeline, wanted: &[usize], store: &Store, ledger: Option<&Ledger>) -> Result<Vec<(usize, Outlook)>> {
    let outlook = |seen| match seen {
        Seen::There(artifact) if artifact.is_dropped => Outlook::Dropped,
        Seen::There(_) => Outlook::Reused,
        Seen::Runs(work) => {
            let Work { units, missing, reasons, .. } = *work;
            Outlook::Run { units_done: units.len() - missing.len(), units_total: units.len(), reasons }
        }
        Seen::Waits { steps, reasons } => Outlook::DependsOn { steps, reasons },
    };
    Ok(look(pipeline, wanted, store, ledger)?.into_iter().map(|(place, seen)| (place, outlook(seen))).collect())
}

/// The wanted steps that no other wanted step reads from: what a run is for.
pub(crate) fn ends(pipeline: &Pipeline, wanted: &[usize]) -> BTreeSet<usize> {
    let read: BTreeSet<usize> = wanted.iter().flat_map(|step| upstream(&pipeline.steps[*step])).collect();
    wanted.iter().copied().filter(|step| !read.contains(step)).collect()
}

/// The steps that a step reads from, ascending, each once.
pub(crate) fn upstream(step: &Step) -> Vec<usize> {
    let mut steps: Vec<usize> = step
        .inputs
        .values()
        .filter_map(|source| match source {
            Source::Step { step, .. } => Some(*step),
            Source::File(_) => None,
        })
        .collect();
    steps.sort_unstable();
    steps.dedup();
    steps
}

/// The places of the steps that are needed to make some steps, these included.
pub(crate) fn needed(pipeline: &Pipeline, until: &[usize]) -> Vec<usize> {
    let mut needed = until.to_vec();
    let mut next = 0;
    while let Some(&step) = needed.get(next) {
        for source in upstream(&pipeline.steps[step]) {
            if !needed.contains(&source) {
                needed.push(source);
            }
        }
        next += 1;
    }
    needed.sort_unstable();
    needed
}
