//! Where units and artifacts lie, and what is valid, damaged or absent.
//!
//! ```text
//! HOME/format.json                         version of this layout
//! HOME/lock                                held by the one process that runs pipelines here
//! HOME/units/KIND/FINGERPRINT/unit.json    a unit: its record, and its files below PORT/
//! HOME/artifacts/KIND/FINGERPRINT.json     an artifact: the manifest that lists its units
//! HOME/runs/ID/events.jsonl                what happened
//! HOME/quarantine/                         what was found damaged
//! HOME/ledger/                             an index that can be lost
//! ```
//!
//! `KIND` is the stage's kind with `-` for `/`; `FINGERPRINT` is its first 32 hexadecimal digits. Units are what is
//! shared: two artifacts that hold a unit with the same fingerprint name the same folder.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Digest, Draft, Error, FileRecord, Fingerprint, Recipe, Result,
    inputs::InputFile,
    publish::{self, open_lock},
};

/// The newest layout this program reads, and the one it writes.
const FORMAT: u32 = 1;
const UNIT_FILE: &str = "unit.json";
const PORT_DOMAIN: &str = "ovenbird port 1";

/// What became of looking something up.
#[derive(Debug)]
pub enum Status<T> {
    /// It is there and its files have the committed sizes.
    Valid(T),
    /// It was committed, but is no longer what was committed: each entry says what was expected and what was found.
    Damaged(Vec<String>),
    /// It was never made.
    Absent,
}

/// A published unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRecord {
    /// Version of the layout.
    pub format: u32,
    /// Its name.
    pub fingerprint: Fingerprint,
    /// Its files, sorted by name.
    pub files: Vec<FileRecord>,
    /// What the stage measured while making it, by name.
    pub metrics: BTreeMap<String, Value>,
}

/// Where and how something was made. Never part of identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name and version of the program.
    pub program: String,
    /// The run that finished it.
    pub run: String,
    /// The machine.
    pub host: String,
    /// Processor or accelerator the networks ran on.
    pub device: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// When the stage began, RFC 3339.
    pub started: String,
    /// How long the stage worked in that run, in s. Units taken from the store cost nothing.
    pub wall_s: f64,
}

/// Everything about an artifact but its bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// The name of `recipe`.
    pub fingerprint: Fingerprint,
    /// What it was made from.
    pub recipe: Recipe,
    /// Content digest of each output port, settled when the artifact was first published.
    pub ports: BTreeMap<String, Digest>,
    /// Its units in order.
    pub units: Vec<UnitRecord>,
    /// How it was made.
    pub made: Provenance,
}

/// A valid artifact.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its manifest.
    pub manifest: Manifest,
    units_folder: PathBuf,
}

impl Artifact {
    /// The files of an output port: units in order, names sorted within a unit.
    pub fn port(&self, port: &str) -> Vec<InputFile> {
        self.manifest.units.iter().flat_map(|unit| unit.port(&self.units_folder, port)).collect()
    }
}

impl UnitRecord {
    fn port(&self, units_folder: &Path, port: &str) -> Vec<InputFile> {
        let folder = units_folder.join(folder_name(&self.fingerprint));
        let input = |(name, file): (&str, &FileRecord)| InputFile {
            name: name.into(),
            path: folder.join(&file.name),
            bytes: file.bytes,
            digest: file.content(),
        };
        port_files(self, port).map(input).collect()
    }
}

fn port_files<'a>(unit: &'a UnitRecord, port: &'a str) -> impl Iterator<Item = (&'a str, &'a FileRecord)> {
    unit.files.iter().filter_map(move |file| Some((file.name.strip_prefix(port)?.strip_prefix('/')?, file)))
}

/// The content digest of an output port over its units in order.
pub(crate) fn port_digest(units: &[UnitRecord], port: &str) -> Digest {
    Digest::of_list(PORT_DOMAIN, units.iter().flat_map(|unit| port_files(unit, port)).map(|(name, file)| (name, file.content())))
}

/// The content digest of an input that a user brings: the same rule as for an artifact's port.
pub fn files_digest(files: &[InputFile]) -> Digest {
    Digest::of_list(PORT_DOMAIN, files.iter().map(|file| (file.name.as_str(), file.digest)))
}

/// All state of one home.
#[derive(Debug, Clone)]
pub struct Store {
    home: PathBuf,
}

/// Held while a process runs pipelines in a home; freed when dropped, or when the process dies.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

#[derive(Serialize, Deserialize)]
struct HomeFormat {
    format: u32,
}

