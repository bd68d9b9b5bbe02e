//! RPL as an operator runs it: windows about objects, contexts around names and descriptions, embeddings of any classes, and contexts that go out and come
//! in.

use std::{fs, path::PathBuf};

use ovenbird_cache::inputs;
use ovenbird_models::checkpoint::Checkpoint;

use crate::support::{
    World,
    toy_web::{self, ToyWeb},
};

/// The steps of the method at their smallest.
const SMALL: &str = r#"version: 1
name: small
variables: {per_class: 3}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 16, val_images: 8, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
  - {id: words, use: toy/vocabulary}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: crops
    use: crops/objects
    in: {images: world.images, annotations: train.annotations}
    with: {rule: rpl, expand: 3.0, min_side: 0.0, min_area: 20.0, per_class: "${per_class}"}
  - id: val-crops
    use: crops/objects
    in: {images: world.images, annotations: world.val}
    with: {rule: rpl, expand: 3.0, min_side: 0.0}
  - id: prompts
    use: prompts/rpl
    in: {checkpoint: clip.checkpoint, classes: train.classes, descriptions: words.descriptions, crops: crops.crops, annotations: train.annotations, val_crops: val-crops.crops, val_annotations: world.val}
    with: {epochs: 3, batch_size: 8, lr: 0.02, checkpoint_every: 4}
  - {id: again, use: prompts/embed, in: {checkpoint: clip.checkpoint, prompts: prompts.prompts, classes: train.classes, descriptions: words.descriptions}}
  - {id: out, use: prompts/export, in: {prompts: prompts.prompts}}
  - {id: back, use: prompts/import, in: {file: out.context, checkpoint: clip.checkpoint, classes: train.classes, descriptions: words.descriptions}}
"#;

fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world
}

/// The class embeddings that a step ended with.
fn exported(world: &World, step: &str) -> PathBuf {
    world.run(["export", "./small.yaml", &format!("{step}.prompts"), step]).success();
    let files = inputs::digest_path(&world.path(step), None, 0).unwrap();
    files.into_iter().find(|file| file.name.ends_with("prompts.safetensors")).unwrap().path
}

#[test]
fn contexts_are_learned_from_windows_and_go_out_and_come_in() {
    let world = small();
    let run = world.run(["run", "./small.yaml"]).success();
    assert!(run.stderr.contains("on validation crops: base_top1 "), "{}", run.stderr);
    let file = |step: &str| Checkpoint::open(&exported(&world, step)).unwrap();
    let learned = file("prompts");
    assert_eq!((learned.tensors()["embeddings"].size()[0], learned.tensors()["ctx1"].size()[0]), (60, 1));
    for step in ["again", "back"] {
        let found = file(step);
        let pair = |name: &str| [&found, &learned].map(|file| file.tensors()[name].shallow_clone());
        for name in ["ctx1", "ctx2"] {
            let [found, learned] = pair(name);
            assert!(found.equal(&learned), "{step}: other `{name}`");
        }
        // Another number of threads may add up in another order: sums of some thousands of f32 in each of a few layers.
        let [found, learned] = pair("embeddings");
        let apart = (found - &learned).abs().max().double_value(&[]) / learned.abs().max().double_value(&[]);
        assert!(apart < 1e-4, "{step}: embeddings differ by {apart:.1e}");
    }
    world.run(["verify", "--deep"]).success();
    // Another number of crops makes others, and what is learned from them; crops of validation images stay.
    let other = world.run(["run", "./small.yaml", "--set", "per_class=2"]).success();
    assert_eq!(other.steps("done"), ["again", "back", "crops", "out", "prompts"], "{}", other.stderr);
}

/// A run that is killed at any moment ends with the bytes of one that was not.
#[test]
fn regional_prompt_learning_continues_after_kills_to_the_same_bytes() {
    let whole = small();
    whole.run(["run", "./small.yaml", "--until", "prompts"]).success();
    let killed = small();
    killed.run_and_kill(&["run", "./small.yaml", "--until", "prompts"], &["crops-objects", "prompts-rpl"]);
    killed.run(["run", "./small.yaml", "--until", "prompts"]).success();
    let [one, other] = [&whole, &killed].map(|world| fs::read(exported(world, "prompts")).unwrap());
    assert!(one == other);
}

