//! CLIP: an image tower and a text tower that meet in one space, with the preprocessing and the tokenizer that belong to them.
//!
//! The networks are those of OpenAI's release, with its parameter names; [`layout`] translates the names of open_clip and Hugging Face.
//! A CLIP brings its own preprocessing, tokenizer and image side, and [`settings`] reads what the published config files say of them. Other
//! networks with two towers implement the traits of [`architecture`].
//!
//! Towers that compute in bf16 or f16 hold their matrices in that kind. LayerNorm, batch normalisation, class, position and token tables
//! stay in f32; LayerNorm is computed in f32 and cast back.
//!
//! Differences from the reference implementations: images of another size than the checkpoint's are accepted, with the position table
//! resized bilinearly (see [`vision`]); texts may be padded to the longest of their batch instead of to the context.

pub mod architecture;
mod cleaning;
pub mod layout;
pub mod prompted;
pub mod regions;
pub mod resnet;
pub mod settings;
#[cfg(test)]
mod siglip;
pub mod text;
pub mod tokenizer;
pub(crate) mod transformer;
pub mod vision;

#[cfg(test)]
pub(crate) mod tests;

use std::{cell::RefCell, collections::BTreeMap, fmt, path::Path, sync::OnceLock};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use self::{
    architecture::{Architecture, Network, Preprocessing, Towers},
    resnet::{ModifiedResNet, REDUCTION},
    settings::Settings,
    text::Text,
    tokenizer::Tokenizer,
    transformer::{LAYER_NORM_EPS, Shape},
    vision::Vit,
};
use crate::{
    Error, Phase, Result,
    parameters::{Fill, Init, Parameters},
};

/// The sizes of a CLIP, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The dimension D of the common space.
    pub embed_dim: i64,
    /// The image tower.
    pub image: ImageConfig,
    /// The text tower.
    pub text: TextConfig,
    /// The non-linearity of every transformer block, in both towers.
    pub activation: Activation,
}

/// The sizes of an image tower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageConfig {
    /// A vision transformer.
    Vit {
        /// The side of the square images of pretraining, px.
        image_side: i64,
        /// The side of a square patch, px.
        patch: i64,
        /// The channels C of a token.
        width: i64,
        /// The number of blocks.
        depth: usize,
        /// The number of attention heads.
        heads: i64,
        /// The hidden channels of the perceptron of a block.
        mlp_width: i64,
    },
    /// OpenAI's modified ResNet.
    ResNet {
        /// The side of the square images of pretraining, px.
        image_side: i64,
        /// The number of bottlenecks of each of the four levels.
        layers: [usize; 4],
        /// The channels that leave the stem; the last feature map has 32 times as many.
        width: i64,
        /// The number of heads of the attention pooling.
        heads: i64,
    },
}

/// The sizes of a text tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextConfig {
    /// The longest row of tokens.
    pub context: i64,
    /// The number of different tokens.
    pub vocabulary: i64,
    /// The channels C of a token.
    pub width: i64,
    /// The number of attention heads.
    pub heads: i64,
    /// The number of blocks.
    pub depth: usize,
}

impl Network for Config {
    fn check(&self) -> Result<()> {
        let text = &self.text;
        let mut sizes = vec![("embed_dim", self.embed_dim), ("context", text.context), ("vocabulary", text.vocabulary)];
        let mut splits = vec![("text", text.width, text.heads)];
        match self.image {
            ImageConfig::Vit { image_side, patch, width, heads, mlp_width, .. } => {
                sizes.extend([("patch", patch), ("image_side in patches", image_side / patch.max(1)), ("mlp_width", mlp_width)]);
                splits.push(("image", width, heads));
            }
            ImageConfig::ResNet { image_side, width, heads, .. } => {
                sizes.extend([("image_side in cells of 32 px", image_side / REDUCTION), ("width of the stem", width / 2)]);
                splits.push(("attention pooling", REDUCTION * width, heads));
            }
        }
        if let Some((what, found)) = sizes.into_iter().find(|&(_, size)| size < 1) {
            return Err(Error::Input { what, expected: "at least 1".into(), found: found.to_string() });
        }
        match splits.into_iter().find(|&(_, width, heads)| width < 1 || heads < 1 || width % heads != 0) {
            Some((what, width, heads)) => {
                Err(Error::Input { what, expected: "a width that its heads divide".into(), found: format!("width {width}, {heads} heads") })
            }
            None => Ok(()),
        }
    }

