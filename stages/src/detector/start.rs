//! Where a detector's training begins that goes on from another one: a checkpoint of that training after some epochs, with the optimizer's state.

use ovenbird_cache::inputs::InputFile;

use super::{
    ports::PRETRAINED,
    spec::{Checkpoints, DetectorFile, DetectorSpec},
};
use crate::{
    Artifact, Context, Error, In, Inputs, Result,
    artifacts::TrainingState,
    clip::space,
    training::{Start, named},
};

pub(super) const START: In<Checkpoints> =
    In::optional("start", "The checkpoints of a training (`detector/train`) that this one goes on from, after `start_epoch` epochs.");
pub(super) const START_STATE: In<States> =
    In::optional("start_state", "The optimizer's states of these checkpoints: `state` of the same step.");

/// How many checkpoints an error lists.
const MAX_LISTED: usize = 20;

/// The optimizer's states of every checkpoint of a training, in the order of their steps.
pub(super) struct States(Vec<InputFile>);

impl Artifact for States {
    const KIND: &'static str = TrainingState::KIND;
    const EXTENSIONS: &'static [&'static str] = TrainingState::EXTENSIONS;
    const SHAPE: &'static str = TrainingState::SHAPE;

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self(files.to_vec()))
    }
}

/// Fails where only some are given of the inputs and the parameter that have a meaning together.
pub(super) fn check(start_epoch: Option<u32>, inputs: &Inputs) -> Result<()> {
    let both = inputs.read_both(START, START_STATE)?;
    let (port, problem, hint) = match (both, start_epoch) {
        (Some(_), Some(_)) if inputs.ports.contains_key(PRETRAINED.info().name) => {
            (PRETRAINED.info().name, "given, but the training begins with the weights of `start`", "leave `pretrained` out")
        }
        (Some(_), Some(_)) | (None, None) => return Ok(()),
        (Some(_), None) => ("start_epoch", "missing, but `start` is given", "say after how many epochs to start: `with: {start_epoch: 6}`"),
        (None, Some(_)) => (
            START.info().name,
            "missing, but `start_epoch` is set",
            "give `detector` and `state` of a training as `start` and `start_state`",
        ),
    };
    Err(Error::Input { port, problem: problem.into(), hint: hint.into() })
}

/// The checkpoint from which the training of a detector goes on: that after `first_step` steps, which the `start_epoch` first epochs are; in a dry run the
/// last one. None where there is no other training.
pub(super) fn find(spec: &DetectorSpec, start_epoch: Option<u32>, first_step: u32, cx: &Context<'_>) -> Result<Option<Start>> {
    let (Some(epoch), Some((Checkpoints(all), States(states)))) = (start_epoch, cx.inputs.read_both(START, START_STATE)?) else {
        return Ok(None);
    };
    let refused = |port: &'static str, problem: String, hint: &str| Err(Error::Input { port, problem, hint: hint.into() });
    let is_pair = |(detector, state): (&DetectorFile, &InputFile)| {
        detector.file.unit.is_none() || state.unit.is_none() || detector.file.unit == state.unit
    };
    if all.len() != states.len() || !all.iter().zip(&states).all(is_pair) {
        let problem = format!("expected a state for each of {} checkpoints at `start`, found {} of others", all.len(), states.len());
        return refused(START_STATE.info().name, problem, "give `detector` and `state` of one step");
    }
    let mut steps = Vec::new();
    for (detector, state) in all.iter().zip(&states).rev() {
        let (checkpoint, found) = detector.read()?;
        let step = detector.step_of(&checkpoint)?;
        if step != u64::from(first_step) && cx.most_items.is_none() {
            steps.push(step.to_string());
            continue;
        }
        if !spec.has_weights_of(&found) {
            let problem = format!("expected a detector of the same `network`, `head` and inputs, found another, one {}", found.in_words());
            return refused(START.info().name, problem, "set these as in the step that trained it");
        }
        space::common(&[(START.info().name, found.clip()), ("prompts", spec.clip())])?;
        cx.note(format!("goes on from {}, after {step} steps", detector.file.path.display()));
        return Ok(Some(Start { weights: detector.file.clone(), state: state.clone() }));
    }
    steps.reverse();
    let problem = format!(
        "no checkpoint after {epoch} epochs, which are {first_step} steps of these images and batches; there are some after {} steps",
        named(&steps, MAX_LISTED)
    );
    let hint = "train with `checkpoint_epochs: 1` and as many `keep_checkpoints` as `epochs`, and with the same annotations, `batch_size` and `repeat_threshold` as here";
    refused(START.info().name, problem, hint)
}
