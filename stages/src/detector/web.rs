//! Images of the web with one label each, from which a detector learns classes that nobody annotated. (PromptDet, sections 9.4 and 9.5.)
//!
//! Each image is decoded once and shown as two views, with sizes and mirroring of their own. Batches of annotated images and of images of the web take turns.
//! An image with several labels is shown once for each, like as many images.
//!
//! Differences from the reference: the order of the images changes from epoch to epoch, and boxes are clipped to the views, unless the parameters say
//! `reference` (its defects 9 and 13).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ovenbird_data::{
    annotations::{CategoryId, ImageId, ImageInfo},
    boxes::Xyxy,
    classes::ClassSplit,
    images::Image,
    letterbox::Letterbox,
    training::{self, Placement, agreed, interleaved},
};
use ovenbird_models::detection::boxes::Corners;
use rand::{Rng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    batches::{Batch, BatchSpec, DetectionLoader, Random, maybe_mirrored, n_bytes},
    images::{Normalisation, Pixels},
    training::{Epochs, Training},
};
use crate::{
    Context, Error, In, Inputs, Problem, Result,
    artifacts::{AnnotationFile, Images},
    training::{DataLoader, Loaded, TrainingConfig, named},
};

pub(super) const WEB_IMAGES: In<Images> = In::optional("web_images", "Folder that the file names of `web` are relative to.");
pub(super) const WEB: In<AnnotationFile> = In::optional(
    "web",
    "COCO json: labels of images of the web, an annotation for each, whose box does not count; of novel classes, or of any. An image with several is shown once for each. For `head: cosine`.",
);

/// Classes that a note lists.
const MAX_NAMED: usize = 10;

/// What becomes of the box that an image of the web teaches its label on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PseudoBox {
    /// It is clipped to each view; a view where a side of it is then below 1 px teaches nothing. (Fixes PromptDet's defect 13.)
    #[default]
    Fixed,
    /// It stays as the network says.
    Reference,
}

/// The order of images of the web.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WebOrder {
    /// Another one in each epoch. (Fixes PromptDet's defect 9.)
    #[default]
    Fixed,
    /// The same in all epochs.
    Reference,
}

/// How images of the web are shown. The defaults are PromptDet's of its short schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SelfTraining {
    /// Range from which the length of the shorter side is drawn, of the first and of the second view, in px.
    pub min_size: [[u32; 2]; 2],
    /// Maximum length of the longer side of a view, in px.
    pub max_size: u32,
    /// Images of the web per batch; without it as many as `training.batch_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,
    /// How an image is fitted into a square before it is shown. The reference trains on `white1024`.
    pub letterbox: Letterbox,
    /// What becomes of the box that an image teaches its label on.
    pub pseudo_box: PseudoBox,
    /// The order of the images.
    pub order: WebOrder,
}

impl Default for SelfTraining {
    fn default() -> Self {
        Self {
            min_size: [[160, 360], [360, 800]],
            max_size: 1333,
            batch_size: None,
            letterbox: Letterbox::None,
            pseudo_box: PseudoBox::default(),
            order: WebOrder::default(),
        }
    }
}

impl SelfTraining {
    /// What is wrong with the parameters; fields are named below the stage's.
    pub(super) fn check(&self) -> Vec<Problem> {
        let are_ranges = self.min_size.iter().all(|[low, high]| 32 <= *low && low <= high);
        Problem::unless(&[
            ("web.min_size", are_ranges, "two ranges of sides from 32 px on, the smaller side first"),
            ("web.max_size", self.max_size >= 32, "at least 32 px"),
            ("web.batch_size", self.batch_size != Some(0), "at least 1"),
        ])
    }

    fn batch_size(&self, training: &Training) -> usize {
        self.batch_size.unwrap_or(training.batch_size)
    }

