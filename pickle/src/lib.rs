//! Reads Python pickles as plain data, without Python and without executing anything, and writes lists of numpy arrays.
//!
//! A pickle is a program for a stack machine. This reader runs the machine, but where Python would call a function or build
//! an object it keeps what would have been called and with what ([`Value::Object`]). That is enough for the two kinds of
//! files the field keeps in pickles: lists of numpy arrays, and `torch.save` state dicts.
//!
//! Protocols 0 to 5. Not supported, and refused in words: out-of-band buffers and extension codes.

mod machine;
mod numpy;

pub use machine::read;
pub use numpy::{NumpyArray, write_f32_arrays};

/// Why bytes are not a pickle this reader understands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: {problem}")]
pub struct Error {
    /// Where in the file.
    pub offset: usize,
    /// What was expected and what was found.
    pub problem: String,
}

/// What a pickle holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// `True`, `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer, little-endian two's complement.
    BigInt(Vec<u8>),
    /// A float.
    Float(f64),
    /// Text.
    Str(String),
    /// `bytes` or `bytearray`, and the `str` of Python 2.
    Bytes(Vec<u8>),
    /// A list.
    List(Vec<Self>),
    /// A tuple.
    Tuple(Vec<Self>),
    /// A set or frozenset, in the file's order.
    Set(Vec<Self>),
    /// A dict or `OrderedDict`, in the file's order.
    Dict(Vec<(Self, Self)>),
    /// A class or function, by name.
    Global {
        /// Such as `torch._utils`.
        module: String,
        /// Such as `_rebuild_tensor_v2`.
        name: String,
    },
    /// What calling something would have made.
    Object(Box<Object>),
    /// A reference to something outside the pickle: a storage of `torch.save`.
    Persistent(Box<Self>),
}

/// What Python would have built by a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// What would have been called: mostly a [`Value::Global`].
    pub callable: Value,
    /// With which arguments.
    pub args: Vec<Value>,
    /// What `__setstate__` would have been given.
    pub state: Option<Value>,
    /// Items that would have been appended.
    pub items: Vec<Value>,
    /// Items that would have been set by key.
    pub entries: Vec<(Value, Value)>,
}

impl Value {
    /// The text, if this is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The integer, if it is one of 64 bits.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn as_items(&self) -> Option<&[Self]> {
        match self {
            Self::List(items) | Self::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The entries of a dict, or of an object that is one (`OrderedDict`, `defaultdict`).
    pub fn as_entries(&self) -> Option<&[(Self, Self)]> {
        match self {
            Self::Dict(entries) => Some(entries),
            Self::Object(object) if object.is_mapping() => Some(&object.entries),
            _ => None,
        }
    }

    /// The value at a text key of a dict.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_entries()?.iter().find(|(known, _)| known.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// Whether this is the class or function `module.name`.
    pub fn is_global(&self, module: &str, name: &str) -> bool {
        matches!(self, Self::Global { module: m, name: n } if m == module && n == name)
    }
}

impl Object {
    fn is_mapping(&self) -> bool {
        self.callable.is_global("collections", "OrderedDict") || self.callable.is_global("collections", "defaultdict")
    }
}
