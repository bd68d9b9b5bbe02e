//! What people bring: each folder of `tests/reports/` is a small input of the kind that somebody complained of, with what its user
//! rightly expects in its README. Every one is run as its README says.

use std::{fs, path::PathBuf};

use crate::support::{Output, World, copy};

/// How a folder's command ends.
struct Report {
    folder: &'static str,
    code: i32,
    /// What the program says on the way.
    says: &'static [&'static str],
}

const fn report(folder: &'static str, code: i32, says: &'static [&'static str]) -> Report {
    Report { folder, code, says }
}

const CHECKPOINTS: &[Report] = &[
    report("02-checkpoint-with-nan", 4, &["clip.pt: visual.proj: expected finite numbers, found 1 of 256 that are not"]),
    report("03-fine-tuned-openai-weights", 4, &["cannot tell which GELU", "`with: {clip: {gelu: quick}}`"]),
];

const PROPOSALS: &[Report] = &[
    report("01-proposals-in-file-order", 4, &["the boxes fit both orders", "`with: {order: file}`", "`with: {order: id}`"]),
    report("21-image-without-proposals", 0, &["proposals  done"]),
    report("22-proposals-by-id", 0, &["proposals  done"]),
    report("22-proposals-by-path", 0, &["proposals  done"]),
    report("25-proposals-in-file-order-other-sizes", 0, &["the boxes fit that order only (`with: {order: file}`)"]),
    report("40-proposals-array-of-arrays", 0, &["proposals  done"]),
    report("41-image-without-proposals-1d", 0, &["proposals  done"]),
    report("42-proposals-as-plain-lists", 0, &["proposals  done"]),
];

const ANNOTATIONS: &[Report] = &[report("06-masks-of-empty-outlines", 4, &["annotation 1 of image 1 has an empty list as `segmentation`"])];

const IMAGES: &[Report] = &[];

fn folders() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reports"))
}

/// Types what a folder's README says, in a copy of the folder.
fn tried(folder: &str) -> (World, Output) {
    let world = World::new();
    copy(&folders().join(folder), &world.path(""));
    let readme = fs::read_to_string(world.path("README.md")).unwrap();
    let (_, command) = readme.split_once("Type, in this folder: `").unwrap();
    let (command, _) = command.split_once("`\n").unwrap();
    let command = command.replace("\"$(mktemp -d)\"", ".ovenbird");
    let mut output = None;
    for part in command.split("; ") {
        let mut words = part.split(' ');
        output = Some(match words.next().unwrap() {
            "ovenbird" => world.run(words),
            "sh" => {
                let mut shell = std::process::Command::new("sh");
                shell.args(words).current_dir(world.path(""));
                world.output(shell)
            }
            other => panic!("{folder}: {other}?"),
        });
    }
    (world, output.unwrap())
}

fn check(reports: &[Report]) {
    for Report { folder, code, says } in reports {
        let (_world, output) = tried(folder);
        let said = format!("{}{}", output.stdout, output.stderr);
        assert_eq!(output.code, *code, "{folder}: {said}");
        for words in *says {
            assert!(said.contains(words), "{folder}: `{words}` is missing in:\n{said}");
        }
    }
}

#[test]
fn checkpoints_are_read_or_named() {
    check(CHECKPOINTS);
}

#[test]
fn proposals_are_read_or_named() {
    check(PROPOSALS);
}

#[test]
fn annotations_are_read_or_named() {
    check(ANNOTATIONS);
}

#[test]
fn images_are_read_or_named() {
    check(IMAGES);
}
