//! The detector against torchvision, by weights and inputs that both sides make from one formula (`tests/golden/detector/make.py`).

mod operators;

use std::{fs, path::Path};

use serde_json::{Map, Value};
use tch::Tensor;

use super::boxes::Corners;
use crate::golden::unit;

struct Golden(Map<String, Value>);

impl Golden {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/detector/{name}.json"));
        Self(serde_json::from_slice(&fs::read(path).expect("the golden file is there")).unwrap())
    }

    fn part(&self, key: &str) -> Self {
        Self(self.0[key].as_object().unwrap().clone())
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        self.0[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    fn integers(&self, key: &str) -> Vec<i64> {
        self.0[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
    }

    fn tensor(&self, key: &str, shape: &[i64]) -> Tensor {
        Tensor::from_slice(&self.floats(key)).reshape(shape)
    }
}

/// Even in [-1, 1).
fn field(name: &str, shape: &[i64]) -> Tensor {
    Tensor::from_slice(&unit(name, shape.iter().product::<i64>() as usize).collect::<Vec<f32>>()).reshape(shape)
}

/// `boxes_of` of `make.py`.
fn boxes_of(name: &str, n: usize, extent: f32, least: f32, most: f32) -> Vec<Corners> {
    let u: Vec<f32> = unit(name, 4 * n).map(|u| (u + 1.0) * 0.5).collect();
    let one = |u: &[f32; 4]| {
        let (x, y) = (u[0] * extent, u[1] * extent);
        [x, y, x + (least + u[2] * (most - least)), y + (least + u[3] * (most - least))]
    };
    u.as_chunks().0.iter().map(one).collect()
}
