//! Descriptions of classes.
//!
//! `descriptions`: json, `{"NAME": "a description", ...}`, or a text file as PromptDet publishes it: one line `NAME NAME_which_is_DESCRIPTION` for each
//! class, with underscores for spaces.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::json;

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
        let by_name = match file.path.extension() {
            Some(extension) if extension == "json" => json::parse(&bytes).map_err(|fault| malformed(&file.path, fault.to_string()))?,
            _ => lines(&bytes, &file.path)?,
        };
        match by_name.iter().find(|(_, description)| description.trim().is_empty()) {
            Some((name, _)) => Err(malformed(&file.path, format!("expected a description of `{name}`, found none"))),
            None => Ok(Self { by_name }),
        }
    }
}

/// The lines of a published file.
fn lines(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::str::from_utf8(bytes).map_err(|_| malformed(path, "expected text in UTF-8"))?;
    let (mut by_name, mut seen) = (BTreeMap::new(), HashSet::new());
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
        let find = |class: &String| {
            let name = renamed.get(class).unwrap_or(class);
            self.by_name.get(name).map(|description| (name.replace('_', " "), description.clone()))
        };
        let found: Vec<Option<_>> = classes.iter().map(find).collect();
        let missing: Vec<&String> = classes.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(class, _)| class).collect();
        match missing.first() {
            None => Ok(found.into_iter().flatten().collect()),
            Some(first) => Err(Error::Input {
                port: Self::KIND,
                problem: format!("no description of {} of {} classes, `{first}` among them", missing.len(), classes.len()),
                hint: "describe them; where they are called otherwise in that file, say so in `renamed`".into(),
            }),
        }
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
