//! The parts that a CLIP is assembled from, as traits: each family of networks implements them in a file of its own.
//!
//! A family needs a [`Network`] (its sizes, read off tensors), an [`ImageTower`], a [`TextTower`], a [`Tokenizer`], and one row of
//! `layout::LAYOUTS`, by which its checkpoints are recognised.

use std::{fmt, sync::Arc};

use tch::{Kind, Tensor};

use super::{resnet::ModifiedResNet, settings::Settings, text::Text, tokenizer::Tokenizer, vision::Vit};
use crate::{Error, Phase, Result, parameters::Parameters};

/// How images become the input of an image tower.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preprocessing {
    /// The side of the square images, px.
    pub image_side: i64,
    /// How images become square.
    pub resize: ResizeMode,
    /// The mean of each colour channel, RGB in [0, 1]; subtracted.
    pub mean: [f32; 3],
    /// The standard deviation of each colour channel; divided by.
    pub std: [f32; 3],
}

impl Preprocessing {
    /// OpenAI's: short side to `image_side` px, centre crop, their mean and standard deviation.
    pub const fn openai(image_side: i64) -> Self {
        Self {
            image_side,
            resize: ResizeMode::Shortest,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

/// How images become square; always antialiased bicubic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResizeMode {
    /// The short side is resized and the centre is cropped.
    Shortest,
    /// Both sides are resized; the aspect ratio is lost.
    Squash,
}

/// Embeds images.
pub(crate) trait ImageTower: fmt::Debug + Send {
    /// The least width and height of an image, px.
    fn least_side(&self) -> i64;

    /// Returns `[B, D]`; `images`: `[B, 3, H, W]` in the compute kind.
    fn forward(&self, images: &Tensor, phase: Phase) -> Tensor;

    /// The vision transformer with a class token, for OADP's object tokens; `None` in towers of another kind.
    fn objects(&self) -> Option<&Vit> {
        None
    }

    /// The modified ResNet, for features of regions; `None` in towers of another kind.
    fn resnet(&self) -> Option<&ModifiedResNet> {
        None
    }

    /// Changes the compute kind.
    fn cast(&mut self, kind: Kind);
}

/// Embeds texts.
pub(crate) trait TextTower: fmt::Debug + Send {
    /// Returns `[B, D]`, not normalised; `tokens`: i64 `[B, L]`. Fails for tokens that the tower does not know.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor>;

    /// CLIP's causal text tower, for learned contexts; `None` in towers of another kind.
    fn causal(&self) -> Option<&Text> {
        None
    }

    /// Changes the compute kind.
    fn cast(&mut self, kind: Kind);
}

/// Both towers, declared.
#[derive(Debug)]
pub(crate) struct Towers {
    pub(crate) image: Box<dyn ImageTower>,
    pub(crate) text: Box<dyn TextTower>,
}

/// The sizes of a network with two towers, from which it is declared.
pub(crate) trait Network: fmt::Debug + Send + Sync {
    /// Checks that the sizes agree with each other.
    fn check(&self) -> Result<()>;

    fn declare(&self, root: &Parameters<'_>) -> Towers;

    /// The dimension D of the common space.
    fn embed_dim(&self) -> i64;

    /// How images are preprocessed if no config file says otherwise.
    fn preprocessing(&self) -> Preprocessing;

    fn tokenizer(&self) -> Tokenizer;

    /// The image tower and the text tower, a line each.
    fn describe(&self) -> [String; 2];
}

/// A network whose sizes are known, without weights.
#[derive(Clone, Debug)]
pub struct Architecture {
    pub(super) network: Arc<dyn Network>,
    preprocessing: Preprocessing,
}

impl Architecture {
    pub(crate) fn new(network: impl Network + 'static, settings: &Settings) -> Self {
        let preprocessing = settings.apply(network.preprocessing());
        Self { network: Arc::new(network), preprocessing }
    }

    pub(super) fn check(&self) -> Result<()> {
        let Preprocessing { image_side, std, .. } = self.preprocessing;
        if image_side < 1 || std.iter().any(|std| *std <= 0.0) {
            let expected = "an image side of at least 1 px and positive standard deviations".into();
            return Err(Error::Input { what: "preprocessing", expected, found: format!("{image_side} px, {std:?}") });
        }
        self.network.check()
    }

    /// The dimension D of the common space.
    pub fn embed_dim(&self) -> i64 {
        self.network.embed_dim()
    }

    /// How images are preprocessed.
    pub fn preprocessing(&self) -> Preprocessing {
        self.preprocessing
    }

    /// The image tower and the text tower, a line each.
    pub fn describe(&self) -> [String; 2] {
        self.network.describe()
    }
}

impl From<&Self> for Architecture {
    fn from(architecture: &Self) -> Self {
        architecture.clone()
    }
}
