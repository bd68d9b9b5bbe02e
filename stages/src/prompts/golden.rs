//! What the golden tests of class embeddings share: the files of `tests/golden/prompts/make.py`, and weights by its formula.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tch::Tensor;

pub(super) use crate::golden::{error, unit};

pub(super) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/prompts").join(name)
}

pub(super) fn read(name: &str) -> Value {
    serde_json::from_slice(&fs::read(path(name)).expect("the golden file is there")).unwrap()
}

/// `weights`: shape, middle and half range of each tensor.
pub(super) fn weights(golden: &Value) -> BTreeMap<String, Tensor> {
    let weights: BTreeMap<String, (Vec<i64>, f32, f32)> = serde_json::from_value(golden["weights"].clone()).unwrap();
    let filled = |(name, (shape, middle, half_range)): (String, (Vec<i64>, f32, f32))| {
        let flat: Vec<f32> = unit(&name, shape.iter().product::<i64>() as usize).map(|u| middle + half_range * u).collect();
        (name, Tensor::from_slice(&flat).reshape(shape))
    };
    weights.into_iter().map(filled).collect()
}

pub(super) fn tensor(numbers: &Value, shape: &[i64]) -> Tensor {
    Tensor::from_slice(&serde_json::from_value::<Vec<f32>>(numbers.clone()).unwrap()).reshape(shape)
}

pub(super) fn names(list: &Value) -> Vec<String> {
    serde_json::from_value(list.clone()).unwrap()
}
