//! The concepts of RALF's augmenter, `v3det_gpt_noun_chunk_lvis_strict.pkl`, and the regions that it trains on,
//! `lvis_oake_info_strict.pkl`. (RALF, sections 1 and 8.)
//!
//! Both are archives of `torch.save`. Concepts are `{'all_noun_chunks': {'text_features': [N, E]}}`, to which this program adds `names`.
//! The regions are a dict of lists over images: `img_ids`, `img_idx_to_cat_id` (the pseudo label of each region), `img_idx_to_filter_idx`
//! (which rows of the image's features survived), and of one tensor, `v3det_coco_lvis_gt_cat_txt_feats` `[C, E]`.
//!
//! DetPro keeps what it learns prompts from as a tuple of tensors: see [`CollectedRegions`].

use std::{collections::BTreeMap, io, path::Path};

use half::f16;
use ovenbird_pickle::Value;
use tch::Kind;

use super::{Array, Saved, keys, torch::opened, write_torch};
use crate::Result;

const CHUNKS: &str = "all_noun_chunks";
const FEATURES: &str = "text_features";
const NAMES: &str = "names";
const CLASSES: &str = "v3det_coco_lvis_gt_cat_txt_feats";
const LISTS: [&str; 3] = ["img_ids", "img_idx_to_cat_id", "img_idx_to_filter_idx"];

/// Phrases that may say what a region shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concepts {
    /// Of the phrases: f16 or f32 `[N, E]`, finite, of any norm.
    pub features: Array,
    /// The phrases, if the file has them; published files do not.
    pub names: Option<Vec<String>>,
}

impl Concepts {
    /// Reads a file of RALF; tensors of any device are read on the CPU.
    pub fn read(path: &Path) -> Result<Self> {
        let (value, mut tensors) = opened(path)?;
        let malformed = |problem: String| {
            file_error(path, problem, "give the `v3det_gpt_noun_chunk_*_strict.pkl` of RALF, or what this program exported")
        };
        let chunks = value.get(CHUNKS).ok_or_else(|| malformed(format!("expected `{CHUNKS}` in a dict, found {}", keys(&value))))?;
        let features =
            chunks.get(FEATURES).ok_or_else(|| malformed(format!("{CHUNKS}: expected `{FEATURES}` in a dict, found {}", keys(chunks))))?;
        let what = format!("{CHUNKS}.{FEATURES}");
        let features =
            tensors.array(&what, features)?.ok_or_else(|| malformed(format!("{what}: expected a tensor, found {}", features.kind())))?;
        check_rows(&what, &features).map_err(malformed)?;
        let texts = |names: &Value| names.as_items()?.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>();
        let names = match chunks.get(NAMES) {
            None => None,
            Some(names) => {
                let names = texts(names).filter(|names| names.len() as i64 == features.shape[0]);
                Some(names.ok_or_else(|| {
                    malformed(format!("{CHUNKS}.{NAMES}: expected {} texts, one for each row of {FEATURES}", features.shape[0]))
                })?)
            }
        };
        Ok(Self { features, names })
    }

    /// Writes a file for RALF.
    pub fn write(&self, out: impl io::Write) -> io::Result<()> {
        let names = self.names.iter().map(|names| (NAMES.to_owned(), Saved::List(names.iter().cloned().map(Saved::Text).collect())));
        let chunks = names.chain([(FEATURES.to_owned(), Saved::Array(&self.features))]).collect();
        write_torch(&Saved::Dict(BTreeMap::from([(CHUNKS.to_owned(), Saved::Dict(chunks))])), out)
    }
}

/// The regions of RALF's training, by image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Of each image.
    pub images: Vec<ImageRegions>,
    /// Of the pseudo classes: f16 or f32 `[C, E]`.
    pub classes: Array,
}

/// The regions of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRegions {
    /// The image.
    pub image_id: i64,
    /// The row of each region in the image's features.
    pub rows: Vec<i64>,
    /// The pseudo class of each region.
    pub labels: Vec<i64>,
}

