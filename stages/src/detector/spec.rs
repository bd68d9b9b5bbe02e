//! The file of a detector, and how its network is built and used.

use std::{collections::BTreeMap, path::Path};

use ovenbird_cache::inputs::InputFile;
use ovenbird_models::{
    checkpoint::Checkpoint,
    rcnn::{
        Config, Detector,
        classifier::LogitScale,
        cosine::{self, CosineDetector},
        layout,
        sigmoid::{self, SigmoidDetector},
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tch::{Device, nn};

use crate::{
    Artifact, Error, Result, artifacts::read_weights, clip::Space, error::malformed, localizer::spec::LocalizerSpec, ports::last_file,
    training::STEP_KEY,
};

/// The metadata key of a detector's file under which its [`DetectorSpec`] is.
const SPEC_KEY: &str = "ovenbird.detector";

/// How a detector is built and used: one variant for each kind of detector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DetectorSpec {
    /// A two-stage detector that compares regions with class embeddings.
    MaskRcnn(MaskRcnnSpec),
    /// A two-stage detector with a linear classifier.
    Sigmoid(SigmoidSpec),
    /// A two-stage detector whose scores are sigmoids of scaled cosines to class embeddings.
    Cosine(CosineSpec),
    /// CORA's localizer.
    Localizer(LocalizerSpec),
}

/// How a two-stage detector is built and used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MaskRcnnSpec {
    pub(super) config: Config,
    /// Maximum lengths of the longer and the shorter side of images, in px.
    pub(super) fits: [u32; 2],
    /// Whether classes are compared by embeddings of their names.
    pub(super) has_prompts: bool,
    /// Whether the heads that learned CLIP's embeddings have other class embeddings than the box head.
    pub(super) has_multilabel_prompts: bool,
    /// How cosines become logits, where the class embeddings bring no scale.
    pub(super) scale: LogitScale,
    /// The CLIP whose embeddings it learned, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clip: Option<Space>,
}

/// How a two-stage detector with a linear classifier is built and used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SigmoidSpec {
    pub(super) config: sigmoid::Config,
    /// Maximum lengths of the longer and the shorter side of images, in px.
    pub(super) fits: [u32; 2],
    /// The classes of the classifier's rows.
    pub(super) base: Vec<String>,
    /// The classes of the rows that were probed.
    pub(super) novel: Vec<String>,
    /// The CLIP whose embeddings it learned, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clip: Option<Space>,
}

/// How a two-stage detector of scaled cosines is built and used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CosineSpec {
    pub(super) config: cosine::Config,
    /// Maximum lengths of the longer and the shorter side of images, in px.
    pub(super) fits: [u32; 2],
    /// The CLIP whose embeddings of classes it learned, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clip: Option<Space>,
}

/// A trained detector; of several checkpoints of a training, the last.
pub struct DetectorFile {
    pub(super) file: InputFile,
}

impl Artifact for DetectorFile {
    const KIND: &'static str = "detector";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "a detector that `detector/train`, `localizer/train` or an import made; one of another program comes in by `detector/import` or `localizer/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

impl DetectorFile {
    /// The weights, and how the network is built.
    pub(crate) fn read(&self) -> Result<(Checkpoint, DetectorSpec)> {
        let checkpoint = read_weights(&self.file)?;
        let spec = spec_of(&checkpoint, SPEC_KEY, &self.file.path)?;
        Ok((checkpoint, spec))
    }

    /// The weights, and how a detector with a linear classifier is built. Any other is refused, as the input at `port`.
    pub(super) fn read_sigmoid(&self, port: &'static str) -> Result<(Checkpoint, SigmoidSpec)> {
        let (checkpoint, spec) = self.read()?;
        let DetectorSpec::Sigmoid(spec) = spec else {
            let problem = format!("expected a detector with a linear classifier, found one {}", spec.in_words());
            let hint = "train one with `detector/train` and `head: sigmoid`".into();
            return Err(Error::Input { port, problem, hint });
        };
        Ok((checkpoint, spec))
    }

