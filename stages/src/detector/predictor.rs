//! Running a network on images, whatever network it is.

use std::{collections::BTreeSet, ops::Range};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{CategoryId, ImageId, ImageInfo},
    boxes::Xyxy,
    classes::ClassSplit,
    evaluate::Detection,
    masks::{Mask, PackedMask},
    training::{Filter, Placement},
};
use ovenbird_models::detection::{self, boxes::corners};
use tch::{Device, Kind, Tensor};

use super::{
    images::{Normalisation, TestImage, TestImages},
    ports::{ANNOTATIONS, CLASSES, IMAGES},
};
use crate::{
    Context, Error, Inputs, Out, Result, Unit, UnitDraft, Units,
    artifacts::{Classes, Detections, category_names},
    feed::in_parallel,
};

/// An object that a network found in an image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    /// In px of the original image.
    pub(crate) xyxy: Xyxy,
    /// The place of its class among the classes; 0 where a network knows no classes.
    pub(crate) class: usize,
    pub(crate) score: f32,
    /// In px of the original image.
    pub(crate) mask: Option<Box<PackedMask>>,
}

/// A trained network that finds objects in images.
pub(crate) trait Predictor {
    /// The maximum lengths of the longer and the shorter side of its images, in px.
    fn fits(&self) -> [u32; 2];

    /// How its images are resized.
    fn filter(&self) -> Filter {
        Filter::OpenCv
    }

    /// How levels of its images become its input.
    fn normalisation(&self) -> Normalisation;

    /// The objects in an image, best first. `n_threads`: how many threads it may use besides the network's own.
    fn predict(&self, image: &TestImage<'_>, n_threads: usize) -> Result<Vec<Found>>;
}

/// The objects of a detector's detections in an image, in px of the original image. `n_threads`: how many threads paste masks.
pub(super) fn objects(found: detection::Detections, placement: Placement, n_threads: usize) -> Result<Vec<Found>> {
    let boxes = corners(&found.kept.boxes, "detections")?;
    let boxes: Vec<Xyxy> = boxes.into_iter().map(|corners| placement.find(&Xyxy::from(corners))).collect();
    let masks = match &found.masks {
        Some(logits) => masks(logits, &boxes, placement.from, n_threads)?,
        None => vec![None; boxes.len()],
    };
    let classes = found.kept.classes.into_iter().map(|class| class as usize).zip(found.kept.scores);
    let object = |((xyxy, mask), (class, score))| Found { xyxy, class, score, mask };
    Ok(boxes.into_iter().zip(masks).zip(classes).map(object).collect())
}

/// Masks of the boxes of an image of `size` px, from logits `[M, side, side]`.
fn masks(logits: &Tensor, boxes: &[Xyxy], size: [u32; 2], n_threads: usize) -> Result<Vec<Option<Box<PackedMask>>>> {
    let side = logits.size()[2] as usize;
    let probabilities = logits.sigmoid().to_kind(Kind::Float).to_device(Device::Cpu).contiguous();
    let mut flat = vec![0.0_f32; probabilities.numel()];
    probabilities.copy_data(&mut flat, probabilities.numel());
    // 300 masks take one core some 10 ms, in which the network waits.
    in_parallel(boxes.len(), n_threads, |place| {
        let pasted = Mask::paste(&flat[place * side * side..][..side * side], side, &boxes[place], size);
        let mask = pasted.map_err(|problem| Error::Input { port: "images", problem, hint: "use smaller images".into() })?;
        Ok(Some(Box::new(mask.to_packed())))
    })
}

/// Runs a network on the images at some places, in order, and gives each image with its objects to `receive`. Images that cannot be read are
/// skipped or refused by the stage's policy.
pub(crate) fn predict_each(
    predictor: &dyn Predictor,
    images: &TestImages,
    places: Range<usize>,
    draft: &UnitDraft,
    cx: &Context<'_>,
    mut receive: impl FnMut(&ImageInfo, Vec<Found>) -> Result<()>,
) -> Result<()> {
    images.each(places, (predictor.fits(), predictor.filter()), predictor.normalisation(), draft, cx, |image| {
        receive(image.info, predictor.predict(&image, cx.threads)?)
    })
}

/// Units of stages that detect objects of the port `classes` in the images of the port `annotations`.
pub(crate) fn detection_units(inputs: &Inputs) -> Result<Units> {
    let annotations = inputs.read(ANNOTATIONS)?.load_categories()?;
    let Classes(classes) = inputs.read(CLASSES)?;
    let ids: Vec<u8> = Classes::category_ids(&annotations, classes.all())?.iter().flat_map(|id| id.0.to_le_bytes()).collect();
    let ids = Digest::of(&ids);
    let images = inputs.read(IMAGES)?.items(&annotations)?;
    let item = |image: Digest| Digest::of_list("ovenbird detection 1", [("image", image), ("categories", ids)]);
    Ok(Units::Independent { items: images.into_iter().map(item).collect(), replaces: vec!["images", "annotations"] })
}

/// Makes units of such a stage, with a network that looks for these classes. `finish`: what a unit has besides detections.
pub(crate) fn detect(
    predictor: &dyn Predictor,
    images: &TestImages,
    classes: &ClassSplit,
    (port, units): (Out<Detections>, &[Unit]),
    cx: &Context<'_>,
    mut finish: impl FnMut(&UnitDraft) -> Result<()>,
) -> Result<()> {
    let ids = Classes::category_ids(&images.annotations, classes.all())?;
    let categories = category_names(&images.annotations, &ids);
    for unit in units {
        // A unit that another process or device makes is skipped.
        let Some(draft) = cx.begin_claimed(unit)? else { continue };
        let (mut detections, mut seen) = (Vec::new(), BTreeSet::new());
        predict_each(predictor, images, unit.items.clone(), &draft, cx, |info, found| {
            seen.insert(info.id);
            detections.extend(found.into_iter().map(|found| detection(info.id, &ids, found)));
            Ok(())
        })?;
        Detections::write(&detections, &seen, &categories, draft.create(port, "detections.parquet")?)?;
        finish(&draft)?;
        cx.commit(draft, [("detections".into(), detections.len().into())].into())?;
    }
    Ok(())
}

/// An object as a detection. `ids`: the category of each class.
pub(crate) fn detection(image_id: ImageId, ids: &[CategoryId], Found { xyxy, class, score, mask }: Found) -> Detection {
    Detection { image_id, category_id: ids[class], xyxy, score, mask }
}
