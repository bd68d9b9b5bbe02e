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
//! lists the images; where these differ, the boxes tell, or the operator.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
};

use ovenbird_pickle::{NumpyArray, Value};

use crate::{
    Error, Result,
    annotations::{Annotations, ImageId, ImageInfo, ImageOrder},
    boxes::Xyxy,
};

/// How far a box may reach outside its image, in px: proposal networks round.
const TOLERANCE_PX: f32 = 1.0;
/// How detectron2 keeps boxes as corners in px, and as a corner and a size.
const XYXY_ABS: i64 = 0;
const XYWH_ABS: i64 = 1;
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

/// What a file of proposals holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Pickled {
    /// The boxes of each image.
    pub entries: Entries,
    /// What was taken for granted, in words.
    pub notes: Vec<String>,
}

/// The boxes of each image, and what says which image.
#[derive(Debug, Clone, PartialEq)]
pub enum Entries {
    /// Only their order.
    InOrder(Vec<Vec<Proposal>>),
    /// A name each.
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

/// Proposals with the images that they are of.
#[derive(Debug)]
pub struct Matched {
    /// One entry for every image of the annotations.
    pub by_image: BTreeMap<ImageId, Vec<Proposal>>,
    /// The order that entries without names had.
    pub order: Option<ImageOrder>,
    /// How many images the file has besides.
    pub n_others: usize,
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

/// What is said of scores, of the whole file.
#[derive(Debug, Default)]
struct Scores {
    /// Boxes that have none.
    n_absent: usize,
    /// Whether they are called logits.
    are_logits: bool,
}

impl Scores {
    /// Makes scores of logits, and says what was taken for granted.
    fn settle(self, entries: &mut Entries) -> Vec<String> {
        let mut notes = Vec::new();
        if self.n_absent > 0 {
            notes.push(format!(
                "{} have no scores: each is taken as 1, so that none comes before another",
                plural(self.n_absent, "box", "boxes")
            ));
        }
        if self.are_logits {
            let of_images: Vec<&mut Vec<Proposal>> = match entries {
                Entries::InOrder(images) => images.iter_mut().collect(),
                Entries::Named(images) => images.iter_mut().map(|(_, of_image)| of_image).collect(),
            };
            let mut scores: Vec<&mut f32> = of_images.into_iter().flatten().map(|proposal| &mut proposal.score).collect();
            // Detectron's files say `objectness_logits` of probabilities once detectron2 has renamed their fields.
            if scores.iter().all(|score| (0.0..=1.0).contains(&**score)) {
                notes.push("`objectness_logits` are all from 0 to 1, and taken as scores".into());
            } else {
                scores.iter_mut().for_each(|score| **score = 1.0 / (1.0 + (-**score).exp()));
                notes.push("scores are the sigmoid of `objectness_logits`".into());
            }
        }
        notes
    }
}

fn plural(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn entries(value: &Value, scores: &mut Scores) -> Result<Entries, String> {
    if let Some(columns) = value.as_entries() {
        let column = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, value.get(name)?)));
        if let Some((_, boxes)) = column(&["boxes", "bboxes"])
            && let Some((ids_name, ids)) = column(&["ids", "indexes", "image_ids", "img_ids"])
        {
            let ids = items(ids).ok_or_else(|| format!("`{ids_name}`: expected a list over images, found {}", ids.kind()))?;
            let boxes = items(boxes).ok_or_else(|| format!("`boxes`: expected a list over images, found {}", boxes.kind()))?;
            let rated = match column(&["scores", "objectness_logits"]) {
                Some((name, rated)) => {
                    scores.are_logits = name == "objectness_logits";
                    let rated = items(rated).ok_or_else(|| format!("`{name}`: expected a list over images, found {}", rated.kind()))?;
                    rated.into_iter().map(Some).collect()
                }
                None => vec![None; boxes.len()],
            };
            if ids.len() != boxes.len() || rated.len() != boxes.len() {
                return Err(format!(
                    "expected lists of one length, found {} ids, boxes of {} images and scores of {}",
                    ids.len(),
                    boxes.len(),
                    rated.len()
                ));
            }
            let is_xywh = is_xywh(value)?;
            let of_image = |((id, boxes), rated): ((&Value, &Value), &Option<Value>)| {
                let name = name_of(id).ok_or_else(|| format!("`{ids_name}`: expected ids of images, found {}", id.kind()))?;
                let proposals = of_fields(boxes, rated.as_ref(), is_xywh, scores).map_err(|problem| format!("image {name}: {problem}"))?;
                Ok((name, proposals))
            };
            return ids.iter().zip(&boxes).zip(&rated).map(of_image).collect::<Result<_, String>>().map(Entries::Named);
        }
        let of_image = |(key, value): &(Value, Value)| {
            let keys = || columns.iter().filter_map(|(key, _)| key.as_str()).take(8).collect::<Vec<_>>();
            let name = name_of(key).ok_or_else(|| format!("expected ids or paths of images as keys of the dict, found {}", key.kind()))?;
            let proposals = of_image(value, scores).map_err(|problem| match &name {
                ImageName::Text(text) if !text.contains('.') => format!("a dict of {:?}: `{text}`: {problem}", keys()),
                name => format!("image {name}: {problem}"),
            })?;
            Ok((name, proposals))
        };
        return columns.iter().map(of_image).collect::<Result<_, String>>().map(Entries::Named);
    }
    let images = items(value).ok_or_else(|| format!("expected a list or a dict over images, found {}", value.kind()))?;
    let mut names = Vec::new();
    let mut all = Vec::new();
    for (place, value) in images.iter().enumerate() {
        let name = field(value, "img_id").or_else(|| field(value, "image_id")).or_else(|| field(value, "img_path"));
        names.extend(name.and_then(name_of));
        let value = field(value, "pred_instances").unwrap_or(value);
        all.push(of_image(value, scores).map_err(|problem| format!("image {place} of the list: {problem}"))?);
    }
    match names.len() {
        0 => Ok(Entries::InOrder(all)),
        n if n == all.len() => Ok(Entries::Named(names.into_iter().zip(all).collect())),
        n => Err(format!("expected `img_id` or `img_path` in every entry of the list or in none, found it in {n} of {}", all.len())),
    }
}

