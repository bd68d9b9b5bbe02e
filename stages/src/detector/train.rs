//! `detector/train`: trains a two-stage detector on base classes.

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    ral::{self, Ral},
    rcnn::{classifier::LogitScale, heads::RegionRule, regions::RegionsConfig},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    batches::{self, DetectionLoader},
    classes::{class_embeddings, selected_prompts, spaces_of_prompts},
    cosine::{self, CosineCriterion},
    criterion::{Crowds, MaskRcnnCriterion, region_rule},
    distillation::Distillation,
    images::Normalisation,
    ports::{ANNOTATIONS, CLASSES, IMAGES, MULTILABEL_PROMPTS, PRETRAINED, PROMPTS},
    pretrained::load_pretrained,
    sigmoid::SigmoidCriterion,
    spec::{CosineSpec, DetectorFile, DetectorSpec, ExtraHeads, MaskRcnnSpec, Network, SigmoidSpec},
    start::{self, START, START_STATE},
    training::{Epochs, Training},
    web::{MixedLoader, SelfTraining, WEB, WEB_IMAGES, WebImages},
};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, ImageFeatures, Negatives, RegionFeatures},
    clip::{Space, space},
    contract::is_default,
    training::{Criterion, DataLoader, Ports, TrainingConfig, train_from},
};

/// How the box head classifies regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// By class embeddings, with a softmax over classes and background (ViLD, OADP).
    #[default]
    Embeddings,
    /// By a linear classifier of base classes, each with a sigmoid, trained with a focal loss; of the losses of `distillation` only `objects` is
    /// used, on every proposal in `features`. Images are normalised by CLIP's statistics. (LP-OVOD, section 5.)
    Sigmoid,
    /// By `prompts`, the class embeddings of base and novel classes: the score of each class is a sigmoid of a scaled cosine, and none is of background. The
    /// scale is learned. Images of the web with one label each (`web_images`, `web`) teach novel classes. `low_quality_iou` is 0.5 unless it is given.
    /// (PromptDet, section 9.)
    Cosine,
}

/// Trains an open-vocabulary two-stage detector on base classes: ViLD, and with `blocks` and `globals` OADP's distillation pyramid; with
/// `head: sigmoid` LP-OVOD's; with `head: cosine` PromptDet's.
///
/// The box head classifies regions by class embeddings and refines boxes. Each of the inputs `features`, `blocks` and `globals` adds a head
/// that learns CLIP's embeddings; the heads of blocks and of whole images also learn which base classes are shown. Of these heads only the
/// object head is used in detection. The defaults are ViLD's for COCO, and OADP's for what ViLD does not have. (Gu et al. 2022; Wang et al.
/// 2023; OADP, sections 6.1 to 6.5.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Size of the network.
    pub network: Network,
    /// How the box head classifies regions.
    #[serde(skip_serializing_if = "is_default")]
    pub head: Head,
    /// Add a class-agnostic mask head, as OADP does for LVIS.
    pub masks: bool,
    /// Temperature of cosines in training.
    pub train_temperature: f64,
    /// Temperature of cosines in detection.
    pub test_temperature: f64,
    /// How regions of many objects (`iscrowd`) count.
    pub crowds: Crowds,
    /// An object also gets the sampled regions that overlap it most, whatever they overlap more, if that IoU is at least this: mmdet's low-quality
    /// matches, of which DetPro's is 0.5. Without it, regions stand for the object that they overlap most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_quality_iou: Option<f32>,
    /// Parts of the backbone that are trained: of its stem and its four stages, in this order, the last ones. Without it the network's own: 3 of `r50`, 5 of
    /// `toy`. DetPro trains all 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable_backbone_layers: Option<usize>,
    /// Losses by which CLIP's embeddings are learned, where they are given.
    pub distillation: Distillation,
    /// Losses of objects against retrieved words, where `negatives` are given.
    #[serde(skip_serializing_if = "is_default")]
    pub ral: ral::Config,
    /// How images of the web are shown, where `web` are given.
    #[serde(skip_serializing_if = "is_default")]
    pub web: SelfTraining,
    /// After how many epochs the training at `start` is continued here, with its weights and its optimizer's state. The learning rate goes on as if that
    /// training were this one: there is no second warm-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_epoch: Option<u32>,
    /// How the detector is trained.
    pub training: Training,
    /// Accept embeddings of two CLIPs, which is refused otherwise: cosines between them mean nothing, unless both share one space.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mixed_clips: bool,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            network: Network::R50,
            head: Head::default(),
            masks: false,
            train_temperature: 0.01,
            test_temperature: 0.007,
            crowds: Crowds::default(),
            low_quality_iou: None,
            trainable_backbone_layers: None,
            distillation: Distillation::default(),
            ral: ral::Config::default(),
            web: SelfTraining::default(),
            start_epoch: None,
            training: Training::default(),
            mixed_clips: false,
        }
    }
}

