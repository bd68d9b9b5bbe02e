//! `concepts/import`: concepts that another program encoded.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::of_unit_length;
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{Concepts, PublishedConcepts},
};

/// Concepts of RALF, `v3det_gpt_noun_chunk_lvis_strict.pkl` or `v3det_gpt_noun_chunk_coco_strict.pkl`, checked: embeddings of phrases.
///
/// The published files have no phrases; each then gets its place as its name, "0", "1" and so on. What `concepts/export` wrote has them.
/// Rows are made of unit length, as every reader of RALF does, and rounded to f16; one without a direction is refused. (RALF, section 8.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {}

const FILE: In<PublishedConcepts> =
    In::required("file", "A dict of `all_noun_chunks`: a dict of `text_features` f16 or f32 [N, D], of any norm, and optionally `names`.");
const CONCEPTS: Out<Concepts> = Out::new(
    "concepts",
    "safetensors: `embeddings` f16 [N, D], unit norm; metadata `names`, the phrases or their places, and `sources`, which are empty.",
);

impl Stage for Import {
    const KIND: &'static str = "concepts/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILE.info()];
    const OUTPUTS: &'static [PortInfo] = &[CONCEPTS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let file = cx.inputs.read(FILE)?;
        let published = file.load()?;
        if published.names.is_none() {
            cx.note("the file has no phrases: each is called by its place");
        }
        let concepts = of_unit_length(published, file.path())?;
        let draft = cx.begin(unit)?;
        concepts.write(&draft, CONCEPTS)?;
        cx.tick(1);
        cx.commit(draft, [("concepts".to_owned(), concepts.phrases.len().into())].into())
    }
}
