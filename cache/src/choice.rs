//! What is chosen once for all units of a family, before the first is made: in which arithmetic a network computes, say.
//!
//! The choice is not in the recipe, so it is written down where every process that makes such units finds it:
//!
//! ```text
//! HOME/choices/KIND/FAMILY/choice.json
//! ```
//!
//! Whoever publishes it first has chosen for all, on every machine that uses the home. One that is damaged or lost is chosen as the units
//! tell that are there, or that were set aside.

use std::{ops::ControlFlow, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Digest, Fingerprint, Result, Store, Watch,
    record::Sealed,
    store::{FORMAT, kind_name, to_json},
};

pub(crate) const CHOICE_FILE: &str = "choice.json";

/// A choice as it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Choice {
    format: u32,
    kind: String,
    family: Fingerprint,
    /// Under which name units note it among their metrics.
    name: String,
    chosen: String,
    seal: Digest,
}

impl Sealed for Choice {
    fn key(&self) -> [u8; 32] {
        *self.family.as_bytes()
    }

    fn seal_mut(&mut self) -> &mut Digest {
        &mut self.seal
    }
}

impl Store {
    /// What was chosen for a family; otherwise what `choose` says, which then holds for all. Units note it under `name` among their metrics.
    pub fn choice<E: From<crate::Error>>(
        &self,
        kind: &str,
        family: &Fingerprint,
        name: &str,
        choose: impl FnOnce() -> Result<String, E>,
    ) -> Result<String, E> {
        if let Some(chosen) = self.chosen(kind, family, name)? {
            return Ok(chosen);
        }
        let chosen = match self.noted_by_units(kind, family, name)? {
            Some(chosen) => chosen,
            None => choose()?,
        };
        let seal = Digest::of(&[]);
        let choice =
            Choice { format: FORMAT, kind: kind.into(), family: *family, name: name.into(), chosen: chosen.clone(), seal }.sealed();
        let draft = self.publisher().begin(&self.choice_path(kind, family))?;
        if draft.commit(CHOICE_FILE, &to_json(&choice))? {
            return Ok(chosen);
        }
        Ok(self.chosen(kind, family, name)?.unwrap_or(chosen))
    }

