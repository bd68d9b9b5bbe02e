//! Features, proposals and labels from and for the OADP reference; words, concepts and augmenters from and for RALF's code.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use ovenbird_cache::inputs;
use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
    proposals::{Proposal, write_mmdet},
    views,
};
use ovenbird_models::checkpoint::{Saved, write_torch};
use ovenbird_stages::{
    Artifact,
    artifacts::{ImageFeatures, Proposals, RegionFeatures, Regions},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::support::{World, python};

/// Every kind of feature, to the reference's files and back.
const BOTH_WAYS: &str = r#"version: 1
name: both-ways
variables: {box: reference}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 4, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8, architecture: vit}
  - id: proposals
    use: proposals/import
    in: {proposals: world.val_proposals, annotations: world.val}
  - id: pickle
    use: proposals/export
    in: {proposals: proposals.proposals, annotations: world.val}
  - id: proposals-again
    use: proposals/import
    in: {proposals: pickle.proposals, annotations: world.val}
  - id: globals
    use: clip/globals
    in: {images: world.images, annotations: world.val, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: blocks
    use: clip/blocks
    in: {images: world.images, annotations: world.val, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: objects
    use: clip/objects
    in: {images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: global-files
    use: globals/export
    in: {features: globals.features}
  - id: block-files
    use: blocks/export
    in: {features: blocks.features}
    with: {whole_box: "${box}"}
  - id: object-files
    use: objects/export
    in: {features: objects.features}
  - id: globals-again
    use: globals/import
    in: {files: global-files.files, annotations: world.val}
  - id: blocks-again
    use: blocks/import
    in: {files: block-files.files, annotations: world.val}
  - id: objects-again
    use: objects/import
    in: {files: object-files.files, annotations: world.val}
  - id: objects-out-again
    use: objects/export
    in: {features: objects-again.features}
"#;

fn both_ways() -> World {
    let world = World::new();
    world.write("both.yaml", BOTH_WAYS);
    world.run(["run", "./both.yaml"]).success();
    world
}

fn open<T: Artifact>(world: &World, parts: &[&str]) -> T {
    T::open(&inputs::digest_path(&world.find(parts), None, 0).unwrap()).unwrap()
}

fn regions(world: &World, kind: &str) -> Vec<Regions> {
    open::<RegionFeatures>(world, &[kind, "regions.arrow"]).rows().map(Result::unwrap).collect()
}

fn globals(world: &World, kind: &str) -> Vec<(ImageId, Vec<f32>)> {
    open::<ImageFeatures>(world, &[kind, "globals.arrow"]).rows().map(Result::unwrap).collect()
}

/// The nearest boxes that f16 has.
fn halved(boxes: &[Xyxy]) -> Vec<Xyxy> {
    let corners: Vec<f32> = boxes.iter().flat_map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect();
    halves(&corners).as_chunks::<4>().0.iter().map(|corners| Xyxy::from(*corners)).collect()
}

fn halves(numbers: &[f32]) -> Vec<f32> {
    Vec::try_from(Tensor::from_slice(numbers).to_kind(Kind::Half).to_kind(Kind::Float)).unwrap()
}

#[test]
fn features_that_went_to_the_reference_and_came_back_are_the_same() {
    let world = both_ways();
    assert_eq!(globals(&world, "clip-globals"), globals(&world, "globals-import"));
    let mut n_objects = 0;
    for (was, is) in regions(&world, "clip-objects").into_iter().zip(regions(&world, "objects-import")) {
        n_objects += was.boxes.len();
        let expected = Regions { boxes: halved(&was.boxes), objectness: halves(&was.objectness), ..was };
        assert_eq!(is, expected);
    }
    assert!(n_objects > 100);
    for (was, is) in regions(&world, "clip-blocks").into_iter().zip(regions(&world, "blocks-import")) {
        let mut boxes = halved(&was.boxes);
        boxes[0] = views::whole_box(was.size_px);
        assert_eq!(is, Regions { boxes, ..was });
    }
    // What f16 does to boxes it does once.
    let units = world.units();
    let mut exported: Vec<&String> = units.keys().filter(|name| name.contains("objects-export/") && name.contains("/files/")).collect();
    exported.sort_by_key(|name| name.rsplit('/').next());
    assert_eq!(exported.len(), 12);
    assert!(exported.chunks(2).all(|pair| units[pair[0]] == units[pair[1]]));
    // The pickle holds what it was made of.
    let tables: Vec<&Vec<u8>> = units.iter().filter(|(name, _)| name.ends_with("proposals.parquet")).map(|(_, bytes)| bytes).collect();
    assert!(tables.len() == 2 && tables[0] == tables[1]);
    world.run(["verify", "--deep"]).success();
}

/// What RALF reads and writes, out, in, and out again; and what an augmenter makes of it.
const RALF: &str = r#"version: 1
name: ralf
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 6, val_images: 4, web_images: 40, held_out_images: 60, side_px: 160}
  - {id: clip, use: toy/clip, in: {held_out_images: world.held_out_images, held_out: world.held_out}, with: {architecture: vit}}
  - {id: proposals, use: proposals/import, in: {proposals: world.val_proposals, annotations: world.val}}
  - id: objects
    use: clip/objects
    in: {images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - {id: words, use: toy/vocabulary}
  - {id: vocabulary, use: vocabulary/import, in: {file: words.vocabulary, classes: world.classes}}
  - id: negatives
    use: negatives/retrieve
    in: {checkpoint: clip.checkpoint, classes: world.classes, vocabulary: vocabulary.vocabulary}
    with: {rank_variance: fixed, drop: {fraction: 0.1}, top: 22, popularity_limit: 40}
  - {id: negatives-out, use: negatives/export, in: {negatives: negatives.negatives, annotations: world.train}}
  - {id: negatives-in, use: negatives/import, in: {file: negatives-out.file, annotations: world.train}}
  - {id: negatives-out-again, use: negatives/export, in: {negatives: negatives-in.negatives, annotations: world.train}}
  - {id: concepts, use: concepts/build, in: {checkpoint: clip.checkpoint, phrases: words.phrases}}
  - {id: concepts-out, use: concepts/export, in: {concepts: concepts.concepts}}
  - {id: concepts-in, use: concepts/import, in: {file: concepts-out.file}}
  - {id: concepts-out-again, use: concepts/export, in: {concepts: concepts-in.concepts}}
  - id: augmenter
    use: augmenter/train
    in: {checkpoint: clip.checkpoint, classes: world.classes, vocabulary: vocabulary.vocabulary, concepts: concepts.concepts, features: objects.features}
    with: {n_concepts: 10, min_objectness: 0.0, epochs: 1, batch_size: 4}
  - {id: augmenter-out, use: augmenter/export, in: {augmenter: augmenter.augmenter}}
  - {id: augmenter-in, use: augmenter/import, in: {checkpoint: augmenter-out.checkpoint}}
  - {id: augmenter-out-again, use: augmenter/export, in: {augmenter: augmenter-in.augmenter}}
  - {id: augmented, use: augmenter/apply, in: {augmenter: augmenter.augmenter, concepts: concepts.concepts, features: objects.features}}
  - {id: augmented-again, use: augmenter/apply, in: {augmenter: augmenter-in.augmenter, concepts: concepts-in.concepts, features: objects.features}}
"#;

#[test]
fn words_concepts_and_an_augmenter_that_went_to_ralf_and_came_back_are_the_same() {
    let world = World::new();
    world.write("ralf.yaml", RALF);
    world.run(["run", "./ralf.yaml"]).success();
    let units = world.units();
    for (kind, name) in
        [("negatives-export/", "neg_feature.pkl"), ("concepts-export/", "concepts.pkl"), ("augmenter-export/", "augmenter.pth")]
    {
        let of_kind = units.iter().filter(|(path, _)| path.contains(kind) && path.ends_with(name));
        let files: Vec<&Vec<u8>> = of_kind.map(|(_, bytes)| bytes).collect();
        assert_eq!(files.len(), 2, "{kind}");
        assert!(files[0].len() > 1000 && files[0] == files[1], "{kind}");
    }
    let augmented = |unit: &PathBuf| -> Vec<Regions> {
        let files = inputs::digest_path(&unit.join("features/regions.arrow"), None, 0).unwrap();
        RegionFeatures::open(&files).unwrap().rows().map(Result::unwrap).collect()
    };
    let made: Vec<Vec<Regions>> = world.units_of("augmenter-apply").iter().map(augmented).collect();
    assert_eq!(made.len(), 2);
    assert!(made[0].iter().map(|regions| regions.boxes.len()).sum::<usize>() > 20);
    assert_eq!(made[0], made[1]);
}

/// What a script prints, json.
fn say(python: &Path, script: &str, args: &[&Path]) -> Value {
    let output = Command::new(python).args(["-c", script]).args(args).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

const READ: &str = r#"
import json, pathlib, pickle, sys
import numpy, torch
said = {}
for name, folder in zip(("globals", "blocks", "objects"), sys.argv[1:]):
    for path in sorted(pathlib.Path(folder).iterdir()):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        tensors = loaded if isinstance(loaded, dict) else {"": loaded}
        assert all(t.dtype == torch.float16 and t.is_contiguous() for t in tensors.values())
        said[f"{name} {path.name}"] = {key: [list(t.shape), t.double().flatten().tolist()] for key, t in tensors.items()}
with open(sys.argv[4], "rb") as file:
    images = pickle.load(file)
assert all(type(a) is numpy.ndarray and a.dtype == numpy.float32 and a.flags.c_contiguous for a in images)
said["proposals"] = [[list(a.shape), a.tolist()] for a in images]
print(json.dumps(said))
"#;

#[test]
fn python_reads_the_files_that_are_written() {
    let Some(python) = python("numpy, torch") else { return };
    let world = both_ways();
    let folder = |kind: &str| world.find(&[kind, "files/"]).parent().unwrap().to_owned();
    let pickle = world.find(&["proposals-export", ".pkl"]);
    let folders = [folder("globals-export"), folder("blocks-export"), folder("objects-export"), pickle];
    let mut said = say(&python, READ, &folders.each_ref().map(PathBuf::as_path));
    let said = said.as_object_mut().unwrap();

    let proposals = said.remove("proposals").unwrap();
    let annotations = Annotations::load(&world.find(&["toy-world", "instances_val.json"])).unwrap();
    assert_eq!(proposals.as_array().unwrap().len(), annotations.images.len());
    let tensor = |shape: &[usize], numbers: &[f32]| json!([shape, numbers.iter().copied().map(f64::from).collect::<Vec<_>>()]);
    let name = |kind: &str, image: ImageId| format!("{kind} {:012}.pth", image.0);
    for (image, embedding) in globals(&world, "clip-globals") {
        let expected = json!({"": tensor(&[embedding.len()], &embedding)});
        assert_eq!(said.remove(&name("globals", image)).unwrap(), expected);
    }
    for (kind, stage) in [("blocks", "clip-blocks"), ("objects", "clip-objects")] {
        for Regions { image_id, size_px, mut boxes, objectness, embeddings } in regions(&world, stage) {
            let n = boxes.len();
            if kind == "blocks" {
                boxes[0] = views::reference_whole_box(size_px);
            }
            let corners: Vec<f32> = halved(&boxes).iter().flat_map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect();
            let dim = embeddings.len() / n;
            let mut expected = json!({"embeddings": tensor(&[n, dim], &embeddings), "bboxes": tensor(&[n, 4], &corners)});
            if kind == "objects" {
                expected["objectness"] = tensor(&[n, 1], &halves(&objectness));
            }
            assert_eq!(said.remove(&name(kind, image_id)).unwrap(), expected, "{kind} {image_id}");
        }
    }
    assert!(said.is_empty(), "{said:?}");
}

const SPLIT: &str = r#"
import json, sys
source, classes, keep, target = json.load(open(sys.argv[1])), json.load(open(sys.argv[2])), *sys.argv[3:]
names = classes["base"] + classes["novel"]
new = {c["id"]: names.index(c["name"]) for c in source["categories"] if c["name"] in names}
kept = len(classes["base"] if keep == "base" else names)
annotations = [a | {"category_id": new[a["category_id"]]} for a in source["annotations"] if new.get(a["category_id"], kept) < kept]
labelled = {a["image_id"] for a in annotations}
images = [i for i in source["images"] if keep != "all-annotated" or i["id"] in labelled]
for image in images:
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if key in image:
            image[key] = [new[c] for c in image[key]]
categories = sorted((c | {"id": new[c["id"]]} for c in source["categories"] if c["id"] in new), key=lambda c: c["id"])
with open(target, "w") as file:
    json.dump({"categories": categories, "annotations": annotations, "images": images}, file, separators=(",", ":"))
print("[]")
"#;

/// Python writes every number anew, and these as they were: the toy world's are the shortest that there are, as COCO's are.
#[test]
fn python_splits_annotations_into_the_same_bytes() {
    let Some(python) = python("json") else { return };
    let world = World::new();
    for (name, port) in [("coco", "val"), ("lvis", "lvis_val")] {
        for keep in ["all", "base", "all-annotated"] {
            let pipeline = BOTH_WAYS.split_once("  - id: clip\n").unwrap().0.replace("val_images: 6", "val_images: 30");
            let split = format!(
                "  - {{id: split, use: annotations/split, in: {{annotations: world.{port}, classes: world.classes}}, with: {{keep: {keep}}}}}\n"
            );
            world.write("split.yaml", pipeline + &split);
            world.run(["run", "./split.yaml"]).success();
            let input = world.find(&["toy-world", if name == "coco" { "instances_val.json" } else { "lvis_v1_val.json" }]);
            let target = world.path("python.json");
            say(&python, SPLIT, &[&input, &world.find(&["toy-world", "classes.json"]), Path::new(keep), &target]);
            let expected = fs::read(target).unwrap();
            let is_equal = |(name, bytes): (&String, &Vec<u8>)| name.contains("annotations-split") && *bytes == expected;
            assert!(world.units().iter().any(is_equal), "{name} {keep}");
        }
    }
}

/// Thousands of images with a file each, written as the reference does, and more than one unit.
const MANY: &str = r#"version: 1
name: many
stages:
  - id: features
    use: globals/import
    in: {files: ./globals, annotations: ./labels.json}
  - id: files
    use: globals/export
    in: {features: features.features}
"#;

fn many(n_images: usize) -> World {
    let world = World::new();
    let image = |image: usize| json!({"id": image, "file_name": format!("{image}.jpg"), "width": 64, "height": 48});
    let images: Vec<Value> = (1..=n_images).map(image).collect();
    world.write("labels.json", json!({"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}).to_string());
    (1..=n_images).for_each(|image| write_global(&world, image, image as f64));
    world.write("many.yaml", MANY);
    world
}

/// A feature at some angle.
fn write_global(world: &World, image: usize, angle: f64) {
    let embedding = Tensor::from_slice(&[angle.sin(), angle.cos()]).to_kind(Kind::Half);
    let mut bytes = Vec::new();
    write_torch(&Saved::Tensor(&embedding), &mut bytes).unwrap();
    world.write(&format!("globals/{image:012}.pth"), bytes);
}

#[test]
fn imports_and_exports_that_are_killed_end_with_the_same_bytes_and_a_changed_file_redoes_its_unit() {
    let (undisturbed, killed) = (many(3000), many(3000));
    undisturbed.run(["run", "./many.yaml"]).success();
    let n_units = undisturbed.units_of("globals/import").len();
    assert!(n_units >= 2, "{n_units}");
    killed.run_and_kill(&["run", "./many.yaml"], &["globals/import", "globals/export"]);
    // Nor do threads matter.
    killed.write("many.yaml", format!("{MANY}    resources: {{cpu: 2}}\n"));
    let run = killed.run(["run", "./many.yaml"]).success();
    assert!(killed.units() == undisturbed.units(), "{}", run.stderr);
    killed.run(["verify", "--full"]).success();

    // The same embeddings leave as came.
    let exported = killed.units();
    for image in [1, 1500, 3000] {
        let name = format!("{image:012}.pth");
        let (_, bytes) = exported.iter().find(|(path, _)| path.ends_with(&name)).unwrap();
        assert!(*bytes == fs::read(killed.path(&format!("globals/{name}"))).unwrap());
    }

    write_global(&killed, 1500, 0.5);
    killed.run(["run", "./many.yaml"]).success();
    let n_new = killed.units_of("globals/import").len() - n_units;
    assert!((1..=3).contains(&n_new) && n_new < n_units, "{n_new} of {n_units}");
}

#[test]
fn files_that_are_missing_or_broken_are_named_and_others_are_left_alone() {
    let world = many(40);
    fs::rename(world.path("globals/000000000007.pth"), world.path("globals/000000000700.pth")).unwrap();
    let missing = world.run(["run", "./many.yaml"]);
    let words = "no file for 1 of 40 images, `000000000007.pth` among them; the folder has 40 files";
    assert!(missing.code != 0 && missing.stderr.contains(words), "{} {}", missing.code, missing.stderr);
    assert!(missing.stderr.contains("point `files` at the folder"), "{}", missing.stderr);

    write_global(&world, 7, 7.0);
    let whole = fs::read(world.path("globals/000000000009.pth")).unwrap();
    world.write("globals/000000000009.pth", &whole[..whole.len() / 2]);
    let broken = world.run(["run", "./many.yaml"]);
    assert!(broken.code == 4 && broken.stderr.contains("000000000009.pth: "), "{} {}", broken.code, broken.stderr);
    assert!(broken.stderr.contains("cut short or damaged"), "{}", broken.stderr);
    assert!(broken.stderr.contains("1 files are of images that the annotations do not have"), "{}", broken.stderr);

    world.write("many.yaml", MANY.replace("labels.json}\n", "labels.json}\n    on_bad_item: skip\n    max_failed_ratio: 0.1\n"));
    world.run(["run", "./many.yaml"]).success();
    let failed = fs::read_to_string(world.find(&["globals-import", "failed.json"])).unwrap();
    assert!(failed.contains("\"item\": \"000000000009.pth\""), "{failed}");
    let rows = globals(&world, "globals-import");
    assert_eq!((rows.len(), rows[8].0), (39, ImageId(10)));

    // The file is mended: its unit is made again.
    world.write("globals/000000000009.pth", whole);
    world.run(["run", "./many.yaml"]).success();
    assert!(world.units().keys().any(|name| name.contains("globals-export") && name.ends_with("000000000009.pth")));
}

#[test]
fn a_folder_of_another_kind_is_refused() {
    let world = many(3);
    world.write("many.yaml", MANY.split_once("  - id: files").unwrap().0.replace("globals/import", "objects/import"));
    let refused = world.run(["run", "./many.yaml"]);
    let words = "expected a dict of `bboxes`, `embeddings` and `objectness`, found [\"(bare tensor)\"]";
    assert!(refused.code == 4 && refused.stderr.contains(words) && refused.stderr.contains("`globals/import`"), "{}", refused.stderr);
}

#[test]
fn what_a_stage_made_is_copied_where_it_is_asked_for() {
    let world = World::new();
    world.write("both.yaml", BOTH_WAYS);
    let early = world.run(["export", "./both.yaml", "global-files", "out"]);
    assert!(early.code == 4 && early.stderr.contains("ovenbird run ./both.yaml --until global-files`"), "{}", early.stderr);
    world.run(["run", "./both.yaml", "--until", "global-files"]).success();
    let exported = world.run(["export", "./both.yaml", "global-files", "out"]).success();
    assert!(exported.stdout.starts_with("6 files of `global-files.files`, "), "{}", exported.stdout);
    let names: Vec<String> =
        fs::read_dir(world.path("out")).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.len() == 6 && names.iter().all(|name| name.len() == 16 && name.ends_with(".pth")), "{names:?}");
    // Again is nothing to do; a file that was cut short there is written again, and one that was damaged here is named.
    let one = world.path("out").join(&names[0]);
    let whole = fs::read(&one).unwrap();
    fs::write(&one, &whole[..10]).unwrap();
    world.run(["export", "./both.yaml", "global-files", "out"]).success();
    assert!(fs::read(&one).unwrap() == whole);
    let source = world.find(&["globals-export", &names[0]]);
    fs::write(&source, vec![0; whole.len()]).unwrap();
    let damaged = world.run(["export", "./both.yaml", "global-files", "out"]);
    assert!(damaged.code != 0 && damaged.stderr.contains(&names[0]), "{}", damaged.stderr);
    let several = world.run(["export", "./both.yaml", "world", "out"]);
    assert!(several.code == 2 && several.stderr.contains("world.train_proposals"), "{}", several.stderr);
}

/// A detector that learns from pseudo labels.
const PSEUDO: &str = r#"  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: world.classes}
  - id: base
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
    with: {keep: base}
  - id: pseudo
    use: annotations/pseudo-labels
    in: {features: objects-again.features, prompts: prompts.prompts, classes: world.classes, annotations: base.annotations}
    with: {temperature: 0.01, score_threshold: 0.05}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: pseudo.annotations, classes: pseudo.classes}
    with:
      network: toy
      training: {steps: 1, checkpoint_every: 1, batch_size: 2, max_size: [96, 96], min_size: [96, 96]}
"#;

#[test]
fn pseudo_labels_are_annotations_that_a_detector_learns_from() {
    let world = World::new();
    world.write("pseudo.yaml", format!("{BOTH_WAYS}{PSEUDO}"));
    let run = world.run(["run", "./pseudo.yaml", "--until", "detector"]).success();
    assert!(run.steps("done").contains(&"detector".to_owned()), "{}", run.stderr);
    let was = fs::read_to_string(world.find(&["annotations-split", "annotations.json"])).unwrap();
    let is = world.find(&["annotations-pseudo-labels", "annotations.json"]);
    let [before, after] = [&world.find(&["annotations-split", "annotations.json"]), &is].map(|path| Annotations::load(path).unwrap());
    let n_before = before.annotations.len();
    let added = &after.annotations[n_before..];
    assert!(added.len() > 6, "{}", added.len());
    // In some of the classes that nobody labelled.
    assert!(added.iter().any(|object| object.category_id.0 >= 40));
    assert!(added.iter().all(|object| !object.is_crowd && object.segmentation.drawn().is_none() && object.area > 0.0));
    let text = fs::read_to_string(is).unwrap();
    let (kept, rest) = was.split_once("],\"images\":").unwrap();
    assert!(text.starts_with(kept) && text.ends_with(rest));

    world.write("pseudo.yaml", format!("{BOTH_WAYS}{PSEUDO}").replace("temperature: 0.01, ", ""));
    let refused = world.run(["run", "./pseudo.yaml", "--until", "pseudo"]);
    assert!(refused.code == 4 && refused.stderr.contains("no scale was learned with these"), "{}", refused.stderr);
    world.write("pseudo.yaml", format!("{BOTH_WAYS}{PSEUDO}").replace("annotations: base.annotations}", "annotations: world.train}"));
    let refused = world.run(["run", "./pseudo.yaml", "--until", "pseudo"]);
    assert!(refused.code == 4 && refused.stderr.contains("none for 4 of 4 images"), "{}", refused.stderr);
}

/// Proposals of a json that does not list its images in ascending id, in and out again.
const ORDERED: &str = r#"version: 1
name: ordered
stages:
  - id: split
    use: annotations/split
    in: {annotations: ./labels.json, classes: ./classes.json}
  - id: proposals
    use: proposals/import
    in: {proposals: ./proposals.pkl, annotations: split.annotations}
  - id: pickle
    use: proposals/export
    in: {proposals: proposals.proposals, annotations: split.annotations}
    with: {order: file}
"#;

/// Images 9, 4 and 7 of some widths, and a pickle whose boxes are as wide as the images in the order given.
fn ordered(widths: [u32; 3], pickled: [f32; 3]) -> World {
    let world = World::new();
    world.write("ordered.yaml", ORDERED);
    world.write("classes.json", r#"{"base": ["owl"], "novel": []}"#);
    let images = [9, 4, 7].into_iter().zip(widths);
    let images: Vec<Value> =
        images.map(|(id, width)| json!({"id": id, "file_name": format!("{id}.jpg"), "width": width, "height": 50})).collect();
    let owl = json!({"id": 1, "image_id": 4, "category_id": 3, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0});
    world.write("labels.json", json!({"images": images, "annotations": [owl], "categories": [{"id": 3, "name": "owl"}]}).to_string());
    let entry = |width: f32| vec![Proposal { xyxy: [0.0, 0.0, width, 50.0].into(), score: 0.5 }];
    let mut pickle = Vec::new();
    write_mmdet(&pickled.map(entry), &mut pickle).unwrap();
    world.write("proposals.pkl", pickle);
    world
}

/// The image of each width, ascending by image.
fn imported(world: &World) -> Vec<(u64, f32)> {
    let files = inputs::digest_path(&world.find(&["proposals-import", "proposals.parquet"]), None, 0).unwrap();
    Proposals::open(&files).unwrap().by_image.into_iter().map(|(image, boxes)| (image.0, boxes[0].xyxy.x2)).collect()
}

#[test]
fn proposals_in_the_order_of_the_file_come_to_their_images() {
    let in_file = ordered([60, 80, 70], [60.0, 80.0, 70.0]);
    let run = in_file.run(["run", "./ordered.yaml"]).success();
    assert!(run.stderr.contains("the boxes fit that order only (`with: {order: file}`)"), "{}", run.stderr);
    let right = [(4, 80.0), (7, 70.0), (9, 60.0)];
    assert_eq!(imported(&in_file), right);
    let unit = fs::read_to_string(in_file.find(&["proposals-import", "unit.json"])).unwrap();
    assert!(unit.contains(r#""order": "file""#), "{unit}");
    // What goes out is what came in.
    assert!(fs::read(in_file.find(&["proposals-export", ".pkl"])).unwrap() == fs::read(in_file.path("proposals.pkl")).unwrap());
    let refused = in_file.run(["run", "./ordered.yaml", "--set", "proposals.order=id"]);
    assert!(refused.code == 4 && refused.stderr.contains("set `with: {order: file}`"), "{}", refused.stderr);

    let by_id = ordered([60, 80, 70], [80.0, 70.0, 60.0]);
    let run = by_id.run(["run", "./ordered.yaml"]).success();
    assert!(run.stderr.contains("entries are in ascending image id, and not as"), "{}", run.stderr);
    assert_eq!(imported(&by_id), right);
    assert!(fs::read(by_id.find(&["proposals-export", ".pkl"])).unwrap() == fs::read(in_file.path("proposals.pkl")).unwrap());
}

#[test]
fn proposals_that_fit_both_orders_are_refused_until_one_is_said() {
    let pickled = [60.0, 59.0, 58.0];
    let refused = ordered([60; 3], pickled).run(["run", "./ordered.yaml"]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    for words in ["proposals.pkl: ", "the boxes fit both orders", "`with: {order: file}`", "`with: {order: id}`"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    for (order, expected) in [("file", [(4, 59.0), (7, 58.0), (9, 60.0)]), ("id", [(4, 60.0), (7, 59.0), (9, 58.0)])] {
        let world = ordered([60; 3], pickled);
        world.run(["run", "./ordered.yaml", "--set", &format!("proposals.order={order}")]).success();
        assert_eq!(imported(&world), expected, "{order}");
    }
    let neither = ordered([60, 80, 70], [99.0; 3]).run(["run", "./ordered.yaml"]);
    assert!(
        neither.code == 4 && neither.stderr.contains("the boxes fit neither order of the images: in ascending id, "),
        "{}",
        neither.stderr
    );
}
