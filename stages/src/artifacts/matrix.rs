//! A matrix of embeddings in one large file: without a header, as LP-OVOD keeps it, or numpy's `.npy`.
//!
//! Rows are little-endian numbers, row after row. A file without a header says neither how many rows it has nor how long they are, so both are
//! given and compared with its size. Such a file is read piece by piece, in place.

use std::{fs::File, ops::Range, os::unix::fs::FileExt as _, path::Path};

use half::{f16, slice::HalfFloatSliceExt as _};
use ovenbird_cache::inputs::{Checked, InputFile};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Artifact, Result, error::malformed, ports::only_file};

/// Bytes that are read at once where only their value counts.
const PIECE: usize = 16 << 20;
/// The first bytes of a `.npy` file.
const NPY: &[u8] = b"\x93NUMPY";
/// Headers of `.npy` files are no longer.
pub(crate) const MAX_NPY_HEADER: u64 = 1 << 16;

/// The number format of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MatrixDtype {
    /// IEEE half precision.
    #[default]
    F16,
    /// Single precision.
    F32,
}

impl MatrixDtype {
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    fn widened(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F16 => {
                let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect();
                let mut numbers = vec![0.0; halves.len()];
                halves.convert_to_f32_slice(&mut numbers);
                numbers
            }
            Self::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        }
    }
}

/// The size and the number format of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MatrixShape {
    pub(crate) n_rows: u64,
    pub(crate) dim: usize,
    pub(crate) dtype: MatrixDtype,
}

impl MatrixShape {
    fn row_bytes(self) -> u64 {
        self.dim as u64 * self.dtype.bytes()
    }

    /// The bytes of all rows, as many as there can be.
    pub(crate) fn bytes(self) -> u64 {
        self.n_rows.saturating_mul((self.dim as u64).saturating_mul(self.dtype.bytes()))
    }

    fn words(self) -> String {
        format!("{} rows of {} numbers of {}", self.n_rows, self.dim, self.dtype.name())
    }
}

/// A file that holds a matrix, not yet read.
#[derive(Debug, Clone)]
pub struct MatrixFile {
    /// The file.
    pub file: InputFile,
}

impl Artifact for MatrixFile {
    const KIND: &'static str = "embedding-matrix";
    const EXTENSIONS: &'static [&'static str] = &["pth", "bin", "raw", "dat", "npy"];
    const SHAPE: &'static str = "a file of embeddings, row after row without a header as LP-OVOD writes it, or a `.npy` [N, D]";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

/// A matrix that is read in place.
pub(crate) struct Matrix<'a> {
    file: &'a InputFile,
    checked: Checked<'a>,
    open: File,
    /// Bytes before the first row.
    start: u64,
    shape: MatrixShape,
    /// What a reader should know of the file.
    pub(crate) note: Option<String>,
}

impl MatrixFile {
    /// Hashes the file and opens it as a matrix of this shape. Fails where the file is of another size or, as it says itself, of another shape.
    pub(crate) fn matrix(&self, shape: MatrixShape) -> Result<Matrix<'_>> {
        let path = &self.file.path;
        let checked = self.file.check()?;
        let open = File::open(path).map_err(|source| ovenbird_cache::Error::Read { path: path.clone(), source })?;
        let mut matrix = Matrix { file: &self.file, checked, open, start: 0, shape, note: None };
        let (expected, found) = (shape.n_rows * shape.row_bytes(), self.file.bytes);
        if self.file.begin(NPY.len() as u64)? == NPY {
            matrix.start = matrix.npy_header()?;
            let found = found - matrix.start;
            return if found == expected {
                Ok(matrix)
            } else {
                Err(malformed(path, format!("expected {expected} bytes after the header ({}), found {found}", shape.words())))
            };
        }
        if found == expected {
            return Ok(matrix);
        }
        if found == 2 * expected && matrix.is_zero(expected..found)? {
            let words = "the file is twice as long as its rows and its second half is zeros, as LP-OVOD's training leaves it when it opens f16 as f32: \
                         the first half is read, in which the lowest byte of the first number may be lost";
            matrix.note = Some(words.into());
            return Ok(matrix);
        }
        let row = shape.row_bytes().max(1);
        let hint = match shape.dtype {
            MatrixDtype::F16 if found == 2 * expected => "if it is f32, set `with: {dtype: f32}`; if its rows are longer, set `dim`",
            MatrixDtype::F32 if 2 * found == expected => "if it is f16, set `with: {dtype: f16}`; if its rows are shorter, set `dim`",
            _ if found % row == 0 => "give the matrix of these very proposals, or copy it again: it may be cut short",
            _ => "check `dim` and `dtype`, or copy the file again: it may be cut short",
        };
        let rows = if found % row == 0 { format!(", which are {} rows", found / row) } else { String::new() };
        let problem = format!("expected {expected} bytes ({}), found {found}{rows}", shape.words());
        Err(ovenbird_data::Error::Malformed { path: path.clone(), problem, hint: Some(hint.into()) }.into())
    }
}