    fn declare(&self, root: &Parameters<'_>) -> Towers {
        let Self { embed_dim, activation, .. } = *self;
        let visual = &(root / "visual");
        let image: Box<dyn architecture::ImageTower> = match self.image {
            ImageConfig::Vit { image_side, patch, width, depth, heads, mlp_width } => {
                let shape = Shape { width, heads, depth, mlp_width, eps: LAYER_NORM_EPS };
                Box::new(Vit::declare(visual, image_side, patch, &shape, embed_dim, activation))
            }
            ImageConfig::ResNet { image_side, ref layers, width, heads } => {
                Box::new(ModifiedResNet::declare(visual, image_side, layers, width, heads, embed_dim))
            }
        };
        Towers { image, text: Box::new(Text::declare(root, &self.text, embed_dim, activation)) }
    }

    fn embed_dim(&self) -> i64 {
        self.embed_dim
    }

    fn preprocessing(&self) -> Preprocessing {
        let (ImageConfig::Vit { image_side, .. } | ImageConfig::ResNet { image_side, .. }) = self.image;
        Preprocessing::openai(image_side)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::clip().with_context(usize::try_from(self.text.context).unwrap_or(0))
    }

    fn describe(&self) -> [String; 2] {
        let image = match &self.image {
            ImageConfig::Vit { image_side, patch, width, depth, heads, .. } => {
                let name = match (width, depth) {
                    (768, 12) => "ViT-B",
                    (1024, 24) => "ViT-L",
                    (1280, 32) => "ViT-H",
                    _ => "ViT",
                };
                format!("{name}/{patch} at {image_side} px: {depth} blocks of width {width}, {heads} heads")
            }
            ImageConfig::ResNet { image_side, layers, width, heads } => {
                let name = match (layers, width) {
                    ([3, 4, 6, 3], 64) => "RN50",
                    ([3, 4, 23, 3], 64) => "RN101",
                    ([4, 6, 10, 6], 80) => "RN50x4",
                    ([6, 8, 18, 8], 96) => "RN50x16",
                    _ => "ModifiedResNet",
                };
                format!("{name} at {image_side} px: {layers:?} bottlenecks of width {width}, {heads} heads in the pooling")
            }
        };
        let TextConfig { context, width, heads, depth, .. } = self.text;
        [image, format!("{depth} blocks of width {width}, {heads} heads, context {context}")]
    }
}

impl From<&Config> for Architecture {
    fn from(config: &Config) -> Self {
        Self::new(config.clone(), &Settings::default())
    }
}

/// The slope of OpenAI's approximation of the Gaussian error unit.
const QUICK_GELU_SLOPE: f64 = 1.702;

/// The activation of the transformer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Activation {
    /// x * sigmoid(1.702 x): weights of OpenAI, DFN and MetaCLIP.
    #[serde(rename = "quick")]
    QuickGelu,
    /// The exact Gaussian error unit: most weights of open_clip.
    #[serde(rename = "exact")]
    Gelu,
    /// The approximation of the Gaussian error unit by tanh: SigLIP.
    #[serde(rename = "tanh")]
    TanhGelu,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QuickGelu => "QuickGELU",
            Self::Gelu => "exact GELU",
            Self::TanhGelu => "tanh GELU",
        })
    }
}

impl Activation {
    /// Its name in parameters and metadata: `quick`, `exact` or `tanh`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QuickGelu => "quick",
            Self::Gelu => "exact",
            Self::TanhGelu => "tanh",
        }
    }

    /// The activation of a [`Self::name`].
    pub fn named(name: &str) -> Option<Self> {
        [Self::QuickGelu, Self::Gelu, Self::TanhGelu].into_iter().find(|activation| activation.name() == name)
    }

    /// Consumes `x`, so that its memory is used again: these are the largest tensors of a block.
    fn apply(self, mut x: Tensor) -> Tensor {
        match self {
            // silu(x) = x sigmoid(x), in one pass; four times faster than the formula on a CPU in bf16.
            Self::QuickGelu => x.g_mul_scalar_(QUICK_GELU_SLOPE).silu_().g_div_scalar_(QUICK_GELU_SLOPE),
            Self::Gelu => x.gelu("none"),
            Self::TanhGelu => x.gelu("tanh"),
        }
    }
}

/// The name of the logit scale's logarithm.
const LOGIT_SCALE: &str = "logit_scale";

