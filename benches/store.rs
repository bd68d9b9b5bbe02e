//! The store and the executor at a million items, each beside a physical limit or the way of one file an item.
//!
//! Limits: a no-op run has to start the program and look at two inodes a unit; a full scan has to read every byte and pass it
//! through BLAKE3; a random look-up has to touch one page; a commit has to fsync its files and folders.
//!
//! Peers, where `make peers` has set them up: `dvc status` of the same folders, and loading one file an image in PyTorch.
//!
//! `make bench`; `OVENBIRD_BENCH_ITEMS` sets the number of items (1,000,000: 1 GB of features and as many small files).
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

mod support;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use ovenbird_cache::{Digest, Provenance, Recipe, Store, UnitKey, UnitRecord, files_digest, inputs, shard::ShardReader, unit_name};
use ovenbird_data::annotations::ImageId;
use ovenbird_stages::{
    Units,
    artifacts::{Dtype, ImageFeaturesWriter},
    find,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use support::watched;

const DIM: usize = 512;
const ROWS: usize = 1024;

fn main() {
    let n_items: usize = std::env::var("OVENBIRD_BENCH_ITEMS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000_000);
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let store = Store::open(&home).unwrap();
    drop(store.enter().unwrap());

    println!("-- {n_items} items, {DIM} f16 each, {} units", n_items.div_ceil(ROWS));
    fs::create_dir(folder.path().join("images")).unwrap();
    fs::write(folder.path().join("images/0.jpg"), b"an image").unwrap();
    write_pipeline(folder.path());
    let (units, writing) = made(folder.path(), &store, n_items);
    let bytes: u64 = units.iter().map(UnitRecord::bytes).sum();
    println!("written with digests and statistics: {:.0} rows/s", n_items as f64 / writing);
    println!("  share of extraction at 92 images/s: {:.4} %", 100.0 * 92.0 * writing / n_items as f64);

    for args in [&["plan", "./bench.yaml"][..], &["run", "./bench.yaml"], &["verify"]] {
        let (wall, peak) = best_of(5, folder.path(), args);
        println!("ovenbird {}: {wall:.3} s, peak {peak:.0} MiB", args[0]);
    }
    let (wall, _) = best_of(5, folder.path(), &["stages"]);
    println!("ovenbird stages (starting the program, and nothing else): {wall:.3} s");

    let scan = (0..3).map(|_| scanned(folder.path())).fold(f64::MAX, f64::min);
    let paths: Vec<PathBuf> = units.iter().flat_map(|unit| files(&store, unit)).collect();
    let bare = (0..3).map(|_| hashed(&paths)).fold(f64::MAX, f64::min);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    println!(
        "verify --full: {:.2} GB/s; BLAKE3 of the same files and nothing else: {:.2} GB/s; ratio {:.2}",
        rate(scan),
        rate(bare),
        bare / scan
    );

    one_file_an_image(folder.path(), n_items as f64 / scan);
    look_ups(folder.path(), &paths, n_items);
    println!("-- small input files");
    for n_files in [n_items / 100, n_items / 10] {
        small_files(n_files);
    }
    small_files(n_items);
    overhead(folder.path());
    after_a_kill(folder.path());
}

/// A program of `make peers`; none, aloud, where it is not set up.
fn peer(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin").join(name);
    if !path.exists() {
        println!("skipped: {name} is not set up (`make peers`)");
    }
    path.exists().then_some(path)
}

/// Checking features by loading one file an image, as the reference does, beside a full scan of shards.
fn one_file_an_image(folder: &Path, scanned_per_s: f64) {
    let Some(python) = peer("python") else { return };
    let n_files = 20_000;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/per_image_files.py");
    let output = Command::new(python).arg(script).arg(folder.join("pth")).args([n_files.to_string(), DIM.to_string()]).output().unwrap();
    let Ok(seconds) = String::from_utf8_lossy(&output.stdout).trim().parse::<f64>() else {
        return println!("one file an image: not measured (`make peers`)");
    };
    let loaded_per_s = f64::from(n_files) / seconds;
    println!("rows checked: {scanned_per_s:.0}/s by verify --full, {loaded_per_s:.0}/s by torch.load of one file an image");
}

/// An artifact of `clip/globals` with rows of unit norm, published as the program would; and how long writing took, in s.
fn made(folder: &Path, store: &Store, n_items: usize) -> (Vec<UnitRecord>, f64) {
    let recipe = recipe(folder);
    let item_key = Some(recipe.fingerprint());
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let row: Vec<f32> = (0..DIM).map(|_| random.random_range(-1.0..1.0)).collect();
    let norm = row.iter().map(|number| number * number).sum::<f32>().sqrt();
    let mut row: Vec<f32> = row.into_iter().map(|number| number / norm).collect();
    let clock = Instant::now();
    let mut units = Vec::new();
    for first in (0..n_items).step_by(ROWS) {
        let items: Vec<Digest> = (first..n_items.min(first + ROWS)).map(|item| Digest::of(&item.to_le_bytes())).collect();
        let fingerprint = recipe.fingerprint().part("bench", &(first as u64).to_le_bytes());
        let key = UnitKey { kind: recipe.kind.clone(), fingerprint, item_key };
        let draft = store.begin_unit(&key).unwrap();
        let mut shard =
            ImageFeaturesWriter::new(draft.create("features/globals.arrow").unwrap(), &fingerprint, Dtype::F16, DIM, None).unwrap();
        for item in first..first + items.len() {
            row.rotate_right(1);
            shard.push(ImageId(item as u64), &row).unwrap();
        }
        shard.finish().unwrap();
        units.push(store.commit_unit(draft, key, &items, BTreeMap::new()).unwrap());
    }
    let writing = clock.elapsed().as_secs_f64();
    publish(store, recipe, units.clone());
    (units, writing)
}

fn write_pipeline(folder: &Path) {
    fs::write(folder.join("labels.json"), b"{}").unwrap();
    fs::write(folder.join("clip.safetensors"), b"weights").unwrap();
    let text = "version: 1\nname: bench\nstages:\n  - {id: globals, use: clip/globals, in: {images: ./images, annotations: ./labels.json, checkpoint: ./clip.safetensors}}\n";
    fs::write(folder.join("bench.yaml"), text).unwrap();
}

/// What the program will say the step is made from.
fn recipe(folder: &Path) -> Recipe {
    let entry = find("clip/globals").unwrap();
    let stage = (entry.parse)(&json!({})).map_err(|problem| problem.problem).unwrap();
    let digest = |name: &str| files_digest(&inputs::digest_path(&folder.join(name), None, 0).unwrap());
    let inputs = [("images", "images"), ("annotations", "labels.json"), ("checkpoint", "clip.safetensors")];
    let inputs = inputs.map(|(port, name)| (port.to_owned(), digest(name))).into();
    Recipe { kind: entry.kind.into(), version: entry.version, params: stage.params(), inputs }
}

fn publish(store: &Store, recipe: Recipe, units: Vec<UnitRecord>) {
    let text = || String::from("bench");
    let made = Provenance { program: text(), run: text(), host: text(), device: text(), libtorch: text(), started: text(), wall_s: 0.0 };
    drop(store.commit_artifact(recipe, &["features"], units, made).unwrap());
}

fn files(store: &Store, unit: &UnitRecord) -> Vec<PathBuf> {
    let folder = store.unit_path(&unit_name(&unit.key.kind, &unit.key.fingerprint));
    unit.files.iter().map(|file| folder.join(&file.name)).collect()
}

/// The shortest of some executions, in s, and its greatest resident memory, in MiB.
fn best_of(n: usize, folder: &Path, args: &[&str]) -> (f64, f64) {
    let mut best = (f64::MAX, 0.0);
    for _ in 0..n {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        let taken = watched(command.args(args).args(["--home", "home"]).current_dir(folder));
        if taken.0 < best.0 {
            best = taken;
        }
    }
    best
}

/// Seconds of a full scan, as the program measures them: without its own start.
fn scanned(folder: &Path) -> f64 {
    let args = ["verify", "--full", "--json", "--home", "home"];
    let output = Command::new(env!("CARGO_BIN_EXE_ovenbird")).args(args).current_dir(folder).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    report["verify"]["wall_s"].as_f64().unwrap()
}

/// Seconds to read files and hash them on all cores.
fn hashed(paths: &[PathBuf]) -> f64 {
    let clock = Instant::now();
    let n_threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for first in 0..n_threads {
            scope.spawn(move || {
                let mut buffer = vec![0; 1 << 18];
                for path in paths.iter().skip(first).step_by(n_threads) {
                    let (mut file, mut hasher) = (fs::File::open(path).unwrap(), blake3::Hasher::new());
                    while let Ok(n_read @ 1..) = file.read(&mut buffer) {
                        hasher.update(&buffer[..n_read]);
                    }
                    std::hint::black_box(hasher.finalize());
                }
            });
        }
    });
    clock.elapsed().as_secs_f64()
}