impl Store {
    /// Opens a home, which need not be there yet. Nothing is written.
    pub fn open(home: &Path) -> Result<Self> {
        let store = Self { home: home.to_owned() };
        if home.exists() && !home.is_dir() {
            return Err(Error::write(home, io::ErrorKind::NotADirectory.into()));
        }
        let path = store.home.join("format.json");
        match fs::read(&path) {
            Ok(bytes) => {
                let HomeFormat { format } = parse(&path, &bytes)?;
                if format > FORMAT {
                    return Err(Error::Newer { path, found: format, known: FORMAT });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::read(&path, source)),
        }
        Ok(store)
    }

    /// The home's folder.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Becomes the one process that runs pipelines in this home; creates the home if need be. `holder` says who, for others.
    pub fn lock(&self, holder: &str) -> Result<RunLock> {
        let path = self.home.join("lock");
        let mut file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _unreadable_is_unknown = file.read_to_string(&mut holder);
                let holder = if holder.is_empty() { "unknown".into() } else { holder.trim().to_owned() };
                return Err(Error::Locked { home: self.home.clone(), holder });
            }
            Err(fs::TryLockError::Error(source)) => return Err(Error::write(&path, source)),
        }
        let announce = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(holder.as_bytes())
        };
        announce(&mut file).map_err(|source| Error::write(&path, source))?;
        let format = self.home.join("format.json");
        if !format.exists() {
            publish::replace(&format, &to_json(&HomeFormat { format: FORMAT }))?;
        }
        Ok(RunLock { _file: file })
    }

    /// Removes what interrupted runs left unfinished; the lock shows that nobody is writing. Returns how many things.
    pub fn recover(&self, _lock: &RunLock) -> Result<usize> {
        let mut n_swept = publish::sweep(&self.home)?;
        for top in ["units", "artifacts", "pipelines"] {
            n_swept += publish::sweep(&self.home.join(top))?;
            for kind in publish::read_dir(&self.home.join(top))? {
                if kind.path().is_dir() {
                    n_swept += publish::sweep(&kind.path())?;
                }
            }
        }
        Ok(n_swept)
    }

    /// Looks a unit up: its record can be read, and every file is there with its size.
    pub fn unit(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Status<UnitRecord>> {
        let folder = self.unit_folder(kind, fingerprint);
        if !folder.exists() {
            return Ok(Status::Absent);
        }
        match read_record::<UnitRecord>(&folder.join(UNIT_FILE)) {
            Ok(Some(record)) => {
                let findings = missing_or_resized(&folder, &record);
                Ok(if findings.is_empty() { Status::Valid(record) } else { Status::Damaged(findings) })
            }
            Ok(None) => Ok(Status::Damaged(vec![format!("{}: expected a record, found none", folder.join(UNIT_FILE).display())])),
            Err(error @ (Error::Newer { .. } | Error::Read { .. })) => Err(error),
            Err(error) => Ok(Status::Damaged(vec![error.to_string()])),
        }
    }

    /// The files of an output port of one published unit, sorted by name.
    pub fn unit_port(&self, kind: &str, record: &UnitRecord, port: &str) -> Vec<InputFile> {
        record.port(&self.units_folder(kind), port)
    }

    /// Opens a draft for a unit.
    pub fn begin_unit(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Draft> {
        Draft::begin(&self.unit_folder(kind, fingerprint))
    }

    /// Publishes a unit's draft.
    pub fn commit_unit(&self, draft: Draft, fingerprint: &Fingerprint, metrics: BTreeMap<String, Value>) -> Result<UnitRecord> {
        let record = UnitRecord { format: FORMAT, fingerprint: *fingerprint, files: draft.files(), metrics };
        draft.commit(UNIT_FILE, &to_json(&record))?;
        Ok(record)
    }

    /// Sets a damaged unit aside, so that it is made again. Returns where it lies.
    pub fn quarantine_unit(&self, kind: &str, fingerprint: &Fingerprint) -> Result<PathBuf> {
        publish::quarantine(&self.unit_folder(kind, fingerprint), &self.quarantine())
    }

    /// The kind and fingerprint of the unit that a file belongs to, if it lies in this store.
    pub fn unit_of(&self, path: &Path) -> Option<(String, Fingerprint)> {
        let mut parts = path.strip_prefix(self.home.join("units")).ok()?.components();
        let (kind, folder) = (parts.next()?, parts.next()?);
        let record = read_record::<UnitRecord>(&self.home.join("units").join(kind).join(folder).join(UNIT_FILE)).ok()??;
        Some((kind.as_os_str().to_str()?.to_owned(), record.fingerprint))
    }

    /// Where the folder of damaged things is.
    pub fn quarantine(&self) -> PathBuf {
        self.home.join("quarantine")
    }

    /// Looks an artifact up: its manifest can be read, and every unit is valid.
    pub fn artifact(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Status<Artifact>> {
        let manifest = match self.manifest(kind, fingerprint) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Ok(Status::Absent),
            Err(error @ (Error::Newer { .. } | Error::Read { .. })) => return Err(error),
            Err(error) => return Ok(Status::Damaged(vec![error.to_string()])),
        };
        let mut findings = Vec::new();
        for (unit_idx, unit) in manifest.units.iter().enumerate() {
            match self.unit(kind, &unit.fingerprint)? {
                Status::Valid(_) => {}
                Status::Damaged(found) => findings.extend(found),
                Status::Absent => findings.push(format!("unit {unit_idx} ({}) is missing", unit.fingerprint)),
            }
        }
        if findings.is_empty() {
            Ok(Status::Valid(Artifact { manifest, units_folder: self.units_folder(kind) }))
        } else {
            Ok(Status::Damaged(findings))
        }
    }

    /// An artifact's manifest, whatever became of its units.
    pub fn manifest(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Option<Manifest>> {
        read_record(&self.manifest_path(kind, fingerprint))
    }

    /// Publishes an artifact whose units are published. An artifact that is made again after damage keeps the identity it
    /// was first published with.
    pub fn commit_artifact(&self, recipe: Recipe, ports: &[&str], units: Vec<UnitRecord>, made: Provenance) -> Result<Artifact> {
        let fingerprint = recipe.fingerprint();
        let earlier = self.manifest(&recipe.kind, &fingerprint).ok().flatten();
        let ports = match earlier {
            Some(earlier) => earlier.ports,
            None => ports.iter().map(|port| ((*port).to_owned(), port_digest(&units, port))).collect(),
        };
        let units_folder = self.units_folder(&recipe.kind);
        let manifest = Manifest { format: FORMAT, fingerprint, recipe, ports, units, made };
        publish::replace(&self.manifest_path(&manifest.recipe.kind, &fingerprint), &to_json(&manifest))?;
        Ok(Artifact { manifest, units_folder })
    }

    fn units_folder(&self, kind: &str) -> PathBuf {
        self.home.join("units").join(kind_name(kind))
    }

    fn unit_folder(&self, kind: &str, fingerprint: &Fingerprint) -> PathBuf {
        self.units_folder(kind).join(folder_name(fingerprint))
    }

    fn manifest_path(&self, kind: &str, fingerprint: &Fingerprint) -> PathBuf {
        self.home.join("artifacts").join(kind_name(kind)).join(format!("{}.json", folder_name(fingerprint)))
    }
}

fn kind_name(kind: &str) -> String {
    kind.replace('/', "-")
}

fn folder_name(fingerprint: &Fingerprint) -> String {
    fingerprint.to_hex()[..32].to_owned()
}

fn missing_or_resized(folder: &Path, record: &UnitRecord) -> Vec<String> {
    let check = |file: &FileRecord| {
        let path = folder.join(&file.name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() == file.bytes => None,
            Ok(metadata) => Some(format!("{}: expected {} bytes, found {}", path.display(), file.bytes, metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(format!("{}: missing", path.display())),
            Err(error) => Some(format!("{}: {error}", path.display())),
        }
    };
    record.files.iter().filter_map(check).collect()
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("BUG: records are plain JSON");
    bytes.push(b'\n');
    bytes
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::malformed(path, error.to_string()))
}

/// Reads a record that carries its format; `None` where there is no file.
fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::read(path, source)),
    };
    // The format is looked at first: a newer record may have fields that this program does not know.
    let value: Value = parse(path, &bytes)?;
    match value.get("format").and_then(Value::as_u64) {
        Some(format) if format > u64::from(FORMAT) => {
            Err(Error::Newer { path: path.to_owned(), found: u32::try_from(format).unwrap_or(u32::MAX), known: FORMAT })
        }
        _ => serde_json::from_value(value).map(Some).map_err(|error| Error::malformed(path, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn recipe() -> Recipe {
        Recipe { kind: "clip/globals".into(), version: 1, params: json!({}), inputs: BTreeMap::new(), link: None }
    }

    fn made() -> Provenance {
        let text = || String::from("test");
        Provenance { program: text(), run: text(), host: text(), device: text(), libtorch: text(), started: text(), wall_s: 0.0 }
    }

    fn made_unit(store: &Store, name: &[u8], content: &[u8]) -> UnitRecord {
        let fingerprint = blake3::hash(name).into();
        let draft = store.begin_unit("clip/globals", &fingerprint).unwrap();
        draft.write("features/0.arrow", content).unwrap();
        draft.write("log/notes", b"-").unwrap();
        store.commit_unit(draft, &fingerprint, BTreeMap::new()).unwrap()
    }

    fn store_with_artifact() -> (tempfile::TempDir, Store, Artifact) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let units = vec![made_unit(&store, b"0", b"zero"), made_unit(&store, b"1", b"one")];
        let artifact = store.commit_artifact(recipe(), &["features"], units, made()).unwrap();
        (home, store, artifact)
    }

    fn status(store: &Store) -> Status<Artifact> {
        store.artifact("clip/globals", &recipe().fingerprint()).unwrap()
    }

    #[test]
    fn a_committed_artifact_is_found_with_the_files_of_each_port() {
        let (_home, store, _) = store_with_artifact();
        let Status::Valid(artifact) = status(&store) else { panic!("not valid") };
        let contents: Vec<_> = artifact.port("features").iter().map(|file| fs::read(&file.path).unwrap()).collect();
        assert_eq!(contents, [b"zero".to_vec(), b"one".to_vec()]);
        assert_eq!(artifact.port("features")[0].name, "0.arrow");
    }

    #[test]
    fn missing_truncated_and_unreadable_parts_are_damage_never_absence() {
        type Hurt = fn(&Path);
        let hurts: [(&str, Hurt); 4] = [
            ("expected 4 bytes, found 2", |unit| publish::replace(&unit.join("features/0.arrow"), b"ze").unwrap()),
            ("missing", |unit| drop(publish::quarantine(&unit.join("features/0.arrow"), &unit.join("gone")).unwrap())),
            ("unit.json", |unit| publish::replace(&unit.join("unit.json"), b"{").unwrap()),
            ("is missing", |unit| drop(publish::quarantine(unit, &unit.join("../../../gone")).unwrap())),
        ];
        for (expected, hurt) in hurts {
            let (_home, store, _) = store_with_artifact();
            hurt(&store.unit_folder("clip/globals", &blake3::hash(b"0").into()));
            let Status::Damaged(findings) = status(&store) else { panic!("{expected}: not damaged") };
            assert!(findings.len() == 1 && findings[0].contains(expected), "{findings:?}");
        }
    }

    #[test]
    fn a_repaired_artifact_keeps_its_identity() {
        let (_home, store, artifact) = store_with_artifact();
        store.quarantine_unit("clip/globals", &blake3::hash(b"0").into()).unwrap();
        let units = vec![made_unit(&store, b"0", b"zer0"), artifact.manifest.units[1].clone()];
        let repaired = store.commit_artifact(recipe(), &["features"], units, made()).unwrap();
        assert_eq!(repaired.manifest.ports, artifact.manifest.ports);
        assert_ne!(repaired.manifest.units[0].files, artifact.manifest.units[0].files);
    }

    #[test]
    fn a_home_belongs_to_one_process_until_it_lets_go() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let lock = store.lock("run 7").unwrap();
        let refused = Store::open(home.path()).unwrap().lock("run 8").unwrap_err();
        assert!(matches!(&refused, Error::Locked { holder, .. } if holder == "run 7"), "{refused}");
        drop(lock);
        store.lock("run 8").unwrap();
    }

    #[test]
    fn a_home_and_a_record_of_a_newer_version_are_refused() {
        let (home, store, _) = store_with_artifact();
        publish::replace(&store.manifest_path("clip/globals", &recipe().fingerprint()), br#"{"format": 9, "new": 1}"#).unwrap();
        assert!(matches!(store.artifact("clip/globals", &recipe().fingerprint()), Err(Error::Newer { found: 9, .. })));
        publish::replace(&home.path().join("format.json"), br#"{"format": 9}"#).unwrap();
        assert!(matches!(Store::open(home.path()), Err(Error::Newer { found: 9, .. })));
    }

    #[test]
    fn recovery_sweeps_what_a_crash_left_in_every_folder() {
        let (home, store, _) = store_with_artifact();
        std::mem::forget(store.begin_unit("clip/globals", &blake3::hash(b"lost").into()).unwrap());
        publish::replace(&home.path().join(".tmp-format.json-1"), b"").unwrap();
        let lock = store.lock("test").unwrap();
        assert_eq!(store.recover(&lock).unwrap(), 2);
        assert_eq!(store.recover(&lock).unwrap(), 0);
        assert!(matches!(status(&store), Status::Valid(_)));
    }

    #[test]
    fn a_file_of_the_store_knows_its_unit() {
        let (_home, store, artifact) = store_with_artifact();
        let (kind, fingerprint) = store.unit_of(&artifact.port("features")[1].path).unwrap();
        assert_eq!((kind.as_str(), fingerprint), ("clip-globals", blake3::hash(b"1").into()));
        assert!(store.unit_of(Path::new("/elsewhere/file")).is_none());
    }
}
