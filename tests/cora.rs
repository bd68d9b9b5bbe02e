//! CORA as an operator runs it: a region prompt, CLIP's classes for objects, a localizer; and what is wrong with its inputs.

use std::{collections::BTreeMap, fs};

use serde_json::Value;

use crate::{
    predict::{exported, predicted},
    support::World,
};

/// The steps of the method at their smallest.
const SMALL: &str = r#"version: 1
name: small
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 12, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: toy/clip
    in: {held_out_images: world.held_out_images, held_out: world.held_out}
    with: {architecture: resnet}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: train.classes}
    with: {templates: bare-name, renormalise: true}
  - id: region-prompt
    use: region/prompt
    in: {images: world.images, annotations: train.annotations, classes: train.classes, checkpoint: clip.checkpoint, prompts: prompts.prompts}
    with:
      cuts: {min_size: [100, 120], window: [64, 96]}
      training: {epochs: null, steps: 6, lr_epochs: [], checkpoint_every: 2, batch_size: 4, lr: 0.01, max_size: [160, 160], min_size: [96, 128]}
  - {id: truth, use: proposals/truth, in: {annotations: train.annotations, classes: train.classes}}
  - id: regions
    use: region/embed
    in: {images: world.images, annotations: train.annotations, proposals: truth.proposals, checkpoint: clip.checkpoint, region_prompt: region-prompt.region_prompt}
    with: {max_size: 160, min_size: 160}
  - id: relabelled
    use: annotations/relabel
    in: {annotations: train.annotations, classes: train.classes, features: regions.features, prompts: prompts.prompts}
  - id: localizer
    use: localizer/train
    in: {images: world.images, annotations: relabelled.annotations, classes: train.classes, checkpoint: clip.checkpoint, region_prompt: region-prompt.region_prompt, prompts: prompts.prompts}
    with:
      size: toy
      split_share: 0.5
      cuts: {probability: 0.0}
      training: {epochs: null, steps: 8, checkpoint_every: 3, keep_checkpoints: 3, batch_size: 4, lr: 0.001, max_size: [128, 128], min_size: [128, 128], ema_decay: 0.5, averaging: fixed}
  - id: test
    use: localizer/test
    in: {images: world.images, annotations: world.val, classes: train.classes, localizer: localizer.localizer, checkpoint: clip.checkpoint, region_prompt: region-prompt.region_prompt, prompts: prompts.prompts}
    with: {background: fixed}
  - {id: coco, use: eval/coco, in: {annotations: world.val, detections: test.detections, classes: train.classes}}
  - id: select
    use: detector/select
    in: {images: world.images, annotations: world.val, classes: train.classes, checkpoints: localizer.localizer, checkpoint: clip.checkpoint, region_prompt: region-prompt.region_prompt, prompts: prompts.prompts}
    with: {group: all, localizer: {background: fixed}}
"#;

fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world
}

/// The category of each object of an annotation file.
fn classes(json: &[u8]) -> BTreeMap<u64, u64> {
    let file: Value = serde_json::from_slice(json).unwrap();
    let of = |object: &Value, key: &str| object[key].as_u64().unwrap();
    file["annotations"].as_array().unwrap().iter().map(|object| (of(object, "id"), of(object, "category_id"))).collect()
}

#[test]
fn cora_continues_after_kills_to_the_same_bytes() {
    let whole = small();
    whole.run(["run", "./small.yaml"]).success();
    let killed = small();
    killed.run_and_kill(
        &["run", "./small.yaml"],
        &["region/prompt", "region/embed", "annotations/relabel", "localizer/train", "localizer/test"],
    );
    killed.run(["run", "./small.yaml"]).success();
    let of_interest = |world: &World| -> BTreeMap<String, Vec<u8>> {
        let kinds = ["region-prompt", "region-embed", "annotations-relabel", "localizer-train", "localizer-test", "detector-select"];
        world.units().into_iter().filter(|(name, _)| kinds.iter().any(|kind| name.contains(kind)) && !name.ends_with("unit.json")).collect()
    };
    let (expected, found) = (of_interest(&whole), of_interest(&killed));
    assert!(expected.len() > 15 && expected.keys().eq(found.keys()));
    for (name, bytes) in expected {
        assert!(found[&name] == bytes, "{name}");
    }
    assert_eq!(killed.run(["run", "./small.yaml"]).success().steps("done"), Vec::<String>::new());
}

