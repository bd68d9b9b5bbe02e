//! How a localizer is built and used.

use ovenbird_cache::Digest;
use ovenbird_models::{
    checkpoint::Checkpoint,
    clip::regions::Rules,
    detr::{Config, Localizer},
    rcnn::layout,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use crate::{Result, clip::Space};

/// How a localizer is built and used. Its CLIP and its region prompt are files of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LocalizerSpec {
    pub(crate) config: Config,
    /// Maximum lengths of the longer and the shorter side of images, in px.
    pub(crate) fits: [u32; 2],
    /// How boxes become cells of maps.
    pub(crate) rules: Rules,
    /// The CLIP whose maps it looks at, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) clip: Option<Space>,
    /// The digest of the region prompt with which its anchors were named, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) region_prompt: Option<Digest>,
}

impl LocalizerSpec {
    /// The network with the weights of a file, and their owner.
    pub(crate) fn network(&self, checkpoint: &Checkpoint, device: Device) -> Result<(Localizer, nn::VarStore)> {
        Ok(layout::filled(checkpoint, device, |root| Localizer::blank(root, &self.config), Localizer::parameters)?)
    }
}

/// The digest of a region prompt's numbers.
pub(crate) fn table_digest(table: &Tensor) -> Result<Digest> {
    let numbers =
        Vec::<f32>::try_from(table.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1)).map_err(ovenbird_models::Error::from)?;
    Ok(Digest::of(&numbers.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>()))
}

/// Size of a localizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Size {
    /// CORA's: 1,000 anchors, 3 layers of encoder and 6 of decoder, of width 256.
    #[default]
    Cora,
    /// 100 anchors, 1 layer of encoder and 3 of decoder, of width 64, for images of 256 px: trains from scratch in minutes on two cores.
    Toy,
}

impl Size {
    /// A localizer of this size for maps of so many channels and class embeddings of `embed_dim` numbers.
    pub(crate) fn config(self, map_channels: i64, embed_dim: i64) -> Config {
        match self {
            Self::Cora => Config::cora(map_channels, embed_dim),
            Self::Toy => Config::toy(map_channels, embed_dim),
        }
    }
}
