//! What is to be kept, and what was there: the records that a garbage collection stands on.
//!
//! ```text
//! HOME/commits.jsonl                  every unit, manifest and record that was published or went, one sealed line each
//! HOME/pins/RUN.json                  a pinned run, with what it used
//! HOME/pipelines/NAME.json            what each step of a pipeline came to when it was last there
//! HOME/plans/KIND/FINGERPRINT.json    an artifact in the making: which units it will have
//! HOME/runs/ID/request.json           what a run was asked
//! HOME/runs/ID/events.jsonl           what happened in it, one sealed line each
//! ```
//!
//! A record's *place* is its path in the home, and its seal is keyed by that. The journal of commits tells what was lost from what never
//! was, and of a log that ended how long it is. It comes after the thing itself where something is published, and before it where
//! something goes: cut off in between, a thing is there and not noted, and the next start adopts it.

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
    verify::{Class, FOLDERS, Finding},
};

/// The journal of commits.
const COMMITS: &str = "commits.jsonl";
/// Says of which format a home is.
const HOME_FORMAT: &str = "format.json";
/// The folders of a home that show that it is in use.
const IN_USE: [&str; 4] = ["units", "artifacts", "runs", COMMITS];
/// How the name of a run's log ends.
const LOG: &str = "/events.jsonl";

/// A line of the journal of commits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CommitLine {
    /// A unit was published: `KIND/FINGERPRINT`, as its folder is named.
    Commit {
        unit: String,
        bytes: u64,
        /// See [`crate::UnitKey::family`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        family: Option<Fingerprint>,
    },
    /// A unit went, and why.
    Gone { unit: String, why: String },
    /// A record was published, or a log was begun or has ended.
    Kept {
        record: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ended: Option<Ended>,
    },
    /// A record went, and why.
    Removed { record: String, why: String },
}

/// What the journal of commits says of a unit that is there.
#[derive(Debug, Clone, Copy)]
pub struct Noted {
    /// Size of its files.
    pub bytes: u64,
    /// See [`crate::UnitKey::family`].
    pub family: Option<Fingerprint>,
}

/// How long a log is that nobody appends to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    bytes: u64,
    /// Those that are sound.
    lines: usize,
}

/// Records that are there by the journal of commits: their places, and of logs how they ended.
type NotedRecords = BTreeMap<String, Option<Ended>>;

/// What the journal of commits says is there.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    /// As `KIND/FINGERPRINT`.
    pub(crate) units: BTreeMap<String, Noted>,
    pub(crate) records: NotedRecords,
    pub(crate) damaged: Vec<DamagedLine>,
    is_there: bool,
}

/// A record as it is written.
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

/// Where the plan of an artifact in the making lies in the home.
pub(crate) fn plan_place(kind: &str, fingerprint: &Fingerprint) -> String {
    format!("plans/{}/{}.json", kind_name(kind), fingerprint.short())
}

impl Store {
    /// Fails where `format.json` is damaged, of another format, or gone from a home that is in use.
    pub(crate) fn check_home(&self) -> Result<()> {
        let path = self.home().join(HOME_FORMAT);
        if self.kept::<Value>(HOME_FORMAT)?.is_some() {
            return Ok(());
        }
        match IN_USE.iter().find(|name| self.publisher().disk().look(&self.home().join(name)).is_ok()) {
            Some(name) => Err(Error::malformed(&path, format!("is missing, and the home has a `{name}`"))),
            None => Ok(()),
        }
    }

