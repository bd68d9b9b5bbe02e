//! Proposals: class-agnostic boxes with objectness, in the forms that the field pickles them in.
//!
//! | container | which image an entry is of |
//! |---|---|
//! | list, tuple, or numpy array over images (mmdet 1 and 2) | by place: see [`matched`] |
//! | dict of the lists `ids`, `boxes`, and `scores` or `objectness_logits` (Detectron, detectron2) | by id |
//! | dict over images | by the key: an id, or the path of the image (mmdet 3) |
//! | list of dicts with `img_id` or `img_path` (mmdet 3) | by these |
//!
//! An entry is an array or a list of rows `x1, y1, x2, y2, score` or `x1, y1, x2, y2` (px of the original image), a list of one such (the
//! only class), or a dict of `bboxes` and `scores`; without boxes it may have any width. Numbers are floats or integers of any size.
//!
//! Entries that stand in order are in ascending image id or, as mmdet itself writes them, in the order in which the annotation file
//! lists the images; if these differ, the order that the boxes fit is taken, or the one that the user gives. LP-OVOD keeps an [`IdMap`] beside
//! such a file, which says it.

mod containers;
mod id_map;
mod matching;
mod rows;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    io::{self, Write},
    path::Path,
};

use self::containers::{Scores, entries};
pub use self::{
    id_map::IdMap,
    matching::{Matched, matched},
};
use crate::{Error, Result, boxes::Xyxy};

const FORMS: &str = "expected a pickle of mmdet (a list over images of arrays N x 5, or a dict by image path) or of Detectron (a dict of `ids`, \
                     `boxes` and `scores`), boxes as x1, y1, x2, y2 in px";

/// A box that may hold an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proposal {
    /// The box.
    pub xyxy: Xyxy,
    /// How sure the proposal network is, in [0, 1].
    pub score: f32,
}

/// The content of a file of proposals.
#[derive(Debug, Clone, PartialEq)]
pub struct Pickled {
    /// The boxes of each image.
    pub entries: Entries,
    /// Notes about assumptions, such as missing scores.
    pub notes: Vec<String>,
}

/// The boxes of each image, and the names of the images if the file has them.
#[derive(Debug, Clone, PartialEq)]
pub enum Entries {
    /// Without names: matched by their order.
    InOrder(Vec<Vec<Proposal>>),
    /// With the name of each image.
    Named(Vec<(ImageName, Vec<Proposal>)>),
}

/// How a file of proposals names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// By its id.
    Id(i64),
    /// By a path, or by an id that was written as text.
    Text(String),
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Text(text) => write!(f, "`{text}`"),
        }
    }
}

/// Reads a pickle of proposals in any of the forms above, or the `.npy` file of an array of objects; `path` is for the message.
pub fn read(file: &[u8], path: &Path) -> Result<Pickled> {
    let malformed = |problem: String, hint: &str| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) };
    let pickle = pickle_of(file).map_err(|(problem, hint)| malformed(problem, hint))?;
    let value = ovenbird_pickle::read(pickle).map_err(|error| malformed(error.to_string(), FORMS))?;
    let mut scores = Scores::default();
    let mut entries = entries(&value, &mut scores).map_err(|problem| malformed(problem, FORMS))?;
    let notes = scores.settle(&mut entries);
    Ok(Pickled { entries, notes })
}

/// The pickle in a file, or what the file is instead, and what to do about it.
fn pickle_of(file: &[u8]) -> Result<&[u8], (String, &'static str)> {
    let pickle_it = "load it in Python and write it by `pickle.dump`, a list over images of float arrays N x 5";
    let text = file.trim_ascii_start();
    match file {
        [] => Err(("expected a pickle, found an empty file".into(), "make the proposals again, or copy the file again")),
        [0x93, b'N', b'U', b'M', b'P', b'Y', major, _, rest @ ..] => {
            let (length, rest) = match (major, rest) {
                (1, [low, high, rest @ ..]) => (usize::from(u16::from_le_bytes([*low, *high])), rest),
                (2 | 3, [a, b, c, d, rest @ ..]) => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
                _ => return Err(("expected a pickle, found a .npy file of an unknown version".into(), pickle_it)),
            };
            let (header, data) = rest.split_at_checked(length).ok_or((".npy header: the file is cut short".to_owned(), pickle_it))?;
            if header.windows(3).any(|part| part == b"'|O") {
                Ok(data)
            } else {
                Err(("expected a pickle, found a .npy file of one array of numbers".into(), pickle_it))
            }
        }
        [b'P', b'K', 3, 4, ..] => Err(("expected a pickle, found a zip archive, as torch.save and numpy.savez write it".into(), pickle_it)),
        _ if text.starts_with(b"[") || text.starts_with(b"{") => Err(("expected a pickle, found JSON".into(), pickle_it)),
        _ if text.starts_with(b"<") => {
            Err(("expected a pickle, found a web page".into(), "open the address in a browser and download what it offers"))
        }
        _ if text.starts_with(b"version https://git-lfs") => {
            Err(("expected a pickle, found a pointer of Git LFS".into(), "run `git lfs pull` where it was cloned"))
        }
        _ => Ok(file),
    }
}

/// Writes proposals as mmdet's pickle, float32.
pub fn write_mmdet(images: &[Vec<Proposal>], out: &mut impl Write) -> io::Result<()> {
    let row = |proposal: &Proposal| [proposal.xyxy.x1, proposal.xyxy.y1, proposal.xyxy.x2, proposal.xyxy.y2, proposal.score];
    let array = |proposals: &Vec<Proposal>| (proposals.len(), 5, proposals.iter().flat_map(row).collect::<Vec<f32>>());
    ovenbird_pickle::write_f32_arrays(images.iter().map(array), out)
}
