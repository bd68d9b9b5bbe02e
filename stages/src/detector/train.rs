//! `detector/train`: a two-stage detector, trained on base classes.
//!
//! The work is a chain of units. What a step sees (which images, their sizes, which are mirrored, which boxes are learned from) follows
//! from the recipe and the step's number alone; with the weights and the optimizer's velocities of the link before, a training that was
//! killed anywhere ends with the same bytes.

use std::collections::{BTreeMap, VecDeque};

use ovenbird_data::{
    annotations::ImageId,
    boxes::Xyxy,
    training::{self, Placement, Sample},
};
use ovenbird_models::{
    Misfit, Phase,
    checkpoint::Checkpoint,
    detector::{
        Config, Detector, REGION_CODER,
        boxes::{ImageSize, Suppression, boxes_tensor},
        classifier::{LogitScale, Vocabulary},
        heads::{RegionRule, region_losses},
        layout,
        matching::{Assigner, Sampler},
        rpn::ProposalRule,
    },
};
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn, no_grad};

use super::{ANNOTATIONS, CARD_KEY, CLASSES, Card, DetectorFile, IMAGES, Named, PROMPTS, Pixels, class_embeddings};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{CheckpointFile, Classes, Images, RegionFeatures, Regions, RegionsByImage, TrainingState},
    detect::category_ids,
    feed::stream,
};

/// Bytes of batches that may be ahead of the network.
const ROOM: usize = 128 << 20;
/// Above this a loss has exploded.
const MOST_LOSS: f64 = 1e4;

/// How large the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// ResNet-50 of caffe style, a pyramid of 256 channels with batch normalisation, heads of four convolutions: OADP's.
    #[default]
    R50,
    /// A ResNet-18 of a quarter of the width, 64 channels, for images of 128 to 320 px: learns from nothing in minutes on two cores.
    Toy,
}

/// A factor of a loss that grows linearly to its full size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LossWeight {
    /// The factor in the end.
    pub gain: f64,
    /// After how many steps; 0 for at once.
    pub warm_up_steps: u32,
}

impl LossWeight {
    /// At a step, counted from 1. (OADP, section 6.4.)
    fn at(self, step: u32) -> f64 {
        self.gain * (f64::from(step) / f64::from(self.warm_up_steps.max(1))).min(1.0)
    }
}

/// Trains an open-vocabulary two-stage detector on base classes: ViLD's text branch, and with `features` its image branch.
///
/// The box head tells base classes apart by their embeddings and corrects boxes; the object head learns to give regions the embeddings that
/// CLIP gave them. SGD with momentum, linear warm-up, steps. The defaults are ViLD's for COCO on 16 images a step. (Gu et al. 2022; OADP,
/// sections 6.1 to 6.5.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// How large the network is.
    pub network: Network,
    /// First values, order, sizes and samples follow from it.
    pub seed: u64,
    /// Steps of the optimizer.
    pub steps: u32,
    /// Images of a step.
    pub batch: usize,
    /// Steps between checkpoints.
    pub steps_per_unit: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate grows from a thousandth of the peak.
    pub warm_up_steps: u32,
    /// At these steps the learning rate falls to a tenth.
    pub decay_steps: Vec<u32>,
    /// Factors of the learning rate for parameters whose names begin so; the longest beginning counts.
    pub rate_factors: BTreeMap<String, f64>,
    /// Of the gradients' moving sum.
    pub momentum: f64,
    /// Decay of every parameter.
    pub weight_decay: f64,
    /// Gradients are shortened to this length all together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub most_gradient: Option<f64>,
    /// Images are fitted into a longer side drawn from here, from the first to the last, in px; detection takes the last.
    pub longer_side: [u32; 2],
    /// And into a shorter side drawn from here.
    pub shorter_side: [u32; 2],
    /// Images of classes in less than this part of the images are seen more often (LVIS: 0.001); 0 for none.
    pub repeat_threshold: f64,
    /// Divides cosines in training.
    pub train_temperature: f64,
    /// Divides cosines in detection.
    pub test_temperature: f64,
    /// Of the mean absolute difference between the object head's embeddings and CLIP's.
    pub object_loss: LossWeight,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            network: Network::R50,
            seed: 3407,
            steps: 40_000,
            batch: 16,
            steps_per_unit: 1000,
            learning_rate: 0.02,
            warm_up_steps: 500,
            decay_steps: vec![30_000],
            rate_factors: BTreeMap::new(),
            momentum: 0.9,
            weight_decay: 2.5e-5,
            most_gradient: None,
            longer_side: [1330, 1333],
            shorter_side: [640, 800],
            repeat_threshold: 0.0,
            train_temperature: 0.01,
            test_temperature: 0.007,
            object_loss: LossWeight { gain: 256.0, warm_up_steps: 200 },
        }
    }
}

