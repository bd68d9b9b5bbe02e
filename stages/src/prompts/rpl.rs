//! `prompts/rpl`: regional prompt learning, of vectors around class names and their descriptions.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::{
    annotations::{Annotations, ImageInfo},
    classes::ClassSplit,
    crops::random_crop,
    images::{Image, Preprocess},
    letterbox::Letterbox,
};
use ovenbird_models::{
    Phase,
    clip::{self, prompted::Prompted},
    detpro::first_context,
    to_unit_length,
};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    described::{RPL_CONTEXT, Renamed, described_prompts, prompted, published_names},
    naming::places_of_categories,
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Annotated, AnnotationFile, CheckpointFile, Classes, CropIndex, Crops, Descriptions, Images, PROMPTS_FILE, Prompts},
    clip::{Clip, Space, encoder::preprocess_of},
    contract::is_default,
    feed::in_parallel,
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, named, train,
    },
};

/// The learning rate of warm-up epochs (Dassl's).
const WARMUP_LR: f64 = 1e-5;
/// Streams of random numbers besides those of epochs.
const CONTEXT_STREAM: u64 = u64::MAX;
/// Streams of steps begin here.
const FIRST_STEP_STREAM: u64 = 1 << 32;
/// Class names that a note lists.
const MAX_NAMED: usize = 10;
/// The most vectors at each of the two places.
const MAX_CONTEXT: usize = 16;
/// Crops of validation that are embedded at once.
const VAL_BATCH: usize = 100;

/// Learns two contexts that all classes share, one before the name and one between the name and its description, so that the text embeddings of base
/// classes are near to CLIP's embeddings of their objects. CLIP is frozen. (PromptDet, section 5: regional prompt learning.)
///
/// What is shown: crops of annotated objects, and images of the web with their labels, where they are given. Every epoch shows each once, at a random
/// part and mirrored or not. The loss compares an image with the base classes of which there is one; all classes get an embedding in the end. Every
/// text is embedded in each step, packed and without padding, so that memory does not grow with their number. Defaults are the published ones, but for the
/// numbers of the contexts, which are f32 here.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rpl {
    /// Activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// Vectors at each of the two places.
    pub context: usize,
    /// What classes are called in `descriptions`, where that is another name.
    pub renamed: Renamed,
    /// Seed of the first vectors, of the order and of what is shown of each image.
    pub seed: u64,
    /// Epochs, those of the warm-up among them.
    pub epochs: u32,
    /// Epochs at a learning rate of 1e-5. The cosine begins after them, as long as if there were none.
    pub warmup_epochs: u32,
    /// Images per step. An incomplete last batch of an epoch is left out.
    pub batch_size: usize,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Weight decay of the vectors.
    pub weight_decay: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u32,
    /// What is done with images of the web before they are shown; PromptDet's are `white1024`.
    #[serde(skip_serializing_if = "is_default")]
    pub letterbox: Letterbox,
}

impl Default for Rpl {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            context: 1,
            renamed: published_names(),
            seed: 3,
            epochs: 6,
            warmup_epochs: 1,
            batch_size: 32,
            lr: 2e-3,
            momentum: 0.9,
            weight_decay: 5e-4,
            checkpoint_every: 1000,
            letterbox: Letterbox::None,
        }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const DESCRIPTIONS: In<Descriptions> = In::required("descriptions", "What each class is.");
