//! Detectors: trained, killed and continued, and asked what they see.

use std::{path::Path, process::Command};

use ovenbird_models::checkpoint::{Checkpoint, Saved, write_torch};
use tch::{Device, Kind, Tensor};

use crate::support::{
    World, python,
    toy_web::{self, ToyWeb},
    until,
};

/// A detector of almost nothing, in seconds.
const SMALL: &str = r#"version: 1
name: small
variables: {rate: 0.005}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 10, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: train
    use: annotations/split
    in: {annotations: world.train, classes: world.classes}
    with: {keep: base}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: train.classes}
  - id: proposals
    use: proposals/import
    in: {proposals: world.train_proposals, annotations: world.train}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: world.train, proposals: proposals.proposals, checkpoint: clip.checkpoint}
  - id: blocks
    use: clip/blocks
    in: {images: world.images, annotations: train.annotations, checkpoint: clip.checkpoint}
  - id: globals
    use: clip/globals
    in: {images: world.images, annotations: train.annotations, checkpoint: clip.checkpoint}
    with: {resize: square}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, prompts: prompts.prompts, features: regions.features, blocks: blocks.features, globals: globals.features}
    with:
      network: toy
      masks: true
      training:
        steps: 6
        checkpoint_every: 1
        keep_checkpoints: 2
        batch_size: 2
        accumulation_steps: 2
        optimizer: adamw
        lr: "${rate}"
        warmup_steps: 2
        lr_schedule: cosine
        groups: {roi_head: {lr_mult: 0.5}, bn: {decay_mult: 0.0}}
        clip_grad_norm: 5.0
        ema_decay: 0.5
        max_size: [96, 128]
        min_size: [96, 128]
        repeat_threshold: 0.2
  - id: test
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: detector.detector}
    with: {max_per_image: 20}
  - id: coco
    use: eval/coco
    in: {annotations: world.val, detections: test.detections, classes: train.classes}
  - id: exported
    use: detector/export
    in: {detector: detector.detector}
  - id: imported
    use: detector/import
    in: {checkpoint: exported.checkpoint}
    with: {network: toy, test_temperature: 0.007, multilabel_prompts: false, max_size: 128, min_size: 128}
  - id: test-again
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, detector: imported.detector}
    with: {max_per_image: 20}
  - id: coco-again
    use: eval/coco
    in: {annotations: world.val, detections: test-again.detections, classes: train.classes}
  - id: masks
    use: eval/coco
    in: {annotations: world.val, detections: test.detections, classes: train.classes}
    with: {iou_type: masks}
  - id: select
    use: detector/select
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, checkpoints: detector.detector}
    with: {group: all, test: {max_per_image: 20}}
  - id: oln
    use: oln/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes}
    with: {network: toy, training: {steps: 2, checkpoint_every: 1, batch_size: 2, max_size: [96, 128], min_size: [96, 128]}}
  - id: found
    use: proposals/oln
    in: {images: world.images, annotations: world.val, network: oln.network}
    with: {max_per_image: 10}
"#;

/// Reads an exported checkpoint and writes it with what the reference's hold besides.
const SAVED_AGAIN: &str = r#"
import collections, sys, torch
state = collections.OrderedDict(torch.load(sys.argv[1], weights_only=True)["state_dict"])
for name in [name for name in state if name.endswith("running_mean")]:
    state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(32000)
for head in ("roi_head._block_head", "_global_head"):
    state[head + "._loss._weight._steps"] = torch.tensor(1)
optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.02, "params": [0]}]}
torch.save({"meta": {"iter": 32000}, "state_dict": state, "optimizer": optimizer, "message_hub": {}}, sys.argv[2])
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
    // The two that are to stay, and the last one's spare; others are pruned.
    assert_eq!(undisturbed.units_of("detector/train").len(), 3);
    for n_links_before in [1, 2] {
        let mut running = killed.command(["run", "./small.yaml"]).spawn().unwrap();
        until(|| killed.units_of("detector/train").len() >= n_links_before);
        running.kill().unwrap();
        running.wait().unwrap();
    }
    // Nor do threads matter.
    killed
        .write("small.yaml", SMALL.replace("        repeat_threshold: 0.2\n", "        repeat_threshold: 0.2\n    resources: {cpu: 3}\n"));
    killed.run(["run", "./small.yaml"]).success();
    assert!(killed.units() == undisturbed.units());
    killed.run(["verify", "--deep"]).success();

    // The last link, damaged, is made again from the one before it.
    let units = killed.units();
    let curves = units.iter().filter(|(name, _)| name.contains("detector-train") && name.ends_with("curve.csv"));
    let (last, _) = curves.max_by_key(|(_, curve)| curve.len()).unwrap();
    let weights = killed.path(".ovenbird").join(last.replace("curve/curve.csv", "detector/network.safetensors"));
    std::fs::write(weights, "cut short").unwrap();
    let mended = killed.run(["run", "./small.yaml"]).success();
    assert_eq!(mended.steps("done"), ["detector"], "{}", mended.stderr);
    assert!(killed.units() == undisturbed.units());

    // Weights and losses moved, and detections lie in their images.
    let record = std::fs::read_to_string(undisturbed.find(&["detector-train", "unit.json"])).unwrap();
    for number in [
        "loss.rpn_objectness",
        "loss.rpn_boxes",
        "loss.classes",
        "loss.boxes",
        "loss.masks",
        "loss.objects",
        "loss.blocks",
        "loss.relations",
        "loss.block_labels",
        "loss.globals",
        "loss.global_labels",
        "recall.blocks",
        "recall.globals",
    ] {
        assert!(record.contains(&format!("\"{number}\"")), "{record}");
    }
    // Both checkpoints were tested; the last one's numbers are those of `detector/test` with the same rule.
    assert!(run.stderr.contains("all AP50: best at step ") && run.stderr.contains("; last, at step 6, "), "{}", run.stderr);
    let of = |parts: &[&str]| -> Vec<String> {
        let files = undisturbed.units().into_iter().filter(|(name, _)| parts.iter().all(|part| name.contains(part)));
        files.map(|(_, text)| String::from_utf8(text).unwrap()).collect()
    };
    let selection = of(&["detector-select", "curve.csv"]).into_iter().max_by_key(String::len).unwrap();
    assert_eq!(selection.lines().map(|line| line.split(',').next().unwrap()).collect::<Vec<_>>(), ["step", "3", "6"], "{selection}");
    let tested =
        of(&["eval-coco", "evaluation.json"]).into_iter().find(|evaluation| evaluation.contains("\"iou_type\":\"boxes\"")).unwrap();
    assert!(of(&["detector-select", "last", "evaluation.json"]).contains(&tested));

    // A detector that went out and came back finds the same: its evaluation is the one that is there.
    assert_eq!(undisturbed.units_of("eval/coco").len(), 2);
    // So it does by way of PyTorch, in a file like those that mmengine leaves.
    if let Some(python) = python("torch") {
        let (ours, theirs) = (undisturbed.find(&["detector-export", ".pth"]), undisturbed.path("theirs.pth"));
        let saved = Command::new(python).args(["-c", SAVED_AGAIN]).args([&ours, &theirs]).output().unwrap();
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        let imported = undisturbed.run(["run", "./small.yaml", "--set", "imported.in.checkpoint=./theirs.pth"]).success();
        assert_eq!(imported.steps("done"), ["imported"], "{}", imported.stderr);
        let behaviour = "the detector was trained as with `label_warmup: reference`: _global_head._loss._weight._steps is 1";
        assert!(imported.stderr.contains(behaviour), "{}", imported.stderr);
    }

    let one_more = undisturbed.run(["run", "./small.yaml", "--set", "test.heads=box"]).success();
    assert_eq!(one_more.steps("done"), ["coco", "masks", "test"], "{}", one_more.stderr);
    let dry = undisturbed.run(["run", "./small.yaml", "--dry-run", "3"]).success();
    assert!(dry.steps("done").contains(&"detector".to_owned()), "{}", dry.stderr);
}

