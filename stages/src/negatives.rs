//! Stages that make negatives of classes.

pub mod retrieve;