/// The items of a list, a tuple, or an array along its first axis.
fn items(value: &Value) -> Option<Vec<Value>> {
    match value.as_items() {
        Some(items) => Some(items.to_vec()),
        None => value.object_array().and_then(|list| Some(list.as_list()?.to_vec())).or_else(|| value.array_items()),
    }
}

/// An entry of a dict, or an attribute of an object (`InstanceData` of mmengine).
fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).or_else(|| value.as_object()?.state.as_ref()?.get(name))
}

/// What a value names an image by.
fn name_of(value: &Value) -> Option<ImageName> {
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(ImageName::Id(number as i64));
    match value {
        Value::Str(text) => Some(ImageName::Text(text.to_string())),
        Value::Bytes(bytes) => Some(ImageName::Text(String::from_utf8(bytes.to_vec()).ok()?)),
        Value::Int(id) => Some(ImageName::Id(*id)),
        Value::Float(number) => whole(*number),
        _ => match value.to_array().ok()? {
            // An id beyond 2^24 has no f32.
            array @ NumpyArray { .. } if array.shape.iter().product::<usize>() == 1 => array.to_f64().ok().and_then(|ids| whole(ids[0])),
            _ => None,
        },
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Text(text) => write!(f, "`{text}`"),
        }
    }
}

/// Whether boxes are a corner and a size, as `bbox_mode` says.
fn is_xywh(value: &Value) -> Result<bool, String> {
    let Some(mode) = field(value, "bbox_mode") else { return Ok(false) };
    // An `IntEnum` is pickled as a call with its number.
    let number = mode.as_int().or_else(|| mode.as_object()?.args.first()?.as_int());
    match number {
        Some(XYXY_ABS) => Ok(false),
        Some(XYWH_ABS) => Ok(true),
        found => {
            let found = found.map_or_else(|| mode.kind(), |number| number.to_string());
            Err(format!("`bbox_mode`: expected {XYXY_ABS} (XYXY_ABS) or {XYWH_ABS} (XYWH_ABS), boxes in px, found {found}"))
        }
    }
}

/// The proposals of an image: rows, or fields of a dict.
fn of_image(value: &Value, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let boxes = ["bboxes", "boxes", "proposal_boxes"].iter().find_map(|name| field(value, name));
    if let Some(boxes) = boxes {
        let (rated, logits) = (field(value, "scores"), field(value, "objectness_logits"));
        scores.are_logits |= rated.is_none() && logits.is_some();
        return of_fields(boxes, rated.or(logits), is_xywh(value)?, scores);
    }
    if let Some(entries) = value.as_entries() {
        let keys: Vec<&str> = entries.iter().filter_map(|(key, _)| key.as_str()).take(8).collect();
        return Err(format!("expected `bboxes` and `scores`, found a dict of {keys:?}"));
    }
    let of_the_only_class = match value.as_items() {
        Some([class]) if class.as_float().is_none() && rows(class).is_ok() && row(class).is_none() => Some(class),
        _ => None,
    };
    let (width, numbers) = rows(of_the_only_class.unwrap_or(value))?;
    proposals(width, &numbers, None, false, scores)
}

/// The same where boxes and scores are apart.
fn of_fields(boxes: &Value, rated: Option<&Value>, is_xywh: bool, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let (width, numbers) = rows(boxes).map_err(|problem| format!("boxes: {problem}"))?;
    let rated = match rated {
        Some(rated) => Some(column(rated).map_err(|problem| format!("scores: {problem}"))?),
        None => None,
    };
    proposals(width, &numbers, rated.as_deref(), is_xywh, scores)
}

