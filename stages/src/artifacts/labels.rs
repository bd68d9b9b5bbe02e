//! Classes that objects are given instead of their own: `annotations/relabel`.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::annotations::{AnnotationId, CategoryId};
use serde::{Deserialize, Serialize};

use super::read_json;
use crate::{Artifact, Result, ports::only_file};

/// New category ids by annotation id, as CORA's processes export them, a file each; of an id in several files the last one counts.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct LabelFiles(pub BTreeMap<AnnotationId, CategoryId>);

impl Artifact for LabelFiles {
    const KIND: &'static str = "labels";
    const EXTENSIONS: &'static [&'static str] = &["json", "/"];
    const SHAPE: &'static str = r#"category ids by annotation id, `{"1768": 1, "1773": 62}`: a json file, or a folder of `export_label_0.json`, `export_label_1.json` and so on"#;

    fn open(files: &[InputFile]) -> Result<Self> {
        let number = |file: &InputFile| {
            let stem = file.name.trim_end_matches(".json");
            stem.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse::<u64>().ok())
        };
        let mut files: Vec<&InputFile> = files.iter().collect();
        files.sort_by_key(|file| (number(file), &file.name));
        let mut all = BTreeMap::new();
        for file in files {
            all.extend(read_json::<BTreeMap<AnnotationId, CategoryId>>(file)?);
        }
        Ok(Self(all))
    }
}

/// An object's old and new category id, and CLIP's probability of each, where that is known.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Change(pub CategoryId, pub CategoryId, pub Option<f64>, pub Option<f64>);

/// Which objects have another class than before, by annotation id.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Changes(pub BTreeMap<AnnotationId, Change>);

impl Artifact for Changes {
    const KIND: &'static str = "label-changes";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the json `changes` of `annotations/relabel`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self(read_json(only_file(Self::KIND, files)?)?))
    }
}

/// What a relabelling did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Relabelled {
    /// Objects that were looked at.
    pub objects: usize,
    /// Those that kept their class.
    pub unchanged: usize,
    /// By class, in ascending id.
    pub classes: Vec<RelabelledClass>,
    /// Which became which: old name, new name, how many; most first.
    pub confusion: Vec<(String, String, usize)>,
    /// How many objects changed with a margin (probability of the new class minus that of the old one) in each tenth from 0 to 1.
    pub margins: Vec<usize>,
}

/// A class before and after a relabelling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelabelledClass {
    /// Its name.
    pub name: String,
    /// Its objects before.
    pub before: usize,
    /// Its objects after.
    pub after: usize,
    /// Those that kept it.
    pub unchanged: usize,
}

impl Artifact for Relabelled {
    const KIND: &'static str = "relabelled";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the json `summary` of `annotations/relabel`";

    fn open(files: &[InputFile]) -> Result<Self> {
        read_json(only_file(Self::KIND, files)?)
    }
}
