//! `ovenbird cache`: what takes space, what may go, and an index that can be made anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::HumanBytes;
use jiff::Timestamp;
use ovenbird_cache::{
    Ledger, Manifest, Status, Store,
    verify::{Class, Depth, Finding},
};
use ovenbird_stages::{Artifact as _, artifacts::EvaluationFile, find};
use serde::{Deserialize, Serialize};

use crate::{
    cli::{print, to_json},
    error::{Error, Result, count},
    event::{self, Event, Stamped},
    history,
    plan::Last,
    screen::{Phase, duration},
};

/// How much work a collection may throw away unasked, in s.
const UNASKED_S: f64 = 3600.0;

/// What a kind of stage takes.
#[derive(Debug, Default, Serialize)]
struct Taken {
    units: usize,
    bytes: u64,
    /// In units that an artifact of a pipeline as it stands needs.
    needed_bytes: u64,
}

fn opened(home: &Path) -> Result<Store> {
    if home.exists() {
        return Ok(Store::open(home)?);
    }
    let problem = format!("{}: there is no home here", home.display());
    Err(Error::Usage { problem, hint: "name it with `--home FOLDER`".into() })
}

/// A pinned run, as it is written.
#[derive(Debug, Serialize, Deserialize)]
struct Pin {
    run: String,
    /// The artifacts that it used when it was pinned, by their names of 32 digits.
    artifacts: BTreeSet<String>,
}

fn pin_place(run: &str) -> String {
    format!("pins/{run}.json")
}

/// What the runs of a home did, told from their logs.
#[derive(Default)]
struct Told {
    /// Of each run, oldest first: its id, its pipeline, when it began, whether it has ended, and the artifacts that it came to.
    runs: Vec<RunTold>,
    /// Of each artifact, by its name: the run and step that worked on it last, and for how long all runs did, in s.
    made: BTreeMap<String, Made>,
}

struct RunTold {
    id: String,
    pipeline: (String, Option<PathBuf>),
    started: Option<Timestamp>,
    /// Whether it made again what was damaged, as `verify --fix` does.
    is_repair: bool,
    has_ended: bool,
    artifacts: BTreeSet<String>,
}

#[derive(Clone, Default)]
struct Made {
    run: String,
    step: String,
    /// Where the pipeline keeps what it came to.
    last: String,
    worked_s: f64,
}

impl Told {
    fn of(store: &Store) -> Result<Self> {
        let mut told = Self::default();
        for id in event::runs(store.home()) {
            let log = event::read_log(store.home(), &id)?;
            let mut run = RunTold {
                id,
                pipeline: Default::default(),
                started: log.first().map(|first| first.at),
                is_repair: false,
                has_ended: false,
                artifacts: BTreeSet::new(),
            };
            let mut working: BTreeMap<String, (String, Option<Timestamp>)> = BTreeMap::new();
            for Stamped { at, event } in &log {
                match event {
                    Event::RunStarted { pipeline, file, is_repair, .. } => {
                        (run.pipeline, run.is_repair) = ((pipeline.clone(), file.clone()), *is_repair);
                    }
                    Event::StepChecked { step, fingerprint, .. } => {
                        run.artifacts.insert(fingerprint.short());
                        working.insert(step.clone(), (fingerprint.short(), None));
                    }
                    Event::StepStarted { step } => drop(working.get_mut(step).map(|(_, since)| *since = Some(*at))),
                    Event::StepDone { step, .. } | Event::StepFailed { step, .. } => {
                        if let Some((artifact, Some(since))) = working.remove(step) {
                            told.worked(&run, step, artifact, since, *at);
                        }
                    }
                    Event::RunEnded { .. } => run.has_ended = true,
                    _ => {}
                }
            }
            // Of a run that was cut off: until the last that was heard of it.
            let end = log.last().map(|last| last.at);
            for (step, (artifact, since)) in working {
                if let (Some(since), Some(end)) = (since, end) {
                    told.worked(&run, &step, artifact, since, end);
                }
            }
            told.runs.push(run);
        }
        Ok(told)
    }

