//! Files of `torch.save`: a pickle that describes tensors, and their storages.
//!
//! An archive is a zip of stored entries under one folder: `data.pkl`, `data/KEY` for each storage, `code/` in TorchScript.
//! Before PyTorch 1.6 a file was five pickles (a magic number, a version, the machine, the value, the keys of the storages)
//! and then, for each key, the number of numbers (i64) and the numbers. Everything is little-endian.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    path::Path,
};

use ovenbird_pickle::Value;
use tch::{Kind, Tensor};
use zip::{
    CompressionMethod, ZipWriter,
    write::{SimpleFileOptions, StreamWriter},
};

use super::{AGAIN, Array, BARE_TENSOR, Format, Origin, Source, ZIP_MARK, numbers};
use crate::{Error, Result};

/// 0x1950a86a20f9469cfc6c, as Python pickles it.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// How much of an old file is first read for its pickles.
const PICKLES_BYTES: u64 = 4 << 20;
const SAVE_AGAIN: &str = "load it with PyTorch and save `model.state_dict()` with torch.save or safetensors";

/// PyTorch's names of storages.
const STORAGES: [(&str, Kind); 10] = [
    ("FloatStorage", Kind::Float),
    ("HalfStorage", Kind::Half),
    ("BFloat16Storage", Kind::BFloat16),
    ("DoubleStorage", Kind::Double),
    ("LongStorage", Kind::Int64),
    ("IntStorage", Kind::Int),
    ("ShortStorage", Kind::Int16),
    ("CharStorage", Kind::Int8),
    ("ByteStorage", Kind::Uint8),
    ("BoolStorage", Kind::Bool),
];

/// A tensor as a pickle describes it.
#[derive(Debug)]
struct Description {
    storage: Storage,
    offset: i64,
    size: Vec<i64>,
    stride: Vec<i64>,
}

#[derive(Debug)]
struct Storage {
    key: String,
    kind: Kind,
    n_numbers: i64,
}

/// The content of a file.
pub(super) struct Contents {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// The content of a zip archive as its pickle describes it.
struct Described {
    format: Format,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Description>,
}

/// The contents of a zip archive.
pub(super) fn from_zip(source: Source<'_>) -> Result<(Format, Contents)> {
    let mut archive = Archive::open(source)?;
    let Described { format, metadata, tensors: described } = archive.described()?;
    let mut tensors = BTreeMap::new();
    for (key, group) in by_storage(described) {
        let (first, Description { storage, .. }) = &group[0];
        let bytes = archive.storage(&key, first)?;
        let flat = flat(archive.origin, first, storage, &bytes)?;
        cut(archive.origin, &flat, group, &mut tensors)?;
    }
    Ok((format, Contents { metadata, tensors }))
}

/// The same as plain numbers.
pub(super) fn arrays_from_zip<R: Read + Seek>(source: Source<'_, R>) -> Result<BTreeMap<String, Array>> {
    let mut archive = Archive::open(source)?;
    let described = archive.described()?.tensors;
    let array = |(name, description): (String, Description)| {
        let bytes = archive.storage(&description.storage.key, &name)?;
        check_length(archive.origin, &name, &description.storage, bytes.len())?;
        let array = gathered(description, bytes);
        Ok((name, array))
    };
    described.into_iter().map(array).collect()
}

/// Opens a zip archive: the value in it, whatever it is, and the tensors that it refers to.
pub(super) fn opened(path: &Path) -> Result<(Value, Tensors<'_>)> {
    let (source, head) = Source::open(path)?;
    if !head.starts_with(ZIP_MARK) {
        return Err(source.origin.unrecognised(&head));
    }
    let mut archive = Archive::open(source)?;
    let value = archive.value()?;
    let mut n_uses = BTreeMap::new();
    visit(&value, &mut |part| {
        if let Some(Ok(storage)) = storage(part) {
            *n_uses.entry(storage.key).or_default() += 1;
        }
    });
    Ok((value, Tensors { archive, n_uses, shared: BTreeMap::new() }))
}

/// The tensors that the value in an archive refers to.
pub(super) struct Tensors<'a> {
    archive: Archive<'a, BufReader<File>>,
    /// How often the value refers to each storage.
    n_uses: BTreeMap<String, usize>,
    /// Storages of several tensors, which are read once.
    shared: BTreeMap<String, Vec<u8>>,
}

