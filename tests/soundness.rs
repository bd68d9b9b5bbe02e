//! Nothing unsound is read, recorded or published: every kind of file, before every stage that reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, FileTimes},
    path::{Path, PathBuf},
    sync::{Mutex, atomic::AtomicU64},
};

use ovenbird_cache::{Digest, Error as CacheError, Manifest, Status, Store, inputs::InputFile};
use ovenbird_data::annotations::ImageId;
use ovenbird_stages::{
    Artifact as _, Context, Error, Inputs, OnBadItem, STAGES,
    artifacts::{Dtype, ImageFeaturesWriter, RegionFeatures, RegionFeaturesWriter},
    find,
};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::support::{
    World,
    toy_web::{self, ToyWeb},
};

/// Every stage there is, on a small world.
const EVERY_STAGE: &str = include_str!("soundness/every.yaml");

/// Flips a bit in the middle of a file, whose size and time of change stay.
fn flip(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
}

/// What a stage publishes of some inputs, by file and content; in a scratch home.
fn publish(manifest: &Manifest, inputs: &Inputs) -> Result<BTreeMap<String, Digest>, Error> {
    let scratch = tempfile::tempdir().unwrap();
    let store = Store::open(scratch.path()).unwrap();
    let _session = store.enter().unwrap();
    let recipe = &manifest.recipe;
    let entry = find(&recipe.kind).unwrap();
    let Ok(stage) = (entry.parse)(&recipe.params) else { panic!("{}", recipe.kind) };
    let (units, items) = stage.units(inputs)?.of(recipe);
    let context = Context {
        store: &store,
        kind: entry.kind,
        units: &units,
        items: &items,
        inputs,
        most_items: None,
        device: Device::Cpu,
        has_bf16: false,
        threads: 1,
        on_bad_item: OnBadItem::Skip { max_failed_ratio: 1.0 },
        n_failed: &AtomicU64::new(0),
        watch: &Mutex::default(),
        is_stopped: &|| false,
        report: &|_| {},
    };
    stage.run(&units, &context)?;
    let mut files = BTreeMap::new();
    for unit in units.iter().filter(|unit| unit.stays) {
        let Status::Valid(record) = store.unit(entry.kind, &unit.fingerprint).unwrap() else { panic!("{}", recipe.kind) };
        files.extend(record.files.iter().map(|file| (format!("{} {}", unit.index, file.name), file.content())));
    }
    Ok(files)
}

/// The inputs of an artifact of a home: of other artifacts that have the same content.
fn inputs_of(manifest: &Manifest, store: &Store, manifests: &[Manifest]) -> Inputs {
    let files = |wanted: &Digest| -> Vec<InputFile> {
        let made = manifests.iter().flat_map(|made| made.ports.iter().map(move |(port, digest)| (made, port, digest)));
        let (made, port, _) = made.into_iter().find(|(_, _, digest)| *digest == wanted).unwrap();
        let Status::Valid(artifact) = store.artifact(&made.recipe.kind, &made.fingerprint).unwrap() else { panic!("{}", made.recipe.kind) };
        artifact.port(port)
    };
    Inputs { ports: manifest.recipe.inputs.iter().map(|(port, digest)| (port.clone(), files(digest))).collect() }
}

