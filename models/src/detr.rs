//! CORA's localizer: a DAB-DETR whose queries are told the class that they look for, and that scores objects without their class. Wu et al.
//! 2023 (CORA, sections 7, 8 and 10 of its specification).
//!
//! It sees a map of a frozen CLIP. N learned anchors are queries; the class of each comes from outside. Parameters have the reference's
//! names, but the heads of boxes only one of their two.
//!
//! Differences from the reference: queries are in the order of anchors, not sorted by class, so that dropout draws other numbers and
//! assignments of equal cost may differ; places of cells are computed in f64. Dropout draws from a given generator.

mod assignment;
mod attention;
pub mod average;
mod decoder;
mod encoder;
mod encodings;
pub mod layout;
pub mod losses;
pub mod matching;
pub mod prematch;
pub mod scores;
pub mod split;
#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeMap};

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn};

use self::{
    attention::Perceptron,
    decoder::{Decoder, Level},
    encoder::Encoder,
    encodings::{OUTPUT_EPS, image_encoding, logit, padding_bias},
};
use crate::{
    Error, Result,
    error::{check_count, check_sizes, ensure},
    layers::{CUDNN, Dropout, Linear},
    parameters::{Fill, Init, Parameters},
};

/// More anchors than any localizer has: their attention would not fit into memory.
const MAX_QUERIES: i64 = 100_000;
/// The groups of the normalisation behind the projection of the map. (Defect 8.)
const GROUPS: i64 = 32;
/// PyTorch's default for what group normalisation adds to a variance.
const GROUP_NORM_EPS: f64 = 1e-5;

/// The size of a localizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The channels of the map.
    pub map_channels: i64,
    /// D, the dimension of class embeddings.
    pub embed_dim: i64,
    /// d, the numbers of a token and of a query: a multiple of 4.
    pub hidden: i64,
    /// Attention heads, a divisor of d.
    pub heads: i64,
    /// The width inside the perceptrons.
    pub mlp_width: i64,
    /// The number of layers of the encoder.
    pub encoder_layers: usize,
    /// The number of layers of the decoder.
    pub decoder_layers: usize,
    /// N, the number of anchors.
    pub queries: i64,
    /// The width between a class embedding and a content.
    pub bottleneck: i64,
    /// Whether the projected map is normalised in 32 groups of channels; in the reference it is if training has fewer than 25 epochs. (Defect 8.)
    #[serde(default)]
    pub group_norm: bool,
    /// How queries begin.
    #[serde(default)]
    pub content: Content,
}

/// What a query knows of its class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// A projection of its class embedding.
    #[default]
    Text,
    /// Nothing: queries begin as zeros, as in DAB-DETR.
    Zero,
}

impl Config {
    /// CORA's. (Section 7.)
    pub fn cora(map_channels: i64, embed_dim: i64) -> Self {
        Self {
            map_channels,
            embed_dim,
            hidden: 256,
            heads: 8,
            mlp_width: 1024,
            encoder_layers: 3,
            decoder_layers: 6,
            queries: 1000,
            bottleneck: 128,
            group_norm: false,
            content: Content::Text,
        }
    }

    /// For a toy world, small enough to train in minutes on two cores. (Section 14.)
    pub fn toy(map_channels: i64, embed_dim: i64) -> Self {
        Self {
            hidden: 64,
            heads: 4,
            mlp_width: 128,
            encoder_layers: 1,
            decoder_layers: 3,
            queries: 100,
            bottleneck: 32,
            ..Self::cora(map_channels, embed_dim)
        }
    }

    /// Checks that all sizes are positive, and that d has a pair of sine and cosine on each axis and can be shared evenly.
    pub fn check(&self) -> Result<()> {
        let Self { map_channels, embed_dim, hidden, heads, mlp_width, encoder_layers, decoder_layers, queries, bottleneck, .. } = *self;
        let layers = [("encoder_layers", encoder_layers as i64), ("decoder_layers", decoder_layers as i64)];
        let sizes = [("map_channels", map_channels), ("embed_dim", embed_dim), ("hidden", hidden), ("heads", heads)];
        check_sizes(sizes.into_iter().chain([("mlp_width", mlp_width)]).chain(layers))?;
        check_sizes([("queries", queries), ("bottleneck", bottleneck)])?;
        if queries > MAX_QUERIES {
            return Err(Error::Input { what: "queries", expected: format!("at most {MAX_QUERIES}"), found: queries.to_string() });
        }
        let groups = if self.group_norm { GROUPS } else { 1 };
        for (what, divisor) in
            [("4, the sines and cosines of two axes", 4), ("the number of heads", heads), ("the number of groups", groups)]
        {
            if hidden % divisor != 0 {
                return Err(Error::Input { what: "hidden", expected: format!("a multiple of {what}"), found: hidden.to_string() });
            }
        }
        Ok(())
    }
}

