//! Annotation files with more objects than before: everything that was there keeps its tokens, spaces too.

use std::{
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    Error, Result,
    annotations::{CategoryId, ImageId},
    boxes::{Xyxy, xyxy_to_xywh},
    json::{self, Whole},
    words::plainly,
};

/// An object to add.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Added {
    /// Its image.
    pub image_id: ImageId,
    /// Its class.
    pub category_id: CategoryId,
    /// Its box.
    pub xyxy: Xyxy,
    /// How sure it is, in [0, 1].
    pub score: f32,
}

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow)]
    annotations: &'a RawValue,
}

#[derive(Deserialize)]
struct Numbered {
    id: Whole,
}

/// An object as the file has it.
#[derive(Serialize)]
struct Entry {
    id: u64,
    image_id: ImageId,
    category_id: CategoryId,
    /// x, y, width, height.
    bbox: [f64; 4],
    area: f64,
    iscrowd: u8,
    score: f32,
}

/// Writes an annotation file with some more objects after its own, in the order given, without outlines. Their ids follow the greatest
/// that is there; `area` is that of the box, and `score` tells them from the others. `path` is for the message.
pub fn write_with(json: &[u8], path: &Path, added: &[Added], out: &mut impl Write) -> Result<()> {
    let malformed = |problem: String| Error::Malformed {
        path: path.to_owned(),
        problem,
        hint: Some("check that the download is complete and that this is an `instances` or `lvis_v1` json".into()),
    };
    let json = json::without_mark(json);
    let Parts { annotations } = serde_json::from_slice(json).map_err(|error| malformed(plainly(&error.to_string())))?;
    let numbered: Vec<Numbered> =
        serde_json::from_str(annotations.get()).map_err(|error| malformed(format!("annotations: {}", plainly(&error.to_string()))))?;
    let greatest = numbered.iter().map(|annotation| annotation.id.0).max().unwrap_or(0);
    if greatest.checked_add(added.len() as u64).is_none() {
        return Err(malformed(format!("annotation {greatest}: no id is left after it for {} more", added.len())));
    }
    // What serde borrowed is a part of the file.
    let end = annotations.get().as_ptr().addr() - json.as_ptr().addr() + annotations.get().len() - 1;
    let mut separator: &[u8] = if numbered.is_empty() { b"" } else { b"," };
    let mut write = || -> io::Result<()> {
        out.write_all(&json[..end])?;
        for (id, Added { image_id, category_id, xyxy, score }) in (greatest + 1..).zip(added) {
            let bbox = xyxy_to_xywh(xyxy);
            let [_, _, width, height] = bbox;
            let entry = Entry { id, image_id: *image_id, category_id: *category_id, bbox, area: width * height, iscrowd: 0, score: *score };
            out.write_all(separator)?;
            serde_json::to_writer(&mut *out, &entry)?;
            separator = b",";
        }
        out.write_all(&json[end..])
    };
    write().map_err(|source| Error::Write { what: "annotations with added objects", source })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn with(json: &str, added: &[Added]) -> Result<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(json.as_bytes()).unwrap();
        let mut out = Vec::new();
        write_with(&fs::read(file.path()).unwrap(), file.path(), added, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn added(category_id: u64, corners: [f32; 4]) -> Added {
        Added { image_id: ImageId(9), category_id: CategoryId(category_id), xyxy: Xyxy::from(corners), score: 0.625 }
    }

    #[test]
    fn what_was_there_keeps_its_tokens_and_ids_go_on() {
        let json = r#"{"info": 1.50e+3, "annotations": [{"id": 30, "x": [1, {}]}, {"id":7}] , "images": [ ]}"#;
        let expected = r#"{"info": 1.50e+3, "annotations": [{"id": 30, "x": [1, {}]}, {"id":7},{"id":31,"image_id":9,"category_id":2,"bbox":[1.5,2.0,3.0,4.25],"area":12.75,"iscrowd":0,"score":0.625},{"id":32,"image_id":9,"category_id":0,"bbox":[0.0,0.0,1.0,1.0],"area":1.0,"iscrowd":0,"score":0.625}] , "images": [ ]}"#;
        assert_eq!(with(json, &[added(2, [1.5, 2.0, 4.5, 6.25]), added(0, [0.0, 0.0, 1.0, 1.0])]).unwrap(), expected);
        assert_eq!(with(json, &[]).unwrap(), json);
    }

    #[test]
    fn the_first_objects_of_a_file_are_numbered_from_one() {
        let written = with(r#"{"annotations":[ ]}"#, &[added(2, [0.0, 0.0, 1.0, 1.0])]).unwrap();
        assert!(written.starts_with(r#"{"annotations":[ {"id":1,"#) && written.ends_with("0.625}]}"), "{written}");
    }

    #[test]
    fn what_cannot_be_added_to_is_named() {
        let cases = [
            (r#"{"images":[]}"#, "expected the key `annotations`"),
            (r#"{"annotations":{}}"#, "annotations: expected a list, found an object"),
            (r#"{"annotations":[{"id":18446744073709551615}]}"#, "no id is left after it for 1 more"),
        ];
        for (json, words) in cases {
            let error = with(json, &[added(1, [0.0; 4])]).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
