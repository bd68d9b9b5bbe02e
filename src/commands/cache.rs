//! `ovenbird cache`: disk use, deleting what is not needed, pins, rebuilding the index.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Subcommand;
use indicatif::{HumanBytes, HumanDuration};
use jiff::Timestamp;
use ovenbird_cache::{
    Ledger, Manifest, Status, Store,
    verify::{Class, Depth},
};
use ovenbird_stages::{Artifact as _, artifacts::EvaluationFile, find};
use serde::Serialize;

use crate::{
    error::{Error, Result},
    event::{self, Event, Stamped},
    output::{count, duration, print, to_json},
    pins::{Pin, pin_path, write_pin},
    pipeline::step_id::StepId,
    plan::previous_run::PreviousRun,
    progress::TaskProgress,
    quantities::time,
    run,
    run_state::find_run,
};

/// Show disk use, delete what is not needed, rebuild the index
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the disk use of each kind of stage, and how much of it no pipeline needs
    Du {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List units that no pipeline, pinned run or recent run needs; delete them with --delete
    Gc(Gc),
    /// Rebuild the ledger (the index of the home) from the files on the disk
    Rebuild,
    /// Keep the results of a run when `cache gc` deletes others
    Pin {
        /// A run's id
        run: String,
    },
    /// Undo `cache pin`
    Unpin {
        /// A run's id
        run: String,
    },
}

#[derive(clap::Args)]
struct Gc {
    /// Delete the listed units
    #[arg(long)]
    delete: bool,
    /// Delete them even if recomputing them takes more than an hour
    #[arg(long, requires = "delete")]
    yes: bool,
    /// Keep the results of the last N runs
    #[arg(long, default_value_t = 1, value_name = "N")]
    keep_runs: usize,
    /// Keep the results of runs that started less than this long ago
    #[arg(long, default_value = "30d", value_name = "TIME", value_parser = time)]
    keep_for: Duration,
    /// Keep results that are younger than this
    #[arg(long, default_value = "24h", value_name = "TIME", value_parser = time)]
    grace: Duration,
    /// Also drop results of a kind of stage, such as clip/blocks, that pipelines still need; their records stay, and they are
    /// recomputed when a step reads them
    #[arg(long, value_name = "KIND")]
    drop: Vec<String>,
    /// Also delete what `web/download` fetched and no result shares: results that are made again then ask the web again, which may have changed
    #[arg(long)]
    downloads: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn cache(home: &Path, Args { command }: &Args) -> Result<()> {
    match command {
        Command::Du { json } => du(home, *json),
        Command::Gc(options) => gc(home, options),
        Command::Rebuild => rebuild(home),
        Command::Pin { run } => pin(home, run),
        Command::Unpin { run } => unpin(home, run),
    }
}

/// How much computing time `gc` deletes without `--yes`, in s.
const MAX_UNCONFIRMED_S: f64 = 3600.0;

/// The disk use of a kind of stage.
#[derive(Debug, Default, Serialize)]
struct DiskUse {
    units: usize,
    bytes: u64,
    /// Bytes of units that a pipeline needs as it is now.
    needed_bytes: u64,
}

/// Opens an existing home.
fn opened(home: &Path) -> Result<Store> {
    if home.exists() {
        return Ok(Store::open(home)?);
    }
    Err(Error::NoHome { home: home.to_owned() })
}

/// Runs and artifacts, as the logs of a home record them.
#[derive(Default)]
struct History {
    /// Oldest first.
    runs: Vec<PastRun>,
    /// By the artifact's name of 32 digits.
    made: BTreeMap<String, Made>,
}

/// A run.
struct PastRun {
    id: String,
    pipeline: (String, Option<PathBuf>),
    started: Option<Timestamp>,
    /// Whether `verify --fix` started it.
    is_repair: bool,
    has_ended: bool,
    artifacts: BTreeSet<String>,
}

/// Who computed an artifact.
#[derive(Clone, Default)]
struct Made {
    /// The last run that worked on it, its step, and the record of its pipeline.
    run: String,
    step: Option<StepId>,
    previous_run: String,
    /// Computing time of all runs, in s.
    worked_s: f64,
}

impl History {
    fn of(store: &Store) -> Result<Self> {
        let mut history = Self::default();
        for id in event::runs(store.home()) {
            let log = event::read_log(store.home(), &id)?;
            let mut run = PastRun {
                id,
                pipeline: Default::default(),
                started: log.first().map(|first| first.at),
                is_repair: false,
                has_ended: false,
                artifacts: BTreeSet::new(),
            };
            let mut working: BTreeMap<StepId, (String, Option<Timestamp>)> = BTreeMap::new();
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
                            history.worked(&run, step, artifact, since, *at);
                        }
                    }
                    Event::RunEnded { .. } => run.has_ended = true,
                    _ => {}
                }
            }
            // A run that was cut off worked until its last event.
            let end = log.last().map(|last| last.at);
            for (step, (artifact, since)) in working {
                if let (Some(since), Some(end)) = (since, end) {
                    history.worked(&run, &step, artifact, since, end);
                }
            }
            history.runs.push(run);
        }
        Ok(history)
    }

    /// Adds the time that a run worked on an artifact.
    fn worked(&mut self, run: &PastRun, step: &StepId, artifact: String, since: Timestamp, until: Timestamp) {
        let made = self.made.entry(artifact).or_default();
        made.worked_s += (until.as_millisecond() - since.as_millisecond()) as f64 / 1e3;
        (made.run, made.step) = (run.id.clone(), Some(step.clone()));
        made.previous_run = PreviousRun::path(&run.pipeline.0, run.pipeline.1.as_deref());
    }
}

