//! The negative vocabulary of RALF: `neg_feature_lvis.pkl`, `neg_feature_coco.pkl`. (RALF, section 6.3.)
//!
//! An archive of `torch.save` that has no tensors but a dict of numpy arrays in its pickle:
//!
//! | key | type | shape |
//! |---|---|---|
//! | `feat_in` | f16 or f32, unit rows | `[C, E]`: the classes |
//! | `feat_out_sim`, `feat_out_dis` | the same | `[C, M, E]`: the hard and the easy words of each class, then zeros |
//! | `pad_out_sim`, `pad_out_dis` | i64 | `[C]`: how many words each class has |
//!
//! Each word is stored once for every class that lists it, up to 4.9 GB in all. Here it is a row of one table.

use std::{collections::HashMap, io, path::Path};

use half::f16;
use ovenbird_pickle::{NumpyArray, Pieces, Value, write_arrays};
use tch::Kind;

use super::{
    Array, Origin, keys,
    torch::{opened, write_pickled},
};
use crate::Result;

const CLASSES: &str = "feat_in";
const SIMILAR: [&str; 2] = ["feat_out_sim", "pad_out_sim"];
const DISSIMILAR: [&str; 2] = ["feat_out_dis", "pad_out_dis"];
/// The tolerance of unit norms: f16 has three digits.
const NORM_TOLERANCE: f64 = 2e-3;
const AS_WRITTEN: &str = "give what RALF's `feature_gen.py` wrote; arrays must be little-endian and in C order (`numpy.ascontiguousarray`)";

/// The words that each class is compared with, as rows of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NegativeFeatures {
    /// Of the classes: f16 or f32 `[C, E]`, unit norm.
    pub classes: Array,
    /// Of the words, each once: `[V, E]` of the same type, unit norm.
    pub table: Array,
    /// The rows of the table that are similar to each class, the hard negatives: `[C]` lists.
    pub similar: Vec<Vec<u32>>,
    /// The same of the easy negatives.
    pub dissimilar: Vec<Vec<u32>>,
}

impl NegativeFeatures {
    /// Reads a file of RALF. Rows with the same bits become one, in the order of their first appearance, hard negatives first.
    pub fn read(path: &Path) -> Result<Self> {
        let (value, tensors) = opened(path)?;
        of_value(&value).map_err(|problem| malformed(tensors.origin(), problem))
    }

    /// Writes a file for RALF, without ever holding its padded arrays. Fails where one of them has more than 4 GiB as text, and where
    /// `out` does.
    pub fn write(&self, out: impl io::Write) -> io::Result<()> {
        let Self { classes, table, similar, dissimilar } = self;
        let (Some(dtype), [n_classes, dim]) = (dtype_of(classes.kind), &lengths(&classes.shape)[..]) else {
            let problem = format!("expected classes f16 or f32 [C, E], found {:?} {:?}", classes.kind, classes.shape);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        };
        let row_bytes = dim * classes.kind.elt_size_in_bytes();
        let zeros = vec![0; row_bytes];
        let [n_similar, n_dissimilar] =
            [similar, dissimilar].map(|lists| lists.iter().flat_map(|list| (list.len() as i64).to_le_bytes()).collect::<Vec<u8>>());
        let rows = |lists| {
            let (longest, rows) = padded_rows(lists, &table.bytes, &zeros);
            Pieces { dtype, shape: vec![*n_classes, longest, *dim], pieces: rows }
        };
        let counts = |bytes| Pieces { dtype: "<i8", shape: vec![*n_classes], pieces: vec![bytes] };
        let arrays = [
            (CLASSES, Pieces { dtype, shape: vec![*n_classes, *dim], pieces: vec![&classes.bytes] }),
            (SIMILAR[0], rows(similar)),
            (DISSIMILAR[0], rows(dissimilar)),
            (SIMILAR[1], counts(&n_similar)),
            (DISSIMILAR[1], counts(&n_dissimilar)),
        ];
        // As text, a byte may take two.
        let n_bytes: usize = arrays.iter().flat_map(|(_, array)| &array.pieces).map(|piece| 2 * piece.len() + 1024).sum();
        write_pickled(out, n_bytes as u64, |mut out| write_arrays(&arrays, &mut out))
    }

