//! Numpy arrays in pickles.
//!
//! `ndarray.__reduce__` gives `_reconstruct(ndarray, (0,), b'b')` with the state `(1, shape, dtype, is_fortran, data)`;
//! protocol 5 in-band gives `_frombuffer(data, dtype, shape, order)`, where the order may be `'K'` and how to transpose
//! follows; a scalar gives `scalar(dtype, data)`. A dtype is `dtype('f4', False, True)` with the state `(3, '<', ...)`. Numpy 1 keeps these functions in `numpy.core`, numpy 2 in
//! `numpy._core`.

use std::{
    collections::HashMap,
    io::{self, Write},
    sync::Arc,
};

use half::f16;

use crate::{Object, Value};

/// The module name in numpy 2.
const MAX_AXES: usize = 64;
/// The most empty lists that an array of Python objects may hold.
const MAX_EMPTY_LISTS: usize = 1_000_000;

/// An array in a pickle.
#[derive(Debug, Clone, PartialEq)]
pub struct NumpyArray {
    /// Byte order (`<`, `>`, `=` for this machine's, `|` for none), type and size in bytes: `<f4`.
    pub dtype: String,
    /// Length of each axis; empty for a scalar.
    pub shape: Vec<usize>,
    /// Whether the first axis runs fastest.
    pub is_fortran: bool,
    /// The numbers, as many as the shape has.
    pub data: Arc<[u8]>,
}

impl Value {
    /// The numpy array or numpy scalar this is. Fails, in words, for what is none, for arrays of Python objects, and for
    /// arrays with more or less data than their shape says. For arrays of Python objects see [`Self::object_array`].
    pub fn to_array(&self) -> Result<NumpyArray, String> {
        let not_an_array = || format!("expected a numpy array, found {}", self.kind());
        let object = self.as_object().ok_or_else(not_an_array)?;
        let array = match numpy_function(&object.callable) {
            Some("multiarray._reconstruct") => reconstructed(object),
            Some("numeric._frombuffer") => from_buffer(object),
            Some("multiarray.scalar") => scalar(object),
            _ => return Err(not_an_array()),
        };
        let array = array.ok_or("expected a numpy array of plain numbers, found one of Python objects or of another layout")?;
        let n_bytes = array.n_items().and_then(|n_items| n_items.checked_mul(array.item_bytes()?));
        match n_bytes {
            Some(n_bytes) if n_bytes == array.data.len() => Ok(array),
            Some(n_bytes) => {
                let NumpyArray { dtype, shape, data, .. } = &array;
                Err(format!("a numpy array {shape:?} of `{dtype}`: expected {n_bytes} bytes, found {}", data.len()))
            }
            None => Err(format!("a numpy array {:?} of `{}`, which no memory could hold", array.shape, array.dtype)),
        }
    }

    /// The items of a numpy array of Python objects, as lists within lists where it has several axes; `None` for anything else.
    pub fn object_array(&self) -> Option<Self> {
        let object = self.as_object().filter(|object| numpy_function(&object.callable) == Some("multiarray._reconstruct"))?;
        let [_, shape, dtype, is_fortran, items] = object.state.as_ref()?.as_items()? else { return None };
        let (shape, items) = (lengths(shape)?, items.as_list()?);
        let n_items = shape.iter().try_fold(1_usize, |n_items, length| n_items.checked_mul(*length))?;
        let is_sound = dtype_name(dtype)?.get(1..2) == Some("O") && n_items == items.len() && !shape.is_empty();
        // Numpy itself keeps objects in C order but for arrays that were transposed.
        if !is_sound || (is_fortran.as_int()? != 0 && shape.len() > 1) {
            return None;
        }
        // Lists that are empty cost nothing in the file, and might be many.
        let is_small = if n_items == 0 { shape.len() <= 2 && shape[0] <= MAX_EMPTY_LISTS } else { shape.len() <= MAX_AXES };
        is_small.then(|| nested(items, &shape))
    }
}

