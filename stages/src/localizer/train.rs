//! `localizer/train`: trains CORA's localizer on base classes.

use std::collections::BTreeMap;

use ovenbird_models::{
    clip::regions::{BatchSizes, Layer3, Layer4, Rules},
    detection::boxes::ImageSize,
    detr::{
        Config, Content, Localizer, Outputs,
        losses::{self, Divisor, losses},
        matching::{MatchRule, Target},
        prematch::{Dropped, DroppedClasses, classify},
        split::SplitSteps,
    },
};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn, no_grad};

use super::{
    batches::{Cuts, RegionBatch, RegionLoader, Shown, Together},
    spec::{LocalizerSpec, Size, table_digest},
};
use crate::{
    Context, Error, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::Classes,
    clip::Clip,
    contract::is_default,
    detector::{
        batches::{self, DetectionLoader},
        ports::{ANNOTATIONS, CLASSES, IMAGES},
        spec::{DetectorFile, DetectorSpec},
        training::{Epochs, OptimizerKind, Training},
    },
    region::frozen::{CHECKPOINT, Frozen, Kept, PROMPTS, REGION_PROMPT, padded},
    training::{Criterion, EmaRule, Losses, MOST_NAMED, Parameter, Ports, Weights, named, train},
};

/// Trains CORA's localizer on base classes: a DAB-DETR on the maps of a frozen CLIP ResNet, whose queries are told which class they look for and which says
/// only whether they found an object.
///
/// In each image, CLIP names the boxes of all anchors by the nearest class embedding; the query of an anchor begins with that class's embedding and is matched
/// with objects of that class alone. In some steps the classes are split in two halves, and the anchors are named in each, so that second-best classes get
/// queries too. Annotations are best those of `annotations/relabel`. Maps of images that are shown in one size (`cuts.probability: 0`, ranges of one length)
/// are computed once and kept, 2 GiB of them. The defaults are CORA's for COCO, 32 images a step. (CORA, sections 7, 8 and 10.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Activation, and which CLIP of a checkpoint with several. It computes in f32.
    pub clip: Clip,
    /// Size of the localizer.
    pub size: Size,
    /// What a query knows of its class.
    pub content: Content,
    /// Normalise the projected map in 32 groups of channels. The reference does, without saying so, where a training has fewer than 25 epochs. (Defect 8.)
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub group_norm: bool,
    /// How boxes become cells of maps.
    #[serde(skip_serializing_if = "is_default")]
    pub rules: Rules,
    /// The part of the steps in which classes are split.
    pub split_share: f64,
    /// In which steps they are.
    pub split_steps: SplitSteps,
    /// What cosines of dropped classes become in these steps.
    pub dropped_classes: DroppedClasses,
    /// Which queries are matched with which objects.
    #[serde(rename = "match")]
    pub matching: MatchRule,
    /// What the losses of a layer are divided by.
    pub divisor: Divisor,
    /// How parts of images are cut out.
    pub cuts: Cuts,
    /// What the pixels of an image are computed with.
    #[serde(skip_serializing_if = "is_default")]
    pub together: Together,
    /// How the localizer is trained; `precision` is f32.
    pub training: Training,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            size: Size::default(),
            content: Content::default(),
            group_norm: false,
            rules: Rules::default(),
            split_share: 0.2,
            split_steps: SplitSteps::Fixed,
            dropped_classes: DroppedClasses::Fixed,
            matching: MatchRule::default(),
            divisor: Divisor::default(),
            cuts: Cuts::default(),
            together: Together::default(),
            training: Training {
                seed: 42,
                epochs: Some(35),
                lr_steps: Vec::new(),
                batch_size: 32,
                max_size: [1333, 1333],
                min_size: [480, 800],
                size_step: 32,
                optimizer: OptimizerKind::Adamw,
                lr: 1e-4,
                warmup_steps: 0,
                weight_decay: 1e-4,
                clip_grad_norm: Some(0.1),
                ema_decay: Some(0.99996),
                averaging: EmaRule::Fixed,
                ..Training::default()
            },
        }
    }
}

/// What cosines are multiplied by before a softmax whose largest value alone counts.
const TEMPERATURE: f64 = 100.0;

const PORTS: Ports<DetectorFile> = Ports::new(
    Out::new("localizer", "Weights under CORA's names, safetensors, f32, and how the network is built; one file for each checkpoint kept."),
    "network.safetensors",
);

