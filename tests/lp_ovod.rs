//! LP-OVOD as an operator runs it: embeddings of proposals in and out, retrieval, probing, fused detection, and the report of what was retrieved.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use ovenbird_cache::inputs;
use ovenbird_data::annotations::Annotations;
use ovenbird_models::checkpoint::Checkpoint;
use ovenbird_stages::{
    Artifact,
    artifacts::{Hits, RegionFeatures, Regions},
};
use serde_json::Value;
use tch::Tensor;

use crate::support::{World, python};

/// The steps of the method at their smallest.
const SMALL: &str = r#"version: 1
name: small
variables: {most: 3}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 12, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
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
  - {id: proposals, use: proposals/import, in: {proposals: world.train_proposals, annotations: world.train}}
  - {id: val-proposals, use: proposals/import, in: {proposals: world.val_proposals, annotations: world.val}}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: train.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {rule: lp-ovod, min_side: 0.0, clip: {precision: f32}}
  - id: detector
    use: detector/train
    in: {images: world.images, annotations: train.annotations, classes: train.classes, features: regions.features}
    with:
      network: toy
      head: sigmoid
      training: {steps: 4, checkpoint_every: 4, batch_size: 2, max_size: [128, 128], min_size: [96, 128], size_step: 32}
  - id: boxes
    use: retrieve/boxes
    in: {features: regions.features, prompts: prompts.prompts, classes: train.classes, annotations: train.annotations}
    with: {min_objectness: 0.3, per_class: "${most}"}
  - id: features
    use: detector/features
    in: {images: world.images, annotations: boxes.annotations, detector: detector.detector}
    with: {max_size: 128, min_size: [96, 128], regions: 32}
  - id: probe
    use: detector/probe
    in: {features: features.features, annotations: boxes.annotations, classes: train.classes, detector: detector.detector}
    with: {epochs: 30, checkpoint_every: 40, lr: 0.01, lr_epochs: [20]}
  - id: test
    use: detector/test
    in:
      images: world.images
      annotations: world.val
      classes: train.classes
      prompts: prompts.prompts
      proposals: val-proposals.proposals
      detector: probe.detector
    with: {score_threshold: 0.05, max_per_image: 100}
  - {id: coco, use: eval/coco, in: {annotations: world.val, detections: test.detections, classes: train.classes}}
"#;

fn small() -> World {
    let world = World::new();
    world.write("small.yaml", SMALL);
    world
}