    fn worked(&mut self, run: &RunTold, step: &str, artifact: String, since: Timestamp, until: Timestamp) {
        let made = self.made.entry(artifact).or_default();
        made.worked_s += (until.as_millisecond() - since.as_millisecond()) as f64 / 1e3;
        (made.run, made.step) = (run.id.clone(), step.to_owned());
        made.last = Last::place(&run.pipeline.0, run.pipeline.1.as_deref());
    }
}

/// The artifacts that must stay, by their names of 32 digits.
struct Roots {
    /// Of runs going on and of pinned ones.
    in_use: BTreeSet<String>,
    /// These; of every pipeline as it was last there; of every pipeline's last run; of the last so many runs and of those of so long.
    all: BTreeSet<String>,
}

/// Which runs are recent.
struct Recent {
    n_runs: usize,
    within: Duration,
}

fn roots(store: &Store, told: &Told, recent: &Recent) -> Result<Roots> {
    let last = Last::of_all(store)?.into_iter().flat_map(|last| last.steps.into_values());
    let mut roots = Roots { in_use: BTreeSet::new(), all: last.map(|fingerprint| fingerprint.short()).collect() };
    let mut pinned = BTreeSet::new();
    for place in store.record_places()?.iter().filter(|place| place.starts_with("pins/")) {
        if let Some(Pin { run, artifacts }) = store.kept(place)? {
            pinned.insert(run);
            roots.in_use.extend(artifacts);
        }
    }
    let is_somebody_at_work = !store.at_work().is_empty();
    let mut seen_pipelines = BTreeSet::new();
    for (age, run) in told.runs.iter().rev().enumerate() {
        let is_last = !run.is_repair && seen_pipelines.insert(&run.pipeline);
        let is_young = run.started.is_none_or(|started| {
            let ago_s = Timestamp::now().as_second() - started.as_second();
            ago_s < i64::try_from(recent.within.as_secs()).unwrap_or(i64::MAX)
        });
        if (!run.has_ended && is_somebody_at_work) || pinned.contains(&run.id) {
            roots.in_use.extend(run.artifacts.iter().cloned());
        }
        if age < recent.n_runs || is_young || is_last {
            roots.all.extend(run.artifacts.iter().cloned());
        }
    }
    roots.all.extend(roots.in_use.iter().cloned());
    Ok(roots)
}

/// The units of some artifacts, made or in the making, as `KIND/FINGERPRINT`.
fn units_of(store: &Store, artifacts: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let planned = store.plans()?.into_iter().filter(|(artifact, _)| artifacts.contains(artifact));
    let mut units: BTreeSet<String> = planned.flat_map(|(_, units)| units).collect();
    for manifest in store.manifests()? {
        if artifacts.contains(&manifest.fingerprint.short()) {
            units.extend(manifest.unit_names());
        }
    }
    Ok(units)
}

/// `ovenbird cache pin`: what a run used is kept by `gc` until it is unpinned.
pub(crate) fn pin(home: &Path, run: &str) -> Result<()> {
    let store = opened(home)?;
    let run = history::chosen(home, Some(run))?;
    write_pin(&store, &run)?;
    print(&format!("run {run} is pinned: `ovenbird cache gc` keeps what it used\n"))
}

/// Writes a pin from a run's log.
pub(crate) fn write_pin(store: &Store, run: &str) -> Result<()> {
    let n_damaged = event::log_damage(store.home(), run)?;
    if n_damaged > 0 {
        let path = store.home().join(event::log_place(run));
        let problem = format!("{} damaged: what the run used is not known", count(n_damaged, "line"));
        return Err(Error::Unkept { findings: vec![Finding { class: Class::Record, unit: None, path, problem }] });
    }
    let steps = history::state(&event::read_log(store.home(), run)?).steps;
    let artifacts = steps.iter().filter_map(|step| step.fingerprint.map(|fingerprint| fingerprint.short())).collect();
    Ok(store.keep(&pin_place(run), &Pin { run: run.into(), artifacts })?)
}

