//! Evaluation of boxes and masks, and what other programs make of the same detections.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use ovenbird_cache::{Recipe, Store, UnitKey, inputs};
use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
    evaluate::{Detection, Evaluation, IouType},
    masks::Mask,
};
use ovenbird_models::{
    checkpoint::write_safetensors,
    detection::roi_align::RoiAlign,
    rcnn::{
        Config, Detector,
        mask_head::{MaskConfig, MaskHeadConfig},
    },
};
use ovenbird_stages::{Artifact as _, artifacts::Detections};
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
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
  - id: lvis-split
    use: annotations/split
    in: {annotations: world.lvis_val}
    with: {classes: lvis-frequency}
  - id: coco
    use: eval/coco
    in: {annotations: split.annotations, detections: ./detections.parquet, classes: split.classes}
    with: {iou_type: "${of}"}
  - id: lvis
    use: eval/lvis
    in: {annotations: lvis-split.annotations, detections: ./detections.parquet, classes: lvis-split.classes}
    with: {iou_type: "${of}"}
  - id: export
    use: detections/export
    in: {detections: ./detections.parquet, annotations: split.annotations}
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

/// Writes `detections.parquet` for the images of the split.
fn write_table(world: &World, detections: &[Detection]) {
    write_detections(world, Annotations::load(&annotations(world, "coco")).unwrap(), detections);
}

/// Writes `detections.parquet`, as if every image of some annotations had been looked at for every class.
pub(crate) fn write_detections(world: &World, annotations: Annotations, detections: &[Detection]) {
    let looked_at: BTreeSet<ImageId> = annotations.images.iter().map(|image| image.id).collect();
    let categories = annotations.categories.into_iter().map(|category| (category.id, category.name)).collect();
    let store = Store::open(&world.path("scratch")).unwrap();
    let _session = store.enter().unwrap();
    let recipe = Recipe { kind: "detector/test".into(), version: 1, params: json!({}), inputs: BTreeMap::new() };
    let key = UnitKey { kind: recipe.kind.clone(), fingerprint: recipe.fingerprint(), item_key: None };
    let draft = store.begin_unit(&key).unwrap();
    let file = draft.create("detections/detections.parquet").unwrap();
    let path = file.path().to_owned();
    Detections::write(detections, &looked_at, &categories, file).unwrap();
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
            let ours = evaluations(&world, metric)
                .into_iter()
                .find(|evaluation| format!("{:?}", evaluation.iou_type).to_lowercase() == of)
                .unwrap();
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
    let is_one = |name: &&String| name.contains("annotations-split") && name.ends_with("annotations.json");
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
    let of: Vec<IouType> = evaluations(&world, "coco").into_iter().map(|evaluation| evaluation.iou_type).collect();
    assert!(of.contains(&IouType::Boxes) && of.contains(&IouType::Masks));
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
    assert!(
        refused.stderr.contains("whose detector has a mask head") && refused.stderr.contains("`iou_type: boxes`"),
        "{}",
        refused.stderr
    );
    let unknown = world.run(["plan", "./evaluation.yaml", "--set", "of=pixels"]);
    assert!(unknown.code == 3 && unknown.stderr.contains("pixels"), "{}", unknown.stderr);

    // The same images again and again.
    let detections = read_table(&world.path("detections.parquet"));
    write_table(&world, &detections.into_iter().cycle().take(200_000).collect::<Vec<_>>());
    let refused = world.run(["run", "./evaluation.yaml", "--until", "coco"]);
    assert!(refused.code == 4 && refused.stderr.contains("expected its detections one after the other"), "{}", refused.stderr);
}

