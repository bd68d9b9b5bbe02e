//! Bad input: one clear message, a documented exit code, and nothing already made is harmed.

use std::fs;

use crate::support::{World, skip, until};

/// A pipeline that splits `labels.json` and embeds `images/` with `clip.pt`.
const BROUGHT: &str = r#"version: 1
name: brought
stages:
  - id: split
    use: annotations/split
    in: {annotations: ./labels.json}
    with: {classes: coco-48-17}
  - id: globals
    use: clip/globals
    in: {images: ./images, annotations: ./labels.json, checkpoint: ./clip.pt}
"#;

fn check(world: &World, code: i32, words: &[&str]) {
    let output = world.run(["run", "./brought.yaml"]);
    assert_eq!(output.code, code, "{}", output.stderr);
    for words in words {
        assert!(output.stderr.contains(words), "expected `{words}` in\n{}", output.stderr);
    }
    assert!(output.stderr.contains("hint: "), "{}", output.stderr);
}

fn labels(images: &str, annotations: &str) -> String {
    format!(r#"{{"images": [{images}], "annotations": [{annotations}], "categories": [{{"id": 1, "name": "person"}}]}}"#)
}

const IMAGE: &str = r#"{"id": 3, "file_name": "a.png", "width": 33, "height": 21}"#;

/// Everything in place but what a test replaces.
fn brought() -> World {
    let world = World::new();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    world.write("brought.yaml", BROUGHT);
    world.write("labels.json", labels(IMAGE, ""));
    world.write("images/a.png", fs::read(format!("{golden}/images/rgb.png")).unwrap());
    world.write("clip.pt", fs::read(format!("{golden}/checkpoint/script.pt")).unwrap());
    world
}

#[test]
fn a_missing_file_is_named_before_anything_runs() {
    let world = brought();
    fs::remove_file(world.path("labels.json")).unwrap();
    check(&world, 4, &["no file or folder `./labels.json`", "line 6: stages.split.in.annotations"]);
    assert!(!world.path(".ovenbird").exists());
}

#[test]
fn json_that_is_cut_is_named_with_its_line() {
    let world = brought();
    world.write("labels.json", "{\"images\": [\n{\"id\": 1,");
    check(&world, 4, &["labels.json: expected a COCO or LVIS annotation file", "line 2 column"]);
}

#[test]
fn devices_that_a_stage_cannot_have_are_named_with_what_to_type() {
    let world = brought();
    world.write("brought.yaml", BROUGHT.replace("use: annotations/split\n", "use: annotations/split\n    resources: {gpu: 1}\n"));
    check(&world, 3, &["line 6: stages.split.resources.gpu: `annotations/split` runs no network: leave `gpu` out"]);
    world.write("brought.yaml", BROUGHT.replace("use: clip/globals\n", "use: clip/globals\n    resources: {gpu: 2}\n"));
    check(&world, 2, &["the run has 1 device, and `globals` asks for 2 (`resources.gpu`)", "such as `--device cuda:0,1`"]);
    assert!(!world.path(".ovenbird/runs").exists());
}

#[test]
fn contradictions_of_annotations_are_named_by_id() {
    let world = brought();
    let stray = r#"{"id": 8, "image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1]}"#;
    world.write("labels.json", labels(&format!("{IMAGE}, {IMAGE}"), stray));
    check(&world, 4, &["images[1].id: a second image with id 3", "annotations[0].image_id: 77 is not among the images"]);
}

#[test]
fn images_that_are_not_in_the_folder_are_counted_and_named() {
    let world = with_clip();
    let gone = |id: u64| format!(r#"{{"id": {id}, "file_name": "gone-{id}.jpg", "width": 33, "height": 21}}"#);
    world.write("labels.json", labels(&format!("{IMAGE}, {}, {}", gone(4), gone(5)), ""));
    check(&world, 4, &["2 of 3 images are not in the folder (1 files): `gone-4.jpg`, `gone-5.jpg`", "`on_bad_item: skip`"]);
}

#[test]
fn a_checkpoint_that_is_no_clip_says_which_tensors_do_not_fit() {
    let output = brought().run(["run", "./brought.yaml", "--until", "globals"]);
    assert!(output.code == 4 && output.stderr.contains("clip.pt"), "{}", output.stderr);
}

#[test]
fn a_truncated_checkpoint_is_named() {
    let world = brought();
    let bytes = fs::read(world.path("clip.pt")).unwrap();
    world.write("clip.pt", &bytes[..bytes.len() / 2]);
    check(&world, 4, &["clip.pt: ", "download or make it again"]);
}

/// With a CLIP that works, so that the images are reached.
fn with_clip() -> World {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "clip"]).success();
    let weights = fs::read(world.find(&["clip-pretrain", "clip.safetensors"])).unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    world.write("clip.safetensors", weights);
    world.write("brought.yaml", BROUGHT.replace("clip.pt", "clip.safetensors"));
    world.write("labels.json", labels(IMAGE, ""));
    world.write("images/a.png", fs::read(format!("{golden}/images/rgb.png")).unwrap());
    world
}

