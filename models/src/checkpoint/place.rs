//! Where in a file the weights of a network lie.
//!
//! Training scripts keep weights under keys of their own (`state_dict`, `model_state_dict`, `ema`) and behind prefixes (`module.`,
//! `module._orig_mod.`, `clipmodel.`). None of these is known here: a place is whatever stands before a name that only the network has.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use tch::Tensor;

use crate::{Error, Result};

/// The number of names that a message lists.
const N_LISTED: usize = 4;

/// Where the tensors of a network lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The prefix of their names: empty, or ending with a dot.
    pub prefix: String,
    /// The names of the tensors that lie elsewhere.
    pub beside: Vec<String>,
}

/// The prefixes before a name in the names of a file.
pub(crate) fn prefixes(tensors: &BTreeMap<String, Tensor>, name: &str) -> BTreeSet<String> {
    let before = |found: &String| found.strip_suffix(name).filter(|prefix| prefix.is_empty() || prefix.ends_with('.')).map(str::to_owned);
    tensors.keys().filter_map(before).collect()
}

impl Place {
    /// Chooses one of `places`. `asked`: the whole prefix or its end, with or without the last dot; `network`: what is searched for, as `a
    /// CLIP`; `how`: what to do where there are several.
    ///
    /// Fails if no place has the prefix that was asked for, or if none was asked for and there are several.
    pub(crate) fn choose(
        places: &BTreeSet<String>,
        asked: Option<&str>,
        tensors: &BTreeMap<String, Tensor>,
        origin: &Path,
        network: &str,
        how: &str,
    ) -> Result<Option<Self>> {
        let listed = || places.iter().map(|place| in_words(place)).collect::<Vec<_>>().join(", ");
        let malformed = |problem: String, hint: String| Error::Malformed { path: origin.to_owned(), problem, hint: Some(hint) };
        let prefix = match asked {
            Some(asked) => {
                let wanted = if asked.is_empty() || asked.ends_with('.') { asked.to_owned() } else { format!("{asked}.") };
                let ending = format!(".{wanted}");
                let whole = places.get(&wanted);
                let mut ends = places.iter().filter(|place| !wanted.is_empty() && place.ends_with(&ending));
                let found = whole.or_else(|| ends.next().filter(|_| ends.next().is_none()));
                let Some(found) = found else {
                    let problem =
                        format!("expected {network} under `{asked}`, found {}", if places.is_empty() { "none".into() } else { listed() });
                    return Err(malformed(problem, "give the whole prefix of one of these, or none".into()));
                };
                found
            }
            None => match places.len() {
                0 => return Ok(None),
                1 => &places.iter().next().expect("BUG: there is one")[..],
                n => return Err(malformed(format!("expected {network}, found {n}: {}", listed()), how.to_owned())),
            },
        };
        let beside = tensors.keys().filter(|name| !name.starts_with(prefix)).cloned().collect();
        Ok(Some(Self { prefix: prefix.to_owned(), beside }))
    }

    /// The tensors at this place, without the prefix.
    pub(crate) fn tensors(&self, tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
        let below = |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(&self.prefix)?.to_owned(), tensor.shallow_clone()));
        tensors.iter().filter_map(below).collect()
    }

    /// A note that tensors at other places are ignored, if there are any.
    pub fn note(&self) -> Option<String> {
        let words = || format!("the weights are {}; left out of the file: {}", in_words(&self.prefix), list(&self.beside));
        (!self.beside.is_empty()).then(words)
    }
}

/// Takes the copies out of tensors that a file has under two names. `copies`: how the names of copies begin, and those of what they copy. A copy whose other name
/// is not there gets it. Fails where both are there and differ.
pub(crate) fn without_copies(
    tensors: BTreeMap<String, Tensor>,
    copies: &[(&str, &str)],
    origin: &Path,
) -> Result<BTreeMap<String, Tensor>> {
    let named = |name: &str| copies.iter().find_map(|(copy, known)| Some(format!("{known}{}", name.strip_prefix(copy)?)));
    let (copied, mut kept): (BTreeMap<_, _>, BTreeMap<_, _>) = tensors.into_iter().partition(|(name, _)| named(name).is_some());
    for (copy, tensor) in copied {
        let name = named(&copy).expect("BUG: its name begins as those of copies do");
        let Some(other) = kept.get(&name) else {
            kept.insert(name, tensor);
            continue;
        };
        if !are_equal(&tensor, other) {
            let shape = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
            let found =
                if shape(&tensor) == shape(other) { "other numbers".into() } else { format!("{} and {}", shape(&tensor), shape(other)) };
            let problem = format!("expected the same tensor as `{copy}` and as `{name}`, found {found}");
            let hint = Some("the file is none that its training wrote: take another checkpoint, or save it without the copies".into());
            return Err(Error::Malformed { path: origin.to_owned(), problem, hint });
        }
    }
    Ok(kept)
}

