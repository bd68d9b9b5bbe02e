//! COCO and LVIS v1 annotation files: typed, and checked as a whole before anything is built on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::{
    Error, Result,
    boxes::{Xyxy, xywh_to_xyxy},
    json::{self, Fault, FaultKind, Flag, Whole},
    masks::{Outline, Segmentation},
};

/// Problems of one file that a message names; the rest are counted.
const MAX_NAMED: usize = 10;
/// The longest side of an image that a file may state, in px. No format of images has longer ones in practice.
const MAX_SIDE_PX: u64 = 1 << 20;
/// The largest number in a box, in px.
const MAX_PX: f64 = 1e7;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// An image's `id`.
    ImageId
}
id! {
    /// A category's `id`.
    CategoryId
}
id! {
    /// An annotation's `id`.
    AnnotationId
}

/// How often a category of LVIS v1 is seen in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frequency {
    /// In 1 to 10 images.
    #[serde(rename = "r")]
    Rare,
    /// In 11 to 100 images.
    #[serde(rename = "c")]
    Common,
    /// In more than 100 images.
    #[serde(rename = "f")]
    Frequent,
}

/// A class of objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Category {
    /// Its id.
    pub id: CategoryId,
    /// Its name, as the data set spells it.
    pub name: String,
    /// LVIS only.
    pub frequency: Option<Frequency>,
    /// The WordNet sense, `owl.n.01`: LVIS only.
    pub synset: Option<String>,
    /// Other names, the first mostly equal to `name`: LVIS only.
    pub synonyms: Vec<String>,
}

/// An image, with LVIS's lists of absent and partly labelled classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its id.
    pub id: ImageId,
    /// Its path below the images' folder; LVIS: the last two parts of `coco_url`, `train2017/000000391895.jpg`.
    pub file_name: String,
    /// px.
    pub width: u32,
    /// px.
    pub height: u32,
    /// Categories known to be absent (LVIS).
    pub neg_category_ids: Vec<CategoryId>,
    /// Categories of which not every object is annotated (LVIS).
    pub not_exhaustive_category_ids: Vec<CategoryId>,
}

/// An annotated object.
#[derive(Debug, Clone)]
pub struct Annotation {
    /// Its id; some tools count from 0.
    pub id: AnnotationId,
    /// Its image.
    pub image_id: ImageId,
    /// Its class.
    pub category_id: CategoryId,
    /// Its box as the file has it, `[x, y, width, height]`, for evaluators, whose arithmetic is in f64.
    pub bbox: [f64; 4],
    /// Its box in px.
    pub xyxy: Xyxy,
    /// px², of the mask if there is one; of the box if the file does not state it.
    pub area: f64,
    /// Whether the file states the area.
    pub has_area: bool,
    /// Whether this is a region of many objects.
    pub is_crowd: bool,
    /// Polygons or run lengths, as in the file; see [`crate::masks::Mask`].
    pub segmentation: Outline,
}

/// The order of a list with one entry per image and no ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageOrder {
    /// Ascending image id.
    Id,
    /// As the annotation file lists the images; mmdet reads and writes this order.
    File,
}

/// A whole file.
#[derive(Debug, Clone)]
pub struct Annotations {
    /// In ascending id.
    pub images: Vec<ImageInfo>,
    /// The ids of the images in the file's order.
    pub file_order: Vec<ImageId>,
    /// In ascending id.
    pub categories: Vec<Category>,
    /// The ids of the categories in the file's order.
    pub category_order: Vec<CategoryId>,
    /// In the file's order.
    pub annotations: Vec<Annotation>,
}

/// The parts of a file that a stage needs. Other parts may be missing, and are not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// The images alone: lists of test images have no more.
    Images,
    /// The categories, too.
    Categories,
    /// Everything: images, categories, annotations.
    Labels,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with `images`, `categories` and `annotations`")]
struct RawFile<A> {
    images: Vec<RawImage>,
    categories: Option<Vec<RawCategory>>,
    annotations: Option<A>,
}

#[derive(Deserialize)]
#[serde(expecting = "an image")]
struct RawImage {
    id: Whole,
    file_name: Option<String>,
    coco_url: Option<String>,
    width: Whole,
    height: Whole,
    #[serde(default)]
    neg_category_ids: Vec<Whole>,
    #[serde(default)]
    not_exhaustive_category_ids: Vec<Whole>,
}

