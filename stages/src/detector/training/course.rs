//! What is seen at which step.

use std::ops::Range;

use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
    masks::{Mask, check_outlines},
    training::{self, Object, Placement, Sample, ShownMask},
    warnings::of_boxes,
};
use ovenbird_models::detection::boxes::ImageSize;
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;

use super::Training;
use crate::{
    Artifact, Context, Error, In, Inputs, Result,
    artifacts::{ByImage, Classes, ImageFeatures, Images, RegionFeatures, Regions},
    detector::{ANNOTATIONS, CLASSES, IMAGES, Pixels},
};

/// What is seen at which step.
pub(in crate::detector) struct Course {
    images: Images,
    samples: Vec<Sample>,
    /// Places in `samples`, rare ones more than once.
    copies: Vec<usize>,
    proposals: Option<Source<Regions>>,
    blocks: Option<Source<Regions>>,
    globals: Option<Source<(ImageId, Vec<f32>)>>,
    has_masks: bool,
    training: Training,
    random: ChaCha8Rng,
}

/// Embeddings to learn.
struct Source<R> {
    by_image: ByImage<R>,
    /// How many numbers one has.
    dim: usize,
    /// The port that they came from.
    port: &'static str,
}

/// What random numbers are for.
#[derive(Clone, Copy)]
pub(super) enum Random {
    /// How the images of a batch are shown, by step and place in the step.
    Placements(u32, u32),
    /// Which anchors and regions of a batch are learned from.
    Samples(u32, u32),
    /// The order of an epoch.
    Order(u64),
}

/// A batch to make: places in the samples, and how they are shown.
pub(super) struct Lesson {
    step: u32,
    piece: u32,
    images: Vec<(usize, Placement)>,
}

/// What a network sees at once.
pub(in crate::detector) struct Batch {
    pub(in crate::detector) step: u32,
    /// Its place among the batches of the step.
    pub(super) piece: u32,
    pub(super) pixels: Pixels,
    /// Those that can be read.
    pub(in crate::detector) images: Vec<Shown>,
    /// Names of the others, why, and how often they were tried.
    pub(super) unreadable: Vec<(String, Error, u32)>,
}

/// An image of a batch, boxes in px of what the network sees.
pub(in crate::detector) struct Shown {
    pub(in crate::detector) id: ImageId,
    pub(in crate::detector) size: ImageSize,
    pub(in crate::detector) objects: Vec<Xyxy>,
    pub(in crate::detector) crowds: Vec<Xyxy>,
    pub(in crate::detector) classes: Vec<usize>,
    /// Of each object, where they are asked for.
    pub(in crate::detector) masks: Vec<ShownMask>,
    /// What CLIP says of proposals.
    pub(in crate::detector) proposals: ShownRegions,
    /// What CLIP says of blocks.
    pub(in crate::detector) blocks: ShownRegions,
    /// Of each block, the classes that it shows, ascending.
    pub(in crate::detector) block_classes: Vec<Vec<usize>>,
    /// What CLIP says of the whole image, `[D]`.
    pub(in crate::detector) embedding: Vec<f32>,
}

/// Regions of an image with embeddings to learn; none where nothing is asked for.
#[derive(Default)]
pub(in crate::detector) struct ShownRegions {
    pub(in crate::detector) boxes: Vec<Xyxy>,
    /// `[N, D]`.
    pub(in crate::detector) embeddings: Vec<f32>,
}

/// The images of some annotations that show a base class of the port `classes`.
pub(super) fn samples(annotations: &Annotations, inputs: &Inputs) -> Result<Vec<Sample>> {
    let Classes(classes) = inputs.read(CLASSES)?;
    let samples = training::samples(annotations, &Classes::category_ids(annotations, classes.base.iter())?);
    if samples.is_empty() {
        let problem = format!("none of {} images shows a base class and is at least 32 px wide and high", annotations.images.len());
        let hint = "use the annotations and the classes of the same split".into();
        return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
    }
    Ok(samples)
}

impl Course {
    /// Over the images of the port `annotations` that show a base class.
    pub(in crate::detector) fn of(training: &Training, cx: &Context<'_>) -> Result<Self> {
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let training = training.in_steps(&annotations, cx.inputs)?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let samples = samples(&annotations, cx.inputs)?;
        if let Some(words) = of_boxes(&annotations) {
            cx.note(format!("{words}: boxes that are empty or lie outside their image are not learned from"));
        }
        Ok(Self {
            images: cx.inputs.read(IMAGES)?,
            copies: training.copies(&samples),
            samples,
            proposals: None,
            blocks: None,
            globals: None,
            has_masks: false,
            training,
            random: cx.rng(&cx.units[0]),
        })
    }