impl Stage for Train {
    const KIND: &'static str = "localizer/train";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), CHECKPOINT.info(), REGION_PROMPT.info(), PROMPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_f32 = self.training.precision == Training::default().precision;
        let mut problems = Problem::unless(&[
            ("split_share", (0.0..=1.0).contains(&self.split_share), "a number from 0 to 1"),
            ("training.precision", is_f32, "f32"),
        ]);
        problems.extend(self.cuts.check());
        problems.extend(self.training.check());
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        batches::units(&self.training, Epochs::default(), inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let prompts = cx.inputs.read(PROMPTS)?;
        let frozen = Frozen::load(&self.clip, &cx.inputs.read(CHECKPOINT)?, cx.inputs.read_if_given(REGION_PROMPT)?, self.rules, cx)?;
        let texts = frozen.texts(&prompts, &classes.base, cx)?;
        let table = frozen.regions()?.table().shallow_clone();
        let config = Config { content: self.content, group_norm: self.group_norm, ..self.size.config(table.size()[1] / 2, frozen.dim()) };
        let spec = LocalizerSpec {
            config,
            fits: self.training.fits(),
            rules: self.rules,
            clip: Some(frozen.space),
            region_prompt: Some(table_digest(&table)?),
        };
        let store = nn::VarStore::new(cx.device);
        let localizer = Localizer::new(&store.root(), &config, self.training.seed)?;
        let loader = DetectionLoader::new(&self.training, Epochs::default(), cx)?;
        loader.look_for_images(cx)?;
        let loader = RegionLoader::new(loader, &self.cuts, self.together)?;
        let kept = loader.shows_few_views().then(Kept::default);
        let epoch = loader.steps_per_epoch();
        let criterion = LocalizerCriterion { stage: self, frozen: &frozen, localizer, spec, texts, kept, epoch };
        train(&loader.config(), &loader, &criterion, &PORTS, units, cx)
    }
}

/// A localizer in training.
struct LocalizerCriterion<'a> {
    stage: &'a Train,
    frozen: &'a Frozen,
    localizer: Localizer,
    spec: LocalizerSpec,
    /// f32 `[K, D]` of unit length.
    texts: Tensor,
    /// Maps of images that are shown in few ways.
    kept: Option<Kept>,
    /// Steps of an epoch.
    epoch: u32,
}

/// Maps of the images of a batch.
struct Maps {
    /// Layer 3, `[B, C, h, w]`, padded.
    layer3: Tensor,
    /// Its rows and columns that are not padding.
    valid: Vec<[i64; 2]>,
    /// Layer 4, of each image or of all together.
    layer4: Vec<Layer4>,
}