#[derive(Deserialize)]
#[serde(expecting = "a category")]
struct RawCategory {
    id: Whole,
    name: String,
    frequency: Option<Frequency>,
    synset: Option<String>,
    #[serde(default)]
    synonyms: Vec<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an annotation")]
struct RawAnnotation<S> {
    id: Whole,
    image_id: Whole,
    category_id: Whole,
    bbox: [f64; 4],
    area: Option<f64>,
    #[serde(default)]
    iscrowd: Flag,
    segmentation: Option<S>,
}

/// An outline as it is written; parsed after the file is read.
#[derive(Deserialize)]
#[serde(transparent)]
struct AnyOutline<'a>(#[serde(borrow)] &'a RawValue);

impl From<AnyOutline<'_>> for Outline {
    fn from(AnyOutline(json): AnyOutline<'_>) -> Self {
        Self::of_json(json.get())
    }
}

/// The fields by which files of other tasks are known.
#[derive(Deserialize)]
struct OtherTask {
    annotations: Vec<OtherAnnotation>,
}

#[derive(Deserialize)]
struct OtherAnnotation {
    segments_info: Option<IgnoredAny>,
    caption: Option<IgnoredAny>,
    keypoints: Option<IgnoredAny>,
    bbox: Option<IgnoredAny>,
}

/// The hint for a file of another kind.
const AGAIN: &str = "check that the download is complete and that this is an `instances` or `lvis_v1` json";
/// The same, where its content contradicts itself.
const MEND: &str = "mend the file, or make it again from its source";
/// The hint for annotations without numeric ids.
const NUMBER: &str = "number the annotations: give each a whole number of its own as `id`";

impl Annotations {
    /// Reads a file, as [`Self::parse`].
    pub fn load(path: &Path) -> Result<Self> {
        let json = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&json, path)
    }

    /// Reads and checks what a file holds; `path` is for the message. Every contradiction is found before any is reported.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        Self::parse_for(json, path, Needs::Labels)
    }

    /// As [`Self::parse`], of whatever a file has: lists that it lacks are empty.
    pub fn parse_all(json: &[u8], path: &Path) -> Result<Self> {
        let malformed = |(problem, hint): (String, String)| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) };
        Self::checked(read(json, Needs::Labels).map_err(malformed)?, path)
    }

    /// As [`Self::parse`], for a stage that does not need everything: lists that it does not need are empty.
    pub fn parse_for(json: &[u8], path: &Path, needs: Needs) -> Result<Self> {
        let malformed = |problem: String, hint: String| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) };
        let raw = read(json, needs).map_err(|(problem, hint)| malformed(problem, hint))?;
        let lacks_categories = needs >= Needs::Categories && raw.categories.is_none();
        let lacks_labels = needs == Needs::Labels && raw.annotations.is_none();
        if lacks_categories || lacks_labels {
            let names = match (lacks_labels, lacks_categories) {
                (true, false) => "`annotations`",
                (false, _) => "`categories`",
                (true, true) => "`annotations` and no `categories`",
            };
            let hint = "give the file that has the labels of these images (`instances` or `lvis_v1`); a list of images is enough for \
                        embeddings of whole images and of blocks, and for proposals";
            return Err(malformed(format!("the file has no {names}, which are needed here"), hint.into()));
        }
        Self::checked(raw, path)
    }

    fn checked(raw: RawFile<Vec<RawAnnotation<Outline>>>, path: &Path) -> Result<Self> {
        match problems(&raw).into_words() {
            None => Ok(Self::from_raw(raw)),
            Some((problem, hint)) => Err(Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) }),
        }
    }

    fn from_raw(raw: RawFile<Vec<RawAnnotation<Outline>>>) -> Self {
        let ids = |ids: Vec<Whole>| ids.into_iter().map(|Whole(id)| CategoryId(id)).collect();
        let image = |image: RawImage| ImageInfo {
            id: ImageId(image.id.0),
            file_name: file_name(&image).unwrap_or_default(),
            // Checked to be at most `MAX_SIDE_PX`.
            width: image.width.0 as u32,
            height: image.height.0 as u32,
            neg_category_ids: ids(image.neg_category_ids),
            not_exhaustive_category_ids: ids(image.not_exhaustive_category_ids),
        };
        let mut images: Vec<ImageInfo> = raw.images.into_iter().map(image).collect();
        let file_order = images.iter().map(|image| image.id).collect();
        images.sort_by_key(|image| image.id);
        let category = |raw: RawCategory| Category {
            id: CategoryId(raw.id.0),
            name: raw.name,
            frequency: raw.frequency,
            synset: raw.synset,
            synonyms: raw.synonyms,
        };
        let mut categories: Vec<Category> = raw.categories.unwrap_or_default().into_iter().map(category).collect();
        let category_order = categories.iter().map(|category| category.id).collect();
        categories.sort_by_key(|category| category.id);
        let annotation = |raw: RawAnnotation<Outline>| Annotation {
            id: AnnotationId(raw.id.0),
            image_id: ImageId(raw.image_id.0),
            category_id: CategoryId(raw.category_id.0),
            bbox: raw.bbox,
            xyxy: xywh_to_xyxy(raw.bbox),
            area: raw.area.unwrap_or(raw.bbox[2] * raw.bbox[3]),
            has_area: raw.area.is_some(),
            is_crowd: raw.iscrowd.0,
            segmentation: raw.segmentation.unwrap_or_default(),
        };
        let annotations = raw.annotations.unwrap_or_default().into_iter().map(annotation).collect();
        Self { images, file_order, categories, category_order, annotations }
    }

    /// An image by its id.
    pub fn image(&self, id: ImageId) -> Option<&ImageInfo> {
        self.images.binary_search_by_key(&id, |image| image.id).ok().map(|place| &self.images[place])
    }

    /// The images in an order.
    pub fn images_in(&self, order: ImageOrder) -> Vec<&ImageInfo> {
        match order {
            ImageOrder::Id => self.images.iter().collect(),
            ImageOrder::File => self.file_order.iter().filter_map(|id| self.image(*id)).collect(),
        }
    }

    /// A category by its id.
    pub fn category(&self, id: CategoryId) -> Option<&Category> {
        self.categories.binary_search_by_key(&id, |category| category.id).ok().map(|place| &self.categories[place])
    }

    /// The categories as the file lists them; tables of RALF have this order.
    pub fn categories_in_file_order(&self) -> impl Iterator<Item = &Category> {
        self.category_order.iter().filter_map(|id| self.category(*id))
    }

    /// The annotations of every image that has some, in the file's order within an image.
    pub fn by_image(&self) -> BTreeMap<ImageId, Vec<&Annotation>> {
        let mut by_image: BTreeMap<ImageId, Vec<&Annotation>> = BTreeMap::new();
        for annotation in &self.annotations {
            by_image.entry(annotation.image_id).or_default().push(annotation);
        }
        by_image
    }
}

