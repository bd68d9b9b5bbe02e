//! What people bring: each folder of `tests/reports/` is a small input of the kind that somebody complained of, with what its user
//! rightly expects in its README. Every one is run as its README says.

use std::{fs, path::PathBuf};

use crate::support::{Output, World, copy};

/// How a folder's command ends.
struct Report {
    folder: &'static str,
    code: i32,
    /// What the program says on the way.
    says: &'static [&'static str],
}

const fn report(folder: &'static str, code: i32, says: &'static [&'static str]) -> Report {
    Report { folder, code, says }
}

const CHECKPOINTS: &[Report] = &[
    report("02-checkpoint-with-nan", 4, &["clip.pt: visual.proj: expected finite numbers, found 1 of 256 that are not"]),
    report("03-fine-tuned-openai-weights", 4, &["cannot tell which GELU", "`with: {clip: {gelu: quick}}`"]),
    report("04-weights-under-model_state_dict", 0, &["open_clip's names", "every number is finite"]),
    report("05-extra-tensor-logit_bias", 0, &["embeddings do not depend on `logit_bias`, which is not used"]),
    report("23-names-of-checkpoints", 0, &["a  done", "b  ", "c  "]),
    report("26-checkpoint-without-logit_scale", 4, &["cannot tell which GELU", "`with: {clip: {gelu: quick}}`"]),
    report("27-prefix-of-a-compiled-model", 4, &["cannot tell which GELU"]),
    report("28-prefix-of-a-lightning-module", 4, &["cannot tell which GELU"]),
    report(
        "29-two-clips-in-one-file",
        4,
        &["expected one CLIP, found 2: under `state_dict.model.`, under `state_dict.teacher.`", "prefix"],
    ),
    report("43-checkpoint-that-was-unpacked", 4, &["unpacked into a folder", "`cd ./clip.pt && zip -0 -r ../packed.pt archive`"]),
];

const PROPOSALS: &[Report] = &[
    report("01-proposals-in-file-order", 4, &["the boxes fit both orders", "`with: {order: file}`", "`with: {order: id}`"]),
    report("21-image-without-proposals", 0, &["proposals  done"]),
    report("22-proposals-by-id", 0, &["proposals  done"]),
    report("22-proposals-by-path", 0, &["proposals  done"]),
    report("25-proposals-in-file-order-other-sizes", 0, &["the boxes fit that order only (`with: {order: file}`)"]),
    report("40-proposals-array-of-arrays", 0, &["proposals  done"]),
    report("41-image-without-proposals-1d", 0, &["proposals  done"]),
    report("42-proposals-as-plain-lists", 0, &["proposals  done"]),
];

const ANNOTATIONS: &[Report] = &[
    report("06-masks-of-empty-outlines", 4, &["annotation 1 of image 1 has an empty list as `segmentation`"]),
    report(
        "07-box-outside-its-image",
        0,
        &[
            "of 9 annotated boxes 1 lie outside their image, 1 reach more than 1 px outside it (annotation 1 is the first)",
            "2 of 9 annotated boxes are skipped: 1 lie outside their image, 1 are smaller than 4 px once clipped to it (annotation 1 is",
        ],
    ),
    report("08-class-names-as-folders", 0, &["folder  done"]),
    report("14-ids-as-floats", 0, &["split  done"]),
    report("15-iscrowd-false", 0, &["split  done"]),
    report("16-byte-order-mark", 0, &["split  done"]),
    report("17-outline-as-flat-list", 0, &["split  done"]),
    report(
        "18-panoptic-file",
        4,
        &["ann.json: expected a COCO or LVIS annotation file, found a panoptic one (`segments_info`)", "give the `instances` json"],
    ),
    report(
        "24-class-list-of-another-shape",
        4,
        &["classes.json: expected an object", "`{\"base\": [\"cat\", ...], \"novel\": [\"dog\", ...]}`"],
    ),
    report("30-category-ids-as-text", 0, &["split  done"]),
    report(
        "31-annotation-ids-are-uuids",
        4,
        &["annotations[0].id: expected a whole number of 0 or more, found the text \"c33c-0001\"", "number the annotations"],
    ),
    report("32-sizes-as-floats", 0, &["split  done"]),
    report("33-outline-as-empty-text", 0, &["split  done"]),
    report("34-nan-in-a-box", 4, &["annotations[4].bbox[2]: expected a number, found NaN, which is no json", "json has no NaN"]),
    report("35-web-page-called-json", 4, &["ann.json: expected a COCO or LVIS annotation file, found a web page", "download it again"]),
    report("36-annotation-ids-from-0", 0, &["split  done"]),
];

const IMAGES: &[Report] = &[
    report("09-image-not-there-with-skip", 0, &["000002.jpg", "not in the folder of images (2 files)", "1 item skipped"]),
    report("10-image-smaller-than-a-patch", 0, &["1.png", "200 x 5 px, but the network needs 8 px on both sides"]),
    report("11-links-in-the-images-folder", 0, &["skipped a dead link (old.jpg), a folder within itself (again)"]),
    report("12-webp-named-jpg", 0, &["globals  done"]),
    report(
        "13-turned-by-exif",
        4,
        &[
            "width and height are exchanged, and the file has the EXIF orientation 6, by which viewers turn it",
            "turn the pixels and drop the tag",
        ],
    ),
    report("19-images-without-annotations", 0, &["globals  done"]),
    report(
        "20-file-names-backslash",
        0,
        &["3 of 3 images are found by another spelling of their names: `photos\\000001.jpg` is `photos/000001.jpg` in the folder"],
    ),
    report("20-file-names-dot-slash", 0, &["globals  done"]),
    report(
        "20-file-names-percent",
        0,
        &["3 of 3 images are found by another spelling of their names: `my%20000001.jpg` is `my 000001.jpg` in the folder"],
    ),
    report(
        "37-file-names-decomposed",
        0,
        &["3 of 3 images are found by another spelling of their names: `caf\u{e9} 000001.jpg` is `cafe\u{301} 0"],
    ),
    report("38-gif-named-jpg", 0, &["globals  done"]),
    report(
        "39-tiff-named-jpg",
        4,
        &["a.jpg: expected a JPEG, PNG, WebP or GIF image, found a TIFF", "it is a TIFF with another extension: convert it"],
    ),
];

fn folders() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reports"))
}

