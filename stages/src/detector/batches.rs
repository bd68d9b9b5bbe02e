//! The batches of a detector's training: images with their objects, and CLIP's embeddings to learn.

use std::ops::Range;

use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
    images::Image,
    masks::{Mask, check_outlines},
    training::{self, Object, Placement, Sample, ShownMask},
    warnings::of_boxes,
};
use ovenbird_models::detection::boxes::{ImageSize, boxes_tensor};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use super::{
    images::{Normalisation, Pixels},
    ports::{ANNOTATIONS, CLASSES, IMAGES},
    training::{Epochs, Training},
};
use crate::{
    Artifact, Context, Error, In, Inputs, Result, Units,
    artifacts::{ByImage, Classes, ImageFeatures, Images, RegionFeatures, Regions},
    training::{DataLoader, Loaded, TrainingConfig},
};

/// Loads the images of a detector's training.
pub(crate) struct DetectionLoader {
    images: Images,
    samples: Vec<Sample>,
    /// Places in `samples`; images of rare classes more than once.
    copies: Vec<usize>,
    proposals: Option<Source<Regions>>,
    blocks: Option<Source<Regions>>,
    globals: Option<Source<(ImageId, Vec<f32>)>>,
    has_masks: bool,
    normalisation: Normalisation,
    training: Training,
    /// See [`TrainingConfig::first_step`].
    first_step: u32,
    random: ChaCha8Rng,
}

/// Embeddings to learn.
struct Source<R> {
    by_image: ByImage<R>,
    /// The numbers of one embedding.
    dim: usize,
    /// The port of the embeddings.
    port: &'static str,
}

/// A use of random numbers.
#[derive(Clone, Copy)]
pub(crate) enum Random {
    /// How the images of a batch are resized and mirrored, by step and place in the step.
    Placements(u32, u32),
    /// Which anchors and regions of a batch are sampled.
    Samples(u32, u32),
    /// The order of an epoch.
    Order(u64),
    /// The order of an epoch's images of the web.
    WebOrder(u64),
}

/// A batch to load.
pub(crate) struct BatchSpec {
    step: u32,
    /// Its place among the batches of the step.
    piece: u32,
    /// Places in the samples, and how each image is resized.
    images: Vec<(usize, Placement)>,
}

/// The input of a detector in training.
pub(crate) struct Batch {
    pub(crate) pixels: Pixels,
    pub(crate) images: Vec<TrainingImage>,
    /// For sampling anchors and regions.
    pub(crate) random: ChaCha8Rng,
}

/// An image of a batch; boxes in px of the resized image.
pub(crate) struct TrainingImage {
    pub(crate) id: ImageId,
    pub(crate) size: ImageSize,
    pub(crate) objects: Vec<Xyxy>,
    pub(crate) crowds: Vec<Xyxy>,
    /// The class of each object.
    pub(crate) classes: Vec<usize>,
    /// The mask of each object; empty unless masks are learned.
    pub(crate) masks: Vec<ShownMask>,
    /// CLIP's embeddings of proposals.
    pub(crate) proposals: RegionTargets,
    /// CLIP's embeddings of blocks.
    pub(crate) blocks: RegionTargets,
    /// The classes that each block shows, ascending.
    pub(crate) block_classes: Vec<Vec<usize>>,
    /// CLIP's embedding of the whole image, `[D]`; empty unless it is learned.
    pub(crate) embedding: Vec<f32>,
}

/// Regions of an image with embeddings to learn; empty unless they are learned.
#[derive(Default)]
pub(crate) struct RegionTargets {
    pub(crate) boxes: Vec<Xyxy>,
    /// `[N, D]`.
    pub(crate) embeddings: Vec<f32>,
}

/// The chain of a training on the images at the ports `annotations` and `classes`.
pub(crate) fn units(training: &Training, epochs: Epochs, inputs: &Inputs) -> Result<Units> {
    let (training, first_step) = match training.epochs {
        Some(_) => training.in_steps(&samples(&inputs.read(ANNOTATIONS)?.load()?, inputs)?, epochs)?,
        None => (training.clone(), 0),
    };
    Ok(TrainingConfig { first_step, ..training.config() }.units())
}