/// Random rows through the memory map, beside opening one small file an item.
fn look_ups(folder: &Path, paths: &[PathBuf], n_items: usize) {
    let shards: Vec<ShardReader> = paths
        .iter()
        .filter(|path| path.extension().is_some_and(|end| end == "arrow"))
        .map(|path| ShardReader::open(path, None).unwrap())
        .collect();
    let clock = Instant::now();
    let batches: Vec<Vec<_>> = shards.iter().map(|shard| shard.batches().collect::<Result<_, _>>().unwrap()).collect();
    let mut places = HashMap::new();
    for (shard_idx, batches) in batches.iter().enumerate() {
        for (batch_idx, batch) in batches.iter().enumerate() {
            let ids = batch.column(0).as_any().downcast_ref::<arrow::array::UInt64Array>().unwrap();
            places.extend(ids.values().iter().enumerate().map(|(row, id)| (*id, (shard_idx, batch_idx, row))));
        }
    }
    println!("opening all shards, every digest checked: {:.2} s", clock.elapsed().as_secs_f64());
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let wanted: Vec<u64> = (0..1_000_000).map(|_| random.random_range(0..n_items as u64)).collect();
    let clock = Instant::now();
    let mut sum = 0.0;
    for id in &wanted {
        let (shard, batch, row) = places[id];
        let vectors = batches[shard][batch].column(1).as_any().downcast_ref::<arrow::array::FixedSizeListArray>().unwrap();
        let values = vectors.values().as_any().downcast_ref::<arrow::array::Float16Array>().unwrap().values();
        sum += values[row * DIM..(row + 1) * DIM].iter().step_by(64).map(|number| number.to_f32()).sum::<f32>();
    }
    let mapped = clock.elapsed().as_secs_f64() / wanted.len() as f64;
    let small = folder.join("rows");
    fs::create_dir(&small).unwrap();
    let n_files = n_items.min(100_000);
    (0..n_files).for_each(|item| fs::write(small.join(item.to_string()), [7; 2 * DIM]).unwrap());
    let clock = Instant::now();
    for id in &wanted[..100_000] {
        sum += f32::from(fs::read(small.join((id % n_files as u64).to_string())).unwrap()[0]);
    }
    let opened = clock.elapsed().as_secs_f64() / 1e5;
    println!(
        "random look-up: {:.2} us through the map, {:.2} us by a file an item: {:.0} times ({sum:.0})",
        mapped * 1e6,
        opened * 1e6,
        opened / mapped
    );
    fs::remove_dir_all(small).unwrap();
}

