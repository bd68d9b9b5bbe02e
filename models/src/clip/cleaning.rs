//! Cleans a text as CLIP's tokenizer does before it looks for words: repairs broken characters, decodes HTML entities, collapses spaces,
//! lowers.
//!
//! The repair follows ftfy 6.3 (Robyn Speer, Apache-2.0; its tables lie in `assets/ftfy`): text that was encoded as UTF-8 and decoded as
//! something else is decoded again, where a pattern of unlikely sequences says that it was. The HTML rules are those of Python's
//! `html.unescape`.
//!
//! Differs from ftfy in that a line is repaired whole, however long (ftfy cuts it at a million characters), and in that strings here cannot
//! hold lone surrogates.

use std::{borrow::Cow, collections::BTreeMap};

use htmlize::ENTITIES;
use regex::{Captures, Regex, bytes};
use serde::Deserialize;
use unicode_normalization::UnicodeNormalization;

/// The data of ftfy, as `tests/golden/tokenizer/make.py` writes it.
#[derive(Deserialize)]
struct Tables {
    /// A pattern of sequences that are unlikely in any language.
    badness: String,
    /// Characters that bytes of UTF-8 are mistaken for, by their place in a sequence.
    clues: BTreeMap<String, String>,
    /// One-byte encodings, in the order in which they are tried: name, and what bytes 80 to FF stand for.
    encodings: Vec<(String, String)>,
}

/// The patterns and tables of the cleaning, compiled.
#[derive(Debug)]
pub(super) struct Cleaner {
    badness: Regex,
    double_encoded: Regex,
    continuations: Regex,
    encodings: Vec<Encoding>,
    space_for_a0: bytes::Regex,
    lost_bytes: bytes::Regex,
    terminal_escape: Regex,
    plain_entity: Regex,
    any_entity: Regex,
}

impl Cleaner {
    pub(super) fn new() -> Self {
        let tables: Tables =
            serde_json::from_str(include_str!("../../assets/ftfy/tables.json")).expect("BUG: the tables of ftfy are well-formed");
        let regex = |pattern: &str| Regex::new(pattern).expect("BUG: a pattern of our own compiles");
        let byte_regex = |pattern: &str| bytes::Regex::new(pattern).expect("BUG: a pattern of our own compiles");
        let clue = |name: &str| format!("[{}]", tables.clues[name]);
        let next = clue("utf8_continuation");
        let (two, three, four) = (clue("utf8_first_of_2"), clue("utf8_first_of_3"), clue("utf8_first_of_4"));
        Self {
            badness: regex(&tables.badness),
            double_encoded: regex(&format!("(?:{two}{next}|{three}{next}{{2}}|{four}{next}{{3}})+")),
            continuations: regex(&clue("utf8_continuation_strict")),
            encodings: tables.encodings.iter().map(|(name, upper_half)| Encoding::new(name, upper_half)).collect(),
            space_for_a0: byte_regex(
                &[
                    r"(?-u)[\xc2\xc3\xc5\xce\xd0\xd9][ ]",
                    r"(?-u)[\xe2\xe3][ ][\x80-\x84\x86-\x9f\xa1-\xbf]",
                    r"(?-u)[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf][ ]",
                    r"(?-u)\xf0[ ][\x80-\xbf][\x80-\xbf]",
                    r"(?-u)\xf0[\x80-\xbf][ ][\x80-\xbf]",
                    r"(?-u)\xf0[\x80-\xbf][\x80-\xbf][ ]",
                ]
                .join("|"),
            ),
            lost_bytes: byte_regex(
                &[
                    r"(?-u)[\xc2-\xdf]\x1a",
                    r"(?-u)[\xc2\xc3][?]",
                    r"(?-u)\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]",
                    r"(?-u)\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]",
                    r"(?-u)[\xe0-\xef][\x1a?][\x1a\x80-\xbf]",
                    r"(?-u)[\xe0-\xef][\x1a\x80-\xbf][\x1a?]",
                    r"(?-u)[\xf0-\xf4][\x1a?][\x1a\x80-\xbf][\x1a\x80-\xbf]",
                    r"(?-u)[\xf0-\xf4][\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf]",
                    r"(?-u)[\xf0-\xf4][\x1a\x80-\xbf][\x1a\x80-\xbf][\x1a?]",
                    r"(?-u)\x1a",
                ]
                .join("|"),
            ),
            terminal_escape: regex(r"\x1b\[[\d;]*[a-zA-Z]"),
            plain_entity: regex("&#?[0-9A-Za-z]{1,24};"),
            any_entity: regex(r"&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)"),
        }
    }

