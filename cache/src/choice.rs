//! A choice that holds for all units with the same item key, such as the precision of a network.
//!
//! It is made once, before the first of these units. It is not part of the recipe, so all processes read it from one file:
//!
//! ```text
//! HOME/choices/KIND/ITEM_KEY/choice.json
//! ```
//!
//! The first process to publish it decides for all processes and machines that use the home. Units record the choice among their metrics: a
//! damaged or lost choice is read from them, also from units in quarantine.

use std::{ops::ControlFlow, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Fingerprint, Result, Store, Watch,
    record::Sealed,
    store::{FORMAT, kind_name, to_json},
};

pub(crate) const CHOICE_FILE: &str = "choice.json";

/// A choice on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Choice {
    format: u32,
    kind: String,
    item_key: Fingerprint,
    /// The metric under which units record it.
    name: String,
    chosen: String,
    seal: Digest,
}

impl Sealed for Choice {
    fn key(&self) -> [u8; 32] {
        *self.item_key.as_bytes()
    }

    fn seal_mut(&mut self) -> &mut Digest {
        &mut self.seal
    }
}

impl Store {
    /// The choice for an item key; if there is none yet, calls `choose` and publishes the result. Units record it as the metric `name`.
    pub fn choice<E: From<crate::Error>>(
        &self,
        kind: &str,
        item_key: &Fingerprint,
        name: &str,
        choose: impl FnOnce() -> Result<String, E>,
    ) -> Result<String, E> {
        if let Some(chosen) = self.chosen(kind, item_key, name)? {
            return Ok(chosen);
        }
        let chosen = match self.chosen_by_units(kind, item_key, name)? {
            Some(chosen) => chosen,
            None => choose()?,
        };
        let seal = Digest::of(&[]);
        let choice =
            Choice { format: FORMAT, kind: kind.into(), item_key: *item_key, name: name.into(), chosen: chosen.clone(), seal }.sealed();
        let draft = self.publisher().begin(&self.choice_path(kind, item_key))?;
        if draft.commit(CHOICE_FILE, &to_json(&choice))? {
            return Ok(chosen);
        }
        Ok(self.chosen(kind, item_key, name)?.unwrap_or(chosen))
    }

    /// Takes over the choices of another home for a kind.
    pub fn take_choices(&self, from: &Self, kind: &str) -> Result<()> {
        let folder = from.home().join("choices").join(kind_name(kind));
        for (item_key, _) in from.publisher().list(&folder)? {
            if let Ok(Some(choice)) = from.read_choice(&format!("{}/{item_key}", kind_name(kind))) {
                self.choice(kind, &choice.item_key, &choice.name, || Ok::<_, crate::Error>(choice.chosen.clone()))?;
            }
        }
        Ok(())
    }

    /// Reads the published choice. A damaged one is moved to quarantine under a lease, so that no process moves the sound one that another
    /// has published in the meantime.
    fn chosen(&self, kind: &str, item_key: &Fingerprint, name: &str) -> Result<Option<String>> {
        let place = format!("{}/{}", kind_name(kind), item_key.short());
        let look = || match self.read_choice(&place) {
            Ok(Some(choice)) if choice.name == name => Ok(Ok(Some(choice.chosen))),
            Ok(Some(choice)) => Ok(Err(format!("is a choice of `{}`, expected a choice of `{name}`", choice.name))),
            Ok(None) => Ok(Ok(None)),
            Err(error @ (crate::Error::OtherFormat { .. } | crate::Error::Read { .. })) => Err(error),
            Err(error) => Ok(Err(error.to_string())),
        };
        let mut watch = Watch::default();
        loop {
            if let Ok(chosen) = look()? {
                return Ok(chosen);
            }
            let Ok(_lease) = self.lease_or_break(&format!("choices/{place}"), &mut watch)? else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            return match look()? {
                Ok(chosen) => Ok(chosen),
                Err(problem) => {
                    self.set_aside(&self.choice_path(kind, item_key), "choices", &problem)?;
                    Ok(None)
                }
            };
        }
    }

