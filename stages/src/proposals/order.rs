//! The order of proposals in a file that does not name images.

use ovenbird_data::annotations::ImageOrder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The order of the images in a file that has one entry per image and no image ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Ascending image id.
    Id,
    /// As the annotation file lists the images: mmdet reads and writes this order.
    File,
}

impl Order {
    pub(crate) fn of_data(self) -> ImageOrder {
        match self {
            Self::Id => ImageOrder::Id,
            Self::File => ImageOrder::File,
        }
    }
}