/// Of every port of every stage a file of each ending has a bit flipped; the program's own files and the user's.
///
/// What follows is an error that names the file, or the same result: a file that the stage does not read, or only a part of.
#[test]
fn one_flipped_bit_of_any_file_is_found_by_every_stage_that_reads_it() {
    let (world, web) = (World::new(), ToyWeb::start(0, toy_web::of_world));
    world.write("every.yaml", EVERY_STAGE.replace("http://127.0.0.1:8391", &format!("http://{}", web.address)));
    world.run(["run", "./every.yaml"]).success();
    let store = Store::open(&world.path(".ovenbird")).unwrap();
    let manifests = store.manifests().unwrap();
    let kinds: BTreeSet<&str> = manifests.iter().map(|manifest| manifest.recipe.kind.as_str()).collect();
    assert_eq!(kinds, STAGES.iter().map(|entry| entry.kind).collect(), "every stage is in the pipeline of this test");

    // By stage and port: how many bits were found, and how many had no influence.
    let mut counts: BTreeMap<(&str, &str), [usize; 2]> = BTreeMap::new();
    for manifest in manifests.iter().filter(|manifest| !manifest.recipe.inputs.is_empty()) {
        let kind = &manifest.recipe.kind;
        let sound = inputs_of(manifest, &store, &manifests);
        let mut expected = None;
        for (port, files) in &sound.ports {
            let port_name = find(kind).unwrap().inputs.iter().find(|known| known.name == port).unwrap().name;
            if counts.contains_key(&(find(kind).unwrap().kind, port_name)) {
                continue;
            }
            let ending = |file: &InputFile| Path::new(&file.name).extension().map(ToOwned::to_owned);
            let endings: BTreeSet<_> = files.iter().map(ending).collect();
            // The first and the last of each: pictures to train with and to test with; of checkpoints the one that is read is the last.
            let of_ending = |wanted: &Option<_>| {
                let mut alike = files.iter().filter(move |file| ending(file) == *wanted);
                let first = alike.next();
                first.into_iter().chain(alike.next_back()).collect::<Vec<_>>()
            };
            for file in endings.iter().flat_map(of_ending) {
                for is_ours in [true, false] {
                    let folder = tempfile::tempdir().unwrap();
                    let hurt = folder.path().join(Path::new(&file.name).file_name().unwrap());
                    assert!(fs::copy(&file.path, &hurt).is_ok());
                    flip(&hurt);
                    let mut inputs = sound.clone();
                    for given in inputs.ports.values_mut().flatten().filter(|given| given.path == file.path) {
                        let unit = given.unit.filter(|_| is_ours);
                        // What a user brings is hashed whole.
                        let digest = if unit.is_some() { given.digest } else { Digest::of(&fs::read(&file.path).unwrap()) };
                        *given = InputFile { path: hurt.clone(), unit, digest, ..given.clone() };
                    }
                    let what = format!("{kind}, {port}, {}", file.name);
                    let counts = counts.entry((find(kind).unwrap().kind, port_name)).or_default();
                    match publish(manifest, &inputs) {
                        Err(Error::Cache(CacheError::Flipped { path, .. } | CacheError::Malformed { path, .. })) if is_ours => {
                            assert_eq!(path, hurt, "{what}");
                            counts[0] += 1;
                        }
                        Err(Error::Cache(CacheError::Changed { path, .. })) if !is_ours => {
                            assert_eq!(path, hurt, "{what}");
                            counts[0] += 1;
                        }
                        Err(error) => panic!("{what}: {error:?}"),
                        Ok(found) => {
                            let expected = expected.get_or_insert_with(|| publish(manifest, &sound).unwrap());
                            assert!(found == *expected, "{what}: another result");
                            counts[1] += 1;
                        }
                    }
                }
            }
        }
    }
    let ports = STAGES.iter().flat_map(|entry| entry.inputs.iter().map(|port| (entry.kind, port.name)));
    // Images whose sizes stand in `downloads` are looked for, not read; annotations only of rows that a file does not name itself, opened as every
    // other file of annotations; and an archive that no stage makes, which a test of its own changes.
    const LEFT_OUT: [(&str, &str); 3] =
        [("annotations/web", "images"), ("prompts/import", "annotations"), ("embeddings/import", "archive")];
    let missed: Vec<_> = ports.filter(|port| counts.get(port).is_none_or(|[n_found, _]| *n_found == 0)).collect();
    assert_eq!(missed, LEFT_OUT, "{counts:?}");
}

