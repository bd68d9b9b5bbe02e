//! Embeddings of texts.

use ovenbird_models::{
    clip::{Clip, tokenizer::Overlong},
    to_unit_length,
};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{Context, Result};

/// Texts of a forward pass.
const TEXTS: usize = 64;

/// The mean of the normalised embeddings of some texts, f32 `[D]`.
pub(crate) fn mean_embedding(clip: &Clip, texts: &[String]) -> Result<Tensor> {
    let tokens = clip.tokenizer().batch(texts, Overlong::Refuse)?;
    no_grad(|| Ok(to_unit_length(&clip.encode_text(&tokens)?.to_kind(Kind::Float)).mean_dim(0, false, Kind::Float)))
}

/// The normalised embeddings of texts, f32 `[N, D]` on the CPU. `done`: called with the number of texts after some of them; may stop the work.
pub(crate) fn embeddings(clip: &Clip, texts: &[String], done: impl Fn(u64) -> Result<()>) -> Result<Tensor> {
    let mut rows = vec![Tensor::zeros([0, clip.embed_dim()], (Kind::Float, Device::Cpu))];
    for texts in texts.chunks(TEXTS) {
        let tokens = clip.tokenizer().batch(texts, Overlong::Refuse)?;
        let embeddings = no_grad(|| clip.encode_text(&tokens))?;
        rows.push(to_unit_length(&embeddings.to_device(Device::Cpu).to_kind(Kind::Float)));
        done(texts.len() as u64)?;
    }
    Ok(Tensor::cat(&rows, 0))
}

/// The same in a stage whose items are texts: reports each as done.
pub(crate) fn counted_embeddings(clip: &Clip, texts: &[String], cx: &Context<'_>) -> Result<Tensor> {
    embeddings(clip, texts, |n| {
        cx.tick(n);
        cx.proceed()
    })
}
