//! DetPro and RALF as an operator runs them: crops by DetPro's rule, rows by IoU, learned prompts, their mean, and a detector with them that
//! goes out and comes in; scores that augmented embeddings correct.

use std::fs;

use serde_json::Value;

use crate::support::World;

/// The steps of the method at their smallest.
const SMALL: &str = r#"version: 1
name: small
variables: {rule: detpro}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 16, val_images: 8, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - {id: proposals, use: proposals/import, in: {proposals: world.train_proposals, annotations: world.train}}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: train.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {rule: "${rule}", min_side: 0.0, clip: {precision: f32}}
  - {id: truth, use: proposals/truth, in: {annotations: train.annotations, classes: train.classes}}
  - id: truth-regions
    use: clip/proposals
    in: {images: world.images, annotations: train.annotations, proposals: truth.proposals, checkpoint: clip.checkpoint}
    with: {rule: "${rule}", min_side: 0.0, clip: {precision: f32}}
  - id: samples
    use: prompts/detpro-data
    in: {features: regions.features, truth: truth-regions.features, annotations: train.annotations, classes: train.classes}
  - id: near
    use: prompts/detpro
    in: {checkpoint: clip.checkpoint, classes: train.classes, samples: samples.samples}
    with: {iou: [0.5, 0.9], epochs: 3, batch_size: 32, checkpoint_every: 2}
  - id: exact
    use: prompts/detpro
    in: {checkpoint: clip.checkpoint, classes: train.classes, samples: samples.samples}
    with: {iou: [0.9, 1.1], epochs: 3, batch_size: 32, checkpoint_every: 2}
  - {id: prompts, use: prompts/mean, in: {prompts: near.prompts, prompts_2: exact.prompts}}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts, features: regions.features}
    with:
      network: toy
      low_quality_iou: 0.5
      training: {steps: 4, checkpoint_every: 4, batch_size: 2, max_size: [128, 128], min_size: [96, 128], size_step: 32}
  - {id: out, use: detector/export, in: {detector: detector.detector}, with: {names: detpro}}
  - id: back
    use: detector/import
    in: {checkpoint: out.checkpoint}
    with: {network: toy, test_temperature: 0.007, multilabel_prompts: false, max_size: 128, min_size: 128}
  - id: test
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: detector.detector}
  - id: again
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: back.detector}
  - id: top-1
    use: eval/regions
    in: {samples: samples.samples, prompts: prompts.prompts, classes: train.classes}
"#;

fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world
}

/// From proposals to detections; a detector that went out under DetPro's names detects the same.
#[test]
fn prompts_are_learned_from_regions_and_a_detector_goes_out_and_comes_in() {
    let world = small();
    let run = world.run(["run", "./small.yaml"]).success();
    let accuracy: Value = serde_json::from_slice(&fs::read(world.find(&["eval-regions", "accuracy.json"])).unwrap()).unwrap();
    let n_regions = accuracy["truth"]["base"]["regions"].as_u64().unwrap();
    assert!(n_regions > 16 && accuracy["truth"]["novel"]["regions"] == 0, "{accuracy}");
    assert!(accuracy["truth"]["base"]["top1"].as_u64().unwrap() * 2 > n_regions, "{accuracy}");
    assert!(accuracy["background"].as_u64().unwrap() > 0, "{accuracy}");
    let units = world.units_of("detector-test").into_iter();
    let detections: Vec<Vec<u8>> = units.map(|unit| fs::read(unit.join("detections/detections.parquet")).unwrap()).collect();
    assert_eq!(detections.len(), 2, "{}", run.stderr);
    assert!(detections[0] == detections[1], "another detector came in than went out");
    world.run(["verify", "--deep"]).success();

    // Crops as the reference cuts them are others, and so is all that follows.
    let other = world.run(["run", "./small.yaml", "--set", "rule=detpro-reference", "--until", "near"]).success();
    assert_eq!(other.steps("done"), ["near", "regions", "samples", "truth-regions"], "{}", other.stderr);
}

/// A run that is killed at any moment ends with the bytes of one that was not.
#[test]
fn prompt_learning_continues_after_kills_to_the_same_bytes() {
    let whole = small();
    whole.run(["run", "./small.yaml", "--until", "prompts"]).success();
    let killed = small();
    killed.run_and_kill(&["run", "./small.yaml", "--until", "prompts"], &["clip-proposals", "prompts-detpro-data", "prompts-detpro"]);
    killed.run(["run", "./small.yaml", "--until", "prompts"]).success();
    for parts in [["prompts-detpro-data", "embeddings.arrow"], ["prompts-mean", "prompts.safetensors"]] {
        let [one, other] = [&whole, &killed].map(|world| fs::read(world.find(&parts)).unwrap());
        assert!(one == other, "{parts:?}");
    }
}