#[test]
fn objects_get_clip_s_classes_which_go_out_come_in_and_are_undone() {
    let world = small();
    let more =
        "  - {id: by-files, use: annotations/relabel, in: {annotations: train.annotations, classes: train.classes, labels: ./labels}}
  - {id: undone, use: annotations/relabel, in: {annotations: relabelled.annotations, classes: train.classes, changes: relabelled.changes}}
";
    world.run(["run", "./small.yaml", "--until", "relabelled"]).success();
    world.run(["export", "./small.yaml", "relabelled.labels", "labels"]).success();
    let report = world.run(["report", "-o", "page.html"]);
    let page = if report.code == 0 { fs::read_to_string(world.path("page.html")).unwrap() } else { panic!("{}", report.stderr) };
    assert!(page.contains("relabelled: classes by CLIP") && page.contains("objects keep their class"));
    let before = fs::read(world.find(&["annotations-split", "annotations.json"])).unwrap();
    let after = fs::read(world.find(&["annotations-relabel", "annotations.json"])).unwrap();
    let changes: BTreeMap<u64, (u64, u64, f64, f64)> =
        serde_json::from_slice(&fs::read(world.find(&["annotations-relabel", "changes.json"])).unwrap()).unwrap();
    let (old, new) = (classes(&before), classes(&after));
    assert!(!changes.is_empty() && old.keys().eq(new.keys()));
    for (id, class) in &old {
        match changes.get(id) {
            Some((was, is, p_was, p_is)) => assert!((was, is) == (class, &new[id]) && p_is > p_was),
            None => assert_eq!(new[id], *class),
        }
    }
    // What went out comes in as the same annotations, and what was changed is as it was before.
    world.write("small.yaml", format!("{SMALL}{more}"));
    world.run(["run", "./small.yaml", "--until", "by-files"]).success();
    world.run(["run", "./small.yaml", "--until", "undone"]).success();
    let written: Vec<Vec<u8>> = world
        .units()
        .into_iter()
        .filter(|(name, _)| name.contains("annotations-relabel") && name.ends_with("annotations/annotations.json"))
        .map(|(_, bytes)| bytes)
        .collect();
    assert_eq!((written.len(), written.iter().filter(|bytes| **bytes == after).count()), (3, 2));
    assert!(written.contains(&before));

    for (from, to, words) in [
        (
            "{id: undone, use: annotations/relabel, in: {annotations: relabelled.annotations",
            "{id: undone, use: annotations/relabel, in: {annotations: train.annotations",
            "expected an annotation",
        ),
        ("labels: ./labels}}", "labels: ./labels, changes: relabelled.changes}}", "expected one of three"),
    ] {
        world.refuses(&format!("{SMALL}{more}"), from, to, words);
    }
}

#[test]
fn what_cora_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "region-prompt"]).success();
    // A vision transformer has no layers to pool regions from.
    world.refuses(SMALL, "with: {architecture: resnet}", "with: {architecture: vit}", "a modified ResNet");
    // A region prompt of another grid.
    let table = tch::Tensor::ones([10, 512], (tch::Kind::Float, tch::Device::Cpu));
    tch::Tensor::write_safetensors(&[("attnpool.positional_embedding", table)], world.path("other.safetensors")).unwrap();
    world.refuses(SMALL, "region_prompt: region-prompt.region_prompt", "region_prompt: ./other.safetensors", "[5, 512]");
    // Names of novel classes are a secret.
    let novel: Value = serde_json::from_slice(&fs::read(world.find(&["annotations-split", "classes.json"])).unwrap()).unwrap();
    let novel = novel["novel"][0].as_str().unwrap();
    let with_extra = "features: regions.features, prompts: prompts.prompts}\n    with: {extra: [NAME]}".replace("NAME", novel);
    world.refuses(SMALL, "features: regions.features, prompts: prompts.prompts}", &with_extra, "names of novel classes");
    // Boxes of other annotations.
    world.refuses(
        SMALL,
        "use: proposals/truth, in: {annotations: train.annotations, classes: train.classes}",
        "use: proposals/truth, in: {annotations: world.train}",
        "other boxes",
    );
    // A detector of another kind, and a localizer where another detector is meant.
    world.refuses(
        SMALL,
        "  - {id: coco",
        "  - {id: other, use: detector/test, in: {images: world.images, annotations: world.val, classes: train.classes, detector: localizer.localizer}}\n  - {id: coco",
        "localizer/test",
    );
    // Options that would do nothing.
    world.refuses(SMALL, "localizer: {background: fixed}}", "test: {heads: box}}", "which heeds `localizer` instead");
    world.refuses(SMALL, "averaging: fixed}", "averaging: fixed, groups: {bone: {lr_mult: 0.1}}}", "no parameter has `bone` in its name");
}

#[test]
fn a_localizer_predicts_as_its_pipeline_detects() {
    let world = small();
    let results = "  - {id: results, use: detections/export, in: {detections: test.detections, annotations: world.val}}\n";
    world.write("small.yaml", format!("{SMALL}{results}"));
    world.run(["run", "./small.yaml", "--until", "results"]).success();
    world.run(["export", "./small.yaml", "world.images", "images"]).success();
    let run = world.run(["predict", "./small.yaml", "images/val", "--step", "test", "--min-score", "0", "--json"]).success();
    let expected = exported(&world, "results", "world.val");
    assert!(expected.len() == 6 && expected.values().all(|found| !found.is_empty()), "{expected:?}");
    assert_eq!(predicted(&run.stdout), expected);
}
