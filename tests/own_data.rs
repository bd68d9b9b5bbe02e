//! What somebody has who begins: a folder of pictures, a json of their own, and names of classes.

use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
};

use serde_json::{Value, json};

use crate::support::World;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const REPORTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reports");

const PICTURES: &str = "version: 1
name: pictures
stages:
  - id: list
    use: annotations/folder
    in: {images: ./pictures}
  - id: globals
    use: clip/globals
    in: {images: ./pictures, annotations: list.annotations, checkpoint: ./clip.pt}
    with: {resize: square, clip: {precision: f32}}
";

/// A folder of three pictures, and of other things.
fn pictures() -> World {
    let world = World::new();
    let golden = |name: &str| fs::read(format!("{GOLDEN}/images/{name}")).unwrap();
    world.write("clip.pt", fs::read(format!("{REPORTS}/09-image-not-there-with-skip/clip.pt")).unwrap());
    world.write("pictures.yaml", PICTURES);
    world.write("pictures/b.png", golden("rgb.png"));
    world.write("pictures/a/\u{e9} 1%20.JPG", golden("full.jpg"));
    world.write("pictures/a/.hidden.jpg", "no image");
    world.write("pictures/a/notes.txt", "no image");
    world.write("pictures/a/x.webp", "no image");
    symlink("b.png", world.path("pictures/c.png")).unwrap();
    symlink("gone.png", world.path("pictures/d.png")).unwrap();
    symlink(".", world.path("pictures/e")).unwrap();
    fs::write(world.path("pictures").join(std::ffi::OsStr::from_bytes(b"\xff.png")), golden("rgb.png")).unwrap();
    world
}

/// The newest list of images that was published.
fn list(world: &World) -> Value {
    let lists = world.units().into_keys().filter(|name| name.contains("annotations-folder") && name.ends_with("annotations.json"));
    let newest = lists.max_by_key(|name| fs::metadata(world.path(".ovenbird").join(name)).unwrap().modified().unwrap()).unwrap();
    serde_json::from_slice(&fs::read(world.path(".ovenbird").join(newest)).unwrap()).unwrap()
}

