//! Golden numbers of detectors: compares them with torchvision, by weights and inputs that both sides make from one formula (`tests/golden/detector/make.py`).

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value};
use tch::Tensor;

use super::boxes::Corners;
use crate::golden::unit;

pub(crate) struct Golden(pub(crate) Map<String, Value>);

impl Golden {
    pub(crate) fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/detector/{name}.json"));
        Self(serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap())
    }

    pub(crate) fn part(&self, key: &str) -> Self {
        Self(self.0[key].as_object().unwrap().clone())
    }

    pub(crate) fn floats(&self, key: &str) -> Vec<f32> {
        self.0[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    pub(crate) fn integers(&self, key: &str) -> Vec<i64> {
        self.0[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
    }

    pub(crate) fn parts(&self, key: &str) -> Vec<Self> {
        self.0[key].as_array().unwrap().iter().map(|part| Self(part.as_object().unwrap().clone())).collect()
    }

    pub(crate) fn tensor(&self, key: &str, shape: &[i64]) -> Tensor {
        Tensor::from_slice(&self.floats(key)).reshape(shape)
    }
}

/// Even in [-1, 1).
pub(crate) fn field(name: &str, shape: &[i64]) -> Tensor {
    Tensor::from_slice(&unit(name, shape.iter().product::<i64>() as usize).collect::<Vec<f32>>()).reshape(shape)
}

/// `boxes_of` of `make.py`.
pub(crate) fn boxes_of(name: &str, n: usize, extent: f32, least: f32, most: f32) -> Vec<Corners> {
    let u: Vec<f32> = unit(name, 4 * n).map(|u| (u + 1.0) * 0.5).collect();
    let one = |u: &[f32; 4]| {
        let (x, y) = (u[0] * extent, u[1] * extent);
        [x, y, x + (least + u[2] * (most - least)), y + (least + u[3] * (most - least))]
    };
    u.as_chunks().0.iter().map(one).collect()
}

/// Middle and half range of a tensor's values: `rule` of `make.py`.
pub(crate) fn rule(name: &str, shape: &[i64]) -> (f32, f32) {
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends(&["running_var"]) {
        return (1.0, 0.25);
    } else if ends(&["bias", "running_mean"]) {
        return (0.0, 0.1);
    } else if ends(&["bn3.weight"]) {
        return (0.25, 0.1);
    } else if shape.len() == 1 {
        return (1.0, 0.1);
    }
    let variance = if shape.len() == 4 { 6.0 } else { 3.0 };
    let gain = (variance / shape[1..].iter().product::<i64>() as f64).sqrt();
    let factor = if ends(&["rpn_reg.weight"]) {
        0.2
    } else if ends(&["bbox_pred.weight"]) {
        0.05
    } else if ends(&["mask_fcn_logits.weight"]) {
        0.15
    } else {
        1.0
    };
    (0.0, (factor * gain) as f32)
}

pub(crate) fn values(name: &str, shape: &[i64]) -> Tensor {
    let (middle, half_range) = rule(name, shape);
    let flat: Vec<f32> = unit(name, shape.iter().product::<i64>() as usize).map(|u| middle + half_range * u).collect();
    Tensor::from_slice(&flat).reshape(shape)
}

/// Overwrites parameters by what `make.py` gives those of the same name, without `prefix`.
pub(crate) fn fill(parameters: &BTreeMap<String, Tensor>, prefix: &str) {
    for (name, parameter) in parameters {
        let name = name.strip_prefix(prefix).unwrap();
        tch::no_grad(|| parameter.shallow_clone().copy_(&values(name, &parameter.size())));
    }
}

/// Squares of 32 px in random colours, under a fine grain.
pub(crate) fn images(name: &str, [b, c, h, w]: [i64; 4]) -> Tensor {
    let colours = field(&format!("{name}.colours"), &[b, c, h / 32, w / 32]);
    let colours = colours.repeat_interleave_self_int(32, 2, None).repeat_interleave_self_int(32, 3, None);
    colours * 2.0 + field(&format!("{name}.grain"), &[b, c, h, w])
}