impl Value {
    /// The items of a numpy array of numbers along its first axis: numbers if it has one axis, else arrays. `None` for other values.
    pub fn array_items(&self) -> Option<Vec<Self>> {
        let array = self.to_array().ok()?;
        let (length, inner) = array.shape.split_first()?;
        if inner.is_empty() {
            return Some(array.to_f64().ok()?.into_iter().map(Self::Float).collect());
        }
        let in_c_order = if array.is_fortran {
            let axes: Vec<usize> = (0..array.shape.len()).rev().collect();
            transposed(&NumpyArray { shape: array.shape.iter().rev().copied().collect(), is_fortran: false, ..array.clone() }, &axes)?
        } else {
            array.clone()
        };
        let step = in_c_order.data.len().checked_div(*length)?;
        let part = |place: usize| {
            let data = in_c_order.data[place * step..][..step].into();
            Self::of_array(&NumpyArray { dtype: array.dtype.clone(), shape: inner.to_vec(), is_fortran: false, data })
        };
        (step > 0 || *length <= MAX_EMPTY_LISTS).then(|| (0..*length).map(part).collect())
    }

    /// An array as pickles have it.
    fn of_array(NumpyArray { dtype, shape, is_fortran, data }: &NumpyArray) -> Self {
        let global = |module: &str, name: &str| Self::Global { module: module.into(), name: name.into() };
        let object = |callable: Self, args: Vec<Self>, state: Vec<Self>| {
            let (items, entries) = (Arc::default(), Arc::default());
            Self::Object(Arc::new(Object {
                callable,
                args: args.into(),
                kwargs: None,
                state: Some(Self::Tuple(state.into())),
                items,
                entries,
            }))
        };
        let (order, name) = dtype.split_at(1);
        let dtype = object(global("numpy", "dtype"), vec![Self::Str(name.into())], vec![Self::Int(3), Self::Str(order.into())]);
        let shape = Self::Tuple(shape.iter().map(|length| Self::Int(*length as i64)).collect());
        let state = vec![Self::Int(1), shape, dtype, Self::Bool(*is_fortran), Self::Bytes(Arc::clone(data))];
        object(global("numpy.core.multiarray", "_reconstruct"), Vec::new(), state)
    }
}

/// Items as lists within lists.
fn nested(items: &[Value], shape: &[usize]) -> Value {
    match shape {
        [length, inner @ ..] if !inner.is_empty() => {
            let step = items.len() / (*length).max(1);
            Value::List((0..*length).map(|place| nested(&items[place * step..][..step], inner)).collect())
        }
        _ => Value::List(items.into()),
    }
}

/// `multiarray._reconstruct` of numpy 1 or 2.
fn numpy_function(callable: &Value) -> Option<&'static str> {
    const NAMES: [&str; 3] = ["multiarray._reconstruct", "numeric._frombuffer", "multiarray.scalar"];
    let Value::Global { module, name } = callable else { return None };
    let module = module.strip_prefix("numpy.core.").or_else(|| module.strip_prefix("numpy._core."))?;
    NAMES.into_iter().find(|known| known.split_once('.') == Some((module, name)))
}

fn reconstructed(object: &Object) -> Option<NumpyArray> {
    let [_, shape, dtype, is_fortran, data] = object.state.as_ref()?.as_items()? else { return None };
    Some(NumpyArray { dtype: dtype_name(dtype)?, shape: lengths(shape)?, is_fortran: is_fortran.as_int()? != 0, data: raw(data)? })
}

fn from_buffer(object: &Object) -> Option<NumpyArray> {
    let [data, dtype, shape, order, axes @ ..] = object.args.as_ref() else { return None };
    let array = NumpyArray { dtype: dtype_name(dtype)?, shape: lengths(shape)?, is_fortran: order.as_str()? == "F", data: raw(data)? };
    match (order.as_str()?, axes) {
        ("C" | "F", _) => Some(array),
        ("K", [axes]) => transposed(&array, &lengths(axes)?),
        _ => None,
    }
}

/// The array with its axes in another order, in C order.
fn transposed(array: &NumpyArray, axes: &[usize]) -> Option<NumpyArray> {
    let n_axes = array.shape.len();
    let is_permutation = axes.len() == n_axes && (0..n_axes).all(|axis| axes.contains(&axis));
    let item_bytes = array.item_bytes().filter(|item_bytes| *item_bytes > 0)?;
    if !is_permutation || array.n_items()?.checked_mul(item_bytes)? != array.data.len() {
        return None;
    }
    let steps = c_steps(&array.shape);
    let (shape, steps): (Vec<usize>, Vec<usize>) = axes.iter().map(|axis| (array.shape[*axis], steps[*axis])).unzip();
    let data = places(&shape, &steps).flat_map(|place| &array.data[place * item_bytes..][..item_bytes]).copied().collect();
    Some(NumpyArray { dtype: array.dtype.clone(), shape, is_fortran: false, data })
}

