//! Annotation files for open-vocabulary detection: classes renumbered as base ++ novel, novel labels kept or dropped.
//!
//! The rules are those of the OADP reference: a class's new id is its place in the list, from 0; `categories` is sorted by
//! it; image ids, annotation ids, boxes, masks, areas and everything this program does not know keep their tokens exactly;
//! arrays keep the file's order; the top-level keys are `categories`, `annotations`, `images`; no spaces.
//!
//! Ids, sizes and `iscrowd` that are written as `1.0`, `"1"` or `false` become plain numbers.
//!
//! The content does not differ from the reference's. Python reformats numbers and text, and this module keeps their tokens, so bytes differ
//! where a file has them in another spelling than Python's: `1.50`, `1e-5` for its `1e-05`, `é` for its `\u00e9`; in names of fields this
//! writes `é` for either. Files that Python or the COCO tools wrote with ASCII names and shortest numbers come out byte for byte the same.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write},
    path::Path,
};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    Error, Result,
    classes::ClassSplit,
    json::{self, Flag, Whole},
    words::{nearest, plainly},
};

/// Which labels and images are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LabelFilter {
    /// Labels of every listed class, all images (OADP's `instances_*.65.json`, `lvis_v1_*.1203.json`).
    #[default]
    All,
    /// Labels of base classes only, all images; the category list keeps every class (OADP's `instances_*.48.json`, `lvis_v1_*.866.json`).
    Base,
    /// Labels of every listed class, only images with at least one label (OADP's `instances_val2017.65.min.json`).
    AllAnnotated,
}

/// The number of images and annotations that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Images.
    pub images: usize,
    /// Annotations.
    pub annotations: usize,
    /// Categories that are not listed, which were dropped.
    pub unlisted_categories: usize,
    /// Their annotations.
    pub unlisted_annotations: usize,
}

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow)]
    images: Vec<Fields<'a>>,
    #[serde(borrow)]
    annotations: Vec<Fields<'a>>,
    #[serde(borrow)]
    categories: Vec<Fields<'a>>,
}

/// The fields of an object in the file's order, their values as written.
struct Fields<'a>(Vec<(Key<'a>, &'a RawValue)>);

/// Borrowed from the file, unless it has escapes: a file of LVIS has nine million of them.
#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a, 'de: 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some((key, value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    fields.push((key, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

impl<'a> Fields<'a> {
    fn get<T: Deserialize<'a>>(&self, key: &str) -> Option<T> {
        serde_json::from_str(self.raw(key)?.get()).ok()
    }

    fn raw(&self, key: &str) -> Option<&'a RawValue> {
        self.0.iter().find(|(Key(known), _)| known == key).map(|(_, value)| *value)
    }

    /// Those of some fields that are written otherwise than as plain numbers, `1.0`, `"1"` or `false`, as plain numbers: programs that
    /// read the file compare ids as they find them.
    fn plain(&self, fields: &[&'static str]) -> Vec<(&'static str, String)> {
        let plain = |field: &&'static str| {
            let token = self.raw(field)?.get();
            let is_plain = token.bytes().all(|byte| byte.is_ascii_digit());
            let number = || self.get(field).map(|Whole(number)| number).or_else(|| self.get(field).map(|Flag(is_set)| is_set.into()));
            Some((*field, if is_plain { return None } else { number()?.to_string() }))
        };
        fields.iter().filter_map(plain).collect()
    }

    /// Writes the object without spaces, some values replaced.
    fn write(&self, out: &mut impl Write, replaced: &[(&str, String)]) -> io::Result<()> {
        out.write_all(b"{")?;
        for (field_idx, (Key(key), value)) in self.0.iter().enumerate() {
            if field_idx > 0 {
                out.write_all(b",")?;
            }
            serde_json::to_writer(&mut *out, key)?;
            out.write_all(b":")?;
            match replaced.iter().find(|(known, _)| known == key) {
                Some((_, value)) => out.write_all(value.as_bytes())?,
                None => write_compact(out, value.get())?,
            }
        }
        out.write_all(b"}")
    }
}

