//! `clip/pretrain`: a small CLIP, trained from scratch on captioned pictures.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::images::{Image, Preprocess};
use ovenbird_models::{
    Phase,
    clip::{self, tokenizer::Overlong},
    to_unit_length,
};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn, no_grad};

use super::{
    activation::GELU_KEY,
    encoder::preprocess_of,
    small::{ACTIVATION, Architecture, HELD_OUT, HELD_OUT_IMAGES, SIDE, ZERO_SHOT_ACCURACY, zero_shot_accuracy},
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Caption, Captions, CheckpointFile, Images},
    feed::in_parallel,
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, train,
    },
};

/// Constants of Adam (Kingma and Ba 2015) with CLIP's decay of the second moment.
const ALGORITHM: Algorithm = Algorithm::AdamW { betas: [0.9, 0.98], epsilon: 1e-6 };
/// CLIP keeps the logit scale below 100.
const MAX_LOG_SCALE: f64 = 4.605_170_185_988_092;
/// Pictures are kept this much larger than the network's input, for random crops.
const MARGIN: f32 = 1.18;

/// Trains a small CLIP from scratch on captioned pictures, with the symmetric contrastive loss (Radford et al. 2021).
///
/// For data whose classes no published CLIP knows. AdamW, warm-up over the first tenth of the steps, cosine decay; pictures are randomly
/// cropped, mirrored and brightened. Words that no caption has are embedded as zero. A killed training continues at the last checkpoint and ends with the same bytes.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Pretrain {
    /// Kind of image tower.
    pub architecture: Architecture,
    /// Seed of the initial weights. The order of pictures and their crops follow from all parameters.
    pub seed: u64,
    /// Optimizer steps.
    pub steps: u32,
    /// Pictures per batch.
    pub batch_size: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Weight decay of matrices; vectors and the logit scale do not decay.
    pub weight_decay: f64,
    /// Steps between checkpoints: a training that is killed loses at most these.
    pub checkpoint_every: u32,
}

impl Default for Pretrain {
    fn default() -> Self {
        Self {
            architecture: Architecture::Resnet,
            seed: 7,
            steps: 600,
            batch_size: 64,
            lr: 2e-3,
            weight_decay: 0.05,
            checkpoint_every: 100,
        }
    }
}

const IMAGES: In<Images> = In::required("images", "The captioned pictures.");
const CAPTIONS: In<Captions> = In::required("captions", "The caption of each picture.");
const PORTS: Ports<CheckpointFile> =
    Ports::new(Out::new("checkpoint", "Weights in OpenAI's layout, safetensors, f32."), "clip.safetensors");

impl Stage for Pretrain {
    const KIND: &'static str = "clip/pretrain";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), CAPTIONS.info(), HELD_OUT_IMAGES.info(), HELD_OUT.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("steps", self.steps > 0, "at least 1"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
            ("batch_size", self.batch_size > 1, "at least 2: a contrastive loss compares pictures"),
            ("lr", self.lr > 0.0 && self.lr < 1.0, "a number between 0 and 1"),
            ("weight_decay", (0.0..1.0).contains(&self.weight_decay), "a number from 0 to below 1"),
        ])
    }

    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(self.config().units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Captions(captions) = cx.inputs.read(CAPTIONS)?;
        let criterion = ClipCriterion::new(self, &captions, cx.device)?;
        let loader = CaptionLoader::new(self, &captions, preprocess_of(&criterion.clip), cx)?;
        train(&self.config(), &loader, &criterion, &PORTS, units, cx)
    }
}

impl Pretrain {
    fn config(&self) -> TrainingConfig {
        let warmup = Warmup::FromFirstPart { steps: (f64::from(self.steps) / 10.0).max(1.0) };
        let optimizer = OptimizerConfig {
            algorithm: ALGORITHM,
            schedule: Schedule { peak: self.lr, warmup, decay: Decay::Cosine { steps: self.steps } },
            weight_decay: self.weight_decay,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        let Self { steps, checkpoint_every, .. } = *self;
        let images_per_step = u32::try_from(self.batch_size).unwrap_or(u32::MAX);
        TrainingConfig { first_step: 0, steps, checkpoint_every, images_per_step, keep_checkpoints: 1, optimizer, max_loss: f64::INFINITY }
    }
}

/// Captioned pictures, decoded and a little larger than the network's input.
struct CaptionLoader<'a> {
    captions: &'a [Caption],
    pictures: Vec<Image>,
    preprocess: Preprocess,
    batch_size: usize,
    checkpoint_every: u32,
    /// The random numbers of each checkpoint.
    random: Vec<ChaCha8Rng>,
}