    /// The boxes that two views of an image teach its label on, in px of each view; none where nothing is taught. `found`: what the network chose in each view,
    /// and the label's logit there. (PromptDet, section 9.4.)
    pub(super) fn taught(&self, views: [&Placement; 2], found: [Option<(Corners, f32)>; 2]) -> [Option<Xyxy>; 2] {
        let [one, other] = views;
        let boxes = match found.map(|found| found.map(|(corners, logit)| (Xyxy::from(corners), logit))) {
            [Some((of_one, sure)), Some((of_other, surer))] => agreed(views, [of_one, of_other], [sure, surer]),
            [Some((found, _)), None] => [found, one.carried(&found, other)],
            [None, Some((found, _))] => [other.carried(&found, one), found],
            [None, None] => return [None; 2],
        };
        let clipped = |(xyxy, view): (Xyxy, &Placement)| {
            let inside = xyxy.clipped(view.to);
            (inside.width() >= 1.0 && inside.height() >= 1.0).then_some(inside)
        };
        let [of_one, of_other] = boxes;
        match self.pseudo_box {
            PseudoBox::Reference => boxes.map(Some),
            PseudoBox::Fixed => [(of_one, one), (of_other, other)].map(clipped),
        }
    }
}

/// Images of the web with a label each.
pub(super) struct WebImages {
    images: Images,
    shown: Vec<(ImageInfo, usize)>,
    letterbox: Letterbox,
}

impl WebImages {
    /// Those at the ports, if they are given, with the places of their labels among some classes. Fails where a label is of no class.
    pub(super) fn read(inputs: &Inputs, classes: &ClassSplit, letterbox: Letterbox) -> Result<Option<Self>> {
        let Some((images, file)) = inputs.read_both(WEB_IMAGES, WEB)? else { return Ok(None) };
        let annotations = file.load()?;
        let names: BTreeMap<&str, usize> = classes.all().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
        let (mut shown, mut seen): (Vec<_>, BTreeSet<(ImageId, CategoryId)>) = (Vec::new(), BTreeSet::new());
        for label in annotations.annotations.iter().filter(|label| !label.is_crowd) {
            if !seen.insert((label.image_id, label.category_id)) {
                continue;
            }
            let name = annotations.category(label.category_id).map(|category| category.name.as_str()).unwrap_or_default();
            let Some(class) = names.get(name) else {
                return Err(Error::Input {
                    port: WEB.info().name,
                    problem: format!("annotation {} is a label `{name}`, which is none of {} classes", label.id, names.len()),
                    hint: "give labels of the classes at `classes`, for which there are `prompts`".into(),
                });
            };
            let info = annotations.image(label.image_id).expect("BUG: annotations are of images in the file");
            shown.push((info.clone(), *class));
        }
        Ok(Some(Self { images, shown, letterbox }))
    }

    /// The batches of an epoch.
    pub(super) fn n_batches(&self, parameters: &SelfTraining, training: &Training) -> usize {
        self.shown.len().div_ceil(parameters.batch_size(training))
    }

    /// `[width, height]` px of an image as [`Self::decode`] gives it.
    fn size(&self, place: usize) -> [u32; 2] {
        let (info, _) = &self.shown[place];
        self.letterbox.placement([info.width, info.height]).whole
    }

    /// Reads an image.
    fn decode(&self, place: usize) -> Result<Image> {
        let (info, _) = &self.shown[place];
        self.images.decode_letterboxed(&info.file_name, [info.width, info.height], self.letterbox)
    }
}

/// Two views of images of the web.
pub(super) struct WebBatch {
    pub(super) views: [View; 2],
    /// The class of each image.
    pub(super) classes: Vec<usize>,
    /// For sampling anchors and regions.
    pub(super) random: ChaCha8Rng,
}

/// The images of a batch, each shown in one way.
pub(super) struct View {
    pub(super) pixels: Pixels,
    pub(super) placements: Vec<Placement>,
}