/// Writes JSON without the spaces between its tokens.
fn write_compact(out: &mut impl Write, json: &str) -> io::Result<()> {
    let bytes = json.as_bytes();
    let (mut start, mut is_text, mut is_escaped) = (0, false, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b' ' | b'\n' | b'\r' | b'\t' if !is_text => {
                out.write_all(&bytes[start..at])?;
                start = at + 1;
            }
            _ => {}
        }
    }
    out.write_all(&bytes[start..])
}

/// Writes the annotation file of a class list; `path` is for the message.
///
/// Fails when a listed class is not in the file or is there twice, when an LVIS class is not listed (classes of COCO that are
/// not listed are dropped), and when an image's category lists cannot be renumbered.
pub fn write_split(json: &[u8], path: &Path, classes: &ClassSplit, filter: LabelFilter, out: &mut impl Write) -> Result<Counts> {
    let malformed = |problem: String, hint: &str| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) };
    let again = "check that the download is complete and that this is an `instances` or `lvis_v1` json";
    let parts: Parts<'_> = json::parse(json).map_err(|fault| malformed(fault.to_string(), again))?;
    if let Some(twice) = classes.duplicate() {
        return Err(malformed(format!("the class list names `{twice}` twice"), "name each class once"));
    }

    let place: BTreeMap<&str, usize> = classes.all().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
    let mut new_ids: BTreeMap<u64, usize> = BTreeMap::new();
    let mut categories = Vec::new();
    for category in &parts.categories {
        let (Some(Whole(id)), Some(name)) = (category.get("id"), category.get::<Cow<'_, str>>("name")) else {
            return Err(malformed("categories: expected `id` and `name`".into(), again));
        };
        match place.get(name.as_ref()) {
            Some(new_id) => {
                if categories.iter().any(|(known, _)| known == new_id) {
                    return Err(malformed(
                        format!("categories: a second category named `{name}` (id {id})"),
                        "give each category its own name",
                    ));
                }
                new_ids.insert(id, *new_id);
                categories.push((*new_id, category));
            }
            None if category.get::<Cow<'_, str>>("frequency").is_some() => {
                let hint = "take the class list from the same version of LVIS; its spelling counts";
                return Err(malformed(format!("categories: `{name}` (id {id}) is not in the class list"), hint));
            }
            None => {}
        }
    }
    let found: BTreeSet<usize> = categories.iter().map(|(new_id, _)| *new_id).collect();
    if let Some(problem) = unknown_classes(classes, &found, &parts.categories) {
        return Err(malformed(problem, "name classes as the annotations do, or take the class list of this data set"));
    }
    categories.sort_by_key(|(new_id, _)| *new_id);

    let n_kept = match filter {
        LabelFilter::All | LabelFilter::AllAnnotated => classes.base.len() + classes.novel.len(),
        LabelFilter::Base => classes.base.len(),
    };
    let mut annotations = Vec::new();
    let (mut labelled, mut n_unlisted) = (BTreeSet::new(), 0);
    for (row, annotation) in parts.annotations.iter().enumerate() {
        let ids = (annotation.get("id"), annotation.get("image_id"), annotation.get("category_id"));
        let (Some(Whole(_)), Some(Whole(image)), Some(Whole(category))) = ids else {
            return Err(malformed(format!("annotations[{row}]: expected `id`, `image_id` and `category_id`"), again));
        };
        match new_ids.get(&category) {
            Some(new_id) if *new_id < n_kept => {
                labelled.insert(image);
                annotations.push((annotation, *new_id));
            }
            Some(_) => {}
            None => n_unlisted += 1,
        }
    }
    let is_kept =
        |image: &&Fields<'_>| filter != LabelFilter::AllAnnotated || image.get("id").is_some_and(|Whole(id)| labelled.contains(&id));
    let images: Vec<&Fields<'_>> = parts.images.iter().filter(is_kept).collect();
    let lists: Vec<Vec<(&str, String)>> = images
        .iter()
        .map(|image| {
            let mut replaced = image.plain(&["id", "width", "height"]);
            replaced.extend(renumbered(image, &new_ids)?);
            Ok(replaced)
        })
        .collect::<Result<_, String>>()
        .map_err(|problem| malformed(problem, again))?;

    let counts = Counts {
        images: images.len(),
        annotations: annotations.len(),
        unlisted_categories: parts.categories.len() - categories.len(),
        unlisted_annotations: n_unlisted,
    };
    let mut write = || -> io::Result<()> {
        out.write_all(b"{\"categories\":[")?;
        for (place, (new_id, category)) in categories.iter().enumerate() {
            separate(out, place)?;
            category.write(out, &[("id", new_id.to_string())])?;
        }
        out.write_all(b"],\"annotations\":[")?;
        for (place, (annotation, new_id)) in annotations.iter().enumerate() {
            separate(out, place)?;
            let mut replaced = annotation.plain(&["id", "image_id", "iscrowd"]);
            replaced.push(("category_id", new_id.to_string()));
            annotation.write(out, &replaced)?;
        }
        out.write_all(b"],\"images\":[")?;
        for (place, (image, lists)) in images.iter().zip(&lists).enumerate() {
            separate(out, place)?;
            image.write(out, lists)?;
        }
        out.write_all(b"]}")
    };
    write().map_err(|source| Error::Write { what: "the split's annotations", source })?;
    Ok(counts)
}

