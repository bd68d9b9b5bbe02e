//! Evaluation and export at the size of data sets, from result files to the table of AP, beside Python packages on the same detections.
//!
//! COCO: 5,000 images, 80 classes, 500,000 boxes, and a fifth of that as masks. LVIS: 20,000 images, 1,203 classes, 6,000,000 boxes, of
//! which a tenth is made unless `OVENBIRD_BENCH_LVIS` names another part (1: all; lvis-api then wants some 22 GB, faster-coco-eval 30).
//! Boxes lie on half pixels, so that every program reads the same numbers. Ours is the whole program with a fresh home,
//! its start and the digests of its inputs included; theirs is measured from the first file they open.
//!
//! Peers, where `make peers` has set them up: pycocotools, faster-coco-eval, lvis-api. Every number of theirs has to be ours, to 1e-6.
//!
//! `make bench`.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::BufWriter,
    path::{Path, PathBuf},
    process::Command,
};

use ovenbird_cache::{Recipe, Store, UnitKey};
use ovenbird_data::{
    annotations::{CategoryId, ImageId},
    boxes::Xyxy,
    evaluate::Detection,
    masks::Mask,
};
use ovenbird_stages::artifacts::Detections;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use support::watched;

/// Width, height, in px.
const SIZE: [u32; 2] = [640, 480];
/// Images of a table's part.
const PART: usize = 1000;
/// Cells along a side of what a mask head draws.
const SIDE: usize = 28;

/// A data set and what is found in it.
struct Set {
    metric: &'static str,
    n_images: usize,
    n_classes: usize,
    n_objects: usize,
    n_detections: usize,
    has_masks: bool,
}

fn main() {
    let part: f64 = std::env::var("OVENBIRD_BENCH_LVIS").ok().and_then(|part| part.parse().ok()).unwrap_or(0.1);
    let coco = |n_images, has_masks| Set { metric: "coco", n_images, n_classes: 80, n_objects: 7, n_detections: 100, has_masks };
    let lvis = |n_images| Set { metric: "lvis", n_images, n_classes: 1203, n_objects: 12, n_detections: 300, has_masks: false };
    measure(&coco(5000, false), &["pycocotools", "faster-coco-eval"]);
    measure(&coco(1000, true), &["pycocotools", "faster-coco-eval"]);
    measure(&lvis((20_000.0 * part) as usize), &["lvis-api", "faster-coco-eval"]);
}

fn measure(set: &Set, peers: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let of = if set.has_masks { "masks" } else { "boxes" };
    println!("-- {} {of}: {} images, {} classes, {} detections", set.metric, set.n_images, set.n_classes, set.n_images * set.n_detections);
    write_annotations(set, folder.path());
    write_detections(set, folder.path());
    let pipeline = format!(
        "version: 1\nname: bench\nstages:\n  - {{id: evaluated, use: eval/{}, in: {{annotations: ./labels.json, detections: ./detections/, classes: ./classes.json}}, with: {{of: {of}}}}}\n  - {{id: exported, use: detections/export, in: {{detections: ./detections/, annotations: ./labels.json}}}}\n",
        set.metric
    );
    fs::write(folder.path().join("bench.yaml"), pipeline).unwrap();

    let (seconds, peak) = run(folder.path(), "evaluated");
    println!("ovenbird: {seconds:.2} s, peak {peak:.0} MiB");
    let ours = published(folder.path(), "evaluation.json");
    let ours: Value = serde_json::from_slice(&fs::read(ours).unwrap()).unwrap();
    let (exporting, export_peak) = run(folder.path(), "exported");
    let results = published(folder.path(), "results.json");
    let bytes = fs::metadata(&results).unwrap().len() as f64;
    println!("  exported in {exporting:.2} s, peak {export_peak:.0} MiB, {:.0} MB of json", bytes / 1e6);

    for package in peers {
        let Some(said) = peer(package, set.metric, of, &folder.path().join("labels.json"), &results) else { continue };
        let (their_seconds, their_peak) = (said["seconds"].as_f64().unwrap(), said["peak_mib"].as_f64().unwrap());
        println!(
            "{package}: {their_seconds:.2} s, peak {their_peak:.0} MiB: {:.1} times the time, {:.1} times the memory",
            their_seconds / seconds,
            their_peak / peak
        );
        for (number, said) in said["numbers"].as_object().unwrap() {
            let (ours, said) = (ours["groups"]["all"][number].as_f64().unwrap_or(-1.0), said.as_f64().unwrap());
            assert!((ours - said).abs() < 1e-6, "{package}: {number}: they say {said}, we {ours}");
        }
    }
}

