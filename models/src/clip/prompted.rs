//! Texts with shared vectors in place of words: a learned context (CoOp, Zhou et al. 2022; OADP, section 5.2; DetPro, section 3.2).
//!
//! The vectors are trained while the tower is frozen, so every training step embeds every text again. No token attends to later tokens, so the
//! start of text and the context before a text have the same features in all texts, and texts are packed: a pack is one row of tokens, `start,
//! context, words of one text, words of the next, ...`, in which words stand at the positions that they have alone, and see the beginning and
//! what goes before them in their own text. What is computed is the beginning once a pack and no padding: of COCO's 48 base classes 150 tokens
//! instead of 385 (432 with padding), of LVIS's 1,203 classes 4,660 instead of 10,585 (19,248).
//!
//! Context that stands behind a name is no part of the beginning: it is computed with the words of each text.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{text::Text, tokenizer::Tokenizer, transformer::Attention};
use crate::{Error, Result};

/// Tokens of a pack at most, all texts together. Attention is quadratic in a pack: at 512 channels and 256 tokens a twelfth of the work.
const PACK_WORDS: usize = 256;

/// Where a class name stands among the context vectors. The full stop after both ends the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NamePlace {
    /// After all of them (published).
    #[default]
    End,
    /// After the first half, rounded down.
    Middle,
    /// Before all of them.
    Front,
}

impl NamePlace {
    /// How many of so many context vectors stand before the name.
    fn n_before(self, n_context: usize) -> usize {
        match self {
            Self::End => n_context,
            Self::Middle => n_context / 2,
            Self::Front => 0,
        }
    }
}

/// Texts with shared vectors, ready to be embedded again and again.
#[derive(Debug)]
pub struct Prompted<'a> {
    text: &'a Text,
    /// The start of text in its place, `[1, C]`.
    start: Tensor,
    /// The number M of context vectors.
    n_context: usize,
    /// Of the context before the texts, `[B, C]`, B at most M.
    positions: Tensor,
    packs: Vec<Pack>,
}

/// Texts that go through the tower in one row.
#[derive(Debug)]
struct Pack {
    /// All but the beginning, in their places: `[W, C]`; where context stands its position alone.
    words: Tensor,
    /// `[W, M - B]`: 1 where a token is this vector of the context behind a name. `None` where B is M.
    behind: Option<Tensor>,
    /// `[1 + B + W, 1 + B + W]`: 0 where a token looks, minus infinity elsewhere.
    mask: Tensor,
    /// Where each text ends, i64.
    ends: Tensor,
}

/// The tokens of a text without its start, and before how many of them the context goes on.
struct Words {
    tokens: Vec<u32>,
    n_name: usize,
}

impl Text {
    /// The channels C of a token, and of a context vector.
    pub fn width(&self) -> i64 {
        self.config.width
    }

    /// The embeddings of the tokens of some words, f32 `[M, C]`, without start and end: first values of a context.
    pub fn words(&self, tokenizer: &Tokenizer, words: &str) -> Result<Tensor> {
        let tokens = tokenizer.encode(words);
        self.embedded(&tokens[1..tokens.len() - 1])
    }
}

impl<'a> Prompted<'a> {
    /// Prepares texts to follow `n_context` vectors, in a tower on any device. An empty text is the vectors and the end of text alone.
    ///
    /// Fails if there are none, and if a text does not fit the tower's context beside the vectors.
    pub fn new(text: &'a Text, tokenizer: &Tokenizer, texts: &[impl AsRef<str>], n_context: usize) -> Result<Self> {
        let words = |text: &str| Words { tokens: tokenizer.encode(text), n_name: 0 };
        Self::of(text, texts.iter().map(|text| (text.as_ref(), words(text.as_ref()))), n_context, n_context)
    }

    /// Prepares class names, each with a full stop behind it and the context at `place`. Fails as [`Self::new`].
    pub fn named(text: &'a Text, tokenizer: &Tokenizer, names: &[impl AsRef<str>], n_context: usize, place: NamePlace) -> Result<Self> {
        let words = |name: &str| Words { tokens: tokenizer.encode(&format!("{name}.")), n_name: tokenizer.encode(name).len() - 2 };
        Self::of(text, names.iter().map(|name| (name.as_ref(), words(name.as_ref()))), n_context, place.n_before(n_context))
    }