/// The digits of an evaluation are what everything is for.
#[test]
fn a_digit_of_an_evaluation_that_rots_is_shown_nowhere() {
    let world = World::tiny();
    let first = world.run(["run", "./tiny.yaml"]).success();
    let path = world.find(&["eval-coco", "evaluation.json"]);
    let sound = fs::read(&path).unwrap();
    let hurt = || {
        let text = String::from_utf8(sound.clone()).unwrap();
        let place = text.find("\"ap50\":0.0").unwrap() + "\"ap50\":0.".len();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, format!("{}9{}", &text[..place], &text[place + 1..])).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
    };
    let table = |text: &str| text[text.find("coco (eval/coco)").unwrap()..text.find("report:").unwrap()].to_owned();

    hurt();
    let refused = world.run(["report", "--json"]);
    assert!(refused.code != 0 && refused.stderr.contains("evaluation.json"), "{}{}", refused.stdout, refused.stderr);
    // The report that was written while it was sound stays.
    let page = world.run(["report"]).success();
    assert!(page.stdout.contains("not replaced, because a new report would not show coco.evaluation"), "{}", page.stdout);
    world.run(["report", "-o", "page.html"]).success();
    let page = fs::read_to_string(world.path("page.html")).unwrap();
    assert!(page.contains("Not shown") && page.contains("evaluation.json: content does not match its digest"));
    let again = world.run(["run", "./tiny.yaml"]).success();
    assert_eq!(table(&again.stdout), table(&first.stdout));
    assert_eq!(fs::read(&path).unwrap(), sound);

    hurt();
    let exported = world.run(["export", "./tiny.yaml", "coco", "out"]);
    assert!(exported.code != 0 && !world.path("out/evaluation.json").exists());
}

/// A pipeline whose first step takes a while, and whose second one reads a file of the user's.
fn with_own_file(world: &World) {
    let text = r#"version: 1
name: own
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 4, val_images: 4, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: 7, steps: 40, checkpoint_every: 4, batch_size: 8}
  - id: globals
    use: clip/globals
    in: {images: ./images, annotations: ./labels.json, checkpoint: clip.checkpoint}
    with: {resize: square, clip: {precision: f32}}
"#;
    world.write("own.yaml", text);
    world.write(
        "labels.json",
        r#"{"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}], "annotations": [], "categories": [{"id": 1, "name": "owl"}]}"#,
    );
}

fn picture(level: u8) -> Vec<u8> {
    let rgb = (0..40 * 40 * 3_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8 / 2 + level).collect();
    ovenbird_data::images::Image { width: 40, height: 40, rgb }.to_png()
}

/// Replaced after it was hashed and before it was read: what is published is of the file that is there.
#[test]
fn a_file_that_changes_during_a_run_is_looked_at_again() {
    let (world, clean) = (World::new(), World::new());
    for (world, level) in [(&world, 0), (&clean, 100)] {
        with_own_file(world);
        world.write("images/a.png", picture(level));
    }
    clean.run(["run", "./own.yaml"]).success();
    let running = world.command(["run", "./own.yaml"]).spawn().unwrap();
    crate::support::until(|| !world.units_of("clip/pretrain").is_empty());
    world.write("images/a.png", picture(100));
    let ended = running.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.contains("a.png: changed after it was hashed"), "{said}");
    assert!(said.contains("nothing was published, and the step is checked again"), "{said}");
    assert!(world.units() == clean.units());

    // Its old content again: other features, not those of the time between.
    world.write("images/a.png", picture(0));
    world.run(["run", "./own.yaml"]).success();
    assert_eq!(world.units_of("clip/globals").len(), 2);
    world.run(["verify", "--recompute", "100%"]).success();
}

