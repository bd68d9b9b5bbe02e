//! A folder of images, whose files are found by the names in annotations.
//!
//! A name is the file's path below the folder. Some tools spell it differently: with `\`, percent-encoded (`%20`), in another Unicode form,
//! with a leading `./`. If no file has exactly this name, the file with an equivalent name is used. Two files with equivalent names, or two
//! spellings of one file, are an error that names them.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
};

use ovenbird_cache::{
    Digest,
    inputs::{self, InputFile},
};
use ovenbird_data::{
    Error as DataError,
    annotations::{Annotations, ImageInfo},
    images::{Image, is_turned_in_place},
    letterbox::Letterbox,
};
use unicode_normalization::UnicodeNormalization as _;

use crate::{Artifact, Context, Error, OnBadItem, Result, context::refuse_too_many};

/// Names in a message; the others are counted.
const MAX_NAMED: usize = 3;

/// A folder of images, by their path below it.
#[derive(Debug)]
pub struct Images {
    by_name: BTreeMap<String, InputFile>,
    /// The names of all files by their normal form. Made when a name is first not found exactly.
    by_meaning: OnceLock<BTreeMap<String, Vec<String>>>,
    /// Images with an EXIF orientation that their size does not reveal, since the last remark: how many, and the first. The decoding threads
    /// lock it only to count.
    turned: Mutex<(usize, Option<String>)>,
}

impl Artifact for Images {
    const KIND: &'static str = "images";
    const EXTENSIONS: &'static [&'static str] = &["/"];
    const SHAPE: &'static str = "a folder of JPEG and PNG files";

    fn open(files: &[InputFile]) -> Result<Self> {
        let by_name = files.iter().map(|file| (file.name.clone(), file.clone())).collect();
        Ok(Self { by_name, by_meaning: OnceLock::new(), turned: Mutex::default() })
    }
}

