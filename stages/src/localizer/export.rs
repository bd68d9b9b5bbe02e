//! `localizer/export`: writes a localizer for CORA's code.

use std::collections::BTreeMap;

use ovenbird_models::{
    clip::{Activation, layout as clip_layout},
    detr::layout,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    published::write,
    spec::{LocalizerSpec, table_digest},
};
use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{CheckpointFile, RegionPromptFile, read_weights},
    clip::{Space, activation, space},
    detector::spec::{DetectorFile, DetectorSpec},
    error::write_error,
};

/// Exports a localizer as CORA's code keeps it: a `checkpoint.pth` that `torch.load` reads, with its weights as `model` and as `model_ema`.
///
/// With a CLIP, its tensors and the region prompt are in the file too, under CORA's names, so that CORA's code can evaluate the localizer. Beside what CORA
/// writes, `ovenbird.detector` says as text how the localizer is built and used; there is no optimizer, so that its training cannot go on there. (CORA, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// For CLIP checkpoints with several CLIPs: the prefix of the tensor names, such as `teacher`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

const LOCALIZER: In<DetectorFile> =
    In::required("localizer", "A localizer from `localizer/train`, `localizer/import` or `detector/select`.");
const CLIP: In<CheckpointFile> = In::optional("checkpoint", "The CLIP weights that it was trained with, to be in the file too.");
const REGION_PROMPT: In<RegionPromptFile> =
    In::optional("region_prompt", "The region prompt that it was trained with, in place of CLIP's own position table.");
const CHECKPOINT: Out<CheckpointFile> =
    Out::new("checkpoint", "`checkpoint.pth`: a dict of `model`, `model_ema`, `epoch`, `args` and `best_performance`.");
/// OpenAI's names of what a region prompt replaces, and of the projection behind it.
const TABLE: &str = "visual.attnpool.positional_embedding";
const PROJECTION: &str = "visual.attnpool.c_proj.weight";

impl Stage for Export {
    const KIND: &'static str = "localizer/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[LOCALIZER.info(), CLIP.info(), REGION_PROMPT.info()];
    const OUTPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (weights, spec) = cx.inputs.read(LOCALIZER)?.read_localizer(LOCALIZER.info().name, "export it with `detector/export`")?;
        let prompt = cx.inputs.read_if_given(REGION_PROMPT)?;
        let (clip, note) = match (cx.inputs.read_if_given(CLIP)?, prompt) {
            (None, None) => (BTreeMap::new(), None),
            (None, Some(_)) => {
                let problem = "given, but no CLIP whose position table it replaces".into();
                let hint = "give the CLIP as `checkpoint`, or leave `region_prompt` out".into();
                return Err(Error::Input { port: REGION_PROMPT.info().name, problem, hint });
            }
            (Some(file), prompt) => self.clip(&file, prompt.as_ref(), &spec)?,
        };
        note.into_iter().for_each(|words| cx.note(words));
        let mut tensors = layout::with_copies(weights.tensors());
        tensors.extend(clip);
        let draft = cx.begin(unit)?;
        let mut archive = draft.create(CHECKPOINT, "checkpoint.pth")?;
        let path = archive.path().to_owned();
        write(&tensors, &DetectorSpec::Localizer(spec), &mut archive).map_err(|source| write_error(&path, source))?;
        archive.finish()?;
        cx.tick(1);
        cx.commit(draft, [("tensors".into(), tensors.len().into())].into())
    }
}