    /// Lists of rows as RALF keeps them: `[C, M, E]`, M the length of the longest list, zeros after the end of each.
    pub fn padded(&self, lists: &[Vec<u32>]) -> Array {
        let row_bytes = self.table.shape[1] as usize * self.table.kind.elt_size_in_bytes();
        let zeros = vec![0; row_bytes];
        let (longest, rows) = padded_rows(lists, &self.table.bytes, &zeros);
        let shape = vec![lists.len() as i64, longest as i64, self.table.shape[1]];
        Array { kind: self.table.kind, shape, bytes: rows.concat() }
    }
}

/// The rows of lists, each filled with zeros to the length of the longest one, which is also returned.
fn padded_rows<'a>(lists: &'a [Vec<u32>], table: &'a [u8], zeros: &'a [u8]) -> (usize, Vec<&'a [u8]>) {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let row = |row: &u32| &table[*row as usize * zeros.len()..][..zeros.len()];
    let padded = |list: &'a Vec<u32>| list.iter().map(row).chain(std::iter::repeat_n(zeros, longest - list.len()));
    (longest, lists.iter().flat_map(padded).collect())
}

fn malformed(origin: Origin<'_>, problem: String) -> crate::Error {
    origin.malformed(problem, AS_WRITTEN)
}

fn of_value(value: &Value) -> Result<NegativeFeatures, String> {
    let classes = array(value, CLASSES, &[None, None])?;
    let [n_classes, dim] = classes.shape[..] else { unreachable!("an array of two axes") };
    let mut table = Table { row_bytes: dim * item_bytes(&classes), bytes: Vec::new(), places: HashMap::new() };
    let [similar, dissimilar] = [SIMILAR, DISSIMILAR].map(|names| Ok::<_, String>((names, padded_of(value, names, &classes)?)));
    let (similar, dissimilar) = (similar?, dissimilar?);
    check_unit(CLASSES, &classes.dtype, &classes.data, table.row_bytes)?;
    let similar = table.lists(similar.0, &similar.1)?;
    let dissimilar = table.lists(dissimilar.0, &dissimilar.1)?;
    let kind = kind_of(&classes.dtype)?;
    let n_rows = table.places.len() as i64;
    Ok(NegativeFeatures {
        classes: Array { kind, shape: vec![n_classes as i64, dim as i64], bytes: classes.data.to_vec() },
        table: Array { kind, shape: vec![n_rows, dim as i64], bytes: table.bytes },
        similar,
        dissimilar,
    })
}

/// The words of each class, and how many there are.
struct Padded {
    rows: NumpyArray,
    lengths: Vec<usize>,
}

fn padded_of(value: &Value, [rows_name, lengths_name]: [&str; 2], classes: &NumpyArray) -> Result<Padded, String> {
    let rows = array(value, rows_name, &[Some(classes.shape[0]), None, Some(classes.shape[1])])?;
    if rows.dtype != classes.dtype {
        return Err(format!("{rows_name}: expected `{}` as in {CLASSES}, found `{}`", classes.dtype, rows.dtype));
    }
    let counts = array(value, lengths_name, &[Some(classes.shape[0])])?;
    let count = |(class, bytes): (usize, &[u8; 8])| {
        let length = i64::from_le_bytes(*bytes);
        let found = usize::try_from(length).ok().filter(|length| *length <= rows.shape[1]);
        found.ok_or_else(|| format!("{lengths_name}, class {class}: expected a number from 0 to {}, found {length}", rows.shape[1]))
    };
    let lengths = counts.data.as_chunks::<8>().0.iter().enumerate().map(count).collect::<Result<_, _>>()?;
    Ok(Padded { rows, lengths })
}

/// Rows that were seen, each once.
struct Table {
    row_bytes: usize,
    bytes: Vec<u8>,
    places: HashMap<Box<[u8]>, u32>,
}