/// The artifacts that `gc` keeps, by their names of 32 digits.
struct Kept {
    /// Artifacts of pinned runs and of runs in progress.
    in_use: BTreeSet<String>,
    /// Those, the artifacts of every pipeline's latest results and latest run, and of recent runs.
    all: BTreeSet<String>,
}

/// Which runs are recent.
struct Recent {
    n_runs: usize,
    within: Duration,
}

/// The artifacts to keep.
fn kept(store: &Store, history: &History, recent: &Recent) -> Result<Kept> {
    let latest = PreviousRun::of_all(store)?.into_iter().flat_map(|previous| previous.steps.into_values());
    let mut kept = Kept { in_use: BTreeSet::new(), all: latest.map(|fingerprint| fingerprint.short()).collect() };
    let mut pinned = BTreeSet::new();
    for place in store.record_places()?.iter().filter(|place| place.starts_with("pins/")) {
        if let Some(Pin { run, artifacts }) = store.kept(place)? {
            pinned.insert(run);
            kept.in_use.extend(artifacts);
        }
    }
    let is_run_in_progress = !store.at_work().is_empty();
    let mut seen_pipelines = BTreeSet::new();
    for (age, run) in history.runs.iter().rev().enumerate() {
        let is_last = !run.is_repair && seen_pipelines.insert(&run.pipeline);
        let is_young = run.started.is_none_or(|started| {
            let ago_s = Timestamp::now().as_second() - started.as_second();
            ago_s < i64::try_from(recent.within.as_secs()).unwrap_or(i64::MAX)
        });
        if (!run.has_ended && is_run_in_progress) || pinned.contains(&run.id) {
            kept.in_use.extend(run.artifacts.iter().cloned());
        }
        if age < recent.n_runs || is_young || is_last {
            kept.all.extend(run.artifacts.iter().cloned());
        }
    }
    kept.all.extend(kept.in_use.iter().cloned());
    Ok(kept)
}

/// The units of some artifacts, finished or planned, as `KIND/FINGERPRINT`.
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