/// `ovenbird cache unpin`.
pub(crate) fn unpin(home: &Path, run: &str) -> Result<()> {
    let store = opened(home)?;
    // A pin may outlive its run.
    let is_pinned = store.home().join(pin_place(run)).exists();
    let run = if is_pinned { run.to_owned() } else { history::chosen(home, Some(run))? };
    store.remove_record(&pin_place(&run), "unpinned")?;
    print(&format!("run {run} is not pinned any more\n"))
}

/// `ovenbird cache du`.
pub(crate) fn du(home: &Path, json: bool) -> Result<()> {
    let store = opened(home)?;
    let roots = roots(&store, &Told::of(&store)?, &Recent { n_runs: 0, within: Duration::ZERO })?;
    let needed = units_of(&store, &roots.all)?;
    let mut by_kind: BTreeMap<String, Taken> = BTreeMap::new();
    for name in store.unit_names()? {
        let kind = name.split_once('/').map_or_else(String::new, |(kind, _)| kind.to_owned());
        let bytes = bytes_below(&store.unit_path(&name));
        let taken = by_kind.entry(kind).or_default();
        (taken.units, taken.bytes) = (taken.units + 1, taken.bytes + bytes);
        taken.needed_bytes += if needed.contains(&name) { bytes } else { 0 };
    }
    let quarantine = bytes_below(&home.join("quarantine"));
    if json {
        return print(&to_json("du", &serde_json::json!({"kinds": by_kind, "quarantine_bytes": quarantine})));
    }
    let human = |bytes: u64| HumanBytes(bytes).to_string();
    let mut text = format!("{:24} {:>8} {:>12} {:>12}\n", "stage", "units", "size", "not needed");
    let (mut all, mut free) = (0, 0);
    for (kind, Taken { units, bytes, needed_bytes }) in &by_kind {
        text.push_str(&format!("{kind:24} {units:>8} {:>12} {:>12}\n", human(*bytes), human(bytes - needed_bytes)));
        (all, free) = (all + bytes, free + bytes - needed_bytes);
    }
    text.push_str(&format!("{:24} {:>8} {:>12} {:>12}\n", "all", "", human(all), human(free)));
    if quarantine > 0 {
        text.push_str(&format!("{:24} {:>8} {:>12}\n", "quarantine", "", human(quarantine)));
    }
    if free > 0 {
        text.push_str("`ovenbird cache gc` says what would go, `ovenbird cache gc --delete` removes it\n");
    }
    print(&text)
}

