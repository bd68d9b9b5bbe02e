//! `region/export`: writes a region prompt for other programs.

use ovenbird_models::checkpoint::{Saved, write_torch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

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
        write_torch(&saved(&table), &mut archive).map_err(|source| write_error(&path, source))?;
        archive.finish()?;
        cx.tick(1);
        cx.commit(draft, [("rows".into(), table.size()[0].into())].into())
    }
}

/// The content of a file.
fn saved(table: &Tensor) -> Saved<'_> {
    Saved::Dict([(TABLE.to_owned(), Saved::Tensor(table))].into())
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "scratch files of a test")]
mod tests {
    use std::{collections::BTreeMap, fs::File};

    use ovenbird_cache::{Digest, inputs::InputFile};
    use tch::no_grad;

    use super::*;
    use crate::{
        golden::{cora, cora_clip},
        region::frozen::Frozen,
    };

    /// A3 of CORA's specification, and a whole checkpoint, in which all tables must be one.
    #[test]
    fn a_table_that_goes_out_comes_in_and_fits_its_grid_alone() {
        let folder = tempfile::tempdir().unwrap();
        let table = &cora("relabel")["table"];
        let read = |name: &str, content: &Saved<'_>| {
            let path = folder.path().join(name);
            write_torch(content, &mut File::create(&path).unwrap()).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let file = InputFile { name: name.into(), path, bytes: bytes.len() as u64, digest: Digest::of(&bytes), unit: None };
            RegionPromptFile { file }.read()
        };
        let (found, space) = read("region_prompt.pth", &saved(table)).unwrap();
        assert_eq!((&found, space), (table, None));
        let names = ["backbone.0.attnpool.positional_embedding", "backbone.attn_pool.positional_embedding"];
        let whole = |other: &Tensor| {
            let model = BTreeMap::from([(names[0].to_owned(), Saved::Tensor(table)), (names[1].to_owned(), Saved::Tensor(other))]);
            read("checkpoint.pth", &Saved::Dict(model)).map(|(table, _)| table)
        };
        assert_eq!(whole(table).unwrap(), *table);
        let other = no_grad(|| table + 1e-3);
        assert!(whole(&other).unwrap_err().to_string().contains("found two"));
        let frozen = Frozen::of(cora_clip(), Some(Tensor::cat(&[table, table], 0)));
        assert_eq!(frozen.regions().unwrap_err().to_string(), "region prompt: expected floating [50, 128], found Float [100, 128]");
    }
}
