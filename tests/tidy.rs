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
    // Weights and published prompts by `read_with`, tables, archives and matrices by `check`; numbers of goldens in tests; weights that the stage has just written.
    let expected = [
        "artifacts.rs",
        "artifacts/img2dataset.rs",
        "artifacts/matrix.rs",
        "artifacts/pool.rs",
        "artifacts/tables.rs",
        "prompts/golden.rs",
        "prompts/published.rs",
        "toy/clip.rs",
    ];
    assert_eq!(found, expected.map(String::from).into());
}

#[test]
fn every_golden_folder_has_the_script_that_made_it() {
    let folders = fs::read_dir(root().join("tests/golden")).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    for folder in folders {
        let script = folder.join("make.py");
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
        assert!(line.trim().len() <= 93, "`{meaning}` is longer than a line of the help");
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
    // LP-OVOD's specification, sections 5.3, 6.1, 7 and 8.
    let lp_ovod = |id: &str, expected: Value| assert_holds(&parameters("lp-ovod-ov-coco", id), &expected, id);
    lp_ovod("regions", json!({"rule": "lp-ovod", "min_side": 0.0, "dtype": "f16"}));
    lp_ovod("prompts", json!({"templates": "bare-name"}));
    lp_ovod("detector", json!({"network": "r50", "head": "sigmoid", "crowds": "background"}));
    let detector = parameters("lp-ovod-ov-coco", "detector");
    assert_eq!(detector["distillation"]["objects"], weight(256.0, 0));
    assert_eq!(detector["distillation"]["images_per_group"], 2);
    let training = json!({
        "epochs": 20, "lr_epochs": [16, 19], "batch_size": 16, "max_size": [1333, 1333], "min_size": [640, 800], "size_step": 32, "lr": 0.02,
        "momentum": 0.9, "weight_decay": 2.5e-5, "warmup_steps": 500, "clip_grad_norm": 15.0, "optimizer": "sgd", "lr_schedule": "steps",
    });
    assert_holds(&detector["training"], &training, "lp-ovod-ov-coco");
    lp_ovod("boxes", json!({"min_objectness": 0.6_f32, "per_class": 100}));
    lp_ovod("features", json!({"max_size": 1333, "min_size": [640, 800], "size_step": 32, "regions": 512, "background_per_object": 10}));
    let probing = json!({
        "classifier": "sigmoid", "epochs": 12, "lr_epochs": [8, 11], "batch_size": 2, "lr": 0.001, "momentum": 0.9, "weight_decay": 2.5e-5,
        "warmup_steps": 20, "warmup_from": 0.1,
    });
    lp_ovod("probe", probing);
    let fusion = parameters("lp-ovod-ov-coco", "test");
    assert!(fusion.get("fusion").is_none(), "the published fusion is the default");
    lp_ovod("test", json!({"heads": "both", "score_threshold": 0.05_f32, "nms_iou": 0.5, "max_per_image": 100}));
    // DetPro's and RALF's specification, sections 7 to 10.
    for (pipeline, id, expected) in [
        (
            "ralf-ov-lvis",
            "negatives",
            json!({"rank_variance": "reference", "drop": {"threshold": 12.7e6}, "top": 2000, "popularity_limit": 800}),
        ),
        (
            "ralf-oadp-ov-coco",
            "negatives",
            json!({"rank_variance": "reference", "drop": {"threshold": 13.2e6}, "top": 2000, "popularity_limit": 55}),
        ),
        ("ralf-ov-lvis", "shown", json!({"rule": "ralf", "min_side": 0.0})),
        (
            "ralf-ov-lvis",
            "test",
            json!({"raf": {"top_k": 20, "fusion": "gate", "background": "reference", "threshold": "reference"}, "score_threshold": 1e-4_f32}),
        ),
        (
            "ralf-oadp-ov-coco",
            "test",
            json!({"raf": {"top_k": 1, "fusion": "softmax", "background": "excluded", "threshold": "reference"}}),
        ),
    ] {
        assert_holds(&parameters(pipeline, id), &expected, &format!("{pipeline}: {id}"));
    }
    for (pipeline, lambda_dis, batch_size) in [("ralf-ov-lvis", 10.0, 8), ("ralf-oadp-ov-coco", 5.0, 16)] {
        let detector = parameters(pipeline, "detector");
        let losses = json!({
            "random_q": 10, "lambda_sim": 1.0, "lambda_dis": lambda_dis, "margin_sim": 0.0, "margin_dis": 1.0, "beta_sim": 1.0, "beta_dis": 1.0,
            "easy_gradient": "reference", "batch_norm": "reference",
        });
        // Those of DetPro on LVIS are the defaults, which are not listed.
        let defaults = serde_json::to_value(ovenbird_models::ral::Config::default()).unwrap();
        assert_holds(detector.get("ral").unwrap_or(&defaults), &losses, pipeline);
        assert_holds(&detector["training"], &json!({"batch_size": batch_size, "lr": 0.02}), pipeline);
        let augmenter = json!({
            "template": "a photo of {}", "spaces": false, "n_concepts": 50, "heads": 8, "fine": "reference", "min_objectness": 0.4_f32,
            "min_side": 10.0, "regions_per_image": 30, "epochs": 10, "batch_size": 128, "lr": 0.1,
        });
        assert_holds(&parameters(pipeline, "augmenter"), &augmenter, pipeline);
        assert!(parameters(pipeline, "augmenter").get("temperature").is_none_or(Value::is_null));
    }
    // DetPro's specification, sections 2, 3 and 4.
    let detpro = |id: &str, expected: Value| assert_holds(&parameters("detpro-ov-lvis", id), &expected, id);
    detpro("regions", json!({"rule": "detpro-reference", "min_side": 0.0}));
    for (range, iou) in [[0.5, 0.6], [0.6, 0.7], [0.7, 0.8], [0.8, 0.9], [0.9, 1.1]].into_iter().enumerate() {
        let learned = json!({
            "iou": iou, "negative_iou": 0.5, "background": "soft", "context": 8, "epochs": 6, "batch_size": 512, "lr": 0.002,
        });
        detpro(&format!("range-{}", range + 1), learned);
    }
    detpro("templates", json!({"templates": "vild-74", "renormalise": false, "spaces": false}));
    let network = json!({
        "network": "r50", "masks": true, "train_temperature": 0.01, "test_temperature": 0.007, "low_quality_iou": 0.5,
        "trainable_backbone_layers": 5,
    });
    detpro("detector", network);
    let detector = parameters("detpro-ov-lvis", "detector");
    assert_eq!(detector["distillation"]["objects"], weight(256.0, 0));
    let training = json!({
        "epochs": 20, "lr_epochs": [16], "batch_size": 16, "max_size": [1333, 1333], "min_size": [640, 800], "size_step": 32, "lr": 0.02,
        "momentum": 0.9, "weight_decay": 2.5e-5, "warmup_steps": 500, "precision": "f32", "optimizer": "sgd", "repeat_threshold": 0.001,
    });
    assert_holds(&detector["training"], &training, "detpro-ov-lvis");
    detpro("test", json!({"heads": "both", "score_threshold": 1e-4_f32, "nms_iou": 0.5, "max_per_image": 300, "proposals": 1000}));
    let promptdet = |step: &str, expected: Value| assert_holds(&parameters("promptdet-ov-lvis", step), &expected, "promptdet-ov-lvis");
    promptdet("crops", json!({"rule": "rpl", "expand": 3.0, "min_area": 20.0, "per_class": 200}));
    let rpl = json!({"context": 1, "epochs": 6, "warmup_epochs": 1, "batch_size": 32, "lr": 0.002, "momentum": 0.9, "weight_decay": 5e-4});
    promptdet("prompts", rpl);
    for step in ["base", "detector"] {
        promptdet(step, json!({"network": "r50", "head": "cosine", "masks": true, "trainable_backbone_layers": 3}));
        let training = json!({
            "epochs": 12, "lr_epochs": [8, 11], "batch_size": 16, "max_size": [1333, 1333], "min_size": [640, 800], "size_step": 32, "lr": 0.02,
            "momentum": 0.9, "weight_decay": 1e-4, "warmup_steps": 500, "optimizer": "sgd", "repeat_threshold": 0.001,
        });
        assert_holds(&parameters("promptdet-ov-lvis", step)["training"], &training, "promptdet-ov-lvis");
    }
    promptdet("detector", json!({"start_epoch": 6}));
    promptdet("test", json!({"score_threshold": 1e-4_f32, "nms_iou": 0.5, "max_per_image": 300, "proposals": 1000}));
    // CORA's specification, sections 5, 9, 10 and 11.
    let cora = |step: &str, expected: Value| assert_holds(&parameters("cora-ov-coco", step), &expected, "cora-ov-coco");
    let training = |of_step: Value| {
        let mut all = json!({
            "seed": 42, "max_size": [1333, 1333], "min_size": [480, 800], "size_step": 32, "optimizer": "adamw", "betas": [0.9, 0.999], "lr": 1e-4,
            "warmup_steps": 0, "weight_decay": 1e-4, "clip_grad_norm": 0.1,
        });
        all.as_object_mut().unwrap().extend(of_step.as_object().unwrap().clone());
        all
    };
    for (step, of_step) in [
        ("region-prompt", json!({"epochs": 5, "lr_epochs": [4], "batch_size": 16})),
        ("localizer", json!({"epochs": 35, "batch_size": 32, "ema_decay": 0.99996})),
    ] {
        assert_holds(&parameters("cora-ov-coco", step)["training"], &training(of_step), step);
        cora(step, json!({"cuts": {"probability": 0.5, "min_size": [400, 500, 600], "window": [384, 600]}}));
    }
    cora("region-prompt", json!({"temperature": 0.01}));
    cora("prompts", json!({"templates": "clip-80", "renormalise": true}));
    cora(
        "localizer",
        json!({"size": "cora", "content": "text", "split_share": 0.2, "match": {"class_test": "same-class", "overlap": "reference"}}),
    );
    cora("test", json!({"temperature": 0.01, "novel_factor": 8.0, "max_per_image": 100}));
    let learned = json!({"epochs": 3, "batch_size": 16, "lr": 0.05, "weight_decay": 0.001, "loss_weight": 640.0});
    assert_holds(&parameters("oadp-ov-coco", "multilabel"), &learned, "oadp-ov-coco");
}

#[test]
fn every_test_that_a_recipe_names_exists() {
    let sources = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().unwrap();
    let sources = String::from_utf8(sources.stdout).unwrap();
    let code: String = sources.lines().map(|path| fs::read_to_string(root().join(path)).unwrap()).collect();
    for page in ["oadp", "lp-ovod", "detpro-ralf", "promptdet", "cora"] {
        let recipe = fs::read_to_string(root().join(format!("docs/recipes/{page}.md"))).unwrap();
        let (_, table) = recipe.split_once("## Where parity is checked").unwrap();
        let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ") && line.contains('`')).collect();
        assert!(rows.len() > 15, "{rows:?}");
        for name in rows.iter().flat_map(|row| row.split('`').skip(1).step_by(2)) {
            assert!(code.contains(&format!("fn {name}(")), "{page}: {name}");
        }
    }
}

/// Crates whose files must not import each other in a circle.
const WITHOUT_CIRCLES: &[&str] = &["src", "stages/src"];

/// The modules of a crate, with the text of their files up to the tests, without comments.
struct Modules {
    by_path: BTreeMap<Vec<String>, String>,
}

impl Modules {
    fn of(folder: &Path) -> Self {
        let mut by_path = BTreeMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(inner) = folders.pop() {
            for file in fs::read_dir(inner).unwrap().map(|entry| entry.unwrap().path()) {
                if file.is_dir() {
                    folders.push(file);
                    continue;
                }
                if file.extension().is_none_or(|extension| extension != "rs") {
                    continue;
                }
                let path = file.strip_prefix(folder).unwrap().with_extension("");
                let mut path: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if ["main", "lib", "mod"].contains(&path.last().unwrap().as_str()) {
                    path.pop();
                }
                let text = fs::read_to_string(file).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap();
                let code: Vec<&str> = code.lines().map(|line| line.split("//").next().unwrap()).collect();
                by_path.insert(path, code.join(" "));
            }
        }
        Self { by_path }
    }

    /// The imports of a module: the path as written, segment by segment, and whether it is a re-export.
    fn imports(&self, module: &[String]) -> Vec<(Vec<String>, bool)> {
        let text = &self.by_path[module];
        let mut found = Vec::new();
        for (at, _) in text.match_indices("use ").filter(|(at, _)| text[..*at].ends_with([' ', ';', '}']) || *at == 0) {
            let Some((tree, _)) = text[at + 4..].split_once(';') else { continue };
            let before = text[..at].trim_end();
            let is_public = before.ends_with("pub") || (before.ends_with(')') && before.rsplit("pub(").next().unwrap().len() < 12);
            expand(tree, &[], &mut |path| found.push((path, is_public)));
        }
        for start in ["crate::", "super::"] {
            for (at, _) in text.match_indices(start).filter(|(at, _)| !text[..*at].ends_with(|c: char| c == ':' || c.is_alphanumeric())) {
                let path: String = text[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
                let path: Vec<String> = path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
                // `crate::{...}` is a tree of a `use` line.
                found.extend((path.len() > 1).then_some((path, false)));
            }
        }
        found
    }

    /// The module that a path in a module leads to, through re-exports; `None` where it leads out of the crate.
    fn target(&self, module: &[String], path: &[String], depth: usize) -> Option<Vec<String>> {
        let mut found = module.to_vec();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => (found, rest) = (Vec::new(), &rest[1..]),
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    found.pop();
                    rest = &rest[1..];
                }
            }
            first if self.by_path.contains_key(&[module, &[first.to_owned()]].concat()) => {}
            _ => return None,
        }
        while let Some(part) = rest.first() {
            let inner = [found.as_slice(), std::slice::from_ref(part)].concat();
            if self.by_path.contains_key(&inner) {
                (found, rest) = (inner, &rest[1..]);
                continue;
            }
            let imports = self.imports(&found);
            let exported = imports.iter().find(|(path, is_public)| *is_public && depth < 8 && path.last() == Some(part));
            return exported.and_then(|(path, _)| self.target(&found, path, depth + 1)).or(Some(found));
        }
        Some(found)
    }
}

