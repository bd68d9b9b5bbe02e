//! `concepts/export`: concepts for RALF's code.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::published;
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{Concepts, PublishedConcepts},
    error::write_error,
};

/// Concepts for RALF's code: a `.pkl` that `torch.load` reads, with the phrases beside the embeddings.
///
/// RALF reads `torch.load(file)["all_noun_chunks"]["text_features"]`; `names` is what this program adds. What a phrase was made from is
/// left out. (RALF, section 8.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const CONCEPTS: In<Concepts> = In::required("concepts", "Phrases with embeddings.");
const EXPORTED: Out<PublishedConcepts> = Out::new(
    "file",
    "`concepts.pkl`: a dict of `all_noun_chunks`, a dict of `text_features` f32 [N, D], of unit norm, and `names`, a list of N phrases.",
);

impl Stage for Export {
    const KIND: &'static str = "concepts/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CONCEPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let concepts = cx.inputs.read(CONCEPTS)?;
        let draft = cx.begin(unit)?;
        let mut file = draft.create(EXPORTED, "concepts.pkl")?;
        let path = file.path().to_owned();
        published(&concepts).write(&mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        cx.tick(1);
        cx.commit(draft, [("concepts".to_owned(), concepts.phrases.len().into())].into())
    }
}