    /// The same, with embeddings of `dim` numbers of proposals, of blocks and of whole images, as far as they are given. Images without an
    /// entry are left out or refused.
    pub(in crate::detector) fn with_features(
        mut self,
        [proposals, blocks]: [In<RegionFeatures>; 2],
        globals: In<ImageFeatures>,
        dim: i64,
        cx: &Context<'_>,
    ) -> Result<Self> {
        self.proposals = self.source(proposals, RegionFeatures::by_image, "clip/objects", dim, cx)?;
        self.blocks = self.source(blocks, RegionFeatures::by_image, "clip/blocks", dim, cx)?;
        self.globals = self.source(globals, ImageFeatures::by_image, "clip/globals", dim, cx)?;
        Ok(self)
    }

    fn source<F: Artifact, R>(
        &mut self,
        port: In<F>,
        by_image: fn(&F) -> Result<ByImage<R>>,
        maker: &str,
        dim: i64,
        cx: &Context<'_>,
    ) -> Result<Option<Source<R>>> {
        let Some(features) = cx.inputs.read_if_given(port)? else { return Ok(None) };
        let by_image = by_image(&features)?;
        let missing: Vec<ImageId> = self.samples.iter().map(|sample| sample.info.id).filter(|image| !by_image.has(*image)).collect();
        let hint = format!("make them for these annotations: `{maker}` with the same `annotations`");
        cx.skip_missing(port.info(), &missing, self.samples.len(), &hint)?;
        if !missing.is_empty() {
            self.samples.retain(|sample| by_image.has(sample.info.id));
            self.copies = self.training.copies(&self.samples);
        }
        Ok(Some(Source { by_image, dim: dim as usize, port: port.info().name }))
    }

    /// The same, with the masks of objects. Fails where an object has no outline.
    pub(in crate::detector) fn with_masks(self) -> Result<Self> {
        let objects = self.samples.iter().flat_map(|sample| sample.objects.iter().map(|object| (sample.info.id, object)));
        let outlines = objects.map(|(image, object)| (object.id, image, &object.segmentation));
        check_outlines(outlines).map_err(unusable_masks)?;
        Ok(Self { has_masks: true, ..self })
    }

    /// Looks for the images before the first is decoded: see [`Images::look_for`].
    pub(super) fn look_for_images(&self, cx: &Context<'_>) -> Result<()> {
        self.images.look_for(self.samples.iter().map(|sample| &sample.info), cx)
    }

    /// How it is trained, its length in steps.
    pub(super) fn training(&self) -> &Training {
        &self.training
    }

    pub(super) fn n_images(&self) -> usize {
        self.samples.len()
    }

    /// How many batches an epoch has.
    pub(super) fn n_batches(&self) -> usize {
        self.copies.len().div_ceil(self.training.batch_size)
    }

    /// Random numbers for something: no two things share any.
    pub(super) fn random(&self, of: Random) -> ChaCha8Rng {
        let mut random = self.random.clone();
        let batch = |step: u32, piece: u32| u64::from(step) * u64::from(self.training.accumulation_steps) + u64::from(piece);
        random.set_stream(match of {
            Random::Placements(step, piece) => 2 * batch(step, piece),
            Random::Samples(step, piece) => 2 * batch(step, piece) + 1,
            Random::Order(epoch) => u64::MAX - epoch,
        });
        random
    }

