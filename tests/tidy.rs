//! Rules of the house that the compiler does not know.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `src -> stages -> {models, data, cache}`, and `pickle` below models and data.
#[test]
fn the_arrows_between_crates_point_one_way() {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).current_dir(root()).output();
    let metadata: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let ours = package["dependencies"].as_array().unwrap().iter().filter_map(|dependency| dependency["name"].as_str());
        let ours: BTreeSet<&str> = ours.filter_map(|name| name.strip_prefix("ovenbird-")).collect();
        found.insert(package["name"].as_str().unwrap(), ours);
    }
    let expected = BTreeMap::from([
        ("ovenbird", BTreeSet::from(["cache", "data", "models", "stages"])),
        ("ovenbird-stages", BTreeSet::from(["cache", "data", "models"])),
        ("ovenbird-models", BTreeSet::from(["pickle"])),
        ("ovenbird-data", BTreeSet::from(["pickle"])),
        ("ovenbird-cache", BTreeSet::new()),
        ("ovenbird-pickle", BTreeSet::new()),
    ]);
    assert_eq!(found, expected);
}

/// Stages read files through `InputFile`, which compares them with what was hashed; nothing else opens one, but for what is called from there.
#[test]
fn stages_read_files_through_their_digests() {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().join("stages/src")];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            const READERS: [&str; 8] = [
                "fs::read(",
                "read_to_string(",
                " File::open(",
                "(Checkpoint::open(",
                " Checkpoint::open(",
                "Annotations::load(",
                "Image::open(",
                "ShardReader::open(",
            ];
            if READERS.iter().any(|reader| code.contains(reader)) {
                found.insert(path.strip_prefix(root().join("stages/src")).unwrap().display().to_string());
            }
        }
    }
    // Weights and published prompts by `read_with`, tables by `check`; numbers of goldens in tests.
    let expected = ["artifacts.rs", "artifacts/tables.rs", "prompts/golden.rs", "prompts/published.rs"];
    assert_eq!(found, expected.map(String::from).into());
}

#[test]
fn every_golden_folder_has_the_script_that_made_it() {
    for entry in fs::read_dir(root().join("tests/golden")).unwrap() {
        let script = entry.unwrap().path().join("make.py");
        let text = fs::read_to_string(&script).unwrap_or_else(|error| panic!("{}: {error}", script.display()));
        assert!(text.starts_with("\"\"\""), "{}: expected a docstring with versions and tolerance", script.display());
    }
}

#[test]
fn readme_names_every_exit_code_and_every_make_target_it_names_exists() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let help = String::from_utf8(Command::new(env!("CARGO_BIN_EXE_ovenbird")).arg("--help").output().unwrap().stdout).unwrap();
    let codes = help.split_once("Exit codes:").unwrap().1;
    for line in codes.lines().filter(|line| !line.trim().is_empty()) {
        let (code, meaning) = line.trim().split_once("  ").unwrap();
        assert!(readme.contains(&format!("| {code} | {meaning} |")), "README.md: expected | {code} | {meaning} |");
    }
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    for (_, rest) in readme.match_indices("make ").map(|(at, _)| readme.split_at(at + 5)) {
        let target: String = rest.chars().take_while(char::is_ascii_lowercase).collect();
        let is_code = readme.contains(&format!("`make {target}`")) || readme.contains(&format!("\n    make {target}"));
        assert!(!is_code || makefile.contains(&format!("\n{target}:")), "README.md names `make {target}`");
    }
}

#[test]
fn every_pipeline_file_is_built_in() {
    let files: BTreeSet<PathBuf> = fs::read_dir(root().join("pipelines")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let listed =
        String::from_utf8(Command::new(env!("CARGO_BIN_EXE_ovenbird")).arg("pipelines").current_dir("/").output().unwrap().stdout).unwrap();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(listed.lines().any(|line| line.starts_with(&name)), "{name} is not in the table of named pipelines");
    }
}