impl<'a> Tensors<'a> {
    /// The file.
    pub(super) fn origin(&self) -> Origin<'a> {
        self.archive.origin
    }

    /// The tensor that a value of this file describes; `None` where it is none. `name`: where the value is, for messages.
    pub(super) fn array(&mut self, name: &str, value: &Value) -> Result<Option<Array>> {
        let Some(description) = describe(value) else { return Ok(None) };
        let origin = self.archive.origin;
        let description = description.map_err(|problem| origin.malformed(format!("{name}: {problem}"), SAVE_AGAIN))?;
        check(&description, origin.n_bytes).map_err(|problem| origin.damaged(format!("{name}: {problem}")))?;
        let key = &description.storage.key;
        if self.n_uses.get(key).is_none_or(|n_uses| *n_uses == 1) {
            let bytes = self.archive.storage(key, name)?;
            check_length(origin, name, &description.storage, bytes.len())?;
            return Ok(Some(gathered(description, bytes)));
        }
        if !self.shared.contains_key(key) {
            self.shared.insert(key.clone(), self.archive.storage(key, name)?);
        }
        let bytes = &self.shared[key];
        check_length(origin, name, &description.storage, bytes.len())?;
        Ok(Some(gathered(description, bytes)))
    }
}

/// A tensor's numbers out of its storage, which [`check`] found to hold them.
fn gathered<'a>(Description { storage, offset, size, stride }: Description, bytes: impl Into<Cow<'a, [u8]>>) -> Array {
    let bytes = bytes.into();
    let item = storage.kind.elt_size_in_bytes();
    let n_numbers = size.iter().product::<i64>() as usize;
    let in_order = c_strides(&size).iter().zip(&stride).zip(&size).all(|((expected, step), length)| expected == step || *length == 1);
    let numbers = if n_numbers == 0 {
        Vec::new()
    } else if in_order {
        let start = offset as usize * item;
        match bytes {
            Cow::Owned(bytes) if bytes.len() == n_numbers * item => bytes,
            bytes => bytes[start..start + n_numbers * item].to_vec(),
        }
    } else {
        let place = |flat: i64| {
            let step = |(rest, at), (length, step): (&i64, &i64)| (rest / length, at + rest % length * step);
            size.iter().zip(&stride).rev().fold((flat, offset), step).1 as usize
        };
        (0..n_numbers as i64).flat_map(|flat| &bytes[place(flat) * item..][..item]).copied().collect()
    };
    Array { kind: storage.kind, shape: size, bytes: numbers }
}

/// How far apart neighbours on each axis are when the last axis runs fastest.
fn c_strides(size: &[i64]) -> Vec<i64> {
    let mut strides: Vec<i64> = size.iter().rev().scan(1, |step, length| Some(std::mem::replace(step, *step * (*length).max(1)))).collect();
    strides.reverse();
    strides
}

/// The contents of a file from before PyTorch 1.6.
pub(super) fn from_pickles(mut source: Source<'_>) -> Result<Contents> {
    let (value, keys, end) = pickles(&mut source)?;
    let found = Found::in_dict(&value).described(source.origin)?;
    // Storages without a tensor among the weights lie between the others.
    let mut storages = BTreeMap::new();
    visit(&value, &mut |part| {
        if let Some(Ok(storage)) = storage(part) {
            storages.insert(storage.key.clone(), storage);
        }
    });
    let mut groups = by_storage(found);
    let mut tensors = BTreeMap::new();
    source.file.seek(SeekFrom::Start(end)).map_err(|error| source.origin.read(error))?;
    for key in keys {
        let Some(storage) = storages.get(&key) else {
            return Err(source.origin.damaged(format!("storage {key}: expected its type in the pickle, found none")));
        };
        let group = groups.remove(&key);
        let name = group.as_ref().map_or_else(|| format!("storage {key}"), |group| group[0].0.clone());
        let n_numbers = source.take(8, &name)?;
        let n_numbers = i64::from_le_bytes(n_numbers.try_into().expect("BUG: as many bytes were taken"));
        if n_numbers != storage.n_numbers {
            return Err(source.origin.damaged(format!("{name}: expected a storage of {} numbers, found {n_numbers}", storage.n_numbers)));
        }
        let bytes = source.take((n_numbers as u64).saturating_mul(storage.kind.elt_size_in_bytes() as u64), &name)?;
        if let Some(group) = group {
            let flat = flat(source.origin, &name, storage, &bytes)?;
            cut(source.origin, &flat, group, &mut tensors)?;
        }
    }
    match groups.into_iter().next() {
        Some((key, group)) => Err(source.origin.damaged(format!("{}: expected a storage {key}, found none", group[0].0))),
        None => Ok(Contents { metadata: plain(&value), tensors }),
    }
}