const CROPS: In<Crops> = In::required("crops", "Crops of annotated objects (`crops/objects`); those of novel classes are not used.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "The json of these objects, whose categories name the classes.");
const WEB_IMAGES: In<Images> = In::optional("web_images", "Folder that the file names of `web` are relative to.");
const WEB: In<AnnotationFile> =
    In::optional("web", "Labels of images of the web, each shown whole, once for each label; labels of novel classes are not used.");
const VAL_CROPS: In<Crops> = In::optional("val_crops", "Crops of validation images, to measure accuracy at the end.");
const VAL_ANNOTATIONS: In<AnnotationFile> = In::optional("val_annotations", "The json of these crops.");
const PORTS: Ports<Prompts> = Ports::new(
    Out::new(
        "prompts",
        "safetensors: `embeddings` f32 [K, D], not normalised; `ctx1` and `ctx2` f32 [M, C]; metadata `names`, base ++ novel, and `texts`.",
    ),
    PROMPTS_FILE,
);

impl Stage for Rpl {
    const KIND: &'static str = "prompts/rpl";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[
        CHECKPOINT.info(),
        CLASSES.info(),
        DESCRIPTIONS.info(),
        CROPS.info(),
        ANNOTATIONS.info(),
        WEB_IMAGES.info(),
        WEB.info(),
        VAL_CROPS.info(),
        VAL_ANNOTATIONS.info(),
    ];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("context", (1..=MAX_CONTEXT).contains(&self.context), "from 1 to 16"),
            ("epochs", (1..=1000).contains(&self.epochs), "from 1 to 1000"),
            ("warmup_epochs", self.warmup_epochs <= self.epochs, "at most `epochs`"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("lr", self.lr > 0.0 && self.lr.is_finite(), "a number above 0"),
            ("momentum", (0.0..1.0).contains(&self.momentum), "a number from 0 to below 1"),
            ("weight_decay", (0.0..1.0).contains(&self.weight_decay), "a number from 0 to below 1"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let Classes(classes) = inputs.read(CLASSES)?;
        let crops = inputs.read(CROPS)?.index()?;
        let shown = Shown::of(&crops, &inputs.read(ANNOTATIONS)?.load()?, &web(inputs)?, &classes.base)?;
        // One image in a dry run whose images show no base class.
        Ok(self.config(shown.labels.len().max(1)).units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        let texts = cx.inputs.read(DESCRIPTIONS)?.of(&classes.all().cloned().collect::<Vec<_>>(), &self.renamed)?;
        let (crops, annotations) = (cx.inputs.read(CROPS)?.index()?, cx.inputs.read(ANNOTATIONS)?.load()?);
        let web = web(cx.inputs)?;
        if let Some((images, annotations)) = &web {
            images.look_for(annotations.images.iter(), cx).map_err(|error| error.at_port(WEB_IMAGES.info().name))?;
        }
        let mut shown = Shown::of(&crops, &annotations, &web, &classes.base)?;
        shown.check(crops.ids.len(), cx)?;
        shown.note(&classes.base, cx);
        let mut random = cx.rng(&cx.units[0]);
        let validation = Validation::read(&classes, cx)?;
        let config = self.config(shown.labels.len());
        let preprocess = preprocess_of(&clip);
        let criterion = RplCriterion::new(self, (&clip, space), &classes, &texts, &shown.present, validation, &mut random)?;
        let loader = CropLoader { shown, crops, web, preprocess, batch_size: self.batch_size, letterbox: self.letterbox, random };
        train(&config, &loader, &criterion, &PORTS, units, cx)
    }
}

/// Images of the web with their labels.
type Web = Option<(Images, Annotations)>;

fn web(inputs: &Inputs) -> Result<Web> {
    let both = inputs.read_both(WEB_IMAGES, WEB)?;
    both.map(|(images, annotations)| Ok((images, annotations.load()?))).transpose()
}

impl Rpl {
    /// How a training on so many images goes.
    fn config(&self, n_images: usize) -> TrainingConfig {
        let steps_per_epoch = u32::try_from(n_batches(n_images, self.batch_size)).unwrap_or(u32::MAX);
        let optimizer = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: self.momentum },
            schedule: Schedule {
                peak: self.lr,
                warmup: Warmup::Constant { lr: WARMUP_LR, steps: f64::from(self.warmup_epochs.saturating_mul(steps_per_epoch)) },
                decay: Decay::CosineOfEpochs { epochs: self.epochs, steps_per_epoch },
            },
            weight_decay: self.weight_decay,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        TrainingConfig {
            first_step: 0,
            steps: steps_per_epoch.saturating_mul(self.epochs),
            checkpoint_every: self.checkpoint_every,
            images_per_step: u32::try_from(self.batch_size).unwrap_or(u32::MAX),
            keep_checkpoints: 1,
            optimizer,
            max_loss: f64::INFINITY,
        }
    }
}

/// Batches of an epoch: an incomplete one counts only where there is no other.
fn n_batches(n_images: usize, batch_size: usize) -> usize {
    (n_images / batch_size).max(1)
}

/// The images of a training.
struct Shown {
    /// Of each image its place among `present`; crops first.
    labels: Vec<(Source, i64)>,
    /// The base classes that some image shows, as places in the list of base classes.
    present: Vec<usize>,
}

/// Where an image is.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A crop, by its place.
    Crop(usize),
    /// A label of an image of the web, by its place.
    Web(usize),
}

