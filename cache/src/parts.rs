//! Parts: the finished work of units that were cut off by a signal. The next run that makes such a unit continues from its part.
//!
//! A part is in `HOME/parts/KIND/FINGERPRINT/`, with the record and the layout of its unit, and is removed once the unit is published. The
//! journal of commits does not note parts: without one, its work is done again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    Digest, Draft, FileRecord, Fingerprint, Result, Status, Store, UnitKey, UnitRecord,
    inputs::InputFile,
    store::{commit_draft, unit_name},
    verify::{Class, Depth, Finding},
};

/// The folder of parts in a home.
pub(crate) const PARTS: &str = "parts";

impl Store {
    /// Publishes a unit's draft as its part, in place of an earlier part. The caller has the unit's lease, and the draft holds at least what
    /// the earlier part holds.
    pub fn keep_part(&self, draft: Draft, key: UnitKey, items: &[Digest], metrics: BTreeMap<String, Value>) -> Result<()> {
        let path = self.part_path(&unit_name(&key.kind, &key.fingerprint));
        commit_draft(draft.over(&path)?, key, items, metrics)?;
        Ok(())
    }

    /// The part of a unit.
    pub fn part(&self, kind: &str, fingerprint: &Fingerprint) -> Result<Status<UnitRecord>> {
        let name = unit_name(kind, fingerprint);
        self.status_of(&self.part_path(&name), &name)
    }

    /// The files of an output port of a part, sorted by name.
    pub fn part_port(&self, part: &UnitRecord, port: &str) -> Vec<InputFile> {
        part.port_in(&self.part_path(&unit_name(&part.key.kind, &part.key.fingerprint)), port)
    }

    /// Removes the part of a unit, if there is one.
    pub fn remove_part(&self, name: &str) -> Result<()> {
        self.publisher().remove(&self.part_path(name))
    }

    /// Moves a damaged part to quarantine.
    pub fn set_part_aside(&self, name: &str, why: &str) -> Result<Option<PathBuf>> {
        self.set_aside(&self.part_path(name), PARTS, why)
    }

    /// The names of the units that have a part, `KIND/FINGERPRINT`, ascending.
    pub fn part_names(&self) -> Result<Vec<String>> {
        self.names_below(PARTS)
    }

    /// The folder of a unit's part, by the unit's name.
    pub fn part_path(&self, name: &str) -> PathBuf {
        self.home().join(PARTS).join(name)
    }

    /// The name of the unit whose part a file belongs to; `None` for files outside `parts/`.
    pub fn part_of(&self, path: &Path) -> Option<String> {
        self.name_below(PARTS, path)
    }

    /// Checks the part of a unit: presence and sizes, with [`Depth::Full`] every byte. `read` is called with the number of bytes read.
    pub fn verify_part(&self, name: &str, depth: Depth, read: &dyn Fn(u64)) -> Result<Vec<Finding>> {
        let folder = self.part_path(name);
        let finding = |path: PathBuf, problem| Finding { class: Class::Part, unit: None, path, problem };
        let record = match self.status_of(&folder, name)? {
            Status::Valid(record) => record,
            Status::Damaged(problems) => return Ok(problems.into_iter().map(|problem| finding(folder.clone(), problem)).collect()),
            Status::Absent => return Ok(Vec::new()),
        };
        let mut found = Vec::new();
        for FileRecord { name, digest, .. } in record.files.iter().filter(|_| depth >= Depth::Full) {
            match crate::verify::hash(&folder.join(name), read) {
                Ok(hash) if hash == *digest => {}
                Ok(hash) => found.push(finding(folder.join(name), format!("does not match its digest: expected {digest}, found {hash}"))),
                // The unit was published in the meantime, and the part removed.
                Err(_) if !folder.exists() => return Ok(Vec::new()),
                Err(error) => found.push(finding(folder.join(name), format!("cannot be read: {error}"))),
            }
        }
        Ok(found)
    }
}