/// Texts, numbers, and as JSON lists of texts, by dotted name.
fn plain(value: &Value) -> BTreeMap<String, String> {
    fn add(value: &Value, prefix: &str, found: &mut BTreeMap<String, String>) {
        for (key, value) in value.as_entries().into_iter().flatten() {
            let Some(key) = key.as_str() else { continue };
            let name = format!("{prefix}{key}");
            match text(value) {
                Some(text) => drop(found.insert(name, text)),
                None => add(value, &format!("{name}."), found),
            }
        }
    }
    fn text(value: &Value) -> Option<String> {
        match value {
            Value::Str(text) => Some(text.to_string()),
            Value::Int(number) => Some(number.to_string()),
            Value::Float(number) => Some(number.to_string()),
            list => {
                let texts = list.as_items()?.iter().map(Value::as_str).collect::<Option<Vec<&str>>>()?;
                Some(serde_json::to_string(&texts).expect("BUG: texts are plain JSON"))
            }
        }
    }
    let mut found = BTreeMap::new();
    add(value, "", &mut found);
    found
}

/// The value of an old file, the keys of its storages in their order, and where they begin.
fn pickles(source: &mut Source<'_>) -> Result<(Value, Vec<String>, u64)> {
    let mut limit = PICKLES_BYTES;
    let mut bytes = Vec::new();
    loop {
        let read = source.file.by_ref().take(limit - bytes.len() as u64).read_to_end(&mut bytes);
        read.map_err(|error| source.origin.read(error))?;
        match five_pickles(&bytes) {
            Ok((value, keys, end)) => return Ok((value, keys, end as u64)),
            // The pickles may be longer than what was read.
            Err(_) if limit < source.origin.n_bytes => limit *= 4,
            Err((problem, hint)) => return Err(source.origin.malformed(problem, hint)),
        }
    }
}

fn five_pickles(bytes: &[u8]) -> Result<(Value, Vec<String>, usize), (String, &'static str)> {
    let mut end = 0;
    let mut next = |what: &str| {
        let (value, length) =
            ovenbird_pickle::read_first(&bytes[end..]).map_err(|error| (format!("{what}, from byte {end}: {error}"), AGAIN))?;
        end += length;
        Ok::<_, (String, _)>(value)
    };
    if !matches!(next("the magic number")?, Value::BigInt(magic) if *magic == LEGACY_MAGIC) {
        return Err(("expected a file of torch.save, found another pickle".into(), SAVE_AGAIN));
    }
    let _version = next("the version")?;
    if next("the machine")?.get("little_endian") == Some(&Value::Bool(false)) {
        return Err(("expected little-endian numbers, found big-endian".into(), SAVE_AGAIN));
    }
    let value = next("the value")?;
    let keys = next("the keys of the storages")?;
    let keys = keys.as_list().and_then(|keys| keys.iter().map(|key| key.as_str().map(str::to_owned)).collect());
    let keys = keys.ok_or_else(|| ("expected a list of keys of storages, found something else".to_owned(), AGAIN))?;
    Ok((value, keys, end))
}

struct Archive<'a, R> {
    origin: Origin<'a>,
    zip: zip::ZipArchive<R>,
    prefix: String,
}