impl Shown {
    /// Fails where the crops are of other annotations.
    fn of(crops: &CropIndex, annotations: &Annotations, web: &Web, base: &[String]) -> Result<Self> {
        let places = |annotations: &Annotations| places_of_categories(annotations, base.iter());
        let (annotated, of_crops, mut all) = (Annotated::of(annotations), places(annotations), Vec::new());
        for (crop, ids) in crops.ids.iter().enumerate() {
            annotated.check(*ids, ANNOTATIONS.info().name)?;
            all.extend(of_crops.get(&ids.2).map(|class| (Source::Crop(crop), *class)));
        }
        if let Some((_, annotations)) = web {
            let of_web = places(annotations);
            let labels = annotations.annotations.iter().enumerate().filter(|(_, label)| !label.is_crowd);
            all.extend(labels.filter_map(|(place, label)| Some((Source::Web(place), *of_web.get(&label.category_id)?))));
        }
        let present: Vec<usize> = all.iter().map(|(_, class)| *class).collect::<BTreeSet<_>>().into_iter().collect();
        let label = |class: usize| present.binary_search(&class).expect("BUG: every class of an image is present") as i64;
        Ok(Self { labels: all.into_iter().map(|(source, class)| (source, label(class))).collect(), present })
    }

    /// Fails where there is nothing to learn from; a dry run, whose images are few, then shows one image as one of the first class.
    fn check(&mut self, n_crops: usize, cx: &Context<'_>) -> Result<()> {
        if self.present.len() > 1 {
            return Ok(());
        }
        if cx.most_items.is_some() && n_crops > 0 {
            if self.labels.is_empty() {
                cx.note("a dry run: no image shows a base class, so the first is taken for one");
                *self = Self { labels: vec![(Source::Crop(0), 0)], present: vec![0] };
            }
            return Ok(());
        }
        let problem = format!("expected images of at least two base classes, found {} among {n_crops} crops", self.present.len());
        Err(Error::Input { port: CROPS.info().name, problem, hint: "give classes and crops of the same data set".into() })
    }

    /// Says how many images there are, and which classes have none.
    fn note(&self, base: &[String], cx: &Context<'_>) {
        let n_crops = self.labels.iter().filter(|(source, _)| matches!(source, Source::Crop(_))).count();
        cx.note(format!("{n_crops} crops and {} images of the web, of {} base classes", self.labels.len() - n_crops, self.present.len()));
        let without: Vec<&str> =
            (0..base.len()).filter(|class| self.present.binary_search(class).is_err()).map(|class| base[class].as_str()).collect();
        if !without.is_empty() {
            cx.note(format!(
                "no image of {} of {} base classes, which take no part: {}",
                without.len(),
                base.len(),
                named(&without, MAX_NAMED)
            ));
        }
    }
}

/// Chooses and reads the images of each batch.
struct CropLoader {
    shown: Shown,
    crops: CropIndex,
    web: Web,
    preprocess: Preprocess,
    batch_size: usize,
    letterbox: Letterbox,
    random: ChaCha8Rng,
}

/// Images `[B, 3, S, S]`, normalised, with their labels.
struct ImageBatch {
    pixels: Vec<f32>,
    labels: Vec<i64>,
}

impl CropLoader {
    /// The batches of an epoch: places of images in random order.
    fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut random = self.random.clone();
        random.set_stream(epoch);
        let mut order: Vec<usize> = (0..self.shown.labels.len()).collect();
        order.shuffle(&mut random);
        order.truncate((n_batches(order.len(), self.batch_size) * self.batch_size).min(order.len()));
        order.chunks(self.batch_size).map(<[usize]>::to_vec).collect()
    }

    fn decode(&self, source: Source) -> Result<Image> {
        match source {
            Source::Crop(place) => {
                let (jpeg, path) = self.crops.jpeg(place);
                Ok(Image::decode(jpeg, path)?)
            }
            Source::Web(place) => {
                let (images, info) = self.of_web(place);
                images.decode_letterboxed(&info.file_name, [info.width, info.height], self.letterbox)
            }
        }
    }

    /// The image of a label, and the folder that it is in.
    fn of_web(&self, place: usize) -> (&Images, &ImageInfo) {
        let (images, annotations) = self.web.as_ref().expect("BUG: a label of an image of the web");
        let image_id = annotations.annotations[place].image_id;
        (images, annotations.image(image_id).expect("BUG: annotations are of images in the file"))
    }

    fn name(&self, source: Source) -> String {
        match source {
            Source::Crop(place) => format!("crop of annotation {}", self.crops.ids[place].1),
            Source::Web(place) => self.of_web(place).1.file_name.clone(),
        }
    }
}