    /// The weights, and how a detector whose box head compares regions with class embeddings and background is built. Any other is refused, as the input at `port`.
    pub(super) fn read_mask_rcnn(&self, port: &'static str) -> Result<(Checkpoint, MaskRcnnSpec)> {
        let (checkpoint, spec) = self.read()?;
        let DetectorSpec::MaskRcnn(spec) = spec else {
            let found = spec.in_words();
            let problem = format!("expected a detector that compares regions with class embeddings and background, found one {found}");
            return Err(Error::Input { port, problem, hint: "train one with `detector/train` and `head: embeddings`, the default".into() });
        };
        Ok((checkpoint, spec))
    }

    /// The weights, and how a localizer is built. Any other detector is refused, as the input at `port`; `hint`: what to do with it.
    pub(crate) fn read_localizer(&self, port: &'static str, hint: &str) -> Result<(Checkpoint, LocalizerSpec)> {
        let (checkpoint, spec) = self.read()?;
        let DetectorSpec::Localizer(spec) = spec else {
            let problem = format!("expected a localizer, found a detector {}", spec.in_words());
            return Err(Error::Input { port, problem, hint: hint.into() });
        };
        Ok((checkpoint, spec))
    }

    /// After how many steps of training it was written.
    pub(super) fn step(&self) -> Result<u64> {
        self.step_of(&read_weights(&self.file)?)
    }

    /// The same, of its weights.
    pub(super) fn step_of(&self, checkpoint: &Checkpoint) -> Result<u64> {
        let step = checkpoint.metadata().get(STEP_KEY).and_then(|step| step.parse().ok());
        step.ok_or_else(|| malformed(&self.file.path, format!("expected a number of steps under `{STEP_KEY}` in the metadata")))
    }
}

/// Every checkpoint of a training, in the order of their steps.
pub struct Checkpoints(pub(super) Vec<DetectorFile>);

impl Artifact for Checkpoints {
    const KIND: &'static str = DetectorFile::KIND;
    const EXTENSIONS: &'static [&'static str] = DetectorFile::EXTENSIONS;
    const SHAPE: &'static str = DetectorFile::SHAPE;

    fn open(files: &[InputFile]) -> Result<Self> {
        files.chunks(1).map(DetectorFile::open).collect::<Result<_>>().map(Self)
    }
}

impl MaskRcnnSpec {
    /// The network with the weights of a file, and their owner.
    pub(super) fn network(&self, checkpoint: &Checkpoint, device: Device) -> Result<(Detector, nn::VarStore)> {
        Ok(layout::filled(checkpoint, device, |root| Detector::blank(root, &self.config), Detector::parameters)?)
    }
}

impl SigmoidSpec {
    /// The network with the weights of a file, and their owner.
    pub(super) fn network(&self, checkpoint: &Checkpoint, device: Device) -> Result<(SigmoidDetector, nn::VarStore)> {
        Ok(layout::filled(checkpoint, device, |root| SigmoidDetector::blank(root, &self.config), SigmoidDetector::parameters)?)
    }
}

impl CosineSpec {
    /// The network with the weights of a file, and their owner.
    pub(super) fn network(&self, checkpoint: &Checkpoint, device: Device) -> Result<(CosineDetector, nn::VarStore)> {
        Ok(layout::filled(checkpoint, device, |root| CosineDetector::blank(root, &self.config), CosineDetector::parameters)?)
    }
}