impl<'a, R: Read + Seek> Archive<'a, R> {
    fn open(mut source: Source<'a, R>) -> Result<Self> {
        let origin = source.origin;
        let n_entries = n_entries(&mut source.file).map_err(|error| origin.read(error))?;
        let zip = zip::ZipArchive::new(source.file).map_err(|error| origin.damaged(format!("zip: {error}")))?;
        if let Some(n_entries) = n_entries.filter(|n_entries| *n_entries != zip.len()) {
            return Err(origin.damaged(format!("zip: expected {n_entries} entries of different names, found {}", zip.len())));
        }
        let folder =
            |name: &str| name.strip_suffix("data.pkl").filter(|folder| folder.is_empty() || folder.ends_with('/')).map(str::to_owned);
        let Some(prefix) = zip.file_names().filter_map(folder).min_by_key(String::len) else {
            return Err(origin
                .malformed("expected an archive with data.pkl, found one without".into(), "give what torch.save or torch.jit.save wrote"));
        };
        Ok(Self { origin, zip, prefix })
    }

    fn has(&self, name: &str) -> bool {
        self.zip.index_for_name(&format!("{}{name}", self.prefix)).is_some()
    }

    /// The value of the pickle.
    fn value(&mut self) -> Result<Value> {
        if self.has("byteorder") && self.entry("byteorder")? == b"big" {
            return Err(self.origin.malformed("expected little-endian numbers, found big-endian".into(), SAVE_AGAIN));
        }
        let pickle = self.entry("data.pkl")?;
        ovenbird_pickle::read(&pickle).map_err(|error| self.origin.damaged(format!("data.pkl: {error}")))
    }

    /// The tensors that the pickle describes.
    fn described(&mut self) -> Result<Described> {
        let value = self.value()?;
        let format = if self.is_script() { Format::TorchScript } else { Format::Torch };
        let found = match format {
            Format::TorchScript => Found::in_module(&value),
            _ => Found::in_dict(&value),
        };
        Ok(Described { format, metadata: plain(&value), tensors: found.described(self.origin)? })
    }

    /// The bytes of a storage; `name`: of a tensor in it, for messages.
    fn storage(&mut self, key: &str, name: &str) -> Result<Vec<u8>> {
        self.entry(&format!("data/{key}")).map_err(|error| match error {
            Error::Malformed { path, problem, hint } => Error::Malformed { path, problem: format!("{name}: {problem}"), hint },
            other => other,
        })
    }

    fn is_script(&self) -> bool {
        let code = format!("{}code/", self.prefix);
        self.zip.file_names().any(|name| name.starts_with(&code))
    }

    /// The bytes of an entry, checked against their CRC.
    fn entry(&mut self, name: &str) -> Result<Vec<u8>> {
        let name = format!("{}{name}", self.prefix);
        let mut bytes = Vec::new();
        let read = match self.zip.by_name(&name) {
            Ok(entry) if entry.compression() != CompressionMethod::Stored => {
                return Err(self.origin.malformed(format!("{name}: expected an entry as it is, found a compressed one"), SAVE_AGAIN));
            }
            Ok(mut entry) => {
                bytes.reserve_exact(entry.size().min(self.origin.n_bytes) as usize);
                entry.read_to_end(&mut bytes).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.origin.damaged(format!("{name}: {error}"))),
        }
    }
}

/// How many entries a zip says it has; the reader keeps one of each name. None where there are too many for the field, or a
/// comment follows it.
fn n_entries(file: &mut (impl Read + Seek)) -> io::Result<Option<usize>> {
    let mut end = Vec::new();
    if file.seek(SeekFrom::End(0))? >= 22 {
        file.seek(SeekFrom::End(-22))?;
        file.read_to_end(&mut end)?;
    }
    file.rewind()?;
    Ok(match end.as_slice() {
        [b'P', b'K', 5, 6, _, _, _, _, _, _, low, high, ..] => Some(usize::from(u16::from_le_bytes([*low, *high]))),
        _ => None,
    }
    .filter(|n_entries| *n_entries != usize::from(u16::MAX)))
}

/// Tensors that were found in a pickle, and the message if there are none.
struct Found {
    tensors: Vec<(String, Result<Description, String>)>,
    none: String,
}

