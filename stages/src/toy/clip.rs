//! `toy/clip`: the small CLIPs that come with the program.

use ovenbird_models::{checkpoint::Checkpoint, clip};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::{
    Context, Out, PortInfo, Result, Stage, Unit,
    artifacts::CheckpointFile,
    clip::small::{ACTIVATION, Architecture, HELD_OUT, HELD_OUT_IMAGES, ZERO_SHOT_ACCURACY, zero_shot_accuracy},
    error::write_error,
};

/// `toy-clip` trains them; `assets/toy-clip/README.md` has the recipe.
const RESNET: &[u8] = include_bytes!("../../assets/toy-clip/resnet.safetensors.zst");
const VIT: &[u8] = include_bytes!("../../assets/toy-clip/vit.safetensors.zst");

/// A small CLIP that names the objects of every toy world, trained beforehand: it takes the place of a published one.
///
/// The pipeline `toy-clip` trained it on 20,000 captioned pictures of another world (seed 2025). To train one instead, for a world of one's
/// own: `--set clip.use=clip/pretrain --set clip.in.images=world.web_images --set clip.in.captions=world.captions`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Clip {
    /// Kind of image tower: see `clip/pretrain`.
    pub architecture: Architecture,
}

const CHECKPOINT: Out<CheckpointFile> = Out::new("checkpoint", "Weights in OpenAI's layout, safetensors, f16.");
const FILE_NAME: &str = "clip.safetensors";

impl Stage for Clip {
    const KIND: &'static str = "toy/clip";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[HELD_OUT_IMAGES.info(), HELD_OUT.info()];
    const OUTPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];
    const USES_DEVICE: bool = true;

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let draft = cx.begin(unit)?;
        let compressed = match self.architecture {
            Architecture::Resnet => RESNET,
            Architecture::Vit => VIT,
        };
        let mut file = draft.create(CHECKPOINT, FILE_NAME)?;
        let path = file.path().to_owned();
        zstd::stream::copy_decode(compressed, &mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        let checkpoint = Checkpoint::open(&path)?;
        let clip = clip::Clip::load(checkpoint.tensors(), &path, ACTIVATION, cx.device, Kind::Float)?;
        let accuracy = zero_shot_accuracy(&clip, cx)?;
        cx.commit(draft, accuracy.into_iter().map(|accuracy| (ZERO_SHOT_ACCURACY.to_owned(), accuracy.into())).collect())
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    /// Who packs other weights raises the version, so that features of the earlier ones are not taken for theirs.
    #[test]
    fn the_weights_are_those_that_the_readme_names() {
        let readme = include_str!("../../assets/toy-clip/README.md");
        for (name, file) in [("resnet", RESNET), ("vit", VIT)] {
            let digest: String = Sha256::digest(file).iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(readme.contains(&format!("| `{name}` |")) && readme.contains(&digest), "{name}: {digest}");
        }
    }
}
