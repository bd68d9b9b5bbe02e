//! The small CLIPs that come with the program, and how another takes their place.

use std::fs;

use serde_json::Value;

use crate::support::World;

/// Another world than the one that they were trained on.
const PIPELINE: &str = "version: 1
name: names
stages:
  - id: world
    use: toy/world
    with: {seed: 3, train_images: 1, val_images: 1, web_images: 1, held_out_images: 1000, side_px: 64}
  - id: resnet
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
    with: {architecture: resnet}
  - id: vit
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
    with: {architecture: vit}
";

/// The accuracies that the README of the weights gives, less four standard errors of a thousand pictures.
#[test]
fn they_name_the_pictures_of_another_world() {
    let world = World::new();
    world.write("names.yaml", PIPELINE);
    let run = world.run(["run", "./names.yaml"]).success();
    let accuracy = |step: &str| -> f64 {
        let line = run.stderr.lines().find(|line| line.trim_start().starts_with(step) && line.contains("zero-shot accuracy"));
        let line = line.unwrap_or_else(|| panic!("no accuracy of {step} in {}", run.stderr));
        line.split_whitespace().rev().nth(1).unwrap().parse().unwrap()
    };
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/stages/assets/toy-clip/README.md")).unwrap();
    for step in ["resnet", "vit"] {
        let row = readme.lines().find(|line| line.starts_with(&format!("| `{step}`"))).unwrap();
        let said: f64 = row.split('|').nth(4).unwrap().trim().trim_end_matches(" %").parse().unwrap();
        let p = said / 100.0;
        let standard_error = (p * (1.0 - p) / 1000.0).sqrt();
        assert!(accuracy(step) / 100.0 >= p - 4.0 * standard_error, "{step}: {} % of {said} %", accuracy(step));
    }
    world.run(["verify", "--deep"]).success();
}

#[test]
fn another_is_trained_in_their_place() {
    let world = World::new();
    let set = ["clip.use=clip/pretrain", "clip.in.images=world.web_images", "clip.in.captions=world.captions", "web_images=40"];
    let set: Vec<&str> = set.into_iter().flat_map(|change| ["--set", change]).collect();
    for pipeline in ["quickstart", "vild-toy"] {
        let plan = world.run(["plan", pipeline, "--json"].into_iter().chain(set[..6].iter().copied())).success();
        let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
        let clip = plan["plan"].as_array().unwrap().iter().find(|step| step["step"] == "clip").unwrap();
        assert_eq!(clip["use"], "clip/pretrain", "{clip}");
    }
    let fast = ["--set", "clip.steps=2", "--set", "clip.batch_size=8", "--until", "clip"];
    let run = world.run(["run", "quickstart"].into_iter().chain(set.iter().copied()).chain(fast)).success();
    assert!(run.stderr.contains("zero-shot accuracy"), "{}", run.stderr);
}
