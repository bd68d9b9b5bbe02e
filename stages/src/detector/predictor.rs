//! Running a network on images, whatever network it is.

use std::ops::Range;

use ovenbird_data::{
    annotations::{CategoryId, ImageId, ImageInfo},
    boxes::Xyxy,
    evaluate::Detection,
    masks::PackedMask,
};

use super::images::{Normalisation, TestImage, TestImages};
use crate::{Context, Result, UnitDraft};

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

    /// How levels of its images become its input.
    fn normalisation(&self) -> Normalisation;

    /// The objects in an image, best first. `n_threads`: how many threads it may use besides the network's own.
    fn predict(&self, image: &TestImage<'_>, n_threads: usize) -> Result<Vec<Found>>;
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
    images.each(places, predictor.fits(), predictor.normalisation(), draft, cx, |image| {
        receive(image.info, predictor.predict(&image, cx.threads)?)
    })
}

/// An object as a detection. `ids`: the category of each class.
pub(crate) fn detection(image_id: ImageId, ids: &[CategoryId], Found { xyxy, class, score, mask }: Found) -> Detection {
    Detection { image_id, category_id: ids[class], xyxy, score, mask }
}
