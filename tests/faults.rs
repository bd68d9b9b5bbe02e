//! Nothing is lost: damage is found and put right, kills cost at most what was in the making, bad inputs are left out aloud.
//!
//! `make faults` sets `OVENBIRD_FAULTS=all` and runs everything; otherwise a short part of each runs.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::OnceLock,
    thread,
    time::{Duration, SystemTime},
};

use ovenbird_cache::Store;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::support::{World, copy, until};

fn is_whole() -> bool {
    std::env::var("OVENBIRD_FAULTS").is_ok_and(|wish| wish == "all")
}

/// A home in which the tiny pipeline is done, made once.
fn done() -> &'static World {
    static DONE: OnceLock<World> = OnceLock::new();
    DONE.get_or_init(|| {
        let world = World::tiny();
        world.run(["run", "./tiny.yaml"]).success();
        world
    })
}

/// A copy of it in the same folder, so that its runs can be found again.
fn copied() -> World {
    let world = World::tiny();
    copy(&done().path(".ovenbird"), &world.path(".ovenbird"));
    let store = Store::open(&world.path(".ovenbird")).unwrap();
    let (from, to) = (done().path(""), world.path(""));
    for place in store.record_places().unwrap().into_iter().filter(|place| place.ends_with("request.json")) {
        let request: Value = store.kept(&place).unwrap().unwrap();
        let moved = request.to_string().replace(from.to_str().unwrap().trim_end_matches('/'), to.to_str().unwrap().trim_end_matches('/'));
        store.keep(&place, &serde_json::from_str::<Value>(&moved).unwrap()).unwrap();
    }
    world
}

/// Every file that holds results, with the time of its last change.
fn times(world: &World) -> BTreeMap<PathBuf, SystemTime> {
    let files = world.units().into_keys().map(|name| world.path(".ovenbird").join(name));
    files.map(|path| (path.clone(), fs::metadata(&path).unwrap().modified().unwrap())).collect()
}

type Damage = fn(&Path, &World);

const DAMAGES: [(&str, Damage); 6] = [
    ("flip", |path, _| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(path, bytes).unwrap();
    }),
    ("truncate", |path, _| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() * 2 / 3]).unwrap();
    }),
    ("zero 4 KiB", |path, _| {
        let mut bytes = fs::read(path).unwrap();
        let end = bytes.len().min(4096);
        bytes[..end].fill(0);
        fs::write(path, bytes).unwrap();
    }),
    ("delete", |path, _| fs::remove_file(path).unwrap()),
    ("duplicate", |path, _| assert!(fs::copy(path, path.with_extension("copy")).is_ok())),
    ("swap", |path, world| {
        // With a sound file of the same kind from another place.
        let other = if path.ends_with("regions.arrow") {
            world.find(&["clip-globals", "globals.arrow"])
        } else {
            let name = path.file_name().unwrap();
            let all = world.units().into_keys().map(|name| world.path(".ovenbird").join(name)).chain(world.manifests());
            let same_kind =
                |other: &PathBuf| other != path && (other.file_name().unwrap() == name || other.extension() == path.extension());
            let Some(other) = all.into_iter().find(same_kind) else { return fs::write(path, b"of nothing like it").unwrap() };
            other
        };
        let (one, two) = (fs::read(path).unwrap(), fs::read(&other).unwrap());
        fs::write(path, two).unwrap();
        fs::write(other, one).unwrap();
    }),
];

/// One file of every class that a home holds.
fn classes(world: &World) -> Vec<(&'static str, PathBuf)> {
    vec![
        ("region shard", world.find(&["clip-proposals", "regions.arrow"])),
        ("image shard", world.find(&["clip-globals", "globals.arrow"])),
        ("crops", world.find(&["crops-objects", "crops.arrow"])),
        ("detections", world.find(&["detect-zero-shot", ".parquet"])),
        ("checkpoint", world.find(&["prompts-ensemble", "prompts"])),
        ("evaluation", world.find(&["eval-coco", "evaluation.json"])),
        ("annotations", world.find(&["annotations-split", "annotations"])),
        ("list of items", world.find(&["clip-proposals", "items"])),
        ("unit record", world.find(&["clip-globals", "unit.json"])),
        ("manifest", world.manifests().into_iter().find(|path| path.to_string_lossy().contains("detect-zero-shot")).unwrap()),
    ]
}

