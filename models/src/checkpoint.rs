//! Readers of published weights, recognised by content and not by name, without Python.
//!
//! - safetensors;
//! - `torch.save` zip archives: nested dicts, of which the weights are the largest dict of tensors (`state_dict`, `model`, or
//!   the top level);
//! - TorchScript archives as OpenAI publishes CLIP: parameters and buffers by dotted name, read from the module tree in
//!   `data.pkl`; no code is run.
//!
//! Archives before PyTorch 1.6 (no zip) are refused in words.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, Read, Write},
    path::{Path, PathBuf},
};

use ovenbird_pickle::{Object, Value};
use safetensors::{Dtype, SafeTensors, View};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// How a file lays out its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// `torch.save`.
    Torch,
    /// TorchScript.
    TorchScript,
}

/// The weights of a file, by name.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Reads a checkpoint. Tensors keep their type and are on the CPU.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let mut head = [0; 8];
        let mut file = File::open(path).map_err(read)?;
        let n_read = file.read(&mut head).map_err(read)?;
        drop(file);
        match &head[..n_read] {
            [b'P', b'K', 3, 4, ..] => Self::from_zip(path),
            // The length of a safetensors header is far below 2^32; a pickle begins with 0x80 and its protocol.
            [_, _, _, _, 0, 0, 0, 0] => Self::from_safetensors(path),
            [0x80, ..] => Err(Self::malformed(path, "a torch.save file from before PyTorch 1.6".into(), "load and save it once with a newer PyTorch")),
            _ => Err(Self::malformed(
                path,
                "expected safetensors, a torch.save archive or a TorchScript archive".into(),
                "check that the download is complete",
            )),
        }
    }

    fn malformed(path: &Path, problem: String, hint: &str) -> Error {
        Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) }
    }

    fn from_safetensors(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let malformed = |problem: String| Self::malformed(path, problem, "the file is cut short or damaged: download or make it again");
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| malformed(format!("safetensors: {error}")))?;
        let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let views = SafeTensors::deserialize(&bytes).map_err(|error| malformed(format!("safetensors: {error}")))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in views.tensors() {
            let kind = kind_of(view.dtype()).ok_or_else(|| malformed(format!("{name}: numbers of type {:?} are not supported", view.dtype())))?;
            let shape: Vec<i64> = view.shape().iter().map(|length| *length as i64).collect();
            tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?);
        }
        Ok(Self { path: path.to_owned(), format: Format::Safetensors, metadata, tensors })
    }

    fn from_zip(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let again = "the archive is cut short or damaged: download it again";
        let file = BufReader::new(File::open(path).map_err(read)?);
        let zip = zip::ZipArchive::new(file).map_err(|error| Self::malformed(path, format!("zip: {error}"), again))?;
        let names: Vec<String> = zip.file_names().map(str::to_owned).collect();
        let prefix = names.iter().find_map(|name| name.strip_suffix("data.pkl")).map(str::to_owned);
        let prefix = prefix.ok_or_else(|| Self::malformed(path, "an archive without data.pkl".into(), "expected what torch.save or torch.jit.save writes"))?;
        let is_script = names.iter().any(|name| name.starts_with(&format!("{prefix}code/")));
        let mut archive = Archive { path, zip, prefix, storages: BTreeMap::new() };
        let pickle = archive.entry("data.pkl")?;
        let value = ovenbird_pickle::read(&pickle).map_err(|error| Self::malformed(path, format!("data.pkl: {error}"), again))?;
        let mut found = Vec::new();
        let format = if is_script {
            collect_module(&value, "", &mut found);
            Format::TorchScript
        } else {
            let weights = ["state_dict", "model"].into_iter().find_map(|key| value.get(key)).unwrap_or(&value);
            collect_dict(weights, "", &mut found);
            Format::Torch
        };
        let mut tensors = BTreeMap::new();
        for (name, description) in found {
            let tensor = archive.tensor(&name, description)?;
            tensors.insert(name, tensor);
        }
        Ok(Self { path: path.to_owned(), format, metadata: BTreeMap::new(), tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the file lays out its weights.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Text that the writer put beside the weights (safetensors).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Every tensor by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// A tensor that must be there.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.get(name).map(Tensor::shallow_clone);
        let n_tensors = self.tensors.len();
        tensor.ok_or_else(|| Self::malformed(&self.path, format!("no tensor `{name}` among {n_tensors}"), "check that this is the right checkpoint"))
    }
}

/// Writes tensors and text as safetensors; equal contents give equal bytes.
pub fn write_safetensors(tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>, out: &mut impl Write) -> std::io::Result<()> {
    // The crate sorts tensors by alignment and name. A hash map with more than one text would be written in any order, so
    // all text goes into one entry after the other here: the crate takes a map of one.
    let views: Vec<(&String, Stored)> = tensors.iter().map(|(name, tensor)| (name, Stored::of(tensor))).collect();
    assert!(metadata.len() <= 1, "BUG: more than one text beside the weights");
    let metadata = metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(std::io::Error::other)?;
    out.write_all(&bytes)
}

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn of(tensor: &Tensor) -> Self {
        let tensor = tensor.detach().to_device(tch::Device::Cpu).contiguous();
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::Double => Dtype::F64,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Int64 => Dtype::I64,
            Kind::Int => Dtype::I32,
            Kind::Uint8 => Dtype::U8,
            other => panic!("BUG: tensors of {other:?} are never written"),
        };
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Self { dtype, shape: tensor.size().iter().map(|length| *length as usize).collect(), bytes }
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        _ => return None,
    })
}

