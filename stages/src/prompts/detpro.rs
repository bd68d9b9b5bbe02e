//! `prompts/detpro`: a learned context before the class names, from proposals of one range of IoU.
//!
//! Choices where DetPro's description is silent, or where its code differs: everything is f32 and seeded; the embeddings of the output
//! have the name where it was trained; a learned background prompt is its vectors and the end of text, whatever the context's length
//! and the third class. (DetPro, sections 3.2 to 3.5 and 11.)

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    clip::{
        self,
        prompted::{NamePlace, Prompted},
    },
    detpro::{
        BACKGROUND_CONTEXT, Background, FewNegatives, MIN_IOU, RowRule, RowUse, TEMPERATURE, class_name, class_weights, first_context,
        logits, loss,
    },
    to_unit_length,
};
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, no_grad};

use super::naming::{Said, name_rows, places};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{CheckpointFile, Classes, PROMPTS_FILE, PromptEmbeddings, PromptRows, PromptSamples, Prompts},
    clip::{Clip, Space, space},
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, named, train,
    },
};

/// The most context vectors: half of what CLIP's text tower holds.
const MAX_CONTEXT: usize = 38;
/// Streams of random numbers besides those of epochs, which count from 0.
const NEGATIVES_STREAM: u64 = u64::MAX;
const CONTEXT_STREAM: u64 = u64::MAX - 1;
/// The classes that a note names at most.
const MAX_NAMED: usize = 8;
/// The names of the learned parameters.
const CONTEXT: &str = "context";
const BACKGROUND_PROMPT: &str = "background_prompt";

/// Trains class embeddings with a learned context on proposals of one range of IoU: DetPro's prompts.
///
/// Context vectors that all classes share are learned with the class name among them, while CLIP is frozen. Rows of base classes are positives
/// where their IoU is in the range; proposals that match no object are negatives, of which one in ten is drawn. The logit of a row and a class
/// is their cosine divided by 0.01. Train one step for each range and join the results by `prompts/mean`: DetPro has the ranges [0.5, 0.6],
/// [0.6, 0.7], [0.7, 0.8], [0.8, 0.9] and [0.9, 1.1], of which the last has the annotated objects themselves. The output has the embeddings of
/// all classes, of unit norm, and the context. A killed training continues at the last checkpoint and ends with the same bytes.
///
/// Every step runs CLIP's text tower forwards and backwards on all base classes: with ViT-B/32, 500 GFLOP for the 866 of LVIS. Rows are read
/// from the shards as they are needed; classes and IoUs of all rows are in memory, 12 bytes a row. (DetPro, section 3.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Detpro {
    /// How CLIP is run.
    pub clip: Clip,
    /// Rows of base classes are used from the first IoU to below the second.
    pub iou: [f64; 2],
    /// Rows without a class are negatives from an IoU of 0.1 to below this.
    pub negative_iou: f64,
    /// One of so many negatives is used, drawn once for the whole training.
    pub negatives: usize,
    /// How many are used at least.
    pub few_negatives: FewNegatives,
    /// The treatment of background.
    pub background: Background,
    /// The number of context vectors.
    pub context: usize,
    /// Where the class name stands among them.
    pub place: NamePlace,
    /// Seed of the first context, of the negatives and of the order of rows.
    pub seed: u64,
    /// Passes over all rows.
    pub epochs: u32,
    /// Rows per batch.
    pub batch_size: usize,
    /// Learning rate of SGD in the first epoch; it falls along half a cosine, epoch by epoch.
    pub lr: f64,
    /// Steps between checkpoints: a training that is killed loses at most these.
    pub checkpoint_every: u32,
}

impl Default for Detpro {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            iou: [0.5, 0.6],
            negative_iou: 0.5,
            negatives: 10,
            few_negatives: FewNegatives::default(),
            background: Background::default(),
            context: 8,
            place: NamePlace::default(),
            seed: 0,
            epochs: 6,
            batch_size: 512,
            lr: 2e-3,
            checkpoint_every: 1000,
        }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const SAMPLES: In<PromptSamples> =
    In::required("samples", "Rows of proposals and objects (`prompts/detpro-data`); those of novel classes are not used.");
