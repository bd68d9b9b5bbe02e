//! Documents that are generated from the program. To write them anew: `UPDATE_DOCS=1 cargo test --release --test main docs::`.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

use crate::support::World;

/// Writes a document where `UPDATE_DOCS` is set; otherwise fails where the document is stale.
fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        return fs::write(path, text).unwrap();
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    let line = found.lines().zip(text.lines()).take_while(|(found, expected)| found == expected).count() + 1;
    assert!(found == text, "docs/{name} is stale from line {line} on: UPDATE_DOCS=1 cargo test --release --test main docs::");
}

/// The output of a command as a block of code.
fn block(world: &World, args: &[&str]) -> String {
    let mut command = world.command(args.iter().copied());
    command.env("COLUMNS", "120");
    let output = world.output(command).success().stdout;
    format!("```text\n{}\n```\n\n", output.trim_end())
}

/// The subcommands that a help text lists.
fn subcommands(help: &str) -> Vec<String> {
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    let names = list.lines().take_while(|line| !line.trim().is_empty()).filter_map(|line| line.strip_prefix("  "));
    names.filter(|line| !line.starts_with(' ')).filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

#[test]
fn every_command_is_documented() {
    fn add(world: &World, path: &[&str], text: &mut String) {
        let mut args = path.to_vec();
        args.push("--help");
        let help = block(world, &args);
        if !path.is_empty() {
            text.push_str(&format!("## {}\n\n", path.join(" ")));
        }
        text.push_str(&help);
        for name in subcommands(&help) {
            add(world, &[path, &[name.as_str()]].concat(), text);
        }
    }
    let world = World::new();
    let mut text = String::from("# Commands\n\nGenerated from the program: `ovenbird COMMAND --help`.\n\n");
    add(&world, &[], &mut text);
    assert!(text.matches("\n## ").count() > 15, "{text}");
    check("commands.md", &format!("{}\n", text.trim_end()));
}

#[test]
fn every_stage_is_documented() {
    let world = World::new();
    let mut text = String::from("# Stages\n\nGenerated from the program: `ovenbird stages KIND`.\n\n");
    text.push_str(&block(&world, &["stages"]));
    for stage in ovenbird_stages::STAGES {
        text.push_str(&format!("## {}\n\n{}", stage.kind, block(&world, &["stages", stage.kind])));
    }
    check("stages.md", &format!("{}\n", text.trim_end()));
}

/// What the document says before the forms.
const JSON: &str = "# JSON forms

Generated from the program's answers to a small pipeline. Every `--json` form is one object with `version` (1) and one more key. Within a
version fields are added, never changed or removed. A list without a type may be empty; a field with two types (`plan[].outlook`) has either.

A log (`ovenbird log RUN --json`) is one event a line; its first event, `run_started`, has the version. Besides the events below there are
`notice`, `step_note`, `step_progress`, `measured`, `item_failed`, `step_failed`, `step_skipped` and `interrupted` (`src/event.rs`).

A pipeline with variants or seeds adds to the forms of `log RUN` and `report` (numbers from 0 to 1):

";

#[test]
fn every_json_form_is_documented() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    let status: Value = serde_json::from_str(&world.run(["status", "--json"]).success().stdout).unwrap();
    let run = status["run"]["run"].as_str().unwrap().to_owned();
    world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.score_threshold=0.9"]).success();
    let second: Value = serde_json::from_str(&world.run(["status", "--json"]).success().stdout).unwrap();
    let second = second["run"]["run"].as_str().unwrap();
    let record = world.find(&["annotations-split", "unit.json"]);
    let forms: [(&str, &[&str]); 14] = [
        ("plan PIPELINE", &["plan", "./tiny.yaml", "--until", "lvis", "--set", "detect.nms_iou=0.3", "--json"]),
        ("explain PIPELINE STEP", &["explain", "./tiny.yaml", "coco", "--set", "detect.nms_iou=0.3", "--json"]),
        ("explain PIPELINE STEP/UNIT", &["explain", "./tiny.yaml", "coco/0", "--json"]),
        ("status", &["status", "--json"]),
        ("log", &["log", "--json"]),
        ("log RUN", &["log", &run, "--json"]),
        ("diff RUN RUN", &["diff", &run, second, "--json"]),
        ("report", &["report", "--json"]),
        ("cache du", &["cache", "du", "--json"]),
        ("cache gc", &["cache", "gc", "--keep-for", "0s", "--grace", "0s", "--json"]),
        ("stages", &["stages", "--json"]),
        ("doctor", &["doctor", "--json"]),
        ("pipelines", &["pipelines", "--json"]),
        ("verify", &["verify", "--full", "--json"]),
    ];
    let mut text = String::from(JSON) + &lines(&forms_of_a_matrix()) + "\n";
    for (name, args) in forms {
        if name == "verify" {
            fs::write(&record, "{").unwrap();
        }
        let output = world.run(args.iter().copied());
        let mut found = BTreeSet::new();
        if name == "log RUN" {
            output.stdout.lines().for_each(|line| paths(&serde_json::from_str(line).unwrap(), "", &mut found));
            // These come when there is something to say.
            found.retain(|path| !["notice", "step_note", "step_progress"].iter().any(|event| path.starts_with(&format!(".event.{event}"))));
        } else {
            paths(&serde_json::from_str(&output.stdout).unwrap(), "", &mut found);
        }
        text.push_str(&format!("## {name}\n\n{}\n", lines(&found)));
    }
    text.push_str(&format!("## predict PIPELINE IMAGE...\n\n{}\n", lines(&form_of_predictions())));
    check("json.md", &format!("{}\n", text.trim_end()));
}