/// Tensors below a dict, nested ones with dotted names.
fn collect_dict<'a>(value: &'a Value, prefix: &str, found: &mut Vec<(String, &'a Object)>) {
    for (key, value) in value.as_entries().into_iter().flatten() {
        let Some(key) = key.as_str() else { continue };
        collect(value, format!("{prefix}{key}"), found, collect_dict);
    }
}

/// Tensors below a module of TorchScript, whose attributes are its state.
fn collect_module<'a>(value: &'a Value, prefix: &str, found: &mut Vec<(String, &'a Object)>) {
    let Value::Object(module) = value else { return };
    for (key, value) in module.state.as_ref().and_then(Value::as_entries).into_iter().flatten() {
        let Some(key) = key.as_str() else { continue };
        collect(value, format!("{prefix}{key}"), found, collect_module);
    }
}

fn collect<'a>(value: &'a Value, name: String, found: &mut Vec<(String, &'a Object)>, deeper: fn(&'a Value, &str, &mut Vec<(String, &'a Object)>)) {
    match value {
        Value::Object(object) if object.callable.is_global("torch._utils", "_rebuild_tensor_v2") => found.push((name, object)),
        // `nn.Parameter` is a tensor and two flags.
        Value::Object(object) if object.callable.is_global("torch._utils", "_rebuild_parameter") => {
            if let Some(Value::Object(tensor)) = object.args.first() {
                found.push((name, tensor));
            }
        }
        _ => deeper(value, &format!("{name}."), found),
    }
}

struct Archive<'a> {
    path: &'a Path,
    zip: zip::ZipArchive<BufReader<File>>,
    prefix: String,
    /// Storages that were read, as flat tensors.
    storages: BTreeMap<String, Tensor>,
}

