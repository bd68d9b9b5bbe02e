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
    assert_eq!(json(&world, &["pipelines", "--json"])["pipelines"][0]["name"], "quickstart");
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
    for words in ["detect/zero-shot (version 1)", "features: region-features", "nms_iou: number = 0.5", "A box falls when it overlaps"] {
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
