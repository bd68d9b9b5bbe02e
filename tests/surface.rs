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
    assert_eq!(json(&world, &["pipelines", "--json"])["pipelines"][0]["name"], "cora-ov-coco");
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
    let world = World::new();
    for command in [&["status"][..], &["log"], &["log", "20261121-022350"], &["report"], &["verify"], &["cache", "du"]] {
        let output = world.run(command.iter().copied());
        let is_said = output.stderr.contains("there is no home here") && output.stderr.contains("ovenbird run quickstart");
        assert!(output.code == 5 && is_said, "{command:?}: exit code {}\n{}", output.code, output.stderr);
    }
    std::fs::create_dir(world.path(".ovenbird")).unwrap();
    let output = world.run(["status"]);
    assert!(output.code == 2 && output.stderr.contains("ovenbird run quickstart"), "{}", output.stderr);
}

/// A text with runs, fingerprints and times replaced.
fn redacted(text: &str) -> String {
    let is_number = |word: &str| word.chars().all(|c| c.is_ascii_digit() || c == '.');
    let line = |line: &str| {
        let mut words: Vec<&str> = line.split(' ').collect();
        for place in 0..words.len() {
            let is_time = matches!(words.get(place + 1), Some(unit) if ["s", "min", "s,"].contains(unit));
            if !words[place].is_empty() && is_number(words[place]) && is_time {
                words[place] = "N";
            } else if words[place].len() >= 15 && words[place].as_bytes()[8] == b'-' && words[place].starts_with("20") {
                words[place] = "RUN";
            }
        }
        format!("{}\n", words.join(" "))
    };
    text.lines().map(line).collect()
}

/// A split, and embeddings with a checkpoint that is none.
const PARTS: &str = r#"version: 1
name: parts
stages:
  - {id: split, use: annotations/split, in: {annotations: ./labels.json, classes: ./classes.json}, with: {keep: all}}
  - {id: globals, use: clip/globals, in: {images: ./images, annotations: split.annotations, checkpoint: ./clip.pt}}
"#;

