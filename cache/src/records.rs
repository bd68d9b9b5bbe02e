//! The records that garbage collection relies on: pins, pipelines, plans, requests, logs, and the journal of commits.
//!
//! ```text
//! HOME/commits.jsonl                  the journal: each unit, manifest and record that was published or removed, one sealed line each
//! HOME/pins/RUN.json                  a pinned run and the artifacts that it used
//! HOME/pipelines/NAME.json            the artifact of each step of a pipeline in its last run
//! HOME/plans/KIND/FINGERPRINT.json    an unfinished artifact: the units that it will have
//! HOME/runs/ID/request.json           the command line and pipeline of a run
//! HOME/runs/ID/events.jsonl           the log of a run, one sealed line per event
//! ```
//!
//! A record's *place* is its path in the home; its seal is keyed by the place. The journal of commits shows whether something was lost or
//! never existed, and how long a finished log is. Publications are noted after they happened, removals before: after a crash in between,
//! something exists that is not noted, and the next start notes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Digest, Error, Fingerprint, Recipe, Result, Store, UnitRecord,
    inputs::stray,
    journal::{DamagedLine, Journal, Lines},
    publish::TEMPORARY,
    record::Sealed,
    store::{FORMAT, kind_name, to_json},
    unit_name,
    verify::{Class, FILES, FOLDERS, Finding},
};

/// The journal of commits.
const COMMITS: &str = "commits.jsonl";
/// Holds the format version of the home.
const HOME_FORMAT: &str = "format.json";
/// Entries that only a home in use has.
const IN_USE: [&str; 4] = ["units", "artifacts", "runs", COMMITS];
/// Names that a folder of other programs hardly has.
const HOMES_ONLY: [&str; 2] = [COMMITS, "sessions"];
/// The end of the place of a run's log.
const LOG: &str = "/events.jsonl";

/// A line of the journal of commits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CommitLine {
    /// A unit was published; `unit` is its name `KIND/FINGERPRINT`.
    Commit {
        unit: String,
        bytes: u64,
        /// See [`crate::UnitKey::item_key`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        item_key: Option<Fingerprint>,
    },
    /// A unit was removed.
    Gone { unit: String, why: String },
    /// A record was published, or a log began or ended.
    Kept {
        record: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ended: Option<Ended>,
    },
    /// A record was removed.
    Removed { record: String, why: String },
}

/// The journal's entry for a published unit.
#[derive(Debug, Clone, Copy)]
pub struct Noted {
    /// Size of its files.
    pub bytes: u64,
    /// See [`crate::UnitKey::item_key`].
    pub item_key: Option<Fingerprint>,
}

/// The length of a finished log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    bytes: u64,
    /// The number of sound lines.
    lines: usize,
}

/// The records that the journal of commits lists: place, and the length of a finished log.
type NotedRecords = BTreeMap<String, Option<Ended>>;

/// The units and records that the journal of commits lists.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    /// By name, `KIND/FINGERPRINT`.
    pub(crate) units: BTreeMap<String, Noted>,
    pub(crate) records: NotedRecords,
    pub(crate) damaged: Vec<DamagedLine>,
    is_there: bool,
}

/// A record on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: u32,
    place: String,
    content: Value,
    seal: Digest,
}

impl Sealed for Record {
    fn key(&self) -> [u8; 32] {
        *blake3::hash(format!("ovenbird record 1 {}", self.place).as_bytes()).as_bytes()
    }

