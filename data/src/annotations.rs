//! COCO and LVIS v1 annotation files: typed, and checked as a whole before anything is built on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    boxes::{Xyxy, xywh_to_xyxy},
    masks::Segmentation,
};

/// Problems of one file that a message names; the rest are counted.
const MAX_NAMED: usize = 10;

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

/// An image and what LVIS says about its labels.
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
    /// Its id, never 0.
    pub id: AnnotationId,
    /// Its image.
    pub image_id: ImageId,
    /// Its class.
    pub category_id: CategoryId,
    /// Its box as the file has it, `[x, y, width, height]`, for evaluators, whose arithmetic is in f64.
    pub bbox: [f64; 4],
    /// Its box in px.
    pub xyxy: Xyxy,
    /// px², of the mask where there is one; of the box where the file does not say.
    pub area: f64,
    /// Whether the file says the area.
    pub has_area: bool,
    /// Whether this is a region of many objects.
    pub is_crowd: bool,
    /// Polygons or run lengths, as in the file; see [`crate::masks::Mask`].
    pub segmentation: Option<Segmentation>,
}

/// The order of a list that has one entry an image and no ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageOrder {
    /// Ascending image id.
    Id,
    /// As the annotation file lists the images.
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
    /// In the file's order.
    pub annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with `images`, `categories` and `annotations`")]
struct RawFile {
    images: Vec<RawImage>,
    categories: Vec<RawCategory>,
    annotations: Vec<RawAnnotation>,
}

#[derive(Deserialize)]
#[serde(expecting = "an image")]
struct RawImage {
    id: u64,
    file_name: Option<String>,
    coco_url: Option<String>,
    width: u32,
    height: u32,
    #[serde(default)]
    neg_category_ids: Vec<u64>,
    #[serde(default)]
    not_exhaustive_category_ids: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "a category")]
struct RawCategory {
    id: u64,
    name: String,
    frequency: Option<Frequency>,
    synset: Option<String>,
    #[serde(default)]
    synonyms: Vec<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an annotation")]
struct RawAnnotation {
    id: u64,
    image_id: u64,
    category_id: u64,
    bbox: [f64; 4],
    area: Option<f64>,
    #[serde(default)]
    iscrowd: u8,
    segmentation: Option<Segmentation>,
}

impl Annotations {
    /// Reads a file, as [`Self::parse`].
    pub fn load(path: &Path) -> Result<Self> {
        let json = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&json, path)
    }

    /// Reads and checks what a file holds; `path` is for the message. Every contradiction is found before any is reported.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let raw: RawFile = serde_json::from_slice(json).map_err(|error| Error::Malformed {
            path: path.to_owned(),
            problem: format!("expected a COCO or LVIS annotation file: {error}"),
            hint: Some("check that the download is complete and that this is an `instances` or `lvis_v1` json".into()),
        })?;
        let Some(problem) = problems(&raw).into_words() else { return Ok(Self::from_raw(raw)) };
        let hint = Some("mend the file, or make it again from its source".into());
        Err(Error::Malformed { path: path.to_owned(), problem, hint })
    }

    fn from_raw(raw: RawFile) -> Self {
        let image = |image: RawImage| ImageInfo {
            id: ImageId(image.id),
            file_name: file_name(&image).unwrap_or_default(),
            width: image.width,
            height: image.height,
            neg_category_ids: image.neg_category_ids.into_iter().map(CategoryId).collect(),
            not_exhaustive_category_ids: image.not_exhaustive_category_ids.into_iter().map(CategoryId).collect(),
        };
        let mut images: Vec<ImageInfo> = raw.images.into_iter().map(image).collect();
        let file_order = images.iter().map(|image| image.id).collect();
        images.sort_by_key(|image| image.id);
        let category = |raw: RawCategory| Category {
            id: CategoryId(raw.id),
            name: raw.name,
            frequency: raw.frequency,
            synset: raw.synset,
            synonyms: raw.synonyms,
        };
        let mut categories: Vec<Category> = raw.categories.into_iter().map(category).collect();
        categories.sort_by_key(|category| category.id);
        let annotation = |raw: RawAnnotation| Annotation {
            id: AnnotationId(raw.id),
            image_id: ImageId(raw.image_id),
            category_id: CategoryId(raw.category_id),
            bbox: raw.bbox,
            xyxy: xywh_to_xyxy(raw.bbox),
            area: raw.area.unwrap_or(raw.bbox[2] * raw.bbox[3]),
            has_area: raw.area.is_some(),
            is_crowd: raw.iscrowd != 0,
            segmentation: raw.segmentation,
        };
        Self { images, file_order, categories, annotations: raw.annotations.into_iter().map(annotation).collect() }
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

/// The first problems of a file in words, and how many there are.
#[derive(Default)]
struct Problems {
    named: Vec<String>,
    total: usize,
}

impl Problems {
    fn push(&mut self, problem: String) {
        self.total += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push(problem);
        }
    }

    fn into_words(self) -> Option<String> {
        let Self { mut named, total } = self;
        if total > named.len() {
            named.push(format!("and {} more, {total} problems in all", total - named.len()));
        }
        (total > 0).then(|| named.join("; "))
    }
}