/// What is published under a unit's name although it is not of its inputs, as of a program with a bug: sealed, and wrong.
#[test]
fn what_was_made_from_wrong_content_is_listed_and_made_again() {
    let (world, clean) = (World::tiny(), World::tiny());
    clean.run(["run", "./tiny.yaml"]).success();
    world.run(["run", "./tiny.yaml", "--until", "regions"]).success();
    // The regions of each image get the embeddings of another.
    let store = Store::open(&world.path(".ovenbird")).unwrap();
    let regions = |manifest: &&Manifest| manifest.recipe.kind == "clip/proposals";
    let manifest = store.manifests().unwrap().iter().find(regions).unwrap().clone();
    let mut units = Vec::new();
    for unit in &manifest.units {
        let features = RegionFeatures::open(&store.unit_port(unit, "features")).unwrap();
        let (rows, clip): (Vec<_>, _) = (features.rows().map(Result::unwrap).collect(), features.clip().unwrap());
        let items = store.items_of(unit).unwrap();
        store.remove_unit(&ovenbird_cache::unit_name(&unit.key.kind, &unit.key.fingerprint), "a test").unwrap();
        let draft = store.begin_unit(&unit.key).unwrap();
        let file = draft.create("features/regions.arrow").unwrap();
        let dim = rows[0].embeddings.len() / rows[0].boxes.len();
        let mut shard = RegionFeaturesWriter::new(file, &unit.key.fingerprint, Dtype::F16, dim, clip).unwrap();
        for row in &rows {
            let mut wrong = row.clone();
            wrong.embeddings.rotate_left(dim);
            wrong.embeddings[..dim].iter_mut().for_each(|number| *number = -*number);
            shard.push(wrong).unwrap();
        }
        shard.finish().unwrap();
        units.push(store.commit_unit(draft, unit.key.clone(), &items, unit.metrics.clone()).unwrap());
    }
    store.quarantine_manifest(&store.manifest_path("clip/proposals", &manifest.fingerprint), "a test").unwrap();
    store.commit_artifact(manifest.recipe.clone(), &["features"], units, manifest.made.clone()).unwrap();
    world.run(["run", "./tiny.yaml"]).success();
    let evaluation = |world: &World| fs::read(world.find(&["eval-coco", "evaluation.json"])).unwrap();
    assert!(evaluation(&world) != evaluation(&clean), "this test shows nothing");
    world.run(["verify", "--deep"]).success();

    let found = world.run(["verify", "--recompute", "100%"]);
    let listed = |text: &str, kind: &str| text.lines().any(|line| line.starts_with("tainted") && line.contains(kind));
    assert_eq!(found.code, 6, "{}", found.stdout);
    for kind in ["detect/zero-shot", "eval/coco", "eval/lvis"] {
        assert!(listed(&found.stdout, kind), "{kind} in {}", found.stdout);
    }
    assert!(!listed(&found.stdout, "clip/globals"), "{}", found.stdout);
    let fixed = world.run(["verify", "--recompute", "100%", "--fix"]);
    assert_eq!(fixed.code, 0, "{}{}", fixed.stdout, fixed.stderr);
    world.run(["verify", "--recompute", "100%"]).success();
    let again = world.run(["run", "./tiny.yaml"]).success();
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    let coco = |world: &World| {
        let report: Value = serde_json::from_str(&world.run(["report", "--json"]).success().stdout).unwrap();
        report["report"]["evaluations"].clone()
    };
    assert_eq!(coco(&world), coco(&clean));
}

/// Files that hold numbers, written by stages: none of them with one that is none.
#[test]
fn features_that_are_no_directions_are_not_published() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let _session = store.enter().unwrap();
    for (embedding, words) in [
        ([f32::NAN, 0.0], "1 numbers are not finite"),
        ([f32::INFINITY, 0.0], "1 numbers are not finite"),
        ([0.0, 0.0], "1 of 1 rows are all zero"),
        ([3.0, 0.0], "norms from 3.000 to 3.000, expected 1"),
    ] {
        let key = ovenbird_cache::UnitKey {
            kind: "clip/globals".into(),
            fingerprint: Digest::of(words.as_bytes()).to_hex().parse().unwrap(),
            item_key: None,
        };
        let draft = store.begin_unit(&key).unwrap();
        let file = draft.create("features/globals.arrow").unwrap();
        let mut shard = ImageFeaturesWriter::new(file, &key.fingerprint, Dtype::F16, 2, None).unwrap();
        shard.push(ImageId(1), &embedding).unwrap();
        let refused = shard.finish().unwrap_err().to_string();
        assert!(refused.contains(words) && refused.contains("not published"), "{refused}");
    }
}

