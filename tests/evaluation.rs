//! Evaluation of boxes and masks, and what other programs make of the same detections.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use ovenbird_cache::{Recipe, Store, UnitKey, inputs};
use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
    evaluate::{Detection, Evaluation, Shape},
    masks::Mask,
};
use ovenbird_models::{
    checkpoint::write_safetensors,
    detector::{Config, Detector, MaskConfig, heads::MaskHeadConfig, roi_align::RoiAlign},
};
use ovenbird_stages::artifacts::{Artifact as _, Detections};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, nn};

use crate::support::{World, python};

/// A toy world of validation images alone, its classes, and what reads `./detections.parquet`.
const PIPELINE: &str = r#"version: 1
name: evaluation
variables: {of: boxes}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 6, val_images: 12, web_images: 40, held_out_images: 60, side_px: 160}
  - id: split
    use: coco/split
    in: {annotations: world.val, classes: world.classes}
  - id: lvis-split
    use: coco/split
    in: {annotations: world.lvis_val}
    with: {classes: lvis-frequency}
  - id: coco
    use: eval/coco
    in: {annotations: split.annotations, detections: ./detections.parquet, classes: split.classes}
    with: {of: "${of}"}
  - id: lvis
    use: eval/lvis
    in: {annotations: lvis-split.annotations, detections: ./detections.parquet, classes: lvis-split.classes}
    with: {of: "${of}"}
  - id: export
    use: detections/export
    in: {detections: ./detections.parquet}
"#;

/// A world with its annotations and, as `detections.parquet`, some in every image: right ones, ones that are off, and ones of nothing.
fn world_with(masks: Masks) -> World {
    let world = World::new();
    world.write("evaluation.yaml", PIPELINE);
    world.write("detections.parquet", "");
    world.run(["run", "./evaluation.yaml", "--until", "split"]).success();
    let annotations = Annotations::load(&annotations(&world, "coco")).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let mut by_image: BTreeMap<ImageId, Vec<Detection>> = BTreeMap::new();
    for object in annotations.annotations.iter().cycle().take(3 * annotations.annotations.len()) {
        let image = annotations.image(object.image_id).unwrap();
        let size = [image.width, image.height];
        let mut moved =
            |corner: f32, side: u32| (2.0 * (corner + random.random_range(-4.0..4.0_f32))).round().clamp(0.0, 2.0 * side as f32) / 2.0;
        let xyxy = &object.xyxy;
        let xyxy =
            Xyxy { x1: moved(xyxy.x1, size[0]), y1: moved(xyxy.y1, size[1]), x2: moved(xyxy.x2, size[0]), y2: moved(xyxy.y2, size[1]) };
        let category = random.random_range(0..annotations.categories.len());
        let category_id = if random.random_bool(0.8) { object.category_id } else { annotations.categories[category].id };
        let disk = |cell: usize| if (cell % 28).abs_diff(14).pow(2) + (cell / 28).abs_diff(14).pow(2) < 180 { 0.9 } else { 0.1 };
        let mask = Mask::paste(&(0..784).map(disk).collect::<Vec<f32>>(), 28, &xyxy, size).unwrap().to_packed();
        let detection = Detection {
            image_id: object.image_id,
            category_id,
            xyxy,
            score: random.random_range(0.0..1.0),
            mask: (masks == Masks::Drawn).then(|| Box::new(mask)),
        };
        by_image.entry(object.image_id).or_default().push(detection);
    }
    write_table(&world, &by_image.into_values().flatten().collect::<Vec<_>>());
    world
}

#[derive(PartialEq, Clone, Copy)]
enum Masks {
    Drawn,
    None,
}

fn write_table(world: &World, detections: &[Detection]) {
    let store = Store::open(&world.path("scratch")).unwrap();
    let _session = store.enter().unwrap();
    let recipe = Recipe { kind: "detector/test".into(), version: 1, params: json!({}), inputs: BTreeMap::new() };
    let key = UnitKey { kind: recipe.kind.clone(), fingerprint: recipe.fingerprint(), family: None };
    let draft = store.begin_unit(&key).unwrap();
    let file = draft.create("detections/detections.parquet").unwrap();
    let path = file.path().to_owned();
    Detections::write(detections, file).unwrap();
    world.write("detections.parquet", fs::read(path).unwrap());
}

