//! Reads Python pickles as plain data, without Python and without executing anything, and writes lists and dicts of numpy arrays.
//!
//! A pickle is a program for a stack machine. This reader runs the machine, but where Python would call a function or build
//! an object it keeps what would have been called and with what ([`Value::Object`]). That is enough for the two kinds of
//! files the field keeps in pickles: lists of numpy arrays, and `torch.save` state dicts. What older protocols can only write
//! as calls (bytes, sets, ordered dicts filled by their constructor) is read as what it is.
//!
//! Protocols 0 to 5. Not supported, and refused in words: out-of-band buffers, extension codes, and text with lone surrogates.
//!
//! A file cannot take more memory than a small multiple of its size: what it refers to twice is kept once (and compares and
//! walks as if it were there twice, up to a limit), lengths are checked against the bytes that are left, depth is limited,
//! and a value inside itself is cut off by [`Value::Circle`].

mod machine;
mod numpy;
mod opcode;

use std::sync::Arc;

pub use machine::{read, read_first};
pub use numpy::{NumpyArray, Pieces, write_arrays, write_f32_arrays};

/// Why bytes are not a pickle this reader understands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}{}: {problem}", .opcode.map(|opcode| format!(" ({opcode})")).unwrap_or_default())]
pub struct Error {
    /// Where in the file: the opcode that could not be carried out.
    pub offset: usize,
    /// Its name in Python's `pickletools`; none where there is no opcode, or none of that number.
    pub opcode: Option<&'static str>,
    /// What was expected and what was found.
    pub problem: String,
}

/// A value of a pickle. Clones are cheap: the contents are shared.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// `True`, `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer, little-endian two's complement.
    BigInt(Arc<[u8]>),
    /// A float.
    Float(f64),
    /// Text, and the `str` of Python 2 where it is UTF-8.
    Str(Arc<str>),
    /// `bytes` or `bytearray`, and the `str` of Python 2 where it is not UTF-8.
    Bytes(Arc<[u8]>),
    /// A list.
    List(Arc<[Self]>),
    /// A tuple.
    Tuple(Arc<[Self]>),
    /// A set or frozenset, in the file's order.
    Set(Arc<[Self]>),
    /// A dict, in the file's order. A key that is set twice is there twice.
    Dict(Arc<[(Self, Self)]>),
    /// A class or function, by name.
    Global {
        /// Such as `torch._utils`.
        module: Arc<str>,
        /// Such as `_rebuild_tensor_v2`.
        name: Arc<str>,
    },
    /// The result of a call that was not made.
    Object(Arc<Object>),
    /// A reference to something outside the pickle: a storage of `torch.save`.
    Persistent(Arc<Self>),
    /// A reference to a value from within itself.
    Circle,
}

/// An object that Python would have built by a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// The callable: mostly a [`Value::Global`].
    pub callable: Value,
    /// With which positional arguments.
    pub args: Arc<[Value]>,
    /// With which named arguments: a dict, mostly none.
    pub kwargs: Option<Value>,
    /// The argument of `__setstate__`, or the attributes.
    pub state: Option<Value>,
    /// Items that would have been appended.
    pub items: Arc<[Value]>,
    /// Items that would have been set by key, in the file's order.
    pub entries: Arc<[(Value, Value)]>,
}

impl Value {
    /// The text, if this is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The bytes, if these are bytes.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The integer, if it is one of 64 bits; of a bool 0 or 1, as in Python.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    /// The number, if this is a float or an integer of 64 bits; large integers are rounded.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => self.as_int().map(|value| value as f64),
        }
    }

    /// The items of a list or tuple.
    pub fn as_items(&self) -> Option<&[Self]> {
        match self {
            Self::List(items) | Self::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The items, if this is a list.
    pub fn as_list(&self) -> Option<&[Self]> {
        match self {
            Self::List(items) => Some(items),
            _ => None,
        }
    }

    /// The callable, if this is the result of a call.
    pub fn as_object(&self) -> Option<&Object> {
        match self {
            Self::Object(object) => Some(object),
            _ => None,
        }
    }

    /// The entries of a dict, or of an object that is one (`OrderedDict`, `defaultdict`, any class that entries are set in).
    pub fn as_entries(&self) -> Option<&[(Self, Self)]> {
        match self {
            Self::Dict(entries) => Some(entries),
            Self::Object(object) if object.is_mapping() => Some(&object.entries),
            _ => None,
        }
    }

    /// The value at a text key of a dict; the last one where the key is set twice, as in Python.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_entries()?.iter().rev().find(|(known, _)| known.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// Whether this is the class or function `module.name`.
    pub fn is_global(&self, module: &str, name: &str) -> bool {
        matches!(self, Self::Global { module: m, name: n } if **m == *module && **n == *name)
    }

    /// The kind of this value for messages: `a list`, `an object of torch.nn.modules.linear.Linear`.
    pub fn kind(&self) -> String {
        let kind = match self {
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
            Self::Global { module, name } => return format!("the class or function {module}.{name}"),
            Self::Object(object) => match &object.callable {
                Self::Global { module, name } => return format!("an object of {module}.{name}"),
                _ => "an object",
            },
            Self::Persistent(_) => "a reference to something outside",
            Self::Circle => "a reference to what contains it",
        };
        kind.into()
    }
}

impl Object {
    fn is_mapping(&self) -> bool {
        let is_known = ["OrderedDict", "defaultdict", "Counter"].into_iter().any(|name| self.callable.is_global("collections", name));
        is_known || !self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests;
