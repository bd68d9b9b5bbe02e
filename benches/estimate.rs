//! What `ovenbird run --estimate` predicts, as a ratio to what the run then takes: for stages of 2,600 images.
//!
//! Limit: a sample of 64 items or more and a whole of 2,600 share the same start-up and the same rate, so that only the clock's noise and other
//! work on the machine are between 1.0 and the ratio; the goal is 0.75 to 1.25.
//!
//! `make bench`; `OVENBIRD_BENCH_IMAGES` sets the number of images.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

use std::{fs, process::Command};

use serde_json::Value;

const STEPS: [&str; 3] = ["crops", "globals", "regions"];

fn main() {
    let n_images: usize = std::env::var("OVENBIRD_BENCH_IMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(2600);
    let folder = tempfile::tempdir().unwrap();
    let pipeline = format!(
        "version: 1
name: estimate
stages:
  - {{id: world, use: toy/world, with: {{train_images: 1, val_images: {n_images}, web_images: 0, held_out_images: 0}}, resources: {{cpu: 2}}}}
  - {{id: clip, use: toy/clip}}
  - {{id: val, use: annotations/split, in: {{annotations: world.lvis_val}}, with: {{classes: lvis-frequency}}}}
  - {{id: proposals, use: proposals/import, in: {{proposals: world.val_proposals, annotations: val.annotations}}}}
  - {{id: crops, use: crops/objects, in: {{images: world.images, annotations: val.annotations}}, resources: {{cpu: 2}}}}
  - id: globals
    use: clip/globals
    in: {{images: world.images, annotations: val.annotations, checkpoint: clip.checkpoint}}
    with: {{resize: square, clip: {{precision: f32}}}}
    resources: {{cpu: 2}}
  - id: regions
    use: clip/proposals
    in: {{images: world.images, annotations: val.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}}
    with: {{clip: {{precision: f32}}}}
    resources: {{cpu: 2}}
"
    );
    fs::write(folder.path().join("estimate.yaml"), pipeline).unwrap();
    let ovenbird = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ovenbird")).args(args).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let table = ovenbird(&["run", "./estimate.yaml", "--estimate"]);
    println!("{table}");
    // One step after the other, as in the estimate.
    for until in STEPS {
        ovenbird(&["run", "./estimate.yaml", "--until", until]);
    }
    println!("{:10} {:>10} {:>10} {:>6}   goal 0.75 to 1.25", "step", "predicted", "took", "ratio");
    for step in STEPS {
        let line = table.lines().find(|line| line.starts_with(step)).unwrap();
        // Step, sample, whole, start-up with its unit, items/s, then the time.
        let words: Vec<&str> = line.split_whitespace().collect();
        let predicted = seconds(&words[6..]);
        let log: Vec<Value> = log_lines(folder.path(), step);
        let took = log.iter().find_map(|event| event["step_done"]["wall_s"].as_f64()).unwrap();
        println!("{step:10} {predicted:>8.1} s {took:>8.1} s {:>6.2}", predicted / took);
    }
}

/// The events of the run that computed a step.
fn log_lines(folder: &std::path::Path, step: &str) -> Vec<Value> {
    let runs = fs::read_dir(folder.join(".ovenbird/runs")).unwrap().map(|run| run.unwrap().path().join("events.jsonl"));
    let events = runs.flat_map(|log| fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect::<Vec<_>>());
    let events = events.filter_map(|line| serde_json::from_str::<Value>(&line).ok()).map(|line| line["event"].clone());
    events.filter(|event| event["step_done"]["step"] == step).collect()
}

/// `9.8 s`, `3 min 12 s`.
fn seconds(words: &[&str]) -> f64 {
    let pairs = words.chunks_exact(2).map_while(|pair| {
        let unit = match pair[1] {
            "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        Some(pair[0].parse::<f64>().ok()? * unit)
    });
    pairs.sum()
}