/// The images of some annotations that show a base class of the port `classes`.
fn samples(annotations: &Annotations, inputs: &Inputs) -> Result<Vec<Sample>> {
    let Classes(classes) = inputs.read(CLASSES)?;
    let samples = training::samples(annotations, &Classes::category_ids(annotations, classes.base.iter())?);
    if samples.is_empty() {
        let problem = format!("none of {} images shows a base class and is at least 32 px wide and high", annotations.images.len());
        let hint = "use the annotations and the classes of the same split".into();
        return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
    }
    Ok(samples)
}

impl DetectionLoader {
    /// The images of the port `annotations` that show a base class.
    pub(crate) fn new(training: &Training, epochs: Epochs, cx: &Context<'_>) -> Result<Self> {
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let (training, first_step) = match training.epochs {
            Some(_) => training.in_steps(&samples(&annotations, cx.inputs)?, epochs)?,
            None => (training.clone(), 0),
        };
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let samples = samples(&annotations, cx.inputs)?;
        let n_images = annotations.images.len();
        if samples.len() < n_images {
            let n_left_out = n_images - samples.len();
            cx.note(format!("of {n_images} images, {n_left_out} show no object of a base class, or are below 32 px, and are left out"));
        }
        if let Some(words) = of_boxes(&annotations) {
            cx.note(format!("{words}: boxes that are empty or lie outside their image are ignored"));
        }
        Ok(Self {
            images: cx.inputs.read(IMAGES)?,
            copies: training.copies(&samples),
            samples,
            proposals: None,
            blocks: None,
            globals: None,
            has_masks: false,
            normalisation: Normalisation::IMAGENET,
            training,
            first_step,
            random: cx.rng(&cx.units[0]),
        })
    }

    /// Adds embeddings of `dim` numbers of proposals, of blocks and of whole images, where they are given. Images without embeddings are
    /// skipped or refused by the stage's policy.
    pub(crate) fn with_features(
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

    /// The same for a network whose input is normalised so.
    pub(crate) fn normalised(self, normalisation: Normalisation) -> Self {
        Self { normalisation, ..self }
    }

    /// Adds the masks of objects. Fails where an object has no outline.
    pub(crate) fn with_masks(self) -> Result<Self> {
        let objects = self.samples.iter().flat_map(|sample| sample.objects.iter().map(|object| (sample.info.id, object)));
        let outlines = objects.map(|(image, object)| (object.id, image, &object.segmentation));
        check_outlines(outlines).map_err(unusable_masks)?;
        Ok(Self { has_masks: true, ..self })
    }

    /// Looks for all images, so that a missing one is found before the training begins ([`Images::look_for`]), and notes how many there are.
    pub(crate) fn look_for_images(&self, cx: &Context<'_>) -> Result<()> {
        self.images.look_for(self.samples.iter().map(|sample| &sample.info), cx)?;
        cx.note(format!("an epoch is {} batches of {} images", self.n_batches(), self.samples.len()));
        Ok(())
    }

    /// The batches of an epoch.
    pub(crate) fn n_batches(&self) -> usize {
        self.copies.len().div_ceil(self.training.batch_size)
    }

    /// How the detector is trained, with its length in steps.
    pub(crate) fn training(&self) -> &Training {
        &self.training
    }

    /// How the training goes, with its length in steps.
    pub(crate) fn config(&self) -> TrainingConfig {
        TrainingConfig { first_step: self.first_step, ..self.training.config() }
    }

    /// The image at a place, with its objects.
    pub(crate) fn sample(&self, place: usize) -> &Sample {
        &self.samples[place]
    }

    /// Decodes the image at a place.
    pub(crate) fn decode(&self, place: usize) -> Result<Image> {
        let info = &self.samples[place].info;
        self.images.decode_sized(&info.file_name, [info.width, info.height])
    }

    /// The random numbers of one use: no two uses share any.
    pub(crate) fn random(&self, of: Random) -> ChaCha8Rng {
        let mut random = self.random.clone();
        let batch = |step: u32, piece: u32| u64::from(step) * u64::from(self.training.accumulation_steps) + u64::from(piece);
        random.set_stream(match of {
            Random::Placements(step, piece) => 2 * batch(step, piece),
            Random::Samples(step, piece) => 2 * batch(step, piece) + 1,
            Random::Order(epoch) => u64::MAX - epoch,
            Random::WebOrder(epoch) => u64::MAX / 2 - epoch,
        });
        random
    }

    /// The batches of an epoch: every image once, images of rare classes more often; wide and tall images are in separate batches.
    pub(crate) fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order = self.copies.clone();
        order.shuffle(&mut self.random(Random::Order(epoch)));
        let is_tall = |place: usize| self.samples[place].info.height > self.samples[place].info.width;
        training::batches(&order, is_tall, self.training.batch_size)
    }