impl Archive<'_> {
    fn malformed(&self, problem: String) -> Error {
        Checkpoint::malformed(self.path, problem, "the archive is cut short or damaged: download it again")
    }

    /// The bytes of an entry, checked against their CRC.
    fn entry(&mut self, name: &str) -> Result<Vec<u8>> {
        let full = format!("{}{name}", self.prefix);
        let mut bytes = Vec::new();
        let read = match self.zip.by_name(&full) {
            Ok(mut entry) => entry.read_to_end(&mut bytes).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.malformed(format!("{full}: {error}"))),
        }
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, ...)`.
    fn tensor(&mut self, name: &str, description: &Object) -> Result<Tensor> {
        let numbers = |value: &Value| value.as_items()?.iter().map(Value::as_int).collect::<Option<Vec<i64>>>();
        let parts = match description.args.as_slice() {
            [Value::Persistent(storage), offset, size, stride, ..] => {
                (|| Some((storage.as_items()?, offset.as_int()?, numbers(size)?, numbers(stride)?)))()
            }
            _ => None,
        };
        let Some((storage, offset, size, stride)) = parts else {
            return Err(self.malformed(format!("{name}: a tensor of an unknown layout")));
        };
        let [_, Value::Global { name: storage_type, .. }, key, ..] = storage else {
            return Err(self.malformed(format!("{name}: a storage of an unknown layout")));
        };
        let Some(key) = key.as_str() else { return Err(self.malformed(format!("{name}: a storage without a key"))) };
        let kind = match storage_type.as_str() {
            "FloatStorage" => Kind::Float,
            "HalfStorage" => Kind::Half,
            "BFloat16Storage" => Kind::BFloat16,
            "DoubleStorage" => Kind::Double,
            "LongStorage" => Kind::Int64,
            "IntStorage" => Kind::Int,
            "ByteStorage" => Kind::Uint8,
            "BoolStorage" => Kind::Bool,
            other => return Err(self.malformed(format!("{name}: numbers of type {other} are not supported"))),
        };
        if !self.storages.contains_key(key) {
            let bytes = self.entry(&format!("data/{key}"))?;
            let n_numbers = bytes.len() / kind.elt_size_in_bytes();
            let flat = Tensor::f_from_data_size(&bytes[..n_numbers * kind.elt_size_in_bytes()], &[n_numbers as i64], kind)?;
            self.storages.insert(key.to_owned(), flat);
        }
        let flat = &self.storages[key];
        let is_sound = offset >= 0 && size.len() == stride.len() && size.iter().chain(&stride).all(|number| *number >= 0);
        let reach = size.iter().zip(&stride).try_fold(0_i64, |reach, (length, step)| reach.checked_add((length - 1).max(0).checked_mul(*step)?));
        let last = reach.and_then(|reach| reach.checked_add(offset));
        let is_empty = size.contains(&0);
        match last {
            Some(last) if is_sound && flat.kind() == kind && (is_empty || (last as usize) < flat.numel()) => {
                Ok(flat.f_as_strided(&size, &stride, Some(offset))?.f_contiguous()?)
            }
            _ => {
                let problem = format!("{name}: {size:?} numbers at {offset} of a storage that holds {} of {:?}", flat.numel(), flat.kind());
                Err(self.malformed(problem))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;

    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoint")
    }

    fn golden() -> Json {
        serde_json::from_slice(&fs::read(folder().join("golden.json")).unwrap()).unwrap()
    }

    /// name -> kind, shape, first number, weighted sum, as PyTorch sees them.
    fn described(checkpoint: &Checkpoint) -> Json {
        let describe = |tensor: &Tensor| {
            let flat = tensor.to_kind(Kind::Double).flatten(0, -1);
            let weights = Tensor::arange(flat.size()[0], (Kind::Double, tch::Device::Cpu)) + 1.0;
            let sum = (&flat * weights).sum(Kind::Double).double_value(&[]);
            serde_json::json!({"kind": format!("{:?}", tensor.kind()), "shape": tensor.size(), "sum": sum})
        };
        checkpoint.tensors().iter().map(|(name, tensor)| (name.clone(), describe(tensor))).collect::<serde_json::Map<_, _>>().into()
    }

    #[test]
    fn every_published_layout_is_read_as_pytorch_reads_it() {
        let expected = golden();
        for (name, format) in [
            ("nested.pth", Format::Torch),
            ("flat.pth", Format::Torch),
            ("script.pt", Format::TorchScript),
            ("weights.safetensors", Format::Safetensors),
        ] {
            let checkpoint = Checkpoint::open(&folder().join(name)).unwrap();
            assert_eq!(checkpoint.format(), format);
            let found = described(&checkpoint);
            let (found, expected) = (found.as_object().unwrap(), expected[name].as_object().unwrap());
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
            for (tensor, expected) in expected {
                let found = &found[tensor];
                assert_eq!((&found["kind"], &found["shape"]), (&expected["kind"], &expected["shape"]), "{name} {tensor}");
                let difference = found["sum"].as_f64().unwrap() - expected["sum"].as_f64().unwrap();
                assert!(difference.abs() < 1e-9, "{name} {tensor}: {difference}");
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_has_the_same_bytes_every_time() {
        let kinds = [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Int64];
        let tensors: BTreeMap<String, Tensor> =
            kinds.iter().map(|kind| (format!("{kind:?}"), Tensor::arange(6, (*kind, tch::Device::Cpu)).view([2, 3]))).collect();
        let metadata = BTreeMap::from([("names".to_owned(), "[\"a\"]".to_owned())]);
        let bytes = [(), ()].map(|()| {
            let mut bytes = Vec::new();
            write_safetensors(&tensors, &metadata, &mut bytes).unwrap();
            bytes
        });
        assert_eq!(bytes[0], bytes[1]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes[0]).unwrap();
        let read = Checkpoint::open(file.path()).unwrap();
        assert_eq!(read.metadata(), &metadata);
        for (name, tensor) in &tensors {
            assert!(read.tensor(name).unwrap().equal(tensor) && read.tensor(name).unwrap().kind() == tensor.kind());
        }
    }

    #[test]
    fn a_file_cut_short_is_an_error_that_names_it() {
        for name in ["nested.pth", "script.pt", "weights.safetensors"] {
            let bytes = fs::read(folder().join(name)).unwrap();
            for part in [0, 1, 7, 9, bytes.len() / 2, bytes.len() - 30, bytes.len() - 1] {
                let mut file = tempfile::NamedTempFile::new().unwrap();
                file.write_all(&bytes[..part]).unwrap();
                let error = Checkpoint::open(file.path()).unwrap_err();
                assert!(matches!(error, Error::Malformed { .. }), "{name} cut to {part}: {error}");
            }
        }
    }

    #[test]
    fn flipped_weights_are_found_by_their_crc() {
        let mut bytes = fs::read(folder().join("flat.pth")).unwrap();
        // The stored floats begin at a multiple of 64 after the header of their entry.
        let at = bytes.windows(6).position(|window| window == b"data/0").unwrap() + 200;
        bytes[at] ^= 1;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let error = Checkpoint::open(file.path()).unwrap_err().to_string();
        assert!(error.contains("data/0"), "{error}");
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let checkpoint = Checkpoint::open(&folder().join("flat.pth")).unwrap();
        let error = checkpoint.tensor("visual.proj").unwrap_err().to_string();
        assert!(error.ends_with("flat.pth: no tensor `visual.proj` among 3"), "{error}");
    }
}
