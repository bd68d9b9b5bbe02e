//! Numpy arrays in pickles.
//!
//! `ndarray.__reduce__` gives `_reconstruct(ndarray, (0,), b'b')` with the state `(1, shape, dtype, is_fortran, data)`;
//! protocol 5 in-band gives `_frombuffer(data, dtype, shape, order)`. A dtype is `dtype('f4', False, True)` with the state
//! `(3, '<', ...)`.

use std::io::{self, Write};

use crate::{Object, Value};

/// An array as it lies in a pickle.
#[derive(Debug, Clone, PartialEq)]
pub struct NumpyArray {
    /// Byte order and type: `<f4`.
    pub dtype: String,
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// Whether the first axis runs fastest.
    pub is_fortran: bool,
    /// The numbers.
    pub data: Vec<u8>,
}

impl Value {
    /// The numpy array this is. Fails, in words, for what is none.
    pub fn to_array(&self) -> Result<NumpyArray, String> {
        let Self::Object(object) = self else { return Err(format!("expected a numpy array, found {}", self.kind())) };
        let Self::Global { module, name } = &object.callable else { return Err("expected a numpy array, found another object".into()) };
        let array = match (module.as_str(), name.as_str()) {
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => reconstructed(object),
            ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => from_buffer(object),
            _ => return Err(format!("expected a numpy array, found {module}.{name}")),
        };
        let array = array.ok_or("a numpy array of an unknown layout")?;
        let n_items = array.shape.iter().try_fold(1_usize, |n_items, length| n_items.checked_mul(*length));
        let item_bytes = array.dtype.get(2..).and_then(|size| size.parse::<usize>().ok()).unwrap_or(0);
        match n_items.and_then(|n_items| n_items.checked_mul(item_bytes)) {
            Some(expected) if expected == array.data.len() => Ok(array),
            _ => Err(format!("a numpy array {:?} of {} with {} bytes of data", array.shape, array.dtype, array.data.len())),
        }
    }

    /// What this is, for messages.
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a bool",
            Self::Int(_) | Self::BigInt(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Str(_) => "text",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "a list",
            Self::Tuple(_) => "a tuple",
            Self::Set(_) => "a set",
            Self::Dict(_) => "a dict",
            Self::Global { .. } => "a class",
            Self::Object(_) => "an object",
            Self::Persistent(_) => "a reference to something outside",
        }
    }
}

fn reconstructed(object: &Object) -> Option<NumpyArray> {
    let [_, shape, dtype, is_fortran, data] = object.state.as_ref()?.as_items()? else { return None };
    Some(NumpyArray { dtype: dtype_name(dtype)?, shape: lengths(shape)?, is_fortran: is_fortran.as_int()? != 0, data: raw(data)? })
}

fn from_buffer(object: &Object) -> Option<NumpyArray> {
    let [data, dtype, shape, order] = object.args.as_slice() else { return None };
    Some(NumpyArray { dtype: dtype_name(dtype)?, shape: lengths(shape)?, is_fortran: order.as_str()? == "F", data: raw(data)? })
}

fn lengths(shape: &Value) -> Option<Vec<usize>> {
    shape.as_items()?.iter().map(|length| usize::try_from(length.as_int()?).ok()).collect()
}

fn raw(data: &Value) -> Option<Vec<u8>> {
    match data {
        Value::Bytes(bytes) => Some(bytes.clone()),
        // The `str` of Python 2 came as text because its bytes happened to be UTF-8.
        Value::Str(text) => Some(text.clone().into_bytes()),
        // Protocols 0 to 2 have no bytes: Python 3 writes text of Latin-1 characters and how to encode them.
        Value::Object(object) if object.callable.is_global("_codecs", "encode") => {
            object.args.first()?.as_str()?.chars().map(|character| u8::try_from(u32::from(character)).ok()).collect()
        }
        // `bytes()` is how those protocols write no bytes at all; `bytearray(b'...')` how they write some.
        Value::Object(object) if object.callable.is_global("__builtin__", "bytes") && object.args.is_empty() => Some(Vec::new()),
        Value::Object(object) if matches!(&object.callable, Value::Global { name, .. } if name == "bytearray" || name == "bytes") => {
            object.args.first().map_or(Some(Vec::new()), raw)
        }
        _ => None,
    }
}

fn dtype_name(dtype: &Value) -> Option<String> {
    let Value::Object(object) = dtype else { return None };
    if !object.callable.is_global("numpy", "dtype") {
        return None;
    }
    let name = object.args.first()?.as_str()?;
    let order = object.state.as_ref().and_then(|state| state.as_items()?.get(1)?.as_str()).unwrap_or("=");
    Some(format!("{order}{name}"))
}

impl NumpyArray {
    /// The numbers as f32, row by row. Fails, in words, for types other than f4, f8, f2-free integers i4, i8, and for
    /// big-endian files.
    pub fn to_f32(&self) -> Result<Vec<f32>, String> {
        let (order, kind) = self.dtype.split_at(1);
        if order == ">" {
            return Err("expected little-endian numbers, found big-endian".into());
        }
        let numbers: Vec<f32> = match kind {
            "f4" => self.numbers(f32::from_le_bytes),
            "f8" => self.numbers(|bytes| f64::from_le_bytes(bytes) as f32),
            "i4" => self.numbers(|bytes| i32::from_le_bytes(bytes) as f32),
            "i8" => self.numbers(|bytes| i64::from_le_bytes(bytes) as f32),
            other => return Err(format!("expected float32 or float64 numbers, found `{other}`")),
        };
        match (self.is_fortran, self.shape.as_slice()) {
            (true, [rows, columns]) => Ok((0..rows * columns).map(|item| numbers[(item % columns) * rows + item / columns]).collect()),
            (true, shape) if shape.len() > 2 => Err("expected an array in C order, found Fortran order".into()),
            _ => Ok(numbers),
        }
    }