#[test]
fn what_prompt_learning_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "samples"]).success();
    let refused = |from: &str, to: &str, expected: &str| world.refuses(SMALL, from, to, expected);
    // Prompts of other classes cannot be averaged; a detector with heads that DetPro has no names for does not go out.
    refused("low_quality_iou: 0.5", "low_quality_iou: 1.5", "low_quality_iou: expected a number from 0 to 1");
    refused(
        "network: toy\n      low",
        "network: toy\n      trainable_backbone_layers: 6\n      low",
        "trainable_backbone_layers: expected from 0 to 5",
    );
    refused("iou: [0.5, 0.9]", "iou: [0.9, 0.5]", "iou");
    refused("truth: truth-regions.features", "truth: regions.features", "no embedding of the object ");
}

/// RALF's scores at their smallest, on a detector with hand-written sentences.
const AUGMENTED: &str = r#"version: 1
name: augmented
variables: {top_k: 2}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 12, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
    with: {architecture: vit}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - {id: proposals, use: proposals/import, in: {proposals: world.train_proposals, annotations: world.train}}
  - {id: words, use: toy/vocabulary}
  - {id: concepts, use: concepts/build, in: {checkpoint: clip.checkpoint, phrases: words.phrases}}
  - {id: pseudo-classes, use: vocabulary/import, in: {file: words.strict, classes: world.classes}}
  - id: objects
    use: clip/objects
    in: {images: world.images, annotations: train.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: augmenter
    use: augmenter/train
    in:
      checkpoint: clip.checkpoint
      classes: world.classes
      vocabulary: pseudo-classes.vocabulary
      concepts: concepts.concepts
      features: objects.features
    with: {n_concepts: 5, min_objectness: 0.0, min_side: 4.0, epochs: 2, batch_size: 4, checkpoint_every: 3}
  - {id: prompts, use: prompts/ensemble, in: {checkpoint: clip.checkpoint, classes: world.classes}}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts}
    with:
      network: toy
      train_temperature: 0.5
      test_temperature: 0.5
      training: {steps: 4, checkpoint_every: 4, batch_size: 2, max_size: [128, 128], min_size: [96, 128], size_step: 32}
  - id: seen
    use: proposals/rpn
    in: {images: world.images, annotations: world.val, detector: detector.detector}
    with: {max_per_image: 50}
  - id: shown
    use: clip/proposals
    in: {images: world.images, annotations: world.val, proposals: seen.proposals, checkpoint: clip.checkpoint}
    with: {rule: ralf, letterbox: {max_size: [128, 128]}, min_side: 0.0, clip: {precision: f32}}
  - {id: augmented, use: augmenter/apply, in: {augmenter: augmenter.augmenter, concepts: concepts.concepts, features: shown.features}}
  - id: own
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: detector.detector}
    with: {proposals: 50}
  - id: given
    use: detector/test
    in:
      images: world.images
      annotations: world.val
      classes: train.classes
      prompts: prompts.prompts
      detector: detector.detector
      proposals: seen.proposals
    with: {proposals: 50}
  - id: test
    use: detector/test
    in:
      images: world.images
      annotations: world.val
      classes: train.classes
      prompts: prompts.prompts
      detector: detector.detector
      augmented: augmented.features
    with: {proposals: 50, raf: {top_k: "${top_k}"}}
  - {id: truth, use: proposals/truth, in: {annotations: world.val}}
  - {id: embedded, use: detector/embed, in: {images: world.images, annotations: world.val, proposals: truth.proposals, detector: detector.detector}}
  - {id: rows, use: prompts/detpro-data, in: {truth: embedded.features, annotations: world.val, classes: train.classes}, with: {objects: all}}
  - {id: negatives, use: negatives/retrieve, in: {checkpoint: clip.checkpoint, classes: train.classes, vocabulary: pseudo-classes.vocabulary}, with: {drop: {fraction: 0.0}, top: 12, popularity_limit: 60, least: 1}}
  - {id: margin, use: eval/regions, in: {samples: rows.samples, prompts: prompts.prompts, classes: train.classes, negatives: negatives.negatives}}
  - {id: own-file, use: detections/export, in: {detections: own.detections, annotations: world.val}}
  - {id: given-file, use: detections/export, in: {detections: given.detections, annotations: world.val}}
  - {id: test-file, use: detections/export, in: {detections: test.detections, annotations: world.val}}
"#;

