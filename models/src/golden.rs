//! Shared by the golden tests: numbers that both sides compute from a name, so that no file has to hold them.

use std::{collections::BTreeMap, fs, path::Path};

use tch::Tensor;

/// `n` values, even in [-1, 1), exact in f32: splitmix64 of fnv1a(name) + index.
pub(crate) fn unit(name: &str, n: usize) -> impl Iterator<Item = f32> {
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (0..n as u64).map(move |index| {
        let mut z = start.wrapping_add(index).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The largest absolute difference.
pub(crate) fn error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    (found - expected).abs().max().double_value(&[])
}

/// Every array of `tests/golden/lp-ovod/make.py` by name.
pub(crate) fn lp_ovod() -> BTreeMap<String, Tensor> {
    arrays("lp-ovod/golden")
}

/// Every array of a file of `tests/golden/detpro-ralf/make.py` by name.
pub(crate) fn detpro_ralf(file: &str) -> BTreeMap<String, Tensor> {
    arrays(&format!("detpro-ralf/{file}"))
}

/// Every array of a file of `tests/golden/promptdet/make.py` by name.
pub(crate) fn promptdet(file: &str) -> BTreeMap<String, Tensor> {
    arrays(&format!("promptdet/{file}"))
}

/// Every array of a file of `tests/golden/cora/make.py` by name.
pub(crate) fn cora(file: &str) -> BTreeMap<String, Tensor> {
    arrays(&format!("cora/{file}"))
}

/// The weights of a network of CORA's golden data, f32, by the names of `weights.json`.
pub(crate) fn cora_weights(stream: &str) -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/weights.json");
    let weights: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap();
    let tensors: BTreeMap<String, (Vec<i64>, f64, f64)> = serde_json::from_value(weights["streams"][stream].clone()).unwrap();
    let filled = |(name, (shape, scale, offset)): (String, (Vec<i64>, f64, f64))| {
        let values = cora_values(&format!("{stream}/{name}"), &shape, scale, offset);
        (name, values)
    };
    tensors.into_iter().map(filled).collect()
}

/// Values of CORA's golden data, f32: even in `offset` plus and minus `scale`, splitmix64 of fnv1a(name).
pub(crate) fn cora_values(name: &str, shape: &[i64], scale: f64, offset: f64) -> Tensor {
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let value = |index: u64| {
        let mut z = start.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let even = ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24);
        (offset + scale * (2.0 * even - 1.0)) as f32
    };
    let n = shape.iter().product::<i64>() as u64;
    Tensor::from_slice(&(0..n).map(value).collect::<Vec<f32>>()).reshape(shape)
}

/// The weights of a CLIP with the text tower of such arrays in place of its own; token embeddings that they lack are zeros.
pub(crate) fn with_tower(golden: &BTreeMap<String, Tensor>, mut weights: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    weights.extend(golden.iter().filter_map(|(name, tensor)| {
        let name = name.strip_prefix("tower/")?.replace("out_proj_", "out_proj.");
        Some((name, tensor.shallow_clone()))
    }));
    let [ids, rows] = ["token_ids", "token_rows"].map(|name| weights.remove(name).unwrap());
    let table = weights["token_embedding.weight"].zeros_like().index_copy(0, &ids, &rows);
    weights.insert("token_embedding.weight".into(), table);
    weights
}

fn arrays(file: &str) -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/{file}.safetensors"));
    Tensor::read_safetensors(path).expect("the golden file is there").into_iter().collect()
}
