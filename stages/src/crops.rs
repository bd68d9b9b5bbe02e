//! `crops/objects`: crops of annotated objects; `crops/folder`: the crops as files, in one folder per class.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotation, AnnotationId, Annotations, CategoryId, ImageInfo},
    boxes::Xyxy,
    crops::window,
    images::{Image, MAX_JPEG_SIDE},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, ImageConsumer, ImageStage, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Annotated, AnnotationFile, Crop, Crops, Images, Row, RowKind},
    class_folder::folder_name,
    contract::{is_default, run_alone},
    pass::{Cut, ImageList, Views},
};

/// How the rectangle of a crop follows from its box.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// The box grows about its centre; corners are rounded half to even and clipped to the image.
    #[default]
    Rounded,
    /// Corners are truncated: with `expand: 3.0` the window of 3 x 3 boxes that RPL's prompts learn from. (PromptDet, section 3.)
    Rpl,
}

/// Crops of annotated objects as JPEG, in one indexed shard per unit.
///
/// One crop per annotation, in ascending image id and in the file's order. Crowds are skipped, and objects of which less than `min_side` px
/// on either side lie in the image. The box grows by `expand` about its centre and is clipped to the image.
///
/// With `per_class` only so many objects of each class are cut: which they are follows from `seed` and the annotations' ids, and the first 200 are among
/// the first 300. Each image is decoded once.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// The factor by which boxes grow on each axis.
    pub expand: f32,
    /// Objects whose part within the image is smaller on either side are skipped, in px.
    pub min_side: f32,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// How the rectangle of a crop follows from its box.
    #[serde(skip_serializing_if = "is_default")]
    pub rule: Rule,
    /// Objects with a smaller box are skipped, in px^2.
    #[serde(skip_serializing_if = "is_default")]
    pub min_area: f64,
    /// The most objects of a class; all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_class: Option<usize>,
    /// Seed of the choice of `per_class`.
    #[serde(skip_serializing_if = "is_default")]
    pub seed: u64,
}

impl Default for Objects {
    fn default() -> Self {
        Self { expand: 1.0, min_side: 4.0, quality: 95, rule: Rule::default(), min_area: 0.0, per_class: None, seed: 0 }
    }
}

const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json.");
const CROPS: Out<Crops> = Out::new("crops", "By object: `image_id`, `annotation_id`, `category_id` u64, `jpeg` bytes.");

/// Whether an object gets a crop, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Kept,
    /// A crowd, or small.
    NotAsked,
    /// Outside its image.
    Outside,
    /// Too small once it is clipped to the image.
    Clipped,
}