/// The path of an image below the images' folder.
fn file_name(image: &RawImage) -> Option<String> {
    let from_url = || {
        let mut parts = image.coco_url.as_ref()?.rsplit('/');
        let (name, folder) = (parts.next()?, parts.next()?);
        (!name.is_empty() && !folder.is_empty()).then(|| format!("{folder}/{name}"))
    };
    image.file_name.clone().or_else(from_url)
}

/// Reads a file as far as it is needed; fails with a problem and what to do about it.
fn read(json: &[u8], needs: Needs) -> Result<RawFile<Vec<RawAnnotation<Outline>>>, (String, String)> {
    if needs < Needs::Labels {
        let RawFile { images, categories, annotations: _ } =
            json::parse::<RawFile<IgnoredAny>>(json).map_err(|fault| in_words(json, &fault))?;
        return Ok(RawFile { images, categories: categories.filter(|_| needs == Needs::Categories), annotations: None });
    }
    // Outlines of other shapes than COCO's are rare, and to expect them takes time.
    if let Ok(raw) = serde_json::from_slice::<RawFile<Vec<RawAnnotation<Segmentation>>>>(json::without_mark(json)) {
        return Ok(raw.with_outlines());
    }
    match serde_json::from_slice::<RawFile<Vec<RawAnnotation<AnyOutline<'_>>>>>(json::without_mark(json)) {
        Ok(raw) => Ok(raw.with_outlines()),
        // Outlines aside: what is wrong is elsewhere, or the file is no json.
        Err(_) => match json::parse_with_places::<RawFile<Vec<RawAnnotation<IgnoredAny>>>>(json) {
            Err(fault) => Err(in_words(json, &fault)),
            Ok(_) => Err(("`segmentation`: text that is no Unicode".into(), MEND.into())),
        },
    }
}

