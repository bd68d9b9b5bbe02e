//! Stages that make negatives of classes, and those for the files of RALF.

pub mod export;
pub mod import;
mod published;
pub mod retrieve;
