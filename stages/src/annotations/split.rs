//! `annotations/split`: a data set's annotations with its classes divided into base and novel.

use std::fmt;

use ovenbird_data::{
    Error as DataError,
    classes::ClassSplit,
    split::{LabelFilter, write_split},
    warnings::of_boxes,
};
use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, IntoDeserializer as _, MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes},
};

/// Which classes are base and which are novel.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub enum ClassList {
    /// By name.
    Known(KnownList),
    /// Two lists, `{base: [cat, dog], novel: [owl]}`, spelled as in the annotations; either may be empty.
    Lists(ClassSplit),
}

/// A class list with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KnownList {
    /// From the `classes` input.
    #[default]
    Input,
    /// The 48 base and 17 novel classes of COCO, the usual split for open-vocabulary detection.
    #[serde(rename = "coco-48-17")]
    Coco4817,
    /// LVIS: frequent and common classes are base, rare ones novel.
    LvisFrequency,
}

impl Default for ClassList {
    fn default() -> Self {
        Self::Known(KnownList::Input)
    }
}

impl Serialize for ClassList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Known(known) => known.serialize(serializer),
            Self::Lists(lists) => lists.serialize(serializer),
        }
    }
}

// A derived one would not say what is wrong with the lists.
impl<'de> Deserialize<'de> for ClassList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ClassListVisitor)
    }
}

struct ClassListVisitor;

impl<'de> Visitor<'de> for ClassListVisitor {
    type Value = ClassList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`input`, `coco-48-17`, `lvis-frequency`, or two lists `{base: [..], novel: [..]}`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<ClassList, E> {
        KnownList::deserialize(name.into_deserializer()).map(ClassList::Known)
    }

    fn visit_map<A: MapAccess<'de>>(self, lists: A) -> Result<ClassList, A::Error> {
        ClassSplit::deserialize(MapAccessDeserializer::new(lists)).map(ClassList::Lists)
    }
}

/// Annotations for open-vocabulary detection: classes renumbered, base classes first, and annotations of novel classes kept or dropped.
///
/// New category ids count from 0. Everything else is copied unchanged: image and annotation ids, boxes, masks, areas, unknown fields. A class
/// list for LVIS must name all its classes; classes of COCO that are not listed are dropped. (OADP, annotation building.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Which classes are base and which are novel: a list with a name, or the two lists.
    #[serde(default)]
    pub classes: ClassList,
    /// Which annotations and images are kept.
    #[serde(default)]
    pub keep: LabelFilter,
}

const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS v1 json.");
const CLASSES: In<Classes> = In::optional("classes", "Base and novel class names, for `classes: input`.");
const SPLIT: Out<AnnotationFile> = Out::new("annotations", "The renumbered json: `categories`, `annotations`, `images`, without spaces.");
const LIST: Out<Classes> = Out::new("classes", "The class names; a class's new id is its position among base classes, then novel ones.");

impl Stage for Split {
    const KIND: &'static str = "annotations/split";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[ANNOTATIONS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[SPLIT.info(), LIST.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let annotations = cx.inputs.read(ANNOTATIONS)?;
        // Contradictions are found before anything is built on the file.
        let checked = annotations.load()?;
        let classes = match &self.classes {
            ClassList::Lists(classes) => classes.clone(),
            ClassList::Known(KnownList::Input) => {
                let given = cx.inputs.read_if_given(CLASSES)?.map(|Classes(classes)| classes);
                given.ok_or_else(|| Error::Input {
                    port: "classes",
                    problem: "missing, but `classes: input` reads the class list from the input `classes`".into(),
                    hint: "give `in: {classes: ...}`, or `with: {classes: {base: [..], novel: [..]}}`, `coco-48-17` or `lvis-frequency`"
                        .into(),
                })?
            }
            ClassList::Known(KnownList::Coco4817) => ClassSplit::coco_48_17(),
            ClassList::Known(KnownList::LvisFrequency) => ClassSplit::by_frequency(&checked).ok_or_else(|| DataError::Malformed {
                path: annotations.file.path.clone(),
                problem: "a category without `frequency`".into(),
                hint: Some("`lvis-frequency` needs LVIS v1 annotations".into()),
            })?,
        };
        if let Some(words) = of_boxes(&checked) {
            cx.note(format!("{words}: they are kept unchanged"));
        }
        drop(checked);
        let draft = cx.begin(unit)?;
        let mut file = draft.create(SPLIT, "annotations.json")?;
        let counts = write_split(&annotations.file.read()?, &annotations.file.path, &classes, self.keep, &mut file)?;
        file.finish()?;
        if counts.unlisted_categories > 0 {
            let (n_categories, n_annotations) = (counts.unlisted_categories, counts.unlisted_annotations);
            cx.note(format!("{n_categories} categories that are not in the class list are dropped, with {n_annotations} annotations"));
        }
        draft.write(LIST, "classes.json", &serde_json::to_vec(&classes).expect("BUG: names are plain JSON"))?;
        cx.tick(counts.images as u64);
        cx.commit(draft, [("images".into(), counts.images.into()), ("annotations".into(), counts.annotations.into())].into())
    }
}