#[test]
fn damage_of_every_kind_is_found_and_put_right_to_the_same_bytes() {
    let n_damages = DAMAGES.len();
    let mut n_tried = 0;
    for class_idx in 0..classes(done()).len() {
        for (damage_idx, (damage, hurt)) in DAMAGES.iter().enumerate() {
            // The short part: each class once, each damage at least once.
            if !is_whole() && damage_idx != class_idx % n_damages {
                continue;
            }
            let world = copied();
            let (class, path) = classes(&world).swap_remove(class_idx);
            let (sound, before, listed) = (world.units(), times(&world), world.listed());
            hurt(&path, &world);
            let found = world.run(["verify", "--full"]);
            assert_eq!(found.code, 6, "{class}, {damage}: not found\n{}", found.stdout);
            let fixed = world.run(["verify", "--full", "--fix"]);
            assert_eq!(fixed.code, 0, "{class}, {damage}:\n{}{}", fixed.stdout, fixed.stderr);
            let clean = world.run(["verify", "--full"]);
            assert_eq!(clean.code, 0, "{class}, {damage}: still\n{}", clean.stdout);
            let needed = |units: BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
                // An early link of a chain is not made again: nothing needs it.
                units.into_iter().filter(|(name, _)| listed.iter().any(|unit| name.contains(unit.as_str()))).collect()
            };
            assert!(needed(world.units()) == needed(sound), "{class}, {damage}: other bytes");
            // What was not hurt was not touched.
            let touched: Vec<_> = times(&world).into_iter().filter(|(path, time)| before.get(path) != Some(time)).collect();
            let units: std::collections::BTreeSet<_> = touched.iter().map(|(path, _)| path.components().rev().nth(2)).collect();
            assert!(units.len() <= 8, "{class}, {damage}: {touched:?}");
            n_tried += 1;
        }
    }
    println!("{n_tried} damages found and put right");
}

#[test]
fn clean_homes_raise_no_alarm() {
    let world = copied();
    for depth in [&[][..], &["--full"], &["--deep"]].into_iter().cycle().take(10) {
        let clean = world.run(["verify"].into_iter().chain(depth.iter().copied()));
        assert!(clean.code == 0 && clean.stdout.contains("0 findings"), "{depth:?}: {}{}", clean.stdout, clean.stderr);
    }
}

#[test]
fn features_of_another_model_are_found_by_computing_rows_again() {
    let world = copied();
    let other = World::tiny();
    copy(&world.path(".ovenbird"), &other.path(".ovenbird"));
    // The same place, sealed as if it belonged there: only the numbers are of a model trained longer.
    let output = other.run(["run", "./tiny.yaml", "--set", "clip.steps=12", "--until", "globals"]).success();
    drop(output);
    let stale = other.units().into_iter().filter(|(name, _)| name.contains("clip-globals") && name.ends_with("globals.arrow"));
    let place = world.find(&["clip-globals", "globals.arrow"]);
    let stale = stale.map(|(_, bytes)| bytes).find(|bytes| *bytes != fs::read(&place).unwrap()).unwrap();
    fs::write(&place, stale).unwrap();
    let found = world.run(["verify"]);
    assert!(
        found.code == 6 && (found.stdout.contains("is a shard of unit") || found.stdout.contains(" bytes, found ")),
        "{}",
        found.stdout
    );
    world.run(["verify", "--fix"]).success();
    let audit = world.run(["verify", "--recompute", "100%"]).success();
    assert!(audit.stdout.contains("rows recomputed, 0 wrong"), "{}", audit.stdout);
}

