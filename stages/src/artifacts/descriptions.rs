//! Descriptions of classes.
//!
//! `descriptions`: json, `{"NAME": "a description", ...}`, or a text file as PromptDet publishes it: one line `NAME NAME_which_is_DESCRIPTION` for each
//! class, with underscores for spaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::json;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{Artifact, Error, Result, error::malformed, ports::only_file};

/// What stands between name and description in a line.
const WHICH_IS: &str = "_which_is_";

/// A description of each class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptions {
    /// Descriptions by name, with spaces.
    by_name: BTreeMap<String, String>,
}

impl Artifact for Descriptions {
    const KIND: &'static str = "descriptions";
    const EXTENSIONS: &'static [&'static str] = &["txt", "json"];
    const SHAPE: &'static str = r#"descriptions of classes: json, `{"owl": "a bird that hunts at night", ...}`, or PromptDet's `lvis_category_and_description.txt`"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        let bytes = file.read()?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let is_json = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        let by_name = if is_json {
            let Once(by_name) = json::parse(bytes).map_err(|fault| malformed(&file.path, fault.to_string()))?;
            by_name
        } else {
            lines(bytes, &file.path)?
        };
        match by_name.iter().find(|(_, description)| description.trim().is_empty()) {
            Some((name, _)) => Err(malformed(&file.path, format!("expected a description of `{name}`, found none"))),
            None => Ok(Self { by_name }),
        }
    }
}

/// Texts by name, each name once.
struct Once(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Once;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of descriptions by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
                let mut by_name = BTreeMap::new();
                while let Some((name, description)) = map.next_entry::<String, String>()? {
                    if by_name.contains_key(&name) {
                        return Err(A::Error::custom(format!("expected each name once, found `{name}` again")));
                    }
                    by_name.insert(name, description);
                }
                Ok(Once(by_name))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The lines of a published file.
fn lines(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::str::from_utf8(bytes).map_err(|_| malformed(path, "expected text in UTF-8"))?;
    let (mut by_name, mut seen) = (BTreeMap::new(), BTreeSet::new());
    for (place, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let refused = |problem: String| malformed(path, format!("line {}: {problem}", place + 1));
        let fields: Vec<&str> = line.split(' ').collect();
        let [name, described] = fields[..] else {
            return Err(refused(format!("expected `NAME NAME{WHICH_IS}DESCRIPTION` with one space, found {} spaces", fields.len() - 1)));
        };
        let description = described.strip_prefix(name).and_then(|rest| rest.strip_prefix(WHICH_IS));
        let description = description.filter(|description| !description.is_empty() && !description.contains(WHICH_IS));
        let description = description.ok_or_else(|| refused(format!("expected `{name}{WHICH_IS}DESCRIPTION`, found `{described}`")))?;
        if !seen.insert(name) {
            return Err(refused(format!("expected each name once, found `{name}` again")));
        }
        by_name.insert(name.to_owned(), description.replace('_', " "));
    }
    Ok(by_name)
}

impl Descriptions {
    /// How these classes are called here and what they are, each with spaces for underscores. `renamed`: what classes are called here that are called
    /// otherwise elsewhere. Fails where one is not described.
    pub(crate) fn of(&self, classes: &[String], renamed: &BTreeMap<String, String>) -> Result<Vec<(String, String)>> {
        let names: Vec<&String> = classes.iter().map(|class| renamed.get(class).unwrap_or(class)).collect();
        let missing: Vec<&&String> = names.iter().filter(|name| !self.by_name.contains_key(**name)).collect();
        if let Some(first) = missing.first() {
            return Err(Error::Input {
                port: Self::KIND,
                problem: format!("no description of {} of {} classes, `{first}` among them", missing.len(), classes.len()),
                hint: "describe them; where they are called otherwise in that file, say so in `renamed`".into(),
            });
        }
        let texts: Vec<(String, String)> = names.into_iter().map(|name| (name.replace('_', " "), self.by_name[name].clone())).collect();
        let mut seen = BTreeMap::new();
        for (class, text) in classes.iter().zip(&texts) {
            if let Some(other) = seen.insert(text, class) {
                let problem = format!("`{other}` and `{class}` have the same name and description, and so would have the same embedding");
                return Err(Error::Input { port: Self::KIND, problem, hint: "give each a name of its own in `renamed`".into() });
            }
        }
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BTreeMap<String, String>, String> {
        lines(text.as_bytes(), Path::new("FILE")).map_err(|error| error.to_string())
    }

    #[test]
    fn lines_are_names_with_what_they_are() {
        let text = "aerosol_can aerosol_can_which_is_a_metal_tin\nBand_Aid Band_Aid_which_is_a_strip,_etc.\n";
        let by_name = read(text).unwrap();
        assert_eq!(by_name["Band_Aid"], "a strip, etc.");
        let descriptions = Descriptions { by_name };
        let renamed = BTreeMap::from([("plaster".to_owned(), "Band_Aid".to_owned()), ("other".to_owned(), "none".to_owned())]);
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = descriptions.of(&owned(&["plaster", "aerosol_can"]), &renamed).unwrap();
        assert_eq!(found[0], ("Band Aid".to_owned(), "a strip, etc.".to_owned()));
        assert_eq!(found[1].0, "aerosol can");
        let missing = descriptions.of(&owned(&["owl", "aerosol_can", "wren"]), &renamed).unwrap_err().to_string();
        assert_eq!(missing, "descriptions: no description of 2 of 3 classes, `owl` among them");
        let twice = descriptions.of(&owned(&["plaster", "Band_Aid"]), &renamed).unwrap_err().to_string();
        assert!(twice.starts_with("descriptions: `plaster` and `Band_Aid` have the same name and description"), "{twice}");
        let once = |text: &str| json::parse::<Once>(text.as_bytes()).map(|Once(by_name)| by_name.len()).map_err(|fault| fault.to_string());
        assert_eq!(once(r#"{"owl": "a bird", "wren": "another"}"#), Ok(2));
        assert!(once(r#"{"owl": "a bird", "owl": "another"}"#).unwrap_err().contains("expected each name once, found `owl` again"));
        for (text, expected) in [
            ("owl a bird", "line 1: expected `NAME NAME_which_is_DESCRIPTION` with one space, found 2 spaces"),
            ("owl owl_is_a_bird", "line 1: expected `owl_which_is_DESCRIPTION`, found `owl_is_a_bird`"),
            ("owl owl_which_is_", "line 1: expected `owl_which_is_DESCRIPTION`, found `owl_which_is_`"),
            ("owl owl_which_is_a\n\nowl owl_which_is_b", "line 3: expected each name once, found `owl` again"),
        ] {
            assert!(read(text).unwrap_err().ends_with(expected), "{:?}", read(text));
        }
    }
}