    /// The whole cleaning.
    pub(super) fn clean(&self, text: &str) -> String {
        let repaired = self.repair(text);
        let decoded = self.unescape(&self.unescape(&repaired)).into_owned();
        let words = decoded.split(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)).filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join(" ").to_lowercase()
    }

    /// ftfy's `fix_text` with its default settings, line by line.
    fn repair(&self, text: &str) -> String {
        let mut decodes_entities = true;
        let mut repaired = String::with_capacity(text.len());
        for line in text.split_inclusive('\n') {
            // A literal < means that this is HTML, whose entities are meant; it is so for the lines that follow, too.
            decodes_entities &= !line.contains('<');
            let mut line = line.to_owned();
            loop {
                let once = self.repair_once(&line, decodes_entities);
                if once == line {
                    break;
                }
                line = once;
            }
            repaired += &line;
        }
        repaired
    }

    fn repair_once(&self, line: &str, decodes_entities: bool) -> String {
        let line = if decodes_entities { self.unescape_plain(line) } else { Cow::Borrowed(line) };
        let line = self.fix_encoding(&line);
        let mut plain = String::with_capacity(line.len());
        for c in line.chars() {
            replace_character(self.windows_1252_of(c), &mut plain);
        }
        let plain = plain.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        let plain = self.terminal_escape.replace_all(&plain, "");
        plain.chars().filter(|&c| !is_unwanted_control(c)).nfc().collect()
    }

    /// Decodes a text again until nothing in it looks wrongly decoded.
    fn fix_encoding(&self, text: &str) -> String {
        let mut text = text.to_owned();
        while let Some(fixed) = self.fix_encoding_once(&text).filter(|fixed| *fixed != text) {
            text = fixed;
        }
        text
    }

    fn fix_encoding_once(&self, text: &str) -> Option<String> {
        if text.is_ascii() || !self.badness.is_match(text) {
            return None;
        }
        for encoding in &self.encodings {
            let Some(mut bytes) = encoding.encode(text) else { continue };
            // In MacRoman a space would follow an en dash too often.
            if encoding.name != "macroman" && self.space_for_a0.is_match(&bytes) {
                bytes = self.restore_a0(&bytes);
            }
            if encoding.is_sloppy() {
                bytes = self.lost_bytes.replace_all(&bytes, "\u{fffd}".as_bytes()).into_owned();
            }
            if let Some(fixed) = decode_utf8_variants(&bytes) {
                return Some(fixed);
            }
        }
        if let Some(fixed) = self.fix_embedded(text) {
            return Some(fixed);
        }
        // Latin-1 that was meant as Windows-1252: the two differ in what Latin-1 calls C1 controls.
        let has_c1 = text.chars().any(|c| ('\u{80}'..='\u{9f}').contains(&c));
        has_c1.then(|| text.chars().map(|c| self.windows_1252_of(c)).collect())
    }

    /// Fixes wrongly decoded parts of a text that no single encoding explains.
    fn fix_embedded(&self, text: &str) -> Option<String> {
        let mut fixed = String::with_capacity(text.len());
        let (mut copied, mut from) = (0, 0);
        while let Some(found) = self.double_encoded.find_at(text, from) {
            let first_len = found.as_str().chars().next().map_or(1, char::len_utf8);
            if self.ends_in_continuation(&text[..found.start()]) {
                from = found.start() + first_len;
                continue;
            }
            fixed += &text[copied..found.start()];
            // Only a part: the whole would come back here forever.
            if found.len() < text.len() && self.badness.is_match(found.as_str()) {
                fixed += &self.fix_encoding(found.as_str());
            } else {
                fixed += found.as_str();
            }
            (copied, from) = (found.end(), found.end());
        }
        fixed += &text[copied..];
        (fixed != text).then_some(fixed)
    }

    fn ends_in_continuation(&self, text: &str) -> bool {
        text.char_indices().next_back().is_some_and(|(start, _)| self.continuations.is_match(&text[start..]))
    }

    /// Restores byte A0 where it was replaced by a space.
    fn restore_a0(&self, bytes: &[u8]) -> Vec<u8> {
        // `à` that stands alone keeps its space; `às` and `àquele` are Portuguese words.
        const WORDS: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
        let mut restored = Vec::with_capacity(bytes.len() + 1);
        let mut rest = bytes;
        while let Some((&byte, after)) = rest.split_first() {
            restored.push(byte);
            rest = after;
            if let (0xc3, Some(tail)) = (byte, after.strip_prefix(b" "))
                && !WORDS.iter().any(|word| tail.starts_with(word))
            {
                restored.extend(b"\xa0 ");
                rest = tail;
            }
        }
        let to_a0 = |found: &bytes::Captures<'_>| found[0].iter().map(|&byte| if byte == b' ' { 0xa0 } else { byte }).collect::<Vec<_>>();
        self.space_for_a0.replace_all(&restored, to_a0).into_owned()
    }

    /// The character of a C1 control in Windows-1252; other characters are unchanged.
    fn windows_1252_of(&self, c: char) -> char {
        match (c as u32).checked_sub(0x80) {
            Some(index) if index < 0x20 => self.windows_1252().upper_half[index as usize],
            _ => c,
        }
    }

    fn windows_1252(&self) -> &Encoding {
        self.encodings.iter().find(|encoding| encoding.name == "sloppy-windows-1252").expect("BUG: the tables hold Windows-1252")
    }

    /// Decodes the entities that leave no doubt: those that end in a semicolon, and Latin ones in capitals (`&NTILDE;`).
    fn unescape_plain<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.plain_entity.replace_all(text, |found: &Captures<'_>| {
            let entity = &found[0];
            if let Some(expansion) = expansion(entity) {
                return expansion.to_owned();
            }
            let unescaped = self.unescape(entity);
            if entity.starts_with("&#") {
                // Something other than the whole was decoded.
                return if unescaped.contains(';') { entity.to_owned() } else { unescaped.into_owned() };
            }
            let lower = entity.to_ascii_lowercase();
            match expansion(&lower) {
                Some(expansion) if lower.to_ascii_uppercase() == entity && unescaped == entity => expansion.to_uppercase(),
                _ => entity.to_owned(),
            }
        })
    }

    /// Python's `html.unescape`.
    fn unescape<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.any_entity.replace_all(text, |found: &Captures<'_>| {
            let entity = &found[0];
            match entity.strip_prefix("&#") {
                Some(number) => self.numbered(number.trim_end_matches(';')),
                None => named(entity),
            }
        })
    }

    fn numbered(&self, digits: &str) -> String {
        let (digits, radix) = digits.strip_prefix(['x', 'X']).map_or((digits, 10), |digits| (digits, 16));
        let number = digits.chars().filter_map(|c| c.to_digit(radix)).fold(0_u32, |n, digit| n.saturating_mul(radix).saturating_add(digit));
        match number {
            0 => '\u{fffd}'.into(),
            0x80..=0x9f => self.windows_1252().upper_half[number as usize - 0x80].into(),
            0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
            _ if number <= 0x10_ffff && number & 0xfffe == 0xfffe => String::new(),
            _ => char::from_u32(number).unwrap_or('\u{fffd}').into(),
        }
    }
}

