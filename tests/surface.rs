//! Everything else the command line offers.

use serde_json::Value;

use crate::support::World;

fn json(world: &World, args: &[&str]) -> Value {
    let output = world.run(args.iter().copied()).success();
    let value: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(value["version"], 1, "{args:?}");
    value
}

#[test]
fn every_json_form_has_a_version() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "val"]).success();
    assert_eq!(json(&world, &["plan", "./tiny.yaml", "--until", "val", "--json"])["plan"][0]["outlook"], "reused");
    assert_eq!(json(&world, &["status", "--json"])["run"]["outcome"], "done");
    assert_eq!(json(&world, &["log", "--json"])["runs"].as_array().unwrap().len(), 1);
    assert!(json(&world, &["stages", "--json"])["stages"].as_array().unwrap().len() >= 11);
    assert_eq!(json(&world, &["pipelines", "--json"])["pipelines"][0]["name"], "oadp-ov-coco");
}

#[test]
fn the_event_log_of_a_run_is_json_lines_from_start_to_end() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "val"]).success();
    let status = json(&world, &["status", "--json"]);
    let run = status["run"]["run"].as_str().unwrap();
    let log = world.run(["log", run, "--json"]).success();
    let events: Vec<Value> = log.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events[0]["event"]["run_started"].is_object() && events.last().unwrap()["event"]["run_ended"].is_object());
}

#[test]
fn the_schema_knows_every_stage_and_its_parameters() {
    let schema: Value = serde_json::from_str(&World::new().run(["schema"]).success().stdout).unwrap();
    let stages = &schema["properties"]["stages"]["items"];
    let kinds = stages["properties"]["use"]["enum"].as_array().unwrap();
    assert_eq!(kinds.len(), stages["allOf"].as_array().unwrap().len());
    let detect =
        stages["allOf"].as_array().unwrap().iter().find(|case| case["if"]["properties"]["use"]["const"] == "detect/zero-shot").unwrap();
    assert_eq!(detect["then"]["properties"]["with"]["properties"]["nms_iou"]["default"], 0.5);
}

#[test]
fn a_stage_is_documented_from_its_types() {
    let page = World::new().run(["stages", "detect/zero-shot"]).success().stdout;
    for words in ["detect/zero-shot (version 3)", "features: region-features", "nms_iou: number = 0.5", "NMS removes"] {
        assert!(page.contains(words), "expected `{words}` in\n{page}");
    }
    let output = World::new().run(["stages", "detect/zeroshot"]);
    assert!(output.code == 2 && output.stderr.contains("did you mean `detect/zero-shot`?"), "{}", output.stderr);
}

#[test]
fn completions_and_man_pages_are_made() {
    let world = World::new();
    assert!(world.run(["completions", "bash"]).success().stdout.contains("_ovenbird"));
    world.run(["man", "man"]).success();
    assert!(std::fs::read_to_string(world.path("man/ovenbird-run.1")).unwrap().contains("ovenbird"));
}

#[test]
fn asking_for_a_run_that_is_not_there_says_what_to_type() {
    let output = World::new().run(["status"]);
    assert!(output.code == 2 && output.stderr.contains("ovenbird run quickstart"), "{}", output.stderr);
}

#[test]
fn explain_names_the_chain_of_causes_and_a_unit() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    let there = world.run(["explain", "./tiny.yaml", "coco"]).success().stdout;
    assert!(there.contains("coco: is stored") && there.contains("made by run "), "{there}");
    let why = world.run(["explain", "./tiny.yaml", "coco", "--set", "detect.nms_iou=0.4"]).success().stdout;
    assert!(why.contains("because detect: would run") && why.contains("with.nms_iou: 0.5 -> 0.4"), "{why}");
    let unit = world.run(["explain", "./tiny.yaml", "regions/0"]).success().stdout;
    assert!(unit.contains("is stored, 12 items, never verified") && unit.contains("features/regions.arrow"), "{unit}");
    world.run(["verify", "--full"]).success();
    let unit = world.run(["explain", "./tiny.yaml", "regions/0"]).success().stdout;
    assert!(unit.contains("(full)"), "{unit}");
    let output = world.run(["explain", "./tiny.yaml", "regions/7"]);
    assert!(output.code == 2 && output.stderr.contains("there is no unit 7"), "{}", output.stderr);
}