impl<S: Into<Outline>> RawFile<Vec<RawAnnotation<S>>> {
    fn with_outlines(self) -> RawFile<Vec<RawAnnotation<Outline>>> {
        let annotation = |RawAnnotation { id, image_id, category_id, bbox, area, iscrowd, segmentation }: RawAnnotation<S>| RawAnnotation {
            id,
            image_id,
            category_id,
            bbox,
            area,
            iscrowd,
            segmentation: segmentation.map(Into::into),
        };
        let annotations = self.annotations.map(|annotations| annotations.into_iter().map(annotation).collect());
        RawFile { images: self.images, categories: self.categories, annotations }
    }
}

/// The error of a file that could not be read, with its hint.
fn in_words(json: &[u8], fault: &Fault) -> (String, String) {
    const EXPECTED: &str = "expected a COCO or LVIS annotation file";
    let other = |found: &str, hint: &str| (format!("{EXPECTED}, found {found}"), hint.to_owned());
    let first = json::without_mark(json).trim_ascii_start().first();
    match fault.kind {
        FaultKind::OtherFile | FaultKind::OtherEncoding => {
            let found = fault.problem.rsplit_once(", found ").map_or("no json", |(_, found)| found);
            return other(found, &fault.hint().unwrap_or_else(|| AGAIN.into()));
        }
        FaultKind::Shape if first == Some(&b'[') => {
            let hint = "give the file that these were made from, an object with `images`, `categories` and `annotations`";
            return other("a list, as a results file of detections is", hint);
        }
        FaultKind::Shape if fault.place.starts_with("annotations[") => {
            let others = json::parse::<OtherTask>(json).map(|file| file.annotations).unwrap_or_default();
            let instances = "give the `instances` json of the same images, which lies in the same download";
            match others.first() {
                Some(OtherAnnotation { segments_info: Some(_), .. }) => return other("a panoptic one (`segments_info`)", instances),
                Some(OtherAnnotation { caption: Some(_), bbox: None, .. }) => return other("one of captions (`caption`)", instances),
                Some(OtherAnnotation { keypoints: Some(_), bbox: None, .. }) => {
                    return other("one of keypoints without boxes (`keypoints`, no `bbox`)", instances);
                }
                Some(_) | None => {}
            }
        }
        FaultKind::Shape | FaultKind::Cut | FaultKind::NoNumber | FaultKind::Syntax => {}
    }
    let field = fault.place.rsplit('.').next().unwrap_or_default();
    let is_in = |list: &str| fault.place.starts_with(list);
    let hint = match (field, fault.hint()) {
        (_, Some(hint)) => hint,
        ("id", None) if is_in("annotations[") => NUMBER.into(),
        ("id", None) if is_in("images[") => "number the images: each needs a whole number of its own as `id`".into(),
        ("id", None) => "number the categories: each needs a whole number of its own as `id`".into(),
        ("image_id", None) => "give each annotation as `image_id` the whole number that its image has as `id`".into(),
        ("category_id", None) => "give each annotation as `category_id` the whole number that its category has as `id`".into(),
        ("iscrowd", None) => "write 0 for an object and 1 for a region of many".into(),
        ("width" | "height", None) => "write the size of the image file, in px".into(),
        (_, None) if field.starts_with("bbox") => "write boxes as [x, y, width, height] in px, or leave the annotation out".into(),
        (_, None) if fault.problem.starts_with("expected the key `id`") && is_in("annotations[") => NUMBER.into(),
        (_, None) => AGAIN.into(),
    };
    (format!("{EXPECTED}: {fault}"), hint)
}

/// The first problems of a file in words, how many there are, and what to do about the first.
#[derive(Default)]
struct Problems {
    named: Vec<String>,
    total: usize,
    hint: Option<&'static str>,
}

impl Problems {
    fn push(&mut self, problem: String, hint: &'static str) {
        self.total += 1;
        self.hint.get_or_insert(hint);
        if self.named.len() < MAX_NAMED {
            self.named.push(problem);
        }
    }

    fn into_words(self) -> Option<(String, &'static str)> {
        let Self { mut named, total, hint } = self;
        if total > named.len() {
            named.push(format!("and {} more, {total} problems in all", total - named.len()));
        }
        hint.map(|hint| (named.join("; "), hint))
    }
}

