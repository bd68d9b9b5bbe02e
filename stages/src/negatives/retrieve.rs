//! `negatives/retrieve`: for each class words that are similar to its name, and words that are not.

use ovenbird_models::{
    negatives::{RankVariance, Retrieved, Similarities, above, without_smallest},
    ral,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, Classes, Negatives, Vocabulary},
    clip::Clip,
    prompts::texts::counted_embeddings,
};

/// Words of a dry run, whose vocabulary is cut.
const DRY_WORDS: usize = 64;

/// Which words are dropped before negatives are retrieved, by their rank variance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Dropped {
    /// Those whose variance is below this. Published: 12.7e6 for LVIS and 13.2e6 for COCO with V3Det's names.
    Threshold(f64),
    /// This part of all words, those of smallest variance. The published thresholds drop 0.09 for LVIS and 0.24 for COCO.
    Fraction(f64),
}

/// Negatives of classes: for each the words of a vocabulary most similar to its name (hard) and least similar (easy), by CLIP's text
/// embeddings.
///
/// Words whose rank hardly varies from class to class are dropped first. Words that are on the lists of many classes are removed from all
/// lists, of similar and of dissimilar words apart. The defaults are RALF's for LVIS. Names of novel classes take part in both filters,
/// as in the reference, so their negatives are there too. (RALF, section 6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retrieve {
    /// Activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The sentence with a name for `{}`; underscores in names become spaces.
    pub template: String,
    /// What rank variance means: RALF's code takes the variance over the words at a rank, and so drops an arbitrary part of them
    /// (`reference`).
    pub rank_variance: RankVariance,
    /// Which words are dropped.
    pub drop: Dropped,
    /// Most similar, and least similar, words of each class before popular ones are removed.
    pub top: usize,
    /// Words on the lists of so many classes or more are removed. Published: 800 for LVIS and 55 for COCO.
    pub popularity_limit: usize,
    /// The least words of each kind that a class must keep: as many as training draws.
    pub least: usize,
}

impl Default for Retrieve {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            template: "a photo of a {}".into(),
            rank_variance: RankVariance::Reference,
            drop: Dropped::Threshold(12.7e6),
            top: 2000,
            popularity_limit: 800,
            least: 10,
        }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const VOCABULARY: In<Vocabulary> = In::required("vocabulary", "The names that negatives are chosen from.");
const NEGATIVES: Out<Negatives> = Out::new(
    "negatives",
    "safetensors: `anchors` f16 [K, D] of the classes and `words` f16 [V, D], unit norm; for each class \
     the places of its `hard` and `easy` words; metadata `classes`, base ++ novel, and `words`.",
);

