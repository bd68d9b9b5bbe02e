//! `detector/features`: features of a frozen detector for regions of labelled images, to train classifiers on.

use std::{collections::HashMap, ops::Range};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{CategoryId, ImageId},
    images::Image,
    training::{Placement, Sample},
};
use ovenbird_models::{
    Phase,
    detection::{boxes::ImageSize, matching::Truth},
    rcnn::{heads::RegionRule, sigmoid::SigmoidDetector},
};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn, no_grad};

use super::{
    batches::boxes,
    criterion::{PROPOSALS, region_rule},
    images::{Normalisation, Pixels},
    labelled::Labelled,
    ports::{ANNOTATIONS, IMAGES},
    spec::DetectorFile,
    training::TrainPrecision,
};
use crate::{
    Artifact, Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{Dtype, Images, RegionSample, RegionSamples, RegionSamplesWriter, SamplesByImage},
    feed::stream,
};

/// Bytes of images that may be decoded ahead of the network.
const ROOM: usize = 256 << 20;
/// The longest side of a view, px.
const MAX_SIDE: u32 = 10_000;

/// Features of a frozen detector for regions of labelled images: what `detector/probe` trains a classifier on.
///
/// Each image is shown at every size and mirrored, as training shows it. In each of these views the detector's own proposals and the labelled
/// boxes are matched to the labels and sampled, and the features of its trunk A are stored. Nothing of the detector changes, so this is done once
/// for an image and its labels, whatever is trained on them: another class list or other labels of some images recompute these images only.
/// (LP-OVOD, section 7.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Features {
    /// Seed of the samples.
    pub seed: u64,
    /// Maximum length of the longer side, in px.
    pub max_size: u32,
    /// The least and the greatest length of the shorter side, in px.
    pub min_size: [u32; 2],
    /// The lengths of the shorter side are this far apart, in px.
    pub size_step: u32,
    /// Regions sampled in a view, of which at most a quarter match an object.
    pub regions: usize,
    /// The most regions of background for each that matches an object, and as many where none does. (LP-OVOD's `neg_pos_ub`.)
    pub background_per_object: usize,
    /// Precision in which the network computes.
    pub precision: TrainPrecision,
    /// The number format of stored features.
    pub dtype: Dtype,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            seed: 3407,
            max_size: 1333,
            min_size: [640, 800],
            size_step: 32,
            regions: 512,
            background_per_object: 10,
            precision: TrainPrecision::F32,
            dtype: Dtype::F16,
        }
    }
}

const DETECTOR: In<DetectorFile> = In::required("detector", "A detector with a linear classifier (`head: sigmoid`).");
const FEATURES: Out<RegionSamples> =
    Out::new("features", "By view of an image: `feature` [N, W] of sampled regions, objects first, and `category_id` [O] of these.");