/// A named entity, or the longest beginning of it that is one.
fn named(entity: &str) -> String {
    // The ampersand and two letters are the least.
    let ends = entity.char_indices().map(|(start, c)| start + c.len_utf8()).skip(2).collect::<Vec<_>>();
    for end in ends.into_iter().rev() {
        if let Some(expansion) = expansion(&entity[..end]) {
            return format!("{expansion}{}", &entity[end..]);
        }
    }
    entity.to_owned()
}

/// The characters of an entity, spelled as in the HTML standard with its ampersand.
fn expansion(entity: &str) -> Option<&'static str> {
    ENTITIES.get(entity.as_bytes()).map(|expansion| str::from_utf8(expansion).expect("BUG: entities stand for text"))
}

/// Ligatures of Latin letters, wide and narrow forms, and curled quotes become what they stand for.
fn replace_character(c: char, plain: &mut String) {
    match c {
        'Ĳ' => plain.push_str("IJ"),
        'ĳ' => plain.push_str("ij"),
        'ŉ' => plain.push_str("'n"),
        'Ǳ' => plain.push_str("DZ"),
        'ǲ' => plain.push_str("Dz"),
        'ǳ' => plain.push_str("dz"),
        'Ǆ' => plain.push_str("DŽ"),
        'ǅ' => plain.push_str("Dž"),
        'ǆ' => plain.push_str("dž"),
        'Ǉ' => plain.push_str("LJ"),
        'ǈ' => plain.push_str("Lj"),
        'ǉ' => plain.push_str("lj"),
        'Ǌ' => plain.push_str("NJ"),
        'ǋ' => plain.push_str("Nj"),
        'ǌ' => plain.push_str("nj"),
        'ﬀ' => plain.push_str("ff"),
        'ﬁ' => plain.push_str("fi"),
        'ﬂ' => plain.push_str("fl"),
        'ﬃ' => plain.push_str("ffi"),
        'ﬄ' => plain.push_str("ffl"),
        'ﬅ' => plain.push_str("ſt"),
        'ﬆ' => plain.push_str("st"),
        '\u{3000}' => plain.push(' '),
        '\u{ff01}'..='\u{ffef}' => plain.extend(c.nfkc()),
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => plain.push('\''),
        '\u{201c}'..='\u{201f}' => plain.push('"'),
        _ => plain.push(c),
    }
}