impl Stage for Retrieve {
    const KIND: &'static str = "negatives/retrieve";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info(), VOCABULARY.info()];
    const OUTPUTS: &'static [PortInfo] = &[NEGATIVES.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        let (drop, is_sound, expected) = match self.drop {
            Dropped::Threshold(threshold) => ("drop.threshold", threshold >= 0.0 && threshold.is_finite(), "a number, 0 or more"),
            Dropped::Fraction(fraction) => ("drop.fraction", (0.0..1.0).contains(&fraction), "a number from 0 to below 1"),
        };
        Problem::unless(&[
            ("template", self.template.matches("{}").count() == 1, "one {} for the name"),
            (drop, is_sound, expected),
            ("top", self.top > 0, "at least 1"),
            ("popularity_limit", self.popularity_limit > 1, "at least 2: every word is on the list that it is on"),
            ("least", self.least > 0, "at least 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(split) = cx.inputs.read(CLASSES)?;
        let Vocabulary { mut names } = cx.inputs.read(VOCABULARY)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        let classes: Vec<String> = split.all().cloned().collect();
        if cx.most_items.is_some() {
            cx.note("a dry run: some words are retrieved for every class");
            names.truncate(DRY_WORDS);
        }
        cx.total((classes.len() + names.len()) as u64);
        let texts = |names: &[String]| names.iter().map(|name| self.template.replace("{}", &name.replace('_', " "))).collect::<Vec<_>>();
        let anchors = counted_embeddings(&clip, &texts(&classes), cx)?;
        let words = counted_embeddings(&clip, &texts(&names), cx)?;
        let Chosen { kept, retrieved: Retrieved { hard, easy } } = match cx.most_items {
            None => self.choose(&classes, &anchors, &words)?,
            Some(_) => {
                let kept: Vec<u32> = (0..names.len() as u32).collect();
                Chosen { retrieved: Retrieved { hard: vec![kept.clone(); classes.len()], easy: vec![kept.clone(); classes.len()] }, kept }
            }
        };
        let n_dropped = names.len() - kept.len();
        cx.note(format!("{n_dropped} of {} words are dropped, as their rank hardly varies", names.len()));
        let rows: Vec<i64> = kept.iter().map(|word| i64::from(*word)).collect();
        let tables = ral::Negatives { anchors, words: words.index_select(0, &Tensor::from_slice(&rows)), hard, easy };
        let words = kept.iter().map(|word| names[*word as usize].clone()).collect();
        let negatives = Negatives { classes, words, tables, clip: Some(space) };
        let (mut metrics, words) = negatives.counts();
        metrics.insert("dropped".into(), n_dropped.into());
        cx.note(words);
        let draft = cx.begin(unit)?;
        negatives.write(&draft, NEGATIVES)?;
        cx.commit(draft, metrics)
    }
}

/// The words that are not dropped, and those of each class as places among them.
#[derive(Debug)]
struct Chosen {
    /// Ascending places in the vocabulary.
    kept: Vec<u32>,
    retrieved: Retrieved,
}

impl Retrieve {
    /// `anchors`: `[K, D]`; `words`: `[V, D]`. Fails where a class keeps too few words.
    fn choose(&self, classes: &[String], anchors: &Tensor, words: &Tensor) -> Result<Chosen> {
        let variance = Similarities::new(anchors, words)?.rank_variance(self.rank_variance)?;
        let kept = match self.drop {
            Dropped::Threshold(threshold) => above(&variance, threshold),
            Dropped::Fraction(fraction) => without_smallest(&variance, fraction),
        };
        if kept.len() < self.top {
            let greatest = variance.iter().copied().fold(0.0, f64::max);
            let problem = format!(
                "expected at least the {} words of `top`, found {} after {} were dropped",
                self.top,
                kept.len(),
                variance.len() - kept.len()
            );
            let hint = format!("lower `top`, or drop fewer: the greatest rank variance of these {} words is {greatest:.0}", variance.len());
            return Err(Error::Input { port: VOCABULARY.info().name, problem, hint });
        }
        let rows: Vec<i64> = kept.iter().map(|word| i64::from(*word)).collect();
        let sampled = words.index_select(0, &Tensor::from_slice(&rows));
        let retrieved = Similarities::new(anchors, &sampled)?.retrieve(self.top, self.popularity_limit)?;
        for (kind, lists) in [("hard", &retrieved.hard), ("easy", &retrieved.easy)] {
            let few = classes.iter().zip(lists).filter(|(_, list)| list.len() < self.least);
            let few: Vec<String> = few.map(|(class, list)| format!("{class} ({})", list.len())).collect();
            if !few.is_empty() {
                let problem = format!("{} classes keep fewer than {} {kind} words: {}", few.len(), self.least, few.join(", "));
                let hint = "raise `top` or `popularity_limit`, or give a larger vocabulary".into();
                return Err(Error::Input { port: VOCABULARY.info().name, problem, hint });
            }
        }
        Ok(Chosen { kept, retrieved })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{detpro_ralf, numbers};

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Retrieve::default()).is_empty());
        let wrong = Retrieve { template: "a photo".into(), drop: Dropped::Fraction(1.0), ..Retrieve::default() };
        let fields: Vec<String> = Stage::check(&wrong).into_iter().map(|problem| problem.field).collect();
        assert_eq!(fields, ["template", "drop.fraction"]);
        let written = serde_json::to_value(Dropped::Fraction(0.09)).unwrap();
        assert_eq!(written, serde_json::json!({ "fraction": 0.09 }));
    }

    /// RALF's own code keeps these words of its golden data.
    #[test]
    fn words_are_dropped_before_others_are_retrieved() {
        let golden = detpro_ralf("ralf");
        let (anchors, words) = (&golden["rank/feat_classes"], &golden["rank/feat_words"]);
        let classes: Vec<String> = (0..30).map(|class| format!("class {class}")).collect();
        let drop = Dropped::Threshold(numbers(&golden["rank/threshold"])[0]);
        let stage = Retrieve { drop, top: 20, popularity_limit: 14, least: 1, ..Retrieve::default() };
        let Chosen { kept, retrieved } = stage.choose(&classes, anchors, words).unwrap();
        assert_eq!(kept.iter().map(|word| f64::from(*word)).collect::<Vec<_>>(), numbers(&golden["rank/kept"]));
        assert!(retrieved.hard.iter().chain(&retrieved.easy).flatten().all(|word| (*word as usize) < kept.len()));

        let refusal = Retrieve { least: 19, ..stage }.choose(&classes, anchors, words).unwrap_err().to_string();
        assert!(refusal.contains("classes keep fewer than 19 hard words: class "), "{refusal}");
        let many = Retrieve { drop, top: 100, ..Retrieve::default() }.choose(&classes, anchors, words).unwrap_err().to_string();
        assert_eq!(many, "vocabulary: expected at least the 100 words of `top`, found 58 after 62 were dropped");
        let fraction = Retrieve { rank_variance: RankVariance::Fixed, drop: Dropped::Fraction(0.25), top: 20, ..Retrieve::default() };
        assert_eq!(Retrieve { least: 1, ..fraction }.choose(&classes, anchors, words).unwrap().kept.len(), 90);
    }
}
