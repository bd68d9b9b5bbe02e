//! What the golden tests of class embeddings share: the files of `tests/golden/prompts/make.py`, weights by its formula, and the text tower of DetPro and RPL.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use ovenbird_models::clip::{Activation, Clip, Config, ImageConfig, TextConfig};
use serde_json::Value;
use tch::{Device, Kind, Tensor, nn};

use crate::golden::with_tower;
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

/// The CLIP of golden arrays of DetPro or of RPL, whose image tower is arbitrary.
pub(super) fn small_clip(golden: &BTreeMap<String, Tensor>) -> Clip {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::Vit { image_side: 32, patch: 16, width: 32, depth: 1, heads: 1, mlp_width: 128 },
        text: TextConfig { context: 77, vocabulary: 49_408, width: 32, heads: 4, depth: 2 },
        activation: Activation::QuickGelu,
    };
    let store = nn::VarStore::new(Device::Cpu);
    Clip::new(&store.root(), &config, 1).unwrap();
    let weights = with_tower(golden, store.variables().into_iter().collect());
    Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap()
}
