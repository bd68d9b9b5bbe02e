//! `augmenter/train`: a network that mixes embeddings of regions with concepts.
//!
//! The reference draws dropout from an unseeded generator; here masks follow from the recipe and the step.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use half::f16;
use ovenbird_data::{annotations::ImageId, boxes::Xyxy};
use ovenbird_models::augmenter::{self, Augmenter, Branches, Concepts, Config, Fine, fine_spread};
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn, no_grad};

use super::network::{AugmenterFile, AugmenterSpec};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units, artifacts,
    artifacts::{ByImage, CheckpointFile, Classes, RegionFeatures, Regions, Vocabulary},
    clip::{Clip, space},
    prompts::texts::embeddings,
    training::{
        Algorithm, Criterion, DataLoader, Decay, Loaded, Losses, OptimizerConfig, Parameter, Ports, Schedule, TrainingConfig, Warmup,
        Weights, train,
    },
};

/// A loss above this has exploded.
const MAX_LOSS: f64 = 1e4;
/// The regions that the network is measured on at a checkpoint, at most: the first ones.
const MEASURED_REGIONS: usize = 2048;
/// Pseudo classes of a dry run besides the base classes.
const DRY_CLASSES: usize = 64;

/// Trains the network of RAF, which mixes the CLIP embedding of a region with the concepts most similar to it.
///
/// A region's label is the pseudo class whose text is most similar to it: one of the base classes or of the vocabulary; no label of an
/// annotation is read. The loss is five times the cross entropy over pseudo classes, and the mean squared difference from the region's
/// own embedding. Regions of low objectness and small ones are left out; of each image an epoch sees the first ones, in the order of the
/// features. The defaults are RALF's. At each checkpoint the curve has `accuracy` on the first 2,048 regions, `accuracy_mean_fine` with
/// the fine branch replaced by its mean, and `fine_spread`, one minus the mean cosine of two fine embeddings: where the first two are
/// equal and the third is 0, concepts have no effect. (RALF, section 8.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The sentence with the name of a pseudo class for `{}`. RALF's has no article.
    pub template: String,
    /// Replace underscores in names by spaces; RALF keeps them.
    pub spaces: bool,
    /// Concepts that are retrieved for a region.
    pub n_concepts: i64,
    /// Attention heads.
    pub heads: i64,
    /// The scale of tokens: with RALF's the fine branch hardly depends on the region.
    pub fine: Fine,
    /// Divides the cosines in the cross entropy; RALF has none, so that the cross entropy hardly falls. With one, 0.01 is usual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Regions must have more objectness than this, in f16.
    pub min_objectness: f32,
    /// Regions must be wider and higher than this, in px, in f16.
    pub min_side: f32,
    /// Regions of an image in an epoch.
    pub regions_per_image: usize,
    /// Seed of first weights, of the order of images and of dropout.
    pub seed: u64,
    /// Passes over all images.
    pub epochs: u32,
    /// Images per step.
    pub batch_size: usize,
    /// Learning rate of SGD, constant.
    pub lr: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u32,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            template: "a photo of {}".into(),
            spaces: false,
            n_concepts: 50,
            heads: 8,
            fine: Fine::Reference,
            temperature: None,
            min_objectness: 0.4,
            min_side: 10.0,
            regions_per_image: 30,
            seed: 0,
            epochs: 10,
            batch_size: 128,
            lr: 0.1,
            checkpoint_every: 500,
        }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names; novel ones are not read.");
const VOCABULARY: In<Vocabulary> = In::required("vocabulary", "The names of further pseudo classes.");
const CONCEPTS: In<artifacts::Concepts> = In::required("concepts", "Phrases with embeddings of the same CLIP.");
const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of objects by the same CLIP (`clip/objects`).");
const PORTS: Ports<AugmenterFile> = Ports::new(
    Out::new("augmenter", "The weights under RALF's names, safetensors, f32, and how the network is built."),
    "augmenter.safetensors",
);