const VAL_SAMPLES: In<PromptSamples> =
    In::optional("val_samples", "Rows of validation images with the objects of all classes, to measure accuracy.");
const PORTS: Ports<Prompts> = Ports::new(
    Out::new(
        "prompts",
        "safetensors: `embeddings` f32 [K, D], unit norm; `context` f32 [M, C], and `background_prompt` if it was learned; metadata `names`, \
         base ++ novel.",
    ),
    PROMPTS_FILE,
);

impl Stage for Detpro {
    const KIND: &'static str = "prompts/detpro";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info(), SAMPLES.info(), VAL_SAMPLES.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        let RowRule { iou: [least, limit], negative_iou, .. } = self.rule();
        Problem::unless(&[
            ("iou", MIN_IOU <= least && least < limit && limit.is_finite(), "two IoUs from 0.1 on, the smaller first"),
            ("negative_iou", negative_iou > MIN_IOU && negative_iou <= 1.0, "a number above 0.1, at most 1"),
            ("negatives", self.negatives > 0, "at least 1"),
            ("context", (1..=MAX_CONTEXT).contains(&self.context), "from 1 to 38"),
            ("epochs", (1..=1000).contains(&self.epochs), "from 1 to 1000"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("lr", self.lr > 0.0 && self.lr.is_finite(), "a number above 0"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let (Classes(classes), rows) = (inputs.read(CLASSES)?, inputs.read(SAMPLES)?.rows()?);
        let Choice { positives, negatives } = Choice::of(&rows, &self.rule(), self.background, &classes);
        Ok(self.config(positives.len() + self.rule().n_drawn(negatives.len())).units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        for port in [SAMPLES, VAL_SAMPLES] {
            let of_samples = cx.inputs.read_if_given(port)?.map(|samples| samples.clip()).transpose()?.flatten();
            space::common(&[(CHECKPOINT.info().name, Some(space)), (port.info().name, of_samples)])?;
        }
        let (rows, embeddings) = samples(&cx.inputs.read(SAMPLES)?, SAMPLES.info().name, &clip)?;
        let validation = match cx.inputs.read_if_given(VAL_SAMPLES)? {
            Some(of_validation) => Some(Validation::of(samples(&of_validation, VAL_SAMPLES.info().name, &clip)?, &classes)),
            None => None,
        };
        let random = cx.rng(&cx.units[0]);
        let training = self.training_rows(&rows, &classes, &random, cx)?;
        let weights = class_weights(&training.counts)?.to_device(cx.device);
        let config = self.config(training.rows.len());
        let loader = RowLoader { training, rows: &rows, embeddings: &embeddings, batch_size: self.batch_size, random: random.clone() };
        let criterion = PromptCriterion::new(self, &clip, space, &classes, weights, validation, random)?;
        train(&config, &loader, &criterion, &PORTS, units, cx)
    }
}

impl Detpro {
    fn rule(&self) -> RowRule {
        RowRule {
            iou: self.iou.map(|iou| iou as f32),
            negative_iou: self.negative_iou as f32,
            one_negative_of: self.negatives,
            few_negatives: self.few_negatives,
        }
    }

    /// How a training on so many rows goes.
    fn config(&self, n_rows: usize) -> TrainingConfig {
        let steps_per_epoch = u32::try_from(n_rows.div_ceil(self.batch_size)).unwrap_or(u32::MAX).max(1);
        let optimizer = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: 0.0 },
            schedule: Schedule {
                peak: self.lr,
                warmup: Warmup::NONE,
                decay: Decay::CosineOfEpochs { epochs: self.epochs, steps_per_epoch },
            },
            weight_decay: 0.0,
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

    /// The rows of the training. Fails where no base class has one; in a dry run, whose images are few, rows of any IoU are used instead.
    fn training_rows(&self, rows: &PromptRows, classes: &ClassSplit, random: &ChaCha8Rng, cx: &Context<'_>) -> Result<TrainingRows> {
        let mut rule = self.rule();
        let mut choice = Choice::of(rows, &rule, self.background, classes);
        if choice.positives.is_empty() && cx.most_items.is_some() {
            cx.note("a dry run: no row of a base class is in the range `iou`, so rows of any IoU are used");
            rule.iou = [MIN_IOU, f32::INFINITY];
            choice = Choice::of(rows, &rule, self.background, classes);
        }
        let Choice { positives, negatives } = choice;
        if positives.is_empty() {
            let [least, limit] = self.iou;
            let problem = format!(
                "expected rows of base classes with an IoU from {least} to below {limit}, found none among {} rows",
                rows.classes.len()
            );
            let hint =
                "widen `iou`, or give samples of more images; if their classes have other names, give the `classes` they were made with";
            return Err(Error::Input { port: SAMPLES.info().name, problem, hint: hint.into() });
        }
        let n_negatives = negatives.len();
        let mut random = random.clone();
        random.set_stream(NEGATIVES_STREAM);
        let negatives = rule.draw(negatives, &mut random);
        let n_base = classes.base.len();
        let mut counts = vec![0; n_base + 1];
        for (_, class) in &positives {
            counts[*class as usize] += 1;
        }
        counts[n_base] = negatives.len() as u64;
        let words = format!("{} rows of base classes, {} of {n_negatives} negatives", positives.len(), negatives.len());
        cx.note(words);
        let without: Vec<&str> = classes.base.iter().zip(&counts).filter(|(_, n)| **n == 0).map(|(name, _)| name.as_str()).collect();
        if !without.is_empty() {
            cx.note(format!(
                "no row of {} of {n_base} base classes, which learn only what they are not: {}",
                without.len(),
                named(&without, MAX_NAMED)
            ));
        }
        if negatives.is_empty() && self.background != Background::FgOnly {
            cx.note("no negatives: background is not learned");
        }
        let background = negatives.into_iter().map(|row| (row, n_base as u32));
        Ok(TrainingRows { rows: positives.into_iter().chain(background).collect(), counts })
    }
}

/// Reads samples; of the embeddings only what is needed to find them. Fails where they are not of the checkpoint's width.
fn samples(samples: &PromptSamples, port: &'static str, clip: &clip::Clip) -> Result<(PromptRows, PromptEmbeddings)> {
    let (rows, embeddings) = (samples.rows()?, samples.embeddings()?);
    let (expected, found) = (clip.embed_dim() as usize, embeddings.dim);
    if embeddings.n_rows > 0 && found != expected {
        let problem = format!("embeddings of {found} numbers, but those of the checkpoint's classes have {expected}");
        return Err(Error::Input { port, problem, hint: "use the checkpoint that the features of these samples were made with".into() });
    }
    Ok((rows, embeddings))
}

/// Rows that may be used in a training.
struct Choice {
    /// Row and class of each.
    positives: Vec<(usize, u32)>,
    negatives: Vec<usize>,
}

impl Choice {
    fn of(rows: &PromptRows, rule: &RowRule, background: Background, classes: &ClassSplit) -> Self {
        let (places, n_base) = (places(&rows.names, classes), classes.base.len());
        let mut choice = Self { positives: Vec::new(), negatives: Vec::new() };
        for (row, (class, iou)) in rows.classes.iter().zip(&rows.ious).enumerate() {
            match rule.row_use(class.map(|class| places[class as usize]), *iou, n_base) {
                RowUse::Positive(class) => choice.positives.push((row, class as u32)),
                RowUse::Negative if background != Background::FgOnly => choice.negatives.push(row),
                RowUse::Negative | RowUse::Unused => {}
            }
        }
        choice
    }
}

/// The rows of a training.
struct TrainingRows {
    /// Row and class of each; the number of base classes is background.
    rows: Vec<(usize, u32)>,
    /// How many there are of each base class, and of background.
    counts: Vec<u64>,
}

/// Chooses and reads the rows of each batch.
struct RowLoader<'a> {
    training: TrainingRows,
    rows: &'a PromptRows,
    embeddings: &'a PromptEmbeddings,
    batch_size: usize,
    random: ChaCha8Rng,
}

/// Rows of a batch.
struct RowBatch {
    /// `[B, D]`.
    embeddings: Vec<f32>,
    /// `[B]`; the number of base classes is background.
    labels: Vec<i64>,
}

impl RowLoader<'_> {
    /// The batches of an epoch: rows in random order.
    fn epoch(&self, epoch: u64) -> impl Iterator<Item = Vec<(usize, u32)>> + use<> {
        let mut random = self.random.clone();
        random.set_stream(epoch);
        let mut order = self.training.rows.clone();
        order.shuffle(&mut random);
        let (n_rows, batch_size) = (order.len(), self.batch_size);
        (0..n_rows).step_by(batch_size).map(move |first| order[first..n_rows.min(first + batch_size)].to_vec())
    }
}

impl DataLoader for RowLoader<'_> {
    type Spec = Vec<(usize, u32)>;
    type Batch = RowBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Self::Spec, usize)> + Send {
        let n_batches = self.training.rows.len().div_ceil(self.batch_size);
        let (first_epoch, n_before) = (steps.start as usize / n_batches, steps.start as usize % n_batches);
        let batches = (first_epoch as u64..).flat_map(|epoch| self.epoch(epoch)).skip(n_before);
        batches.zip(steps).map(|(rows, _)| {
            let bytes = 4 * rows.len() * self.embeddings.dim;
            (rows, bytes)
        })
    }

