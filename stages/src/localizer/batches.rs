//! The batches of what learns from regions of a frozen CLIP: images with their objects, shown as to DETR.

use std::ops::Range;

use ovenbird_data::{
    annotations::ImageId,
    boxes::Xyxy,
    cut::{Cut, View},
    training::Placement,
};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, Problem, Result,
    detector::{
        batches::{DetectionLoader, Random},
        images::{Normalisation, Pixels},
        ports::ANNOTATIONS,
        training::Training,
    },
    training::{DataLoader, Loaded, TrainingConfig},
};

/// How parts of images are cut out in training. The defaults are DETR's, which CORA has. (CORA, section 2.2.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cuts {
    /// The part of the images that are cut; 0 for none.
    pub probability: f64,
    /// Lengths of the shorter side of an image before it is cut, in px, of which one is drawn.
    pub min_size: Vec<u32>,
    /// Range from which the width and the height of the part are drawn, in px; no more than the image has.
    pub window: [u32; 2],
}

impl Default for Cuts {
    fn default() -> Self {
        Self { probability: 0.5, min_size: vec![400, 500, 600], window: [384, 600] }
    }
}

impl Cuts {
    /// What is wrong with the parameters; fields are named below the stage's.
    pub(crate) fn check(&self) -> Vec<Problem> {
        let [low, high] = self.window;
        Problem::unless(&[
            ("cuts.probability", (0.0..=1.0).contains(&self.probability), "a number from 0 to 1"),
            ("cuts.min_size", !self.min_size.is_empty() && self.min_size.iter().all(|side| *side >= 32), "lengths from 32 px on"),
            ("cuts.window", 32 <= low && low <= high, "two lengths from 32 px on, the smaller first"),
        ])
    }
}

/// What an image's pixels are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Together {
    /// Each image alone, so that no image depends on the others of its batch. (Fixes defect 14 in docs/recipes/cora.md.)
    #[default]
    Fixed,
    /// All images of a batch, with zeros on the right of and below the smaller ones.
    Reference,
}

/// An image as it is shown.
pub(crate) struct Shown {
    pub(crate) id: ImageId,
    /// Its place among the images of the training.
    pub(crate) place: usize,
    pub(crate) view: View,
    /// `[cx, cy, width, height]` of each object, as parts of what is shown.
    pub(crate) boxes: Vec<[f32; 4]>,
    /// The class of each object.
    pub(crate) classes: Vec<usize>,
}

/// The input of what learns from regions.
pub(crate) struct RegionBatch {
    pub(crate) images: Vec<Shown>,
    /// Of each image, or of all together.
    pub(crate) pixels: Vec<Pixels>,
    /// For dropout and the like.
    pub(crate) random: ChaCha8Rng,
}

/// A batch to load.
pub(crate) struct RegionSpec {
    step: u32,
    piece: u32,
    images: Vec<(usize, View)>,
}

/// Loads the images of a training on regions.
pub(crate) struct RegionLoader<'a> {
    annotated: DetectionLoader,
    cuts: &'a Cuts,
    together: Together,
}

impl<'a> RegionLoader<'a> {
    /// Fails where no image has an object.
    pub(crate) fn new(annotated: DetectionLoader, cuts: &'a Cuts, together: Together) -> Result<Self> {
        if (0..annotated.n_images()).all(|place| annotated.sample(place).objects.is_empty()) {
            let problem =
                format!("none of {} images has an object of a base class: crowds and boxes without an area are none", annotated.n_images());
            let hint = "give annotations with boxes of base classes".into();
            return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
        }
        Ok(Self { annotated, cuts, together })
    }

    /// See [`DetectionLoader::config`].
    pub(crate) fn config(&self) -> TrainingConfig {
        self.annotated.config()
    }

    /// Steps of an epoch.
    pub(crate) fn steps_per_epoch(&self) -> u32 {
        (self.annotated.n_batches() as u32).div_ceil(self.annotated.training().accumulation_steps).max(1)
    }

    /// Whether every image is shown as a whole in one size, mirrored or not, and alone.
    pub(crate) fn shows_few_views(&self) -> bool {
        let Training { max_size, min_size, .. } = self.annotated.training();
        self.together == Together::Fixed && self.cuts.probability <= 0.0 && min_size[0] == min_size[1] && max_size[0] == max_size[1]
    }

