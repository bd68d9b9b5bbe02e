//! Where stages are found, what they may know of each other, and their parameters.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use ovenbird_stages::STAGES;
use serde_json::{Value, json};

/// The code of every file of `stages/src` without its tests, by its path without `.rs`, such as `clip/globals`.
fn files() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("stages/src");
    let (mut files, mut folders) = (BTreeMap::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let text = fs::read_to_string(&path).unwrap();
                let name: PathBuf = path.strip_prefix(&root).unwrap().with_extension("");
                files.insert(name.to_str().unwrap().to_owned(), text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned());
            }
        }
    }
    files
}

/// The files that define stages, with the kinds that each defines.
fn stage_files() -> BTreeMap<String, Vec<&'static str>> {
    let files = files();
    let mut found: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for entry in STAGES {
        let line = format!("const KIND: &'static str = \"{}\";", entry.kind);
        let defining: Vec<&String> = files.iter().filter(|(_, code)| code.contains(&line)).map(|(file, _)| file).collect();
        assert_eq!(defining.len(), 1, "{}: {defining:?}", entry.kind);
        found.entry(defining[0].clone()).or_default().push(entry.kind);
    }
    found
}

#[test]
fn the_kind_of_a_stage_is_the_path_of_its_file() {
    for (file, kinds) in stage_files() {
        for kind in kinds {
            let path = kind.replace('-', "_");
            let item_key = path.split('/').next().unwrap();
            assert!(file == path || file == item_key, "expected {kind} in {path}.rs or {item_key}.rs, found it in {file}.rs");
        }
    }
}

#[test]
fn a_folder_of_modules_has_its_file_beside_it() {
    for file in files().keys() {
        assert!(!file.ends_with("mod"), "{file}.rs: expected the file beside the folder");
    }
}

/// The paths that a file's `use` lines name, `a::b::C`, with `crate::` taken off and `super::` resolved.
fn imports(file: &str, code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for statement in code.split('\n').map(str::trim_start).collect::<Vec<_>>().join("\n").split("\nuse ").skip(1) {
        let tree: String = statement.split(';').next().unwrap().chars().filter(|character| !character.is_whitespace()).collect();
        expand("", &tree, &mut paths);
    }
    let parent = file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{}::", folder.replace('/', "::")));
    let ours = paths.into_iter().filter_map(|path| {
        let within = path.strip_prefix("crate::").map(str::to_owned);
        within.or_else(|| path.strip_prefix("super::").map(|rest| format!("{parent}{rest}")))
    });
    ours.collect()
}

/// Writes out the paths of a `use` tree.
fn expand(before: &str, tree: &str, paths: &mut Vec<String>) {
    let Some((head, rest)) = tree.split_once('{') else { return paths.push(format!("{before}{tree}")) };
    let (mut depth, mut start) = (0, 0);
    let inner = &rest[..rest.rfind('}').unwrap()];
    for (place, character) in inner.char_indices().chain([(inner.len(), ',')]) {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if place > start {
                    expand(&format!("{before}{head}"), &inner[start..place], paths);
                }
                start = place + 1;
            }
            _ => {}
        }
    }
}

/// The file that an imported path leads to, through `pub use` of the files on the way.
fn resolve(files: &BTreeMap<String, String>, path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split("::").collect();
    let n_parts = (1..=parts.len()).rev().find(|n| files.contains_key(&parts[..*n].join("/")))?;
    let file = parts[..n_parts].join("/");
    let item = parts.get(n_parts)?;
    let exported = files[&file].split("pub use ").skip(1).flat_map(|statement| {
        let mut paths = Vec::new();
        let tree: String = statement.split(';').next().unwrap().chars().filter(|character| !character.is_whitespace()).collect();
        expand("", &tree, &mut paths);
        paths
    });
    let source = exported.into_iter().find(|path| path.rsplit("::").next() == Some(item));
    match source {
        Some(source) => resolve(files, &format!("{}::{}", file.replace('/', "::"), source.trim_start_matches("self::"))),
        None => Some(file),
    }
}

/// What several stages share is in a file that defines none: then a stage can be read, changed and removed alone.
#[test]
fn no_stage_imports_from_the_file_of_another() {
    let (files, stages) = (files(), stage_files());
    let mut found = BTreeSet::new();
    for stage in stages.keys() {
        for path in imports(stage, &files[stage]) {
            let to = resolve(&files, &path).or_else(|| files.contains_key(&path.replace("::", "/")).then(|| path.replace("::", "/")));
            if let Some(to) = to.filter(|to| to != stage && stages.contains_key(to)) {
                found.insert(format!("{stage}.rs: {path} is in {to}.rs"));
            }
        }
    }
    assert_eq!(found, BTreeSet::new());
    // The rule sees through re-exports, nested braces and `super`.
    let paths = imports("clip/blocks", "//! x\nuse super::{encoder::{Clip, View}, Pretrain};\nuse crate::detect::ZeroShot;\n");
    assert_eq!(paths, ["clip::encoder::Clip", "clip::encoder::View", "clip::Pretrain", "detect::ZeroShot"]);
    let leads_to = |path: &str| resolve(&files, path).unwrap();
    assert_eq!([leads_to("clip::Pretrain"), leads_to("detect::ZeroShot")], ["clip/pretrain", "detect"]);
}

/// Every parameter is part of a fingerprint: a new, renamed or changed default makes results again, and must be seen here.
#[test]
fn stages_keep_their_versions_and_parameters() {
    let mut text = format!("{} stages\n", STAGES.len());
    for entry in STAGES {
        write!(text, "\n{} version {}\n", entry.kind, entry.version).unwrap();
        let params = match (entry.parse)(&json!({})) {
            Ok(stage) => stage.params(),
            Err(problem) => {
                writeln!(text, "  cannot be empty: {}", problem.problem).unwrap();
                json!({})
            }
        };
        for (name, value) in params.as_object().unwrap() {
            writeln!(text, "  {name}: {value}").unwrap();
        }
        // Such fields are in a recipe only if they are given.
        let schema = (entry.schema)();
        let fields = schema.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name);
        for name in fields.filter(|name| params.get(name.as_str()).is_none()) {
            writeln!(text, "  {name} (if given)").unwrap();
        }
    }
    insta::assert_snapshot!(text);
}