impl LocalizerCriterion<'_> {
    fn maps(&self, batch: &RegionBatch) -> Result<Maps> {
        let (regions, device) = (self.frozen.regions()?, self.texts.device());
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.view.to().into()).collect();
        if let ([all], true) = (&batch.pixels[..], sizes.len() > 1) {
            let layer3 = regions.layer3(&all.on(device), &sizes)?;
            let (valid, layer4) = (layer3.valid(), vec![regions.layer4(&layer3)?]);
            return Ok(Maps { layer3: layer3.features, valid, layer4 });
        }
        let (mut maps, mut valid, mut layer4) = (Vec::new(), Vec::new(), Vec::new());
        for ((image, pixels), size) in batch.images.iter().zip(&batch.pixels).zip(sizes) {
            let make = || {
                let layer3: Layer3 = regions.layer3(&pixels.on(device), &[size])?;
                Ok(vec![regions.layer4(&layer3)?.features, layer3.features])
            };
            let of_image = match &self.kept {
                Some(kept) => kept.get((image.place, image.view.is_mirrored()), make)?,
                None => make()?,
            };
            let [of_layer4, of_layer3] = <[Tensor; 2]>::try_from(of_image).expect("BUG: two maps of an image");
            let sizes = BatchSizes { padded: padded(size), images: vec![size] };
            layer4.push(Layer4 { features: of_layer4, sizes: sizes.clone() });
            let layer3 = Layer3 { features: of_layer3, sizes };
            valid.extend(layer3.valid());
            maps.push(layer3.features);
        }
        let [height, width] = [2, 3].map(|axis: usize| maps.iter().map(|map| map.size()[axis]).max().unwrap_or(1));
        let filled = |map: &Tensor| map.constant_pad_nd([0, width - map.size()[3], 0, height - map.size()[2]]);
        Ok(Maps { layer3: Tensor::cat(&maps.iter().map(filled).collect::<Vec<_>>(), 0), valid, layer4 })
    }

    /// What the localizer makes of maps, and the classes of its anchors, i64 `[B, N]`. Where classes are split, the batch is there twice: `of_second` are
    /// those that the first copy does without. `dropout`: its generator; without it nothing is dropped.
    fn outputs(&self, maps: &Maps, of_second: Option<&[bool]>, mut dropout: Option<&mut ChaCha8Rng>) -> Result<(Outputs, Tensor)> {
        let Maps { layer3, valid, layer4 } = maps;
        let cosines = no_grad(|| -> Result<Tensor> {
            let (regions, anchors) = (self.frozen.regions()?, self.localizer.anchors().sigmoid());
            let features = layer4.iter().map(|map| Ok(regions.fast(map, &anchors)?)).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::cat(&features, 0).matmul(&self.texts.tr()))
        })?;
        let named = |dropped: Option<&[bool]>| {
            let dropped = dropped.map(|classes| Dropped { classes, rule: self.stage.dropped_classes });
            Ok::<_, Error>(classify(&cosines, TEMPERATURE, None, dropped)?.classes)
        };
        let memory = self.localizer.encode(&layer3.to_device(self.texts.device()), valid, dropout.as_deref_mut())?;
        let (memory, classes) = match of_second {
            Some(of_second) => {
                let of_first: Vec<bool> = of_second.iter().map(|second| !second).collect();
                (memory.repeated(2), Tensor::cat(&[named(Some(of_second))?, named(Some(&of_first))?], 0))
            }
            None => (memory, named(None)?),
        };
        Ok((self.localizer.decode(&memory, &self.texts, &classes, dropout)?, classes))
    }

    /// Compares outputs with the objects of the images; of as many copies as there are of each.
    fn compare(&self, outputs: &Outputs, classes: &Tensor, objects: &[Target]) -> Result<losses::Losses> {
        let n_copies = classes.size()[0] as usize / objects.len().max(1);
        let copy = |target: &Target| Target { boxes: target.boxes.shallow_clone(), labels: target.labels.shallow_clone() };
        let targets: Vec<Target> = (0..n_copies).flat_map(|_| objects.iter().map(copy)).collect();
        Ok(losses(outputs, classes, &targets, &self.stage.matching, self.stage.divisor)?)
    }
}

impl Criterion for LocalizerCriterion<'_> {
    type Batch = RegionBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        self.stage.training.grouped(self.localizer.parameters())
    }

    fn losses(&self, step: u32, mut batch: RegionBatch) -> Result<Losses> {
        let maps = no_grad(|| self.maps(&batch))?;
        let (epoch, of_epoch) = (step / self.epoch, step % self.epoch);
        let is_split = self.stage.split_steps.splits(self.stage.split_share, self.stage.training.seed, epoch, of_epoch);
        let halves = || (0..self.texts.size()[0]).map(|_| batch.random.random::<f64>() > 0.5).collect::<Vec<bool>>();
        let of_second = is_split.then(halves);
        let ids: Vec<String> = batch.images.iter().map(|image| image.id.to_string()).collect();
        let diverged = |error: Error| match error {
            // Of numbers that are not finite, which have no other cause here.
            Error::Models(error) => Error::Input {
                port: "lr",
                problem: format!("{error}, at step {step}, on images {}", named(&ids, MOST_NAMED)),
                hint: "lower `lr`, or look at these images; the last checkpoint is kept".into(),
            },
            other => other,
        };
        let (outputs, classes) = self.outputs(&maps, of_second.as_deref(), Some(&mut batch.random)).map_err(diverged)?;
        let target = |image: &Shown| Target {
            boxes: Tensor::from_slice(image.boxes.as_flattened()).view([-1, 4]),
            labels: Tensor::from_slice(&image.classes.iter().map(|class| *class as i64).collect::<Vec<_>>()),
        };
        let found = self.compare(&outputs, &classes, &batch.images.iter().map(target).collect::<Vec<_>>()).map_err(diverged)?;
        let [objectness, boxes, overlaps] = found.weighted();
        let mut all = Losses { terms: vec![("objectness", objectness), ("boxes", boxes), ("overlaps", overlaps)], measures: Vec::new() };
        if let (false, Some(share)) = (is_split, found.matched_share()) {
            all.measures.push(("matched", Tensor::from(share).to_kind(Kind::Float).to_device(self.texts.device())));
        }
        Ok(all)
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.localizer.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: DetectorSpec::Localizer(self.spec.clone()).metadata() })
    }
}

#[cfg(test)]
mod tests;