    fn numbers<const N: usize>(&self, number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (items, _) = self.data.as_chunks::<N>();
        items.iter().map(|item| number(*item)).collect()
    }
}

/// Writes a list of float32 arrays `[rows, columns]`, each row by row, as Python's `pickle.load` reads it with numpy 1 and 2
/// (protocol 3).
pub fn write_f32_arrays<'a>(arrays: impl IntoIterator<Item = (usize, usize, &'a [f32])>, out: &mut impl Write) -> io::Result<()> {
    // Protocol 3, an empty list, and a mark for its items.
    out.write_all(b"\x80\x03](")?;
    for (rows, columns, numbers) in arrays {
        assert_eq!(rows * columns, numbers.len(), "BUG: an array of another shape");
        out.write_all(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R")?;
        out.write_all(b"(K\x01")?;
        for length in [rows, columns] {
            let length = i32::try_from(length).map_err(|_| io::Error::other("an array with over 2 billion rows"))?;
            out.write_all(b"J")?;
            out.write_all(&length.to_le_bytes())?;
        }
        out.write_all(b"\x86cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R")?;
        out.write_all(b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")?;
        out.write_all(b"\x89B")?;
        let n_bytes = u32::try_from(4 * numbers.len()).map_err(|_| io::Error::other("an array of over 4 GiB"))?;
        out.write_all(&n_bytes.to_le_bytes())?;
        for number in numbers {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(b"tb")?;
    }
    out.write_all(b"e.")
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use proptest::prelude::*;

    use crate::{Value, read, write_f32_arrays};

    fn golden(name: &str) -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pickle").join(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run make.py beside it", path.display()))
    }

    const ARRAYS: &[&str] = &["arrays-0.pkl", "arrays-2.pkl", "arrays-4.pkl", "arrays-5.pkl"];

    fn rows(value: &Value) -> Vec<(Vec<usize>, Vec<f32>)> {
        value
            .as_items()
            .unwrap()
            .iter()
            .map(|item| item.to_array().unwrap())
            .map(|array| (array.shape.clone(), array.to_f32().unwrap()))
            .collect()
    }

    /// As make.py writes them: float32, float64, no rows, Fortran order.
    fn expected() -> Vec<(Vec<usize>, Vec<f32>)> {
        let ramp: Vec<f32> = (0..10).map(|number| number as f32 / 4.0).collect();
        vec![(vec![2, 5], ramp.clone()), (vec![2, 5], ramp.clone()), (vec![0, 5], vec![]), (vec![2, 5], ramp)]
    }

    #[test]
    fn arrays_of_every_protocol_are_read() {
        for name in ARRAYS {
            assert_eq!(rows(&read(&golden(name)).unwrap()), expected(), "{name}");
        }
    }

    #[test]
    fn python_data_of_every_protocol_is_read() {
        for protocol in [0, 2, 4, 5] {
            let value = read(&golden(&format!("data-{protocol}.pkl"))).unwrap();
            assert_eq!(value.get("int").and_then(Value::as_int), Some(-300), "protocol {protocol}");
            assert_eq!(value.get("text").and_then(Value::as_str), Some("naïve \u{1f426}\n\\u"), "protocol {protocol}");
            assert_eq!(value.get("float"), Some(&Value::Float(0.1)));
            assert_eq!(value.get("nothing"), Some(&Value::None));
            assert_eq!(value.get("tuple"), Some(&Value::Tuple(vec![Value::Bool(true), Value::Int(1 << 40)])));
            assert_eq!(value.get("ordered").unwrap().get("a").and_then(Value::as_int), Some(1));
            let shared = value.get("shared").unwrap().as_items().unwrap();
            assert_eq!(shared[0], shared[1]);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut bytes = Vec::new();
        write_f32_arrays([(1, 5, [1.0, 2.0, 3.0, 4.0, 0.5].as_slice()), (0, 5, &[])], &mut bytes).unwrap();
        assert_eq!(rows(&read(&bytes).unwrap()), [(vec![1, 5], vec![1.0, 2.0, 3.0, 4.0, 0.5]), (vec![0, 5], vec![])]);
        // Python reads the same bytes: make.py asserts it for the committed copy.
        assert_eq!(bytes, golden("written.pkl"));
    }

    #[test]
    fn a_circle_is_refused() {
        // l = []; l.append(l)
        let error = read(b"\x80\x02]q\x00h\x00a.").unwrap_err();
        assert!(error.to_string().contains("in a circle"), "{error}");
    }

    #[test]
    fn a_huge_length_is_refused_with_its_place() {
        let error = read(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f").unwrap_err();
        assert!(error.offset == 2 && error.problem.contains("cut short"), "{error}");
    }

    #[test]
    fn every_cut_is_an_error() {
        for name in ARRAYS {
            let bytes = golden(name);
            for length in 0..bytes.len() - 1 {
                assert!(read(&bytes[..length]).is_err(), "{name} cut to {length}");
            }
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(which in 0..4_usize, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut bytes = golden(ARRAYS[which]);
            for (index, value) in flips {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(Value::List(items)) = read(&bytes) {
                for item in items {
                    if let Ok(array) = item.to_array() {
                        let _may_be_refused = array.to_f32();
                    }
                }
            }
        }
    }
}