impl DataLoader for CropLoader {
    /// The step, and the places of its images.
    type Spec = (u32, Vec<usize>);
    type Batch = ImageBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Self::Spec, usize)> + Send {
        let n = n_batches(self.shown.labels.len(), self.batch_size);
        let (first_epoch, n_before) = (steps.start as usize / n, steps.start as usize % n);
        let batches = (first_epoch as u64..).flat_map(|epoch| self.epoch(epoch)).skip(n_before);
        let bytes = 4 * self.batch_size * self.preprocess.n_numbers();
        batches.zip(steps).map(move |(places, step)| ((step, places), bytes))
    }

    fn load(&self, (step, places): Self::Spec, cx: &Context<'_>) -> Result<Loaded<ImageBatch>> {
        let mut random = self.random.clone();
        random.set_stream(FIRST_STEP_STREAM + u64::from(step));
        let (side, n) = (self.preprocess.side_px, self.preprocess.n_numbers());
        let (mut batch, mut images, mut unreadable) = (ImageBatch { pixels: Vec::new(), labels: Vec::new() }, Vec::new(), Vec::new());
        for place in places {
            let (source, label) = self.shown.labels[place];
            let attempt = cx.attempt(|| self.decode(source));
            match attempt.result {
                Ok(image) => {
                    let rectangle = random_crop([image.width, image.height], &mut random);
                    let mut square = image.resize_of(rectangle, side, side);
                    if random.random_bool(0.5) {
                        square.mirror();
                    }
                    let start = batch.pixels.len();
                    batch.pixels.resize(start + n, 0.0);
                    self.preprocess.normalise(&square, &mut batch.pixels[start..]);
                    batch.labels.push(label);
                    images.push(self.name(source));
                }
                Err(error) => unreadable.push((self.name(source), error, attempt.attempts)),
            }
        }
        Ok(Loaded { batch: (!batch.labels.is_empty()).then_some(batch), images, unreadable })
    }

    fn n_images(&self) -> usize {
        self.shown.labels.len()
    }
}

/// Crops of validation images.
struct Validation {
    crops: CropIndex,
    /// The place of the class among base ++ novel of each crop, if it has one.
    places: Vec<Option<usize>>,
    n_base: usize,
}

impl Validation {
    /// Those that are given. Fails where none shows a class.
    fn read(classes: &ClassSplit, cx: &Context<'_>) -> Result<Option<Self>> {
        let Some((crops, annotations)) = cx.inputs.read_both(VAL_CROPS, VAL_ANNOTATIONS)? else { return Ok(None) };
        let (crops, annotations) = (crops.index()?, annotations.load()?);
        let annotated = Annotated::of(&annotations);
        crops.ids.iter().try_for_each(|ids| annotated.check(*ids, VAL_ANNOTATIONS.info().name))?;
        let of_categories = places_of_categories(&annotations, classes.all());
        let places: Vec<Option<usize>> = crops.ids.iter().map(|(.., category)| of_categories.get(category).copied()).collect();
        if places.iter().all(Option::is_none) && cx.most_items.is_none() {
            let problem = format!("none of {} crops shows a class", places.len());
            return Err(Error::Input { port: VAL_CROPS.info().name, problem, hint: "give classes and crops of the same data set".into() });
        }
        Ok(Some(Self { places, crops, n_base: classes.base.len() }))
    }