fn proposals(width: usize, numbers: &[f32], rated: Option<&[f32]>, is_xywh: bool, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let n_boxes = numbers.len() / width.max(1);
    if let Some(rated) = rated
        && rated.len() != n_boxes
    {
        return Err(format!("expected as many scores as boxes, found {} and {n_boxes}", rated.len()));
    }
    let proposal = |(place, row): (usize, &[f32])| {
        let [x1, y1, a, b] = [row[0], row[1], row[2], row[3]];
        let (x2, y2) = if is_xywh { (x1 + a, y1 + b) } else { (a, b) };
        let score = rated.map(|rated| rated[place]).or_else(|| row.get(4).copied());
        scores.n_absent += usize::from(score.is_none());
        Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, score: score.unwrap_or(1.0) }
    };
    Ok(numbers.chunks_exact(width.max(1)).enumerate().map(proposal).collect())
}

/// Rows of 4 or 5 numbers, and which; of none, whatever their width.
fn rows(value: &Value) -> Result<(usize, Vec<f32>), String> {
    let nested = value.object_array();
    let value = nested.as_ref().unwrap_or(value);
    let Some(items) = value.as_items() else {
        let array = value.to_array().map_err(|problem| if is_tensor(value) { of_tensor() } else { problem })?;
        return match array.shape[..] {
            [0] | [0, _] | [_, 0] if array.shape.len() == 1 || array.shape[0] == 0 => Ok((5, Vec::new())),
            [_, width @ (4 | 5)] => Ok((width, array.to_f32()?)),
            _ => Err(format!("expected an array [N, 5] or [N, 4], found {:?}", array.shape)),
        };
    };
    let mut numbers = Vec::new();
    let mut width = None;
    for (place, item) in items.iter().enumerate() {
        let of_row = row(item).ok_or_else(|| match item.as_items() {
            _ if is_tensor(item) => of_tensor(),
            Some(items) => format!("row {place}: expected 4 or 5 numbers, found a list of {}", items.len()),
            None if items.len() > 1 && item.to_array().is_ok() => {
                format!("expected boxes of one class, found a list of {} arrays: proposals have no classes", items.len())
            }
            None => format!("row {place}: expected 4 or 5 numbers, found {}", item.kind()),
        })?;
        if *width.get_or_insert(of_row.len()) != of_row.len() {
            return Err(format!("row {place}: expected {} numbers, as in the rows before, found {}", numbers.len() / place, of_row.len()));
        }
        numbers.extend(of_row);
    }
    Ok((width.unwrap_or(5), numbers))
}

/// A box, with or without its score, as a list or an array of one axis.
fn row(value: &Value) -> Option<Vec<f32>> {
    let numbers = column(value).ok()?;
    matches!(numbers.len(), 4 | 5).then_some(numbers)
}

/// A list or an array of numbers, of one axis or with a second one of length 1.
fn column(value: &Value) -> Result<Vec<f32>, String> {
    let nested = value.object_array();
    let value = nested.as_ref().unwrap_or(value);
    let Some(items) = value.as_items() else {
        let array = value.to_array().map_err(|problem| if is_tensor(value) { of_tensor() } else { problem })?;
        return match array.shape[..] {
            [_] | [_, 1] => array.to_f32(),
            [0, _] => Ok(Vec::new()),
            _ => Err(format!("expected an array [N], found {:?}", array.shape)),
        };
    };
    let number = |item: &Value| match item.as_float() {
        Some(number) => Ok(number as f32),
        None => match item.to_array() {
            Ok(array) if array.shape.iter().product::<usize>() == 1 => Ok(array.to_f32()?[0]),
            Ok(array) => Err(format!("expected numbers, found an array {:?}", array.shape)),
            Err(_) => Err(format!("expected numbers, found {}", item.kind())),
        },
    };
    items.iter().map(number).collect()
}

fn is_tensor(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.callable.is_global("torch._utils", "_rebuild_tensor_v2"))
}

fn of_tensor() -> String {
    "expected a numpy array, found a tensor of torch: pickle `tensor.cpu().numpy()`".into()
}

/// Writes the same, float32.
pub fn write_mmdet(images: &[Vec<Proposal>], out: &mut impl Write) -> io::Result<()> {
    let row = |proposal: &Proposal| [proposal.xyxy.x1, proposal.xyxy.y1, proposal.xyxy.x2, proposal.xyxy.y2, proposal.score];
    let array = |proposals: &Vec<Proposal>| (proposals.len(), 5, proposals.iter().flat_map(row).collect::<Vec<f32>>());
    ovenbird_pickle::write_f32_arrays(images.iter().map(array), out)
}

/// Why boxes may lie outside their images.
const OTHERS: &str = "the proposals seem to be of other images, or of resized ones";
const OTHERS_OR_ORDER: &str = "the proposals seem to be of other images, or of resized ones, or in another order";

/// What is wrong with an entry, and what to do about it.
struct Misfit {
    problem: String,
    hint: &'static str,
}