    /// The choice that is written down. What is there and damaged is set aside, by one process at a time: what the others put in its
    /// place is sound.
    fn chosen(&self, kind: &str, family: &Fingerprint, name: &str) -> Result<Option<String>> {
        let place = format!("{}/{}", kind_name(kind), family.short());
        let look = || match self.read_choice(&place) {
            Ok(Some(choice)) if choice.name == name => Ok(Ok(Some(choice.chosen))),
            Ok(Some(choice)) => Ok(Err(format!("is a choice of `{}`, expected one of `{name}`", choice.name))),
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
                    let quarantine = self.home().join("quarantine").join("choices");
                    if let Some(aside) = self.publisher().set_aside(&self.choice_path(kind, family), &quarantine)? {
                        self.publisher().replace(&aside.with_extension("reason.txt"), format!("{problem}\n").as_bytes())?;
                    }
                    Ok(None)
                }
            };
        }
    }

    /// What a unit of a family notes, of one that was set aside, too.
    fn noted_by_units(&self, kind: &str, family: &Fingerprint, name: &str) -> Result<Option<String>> {
        let mut found = None;
        self.each_of_family(kind, family, &mut |record, _folder| {
            found = record.metrics.get(name).and_then(|chosen| chosen.as_str()).map(str::to_owned);
            if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(found)
    }

    /// Checks every choice; names what is wrong with those that are not sound.
    pub(crate) fn unsound_choices(&self) -> Result<Vec<(PathBuf, String)>> {
        let (choices, mut found) = (self.home().join("choices"), Vec::new());
        for (kind, _) in self.publisher().list(&choices)?.into_iter().filter(|(name, is_folder)| *is_folder && !name.starts_with('.')) {
            for (family, _) in self.publisher().list(&choices.join(&kind))?.into_iter().filter(|(name, _)| !name.starts_with('.')) {
                let problem = match self.read_choice(&format!("{kind}/{family}")) {
                    Ok(Some(_)) => continue,
                    Ok(None) => format!("expected {CHOICE_FILE}, found none"),
                    Err(error) => error.to_string(),
                };
                found.push((choices.join(&kind).join(&family), problem));
            }
        }
        Ok(found)
    }

    /// A choice by its folder's name `KIND/FAMILY`; none where there is no folder.
    fn read_choice(&self, place: &str) -> Result<Option<Choice>> {
        let folder = self.home().join("choices").join(place);
        let Some(choice) = self.read_record_of::<Choice>(&folder, CHOICE_FILE)? else { return Ok(None) };
        let own = format!("{}/{}", kind_name(&choice.kind), choice.family.short());
        if own == place { Ok(Some(choice)) } else { Err(crate::Error::malformed(&folder, format!("is the choice of {own}"))) }
    }

    fn choice_path(&self, kind: &str, family: &Fingerprint) -> PathBuf {
        self.home().join("choices").join(kind_name(kind)).join(family.short())
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

    fn family() -> Fingerprint {
        blake3::hash(b"family").into()
    }

    fn choose(store: &Store, proposed: &str) -> String {
        store.choice::<Error>("clip/globals", &family(), "precision", || Ok(proposed.into())).unwrap()
    }

    fn store() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        store.enter().unwrap();
        (home, store)
    }

    #[test]
    fn the_first_to_choose_has_chosen_for_all() {
        let (_home, store) = store();
        assert_eq!(choose(&store, "bf16"), "bf16");
        assert_eq!(choose(&store, "f32"), "bf16");
        for hurt in [false, true].repeat(10) {
            let (_home, store) = self::store();
            if hurt {
                choose(&store, "lost");
                replace(&store.choice_path("clip/globals", &family()).join(CHOICE_FILE), b"{").unwrap();
            }
            assert_eq!(of_many(&store).len(), 1, "{hurt}");
            assert!(store.verify_house().unwrap().is_empty(), "{hurt}");
        }
    }

    /// What those have who choose at once.
    fn of_many(store: &Store) -> BTreeSet<String> {
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
    fn a_choice_that_is_damaged_or_lost_is_read_off_the_units() {
        let (_home, store) = store();
        assert_eq!(choose(&store, "bf16"), "bf16");
        let key = UnitKey { kind: "clip/globals".into(), fingerprint: blake3::hash(b"unit").into(), family: Some(family()) };
        let draft = store.begin_unit(&key).unwrap();
        store.commit_unit(draft, key, &[], BTreeMap::from([("precision".into(), "bf16".into())])).unwrap();
        let path = store.choice_path("clip/globals", &family()).join(CHOICE_FILE);
        let sound = fs::read_to_string(&path).unwrap();
        for (hurt, words) in [
            (sound.replace("bf16", "fp32"), "the record does not match its digest"),
            (String::new(), "EOF"),
            (sound.replace(&family().to_hex(), &Fingerprint::from(blake3::hash(b"other")).to_hex()), "the record does not match"),
        ] {
            replace(&path, hurt.as_bytes()).unwrap();
            let found = store.verify_house().unwrap();
            assert!(found.len() == 1 && found[0].problem.contains(words), "{found:?}");
            assert_eq!(choose(&store, "f32"), "bf16");
            assert!(store.verify_house().unwrap().is_empty());
        }
        let forget = || store.publisher().remove(&store.choice_path("clip/globals", &family())).unwrap();
        forget();
        assert_eq!(choose(&store, "f32"), "bf16");
        // A unit that is to be made again is to be the same.
        forget();
        store.quarantine(&store.unit_names().unwrap()[0], &["damaged".into()]).unwrap();
        assert_eq!(choose(&store, "f32"), "bf16");
    }
}
