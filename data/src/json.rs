//! The user's JSON files: read as exporters write them; errors name the place, `annotations[4].bbox[2]`.
//!
//! Whole numbers may be written as `1.0` or `"1"`, and a UTF-8 file may begin with a byte order mark. Everything else is as the standard
//! says: `NaN`, which Python writes, is refused by its place.

use std::fmt;

use serde::{Deserialize, Deserializer, de};

use crate::{content, words::plainly};

/// The byte order mark that editors on Windows write before UTF-8.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The greatest number below which f64 tells all whole numbers apart.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Why json cannot be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The fields and indices that lead to it, `annotations[4].bbox[2]`; empty for the file as a whole.
    pub place: String,
    /// What was expected, what was found, and the line.
    pub problem: String,
    /// The kind of the fault.
    pub kind: FaultKind,
}

/// The kind of a fault, which decides the hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The file is not JSON: its first bytes show its format.
    OtherFile,
    /// It is in UTF-16.
    OtherEncoding,
    /// It ends in the middle.
    Cut,
    /// `NaN` or an infinity, which json does not have.
    NoNumber,
    /// It is no json from some place on.
    Syntax,
    /// It is json of another shape.
    Shape,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, problem, .. } = self;
        if place.is_empty() { f.write_str(problem) } else { write!(f, "{place}: {problem}") }
    }
}

impl Fault {
    /// What to do about a file that is none, cut or of another encoding, as an imperative; `None` for what depends on its shape.
    pub fn hint(&self) -> Option<String> {
        let words = match self.kind {
            FaultKind::OtherFile if self.problem.contains("archive") => "unpack it first and give the json that is in it",
            FaultKind::OtherFile => "download it again, and look at what came: the file is called json and is none",
            FaultKind::OtherEncoding => "save it as UTF-8",
            FaultKind::Cut => "the file is cut short: download or make it again",
            FaultKind::NoNumber => {
                "json has no NaN and no infinities: write a number there or leave the entry out (Python: `json.dump(..., allow_nan=False)`)"
            }
            FaultKind::Syntax => "mend the file there, or make it again",
            FaultKind::Shape => return None,
        };
        Some(words.into())
    }
}

/// Without the byte order mark, if there is one.
pub fn without_mark(json: &[u8]) -> &[u8] {
    json.strip_prefix(BYTE_ORDER_MARK).unwrap_or(json)
}

/// Reads json. It is read once where it is sound; finding the place of a fault costs another time.
pub fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Fault> {
    serde_json::from_slice(without_mark(json)).or_else(|_| parse_with_places(json))
}

/// As [`parse`], more slowly.
pub(crate) fn parse_with_places<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Fault> {
    let mut reader = serde_json::Deserializer::from_slice(without_mark(json));
    let read = serde_path_to_error::deserialize(&mut reader);
    read.map_err(|error| (error.path().to_string(), error.into_inner()))
        .and_then(|made| reader.end().map(|()| made).map_err(|error| (".".to_owned(), error)))
        .map_err(|(place, error)| fault(without_mark(json), &place, &error))
}

fn fault(json: &[u8], place: &str, error: &serde_json::Error) -> Fault {
    // An unnamed step is one that the parser had not begun.
    let place = place.trim_end_matches(".?").trim_end_matches('?');
    let place = if place == "." { String::new() } else { place.to_owned() };
    if let Some(name) = content::describe(json) {
        let kind = if name.contains("UTF-16") { FaultKind::OtherEncoding } else { FaultKind::OtherFile };
        return Fault { place: String::new(), problem: format!("expected json, found {name}"), kind };
    }
    let (line, column) = (error.line(), error.column());
    let position = format!(" at line {line} column {column}");
    let words = error.to_string();
    let words = words.strip_suffix(&position).unwrap_or(&words);
    let token = token_at(json, line, column);
    let (words, kind) = match error.classify() {
        _ if matches!(token.trim_start_matches('-'), "NaN" | "nan" | "Infinity" | "inf" | "Inf") => {
            (format!("expected a number, found {token}, which is no json"), FaultKind::NoNumber)
        }
        serde_json::error::Category::Eof => ("the file ends there".into(), FaultKind::Cut),
        serde_json::error::Category::Syntax | serde_json::error::Category::Io => (words.to_owned(), FaultKind::Syntax),
        serde_json::error::Category::Data => (plainly(words), FaultKind::Shape),
    };
    let position = if line > 0 { format!(" (line {line} column {column})") } else { String::new() };
    Fault { place, problem: format!("{words}{position}"), kind }
}

