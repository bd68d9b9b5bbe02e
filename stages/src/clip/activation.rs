//! Which activation a CLIP was trained with. Tensors cannot tell, and the other one gives embeddings that look sound and are wrong.
//!
//! | source | what it says |
//! |---|---|
//! | OpenAI's three scalars in the checkpoint | QuickGELU |
//! | `ovenbird.gelu` in the metadata of safetensors, from `clip/pretrain` | `quick` or `exact` |
//! | `config.json` of Hugging Face | `hidden_act` of both towers, or of the file; a `CLIPModel` without it has `quick_gelu`, transformers' default |
//! | `open_clip_config.json` | `model_cfg.quick_gelu`; without it false, as open_clip reads it |
//!
//! Config files count where the checkpoint is a folder that holds them: they are then hashed with the weights. One that lies beside a file
//! is no part of the recipe, and is not read.

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{
    checkpoint::Checkpoint,
    clip::{
        Activation,
        layout::{self, Layout},
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Error, Result,
    artifacts::{CHECKPOINT_CONFIGS, CheckpointFile},
};

/// Under which key of a checkpoint's metadata its activation is.
pub(crate) const GELU_KEY: &str = "ovenbird.gelu";
/// What `hidden_act` is in transformers' `CLIPTextConfig` and `CLIPVisionConfig` where a file leaves it out.
const HUGGING_FACE_DEFAULT: &str = "quick_gelu";
const PORT: &str = "checkpoint";

/// The activation of the transformer blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Gelu {
    /// x * sigmoid(1.702 x): weights of OpenAI, DFN and MetaCLIP.
    Quick,
    /// The exact one: most weights of open_clip.
    Exact,
}

impl Gelu {
    /// As the networks know it.
    pub fn activation(self) -> Activation {
        match self {
            Self::Quick => Activation::QuickGelu,
            Self::Exact => Activation::Gelu,
        }
    }

    /// What parameters and metadata call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Exact => "exact",
        }
    }

    /// What parameters and metadata call an activation.
    pub(crate) fn of(activation: Activation) -> Self {
        match activation {
            Activation::QuickGelu => Self::Quick,
            Activation::Gelu => Self::Exact,
        }
    }
}

/// An activation, and what says that the weights have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Which.
    pub gelu: Gelu,
    /// Where it was read: `config.json`.
    pub source: String,
}

/// What a checkpoint and the config files in its folder say of its activation; `None` where none of them does.
///
/// Fails where two of them differ, or a config file is not what its name says.
pub fn said(file: &CheckpointFile, checkpoint: &Checkpoint) -> Result<Option<Said>> {
    let mut found: Vec<Said> = Vec::new();
    let layout = layout::normalise(checkpoint.tensors(), &file.file.path)?.layout;
    if let Some(activation) = layout.activation() {
        found.push(Said { gelu: Gelu::of(activation), source: "the layout (OpenAI's scalars)".into() });
    }
    if let Some(name) = checkpoint.metadata().get(GELU_KEY) {
        let Some(gelu) = [Gelu::Quick, Gelu::Exact].into_iter().find(|gelu| gelu.name() == name) else {
            let problem =
                format!("{}: expected `quick` or `exact` as `{GELU_KEY}` in the metadata, found `{name}`", file.file.path.display());
            return Err(refused(problem, "use the file as it was written"));
        };
        found.push(Said { gelu, source: format!("`{GELU_KEY}` in its metadata") });
    }
    for config_file in &file.configs {
        let InputFile { name, path, .. } = config_file;
        let config = serde_json::from_slice(&config_file.read()?).map_err(|error| error.to_string());
        let gelu = config.and_then(|config| if name == "config.json" { of_hugging_face(&config) } else { of_open_clip(&config) });
        let refused =
            |problem| refused(format!("{}: {problem}", path.display()), "use the config file that was published with the weights");
        found.extend(gelu.map_err(refused)?.map(|gelu| Said { gelu, source: format!("`{name}`") }));
    }
    match found.iter().find(|said| said.gelu != found[0].gelu) {
        None => Ok(found.into_iter().next()),
        Some(other) => Err(refused(
            format!(
                "{}: {} says {}, {} says {}",
                file.file.path.display(),
                found[0].source,
                words(found[0].gelu),
                other.source,
                words(other.gelu)
            ),
            "use the config file that was published with the weights, or none",
        )),
    }
}

