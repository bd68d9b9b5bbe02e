//! Stages for regions of a frozen CLIP ResNet. (CORA, sections 4 and 5.)

pub mod embed;
pub mod export;
pub(crate) mod frozen;
pub mod prompt;