/// Adds the copies that [`without_copies`] takes out.
pub(crate) fn add_copies(tensors: &mut BTreeMap<String, Tensor>, copies: &[(&str, &str)]) {
    let copy = |(name, tensor): (&String, &Tensor)| {
        copies.iter().find_map(|(copy, known)| Some((format!("{copy}{}", name.strip_prefix(known)?), tensor.shallow_clone())))
    };
    let added: Vec<(String, Tensor)> = tensors.iter().filter_map(copy).collect();
    tensors.extend(added);
}

/// Whether two tensors have the same kind, shape and numbers.
pub(crate) fn are_equal(one: &Tensor, other: &Tensor) -> bool {
    one.kind() == other.kind() && one.size() == other.size() && one.equal(other)
}

/// `under `model.``, `at the top level`.
fn in_words(prefix: &str) -> String {
    if prefix.is_empty() { "at the top level".into() } else { format!("under `{prefix}`") }
}

/// Some names, or the first of many.
pub(crate) fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<&String> = names.into_iter().collect();
    let first = names.iter().take(N_LISTED).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let n_more = names.len().saturating_sub(N_LISTED);
    if n_more == 0 { first } else { format!("{first} and {n_more} more") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(names: &[&str]) -> BTreeMap<String, Tensor> {
        names.iter().map(|name| ((*name).to_owned(), Tensor::from(1.0_f32))).collect()
    }

    /// The prefix that is chosen among those before `w.x`, and the tensors elsewhere; or the problem.
    fn chosen(names: &[&str], asked: Option<&str>) -> Result<Option<(String, Vec<String>)>, String> {
        let tensors = tensors(names);
        let place = Place::choose(&prefixes(&tensors, "w.x"), asked, &tensors, Path::new("f.pt"), "one net", "say which");
        place.map(|place| place.map(|place| (place.prefix, place.beside))).map_err(|error| error.to_string())
    }

    #[test]
    fn the_prefix_is_whatever_stands_before_a_known_name() {
        for prefix in ["", "state_dict.", "model_state_dict.", "state_dict.module._orig_mod.", "a.b.c.d.", "state_dict.clipmodel."] {
            assert_eq!(chosen(&[&format!("{prefix}w.x"), &format!("{prefix}v")], None), Ok(Some((prefix.to_owned(), Vec::new()))));
        }
        // A name is whole: `new.x` is none.
        assert_eq!(chosen(&["new.x", "w"], None), Ok(None));
        assert_eq!(chosen(&["net.w.x", "head", "net.v"], None), Ok(Some(("net.".into(), vec!["head".into()]))));
    }

    #[test]
    fn of_several_places_nobody_guesses_one() {
        let names = ["model.w.x", "ema.model.w.x", "teacher.w.x"];
        let several = "f.pt: expected one net, found 3: under `ema.model.`, under `model.`, under `teacher.`";
        assert_eq!(chosen(&names, None), Err(several.into()));
        for (asked, prefix) in [("teacher", "teacher."), ("teacher.", "teacher."), ("model.", "model."), ("ema.model", "ema.model.")] {
            assert_eq!(chosen(&names, Some(asked)).unwrap().unwrap().0, prefix);
        }
        let refused = |asked: &str| chosen(&names, Some(asked)).unwrap_err();
        assert!(refused("eacher.").starts_with("f.pt: expected one net under `eacher.`, found under `ema.model.`, under"));
        assert!(refused("").contains("under ``"));
        // The end of two.
        assert!(chosen(&["a.m.w.x", "b.m.w.x"], Some("m")).is_err());
        assert_eq!(
            chosen(&["w.x", "teacher.w.x"], None).unwrap_err(),
            "f.pt: expected one net, found 2: at the top level, under `teacher.`"
        );
        assert_eq!(chosen(&["w.x", "teacher.w.x"], Some("")).unwrap().unwrap().0, "");
        assert_eq!(chosen(&["y"], Some("m")).unwrap_err(), "f.pt: expected one net under `m`, found none");
    }

    #[test]
    fn what_is_left_out_is_listed() {
        let place = |beside: &[&str]| Place { prefix: "m.".into(), beside: beside.iter().map(|name| (*name).to_owned()).collect() }.note();
        assert_eq!(place(&[]), None);
        assert_eq!(place(&["a"]).unwrap(), "the weights are under `m.`; left out of the file: `a`");
        assert!(place(&["a", "b", "c", "d", "e", "f"]).unwrap().ends_with("`a`, `b`, `c`, `d` and 2 more"));
    }
}