impl Objects {
    fn of_images<'a>(&self, annotations: &'a Annotations) -> Vec<(&'a ImageInfo, Vec<&'a Annotation>)> {
        let mut by_image = annotations.by_image();
        let of_image = |image: &'a ImageInfo| {
            let objects = by_image.remove(&image.id).unwrap_or_default();
            (image, objects.into_iter().filter(|object| self.place(object, image) == Place::Kept).collect())
        };
        let mut of_images: Vec<(&ImageInfo, Vec<&Annotation>)> = annotations.images.iter().map(of_image).collect();
        if let Some(most) = self.per_class {
            let chosen = self.chosen(of_images.iter().flat_map(|(_, objects)| objects.iter().copied()), most);
            of_images.iter_mut().for_each(|(_, objects)| objects.retain(|object| chosen.contains(&object.id)));
        }
        of_images
    }

    /// At most so many objects of each class: those whose ids come first in an order that the seed shuffles.
    fn chosen<'a>(&self, objects: impl Iterator<Item = &'a Annotation>, most: usize) -> BTreeSet<AnnotationId> {
        let mut by_class: BTreeMap<CategoryId, Vec<([u8; 32], AnnotationId)>> = BTreeMap::new();
        for object in objects {
            let rank = *Digest::of(format!("ovenbird crops {} {}", self.seed, object.id).as_bytes()).as_bytes();
            by_class.entry(object.category_id).or_default().push((rank, object.id));
        }
        let first = |mut of_class: Vec<([u8; 32], AnnotationId)>| {
            of_class.sort_unstable();
            of_class.into_iter().take(most).map(|(_, id)| id)
        };
        by_class.into_values().flat_map(first).collect()
    }

    /// The rectangle of a crop in an image of `size` px, half-open and inside it; with rule `rpl` it may be empty.
    fn rectangle(&self, object: &Annotation, size: [u32; 2]) -> [i64; 4] {
        match self.rule {
            Rule::Rounded => object.xyxy.expanded(self.expand, size),
            Rule::Rpl => window(object.bbox, (f64::from(self.expand) - 1.0) / 2.0, size),
        }
    }

    fn place(&self, object: &Annotation, image: &ImageInfo) -> Place {
        let size = [image.width, image.height];
        let inside = object.xyxy.clipped(size);
        let is_large = |xyxy: &Xyxy| xyxy.width() >= self.min_side && xyxy.height() >= self.min_side;
        let [x1, y1, x2, y2] = self.rectangle(object, size);
        if object.is_crowd || !is_large(&object.xyxy) || object.bbox[2] * object.bbox[3] < self.min_area {
            Place::NotAsked
        } else if x2 <= x1 || y2 <= y1 || inside.area() <= 0.0 {
            Place::Outside
        } else if is_large(&inside) {
            Place::Kept
        } else {
            Place::Clipped
        }
    }

    /// Notes how many objects are skipped because of their position.
    fn note_strays(&self, annotations: &Annotations, cx: &Context<'_>) {
        let objects = annotations.annotations.iter();
        let places = objects.filter_map(|object| Some((object.id, self.place(object, annotations.image(object.image_id)?))));
        let (mut n_outside, mut n_clipped, mut first) = (0_usize, 0_usize, None);
        for (id, place) in places {
            match place {
                Place::Outside => n_outside += 1,
                Place::Clipped => n_clipped += 1,
                Place::Kept | Place::NotAsked => continue,
            }
            first.get_or_insert(id);
        }
        let n_objects = annotations.annotations.len();
        let n_small = annotations.annotations.iter().filter(|object| object.bbox[2] * object.bbox[3] < self.min_area).count();
        if n_small > 0 {
            cx.note(format!("{n_small} of {n_objects} annotated boxes are smaller than {} px^2 and left out", self.min_area));
        }
        if let Some(first) = first {
            cx.note(format!(
                "{} of {n_objects} annotated boxes are skipped: {n_outside} lie outside their image, {n_clipped} are smaller than {} px once \
                 clipped to it (annotation {first} is the first)",
                n_outside + n_clipped,
                self.min_side
            ));
        }
    }
}

impl Stage for Objects {
    const KIND: &'static str = "crops/objects";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[CROPS.info()];
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("expand", self.expand.is_finite() && self.expand > 0.0, "a factor above 0"),
            ("quality", (1..=100).contains(&self.quality), "from 1 to 100"),
            ("min_area", self.min_area >= 0.0, "0 px^2 or more"),
            ("per_class", self.per_class != Some(0), "at least 1"),
            ("seed", self.seed == 0 || self.per_class.is_some(), "0 without `per_class`, which it is for"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let annotations = inputs.read(ANNOTATIONS)?.load()?;
        let images = inputs.read(IMAGES)?;
        let item = |(image, objects): (&ImageInfo, Vec<&Annotation>)| {
            let object = |object: &Annotation| format!("{} {} {:?}", object.id, object.category_id, object.bbox);
            let objects: Vec<String> = objects.into_iter().map(object).collect();
            let stated = format!("{} {}x{}\n{}", image.id, image.width, image.height, objects.join("\n"));
            Ok(Digest::of_list("ovenbird objects 1", [(stated.as_str(), images.digest(&image.file_name)?)]))
        };
        let items = self.of_images(&annotations).into_iter().map(item).collect::<Result<_>>()?;
        Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        run_alone(self, units, cx)
    }
}

impl ImageStage for Objects {
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let objects = self.of_images(&annotations).into_iter().map(|(_, objects)| objects.into_iter().cloned().collect()).collect();
        self.note_strays(&annotations, cx);
        let views = Box::new(CropViews { stage: self, objects });
        let list = ImageList { images: cx.inputs.read(IMAGES)?, infos: annotations.images };
        Ok(ImageConsumer { cx, units, list, views, encoder: None, port: CROPS.info().name, rows: RowKind::Crops })
    }
}

struct CropViews<'a> {
    stage: &'a Objects,
    /// By image.
    objects: Vec<Vec<Annotation>>,
}