const FEATURES: In<RegionFeatures> =
    In::optional("features", "CLIP embeddings of regions of the same images (`clip/objects`), for the object head to learn.");
const PRETRAINED: In<CheckpointFile> =
    In::optional("pretrained", "Weights to begin with: of mmdet, torchvision, a ResNet, or SoCo. What does not fit is listed.");
const DETECTOR: Out<DetectorFile> = Out::new("detector", "Weights under mmdet's names, safetensors, f32, and how the network is built.");
const STATE: Out<TrainingState> = Out::new("state", "What the next unit continues from besides the weights: velocities.");

impl Stage for Train {
    const KIND: &'static str = "detector/train";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), PROMPTS.info(), FEATURES.info(), PRETRAINED.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTOR.info(), STATE.info()];

    fn check(&self) -> Vec<Problem> {
        let is_range = |[low, high]: [u32; 2]| low <= high && low >= 32;
        let is_part = |number: f64| (0.0..1.0).contains(&number);
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        Problem::unless(&[
            ("steps", self.steps > 0, "at least 1"),
            ("batch", self.batch > 0, "at least 1"),
            ("steps_per_unit", self.steps_per_unit > 0, "at least 1"),
            ("learning_rate", is_positive(self.learning_rate), "a number above 0"),
            ("rate_factors", self.rate_factors.values().all(|factor| *factor >= 0.0 && factor.is_finite()), "numbers from 0 on"),
            ("momentum", is_part(self.momentum), "a number from 0 to below 1"),
            ("weight_decay", is_part(self.weight_decay), "a number from 0 to below 1"),
            ("most_gradient", self.most_gradient.is_none_or(is_positive), "a number above 0"),
            ("longer_side", is_range(self.longer_side), "two sides from 32 px on, the smaller first"),
            ("shorter_side", is_range(self.shorter_side), "two sides from 32 px on, the smaller first"),
            ("repeat_threshold", is_part(self.repeat_threshold), "a number from 0 to below 1"),
            ("train_temperature", is_positive(self.train_temperature), "a number above 0"),
            ("test_temperature", is_positive(self.test_temperature), "a number above 0"),
            ("object_loss", self.object_loss.gain >= 0.0 && self.object_loss.gain.is_finite(), "a gain from 0 on"),
        ])
    }

    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(Units::Chain { links: self.steps.div_ceil(self.steps_per_unit) })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Some(first) = units.first() else { return Ok(()) };
        let mut training = Training::begin(self, cx)?;
        let course = Course::of(self, training.card.config.embed_dim as usize, cx)?;
        if first.index > 0 {
            training.restore(&cx.published(first.index - 1, DETECTOR)?, &cx.published(first.index - 1, STATE)?)?;
        }
        let last = units[units.len() - 1].index as u32;
        let steps = first.index as u32 * self.steps_per_unit..self.steps.min((last + 1) * self.steps_per_unit);
        let end = steps.end;
        cx.total(steps.len() as u64);
        let (mut units, mut open): (VecDeque<&Unit>, Option<OpenUnit>) = (units.iter().collect(), None);
        let mut batches = course.batches(steps);
        stream(
            cx.threads,
            ROOM,
            || Ok(batches.next()),
            |plan: Plan| cx.attempt(|| course.batch(&plan)),
            |batch, n_ready| {
                if open.is_none() {
                    let unit = units.pop_front().expect("BUG: as many units as their steps");
                    open = Some(OpenUnit { draft: cx.begin(unit)?, sums: BTreeMap::new(), n_steps: 0 });
                }
                let batch = batch.result?;
                let losses = training.step(self, &batch, &mut course.random(Random::Samples(batch.step)))?;
                let unit = open.as_mut().expect("BUG: a unit is open");
                unit.n_steps += 1;
                for (name, loss) in losses {
                    *unit.sums.entry(name).or_default() += loss;
                }
                cx.flow(batch.images.len(), n_ready);
                cx.tick(1);
                if (batch.step + 1) % self.steps_per_unit == 0 || batch.step + 1 == end {
                    let OpenUnit { draft, sums, n_steps } = open.take().expect("BUG: a unit is open");
                    training.save(&draft)?;
                    let mut metrics: BTreeMap<String, serde_json::Value> =
                        sums.into_iter().map(|(name, sum)| (format!("loss.{name}"), (sum / f64::from(n_steps)).into())).collect();
                    metrics.insert("learning_rate".into(), self.rate_at(batch.step).into());
                    cx.commit(draft, metrics)?;
                }
                cx.proceed()
            },
        )
    }
}