    /// Prepares class names with descriptions: `n_context` vectors before a name and as many others between it and its description, which ends with a
    /// full stop. (PromptDet, section 5.) Fails as [`Self::new`].
    pub fn described(
        text: &'a Text,
        tokenizer: &Tokenizer,
        names: &[(impl AsRef<str>, impl AsRef<str>)],
        n_context: usize,
    ) -> Result<Self> {
        let words = |name: &str, description: &str| {
            let n_name = tokenizer.encode(name).len() - 2;
            // With words in place of the vectors, so that words next to one another are no others than in the whole text.
            let vectors = "X ".repeat(n_context);
            let text = format!("{vectors}{name} {vectors}{description}.");
            let mut tokens = tokenizer.encode(&text);
            tokens.drain(1 + n_context + n_name..1 + 2 * n_context + n_name);
            tokens.drain(1..1 + n_context);
            (text, Words { tokens, n_name })
        };
        let texts = names.iter().map(|(name, description)| words(name.as_ref(), description.as_ref()));
        Self::of(text, texts, 2 * n_context, n_context)
    }

    /// `texts`: each with its tokens, the start of text among them; `n_before`: vectors before a text.
    fn of(text: &'a Text, texts: impl Iterator<Item = (impl AsRef<str>, Words)>, n_context: usize, n_before: usize) -> Result<Self> {
        let most = usize::try_from(text.config.context).unwrap_or(0).saturating_sub(n_context);
        let (mut start, mut rows) = (None, Vec::new());
        for (text, mut words) in texts {
            if words.tokens.len() > most {
                return Err(Error::Input {
                    what: "text",
                    expected: format!("at most {most} tokens beside {n_context} of context"),
                    found: format!("{} tokens in {:?}", words.tokens.len(), text.as_ref()),
                });
            }
            start = Some(words.tokens.remove(0));
            rows.push(words);
        }
        let Some(start) = start else {
            return Err(Error::Input { what: "texts", expected: "at least one".into(), found: "none".into() });
        };
        let start = text.embedded(&[start])? + text.positional_embedding.narrow(0, 0, 1);
        let positions = text.positional_embedding.narrow(0, 1, n_before as i64);
        let n_behind = n_context - n_before;
        let n_tokens = |words: &Words| words.tokens.len() + n_behind;
        let mut packs: Vec<Vec<&Words>> = Vec::new();
        for words in &rows {
            match packs.last_mut() {
                Some(pack) if pack.iter().map(|words| n_tokens(words)).sum::<usize>() + n_tokens(words) <= PACK_WORDS => pack.push(words),
                _ => packs.push(vec![words]),
            }
        }
        let packs = packs.iter().map(|pack| Pack::new(text, pack, 1 + n_before, n_behind)).collect::<Result<_>>()?;
        Ok(Self { text, start, n_context, positions, packs })
    }

    /// Embeds every text with `context`, f32 `[M, C]`: `[K, D]` in the compute kind, in the order of the texts, not normalised.
    ///
    /// Gradients flow to the context.
    pub fn encode(&self, context: &Tensor) -> Result<Tensor> {
        self.check(context)?;
        Ok(self.text.features(&Tensor::cat(&self.packs.iter().map(|pack| self.ends(pack, context)).collect::<Vec<_>>(), 0)))
    }

    /// The gradient of a number with respect to the context, f32 `[M, C]`, from that with respect to the embeddings, `[K, D]`.
    ///
    /// Packs go through the tower one after the other, so that memory does not grow with the number of texts; each is embedded again.
    pub fn gradient(&self, context: &Tensor, of_embeddings: &Tensor) -> Result<Tensor> {
        self.check(context)?;
        let context = context.detach().set_requires_grad(true);
        let (mut sum, mut first) = (context.zeros_like(), 0);
        for pack in &self.packs {
            let embeddings = self.text.features(&self.ends(pack, &context));
            let n = embeddings.size()[0];
            let product = (embeddings.to_kind(Kind::Float) * of_embeddings.narrow(0, first, n)).sum(Kind::Float);
            for gradient in Tensor::run_backward(&[product], &[&context], false, false) {
                sum += gradient;
            }
            first += n;
        }
        Ok(sum)
    }