/// PromptDet's low-quality matches. (Section 9.3.)
const COSINE_LOW_QUALITY_IOU: f32 = 0.5;

const FEATURES: In<RegionFeatures> =
    In::optional("features", "CLIP embeddings of proposals on the same images (`clip/objects`), learned by the object head.");
const BLOCKS: In<RegionFeatures> =
    In::optional("blocks", "CLIP embeddings of blocks of the same images (`clip/blocks`), learned by the block head.");
const GLOBALS: In<ImageFeatures> =
    In::optional("globals", "CLIP embeddings of the same images (`clip/globals`), learned by the global head.");
const NEGATIVES: In<Negatives> =
    In::optional("negatives", "Words that objects are kept apart from (`negatives/retrieve`); adds the losses of `ral`.");
const PORTS: Ports<DetectorFile> = Ports::new(
    Out::new("detector", "Weights under mmdet's names, safetensors, f32, and how the network is built; one file for each checkpoint kept."),
    "network.safetensors",
);

impl Stage for Train {
    const KIND: &'static str = "detector/train";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] = &[
        IMAGES.info(),
        ANNOTATIONS.info(),
        CLASSES.info(),
        PROMPTS.info(),
        MULTILABEL_PROMPTS.info(),
        FEATURES.info(),
        BLOCKS.info(),
        GLOBALS.info(),
        NEGATIVES.info(),
        PRETRAINED.info(),
        WEB_IMAGES.info(),
        WEB.info(),
        START.info(),
        START_STATE.info(),
    ];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let mut problems = Problem::unless(&[
            ("masks", !self.masks || self.head != Head::Sigmoid, "false with `head: sigmoid`, which has no mask head"),
            ("train_temperature", is_positive(self.train_temperature), "a number above 0"),
            ("test_temperature", is_positive(self.test_temperature), "a number above 0"),
        ]);
        problems.extend(Problem::unless(&[
            ("low_quality_iou", self.low_quality_iou.is_none_or(|iou| (0.0..=1.0).contains(&iou)), "a number from 0 to 1"),
            ("trainable_backbone_layers", self.trainable_backbone_layers.is_none_or(|n| n <= 5), "from 0 to 5"),
        ]));
        let defaults = Self::default();
        let is_other = self.head != Head::Cosine;
        let same = |number: f64, other: f64| number.to_bits() == other.to_bits();
        problems.extend(Problem::unless(&[
            (
                "train_temperature",
                is_other || same(self.train_temperature, defaults.train_temperature),
                "none with `head: cosine`, which learns the scale of its cosines",
            ),
            (
                "test_temperature",
                is_other || same(self.test_temperature, defaults.test_temperature),
                "none with `head: cosine`, which learns the scale of its cosines",
            ),
            (
                "distillation",
                is_other || self.distillation == defaults.distillation,
                "none with `head: cosine`, which learns no embeddings of CLIP's",
            ),
            ("ral", is_other || is_default(&self.ral), "none with `head: cosine`"),
            ("web", !is_other || is_default(&self.web), "none without `head: cosine`, which alone learns from images of the web"),
            (
                "start_epoch",
                self.start_epoch.is_none_or(|start| start > 0 && self.training.epochs.is_some_and(|epochs| start < epochs)),
                "at least 1 and less than `training.epochs`",
            ),
        ]));
        problems.extend(self.web.check());
        problems.extend(self.distillation.check());
        problems.extend(check_ral(&self.ral));
        problems.extend(self.training.check());
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        batches::units(&self.training, self.epochs(inputs)?, inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        if classes.base.is_empty() {
            let problem = "expected at least one base class, found none: training learns from base classes alone".into();
            return Err(Error::Input {
                port: CLASSES.info().name,
                problem,
                hint: "name the classes with labels in training under `base`".into(),
            });
        }
        let epochs = self.epochs(cx.inputs)?;
        match self.head {
            Head::Embeddings => self.run_mask_rcnn(&classes, epochs, units, cx),
            Head::Sigmoid => self.run_sigmoid(classes.base, epochs, units, cx),
            Head::Cosine => self.run_cosine(&classes, epochs, units, cx),
        }
    }
}

