//! Stages that run CLIP: training a small one, features of images and regions.

pub mod activation;
pub(crate) mod encoder;
mod features;
mod on_device;
mod pretrain;
pub(crate) mod space;

pub use encoder::{Clip, PRECISION, Precision};
pub use features::{Blocks, Globals, Objects, Proposals, Resize, WholeBox};
pub use pretrain::{Architecture, Pretrain};
pub use space::Space;
