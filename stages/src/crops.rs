//! `crops/objects`: annotated objects, cut out; `crops/folder`: as files in one folder a class.

use std::{ops::Range, sync::Arc};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotation, Annotations, ImageInfo},
    images::Image,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Rider, Stage, Unit, Units,
    artifacts::{AnnotationFile, Crop, Crops, Images, Row, RowKind},
    pass::{Cut, Frames, Sight},
};

/// Crops of annotated objects, encoded, in one indexed shard a unit.
///
/// One crop an annotation that is no crowd and at least `min_side` px on both sides, in ascending image id and the file's
/// order; the box grows by `expand` about its centre and is clipped to the image.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objects {
    /// By how much boxes grow on each axis.
    pub expand: f32,
    /// Smaller objects are left out, in px.
    pub min_side: f32,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
}

impl Default for Objects {
    fn default() -> Self {
        Self { expand: 1.0, min_side: 4.0, quality: 95 }
    }
}

const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json.");
const CROPS: Out<Crops> = Out::new("crops", "By object: `image_id`, `annotation_id`, `category_id` u64, `jpeg` bytes.");

impl Objects {
    fn of_images<'a>(&self, annotations: &'a Annotations) -> Vec<(&'a ImageInfo, Vec<&'a Annotation>)> {
        let mut by_image = annotations.by_image();
        let is_kept = |annotation: &&Annotation| {
            !annotation.is_crowd && annotation.xyxy.width() >= self.min_side && annotation.xyxy.height() >= self.min_side
        };
        let of_image = |image: &'a ImageInfo| {
            let objects = by_image.remove(&image.id).unwrap_or_default();
            (image, objects.into_iter().filter(is_kept).collect())
        };
        annotations.images.iter().map(of_image).collect()
    }
}

impl Stage for Objects {
    const KIND: &'static str = "crops/objects";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[CROPS.info()];
    const RIDES: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if !(self.expand.is_finite() && self.expand > 0.0) {
            problems.push(Problem::new("expand", format!("expected a factor above 0, found {}", self.expand)));
        }
        if !(1..=100).contains(&self.quality) {
            problems.push(Problem::new("quality", format!("expected 1 to 100, found {}", self.quality)));
        }
        problems
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

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let objects = self.of_images(&annotations).into_iter().map(|(_, objects)| objects.into_iter().cloned().collect()).collect();
        let sight = Box::new(CropSight { stage: self, objects });
        let frames = Frames { images: cx.inputs.read(IMAGES)?, infos: annotations.images };
        Ok(Rider { cx, units, frames, sight, encoder: None, port: CROPS.info().name, rows: RowKind::Crops })
    }
}

struct CropSight<'a> {
    stage: &'a Objects,
    /// By image.
    objects: Vec<Vec<Annotation>>,
}

impl Sight for CropSight<'_> {
    fn n_views(&self, place: usize, _info: &ImageInfo) -> usize {
        usize::from(!self.objects[place].is_empty())
    }

    fn cut(&self, place: usize, _info: &ImageInfo, image: &Arc<Image>, _views: Range<usize>) -> Cut {
        let crop = |object: &Annotation| Crop {
            image_id: object.image_id,
            annotation_id: object.id,
            category_id: object.category_id,
            jpeg: image.crop(object.xyxy.expanded(self.stage.expand, [image.width, image.height])).to_jpeg(self.stage.quality),
        };
        Cut::Whole(Row::Crops(self.objects[place].iter().map(crop).collect()))
    }

    fn row(&self, _place: usize, _info: &ImageInfo, _embeddings: &[f32], _dim: usize) -> Row {
        // Of an image without objects, which is not decoded.
        Row::Crops(Vec::new())
    }
}

/// Crops as JPEG files, a folder a class: `CLASS/IMAGE-ANNOTATION.jpg`.
///
/// For tools that read such folders. One unit, and one file a crop: for millions of objects read the shards instead. A class name's
/// `/` becomes `_`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Folder {}

const CROPS_IN: In<Crops> = In::required("crops", "The crops.");
const CLASSES: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the names of their classes.");
const FOLDER: Out<Images> = Out::new("images", "`CLASS/IMAGE-ANNOTATION.jpg`.");

impl Stage for Folder {
    const KIND: &'static str = "crops/folder";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CROPS_IN.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[FOLDER.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(CLASSES)?.load()?;
        let draft = cx.begin(&units[0])?;
        let mut n_crops = 0_u64;
        for crop in cx.inputs.read(CROPS_IN)?.rows() {
            let Crop { image_id, annotation_id, category_id, jpeg } = crop?;
            let class = annotations.category(category_id).ok_or_else(|| Error::Input {
                port: CLASSES.info().name,
                problem: format!("no class {category_id}, which annotation {annotation_id} has"),
                hint: "use the annotations that the crops were made from".into(),
            })?;
            let class = class.name.replace('/', "_");
            draft.write(FOLDER, &format!("{class}/{image_id}-{annotation_id}.jpg"), &jpeg)?;
            n_crops += 1;
            cx.tick(1);
            cx.proceed()?;
        }
        cx.commit(draft, [("crops".into(), n_crops.into())].into())
    }
}
