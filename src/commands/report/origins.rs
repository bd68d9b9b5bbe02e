//! Where the inputs of a run's steps come from: outputs of other steps, or files and folders of the user, wherever they lie.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
};

use ovenbird_cache::{
    Artifact, Digest, Ledger, Store, files_digest,
    inputs::{self, InputFile},
};
use ovenbird_stages::{Artifact as _, artifacts::Images, find};

use crate::{
    error::Result,
    pipeline::{Request, step_id::StepId},
    reason::Sources,
    request::request_path,
    run_state::StepState,
};

/// The inputs of a run's steps.
pub(super) struct Origins<'a> {
    steps: &'a [StepState],
    artifacts: &'a BTreeMap<StepId, Artifact>,
    /// By step and input, as the pipeline has it: `world.val`, `./val.json`.
    sources: BTreeMap<StepId, Sources>,
    /// The folder that paths of the user are relative to.
    folder: PathBuf,
    ledger: Ledger,
}

/// The files of an input as they are at present.
pub(super) struct Given {
    pub(super) files: Vec<InputFile>,
    /// The digest of those that the step read, where it differs. Only that of the user's own files may.
    pub(super) was: Option<Digest>,
}

/// An input with images.
pub(super) struct ImageInput {
    pub(super) step: StepId,
    pub(super) port: &'static str,
    /// Whether the step is one that was asked about, or that it reads from.
    pub(super) is_upstream: bool,
}

enum Origin {
    Output { step: StepId, port: String },
    Own(PathBuf),
}

impl<'a> Origins<'a> {
    /// `sources`: by step, the source of each input, as the log has it.
    pub(super) fn of(
        store: &Store,
        run: &str,
        sources: BTreeMap<StepId, Sources>,
        steps: &'a [StepState],
        artifacts: &'a BTreeMap<StepId, Artifact>,
    ) -> Result<Self> {
        let request: Option<Request> = store.kept(&request_path(run))?;
        Ok(Self { steps, artifacts, sources, folder: request.unwrap_or_default().folder, ledger: Ledger::of(store) })
    }

    fn origin(&self, step: &StepId, port: &str) -> Option<Origin> {
        let source = self.sources.get(step)?.get(port)?;
        // As in a pipeline: what has a slash is a path.
        if source.contains('/') {
            return Some(Origin::Own(self.folder.join(source)));
        }
        let (step, port) = source.rsplit_once('.')?;
        Some(Origin::Output { step: step.into(), port: port.into() })
    }

    /// The files of a step's input, as the step read them; `None` where it is not given, or its bytes are no longer in the home. Fails where
    /// a file of the user cannot be read, or has changed since.
    pub(super) fn files(&self, step: &StepId, port: &str) -> Result<Option<Vec<InputFile>>> {
        match self.given(step, port)? {
            None => Ok(None),
            Some(Given { files, was: None }) => Ok(Some(files)),
            Some(Given { files, was: Some(expected) }) => {
                let path = files.first().map_or_else(PathBuf::new, |file| file.path.clone());
                Err(ovenbird_cache::Error::Changed { path, expected, found: files_digest(&files) }.into())
            }
        }
    }

    /// The files of a step's input as they are at present: see [`Self::files`].
    pub(super) fn given(&self, step: &StepId, port: &str) -> Result<Option<Given>> {
        Ok(match self.origin(step, port) {
            None => None,
            Some(Origin::Output { step, port }) => {
                let artifact = self.artifacts.get(&step).filter(|artifact| !artifact.is_dropped);
                artifact.map(|artifact| Given { files: artifact.port(&port), was: None })
            }
            Some(Origin::Own(path)) => {
                let files = inputs::digest_path(&path, Some(&self.ledger), jiff::Timestamp::now().as_nanosecond())?;
                let was = self.artifacts.get(step).and_then(|artifact| artifact.manifest.recipe.inputs.get(port).copied());
                Some(Given { was: was.filter(|was| *was != files_digest(&files)), files })
            }
        })
    }

    /// A step and those that it reads from, the nearest first; of two at the same distance, the one that the detections come from.
    fn upstream(&self, step: &StepId) -> Vec<StepId> {
        let mut found: Vec<StepId> = Vec::new();
        let mut waiting = VecDeque::from([step.clone()]);
        while let Some(id) = waiting.pop_front() {
            if found.contains(&id) {
                continue;
            }
            let mut ports: Vec<&String> = self.sources.get(&id).into_iter().flat_map(BTreeMap::keys).collect();
            ports.sort_by_key(|port| *port != "detections");
            waiting.extend(ports.into_iter().filter_map(|port| match self.origin(&id, port)? {
                Origin::Output { step, .. } => Some(step),
                Origin::Own(_) => None,
            }));
            found.push(id);
        }
        found
    }

    /// The inputs of a kind that a step and those before it read, the nearest first.
    pub(super) fn inputs_of_kind(&self, step: &StepId, kind: &str) -> Vec<(StepId, &'static str)> {
        let ports = |id: &StepId| {
            let stage = self.steps.iter().find(|step| step.id == *id).map_or("", |step| &step.kind);
            let ports = find(stage).into_iter().flat_map(|entry| entry.inputs).filter(|port| port.kind == kind);
            ports.map(|port| (id.clone(), port.name)).collect::<Vec<_>>()
        };
        self.upstream(step).iter().flat_map(ports).collect()
    }

    /// The outputs of a kind that are in the home.
    pub(super) fn outputs_of_kind(&self, kind: &str) -> Vec<(&'a StepId, &'a Artifact, &'static str)> {
        let output = |step: &'a StepState| {
            let port = find(&step.kind)?.outputs.iter().find(|port| port.kind == kind)?;
            let artifact = self.artifacts.get(&step.id).filter(|artifact| !artifact.is_dropped)?;
            Some((&step.id, artifact, port.name))
        };
        self.steps.iter().filter_map(output).collect()
    }

    /// The inputs with images that may be those of a step: its own and those of the steps that it reads from, the nearest first; then those
    /// of all other steps.
    pub(super) fn image_inputs(&self, step: &StepId) -> Vec<ImageInput> {
        let upstream = self.upstream(step);
        let others = self.steps.iter().map(|step| &step.id).filter(|id| !upstream.contains(id));
        let of_step = |(id, is_upstream): (&StepId, bool)| {
            let kind = self.steps.iter().find(|step| step.id == *id).map_or("", |step| &step.kind);
            let ports = find(kind).into_iter().flat_map(|entry| entry.inputs).filter(|port| port.kind == Images::KIND);
            let ports = ports.filter(|port| self.origin(id, port.name).is_some());
            ports.map(|port| ImageInput { step: id.clone(), port: port.name, is_upstream }).collect::<Vec<_>>()
        };
        upstream.iter().map(|id| (id, true)).chain(others.map(|id| (id, false))).flat_map(of_step).collect()
    }
}