/// Types what a folder's README says, in a copy of the folder.
fn tried(folder: &str) -> (World, Output) {
    let world = World::new();
    copy(&folders().join(folder), &world.path(""));
    let readme = fs::read_to_string(world.path("README.md")).unwrap();
    let (_, command) = readme.split_once("Type, in this folder: `").unwrap();
    let (command, _) = command.split_once("`\n").unwrap();
    let command = command.replace("\"$(mktemp -d)\"", ".ovenbird");
    let mut output = None;
    for part in command.split("; ") {
        let mut words = part.split(' ');
        output = Some(match words.next().unwrap() {
            "ovenbird" => world.run(words),
            "sh" => {
                let mut shell = std::process::Command::new("sh");
                shell.args(words).current_dir(world.path(""));
                world.output(shell)
            }
            other => panic!("{folder}: {other}?"),
        });
    }
    (world, output.unwrap())
}

fn check(reports: &[Report]) {
    for Report { folder, code, says } in reports {
        let (_world, output) = tried(folder);
        let said = format!("{}{}", output.stdout, output.stderr);
        assert_eq!(output.code, *code, "{folder}: {said}");
        for words in *says {
            assert!(said.contains(words), "{folder}: `{words}` is missing in:\n{said}");
        }
    }
}

#[test]
fn every_folder_is_tried() {
    let mut there: Vec<String> = fs::read_dir(folders()).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    let mut tried: Vec<&str> = [CHECKPOINTS, PROPOSALS, ANNOTATIONS, IMAGES].into_iter().flatten().map(|report| report.folder).collect();
    tried.sort_unstable();
    assert_eq!(tried, there);
}

#[test]
fn checkpoints_are_read_or_named() {
    check(CHECKPOINTS);
}

#[test]
fn proposals_are_read_or_named() {
    check(PROPOSALS);
}

#[test]
fn annotations_are_read_or_named() {
    check(ANNOTATIONS);
}

#[test]
fn images_are_read_or_named() {
    check(IMAGES);
}

#[test]
fn proposals_in_the_order_that_is_said_find_every_object() {
    let (world, _) = tried("01-proposals-in-file-order");
    world.run(["run", "./pipeline.yaml", "--set", "proposals.order=file"]).success();
    let json: serde_json::Value = serde_json::from_str(&world.run(["report", "--json"]).success().stdout).unwrap();
    assert_eq!(json["report"]["evaluations"][0]["groups"]["all"]["ar_100"], 1.0, "{json}");
}