impl Export {
    /// The tensors of a CLIP that a localizer looks through, with the region prompt, under CORA's names, f32; and a note where the region prompt is another than
    /// that of the training.
    fn clip(
        &self,
        file: &CheckpointFile,
        prompt: Option<&RegionPromptFile>,
        spec: &LocalizerSpec,
    ) -> Result<(BTreeMap<String, Tensor>, Option<&'static str>)> {
        let refused = |port: &'static str, problem: String, hint: &str| Error::Input { port, problem, hint: hint.into() };
        let ([localizer_port, clip_port], prompt_port) = ([LOCALIZER.info().name, CLIP.info().name], REGION_PROMPT.info().name);
        let (checkpoint, path) = (read_weights(&file.file)?, &file.file.path);
        let place = clip_layout::place(checkpoint.tensors(), self.prefix.as_deref(), path)?;
        let checkpoint = checkpoint.at(&place);
        let clip_layout::Normalised { layout, mut tensors, .. } = clip_layout::normalise(checkpoint.tensors(), path)?;
        if let Some(activation) = activation::stated(file, &checkpoint)?.activation.filter(|stated| stated.value != Activation::QuickGelu) {
            let problem =
                format!("{}: {} says {}, but CORA's code computes with QuickGELU", path.display(), activation.source, activation.value);
            return Err(refused(clip_port, problem, "leave `checkpoint` out: the file is then without a CLIP"));
        }
        let prompt = prompt.map(RegionPromptFile::read).transpose()?;
        let trained_with = prompt.as_ref().and_then(|(_, space)| *space);
        let space = Space::of(&tensors, layout.projections);
        space::common(&[(localizer_port, spec.clip), (clip_port, Some(space)), (prompt_port, trained_with)])?;
        let size = |name: &str| tensors.get(name).and_then(|tensor| <[i64; 2]>::try_from(tensor.size()).ok());
        let (Some(own), Some([dim, _])) = (size(TABLE), size(PROJECTION)) else {
            let problem = format!("{}: expected a CLIP with a ResNet, whose tensor `{TABLE}` is a matrix, found another", path.display());
            return Err(refused(clip_port, problem, "give the CLIP that the localizer was trained with"));
        };
        // Layer 3 has half the channels of layer 4.
        let (found, expected) = ([own[1] / 2, dim], [spec.config.map_channels, spec.config.embed_dim]);
        if found != expected {
            let [channels, numbers] = expected;
            let problem = format!(
                "{}: maps of {} channels and embeddings of {dim} numbers, but the localizer needs {channels} and {numbers}",
                path.display(),
                found[0]
            );
            return Err(refused(clip_port, problem, "give the CLIP that the localizer was trained with"));
        }
        if let Some((table, _)) = prompt {
            if table.size() != own {
                let problem = format!("expected a region prompt {own:?} for this CLIP, found {:?}", table.size());
                return Err(refused(prompt_port, problem, "give a region prompt of the same CLIP"));
            }
            tensors.insert(TABLE.into(), table);
        }
        let table = table_digest(&tensors[TABLE])?;
        let is_another = spec.region_prompt.is_some_and(|trained_with| trained_with != table);
        let renamed = clip_layout::to_cora(&tensors).into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float)));
        Ok((renamed.collect(), is_another.then_some("the region prompt is another than that of the training")))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Write};

    use ovenbird_cache::{Digest, inputs::InputFile};
    use ovenbird_models::{
        checkpoint::write_safetensors,
        clip::{Clip, Config, ImageConfig, TextConfig, regions::Rules},
        detr,
    };
    use tch::{Device, nn};

    use super::*;
    use crate::{artifacts::TABLE as PROMPT, clip::activation::GELU_KEY};

    /// A CLIP whose layer 3 has 128 channels, under OpenAI's names.
    fn clip(embed_dim: i64) -> BTreeMap<String, Tensor> {
        let config = Config {
            embed_dim,
            image: ImageConfig::ResNet { image_side: 64, layers: [1, 1, 1, 1], width: 8, heads: 4 },
            text: TextConfig { context: 8, vocabulary: 50, width: 64, heads: 1, depth: 1 },
            activation: Activation::QuickGelu,
        };
        let store = nn::VarStore::new(Device::Cpu);
        Clip::new(&store.root(), &config, 3).unwrap();
        store.variables().into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect()
    }

    fn file(tensors: &BTreeMap<String, Tensor>, metadata: &[(&str, &str)]) -> (tempfile::NamedTempFile, InputFile) {
        let metadata = metadata.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
        let mut bytes = Vec::new();
        write_safetensors(tensors, &metadata, &mut bytes).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let path = file.path().to_owned();
        let input = InputFile { name: "a".into(), path, bytes: bytes.len() as u64, digest: Digest::of(&bytes), unit: None };
        (file, input)
    }

    type Exported = (BTreeMap<String, Tensor>, Option<&'static str>);

    /// What is exported with a CLIP and a region prompt, for a localizer whose region prompt was of ones.
    fn export(weights: &BTreeMap<String, Tensor>, gelu: &str, prompt: Option<Tensor>) -> Result<Exported, String> {
        let (_clip, file_of_clip) = file(weights, &[(GELU_KEY, gelu)]);
        let prompt = prompt.map(|table| file(&BTreeMap::from([(PROMPT.to_owned(), table)]), &[]));
        let spec = LocalizerSpec {
            config: detr::Config::toy(128, 16),
            fits: [256, 192],
            rules: Rules::default(),
            clip: None,
            region_prompt: Some(table_digest(&ones(5)).unwrap()),
        };
        let path = format!("{}: ", file_of_clip.path.display());
        let prompt = prompt.as_ref().map(|(_, input)| RegionPromptFile { file: input.clone() });
        let exported = Export::default().clip(&CheckpointFile { file: file_of_clip, configs: Vec::new() }, prompt.as_ref(), &spec);
        exported.map_err(|error| error.to_string().replace(&path, ""))
    }

    fn ones(rows: i64) -> Tensor {
        Tensor::ones([rows, 256], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_clip_goes_out_under_the_names_of_cora_with_the_region_prompt() {
        let weights = clip(16);
        let (tensors, note) = export(&weights, "quick", Some(ones(5))).unwrap();
        assert_eq!(note, None);
        assert!(tensors["backbone.0.attn_pool.positional_embedding"].equal(&ones(5)));
        assert!(tensors["backbone.0.layer4.0.conv1.weight"].equal(&weights["visual.layer4.0.conv1.weight"]));
        assert!(tensors["classifier.text_projection"].equal(&weights["text_projection"]));
        // The last level has two names, and the logit scale none.
        let n_copied = weights.keys().filter(|name| name.starts_with("visual.layer4.")).count();
        assert_eq!(tensors.len(), weights.len() + n_copied - 1);
        let (tensors, note) = export(&weights, "quick", None).unwrap();
        assert!(tensors["backbone.0.attn_pool.positional_embedding"].equal(&weights[TABLE]));
        assert_eq!(note, Some("the region prompt is another than that of the training"));
    }

    #[test]
    fn a_clip_that_the_localizer_does_not_look_through_is_refused() {
        let refused = |weights, gelu, prompt| export(&weights, gelu, prompt).map(|_| ()).unwrap_err();
        assert_eq!(
            refused(clip(16), "quick", Some(ones(10))),
            "region_prompt: expected a region prompt [5, 256] for this CLIP, found [10, 256]"
        );
        assert_eq!(
            refused(clip(24), "quick", None),
            "checkpoint: maps of 128 channels and embeddings of 24 numbers, but the localizer needs 128 and 16"
        );
        assert_eq!(
            refused(clip(16), "exact", None),
            "checkpoint: `ovenbird.gelu` in its metadata says exact GELU, but CORA's code computes with QuickGELU"
        );
    }
}