impl Found {
    /// In the dicts of `torch.save`, or the one tensor that takes their place.
    fn in_dict(value: &Value) -> Self {
        /// An optimizer's tensors are none of a network, and twice as many.
        fn entries_of_weights(value: &Value) -> Option<&[(Value, Value)]> {
            value.as_entries().filter(|_| value.get("param_groups").is_none())
        }
        let keys: Vec<&str> = value.as_entries().into_iter().flatten().filter_map(|(key, _)| key.as_str()).take(8).collect();
        let none = format!("expected a dict of tensors, found {} with the keys {keys:?}", value.kind());
        let mut tensors = Vec::new();
        match describe(value) {
            Some(description) => tensors.push((BARE_TENSOR.to_owned(), description)),
            None => collect(value, "", entries_of_weights, &mut tensors),
        }
        Self { tensors, none }
    }

    /// Among the attributes of the modules of TorchScript.
    fn in_module(value: &Value) -> Self {
        fn attributes(value: &Value) -> Option<&[(Value, Value)]> {
            value.as_object()?.state.as_ref()?.as_entries()
        }
        let mut tensors = Vec::new();
        collect(value, "", attributes, &mut tensors);
        Self { tensors, none: format!("expected a module with parameters, found {}", value.kind()) }
    }

    /// All tensors, checked for names that occur twice and for layouts that are not supported.
    fn described(self, origin: Origin<'_>) -> Result<BTreeMap<String, Description>> {
        if self.tensors.is_empty() {
            return Err(origin.malformed(self.none, SAVE_AGAIN));
        }
        let mut described = BTreeMap::new();
        for (name, description) in self.tensors {
            let description = description.map_err(|problem| origin.malformed(format!("{name}: {problem}"), SAVE_AGAIN))?;
            check(&description, origin.n_bytes).map_err(|problem| origin.damaged(format!("{name}: {problem}")))?;
            if described.contains_key(&name) {
                return Err(origin.malformed(format!("{name}: two tensors of this name"), SAVE_AGAIN));
            }
            described.insert(name, description);
        }
        Ok(described)
    }
}

/// The entries of a dict, or what takes their place.
type Entries = fn(&Value) -> Option<&[(Value, Value)]>;

fn collect(value: &Value, prefix: &str, entries: Entries, found: &mut Vec<(String, Result<Description, String>)>) {
    for (key, value) in entries(value).into_iter().flatten() {
        let name = match key {
            Value::Str(key) => format!("{prefix}{key}"),
            Value::Int(key) => format!("{prefix}{key}"),
            _ => continue,
        };
        match describe(value) {
            Some(description) => found.push((name, description)),
            None => collect(value, &format!("{name}."), entries, found),
        }
    }
}

/// The tensor that a value describes; none where it is no tensor.
fn describe(value: &Value) -> Option<Result<Description, String>> {
    let object = value.as_object()?;
    rebuilt(&object.callable, &object.args)
}

fn rebuilt(callable: &Value, args: &[Value]) -> Option<Result<Description, String>> {
    let Value::Global { module, name } = callable else { return None };
    match (&**module, &**name, args) {
        // Storage, offset, size, stride, and what does not matter here.
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2", [lies_in, offset, size, stride, ..]) => {
            let numbers = |value: &Value| value.as_items()?.iter().map(Value::as_int).collect::<Option<Vec<i64>>>();
            let described = |storage| {
                let layout = (offset.as_int(), numbers(size), numbers(stride));
                let (Some(offset), Some(size), Some(stride)) = layout else { return Err("a tensor of an unknown layout".to_owned()) };
                Ok(Description { storage, offset, size, stride })
            };
            let storage = storage(lies_in).unwrap_or_else(|| Err("a tensor without a storage".into()));
            Some(storage.and_then(described))
        }
        // A tensor, and flags.
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state", [tensor, ..]) => describe(tensor),
        // A tensor with attributes: which of these functions, a type, its arguments, the attributes.
        ("torch._tensor", "_rebuild_from_type_v2", [function, _, args, ..]) => rebuilt(function, args.as_items()?),
        ("torch._utils", name, _) if name.starts_with("_rebuild") => Some(Err(format!("a tensor made by {name} is not supported"))),
        _ => None,
    }
}