#[test]
fn a_folder_of_pictures_is_embedded_without_annotations() {
    let world = pictures();
    let output = world.run(["run", "./pictures.yaml"]).success();
    assert!(
        output.stderr.contains("2 files are not named .jpg, .jpeg or .png, and are left out: `a/notes.txt`, `a/x.webp`"),
        "{}",
        output.stderr
    );
    let [width, height] = {
        let found = list(&world);
        let names: Vec<&str> = found["images"].as_array().unwrap().iter().map(|image| image["file_name"].as_str().unwrap()).collect();
        assert_eq!(names, ["a/\u{e9} 1%20.JPG", "b.png", "c.png"]);
        assert_eq!((&found["annotations"], &found["categories"]), (&json!([]), &json!([])));
        assert_eq!(found["images"][1], json!({"id": 2, "file_name": "b.png", "width": 33, "height": 21}));
        [&found["images"][0]["width"], &found["images"][0]["height"]].map(|side| side.as_u64().unwrap())
    };
    assert!(width > 0 && height > 0);
    assert!(world.run(["run", "./pictures.yaml"]).success().stdout.contains("nothing to do"));
    // Another picture is another list; the rows that are there are not computed again.
    world.write("pictures/z.png", fs::read(format!("{GOLDEN}/images/grey.png")).unwrap());
    world.write("classes.json", r#"{"base": ["owl"], "novel": ["wren"]}"#);
    world.write("pictures.yaml", PICTURES.replace("./pictures}\n  - id: globals", "./pictures, classes: ./classes.json}\n  - id: globals"));
    let more = world.run(["run", "./pictures.yaml"]).success();
    assert!(more.stderr.contains("3 of 4 items copied from"), "{}", more.stderr);
    let found = list(&world);
    assert_eq!(found["images"].as_array().unwrap().len(), 4);
    assert_eq!(found["categories"], json!([{"id": 0, "name": "owl"}, {"id": 1, "name": "wren"}]));
}

#[test]
fn a_picture_without_a_header_is_an_item_that_failed_in_every_run() {
    let world = pictures();
    let policy = |ratio: &str| {
        let policy = format!("in: {{images: ./pictures}}\n    on_bad_item: skip\n    max_failed_ratio: {ratio}\n  - id: globals");
        PICTURES.replace("in: {images: ./pictures}\n  - id: globals", &policy)
    };
    world.write("pictures/b2.png", "\u{89}PNG cut");
    let failed = world.run(["run", "./pictures.yaml", "--until", "list"]);
    assert!(failed.code == 4 && failed.stderr.contains("pictures/b2.png: expected a JPEG, PNG, WebP or GIF image"), "{}", failed.stderr);
    world.write("strict.yaml", policy("0.1"));
    world.write("lax.yaml", policy("0.5"));
    let too_many = |words: &crate::support::Output| words.stderr.contains("1 of 4 items failed, more than max_failed_ratio 0.1 allows");
    let strict = world.run(["run", "./strict.yaml", "--until", "list"]);
    assert!(strict.code == 4 && too_many(&strict), "{}", strict.stderr);
    let lax = world.run(["run", "./lax.yaml"]).success();
    assert!(lax.stderr.contains("skipped b2.png"), "{}", lax.stderr);
    assert_eq!(list(&world)["images"].as_array().unwrap().len(), 3);
    // What a lax pipeline has made, a strict one does not reuse.
    let plan = world.run(["plan", "./strict.yaml"]).success();
    assert!(plan.stdout.contains("1 of 4 items failed, more than max_failed_ratio 0.1 allows"), "{}", plan.stdout);
    let strict = world.run(["run", "./strict.yaml", "--until", "list"]);
    assert!(strict.code == 4 && too_many(&strict), "{}", strict.stderr);
    assert!(world.run(["run", "./lax.yaml"]).success().stdout.contains("nothing to do"));
}

#[test]
fn a_folder_without_pictures_is_named() {
    let world = pictures();
    fs::remove_dir_all(world.path("pictures")).unwrap();
    world.write("pictures/readme.txt", "none");
    let output = world.run(["run", "./pictures.yaml"]);
    assert!(
        output.code == 4 && output.stderr.contains("expected JPEG and PNG files in the folder, found none among 1 files"),
        "{}",
        output.stderr
    );
}

/// A json of one's own: five images of 33 x 21 px, two classes.
fn labelled(n_images: usize) -> World {
    let world = World::new();
    let image = |id: usize| json!({"id": id, "file_name": format!("{id}.png"), "width": 33, "height": 21});
    let object = |id: usize| json!({"id": id, "image_id": id, "category_id": 1 + id % 2, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0});
    let labels = json!({
        "images": (1..=n_images).map(image).collect::<Vec<_>>(),
        "annotations": (1..=n_images).map(object).collect::<Vec<_>>(),
        "categories": [{"id": 1, "name": "owl"}, {"id": 2, "name": "tea pot: blue"}],
    });
    world.write("data/val.json", labels.to_string());
    for id in 1..=n_images {
        world.write(&format!("data/val/{id}.png"), fs::read(format!("{GOLDEN}/images/rgb.png")).unwrap());
    }
    world.write("clip.pt", fs::read(format!("{REPORTS}/09-image-not-there-with-skip/clip.pt")).unwrap());
    world
}

const LABELLED: &str = "version: 1
name: labelled
stages:
  - id: split
    use: annotations/split
    in: {annotations: ./data/val.json}
    with: {classes: {base: [owl], novel: ['tea pot: blue']}}
  - id: globals
    use: clip/globals
    in: {images: ./data/val, annotations: split.annotations, checkpoint: ./clip.pt}
    with: {resize: square, clip: {precision: f32}}
";

#[test]
fn class_lists_in_the_pipeline_give_what_a_class_file_gives() {
    let world = labelled(3);
    world.write("lists.yaml", LABELLED);
    world.run(["run", "./lists.yaml", "--until", "split"]).success();
    world.write("classes.json", r#"{"base": ["owl"], "novel": ["tea pot: blue"]}"#);
    let file = LABELLED
        .replace("val.json}", "val.json, classes: ./classes.json}")
        .replace("    with: {classes: {base: [owl], novel: ['tea pot: blue']}}\n", "");
    world.write("file.yaml", file);
    world.run(["run", "./file.yaml", "--until", "split"]).success();
    for name in ["annotations.json", "classes.json"] {
        let units = world.units();
        let made: Vec<&Vec<u8>> =
            units.iter().filter(|(path, _)| path.contains("annotations-split") && path.ends_with(name)).map(|(_, bytes)| bytes).collect();
        assert!(made.len() == 2 && made[0] == made[1], "{name}: {}", made.len());
    }
    let unknown = world.run(["run", "./lists.yaml", "--set", "split.classes.base=[owls]", "--until", "split"]);
    assert!(unknown.code == 4 && unknown.stderr.contains("`owls` (base[0]), did you mean `owl`?"), "{}", unknown.stderr);
}

#[test]
fn missing_images_are_items_and_too_many_are_refused_before_work_begins() {
    let world = labelled(5);
    fs::remove_file(world.path("data/val/2.png")).unwrap();
    let policy = |ratio: f64| format!("{LABELLED}    on_bad_item: skip\n    max_failed_ratio: {ratio}\n");
    world.write("strict.yaml", policy(0.1));
    let strict = world.run(["run", "./strict.yaml"]);
    let words = "1 of 5 items failed, more than max_failed_ratio 0.1 allows; the last: 2.png: not in the folder of images (4 files)";
    assert!(strict.code == 4 && strict.stderr.contains(words), "{}", strict.stderr);
    assert!(world.units_of("clip/globals").is_empty());
    world.write("lax.yaml", policy(0.2));
    let lax = world.run(["run", "./lax.yaml"]).success();
    assert!(lax.stderr.contains("skipped 2.png: ") && lax.stderr.contains("1 item skipped"), "{}", lax.stderr);
    // Missing and broken ones count together.
    world.write("data/val/3.png", "cut");
    let both = world.run(["run", "./lax.yaml"]);
    assert!(both.code == 4 && both.stderr.contains("2 of 5 items failed, more than max_failed_ratio 0.2 allows"), "{}", both.stderr);
}

#[test]
fn check_names_everything_that_is_wrong_and_writes_nothing() {
    let world = labelled(6);
    world.write("labelled.yaml", LABELLED);
    let sound = world.run(["check", "./labelled.yaml"]).success();
    assert_eq!(sound.stdout, "8 input files read, 6 images with their headers: 0 problems\n");
    fs::remove_file(world.path("data/val/1.png")).unwrap();
    fs::remove_file(world.path("data/val/4.png")).unwrap();
    world.write("data/val/2.png", fs::read(format!("{GOLDEN}/images/full.jpg")).unwrap());
    let whole = fs::read(format!("{GOLDEN}/images/rgb.png")).unwrap();
    world.write("data/val/5.png", &whole[..whole.len() - 40]);
    world.write("clip.pt", "no checkpoint");
    let quick = world.run(["check", "./labelled.yaml"]);
    assert!(quick.code == 4 && quick.stderr.contains("error: 3 problems of the inputs"), "{}{}", quick.stdout, quick.stderr);
    for words in [
        "globals: ./clip.pt: ",
        "globals: ./data/val: 2 of 6 images are not in the folder\n  1.png: not in the folder of images (4 files)\n  4.png: ",
        "globals: ./data/val: 1 of 6 images cannot be used\n  ./data/val/2.png: the annotations say 33 x 21 px",
    ] {
        assert!(quick.stdout.contains(words), "expected `{words}` in\n{}", quick.stdout);
    }
    let full = world.run(["check", "./labelled.yaml", "--full"]);
    assert!(full.code == 4 && full.stdout.contains("2 of 6 images cannot be used"), "{}", full.stdout);
    world.write("skip.yaml", format!("{LABELLED}    on_bad_item: skip\n    max_failed_ratio: 0.6\n"));
    let skipped = world.run(["check", "./skip.yaml"]);
    assert!(
        skipped.stdout.contains("skipped: `max_failed_ratio` 0.6 allows it") && skipped.stdout.ends_with(": 1 problem\n"),
        "{}",
        skipped.stdout
    );
    // Names of classes are compared with the annotations by the stage itself.
    let classes = world.run(["check", "./labelled.yaml", "--set", "split.classes.base=[owls]", "--until", "split"]);
    assert!(classes.code == 4 && classes.stdout.contains("did you mean `owl`?"), "{}", classes.stdout);
    assert!(!world.path(".ovenbird").exists());
}

#[test]
fn init_writes_a_pipeline_that_can_be_planned() {
    let world = labelled(3);
    let plan = |args: &[&str], steps: &[&str]| {
        let said = world.run(["init"].into_iter().chain(args.iter().copied())).success();
        let plan = world.run(["plan", "./mine.yaml"]).success();
        let found: Vec<&str> =
            plan.stdout.lines().filter(|line| !line.contains(" up to date, ")).map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(found, steps, "{}", plan.stdout);
        assert!(said.stdout.ends_with("ovenbird check ./mine.yaml\n"), "{}", said.stdout);
        let again = world.run(["init"].into_iter().chain(args.iter().copied()));
        assert!(again.code == 2 && again.stderr.contains("mine.yaml exists, and is not overwritten"), "{}", again.stderr);
        let text = fs::read_to_string(world.path("mine.yaml")).unwrap();
        fs::remove_file(world.path("mine.yaml")).unwrap();
        text
    };
    let json = ["data/val.json", "--images", "data/val"];
    assert!(plan(&json, &["split"]).contains("base: [owl, \"tea pot: blue\"]\n        novel: []\n"));
    let novel = [&json[..], &["--clip", "clip.pt", "--novel", "owl"]].concat();
    assert!(plan(&novel, &["split", "prompts", "globals"]).contains("base: [\"tea pot: blue\"]\n        novel: [owl]\n"));
    plan(&["data/val"], &["list"]);
    plan(&["data/val", "--clip", "clip.pt"], &["list", "globals"]);
    world.write("data/val.pkl", fs::read(format!("{REPORTS}/01-proposals-in-file-order/proposals.pkl")).unwrap());
    let detects = [&json[..], &["--clip", "clip.pt", "--proposals", "data/val.pkl"]].concat();
    plan(&detects, &["split", "proposals", "prompts", "regions", "detect", "evaluation"]);
    for (args, words) in [
        (&["data/val.json"][..], "the folder of the images is missing"),
        (&["data/val.json", "--images", "data/val", "--novel", "owls"], "data/val.json has no class `owls`"),
        (&["data/val", "--novel", "owl"], "are for a json of annotations"),
    ] {
        let refused = world.run(["init"].into_iter().chain(args.iter().copied()));
        assert!(refused.code == 2 && refused.stderr.contains(words), "{args:?}: {}", refused.stderr);
    }
    // A json that is none, and a checkpoint that is none.
    world.write("wrong.json", "[]");
    assert_eq!(world.run(["init", "wrong.json", "--images", "data/val"]).code, 4);
    assert_eq!(world.run(["init", "data/val", "--clip", "wrong.json"]).code, 4);
    assert!(!world.path("mine.yaml").exists());
}

/// Every command of the page is run, in a fresh folder. Blocks that begin with a file's name are written to it.
#[test]
fn the_page_about_your_own_data_can_be_followed_word_by_word() {
    let world = World::new();
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/your-data.md")).unwrap();
    let mut n_commands = 0;
    for block in page.split("\n```").skip(1).step_by(2) {
        let (kind, block) = block.split_once('\n').unwrap();
        let (first, rest) = block.split_once('\n').unwrap_or((block, ""));
        match (kind, first.strip_prefix("# ").and_then(|name| name.split_once(", more"))) {
            ("yaml", Some((name, _))) => {
                world.write(name, format!("{}{rest}\n", fs::read_to_string(world.path(name)).unwrap()));
            }
            ("yaml", None) if first.starts_with("# ") => world.write(&first[2..], rest),
            ("sh", _) => {
                for line in block.lines() {
                    let mut args: Vec<String> = Vec::new();
                    // Words in quotes have spaces.
                    for (place, part) in line.split('"').enumerate() {
                        if place % 2 == 1 { args.push(part.into()) } else { args.extend(part.split_whitespace().map(str::to_owned)) }
                    }
                    let output = world.run(args[1..].iter().map(String::as_str));
                    assert_eq!((args[0].as_str(), output.code), ("ovenbird", 0), "{line}\n{}{}", output.stdout, output.stderr);
                    n_commands += 1;
                }
            }
            _ => {}
        }
    }
    assert!(n_commands > 20, "{n_commands}");
    assert!(world.path("out/results.json").exists() && world.path("out/regions.arrow").exists());
}
