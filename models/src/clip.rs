//! CLIP: an image tower and a text tower that meet in one space, and the tokenizer that feeds the second.
//!
//! The networks are those of OpenAI's release, with its parameter names; [`layout`] translates the names of open_clip and Hugging Face.
//! Images arrive normalised; how an image becomes a tensor, and what an embedding is for, is not known here.
//!
//! Towers that compute in bf16 or f16 hold their matrices in that kind. LayerNorm, batch normalisation, class, position and token tables
//! stay in f32; LayerNorm is computed in f32 and cast back.
//!
//! What differs from the reference implementations: an image of another size than the checkpoint's is taken, with the position table
//! resized bilinearly (see [`vision`]); texts may be padded to the longest of their batch instead of to the context.

mod cleaning;
pub mod layout;
pub mod prompted;
pub mod resnet;
pub mod text;
pub mod tokenizer;
mod transformer;
pub mod vision;

#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeMap, path::Path};

use tch::{Device, Kind, Tensor, nn};

use self::{
    resnet::{ModifiedResNet, REDUCTION},
    text::Text,
    transformer::Shape,
    vision::Vit,
};
use crate::{
    Error, Phase, Result,
    parameters::{Fill, Init, Parameters},
};

/// The mean of each colour channel that OpenAI normalises images by (RGB in [0, 1]).
pub const IMAGE_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// The standard deviation of each colour channel that OpenAI normalises images by (RGB in [0, 1]).
pub const IMAGE_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

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

impl Config {
    /// Checks that the sizes agree with each other.
    pub fn check(&self) -> Result<()> {
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
}

/// The slope of OpenAI's approximation of the Gaussian error unit.
const QUICK_GELU_SLOPE: f64 = 1.702;

/// The non-linearity of the transformer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`: OpenAI's weights, and those that others trained on top of them.
    QuickGelu,
    /// The exact Gaussian error unit: most of open_clip's own weights.
    Gelu,
}

impl Activation {
    /// Consumes `x`, so that its memory is used again: these are the largest tensors of a block.
    fn apply(self, mut x: Tensor) -> Tensor {
        match self {
            // silu(x) = x sigmoid(x), in one pass; four times faster than the formula on a CPU in bf16.
            Self::QuickGelu => x.g_mul_scalar_(QUICK_GELU_SLOPE).silu_().g_div_scalar_(QUICK_GELU_SLOPE),
            Self::Gelu => x.gelu("none"),
        }
    }
}

/// The name of the logit scale's logarithm.
const LOGIT_SCALE: &str = "logit_scale";

/// The image tower.
#[derive(Debug)]
pub enum Image {
    /// A vision transformer.
    Vit(Vit),
    /// OpenAI's modified ResNet.
    ResNet(Box<ModifiedResNet>),
}

/// A CLIP.
#[derive(Debug)]
pub struct Clip {
    /// The image tower.
    pub image: Image,
    /// The text tower.
    pub text: Text,
    /// The natural logarithm of the logit scale, f32 scalar; a trained parameter. `None` where a checkpoint of a frozen CLIP lacks it.
    pub log_logit_scale: Option<Tensor>,
    config: Config,
    kind: Kind,
    device: Device,
}

