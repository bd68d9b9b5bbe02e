//! Variants and seeds: one graph, common stages once, and all of it side by side.

use std::process::Stdio;

use serde_json::Value;

use crate::support::{World, until};

const MATRIX: &str = "seeds: [7, 8]
variants:
  cool: {}
  warm: {temperature: 0.5}
  strict: {detect.nms_iou: 0.1, detect.score_threshold: 0.02}
";
const SMALL: &str = r#"version: 1
name: small
variables: {seed: 7, temperature: 0.02}
stages:
  - id: world
    use: toy/world
    with: {seed: 7, train_images: 6, val_images: 6, web_images: 40, held_out_images: 60, side_px: 160}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions}
    with: {seed: "${seed}", steps: 2, checkpoint_every: 1, batch_size: 8}
  - id: val
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
    with: {keep: all-annotated}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: val.classes}
  - id: proposals
    use: proposals/import
    in: {proposals: world.val_proposals, annotations: val.annotations}
    with: {max_per_image: 5}
  - id: regions
    use: clip/proposals
    in: {images: world.images, annotations: val.annotations, proposals: proposals.proposals, checkpoint: clip.checkpoint}
    with: {clip: {precision: f32}}
  - id: detect
    use: detect/zero-shot
    in: {features: regions.features, prompts: prompts.prompts, classes: val.classes, annotations: val.annotations}
    with: {temperature: "${temperature}"}
  - id: coco
    use: eval/coco
    in: {annotations: val.annotations, detections: detect.detections, classes: val.classes}
"#;
/// By stage: one for each seed, one for each variant and seed.
const STEPS: [&str; 21] = [
    "clip@7",
    "clip@8",
    "coco@cool,7",
    "coco@cool,8",
    "coco@strict,7",
    "coco@strict,8",
    "coco@warm,7",
    "coco@warm,8",
    "detect@cool,7",
    "detect@cool,8",
    "detect@strict,7",
    "detect@strict,8",
    "detect@warm,7",
    "detect@warm,8",
    "prompts@7",
    "prompts@8",
    "proposals",
    "regions@7",
    "regions@8",
    "val",
    "world",
];

/// A small pipeline with three variants and two seeds, `./matrix.yaml`.
pub(crate) fn small() -> World {
    let world = World::new();
    world.write("matrix.yaml", SMALL.replace("stages:\n", &format!("{MATRIX}stages:\n")));
    world.write("plain.yaml", SMALL);
    world
}

/// The comparison that a run ends with; numbers are `#`, and columns one space apart.
fn table(stdout: &str) -> String {
    let (table, _) = stdout.split_once("report: ").unwrap();
    let mut text = String::new();
    for line in table.lines().filter(|line| !line.is_empty()) {
        let is_number = |word: &&str| word.parse::<f64>().is_ok_and(|_| word.contains('.'));
        let words: Vec<&str> = line.split_whitespace().map(|word| if is_number(&word) { "#" } else { word }).collect();
        text.push_str(&format!("{}\n", words.join(" ")));
    }
    text
}