/// A CLIP.
#[derive(Debug)]
pub struct Clip {
    towers: Towers,
    architecture: Architecture,
    /// Made when it is first used.
    tokenizer: OnceLock<Tokenizer>,
    /// The natural logarithm of the logit scale, f32 scalar; a trained parameter. `None` where a checkpoint of a frozen CLIP lacks it.
    pub log_logit_scale: Option<Tensor>,
    kind: Kind,
    device: Device,
}

impl Clip {
    /// Declares a CLIP under `path`, trainable, in f32, with the first values that OpenAI and open_clip give.
    ///
    /// The values depend on `seed` and the parameters' names alone; libtorch's global generator is not touched.
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        Ok(Self::declare(path, config.into(), Fill::Seed(seed))?.0)
    }

    /// Declares a CLIP under `path`, trainable, in f32, with the values of a checkpoint in any of the known layouts.
    ///
    /// Fails with every tensor that is missing, unexpected or of another shape than `config` says.
    pub fn trainable_from(path: &nn::Path<'_>, config: &Config, tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<Self> {
        let (clip, declared) = Self::declare(path, config.into(), Fill::Blank)?;
        layout::copy(&layout::normalise(tensors, origin)?.tensors, &declared, None, origin)?;
        Ok(clip)
    }

    /// Builds a frozen CLIP from a checkpoint in any of the known layouts; its sizes follow from the tensors (see
    /// [`layout::architecture`]), its activation and its preprocessing from `settings`.
    ///
    /// `origin` names the file in messages. `kind` is what the towers compute in: `Float`, `BFloat16` or `Half`.
    pub fn load(
        tensors: &BTreeMap<String, Tensor>,
        origin: &Path,
        settings: impl Into<Settings>,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        let architecture = layout::architecture(tensors, origin, &settings.into())?;
        Self::load_as(architecture, tensors, origin, device, kind)
    }

    /// Builds a frozen CLIP from a checkpoint whose sizes are known; for heads that are not 64 channels wide, which do not follow from tensors.
    pub fn load_as(
        architecture: impl Into<Architecture>,
        tensors: &BTreeMap<String, Tensor>,
        origin: &Path,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        if !matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half) {
            return Err(Error::Input { what: "kind", expected: "Float, BFloat16 or Half".into(), found: format!("{kind:?}") });
        }
        let mut store = nn::VarStore::new(device);
        let tensors = layout::normalise(tensors, origin)?.tensors;
        let (mut clip, declared) = Self::declare(&store.root(), architecture.into(), Fill::Blank)?;
        layout::copy(&tensors, &declared, Some(LOGIT_SCALE), origin)?;
        if !tensors.contains_key(LOGIT_SCALE) {
            clip.log_logit_scale = None;
        }
        store.freeze();
        clip.cast(kind);
        Ok(clip)
    }

    fn declare(path: &nn::Path<'_>, architecture: Architecture, fill: Fill) -> Result<(Self, BTreeMap<String, Tensor>)> {
        architecture.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let towers = architecture.network.declare(root);
        // CLIP, section 2.5: a temperature of 0.07.
        let log_logit_scale = Some(root.trainable(LOGIT_SCALE, &[], Init::Constant((1.0_f64 / 0.07).ln())));
        let clip = Self { towers, architecture, tokenizer: OnceLock::new(), log_logit_scale, kind: Kind::Float, device: path.device() };
        let Preprocessing { image_side, .. } = clip.preprocessing();
        if image_side < clip.least_side() {
            let expected = format!("at least {}, the least side that the tower takes", clip.least_side());
            return Err(Error::Input { what: "image side", expected, found: image_side.to_string() });
        }
        Ok((clip, declared.into_inner()))
    }

    fn cast(&mut self, kind: Kind) {
        self.towers.image.cast(kind);
        self.towers.text.cast(kind);
        self.kind = kind;
    }

    /// The dimension D of the common space.
    pub fn embed_dim(&self) -> i64 {
        self.architecture.embed_dim()
    }

    /// How images are preprocessed.
    pub fn preprocessing(&self) -> Preprocessing {
        self.architecture.preprocessing()
    }

    /// The side of the square images, px.
    pub fn image_side(&self) -> i64 {
        self.preprocessing().image_side
    }

    /// The least width and height of an image that [`Self::encode_image`] takes, px.
    pub fn least_side(&self) -> i64 {
        self.towers.image.least_side()
    }

    /// The tokenizer of the text tower; the first call makes it, which may take a tenth of a second.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer.get_or_init(|| self.architecture.network.tokenizer())
    }

    /// The causal text tower, for texts behind a learned context. Fails if the CLIP has a text tower of another kind.
    pub fn causal_text(&self) -> Result<&Text> {
        let found = || {
            let expected = "a causal one, as CLIP has: learned contexts need it".into();
            Error::Input { what: "text tower", expected, found: self.architecture.describe()[1].clone() }
        };
        self.towers.text.causal().ok_or_else(found)
    }

    /// The kind that the towers compute in, which is also that of every embedding.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Embeds images: `[B, D]` in the compute kind, not normalised.
    ///
    /// `images`: `[B, 3, H, W]` of any floating kind, normalised as [`Self::preprocessing`] says, H and W at least [`Self::least_side`].
    /// Gradients flow to whatever is trainable; wrap in `tch::no_grad` where none are wanted.
    pub fn encode_image(&self, images: &Tensor, phase: Phase) -> Result<Tensor> {
        let least = self.least_side();
        let size = images.size();
        let fits = matches!(size[..], [b, 3, h, w] if b >= 1 && h >= least && w >= least);
        let is_floating = matches!(images.kind(), Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double);
        if !(fits && is_floating) {
            return Err(Error::Input {
                what: "images",
                expected: format!("floating [B, 3, H, W], H and W at least {least}"),
                found: format!("{:?} {size:?}", images.kind()),
            });
        }
        let images = images.to_device(self.device).to_kind(self.kind);
        Ok(self.towers.image.forward(&images, phase))
    }

    /// The side G of the grid of [`Self::encode_objects`]; `None` for towers that have no class token, such as a ResNet.
    pub fn object_grid(&self) -> Option<i64> {
        Some(self.towers.image.objects()?.object_grid(self.image_side()))
    }

    /// Embeds an object in each image by OADP's object-token mask attention (section 4.3 there): `[B, D]` in the compute kind, not
    /// normalised.
    ///
    /// `images`: as for [`Self::encode_image`], squares of side [`Self::image_side`]; `background`: `[B, G, G]` of any kind, 0 for patches of
    /// the object and 1 elsewhere, G from [`Self::object_grid`].
    pub fn encode_objects(&self, images: &Tensor, background: &Tensor) -> Result<Tensor> {
        let Some(vit) = self.towers.image.objects() else {
            let expected = "a vision transformer with a class token: the object token looks at its patches".into();
            return Err(Error::Input { what: "image tower", expected, found: self.architecture.describe()[0].clone() });
        };
        let side = self.image_side();
        let (grid, b) = (vit.object_grid(side), images.size().first().copied().unwrap_or_default());
        if b < 1 || images.size() != [b, 3, side, side] || background.size() != [b, grid, grid] {
            return Err(Error::Input {
                what: "objects",
                expected: format!("images [B, 3, {side}, {side}] and masks [B, {grid}, {grid}]"),
                found: format!("{:?} and {:?}", images.size(), background.size()),
            });
        }
        let [images, background] = [images, background].map(|tensor| tensor.to_device(self.device).to_kind(self.kind));
        Ok(vit.forward_objects(&images, &background))
    }

    /// Embeds images as [`Self::encode_image`] does, then scales each row to unit length, in the compute kind.
    pub fn encode_image_features(&self, images: &Tensor, phase: Phase) -> Result<Tensor> {
        Ok(to_unit_length(&self.encode_image(images, phase)?))
    }

    /// Embeds texts: `[B, D]` in the compute kind, not normalised.
    ///
    /// `tokens`: i64 `[B, L]`, L at most the context, as [`Self::tokenizer`] makes them. CLIP reads the feature at the first largest token of
    /// each row, which is the end of text; what follows it has no influence.
    pub fn encode_text(&self, tokens: &Tensor) -> Result<Tensor> {
        self.towers.text.forward(tokens)
    }

    /// Embeds texts as [`Self::encode_text`] does, then scales each row to unit length, in the compute kind.
    pub fn encode_text_features(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(to_unit_length(&self.encode_text(tokens)?))
    }

    /// The factor from cosine similarities to logits, f32 scalar. Fails if the checkpoint has none.
    pub fn logit_scale(&self) -> Result<Tensor> {
        let found = || Error::Input { what: LOGIT_SCALE, expected: "a checkpoint that has it".into(), found: "one without".into() };
        self.log_logit_scale.as_ref().map(Tensor::exp).ok_or_else(found)
    }
}

/// Scales each row of `[B, D]` to unit length, and a row of zeros to NaN, so that checks of weights find it.
fn to_unit_length(rows: &Tensor) -> Tensor {
    rows / rows.norm_scalaropt_dim(2.0, -1_i64, true)
}
