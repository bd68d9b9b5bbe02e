//! Readers of published weights, recognised by content and not by name, without Python; and writers of two formats that all others read.
//!
//! - safetensors;
//! - `torch.save` archives (zip), and the files it wrote before PyTorch 1.6: dicts inside give dotted names (`state_dict.visual.proj`);
//!   a tensor that was saved alone is [`BARE_TENSOR`];
//! - TorchScript archives as OpenAI publishes CLIP: parameters and buffers by dotted name, read from the module tree in
//!   `data.pkl`; no code is run.
//!
//! A file is read once, one storage after the other, so that memory is about the size of the weights and the largest storage.
//! Everything that can be checked is checked when a file is opened: checksums, sizes, bounds, names. What does not hold
//! weights (optimizers, which are dicts with `param_groups`; messages) is not read, nor is anything that a model holds in lists; but texts,
//! numbers and lists of texts are.
//!
//! Files of RALF and DetPro that are more than named tensors have readers of their own: [`NegativeFeatures`], [`Concepts`], [`RegionInfo`],
//! [`CollectedRegions`]. So has an archive of a hundred thousand files: [`ZipFolder`].
//!
//! The place of a network's weights in a file follows from its own names: see [`Place`].

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Cursor, Read, Seek},
    path::{Path, PathBuf},
};

use ovenbird_pickle::Value;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

mod concepts;
mod negatives;
mod place;
mod safetensors;
mod torch;
mod zip_folder;

pub(crate) use self::place::{add_copies, are_equal, list, prefixes, without_copies};
pub use self::{
    concepts::{CollectedRegions, Concepts, ImageRegions, RegionInfo},
    negatives::NegativeFeatures,
    place::Place,
    safetensors::write_safetensors,
    torch::{Saved, write_torch},
    zip_folder::ZipFolder,
};

/// What a zip archive, and each of its members, begins with.
const ZIP_MARK: &[u8] = b"PK\x03\x04";
/// The name of a tensor that is all that a file of `torch.save` holds.
pub const BARE_TENSOR: &str = "(bare tensor)";

/// The hint for a file that was damaged after it was written.
const AGAIN: &str = "the file is cut short or damaged: download or make it again";

/// How a file lays out its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// `torch.save`, since PyTorch 1.6.
    Torch,
    /// `torch.save`, before.
    TorchLegacy,
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

/// Numbers without libtorch, whose threads get in each other's way where many small files are read or written at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// The type of the numbers.
    pub kind: Kind,
    /// The length of each axis.
    pub shape: Vec<i64>,
    /// The numbers in C order, little-endian, as many as the shape has.
    pub bytes: Vec<u8>,
}

impl Array {
    /// The numbers of a tensor of any strides and device.
    pub fn of(tensor: &Tensor) -> io::Result<Self> {
        Ok(Self { kind: tensor.kind(), shape: tensor.size(), bytes: numbers(tensor)? })
    }

    /// A tensor of these numbers, on the CPU.
    pub fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::f_from_data_size(&self.bytes, &self.shape, self.kind)?)
    }
}

/// Where weights come from, for messages and bounds.
#[derive(Clone, Copy)]
struct Origin<'a> {
    path: &'a Path,
    n_bytes: u64,
}

/// A file that is being read.
struct Source<'a, R = BufReader<File>> {
    origin: Origin<'a>,
    file: R,
}

impl Checkpoint {
    /// Reads a checkpoint. Tensors keep their type, are contiguous and on the CPU, and share no memory.
    pub fn open(path: &Path) -> Result<Self> {
        let (source, head) = Source::open(path)?;
        let (format, metadata, tensors) = match head.as_slice() {
            [b'P', b'K', 3, 4, ..] => {
                let (format, torch::Contents { metadata, tensors }) = torch::from_zip(source)?;
                (format, metadata, tensors)
            }
            // The length of a header is far below 2^32, and a header is JSON.
            [_, _, _, _, 0, 0, 0, 0, b'{', ..] => {
                let (metadata, tensors) = safetensors::read(source)?;
                (Format::Safetensors, metadata, tensors)
            }
            [0x80, ..] => {
                let torch::Contents { metadata, tensors } = torch::from_pickles(source)?;
                (Format::TorchLegacy, metadata, tensors)
            }
            head => return Err(source.origin.unrecognised(head)),
        };
        Ok(Self { path: path.to_owned(), format, metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the file lays out its weights.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Metadata beside the weights: text (safetensors); text, numbers, and as JSON lists of text, by their dotted names
    /// (`torch.save`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Only the tensors at a place, without its prefix. The metadata keeps its whole names as well.
    #[must_use]
    pub fn at(self, place: &Place) -> Self {
        let Self { path, format, mut metadata, tensors } = self;
        let below = |name: &String| name.strip_prefix(&place.prefix).map(str::to_owned);
        let inner: Vec<(String, String)> = metadata.iter().filter_map(|(name, text)| Some((below(name)?, text.clone()))).collect();
        metadata.extend(inner);
        let tensors = tensors.into_iter().filter_map(|(name, tensor)| Some((below(&name)?, tensor))).collect();
        Self { path, format, metadata, tensors }
    }

    /// The tensors at the place of the one tensor with this name; all tensors if there is none. Fails if there are several.
    pub fn around(self, name: &str) -> Result<Self> {
        let how = "save only that network";
        let place = Place::choose(&prefixes(&self.tensors, name), None, &self.tensors, &self.path, &format!("one tensor `{name}`"), how)?;
        Ok(match place {
            Some(place) => self.at(&place),
            None => self,
        })
    }

    /// Whether a file that begins so may hold weights.
    pub fn may_begin(head: &[u8]) -> bool {
        matches!(head, [b'P', b'K', 3, 4, ..] | [_, _, _, _, 0, 0, 0, 0, b'{', ..] | [0x80, ..])
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Every tensor by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The shape of a tensor that must be there.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.find(name)?.size())
    }

    /// The type of the numbers of a tensor that must be there.
    pub fn dtype(&self, name: &str) -> Result<Kind> {
        Ok(self.find(name)?.kind())
    }

    /// A copy of a tensor that must be there.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.find(name)?.copy())
    }

    fn find(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Malformed {
            path: self.path.clone(),
            problem: format!("no tensor `{name}` among {}", self.tensors.len()),
            hint: Some("check that this is the right checkpoint".into()),
        })
    }
}