impl Stage for Train {
    const KIND: &'static str = "augmenter/train";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info(), VOCABULARY.info(), CONCEPTS.info(), FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        Problem::unless(&[
            ("template", self.template.matches("{}").count() == 1, "one {} for the name"),
            ("n_concepts", self.n_concepts > 0, "at least 1"),
            ("heads", self.heads > 0, "at least 1"),
            ("temperature", self.temperature.is_none_or(is_positive), "a number above 0"),
            ("min_objectness", (0.0..1.0).contains(&self.min_objectness), "a number from 0 to below 1"),
            ("min_side", (0.0..f32::from(f16::MAX)).contains(&self.min_side), "a number of px, 0 or more"),
            ("regions_per_image", self.regions_per_image > 0, "at least 1"),
            ("epochs", (1..=10_000).contains(&self.epochs), "from 1 to 10000"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("checkpoint_every", self.checkpoint_every > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(self.config(inputs.read(FEATURES)?.places()?.items().len())?.units())
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let features = cx.inputs.read(FEATURES)?;
        let n_images = features.places()?.items().len();
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (Vocabulary { names: mut vocabulary }, concepts) = (cx.inputs.read(VOCABULARY)?, cx.inputs.read(CONCEPTS)?);
        if cx.most_items.is_some() {
            vocabulary.truncate(DRY_CLASSES);
        }
        let (clip, of_text) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        space::common(&[
            (CHECKPOINT.info().name, Some(of_text)),
            (CONCEPTS.info().name, concepts.clip),
            (FEATURES.info().name, features.clip()?),
        ])?;
        let dim = features.dim()?;
        if clip.embed_dim() != dim as i64 {
            let problem = format!("embeddings of {dim} numbers, those of texts have {}", clip.embed_dim());
            return Err(Error::Input { port: FEATURES.info().name, problem, hint: "make them with the same CLIP".into() });
        }
        let text = |name: &String| self.template.replace("{}", &if self.spaces { name.replace('_', " ") } else { name.clone() });
        let texts: Vec<String> = classes.base.iter().chain(&vocabulary).map(text).collect();
        let texts = embeddings(&clip, &texts, |_| cx.proceed())?.to_device(cx.device);
        let config = Config { n_concepts: self.n_concepts, heads: self.heads, fine: self.fine, ..Config::ralf(dim as i64) };
        let concepts = concepts.for_augmenter(dim as i64, self.n_concepts, cx.device)?;
        let store = nn::VarStore::new(cx.device);
        let augmenter = Augmenter::new(&store.root(), &config, self.seed)?;
        let pool = Pool::of(self, &features, dim, &texts, cx)?;
        let (n_regions, n_labels) = (pool.n_regions(), pool.n_labels());
        cx.note(format!(
            "{n_regions} regions of {} of {n_images} images, with {n_labels} of {} pseudo labels",
            pool.images.len(),
            texts.size()[0]
        ));
        let measured = pool.first(MEASURED_REGIONS)?;
        let criterion = AugmenterCriterion {
            augmenter,
            config,
            clip: Some(of_text),
            concepts,
            texts,
            temperature: self.temperature,
            measured,
            random: cx.rng(&cx.units[0]),
        };
        let loader = RegionLoader { pool: &pool, batch_size: self.batch_size, seed: self.seed, random: cx.rng(&cx.units[0]) };
        train(&self.config(n_images)?, &loader, &criterion, &PORTS, units, cx)
    }
}

impl Train {
    /// The training on features of so many images. Of those none may have a region left, and then an epoch is shorter than its steps here.
    fn config(&self, n_images: usize) -> Result<TrainingConfig> {
        let steps = self.epochs.saturating_mul(u32::try_from(n_images.div_ceil(self.batch_size)).unwrap_or(u32::MAX));
        if steps == 0 {
            let problem = "expected features of images, found none".into();
            return Err(Error::Input { port: FEATURES.info().name, problem, hint: "give embeddings of objects in some images".into() });
        }
        let optimizer = OptimizerConfig {
            algorithm: Algorithm::Sgd { momentum: 0.0 },
            schedule: Schedule { peak: self.lr, warmup: Warmup::NONE, decay: Decay::Constant },
            weight_decay: 0.0,
            accumulation_steps: 1,
            clip_grad_norm: None,
            ema: None,
            scales_losses: false,
        };
        let images_per_step = u32::try_from(self.batch_size).unwrap_or(u32::MAX);
        Ok(TrainingConfig {
            first_step: 0,
            steps,
            checkpoint_every: self.checkpoint_every,
            images_per_step,
            keep_checkpoints: 1,
            optimizer,
            max_loss: MAX_LOSS,
        })
    }

