//! What a checkpoint and the config files in its folder say of a CLIP besides its tensors, above all its activation: tensors cannot tell it,
//! and the wrong one gives embeddings that look right and are wrong.
//!
//! | source | what it says |
//! |---|---|
//! | OpenAI's three scalars in the checkpoint | QuickGELU |
//! | `ovenbird.gelu` in the metadata of safetensors, from `clip/pretrain` | `quick`, `exact` or `tanh` |
//! | the config files of [`ovenbird_models::clip::settings`] | activation, image size, mean, standard deviation |
//!
//! Config files are read if the checkpoint is a folder that holds them: they are then hashed with the weights. A config file beside a
//! checkpoint that is named as a file is not part of the recipe, and is not read.

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{
    checkpoint::Checkpoint,
    clip::{
        Activation, layout,
        settings::{FILES, Settings, Sourced},
    },
};

use crate::{Error, Result, artifacts::CheckpointFile};

/// The key of a checkpoint's metadata that holds its activation.
pub(crate) const GELU_KEY: &str = "ovenbird.gelu";
const PORT: &str = "checkpoint";

/// Reads what a checkpoint and the config files in its folder say.
///
/// Fails where two of them differ, or a config file is not what its name says.
pub fn stated(file: &CheckpointFile, checkpoint: &Checkpoint) -> Result<Settings> {
    let weights = file.file.path.display();
    let mut settings = Settings::default();
    let layout = layout::normalise(checkpoint.tensors(), &file.file.path)?.layout;
    if let Some(activation) = layout.activation {
        settings = Settings::of_activation(activation, format!("{} layout", layout.name));
    }
    let differ =
        |problem: String| refused(format!("{weights}: {problem}"), "use the config file that was published with the weights, or none");
    if let Some(name) = checkpoint.metadata().get(GELU_KEY) {
        let Some(activation) = Activation::named(name) else {
            let problem = format!("{weights}: expected `quick`, `exact` or `tanh` as `{GELU_KEY}` in the metadata, found `{name}`");
            return Err(refused(problem, "use the file as it was written"));
        };
        let source = format!("`{GELU_KEY}` in its metadata");
        settings = settings.and(Settings::of_activation(activation, source)).map_err(differ)?;
    }
    for config_file in &file.configs {
        let InputFile { name, path, .. } = config_file;
        let found = Settings::of_file(name, &config_file.read()?);
        let refused =
            |problem| refused(format!("{}: {problem}", path.display()), "use the config file that was published with the weights");
        settings = settings.and(found.map_err(refused)?).map_err(differ)?;
    }
    Ok(settings)
}

/// What a CLIP is loaded with: what its files say, and the activation that is given if they do not say one. Fails if these differ, or if
/// nothing tells the activation.
pub(crate) fn settle(given: Option<Activation>, file: &CheckpointFile, checkpoint: &Checkpoint) -> Result<Settings> {
    let stated = stated(file, checkpoint)?;
    match (given, &stated.activation) {
        (Some(given), Some(Sourced { value, source })) if given != *value => Err(refused(
            format!("{}: `gelu: {}` is given, but {source} says {value}", file.file.path.display(), given.name()),
            "leave `gelu` out",
        )),
        (_, Some(_)) => Ok(stated),
        (Some(given), None) => {
            let given = Settings::of_activation(given, "the parameter `gelu`".into());
            Ok(Settings { activation: given.activation, ..stated })
        }
        (None, None) => {
            let layout = layout::normalise(checkpoint.tensors(), &file.file.path)?.layout.name;
            let problem =
                format!("{}: the file cannot tell which GELU the weights were trained with ({layout} layout)", file.file.path.display());
            Err(refused(problem, &how_to_say(file)))
        }
    }
}

/// How to state the activation of a checkpoint that does not.
pub fn how_to_say(file: &CheckpointFile) -> String {
    let beside = FILES.iter().find(|name| file.configs.is_empty() && file.file.path.with_file_name(name).is_file());
    let folder = beside.map(|name| format!("; or name the folder instead of the file, so that {name} is read"));
    format!(
        "`with: {{clip: {{gelu: quick}}}}` for weights of OpenAI, DFN and MetaCLIP, `{{gelu: exact}}` for most others{}",
        folder.unwrap_or_default()
    )
}

