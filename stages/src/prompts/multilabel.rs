//! `prompts/multilabel`: a learned context before the class names.
//!
//! Choices where OADP's description (section 5.2) is silent: every image of the annotations is used, also one without any base class; crowds
//! count as shown; the last batch of an epoch is smaller; all learned parameters decay, as in a single parameter group of `torch.optim.Adam`.
//! The reference trained for 4 epochs at a constant learning rate and took the weights after the third, so here 3 epochs are the training.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId},
    boxes::Xyxy,
    classes::ClassSplit,
    views,
};
use ovenbird_models::{
    clip::{self, prompted::Prompted},
    multilabel::asymmetric_loss,
    rcnn::classifier::LogitScale,
    to_unit_length,
};
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{AnnotationFile, CheckpointFile, Classes, PROMPTS_FILE, Prompts, RegionFeatures, Regions},
    clip::{Clip, Space, space},
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, train,
    },
};

/// PyTorch's defaults for Adam (Kingma and Ba 2015).
const ALGORITHM: Algorithm = Algorithm::Adam { betas: [0.9, 0.999], epsilon: 1e-8 };
/// The words whose embeddings are the initial context.
const WORDS: &str = "a photo of a";
/// Initial factor of cosines, and the initial bias that is subtracted.
const FIRST_SCALER: f32 = 20.0;
const FIRST_BIAS: f32 = 4.0;

/// Trains class embeddings with a learned context: OADP's multi-label prompts.
///
/// Four context vectors, shared by all classes, replace `a photo of a` before `NAME.`; they are learned together with a factor and a bias,
/// while CLIP is frozen. The logit of an image and a class is cosine * scaler - bias; an asymmetric loss compares it with the base classes
/// that the image shows. The image's embedding is the centre square of `clip/blocks`. The output has the embeddings of all classes, of unit
/// norm, with scaler and bias. A killed training continues at the last checkpoint and ends with the same bytes.
///
/// Every step runs CLIP's text tower forwards and backwards on all base classes: with ViT-B/32, 25 GFLOP for the 48 of COCO (half a second
/// on one core) and 500 for the 866 of LVIS. One epoch of COCO's 118,287 images has 7,393 steps; images are not encoded again. In LVIS, a
/// class that is not annotated in an image counts as absent. (OADP, section 5.2.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Multilabel {
    /// How CLIP is run.
    pub clip: Clip,
    /// Passes over all images. The reference's embeddings are those after three epochs of four, at a constant learning rate.
    pub epochs: u32,
    /// Images per batch.
    pub batch_size: usize,
    /// Learning rate of Adam.
    pub lr: f64,
    /// Weight decay, added to the gradients (L2, as in `torch.optim.Adam`; not AdamW's).
    pub weight_decay: f64,
    /// Weight of the loss.
    pub loss_weight: f64,
    /// Steps between checkpoints: a training that is killed loses at most these.
    pub checkpoint_every: u32,
}