    /// The share of base and of novel crops whose nearest class, among all, is theirs.
    fn measures(&self, clip: &clip::Clip, classes: &Tensor, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let preprocess = preprocess_of(clip);
        let (side, n) = (i64::from(preprocess.side_px), preprocess.n_numbers());
        let mut counts: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
        let counted: Vec<(usize, usize)> = self.places.iter().enumerate().filter_map(|(crop, place)| Some((crop, (*place)?))).collect();
        for rows in counted.chunks(VAL_BATCH) {
            cx.proceed()?;
            let pixels = in_parallel(rows.len(), cx.threads, |row| {
                let (jpeg, path) = self.crops.jpeg(rows[row].0);
                let mut numbers = vec![0.0; n];
                preprocess.normalise(&preprocess.square(&Image::decode(jpeg, path)?), &mut numbers);
                Ok(numbers)
            })?;
            let pixels = Tensor::from_slice(&pixels.concat()).view([rows.len() as i64, 3, side, side]);
            let nearest = no_grad(|| Ok::<_, Error>(embed(clip, &pixels)?.matmul(&classes.tr()).argmax(1, false)))?;
            let nearest = Vec::<i64>::try_from(nearest.to_device(Device::Cpu)).map_err(ovenbird_models::Error::from)?;
            for ((_, class), nearest) in rows.iter().zip(nearest) {
                let [right, all] = counts.entry(if *class < self.n_base { "base_top1" } else { "novel_top1" }).or_default();
                (*right, *all) = (*right + u64::from(nearest as usize == *class), *all + 1);
            }
        }
        Ok(counts.into_iter().map(|(name, [right, all])| (name.to_owned(), right as f64 / all as f64)).collect())
    }
}

/// CLIP's embeddings of images `[B, 3, S, S]`, f32 `[B, D]` of unit length.
fn embed(clip: &clip::Clip, pixels: &Tensor) -> Result<Tensor> {
    let embeddings = clip.encode_image(&pixels.to_device(clip.device()).to_kind(clip.kind()), Phase::Test)?;
    Ok(to_unit_length(&embeddings.to_kind(Kind::Float)))
}

/// Two contexts in training.
struct RplCriterion<'a> {
    clip: &'a clip::Clip,
    space: Space,
    names: Vec<String>,
    texts: &'a [(String, String)],
    present: Prompted<'a>,
    all: Prompted<'a>,
    /// Before names, and between names and descriptions, f32 `[M, C]`.
    contexts: [Tensor; 2],
    scale: Tensor,
    validation: Option<Validation>,
}