/// A small CLIP whose tensors are changed before it is used.
fn with_checkpoint(change: impl Fn(&str, &Tensor) -> Tensor) -> World {
    let world = World::new();
    with_own_file(&world);
    world.write("images/a.png", picture(0));
    world.write("images/b.png", picture(90));
    world.run(["run", "./own.yaml", "--until", "clip"]).success();
    let sound = ovenbird_models::checkpoint::Checkpoint::open(&world.find(&["clip-pretrain", "clip.safetensors"])).unwrap();
    let tensors = sound.tensors().iter().map(|(name, tensor)| (name.clone(), change(name, tensor))).collect();
    let mut bytes = Vec::new();
    ovenbird_models::checkpoint::write_safetensors(&tensors, sound.metadata(), &mut bytes).unwrap();
    world.write("clip.safetensors", bytes);
    world.write(
        "labels.json",
        r#"{"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}, {"id": 2, "file_name": "b.png", "width": 40, "height": 40}],
            "annotations": [], "categories": [{"id": 1, "name": "owl"}]}"#,
    );
    world.write(
        "hurt.yaml",
        r#"version: 1
name: hurt
variables: {precision: f32}
stages:
  - id: globals
    use: clip/globals
    in: {images: ./images, annotations: ./labels.json, checkpoint: ./clip.safetensors}
    with: {clip: {precision: "${precision}"}}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: ./clip.safetensors, classes: ./classes.json}
    with: {templates: {custom: ["a {}"]}}
"#,
    );
    world.write("classes.json", json!({"base": ["owl"], "novel": ["cat"]}).to_string());
    world
}

#[test]
fn weights_that_are_no_numbers_end_the_stage_and_name_the_tensor() {
    let world = with_checkpoint(|name, tensor| {
        let tensor = tensor.copy();
        if name == "visual.attnpool.c_proj.weight" || name == "visual.proj" {
            let _in_place = tensor.view([-1]).get(3).fill_(f64::NAN);
        }
        tensor
    });
    let failed = world.run(["run", "./hurt.yaml"]);
    assert_eq!(failed.code, 4, "{}", failed.stderr);
    for words in ["clip.safetensors: visual.", "expected finite numbers, found 1 of"] {
        assert!(failed.stderr.contains(words), "{}", failed.stderr);
    }
    assert!(world.units_of("clip/globals").is_empty() && world.units_of("prompts/ensemble").is_empty());
}

#[test]
fn embeddings_that_are_no_directions_end_the_stage_or_are_left_out_by_policy() {
    // Of the projection nothing is left: every embedding is zero.
    let world = with_checkpoint(|name, tensor| if name.contains("c_proj") { tensor.zeros_like() } else { tensor.copy() });
    for (precision, bf16) in [("f32", "no"), ("bf16", "no"), ("auto", "no"), ("auto", "yes")] {
        let mut command = world.command(["run", "./hurt.yaml", "--until", "globals", "--set", &format!("precision={precision}")]);
        command.env("OVENBIRD_BF16", bf16);
        let failed = world.output(command);
        assert_eq!(failed.code, 4, "{precision}, {bf16}: {}", failed.stderr);
        assert!(
            failed.stderr.contains("clip.safetensors") && failed.stderr.contains("expected an embedding of norm 1"),
            "{}",
            failed.stderr
        );
        let names_image = failed.stderr.contains("image `a.png`") || failed.stderr.contains("a test pattern");
        assert!(names_image, "{}", failed.stderr);
        assert!(world.units_of("clip/globals").is_empty());
    }
    let text = fs::read_to_string(world.path("hurt.yaml")).unwrap();
    world.write("skip.yaml", text.replace("use: clip/globals\n", "use: clip/globals\n    on_bad_item: skip\n    max_failed_ratio: 1.0\n"));
    let skipped = world.run(["run", "./skip.yaml", "--until", "globals"]).success();
    assert!(skipped.stderr.contains("skipped "), "{}", skipped.stderr);
    let failed: Value = serde_json::from_slice(&fs::read(world.find(&["clip-globals", "failed.json"])).unwrap()).unwrap();
    assert_eq!(failed.as_array().unwrap().len(), 2, "{failed}");
}

