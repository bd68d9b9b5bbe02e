//! Arguments that choose a pipeline, changes to it, and some of its steps.

use std::{path::Path, str::FromStr};

use ovenbird_data::words::nearest;

use crate::{
    error::{Error, Result},
    output::as_typed,
    pipeline::{Pipeline, Step, changes::Setting, file, step_id::StepId},
};

/// A pipeline and changes to it.
#[derive(clap::Args)]
pub(crate) struct Chosen {
    /// A named pipeline, or a file (with a slash or ending in .yaml)
    pub(crate) pipeline: String,
    /// Change a variable, a parameter, an input or the stage of a step: `--set seed=8`, `--set detect.score_threshold=0.1`, `--set
    /// detector.in.features=objects.features`, `--set clip.use=clip/pretrain`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// Only this variant of the pipeline; may be repeated
    #[arg(long = "variant", value_name = "NAME")]
    variants: Vec<String>,
}

/// A pipeline, and how far to run it.
#[derive(clap::Args)]
pub(crate) struct Wanted {
    #[command(flatten)]
    pub(crate) chosen: Chosen,
    /// Stop after this step
    #[arg(long, value_name = "STEP")]
    until: Option<String>,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
        Ok(Self { key: key.trim().into(), value: value.into() })
    }
}

impl Chosen {
    /// The arguments as typed, with some more changes: `./mine.yaml --set seed=8`.
    pub(crate) fn as_typed(&self, changes: &[&str]) -> Vec<String> {
        let settings = self.settings.iter().map(|Setting { key, value }| format!("{key}={value}"));
        let settings = settings.chain(changes.iter().map(|change| (*change).to_owned())).flat_map(|change| ["--set".to_owned(), change]);
        let variants = self.variants.iter().flat_map(|variant| ["--variant".to_owned(), variant.clone()]);
        [self.pipeline.clone()].into_iter().chain(settings).chain(variants).collect()
    }

    /// The error where a command reads the result of a step that is not stored.
    pub(crate) fn not_run(&self, home: &Path, step: &StepId) -> Error {
        let command = [vec!["run".to_owned()], self.as_typed(&[]), vec!["--until".to_owned(), step.to_string()]].concat();
        Error::NotRun { step: step.clone(), command: as_typed(home, &command) }
    }

    /// Whether a change of this key was given.
    pub(crate) fn changes(&self, key: &str) -> bool {
        self.settings.iter().any(|setting| setting.key == key)
    }

    /// Reads and checks the pipeline.
    pub(crate) fn load(&self) -> Result<Pipeline> {
        file::load(&self.pipeline, &self.settings, &self.variants)
    }
}

impl Wanted {
    /// Reads and checks the pipeline; returns it with the places of the wanted steps.
    pub(crate) fn load(&self) -> Result<(Pipeline, Vec<usize>)> {
        let pipeline = self.chosen.load()?;
        let wanted = match &self.until {
            Some(until) => pipeline.needed(&places(&pipeline, until)?),
            None => (0..pipeline.steps.len()).collect(),
        };
        Ok((pipeline, wanted))
    }
}

/// The places of the steps with a name: one step by its full id, or all instances of a stage by the stage's id.
pub(crate) fn places(pipeline: &Pipeline, name: &str) -> Result<Vec<usize>> {
    let is_named = |step: &Step| step.id.stage == name || step.id.to_string() == name;
    let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| is_named(&pipeline.steps[*place])).collect();
    if !places.is_empty() {
        return Ok(places);
    }
    let mut stages: Vec<&str> = Vec::new();
    for Step { id, .. } in &pipeline.steps {
        stages.extend((!stages.contains(&id.stage.as_str())).then_some(id.stage.as_str()));
    }
    let instances: Vec<String> = pipeline.steps.iter().map(|step| step.id.to_string()).filter(|_| name.contains('@')).collect();
    let hint = match nearest(name, stages.iter().copied().chain(instances.iter().map(String::as_str))) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("its steps are {}", stages.join(", ")),
    };
    Err(Error::Usage { problem: format!("{name}: the pipeline has no such step"), hint })
}
