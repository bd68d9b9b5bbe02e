//! Shared by the golden tests: numbers by the formula of `tests/golden/*/make.py`, and those that published code computed.

use std::path::Path;

use ovenbird_data::{annotations::ImageId, boxes::Xyxy, images::Image, training::Placement};
use ovenbird_models::{
    clip::{Activation, Clip, Config, ImageConfig, TextConfig},
    detection::boxes::ImageSize,
};
use tch::{Device, Kind, Tensor, nn};

use crate::{
    artifacts::Regions,
    detector::images::{Normalisation, Pixels},
    region::{embed::embed, frozen::Frozen},
};

#[path = "../../models/src/golden.rs"]
mod shared;

pub(crate) use shared::{cora, cora_values, cora_weights, detpro_ralf, error, lp_ovod, promptdet, unit, with_tower};

/// The numbers of a tensor of any kind, row by row.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1)).expect("f64 numbers")
}

/// The sizes of the two images of CORA's golden data, padded to 131 x 101.
pub(crate) const CORA_SIZES: [ImageSize; 2] = [ImageSize { width: 131, height: 101 }, ImageSize { width: 107, height: 93 }];

/// Both images, padded, as a network gets them.
pub(crate) fn cora_images() -> Tensor {
    let trunk = cora("trunk");
    let [ImageSize { width, height }, _] = CORA_SIZES;
    let padded = |(name, size): (&str, ImageSize)| trunk[name].constant_pad_nd([0, width - size.width, 0, height - size.height]);
    Tensor::stack(&[("image0", CORA_SIZES[0]), ("image1", CORA_SIZES[1])].map(padded), 0)
}

/// The CLIP of CORA's golden data: a ResNet of width 4 with a grid of 7 x 7. Its text tower is arbitrary.
pub(crate) fn cora_clip() -> Clip {
    let config = Config {
        embed_dim: 16,
        image: ImageConfig::ResNet { image_side: 224, layers: [1, 2, 1, 2], width: 4, heads: 2 },
        text: TextConfig { context: 4, vocabulary: 8, width: 64, heads: 1, depth: 1 },
        activation: Activation::QuickGelu,
    };
    let store = nn::VarStore::new(Device::Cpu);
    Clip::new(&store.root(), &config, 1).unwrap();
    let mut weights: std::collections::BTreeMap<String, Tensor> = store.variables().into_iter().collect();
    weights.extend(cora_weights("tiny").into_iter().map(|(name, tensor)| (format!("visual.{name}"), tensor)));
    Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap()
}

/// What `region/embed` makes of boxes of an image of the golden file `relabel`, px, with a region prompt or without.
pub(crate) fn cora_regions(image_id: ImageId, boxes: &[Xyxy], table: Option<&Tensor>) -> Regions {
    let golden = cora("relabel");
    let levels = &golden[&format!("image{image_id}")];
    let (height, width, _) = levels.size3().unwrap();
    let rgb = Vec::<u8>::try_from(levels.flatten(0, -1)).unwrap();
    let placement = Placement::shorter([width as u32, height as u32], Some(1333), 800);
    let shown = placement.pixels(&Image { width: width as u32, height: height as u32, rgb });
    let pixels = Pixels::tight(&[shown], Normalisation::CLIP).on(Device::Cpu);
    // Levels are normalised by 255ths there.
    let some = pixels.flatten(0, -1);
    let some = some.index_select(0, &Tensor::arange_start_step(0, some.size()[0], 4999, (Kind::Int64, Device::Cpu)));
    let apart = error(&some, &golden[&format!("input{image_id}_every4999")]);
    assert!(apart < 1e-6, "image {image_id}: {apart}");
    let frozen = Frozen::of(cora_clip(), table.map(Tensor::shallow_clone));
    let embeddings = if boxes.is_empty() {
        Tensor::zeros([0], (Kind::Float, Device::Cpu))
    } else {
        embed(&frozen.regions().unwrap(), &pixels, &placement, boxes).unwrap()
    };
    Regions {
        image_id,
        size_px: placement.from,
        boxes: boxes.to_vec(),
        objectness: vec![1.0; boxes.len()],
        embeddings: Vec::try_from(embeddings.flatten(0, -1)).unwrap(),
    }
}
