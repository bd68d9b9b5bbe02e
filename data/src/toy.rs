//! The toy world: a deterministic generator of photograph-like scenes, in the file formats of the real ones.
//!
//! Objects are a shape x a colour x a pattern, such as `striped red circle`. Sixty combinations are categories: 40 base and
//! 20 novel; every shape, colour and pattern of a novel category occurs in base ones, so that training on base
//! classes can carry over. A captioned web set, with wrong and noisy captions, stands in for what CLIP was trained on and
//! for LAION; a clean held-out set measures zero-shot accuracy; proposals have the recall and the noise of OLN.
//!
//! Every image is a function of the seed, its set and its place: neither order nor threads can matter.

mod labels;
mod paint;
mod web;

use std::collections::BTreeMap;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use serde::Serialize;
use serde_json::Value;

use crate::{boxes::Xyxy, classes::ClassSplit, images::Image, proposals::Proposal};
use paint::{Canvas, Look, Mask};
pub use web::{Captioned, Labelled, Trouble, trouble, web_path};

pub(crate) const SHAPES: [&str; 6] = ["circle", "square", "triangle", "star", "cross", "ring"];
pub(crate) const COLOURS: [&str; 6] = ["red", "green", "blue", "yellow", "purple", "orange"];
pub(crate) const PATTERNS: [&str; 4] = ["plain", "striped", "dotted", "checked"];
/// The number of novel combinations; twice as many are base.
const N_NOVEL: usize = 20;

/// Size and seed of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    /// Everything follows from it.
    pub seed: u64,
    /// Long side of scenes, in px.
    pub side_px: u32,
}

/// A set of scenes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// For training.
    Train,
    /// For evaluation.
    Val,
}

impl Set {
    /// `train` or `val`: the folder of its images.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
        }
    }
}

/// A category of the toy world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) shape: usize,
    pub(crate) colour: usize,
    pub(crate) pattern: usize,
}

impl Kind {
    /// `striped red circle`.
    pub(crate) fn name(self) -> String {
        format!("{} {} {}", PATTERNS[self.pattern], COLOURS[self.colour], SHAPES[self.shape])
    }
}

/// The 40 base and 20 novel combinations, base first. The rule is fixed: of all 144 in a scattered order, the first of
/// which each part occurs at most as often as an even spread allows.
pub(crate) fn kinds() -> Vec<Kind> {
    let kind = |code: usize| Kind { shape: code % 6, colour: code / 6 % 6, pattern: code / 36 };
    // 91 has no factor in common with 144, so this visits every combination once, and neighbours share few parts.
    (0..3 * N_NOVEL).map(|place| kind(place * 91 % 144)).collect()
}

/// The combinations that no class has, in the order of their codes.
fn unused() -> impl Iterator<Item = Kind> {
    let all = (0..144).map(|code| Kind { shape: code % 6, colour: code / 6 % 6, pattern: code / 36 });
    let classes = kinds();
    all.filter(move |kind| !classes.contains(kind))
}

/// What patterns consist of.
const NOUNS: [&str; 4] = ["one colour", "stripes", "dots", "checks"];

/// A description of each class: `a circle in red, with stripes`, base classes first.
pub fn descriptions() -> Vec<(String, String)> {
    let described = |kind: Kind| {
        let description = format!("a {} in {}, with {}", SHAPES[kind.shape], COLOURS[kind.colour], NOUNS[kind.pattern]);
        (kind.name(), description)
    };
    kinds().into_iter().map(described).collect()
}

/// What is said of the combinations that no class has, each phrase with the names of those that it is said of: shape, colour, what the pattern consists of, and
/// pairs of colour, pattern and shape. They stand for the noun chunks of descriptions. (RALF, section 12.)
pub fn phrases() -> BTreeMap<String, Vec<String>> {
    let mut sources: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for kind in unused() {
        let [shape, colour, pattern] = [SHAPES[kind.shape], COLOURS[kind.colour], PATTERNS[kind.pattern]];
        let pairs = [[colour, shape], [pattern, shape], [pattern, colour]].map(|pair| pair.join(" "));
        for phrase in [shape, colour, NOUNS[kind.pattern]].map(str::to_owned).into_iter().chain(pairs) {
            sources.entry(phrase).or_default().push(kind.name());
        }
    }
    sources
}

