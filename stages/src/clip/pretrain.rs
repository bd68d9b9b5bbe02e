//! `clip/pretrain`: a small CLIP, trained from nothing on captioned pictures.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::images::{Image, Preprocess};
use ovenbird_models::{
    Phase,
    clip::{self, Activation, Config, ImageConfig, TextConfig, tokenizer::Overlong},
    to_unit_length,
};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn, no_grad};

use super::{activation::GELU_KEY, encoder::preprocess_of};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{Captions, CheckpointFile, Images, TrainingState, read_weights},
    feed::in_parallel,
    optimizer::AdamW,
    prompts::texts::mean_embedding,
};

/// Adam's constants (Kingma and Ba 2015), with CLIP's second moment.
const OPTIMIZER: AdamW = AdamW { betas: [0.9, 0.98], epsilon: 1e-6 };
/// CLIP keeps the logit scale below 100.
const MAX_LOG_SCALE: f64 = 4.605_170_185_988_092;
/// As OpenAI trained.
const ACTIVATION: Activation = Activation::QuickGelu;
/// Steps between two measurements in the log.
const ROW_STEPS: usize = 10;
/// Pictures are kept this much larger than the network's input, for random crops.
const MARGIN: f32 = 1.18;

/// Which image tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// A vision transformer: 64 px, patches of 8 px, width 128, 3 blocks.
    Vit,
    /// A ModifiedResNet with attention pooling: 64 px, width 16, one bottleneck a level.
    #[default]
    Resnet,
}

/// Trains a small CLIP from nothing: symmetric contrastive loss over captioned pictures (Radford et al. 2021).
///
/// For worlds where no published CLIP knows the classes. AdamW, warm-up over the first tenth of the steps, cosine decay;
/// random crops, mirror images and brightness. The work is a chain of units: a killed training continues at the last
/// published one and ends with the same bytes.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Pretrain {
    /// Which image tower.
    pub architecture: Architecture,
    /// First values, order and crops follow from it.
    pub seed: u64,
    /// Steps of the optimizer.
    pub steps: u32,
    /// Pictures of a step.
    pub batch_size: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of matrices.
    pub weight_decay: f64,
    /// Steps between checkpoints.
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
const CAPTIONS: In<Captions> = In::required("captions", "Their alt text.");
const HELD_OUT_IMAGES: In<Images> = In::optional("held_out_images", "Clean pictures of one class each, to measure zero-shot accuracy.");
const HELD_OUT: In<Captions> = In::optional("held_out", "Their class names.");
const CHECKPOINT: Out<CheckpointFile> = Out::new("checkpoint", "Weights in OpenAI's layout, safetensors, f32.");
const STATE: Out<TrainingState> =
    Out::new("state", "What the next unit continues from besides the weights: both moments of the optimizer, steps done.");