impl DetectorSpec {
    /// The detector's kind, worded to follow "one".
    pub(crate) fn in_words(&self) -> &'static str {
        match self {
            Self::MaskRcnn(_) => "that compares with class embeddings and background (`head: embeddings`)",
            Self::Sigmoid(_) => "with a linear classifier (`head: sigmoid`)",
            Self::Cosine(_) => "of scaled cosines to class embeddings (`head: cosine`)",
            Self::Localizer(_) => "that is CORA's localizer (`localizer/train`)",
        }
    }

    /// The CLIP whose embeddings it learned, where that is known.
    pub(super) fn clip(&self) -> Option<Space> {
        match self {
            Self::MaskRcnn(spec) => spec.clip,
            Self::Sigmoid(spec) => spec.clip,
            Self::Cosine(spec) => spec.clip,
            Self::Localizer(spec) => spec.clip,
        }
    }

    /// Whether a training of one of both networks can go on with the other's weights.
    pub(super) fn has_weights_of(&self, other: &Self) -> bool {
        let mut other = other.clone();
        match (self, &mut other) {
            (Self::MaskRcnn(one), Self::MaskRcnn(other)) => (other.fits, other.clip) = (one.fits, one.clip),
            (Self::Sigmoid(one), Self::Sigmoid(other)) => (other.fits, other.clip) = (one.fits, one.clip),
            (Self::Cosine(one), Self::Cosine(other)) => (other.fits, other.clip) = (one.fits, one.clip),
            _ => return false,
        }
        *self == other
    }

    /// How the detector of a file is built, if the file says so.
    pub(crate) fn written(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        checkpoint.metadata().contains_key(SPEC_KEY).then(|| spec_of(checkpoint, SPEC_KEY, checkpoint.path())).transpose()
    }

    /// The metadata of a detector's file.
    pub(crate) fn metadata(&self) -> BTreeMap<String, String> {
        spec_metadata(self, SPEC_KEY)
    }
}

/// The metadata of a network's file: its specification as json under a key.
pub(crate) fn spec_metadata<T: Serialize>(spec: &T, key: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), serde_json::to_string(spec).expect("BUG: a specification is plain JSON"))])
}

/// How a network is built, as its file says under a key of the metadata.
pub(crate) fn spec_of<T: DeserializeOwned>(checkpoint: &Checkpoint, key: &str, path: &Path) -> Result<T> {
    let expected = format!("expected the network's configuration under `{key}` in the metadata");
    let text = checkpoint.metadata().get(key).ok_or_else(|| malformed(path, format!("{expected}, found none")))?;
    serde_json::from_str(text).map_err(|error| malformed(path, format!("{expected}: {error}")))
}

/// Size of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// OADP's: a ResNet-50, a feature pyramid of 256 channels with batch normalisation, heads of four convolutions; 512 regions
    /// of each image are sampled for the heads. With `head: cosine` PromptDet's.
    #[default]
    R50,
    /// A ResNet-18 of a quarter of the width, 64 channels, heads of one convolution, 128 regions, for images of 128 to 320 px: trains from
    /// scratch in minutes on two cores.
    Toy,
}

/// Which heads a detector has besides the box head.
#[derive(Clone, Copy)]
pub(super) struct ExtraHeads {
    pub(super) object: bool,
    pub(super) block: bool,
    pub(super) global: bool,
    pub(super) mask: bool,
}

impl Network {
    /// A detector of this size for class embeddings of `embed_dim` numbers.
    pub(super) fn config(self, embed_dim: i64, heads: ExtraHeads) -> Config {
        let all = match self {
            Self::R50 => Config::oadp(embed_dim),
            Self::Toy => Config::toy(embed_dim),
        };
        let config = Config {
            object_head: all.object_head.filter(|_| heads.object),
            block_head: all.block_head.filter(|_| heads.block),
            has_global_head: heads.global,
            ..all
        };
        if heads.mask { config.with_masks() } else { config }
    }

    /// A detector of this size with a linear classifier of so many base classes; `embed_dim`: of the embeddings that it learns, if any.
    pub(super) fn sigmoid_config(self, n_base: usize, embed_dim: Option<usize>) -> sigmoid::Config {
        let (n_base, embed_dim) = (n_base as i64, embed_dim.map(|dim| dim as i64));
        match self {
            Self::R50 => sigmoid::Config::r50(n_base, embed_dim),
            Self::Toy => sigmoid::Config::toy(n_base, embed_dim),
        }
    }

    /// A detector of scaled cosines of this size for class embeddings of `embed_dim` numbers.
    pub(super) fn cosine_config(self, embed_dim: i64, has_masks: bool) -> cosine::Config {
        let config = match self {
            Self::R50 => cosine::Config::r50(embed_dim),
            Self::Toy => cosine::Config::toy(embed_dim),
        };
        if has_masks { config.with_masks() } else { config }
    }

    /// How many regions of an image are sampled for the heads.
    pub(super) fn regions_per_image(self) -> usize {
        match self {
            Self::R50 => 512,
            Self::Toy => 128,
        }
    }
}