/// Names the listed classes that are not among the categories, with their places in the list and similar names.
fn unknown_classes(classes: &ClassSplit, found: &BTreeSet<usize>, categories: &[Fields<'_>]) -> Option<String> {
    const SHOWN: usize = 3;
    let places = |list: &'static str, names: &[String]| (0..names.len()).map(move |place| format!("{list}[{place}]")).collect::<Vec<_>>();
    let places = [places("base", &classes.base), places("novel", &classes.novel)].concat();
    let unknown: Vec<(usize, &String)> = classes.all().enumerate().filter(|(new_id, _)| !found.contains(new_id)).collect();
    let known: Vec<String> = categories.iter().filter_map(|category| category.get("name")).collect();
    let shown = unknown.iter().take(SHOWN).map(|(new_id, name)| {
        let similar = nearest(name, known.iter().map(String::as_str)).map_or_else(String::new, |near| format!(", did you mean `{near}`?"));
        format!("`{name}` ({}){similar}", places[*new_id])
    });
    let more = (unknown.len() > SHOWN).then(|| format!("and {} more", unknown.len() - SHOWN));
    let words = format!("the class list has names that no category has: {}", shown.chain(more).collect::<Vec<_>>().join("; "));
    (!unknown.is_empty()).then_some(words)
}

/// The category lists of an image of LVIS with new ids, in their order.
fn renumbered(image: &Fields<'_>, new_ids: &BTreeMap<u64, usize>) -> Result<Vec<(&'static str, String)>, String> {
    let place = || image.raw("id").map_or_else(|| "an image without id".into(), |id| format!("image {id}"));
    let mut lists = Vec::new();
    for key in ["neg_category_ids", "not_exhaustive_category_ids"] {
        let Some(raw) = image.raw(key) else { continue };
        let old: Vec<Whole> =
            serde_json::from_str(raw.get()).map_err(|error| format!("{}: {key}: {}", place(), plainly(&error.to_string())))?;
        let new_id = |Whole(id): &Whole| {
            new_ids.get(id).copied().ok_or_else(|| format!("{}: {key} names category {id}, which is not a listed one", place()))
        };
        let new = old.iter().map(new_id).collect::<Result<Vec<usize>, String>>()?;
        lists.push((key, serde_json::to_string(&new).expect("BUG: a list of numbers is plain JSON")));
    }
    Ok(lists)
}

fn separate(out: &mut impl Write, place: usize) -> io::Result<()> {
    if place > 0 { out.write_all(b",") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;
    use crate::{
        annotations::{Annotation, Annotations},
        evaluate::{Detection, IouType, Metric, Protocol, tests::evaluate},
    };

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/split").join(name)
    }

    fn classes() -> ClassSplit {
        ClassSplit { base: vec!["owl".into(), "wren".into()], novel: vec!["heron".into(), "crane".into()] }
    }

    fn split(input: &str, classes: &ClassSplit, filter: LabelFilter) -> Result<String> {
        let mut out = Vec::new();
        write_split(&fs::read(golden(input)).unwrap(), &golden(input), classes, filter, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// make.py builds the same files with pycocotools' index and Python's json, and states the rule in twenty lines.
    #[test]
    fn every_file_is_equal_to_the_one_that_python_writes() {
        for (input, name) in [("coco.json", "coco"), ("lvis.json", "lvis")] {
            for (filter, suffix) in [(LabelFilter::All, "all"), (LabelFilter::Base, "base"), (LabelFilter::AllAnnotated, "all-annotated")] {
                let expected = fs::read_to_string(golden(&format!("{name}.{suffix}.json"))).unwrap();
                assert_eq!(split(input, &classes(), filter).unwrap(), expected, "{name} {suffix}");
            }
        }
    }

    #[test]
    fn a_listed_class_that_is_not_there_is_named() {
        let classes = ClassSplit { novel: vec!["heron".into(), "cranes".into()], ..classes() };
        let error = split("coco.json", &classes, LabelFilter::All).unwrap_err().to_string();
        assert!(
            error.ends_with("coco.json: the class list has names that no category has: `cranes` (novel[1]), did you mean `crane`?"),
            "{error}"
        );
    }

    #[test]
    fn a_class_of_lvis_that_is_not_listed_is_an_error() {
        let classes = ClassSplit { novel: vec!["heron".into()], ..classes() };
        let error = split("lvis.json", &classes, LabelFilter::All).unwrap_err().to_string();
        assert!(error.contains("`crane` (id 40) is not in the class list"), "{error}");
    }

    /// Writes `{images, annotations, categories}` of one owl, with changes, and splits it.
    fn split_of(images: &str, annotation_id: u64, categories: &str) -> Result<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let annotations = format!(r#"[{{"id": {annotation_id}, "image_id": 1, "category_id": 5}}]"#);
        write!(file, r#"{{"images": {images}, "annotations": {annotations}, "categories": {categories}}}"#).unwrap();
        let mut out = Vec::new();
        let owls = ClassSplit { base: vec!["owl".into()], novel: vec![] };
        write_split(&fs::read(file.path()).unwrap(), file.path(), &owls, LabelFilter::All, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    const OWL: &str = r#"[{"id": 5, "name": "owl"}]"#;

    #[test]
    fn what_cannot_be_renumbered_is_named() {
        let cases = [
            (
                split_of(r#"[{"id": 1, "neg_category_ids": [5, 6]}]"#, 1, OWL),
                "image 1: neg_category_ids names category 6, which is not a listed one",
            ),
            (
                split_of(r#"[{"id": 1}]"#, 1, r#"[{"id": 5, "name": "owl"}, {"id": 6, "name": "owl"}]"#),
                "categories: a second category named `owl` (id 6)",
            ),
        ];
        for (result, words) in cases {
            let error = result.unwrap_err().to_string();
            assert!(error.ends_with(words), "{error}");
        }
        let ill_typed = split_of(r#"[{"id": 1, "neg_category_ids": ["owl"]}]"#, 1, OWL).unwrap_err().to_string();
        assert!(ill_typed.contains("image 1: neg_category_ids: expected a whole number of 0 or more, found the text"), "{ill_typed}");
    }

    #[test]
    fn numbers_and_unknown_fields_keep_their_tokens() {
        let written =
            split_of(r#"[{"id": 1, "x": 1.50e+3, "y": {"b": 0.10000000000000001, "a": null}, "\u007a": 12345678901234567890123}]"#, 7, OWL);
        let expected = r#"{"categories":[{"id":0,"name":"owl"}],"annotations":[{"id":7,"image_id":1,"category_id":0}],"images":[{"id":1,"x":1.50e+3,"y":{"b":0.10000000000000001,"a":null},"z":12345678901234567890123}]}"#;
        assert_eq!(written.unwrap(), expected);
    }

    #[test]
    fn ids_sizes_and_flags_become_plain_numbers() {
        let json = "\u{feff}{\"images\": [{\"id\": \"1\", \"width\": 64.0, \"height\": 48}], \"categories\": [{\"id\": 5.0, \"name\": \"owl\"}], \
            \"annotations\": [{\"id\": 0, \"image_id\": 1.0, \"category_id\": \"5\", \"iscrowd\": true, \"x\": 1.50}, \
            {\"id\": \"2\", \"image_id\": 1, \"category_id\": 5, \"iscrowd\": false}]}";
        let mut out = Vec::new();
        let owls = ClassSplit { base: vec!["owl".into()], novel: vec![] };
        write_split(json.as_bytes(), Path::new("a.json"), &owls, LabelFilter::AllAnnotated, &mut out).unwrap();
        let expected = r#"{"categories":[{"id":0,"name":"owl"}],"annotations":[{"id":0,"image_id":1,"category_id":0,"iscrowd":1,"x":1.50},{"id":2,"image_id":1,"category_id":0,"iscrowd":0}],"images":[{"id":1,"width":64,"height":48}]}"#;
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    /// Objects365, as a data set of one's own, has more categories than the class file lists, ids with gaps, and fields that COCO has not.
    #[test]
    fn a_class_file_of_one_s_own_splits_any_json_in_coco_s_form() {
        let json = br#"{"licenses": [], "images": [{"id": 420917, "width": 40, "height": 30, "file_name": "images/v1/patch8/a.jpg", "url": ""},
            {"id": 7, "width": 40, "height": 30, "file_name": "b.jpg"}],
            "annotations": [{"id": 1, "image_id": 420917, "category_id": 365, "bbox": [1, 2, 3, 4], "area": 12, "isfake": 0, "isreflected": 1},
            {"id": 2, "image_id": 420917, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12},
            {"id": 3, "image_id": 7, "category_id": 211, "bbox": [1, 2, 3, 4], "area": 12}],
            "categories": [{"id": 3, "name": "Other Shoes"}, {"id": 211, "name": "Kite"}, {"id": 365, "name": "Table Tennis"}]}"#;
        let classes: ClassSplit = serde_json::from_str(r#"{"base": ["Table Tennis"], "novel": ["Kite"]}"#).unwrap();
        let split = |filter| {
            let mut out = Vec::new();
            let counts = write_split(json, Path::new("objects365.json"), &classes, filter, &mut out).unwrap();
            (counts, String::from_utf8(out).unwrap())
        };
        let (counts, written) = split(LabelFilter::Base);
        let expected = Counts { images: 2, annotations: 1, unlisted_categories: 1, unlisted_annotations: 1 };
        assert_eq!(counts, expected);
        assert!(written.contains(r#""categories":[{"id":0,"name":"Table Tennis"},{"id":1,"name":"Kite"}]"#), "{written}");
        assert!(written.contains(r#""category_id":0,"bbox":[1,2,3,4],"area":12,"isfake":0,"isreflected":1}],"#), "{written}");
        assert_eq!(split(LabelFilter::AllAnnotated).0, Counts { annotations: 2, ..expected });
    }

    /// make.py asserts the same of lvis-api on the same files.
    #[test]
    fn renumbering_does_not_change_what_lvis_evaluation_says() {
        let groups = |input: &Path| {
            let annotations = Annotations::load(input).unwrap();
            let detection = |annotation: &Annotation| Detection {
                image_id: annotation.image_id,
                category_id: annotation.category_id,
                xyxy: annotation.xyxy,
                score: 0.5,
                mask: None,
            };
            let detections: Vec<Detection> = annotations.annotations.iter().map(detection).collect();
            evaluate(Protocol::Lvis, IouType::Boxes, &annotations, &detections, &classes()).unwrap().groups
        };
        let (original, renumbered) = (groups(&golden("lvis.json")), groups(&golden("lvis.all.json")));
        assert_eq!(original, renumbered);
        let ap = |group: &str| renumbered[group].get(Metric::AP).map(|ap| (1e9 * ap).round() / 1e9);
        assert_eq!((ap("all"), ap("rare"), ap("common"), ap("frequent")), (Some(1.0), Some(1.0), Some(1.0), Some(1.0)));
    }

    #[test]
    fn spaces_go_but_not_those_in_text() {
        let mut out = Vec::new();
        write_compact(&mut out, "{ \"a b\" : [1.50 , \"\\\" c\\\\\" ] }").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "{\"a b\":[1.50,\"\\\" c\\\\\"]}");
    }
}
