//! Stages that make, import and export proposals.

pub mod export;
pub mod import;
pub mod oln;
pub mod oracle;
pub mod truth;
