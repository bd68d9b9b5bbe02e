//! What is written of units and artifacts: records as plain data, sealed with the fingerprint of what they describe, so that
//! one that lies in a wrong place does not pass.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Digest, FileRecord, Fingerprint, Recipe, inputs::InputFile, store::ITEMS_FILE, unit_name};

const PORT_DOMAIN: &str = "ovenbird port 1";

/// What a unit is, before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitKey {
    /// The stage's kind.
    pub kind: String,
    /// Its name.
    pub fingerprint: Fingerprint,
    /// Of units that hold items: the name of everything that an item's result depends on besides the item. An item that is
    /// in two units of one family has the same result in both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Fingerprint>,
}

/// A published unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRecord {
    /// Version of the layout.
    pub format: u32,
    /// What it is.
    pub key: UnitKey,
    /// Its files, sorted by name.
    pub files: Vec<FileRecord>,
    /// What the stage measured while making it, by name.
    pub metrics: BTreeMap<String, Value>,
    /// BLAKE3 of all the above, keyed by the fingerprint.
    pub seal: Digest,
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
    /// Whether its units may be gone because the operator let them go; whoever needs them makes them again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_dropped: bool,
    /// BLAKE3 of all the above, keyed by the fingerprint.
    pub seal: Digest,
}

/// A record that says what it is and can be checked against itself.
pub(crate) trait Sealed: Serialize + Clone {
    /// Names what it describes.
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
    /// Its units, as `KIND/FINGERPRINT`.
    pub fn unit_names(&self) -> impl Iterator<Item = String> {
        self.units.iter().map(|unit| unit_name(&self.recipe.kind, &unit.key.fingerprint))
    }
}

impl UnitRecord {
    /// Size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// How many items it holds.
    pub fn n_items(&self) -> u64 {
        self.files.iter().filter(|file| file.name == ITEMS_FILE).map(|file| file.bytes / 32).sum()
    }

    /// The files of an output port, sorted by name, where the unit lies in `folder`.
    pub(crate) fn port_in(&self, folder: &Path, port: &str) -> Vec<InputFile> {
        self.records_in(folder, port).into_iter().map(|(file, _)| file).collect()
    }

    /// The same with their records.
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

/// The files of an output port by the names that they have there.
fn port_files<'a>(unit: &'a UnitRecord, port: &str) -> impl Iterator<Item = (&'a str, &'a FileRecord)> {
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