/// Nothing that cannot change a result makes anything run: comments, key order, cores.
#[test]
fn what_cannot_change_a_result_runs_nothing() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "prompts"]).success();
    let text = std::fs::read_to_string(world.path("tiny.yaml")).unwrap();
    let reordered = text.replace(
        "in: {annotations: world.train, classes: world.classes}",
        "in: {classes: world.classes, annotations: world.train} # why not",
    );
    assert_ne!(reordered, text);
    world.write("tiny.yaml", format!("# a comment\n{}", reordered.replace("resources: {cpu: 2}", "resources: {cpu: 1, memory: 2GiB}")));
    let run = world.run(["run", "./tiny.yaml", "--until", "prompts", "--jobs", "1", "--rehash"]).success();
    assert!(run.stdout.contains("nothing to do"), "{}", run.stdout);
}

#[test]
fn a_log_is_followed_while_its_run_goes_on() {
    let world = World::tiny();
    let mut running = world.command(["-v", "run", "./tiny.yaml", "--until", "val"]).spawn().unwrap();
    crate::support::until(|| world.logs().contains("step_started"));
    let run = world.run(["status", "--json"]).success();
    let run: Value = serde_json::from_str(&run.stdout).unwrap();
    let log = world.run(["log", run["run"]["run"].as_str().unwrap(), "--follow"]).success();
    assert!(log.stdout.contains("started") && log.stdout.contains("ended: done"), "{}", log.stdout);
    let status = running.wait().unwrap();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut running.stderr.take().unwrap(), &mut stderr).unwrap();
    assert!(status.success() && stderr.contains("step_done") && stderr.contains("run="), "{stderr}");
}

/// What a command does not heed it does not take.
#[test]
fn options_are_heeded_or_refused() {
    let world = World::tiny();
    world.write("deep.yaml", format!("version: 1\nname: deep\nstages: {}{}\n", "[".repeat(100_000), "]".repeat(100_000)));
    for (args, code, words) in [
        (&["explain", "./tiny.yaml", "coco", "--until", "world"][..], 2, "unexpected argument '--until'"),
        (&["export", "./tiny.yaml", "coco", "out", "--until", "world"], 2, "unexpected argument '--until'"),
        (&["run", "./tiny.yaml", "--jobs", "0"], 2, "0 is not in 1..=65535"),
        (&["verify", "--max-duration", "-1h"], 2, "unexpected argument"),
        (&["verify", "--max-duration", "1w"], 2, "expected for example 90s, 30m, 8h or 30d"),
        (&["cache", "gc", "--yes"], 2, "--delete"),
        (&["plan", "./deep.yaml"], 3, "recursion limit exceeded"),
    ] {
        let output = world.run(args.iter().copied());
        assert!(output.code == code && output.stderr.contains(words), "{args:?}: exit code {}\n{}", output.code, output.stderr);
    }
    world.run(["run", "./tiny.yaml", "--until", "world"]).success();
    world.run(["verify", "--max-duration", "99999999999999999h"]).success();
    let mut filtered = world.command(["status"]);
    filtered.env("OVENBIRD_LOG", "ovenbird=loud");
    let filtered = world.output(filtered);
    assert!(filtered.code == 2 && filtered.stderr.contains("OVENBIRD_LOG: "), "{}", filtered.stderr);
    let mut home = world.command(["run", "./tiny.yaml"]);
    home.env("OVENBIRD_HOME", <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"home-\xff"));
    let home = world.output(home);
    assert!(home.code == 2 && home.stderr.contains("the home's path is not UTF-8"), "{}", home.stderr);
}

#[test]
fn a_terminal_that_is_gone_or_full_ends_nothing() {
    let world = World::tiny();
    let closed = "exec \"$0\" run ./tiny.yaml --until world 2>&-";
    let full = "exec \"$0\" run ./tiny.yaml --until regions -v 2>/dev/full";
    let wrong = "exec \"$0\" run ./none.yaml 2>/dev/full";
    for (script, code) in [(closed, 0), (full, 0), (wrong, 4)] {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", script, env!("CARGO_BIN_EXE_ovenbird")]).current_dir(world.path(""));
        let status = shell.stdout(std::process::Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{script}");
    }
}