impl RegionInfo {
    /// Reads a cache of RALF.
    pub fn read(path: &Path) -> Result<Self> {
        let (value, mut tensors) = opened(path)?;
        let malformed = |problem: String| file_error(path, problem, "give the `*_oake_info_strict.pkl` that RALF's `raf.py` wrote");
        let list = |name: &str| {
            let list = value.get(name).ok_or_else(|| malformed(format!("expected `{name}` in a dict, found {}", keys(&value))))?;
            list.as_items().ok_or_else(|| malformed(format!("{name}: expected a list over images, found {}", list.kind())))
        };
        let [ids, labels, rows] = [list(LISTS[0])?, list(LISTS[1])?, list(LISTS[2])?];
        if labels.len() != ids.len() || rows.len() != ids.len() {
            let found = [ids.len(), labels.len(), rows.len()];
            return Err(malformed(format!("expected {LISTS:?} of one length, found {found:?}")));
        }
        let classes = value.get(CLASSES).ok_or_else(|| malformed(format!("expected `{CLASSES}` in a dict, found {}", keys(&value))))?;
        let classes =
            tensors.array(CLASSES, classes)?.ok_or_else(|| malformed(format!("{CLASSES}: expected a tensor, found {}", classes.kind())))?;
        check_rows(CLASSES, &classes).map_err(malformed)?;
        let mut images = Vec::new();
        for (place, id) in ids.iter().enumerate() {
            let id = id.as_int().or_else(|| id.as_str()?.parse().ok());
            let image_id =
                id.ok_or_else(|| malformed(format!("{}, image {place}: expected an id, found {}", LISTS[0], ids[place].kind())))?;
            let mut numbers = |name: &str, value: &Value| {
                let what = format!("{name}, image {place}");
                let found = match tensors.array(&what, value)? {
                    Some(Array { kind: Kind::Int64, shape, bytes }) if shape.len() == 1 => Some(integers(&bytes)),
                    Some(_) => None,
                    None => value.as_items().and_then(|items| items.iter().map(Value::as_int).collect()),
                };
                found.ok_or_else(|| malformed(format!("{what}: expected whole numbers [N], found {}", value.kind())))
            };
            let (labels, rows) = (numbers(LISTS[1], &labels[place])?, numbers(LISTS[2], &rows[place])?);
            if labels.len() != rows.len() {
                let problem =
                    format!("image {image_id}: expected a label for each row, found {} labels and {} rows", labels.len(), rows.len());
                return Err(malformed(problem));
            }
            if let Some(label) = labels.iter().find(|label| !(0..classes.shape[0]).contains(*label)) {
                return Err(malformed(format!("image {image_id}: expected labels from 0 to below {}, found {label}", classes.shape[0])));
            }
            images.push(ImageRegions { image_id, rows, labels });
        }
        Ok(Self { images, classes })
    }
}

/// Regions that DetPro collects to learn prompts from: of an image, `{id:012}.pth`, or of all, `train_data.pth`.
///
/// (DetPro, sections 1 and 3.1.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectedRegions {
    /// f32 `[N, E]`.
    pub features: Array,
    /// The class of each region, or -1.
    pub labels: Vec<i64>,
    /// The largest IoU of each region with a ground truth, f32 `[N]`.
    pub ious: Array,
}

impl CollectedRegions {
    /// Reads a tuple of DetPro. Where there are fewer IoUs than labels, the others are 1, as DetPro's `gather` fills them: ground truth
    /// stands last.
    pub fn read(path: &Path) -> Result<Self> {
        let (value, mut tensors) = opened(path)?;
        let malformed = |problem: String| file_error(path, problem, "give what DetPro collects: a tuple of features, labels and IoUs");
        let Some([features, labels, ious]) = value.as_items() else {
            let n_items = value.as_items().map_or_else(|| value.kind(), |items| format!("{} of {} items", value.kind(), items.len()));
            return Err(malformed(format!("expected a tuple of features, labels and IoUs, found {n_items}")));
        };
        let mut array = |name: &str, value: &Value, kind: Kind, n_axes: usize| {
            let array =
                tensors.array(name, value)?.ok_or_else(|| malformed(format!("{name}: expected a tensor, found {}", value.kind())))?;
            if array.kind == kind && array.shape.len() == n_axes {
                return Ok(array);
            }
            let axes = if n_axes == 2 { "[N, E]" } else { "[N]" };
            Err(malformed(format!("{name}: expected {kind:?} {axes}, found {:?} {:?}", array.kind, array.shape)))
        };
        let features = array("features", features, Kind::Float, 2)?;
        let labels = integers(&array("labels", labels, Kind::Int64, 1)?.bytes);
        let mut ious = array("ious", ious, Kind::Float, 1)?;
        let n_regions = features.shape[0];
        if labels.len() as i64 != n_regions || ious.shape[0] > n_regions {
            let problem =
                format!("expected as many labels and IoUs as features, found {}, {} and {n_regions}", labels.len(), ious.shape[0]);
            return Err(malformed(problem));
        }
        (ious.shape[0]..n_regions).for_each(|_| ious.bytes.extend(1_f32.to_le_bytes()));
        ious.shape[0] = n_regions;
        if let Some((row, number)) = not_finite(&features).or_else(|| not_finite(&ious)) {
            return Err(malformed(format!("row {row}: expected finite numbers, found {number}")));
        }
        Ok(Self { features, labels, ious })
    }
}