/// How a name found its file.
#[derive(Debug, PartialEq, Eq)]
enum Found<'a> {
    /// By its exact name, or another spelling of the same path.
    Same(&'a str),
    /// By an equivalent name.
    Meant(&'a str),
    Nothing,
}

impl Images {
    /// All files in the folder, in ascending name.
    pub(crate) fn files(&self) -> impl Iterator<Item = &InputFile> {
        self.by_name.values()
    }

    /// The content digest of an image; a missing image has a digest of its own.
    pub fn digest(&self, file_name: &str) -> Result<Digest> {
        Ok(match self.find(file_name)? {
            Found::Same(name) | Found::Meant(name) => self.by_name[name].digest,
            Found::Nothing => Digest::of_list("ovenbird image that is not there 1", [(file_name, Digest::of(b""))]),
        })
    }

    /// The file of an image. Fails if the folder has none.
    pub fn file(&self, file_name: &str) -> Result<&InputFile> {
        match self.find(file_name)? {
            Found::Same(name) | Found::Meant(name) => Ok(&self.by_name[name]),
            Found::Nothing => Err(Error::Data(DataError::Malformed {
                path: file_name.into(),
                problem: match self.stray(file_name) {
                    Some(what) => format!("expected an image, found {what}"),
                    None => format!("not in the folder of images ({} files)", self.by_name.len()),
                },
                hint: Some(format!("{FOLDER_HINT}, or skip it: `on_bad_item: skip`")),
            })),
        }
    }

    /// Describes an entry with this name that is no regular file.
    fn stray(&self, file_name: &str) -> Option<&'static str> {
        let (name, file) = self.by_name.first_key_value()?;
        let folder = file.path.ancestors().nth(Path::new(name).components().count())?;
        inputs::stray(&folder.join(plain_path(file_name)?))
    }

    fn find(&self, file_name: &str) -> Result<Found<'_>> {
        if let Some((name, _)) = self.by_name.get_key_value(file_name) {
            return Ok(Found::Same(name));
        }
        let refused = |problem: String, hint: &str| Err(Error::Input { port: Self::KIND, problem, hint: hint.into() });
        let Some(path) = plain_path(file_name) else {
            return refused(format!("the annotations name `{file_name}`, which leads out of the folder"), FOLDER_HINT);
        };
        if let Some((name, _)) = self.by_name.get_key_value(&path).filter(|_| !file_name.starts_with('/')) {
            return Ok(Found::Same(name));
        }
        let Some(meaning) = meaning(file_name) else { return Ok(Found::Nothing) };
        match self.by_meaning().get(&meaning).map_or(&[][..], Vec::as_slice) {
            [] => Ok(Found::Nothing),
            [name] => Ok(Found::Meant(name)),
            several => {
                let problem = format!("the annotations name `{file_name}`, which is not in the folder and may mean {}", listed(several));
                refused(problem, "name files in the annotations as they are in the folder")
            }
        }
    }

    fn by_meaning(&self) -> &BTreeMap<String, Vec<String>> {
        self.by_meaning.get_or_init(|| {
            let mut by_meaning: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for name in self.by_name.keys() {
                if let Some(meaning) = meaning(name) {
                    by_meaning.entry(meaning).or_default().push(name.clone());
                }
            }
            by_meaning
        })
    }

    /// Decodes an image of any size.
    pub(crate) fn decode(&self, file_name: &str) -> Result<Image> {
        let file = self.file(file_name)?;
        Ok(Image::decode(&file.read()?, &file.path)?)
    }

    /// Decodes an image and checks it against the size its annotations state, `[width, height]` px.
    pub(crate) fn decode_sized(&self, file_name: &str, stated: [u32; 2]) -> Result<Image> {
        self.decode_with(file_name, stated, |bytes, path| Image::decode_sized(bytes, path, stated))
    }

    /// As [`Self::decode_sized`], but at a fraction of its size if its shorter side is then still long enough: see [`Image::decode_draft`].
    pub(crate) fn decode_draft(&self, file_name: &str, stated: [u32; 2], least_side: u32) -> Result<Image> {
        self.decode_with(file_name, stated, |bytes, path| Image::decode_draft(bytes, path, stated, least_side))
    }

    /// As [`Self::decode_sized`], in a letterbox.
    pub(crate) fn decode_letterboxed(&self, file_name: &str, stated: [u32; 2], letterbox: Letterbox) -> Result<Image> {
        self.decode_with(file_name, stated, |bytes, path| letterbox.decode(bytes, path, stated))
    }

    fn decode_with(
        &self,
        file_name: &str,
        stated: [u32; 2],
        decode: impl FnOnce(&[u8], &Path) -> ovenbird_data::Result<Image>,
    ) -> Result<Image> {
        let file = self.file(file_name)?;
        let bytes = file.read()?;
        let image = decode(&bytes, &file.path)?;
        if is_turned_in_place(&bytes, stated) {
            let mut turned = self.turned.lock().unwrap_or_else(PoisonError::into_inner);
            turned.0 += 1;
            // The first by name, so that the order of threads does not matter.
            if turned.1.as_deref().is_none_or(|first| file_name < first) {
                turned.1 = Some(file_name.to_owned());
            }
        }
        Ok(image)
    }

    /// One digest per annotated image, in ascending id: of its id, its annotated size, and its content or absence.
    pub(crate) fn items(&self, annotations: &Annotations) -> Result<Vec<Digest>> {
        let item = |image: &ImageInfo| {
            let stated = format!("{} {}x{}", image.id, image.width, image.height);
            Ok(Digest::of_list("ovenbird image 1", [(stated.as_str(), self.digest(&image.file_name)?)]))
        };
        annotations.images.iter().map(item).collect()
    }

    /// Finds the files of images before the work begins, and notes which are found by another spelling. Fails if two spellings mean one file,
    /// or if more images are missing than the stage's policy allows.
    pub(crate) fn look_for<'a>(&self, images: impl IntoIterator<Item = &'a ImageInfo>, cx: &Context<'_>) -> Result<()> {
        let (mut n_images, mut missing, mut meant) = (0_usize, Vec::new(), Vec::new());
        let mut asked: BTreeMap<&str, &str> = BTreeMap::new();
        for ImageInfo { file_name, .. } in images {
            n_images += 1;
            let name = match self.find(file_name)? {
                Found::Same(name) => name,
                Found::Meant(name) => {
                    meant.push((file_name.as_str(), name));
                    name
                }
                Found::Nothing => {
                    missing.push(file_name.as_str());
                    continue;
                }
            };
            let before = *asked.entry(name).or_insert(file_name);
            if before != file_name {
                return Err(Error::Input {
                    port: Self::KIND,
                    problem: format!("the annotations name `{before}` and `{file_name}`, which are one file, `{name}`"),
                    hint: "name files in the annotations as they are in the folder, each image once".into(),
                });
            }
        }
        if let Some(last) = missing.last() {
            let (n_missing, n_files) = (missing.len(), self.by_name.len());
            match cx.on_bad_item {
                OnBadItem::Fail => {
                    let problem = format!("{n_missing} of {n_images} images are not in the folder ({n_files} files): {}", listed(&missing));
                    let hint = format!("{FOLDER_HINT}, or skip them: `on_bad_item: skip`");
                    return Err(Error::Input { port: Self::KIND, problem, hint });
                }
                OnBadItem::Skip { max_failed_ratio } => {
                    let last = format!("{last}: not in the folder of images ({n_files} files)");
                    refuse_too_many([n_missing, n_images], max_failed_ratio, &last)?;
                }
            }
        }
        if let Some((asked, name)) = meant.first() {
            let n_meant = meant.len();
            cx.note(format!(
                "{n_meant} of {n_images} images are found by another spelling of their names: `{asked}` is `{name}` in the folder"
            ));
        }
        Ok(())
    }

    /// A remark on the images that were decoded since the last call, if there is something to say.
    pub(crate) fn remarks(&self) -> Option<String> {
        let (n_turned, first) = std::mem::take(&mut *self.turned.lock().unwrap_or_else(PoisonError::into_inner));
        Some(format!(
            "{n_turned} images, `{}` among them, have an EXIF orientation that viewers apply and that their size does not reveal: they are used \
             as stored, and boxes must refer to the stored orientation",
            first?
        ))
    }
}

