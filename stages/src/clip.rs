//! Stages that run CLIP: training a small one, and embeddings of images and regions.

pub mod activation;
pub mod blocks;
pub(crate) mod encoder;
pub(crate) mod features;
pub mod globals;
pub mod objects;
mod on_device;
mod pretrain;
pub mod proposals;
pub(crate) mod small;
pub(crate) mod space;

pub use encoder::{Clip, PRECISION, Precision};
pub use pretrain::Pretrain;
pub use small::Architecture;
pub use space::Space;
