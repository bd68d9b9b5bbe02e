//! Classification by comparison with class embeddings: an open vocabulary, because classes are rows of a table that comes from outside.
//!
//! An embedding is `e = L2(W x + b)`, a logit its product with a row of the table (ViLD, section 3.2). The table is a constant and no
//! part of a checkpoint; base classes come first, and only they are known in training: logits of novel classes are then minus infinity.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error, Phase, Result,
    error::ensure,
    layers::{Linear, to_unit_length},
    parameters::{Init, Parameters},
};

/// What a region may be besides the classes of the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Background {
    /// Background, by a learned embedding; its logit is the last column.
    Learned,
    /// Nothing else: the embedding is there and never learns, and its logit, the last column, is minus infinity.
    Masked,
    /// Nothing else: the embedding is there and never learns, and it has no column.
    Dropped,
    /// Nothing else, and there is no such embedding.
    Absent,
}

/// What logits are made of cosines by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LogitScale {
    /// Divided (ViLD).
    Temperature {
        /// In training.
        train: f64,
        /// In detection.
        test: f64,
    },
    /// `z * scaler - bias`, as learned with the prompts (OADP's multi-label prompts).
    Affine {
        /// The factor.
        scaler: f64,
        /// What is taken off.
        bias: f64,
    },
}

impl LogitScale {
    fn apply(self, cosines: &Tensor, phase: Phase) -> Tensor {
        match (self, phase) {
            (Self::Temperature { train, .. }, Phase::Train) => cosines / train,
            (Self::Temperature { test, .. }, Phase::Test) => cosines / test,
            (Self::Affine { scaler, bias }, _) => cosines * scaler - bias,
        }
    }
}

/// The classes that a classifier tells apart. Clones share the embeddings.
#[derive(Debug)]
pub struct Vocabulary {
    embeddings: Tensor,
    n_base: i64,
    scale: LogitScale,
}

impl Clone for Vocabulary {
    fn clone(&self) -> Self {
        Self { embeddings: self.embeddings.shallow_clone(), n_base: self.n_base, scale: self.scale }
    }
}

impl Vocabulary {
    /// `embeddings`: f32 `[K, D]`, base classes first, used as they are (their lengths are part of the logits); `n_base`: from 1 to K.
    pub fn new(embeddings: Tensor, n_base: i64, scale: LogitScale) -> Result<Self> {
        let fits = matches!(embeddings.size()[..], [k, d] if (1..=k).contains(&n_base) && d > 0) && embeddings.kind() == Kind::Float;
        ensure(fits, "class embeddings", &format!("f32 [K, D], K at least the {n_base} base classes, of which there is one"), &embeddings)?;
        let factor = match scale {
            LogitScale::Temperature { train, test } => train.min(test),
            LogitScale::Affine { scaler, .. } => scaler,
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Error::Input { what: "logit scale", expected: "positive numbers".into(), found: format!("{scale:?}") });
        }
        Ok(Self { embeddings, n_base, scale })
    }

    /// Class embeddings f32 `[K, D]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// How cosines to them become logits.
    pub fn scale(&self) -> LogitScale {
        self.scale
    }

    /// The number K of classes.
    pub fn n_classes(&self) -> i64 {
        self.embeddings.size()[0]
    }

    /// The number of base classes, which come first.
    pub fn n_base(&self) -> i64 {
        self.n_base
    }
}

/// The classifier.
#[derive(Debug)]
pub struct EmbeddingClassifier {
    linear: Linear,
    /// `[1, D]`.
    bg_embedding: Option<Tensor>,
    background: Background,
}

impl EmbeddingClassifier {
    /// The classifier of a head that looks at regions.
    pub(crate) fn of_regions(at: &Parameters<'_>, n_in: i64, embed_dim: i64, background: Background) -> Self {
        let linear = Linear::declare(&(at / "_linear"), n_in, embed_dim, Init::Normal(0.01), Init::Constant(0.0));
        let embedding = |at: &Parameters<'_>| at.trainable("_bg_embedding", &[1, embed_dim], Init::xavier(embed_dim, 1));
        let bg_embedding = match background {
            Background::Learned => Some(embedding(at)),
            Background::Masked | Background::Dropped => Some(embedding(&at.frozen())),
            Background::Absent => None,
        };
        Self { linear, bg_embedding, background }
    }

    /// The classifier of whole images.
    pub(crate) fn of_images(at: &Parameters<'_>, n_in: i64, embed_dim: i64) -> Self {
        let linear = Linear::declare(&(at / "_linear"), n_in, embed_dim, Init::fan_in(n_in), Init::fan_in(n_in));
        Self { linear, bg_embedding: None, background: Background::Absent }
    }

    /// Returns embeddings f32 `[N, D]` of unit length; `x`: `[N, in]`.
    pub(crate) fn embed(&self, x: &Tensor) -> Tensor {
        to_unit_length(&self.linear.forward(x).to_kind(Kind::Float))
    }