/// Of an image with detections, and of one that cannot be read.
fn form_of_predictions() -> BTreeSet<String> {
    let world = crate::predict::ran("test");
    let predicted = world.run(["predict", "./small.yaml", "images/val", "missing.jpg", "--min-score", "0", "--json"]);
    let mut found = BTreeSet::new();
    paths(&serde_json::from_str(&predicted.stdout).unwrap(), "", &mut found);
    found
}

/// What variants and seeds add to the forms.
fn forms_of_a_matrix() -> BTreeSet<String> {
    let world = crate::matrix::small();
    world.run(["run", "./matrix.yaml"]).success();
    let report: Value = serde_json::from_str(&world.run(["report", "--json"]).success().stdout).unwrap();
    let log = world.run(["log", report["report"]["run"].as_str().unwrap(), "--json"]).success().stdout;
    let mut found = BTreeSet::new();
    paths(&serde_json::from_str(log.lines().next().unwrap()).unwrap(), "", &mut found);
    paths(&report, "", &mut found);
    found.retain(|path| path.starts_with(".event.run_started.matrix.") || path.starts_with(".report.comparisons[]."));
    found
}

/// Where values are in a JSON document, with their types: `plan[].outlook.run.reasons[]: string`.
fn paths(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    let kind = match value {
        Value::Object(fields) => {
            if path.ends_with(".parameters") {
                found.insert(format!("{path}: a JSON Schema"));
                return;
            }
            for (name, value) in fields {
                // Names that data choose.
                let is_chosen = [".kinds", ".ports", ".groups", ".steps", ".inputs", ".settings"].iter().any(|of| path.ends_with(of));
                let name = if is_chosen { "NAME" } else { name };
                paths(value, &format!("{path}.{name}"), found);
            }
            return;
        }
        Value::Array(values) => {
            if values.is_empty() {
                found.insert(format!("{path}[]"));
            }
            return values.iter().for_each(|value| paths(value, &format!("{path}[]"), found));
        }
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "number",
        Value::String(_) => "text",
    };
    found.insert(format!("{path}: {kind}"));
}

/// One line of code for each path.
fn lines(paths: &BTreeSet<String>) -> String {
    paths.iter().map(|path| format!("    {}\n", path.trim_start_matches('.'))).collect()
}
