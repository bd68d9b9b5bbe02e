//! Reading a YAML mapping key by key, collecting every problem instead of ending at the first.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::words::suggestion;
use serde_json::Value;
use serde_yaml::Value as Yaml;

use super::{
    lines::{Lines, join},
    problem::{Fault, Problem},
};

pub(super) struct Reader {
    pub(super) lines: Lines,
    pub(super) problems: Vec<Problem>,
    /// Stages that could not be read: what reads from them is not a second problem.
    pub(super) broken: BTreeSet<String>,
}

impl Reader {
    pub(super) fn new(text: &str) -> Self {
        Self { lines: Lines::of(text), problems: Vec::new(), broken: BTreeSet::new() }
    }

    /// Notes a problem at a path, with its line.
    pub(super) fn push(&mut self, path: impl Into<String>, fault: impl Into<Fault>) {
        let path = path.into();
        let line = self.lines.of_path(&path);
        self.push_at(path, line, fault);
    }

    /// Notes a problem at a line.
    pub(super) fn push_at(&mut self, path: impl Into<String>, line: Option<usize>, fault: impl Into<Fault>) {
        self.problems.push(Problem { path: path.into(), line, fault: fault.into(), only_with: String::new() });
    }

    /// The entries of a mapping; unknown keys are problems and left out. `None`: not a mapping.
    pub(super) fn keys(&mut self, path: &str, yaml: &Yaml, known: &[&str]) -> Option<BTreeMap<String, Yaml>> {
        let mut entries = self.entries(path, yaml)?;
        entries.retain(|key, _| {
            let is_known = known.contains(&key.as_str());
            if !is_known {
                self.push(join(path, key), format!("unknown key `{key}`{}", suggestion(key, known.iter().copied())));
            }
            is_known
        });
        Some(entries)
    }

    pub(super) fn entries(&mut self, path: &str, yaml: &Yaml) -> Option<BTreeMap<String, Yaml>> {
        let mapping = match yaml {
            Yaml::Mapping(mapping) => mapping,
            Yaml::Null => return Some(BTreeMap::new()),
            Yaml::Bool(_) | Yaml::Number(_) | Yaml::String(_) | Yaml::Sequence(_) | Yaml::Tagged(_) => return None,
        };
        let mut entries = BTreeMap::new();
        for (key, value) in mapping {
            match key.as_str() {
                Some(key) => drop(entries.insert(key.to_owned(), value.clone())),
                None => self.push(path, format!("expected text as a key, found {}", shown(key))),
            }
        }
        Some(entries)
    }

    pub(super) fn text(&mut self, path: &str, yaml: Option<&Yaml>) -> Option<String> {
        match yaml {
            Some(Yaml::String(text)) if !text.is_empty() => Some(text.clone()),
            Some(other) => {
                self.push(path, format!("expected text, found {}", shown(other)));
                None
            }
            None => {
                self.push(path, "missing");
                None
            }
        }
    }

    /// Replaces `${name}` in every text of a value; a text that is nothing but one variable takes its type.
    pub(super) fn substitute(&mut self, path: &str, value: &mut Yaml, variables: &BTreeMap<String, Yaml>) {
        match value {
            Yaml::Mapping(mapping) => {
                for (key, value) in mapping {
                    let key = key.as_str().unwrap_or_default().to_owned();
                    self.substitute(&join(path, &key), value, variables);
                }
            }
            Yaml::Sequence(values) => {
                for (value_idx, value) in values.iter_mut().enumerate() {
                    self.substitute(&format!("{path}.{value_idx}"), value, variables);
                }
            }
            Yaml::String(text) => {
                if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'))
                    && let Some(variable) = variables.get(name)
                {
                    *value = variable.clone();
                    return;
                }
                let mut result = String::new();
                let mut rest = text.as_str();
                while let Some((before, after)) = rest.split_once("${") {
                    let Some((name, after)) = after.split_once('}') else { break };
                    result.push_str(before);
                    match variables.get(name) {
                        Some(Yaml::String(text)) => result.push_str(text),
                        Some(variable) => result.push_str(&shown(variable)),
                        None => {
                            self.push(path, format!("no variable `{name}`{}", suggestion(name, variables.keys().map(String::as_str))));
                        }
                    }
                    rest = after;
                }
                result.push_str(rest);
                *text = result;
            }
            Yaml::Null | Yaml::Bool(_) | Yaml::Number(_) | Yaml::Tagged(_) => {}
        }
    }
}

/// What [`is_id`] asks for.
pub(super) const ID_WORDS: &str = "expected letters, digits, `-` and `_` only, 64 at most";

/// Whether a text is a valid id or name.
pub(super) fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// A value as it would be written in the file, on one line.
pub(super) fn shown(yaml: &Yaml) -> String {
    match serde_json::to_value(yaml) {
        Ok(list @ (Value::Array(_) | Value::Object(_))) => ovenbird_cache::shown(&list),
        _ => serde_yaml::to_string(yaml).map_or_else(|_| "something unreadable".into(), |text| text.trim().replace('\n', " ")),
    }
}