impl Matrix<'_> {
    /// The rows of a range as f32, row by row.
    pub(crate) fn rows(&self, rows: Range<u64>) -> Result<Vec<f32>> {
        let row_bytes = self.shape.row_bytes();
        let mut bytes = vec![0; ((rows.end - rows.start) * row_bytes) as usize];
        self.read(&mut bytes, self.start + rows.start * row_bytes)?;
        Ok(self.shape.dtype.widened(&bytes))
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Fails if the file changed since it was opened: what was read before is then not what was hashed.
    pub(crate) fn still(&self) -> Result<()> {
        Ok(self.checked.still()?)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let failed = |source| ovenbird_cache::Error::Read { path: self.file.path.clone(), source }.into();
        self.open.read_exact_at(bytes, at).map_err(failed)
    }

    fn is_zero(&self, Range { mut start, end }: Range<u64>) -> Result<bool> {
        let mut bytes = vec![0; PIECE];
        while start < end {
            let piece = &mut bytes[..PIECE.min((end - start) as usize)];
            self.read(piece, start)?;
            if piece.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            start += piece.len() as u64;
        }
        Ok(true)
    }

    /// The length of a `.npy` file's header. Fails where it says another shape or number format.
    fn npy_header(&self) -> Result<u64> {
        let path = &self.file.path;
        let header = NpyHeader::of(&self.file.begin(MAX_NPY_HEADER)?).map_err(|problem| malformed(path, problem))?;
        if header.shape() == Some(self.shape) {
            return Ok(header.bytes);
        }
        Err(malformed(path, format!("expected {}, row after row, found {}", self.shape.words(), header.text)))
    }
}

/// The header of a `.npy` file.
pub(crate) struct NpyHeader {
    /// Its length, with all that is before the numbers.
    pub(crate) bytes: u64,
    /// What it says of the numbers.
    pub(crate) text: String,
}

impl NpyHeader {
    /// Of the first [`MAX_NPY_HEADER`] bytes of a file; otherwise what is wrong.
    pub(crate) fn of(head: &[u8]) -> Result<Self, String> {
        let cut = || ".npy header: the file is cut short".to_owned();
        if !head.starts_with(NPY) {
            return Err("expected numpy's `.npy`, found another format".into());
        }
        let [_, _, _, _, _, _, major, _, low, high, third, fourth, ..] = *head else { return Err(cut()) };
        let (length, before) = match major {
            1 => (usize::from(u16::from_le_bytes([low, high])), 10),
            _ => (u32::from_le_bytes([low, high, third, fourth]) as usize, 12),
        };
        if before + length > MAX_NPY_HEADER as usize {
            return Err(format!(".npy header: expected at most {MAX_NPY_HEADER} bytes, found {length}"));
        }
        let text = head.get(before..before + length).ok_or_else(cut)?;
        Ok(Self { bytes: (before + length) as u64, text: String::from_utf8_lossy(text).trim().to_owned() })
    }

    /// The shape, where it is that of a matrix of f16 or f32 row after row.
    pub(crate) fn shape(&self) -> Option<MatrixShape> {
        let value = |key: &str| self.text.split_once(&format!("'{key}':")).map_or("", |(_, rest)| rest.trim_start());
        let dtype = match value("descr") {
            descr if descr.starts_with("'<f2'") => MatrixDtype::F16,
            descr if descr.starts_with("'<f4'") => MatrixDtype::F32,
            _ => return None,
        };
        let (n_rows, dim) = value("shape").strip_prefix('(')?.split_once(')')?.0.split_once(',')?;
        let shape = MatrixShape { n_rows: n_rows.trim().parse().ok()?, dim: dim.trim().parse().ok()?, dtype };
        value("fortran_order").starts_with("False").then_some(shape)
    }
}