/// A detector with a mask head. Untrained, it draws as much as a trained one.
fn untrained_detector() -> Vec<u8> {
    let head = MaskHeadConfig { n_convs: 1, channels: 16, n_masks: 1 };
    let toy = Config::toy(128);
    let mask_head = Some(MaskConfig { pool: RoiAlign { side: 14, ..toy.pool }, head });
    let config = Config { mask_head, object_head: None, block_head: None, has_global_head: false, ..toy };
    let weights = nn::VarStore::new(Device::Cpu);
    let detector = Detector::new(&weights.root(), &config, 5).unwrap();
    let spec = json!({"mask-rcnn": {"config": config, "fits": [96, 96], "has_prompts": false, "has_multilabel_prompts": false, "scale": {"temperature": {"train": 0.01, "test": 0.01}}}});
    let mut bytes = Vec::new();
    write_safetensors(detector.parameters(), &[("ovenbird.detector".into(), spec.to_string())].into(), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_detector_with_a_mask_head_writes_masks_of_the_original_images() {
    let world = World::new();
    world.write("detector.safetensors", untrained_detector());
    let pipeline = PIPELINE.replace("./detections.parquet", "test.detections").replace("variables: {of: boxes}", "variables: {of: masks}");
    let test = "  - {id: test, use: detector/test, in: {images: world.images, annotations: split.annotations, classes: split.classes, detector: ./detector.safetensors}, with: {max_per_image: 12}}\n";
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

/// Two evaluations of `./detections.parquet` against brought annotations, and a training that learns masks.
const BROUGHT: &str = r#"version: 1
name: brought
variables: {of: boxes}
stages:
  - id: coco
    use: eval/coco
    in: {annotations: ./brought.json, detections: ./detections.parquet, classes: ./classes.json}
    with: {iou_type: "${of}"}
  - id: lvis
    use: eval/lvis
    in: {annotations: ./brought.json, detections: ./detections.parquet, classes: ./classes.json}
    with: {iou_type: "${of}"}
  - id: train
    use: detector/train
    in: {images: ./images, annotations: ./brought.json, classes: ./classes.json}
    with: {network: toy, masks: true, training: {steps: 2, checkpoint_every: 2, batch_size: 1, max_size: [96, 96], min_size: [96, 96]}}
"#;

/// A world whose annotations are brought, after a change to their json.
fn brought(world: &World, change: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(annotations(world, "coco")).unwrap()).unwrap();
    change(&mut json);
    world.write("brought.json", json.to_string());
    world.write("classes.json", fs::read(world.find(&["annotations-split", "classes.json"])).unwrap());
    world.write("brought.yaml", BROUGHT);
    fs::create_dir_all(world.path("images")).unwrap();
}

fn labels(json: &mut Value) -> &mut Vec<Value> {
    json["annotations"].as_array_mut().unwrap()
}

/// Makes an outline for a label.
type Outline<'a> = &'a dyn Fn(&Value) -> Value;

#[test]
fn outlines_that_draw_nothing_are_refused_where_masks_are_asked_for() {
    let world = world_with(Masks::Drawn);
    let loaded = Annotations::load(&annotations(&world, "coco")).unwrap();
    let size = |label: &Value| {
        let image = loaded.image(ImageId(label["image_id"].as_u64().unwrap())).unwrap();
        [image.height, image.width]
    };
    let empty_list = |_: &Value| json!([]);
    let two_corners = |_: &Value| json!([[1.0, 1.0, 5.0, 5.0]]);
    let no_pixel = |label: &Value| json!({"size": size(label), "counts": [size(label).iter().product::<u32>()]});
    let empty: [(Outline<'_>, &str); 3] = [
        (&empty_list, "an empty list as `segmentation`"),
        (&two_corners, "a `segmentation` of polygons with fewer than three corners"),
        (&no_pixel, "a `segmentation` of run lengths without a pixel"),
    ];
    for (segmentation, why) in empty {
        brought(&world, |json| {
            for label in labels(json).iter_mut().filter(|label| label["iscrowd"] == 0).take(2) {
                label["segmentation"] = segmentation(label);
            }
        });
        world.run(["run", "./brought.yaml", "--until", "coco"]).success();
        world.run(["run", "./brought.yaml", "--until", "lvis"]).success();
        for step in ["coco", "lvis", "train"] {
            let refused = world.run(["run", "./brought.yaml", "--until", step, "--set", "of=masks"]);
            assert_eq!(refused.code, 4, "{step} {why}: {}", refused.stderr);
            assert!(refused.stderr.contains("annotations: annotation ") && refused.stderr.contains(" of image "), "{}", refused.stderr);
            assert!(refused.stderr.contains(&format!(" has {why}; 2 of ")), "{step}: {}", refused.stderr);
        }
    }
}

/// What is said of a run: below its tables, in its report, in JSON, and in the result itself.
fn warnings(world: &World) -> Vec<String> {
    let run = world.run(["run", "./brought.yaml", "--until", "coco"]).success();
    let json = world.run(["report", "--json"]).success();
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    let said = json["report"]["evaluations"][0]["warnings"].as_array().unwrap();
    let said: Vec<String> = said.iter().map(|words| words.as_str().unwrap().to_owned()).collect();
    let lines: String = said.iter().map(|words| format!("warning: {words}\n")).collect();
    let (_, table) = run.stdout.split_once("coco (eval/coco)\n").unwrap();
    // A header and three groups, then the warnings, then an empty line.
    let below: String = table.lines().skip(4).take_while(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect();
    assert_eq!(below, lines, "{}", run.stdout);
    world.run(["report", "--output", "report.html"]).success();
    let page = fs::read_to_string(world.path("report.html")).unwrap();
    assert_eq!(page.matches("Warning: ").count(), said.len());
    assert!(evaluations(world, "coco").iter().any(|evaluation| evaluation.warnings == said));
    said
}

#[test]
fn numbers_that_mislead_are_said_with_counts_at_the_table() {
    let world = world_with(Masks::None);
    brought(&world, |_| {});
    assert_eq!(warnings(&world), Vec::<String>::new());

    brought(&world, |json| labels(json).iter_mut().for_each(|label| label["area"] = 0.into()));
    let n = |is_counted: fn(&&Value) -> bool| {
        let json: Value = serde_json::from_slice(&fs::read(world.path("brought.json")).unwrap()).unwrap();
        json["annotations"].as_array().unwrap().iter().filter(is_counted).count()
    };
    let n_objects = n(|label| label["iscrowd"] == 0);
    assert_eq!(
        warnings(&world),
        [format!("{n_objects} of {n_objects} annotations have area 0, so they count as small: APs, APm and APl mean nothing")]
    );
    let lvis = world.run(["run", "./brought.yaml", "--until", "lvis"]).success();
    let n_all = n(|_| true);
    for words in [
        format!("\nwarning: {n_all} of {n_all} annotations have area 0: LVIS does not evaluate them\n"),
        "\nwarning: 12 of 12 images have no `neg_category_ids`: ".into(),
    ] {
        assert!(lvis.stdout.contains(&words), "{words}{}", lvis.stdout);
    }

    brought(&world, |json| labels(json).iter_mut().for_each(|label| label["iscrowd"] = 1.into()));
    assert_eq!(warnings(&world), [format!("{n_all} of {n_all} annotations are crowds (`iscrowd: 1`), so no object is left to evaluate")]);

    brought(&world, |json| {
        for label in labels(json) {
            let [x, y, width, height] = [0, 1, 2, 3].map(|place| label["bbox"][place].as_f64().unwrap());
            label["bbox"] = json!([x, y, x + width, y + height]);
        }
    });
    let said = warnings(&world);
    assert!(said.len() == 1 && said[0].contains("the annotations seem to have corners where COCO has sizes"), "{said:?}");
}

#[test]
fn images_that_the_detector_never_saw_are_said_at_the_table() {
    let world = world_with(Masks::None);
    world.write("detector.safetensors", untrained_detector());
    brought(&world, |_| {});
    let loaded = Annotations::load(&world.path("brought.json")).unwrap();
    for image in &loaded.images {
        world.write(&format!("images/{}", image.file_name), fs::read(world.find(&["toy-world", &image.file_name])).unwrap());
    }
    let broken = &loaded.images[3];
    let n_objects = loaded.annotations.iter().filter(|object| object.image_id == broken.id && !object.is_crowd).count();
    let pipeline = BROUGHT.replace("./detections.parquet", "test.detections");
    let test = "  - id: test\n    use: detector/test\n    in: {images: ./images, annotations: ./brought.json, classes: ./classes.json, detector: ./detector.safetensors}\n    \
                with: {max_per_image: 5}\n    on_bad_item: skip\n    max_failed_ratio: 0.2\n";
    world.write("brought.yaml", pipeline.clone() + test);
    assert_eq!(warnings(&world), Vec::<String>::new());
    world.write(&format!("images/{}", broken.file_name), "broken");
    let expected = format!(
        "1 of 12 images were skipped by an earlier step (`on_bad_item: skip`, or a dry run): their {n_objects} objects count as missed"
    );
    assert!(n_objects > 0);
    assert_eq!(warnings(&world), std::slice::from_ref(&expected));
    let report: Value = serde_json::from_str(&world.run(["report", "--json"]).success().stdout).unwrap();
    assert_eq!(report["report"]["evaluations"][0]["n_images_without_detections"], 1, "{report}");
    // The report says it at its top, and shows the images that the detector read.
    let page = fs::read_to_string(world.path("report.html")).unwrap();
    let (head, rest) = page.split_once("</header>").unwrap();
    assert!(head.contains("coco: 1 image was not looked at by the detector") && head.contains("1 item skipped</a> (test 1)"), "{head}");
    assert!(rest.contains("Pictures of coco</h2>") && rest.contains(&format!("<td>{}</td>", broken.file_name)), "{rest}");
    assert_eq!((rest.matches("<figure><svg viewBox").count(), rest.matches("data:image/jpeg;base64,").count()), (12, 11));
    assert_eq!(rest.matches("Skipped by an earlier step: no detections.<br><strong>The image cannot be shown:</strong>").count(), 1);
    // Without their folder the boxes remain.
    fs::rename(world.path("images"), world.path("moved")).unwrap();
    world.run(["report", "--output", "report.html"]).success();
    let page = fs::read_to_string(world.path("report.html")).unwrap();
    assert_eq!((page.matches("<figure><svg viewBox=\"0 0 1").count(), page.matches("data:image/jpeg;base64,").count()), (12, 0));
    assert_eq!(page.matches("The image cannot be shown:</strong> ").count(), 12);
    fs::rename(world.path("moved"), world.path("images")).unwrap();
    // An image in which nothing is found was looked at nevertheless.
    world.write("brought.yaml", pipeline + &test.replace("max_per_image: 5", "score_threshold: 0.999"));
    assert_eq!(warnings(&world), [expected]);
    assert!(read_table(&world.find(&["detector-test", "detections.parquet"])).len() <= 55);
}

#[test]
fn a_results_file_has_the_category_ids_of_the_json_that_was_brought() {
    let world = world_with(Masks::None);
    world.write("detector.safetensors", untrained_detector());
    // Ids with gaps, in another order than the classes; `split` counts them anew from 0.
    let gapped = |id: u64| 5000 - 17 * id;
    brought(&world, |json| {
        json["categories"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .for_each(|category| category["id"] = gapped(category["id"].as_u64().unwrap()).into());
        labels(json).iter_mut().for_each(|label| label["category_id"] = gapped(label["category_id"].as_u64().unwrap()).into());
    });
    let pipeline = r#"version: 1
name: gaps
stages:
  - {id: world, use: toy/world, with: {seed: 7, train_images: 6, val_images: 12, web_images: 40, held_out_images: 60, side_px: 160}}
  - {id: split, use: annotations/split, in: {annotations: ./brought.json, classes: ./classes.json}}
  - {id: test, use: detector/test, in: {images: world.images, annotations: split.annotations, classes: split.classes, detector: ./detector.safetensors}, with: {max_per_image: 12}}
  - {id: export, use: detections/export, in: {detections: test.detections, annotations: ./brought.json}}
"#;
    world.write("gaps.yaml", pipeline);
    world.run(["run", "./gaps.yaml"]).success();
    let found = read_table(&world.find(&["detector-test", "detections.parquet"]));
    let results: Vec<Value> = serde_json::from_slice(&fs::read(world.find(&["detections-export", "results.json"])).unwrap()).unwrap();
    assert!(found.len() > 12 && found.iter().any(|detection| detection.category_id.0 > 0));
    let ids = |results: &[Value]| results.iter().map(|entry| entry["category_id"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(ids(&results), found.iter().map(|detection| gapped(detection.category_id.0)).collect::<Vec<_>>());

    // Or the detections' own ids; and images that the annotations lack are left out, or not.
    let exported = |world: &World, parameter: &str| -> Vec<Value> {
        let changed = world.run(["run", "./gaps.yaml", "--set", parameter, "--set", "export.in.annotations=./fewer.json"]).success();
        let report = changed.stderr.contains("detections are not exported");
        assert_eq!(report, parameter.contains("category"), "{}", changed.stderr);
        world.run(["export", "./gaps.yaml", "export", "out", "--set", parameter, "--set", "export.in.annotations=./fewer.json"]).success();
        serde_json::from_slice(&fs::read(world.path("out/results.json")).unwrap()).unwrap()
    };
    let mut fewer: Value = serde_json::from_slice(&fs::read(world.path("brought.json")).unwrap()).unwrap();
    let dropped = fewer["images"].as_array_mut().unwrap().remove(0)["id"].as_u64().unwrap();
    fewer["annotations"].as_array_mut().unwrap().retain(|annotation| annotation["image_id"] != dropped);
    world.write("fewer.json", fewer.to_string());
    let own = exported(&world, "export.category_ids=detections");
    let kept: Vec<u64> = found.iter().filter(|it| it.image_id.0 != dropped).map(|it| it.category_id.0).collect();
    assert!(kept.len() < found.len());
    assert_eq!(ids(&own), kept);
    assert_eq!(ids(&exported(&world, "export.images=detections")), ids(&results));

    // Detections are not judged by annotations that mean other classes by the same ids.
    brought(&world, |json| {
        let categories = json["categories"].as_array_mut().unwrap();
        let (first, second) = (categories[0]["name"].clone(), categories[1]["name"].clone());
        (categories[0]["name"], categories[1]["name"]) = (second, first);
    });
    let refused = world.run(["run", "./brought.yaml", "--until", "coco"]);
    assert!(refused.code == 4 && refused.stderr.contains("detections: category 0 is `"), "{}", refused.stderr);

    // Nor are they exported for a json without one of their classes.
    brought(&world, |json| {
        for category in json["categories"].as_array_mut().unwrap() {
            category["name"] = format!("a {}", category["id"]).into();
        }
    });
    let refused = world.run([
        "run",
        "./gaps.yaml",
        "--until",
        "export",
        "--set",
        "split.in.annotations=world.val",
        "--set",
        "split.in.classes=world.classes",
    ]);
    assert!(refused.code == 4 && refused.stderr.contains("annotations: no category is named `"), "{}", refused.stderr);
}