impl<'a> RplCriterion<'a> {
    fn new(
        stage: &Rpl,
        (clip, space): (&'a clip::Clip, Space),
        classes: &ClassSplit,
        texts: &'a [(String, String)],
        present: &[usize],
        validation: Option<Validation>,
        random: &mut ChaCha8Rng,
    ) -> Result<Self> {
        let width = clip.causal_text()?.width();
        let of_present: Vec<(String, String)> = present.iter().map(|class| texts[*class].clone()).collect();
        random.set_stream(CONTEXT_STREAM);
        let contexts = [(); 2].map(|()| first_context(stage.context, width, random).to_device(clip.device()).set_requires_grad(true));
        Ok(Self {
            clip,
            space,
            names: classes.all().cloned().collect(),
            texts,
            present: prompted(clip, &of_present, stage.context)?,
            all: prompted(clip, texts, stage.context)?,
            contexts,
            scale: clip.logit_scale()?.detach(),
            validation,
        })
    }

    fn context(&self) -> Tensor {
        Tensor::cat(&self.contexts, 0)
    }

    /// The loss of images whose embeddings `[B, D]` have unit length.
    fn loss(&self, images: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let context = self.context();
        let embeddings = no_grad(|| self.present.encode(&context))?.to_kind(Kind::Float).set_requires_grad(true);
        let logits = images.matmul(&to_unit_length(&embeddings).tr()) * &self.scale;
        let loss = logits.cross_entropy_for_logits(labels);
        let of_embeddings = Tensor::run_backward(&[&loss], &[&embeddings], false, false).remove(0);
        let gradient = self.present.gradient(&context, &of_embeddings)?;
        // The loss, with that gradient: memory for all texts at once is not needed.
        let linear = (&context * gradient).sum(Kind::Float);
        Ok(&linear - linear.detach() + loss.detach())
    }
}

impl Criterion for RplCriterion<'_> {
    type Batch = ImageBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(RPL_CONTEXT.iter().zip(&self.contexts).map(|(name, tensor)| ((*name).to_owned(), Parameter::plain(tensor))).collect())
    }

    fn losses(&self, _step: u32, ImageBatch { pixels, labels }: ImageBatch) -> Result<Losses> {
        let side = self.clip.image_side();
        let pixels = Tensor::from_slice(&pixels).view([labels.len() as i64, 3, side, side]);
        let images = no_grad(|| embed(self.clip, &pixels))?;
        let loss = self.loss(&images, &Tensor::from_slice(&labels).to_device(self.clip.device()))?;
        Ok(Losses { terms: vec![("prompts", loss)], measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let (tensors, metadata) = described_prompts(&self.all, &self.contexts, &self.names, self.texts, self.space)?;
        Ok(Weights { tensors, metadata })
    }

    fn validate(&self, is_last: bool, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let Some(validation) = self.validation.as_ref().filter(|_| is_last) else { return Ok(BTreeMap::new()) };
        let classes = no_grad(|| self.all.encode(&self.context()))?;
        let measured = validation.measures(self.clip, &to_unit_length(&classes.to_kind(Kind::Float)), cx)?;
        let percent = |(name, part): (&String, &f64)| format!("{name} {:.1} %", 100.0 * part);
        cx.note(format!("on validation crops: {}", measured.iter().map(percent).collect::<Vec<_>>().join(", ")));
        Ok(measured)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;
    use crate::{
        golden::{error, numbers, promptdet},
        prompts::golden::small_clip,
        training::Optimizer,
    };

    #[test]
    fn the_defaults_are_rpl_s_and_pass_their_own_check() {
        let stage = Rpl::default();
        assert!(Stage::check(&stage).is_empty());
        let config = stage.config(32 * 7 + 5);
        assert_eq!((config.steps, config.images_per_step), (6 * 7, 32));
        let rates: Vec<f64> = (0..6).map(|epoch| config.optimizer.schedule.lr_at(7 * epoch)).collect();
        assert!(
            rates.iter().zip([1e-5, 2e-3, 1.866_025_4e-3, 1.5e-3, 1e-3, 5e-4]).all(|(found, lr)| (found - lr).abs() < 1e-9),
            "{rates:?}"
        );
        // One batch that is not full is better than none.
        assert_eq!(stage.config(5).steps, 6);
    }

    /// Twelve steps of RPL's own code on two batches, two an epoch.
    #[test]
    fn steps_are_those_of_rpl_s_code() {
        let golden = promptdet("rpl");
        let clip = small_clip(&golden);
        let lines = String::from_utf8(Vec::<u8>::try_from(&golden["prompt/classes_utf8"]).unwrap()).unwrap().replace('_', " ");
        let texts: Vec<(String, String)> =
            lines.lines().filter_map(|line| line.split_once(" which is ")).map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        let classes = ClassSplit { base: texts.iter().map(|(name, _)| name.clone()).collect(), novel: Vec::new() };
        let stage = Rpl { batch_size: 6, ..Rpl::default() };
        let present: Vec<usize> = (0..8).collect();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut criterion =
            RplCriterion::new(&stage, (&clip, Space::of(&BTreeMap::new(), &[])), &classes, &texts, &present, None, &mut random).unwrap();
        criterion.scale = Tensor::from(4.6052_f64.exp() as f32);
        no_grad(|| {
            for (context, name) in criterion.contexts.iter().zip(["train/ctx1_start", "train/ctx2_start"]) {
                context.shallow_clone().copy_(&golden[name]);
            }
        });
        let config = stage.config(12).optimizer;
        for (epoch, lr) in numbers(&golden["train/lr"]).into_iter().enumerate() {
            assert!((config.schedule.lr_at(2 * epoch as u32) - lr).abs() < 1e-9);
        }
        let mut optimizer = Optimizer::new(&config, criterion.parameters().unwrap());
        for step in 0..12 {
            let images = to_unit_length(&golden["train/image_features"].get(step % 2));
            let loss = criterion.loss(&images, &golden["train/labels"].get(step % 2)).unwrap();
            loss.backward();
            let expected = golden["train/loss"].double_value(&[step]);
            assert!((loss.double_value(&[]) - expected).abs() < 1e-3 * (1.0 + expected), "step {step}: {loss:?}, expected {expected}");
            optimizer.step(step as u32).unwrap();
            for (context, name) in criterion.contexts.iter().zip(["train/ctx1", "train/ctx2"]) {
                let apart = error(&context.detach(), &golden[name].get(step));
                assert!(apart < 1e-3, "{name}, step {step}: {apart}");
            }
        }
        // P6: nothing else has changed.
        let Weights { tensors, metadata } = criterion.weights().unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["ctx1", "ctx2", "embeddings"]);
        assert!(metadata["texts"].contains("a box that cools a room"));
    }
}
