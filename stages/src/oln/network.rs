//! The file of an object localisation network, and how the network is built and used.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{checkpoint::Checkpoint, rcnn::oln::Config};
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Result,
    artifacts::read_weights,
    detector::spec::{spec_metadata, spec_of},
    ports::last_file,
};

/// The metadata key of a network's file under which its [`OlnSpec`] is.
const SPEC_KEY: &str = "ovenbird.oln";

/// How a network is built and used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OlnSpec {
    pub(crate) config: Config,
    /// Maximum lengths of the longer and the shorter side of images, in px.
    pub(crate) fits: [u32; 2],
}

impl OlnSpec {
    /// The metadata of a network's file.
    pub(crate) fn metadata(&self) -> BTreeMap<String, String> {
        spec_metadata(self, SPEC_KEY)
    }
}

/// A trained object localisation network; of several checkpoints of a training, the last.
pub struct OlnFile {
    pub(crate) file: InputFile,
}

impl Artifact for OlnFile {
    const KIND: &'static str = "oln";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "a network that `oln/train` made";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

impl OlnFile {
    /// The weights, and how the network is built.
    pub(crate) fn read(&self) -> Result<(Checkpoint, OlnSpec)> {
        let checkpoint = read_weights(&self.file)?;
        let spec = spec_of(&checkpoint, SPEC_KEY, &self.file.path)?;
        Ok((checkpoint, spec))
    }
}