/// The activation to compute a checkpoint with: what it says, or else what is given. Fails where these differ, or nothing tells.
pub(crate) fn settle(given: Option<Gelu>, file: &CheckpointFile, checkpoint: &Checkpoint) -> Result<Activation> {
    let gelu = match (given, said(file, checkpoint)?) {
        (Some(given), Some(said)) if given != said.gelu => {
            return Err(refused(
                format!("{}: `gelu: {}` is given, but {} says {}", file.file.path.display(), given.name(), said.source, words(said.gelu)),
                "leave `gelu` out",
            ));
        }
        (_, Some(Said { gelu, .. })) | (Some(gelu), None) => gelu,
        (None, None) => {
            let layout = match layout::normalise(checkpoint.tensors(), &file.file.path)?.layout {
                Layout::OpenAi => "OpenAI's",
                Layout::OpenClip => "open_clip's",
                Layout::HuggingFace => "Hugging Face's",
            };
            let problem =
                format!("{}: the file cannot tell which GELU the weights were trained with ({layout} layout)", file.file.path.display());
            return Err(refused(problem, &how_to_say(file)));
        }
    };
    Ok(gelu.activation())
}

/// How an operator says the activation of a checkpoint that does not.
pub fn how_to_say(file: &CheckpointFile) -> String {
    let beside = CHECKPOINT_CONFIGS.iter().find(|name| file.configs.is_empty() && file.file.path.with_file_name(name).is_file());
    let folder = beside.map(|name| format!("; or name the folder instead of the file, so that {name} is read"));
    format!(
        "`with: {{clip: {{gelu: quick}}}}` for weights of OpenAI, DFN and MetaCLIP, `{{gelu: exact}}` for most others{}",
        folder.unwrap_or_default()
    )
}

/// What people call it.
pub fn words(gelu: Gelu) -> &'static str {
    match gelu {
        Gelu::Quick => "QuickGELU",
        Gelu::Exact => "exact GELU",
    }
}

fn refused(problem: String, hint: &str) -> Error {
    Error::Input { port: PORT, problem, hint: hint.into() }
}

/// The activation of both towers; `None` for the config file of something else.
fn of_hugging_face(config: &Value) -> Result<Option<Gelu>, String> {
    let default = (config["model_type"] == "clip").then(|| Value::from(HUGGING_FACE_DEFAULT));
    let of_tower = |tower: &str| {
        let written = [&config[tower]["hidden_act"], &config["hidden_act"]].into_iter().find(|value| !value.is_null());
        match written.or(default.as_ref()) {
            None => Ok(None),
            Some(value) if value == "quick_gelu" => Ok(Some(Gelu::Quick)),
            Some(value) if value == "gelu" => Ok(Some(Gelu::Exact)),
            Some(value) => Err(format!("expected `quick_gelu` or `gelu` as `hidden_act` of `{tower}`, found {value}")),
        }
    };
    match (of_tower("vision_config")?, of_tower("text_config")?) {
        (Some(image), Some(text)) if image != text => Err(format!(
            "expected one activation of both towers, found {} in `vision_config` and {} in `text_config`",
            words(image),
            words(text)
        )),
        (image, text) => Ok(image.or(text)),
    }
}

