//! Checks of detections and outlines that the matching library would accept silently or only warn about.

use super::{Detection, IouType};
use crate::{
    annotations::{Annotation, Annotations, ImageId, ImageInfo},
    boxes::Xyxy,
    masks::{Mask, Outline, Segmentation},
    warnings::TOLERANCE_PX,
};

/// Counts of detections outside their images, and of scores outside [0, 1].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Strays {
    n_boxes: usize,
    /// By more than [`TOLERANCE_PX`].
    n_leaving: usize,
    /// Boxes that do not overlap their image at all.
    n_outside: usize,
    n_other_scores: usize,
    first_score: Option<(ImageId, f32)>,
}

impl Strays {
    /// Checks a detection and counts it; returns the area that decides its size class, in px².
    pub(super) fn check(&mut self, detection: &Detection, iou_type: IouType, annotations: &Annotations) -> Result<f64, String> {
        let Detection { image_id, category_id, xyxy, score, mask } = detection;
        let image =
            annotations.image(*image_id).ok_or_else(|| format!("a detection in image {image_id}, which the annotations do not have"))?;
        if annotations.category(*category_id).is_none() {
            return Err(format!("image {image_id}: a detection of category {category_id}, which the annotations do not have"));
        }
        let Xyxy { x1, y1, x2, y2 } = *xyxy;
        if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
            return Err(format!("image {image_id}: expected finite numbers, found a detection [{x1}, {y1}, {x2}, {y2}], score {score}"));
        }
        if x2 < x1 || y2 < y1 {
            return Err(format!("image {image_id}: a detection [{x1}, {y1}, {x2}, {y2}]: expected x1 <= x2 and y1 <= y2"));
        }
        self.count(detection, image);
        match (iou_type, mask) {
            (IouType::Boxes, _) => Ok(f64::from(x2 - x1) * f64::from(y2 - y1)),
            (IouType::Masks, Some(mask)) => {
                let area = mask.area_in([image.width, image.height]);
                area.map(|area| area as f64).map_err(|problem| format!("image {image_id}: {problem}"))
            }
            (IouType::Masks, None) => Err(format!("image {image_id}: a detection without a mask")),
        }
    }

    fn count(&mut self, Detection { image_id, xyxy: Xyxy { x1, y1, x2, y2 }, score, .. }: &Detection, image: &ImageInfo) {
        let [width, height] = [image.width as f32, image.height as f32];
        let slack = TOLERANCE_PX as f32;
        self.n_boxes += 1;
        self.n_leaving += usize::from(*x1 < -slack || *y1 < -slack || *x2 > width + slack || *y2 > height + slack);
        self.n_outside += usize::from(*x1 > width || *y1 > height || *x2 < 0.0 || *y2 < 0.0);
        if !(0.0..=1.0).contains(score) {
            self.n_other_scores += 1;
            self.first_score.get_or_insert((*image_id, *score));
        }
    }

    /// See [`Evaluator::remarks`](super::Evaluator::remarks).
    pub(super) fn remarks(&self) -> Result<Option<String>, String> {
        let Self { n_boxes, n_leaving, n_outside, n_other_scores, first_score } = *self;
        if let Some((image, score)) = first_score {
            return Err(format!("{n_other_scores} of {n_boxes} scores are not in [0, 1], that of image {image} is {score}"));
        }
        if 2 * n_outside > n_boxes {
            let problem = "they seem to be of other images, or of resized ones";
            return Err(format!("{n_outside} of {n_boxes} detections lie outside their image: {problem}"));
        }
        let leaving = format!("{n_leaving} of {n_boxes} detections reach more than {TOLERANCE_PX} px outside their image");
        Ok((n_leaving > 0).then(|| format!("{leaving}; {n_outside} of them lie outside it")))
    }
}

/// Checks that run lengths can be decoded and have the size of their image.
pub(super) fn check_runs(annotations: &Annotations, annotation: &Annotation) -> Result<(), String> {
    match (&annotation.segmentation, annotations.image(annotation.image_id)) {
        (Outline::Drawn(runs @ (Segmentation::CompressedRle { .. } | Segmentation::UncompressedRle { .. })), Some(image)) => {
            let drawn = Mask::from_segmentation(runs, [image.width, image.height]);
            drawn.map(drop).map_err(|problem| format!("annotation {}: {problem}", annotation.id))
        }
        _ => Ok(()),
    }
}
