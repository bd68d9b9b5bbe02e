//! Shared by the golden tests: numbers by the formula of `tests/golden/*/make.py`, and those that published code computed.

use tch::{Device, Kind, Tensor};

#[path = "../../models/src/golden.rs"]
mod shared;

pub(crate) use shared::{cora, detpro_ralf, error, lp_ovod, promptdet, unit, with_tower};

/// The numbers of a tensor of any kind, row by row.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1)).expect("f64 numbers")
}