/// How far apart, in items, neighbours on each axis are when the last axis runs fastest.
fn c_steps(shape: &[usize]) -> Vec<usize> {
    let mut steps = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        // Saturated only where an array has no items, and so no places.
        steps[axis - 1] = usize::saturating_mul(steps[axis], shape[axis]);
    }
    steps
}

/// Where the items of an array lie, in C order.
fn places(shape: &[usize], steps: &[usize]) -> impl Iterator<Item = usize> {
    let n_items = shape.iter().fold(1, |n_items: usize, length| n_items.saturating_mul(*length));
    let mut index = vec![0; shape.len()];
    (0..n_items).map(move |_| {
        let place = index.iter().zip(steps).map(|(position, step)| position * step).sum();
        for (position, length) in index.iter_mut().zip(shape).rev() {
            *position += 1;
            if *position < *length {
                break;
            }
            *position = 0;
        }
        place
    })
}

fn scalar(object: &Object) -> Option<NumpyArray> {
    let [dtype, data] = object.args.as_ref() else { return None };
    Some(NumpyArray { dtype: dtype_name(dtype)?, shape: Vec::new(), is_fortran: false, data: raw(data)? })
}

fn lengths(shape: &Value) -> Option<Vec<usize>> {
    shape.as_items()?.iter().map(|length| usize::try_from(length.as_int()?).ok()).collect()
}

fn raw(data: &Value) -> Option<Arc<[u8]>> {
    match data {
        Value::Bytes(bytes) => Some(Arc::clone(bytes)),
        // The `str` of Python 2 came as text because its bytes happened to be UTF-8.
        Value::Str(text) => Some(Arc::clone(text).into()),
        _ => None,
    }
}

fn dtype_name(dtype: &Value) -> Option<String> {
    let object = dtype.as_object().filter(|object| object.callable.is_global("numpy", "dtype"))?;
    let name = object.args.first()?.as_str().filter(|name| name.is_ascii() && name.len() >= 2)?;
    let order = object.state.as_ref().and_then(|state| state.as_items()?.get(1)?.as_str()).unwrap_or("=");
    ["<", ">", "=", "|"].contains(&order).then(|| format!("{order}{name}"))
}

/// The numbers of an array as they lie, as another type; `None` where they are none.
macro_rules! numbers_as {
    ($array:expr, $number:ty) => {
        match $array.dtype.get(1..).unwrap_or_default() {
            "f2" => Some($array.numbers(|bytes| f16::from_le_bytes(bytes).to_f32() as $number)),
            "f4" => Some($array.numbers(|bytes| f32::from_le_bytes(bytes) as $number)),
            "f8" => Some($array.numbers(|bytes| f64::from_le_bytes(bytes) as $number)),
            "i1" => Some($array.numbers(|bytes| i8::from_le_bytes(bytes) as $number)),
            "i2" => Some($array.numbers(|bytes| i16::from_le_bytes(bytes) as $number)),
            "i4" => Some($array.numbers(|bytes| i32::from_le_bytes(bytes) as $number)),
            "i8" => Some($array.numbers(|bytes| i64::from_le_bytes(bytes) as $number)),
            "u1" => Some($array.numbers(|bytes| u8::from_le_bytes(bytes) as $number)),
            "u2" => Some($array.numbers(|bytes| u16::from_le_bytes(bytes) as $number)),
            "u4" => Some($array.numbers(|bytes| u32::from_le_bytes(bytes) as $number)),
            "u8" => Some($array.numbers(|bytes| u64::from_le_bytes(bytes) as $number)),
            "b1" => Some($array.numbers(|[byte]: [u8; 1]| u8::from(byte != 0) as $number)),
            _ => None,
        }
    };
}

impl NumpyArray {
    /// The product of the shape, unless no memory could hold as many.
    fn n_items(&self) -> Option<usize> {
        self.shape.iter().try_fold(1_usize, |n_items, length| n_items.checked_mul(*length))
    }

    /// Of one number; none for types whose name does not end in it.
    fn item_bytes(&self) -> Option<usize> {
        let size = self.dtype.get(2..)?.parse::<usize>().ok()?;
        // Numpy counts text in characters.
        if self.dtype.get(1..2) == Some("U") { size.checked_mul(4) } else { Some(size) }
    }

    /// The numbers as f32 in C order (the last axis fastest), whatever the order in the file. Float64 and large integers are
    /// rounded to the nearest f32; bools are 0 and 1. Fails, in words, for other types.
    pub fn to_f32(&self) -> Result<Vec<f32>, String> {
        self.in_c_order(numbers_as!(self, f32))
    }