/// What begins a `.npy` file of a matrix: numpy's version 1.0, padded to a multiple of 64 bytes.
pub(crate) fn npy_header(n_rows: usize, dim: usize, dtype: MatrixDtype) -> Vec<u8> {
    let descr = match dtype {
        MatrixDtype::F16 => "<f2",
        MatrixDtype::F32 => "<f4",
    };
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n_rows}, {dim}), }}");
    // Before it magic, version and length, 10 bytes; behind it a line feed.
    let text = format!("{text}{}\n", " ".repeat((64 - (text.len() + 11) % 64) % 64));
    let length = u16::try_from(text.len()).expect("BUG: the header of a matrix is short");
    [NPY, &[1, 0], &length.to_le_bytes(), text.as_bytes()].concat()
}

/// The bytes of numbers in a number format.
pub(crate) fn narrowed(numbers: &[f32], dtype: MatrixDtype, path: &Path) -> Result<Vec<u8>> {
    if let Some(place) = numbers.iter().position(|number| dtype == MatrixDtype::F16 && !f16::from_f32(*number).is_finite()) {
        return Err(malformed(path, format!("expected numbers that f16 holds, found {}", numbers[place])));
    }
    Ok(match dtype {
        MatrixDtype::F16 => {
            let mut halves = vec![f16::ZERO; numbers.len()];
            halves.convert_from_f32_slice(numbers);
            halves.into_iter().flat_map(f16::to_le_bytes).collect()
        }
        MatrixDtype::F32 => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use ovenbird_cache::inputs::digest_path;

    use super::*;

    fn opened(bytes: &[u8], shape: MatrixShape) -> Result<(Vec<f32>, bool), String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let file = MatrixFile { file: digest_path(file.path(), None, 0).unwrap().remove(0) };
        let matrix = file.matrix(shape).map_err(|error| error.to_string())?;
        Ok((matrix.rows(1..shape.n_rows).unwrap(), matrix.note.is_some()))
    }

    const SHAPE: MatrixShape = MatrixShape { n_rows: 3, dim: 2, dtype: MatrixDtype::F16 };

    #[test]
    fn rows_are_read_in_place_from_every_form() {
        let numbers = [1.0, 0.0, 0.5, -0.25, 0.0, 1.0];
        let bytes = narrowed(&numbers, MatrixDtype::F16, Path::new("m")).unwrap();
        assert_eq!(opened(&bytes, SHAPE).unwrap(), (vec![0.5, -0.25, 0.0, 1.0], false));
        let grown = [&bytes[..], &[0; 12]].concat();
        assert_eq!(opened(&grown, SHAPE).unwrap(), (vec![0.5, -0.25, 0.0, 1.0], true));
        let header = "{'descr': '<f2', 'fortran_order': False, 'shape': (3, 2), }\n";
        let npy = [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), &bytes].concat();
        assert_eq!(opened(&npy, SHAPE).unwrap().0, [0.5, -0.25, 0.0, 1.0]);
        let single = MatrixShape { dtype: MatrixDtype::F32, ..SHAPE };
        assert_eq!(opened(&narrowed(&numbers, MatrixDtype::F32, Path::new("m")).unwrap(), single).unwrap().0, [0.5, -0.25, 0.0, 1.0]);
        assert!(opened(&npy, single).unwrap_err().contains("expected 3 rows of 2 numbers of f32"));
        assert!(opened(&npy[..40], SHAPE).unwrap_err().ends_with("the file is cut short"));
    }

    #[test]
    fn a_file_of_another_size_is_refused_with_what_it_may_be() {
        let single = MatrixShape { dtype: MatrixDtype::F32, ..SHAPE };
        for (n_bytes, shape, expected) in [
            (8, SHAPE, "expected 12 bytes (3 rows of 2 numbers of f16), found 8, which are 2 rows"),
            (24, SHAPE, "found 24, which are 6 rows"),
            (12, single, "expected 24 bytes (3 rows of 2 numbers of f32), found 12"),
            (13, SHAPE, "expected 12 bytes (3 rows of 2 numbers of f16), found 13"),
        ] {
            let error = opened(&vec![1; n_bytes], shape).unwrap_err();
            assert!(error.ends_with(expected), "{error}");
        }
    }
}
