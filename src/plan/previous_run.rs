//! The artifacts of a pipeline's latest run: `plan` and `run` give differences to it as reasons.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use ovenbird_cache::{Digest, Fingerprint, Recipe, Store};
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    event::{self, Event, Stamped, Verdict},
    pipeline::{Pipeline, Step, step_id::StepId},
};

/// The artifact of each step of a pipeline, as its latest runs made or reused it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct PreviousRun {
    pub(crate) pipeline: String,
    /// The pipeline's file; a named one has none. Pipelines of one name in two files are two pipelines.
    pub(crate) file: Option<PathBuf>,
    pub(crate) steps: BTreeMap<StepId, Fingerprint>,
    /// What is wrong with the record, where the logs were read instead.
    #[serde(skip)]
    pub(crate) damage: Option<String>,
}

impl PreviousRun {
    /// The path of the record in the home.
    pub(crate) fn path(pipeline: &str, file: Option<&Path>) -> String {
        let which = file.map(|file| format!("-{}", &Digest::of(file.as_os_str().as_encoded_bytes()).to_hex()[..8]));
        format!("pipelines/{pipeline}{}.json", which.unwrap_or_default())
    }

    /// Reads the record of a pipeline, or the logs of its runs where the record is damaged or gone.
    pub(crate) fn of(store: &Store, pipeline: &Pipeline) -> Result<Self> {
        let (name, file) = (pipeline.name.as_str(), pipeline.request.file.as_deref());
        match store.kept(&Self::path(name, file)) {
            Ok(Some(previous)) => Ok(previous),
            Ok(None) => Self::from_logs(store, name, file),
            Err(error @ (ovenbird_cache::Error::OtherFormat { .. } | ovenbird_cache::Error::Read { .. })) => Err(error.into()),
            Err(error) => Ok(Self { damage: Some(error.to_string()), ..Self::from_logs(store, name, file)? }),
        }
    }

    /// The same from the logs of the pipeline's runs.
    pub(crate) fn from_logs(store: &Store, name: &str, file: Option<&Path>) -> Result<Self> {
        let mut previous = Self { pipeline: name.into(), file: file.map(Path::to_owned), ..Self::default() };
        for run in event::runs(store.home()) {
            match event::read_start(store.home(), &run)? {
                Some(Event::RunStarted { pipeline, file: of, is_repair: false, .. }) if pipeline == name && of.as_deref() == file => {}
                _ => continue,
            }
            for Stamped { event, .. } in event::read_log(store.home(), &run)? {
                match event {
                    Event::StepChecked { step, fingerprint, verdict: Verdict::Reused | Verdict::Dropped }
                    | Event::StepDone { step, fingerprint, .. } => drop(previous.steps.insert(step, fingerprint)),
                    _ => {}
                }
            }
        }
        Ok(previous)
    }

    /// The records of all pipelines of a home, without the damaged ones.
    pub(crate) fn of_all(store: &Store) -> Result<Vec<Self>> {
        let places = store.record_places()?.into_iter().filter(|place| place.starts_with("pipelines/"));
        Ok(places.filter_map(|place| store.kept(&place).ok().flatten()).collect())
    }

    /// Records the artifact of a step.
    pub(crate) fn record(&mut self, store: &Store, step: &StepId, fingerprint: Fingerprint) -> Result<()> {
        let place = Self::path(&self.pipeline, self.file.as_deref());
        let is_new = self.steps.insert(step.clone(), fingerprint) != Some(fingerprint);
        let damage = self.damage.take();
        if let Some(why) = &damage {
            store.set_record_aside(&place, why)?;
        }
        if is_new || damage.is_some() { Ok(store.keep(&place, self)?) } else { Ok(()) }
    }

    /// How a recipe differs from the one of the previous run.
    pub(super) fn reasons(&self, step: &Step, recipe: &Recipe, store: &Store) -> Result<Vec<String>> {
        let Some(fingerprint) = self.steps.get(&step.id) else { return Ok(vec!["first run".into()]) };
        let Some(was) = store.manifest(step.entry.kind, fingerprint)? else { return Ok(vec!["not in the store any more".into()]) };
        Ok(recipe.diff(&was.recipe).iter().map(ToString::to_string).collect())
    }
}
