//! What an operator sees: the program itself, run in a folder of its own. One binary, because each links libtorch.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests end where they fail, and damage files on purpose")]

mod support;

mod clips;
mod cora;
mod detector;
mod detpro;
mod docs;
mod errors;
mod evaluation;
mod extraction;
mod faults;
mod interchange;
mod lp_ovod;
mod matrix;
mod own_data;
mod pictures;
mod pool;
mod predict;
mod promptdet;
mod promptdet_detector;
mod prompts;
mod quickstart;
mod records;
mod reports;
mod signals;
mod soundness;
mod stages;
mod strays;
mod surface;
mod tidy;
mod toy_clip;
mod web;