/// Three images, learned by heart: parity check D12 of OADP's specification. One of them cannot be read.
#[test]
fn three_images_are_learned_by_heart_and_a_fourth_is_left_out() {
    let world = World::new();
    world.write("made.yaml", SMALL.replace("train_images: 10", "train_images: 4"));
    world.run(["run", "./made.yaml", "--until", "train"]).success();
    crate::support::copy(world.find(&["toy-world", "images/train"]).parent().unwrap(), &world.path("images/train"));
    for name in ["annotations", "classes"] {
        std::fs::copy(world.find(&["annotations-split", name]), world.path(&format!("{name}.json"))).unwrap();
    }
    let broken = std::fs::read_dir(world.path("images/train")).unwrap().flatten().map(|file| file.path()).max().unwrap();
    std::fs::write(&broken, "no picture").unwrap();
    let heart = r#"version: 1
name: heart
stages:
  - id: detector
    use: detector/train
    in: {images: ./images, annotations: ./annotations.json, classes: ./classes.json}
    with:
      network: toy
      train_temperature: 0.05
      training: {steps: 300, checkpoint_every: 300, batch_size: 1, optimizer: adamw, lr: 0.001, warmup_steps: 10, lr_schedule: cosine, max_size: [96, 96], min_size: [96, 96]}
    resources: {cpu: 2}
"#;
    world.write("heart.yaml", heart);
    let failed = world.run(["run", "./heart.yaml"]);
    assert!(failed.code == 4 && failed.stderr.contains(&broken.file_name().unwrap().to_string_lossy().into_owned()), "{}", failed.stderr);

    world.write("heart.yaml", format!("{heart}    on_bad_item: skip\n    max_failed_ratio: 0.3\n"));
    let run = world.run(["run", "./heart.yaml"]).success();
    assert_eq!(run.stderr.matches("skipped train/").count(), 1, "{}", run.stderr);
    let curve = std::fs::read_to_string(world.find(&["detector-train", "curve.csv"])).unwrap();
    let names: Vec<&str> = curve.lines().next().unwrap().split(',').collect();
    let loss = |row: &str| -> f64 {
        let cells = names.iter().zip(row.split(',')).filter(|(name, _)| name.starts_with("loss."));
        cells.map(|(_, cell)| cell.parse::<f64>().unwrap()).sum()
    };
    let losses: Vec<f64> = curve.lines().skip(1).map(loss).collect();
    assert_eq!(losses.len(), 30);
    assert!(losses[29] < 0.2 * losses[0], "{} to {}", losses[0], losses[29]);
    // The curve is in the log and in the report.
    assert_eq!(world.logs().matches("\"measured\"").count(), 30);
    let report = world.run(["report"]).success();
    let page = std::fs::read_to_string(
        world.path(&format!(".ovenbird/runs/{}/report.html", report.stdout.split("runs/").nth(1).unwrap().split('/').next().unwrap())),
    )
    .unwrap();
    assert!(page.contains("detector: training") && page.contains("loss.classes"), "no curves");
}