impl Views for CropViews<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        usize::from(!self.objects[place].is_empty())
    }

    fn refusal(&self, place: usize, info: &ImageInfo) -> Option<(String, &'static str)> {
        let side = |object: &Annotation| {
            let [x1, y1, x2, y2] = self.stage.rectangle(object, [info.width, info.height]);
            (x2 - x1).max(y2 - y1)
        };
        let object = self.objects[place].iter().find(|object| side(object) > i64::from(MAX_JPEG_SIDE))?;
        let problem = format!("the crop of annotation {} would be longer than {MAX_JPEG_SIDE} px, which no JPEG can be", object.id);
        Some((problem, "skip the image: `on_bad_item: skip`, or cut it into smaller ones"))
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, _views: Range<usize>) -> Cut {
        let crop = |object: &Annotation| Crop {
            image_id: object.image_id,
            annotation_id: object.id,
            category_id: object.category_id,
            jpeg: image.crop(self.stage.rectangle(object, [image.width, image.height])).to_jpeg(self.stage.quality),
        };
        Cut::Row(Row::Crops(self.objects[place].iter().map(crop).collect()))
    }

    fn row(&self, _place: usize, _info: &ImageInfo, _embeddings: &[f32], _dim: usize) -> Row {
        // Of an image without objects, which is not decoded.
        Row::Crops(Vec::new())
    }
}

/// Crops as JPEG files, in one folder per class: `CLASS/IMAGE-ANNOTATION.jpg`.
///
/// For tools that read such folders. It makes one file per crop: for millions of objects read the shards instead. In class names `/`, `\`,
/// `%`, control characters and a leading `.` are percent-encoded (`%2F`), so that different classes have different, visible folders; a name
/// that is too long for a folder ends in `%~` and a digest of the whole name.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Folder {}

const CROPS_IN: In<Crops> = In::required("crops", "The crops.");
const CLASSES: In<AnnotationFile> = In::required("annotations", "The json that the crops were made from, with the class names.");
const FOLDER: Out<Images> = Out::new("images", "`CLASS/IMAGE-ANNOTATION.jpg`.");