fn problems(raw: &RawFile) -> Problems {
    let mut problems = Problems::default();
    let mut images = BTreeSet::new();
    for (place, image) in raw.images.iter().enumerate() {
        let id = image.id;
        if !images.insert(id) {
            problems.push(format!("images[{place}].id: a second image with id {id}"));
        }
        if image.width == 0 || image.height == 0 {
            problems.push(format!("image {id}: expected a size above 0, found {} x {}", image.width, image.height));
        }
        if file_name(image).is_none_or(|name| name.is_empty()) {
            problems.push(format!("image {id}: expected `file_name`, or `coco_url` ending in folder/name"));
        }
    }
    let (mut categories, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (place, category) in raw.categories.iter().enumerate() {
        if !names.insert(&category.name) {
            problems.push(format!("categories[{place}].name: a second category named `{}`", category.name));
        }
        if !categories.insert(category.id) {
            problems.push(format!("categories[{place}].id: a second category with id {}", category.id));
        }
    }
    for image in &raw.images {
        for (field, ids) in
            [("neg_category_ids", &image.neg_category_ids), ("not_exhaustive_category_ids", &image.not_exhaustive_category_ids)]
        {
            if let Some(missing) = ids.iter().find(|id| !categories.contains(id)) {
                problems.push(format!("image {}: {field} names category {missing}, which is not there", image.id));
            }
        }
    }
    let mut annotations = BTreeSet::new();
    for (place, annotation) in raw.annotations.iter().enumerate() {
        let id = annotation.id;
        if id == 0 {
            problems.push(format!("annotations[{place}].id: 0, which evaluators take for unmatched"));
        }
        if !annotations.insert(id) {
            problems.push(format!("annotations[{place}].id: a second annotation with id {id}"));
        }
        if !images.contains(&annotation.image_id) {
            problems.push(format!("annotation {id}: image_id {} is not among the images", annotation.image_id));
        }
        if !categories.contains(&annotation.category_id) {
            problems.push(format!("annotation {id}: category_id {} is not among the categories", annotation.category_id));
        }
        let [_, _, width, height] = annotation.bbox;
        if annotation.bbox.iter().any(|number| !number.is_finite()) || width < 0.0 || height < 0.0 {
            problems.push(format!("annotation {id}: expected bbox [x, y, width, height], found {:?}", annotation.bbox));
        }
        if let Some(area) = annotation.area.filter(|area| !area.is_finite() || *area < 0.0) {
            problems.push(format!("annotation {id}: expected an area of 0 or more, found {area}"));
        }
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
                "categories": [{"id": 5, "name": "owl", "frequency": "r", "synset": "owl.n.01", "synonyms": ["owl", "hooter"]}],
                "annotations": [{"id": 1, "image_id": 9, "category_id": 5, "bbox": [0.5, 1, 2, 1], "area": 1.5, "iscrowd": 0, "segmentation": [[0.5, 1, 2.5, 1, 2.5, 2]]}]}"#,
        )
        .unwrap();
        let ids = |order| annotations.images_in(order).iter().map(|image| image.id.0).collect::<Vec<_>>();
        assert_eq!((ids(ImageOrder::Id), ids(ImageOrder::File)), (vec![2, 9], vec![9, 2]));
        assert_eq!(annotations.image(ImageId(2)).unwrap().file_name, "val2017/a.jpg");
        assert_eq!(annotations.annotations[0].xyxy, Xyxy { x1: 0.5, y1: 1.0, x2: 2.5, y2: 2.0 });
        let Category { frequency, synset, synonyms, .. } = annotations.categories[0].clone();
        assert_eq!((frequency, synset.as_deref(), synonyms.join(" ").as_str()), (Some(Frequency::Rare), Some("owl.n.01"), "owl hooter"));
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
        let expected = "instances.json: image 1: expected a size above 0, found 4 x 0; images[1].id: a second image with id 1; \
            image 1: expected `file_name`, or `coco_url` ending in folder/name; \
            categories[1].id: a second category with id 5; annotations[0].id: 0, which evaluators take for unmatched; \
            annotation 7: image_id 3 is not among the images; annotation 7: category_id 6 is not among the categories; \
            annotation 7: expected bbox [x, y, width, height], found [0.0, 0.0, -1.0, 1.0]; \
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
            error.starts_with("instances.json: categories[1].name: a second category named `owl`; annotation 1: expected an area"),
            "{error}"
        );
        assert!(error.ends_with("annotation 9: expected an area of 0 or more, found -1; and 3 more, 13 problems in all"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there_can_be_told_from_a_bad_one() {
        let error = Annotations::load(Path::new("no such folder/instances.json")).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }

    #[test]
    fn json_that_is_cut_or_of_another_shape_is_named_with_its_line() {
        for (json, words) in [
            ("{\"images\": [", "line 1 column 12"),
            ("[]", "an object with `images`, `categories` and `annotations` at line 1 column"),
            ("{\"images\": []}", "missing field `categories`"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.starts_with("instances.json: expected a COCO or LVIS annotation file") && error.contains(words), "{error}");
        }
    }
}
