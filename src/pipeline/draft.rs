//! A step as it is written, before it is known what it reads from.

use std::{collections::BTreeMap, time::Duration};

use ovenbird_stages::{AnyStage, OnBadItem, StageEntry};

use super::Resources;

/// A stage as written, after its keys were checked.
pub(super) struct Draft {
    pub(super) id: String,
    pub(super) entry: &'static StageEntry,
    pub(super) stage: Option<Box<dyn AnyStage>>,
    pub(super) inputs: BTreeMap<String, Given>,
    pub(super) resources: Resources,
    pub(super) on_bad_item: OnBadItem,
    pub(super) max_silence: Duration,
    /// Of a step that is repeated: which time this is.
    pub(super) round: Option<Round>,
}

/// An input as written.
pub(super) struct Given {
    pub(super) value: String,
    /// Where it is written.
    pub(super) path: String,
}

/// One time of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Round {
    /// From 1.
    pub(super) number: u64,
    /// How many there are.
    pub(super) of: u64,
}

impl Round {
    /// The id of a step in this round.
    pub(super) fn id(self, id: &str) -> String {
        format!("{id}-{}", self.number)
    }
}