/// The detections at a path, read as stages do.
fn read_table(path: &Path) -> Vec<Detection> {
    let files = inputs::digest_path(path, None, 0).unwrap();
    Detections::open(&files).unwrap().pieces().map(Result::unwrap).collect::<Vec<_>>().concat()
}

#[test]
fn python_says_the_same_of_the_exported_detections() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(python) = python("faster_coco_eval, lvis, pycocotools") else { return };
    let world = world_with(Masks::Drawn);
    for of in ["boxes", "masks"] {
        world.run(["run", "./evaluation.yaml", "--set", &format!("of={of}")]).success();
        let results = world.find(&["detections-export", "results.json"]);
        for (package, metric) in [("pycocotools", "coco"), ("faster-coco-eval", "coco"), ("lvis-api", "lvis")] {
            let args = [
                root.join("benches/peers/evaluate.py"),
                package.into(),
                metric.into(),
                of.into(),
                annotations(&world, metric),
                results.clone(),
            ];
            let output = Command::new(&python).args(args).output().unwrap();
            let said: Value =
                serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
            let ours =
                evaluations(&world, metric).into_iter().find(|evaluation| format!("{:?}", evaluation.of).to_lowercase() == of).unwrap();
            let ours = serde_json::to_value(ours.groups["all"]).unwrap();
            for (number, said) in said["numbers"].as_object().unwrap() {
                let (ours, said) = (ours[number].as_f64().unwrap_or(-1.0), said.as_f64().unwrap());
                assert!((ours - said).abs() < 1e-6, "{package}, {of}, {number}: expected {said}, found {ours}");
            }
            let ap = ours["ap"].as_f64().unwrap();
            assert!((0.05..0.95).contains(&ap), "{ap}");
        }
    }
}

/// The annotations of the world's images as a data set has them.
fn annotations(world: &World, metric: &str) -> PathBuf {
    let is_one = |name: &&String| name.contains("coco-split") && name.ends_with("annotations.json");
    let units = world.units();
    // LVIS says which classes are absent.
    let is_lvis = |name: &&String| String::from_utf8_lossy(&units[*name]).contains("neg_category_ids");
    let name = units.keys().filter(is_one).find(|name| is_lvis(name) == (metric == "lvis")).unwrap();
    world.path(".ovenbird").join(name)
}

fn evaluations(world: &World, metric: &str) -> Vec<Evaluation> {
    let is_one = |name: &&String| name.contains(&format!("eval-{metric}")) && name.ends_with("evaluation.json");
    let units = world.units();
    units.keys().filter(is_one).map(|name| serde_json::from_slice(&units[name]).unwrap()).collect()
}

#[test]
fn masks_are_evaluated_where_they_are_asked_for() {
    let world = world_with(Masks::Drawn);
    let boxes = world.run(["run", "./evaluation.yaml"]).success();
    let masks = world.run(["run", "./evaluation.yaml", "--set", "of=masks"]).success();
    // What is exported does not depend on what is evaluated.
    assert_eq!(masks.steps("done"), ["coco", "lvis"], "{}", masks.stderr);
    assert!(boxes.stdout.contains("coco (eval/coco)\n") && boxes.stdout.contains("lvis (eval/lvis)\n"), "{}", boxes.stdout);
    assert!(masks.stdout.contains("coco (eval/coco, masks)\n") && masks.stdout.contains("lvis (eval/lvis, masks)\n"), "{}", masks.stdout);
    let of: Vec<Shape> = evaluations(&world, "coco").into_iter().map(|evaluation| evaluation.of).collect();
    assert!(of.contains(&Shape::Boxes) && of.contains(&Shape::Masks));
    world.run(["report", "--output", "report.html"]).success();
    let page = fs::read_to_string(world.path("report.html")).unwrap();
    assert!(page.contains("<h2>coco</h2><p class=\"quiet\">COCO, masks</p>") && page.contains("LVIS, masks"));
}