/// A picture of a batch, by its place, and how it is changed.
struct Augmentation {
    place: usize,
    /// Left upper corner of the crop, px.
    corner: [i64; 2],
    is_mirrored: bool,
    brightness: f32,
}

/// Pictures `[B, 3, S, S]`, normalised, with their captions.
struct Batch {
    pixels: Vec<f32>,
    texts: Vec<String>,
}

impl<'a> CaptionLoader<'a> {
    fn new(stage: &Pretrain, captions: &'a [Caption], preprocess: Preprocess, cx: &Context<'_>) -> Result<Self> {
        let images = cx.inputs.read(IMAGES)?;
        let large = Preprocess { side_px: (preprocess.side_px as f32 * MARGIN).round() as u32, ..preprocess };
        let pictures = in_parallel(captions.len(), cx.threads, |place| Ok(large.square(&images.decode(&captions[place].file)?)))?;
        if pictures.len() < stage.batch_size {
            let problem = format!("{} captioned pictures for batches of {}", pictures.len(), stage.batch_size);
            return Err(Error::Input { port: "captions", problem, hint: "lower `batch_size`, or give more pictures".into() });
        }
        let random = cx.units.iter().map(|unit| cx.rng(unit)).collect();
        let Pretrain { batch_size, checkpoint_every, .. } = *stage;
        Ok(Self { captions, pictures, preprocess, batch_size, checkpoint_every, random })
    }

    fn augmentation(&self, place: usize, random: &mut ChaCha8Rng) -> Augmentation {
        let slack = i64::from(self.pictures[place].width) - i64::from(SIDE);
        let corner = [random.random_range(0..=slack), random.random_range(0..=slack)];
        let (is_mirrored, brightness) = (random.random_bool(0.5), random.random_range(0.85..1.15));
        Augmentation { place, corner, is_mirrored, brightness }
    }
}

impl DataLoader for CaptionLoader<'_> {
    type Spec = Vec<Augmentation>;
    type Batch = Batch;

    /// Within a checkpoint every picture is seen once before any is seen twice.
    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Vec<Augmentation>, usize)> + Send {
        let (mut order, mut random) = (Vec::new(), self.random[0].clone());
        let bytes = 4 * self.batch_size * self.preprocess.n_numbers();
        steps.map(move |step| {
            if step % self.checkpoint_every == 0 {
                random = self.random[(step / self.checkpoint_every) as usize].clone();
                order.clear();
            }
            if order.len() < self.batch_size {
                order = (0..self.pictures.len()).collect();
                order.shuffle(&mut random);
            }
            let chosen = order.split_off(order.len() - self.batch_size);
            (chosen.into_iter().map(|place| self.augmentation(place, &mut random)).collect(), bytes)
        })
    }

    fn load(&self, spec: Vec<Augmentation>, _cx: &Context<'_>) -> Result<Loaded<Batch>> {
        let n_numbers = self.preprocess.n_numbers();
        let mut pixels = vec![0.0; spec.len() * n_numbers];
        for (augmentation, numbers) in spec.iter().zip(pixels.chunks_exact_mut(n_numbers)) {
            self.preprocess.normalise(&augmented(&self.pictures[augmentation.place], augmentation), numbers);
        }
        let captions: Vec<&Caption> = spec.iter().map(|augmentation| &self.captions[augmentation.place]).collect();
        let texts = captions.iter().map(|caption| caption.text.clone()).collect();
        let images = captions.iter().map(|caption| caption.file.clone()).collect();
        Ok(Loaded { batch: Some(Batch { pixels, texts }), images, unreadable: Vec::new() })
    }

    fn n_images(&self) -> usize {
        self.pictures.len()
    }
}