/// The storage that a value refers to: `('storage', type, key, device, numbers)`, and in old files what it is a part of.
fn storage(value: &Value) -> Option<Result<Storage, String>> {
    let Value::Persistent(id) = value else { return None };
    let unknown = || Some(Err("a storage of an unknown layout".into()));
    let Some([_, Value::Global { name: type_name, .. }, key, _, n_numbers, part_of @ ..]) = id.as_items() else { return unknown() };
    let (Some(key), Some(n_numbers)) = (key.as_str(), n_numbers.as_int()) else { return unknown() };
    if !matches!(part_of, [] | [Value::None]) {
        return Some(Err("a storage that is a part of another one is not supported".into()));
    }
    Some(match STORAGES.into_iter().find(|(known, _)| **known == **type_name) {
        Some((_, kind)) => Ok(Storage { key: key.to_owned(), kind, n_numbers }),
        None => Err(format!("numbers of type {type_name} are not supported")),
    })
}

/// Checks that a tensor lies within its storage.
fn check(Description { storage, offset, size, stride }: &Description, n_file_bytes: u64) -> Result<(), String> {
    let non_negative = |numbers: &[i64]| numbers.iter().all(|number| *number >= 0);
    let n_numbers = size.iter().try_fold(1_i64, |n_numbers, length| n_numbers.checked_mul(*length));
    let reach = || {
        let steps = size.iter().zip(stride).map(|(length, step)| (length - 1).checked_mul(*step));
        steps.into_iter().try_fold(*offset, |reach, step| reach.checked_add(step?))
    };
    let end = match n_numbers {
        Some(0) => Some(0),
        _ => reach().and_then(|last| last.checked_add(1)),
    };
    let is_sound = size.len() == stride.len() && *offset >= 0 && non_negative(size) && non_negative(stride);
    let Storage { key, n_numbers: n_stored, .. } = storage;
    match (n_numbers, end) {
        (Some(n_numbers), Some(end)) if is_sound && end <= *n_stored => {
            // A number may be shown many times by a stride of zero.
            if n_numbers as u64 > n_file_bytes.max(1 << 20) {
                return Err(format!("a tensor {size:?}, far larger than the file"));
            }
            Ok(())
        }
        _ => Err(format!("a tensor {size:?} with strides {stride:?} from number {offset} of storage {key}, which holds {n_stored}")),
    }
}

/// Tensors by the storage that they lie in, so that each is read once.
fn by_storage(described: BTreeMap<String, Description>) -> BTreeMap<String, Vec<(String, Description)>> {
    let mut groups: BTreeMap<String, Vec<(String, Description)>> = BTreeMap::new();
    for (name, description) in described {
        groups.entry(description.storage.key.clone()).or_default().push((name, description));
    }
    groups
}

/// A storage as a tensor of one axis.
fn flat(origin: Origin<'_>, name: &str, storage: &Storage, bytes: &[u8]) -> Result<Tensor> {
    check_length(origin, name, storage, bytes.len())?;
    Ok(Tensor::f_from_data_size(bytes, &[storage.n_numbers], storage.kind)?)
}

/// Checks that a storage has as many bytes as its numbers take.
fn check_length(origin: Origin<'_>, name: &str, Storage { key, kind, n_numbers }: &Storage, n_bytes: usize) -> Result<()> {
    let expected = u64::try_from(*n_numbers).ok().and_then(|n_numbers| n_numbers.checked_mul(kind.elt_size_in_bytes() as u64));
    match expected {
        Some(expected) if expected == n_bytes as u64 => Ok(()),
        _ => Err(origin.damaged(format!("{name}: storage {key}: expected {n_numbers} numbers of {kind:?}, found {n_bytes} bytes"))),
    }
}

