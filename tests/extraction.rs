//! Features: every kind of extraction, alone and in one pass, and what each row means.

use serde_json::json;

use crate::support::{World, until};

/// A toy world, and a small vision transformer that has hardly learned anything.
macro_rules! small_vit {
    () => {
        r#"stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 4, val_images: 9, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8, architecture: vit}
"#
    };
}

/// Every stage that reads images, on the toy world, with a small vision transformer.
const ALL: &str = concat!(
    "version: 1\nname: all\n",
    small_vit!(),
    r#"  - id: proposals
    use: proposals/import
    in: {proposals: world.val_proposals, annotations: world.val}
  - id: globals
    use: clip/globals
    in: {images: world.images, annotations: world.val, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: blocks
    use: clip/blocks
    in: {images: world.images, annotations: world.val, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: objects
    use: clip/objects
    in: {images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}, expand: [1.0, 1.5]}
  - id: crops
    use: crops/objects
    in: {images: world.images, annotations: world.val}
  - id: folder
    use: crops/folder
    in: {crops: crops.crops, annotations: world.val}
"#
);

#[test]
fn stages_that_share_a_pass_publish_what_they_publish_alone() {
    let (together, alone) = (World::new(), World::new());
    together.write("all.yaml", ALL);
    // Nor do cores matter.
    alone.write("all.yaml", ALL.replace("expand: [1.0, 1.5]}", "expand: [1.0, 1.5]}\n    resources: {cpu: 3}"));
    let all = together.run(["run", "./all.yaml"]).success();
    assert_eq!(all.steps("done").len(), 9, "{}", all.stderr);
    assert!(all.stderr.contains("one pass over the images serves globals, blocks, objects, regions"), "{}", all.stderr);
    for stage in ["globals", "blocks", "objects", "regions", "folder"] {
        alone.run(["run", "./all.yaml", "--until", stage]).success();
    }
    assert!(together.units() == alone.units());
    together.run(["verify", "--deep"]).success();
    // One JPEG a crop, in the folder of its class.
    let files: Vec<String> = together.units().into_keys().filter(|name| name.contains("crops-folder") && name.ends_with(".jpg")).collect();
    let classes: std::collections::BTreeSet<&str> = files.iter().map(|name| name.rsplit('/').nth(1).unwrap()).collect();
    assert!(files.len() > classes.len() && classes.len() > 3, "{files:?}");
    let audit = together.run(["verify", "--recompute", "50%", "--device", "cpu,cpu", "--jobs", "1"]).success();
    assert!(audit.stdout.contains("rows recomputed, 0 wrong"), "{}", audit.stdout);
}

/// Thousands of entries for one small picture: several units of each stage.
const MANY: &str = concat!(
    "version: 1\nname: many\n",
    small_vit!(),
    r#"  - id: globals
    use: clip/globals
    in: {images: ./images, annotations: ./labels.json, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: blocks
    use: clip/blocks
    in: {images: ./images, annotations: ./labels.json, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
"#
);

/// A world with [`MANY`]; some of its entries name a file that is no picture.
fn many(n_images: usize, broken: &[usize]) -> World {
    let world = World::new();
    let picture = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images/rgb.png")).unwrap();
    world.write("images/0.png", &picture);
    world.write("images/1.png", "no picture");
    let image = |image: usize| json!({"id": image, "file_name": format!("{}.png", usize::from(broken.contains(&image))), "width": 33, "height": 21});
    let images: Vec<serde_json::Value> = (0..n_images).map(image).collect();
    world.write("labels.json", json!({"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}).to_string());
    world.write("many.yaml", MANY);
    world
}

#[test]
fn several_devices_share_the_units_and_kills_lose_nothing_of_them() {
    let (alone, shared) = (many(3000, &[]), many(3000, &[]));
    alone.run(["run", "./many.yaml"]).success();
    let n_units = alone.units_of("clip/globals").len();
    assert!(n_units >= 2, "{n_units}");
    alone.run(["export", "./many.yaml", "globals", "out"]).success();
    let mut exported: Vec<_> = std::fs::read_dir(alone.path("out")).unwrap().map(|file| file.unwrap().file_name()).collect();
    exported.sort();
    assert_eq!((exported.len(), exported[1].to_str()), (n_units, Some("00001-globals.arrow")), "one file a unit, numbered");

    shared.run(["run", "./many.yaml", "--until", "clip"]).success();
    let mut running = shared.command(["run", "./many.yaml", "--device", "cpu,cpu"]).spawn().unwrap();
    until(|| !shared.units_of("clip/globals").is_empty());
    running.kill().unwrap();
    running.wait().unwrap();
    let run = shared.run(["run", "./many.yaml", "--device", "cpu,cpu"]).success();
    assert!(shared.units() == alone.units(), "{}", run.stderr);
    shared.run(["verify", "--deep"]).success();
}

#[test]
fn what_is_made_again_is_made_on_the_devices_that_were_chosen() {
    let world = many(3000, &[7, 2900]);
    let policy = "    on_bad_item: skip\n    max_failed_ratio: 0.1\n";
    world.write("many.yaml", MANY.replace("precision: f32}}\n", &format!("precision: f32}}}}\n{policy}")));
    let made_on = || {
        let manifest = world.manifests().into_iter().find(|path| path.to_string_lossy().contains("clip-globals")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
        manifest["made"]["device"].as_str().unwrap().to_owned()
    };
    world.run(["run", "./many.yaml", "--until", "globals"]).success();
    let (one, before) = (made_on(), world.units());
    let two = format!("{one}, {one}");
    world.run(["retry", "./many.yaml", "--failed", "--until", "globals", "--device", "cpu,cpu", "--jobs", "2"]).success();
    assert_eq!(made_on(), two);
    for (device, expected) in [("cpu", one), ("cpu,cpu", two)] {
        let shards: Vec<&String> = before.keys().filter(|name| name.contains("clip-globals") && name.ends_with(".arrow")).collect();
        assert!(shards.len() >= 2, "{shards:?}");
        shards.into_iter().for_each(|shard| std::fs::write(world.path(".ovenbird").join(shard), "damaged").unwrap());
        world.run(["verify", "--fix", "--device", device]).success();
        assert_eq!(made_on(), expected);
        assert!(world.units() == before, "{device}");
    }
}

#[test]
fn an_image_that_is_broken_is_left_out_by_every_stage_of_its_pass() {
    let world = many(40, &[7, 30]);
    let failed = world.run(["run", "./many.yaml", "--device", "cpu,cpu"]);
    assert!(failed.code == 4 && failed.steps("failed") == ["blocks", "globals"], "{}", failed.stderr);
    assert!(failed.stderr.contains("1.png"), "{}", failed.stderr);

    let policy = "    on_bad_item: skip\n    max_failed_ratio: 0.1\n";
    world.write("many.yaml", MANY.replace("precision: f32}}\n", &format!("precision: f32}}}}\n{policy}")));
    let run = world.run(["run", "./many.yaml"]).success();
    assert!(run.stderr.contains("one pass over the images serves globals, blocks"), "{}", run.stderr);
    let units = world.units();
    for kind in ["clip-globals", "clip-blocks"] {
        let (_, noted) = units.iter().find(|(name, _)| name.contains(kind) && name.ends_with("failed.json")).unwrap();
        let noted: Vec<serde_json::Value> = serde_json::from_slice(noted).unwrap();
        assert_eq!(noted.iter().map(|item| &item["item"]).collect::<Vec<_>>(), ["1.png", "1.png"], "{kind}");
        let (_, record) = units.iter().find(|(name, _)| name.contains(kind) && name.ends_with("unit.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(record).unwrap();
        assert_eq!((&record["metrics"]["images"], &record["metrics"]["rows"]), (&40.into(), &38.into()), "{kind}");
    }
    world.run(["verify", "--deep"]).success();
}

#[test]
fn the_arithmetic_is_noted_and_kept() {
    let world = World::new();
    world.write("all.yaml", ALL.replace("precision: f32", "precision: auto"));
    let run = world.run(["run", "./all.yaml", "--until", "globals"]).success();
    assert!(run.stderr.contains("computes in "), "{}", run.stderr);
    let record = std::fs::read_to_string(world.find(&["clip-globals", "unit.json"])).unwrap();
    let chosen = ["\"precision\": \"bf16\"", "\"precision\": \"f32\""].iter().filter(|words| record.contains(**words)).count();
    assert_eq!(chosen, 1, "{record}");
}

#[test]
fn a_resnet_has_no_patches_for_objects_and_the_message_says_what_to_do() {
    let world = World::new();
    world.write("all.yaml", ALL.replace("architecture: vit", "architecture: resnet"));
    let run = world.run(["run", "./all.yaml"]);
    assert!(run.code == 4 && run.stderr.contains("a ResNet: the object token needs the patches"), "{}", run.stderr);
    assert!(run.stderr.contains("use a ViT, or `clip/proposals`"), "{}", run.stderr);
    // The others of its pass are not taken along.
    assert_eq!(run.steps("failed"), ["objects"], "{}", run.stderr);
}

#[test]
fn a_dry_run_goes_through_every_stage_and_leaves_the_home_as_it_was() {
    let world = World::new();
    world.write("all.yaml", ALL);
    let dry = world.run(["run", "./all.yaml", "--dry-run", "3"]).success();
    assert!(dry.stdout.contains("a dry run with 3 items a step: its numbers mean nothing; its results are in"), "{}", dry.stdout);
    assert_eq!(dry.steps("done").len(), 9, "{}", dry.stderr);
    assert!(!world.path(".ovenbird/units").exists());
    let plan = world.run(["plan", "./all.yaml"]).success();
    assert!(plan.stdout.contains("0 up to date"), "{}", plan.stdout);
    world.run(["verify", "--deep", "--home", ".ovenbird/dry-run/3"]).success();
    let estimate = world.run(["run", "./all.yaml", "--estimate", "--dry-run", "3"]).success();
    let objects = estimate.stdout.lines().find(|line| line.starts_with("objects ")).unwrap_or_default();
    assert_eq!(objects.split_whitespace().take(3).collect::<Vec<_>>(), ["objects", "3", "9"], "{}", estimate.stdout);
    assert!(!estimate.stderr.contains("one pass over the images"), "{}", estimate.stderr);
    // The same rows as in earnest, as far as they go.
    world.run(["run", "./all.yaml", "--until", "globals"]).success();
    world.run(["verify"]).success();
}

#[test]
fn the_doctor_knows_the_machine_and_what_a_checkpoint_is() {
    let world = World::new();
    world.write("all.yaml", ALL);
    let alone = world.run(["doctor"]).success();
    assert!(alone.stdout.contains("libtorch") && alone.stdout.contains("arithmetic "), "{}", alone.stdout);
    world.run(["run", "./all.yaml", "--until", "clip"]).success();
    let checkpoint = world.find(&["clip-pretrain", "clip.safetensors"]);
    let found = world.run(["doctor", "--clip", checkpoint.to_str().unwrap()]).success();
    let activation = "QuickGELU: OpenAI's layout";
    for words in ["ViT/8 at 64 px: 3 blocks of width 128, 2 heads", "every number is finite", "to f32", "OpenAI's names", activation] {
        assert!(found.stdout.contains(words), "expected `{words}` in\n{}", found.stdout);
    }
    world.write("not.safetensors", "nothing");
    let output = world.run(["doctor", "--clip", "not.safetensors"]);
    assert!(output.code == 4 && output.stderr.contains("not.safetensors"), "{}", output.stderr);
}

/// Regions of proposals that a network made.
const OF_A_NETWORK: &str = "version: 1
name: network
stages:
  - {id: clip, use: toy/clip}
  - {id: train, use: annotations/split, in: {annotations: ./data/instances_train.json, classes: ./data/classes.json}, with: {keep: base}}
  - id: oln
    use: oln/train
    in: {images: ./data/images, annotations: train.annotations, classes: train.classes}
    with: {network: toy, training: {steps: 2, checkpoint_every: 2, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}}
  - id: proposals
    use: proposals/oln
    in: {images: ./data/images, annotations: ./data/instances_val.json, network: oln.network}
    with: {max_per_image: 10}
POLICY  - id: regions
    use: clip/proposals
    in: {images: ./data/images, annotations: ./data/instances_val.json, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {min_side: 0.0}
POLICY";

#[test]
fn images_that_a_proposal_network_skipped_or_did_not_come_to_are_no_hindrance() {
    let world = World::new();
    let toy = "version: 1\nname: toy\nstages:\n  - {id: world, use: toy/world, with: {train_images: 6, val_images: 5, web_images: 0, \
               held_out_images: 0, side_px: 160}}\n";
    world.write("toy.yaml", toy);
    world.run(["run", "./toy.yaml"]).success();
    for (output, folder) in [("images", "data/images"), ("train", "data"), ("val", "data"), ("classes", "data")] {
        world.run(["export", "./toy.yaml", &format!("world.{output}"), folder]).success();
    }
    world.write("network.yaml", OF_A_NETWORK.replace("POLICY", ""));
    let dry = world.run(["run", "./network.yaml", "--dry-run", "2"]).success();
    assert!(dry.steps("done").contains(&"regions".to_owned()), "{}", dry.stderr);

    let hurt = world.path("data/images/val/000000000008.jpg");
    let bytes = std::fs::read(&hurt).unwrap();
    std::fs::write(&hurt, &bytes[..bytes.len() / 2]).unwrap();
    world.write("network.yaml", OF_A_NETWORK.replace("POLICY", "    on_bad_item: skip\n    max_failed_ratio: 0.5\n"));
    let run = world.run(["run", "./network.yaml"]).success();
    assert_eq!(run.stderr.matches("1 item skipped").count(), 2, "{}", run.stderr);
    std::fs::write(&hurt, bytes).unwrap();
    world.run(["retry", "./network.yaml", "--failed"]).success();
    let again = world.run(["run", "./network.yaml"]).success();
    assert!(again.stdout.contains("nothing to do"), "{}{}", again.stdout, again.stderr);
}
