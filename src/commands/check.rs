//! `ovenbird check`: reads all that a pipeline would read from the user's own files, and names everything that is wrong.
//!
//! The stages' own readers find the problems: steps that only convert files run in a scratch home, every other step divides its work into units,
//! and each file is opened as the step would open it. What needs a network or the result of one is not checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use ovenbird_cache::{Artifact, Digest, Provenance, Status, Store, files_digest, inputs, inputs::InputFile};
use ovenbird_data::{annotations::ImageInfo, images::Image};
use ovenbird_models::checkpoint::Checkpoint;
use ovenbird_stages::{
    Artifact as _, Context, Error as StageError, Inputs, OnBadItem,
    artifacts::{
        AnnotationFile, Captions, Changes, CheckpointFile, Classes, Crops, Descriptions, Detections, Downloads, FeatureFiles,
        ImageFeatures, Images, LabelFiles, Links, Phrases, Prompts, Proposals, PublishedVocabulary, RegionFeatures, RegionPromptFile,
    },
    clip::Clip,
    refuse_too_many,
};
use tch::Device;

use crate::{
    chosen::Wanted,
    error::{Error, Result},
    machine,
    output::{count, print},
    pipeline::{Source, Step},
    plan::{self, FileInputs, Made},
    progress::TaskProgress,
};

/// Steps that only convert the user's files, in seconds.
const CONVERTING: &[&str] =
    &["annotations/split", "annotations/folder", "proposals/import", "prompts/import", "detector/import", "localizer/import"];
/// Images of a kind of problem that are named; the others are counted.
const MAX_NAMED: usize = 3;

/// Read a pipeline's input files and name everything that is wrong with them
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// Decode every image, instead of reading its header
    #[arg(long)]
    full: bool,
}

pub(crate) fn check(Args { wanted, full }: &Args) -> Result<()> {
    let (pipeline, wanted) = wanted.load()?;
    let scratch = tempfile::tempdir().map_err(|source| ovenbird_cache::Error::Write { path: std::env::temp_dir(), source })?;
    let store = Store::open(scratch.path())?;
    let (_session, _recovered) = store.enter()?;
    let mut check = Check { is_full: *full, scratch: scratch.path().to_owned(), ..Check::default() };
    let mut made = Made::new();
    for place in wanted {
        let step = &pipeline.steps[place];
        check.files(step);
        let is_known = |source: &Source| match source {
            Source::File(path) => check.files.contains_key(path) && !check.broken.contains(path),
            Source::Step { step, .. } => made.contains_key(step),
        };
        let mut known = Inputs::default();
        for (port, source) in step.inputs.iter().filter(|(_, source)| is_known(source)) {
            let files = match source {
                Source::File(path) => check.files[path].clone(),
                Source::Step { step, port } => made[step].port(port),
            };
            known.ports.insert(port.clone(), files);
        }
        check.images(step, &known);
        if known.ports.len() == step.inputs.len() && !known.ports.is_empty() {
            match run(step, &check.files, &made, &store) {
                Ok(artifact) => made.extend(artifact.map(|artifact| (place, artifact))),
                Err(error) => check.push(step, error),
            }
        }
    }
    let Check { files, problems, notes, n_images, .. } = check;
    let n_files: usize = files.values().map(Vec::len).sum();
    let mut text: String = problems.iter().chain(&notes).map(|words| format!("{words}\n")).collect();
    let depth = if *full { "decoded" } else { "with their headers" };
    let images = if n_images > 0 { format!(", {} {depth}", count(n_images, "image")) } else { String::new() };
    text.push_str(&format!("{} read{images}: {}\n", count(n_files, "input file"), count(problems.len(), "problem")));
    print(&text)?;
    if problems.is_empty() { Ok(()) } else { Err(Error::Inputs { n_problems: problems.len() }) }
}