impl Train {
    /// What the epochs are. Fails where inputs are given that have no meaning together, or for this head.
    fn epochs(&self, inputs: &Inputs) -> Result<Epochs> {
        start::check(self.start_epoch, inputs)?;
        let is_given = |port: &PortInfo| inputs.ports.contains_key(port.name);
        if self.head != Head::Cosine
            && let Some(given) = [WEB_IMAGES.info(), WEB.info()].into_iter().find(is_given)
        {
            let problem = "given, but images of the web teach only a detector with `head: cosine`".into();
            return Err(Error::Input { port: given.name, problem, hint: "set `with: {head: cosine}`, or leave it out".into() });
        }
        let Classes(classes) = inputs.read(CLASSES)?;
        let n_web_batches = match WebImages::read(inputs, &classes, self.web.letterbox)? {
            Some(_) if self.training.epochs.is_none() => {
                let problem = "given, but the length of the training is in steps".into();
                let hint = "set `training.epochs`: each shows every annotated image and every image of the web".into();
                return Err(Error::Input { port: WEB.info().name, problem, hint });
            }
            Some(images) => images.n_batches(&self.web, &self.training),
            None if is_default(&self.web) => 0,
            None => {
                let hint = "give `web_images` and `web`, or leave the parameter `web` out".into();
                return Err(Error::Input { port: WEB.info().name, problem: "none are given, but the parameter `web` is set".into(), hint });
            }
        };
        Ok(Epochs { start: self.start_epoch.unwrap_or(0), n_web_batches })
    }

    /// Runs the loop, from the checkpoint at `start` where there is one.
    fn train<L: DataLoader>(
        &self,
        (loader, config): (&L, &TrainingConfig),
        criterion: &impl Criterion<Batch = L::Batch>,
        spec: &DetectorSpec,
        units: &[Unit],
        cx: &Context<'_>,
    ) -> Result<()> {
        let continues = units.first().is_none_or(|unit| unit.index > 0);
        let start = if continues { None } else { start::find(spec, self.start_epoch, config.first_step, cx)? };
        train_from(start.as_ref(), config, loader, criterion, &PORTS, units, cx)
    }

    /// Trains a detector whose box head compares with class embeddings and background.
    fn run_mask_rcnn(&self, classes: &ClassSplit, epochs: Epochs, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let embeddings = class_embeddings(cx.inputs, classes)?;
        let spec = self.spec(embeddings.size()[1], cx.inputs)?;
        let (dim, base) = (spec.config.embed_dim, classes.base.clone());
        let whole = DetectorSpec::MaskRcnn(spec.clone());
        let classes = spec.tables(embeddings, cx.inputs, classes, cx.device)?;
        let (training, losses) = (self.training.light(cx), (&self.distillation, self.ral(&base, dim, cx.inputs)?));
        let criterion = MaskRcnnCriterion::new(spec, classes, self.region_rule(), self.crowds, losses, &training, cx.device)?;
        load_pretrained(criterion.tensors(), units, cx)?;
        let mut loader = DetectionLoader::new(&training, epochs, cx)?.with_features([FEATURES, BLOCKS], GLOBALS, dim, cx)?;
        if self.masks {
            loader = loader.with_masks()?;
        }
        loader.look_for_images(cx)?;
        self.train((&loader, &loader.config()), &criterion, &whole, units, cx)
    }

