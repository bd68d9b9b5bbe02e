//! `prompts/ensemble`: class names into sentences, sentences into embeddings, embeddings averaged.

use std::collections::BTreeMap;

use ovenbird_models::{
    clip::{
        self,
        tokenizer::{Overlong, Padding, Tokenizer},
    },
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use super::Templates;
use crate::{
    Context, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, Classes, Prompts},
    clip::Clip,
};

/// Class embeddings from sentences.
///
/// Per sentence: encode, normalise. Then the mean over the sentences, base classes first, then novel ones. ViLD's prompts
/// are the mean as it is, with a norm below 1 (`renormalise: false`); CLIP normalises the mean again. (OADP, section 5.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ensemble {
    /// How CLIP is run.
    pub clip: Clip,
    /// Which sentences.
    pub templates: Templates,
    /// Whether the mean is normalised again.
    pub renormalise: bool,
    /// Whether underscores in class names become spaces.
    pub spaces: bool,
}

const CHECKPOINT: In<CheckpointFile> = In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const PROMPTS: Out<Prompts> = Out::new("prompts", "safetensors: `embeddings` f32 [K, D]; metadata `names`, base ++ novel.");

impl Stage for Ensemble {
    const KIND: &'static str = "prompts/ensemble";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROMPTS.info()];

    fn check(&self) -> Vec<Problem> {
        let sentences = self.templates.sentences();
        let mut problems: Vec<Problem> = sentences
            .iter()
            .filter(|sentence| sentence.matches("{}").count() != 1)
            .map(|sentence| Problem::new("templates", format!("expected one {{}} for the class name, found `{sentence}`")))
            .collect();
        if sentences.is_empty() {
            problems.push(Problem::new("templates", "expected at least one sentence"));
        }
        problems
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let clip = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?)?;
        let names: Vec<String> = classes.all().cloned().collect();
        let (sentences, tokenizer) = (self.templates.sentences(), Tokenizer::new());
        cx.total(names.len() as u64);
        let mut rows = Vec::new();
        for name in &names {
            cx.proceed()?;
            let name = if self.spaces { name.replace('_', " ") } else { name.clone() };
            let texts: Vec<String> = sentences.iter().map(|sentence| sentence.replace("{}", &name)).collect();
            rows.push(ensemble(&clip, &tokenizer, &texts)?);
            cx.tick(1);
        }
        let mut embeddings = Tensor::stack(&rows, 0);
        if self.renormalise {
            embeddings = to_unit_length(&embeddings);
        }
        let norms = embeddings.norm_scalaropt_dim(2.0, [-1], false);
        let metrics =
            [("min_norm".into(), norms.min().double_value(&[]).into()), ("max_norm".into(), norms.max().double_value(&[]).into())];

        let names = serde_json::to_string(&names).expect("BUG: names are plain JSON");
        let draft = cx.begin(unit)?;
        let tensors = BTreeMap::from([("embeddings".to_owned(), embeddings)]);
        draft.write_tensors(PROMPTS, "prompts.safetensors", &tensors, &BTreeMap::from([("names".to_owned(), names)]))?;
        cx.commit(draft, metrics.into())
    }
}

/// The mean of the normalised embeddings of some texts, f32 `[D]`.
pub(crate) fn ensemble(clip: &clip::Clip, tokenizer: &Tokenizer, texts: &[String]) -> Result<Tensor> {
    let tokens = tokenizer.batch(texts, Padding::Longest, Overlong::Refuse)?;
    no_grad(|| Ok(to_unit_length(&clip.encode_text(&tokens)?.to_kind(Kind::Float)).mean_dim(0, false, Kind::Float)))
}