/// Classes as data sets have them: some are everywhere, most are rare.
fn class(random: &mut ChaCha8Rng, n_classes: usize) -> u64 {
    (n_classes as f64 * random.random_range(0.0..1.0_f64).powi(3)) as u64
}

/// A box of half pixels.
fn a_box(random: &mut ChaCha8Rng) -> [f32; 4] {
    let side = |random: &mut ChaCha8Rng, length: u32| {
        let side = (2.0 * random.random_range(3.0..5.5_f32).exp()).round() / 2.0;
        let start = (2.0 * random.random_range(0.0..length as f32 - side)).round() / 2.0;
        [start, start + side]
    };
    let ([x1, x2], [y1, y2]) = (side(random, SIZE[0]), side(random, SIZE[1]));
    [x1, y1, x2, y2]
}

/// What lies in an image: boxes with their classes, the same whenever it is asked.
fn objects(set: &Set, image: usize) -> (ChaCha8Rng, Vec<([f32; 4], u64)>) {
    let mut random = ChaCha8Rng::seed_from_u64(image as u64);
    let n_objects = random.random_range(0..=2 * set.n_objects);
    let objects = (0..n_objects).map(|_| (a_box(&mut random), class(&mut random, set.n_classes))).collect();
    (random, objects)
}

fn write_annotations(set: &Set, folder: &Path) {
    let (mut images, mut annotations) = (Vec::new(), Vec::new());
    for place in 0..set.n_images {
        let (mut random, objects) = objects(set, place);
        let present: BTreeSet<u64> = objects.iter().map(|(_, class)| *class).collect();
        let absent: BTreeSet<u64> = (0..6).map(|_| class(&mut random, set.n_classes)).filter(|class| !present.contains(class)).collect();
        let not_exhaustive: Vec<u64> = present.iter().copied().filter(|class| class % 9 == 0).collect();
        images.push(json!({
            "id": place + 1, "file_name": format!("{place:012}.jpg"), "width": SIZE[0], "height": SIZE[1],
            "neg_category_ids": absent, "not_exhaustive_category_ids": not_exhaustive,
        }));
        for ([x1, y1, x2, y2], class) in objects {
            let (width, height) = (x2 - x1, y2 - y1);
            let (x, y) = (x1 + width / 2.0, y1 + height / 2.0);
            // An octagon: an outline as large as those of data sets, whose area is that of its box less the corners.
            let corners = [(0.5, 0.2), (0.2, 0.5), (-0.2, 0.5), (-0.5, 0.2), (-0.5, -0.2), (-0.2, -0.5), (0.2, -0.5), (0.5, -0.2)];
            let outline: Vec<f32> = corners.iter().flat_map(|(u, v)| [x + u * width, y + v * height]).collect();
            annotations.push(json!({
                "id": annotations.len() + 1, "image_id": place + 1, "category_id": class, "iscrowd": 0,
                "bbox": [x1, y1, width, height], "area": 0.82 * width * height, "segmentation": [outline],
            }));
        }
    }
    let name = |class: usize| format!("class {class}");
    let frequency = |class: usize| ["f", "c", "r"][(3 * class / set.n_classes).min(2)];
    let category = |class: usize| json!({"id": class, "name": name(class), "frequency": frequency(class), "image_count": 1});
    let categories: Vec<Value> = (0..set.n_classes).map(category).collect();
    let labels = json!({"images": images, "annotations": annotations, "categories": categories});
    serde_json::to_writer(BufWriter::new(fs::File::create(folder.join("labels.json")).unwrap()), &labels).unwrap();
    let n_base = 3 * set.n_classes / 4;
    let names = |classes: std::ops::Range<usize>| classes.map(name).collect::<Vec<String>>();
    let classes = json!({"base": names(0..n_base), "novel": names(n_base..set.n_classes)});
    fs::write(folder.join("classes.json"), classes.to_string()).unwrap();
}

