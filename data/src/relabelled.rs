//! Annotation files in which some objects have another class: everything else keeps its tokens, spaces too.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    Error, Result,
    annotations::{AnnotationId, CategoryId},
    json::{self, Whole},
    words::plainly,
};

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow)]
    annotations: Vec<Object<'a>>,
}

#[derive(Deserialize)]
struct Object<'a> {
    id: Whole,
    #[serde(borrow)]
    category_id: &'a RawValue,
}

/// Writes an annotation file with these classes for these objects. Objects that the file lacks are left out. `path` is for the message.
pub fn write_relabelled(json: &[u8], path: &Path, classes: &BTreeMap<AnnotationId, CategoryId>, out: &mut impl Write) -> Result<()> {
    let json = json::without_mark(json);
    let Parts { annotations } = serde_json::from_slice(json).map_err(|error| Error::Malformed {
        path: path.to_owned(),
        problem: plainly(&error.to_string()),
        hint: Some("check that the download is complete and that this is an `instances` or `lvis_v1` json".into()),
    })?;
    let mut write = || -> io::Result<()> {
        let mut written = 0;
        for Object { id, category_id } in &annotations {
            let Some(class) = classes.get(&AnnotationId(id.0)) else { continue };
            // What serde borrowed is a part of the file.
            let start = category_id.get().as_ptr().addr() - json.as_ptr().addr();
            out.write_all(&json[written..start])?;
            write!(out, "{}", class.0)?;
            written = start + category_id.get().len();
        }
        out.write_all(&json[written..])
    };
    write().map_err(|source| Error::Write { what: "annotations with other classes", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relabelled(json: &str, classes: &[(u64, u64)]) -> Result<String> {
        let classes = classes.iter().map(|(id, class)| (AnnotationId(*id), CategoryId(*class))).collect();
        let mut out = Vec::new();
        write_relabelled(json.as_bytes(), Path::new("train.json"), &classes, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// B1 of CORA's specification.
    #[test]
    fn only_the_classes_change() {
        let json = r#"{"info": 1.50e+3, "annotations": [{"id": 11, "category_id" : 1,"bbox":[1.50,2]},{"category_id":2,"id":12}, {"id": 15,"category_id":3 }] }"#;
        let expected = r#"{"info": 1.50e+3, "annotations": [{"id": 11, "category_id" : 300,"bbox":[1.50,2]},{"category_id":1,"id":12}, {"id": 15,"category_id":3 }] }"#;
        assert_eq!(relabelled(json, &[(11, 300), (12, 1), (99, 4)]).unwrap(), expected);
        assert_eq!(relabelled(json, &[]).unwrap(), json);
        assert_eq!(relabelled(expected, &[(11, 300), (12, 1)]).unwrap(), expected);
    }

    #[test]
    fn what_is_no_annotation_file_is_named() {
        for (json, words) in [(r#"{"images": []}"#, "annotations"), (r#"{"annotations": [{"id": 4}]}"#, "category_id")] {
            let error = relabelled(json, &[(1, 1)]).unwrap_err().to_string();
            assert!(error.contains("train.json") && error.contains(words), "{error}");
        }
    }
}
