//! CLIP checkpoints that do not say how they were trained, and two of them in one pipeline: no number is silently wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use ovenbird_cache::inputs;
use ovenbird_data::annotations::ImageId;
use ovenbird_models::{
    checkpoint::{Checkpoint, Saved, write_torch},
    clip::layout,
};
use ovenbird_stages::{
    Artifact, STAGES,
    artifacts::{CheckpointFile, Concepts, ImageFeatures, Negatives, PromptSamples, Prompts, RegionFeatures},
};
use tch::Tensor;

use crate::support::World;

/// A small vision transformer as `clip/pretrain` writes it.
const TRAINED: &str = r#"version: 1
name: trained
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 4, val_images: 4, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8, architecture: vit}
"#;

/// A world with a trained CLIP, and its weights as a state dict of `torch.save`, without the scalars: `bare/clip.pt`.
fn trained() -> (World, BTreeMap<String, Tensor>) {
    let world = World::new();
    world.write("trained.yaml", TRAINED);
    world.run(["run", "./trained.yaml"]).success();
    let weights = Checkpoint::open(&world.find(&["clip-pretrain", "clip.safetensors"])).unwrap();
    let weights = layout::normalise(weights.tensors(), weights.path()).unwrap().tensors;
    world.write("bare/clip.pt", state_dict(&weights));
    (world, weights)
}

fn state_dict(weights: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let entries = weights.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor)));
    let mut bytes = Vec::new();
    write_torch(&Saved::Dict(entries.collect()), &mut bytes).unwrap();
    bytes
}

/// Runs `clip/globals` with some checkpoint; its embeddings, or what it was refused with.
fn globals(world: &World, checkpoint: &str, gelu: &str) -> Result<Vec<(ImageId, Vec<f32>)>, String> {
    let step = format!(
        "  - id: globals
    use: clip/globals
    in: {{images: world.images, annotations: world.val, checkpoint: {checkpoint}}}
    with: {{resize: square, clip: {{precision: f32{gelu}}}}}
"
    );
    world.write("globals.yaml", format!("{TRAINED}{step}"));
    let run = world.run(["run", "./globals.yaml"]);
    if run.code != 0 {
        assert_eq!(run.code, 4, "{}", run.stderr);
        return Err(run.stderr);
    }
    world.run(["export", "./globals.yaml", "globals", "exported"]).success();
    let files = inputs::digest_path(&world.path("exported"), None, 0).unwrap();
    let files: Vec<_> = files.into_iter().filter(|file| file.name.ends_with(".arrow")).collect();
    let rows = ImageFeatures::open(&files).unwrap().rows().map(Result::unwrap).collect();
    fs::remove_dir_all(world.path("exported")).unwrap();
    Ok(rows)
}

