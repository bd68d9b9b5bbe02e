//! Tokenizers: texts to rows of tokens, as the text tower of a CLIP takes them.
//!
//! [`Tokenizer::clip`] is the byte-pair tokenizer of CLIP: 49,408 tokens, of which the last two mark the start and the end of a text. It
//! equals open_clip's `SimpleTokenizer` with its default cleaning. The vocabulary is OpenAI's, and compiled in.

use std::{fmt, iter};

use tch::Tensor;

use super::cleaning::Cleaner;
use crate::{Error, Result};

/// The longest row of the text towers of OpenAI's CLIPs, start and end included.
pub const CONTEXT: usize = 77;
/// The number of different tokens of CLIP.
pub const VOCABULARY: u32 = 49_408;
/// Opens every text of CLIP.
pub const START_OF_TEXT: u32 = 49_406;
/// Closes every text of CLIP; the largest token, so that a text tower finds it as the row's maximum.
pub const END_OF_TEXT: u32 = 49_407;

/// The length of the rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// As long as the context.
    Context,
    /// As long as the longest text of the batch; for towers in which padding has no influence.
    Longest,
}

/// What happens to a text that is longer than the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// An error that names the text.
    Refuse,
    /// It is cut, and ends as every text does, as in open_clip.
    Truncate,
}

/// Splits texts into tokens.
pub trait Encode: Send + Sync {
    /// The tokens of a text, whatever its length, with the tokens that mark its start and its end.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// The token that ends every text, which a cut text keeps.
    fn end(&self) -> u32;
}

/// Turns texts into rows of tokens.
pub struct Tokenizer {
    words: Box<dyn Encode>,
    context: usize,
    padding: Padding,
    /// Fills rows up.
    pad: u32,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer of at most {} tokens", self.context)
    }
}

impl Tokenizer {
    /// CLIP's, with rows of at most 77 tokens, padded with zeros to the longest. It takes a tenth of a second: make it once.
    pub fn clip() -> Self {
        let pairs = BytePairs { cleaner: Cleaner::new(), pairs: instant_clip_tokenizer::Tokenizer::new() };
        Self::new(pairs, CONTEXT, Padding::Longest, 0)
    }

    /// A tokenizer with rows of at most `context` tokens, filled up with `pad`.
    pub fn new(words: impl Encode + 'static, context: usize, padding: Padding, pad: u32) -> Self {
        Self { words: Box::new(words), context, padding, pad }
    }

    /// The same tokenizer with another longest row.
    #[must_use]
    pub fn with_context(self, context: usize) -> Self {
        Self { context, ..self }
    }

    /// The same tokenizer with another length of rows.
    #[must_use]
    pub fn with_padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// The tokens of a text, whatever its length, with its start and end.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.words.encode(text)
    }

    /// The tokens of texts, i64 `[B, L]` on the CPU, one row per text in their order; L is at most the context.
    ///
    /// Fails if a text is longer than the context and `overlong` refuses it.
    pub fn batch(&self, texts: &[impl AsRef<str>], overlong: Overlong) -> Result<Tensor> {
        let context = self.context;
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts.iter().map(AsRef::as_ref) {
            let mut tokens = self.encode(text);
            if tokens.len() > context {
                if overlong == Overlong::Refuse {
                    let beginning: String = text.chars().take(40).collect();
                    return Err(Error::Input {
                        what: "text",
                        expected: format!("at most {context} tokens"),
                        found: format!("{} tokens in {beginning:?}...", tokens.len()),
                    });
                }
                tokens.truncate(context.saturating_sub(1));
                tokens.push(self.words.end());
            }
            rows.push(tokens);
        }
        let length = match self.padding {
            Padding::Context => context,
            Padding::Longest => rows.iter().map(Vec::len).max().unwrap_or(0),
        };
        let padded = |row: Vec<u32>| row.into_iter().chain(iter::repeat(self.pad)).take(length).map(i64::from);
        let n_rows = rows.len() as i64;
        let flat: Vec<i64> = rows.into_iter().flat_map(padded).collect();
        Ok(Tensor::from_slice(&flat).reshape([n_rows, length as i64]))
    }
}

/// CLIP's byte pairs.
struct BytePairs {
    cleaner: Cleaner,
    pairs: instant_clip_tokenizer::Tokenizer,
}

impl Encode for BytePairs {
    fn encode(&self, text: &str) -> Vec<u32> {
        let mut tokens = vec![self.pairs.start_of_text()];
        // Python's pattern ignores case: to it the combining iota is a letter here and none there, so that it only ends a word.
        let cleaned = self.cleaner.clean(text).replace('\u{345}', " ");
        self.pairs.encode(&cleaned, &mut tokens);
        tokens.push(self.pairs.end_of_text());
        tokens.into_iter().map(|token| u32::from(token.to_u16())).collect()
    }

    fn end(&self) -> u32 {
        END_OF_TEXT
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use serde::de::DeserializeOwned;

    use super::*;

    fn golden<T: DeserializeOwned>(name: &str) -> T {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tokenizer").join(name);
        serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap()
    }

    /// Python's pattern ignores case, so a long s after an apostrophe counts as the contraction 's; here, where texts are lower-case already,
    /// it is a word of its own.
    const UNEQUAL: [&str; 1] = ["ſhip 'ſ it'ſ"];

    #[test]
    fn five_hundred_hard_strings_have_the_tokens_of_open_clip() {
        let tokenizer = Tokenizer::clip();
        let rows: Vec<(String, Vec<u32>)> = golden("strings.json");
        assert!(rows.len() >= 500);
        let wrong: BTreeMap<_, _> = rows
            .iter()
            .map(|(text, expected)| (text, expected, tokenizer.encode(text)))
            .filter(|(text, expected, found)| (*expected == found) == UNEQUAL.contains(&text.as_str()))
            .map(|(text, expected, found)| (text, (Cleaner::new().clean(text), expected, found)))
            .collect();
        assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), rows.len());
    }

    #[test]
    fn long_texts_are_cut_as_open_clip_cuts_them() {
        let (texts, expected): (Vec<String>, Vec<Vec<i64>>) = golden::<Vec<_>>("batch.json").into_iter().unzip();
        let found = Tokenizer::clip().with_padding(Padding::Context).batch(&texts, Overlong::Truncate).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(&found).unwrap(), expected);
    }

    #[test]
    fn a_batch_is_as_long_as_its_longest_text_or_as_the_context() {
        let tokenizer = Tokenizer::clip();
        let longest = tokenizer.batch(&["a dog", "a"], Overlong::Refuse).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(&longest).unwrap(), [[49406, 320, 1929, 49407], [49406, 320, 49407, 0]]);
        let context = tokenizer.with_padding(Padding::Context).batch(&["a dog", "a"], Overlong::Refuse).unwrap();
        assert_eq!(context.size(), [2, 77]);
        assert_eq!(context.narrow(1, 0, 4), longest);
        assert_eq!(context.narrow(1, 4, 73).count_nonzero(None).int64_value(&[]), 0);
    }

    #[test]
    fn a_text_of_78_tokens_is_refused_by_name() {
        let tokenizer = Tokenizer::clip();
        let texts = ["dog ".repeat(75), "dog ".repeat(76)];
        assert!(tokenizer.batch(&texts[..1], Overlong::Refuse).is_ok());
        let error = tokenizer.batch(&texts, Overlong::Refuse).unwrap_err();
        assert_eq!(
            error.to_string(),
            "text: expected at most 77 tokens, found 78 tokens in \"dog dog dog dog dog dog dog dog dog dog \"..."
        );
    }
}