    /// Returns logits f32 `[N, K]`, or `[N, K + 1]` with a last column for background; see [`Background`].
    ///
    /// `embeddings`: f32 `[N, D]`, of unit length, as the head of this classifier returned them. In training the columns of novel classes are minus infinity, without gradients.
    pub fn logits(&self, embeddings: &Tensor, vocabulary: &Vocabulary, phase: Phase) -> Result<Tensor> {
        let d = vocabulary.embeddings.size()[1];
        ensure(
            matches!(embeddings.size()[..], [_, found] if found == d),
            "embeddings",
            &format!("[N, {d}], as those of classes"),
            embeddings,
        )?;
        let n = embeddings.size()[0];
        let n_live = match phase {
            Phase::Train => vocabulary.n_base,
            Phase::Test => vocabulary.n_classes(),
        };
        let logits = |rows: &Tensor| vocabulary.scale.apply(&embeddings.matmul(&rows.to_device(embeddings.device()).tr()), phase);
        let never = |columns: i64| Tensor::full([n, columns], f64::NEG_INFINITY, (Kind::Float, embeddings.device()));
        let mut columns = vec![logits(&vocabulary.embeddings.narrow(0, 0, n_live)), never(vocabulary.n_classes() - n_live)];
        match (self.background, &self.bg_embedding) {
            (Background::Learned, Some(bg_embedding)) => columns.push(logits(&to_unit_length(bg_embedding))),
            (Background::Masked, _) => columns.push(never(1)),
            (Background::Learned | Background::Dropped | Background::Absent, _) => {}
        }
        Ok(Tensor::cat(&columns, 1))
    }
}

/// How a head's logits of some classes become its part of a joined score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Multiplies the logits, before the softmax over all classes.
    pub scale: f64,
    /// Of the probability.
    pub exponent: f64,
}

/// The shares of a head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    /// In scores of base classes.
    pub base: Share,
    /// In scores of novel classes.
    pub novel: Share,
}

impl Shares {
    /// Exponents for base and for novel classes, and logits as they are.
    pub const fn of(base: f64, novel: f64) -> Self {
        Self { base: Share { scale: 1.0, exponent: base }, novel: Share { scale: 1.0, exponent: novel } }
    }

    /// Returns `[N, K]`; `logits`: `[N, K + 1]`.
    fn apply(&self, logits: &Tensor, n_base: i64) -> Tensor {
        let k = logits.size()[1] - 1;
        let groups = [(self.base, 0, n_base), (self.novel, n_base, k - n_base)];
        let mut scaled: Vec<Tensor> = groups.iter().map(|&(share, first, n)| logits.narrow(1, first, n) * share.scale).collect();
        scaled.push(logits.narrow(1, k, 1));
        let probabilities = Tensor::cat(&scaled, 1).softmax(-1, Kind::Float);
        let powers = groups.map(|(share, first, n)| probabilities.narrow(1, first, n).pow_tensor_scalar(share.exponent));
        Tensor::cat(&powers, 1)
    }
}

/// What becomes of a region whose joined scores sum to more than 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overfull {
    /// It stays.
    Kept,
    /// All its scores are 0. (The reference makes a logit of a score, and a background of what is missing to 1: of such a region nothing is a
    /// number, and nothing is detected.)
    Dropped,
}

/// How the scores of the two heads become one (ViLD, equation 5; OADP, section 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ensemble {
    /// Of the box head.
    pub bbox: Shares,
    /// Of the object head.
    pub object: Shares,
    /// The exponent of a proposal's objectness; 0 leaves it out.
    pub objectness: f64,
    /// What becomes of a region whose joined scores sum to more than 1.
    pub overfull: Overfull,
}

impl Default for Ensemble {
    /// Geometric means, in which the box head weighs two thirds for base classes and a third for novel ones.
    fn default() -> Self {
        let (most, least) = (2.0 / 3.0, 1.0 / 3.0);
        Self { bbox: Shares::of(most, least), object: Shares::of(least, most), objectness: 0.0, overfull: Overfull::Kept }
    }
}

impl Ensemble {
    /// Returns scores `[N, K]`: products of powers of the softmaxes of both logits `[N, K + 1]`, whose last column is background, and of
    /// `objectness` `[N]`.
    pub fn scores(&self, box_logits: &Tensor, object_logits: &Tensor, objectness: &Tensor, n_base: i64) -> Result<Tensor> {
        let fits = matches!(box_logits.size()[..], [_, columns] if (0..columns).contains(&n_base));
        ensure(fits, "logits of the box head", &format!("[N, K + 1], K at least {n_base}"), box_logits)?;
        ensure(object_logits.size() == box_logits.size(), "logits of the object head", "the shape of the box head's", object_logits)?;
        let n = box_logits.size()[0];
        ensure(objectness.size() == [n], "objectness", &format!("[{n}], one for each region"), objectness)?;
        let scores = self.bbox.apply(box_logits, n_base) * self.object.apply(object_logits, n_base);
        let scores = match self.overfull {
            Overfull::Kept => scores,
            Overfull::Dropped => {
                let is_fine = scores.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).le(1.0);
                scores * is_fine
            }
        };
        Ok(scores * objectness.to_device(box_logits.device()).pow_tensor_scalar(self.objectness).unsqueeze(1))
    }
}
