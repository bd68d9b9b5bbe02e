//! Class embeddings: learned, killed and continued, carried out and in.

use std::{collections::BTreeMap, fs};

use ovenbird_cache::inputs;
use ovenbird_models::checkpoint::{Saved, write_torch};
use ovenbird_stages::{Artifact as _, artifacts::Prompts};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::support::{World, until};

/// Multi-label prompts of the toy world, in seconds.
const PIPELINE: &str = r#"version: 1
name: prompts
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 10, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {architecture: vit, seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: blocks
    use: clip/blocks
    in: {images: world.images, annotations: world.train, checkpoint: clip.checkpoint}
  - id: val-blocks
    use: clip/blocks
    in: {images: world.images, annotations: world.val, checkpoint: clip.checkpoint}
  - id: learned
    use: prompts/multilabel
    in:
      checkpoint: clip.checkpoint
      classes: world.classes
      features: blocks.features
      annotations: world.train
      val_features: val-blocks.features
      val_annotations: world.val
    with: {epochs: 12, batch_size: 4, checkpoint_every: 3}
  - id: exported
    use: prompts/export
    in: {prompts: learned.prompts}
  - id: imported
    use: prompts/import
    in: {file: exported.file}
"#;

fn world() -> World {
    let world = World::new();
    world.write("prompts.yaml", PIPELINE);
    world
}

/// The record of a unit of a stage.
fn record(world: &World, kind: &str) -> Value {
    let units = world.units();
    let record = units.iter().find(|(name, _)| name.contains(kind) && name.ends_with("unit.json"));
    serde_json::from_slice(record.unwrap().1).unwrap()
}

#[test]
fn learned_prompts_that_are_killed_end_with_the_same_bytes() {
    let (undisturbed, killed) = (world(), world());
    let run = undisturbed.run(["run", "./prompts.yaml"]).success();
    assert!(run.stderr.contains("mAP on validation images: base ") && run.stderr.contains(" %, novel "), "{}", run.stderr);
    // The last one and its spare.
    assert_eq!(undisturbed.units_of("prompts/multilabel").len(), 2);
    for n_links in [1, 2] {
        let mut running = killed.command(["run", "./prompts.yaml", "--until", "learned"]).spawn().unwrap();
        until(|| killed.units_of("prompts/multilabel").len() >= n_links);
        running.kill().unwrap();
        running.wait().unwrap();
    }
    killed.run(["run", "./prompts.yaml"]).success();
    assert!(killed.units() == undisturbed.units());
    killed.run(["verify", "--deep"]).success();
    let metrics = &record(&undisturbed, "prompts-multilabel")["metrics"];
    assert!(["loss.multilabel", "scaler", "bias", "base_map", "novel_map"].iter().all(|name| metrics[*name].is_f64()), "{metrics}");

    let dry = undisturbed.run(["run", "./prompts.yaml", "--dry-run", "2"]).success();
    assert!(dry.steps("done").contains(&"learned".to_owned()), "{}", dry.stderr);
}

#[test]
fn what_is_exported_and_imported_is_what_it_was() {
    let world = world();
    world.run(["run", "./prompts.yaml", "--set", "learned.epochs=1"]).success();
    let prompts = |kind: &str| {
        let path = world.find(&[kind, "prompts.safetensors"]);
        Prompts::open(&inputs::digest_path(&path, None, 0).unwrap()).unwrap()
    };
    let (imported, made) = (prompts("prompts-import"), prompts("prompts-multilabel"));
    assert!(imported.embeddings.equal(&made.embeddings));
    assert_eq!((&imported.names, imported.scale), (&made.names, made.scale));
    // A `.pth` of OADP does not say which CLIP it is of.
    assert!(made.clip.is_some() && imported.clip.is_none());
    let metrics = &record(&world, "prompts-import")["metrics"];
    for norm in ["min_norm", "mean_norm", "max_norm"] {
        assert!((metrics[norm].as_f64().unwrap() - 1.0).abs() < 1e-5, "{metrics}");
    }
}

/// Parity check R4 of OADP's specification, on the toy world's LVIS.
#[test]
fn rows_without_names_get_those_of_the_annotations() {
    let world = world();
    world.run(["run", "./prompts.yaml", "--until", "world"]).success();
    let annotations: Value = serde_json::from_slice(&fs::read(world.find(&["toy-world", "lvis_train", ".json"])).unwrap()).unwrap();
    world.write("lvis.json", annotations.to_string());
    let names: BTreeMap<u64, &str> = annotations["categories"]
        .as_array()
        .unwrap()
        .iter()
        .map(|category| (category["id"].as_u64().unwrap(), category["name"].as_str().unwrap()))
        .collect();
    let rows = Tensor::ones([names.len() as i64, 8], (Kind::Half, Device::Cpu));
    let mut file = Vec::new();
    write_torch(&Saved::Tensor(&rows), &mut file).unwrap();
    world.write("rows.pth", file);
    let pipeline = |annotations: &str| {
        format!(
            "version: 1
name: rows
stages:
  - id: split
    use: annotations/split
    in: {{annotations: ./lvis.json}}
    with: {{classes: lvis-frequency}}
  - id: imported
    use: prompts/import
    in: {{file: ./rows.pth{annotations}}}
"
        )
    };
    world.write("rows.yaml", pipeline(""));
    let unnamed = world.run(["run", "./rows.yaml", "--until", "imported"]);
    assert!(unnamed.code == 4 && unnamed.stderr.contains("annotations: missing, but "), "{}", unnamed.stderr);
    world.write("rows.yaml", pipeline(", annotations: split.annotations"));
    let split = world.run(["run", "./rows.yaml"]);
    assert!(split.code == 4 && split.stderr.contains("annotations: expected ids from 1 on"), "{}", split.stderr);
    world.write("rows.yaml", pipeline(", annotations: ./lvis.json"));
    world.run(["run", "./rows.yaml"]).success();
    let made = fs::read(world.find(&["prompts-import", "prompts.safetensors"])).unwrap();
    let names = serde_json::to_string(&names.into_values().collect::<Vec<_>>()).unwrap();
    let header = json!({"names": names}).to_string();
    assert!(String::from_utf8_lossy(&made).contains(&header[1..header.len() - 1]));
    let metrics = &record(&world, "prompts-import")["metrics"];
    assert!((metrics["mean_norm"].as_f64().unwrap() - 8.0_f64.sqrt()).abs() < 1e-5, "{metrics}");
}

#[test]
fn what_prompts_cannot_be_learned_from_is_said_in_words() {
    let world = world();
    world.run(["run", "./prompts.yaml", "--until", "val-blocks"]).success();
    let refused = |old: &str, new: &str| {
        world.write("bad.yaml", PIPELINE.replace(old, new));
        let run = world.run(["run", "./bad.yaml", "--until", "learned"]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        run.stderr
    };
    let others = refused("      features: blocks.features\n", "      features: val-blocks.features\n");
    assert!(
        others.contains("features: none for 10 of 10 images, image ") && others.contains("`clip/blocks` with the same `annotations`"),
        "{others}"
    );
    let half = refused("      val_annotations: world.val\n", "");
    assert!(half.contains("val_annotations: missing, but `val_features` is given"), "{half}");
    let exploded = refused("checkpoint_every: 3}", "checkpoint_every: 3, lr: 1.0e+30}");
    assert!(exploded.contains("lr: the loss is NaN at step "), "{exploded}");

    // A class whose name leaves no room for the context.
    let mut classes: Value = serde_json::from_slice(&fs::read(world.find(&["toy-world", "classes.json"])).unwrap()).unwrap();
    classes["novel"][3] = "very_".repeat(80).into();
    world.write("classes.json", classes.to_string());
    world.write(
        "bad.yaml",
        PIPELINE
            .replace("      val_features: val-blocks.features\n      val_annotations: world.val\n", "")
            .replace("classes: world.classes", "classes: ./classes.json"),
    );
    let long = world.run(["run", "./bad.yaml", "--until", "learned"]);
    assert!(
        long.code == 4 && long.stderr.contains("text: expected at most 73 tokens beside 4 of context, found 83 tokens in \"very very "),
        "{}",
        long.stderr
    );

    let never = PIPELINE.replace("epochs: 12, batch_size: 4, checkpoint_every: 3", "epochs: 0, batch_size: 0, loss_weight: -1.0");
    world.write("bad.yaml", never);
    let checked = world.run(["plan", "./bad.yaml"]);
    for problem in
        ["with.epochs: expected from 1 to 1000", "with.batch_size: expected at least 1", "with.loss_weight: expected a number above 0"]
    {
        assert!(checked.stderr.contains(problem), "{}", checked.stderr);
    }
}