/// Controls that have no visible effect.
fn is_unwanted_control(c: char) -> bool {
    matches!(c, '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f' | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

/// Decodes UTF-8, also where null is written in two bytes (as Java does) and where characters above U+FFFF are written as two surrogates
/// (CESU-8).
fn decode_utf8_variants(bytes: &[u8]) -> Option<String> {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes;
    loop {
        let special = rest.windows(2).position(|pair| matches!(pair, [0xc0, 0x80] | [0xed, 0xa0..=0xaf]));
        let (plain, variant) = rest.split_at(special.unwrap_or(rest.len()));
        text.push_str(str::from_utf8(plain).ok()?);
        match *variant {
            [] => return Some(text),
            [0xc0, 0x80, ..] => {
                text.push('\0');
                rest = &variant[2..];
            }
            [0xed, high @ 0xa0..=0xaf, middle @ 0x80..=0xbf, 0xed, low @ 0xb0..=0xbf, last @ 0x80..=0xbf, ..] => {
                let bits = |byte: u8, mask: u8| u32::from(byte & mask);
                text.push(char::from_u32(
                    0x1_0000 + (bits(high, 0xf) << 16) + (bits(middle, 0x3f) << 10) + (bits(low, 0xf) << 6) + bits(last, 0x3f),
                )?);
                rest = &variant[6..];
            }
            _ => return None,
        }
    }
}

/// An encoding of one byte per character whose lower half is ASCII.
#[derive(Debug)]
struct Encoding {
    name: String,
    /// The characters of bytes 80 to FF.
    upper_half: Vec<char>,
    bytes: BTreeMap<char, u8>,
}

impl Encoding {
    fn new(name: &str, upper_half: &str) -> Self {
        let upper_half: Vec<char> = upper_half.chars().collect();
        let bytes = upper_half.iter().copied().zip(0x80..=0xff).collect();
        Self { name: name.to_owned(), upper_half, bytes }
    }

    /// Sloppy encodings keep unassigned bytes as they are, and write a replacement character as byte 1A.
    fn is_sloppy(&self) -> bool {
        self.name.starts_with("sloppy")
    }

    fn encode(&self, text: &str) -> Option<Vec<u8>> {
        let encode = |c| match c {
            '\x1a' if self.is_sloppy() => None,
            '\u{fffd}' if self.is_sloppy() => Some(0x1a),
            '\0'..='\x7f' => Some(c as u8),
            _ => self.bytes.get(&c).copied(),
        };
        text.chars().map(encode).collect()
    }
}