/// The localizer.
#[derive(Debug)]
pub struct Localizer {
    /// `[N, 4]`: logits of cxcywh.
    anchors: Tensor,
    /// `[d, C, 1, 1]` and `[d]`.
    projection: Linear,
    /// Scale and shift, `[d]` each.
    group_norm: Option<[Tensor; 2]>,
    text_projection: Option<[Linear; 2]>,
    encoder: Encoder,
    decoder: Decoder,
    box_heads: Vec<Perceptron>,
    objectness: Linear,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

/// What the encoder makes of maps.
#[derive(Debug)]
pub struct Memory {
    /// `[B, h w, d]`, row by row.
    tokens: Tensor,
    /// The places of tokens, `[B, h w, d]`.
    encoding: Tensor,
    /// Hides padding, `[B, 1, 1, h w]`; none where there is none.
    bias: Option<Tensor>,
}

impl Memory {
    /// The memory of a batch in which the images come several times, all of them once, then all of them again. (Section 7.2: split classes.)
    pub fn repeated(&self, copies: i64) -> Self {
        let bias = self.bias.as_ref().map(|bias| bias.repeat([copies, 1, 1, 1]));
        Self { tokens: self.tokens.repeat([copies, 1, 1]), encoding: self.encoding.repeat([copies, 1, 1]), bias }
    }

    /// The tokens, `[B, h w, d]`, row by row; those of padding have no meaning.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }
}

/// What each of the L layers of the decoder says, queries in the order of anchors.
#[derive(Debug)]
pub struct Outputs {
    /// `[L, B, N, 4]`: cxcywh in [0, 1] of the unpadded image.
    pub boxes: Tensor,
    /// `[L, B, N]`: logits.
    pub objectness: Tensor,
    /// `[L, B, N, 4]`: the boxes from which a layer began, cxcywh in [0, 1]; of the first layer the anchors.
    pub references: Tensor,
    /// `[L, B, N, d]`: normalised states of the queries.
    pub states: Tensor,
}

impl Localizer {
    /// Declares a localizer under `path`, in f32, with first values that depend on `seed` and the parameters' names alone. (Section 7.6.)
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        let localizer = Self::declare(path, config, Fill::Seed(seed))?;
        // Layers begin as copies of one, but for their matrices, which are drawn again; heads of boxes are copies altogether.
        for (name, tensor) in &localizer.parameters {
            let first = ["transformer.encoder.layers.", "transformer.decoder.layers.", "bbox_embed."].into_iter().find_map(|prefix| {
                let (_, rest) = name.strip_prefix(prefix)?.split_once('.')?;
                (prefix == "bbox_embed." || tensor.dim() < 2).then(|| format!("{prefix}0.{rest}"))
            });
            if let Some(first) = first {
                tch::no_grad(|| tensor.shallow_clone().copy_(&localizer.parameters[&first]));
            }
        }
        Ok(localizer)
    }

    /// Declares a localizer of zeros, which a checkpoint is about to overwrite.
    pub fn blank(path: &nn::Path<'_>, config: &Config) -> Result<Self> {
        Self::declare(path, config, Fill::Blank)
    }