impl Origin<'_> {
    fn read(&self, source: io::Error) -> Error {
        Error::Read { path: self.path.to_owned(), source }
    }

    fn malformed(&self, problem: String, hint: &str) -> Error {
        Error::Malformed { path: self.path.to_owned(), problem, hint: Some(hint.into()) }
    }

    fn damaged(&self, problem: String) -> Error {
        self.malformed(problem, AGAIN)
    }

    /// Why a file that begins so is no checkpoint.
    fn unrecognised(&self, head: &[u8]) -> Error {
        let expected = "expected safetensors, a torch.save archive or a TorchScript archive";
        let text = String::from_utf8_lossy(head).trim_start().to_ascii_lowercase();
        if self.n_bytes == 0 {
            self.damaged(format!("{expected}, found an empty file"))
        } else if text.starts_with("<!doctype") || text.starts_with("<html") {
            self.malformed(
                format!("{expected}, found a web page"),
                "the server answered with a page: open the address in a browser and download what it offers",
            )
        } else if text.starts_with("version https://git-lfs") {
            self.malformed(format!("{expected}, found a pointer of Git LFS"), "run `git lfs pull` where it was cloned")
        } else {
            let begin = &head[..head.len().min(8)];
            self.damaged(format!("{expected}, found {} bytes that begin with {begin:02x?}", self.n_bytes))
        }
    }
}

impl<'a> Source<'a> {
    /// Opens a file; also returns how it begins.
    fn open(path: &'a Path) -> Result<(Self, Vec<u8>)> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let n_bytes = file.metadata().map_err(read)?.len();
        let mut file = BufReader::new(file);
        let mut head = Vec::new();
        file.by_ref().take(64).read_to_end(&mut head).map_err(read)?;
        file.rewind().map_err(read)?;
        Ok((Self { origin: Origin { path, n_bytes }, file }, head))
    }

    /// The next bytes of the file; the length comes out of the file and may be a lie.
    fn take(&mut self, n_bytes: u64, what: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if n_bytes <= self.origin.n_bytes {
            bytes.reserve_exact(n_bytes as usize);
        }
        self.file.by_ref().take(n_bytes).read_to_end(&mut bytes).map_err(|error| self.origin.read(error))?;
        if (bytes.len() as u64) < n_bytes {
            return Err(self.origin.damaged(format!("{what}: expected {n_bytes} bytes, found {}", bytes.len())));
        }
        Ok(bytes)
    }
}

/// Reads the tensors of a file as [`Checkpoint::open`] does, as plain numbers.
pub fn read_arrays(path: &Path) -> Result<BTreeMap<String, Array>> {
    let (source, head) = Source::open(path)?;
    if head.starts_with(ZIP_MARK) {
        return torch::arrays_from_zip(source);
    }
    let array = |(name, tensor): (&String, &Tensor)| {
        let array = Array::of(tensor).map_err(|error| Error::Read { path: path.to_owned(), source: error })?;
        Ok((name.clone(), array))
    };
    Checkpoint::open(path)?.tensors().iter().map(array).collect()
}

/// Reads the tensors of an archive of `torch.save` that is in memory, as [`read_arrays`] does. `path`: where the bytes are from, for messages.
pub fn arrays_in(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, Array>> {
    let origin = Origin { path, n_bytes: bytes.len() as u64 };
    if !bytes.starts_with(ZIP_MARK) {
        return Err(origin.unrecognised(&bytes[..bytes.len().min(64)]));
    }
    torch::arrays_from_zip(Source { origin, file: Cursor::new(bytes) })
}

/// What a value of a pickle is, with the first keys of a dict.
fn keys(value: &Value) -> String {
    let keys: Vec<&str> = value.as_entries().into_iter().flatten().filter_map(|(key, _)| key.as_str()).take(8).collect();
    format!("{} with the keys {keys:?}", value.kind())
}

/// The numbers of a tensor of any strides and device, in C order, little-endian.
fn numbers(tensor: &Tensor) -> io::Result<Vec<u8>> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; n_bytes(&tensor)];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel()).map_err(io::Error::other)?;
    Ok(bytes)
}

/// The number of infinities and NaNs of a tensor, in words; `None` if all numbers are finite.
pub fn not_finite(tensor: &Tensor) -> Option<String> {
    let is_floating = matches!(tensor.kind(), Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double);
    // A sum is finite only if all of its terms are, and takes one pass and no memory.
    if !is_floating || tensor.detach().abs().sum(Kind::Double).double_value(&[]).is_finite() {
        return None;
    }
    let n_others = tensor.numel() - tensor.isfinite().sum(Kind::Int64).int64_value(&[]) as usize;
    (n_others > 0).then(|| format!("expected finite numbers, found {n_others} of {} that are not", tensor.numel()))
}

fn n_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

#[cfg(test)]
mod tests;
