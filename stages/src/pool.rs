//! Stages that search pools of images of the web, and read tables of links.

pub mod import;
pub mod links;
pub mod retrieve;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context,
    artifacts::{PoolRows, Unsafe},
};

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

    /// Notes where rows are to be left out and a table does not say which.
    fn note_unknown(self, tables: &PoolRows<'_>, cx: &Context<'_>) {
        if self != Self::Keep && !tables.know_unsafe() {
            cx.note("the metadata do not say which images are unsafe for work (no column `NSFW` or `punsafe`): none is left out");
        }
    }
}

/// An edition of LAION-5B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Laion5b {
    /// The one of 2024, from which links to illegal images were removed.
    ReLaion,
    /// The one of 2022, which was withdrawn because of them.
    AcceptOriginal,
}