/// A no-op plan over as many small input files, and after one of them has changed; and what DVC takes on the same folder.
fn small_files(n_files: usize) {
    let folder = tempfile::tempdir().unwrap();
    let (folder, images) = (folder.path(), folder.path().join("images"));
    fs::create_dir(&images).unwrap();
    let name = |item: usize| images.join(format!("{item:012}.jpg"));
    (0..n_files).for_each(|item| fs::write(name(item), item.to_le_bytes()).unwrap());
    write_pipeline(folder);
    let store = Store::open(&folder.join("home")).unwrap();
    drop(store.enter().unwrap());
    publish(&store, recipe(folder), Vec::new());
    // Times of files that changed just now are not trusted.
    thread::sleep(Duration::from_secs(3));
    let (first, _) = best_of(1, folder, &["plan", "./bench.yaml"]);
    let (warm, peak) = best_of(3, folder, &["plan", "./bench.yaml"]);
    let clock = Instant::now();
    assert!((0..n_files).all(|item| name(item).exists()));
    let exists = clock.elapsed().as_secs_f64();
    fs::write(name(7), b"changed").unwrap();
    publish(&store, recipe(folder), Vec::new());
    let (changed, _) = best_of(1, folder, &["plan", "./bench.yaml"]);
    println!(
        "{n_files} files: hashed once in {first:.2} s; plan {warm:.2} s, peak {peak:.0} MiB; after one changed {changed:.2} s; exists() of each {exists:.2} s"
    );
    // DVC takes minutes for a million.
    if n_files <= 100_000
        && let Some(dvc) = peer("dvc")
    {
        let run = |args: &[&str]| {
            let clock = Instant::now();
            let status =
                Command::new(&dvc).args(args).current_dir(folder).env("DVC_NO_ANALYTICS", "1").stdout(Stdio::null()).status().unwrap();
            assert!(status.success(), "{args:?}");
            clock.elapsed().as_secs_f64()
        };
        run(&["init", "--no-scm", "--quiet"]);
        let first = run(&["add", "--quiet", "images"]);
        let warm = (0..3).map(|_| run(&["status"])).fold(f64::MAX, f64::min);
        println!("  dvc add {first:.1} s, dvc status {warm:.2} s");
    }
}