    /// The choice that a unit recorded among its metrics, also a unit in quarantine.
    fn chosen_by_units(&self, kind: &str, item_key: &Fingerprint, name: &str) -> Result<Option<String>> {
        let mut found = None;
        self.each_with_item_key(kind, item_key, &mut |record, _folder| {
            found = record.metrics.get(name).and_then(|chosen| chosen.as_str()).map(str::to_owned);
            if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(found)
    }

    /// Checks all choices; returns the folder and the problem of each damaged one.
    pub(crate) fn unsound_choices(&self) -> Result<Vec<(PathBuf, String)>> {
        let (choices, mut found) = (self.home().join("choices"), Vec::new());
        for (kind, _) in self.publisher().list(&choices)?.into_iter().filter(|(name, is_folder)| *is_folder && !name.starts_with('.')) {
            for (item_key, _) in self.publisher().list(&choices.join(&kind))?.into_iter().filter(|(name, _)| !name.starts_with('.')) {
                let problem = match self.read_choice(&format!("{kind}/{item_key}")) {
                    Ok(Some(_)) => continue,
                    Ok(None) => format!("expected {CHOICE_FILE}, found none"),
                    Err(error) => error.to_string(),
                };
                found.push((choices.join(&kind).join(&item_key), problem));
            }
        }
        Ok(found)
    }

    /// Reads a choice by its folder's name `KIND/ITEM_KEY`; `None` if there is no folder.
    fn read_choice(&self, place: &str) -> Result<Option<Choice>> {
        let folder = self.home().join("choices").join(place);
        let Some(choice) = self.read_record_of::<Choice>(&folder, CHOICE_FILE)? else { return Ok(None) };
        let own = format!("{}/{}", kind_name(&choice.kind), choice.item_key.short());
        if own == place { Ok(Some(choice)) } else { Err(crate::Error::malformed(&folder, format!("is the choice of {own}"))) }
    }

    fn choice_path(&self, kind: &str, item_key: &Fingerprint) -> PathBuf {
        self.home().join("choices").join(kind_name(kind)).join(item_key.short())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
    };

    use super::*;
    use crate::{Error, UnitKey, publish::replace};

    fn item_key() -> Fingerprint {
        blake3::hash(b"item_key").into()
    }

    fn choose(store: &Store, proposed: &str) -> String {
        store.choice::<Error>("clip/globals", &item_key(), "precision", || Ok(proposed.into())).unwrap()
    }

    fn store() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        store.enter().unwrap();
        (home, store)
    }

    #[test]
    fn the_first_choice_holds_for_all() {
        let (_home, store) = store();
        assert_eq!(choose(&store, "bf16"), "bf16");
        assert_eq!(choose(&store, "f32"), "bf16");
        for is_damaged in [false, true].repeat(10) {
            let (_home, store) = self::store();
            if is_damaged {
                choose(&store, "lost");
                replace(&store.choice_path("clip/globals", &item_key()).join(CHOICE_FILE), b"{").unwrap();
            }
            assert_eq!(chosen_at_once(&store).len(), 1, "{is_damaged}");
            assert!(store.verify_house().unwrap().is_empty(), "{is_damaged}");
        }
    }

    /// The results of 16 threads that choose at the same time.
    fn chosen_at_once(store: &Store) -> BTreeSet<String> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16)
                .map(|n| {
                    scope.spawn({
                        let store = store.clone();
                        move || choose(&store, &n.to_string())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_damaged_or_lost_choice_is_read_from_the_units() {
        let (_home, store) = store();
        assert_eq!(choose(&store, "bf16"), "bf16");
        let key = UnitKey { kind: "clip/globals".into(), fingerprint: blake3::hash(b"unit").into(), item_key: Some(item_key()) };
        let draft = store.begin_unit(&key).unwrap();
        store.commit_unit(draft, key, &[], BTreeMap::from([("precision".into(), "bf16".into())])).unwrap();
        let path = store.choice_path("clip/globals", &item_key()).join(CHOICE_FILE);
        let sound = fs::read_to_string(&path).unwrap();
        for (damaged, words) in [
            (sound.replace("bf16", "fp32"), "the record does not match its digest"),
            (String::new(), "EOF"),
            (sound.replace(&item_key().to_hex(), &Fingerprint::from(blake3::hash(b"other")).to_hex()), "the record does not match"),
        ] {
            replace(&path, damaged.as_bytes()).unwrap();
            let found = store.verify_house().unwrap();
            assert!(found.len() == 1 && found[0].problem.contains(words), "{found:?}");
            assert_eq!(choose(&store, "f32"), "bf16");
            assert!(store.verify_house().unwrap().is_empty());
        }
        let forget = || store.publisher().remove(&store.choice_path("clip/globals", &item_key())).unwrap();
        forget();
        assert_eq!(choose(&store, "f32"), "bf16");
        // The unit is recomputed with the same choice.
        forget();
        store.quarantine(&store.unit_names().unwrap()[0], &["damaged".into()]).unwrap();
        assert_eq!(choose(&store, "f32"), "bf16");
    }
}