    fn view(&self, place: usize, random: &mut ChaCha8Rng) -> View {
        let info = &self.annotated.sample(place).info;
        let (from, Training { max_size, min_size, size_step, .. }) = ([info.width, info.height], self.annotated.training());
        let length = |[low, high]: [u32; 2], random: &mut ChaCha8Rng| low + size_step * random.random_range(0..=(high - low) / size_step);
        let is_mirrored = random.random_bool(0.5);
        let cut = (self.cuts.probability > 0.0 && random.random_bool(self.cuts.probability)).then(|| {
            let shorter = self.cuts.min_size[random.random_range(0..self.cuts.min_size.len())];
            let resized = Placement::shorter(from, None, shorter).to;
            let [low, high] = self.cuts.window;
            let size = resized.map(|side| random.random_range(low.min(side)..=high.min(side)));
            let [left, top] = [0, 1].map(|axis: usize| random.random_range(0..=resized[axis] - size[axis]));
            Cut { resized, window: [left, top, size[0], size[1]] }
        });
        let (longer, shorter) = (length(*max_size, random), length(*min_size, random));
        View::new(from, is_mirrored, cut, longer, shorter)
    }
}

/// A box as parts of an image of `[width, height]` px: `[cx, cy, width, height]`.
pub(crate) fn relative(xyxy: &Xyxy, size: [u32; 2]) -> [f32; 4] {
    let [width, height] = size.map(|side| side as f32);
    [(xyxy.x1 + xyxy.x2) / 2.0 / width, (xyxy.y1 + xyxy.y2) / 2.0 / height, xyxy.width() / width, xyxy.height() / height]
}

impl DataLoader for RegionLoader<'_> {
    type Spec = RegionSpec;
    type Batch = RegionBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (RegionSpec, usize)> + Send {
        let per_step = self.annotated.training().accumulation_steps;
        let all = (0..).flat_map(|epoch| self.annotated.epoch(epoch)).skip(steps.start as usize * per_step as usize);
        let pieces = steps.flat_map(move |step| (0..per_step).map(move |piece| (step, piece)));
        pieces.zip(all).map(|((step, piece), places)| {
            let mut random = self.annotated.random(Random::Placements(step, piece));
            let images: Vec<(usize, View)> = places.into_iter().map(|place| (place, self.view(place, &mut random))).collect();
            let n_bytes = images.iter().map(|(_, view)| 12 * view.to()[0] as usize * view.to()[1] as usize).sum();
            (RegionSpec { step, piece, images }, n_bytes)
        })
    }

    fn load(&self, RegionSpec { step, piece, images: specs }: RegionSpec, cx: &Context<'_>) -> Result<Loaded<RegionBatch>> {
        let (mut pictures, mut images, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for (place, view) in specs {
            let sample = self.annotated.sample(place);
            let attempt = cx.attempt(|| Ok(view.pixels(&self.annotated.decode(place)?)));
            match attempt.result {
                Ok(picture) => pictures.push(picture),
                Err(error) => {
                    unreadable.push((sample.info.file_name.clone(), error, attempt.attempts));
                    continue;
                }
            }
            let shown = sample.objects.iter().filter_map(|object| Some((relative(&view.show(&object.xyxy)?, view.to()), object.class)));
            let (boxes, classes) = shown.unzip();
            images.push(Shown { id: sample.info.id, place, view, boxes, classes });
        }
        let names = images.iter().map(|image| image.id.to_string()).collect();
        let pixels = match self.together {
            Together::Fixed => pictures.chunks(1).map(|picture| Pixels::tight(picture, Normalisation::CLIP)).collect(),
            Together::Reference => vec![Pixels::tight(&pictures, Normalisation::CLIP)],
        };
        let random = self.annotated.random(Random::Samples(step, piece));
        let batch = (!images.is_empty()).then_some(RegionBatch { images, pixels, random });
        Ok(Loaded { batch, images: names, unreadable })
    }

    fn n_images(&self) -> usize {
        self.annotated.n_images()
    }
}