#[test]
fn the_same_weights_in_another_file_are_the_same_embeddings_or_are_refused() {
    let (world, _) = trained();
    let original = globals(&world, "clip.checkpoint", "").unwrap();
    assert_eq!(original.len(), 4);

    let silent = globals(&world, "./bare/clip.pt", "").unwrap_err();
    for words in ["clip.pt: the file cannot tell which GELU the weights were trained with (open_clip's layout)", "{clip: {gelu: quick}}"] {
        assert!(silent.contains(words), "expected `{words}` in\n{silent}");
    }
    assert_eq!(globals(&world, "./bare/clip.pt", ", gelu: quick").unwrap(), original);
    let exact = globals(&world, "./bare/clip.pt", ", gelu: exact").unwrap();
    assert!(exact != original, "the activation matters");
    let contradicted = globals(&world, "clip.checkpoint", ", gelu: exact").unwrap_err();
    assert!(contradicted.contains("`gelu: exact` is given, but OpenAI's layout says QuickGELU"), "{contradicted}");

    // A config file counts in a folder, where it is hashed with the weights.
    world.write("bare/open_clip_config.json", r#"{"model_cfg": {"embed_dim": 128, "quick_gelu": true}}"#);
    assert_eq!(globals(&world, "./bare", "").unwrap(), original);
    world.write("bare/open_clip_config.json", r#"{"model_cfg": {"embed_dim": 128}}"#);
    assert_eq!(globals(&world, "./bare", "").unwrap(), exact);
    let beside = globals(&world, "./bare/clip.pt", "").unwrap_err();
    assert!(beside.contains("or name the folder instead of the file, so that open_clip_config.json is read"), "{beside}");
    world.write("bare/config.json", r#"{"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}}"#);
    let towers = globals(&world, "./bare", "").unwrap_err();
    assert!(towers.contains("config.json: expected one activation for both towers, found exact GELU in `vision_config`"), "{towers}");
    world.write("bare/config.json", "{");
    assert!(globals(&world, "./bare", "").unwrap_err().contains("config.json: EOF while parsing"));
    world.write("bare/more.pt", "weights");
    let two = globals(&world, "./bare", "").unwrap_err();
    assert!(two.contains("expected one file of weights (.pt, .pth, .safetensors, .bin) in the folder, found clip.pt, more.pt"), "{two}");
}

#[test]
fn the_doctor_says_where_the_activation_comes_from_and_fails_with_broken_weights() {
    let (world, mut weights) = trained();
    let said = world.run(["doctor", "--clip", "bare/clip.pt"]).success();
    assert!(said.stdout.contains("the file cannot tell: a pipeline has to say `with: {clip: {gelu: quick}}`"), "{}", said.stdout);
    world.write("bare/config.json", r#"{"model_type": "clip", "hidden_act": "gelu"}"#);
    let said = world.run(["doctor", "--clip", "bare"]).success();
    assert!(said.stdout.contains("exact GELU: `config.json`") && said.stdout.contains("every number is finite"), "{}", said.stdout);

    let sound = weights["visual.proj"].copy();
    for (broken, problem) in [(f64::NAN, "NaN or infinity in visual.proj"), (0.0, "image, bf16 image embeddings are zero or not finite")] {
        let first = Tensor::arange(sound.numel() as i64, (tch::Kind::Int64, tch::Device::Cpu)).view_as(&sound).eq(0);
        // One NaN, or zeros everywhere.
        let bad = if broken.is_nan() { sound.masked_fill(&first, broken) } else { sound.zeros_like() };
        weights.insert("visual.proj".into(), bad);
        world.write("broken/clip.pt", state_dict(&weights));
        let output = world.run(["doctor", "--clip", "broken/clip.pt"]);
        assert_eq!(output.code, 4, "{}{}", output.stdout, output.stderr);
        assert!(output.stdout.contains(&format!("FAILED: {problem}")), "{}", output.stdout);
        assert!(broken.is_nan() || output.stdout.contains("cosine at least NaN to f32"), "{}", output.stdout);
        assert!(output.stderr.contains(&format!("broken/clip.pt: the self-test failed: {problem}\n")), "{}", output.stderr);
    }
}

/// Two CLIPs with embeddings of one width, and what the first of them made.
const TWO: &str = r#"version: 1
name: two
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 10, val_images: 4, web_images: 40, held_out_images: 60, side_px: 160}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: other
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 8, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: train.classes}
  - id: others
    use: prompts/ensemble
    in: {checkpoint: other.checkpoint, classes: train.classes}
  - id: proposals
    use: proposals/import
    in: {proposals: world.train_proposals, annotations: world.train}
  - {id: whole, use: clip/globals, in: {images: world.images, annotations: world.train, checkpoint: clip.checkpoint}, with: {clip: {precision: f32}}}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: world.train, proposals: proposals.proposals, checkpoint: clip.checkpoint}
  - id: other-regions
    use: clip/proposals
    in: {images: world.images, annotations: world.train, proposals: proposals.proposals, checkpoint: other.checkpoint}
  - {id: words, use: toy/vocabulary}
  - {id: vocabulary, use: vocabulary/import, in: {file: words.vocabulary, classes: train.classes}}
  - {id: concepts, use: concepts/build, in: {checkpoint: other.checkpoint, phrases: words.phrases}}
  - id: augmenter
    use: augmenter/train
    in: {checkpoint: other.checkpoint, classes: train.classes, vocabulary: vocabulary.vocabulary, concepts: concepts.concepts, features: other-regions.features}
    with: {n_concepts: 10, min_objectness: 0.0, epochs: 1, batch_size: 4}
  - {id: truth, use: proposals/truth, in: {annotations: train.annotations}}
  - id: truth-regions
    use: clip/proposals
    in: {images: world.images, annotations: train.annotations, proposals: truth.proposals, checkpoint: clip.checkpoint}
    with: {min_side: 0.0}
  - {id: samples, use: prompts/detpro-data, in: {truth: truth-regions.features, annotations: train.annotations, classes: train.classes}}
  - id: blocks
    use: clip/blocks
    in: {images: world.images, annotations: train.annotations, checkpoint: clip.checkpoint}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts}
    with:
      network: toy
      training: {steps: 1, checkpoint_every: 1, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}
  - id: localizer
    use: localizer/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, checkpoint: clip.checkpoint, prompts: prompts.prompts}
    with:
      size: toy
      cuts: {probability: 0.0}
      training: {steps: 1, checkpoint_every: 1, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}
"#;