    /// A batch of images at some places, and the bytes that it takes.
    pub(super) fn spec(&self, step: u32, piece: u32, places: Vec<usize>) -> (BatchSpec, usize) {
        let mut random = self.random(Random::Placements(step, piece));
        let images: Vec<(usize, Placement)> = places.into_iter().map(|place| (place, self.placement(place, &mut random))).collect();
        let bytes = images.iter().map(|(_, placement)| n_bytes(placement)).sum();
        (BatchSpec { step, piece, images }, bytes)
    }

    fn placement(&self, place: usize, random: &mut ChaCha8Rng) -> Placement {
        let info = &self.samples[place].info;
        let step = self.training.size_step;
        let length = |[low, high]: [u32; 2]| low + step * random.random_range(0..=(high - low) / step);
        let [longer, shorter] = [self.training.max_size, self.training.min_size].map(length);
        maybe_mirrored(Placement::fitting([info.width, info.height], longer, shorter), random)
    }
}

/// Mirrors every other image.
pub(super) fn maybe_mirrored(placement: Placement, random: &mut ChaCha8Rng) -> Placement {
    if random.random_bool(0.5) { placement.mirrored() } else { placement }
}

/// The bytes of an image as a network gets it.
pub(super) fn n_bytes(placement: &Placement) -> usize {
    12 * placement.to[0] as usize * placement.to[1] as usize
}

impl DataLoader for DetectionLoader {
    type Spec = BatchSpec;
    type Batch = Batch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (BatchSpec, usize)> + Send {
        let all = (0..).flat_map(|epoch| self.epoch(epoch)).skip(steps.start as usize * self.training.accumulation_steps as usize);
        let pieces = steps.flat_map(|step| (0..self.training.accumulation_steps).map(move |piece| (step, piece)));
        pieces.zip(all).map(|((step, piece), places)| self.spec(step, piece, places))
    }

