//! Every stage there is, in one table.

use std::borrow::Cow;

use ovenbird_data::words::plainly;
use schemars::{Schema, schema_for};
use serde_json::{Map, Value};

use crate::{
    Result, annotations, augmenter, blocks, clip, concepts,
    context::Context,
    contract::{AnyStage, ImageStage, Problem, Stage, consumer},
    crops, detect, detections, detector, embeddings, eval, exchange, globals, localizer, negatives, objects, oln,
    pass::{self, ImageConsumer},
    pool,
    ports::PortInfo,
    prompts, proposals, region,
    renamed::renamed_parameter,
    retrieve, toy,
    units::Unit,
    vocabulary, web,
};

/// Every stage, in the order `ovenbird stages` lists them.
pub const STAGES: &[StageEntry] = &[
    StageEntry::of::<toy::World>(),
    StageEntry::of::<toy::Clip>(),
    StageEntry::of::<toy::Vocabulary>(),
    StageEntry::of::<toy::Web>(),
    StageEntry::of::<annotations::split::Split>(),
    StageEntry::of::<annotations::folder::Folder>(),
    StageEntry::of::<web::download::Download>(),
    StageEntry::of::<web::import::Import>(),
    StageEntry::of::<web::export::Export>(),
    StageEntry::of::<annotations::web::Web>(),
    StageEntry::of::<proposals::import::Import>(),
    StageEntry::of::<proposals::export::Export>(),
    StageEntry::of::<proposals::oracle::Oracle>(),
    StageEntry::of::<proposals::truth::Truth>(),
    StageEntry::of_images::<crops::Objects>(),
    StageEntry::of::<crops::Folder>(),
    StageEntry::of::<clip::Pretrain>(),
    StageEntry::of::<prompts::ensemble::Ensemble>(),
    StageEntry::of::<prompts::Multilabel>(),
    StageEntry::of::<prompts::detpro_data::DetproData>(),
    StageEntry::of::<prompts::Detpro>(),
    StageEntry::of::<prompts::Rpl>(),
    StageEntry::of::<prompts::embed::Embed>(),
    StageEntry::of::<prompts::mean::Mean>(),
    StageEntry::of::<prompts::import::Import>(),
    StageEntry::of::<prompts::export::Export>(),
    StageEntry::of::<vocabulary::import::Import>(),
    StageEntry::of::<negatives::retrieve::Retrieve>(),
    StageEntry::of::<negatives::import::Import>(),
    StageEntry::of::<negatives::export::Export>(),
    StageEntry::of::<concepts::build::Build>(),
    StageEntry::of::<concepts::import::Import>(),
    StageEntry::of::<concepts::export::Export>(),
    StageEntry::of_images::<clip::globals::Globals>(),
    StageEntry::of_images::<clip::blocks::Blocks>(),
    StageEntry::of_images::<clip::objects::Objects>(),
    StageEntry::of_images::<clip::proposals::Proposals>(),
    StageEntry::of::<embeddings::import::Import>(),
    StageEntry::of::<embeddings::export::Export>(),
    StageEntry::of::<exchange::Import<globals::FromFiles>>(),
    StageEntry::of::<exchange::Import<blocks::FromFiles>>(),
    StageEntry::of::<exchange::Import<objects::FromFiles>>(),
    StageEntry::of::<exchange::Export<globals::ToFiles>>(),
    StageEntry::of::<exchange::Export<blocks::ToFiles>>(),
    StageEntry::of::<exchange::Export<objects::ToFiles>>(),
    StageEntry::of::<annotations::pseudo_labels::PseudoLabels>(),
    StageEntry::of::<region::prompt::Prompt>(),
    StageEntry::of::<region::embed::Embed>(),
    StageEntry::of::<region::export::Export>(),
    StageEntry::of::<annotations::relabel::Relabel>(),
    StageEntry::of::<detect::ZeroShot>(),
    StageEntry::of::<retrieve::boxes::Boxes>(),
    StageEntry::of::<retrieve::statistics::Statistics>(),
    StageEntry::of::<pool::import::Import>(),
    StageEntry::of::<pool::links::TableLinks>(),
    StageEntry::of::<pool::retrieve::Retrieve>(),
    StageEntry::of::<augmenter::train::Train>(),
    StageEntry::of::<augmenter::apply::Apply>(),
    StageEntry::of::<augmenter::import::Import>(),
    StageEntry::of::<augmenter::export::Export>(),
    StageEntry::of::<oln::train::Train>(),
    StageEntry::of::<proposals::oln::Oln>(),
    StageEntry::of::<proposals::rpn::Rpn>(),
    StageEntry::of::<localizer::train::Train>(),
    StageEntry::of::<localizer::options::LocalizerOptions>(),
    StageEntry::of::<localizer::export::Export>(),
    StageEntry::of::<localizer::import::Import>(),
    StageEntry::of::<detector::train::Train>(),
    StageEntry::of::<detector::embed::Embed>(),
    StageEntry::of::<detector::features::Features>(),
    StageEntry::of::<detector::probe::Probe>(),
    StageEntry::of::<detector::options::TestOptions>(),
    StageEntry::of::<detector::select::Select>(),
    StageEntry::of::<detector::export::Export>(),
    StageEntry::of::<detector::import::Import>(),
    StageEntry::of::<eval::Coco>(),
    StageEntry::of::<eval::Lvis>(),
    StageEntry::of::<eval::regions::Regions>(),
    StageEntry::of::<eval::anchors::Anchors>(),
    StageEntry::of::<detections::Export>(),
];