/// `ovenbird cache pin`.
fn pin(home: &Path, run: &str) -> Result<()> {
    let store = opened(home)?;
    let run = find_run(home, Some(run))?;
    write_pin(&store, &run)?;
    Ok(print(&format!("run {run} is pinned: `ovenbird cache gc` keeps its results\n"))?)
}

/// `ovenbird cache unpin`.
fn unpin(home: &Path, run: &str) -> Result<()> {
    let store = opened(home)?;
    // A pin may outlive its run.
    let is_pinned = store.home().join(pin_path(run)).exists();
    let run = if is_pinned { run.to_owned() } else { find_run(home, Some(run))? };
    store.remove_record(&pin_path(&run), "unpinned")?;
    Ok(print(&format!("run {run} is not pinned any more\n"))?)
}

/// `ovenbird cache du`.
fn du(home: &Path, json: bool) -> Result<()> {
    let store = opened(home)?;
    let kept = kept(&store, &History::of(&store)?, &Recent { n_runs: 0, within: Duration::ZERO })?;
    let needed = units_of(&store, &kept.all)?;
    let mut by_kind: BTreeMap<String, DiskUse> = BTreeMap::new();
    for name in store.unit_names()? {
        let kind = name.split_once('/').map_or_else(String::new, |(kind, _)| kind.to_owned());
        let bytes = bytes_below(&store.unit_path(&name));
        let used = by_kind.entry(kind).or_default();
        (used.units, used.bytes) = (used.units + 1, used.bytes + bytes);
        used.needed_bytes += if needed.contains(&name) { bytes } else { 0 };
    }
    // The finished work of units that were cut off counts with their stage.
    for name in store.part_names()? {
        let (kind, _) = name.split_once('/').unwrap_or_default();
        let bytes = bytes_below(&store.part_path(&name));
        let used = by_kind.entry(kind.to_owned()).or_default();
        used.bytes += bytes;
        used.needed_bytes += if is_part_needed(&store, &needed, &name) { bytes } else { 0 };
    }
    let quarantine = bytes_below(&home.join("quarantine"));
    let dry_runs: u64 = dry_runs(home).values().sum();
    let downloads = store.spool().own_bytes();
    if json {
        let report =
            serde_json::json!({"kinds": by_kind, "quarantine_bytes": quarantine, "dry_run_bytes": dry_runs, "download_bytes": downloads});
        return Ok(print(&to_json("du", &report))?);
    }
    let human = |bytes: u64| HumanBytes(bytes).to_string();
    let mut text = format!("{:24} {:>8} {:>12} {:>12}\n", "stage", "units", "size", "not needed");
    let (mut all, mut free) = (0, 0);
    for (kind, DiskUse { units, bytes, needed_bytes }) in &by_kind {
        text.push_str(&format!("{kind:24} {units:>8} {:>12} {:>12}\n", human(*bytes), human(bytes - needed_bytes)));
        (all, free) = (all + bytes, free + bytes - needed_bytes);
    }
    if dry_runs > 0 {
        text.push_str(&format!("{:24} {:>8} {:>12} {:>12}\n", "dry runs", "", human(dry_runs), human(dry_runs)));
        (all, free) = (all + dry_runs, free + dry_runs);
    }
    if downloads > 0 {
        // Bytes that units share count there.
        text.push_str(&format!("{:24} {:>8} {:>12} {:>12}\n", "downloads (web)", "", human(downloads), human(0)));
        all += downloads;
    }
    text.push_str(&format!("{:24} {:>8} {:>12} {:>12}\n", "all", "", human(all), human(free)));
    if quarantine > 0 {
        text.push_str(&format!("{:24} {:>8} {:>12}\n", "quarantine", "", human(quarantine)));
    }
    if free > 0 {
        text.push_str("`ovenbird cache gc` lists what is not needed, `ovenbird cache gc --delete` deletes it\n");
    }
    Ok(print(&text)?)
}