    /// The same as f64; only integers beyond 2^53 are rounded.
    pub fn to_f64(&self) -> Result<Vec<f64>, String> {
        self.in_c_order(numbers_as!(self, f64))
    }

    fn in_c_order<T: Copy>(&self, numbers: Option<Vec<T>>) -> Result<Vec<T>, String> {
        let numbers = numbers.ok_or_else(|| format!("expected floats or integers, found `{}`", self.dtype))?;
        if self.n_items() != Some(numbers.len()) {
            return Err(format!("expected an array {:?}, found {} numbers", self.shape, numbers.len()));
        }
        if !self.is_fortran || numbers.is_empty() {
            return Ok(numbers);
        }
        let reversed: Vec<usize> = self.shape.iter().rev().copied().collect();
        let steps: Vec<usize> = c_steps(&reversed).into_iter().rev().collect();
        Ok(places(&self.shape, &steps).map(|place| numbers[place]).collect())
    }

    fn numbers<const N: usize, T>(&self, from_le_bytes: impl Fn([u8; N]) -> T) -> Vec<T> {
        let swaps = self.dtype.starts_with('>') || (self.dtype.starts_with('=') && cfg!(target_endian = "big"));
        let (items, _) = self.data.as_chunks::<N>();
        let number = |item: &[u8; N]| {
            let mut item = *item;
            if swaps {
                item.reverse();
            }
            from_le_bytes(item)
        };
        items.iter().map(number).collect()
    }
}

/// Writes a list of float32 arrays `[rows, columns]`, each row by row, as Python's `pickle.load` reads it with numpy 1 and 2
/// (protocol 3). Fails where an array has over 2^31 rows or 4 GiB; panics where a shape does not fit its numbers.
pub fn write_f32_arrays<A: AsRef<[f32]>>(arrays: impl IntoIterator<Item = (usize, usize, A)>, out: &mut impl Write) -> io::Result<()> {
    // Protocol 3, an empty list, and a mark for its items.
    out.write_all(b"\x80\x03](")?;
    for (rows, columns, numbers) in arrays {
        let numbers = numbers.as_ref();
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
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        out.write_all(&bytes)?;
        out.write_all(b"tb")?;
    }
    out.write_all(b"e.")
}

/// An array for [`write_arrays`].
#[derive(Debug, Clone)]
pub struct Pieces<'a> {
    /// Byte order, type and size in bytes: `<f4`.
    pub dtype: &'a str,
    /// Length of each axis; at least one.
    pub shape: Vec<usize>,
    /// The numbers in C order, piece by piece.
    pub pieces: Vec<&'a [u8]>,
}