    fn load(&self, rows: Self::Spec, _cx: &Context<'_>) -> Result<Loaded<RowBatch>> {
        let images: BTreeSet<_> = rows.iter().map(|(row, _)| self.rows.image_of(*row)).collect();
        let embeddings = self.embeddings.gather(rows.iter().map(|(row, _)| *row));
        if let Some(place) = embeddings.iter().position(|number| !number.is_finite()) {
            let (row, _) = rows[place / self.embeddings.dim];
            let problem = format!("row {row}, of image {}: expected numbers, found {}", self.rows.image_of(row), embeddings[place]);
            return Err(Error::Input { port: SAMPLES.info().name, problem, hint: "make the samples again".into() });
        }
        let batch = RowBatch { embeddings, labels: rows.iter().map(|(_, class)| i64::from(*class)).collect() };
        Ok(Loaded { batch: Some(batch), images: images.iter().map(ToString::to_string).collect(), unreadable: Vec::new() })
    }

    fn n_images(&self) -> usize {
        self.training.rows.len()
    }
}

/// Rows of validation images.
struct Validation {
    rows: PromptRows,
    embeddings: PromptEmbeddings,
    /// The place of each class of the rows among base and novel classes.
    places: Vec<usize>,
    n_base: usize,
}

impl Validation {
    fn of((rows, embeddings): (PromptRows, PromptEmbeddings), classes: &ClassSplit) -> Self {
        Self { places: places(&rows.names, classes), n_base: classes.base.len(), rows, embeddings }
    }

