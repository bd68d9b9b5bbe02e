//! Every stage there is, in one table.

use schemars::{Schema, schema_for};
use serde_json::Value;

use crate::{
    annotations, clip,
    contract::{AnyStage, PortInfo, Problem, Stage},
    crops, detect, detector, export, interchange, prompts, pseudo_labels,
    renamed::renamed_parameter,
    toy,
};

/// Every stage, in the order `ovenbird stages` lists them.
pub const STAGES: &[StageEntry] = &[
    StageEntry::of::<toy::World>(),
    StageEntry::of::<annotations::Split>(),
    StageEntry::of::<annotations::Import>(),
    StageEntry::of::<annotations::Export>(),
    StageEntry::of::<crops::Objects>(),
    StageEntry::of::<crops::Folder>(),
    StageEntry::of::<clip::Pretrain>(),
    StageEntry::of::<prompts::Ensemble>(),
    StageEntry::of::<prompts::Multilabel>(),
    StageEntry::of::<prompts::Import>(),
    StageEntry::of::<prompts::Export>(),
    StageEntry::of::<clip::Globals>(),
    StageEntry::of::<clip::Blocks>(),
    StageEntry::of::<clip::Objects>(),
    StageEntry::of::<clip::Proposals>(),
    StageEntry::of::<interchange::GlobalsImport>(),
    StageEntry::of::<interchange::BlocksImport>(),
    StageEntry::of::<interchange::ObjectsImport>(),
    StageEntry::of::<interchange::GlobalsExport>(),
    StageEntry::of::<interchange::BlocksExport>(),
    StageEntry::of::<interchange::ObjectsExport>(),
    StageEntry::of::<pseudo_labels::PseudoLabels>(),
    StageEntry::of::<detect::ZeroShot>(),
    StageEntry::of::<detector::OlnTrain>(),
    StageEntry::of::<detector::OlnPropose>(),
    StageEntry::of::<detector::Train>(),
    StageEntry::of::<detector::Test>(),
    StageEntry::of::<detector::Select>(),
    StageEntry::of::<detector::Export>(),
    StageEntry::of::<detector::Import>(),
    StageEntry::of::<detect::Coco>(),
    StageEntry::of::<detect::Lvis>(),
    StageEntry::of::<export::Export>(),
];

/// What the program knows of a stage without running it.
#[derive(Debug, Clone, Copy)]
pub struct StageEntry {
    /// How pipelines name it.
    pub kind: &'static str,
    /// Raised when the same recipe would give other results.
    pub version: u32,
    /// What it reads.
    pub inputs: &'static [PortInfo],
    /// What it writes.
    pub outputs: &'static [PortInfo],
    /// See [`Stage::USES_DEVICE`].
    pub uses_device: bool,
    /// JSON Schema of its parameters, with documentation and defaults.
    pub schema: fn() -> Schema,
    /// Reads its parameters; each problem names the field.
    pub parse: fn(&Value) -> Result<Box<dyn AnyStage>, Problem>,
}

impl StageEntry {
    /// The entry of a stage.
    pub const fn of<S: Stage>() -> Self {
        Self {
            kind: S::KIND,
            version: S::VERSION,
            inputs: S::INPUTS,
            outputs: S::OUTPUTS,
            uses_device: S::USES_DEVICE,
            schema: || schema_for!(S),
            parse: parse::<S>,
        }
    }

    /// The first sentence or two of the stage's documentation, and the rest.
    pub fn doc(&self) -> String {
        (self.schema)().get("description").and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}

fn parse<S: Stage>(params: &Value) -> Result<Box<dyn AnyStage>, Problem> {
    if let Some(problem) = renamed_parameter(params) {
        return Err(problem);
    }
    match serde_path_to_error::deserialize::<_, S>(params) {
        Ok(stage) => Ok(Box::new(stage)),
        Err(error) => {
            let field = error.path().to_string();
            Err(Problem::new(if field == "." { String::new() } else { field }, error.into_inner().to_string()))
        }
    }
}

/// Looks a stage up by its kind.
pub fn find(kind: &str) -> Option<&'static StageEntry> {
    STAGES.iter().find(|entry| entry.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn these_stages_run_networks_on_the_devices_of_a_run() {
        let kinds = |uses_device: bool| STAGES.iter().filter(move |entry| entry.uses_device == uses_device).map(|entry| entry.kind);
        let networks = [
            "clip/pretrain",
            "prompts/multilabel",
            "clip/globals",
            "clip/blocks",
            "clip/objects",
            "clip/proposals",
            "oln/train",
            "proposals/oln",
            "detector/train",
            "detector/test",
            "detector/select",
        ];
        assert_eq!(kinds(true).collect::<Vec<_>>(), networks);
        // `prompts/ensemble` encodes texts on the CPU: they take seconds.
        let others = [
            "toy/world",
            "annotations/split",
            "proposals/import",
            "proposals/export",
            "crops/objects",
            "crops/folder",
            "prompts/ensemble",
            "prompts/import",
            "prompts/export",
            "globals/import",
            "blocks/import",
            "objects/import",
            "globals/export",
            "blocks/export",
            "objects/export",
            "annotations/pseudo-labels",
            "detect/zero-shot",
            "detector/export",
            "detector/import",
            "eval/coco",
            "eval/lvis",
            "detections/export",
        ];
        assert_eq!(kinds(false).collect::<Vec<_>>(), others);
    }
}