impl Stage for Pretrain {
    const KIND: &'static str = "clip/pretrain";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), CAPTIONS.info(), HELD_OUT_IMAGES.info(), HELD_OUT.info()];
    const OUTPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), STATE.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("steps", self.steps > 0, "at least 1"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
            ("batch_size", self.batch_size > 1, "at least 2: a contrastive loss needs others"),
            ("lr", self.lr > 0.0 && self.lr < 1.0, "a number between 0 and 1"),
            ("weight_decay", (0.0..1.0).contains(&self.weight_decay), "a number from 0 to below 1"),
        ])
    }

    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(Units::Chain { links: self.steps.div_ceil(self.checkpoint_every), steps: self.steps, stay: Vec::new() })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Some(first) = units.first() else { return Ok(()) };
        let Captions(captions) = cx.inputs.read(CAPTIONS)?;
        let images = cx.inputs.read(IMAGES)?;
        let texts: Vec<&str> = captions.iter().map(|caption| caption.text.as_str()).collect();
        let mut training = Training::begin(self, &texts, cx.device)?;
        let preprocess = preprocess_of(&training.clip);
        let large = Preprocess { side_px: (preprocess.side_px as f32 * MARGIN).round() as u32, ..preprocess };
        let decode = |index: usize| Ok(large.square(&images.decode(&captions[index].file)?));
        let pictures = in_parallel(captions.len(), cx.threads, decode)?;
        if pictures.len() < self.batch_size {
            let problem = format!("{} captioned pictures for batches of {}", pictures.len(), self.batch_size);
            return Err(Error::Input { port: "captions", problem, hint: "lower `batch_size`, or give more pictures".into() });
        }
        if first.index > 0 {
            let before = first.index - 1;
            training.restore(&cx.published(before, CHECKPOINT)?, &cx.published(before, STATE)?)?;
        }
        let steps_of = |unit: &Unit| self.steps_of(unit).min(cx.most_items.map_or(u32::MAX, |most| most as u32));
        cx.total(units.iter().map(|unit| u64::from(steps_of(unit))).sum());
        for unit in units {
            let mut random = cx.rng(unit);
            let draft = cx.begin(unit)?;
            let (mut loss_sum, mut of_row) = (0.0, Vec::new());
            // Every picture is seen once before any is seen twice, within a unit.
            let mut order: Vec<usize> = Vec::new();
            for _ in 0..steps_of(unit) {
                if order.len() < self.batch_size {
                    order = (0..pictures.len()).collect();
                    order.shuffle(&mut random);
                }
                let chosen = order.split_off(order.len() - self.batch_size);
                let pixels = augmented(&pictures, &chosen, &preprocess, &mut random);
                let texts: Vec<&str> = chosen.iter().map(|index| texts[*index]).collect();
                let loss = training.step(self, &pixels, &texts)?;
                if !loss.is_finite() {
                    let problem = format!("the loss is {loss} at step {}", training.steps_done);
                    return Err(Error::Input { port: "lr", problem, hint: "lower `lr`; the last checkpoint is kept".into() });
                }
                loss_sum += loss;
                of_row.push(loss);
                if of_row.len() == ROW_STEPS {
                    let mean = of_row.drain(..).sum::<f64>() / ROW_STEPS as f64;
                    let rate = self.lr_at(training.steps_done - 1);
                    cx.measured(training.steps_done as u64, &[("loss.contrastive".into(), mean), ("lr".into(), rate)].into());
                }
                cx.tick(1);
                cx.proceed()?;
            }
            let mut metrics = BTreeMap::from([("loss".to_owned(), (loss_sum / f64::from(steps_of(unit))).into())]);
            if unit.index + 1 == cx.units.len()
                && let Some(accuracy) = training.zero_shot(cx, &preprocess)?
            {
                cx.note(format!("zero-shot accuracy on held-out pictures: {:.1} %", 100.0 * accuracy));
                metrics.insert("zero_shot_accuracy".into(), accuracy.into());
            }
            training.save(&draft)?;
            cx.commit(draft, metrics)?;
        }
        Ok(())
    }
}

impl Pretrain {
    fn steps_of(&self, unit: &Unit) -> u32 {
        let before = unit.index as u32 * self.checkpoint_every;
        self.checkpoint_every.min(self.steps - before)
    }

    /// Linear warm-up over the first tenth, then half a cosine to zero.
    fn lr_at(&self, step: i64) -> f64 {
        let (step, steps) = (step as f64, f64::from(self.steps));
        let warm_up = (steps / 10.0).max(1.0);
        if step < warm_up {
            return self.lr * (step + 1.0) / warm_up;
        }
        let part = (step - warm_up) / (steps - warm_up).max(1.0);
        self.lr * 0.5 * (1.0 + (std::f64::consts::PI * part).cos())
    }

    fn config(&self) -> Config {
        let image = match self.architecture {
            Architecture::Vit => ImageConfig::Vit { image_side: 64, patch: 8, width: 128, depth: 3, heads: 2, mlp_width: 512 },
            Architecture::Resnet => ImageConfig::ResNet { image_side: 64, layers: [1, 1, 1, 1], width: 16, heads: 8 },
        };
        let text = TextConfig { context: 77, vocabulary: 49_408, width: 128, heads: 2, depth: 2 };
        Config { embed_dim: 128, image, text, activation: ACTIVATION }
    }
}