/// Divides a step's work into units, as a run would; a step that only converts files is done.
fn run(step: &Step, files: &FileInputs, made: &Made, scratch: &Store) -> Result<Option<Artifact>, StageError> {
    let (recipe, inputs) = plan::identify(step, files, made);
    let (units, items) = step.stage.units(&inputs)?.of(&recipe);
    if !CONVERTING.contains(&step.entry.kind) {
        return Ok(None);
    }
    let context = Context {
        store: scratch,
        kind: step.entry.kind,
        units: &units,
        items: &items,
        inputs: &inputs,
        most_items: None,
        device: Device::Cpu,
        has_bf16: machine::has_bf16(Device::Cpu),
        threads: n_threads(),
        on_bad_item: step.on_bad_item,
        n_failed: &Default::default(),
        watch: &Default::default(),
        is_stopped: &|| false,
        report: &|_| {},
    };
    if let Status::Absent = scratch.unit(step.entry.kind, &units[0].fingerprint)? {
        step.stage.run(&units, &context)?;
    }
    let mut records = Vec::new();
    for unit in &units {
        if let Status::Valid(record) = scratch.unit(step.entry.kind, &unit.fingerprint)? {
            records.push(record);
        }
    }
    let ports: Vec<&str> = step.entry.outputs.iter().map(|port| port.name).collect();
    let by = Provenance {
        program: format!("ovenbird {}", env!("CARGO_PKG_VERSION")),
        run: "check".into(),
        host: machine::host(),
        device: String::new(),
        libtorch: ovenbird_models::LIBTORCH.into(),
        started: jiff::Timestamp::now().to_string(),
        wall_s: 0.0,
    };
    Ok(Some(scratch.commit_artifact(recipe, &ports, records, by)?))
}

/// What is known so far.
#[derive(Default)]
struct Check {
    is_full: bool,
    /// The home in which converting steps run; everything outside is the user's.
    scratch: PathBuf,
    files: FileInputs,
    /// Files that cannot be opened as what they should be.
    broken: BTreeSet<PathBuf>,
    /// Each file that was opened, with the step's parameters that matter.
    opened: BTreeSet<(PathBuf, &'static str, String)>,
    /// Folders of images that were compared with annotations.
    compared: BTreeSet<(PathBuf, Digest)>,
    n_images: usize,
    problems: Vec<String>,
    /// What is wrong and is allowed by the steps' policies.
    notes: Vec<String>,
}

impl Check {
    fn push(&mut self, step: &Step, error: impl Into<Error>) {
        let error = error.into();
        let hint = error.hint(&self.scratch).map_or_else(String::new, |hint| format!("\n  hint: {hint}"));
        let words = format!("{}{hint}", error.message());
        // Steps that read the same file find the same.
        if !self.problems.iter().any(|known| known.ends_with(&words)) {
            self.problems.push(format!("{}: {words}", step.id));
        }
    }

    /// Hashes and opens the files of a step.
    fn files(&mut self, step: &Step) {
        for (port, source) in &step.inputs {
            let Source::File(path) = source else { continue };
            if !self.files.contains_key(path) && !self.broken.contains(path) {
                match inputs::digest_path(path, None, 0) {
                    Ok(files) => drop(self.files.insert(path.clone(), files)),
                    Err(error) => {
                        self.broken.insert(path.clone());
                        self.push(step, error);
                    }
                }
            }
            let Some(files) = self.files.get(path) else { continue };
            let kind = step.entry.inputs.iter().find(|known| known.name == port).map_or("", |known| known.kind);
            let clip = clip_of(step);
            let key = (path.clone(), kind, clip.as_ref().map_or_else(String::new, |clip| format!("{clip:?}")));
            if self.opened.insert(key)
                && let Err(error) = open(kind, files, clip.as_ref())
            {
                self.broken.insert(path.clone());
                self.push(step, error);
            }
        }
    }