/// Names beside the classes: the combinations that no class has, in the order of their codes, then colours with shapes, patterns with shapes, and shapes.
/// (RALF, section 12.)
pub fn vocabulary() -> Vec<String> {
    let pairs = |first: &[&str]| first.iter().flat_map(|first| SHAPES.map(|shape| format!("{first} {shape}"))).collect::<Vec<_>>();
    combinations().into_iter().chain(pairs(&COLOURS)).chain(pairs(&PATTERNS)).chain(SHAPES.map(str::to_owned)).collect()
}

/// Names of the combinations of pattern, colour and shape that no class has, in the order of their codes.
pub fn combinations() -> Vec<String> {
    unused().map(Kind::name).collect()
}

/// The base and novel class names.
pub fn classes() -> ClassSplit {
    let names: Vec<String> = kinds().into_iter().map(Kind::name).collect();
    let (base, novel) = names.split_at(2 * N_NOVEL);
    ClassSplit { base: base.to_vec(), novel: novel.to_vec() }
}

/// The id of a class, by its place among base ++ novel: from 1, with gaps, as in COCO.
pub fn category_id(place: usize) -> u64 {
    place as u64 + 1 + place as u64 / 7
}

/// The id of a scene.
pub fn image_id(set: Set, index: usize) -> u64 {
    match set {
        Set::Train => 10_000_001 + 3 * index as u64,
        Set::Val => 1 + 7 * index as u64,
    }
}

/// A labelled object of a scene.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Its place among base ++ novel.
    pub class: usize,
    /// The box of the visible part.
    pub xyxy: Xyxy,
    /// The area of the visible part, px².
    pub area: f64,
    /// Polygons or compressed run lengths, as in COCO json.
    pub segmentation: Value,
    /// Whether this is a region of many objects of the class.
    pub is_crowd: bool,
}

/// A scene: its picture and its labels.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The picture, encoded.
    pub jpeg: Vec<u8>,
    /// Everything but the picture.
    pub labels: Labels,
}

/// The annotations of a scene.
#[derive(Debug, Clone, PartialEq)]
pub struct Labels {
    /// Its id.
    pub id: u64,
    /// Its path below the images' folder: `val/000000000008.jpg`.
    pub file_name: String,
    /// px.
    pub width: u32,
    /// px.
    pub height: u32,
    /// The caption's object.
    pub objects: Vec<Object>,
    /// Boxes as a proposal network would give them, best first.
    pub proposals: Vec<Proposal>,
}

/// Random numbers whose values do not depend on any library's idea of a distribution.
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    fn new(seed: u64, purpose: u64, index: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream((purpose << 48) | index as u64);
        Self(random)
    }

    /// In [0, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    pub(crate) fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    pub(crate) fn chance(&mut self, probability: f32) -> bool {
        self.unit() < probability
    }

    /// Roughly normal: mean 0, deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() * 1.414 - 4.243
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

