//! A folder with a home of its own, and the program run in it as an operator would.

mod skip;
pub(crate) mod toy_web;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

pub(crate) use skip::skip;

/// What tells libtorch, oneDNN and the program which instructions of the processor to use: a run of the tests hands it on to the programs
/// that it starts.
const CAPABILITIES: [&str; 4] = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OVENBIRD_BF16"];

/// Waits for something that another process does. It takes seconds; the bound is for a machine that does much else.
#[track_caller]
pub(crate) fn until(is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_mins(5), "it did not happen");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A Python that has these packages, or none, aloud.
pub(crate) fn python(packages: &str) -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/python");
    let imports = format!("import {packages}");
    let is_there = python.exists() && Command::new(&python).args(["-c", &imports]).output().is_ok_and(|output| output.status.success());
    if !is_there {
        skip(&format!("{packages} are not set up (`make peers`)"));
    }
    is_there.then_some(python)
}

/// A fresh working directory; removed at the end.
pub(crate) struct World {
    folder: tempfile::TempDir,
}

/// What a command came to.
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// -1: ended by a signal.
    pub(crate) code: i32,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// With a pipeline file `tiny.yaml`: every stage of the main job at the smallest size that has units to lose.
    pub(crate) fn tiny() -> Self {
        let world = Self::new();
        let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/quickstart.yaml")).unwrap();
        let small = text
            .replace("train_images: 100", "train_images: 6")
            .replace("val_images: 120", "val_images: 12")
            .replace("web_images: 4000", "web_images: 40")
            .replace("web_images: \"${web_images}\"}", "web_images: \"${web_images}\", held_out_images: 60, side_px: 160}")
            .replace(
                "use: toy/clip\n    in: {",
                "use: clip/pretrain\n    with: {seed: \"${seed}\", steps: 6, checkpoint_every: 2, batch_size: 8}
    in: {images: world.web_images, captions: world.captions, ",
            )
            .replace("name: quickstart", "name: tiny");
        assert!(small.contains("steps: 6") && small.contains("side_px: 160"), "the quickstart pipeline changed");
        world.write("tiny.yaml", &small);
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Runs a pipeline in which `from` stands as `to`; it must be refused with these words.
    #[track_caller]
    pub(crate) fn refuses(&self, pipeline: &str, from: &str, to: &str, expected: &str) {
        assert!(pipeline.contains(from), "the pipeline changed: {from}");
        self.write("wrong.yaml", pipeline.replace(from, to));
        let refused = self.run(["run", "./wrong.yaml"]);
        assert!([2, 3, 4].contains(&refused.code) && refused.stderr.contains(expected), "{expected}:\n{}", refused.stderr);
    }

    pub(crate) fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        command.args(args).current_dir(self.folder.path()).env_clear().env("TZ", "UTC").stdin(Stdio::null());
        // Tests run side by side, and the threads of one program would spin on the cores that another needs.
        command.env("GOMP_SPINCOUNT", "1000");
        command.envs(CAPABILITIES.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        // libtorch's bf16 attention uses AMX where oneDNN has it, and fails where libtorch itself may not use AVX-512.
        if let Ok(capability) = std::env::var("ATEN_CPU_CAPABILITY")
            && std::env::var_os("ONEDNN_MAX_CPU_ISA").is_none()
        {
            command.env("ONEDNN_MAX_CPU_ISA", if capability == "avx2" { "AVX2" } else { "SSE41" });
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    #[must_use]
    pub(crate) fn run<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Output {
        self.output(self.command(args))
    }

    #[must_use]
    pub(crate) fn output(&self, mut command: Command) -> Output {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&self.folder.path().display().to_string(), "[WORLD]");
        Output { stdout: text(&output.stdout), stderr: text(&output.stderr), code: output.status.code().unwrap_or(-1) }
    }

    /// The bytes of every published file, by path below the home; manifests and logs, which hold times, left out.
    pub(crate) fn units(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        walk(&self.path(".ovenbird/units"), &self.path(".ovenbird"), &mut files);
        files
    }

    /// The event logs of all runs.
    pub(crate) fn logs(&self) -> String {
        let runs = fs::read_dir(self.path(".ovenbird/runs")).into_iter().flatten().flatten();
        runs.map(|run| fs::read_to_string(run.path().join("events.jsonl")).unwrap_or_default()).collect()
    }

    /// The published units of a stage; a process may be at work.
    pub(crate) fn units_of(&self, kind: &str) -> BTreeSet<PathBuf> {
        let units = fs::read_dir(self.path(".ovenbird/units").join(kind.replace('/', "-"))).into_iter().flatten().flatten();
        // A temporary folder has its record, too, just before it gets its name.
        let is_published = |unit: &fs::DirEntry| !unit.file_name().to_string_lossy().starts_with('.');
        units.filter(is_published).map(|unit| unit.path()).filter(|unit| unit.join("unit.json").exists()).collect()
    }

    /// Kills a run as soon as each kind of unit is published, one run after the other.
    pub(crate) fn run_and_kill(&self, args: &[&str], kinds: &[&str]) {
        for kind in kinds {
            let mut running = self.command(args.iter().copied());
            let mut running = running.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            until(|| !self.units_of(kind).is_empty());
            drop(running.kill());
            running.wait().unwrap();
        }
    }

    /// How many units are published.
    pub(crate) fn n_units(&self) -> usize {
        let kinds = fs::read_dir(self.path(".ovenbird/units")).into_iter().flatten().flatten();
        let units = kinds.flat_map(|kind| fs::read_dir(kind.path()).into_iter().flatten().flatten());
        units.filter(|unit| !unit.file_name().to_string_lossy().starts_with('.')).count()
    }

    /// Every manifest's file.
    pub(crate) fn manifests(&self) -> Vec<PathBuf> {
        let mut files = BTreeMap::new();
        walk(&self.path(".ovenbird/artifacts"), &self.path(".ovenbird"), &mut files);
        files.into_keys().map(|name| self.path(".ovenbird").join(name)).collect()
    }

    /// The folder names of the units that manifests list.
    pub(crate) fn listed(&self) -> Vec<String> {
        let manifest = |path: PathBuf| -> Vec<String> {
            let manifest: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            let units = manifest["units"].as_array().unwrap().iter();
            units.map(|unit| unit["key"]["fingerprint"].as_str().unwrap()[..32].to_owned()).collect()
        };
        self.manifests().into_iter().flat_map(manifest).collect()
    }

    /// A published file whose path has these parts.
    pub(crate) fn find(&self, parts: &[&str]) -> PathBuf {
        let name = self.units().into_keys().find(|name| parts.iter().all(|part| name.contains(part)));
        self.path(".ovenbird").join(name.unwrap_or_else(|| panic!("no published file with {parts:?}")))
    }
}

/// Copies a folder with all that it holds.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            copy(&path, &target);
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(path).unwrap(), target).unwrap();
        } else {
            assert!(fs::copy(path, target).is_ok());
        }
    }
}

fn walk(folder: &Path, base: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, base, files);
        } else {
            files.insert(path.strip_prefix(base).unwrap().display().to_string(), fs::read(&path).unwrap());
        }
    }
}

impl Output {
    /// The output of a command that must succeed.
    #[track_caller]
    pub(crate) fn success(self) -> Self {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self
    }

    /// Steps whose line says so, in the order in which they did: `reused`, `will run`.
    pub(crate) fn steps(&self, word: &str) -> Vec<String> {
        let line = |line: &str| {
            let (step, rest) = line.strip_prefix("  ")?.split_once(' ')?;
            rest.trim_start().starts_with(word).then(|| step.to_owned())
        };
        let mut steps: Vec<String> = self.stderr.lines().filter_map(line).collect();
        steps.sort();
        steps
    }
}
