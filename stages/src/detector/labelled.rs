//! Images with labels of any category, from which a classifier learns.

use std::collections::HashMap;

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId},
    training::{self, Sample},
};

use crate::{Result, artifacts::Images};

/// The labelled images, and the categories of their objects by class.
pub(super) struct Labelled {
    /// The images with objects.
    pub(super) samples: Vec<Sample>,
    /// The category of each class of these objects: all categories of the annotations.
    pub(super) categories: Vec<CategoryId>,
}

impl Labelled {
    /// The images of some annotations that have objects of any category.
    pub(super) fn of(annotations: &Annotations) -> Self {
        let categories: Vec<CategoryId> = annotations.categories.iter().map(|category| category.id).collect();
        let mut samples = training::samples(annotations, &categories);
        samples.retain(|sample| !sample.objects.is_empty());
        Self { samples, categories }
    }

    /// A digest of each image with its labels.
    pub(super) fn items(&self, images: &Images, annotations: &Annotations) -> Result<Vec<Digest>> {
        let by_image: HashMap<ImageId, Digest> = annotations.images.iter().map(|image| image.id).zip(images.items(annotations)?).collect();
        let item = |sample: &Sample| {
            let object = |object: &training::Object| {
                let xyxy = object.xyxy;
                let corners = [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2].map(f32::to_le_bytes).concat();
                [corners, self.categories[object.class].0.to_le_bytes().to_vec()].concat()
            };
            let objects: Vec<u8> = sample.objects.iter().flat_map(object).collect();
            Digest::of_list("ovenbird labelled image 1", [("image", by_image[&sample.info.id]), ("objects", Digest::of(&objects))])
        };
        Ok(self.samples.iter().map(item).collect())
    }
}
