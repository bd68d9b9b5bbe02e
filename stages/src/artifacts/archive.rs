//! Embeddings of proposals as DetPro keeps them: a zip archive of `{id:012}.pth`, a tensor f32 `[N, D]` for each image.
//!
//! The archive has hundreds of gigabytes and is read in place; it may come in parts. Row k is of proposal k of the image.
//! (DetPro, sections 1 and 2.)

use std::collections::{BTreeMap, btree_map::Entry};

use ovenbird_cache::{
    Digest, files_digest,
    inputs::{Checked, InputFile},
};
use ovenbird_data::annotations::{ImageId, ImageInfo};
use ovenbird_models::checkpoint::{Array, BARE_TENSOR, ZipFolder, arrays_in};
use tch::Kind;

use super::feature_files::file_name;
use crate::{Artifact, Error, Result};

/// An archive of embeddings, or its parts, not yet read.
#[derive(Debug, Clone)]
pub struct ArchiveFiles {
    files: Vec<InputFile>,
}

impl Artifact for ArchiveFiles {
    const KIND: &'static str = "embedding-archive";
    const EXTENSIONS: &'static [&'static str] = &["zip", "/"];
    const SHAPE: &'static str =
        "a zip of `{id:012}.pth` as DetPro keeps it, one tensor f32 [N, D] an image, or a folder of the parts of the zip";

    fn open(files: &[InputFile]) -> Result<Self> {
        if files.is_empty() {
            return Err(Error::Input {
                port: Self::KIND,
                problem: "expected a zip archive or its parts, found a folder without files".into(),
                hint: "give the `.zip` itself, or the folder that its parts are in".into(),
            });
        }
        Ok(Self { files: files.to_vec() })
    }
}

/// An archive that is read in place.
pub(crate) struct EmbeddingArchive<'a> {
    checked: Vec<Checked<'a>>,
    zip: ZipFolder,
    /// The name of each image's member.
    members: BTreeMap<ImageId, String>,
}

impl ArchiveFiles {
    /// The digest of the content of all parts.
    pub(crate) fn digest(&self) -> Digest {
        files_digest(&self.files)
    }

    /// Hashes the parts and reads the archive's directory.
    pub(crate) fn archive(&self) -> Result<EmbeddingArchive<'_>> {
        let checked = self.files.iter().map(InputFile::check).collect::<Result<Vec<_>, _>>()?;
        let paths: Vec<_> = self.files.iter().map(|file| file.path.clone()).collect();
        let still = || checked.iter().try_for_each(Checked::still);
        // If the reader fails because a part was replaced, this is the error.
        let zip = ZipFolder::open(&paths).or_else(|error| still().map_err(Error::from).and(Err(error.into())))?;
        let mut members = BTreeMap::new();
        for name in zip.names() {
            let Some(image) = image_of(name) else { continue };
            match members.entry(image) {
                Entry::Vacant(vacant) => drop(vacant.insert(name.to_owned())),
                Entry::Occupied(first) => {
                    let problem = format!("two entries for image {image}, {} and {name}", first.get());
                    return Err(malformed(&zip, problem, "keep one entry for each image"));
                }
            }
        }
        if members.is_empty() {
            let problem = format!("expected entries `{}`, found none among {}", file_name(ImageId(9)), zip.names().count());
            return Err(malformed(&zip, problem, "give DetPro's `lvis_clip_image_embedding.zip`, or an archive of such files"));
        }
        Ok(EmbeddingArchive { checked, zip, members })
    }
}

impl EmbeddingArchive<'_> {
    /// The embeddings of an image, row by row. Fails, naming the entry, unless there are `n_rows` of `dim` numbers.
    pub(crate) fn rows(&self, image: ImageId, n_rows: usize, dim: usize) -> Result<Vec<f32>> {
        self.read(image, n_rows, dim).or_else(|error| self.still().and(Err(error)))
    }

    fn read(&self, image: ImageId, n_rows: usize, dim: usize) -> Result<Vec<f32>> {
        const HINT: &str = "DetPro makes entries for images with a base class and both sides of at least 32 px: leave the others out of \
                            `annotations`, or skip them: `on_bad_item: skip`";
        let Some(name) = self.members.get(&image) else {
            let problem = format!("expected an entry `{}`, found none among {} images", file_name(image), self.members.len());
            return Err(malformed(&self.zip, problem, HINT));
        };
        let content = self.zip.read(name)?;
        let arrays = arrays_in(&content, self.zip.path()).map_err(|error| match error {
            ovenbird_models::Error::Malformed { path, problem, hint } => {
                ovenbird_models::Error::Malformed { path, problem: format!("entry {name}: {problem}"), hint }
            }
            other => other,
        })?;
        drop(content);
        let names = arrays.keys().cloned().collect::<Vec<_>>();
        let [(found_name, Array { kind, shape, bytes })] = <[_; 1]>::try_from(arrays.into_iter().collect::<Vec<_>>()).map_err(|_| {
            malformed(&self.zip, format!("entry {name}: expected one tensor, found {names:?}"), "give an archive of bare tensors")
        })?;
        let expected = [n_rows as i64, dim as i64];
        if found_name != BARE_TENSOR || kind != Kind::Float || shape != expected {
            let hint = match shape[..] {
                _ if kind != Kind::Float || found_name != BARE_TENSOR => "give an archive of bare f32 tensors, as DetPro writes them",
                [_, found_dim] if found_dim != expected[1] => "set `dim` to the numbers of a row",
                _ => "give the proposals that the embeddings were made of, all of them, in their order",
            };
            let found = if found_name == BARE_TENSOR { format!("{kind:?} {shape:?}") } else { format!("a dict of {names:?}") };
            let problem = format!("entry {name}: expected Float {expected:?}, a row for each proposal of image {image}, found {found}");
            return Err(malformed(&self.zip, problem, hint));
        }
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// An error in the embeddings of an image.
    pub(crate) fn malformed(&self, image: ImageId, problem: &str, hint: &str) -> Error {
        let name = self.members.get(&image).map_or("", String::as_str);
        malformed(&self.zip, format!("entry {name}: {problem}"), hint)
    }

    /// How many entries are of other images than these.
    pub(crate) fn n_others(&self, images: &[ImageInfo]) -> usize {
        self.members.len() - images.iter().filter(|image| self.members.contains_key(&image.id)).count()
    }

    /// Fails if a part changed since it was opened: what was read before is then not what was hashed.
    pub(crate) fn still(&self) -> Result<()> {
        self.checked.iter().try_for_each(|checked| Ok(checked.still()?))
    }
}

/// The image that a member is of: `.../000000000009.pth`.
fn image_of(name: &str) -> Option<ImageId> {
    let file = name.rsplit_once('/').map_or(name, |(_, file)| file);
    let digits = file.strip_suffix(".pth").filter(|digits| digits.len() >= 12 && digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().map(ImageId)
}

fn malformed(zip: &ZipFolder, problem: String, hint: &str) -> Error {
    ovenbird_data::Error::Malformed { path: zip.path().to_owned(), problem, hint: Some(hint.into()) }.into()
}
