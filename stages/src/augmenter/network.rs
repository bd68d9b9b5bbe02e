//! The file of an augmenter, and how the network is built.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{
    augmenter::{Augmenter, Config},
    rcnn::layout,
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
const SPEC_KEY: &str = "ovenbird.augmenter";

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
    const SHAPE: &'static str = "an augmenter that `augmenter/train` made";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

/// A network with the owner of its weights.
pub(super) struct Loaded {
    pub(super) augmenter: Augmenter,
    pub(super) spec: AugmenterSpec,
    _store: nn::VarStore,
}

impl AugmenterFile {
    /// Loads the network.
    pub(super) fn load(&self, device: Device) -> Result<Loaded> {
        let (checkpoint, path) = (read_weights(&self.file)?, &self.file.path);
        let spec: AugmenterSpec = spec_of(&checkpoint, SPEC_KEY, path)?;
        let store = nn::VarStore::new(device);
        let augmenter = Augmenter::blank(&store.root(), &spec.config)?;
        layout::load(checkpoint.tensors(), augmenter.parameters(), path)?.require_all(path)?;
        Ok(Loaded { augmenter, spec, _store: store })
    }
}