/// The input of a detector that learns from annotated images and from images of the web.
pub(super) enum MixedBatch {
    Annotated(Batch),
    Web(WebBatch),
}

/// A batch to load.
pub(super) enum MixedSpec {
    Annotated(BatchSpec),
    Web { step: u32, piece: u32, images: Vec<(usize, [Placement; 2])> },
}

/// Loads batches of annotated images and of images of the web, where there are some.
pub(super) struct MixedLoader {
    annotated: DetectionLoader,
    web: Option<Web>,
}

struct Web {
    images: WebImages,
    parameters: SelfTraining,
    batch_size: usize,
    start_epoch: u32,
    /// Of each step of an epoch, whether it is of annotated images (0) or of images of the web (1).
    turns: Vec<usize>,
}

impl MixedLoader {
    pub(super) fn new(
        annotated: DetectionLoader,
        images: Option<WebImages>,
        parameters: &SelfTraining,
        epochs: Epochs,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let Some(mut images) = images else { return Ok(Self { annotated, web: None }) };
        images.shown.truncate(cx.most_items.unwrap_or(usize::MAX));
        if images.shown.is_empty() {
            if cx.most_items.is_some() {
                return Ok(Self { annotated, web: None });
            }
            let problem = "expected at least one label, found none".into();
            return Err(Error::Input {
                port: WEB.info().name,
                problem,
                hint: "leave out `web` and `web_images`, or give images of the web".into(),
            });
        }
        let training = annotated.training();
        let per_step = training.accumulation_steps as usize;
        let lengths = [annotated.n_batches(), images.n_batches(parameters, training)].map(|n| n.div_ceil(per_step));
        let batch_size = parameters.batch_size(training);
        let web = Web { images, parameters: parameters.clone(), batch_size, start_epoch: epochs.start, turns: interleaved(&lengths) };
        Ok(Self { annotated, web: Some(web) })
    }

    /// Looks for all images, so that a missing one is found before the training begins, and notes how many there are.
    pub(super) fn look_for_images(&self, classes: &ClassSplit, cx: &Context<'_>) -> Result<()> {
        self.annotated.look_for_images(cx)?;
        let Some(Web { images: WebImages { images, shown, .. }, batch_size, .. }) = &self.web else { return Ok(()) };
        images.look_for(shown.iter().map(|(info, _)| info), cx).map_err(|error| error.at_port(WEB_IMAGES.info().name))?;
        let labels: BTreeSet<usize> = shown.iter().map(|(_, class)| *class).collect();
        cx.note(format!(
            "and {} batches of {} images of the web, of {} classes",
            shown.len().div_ceil(*batch_size),
            shown.len(),
            labels.len()
        ));
        let n_base = classes.base.len();
        let without: Vec<&String> =
            (n_base..).zip(&classes.novel).filter(|(place, _)| !labels.contains(place)).map(|(_, name)| name).collect();
        if !without.is_empty() {
            cx.note(format!(
                "no image of the web of {} of {} novel classes: {}",
                without.len(),
                classes.novel.len(),
                named(&without, MAX_NAMED)
            ));
        }
        Ok(())
    }

    /// See [`DetectionLoader::config`].
    pub(super) fn config(&self) -> TrainingConfig {
        self.annotated.config()
    }
}