/// Every choice that depends on the machine, both ways; whoever comes after keeps to it.
#[test]
fn the_arithmetic_is_chosen_once_by_what_the_device_has() {
    let pipeline = |n: usize| {
        format!(
            r#"version: 1
name: auto
stages:
  - id: world
    use: toy/world
    with: {{seed: 7, train_images: 4, val_images: 40, web_images: 40, held_out_images: 60, side_px: 96}}
  - id: clip
    use: clip/pretrain
    in: {{images: world.web_images, captions: world.captions}}
    with: {{seed: 7, steps: 2, checkpoint_every: 2, batch_size: 8, architecture: vit}}
  - id: proposals
    use: proposals/import
    in: {{proposals: world.val_proposals, annotations: world.val}}
    with: {{max_per_image: {n}}}
  - id: globals
    use: clip/globals
    in: {{images: world.images, annotations: world.val, checkpoint: clip.checkpoint}}
  - id: blocks
    use: clip/blocks
    in: {{images: world.images, annotations: world.val, checkpoint: clip.checkpoint}}
  - id: objects
    use: clip/objects
    in: {{images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}}
  - id: regions
    use: clip/proposals
    in: {{images: world.images, annotations: world.val, proposals: proposals.proposals, checkpoint: clip.checkpoint}}
"#
        )
    };
    let kinds = ["clip/globals", "clip/blocks", "clip/objects", "clip/proposals"];
    let precisions = |world: &World| -> BTreeSet<String> {
        let records = kinds.iter().flat_map(|kind| world.units_of(kind)).map(|unit| fs::read(unit.join("unit.json")).unwrap());
        records.map(|record| serde_json::from_slice::<Value>(&record).unwrap()["metrics"]["precision"].as_str().unwrap().into()).collect()
    };
    let on = |world: &World, bf16: &str, args: &[&str]| {
        let mut command = world.command(args.iter().copied());
        command.env("OVENBIRD_BF16", bf16);
        world.output(command)
    };
    for (first, later, expected) in [("yes", "no", "bf16"), ("no", "yes", "f32")] {
        let world = World::new();
        world.write("auto.yaml", pipeline(3));
        let run = on(&world, first, &["run", "./auto.yaml"]).success();
        assert!(run.stderr.contains(&format!("computes in {expected}: the device has")), "{}", run.stderr);
        assert_eq!(precisions(&world), BTreeSet::from([expected.to_owned()]));
        let sound = world.units();

        // A unit is lost, on another machine.
        let shard = world.find(&["clip-objects", "regions.arrow"]);
        flip(&shard);
        let fixed = on(&world, later, &["verify", "--full", "--fix"]);
        assert!(fixed.code == 0 && fixed.stdout.contains("with the same digests"), "{}{}", fixed.stdout, fixed.stderr);
        assert!(world.units() == sound);
        let said = fixed.stderr.contains("the device has no bf16 and emulates it many times slower");
        assert_eq!(said, expected == "bf16", "{}", fixed.stderr);

        // More is made there: of some images other proposals, of all the same checkpoint.
        world.write("auto.yaml", pipeline(4));
        on(&world, later, &["run", "./auto.yaml"]).success();
        assert_eq!(precisions(&world), BTreeSet::from([expected.to_owned()]));

        // Without the record of the choice the units tell; without either, the device.
        fs::remove_dir_all(world.path(".ovenbird/choices")).unwrap();
        world.write("auto.yaml", pipeline(5));
        on(&world, later, &["run", "./auto.yaml"]).success();
        assert_eq!(precisions(&world), BTreeSet::from([expected.to_owned()]));
        world.run(["verify", "--deep"]).success();
    }
}

