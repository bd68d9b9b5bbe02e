//! What lies where a pipeline looks for a file or a folder and is none: named, in seconds, and never waited for.

use std::{
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
        net::UnixListener,
    },
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use crate::support::{Output, World, copy, skip, until};

/// Far more than any of them takes, on a machine that does much else.
const PATIENCE: Duration = Duration::from_mins(2);

/// Every kind of file that a pipeline reads, and where the world has it.
const INPUTS: [&str; 5] = ["ann.json", "classes.json", "proposals.pkl", "clip.pt", "images"];

/// What lies there instead, and what the program calls it.
const STRAYS: [(&str, &str); 8] = [
    ("pipe", "a named pipe"),
    ("device", "a device"),
    ("dead link", "a dead link"),
    ("loop", "a loop of links"),
    ("socket", "a socket"),
    ("wrong kind", ""),
    ("empty", ""),
    ("unreadable", ""),
];

/// With all that `pipeline.yaml` reads.
fn world() -> World {
    let world = World::new();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reports/01-proposals-in-file-order"), &world.path(""));
    world
}

fn pipe(path: &Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0).unwrap();
}

/// Puts a stray there; false where this machine cannot, as root may read everything.
fn put(kind: &str, path: &Path) -> bool {
    let is_folder = path.is_dir();
    let remove = || if is_folder { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() };
    if kind == "unreadable" {
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
        let is_read = if is_folder { fs::read_dir(path).is_ok() } else { fs::read(path).is_ok() };
        return !is_read;
    }
    remove();
    match kind {
        "pipe" => pipe(path),
        "device" => symlink("/dev/zero", path).unwrap(),
        "dead link" => symlink("gone", path).unwrap(),
        "loop" => symlink(path.file_name().unwrap(), path).unwrap(),
        "socket" => drop(UnixListener::bind(path).unwrap()),
        "wrong kind" if is_folder => fs::write(path, "a file").unwrap(),
        "wrong kind" => fs::create_dir(path).unwrap(),
        "empty" if is_folder => fs::create_dir(path).unwrap(),
        "empty" => fs::write(path, "").unwrap(),
        other => panic!("{other}?"),
    }
    true
}

/// How a run ends, which has to be soon.
fn ended(world: &World, args: &[&str]) -> Output {
    let mut running = world.command(args.iter().copied()).spawn().unwrap();
    let started = Instant::now();
    while running.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            running.kill().unwrap();
            panic!("{args:?} hangs");
        }
        thread::sleep(Duration::from_millis(20));
    }
    output(running)
}

fn output(running: Child) -> Output {
    let output = running.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Output { stdout: text(&output.stdout), stderr: text(&output.stderr), code: output.status.code().unwrap_or(-1) }
}

#[test]
fn whatever_lies_in_place_of_an_input_is_named_and_not_waited_for() {
    for input in INPUTS {
        for (kind, words) in STRAYS {
            let world = world();
            if !put(kind, &world.path(input)) {
                skip(&format!("{input}: root reads what is unreadable"));
                continue;
            }
            for command in ["plan", "run"] {
                let Output { stdout, stderr, code } = ended(&world, &[command, "./pipeline.yaml", "--set", "proposals.order=file"]);
                // A plan does not read what a file holds, and a checkpoint may be a folder.
                let is_folder_of_weights = input == "clip.pt" && kind == "wrong kind";
                let may_pass = command == "plan" && (kind == "empty" || is_folder_of_weights);
                assert!(may_pass || [3, 4].contains(&code), "{command}, {input}, {kind}: {code}: {stdout}{stderr}");
                let named = if is_folder_of_weights { "checkpoint: expected one file of weights" } else { input };
                assert!(may_pass || (stderr.contains(named) && stderr.contains(words)), "{command}, {input}, {kind}: {stderr}");
                assert!(may_pass || stderr.contains("hint: "), "{command}, {input}, {kind}: {stderr}");
            }
        }
    }
}

#[test]
fn whatever_lies_in_place_of_a_checkpoint_is_named_to_the_doctor() {
    for (kind, words) in STRAYS {
        let world = world();
        if !put(kind, &world.path("clip.pt")) {
            continue;
        }
        let Output { stdout, stderr, code } = ended(&world, &["doctor", "--clip", "clip.pt"]);
        assert!(code == 4 && stderr.contains("hint: "), "{kind}: {code}: {stdout}{stderr}");
        // A folder without files has no name of a file.
        assert!(kind == "wrong kind" || (stderr.contains("clip.pt") && stderr.contains(words)), "{kind}: {stderr}");
    }
}

#[test]
fn an_image_that_the_annotations_name_has_to_be_a_file() {
    for (kind, words) in STRAYS.into_iter().filter(|(kind, _)| *kind != "wrong kind") {
        let world = world();
        if !put(kind, &world.path("images/000003.jpg")) {
            continue;
        }
        let Output { stdout, stderr, code } = ended(&world, &["run", "./pipeline.yaml", "--set", "proposals.order=file"]);
        assert!(code == 4 && stderr.contains("000003.jpg") && stderr.contains(words), "{kind}: {code}: {stdout}{stderr}");
    }
    let world = world();
    let strange = world.path("images").join(std::ffi::OsStr::from_bytes(b"00000\xff.jpg"));
    fs::rename(world.path("images/000003.jpg"), strange).unwrap();
    let Output { stderr, code, .. } = ended(&world, &["run", "./pipeline.yaml", "--set", "proposals.order=file"]);
    assert!(code == 4 && stderr.contains("a name that is not UTF-8 (00000\u{fffd}.jpg)"), "{stderr}");
    assert!(stderr.contains("not in the folder (3 files): `000003.jpg`"), "{stderr}");
}

/// Whether a process does something of its own on SIGINT, the second bit.
fn listens(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() & 2 != 0
}

#[test]
fn a_run_that_hashes_ends_when_it_is_asked_to() {
    for signal in ["INT", "TERM", "USR1"] {
        let world = world();
        // A hole, so that it takes no room; hashing it would take hours.
        fs::File::create(world.path("clip.pt")).unwrap().set_len(1 << 42).unwrap();
        let running = world.command(["run", "./pipeline.yaml"]).spawn().unwrap();
        until(|| world.logs().contains("run_started"));
        until(|| listens(running.id()));
        let asked = Instant::now();
        assert!(Command::new("sh").args(["-c", &format!("kill -{signal} {}", running.id())]).status().unwrap().success());
        let Output { stdout, stderr, code } = output(running);
        assert_eq!(code, 130, "{signal}: {stdout}{stderr}");
        assert!(asked.elapsed() < Duration::from_secs(30), "{signal}: {:?}", asked.elapsed());
        assert!(world.logs().contains("\"outcome\":\"interrupted\""), "{}", world.logs());
    }
}