    /// Compares the user's folder of images with the annotations.
    fn images(&mut self, step: &Step, known: &Inputs) {
        let (Some(Source::File(folder)), Some(annotations)) = (step.inputs.get("images"), known.ports.get("annotations")) else { return };
        let Some(files) = known.ports.get("images") else { return };
        if !self.compared.insert((folder.clone(), files_digest(annotations))) {
            return;
        }
        // Other problems of these files are found where they are opened.
        let Ok(images) = Images::open(files) else { return };
        let Ok(infos) = AnnotationFile::open(annotations).and_then(|file| file.load_images()).map(|annotations| annotations.images) else {
            return;
        };
        self.n_images += infos.len();
        let (missing, unusable) = examine(&images, &infos, self.is_full, &folder.display().to_string());
        for (words, found) in [("are not in the folder", &missing), ("cannot be used", &unusable)] {
            if found.is_empty() {
                continue;
            }
            let mut text = format!("{}: {}: {} of {} images {words}", step.id, folder.display(), found.len(), infos.len());
            text.extend(found.values().take(MAX_NAMED).map(|words| format!("\n  {words}")));
            if found.len() > MAX_NAMED {
                text.push_str(&format!("\n  and {} more", found.len() - MAX_NAMED));
            }
            let counts = [missing.len() + unusable.len(), infos.len()];
            match step.on_bad_item {
                OnBadItem::Skip { max_failed_ratio } if refuse_too_many(counts, max_failed_ratio, "").is_ok() => {
                    self.notes.push(format!("{text}\n  skipped: `max_failed_ratio` {max_failed_ratio} allows it"));
                }
                OnBadItem::Skip { .. } | OnBadItem::Fail => self.problems.push(text),
            }
        }
    }
}

/// The parameters that choose a CLIP in a checkpoint, of a step that has them.
fn clip_of(step: &Step) -> Option<Clip> {
    serde_json::from_value(step.stage.params().get("clip")?.clone()).ok()
}

/// Opens the files of a port as a stage does, and reads what is not large.
fn open(kind: &str, files: &[InputFile], clip: Option<&Clip>) -> Result<(), StageError> {
    match (kind, clip) {
        (AnnotationFile::KIND, _) => AnnotationFile::open(files)?.load_all().map(drop),
        (Classes::KIND, _) => Classes::open(files).map(drop),
        (Captions::KIND, _) => Captions::open(files).map(drop),
        (CheckpointFile::KIND, Some(clip)) => clip.check(&CheckpointFile::open(files)?),
        (CheckpointFile::KIND, None) => {
            let _weights = Checkpoint::open(&CheckpointFile::open(files)?.file.path)?;
            Ok(())
        }
        (Proposals::KIND, _) => Proposals::open(files).map(drop),
        (Detections::KIND, _) => Detections::open(files).map(drop),
        (Prompts::KIND, _) => Prompts::open(files).map(drop),
        (ImageFeatures::KIND, _) => ImageFeatures::open(files).map(drop),
        (RegionFeatures::KIND, _) => RegionFeatures::open(files).map(drop),
        (Crops::KIND, _) => Crops::open(files).map(drop),
        (Descriptions::KIND, _) => Descriptions::open(files).map(drop),
        (Phrases::KIND, _) => Phrases::open(files).map(drop),
        (PublishedVocabulary::KIND, _) => PublishedVocabulary::open(files).map(drop),
        (FeatureFiles::KIND, _) => FeatureFiles::open(files).map(drop),
        (Links::KIND, _) => Links::open(files).map(drop),
        (Downloads::KIND, _) => Downloads::open(files).map(drop),
        (LabelFiles::KIND, _) => LabelFiles::open(files).map(drop),
        (Changes::KIND, _) => Changes::open(files).map(drop),
        (RegionPromptFile::KIND, _) => RegionPromptFile::open(files)?.check(),
        _ => Ok(()),
    }
}

/// Looks at every image: those that are missing and those that cannot be used, in words, by their places.
fn examine(images: &Images, infos: &[ImageInfo], is_full: bool, folder: &str) -> (BTreeMap<usize, String>, BTreeMap<usize, String>) {
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    let (mut missing, mut unusable) = (BTreeMap::new(), BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..n_threads() {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(info) = infos.get(place) else { break };
                    // The receiver takes everything that is sent.
                    drop(sender.send((place, examine_one(images, info, is_full))));
                }
            });
        }
        drop(sender);
        let mut progress = TaskProgress::new(&format!("check {folder}"));
        for (n_done, (place, found)) in receiver.into_iter().enumerate() {
            match found {
                Found::Sound => {}
                Found::Missing(words) => drop(missing.insert(place, words)),
                Found::Unusable(words) => drop(unusable.insert(place, words)),
            }
            progress.tell(n_done as u64 + 1, infos.len() as u64, "");
        }
    });
    (missing, unusable)
}

enum Found {
    Sound,
    Missing(String),
    Unusable(String),
}

fn examine_one(images: &Images, ImageInfo { file_name, width, height, .. }: &ImageInfo, is_full: bool) -> Found {
    let file = match images.file(file_name) {
        Ok(file) => file,
        Err(error) => return Found::Missing(error.to_string()),
    };
    let look = || -> Result<(), StageError> {
        let bytes = file.read()?;
        match is_full {
            true => Image::decode_sized(&bytes, &file.path, [*width, *height]).map(drop)?,
            false => Image::check_size(&bytes, &file.path, [*width, *height])?,
        }
        Ok(())
    };
    look().map_or_else(|error| Found::Unusable(error.to_string()), |()| Found::Sound)
}

fn n_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
