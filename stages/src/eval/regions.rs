//! `eval/regions`: how often class embeddings name regions rightly.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::json;
use ovenbird_models::to_unit_length;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::{
    Artifact, Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{Classes, PromptSamples, Prompts},
    clip::space,
    error::malformed,
    ports::only_file,
    prompts::naming::{Said, name_rows, places},
};

/// Proposals with a smaller IoU show background, or too little of an object to name it.
const MIN_OBJECT_IOU: f32 = 0.5;
/// A background region is confidently named from these probabilities on.
const CONFIDENT: [f64; 2] = [0.5, 0.9];

/// Compares class embeddings with CLIP embeddings of regions whose classes are known: no detector and no thresholds, hence little noise.
///
/// A region is named by the class of the largest cosine among all classes, base and novel. Counted apart: annotated boxes, and proposals by IoU in
/// steps of 0.1 from 0.5 on. Of proposals without an object it is counted how many get a probability of at least 0.5 and 0.9 for some class, which
/// is what DetPro's treatment of background is about. (DetPro, section 3.5.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Regions {
    /// What cosines are divided by before the softmax.
    pub temperature: f64,
}

impl Default for Regions {
    fn default() -> Self {
        Self { temperature: 0.01 }
    }
}

const SAMPLES: In<PromptSamples> = In::required("samples", "Embeddings of regions with their classes and IoUs (`prompts/detpro-data`).");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const ACCURACY: Out<AccuracyFile> = Out::new("accuracy", "Counts and shares, json.");

/// How often regions were named rightly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Named {
    /// Regions.
    pub regions: usize,
    /// Those whose class had the largest cosine.
    pub top1: usize,
    /// Those whose class was among the five largest.
    pub top5: usize,
}

/// How often regions of base and of novel classes were named rightly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ByGroup {
    /// Of base classes.
    pub base: Named,
    /// Of novel classes.
    pub novel: Named,
}

/// What class embeddings made of some regions.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Annotated boxes.
    pub truth: ByGroup,
    /// Proposals, by the IoU from which on they are counted: `0.5` to `0.9`, in steps of 0.1.
    pub proposals: BTreeMap<String, ByGroup>,
    /// Proposals without an object.
    pub background: usize,
    /// Of these, those with a probability of at least 0.5 for some class, and of at least 0.9.
    pub confident: [usize; 2],
}

/// What `eval/regions` found.
#[derive(Debug, Clone)]
pub struct AccuracyFile(pub Accuracy);

impl Artifact for AccuracyFile {
    const KIND: &'static str = "accuracy";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the numbers that `eval/regions` wrote";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        json::parse(&file.read()?).map(Self).map_err(|fault| malformed(&file.path, fault.to_string()))
    }
}

impl Stage for Regions {
    const KIND: &'static str = "eval/regions";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[SAMPLES.info(), PROMPTS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[ACCURACY.info()];