    fn declare(path: &nn::Path<'_>, config: &Config, fill: Fill) -> Result<Self> {
        config.check()?;
        let &Config { map_channels, embed_dim, hidden, bottleneck, .. } = config;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let (projection, transformer) = (&(&(root / "input_proj") / "0"), &(root / "transformer"));
        let linear = |at: &Parameters<'_>, n_in: i64, n_out: i64| Linear::declare(at, n_in, n_out, Init::fan_in(n_in), Init::fan_in(n_in));
        let localizer = Self {
            anchors: (root / "query_embed").trainable("weight", &[config.queries, 4], Init::Normal(1.0)),
            projection: {
                let (at, init) = (projection / "0", Init::fan_in(map_channels));
                let weight = at.trainable("weight", &[hidden, map_channels, 1, 1], init);
                Linear { weight, bias: at.trainable("bias", &[hidden], init) }
            },
            group_norm: config.group_norm.then(|| {
                let at = projection / "1";
                [("weight", 1.0), ("bias", 0.0)].map(|(name, value)| at.trainable(name, &[hidden], Init::Constant(value)))
            }),
            text_projection: (config.content == Content::Text).then(|| {
                let at = &(&(root / "text_proj") / "layers");
                [linear(&(at / "0"), embed_dim, bottleneck), linear(&(at / "1"), bottleneck, hidden)]
            }),
            encoder: Encoder::declare(&(transformer / "encoder"), config),
            decoder: Decoder::declare(&(transformer / "decoder"), config),
            box_heads: {
                let at = &(root / "bbox_embed");
                (0..config.decoder_layers).map(|index| Perceptron::declare_box_head(&(at / index), hidden)).collect()
            },
            objectness: linear(&(root / "objectness_embed"), hidden, 1),
            parameters: BTreeMap::new(),
            config: *config,
        };
        Ok(Self { parameters: declared.into_inner(), ..localizer })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter by the reference's name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// The anchors `[N, 4]`: logits of cxcywh. They share memory with the network's, and have a gradient.
    pub fn anchors(&self) -> Tensor {
        self.anchors.shallow_clone()
    }

    /// Encodes maps, `[B, C, h, w]` of the parameters' kind. (Sections 7.1 and 7.3.)
    ///
    /// `valid`: of each image, the rows and columns of its map that are not padding, at least one. `dropout`: its generator, in training;
    /// without it nothing is dropped.
    pub fn encode(&self, map: &Tensor, valid: &[[i64; 2]], dropout: Option<&mut ChaCha8Rng>) -> Result<Memory> {
        let Config { map_channels, hidden, .. } = self.config;
        let (kind, device) = (self.anchors.kind(), map.device());
        let expected = format!("{kind:?} [B, {map_channels}, h, w], not empty");
        let fits = matches!(map.size()[..], [b, c, h, w] if c == map_channels && b * h * w > 0) && map.kind() == kind;
        ensure(fits, "map", &expected, map)?;
        let (b, _, height, width) = map.size4()?;
        check_count("valid sizes of maps", b, valid.len())?;
        if let Some(size) = valid.iter().find(|size| !(1..=height).contains(&size[0]) || !(1..=width).contains(&size[1])) {
            let expected = format!("[height, width] from [1, 1] to [{height}, {width}]");
            return Err(Error::Input { what: "valid size of a map", expected, found: format!("{size:?}") });
        }
        let like = |tensor: Tensor| tensor.to_kind(kind).to_device(device);
        let encoding = like(image_encoding(valid, [height, width], hidden));
        let bias = padding_bias(valid, [height, width]).map(like);
        let projected = map.conv2d(&self.projection.weight, Some(&self.projection.bias), 1, 0, 1, 1);
        let projected = match &self.group_norm {
            Some([scale, shift]) => projected.group_norm(GROUPS, Some(scale), Some(shift), GROUP_NORM_EPS, CUDNN),
            None => projected,
        };
        let tokens = projected.flatten(2, 3).transpose(1, 2);
        let tokens = self.encoder.forward(tokens, &encoding, bias.as_ref(), &mut Dropout(dropout));
        Ok(Memory { tokens, encoding, bias })
    }

    /// Looks for objects. (Sections 7.4 and 7.5.)
    ///
    /// `texts`: class embeddings `[K, D]` of unit length, of any floating kind; `classes`: i64 `[B, N]`, the class of each anchor in each image.
    /// A localizer with [`Content::Zero`] reads neither. `dropout` as in [`Self::encode`].
    pub fn decode(&self, memory: &Memory, texts: &Tensor, classes: &Tensor, dropout: Option<&mut ChaCha8Rng>) -> Result<Outputs> {
        let content = self.content([memory.tokens.size()[0], self.config.queries], texts, classes)?;
        Ok(self.decode_content(memory, &content, dropout))
    }

    /// What the queries of some images know of their classes, `[B, N, d]`; `[b, n]` are B and N.
    fn content(&self, [b, n]: [i64; 2], texts: &Tensor, classes: &Tensor) -> Result<Tensor> {
        let Config { embed_dim, hidden, .. } = self.config;
        let (kind, device) = (self.anchors.kind(), self.anchors.device());
        let Some([first, second]) = &self.text_projection else {
            return Ok(Tensor::zeros([b, n, hidden], (kind, device)));
        };
        let fits = matches!(texts.size()[..], [k, dim] if k > 0 && dim == embed_dim);
        ensure(fits, "class embeddings", &format!("[K, {embed_dim}], K at least 1"), texts)?;
        let fits = classes.size() == [b, n] && classes.kind() == Kind::Int64;
        ensure(fits, "classes of anchors", &format!("i64 [{b}, {n}]"), classes)?;
        let (k, [lowest, highest]) = (texts.size()[0], [classes.min(), classes.max()].map(|class| class.int64_value(&[])));
        if lowest < 0 || highest >= k {
            let (expected, found) = (format!("from 0 to {}", k - 1), format!("{lowest} to {highest}"));
            return Err(Error::Input { what: "classes of anchors", expected, found });
        }
        let contents = second.forward(&first.forward(&texts.to_kind(kind).to_device(device)).relu());
        Ok(contents.index_select(0, &classes.to_device(device).view(-1)).view([b, n, hidden]))
    }

    /// `content`: `[B, N, d]`.
    fn decode_content(&self, memory: &Memory, content: &Tensor, dropout: Option<&mut ChaCha8Rng>) -> Outputs {
        let anchors = self.anchors.sigmoid().expand([content.size()[0], self.config.queries, 4], false);
        let levels = self.decoder.forward(content, anchors, memory, &self.box_heads, &mut Dropout(dropout));
        let read_out = |(Level { state, reference }, box_head): (&Level, &Perceptron)| {
            (logit(reference, OUTPUT_EPS) + box_head.forward(state)).sigmoid()
        };
        let boxes: Vec<Tensor> = levels.iter().zip(&self.box_heads).map(read_out).collect();
        let (states, references): (Vec<_>, Vec<_>) = levels.into_iter().map(|Level { state, reference }| (state, reference)).unzip();
        let states = Tensor::stack(&states, 0);
        Outputs {
            boxes: Tensor::stack(&boxes, 0),
            objectness: self.objectness.forward(&states).squeeze_dim(3),
            references: Tensor::stack(&references, 0),
            states,
        }
    }
}