#[test]
fn what_regional_prompt_learning_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "val-crops"]).success();
    let refused = |from: &str, to: &str, expected: &str| world.refuses(SMALL, from, to, expected);
    world.write("few.txt", "owl owl_which_is_a_bird\n");
    refused("descriptions: words.descriptions, crops", "descriptions: ./few.txt, crops", "no description of 60 of 60 classes, `");
    world.write("wrong.txt", "owl a bird\n");
    refused(
        "descriptions: words.descriptions, crops",
        "descriptions: ./wrong.txt, crops",
        "line 1: expected `NAME NAME_which_is_DESCRIPTION`",
    );
    refused("epochs: 3", "epochs: 3, warmup_epochs: 4", "warmup_epochs: expected at most `epochs`");
    refused(
        "annotations: train.annotations, val_crops",
        "annotations: world.train, val_crops",
        "hint: use the annotations that the crops were made from",
    );
    refused("rule: rpl, expand: 3.0, min_side: 0.0, min_area: 20.0,", "rule: rpl, min_area: -1.0,", "min_area: expected 0 px^2 or more");
    refused("val_crops: val-crops.crops, val_annotations: world.val", "web: train.annotations", "web_images: missing, but `web` is given");
}

/// The shipped pipeline at its smallest: two rounds with a web that is served here, and a detector that trains itself on what was downloaded.
#[test]
fn rounds_retrieve_and_download_and_the_detector_trains_itself() {
    let web = ToyWeb::start(0, toy_web::of_world);
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/promptdet-toy.yaml")).unwrap();
    let mut small = text;
    for (from, to) in [
        ("seeds: [7, 8, 9]", "seeds: [7]"),
        ("http://127.0.0.1:8391", &format!("http://{}", web.address)),
        (
            "train_images: 200, val_images: 120, web_images: 2000",
            "train_images: 12, val_images: 6, web_images: 150, held_out_images: 60, side_px: 160",
        ),
        ("per_class: 40", "per_class: 8"),
        ("epochs: 20, lr: 0.02", "epochs: 2, batch_size: 8, lr: 0.02"),
        ("epochs: 18", "epochs: 2"),
        ("lr_epochs: [14, 17]", "lr_epochs: [1]"),
        ("keep_checkpoints: 18", "keep_checkpoints: 2"),
        ("start_epoch: 14", "start_epoch: 1"),
        ("max_size: [256, 256]", "max_size: [128, 128]"),
        ("min_size: [192, 256]", "min_size: [96, 128]"),
    ] {
        assert!(small.contains(from), "the pipeline changed: {from}");
        small = small.replace(from, to);
    }
    let world = World::new();
    world.write("toy.yaml", &small);
    let chosen = ["./toy.yaml", "--variant", "round-1", "--variant", "self-training"];
    let run = |command: &str, more: &[&str]| world.run([command].into_iter().chain(chosen).chain(more.iter().copied())).success();
    let first = run("run", &[]);
    let steps = first.steps("done");
    for step in ["prompts-1", "links-2", "download-2", "labels-2", "prompts-2", "novel-labels", "base@learned", "detector@self-training"] {
        assert!(steps.iter().any(|done| done == step), "{step}: {steps:?}");
    }
    assert!(!steps.iter().any(|done| done == "links-1"), "{steps:?}");
    assert!(first.stderr.contains("downloaded"), "{}", first.stderr);
    let plan = run("plan", &[]).stdout;
    assert!(
        plan.contains("labels-2: images of the web: 800 wanted") && plan.contains("novel-labels: images of the web: 300 wanted"),
        "{plan}"
    );
    let report = fs::read_dir(world.path(".ovenbird/runs")).unwrap().next().unwrap().unwrap().path().join("report.html");
    let report = fs::read_to_string(report).unwrap();
    assert!(
        report.contains("novel-labels: images of the web") && report.contains("links without an image"),
        "no table of images of the web"
    );

    // Fewer images of a class, and a third round's first two: nobody is asked twice.
    let asked = web.counts();
    assert!(asked.iter().filter(|(path, _)| path.starts_with("/pictures")).all(|(_, n)| *n <= 3), "{asked:?}");
    let few = run("run", &["--set", "novel-labels.per_class=3"]);
    let again = few.steps("done");
    assert!(
        again.contains(&"novel-labels".to_owned()) && !again.iter().any(|step| step.contains("download") || step.contains("prompts")),
        "{again:?}"
    );
    assert_eq!(web.counts(), asked);
    drop(web);
    // Without a web, in a home that has lost what was made of it.
    for kind in ["web-download", "annotations-web"] {
        fs::remove_dir_all(world.path(".ovenbird/units").join(kind)).unwrap();
    }
    let offline = run("run", &["--until", "novel-labels"]);
    assert!(offline.steps("done").contains(&"novel-download".to_owned()), "{}", offline.stderr);
}
