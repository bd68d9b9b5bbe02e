//! Detectors: trained, killed and continued, and asked what they see.

use crate::support::{World, until};

/// A detector of almost nothing, in seconds.
const SMALL: &str = r#"version: 1
name: small
variables: {rate: 0.005}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 10, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: train
    use: coco/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, steps_per_unit: 2, batch: 8}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: train.classes}
  - id: proposals
    use: proposals/import
    in: {proposals: world.train_proposals, annotations: world.train}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: world.train, proposals: proposals.proposals, checkpoint: clip.checkpoint}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts, features: regions.features}
    with:
      network: toy
      training:
        steps: 6
        steps_per_unit: 1
        checkpoints: 2
        batch: 2
        accumulate: 2
        optimizer: adamw
        learning_rate: "${rate}"
        warm_up_steps: 2
        decay: cosine
        groups: {roi_head: {rate: 0.5}, bn: {decay: 0.0}}
        most_gradient: 5.0
        average: 0.5
        longer_side: [96, 128]
        shorter_side: [96, 128]
        repeat_threshold: 0.2
  - id: test
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: detector.detector}
    with: {most_per_image: 20}
  - id: coco
    use: eval/coco
    in: {annotations: world.val, detections: test.detections, classes: train.classes}
"#;

fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world
}

#[test]
fn a_training_that_is_killed_ends_with_the_same_bytes() {
    let (undisturbed, killed) = (small(), small());
    let run = undisturbed.run(["run", "./small.yaml"]).success();
    assert!(run.stdout.contains("coco (eval/coco)") && !run.stderr.contains("Warning"), "{}{}", run.stdout, run.stderr);
    // The two that are to stay, the last one's two spares among them; others are pruned.
    assert_eq!(undisturbed.n_units_of("detector/train"), 4);
    for n_links_before in [1, 3] {
        let mut running = killed.command(["run", "./small.yaml"]).spawn().unwrap();
        until(|| killed.n_units_of("detector/train") >= n_links_before);
        running.kill().unwrap();
        running.wait().unwrap();
    }
    // Nor do threads matter.
    killed
        .write("small.yaml", SMALL.replace("        repeat_threshold: 0.2\n", "        repeat_threshold: 0.2\n    resources: {cpu: 3}\n"));
    killed.run(["run", "./small.yaml"]).success();
    assert!(killed.units() == undisturbed.units());
    killed.run(["verify", "--deep"]).success();

    // Weights and losses moved, and detections lie in their images.
    let record = std::fs::read_to_string(undisturbed.find(&["detector-train", "unit.json"])).unwrap();
    for loss in ["rpn_objectness", "rpn_boxes", "classes", "boxes", "objects"] {
        assert!(record.contains(&format!("\"loss.{loss}\"")), "{record}");
    }
    let one_more = undisturbed.run(["run", "./small.yaml", "--set", "test.heads=box"]).success();
    assert_eq!(one_more.steps("done"), ["coco", "test"], "{}", one_more.stderr);
    let dry = undisturbed.run(["run", "./small.yaml", "--dry-run", "3"]).success();
    assert!(dry.steps("done").contains(&"detector".to_owned()), "{}", dry.stderr);
}

#[test]
fn what_a_training_cannot_use_is_said_in_words() {
    let world = small();
    // A loss that explodes names the images; what was made before is kept.
    let exploded = world.run(["run", "./small.yaml", "--set", "rate=1000000.0", "--until", "detector"]);
    assert!(
        exploded.code == 4 && exploded.stderr.contains("the loss is") && exploded.stderr.contains(", on images "),
        "{}",
        exploded.stderr
    );

    // Embeddings of other images.
    world.write(
        "other.yaml",
        SMALL
            .replace("annotations: world.train}", "annotations: world.val}")
            .replace("world.train_proposals", "world.val_proposals")
            .replace("annotations: world.train, proposals", "annotations: world.val, proposals"),
    );
    let missing = world.run(["run", "./other.yaml", "--until", "detector"]);
    assert!(missing.code == 4 && missing.stderr.contains("none for 9 of 9 images"), "{}", missing.stderr);
    assert!(missing.stderr.contains("`clip/objects` with the same `annotations`"), "{}", missing.stderr);

    // A detector that was trained without class embeddings cannot be asked with some.
    let without = "prompts: prompts.prompts, features: regions.features}";
    world.write("wordless.yaml", SMALL.replace(&format!(", {without}"), "}"));
    let wordless = world.run(["run", "./wordless.yaml", "--until", "test"]);
    assert_eq!((wordless.code, wordless.steps("failed")), (4, vec!["test".to_owned()]), "{}", wordless.stderr);
    assert!(wordless.stderr.contains("the detector was trained without class embeddings, and gets some"), "{}", wordless.stderr);

    // Weights to begin with: what has no place is named, and a file without any is refused.
    world.write("begun.yaml", SMALL.replace("features: regions.features}", "features: regions.features, pretrained: clip.checkpoint}"));
    let begun = world.run(["run", "./begun.yaml", "--until", "detector"]);
    assert!(begun.code == 4 && begun.stderr.contains("no detector that is known"), "{}", begun.stderr);

    // A checkpoint of CLIP is no detector.
    world.write("clip.yaml", SMALL.replace("detector: detector.detector", "detector: clip.checkpoint"));
    let refused = world.run(["plan", "./clip.yaml"]);
    assert!(refused.stderr.contains("expected detector, but `clip.checkpoint` is checkpoint"), "{}", refused.stderr);
}