impl Table {
    fn lists(&mut self, [rows_name, lengths_name]: [&str; 2], Padded { rows, lengths }: &Padded) -> Result<Vec<Vec<u32>>, String> {
        let class_bytes = rows.shape[1] * self.row_bytes;
        let list = |(class, length): (usize, &usize)| {
            let of_class = &rows.data[class * class_bytes..][..class_bytes];
            let (words, padding) = of_class.split_at(length * self.row_bytes);
            if padding.iter().any(|byte| *byte != 0) {
                return Err(format!("{rows_name}, class {class}: expected zeros after the {length} rows of {lengths_name}, found others"));
            }
            check_unit(&format!("{rows_name}, class {class}"), &rows.dtype, words, self.row_bytes)?;
            words.chunks_exact(self.row_bytes).map(|row| self.place(row)).collect()
        };
        lengths.iter().enumerate().map(list).collect()
    }

    fn place(&mut self, row: &[u8]) -> Result<u32, String> {
        if let Some(place) = self.places.get(row) {
            return Ok(*place);
        }
        let place = u32::try_from(self.places.len()).map_err(|_| "more than 2^32 different rows".to_owned())?;
        self.bytes.extend(row);
        self.places.insert(row.into(), place);
        Ok(place)
    }
}

/// The array at a key, of this shape; `None` stands for any length from 1 on. One of counts has one axis.
fn array(value: &Value, name: &str, shape: &[Option<usize>]) -> Result<NumpyArray, String> {
    let Some(found) = value.get(name) else {
        return Err(format!("expected `{name}` in a dict, found {}", keys(value)));
    };
    let array = found.to_array().map_err(|problem| format!("{name}: {problem}"))?;
    let is_counts = shape.len() == 1;
    if is_counts && array.dtype != "<i8" {
        return Err(format!("{name}: expected numbers of `<i8`, found `{}`", array.dtype));
    }
    if !is_counts {
        kind_of(&array.dtype).map_err(|problem| format!("{name}: {problem}"))?;
    }
    let fits = |(expected, found): (&Option<usize>, &usize)| expected.map_or(*found > 0, |expected| expected == *found);
    if array.shape.len() != shape.len() || !shape.iter().zip(&array.shape).all(fits) {
        let lengths: Vec<String> = shape.iter().map(|length| length.map_or_else(|| "any".into(), |length| length.to_string())).collect();
        return Err(format!("{name}: expected an array [{}], found {:?}", lengths.join(", "), array.shape));
    }
    if array.is_fortran && array.shape.len() > 1 {
        return Err(format!("{name}: expected an array in C order, found Fortran order"));
    }
    Ok(array)
}

fn kind_of(dtype: &str) -> Result<Kind, String> {
    match dtype {
        "<f2" => Ok(Kind::Half),
        "<f4" => Ok(Kind::Float),
        _ => Err(format!("expected numbers of `<f2` or `<f4`, found `{dtype}`")),
    }
}

fn dtype_of(kind: Kind) -> Option<&'static str> {
    [("<f2", Kind::Half), ("<f4", Kind::Float)].into_iter().find(|(_, known)| *known == kind).map(|(dtype, _)| dtype)
}

fn item_bytes(array: &NumpyArray) -> usize {
    if array.dtype == "<f2" { 2 } else { 4 }
}

fn lengths(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|length| *length as usize).collect()
}

