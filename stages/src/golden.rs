//! Numbers that LP-OVOD's published code computed: `tests/golden/lp-ovod/make.py` says how.

use std::{collections::BTreeMap, path::Path};

use tch::{Device, Kind, Tensor};

/// Every array by name.
pub(crate) fn lp_ovod() -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lp-ovod/golden.safetensors");
    Tensor::read_safetensors(path).expect("the golden file is there").into_iter().collect()
}

/// The numbers of a tensor of any kind, row by row.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1)).expect("f64 numbers")
}