    fn seal_mut(&mut self) -> &mut Digest {
        &mut self.seal
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnitPlan {
    recipe: Recipe,
    units: Vec<Fingerprint>,
}

/// The place of the plan of an unfinished artifact.
pub(crate) fn plan_place(kind: &str, fingerprint: &Fingerprint) -> String {
    format!("plans/{}/{}.json", kind_name(kind), fingerprint.short())
}

impl Store {
    /// Fails if `format.json` is damaged or of another format, or if it is missing in a home that is in use.
    pub(crate) fn check_home(&self) -> Result<()> {
        let path = self.home().join(HOME_FORMAT);
        if self.kept::<Value>(HOME_FORMAT)?.is_some() {
            return Ok(());
        }
        let has = |name: &&&str| self.publisher().disk().look(&self.home().join(name)).is_ok();
        match (HOMES_ONLY.iter().find(has), IN_USE.iter().find(has)) {
            (Some(name), _) => Err(Error::malformed(&path, format!("is missing, although the home has a `{name}`"))),
            (None, Some(name)) => Err(Error::NotAHome { path: self.home().to_owned(), found: (*name).into() }),
            (None, None) => Ok(()),
        }
    }

    /// Fails if the home was removed after it was entered, so that no write recreates a part of it.
    pub fn check_there(&self) -> Result<()> {
        match self.publisher().disk().look(&self.home().join(HOME_FORMAT)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::malformed(self.home(), "the home or its `format.json` was removed during the run")),
        }
    }

    /// Creates `format.json` if it is missing; checks it otherwise.
    pub(crate) fn settle(&self) -> Result<()> {
        self.check_home()?;
        match self.read_if_there(&self.home().join(HOME_FORMAT))? {
            Some(_) => Ok(()),
            None => match self.foreign_name() {
                Some(found) => Err(Error::NotAHome { path: self.home().to_owned(), found }),
                None => self.write_home_format(),
            },
        }
    }

    /// Something in the folder that a home does not have. Hidden files and a file system's `lost+found` do not count.
    fn foreign_name(&self) -> Option<String> {
        let listed = self.publisher().disk().list(self.home()).unwrap_or_default();
        let is_ours = |name: &str| name.starts_with('.') || name == "lost+found" || [&FOLDERS[..], &FILES].concat().contains(&name);
        listed.into_iter().map(|(name, _)| name).find(|name| !is_ours(name))
    }

    fn write_home_format(&self) -> Result<()> {
        self.publisher().replace(&self.home().join(HOME_FORMAT), &sealed(HOME_FORMAT, &Value::Null))
    }

    /// Rewrites `format.json` if the home has journal lines or manifests of this format; returns whether it has.
    pub fn mend_home_format(&self) -> Result<bool> {
        let has_lines = Lines::read(self.publisher(), self.home(), COMMITS)?.is_some_and(|lines| lines.sound().next().is_some());
        if !has_lines && self.manifests()?.is_empty() {
            return Ok(false);
        }
        self.publisher().set_aside(&self.home().join(HOME_FORMAT), &self.home().join("quarantine").join("records"))?;
        self.write_home_format()?;
        Ok(true)
    }

    /// Writes a record, replacing an existing one.
    pub fn keep<T: Serialize>(&self, place: &str, content: &T) -> Result<()> {
        self.put_record(place, &sealed(place, content))
    }

    /// Writes a record that the journal of commits does not list, of what can be fetched again.
    pub(crate) fn place_unnoted<T: Serialize>(&self, place: &str, content: &T) -> Result<()> {
        self.check_there()?;
        self.publisher().place(&self.home().join(place), &sealed(place, content))
    }

    pub(crate) fn put_record(&self, place: &str, bytes: &[u8]) -> Result<()> {
        self.check_there()?;
        let path = self.home().join(place);
        let is_new = self.publisher().disk().look(&path).is_err();
        self.publisher().replace(&path, bytes)?;
        if is_new { self.note(&CommitLine::Kept { record: place.into(), ended: None }) } else { Ok(()) }
    }

    /// Reads a record; `None` if there is no file.
    pub fn kept<T: DeserializeOwned>(&self, place: &str) -> Result<Option<T>> {
        let path = self.home().join(place);
        let Some(record) = self.read_record::<Record>(&path)? else { return Ok(None) };
        if record.place != place {
            return Err(Error::malformed(&path, format!("is the record of {}", record.place)));
        }
        serde_json::from_value(record.content).map(Some).map_err(|error| Error::malformed(&path, error.to_string()))
    }

    /// Deletes a record.
    pub fn remove_record(&self, place: &str, why: &str) -> Result<()> {
        let path = self.home().join(place);
        if self.publisher().disk().look(&path).is_err() {
            return Ok(());
        }
        self.note_removed(place, why)?;
        self.publisher().remove(&path)
    }

    /// Notes in the journal of commits that a record was removed.
    pub fn note_removed(&self, place: &str, why: &str) -> Result<()> {
        self.note(&CommitLine::Removed { record: place.into(), why: why.into() })
    }

    /// Moves a record to quarantine. Returns its new path; `None` if it does not exist.
    pub fn set_record_aside(&self, place: &str, why: &str) -> Result<Option<PathBuf>> {
        let folder = Path::new(place).parent().unwrap_or(Path::new("")).to_string_lossy().replace('/', ".");
        let aside = self.set_aside(&self.home().join(place), &format!("records.{folder}"), why)?;
        if aside.is_some() {
            self.note_removed(place, why)?;
        }
        Ok(aside)
    }

    /// The place of a path in this home.
    pub fn place_of(&self, path: &Path) -> String {
        path.strip_prefix(self.home()).unwrap_or(path).to_string_lossy().into_owned()
    }

    /// Begins the log of a run.
    pub fn begin_log(&self, place: &str) -> Result<Journal> {
        let log = Journal::open(self.publisher(), self.home(), place)?;
        self.note(&CommitLine::Kept { record: place.into(), ended: None })?;
        Ok(log)
    }

    /// Notes the length of a run's log; no more lines are appended to it.
    pub fn end_log(&self, place: &str) -> Result<()> {
        let lines = Lines::read(self.publisher(), self.home(), place)?;
        let ended = lines.map(|lines| Ended { bytes: lines.bytes(), lines: lines.sound().count() });
        self.note(&CommitLine::Kept { record: place.into(), ended })
    }

    /// Moves a damaged journal to quarantine and writes a new one with its sound lines.
    pub fn mend_journal(&self, place: &str, why: &str) -> Result<()> {
        let Some(lines) = Lines::read(self.publisher(), self.home(), place)? else { return Ok(()) };
        let path = self.home().join(place);
        // The open handle is of the old file; the next note opens the new one.
        *self.commits.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.set_aside(&path, "records", why)?;
        self.publisher().replace(&path, &lines.mended())?;
        if place == COMMITS { Ok(()) } else { self.end_log(place) }
    }

    pub(crate) fn note(&self, line: &CommitLine) -> Result<()> {
        self.check_there()?;
        let mut journal = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        if journal.is_none() {
            *journal = Some(Journal::open(self.publisher(), self.home(), COMMITS)?);
        }
        let opened = journal.as_mut().expect("BUG: it was opened just now");
        let line = serde_json::to_string(line).expect("BUG: lines are plain JSON");
        let noted = opened.append(&line).and_then(|()| opened.sync());
        if noted.is_err() {
            // This handle is never fsynced again. A later start notes again what the disk may have lost.
            *journal = None;
        }
        noted
    }

    pub(crate) fn note_unit(&self, record: &UnitRecord) -> Result<()> {
        let unit = unit_name(&record.key.kind, &record.key.fingerprint);
        self.note(&CommitLine::Commit { unit, bytes: record.bytes(), item_key: record.key.item_key })
    }

    /// Reads the journal of commits; damaged lines are listed and otherwise ignored.
    pub(crate) fn journal(&self) -> Result<Commits> {
        let mut commits = Commits::default();
        let Some(lines) = Lines::read(self.publisher(), self.home(), COMMITS)? else { return Ok(commits) };
        commits.is_there = true;
        commits.damaged = lines.damaged().to_vec();
        for line in lines.sound() {
            match serde_json::from_str(&line) {
                Ok(CommitLine::Commit { unit, bytes, item_key }) => drop(commits.units.insert(unit, Noted { bytes, item_key })),
                Ok(CommitLine::Gone { unit, .. }) => drop(commits.units.remove(&unit)),
                Ok(CommitLine::Kept { record, ended }) => drop(commits.records.insert(record, ended)),
                Ok(CommitLine::Removed { record, .. }) => drop(commits.records.remove(&record)),
                // A line of a later version.
                Err(_) => {}
            }
        }
        Ok(commits)
    }

    /// The units that the journal of commits lists, by name `KIND/FINGERPRINT`.
    pub fn noted_units(&self) -> Result<BTreeMap<String, Noted>> {
        Ok(self.journal()?.units)
    }

    fn noted_records(&self) -> Result<NotedRecords> {
        Ok(self.journal()?.records)
    }

    /// The places of all records on disk, except manifests and the journal of commits.
    pub fn record_places(&self) -> Result<Vec<String>> {
        let mut places = Vec::new();
        let list = |top: &str| self.publisher().list(&self.home().join(top));
        let is_finished = |name: &str| !name.starts_with(TEMPORARY);
        for top in ["pins", "pipelines"] {
            let names = list(top)?.into_iter().filter(|(name, is_folder)| !is_folder && is_finished(name));
            places.extend(names.map(|(name, _)| format!("{top}/{name}")));
        }
        for (kind, _) in list("plans")?.into_iter().filter(|(_, is_folder)| *is_folder) {
            let names = list(&format!("plans/{kind}"))?.into_iter().filter(|(name, _)| is_finished(name));
            places.extend(names.map(|(name, _)| format!("plans/{kind}/{name}")));
        }
        for (run, _) in list("runs")?.into_iter().filter(|(name, is_folder)| *is_folder && is_finished(name)) {
            let names = list(&format!("runs/{run}"))?.into_iter().filter(|(name, _)| ["request.json", &LOG[1..]].contains(&name.as_str()));
            places.extend(names.map(|(name, _)| format!("runs/{run}/{name}")));
        }
        Ok(places)
    }

    /// Notes records that the journal lacks. If no other process is at work, also notes the lengths of the logs of interrupted runs.
    pub(crate) fn adopt_records(&self, journal: &Commits) -> Result<()> {
        let manifests = self.manifest_paths()?.into_iter().map(|path| self.place_of(&path));
        for place in self.record_places()?.into_iter().chain(manifests) {
            if !journal.records.contains_key(&place) {
                self.note(&CommitLine::Kept { record: place, ended: None })?;
            }
        }
        if self.at_work().len() <= 1 {
            let is_cut_off = |(place, ended): &(&String, &Option<Ended>)| place.ends_with(LOG) && ended.is_none();
            for (place, _) in journal.records.iter().filter(is_cut_off) {
                if self.publisher().disk().look(&self.home().join(place)).is_ok() {
                    self.end_log(place)?;
                }
            }
        }
        Ok(())
    }

    /// Finds entries of the wrong type in the place of a record or of a folder of the home: a folder, a pipe, a dead link. Checked before
    /// anything else, because such an entry cannot be read.
    pub fn misplaced(&self) -> Result<Vec<Finding>> {
        let mut found = Vec::new();
        let mut look = |path: PathBuf, is_expected: fn(&fs::Metadata) -> bool, expected: &str| {
            let problem = match fs::metadata(&path) {
                Ok(metadata) if is_expected(&metadata) => return,
                Ok(metadata) if metadata.is_dir() => format!("expected {expected}, found a folder"),
                Ok(metadata) if metadata.is_file() => format!("expected {expected}, found a file"),
                _ => match stray(&path) {
                    Some(what) => format!("expected {expected}, found {what}"),
                    None => return,
                },
            };
            found.push(Finding { class: Class::Record, unit: None, path, problem });
        };
        for name in [HOME_FORMAT, COMMITS, CURSOR] {
            look(self.home().join(name), fs::Metadata::is_file, "a file");
        }
        for name in FOLDERS {
            look(self.home().join(name), fs::Metadata::is_dir, "a folder");
        }
        for top in ["pins", "pipelines"] {
            for (name, _) in self.publisher().list(&self.home().join(top))?.into_iter().filter(|(name, _)| name.ends_with(".json")) {
                look(self.home().join(top).join(name), fs::Metadata::is_file, "a file");
            }
        }
        for top in ["plans", "artifacts"] {
            for (kind, _) in self.publisher().list(&self.home().join(top))? {
                let folder = self.home().join(top).join(kind);
                for (name, _) in self.publisher().list(&folder)?.into_iter().filter(|(name, _)| name.ends_with(".json")) {
                    look(folder.join(name), fs::Metadata::is_file, "a file");
                }
            }
        }
        for (run, _) in self.publisher().list(&self.home().join("runs"))? {
            let folder = self.home().join("runs").join(&run);
            look(folder.clone(), fs::Metadata::is_dir, "a folder");
            for name in ["request.json", &LOG[1..]] {
                look(folder.join(name), fs::Metadata::is_file, "a file");
            }
        }
        Ok(found)
    }

    /// Checks the records and the journal of commits; also finds noted manifests that are missing.
    pub fn verify_records(&self) -> Result<Vec<Finding>> {
        let mut found = Vec::new();
        let mut find = |class, place: &str, problem: String| {
            found.push(Finding { class, unit: None, path: self.home().join(place), problem });
        };
        if let Err(error) = self.check_home() {
            find(Class::Record, HOME_FORMAT, problem_of(&error));
        }
        let journal = self.journal()?;
        if !journal.is_there && IN_USE[..3].iter().any(|name| self.publisher().disk().look(&self.home().join(name)).is_ok()) {
            find(Class::Record, COMMITS, "is missing: lost units and records cannot be found without it".into());
        }
        if let Some(problem) = list_damaged(&journal.damaged) {
            find(Class::Record, COMMITS, problem);
        }
        let n_unknown = if journal.is_there { self.n_not_noted(&journal)? } else { 0 };
        if n_unknown > 0 {
            find(Class::Record, COMMITS, format!("has lost lines: {n_unknown} units that artifacts list are not in it"));
        }
        let places = self.record_places()?;
        let is_gone = |place: &&String| self.publisher().disk().look(&self.home().join(place)).is_err();
        let gone: Vec<&String> = journal.records.keys().filter(is_gone).collect();
        // Read again, because records may be removed during the check.
        let still = if gone.is_empty() { NotedRecords::new() } else { self.noted_records()? };
        for place in gone.into_iter().filter(|place| still.contains_key(*place)) {
            let class = if place.starts_with("artifacts/") { Class::Manifest } else { Class::Record };
            find(class, place, "was published and is missing".into());
        }
        for place in &places {
            let problem = match place.ends_with(LOG) {
                true => self.log_problem(place, journal.records.get(place).copied().flatten())?,
                false => match self.kept::<Value>(place) {
                    Ok(_) => None,
                    Err(error) => Some(problem_of(&error)),
                },
            };
            if let Some(problem) = problem {
                find(Class::Record, place, problem);
            }
        }
        if let Err(error) = self.kept::<Value>(CURSOR) {
            find(Class::Record, CURSOR, problem_of(&error));
        }
        Ok(found)
    }

    /// The number of published units that artifacts list and the journal lacks. Each was noted before its artifact was published.
    fn n_not_noted(&self, journal: &Commits) -> Result<usize> {
        let mut unknown = BTreeSet::new();
        for manifest in self.manifests()? {
            let is_unknown = |unit: &String| !journal.units.contains_key(unit) && self.unit_path(unit).exists();
            unknown.extend(manifest.unit_names().filter(is_unknown));
        }
        Ok(unknown.len())
    }

    /// The damage of a run's log, if any. Zero bytes, as a power cut leaves them in an unfinished log, are not damage.
    fn log_problem(&self, place: &str, ended: Option<Ended>) -> Result<Option<String>> {
        let lines = Lines::read(self.publisher(), self.home(), place)?.unwrap_or_default();
        let damaged: Vec<DamagedLine> = lines.damaged().iter().filter(|line| !line.has_zeros).copied().collect();
        let n_sound = lines.sound().count();
        Ok(match ended {
            Some(Ended { bytes, .. }) if bytes != lines.bytes() => Some(format!("expected {bytes} bytes, found {}", lines.bytes())),
            Some(Ended { lines, .. }) if lines != n_sound => Some(format!("expected {lines} sound lines, found {n_sound}")),
            _ => list_damaged(&damaged),
        })
    }

    /// Records the units that an artifact will have, before the first is made. They are the same for every process.
    pub fn write_plan(&self, recipe: &Recipe, units: &[Fingerprint]) -> Result<()> {
        let place = plan_place(&recipe.kind, &recipe.fingerprint());
        let plan = UnitPlan { recipe: recipe.clone(), units: units.to_vec() };
        match self.kept::<UnitPlan>(&place) {
            Ok(Some(known)) if known.units == plan.units => return Ok(()),
            Ok(_) => {}
            Err(error @ (Error::OtherFormat { .. } | Error::Read { .. })) => return Err(error),
            Err(error) => drop(self.set_record_aside(&place, &error.to_string())?),
        }
        self.keep(&place, &plan)
    }

    /// The unit names `KIND/FINGERPRINT` of each unfinished artifact, by the artifact's fingerprint (32 digits). Damaged plans are left out;
    /// [`Self::verify_records`] finds them.
    pub fn plans(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut units = BTreeMap::new();
        for place in self.record_places()?.iter().filter(|place| place.starts_with("plans/")) {
            if let Ok(Some(plan)) = self.kept::<UnitPlan>(place) {
                let names = plan.units.iter().map(|unit| unit_name(&plan.recipe.kind, unit)).collect();
                units.insert(plan.recipe.fingerprint().short(), names);
            }
        }
        Ok(units)
    }
}

/// The place where `ovenbird verify --max-duration` records how far it came.
pub const CURSOR: &str = "verify.json";

fn sealed<T: Serialize>(place: &str, content: &T) -> Vec<u8> {
    let content = serde_json::to_value(content).expect("BUG: records are plain JSON");
    to_json(&Record { format: FORMAT, place: place.into(), content, seal: Digest::of(&[]) }.sealed())
}

/// An error's message without the path, which the finding has.
fn problem_of(error: &Error) -> String {
    match error {
        Error::Malformed { problem, .. } => problem.clone(),
        Error::Flipped { what, .. } => format!("{what} does not match its digest"),
        Error::OtherFormat { found, known, .. } => format!("has format {found}, this program reads {known}"),
        Error::Read { source, .. } => format!("cannot be read: {source}"),
        _ => error.to_string(),
    }
}

/// `line 17 is damaged, and 2 more`.
fn list_damaged(damaged: &[DamagedLine]) -> Option<String> {
    let first = damaged.first()?;
    let more = if damaged.len() > 1 { format!(", and {} more", damaged.len() - 1) } else { String::new() };
    Some(format!("line {} is damaged{more}", first.number))
}
