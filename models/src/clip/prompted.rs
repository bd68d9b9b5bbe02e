//! Texts that begin with shared vectors in place of words: a learned context (CoOp, Zhou et al. 2022; OADP, section 5.2).
//!
//! The vectors are trained while the tower is frozen, so every training step embeds every text again. No token attends to later tokens, so the
//! start of text and the context have the same features in all texts, and texts are packed: a pack is one row of tokens, `start, context, words of
//! one text, words of the next, ...`, in which words stand at the positions that they have alone, and see the beginning and what goes before
//! them in their own text. What is computed is the beginning once a pack and no padding: of COCO's 48 base classes 150 tokens instead of 385
//! (432 with padding), of LVIS's 1,203 classes 4,660 instead of 10,585 (19,248).

use std::ops::Range;

use tch::{Kind, Tensor};

use super::{text::Text, tokenizer::Tokenizer, transformer::Attention};
use crate::{Error, Result};

/// Words of a pack at most, all texts together. Attention is quadratic in a pack: at 512 channels and 256 tokens a twelfth of the work.
const PACK_WORDS: usize = 256;

/// Texts that begin with shared vectors, ready to be embedded again and again.
#[derive(Debug)]
pub struct Prompted<'a> {
    text: &'a Text,
    /// The start of text in its place, `[1, C]`.
    start: Tensor,
    /// Of the context, `[M, C]`.
    positions: Tensor,
    packs: Vec<Pack>,
}

/// Texts that go through the tower in one row.
#[derive(Debug)]
struct Pack {
    /// All but the beginning, in their places: `[W, C]`.
    words: Tensor,
    /// `[1 + M + W, 1 + M + W]`: 0 where a token looks, minus infinity elsewhere.
    mask: Tensor,
    /// Where each text ends, i64.
    ends: Tensor,
}

impl Text {
    /// The embeddings of the tokens of some words, f32 `[M, C]`, without start and end: first values of a context.
    pub fn words(&self, tokenizer: &Tokenizer, words: &str) -> Result<Tensor> {
        let tokens = tokenizer.encode(words);
        self.embedded(&tokens[1..tokens.len() - 1])
    }
}

impl<'a> Prompted<'a> {
    /// Prepares texts to follow `n_context` vectors, in a tower on any device.
    ///
    /// Fails if there are none, and if a text does not fit the tower's context beside the vectors.
    pub fn new(text: &'a Text, tokenizer: &Tokenizer, texts: &[impl AsRef<str>], n_context: usize) -> Result<Self> {
        let most = usize::try_from(text.config.context).unwrap_or(0).saturating_sub(n_context);
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts.iter().map(AsRef::as_ref) {
            let tokens = tokenizer.encode(text);
            if tokens.len() > most {
                return Err(Error::Input {
                    what: "text",
                    expected: format!("at most {most} tokens beside {n_context} of context"),
                    found: format!("{} tokens in {text:?}", tokens.len()),
                });
            }
            rows.push(tokens);
        }
        let Some(first) = rows.first() else {
            return Err(Error::Input { what: "texts", expected: "at least one".into(), found: "none".into() });
        };
        let start = text.embedded(&first[..1])? + text.positional_embedding.narrow(0, 0, 1);
        let positions = text.positional_embedding.narrow(0, 1, n_context as i64);
        let mut packs: Vec<Vec<&[u32]>> = Vec::new();
        for words in rows.iter().map(|row| &row[1..]) {
            match packs.last_mut() {
                Some(pack) if pack.iter().map(|words| words.len()).sum::<usize>() + words.len() <= PACK_WORDS => pack.push(words),
                _ => packs.push(vec![words]),
            }
        }
        let packs = packs.iter().map(|pack| Pack::new(text, pack, 1 + n_context)).collect::<Result<_>>()?;
        Ok(Self { text, start, positions, packs })
    }

    /// Embeds every text behind `context`, f32 `[M, C]`: `[K, D]` in the compute kind, in the order of the texts, not normalised.
    ///
    /// Gradients flow to the context.
    pub fn encode(&self, context: &Tensor) -> Result<Tensor> {
        if context.size() != self.positions.size() || context.kind() != Kind::Float {
            let (expected, found) = (format!("f32 {:?}", self.positions.size()), format!("{:?} {:?}", context.kind(), context.size()));
            return Err(Error::Input { what: "context", expected, found });
        }
        let beginning = Tensor::cat(&[&self.start, &(context + &self.positions)], 0);
        let ends = |pack: &Pack| {
            let x = Tensor::cat(&[&beginning, &pack.words], 0).to_kind(self.text.projection.kind()).unsqueeze(0);
            self.text.transformer.forward(x, Attention::Masked(&pack.mask)).squeeze_dim(0).index_select(0, &pack.ends)
        };
        Ok(self.text.features(&Tensor::cat(&self.packs.iter().map(ends).collect::<Vec<_>>(), 0)))
    }
}

