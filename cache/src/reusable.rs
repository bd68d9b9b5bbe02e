//! Reusable items: results of single items in other units with the same item key, in units that were cut off, or in the undamaged part of
//! a unit in quarantine.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use crate::{
    Digest, Fingerprint, Result, Status, Store, UnitRecord,
    inputs::InputFile,
    store::{UNIT_FILE, kind_name},
};

/// Units with items that can be reused, and the unit of each item.
#[derive(Debug, Default)]
pub struct ReusableItems {
    units: Vec<ReusableUnit>,
    by_item: HashMap<Digest, usize>,
}

#[derive(Debug)]
struct ReusableUnit {
    record: UnitRecord,
    folder: PathBuf,
}

impl ReusableItems {
    /// The index of the unit that has an item's result; `None` if no unit has it.
    pub fn of(&self, item: &Digest) -> Option<usize> {
        self.by_item.get(item).copied()
    }

    /// The number of `items` that can be reused.
    pub fn count(&self, items: &[Digest]) -> usize {
        items.iter().filter(|item| self.by_item.contains_key(*item)).count()
    }

    /// The names of the units, `KIND/FINGERPRINT`; of units in quarantine the last two parts of their path.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.units.iter().map(|unit| {
            let parts: Vec<_> = unit.folder.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
            format!("{}/{}", parts[1], parts[0])
        })
    }

    /// The files of an output port of a unit, by its index.
    pub fn port(&self, unit: usize, port: &str) -> Vec<InputFile> {
        let ReusableUnit { record, folder } = &self.units[unit];
        record.port_in(folder, port)
    }

    fn add(&mut self, record: UnitRecord, folder: &Path, items: &[Digest], wanted: &HashSet<Digest>) {
        let found: Vec<&Digest> = items.iter().filter(|item| wanted.contains(*item) && !self.by_item.contains_key(*item)).collect();
        if !found.is_empty() {
            self.by_item.extend(found.into_iter().map(|item| (*item, self.units.len())));
            self.units.push(ReusableUnit { record, folder: folder.to_owned() });
        }
    }
}

impl Store {
    /// Finds wanted items with an item key in published units, then in units that were cut off, then in units in quarantine.
    ///
    /// The caller checks the bytes that it reads; items that turn out damaged are computed like the others. `alike` is a metric and the value
    /// that a unit must have if it has this metric.
    pub fn reusable_items(
        &self,
        kind: &str,
        item_key: &Fingerprint,
        wanted: &HashSet<Digest>,
        alike: Option<(&str, &str)>,
    ) -> Result<ReusableItems> {
        let mut reusable = ReusableItems::default();
        let is_alike = |record: &UnitRecord| {
            alike.is_none_or(|(name, value)| record.metrics.get(name).is_none_or(|noted| noted.as_str() == Some(value)))
        };
        if wanted.is_empty() {
            return Ok(reusable);
        }
        self.each_with_item_key(kind, item_key, &mut |record, folder| {
            if is_alike(&record)
                && let Ok(items) = self.items_in(folder, &record)
            {
                reusable.add(record, folder, &items, wanted);
            }
            ControlFlow::Continue(())
        })?;
        Ok(reusable)
    }

    /// Visits the units with an item key whose records are sound: first the published ones, then those that were cut off, then those in
    /// quarantine, the latest first.
    pub(crate) fn each_with_item_key(
        &self,
        kind: &str,
        item_key: &Fingerprint,
        visit: &mut dyn FnMut(UnitRecord, &Path) -> ControlFlow<()>,
    ) -> Result<()> {
        let of_kind = format!("{}/", kind_name(kind));
        for (name, noted) in self.noted_units()? {
            if noted.item_key == Some(*item_key)
                && name.starts_with(&of_kind)
                && let Status::Valid(record) = self.unit_at(&name)?
                && visit(record, &self.unit_path(&name)).is_break()
            {
                return Ok(());
            }
        }
        let parts = self.part_names()?.into_iter().filter(|name| name.starts_with(&of_kind)).map(|name| self.part_path(&name));
        for folder in parts.chain(self.quarantined(kind)?) {
            if let Ok(Some(record)) = self.read_record::<UnitRecord>(&folder.join(UNIT_FILE))
                && record.key.item_key == Some(*item_key)
                && visit(record, &folder).is_break()
            {
                return Ok(());
            }
        }
        Ok(())
    }
}