/// A link in the making.
struct OpenUnit {
    draft: UnitDraft,
    /// Of each loss, over the steps so far.
    sums: BTreeMap<&'static str, f64>,
    n_steps: u32,
}

impl Train {
    /// The learning rate of a step, counted from 0. (mmdet; OADP, section 6.5.)
    fn rate_at(&self, step: u32) -> f64 {
        let n_falls = self.decay_steps.iter().filter(|at| step >= **at).count() as i32;
        let warm = if step < self.warm_up_steps { 0.001 + 0.999 * f64::from(step) / f64::from(self.warm_up_steps) } else { 1.0 };
        self.learning_rate * warm * 0.1_f64.powi(n_falls)
    }

    /// A step of SGD with momentum, as PyTorch's, down the parameters' gradients.
    fn descend(&self, step: u32, parameters: &[(&String, &Tensor)], velocities: &mut Named) {
        no_grad(|| {
            let gradients =
                || parameters.iter().map(|(name, tensor)| (name, tensor, tensor.grad())).filter(|(.., gradient)| gradient.defined());
            let shortening = self.most_gradient.map_or(1.0, |most| {
                let squares: Vec<Tensor> = gradients().map(|(.., gradient)| gradient.square().sum(Kind::Float)).collect();
                let length = Tensor::stack(&squares, 0).sum(Kind::Double).sqrt().double_value(&[]);
                (most / (length + 1e-6)).min(1.0)
            });
            for (name, tensor, gradient) in gradients() {
                let factor = self.rate_factors.iter().filter(|(start, _)| name.starts_with(*start)).max_by_key(|(start, _)| start.len());
                let rate = self.rate_at(step) * factor.map_or(1.0, |(_, factor)| *factor);
                let velocity = velocities.get_mut(*name).expect("BUG: every trained parameter has a velocity");
                *velocity *= self.momentum;
                *velocity += gradient * shortening + *tensor * self.weight_decay;
                let mut tensor = tensor.shallow_clone();
                tensor -= &*velocity * rate;
            }
        });
    }

    fn config(&self, embed_dim: i64, has_features: bool) -> Config {
        let config = match self.network {
            Network::R50 => Config::oadp(embed_dim),
            Network::Toy => Config::toy(embed_dim),
        };
        let object_head = config.object_head.filter(|_| has_features);
        Config { object_head, block_head: None, has_global_head: false, ..config }
    }

    fn card(&self, embed_dim: i64, inputs: &Inputs) -> Card {
        let is_given = |port: PortInfo| inputs.ports.contains_key(port.name);
        Card {
            config: self.config(embed_dim, is_given(FEATURES.info())),
            has_prompts: is_given(PROMPTS.info()),
            fits: [self.longer_side[1], self.shorter_side[1]],
            scale: LogitScale::Temperature { train: self.train_temperature, test: self.test_temperature },
        }
    }
}