fn parts() -> World {
    let world = World::new();
    world.write("parts.yaml", PARTS);
    let image = r#"{"id": 3, "file_name": "a.png", "width": 33, "height": 21}"#;
    world.write(
        "labels.json",
        format!(r#"{{"images": [{image}], "annotations": [], "categories": [{{"id": 1, "name": "cat"}}, {{"id": 2, "name": "dog"}}]}}"#),
    );
    world.write("classes.json", r#"{"base": ["cat"], "novel": ["dog"]}"#);
    world.write("images/b.png", "");
    world.write("clip.pt", "nothing\n");
    world
}

#[test]
fn status_shows_every_step_and_the_run_that_did_something() {
    let world = parts();
    assert_eq!(world.run(["run", "./parts.yaml"]).code, 4);
    insta::assert_snapshot!(redacted(&world.run(["status"]).success().stdout), @r"
    run RUN of `parts`: failed, N s
      split    done     N s
      globals  failed   ./clip.pt: expected safetensors, a torch.save archive or a TorchScript archive, found 8 bytes that begin with [6e, 6f, 74, 68, 69, 6e, 67, 0a]
    1 result stored, none checked with `verify` yet
    ");
    world.run(["run", "./parts.yaml", "--until", "split"]).success();
    // The latest run reused everything: the one before is shown.
    let status = world.run(["status"]).success().stdout;
    assert!(status.contains("`parts`: failed, "), "{status}");
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "val"]).success();
    insta::assert_snapshot!(redacted(&world.run(["status"]).success().stdout), @r"
    run RUN of `tiny`: done, N s
      world  done     N s
      val    done     N s
    2 results stored, none checked with `verify` yet
    ");
    world.run(["verify"]).success();
    let status = world.run(["status"]).success().stdout;
    assert!(status.contains("2 results stored, all checked with `verify` since "), "{status}");
}

#[test]
fn status_says_whether_a_run_is_alive_or_died() {
    let world = World::tiny();
    let mut running = world.command(["run", "./tiny.yaml", "--set", "clip.steps=100000", "--until", "prompts"]);
    let mut running = running.stderr(std::process::Stdio::null()).spawn().unwrap();
    crate::support::until(|| {
        let status = world.run(["status"]);
        status.code == 0 && status.stdout.contains("running steps: left ")
    });
    let status = world.run(["status"]).success().stdout;
    let alive = json(&world, &["status", "--json"]);
    running.kill().unwrap();
    running.wait().unwrap();
    assert!(status.contains(&format!("process {} on ", running.id())) && status.contains(" is alive: last sign of life "), "{status}");
    assert!(status.contains("prompts  waiting  for clip"), "{status}");
    assert!(
        alive["run"]["life"] == "alive" && alive["run"]["process"]["pid"] == running.id() && alive["run"]["ends"].is_string(),
        "{alive}"
    );
    let status = world.run(["status"]).success().stdout;
    assert!(status.contains("`tiny`: died at ") && status.contains(" has ended: type the same command again"), "{status}");
    let died = json(&world, &["status", "--json"]);
    assert_eq!((&died["run"]["life"], &died["run"]["steps"][1]["state"]), (&"died".into(), &"cut off".into()), "{died}");
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

#[test]
fn the_log_shows_commands_metrics_and_the_steps_that_ran() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.nms_iou=0.4"]).success();
    world.run(["run", "./tiny.yaml", "--until", "world"]).success();
    let log = world.run(["log"]).success().stdout;
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines[0].contains("  run ./tiny.yaml --until coco  ") && lines[0].contains("  done, ran 9 of 9 steps, "), "{log}");
    let number = |line: &str| line.split_once("  coco novel AP50 ").unwrap().1.split(' ').next().unwrap().parse::<f64>().unwrap();
    assert!(lines[1].contains("  run ./tiny.yaml --until coco --set detect.nms_iou=0.4  ") && number(lines[1]) >= 0.0, "{log}");
    assert!(lines[1].contains("done, ran detect, coco, "), "{log}");
    assert!(lines[2].contains("  –  ") && lines[2].contains("done, no step run, "), "{log}");
    let list = json(&world, &["log", "--json"]);
    assert_eq!(list["runs"][1]["steps_run"], serde_json::json!(["detect", "coco"]));
    assert_eq!((&list["runs"][1]["headlines"][0]["group"], &list["runs"][1]["headlines"][0]["metric"]), (&"novel".into(), &"AP50".into()));
    // Where a result is gone, the run is listed without it.
    std::fs::remove_dir_all(world.path(".ovenbird/artifacts")).unwrap();
    let log = world.run(["log"]).success().stdout;
    assert!(log.lines().next().unwrap().contains("  coco –  "), "{log}");
}

#[test]
fn two_runs_are_compared_by_commands_steps_recipes_and_metrics() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    world.run(["run", "./tiny.yaml", "--until", "detect", "--set", "detect.nms_iou=0.4"]).success();
    world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.score_threshold=0.9"]).success();
    let list = json(&world, &["log", "--json"]);
    let [a, b, c] = [0, 1, 2].map(|run| list["runs"][run]["run"].as_str().unwrap());
    let diff = world.run(["diff", a, b]).success().stdout.replace(a, "A").replace(b, "B");
    insta::assert_snapshot!(diff, @r"
    A  run ./tiny.yaml --until coco  done
    B  run ./tiny.yaml --until detect --set detect.nms_iou=0.4  done
    only in A: coco
    detect
      with.nms_iou: 0.5 -> 0.4
    ");
    let diff = world.run(["diff", a, c]).success().stdout;
    assert!(diff.contains("\ncoco\n  input `detections` changed (from `detect`)\n"), "{diff}");
    assert!(diff.contains("\ncoco all AP50  "), "{diff}");
    let form = json(&world, &["diff", a, c, "--json"]);
    assert_eq!(form["diff"]["steps"][1]["changes"][0]["field"], "in.detections");
    assert!(form["diff"]["metrics"].as_array().unwrap().iter().any(|metric| metric["first"] != metric["second"]), "{form}");
    let same = world.run(["diff", a, a]).success().stdout;
    assert!(same.ends_with("no step, parameter, input or metric differs\n"), "{same}");
    assert_eq!(world.run(["diff", a, "20200101-000000"]).code, 2);
}

#[test]
fn a_forced_step_is_computed_again_and_keeps_its_result_if_that_is_the_same() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    let before = world.units();
    let forced = world.run(["run", "./tiny.yaml", "--until", "coco", "--force", "regions", "--force", "detect"]).success();
    assert_eq!(forced.steps("will run"), ["detect", "regions"], "{}", forced.stderr);
    assert_eq!(forced.stderr.matches("computed again: the same bytes").count(), 2, "{}", forced.stderr);
    assert!(world.units() == before && !world.path(".ovenbird/quarantine").exists());
    assert_eq!(std::fs::read_dir(world.path(".ovenbird/dry-run")).unwrap().count(), 0);
    for (args, code) in
        [(&["--force", "detekt"][..], 2), (&["--force", "detect", "--until", "world"], 2), (&["--force", "detect", "--dry-run", "3"], 2)]
    {
        assert_eq!(world.run(["run", "./tiny.yaml"].into_iter().chain(args.iter().copied())).code, code, "{args:?}");
    }
    world.run(["verify", "--full"]).success();
}

/// The home forgot in which precision embeddings are computed, and is now on a machine with bf16.
#[test]
fn a_forced_step_with_another_result_replaces_the_earlier_one() {
    let world = World::tiny();
    let run = |bf16: &str, args: &[&str]| {
        let mut command = world.command(["run", "./tiny.yaml", "--until", "coco", "--set", "regions.clip.precision=auto"]);
        command.args(args);
        command.env("OVENBIRD_BF16", bf16);
        world.output(command).success()
    };
    run("no", &[]);
    std::fs::remove_dir_all(world.path(".ovenbird/choices")).unwrap();
    let forced = run("yes", &["--force", "regions"]);
    assert!(forced.stderr.contains("computed again: different: features; the earlier result is in quarantine"), "{}", forced.stderr);
    assert!(forced.steps("will run").contains(&"detect".to_owned()), "{}", forced.stderr);
    let n_aside = std::fs::read_dir(world.path(".ovenbird/quarantine")).unwrap().count();
    assert!(n_aside >= 2, "{n_aside}");
    let again = run("yes", &[]);
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    world.run(["verify", "--full"]).success();
}

#[test]
fn a_forced_step_that_is_interrupted_loses_nothing() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "clip"]).success();
    let before = world.units();
    for step in ["2", "9", "20"] {
        let _died = world.run(["run", "./tiny.yaml", "--until", "clip", "--force", "clip", "--crash-at", step]);
        assert!(world.units() == before, "after step {step}");
        let run = world.run(["run", "./tiny.yaml", "--until", "clip"]).success();
        assert!(run.stdout.contains("nothing to do"), "{}", run.stdout);
    }
    let forced = world.run(["run", "./tiny.yaml", "--until", "clip", "--force", "clip"]).success();
    assert!(forced.stderr.contains("computed again: the same bytes") && world.units() == before, "{}", forced.stderr);
}