    fn check(&self, context: &Tensor) -> Result<()> {
        let size = [self.n_context as i64, self.start.size()[1]];
        if context.size() != size || context.kind() != Kind::Float {
            let (expected, found) = (format!("f32 {size:?}"), format!("{:?} {:?}", context.kind(), context.size()));
            return Err(Error::Input { what: "context", expected, found });
        }
        Ok(())
    }

    /// The tokens that end the texts of a pack, `[N, C]`.
    fn ends(&self, pack: &Pack, context: &Tensor) -> Tensor {
        let n_before = self.positions.size()[0];
        let beginning = Tensor::cat(&[&self.start, &(context.narrow(0, 0, n_before) + &self.positions)], 0);
        let behind = context.narrow(0, n_before, self.n_context as i64 - n_before);
        // A product has the same gradient in every run, on every device; indices would add it up in any order.
        let words = pack.behind.as_ref().map_or_else(|| pack.words.shallow_clone(), |places| &pack.words + places.matmul(&behind));
        let x = Tensor::cat(&[&beginning, &words], 0).to_kind(self.text.projection.kind()).unsqueeze(0);
        self.text.transformer.forward(x, Attention::Masked(&pack.mask)).squeeze_dim(0).index_select(0, &pack.ends)
    }
}

impl Pack {
    /// `n_before`: tokens of the beginning; `n_behind`: vectors that stand behind each name.
    fn new(text: &Text, texts: &[&Words], n_before: usize, n_behind: usize) -> Result<Self> {
        let n_words = texts.iter().map(|words| words.tokens.len() + n_behind).sum::<usize>();
        let n_tokens = n_before + n_words;
        let (mut positions, mut ends, mut mask) = (Vec::new(), Vec::new(), vec![f32::NEG_INFINITY; n_tokens * n_tokens]);
        // Which of the words are tokens of the vocabulary, and which are vectors of the context.
        let (mut of_vocabulary, mut behind) = (Vec::new(), vec![0.0_f32; n_words * n_behind]);
        let mut looks = |token: usize, at: Range<usize>| mask[token * n_tokens..][at].fill(0.0);
        (0..n_before).for_each(|token| looks(token, 0..token + 1));
        let mut first = n_before;
        for Words { tokens, n_name } in texts {
            let n = tokens.len() + n_behind;
            for place in 0..n {
                let token = first + place;
                looks(token, 0..n_before);
                looks(token, first..token + 1);
                positions.push((n_before + place) as i64);
                match place.checked_sub(*n_name).filter(|vector| *vector < n_behind) {
                    Some(vector) => behind[(token - n_before) * n_behind + vector] = 1.0,
                    None => of_vocabulary.push((token - n_before) as i64),
                }
            }
            first += n;
            ends.push(first as i64 - 1);
        }
        let device = text.projection.device();
        let index = |places: &[i64]| Tensor::from_slice(places).to_device(device);
        let tokens: Vec<u32> = texts.iter().flat_map(|words| words.tokens.iter().copied()).collect();
        let positions = text.positional_embedding.index_select(0, &index(&positions));
        let words = positions.index_add(0, &index(&of_vocabulary), &text.embedded(&tokens)?);
        let side = n_tokens as i64;
        let mask = Tensor::from_slice(&mask).view([side, side]).to_device(device).to_kind(text.projection.kind());
        let behind = (n_behind > 0).then(|| Tensor::from_slice(&behind).view([-1, n_behind as i64]).to_device(device));
        Ok(Self { words, behind, mask, ends: index(&ends) })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, nn, no_grad};