    /// Trains a detector of scaled cosines.
    fn run_cosine(&self, classes: &ClassSplit, epochs: Epochs, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        refuse_inputs(
            &[MULTILABEL_PROMPTS.info(), FEATURES.info(), BLOCKS.info(), GLOBALS.info(), NEGATIVES.info()],
            "`head: cosine` learns without it",
            "leave it out of this step",
            cx.inputs,
        )?;
        let prompts = cosine::prompts(cx.inputs)?;
        let embeddings = selected_prompts(&prompts, classes)?;
        let mut config = self.network.cosine_config(embeddings.size()[1], self.masks);
        self.set_trainable(&mut config.regions);
        let spec = CosineSpec { config, fits: self.training.fits(), clip: prompts.clip };
        let (whole, training) = (DetectorSpec::Cosine(spec.clone()), self.training.light(cx));
        let (embeddings, rule) = ((&embeddings, classes.base.len()), (self.region_rule(), self.crowds));
        let criterion = CosineCriterion::new(spec, embeddings, rule, &self.web, &training, cx.device)?;
        load_pretrained(criterion.tensors(), units, cx)?;
        let mut annotated = DetectionLoader::new(&training, epochs, cx)?;
        if self.masks {
            annotated = annotated.with_masks()?;
        }
        let loader = MixedLoader::new(annotated, WebImages::read(cx.inputs, classes, self.web.letterbox)?, &self.web, epochs, cx)?;
        loader.look_for_images(classes, cx)?;
        self.train((&loader, &loader.config()), &criterion, &whole, units, cx)
    }

    /// Trains a detector with a linear classifier.
    fn run_sigmoid(&self, base: Vec<String>, epochs: Epochs, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        refuse_inputs(
            &[PROMPTS.info(), MULTILABEL_PROMPTS.info(), BLOCKS.info(), GLOBALS.info(), NEGATIVES.info()],
            "`head: sigmoid` learns without it",
            "leave it out of this step; `detector/test` takes `prompts`",
            cx.inputs,
        )?;
        let features = cx.inputs.read_if_given(FEATURES)?;
        let dim = features.as_ref().map(RegionFeatures::dim).transpose()?;
        let mut config = self.network.sigmoid_config(base.len(), dim);
        self.set_trainable(&mut config.regions);
        let spec = SigmoidSpec {
            config,
            fits: self.training.fits(),
            base,
            novel: Vec::new(),
            clip: features.map(|features| features.clip()).transpose()?.flatten(),
        };
        let (whole, training) = (DetectorSpec::Sigmoid(spec.clone()), self.training.light(cx));
        let criterion = SigmoidCriterion::new(spec, self.region_rule(), self.crowds, &self.distillation, &training, cx.device)?;
        load_pretrained(criterion.tensors(), units, cx)?;
        let dim = dim.unwrap_or_default() as i64;
        let loader = DetectionLoader::new(&training, epochs, cx)?.with_features([FEATURES, BLOCKS], GLOBALS, dim, cx)?;
        let loader = loader.normalised(Normalisation::CLIP);
        loader.look_for_images(cx)?;
        self.train((&loader, &loader.config()), &criterion, &whole, units, cx)
    }

    /// The losses of objects of base classes against retrieved words, if there are words.
    fn ral(&self, base: &[String], dim: i64, inputs: &Inputs) -> Result<Option<Ral>> {
        let refused = |problem: String, hint: &str| Error::Input { port: NEGATIVES.info().name, problem, hint: hint.into() };
        let Some(negatives) = inputs.read_if_given(NEGATIVES)? else {
            return match is_default(&self.ral) {
                true => Ok(None),
                false => {
                    Err(refused("none are given, but `ral` is set".into(), "give the output of `negatives/retrieve`, or leave `ral` out"))
                }
            };
        };
        let of_base = negatives.select(base)?;
        let found = of_base.words.size()[1];
        if found != dim {
            let problem = format!("embeddings of words have {found} numbers, class embeddings {dim}");
            return Err(refused(problem, "make both with the same CLIP"));
        }
        Ral::new(self.ral, of_base)
            .map(Some)
            .map_err(|error| refused(error.to_string(), "set `ral.few_words: fixed`, or retrieve more words"))
    }