    fn check(&self) -> Vec<Problem> {
        let is_positive = self.temperature > 0.0 && self.temperature.is_finite();
        Problem::unless(&[("temperature", is_positive, "a number above 0")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (samples, prompts) = (cx.inputs.read(SAMPLES)?, cx.inputs.read(PROMPTS)?);
        space::common(&[(SAMPLES.info().name, samples.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        let (rows, embeddings) = (samples.rows()?, samples.embeddings()?);
        let names: Vec<String> = classes.all().cloned().collect();
        let vectors = to_unit_length(&prompts.select(&names)?.to_kind(Kind::Float));
        if embeddings.n_rows > 0 && vectors.size()[1] != embeddings.dim as i64 {
            let problem = format!("class embeddings have {} numbers, those of regions {}", vectors.size()[1], embeddings.dim);
            return Err(Error::Input {
                port: PROMPTS.info().name,
                problem,
                hint: "use prompts of the CLIP that embedded the regions".into(),
            });
        }
        let places = places(&rows.names, &classes);
        let unknown: BTreeSet<&String> =
            rows.names.iter().zip(&places).filter(|(_, place)| **place == names.len()).map(|(name, _)| name).collect();
        if let Some(first) = unknown.first() {
            cx.note(format!("regions of {} classes that `classes` does not name, `{first}` among them, are not counted", unknown.len()));
        }
        cx.total(embeddings.n_rows as u64);
        let (mut accuracy, n_base) = (Accuracy::default(), classes.base.len());
        let proceed = |n_rows: usize| {
            cx.tick(n_rows as u64);
            cx.proceed()
        };
        name_rows(&embeddings, &vectors, self.temperature, &proceed, |row, said| {
            let class = rows.classes[row].map(|class| Some(places[class as usize]).filter(|place| *place < names.len()));
            accuracy.count(class, rows.ious[row], said, n_base);
        })?;
        let draft = cx.begin(unit)?;
        draft.write(ACCURACY, "accuracy.json", &serde_json::to_vec_pretty(&accuracy).expect("BUG: numbers are plain JSON"))?;
        cx.commit(draft, accuracy.metrics())
    }
}

impl Accuracy {
    /// Counts a region. `class`: none of background, and of an object its place, if it has one.
    fn count(&mut self, class: Option<Option<usize>>, iou: f32, said: &Said, n_base: usize) {
        let Some(class) = class else {
            if iou < MIN_OBJECT_IOU {
                self.background += 1;
                for (n, least) in self.confident.iter_mut().zip(CONFIDENT) {
                    *n += usize::from(said.probability >= least);
                }
            }
            return;
        };
        let Some(class) = class else { return };
        let by_group = match iou {
            1.0.. => &mut self.truth,
            MIN_OBJECT_IOU.. => self.proposals.entry(format!("0.{}", (iou * 10.0) as u32)).or_default(),
            _ => return,
        };
        let named = if class < n_base { &mut by_group.base } else { &mut by_group.novel };
        named.regions += 1;
        named.top1 += usize::from(said.best[0] == class as i64);
        named.top5 += usize::from(said.best.contains(&(class as i64)));
    }

    /// Shares in [0, 1], left out where nothing was counted.
    fn metrics(&self) -> BTreeMap<String, serde_json::Value> {
        let mut all = ByGroup::default();
        for by_group in self.proposals.values() {
            for (sum, named) in [(&mut all.base, by_group.base), (&mut all.novel, by_group.novel)] {
                *sum = Named { regions: sum.regions + named.regions, top1: sum.top1 + named.top1, top5: sum.top5 + named.top5 };
            }
        }
        let groups = [("truth", self.truth), ("proposals", all)];
        let groups = groups.into_iter().flat_map(|(of, group)| [(of, "base", group.base), (of, "novel", group.novel)]);
        let mut metrics = BTreeMap::new();
        for (of, group, Named { regions, top1, top5 }) in groups.filter(|(.., named)| named.regions > 0) {
            for (metric, right) in [("top1", top1), ("top5", top5)] {
                metrics.insert(format!("{of}.{group}.{metric}"), (right as f64 / regions as f64).into());
            }
        }
        if self.background > 0 {
            for (n, least) in self.confident.into_iter().zip(CONFIDENT) {
                metrics.insert(format!("background.confident_{least}"), (n as f64 / self.background as f64).into());
            }
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn regions_are_counted_by_what_they_show_and_how_well() {
        // Classes 0 and 1 are base, 2 is novel; the largest cosine first.
        let cosines = Tensor::from_slice(&[0.9_f32, 0.1, 0.0, 0.2, 0.3, 0.4, 0.5, 0.49, 0.1]).view([3, 3]);
        let said = Said::of(&cosines, 0.01).unwrap();
        assert_eq!(said.iter().map(|said| said.best[0]).collect::<Vec<_>>(), [0, 2, 0]);
        let mut found = Accuracy::default();
        found.count(Some(Some(0)), 1.0, &said[0], 2);
        found.count(Some(Some(2)), 1.0, &said[1], 2);
        found.count(Some(Some(1)), 0.65, &said[2], 2);
        // Too little of an object, a class of another list, background, and background that overlaps an object of it.
        found.count(Some(Some(1)), 0.4, &said[2], 2);
        found.count(Some(None), 0.8, &said[2], 2);
        found.count(None, 0.2, &said[2], 2);
        found.count(None, 0.3, &said[0], 2);
        let right = Named { regions: 1, top1: 1, top5: 1 };
        assert_eq!(found.truth, ByGroup { base: right, novel: right });
        let second = ByGroup { base: Named { top1: 0, ..right }, novel: Named::default() };
        assert_eq!(found.proposals, BTreeMap::from([("0.6".to_owned(), second)]));
        // exp(1) / (exp(1) + 1) is 0.73.
        assert_eq!((found.background, found.confident), (2, [2, 1]));
        let metrics = found.metrics();
        assert_eq!((&metrics["truth.novel.top1"], &metrics["proposals.base.top1"]), (&1.0.into(), &0.0.into()));
        assert!(!metrics.contains_key("proposals.novel.top1") && metrics["background.confident_0.9"] == 0.5);
    }
}
