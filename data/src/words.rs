//! Messages in plain words: serde's, and suggestions for names that are not known.

/// The most similar of the valid spellings, if one is similar at all.
pub fn nearest<'a>(found: &str, valid: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let scored = valid.into_iter().map(|valid| (strsim::jaro_winkler(&found.to_lowercase(), &valid.to_lowercase()), valid));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.75).then(|| best.1.to_owned())
}

/// `, did you mean `x`?`, or a list of the valid names.
pub fn suggestion<'a>(found: &str, valid: impl IntoIterator<Item = &'a str> + Clone) -> String {
    if let Some(nearest) = nearest(found, valid.clone()) {
        return format!(", did you mean `{nearest}`?");
    }
    let valid: Vec<String> = valid.into_iter().map(|valid| format!("`{valid}`")).collect();
    match valid.as_slice() {
        [] => String::new(),
        [one] => format!("; expected {one}"),
        _ => format!("; expected one of {}", valid.join(", ")),
    }
}

/// serde's message about a value of another shape: what was expected and what was found.
pub fn plainly(message: &str) -> String {
    if let Some((shape, place)) = message.rsplit_once(" at line ") {
        let shape = plainly(shape);
        // A part of a file has no line.
        return if place.ends_with("column 0") { shape } else { format!("{shape} (line {place})") };
    }
    let after = |start: &str| message.strip_prefix(start);
    if let Some((found, expected)) = ["invalid type: ", "invalid value: ", "invalid "]
        .iter()
        .find_map(|start| after(start))
        .and_then(|rest| rest.rsplit_once(", expected "))
    {
        let is_out_of_range = message.starts_with("invalid value");
        return format!("expected {}, found {}", expected_words(expected, is_out_of_range), found_words(found));
    }
    for (start, what) in [("unknown field ", "key"), ("unknown variant ", "value")] {
        if let Some((name, rest)) = after(start).and_then(|rest| rest.strip_prefix('`')).and_then(|rest| rest.split_once('`')) {
            // Every second part is a name in backticks.
            let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
            return format!("unknown {what} `{name}`{}", suggestion(name, known));
        }
    }
    if let Some(field) = after("missing field ") {
        return format!("expected the key {field}, found none");
    }
    if let Some(field) = after("duplicate field ") {
        return format!("the key {field} is there twice");
    }
    message.to_owned()
}

/// A type as serde names it.
fn expected_words(expected: &str, is_out_of_range: bool) -> String {
    let words = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" if is_out_of_range => {
            let greatest = match expected {
                "u8" => u64::from(u8::MAX),
                "u16" => u64::from(u16::MAX),
                "u32" => u64::from(u32::MAX),
                _ => u64::MAX,
            };
            return format!("a whole number from 0 to {greatest}");
        }
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number of 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "string or map" | "variant identifier" => "text",
        "a map" | "an object" => "an object",
        "a sequence" => "a list",
        _ => {
            let length = ["an array of length ", "a tuple of size "].iter().find_map(|start| expected.strip_prefix(start));
            return match length {
                Some(length) => format!("a list of {length}"),
                None if expected.starts_with("struct ") || expected.contains("tagged enum ") => "an object".into(),
                None => expected.to_owned(),
            };
        }
    };
    words.into()
}

/// A value as serde names it.
fn found_words(found: &str) -> String {
    match found {
        "map" => "an object".into(),
        "sequence" => "a list".into(),
        "unit value" => "null".into(),
        other => match other.split_once(' ') {
            Some(("string", text)) => format!("the text {text}"),
            Some(("integer" | "floating", number)) => number.trim_start_matches("point ").replace('`', ""),
            Some(("boolean", value)) => value.replace('`', ""),
            Some(("length", length)) => format!("a list of {length}"),
            _ => other.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only faults are looked at")]
    struct Thing {
        #[serde(default)]
        steps: u32,
        #[serde(default)]
        rate: f32,
        #[serde(default)]
        is_on: bool,
        #[serde(default)]
        name: String,
        #[serde(default)]
        corners: [f64; 4],
        #[serde(default)]
        list: Vec<String>,
        #[serde(default)]
        resize: Resize,
        #[serde(default)]
        inner: Option<Box<Self>>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Resize {
        #[default]
        CenterCrop,
        Native,
    }

    #[test]
    fn no_word_of_a_programming_language_reaches_the_user() {
        let said = |value: Value| plainly(&serde_json::from_value::<Thing>(value).unwrap_err().to_string());
        for (value, words) in [
            (json!({"steps": "four"}), "expected a whole number of 0 or more, found the text \"four\""),
            (json!({"steps": 1.5}), "expected a whole number of 0 or more, found 1.5"),
            (json!({"steps": -1}), "expected a whole number from 0 to 4294967295, found -1"),
            (json!({"steps": 5_000_000_000_u64}), "expected a whole number from 0 to 4294967295, found 5000000000"),
            (json!({"steps": null}), "expected a whole number of 0 or more, found null"),
            (json!({"rate": "1e-3, expected f32"}), "expected a number, found the text \"1e-3, expected f32\""),
            (json!({"rate": [1]}), "expected a number, found a list"),
            (json!({"is_on": "yes"}), "expected true or false, found the text \"yes\""),
            (json!({"is_on": 1}), "expected true or false, found 1"),
            (json!({"name": 5}), "expected text, found 5"),
            (json!({"name": true}), "expected text, found true"),
            (json!({"corners": [1, 2]}), "expected a list of 4, found a list of 2"),
            (json!({"corners": 1}), "expected a list of 4, found 1"),
            (json!({"list": "a"}), "expected a list, found the text \"a\""),
            (json!({"resize": "nativ"}), "unknown value `nativ`, did you mean `native`?"),
            (json!({"resize": "x"}), "unknown value `x`; expected one of `center-crop`, `native`"),
            (json!({"resize": 5}), "expected text, found 5"),
            (json!({"inner": 5}), "expected an object, found 5"),
            (json!({"inner": {"step": 5}}), "unknown key `step`, did you mean `steps`?"),
            (json!(5), "expected an object, found 5"),
        ] {
            assert_eq!(said(value.clone()), words, "{value}");
        }
        let at_end = "missing field `images` at line 1 column 19";
        assert_eq!(plainly(at_end), "expected the key `images`, found none (line 1 column 19)");
        assert_eq!(plainly("missing field `images`"), "expected the key `images`, found none");
        assert_eq!(plainly("duplicate field `images`"), "the key `images` is there twice");
        assert_eq!(plainly("unknown variant `x`, expected `a`"), "unknown value `x`; expected `a`");
        assert_eq!(plainly("unknown field `x`, there are no fields"), "unknown key `x`");
    }
}
