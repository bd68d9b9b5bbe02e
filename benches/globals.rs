//! `clip/globals` end to end (decode, resize, network, shard) as a fraction of the bare network's own speed.
//!
//! Limit: the image tower of ViT-B/32 takes 8.8 GFLOP an image; nothing else can be the bottleneck while decoding (about 2 ms
//! an image) hides behind it. Both sides run the same network, batch 64, on the same threads, in the same process.
//!
//! `make bench`; `OVENBIRD_BENCH_IMAGES` sets the number of pictures (2,000).
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Instant,
};

use ovenbird_cache::{Recipe, Store, inputs};
use ovenbird_data::{
    images::Image,
    toy::{Set, World},
};
use ovenbird_models::{
    checkpoint::write_safetensors,
    clip::{Activation, Clip, Config, ImageConfig, Mode, TextConfig},
};
use ovenbird_stages::{Context, Inputs, OnBadItem, find};
use serde_json::json;
use tch::{Device, Kind, Tensor, nn, no_grad};

const BATCH: i64 = 64;

fn main() {
    let n_images: usize = std::env::var("OVENBIRD_BENCH_IMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    let world = World { seed: 1, side_px: 320 };
    let mut listed = Vec::new();
    for index in 0..n_images {
        // A hundred scenes, each under many names, are as good as two thousand: every file is decoded on its own.
        let name = format!("{index:06}.jpg");
        if index < 100 {
            let scene = Image::decode(&world.scene(Set::Val, index).jpeg, &images).unwrap();
            fs::write(images.join(&name), scene.resize(224, 224).to_jpeg(90)).unwrap();
        } else {
            fs::copy(images.join(format!("{:06}.jpg", index % 100)), images.join(&name)).unwrap();
        }
        listed.push(json!({"id": index + 1, "file_name": name, "width": 224, "height": 224}));
    }
    let annotations = folder.path().join("annotations.json");
    fs::write(&annotations, json!({"images": listed, "annotations": [], "categories": []}).to_string()).unwrap();

    let config = Config {
        embed_dim: 512,
        image: ImageConfig::Vit { image_side: 224, patch: 32, width: 768, depth: 12, heads: 12, mlp_width: 3072 },
        text: TextConfig { context: 77, vocabulary: 49_408, width: 512, heads: 8, depth: 1 },
        activation: Activation::QuickGelu,
    };
    let weights = nn::VarStore::new(Device::Cpu);
    Clip::new(&weights.root(), &config, 1).unwrap();
    let tensors: BTreeMap<String, Tensor> = weights.variables().into_iter().collect();
    let checkpoint = folder.path().join("clip.safetensors");
    write_safetensors(&tensors, &BTreeMap::new(), &mut fs::File::create(&checkpoint).unwrap()).unwrap();

    for (precision, kind) in [("bf16", Kind::BFloat16), ("f32", Kind::Float)] {
        let clip = Clip::load_as(&config, &tensors, &checkpoint, Device::Cpu, kind).unwrap();
        let ready = Tensor::zeros([BATCH, 3, 224, 224], (kind, Device::Cpu));
        let bare = |n_batches: usize| {
            let clock = Instant::now();
            for _ in 0..n_batches {
                drop(no_grad(|| clip.encode_image(&ready, Mode::Eval)).unwrap());
            }
            (n_batches as i64 * BATCH) as f64 / clock.elapsed().as_secs_f64()
        };
        bare(2);
        // The machine's speed drifts: the bare network is measured before and after.
        let before = bare(n_images / 2 / BATCH as usize + 1);
        let whole = end_to_end(folder.path(), precision, n_images);
        let after = bare(n_images / 2 / BATCH as usize + 1);
        let bare = f64::midpoint(before, after);
        println!(
            "{precision}: end to end {whole:.1} images/s, bare network {bare:.1} images/s ({before:.1} before, {after:.1} after), fraction {:.3}",
            whole / bare
        );
    }
}

fn end_to_end(folder: &std::path::Path, precision: &str, n_images: usize) -> f64 {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    let mut inputs = Inputs::default();
    for (port, name) in [("images", "images"), ("annotations", "annotations.json"), ("checkpoint", "clip.safetensors")] {
        inputs.ports.insert(port.into(), inputs::digest_path(&folder.join(name), None, 0).unwrap());
    }
    let entry = find("clip/globals").unwrap();
    let params = json!({"view": "square", "clip": {"precision": precision, "gelu": "quick"}});
    let stage = (entry.parse)(&params).map_err(|problem| problem.problem).unwrap();
    let recipe = Recipe { kind: entry.kind.into(), version: entry.version, params, inputs: BTreeMap::new() };
    let (units, items) = stage.units(&inputs).unwrap().of(&recipe);
    let stop = AtomicBool::new(false);
    let context = Context {
        store: &store,
        kind: entry.kind,
        units: &units,
        items: &items,
        on_bad_item: OnBadItem::Fail,
        n_failed: &AtomicU64::new(0),
        watch: &Mutex::default(),
        inputs: &inputs,
        device: Device::Cpu,
        threads: 2,
        stop: &stop,
        report: &|_| {},
    };
    let clock = Instant::now();
    stage.run(&units, &context).unwrap();
    n_images as f64 / clock.elapsed().as_secs_f64()
}
