//! The records of units and artifacts: plain data with a seal.
//!
//! A seal is a BLAKE3 keyed by the fingerprint of the unit or artifact, so that a record in the wrong place is found as damaged.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Digest, FileRecord, Fingerprint, Recipe, inputs::InputFile, store::ITEMS_FILE, unit_name};

const PORT_DOMAIN: &str = "ovenbird port 1";

/// The identity of a unit; it is known before the unit is computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitKey {
    /// The stage's kind.
    pub kind: String,
    /// The fingerprint of its recipe and items.
    pub fingerprint: Fingerprint,
    /// The item key, for units with items: a fingerprint of everything except the item that an item's result depends on. An
    /// item has the same result in all units with the same key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub item_key: Option<Fingerprint>,
}

/// A published unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRecord {
    /// Format version.
    pub format: u32,
    /// The unit's identity.
    pub key: UnitKey,
    /// Its files, sorted by name.
    pub files: Vec<FileRecord>,
    /// The stage's metrics for this unit, by name.
    pub metrics: BTreeMap<String, Value>,
    /// BLAKE3 of all the above, keyed by the fingerprint.
    pub seal: Digest,
}

/// How and where an artifact was computed. It is not part of its identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name and version of the program.
    pub program: String,
    /// The run that finished it.
    pub run: String,
    /// Host name of the machine.
    pub host: String,
    /// The processor or accelerator on which the networks ran.
    pub device: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// When the stage began, RFC 3339.
    pub started: String,
    /// Run time of the stage in that run, in s; reused units add nothing.
    pub wall_s: f64,
}

/// The record of an artifact: its recipe, ports and units.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format version.
    pub format: u32,
    /// The fingerprint of `recipe`.
    pub fingerprint: Fingerprint,
    /// Its recipe.
    pub recipe: Recipe,
    /// Content digest of each output port, fixed when the artifact is first published.
    pub ports: BTreeMap<String, Digest>,
    /// Its units in order.
    pub units: Vec<UnitRecord>,
    /// How and where it was computed.
    pub made: Provenance,
    /// Whether the operator allowed its units to be deleted (`cache gc --drop`); they are recomputed when a step reads them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_dropped: bool,
    /// BLAKE3 of all the above, keyed by the fingerprint.
    pub seal: Digest,
}

/// A record with a seal over all its other fields.
pub(crate) trait Sealed: Serialize + Clone {
    /// The key of the seal, derived from what the record describes.
    fn key(&self) -> [u8; 32];
    fn seal_mut(&mut self) -> &mut Digest;

    fn seal_of(&self) -> Digest {
        let mut open = self.clone();
        *open.seal_mut() = Digest::from(blake3::Hash::from_bytes([0; 32]));
        let mut value = serde_json::to_value(&open).expect("BUG: records are plain JSON");
        value.sort_all_objects();
        blake3::keyed_hash(&self.key(), value.to_string().as_bytes()).into()
    }

    fn sealed(mut self) -> Self {
        *self.seal_mut() = self.seal_of();
        self
    }
}

impl Sealed for UnitRecord {
    fn key(&self) -> [u8; 32] {
        *self.key.fingerprint.as_bytes()
    }

    fn seal_mut(&mut self) -> &mut Digest {
        &mut self.seal
    }
}

impl Sealed for Manifest {
    fn key(&self) -> [u8; 32] {
        *self.fingerprint.as_bytes()
    }

    fn seal_mut(&mut self) -> &mut Digest {
        &mut self.seal
    }
}

impl Manifest {
    /// The names of its units, `KIND/FINGERPRINT`.
    pub fn unit_names(&self) -> impl Iterator<Item = String> {
        self.units.iter().map(|unit| unit_name(&self.recipe.kind, &unit.key.fingerprint))
    }
}

impl UnitRecord {
    /// The size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// The number of items.
    pub fn n_items(&self) -> u64 {
        self.files.iter().filter(|file| file.name == ITEMS_FILE).map(|file| file.bytes / 32).sum()
    }

    /// The files of an output port, sorted by name; `folder` is the unit's.
    pub(crate) fn port_in(&self, folder: &Path, port: &str) -> Vec<InputFile> {
        self.records_in(folder, port).into_iter().map(|(file, _)| file).collect()
    }

    /// As [`Self::port_in`], with the files' records.
    pub(crate) fn records_in(&self, folder: &Path, port: &str) -> Vec<(InputFile, &FileRecord)> {
        let input = |name: &str, file: &FileRecord| InputFile {
            name: name.into(),
            path: folder.join(&file.name),
            bytes: file.bytes,
            digest: file.content(),
            unit: Some(self.key.fingerprint),
        };
        port_files(self, port).map(|(name, file)| (input(name, file), file)).collect()
    }
}

/// The files of an output port with their names inside the port.
fn port_files<'a>(unit: &'a UnitRecord, port: &str) -> impl Iterator<Item = (&'a str, &'a FileRecord)> {
    unit.files.iter().filter_map(move |file| Some((file.name.strip_prefix(port)?.strip_prefix('/')?, file)))
}

/// The content digest of an output port: of its files in the order of `units`.
pub(crate) fn port_digest(units: &[UnitRecord], port: &str) -> Digest {
    Digest::of_list(PORT_DOMAIN, units.iter().flat_map(|unit| port_files(unit, port)).map(|(name, file)| (name, file.content())))
}

/// The content digest of the user's files as an input, by the same rule as for an artifact's port.
pub fn files_digest(files: &[InputFile]) -> Digest {
    Digest::of_list(PORT_DOMAIN, files.iter().map(|file| (file.name.as_str(), file.digest)))
}
