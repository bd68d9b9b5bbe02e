//! The main job, small: it runs, it is not done twice, it survives being killed anywhere.

use std::{fs, process::Stdio};

use crate::support::{World, until};

const STEPS: [&str; 13] =
    ["clip", "coco", "detect", "globals", "lvis", "lvis-val", "objects", "prompts", "proposals", "regions", "train", "val", "world"];

#[test]
fn the_main_job_ends_with_tables_and_running_it_again_does_nothing() {
    let world = World::tiny();
    let first = world.run(["run", "./tiny.yaml"]).success();
    assert!(
        first.stdout.contains("coco (eval/coco)") && first.stdout.contains("novel") && first.stdout.contains("report: "),
        "{}",
        first.stdout
    );
    assert_eq!(first.steps("will run"), STEPS);
    let units = world.units();

    let again = world.run(["run", "./tiny.yaml"]).success();
    assert_eq!(again.steps("reused"), STEPS);
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    assert_eq!(world.units(), units);
}

#[test]
fn a_changed_parameter_runs_its_stage_and_what_depends_on_it() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    let plan = world.run(["plan", "./tiny.yaml", "--until", "coco", "--set", "detect.nms_iou=0.4"]).success();
    assert!(plan.stdout.contains("detect     run      with.nms_iou: 0.5 -> 0.4"), "{}", plan.stdout);
    assert!(plan.stdout.contains("coco       waits    for detect; runs again only if its output changes"), "{}", plan.stdout);
    let run = world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.nms_iou=0.4"]).success();
    assert_eq!(run.steps("will run"), ["coco", "detect"]);
}

#[test]
fn a_step_that_comes_out_the_same_stops_the_re_run_there() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml", "--until", "coco"]).success();
    // No score lies at the threshold's old or new value, so the detections are the same.
    let run = world.run(["run", "./tiny.yaml", "--until", "coco", "--set", "detect.score_threshold=0.0100001"]).success();
    assert_eq!(run.steps("will run"), ["detect"]);
}

#[test]
fn a_damaged_unit_is_made_again_with_the_same_bytes_and_nothing_else_is() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml"]).success();
    let whole = world.units();
    let shard = world.find(&["clip-proposals", "regions.arrow"]);
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();

    let plan = world.run(["plan", "./tiny.yaml"]).success();
    assert!(plan.stdout.contains("regions    run      damaged: ") && plan.stdout.contains("bytes, found"), "{}", plan.stdout);
    let run = world.run(["run", "./tiny.yaml"]).success();
    assert_eq!(run.steps("will run"), ["regions"]);
    assert_eq!(world.units(), whole);
}

#[test]
fn a_flipped_bit_is_found_when_it_is_read_and_healed_in_the_same_run() {
    let world = World::tiny();
    world.run(["run", "./tiny.yaml"]).success();
    let whole = world.units();
    let shard = world.find(&["clip-proposals", "regions.arrow"]);
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, &bytes).unwrap();

    let found = world.run(["run", "./tiny.yaml", "--set", "detect.nms_iou=0.3"]);
    assert!(found.code == 0 && found.stderr.contains("does not match its digest"), "{}", found.stderr);
    let now = world.units();
    assert!(whole.iter().all(|(name, bytes)| now.get(name) == Some(bytes)));
}

/// The process dies, as by `kill -9`, at steps of publishing spread over the whole run; `run` again always ends with the
/// bytes of a run that was left alone.
#[test]
fn a_run_killed_anywhere_continues_to_the_same_bytes() {
    let undisturbed = World::tiny();
    undisturbed.run(["run", "./tiny.yaml"]).success();
    let expected = undisturbed.units();

    let world = World::tiny();
    let mut n_killed = 0;
    for step in [3, 150, 40, 30, 21, 17, 13, 9, 5, 2] {
        let mut command = world.command(["run", "./tiny.yaml"]);
        command.env("OVENBIRD_CRASH_AT", step.to_string());
        n_killed += usize::from(world.output(command).code == -1);
    }
    assert!(n_killed >= 6, "only {n_killed} runs died");
    world.run(["run", "./tiny.yaml"]).success();
    assert_eq!(world.units(), expected);
}

#[test]
fn ctrl_c_stops_at_the_next_unit_and_the_run_continues_there() {
    let world = World::tiny();
    let mut command = world.command(["run", "./tiny.yaml", "--set", "clip.steps=400"]);
    let running = command.stderr(Stdio::piped()).spawn().unwrap();
    until(|| world.path(".ovenbird/units/clip-pretrain").read_dir().is_ok_and(|entries| entries.count() > 2));
    let killed = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = running.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let plan = world.run(["plan", "./tiny.yaml", "--set", "clip.steps=400", "--until", "clip"]).success();
    assert!(plan.stdout.contains("clip   resume   "), "{}", plan.stdout);
}

#[test]
fn four_processes_share_one_pipeline_and_make_every_unit_once() {
    let undisturbed = World::tiny();
    undisturbed.run(["run", "./tiny.yaml"]).success();

    let world = World::tiny();
    let running: Vec<_> = (0..4).map(|_| world.command(["run", "./tiny.yaml", "--jobs", "1"]).spawn().unwrap()).collect();
    for run in running {
        let output = run.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut made: Vec<String> = Vec::new();
    for line in world.logs().lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        let unit = &event["event"]["unit_committed"];
        if unit.is_object() {
            made.push(format!("{} {}", unit["step"], unit["unit"]));
        }
    }
    made.sort();
    // Of the three checkpoints of the CLIP, the first is pruned.
    assert_eq!(made.len(), world.n_units() + 1, "{made:?}");
    made.dedup();
    assert_eq!(made.len(), world.n_units() + 1, "a unit was made twice");
    assert_eq!(world.units(), undisturbed.units());
}

#[test]
fn a_run_waits_for_what_another_makes_and_takes_over_when_that_one_is_killed() {
    let world = World::tiny();
    let mut first = world.command(["run", "./tiny.yaml", "--until", "clip", "--set", "clip.steps=100000"]).spawn().unwrap();
    let is_training = || world.path(".ovenbird/units/clip-pretrain").read_dir().is_ok_and(|entries| entries.count() > 2);
    until(is_training);
    let second = world.command(["run", "./tiny.yaml", "--until", "clip", "--set", "clip.steps=100000"]).spawn().unwrap();
    until(|| world.logs().contains("waits for process "));
    first.kill().unwrap();
    first.wait().unwrap();
    // The older links of a training are removed as it goes on: there are not more of them, but others.
    let links = world.units_of("clip/pretrain");
    until(|| !world.units_of("clip/pretrain").is_subset(&links));
    // As Slurm does before it ends a job.
    assert!(std::process::Command::new("kill").args(["-USR1", &second.id().to_string()]).status().unwrap().success());
    let output = second.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
}