/// The letters and digits around a position that a parser named, which is at or after them.
fn token_at(json: &[u8], line: usize, column: usize) -> String {
    let line = json.split(|byte| *byte == b'\n').nth(line.saturating_sub(1)).unwrap_or_default();
    let belongs = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
    let at = column.saturating_sub(1).min(line.len());
    let before = line[..at].iter().rev().take_while(|byte| belongs(byte)).count();
    let after = line[at..].iter().take_while(|byte| belongs(byte)).take(64).count();
    String::from_utf8_lossy(&line[at - before.min(64)..at + after]).into_owned()
}

/// A whole number of 0 or more, however it is written: `1`, `1.0`, `"1"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Whole(pub(crate) u64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spellings;
        impl de::Visitor<'_> for Spellings {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number of 0 or more")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Whole, E> {
                Ok(Whole(number))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Whole, E> {
                if (0.0..=EXACT).contains(&number) && number.fract() == 0.0 {
                    Ok(Whole(number as u64))
                } else {
                    Err(E::custom(format!("expected a whole number of 0 or more, found {number:?}")))
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Whole, E> {
                let number = text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
                let shown: String = text.chars().take(40).collect();
                number.map(Whole).ok_or_else(|| E::custom(format!("expected a whole number of 0 or more, found the text {shown:?}")))
            }
        }
        deserializer.deserialize_any(Spellings)
    }
}

