//! What a garbage collection stands on: damage of it is never taken for absence.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use ovenbird_cache::Store;
use serde_json::Value;

use crate::support::{Output, World, copy, until};

const GC: [&str; 8] = ["cache", "gc", "--keep-runs", "1", "--keep-for", "0s", "--grace", "0s"];

/// Two pipelines of one name in two files, a pinned run of old parameters, a run that was cut off.
fn home() -> &'static World {
    static HOME: OnceLock<World> = OnceLock::new();
    HOME.get_or_init(|| {
        let world = World::tiny();
        world.write("other/tiny.yaml", fs::read(world.path("tiny.yaml")).unwrap());
        world.run(["run", "./tiny.yaml", "--until", "detect", "--set", "detect.nms_iou=0.3"]).success();
        let pinned = only_run(&world);
        world.run(["cache", "pin", &pinned]).success();
        world.run(["run", "./other/tiny.yaml", "--until", "detect", "--set", "detect.nms_iou=0.35"]).success();
        world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
        let mut running = world.command(["run", "./tiny.yaml", "--set", "clip.steps=100000", "--until", "clip"]);
        let mut running = running.stderr(Stdio::null()).spawn().unwrap();
        until(|| world.logs().matches("unit_committed").count() > 8 && fs::read_dir(world.path(".ovenbird/plans/clip-pretrain")).is_ok());
        let n_units = world.n_units();
        until(|| world.n_units() > n_units + 1);
        running.kill().unwrap();
        running.wait().unwrap();
        // Notes how long the log is of the run that was cut off.
        world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
        world
    })
}

fn only_run(world: &World) -> String {
    fs::read_dir(world.path(".ovenbird/runs")).unwrap().next().unwrap().unwrap().file_name().into_string().unwrap()
}

/// A copy in a folder of its own: its runs' requests and pipelines name the first.
fn copied() -> World {
    let world = World::new();
    copy(&home().path(""), &world.path(""));
    world
}

/// One record of every kind.
fn records(world: &World) -> Vec<String> {
    let places = Store::open(&world.path(".ovenbird")).unwrap().record_places().unwrap();
    let mut kinds = BTreeSet::new();
    let kind = |place: &String| {
        let name = Path::new(place).file_name().unwrap().to_string_lossy().into_owned();
        let top = place.split('/').next().unwrap().to_owned();
        if top == "runs" { format!("{top}/{name}") } else { top }
    };
    let mut chosen: Vec<String> = places.into_iter().filter(|place| kinds.insert(kind(place))).collect();
    // Of the pinned run, of the other file's, and of the pipeline as it stands.
    let detections = world.manifests().into_iter().filter(|path| path.to_string_lossy().contains("detect-zero-shot"));
    chosen.extend(detections.map(|path| path.strip_prefix(world.path(".ovenbird")).unwrap().display().to_string()));
    chosen.extend(["commits.jsonl", "format.json"].map(str::to_owned));
    assert_eq!(chosen.len(), 10, "{chosen:?}");
    chosen
}

type Damage = fn(&Path);

const DAMAGES: [(&str, Damage); 8] = [
    ("flip", |path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    }),
    ("truncate", |path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }),
    ("empty", |path| fs::write(path, b"").unwrap()),
    ("zeros", |path| fs::write(path, vec![0; fs::metadata(path).unwrap().len() as usize]).unwrap()),
    ("delete", |path| fs::remove_file(path).unwrap()),
    ("folder", |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    }),
    ("pipe", |path| {
        fs::remove_file(path).unwrap();
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }),
    ("dead link", |path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/nonexistent/record", path).unwrap();
    }),
];

fn said(output: &Output) -> String {
    format!("exit code {}\n{}{}", output.code, output.stdout, output.stderr)
}

