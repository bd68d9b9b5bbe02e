//! Classification by comparison with class embeddings: an open vocabulary, because classes are rows of a table that comes from outside.
//!
//! An embedding is `e = L2(W x + b)`, a logit its product with a row of the table (ViLD, section 3.2). The table is a constant and no
//! part of a checkpoint; base classes come first, and only they are known in training: logits of novel classes are then minus infinity.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::ensure;
use crate::{
    Error, Phase, Result,
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

/// The classes that a classifier tells apart.
#[derive(Debug)]
pub struct Vocabulary {
    embeddings: Tensor,
    n_base: i64,
    scale: LogitScale,
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

/// How the scores of the two heads become one (ViLD, equation 5; OADP, section 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ensemble {
    /// The exponent of the box head's score for base classes; the object head's is the rest to 1.
    pub base: f64,
    /// The same for novel classes.
    pub novel: f64,
}

impl Default for Ensemble {
    fn default() -> Self {
        Self { base: 2.0 / 3.0, novel: 1.0 / 3.0 }
    }
}

impl Ensemble {
    /// Returns scores `[N, K]`: geometric means of the softmaxes of both logits `[N, K + 1]`, whose last column is background.
    ///
    /// The product is the score. The reference makes a logit of it and a background of what is missing to 1, which is not a number where the
    /// scores of a region sum to more than 1.
    pub fn scores(&self, box_logits: &Tensor, object_logits: &Tensor, n_base: i64) -> Result<Tensor> {
        let fits = matches!(box_logits.size()[..], [_, columns] if (0..columns).contains(&n_base));
        ensure(fits, "logits of the box head", &format!("[N, K + 1], K at least {n_base}"), box_logits)?;
        ensure(object_logits.size() == box_logits.size(), "logits of the object head", "the shape of the box head's", object_logits)?;
        let k = box_logits.size()[1] - 1;
        let [text, image] = [box_logits, object_logits].map(|logits| logits.softmax(-1, Kind::Float).narrow(1, 0, k));
        let mean = |first: i64, n: i64, exponent: f64| {
            text.narrow(1, first, n).pow_tensor_scalar(exponent) * image.narrow(1, first, n).pow_tensor_scalar(1.0 - exponent)
        };
        Ok(Tensor::cat(&[mean(0, n_base, self.base), mean(n_base, k - n_base, self.novel)], 1))
    }
}
