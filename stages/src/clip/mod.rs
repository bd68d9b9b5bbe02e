//! Stages that run CLIP: training a small one, features of images and regions.

pub(crate) mod encoder;
mod features;
mod on_device;
mod pretrain;

pub use encoder::{Clip, PRECISION, Precision};
pub use features::{Blocks, Globals, Objects, Proposals, View, WholeBox};
pub use pretrain::{Architecture, Pretrain};
