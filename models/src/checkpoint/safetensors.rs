//! safetensors: the length of a header (u64, little-endian), the header (JSON: `dtype`, `shape` and `data_offsets` by name, and
//! text under `__metadata__`), the numbers (little-endian, in C order, without gaps).

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use tch::{Kind, Tensor};

use super::{Source, n_bytes, numbers};
use crate::Result;

/// As the reference implementation, against headers that fill the memory.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// Names in the header, in the order that the reference implementation writes tensors in: wide numbers first.
const KINDS: [(&str, Kind); 10] = [
    ("I64", Kind::Int64),
    ("F64", Kind::Double),
    ("F32", Kind::Float),
    ("I32", Kind::Int),
    ("BF16", Kind::BFloat16),
    ("F16", Kind::Half),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Entry)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<i64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = std::collections::BTreeSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name}: two tensors of this name")));
                    }
                    match name.as_str() {
                        METADATA => header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default(),
                        _ => header.tensors.push((name, map.next_value()?)),
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// The text and the tensors of a file.
pub(super) fn read(mut source: Source<'_>) -> Result<(BTreeMap<String, String>, BTreeMap<String, Tensor>)> {
    let origin = source.origin;
    let length = source.take(8, "header")?;
    let length = u64::from_le_bytes(length.try_into().expect("BUG: as many bytes were taken"));
    if length > MAX_HEADER_BYTES {
        return Err(origin.damaged(format!("header: expected at most {MAX_HEADER_BYTES} bytes, found {length}")));
    }
    let header = source.take(length, "header")?;
    let Header { metadata, tensors: mut entries } =
        serde_json::from_slice(&header).map_err(|error| origin.damaged(format!("header: {error}")))?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut tensors = BTreeMap::new();
    let mut at = 0;
    for (name, Entry { dtype, shape, data_offsets: [begin, end] }) in entries {
        let Some((_, kind)) = KINDS.into_iter().find(|(known, _)| *known == dtype) else {
            let problem = format!("{name}: numbers of type {dtype} are not supported");
            return Err(origin.malformed(problem, "convert the tensor to F32, F16 or BF16"));
        };
        let n_bytes =
            shape.iter().try_fold(kind.elt_size_in_bytes() as u64, |n_bytes, length| n_bytes.checked_mul(u64::try_from(*length).ok()?));
        if n_bytes.is_none() || end.checked_sub(begin) != n_bytes {
            return Err(origin.damaged(format!("{name}: a tensor {shape:?} of {dtype} at bytes {begin} to {end}, which do not fit")));
        }
        if begin != at {
            return Err(origin.damaged(format!("{name}: expected numbers from byte {at}, found them from byte {begin}")));
        }
        let bytes = source.take(end - begin, &name)?;
        tensors.insert(name, Tensor::f_from_data_size(&bytes, &shape, kind)?);
        at = end;
    }
    let n_rest = origin.n_bytes - 8 - length - at;
    if n_rest > 0 {
        return Err(origin.damaged(format!("expected the end of the file after the numbers, found {n_rest} more bytes")));
    }
    Ok((metadata, tensors))
}

/// Writes tensors and text as safetensors; equal contents give equal bytes, the same that the reference implementation writes.
///
/// Tensors may be on any device and of any strides. Fails for types that safetensors has no name for, and where `out` does.
pub fn write_safetensors(tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>, out: &mut impl Write) -> io::Result<()> {
    let mut ordered = Vec::new();
    for (name, tensor) in tensors {
        let place = KINDS.iter().position(|(_, kind)| *kind == tensor.kind());
        let refused = || io::Error::new(io::ErrorKind::InvalidInput, format!("{name}: safetensors has no type for {:?}", tensor.kind()));
        ordered.push((place.ok_or_else(refused)?, name, tensor));
    }
    // Stable: by name within a type.
    ordered.sort_by_key(|(place, ..)| *place);
    let mut parts = Vec::new();
    if !metadata.is_empty() {
        parts.push(format!("{}:{}", serde_json::to_string(METADATA)?, serde_json::to_string(metadata)?));
    }
    let mut at = 0;
    for (place, name, tensor) in &ordered {
        let end = at + n_bytes(tensor);
        let (name, shape) = (serde_json::to_string(name)?, serde_json::to_string(&tensor.size())?);
        parts.push(format!("{name}:{{\"dtype\":\"{}\",\"shape\":{shape},\"data_offsets\":[{at},{end}]}}", KINDS[*place].0));
        at = end;
    }
    let mut header = format!("{{{}}}", parts.join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for (_, _, tensor) in ordered {
        out.write_all(&numbers(tensor)?)?;
    }
    Ok(())
}
