//! The file of an augmenter, and how the network is built.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{
    augmenter::{Augmenter, Config},
    checkpoint::Checkpoint,
    rcnn::layout::{self, LoadReport},
};
use serde::{Deserialize, Serialize};
use tch::{Device, nn};

use crate::{
    Artifact, Result,
    artifacts::read_weights,
    clip::space::Space,
    detector::spec::{spec_metadata, spec_of},
    ports::last_file,
};

/// The metadata key of a network's file under which its [`AugmenterSpec`] is.
pub(super) const SPEC_KEY: &str = "ovenbird.augmenter";

/// How a network is built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AugmenterSpec {
    pub(crate) config: Config,
    /// The CLIP whose embeddings it augments, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) clip: Option<Space>,
}

impl AugmenterSpec {
    /// The metadata of a network's file.
    pub(crate) fn metadata(&self) -> BTreeMap<String, String> {
        spec_metadata(self, SPEC_KEY)
    }
}

/// A trained augmenter; of several checkpoints of a training, the last.
pub(crate) struct AugmenterFile {
    file: InputFile,
}

impl Artifact for AugmenterFile {
    const KIND: &'static str = "augmenter";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str =
        "an augmenter that `augmenter/train` or `augmenter/import` made; RALF's `lvis_strict.pth` comes in by `augmenter/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

/// A network with the owner of its weights.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) augmenter: Augmenter,
    pub(super) spec: AugmenterSpec,
    _store: nn::VarStore,
}

impl AugmenterFile {
    /// Loads the network.
    pub(super) fn load(&self, device: Device) -> Result<Loaded> {
        let checkpoint = read_weights(&self.file)?;
        let spec = spec_of(&checkpoint, SPEC_KEY, &self.file.path)?;
        Ok(Loaded::of(spec, &checkpoint, device)?.0)
    }
}

impl Loaded {
    /// Builds a network with the weights of a checkpoint: every tensor must be there and fit, and there must be no other.
    pub(super) fn of(spec: AugmenterSpec, checkpoint: &Checkpoint, device: Device) -> Result<(Self, LoadReport)> {
        let store = nn::VarStore::new(device);
        let augmenter = Augmenter::blank(&store.root(), &spec.config)?;
        let report = layout::load(checkpoint.tensors(), augmenter.parameters(), checkpoint.path())?.require_all(checkpoint.path())?;
        Ok((Self { augmenter, spec, _store: store }, report))
    }
}
