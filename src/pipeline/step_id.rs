//! Names of steps: `detector`, `detector@crops`, `detector@8`, `detector@crops,8`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Identifies a step: the id of its stage in the pipeline file, and the variant and seed, where a stage has several instances.
///
/// As text, in logs and on the command line, it is `stage@variant,seed`; a suffix that is a number is a seed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(crate) struct StepId {
    /// The stage's id in the pipeline file.
    pub(crate) stage: String,
    /// The first variant with this instance; `None` where all variants share it.
    pub(crate) variant: Option<String>,
    /// The first seed with this instance; `None` where all seeds share it.
    pub(crate) seed: Option<u64>,
}

impl StepId {
    /// The id of a stage that has one instance.
    pub(crate) fn of_stage(stage: &str) -> Self {
        Self { stage: stage.into(), variant: None, seed: None }
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match (&self.variant, self.seed) {
            (None, None) => self.stage.clone(),
            (Some(variant), None) => format!("{}@{variant}", self.stage),
            (None, Some(seed)) => format!("{}@{seed}", self.stage),
            (Some(variant), Some(seed)) => format!("{}@{variant},{seed}", self.stage),
        };
        f.pad(&text)
    }
}

impl From<&str> for StepId {
    /// Accepts any text: a suffix that is not a variant and a seed is read as a variant.
    fn from(text: &str) -> Self {
        let Some((stage, suffix)) = text.split_once('@') else { return Self::of_stage(text) };
        let as_seed = |text: &str| text.parse::<u64>().ok().filter(|seed| seed.to_string() == text);
        let (variant, seed) = match suffix.rsplit_once(',') {
            Some((variant, seed)) if as_seed(seed).is_some() => (Some(variant.to_owned()), as_seed(seed)),
            _ if as_seed(suffix).is_some() => (None, as_seed(suffix)),
            _ => (Some(suffix.to_owned()), None),
        };
        Self { stage: stage.into(), variant, seed }
    }
}

impl From<String> for StepId {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<StepId> for String {
    fn from(id: StepId) -> Self {
        id.to_string()
    }
}

/// Steps as text, the instances of a stage together, in the form that a shell would expand: `detector@{vild,crops},{7,8}`.
pub(crate) fn labels<'a>(ids: impl IntoIterator<Item = &'a StepId>) -> Vec<String> {
    let braced = |names: &[String]| if let [one] = names { one.clone() } else { format!("{{{}}}", names.join(",")) };
    let mut by_variant: Vec<(&str, Option<&String>, Vec<String>)> = Vec::new();
    for StepId { stage, variant, seed } in ids {
        let seed = seed.map(|seed| seed.to_string());
        match by_variant.iter_mut().find(|(known, of, _)| known == stage && *of == variant.as_ref()) {
            Some((.., seeds)) => seeds.extend(seed),
            None => by_variant.push((stage, variant.as_ref(), seed.into_iter().collect())),
        }
    }
    let mut by_seeds: Vec<(&str, Vec<String>, Vec<String>)> = Vec::new();
    for (stage, variant, seeds) in by_variant {
        match by_seeds.iter_mut().find(|(known, known_seeds, _)| *known == stage && *known_seeds == seeds) {
            Some((.., variants)) => variants.extend(variant.cloned()),
            None => by_seeds.push((stage, seeds, variant.cloned().into_iter().collect())),
        }
    }
    let label = |(stage, seeds, variants): (&str, Vec<String>, Vec<String>)| {
        let parts: Vec<String> = [variants, seeds].iter().filter(|names| !names.is_empty()).map(|names| braced(names)).collect();
        if parts.is_empty() { stage.to_owned() } else { format!("{stage}@{}", parts.join(",")) }
    };
    by_seeds.into_iter().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_they_are_read() {
        let parts = |text: &str| {
            let id = StepId::from(text);
            assert_eq!(id.to_string(), text);
            (id.stage, id.variant.unwrap_or_default(), id.seed)
        };
        assert_eq!(parts("clip"), ("clip".into(), String::new(), None));
        assert_eq!(parts("clip@8"), ("clip".into(), String::new(), Some(8)));
        assert_eq!(parts("clip@a"), ("clip".into(), "a".into(), None));
        assert_eq!(parts("clip@a,8"), ("clip".into(), "a".into(), Some(8)));
        for odd in ["clip@", "clip@a,b", "clip@08", "clip@a,08", "a@b@c", ""] {
            parts(odd);
        }
    }

    #[test]
    fn labels_are_what_a_shell_would_expand_to_the_ids() {
        let check = |ids: &[&str], expected: &[&str]| {
            let parsed: Vec<StepId> = ids.iter().map(|id| (*id).into()).collect();
            assert_eq!(labels(&parsed), expected, "{ids:?}");
        };
        check(&["clip"], &["clip"]);
        check(&["clip@7", "val", "clip@8", "d@7"], &["clip@{7,8}", "val", "d@7"]);
        check(&["clip@7", "clip@8"], &["clip@{7,8}"]);
        check(&["d@a,7", "d@b,7", "d@a,8", "d@b,8"], &["d@{a,b},{7,8}"]);
        check(&["d@a,7", "d@b,7", "d@a,8", "d@c,7"], &["d@a,{7,8}", "d@{b,c},7"]);
        check(&["d@a,7", "d@b,7", "d@8"], &["d@{a,b},7", "d@8"]);
    }
}
