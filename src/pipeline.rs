//! A pipeline: a graph of steps, in an order in which every step comes after those it reads from.

pub(crate) mod axes;
pub(crate) mod changes;
mod draft;
pub(crate) mod file;
mod lines;
pub(crate) mod matrix;
pub(crate) mod named;
pub(crate) mod problem;
mod rounds;
pub(crate) mod step_id;
pub(crate) mod yaml;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use ovenbird_stages::{AnyStage, OnBadItem, StageEntry};
use serde::{Deserialize, Serialize};

use changes::Setting;
use matrix::Matrix;
use step_id::StepId;

/// A pipeline that can be planned.
pub(crate) struct Pipeline {
    pub(crate) name: String,
    pub(crate) description: String,
    /// In an order in which every stage comes after those it reads from.
    pub(crate) steps: Vec<Step>,
    /// The steps of each variant and seed; `None` where the file has neither.
    pub(crate) matrix: Option<Matrix>,
    /// The text and settings that it was read from.
    pub(crate) request: Request,
}

/// Everything needed to read a pipeline again, even if its file has changed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The folder that paths are relative to.
    pub(crate) folder: PathBuf,
    /// The pipeline's file, as an absolute path; a named one has none.
    #[serde(default)]
    pub(crate) file: Option<PathBuf>,
    /// The pipeline file's text.
    pub(crate) text: String,
    pub(crate) settings: Vec<Setting>,
    /// The chosen variants; empty: all.
    #[serde(default)]
    pub(crate) variants: Vec<String>,
}

/// A stage of a pipeline.
pub(crate) struct Step {
    /// The stage's id in the file, with the variant and seed where the stage has several instances: `detector@crops,8`.
    pub(crate) id: StepId,
    pub(crate) entry: &'static StageEntry,
    pub(crate) stage: Box<dyn AnyStage>,
    pub(crate) inputs: BTreeMap<String, Source>,
    pub(crate) resources: Resources,
    pub(crate) on_bad_item: OnBadItem,
    /// Without progress for so long, the stage counts as hanging.
    pub(crate) max_silence: Duration,
    /// In a dry run: how many of its items, or steps of a training, are computed.
    pub(crate) most_items: Option<usize>,
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    /// A file or folder the user brings.
    File(PathBuf),
    /// An output of another step, by its place in [`Pipeline::steps`].
    Step { step: usize, port: String },
}

/// The part of the machine that a stage uses while it runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Resources {
    /// Processor cores.
    pub(crate) cpu: usize,
    /// Memory, in bytes.
    pub(crate) memory: u64,
    /// How many of the run's devices it takes; 0: see [`crate::devices::Demand::of`].
    pub(crate) gpu: usize,
}

impl Default for Resources {
    fn default() -> Self {
        Self { cpu: 1, memory: 1 << 30, gpu: 0 }
    }
}

impl Step {
    /// The places of the steps that this step reads from, ascending, each once.
    pub(crate) fn upstream(&self) -> Vec<usize> {
        let step = |source: &Source| match source {
            Source::Step { step, .. } => Some(*step),
            Source::File(_) => None,
        };
        let steps: BTreeSet<usize> = self.inputs.values().filter_map(step).collect();
        steps.into_iter().collect()
    }
}

impl Pipeline {
    /// The steps of a run that no other step of the run reads from.
    pub(crate) fn ends(&self, wanted: &[usize]) -> BTreeSet<usize> {
        let read: BTreeSet<usize> = wanted.iter().flat_map(|step| self.steps[*step].upstream()).collect();
        wanted.iter().copied().filter(|step| !read.contains(step)).collect()
    }

    /// The places of some steps and of all steps before them, ascending.
    pub(crate) fn needed(&self, until: &[usize]) -> Vec<usize> {
        let mut needed: BTreeSet<usize> = until.iter().copied().collect();
        // Steps come after those they read from.
        for place in (0..self.steps.len()).rev() {
            if needed.contains(&place) {
                needed.extend(self.steps[place].upstream());
            }
        }
        needed.into_iter().collect()
    }
}