impl Stage for Features {
    const KIND: &'static str = "detector/features";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[FEATURES.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let [low, high] = self.min_size;
        Problem::unless(&[
            ("max_size", (32..=MAX_SIDE).contains(&self.max_size), "from 32 to 10000 px"),
            ("min_size", 32 <= low && low <= high && high <= MAX_SIDE, "two sides from 32 to 10000 px, the smaller first"),
            ("size_step", self.size_step > 0, "at least 1"),
            ("regions", self.regions >= 4, "at least 4"),
            ("background_per_object", self.background_per_object > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let annotations = inputs.read(ANNOTATIONS)?.load()?;
        let items = Labelled::of(&annotations).items(&inputs.read(IMAGES)?, &annotations)?;
        if items.is_empty() {
            let problem = format!("none of {} images has a labelled object", annotations.images.len());
            let hint = "give annotations with labels; if `retrieve/boxes` found none, lower its `min_objectness`".into();
            return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
        }
        Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let labelled = Labelled::of(&cx.inputs.read(ANNOTATIONS)?.load()?);
        let images = cx.inputs.read(IMAGES)?;
        images.look_for(labelled.samples.iter().take(cx.items.len()).map(|sample| &sample.info), cx)?;
        let sampler = RegionSampler::load(self, &cx.inputs.read(DETECTOR)?, cx)?;
        for unit in units {
            // A unit that another process makes is passed over.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            sampler.make(&draft, unit.items.clone(), &labelled, &images, cx)?;
            cx.commit(draft, [("images".into(), unit.items.len().into())].into())?;
        }
        if let Some(remarks) = images.remarks() {
            cx.note(remarks);
        }
        Ok(())
    }
}

impl Features {
    /// The views of an image: every length of the shorter side, plain and mirrored.
    fn views(&self, size: [u32; 2]) -> Vec<Placement> {
        let [low, high] = self.min_size;
        let plain = (low..=high).step_by(self.size_step as usize).map(|short| Placement::fitting(size, self.max_size, short));
        plain.flat_map(|plain| [plain, plain.mirrored()]).collect()
    }
}

/// A frozen detector that samples regions.
struct RegionSampler<'a> {
    stage: &'a Features,
    detector: SigmoidDetector,
    /// Of the detector's file.
    digest: Digest,
    rule: RegionRule,
    kind: Kind,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl<'a> RegionSampler<'a> {
    fn load(stage: &'a Features, file: &DetectorFile, cx: &Context<'_>) -> Result<Self> {
        let (checkpoint, spec) = file.read_sigmoid(DETECTOR.info().name)?;
        let (detector, store) = spec.network(&checkpoint, cx.device)?;
        let rule = region_rule(stage.regions, Some(stage.background_per_object));
        let kind = if cx.is_light() { Kind::Float } else { stage.precision.kind() };
        Ok(Self { stage, detector, digest: file.file.digest, rule, kind, _store: store })
    }

    /// Writes the shard of a unit. Images whose features another unit holds are copied.
    fn make(&self, draft: &UnitDraft, items: Range<usize>, labelled: &Labelled, images: &Images, cx: &Context<'_>) -> Result<()> {
        let reusable = cx.reusable_items(draft, None)?;
        let mut open: HashMap<usize, Option<SamplesByImage>> = HashMap::new();
        let mut reused = |item: &Digest, image: ImageId| -> Option<Vec<RegionSample>> {
            let unit = reusable.of(item)?;
            let files = || <RegionSamples as Artifact>::open(&reusable.port(unit, FEATURES.info().name));
            let samples = open.entry(unit).or_insert_with(|| files().ok()?.by_image().ok()).as_ref()?;
            (0..samples.n_views(image)?).map(|view| samples.get(image, view).ok()).collect()
        };
        let shard = draft.create(FEATURES, "features.arrow")?;
        let width = self.detector.config().trunk.width as usize;
        let mut shard = RegionSamplesWriter::new(shard, &draft.unit().fingerprint, self.stage.dtype, width, &self.digest)?;
        let (mut places, stage) = (items, self.stage);
        let next = || {
            Ok(places.next().map(|place| {
                let sample = &labelled.samples[place];
                let copied = reused(&cx.items[place], sample.info.id);
                let bytes = match &copied {
                    Some(views) => views.iter().map(|view| size_of_val(view.features.as_slice())).sum(),
                    None => {
                        let views = stage.views([sample.info.width, sample.info.height]);
                        views.iter().map(|view| 3 * (view.to[0] * view.to[1]) as usize).sum()
                    }
                };
                ((place, copied), bytes)
            }))
        };
        let prepare = |(place, copied): (usize, Option<Vec<RegionSample>>)| {
            let sample = &labelled.samples[place];
            let decode = || {
                if copied.is_some() {
                    return Ok(Vec::new());
                }
                let image = images.decode_sized(&sample.info.file_name, [sample.info.width, sample.info.height])?;
                let views = stage.views([sample.info.width, sample.info.height]);
                Ok(views.into_iter().map(|view| (view, view.pixels(&image))).collect::<Vec<(Placement, Image)>>())
            };
            let attempted = cx.attempt(decode);
            (place, copied, attempted)
        };
        stream(cx.threads, ROOM, next, prepare, |(place, copied, attempted), n_ready| {
            let sample = &labelled.samples[place];
            if let Some(views) = cx.accept_or_skip(draft, &sample.info.file_name, attempted, cx.items.len())? {
                cx.flow(views.len(), n_ready);
                let random = self.random(&cx.items[place]);
                for sample in copied.into_iter().flatten() {
                    shard.push(sample)?;
                }
                for (view_idx, (view, picture)) in views.iter().enumerate() {
                    let mut random = random.clone();
                    random.set_stream(view_idx as u64);
                    shard.push(self.sample(sample, &labelled.categories, *view, picture, &mut random, cx)?)?;
                    cx.proceed()?;
                }
                cx.tick(1);
            }
            cx.proceed()
        })?;
        shard.finish()
    }

    /// Random numbers of an image with its labels, whichever unit it is in.
    fn random(&self, item: &Digest) -> ChaCha8Rng {
        let seed = self.stage.seed.to_string();
        ChaCha8Rng::from_seed(*Digest::of_list("ovenbird region samples 1", [(seed.as_str(), *item)]).as_bytes())
    }

    /// The sampled regions of a view.
    fn sample(
        &self,
        sample: &Sample,
        categories: &[CategoryId],
        view: Placement,
        picture: &Image,
        random: &mut ChaCha8Rng,
        cx: &Context<'_>,
    ) -> Result<RegionSample> {
        no_grad(|| {
            let pixels = Pixels::of(std::slice::from_ref(picture), Normalisation::CLIP).on(cx.device).to_kind(self.kind);
            let size = ImageSize::from(view.to);
            let pyramid = self.detector.regions.forward(&pixels, Phase::Test)?;
            let proposals = self.detector.regions.rpn.proposals(&pyramid.predictions, &[size], &PROPOSALS)?.remove(0);
            let objects = boxes(&sample.objects.iter().map(|object| view.show(&object.xyxy)).collect::<Vec<_>>());
            let labels = Tensor::from_slice(&sample.objects.iter().map(|object| object.class as i64).collect::<Vec<_>>());
            let chosen = self.rule.choose(&proposals.boxes, &Truth::from(objects), &labels, categories.len() as i64, random)?;
            let features = self.detector.features(&pyramid, &[chosen.boxes.shallow_clone()], Phase::Test)?.features;
            let features = features.to_device(tch::Device::Cpu).contiguous();
            let mut numbers = vec![0.0_f32; features.numel()];
            features.copy_data(&mut numbers, features.numel());
            let categories = chosen.objects.iter().map(|object| categories[sample.objects[*object].class]).collect();
            Ok(RegionSample { image_id: sample.info.id, features: numbers, categories })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Features::default()).is_empty());
    }
}
