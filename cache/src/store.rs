//! The layout of a home, and the status of units and artifacts: valid, damaged or absent.
//!
//! ```text
//! HOME/format.json                         version of this layout
//! HOME/units/KIND/FINGERPRINT/unit.json    a unit: its record, and its files below PORT/
//! HOME/parts/KIND/FINGERPRINT/             the finished work of a unit that was cut off: see `parts.rs`
//! HOME/artifacts/KIND/FINGERPRINT.json     an artifact: the manifest that lists its units
//! HOME/choices/KIND/ITEM_KEY/              a choice that holds for all units with an item key: see `choice.rs`
//! HOME/plans/ HOME/pins/ HOME/pipelines/ HOME/runs/ HOME/commits.jsonl    records: see `records.rs`
//! HOME/leases/ HOME/sessions/              the right to make a unit, processes at work: see `lease.rs`
//! HOME/web/                                what was fetched from elsewhere: see `spool.rs`
//! HOME/quarantine/                         damaged files and folders, each with its reason
//! HOME/ledger/                             an index that can be deleted: see `ledger.rs`
//! ```
//!
//! `KIND` is the stage's kind with `-` for `/`; `FINGERPRINT` is the first 32 hexadecimal digits. Artifacts share units: two
//! artifacts that list a unit with the same fingerprint refer to the same folder.
//!
//! A unit is published by renaming its folder, after everything in it was fsynced; then a line in the journal of commits
//! notes it, so that a lost unit can be told from one that was never made. Any number of processes may use a home at once:
//! readers need no lock, and a process that makes a unit holds its [`Lease`].

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Digest, Draft, Error, FileRecord, Fingerprint, Noted, Recipe, Result,
    disk::Found,
    inputs::InputFile,
    journal::Journal,
    lease::{self, Lease, Owner, Session, Watch},
    parts::PARTS,
    publish::Publisher,
    record::{Manifest, Provenance, Sealed, UnitKey, UnitRecord, port_digest},
    records::{CommitLine, plan_place},
    spool::SPOOL_FOLDERS,
};

/// The version of the layout that this program reads and writes.
pub(crate) const FORMAT: u32 = 3;
pub(crate) const UNIT_FILE: &str = "unit.json";
/// The digests of a unit's items, 32 bytes each, in order.
pub(crate) const ITEMS_FILE: &str = "items";

/// The status of a unit or artifact.
#[derive(Debug)]
pub enum Status<T> {
    /// Its record is valid and its files have the published sizes.
    Valid(T),
    /// It differs from what was published; each entry names the file, what was expected and what was found.
    Damaged(Vec<String>),
    /// It does not exist.
    Absent,
}

/// A valid artifact.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its manifest.
    pub manifest: Manifest,
    /// Whether units were deleted by `cache gc --drop`: its digests are known, but it cannot be read.
    pub is_dropped: bool,
    units_folder: PathBuf,
}

impl Artifact {
    /// The files of an output port in the order of the units, sorted by name within a unit.
    pub fn port(&self, port: &str) -> Vec<InputFile> {
        self.records(port).into_iter().map(|(file, _)| file).collect()
    }

    /// As [`Self::port`], with the files' records.
    pub fn records(&self, port: &str) -> Vec<(InputFile, &FileRecord)> {
        let files = |unit| UnitRecord::records_in(unit, &self.units_folder.join(unit.key.fingerprint.short()), port);
        self.manifest.units.iter().flat_map(files).collect()
    }
}

/// The units, artifacts and records of a home.
#[derive(Debug, Clone)]
pub struct Store {
    home: PathBuf,
    publisher: Publisher,
    pub(crate) commits: Arc<Mutex<Option<Journal>>>,
}

/// The answer to [`Store::claim`].
#[derive(Debug)]
pub enum Claim {
    /// The unit is published.
    Made(UnitRecord),
    /// The caller has the lease and makes the unit.
    Mine(Lease),
    /// Another process is making the unit.
    Held(Owner),
}

/// What [`Store::enter`] recovered from dead processes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// The number of unfinished files and folders removed.
    pub swept: usize,
    /// The number of published units that were missing in the journal of commits and are now noted.
    pub adopted: usize,
    /// The number of damaged lines in the journal of commits.
    pub damaged_lines: usize,
}

impl Store {
    /// Opens a home, which may not exist yet; writes nothing. Fails if `format.json` is damaged or missing.
    pub fn open(home: &Path) -> Result<Self> {
        Self::open_on(Publisher::default(), home)
    }

    pub(crate) fn open_on(publisher: Publisher, home: &Path) -> Result<Self> {
        let store = Self::open_at(publisher, home)?;
        store.check_home()?;
        Ok(store)
    }

