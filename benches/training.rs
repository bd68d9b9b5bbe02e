//! Whether loading hides behind training: `detector/train` on JPEGs of 640 x 480 px, which are decoded and resized, beside the same training on
//! the same pictures as they are shown, 426 x 320 px. The same network, boxes and order; from the first image read to the last step done.
//!
//! Limit: on two cores what is done for an image (about 6 ms of one core, 1 ms for those that are small already) is time that the network's
//! threads do not get; a step on two images of this size takes them seven seconds.
//!
//! `make bench`; `OVENBIRD_BENCH_ROUNDS` sets how often each side trains (3).
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Mutex, atomic::AtomicU64},
    time::Instant,
};

use ovenbird_cache::{Recipe, Store, inputs};
use ovenbird_data::{
    images::Image,
    toy::{Set, World},
};
use ovenbird_stages::{Context, Inputs, OnBadItem, Progress, find};
use serde_json::{Value, json};
use tch::Device;

const FULL: [u32; 2] = [640, 480];
const SHOWN: [u32; 2] = [426, 320];
const N_IMAGES: usize = 24;
const BATCH: usize = 2;

fn main() {
    let rounds: usize = std::env::var("OVENBIRD_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3).max(1);
    tch::set_num_threads(2);
    let folder = tempfile::tempdir().unwrap();
    write_world(folder.path());
    let mut ratios: Vec<f64> = (0..rounds)
        .map(|_| {
            let (loaded, read) = (step(folder.path(), "full", FULL), step(folder.path(), "shown", SHOWN));
            println!("a step on {BATCH} images: {loaded:.3} s from large JPEGs, {read:.3} s from small ones");
            loaded / read
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("from large / from small: {:.3} ({:.3} to {:.3}) of {rounds}", ratios[rounds / 2], ratios[0], ratios[rounds - 1]);
}

fn write_world(folder: &Path) {
    let world = World { seed: 1, side_px: 640 };
    for name in ["full", "shown"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    for index in 0..N_IMAGES {
        let scene = Image::decode(&world.scene(Set::Train, index).jpeg, folder).unwrap();
        fs::write(folder.join("full").join(format!("{index}.jpg")), scene.resize(FULL[0], FULL[1]).to_jpeg(90)).unwrap();
        fs::write(folder.join("shown").join(format!("{index}.jpg")), scene.resize(SHOWN[0], SHOWN[1]).to_jpeg(90)).unwrap();
    }
}

/// The mean seconds of a step, over one epoch.
fn step(folder: &Path, images: &str, [width, height]: [u32; 2]) -> f64 {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    let _session = store.enter().unwrap();
    let listed = |index: usize| json!({"id": index + 1, "file_name": format!("{index}.jpg"), "width": width, "height": height});
    let object = |index: usize| {
        let bbox = [width / 8, height / 8, width / 3, height / 2];
        json!({"id": index + 1, "image_id": index + 1, "category_id": 1, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0})
    };
    let (listed, objects): (Vec<Value>, Vec<Value>) = (0..N_IMAGES).map(|index| (listed(index), object(index))).unzip();
    let annotations = json!({"images": listed, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]});
    fs::write(folder.join("annotations.json"), annotations.to_string()).unwrap();
    fs::write(folder.join("classes.json"), json!({"base": ["thing"], "novel": []}).to_string()).unwrap();

    let entry = find("detector/train").unwrap();
    let steps = N_IMAGES / BATCH;
    let params = json!({"training": {
        "steps": steps, "checkpoint_every": steps, "batch": BATCH, "max_size": [SHOWN[0], SHOWN[0]], "min_size": [SHOWN[1], SHOWN[1]],
    }});
    let stage = (entry.parse)(&params).map_err(|problem| problem.problem).unwrap();
    let mut inputs = Inputs::default();
    for (port, name) in [("images", images), ("annotations", "annotations.json"), ("classes", "classes.json")] {
        inputs.ports.insert(port.into(), inputs::digest_path(&folder.join(name), None, 0).unwrap());
    }
    let recipe = Recipe { kind: entry.kind.into(), version: entry.version, params, inputs: BTreeMap::new() };
    let (units, items) = stage.units(&inputs).unwrap().of(&recipe);
    let (begin, end) = (Mutex::new(None), Mutex::new(None));
    let context = Context {
        store: &store,
        kind: entry.kind,
        units: &units,
        items: &items,
        on_bad_item: OnBadItem::Fail,
        n_failed: &AtomicU64::new(0),
        watch: &Mutex::default(),
        inputs: &inputs,
        most_items: None,
        device: Device::Cpu,
        has_bf16: false,
        threads: 2,
        is_stopped: &|| false,
        report: &|said| match said {
            Progress::Total(_) => *begin.lock().unwrap() = Some(Instant::now()),
            Progress::Tick(_) => *end.lock().unwrap() = Some(Instant::now()),
            _ => {}
        },
    };
    stage.run(&units, &context).unwrap();
    let [begin, end] = [begin, end].map(|moment| moment.into_inner().unwrap().unwrap());
    (end - begin).as_secs_f64() / steps as f64
}