impl Web {
    /// The batches of an epoch, as places of images.
    fn epoch(&self, epoch: u64, annotated: &DetectionLoader) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.images.shown.len()).collect();
        let seed = match self.parameters.order {
            WebOrder::Fixed => epoch,
            WebOrder::Reference => 0,
        };
        order.shuffle(&mut annotated.random(Random::WebOrder(seed)));
        let is_tall = |place: usize| {
            let [width, height] = self.images.size(place);
            height > width
        };
        training::batches(&order, is_tall, self.batch_size)
    }

    fn placements(&self, place: usize, random: &mut ChaCha8Rng) -> [Placement; 2] {
        self.parameters.min_size.map(|[low, high]| {
            let shorter = random.random_range(low..=high);
            maybe_mirrored(Placement::fitting(self.images.size(place), self.parameters.max_size, shorter), random)
        })
    }

    fn spec(&self, step: u32, piece: u32, places: Vec<usize>, annotated: &DetectionLoader) -> (MixedSpec, usize) {
        let mut random = annotated.random(Random::Placements(step, piece));
        let images: Vec<(usize, [Placement; 2])> = places.into_iter().map(|place| (place, self.placements(place, &mut random))).collect();
        let bytes = images.iter().flat_map(|(_, placements)| placements).map(n_bytes).sum();
        (MixedSpec::Web { step, piece, images }, bytes)
    }

    /// The batches of some steps, each of one sort, in turns.
    fn specs<'a>(&'a self, annotated: &'a DetectionLoader, steps: Range<u32>) -> impl Iterator<Item = (MixedSpec, usize)> + Send + 'a {
        let TrainingConfig { first_step, .. } = annotated.config();
        let (done, n, per_step) = (steps.start - first_step, self.turns.len(), annotated.training().accumulation_steps);
        let first = u64::from(self.start_epoch) + u64::from(done) / n as u64;
        let epoch = move |epoch: u64| {
            let batches = [annotated.epoch(epoch), self.epoch(epoch, annotated)];
            let mut shown = [0, 0];
            let of_turn = |turn: &usize| {
                let pieces =
                    (0..per_step as usize).map(|piece| batches[*turn][(shown[*turn] + piece) % batches[*turn].len()].clone()).collect();
                shown[*turn] += per_step as usize;
                (*turn, pieces)
            };
            self.turns.iter().map(of_turn).collect::<Vec<(usize, Vec<Vec<usize>>)>>()
        };
        let all = (first..).flat_map(epoch).skip(done as usize % n);
        all.zip(steps).flat_map(move |((turn, pieces), step)| {
            (0..).zip(pieces).map(move |(piece, places)| match turn {
                0 => {
                    let (spec, bytes) = annotated.spec(step, piece, places);
                    (MixedSpec::Annotated(spec), bytes)
                }
                _ => self.spec(step, piece, places, annotated),
            })
        })
    }
}

impl DataLoader for MixedLoader {
    type Spec = MixedSpec;
    type Batch = MixedBatch;

