//! The file in which CORA's code keeps a localizer.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use ovenbird_models::checkpoint::{Saved, write_torch};
use tch::Tensor;

use crate::detector::spec::DetectorSpec;

/// Writes tensors under CORA's names, as the weights of a step and as their average; and as text how the localizer is built, which CORA's code does not read.
pub(super) fn write(tensors: &BTreeMap<String, Tensor>, spec: &DetectorSpec, out: impl Write) -> io::Result<()> {
    let weights = || Saved::Dict(tensors.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect());
    let written = spec.metadata().into_iter().map(|(key, text)| (key, Saved::Text(text)));
    let theirs = [
        ("args", Saved::Nothing),
        ("best_performance", Saved::Real(0.0)),
        ("epoch", Saved::Integer(0)),
        ("model", weights()),
        ("model_ema", weights()),
    ];
    let all = theirs.into_iter().map(|(key, value)| (key.to_owned(), value)).chain(written);
    write_torch(&Saved::Dict(all.collect()), out)
}