    fn load(&self, BatchSpec { step, piece, images: specs }: BatchSpec, cx: &Context<'_>) -> Result<Loaded<Batch>> {
        let (mut pictures, mut images, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for (place, placement) in specs {
            let Sample { info, objects, crowds, .. } = &self.samples[place];
            let attempt = cx.attempt(|| Ok(placement.pixels(&self.images.decode_sized(&info.file_name, placement.from)?)));
            match attempt.result {
                Ok(picture) => pictures.push(picture),
                Err(error) => {
                    unreadable.push((info.file_name.clone(), error, attempt.attempts));
                    continue;
                }
            }
            let targets = |source: &Option<Source<Regions>>| match source {
                Some(source) => source.regions(info.id),
                None => Ok(Default::default()),
            };
            let (proposals, blocks) = (targets(&self.proposals)?, targets(&self.blocks)?);
            let embedding = match &self.globals {
                Some(source) => source.embedding(info.id)?,
                None => Vec::new(),
            };
            let masks = match self.has_masks {
                true => objects.iter().map(|object| resized_mask(object, placement)).collect::<Result<_>>()?,
                false => Vec::new(),
            };
            images.push(TrainingImage {
                id: info.id,
                size: placement.to.into(),
                objects: objects.iter().map(|object| placement.show(&object.xyxy)).collect(),
                crowds: crowds.iter().map(|crowd| placement.show(crowd)).collect(),
                classes: objects.iter().map(|object| object.class).collect(),
                masks,
                block_classes: blocks.boxes.iter().map(|block| training::shown_classes(block, objects)).collect(),
                proposals: proposals.resized(placement),
                blocks: blocks.resized(placement),
                embedding,
            });
        }
        if let Some(remarks) = self.images.remarks() {
            cx.note(remarks);
        }
        let names = images.iter().map(|image| image.id.to_string()).collect();
        let random = self.random(Random::Samples(step, piece));
        let batch = (!images.is_empty()).then(|| Batch { pixels: Pixels::of(&pictures, self.normalisation), images, random });
        Ok(Loaded { batch, images: names, unreadable })
    }

    fn n_images(&self) -> usize {
        self.samples.len()
    }
}

fn resized_mask(object: &Object, placement: Placement) -> Result<ShownMask> {
    let segmentation = object.segmentation.drawn().expect("BUG: `with_masks` checks that every object has an outline");
    let mask = Mask::from_segmentation(segmentation, placement.from);
    let mask = mask.map_err(|problem| unusable_masks(format!("annotation {}: {problem}", object.id)))?;
    Ok(placement.show_mask(&mask))
}

fn unusable_masks(problem: String) -> Error {
    let hint = "give annotations with polygons or run lengths, or train without `masks`".into();
    Error::Input { port: ANNOTATIONS.info().name, problem, hint }
}

impl RegionTargets {
    fn resized(mut self, placement: Placement) -> Self {
        for xyxy in &mut self.boxes {
            *xyxy = placement.show(xyxy);
        }
        self
    }
}

impl Source<Regions> {
    /// In px of the image.
    fn regions(&self, image: ImageId) -> Result<RegionTargets> {
        let Regions { boxes, embeddings, .. } = self.by_image.get(image)?;
        self.check(image, boxes.len(), &embeddings)?;
        Ok(RegionTargets { boxes, embeddings })
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
    /// Refuses embeddings that have not as many numbers as class embeddings.
    fn check(&self, image: ImageId, n: usize, embeddings: &[f32]) -> Result<()> {
        if embeddings.len() == n * self.dim {
            return Ok(());
        }
        let problem = format!("image {image}: embeddings have {} numbers, class embeddings {}", embeddings.len() / n.max(1), self.dim);
        Err(Error::Input { port: self.port, problem, hint: "make the prompts and the features with the same CLIP".into() })
    }
}

/// Boxes `[N, 4]` f32.
pub(crate) fn boxes(boxes: &[Xyxy]) -> Tensor {
    boxes_tensor(&boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect::<Vec<_>>())
}

#[cfg(test)]
impl Batch {
    /// Two images of 96 x 64 px with two objects each, of classes 0 to 2.
    pub(super) fn of_two() -> Self {
        use rand_chacha::rand_core::SeedableRng as _;
        let picture = |of: u32| {
            let level = |place: u32| ((place * 37 + of * 101) % 251) as u8;
            Image { width: 96, height: 64, rgb: (0..3 * 96 * 64).map(level).collect() }
        };
        let image = |id: u64| TrainingImage {
            id: ImageId(id),
            size: ImageSize { width: 96, height: 64 },
            objects: vec![Xyxy { x1: 4.0, y1: 6.0, x2: 40.0, y2: 50.0 }, Xyxy { x1: 30.0, y1: 8.0, x2: 90.0, y2: 60.0 }],
            crowds: Vec::new(),
            classes: vec![0, id as usize],
            masks: Vec::new(),
            proposals: RegionTargets::default(),
            blocks: RegionTargets::default(),
            block_classes: Vec::new(),
            embedding: Vec::new(),
        };
        let pixels = Pixels::of(&[picture(1), picture(2)], Normalisation::IMAGENET);
        Self { pixels, images: vec![image(1), image(2)], random: ChaCha8Rng::seed_from_u64(5) }
    }
}

#[cfg(test)]
impl DetectionLoader {
    /// Of so many images without files, 90 x 60 px, every third one 60 x 90 px.
    pub(super) fn of_nothing(n: usize, training: &Training, first_step: u32) -> Self {
        use ovenbird_data::annotations::ImageInfo;
        use rand_chacha::rand_core::SeedableRng as _;
        let info = |place: usize| {
            let [width, height] = if place.is_multiple_of(3) { [60, 90] } else { [90, 60] };
            let (neg_category_ids, not_exhaustive_category_ids) = (Vec::new(), Vec::new());
            let (id, file_name) = (ImageId(place as u64 + 1), format!("{place}.jpg"));
            ImageInfo { id, file_name, width, height, neg_category_ids, not_exhaustive_category_ids }
        };
        let sample = |place| Sample { info: info(place), objects: Vec::new(), crowds: Vec::new(), categories: [].into() };
        Self {
            images: Images::open(&[]).expect("BUG: an empty folder is a folder"),
            samples: (0..n).map(sample).collect(),
            copies: (0..n).collect(),
            proposals: None,
            blocks: None,
            globals: None,
            has_masks: false,
            normalisation: Normalisation::IMAGENET,
            training: training.clone(),
            first_step,
            random: ChaCha8Rng::seed_from_u64(7),
        }
    }