#[test]
fn an_exported_file_has_a_line_for_each_detection() {
    let world = world_with(Masks::None);
    world.run(["run", "./evaluation.yaml", "--until", "export"]).success();
    let text = fs::read_to_string(world.find(&["detections-export", "results.json"])).unwrap();
    let detections = read_table(&world.path("detections.parquet"));
    let [first, ..] = detections.as_slice() else { panic!("no detections") };
    let line = format!(
        r#"{{"image_id":{},"category_id":{},"bbox":[{:?},{:?},{:?},{:?}],"score":{:?}}}"#,
        first.image_id,
        first.category_id,
        first.xyxy.x1,
        first.xyxy.y1,
        first.xyxy.width(),
        first.xyxy.height(),
        first.score
    );
    assert!(text.starts_with(&format!("[\n{line},\n")) && text.ends_with("}\n]\n"), "{line}\n{}", &text[..200]);
    assert_eq!(serde_json::from_str::<Vec<Value>>(&text).unwrap().len(), detections.len());

    write_table(&world, &[]);
    world.run(["run", "./evaluation.yaml", "--until", "export"]).success();
    let is_empty = |bytes: &Vec<u8>| bytes == b"[]\n";
    assert!(world.units().values().any(is_empty));
}

#[test]
fn masks_that_are_not_there_are_named_with_what_to_do() {
    let world = world_with(Masks::None);
    let refused = world.run(["run", "./evaluation.yaml", "--until", "coco", "--set", "of=masks"]);
    assert!(refused.code == 4 && refused.stderr.contains("a detection without a mask"), "{}", refused.stderr);
    assert!(refused.stderr.contains("whose detector has a mask head") && refused.stderr.contains("`of: boxes`"), "{}", refused.stderr);
    let unknown = world.run(["plan", "./evaluation.yaml", "--set", "of=pixels"]);
    assert!(unknown.code == 3 && unknown.stderr.contains("pixels"), "{}", unknown.stderr);

    // The same images again and again.
    let detections = read_table(&world.path("detections.parquet"));
    write_table(&world, &detections.into_iter().cycle().take(200_000).collect::<Vec<_>>());
    let refused = world.run(["run", "./evaluation.yaml", "--until", "coco"]);
    assert!(refused.code == 4 && refused.stderr.contains("expected its detections one after the other"), "{}", refused.stderr);
}

/// Untrained, it draws as much as a trained one.
#[test]
fn a_detector_with_a_mask_head_writes_masks_of_the_original_images() {
    let world = World::new();
    let head = MaskHeadConfig { n_convs: 1, channels: 16, n_masks: 1 };
    let toy = Config::toy(128);
    let mask_head = Some(MaskConfig { pool: RoiAlign { side: 14, ..toy.pool }, head });
    let config = Config { mask_head, object_head: None, block_head: None, has_global_head: false, ..toy };
    let weights = nn::VarStore::new(Device::Cpu);
    let detector = Detector::new(&weights.root(), &config, 5).unwrap();
    let card = json!({"config": config, "fits": [96, 96], "has_prompts": false, "has_multilabel_prompts": false, "scale": {"temperature": {"train": 0.01, "test": 0.01}}});
    let mut bytes = Vec::new();
    write_safetensors(detector.parameters(), &[("ovenbird.detector".into(), card.to_string())].into(), &mut bytes).unwrap();
    world.write("detector.safetensors", bytes);
    let pipeline = PIPELINE.replace("./detections.parquet", "test.detections").replace("variables: {of: boxes}", "variables: {of: masks}");
    let test = "  - {id: test, use: detector/test, in: {images: world.images, annotations: split.annotations, classes: split.classes, detector: ./detector.safetensors}, with: {most_per_image: 12}}\n";
    world.write("masks.yaml", pipeline + test);
    world.run(["run", "./masks.yaml"]).success();

    let annotations = Annotations::load(&annotations(&world, "coco")).unwrap();
    let detections = read_table(&world.find(&["detector-test", "detections.parquet"]));
    assert!(detections.len() > annotations.images.len());
    let mut n_pixels = 0;
    for detection in &detections {
        let (image, packed) = (annotations.image(detection.image_id).unwrap(), detection.mask.as_ref().unwrap());
        let mask = Mask::from_packed(packed).unwrap();
        assert_eq!(mask.size(), [image.width, image.height]);
        n_pixels += mask.area();
        if let Some(bounds) = mask.bounds() {
            let Xyxy { x1, y1, x2, y2 } = detection.xyxy;
            assert!(bounds.x1 >= x1 - 1.0 && bounds.y1 >= y1 - 1.0 && bounds.x2 <= x2 + 1.0 && bounds.y2 <= y2 + 1.0, "{detection:?}");
        }
    }
    assert!(n_pixels > 0);
}
