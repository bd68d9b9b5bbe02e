//! RPL as an operator runs it: windows about objects, contexts around names and descriptions, embeddings of any classes, and contexts that go out and come
//! in.

use std::fs;

use ovenbird_models::checkpoint::Checkpoint;

use crate::support::World;

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
    in: {checkpoint: clip.checkpoint, classes: train.classes, descriptions: words.descriptions, crops: crops.crops, annotations: train.annotations, val_crops: val-crops.crops}
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

#[test]
fn contexts_are_learned_from_windows_and_go_out_and_come_in() {
    let world = small();
    let run = world.run(["run", "./small.yaml"]).success();
    assert!(run.stderr.contains("on validation crops: base_top1 "), "{}", run.stderr);
    let file = |kind: &str| Checkpoint::open(&world.find(&[kind, "prompts.safetensors"])).unwrap();
    let learned = file("prompts-rpl");
    assert_eq!((learned.tensors()["embeddings"].size()[0], learned.tensors()["ctx1"].size()[0]), (60, 1));
    for kind in ["prompts-embed", "prompts-import"] {
        let found = file(kind);
        for name in ["embeddings", "ctx1", "ctx2"] {
            assert!(found.tensors()[name].equal(&learned.tensors()[name]), "{kind}: other `{name}`");
        }
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
    let [one, other] = [&whole, &killed].map(|world| fs::read(world.find(&["prompts-rpl", "prompts.safetensors"])).unwrap());
    assert!(one == other);
}

#[test]
fn what_regional_prompt_learning_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "val-crops"]).success();
    let refused = |from: &str, to: &str, expected: &str| {
        assert!(SMALL.contains(from), "the pipeline changed: {from}");
        world.write("wrong.yaml", SMALL.replace(from, to));
        let refused = world.run(["run", "./wrong.yaml"]);
        assert!([2, 3, 4].contains(&refused.code) && refused.stderr.contains(expected), "{expected}:\n{}", refused.stderr);
    };
    world.write("few.txt", "owl owl_which_is_a_bird\n");
    refused("descriptions: words.descriptions, crops", "descriptions: ./few.txt, crops", "no description of 60 of 60 classes, `");
    world.write("wrong.txt", "owl a bird\n");
    refused(
        "descriptions: words.descriptions, crops",
        "descriptions: ./wrong.txt, crops",
        "line 1: expected `NAME NAME_which_is_DESCRIPTION`",
    );
    refused("epochs: 3", "epochs: 3, warmup_epochs: 3", "warmup_epochs: expected fewer than `epochs`");
    refused("rule: rpl, expand: 3.0, min_side: 0.0, min_area: 20.0,", "rule: rpl, min_area: -1.0,", "min_area: expected 0 px^2 or more");
    refused("val_crops: val-crops.crops", "web: train.annotations", "web_images: missing, but `web` is given");
}
