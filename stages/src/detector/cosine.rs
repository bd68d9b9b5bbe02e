//! A two-stage detector of scaled cosines (PromptDet): trained on base classes and, by images of the web, on novel ones, and run on images.

use std::collections::BTreeMap;

use ovenbird_data::{boxes::Xyxy, classes::ClassSplit};
use ovenbird_models::{
    Phase,
    checkpoint::Checkpoint,
    detection::boxes::ImageSize,
    rcnn::{
        cosine::{CHOSEN_AMONG, CosineDetector, Counted, region_losses},
        heads::{DetectionRule, RegionRule, RegionSample},
        regions::Pyramid,
        rpn::{self, ProposalRule, Proposals},
    },
};
use tch::{Device, Kind, Tensor, nn};

use super::{
    batches::{Batch, boxes},
    classes::selected_prompts,
    criterion::{Crowds, PROPOSALS, Taught, loss_of_masks, sampled, sampled_among},
    images::{Normalisation, Padding, Pixels, TestImage},
    options::TestOptions,
    ports::{AUGMENTED, MULTILABEL_PROMPTS, PROMPTS},
    predictor::{self, Found, Predictor},
    spec::{CosineSpec, DetectorSpec},
    training::Training,
    web::{MixedBatch, SelfTraining, View, WebBatch},
};
use crate::{
    Context, Error, Inputs, Result,
    artifacts::Prompts,
    clip::space,
    training::{Criterion, Losses, Parameter, Weights},
};

/// The class embeddings at the port `prompts`, which this detector is nothing without.
pub(super) fn prompts(inputs: &Inputs) -> Result<Prompts> {
    inputs.read_if_given(PROMPTS)?.ok_or_else(|| Error::Input {
        port: PROMPTS.info().name,
        problem: "missing: a detector with `head: cosine` compares regions with embeddings of all its classes".into(),
        hint: "give class embeddings, of `prompts/rpl` or `prompts/ensemble` for example".into(),
    })
}

/// A detector of scaled cosines in training.
pub(super) struct CosineCriterion {
    detector: CosineDetector,
    spec: CosineSpec,
    /// Embeddings f32 `[K, D]` of base ++ novel, on the device.
    classes: Tensor,
    n_base: i64,
    rule: RegionRule,
    crowds: Crowds,
    web: SelfTraining,
    training: Training,
    /// Owns the weights.
    store: nn::VarStore,
}

impl CosineCriterion {
    /// A detector with initial weights. `classes`: embeddings f32 `[K, D]` of base ++ novel; `rule`: which regions are sampled.
    pub(super) fn new(
        spec: CosineSpec,
        (classes, n_base): (&Tensor, usize),
        (rule, crowds): (RegionRule, Crowds),
        web: &SelfTraining,
        training: &Training,
        device: Device,
    ) -> Result<Self> {
        let store = nn::VarStore::new(device);
        let detector = CosineDetector::new(&store.root(), &spec.config, training.seed)?;
        let (classes, n_base) = (classes.to_device(device), n_base as i64);
        Ok(Self { detector, spec, classes, n_base, rule, crowds, web: web.clone(), training: training.clone(), store })
    }