/// Random crops, mirror images and brightness of the chosen pictures, normalised: `[B, 3, S, S]`.
fn augmented(pictures: &[Image], chosen: &[usize], preprocess: &Preprocess, random: &mut ChaCha8Rng) -> Vec<f32> {
    let (side, n_numbers) = (i64::from(preprocess.side_px), preprocess.n_numbers());
    let mut pixels = vec![0.0; chosen.len() * n_numbers];
    for (index, numbers) in chosen.iter().zip(pixels.chunks_exact_mut(n_numbers)) {
        let picture = &pictures[*index];
        let slack = i64::from(picture.width) - side;
        let (x, y) = (random.random_range(0..=slack), random.random_range(0..=slack));
        let mut crop = picture.crop([x, y, x + side, y + side]);
        if random.random_bool(0.5) {
            for row in crop.rgb.chunks_exact_mut(3 * side as usize) {
                let mirrored: Vec<u8> = row.chunks_exact(3).rev().flatten().copied().collect();
                row.copy_from_slice(&mirrored);
            }
        }
        let gain: f32 = random.random_range(0.85..1.15);
        crop.rgb.iter_mut().for_each(|level| *level = (f32::from(*level) * gain).round().min(255.0) as u8);
        preprocess.normalise(&crop, numbers);
    }
    pixels
}

/// A network being trained, with its optimizer.
struct Training {
    store: nn::VarStore,
    clip: clip::Clip,
    /// First and second moment of each trained tensor.
    moments: BTreeMap<String, [Tensor; 2]>,
    /// i64 `[U]`: the tokens that occur in the captions. Rows of other tokens never have a gradient, so the optimizer leaves
    /// them out: 49,408 rows would cost more than the rest of a step.
    used_tokens: Tensor,
    steps_done: i64,
}

/// The one tensor of which only some rows are trained.
const TOKEN_EMBEDDING: &str = "token_embedding.weight";

impl Training {
    fn begin(stage: &Pretrain, texts: &[&str], device: Device) -> Result<Self> {
        let store = nn::VarStore::new(device);
        let clip = clip::Clip::new(&store.root(), &stage.config(), stage.seed)?;
        let used: BTreeSet<i64> = texts.iter().flat_map(|text| clip.tokenizer().encode(text)).map(i64::from).collect();
        let used_tokens = Tensor::from_slice(&used.into_iter().collect::<Vec<_>>()).to_device(device);
        let mut moments = BTreeMap::new();
        for (name, tensor) in named(&store).into_iter().filter(|(_, tensor)| tensor.requires_grad()) {
            let rows = if name == TOKEN_EMBEDDING { no_grad(|| tensor.index_select(0, &used_tokens)) } else { tensor };
            moments.insert(name, [rows.zeros_like().detach(), rows.zeros_like().detach()]);
        }
        Ok(Self { store, clip, moments, used_tokens, steps_done: 0 })
    }

    fn step(&mut self, stage: &Pretrain, pixels: &[f32], texts: &[&str]) -> Result<f64> {
        let side = self.clip.image_side();
        let device = self.store.device();
        let images = Tensor::from_slice(pixels).view([texts.len() as i64, 3, side, side]).to_device(device);
        let tokens = self.clip.tokenizer().batch(texts, Overlong::Truncate)?.to_device(device);
        let images = to_unit_length(&self.clip.encode_image(&images, Phase::Train)?);
        let texts = to_unit_length(&self.clip.encode_text(&tokens)?);
        // [B, B]: image i against text j.
        let logits = self.clip.logit_scale()? * images.matmul(&texts.tr());
        let same = Tensor::arange(logits.size()[0], (Kind::Int64, device));
        let loss = (logits.cross_entropy_for_logits(&same) + logits.tr().cross_entropy_for_logits(&same)) / 2.0;
        for (_, mut tensor) in named(&self.store) {
            tensor.zero_grad();
        }
        loss.backward();
        self.update(stage);
        Ok(loss.double_value(&[]))
    }

    /// Gains, biases and the logit scale do not decay.
    fn update(&mut self, stage: &Pretrain) {
        let rate = stage.lr_at(self.steps_done);
        self.steps_done += 1;
        no_grad(|| {
            for (name, mut tensor) in named(&self.store) {
                let Some(moments) = self.moments.get_mut(&name) else { continue };
                let gradient = tensor.grad();
                if !gradient.defined() {
                    continue;
                }
                let is_embedding = name == TOKEN_EMBEDDING;
                let rows = |whole: &Tensor| if is_embedding { whole.index_select(0, &self.used_tokens) } else { whole.shallow_clone() };
                let (mut weights, gradient) = (rows(&tensor), rows(&gradient));
                let decay = if weights.dim() > 1 { stage.weight_decay } else { 0.0 };
                OPTIMIZER.step(self.steps_done as i32, rate, decay, &mut weights, &gradient, moments);
                if is_embedding {
                    let _in_place = tensor.index_copy_(0, &self.used_tokens, &weights);
                }
            }
            if let Some(scale) = &self.clip.log_logit_scale {
                let _in_place = scale.shallow_clone().clamp_(0.0, MAX_LOG_SCALE);
            }
        });
    }

