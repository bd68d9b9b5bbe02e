//! Stages that make concepts.

pub mod build;
