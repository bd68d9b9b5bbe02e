//! `prompts/export`: class embeddings for other programs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::write;
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{Prompts, PublishedPrompts},
    error::write_error,
};

/// Class embeddings for other programs: a `.pth` dict, which OADP and `prompts/import` read.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings.");
const EXPORTED: Out<PublishedPrompts> = Out::new(
    "file",
    "`prompts.pth`: a dict of `embeddings` f32 [K, D], `names` (a list), and, if they were learned, `scaler` and `bias`, f32 [].",
);

impl Stage for Export {
    const KIND: &'static str = "prompts/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[PROMPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let prompts = cx.inputs.read(PROMPTS)?;
        let draft = cx.begin(unit)?;
        let mut file = draft.create(EXPORTED, "prompts.pth")?;
        let path = file.path().to_owned();
        write(&prompts, &mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        cx.tick(1);
        cx.commit(draft, [("classes".into(), prompts.names.len().into())].into())
    }
}