/// The scores that a step's detections have, with these options.
fn scores(world: &World, step: &str, options: &[&str]) -> Vec<f64> {
    let results = format!("{step}-file.results");
    world.run([&["export", "./augmented.yaml", &results, step], options].concat()).success();
    let found: Value = serde_json::from_slice(&fs::read(world.path(step).join("results.json")).unwrap()).unwrap();
    fs::remove_dir_all(world.path(step)).unwrap();
    found.as_array().unwrap().iter().map(|found| found["score"].as_f64().unwrap()).collect()
}

#[test]
fn augmented_embeddings_correct_the_scores_of_a_detector() {
    let world = World::new();
    world.write("augmented.yaml", AUGMENTED);
    world.run(["run", "./augmented.yaml"]).success();
    let [own, given, corrected] = ["own", "given", "test"].map(|step| scores(&world, step, &[]));
    // Proposals that go out and come in are the detector's own, to the rounding of f32 in px of the original image.
    assert!(!own.is_empty() && own.len() == given.len(), "{} {}", own.len(), given.len());
    assert!(own.iter().zip(&given).all(|(own, given)| *own > 1e-3 && (own / given - 1.0).abs() < 1e-3), "{own:?} {given:?}");
    // A gate that is closed leaves a quarter, one that is open sigmoid(1) - 0.25 at most.
    let [before, after] = [&given, &corrected].map(|scores| scores.iter().fold(0.0, |most: f64, score| most.max(*score)));
    assert!(after < 0.5 * before && after > 0.2 * before, "{before} {after}");
    // Every annotated box of the validation images is embedded by the box head and compared with the words of its class, once.
    world.run(["export", "./augmented.yaml", "margin", "margin"]).success();
    let accuracy: Value = serde_json::from_slice(&fs::read(world.path("margin/accuracy.json")).unwrap()).unwrap();
    let record: Value = serde_json::from_slice(&fs::read(world.find(&["proposals-truth", "unit.json"])).unwrap()).unwrap();
    let n_boxes = record["metrics"]["proposals"].as_u64().unwrap();
    for counted in [&accuracy["truth"], &accuracy["words"]] {
        let regions = ["base", "novel"].map(|group| counted[group]["regions"].as_u64().unwrap());
        assert!(regions[0] > 0 && regions[1] > 0 && regions[0] + regions[1] == n_boxes, "{n_boxes}: {accuracy}");
    }
    assert!(accuracy["proposals"].as_object().unwrap().is_empty() && accuracy["background"] == 0, "{accuracy}");
    world.run(["verify", "--deep"]).success();

    // Another top k is another test, and nothing else; other bars are other embeddings, but the augmenter stays.
    let other = world.run(["run", "./augmented.yaml", "--set", "top_k=1"]).success();
    assert_eq!(other.steps("done"), ["test", "test-file"], "{}", other.stderr);
    let changed = ["--set", "shown.letterbox.normalisation=clip"];
    let other = world.run([&["run", "./augmented.yaml"], &changed[..]].concat()).success();
    assert_eq!(other.steps("done"), ["augmented", "shown", "test", "test-file"], "{}", other.stderr);
    assert_ne!(scores(&world, "test", &changed), corrected);
}

#[test]
fn what_augmented_scores_cannot_use_is_said_in_words() {
    let world = World::new();
    world.write("augmented.yaml", AUGMENTED);
    world.run(["run", "./augmented.yaml"]).success();
    let refused = |from: &str, to: &str, expected: &str| world.refuses(AUGMENTED, from, to, expected);
    let augmented = "      augmented: augmented.features\n";
    refused(augmented, "", "augmented: none are given, but `raf` is set");
    refused("raf: {top_k", "raf: {fusion: softmax, threshold: scaled, top_k", "raf.threshold: expected `scaled` with `fusion: gate` alone");
    refused(
        augmented,
        "      augmented: augmented.features\n      proposals: seen.proposals\n",
        "augmented: given together with `proposals`",
    );
    refused("raf: {top_k", "raf: {fusion: sum, top_k", "raf.fusion: expected `sum` with `heads: box` alone");
    refused("raf: {top_k: \"${top_k}\"}", "raf: {top_k: 0}", "raf.top_k: expected at least 1");
    refused("rule: ralf, letterbox", "rule: vild, letterbox", "letterbox: expected none but with `rule: ralf`");
    refused("rule: ralf, letterbox", "rule: ralf, expand: [1.5], letterbox", "expand: expected none with `rule: ralf`");
    // Embeddings of the proposals of other images.
    refused(
        "annotations: world.val, proposals: seen",
        "annotations: world.train, proposals: proposals",
        "the augmented embeddings have no entry for this image",
    );
}