    /// Among all classes: the part of base and of novel rows, of any IoU, whose nearest class is theirs; and the part of negatives, by
    /// `rule`, whose largest probability is at least 0.5 and at least 0.9. What has no row is left out.
    fn measures(&self, classes: &Tensor, rule: &RowRule, proceed: &dyn Fn() -> Result<()>) -> Result<BTreeMap<String, f64>> {
        let n_classes = classes.size()[0] as usize;
        let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        let mut count = |name: &'static str, is_so: bool| {
            let (n, of) = counts.entry(name).or_default();
            (*n, *of) = (*n + u64::from(is_so), *of + 1);
        };
        name_rows(&self.embeddings, classes, TEMPERATURE, &|_| proceed(), |row, Said { best, probability }| {
            let class = self.rows.classes[row].map(|class| self.places[class as usize]);
            match class {
                Some(class) if class < self.n_base => count("base_top1", best[0] as usize == class),
                Some(class) if class < n_classes => count("novel_top1", best[0] as usize == class),
                None if rule.row_use(None, self.rows.ious[row], self.n_base) == RowUse::Negative => {
                    count("negatives_over_50", *probability >= 0.5);
                    count("negatives_over_90", *probability >= 0.9);
                }
                Some(_) | None => {}
            }
        })?;
        Ok(counts.into_iter().map(|(name, (n, of))| (name.to_owned(), n as f64 / of as f64)).collect())
    }
}

/// A context in training.
struct PromptCriterion<'a> {
    stage: &'a Detpro,
    classes: &'a ClassSplit,
    space: Space,
    base: Prompted<'a>,
    all: Prompted<'a>,
    /// f32 `[M, C]`.
    context: Tensor,
    /// The background prompt and its vectors, f32 `[10, C]`, where it is learned.
    background: Option<(Prompted<'a>, Tensor)>,
    /// f32 `[C + 1]`, by class.
    weights: Tensor,
    validation: Option<Validation>,
}