/// A crop of a picture, mirrored and brightened.
fn augmented(picture: &Image, Augmentation { corner: [x, y], is_mirrored, brightness, .. }: &Augmentation) -> Image {
    let side = i64::from(SIDE);
    let mut crop = picture.crop([*x, *y, x + side, y + side]);
    if *is_mirrored {
        crop.mirror();
    }
    crop.rgb.iter_mut().for_each(|level| *level = (f32::from(*level) * brightness).round().min(255.0) as u8);
    crop
}

/// A CLIP in training.
struct ClipCriterion {
    store: nn::VarStore,
    clip: clip::Clip,
    /// i64 `[U]`: the tokens that occur in the captions. Rows of other tokens never have a gradient: they are zero, so that unknown words
    /// add nothing, and the optimizer leaves them out, since 49,408 rows would cost more than the rest of a step.
    used_tokens: Tensor,
}

/// The one tensor of which only some rows are trained.
const TOKEN_EMBEDDING: &str = "token_embedding.weight";
/// The tensor that CLIP bounds.
const LOGIT_SCALE: &str = "logit_scale";

impl ClipCriterion {
    fn new(stage: &Pretrain, captions: &[Caption], device: Device) -> Result<Self> {
        let store = nn::VarStore::new(device);
        let clip = clip::Clip::new(&store.root(), &stage.architecture.config(), stage.seed)?;
        let used: BTreeSet<i64> = captions.iter().flat_map(|caption| clip.tokenizer().encode(&caption.text)).map(i64::from).collect();
        let used_tokens = Tensor::from_slice(&used.into_iter().collect::<Vec<_>>()).to_device(device);
        no_grad(|| {
            let mut embedding = store.variables().remove(TOKEN_EMBEDDING).expect("BUG: CLIP's text tower embeds tokens");
            let used_rows = embedding.index_select(0, &used_tokens);
            let _in_place = embedding.zero_().index_copy_(0, &used_tokens, &used_rows);
        });
        Ok(Self { store, clip, used_tokens })
    }
}

impl Criterion for ClipCriterion {
    type Batch = Batch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        let parameter = |(name, tensor): (String, Tensor)| {
            let rows = (name == TOKEN_EMBEDDING).then(|| self.used_tokens.shallow_clone());
            let bounds = (name == LOGIT_SCALE).then_some([0.0, MAX_LOG_SCALE]);
            let decay_mult = if tensor.dim() > 1 { 1.0 } else { 0.0 };
            (name, Parameter { decay_mult, rows, bounds, ..Parameter::plain(&tensor) })
        };
        Ok(self.store.variables().into_iter().map(parameter).collect())
    }

    fn losses(&self, _step: u32, Batch { pixels, texts }: Batch) -> Result<Losses> {
        let (device, side) = (self.store.device(), i64::from(SIDE));
        let images = Tensor::from_slice(&pixels).view([texts.len() as i64, 3, side, side]).to_device(device);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let tokens = self.clip.tokenizer().batch(&texts, Overlong::Truncate)?.to_device(device);
        let images = to_unit_length(&self.clip.encode_image(&images, Phase::Train)?);
        let texts = to_unit_length(&self.clip.encode_text(&tokens)?);
        // [B, B]: image i against text j.
        let logits = self.clip.logit_scale()? * images.matmul(&texts.tr());
        let same = Tensor::arange(logits.size()[0], (Kind::Int64, device));
        let loss = (logits.cross_entropy_for_logits(&same) + logits.tr().cross_entropy_for_logits(&same)) / 2.0;
        Ok(Losses { terms: vec![("contrastive", loss)], measures: Vec::new() })
    }

    /// The weights as OpenAI names them.
    fn weights(&self) -> Result<Weights> {
        let mut tensors: BTreeMap<String, Tensor> = self.store.variables().into_iter().collect();
        // By these three a reader knows OpenAI's layout.
        for (name, number) in [("input_resolution", i64::from(SIDE)), ("context_length", 77), ("vocab_size", 49_408)] {
            tensors.insert(name.into(), Tensor::from(number));
        }
        Ok(Weights { tensors, metadata: BTreeMap::from([(GELU_KEY.to_owned(), ACTIVATION.name().to_owned())]) })
    }

    fn validate(&self, is_last: bool, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let accuracy = if is_last { zero_shot_accuracy(&self.clip, cx)? } else { None };
        Ok(accuracy.into_iter().map(|accuracy| (ZERO_SHOT_ACCURACY.to_owned(), accuracy)).collect())
    }
}
