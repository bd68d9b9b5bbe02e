//! Rules of the house that the compiler does not know.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `src -> stages -> {models, data, cache}`, and `pickle` below models and data.
#[test]
fn the_arrows_between_crates_point_one_way() {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).current_dir(root()).output();
    let metadata: serde_json::Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
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