    pub(super) fn infos(&self) -> impl Iterator<Item = ovenbird_data::annotations::ImageInfo> {
        self.samples.iter().map(|sample| sample.info.clone())
    }

    /// The images of a batch, and how they are shown.
    pub(super) fn shown(spec: &BatchSpec) -> impl Iterator<Item = (usize, Placement)> {
        spec.images.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_models::detection::roi_align::{Alignment, Level, RoiAlign, Sampling};

    use super::*;

    /// L6 of LP-OVOD's specification: squares of one colour each, whose boxes are pooled from the image as a network gets it.
    #[test]
    fn boxes_of_distillation_go_with_the_image() {
        let squares = [([10, 10], [220, 30, 40]), ([60, 20], [30, 200, 90]), ([25, 55], [60, 70, 250])];
        let mut rgb = vec![0_u8; 120 * 90 * 3];
        for ([left, top], colour) in squares {
            for (y, x) in (top..top + 30).flat_map(|y| (left..left + 30).map(move |x| (y, x))) {
                rgb[3 * (y * 120 + x)..][..3].copy_from_slice(&colour);
            }
        }
        let image = Image { width: 120, height: 90, rgb };
        let boxes_of_squares = || squares.map(|([left, top], _)| Xyxy::from([left, top, left + 30, top + 30].map(|corner| corner as f32)));
        // A pooled cell well inside a square touches no other pixel.
        let pool = RoiAlign { side: 5, sampling: Sampling::Fixed(2), alignment: Alignment::Centre, finest_scale: 1e6 };
        for placement in [Placement::fitting([120, 90], 200, 150), Placement::fitting([120, 90], 200, 150).mirrored()] {
            let shown = placement.pixels(&image);
            let [width, height] = placement.to.map(i64::from);
            let pixels = Tensor::from_slice(&shown.rgb).view([1, height, width, 3]).permute([0, 3, 1, 2]).to_kind(tch::Kind::Float);
            let targets = RegionTargets { boxes: boxes_of_squares().to_vec(), embeddings: Vec::new() }.resized(placement);
            let pooled = pool.forward(&[Level { features: &pixels, stride: 1 }], &[boxes(&targets.boxes)]).unwrap();
            for (place, (_, colour)) in squares.into_iter().enumerate() {
                for (channel, level) in colour.into_iter().enumerate() {
                    let found = pooled.double_value(&[place as i64, channel as i64, 2, 2]);
                    assert!((found - f64::from(level)).abs() < 1.0, "{placement:?}: square {place}, channel {channel}: {found}");
                }
            }
        }
    }
}