impl Default for Multilabel {
    fn default() -> Self {
        Self { clip: Clip::default(), epochs: 3, batch_size: 16, lr: 5e-2, weight_decay: 1e-3, loss_weight: 640.0, checkpoint_every: 1000 }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const FEATURES: In<RegionFeatures> =
    In::required("features", "Features of the images from `clip/blocks`; the first row of each image is read.");
const ANNOTATIONS: In<AnnotationFile> =
    In::required("annotations", "Which base classes images show; labels of novel classes are not read.");
const VAL_FEATURES: In<RegionFeatures> = In::optional("val_features", "Features of validation images, to measure mean average precision.");
const VAL_ANNOTATIONS: In<AnnotationFile> = In::optional("val_annotations", "Which base and novel classes the validation images show.");
const PORTS: Ports<Prompts> = Ports::new(
    Out::new("prompts", "safetensors: `embeddings` f32 [K, D], unit norm, `scaler` and `bias`; metadata `names`, base ++ novel."),
    PROMPTS_FILE,
);

impl Stage for Multilabel {
    const KIND: &'static str = "prompts/multilabel";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] =
        &[CHECKPOINT.info(), CLASSES.info(), FEATURES.info(), ANNOTATIONS.info(), VAL_FEATURES.info(), VAL_ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        Problem::unless(&[
            ("epochs", (1..=1000).contains(&self.epochs), "from 1 to 1000"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("weight_decay", (0.0..1.0).contains(&self.weight_decay), "a number from 0 to below 1"),
            ("loss_weight", is_positive(self.loss_weight), "a number above 0"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(self.config(n_images(inputs)?)?.units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        for port in [FEATURES, VAL_FEATURES] {
            let of_features = cx.inputs.read_if_given(port)?.map(|features| features.clip()).transpose()?.flatten();
            space::common(&[(CHECKPOINT.info().name, Some(space)), (port.info().name, of_features)])?;
        }
        let shown = Shown::of((FEATURES, ANNOTATIONS), &classes.base, &clip, cx)?;
        let validation =
            match (cx.inputs.ports.contains_key(VAL_FEATURES.info().name), cx.inputs.ports.contains_key(VAL_ANNOTATIONS.info().name)) {
                (true, true) => Some(Shown::of((VAL_FEATURES, VAL_ANNOTATIONS), &classes.all().cloned().collect::<Vec<_>>(), &clip, cx)?),
                (false, false) => None,
                (is_given, _) => {
                    let [given, missing] = if is_given {
                        [VAL_FEATURES.info(), VAL_ANNOTATIONS.info()]
                    } else {
                        [VAL_ANNOTATIONS.info(), VAL_FEATURES.info()]
                    };
                    let problem = format!("missing, but `{}` is given", given.name);
                    return Err(Error::Input { port: missing.name, problem, hint: "give both, or none".into() });
                }
            };
        let loader = LabelLoader::new(self.batch_size, &shown, cx);
        let criterion = PromptCriterion::new(&clip, space, &classes, self.loss_weight, shown, validation)?;
        train(&self.config(n_images(cx.inputs)?)?, &loader, &criterion, &PORTS, units, cx)
    }
}

impl Multilabel {
    /// How a training on so many images goes.
    fn config(&self, n_images: usize) -> Result<TrainingConfig> {
        let steps = self.epochs.saturating_mul(u32::try_from(n_images.div_ceil(self.batch_size)).unwrap_or(u32::MAX));
        if steps == 0 {
            let (problem, hint) = ("expected images, found none".into(), "give the annotations of the images to learn from".into());
            return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
        }
        let optimizer = OptimizerConfig {
            algorithm: ALGORITHM,
            schedule: Schedule { peak: self.lr, warmup: Warmup::NONE, decay: Decay::Constant },
            weight_decay: self.weight_decay,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        let checkpoint_every = self.checkpoint_every;
        let images_per_step = u32::try_from(self.batch_size).unwrap_or(u32::MAX);
        Ok(TrainingConfig {
            first_step: 0,
            steps,
            checkpoint_every,
            images_per_step,
            keep_checkpoints: 1,
            optimizer,
            max_loss: f64::INFINITY,
        })
    }
}

/// How many images there are to learn from, those without features among them.
fn n_images(inputs: &Inputs) -> Result<usize> {
    Ok(inputs.read(ANNOTATIONS)?.load()?.images.len())
}

/// Chooses the images of each batch.
struct LabelLoader {
    ids: Vec<ImageId>,
    batch_size: usize,
    random: ChaCha8Rng,
}

impl LabelLoader {
    fn new(batch_size: usize, shown: &Shown, cx: &Context<'_>) -> Self {
        Self { ids: shown.ids.clone(), batch_size, random: cx.rng(&cx.units[0]) }
    }

    /// The batches of an epoch: rows of the images in random order.
    fn epoch(&self, epoch: u64) -> Vec<Vec<i64>> {
        let mut random = self.random.clone();
        random.set_stream(epoch);
        let mut order: Vec<i64> = (0..self.ids.len() as i64).collect();
        order.shuffle(&mut random);
        order.chunks(self.batch_size).map(<[i64]>::to_vec).collect()
    }
}

impl DataLoader for LabelLoader {
    /// Rows of the images.
    type Spec = Vec<i64>;
    type Batch = Vec<i64>;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Vec<i64>, usize)> + Send {
        let n_batches = self.ids.len().div_ceil(self.batch_size);
        let (first_epoch, n_before) = (steps.start as usize / n_batches, steps.start as usize % n_batches);
        let batches = (first_epoch as u64..).flat_map(|epoch| self.epoch(epoch)).skip(n_before);
        batches.zip(steps).map(|(rows, _)| {
            let bytes = 8 * rows.len();
            (rows, bytes)
        })
    }

    fn load(&self, rows: Vec<i64>, _cx: &Context<'_>) -> Result<Loaded<Vec<i64>>> {
        let images = rows.iter().map(|row| self.ids[*row as usize].to_string()).collect();
        Ok(Loaded { batch: Some(rows), images, unreadable: Vec::new() })
    }

    fn n_images(&self) -> usize {
        self.ids.len()
    }
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}

/// Images, and which classes each shows.
struct Shown {
    ids: Vec<ImageId>,
    /// f32 `[N, D]`, on the device: as stored, of unit norm but for their rounding.
    embeddings: Tensor,
    /// u8 `[N, K]`, on the device: 1 where the image shows the class.
    labels: Tensor,
}

impl Shown {
    /// The images of some annotations; of a dry run the first ones.
    fn of(
        (features, annotations): (In<RegionFeatures>, In<AnnotationFile>),
        classes: &[String],
        clip: &clip::Clip,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let mut annotations = cx.inputs.read(annotations)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let n_annotated = annotations.images.len();
        let asked: BTreeSet<ImageId> = annotations.images.iter().map(|image| image.id).collect();
        let dim = clip.embed_dim() as usize;
        let mut rows: BTreeMap<ImageId, Vec<f32>> = BTreeMap::new();
        for regions in cx.inputs.read(features)?.rows() {
            cx.proceed()?;
            let regions = regions?;
            if asked.contains(&regions.image_id) {
                rows.insert(regions.image_id, whole_image(regions, dim, features.info().name)?);
            }
        }
        let missing: Vec<ImageId> = asked.into_iter().filter(|image| !rows.contains_key(image)).collect();
        let hint = "make them for these annotations: `clip/blocks` with the same `annotations`";
        cx.skip_missing(features.info(), &missing, n_annotated, hint)?;
        annotations.images.retain(|image| rows.contains_key(&image.id));
        let labels = labels(&annotations, &Classes::category_ids(&annotations, classes.iter())?);
        let flat = annotations.images.iter().flat_map(|image| &rows[&image.id]).copied().collect::<Vec<f32>>();
        let [n_images, dim, n_classes] = [annotations.images.len(), dim, classes.len()].map(|n| n as i64);
        Ok(Self {
            ids: annotations.images.iter().map(|image| image.id).collect(),
            embeddings: Tensor::from_slice(&flat).view([n_images, dim]).to_device(clip.device()),
            labels: Tensor::from_slice(&labels).view([n_images, n_classes]).to_device(clip.device()),
        })
    }

    /// Mean average precision `base_map` and `novel_map`, over the classes that some image shows; left out where there are none.
    fn mean_average_precision(&self, prompts: &Prompts, [scaler, bias]: [f64; 2], n_base: usize) -> Result<BTreeMap<String, f64>> {
        let classes = prompts.embeddings.to_device(self.embeddings.device());
        let logits = no_grad(|| self.embeddings.matmul(&classes.tr()) * scaler - bias);
        let mut of_group = [Vec::new(), Vec::new()];
        for class in 0..prompts.names.len() {
            let column = |of: &Tensor, kind: Kind| of.select(1, class as i64).to_kind(kind).to_device(Device::Cpu).contiguous();
            let scores = Vec::<f32>::try_from(column(&logits, Kind::Float)).map_err(ovenbird_models::Error::from)?;
            let labels = Vec::<bool>::try_from(column(&self.labels, Kind::Bool)).map_err(ovenbird_models::Error::from)?;
            of_group[usize::from(class >= n_base)].extend(average_precision(&scores, &labels));
        }
        let groups = ["base_map", "novel_map"].into_iter().zip(&of_group).filter(|(_, precisions)| !precisions.is_empty());
        Ok(groups.map(|(name, precisions)| (name.to_owned(), mean(precisions))).collect())
    }
}

/// Which of the classes each image shows, `[N, K]` row by row.
fn labels(annotations: &Annotations, classes: &[CategoryId]) -> Vec<u8> {
    let rows: BTreeMap<ImageId, usize> = annotations.images.iter().enumerate().map(|(row, image)| (image.id, row)).collect();
    let columns: BTreeMap<CategoryId, usize> = classes.iter().enumerate().map(|(column, class)| (*class, column)).collect();
    let mut labels = vec![0; rows.len() * columns.len()];
    for object in &annotations.annotations {
        if let (Some(row), Some(column)) = (rows.get(&object.image_id), columns.get(&object.category_id)) {
            labels[row * columns.len() + column] = 1;
        }
    }
    labels
}

/// The embedding of the centre square, which `clip/blocks` puts first.
fn whole_image(regions: Regions, dim: usize, port: &'static str) -> Result<Vec<f32>> {
    let Regions { image_id, size_px, boxes, mut embeddings, .. } = regions;
    let refused = |problem: String, hint: &str| Error::Input { port, problem: format!("image {image_id}: {problem}"), hint: hint.into() };
    let is_near = |one: &Xyxy, other: &Xyxy| {
        let corners = [(one.x1, other.x1), (one.y1, other.y1), (one.x2, other.x2), (one.y2, other.y2)];
        corners.into_iter().all(|(a, b)| (a - b).abs() <= 1.0)
    };
    let whole = views::whole_box(size_px);
    let is_first = |first: &Xyxy| is_near(first, &whole) || is_near(first, &views::reference_whole_box(size_px));
    if !boxes.first().is_some_and(is_first) {
        let problem = format!("expected the centre square {whole:?} as the first region, found {:?}", boxes.first());
        return Err(refused(problem, "use what `clip/blocks` made"));
    }
    let found = embeddings.len() / boxes.len();
    if found != dim {
        let problem = format!("embeddings of {found} numbers, but those of the checkpoint's classes have {dim}");
        return Err(refused(problem, "use the checkpoint that `features` were made with"));
    }
    embeddings.truncate(dim);
    Ok(embeddings)
}

/// Precision where each further positive is found, times how much recall that adds; `None` without positives.
///
/// Equal scores are found together. (`sklearn.metrics.average_precision_score`.)
fn average_precision(scores: &[f32], labels: &[bool]) -> Option<f64> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let (mut n_seen, mut n_found, mut sum) = (0, 0, 0.0);
    for equal in order.chunk_by(|a, b| scores[*a].total_cmp(&scores[*b]).is_eq()) {
        let n_new = equal.iter().filter(|place| labels[**place]).count();
        n_seen += equal.len();
        n_found += n_new;
        sum += n_new as f64 * (n_found as f64 / n_seen as f64);
    }
    (n_found > 0).then(|| sum / n_found as f64)
}

/// The names of the learned parameters.
const LEARNED: [&str; 3] = ["context", "scaler", "bias"];

/// A context in training.
struct PromptCriterion<'a> {
    classes: &'a ClassSplit,
    space: Space,
    base: Prompted<'a>,
    all: Prompted<'a>,
    /// Context f32 `[M, C]`, scaler and bias f32 `[]`.
    learned: [Tensor; 3],
    loss_weight: f64,
    training: Shown,
    validation: Option<Shown>,
}

impl<'a> PromptCriterion<'a> {
    fn new(
        clip: &'a clip::Clip,
        space: Space,
        classes: &'a ClassSplit,
        loss_weight: f64,
        training: Shown,
        validation: Option<Shown>,
    ) -> Result<Self> {
        let (text, tokenizer) = (clip.causal_text()?, clip.tokenizer());
        let context = text.words(tokenizer, WORDS)?.copy();
        let n_context = context.size()[0] as usize;
        let texts: Vec<String> = classes.all().map(|name| format!("{}.", name.replace('_', " "))).collect();
        let number = |number: f32| Tensor::from(number).to_device(clip.device());
        let learned = [context, number(FIRST_SCALER), number(FIRST_BIAS)].map(|tensor| tensor.set_requires_grad(true));
        let base = Prompted::new(text, tokenizer, &texts[..classes.base.len()], n_context)?;
        let all = Prompted::new(text, tokenizer, &texts, n_context)?;
        Ok(Self { classes, space, base, all, learned, loss_weight, training, validation })
    }

    /// Scaler and bias.
    fn scale(&self) -> [f64; 2] {
        [1, 2].map(|which: usize| self.learned[which].double_value(&[]))
    }

    fn prompts(&self) -> Result<Prompts> {
        let embeddings = no_grad(|| Ok::<_, Error>(to_unit_length(&self.all.encode(&self.learned[0])?).to_device(Device::Cpu)))?;
        let ([scaler, bias], names) = (self.scale(), self.classes.all().cloned().collect());
        Ok(Prompts { names, embeddings, scale: Some(LogitScale::Affine { scaler, bias }), clip: Some(self.space) })
    }
}

impl Criterion for PromptCriterion<'_> {
    type Batch = Vec<i64>;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(LEARNED.iter().zip(&self.learned).map(|(name, tensor)| ((*name).to_owned(), Parameter::plain(tensor))).collect())
    }

    fn losses(&self, _step: u32, rows: Vec<i64>) -> Result<Losses> {
        let rows = Tensor::from_slice(&rows).to_device(self.training.embeddings.device());
        let [images, labels] = [&self.training.embeddings, &self.training.labels].map(|all| all.index_select(0, &rows));
        let [context, scaler, bias] = &self.learned;
        let classes = to_unit_length(&self.base.encode(context)?);
        // [B, K]
        let logits = images.matmul(&classes.tr()) * scaler - bias;
        let loss = asymmetric_loss(&logits, &labels)? * self.loss_weight;
        Ok(Losses { terms: vec![("multilabel", loss)], measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let (tensors, metadata) = self.prompts()?.content()?;
        Ok(Weights { tensors, metadata })
    }

    fn validate(&self, is_last: bool, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let [scaler, bias] = self.scale();
        let mut measured = BTreeMap::from([("scaler".to_owned(), scaler), ("bias".to_owned(), bias)]);
        if let Some(validation) = &self.validation {
            let precision = validation.mean_average_precision(&self.prompts()?, [scaler, bias], self.classes.base.len())?;
            if is_last {
                let percent = |(name, precision): (&String, &f64)| format!("{} {:.1} %", name.trim_end_matches("_map"), 100.0 * precision);
                cx.note(format!("mAP on validation images: {}", precision.iter().map(percent).collect::<Vec<_>>().join(", ")));
            }
            measured.extend(precision);
        }
        Ok(measured)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ovenbird_models::clip::{Activation, Config, ImageConfig, TextConfig, tokenizer::Overlong};
    use serde_json::Value;

    use super::*;
    use crate::{prompts::golden, training::Optimizer};

    fn clip(golden: &Value) -> clip::Clip {
        let config = Config {
            embed_dim: 32,
            image: ImageConfig::Vit { image_side: 32, patch: 16, width: 32, depth: 1, heads: 1, mlp_width: 128 },
            text: TextConfig { context: 77, vocabulary: 49_408, width: 32, heads: 2, depth: 2 },
            activation: Activation::QuickGelu,
        };
        clip::Clip::load_as(&config, &golden::weights(golden), Path::new("clip.pt"), Device::Cpu, Kind::Float).unwrap()
    }

    #[test]
    fn steps_are_those_of_torch_and_open_clip() {
        let golden = golden::read("multilabel.json");
        let clip = clip(&golden);
        let classes = ClassSplit { base: golden::names(&golden["base"]), novel: golden::names(&golden["novel"]) };
        let (n_images, n_base, n_classes) = (golden["n_images"].as_i64().unwrap(), classes.base.len() as i64, classes.all().count() as i64);
        let flat = |name: &str, n: i64| golden::unit(name, n as usize).collect::<Vec<f32>>();
        let shown = Shown {
            ids: (0..n_images as u64).map(ImageId).collect(),
            embeddings: to_unit_length(&Tensor::from_slice(&flat("images", n_images * 32)).view([n_images, 32])),
            labels: Tensor::from_slice(&flat("labels", n_images * n_base).iter().map(|u| u8::from(*u > 0.2)).collect::<Vec<_>>())
                .view([n_images, n_base]),
        };
        let stage = Multilabel::default();
        let space = Space::of(&BTreeMap::new(), &[]);
        let criterion = PromptCriterion::new(&clip, space, &classes, stage.loss_weight, shown, None).unwrap();
        let config = stage.config(n_images as usize).unwrap().optimizer;
        let mut optimizer = Optimizer::new(&config, criterion.parameters().unwrap());
        let rows = |key: &str| golden::tensor(&golden[key], &[n_classes, 32]);
        let before = golden::error(&criterion.prompts().unwrap().embeddings, &rows("before"));
        assert!(before < 1e-5, "{before}");

        let relative = |found: f64, expected: &Value| (found / expected.as_f64().unwrap() - 1.0).abs();
        // Of losses, scaler and bias; of gradients; of contexts.
        let mut worst = [0.0_f64; 3];
        // `f64::max` would leave NaN out.
        let worse = |worst: f64, apart: f64| if worst.is_nan() || apart <= worst { worst } else { apart };
        for (step, (batch, expected)) in golden["batches"].as_array().unwrap().iter().zip(golden["steps"].as_array().unwrap()).enumerate() {
            let losses = criterion.losses(step as u32, serde_json::from_value(batch.clone()).unwrap()).unwrap();
            losses.terms[0].1.backward();
            let loss = losses.terms[0].1.double_value(&[]);
            let gradients = criterion.learned.each_ref().map(|tensor| tensor.grad().copy());
            optimizer.step(step as u32).unwrap();
            let [scaler, bias] = criterion.scale();
            let numbers = [(loss, &expected["loss"]), (scaler, &expected["learned"][1][0]), (bias, &expected["learned"][2][0])];
            for (found, expected) in numbers {
                worst[0] = worse(worst[0], relative(found, expected));
            }
            for (which, gradient) in gradients.iter().enumerate() {
                let expected = golden::tensor(&expected["gradients"][which], &gradient.size());
                worst[1] = worse(worst[1], golden::error(gradient, &expected) / expected.abs().max().double_value(&[]));
            }
            let expected = golden::tensor(&expected["learned"][0], &[4, 32]);
            worst[2] = worse(worst[2], golden::error(&criterion.learned[0].detach(), &expected));
        }
        let after = golden::error(&criterion.prompts().unwrap().embeddings, &rows("after"));
        let [of_numbers, of_gradients, of_contexts] = worst;
        println!(
            "before {before:.1e}, numbers {of_numbers:.1e}, gradients {of_gradients:.1e}, contexts {of_contexts:.1e}, after {after:.1e}"
        );
        assert!(worst[0] < 1e-5 && worst[1] < 1e-5 && worst[2] < 1e-4 && after < 1e-4, "{worst:?}, {after}");
        assert!(golden::error(&rows("before"), &rows("after")) > 0.1, "the golden training learns nothing");
    }

    /// Parity check R5 of OADP's specification.
    #[test]
    fn without_a_step_embeddings_are_those_of_a_photo_of_a_name() {
        let clip = clip(&golden::read("multilabel.json"));
        let classes = ClassSplit { base: vec!["traffic_light".into(), "dog".into()], novel: vec!["speaker_(stero_equipment)".into()] };
        let none = Shown { ids: Vec::new(), embeddings: Tensor::from(0.0_f32), labels: Tensor::from(0.0_f32) };
        let found = PromptCriterion::new(&clip, Space::of(&BTreeMap::new(), &[]), &classes, 1.0, none, None).unwrap().prompts().unwrap();
        let sentences = ["a photo of a traffic light.", "a photo of a dog.", "a photo of a speaker (stero equipment)."];
        let tokens = clip.tokenizer().batch(&sentences, Overlong::Refuse).unwrap();
        let apart = golden::error(&found.embeddings, &clip.encode_text_features(&tokens).unwrap());
        assert!(apart < 1e-5, "{apart}");
        assert_eq!((found.names, found.scale), (classes.all().cloned().collect(), Some(LogitScale::Affine { scaler: 20.0, bias: 4.0 })));
    }

    #[test]
    fn average_precision_is_that_of_scikit_learn() {
        let golden = golden::read("average_precision.json");
        for case in golden["cases"].as_array().unwrap() {
            let scores: Vec<f32> = serde_json::from_value(case["scores"].clone()).unwrap();
            let labels: Vec<bool> = serde_json::from_value(case["labels"].clone()).unwrap();
            let apart = average_precision(&scores, &labels).unwrap() - case["precision"].as_f64().unwrap();
            assert!(apart.abs() < 1e-12, "{} scores: {apart}", scores.len());
        }
        assert_eq!(average_precision(&[0.5, 0.25], &[false, false]), None);
    }

    #[test]
    fn the_first_region_has_to_be_the_centre_square_in_the_space_of_the_checkpoint() {
        let regions = |first: Xyxy, dim: usize| Regions {
            image_id: ImageId(9),
            size_px: [64, 48],
            boxes: vec![first, Xyxy { x1: 0.0, y1: 0.0, x2: 32.0, y2: 32.0 }],
            objectness: vec![1.0; 2],
            embeddings: (0..2 * dim).map(|number| number as f32).collect(),
        };
        let words = |regions: Regions| whole_image(regions, 3, "features").unwrap_err().to_string();
        for whole in [views::whole_box([64, 48]), views::reference_whole_box([64, 48])] {
            assert_eq!(whole_image(regions(whole, 3), 3, "features").unwrap(), [0.0, 1.0, 2.0]);
        }
        let whole = views::whole_box([64, 48]);
        assert_eq!(words(regions(whole, 2)), "features: image 9: embeddings of 2 numbers, but those of the checkpoint's classes have 3");
        let object = Xyxy { x1: 8.0, y1: 0.0, x2: 50.0, y2: 48.0 };
        assert!(words(regions(object, 3)).starts_with("features: image 9: expected the centre square Xyxy { x1: 8.0, y1: 0.0, x2: 56.0"));
        let none = Regions { boxes: Vec::new(), objectness: Vec::new(), embeddings: Vec::new(), ..regions(whole, 3) };
        assert!(words(none).ends_with("as the first region, found None"));
    }
}