/// Every stage that reads what two CLIPs may have made, with inputs of both: its id, its kind, the two ports, and what it reads besides.
const MIXED: [(&str, &str, [&str; 2], &str); 22] = [
    (
        "labelled",
        "annotations/pseudo-labels",
        ["features", "prompts"],
        "in: {features: regions.features, prompts: others.prompts, classes: train.classes, annotations: world.train}
    with: {temperature: 0.4}",
    ),
    (
        "zero-shot",
        "detect/zero-shot",
        ["features", "prompts"],
        "in: {features: regions.features, prompts: others.prompts, classes: train.classes, annotations: world.train}",
    ),
    (
        "boxes",
        "retrieve/boxes",
        ["features", "prompts"],
        "in: {features: regions.features, prompts: others.prompts, classes: train.classes, annotations: world.train}",
    ),
    (
        "pooled",
        "pool/retrieve",
        ["features", "prompts"],
        "in: {features: whole.features, annotations: world.train, prompts: others.prompts, classes: train.classes}",
    ),
    (
        "selected",
        "detector/select",
        ["checkpoints", "prompts"],
        "in: {images: world.images, annotations: world.val, classes: train.classes, prompts: others.prompts, checkpoints: detector.detector}",
    ),
    (
        "tested",
        "detector/test",
        ["detector", "prompts"],
        "in: {images: world.images, annotations: world.val, classes: train.classes, prompts: others.prompts, detector: detector.detector}",
    ),
    (
        "corrected",
        "detector/test",
        ["prompts", "augmented"],
        "in: {images: world.images, annotations: world.train, classes: train.classes, prompts: prompts.prompts, augmented: other-regions.features, \
         detector: detector.detector}",
    ),
    (
        "taught",
        "detector/train",
        ["prompts", "features"],
        "in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: others.prompts, features: regions.features}
    with: {network: toy, training: {steps: 1, checkpoint_every: 1, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}}",
    ),
    (
        "learned",
        "prompts/multilabel",
        ["checkpoint", "features"],
        "in: {checkpoint: other.checkpoint, classes: train.classes, features: blocks.features, annotations: train.annotations}
    with: {epochs: 1, batch_size: 4}",
    ),
    (
        "rows",
        "prompts/detpro-data",
        ["features", "truth"],
        "in: {features: regions.features, truth: other-regions.features, annotations: train.annotations, classes: train.classes}",
    ),
    (
        "described",
        "prompts/embed",
        ["checkpoint", "prompts"],
        "in: {checkpoint: other.checkpoint, prompts: prompts.prompts, classes: train.classes, descriptions: words.descriptions}",
    ),
    ("joined", "prompts/mean", ["prompts", "prompts_2"], "in: {prompts: prompts.prompts, prompts_2: others.prompts}"),
    (
        "augmented",
        "augmenter/train",
        ["checkpoint", "features"],
        "in: {checkpoint: other.checkpoint, classes: train.classes, vocabulary: vocabulary.vocabulary, concepts: concepts.concepts, \
         features: regions.features}
    with: {n_concepts: 10, min_objectness: 0.0, epochs: 1, batch_size: 4}",
    ),
    (
        "shown",
        "augmenter/apply",
        ["augmenter", "features"],
        "in: {augmenter: augmenter.augmenter, concepts: concepts.concepts, features: regions.features}",
    ),
    (
        "near",
        "prompts/detpro",
        ["checkpoint", "samples"],
        "in: {checkpoint: other.checkpoint, classes: train.classes, samples: samples.samples}
    with: {iou: [0.5, 1.1], epochs: 1, batch_size: 4}",
    ),
    (
        "named",
        "eval/regions",
        ["samples", "prompts"],
        "in: {samples: samples.samples, prompts: others.prompts, classes: train.classes}",
    ),
    (
        "relabelled",
        "annotations/relabel",
        ["features", "prompts"],
        "in: {annotations: train.annotations, classes: train.classes, features: truth-regions.features, prompts: others.prompts}",
    ),
    (
        "region-prompt",
        "region/prompt",
        ["checkpoint", "prompts"],
        "in: {images: world.images, annotations: train.annotations, classes: train.classes, checkpoint: clip.checkpoint, prompts: others.prompts}
    with: {training: {steps: 1, checkpoint_every: 1}}",
    ),
    (
        "anchors",
        "eval/anchors",
        ["checkpoint", "prompts"],
        "in: {images: world.images, annotations: train.annotations, classes: train.classes, checkpoint: clip.checkpoint, prompts: others.prompts}",
    ),
    (
        "other-localizer",
        "localizer/train",
        ["checkpoint", "prompts"],
        "in: {images: world.images, annotations: train.annotations, classes: train.classes, checkpoint: clip.checkpoint, prompts: others.prompts}
    with: {size: toy, training: {steps: 1, checkpoint_every: 1}}",
    ),
    (
        "localized",
        "localizer/test",
        ["localizer", "prompts"],
        "in: {images: world.images, annotations: world.val, classes: train.classes, localizer: localizer.localizer, checkpoint: clip.checkpoint, prompts: others.prompts}",
    ),
    (
        "localizer-out",
        "localizer/export",
        ["localizer", "checkpoint"],
        "in: {localizer: localizer.localizer, checkpoint: other.checkpoint}",
    ),
];

