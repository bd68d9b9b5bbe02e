//! Ctrl-C, SIGTERM and SIGUSR1: finished work is kept, and the next run continues from it to the same bytes.

use std::{
    collections::BTreeMap,
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::support::{Output, World, until};

const PIPELINE: &str = "version: 1
name: signals
stages:
  - id: world
    use: toy/world
    with: {train_images: 30, val_images: 90, web_images: 300, held_out_images: 0, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {steps: 100, batch_size: 16, checkpoint_every: 1000}
  - {id: val, use: annotations/split, in: {annotations: world.lvis_val}, with: {classes: lvis-frequency}}
  - {id: proposals, use: proposals/import, in: {proposals: world.val_proposals, annotations: val.annotations}}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: val.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
";

fn signals() -> World {
    let world = World::new();
    world.write("signals.yaml", PIPELINE);
    world
}

fn start(world: &World, args: &[&str]) -> Child {
    let mut command = world.command([&["run", "./signals.yaml"], args].concat());
    command.stderr(Stdio::piped()).spawn().unwrap()
}

fn send(signal: &str, to: &Child) {
    assert!(Command::new("kill").args([signal, &to.id().to_string()]).status().unwrap().success());
}

fn ended(run: Child) -> Output {
    let output = run.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Output { stdout: text(&output.stdout), stderr: text(&output.stderr), code: output.status.code().unwrap_or(-1) }
}

/// Whether the step has gone some way, by the logs.
fn is_under_way(world: &World, step: &str) -> bool {
    world.logs().contains(&format!("{{\"step_progress\":{{\"step\":\"{step}\""))
}

/// The files of a stage's units, other than the records, which say how much was reused.
fn contents(world: &World, kind: &str) -> BTreeMap<String, Vec<u8>> {
    world.units().into_iter().filter(|(name, _)| name.starts_with(&format!("units/{kind}/")) && !name.ends_with("unit.json")).collect()
}

fn n_parts(world: &World, kind: &str) -> usize {
    fs::read_dir(world.path(".ovenbird/parts").join(kind)).map_or(0, Iterator::count)
}

#[test]
fn a_stopped_training_continues_after_its_last_step_to_the_same_bytes() {
    let undisturbed = signals();
    undisturbed.run(["run", "./signals.yaml", "--until", "clip"]).success();

    let world = signals();
    let (mut n_stopped, mut n_continued) = (0, 0);
    for signal in ["-TERM", "-USR1", "-INT"] {
        let n_before = world.logs().matches("\"measured\"").count();
        let run = start(&world, &["--until", "clip"]);
        let is_done = || world.logs().contains("{\"step_done\":{\"step\":\"clip\"");
        until(|| world.logs().matches("\"measured\"").count() > n_before || is_done());
        if is_done() {
            ended(run);
            break;
        }
        send(signal, &run);
        let output = ended(run);
        if output.code == 130 {
            n_stopped += 1;
            assert!(output.stderr.contains("the state after step "), "{}", output.stderr);
            assert!(n_parts(&world, "clip-pretrain") == 1 && world.units_of("clip/pretrain").is_empty());
        }
        n_continued += usize::from(output.stderr.contains("continues after step "));
    }
    assert!(n_stopped >= 2 && n_continued >= 1, "{n_stopped} {n_continued}");
    world.run(["run", "./signals.yaml", "--until", "clip"]).success();
    assert_eq!(contents(&world, "clip-pretrain"), contents(&undisturbed, "clip-pretrain"));
    assert_eq!(n_parts(&world, "clip-pretrain"), 0);
}

#[test]
fn the_images_of_a_unit_that_was_stopped_are_not_embedded_again() {
    let undisturbed = signals();
    undisturbed.run(["run", "./signals.yaml"]).success();

    let world = signals();
    world.run(["run", "./signals.yaml", "--until", "clip"]).success();
    let run = start(&world, &["--jobs", "1"]);
    until(|| is_under_way(&world, "regions"));
    send("-INT", &run);
    let output = ended(run);
    assert!(output.code == 130 && output.stderr.contains(" images of a unit are kept for the next run"), "{}", output.stderr);
    let plan = world.run(["plan", "./signals.yaml"]).success();
    assert!(plan.stdout.contains(" items copied from clip-proposals/"), "{}", plan.stdout);
    world.run(["run", "./signals.yaml"]).success();
    assert_eq!(contents(&world, "clip-proposals"), contents(&undisturbed, "clip-proposals"));
    assert_eq!(n_parts(&world, "clip-proposals"), 0);
}

#[test]
fn a_damaged_part_is_found_and_its_work_is_done_again() {
    let undisturbed = signals();
    undisturbed.run(["run", "./signals.yaml", "--until", "clip"]).success();

    for is_repaired in [true, false] {
        let world = signals();
        let run = start(&world, &["--until", "clip"]);
        until(|| world.logs().contains("\"measured\""));
        send("-TERM", &run);
        assert_eq!(ended(run).code, 130);
        let part = fs::read_dir(world.path(".ovenbird/parts/clip-pretrain")).unwrap().next().unwrap().unwrap().path();
        let state = part.join("state/state.safetensors");
        let mut bytes = fs::read(&state).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&state, &bytes).unwrap();

        let found = world.run(["verify", "--full"]);
        assert!(
            found.code == 6 && found.stdout.contains("part ") && found.stdout.contains("does not match its digest"),
            "{}",
            found.stdout
        );
        if is_repaired {
            world.run(["verify", "--full", "--fix"]).success();
            world.run(["verify", "--full"]).success();
        }
        let run = world.run(["run", "./signals.yaml", "--until", "clip"]).success();
        assert_eq!(run.stderr.contains("is damaged, and done again"), !is_repaired, "{}", run.stderr);
        assert_eq!(contents(&world, "clip-pretrain"), contents(&undisturbed, "clip-pretrain"));
    }
}

/// Steps of many pictures take long, so that the run does not end by itself in time.
const LONG_STEPS: [&str; 6] = ["--until", "clip", "--set", "clip.batch_size=300", "--set", "clip.steps=1000"];

#[test]
fn a_second_signal_and_the_end_of_the_grace_period_stop_at_once() {
    for is_twice in [true, false] {
        let world = signals();
        let grace = if is_twice { "1h" } else { "1s" };
        let run = start(&world, &[&LONG_STEPS[..], &["--grace", grace]].concat());
        until(|| world.logs().contains("{\"step_started\":{\"step\":\"clip\""));
        // Pictures are read before the first step.
        thread::sleep(Duration::from_secs(1));
        send("-INT", &run);
        if is_twice {
            until(|| world.logs().contains("interrupted"));
            send("-TERM", &run);
        }
        let asked = Instant::now();
        let output = ended(run);
        assert!(output.code == 130 && asked.elapsed() < Duration::from_secs(60), "{}", output.stderr);
        let has_kept = output.stderr.contains("the state after step ");
        assert!(has_kept || output.stderr.contains(" of work will be done again"), "{}", output.stderr);
        let status = world.run(["status"]).success();
        assert!(status.stdout.contains("stopped") && !status.stdout.contains("died"), "{}", status.stdout);
    }
}

#[test]
fn parts_and_dry_runs_are_listed_and_deleted_when_nothing_needs_them() {
    let world = signals();
    let run = start(&world, &["--until", "clip"]);
    until(|| world.logs().contains("\"measured\""));
    send("-INT", &run);
    assert_eq!(ended(run).code, 130);
    world.run(["run", "./signals.yaml", "--until", "clip", "--dry-run", "8"]).success();
    let used = world.run(["cache", "du"]).success();
    assert!(used.stdout.contains("clip-pretrain") && used.stdout.contains("dry runs"), "{}", used.stdout);
    // The next run would continue from the part.
    let gc = world.run(["cache", "gc", "--grace", "0s", "--keep-for", "0s", "--delete", "--yes"]).success();
    assert!(gc.stdout.contains("1 dry run deleted"), "{}", gc.stdout);
    assert!(n_parts(&world, "clip-pretrain") == 1 && !world.path(".ovenbird/dry-run/8").exists());
    // Another seed: nothing needs it any more.
    world.run(["run", "./signals.yaml", "--until", "clip", "--set", "clip.seed=8", "--set", "clip.steps=2"]).success();
    let gc = world.run(["cache", "gc", "--grace", "0s", "--keep-for", "0s", "--keep-runs", "0", "--delete", "--yes"]).success();
    assert!(gc.stdout.contains("1 unfinished unit that no run will continue"), "{}", gc.stdout);
    assert_eq!(n_parts(&world, "clip-pretrain"), 0);
    world.run(["verify", "--full"]).success();
}