    /// Opens a home to verify or repair it: `format.json` may be damaged or missing.
    pub fn open_to_repair(home: &Path) -> Result<Self> {
        let store = Self::open_at(Publisher::default(), home)?;
        match store.check_home() {
            Ok(()) | Err(Error::Malformed { .. } | Error::Flipped { .. }) => Ok(store),
            // A folder or a pipe in its place.
            Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => Ok(store),
            Err(error) => Err(error),
        }
    }

    fn open_at(publisher: Publisher, home: &Path) -> Result<Self> {
        if let Ok(Found::File(_)) = publisher.disk().look(home) {
            return Err(Error::write(home, io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self { home: home.to_owned(), publisher, commits: Arc::default() })
    }

    /// The home's folder.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The publisher that writes to the home.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// Begins a session in the home, which is created if it is missing, and recovers from dead processes.
    pub fn enter(&self) -> Result<(Session, Recovered)> {
        self.settle()?;
        let session = Session::begin(&self.home)?;
        Ok((session, self.recover()?))
    }

    /// The processes at work in this home.
    pub fn at_work(&self) -> Vec<Owner> {
        lease::sessions(&self.home)
    }

    /// The time since a process at work in this home gave its last sign of life; `None` where it has ended.
    pub fn silence_of(&self, owner: &Owner) -> Option<Duration> {
        lease::silence_of(&self.home, owner)
    }

    /// Removes unfinished files and folders of dead processes, and notes published units and records that the journal of
    /// commits lacks. It may be interrupted and repeated.
    pub(crate) fn recover(&self) -> Result<Recovered> {
        let is_over = |owner: &Owner| lease::is_over(&self.home, owner);
        let sweep = |folder: &Path| self.publisher.sweep(folder, &is_over);
        let mut recovered = Recovered { swept: sweep(&self.home)?, ..Recovered::default() };
        let tops = ["units", PARTS, "artifacts", "choices", "plans", "pins", "pipelines", "runs", "quarantine"];
        for top in tops.into_iter().chain(SPOOL_FOLDERS) {
            recovered.swept += sweep(&self.home.join(top))?;
            for (name, is_folder) in self.publisher.list(&self.home.join(top))? {
                if is_folder {
                    recovered.swept += sweep(&self.home.join(top).join(name))?;
                }
            }
        }
        let journal = self.journal()?;
        recovered.damaged_lines = journal.damaged.len();
        for unit in self.unit_names()? {
            if !journal.units.contains_key(&unit)
                && let Status::Valid(record) = self.unit_at(&unit)?
            {
                self.note_unit(&record)?;
                recovered.adopted += 1;
            }
        }
        self.adopt_records(&journal)?;
        Ok(recovered)
    }

    /// The mean size of the published units with an item key; of all units of the kind if there are none. `None` without units.
    pub fn mean_unit_bytes(&self, kind: &str, item_key: Option<Fingerprint>) -> Result<Option<u64>> {
        let prefix = format!("{}/", kind_name(kind));
        let of_kind: Vec<Noted> =
            self.noted_units()?.into_iter().filter(|(unit, _)| unit.starts_with(&prefix)).map(|(_, noted)| noted).collect();
        let with_key: Vec<Noted> = of_kind.iter().filter(|noted| item_key.is_some() && noted.item_key == item_key).copied().collect();
        let like = if with_key.is_empty() { of_kind } else { with_key };
        Ok(like.iter().map(|noted| noted.bytes).sum::<u64>().checked_div(like.len() as u64))
    }

    /// The names of all units, `KIND/FINGERPRINT`, ascending.
    pub fn unit_names(&self) -> Result<Vec<String>> {
        self.names_below("units")
    }

    /// The names of the units that have a folder below `top`, ascending.
    pub(crate) fn names_below(&self, top: &str) -> Result<Vec<String>> {
        let top = self.home.join(top);
        let mut names = Vec::new();
        for (kind, _) in self.publisher.list(&top)?.into_iter().filter(|(_, is_folder)| *is_folder) {
            let of_kind = self.publisher.list(&top.join(&kind))?.into_iter();
            names.extend(of_kind.filter(|(name, _)| is_folder_name(name)).map(|(name, _)| format!("{kind}/{name}")));
        }
        Ok(names)
    }

    /// The folder of a unit, by its name `KIND/FINGERPRINT`.
    pub fn unit_path(&self, name: &str) -> PathBuf {
        self.home.join("units").join(name)
    }

    /// The status of a unit, by its record and the sizes of its files.
    pub fn unit(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Status<UnitRecord>> {
        self.unit_at(&unit_name(kind, fingerprint))
    }

    /// As [`Self::unit`], by the unit's name `KIND/FINGERPRINT`.
    pub fn unit_at(&self, name: &str) -> Result<Status<UnitRecord>> {
        self.status_of(&self.unit_path(name), name)
    }

    /// The status of a unit or its part in a folder.
    pub(crate) fn status_of(&self, folder: &Path, name: &str) -> Result<Status<UnitRecord>> {
        let record: UnitRecord = match self.read_record_of(folder, UNIT_FILE) {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(Status::Absent),
            Err(error @ (Error::OtherFormat { .. } | Error::Read { .. })) => return Err(error),
            Err(error) => return Ok(Status::Damaged(vec![error.to_string()])),
        };
        let own_name = unit_name(&record.key.kind, &record.key.fingerprint);
        if own_name != name {
            return Ok(Status::Damaged(vec![format!("{}: contains unit {own_name}", folder.display())]));
        }
        let findings = self.missing_or_resized(folder, &record);
        Ok(if findings.is_empty() { Status::Valid(record) } else { Status::Damaged(findings) })
    }

    fn missing_or_resized(&self, folder: &Path, record: &UnitRecord) -> Vec<String> {
        let check = |file: &FileRecord| {
            let path = folder.join(&file.name);
            match self.publisher.disk().look(&path) {
                Ok(Found::File(bytes)) if bytes == file.bytes => None,
                Ok(Found::File(bytes)) => Some(format!("{}: expected {} bytes, found {bytes}", path.display(), file.bytes)),
                Ok(Found::Folder) => Some(format!("{}: expected a file, found a folder", path.display())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Some(format!("{}: missing", path.display())),
                Err(error) => Some(format!("{}: {error}", path.display())),
            }
        };
        record.files.iter().filter_map(check).collect()
    }

    /// Takes the lease on a unit unless it is published; a damaged unit is moved to quarantine first.
    pub fn claim(&self, kind: &str, fingerprint: &Fingerprint, watch: &mut Watch) -> Result<Claim> {
        let name = unit_name(kind, fingerprint);
        if let Status::Valid(record) = self.unit_at(&name)? {
            return Ok(Claim::Made(record));
        }
        let lease = match self.lease_or_break(&name, watch)? {
            Ok(lease) => lease,
            Err(holder) => return Ok(Claim::Held(holder)),
        };
        // The previous holder may have published it in the meantime.
        match self.unit_at(&name)? {
            Status::Valid(record) => return Ok(Claim::Made(record)),
            Status::Damaged(findings) => drop(self.quarantine(&name, &findings)?),
            Status::Absent => {}
        }
        Ok(Claim::Mine(lease))
    }

    /// Takes the lease on a unit, or returns its holder.
    pub fn lease(&self, name: &str) -> Result<Result<Lease, Owner>> {
        Lease::take(&self.lease_path(name))
    }

    /// As [`Self::lease`]; if the holder has been silent for too long (see [`Watch`]), its lease is broken for the next call.
    pub(crate) fn lease_or_break(&self, name: &str, watch: &mut Watch) -> Result<Result<Lease, Owner>> {
        let taken = self.lease(name)?;
        if let Err(holder) = &taken
            && watch.is_silent(&self.home, holder)
        {
            lease::break_lease(&self.lease_path(name), holder);
        }
        Ok(taken)
    }

    fn lease_path(&self, name: &str) -> PathBuf {
        self.home.join("leases").join(name.replace('/', "."))
    }

    /// Notes in the journal of commits that a unit was removed.
    pub fn note_gone(&self, name: &str, why: &str) -> Result<()> {
        self.note(&CommitLine::Gone { unit: name.into(), why: why.into() })
    }

    /// The files of an output port of one published unit, sorted by name.
    pub fn unit_port(&self, record: &UnitRecord, port: &str) -> Vec<InputFile> {
        record.port_in(&self.unit_path(&unit_name(&record.key.kind, &record.key.fingerprint)), port)
    }

    /// The digests of a published unit's items, in order; empty for a unit without items.
    pub fn items_of(&self, record: &UnitRecord) -> Result<Vec<Digest>> {
        self.items_in(&self.unit_path(&unit_name(&record.key.kind, &record.key.fingerprint)), record)
    }

    pub(crate) fn items_in(&self, folder: &Path, record: &UnitRecord) -> Result<Vec<Digest>> {
        let path = folder.join(ITEMS_FILE);
        let Some(file) = record.files.iter().find(|file| file.name == ITEMS_FILE) else { return Ok(Vec::new()) };
        let bytes = self.publisher.disk().read(&path).map_err(|source| Error::read(&path, source))?;
        let (expected, found) = (file.digest, Digest::of(&bytes));
        if expected != found {
            return Err(Error::Flipped { path, what: "the list of items".into(), expected, found });
        }
        let (items, _) = bytes.as_chunks::<32>();
        Ok(items.iter().map(|item| blake3::Hash::from_bytes(*item).into()).collect())
    }

    /// Opens a draft for a unit.
    pub fn begin_unit(&self, key: &UnitKey) -> Result<Draft> {
        self.check_there()?;
        self.publisher.begin(&self.unit_path(&unit_name(&key.kind, &key.fingerprint)))
    }

    /// Publishes a unit's draft and returns its record. If another process published the unit first, returns that record.
    pub fn commit_unit(&self, draft: Draft, key: UnitKey, items: &[Digest], metrics: BTreeMap<String, Value>) -> Result<UnitRecord> {
        let name = unit_name(&key.kind, &key.fingerprint);
        let (record, is_published) = commit_draft(draft, key, items, metrics)?;
        if is_published {
            self.note_unit(&record)?;
            return Ok(record);
        }
        match self.unit_at(&name)? {
            Status::Valid(winner) => Ok(winner),
            Status::Damaged(findings) => Err(Error::malformed(&self.unit_path(&name), findings.join("; "))),
            Status::Absent => Err(Error::malformed(&self.unit_path(&name), "was published by another process and then removed")),
        }
    }

    /// Moves a published unit of another home on the same disk into this one, where no such unit is.
    pub fn adopt_unit(&self, from: &Self, name: &str) -> Result<()> {
        let (path, target) = (from.unit_path(name), self.unit_path(name));
        let Status::Valid(record) = from.unit_at(name)? else { return Err(Error::malformed(&path, "is missing or damaged")) };
        let kind = target.parent().expect("BUG: a unit is in the folder of its kind");
        self.publisher.set_aside(&path, kind)?;
        self.note_unit(&record)
    }

    /// Moves a damaged unit to quarantine, so that it is recomputed; its undamaged items can be reused from there. Returns the new
    /// path; `None` if the unit no longer exists.
    pub fn quarantine(&self, name: &str, findings: &[String]) -> Result<Option<PathBuf>> {
        self.set_unit_aside(name, &name.replace('/', "."), findings)
    }

    /// As [`Self::quarantine`], for a unit with wrong content: none of its items are reused.
    pub fn condemn(&self, name: &str, findings: &[String]) -> Result<Option<PathBuf>> {
        self.set_unit_aside(name, &format!("wrong.{}", name.replace('/', ".")), findings)
    }

    fn set_unit_aside(&self, name: &str, folder: &str, findings: &[String]) -> Result<Option<PathBuf>> {
        let why = findings.join("\n");
        let aside = self.set_aside(&self.unit_path(name), folder, &why)?;
        if aside.is_some() {
            self.note(&CommitLine::Gone { unit: name.into(), why })?;
        }
        Ok(aside)
    }

    /// Moves a file or folder to `quarantine/FOLDER/` and writes the reason into a file beside it. Returns the new path; `None` if
    /// `path` does not exist.
    pub(crate) fn set_aside(&self, path: &Path, folder: &str, why: &str) -> Result<Option<PathBuf>> {
        let aside = self.publisher.set_aside(path, &self.home.join("quarantine").join(folder))?;
        if let Some(aside) = &aside {
            self.publisher.replace(&aside.with_extension("reason.txt"), format!("{why}\n").as_bytes())?;
        }
        Ok(aside)
    }

    /// The folders of the damaged units of a kind, the latest first.
    pub(crate) fn quarantined(&self, kind: &str) -> Result<Vec<PathBuf>> {
        let quarantine = self.home.join("quarantine");
        let of_kind = format!("{}.", kind_name(kind));
        let mut folders = Vec::new();
        for (unit, _) in self.publisher.list(&quarantine)?.into_iter().filter(|(name, _)| name.starts_with(&of_kind)) {
            let times = self.publisher.list(&quarantine.join(&unit))?.into_iter().filter(|(_, is_folder)| *is_folder);
            folders.extend(times.map(|(name, _)| quarantine.join(&unit).join(name)));
        }
        folders.reverse();
        Ok(folders)
    }

    /// Deletes a unit, as garbage collection does.
    pub fn remove_unit(&self, name: &str, why: &str) -> Result<()> {
        // Noted first: after a crash in between, the next start notes the unit again. In the other order `verify` would report it as lost.
        self.note(&CommitLine::Gone { unit: name.into(), why: why.into() })?;
        self.publisher.remove(&self.unit_path(name))
    }

    /// The name `KIND/FINGERPRINT` of the unit that a file belongs to; `None` for files outside `units/`.
    pub fn unit_of(&self, path: &Path) -> Option<String> {
        self.name_below("units", path)
    }

    /// The name of the unit that a file below `top` belongs to.
    pub(crate) fn name_below(&self, top: &str, path: &Path) -> Option<String> {
        let mut parts = path.strip_prefix(self.home.join(top)).ok()?.components();
        let (kind, folder) = (parts.next()?, parts.next()?);
        Some(format!("{}/{}", kind.as_os_str().to_str()?, folder.as_os_str().to_str()?))
    }

    /// The status of an artifact: valid if its manifest is, and if each unit is valid or was deleted by `cache gc --drop`.
    pub fn artifact(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Status<Artifact>> {
        let manifest = match self.manifest(kind, fingerprint) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Ok(Status::Absent),
            Err(error @ (Error::OtherFormat { .. } | Error::Read { .. })) => return Err(error),
            Err(error) => return Ok(Status::Damaged(vec![error.to_string()])),
        };
        let (mut findings, mut is_dropped) = (Vec::new(), false);
        for (unit_idx, unit) in manifest.units.iter().enumerate() {
            match self.unit(kind, &unit.key.fingerprint)? {
                Status::Valid(record) if record.files == unit.files => {}
                // Recomputed for another artifact that shares it. This artifact is published again from the units on disk.
                Status::Valid(_) => findings.push(format!("unit {unit_idx} ({}) has other files than listed", unit.key.fingerprint)),
                Status::Damaged(found) => findings.extend(found),
                Status::Absent if manifest.is_dropped => is_dropped = true,
                Status::Absent => findings.push(format!("unit {unit_idx} ({}) is missing", unit.key.fingerprint)),
            }
        }
        if findings.is_empty() {
            Ok(Status::Valid(Artifact { manifest, is_dropped, units_folder: self.units_folder(kind) }))
        } else {
            Ok(Status::Damaged(findings))
        }
    }

    /// An artifact whose units are missing or damaged, read from its manifest: after recomputation its ports have the same digests.
    pub fn artifact_as_it_was(&self, kind: &str, fingerprint: &Fingerprint) -> Option<Artifact> {
        let manifest = self.manifest(kind, fingerprint).ok()??;
        Some(Artifact { manifest, is_dropped: true, units_folder: self.units_folder(kind) })
    }

    /// An artifact's manifest, whatever the status of its units; `None` if there is none.
    pub fn manifest(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Option<Manifest>> {
        self.manifest_at(&self.manifest_path(kind, fingerprint))
    }

    /// Reads a manifest and checks that it belongs at this path.
    pub(crate) fn manifest_at(&self, path: &Path) -> Result<Option<Manifest>> {
        let Some(manifest) = self.read_record::<Manifest>(path)? else { return Ok(None) };
        let recipe = manifest.recipe.fingerprint();
        if recipe != manifest.fingerprint || self.manifest_path(&manifest.recipe.kind, &recipe) != *path {
            return Err(Error::malformed(path, format!("is the manifest of {} {recipe}", manifest.recipe.kind)));
        }
        Ok(Some(manifest))
    }

    /// The paths of all manifests, ascending.
    pub fn manifest_paths(&self) -> Result<Vec<PathBuf>> {
        let artifacts = self.home.join("artifacts");
        let mut paths = Vec::new();
        for (kind, _) in self.publisher.list(&artifacts)?.into_iter().filter(|(_, is_folder)| *is_folder) {
            let of_kind = self.publisher.list(&artifacts.join(&kind))?.into_iter();
            paths.extend(of_kind.filter(|(name, _)| name.ends_with(".json")).map(|(name, _)| artifacts.join(&kind).join(name)));
        }
        Ok(paths)
    }

    /// Publishes an artifact whose units are published. An artifact that was published before keeps the port digests of its
    /// first publication.
    pub fn commit_artifact(&self, recipe: Recipe, ports: &[&str], units: Vec<UnitRecord>, made: Provenance) -> Result<Artifact> {
        let fingerprint = recipe.fingerprint();
        let units_folder = self.units_folder(&recipe.kind);
        let path = self.manifest_path(&recipe.kind, &fingerprint);
        let ports = match self.manifest_at(&path) {
            Ok(Some(earlier)) => earlier.ports,
            Ok(None) => ports.iter().map(|port| ((*port).to_owned(), port_digest(&units, port))).collect(),
            Err(error @ (Error::OtherFormat { .. } | Error::Read { .. })) => return Err(error),
            Err(error) => {
                self.quarantine_manifest(&path, &error.to_string())?;
                ports.iter().map(|port| ((*port).to_owned(), port_digest(&units, port))).collect()
            }
        };
        let seal = Digest::of(&[]);
        let manifest = Manifest { format: FORMAT, fingerprint, recipe, ports, units, made, is_dropped: false, seal }.sealed();
        self.put_record(&manifest_place(&manifest.recipe.kind, &fingerprint), &to_json(&manifest))?;
        self.remove_record(&plan_place(&manifest.recipe.kind, &fingerprint), "the artifact is published")?;
        Ok(Artifact { manifest, is_dropped: false, units_folder })
    }

    /// Notes in the manifest that the units of an artifact may be deleted; its recipe and port digests stay known.
    pub fn let_go(&self, manifest: Manifest) -> Result<()> {
        let place = manifest_place(&manifest.recipe.kind, &manifest.fingerprint);
        self.put_record(&place, &to_json(&Manifest { is_dropped: true, ..manifest }.sealed()))
    }

    /// Moves a manifest to quarantine: it is damaged, or its artifact is to be recomputed.
    pub fn quarantine_manifest(&self, path: &Path, why: &str) -> Result<()> {
        self.set_record_aside(&self.place_of(path), why).map(drop)
    }

    fn units_folder(&self, kind: &str) -> PathBuf {
        self.home.join("units").join(kind_name(kind))
    }

    /// The path of an artifact's manifest.
    pub fn manifest_path(&self, kind: &str, fingerprint: &Fingerprint) -> PathBuf {
        self.home.join(manifest_place(kind, fingerprint))
    }

    pub(crate) fn read_if_there(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        match self.publisher.disk().read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            // `NotADirectory`: a file in the place of a folder, which holds no records.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(source) => Err(Error::read(path, source)),
        }
    }

    /// Reads the record of a published folder; `None` if there is no folder. A folder without its record is an error. Folders appear and
    /// disappear as a whole, so the folder is looked up before the record (it may be published in between) and again after (or removed).
    pub(crate) fn read_record_of<T: DeserializeOwned + Sealed>(&self, folder: &Path, name: &str) -> Result<Option<T>> {
        let is_there = || match self.publisher.disk().look(folder) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(source) => Err(Error::read(folder, source)),
        };
        if !is_there()? {
            return Ok(None);
        }
        let path = folder.join(name);
        match self.read_record(&path)? {
            None if is_there()? => Err(Error::malformed(&path, "is missing")),
            record => Ok(record),
        }
    }

    /// Reads a record and checks its format and its seal; `None` if there is no file.
    pub(crate) fn read_record<T: DeserializeOwned + Sealed>(&self, path: &Path) -> Result<Option<T>> {
        let Some(bytes) = self.read_if_there(path)? else { return Ok(None) };
        // The format is checked first: a record of another version may have fields that this program does not know.
        let value: Value = parse(path, &bytes)?;
        if let Some(format) = value.get("format").and_then(Value::as_u64) {
            let checked = check_format(path, u32::try_from(format).unwrap_or(u32::MAX));
            if checked.is_err() && is_sealed_as_ours::<T>(&value) {
                return Err(Error::malformed(path, format!("says format {format}, but its seal is that of format {FORMAT}")));
            }
            checked?;
        }
        let mut record: T = serde_json::from_value(value).map_err(|error| Error::malformed(path, error.to_string()))?;
        let (expected, found) = (*record.seal_mut(), record.seal_of());
        if expected != found {
            return Err(Error::Flipped { path: path.to_owned(), what: "the record".into(), expected, found });
        }
        Ok(Some(record))
    }
}

/// Publishes a draft with its record. False: another process published the same folder first.
pub(crate) fn commit_draft(draft: Draft, key: UnitKey, items: &[Digest], metrics: BTreeMap<String, Value>) -> Result<(UnitRecord, bool)> {
    if !items.is_empty() {
        let bytes: Vec<u8> = items.iter().flat_map(|item| *item.as_bytes()).collect();
        draft.write(ITEMS_FILE, &bytes)?;
    }
    let record = UnitRecord { format: FORMAT, key, files: draft.files(), metrics, seal: Digest::of(&[]) }.sealed();
    let is_published = draft.commit(UNIT_FILE, &to_json(&record))?;
    Ok((record, is_published))
}

/// Whether the seal of a record with another format number fits this format: then only the number is damaged.
fn is_sealed_as_ours<T: DeserializeOwned + Sealed>(value: &Value) -> bool {
    let mut value = value.clone();
    value["format"] = FORMAT.into();
    serde_json::from_value::<T>(value).is_ok_and(|mut record| {
        let seal = record.seal_of();
        *record.seal_mut() == seal
    })
}

/// The name of a unit, `KIND/FINGERPRINT`: its folder below `units/`.
pub fn unit_name(kind: &str, fingerprint: &Fingerprint) -> String {
    format!("{}/{}", kind_name(kind), fingerprint.short())
}

/// The path of an artifact's manifest in the home.
pub(crate) fn manifest_place(kind: &str, fingerprint: &Fingerprint) -> String {
    format!("artifacts/{}/{}.json", kind_name(kind), fingerprint.short())
}

pub(crate) fn kind_name(kind: &str) -> String {
    kind.replace('/', "-")
}

pub(crate) fn is_folder_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

pub(crate) fn check_format(path: &Path, found: u32) -> Result<()> {
    if found == FORMAT { Ok(()) } else { Err(Error::OtherFormat { path: path.to_owned(), found, known: FORMAT }) }
}

pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("BUG: records are plain JSON");
    bytes.push(b'\n');
    bytes
}

pub(crate) fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::malformed(path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::publish::replace;

    fn recipe() -> Recipe {
        Recipe { kind: "clip/globals".into(), version: 1, params: json!({}), inputs: BTreeMap::new() }
    }

    fn made() -> Provenance {
        let text = || String::from("test");
        Provenance { program: text(), run: text(), host: text(), device: text(), libtorch: text(), started: text(), wall_s: 0.0 }
    }

    fn key(name: &[u8]) -> UnitKey {
        UnitKey { kind: "clip/globals".into(), fingerprint: blake3::hash(name).into(), item_key: None }
    }

    fn made_unit(store: &Store, name: &[u8], content: &[u8]) -> UnitRecord {
        let draft = store.begin_unit(&key(name)).unwrap();
        draft.write("features/0.arrow", content).unwrap();
        draft.write("log/notes", b"-").unwrap();
        store.commit_unit(draft, key(name), &[Digest::of(name)], BTreeMap::new()).unwrap()
    }

    fn store_with_artifact() -> (tempfile::TempDir, Store, Artifact) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        store.enter().unwrap();
        let units = vec![made_unit(&store, b"0", b"zero"), made_unit(&store, b"1", b"one")];
        let artifact = store.commit_artifact(recipe(), &["features"], units, made()).unwrap();
        (home, store, artifact)
    }

    fn status(store: &Store) -> Status<Artifact> {
        store.artifact("clip/globals", &recipe().fingerprint()).unwrap()
    }

    fn unit_path(store: &Store, name: &[u8]) -> PathBuf {
        store.unit_path(&unit_name("clip/globals", &key(name).fingerprint))
    }

    #[test]
    fn a_committed_artifact_is_found_with_the_files_of_each_port() {
        let (_home, store, _) = store_with_artifact();
        let Status::Valid(artifact) = status(&store) else { panic!("not valid") };
        let contents: Vec<_> = artifact.port("features").iter().map(|file| fs::read(&file.path).unwrap()).collect();
        assert_eq!(contents, [b"zero".to_vec(), b"one".to_vec()]);
        assert_eq!(artifact.port("features")[0].name, "0.arrow");
        assert_eq!(store.items_of(&artifact.manifest.units[1]).unwrap(), [Digest::of(b"1")]);
    }

    #[test]
    fn missing_truncated_swapped_and_unreadable_parts_are_damage_never_absence() {
        type Damage = fn(&Store, &Path);
        let damages: [(&str, Damage); 6] = [
            ("expected 4 bytes, found 2", |_, unit| replace(&unit.join("features/0.arrow"), b"ze").unwrap()),
            ("missing", |store, unit| store.publisher().remove(&unit.join("features/0.arrow")).unwrap()),
            ("unit.json", |_, unit| replace(&unit.join("unit.json"), b"{").unwrap()),
            ("the record does not match its digest", |_, unit| {
                let text = fs::read_to_string(unit.join("unit.json")).unwrap();
                replace(&unit.join("unit.json"), text.replacen("\"bytes\": 4", "\"bytes\": 5", 1).as_bytes()).unwrap();
            }),
            ("contains unit", |store, unit| {
                let other = fs::read(unit_path(store, b"1").join("unit.json")).unwrap();
                replace(&unit.join("unit.json"), &other).unwrap();
            }),
            ("is missing", |store, unit| store.publisher().remove(unit).unwrap()),
        ];
        for (expected, damage) in damages {
            let (_home, store, _) = store_with_artifact();
            damage(&store, &unit_path(&store, b"0"));
            let Status::Damaged(findings) = status(&store) else { panic!("{expected}: not damaged") };
            assert!(findings.len() == 1 && findings[0].contains(expected), "{expected}: {findings:?}");
        }
    }

    #[test]
    fn a_repaired_artifact_keeps_its_identity() {
        let (_home, store, artifact) = store_with_artifact();
        let name = unit_name("clip/globals", &key(b"0").fingerprint);
        let aside = store.quarantine(&name, &["for a test".into()]).unwrap().unwrap();
        assert_eq!(fs::read_to_string(aside.with_extension("reason.txt")).unwrap(), "for a test\n");
        let units = vec![made_unit(&store, b"0", b"zer0"), artifact.manifest.units[1].clone()];
        let repaired = store.commit_artifact(recipe(), &["features"], units, made()).unwrap();
        assert_eq!(repaired.manifest.ports, artifact.manifest.ports);
        assert_ne!(repaired.manifest.units[0].files, artifact.manifest.units[0].files);
    }

    #[test]
    fn one_process_makes_a_unit_after_a_damaged_one_is_moved_to_quarantine() {
        let (_home, store, _) = store_with_artifact();
        let (fingerprint, mut watch) = (key(b"0").fingerprint, Watch::default());
        let mut claim = || store.claim("clip/globals", &fingerprint, &mut watch).unwrap();
        assert!(matches!(claim(), Claim::Made(_)));
        replace(&unit_path(&store, b"0").join("features/0.arrow"), b"ze").unwrap();
        let first = claim();
        assert!(matches!(first, Claim::Mine(_)) && matches!(claim(), Claim::Held(_)));
        made_unit(&store, b"0", b"zero");
        drop(first);
        assert!(matches!(claim(), Claim::Made(_)));
    }

    #[test]
    fn a_home_and_a_record_of_another_version_are_refused() {
        let (home, store, _) = store_with_artifact();
        replace(&store.manifest_path("clip/globals", &recipe().fingerprint()), br#"{"format": 9, "new": 1}"#).unwrap();
        assert!(matches!(store.artifact("clip/globals", &recipe().fingerprint()), Err(Error::OtherFormat { found: 9, .. })));
        for found in [1, 9] {
            replace(&home.path().join("format.json"), format!(r#"{{"format": {found}}}"#).as_bytes()).unwrap();
            assert!(matches!(Store::open(home.path()), Err(Error::OtherFormat { found: f, .. }) if f == found));
        }
    }

    /// Only the number is damaged: the seal shows that it is not a record of another version.
    #[test]
    fn a_flipped_digit_of_a_format_is_damage() {
        let (_home, store, artifact) = store_with_artifact();
        for path in [unit_path(&store, b"0").join("unit.json"), store.manifest_path("clip/globals", &artifact.manifest.fingerprint)] {
            let sound = fs::read_to_string(&path).unwrap();
            replace(&path, sound.replacen(&format!("\"format\": {FORMAT}"), "\"format\": 2", 1).as_bytes()).unwrap();
            let Status::Damaged(findings) = status(&store) else { panic!("{}", path.display()) };
            assert!(findings[0].contains("says format 2, but its seal is that of format 3"), "{findings:?}");
            replace(&path, sound.as_bytes()).unwrap();
        }
        assert!(matches!(status(&store), Status::Valid(_)));
    }

    #[test]
    fn recovery_sweeps_unfinished_files_of_dead_processes_and_notes_their_finished_units() {
        let (home, store, _) = store_with_artifact();
        replace(&home.path().join(".tmp-format.json-1"), b"").unwrap();
        fs::create_dir(home.path().join(format!("units/clip-globals/.tmp-unit-{}-0", Owner::dead(7)))).unwrap();
        let journal = fs::read_to_string(home.path().join("commits.jsonl")).unwrap();
        let (first, torn) = journal.split_once('\n').unwrap();
        replace(&home.path().join("commits.jsonl"), format!("{first}\n{}", &torn[..20]).as_bytes()).unwrap();
        let store = Store::open(store.home()).unwrap();
        assert_eq!(store.recover().unwrap(), Recovered { swept: 2, adopted: 1, damaged_lines: 0 });
        assert_eq!(store.recover().unwrap(), Recovered::default());
        assert!(matches!(status(&store), Status::Valid(_)));
        assert_eq!(store.noted_units().unwrap().into_keys().collect::<Vec<_>>(), store.unit_names().unwrap());
    }

    #[test]
    fn the_unit_of_a_file_is_found_by_its_path() {
        let (_home, store, artifact) = store_with_artifact();
        let name = store.unit_of(&artifact.port("features")[1].path).unwrap();
        assert_eq!(name, unit_name("clip/globals", &key(b"1").fingerprint));
        assert!(store.unit_of(Path::new("/elsewhere/file")).is_none());
    }
}