    /// The part of held-out pictures whose class has the nearest text; `None` if there are none.
    fn zero_shot(&self, cx: &Context<'_>, preprocess: &Preprocess) -> Result<Option<f64>> {
        let (Some(images), Some(Captions(held_out))) = (cx.inputs.read_if_given(HELD_OUT_IMAGES)?, cx.inputs.read_if_given(HELD_OUT)?)
        else {
            return Ok(None);
        };
        let mut names: Vec<&String> = held_out.iter().map(|picture| &picture.text).collect();
        names.sort();
        names.dedup();
        let row = |name: &&String| mean_embedding(&self.clip, &[format!("a photo of a {name}"), format!("This is a {name}")]);
        let classes = to_unit_length(&Tensor::stack(&names.iter().map(row).collect::<Result<Vec<_>>>()?, 0));
        let mut n_right = 0;
        for pictures in held_out.chunks(128) {
            let mut pixels = vec![0.0; pictures.len() * preprocess.n_numbers()];
            for (picture, numbers) in pictures.iter().zip(pixels.chunks_exact_mut(preprocess.n_numbers())) {
                preprocess.normalise(&preprocess.square(&images.decode(&picture.file)?), numbers);
            }
            let side = i64::from(preprocess.side_px);
            let shape = [pictures.len() as i64, 3, side, side];
            let nearest = no_grad(|| -> Result<Tensor> {
                let images = Tensor::from_slice(&pixels).view(shape).to_device(self.store.device());
                Ok(self.clip.encode_image_features(&images, Phase::Test)?.matmul(&classes.tr()).argmax(-1, false))
            })?;
            for (picture, place) in pictures.iter().zip(Vec::<i64>::try_from(&nearest).map_err(ovenbird_models::Error::from)?) {
                n_right += usize::from(*names[place as usize] == picture.text);
            }
        }
        Ok(Some(n_right as f64 / held_out.len().max(1) as f64))
    }

    /// Publishes the weights as OpenAI names them, and what the next unit needs.
    fn save(&self, draft: &UnitDraft) -> Result<()> {
        let scalar = |value: i64| Tensor::from(value);
        let mut weights: BTreeMap<String, Tensor> = named(&self.store).into_iter().collect();
        let mut state: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, [first, second]) in &self.moments {
            state.insert(format!("first.{name}"), first.shallow_clone());
            state.insert(format!("second.{name}"), second.shallow_clone());
        }
        state.insert("steps_done".into(), scalar(self.steps_done));
        // By these three a reader knows OpenAI's layout.
        weights.insert("input_resolution".into(), scalar(64));
        weights.insert("context_length".into(), scalar(77));
        weights.insert("vocab_size".into(), scalar(49_408));
        let gelu = ACTIVATION.name();
        draft.write_tensors(CHECKPOINT, "clip.safetensors", &weights, &BTreeMap::from([(GELU_KEY.to_owned(), gelu.to_owned())]))?;
        draft.write_tensors(STATE, "state.safetensors", &state, &BTreeMap::new())
    }

    fn restore(&mut self, weights: &CheckpointFile, state: &TrainingState) -> Result<()> {
        let (weights, state) = (read_weights(&weights.file)?, read_weights(&state.file)?);
        no_grad(|| -> Result<()> {
            for (name, mut tensor) in named(&self.store) {
                tensor.copy_(&weights.tensor(&name)?);
            }
            for (name, [first, second]) in &mut self.moments {
                first.copy_(&state.tensor(&format!("first.{name}"))?);
                second.copy_(&state.tensor(&format!("second.{name}"))?);
            }
            Ok(())
        })?;
        self.steps_done = state.tensor("steps_done")?.int64_value(&[]);
        Ok(())
    }
}

/// Every tensor of a network, sorted by name.
fn named(store: &nn::VarStore) -> Vec<(String, Tensor)> {
    let mut tensors: Vec<(String, Tensor)> = store.variables().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}