/// A checkpoint that asks something, once the pipeline answers: with which settings, and what is said then.
const ANSWERED: &[(&str, &[&str], &str)] = &[
    ("26-checkpoint-without-logit_scale", &["gelu=quick"], "the checkpoint has no `logit_scale`: embeddings do not need it"),
    ("27-prefix-of-a-compiled-model", &["gelu=quick"], ""),
    (
        "28-prefix-of-a-lightning-module",
        &["gelu=quick"],
        "the weights are under `state_dict.clipmodel.`; left out of the file: `state_dict.ff_head.weight`",
    ),
    (
        "29-two-clips-in-one-file",
        &["gelu=quick", "prefix=teacher"],
        "the weights are under `state_dict.teacher.`; left out of the file: `state_dict.model.",
    ),
    (
        "29-two-clips-in-one-file",
        &["gelu=quick", "prefix=state_dict.model"],
        "the weights are under `state_dict.model.`; left out of the file: `state_dict.teacher.",
    ),
];

#[test]
fn a_checkpoint_that_asks_is_read_once_it_has_an_answer() {
    for (folder, settings, says) in ANSWERED {
        let (world, asked) = tried(folder);
        let settings: Vec<String> = settings.iter().map(|setting| format!("prompts.clip.{setting}")).collect();
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        let output = world.run(["run", "./pipeline.yaml"].into_iter().chain(settings)).success();
        let said = format!("{}{}", output.stdout, output.stderr);
        assert!(asked.code == 4 && said.contains(says), "{folder}: {said}");
        // Nothing is left out of a file that has nothing else.
        assert_eq!(said.contains("left out"), says.contains("left out"), "{folder}: {said}");
    }
}

#[test]
fn a_checkpoint_that_was_unpacked_is_read_once_it_is_packed_as_the_hint_says() {
    let (world, output) = tried("43-checkpoint-that-was-unpacked");
    let (_, command) = output.stderr.split_once("without compression: `").unwrap();
    let (command, _) = command.split_once('`').unwrap();
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", command]).current_dir(world.path(""));
    if world.output(shell).code == 127 {
        crate::support::skip("zip is not installed");
        return;
    }
    world.run(["doctor", "--clip", "packed.pt"]).success();
    assert_eq!(world.run(["doctor", "--clip", "clip.pt"]).code, 4);
}

#[test]
fn images_that_are_not_there_fail_a_stage_that_may_not_leave_them_out() {
    let (world, _) = tried("09-image-not-there-with-skip");
    let pipeline = fs::read_to_string(world.path("pipeline.yaml")).unwrap();
    world.write("pipeline.yaml", pipeline.replace("    on_bad_item: skip\n    max_failed_ratio: 0.5\n", ""));
    let failed = world.run(["run", "./pipeline.yaml"]);
    assert_eq!(failed.code, 4, "{}", failed.stderr);
    for words in ["1 of 3 images are not in the folder (2 files): `000002.jpg`", "skip them: `on_bad_item: skip`"] {
        assert!(failed.stderr.contains(words), "{}", failed.stderr);
    }
}

/// The names of a world's JPEGs below a stage's output, from the class on.
fn crops(world: &World) -> Vec<String> {
    let names = world.units().into_keys().filter(|name| name.contains("crops-folder") && name.ends_with(".jpg"));
    names.map(|name| name.split_once("/images/").unwrap().1.to_owned()).collect()
}

#[test]
fn boxes_that_miss_their_image_have_no_crop_and_every_class_has_a_folder() {
    let (world, output) = tried("07-box-outside-its-image");
    output.success();
    let expected = ["crane/1-3", "crane/2-6", "crane/3-9", "owl/3-7", "wren/1-2", "wren/2-5", "wren/3-8"].map(|name| format!("{name}.jpg"));
    assert_eq!(crops(&world), expected);

    let (world, output) = tried("08-class-names-as-folders");
    output.success();
    let mut folders: Vec<String> = crops(&world).iter().map(|name| name.split_once('/').unwrap().0.to_owned()).collect();
    folders.dedup();
    assert_eq!(folders, ["%2E.", "%2Ehidden", "cup%2Fmug", "cup_mug"]);
}

#[test]
fn what_is_left_out_or_named_before_a_network_sees_it_yields_no_embedding() {
    for (folder, n_rows) in [("09-image-not-there-with-skip", 2), ("10-image-smaller-than-a-patch", 2), ("12-webp-named-jpg", 1)] {
        let (world, _) = tried(folder);
        let rows = world.units().into_iter().filter(|(name, _)| name.contains("clip-globals") && name.ends_with("unit.json"));
        let rows: Vec<u64> = rows
            .map(|(_, record)| serde_json::from_slice::<serde_json::Value>(&record).unwrap()["metrics"]["rows"].as_u64().unwrap())
            .collect();
        assert_eq!(rows.iter().sum::<u64>(), n_rows, "{folder}");
    }
}