impl World {
    /// The scene at a place of a set.
    pub fn scene(&self, set: Set, index: usize) -> Scene {
        let mut dice = Dice::new(self.seed, 1 + set as u64, index);
        let long = self.side_px as f32;
        let short = (long * dice.between(0.62, 0.85)).round();
        let (width, height) = if dice.chance(0.7) { (long, short) } else { (short, long) };
        let (width, height) = (width as usize, height as usize);
        let mut canvas = Canvas::background(&mut dice, width, height);
        canvas.clutter(&mut dice, 12);
        let placed = place_objects(set, &mut dice, &mut canvas);
        let in_front: Vec<Mask> = (0..dice.below(4)).map(|_| canvas.occluder(&mut dice)).collect();
        canvas.light(&mut dice);
        let quality = 62 + dice.below(34) as u8;
        let image: Image = canvas.finish(&mut dice);
        let objects = visible(&placed, &in_front, width, height);
        let proposals = propose(&mut dice, &objects, width as f32, height as f32);
        let id = image_id(set, index);
        let file_name = format!("{}/{id:012}.jpg", set.name());
        let labels = Labels { id, file_name, width: width as u32, height: height as u32, objects, proposals };
        Scene { jpeg: image.to_jpeg(quality), labels }
    }
}

/// Paints the objects of a scene, each in front of those before it.
fn place_objects(set: Set, dice: &mut Dice, canvas: &mut Canvas) -> Vec<Placed> {
    let kinds = kinds();
    let is_empty = dice.chance(0.05);
    let n_objects = if is_empty { 0 } else { 1 + dice.below(5) + dice.below(4) };
    let short = canvas.width.min(canvas.height) as f32;
    let mut placed: Vec<Placed> = Vec::new();
    if !is_empty && dice.chance(0.1) {
        placed.push(place_crowd(dice, canvas));
    }
    for _ in 0..n_objects {
        // Novel classes are rarer in training images, where their labels will be dropped.
        let is_novel = dice.chance(if set == Set::Train { 0.15 } else { 0.33 });
        let class = if is_novel { 2 * N_NOVEL + dice.below(N_NOVEL) } else { dice.below(2 * N_NOVEL) };
        let radius = match dice.below(10) {
            0..2 => dice.between(0.05, 0.075),
            2..6 => dice.between(0.08, 0.15),
            _ => dice.between(0.15, 0.3),
        } * short;
        let look = Look::new(dice, kinds[class], radius);
        // A few tries to find a place where not much of another object is hidden.
        let mut centre = [0.0; 2];
        for _ in 0..6 {
            centre = [
                dice.between(0.5 * radius, canvas.width as f32 - 0.5 * radius),
                dice.between(0.5 * radius, canvas.height as f32 - 0.5 * radius),
            ];
            let is_clear = |other: &Placed| {
                let apart = ((other.centre[0] - centre[0]).powi(2) + (other.centre[1] - centre[1]).powi(2)).sqrt();
                apart > 0.75 * (other.radius + radius)
            };
            if placed.iter().all(is_clear) {
                break;
            }
        }
        let mask = canvas.draw(&look, centre);
        placed.push(Placed { class, centre, radius, mask, look: Some(look) });
    }
    placed
}

/// Ten small objects of one class side by side.
fn place_crowd(dice: &mut Dice, canvas: &mut Canvas) -> Placed {
    let class = dice.below(2 * N_NOVEL);
    let kind = kinds()[class];
    let radius = 0.045 * canvas.width.min(canvas.height) as f32;
    let corner = [dice.between(0.1, 0.55) * canvas.width as f32, dice.between(0.1, 0.7) * canvas.height as f32];
    let mut mask = Mask::empty(canvas.width, canvas.height);
    for member in 0..10 {
        let look = Look::new(dice, kind, radius);
        let jitter = [dice.between(-0.4, 0.4) * radius, dice.between(-0.4, 0.4) * radius];
        let centre =
            [corner[0] + (member % 5) as f32 * 2.1 * radius + jitter[0], corner[1] + (member / 5) as f32 * 2.1 * radius + jitter[1]];
        mask.add(&canvas.draw(&look, centre));
    }
    let centre = [corner[0] + 4.2 * radius, corner[1] + radius];
    Placed { class, centre, radius: 5.0 * radius, mask, look: None }
}

/// An object on the canvas; a crowd has no look of its own.
struct Placed {
    class: usize,
    centre: [f32; 2],
    radius: f32,
    mask: Mask,
    look: Option<Look>,
}