/// The pipelines of published systems, over files in the published layout: pictures and proposals of the toy world under COCO's names, a
/// small CLIP, and one tensor of a detector.
#[test]
fn published_pipelines_run_on_the_published_layout() {
    let world = World::new();
    world.write("made.yaml", SMALL.replace("with: {seed: 7, steps: 2,", "with: {architecture: vit, seed: 7, steps: 2,"));
    world.run(["run", "./made.yaml", "--until", "clip"]).success();
    let split = ovenbird_data::classes::ClassSplit::coco_48_17();
    for (part, coco) in [("train", "train2017"), ("val", "val2017")] {
        crate::support::copy(
            world.find(&["toy-world", &format!("images/{part}")]).parent().unwrap(),
            &world.path(&format!("coco/{coco}/{part}")),
        );
        let mut annotations: serde_json::Value =
            serde_json::from_slice(&std::fs::read(world.find(&["toy-world", &format!("/{part}/"), ".json"])).unwrap()).unwrap();
        for (category, name) in annotations["categories"].as_array_mut().unwrap().iter_mut().zip(split.all()) {
            category["name"] = name.as_str().into();
        }
        // Of a class that nothing shows.
        let missing = split.all().skip(60).enumerate().map(|(place, name)| serde_json::json!({"id": 100 + place, "name": name}));
        annotations["categories"].as_array_mut().unwrap().extend(missing);
        world.write(&format!("coco/annotations/instances_{coco}.json"), annotations.to_string());
        std::fs::create_dir_all(world.path("coco/proposals")).unwrap();
        let proposals = world.find(&["toy-world", &format!("{part}_proposals")]);
        for name in [format!("oln_r50_fpn_coco_{part}.pkl"), format!("{part}_coco_proposals.pkl")] {
            std::fs::copy(&proposals, world.path(&format!("coco/proposals/{name}"))).unwrap();
        }
    }
    // Nothing is wrong with either but that files are not there.
    for name in [
        "vild-ov-coco",
        "vild-ov-lvis",
        "oadp-ov-coco",
        "oadp-ov-lvis",
        "lp-ovod-ov-coco",
        "detpro-ov-lvis",
        "ralf-oadp-ov-coco",
        "ralf-ov-lvis",
        "promptdet-ov-lvis",
        "cora-ov-coco",
    ] {
        let contact = (name == "promptdet-ov-lvis").then_some(["--set", "contact=me@example.org"]);
        let refused = world.run(["plan", name].into_iter().chain(contact.into_iter().flatten()));
        assert!(refused.code == 4 && refused.stderr.contains("hint: put the files there"), "{}", refused.stderr);
    }

    let header = r#"{"backbone.conv1.weight":{"dtype":"F32","shape":[64,3,7,7],"data_offsets":[0,37632]}}"#;
    let weights = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 37_632]].concat();
    world.write("soco.safetensors", weights);
    let clip = world.find(&["clip-pretrain", "clip.safetensors"]).display().to_string();
    let sets = [
        "coco=./coco",
        &format!("clip={clip}"),
        "soco=./soco.safetensors",
        "detector.training.max_size=[160, 160]",
        "detector.training.min_size=[96, 96]",
    ];
    let dry_run = |name: &'static str, sets: &[&str]| {
        let args = sets.iter().flat_map(|set| ["--set", set]);
        world.run(["run", name, "--dry-run", "2"].into_iter().chain(args)).success()
    };
    let run = dry_run("vild-ov-coco", &sets);
    assert_eq!(run.steps("done").len(), 9, "{}", run.stderr);
    assert!(run.stderr.contains("begins with 1 tensors of ") && run.stderr.contains("novel AP50: best at step 1, "), "{}", run.stderr);
    assert!(run.stderr.contains("a dry run on the CPU: computes in f32"), "{}", run.stderr);

    // What both have in common is there.
    let run = dry_run("oadp-ov-coco", &sets);
    let made = ["blocks", "detector", "globals", "multilabel", "select", "test", "val-blocks"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);
    assert!(run.stderr.contains("novel AP50: best at step 1, "), "{}", run.stderr);

    // RALF's lists and concepts; in a dry run some regions are good enough.
    let embed_dim = Checkpoint::open(Path::new(&clip)).unwrap().shape("text_projection").unwrap()[1];
    let names: Vec<String> = (0..80).map(|place| format!("word {place}")).collect();
    let numbered: Vec<String> = names.iter().enumerate().map(|(place, name)| format!("\"{place}\": \"{name}\"")).collect();
    let features = Tensor::eye_m(60, embed_dim, (Kind::Half, Device::Cpu)) + 0.1;
    for data_set in ["coco", "lvis"] {
        world.write(&format!("ralf/v3det_{data_set}.json"), format!("{{{}}}", numbered.join(", ")));
        world.write(&format!("ralf/v3det_{data_set}_strict.json"), serde_json::json!(names).to_string());
        let chunks = Saved::Dict([("text_features".to_owned(), Saved::Tensor(&features))].into());
        let mut file = std::fs::File::create(world.path(&format!("ralf/v3det_gpt_noun_chunk_{data_set}_strict.pkl"))).unwrap();
        write_torch(&Saved::Dict([("all_noun_chunks".to_owned(), chunks)].into()), &mut file).unwrap();
    }
    let refused = world.run(
        ["run", "ralf-oadp-ov-coco", "--set", "ralf=./ralf", "--until", "words"]
            .into_iter()
            .chain(sets.iter().flat_map(|set| ["--set", set])),
    );
    assert!(refused.code == 4 && refused.stderr.contains("SHA-256"), "{}", refused.stderr);
    let of_ralf = ["ralf=./ralf", "words.sha256=null", "shown.letterbox.max_size=[160, 96]", "seen.max_per_image=20"];
    let run = dry_run("ralf-oadp-ov-coco", &[&sets[..], &of_ralf].concat());
    let made = ["augmented", "augmenter", "concepts", "detector", "negatives", "seen", "select", "shown", "test@ral", "test@ralf"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);

    let of_features = ["features.max_size=160", "features.min_size=[96, 96]", "boxes.min_objectness=0.0"];
    let run = dry_run("lp-ovod-ov-coco", &[&sets[..], &of_features].concat());
    let made = ["boxes", "coco", "detector", "features", "oracle-coco", "probe", "regions", "test", "val-proposals"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);
    assert!(run.stderr.contains("searched "), "{}", run.stderr);

    // LVIS is on the same pictures, whose embeddings were made for COCO.
    for part in ["train", "val"] {
        crate::support::copy(
            world.find(&["toy-world", &format!("images/{part}")]).parent().unwrap(),
            &world.path(&format!("pictures/{part}")),
        );
        let json = std::fs::read(world.find(&["toy-world", &format!("lvis_{part}"), ".json"])).unwrap();
        std::fs::create_dir_all(world.path("lvis/annotations")).unwrap();
        std::fs::write(world.path(&format!("lvis/annotations/lvis_v1_{part}.json")), json).unwrap();
    }
    std::fs::create_dir_all(world.path("lvis/proposals")).unwrap();
    let proposals = world.path("coco/proposals/oln_r50_fpn_coco_train.pkl");
    for name in ["oln_r50_fpn_lvis_train.pkl", "rpn_r101_fpn_lvis_train.pkl"] {
        std::fs::copy(&proposals, world.path(&format!("lvis/proposals/{name}"))).unwrap();
    }
    let mut detpro = std::fs::File::create(world.path("detpro.pth")).unwrap();
    write_torch(&Saved::Tensor(&Tensor::ones([60, embed_dim], (Kind::Float, Device::Cpu))), &mut detpro).unwrap();
    let on_lvis = [&["coco=./pictures", "lvis=./lvis"], &sets[1..]].concat();
    let run = dry_run("oadp-ov-lvis", &[&["detpro=./detpro.pth"], &on_lvis[..]].concat());
    let done = run.steps("done");
    assert!(["detector", "lvis", "lvis-masks", "prompts", "test"].iter().all(|step| done.contains(&(*step).to_owned())), "{}", run.stderr);
    assert_eq!(run.stderr.matches("will run: 1 of 1 units done").count(), 3, "{}", run.stderr);
    let run = dry_run("vild-ov-lvis", &on_lvis);
    let made = ["detector", "prompts", "test"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);
    // Its `templates` are ViLD's prompts.
    let run = dry_run("detpro-ov-lvis", &on_lvis);
    let made = ["detector@ensemble", "detector@templates", "prompts", "range-1", "range-5", "samples", "test@ensemble", "truth-regions"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);
    let run = dry_run("ralf-ov-lvis", &[&["detpro=./detpro.pth"], &on_lvis[..], &of_ralf].concat());
    let made = [
        "augmented@ral",
        "augmenter@ralf-fixed",
        "detector",
        "negatives",
        "seen",
        "shown@ralf-fixed",
        "test@ral",
        "test@ralf",
        "test@ralf-fixed",
    ];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);

    // CORA, whose networks are as large as those of the publication, but for the CLIP.
    world.write("resnet.yaml", "version: 1\nname: resnet\nstages:\n  - {id: clip, use: toy/clip, with: {architecture: resnet}}\n");
    world.run(["run", "./resnet.yaml"]).success();
    let resnet = world.find(&["toy-clip", "clip.safetensors"]).display().to_string();
    let mut of_cora = vec!["coco=./coco".to_owned(), format!("rn50={resnet}"), format!("rn50x4={resnet}")];
    of_cora.extend(["region-prompt", "localizer"].iter().flat_map(|step| {
        ["training.max_size=[160, 160]", "training.min_size=[96, 160]", "cuts.window=[64, 96]"].map(|set| format!("{step}.{set}"))
    }));
    of_cora.extend(["val-regions", "regions"].iter().flat_map(|step| ["max_size=160", "min_size=160"].map(|set| format!("{step}.{set}"))));
    let run = dry_run("cora-ov-coco", &of_cora.iter().map(String::as_str).collect::<Vec<_>>());
    let made = ["region-prompt", "relabelled", "localizer", "test", "coco", "named-coco"];
    assert!(made.iter().all(|step| run.steps("done").iter().any(|done| done.starts_with(step))), "{}", run.stderr);

    // PromptDet, with a pool and a web of the toy world. Nobody's contact is guessed.
    let refused = world.run(["plan", "promptdet-ov-lvis"]);
    assert!(refused.stderr.contains("expected your e-mail address"), "{}", refused.stderr);
    let web = ToyWeb::start(0, toy_web::of_world);
    let pool = format!(
        "  - {{id: words, use: toy/vocabulary}}
  - {{id: list, use: annotations/folder, in: {{images: world.web_images}}}}
  - {{id: whole, use: clip/globals, in: {{images: world.web_images, annotations: list.annotations, checkpoint: {clip}}}}}
  - id: web
    use: toy/web
    in: {{images: world.web_images, captions: world.captions, features: whole.features, annotations: list.annotations}}
    with: {{address: \"http://{}\"}}
",
        web.address
    );
    world.write(
        "pool.yaml",
        format!("{}{pool}", SMALL.replace("with: {seed: 7, steps: 2,", "with: {architecture: vit, seed: 7, steps: 2,")),
    );
    world.run(["run", "./pool.yaml", "--until", "web"]).success();
    world.run(["export", "./pool.yaml", "web.pool", "pool"]).success();
    world.run(["run", "./pool.yaml", "--until", "words"]).success();
    world.run(["export", "./pool.yaml", "words.descriptions", "words"]).success();
    let of_promptdet = [
        "coco=./pictures",
        "lvis=./lvis",
        &format!("clip={clip}"),
        "resnet=./soco.safetensors",
        "pool=./pool",
        "descriptions=./words/descriptions.json",
        "contact=me@example.org",
        "download.allow_private=[127.0.0.1]",
        "novel-download.allow_private=[127.0.0.1]",
        "base.training.max_size=[160, 160]",
        "base.training.min_size=[96, 96]",
        "detector.training.max_size=[160, 160]",
        "detector.training.min_size=[96, 96]",
    ];
    let run = dry_run("promptdet-ov-lvis", &of_promptdet);
    let made =
        ["prompts-1", "links-2", "download-2", "labels-2", "prompts-2", "novel-labels", "detector@self-training", "lvis-masks@learned"];
    assert!(made.iter().all(|step| run.steps("done").contains(&(*step).to_owned())), "{}", run.stderr);
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

    // Embeddings of some of the images, as where files of others were broken: the others are left out, if that is asked for.
    let mut annotations: serde_json::Value =
        serde_json::from_slice(&std::fs::read(world.find(&["toy-world", "/train/", ".json"])).unwrap()).unwrap();
    annotations["images"].as_array_mut().unwrap().drain(..3);
    let left: Vec<u64> = annotations["images"].as_array().unwrap().iter().map(|image| image["id"].as_u64().unwrap()).collect();
    annotations["annotations"].as_array_mut().unwrap().retain(|label| left.contains(&label["image_id"].as_u64().unwrap()));
    world.write("some.json", annotations.to_string());
    let of_some = SMALL.replace(
        "train.annotations, checkpoint: clip.checkpoint}\n    with: {resize: square}",
        "./some.json, checkpoint: clip.checkpoint}",
    );
    assert!(of_some.contains("./some.json"), "the pipeline changed");
    let policy = |ratio: &str| {
        let policy = format!("use: detector/train\n    on_bad_item: skip\n    max_failed_ratio: {ratio}\n");
        world.write("some.yaml", of_some.replace("use: detector/train\n", &policy));
        world.run(["run", "./some.yaml", "--until", "detector", "--set", "detector.training.steps=2"])
    };
    world.write("some.yaml", &of_some);
    let missing = world.run(["run", "./some.yaml", "--until", "detector"]);
    assert!(missing.code == 4 && missing.stderr.contains("globals: none for 3 of 9 images"), "{}", missing.stderr);
    assert!(missing.stderr.contains("or skip these images: `on_bad_item: skip`"), "{}", missing.stderr);
    let too_many = policy("0.3");
    assert!(too_many.code == 4 && too_many.stderr.contains("3 of 9 items failed, more than max_failed_ratio 0.3"), "{}", too_many.stderr);
    let trained = policy("0.4").success();
    assert!(trained.stderr.contains("globals: none for 3 of 9 images") && trained.stderr.contains(": skipped"), "{}", trained.stderr);

    // A detector that was trained without class embeddings cannot be asked with some.
    let without = "prompts: prompts.prompts, features: regions.features, blocks: blocks.features, globals: globals.features}";
    world.write("wordless.yaml", SMALL.replace(&format!(", {without}"), "}"));
    let wordless = world.run(["run", "./wordless.yaml", "--until", "test"]);
    assert_eq!((wordless.code, wordless.steps("failed")), (4, vec!["test".to_owned()]), "{}", wordless.stderr);
    assert!(wordless.stderr.contains("the detector was trained without `prompts`, but some are given"), "{}", wordless.stderr);

    // Weights to begin with: what has no place is named, and a file without any is refused.
    world.write("begun.yaml", SMALL.replace("globals: globals.features}", "globals: globals.features, pretrained: clip.checkpoint}"));
    let begun = world.run(["run", "./begun.yaml", "--until", "detector"]);
    assert!(begun.code == 4 && begun.stderr.contains("no detector that is known"), "{}", begun.stderr);

    // A checkpoint of CLIP is no detector.
    world.write("clip.yaml", SMALL.replace("detector: detector.detector", "detector: clip.checkpoint"));
    let refused = world.run(["plan", "./clip.yaml"]);
    assert!(refused.stderr.contains("expected detector, but `clip.checkpoint` is checkpoint"), "{}", refused.stderr);
}