/// What the stage of an id comes to in a named pipeline, with every default.
fn parameters(pipeline: &str, id: &str) -> Value {
    let text = fs::read_to_string(root().join(format!("pipelines/{pipeline}.yaml"))).unwrap();
    let file: Value = serde_yaml::from_str(&text).unwrap();
    let stage = file["stages"].as_array().unwrap().iter().find(|stage| stage["id"] == id).unwrap();
    let given = stage.get("with").cloned().unwrap_or_else(|| json!({}));
    let parsed = (ovenbird_stages::find(stage["use"].as_str().unwrap()).unwrap().parse)(&given);
    parsed.unwrap_or_else(|problem| panic!("{pipeline}: {id}: {}", problem.problem)).params()
}

/// Tables of OADP's specification, sections 6.1, 6.4, 6.5 and 6.6: how ViLD and OADP were trained, and are asked.
#[test]
fn published_pipelines_have_the_published_numbers() {
    let weight = |weight: f64, warmup_steps: u32| json!({"weight": weight, "warmup_steps": warmup_steps});
    let pyramid = json!({
        "objects": weight(256.0, 200), "blocks": weight(128.0, 200), "relation_loss": weight(8.0, 200), "globals": weight(0.5, 200),
        "block_labels": weight(16.0, 1000), "global_labels": weight(4.0, 2000), "label_warmup": "reference", "images_per_group": 2,
    });
    let common = json!({
        "seed": 3407, "batch_size": 16, "accumulation_steps": 1, "max_size": [1330, 1333], "min_size": [640, 800], "precision": "f16",
        "optimizer": "sgd", "momentum": 0.9, "lr": 0.02, "warmup_steps": 500, "lr_schedule": "steps", "weight_decay": 2.5e-5,
    });
    let coco = json!({"steps": 40_000, "lr_steps": [30_000], "keep_checkpoints": 20, "repeat_threshold": 0.0});
    let lvis = json!({"epochs": 24, "lr_epochs": [16, 19], "repeat_threshold": 0.001});
    let half = json!({"groups": {"bbox_head": {"lr_mult": 0.5, "decay_mult": 1.0}}});
    let all = json!({"groups": {}});
    let assert_holds = |found: &Value, expected: &Value, place: &str| {
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(&found[field], value, "{place}: {field}");
        }
    };
    for (pipeline, [train, test], masks, length, groups) in [
        ("vild-ov-coco", [0.01, 0.007], false, &coco, &all),
        ("vild-ov-lvis", [0.01, 0.007], true, &lvis, &all),
        ("oadp-ov-coco", [0.007, 0.01], false, &coco, &half),
        ("oadp-ov-lvis", [0.01, 0.007], true, &lvis, &all),
    ] {
        let detector = parameters(pipeline, "detector");
        let network =
            json!({"network": "r50", "masks": masks, "train_temperature": train, "test_temperature": test, "crowds": "background"});
        assert_holds(&detector, &network, pipeline);
        for expected in [&common, length, groups] {
            assert_holds(&detector["training"], expected, pipeline);
        }
        if pipeline.starts_with("oadp") {
            assert_holds(&detector["distillation"], &pyramid, pipeline);
        }
        assert_eq!(detector["distillation"]["objects"], weight(256.0, 200), "{pipeline}");
        let asked = json!({"heads": "both", "proposals": 1000, "nms_iou": 0.5, "score_threshold": 0.0, "max_per_image": 300});
        assert_holds(&parameters(pipeline, "test"), &asked, pipeline);
    }
    let learned = json!({"epochs": 3, "batch_size": 16, "lr": 0.05, "weight_decay": 0.001, "loss_weight": 640.0});
    assert_holds(&parameters("oadp-ov-coco", "multilabel"), &learned, "oadp-ov-coco");
}

#[test]
fn every_test_that_a_recipe_names_exists() {
    let sources = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().unwrap();
    let sources = String::from_utf8(sources.stdout).unwrap();
    let code: String = sources.lines().map(|path| fs::read_to_string(root().join(path)).unwrap()).collect();
    let recipe = fs::read_to_string(root().join("docs/recipes/oadp.md")).unwrap();
    let (_, table) = recipe.split_once("## Where parity is checked").unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ") && line.contains('`')).collect();
    assert!(rows.len() > 15, "{rows:?}");
    for name in rows.iter().flat_map(|row| row.split('`').skip(1).step_by(2)) {
        assert!(code.contains(&format!("fn {name}(")), "{name}");
    }
}
