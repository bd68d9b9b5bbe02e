//! Extraction end to end (decode, cut, resize, network, shard) as a fraction of the bare network's own speed, beside the peers.
//!
//! Limits: the image tower of ViT-B/32 takes 8.8 GFLOP for a square of 224 px, 54 GFLOP for 640 x 480 px, 35 GFLOP for an object; nothing
//! else can be the bottleneck while decoding (about 4 ms an image) and cutting (about 1 ms a crop) hide behind it. Both sides run the same
//! network on batches of the same shape, on the same threads, in the same process.
//!
//! Peers, where `make peers` has set them up: open_clip with a PyTorch DataLoader, clip-retrieval, and the way of the OADP reference,
//! an image at a time with crops by Pillow.
//!
//! `make bench`; `OVENBIRD_BENCH_IMAGES` sets the number of pictures (1,024, with 10 proposals each; at least 100).
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    sync::{Mutex, atomic::AtomicU64},
    time::{Duration, Instant},
};

use ovenbird_cache::{Digest, Recipe, Store, UnitKey, inputs};
use ovenbird_data::{
    annotations::ImageId,
    boxes::Xyxy,
    images::{Image, Preprocess, SquareResize},
    proposals::Proposal,
    toy::{Set, World},
};
use ovenbird_models::{
    Phase,
    checkpoint::write_safetensors,
    clip::{Activation, Clip, Config, ImageConfig, TextConfig},
};
use ovenbird_stages::{Context, Inputs, OnBadItem, artifacts::Proposals, find, run_together};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, nn, no_grad};

/// Proposals of an image.
const PROPOSALS: usize = 10;
const SIZE: [u32; 2] = [640, 480];

/// ViT-B/32.
fn config() -> Config {
    Config {
        embed_dim: 512,
        image: ImageConfig::Vit { image_side: 224, patch: 32, width: 768, depth: 12, heads: 12, mlp_width: 3072 },
        text: TextConfig { context: 77, vocabulary: 49_408, width: 512, heads: 8, depth: 1 },
        activation: Activation::QuickGelu,
    }
}

