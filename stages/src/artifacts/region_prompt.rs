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
    /// Fails where the file has no table of finite numbers.
    pub fn check(&self) -> Result<()> {
        self.read().map(drop)
    }

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
        let table = table.to_kind(Kind::Float);
        if let Some((other, _)) = others.iter().find(|(_, other)| other.size() != table.size() || !other.to_kind(Kind::Float).equal(&table))
        {
            return Err(malformed(path, format!("expected one region prompt, found two: `{first}` and `{other}` differ")));
        }
        let space = Space::read(checkpoint.metadata().get(SPACE_KEY)).map_err(|problem| malformed(path, problem))?;
        if table.dim() != 2 {
            return Err(malformed(path, format!("`{first}`: expected a table `[1 + s * s, C]`, found {:?}", table.size())));
        }
        if table.isfinite().all().int64_value(&[]) != 1 {
            return Err(malformed(path, format!("`{first}`: expected finite numbers, found others")));
        }
        Ok((table, space))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Write};

    use ovenbird_cache::Digest;
    use ovenbird_models::checkpoint::{Saved, write_torch};
    use tch::Device;

    use super::*;

    /// The table of a file with these tensors of checkpoints, or the refusal without its path.
    fn read(checkpoints: &[(&str, &[(&str, &Tensor)])]) -> Result<Tensor, String> {
        let entries = checkpoints.iter().map(|(key, tensors)| {
            let tensors: BTreeMap<String, Saved<'_>> =
                tensors.iter().map(|(name, tensor)| ((*name).to_owned(), Saved::Tensor(tensor))).collect();
            ((*key).to_owned(), Saved::Dict(tensors))
        });
        let mut bytes = Vec::new();
        write_torch(&Saved::Dict(entries.collect()), &mut bytes).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let path = file.path().to_owned();
        let input = InputFile { name: "a.pth".into(), path, bytes: bytes.len() as u64, digest: Digest::of(&bytes), unit: None };
        let words = |error: crate::Error| error.to_string().replace(&format!("{}: ", file.path().display()), "");
        RegionPromptFile { file: input }.read().map(|(table, _)| table).map_err(words)
    }

    #[test]
    fn a_whole_checkpoint_of_cora_gives_the_table_that_it_has_several_times() {
        let table = Tensor::arange(10, (Kind::Float, Device::Cpu)).view([5, 2]);
        let (half, other) = (table.to_kind(Kind::Half), &table + 1.0);
        let (pool, text) = ("backbone.0.attn_pool.positional_embedding", "classifier.positional_embedding");
        let average: &[(&str, &Tensor)] = &[(pool, &table), (text, &other)];
        assert!(read(&[("model", &[(pool, &table), (text, &other)]), ("model_ema", average)]).unwrap().equal(&table));
        // Widened numbers are the same.
        let of_region_branch: &[(&str, &Tensor)] = &[("backbone.0.attnpool.positional_embedding", &half)];
        assert!(read(&[("model", of_region_branch), ("model_ema", average)]).unwrap().equal(&table));
        assert_eq!(
            read(&[("model", &[(pool, &other)]), ("model_ema", average)]).unwrap_err(),
            format!("expected one region prompt, found two: `model.{pool}` and `model_ema.{pool}` differ")
        );
        assert_eq!(
            read(&[("model", &[(text, &other)])]).unwrap_err(),
            format!("expected a tensor `attnpool.positional_embedding`, found model.{text}")
        );
    }
}
