//! Base and novel classes. A class file is JSON, `{"base": [names], "novel": [names]}`: the built-in ones are in `classes/`.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::annotations::{Annotations, Frequency};

/// The 48 base and 17 novel classes of COCO, each in ascending original id.
const COCO_48_17: &str = include_str!("classes/coco_48_17.json");

/// Base classes, labelled in training, and novel classes. The order counts: a class's new id is its place in [`Self::all`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Lists")]
#[schemars(!try_from)]
pub struct ClassSplit {
    /// Classes with labels in training.
    pub base: Vec<String>,
    /// Classes without labels in training.
    pub novel: Vec<String>,
}

/// A class file before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lists {
    base: Vec<String>,
    novel: Vec<String>,
}

impl TryFrom<Lists> for ClassSplit {
    type Error = String;

    fn try_from(Lists { base, novel }: Lists) -> Result<Self, String> {
        let split = Self { base, novel };
        match split.duplicate() {
            _ if split.all().next().is_none() => Err("expected at least one class, found two empty lists".into()),
            Some(twice) => Err(format!("the class list names `{twice}` twice")),
            None => Ok(split),
        }
    }
}

impl ClassSplit {
    /// The 48 / 17 split of COCO (Bansal et al., ECCV 2018) that OVR-CNN, ViLD and OADP use.
    pub fn coco_48_17() -> Self {
        serde_json::from_str(COCO_48_17).expect("BUG: the built-in class file is valid")
    }

    /// The split of LVIS v1 (Gu et al., ViLD): frequent and common classes are base, rare ones novel, each in ascending
    /// original id. `None` where a category has no frequency.
    pub fn by_frequency(annotations: &Annotations) -> Option<Self> {
        let (mut base, mut novel) = (Vec::new(), Vec::new());
        for category in &annotations.categories {
            match category.frequency? {
                Frequency::Rare => novel.push(category.name.clone()),
                Frequency::Common | Frequency::Frequent => base.push(category.name.clone()),
            }
        }
        Some(Self { base, novel })
    }

    /// Base classes, then novel ones.
    pub fn all(&self) -> impl Iterator<Item = &String> {
        self.base.iter().chain(&self.novel)
    }

    /// The first class that is named twice.
    pub fn duplicate(&self) -> Option<&str> {
        let mut seen = BTreeSet::new();
        self.all().find(|name| !seen.insert(*name)).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use sha2::{Digest as _, Sha256};

    use super::*;

    /// Digests of the published lists: methods/oadp, section 2.
    #[test]
    fn the_coco_lists_are_the_published_ones() {
        let digest = |names: &[String]| {
            let digest = Sha256::digest(names.join("\n"));
            digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let split = ClassSplit::coco_48_17();
        assert_eq!(digest(&split.base), "9787ec2c7bfbbf347134500fd15c979f0ab382660c1f4f1dcc917cb26b3a44f7");
        assert_eq!(digest(&split.novel), "12051852c10b722dcf201be451dba3ead34bba7dab4f6f58eee6d4d931fb9182");
    }

    #[test]
    fn a_list_that_names_a_class_twice_or_has_other_fields_is_refused() {
        let read = |json: &str| serde_json::from_str::<ClassSplit>(json).map_err(|error| error.to_string());
        let split = ClassSplit { base: vec!["a".into()], novel: vec!["b".into()] };
        assert_eq!(read(r#"{"base": ["a"], "novel": ["b"]}"#).as_ref(), Ok(&split));
        assert_eq!(serde_json::to_string(&split).unwrap(), r#"{"base":["a"],"novel":["b"]}"#);
        for (json, words) in [
            (r#"{"base": ["a", "a"], "novel": []}"#, "the class list names `a` twice"),
            (r#"{"base": ["a"], "novel": ["a"]}"#, "the class list names `a` twice"),
            (r#"{"base": [], "novel": []}"#, "expected at least one class, found two empty lists"),
            (r#"{"base": ["a"], "novel": [], "rare": []}"#, "unknown field `rare`"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[test]
    fn rare_classes_are_novel_and_the_order_is_that_of_the_ids() {
        let annotations = |frequency: &str| {
            let json = format!(
                r#"{{"images": [], "annotations": [], "categories": [
                    {{"id": 9, "name": "wren", "frequency": "c"}}, {{"id": 3, "name": "owl", "frequency": "r"}},
                    {{"id": 1, "name": "heron", "frequency": "f"}}, {{"id": 2, "name": "crane", {frequency} "synset": "crane.n.05"}}]}}"#
            );
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(json.as_bytes()).unwrap();
            Annotations::load(file.path()).unwrap()
        };
        let expected = ClassSplit { base: vec!["heron".into(), "wren".into()], novel: vec!["crane".into(), "owl".into()] };
        assert_eq!(ClassSplit::by_frequency(&annotations("\"frequency\": \"r\",")), Some(expected));
        assert_eq!(ClassSplit::by_frequency(&annotations("")), None);
    }

    #[test]
    fn a_class_named_twice_is_found() {
        let split = |novel: &str| ClassSplit { base: vec!["a".into(), "b".into()], novel: vec![novel.into()] };
        assert_eq!((split("b").duplicate(), split("c").duplicate()), (Some("b"), None));
    }
}