impl<'a> PromptCriterion<'a> {
    fn new(
        stage: &'a Detpro,
        clip: &'a clip::Clip,
        space: Space,
        classes: &'a ClassSplit,
        weights: Tensor,
        validation: Option<Validation>,
        mut random: ChaCha8Rng,
    ) -> Result<Self> {
        let (text, tokenizer) = (clip.causal_text()?, clip.tokenizer());
        let names: Vec<String> = classes.all().map(|name| class_name(name)).collect();
        let prompted = |names: &[String]| Prompted::named(text, tokenizer, names, stage.context, stage.place);
        random.set_stream(CONTEXT_STREAM);
        let mut first = |n| first_context(n, text.width(), &mut random).to_device(clip.device()).set_requires_grad(true);
        let context = first(stage.context);
        let background = match stage.background {
            Background::Learn => Some((Prompted::new(text, tokenizer, &[""], BACKGROUND_CONTEXT)?, first(BACKGROUND_CONTEXT))),
            Background::Soft | Background::FgOnly | Background::Hinge | Background::Mean | Background::Meanbg | Background::Max => None,
        };
        let (base, all) = (prompted(&names[..classes.base.len()])?, prompted(&names)?);
        Ok(Self { stage, classes, space, base, all, context, background, weights, validation })
    }

    /// The logits of rows `[B, D]`, as the loss expects them.
    fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let mut classes = self.base.encode(&self.context)?;
        if let Some((prompt, vectors)) = &self.background {
            classes = Tensor::cat(&[classes, prompt.encode(vectors)?], 0);
        }
        Ok(logits(rows, &classes))
    }

    fn prompts(&self) -> Result<Prompts> {
        let embeddings = no_grad(|| Ok::<_, Error>(to_unit_length(&self.all.encode(&self.context)?).to_device(Device::Cpu)))?;
        Ok(Prompts { names: self.classes.all().cloned().collect(), embeddings, scale: None, clip: Some(self.space) })
    }

    /// The learned tensors by name.
    fn learned(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [(CONTEXT, &self.context)].into_iter().chain(self.background.iter().map(|(_, vectors)| (BACKGROUND_PROMPT, vectors)))
    }
}