#[test]
fn common_stages_run_once_and_all_variants_end_in_one_table() {
    let world = small();
    insta::assert_snapshot!(world.run(["plan", "./matrix.yaml"]).success().stdout, @r"
    world        run      first run
    clip (2)     waits    for world
    val          waits    for world
    prompts (2)  waits    for clip, val
    proposals    waits    for world, val
    regions (2)  waits    for world, clip, val, proposals
    detect (6)   waits    for val, prompts, regions
    coco (6)     waits    for val, detect
    0 up to date, 1 to run, up to 20 more after it
    ");
    let first = world.run(["run", "./matrix.yaml"]).success();
    assert_eq!(first.steps("will run"), STEPS);
    assert!(first.stderr.contains("of `small`: 3 variants x 2 seeds, 21 steps"), "{}", first.stderr);
    insta::assert_snapshot!(table(&first.stdout), @r"
    coco (eval/coco): AP50, mean ± standard deviation over the seeds 7, 8; with a sign, the difference to cool
    variant novel base all
    cool # ± # # ± # # ± #
    warm # ± # # ± # # ± # # ± # # ± # # ± #
    strict # ± # # ± # # ± # # ± # # ± # # ± #
    ");

    // Nothing is done twice, nor by the same pipeline without variants: recipes do not know of them.
    let again = world.run(["run", "./matrix.yaml"]).success();
    assert_eq!(again.steps("reused"), STEPS);
    assert!(again.stdout.contains("nothing to do"), "{}", again.stdout);
    let plain = world.run(["run", "./plain.yaml"]).success();
    assert!(plain.stdout.contains("nothing to do") && plain.stdout.contains("novel"), "{}", plain.stdout);

    // The numbers of the page and of its JSON form are those of the evaluations.
    let page = world.run(["report"]).success();
    assert!(page.stdout.contains("report.html"));
    let run = world.run(["run", "./matrix.yaml"]).success();
    let page = run.stdout.lines().find_map(|line| line.strip_prefix("report: ")).unwrap();
    let page = std::fs::read_to_string(world.path(page)).unwrap();
    let place = |words: &str| page.find(words).unwrap_or_else(|| panic!("{words}"));
    // A stage is drawn once, with how many copies it has.
    assert!(page.contains(">clip × 2</text>") && !page.contains(">clip@7</text>"));
    // Each variant is shown with what it sets.
    assert!(page.contains("<code>temperature=0.5</code>") && page.contains("<td class=\"words\">as the file</td>"));
    assert!(page.contains("<code>detect.nms_iou=0.1</code><br><code>detect.score_threshold=0.02</code>"));
    assert!(place("<h2>coco: side by side</h2>") < place("Every seed") && place("Every seed") < place("<h2>coco@cool,7</h2>"));
    let report: Value = serde_json::from_str(&world.run(["report", "--json"]).success().stdout).unwrap();
    // Without the first variant there is nothing to differ from.
    let others = world.run(["run", "./matrix.yaml", "--variant", "warm", "--variant", "strict"]).success();
    assert!(others.stdout.contains("over the seeds 7, 8\n") && !others.stdout.contains("the difference to"), "{}", others.stdout);
    let ap50 = |step: &str| {
        let found = report["report"]["evaluations"].as_array().unwrap().iter().find(|found| found["step"] == step).unwrap();
        found["groups"]["novel"]["ap50"].as_f64().unwrap()
    };
    let warm = &report["report"]["comparisons"][0]["rows"][1];
    assert_eq!(warm["variant"], "warm");
    assert_eq!(warm["settings"], serde_json::json!(["temperature=0.5"]));
    let value = warm["values"].as_array().unwrap().iter().find(|value| value["group"] == "novel" && value["metric"] == "AP50").unwrap();
    let differences = [ap50("coco@warm,7") - ap50("coco@cool,7"), ap50("coco@warm,8") - ap50("coco@cool,8")];
    let sd = (differences[0] - differences[1]).abs() / 2_f64.sqrt();
    let is_close = |found: &Value, expected: f64| assert!((found.as_f64().unwrap() - expected).abs() < 1e-12, "{found} {expected}");
    is_close(&value["over_seeds"]["mean"], f64::midpoint(ap50("coco@warm,7"), ap50("coco@warm,8")));
    is_close(&value["difference"]["mean"], f64::midpoint(differences[0], differences[1]));
    is_close(&value["difference"]["sd"], sd);
}

#[test]
fn a_changed_variant_runs_what_it_touches_and_what_is_not_chosen_is_said() {
    let world = small();
    let some = world.run(["run", "./matrix.yaml", "--set", "seed=8", "--variant", "warm", "--until", "detect@warm,8"]).success();
    assert_eq!(some.steps("will run"), ["clip@8", "detect@warm,8", "prompts@8", "proposals", "regions@8", "val", "world"]);
    let some = world.run(["run", "./matrix.yaml", "--set", "seed=8", "--variant", "warm", "--variant", "cool"]).success();
    assert_eq!(some.steps("will run"), ["coco@cool,8", "coco@warm,8", "detect@cool,8"]);
    insta::assert_snapshot!(table(&some.stdout), @r"
    coco (eval/coco): AP50, seed 8; with a sign, the difference to cool
    variant novel base all
    cool # # #
    warm # # # # # #
    missing: `strict` not chosen
    missing: seed 7 not chosen
    ");

    let text = std::fs::read_to_string(world.path("matrix.yaml")).unwrap();
    world.write("matrix.yaml", text.replace("warm: {temperature: 0.5}", "warm: {temperature: 0.4}"));
    insta::assert_snapshot!(world.run(["plan", "./matrix.yaml", "--set", "seed=8"]).success().stdout, @r"
    world            up to date
    val              up to date
    proposals        up to date
    clip@8           up to date
    prompts@8        up to date
    regions@8        up to date
    detect@cool,8    up to date
    coco@cool,8      up to date
    detect@warm,8    run      with.temperature: 0.5 -> 0.4
    coco@warm,8      waits    for detect; runs again only if its output changes
    detect@strict,8  run      first run
    coco@strict,8    waits    for detect
    8 up to date, 2 to run, up to 2 more after them
    ");
    // A name of the file stands for all copies.
    let explained = world.run(["explain", "./matrix.yaml", "detect", "--set", "seed=8"]).success().stdout;
    for words in ["detect@cool,8: is stored", "detect@warm,8: would run", "with.temperature: 0.5 -> 0.4", "detect@strict,8: would run"] {
        assert!(explained.contains(words), "{explained}");
    }
    let touched = world.run(["run", "./matrix.yaml", "--set", "seed=8", "--variant", "warm", "--variant", "cool"]).success();
    assert_eq!(touched.steps("will run"), ["coco@warm,8", "detect@warm,8"]);

    let unknown = world.run(["plan", "./matrix.yaml", "--variant", "wram"]);
    assert!(unknown.code == 2 && unknown.stderr.contains("no variant `wram`, did you mean `warm`?"), "{}", unknown.stderr);
    let unknown = world.run(["plan", "./matrix.yaml", "--until", "detect@warm,9"]);
    assert!(unknown.code == 2 && unknown.stderr.contains("did you mean `detect@warm,8`?"), "{}", unknown.stderr);
}

#[test]
fn a_matrix_that_is_killed_continues_and_is_repaired_by_what_it_was_asked() {
    let (undisturbed, killed) = (small(), small());
    undisturbed.run(["run", "./matrix.yaml"]).success();
    let mut running = killed.command(["run", "./matrix.yaml"]).stdout(Stdio::null()).spawn().unwrap();
    until(|| killed.units_of("clip/pretrain").len() >= 2);
    running.kill().unwrap();
    running.wait().unwrap();
    killed.run(["run", "./matrix.yaml", "--variant", "strict"]).success();
    killed.run(["run", "./matrix.yaml"]).success();
    assert!(killed.units() == undisturbed.units());

    let evaluation = killed.find(&["eval-coco", "evaluation.json"]);
    std::fs::write(evaluation, "{}").unwrap();
    let fixed = killed.run(["verify", "--full", "--fix"]).success();
    assert!(fixed.stdout.contains("recomputed, with the same digests"), "{}", fixed.stdout);
    assert!(killed.units() == undisturbed.units());
}