impl Clip {
    /// Declares a CLIP under `path`, trainable, in f32, with the first values that OpenAI and open_clip give.
    ///
    /// The values depend on `seed` and the parameters' names alone; libtorch's global generator is not touched.
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        Ok(Self::declare(path, config, Fill::Seed(seed))?.0)
    }

    /// Declares a CLIP under `path`, trainable, in f32, with the values of a checkpoint in any of the known layouts.
    ///
    /// Fails with every tensor that is missing, unexpected or of another shape than `config` says.
    pub fn trainable_from(path: &nn::Path<'_>, config: &Config, tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<Self> {
        let (clip, declared) = Self::declare(path, config, Fill::Blank)?;
        layout::copy(&layout::normalise(tensors, origin)?.tensors, &declared, None, origin)?;
        Ok(clip)
    }

    /// Builds a frozen CLIP from a checkpoint in any of the known layouts, its sizes read off the tensors (see [`layout::config`]).
    ///
    /// `origin` names the file in messages. `kind` is what the towers compute in: `Float`, `BFloat16` or `Half`.
    pub fn load(tensors: &BTreeMap<String, Tensor>, origin: &Path, activation: Activation, device: Device, kind: Kind) -> Result<Self> {
        let config = layout::config(tensors, origin, activation)?;
        Self::load_as(&config, tensors, origin, device, kind)
    }

    /// Builds a frozen CLIP from a checkpoint whose sizes are known; for heads that are not 64 channels wide, which tensors cannot say.
    pub fn load_as(config: &Config, tensors: &BTreeMap<String, Tensor>, origin: &Path, device: Device, kind: Kind) -> Result<Self> {
        if !matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half) {
            return Err(Error::Input { what: "kind", expected: "Float, BFloat16 or Half".into(), found: format!("{kind:?}") });
        }
        let mut store = nn::VarStore::new(device);
        let tensors = layout::normalise(tensors, origin)?.tensors;
        let (mut clip, declared) = Self::declare(&store.root(), config, Fill::Blank)?;
        layout::copy(&tensors, &declared, Some(LOGIT_SCALE), origin)?;
        if !tensors.contains_key(LOGIT_SCALE) {
            clip.log_logit_scale = None;
        }
        store.freeze();
        clip.cast(kind);
        Ok(clip)
    }

    fn declare(path: &nn::Path<'_>, config: &Config, fill: Fill) -> Result<(Self, BTreeMap<String, Tensor>)> {
        config.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let Config { embed_dim, activation, .. } = *config;
        let visual = &(root / "visual");
        let image = match config.image {
            ImageConfig::Vit { image_side, patch, width, depth, heads, mlp_width } => {
                let shape = Shape { width, heads, depth, mlp_width };
                Image::Vit(Vit::declare(visual, image_side, patch, &shape, embed_dim, activation))
            }
            ImageConfig::ResNet { image_side, ref layers, width, heads } => {
                Image::ResNet(Box::new(ModifiedResNet::declare(visual, image_side, layers, width, heads, embed_dim)))
            }
        };
        let text = Text::declare(root, &config.text, embed_dim, activation);
        // CLIP, section 2.5: a temperature of 0.07.
        let log_logit_scale = root.trainable(LOGIT_SCALE, &[], Init::Constant((1.0_f64 / 0.07).ln()));
        let log_logit_scale = Some(log_logit_scale);
        let clip = Self { image, text, log_logit_scale, config: config.clone(), kind: Kind::Float, device: path.device() };
        Ok((clip, declared.into_inner()))
    }

    fn cast(&mut self, kind: Kind) {
        match &mut self.image {
            Image::Vit(vit) => vit.cast(kind),
            Image::ResNet(resnet) => resnet.cast(kind),
        }
        self.text.cast(kind);
        self.kind = kind;
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the towers compute in, and the kind of every embedding.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Embeds images: `[B, D]` in the compute kind, not normalised.
    ///
    /// `images`: `[B, 3, H, W]` of any floating kind, normalised by [`IMAGE_MEAN`] and [`IMAGE_STD`]; at least one patch (ResNet: 32 px) high
    /// and wide.
    /// Gradients flow to whatever is trainable; wrap in `tch::no_grad` where none are wanted.
    pub fn encode_image(&self, images: &Tensor, phase: Phase) -> Result<Tensor> {
        let least = match self.config.image {
            ImageConfig::Vit { patch, .. } => patch,
            ImageConfig::ResNet { .. } => REDUCTION,
        };
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
        Ok(match &self.image {
            Image::Vit(vit) => vit.forward(&images),
            Image::ResNet(resnet) => resnet.forward(&images, phase),
        })
    }

    /// The side G of the grid of [`Self::encode_objects`] for images at the network's size; `None` for a ResNet, which has no tokens.
    pub fn object_grid(&self) -> Option<i64> {
        match (&self.image, &self.config.image) {
            (Image::Vit(vit), ImageConfig::Vit { image_side, .. }) => Some(vit.object_grid(*image_side)),
            _ => None,
        }
    }

    /// Embeds an object in each image by OADP's object-token mask attention (section 4.3 there): `[B, D]` in the compute kind, not
    /// normalised.
    ///
    /// `images`: as for [`Self::encode_image`], at the network's size S; `background`: `[B, G, G]` of any kind, 0 where a patch is the object's
    /// and 1 elsewhere, G from [`Self::object_grid`].
    pub fn encode_objects(&self, images: &Tensor, background: &Tensor) -> Result<Tensor> {
        let (Image::Vit(vit), ImageConfig::Vit { image_side: side, .. }) = (&self.image, &self.config.image) else {
            let expected = "a vision transformer: the object token looks at its patches".into();
            return Err(Error::Input { what: "image tower", expected, found: "a ResNet".into() });
        };
        let (grid, b) = (vit.object_grid(*side), images.size().first().copied().unwrap_or_default());
        if b < 1 || images.size() != [b, 3, *side, *side] || background.size() != [b, grid, grid] {
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
    /// `tokens`: i64 `[B, L]`, L at most the context; the feature is read at the first largest token of each row, which is the end of text.
    /// What follows it has no influence.
    pub fn encode_text(&self, tokens: &Tensor) -> Result<Tensor> {
        self.text.forward(tokens)
    }

    /// Embeds texts as [`Self::encode_text`] does, then scales each row to unit length, in the compute kind.
    pub fn encode_text_features(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(to_unit_length(&self.encode_text(tokens)?))
    }

    /// What cosine similarities are multiplied by to become logits, f32 scalar. Fails where the checkpoint has none.
    pub fn logit_scale(&self) -> Result<Tensor> {
        let found = || Error::Input { what: LOGIT_SCALE, expected: "a checkpoint that has it".into(), found: "one without".into() };
        self.log_logit_scale.as_ref().map(Tensor::exp).ok_or_else(found)
    }
}

/// Scales each row of `[B, D]` to unit length, and a row of zeros to no numbers: whoever checks weights finds them.
fn to_unit_length(rows: &Tensor) -> Tensor {
    rows / rows.norm_scalaropt_dim(2.0, -1_i64, true)
}