fn of_open_clip(config: &Value) -> Result<Option<Gelu>, String> {
    let model = config["model_cfg"].as_object().ok_or("expected an object `model_cfg`, found none")?;
    match model.get("quick_gelu") {
        None | Some(Value::Bool(false)) => Ok(Some(Gelu::Exact)),
        Some(Value::Bool(true)) => Ok(Some(Gelu::Quick)),
        Some(other) => Err(format!("expected true or false as `model_cfg.quick_gelu`, found {other}")),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use ovenbird_cache::inputs;
    use ovenbird_models::checkpoint::{Saved, write_safetensors, write_torch};
    use serde_json::json;
    use tch::Tensor;

    use super::*;
    use crate::Artifact as _;

    #[test]
    fn config_files_say_what_their_libraries_read_there() {
        let says = |config: Value, expected: Option<Gelu>| assert_eq!(of_hugging_face(&config).unwrap(), expected, "{config}");
        says(json!({"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}), Some(Gelu::Exact));
        says(json!({"vision_config": {"hidden_act": "quick_gelu"}, "text_config": {"hidden_act": "quick_gelu"}}), Some(Gelu::Quick));
        says(json!({"hidden_act": "gelu", "model_type": "clip"}), Some(Gelu::Exact));
        // transformers leaves out what is its default.
        says(json!({"model_type": "clip", "vision_config": {"patch_size": 16}, "text_config": {}}), Some(Gelu::Quick));
        // timm's is called the same.
        says(json!({"architecture": "vit_base_patch32_clip_224"}), None);

        let says = |config: Value, expected: Gelu| assert_eq!(of_open_clip(&config).unwrap(), Some(expected), "{config}");
        says(json!({"model_cfg": {"embed_dim": 512, "quick_gelu": true}}), Gelu::Quick);
        says(json!({"model_cfg": {"embed_dim": 512, "quick_gelu": false}}), Gelu::Exact);
        says(json!({"model_cfg": {"embed_dim": 512}}), Gelu::Exact);
    }

    #[test]
    fn config_files_that_say_nothing_clear_are_refused_in_words() {
        let refuses = |config: Value, expected: &str| assert_eq!(of_hugging_face(&config).unwrap_err(), expected, "{config}");
        refuses(
            json!({"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "quick_gelu"}}),
            "expected one activation of both towers, found exact GELU in `vision_config` and QuickGELU in `text_config`",
        );
        // The text tower has transformers' default.
        refuses(
            json!({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}}),
            "expected one activation of both towers, found exact GELU in `vision_config` and QuickGELU in `text_config`",
        );
        refuses(
            json!({"text_config": {"hidden_act": "gelu_pytorch_tanh"}}),
            "expected `quick_gelu` or `gelu` as `hidden_act` of `text_config`, found \"gelu_pytorch_tanh\"",
        );
        refuses(json!({"hidden_act": 3}), "expected `quick_gelu` or `gelu` as `hidden_act` of `vision_config`, found 3");
        assert_eq!(of_open_clip(&json!({"architecture": "ViT-B-32"})).unwrap_err(), "expected an object `model_cfg`, found none");
        let number = of_open_clip(&json!({"model_cfg": {"quick_gelu": 1}})).unwrap_err();
        assert_eq!(number, "expected true or false as `model_cfg.quick_gelu`, found 1");
    }

    /// A folder of files, as a checkpoint.
    #[expect(clippy::disallowed_methods, reason = "a scratch folder of a test")]
    fn checkpoint(folder: &Path, names: &[&str], files: &[(&str, String)]) -> (CheckpointFile, Checkpoint) {
        let tensors: BTreeMap<String, Tensor> = names.iter().map(|name| ((*name).to_owned(), Tensor::from(1.0_f32))).collect();
        let mut weights = fs::File::create(folder.join("clip.pt")).unwrap();
        let entries = tensors.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor)));
        write_torch(&Saved::Dict(entries.collect()), &mut weights).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
        let file = CheckpointFile::open(&inputs::digest_path(folder, None, 0).unwrap()).unwrap();
        let opened = Checkpoint::open(&file.file.path).unwrap();
        (file, opened)
    }

    const TEXT: &str = "token_embedding.weight";

    #[test]
    fn the_activation_is_read_given_or_refused() {
        let open_clip = |quick: bool| ("open_clip_config.json", json!({"model_cfg": {"quick_gelu": quick}}).to_string());
        let hugging_face = |act: &str| ("config.json", json!({"hidden_act": act}).to_string());
        let settles = |names: &[&str], files: &[(&str, String)], given: Option<Gelu>| {
            let folder = tempfile::tempdir().unwrap();
            let (file, opened) = checkpoint(folder.path(), names, files);
            settle(given, &file, &opened).map_err(|error| error.to_string().replace(&file.file.path.display().to_string(), "FILE"))
        };
        let (quick, exact) = (Ok(Activation::QuickGelu), Ok(Activation::Gelu));
        let scalars = [TEXT, "input_resolution"];
        assert_eq!(settles(&scalars, &[], None), quick);
        assert_eq!(settles(&[TEXT], &[], Some(Gelu::Quick)), quick);
        assert_eq!(settles(&[TEXT], &[], Some(Gelu::Exact)), exact);
        assert_eq!(settles(&[TEXT], &[open_clip(true)], None), quick);
        assert_eq!(settles(&[TEXT], &[open_clip(false)], None), exact);
        assert_eq!(settles(&["text_model.embeddings.token_embedding.weight"], &[hugging_face("gelu")], None), exact);
        // What an operator says again is no contradiction.
        assert_eq!(settles(&scalars, &[open_clip(true), hugging_face("quick_gelu")], Some(Gelu::Quick)), quick);

        let refused = |words: &str| Err(format!("checkpoint: FILE: {words}"));
        let cannot_tell = "the file cannot tell which GELU the weights were trained with";
        assert_eq!(settles(&[TEXT], &[], None), refused(&format!("{cannot_tell} (open_clip's layout)")));
        let face = settles(&["text_model.embeddings.token_embedding.weight"], &[], None);
        assert_eq!(face, refused(&format!("{cannot_tell} (Hugging Face's layout)")));
        let given = "`gelu: exact` is given, but the layout (OpenAI's scalars) says QuickGELU";
        assert_eq!(settles(&scalars, &[], Some(Gelu::Exact)), refused(given));
        let others = "`config.json` says exact GELU, `open_clip_config.json` says QuickGELU";
        assert_eq!(settles(&[TEXT], &[open_clip(true), hugging_face("gelu")], None), refused(others));
        assert_eq!(settles(&[TEXT], &[open_clip(true), hugging_face("gelu")], Some(Gelu::Quick)), refused(others));
    }

    #[test]
    fn what_is_written_into_safetensors_is_read_there() {
        let read = |gelu: &str| {
            let mut file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
            let tensors = BTreeMap::from([(TEXT.to_owned(), Tensor::from(1.0_f32))]);
            write_safetensors(&tensors, &BTreeMap::from([(GELU_KEY.to_owned(), gelu.to_owned())]), &mut file).unwrap();
            let opened = CheckpointFile::open(&inputs::digest_path(file.path(), None, 0).unwrap()).unwrap();
            settle(None, &opened, &Checkpoint::open(file.path()).unwrap()).ok()
        };
        assert_eq!([read("quick"), read("exact"), read("slow")], [Some(Activation::QuickGelu), Some(Activation::Gelu), None]);
    }

    /// It is not hashed, so it may not change results; but who has one should hear of it.
    #[test]
    fn a_config_file_beside_a_named_file_is_not_read_but_pointed_at() {
        let folder = tempfile::tempdir().unwrap();
        let config = ("open_clip_config.json", json!({"model_cfg": {"quick_gelu": true}}).to_string());
        let (inside, opened) = checkpoint(folder.path(), &[TEXT], &[config]);
        assert_eq!(said(&inside, &opened).unwrap().map(|said| said.source), Some("`open_clip_config.json`".into()));
        let named = CheckpointFile::open(&inputs::digest_path(&inside.file.path, None, 0).unwrap()).unwrap();
        let hint = settle(None, &named, &opened).unwrap_err().hint().unwrap();
        assert!(hint.ends_with("or name the folder instead of the file, so that open_clip_config.json is read"), "{hint}");
    }

    #[test]
    fn a_folder_holds_one_file_of_weights() {
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path(), &[TEXT], &[("README.md", "weights".into())]);
        fs::copy(folder.path().join("clip.pt"), folder.path().join("model.safetensors")).unwrap();
        let error = CheckpointFile::open(&inputs::digest_path(folder.path(), None, 0).unwrap()).unwrap_err();
        assert!(error.to_string().ends_with("in the folder, found clip.pt, model.safetensors"), "{error}");
    }
}