fn main() {
    let n_images: usize = std::env::var("OVENBIRD_BENCH_IMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(1024).max(100);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_world(folder, n_images);
    count_flops();
    preparing(folder);

    let weights = nn::VarStore::new(Device::Cpu);
    Clip::new(&weights.root(), &config(), 1).unwrap();
    let tensors: BTreeMap<String, Tensor> = weights.variables().into_iter().collect();
    let checkpoint = folder.join("clip.safetensors");
    write_safetensors(&tensors, &BTreeMap::new(), &mut fs::File::create(&checkpoint).unwrap()).unwrap();
    let file = inputs::digest_path(&checkpoint, None, 0).unwrap().remove(0);
    let clock = Instant::now();
    let checked = file.check().unwrap();
    println!("comparing the checkpoint's digest: {:.2} s of {} MB", clock.elapsed().as_secs_f64(), file.bytes >> 20);
    checked.still().unwrap();

    let has_bf16 = std::arch::is_x86_feature_detected!("avx512bf16");
    if !has_bf16 {
        println!("skipped bf16: this processor is no faster in it");
    }
    for (precision, kind) in [("bf16", Kind::BFloat16), ("f32", Kind::Float)].into_iter().skip(usize::from(!has_bf16)) {
        let clip = Clip::load_as(&config(), &tensors, &checkpoint, Device::Cpu, kind).unwrap();
        // f32 takes four times as long.
        let n = |n: usize| if kind == Kind::Float { n.div_ceil(4) } else { n };
        let stages = [
            (
                "clip/globals",
                json!({"resize": "square"}),
                n(n_images).next_multiple_of(64).min(n_images),
                1,
                Shown::Images([64, 3, 224, 224]),
            ),
            ("clip/globals", json!({"resize": "native"}), n(n_images / 8), 1, Shown::Images([1, 3, 480, 640])),
            ("clip/blocks", json!({}), n(n_images / 16), 27, Shown::Images([64, 3, 224, 224])),
            ("clip/objects", json!({}), n(n_images / 16), PROPOSALS, Shown::Objects(16)),
            ("clip/proposals", json!({"expand": [1.0, 1.5]}), n(n_images / 4), 2 * PROPOSALS, Shown::Images([64, 3, 224, 224])),
            ("clip/proposals", json!({"rule": "lp-ovod"}), n(n_images / 4), 2 * PROPOSALS, Shown::Images([64, 3, 224, 224])),
        ];
        let loading = end_to_end(folder, &[("clip/globals", &json!({"resize": "square"}))], precision, 1, 1)
            - 64.0 / bare(&clip, Shown::Images([64, 3, 224, 224]), Duration::from_secs(2));
        println!("{precision}: loading the network takes {loading:.2} s, which is in every stage's time below");
        for (stage, params, n_images, views, shown) in stages {
            // The machine's speed drifts: the bare network is measured before and after.
            let before = bare(&clip, shown, Duration::from_secs(4));
            let whole = (n_images * views) as f64 / end_to_end(folder, &[(stage, &params)], precision, n_images, PROPOSALS);
            let after = bare(&clip, shown, Duration::from_secs(4));
            let bare = f64::midpoint(before, after);
            let view = params.get("resize").and_then(Value::as_str).unwrap_or("");
            println!(
                "{precision} {stage} {view}: {whole:.1} views/s of {n_images} images, bare network {bare:.1} ({before:.1}, {after:.1}), fraction {:.3}",
                whole / bare
            );
        }
    }
    let fastest = if has_bf16 { "bf16" } else { "f32" };
    one_pass(folder, fastest, n_images / 16);
    memory(folder, fastest);
    peers(folder, fastest, n_images);
}

/// What decoding and cutting take on one core.
fn preparing(folder: &Path) {
    let bytes: Vec<Vec<u8>> = (0..50).map(|index| fs::read(folder.join(format!("images/{index:06}.jpg"))).unwrap()).collect();
    let timed = |what: &str, work: &mut dyn FnMut(usize)| {
        let clock = Instant::now();
        (0..50).for_each(&mut *work);
        println!("{what}: {:.3} ms", clock.elapsed().as_secs_f64() * 1e3 / 50.0);
    };
    // What a reader pays for knowing that it gets what was hashed.
    let files = inputs::digest_path(&folder.join("images"), None, 0).unwrap();
    timed("reading a file", &mut |index| drop(std::hint::black_box(fs::read(&files[index].path).unwrap())));
    timed("reading a file and comparing its digest", &mut |index| drop(std::hint::black_box(files[index].read().unwrap())));
    let mut images = Vec::new();
    timed("decoding 640 x 480", &mut |index| images.push(Image::decode(&bytes[index], folder).unwrap()));
    let preprocess = Preprocess { side_px: 224, resize: SquareResize::Shortest, mean: [0.5; 3], std: [0.5; 3] };
    timed("its centre square of 224", &mut |index| drop(std::hint::black_box(preprocess.square(&images[index]))));
    timed("decoding a draft, and its square", &mut |index| {
        let path = folder.join(format!("images/{index:06}.jpg"));
        let draft = Image::decode_draft(&fs::read(&path).unwrap(), &path, SIZE, 224).unwrap();
        drop(std::hint::black_box(preprocess.square_of_draft(&draft, SIZE)));
    });
    timed("a crop of 160 px to 224", &mut |index| drop(std::hint::black_box(preprocess.square_of(&images[index], [100, 100, 260, 260]))));
    timed("a square of 500 px to 224", &mut |index| drop(std::hint::black_box(preprocess.square_of(&images[index], [-50, -50, 450, 450]))));
}

/// Multiplications and additions of an object, by the formulas of a pre-norm transformer: 2 a product.
fn count_flops() {
    let (c, depth, patches, mlp, embed) = (768_f64, 12_f64, 196_f64, 3072_f64, 512_f64);
    let tokens = patches + 1.0;
    let block = |n: f64, attended: f64| 2.0 * n * (4.0 * c * c + 2.0 * c * mlp) + 4.0 * n * attended * c;
    let patchify = 2.0 * patches * 3.0 * 32.0 * 32.0 * c;
    let last = 2.0 * c * embed;
    // Its own queries, keys and values of all patches, and one token's attention and perceptron.
    let object_apart = 2.0 * (tokens * 3.0 * c * c + c * c + 2.0 * c * mlp) + 4.0 * tokens * c;
    let reference = patchify + depth * (block(tokens, tokens) + object_apart) + last;
    let object_shared = block(1.0, tokens);
    let last_block = 2.0 * (patches * 2.0 * c * c) + object_shared;
    let ours = patchify + (depth - 1.0) * (block(tokens, tokens) + object_shared) + last_block + last;
    println!(
        "an object: {:.1} GFLOP in the reference, {:.1} here: {:.1} % saved (keys and values shared; of the last block only what is read)",
        reference / 1e9,
        ours / 1e9,
        100.0 * (1.0 - ours / reference)
    );
}

/// A hundred scenes, each under many names, are as good as thousands: every file is decoded on its own.
fn write_world(folder: &Path, n_images: usize) {
    let images = folder.join("images");
    fs::create_dir(&images).unwrap();
    let world = World { seed: 1, side_px: 640 };
    for index in 0..n_images {
        let name = format!("{index:06}.jpg");
        if index < 100 {
            let scene = Image::decode(&world.scene(Set::Val, index).jpeg, &images).unwrap();
            fs::write(images.join(&name), scene.resize(SIZE[0], SIZE[1]).to_jpeg(90)).unwrap();
        } else {
            fs::copy(images.join(format!("{:06}.jpg", index % 100)), images.join(&name)).unwrap();
        }
    }
}

/// Boxes of 30 to 300 px, as many of each image.
fn proposals(n_images: usize, per_image: usize) -> Proposals {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut proposal = || {
        let [width, height] = [random.random_range(30.0..300.0), random.random_range(30.0..300.0)];
        let [x1, y1] = [random.random_range(0.0..640.0 - width), random.random_range(0.0..480.0 - height)];
        Proposal { xyxy: Xyxy { x1, y1, x2: x1 + width, y2: y1 + height }, score: 0.5 }
    };
    Proposals { by_image: (0..n_images).map(|image| (ImageId(image as u64 + 1), (0..per_image).map(|_| proposal()).collect())).collect() }
}

/// What a network is shown at once.
#[derive(Clone, Copy)]
enum Shown {
    /// Of this shape.
    Images([i64; 4]),
    /// So many squares with masks.
    Objects(i64),
}

/// Views a second of the network alone, on tensors that are ready.
fn bare(clip: &Clip, shown: Shown, at_least: Duration) -> f64 {
    let run = |n: usize| {
        let clock = Instant::now();
        let mut n_views = 0;
        for _ in 0..n {
            n_views += match shown {
                Shown::Images(shape) => {
                    drop(no_grad(|| clip.encode_image(&Tensor::zeros(shape, (clip.kind(), Device::Cpu)), Phase::Test)).unwrap());
                    shape[0]
                }
                Shown::Objects(n_objects) => {
                    let pixels = Tensor::zeros([n_objects, 3, 224, 224], (clip.kind(), Device::Cpu));
                    let masks = Tensor::zeros([n_objects, 14, 14], (clip.kind(), Device::Cpu));
                    drop(no_grad(|| clip.encode_objects(&pixels, &masks)).unwrap());
                    n_objects
                }
            };
        }
        (n_views as f64, clock.elapsed().as_secs_f64())
    };
    run(1);
    let (_, one) = run(1);
    let (n_views, seconds) = run((at_least.as_secs_f64() / one).ceil() as usize);
    n_views / seconds
}

/// Seconds of some stages in one pass over `n_images` images, from opening the weights to published units.
fn end_to_end(folder: &Path, stages: &[(&str, &Value)], precision: &str, n_images: usize, per_image: usize) -> f64 {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    let _session = store.enter().unwrap();
    let listed = |index: usize| json!({"id": index + 1, "file_name": format!("{index:06}.jpg"), "width": SIZE[0], "height": SIZE[1]});
    let listed: Vec<Value> = (0..n_images).map(listed).collect();
    fs::write(folder.join("annotations.json"), json!({"images": listed, "annotations": [], "categories": []}).to_string()).unwrap();
    let key = UnitKey { kind: "bench/proposals".into(), fingerprint: Digest::of(b"proposals").to_hex().parse().unwrap(), item_key: None };
    let draft = store.begin_unit(&key).unwrap();
    proposals(n_images, per_image).write(draft.create("proposals/proposals.parquet").unwrap()).unwrap();
    let record = store.commit_unit(draft, key, &[], BTreeMap::new()).unwrap();

    let mut inputs = Inputs::default();
    for (port, name) in [("images", "images"), ("annotations", "annotations.json"), ("checkpoint", "clip.safetensors")] {
        inputs.ports.insert(port.into(), inputs::digest_path(&folder.join(name), None, 0).unwrap());
    }
    inputs.ports.insert("proposals".into(), store.unit_port(&record, "proposals"));
    let made: Vec<_> = stages
        .iter()
        .map(|(kind, params)| {
            let entry = find(kind).unwrap();
            let mut params = (*params).clone();
            if *kind != "crops/objects" {
                params["clip"] = json!({"precision": precision, "gelu": "quick"});
            }
            let stage = (entry.parse)(&params).map_err(|problem| problem.problem).unwrap();
            let mut inputs = inputs.clone();
            inputs.ports.retain(|port, _| entry.inputs.iter().any(|known| known.name == port));
            let recipe = Recipe { kind: entry.kind.into(), version: entry.version, params, inputs: BTreeMap::new() };
            let (units, items) = stage.units(&inputs).unwrap().of(&recipe);
            (entry, stage, inputs, units, items)
        })
        .collect();
    let (n_failed, watch) = (AtomicU64::new(0), Mutex::default());
    let contexts: Vec<Context<'_>> = made
        .iter()
        .map(|(entry, _, inputs, units, items)| Context {
            store: &store,
            kind: entry.kind,
            units,
            items,
            on_bad_item: OnBadItem::Fail,
            n_failed: &n_failed,
            watch: &watch,
            inputs,
            most_items: None,
            device: Device::Cpu,
            has_bf16: true,
            threads: 2,
            is_stopped: &|| false,
            report: &|_| {},
        })
        .collect();
    let clock = Instant::now();
    let stages = made.iter().zip(&contexts).map(|((entry, stage, _, units, _), context)| (*entry, &**stage, &units[..], context));
    run_together(&stages.collect::<Vec<_>>()).unwrap();
    clock.elapsed().as_secs_f64()
}

/// Several stages in one pass beside one after the other.
fn one_pass(folder: &Path, precision: &str, n_images: usize) {
    let (nothing, native) = (json!({}), json!({"resize": "native"}));
    let stages = [("clip/globals", &native), ("clip/objects", &nothing), ("crops/objects", &nothing)];
    let apart: f64 = stages.iter().map(|stage| end_to_end(folder, &[*stage], precision, n_images, PROPOSALS)).sum();
    let together = end_to_end(folder, &stages, precision, n_images, PROPOSALS);
    println!("globals, objects and crops of {n_images} images: {apart:.1} s one after the other, {together:.1} s in one pass");
}

/// Peak memory of this process while it makes objects of few images with more and more proposals.
fn memory(folder: &Path, precision: &str) {
    for per_image in [10, 100, 1000, 3000] {
        // Sets the peak back to what is resident.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = resident("VmRSS:");
        end_to_end(folder, &[("clip/proposals", &json!({}))], precision, 3000_usize.div_ceil(per_image).min(100), per_image);
        println!("{per_image:4} proposals an image: peak {:.0} MiB, {before:.0} before", resident("VmHWM:"));
    }
}

fn resident(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap() / 1024.0
}

/// What Python packages make of the same files.
fn peers(folder: &Path, fastest: &str, n_images: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (venv, script, n_images) in [
        ("peers", "open_clip_globals.py", n_images),
        ("clip-retrieval", "clip_retrieval_inference.py", n_images / 4),
        ("peers", "oadp_objects.py", n_images / 32),
    ] {
        let python = root.join("target").join(venv).join("bin/python");
        if !python.exists() {
            println!("skipped {script}: its peer is not set up (`make peers`)");
            continue;
        }
        let output = Command::new(&python)
            .arg(root.join("benches/peers").join(script))
            .arg(folder)
            .arg(n_images.to_string())
            .arg(fastest)
            .output()
            .unwrap();
        if !output.status.success() {
            println!("skipped {script}: {}", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default());
            continue;
        }
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
}