    /// Fails where the home is gone that was entered: nothing is to come back of it in part.
    pub fn check_there(&self) -> Result<()> {
        match self.publisher().disk().look(&self.home().join(HOME_FORMAT)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::malformed(self.home(), "is gone, or its `format.json` is; it was there before")),
        }
    }

    /// Makes the home one of this format.
    pub(crate) fn settle(&self) -> Result<()> {
        self.check_home()?;
        match self.read_if_there(&self.home().join(HOME_FORMAT))? {
            Some(_) => Ok(()),
            None => self.write_home_format(),
        }
    }

    fn write_home_format(&self) -> Result<()> {
        self.publisher().replace(&self.home().join(HOME_FORMAT), &sealed(HOME_FORMAT, &Value::Null))
    }

    /// Writes `format.json` anew where what lies in the home shows that it is of this format; says whether it does.
    pub fn mend_home_format(&self) -> Result<bool> {
        let has_lines = Lines::read(self.publisher(), self.home(), COMMITS)?.is_some_and(|lines| lines.sound().next().is_some());
        if !has_lines && self.manifests()?.is_empty() {
            return Ok(false);
        }
        self.publisher().set_aside(&self.home().join(HOME_FORMAT), &self.home().join("quarantine").join("records"))?;
        self.write_home_format()?;
        Ok(true)
    }

    /// Writes a record, replacing what was there.
    pub fn keep<T: Serialize>(&self, place: &str, content: &T) -> Result<()> {
        self.put_record(place, &sealed(place, content))
    }

    pub(crate) fn put_record(&self, place: &str, bytes: &[u8]) -> Result<()> {
        self.check_there()?;
        let path = self.home().join(place);
        let is_new = self.publisher().disk().look(&path).is_err();
        self.publisher().replace(&path, bytes)?;
        if is_new { self.note(&CommitLine::Kept { record: place.into(), ended: None }) } else { Ok(()) }
    }

    /// Reads a record; none where there is no file.
    pub fn kept<T: DeserializeOwned>(&self, place: &str) -> Result<Option<T>> {
        let path = self.home().join(place);
        let Some(record) = self.read_record::<Record>(&path)? else { return Ok(None) };
        if record.place != place {
            return Err(Error::malformed(&path, format!("is the record of {}", record.place)));
        }
        serde_json::from_value(record.content).map(Some).map_err(|error| Error::malformed(&path, error.to_string()))
    }

    /// Removes a record for good.
    pub fn remove_record(&self, place: &str, why: &str) -> Result<()> {
        let path = self.home().join(place);
        if self.publisher().disk().look(&path).is_err() {
            return Ok(());
        }
        self.note_removed(place, why)?;
        self.publisher().remove(&path)
    }

    /// Notes that a record is gone for good.
    pub fn note_removed(&self, place: &str, why: &str) -> Result<()> {
        self.note(&CommitLine::Removed { record: place.into(), why: why.into() })
    }

    /// Sets a record aside with the reason beside it. `None`: it is not there.
    pub fn set_record_aside(&self, place: &str, why: &str) -> Result<Option<PathBuf>> {
        let path = self.home().join(place);
        let folder = Path::new(place).parent().unwrap_or(Path::new("")).to_string_lossy().replace('/', ".");
        let Some(aside) = self.publisher().set_aside(&path, &self.home().join("quarantine").join(format!("records.{folder}")))? else {
            return Ok(None);
        };
        self.publisher().replace(&aside.with_extension("reason.txt"), format!("{why}\n").as_bytes())?;
        self.note_removed(place, why)?;
        Ok(Some(aside))
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

    /// Notes how long the log of a run is, to which nobody appends any more.
    pub fn end_log(&self, place: &str) -> Result<()> {
        let lines = Lines::read(self.publisher(), self.home(), place)?;
        let ended = lines.map(|lines| Ended { bytes: lines.bytes(), lines: lines.sound().count() });
        self.note(&CommitLine::Kept { record: place.into(), ended })
    }

    /// Keeps the sound lines of a journal alone; the whole of it is set aside.
    pub fn mend_journal(&self, place: &str, why: &str) -> Result<()> {
        let Some(lines) = Lines::read(self.publisher(), self.home(), place)? else { return Ok(()) };
        let path = self.home().join(place);
        // Appended to by nobody: opened anew below.
        *self.commits.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let aside = self.publisher().set_aside(&path, &self.home().join("quarantine").join("records"))?;
        self.publisher().replace(&path, &lines.mended())?;
        if let Some(aside) = aside {
            self.publisher().replace(&aside.with_extension("reason.txt"), format!("{why}\n").as_bytes())?;
        }
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
            // Never fsynced again through this handle. What the disk lost of it is adopted by a later start.
            *journal = None;
        }
        noted
    }

    pub(crate) fn note_unit(&self, record: &UnitRecord) -> Result<()> {
        let unit = unit_name(&record.key.kind, &record.key.fingerprint);
        self.note(&CommitLine::Commit { unit, bytes: record.bytes(), family: record.key.family })
    }

    /// What the journal of commits says. A line that is damaged says nothing.
    pub(crate) fn journal(&self) -> Result<Commits> {
        let mut commits = Commits::default();
        let Some(lines) = Lines::read(self.publisher(), self.home(), COMMITS)? else { return Ok(commits) };
        commits.is_there = true;
        commits.damaged = lines.damaged().to_vec();
        for line in lines.sound() {
            match serde_json::from_str(&line) {
                Ok(CommitLine::Commit { unit, bytes, family }) => drop(commits.units.insert(unit, Noted { bytes, family })),
                Ok(CommitLine::Gone { unit, .. }) => drop(commits.units.remove(&unit)),
                Ok(CommitLine::Kept { record, ended }) => drop(commits.records.insert(record, ended)),
                Ok(CommitLine::Removed { record, .. }) => drop(commits.records.remove(&record)),
                // Of a later version.
                Err(_) => {}
            }
        }
        Ok(commits)
    }

    /// The units that the journal of commits says are there, as `KIND/FINGERPRINT`.
    pub fn noted_units(&self) -> Result<BTreeMap<String, Noted>> {
        Ok(self.journal()?.units)
    }

    fn noted_records(&self) -> Result<NotedRecords> {
        Ok(self.journal()?.records)
    }

    /// The places of all records that are there, ascending.
    pub fn record_places(&self) -> Result<Vec<String>> {
        let mut places = Vec::new();
        let list = |top: &str| self.publisher().list(&self.home().join(top));
        let is_sound = |name: &str| !name.starts_with(TEMPORARY);
        for top in ["pins", "pipelines"] {
            let names = list(top)?.into_iter().filter(|(name, is_folder)| !is_folder && is_sound(name));
            places.extend(names.map(|(name, _)| format!("{top}/{name}")));
        }
        for (kind, _) in list("plans")?.into_iter().filter(|(_, is_folder)| *is_folder) {
            let names = list(&format!("plans/{kind}"))?.into_iter().filter(|(name, _)| is_sound(name));
            places.extend(names.map(|(name, _)| format!("plans/{kind}/{name}")));
        }
        for (run, _) in list("runs")?.into_iter().filter(|(name, is_folder)| *is_folder && is_sound(name)) {
            let names = list(&format!("runs/{run}"))?.into_iter().filter(|(name, _)| ["request.json", &LOG[1..]].contains(&name.as_str()));
            places.extend(names.map(|(name, _)| format!("runs/{run}/{name}")));
        }
        Ok(places)
    }

    /// Notes records that are there and were not noted; and, where nobody else is at work, how long the logs are of runs that were cut off.
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

    /// What lies in the place of a record, or of a folder of the home, and is none: a folder, a pipe, a link to nothing. It is looked for first:
    /// none of it can be read.
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

    /// What is damaged or gone of the records, and of the manifests that were noted.
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
            find(Class::Record, COMMITS, "is missing: what was there and is lost is not known".into());
        }
        if let Some(problem) = words(&journal.damaged) {
            find(Class::Record, COMMITS, problem);
        }
        let n_unknown = if journal.is_there { self.n_not_noted(&journal)? } else { 0 };
        if n_unknown > 0 {
            find(Class::Record, COMMITS, format!("lines are lost: it does not have {n_unknown} of the units that artifacts list"));
        }
        let places = self.record_places()?;
        let is_gone = |place: &&String| self.publisher().disk().look(&self.home().join(place)).is_err();
        let gone: Vec<&String> = journal.records.keys().filter(is_gone).collect();
        // Asked again, because they may go while we look.
        let still = if gone.is_empty() { NotedRecords::new() } else { self.noted_records()? };
        for place in gone.into_iter().filter(|place| still.contains_key(*place)) {
            let class = if place.starts_with("artifacts/") { Class::Manifest } else { Class::Record };
            find(class, place, "was there and is gone".into());
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

    /// How many units that are there, and that artifacts list, were never noted: each was noted before its artifact was published.
    fn n_not_noted(&self, journal: &Commits) -> Result<usize> {
        let mut unknown = BTreeSet::new();
        for manifest in self.manifests()? {
            let is_unknown = |unit: &String| !journal.units.contains_key(unit) && self.unit_path(unit).exists();
            unknown.extend(manifest.unit_names().filter(is_unknown));
        }
        Ok(unknown.len())
    }

    /// What is damaged of a run's log. What a power cut leaves of one that had not ended is none.
    fn log_problem(&self, place: &str, ended: Option<Ended>) -> Result<Option<String>> {
        let lines = Lines::read(self.publisher(), self.home(), place)?.unwrap_or_default();
        let damaged: Vec<DamagedLine> = lines.damaged().iter().filter(|line| !line.has_zeros).copied().collect();
        let n_sound = lines.sound().count();
        Ok(match ended {
            Some(Ended { bytes, .. }) if bytes != lines.bytes() => Some(format!("expected {bytes} bytes, found {}", lines.bytes())),
            Some(Ended { lines, .. }) if lines != n_sound => Some(format!("expected {lines} sound lines, found {n_sound}")),
            _ => words(&damaged),
        })
    }

    /// Writes down which units an artifact will have, before the first is made. It does not depend on who makes them.
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

    /// The units, as `KIND/FINGERPRINT`, of every artifact in the making, by the artifact's name (32 digits). A plan that is damaged is a
    /// finding of [`Self::verify_records`].
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

/// How far an earlier scan of the home came: see `ovenbird verify --max-duration`.
pub const CURSOR: &str = "verify.json";

fn sealed<T: Serialize>(place: &str, content: &T) -> Vec<u8> {
    let content = serde_json::to_value(content).expect("BUG: records are plain JSON");
    to_json(&Record { format: FORMAT, place: place.into(), content, seal: Digest::of(&[]) }.sealed())
}

/// An error's words without the file, which a finding names.
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
fn words(damaged: &[DamagedLine]) -> Option<String> {
    let first = damaged.first()?;
    let more = if damaged.len() > 1 { format!(", and {} more", damaged.len() - 1) } else { String::new() };
    Some(format!("line {} is damaged{more}", first.number))
}
