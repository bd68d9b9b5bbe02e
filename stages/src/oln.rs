//! The object localisation network, which learns how well boxes lie on objects of any class (Kim et al. 2022).
//!
//! `proposals/oln` proposes boxes with it.

pub mod network;
pub mod train;
