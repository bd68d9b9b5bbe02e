//! The text tower: a causal transformer whose feature is read at the end-of-text token.
//!
//! Rows may be shorter than the context. Because no token sees what follows it, padding changes nothing.

use tch::{IndexOp, Kind, Tensor};

use super::{
    Activation, TextConfig,
    architecture::TextTower,
    transformer::{Attention, BlockInit, LAYER_NORM_EPS, LayerNorm, Shape, Transformer},
};
use crate::{
    Error, Result,
    parameters::{Init, Parameters},
};

/// The text tower.
#[derive(Debug)]
pub struct Text {
    /// `[vocabulary, C]`, f32.
    pub(crate) token_embedding: Tensor,
    /// `[context, C]`, f32.
    pub(crate) positional_embedding: Tensor,
    pub(crate) transformer: Transformer,
    pub(crate) ln_final: LayerNorm,
    /// `[C, D]`.
    pub(crate) projection: Tensor,
    pub(super) config: TextConfig,
}

impl Text {
    pub(super) fn declare(at: &Parameters<'_>, config: &TextConfig, embed_dim: i64, activation: Activation) -> Self {
        let TextConfig { context, vocabulary, width, heads, depth } = *config;
        let shape = Shape { width, heads, depth, mlp_width: 4 * width, eps: LAYER_NORM_EPS };
        Self {
            token_embedding: (at / "token_embedding").trainable("weight", &[vocabulary, width], Init::Normal(0.02)),
            positional_embedding: at.trainable("positional_embedding", &[context, width], Init::Normal(0.01)),
            transformer: Transformer::declare(&(at / "transformer"), &shape, activation, &BlockInit::scaled_by_depth(&shape)),
            ln_final: LayerNorm::declare(&(at / "ln_final"), width, LAYER_NORM_EPS),
            projection: at.trainable("text_projection", &[width, embed_dim], Init::Normal((width as f64).powf(-0.5))),
            config: *config,
        }
    }

    /// The features `[B, D]`, not normalised, of the tokens that end texts, `[B, C]` as they leave the transformer.
    pub(super) fn features(&self, ends: &Tensor) -> Tensor {
        // LayerNorm works row by row, so it is enough to normalise the rows that are read.
        self.ln_final.forward(ends).matmul(&self.projection)
    }

    /// The embeddings of tokens, f32 `[L, C]`, without positions.
    pub(super) fn embedded(&self, tokens: &[u32]) -> Result<Tensor> {
        let vocabulary = self.config.vocabulary;
        if let Some(token) = tokens.iter().find(|token| i64::from(**token) >= vocabulary) {
            return Err(Error::Input {
                what: "tokens",
                expected: format!("each from 0 to {}", vocabulary - 1),
                found: format!("a token {token}"),
            });
        }
        let tokens = Tensor::from_slice(&tokens.iter().map(|token| i64::from(*token)).collect::<Vec<_>>());
        Ok(self.token_embedding.index_select(0, &tokens.to_device(self.token_embedding.device())))
    }
}

impl TextTower for Text {
    /// `tokens`: L at most the context, the end-of-text token the largest of its row.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let TextConfig { context, vocabulary, .. } = self.config;
        let refuse = |found: String| Error::Input {
            what: "tokens",
            expected: format!("i64 [B, L], L from 1 to {context}, each from 0 to {}", vocabulary - 1),
            found,
        };
        let size = tokens.size();
        let [b, l] = size[..] else { return Err(refuse(format!("{:?} {size:?}", tokens.kind()))) };
        if tokens.kind() != Kind::Int64 || b == 0 || !(1..=context).contains(&l) {
            return Err(refuse(format!("{:?} {size:?}", tokens.kind())));
        }
        let (lowest, highest) = (tokens.min().int64_value(&[]), tokens.max().int64_value(&[]));
        if lowest < 0 || highest >= vocabulary {
            return Err(refuse(format!("a token {}", if lowest < 0 { lowest } else { highest })));
        }

        let tokens = &tokens.to_device(self.projection.device());
        let embedded = Tensor::embedding(&self.token_embedding, tokens, -1, false, false) + self.positional_embedding.i(..l);
        let x = self.transformer.forward(embedded.to_kind(self.projection.kind()), Attention::Causal);
        let rows = Tensor::arange(b, (Kind::Int64, tokens.device()));
        let ends = tokens.argmax(-1, false);
        Ok(self.features(&x.index(&[Some(rows), Some(ends)])))
    }

    fn causal(&self) -> Option<&Text> {
        Some(self)
    }

    fn cast(&mut self, kind: Kind) {
        self.transformer.cast(kind);
        self.projection = self.projection.to_kind(kind);
    }
}
