//! How a localizer is run on images, as an operator writes it.

use ovenbird_models::detr::{
    prematch::Favour,
    scores::{Background, Borders, Duplicates, Selection},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Problem, clip::Clip, contract::is_default};

/// Detects objects of base and novel classes with CORA's localizer.
///
/// CLIP names the anchors, among all classes; the localizer says where there are objects; CLIP names these boxes once more, in the exact way, and the score of
/// a box for a class is the class's probability times its objectness. So a box may be detected as several classes. Boxes whose scores cannot exceed 0.001 are
/// never named. Images are shown one by one; NMS is per class, by an IoU of 0.5; boxes are xyxy in px of the original image. The defaults are CORA's for COCO.
/// (CORA, section 9.)
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LocalizerOptions {
    /// Activation, and which CLIP of a checkpoint with several. It computes in f32.
    pub clip: Clip,
    /// What cosines are divided by before the softmax.
    pub temperature: f64,
    /// By what the probabilities of novel classes are multiplied when anchors are named. It is a prior from the protocol, so report 1 beside it. (Defect 5.)
    pub novel_factor: f64,
    /// Whether the background is one of the classes by which boxes are named.
    #[serde(skip_serializing_if = "is_default")]
    pub background: Background,
    /// What happens to detections that overlap a better one of their class.
    #[serde(skip_serializing_if = "is_default")]
    pub duplicates: Duplicates,
    /// Whether boxes are cut off at the borders of the image.
    #[serde(skip_serializing_if = "is_default")]
    pub borders: Borders,
    /// Detections kept per image; 300 for LVIS.
    pub max_per_image: usize,
}

impl Default for LocalizerOptions {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            temperature: 0.01,
            novel_factor: 8.0,
            background: Background::default(),
            duplicates: Duplicates::default(),
            borders: Borders::default(),
            max_per_image: 100,
        }
    }
}

impl LocalizerOptions {
    /// What is wrong with the options.
    pub(crate) fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        Problem::unless(&[
            ("temperature", is_positive(self.temperature), "a number above 0"),
            ("novel_factor", is_positive(self.novel_factor), "a number above 0"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    /// Which pairs of a box and a class are detections.
    pub(super) fn selection(&self) -> Selection {
        Selection { duplicates: self.duplicates, keep: self.max_per_image, borders: self.borders }
    }

    /// Which classes are favoured when anchors are named: these columns.
    pub(super) fn favour<'a>(&self, novel: &'a [i64]) -> Option<Favour<'a>> {
        // A factor of 1 changes nothing.
        (self.novel_factor.to_bits() != 1.0_f64.to_bits()).then_some(Favour { factor: self.novel_factor, classes: novel })
    }
}