/// Finds the image of every entry, and checks the boxes against it.
///
/// Entries without names are matched by [`order`]. Names that the annotations do not have are left out, and counted. Fails where an image has
/// no entry or two, and where boxes or scores do not fit.
pub fn matched(entries: Entries, annotations: &Annotations, asked: Option<ImageOrder>, path: &Path) -> Result<Matched> {
    let malformed = |problem: String, hint: &str| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) };
    let these = "use the proposals made for exactly these annotations";
    let entries = match entries {
        Entries::InOrder(entries) => {
            let order = order(&entries, annotations, asked, path)?;
            let by_image = annotations.images_in(order).into_iter().map(|image| image.id).zip(entries).collect();
            return Ok(Matched { by_image, order: Some(order), n_others: 0 });
        }
        Entries::Named(entries) => entries,
    };
    let (n_entries, paths) = (entries.len(), Paths::of(annotations));
    let mut by_image = BTreeMap::new();
    let mut stranger = None;
    for (name, proposals) in entries {
        match paths.image(&name, annotations) {
            Some(image) if by_image.insert(image, proposals).is_some() => {
                return Err(malformed(format!("image {image}: two entries, the second as {name}"), these));
            }
            Some(_) => {}
            None => drop(stranger.get_or_insert(name)),
        }
    }
    let absent: Vec<&ImageInfo> = annotations.images.iter().filter(|image| !by_image.contains_key(&image.id)).collect();
    if let Some(first) = absent.first() {
        let (n_absent, n_images) = (absent.len(), annotations.images.len());
        let named = stranger.map(|name| format!("; {name} is the first of {} that they do not have", n_entries - by_image.len()));
        let problem = format!(
            "no entry for {n_absent} of the {n_images} images of the annotations, of which image {} (`{}`) is the first{}",
            first.id,
            first.file_name,
            named.unwrap_or_default()
        );
        return Err(malformed(problem, these));
    }
    let in_order: Vec<Vec<Proposal>> = by_image.values().cloned().collect();
    check(&in_order, &annotations.images_in(ImageOrder::Id), OTHERS).map_err(|Misfit { problem, hint }| malformed(problem, hint))?;
    Ok(Matched { n_others: n_entries - by_image.len(), by_image, order: None })
}

/// Images by their paths.
struct Paths {
    by_path: BTreeMap<String, ImageId>,
    /// By the last part alone: whole paths.
    by_name: BTreeMap<String, Vec<(String, ImageId)>>,
}

impl Paths {
    fn of(annotations: &Annotations) -> Self {
        let (mut by_path, mut by_name) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        for image in &annotations.images {
            let path = slashes(&image.file_name);
            by_name.entry(last_part(&path).to_owned()).or_default().push((path.clone(), image.id));
            by_path.insert(path, image.id);
        }
        Self { by_path, by_name }
    }

    /// The image that a name is of, if it is plainly one: the paths may begin in different folders.
    fn image(&self, name: &ImageName, annotations: &Annotations) -> Option<ImageId> {
        let by_id = |id: i64| annotations.image(ImageId(u64::try_from(id).ok()?)).map(|image| image.id);
        let path = match name {
            ImageName::Id(id) => return by_id(*id),
            ImageName::Text(text) => slashes(text),
        };
        let mut endings = path.match_indices('/').map(|(slash, _)| &path[slash + 1..]);
        let shorter = || endings.find_map(|ending| self.by_path.get(ending));
        let longer = || {
            let ending = format!("/{path}");
            let mut longer = self.by_name.get(last_part(&path))?.iter().filter(|(path, _)| path.ends_with(&ending));
            longer.next().filter(|_| longer.next().is_none()).map(|(_, image)| *image)
        };
        self.by_path.get(&path).or_else(shorter).copied().or_else(|| by_id(path.trim().parse().ok()?)).or_else(longer)
    }
}

fn last_part(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn slashes(path: &str) -> String {
    path.replace('\\', "/").trim_start_matches("./").to_owned()
}

/// Checks proposals against images, and finds the order in which their entries are.
///
/// There must be as many entries as images, every number finite, no box inside out or more than 1 px outside its image, and every score
/// in [0, 1]. Where the file lists its images in ascending id there is one order only. Otherwise it is the one that was `asked` for, or
/// the only one that the boxes fit; fails where they fit both or neither. `path` is for the message.
fn order(proposals: &[Vec<Proposal>], annotations: &Annotations, asked: Option<ImageOrder>, path: &Path) -> Result<ImageOrder> {
    let malformed = |problem: String, hint: String| Err(Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) });
    if proposals.len() != annotations.images.len() {
        let (n_proposals, n_images) = (proposals.len(), annotations.images.len());
        let problem = format!("proposals of {n_proposals} images, but the annotations have {n_images}");
        return malformed(problem, "use the proposals made for exactly these annotations".into());
    }
    let check_in = |order: ImageOrder| check(proposals, &annotations.images_in(order), OTHERS_OR_ORDER);
    if annotations.file_order.is_sorted() {
        return match check_in(ImageOrder::Id) {
            Ok(()) => Ok(asked.unwrap_or(ImageOrder::Id)),
            Err(Misfit { problem, hint }) => malformed(problem, hint.into()),
        };
    }
    match (asked, check_in(ImageOrder::Id), check_in(ImageOrder::File)) {
        (Some(ImageOrder::Id) | None, Ok(()), Err(_)) | (Some(ImageOrder::Id), Ok(()), Ok(())) => Ok(ImageOrder::Id),
        (Some(ImageOrder::File) | None, Err(_), Ok(())) | (Some(ImageOrder::File), Ok(()), Ok(())) => Ok(ImageOrder::File),
        (Some(ImageOrder::Id), Err(Misfit { problem, .. }), Ok(())) => malformed(
            format!("{problem}, with entries in ascending image id"),
            "the boxes fit the order in which the annotations list the images: set `with: {order: file}`".into(),
        ),
        (Some(ImageOrder::File), Ok(()), Err(Misfit { problem, .. })) => malformed(
            format!("{problem}, with entries in the order in which the annotations list the images"),
            "the boxes fit ascending image ids: set `with: {order: id}`".into(),
        ),
        (None, Ok(()), Ok(())) => malformed(
            "the entries have no image ids, the annotations do not list the images in ascending id, and the boxes fit both orders".into(),
            "set `with: {order: file}` if the entries are in the order in which the annotations list the images, as mmdet writes them; \
             set `with: {order: id}` if they are in ascending image id"
                .into(),
        ),
        (_, Err(by_id), Err(in_file)) => malformed(
            format!(
                "the boxes fit neither order of the images: in ascending id, {}; in the order of the annotations' file, {}",
                by_id.problem, in_file.problem
            ),
            format!("{}; `with: {{order: file}}` or `{{order: id}}` says which order entries have", by_id.hint),
        ),
    }
}