/// Cuts the tensors of a storage out of it, each with memory of its own.
fn cut(origin: Origin<'_>, flat: &Tensor, group: Vec<(String, Description)>, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let is_only = group.len() == 1;
    for (name, Description { storage, offset, size, stride }) in group {
        if storage.kind != flat.kind() || storage.n_numbers != flat.size()[0] {
            let (Storage { key, kind, n_numbers }, found) = (storage, flat.kind());
            let problem = format!("{name}: storage {key}: expected {n_numbers} numbers of {kind:?}, found {} of {found:?}", flat.numel());
            return Err(origin.damaged(problem));
        }
        let view = flat.f_as_strided(&size, &stride, Some(offset))?;
        let is_whole = view.is_contiguous() && view.numel() == flat.numel();
        let tensor = match (is_whole && is_only, view.is_contiguous()) {
            (true, _) => view,
            (false, true) => view.copy(),
            (false, false) => view.f_contiguous()?,
        };
        tensors.insert(name, tensor);
    }
    Ok(())
}

/// Shows every value within a value to a function.
fn visit(value: &Value, look: &mut impl FnMut(&Value)) {
    look(value);
    match value {
        Value::List(items) | Value::Tuple(items) | Value::Set(items) => items.iter().for_each(|item| visit(item, look)),
        Value::Dict(entries) => entries.iter().for_each(|(key, value)| {
            visit(key, look);
            visit(value, look);
        }),
        Value::Object(object) => {
            let entries = object.entries.iter().flat_map(|(key, value)| [key, value]);
            object
                .args
                .iter()
                .chain(&object.kwargs)
                .chain(&object.state)
                .chain(object.items.iter())
                .chain(entries)
                .for_each(|part| visit(part, look));
        }
        Value::Persistent(id) => visit(id, look),
        Value::None | Value::Bool(_) | Value::Int(_) | Value::BigInt(_) | Value::Float(_) | Value::Str(_) | Value::Bytes(_) => {}
        Value::Global { .. } | Value::Circle => {}
    }
}

/// A value for [`write_torch`].
#[derive(Debug)]
pub enum Saved<'a> {
    /// Numbers.
    Tensor(&'a Tensor),
    /// Numbers that libtorch does not hold.
    Array(&'a Array),
    /// Values by name.
    Dict(BTreeMap<String, Self>),
    /// Values in order.
    List(Vec<Self>),
    /// Text.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// A real number.
    Real(f64),
    /// `True` or `False`.
    Bool(bool),
    /// `None`.
    Nothing,
}

impl From<&serde_json::Value> for Saved<'_> {
    fn from(value: &serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Nothing,
            serde_json::Value::Bool(is) => Self::Bool(*is),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => Self::Integer(number),
                (None, number) => Self::Real(number.unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Self::Text(text.clone()),
            serde_json::Value::Array(values) => Self::List(values.iter().map(Self::from).collect()),
            serde_json::Value::Object(entries) => Self::Dict(entries.iter().map(|(key, value)| (key.clone(), value.into())).collect()),
        }
    }
}

/// Writes what `torch.load(weights_only=True)` and [`super::Checkpoint`] read; equal contents give equal bytes.
///
/// Tensors may be on any device and of any strides; each gets a storage of its own, on the CPU. Fails for types that PyTorch has no storage
/// for, and where `out` does.
pub fn write_torch(value: &Saved<'_>, out: impl Write) -> io::Result<()> {
    let mut pickler = Pickler { bytes: vec![0x80, 2], storages: Vec::new() };
    pickler.add("", value)?;
    pickler.bytes.push(b'.');
    let Pickler { bytes: pickle, storages } = pickler;

    let mut zip = ZipWriter::new_stream(out);
    entry(&mut zip, "data.pkl", &pickle)?;
    entry(&mut zip, "byteorder", b"little")?;
    for (key, stored) in storages.into_iter().enumerate() {
        let bytes = match stored {
            Stored::Tensor(tensor) => Cow::Owned(numbers(tensor)?),
            Stored::Array(array) => Cow::Borrowed(array.bytes.as_slice()),
        };
        entry(&mut zip, &format!("data/{key}"), &bytes)?;
    }
    entry(&mut zip, "version", b"3\n")?;
    zip.finish()?;
    Ok(())
}

