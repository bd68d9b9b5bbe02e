//! A two-stage detector with a linear classifier (LP-OVOD): trained on base classes, and run on images.

use std::collections::BTreeMap;

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    Phase,
    checkpoint::Checkpoint,
    rcnn::{
        distillation::{embedding_loss, mean_over_groups},
        heads::{RegionRule, RegionSample},
        regions::Pyramid,
        sigmoid::{Classes, Features, SigmoidDetector, TestRule},
    },
};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, nn};

use super::{
    batches::{Batch, boxes},
    classes::selected_prompts,
    criterion::{Crowds, rows_of, sampled},
    distillation::Distillation,
    images::{Normalisation, TestImage},
    options::{Heads, TestOptions},
    ports::{AUGMENTED, CLASSES, PROMPTS},
    predictor::{self, Found, Predictor},
    spec::{DetectorSpec, SigmoidSpec},
    training::Training,
};
use crate::{
    Context, Error, Result,
    clip::space,
    training::{Criterion, Losses, Parameter, Weights},
};

/// A detector with a linear classifier in training on base classes.
pub(super) struct SigmoidCriterion {
    detector: SigmoidDetector,
    spec: SigmoidSpec,
    rule: RegionRule,
    crowds: Crowds,
    distillation: Distillation,
    training: Training,
    /// Owns the weights.
    store: nn::VarStore,
}

impl SigmoidCriterion {
    /// A detector with initial weights. `rule`: which regions are sampled.
    pub(super) fn new(
        spec: SigmoidSpec,
        rule: RegionRule,
        crowds: Crowds,
        distillation: &Distillation,
        training: &Training,
        device: Device,
    ) -> Result<Self> {
        let store = nn::VarStore::new(device);
        let detector = SigmoidDetector::new(&store.root(), &spec.config, training.seed)?;
        let (distillation, training) = (distillation.clone(), training.clone());
        Ok(Self { detector, spec, rule, crowds, distillation, training, store })
    }

    /// Every tensor of the detector by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        self.detector.parameters()
    }

    /// The losses of boxes and base classes, taken over groups of images as the reference's devices take them.
    fn base_classes(&self, pyramid: &Pyramid, batch: &Batch, random: &mut ChaCha8Rng, losses: &mut Losses) -> Result<()> {
        let of_heads = (&self.rule, self.crowds);
        let (rpn, samples) = sampled(&self.detector.regions, pyramid, batch, of_heads, self.spec.config.n_base, random)?;
        let chosen: Vec<Tensor> = samples.iter().map(|sample| sample.boxes.shallow_clone()).collect();
        let said = self.detector.features(pyramid, &chosen, Phase::Train)?;
        let (mut classes, mut deltas, mut first) = (Vec::new(), Vec::new(), 0);
        for group in samples.chunks(self.distillation.images_per_group) {
            let n = group.iter().map(|sample: &RegionSample| sample.labels.size()[0]).sum::<i64>();
            let of_group = Features { features: said.features.narrow(0, first, n), deltas: said.deltas.narrow(0, first, n) };
            let of_group = self.detector.losses(&of_group, group)?;
            classes.push(of_group.classes);
            deltas.push(of_group.boxes);
            first += n;
        }
        let mean = |losses: Vec<Tensor>| Tensor::stack(&losses, 0).mean(Kind::Float);
        losses.terms.extend([
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", mean(classes)),
            ("boxes", mean(deltas)),
        ]);
        Ok(())
    }

    /// The loss of CLIP's embeddings of proposals.
    fn proposals(&self, pyramid: &Pyramid, batch: &Batch, step: u32, losses: &mut Losses) -> Result<()> {
        let on: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.proposals.boxes)).collect();
        let Some(said) = self.detector.embeddings(pyramid, &on, Phase::Train)? else { return Ok(()) };
        let expected = batch.images.iter().map(|image| image.proposals.embeddings.as_slice());
        let expected = rows_of(expected, said.size()[1], said.device());
        let n_rows: Vec<i64> = batch.images.iter().map(|image| image.proposals.boxes.len() as i64).collect();
        let apart = mean_over_groups(&n_rows, self.distillation.images_per_group, |rows| {
            let part = |of: &Tensor| of.narrow(0, rows.start, rows.end - rows.start);
            embedding_loss(&part(&said), &part(&expected))
        })?;
        losses.terms.push(("objects", apart * self.distillation.objects.at(step)));
        Ok(())
    }
}

impl Criterion for SigmoidCriterion {
    type Batch = Batch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        self.training.grouped(self.tensors())
    }

    fn losses(&self, step: u32, batch: Batch) -> Result<Losses> {
        let mut random = batch.random.clone();
        let images = batch.pixels.on(self.store.device()).to_kind(self.training.precision.kind());
        let pyramid = self.detector.regions.forward(&images, Phase::Train)?;
        let mut losses = Losses::default();
        self.base_classes(&pyramid, &batch, &mut random, &mut losses)?;
        // Weights of losses count steps from 1.
        self.proposals(&pyramid, &batch, step + 1, &mut losses)?;
        Ok(losses)
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: DetectorSpec::Sigmoid(self.spec.clone()).metadata() })
    }
}

