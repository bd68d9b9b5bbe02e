//! Predictions for the user's images, with the detectors of a pipeline.

use std::{collections::BTreeMap, fs};

use serde_json::Value;

use crate::support::World;

/// A trained detector, and CLIP on the proposals of a trained network, in seconds; their detections as results files.
const SMALL: &str = r#"version: 1
name: small
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 6, val_images: 4, web_images: 40, held_out_images: 60, side_px: 160}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: val
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
    with: {keep: all-annotated}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: val.classes}
    with: {templates: {custom: ["a {}."]}}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts}
    with: {network: toy, training: {steps: 2, checkpoint_every: 2, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}}
  - id: oln
    use: oln/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes}
    with: {network: toy, training: {steps: 2, checkpoint_every: 2, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}}
  - id: test
    use: detector/test
    in: {images: world.images, annotations: val.annotations, classes: val.classes, prompts: prompts.prompts, detector: detector.detector}
    with: {max_per_image: 20}
  - id: proposals
    use: proposals/oln
    in: {images: world.images, annotations: val.annotations, network: oln.network}
    with: {max_per_image: 10}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: val.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}, min_side: 0.0}
  - id: zero-shot
    use: detect/zero-shot
    in: {features: regions.features, prompts: prompts.prompts, classes: val.classes, annotations: val.annotations}
    with: {score_threshold: 0.0, max_per_image: 20}
  - id: test-results
    use: detections/export
    in: {detections: test.detections, annotations: val.annotations}
  - id: zero-shot-results
    use: detections/export
    in: {detections: zero-shot.detections, annotations: val.annotations}
"#;

/// The pipeline has run until some step, and the validation images are in `images/val`.
pub(crate) fn ran(until: &str) -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world.run(["run", "./small.yaml", "--until", until]).success();
    world.run(["export", "./small.yaml", "world.images", "images"]).success();
    world
}

/// The class, score and box of each detection, by image.
pub(crate) type Found = BTreeMap<String, Vec<(String, f64, Vec<f64>)>>;

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// What `predict --json` prints.
pub(crate) fn predicted(json: &str) -> Found {
    let document: Value = serde_json::from_str(json).unwrap();
    let found = |found: &Value| (found["class"].as_str().unwrap().to_owned(), found["score"].as_f64().unwrap(), numbers(&found["bbox"]));
    let images = document["images"].as_array().unwrap().iter();
    images
        .map(|image| (image["file"].as_str().unwrap().to_owned(), image["detections"].as_array().unwrap().iter().map(found).collect()))
        .collect()
}

/// The results file of a step, with the names in the annotation file at an output.
pub(crate) fn exported(world: &World, step: &str, annotations: &str) -> Found {
    world.run(["export", "./small.yaml", step, step]).success();
    world.run(["export", "./small.yaml", annotations, "val"]).success();
    // Each is the only file of its folder.
    let read = |folder: &str| -> Value {
        let file = fs::read_dir(world.path(folder)).unwrap().next().unwrap().unwrap().path();
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    };
    let (annotations, results) = (read("val"), read(step));
    let named = |list: &str, id: &Value, name: &str| {
        let entry = annotations[list].as_array().unwrap().iter().find(|entry| entry["id"] == *id).unwrap();
        entry[name].as_str().unwrap().to_owned()
    };
    let mut found = Found::new();
    for result in results.as_array().unwrap() {
        let image = format!("images/{}", named("images", &result["image_id"], "file_name"));
        let class = named("categories", &result["category_id"], "name");
        found.entry(image).or_default().push((class, result["score"].as_f64().unwrap(), numbers(&result["bbox"])));
    }
    found
}

#[test]
fn on_the_images_of_a_pipeline_predictions_are_the_detections_of_its_step() {
    let world = ran("test-results");
    world.run(["run", "./small.yaml", "--until", "zero-shot-results"]).success();
    // The run and its steps; the last line counts stored results.
    let shown = || {
        let status = world.run(["status"]).success().stdout;
        (status.lines().filter(|line| !line.contains("results stored")).map(str::to_owned).collect::<Vec<_>>(), world.run(["log"]).stdout)
    };
    let before = shown();
    for step in ["test", "zero-shot"] {
        let run = world.run(["predict", "./small.yaml", "images/val", "--step", step, "--min-score", "0", "--json"]).success();
        let expected = exported(&world, &format!("{step}-results"), "val.annotations");
        assert!(expected.len() == 4 && expected.values().all(|found| !found.is_empty()), "{expected:?}");
        assert_eq!(predicted(&run.stdout), expected, "{step}");
    }
    assert_eq!(shown(), before);

    // Stored results are used again, for all classes by name too; pictures of earlier predictions are no images.
    let n_units = world.n_units();
    let again = world.run(["predict", "./small.yaml", ".", "--out", "images/drawn", "--min-score", "1"]).success();
    assert!(!again.stdout.contains("images/drawn/"), "{}", again.stdout);
    let twice = world.run(["predict", "./small.yaml", "images/val", "--step", "zero-shot", "--min-score", "0.9"]).success();
    assert!(twice.stdout.contains("4 pictures with boxes in predictions"), "{}", twice.stdout);
    assert!(world.n_units() > n_units);
    let n_units = world.n_units();
    world.run(["predict", "./small.yaml", "images/val", "--step", "zero-shot"]).success();
    assert_eq!(world.n_units(), n_units);

    // Predictions belong to no run: what is damaged is set aside, and garbage collection finds the rest.
    fs::write(world.find(&["annotations-folder", "annotations.json"]), "{").unwrap();
    let fixed = world.run(["verify", "--full", "--fix"]).success();
    assert!(fixed.stdout.contains("set aside; no artifact needs it"), "{}", fixed.stdout);
    world.run(["verify", "--full"]).success();
    world.run(["predict", "./small.yaml", "images/val", "--step", "zero-shot"]).success();
    let gc = world.run(["cache", "gc", "--keep-for", "0s", "--grace", "0s"]).success();
    assert!(gc.stdout.contains("(detect/zero-shot) of run predict"), "{}", gc.stdout);
}

