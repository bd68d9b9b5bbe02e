//! `eval/regions`: how often class embeddings name regions rightly.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::json;
use ovenbird_models::to_unit_length;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Artifact, Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{Classes, Negatives, PromptEmbeddings, PromptSamples, Prompts},
    clip::space,
    error::malformed,
    ports::only_file,
    prompts::naming::{ROWS, Said, name_rows, places},
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
///
/// With `negatives` it is measured how much nearer annotated boxes are to their class's name than to the words that are hard for it, which is what
/// RALF's losses are about: a detector's own embeddings come from `detector/embed`. (RALF, section 7.)
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
const NEGATIVES: In<Negatives> =
    In::optional("negatives", "Words that are hard, and words that are easy, for each class (`negatives/retrieve`).");
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

/// Mean cosines of annotated boxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cosines {
    /// Boxes.
    pub regions: usize,
    /// To the name of their class.
    pub name: f64,
    /// To its hard words, their mean.
    pub hard: f64,
    /// To its easy words, their mean.
    pub easy: f64,
}

/// Mean cosines of annotated boxes of base and of novel classes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Words {
    /// Of base classes.
    pub base: Cosines,
    /// Of novel classes.
    pub novel: Cosines,
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
    /// Annotated boxes and the words of their classes, if there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<Words>,
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
    const INPUTS: &'static [PortInfo] = &[SAMPLES.info(), PROMPTS.info(), CLASSES.info(), NEGATIVES.info()];
    const OUTPUTS: &'static [PortInfo] = &[ACCURACY.info()];

    fn check(&self) -> Vec<Problem> {
        let is_positive = self.temperature > 0.0 && self.temperature.is_finite();
        Problem::unless(&[("temperature", is_positive, "a number above 0")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (samples, prompts) = (cx.inputs.read(SAMPLES)?, cx.inputs.read(PROMPTS)?);
        let negatives = cx.inputs.read_if_given(NEGATIVES)?;
        let mut spaces = vec![(SAMPLES.info().name, samples.clip()?), (PROMPTS.info().name, prompts.clip)];
        spaces.extend(negatives.as_ref().map(|negatives| (NEGATIVES.info().name, negatives.clip)));
        space::common(&spaces)?;
        let (rows, embeddings) = (samples.rows()?, samples.embeddings()?);
        let names: Vec<String> = classes.all().cloned().collect();
        let vectors = to_unit_length(&prompts.select(&names)?.to_kind(Kind::Float));
        let of_words = negatives.as_ref().map(|negatives| (NEGATIVES.info().name, negatives.tables.anchors.size()[1]));
        for (port, dim) in [(PROMPTS.info().name, vectors.size()[1])].into_iter().chain(of_words) {
            if embeddings.n_rows > 0 && dim != embeddings.dim as i64 {
                let problem = format!("class embeddings have {dim} numbers, those of regions {}", embeddings.dim);
                return Err(Error::Input { port, problem, hint: "use those of the CLIP that embedded the regions".into() });
            }
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
        if let Some(negatives) = negatives {
            let words = ClassWords::of(&negatives, &names);
            if let Some(first) = words.without.first() {
                cx.note(format!("cosines to words leave out {} classes without words, `{first}` among them", words.without.len()));
            }
            let class = |row: usize| rows.classes[row].filter(|_| rows.ious[row] >= 1.0).map(|class| places[class as usize]);
            accuracy.words = Some(words.cosines(&embeddings, class, n_base)?);
        }
        let draft = cx.begin(unit)?;
        draft.write(ACCURACY, "accuracy.json", &serde_json::to_vec_pretty(&accuracy).expect("BUG: numbers are plain JSON"))?;
        cx.commit(draft, accuracy.metrics())
    }
}

/// The name of each class with its hard and its easy words.
struct ClassWords {
    /// The name, the mean of hard words, and the mean of easy ones, each of unit length before, f32 `[3, K, D]`.
    tables: Tensor,
    /// Whether a class has words of both kinds.
    has_words: Vec<bool>,
    /// The classes that have not.
    without: Vec<String>,
}

impl ClassWords {
    fn of(negatives: &Negatives, names: &[String]) -> Self {
        let lists = |class: usize| [&negatives.tables.hard[class], &negatives.tables.easy[class]];
        let place = |name: &String| negatives.classes.iter().position(|known| known == name);
        let of_names: Vec<Option<usize>> =
            names.iter().map(|name| place(name).filter(|class| lists(*class).iter().all(|words| !words.is_empty()))).collect();
        let anchors = to_unit_length(&negatives.tables.anchors);
        let words = to_unit_length(&negatives.tables.words);
        let mean = |list: &[u32]| {
            let rows: Vec<i64> = list.iter().map(|word| i64::from(*word)).collect();
            words.index_select(0, &Tensor::from_slice(&rows)).mean_dim([0_i64].as_slice(), false, Kind::Float)
        };
        let none = || anchors.get(0).zeros_like();
        let rows = |row: &dyn Fn(usize) -> Tensor| {
            Tensor::stack(&of_names.iter().map(|class| class.map_or_else(none, row)).collect::<Vec<_>>(), 0)
        };
        let tables = [rows(&|class| anchors.get(class as i64)), rows(&|class| mean(lists(class)[0])), rows(&|class| mean(lists(class)[1]))];
        let without = names.iter().zip(&of_names).filter(|(_, class)| class.is_none()).map(|(name, _)| name.clone()).collect();
        Self { tables: Tensor::stack(&tables, 0), has_words: of_names.iter().map(Option::is_some).collect(), without }
    }

    /// Mean cosines of rows to the words of their classes; `class`: that of a row, if it counts.
    fn cosines(&self, embeddings: &PromptEmbeddings, class: impl Fn(usize) -> Option<usize>, n_base: usize) -> Result<Words> {
        let counts = |row: &usize| class(*row).is_some_and(|class| self.has_words.get(class) == Some(&true));
        let counted: Vec<usize> = (0..embeddings.n_rows).filter(counts).collect();
        let mut words = Words::default();
        for rows in counted.chunks(ROWS) {
            let regions = Tensor::from_slice(&embeddings.gather(rows.iter().copied())).view([-1, embeddings.dim as i64]);
            let classes: Vec<usize> = rows.iter().filter_map(|row| class(*row)).collect();
            let places = Tensor::from_slice(&classes.iter().map(|class| *class as i64).collect::<Vec<_>>());
            let cosines = (self.tables.index_select(1, &places) * to_unit_length(&regions)).sum_dim_intlist(-1, false, Kind::Double);
            let cosines = Vec::<f64>::try_from(cosines.tr().contiguous().view(-1)).map_err(ovenbird_models::Error::from)?;
            for (class, of_row) in classes.into_iter().zip(cosines.as_chunks::<3>().0) {
                let sum = if class < n_base { &mut words.base } else { &mut words.novel };
                sum.regions += 1;
                for (sum, cosine) in [&mut sum.name, &mut sum.hard, &mut sum.easy].into_iter().zip(of_row) {
                    *sum += cosine;
                }
            }
        }
        for Cosines { regions, name, hard, easy } in [&mut words.base, &mut words.novel] {
            [name, hard, easy].into_iter().for_each(|sum| *sum /= (*regions).max(1) as f64);
        }
        Ok(words)
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
        let Words { base, novel } = self.words.unwrap_or_default();
        for (group, Cosines { name, hard, .. }) in [("base", base), ("novel", novel)].into_iter().filter(|(_, words)| words.regions > 0) {
            metrics.insert(format!("truth.{group}.margin"), (name - hard).into());
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
    use ovenbird_models::ral;

    use super::*;
    use crate::artifacts::prompt_samples::tests::samples;

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

    #[test]
    fn annotated_boxes_are_nearer_to_their_name_than_to_words() {
        // Boxes of the classes 0 (base) and 2 (novel), a proposal, and a box of class 1, which has no easy words.
        let rows = [(1, Some(0), 1.0, vec![0.6, 0.8]), (1, Some(2), 1.0, vec![0.0, 1.0]), (1, Some(0), 0.9, vec![1.0, 0.0])];
        let (_folder, samples) = samples(&["owl", "wren", "kite"], &[rows.to_vec(), vec![(2, Some(1), 1.0, vec![1.0, 0.0])]].concat());
        let (found, embeddings) = (samples.rows().unwrap(), samples.embeddings().unwrap());
        let table = |numbers: &[f32]| Tensor::from_slice(numbers).view([-1, 2]);
        // The classes in another order than the samples', with one that is not asked for.
        let tables = ral::Negatives {
            anchors: table(&[0.0, 5.0, 1.0, 0.0, 2.0, 0.0, 1.0, 1.0]),
            words: table(&[3.0, 4.0, 0.0, 1.0, -2.0, 0.0]),
            hard: vec![vec![0], vec![0, 1], vec![1], vec![0]],
            easy: vec![vec![2], vec![2], Vec::new(), vec![2]],
        };
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let negatives = Negatives { classes: named(&["kite", "owl", "wren", "crane"]), words: named(&["a", "b", "c"]), tables, clip: None };
        let words = ClassWords::of(&negatives, &named(&["owl", "wren", "kite"]));
        assert_eq!((words.without.as_slice(), words.has_words.as_slice()), (named(&["wren"]).as_slice(), [true, false, true].as_slice()));
        let class = |row: usize| found.classes[row].filter(|_| found.ious[row] >= 1.0).map(|class| class as usize);
        let Words { base, novel } = words.cosines(&embeddings, class, 2).unwrap();
        // The owl (0.6, 0.8): name (1, 0), hard words (0.6, 0.8) and (0, 1), easy word (-1, 0). The kite (0, 1): name (0, 1), hard word (0.6, 0.8).
        for (found, regions, expected) in [(base, 1, [0.6, 0.9, -0.6]), (novel, 1, [1.0, 0.8, 0.0])] {
            assert_eq!(found.regions, regions);
            // Embeddings are stored in f16, with 11 bits.
            let off = [found.name, found.hard, found.easy]
                .into_iter()
                .zip(expected)
                .map(|(found, expected): (f64, f64)| (found - expected).abs());
            assert!(off.fold(0.0, f64::max) < 1e-3, "{found:?}");
        }
        let metrics = Accuracy { words: Some(Words { base, novel }), ..Accuracy::default() }.metrics();
        assert!((metrics["truth.novel.margin"].as_f64().unwrap() - 0.2).abs() < 1e-3);
    }
}