/// Every damage of every kind of record: `verify` finds it, `gc` removes nothing, `report` and `status` go on or say why not; after
/// `verify --fix` the home is clean, and what was pinned is still there.
#[test]
fn no_damage_of_a_record_makes_the_collector_remove_what_it_kept() {
    let is_whole = std::env::var("OVENBIRD_FAULTS").is_ok_and(|wish| wish == "all");
    let pinned = PathBuf::from(records(home()).iter().find(|place| place.starts_with("pins/")).unwrap());
    let pinned = pinned.file_stem().unwrap().to_string_lossy().into_owned();
    for (record_idx, record) in records(home()).iter().enumerate() {
        for (damage_idx, (damage, hurt)) in DAMAGES.iter().enumerate() {
            if !is_whole && damage_idx != record_idx % 5 && damage_idx != 5 + record_idx % 3 && *damage != "delete" {
                continue;
            }
            let world = copied();
            let what = format!("{damage} {record}");
            let before = world.units();
            hurt(&world.path(".ovenbird").join(record));
            let found = world.run(["verify"]);
            assert!(found.code == 6 && found.stdout.contains(record.rsplit('/').next().unwrap()), "{what}: {}", said(&found));
            let collected = world.run(GC.into_iter().chain(["--delete", "--yes"]));
            assert!([5, 6].contains(&collected.code) && world.units() == before, "{what}: gc: {}", said(&collected));
            for command in [&["status", &pinned][..], &["report", &pinned], &["cache", "du"], &["plan", "./tiny.yaml"]] {
                let output = world.run(command.iter().copied());
                assert!([0, 2, 5, 6].contains(&output.code), "{what}: {command:?}: {}", said(&output));
            }
            let fixed = world.run(["verify", "--fix"]);
            assert!([0, 6].contains(&fixed.code), "{what}: {}", said(&fixed));
            if fixed.code == 6 {
                assert!(fixed.stdout.contains("lost      "), "{what}: {}", said(&fixed));
            }
            let now = |world: &World| -> Vec<(String, Value)> {
                let store = Store::open(&world.path(".ovenbird")).unwrap();
                let places = store.record_places().unwrap().into_iter().filter(|place| place.starts_with("pipelines/"));
                places.map(|place| (place.clone(), store.kept(&place).unwrap().unwrap())).collect()
            };
            assert_eq!(now(&world), now(home()), "{what}: a repair is not how a pipeline stands");
            let clean = world.run(["verify"]);
            assert_eq!(clean.code, 0, "{what}: still: {}\nafter {}", said(&clean), said(&fixed));
            // What is lost of the pinned run was named.
            let kept = world.run(GC.into_iter().chain(["--delete", "--yes"]));
            assert_eq!(kept.code, 0, "{what}: gc: {}", said(&kept));
            let is_detections = |name: &&String| name.contains("detect-zero-shot") && name.ends_with("unit.json");
            let n_kept = world.units().keys().filter(is_detections).count();
            let n_before = before.keys().filter(is_detections).count();
            assert!(n_kept == n_before || fixed.code == 6, "{what}: {n_kept} of {n_before}: {}", said(&kept));
        }
    }
}

#[test]
fn a_pin_forgets_no_other_and_two_pipelines_of_one_name_are_both_kept() {
    let world = copied();
    let before = world.units();
    let runs: Vec<String> = {
        let mut runs: Vec<String> =
            fs::read_dir(world.path(".ovenbird/runs")).unwrap().map(|run| run.unwrap().file_name().into_string().unwrap()).collect();
        runs.sort();
        runs
    };
    world.run(["cache", "pin", &runs[1]]).success();
    assert_eq!(fs::read_dir(world.path(".ovenbird/pins")).unwrap().count(), 2);
    world.run(["cache", "unpin", &runs[1]]).success();
    assert_eq!(fs::read_dir(world.path(".ovenbird/pins")).unwrap().count(), 1);
    // Early links of a training belong to no artifact.
    let listed = world.listed();
    let kept = world.run(GC.into_iter().chain(["--delete"])).success();
    assert!(world.listed() == listed && !kept.stdout.contains(") of run"), "{}", kept.stdout);
    let is_listed = |name: &&String| listed.iter().any(|unit| name.contains(unit.as_str()));
    assert!(before.keys().filter(is_listed).all(|name| world.path(".ovenbird").join(name).exists()), "{}", kept.stdout);
    // The other file's detections go only when its pipeline comes to others, and no run is recent.
    world.run(["cache", "unpin", &runs[0]]).success();
    let list = world.run(GC).success();
    assert!(list.stdout.contains(&format!("detect (detect/zero-shot) of run {}", runs[0])), "{}", list.stdout);
    assert!(!list.stdout.contains(&runs[1]), "{}", list.stdout);
    let recent = world.run(["cache", "gc", "--grace", "0s"]).success();
    assert!(recent.stdout.contains("nothing to delete"), "{}", recent.stdout);
}