const FOLDER_HINT: &str = "point `images` at the folder that the annotations' file names are relative to";

/// The first names, and how many more there are.
pub(crate) fn listed(names: &[impl AsRef<str>]) -> String {
    let named: Vec<String> = names.iter().take(MAX_NAMED).map(|name| format!("`{}`", name.as_ref())).collect();
    let n_more = names.len().saturating_sub(MAX_NAMED);
    let more = if n_more > 0 { format!(" and {n_more} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
}

/// The path without `.`, `..` and empty parts; `None` if it leads out of its folder.
fn plain_path(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The normal form of a name, equal for all its spellings; `None` if it leads out of its folder.
fn meaning(name: &str) -> Option<String> {
    let decoded = percent_decoded(name).unwrap_or_else(|| name.to_owned());
    plain_path(&decoded.replace('\\', "/")).map(|path| path.nfc().collect())
}

/// Decodes percent-encoding; `None` if there is none, or the result is not UTF-8.
fn percent_decoded(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, after @ ..] = rest {
        let digit = |place: usize| after.get(place).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((16 * high + low) as u8);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok().filter(|decoded| decoded != name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> Images {
        let file =
            |name: &&str| InputFile { name: (*name).into(), path: name.into(), bytes: 0, digest: Digest::of(name.as_bytes()), unit: None };
        Images::open(&names.iter().map(file).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn names_find_the_file_that_they_can_only_mean() {
        let decomposed = "cafe\u{301}/1.jpg";
        let images = folder(&["a/1.jpg", "my 2.jpg", "100%25.jpg", "back\\slash.jpg", decomposed]);
        for (asked, expected) in [
            ("a/1.jpg", Found::Same("a/1.jpg")),
            ("./a/1.jpg", Found::Same("a/1.jpg")),
            ("a//1.jpg", Found::Same("a/1.jpg")),
            ("b/../a/./1.jpg", Found::Same("a/1.jpg")),
            ("back\\slash.jpg", Found::Same("back\\slash.jpg")),
            ("100%25.jpg", Found::Same("100%25.jpg")),
            ("/a/1.jpg", Found::Meant("a/1.jpg")),
            ("a\\1.jpg", Found::Meant("a/1.jpg")),
            (".\\a\\1.jpg", Found::Meant("a/1.jpg")),
            ("my%202.jpg", Found::Meant("my 2.jpg")),
            ("back/slash.jpg", Found::Meant("back\\slash.jpg")),
            ("100%.jpg", Found::Meant("100%25.jpg")),
            ("caf\u{e9}/1.jpg", Found::Meant(decomposed)),
            ("caf%C3%A9\\1.jpg", Found::Meant(decomposed)),
            ("A/1.jpg", Found::Nothing),
            ("1.jpg", Found::Nothing),
            ("", Found::Nothing),
            ("%ff%fe", Found::Nothing),
            ("%", Found::Nothing),
            ("%2e%2e/x.jpg", Found::Nothing),
        ] {
            assert_eq!(images.find(asked).unwrap(), expected, "{asked}");
        }
        for leads_out in ["../1.jpg", "a/../../a/1.jpg", ".."] {
            let error = images.find(leads_out).unwrap_err().to_string();
            assert_eq!(error, format!("images: the annotations name `{leads_out}`, which leads out of the folder"));
        }
    }

    #[test]
    fn a_name_that_may_mean_two_files_is_named_with_them() {
        let error = folder(&["a b.jpg", "a%20b.jpg"]).find("./a b.jpg").map(|_| ());
        assert!(error.is_ok());
        let images = folder(&["x/a b.jpg", "x/a%20b.jpg"]);
        let error = images.find("x\\a b.jpg").unwrap_err().to_string();
        assert_eq!(error, "images: the annotations name `x\\a b.jpg`, which is not in the folder and may mean `x/a b.jpg`, `x/a%20b.jpg`");
    }

    #[test]
    fn absence_has_a_digest_of_its_own_and_is_an_item_that_failed() {
        let images = folder(&["a.jpg"]);
        let [there, first, second] = ["a.jpg", "b.jpg", "c.jpg"].map(|name| images.digest(name).unwrap());
        assert!(there == Digest::of(b"a.jpg") && first != second && first != there);
        assert!(matches!(images.file("b.jpg"), Err(Error::Data(_))));
    }

    #[test]
    fn three_names_are_listed_and_the_others_counted() {
        assert_eq!(listed(&["a"]), "`a`");
        assert_eq!(listed(&["a", "b", "c", "d", "e"]), "`a`, `b`, `c` and 2 more");
    }
}