#[test]
fn what_cannot_be_made_again_is_named_with_what_is_lost() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "val"]).success();
    let val = world.find(&["toy-world", "/val/"]);
    world.write("labels.json", fs::read(val).unwrap());
    world.write(
        "own.yaml",
        "version: 1\nname: own\nstages:\n  - {id: split, use: annotations/split, in: {annotations: ./labels.json}, with: {classes: coco-48-17, keep: all}}\n",
    );
    let run = world.run(["run", "./own.yaml"]);
    if run.code != 0 {
        // The toy world's classes are its own.
        world.write(
            "own.yaml",
            "version: 1\nname: own\nstages:\n  - {id: split, use: annotations/split, in: {annotations: ./labels.json}, with: {classes: lvis-frequency}}\n",
        );
        let lvis = world.find(&["toy-world", "lvis_val"]);
        world.write("labels.json", fs::read(lvis).unwrap());
        world.run(["run", "./own.yaml"]).success();
    }
    let name = world.logs().lines().rfind(|line| line.contains("step_checked") && line.contains("\"split\"")).unwrap().to_owned();
    assert!(!name.is_empty());
    fs::remove_file(world.path("labels.json")).unwrap();
    let newest = world.units().into_keys().filter(|name| name.contains("annotations-split") && !name.ends_with("unit.json"));
    let newest = newest.max_by_key(|name| fs::metadata(world.path(".ovenbird").join(name)).unwrap().modified().unwrap()).unwrap();
    fs::write(world.path(".ovenbird").join(newest), b"garbage").unwrap();
    let fixed = world.run(["verify", "--full", "--fix"]);
    assert!(fixed.code == 6 && fixed.stdout.contains("lost") && fixed.stdout.contains("labels.json"), "{}{}", fixed.stdout, fixed.stderr);
}

#[test]
fn a_lost_ledger_costs_nothing_but_time() {
    let world = copied();
    fs::remove_dir_all(world.path(".ovenbird/ledger")).unwrap();
    let missing = world.run(["verify"]);
    assert!(missing.code == 6 && missing.stdout.contains("ledger: is missing"), "{}", missing.stdout);
    world.run(["verify"]).success();
    fs::remove_dir_all(world.path(".ovenbird/ledger")).unwrap();
    let again = world.run(["run", "./tiny.yaml"]).success();
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    world.write(".ovenbird/ledger/db", b"garbage".repeat(3000));
    let again = world.run(["run", "./tiny.yaml"]).success();
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
}