/// Calls `each` with every path of a `use` tree such as `a::{b, c::{self, d as e}}`.
fn expand(tree: &str, prefix: &[String], each: &mut dyn FnMut(Vec<String>)) {
    let tree = tree.trim();
    let (head, inner) = tree.split_once('{').map_or((tree, None), |(head, inner)| (head, inner.trim_end().strip_suffix('}')));
    let parts = head.split("::").map(|part| part.trim().split(" as ").next().unwrap().trim()).filter(|part| !part.is_empty());
    let path: Vec<String> = prefix.iter().cloned().chain(parts.map(str::to_owned)).collect();
    let Some(inner) = inner else { return each(path) };
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[start..at].trim().is_empty() {
                    expand(&inner[start..at], &path, each);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// A file imports another where a path in it leads there: `use` lines with `crate::`, `super::`, `self::` or a child's name, and such paths in
/// the code; tests at the end of a file do not count. A file that declares its children (`mod x;`) or re-exports from them (`pub use x::Y;`)
/// does not import them by that; who uses a re-exported name imports the file that has it.
#[test]
fn no_files_import_each_other_in_a_circle() {
    for folder in WITHOUT_CIRCLES {
        let modules = Modules::of(&root().join(folder));
        let mut edges: BTreeMap<&Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
        for module in modules.by_path.keys() {
            let imports = modules.imports(module).into_iter();
            let is_child = |target: &Vec<String>| target.len() > module.len() && target.starts_with(module);
            let targets = imports.filter_map(|(path, is_public)| {
                let target = modules.target(module, &path, 0)?;
                (target != *module && !(is_public && is_child(&target))).then_some(target)
            });
            edges.insert(module, targets.collect());
        }
        assert!(edges.values().map(BTreeSet::len).sum::<usize>() > edges.len(), "{folder}: the imports are not found");
        // Files that import none of the others are no part of a circle.
        while let Some(free) = edges.iter().find(|(_, targets)| targets.is_empty()).map(|(module, _)| (*module).clone()) {
            edges.remove(&free);
            for targets in edges.values_mut() {
                targets.remove(&free);
            }
        }
        let name = |module: &[String]| format!("{folder}/{}.rs", module.join("/"));
        let mut circle: Vec<&Vec<String>> = edges.keys().next().copied().into_iter().collect();
        while let Some(last) = circle.last() {
            let next = edges[*last].first().unwrap();
            if let Some(start) = circle.iter().position(|module| *module == next) {
                let files: Vec<String> = circle[start..].iter().chain([&next]).map(|module| name(module)).collect();
                panic!("these files import each other in a circle: {}", files.join(" -> "));
            }
            circle.push(next);
        }
    }
}

#[test]
fn every_command_is_a_file() {
    let cli = fs::read_to_string(root().join("src/cli.rs")).unwrap();
    let (_, list) = cli.split_once("enum Command {").unwrap();
    let (list, _) = list.split_once("\n}").unwrap();
    let variants =
        list.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
    let names = variants.map(|line| line.chars().take_while(char::is_ascii_alphabetic).collect::<String>().to_lowercase());
    // These two describe the command line itself.
    let listed: BTreeSet<String> = names.filter(|name| !["completions", "man"].contains(&name.as_str())).collect();
    let files = fs::read_dir(root().join("src/commands")).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|file| file.is_file()).map(|file| file.file_stem().unwrap().to_string_lossy().into_owned());
    assert_eq!(listed, files.collect());
}

#[test]
fn the_first_page_is_short_and_documents_name_files_that_exist() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    assert!(read("README.md").lines().count() <= 120);
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = read(document);
        let in_code = text.split('`').skip(1).step_by(2);
        let linked = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
        for name in in_code.chain(linked) {
            let is_path =
                !name.contains([' ', '{', '*', '<', ':']) && !name.contains("NAME") && name.rsplit('/').next().unwrap().contains('.');
            let is_ours = name.split_once('/').is_some_and(|(top, _)| root().join(top).is_dir());
            let is_users = name.starts_with("data/") && !name.starts_with("data/src/");
            assert!(!is_path || !is_ours || is_users || root().join(name).exists(), "{document} names {name}");
        }
    }
}