fn refused(problem: String, hint: &str) -> Error {
    Error::Input { port: PORT, problem, hint: hint.into() }
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

    fn activation(settings: Settings) -> Activation {
        settings.activation.unwrap().value
    }

    const TEXT: &str = "token_embedding.weight";

    #[test]
    fn the_activation_is_read_given_or_refused() {
        let open_clip = |quick: bool| ("open_clip_config.json", json!({"model_cfg": {"quick_gelu": quick}}).to_string());
        let hugging_face = |act: &str| ("config.json", json!({"hidden_act": act}).to_string());
        let settles = |names: &[&str], files: &[(&str, String)], given: Option<Activation>| {
            let folder = tempfile::tempdir().unwrap();
            let (file, opened) = checkpoint(folder.path(), names, files);
            settle(given, &file, &opened)
                .map(activation)
                .map_err(|error| error.to_string().replace(&file.file.path.display().to_string(), "FILE"))
        };
        let (quick, exact) = (Ok(Activation::QuickGelu), Ok(Activation::Gelu));
        let scalars = [TEXT, "input_resolution"];
        assert_eq!(settles(&scalars, &[], None), quick);
        assert_eq!(settles(&[TEXT], &[], Some(Activation::QuickGelu)), quick);
        assert_eq!(settles(&[TEXT], &[], Some(Activation::Gelu)), exact);
        assert_eq!(settles(&[TEXT], &[open_clip(true)], None), quick);
        assert_eq!(settles(&[TEXT], &[open_clip(false)], None), exact);
        assert_eq!(settles(&["text_model.embeddings.token_embedding.weight"], &[hugging_face("gelu")], None), exact);
        // What an operator says again is no contradiction.
        assert_eq!(settles(&scalars, &[open_clip(true), hugging_face("quick_gelu")], Some(Activation::QuickGelu)), quick);

        let refused = |words: &str| Err(format!("checkpoint: FILE: {words}"));
        let cannot_tell = "the file cannot tell which GELU the weights were trained with";
        assert_eq!(settles(&[TEXT], &[], None), refused(&format!("{cannot_tell} (open_clip's layout)")));
        let face = settles(&["text_model.embeddings.token_embedding.weight"], &[], None);
        assert_eq!(face, refused(&format!("{cannot_tell} (Hugging Face's layout)")));
        let given = "`gelu: exact` is given, but OpenAI's layout says QuickGELU";
        assert_eq!(settles(&scalars, &[], Some(Activation::Gelu)), refused(given));
        let others = "`config.json` says exact GELU, `open_clip_config.json` says QuickGELU";
        assert_eq!(settles(&[TEXT], &[open_clip(true), hugging_face("gelu")], None), refused(others));
        assert_eq!(settles(&[TEXT], &[open_clip(true), hugging_face("gelu")], Some(Activation::QuickGelu)), refused(others));
    }

    #[test]
    fn what_is_written_into_safetensors_is_read_there() {
        let read = |gelu: &str| {
            let mut file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
            let tensors = BTreeMap::from([(TEXT.to_owned(), Tensor::from(1.0_f32))]);
            write_safetensors(&tensors, &BTreeMap::from([(GELU_KEY.to_owned(), gelu.to_owned())]), &mut file).unwrap();
            let opened = CheckpointFile::open(&inputs::digest_path(file.path(), None, 0).unwrap()).unwrap();
            settle(None, &opened, &Checkpoint::open(file.path()).unwrap()).ok().map(activation)
        };
        assert_eq!([read("quick"), read("exact"), read("slow")], [Some(Activation::QuickGelu), Some(Activation::Gelu), None]);
    }

    /// It is not hashed, so it may not change results; but who has one should hear of it.
    #[test]
    fn a_config_file_beside_a_named_file_is_not_read_but_pointed_at() {
        let folder = tempfile::tempdir().unwrap();
        let config = ("open_clip_config.json", json!({"model_cfg": {"quick_gelu": true}}).to_string());
        let (inside, opened) = checkpoint(folder.path(), &[TEXT], &[config]);
        assert_eq!(stated(&inside, &opened).unwrap().activation.map(|found| found.source), Some("`open_clip_config.json`".into()));
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