fn check_unit(what: &str, dtype: &str, bytes: &[u8], row_bytes: usize) -> Result<(), String> {
    let norm = |row: &[u8]| -> f64 {
        let squares: f64 = match dtype {
            "<f2" => row.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f64().powi(2)).sum(),
            _ => row.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)).powi(2)).sum(),
        };
        squares.sqrt()
    };
    let norms = bytes.chunks_exact(row_bytes).map(norm);
    match norms.enumerate().find(|(_, norm)| !norm.is_finite() || (norm - 1.0).abs() >= NORM_TOLERANCE) {
        Some((row, norm)) => Err(format!("{what}, row {row}: expected unit norm, found {norm:.4}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        path::PathBuf,
    };

    use tch::Tensor;

    use super::*;
    use crate::{Error, checkpoint::numbers, golden};

    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/detpro-ralf").join(name)
    }

    fn data_pkl(bytes: &[u8]) -> Vec<u8> {
        let mut zip = zip::ZipArchive::new(io::Cursor::new(bytes)).unwrap();
        let name = zip.file_names().find(|name| name.ends_with("data.pkl")).unwrap().to_owned();
        let mut pickle = Vec::new();
        zip.by_name(&name).unwrap().read_to_end(&mut pickle).unwrap();
        pickle
    }

    fn written(negatives: &NegativeFeatures) -> Vec<u8> {
        let mut bytes = Vec::new();
        negatives.write(&mut bytes).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<NegativeFeatures> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        NegativeFeatures::read(file.path())
    }

    fn small() -> NegativeFeatures {
        NegativeFeatures::read(&path("neg_feature_small.pkl")).unwrap()
    }

    fn bytes(tensor: &Tensor, kind: Kind) -> Vec<u8> {
        numbers(&tensor.to_kind(kind)).unwrap()
    }

    /// Exactly: f16 is copied.
    #[test]
    fn files_of_both_versions_of_numpy_are_read_number_by_number() {
        let golden = golden::detpro_ralf("ralf");
        for name in ["neg_feature_small.pkl", "neg_feature_small_numpy1.pkl"] {
            let negatives = NegativeFeatures::read(&path(name)).unwrap();
            let [n_classes, dim] = golden["negfile/feat_in"].size()[..] else { panic!() };
            assert_eq!((negatives.classes.kind, &negatives.classes.shape), (Kind::Half, &vec![n_classes, dim]));
            assert_eq!(negatives.classes.bytes, bytes(&golden["negfile/feat_in"], Kind::Half));
            for (lists, [rows, lengths]) in [(&negatives.similar, SIMILAR), (&negatives.dissimilar, DISSIMILAR)] {
                let padded = negatives.padded(lists);
                let expected = &golden[&format!("negfile/{rows}")];
                assert_eq!(padded.shape, expected.size(), "{name} {rows}");
                assert_eq!(padded.bytes, bytes(expected, Kind::Half), "{name} {rows}");
                let found: Vec<i64> = lists.iter().map(|list| list.len() as i64).collect();
                assert_eq!(found, Vec::<i64>::try_from(&golden[&format!("negfile/{lengths}")]).unwrap(), "{name} {lengths}");
            }
        }
    }

    #[test]
    fn a_word_of_several_classes_is_one_row() {
        let NegativeFeatures { table, similar, dissimilar, .. } = small();
        let n_listed: usize = similar.iter().chain(&dissimilar).map(Vec::len).sum();
        // Of the 40 words.
        assert!(table.shape[0] <= 40 && n_listed > 2 * 40, "{:?} {n_listed}", table.shape);
        let rows: std::collections::BTreeSet<&[u8]> = table.bytes.chunks(2 * table.shape[1] as usize).collect();
        assert_eq!(rows.len(), table.shape[0] as usize);
        // In the order of their first appearance.
        let mut next = 0;
        for row in similar.iter().chain(&dissimilar).flatten() {
            assert!(*row <= next);
            next = next.max(row + 1);
        }
        assert_eq!(i64::from(next), table.shape[0]);
    }

    #[test]
    fn what_is_written_is_what_the_published_writer_writes() {
        let negatives = small();
        let bytes = written(&negatives);
        assert!(data_pkl(&bytes) == data_pkl(&fs::read(path("neg_feature_small_numpy1.pkl")).unwrap()));
        assert_eq!(read(&bytes).unwrap(), negatives);
    }

    #[test]
    fn single_precision_and_long_axes_are_read_back() {
        // More than 65,535 words of the first class.
        let row = |angle: f32| [angle.cos(), angle.sin()].into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
        let array = |n: usize| Array { kind: Kind::Float, shape: vec![n as i64, 2], bytes: (0..n).flat_map(|i| row(i as f32)).collect() };
        let negatives = NegativeFeatures {
            classes: array(2),
            table: array(3),
            similar: vec![(0..66_000).map(|word| word % 3).collect(), vec![1]],
            dissimilar: vec![vec![], vec![2; 300]],
        };
        assert_eq!(read(&written(&negatives)).unwrap(), negatives);
    }

    /// The error of a file whose pickle is changed.
    fn problem(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut pickle = data_pkl(&fs::read(path("neg_feature_small_numpy1.pkl")).unwrap());
        change(&mut pickle);
        let mut bytes = Vec::new();
        write_pickled(&mut bytes, pickle.len() as u64, |out| out.write_all(&pickle)).unwrap();
        match read(&bytes) {
            Err(Error::Malformed { problem, hint: Some(_), .. }) => problem,
            other => panic!("expected a malformed file, found {other:?}"),
        }
    }

    /// Puts bytes in the place of others, of which there are `n`.
    fn replaced(pickle: &mut Vec<u8>, old: &[u8], new: &[u8], n: usize) {
        let mut places: Vec<usize> = (0..pickle.len()).filter(|at| pickle[*at..].starts_with(old)).collect();
        assert_eq!(places.len(), n);
        places.reverse();
        for at in places {
            pickle.splice(at..at + old.len(), new.iter().copied());
        }
    }

    #[test]
    fn arrays_of_another_kind_order_or_length_are_refused_by_name() {
        assert_eq!(
            problem(|pickle| replaced(pickle, b"feat_in", b"feat_on", 1)),
            concat!(
                "expected `feat_in` in a dict, found a dict with the keys ",
                r#"["feat_on", "feat_out_sim", "feat_out_dis", "pad_out_sim", "pad_out_dis"]"#
            )
        );
        let other = problem(|pickle| replaced(pickle, b"\x02\0\0\0f2", b"\x02\0\0\0i2", 1));
        assert_eq!(other, "feat_in: expected numbers of `<f2` or `<f4`, found `<i2`");
        let big = problem(|pickle| replaced(pickle, b"\x01\0\0\0<", b"\x01\0\0\0>", 1));
        assert_eq!(big, "feat_in: expected numbers of `<f2` or `<f4`, found `>f2`");
        let unsigned = problem(|pickle| replaced(pickle, b"\x02\0\0\0i8", b"\x02\0\0\0u8", 1));
        assert_eq!(unsigned, "pad_out_sim: expected numbers of `<i8`, found `<u8`");
        // The flag before the numbers of the second array, whose dtype is recalled from place 16.
        let fortran = problem(|pickle| {
            let at = pickle.windows(4).position(|window| window == b"h\x10\x89h").unwrap();
            pickle[at + 2] = 0x88;
        });
        assert_eq!(fortran, "feat_out_sim: expected an array in C order, found Fortran order");
        let short = problem(|pickle| replaced(pickle, b"(K\x01K\x06K\x10\x86", b"(K\x01K\x05K\x10\x86", 1));
        assert_eq!(short, "feat_in: a numpy array [5, 16] of `<f2`: expected 160 bytes, found 192");
        let flat = problem(|pickle| replaced(pickle, b"(K\x01K\x06K\x0cK\x10\x87", b"(K\x01K\x0cK\x06K\x10\x87", 1));
        assert_eq!(flat, "feat_out_sim: expected an array [6, any, 16], found [12, 6, 16]");
        // The length of the first class: 11 of 12.
        let length = |length: u8| {
            move |pickle: &mut Vec<u8>| {
                let at = pickle.windows(6).position(|window| window == b"X\x30\0\0\0\x0b").unwrap();
                pickle[at + 5] = length;
            }
        };
        assert_eq!(problem(length(13)), "pad_out_sim, class 0: expected a number from 0 to 12, found 13");
        assert_eq!(problem(length(10)), "feat_out_sim, class 0: expected zeros after the 10 rows of pad_out_sim, found others");
    }

    #[test]
    fn rows_that_are_not_of_unit_norm_are_refused() {
        let mut negatives = small();
        negatives.table.bytes[4..6].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        let Err(Error::Malformed { problem, .. }) = read(&written(&negatives)) else { panic!() };
        assert!(problem.starts_with("feat_out_sim, class 0, row 0: expected unit norm, found 2."), "{problem}");
        negatives = small();
        negatives.classes.bytes[2..4].copy_from_slice(&f16::NAN.to_le_bytes());
        let Err(Error::Malformed { problem, .. }) = read(&written(&negatives)) else { panic!() };
        assert_eq!(problem, "feat_in, row 0: expected unit norm, found NaN");
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let Err(Error::Malformed { problem, .. }) = read(b"<!doctype html>") else { panic!() };
        assert!(problem.ends_with("found a web page"), "{problem}");
        let Err(Error::Malformed { problem, .. }) = NegativeFeatures::read(&path("../checkpoint/flat.pth")) else { panic!() };
        assert!(problem.starts_with("expected `feat_in` in a dict, found a dict with the keys ["), "{problem}");
    }
}
