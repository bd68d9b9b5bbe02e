//! Augmenting stored embeddings of regions (RALF, section 8.2) beside CLIP's pass that made them, both as bare networks: ViT-B/32 on squares of
//! 224 px, in f32 and in bf16, and the augmenter of full size with 10,000 concepts in f32.
//!
//! Limit: 8.8 GFLOP a region for CLIP, 0.06 for the augmenter with its search: 150 times in equal arithmetic.
//!
//! `make bench`.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and may end where it fails")]

use std::{collections::BTreeMap, path::Path, time::Instant};

use ovenbird_models::{
    Phase,
    augmenter::{self, Augmenter, Concepts},
    clip::{Activation, Clip, Config, ImageConfig, TextConfig},
    to_unit_length,
};
use tch::{Device, Kind, Tensor, nn, no_grad};

const SQUARES: i64 = 64;
const REGIONS: i64 = 256;
const CONCEPTS: i64 = 10_000;
const ROUNDS: u32 = 10;

fn main() {
    tch::set_num_threads(std::thread::available_parallelism().map_or(1, usize::from) as i32);
    let options = (Kind::Float, Device::Cpu);
    let store = nn::VarStore::new(Device::Cpu);
    let network = Augmenter::new(&store.root(), &augmenter::Config::ralf(512), 1).unwrap();
    let concepts = Concepts::new(&Tensor::randn([CONCEPTS, 512], options)).unwrap();
    let regions = to_unit_length(&Tensor::randn([REGIONS, 512], options));
    let augmented = a_second(REGIONS, || drop(network.forward(&regions, &concepts, None).unwrap().out()));

    let config = Config {
        embed_dim: 512,
        image: ImageConfig::Vit { image_side: 224, patch: 32, width: 768, depth: 12, heads: 12, mlp_width: 3072 },
        text: TextConfig { context: 77, vocabulary: 49_408, width: 512, heads: 8, depth: 1 },
        activation: Activation::QuickGelu,
    };
    let weights = nn::VarStore::new(Device::Cpu);
    Clip::new(&weights.root(), &config, 1).unwrap();
    let weights: BTreeMap<String, Tensor> = weights.variables().into_iter().collect();
    println!("augmented: {augmented:.0} regions/s");
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let clip = Clip::load_as(&config, &weights, Path::new("clip"), Device::Cpu, kind).unwrap();
        let squares = Tensor::randn([SQUARES, 3, 224, 224], options).to_kind(kind);
        let embedded = a_second(SQUARES, || drop(clip.encode_image(&squares, Phase::Test).unwrap()));
        println!("CLIP in {name}: {embedded:.0} regions/s; augmenting is {:.0} times as fast", augmented / embedded);
    }
}

/// How many rows a pass over so many makes in a second.
fn a_second(rows: i64, pass: impl Fn()) -> f64 {
    no_grad(|| {
        pass();
        let clock = Instant::now();
        (0..ROUNDS).for_each(|_| pass());
        f64::from(ROUNDS) * rows as f64 / clock.elapsed().as_secs_f64()
    })
}