    /// Every tensor of the detector by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        self.detector.parameters()
    }

    /// The pyramid of images.
    fn pyramid(&self, pixels: &Pixels, phase: Phase) -> Result<Pyramid> {
        let images = pixels.on(self.store.device()).to_kind(self.training.precision.kind());
        Ok(self.detector.regions.forward(&images, phase)?)
    }

    /// The losses of annotated images. Columns of novel classes have no part in them. (PromptDet, section 9.3.)
    fn annotated(&self, batch: &Batch) -> Result<Losses> {
        let mut random = batch.random.clone();
        let pyramid = self.pyramid(&batch.pixels, Phase::Train)?;
        let (rpn, samples) = sampled(&self.detector.regions, &pyramid, batch, (&self.rule, self.crowds), self.n_base, &mut random)?;
        let said = self.detector.look(&pyramid, &chosen(&samples), &self.classes, Phase::Train)?;
        let of_regions = region_losses(&said, &samples, self.n_base, Counted::All)?;
        let mut losses = Losses::default();
        losses.terms.extend([
            ("rpn_objectness", rpn.objectness),
            ("rpn_boxes", rpn.boxes),
            ("classes", of_regions.classes),
            ("boxes", of_regions.boxes),
        ]);
        if let (Some(head), Some(config)) = (&self.detector.mask_head, &self.spec.config.mask_head) {
            losses.terms.push(("masks", loss_of_masks(head, config, &pyramid, batch, &samples)?));
        }
        Ok(losses)
    }

    /// The losses of images of the web: both views teach the label on the box of the view whose network is surer of it. The loss of classes is summed over
    /// the views, others are averaged. (PromptDet, section 9.4.)
    ///
    /// They are normalised by running statistics and do not change them: they look different from annotated images, on which the detector is to be used. (In the
    /// published network all statistics are frozen.)
    fn web(&self, batch: &WebBatch) -> Result<Losses> {
        let [one, other] = &batch.views;
        let seen = [self.see(one, &batch.classes)?, self.see(other, &batch.classes)?];
        let mut taught = [Vec::new(), Vec::new()];
        for (image, &class) in batch.classes.iter().enumerate() {
            let placements = [&one.placements[image], &other.placements[image]];
            let found = self.web.taught(placements, seen.each_ref().map(|seen| seen.found[image]));
            for ((all, found), placement) in taught.iter_mut().zip(found).zip(placements) {
                all.push(of_one(found, class, placement.to));
            }
        }
        let n_without = taught.iter().flatten().filter(|image| image.classes.is_empty()).count();
        let n_few = seen.iter().flat_map(|seen| &seen.proposals).filter(|found| found.boxes.size()[0] < CHOSEN_AMONG).count();
        let mut terms: Vec<[Tensor; 3]> = Vec::new();
        for (Seen { pyramid, proposals, .. }, images) in seen.iter().zip(taught) {
            // Views that are the same draw the same.
            let mut random = batch.random.clone();
            let n_classes = self.classes.size()[0];
            let (rpn, samples) = sampled_among(&self.detector.regions, pyramid, proposals, images, &self.rule, n_classes, &mut random)?;
            let said = self.detector.look(pyramid, &chosen(&samples), &self.classes, Phase::Test)?;
            let of_regions = region_losses(&said, &samples, n_classes, Counted::Objects)?;
            let rpn::Losses { objectness_of_objects, .. } = rpn;
            terms.push([objectness_of_objects, of_regions.classes, of_regions.boxes]);
        }
        let sum = |term: usize| terms.iter().map(|of_view| &of_view[term]).sum::<Tensor>();
        let mut losses = Losses::default();
        losses.terms.extend([("rpn_objectness_web", sum(0) / 2.0), ("classes_web", sum(1)), ("boxes_web", sum(2) / 2.0)]);
        for (name, n) in [("without_box_web", n_without), ("few_proposals_web", n_few)] {
            let share = n as f64 / (2 * batch.classes.len()) as f64;
            losses.measures.push((name, Tensor::from(share).to_kind(Kind::Float).to_device(self.store.device())));
        }
        Ok(losses)
    }

    /// Looks at a view, and for the box of each label.
    fn see(&self, view: &View, labels: &[usize]) -> Result<Seen> {
        let pyramid = self.pyramid(&view.pixels, Phase::Test)?;
        let sizes: Vec<ImageSize> = view.placements.iter().map(|placement| placement.to.into()).collect();
        let proposals = self.detector.regions.rpn.proposals(&pyramid.predictions, &sizes, &PROPOSALS)?;
        let found = self.detector.pseudo_boxes(&pyramid, &proposals, labels, &self.classes)?;
        Ok(Seen { pyramid, proposals, found })
    }
}

/// What a detector in training sees in a view of images of the web.
struct Seen {
    pyramid: Pyramid,
    proposals: Vec<Proposals>,
    /// The box that each view would teach, and the label's logit there.
    found: Vec<Option<([f32; 4], f32)>>,
}

fn chosen(samples: &[RegionSample]) -> Vec<Tensor> {
    samples.iter().map(|sample| sample.boxes.shallow_clone()).collect()
}

/// An image of `size` px with one object, or none.
fn of_one(found: Option<Xyxy>, class: usize, size: [u32; 2]) -> Taught {
    let objects: Vec<Xyxy> = found.into_iter().collect();
    Taught { size: size.into(), truth: boxes(&objects).into(), classes: vec![class as i64; objects.len()] }
}

impl Criterion for CosineCriterion {
    type Batch = MixedBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        self.training.grouped(self.tensors())
    }

    fn losses(&self, _step: u32, batch: MixedBatch) -> Result<Losses> {
        match &batch {
            MixedBatch::Annotated(batch) => self.annotated(batch),
            MixedBatch::Web(batch) => self.web(batch),
        }
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: DetectorSpec::Cosine(self.spec.clone()).metadata() })
    }
}

