//! Stages that make concepts, and those for the files of RALF.

pub mod build;
pub mod export;
pub mod import;
mod published;
