//! Copies of a pipeline's steps that detect in other images.
//!
//! A copy reads the given images in place of the pipeline's, and where class names are given, these and their embeddings. Everything else, such
//! as weights and checkpoints, it reads from the pipeline's own steps, whose recipes stay as they are.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use ovenbird_stages::{OnBadItem, StageEntry, find};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    pipeline::{Pipeline, Resources, Source, Step, file::MAX_SILENCE, step_id::StepId},
};

/// Stands for the given images where a path is expected.
pub(super) const IMAGES: &str = "the given images";
/// Every other image is used where one cannot be read.
const SKIP: OnBadItem = OnBadItem::Skip { max_failed_ratio: 1.0 };

/// The copies, which are the last steps of their pipeline, each after those it reads from.
pub(super) struct Copies {
    /// The place of the first one, which lists the images.
    pub(super) list: usize,
    /// The place of the last one, which detects.
    pub(super) detections: usize,
    /// The inputs with class embeddings that are the pipeline's own though names are given: they have no others.
    pub(super) own_prompts: Vec<Source>,
}

/// Appends copies of the step that detects, and of the steps between it and the images, to a pipeline. `names`: the file of the given class
/// names. Fails where a step cannot be done for other images.
pub(super) fn append(pipeline: &mut Pipeline, detecting: usize, names: Option<&Path>, cpu: usize) -> Result<Copies> {
    let classes = names.map_or_else(|| pipeline.steps[detecting].inputs["classes"].clone(), |path| Source::File(path.to_owned()));
    let list = pipeline.steps.len();
    let inputs = [("images", Source::File(PathBuf::from(IMAGES))), ("classes", classes.clone())];
    let entry = find("annotations/folder").expect("BUG: a stage of this program");
    pipeline.steps.push(Step {
        id: StepId::of_stage("images"),
        entry,
        stage: parse(entry, &json!({})),
        inputs: inputs.map(|(port, source)| (port.to_owned(), source)).into(),
        resources: Resources { cpu, ..Resources::default() },
        on_bad_item: SKIP,
        max_silence: MAX_SILENCE,
        most_items: None,
    });
    let mut copier = Copier { pipeline, classes, has_names: names.is_some(), list, cpu, copied: BTreeMap::new(), own_prompts: Vec::new() };
    let detections = copier.copy(detecting)?;
    Ok(Copies { list, detections, own_prompts: copier.own_prompts })
}

struct Copier<'a> {
    pipeline: &'a mut Pipeline,
    classes: Source,
    has_names: bool,
    list: usize,
    cpu: usize,
    /// The place of each copy, by that of the step.
    copied: BTreeMap<usize, usize>,
    own_prompts: Vec<Source>,
}

impl Copier<'_> {
    /// Copies a step and what it needs; returns the place of the copy.
    fn copy(&mut self, place: usize) -> Result<usize> {
        if let Some(copy) = self.copied.get(&place) {
            return Ok(*copy);
        }
        let mut inputs = self.pipeline.steps[place].inputs.clone();
        for (port, source) in &mut inputs {
            *source = self.input(place, port, source)?;
        }
        Ok(self.push(place, inputs))
    }

    /// Where the copy of a step reads an input.
    fn input(&mut self, place: usize, port: &str, source: &Source) -> Result<Source> {
        Ok(match port {
            "images" => Source::File(IMAGES.into()),
            "annotations" => Source::Step { step: self.list, port: "annotations".into() },
            "classes" => self.classes.clone(),
            "prompts" | "multilabel_prompts" if self.has_names => self.prompts(source),
            "features" | "proposals" => match source {
                Source::Step { step, port } if self.pipeline.steps[*step].inputs.contains_key("images") => {
                    Source::Step { step: self.copy(*step)?, port: port.clone() }
                }
                Source::Step { .. } | Source::File(_) => return Err(self.no_other(place, port, source)),
            },
            _ => source.clone(),
        })
    }

    /// Class embeddings of the given names, where the step that made the pipeline's can make others without a training.
    fn prompts(&mut self, source: &Source) -> Source {
        match source {
            Source::Step { step, port } if self.pipeline.steps[*step].entry.kind == "prompts/ensemble" => {
                let (place, port) = (*step, port.clone());
                let mut inputs = self.pipeline.steps[place].inputs.clone();
                inputs.insert("classes".into(), self.classes.clone());
                inputs.remove("more_classes");
                let copy = self.copied.get(&place).copied();
                Source::Step { step: copy.unwrap_or_else(|| self.push(place, inputs)), port }
            }
            own => {
                self.own_prompts.push(own.clone());
                own.clone()
            }
        }
    }

    fn push(&mut self, place: usize, inputs: BTreeMap<String, Source>) -> usize {
        let step = &self.pipeline.steps[place];
        let copy = Step {
            id: step.id.clone(),
            entry: step.entry,
            stage: parse(step.entry, &step.stage.params()),
            inputs,
            resources: Resources { cpu: self.cpu, ..step.resources },
            on_bad_item: if step.entry.skips_items { SKIP } else { OnBadItem::Fail },
            max_silence: step.max_silence,
            most_items: None,
        };
        self.pipeline.steps.push(copy);
        let copy = self.pipeline.steps.len() - 1;
        self.copied.insert(place, copy);
        copy
    }

    /// The error where an input of a step exists for the pipeline's images alone.
    fn no_other(&self, place: usize, port: &str, source: &Source) -> Error {
        let from = match source {
            Source::File(path) => path.display().to_string(),
            Source::Step { step, .. } => {
                let Step { id, entry, .. } = &self.pipeline.steps[*step];
                format!("`{id}` (`{}`)", entry.kind)
            }
        };
        Error::Usage {
            problem: format!("`{}` reads {port} from {from}, which has none for other images", self.pipeline.steps[place].id),
            hint:
                "choose a pipeline that finds proposals with `oln/train` and `proposals/oln`, such as vild-toy, or a step `detector/test`"
                    .into(),
        }
    }
}

fn parse(entry: &StageEntry, params: &Value) -> Box<dyn ovenbird_stages::AnyStage> {
    let stage = (entry.parse)(params);
    stage.unwrap_or_else(|problem| panic!("BUG: parameters that were read once: {}: {}", problem.field, problem.problem))
}
