//! The images of a list of proposals, as LP-OVOD keeps them beside it.
//!
//! A json object with two kinds of keys: `"<image id>"`, whose value is the place of the image's entry in the list, from 0 on; and
//! `"num_proposal"`, the number of boxes of every entry, in the list's order. (LP-OVOD, section 1.)

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value};

use super::{Entries, ImageName, Proposal};
use crate::{
    Error, Result,
    annotations::{ImageId, ImageInfo},
    json,
};

/// The key of the counts.
const COUNTS: &str = "num_proposal";

/// Which entry of a list of proposals is of which image, and how many boxes each entry has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// The place of each image's entry. Entries may be of no image that is known.
    pub places: BTreeMap<ImageId, usize>,
    /// The number of boxes of each entry, in the list's order.
    pub counts: Vec<u64>,
}

impl IdMap {
    /// Of a list with one entry for each of these images, in their order.
    pub fn in_order(images: &[&ImageInfo], entries: &[impl AsRef<[Proposal]>]) -> Self {
        let places = images.iter().enumerate().map(|(place, image)| (image.id, place)).collect();
        Self { places, counts: entries.iter().map(|entry| entry.as_ref().len() as u64).collect() }
    }

    /// Reads the json; `path` is for the message.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let malformed = |problem: String| Error::Malformed {
            path: path.to_owned(),
            problem,
            hint: Some(format!("give an object that maps image ids to places in the list, with the numbers of boxes under `{COUNTS}`")),
        };
        let mut object: Map<String, Value> = json::parse(bytes).map_err(|fault| malformed(fault.to_string()))?;
        let counts = object.remove(COUNTS).ok_or_else(|| malformed(format!("expected the key `{COUNTS}`, found none")))?;
        let counts: Vec<u64> =
            serde_json::from_value(counts).map_err(|_| malformed(format!("{COUNTS}: expected a list of whole numbers from 0 on")))?;
        let (mut places, mut taken) = (BTreeMap::new(), BTreeSet::new());
        for (id, place) in object {
            let image = id.parse().map_err(|_| malformed(format!("expected image ids as keys, found `{id}`")))?;
            let place = place.as_u64().and_then(|place| usize::try_from(place).ok()).filter(|place| *place < counts.len());
            let place = place.ok_or_else(|| malformed(format!("{id}: expected a place from 0 to below {}", counts.len())))?;
            if !taken.insert(place) {
                return Err(malformed(format!("{id}: another image has place {place} already")));
            }
            places.insert(ImageId(image), place);
        }
        Ok(Self { places, counts })
    }

    /// The json, images in ascending id.
    pub fn to_json(&self) -> Vec<u8> {
        let places = self.places.iter().map(|(image, place)| (image.to_string(), Value::from(*place)));
        let object: Map<String, Value> = places.chain([(COUNTS.to_owned(), Value::from(self.counts.clone()))]).collect();
        serde_json::to_vec(&object).expect("BUG: numbers are plain JSON")
    }

    /// The number of boxes before the first one of every entry, and the number of all.
    pub fn first_rows(&self) -> (Vec<u64>, u64) {
        let mut total = 0;
        let first = |count: &u64| {
            let first = total;
            total += count;
            first
        };
        (self.counts.iter().map(first).collect(), total)
    }

    /// Names the entries of a list. Fails where the list is another one than this describes.
    pub(super) fn name(&self, entries: Vec<Vec<Proposal>>, path: &Path) -> Result<Entries> {
        let malformed = |problem: String| Error::Malformed {
            path: path.to_owned(),
            problem,
            hint: Some("give the id map that was made for this very file of proposals".into()),
        };
        if entries.len() != self.counts.len() {
            return Err(malformed(format!("proposals of {} images, but the id map has {} of them", entries.len(), self.counts.len())));
        }
        let differs = entries.iter().zip(&self.counts).position(|(entry, count)| entry.len() as u64 != *count);
        if let Some(place) = differs {
            let (n, count) = (entries[place].len(), self.counts[place]);
            return Err(malformed(format!("entry {place} has {n} boxes, but the id map says {count}")));
        }
        let images: BTreeMap<usize, ImageId> = self.places.iter().map(|(image, place)| (*place, *image)).collect();
        let name = |(place, entry): (usize, Vec<Proposal>)| match images.get(&place).and_then(|image| i64::try_from(image.0).ok()) {
            Some(id) => (ImageName::Id(id), entry),
            None => (ImageName::Text(format!("entry {place}")), entry),
        };
        Ok(Entries::Named(entries.into_iter().enumerate().map(name).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_map_comes_back_as_it_was_written() {
        let map = IdMap { places: [(ImageId(139), 1), (ImageId(25), 0)].into(), counts: vec![3, 0, 7] };
        assert_eq!(IdMap::parse(&map.to_json(), Path::new("map.json")).unwrap(), map);
        assert_eq!(map.first_rows(), (vec![0, 3, 3], 10));
    }

    #[test]
    fn what_is_wrong_with_an_id_map_is_named() {
        for (json, expected) in [
            (r#"{"1": 0}"#, "expected the key `num_proposal`, found none"),
            (r#"{"1": 0, "num_proposal": [-1]}"#, "num_proposal: expected a list of whole numbers from 0 on"),
            (r#"{"1": 1, "num_proposal": [4]}"#, "1: expected a place from 0 to below 1"),
            (r#"{"1": 0, "2": 0, "num_proposal": [4]}"#, "2: another image has place 0 already"),
            (r#"{"cat.jpg": 0, "num_proposal": [4]}"#, "expected image ids as keys, found `cat.jpg`"),
        ] {
            let error = IdMap::parse(json.as_bytes(), Path::new("map.json")).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        }
    }

    #[test]
    fn a_list_that_is_another_one_is_refused() {
        let proposal = Proposal { xyxy: [0.0, 0.0, 1.0, 1.0].into(), score: 1.0 };
        let map = IdMap { places: [(ImageId(8), 1), (ImageId(9), 0)].into(), counts: vec![1, 0] };
        let named = map.name(vec![vec![proposal], vec![]], Path::new("p.pkl")).unwrap();
        assert_eq!(named, Entries::Named(vec![(ImageName::Id(9), vec![proposal]), (ImageName::Id(8), vec![])]));
        for (entries, expected) in [
            (vec![vec![proposal]], "proposals of 1 images, but the id map has 2 of them"),
            (vec![vec![], vec![proposal]], "entry 0 has 0 boxes, but the id map says 1"),
        ] {
            let error = map.name(entries, Path::new("p.pkl")).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        }
    }
}