/// SIGKILL of the process at random moments of runs, repairs and collections; the result is always that of a run left alone.
#[test]
fn kills_at_random_moments_cost_nothing_that_was_published() {
    let n_kills = if is_whole() { 200 } else { 12 };
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let (mut n_killed, mut n_worlds) = (0, 0);
    while n_killed < n_kills {
        n_worlds += 1;
        let world = World::tiny();
        let mut published: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut is_collected = false;
        loop {
            let args: &[&str] = match random.random_range(0..10) {
                0 | 1 if world.path(".ovenbird").exists() => &["verify", "--full", "--fix"],
                2 if world.path(".ovenbird").exists() => &["cache", "gc", "--keep-for", "0s", "--grace", "0s", "--delete"],
                _ => &["run", "./tiny.yaml"],
            };
            is_collected |= args[0] == "cache";
            let mut running = world.command(args.iter().copied()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            thread::sleep(Duration::from_millis(random.random_range(0..2500)));
            let is_done = running.try_wait().unwrap().is_some();
            if !is_done {
                running.kill().unwrap();
                running.wait().unwrap();
                n_killed += 1;
            }
            // What was there is still there, byte for byte; a collection, and a training that goes on, may take early links of a chain.
            let now = world.units();
            for (name, bytes) in &published {
                let may_go = args[0] == "cache" || name.contains("clip-pretrain");
                let is_as_before = now.get(name).map_or(may_go, |found| found == bytes);
                assert!(name.contains(".tmp-") || is_as_before, "{name} changed after a kill of {args:?}");
            }
            published = now.into_iter().filter(|(name, _)| !name.contains(".tmp-")).collect();
            if n_killed >= n_kills || (is_done && args[0] == "run") {
                break;
            }
        }
        world.run(["run", "./tiny.yaml"]).success();
        let (now, left_alone) = (world.units(), done().units());
        assert!(now.iter().all(|(name, bytes)| left_alone.get(name) == Some(bytes)), "other bytes than a run left alone");
        assert!(is_collected || now.len() == left_alone.len());
        let clean = world.run(["verify", "--full"]);
        assert_eq!(clean.code, 0, "{}", clean.stdout);
    }
    println!("{n_killed} kills in {n_worlds} homes");
}

const BAD: &str = r#"version: 1
name: bad
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 6, val_images: 12, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: globals
    use: clip/globals
    in: {images: ./images, annotations: ./labels.json, checkpoint: clip.checkpoint}
    with: {resize: square}
    POLICY
"#;

#[test]
fn a_poisoned_image_is_left_out_by_policy_noted_and_tried_again() {
    let world = World::new();
    let golden = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images/rgb.png")).unwrap();
    let images: Vec<String> = (1..=4).map(|id| format!(r#"{{"id": {id}, "file_name": "{id}.png", "width": 33, "height": 21}}"#)).collect();
    world.write(
        "labels.json",
        format!(r#"{{"images": [{}], "annotations": [], "categories": [{{"id": 1, "name": "cat"}}]}}"#, images.join(", ")),
    );
    for id in 1..=4 {
        world.write(&format!("images/{id}.png"), &golden);
    }
    world.write("images/3.png", &golden[..golden.len() / 2]);

    world.write("bad.yaml", BAD.replace("POLICY", ""));
    let failed = world.run(["run", "./bad.yaml"]);
    assert!(failed.code == 4 && failed.stderr.contains("images/3.png"), "{}", failed.stderr);

    world.write("bad.yaml", BAD.replace("POLICY", "on_bad_item: skip"));
    let too_many = world.run(["run", "./bad.yaml"]);
    assert!(too_many.code == 4 && too_many.stderr.contains("1 of 4 items failed"), "{}", too_many.stderr);

    world.write("bad.yaml", BAD.replace("POLICY", "on_bad_item: skip\n    max_failed_ratio: 0.5"));
    let skipped = world.run(["run", "./bad.yaml"]).success();
    assert!(skipped.stderr.contains("skipped 3.png") && skipped.stderr.contains("1 item skipped"), "{}", skipped.stderr);
    assert!(world.run(["status"]).success().stdout.contains("1 item skipped"));
    // No empty row stands for it.
    let deep = world.run(["verify", "--deep"]).success();
    assert!(!deep.stdout.contains("damaged"), "{}", deep.stdout);

    // Trying again what cannot go well leaves it out again, and computes nothing else.
    let retried = world.run(["retry", "./bad.yaml", "--failed"]).success();
    assert!(retried.stderr.contains("skipped 3.png") && retried.stderr.contains("items copied from"), "{}", retried.stderr);

    // With the file mended, only that item is computed.
    world.write("images/3.png", &golden);
    let mended = world.run(["run", "./bad.yaml"]).success();
    assert!(mended.stderr.contains("3 of 4 items copied from"), "{}", mended.stderr);
}

#[test]
fn items_that_another_pipeline_has_computed_are_taken_from_there() {
    let world = World::new();
    let golden = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images/rgb.png")).unwrap();
    let labels = |ids: &[u32]| {
        let images: Vec<String> =
            ids.iter().map(|id| format!(r#"{{"id": {id}, "file_name": "{id}.png", "width": 33, "height": 21}}"#)).collect();
        format!(r#"{{"images": [{}], "annotations": [], "categories": [{{"id": 1, "name": "cat"}}]}}"#, images.join(", "))
    };
    for id in 1..=5 {
        world.write(&format!("images/{id}.png"), &golden);
    }
    world.write("coco.yaml", BAD.replace("POLICY", ""));
    world.write("lvis.yaml", BAD.replace("POLICY", "").replace("labels.json", "lvis.json").replace("name: bad", "name: lvis"));
    world.write("labels.json", labels(&[1, 2, 3, 4]));
    world.write("lvis.json", labels(&[2, 3, 5]));
    world.run(["run", "./coco.yaml"]).success();
    let plan = world.run(["plan", "./lvis.yaml"]).success();
    assert!(plan.stdout.contains("2 of 3 items copied from clip-globals/"), "{}", plan.stdout);
    world.run(["run", "./lvis.yaml"]).success();
    let taken = world.units().into_iter().filter(|(name, _)| name.contains("clip-globals") && name.ends_with("unit.json"));
    let taken: Vec<u64> =
        taken.map(|(_, bytes)| serde_json::from_slice::<Value>(&bytes).unwrap()["metrics"]["reused"].as_u64().unwrap()).collect();
    assert!(taken.contains(&2) && taken.contains(&0), "{taken:?}");

    // The same rows, to the last bit, as where nothing could be taken.
    let alone = World::new();
    for name in ["lvis.yaml", "lvis.json", "images/2.png", "images/3.png", "images/5.png"] {
        alone.write(name, fs::read(world.path(name)).unwrap());
    }
    alone.run(["run", "./lvis.yaml"]).success();
    let shard = alone.units().into_iter().find(|(name, _)| name.contains("clip-globals") && name.ends_with("globals.arrow")).unwrap();
    assert_eq!(world.units().get(&shard.0), Some(&shard.1));
}

#[test]
fn verify_can_be_divided_limited_and_read_by_machines() {
    let world = copied();
    let mut n_units = 0;
    for part in ["1/3", "2/3", "3/3"] {
        let output = world.run(["verify", "--full", "--subset", part, "--json", "--rate", "5GB/s", "--max-duration", "5m"]).success();
        let report: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(report["version"], 1);
        n_units += report["verify"]["units"].as_u64().unwrap();
    }
    assert_eq!(n_units as usize, world.n_units());
    // A scan that was cut short goes on where it was.
    let first = world.units().into_keys().next().unwrap();
    let after = first.trim_start_matches("units/").rsplit_once('/').unwrap().0.to_owned();
    let after = after.split('/').take(2).collect::<Vec<_>>().join("/");
    let store = Store::open(&world.path(".ovenbird")).unwrap();
    store.keep("verify.json", &json!({"depth": "quick", "subset": null, "after": after})).unwrap();
    let output = world.run(["verify"]).success();
    assert!(output.stdout.contains("continued after 1 unit"), "{}", output.stdout);
    assert!(!world.path(".ovenbird/verify.json").exists());
}

#[test]
fn what_no_pipeline_needs_may_go_and_what_is_begun_stays() {
    let world = copied();
    world.run(["run", "./tiny.yaml", "--set", "detect.nms_iou=0.3", "--until", "detect"]).success();
    world.run(["run", "./tiny.yaml"]).success();
    let before = world.units();
    let plan = world.run(["cache", "gc", "--keep-for", "0s", "--grace", "0s"]).success();
    assert!(
        plan.stdout.contains("detect (detect/zero-shot) of run")
            && plan.stdout.contains("changed since: with.nms_iou: 0.3")
            && plan.stdout.contains("not needed, ")
            && world.units() == before,
        "{}",
        plan.stdout
    );
    let young = world.run(["cache", "gc", "--delete"]).success();
    assert!(young.stdout.contains("nothing to delete"), "{}", young.stdout);
    let pinned =
        world.path(".ovenbird/runs").read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).max().unwrap();
    world.run(["cache", "pin", &pinned]).success();
    world.run(["cache", "gc", "--keep-for", "0s", "--grace", "0s", "--delete"]).success();
    let after = world.units();
    assert!(after.len() < before.len() && after.iter().all(|(name, bytes)| before.get(name) == Some(bytes)));
    assert!(world.run(["run", "./tiny.yaml"]).success().stdout.contains("nothing to do"));
    world.run(["verify", "--full"]).success();
    assert!(world.run(["cache", "du"]).success().stdout.contains("clip-proposals"));

    // A run that was cut off keeps what it had made.
    let n_links = world.n_units();
    let mut running = world.command(["run", "./tiny.yaml", "--set", "clip.steps=100000", "--until", "clip"]).spawn().unwrap();
    until(|| world.n_units() > n_links + 2);
    running.kill().unwrap();
    running.wait().unwrap();
    let n_units = world.n_units();
    world.run(["cache", "gc", "--keep-for", "0s", "--grace", "0s", "--delete"]).success();
    assert_eq!(world.n_units(), n_units);
    world.run(["cache", "rebuild"]).success();
    world.run(["verify"]).success();
}

#[test]
fn dropped_bytes_are_made_again_when_something_reads_them_and_not_before() {
    let world = copied();
    let kinds = ["toy-world", "clip-proposals"];
    let dropped = |world: &World| -> BTreeMap<_, _> {
        world.units().into_iter().filter(|(name, _)| kinds.iter().any(|kind| name.contains(kind))).collect()
    };
    let before = dropped(&world);
    world
        .run(["cache", "gc", "--drop", "toy/world", "--drop", "clip/proposals", "--keep-for", "0s", "--grace", "0s", "--delete"])
        .success();
    assert!(!before.is_empty() && dropped(&world).is_empty());
    assert!(world.run(["plan", "./tiny.yaml"]).success().stdout.contains("regions    dropped"));
    assert!(world.run(["run", "./tiny.yaml"]).success().stdout.contains("nothing to do"));
    world.run(["verify", "--full"]).success();
    assert!(dropped(&world).is_empty());
    let changed = ["./tiny.yaml", "--set", "detect.nms_iou=0.3"];
    let plan = world.run(["plan"].into_iter().chain(changed)).success();
    let run = world.run(["run"].into_iter().chain(changed)).success();
    for words in [plan.stdout, run.stderr.clone()] {
        assert_eq!(words.matches("its bytes were dropped, and are needed").count(), 2, "{words}");
    }
    assert_eq!(run.steps("done"), ["coco", "detect", "lvis", "regions", "world"], "{}", run.stderr);
    assert_eq!(dropped(&world), before);
    world.run(["verify", "--full"]).success();
}

/// However often a run is tried, by whichever process, from however many units, and whichever pipeline made what is there.
#[test]
fn too_many_failed_items_are_too_many_in_every_run() {
    let world = World::new();
    let golden = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images/rgb.png")).unwrap();
    const N: usize = 6000;
    let images: Vec<String> =
        (1..=N).map(|id| format!(r#"{{"id": {id}, "file_name": "{}.png", "width": 33, "height": 21}}"#, id % 20)).collect();
    world.write(
        "labels.json",
        format!(r#"{{"images": [{}], "annotations": [], "categories": [{{"id": 1, "name": "cat"}}]}}"#, images.join(", ")),
    );
    for name in 0..20 {
        world.write(&format!("images/{name}.png"), if name < 2 { &golden[..60] } else { &golden[..] });
    }
    let policy = |ratio: f64| BAD.replace("POLICY", &format!("on_bad_item: skip\n    max_failed_ratio: {ratio}"));
    world.write("strict.yaml", policy(0.05));
    let told = |output: &crate::support::Output| output.code == 4 && output.stderr.contains("more than max_failed_ratio 0.05 allows");
    for n_try in 1..=4 {
        let output = world.run(["run", "./strict.yaml"]);
        assert!(told(&output), "try {n_try}: exit code {}\n{}", output.code, output.stderr);
    }
    // One that allows as many makes it; the strict one does not reuse it.
    world.write("lax.yaml", policy(0.2));
    world.run(["run", "./lax.yaml"]).success();
    let plan = world.run(["plan", "./strict.yaml"]).success();
    assert!(plan.stdout.contains("600 of 6000 items failed, more than max_failed_ratio 0.05 allows"), "{}", plan.stdout);
    let output = world.run(["run", "./strict.yaml"]);
    assert!(told(&output), "{}", output.stderr);
    assert!(world.run(["run", "./lax.yaml"]).success().stdout.contains("nothing to do"));
}
