//! Checks of a home against what was published: quick (presence, sizes, seals, footers), full (every byte), deep (also the
//! meaning of the rows).
//!
//! Nothing is written. A unit that is removed during the check is not a finding.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{DataType, Float32Type, UInt32Type, UInt64Type},
};
use serde::{Deserialize, Serialize};

use crate::{
    Digest, Manifest, Result, Status, Store, UnitRecord,
    lease::{self, Owner},
    parts::PARTS,
    publish::TEMPORARY,
    records::CURSOR,
    shard::ShardReader,
    spool::SPOOL,
    stats::invalid_values,
    store::UNIT_FILE,
};

/// The depth of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// Presence, sizes, sealed records, footers of shards.
    Quick,
    /// Also the digest of every file.
    Full,
    /// Also the meaning of the rows: counts, finite values, norms, ids, boxes, repeated rows.
    Deep,
}

/// The kind of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A unit differs from what was published.
    Damaged,
    /// A unit is as published, but its content is wrong.
    Wrong,
    /// An artifact was computed from one with wrong content.
    Tainted,
    /// A published unit is missing.
    Missing,
    /// A manifest cannot be read, or disagrees with its units.
    Manifest,
    /// A file or folder that ovenbird did not write.
    Foreign,
    /// An unfinished file or folder of a dead process.
    Leftover,
    /// The part of a unit that was cut off is damaged: its work is done again.
    Part,
    /// A record that garbage collection relies on is damaged or missing: a pin, a plan, a run's log or request, the last run of a
    /// pipeline, the journal, the home's format.
    Record,
    /// A choice cannot be read; the units know it.
    Choice,
    /// The ledger is damaged.
    Ledger,
    /// An input file changed although its size and times did not.
    Input,
    /// Not damage, but worth a look: two images with the same embedding, a box outside its image.
    Suspect,
}

/// A problem found by a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The kind of problem.
    pub class: Class,
    /// The name of the unit, `KIND/FINGERPRINT`, if the finding is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The file or folder.
    pub path: PathBuf,
    /// The problem in words: what was expected and what was found.
    pub problem: String,
}

/// The folders of a home.
pub(crate) const FOLDERS: [&str; 14] = [
    "artifacts",
    "choices",
    "dry-run",
    "leases",
    "ledger",
    PARTS,
    "pins",
    "pipelines",
    "plans",
    "quarantine",
    "runs",
    "sessions",
    "units",
    SPOOL,
];

/// The files of a home.
pub(crate) const FILES: [&str; 3] = ["commits.jsonl", "format.json", CURSOR];

const BUFFER_BYTES: usize = 1 << 18;

