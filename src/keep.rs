//! `ovenbird cache`: what takes space, what may go, and an index that can be made anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use indicatif::HumanBytes;
use jiff::Timestamp;
use ovenbird_cache::{Ledger, Manifest, Status, Store, unit_name, verify::Depth};
use serde::Serialize;

use crate::{
    cli::{print, to_json},
    error::{Error, Result, count},
    event, history,
    plan::Last,
    screen::Phase,
};

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

/// The artifacts that must stay.
struct Roots {
    /// Of runs going on and of pinned ones, by their names of 32 digits.
    in_use: BTreeSet<String>,
    /// These; of every pipeline as it was last there; of every pipeline's last run; of the last so many runs.
    all: BTreeSet<String>,
}

fn roots(store: &Store, n_runs: usize) -> Roots {
    let last = Last::of_all(store.home()).into_values().flat_map(BTreeMap::into_values);
    let mut roots = Roots { in_use: BTreeSet::new(), all: last.map(|fingerprint| fingerprint.short()).collect() };
    let (pinned, runs) = (pins(store), event::runs(store.home()));
    let mut seen_pipelines = BTreeSet::new();
    for (age, run) in runs.iter().rev().enumerate() {
        let state = history::state(&event::read_log(store.home(), run).unwrap_or_default());
        let is_going_on = state.outcome.is_none() && !store.at_work().is_empty();
        let is_last = seen_pipelines.insert(state.pipeline.clone());
        let names = || state.steps.iter().filter_map(|step| step.fingerprint.map(|fingerprint| fingerprint.short()));
        if is_going_on || pinned.contains(run) {
            roots.in_use.extend(names());
        }
        if age < n_runs || is_last {
            roots.all.extend(names());
        }
    }
    roots.all.extend(roots.in_use.iter().cloned());
    roots
}

/// The units of some artifacts, made or in the making, as `KIND/FINGERPRINT`.
fn units_of(store: &Store, artifacts: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let planned = store.plans()?.into_iter().filter(|(artifact, _)| artifacts.contains(artifact));
    let mut units: BTreeSet<String> = planned.flat_map(|(_, units)| units).collect();
    for manifest in store.manifests()? {
        if artifacts.contains(&manifest.fingerprint.short()) {
            units.extend(manifest.units.iter().map(|unit| unit_name(&manifest.recipe.kind, &unit.key.fingerprint)));
        }
    }
    Ok(units)
}

fn pins(store: &Store) -> BTreeSet<String> {
    let bytes = fs::read(store.home().join("pins.json")).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// `ovenbird cache pin`: what a run used is kept by `gc` until it is unpinned.
pub(crate) fn pin(home: &Path, run: &str, is_pinned: bool) -> Result<()> {
    let store = opened(home)?;
    let run = history::chosen(home, Some(run))?;
    let mut pins = pins(&store);
    if is_pinned {
        pins.insert(run.clone())
    } else {
        pins.remove(&run)
    };
    let bytes = serde_json::to_vec_pretty(&pins).expect("BUG: a list of names is plain JSON");
    store.publisher().replace(&home.join("pins.json"), &bytes)?;
    print(&format!("run {run} is {}\n", if is_pinned { "pinned: `ovenbird cache gc` keeps what it used" } else { "not pinned any more" }))
}

/// `ovenbird cache du`.
pub(crate) fn du(home: &Path, json: bool) -> Result<()> {
    let store = opened(home)?;
    let needed = units_of(&store, &roots(&store, 0).all)?;
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
    /// Keep what is younger.
    pub(crate) grace: Duration,
    /// Kinds of stages of which also the units go that pipelines need, unless they are in use.
    pub(crate) dropped_kinds: Vec<String>,
    /// Remove; otherwise only say what would go.
    pub(crate) is_real: bool,
    pub(crate) json: bool,
}

/// `ovenbird cache gc`.
pub(crate) fn gc(home: &Path, collection: &Collection) -> Result<()> {
    let store = opened(home)?;
    if let Some(unknown) = collection.dropped_kinds.iter().find(|kind| ovenbird_stages::find(kind).is_none()) {
        let hint = "`ovenbird cache du` lists the kinds that are there".into();
        return Err(Error::Usage { problem: format!("--drop {unknown}: there is no such stage"), hint });
    }
    let roots = roots(&store, collection.keep_runs);
    let is_dropped = |manifest: &Manifest| {
        collection.dropped_kinds.contains(&manifest.recipe.kind) && !roots.in_use.contains(&manifest.fingerprint.short())
    };
    let dropped: Vec<Manifest> = store.manifests()?.into_iter().filter(is_dropped).collect();
    let goes: BTreeSet<String> = dropped.iter().map(|manifest| manifest.fingerprint.short()).collect();
    let kept = roots.all.difference(&goes).cloned().collect();
    let needed = units_of(&store, &kept)?;
    let is_old = |path: &Path| {
        let age = fs::metadata(path).and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
        age.is_some_and(|age| age >= collection.grace)
    };
    let mut phase = Phase::new("gc");
    let (mut going, mut bytes) = (Vec::new(), 0);
    for (n_done, name) in store.unit_names()?.into_iter().enumerate() {
        phase.tell(n_done as u64, 0, "units");
        let path = store.unit_path(&name);
        if !needed.contains(&name) && is_old(&path) {
            bytes += bytes_below(&path);
            going.push(name);
        }
    }
    let mut left_alone = 0;
    if collection.is_real {
        let (_session, _recovered) = store.enter()?;
        for manifest in dropped {
            store.let_go(manifest)?;
        }
        for name in &going {
            match store.lease(name)? {
                Ok(_lease) => store.remove_unit(name, "removed by `cache gc`")?,
                Err(_) => left_alone += 1,
            }
        }
        for path in store.manifest_paths()? {
            let is_root = path.file_stem().is_some_and(|stem| roots.all.contains(&*stem.to_string_lossy()));
            if !is_root && is_old(&path) {
                store.publisher().remove(&path)?;
            }
        }
    }
    if collection.json {
        return print(&to_json("gc", &serde_json::json!({"removed": collection.is_real, "units": going, "bytes": bytes})));
    }
    let what = count(going.len(), "unit");
    let mut text = match (collection.is_real, going.is_empty()) {
        (_, true) => "nothing to remove\n".to_owned(),
        (true, false) => format!("{what} removed, {}\n", HumanBytes(bytes)),
        (false, false) => {
            let list: String = going.iter().map(|name| format!("{name}\n")).collect();
            format!("{list}{what} would go, {}; `ovenbird cache gc --delete` removes them\n", HumanBytes(bytes))
        }
    };
    if left_alone > 0 {
        text.push_str(&format!("{} in use, left alone\n", count(left_alone, "unit")));
    }
    print(&text)
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