/// What is seen at which step.
struct Course {
    images: Images,
    samples: Vec<Sample>,
    /// Places in `samples`, rare ones more than once.
    copies: Vec<usize>,
    /// Embeddings to learn.
    features: Option<RegionsByImage>,
    embed_dim: usize,
    batch: usize,
    sides: [[u32; 2]; 2],
    random: ChaCha8Rng,
}

/// What random numbers are for.
#[derive(Clone, Copy)]
enum Random {
    /// How the images of a step are shown.
    Placements(u32),
    /// Which anchors and regions of a step are learned from.
    Samples(u32),
    /// The order of an epoch.
    Order(u64),
}

/// A step and what it sees: places in the samples, and how they are shown.
struct Plan {
    step: u32,
    images: Vec<(usize, Placement)>,
}

/// What a step sees.
struct Batch {
    step: u32,
    pixels: Pixels,
    images: Vec<Shown>,
}

/// An image of a batch, boxes in px of what the network sees.
struct Shown {
    id: ImageId,
    size: ImageSize,
    objects: Vec<Xyxy>,
    classes: Vec<i64>,
    /// Boxes of embeddings, and these, `[N, D]`.
    regions: Vec<Xyxy>,
    embeddings: Vec<f32>,
}

impl Course {
    fn of(stage: &Train, embed_dim: usize, cx: &Context<'_>) -> Result<Self> {
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let samples = training::samples(&annotations, &category_ids(&annotations, classes.base.iter())?);
        if samples.is_empty() {
            let problem = format!("none of {} images shows a base class and is at least 32 px wide and high", annotations.images.len());
            let hint = "use the annotations and the classes of the same split".into();
            return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
        }
        let repeats = match stage.repeat_threshold {
            0.0 => vec![1; samples.len()],
            threshold => training::repeats(&samples, threshold),
        };
        let copies = repeats.into_iter().enumerate().flat_map(|(place, n)| std::iter::repeat_n(place, n)).collect();
        let features = cx.inputs.read_if_given(FEATURES)?.map(|features| features_of(&features, &samples)).transpose()?;
        let random = cx.rng(&cx.units[0]);
        let sides = [stage.longer_side, stage.shorter_side];
        Ok(Self { images: cx.inputs.read(IMAGES)?, samples, copies, features, embed_dim, batch: stage.batch, sides, random })
    }

    /// Random numbers for something: no two things share any.
    fn random(&self, of: Random) -> ChaCha8Rng {
        let mut random = self.random.clone();
        random.set_stream(match of {
            Random::Placements(step) => 2 * u64::from(step),
            Random::Samples(step) => 2 * u64::from(step) + 1,
            Random::Order(epoch) => u64::MAX - epoch,
        });
        random
    }