/// Two machines begin at the same moment, of which one has bf16.
#[test]
fn machines_that_begin_together_choose_alike() {
    let world = World::tiny();
    let text = fs::read_to_string(world.path("tiny.yaml")).unwrap().replace("clip: {precision: f32}", "clip: {precision: auto}");
    world.write("tiny.yaml", text);
    world.run(["run", "./tiny.yaml", "--until", "proposals"]).success();
    world.run(["run", "./tiny.yaml", "--until", "prompts"]).success();
    let both: Vec<_> = ["yes", "no"]
        .map(|bf16| {
            let mut command = world.command(["run", "./tiny.yaml"]);
            command.env("OVENBIRD_BF16", bf16);
            command.spawn().unwrap()
        })
        .into_iter()
        .map(|running| running.wait_with_output().unwrap())
        .collect();
    for output in both {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for kind in ["clip/globals", "clip/proposals"] {
        let units: Vec<PathBuf> = world.units_of(kind).into_iter().collect();
        let precisions: BTreeSet<String> = units
            .iter()
            .map(|unit| {
                serde_json::from_slice::<Value>(&fs::read(unit.join("unit.json")).unwrap()).unwrap()["metrics"]["precision"].to_string()
            })
            .collect();
        assert_eq!(precisions.len(), 1, "{kind}: {precisions:?}");
    }
}

/// The state of a training is read by the next link alone.
#[test]
fn a_training_goes_on_from_the_last_link_that_is_sound() {
    let (world, clean) = (World::new(), World::new());
    for world in [&world, &clean] {
        with_own_file(world);
        world.write("images/a.png", picture(0));
    }
    clean.run(["run", "./own.yaml", "--until", "clip"]).success();
    let mut running = world.command(["run", "./own.yaml", "--until", "clip"]).spawn().unwrap();
    crate::support::until(|| world.units_of("clip/pretrain").len() >= 2);
    running.kill().unwrap();
    running.wait().unwrap();
    let latest = |unit: &PathBuf| fs::metadata(unit.join("unit.json")).unwrap().modified().unwrap();
    let last = world.units_of("clip/pretrain").into_iter().max_by_key(latest).unwrap();
    flip(&last.join("state/state.safetensors"));
    let again = world.run(["run", "./own.yaml", "--until", "clip"]).success();
    assert!(again.stderr.contains("state.safetensors: content does not match its digest"), "{}", again.stderr);
    let listed = clean.listed();
    let needed = |world: &World| -> BTreeMap<String, Vec<u8>> {
        let is_needed = |name: &str| listed.iter().any(|unit| name.contains(unit));
        world.units().into_iter().filter(|(name, _)| is_needed(name)).collect()
    };
    assert!(needed(&world) == needed(&clean));
}

/// Steps without an image that can be read, and each checkpoint made again by itself.
#[test]
fn a_training_that_skips_images_is_the_same_whichever_checkpoint_is_recomputed() {
    let world = World::new();
    world.write(
        "skips.yaml",
        "version: 1
name: skips
stages:
  - id: world
    use: toy/world
    with: {train_images: 6, val_images: 2, web_images: 12, held_out_images: 6, side_px: 160}
  - id: oln
    use: oln/train
    in: {images: ./images, annotations: world.train, classes: world.classes}
    with:
      network: toy
      training: {steps: 6, checkpoint_every: 1, keep_checkpoints: 6, batch_size: 1, max_size: [96, 128], min_size: [96, 128]}
    on_bad_item: skip
    max_failed_ratio: 0.6
",
    );
    world.write("images/train/README", "");
    world.run(["run", "./skips.yaml", "--until", "world"]).success();
    crate::support::copy(world.find(&["toy-world", "images/train"]).parent().unwrap(), &world.path("images/train"));
    let mut images: Vec<PathBuf> = fs::read_dir(world.path("images/train")).unwrap().map(|entry| entry.unwrap().path()).collect();
    images.retain(|image| image.extension().is_some_and(|extension| extension == "jpg"));
    images.sort();
    assert_eq!(images.len(), 6);
    images.iter().step_by(2).for_each(|image| fs::write(image, "broken").unwrap());
    let run = world.run(["run", "./skips.yaml"]).success();
    assert!(run.stderr.contains("3 of 6") || run.stderr.contains("skipped"), "{}", run.stderr);
    let checkpoints = world.units_of("oln/train");
    assert_eq!(checkpoints.len(), 6);
    for checkpoint in checkpoints {
        flip(&checkpoint.join("network/network.safetensors"));
        let fixed = world.run(["verify", "--full", "--fix"]);
        assert!(fixed.code == 0 && fixed.stdout.contains("with the same digests"), "{}{}", fixed.stdout, fixed.stderr);
    }
}
