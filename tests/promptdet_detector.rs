//! PromptDet's detector as an operator runs it: trained on base classes, on images of the web from an epoch on, tested, selected, exported and imported.

use std::fs;

use ovenbird_models::checkpoint::Checkpoint;
use serde_json::{Value, json};

use crate::support::{World, until};

/// The steps of the method at their smallest.
const SMALL: &str = r#"version: 1
name: small
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 9, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: train.classes}
    with: {templates: bare-name}
  - id: base
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts}
    with:
      network: toy
      head: cosine
      masks: true
      training: {epochs: 3, lr_epochs: [2], checkpoint_epochs: 1, keep_checkpoints: 3, batch_size: 4, lr: 0.01, warmup_steps: 2, max_size: [128, 128], min_size: [96, 128], size_step: 32, repeat_threshold: 0.2}
  - id: detector
    use: detector/train
    in:
      images: world.images
      annotations: train.annotations
      classes: train.classes
      prompts: prompts.prompts
      web_images: world.images
      web: ./web.json
      start: base.detector
      start_state: base.state
    with:
      network: toy
      head: cosine
      masks: true
      start_epoch: 1
      web: {min_size: [[40, 60], [60, 90]], max_size: 128, batch_size: 2}
      training: {epochs: 3, lr_epochs: [2], checkpoint_every: 2, keep_checkpoints: 2, batch_size: 4, lr: 0.01, warmup_steps: 2, max_size: [128, 128], min_size: [96, 128], size_step: 32, repeat_threshold: 0.2}
  - id: test
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: detector.detector}
    with: {score_threshold: 0.0001, max_per_image: 50}
  - {id: coco, use: eval/coco, in: {annotations: world.val, detections: test.detections, classes: train.classes}}
  - {id: masks, use: eval/coco, in: {annotations: world.val, detections: test.detections, classes: train.classes}, with: {iou_type: masks}}
  - id: select
    use: detector/select
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, checkpoints: base.detector}
    with: {group: all, test: {score_threshold: 0.0001, max_per_image: 20}}
  - {id: exported, use: detector/export, in: {detector: detector.detector}}
  - {id: imported, use: detector/import, in: {checkpoint: exported.checkpoint}, with: {network: toy, max_size: 128, min_size: 128}}
  - id: test-again
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: imported.detector}
    with: {score_threshold: 0.0001, max_per_image: 50}
  - {id: coco-again, use: eval/coco, in: {annotations: world.val, detections: test-again.detections, classes: train.classes}}
"#;

/// A folder with the pipeline, and with labels of seven images of the web: scenes that are not trained on, each with the name of a novel class, of which one
/// has another label of a base class.
fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world.write("web.json", "");
    world.run(["run", "./small.yaml", "--until", "train"]).success();
    let mut labels: Value = serde_json::from_slice(&fs::read(world.find(&["toy-world", "/val/", ".json"])).unwrap()).unwrap();
    let ids: Vec<u64> = labels["images"].as_array().unwrap().iter().map(|image| image["id"].as_u64().unwrap()).collect();
    let category = |place: usize| labels["categories"][place]["id"].clone();
    let classes: Vec<Value> = (0..ids.len()).map(|place| category(40 + place % 3)).chain([category(0)]).collect();
    let label = |(place, (image, class)): (usize, (&u64, Value))| json!({"id": place + 1, "image_id": image, "category_id": class, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0});
    let images = ids.iter().chain(&ids[..1]);
    let all: Vec<Value> = images.zip(classes).enumerate().map(label).collect();
    labels["annotations"] = all.into();
    world.write("web.json", labels.to_string());
    world
}

/// A column of the curve of the training on images of the web, by step; none where a cell is empty.
fn curve(world: &World, column: &str) -> Vec<(u64, Option<f64>)> {
    let all = world.units().into_iter().filter(|(name, _)| name.contains("detector-train") && name.ends_with("curve.csv"));
    let all = all.map(|(_, text)| String::from_utf8(text).unwrap()).filter(|text| text.contains("loss.classes_web"));
    let text = all.max_by_key(String::len).unwrap();
    let place = text.lines().next().unwrap().split(',').position(|name| name == column).unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        (cells[0].parse().unwrap(), cells[place].parse().ok())
    };
    text.lines().skip(1).map(row).collect()
}