/// Yes or no, as exporters write it: `0`, `1`, `false`, `true`, `null` for no.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Flag(pub(crate) bool);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spellings;
        impl de::Visitor<'_> for Spellings {
            type Value = Flag;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("0 or 1")
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Flag, E> {
                Ok(Flag(value))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Flag, E> {
                Ok(Flag(false))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Flag, E> {
                match number {
                    0 | 1 => Ok(Flag(number == 1)),
                    _ => Err(E::custom(format!("expected 0 or 1, found {number}"))),
                }
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Flag, E> {
                match number {
                    0.0 => Ok(Flag(false)),
                    1.0 => Ok(Flag(true)),
                    _ => Err(E::custom(format!("expected 0 or 1, found {number:?}"))),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Flag, E> {
                match text {
                    "0" => Ok(Flag(false)),
                    "1" => Ok(Flag(true)),
                    _ => Err(E::custom(format!("expected 0 or 1, found the text {:?}", text.chars().take(40).collect::<String>()))),
                }
            }
        }
        deserializer.deserialize_any(Spellings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only faults are looked at")]
    struct Thing {
        things: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only faults are looked at")]
    struct Inner {
        id: Whole,
        #[serde(default)]
        flag: Flag,
        #[serde(default)]
        corners: [f64; 4],
        #[serde(default)]
        name: String,
    }

    #[test]
    fn whole_numbers_and_flags_are_read_however_they_are_written() {
        let whole = |json: &str| parse::<Whole>(json.as_bytes()).map(|whole| whole.0).map_err(|fault| fault.problem);
        for (json, number) in [
            ("7", 7),
            ("7.0", 7),
            ("\"7\"", 7),
            ("7e2", 700),
            ("0", 0),
            ("-0.0", 0),
            ("18446744073709551615", u64::MAX),
            ("9007199254740992.0", 1 << 53),
            ("\"18446744073709551615\"", u64::MAX),
        ] {
            assert_eq!(whole(json), Ok(number), "{json}");
        }
        let refused = |found: &str| format!("expected a whole number of 0 or more, found {found}");
        for (json, found) in [
            ("7.5", "7.5"),
            ("-1", "-1"),
            ("-1.0", "-1.0"),
            ("1e300", "1e300"),
            ("\"c33c-0001\"", "the text \"c33c-0001\""),
            ("\"\"", "the text \"\""),
            ("\"+1\"", "the text \"+1\""),
            ("\"1.5\"", "the text \"1.5\""),
            ("null", "null"),
            ("true", "true"),
            ("[1]", "a list"),
            ("{}", "an object"),
            ("18446744073709551616", "1.8446744073709552e19"),
        ] {
            let problem = whole(json).unwrap_err();
            assert!(problem.starts_with(&refused(found)), "{json}: {problem}");
        }
        let flag = |json: &str| parse::<Flag>(json.as_bytes()).map(|flag| flag.0).map_err(|fault| fault.problem);
        for (json, expected) in
            [("0", false), ("1", true), ("false", false), ("true", true), ("0.0", false), ("\"1\"", true), ("null", false)]
        {
            assert_eq!(flag(json), Ok(expected), "{json}");
        }
        for json in ["7", "-1", "0.5", "\"yes\"", "[]"] {
            assert!(flag(json).unwrap_err().starts_with("expected 0 or 1, found "), "{json}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_fault() {
        assert_eq!(parse::<Whole>(b"\xef\xbb\xbf 5").unwrap(), Whole(5));
    }

    #[test]
    fn faults_have_their_place_and_their_kind() {
        use FaultKind::{Cut, NoNumber, OtherEncoding, OtherFile, Shape, Syntax};
        for (json, kind, expected) in [
            (
                r#"{"things": [{"id": 1}, {"id": -3}]}"#,
                Shape,
                "things[1].id: expected a whole number of 0 or more, found -3 (line 1 column",
            ),
            (
                r#"{"things": [{"id": "x"}]}"#,
                Shape,
                "things[0].id: expected a whole number of 0 or more, found the text \"x\" (line 1 column",
            ),
            (
                r#"{"things": [{"id": 1, "corners": [1, 2, NaN, 4]}]}"#,
                NoNumber,
                "things[0].corners[2]: expected a number, found NaN, which",
            ),
            (
                r#"{"things": [{"id": 1, "corners": [-Infinity]}]}"#,
                NoNumber,
                "things[0].corners[0]: expected a number, found -Infinity, which",
            ),
            (r#"{"things": [{"id": 1, "other": Infinity}]}"#, NoNumber, "things[0].other: expected a number, found Infinity, which"),
            (r#"{"things": [{"id": 1, "corners": [1, 2, 3]}]}"#, Shape, "things[0].corners: expected a list of 4, found a list of 3"),
            (r#"{"things": [{"id": 1, "corners": [1, 2, 3, 1e999]}]}"#, Syntax, "things[0].corners[3]: number out of range"),
            (r#"{"things": [{"id": 1, "corners": "x"}]}"#, Shape, "things[0].corners: expected a list of 4, found the text \"x\""),
            (r#"{"things": [{"id": 1, "name": 5}]}"#, Shape, "things[0].name: expected text, found 5"),
            (r#"{"things": [{"id": 1, "flag": 7}]}"#, Shape, "things[0].flag: expected 0 or 1, found 7"),
            (r#"{"things": [{}]}"#, Shape, "things[0]: expected the key `id`, found none"),
            (r#"{"things": {}}"#, Shape, "things: expected a list, found an object"),
            (r#"{"things": [{"id": 1"#, Cut, "things[0]: the file ends there (line 1 column"),
            (r#"{"things": []} x"#, Syntax, "trailing characters (line 1 column"),
            ("{\"things\": [,]}", Syntax, "things[0]: expected value"),
            ("<html>", OtherFile, "expected json, found a web page"),
            ("", OtherFile, "expected json, found an empty file"),
            ("{\0}\0", OtherEncoding, "expected json, found a text in UTF-16"),
        ] {
            let fault = parse::<Thing>(json.as_bytes()).unwrap_err();
            assert!(fault.to_string().starts_with(expected), "{json}: {fault}");
            assert_eq!((fault.kind, fault.hint().is_some()), (kind, kind != Shape), "{json}");
        }
    }
}
