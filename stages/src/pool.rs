//! Stages that search pools of images of the web, and read tables of links.

pub mod import;
pub mod links;
pub mod retrieve;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::artifacts::Unsafe;

/// Which rows of a pool are left out as unsafe for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Nsfw {
    /// Those that the pool calls so.
    #[default]
    Drop,
    /// Those too of which it is not sure.
    DropUnsure,
    /// None.
    Keep,
}

impl Nsfw {
    fn rule(self, max_punsafe: f32) -> Unsafe {
        Unsafe { keep_all: self == Self::Keep, drop_unsure: self == Self::DropUnsure, max_punsafe }
    }
}