/// What the program knows of a stage without running it.
#[derive(Debug, Clone, Copy)]
pub struct StageEntry {
    /// Its name in pipelines.
    pub kind: &'static str,
    /// Raised when the same recipe would give other results.
    pub version: u32,
    /// The input ports.
    pub inputs: &'static [PortInfo],
    /// The output ports.
    pub outputs: &'static [PortInfo],
    /// See [`Stage::USES_DEVICE`].
    pub uses_device: bool,
    /// See [`Stage::SKIPS_ITEMS`].
    pub skips_items: bool,
    /// JSON Schema of its parameters, with documentation and defaults.
    pub schema: fn() -> Schema,
    /// Reads its parameters; each problem names the field.
    pub parse: fn(&Value) -> Result<Box<dyn AnyStage>, Problem>,
    /// Of an [`ImageStage`]: prepares its part in a pass over images.
    pub consumer: Option<MakeConsumer>,
}

/// [`ImageStage::consumer`] of a stage that the entry parsed.
type MakeConsumer = for<'a> fn(&'a dyn AnyStage, &'a [Unit], &'a Context<'a>) -> Result<ImageConsumer<'a>>;

impl StageEntry {
    /// The entry of a stage.
    pub const fn of<S: Stage>() -> Self {
        Self {
            kind: S::KIND,
            version: S::VERSION,
            inputs: S::INPUTS,
            outputs: S::OUTPUTS,
            uses_device: S::USES_DEVICE,
            skips_items: S::SKIPS_ITEMS,
            schema: || schema_for!(S),
            parse: parse::<S>,
            consumer: None,
        }
    }

    /// The entry of a stage that can share a pass over images.
    pub const fn of_images<S: ImageStage>() -> Self {
        Self { consumer: Some(consumer::<S>), ..Self::of::<S>() }
    }