    /// Every image once, rare ones more often, wide and tall ones apart.
    fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order = self.copies.clone();
        order.shuffle(&mut self.random(Random::Order(epoch)));
        let is_tall = |place: usize| self.samples[place].info.height > self.samples[place].info.width;
        training::batches(&order, is_tall, self.batch)
    }

    fn batches(&self, steps: std::ops::Range<u32>) -> impl Iterator<Item = (Plan, usize)> + Send {
        let all = (0..).flat_map(|epoch| self.epoch(epoch)).skip(steps.start as usize);
        steps.zip(all).map(|(step, places)| {
            let mut random = self.random(Random::Placements(step));
            let images: Vec<(usize, Placement)> = places.into_iter().map(|place| (place, self.placement(place, &mut random))).collect();
            let bytes = images.iter().map(|(_, placement)| 12 * placement.to[0] as usize * placement.to[1] as usize).sum();
            (Plan { step, images }, bytes)
        })
    }

    fn placement(&self, place: usize, random: &mut ChaCha8Rng) -> Placement {
        let info = &self.samples[place].info;
        let [longer, shorter] = self.sides.map(|[low, high]| random.random_range(low..=high));
        let placement = Placement::fitting([info.width, info.height], longer, shorter);
        if random.random_bool(0.5) { placement.mirrored() } else { placement }
    }

    fn batch(&self, plan: &Plan) -> Result<Batch> {
        let (mut pictures, mut images) = (Vec::new(), Vec::new());
        for (place, placement) in &plan.images {
            let Sample { info, objects } = &self.samples[*place];
            pictures.push(placement.pixels(&self.images.decode(&info.file_name, placement.from)?));
            let (mut regions, mut embeddings) = (Vec::new(), Vec::new());
            if let Some(features) = &self.features {
                let found = features.get(info.id)?;
                self.check_dim(&found)?;
                regions = found.boxes.iter().map(|xyxy| placement.show(xyxy)).collect();
                embeddings = found.embeddings;
            }
            images.push(Shown {
                id: info.id,
                size: ImageSize { width: placement.to[0].into(), height: placement.to[1].into() },
                objects: objects.iter().map(|object| placement.show(&object.xyxy)).collect(),
                classes: objects.iter().map(|object| object.class as i64).collect(),
                regions,
                embeddings,
            });
        }
        Ok(Batch { step: plan.step, pixels: Pixels::of(&pictures), images })
    }

    /// Refuses embeddings of another space than the detector's.
    fn check_dim(&self, Regions { image_id, boxes, embeddings, .. }: &Regions) -> Result<()> {
        if embeddings.len() == boxes.len() * self.embed_dim {
            return Ok(());
        }
        let (found, expected) = (embeddings.len() / boxes.len().max(1), self.embed_dim);
        let problem = format!("image {image_id}: embeddings have {found} numbers, class embeddings {expected}");
        Err(Error::Input { port: FEATURES.info().name, problem, hint: "make the prompts and the features with the same CLIP".into() })
    }
}

/// The embeddings of every sample's regions. Images without an entry are named.
fn features_of(features: &RegionFeatures, samples: &[Sample]) -> Result<RegionsByImage> {
    let found = features.by_image()?;
    let missing: Vec<ImageId> = samples.iter().map(|sample| sample.info.id).filter(|image| !found.has(*image)).collect();
    let Some(first) = missing.first() else { return Ok(found) };
    let problem = format!("none for {} of {} images, image {first} among them", missing.len(), samples.len());
    let hint = "make them for these annotations: `clip/objects` with the same `annotations`".into();
    Err(Error::Input { port: FEATURES.info().name, problem, hint })
}

/// A network being trained, with its optimizer.
struct Training {
    detector: Detector,
    card: Card,
    vocabulary: Vocabulary,
    n_classes: i64,
    /// Of each trained parameter.
    velocities: Named,
    weights: nn::VarStore,
}

impl Training {
    fn begin(stage: &Train, cx: &Context<'_>) -> Result<Self> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let embeddings = class_embeddings(cx.inputs, &classes)?;
        let card = stage.card(embeddings.size()[1], cx.inputs);
        let weights = nn::VarStore::new(cx.device);
        let detector = Detector::new(&weights.root(), &card.config, stage.seed)?;
        if let Some(file) = cx.inputs.read_if_given(PRETRAINED)? {
            let report = layout::load(Checkpoint::open(&file.path)?.tensors(), detector.parameters(), &file.path)?;
            let names = |misfits: &[Misfit]| misfits.iter().map(|misfit| misfit.name.as_str()).collect::<Vec<_>>().join(", ");
            cx.note(format!("begins with {} tensors of {}", report.loaded.len(), file.path.display()));
            for (what, misfits) in [
                ("begin without them, which are not in the file", &report.missing),
                ("of the file have no place in the network", &report.unmatched),
                ("have another shape in the file, and begin without it", &report.misshaped),
            ] {
                if !misfits.is_empty() {
                    cx.note(format!("{} tensors {what}: {}", misfits.len(), names(misfits)));
                }
            }
        }
        let velocities = trained(&detector).map(|(name, tensor)| (name.clone(), tensor.detach().zeros_like())).collect();
        let (n_classes, n_base) = (classes.all().count() as i64, classes.base.len() as i64);
        let vocabulary = Vocabulary::new(embeddings.to_device(cx.device), n_base, card.scale)?;
        Ok(Self { detector, card, vocabulary, n_classes, velocities, weights })
    }