/// Writes a dict of arrays, byte for byte as Python 3 with numpy 1 does in protocol 2, which `torch.save` uses.
///
/// That protocol has no bytes: numbers become text of Latin-1 characters in UTF-8, about one and a half times as long. Fails for an array
/// whose text has 4 GiB or more, and where `out` does; panics where a shape does not fit its numbers.
pub fn write_arrays(arrays: &[(&str, Pieces<'_>)], out: &mut impl Write) -> io::Result<()> {
    let mut pickler = Pickler { out, memo: HashMap::new(), n_memorised: 0 };
    // Protocol 2, an empty dict, and a mark for its entries.
    pickler.put(b"\x80\x02}")?;
    pickler.memorise("the dict")?;
    pickler.put(b"(")?;
    for (name, array) in arrays {
        pickler.text(name)?;
        pickler.array(array)?;
    }
    pickler.put(b"u.")
}

/// Writes values as Python does, which memorises nearly all of them, and refers to those that it meets again.
struct Pickler<'a, W> {
    out: &'a mut W,
    /// Values that may be met again.
    memo: HashMap<String, u32>,
    n_memorised: u32,
}

impl<W: Write> Pickler<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    fn memorise(&mut self, value: impl Into<String>) -> io::Result<()> {
        let place = self.n_memorised;
        self.memo.insert(value.into(), place);
        self.n_memorised += 1;
        self.with_place(place, b'q', b'r')
    }

    /// Refers to a value if it was memorised.
    fn recall(&mut self, value: &str) -> io::Result<bool> {
        let Some(place) = self.memo.get(value).copied() else { return Ok(false) };
        self.with_place(place, b'h', b'j')?;
        Ok(true)
    }

    fn with_place(&mut self, place: u32, short: u8, long: u8) -> io::Result<()> {
        match u8::try_from(place) {
            Ok(place) => self.put(&[short, place]),
            Err(_) => {
                self.put(&[long])?;
                self.put(&place.to_le_bytes())
            }
        }
    }

    fn global(&mut self, module: &str, name: &str) -> io::Result<()> {
        let both = format!("{module}\n{name}\n");
        if self.recall(&both)? {
            return Ok(());
        }
        self.put(b"c")?;
        self.put(both.as_bytes())?;
        self.memorise(both)
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        let key = format!("text {text}");
        if self.recall(&key)? {
            return Ok(());
        }
        self.length_of_text(text.len())?;
        self.put(text.as_bytes())?;
        self.memorise(key)
    }

    fn length_of_text(&mut self, n_bytes: usize) -> io::Result<()> {
        let length = u32::try_from(n_bytes).map_err(|_| {
            let problem = format!("an array of {n_bytes} bytes as text, and pickles hold less than 4 GiB");
            io::Error::new(io::ErrorKind::InvalidInput, problem)
        })?;
        self.put(b"X")?;
        self.put(&length.to_le_bytes())
    }

    fn integer(&mut self, number: usize) -> io::Result<()> {
        match (u8::try_from(number), u16::try_from(number), i32::try_from(number)) {
            (Ok(number), ..) => self.put(&[b'K', number]),
            (_, Ok(number), _) => {
                self.put(b"M")?;
                self.put(&number.to_le_bytes())
            }
            (.., Ok(number)) => {
                self.put(b"J")?;
                self.put(&number.to_le_bytes())
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("an axis of {number} items"))),
        }
    }

    /// `_codecs.encode(text, 'latin1')` of bytes.
    fn bytes(&mut self, pieces: &[&[u8]]) -> io::Result<()> {
        self.global("_codecs", "encode")?;
        let is_long = |byte: &&u8| !byte.is_ascii();
        self.length_of_text(pieces.iter().map(|piece| piece.len() + piece.iter().filter(is_long).count()).sum())?;
        let mut utf8 = Vec::new();
        for piece in pieces {
            utf8.clear();
            for byte in *piece {
                if byte.is_ascii() {
                    utf8.push(*byte);
                } else {
                    utf8.extend([0xc0 | byte >> 6, 0x80 | byte & 0x3f]);
                }
            }
            self.put(&utf8)?;
        }
        self.memorise("a text")?;
        self.text("latin1")?;
        self.put(b"\x86")?;
        self.memorise("the arguments of encode")?;
        self.put(b"R")
    }

    fn dtype(&mut self, dtype: &str) -> io::Result<()> {
        if self.recall(dtype)? {
            return Ok(());
        }
        let (order, name) = dtype.split_at(1);
        self.global("numpy", "dtype")?;
        self.text(name)?;
        self.put(b"\x89\x88\x87")?;
        self.memorise("the arguments of a dtype")?;
        self.put(b"R")?;
        self.memorise(dtype)?;
        self.put(b"(K\x03")?;
        self.text(order)?;
        self.put(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t")?;
        self.memorise("the state of a dtype")?;
        self.put(b"b")
    }

    fn array(&mut self, Pieces { dtype, shape, pieces }: &Pieces<'_>) -> io::Result<()> {
        let item_bytes: usize = dtype.get(2..).and_then(|size| size.parse().ok()).expect("BUG: a dtype such as `<f4`");
        let n_bytes = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        assert_eq!(shape.iter().product::<usize>() * item_bytes, n_bytes, "BUG: an array of another shape");
        self.global("numpy.core.multiarray", "_reconstruct")?;
        self.global("numpy", "ndarray")?;
        self.put(b"K\x00\x85")?;
        self.memorise("the shape before the state")?;
        if !self.recall("b as bytes")? {
            self.bytes(&[b"b"])?;
            self.memorise("b as bytes")?;
        }
        self.put(b"\x87")?;
        self.memorise("the arguments of an array")?;
        self.put(b"R")?;
        self.memorise("an array")?;
        self.put(b"(K\x01")?;
        if shape.len() > 3 {
            self.put(b"(")?;
        }
        shape.iter().try_for_each(|length| self.integer(*length))?;
        self.put(match shape.len() {
            1 => b"\x85",
            2 => b"\x86",
            3 => b"\x87",
            _ => b"t",
        })?;
        self.memorise("a shape")?;
        self.dtype(dtype)?;
        self.put(b"\x89")?;
        self.bytes(pieces)?;
        self.memorise("bytes")?;
        self.put(b"t")?;
        self.memorise("the state of an array")?;
        self.put(b"b")
    }
}