#[test]
fn a_name_that_leaves_its_folder_is_refused() {
    let world = World::tiny();
    let text = fs::read_to_string(world.path("tiny.yaml")).unwrap();
    world.write("labels.json", "precious");
    for name in ["../../labels", "a/b", "..", ".hidden", "a b", "é", &"n".repeat(65)] {
        world.write("own.yaml", text.replace("name: tiny", &format!("name: {name:?}")));
        let refused = world.run(["run", "./own.yaml"]);
        assert!(refused.code == 3 && refused.stderr.contains("name: `"), "{name}: {}", said(&refused));
    }
    assert_eq!(fs::read(world.path("labels.json")).unwrap(), b"precious");
    assert!(!world.path(".ovenbird").exists());
}

#[test]
fn evaluations_stay_and_a_report_is_not_overwritten_by_a_poorer_one() {
    let world = copied();
    world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.nms_iou=0.25"]).success();
    let run = fs::read_dir(world.path(".ovenbird/runs")).unwrap().map(|run| run.unwrap().file_name().into_string().unwrap()).max().unwrap();
    let before = world.run(["report", "--json", &run]).success().stdout;
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    let path = world.path(&format!(".ovenbird/runs/{run}/report.html"));
    let report = fs::read(&path).unwrap();
    let collected = world.run(GC.into_iter().chain(["--delete"])).success();
    assert!(collected.stdout.contains("detect (detect/zero-shot)") && !collected.stdout.contains("eval/coco"), "{}", collected.stdout);
    let again = world.run(["report", &run]).success();
    assert!(again.stdout.contains("not replaced, because a new report would not show detect.artifact"), "{}", again.stdout);
    assert_eq!(fs::read(&path).unwrap(), report);
    let after: Value = serde_json::from_str(&world.run(["report", "--json", &run]).success().stdout).unwrap();
    let before: Value = serde_json::from_str(&before).unwrap();
    assert_eq!(after["report"]["evaluations"], before["report"]["evaluations"]);
    assert_eq!(after["report"]["not_shown"].as_array().unwrap().len(), 1, "{after}");
    world.run(["report", &run, "-o", "poorer.html"]).success();
    assert!(fs::read_to_string(world.path("poorer.html")).unwrap().contains("its results are no longer in the home"));
}

/// Cut off at every step of what it changes on the disk, a collection never looks like loss.
#[test]
fn a_collection_that_is_cut_off_never_looks_like_loss() {
    for step in (0..40).step_by(if std::env::var("OVENBIRD_FAULTS").is_ok_and(|wish| wish == "all") { 1 } else { 6 }) {
        let world = copied();
        let pin = fs::read_dir(world.path(".ovenbird/pins")).unwrap().next().unwrap().unwrap().path();
        world.run(["cache", "unpin", pin.file_stem().unwrap().to_str().unwrap()]).success();
        let step = step.to_string();
        let _died = world.run(GC.into_iter().chain(["--delete", "--crash-at", &step]));
        let found = world.run(["verify", "--json"]);
        let found: Value = serde_json::from_str(&found.stdout).unwrap();
        let findings = found["verify"]["findings"].as_array().unwrap().iter();
        let lost: Vec<&Value> = findings.filter(|finding| finding["class"] != "leftover").collect();
        assert!(lost.is_empty(), "after step {step}: {lost:?}");
        world.run(GC.into_iter().chain(["--delete"])).success();
        world.run(["verify", "--full"]).success();
    }
}