fn file_error(path: &Path, problem: String, hint: &str) -> crate::Error {
    crate::Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) }
}

fn integers(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

/// Fails unless the array is f16 or f32 `[N, E]`, N and E at least 1, of finite numbers.
fn check_rows(what: &str, array: &Array) -> Result<(), String> {
    let Array { kind, shape, .. } = array;
    if !matches!(kind, Kind::Half | Kind::Float) || shape.len() != 2 || shape.contains(&0) {
        return Err(format!("{what}: expected Half or Float [N, E], found {kind:?} {shape:?}"));
    }
    match not_finite(array) {
        Some((row, number)) => Err(format!("{what}, row {row}: expected finite numbers, found {number}")),
        None => Ok(()),
    }
}

/// The first number that is not finite, and its row; only of f16 and f32.
fn not_finite(Array { kind, shape, bytes }: &Array) -> Option<(usize, f32)> {
    let numbers: Box<dyn Iterator<Item = f32> + '_> = match kind {
        Kind::Half => Box::new(bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32())),
        _ => Box::new(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
    };
    let row_length = shape[1..].iter().product::<i64>().max(1) as usize;
    numbers.enumerate().find(|(_, number)| !number.is_finite()).map(|(place, number)| (place / row_length, number))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tempfile::NamedTempFile;

    use super::*;
    use crate::{
        Error,
        checkpoint::{Checkpoint, torch::write_pickled},
    };

    fn floats(shape: &[i64], first: f32) -> Array {
        let n = shape.iter().product::<i64>();
        let bytes = (0..n).flat_map(|i| (first + i as f32 / 8.0).to_le_bytes()).collect();
        Array { kind: Kind::Float, shape: shape.to_vec(), bytes }
    }

    fn longs(numbers: &[i64]) -> Array {
        Array {
            kind: Kind::Int64,
            shape: vec![numbers.len() as i64],
            bytes: numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        }
    }

    fn file(write: impl FnOnce(&mut NamedTempFile) -> io::Result<()>) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        write(&mut file).unwrap();
        file
    }

    fn saved(value: &Saved<'_>) -> NamedTempFile {
        file(|file| write_torch(value, file))
    }

    fn dict<'a>(entries: impl IntoIterator<Item = (&'a str, Saved<'a>)>) -> Saved<'a> {
        Saved::Dict(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    fn problem<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(Error::Malformed { problem, hint: Some(_), .. }) => problem,
            other => panic!("expected a malformed file, found {other:?}"),
        }
    }

    #[test]
    fn concepts_that_are_written_are_read_back() {
        for names in [None, Some(["worn on the feet", "café"].map(String::from).to_vec())] {
            let concepts = Concepts { features: floats(&[2, 3], -1.0), names };
            let file = file(|file| concepts.write(file));
            assert_eq!(Concepts::read(file.path()).unwrap(), concepts);
            // The nesting that RALF's readers expect.
            let checkpoint = Checkpoint::open(file.path()).unwrap();
            assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["all_noun_chunks.text_features"]);
        }
        let halves = Array { kind: Kind::Half, shape: vec![1, 2], bytes: vec![0, 0x3c, 0, 0xb8] };
        let concepts = Concepts { features: halves, names: None };
        assert_eq!(Concepts::read(file(|file| concepts.write(file)).path()).unwrap(), concepts);
    }

    /// What torch saves of a tensor on a GPU names the device of its storage.
    #[test]
    fn tensors_of_a_gpu_are_read_on_the_cpu() {
        let concepts = Concepts { features: floats(&[2, 3], -1.0), names: None };
        let written = std::fs::read(file(|file| concepts.write(file)).path()).unwrap();
        let mut from = zip::ZipArchive::new(io::Cursor::new(written)).unwrap();
        let mut to = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        for place in 0..from.len() {
            let mut entry = from.by_index(place).unwrap();
            let mut bytes = Vec::new();
            io::copy(&mut entry, &mut bytes).unwrap();
            if entry.name().ends_with("data.pkl") {
                let at = bytes.windows(8).position(|window| window == b"X\x03\0\0\0cpu").unwrap();
                bytes.splice(at..at + 8, *b"X\x06\0\0\0cuda:1");
            }
            to.start_file(entry.name(), zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored))
                .unwrap();
            to.write_all(&bytes).unwrap();
        }
        let bytes = to.finish().unwrap().into_inner();
        assert!(bytes.windows(6).any(|window| window == b"cuda:1"));
        let file = file(|file| file.write_all(&bytes));
        assert_eq!(Concepts::read(file.path()).unwrap(), concepts);
        assert_eq!(crate::checkpoint::arrays_in(&bytes, file.path()).unwrap()["all_noun_chunks.text_features"], concepts.features);
    }

    #[test]
    fn what_is_no_file_of_concepts_is_named() {
        let (features, flat, whole) = (floats(&[2, 3], 0.0), floats(&[6], 0.0), longs(&[1, 2]));
        let mut nan = floats(&[2, 3], 0.0);
        nan.bytes[16..20].copy_from_slice(&f32::NAN.to_le_bytes());
        let refused = |chunks: Saved<'_>, expected: &str| {
            let found = problem(Concepts::read(saved(&dict([(CHUNKS, chunks)])).path()));
            assert_eq!(found, expected);
        };
        refused(
            dict([("features", Saved::Array(&features))]),
            "all_noun_chunks: expected `text_features` in a dict, found a dict with the keys [\"features\"]",
        );
        refused(dict([(FEATURES, Saved::Text("a".into()))]), "all_noun_chunks.text_features: expected a tensor, found text");
        refused(dict([(FEATURES, Saved::Array(&flat))]), "all_noun_chunks.text_features: expected Half or Float [N, E], found Float [6]");
        refused(dict([(FEATURES, Saved::Array(&whole))]), "all_noun_chunks.text_features: expected Half or Float [N, E], found Int64 [2]");
        refused(dict([(FEATURES, Saved::Array(&nan))]), "all_noun_chunks.text_features, row 1: expected finite numbers, found NaN");
        let names = Saved::List(vec![Saved::Text("one".into())]);
        refused(
            dict([(FEATURES, Saved::Array(&features)), (NAMES, names)]),
            "all_noun_chunks.names: expected 2 texts, one for each row of text_features",
        );
        let other = problem(Concepts::read(saved(&dict([("a", Saved::Array(&features))])).path()));
        assert_eq!(other, "expected `all_noun_chunks` in a dict, found a dict with the keys [\"a\"]");
        let page = problem(Concepts::read(file(|file| file.write_all(b"<html>")).path()));
        assert!(page.ends_with("found a web page"), "{page}");
    }

    fn info<'a>(ids: Saved<'a>, labels: Saved<'a>, rows: Saved<'a>, classes: &'a Array) -> NamedTempFile {
        saved(&dict([(LISTS[0], ids), (LISTS[1], labels), (LISTS[2], rows), (CLASSES, Saved::Array(classes))]))
    }

    #[test]
    fn regions_of_ralf_are_read_whether_their_rows_are_lists_or_tensors() {
        let (classes, first, second) = (floats(&[4, 2], 1.0), longs(&[3, 0]), longs(&[]));
        let labels = || Saved::List(vec![Saved::Array(&first), Saved::Array(&second)]);
        let ids = || Saved::List(vec![Saved::Integer(9), Saved::Text("000000000004".into())]);
        let rows = Saved::List(vec![Saved::List(vec![Saved::Integer(5), Saved::Integer(7)]), Saved::List(Vec::new())]);
        let expected = RegionInfo {
            images: vec![
                ImageRegions { image_id: 9, rows: vec![5, 7], labels: vec![3, 0] },
                ImageRegions { image_id: 4, rows: vec![], labels: vec![] },
            ],
            classes: classes.clone(),
        };
        assert_eq!(RegionInfo::read(info(ids(), labels(), rows, &classes).path()).unwrap(), expected);
        let tensor = longs(&[5, 7]);
        let rows = Saved::List(vec![Saved::Array(&tensor), Saved::Array(&second)]);
        assert_eq!(RegionInfo::read(info(ids(), labels(), rows, &classes).path()).unwrap(), expected);

        let refused = |ids: Saved<'_>, labels: &[i64], rows: &[i64], expected: &str| {
            let (labels, rows) = (longs(labels), longs(rows));
            let (labels, rows) = (Saved::List(vec![Saved::Array(&labels)]), Saved::List(vec![Saved::Array(&rows)]));
            assert_eq!(problem(RegionInfo::read(info(ids, labels, rows, &classes).path())), expected);
        };
        let one = || Saved::List(vec![Saved::Integer(9)]);
        refused(ids(), &[0], &[0], &format!("expected {LISTS:?} of one length, found [2, 1, 1]"));
        refused(one(), &[0, 1], &[0], "image 9: expected a label for each row, found 2 labels and 1 rows");
        refused(one(), &[4], &[0], "image 9: expected labels from 0 to below 4, found 4");
        refused(Saved::List(vec![Saved::Nothing]), &[0], &[0], "img_ids, image 0: expected an id, found None");
        refused(Saved::Integer(9), &[0], &[0], "img_ids: expected a list over images, found an integer");
    }

    /// An archive of `torch.save((features, labels, ious), path)`.
    fn tuple(arrays: &[&Array]) -> NamedTempFile {
        let list = saved(&Saved::List(arrays.iter().copied().map(Saved::Array).collect()));
        // `write_torch` writes lists; a tuple has a mark at its beginning and another end.
        let mut zip = zip::ZipArchive::new(list.reopen().unwrap()).unwrap();
        let mut entry = |name: &str| {
            let mut bytes = Vec::new();
            io::copy(&mut zip.by_name(&format!("archive/{name}")).unwrap(), &mut bytes).unwrap();
            bytes
        };
        let pickle = entry("data.pkl");
        let inner = pickle.strip_prefix(b"\x80\x02](").unwrap().strip_suffix(b"e.").unwrap();
        let storages: Vec<Vec<u8>> = (0..arrays.len()).map(|key| entry(&format!("data/{key}"))).collect();
        file(|file| {
            write_pickled(file, 1 << 20, |out| {
                out.write_all(&[b"\x80\x02(", inner, b"t."].concat())?;
                for (key, storage) in storages.iter().enumerate() {
                    out.start_file(
                        format!("archive/data/{key}"),
                        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored),
                    )?;
                    out.write_all(storage)?;
                }
                Ok(())
            })
        })
    }

    #[test]
    fn a_tuple_of_tensors_is_read() {
        let (features, labels, ious) = (floats(&[3, 2], 0.5), longs(&[7, -1, 1202]), floats(&[3], 0.25));
        let expected = CollectedRegions { features: features.clone(), labels: vec![7, -1, 1202], ious: ious.clone() };
        let written = tuple(&[&features, &labels, &ious]);
        assert_eq!(CollectedRegions::read(written.path()).unwrap(), expected);
        // As DetPro's `gather` fills them.
        let short = CollectedRegions::read(tuple(&[&features, &labels, &floats(&[2], 0.25)]).path()).unwrap();
        assert_eq!(short.ious, Array { bytes: [0.25_f32, 0.375, 1.0].into_iter().flat_map(f32::to_le_bytes).collect(), ..ious.clone() });

        let refused = |arrays: &[&Array], expected: &str| assert_eq!(problem(CollectedRegions::read(tuple(arrays).path())), expected);
        refused(&[&features, &labels], "expected a tuple of features, labels and IoUs, found a tuple of 2 items");
        refused(&[&features, &ious, &ious], "labels: expected Int64 [N], found Float [3]");
        refused(&[&ious, &labels, &ious], "features: expected Float [N, E], found Float [3]");
        refused(&[&features, &longs(&[1]), &ious], "expected as many labels and IoUs as features, found 1, 3 and 3");
        refused(&[&features, &labels, &floats(&[4], 0.0)], "expected as many labels and IoUs as features, found 3, 4 and 3");
        refused(&[&features, &labels, &floats(&[1], f32::INFINITY)], "row 0: expected finite numbers, found inf");
        let bare = problem(CollectedRegions::read(saved(&Saved::Array(&features)).path()));
        assert_eq!(bare, "expected a tuple of features, labels and IoUs, found an object of torch._utils._rebuild_tensor_v2");
    }
}