/// How long the program takes from its start after a kill to the first unit it adds, in a home of 100,000 other units.
fn after_a_kill(folder: &Path) {
    let pipeline = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/quickstart.yaml")).unwrap();
    let small =
        pipeline.replace("with: {seed: \"${seed}\"}", "with: {seed: \"${seed}\", steps: 100000, checkpoint_every: 1, batch_size: 8}");
    fs::write(folder.join("kill.yaml"), small).unwrap();
    let n_links = || fs::read_dir(folder.join("empty/units/clip-pretrain")).map_or(0, Iterator::count);
    let start = || {
        let args = ["run", "./kill.yaml", "--until", "clip", "--set", "web_images=200", "--home", "empty"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        command.args(args).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let until = |n: usize| {
        while n_links() < n {
            thread::sleep(Duration::from_millis(2));
        }
    };
    let mut seconds = Vec::new();
    for _ in 0..4 {
        let before = n_links();
        let clock = Instant::now();
        let mut running = start();
        // A unit in the making counts as a folder, too.
        until(before + 2);
        seconds.push(clock.elapsed().as_secs_f64());
        let one_more = Instant::now();
        until(before + 12);
        let link = one_more.elapsed().as_secs_f64() / 10.0;
        running.kill().unwrap();
        running.wait().unwrap();
        println!("start after a kill: first unit after {:.2} s; each further one {link:.2} s", seconds[seconds.len() - 1]);
    }
}

/// What a unit costs that holds nothing.
fn overhead(folder: &Path) {
    let home = folder.join("empty");
    let store = Store::open(&home).unwrap();
    drop(store.enter().unwrap());
    let recipe = Recipe { kind: "bench/empty".into(), version: 1, params: json!({}), inputs: BTreeMap::new() };
    let clock = Instant::now();
    let (units, _) = Units::Chain { checkpoints: 1_000_000, steps: 1_000_000, images_per_step: 1, stay: Vec::new() }.of(&recipe);
    let n_there =
        units.iter().filter(|unit| matches!(store.unit("bench/empty", &unit.fingerprint), Ok(ovenbird_cache::Status::Valid(_)))).count();
    println!("-- a stage of {} units planned in {:.2} s ({n_there} there)", units.len(), clock.elapsed().as_secs_f64());
    let make = |n: usize| {
        let clock = Instant::now();
        for unit in &units[..n] {
            let key = UnitKey { kind: recipe.kind.clone(), fingerprint: unit.fingerprint, item_key: None };
            drop(store.commit_unit(store.begin_unit(&key).unwrap(), key, &[], BTreeMap::new()).unwrap());
        }
        clock.elapsed().as_secs_f64() / n as f64 * 1e6
    };
    println!("publishing an empty unit: {:.0} us", make(10_000));
    let n_shards = 100_000.min(units.len());
    for unit in &units[10_000..n_shards] {
        let key = UnitKey { kind: recipe.kind.clone(), fingerprint: unit.fingerprint, item_key: None };
        drop(store.commit_unit(store.begin_unit(&key).unwrap(), key, &[], BTreeMap::new()).unwrap());
    }
    let clock = Instant::now();
    assert!(
        Command::new(env!("CARGO_BIN_EXE_ovenbird"))
            .args(["cache", "rebuild", "--home"])
            .arg(&home)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    println!("cache rebuild of {n_shards} units: {:.2} s", clock.elapsed().as_secs_f64());
}