    /// Learns from a batch; returns each loss, weighted.
    fn step(&mut self, stage: &Train, batch: &Batch, random: &mut ChaCha8Rng) -> Result<Vec<(&'static str, f64)>> {
        let losses = self.losses(stage, batch, random)?;
        let names = losses.iter().map(|(name, _)| *name);
        let all = Tensor::stack(&losses.iter().map(|(_, loss)| loss.shallow_clone()).collect::<Vec<_>>(), 0);
        let values = all.detach().to_device(Device::Cpu).to_kind(Kind::Double);
        let values = Vec::<f64>::try_from(values).map_err(ovenbird_models::Error::from)?;
        let total: f64 = values.iter().sum();
        if !total.is_finite() || total > MOST_LOSS {
            let images: Vec<String> = batch.images.iter().map(|image| image.id.to_string()).collect();
            return Err(Error::Input {
                port: "learning_rate",
                problem: format!("the loss is {total} at step {}, on images {}", batch.step, images.join(", ")),
                hint: "lower `learning_rate`, or look at these images; the last checkpoint is kept".into(),
            });
        }
        for (_, tensor) in trained(&self.detector) {
            tensor.shallow_clone().zero_grad();
        }
        all.sum(Kind::Float).backward();
        let parameters: Vec<(&String, &Tensor)> = trained(&self.detector).collect();
        stage.descend(batch.step, &parameters, &mut self.velocities);
        Ok(names.zip(values).collect())
    }