#[test]
fn any_classes_are_looked_for_and_bad_images_are_named() {
    let world = ran("test");
    let image = fs::read_dir(world.path("images/val")).unwrap().map(|entry| entry.unwrap().path()).min().unwrap();
    let bytes = fs::read(image).unwrap();
    world.write("a/cat.jpg", &bytes);
    world.write("b/cat.jpg", [&bytes[..], b" "].concat());
    world.write("names.txt", "salt, or pepper\nplain red circle\n");
    let args = ["predict", "./small.yaml", "a/cat.jpg", "b", "--classes", "@names.txt", "--min-score", "0", "--json"];
    let run = world.run(args).success();
    assert!(run.stderr.contains("`test` (detector/test) looks for 2 classes (1 novel) in 2 images"), "{}", run.stderr);
    let found = predicted(&run.stdout);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["a/cat.jpg", "b/cat.jpg"]);
    let names: Vec<&str> = found["a/cat.jpg"].iter().map(|(name, ..)| name.as_str()).collect();
    assert!(names.len() == 20 && names.iter().all(|name| ["salt, or pepper", "plain red circle"].contains(name)), "{names:?}");
    // Small images are drawn larger.
    for picture in ["predictions/cat.jpg", "predictions/cat-2.jpg"] {
        let picture = ovenbird_data::images::Image::open(&world.path(picture)).unwrap();
        assert_eq!(picture.width.max(picture.height), 800);
    }
    let one = world.run(["predict", "./small.yaml", "a", "--classes", "a novel thing", "--min-score", "0"]).success();
    assert_eq!(one.stdout.matches("  a novel thing ").count(), 20, "{}", one.stdout);
    assert!(one.stdout.lines().all(|line| line.chars().count() <= 80), "{}", one.stdout);

    world.write("cut.jpg", &bytes[..bytes.len() / 2]);
    world.write("none.png", "no picture");
    let bad = world.run(["predict", "./small.yaml", "cut.jpg", "a", "none.png", "names.txt", "missing.jpg", "--min-score", "1"]);
    let expected = [
        "cut.jpg: a JPEG without its end",
        "a/cat.jpg, ",
        "  nothing with a score of 1 or more; 20 with less",
        "none.png: expected a JPEG, PNG, WebP or GIF image",
        "names.txt: expected an image, a name ending in .jpg, .jpeg or .png",
        "missing.jpg: cannot read",
        "1 picture with boxes in predictions",
    ];
    for (line, expected) in bad.stdout.lines().zip(expected) {
        assert!(line.starts_with(expected), "{line}\n{}", bad.stdout);
    }
    assert!(bad.code == 4 && bad.stderr.contains("error: 4 problems of the inputs"), "{}", bad.stderr);
    let over = world.run(["predict", "./small.yaml", "a", "--out", "a"]);
    assert!(over.code == 2 && over.stderr.contains("--out a: a picture would replace the image a/cat.jpg"), "{}", over.stderr);
    assert_eq!(fs::read(world.path("a/cat.jpg")).unwrap(), bytes);
}

#[test]
fn what_predict_cannot_do_is_refused_with_what_to_type() {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world.write("picture.png", "");
    let check = |args: &[&str], code: i32, words: &[&str]| {
        let refused = world.run(["predict"].into_iter().chain(args.iter().copied()));
        assert!(refused.code == code && words.iter().all(|words| refused.stderr.contains(words)), "{args:?}: {}", refused.stderr);
    };
    let not_run = ["no stored result of `detector`", "hint: run it first: `", "run ./small.yaml --set 'world.seed=8' --until detector"];
    check(&["./small.yaml", "picture.png", "--set", "world.seed=8"], 4, &not_run);
    check(&["./small.yaml", "picture.png", "--home", "other"], 4, &["--until detector --home other`"]);
    check(&["./small.yaml", "picture.png", "--step", "zero-shot"], 4, &["no stored result of `oln`"]);
    check(&["./small.yaml", "picture.png", "--step", "oln"], 2, &["--step oln: the step detects no objects", "test, zero-shot"]);
    let imported = ["`regions` reads proposals from `proposals` (`proposals/import`), which has none for other images", "vild-toy"];
    check(&["quickstart", "picture.png"], 2, &imported);
    let several = ["15 steps of oadp-toy detect objects", "name one with `--step`: test@vild,7, "];
    check(&["oadp-toy", "picture.png"], 2, &several);
    check(&["oadp-toy", "picture.png", "--variant", "all", "--set", "seed=7"], 4, &["run oadp-toy --set 'seed=7' --variant all --until "]);
    check(&["./small.yaml", "picture.png", "--classes", "a,a"], 2, &["--classes: `a` is named twice"]);
    check(&["./small.yaml", "picture.png", "--min-score", "2"], 2, &["expected a number from 0 to 1"]);
    assert!(!world.path(".ovenbird").exists() && !world.path("other").exists());
}
