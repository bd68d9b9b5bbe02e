//! `vocabulary/import`: a large list of names, such as V3Det's.

use std::collections::BTreeSet;

use ovenbird_data::classes::ClassSplit;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{Classes, PublishedVocabulary, Vocabulary},
};

/// A vocabulary beside the classes, checked: names from which negatives and pseudo classes are chosen.
///
/// Names that a class has too are found without regard to capitals, spaces and punctuation. Those of base classes are dropped; those of
/// novel classes are refused, since a detector must not know them before it is tested. (RALF, sections 1 and 6.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// SHA-256 of the names as read, joined by line feeds, in hexadecimal digits: another list is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Keep names of novel classes, which are refused otherwise.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_novel: bool,
}

const FILE: In<PublishedVocabulary> = In::required("file", "V3Det's names as RALF publishes them.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const VOCABULARY: Out<Vocabulary> = Out::new("vocabulary", "The names without those of base classes, in order, json.");

impl Stage for Import {
    const KIND: &'static str = "vocabulary/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILE.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[VOCABULARY.info()];

    fn check(&self) -> Vec<Problem> {
        let is_digest = |text: &String| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        Problem::unless(&[("sha256", self.sha256.as_ref().is_none_or(is_digest), "64 hexadecimal digits")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let PublishedVocabulary { names } = cx.inputs.read(FILE)?;
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let Chosen { names, base, novel } = self.choose(names, &classes)?;
        for (words, found) in [("base classes, which are dropped", &base), ("novel classes, which are kept", &novel)] {
            if !found.is_empty() {
                cx.note(format!("{} names are those of {words}: {}", found.len(), found.join(", ")));
            }
        }
        let counts = [("names", names.len()), ("dropped", base.len()), ("novel", novel.len())];
        let draft = cx.begin(unit)?;
        draft.write(VOCABULARY, "vocabulary.json", &serde_json::to_vec(&Vocabulary { names }).expect("BUG: names are plain JSON"))?;
        cx.tick(1);
        cx.commit(draft, counts.map(|(name, n)| (name.to_owned(), n.into())).into())
    }
}

/// The names that stay, and those that are also classes.
#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    names: Vec<String>,
    /// Not among `names`.
    base: Vec<String>,
    /// Among `names`.
    novel: Vec<String>,
}

impl Import {
    fn choose(&self, names: Vec<String>, classes: &ClassSplit) -> Result<Chosen> {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: FILE.info().name, problem, hint: hint.into() });
        if let Some(place) = names.iter().position(|name| plain(name).is_empty()) {
            return refused(format!("expected a name at place {place}, found `{}`", names[place]), "remove it, or name it");
        }
        let found: String = Sha256::digest(names.join("\n")).iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(expected) = self.sha256.as_ref().filter(|expected| !expected.eq_ignore_ascii_case(&found)) {
            return refused(
                format!("expected names whose SHA-256 is {expected}, found {} names whose is {found}", names.len()),
                "give the list that `sha256` was taken from, or correct `sha256`",
            );
        }
        let plain_names = |names: &[String]| names.iter().map(|name| plain(name)).collect::<BTreeSet<String>>();
        let (of_base, of_novel) = (plain_names(&classes.base), plain_names(&classes.novel));
        let (base, names): (Vec<String>, Vec<String>) = names.into_iter().partition(|name| of_base.contains(&plain(name)));
        let novel: Vec<String> = names.iter().filter(|name| of_novel.contains(&plain(name))).cloned().collect();
        if !novel.is_empty() && !self.allow_novel {
            return refused(
                format!("{} names are those of novel classes: {}", novel.len(), novel.join(", ")),
                "remove them; or keep them: `allow_novel: true`",
            );
        }
        if names.is_empty() {
            return refused("expected at least one name that no base class has, found none".into(), "give a larger list");
        }
        Ok(Chosen { names, base, novel })
    }
}

/// The letters and digits of a name, in lower case.
fn plain(name: &str) -> String {
    name.chars().filter(|letter| letter.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn choose(stage: &Import, given: &[&str]) -> Result<Chosen, String> {
        let classes = ClassSplit { base: names(&["hot_dog", "owl"]), novel: names(&["T-shirt"]) };
        stage.choose(names(given), &classes).map_err(|error| error.to_string())
    }

    #[test]
    fn names_of_base_classes_are_dropped_and_those_of_novel_ones_refused() {
        let found = choose(&Import::default(), &["wren", "Hot dog", "emu"]).unwrap();
        assert_eq!(found, Chosen { names: names(&["wren", "emu"]), base: names(&["Hot dog"]), novel: Vec::new() });
        let refusal = choose(&Import::default(), &["wren", "t shirt"]).unwrap_err();
        assert_eq!(refusal, "file: 1 names are those of novel classes: t shirt");
        let allowed = Import { allow_novel: true, ..Import::default() };
        assert_eq!(choose(&allowed, &["wren", "t shirt"]).unwrap().novel, ["t shirt"]);
        assert!(choose(&Import::default(), &["owl"]).unwrap_err().contains("at least one name"));
        assert_eq!(choose(&Import::default(), &["wren", "-"]).unwrap_err(), "file: expected a name at place 1, found `-`");
    }

    #[test]
    fn another_list_than_that_of_the_digest_is_refused() {
        // printf 'wren\nemu' | sha256sum
        let digest = "791fafa6d87630d43477bdd2ed6c2b1a67c381a7a3c2f3f846d492ac6408ecd3";
        let stage = Import { sha256: Some(digest.into()), ..Import::default() };
        assert!(choose(&stage, &["wren", "emu"]).is_ok());
        assert!(choose(&stage, &["emu", "wren"]).unwrap_err().contains(digest));
        assert!(Stage::check(&stage).is_empty());
        assert_eq!(Stage::check(&Import { sha256: Some("abc".into()), ..Import::default() }).len(), 1);
    }
}
