//! The object localisation network.

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Device, Kind, Tensor, nn};

use super::super::oln::{Config, Losses, Oln};
use crate::detection::{
    boxes::{ImageSize, Suppression},
    golden::{Golden, fill, images},
};

#[test]
fn it_learns_and_proposes_as_written_down_with_torchvision() {
    let golden = Golden::read("oln");
    let store = nn::VarStore::new(Device::Cpu);
    let network = Oln::new(&store.root(), &Config::r50(), 1).unwrap();
    fill(network.parameters(), "");
    let mut bias = network.parameters()["rpn_head.rpn_reg.bias"].shallow_clone();
    tch::no_grad(|| bias += 0.5);
    let (images, sizes) = (images("oln", [1, 3, 64, 96]), [ImageSize { width: 96, height: 64 }]);
    let objects = [Tensor::from_slice(&[20.0_f32, 10.0, 58.0, 44.0, 48.0, 16.0, 84.0, 50.0]).reshape([2, 4])];
    let Losses { proposals, centerness, boxes, overlaps } =
        network.losses(&images, &sizes, &objects, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
    let expected = golden.part("losses");
    for (name, found) in [("proposals", &proposals), ("centerness", &centerness), ("boxes", &boxes), ("overlaps", &overlaps)] {
        let (found, expected) = (found.double_value(&[]), expected.0[name].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-4 * expected, "{name}: {found}, not {expected}");
    }
    (proposals + centerness + boxes + overlaps).backward();
    for (name, expected) in &golden.part("gradients").0 {
        let (found, expected) = (network.parameters()[name].grad().norm().double_value(&[]), expected.as_f64().unwrap());
        assert!((found - expected).abs() < 1e-3 * expected, "{name}: {found}, not {expected}");
    }

    let suppression = Suppression { iou: 0.7, keep: 30 };
    let found = network.propose(&images, &sizes, &suppression, 0.0).unwrap().remove(0);
    let apart = |found: &Tensor, expected: Tensor| (found - expected).abs().max().double_value(&[]);
    let n = found.scores.size()[0];
    assert!(apart(&found.scores, golden.tensor("scores", &[n])) < 1e-5);
    assert!(apart(&found.boxes, golden.tensor("boxes", &[n, 4])) < 1e-3);
}

#[test]
fn an_image_without_objects_teaches_that_nothing_is_centred() {
    let store = nn::VarStore::new(Device::Cpu);
    let network = Oln::new(&store.root(), &Config::toy(), 1).unwrap();
    let (images, sizes) = (images("oln", [1, 3, 96, 96]), [ImageSize { width: 96, height: 96 }]);
    let objects = [Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))];
    for kind in [Kind::Float, Kind::BFloat16] {
        let losses = network.losses(&images.to_kind(kind), &sizes, &objects, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
        let values = [&losses.proposals, &losses.centerness, &losses.boxes, &losses.overlaps].map(|loss| loss.double_value(&[]));
        assert!(values[1] > 0.1 && values[0] == 0.0 && values[2] == 0.0 && values[3] == 0.0, "{values:?}");
        (losses.proposals + losses.centerness + losses.boxes + losses.overlaps).backward();
    }
}