fn bytes_below(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// What `gc` is to do.
pub(crate) struct Collection {
    /// Keep what the last so many runs used.
    pub(crate) keep_runs: usize,
    /// Keep what runs of so long used.
    pub(crate) keep_for: Duration,
    /// Keep what is younger.
    pub(crate) grace: Duration,
    /// Kinds of stages of which also the units go that pipelines need, unless they are in use.
    pub(crate) dropped_kinds: Vec<String>,
    /// Remove; otherwise only say what would go.
    pub(crate) is_real: bool,
    /// Remove also what takes long to make again.
    pub(crate) is_sure: bool,
    pub(crate) json: bool,
}

/// An artifact of which units go.
#[derive(Serialize)]
struct Going {
    artifact: String,
    kind: String,
    step: Option<String>,
    run: String,
    /// What was changed since: the parameters and inputs of the pipeline's step as it was last there.
    changed: Vec<String>,
    units: usize,
    bytes: u64,
    /// To make it again.
    hours: f64,
}

/// `ovenbird cache gc`.
pub(crate) fn gc(home: &Path, collection: &Collection) -> Result<()> {
    let store = opened(home)?;
    if let Some(unknown) = collection.dropped_kinds.iter().find(|kind| find(kind).is_none()) {
        let hint = "`ovenbird cache du` lists the kinds that are there".into();
        return Err(Error::Usage { problem: format!("--drop {unknown}: there is no such stage"), hint });
    }
    refuse_if_damaged(&store)?;
    let told = Told::of(&store)?;
    let roots = roots(&store, &told, &Recent { n_runs: collection.keep_runs, within: collection.keep_for })?;
    let manifests = store.manifests()?;
    let name = |manifest: &Manifest| manifest.fingerprint.short();
    let path = |manifest: &Manifest| store.manifest_path(&manifest.recipe.kind, &manifest.fingerprint);
    let is_old = |path: &Path| {
        let age = fs::metadata(path).and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
        age.is_some_and(|age| age >= collection.grace)
    };
    let is_dropped =
        |manifest: &Manifest| collection.dropped_kinds.contains(&manifest.recipe.kind) && !roots.in_use.contains(&name(manifest));
    // Numbers are what people compare, and take no room.
    let is_evaluation = |manifest: &Manifest| {
        let outputs = find(&manifest.recipe.kind).into_iter().flat_map(|entry| entry.outputs);
        outputs.into_iter().any(|port| port.kind == EvaluationFile::KIND)
    };
    let stays = |manifest: &Manifest| roots.all.contains(&name(manifest)) || is_evaluation(manifest) || !is_old(&path(manifest));
    let (dropped, rest): (Vec<&Manifest>, Vec<&Manifest>) = manifests.iter().partition(|manifest| is_dropped(manifest));
    let (kept, forgotten): (Vec<&Manifest>, Vec<&Manifest>) = rest.into_iter().partition(|manifest| stays(manifest));
    let goes: BTreeSet<String> = dropped.iter().map(|manifest| name(manifest)).collect();
    let in_the_making = roots.all.difference(&goes).cloned();
    let needed = units_of(&store, &kept.iter().map(|manifest| name(manifest)).chain(in_the_making).collect())?;
    let mut phase = Phase::new("gc");
    let mut going: BTreeMap<String, u64> = BTreeMap::new();
    for (n_done, unit) in store.unit_names()?.into_iter().enumerate() {
        phase.tell(n_done as u64, 0, "units");
        let path = store.unit_path(&unit);
        if !needed.contains(&unit) && is_old(&path) {
            going.insert(unit, bytes_below(&path));
        }
    }
    let list = listed(&store, &told, &going, dropped.iter().chain(&forgotten).copied())?;
    let hours: f64 = list.iter().map(|going| going.hours).sum();
    let mut left_alone = 0;
    if collection.is_real {
        if hours * 3600.0 > UNASKED_S && !collection.is_sure {
            let problem = format!("what would go took {} to make", duration(hours * 3600.0));
            return Err(Error::Usage {
                problem,
                hint: "look at the list, without `--delete`; add `--yes` to remove it all the same".into(),
            });
        }
        let (_session, _recovered) = store.enter()?;
        // Records first, bytes after: cut off in between, nothing that a record lists is gone.
        for manifest in dropped {
            store.let_go(manifest.clone())?;
        }
        for manifest in forgotten {
            store.remove_record(&store.place_of(&path(manifest)), "removed by `cache gc`")?;
        }
        for unit in going.keys() {
            match store.lease(unit)? {
                Ok(_lease) => store.remove_unit(unit, "removed by `cache gc`")?,
                Err(_) => left_alone += 1,
            }
        }
    }
    let bytes: u64 = going.values().sum();
    if collection.json {
        let units: Vec<&String> = going.keys().collect();
        let report = serde_json::json!({"removed": collection.is_real, "artifacts": list, "units": units, "bytes": bytes, "hours": hours});
        return print(&to_json("gc", &report));
    }
    print(&words(collection, &list, &going, left_alone))
}

/// Fails where something is damaged or gone that says what is to be kept: what it said would be taken for what nobody needs.
fn refuse_if_damaged(store: &Store) -> Result<()> {
    let mut findings = store.misplaced()?;
    if !findings.is_empty() {
        return Err(Error::Unkept { findings });
    }
    findings.extend(store.verify_records()?);
    for path in store.manifest_paths()? {
        findings.extend(store.verify_manifest(&path)?.into_iter().filter(|finding| finding.class == Class::Manifest));
    }
    if findings.is_empty() { Ok(()) } else { Err(Error::Unkept { findings }) }
}

/// The artifacts of which units go, those that took longest first.
fn listed<'a>(
    store: &Store,
    told: &Told,
    going: &BTreeMap<String, u64>,
    manifests: impl Iterator<Item = &'a Manifest>,
) -> Result<Vec<Going>> {
    let mut list = Vec::new();
    for manifest in manifests {
        let units: Vec<u64> = manifest.unit_names().filter_map(|unit| going.get(&unit).copied()).collect();
        if units.is_empty() {
            continue;
        }
        let made = told.made.get(&manifest.fingerprint.short());
        let worked_s = made.map_or(0.0, |made| made.worked_s).max(manifest.made.wall_s);
        let last = made.and_then(|made| store.kept::<Last>(&made.last).ok()?);
        let is_now = made.zip(last).and_then(|(made, last)| last.steps.get(&made.step).copied());
        let now = is_now.and_then(|fingerprint| store.manifest(&manifest.recipe.kind, &fingerprint).ok()?);
        list.push(Going {
            artifact: manifest.fingerprint.short(),
            kind: manifest.recipe.kind.clone(),
            step: made.map(|made| made.step.clone()),
            run: manifest.made.run.clone(),
            changed: now.map_or_else(Vec::new, |now| now.recipe.diff(&manifest.recipe).iter().map(ToString::to_string).collect()),
            units: units.len(),
            bytes: units.iter().sum(),
            hours: worked_s / 3600.0 * units.len() as f64 / manifest.units.len() as f64,
        });
    }
    list.sort_by(|a, b| b.hours.total_cmp(&a.hours).then_with(|| a.artifact.cmp(&b.artifact)));
    Ok(list)
}