/// A trained detector with a linear classifier, and the classes that it looks for.
pub(super) struct SigmoidPredictor {
    detector: SigmoidDetector,
    classes: Classes,
    rule: TestRule,
    fits: [u32; 2],
    normalisation: Normalisation,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl SigmoidPredictor {
    /// Builds the detector of a file at a port.
    pub(super) fn load(
        spec: &SigmoidSpec,
        (checkpoint, port): (&Checkpoint, &'static str),
        options: &TestOptions,
        classes: &ClassSplit,
        cx: &Context<'_>,
    ) -> Result<Self> {
        options.refuse_ensemble()?;
        options.check_augmented(cx.inputs)?;
        if cx.inputs.ports.contains_key(AUGMENTED.info().name) {
            let problem = "given, but the detector has a linear classifier (`head: sigmoid`), whose rows have no class embeddings".into();
            let hint = "leave them out, or test a detector that compares with class embeddings".into();
            return Err(Error::Input { port: AUGMENTED.info().name, problem, hint });
        }
        let (detector, store) = spec.network(checkpoint, cx.device)?;
        Ok(Self {
            detector,
            classes: spec.classes(port, options.heads, classes, cx)?,
            rule: TestRule { proposals: options.proposal_rule(), fusion: options.fusion, detections: options.detection_rule() },
            fits: spec.fits,
            normalisation: Normalisation::CLIP.padded(options.padding),
            _store: store,
        })
    }
}

impl SigmoidSpec {
    /// The rows of some classes, and the embeddings by which CLIP's part of the detector tells them apart.
    fn classes(&self, port: &'static str, heads: Heads, classes: &ClassSplit, cx: &Context<'_>) -> Result<Classes> {
        let n_base = self.base.len() as i64;
        let row = |name: &String| {
            let place = |names: &[String]| names.iter().position(|other| other == name).map(|place| place as i64);
            place(&self.base).or_else(|| place(&self.novel).map(|place| n_base + place))
        };
        if let Some(unknown) = classes.base.iter().find(|name| row(name).is_none()) {
            let problem = format!("`{unknown}` is a base class, but the detector was trained without it");
            let hint = "name as `base` only classes that the detector was trained on, all others as `novel`".into();
            return Err(Error::Input { port: CLASSES.info().name, problem, hint });
        }
        let without: Vec<&str> = classes.all().filter(|name| row(name).is_none()).map(String::as_str).collect();
        if let [first, ..] = without[..] {
            cx.note(format!(
                "the detector has no row for {} of {} novel classes, `{first}` among them: its classifier's score is 1 for these in every region",
                without.len(),
                classes.novel.len()
            ));
        }
        let prompts = cx.inputs.read_if_given(PROMPTS)?;
        let embeddings = match (self.config.embed_dim, heads, prompts) {
            (_, Heads::Box, _) | (None, _, None) => None,
            (Some(_), Heads::Both, None) => {
                let problem = "the detector learned CLIP's embeddings, but there are none of the classes".into();
                let hint = "give `prompts` of the same CLIP, or use the classifier alone: `with: {heads: box}`".into();
                return Err(Error::Input { port: PROMPTS.info().name, problem, hint });
            }
            (None, Heads::Both, Some(_)) => {
                let problem = "given, but the detector was trained without `features` and has no use for them".into();
                let hint = "leave `prompts` out".into();
                return Err(Error::Input { port: PROMPTS.info().name, problem, hint });
            }
            (Some(dim), Heads::Both, Some(prompts)) => {
                space::common(&[(port, self.clip), (PROMPTS.info().name, prompts.clip)])?;
                let embeddings = selected_prompts(&prompts, classes)?;
                let found = embeddings.size()[1];
                if found != dim {
                    let problem = format!("class embeddings have {found} numbers, the detector's space has {dim}");
                    let hint = "use prompts of the CLIP whose embeddings the detector learned".into();
                    return Err(Error::Input { port: PROMPTS.info().name, problem, hint });
                }
                Some(embeddings.to_device(cx.device))
            }
        };
        Ok(Classes { rows: classes.all().map(row).collect(), n_base: classes.base.len() as i64, embeddings })
    }
}

impl Predictor for SigmoidPredictor {
    fn fits(&self) -> [u32; 2] {
        self.fits
    }

    fn normalisation(&self) -> Normalisation {
        self.normalisation
    }

    fn predict(&self, image: &TestImage<'_>, n_threads: usize) -> Result<Vec<Found>> {
        let given = image.given().map(|given| vec![given]);
        let mut objects = Vec::new();
        for found in self.detector.detect(&image.pixels, &[image.size], &self.classes, given, &self.rule)? {
            objects.extend(predictor::objects(found, image.placement, n_threads)?);
        }
        Ok(objects)
    }
}