    /// Which regions are sampled for the heads.
    fn region_rule(&self) -> RegionRule {
        let mut rule = region_rule(self.network.regions_per_image(), None);
        rule.assigner.best_of_object_iou = self.low_quality_iou.or(match self.head {
            Head::Embeddings | Head::Sigmoid => None,
            Head::Cosine => Some(COSINE_LOW_QUALITY_IOU),
        });
        rule
    }

    fn set_trainable(&self, regions: &mut RegionsConfig) {
        if let Some(n) = self.trainable_backbone_layers {
            regions.backbone.trainable_parts = n;
        }
    }

    /// How a detector for class embeddings of `embed_dim` numbers is built and used.
    fn spec(&self, embed_dim: i64, inputs: &Inputs) -> Result<MaskRcnnSpec> {
        let is_given = |port: PortInfo| inputs.ports.contains_key(port.name);
        let heads = ExtraHeads {
            object: is_given(FEATURES.info()),
            block: is_given(BLOCKS.info()),
            global: is_given(GLOBALS.info()),
            mask: self.masks,
        };
        let mut config = self.network.config(embed_dim, heads);
        self.set_trainable(&mut config.regions);
        Ok(MaskRcnnSpec {
            config,
            has_prompts: is_given(PROMPTS.info()),
            has_multilabel_prompts: is_given(MULTILABEL_PROMPTS.info()),
            fits: self.training.fits(),
            scale: LogitScale::Temperature { train: self.train_temperature, test: self.test_temperature },
            clip: clip_of(inputs, self.mixed_clips)?,
        })
    }
}

/// Fails where an input is given that a head does not learn from.
fn refuse_inputs(ports: &[PortInfo], why: &str, hint: &str, inputs: &Inputs) -> Result<()> {
    match ports.iter().find(|port| inputs.ports.contains_key(port.name)) {
        None => Ok(()),
        Some(port) => {
            let problem = format!("given, but a detector with {why}");
            Err(Error::Input { port: port.name, problem, hint: hint.into() })
        }
    }
}

fn check_ral(config: &ral::Config) -> Vec<Problem> {
    let ral::Config { random_q, lambda_sim, lambda_dis, margin_sim, margin_dis, beta_sim, beta_dis, .. } = *config;
    let is_weight = |number: f64| number >= 0.0 && number.is_finite();
    Problem::unless(&[
        ("ral.random_q", random_q > 0, "at least 1"),
        ("ral.lambda_sim", lambda_sim.is_finite(), "a number"),
        ("ral.lambda_dis", lambda_dis.is_finite(), "a number"),
        ("ral.margin_sim", margin_sim.is_finite(), "a number"),
        ("ral.margin_dis", margin_dis.is_finite(), "a number"),
        ("ral.beta_sim", is_weight(beta_sim), "a weight from 0 on"),
        ("ral.beta_dis", is_weight(beta_dis), "a weight from 0 on"),
    ])
}

/// The CLIP of all embeddings in training, where it is known. Fails where they come from several CLIPs, unless that is allowed.
fn clip_of(inputs: &Inputs, mixed_clips: bool) -> Result<Option<Space>> {
    let [text, image] = spaces_of_prompts(inputs)?;
    let regions = |port: In<RegionFeatures>| {
        let clip = inputs.read_if_given(port)?.map(|features| features.clip()).transpose()?;
        Ok::<_, Error>((port.info().name, clip.flatten()))
    };
    let globals = inputs.read_if_given(GLOBALS)?.map(|features| features.clip()).transpose()?.flatten();
    let words = inputs.read_if_given(NEGATIVES)?.and_then(|negatives| negatives.clip);
    let others = [(GLOBALS.info().name, globals), (NEGATIVES.info().name, words)];
    space::common_unless(mixed_clips, &[&[text, image, regions(FEATURES)?, regions(BLOCKS)?], &others[..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
    }
}
