//! `prompts/embed`: embeddings of any classes around the contexts that `prompts/rpl` learned.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::described::{RPL_CONTEXT, Renamed, described_prompts, prompted, published_names};
use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{CheckpointFile, Classes, Descriptions, PROMPTS_FILE, Prompts, TrainingState, read_weights},
    clip::{Clip, space},
};

/// Class embeddings of any classes, from the contexts that `prompts/rpl` learned, or that `prompts/import` read: the text embedding of the name and the
/// description behind them, not normalised. Names and texts are kept beside the rows. (PromptDet, section 6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Embed {
    /// Activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// What classes are called in `descriptions`, where that is another name.
    pub renamed: Renamed,
}

impl Default for Embed {
    fn default() -> Self {
        Self { clip: Clip::default(), renamed: published_names() }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CONTEXT: In<Prompts> = In::required("prompts", "Class embeddings with contexts (`prompts/rpl`).");
/// The same file, for what class embeddings do not say.
const WHOLE_FILE: In<TrainingState> = In::required("prompts", "");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const DESCRIPTIONS: In<Descriptions> = In::required("descriptions", "What each class is.");
const EMBEDDED: Out<Prompts> = Out::new(
    "prompts",
    "safetensors: `embeddings` f32 [K, D], not normalised; `ctx1` and `ctx2` f32 [M, C]; metadata `names`, base ++ novel, and `texts`.",
);

impl Stage for Embed {
    const KIND: &'static str = "prompts/embed";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CONTEXT.info(), CLASSES.info(), DESCRIPTIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EMBEDDED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, Device::Cpu, cx)?;
        let space =
            space::common(&[(CHECKPOINT.info().name, Some(space)), (CONTEXT.info().name, cx.inputs.read(CONTEXT)?.clip)])?.unwrap_or(space);
        let learned = read_weights(&cx.inputs.read(WHOLE_FILE)?.file)?;
        let text = clip.causal_text()?;
        let contexts = RPL_CONTEXT.map(|name| learned.tensors().get(name).map(|tensor| tensor.to_kind(Kind::Float)));
        let [Some(before), Some(behind)] = contexts else {
            let problem = "expected contexts `ctx1` and `ctx2` beside the embeddings, found none".into();
            return Err(Error::Input { port: CONTEXT.info().name, problem, hint: "give what `prompts/rpl` learned".into() });
        };
        if before.size() != behind.size() || !matches!(before.size()[..], [m, c] if m > 0 && c == text.width()) {
            let (width, found) = (text.width(), [before.size(), behind.size()]);
            let problem = format!("expected two contexts [M, {width}], as wide as the checkpoint's tokens, found {found:?}");
            return Err(Error::Input { port: CONTEXT.info().name, problem, hint: "use the checkpoint that they were learned with".into() });
        }
        let names: Vec<String> = classes.all().cloned().collect();
        let texts = cx.inputs.read(DESCRIPTIONS)?.of(&names, &self.renamed)?;
        let prompted = prompted(&clip, &texts, before.size()[0] as usize)?;
        let (tensors, metadata) = described_prompts(&prompted, &[before, behind], &names, &texts, space)?;
        cx.tick(1);
        let draft = cx.begin(unit)?;
        draft.write_tensors(EMBEDDED, PROMPTS_FILE, &tensors, &metadata)?;
        cx.commit(draft, [("classes".into(), names.len().into())].into())
    }
}