    /// The first regions that are large and sure enough, as places among those of their image.
    fn chosen(&self, boxes: &[Xyxy], objectness: &[f32]) -> Vec<usize> {
        let is_chosen = |(xyxy, objectness): (&Xyxy, &f32)| {
            let [x1, y1, x2, y2] = [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2].map(f16::from_f32);
            let least = f16::from_f32(self.min_side);
            f16::from_f32(*objectness) > f16::from_f32(self.min_objectness) && x2 - x1 > least && y2 - y1 > least
        };
        let chosen = boxes.iter().zip(objectness).enumerate().filter(|(_, region)| is_chosen(*region)).map(|(place, _)| place);
        chosen.take(self.regions_per_image).collect()
    }
}

/// The regions to learn from, with their labels.
struct Pool {
    features: ByImage<Regions>,
    dim: usize,
    /// Images with at least one region, in the order of the features: for each the places of its regions, and their labels.
    images: Vec<(ImageId, Vec<usize>, Vec<i64>)>,
}

/// Embeddings `[R, D]` with their labels `[R]`.
struct RegionBatch {
    embeddings: Vec<f32>,
    labels: Vec<i64>,
}

impl Pool {
    /// `texts`: of pseudo classes, `[K, D]` of unit length.
    fn of(stage: &Train, features: &RegionFeatures, dim: usize, texts: &Tensor, cx: &Context<'_>) -> Result<Self> {
        let mut images = Vec::new();
        for regions in features.rows().take(cx.most_items.unwrap_or(usize::MAX)) {
            cx.proceed()?;
            let regions = regions?;
            let mut places = stage.chosen(&regions.boxes, &regions.objectness);
            if places.is_empty() && cx.most_items.is_some() {
                places.extend((0..regions.boxes.len()).take(stage.regions_per_image));
            }
            if !places.is_empty() {
                let embeddings =
                    Tensor::from_slice(&rows_of(&regions.embeddings, dim, &places)).view([-1, dim as i64]).to_device(texts.device());
                let labels = Vec::<i64>::try_from(embeddings.matmul(&texts.tr()).argmax(1, false)).map_err(ovenbird_models::Error::from)?;
                images.push((regions.image_id, places, labels));
            }
        }
        if images.is_empty() {
            let problem = format!("no region has an objectness above {} and is larger than {} px", stage.min_objectness, stage.min_side);
            let hint = "lower `min_objectness` or `min_side`, or give embeddings of other objects".into();
            return Err(Error::Input { port: FEATURES.info().name, problem, hint });
        }
        Ok(Self { features: features.by_image()?, dim, images })
    }

    fn n_regions(&self) -> usize {
        self.images.iter().map(|(_, places, _)| places.len()).sum()
    }

    /// How many labels occur.
    fn n_labels(&self) -> usize {
        self.images.iter().flat_map(|(_, _, labels)| labels).collect::<BTreeSet<_>>().len()
    }

    /// The regions of some images, one image after the other.
    fn batch(&self, images: &[usize]) -> Result<RegionBatch> {
        let mut batch = RegionBatch { embeddings: Vec::new(), labels: Vec::new() };
        for (image, places, labels) in images.iter().map(|image| &self.images[*image]) {
            batch.embeddings.extend(rows_of(&self.features.get(*image)?.embeddings, self.dim, places));
            batch.labels.extend(labels);
        }
        Ok(batch)
    }

    /// The first regions, at least so many unless there are fewer.
    fn first(&self, n: usize) -> Result<RegionBatch> {
        let mut n_before = 0;
        let is_needed = |(image, (_, places, _)): (usize, &(ImageId, Vec<usize>, Vec<i64>))| {
            let is_needed = n_before < n;
            n_before += places.len();
            is_needed.then_some(image)
        };
        self.batch(&self.images.iter().enumerate().map_while(is_needed).collect::<Vec<_>>())
    }
}

/// Some rows of `[N, D]`.
fn rows_of(numbers: &[f32], dim: usize, places: &[usize]) -> Vec<f32> {
    places.iter().flat_map(|place| &numbers[place * dim..(place + 1) * dim]).copied().collect()
}

/// Loads the regions of a step.
struct RegionLoader<'a> {
    pool: &'a Pool,
    batch_size: usize,
    seed: u64,
    random: ChaCha8Rng,
}

impl DataLoader for RegionLoader<'_> {
    /// Images, by place.
    type Spec = Vec<usize>;
    type Batch = RegionBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (Self::Spec, usize)> + Send {
        let epoch = |epoch: u64| {
            let mut random = self.random.clone();
            random.set_stream(self.seed.wrapping_add(epoch));
            let mut images: Vec<usize> = (0..self.pool.images.len()).collect();
            images.shuffle(&mut random);
            images.chunks(self.batch_size).map(<[_]>::to_vec).collect::<Vec<_>>()
        };
        let batches = (0..).flat_map(epoch).skip(steps.start as usize).take(steps.len());
        batches.map(|images| {
            let n_regions: usize = images.iter().map(|image| self.pool.images[*image].1.len()).sum();
            (images, 4 * self.pool.dim * n_regions)
        })
    }

    fn load(&self, images: Self::Spec, _cx: &Context<'_>) -> Result<Loaded<RegionBatch>> {
        let batch = self.pool.batch(&images)?;
        let images = images.iter().map(|image| self.pool.images[*image].0.to_string()).collect();
        Ok(Loaded { batch: Some(batch), images, unreadable: Vec::new() })
    }

    fn n_images(&self) -> usize {
        self.pool.images.len()
    }
}

