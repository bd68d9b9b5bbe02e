//! Region prompts: position tables of a CLIP's attention pooling.

use ovenbird_cache::inputs::InputFile;
use tch::{Kind, Tensor};

use super::read_weights;
use crate::{Artifact, Result, clip::Space, clip::space::SPACE_KEY, error::malformed, ports::last_file};

/// The name of the table, as CORA publishes it.
pub(crate) const TABLE: &str = "attnpool.positional_embedding";
/// How names of the table end in whole checkpoints.
const ENDINGS: [&str; 2] = [TABLE, "attn_pool.positional_embedding"];

/// A region prompt, not yet read; of several checkpoints of a training, the last.
#[derive(Debug, Clone)]
pub struct RegionPromptFile {
    /// The file.
    pub file: InputFile,
}

impl Artifact for RegionPromptFile {
    const KIND: &'static str = "region-prompt";
    const EXTENSIONS: &'static [&'static str] = &["safetensors", "pth", "pt"];
    const SHAPE: &'static str = "a table that `region/prompt` made, or CORA's `.pth` with `attnpool.positional_embedding`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

impl RegionPromptFile {
    /// The table, f32 `[1 + s * s, C]`, and the CLIP that it was trained with, if known. A whole checkpoint of CORA has it under several names: they must be
    /// equal.
    pub(crate) fn read(&self) -> Result<(Tensor, Option<Space>)> {
        let (checkpoint, path) = (read_weights(&self.file)?, &self.file.path);
        let is_table = |name: &String| ENDINGS.iter().any(|ending| name.ends_with(ending));
        let tables: Vec<(&String, &Tensor)> = checkpoint.tensors().iter().filter(|(name, _)| is_table(name)).collect();
        let Some(((first, table), others)) = tables.split_first() else {
            let names: Vec<&str> = checkpoint.tensors().keys().map(String::as_str).take(3).collect();
            return Err(malformed(path, format!("expected a tensor `{TABLE}`, found {}", names.join(", "))));
        };
        if let Some((other, _)) = others.iter().find(|(_, other)| other.size() != table.size() || !other.equal(table)) {
            return Err(malformed(path, format!("expected one region prompt, found two: `{first}` and `{other}` differ")));
        }
        let space = Space::read(checkpoint.metadata().get(SPACE_KEY)).map_err(|problem| malformed(path, problem))?;
        let is_finite = table.dim() == 2 && table.isfinite().all().int64_value(&[]) == 1;
        if !is_finite {
            return Err(malformed(path, format!("`{first}`: expected a table of finite numbers, found {:?}", table.size())));
        }
        Ok((table.to_kind(Kind::Float), space))
    }
}
