//! Embeddings of texts.

use ovenbird_models::{
    clip::{Clip, tokenizer::Overlong},
    to_unit_length,
};
use tch::{Kind, Tensor, no_grad};

use crate::Result;

/// The mean of the normalised embeddings of some texts, f32 `[D]`.
pub(crate) fn mean_embedding(clip: &Clip, texts: &[String]) -> Result<Tensor> {
    let tokens = clip.tokenizer().batch(texts, Overlong::Refuse)?;
    no_grad(|| Ok(to_unit_length(&clip.encode_text(&tokens)?.to_kind(Kind::Float)).mean_dim(0, false, Kind::Float)))
}
