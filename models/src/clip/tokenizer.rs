//! The byte-pair tokenizer of CLIP: 49,408 tokens, of which the last two mark the start and the end of a text.
//!
//! Equal to open_clip's `SimpleTokenizer` with its default cleaning. The vocabulary is OpenAI's, and compiled in.

use tch::Tensor;

use super::cleaning::Cleaner;
use crate::{Error, Result};

/// The tokens that the text towers of all published CLIPs take at most, start and end included.
pub const CONTEXT: usize = 77;
/// The number of different tokens.
pub const VOCABULARY: u32 = 49_408;
/// Opens every text.
pub const START_OF_TEXT: u32 = 49_406;
/// Closes every text; the largest token, so that a text tower finds it as the row's maximum.
pub const END_OF_TEXT: u32 = 49_407;

/// How long the rows of a batch are. What a row does not fill is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// As long as the context: 77.
    Context77,
    /// As long as the longest text of the batch.
    Longest,
}

/// What becomes of a text of more than 77 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// It is an error that names the text.
    Refuse,
    /// Its first 76 tokens are kept, and the end of text put after them, as open_clip does.
    Truncate,
}

/// Turns text into tokens. Making one takes a tenth of a second: make it once.
pub struct Tokenizer {
    cleaner: Cleaner,
    pairs: instant_clip_tokenizer::Tokenizer,
}

impl Tokenizer {
    /// The tokenizer of all published CLIPs.
    pub fn new() -> Self {
        Self { cleaner: Cleaner::new(), pairs: instant_clip_tokenizer::Tokenizer::new() }
    }

    /// The tokens of a text, whatever its length, between start and end.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut tokens = vec![self.pairs.start_of_text()];
        // Python's pattern ignores case: to it the combining iota is a letter here and none there, so that it only ends a word.
        let cleaned = self.cleaner.clean(text).replace('\u{345}', " ");
        self.pairs.encode(&cleaned, &mut tokens);
        tokens.push(self.pairs.end_of_text());
        tokens.into_iter().map(|token| u32::from(token.to_u16())).collect()
    }

    /// The tokens of texts, i64 `[B, L]` on the CPU, one row per text in their order; L is at most 77.
    ///
    /// Fails if a text has more than 77 tokens and `overlong` refuses it.
    pub fn batch(&self, texts: &[impl AsRef<str>], padding: Padding, overlong: Overlong) -> Result<Tensor> {
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts.iter().map(AsRef::as_ref) {
            let mut tokens = self.encode(text);
            if tokens.len() > CONTEXT {
                if overlong == Overlong::Refuse {
                    let beginning: String = text.chars().take(40).collect();
                    return Err(Error::Input {
                        what: "text",
                        expected: format!("at most {CONTEXT} tokens"),
                        found: format!("{} tokens in {beginning:?}...", tokens.len()),
                    });
                }
                tokens.truncate(CONTEXT - 1);
                tokens.push(END_OF_TEXT);
            }
            rows.push(tokens);
        }
        let length = match padding {
            Padding::Context77 => CONTEXT,
            Padding::Longest => rows.iter().map(Vec::len).max().unwrap_or(0),
        };
        let flat: Vec<i64> =
            rows.iter().flat_map(|row| row.iter().map(|&token| i64::from(token)).chain(std::iter::repeat(0)).take(length)).collect();
        Ok(Tensor::from_slice(&flat).reshape([rows.len() as i64, length as i64]))
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
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
        let tokenizer = Tokenizer::new();
        let rows: Vec<(String, Vec<u32>)> = golden("strings.json");
        assert!(rows.len() >= 500);
        let wrong: BTreeMap<_, _> = rows
            .iter()
            .map(|(text, expected)| (text, expected, tokenizer.encode(text)))
            .filter(|(text, expected, found)| (*expected == found) == UNEQUAL.contains(&text.as_str()))
            .map(|(text, expected, found)| (text, (tokenizer.cleaner.clean(text), expected, found)))
            .collect();
        assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), rows.len());
    }

    #[test]
    fn long_texts_are_cut_as_open_clip_cuts_them() {
        let (texts, expected): (Vec<String>, Vec<Vec<i64>>) = golden::<Vec<_>>("batch.json").into_iter().unzip();
        let found = Tokenizer::new().batch(&texts, Padding::Context77, Overlong::Truncate).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(&found).unwrap(), expected);
    }

    #[test]
    fn a_batch_is_as_long_as_its_longest_text_or_as_the_context() {
        let tokenizer = Tokenizer::new();
        let longest = tokenizer.batch(&["a dog", "a"], Padding::Longest, Overlong::Refuse).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(&longest).unwrap(), [[49406, 320, 1929, 49407], [49406, 320, 49407, 0]]);
        let context = tokenizer.batch(&["a dog", "a"], Padding::Context77, Overlong::Refuse).unwrap();
        assert_eq!(context.size(), [2, 77]);
        assert_eq!(context.narrow(1, 0, 4), longest);
        assert_eq!(context.narrow(1, 4, 73).count_nonzero(None).int64_value(&[]), 0);
    }

    #[test]
    fn a_text_of_78_tokens_is_refused_by_name() {
        let tokenizer = Tokenizer::new();
        let texts = ["dog ".repeat(75), "dog ".repeat(76)];
        assert!(tokenizer.batch(&texts[..1], Padding::Longest, Overlong::Refuse).is_ok());
        let error = tokenizer.batch(&texts, Padding::Longest, Overlong::Refuse).unwrap_err();
        assert_eq!(
            error.to_string(),
            "text: expected at most 77 tokens, found 78 tokens in \"dog dog dog dog dog dog dog dog dog dog \"..."
        );
    }
}