#[test]
fn images_that_are_cut_or_of_another_size_are_named_and_what_was_made_is_kept() {
    let world = with_clip();
    let before = world.units();
    let jpeg = fs::read(world.find(&["toy-world", "web_images/00000000.jpg"])).unwrap();
    world.write("images/b.jpg", &jpeg[..jpeg.len() / 2]);
    world.write("labels.json", labels(r#"{"id": 3, "file_name": "b.jpg", "width": 33, "height": 21}"#, ""));
    check(&world, 4, &["images/b.jpg: ", "cut short or damaged"]);
    world.write("labels.json", labels(r#"{"id": 3, "file_name": "a.png", "width": 21, "height": 33}"#, ""));
    check(&world, 4, &["images/a.png: the annotations say 21 x 33 px, the image has 33 x 21"]);
    let after = world.units();
    assert!(before.iter().all(|(name, bytes)| after.get(name) == Some(bytes)));
}

#[test]
fn a_pipeline_file_with_mistakes_names_all_of_them_with_lines_and_spellings() {
    let world = World::new();
    world.write(
        "wrong.yaml",
        r#"version: 1
name: wrong
variabels: {}
stages:
  - id: world
    use: toy/wrld
  - id: split
    use: annotations/split
    in: {annotations: wolrd.train}
    with: {kep: base}
  - id: detect
    use: detect/zero-shot
    in: {features: prompts.prompts, prompts: prompts.prompts, classes: split.classes, annotations: split.annotations}
    with: {temperature: -1}
  - id: prompts
    use: prompts/ensemble
    in: {classes: split.classes}
"#,
    );
    let output = world.run(["run", "./wrong.yaml"]);
    insta::assert_snapshot!(output.stderr, @r"
    error: 7 problems in ./wrong.yaml
      line 3: variabels: unknown key `variabels`, did you mean `variables`?
      line 6: stages.world.use: no stage `toy/wrld`, did you mean `toy/world`?
      line 9: stages.split.in.annotations: no step `wolrd`, did you mean `world`? (a file is written with a slash: ./wolrd.train)
      line 10: stages.split.with.kep: unknown key `kep`, did you mean `keep`?
      line 13: stages.detect.in.features: expected region-features, but `prompts.prompts` is prompts
      line 14: stages.detect.with.temperature: expected a number above 0, found -1.0
      line 17: stages.prompts.in.checkpoint: missing: `prompts/ensemble` needs checkpoint here (CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.)
    hint: correct the pipeline file; `ovenbird stages KIND` documents every parameter
    ");
    assert_eq!(output.code, 3);
    assert!(!world.path(".ovenbird").exists());
}

#[test]
fn class_lists_in_the_pipeline_are_checked_when_it_is_read() {
    let world = brought();
    for (lists, words) in [
        ("{base: [cat, cat], novel: []}", "line 7: stages.split.with.classes: the class list names `cat` twice"),
        ("{base: [cat], novel: [cat]}", "the class list names `cat` twice"),
        ("{base: [], novel: []}", "expected at least one class, found two empty lists"),
        ("{base: [cat]}", "stages.split.with.classes: expected the key `novel`, found none"),
        ("{base: [cat], novle: []}", "stages.split.with.classes.novle: unknown key `novle`, did you mean `novel`?"),
        ("{base: [cat, 7], novel: []}", "stages.split.with.classes.base[1]: expected text, found 7"),
        ("[cat, dog]", "expected `input`, `coco-48-17`, `lvis-frequency`, or two lists `{base: [..], novel: [..]}`, found a list"),
        ("coco", "unknown value `coco`, did you mean `coco-48-17`?"),
    ] {
        world.write("brought.yaml", BROUGHT.replace("coco-48-17", lists));
        let output = world.run(["plan", "./brought.yaml"]);
        assert!(output.code == 3 && output.stderr.contains(words), "{lists}: expected `{words}` in\n{}", output.stderr);
    }
}

#[test]
fn a_stage_without_items_takes_no_policy_for_them() {
    let world = brought();
    world.write("brought.yaml", BROUGHT.replace("use: annotations/split\n", "use: annotations/split\n    on_bad_item: skip\n"));
    let words = "line 6: stages.split.on_bad_item: `annotations/split` has no items that could be skipped: leave `on_bad_item: skip` out";
    check(&world, 3, &[words]);
    world.write("brought.yaml", BROUGHT.replace("use: annotations/split\n", "use: annotations/split\n    on_bad_item: fail\n"));
    world.run(["plan", "./brought.yaml"]).success();
}

#[test]
fn a_circle_is_named() {
    let world = World::new();
    world.write(
        "circle.yaml",
        "version: 1\nname: circle\nstages:\n  - {id: a, use: annotations/split, in: {annotations: b.annotations}, with: {classes: coco-48-17}}\n  - {id: b, use: annotations/split, in: {annotations: a.annotations}, with: {classes: coco-48-17}}\n  - {id: after, use: annotations/split, in: {annotations: b.annotations}, with: {classes: coco-48-17}}\n",
    );
    let output = world.run(["plan", "./circle.yaml"]);
    assert!(output.code == 3 && output.stderr.contains("wait for each other in a circle: a, b\n"), "{}", output.stderr);
}

#[test]
fn a_pipeline_of_a_newer_version_is_refused() {
    let world = World::new();
    world.write("new.yaml", "version: 9\nname: new\nstages: []\n");
    let output = world.run(["plan", "./new.yaml"]);
    assert!(output.code == 3 && output.stderr.contains("version 9 is newer than this program, which reads up to 1"), "{}", output.stderr);
}

#[test]
fn a_home_that_cannot_be_written_or_is_newer_is_refused() {
    let world = World::tiny();
    world.write("home", "a file where the home should be");
    let output = world.run(["run", "./tiny.yaml", "--home", "home"]);
    assert!(output.code == 5 && output.stderr.contains("home") && output.stderr.contains("hint: "), "{}", output.stderr);
    world.write(".ovenbird/format.json", r#"{"format": 9}"#);
    let output = world.run(["run", "./tiny.yaml"]);
    assert!(output.code == 5 && output.stderr.contains("written by a newer version (format 9"), "{}", output.stderr);
}

#[test]
fn a_folder_of_the_user_does_not_become_a_home() {
    let world = World::tiny();
    world.write("mine/thesis.tex", "years of work");
    for command in [["run", "./tiny.yaml", "--home", "mine"].as_slice(), &["verify", "--fix", "--home", "mine"]] {
        let output = world.run(command.iter().copied());
        assert!(output.code == 5 && output.stderr.contains("it has `thesis.tex` and no `format.json`"), "{}", output.stderr);
        assert!(output.stderr.contains("hint: choose a new or empty folder"), "{}", output.stderr);
    }
    assert_eq!(fs::read(world.path("mine/thesis.tex")).unwrap(), b"years of work");
    // Nor one with a folder of the same name as a home's.
    world.write("other/runs/exp1/model.pt", "weights");
    for command in
        [["run", "./tiny.yaml", "--home", "other"].as_slice(), &["verify", "--fix", "--home", "other"], &["status", "--home", "other"]]
    {
        let output = world.run(command.iter().copied());
        assert!(output.code == 5 && output.stderr.contains("is no home of ovenbird: it has `runs`"), "{}", output.stderr);
    }
    assert_eq!(fs::read_dir(world.path("other")).unwrap().count(), 1);
    assert!(!world.path("mine/quarantine").exists());
}

/// A tmpfs of 1 MiB stands for a full disk; mounting one needs root.
#[test]
fn a_full_disk_pauses_the_run_until_there_is_room_and_nothing_made_is_harmed() {
    let world = World::tiny();
    fs::create_dir(world.path("small")).unwrap();
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(world.path("small")).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        skip("a small file system cannot be mounted here");
        return;
    }
    world.write("small/filler", vec![1; 700 << 10]);
    let running = world.command(["run", "./tiny.yaml", "--home", "small/home", "--until", "val"]).spawn().unwrap();
    // The log itself may wait for room: what tells is that the program is still there and no step is done.
    std::thread::sleep(std::time::Duration::from_secs(4));
    let was_waiting = fs::read_to_string(format!("/proc/{}/stat", running.id())).is_ok_and(|stat| !stat.contains(") Z "));
    let more = std::process::Command::new("mount").args(["-o", "remount,size=64m"]).arg(world.path("small")).status().unwrap();
    let output = running.wait_with_output().unwrap();
    let clean = world.run(["verify", "--full", "--home", "small/home"]);
    assert!(std::process::Command::new("umount").arg(world.path("small")).status().unwrap().success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(more.success() && was_waiting && output.status.success(), "{stderr}");
    assert!(stderr.contains("the disk is full: paused") && stderr.contains("continues"), "{stderr}");
    assert_eq!(clean.code, 0, "{}", clean.stdout);
}

#[test]
fn a_home_that_vanishes_under_a_run_is_none_of_the_user_s_files() {
    let world = World::tiny();
    let mut running = world.command(["run", "./tiny.yaml", "--set", "clip.steps=100000", "--set", "clip.checkpoint_every=200"]);
    let running = running.spawn().unwrap();
    until(|| world.n_units() > 2);
    // What is being written makes it come back in part.
    until(|| fs::remove_dir_all(world.path(".ovenbird")).is_ok());
    let output = running.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
}

/// Names of before 0.1.0, in a file and in `--set`.
#[test]
fn an_old_name_is_refused_with_the_new_one() {
    let world = brought();
    world.write("brought.yaml", BROUGHT.replace("checkpoint: ./clip.pt}\n", "checkpoint: ./clip.pt}\n    with: {view: native}\n"));
    check(&world, 3, &["line 11: stages.globals.with.view: `view` is now called `resize`"]);
    world.write("brought.yaml", BROUGHT.replace("coco-48-17}", "coco-48-17, keep: all-min}"));
    check(&world, 3, &["line 7: stages.split.with.keep: the value `all-min` is now called `all-annotated`"]);
    world.write("brought.yaml", BROUGHT.replace("annotations/split", "coco/split"));
    check(&world, 3, &["line 5: stages.split.use: no stage `coco/split`: it is now called `annotations/split`"]);
    world.write("brought.yaml", BROUGHT);
    for (set, words) in
        [("globals.view=native", "no parameter `view`: `view` is now called `resize`"), ("split.keep=all-min", "`all-annotated`")]
    {
        let output = world.run(["plan", "./brought.yaml", "--set", set]);
        assert!(output.code == 2 && output.stderr.contains(words), "{set}: {}", output.stderr);
    }
}