/// Whether a run may continue from the part of a unit: the unit is needed and is not published.
fn is_part_needed(store: &Store, needed: &BTreeSet<String>, unit: &str) -> bool {
    needed.contains(unit) && !store.unit_path(unit).exists()
}

/// The homes of dry runs, by their folders, with their sizes.
fn dry_runs(home: &Path) -> BTreeMap<PathBuf, u64> {
    let entries = fs::read_dir(home.join("dry-run")).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.is_dir()).map(|path| (path.clone(), bytes_below(&path))).collect()
}

/// Whether a process is at work in the home of a dry run.
fn is_at_work(home: &Path) -> bool {
    Store::open(home).is_ok_and(|store| !store.at_work().is_empty())
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

/// An artifact with units to delete.
#[derive(Serialize)]
struct Deletion {
    artifact: String,
    kind: String,
    step: Option<StepId>,
    run: String,
    /// Parameters and inputs that differ from the pipeline's latest results.
    changed: Vec<String>,
    units: usize,
    bytes: u64,
    /// Estimated time to recompute the units.
    hours: f64,
}

/// `ovenbird cache gc`.
fn gc(home: &Path, options: &Gc) -> Result<()> {
    let store = opened(home)?;
    if let Some(unknown) = options.drop.iter().find(|kind| find(kind).is_none()) {
        let hint = "`ovenbird cache du` lists the kinds in the home".into();
        return Err(Error::Usage { problem: format!("--drop {unknown}: there is no such stage"), hint });
    }
    refuse_if_damaged(&store)?;
    let history = History::of(&store)?;
    let roots = kept(&store, &history, &Recent { n_runs: options.keep_runs, within: options.keep_for })?;
    let manifests = store.manifests()?;
    let name = |manifest: &Manifest| manifest.fingerprint.short();
    let path = |manifest: &Manifest| store.manifest_path(&manifest.recipe.kind, &manifest.fingerprint);
    let is_old = |path: &Path| {
        let age = fs::metadata(path).and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
        age.is_some_and(|age| age >= options.grace)
    };
    let is_dropped = |manifest: &Manifest| options.drop.contains(&manifest.recipe.kind) && !roots.in_use.contains(&name(manifest));
    // Evaluations are small, and users compare them.
    let is_evaluation = |manifest: &Manifest| {
        let outputs = find(&manifest.recipe.kind).into_iter().flat_map(|entry| entry.outputs);
        outputs.into_iter().any(|port| port.kind == EvaluationFile::KIND)
    };
    let stays = |manifest: &Manifest| roots.all.contains(&name(manifest)) || is_evaluation(manifest) || !is_old(&path(manifest));
    let (dropped, rest): (Vec<&Manifest>, Vec<&Manifest>) = manifests.iter().partition(|manifest| is_dropped(manifest));
    let (kept, forgotten): (Vec<&Manifest>, Vec<&Manifest>) = rest.into_iter().partition(|manifest| stays(manifest));
    let goes: BTreeSet<String> = dropped.iter().map(|manifest| name(manifest)).collect();
    let planned = roots.all.difference(&goes).cloned();
    let needed = units_of(&store, &kept.iter().map(|manifest| name(manifest)).chain(planned).collect())?;
    let mut progress = TaskProgress::new("gc");
    let mut going: BTreeMap<String, u64> = BTreeMap::new();
    for (n_done, unit) in store.unit_names()?.into_iter().enumerate() {
        progress.tell(n_done as u64, 0, "units");
        let path = store.unit_path(&unit);
        if !needed.contains(&unit) && is_old(&path) {
            going.insert(unit, bytes_below(&path));
        }
    }
    let dry_runs: BTreeMap<PathBuf, u64> =
        dry_runs(home).into_iter().filter(|(path, _)| is_old(&path.join("runs")) && !is_at_work(path)).collect();
    let parts: BTreeMap<String, u64> = store
        .part_names()?
        .into_iter()
        .filter(|unit| !is_part_needed(&store, &needed, unit) && is_old(&store.part_path(unit)))
        .map(|unit| (unit.clone(), bytes_below(&store.part_path(&unit))))
        .collect();
    let list = listed(&store, &history, &going, dropped.iter().chain(&forgotten).copied())?;
    let hours: f64 = list.iter().map(|going| going.hours).sum();
    let mut left_alone = 0;
    let spooled = store.spool().own_bytes();
    if options.delete {
        if hours * 3600.0 > MAX_UNCONFIRMED_S && !options.yes {
            let problem = format!("recomputing what would be deleted takes about {}", duration(hours * 3600.0));
            return Err(Error::Usage { problem, hint: "look at the list without `--delete`; add `--yes` to delete it anyway".into() });
        }
        let (_session, _recovered) = store.enter()?;
        // Records first: if this is cut off, no record lists missing bytes.
        for manifest in dropped {
            store.let_go(manifest.clone())?;
        }
        for manifest in forgotten {
            store.remove_record(&store.place_of(&path(manifest)), "deleted by `cache gc`")?;
        }
        for unit in going.keys() {
            match store.lease(unit)? {
                Ok(_lease) => store.remove_unit(unit, "deleted by `cache gc`")?,
                Err(_) => left_alone += 1,
            }
        }
        for path in dry_runs.keys() {
            store.publisher().remove(path)?;
        }
        if options.downloads {
            store.spool().clear()?;
        }
        for unit in parts.keys() {
            match store.lease(unit)? {
                Ok(_lease) => store.remove_part(unit)?,
                Err(_) => left_alone += 1,
            }
        }
    }
    let downloads = if options.downloads { spooled } else { 0 };
    let bytes = going.values().chain(parts.values()).chain(dry_runs.values()).sum::<u64>() + downloads;
    if options.json {
        let units: Vec<&String> = going.keys().collect();
        let report = serde_json::json!({"removed": options.delete, "artifacts": list, "units": units, "bytes": bytes, "hours": hours});
        return Ok(print(&to_json("gc", &report))?);
    }
    let mut text = words(options, &list, [&going, &parts], &dry_runs, left_alone);
    if downloads > 0 {
        let done = if options.delete { "deleted" } else { "would be deleted (`--delete`)" };
        text.push_str(&format!("downloads that no result shares: {}, {done}\n", HumanBytes(downloads)));
    }
    Ok(print(&text)?)
}

/// Fails where a record of what to keep is damaged or missing: `gc` would delete what it names.
fn refuse_if_damaged(store: &Store) -> Result<()> {
    let mut findings = store.misplaced()?;
    if !findings.is_empty() {
        return Err(Error::DamagedRecords { findings });
    }
    findings.extend(store.verify_records()?);
    for path in store.manifest_paths()? {
        findings.extend(store.verify_manifest(&path)?.into_iter().filter(|finding| finding.class == Class::Manifest));
    }
    if findings.is_empty() { Ok(()) } else { Err(Error::DamagedRecords { findings }) }
}

/// The artifacts with units to delete, those that took longest first.
fn listed<'a>(
    store: &Store,
    history: &History,
    going: &BTreeMap<String, u64>,
    manifests: impl Iterator<Item = &'a Manifest>,
) -> Result<Vec<Deletion>> {
    let mut list = Vec::new();
    for manifest in manifests {
        let units: Vec<u64> = manifest.unit_names().filter_map(|unit| going.get(&unit).copied()).collect();
        if units.is_empty() {
            continue;
        }
        let made = history.made.get(&manifest.fingerprint.short());
        let worked_s = made.map_or(0.0, |made| made.worked_s).max(manifest.made.wall_s);
        let previous = made.and_then(|made| store.kept::<PreviousRun>(&made.previous_run).ok()?);
        let latest = made.zip(previous).and_then(|(made, previous)| previous.steps.get(made.step.as_ref()?).copied());
        let now = latest.and_then(|fingerprint| store.manifest(&manifest.recipe.kind, &fingerprint).ok()?);
        list.push(Deletion {
            artifact: manifest.fingerprint.short(),
            kind: manifest.recipe.kind.clone(),
            step: made.and_then(|made| made.step.clone()),
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

/// The result of `gc` in words.
fn words(
    options: &Gc,
    list: &[Deletion],
    [going, parts]: [&BTreeMap<String, u64>; 2],
    dry_runs: &BTreeMap<PathBuf, u64>,
    left_alone: usize,
) -> String {
    let mut text = String::new();
    for Deletion { kind, step, run, changed, units, bytes, hours, .. } in list {
        let changed = if changed.is_empty() { String::new() } else { format!("; changed since: {}", changed.join("; ")) };
        text.push_str(&format!(
            "{} ({kind}) of run {run}: {}, {}, {} to recompute{changed}\n",
            step.as_ref().map_or_else(|| "a step".into(), ToString::to_string),
            count(*units, "unit"),
            HumanBytes(*bytes),
            duration(hours * 3600.0),
        ));
    }
    let n_others = going.len().saturating_sub(list.iter().map(|going| going.units).sum());
    if n_others > 0 {
        text.push_str(&format!("{} without an artifact\n", count(n_others, "unit")));
    }
    if !parts.is_empty() {
        text.push_str(&format!("{} that no run will continue\n", count(parts.len(), "unfinished unit")));
    }
    if !dry_runs.is_empty() {
        text.push_str(&format!("{}\n", count(dry_runs.len(), "dry run")));
    }
    let (n_units, bytes) = (going.len() + parts.len(), HumanBytes(going.values().chain(parts.values()).chain(dry_runs.values()).sum()));
    let what = match (n_units, dry_runs.len()) {
        (_, 0) => count(n_units, "unit"),
        (0, n) => count(n, "dry run"),
        (_, n) => format!("{} and {}", count(n_units, "unit"), count(n, "dry run")),
    };
    match (options.delete, n_units + dry_runs.len() == 0) {
        (_, true) => {
            text.push_str(&format!(
                "nothing to delete: everything is needed by a pipeline, by a run that is pinned or of the last {} (`--keep-for`), or newer than {} (`--grace`)\n",
                HumanDuration(options.keep_for),
                HumanDuration(options.grace),
            ));
        }
        (true, false) => text.push_str(&format!("{what} deleted, {bytes}\n")),
        (false, false) => text.push_str(&format!("{what} not needed, {bytes}; `ovenbird cache gc --delete` deletes them\n")),
    }
    if left_alone > 0 {
        text.push_str(&format!("{} in use, not deleted\n", count(left_alone, "unit")));
    }
    text
}

/// `ovenbird cache rebuild`.
fn rebuild(home: &Path) -> Result<()> {
    let store = opened(home)?;
    let ledger = Ledger::of(&store);
    ledger.forget()?;
    let mut progress = TaskProgress::new("rebuild");
    let (mut sound, mut n_bad) = (Vec::new(), 0);
    for (n_done, name) in store.unit_names()?.into_iter().enumerate() {
        progress.tell(n_done as u64, 0, "units");
        match store.unit_at(&name) {
            Ok(Status::Valid(_)) => sound.push(name),
            _ => n_bad += 1,
        }
    }
    ledger.note_verified(&sound, Depth::Quick, Timestamp::now().as_second());
    let (_session, recovered) = store.enter()?;
    let mut text = format!("the ledger is rebuilt: {}\n", count(sound.len(), "unit"));
    if n_bad > 0 {
        text.push_str(&format!("{} damaged: `ovenbird verify --fix` repairs them\n", count(n_bad, "unit")));
    }
    text.extend(run::recovery_words(recovered).map(|words| format!("{words}\n")));
    text.push_str("the next run hashes all input files again\n");
    Ok(print(&text)?)
}