    fn specs(&self, steps: Range<u32>) -> impl Iterator<Item = (MixedSpec, usize)> + Send {
        let all: Box<dyn Iterator<Item = (MixedSpec, usize)> + Send + '_> = match &self.web {
            None => Box::new(self.annotated.specs(steps).map(|(spec, bytes)| (MixedSpec::Annotated(spec), bytes))),
            Some(web) => Box::new(web.specs(&self.annotated, steps)),
        };
        all
    }

    fn load(&self, spec: MixedSpec, cx: &Context<'_>) -> Result<Loaded<MixedBatch>> {
        let (step, piece, specs) = match (spec, &self.web) {
            (MixedSpec::Annotated(spec), _) => {
                let Loaded { batch, images, unreadable } = self.annotated.load(spec, cx)?;
                return Ok(Loaded { batch: batch.map(MixedBatch::Annotated), images, unreadable });
            }
            (MixedSpec::Web { step, piece, images }, _) => (step, piece, images),
        };
        let web = &self.web.as_ref().expect("BUG: a batch of images of the web").images;
        let (mut shown, mut pictures): ([(Vec<Image>, Vec<Placement>); 2], _) = (Default::default(), Vec::new());
        let (mut classes, mut unreadable) = (Vec::new(), Vec::new());
        for (place, placements) in specs {
            let (info, class) = &web.shown[place];
            let attempt = cx.attempt(|| {
                let image = web.decode(place)?;
                Ok(placements.map(|placement| placement.pixels(&image)))
            });
            match attempt.result {
                Ok(views) => {
                    for ((images, all), (image, placement)) in shown.iter_mut().zip(views.into_iter().zip(placements)) {
                        images.push(image);
                        all.push(placement);
                    }
                    pictures.push(info.file_name.clone());
                    classes.push(*class);
                }
                Err(error) => unreadable.push((info.file_name.clone(), error, attempt.attempts)),
            }
        }
        let views = shown.map(|(images, placements)| View { pixels: Pixels::of(&images, Normalisation::IMAGENET), placements });
        let random = self.annotated.random(Random::Samples(step, piece));
        let batch = (!classes.is_empty()).then_some(MixedBatch::Web(WebBatch { views, classes, random }));
        Ok(Loaded { batch, images: pictures, unreadable })
    }

    fn n_images(&self) -> usize {
        self.annotated.n_images() + self.web.as_ref().map_or(0, |web| web.images.shown.len())
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_data::training::Filter;

    use super::*;
    use crate::Artifact as _;

    fn view(side: u32, is_mirrored: bool) -> Placement {
        Placement { from: [1024, 1024], to: [side, side], is_mirrored, filter: Filter::OpenCv }
    }

    fn corners(xyxy: Option<Xyxy>) -> Option<[f32; 4]> {
        xyxy.map(|Xyxy { x1, y1, x2, y2 }| [x1, y1, x2, y2].map(f32::round))
    }

    /// The example of PromptDet's specification, section 9.4, whatever the other view sees; and a box that ends outside.
    #[test]
    fn both_views_teach_the_box_of_the_surer_one() {
        let (one, other) = (view(200, true), view(600, false));
        let box_of_one = [20.0, 30.0, 120.0, 150.0];
        let (fixed, reference) = (SelfTraining::default(), SelfTraining { pseudo_box: PseudoBox::Reference, ..SelfTraining::default() });
        for found in [[Some((box_of_one, 0.5)), Some(([1.0, 2.0, 3.0, 4.0], 0.4))], [Some((box_of_one, -9.0)), None]] {
            for parameters in [&fixed, &reference] {
                let taught = parameters.taught([&one, &other], found).map(corners);
                assert_eq!(taught, [Some(box_of_one), Some([240.0, 90.0, 540.0, 450.0])]);
            }
        }
        // Of equally sure ones it is the second.
        let beyond = [300.0, -60.0, 660.0, 540.0];
        for found in [[Some((box_of_one, 0.5)), Some((beyond, 0.5))], [None, Some((beyond, 0.5))]] {
            let taught = fixed.taught([&one, &other], found).map(corners);
            assert_eq!(taught, [Some([0.0, 0.0, 100.0, 180.0]), Some([300.0, 0.0, 600.0, 540.0])]);
            assert_eq!(corners(reference.taught([&one, &other], found)[1]), Some(beyond));
        }
        assert_eq!(fixed.taught([&one, &other], [None; 2]).map(corners), [None; 2]);
        // 2 px of the larger view are less than one of the smaller.
        let thin = Some(([10.0, 10.0, 12.0, 50.0], 1.0));
        assert_eq!(fixed.taught([&one, &other], [None, thin]).map(|taught| taught.is_some()), [false, true]);
        assert!(reference.taught([&one, &other], [None, thin])[0].is_some());
    }

    /// 12 annotated and 8 images of the web in batches of 2, from epoch 3 on.
    fn loader(order: WebOrder, accumulation_steps: u32) -> MixedLoader {
        let training = Training { batch_size: 2, accumulation_steps, ..Training::default() };
        let annotated = DetectionLoader::of_nothing(12, &training, 18);
        let others = DetectionLoader::of_nothing(8, &training, 0);
        let shown = others.infos().enumerate().map(|(place, info)| (info, place)).collect();
        let images = WebImages { images: Images::open(&[]).unwrap(), shown, letterbox: Letterbox::None };
        let lengths = [6, 4].map(|n: usize| n.div_ceil(accumulation_steps as usize));
        let parameters = SelfTraining { order, min_size: [[40, 60], [60, 80]], max_size: 100, ..SelfTraining::default() };
        let web = Web { images, parameters, batch_size: 2, start_epoch: 3, turns: interleaved(&lengths) };
        MixedLoader { annotated, web: Some(web) }
    }

    /// Places and views of the images of a batch.
    type Shown = Vec<(usize, Vec<Placement>)>;

    /// Of each batch whether it is of images of the web, and its images.
    fn shown(loader: &MixedLoader, steps: Range<u32>) -> Vec<(bool, Shown)> {
        let of = |spec| match spec {
            MixedSpec::Annotated(spec) => {
                (false, DetectionLoader::shown(&spec).map(|(place, placement)| (place, vec![placement])).collect())
            }
            MixedSpec::Web { images, .. } => (true, images.into_iter().map(|(place, views)| (place, views.to_vec())).collect()),
        };
        loader.specs(steps).map(|(spec, _)| of(spec)).collect()
    }

    /// T8 of PromptDet's specification, and its defect 9.
    #[test]
    fn batches_of_both_sorts_take_turns_and_each_epoch_shows_every_image_once() {
        let mut orders = BTreeMap::new();
        for order in [WebOrder::Fixed, WebOrder::Reference] {
            let loader = loader(order, 1);
            let all = shown(&loader, 18..48);
            let words: String = all.iter().map(|(is_web, _)| if *is_web { '1' } else { '0' }).collect();
            assert_eq!(words, "0101001010".repeat(3));
            let epochs: Vec<[Vec<usize>; 2]> = all
                .chunks(10)
                .map(|epoch| {
                    let places = |wanted: bool| {
                        epoch
                            .iter()
                            .filter(move |(is_web, _)| *is_web == wanted)
                            .flat_map(|(_, images)| images.iter().map(|(place, _)| *place))
                    };
                    [places(false).collect(), places(true).collect()]
                })
                .collect();
            for [annotated, web] in &epochs {
                for (places, n) in [(annotated, 12), (web, 8)] {
                    let mut sorted = places.clone();
                    sorted.sort_unstable();
                    assert_eq!(sorted, (0..n).collect::<Vec<usize>>());
                }
            }
            assert!(epochs[0][0] != epochs[1][0] && epochs[1][0] != epochs[2][0]);
            orders.insert(format!("{order:?}"), epochs[0][1] == epochs[1][1] && epochs[1][1] == epochs[2][1]);
            // A training that continues sees what one that went through sees.
            for step in [18, 19, 27, 28, 35] {
                assert!(shown(&loader, step..48) == all[step as usize - 18..], "{step}");
            }
            let views = all.iter().filter(|(is_web, _)| *is_web).flat_map(|(_, images)| images).map(|(_, views)| views);
            for views in views {
                let shorter = [0, 1].map(|view: usize| views[view].to[0].min(views[view].to[1]));
                assert!(
                    (40..=60).contains(&shorter[0]) && (60..=80).contains(&shorter[1]) && views[1].to[0].max(views[1].to[1]) <= 100,
                    "{views:?}"
                );
            }
        }
        assert_eq!(orders, BTreeMap::from([("Fixed".into(), false), ("Reference".into(), true)]));
    }

    /// A step accumulates batches of one sort alone; the last one of each sort is filled with the first of the epoch.
    #[test]
    fn a_step_of_several_batches_is_of_one_sort() {
        let all = shown(&loader(WebOrder::Fixed, 4), 18..21);
        let sorts: Vec<bool> = all.iter().map(|(is_web, _)| *is_web).collect();
        assert_eq!(sorts, [[false; 4], [true; 4], [false; 4]].concat());
        let places = |batch: usize| all[batch].1.iter().map(|(place, _)| *place).collect::<Vec<_>>();
        assert_eq!([places(10), places(11)], [places(0), places(1)]);
    }
}