fn step(id: &str, kind: &str, rest: &str) -> String {
    format!("  - id: {id}\n    use: {kind}\n    {rest}\n")
}

#[test]
fn every_stage_that_could_mix_two_clips_refuses_to() {
    // A new stage whose inputs are of CLIPs has to be in the list.
    let of_clips = [
        CheckpointFile::KIND,
        Prompts::KIND,
        PromptSamples::KIND,
        ImageFeatures::KIND,
        RegionFeatures::KIND,
        Negatives::KIND,
        Concepts::KIND,
        "augmenter",
        "detector",
    ];
    let reads_two = |inputs: &[ovenbird_stages::PortInfo]| inputs.iter().filter(|port| of_clips.contains(&port.kind)).count() > 1;
    let expected: BTreeSet<&str> = STAGES.iter().filter(|stage| reads_two(stage.inputs)).map(|stage| stage.kind).collect();
    assert_eq!(MIXED.iter().map(|(_, kind, ..)| *kind).collect::<BTreeSet<_>>(), expected);

    let world = World::new();
    let mixed: String = MIXED.iter().map(|(id, kind, _, rest)| step(id, kind, rest)).collect();
    world.write("two.yaml", format!("{TWO}{mixed}"));
    let run = world.run(["run", "./two.yaml"]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    let mut ids: Vec<&str> = MIXED.iter().map(|(id, ..)| *id).collect();
    ids.sort_unstable();
    assert_eq!(run.steps("failed"), ids, "{}", run.stderr);
    for (id, _, [one, other], _) in MIXED {
        let words = format!("{other}: `{one}` has embeddings of the CLIP ");
        assert!(run.stderr.lines().any(|line| line.contains(&words)), "{id}: expected `{words}` in\n{}", run.stderr);
    }
    assert!(run.stderr.contains("make both with the same checkpoint"), "{}", run.stderr);
    assert!(world.units_of("detect/zero-shot").is_empty());
}

#[test]
fn one_clip_in_two_files_and_what_does_not_say_its_clip_go_together() {
    let world = World::new();
    world.write("two.yaml", TWO);
    world.run(["run", "./two.yaml", "--until", "clip"]).success();
    let made = world.find(&["clip-pretrain", "clip.safetensors"]);
    let weights = layout::normalise(Checkpoint::open(&made).unwrap().tensors(), &made).unwrap().tensors;
    world.write("clip.pt", state_dict(&weights));
    let detect = |id: &str, prompts: &str| {
        let inputs = format!("in: {{features: regions.features, prompts: {prompts}, classes: train.classes, annotations: world.train}}");
        step(id, "detect/zero-shot", &inputs)
    };
    let steps = [
        step("again", "prompts/ensemble", "in: {checkpoint: ./clip.pt, classes: train.classes}\n    with: {clip: {gelu: quick}}"),
        step("exported", "prompts/export", "in: {prompts: others.prompts}"),
        step("imported", "prompts/import", "in: {file: exported.file}"),
        detect("same", "again.prompts"),
        detect("unknown", "imported.prompts"),
    ];
    let text: String = steps.into_iter().collect();
    world.write("two.yaml", format!("{TWO}{text}"));
    let run = world.run(["run", "./two.yaml"]).success();
    assert!(["same", "unknown"].iter().all(|id| run.steps("done").contains(&(*id).to_owned())), "{}", run.stderr);
    let of = |id: &str, name: &str| {
        world.run(["export", "./two.yaml", id, id]).success();
        let files = inputs::digest_path(&world.path(id), None, 0).unwrap();
        files.into_iter().filter(|file| file.name.ends_with(name)).collect::<Vec<_>>()
    };
    let clip = RegionFeatures::open(&of("regions", ".arrow")).unwrap().clip().unwrap();
    assert!(clip.is_some());
    assert_eq!(Prompts::open(&of("again", ".safetensors")).unwrap().clip, clip);
    assert_ne!(Prompts::open(&of("others", ".safetensors")).unwrap().clip, clip);
    assert_eq!(Prompts::open(&of("imported", ".safetensors")).unwrap().clip, None);
}