fn problems(raw: &RawFile<Vec<RawAnnotation<Outline>>>) -> Problems {
    let mut problems = Problems::default();
    let mut images = BTreeMap::new();
    for (place, image) in raw.images.iter().enumerate() {
        let id = image.id;
        let size = [image.width.0, image.height.0];
        if images.insert(id, size.map(|side| side as f64)).is_some() {
            problems.push(format!("images[{place}].id: a second image with id {}", id.0), "give each image an `id` of its own");
        }
        if size.iter().any(|side| !(1..=MAX_SIDE_PX).contains(side)) {
            let [width, height] = size;
            let problem = format!("images[{place}]: expected a width and a height from 1 to {MAX_SIDE_PX} px, found {width} x {height}");
            problems.push(problem, "write the size of the image file, in px");
        }
        if file_name(image).is_none_or(|name| name.is_empty()) {
            problems.push(format!("images[{place}]: expected `file_name`, or `coco_url` ending in folder/name"), MEND);
        }
    }
    let (mut categories, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (place, category) in raw.categories.iter().flatten().enumerate() {
        if !names.insert(&category.name) {
            problems
                .push(format!("categories[{place}].name: a second category named `{}`", category.name), "give each category its own name");
        }
        if !categories.insert(category.id) {
            let problem = format!("categories[{place}].id: a second category with id {}", category.id.0);
            problems.push(problem, "give each category an `id` of its own");
        }
    }
    // Without categories, category ids cannot be checked.
    let images_with_lists = raw.images.iter().enumerate().filter(|_| raw.categories.is_some());
    for (place, image) in images_with_lists {
        for (field, ids) in
            [("neg_category_ids", &image.neg_category_ids), ("not_exhaustive_category_ids", &image.not_exhaustive_category_ids)]
        {
            if let Some(missing) = ids.iter().find(|id| !categories.contains(id)) {
                problems.push(format!("images[{place}].{field}: names category {}, which is not there", missing.0), MEND);
            }
        }
    }
    let mut annotations = BTreeSet::new();
    let (mut n_seen, mut n_unseen) = (0_usize, 0_usize);
    for (place, annotation) in raw.annotations.iter().flatten().enumerate() {
        let at = |field: &str| format!("annotations[{place}].{field}");
        if !annotations.insert(annotation.id) {
            problems.push(format!("{}: a second annotation with id {}", at("id"), annotation.id.0), NUMBER);
        }
        if !images.contains_key(&annotation.image_id) {
            problems.push(format!("{}: {} is not among the images", at("image_id"), annotation.image_id.0), MEND);
        }
        if !categories.contains(&annotation.category_id) {
            problems.push(format!("{}: {} is not among the categories", at("category_id"), annotation.category_id.0), MEND);
        }
        let [x, y, width, height] = annotation.bbox;
        if annotation.bbox.iter().any(|number| number.abs() > MAX_PX) || width < 0.0 || height < 0.0 {
            let hint = "write boxes as [x, y, width, height] in px, or leave these annotations out";
            problems.push(format!("{}: expected [x, y, width, height] in px, found {:?}", at("bbox"), annotation.bbox), hint);
        } else if let Some([image_width, image_height]) = images.get(&annotation.image_id) {
            let is_seen = width > 0.0 && height > 0.0 && x < *image_width && y < *image_height && x + width > 0.0 && y + height > 0.0;
            n_seen += usize::from(is_seen);
            n_unseen += usize::from(!is_seen);
        }
        if let Some(area) = annotation.area.filter(|area| !(0.0..=MAX_PX * MAX_PX).contains(area)) {
            problems.push(format!("{}: expected an area of 0 or more px², found {area:?}", at("area")), MEND);
        }
    }
    if n_unseen > n_seen {
        let n_boxes = n_seen + n_unseen;
        let problem = format!("{n_unseen} of {n_boxes} boxes have no area or lie outside their image");
        problems
            .push(problem, "write boxes as [x, y, width, height] in px of the image; these seem to be of other images, or of resized ones");
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Annotations> {
        Annotations::parse(json.as_bytes(), Path::new("instances.json"))
    }

    #[test]
    fn images_are_found_by_id_whatever_the_order_of_the_file() {
        let annotations = read(
            r#"{"images": [{"id": 9, "file_name": "b.jpg", "width": 4, "height": 3}, {"id": 2, "coco_url": "https://images.cocodataset.org/val2017/a.jpg", "width": 1, "height": 1}],
                "categories": [{"id": 8, "name": "wren"}, {"id": 5, "name": "owl", "frequency": "r", "synset": "owl.n.01", "synonyms": ["owl", "hooter"]}],
                "annotations": [{"id": 1, "image_id": 9, "category_id": 5, "bbox": [0.5, 1, 2, 1], "area": 1.5, "iscrowd": 0, "segmentation": [[0.5, 1, 2.5, 1, 2.5, 2]]}]}"#,
        )
        .unwrap();
        let ids = |order| annotations.images_in(order).iter().map(|image| image.id.0).collect::<Vec<_>>();
        assert_eq!((ids(ImageOrder::Id), ids(ImageOrder::File)), (vec![2, 9], vec![9, 2]));
        assert_eq!(annotations.image(ImageId(2)).unwrap().file_name, "val2017/a.jpg");
        assert_eq!(annotations.annotations[0].xyxy, Xyxy { x1: 0.5, y1: 1.0, x2: 2.5, y2: 2.0 });
        let Category { frequency, synset, synonyms, .. } = annotations.categories[0].clone();
        assert_eq!((frequency, synset.as_deref(), synonyms.join(" ").as_str()), (Some(Frequency::Rare), Some("owl.n.01"), "owl hooter"));
        assert_eq!(annotations.categories_in_file_order().map(|category| category.id.0).collect::<Vec<_>>(), [8, 5]);
    }

    #[test]
    fn every_contradiction_is_named_at_once() {
        let error = read(
            r#"{"images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 0}, {"id": 1, "width": 1, "height": 1}],
                "categories": [{"id": 5, "name": "owl"}, {"id": 5, "name": "wren"}],
                "annotations": [{"id": 0, "image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]},
                                {"id": 7, "image_id": 3, "category_id": 6, "bbox": [0, 0, -1, 1]},
                                {"id": 7, "image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]}]}"#,
        )
        .unwrap_err()
        .to_string();
        let expected = "instances.json: images[0]: expected a width and a height from 1 to 1048576 px, found 4 x 0; \
            images[1].id: a second image with id 1; images[1]: expected `file_name`, or `coco_url` ending in folder/name; \
            categories[1].id: a second category with id 5; annotations[1].image_id: 3 is not among the images; \
            annotations[1].category_id: 6 is not among the categories; \
            annotations[1].bbox: expected [x, y, width, height] in px, found [0.0, 0.0, -1.0, 1.0]; \
            annotations[2].id: a second annotation with id 7";
        assert_eq!(error, expected);
    }

    #[test]
    fn ten_problems_are_named_and_all_are_counted() {
        let annotations: Vec<String> =
            (1..=12).map(|id| format!(r#"{{"id": {id}, "image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1], "area": -1}}"#)).collect();
        let json = format!(
            r#"{{"images": [{{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}}],
                "categories": [{{"id": 5, "name": "owl"}}, {{"id": 6, "name": "owl"}}], "annotations": [{}]}}"#,
            annotations.join(",")
        );
        let error = read(&json).unwrap_err().to_string();
        assert!(
            error.starts_with("instances.json: categories[1].name: a second category named `owl`; annotations[0].area: expected an area"),
            "{error}"
        );
        assert!(
            error.ends_with("annotations[8].area: expected an area of 0 or more px², found -1.0; and 3 more, 13 problems in all"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_not_there_can_be_told_from_a_bad_one() {
        let error = Annotations::load(Path::new("no such folder/instances.json")).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }

    /// A file of one owl, with some texts replaced.
    fn owl(changes: &[(&str, &str)]) -> String {
        let sound = r#"{"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}], "categories": [{"id": 5, "name": "owl"}],
            "annotations": [{"id": 7, "image_id": 1, "category_id": 5, "bbox": [2, 3, 20, 16], "area": 320, "iscrowd": 0}]}"#;
        changes.iter().fold(sound.to_owned(), |json, (from, to)| {
            assert!(json.contains(from), "{from}");
            json.replace(from, to)
        })
    }

    #[test]
    fn numbers_are_read_however_exporters_write_them() {
        let expected = read(&owl(&[])).unwrap();
        for changes in [
            [("\"id\": 7", "\"id\": 7.0"), ("\"image_id\": 1", "\"image_id\": \"1\"")],
            [("\"id\": 5", "\"id\": \"5\""), ("\"category_id\": 5", "\"category_id\": 5.0")],
            [("\"width\": 64", "\"width\": 64.0"), ("\"height\": 48", "\"height\": \"48\"")],
            [("\"iscrowd\": 0", "\"iscrowd\": false"), ("{\"images\"", "\u{feff}{\"images\"")],
            [("\"iscrowd\": 0", "\"iscrowd\": null"), ("320", "320.0")],
        ] {
            let found = read(&owl(&changes)).unwrap();
            assert_eq!((&found.images, &found.categories), (&expected.images, &expected.categories));
            let annotation = |file: &Annotations| {
                let Annotation { id, image_id, category_id, bbox, is_crowd, .. } = file.annotations[0];
                (id, image_id, category_id, bbox.map(f64::to_bits), is_crowd)
            };
            assert_eq!(annotation(&found), annotation(&expected), "{changes:?}");
        }
        assert!(read(&owl(&[("\"iscrowd\": 0", "\"iscrowd\": true")])).unwrap().annotations[0].is_crowd);
        let from_0 = read(&owl(&[("\"id\": 7", "\"id\": 0")])).unwrap();
        assert_eq!(from_0.annotations[0].id, AnnotationId(0));
        let large = read(&owl(&[("\"id\": 7", "\"id\": 9007199254740993")])).unwrap();
        assert_eq!(large.annotations[0].id, AnnotationId(9_007_199_254_740_993));
    }

    #[test]
    fn outlines_of_any_shape_are_taken_where_boxes_are_wanted() {
        let outline = |json: &str| {
            let json = owl(&[("\"iscrowd\": 0", &format!("\"iscrowd\": 0, \"segmentation\": {json}"))]);
            read(&json).unwrap_or_else(|error| panic!("{json}: {error}")).annotations.remove(0).segmentation
        };
        assert!(matches!(outline("null"), Outline::Missing));
        assert!(matches!(outline("[[1, 2, 3, 4, 5, 6]]"), Outline::Drawn(Segmentation::Polygon(_))));
        assert!(matches!(outline(r#"{"size": [48, 64], "counts": [3072]}"#), Outline::Drawn(Segmentation::UncompressedRle { .. })));
        for (json, words) in [
            (r#""""#, "an empty text"),
            ("{}", "an object without `size` and `counts`"),
            ("[2, 3, 22, 3, 22, 19]", "one list of numbers instead of a list of polygons"),
            ("[[2, 3], [22, 3], [22, 19]]", "a list of points instead of a list of polygons"),
            ("[[[2, 3], [22, 3]]]", "something else than a list of polygons or run lengths"),
            (r#"[{"x": 1, "y": 2}]"#, "a list of points instead of a list of polygons"),
            ("7", "something else than a list of polygons or run lengths"),
            (r#"{"size": [48], "counts": "x"}"#, "an object without `size` and `counts`"),
        ] {
            assert!(matches!(outline(json), Outline::Other(found) if found == words), "{json}: {:?}", outline(json));
        }
    }

    #[test]
    fn what_is_no_annotation_file_is_said_with_what_to_do() {
        /// Changes of a sound file, what is said, what is advised.
        type Case = (&'static [(&'static str, &'static str)], &'static str, &'static str);
        let cases: &[Case] = &[
            (
                &[("\"id\": 7", "\"id\": \"c33c-1\"")],
                "annotations[0].id: expected a whole number of 0 or more, found the text",
                "number the annotations",
            ),
            (&[("\"id\": 7, ", "")], "annotations[0]: expected the key `id`, found none", "number the annotations"),
            (
                &[("\"image_id\": 1", "\"image_id\": 1.5")],
                "annotations[0].image_id: expected a whole number of 0 or more, found 1.5",
                "`image_id`",
            ),
            (&[("\"category_id\": 5", "\"category_id\": \"owl\"")], "annotations[0].category_id: expected a whole number", "`category_id`"),
            (&[("\"id\": 7", "\"id\": -7")], "annotations[0].id: expected a whole number of 0 or more, found -7", "number the annotations"),
            (&[("\"iscrowd\": 0", "\"iscrowd\": 7")], "annotations[0].iscrowd: expected 0 or 1, found 7", "write 0 for an object"),
            (&[("20, 16", "NaN, 16")], "annotations[0].bbox[2]: expected a number, found NaN, which is no json", "json has no NaN"),
            (&[("20, 16", "20")], "annotations[0].bbox: expected a list of 4, found a list of 3", "[x, y, width, height]"),
            (&[("20, 16", "1e308, 16")], "annotations[0].bbox: expected [x, y, width, height] in px, found", "[x, y, width, height]"),
            (&[("320", "1e300")], "annotations[0].area: expected an area of 0 or more px²", "mend the file"),
            (
                &[("\"width\": 64", "\"width\": 0")],
                "images[0]: expected a width and a height from 1 to 1048576 px, found 0 x 48",
                "size of the image",
            ),
            (&[("\"width\": 64", "\"width\": 5000000000")], "images[0]: expected a width", "size of the image"),
            (&[("[2, 3, 20", "[900, 3, 20")], "1 of 1 boxes have no area or lie outside their image", "of resized ones"),
            (
                &[("\"bbox\": [2, 3, 20, 16]", "\"segments_info\": []")],
                "found a panoptic one (`segments_info`)",
                "`instances` json of the same images",
            ),
            (&[("\"category_id\": 5, \"bbox\": [2, 3, 20, 16]", "\"caption\": \"x\"")], "found one of captions", "`instances` json"),
            (&[("\"bbox\": [2, 3, 20, 16]", "\"keypoints\": []")], "found one of keypoints without boxes", "`instances` json"),
            (&[("\"annotations\"", "\"labels\"")], "the file has no `annotations`, which are needed here", "has the labels"),
            (
                &[("\"categories\"", "\"classes\""), ("\"annotations\"", "\"labels\"")],
                "the file has no `annotations` and no `categories`",
                "has the labels",
            ),
        ];
        for (changes, problem, hint) in cases {
            let error = read(&owl(changes)).unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
            assert!(error.hint().unwrap().contains(hint), "{error}: {:?}", error.hint());
        }
        for (bytes, problem, hint) in [
            (b"<!DOCTYPE html>".as_slice(), "found a web page", "download it again"),
            (b"", "found an empty file", "download it again"),
            (b"\x1f\x8b\x08\0", "found a gzip archive", "unpack it"),
            (b"PK\x03\x04", "found a zip archive", "unpack it"),
            (b"\x80\x04\x95", "found a Python pickle", "download it again"),
            (b"<?xml version='1.0'?>", "found XML", "download it again"),
            (b"\xff\xfe{\0", "found a text in UTF-16", "save it as UTF-8"),
            (br#"[{"image_id": 1, "score": 1}]"#, "found a list, as a results file of detections is", "made from"),
        ] {
            let error = Annotations::parse(bytes, Path::new("a.json")).unwrap_err();
            assert!(error.to_string().starts_with(&format!("a.json: expected a COCO or LVIS annotation file, {problem}")), "{error}");
            assert!(error.hint().unwrap().contains(hint), "{error}: {:?}", error.hint());
        }
    }

    #[test]
    fn what_is_not_needed_may_be_missing_or_of_another_task() {
        let parse = |json: &str, needs| Annotations::parse_for(json.as_bytes(), Path::new("a.json"), needs);
        let images = r#"{"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48, "neg_category_ids": [9]}]}"#;
        assert_eq!(parse(images, Needs::Images).unwrap().images.len(), 1);
        assert!(parse(images, Needs::Categories).unwrap_err().to_string().contains("no `categories`"));
        let panoptic = owl(&[("\"bbox\": [2, 3, 20, 16]", "\"segments_info\": []")]);
        for needs in [Needs::Images, Needs::Categories] {
            let file = parse(&panoptic, needs).unwrap();
            assert_eq!((file.images.len(), file.categories.len(), file.annotations.len()), (1, usize::from(needs > Needs::Images), 0));
        }
        // A file of no objects is one of labels nevertheless.
        assert!(parse(&owl(&[]).replace("\"annotations\": [", "\"annotations\": [], \"x\": ["), Needs::Labels).is_ok());
    }

    #[test]
    fn json_that_is_cut_or_of_another_shape_is_named_with_its_line() {
        for (json, words) in [
            ("{\"images\": [", "line 1 column 12"),
            ("{\"images\": {}}", "images: expected a list, found an object (line 1 column"),
            ("{\"annotations\": []}", "expected the key `images`, found none"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.starts_with("instances.json: expected a COCO or LVIS annotation file") && error.contains(words), "{error}");
        }
    }
}