impl Stage for Folder {
    const KIND: &'static str = "crops/folder";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[CROPS_IN.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[FOLDER.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(CLASSES)?.load()?;
        let annotated = Annotated::of(&annotations);
        let draft = cx.begin(&units[0])?;
        let mut n_crops = 0_u64;
        for crop in cx.inputs.read(CROPS_IN)?.rows() {
            let Crop { image_id, annotation_id, category_id, jpeg } = crop?;
            annotated.check((image_id, annotation_id, category_id), CLASSES.info().name)?;
            let class = annotations.category(category_id).ok_or_else(|| Error::Input {
                port: CLASSES.info().name,
                problem: format!("no class {category_id}, which annotation {annotation_id} has"),
                hint: "use the annotations that the crops were made from".into(),
            })?;
            let class = folder_name(&class.name);
            draft.write(FOLDER, &format!("{class}/{image_id}-{annotation_id}.jpg"), &jpeg)?;
            n_crops += 1;
            cx.tick(1);
            cx.proceed()?;
        }
        cx.commit(draft, [("crops".into(), n_crops.into())].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_a_folder_of_its_own_that_is_seen_and_leaves_no_other() {
        let long = |last: char| format!("{}{last}", "ü".repeat(300));
        let classes: Vec<String> = [
            "owl",
            "cup/mug",
            "cup_mug",
            "cup%2Fmug",
            "cup\\mug",
            "..",
            ".",
            ".hidden",
            "%2Ehidden",
            "",
            "%",
            "a\0b",
            "a\nb",
            "a b",
            "café",
            "cafe\u{301}",
            "...",
            "a/../b",
            "/",
            "//",
        ]
        .map(String::from)
        .into_iter()
        .chain(['a', 'b'].map(long))
        .chain([".".repeat(300), "x".repeat(200), "x".repeat(201)])
        .collect();
        let folders: BTreeSet<String> = classes.iter().map(|class| folder_name(class)).collect();
        assert_eq!(folders.len(), classes.len());
        for folder in &folders {
            let is_sound = !folder.is_empty() && folder.len() <= 255 && !folder.starts_with('.') && !folder.contains(['/', '\\']);
            assert!(is_sound && !folder.chars().any(char::is_control), "{folder:?}");
        }
        // Ordinary names stay as they are.
        for class in ["owl", "cup_mug", "a b", "café", "hot dog (food)", "t.v."] {
            assert_eq!(folder_name(class), class);
        }
        assert_eq!(["..", "cup/mug", "50%"].map(folder_name), ["%2E.", "cup%2Fmug", "50%25"]);
    }

    #[test]
    fn objects_are_cut_out_where_enough_of_them_lies_in_the_image() {
        let json = br#"{"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}], "categories": [{"id": 5, "name": "owl"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [2, 3, 20, 16]}, {"id": 2, "image_id": 1, "category_id": 5, "bbox": [500, 3, 20, 16]},
                {"id": 3, "image_id": 1, "category_id": 5, "bbox": [63.6, 3, 20, 16]}, {"id": 4, "image_id": 1, "category_id": 5, "bbox": [-16, 3, 20, 16]},
                {"id": 5, "image_id": 1, "category_id": 5, "bbox": [2, 3, 20, 3.9]}, {"id": 6, "image_id": 1, "category_id": 5, "bbox": [2, 3, 20, 16], "iscrowd": 1}]}"#;
        let annotations = Annotations::parse(json, "a.json".as_ref()).unwrap();
        let stage = Objects::default();
        let places: Vec<Place> = annotations.annotations.iter().map(|object| stage.place(object, &annotations.images[0])).collect();
        use Place::{Clipped, Kept, NotAsked, Outside};
        assert_eq!(places, [Kept, Outside, Clipped, Kept, NotAsked, NotAsked]);
        assert_eq!(stage.of_images(&annotations)[0].1.len(), 2);
    }

    /// Parity check C3 of PromptDet's specification, and its table of windows.
    #[test]
    fn objects_are_chosen_by_class_whatever_else_there_is() {
        let object = |id: u64, category: u64, corners: [f64; 4]| {
            let [x, y, width, height] = corners;
            format!(
                r#"{{"id": {id}, "image_id": {}, "category_id": {category}, "bbox": [{x}, {y}, {width}, {height}], "area": 400}}"#,
                id % 3
            )
        };
        let parse = |objects: &[String]| {
            let image = |id: u64| format!(r#"{{"id": {id}, "file_name": "{id}.jpg", "width": 640, "height": 480}}"#);
            let images = [image(0), image(1), image(2)].join(",");
            let categories = r#"{"id": 1, "name": "owl"}, {"id": 2, "name": "wren"}"#;
            let text = format!(r#"{{"images": [{images}], "annotations": [{}], "categories": [{categories}]}}"#, objects.join(","));
            Annotations::parse(text.as_bytes(), "a.json".as_ref()).unwrap()
        };
        let chosen = |objects: &[String], per_class, seed| {
            let stage = Objects { per_class: Some(per_class), seed, ..Objects::default() };
            let of_images = parse(objects);
            let ids = stage.of_images(&of_images).into_iter().flat_map(|(_, objects)| objects).map(|object| object.id.0).collect();
            BTreeSet::<u64>::from_iter::<Vec<u64>>(ids)
        };
        let mut objects: Vec<String> = (1..=90).map(|id| object(id, 1 + id % 2, [10.0, 10.0, 20.0, 20.0])).collect();
        let few = chosen(&objects, 10, 3);
        assert_eq!((few.len(), few.iter().filter(|id| *id % 2 == 0).count()), (20, 10));
        assert!(few.is_subset(&chosen(&objects, 15, 3)) && few != chosen(&objects, 10, 4));
        objects.reverse();
        assert_eq!(few, chosen(&objects, 10, 3));

        let rpl = Objects { expand: 3.0, min_side: 0.0, rule: Rule::Rpl, min_area: 20.0, ..Objects::default() };
        let annotations = parse(&[
            object(1, 1, [100.6, 50.2, 30.5, 20.7]),
            object(2, 1, [10.0, 10.0, 4.0, 4.9]),
            object(3, 1, [700.0, 10.0, 40.0, 40.0]),
        ]);
        let places: Vec<Place> = annotations.annotations.iter().map(|object| rpl.place(object, &annotations.images[0])).collect();
        assert_eq!(places, [Place::Kept, Place::NotAsked, Place::Outside]);
        assert_eq!(rpl.rectangle(&annotations.annotations[0], [640, 480]), [70, 29, 161, 91]);
    }
}