/// Writes an archive whose pickle `write` writes, at most `n_bytes` long, and which refers to no storages.
pub(super) fn write_pickled<W: Write>(
    out: W,
    n_bytes: u64,
    write: impl FnOnce(&mut ZipWriter<StreamWriter<W>>) -> io::Result<()>,
) -> io::Result<()> {
    let mut zip = ZipWriter::new_stream(out);
    start(&mut zip, "data.pkl", n_bytes)?;
    write(&mut zip)?;
    entry(&mut zip, "byteorder", b"little")?;
    entry(&mut zip, "version", b"3\n")?;
    zip.finish()?;
    Ok(())
}

fn entry<W: Write>(zip: &mut ZipWriter<StreamWriter<W>>, name: &str, bytes: &[u8]) -> io::Result<()> {
    start(zip, name, bytes.len() as u64)?;
    zip.write_all(bytes)
}

/// Begins an entry of at most `n_bytes`.
fn start<W: Write>(zip: &mut ZipWriter<StreamWriter<W>>, name: &str, n_bytes: u64) -> io::Result<()> {
    // As PyTorch aligns them, so that they can be mapped into memory.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
    Ok(zip.start_file(format!("archive/{name}"), options.large_file(u32::try_from(n_bytes).is_err()))?)
}

/// Writes a pickle of protocol 2, and gathers the tensors that it refers to.
struct Pickler<'a> {
    bytes: Vec<u8>,
    storages: Vec<Stored<'a>>,
}

enum Stored<'a> {
    Tensor(&'a Tensor),
    Array(&'a Array),
}

impl<'a> Pickler<'a> {
    /// `name`: where the value is, for messages.
    fn add(&mut self, name: &str, value: &Saved<'a>) -> io::Result<()> {
        match value {
            Saved::Tensor(tensor) => return self.tensor(name, tensor.kind(), tensor.size(), Stored::Tensor(tensor)),
            Saved::Array(array) => return self.tensor(name, array.kind, array.shape.clone(), Stored::Array(array)),
            Saved::Dict(entries) => {
                self.bytes.extend(b"}(");
                for (key, value) in entries {
                    self.text(key)?;
                    self.add(&if name.is_empty() { key.clone() } else { format!("{name}.{key}") }, value)?;
                }
                self.bytes.push(b'u');
            }
            Saved::List(values) => {
                self.bytes.extend(b"](");
                for (place, value) in values.iter().enumerate() {
                    self.add(&format!("{name}[{place}]"), value)?;
                }
                self.bytes.push(b'e');
            }
            Saved::Bool(is) => self.bytes.push(if *is { 0x88 } else { 0x89 }),
            Saved::Nothing => self.bytes.push(b'N'),
            Saved::Text(text) => self.text(text)?,
            Saved::Integer(number) => self.integer(*number),
            Saved::Real(number) => {
                self.bytes.push(b'G');
                self.bytes.extend(number.to_be_bytes());
            }
        }
        Ok(())
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.
    fn tensor(&mut self, name: &str, kind: Kind, size: Vec<i64>, stored: Stored<'a>) -> io::Result<()> {
        let Some((storage, _)) = STORAGES.into_iter().find(|(_, known)| *known == kind) else {
            let problem = format!("{name}: PyTorch has no storage for {kind:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        };
        let key = self.storages.len();
        self.storages.push(stored);
        self.bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage")?;
        self.bytes.extend(format!("ctorch\n{storage}\n").bytes());
        self.text(&key.to_string())?;
        self.text("cpu")?;
        self.integer(size.iter().product());
        // The end of the storage's description, which is no value but a reference.
        self.bytes.extend(b"tQ");
        self.integer(0);
        let strides = c_strides(&size);
        for numbers in [size, strides] {
            self.bytes.push(b'(');
            numbers.into_iter().for_each(|number| self.integer(number));
            self.bytes.push(b't');
        }
        self.bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        Ok(())
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        let length = u32::try_from(text.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.bytes.push(b'X');
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(text.bytes());
        Ok(())
    }

    fn integer(&mut self, number: i64) {
        match i32::try_from(number) {
            Ok(number) => {
                self.bytes.push(b'J');
                self.bytes.extend(number.to_le_bytes());
            }
            // A long of eight bytes.
            Err(_) => {
                self.bytes.extend([0x8a, 8]);
                self.bytes.extend(number.to_le_bytes());
            }
        }
    }
}
