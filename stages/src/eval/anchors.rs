//! `eval/anchors`: how many objects have an anchor that CLIP gives their class.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{annotations::Annotation, classes::ClassSplit, training::Filter};
use ovenbird_models::{
    clip::regions::Rules,
    detr::{
        Config, Localizer,
        matching::{Target, covered},
        prematch::{Dropped, DroppedClasses, classify},
    },
};
use rand::Rng as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, nn, no_grad};

use crate::{
    Artifact, Context, Error, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{Classes, read_json},
    clip::Clip,
    contract::is_default,
    detector::{
        images::{Normalisation, TestImages},
        ports::{ANNOTATIONS, CLASSES, IMAGES},
    },
    localizer::batches::relative,
    ports::only_file,
    region::frozen::{CHECKPOINT, Frozen, MAX_SIDE, PROMPTS, REGION_PROMPT, without_border},
};

/// Counts the objects of base classes that have an anchor which CLIP gives their class and which overlaps them: the others teach CORA's localizer nothing.
///
/// Anchors are drawn as `localizer/train` draws its own, and named in the same way. Nothing is trained, so this tells at once what a region prompt or
/// `annotations/relabel` does. With `split` anchors are also named with each half of the classes, which are drawn for each image. (CORA, section 7.2;
/// specification, section 14.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Anchors {
    /// Activation, and which CLIP of a checkpoint with several. It computes in f32.
    pub clip: Clip,
    /// Seed of the anchors and of halves of the classes.
    pub seed: u64,
    /// The number of anchors.
    pub anchors: u32,
    /// Maximum length of the longer side of images, in px.
    pub max_size: u32,
    /// Length of the shorter side of images, in px, unless the longer side would exceed `max_size`.
    pub min_size: u32,
    /// How boxes become cells of maps.
    #[serde(skip_serializing_if = "is_default")]
    pub rules: Rules,
    /// Name anchors with each half of the classes, as a training does in steps in which it splits them.
    pub split: bool,
}

impl Default for Anchors {
    fn default() -> Self {
        Self { clip: Clip::default(), seed: 42, anchors: 1000, max_size: 1333, min_size: 800, rules: Rules::default(), split: false }
    }
}

const COVERAGE: Out<Coverage> = Out::new("coverage", "json: objects, those with an anchor, and the share.");

/// How many objects have an anchor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// Objects of base classes.
    pub objects: usize,
    /// Those with an anchor.
    pub covered: usize,
    /// The share of these; none without objects.
    pub share: Option<f64>,
}

impl Artifact for Coverage {
    const KIND: &'static str = "coverage";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the json of `eval/anchors`";

    fn open(files: &[InputFile]) -> Result<Self> {
        read_json(only_file(Self::KIND, files)?)
    }
}

impl Stage for Anchors {
    const KIND: &'static str = "eval/anchors";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), CHECKPOINT.info(), REGION_PROMPT.info(), PROMPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[COVERAGE.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("anchors", self.anchors > 0, "at least 1"),
            ("max_size", (32..=MAX_SIDE).contains(&self.max_size), "from 32 to 8192 px"),
            ("min_size", (32..=self.max_size).contains(&self.min_size), "from 32 px to `max_size`"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(ClassSplit { base, .. }) = cx.inputs.read(CLASSES)?;
        let prompts = cx.inputs.read(PROMPTS)?;
        let frozen = Frozen::load(&self.clip, &cx.inputs.read(CHECKPOINT)?, cx.inputs.read_if_given(REGION_PROMPT)?, self.rules, cx)?;
        let texts = frozen.texts(&prompts, &base, cx)?;
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let ids = Classes::category_ids(&annotations, base.iter())?;
        let objects = |all: Vec<&Annotation>| all.into_iter().filter(|object| !object.is_crowd).cloned().collect();
        let by_image: BTreeMap<_, Vec<Annotation>> = annotations.by_image().into_iter().map(|(image, all)| (image, objects(all))).collect();
        let regions = frozen.regions()?;
        let store = nn::VarStore::new(Device::Cpu);
        let config = Config { queries: self.anchors.into(), ..Config::toy(regions.table().size()[1] / 2, frozen.dim()) };
        let anchors = no_grad(|| Ok::<_, Error>(Localizer::new(&store.root(), &config, self.seed)?.anchors().sigmoid()))?;
        let (anchors, mut random) = (anchors.detach(), cx.rng(unit));
        let n_images = annotations.images.len();
        cx.total(n_images as u64);
        let images = TestImages::open(cx.inputs.read(IMAGES)?, annotations, cx)?;
        let draft = cx.begin(unit)?;
        let (mut n_objects, mut n_covered) = (0, 0);
        images.each(0..n_images, ([self.max_size, self.min_size], Filter::Pillow), Normalisation::CLIP, &draft, cx, |image| {
            let (placement, size) = (image.placement, image.placement.to.into());
            let objects = by_image.get(&image.info.id).into_iter().flatten();
            let shown = |object: &Annotation| {
                let class = ids.iter().position(|id| *id == object.category_id)?;
                let xyxy = placement.show(&object.xyxy);
                (xyxy.area() > 0.0).then(|| (relative(&xyxy, placement.to), class as i64))
            };
            let (boxes, labels): (Vec<[f32; 4]>, Vec<i64>) = objects.filter_map(shown).unzip();
            let target = Target { boxes: Tensor::from_slice(boxes.as_flattened()).view([-1, 4]), labels: Tensor::from_slice(&labels) };
            let halves: Vec<bool> = (0..base.len()).map(|_| random.random::<f64>() > 0.5).collect();
            let others: Vec<bool> = halves.iter().map(|half| !half).collect();
            let passes: Vec<Option<&[bool]>> = if self.split { vec![None, Some(&halves), Some(&others)] } else { vec![None] };
            let found = no_grad(|| -> Result<Vec<bool>> {
                let pixels = without_border(&image.pixels, size);
                let map = regions.layer4(&regions.layer3(&pixels, &[size])?)?;
                let cosines = regions.fast(&map, &anchors)?.matmul(&texts.tr());
                let mut has_anchor = vec![false; labels.len()];
                for dropped in passes {
                    let dropped = dropped.map(|classes| Dropped { classes, rule: DroppedClasses::Fixed });
                    let classes = classify(&cosines, 1.0, None, dropped)?.classes.get(0).to_device(Device::Cpu);
                    for (all, found) in has_anchor.iter_mut().zip(covered(&anchors, &classes, &target)?) {
                        *all |= found;
                    }
                }
                Ok(has_anchor)
            })?;
            n_objects += found.len();
            n_covered += found.iter().filter(|has_anchor| **has_anchor).count();
            Ok(())
        })?;
        let share = (n_objects > 0).then(|| n_covered as f64 / n_objects as f64);
        let coverage = Coverage { objects: n_objects, covered: n_covered, share };
        cx.note(format!("{n_covered} of {n_objects} objects have an anchor of their class"));
        draft.write(COVERAGE, "coverage.json", &serde_json::to_vec(&coverage).expect("BUG: numbers are plain JSON"))?;
        cx.commit(draft, [("objects".into(), n_objects.into()), ("share".into(), share.into())].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Anchors::default()).is_empty());
    }
}