/// The labels of what later objects and the things in front leave visible; objects of which less than a quarter, or less
/// than 20 px, is visible have none.
fn visible(placed: &[Placed], in_front: &[Mask], width: usize, height: usize) -> Vec<Object> {
    let mut objects = Vec::new();
    for (place, object) in placed.iter().enumerate() {
        let mut mask = object.mask.clone();
        let whole = mask.area();
        for above in placed[place + 1..].iter().map(|above| &above.mask).chain(in_front) {
            mask.remove(above);
        }
        let area = mask.area();
        if area < 20 || 4 * area < whole {
            continue;
        }
        let is_whole = area == whole && object.mask.is_inside(object.centre, object.radius);
        let polygon = object.look.as_ref().filter(|_| is_whole).and_then(|look| look.polygon(object.centre));
        let label = match polygon {
            Some(polygon) => labels::from_polygon(&polygon, width, height),
            None => labels::from_mask(&mask),
        };
        objects.push(Object {
            class: object.class,
            xyxy: label.xyxy,
            area: label.area,
            segmentation: label.segmentation,
            is_crowd: object.look.is_none(),
        });
    }
    objects
}

/// Boxes as OLN would give them: one to four a visible object (95 % of the large, 85 % of the small), and false ones.
fn propose(dice: &mut Dice, objects: &[Object], width: f32, height: f32) -> Vec<Proposal> {
    let mut proposals = Vec::new();
    let clip = |xyxy: Xyxy| Xyxy {
        x1: xyxy.x1.clamp(0.0, width),
        y1: xyxy.y1.clamp(0.0, height),
        x2: xyxy.x2.clamp(0.0, width),
        y2: xyxy.y2.clamp(0.0, height),
    };
    for object in objects.iter().filter(|object| !object.is_crowd) {
        let (w, h) = (object.xyxy.width(), object.xyxy.height());
        if !dice.chance(if w.min(h) < 24.0 { 0.85 } else { 0.96 }) {
            continue;
        }
        for attempt in 0..1 + dice.below(4) {
            let spread = 0.03 + 0.05 * attempt as f32;
            let mut edge = |position: f32, length: f32| position + dice.normal() * spread * length;
            let xyxy = clip(Xyxy {
                x1: edge(object.xyxy.x1, w),
                y1: edge(object.xyxy.y1, h),
                x2: edge(object.xyxy.x2, w),
                y2: edge(object.xyxy.y2, h),
            });
            if xyxy.width() >= 4.0 && xyxy.height() >= 4.0 {
                let score = (xyxy.iou(&object.xyxy) * 0.9 + 0.06 * dice.normal()).clamp(0.01, 0.99);
                proposals.push(Proposal { xyxy, score });
            }
        }
    }
    for _ in 0..40 + dice.below(35) {
        let (w, h) = (dice.between(0.06, 0.5) * width, dice.between(0.06, 0.5) * height);
        let (x1, y1) = (dice.between(0.0, width - w), dice.between(0.0, height - h));
        let xyxy = clip(Xyxy { x1, y1, x2: x1 + w, y2: y1 + h });
        let overlap = objects.iter().map(|object| object.xyxy.iou(&xyxy)).fold(0.0, f32::max);
        let score = (0.1 + 0.75 * overlap + 0.12 * dice.normal().abs()).clamp(0.01, 0.9);
        proposals.push(Proposal { xyxy, score });
    }
    proposals.sort_by(|a, b| b.score.total_cmp(&a.score));
    proposals
}

/// COCO json of some scenes.
pub fn coco_json(scenes: &[Labels]) -> Vec<u8> {
    labels::coco_json(scenes)
}

/// LVIS v1 json of the same scenes: novel classes are rare; each image says which classes are absent for certain.
pub fn lvis_json(seed: u64, scenes: &[Labels]) -> Vec<u8> {
    labels::lvis_json(seed, scenes)
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("BUG: labels are plain JSON")
}

#[cfg(test)]
mod tests;
