//! `concepts/build`: embeddings of phrases.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, Concepts, Phrases},
    clip::Clip,
    prompts::texts::counted_embeddings,
};

/// Phrases of a dry run, whose list is cut; enough for what is retrieved for a region.
const DRY_PHRASES: usize = 64;

/// Concepts: phrases that describe parts and properties of objects, with CLIP's text embeddings.
///
/// RALF's are noun chunks of descriptions by GPT-3, such as "worn on the feet"; they cannot be made again, so the phrases are an input, and
/// each keeps its sources. (RALF, section 8.1.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Build {
    /// Activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The sentence with a phrase for `{}`. RALF does not say which one was used.
    pub template: String,
}

impl Default for Build {
    fn default() -> Self {
        Self { clip: Clip::default(), template: "{}".into() }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const PHRASES: In<Phrases> = In::required("phrases", "Phrases with what they were made from.");
const CONCEPTS: Out<Concepts> =
    Out::new("concepts", "safetensors: `embeddings` f16 [N, D], unit norm; metadata `names`, the phrases, and `sources`.");

impl Stage for Build {
    const KIND: &'static str = "concepts/build";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), PHRASES.info()];
    const OUTPUTS: &'static [PortInfo] = &[CONCEPTS.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[("template", self.template.matches("{}").count() == 1, "one {} for the phrase")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Phrases(mut phrases) = cx.inputs.read(PHRASES)?;
        if phrases.is_empty() {
            let (problem, hint) = ("expected at least one phrase, found none".into(), "give phrases that describe objects".into());
            return Err(Error::Input { port: PHRASES.info().name, problem, hint });
        }
        if cx.most_items.is_some() {
            phrases.truncate(DRY_PHRASES);
        }
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, cx.device, cx)?;
        cx.total(phrases.len() as u64);
        let texts: Vec<String> = phrases.iter().map(|phrase| self.template.replace("{}", &phrase.phrase)).collect();
        let embeddings = counted_embeddings(&clip, &texts, cx)?;
        let n = phrases.len();
        let draft = cx.begin(unit)?;
        Concepts { phrases, embeddings, clip: Some(space) }.write(&draft, CONCEPTS)?;
        cx.commit(draft, [("concepts".to_owned(), n.into())].into())
    }
}