    /// Every image once, rare ones more often, wide and tall ones apart.
    fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order = self.copies.clone();
        order.shuffle(&mut self.random(Random::Order(epoch)));
        let is_tall = |place: usize| self.samples[place].info.height > self.samples[place].info.width;
        training::batches(&order, is_tall, self.training.batch_size)
    }

    /// What the batches of some steps show, with the bytes that each will have.
    pub(super) fn lessons(&self, steps: Range<u32>) -> impl Iterator<Item = (Lesson, usize)> + Send {
        let all = (0..).flat_map(|epoch| self.epoch(epoch)).skip(steps.start as usize * self.training.accumulation_steps as usize);
        let pieces = steps.flat_map(|step| (0..self.training.accumulation_steps).map(move |piece| (step, piece)));
        pieces.zip(all).map(|((step, piece), places)| {
            let mut random = self.random(Random::Placements(step, piece));
            let images: Vec<(usize, Placement)> = places.into_iter().map(|place| (place, self.placement(place, &mut random))).collect();
            let bytes = images.iter().map(|(_, placement)| 12 * placement.to[0] as usize * placement.to[1] as usize).sum();
            (Lesson { step, piece, images }, bytes)
        })
    }

    fn placement(&self, place: usize, random: &mut ChaCha8Rng) -> Placement {
        let info = &self.samples[place].info;
        let [longer, shorter] = [self.training.max_size, self.training.min_size].map(|[low, high]| random.random_range(low..=high));
        let placement = Placement::fitting([info.width, info.height], longer, shorter);
        if random.random_bool(0.5) { placement.mirrored() } else { placement }
    }

    /// Makes a batch. An image that cannot be read is left out of it, and listed.
    pub(super) fn batch(&self, lesson: Lesson, cx: &Context<'_>) -> Result<Batch> {
        let Lesson { step, piece, images: lesson } = lesson;
        let (mut pictures, mut images, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for (place, placement) in lesson {
            let Sample { info, objects, crowds } = &self.samples[place];
            let attempt = cx.attempt(|| Ok(placement.pixels(&self.images.decode_sized(&info.file_name, placement.from)?)));
            match attempt.result {
                Ok(picture) => pictures.push(picture),
                Err(error) => {
                    unreadable.push((info.file_name.clone(), error, attempt.attempts));
                    continue;
                }
            }
            let shown = |source: &Option<Source<Regions>>| match source {
                Some(source) => source.regions(info.id),
                None => Ok(Default::default()),
            };
            let (proposals, blocks) = (shown(&self.proposals)?, shown(&self.blocks)?);
            let embedding = match &self.globals {
                Some(source) => source.embedding(info.id)?,
                None => Vec::new(),
            };
            let masks = match self.has_masks {
                true => objects.iter().map(|object| shown_mask(object, placement)).collect::<Result<_>>()?,
                false => Vec::new(),
            };
            images.push(Shown {
                id: info.id,
                size: ImageSize { width: placement.to[0].into(), height: placement.to[1].into() },
                objects: objects.iter().map(|object| placement.show(&object.xyxy)).collect(),
                crowds: crowds.iter().map(|crowd| placement.show(crowd)).collect(),
                classes: objects.iter().map(|object| object.class).collect(),
                masks,
                block_classes: blocks.boxes.iter().map(|block| training::shown_classes(block, objects)).collect(),
                proposals: proposals.shown(placement),
                blocks: blocks.shown(placement),
                embedding,
            });
        }
        if let Some(remarks) = self.images.remarks() {
            cx.note(remarks);
        }
        Ok(Batch { step, piece, pixels: Pixels::of(&pictures), images, unreadable })
    }
}

fn shown_mask(object: &Object, placement: Placement) -> Result<ShownMask> {
    let segmentation = object.segmentation.drawn().expect("BUG: `with_masks` checks that every object has an outline");
    let mask = Mask::from_segmentation(segmentation, placement.from);
    let mask = mask.map_err(|problem| unusable_masks(format!("annotation {}: {problem}", object.id)))?;
    Ok(placement.show_mask(&mask))
}

fn unusable_masks(problem: String) -> Error {
    let hint = "masks are learned from: give annotations with polygons or run lengths, or train without `masks`".into();
    Error::Input { port: ANNOTATIONS.info().name, problem, hint }
}

impl ShownRegions {
    fn shown(mut self, placement: Placement) -> Self {
        for xyxy in &mut self.boxes {
            *xyxy = placement.show(xyxy);
        }
        self
    }
}

impl Source<Regions> {
    /// In px of the image.
    fn regions(&self, image: ImageId) -> Result<ShownRegions> {
        let Regions { boxes, embeddings, .. } = self.by_image.get(image)?;
        self.check(image, boxes.len(), &embeddings)?;
        Ok(ShownRegions { boxes, embeddings })
    }
}

impl Source<(ImageId, Vec<f32>)> {
    fn embedding(&self, image: ImageId) -> Result<Vec<f32>> {
        let (_, embedding) = self.by_image.get(image)?;
        self.check(image, 1, &embedding)?;
        Ok(embedding)
    }
}

impl<R> Source<R> {
    /// Refuses embeddings of another space than the detector's.
    fn check(&self, image: ImageId, n: usize, embeddings: &[f32]) -> Result<()> {
        if embeddings.len() == n * self.dim {
            return Ok(());
        }
        let problem = format!("image {image}: embeddings have {} numbers, class embeddings {}", embeddings.len() / n.max(1), self.dim);
        Err(Error::Input { port: self.port, problem, hint: "make the prompts and the features with the same CLIP".into() })
    }
}