fn words(collection: &Collection, list: &[Going], going: &BTreeMap<String, u64>, left_alone: usize) -> String {
    let mut text = String::new();
    for Going { kind, step, run, changed, units, bytes, hours, .. } in list {
        let changed = if changed.is_empty() { String::new() } else { format!("; changed since: {}", changed.join("; ")) };
        text.push_str(&format!(
            "{} ({kind}) of run {run}: {}, {}, {} to make again{changed}\n",
            step.as_deref().unwrap_or("a step"),
            count(*units, "unit"),
            HumanBytes(*bytes),
            duration(hours * 3600.0),
        ));
    }
    let n_others = going.len().saturating_sub(list.iter().map(|going| going.units).sum());
    if n_others > 0 {
        text.push_str(&format!("{} of no artifact\n", count(n_others, "unit")));
    }
    let (what, bytes) = (count(going.len(), "unit"), HumanBytes(going.values().sum()));
    match (collection.is_real, going.is_empty()) {
        (_, true) => text.push_str("nothing to remove\n"),
        (true, false) => text.push_str(&format!("{what} removed, {bytes}\n")),
        (false, false) => text.push_str(&format!("{what} would go, {bytes}; `ovenbird cache gc --delete` removes them\n")),
    }
    if left_alone > 0 {
        text.push_str(&format!("{} in use, left alone\n", count(left_alone, "unit")));
    }
    text
}

/// `ovenbird cache rebuild`: the ledger made anew from what lies on the disk.
pub(crate) fn rebuild(home: &Path) -> Result<()> {
    let store = opened(home)?;
    let ledger = Ledger::of(&store);
    ledger.forget()?;
    let mut phase = Phase::new("rebuild");
    let (mut sound, mut n_bad) = (Vec::new(), 0);
    for (n_done, name) in store.unit_names()?.into_iter().enumerate() {
        phase.tell(n_done as u64, 0, "units");
        match store.unit_at(&name) {
            Ok(Status::Valid(_)) => sound.push(name),
            _ => n_bad += 1,
        }
    }
    ledger.note_verified(&sound, Depth::Quick, Timestamp::now().as_second());
    let (_session, recovered) = store.enter()?;
    let mut text = format!("the ledger is made anew: {}\n", count(sound.len(), "unit"));
    if n_bad > 0 {
        text.push_str(&format!("{} damaged: `ovenbird verify --fix` makes them again\n", count(n_bad, "unit")));
    }
    text.extend(crate::run::recovery_words(recovered).map(|words| format!("{words}\n")));
    text.push_str("input files are hashed once more by the next run\n");
    print(&text)
}
