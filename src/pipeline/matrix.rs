//! Which steps belong to which variant and seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use super::step_id::StepId;
use crate::output::count;

/// The variants and seeds of a pipeline, and the steps of each combination. Part of the event log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Matrix {
    /// All variants of the file, in its order; the others are compared with the first. Empty where the file has none.
    pub(crate) variants: Vec<String>,
    /// All seeds of the file, in its order. Empty where the file has none.
    pub(crate) seeds: Vec<u64>,
    /// What each variant changes, as `--set` takes it: `detect.nms_iou=0.4`. Absent in logs of older versions.
    #[serde(default)]
    pub(crate) settings: BTreeMap<String, Vec<String>>,
    /// The chosen combinations, seed by seed.
    pub(crate) combinations: Vec<Combination>,
}

/// A variant with a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Combination {
    /// Absent where the file has no variants.
    pub(crate) variant: Option<String>,
    /// Absent where the file has no seeds.
    pub(crate) seed: Option<u64>,
    /// By the stage's id in the file: the step of this combination.
    pub(crate) steps: BTreeMap<String, StepId>,
}

impl fmt::Display for Matrix {
    /// `3 variants x 2 seeds`, counting those that were chosen.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let variants: BTreeSet<_> = self.combinations.iter().filter_map(|combination| combination.variant.as_ref()).collect();
        let seeds: BTreeSet<_> = self.combinations.iter().filter_map(|combination| combination.seed).collect();
        let counts = [(variants.len(), "variant"), (seeds.len(), "seed")];
        let counts: Vec<String> = counts.into_iter().filter(|(n, _)| *n > 0).map(|(n, noun)| count(n, noun)).collect();
        f.write_str(&counts.join(" x "))
    }
}
