//! Stages that bring vocabularies in.

pub mod import;