/// A network in training.
struct AugmenterCriterion {
    augmenter: Augmenter,
    config: Config,
    clip: Option<space::Space>,
    concepts: Concepts,
    /// `[K, D]`, of unit length.
    texts: Tensor,
    temperature: Option<f64>,
    measured: RegionBatch,
    random: ChaCha8Rng,
}

impl AugmenterCriterion {
    /// Embeddings of unit length `[R, D]` and labels `[R]` on the device.
    fn tensors(&self, batch: &RegionBatch) -> [Tensor; 2] {
        let device = self.texts.device();
        let embeddings = Tensor::from_slice(&batch.embeddings).view([-1, self.config.dim]).to_device(device);
        [ovenbird_models::to_unit_length(&embeddings), Tensor::from_slice(&batch.labels).to_device(device)]
    }
}

/// The share of augmented regions `[R, D]` that are most similar to the text of their label.
fn accuracy(augmented: &Tensor, texts: &Tensor, labels: &Tensor) -> f64 {
    augmented.matmul(&texts.tr()).argmax(1, false).eq_tensor(labels).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

impl Criterion for AugmenterCriterion {
    type Batch = RegionBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(self.augmenter.parameters().iter().map(|(name, tensor)| (name.clone(), Parameter::plain(tensor))).collect())
    }

    fn losses(&self, step: u32, batch: RegionBatch) -> Result<Losses> {
        let [regions, labels] = self.tensors(&batch);
        let mut random = self.random.clone();
        // Streams from 2^63 on: those before are of the order of images.
        random.set_stream((1 << 63) + u64::from(step));
        let augmented = self.augmenter.forward(&regions, &self.concepts, Some(&mut random))?.out();
        let augmenter::Losses { classes, regions } = augmenter::losses(&augmented, &regions, &self.texts, &labels, self.temperature)?;
        Ok(Losses { terms: vec![("classes", classes), ("regions", regions)], measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.augmenter.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: AugmenterSpec { config: self.config, clip: self.clip }.metadata() })
    }

    fn validate(&self, is_last: bool, cx: &Context<'_>) -> Result<BTreeMap<String, f64>> {
        let [regions, labels] = self.tensors(&self.measured);
        let branches: Branches = no_grad(|| self.augmenter.forward(&regions, &self.concepts, None))?;
        let [with_fine, without] = [branches.out(), branches.out_with_mean_fine()].map(|out| accuracy(&out, &self.texts, &labels));
        let spread = fine_spread(&branches.fine);
        if is_last {
            cx.note(format!(
                "accuracy on {} regions: {:.1} %, with the mean of the fine branch {:.1} %; fine spread {spread:.1e}",
                labels.size()[0],
                100.0 * with_fine,
                100.0 * without
            ));
        }
        Ok([("accuracy", with_fine), ("accuracy_mean_fine", without), ("fine_spread", spread)]
            .map(|(name, value)| (name.to_owned(), value))
            .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{detpro_ralf, numbers};

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
        assert_eq!(Train::default().config(1000).unwrap().steps, 80);
    }

    fn boxes(corners: &[f64]) -> Vec<Xyxy> {
        let box_ = |corners: &[f64; 4]| {
            let [x1, y1, x2, y2] = corners.map(|corner| corner as f32);
            Xyxy { x1, y1, x2, y2 }
        };
        corners.as_chunks::<4>().0.iter().map(box_).collect()
    }

    /// Regions that RALF's own code keeps, and parity check 18 of its specification.
    #[test]
    fn regions_are_chosen_as_by_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let all = Train { regions_per_image: usize::MAX, ..Train::default() };
        let objectness: Vec<f32> = numbers(&golden["filter/objectness"]).into_iter().map(|number| number as f32).collect();
        let found = all.chosen(&boxes(&numbers(&golden["filter/boxes"])), &objectness);
        assert_eq!(found.into_iter().map(|place| place as f64).collect::<Vec<_>>(), numbers(&golden["filter/kept"]));

        let corners =
            [[0., 0., 20., 20.], [0., 0., 50., 50.], [5., 5., 15., 40.], [5., 5., 15.02, 40.], [600., 10., 610.4, 60.], [0., 0., 99., 99.]];
        let (boxes, objectness) = (boxes(corners.as_flattened()), [0.41, 0.4, 0.9, 0.95, 0.6, 0.39]);
        assert_eq!(all.chosen(&boxes, &objectness), [0, 3, 4]);
        assert_eq!(Train { regions_per_image: 2, ..all }.chosen(&boxes, &objectness), [0, 3]);
    }

    #[test]
    fn accuracy_is_the_share_of_right_labels() {
        let axes = Tensor::eye(3, (Kind::Float, tch::Device::Cpu));
        assert!((accuracy(&axes, &axes, &Tensor::from_slice(&[0_i64, 1, 1])) - 2.0 / 3.0).abs() < 1e-9);
    }
}