#[test]
fn a_detector_learns_from_images_of_the_web_from_an_epoch_on() {
    let world = small();
    let run = world.run(["run", "./small.yaml"]).success();
    assert!(!run.stderr.contains("Warning"), "{}", run.stderr);
    assert!(run.stderr.contains("and 4 batches of 7 images of the web, of 4 classes"), "{}", run.stderr);
    assert!(run.stderr.contains("no image of the web of 17 of 20 novel classes: "), "{}", run.stderr);

    // Base training keeps a checkpoint for each epoch; the other goes on after the first of them.
    let selections = world.units().into_iter().filter(|(name, _)| name.contains("detector-select") && name.ends_with("curve.csv"));
    let whole = selections.map(|(_, text)| String::from_utf8(text).unwrap()).max_by_key(String::len).unwrap();
    let base_steps: Vec<u64> = whole.lines().skip(1).map(|line| line.split(',').next().unwrap().parse().unwrap()).collect();
    let epoch = base_steps[0];
    assert_eq!(base_steps, [epoch, 2 * epoch, 3 * epoch]);
    assert!(run.stderr.contains("goes on from ") && run.stderr.contains(&format!(", after {epoch} steps")), "{}", run.stderr);
    // Two epochs with images of the web, and the rate of the base training with its decay after the second.
    let rates = curve(&world, "lr");
    let (last, end) = (rates.last().unwrap(), epoch + 2 * (epoch + 4));
    assert!(last.0 == end && rates.iter().all(|(step, _)| *step > epoch), "{rates:?}");
    for (step, lr) in &rates {
        let expected = if *step > epoch + epoch + 4 { 0.001 } else { 0.01 };
        assert!((lr.unwrap() - expected).abs() < 1e-9, "{rates:?}");
    }
    for column in
        ["loss.classes", "loss.masks", "loss.rpn_boxes", "loss.classes_web", "loss.rpn_objectness_web", "loss.boxes_web", "without_box_web"]
    {
        assert!(curve(&world, column).iter().any(|(_, value)| value.is_some_and(f64::is_finite)), "{column}");
    }
    // A detector that went out and came back finds the same, and selects nothing new: boxes, and masks.
    assert_eq!(world.units_of("eval/coco").len(), 2);
    let exported = Checkpoint::open(&world.find(&["detector-export", ".pth"])).unwrap();
    for name in
        ["bbox_head.shared_fcs.1.weight", "bbox_head.fc_cls.weight", "bbox_head.scale", "bbox_head.bias", "mask_head.upsample.weight"]
    {
        assert!(exported.names().any(|found| found.ends_with(&format!("roi_head.{name}"))), "{name}");
    }
    world.run(["verify", "--deep"]).success();

    let dry = world.run(["run", "./small.yaml", "--dry-run", "3"]).success();
    assert!(dry.steps("done").contains(&"detector".to_owned()), "{}", dry.stderr);
}

/// A run that is killed at any moment ends with the bytes of one that was not.
#[test]
fn self_training_continues_after_kills_to_the_same_bytes() {
    let (whole, killed) = (small(), small());
    whole.run(["run", "./small.yaml", "--until", "detector"]).success();
    // Three checkpoints are the base training's.
    for n_before in [1, 4, 5] {
        let mut running = killed.command(["run", "./small.yaml", "--until", "detector"]).spawn().unwrap();
        until(|| killed.units_of("detector/train").len() >= n_before);
        running.kill().unwrap();
        running.wait().unwrap();
    }
    // Nor do threads matter.
    killed.write("small.yaml", SMALL.replace("  - id: test\n", "    resources: {cpu: 3}\n  - id: test\n"));
    killed.run(["run", "./small.yaml", "--until", "detector"]).success();
    assert!(killed.units() == whole.units());
}