impl Pack {
    /// `texts`: the tokens of each, without the start; `n_before`: tokens of the beginning.
    fn new(text: &Text, texts: &[&[u32]], n_before: usize) -> Result<Self> {
        let n_tokens = n_before + texts.iter().map(|words| words.len()).sum::<usize>();
        let (mut places, mut ends, mut mask) = (Vec::new(), Vec::new(), vec![f32::NEG_INFINITY; n_tokens * n_tokens]);
        let mut looks = |token: usize, at: Range<usize>| mask[token * n_tokens..][at].fill(0.0);
        (0..n_before).for_each(|token| looks(token, 0..token + 1));
        let mut first = n_before;
        for words in texts {
            for token in first..first + words.len() {
                looks(token, 0..n_before);
                looks(token, first..token + 1);
                places.push((n_before + token - first) as i64);
            }
            first += words.len();
            ends.push(first as i64 - 1);
        }
        let device = text.projection.device();
        let words =
            text.embedded(&texts.concat())? + text.positional_embedding.index_select(0, &Tensor::from_slice(&places).to_device(device));
        let side = n_tokens as i64;
        let mask = Tensor::from_slice(&mask).view([side, side]).to_device(device).to_kind(text.projection.kind());
        Ok(Self { words, mask, ends: Tensor::from_slice(&ends).to_device(device) })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, nn, no_grad};

    use super::*;
    use crate::{
        clip::{Activation, Clip, Config, ImageConfig, TextConfig, tokenizer::Overlong},
        golden::error,
        to_unit_length,
    };

    fn clip() -> (nn::VarStore, Clip) {
        let mut weights = nn::VarStore::new(Device::Cpu);
        let config = Config {
            embed_dim: 24,
            image: ImageConfig::Vit { image_side: 32, patch: 16, width: 32, depth: 1, heads: 1, mlp_width: 64 },
            text: TextConfig { context: 77, vocabulary: 49_408, width: 32, heads: 2, depth: 3 },
            activation: Activation::QuickGelu,
        };
        let clip = Clip::new(&weights.root(), &config, 5).unwrap();
        // Away from where attention is even.
        no_grad(|| weights.variables().into_values().for_each(|mut tensor| drop(tensor.g_mul_scalar_(3.0))));
        weights.freeze();
        (weights, clip)
    }

    /// More words than a pack holds; some texts are one token long, some many.
    fn texts() -> Vec<String> {
        let names = ["dog", "striped red circle", "speaker (stero equipment)", "a", "hair drier", "x-ray of a xylophone"];
        (0..90).map(|place| format!("{} {place}.", names[place % names.len()])).collect()
    }

    /// Parity check R5 of OADP's specification.
    #[test]
    fn a_context_of_words_gives_what_the_words_give() {
        let ((_weights, clip), tokenizer) = (clip(), Tokenizer::clip());
        let context = clip.causal_text().unwrap().words(&tokenizer, "a photo of a").unwrap();
        let prompted = Prompted::new(clip.causal_text().unwrap(), &tokenizer, &texts(), 4).unwrap();
        assert!(context.size() == [4, 32] && prompted.packs.len() > 1);
        let found = to_unit_length(&prompted.encode(&context).unwrap());
        let sentences: Vec<String> = texts().iter().map(|text| format!("a photo of a {text}")).collect();
        let tokens = tokenizer.batch(&sentences, Overlong::Refuse).unwrap();
        let expected = clip.encode_text_features(&tokens).unwrap();
        let apart = error(&found, &expected);
        println!("packed and alone: {apart:.1e}");
        assert!(apart < 1e-5, "{apart}");
        // Other vectors, other embeddings; another text, another embedding.
        assert!(error(&to_unit_length(&prompted.encode(&(context * 2.0)).unwrap()), &expected) > 0.01);
        assert!(error(&expected.narrow(0, 0, 1), &expected.narrow(0, 1, 1)) > 0.01);
    }

    #[test]
    fn the_gradient_of_the_context_does_not_depend_on_packing() {
        let ((_weights, clip), tokenizer) = (clip(), Tokenizer::clip());
        let gradient = |texts: &[&[String]]| {
            let context = clip.causal_text().unwrap().words(&tokenizer, "a photo of a").unwrap().set_requires_grad(true);
            let encode =
                |texts: &&[String]| Prompted::new(clip.causal_text().unwrap(), &tokenizer, texts, 4).unwrap().encode(&context).unwrap();
            let all = Tensor::cat(&texts.iter().map(encode).collect::<Vec<_>>(), 0);
            (&all * &all * &all).sum(Kind::Float).backward();
            context.grad()
        };
        let texts = texts();
        let (packed, alone) = (gradient(&[&texts]), gradient(&texts.chunks(1).collect::<Vec<_>>()));
        let apart = error(&packed, &alone) / alone.abs().max().double_value(&[]);
        println!("gradients: {apart:.1e}");
        assert!(apart < 1e-4, "{apart}");
    }

    #[test]
    fn a_text_that_leaves_no_room_for_the_context_is_refused_by_name() {
        let ((_weights, clip), tokenizer) = (clip(), Tokenizer::clip());
        let refusal = |texts: &[String]| Prompted::new(clip.causal_text().unwrap(), &tokenizer, texts, 4).unwrap_err().to_string();
        assert!(Prompted::new(clip.causal_text().unwrap(), &tokenizer, &["dog ".repeat(71)], 4).is_ok());
        let long = "dog ".repeat(72);
        assert_eq!(
            refusal(&["cat".into(), long.clone()]),
            format!("text: expected at most 73 tokens beside 4 of context, found 74 tokens in {long:?}")
        );
        assert_eq!(refusal(&[]), "texts: expected at least one, found none");
        let prompted = Prompted::new(clip.causal_text().unwrap(), &tokenizer, &["cat"], 4).unwrap();
        let context = Tensor::zeros([3, 32], (Kind::Float, Device::Cpu));
        assert_eq!(prompted.encode(&context).unwrap_err().to_string(), "context: expected f32 [4, 32], found Float [3, 32]");
    }
}