impl Store {
    /// Checks a unit by its name (see [`Store::unit_names`]). `read` is called with the number of bytes read, and may block to limit
    /// the rate.
    pub fn verify_unit(&self, name: &str, depth: Depth, read: &dyn Fn(u64)) -> Result<Vec<Finding>> {
        let folder = self.unit_path(name);
        let finding = |class, path: &Path, problem: String| Finding { class, unit: Some(name.into()), path: path.to_owned(), problem };
        let record = match self.unit_at(name) {
            Err(error) => return Ok(vec![finding(Class::Damaged, &folder, error.to_string())]),
            Ok(Status::Valid(record)) => record,
            Ok(Status::Damaged(problems)) => {
                return Ok(problems.into_iter().map(|problem| finding(Class::Damaged, &folder, problem)).collect());
            }
            Ok(Status::Absent) => return Ok(Vec::new()),
        };
        let mut found = Vec::new();
        for path in self.files_below(&folder)? {
            let known = path
                .strip_prefix(&folder)
                .is_ok_and(|name| name == Path::new(UNIT_FILE) || record.files.iter().any(|file| Path::new(&file.name) == name));
            if !known {
                found.push(finding(Class::Foreign, &path, "is not one of the unit's files".into()));
            }
        }
        for file in &record.files {
            let path = folder.join(&file.name);
            if depth >= Depth::Full {
                match hash(&path, read) {
                    Ok(digest) if digest == file.digest => {}
                    Ok(digest) => {
                        let problem = format!("does not match its digest: expected {}, found {digest}", file.digest);
                        found.push(finding(Class::Damaged, &path, problem));
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                    Err(error) => {
                        found.push(finding(Class::Damaged, &path, format!("cannot be read: {error}")));
                        continue;
                    }
                }
            }
            if path.extension().is_some_and(|extension| extension == "arrow") {
                let problems = match ShardReader::open(&path, Some(&record.key.fingerprint)) {
                    Ok(shard) => self.verify_shard(&record, &shard, depth),
                    Err(error) => Err(error),
                };
                match problems {
                    Ok(problems) => found.extend(problems.into_iter().map(|(class, problem)| finding(class, &path, problem))),
                    Err(error) => found.push(finding(Class::Damaged, &path, error.to_string())),
                }
            }
        }
        Ok(found)
    }

    fn verify_shard(&self, record: &UnitRecord, shard: &ShardReader, depth: Depth) -> Result<Vec<(Class, String)>> {
        let mut problems: Vec<_> = invalid_values(shard.stats()).into_iter().map(|problem| (Class::Wrong, problem)).collect();
        // Rows of items begin with the id of one; others, such as several regions of an image beside each other, are not counted.
        let has_ids = shard.schema().fields().first().is_some_and(|field| *field.data_type() == DataType::UInt64);
        if depth < Depth::Deep || !has_ids || shard.schema().column_with_name("embedding").is_none() {
            return Ok(problems);
        }
        let n_items = self.items_of(record)?.len() as u64;
        let is_short = shard.stats().rows < n_items && !record.files.iter().any(|file| file.name == "failed.json");
        if n_items > 0 && (shard.stats().rows > n_items || is_short) {
            problems.push((Class::Wrong, format!("{} rows for {n_items} items", shard.stats().rows)));
        }
        let mut last_id = None;
        let mut seen: HashMap<Digest, u64> = HashMap::new();
        for batch in shard.batches() {
            let batch = batch?;
            let Some(ids) = batch.column(0).as_primitive_opt::<UInt64Type>() else { continue };
            for (row, id) in ids.values().iter().enumerate() {
                if last_id.is_some_and(|last| last >= *id) {
                    problems.push((Class::Wrong, format!("ids are not ascending: {id} follows {}", last_id.unwrap_or_default())));
                }
                last_id = Some(*id);
                if let Some(embedding) = bytes_of_row(&batch, row)
                    && let Some(other) = seen.insert(embedding, *id)
                {
                    problems.push((Class::Suspect, format!("images {other} and {id} have exactly the same embedding")));
                }
            }
            problems.extend(invalid_box(&batch).map(|problem| (Class::Wrong, problem)));
            problems.extend(box_outside(&batch).map(|problem| (Class::Suspect, problem)));
        }
        Ok(problems)
    }

    fn files_below(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for (name, is_folder) in self.publisher().list(folder)? {
            let path = folder.join(name);
            if is_folder { files.extend(self.files_below(&path)?) } else { files.push(path) }
        }
        Ok(files)
    }

    /// Checks a manifest: its seal, and its list of units against their records.
    pub fn verify_manifest(&self, path: &Path) -> Result<Vec<Finding>> {
        let finding = |problem: String| Finding { class: Class::Manifest, unit: None, path: path.to_owned(), problem };
        let manifest: Manifest = match self.manifest_at(path) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Ok(Vec::new()),
            Err(error) => return Ok(vec![finding(error.to_string())]),
        };
        let mut found = Vec::new();
        for listed in &manifest.units {
            let name = crate::unit_name(&manifest.recipe.kind, &listed.key.fingerprint);
            match self.unit_at(&name) {
                Ok(Status::Valid(record)) if record.files == listed.files => {}
                Ok(Status::Valid(_)) => found.push(finding(format!("lists other files of unit {name} than the unit itself"))),
                // Checking the unit itself reports this.
                Ok(Status::Damaged(_)) | Err(_) => {}
                Ok(Status::Absent) if manifest.is_dropped => {}
                Ok(Status::Absent) => found.push(Finding {
                    class: Class::Missing,
                    unit: Some(name.clone()),
                    path: self.unit_path(&name),
                    problem: format!("is missing; {} lists it", path.display()),
                }),
            }
        }
        Ok(found)
    }

    /// Checks the folders of the home: unfinished files of dead processes, foreign files, damaged choices, lost units.
    pub fn verify_house(&self) -> Result<Vec<Finding>> {
        let mut found = Vec::new();
        let mut check = |folder: &Path, is_ours: &dyn Fn(&str, bool) -> bool| -> Result<()> {
            for (name, is_folder) in self.publisher().list(folder)? {
                let path = folder.join(&name);
                if let Some(rest) = name.strip_prefix(TEMPORARY) {
                    let owner = rest.rsplit('-').nth(1).and_then(|owner| owner.parse::<Owner>().ok());
                    if owner.is_none_or(|owner| lease::is_over(self.home(), &owner)) {
                        let problem = "was left unfinished by a dead process".into();
                        found.push(Finding { class: Class::Leftover, unit: None, path, problem });
                    }
                } else if !is_ours(&name, is_folder) {
                    let problem = "was not written by ovenbird".into();
                    found.push(Finding { class: Class::Foreign, unit: None, path, problem });
                }
            }
            Ok(())
        };
        check(self.home(), &|name, is_folder| if is_folder { &FOLDERS[..] } else { &FILES }.contains(&name))?;
        let is_json = |name: &str, is_folder: bool| !is_folder && name.ends_with(".json");
        check(&self.home().join("pins"), &is_json)?;
        check(&self.home().join("pipelines"), &is_json)?;
        check(&self.home().join("runs"), &|_, is_folder| is_folder)?;
        let is_record: fn(&str, bool) -> bool =
            |name, is_folder| !is_folder && name.strip_suffix(".json").is_some_and(crate::store::is_folder_name);
        let is_folder_of_ours: fn(&str, bool) -> bool = |name, is_folder| is_folder && crate::store::is_folder_name(name);
        for (top, is_ours) in [
            ("units", is_folder_of_ours),
            (PARTS, is_folder_of_ours),
            ("choices", is_folder_of_ours),
            ("artifacts", is_record),
            ("plans", is_record),
        ] {
            let top = self.home().join(top);
            check(&top, &|_, is_folder| is_folder)?;
            for (kind, _) in self.publisher().list(&top)?.into_iter().filter(|(name, is_folder)| *is_folder && !name.starts_with('.')) {
                check(&top.join(kind), &is_ours)?;
            }
        }
        for (path, problem) in self.unsound_choices()? {
            found.push(Finding { class: Class::Choice, unit: None, path, problem });
        }
        for unit in self.noted_units()?.into_keys() {
            // Read again, because the unit may be removed during the check.
            if matches!(self.unit_at(&unit), Ok(Status::Absent)) && self.noted_units()?.contains_key(&unit) {
                let path = self.unit_path(&unit);
                found.push(Finding { class: Class::Missing, unit: Some(unit), path, problem: "was published and is missing".into() });
            }
        }
        Ok(found)
    }