#[test]
fn what_self_training_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "base"]).success();
    let refused = |from: &str, to: &str, expected: &str| world.refuses(SMALL, from, to, expected);
    refused("      web_images: world.images\n", "", "web_images: missing, but `web` is given");
    refused("      web: ./web.json\n", "", "web: missing, but `web_images` is given");
    refused("      web_images: world.images\n      web: ./web.json\n", "", "none are given, but the parameter `web` is set");
    refused("      start_state: base.state\n", "", "start_state: missing, but `start` is given");
    refused("      start_epoch: 1\n", "", "start_epoch: missing, but `start` is given");
    refused("      start: base.detector\n      start_state: base.state\n", "", "start: missing, but `start_epoch` is set");
    refused("      start_epoch: 1\n", "      start_epoch: 3\n", "expected at least 1 and less than `training.epochs`");
    refused(
        "checkpoint_epochs: 1, keep_checkpoints: 3",
        "checkpoint_epochs: 2, keep_checkpoints: 2",
        "no checkpoint after 1 epochs, which are ",
    );
    refused(
        "      start_epoch: 1\n",
        "      start_epoch: 1\n      trainable_backbone_layers: 2\n",
        "expected a detector of the same `network`, `head` and inputs",
    );
    let of_self_training = "      masks: true\n      start_epoch: 1\n";
    refused(of_self_training, "      masks: false\n      start_epoch: 1\n", "expected a detector of the same `network`, `head` and inputs");
    refused(
        "      head: cosine\n      masks: true\n      start_epoch: 1\n      web: {min_size: [[40, 60], [60, 90]], max_size: 128, batch_size: 2}\n",
        "      start_epoch: 1\n",
        "web_images: given, but images of the web teach only a detector with `head: cosine`",
    );
    refused(
        "      head: cosine\n      masks: true\n      start_epoch: 1\n",
        "      start_epoch: 1\n",
        "web: expected none without `head: cosine`",
    );
    refused("min_size: [[40, 60], [60, 90]]", "min_size: [[60, 40], [60, 90]]", "web.min_size: expected two ranges");
    refused("batch_size: 2}", "batch_size: 0}", "web.batch_size: expected at least 1");
    refused("prompts: prompts.prompts}\n    with:\n      network: toy", "features: ./few.txt}\n    with:\n      network: toy", "features");
    refused(
        ", prompts: prompts.prompts}\n    with:\n      network: toy",
        "}\n    with:\n      network: toy",
        "prompts: missing: a detector with `head: cosine`",
    );
    refused(
        "      masks: true\n      training",
        "      masks: true\n      test_temperature: 0.02\n      training",
        "none with `head: cosine`, which learns the scale",
    );
    refused("{epochs: 3, lr_epochs: [2], checkpoint_every: 2,", "{steps: 30, checkpoint_every: 2,", "less than `training.epochs`");

    // Labels of a class that nobody looks for, and none at all.
    let labels: Value = serde_json::from_slice(&fs::read(world.path("web.json")).unwrap()).unwrap();
    let mut other = labels.clone();
    other["categories"].as_array_mut().unwrap().push(json!({"id": 999, "name": "owl"}));
    other["annotations"][0]["category_id"] = 999.into();
    world.write("owl.json", other.to_string());
    refused("./web.json", "./owl.json", "annotation 1 is a label `owl`, which is none of 60 classes");
    let mut none = labels;
    none["annotations"] = json!([]);
    world.write("none.json", none.to_string());
    refused("./web.json", "./none.json", "web: expected at least one label, found none");

    // Stages of other detectors.
    let add = |stage: &str, expected: &str| refused("  - id: test\n", &format!("{stage}  - id: test\n"), expected);
    add(
        "  - {id: embedded, use: detector/embed, in: {images: world.images, annotations: world.val, proposals: boxes.proposals, detector: base.detector}}
  - {id: boxes, use: proposals/import, in: {proposals: world.val_proposals, annotations: world.val}}\n",
        "found one of scaled cosines to class embeddings (`head: cosine`)",
    );
    for (from, to, expected) in [
        ("max_per_image: 50}", "max_per_image: 50, fusion: {alpha: 0.5}}", "fusion: given, but the detector has one head alone"),
        ("max_per_image: 50}", "max_per_image: 50, ensemble: {objectness: 0.5}}", "ensemble: given, but the detector has one head alone"),
        (
            "prompts: prompts.prompts, detector: detector.detector",
            "detector: detector.detector",
            "prompts: missing: a detector with `head: cosine`",
        ),
        (
            "prompts: prompts.prompts, detector: detector.detector",
            "prompts: prompts.prompts, multilabel_prompts: prompts.prompts, detector: detector.detector",
            "multilabel_prompts: given, but the detector has one head alone",
        ),
        (
            "in: {detector: detector.detector}}\n",
            "in: {detector: detector.detector}, with: {names: detpro}}\n",
            "export it with `names: oadp`",
        ),
    ] {
        refused(from, to, expected);
    }
}
