//! What stages share that embed class names with descriptions. (PromptDet, sections 2, 5 and 6.)

use std::collections::BTreeMap;

use ovenbird_models::clip::{self, prompted::Prompted};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    Artifact as _, Error, Result,
    artifacts::{Descriptions, Prompts},
    clip::Space,
};

/// The names of the vectors before a class name, and of those between it and its description, in files.
pub(super) const RPL_CONTEXT: [&str; 2] = ["ctx1", "ctx2"];

/// What classes are called elsewhere, by their names here.
pub(super) type Renamed = BTreeMap<String, String>;

/// The two classes of LVIS that RPL calls otherwise than its annotations do.
pub(super) fn published_names() -> Renamed {
    [
        ("speaker_(stero_equipment)", "speaker_(stereo_equipment)"),
        ("monitor_(computer_equipment) computer_monitor", "monitor_(computer_equipment)_computer_monitor"),
    ]
    .map(|(here, there)| (here.to_owned(), there.to_owned()))
    .into()
}

/// Names with descriptions, ready to be embedded with `n_context` vectors at each place. Fails where a text is too long.
pub(super) fn prompted<'a>(clip: &'a clip::Clip, texts: &[(String, String)], n_context: usize) -> Result<Prompted<'a>> {
    Prompted::described(clip.causal_text()?, clip.tokenizer(), texts, n_context).map_err(|error| match error {
        ovenbird_models::Error::Input { what: "text", expected, found } => Error::Input {
            port: Descriptions::KIND,
            problem: format!("expected {expected}, found {found}"),
            hint: "shorten that description, or use fewer vectors: `context`".into(),
        },
        other => other.into(),
    })
}

/// The content of a file of class embeddings, not normalised, as RPL's are, with the contexts f32 `[M, C]` around them; `texts`: name and description of
/// each.
pub(super) fn described_prompts(
    prompted: &Prompted<'_>,
    contexts: &[Tensor; 2],
    names: &[String],
    texts: &[(String, String)],
    space: Space,
) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let embeddings = no_grad(|| prompted.encode(&Tensor::cat(contexts, 0)))?.to_device(Device::Cpu).to_kind(Kind::Float);
    let prompts = Prompts { names: names.to_vec(), embeddings, scale: None, clip: Some(space) };
    let (mut tensors, mut metadata) = prompts.content()?;
    tensors.extend(RPL_CONTEXT.iter().zip(contexts).map(|(name, context)| ((*name).to_owned(), context.shallow_clone())));
    metadata.insert("texts".into(), serde_json::to_string(texts).expect("BUG: texts are plain JSON"));
    Ok((tensors, metadata))
}