/// Tables of a thousand images each. Every object is found some four times, more or less well; the rest are mistakes.
fn write_detections(set: &Set, folder: &Path) {
    let store = Store::open(&folder.join("scratch")).unwrap();
    let _session = store.enter().unwrap();
    fs::create_dir(folder.join("detections")).unwrap();
    let categories = (0..set.n_classes).map(|class| (CategoryId(class as u64), format!("class {class}"))).collect();
    let disk = |cell: usize| {
        let [x, y] = [cell % SIDE, cell / SIDE].map(|place| place as f32 - 13.5);
        1.0 / (1.0 + ((x * x + y * y).sqrt() - 12.0).exp())
    };
    let cells: Vec<f32> = (0..SIDE * SIDE).map(disk).collect();
    for (part, first) in (0..set.n_images).step_by(PART).enumerate() {
        let mut detections = Vec::new();
        for place in first..set.n_images.min(first + PART) {
            let (mut random, objects) = objects(set, place);
            for rank in 0..set.n_detections {
                let (xyxy, class) = match objects.get(rank / 4) {
                    Some((corners, class)) => {
                        let side = (corners[2] - corners[0]).min(corners[3] - corners[1]);
                        let moved = |corner: &f32| (2.0 * (corner + side * random.random_range(-0.12..0.12_f32))).round() / 2.0;
                        let moved: Vec<f32> = corners.iter().map(moved).collect();
                        let class = if random.random_bool(0.8) { *class } else { self::class(&mut random, set.n_classes) };
                        ([moved[0].max(0.0), moved[1].max(0.0), moved[2].min(640.0), moved[3].min(480.0)], class)
                    }
                    None => (a_box(&mut random), class(&mut random, set.n_classes)),
                };
                let xyxy = Xyxy::from(xyxy);
                let score = random.random_range(0.0..1.0_f32) * if rank / 4 < objects.len() { 1.0 } else { 0.6 };
                let mask = set.has_masks.then(|| Box::new(Mask::paste(&cells, SIDE, &xyxy, SIZE).unwrap().to_packed()));
                detections.push(Detection { image_id: ImageId(place as u64 + 1), category_id: CategoryId(class), xyxy, score, mask });
            }
        }
        let recipe = Recipe { kind: "detector/test".into(), version: 1, params: json!({"part": part}), inputs: BTreeMap::new() };
        let key = UnitKey { kind: recipe.kind.clone(), fingerprint: recipe.fingerprint(), item_key: None };
        let draft = store.begin_unit(&key).unwrap();
        let file = draft.create("detections/detections.parquet").unwrap();
        let path = file.path().to_owned();
        let looked_at = (first..set.n_images.min(first + PART)).map(|place| ImageId(place as u64 + 1)).collect();
        Detections::write(&detections, &looked_at, &categories, file).unwrap();
        fs::copy(path, folder.join(format!("detections/{part:04}.parquet"))).unwrap();
    }
}

/// Makes a step with the whole program: s, and the greatest resident memory in MiB.
fn run(folder: &Path, step: &str) -> (f64, f64) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
    watched(command.args(["run", "./bench.yaml", "--home", "home", "--until", step]).current_dir(folder))
}

/// The published file of a name.
fn published(folder: &Path, name: &str) -> PathBuf {
    let mut folders = vec![folder.join("home/units")];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with(name) {
                return path;
            }
        }
    }
    panic!("no published file {name}")
}

/// What a Python package says; nothing, aloud, where it is not set up or does not get to an end.
fn peer(package: &str, metric: &str, of: &str, annotations: &Path, results: &Path) -> Option<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/peers/bin/python");
    if !python.exists() {
        println!("skipped: {package} is not set up (`make peers`)");
        return None;
    }
    let output = Command::new(python)
        .arg(root.join("benches/peers/evaluate.py"))
        .args([package, metric, of])
        .arg(annotations)
        .arg(results)
        .output()
        .unwrap();
    let said = serde_json::from_slice(&output.stdout).ok();
    if said.is_none() {
        let words = String::from_utf8_lossy(&output.stderr);
        println!("{package}: nothing ({}): {}", output.status, words.lines().last().unwrap_or_default());
    }
    said
}