    /// The stage's documentation; its first line is a summary.
    pub fn doc(&self) -> String {
        (self.schema)().get("description").and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}

/// Makes units of several [`ImageStage`]s, whose ports `images` and `annotations` are equal, in one pass. Each publishes what it would
/// publish alone.
pub fn run_together(stages: &[(&StageEntry, &dyn AnyStage, &[Unit], &Context<'_>)]) -> Result<()> {
    let mut consumers = Vec::new();
    for (entry, stage, units, cx) in stages {
        let consumer = entry.consumer.unwrap_or_else(|| panic!("BUG: `{}` cannot share a pass over images", entry.kind));
        consumers.push(consumer(*stage, units, cx)?);
    }
    pass::run(&consumers)
}

fn parse<S: Stage>(params: &Value) -> Result<Box<dyn AnyStage>, Problem> {
    match serde_path_to_error::deserialize::<_, S>(with_own_training::<S>(params).as_ref()) {
        Ok(stage) => Ok(Box::new(stage)),
        Err(error) => {
            if let Some(problem) = renamed_parameter(params, &schema_for!(S)) {
                return Err(problem);
            }
            let field = error.path().to_string();
            Err(Problem::new(
                if field == "." { String::new() } else { field },
                plainly(&error.into_inner().to_string()).replace("an object", "a mapping"),
            ))
        }
    }
}

/// Parameters whose mapping `training` is filled up with the defaults of this stage, which differ from stage to stage. Who gives the length in steps does not
/// want the default one in epochs.
fn with_own_training<S: Stage>(params: &Value) -> Cow<'_, Value> {
    let Some(Value::Object(given)) = params.get(TRAINING) else { return Cow::Borrowed(params) };
    let defaults = serde_json::from_value::<S>(Value::Object(Map::new())).ok().map(|stage| AnyStage::params(&stage));
    let Some(Value::Object(defaults)) = defaults.as_ref().and_then(|defaults| defaults.get(TRAINING)) else { return Cow::Borrowed(params) };
    let (in_steps, is_averaged) =
        (given.contains_key("steps") && !given.contains_key("epochs"), given.get("ema_decay") != Some(&Value::Null));
    let fits = |name: &str| match name {
        "epochs" | "lr_epochs" | "checkpoint_epochs" => !in_steps,
        "averaging" => is_averaged,
        _ => true,
    };
    let mut training = given.clone();
    for (name, value) in defaults.iter().filter(|(name, _)| fits(name)) {
        training.entry(name).or_insert_with(|| value.clone());
    }
    let mut params = params.clone();
    params[TRAINING] = training.into();
    Cow::Owned(params)
}

/// The parameter under which an operator says how a network is trained.
const TRAINING: &str = "training";

/// Looks a stage up by its kind.
pub fn find(kind: &str) -> Option<&'static StageEntry> {
    STAGES.iter().find(|entry| entry.kind == kind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A mapping with one key leaves the others as the stage's documentation has them, not as those of another stage.
    #[test]
    fn what_a_training_does_not_say_is_the_stage_s_own() {
        let trains = STAGES.iter().filter(|entry| (entry.parse)(&json!({})).is_ok_and(|stage| stage.params().get(TRAINING).is_some()));
        let mut kinds = Vec::new();
        for entry in trains {
            kinds.push(entry.kind);
            let params = |given: Value| (entry.parse)(&given).unwrap_or_else(|problem| panic!("{}: {problem:?}", entry.kind)).params();
            let (own, given) = (params(json!({})), params(json!({"training": {"lr": 0.125}})));
            for (name, value) in own[TRAINING].as_object().unwrap() {
                let expected = if name == "lr" { &json!(0.125) } else { value };
                assert_eq!(&given[TRAINING][name], expected, "{}: {name}", entry.kind);
            }
            let in_steps = params(json!({"training": {"steps": 70, "checkpoint_every": 7}}));
            assert!(in_steps[TRAINING].get("epochs").is_none_or(Value::is_null), "{}", entry.kind);
            assert_eq!(in_steps[TRAINING]["optimizer"], own[TRAINING]["optimizer"], "{}", entry.kind);
        }
        assert_eq!(kinds, ["region/prompt", "oln/train", "localizer/train", "detector/train"]);
    }

    #[test]
    fn these_stages_run_networks_on_the_devices_of_a_run() {
        let kinds = |uses_device: bool| STAGES.iter().filter(move |entry| entry.uses_device == uses_device).map(|entry| entry.kind);
        let networks = [
            "toy/clip",
            "clip/pretrain",
            "prompts/multilabel",
            "prompts/detpro",
            "prompts/rpl",
            "negatives/retrieve",
            "concepts/build",
            "clip/globals",
            "clip/blocks",
            "clip/objects",
            "clip/proposals",
            "region/prompt",
            "region/embed",
            "retrieve/boxes",
            "pool/retrieve",
            "augmenter/train",
            "augmenter/apply",
            "oln/train",
            "proposals/oln",
            "proposals/rpn",
            "localizer/train",
            "localizer/test",
            "detector/train",
            "detector/embed",
            "detector/features",
            "detector/test",
            "detector/select",
            "eval/anchors",
        ];
        assert_eq!(kinds(true).collect::<Vec<_>>(), networks);
        // `prompts/ensemble` encodes texts on the CPU: they take seconds.
        let others = [
            "toy/world",
            "toy/vocabulary",
            "toy/web",
            "annotations/split",
            "annotations/folder",
            "web/download",
            "web/import",
            "web/export",
            "annotations/web",
            "proposals/import",
            "proposals/export",
            "proposals/oracle",
            "proposals/truth",
            "crops/objects",
            "crops/folder",
            "prompts/ensemble",
            "prompts/detpro-data",
            "prompts/embed",
            "prompts/mean",
            "prompts/import",
            "prompts/export",
            "vocabulary/import",
            "negatives/import",
            "negatives/export",
            "concepts/import",
            "concepts/export",
            "embeddings/import",
            "embeddings/export",
            "globals/import",
            "blocks/import",
            "objects/import",
            "globals/export",
            "blocks/export",
            "objects/export",
            "annotations/pseudo-labels",
            "region/export",
            "annotations/relabel",
            "detect/zero-shot",
            "retrieve/statistics",
            "pool/import",
            "pool/links",
            "augmenter/import",
            "augmenter/export",
            "localizer/export",
            "localizer/import",
            "detector/probe",
            "detector/export",
            "detector/import",
            "eval/coco",
            "eval/lvis",
            "eval/regions",
            "detections/export",
        ];
        assert_eq!(kinds(false).collect::<Vec<_>>(), others);
    }
}