    fn losses(&self, stage: &Train, batch: &Batch, random: &mut ChaCha8Rng) -> Result<Vec<(&'static str, Tensor)>> {
        let Detector { regions: network, bbox_head, object_head, .. } = &self.detector;
        let pyramid = network.forward(&batch.pixels.on(self.weights.device()), Phase::Train)?;
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
        let objects: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.objects)).collect();
        let rpn = network.rpn.losses(&pyramid.predictions, &sizes, &objects, random)?;

        let proposals = network.rpn.proposals(&pyramid.predictions, &sizes, &PROPOSALS)?;
        let mut samples = Vec::new();
        for ((found, objects), image) in proposals.iter().zip(&objects).zip(&batch.images) {
            let classes = Tensor::from_slice(&image.classes);
            samples.push(SAMPLES.choose(&found.boxes, objects, &classes, self.n_classes, random)?);
        }
        let chosen: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let said = bbox_head.forward(&pyramid.pool(&self.card.config.pool, &chosen)?, Phase::Train)?;
        let logits = bbox_head.classifier.logits(&said.embeddings, &self.vocabulary, Phase::Train)?;
        let deltas = said.deltas.expect("BUG: the box head has boxes");
        let of_regions = region_losses(&logits, &deltas, &samples)?;
        let mut losses = vec![
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", of_regions.classes),
            ("boxes", of_regions.boxes),
        ];

        if let Some(head) = object_head {
            let regions: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.regions)).collect();
            let said = head.forward(&pyramid.pool(&self.card.config.pool, &regions)?, Phase::Train)?;
            let embeddings: Vec<f32> = batch.images.iter().flat_map(|image| &image.embeddings).copied().collect();
            let expected = Tensor::from_slice(&embeddings).view([-1, self.card.config.embed_dim]).to_device(self.weights.device());
            // The mean of nothing is not a number.
            let n_numbers = expected.numel().max(1) as f64;
            let apart = (said.embeddings - expected).abs().sum(Kind::Float) / n_numbers;
            losses.push(("objects", apart * stage.object_loss.at(batch.step + 1)));
        }
        Ok(losses)
    }

    fn save(&self, draft: &UnitDraft) -> Result<()> {
        let card = serde_json::to_string(&self.card).expect("BUG: a card is plain JSON");
        let metadata = BTreeMap::from([(CARD_KEY.to_owned(), card)]);
        draft.write_tensors(DETECTOR, "detector.safetensors", self.detector.parameters(), &metadata)?;
        draft.write_tensors(STATE, "state.safetensors", &self.velocities, &BTreeMap::new())
    }

    fn restore(&mut self, file: &DetectorFile, state: &TrainingState) -> Result<()> {
        layout::load(Checkpoint::open(&file.path)?.tensors(), self.detector.parameters(), &file.path)?.require_all(&file.path)?;
        let state = Checkpoint::open(&state.path)?;
        for (name, velocity) in &mut self.velocities {
            no_grad(|| -> Result<()> {
                velocity.copy_(&state.tensor(name)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Which proposals are made in training.
const PROPOSALS: ProposalRule = ProposalRule { per_level: 2000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 };
/// Which regions are learned from.
const SAMPLES: RegionRule = RegionRule {
    assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
    sampler: Sampler { n: 512, object_fraction: 0.25 },
    coder: REGION_CODER,
};

/// The parameters that are trained, by name.
fn trained(detector: &Detector) -> impl Iterator<Item = (&String, &Tensor)> {
    detector.parameters().iter().filter(|(_, tensor)| tensor.requires_grad())
}

/// `[N, 4]`.
fn boxes(boxes: &[Xyxy]) -> Tensor {
    boxes_tensor(&boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The schedules of OADP for COCO: parity check D7 of its specification.
    #[test]
    fn rates_and_weights_of_losses_are_those_of_the_specification() {
        let stage = Train::default();
        for (step, rate) in [(0, 2e-5), (250, 0.010_01), (499, 0.019_960_04), (500, 0.02), (29_999, 0.02), (30_000, 0.002)] {
            assert!((stage.rate_at(step) - rate).abs() < 1e-12, "{step}: {}", stage.rate_at(step));
        }
        for (step, weight) in [(1, 1.28), (100, 128.0), (200, 256.0), (300, 256.0)] {
            assert!((stage.object_loss.at(step) - weight).abs() < 1e-9, "{step}");
        }
        let at_once = LossWeight { gain: 3.0, warm_up_steps: 0 };
        assert!((at_once.at(1) - 3.0).abs() < 1e-12);
    }

    #[derive(Deserialize)]
    struct Step {
        rate: f64,
        a: [f32; 3],
        b: [f32; 3],
    }

    #[test]
    fn a_step_descends_as_torch_s() {
        let stage = Train {
            learning_rate: 0.1,
            warm_up_steps: 0,
            decay_steps: vec![2],
            weight_decay: 0.01,
            most_gradient: Some(2.0),
            ..Train::default()
        };
        let [a, b] = [[0.5_f32, -1.0, 2.0], [1.5, 0.25, -0.75]].map(|numbers| Tensor::from_slice(&numbers).set_requires_grad(true));
        let names = ["a".to_owned(), "b".to_owned()];
        let mut velocities: Named = names.iter().map(|name| (name.clone(), Tensor::zeros([3], (Kind::Float, Device::Cpu)))).collect();
        let expected: Vec<Step> = serde_json::from_str(include_str!("../../../tests/golden/training/sgd.json")).unwrap();
        for (step, expected) in expected.iter().enumerate() {
            assert!((stage.rate_at(step as u32) - expected.rate).abs() < 1e-12);
            for tensor in [&a, &b] {
                tensor.shallow_clone().zero_grad();
            }
            ((&a * &a * &b).sum(Kind::Float) + (&b * &b).sum(Kind::Float)).backward();
            stage.descend(step as u32, &[(&names[0], &a), (&names[1], &b)], &mut velocities);
            for (found, expected) in [(&a, expected.a), (&b, expected.b)] {
                let apart = (found - Tensor::from_slice(&expected)).abs().max().double_value(&[]);
                assert!(apart < 1e-6, "step {step}: {apart}");
            }
        }
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
        let wrong = Train { batch: 0, shorter_side: [800, 640], momentum: 1.0, ..Train::default() };
        let fields: Vec<String> = Stage::check(&wrong).into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["batch", "momentum", "shorter_side"]);
    }
}
