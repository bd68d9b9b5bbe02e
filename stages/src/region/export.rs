//! `region/export`: writes a region prompt for other programs.

use ovenbird_models::checkpoint::{Saved, write_torch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{RegionPromptFile, TABLE},
    error::write_error,
};

/// Exports a region prompt as CORA publishes it: a `.pth` file of a dict with the one tensor `attnpool.positional_embedding`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const REGION_PROMPT: In<RegionPromptFile> = In::required("region_prompt", "A region prompt, or a checkpoint of CORA that holds one.");
const FILE: Out<RegionPromptFile> = Out::new("file", "`region_prompt.pth`: f32 [1 + s * s, C].");

impl Stage for Export {
    const KIND: &'static str = "region/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[REGION_PROMPT.info()];
    const OUTPUTS: &'static [PortInfo] = &[FILE.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (table, _) = cx.inputs.read(REGION_PROMPT)?.read()?;
        let draft = cx.begin(unit)?;
        let mut archive = draft.create(FILE, "region_prompt.pth")?;
        let path = archive.path().to_owned();
        let content = Saved::Dict([(TABLE.to_owned(), Saved::Tensor(&table))].into());
        write_torch(&content, &mut archive).map_err(|source| write_error(&path, source))?;
        archive.finish()?;
        cx.tick(1);
        cx.commit(draft, [("rows".into(), table.size()[0].into())].into())
    }
}