impl Criterion for PromptCriterion<'_> {
    type Batch = RowBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(self.learned().map(|(name, tensor)| (name.to_owned(), Parameter::plain(tensor))).collect())
    }

    fn losses(&self, _step: u32, batch: RowBatch) -> Result<Losses> {
        let n_rows = batch.labels.len() as i64;
        let rows = Tensor::from_slice(&batch.embeddings).view([n_rows, -1]).to_device(self.context.device());
        let labels = Tensor::from_slice(&batch.labels).to_device(self.context.device());
        let loss = loss(&self.logits(&rows)?, &labels, &self.weights, self.stage.background)?;
        Ok(Losses { terms: vec![("prompts", loss)], measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let (mut tensors, metadata) = self.prompts()?.content()?;
        tensors.extend(self.learned().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())));
        Ok(Weights { tensors, metadata })
    }

    fn validate(&self, is_last: bool, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let Some(validation) = &self.validation else { return Ok(BTreeMap::new()) };
        let classes = self.prompts()?.embeddings.to_device(self.context.device());
        let measured = validation.measures(&classes, &self.stage.rule(), &|| cx.proceed())?;
        if is_last {
            let percent = |(name, part): (&String, &f64)| format!("{name} {:.1} %", 100.0 * part);
            cx.note(format!("on validation rows: {}", measured.iter().map(percent).collect::<Vec<_>>().join(", ")));
        }
        Ok(measured)
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng as _;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        artifacts::prompt_samples::tests::samples as written,
        golden::{detpro_ralf, error, numbers},
        prompts::golden::small_clip,
        training::Optimizer,
    };

    const NAMES: [&str; 5] = ["aerosol_can", "applesauce", "airplane", "Band_Aid", "arctic_(type_of_shoe)"];

    fn classes(base: &[&str], novel: &[&str]) -> ClassSplit {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        ClassSplit { base: owned(base), novel: owned(novel) }
    }

    fn random() -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(5)
    }

    #[test]
    fn the_defaults_are_detpro_s_and_pass_their_own_check() {
        let stage = Detpro::default();
        assert!(Stage::check(&stage).is_empty() && Stage::check(&Detpro { iou: [0.1, 1.1], ..Detpro::default() }).is_empty());
        let refused = Detpro { iou: [0.6, 0.6], negative_iou: 0.1, ..Detpro::default() };
        let fields: Vec<String> = Stage::check(&refused).into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["iou", "negative_iou"]);
        // 1,025 rows are three batches, the last of one row.
        let config = stage.config(1025);
        assert_eq!(config.steps, 18);
        let rates: Vec<f64> = [0, 2, 3, 17].map(|step| config.optimizer.schedule.lr_at(step)).into();
        for (found, expected) in rates.iter().zip([2e-3, 2e-3, 1.866_025e-3, 1.339_746e-4]) {
            assert!((found - expected).abs() < 1e-9, "{rates:?}");
        }
    }

    /// Three steps of the published code, through the stage's own criterion and optimizer.
    #[test]
    fn steps_are_those_of_the_published_code() {
        let golden = detpro_ralf("detpro");
        let (clip, classes) = (small_clip(&golden), classes(&NAMES, &[]));
        let counts: Vec<u64> = numbers(&golden["train/counts"]).into_iter().map(|n| n as u64).collect();
        for (name, background) in [("soft", Background::Soft), ("learn", Background::Learn)] {
            let stage = Detpro { background, ..Detpro::default() };
            let space = Space::of(&BTreeMap::new(), &[]);
            let criterion = PromptCriterion::new(&stage, &clip, space, &classes, class_weights(&counts).unwrap(), None, random()).unwrap();
            no_grad(|| {
                criterion.context.shallow_clone().copy_(&golden["prompt/ctx"]);
                if let Some((_, vectors)) = &criterion.background {
                    vectors.shallow_clone().copy_(&golden["prompt/bg_prompt"]);
                }
            });
            let config = stage.config(10_000).optimizer;
            let mut optimizer = Optimizer::new(&config, criterion.parameters().unwrap());
            for step in 0..3 {
                let of_step = |name: &str| numbers(&golden[name].get(step));
                let batch = RowBatch {
                    embeddings: of_step("train/features").into_iter().map(|number| number as f32).collect(),
                    labels: of_step("train/labels").into_iter().map(|label| label as i64).collect(),
                };
                let loss = criterion.losses(step as u32, batch).unwrap().terms.remove(0).1;
                loss.backward();
                let expected = golden[&format!("train/loss_{name}")].double_value(&[step]);
                assert!((loss.double_value(&[]) / expected - 1.0).abs() < 1e-4, "{name}, step {step}: {loss:?}, expected {expected}");
                // Parity check 6: a step is the gradient times the learning rate, and nothing else.
                let exact = no_grad(|| &criterion.context - criterion.context.grad() * 2e-3);
                optimizer.step(step as u32).unwrap();
                assert!(criterion.context.equal(&exact));
                let apart = error(&criterion.context.detach(), &golden[&format!("train/ctx_{name}")].get(step));
                assert!(apart < 1e-4, "{name}, step {step}: {apart}");
            }
            if let Some((_, vectors)) = &criterion.background {
                assert!(error(&vectors.detach(), &golden["train/bgprompt_learn"]) < 1e-4);
            }
            let (Weights { tensors, metadata }, n_learned) = (criterion.weights().unwrap(), criterion.learned().count());
            assert_eq!(tensors.len(), 1 + n_learned);
            assert!(tensors[CONTEXT].equal(&criterion.context) && metadata["names"].contains("arctic_(type_of_shoe)"));
            assert!((tensors["embeddings"].norm_scalaropt_dim(2.0, -1_i64, false) - 1.0).abs().max().double_value(&[]) < 1e-6);
        }
    }

    /// Rows of three images: class, IoU.
    fn some_rows() -> (TempDir, PromptSamples) {
        let rows: Vec<(u64, Option<usize>, f32, Vec<f32>)> = [
            (1, Some(0), 0.55),
            (1, Some(1), 0.65),
            (1, None, 0.3),
            (1, Some(2), 0.55),
            (4, Some(3), 0.55),
            (4, None, 0.05),
            (9, Some(1), 0.5),
            (9, None, 0.45),
            (9, Some(1), 0.6),
            (9, Some(0), 1.0),
        ]
        .into_iter()
        .map(|(image, class, iou)| (image, class, iou, vec![1.0, 0.0]))
        .collect();
        // In another order than the classes of the training; `crane` is not among them.
        written(&["wren", "owl", "heron", "crane"], &rows)
    }

    #[test]
    fn rows_are_chosen_by_the_names_of_their_classes() {
        let (_folder, samples) = some_rows();
        let (rows, classes) = (samples.rows().unwrap(), classes(&["owl", "wren"], &["heron"]));
        let choice = |stage: &Detpro| {
            let Choice { positives, negatives } = Choice::of(&rows, &stage.rule(), stage.background, &classes);
            (positives, negatives)
        };
        assert_eq!(choice(&Detpro::default()), (vec![(0, 1), (6, 0)], vec![2, 7]));
        assert_eq!(choice(&Detpro { iou: [0.6, 0.7], ..Detpro::default() }), (vec![(1, 0), (8, 0)], vec![2, 7]));
        assert_eq!(choice(&Detpro { iou: [0.9, 1.1], ..Detpro::default() }).0, [(9, 1)]);
        let fg_only = Detpro { background: Background::FgOnly, ..Detpro::default() };
        assert_eq!(choice(&fg_only), (vec![(0, 1), (6, 0)], vec![]));
    }

    #[test]
    fn batches_follow_from_the_seed_and_the_step_alone() {
        let (_folder, samples) = some_rows();
        let (rows, embeddings) = (samples.rows().unwrap(), samples.embeddings().unwrap());
        let training = TrainingRows { rows: (0..10).map(|row| (row, 0)).collect(), counts: vec![10, 0] };
        let loader = RowLoader { training, rows: &rows, embeddings: &embeddings, batch_size: 4, random: random() };
        let batches = |steps: Range<u32>| loader.specs(steps).map(|(rows, _)| rows).collect::<Vec<_>>();
        let all = batches(0..12);
        for first in 1..12 {
            assert_eq!(batches(first..12), all[first as usize..], "from step {first}");
        }
        for epoch in all.chunks(3) {
            assert_eq!(epoch.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
            let mut rows: Vec<usize> = epoch.iter().flatten().map(|(row, _)| *row).collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..10).collect::<Vec<_>>());
        }
        assert!(all[..3] != all[3..6]);
    }

    #[test]
    fn validation_counts_rows_of_each_kind() {
        let (_folder, samples) = written(
            &["owl", "wren"],
            &[
                (1, Some(0), 0.7, vec![1.0, 0.0]),
                (1, Some(0), 1.0, vec![0.0, 1.0]),
                (1, Some(1), 0.5, vec![0.0, 1.0]),
                (2, None, 0.4, vec![1.0, 0.0]),
                // Between both classes: even probabilities.
                (2, None, 0.2, vec![0.707, 0.707]),
                // Too small an overlap to count.
                (2, None, 0.05, vec![1.0, 0.0]),
            ],
        );
        let validation = Validation::of((samples.rows().unwrap(), samples.embeddings().unwrap()), &classes(&["owl"], &["wren"]));
        let classes = Tensor::from_slice(&[1.0_f32, 0.0, 0.0, 1.0]).view([2, 2]);
        let found = validation.measures(&classes, &Detpro::default().rule(), &|| Ok(())).unwrap();
        let expected = [("base_top1", 0.5), ("negatives_over_50", 1.0), ("negatives_over_90", 0.5), ("novel_top1", 1.0)];
        assert_eq!(found, expected.map(|(name, part)| (name.to_owned(), part)).into());
    }

    #[test]
    fn a_note_names_the_first_classes() {
        let names: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(
            (named(&names[..2], MAX_NAMED).as_str(), named(&names, MAX_NAMED).as_str()),
            ("0, 1", "0, 1, 2, 3, 4, 5, 6, 7 and 2 more")
        );
    }
}