    use super::*;
    use crate::{
        clip::{Activation, Clip, Config, ImageConfig, TextConfig, tests::small, tokenizer::Overlong},
        golden::{error, promptdet},
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
        // Pack by pack, from the gradient of the embeddings.
        let prompted = Prompted::new(clip.causal_text().unwrap(), &tokenizer, &texts, 4).unwrap();
        let context = clip.causal_text().unwrap().words(&tokenizer, "a photo of a").unwrap();
        let embeddings = prompted.encode(&context).unwrap();
        let by_packs = prompted.gradient(&context, &(&embeddings * &embeddings * 3.0)).unwrap();
        let (packed, alone) = (gradient(&[&texts]), gradient(&texts.chunks(1).collect::<Vec<_>>()));
        let apart = error(&packed, &alone) / alone.abs().max().double_value(&[]);
        println!("gradients: {apart:.1e}");
        // Large parts cancel in these sums, of f32 numbers in orders that differ by kernel: 2e-4 was seen.
        assert!(apart < 2e-3, "{apart}");
        assert!(error(&by_packs, &packed) / packed.abs().max().double_value(&[]) < 2e-3);
    }

    #[test]
    fn a_context_of_words_gives_what_the_words_give_at_every_place() {
        let ((_weights, clip), tokenizer) = (clip(), Tokenizer::clip());
        let text = clip.causal_text().unwrap();
        let names = texts().iter().map(|text| text.trim_end_matches('.').to_owned()).collect::<Vec<_>>();
        let context = text.words(&tokenizer, "red blue tall wide").unwrap();
        for (place, before, behind) in [
            (NamePlace::End, "red blue tall wide ", ""),
            (NamePlace::Middle, "red blue ", " tall wide"),
            (NamePlace::Front, "", " red blue tall wide"),
        ] {
            let prompted = Prompted::named(text, &tokenizer, &names, 4, place).unwrap();
            assert!(prompted.packs.len() > 1);
            let sentences: Vec<String> = names.iter().map(|name| format!("{before}{name}{behind}.")).collect();
            let expected = clip.encode_text_features(&tokenizer.batch(&sentences, Overlong::Refuse).unwrap()).unwrap();
            let apart = error(&to_unit_length(&prompted.encode(&context).unwrap()), &expected);
            assert!(apart < 1e-5, "{place:?}: {apart}");
        }
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

    /// RPL's own code: eight classes with descriptions that end in brackets, digits and "etc.", with one and with two vectors at each place; the loss of
    /// six images, and its gradients.
    #[test]
    fn described_names_are_embedded_as_by_rpl_s_code() {
        let golden = promptdet("rpl");
        let clip = small(&golden);
        let (text, tokenizer) = (clip.causal_text().unwrap(), clip.tokenizer());
        let lines = Vec::<u8>::try_from(&golden["prompt/classes_utf8"]).unwrap();
        let lines = String::from_utf8(lines).unwrap().replace('_', " ");
        let names: Vec<(&str, &str)> = lines.lines().filter_map(|line| line.split_once(" which is ")).collect();
        assert_eq!(names.len(), 8);
        for (prefix, n_context) in [("prompt1", 1), ("prompt2", 2)] {
            let expected = |name: &str| &golden[&format!("{prefix}/{name}")];
            let context = Tensor::cat(&[expected("ctx1"), expected("ctx2")], 0).set_requires_grad(true);
            let prompted = Prompted::described(text, tokenizer, &names, n_context).unwrap();
            let found = prompted.encode(&context).unwrap();
            let features = expected("text_features");
            let apart = error(&found, features) / (1.0 + features.abs().max().double_value(&[]));
            assert!(apart < 1e-4, "{prefix}: {apart}");
            let embeddings = found.detach().set_requires_grad(true);
            let logits = 4.6052_f64.exp() * to_unit_length(expected("image_features")).matmul(&to_unit_length(&embeddings).tr());
            let loss = logits.cross_entropy_for_logits(expected("labels"));
            assert!(error(&logits, expected("logits")) < 1e-4 * 101.0 && error(&loss, expected("loss")) < 1e-3);
            let of_embeddings = Tensor::run_backward(&[loss], &[&embeddings], false, false).remove(0);
            let gradient = prompted.gradient(&context, &of_embeddings).unwrap();
            let expected = Tensor::cat(&[expected("d_ctx1"), expected("d_ctx2")], 0);
            let apart = error(&gradient, &expected) / (1.0 + expected.abs().max().double_value(&[]));
            assert!(apart < 1e-3, "{prefix}: {apart}");
        }
    }
}
