//! Classification by comparison with class embeddings: an open vocabulary, because classes are rows of a table that comes from outside.
//!
//! An embedding is `e = L2(W x + b)`, a logit its product with a row of the table (ViLD, section 3.2). The table is a constant and no
//! part of a checkpoint; base classes come first, and only they are known in training: logits of novel classes are then minus infinity.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error, Phase, Result,
    error::ensure,
    layers::{Linear, to_unit_length},
    parameters::{Init, Parameters},
};

/// The treatment of background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Background {
    /// Background, by a learned embedding; its logit is the last column.
    Learned,
    /// The embedding exists and is not trained; its logit, the last column, is minus infinity.
    Masked,
    /// The embedding exists and is not trained; it has no column.
    Dropped,
    /// Nothing else, and there is no such embedding.
    Absent,
}

/// The conversion of cosines to logits.
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
    /// `z * scaler - bias`, as trained with the prompts (OADP's multilabel prompts).
    Affine {
        /// The factor.
        scaler: f64,
        /// The bias that is subtracted.
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

/// The classes of a classifier. Clones share the embeddings.
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
    /// `embeddings`: f32 `[K, D]`, base classes first, used as they are (their lengths are part of the logits); `n_base`: from 0 to K.
    pub fn new(embeddings: Tensor, n_base: i64, scale: LogitScale) -> Result<Self> {
        let fits =
            matches!(embeddings.size()[..], [k, d] if k > 0 && (0..=k).contains(&n_base) && d > 0) && embeddings.kind() == Kind::Float;
        ensure(fits, "class embeddings", &format!("f32 [K, D], K at least 1 and at least the {n_base} base classes"), &embeddings)?;
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
    /// The classifier of a head for regions.
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

    /// Products of other embeddings with those of the classes, without the scale of logits: f32 `[N, K + 1]`, background last, where
    /// background is learned.
    ///
    /// `embeddings`: f32 `[N, D]`, of unit length.
    pub fn products(&self, embeddings: &Tensor, vocabulary: &Vocabulary) -> Result<Tensor> {
        let unscaled = Vocabulary { scale: LogitScale::Temperature { train: 1.0, test: 1.0 }, ..vocabulary.clone() };
        self.logits(embeddings, &unscaled, Phase::Test)
    }
}

/// The weight of a head in the scores of some classes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeadWeight {
    /// Multiplies the logits before the softmax over all classes.
    pub scale: f64,
    /// Exponent of the probability.
    pub exponent: f64,
}

impl HeadWeight {
    /// An exponent, with the logits as they are.
    pub const fn of(exponent: f64) -> Self {
        Self { scale: 1.0, exponent }
    }
}

/// The treatment of a region whose combined scores sum to more than 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SumAboveOne {
    /// Its scores are used as they are. (Fixes defect 3 in docs/recipes/oadp.md.)
    #[default]
    Fixed,
    /// All its scores are 0: the reference turns scores into logits, with 1 minus their sum for background, and gets NaN for such a region.
    Reference,
}

/// How the scores of the box head and the object head are combined: a product of powers. By default a geometric mean, in which the box
/// head weighs two thirds for base classes and a third for novel ones. (ViLD, equation 5; OADP, section 6.6, whose tuned scores need other
/// numbers here.)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ensemble {
    /// The box head, for base classes.
    pub box_base: HeadWeight,
    /// The box head, for novel classes.
    pub box_novel: HeadWeight,
    /// The object head, for base classes.
    pub object_base: HeadWeight,
    /// The object head, for novel classes.
    pub object_novel: HeadWeight,
    /// Exponent of the proposal's objectness; 0 ignores it.
    pub objectness: f64,
    /// The treatment of a region whose combined scores sum to more than 1.
    pub sum_above_one: SumAboveOne,
}

impl Default for Ensemble {
    fn default() -> Self {
        let (most, least) = (HeadWeight::of(2.0 / 3.0), HeadWeight::of(1.0 / 3.0));
        Self {
            box_base: most,
            box_novel: least,
            object_base: least,
            object_novel: most,
            objectness: 0.0,
            sum_above_one: SumAboveOne::default(),
        }
    }
}

/// Powers of the softmax of a head's logits: `[N, K]`; `logits`: `[N, K + 1]`, the last column background.
fn weighted(logits: &Tensor, base: HeadWeight, novel: HeadWeight, n_base: i64) -> Tensor {
    let k = logits.size()[1] - 1;
    let groups = [(base, 0, n_base), (novel, n_base, k - n_base)];
    let mut scaled: Vec<Tensor> = groups.iter().map(|&(weight, first, n)| logits.narrow(1, first, n) * weight.scale).collect();
    scaled.push(logits.narrow(1, k, 1));
    let probabilities = Tensor::cat(&scaled, 1).softmax(-1, Kind::Float);
    let powers = groups.map(|(weight, first, n)| probabilities.narrow(1, first, n).pow_tensor_scalar(weight.exponent));
    Tensor::cat(&powers, 1)
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
        let scores = weighted(box_logits, self.box_base, self.box_novel, n_base)
            * weighted(object_logits, self.object_base, self.object_novel, n_base);
        let scores = match self.sum_above_one {
            SumAboveOne::Fixed => scores,
            SumAboveOne::Reference => {
                let is_fine = scores.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).le(1.0);
                scores * is_fine
            }
        };
        Ok(scores * objectness.to_device(box_logits.device()).pow_tensor_scalar(self.objectness).unsqueeze(1))
    }
}