    /// Those of `manifests` whose artifacts were computed from `artifacts`, directly or through others.
    pub fn made_from<'a>(manifests: &'a [Manifest], artifacts: &[&Manifest]) -> Vec<&'a Manifest> {
        let mut outputs: BTreeSet<Digest> = artifacts.iter().flat_map(|manifest| manifest.ports.values().copied()).collect();
        let mut found: Vec<&Manifest> = Vec::new();
        loop {
            let is_new = |manifest: &&Manifest| {
                let is_known = |known: &&Manifest| known.fingerprint == manifest.fingerprint;
                manifest.recipe.inputs.values().any(|input| outputs.contains(input))
                    && !artifacts.iter().any(is_known)
                    && !found.iter().any(is_known)
            };
            let new: Vec<&Manifest> = manifests.iter().filter(is_new).collect();
            if new.is_empty() {
                return found;
            }
            outputs.extend(new.iter().flat_map(|manifest| manifest.ports.values().copied()));
            found.extend(new);
        }
    }

    /// All manifests that can be read; [`Self::verify_manifest`] reports the others.
    pub fn manifests(&self) -> Result<Vec<Manifest>> {
        Ok(self.manifest_paths()?.iter().filter_map(|path| self.manifest_at(path).ok().flatten()).collect())
    }
}

pub(crate) fn hash(path: &Path, read: &dyn Fn(u64)) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n_read = file.read(&mut buffer)?;
        if n_read == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..n_read]);
        read(n_read as u64);
    }
}

/// The digest of the bytes of a row's embedding; `None` if a row has several embeddings.
fn bytes_of_row(batch: &RecordBatch, row: usize) -> Option<Digest> {
    let vectors = batch.column_by_name("embedding")?.as_fixed_size_list_opt()?;
    let data = vectors.value(row).to_data();
    let width = data.data_type().primitive_width()?;
    let start = data.offset() * width;
    Some(Digest::of(&data.buffers()[0].as_slice()[start..start + data.len() * width]))
}

/// The first box that extends more than 1 px beyond its image, in words.
fn box_outside(batch: &RecordBatch) -> Option<String> {
    let boxes = batch.column_by_name("xyxy")?.as_list_opt::<i32>()?;
    let side = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<UInt32Type>();
    let (ids, widths, heights) = (batch.column(0).as_primitive_opt::<UInt64Type>()?, side("width_px")?, side("height_px")?);
    let of_row = |row: usize| {
        let boxes = boxes.value(row);
        let numbers = boxes.as_fixed_size_list_opt()?.values().as_primitive_opt::<Float32Type>()?.clone();
        let (corners, _) = numbers.values().as_chunks::<4>();
        let [width, height] = [widths.value(row) as f32, heights.value(row) as f32];
        let outside = corners.iter().find(|[x1, y1, x2, y2]| *x1 < -1.0 || *y1 < -1.0 || *x2 > width + 1.0 || *y2 > height + 1.0)?;
        Some(format!("image {}: box {outside:?} extends beyond {width} x {height} px", ids.value(row)))
    };
    (0..batch.num_rows()).find_map(of_row)
}

/// The first box with swapped corners or with a coordinate that is not finite, in words.
fn invalid_box(batch: &RecordBatch) -> Option<String> {
    let boxes = batch.column_by_name("xyxy")?.as_list_opt::<i32>()?.values().as_fixed_size_list_opt()?;
    let numbers = boxes.values().as_primitive_opt::<Float32Type>()?;
    let (corners, _) = numbers.values().as_chunks::<4>();
    let wrong =
        corners.iter().find(|[x1, y1, x2, y2]| !(x2 >= x1 && y2 >= y1 && [x1, y1, x2, y2].into_iter().all(|side| side.is_finite())))?;
    Some(format!("`xyxy`: {wrong:?} is not a box: expected finite x1 <= x2 and y1 <= y2"))
}
