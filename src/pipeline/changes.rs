//! Changes to a pipeline file by variants and by the command line: `--set detector.training.steps=900`.

use serde::{Deserialize, Serialize};
use serde_yaml::Value as Yaml;

use super::yaml::Reader;

/// Changes from the command line: `--set key=value`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setting {
    /// A variable, `step.parameter`, `step.in.input` or `step.use`.
    pub(crate) key: String,
    /// YAML.
    pub(crate) value: String,
}

/// A change to the file, by a variant or from the command line.
#[derive(Clone)]
pub(super) struct Change {
    /// Where the change is written: `variants.crops.detector.in.features`, `--set seed`.
    pub(super) path: String,
    pub(super) key: Key,
    pub(super) value: Yaml,
}

/// The thing that a change replaces.
#[derive(Clone, PartialEq)]
pub(super) enum Key {
    Variable(String),
    /// A parameter, or one within it.
    Parameter {
        stage: String,
        path: String,
    },
    Input {
        stage: String,
        port: String,
    },
    /// The stage that a step is: its `use`.
    Use {
        stage: String,
    },
}

impl Key {
    pub(super) fn of(text: &str) -> Self {
        let Some((stage, rest)) = text.split_once('.') else { return Self::Variable(text.into()) };
        match rest.strip_prefix("in.") {
            Some(port) => Self::Input { stage: stage.into(), port: port.into() },
            None if rest == "use" => Self::Use { stage: stage.into() },
            None => Self::Parameter { stage: stage.into(), path: rest.into() },
        }
    }

    pub(super) fn stage(&self) -> Option<&str> {
        match self {
            Self::Variable(_) => None,
            Self::Parameter { stage, .. } | Self::Input { stage, .. } | Self::Use { stage } => Some(stage),
        }
    }

    /// Whether it replaces a field of a stage's parameters, such as `training.max_size[0]`, or a parameter that contains the field.
    pub(super) fn holds(&self, id: &str, field: &str) -> bool {
        let Self::Parameter { stage, path } = self else { return false };
        stage == id && field.strip_prefix(path).is_some_and(|below| below.is_empty() || below.starts_with(['.', '[']))
    }
}

impl Reader {
    /// Reads the changes of the command line.
    pub(super) fn changes(&mut self, settings: &[Setting]) -> Vec<Change> {
        let mut changes = Vec::new();
        for (place, Setting { key, value }) in settings.iter().enumerate() {
            let path = format!("--set {key}");
            if settings[..place].iter().any(|earlier| earlier.key == *key) {
                self.push(path, "given twice");
                continue;
            }
            match serde_yaml::from_str(value) {
                Ok(value) => changes.push(Change { path, key: Key::of(key), value }),
                Err(error) => self.push(path, format!("`{value}` is not YAML: {error}")),
            }
        }
        changes
    }
}

/// A value with another value at a dotted path; `None` where the path leads through something other than a mapping.
pub(super) fn with_below(old: Yaml, path: Option<&str>, new: Yaml) -> Option<Yaml> {
    let Some(path) = path else { return Some(new) };
    let (name, below) = path.split_once('.').map_or((path, None), |(name, below)| (name, Some(below)));
    let mut mapping = match old {
        Yaml::Mapping(mapping) => mapping,
        Yaml::Null => serde_yaml::Mapping::new(),
        Yaml::Bool(_) | Yaml::Number(_) | Yaml::String(_) | Yaml::Sequence(_) | Yaml::Tagged(_) => return None,
    };
    let old = mapping.remove(name).unwrap_or(Yaml::Null);
    mapping.insert(name.into(), with_below(old, below, new)?);
    Some(Yaml::Mapping(mapping))
}