/// Checks each entry against the image at the same place. `outside`: why boxes may leave their images. Fails at the first that does not fit, and names its image and row.
fn check(proposals: &[Vec<Proposal>], images: &[&ImageInfo], outside: &'static str) -> Result<(), Misfit> {
    let misfit = |problem: String, hint: &'static str| Err(Misfit { problem, hint });
    for (of_image, image) in proposals.iter().zip(images) {
        let (width, height) = (image.width as f32 + TOLERANCE_PX, image.height as f32 + TOLERANCE_PX);
        for (row, Proposal { xyxy, score }) in of_image.iter().enumerate() {
            let Xyxy { x1, y1, x2, y2 } = *xyxy;
            let place = format!("image {}, row {row}", image.id);
            if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
                return misfit(
                    format!("{place}: expected finite numbers, found [{x1}, {y1}, {x2}, {y2}], score {score}"),
                    "make the proposals again",
                );
            }
            if xyxy.width() < 0.0 || xyxy.height() < 0.0 {
                return misfit(format!("{place}: box [{x1}, {y1}, {x2}, {y2}] is inside out"), "expected x1, y1, x2, y2, score");
            }
            if x1 < -TOLERANCE_PX || y1 < -TOLERANCE_PX || x2 > width || y2 > height {
                let problem = format!("{place}: box [{x1}, {y1}, {x2}, {y2}] leaves the image of {} x {} px", image.width, image.height);
                return misfit(problem, outside);
            }
            if !(0.0..=1.0).contains(score) {
                return misfit(format!("{place}: expected a score in [0, 1], found {score}"), "expected x1, y1, x2, y2, score");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::annotations::ImageId;

    /// Of images with these ids and sizes, in the file's order.
    fn annotations(images: &[(u64, u32, u32)]) -> Annotations {
        let file_order = images.iter().map(|(id, ..)| ImageId(*id)).collect();
        let mut images: Vec<ImageInfo> =
            images.iter().map(|(id, width, height)| ImageInfo { width: *width, height: *height, ..image(*id) }).collect();
        images.sort_by_key(|image| image.id);
        Annotations { images, file_order, categories: Vec::new(), annotations: Vec::new() }
    }

    fn proposal(x1: f32, y1: f32, x2: f32, y2: f32, score: f32) -> Proposal {
        Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, score }
    }

    fn read(path: &Path) -> Result<Vec<Vec<Proposal>>> {
        let Pickled { entries, notes } = super::read(&fs::read(path).unwrap(), path)?;
        assert!(notes.is_empty(), "{notes:?}");
        match entries {
            Entries::InOrder(entries) => Ok(entries),
            Entries::Named(entries) => panic!("{entries:?}"),
        }
    }

    fn image(id: u64) -> ImageInfo {
        let (neg_category_ids, not_exhaustive_category_ids) = (Vec::new(), Vec::new());
        ImageInfo { id: ImageId(id), file_name: "a.jpg".into(), width: 40, height: 30, neg_category_ids, not_exhaustive_category_ids }
    }

    #[test]
    fn pickles_written_by_numpy_are_read() {
        for protocol in [0, 2, 4, 5] {
            let path = format!("{}/../tests/golden/pickle/arrays-{protocol}.pkl", env!("CARGO_MANIFEST_DIR"));
            let read = read(Path::new(&path)).unwrap();
            let two = vec![proposal(0.0, 0.25, 0.5, 0.75, 1.0), proposal(1.25, 1.5, 1.75, 2.0, 2.25)];
            assert_eq!(read, [two.clone(), two.clone(), vec![], two]);
        }
    }

    #[test]
    fn arrays_and_lists_of_one_class_are_read_from_every_protocol() {
        let two = vec![proposal(0.0, 0.25, 10.5, 20.0, 0.75), proposal(1.5, 2.0, 30.0, 29.125, 0.5)];
        let expected = [two.clone(), two.clone(), vec![], two[1..].to_vec()];
        for name in ["flat", "list", "tuple"] {
            for protocol in [2, 4, 5] {
                let path = format!("{}/../tests/golden/proposals/{name}-{protocol}.pkl", env!("CARGO_MANIFEST_DIR"));
                assert_eq!(read(Path::new(&path)).unwrap(), expected, "{name} {protocol}");
            }
        }
    }

    #[test]
    fn boxes_may_reach_a_pixel_out() {
        let proposals = [vec![proposal(-1.0, -0.5, 41.0, 31.0, 1.0), proposal(3.0, 3.0, 3.0, 3.0, 0.0)]];
        let order = order(&proposals, &annotations(&[(4, 40, 30)]), None, Path::new("proposals.pkl"));
        assert_eq!(order.unwrap(), ImageOrder::Id);
    }

    #[test]
    fn what_is_no_list_of_arrays_is_named_with_its_place() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let (six, five) = ([0.0_f32; 6], [0.0_f32; 5]);
        ovenbird_pickle::write_f32_arrays([(1, 5, five.as_slice()), (1, 6, six.as_slice())], &mut file).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("image 1 of the list: expected an array [N, 5] or [N, 4], found [1, 6]"), "{error}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proposals.pkl");
        let proposals = vec![vec![proposal(0.0, 1.0, 20.5, 30.0, 0.75)], vec![]];
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_mmdet(&proposals, &mut file).unwrap();
        file.persist(&path).unwrap();
        assert_eq!(read(&path).unwrap(), proposals);
    }

    #[test]
    fn proposals_that_cannot_belong_to_these_images_are_named() {
        let cases = [
            (vec![vec![]], "proposals.pkl: proposals of 1 images, but the annotations have 2"),
            (
                vec![vec![], vec![proposal(0.0, 0.0, 42.0, 1.0, 0.5)]],
                "proposals.pkl: image 9, row 0: box [0, 0, 42, 1] leaves the image of 40 x 30 px",
            ),
            (vec![vec![proposal(5.0, 0.0, 1.0, 1.0, 0.5)], vec![]], "proposals.pkl: image 4, row 0: box [5, 0, 1, 1] is inside out"),
            (vec![vec![proposal(0.0, 0.0, 1.0, 1.0, 1.5)], vec![]], "proposals.pkl: image 4, row 0: expected a score in [0, 1], found 1.5"),
            (
                vec![vec![proposal(0.0, f32::NAN, 1.0, 1.0, 0.5)], vec![]],
                "proposals.pkl: image 4, row 0: expected finite numbers, found [0, NaN, 1, 1], score 0.5",
            ),
        ];
        for (proposals, expected) in cases {
            let error = order(&proposals, &annotations(&[(4, 40, 30), (9, 40, 30)]), None, Path::new("proposals.pkl")).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_order_of_entries_is_what_the_boxes_fit_or_what_is_said() {
        let (wide, tall) = (proposal(0.0, 0.0, 80.0, 20.0, 0.5), proposal(0.0, 0.0, 20.0, 80.0, 0.5));
        let small = proposal(1.0, 1.0, 9.0, 9.0, 0.5);
        // Image 9, the first one of the file, is wide.
        let unsorted = annotations(&[(9, 80, 20), (4, 20, 80)]);
        let find = |first: Proposal, second: Proposal, asked: Option<ImageOrder>| {
            order(&[vec![first], vec![second]], &unsorted, asked, Path::new("proposals.pkl"))
                .map_err(|error| (error.to_string(), error.hint().unwrap()))
        };
        let (id, file) = (Some(ImageOrder::Id), Some(ImageOrder::File));
        for asked in [None, file] {
            assert_eq!(find(wide, tall, asked), Ok(ImageOrder::File));
        }
        for asked in [None, id] {
            assert_eq!(find(tall, wide, asked), Ok(ImageOrder::Id));
        }
        // The last row of the last image decides.
        assert_eq!(find(small, tall, None), Ok(ImageOrder::File));
        assert_eq!(find(small, small, id), Ok(ImageOrder::Id));
        assert_eq!(find(small, small, file), Ok(ImageOrder::File));

        let refused = |first, second, asked, problem: &str, hints: &[&str]| {
            let (error, hint) = find(first, second, asked).unwrap_err();
            assert_eq!(error, format!("proposals.pkl: {problem}"));
            assert!(hints.iter().all(|words| hint.contains(words)), "{hint}");
        };
        let both = "the entries have no image ids, the annotations do not list the images in ascending id, and the boxes fit both orders";
        refused(small, small, None, both, &["`with: {order: file}`", "`with: {order: id}`"]);
        let leaves = "image 4, row 0: box [0, 0, 80, 20] leaves the image of 20 x 80 px";
        refused(wide, tall, id, &format!("{leaves}, with entries in ascending image id"), &["set `with: {order: file}`"]);
        let in_file = "image 9, row 0: box [0, 0, 20, 80] leaves the image of 80 x 20 px";
        let order_of_file = "with entries in the order in which the annotations list the images";
        refused(tall, wide, file, &format!("{in_file}, {order_of_file}"), &["set `with: {order: id}`"]);
        let neither = "the boxes fit neither order of the images: in ascending id, image 9, row 0: box [0, 0, 20, 80] leaves the image of \
            80 x 20 px; in the order of the annotations' file, image 9, row 0: box [0, 0, 20, 80] leaves the image of 80 x 20 px";
        refused(tall, tall, None, neither, &["`with: {order: file}`", "{order: id}"]);

        // Ascending ids are one order, whatever is asked for.
        let sorted = annotations(&[(4, 20, 80), (9, 80, 20)]);
        for asked in [None, id, file] {
            let found = order(&[vec![tall], vec![wide]], &sorted, asked, Path::new("proposals.pkl"));
            assert_eq!(found.unwrap(), asked.unwrap_or(ImageOrder::Id));
        }
    }

    #[test]
    fn an_empty_array_without_columns_has_no_proposals() {
        let bytes = b"\x80\x02]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x00\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x00tba.";
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        assert_eq!(read(file.path()).unwrap(), [vec![]]);
    }

    fn forms() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/proposals/forms")
    }

    /// Images 2, 4 and 9, called `a/2.jpg` and so on.
    fn three() -> Annotations {
        let mut annotations = annotations(&[(2, 40, 30), (4, 40, 30), (9, 40, 30)]);
        annotations.images.iter_mut().for_each(|image| image.file_name = format!("a/{}.jpg", image.id));
        annotations
    }

    #[test]
    fn every_form_says_the_same() {
        let two = vec![proposal(0.0, 0.25, 10.5, 20.0, 0.75), proposal(1.5, 2.0, 30.0, 29.125, 0.5)];
        let expected = BTreeMap::from([(ImageId(2), two[..1].to_vec()), (ImageId(4), vec![]), (ImageId(9), two.clone())]);
        let mut paths: Vec<_> = fs::read_dir(forms()).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert_eq!(paths.len(), 28);
        for path in paths {
            let name = path.file_stem().unwrap().to_str().unwrap();
            let Pickled { entries, notes } = super::read(&fs::read(&path).unwrap(), &path).unwrap();
            let is_named = ["by-", "mmdet-3", "detectron"].iter().any(|start| name.starts_with(start));
            assert_eq!(matches!(entries, Entries::Named(_)), is_named, "{name}");
            let said =
                if name.starts_with("detectron2") { vec!["`objectness_logits` are all from 0 to 1, and taken as scores"] } else { vec![] };
            assert_eq!(notes, said, "{name}");
            let Matched { by_image, order, n_others } = matched(entries, &three(), None, &path).unwrap();
            assert_eq!((order.is_none(), n_others), (is_named, 0), "{name}");
            if name == "one-array" {
                assert!(by_image.values().all(|of_image| *of_image == two), "{by_image:?}");
            } else {
                assert_eq!(by_image, expected, "{name}");
            }
        }
    }

    fn float(numbers: &[f64]) -> Value {
        Value::List(numbers.iter().map(|number| Value::Float(*number)).collect())
    }

    fn list(items: &[Value]) -> Value {
        Value::List(items.into())
    }

    fn dict(entries: &[(&str, Value)]) -> Value {
        Value::Dict(entries.iter().map(|(key, value)| (Value::Str((*key).into()), value.clone())).collect())
    }

    #[test]
    fn what_is_taken_for_granted_is_said() {
        let mut scores = Scores::default();
        let value = list(&[list(&[float(&[0.0, 0.0, 4.0, 4.0]), float(&[1.0, 1.0, 4.0, 4.0])])]);
        let mut found = entries(&value, &mut scores).unwrap();
        assert_eq!(scores.settle(&mut found), ["2 boxes have no scores: each is taken as 1, so that none comes before another"]);
        assert_eq!(found, Entries::InOrder(vec![vec![proposal(0.0, 0.0, 4.0, 4.0, 1.0), proposal(1.0, 1.0, 4.0, 4.0, 1.0)]]));

        let mut scores = Scores::default();
        let boxes = list(&[list(&[float(&[0.0, 0.0, 4.0, 4.0]), float(&[1.0, 1.0, 4.0, 4.0])])]);
        let value = dict(&[("ids", list(&[Value::Int(7)])), ("boxes", boxes), ("objectness_logits", list(&[float(&[0.0, -40.0])]))]);
        let mut found = entries(&value, &mut scores).unwrap();
        assert_eq!(scores.settle(&mut found), ["scores are the sigmoid of `objectness_logits`"]);
        let Entries::Named(images) = found else { panic!() };
        assert_eq!((images[0].0.clone(), images[0].1[0].score, images[0].1[1].score < 1e-10), (ImageName::Id(7), 0.5, true));
    }

    #[test]
    fn forms_that_are_not_read_are_named_for_what_they_are() {
        let tensor = Value::Object(std::sync::Arc::new(ovenbird_pickle::Object {
            callable: Value::Global { module: "torch._utils".into(), name: "_rebuild_tensor_v2".into() },
            args: [].into(),
            kwargs: None,
            state: None,
            items: [].into(),
            entries: [].into(),
        }));
        let row = float(&[0.0, 0.0, 4.0, 4.0, 0.5]);
        let ids = list(&[Value::Int(7)]);
        let cases = [
            (list(std::slice::from_ref(&tensor)), "image 0 of the list: expected a numpy array, found a tensor of torch"),
            (list(&[list(&[tensor.clone(), tensor.clone()])]), "image 0 of the list: expected a numpy array, found a tensor of torch"),
            (list(&[Value::None]), "image 0 of the list: expected a numpy array, found None"),
            (list(&[list(&[row.clone(), float(&[1.0])])]), "image 0 of the list: row 1: expected 4 or 5 numbers, found a list of 1"),
            (
                list(&[list(&[row.clone(), float(&[0.0; 4])])]),
                "image 0 of the list: row 1: expected 5 numbers, as in the rows before, found 4",
            ),
            (list(&[dict(&[("bbox", row.clone())])]), "image 0 of the list: expected `bboxes` and `scores`, found a dict of [\"bbox\"]"),
            (
                dict(&[("scores", list(std::slice::from_ref(&row))), ("x", Value::None)]),
                "a dict of [\"scores\", \"x\"]: `x`: expected a numpy array, found None",
            ),
            (
                dict(&[("ids", ids.clone()), ("boxes", list(&[list(std::slice::from_ref(&row))])), ("bbox_mode", Value::Int(2))]),
                "`bbox_mode`: expected 0 (XYXY_ABS) or 1 (XYWH_ABS), boxes in px, found 2",
            ),
            (
                dict(&[("ids", ids.clone()), ("boxes", list(&[]))]),
                "expected lists of one length, found 1 ids, boxes of 0 images and scores of 0",
            ),
            (
                dict(&[("ids", ids), ("boxes", list(&[list(&[row])])), ("scores", list(&[float(&[])]))]),
                "image 7: expected as many scores as boxes, found 0 and 1",
            ),
            (Value::Int(3), "expected a list or a dict over images, found an integer"),
        ];
        for (value, expected) in cases {
            let problem = entries(&value, &mut Scores::default()).unwrap_err();
            assert!(problem.starts_with(expected), "{problem}\n{expected}");
        }
        let files: [(&[u8], &str); 7] = [
            (b"", "found an empty file"),
            (b"[[1, 2]]", "found JSON"),
            (b"PK\x03\x04", "found a zip archive, as torch.save and numpy.savez write it"),
            (b"<!DOCTYPE html>", "found a web page"),
            (b"version https://git-lfs.github.com/spec/v1", "found a pointer of Git LFS"),
            (b"\x93NUMPY\x01\x00\x12\x00{'descr': '<f4'}   ", "found a .npy file of one array of numbers"),
            (b"\x93NUMPY\x01\x00\xff\xff{", ".npy header: the file is cut short"),
        ];
        for (bytes, expected) in files {
            let error = super::read(bytes, Path::new("proposals.pkl")).unwrap_err();
            assert!(error.to_string().ends_with(expected) && error.hint().is_some(), "{error}");
        }
    }

    #[test]
    fn named_entries_are_matched_whatever_the_order_and_those_that_do_not_belong_are_named() {
        let entry = |name: &str| (ImageName::Text(name.into()), vec![proposal(0.0, 0.0, 4.0, 4.0, 0.5)]);
        let find = |names: &[&str]| {
            matched(Entries::Named(names.iter().map(|name| entry(name)).collect()), &three(), None, Path::new("p.pkl"))
                .map_err(|error| error.to_string())
        };
        let others = find(&["x/a/9.jpg", "2.jpg", "4", "b/2.jpg", "17"]).unwrap();
        assert_eq!((others.by_image.len(), others.n_others), (3, 2));
        let expected = "p.pkl: no entry for 2 of the 3 images of the annotations, of which image 4 (`a/4.jpg`) is the first; \
                        `b/3.jpg` is the first of 1 that they do not have";
        assert_eq!(find(&["b/3.jpg", "2.jpg"]).unwrap_err(), expected);
        assert_eq!(find(&["2.jpg", "a/2.jpg"]).unwrap_err(), "p.pkl: image 2: two entries, the second as `a/2.jpg`");
        // Names that stand for two images are nobody's.
        let mut twice = three();
        twice.images[0].file_name = "b/4.jpg".into();
        assert_eq!(Paths::of(&twice).image(&ImageName::Text("4.jpg".into()), &twice), None);
        assert_eq!(Paths::of(&twice).image(&ImageName::Text("data/b/4.jpg".into()), &twice), Some(ImageId(2)));

        let mut large = three();
        large.images[2].width = 2;
        let entries = Entries::Named(["2.jpg", "4.jpg", "9.jpg"].map(entry).into());
        let error = matched(entries, &large, None, Path::new("p.pkl")).unwrap_err();
        assert_eq!(error.to_string(), "p.pkl: image 9, row 0: box [0, 0, 4, 4] leaves the image of 2 x 30 px");
        assert!(!error.hint().unwrap().contains("order"));
    }
}
