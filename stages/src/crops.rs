//! `crops/objects`: annotated objects, cut out.

use ovenbird_cache::Digest;
use ovenbird_data::annotations::{Annotation, Annotations, ImageInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{AnnotationFile, Crop, Crops, CropsWriter, Images},
    feed::in_order,
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
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[CROPS.info()];

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

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let images = cx.inputs.read(IMAGES)?;
        let all = self.of_images(&annotations);
        for draft in cx.drafts(units) {
            let draft = draft?;
            let unit = draft.unit().clone();
            let mut shard = CropsWriter::new(draft.create(CROPS, "crops.arrow")?, &unit.fingerprint)?;
            let cut = |(image, objects): &(&ImageInfo, Vec<&Annotation>)| {
                let decoded = images.decode(&image.file_name, [image.width, image.height])?;
                let crop = |object: &&Annotation| Crop {
                    image_id: object.image_id,
                    annotation_id: object.id,
                    category_id: object.category_id,
                    jpeg: decoded.crop(object.xyxy.expanded(self.expand, [image.width, image.height])).to_jpeg(self.quality),
                };
                Ok(objects.iter().map(crop).collect::<Vec<Crop>>())
            };
            let mut n_crops = 0;
            in_order(
                &all[unit.items.clone()],
                cx.threads,
                |item| cx.attempt(|| cut(item)),
                |(image, _), crops| {
                    let Some(crops) = cx.kept(&draft, &image.file_name, crops)? else { return Ok(()) };
                    n_crops += crops.len();
                    for crop in crops {
                        shard.push(crop)?;
                    }
                    cx.tick(1);
                    cx.proceed()
                },
            )?;
            shard.finish()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("crops".into(), n_crops.into())].into())?;
        }
        Ok(())
    }
}