/// A trained detector of scaled cosines, and the classes that it looks for.
pub(super) struct CosinePredictor {
    detector: CosineDetector,
    /// Embeddings f32 `[K, D]`, on the device.
    classes: Tensor,
    rules: (ProposalRule, DetectionRule),
    fits: [u32; 2],
    padding: Padding,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl CosinePredictor {
    /// Builds the detector of a file at a port.
    pub(super) fn load(
        spec: &CosineSpec,
        (checkpoint, port): (&Checkpoint, &'static str),
        options: &TestOptions,
        classes: &ClassSplit,
        cx: &Context<'_>,
    ) -> Result<Self> {
        options.refuse_combining()?;
        options.check_augmented(cx.inputs)?;
        for port in [MULTILABEL_PROMPTS.info(), AUGMENTED.info()] {
            if cx.inputs.ports.contains_key(port.name) {
                let problem = "given, but the detector has one head alone that classifies (`head: cosine`), by `prompts`".into();
                return Err(Error::Input { port: port.name, problem, hint: "leave them out".into() });
            }
        }
        let prompts = prompts(cx.inputs)?;
        space::common(&[(port, spec.clip), (PROMPTS.info().name, prompts.clip)])?;
        let classes = selected_prompts(&prompts, classes)?;
        let (found, dim) = (classes.size()[1], spec.config.embed_dim);
        if found != dim {
            let problem = format!("class embeddings have {found} numbers, the detector's space has {dim}");
            return Err(Error::Input {
                port: PROMPTS.info().name,
                problem,
                hint: "use prompts of the CLIP that it was trained with".into(),
            });
        }
        let (detector, store) = spec.network(checkpoint, cx.device)?;
        Ok(Self {
            detector,
            classes: classes.to_device(cx.device),
            rules: (options.proposal_rule(), options.detection_rule()),
            fits: spec.fits,
            padding: options.padding,
            _store: store,
        })
    }
}

impl Predictor for CosinePredictor {
    fn fits(&self) -> [u32; 2] {
        self.fits
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET.padded(self.padding)
    }

    fn predict(&self, image: &TestImage<'_>, n_threads: usize) -> Result<Vec<Found>> {
        let given = image.given().map(|given| vec![given]);
        let mut objects = Vec::new();
        let (proposals, detections) = &self.rules;
        for found in self.detector.detect(&image.pixels, &[image.size], &self.classes, given, (proposals, detections))? {
            objects.extend(predictor::objects(found, image.placement, n_threads)?);
        }
        Ok(objects)
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_data::training::{Filter, Placement};
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng as _};

    use super::{
        super::{criterion::region_rule, spec::Network},
        *,
    };
    use crate::golden::unit;

    const N_BASE: usize = 3;

    /// A detector of 5 classes, the last two of them novel, whose embeddings have gradients.
    fn criterion() -> CosineCriterion {
        let spec = CosineSpec { config: Network::Toy.cosine_config(16, false), fits: [96, 64], clip: None };
        let classes = Tensor::from_slice(&unit("cosine/classes", 5 * 16).collect::<Vec<f32>>()).view([5, 16]);
        let rule = region_rule(64, None);
        let (web, training) = (SelfTraining::default(), Training::default());
        let made = CosineCriterion::new(spec, (&classes, N_BASE), (rule, Crowds::Background), &web, &training, Device::Cpu).unwrap();
        CosineCriterion { classes: made.classes.set_requires_grad(true), ..made }
    }

    fn picture(width: u32, height: u32) -> ovenbird_data::images::Image {
        let level = |place: u32| ((place * 37) % 251) as u8;
        ovenbird_data::images::Image { width, height, rgb: (0..3 * width * height).map(level).collect() }
    }

    /// An image of the web of class 4 in two views of these sizes.
    fn web(sizes: [[u32; 2]; 2]) -> WebBatch {
        let view = |to: [u32; 2]| {
            let placement = Placement { from: [96, 64], to, is_mirrored: false, filter: Filter::OpenCv };
            View { pixels: Pixels::of(&[placement.pixels(&picture(96, 64))], Normalisation::IMAGENET), placements: vec![placement] }
        };
        WebBatch { views: sizes.map(view), classes: vec![4], random: ChaCha8Rng::seed_from_u64(5) }
    }

    fn value(losses: &Losses, wanted: &str) -> f64 {
        losses.terms.iter().find(|(name, _)| *name == wanted).unwrap().1.double_value(&[])
    }

    /// T3 of PromptDet's specification.
    #[test]
    fn novel_classes_are_taught_by_images_of_the_web_alone() {
        for is_web in [false, true] {
            let criterion = criterion();
            let batch = if is_web { MixedBatch::Web(web([[96, 64], [144, 96]])) } else { MixedBatch::Annotated(Batch::of_two()) };
            let losses = criterion.losses(0, batch).unwrap();
            let terms: Vec<&Tensor> = losses.terms.iter().map(|(_, term)| term).collect();
            Tensor::stack(&terms, 0).sum(Kind::Float).backward();
            let gradient = criterion.classes.grad().abs().sum_dim_intlist([1_i64].as_slice(), false, Kind::Double);
            let of_classes = Vec::<f64>::try_from(gradient).unwrap();
            assert!(of_classes[..N_BASE].iter().all(|gradient| *gradient > 0.0), "{of_classes:?}");
            assert!(of_classes[N_BASE..].iter().all(|gradient| (*gradient > 0.0) == is_web), "{of_classes:?}");
            let names: Vec<&str> = losses.terms.iter().map(|(name, _)| *name).collect();
            let expected: &[&str] = if is_web {
                &["rpn_objectness_web", "classes_web", "boxes_web"]
            } else {
                &["rpn_objectness", "rpn_boxes", "classes", "boxes"]
            };
            assert_eq!(names, expected);
            // Of what images of the web show besides, and where exactly it is, nobody knows.
            let (regressor, backbone) =
                (&criterion.tensors()["rpn_head.rpn_reg.weight"], &criterion.tensors()["backbone.layer4.0.conv1.weight"]);
            assert!(backbone.grad().abs().max().double_value(&[]) > 0.0);
            let of_boxes = regressor.grad();
            assert_eq!(of_boxes.defined() && of_boxes.abs().max().double_value(&[]) > 0.0, !is_web);
        }
    }

    /// T2 and T4: at first, cosines are near 0 and the loss of a matched region is that of its probability of 0.01; others count in the divisor alone.
    #[test]
    fn losses_of_images_of_the_web_begin_where_the_specification_says() {
        let losses = criterion().losses(0, MixedBatch::Web(web([[96, 64], [96, 64]]))).unwrap();
        // 4 classes with a probability of 0.01 that should be 0, and one that should be 1; cosines are up to 1, so that probabilities may be e times as large.
        let of_region = 4.0 * -(0.99_f64.ln()) + 4.595;
        let matched = value(&losses, "classes_web") / (2.0 * of_region);
        assert!((0.5 / 64.0..=0.25 * 1.3).contains(&matched), "{matched}");
        let (_, without) = &losses.measures[0];
        assert!(without.double_value(&[]).abs() < 1e-9);
    }

    /// T5: two views that are the same give twice the loss of classes, and the others once.
    #[test]
    fn the_loss_of_classes_is_summed_over_views_and_others_are_averaged() {
        let of = |sizes| criterion().losses(0, MixedBatch::Web(web(sizes))).unwrap();
        let same = of([[96, 64], [96, 64]]);
        let criterion = criterion();
        let WebBatch { views: [view, _], classes, mut random } = web([[96, 64], [96, 64]]);
        let Seen { pyramid, proposals, found } = criterion.see(&view, &classes).unwrap();
        let [taught, _] = criterion.web.taught([&view.placements[0]; 2], [found[0]; 2]);
        let images = vec![of_one(taught, 4, [96, 64])];
        let (rpn, samples) =
            sampled_among(&criterion.detector.regions, &pyramid, &proposals, images, &criterion.rule, 5, &mut random).unwrap();
        let said = criterion.detector.look(&pyramid, &chosen(&samples), &criterion.classes, Phase::Train).unwrap();
        let one = region_losses(&said, &samples, 5, Counted::Objects).unwrap();
        for (name, factor, loss) in
            [("classes_web", 2.0, one.classes), ("boxes_web", 1.0, one.boxes), ("rpn_objectness_web", 1.0, rpn.objectness_of_objects)]
        {
            let (found, expected) = (value(&same, name), factor * loss.double_value(&[]));
            assert!(expected > 0.0 && (found - expected).abs() <= 1e-5 * expected, "{name}: {found}, expected {expected}");
        }
    }

    /// An image without a box to teach has no loss, and none that is no number.
    #[test]
    fn an_image_without_a_box_teaches_nothing() {
        let criterion = criterion();
        let WebBatch { views: [view, _], classes, mut random } = web([[96, 64], [96, 64]]);
        let Seen { pyramid, mut proposals, .. } = criterion.see(&view, &classes).unwrap();
        proposals[0] = Proposals { boxes: boxes(&[]), scores: Tensor::zeros([0], (Kind::Float, Device::Cpu)) };
        let found = criterion.detector.pseudo_boxes(&pyramid, &proposals, &classes, &criterion.classes).unwrap();
        assert_eq!(found, [None]);
        let images = vec![of_one(None, 4, [96, 64])];
        let (rpn, samples) =
            sampled_among(&criterion.detector.regions, &pyramid, &proposals, images, &criterion.rule, 5, &mut random).unwrap();
        let said = criterion.detector.look(&pyramid, &chosen(&samples), &criterion.classes, Phase::Train).unwrap();
        let losses = region_losses(&said, &samples, 5, Counted::Objects).unwrap();
        for loss in [losses.classes, losses.boxes, rpn.objectness_of_objects] {
            assert!(loss.double_value(&[]).abs() < 1e-12);
        }
    }
}