fn open<T: Artifact>(path: &Path) -> T {
    T::open(&inputs::digest_path(path, None, 0).unwrap()).unwrap()
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let checkpoint = Checkpoint::open(path).unwrap();
    checkpoint.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// Everything from proposals to the table. Of the detector, probing changes the rows of novel classes alone; what another number of boxes does not
/// touch is not computed again; the report shows what was retrieved.
#[test]
fn probing_changes_the_rows_of_novel_classes_alone() {
    let world = small();
    let run = world.run(["run", "./small.yaml"]).success();
    assert!(run.stderr.contains("those with an objectness of 0.3 or more"), "{}", run.stderr);
    let before = tensors(&world.find(&["detector-train", "network.safetensors"]));
    let after = tensors(&world.find(&["detector-probe", "network.safetensors"]));
    let rows = &after["roi_head.prototype_novel"];
    assert_eq!(rows.size(), [20, 256]);
    assert!(rows.abs().max().double_value(&[]) > 0.0);
    assert_eq!(after.len(), before.len() + 1);
    assert!(before.iter().all(|(name, tensor)| after[name].equal(tensor)));

    let hits: Hits = open(&world.find(&["retrieve-boxes", "hits.parquet"]));
    assert_eq!(hits.by_class.len(), 20);
    for (class, hits) in &hits.by_class {
        assert!(hits.len() == 3 && hits.is_sorted_by(|a, b| a.cosine >= b.cosine), "{class}: {hits:?}");
        assert!(hits.iter().all(|hit| hit.objectness >= 0.3), "{class}: {hits:?}");
    }
    let labels = fs::read(world.find(&["retrieve-boxes", "annotations.json"])).unwrap();
    let labels = Annotations::parse(&labels, Path::new("labels.json")).unwrap();
    assert_eq!((labels.annotations.len(), labels.categories.len()), (60, 60));

    let again = world.run(["run", "./small.yaml", "--set", "most=2"]).success();
    // The table is computed again only if detections differ.
    let done: Vec<String> = again.steps("done").into_iter().filter(|step| step != "coco").collect();
    assert_eq!(done, ["boxes", "features", "probe", "test"], "{}", again.stderr);
    let report = world.run(["report"]).success();
    let page = fs::read_to_string(world.path(&format!(".ovenbird/{}", report.stdout.trim().split(".ovenbird/").nth(1).unwrap()))).unwrap();
    assert!(page.contains("boxes: retrieved boxes") && page.contains("<th class=\"number\">precision</th>"), "no retrieved boxes");
    assert_eq!(page.matches("the best 2</span>").count(), 20);
    assert_eq!(page.matches("data:image/jpeg").count(), 40 + page.matches("preserveAspectRatio").count());
    world.run(["verify", "--deep"]).success();
}

/// A run that is killed at any moment ends with the bytes of one that was not.
#[test]
fn retrieval_and_probing_continue_after_kills_to_the_same_bytes() {
    let whole = small();
    whole.run(["run", "./small.yaml", "--until", "probe"]).success();
    let killed = small();
    let kinds = ["clip-proposals", "detector-train", "retrieve-boxes", "detector-features", "detector-probe"];
    killed.run_and_kill(&["run", "./small.yaml", "--until", "probe"], &kinds);
    killed.run(["run", "./small.yaml", "--until", "probe"]).success();
    for parts in [
        ["clip-proposals", "regions.arrow"],
        ["retrieve-boxes", "annotations.json"],
        ["detector-features", "features.arrow"],
        ["detector-probe", "network.safetensors"],
    ] {
        let [one, other] = [&whole, &killed].map(|world| fs::read(world.find(&parts)).unwrap());
        assert!(one == other, "{parts:?}");
    }
}

/// Embeddings as LP-OVOD keeps them, out and in again.
const BOTH_WAYS: &str = r#"  - {id: out, use: embeddings/export, in: {features: regions.features, annotations: train.annotations}}
  - {id: given, use: proposals/import, in: {proposals: out.proposals, annotations: train.annotations, id_map: out.id_map}}
  - id: again
    use: embeddings/import
    in: {matrix: MATRIX, proposals: given.proposals, id_map: given.id_map, annotations: train.annotations}
    with: {dim: DIM, dtype: DTYPE}
    POLICY
"#;

fn both_ways(matrix: &str, dtype: &str, policy: &str) -> String {
    let (head, _) = SMALL.split_once("  - id: detector\n").unwrap();
    let tail = BOTH_WAYS.replace("MATRIX", matrix).replace("DIM", "128").replace("DTYPE", dtype).replace("POLICY", policy);
    format!("{head}{tail}")
}

#[test]
fn a_matrix_goes_out_and_comes_in_row_by_row() {
    let world = World::new();
    world.write("both.yaml", both_ways("out.matrix", "f16", ""));
    world.run(["run", "./both.yaml"]).success();
    let rows =
        |kind: &str| -> Vec<Regions> { open::<RegionFeatures>(&world.find(&[kind, "regions.arrow"])).rows().map(Result::unwrap).collect() };
    let (ours, again) = (rows("clip-proposals"), rows("embeddings-import"));
    assert_eq!(ours, again);
    let n_rows: usize = ours.iter().map(|row| row.boxes.len()).sum();
    let matrix = fs::read(world.find(&["embeddings-export", "embeddings.bin"])).unwrap();
    assert_eq!(matrix.len(), 2 * 128 * n_rows);

    if let Some(python) = python("numpy") {
        let script = "import json, sys, numpy as np\nmap_ = json.load(open(sys.argv[2]))\nrows = np.memmap(sys.argv[1], np.float16, 'r').reshape(-1, 128)\n\
                      starts = np.concatenate([[0], np.cumsum(map_['num_proposal'])])\n\
                      print(json.dumps([[int(k), rows[starts[v]].astype(float).tolist()] for k, v in map_.items() if k != 'num_proposal']))";
        let paths = [world.find(&["embeddings-export", "embeddings.bin"]), world.find(&["embeddings-export", "id_map.json"])];
        let output = Command::new(python).args(["-c", script]).args(paths).output().unwrap();
        let first: Vec<(u64, Vec<f32>)> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(first.len(), ours.len());
        for (image, row) in first {
            let regions = ours.iter().find(|regions| regions.image_id.0 == image).unwrap();
            assert_eq!(row, regions.embeddings[..128]);
        }
    }

    // What can be wrong with such a file: a row short, single precision, another width; a row of zeros.
    world.write("short.bin", &matrix[..matrix.len() - 256]);
    world.write("zeros.bin", [&[0; 256], &matrix[256..]].concat());
    for (matrix, dtype, expected) in [
        ("./short.bin", "f16", "which are "),
        ("out.matrix", "f32", "if it is f16, set `with: {dtype: f16}`"),
        ("./zeros.bin", "f16", "expected an embedding of unit norm, found zeros"),
    ] {
        world.write("wrong.yaml", both_ways(matrix, dtype, ""));
        let refused = world.run(["run", "./wrong.yaml"]);
        assert!(refused.code == 4 && refused.stderr.contains(expected), "{}", refused.stderr);
    }
    world.write("skipped.yaml", both_ways("./zeros.bin", "f16", "on_bad_item: skip\n    max_failed_ratio: 0.2"));
    let skipped = world.run(["run", "./skipped.yaml"]).success();
    assert_eq!(skipped.stderr.matches("skipped train/").count(), 1, "{}", skipped.stderr);

    // As LP-OVOD's training leaves a file that it opened as f32.
    world.write("grown.bin", [&matrix[..], &vec![0; matrix.len()]].concat());
    world.write("grown.yaml", both_ways("./grown.bin", "f16", ""));
    let grown = world.run(["run", "./grown.yaml"]).success();
    assert!(grown.stderr.contains("its second half is zeros"), "{}", grown.stderr);
}

#[test]
fn pseudo_labels_open_in_pycocotools() {
    let Some(python) = python("pycocotools") else { return };
    let world = small();
    world.run(["run", "./small.yaml", "--until", "boxes"]).success();
    let script = "import json, sys\nfrom pycocotools.coco import COCO\ncoco = COCO(sys.argv[1])\nfound = coco.loadRes([dict(a) for a in coco.dataset['annotations']])\n\
                  print('\\n' + json.dumps([len(coco.getImgIds()), len(set(a['image_id'] for a in coco.dataset['annotations'])), len(found.getAnnIds()), \
                  sorted(set(len(coco.getAnnIds(catIds=[c])) for c in coco.getCatIds()))]))";
    let labels = world.find(&["retrieve-boxes", "annotations.json"]);
    let output = Command::new(python).args(["-c", script]).arg(labels).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let said: Value = serde_json::from_str(said.trim().lines().last().unwrap()).unwrap();
    assert_eq!((said[0].as_u64(), said[2].as_u64()), (said[1].as_u64(), Some(60)), "{said}");
    // Base classes have no box, novel ones three.
    assert_eq!(said[3], serde_json::json!([0, 3]));
}

/// A detector goes out under the reference's names and comes in again, with the same detections.
#[test]
fn a_probed_detector_goes_out_and_comes_in() {
    let world = small();
    let more = "  - {id: out, use: detector/export, in: {detector: probe.detector}}
  - {id: in, use: detector/import, in: {checkpoint: out.checkpoint, classes: train.classes}, with: {network: toy, max_size: 128, min_size: 128}}
  - id: test-again
    use: detector/test
    in: {images: world.images, annotations: world.val, classes: train.classes, prompts: prompts.prompts, proposals: val-proposals.proposals, detector: in.detector}
    with: {score_threshold: 0.05, max_per_image: 100}
";
    world.write("both.yaml", format!("{SMALL}{more}"));
    world.run(["run", "./both.yaml"]).success();
    let units = world.units();
    let tables: Vec<&Vec<u8>> = units.iter().filter(|(name, _)| name.ends_with("detections.parquet")).map(|(_, bytes)| bytes).collect();
    assert!(tables.len() == 2 && tables[0] == tables[1]);
    let exported = tensors(&world.find(&["detector-export", "detector.pth"]));
    let named = |name: &str| exported.keys().any(|key| key.ends_with(name));
    for name in [
        "roi_head.prototype",
        "roi_head.prototype_novel",
        "roi_head.bbox_head.shared_fcs_for_image.0.weight",
        "roi_head.projection_for_image.bias",
    ] {
        assert!(named(name), "{name}");
    }
    world.write("nameless.yaml", format!("{SMALL}{more}").replace("out.checkpoint, classes: train.classes}", "out.checkpoint}"));
    let refused = world.run(["run", "./nameless.yaml"]);
    assert!(
        refused.code == 4 && refused.stderr.contains("the detector has a linear classifier, whose rows have no names"),
        "{}",
        refused.stderr
    );
}

#[test]
fn what_the_method_cannot_use_is_said_in_words() {
    let world = small();
    world.run(["run", "./small.yaml", "--until", "boxes"]).success();
    let refused = |from: &str, to: &str, expected: &str| world.refuses(SMALL, from, to, expected);
    // Features of other labels, and of another detector.
    refused(
        "annotations: boxes.annotations, detector: detector.detector}",
        "annotations: train.annotations, detector: detector.detector}",
        "give the annotations that `detector/features` read",
    );
    let of_probe = "annotations: boxes.annotations, classes: train.classes, detector: detector.detector}";
    let (head, tail) = SMALL.split_once("  - id: boxes\n").unwrap();
    let (_, training) = head.split_once("  - id: detector\n").unwrap();
    let other = format!("  - id: other\n{}", training.replace("steps: 4", "seed: 9, steps: 4"));
    let of_other = of_probe.replace("detector.detector", "other.detector");
    world.write("wrong.yaml", format!("{head}{other}  - id: boxes\n{}", tail.replace(of_probe, &of_other)));
    let strange = world.run(["run", "./wrong.yaml"]);
    assert!(strange.code == 4 && strange.stderr.contains("made by another detector than the one at `detector`"), "{}", strange.stderr);
    // A base label among the pseudo labels.
    let labels = world.find(&["retrieve-boxes", "annotations.json"]);
    let mut json: Value = serde_json::from_slice(&fs::read(labels).unwrap()).unwrap();
    json["annotations"][4]["category_id"] = 0.into();
    world.write("labels.json", json.to_string());
    refused("boxes.annotations", "./labels.json", "which is a base class: probing learns novel classes alone");
    // Class embeddings where the detector has no use for them, and none where it has.
    refused(
        "classes: train.classes, features: regions.features}",
        "classes: train.classes, features: regions.features, prompts: prompts.prompts}",
        "a detector with `head: sigmoid` learns without it",
    );
    refused("      prompts: prompts.prompts\n", "", "the detector learned CLIP's embeddings, but there are none of the classes");
    refused(
        "max_per_image: 100}",
        "max_per_image: 100, ensemble: {objectness: 1.0}}",
        "the detector has a linear classifier (`head: sigmoid`)",
    );
    // No candidate at all is a note, not a failure of retrieval.
    world.write("strict.yaml", SMALL.replace("min_objectness: 0.3", "min_objectness: 1.0"));
    let strict = world.run(["run", "./strict.yaml", "--until", "boxes"]).success();
    assert!(strict.stderr.contains("fewer than 3 boxes, as there are no more candidates: "), "{}", strict.stderr);
    // Proposals of other images.
    refused("val-proposals.proposals", "proposals.proposals", "the proposals have no entry for this image");
}
