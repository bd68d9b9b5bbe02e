//! `ovenbird predict`: detects objects in the user's images, of any classes, with the detector of a pipeline that has run.
//!
//! Copies of the pipeline's steps run on the images ([`copies`]). Their results are stored in the home like all others, so that the same images
//! are not processed twice, but belong to no run: `status` and `log` do not show them, and `cache gc` deletes them.

mod copies;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, atomic::AtomicBool},
};

use jiff::Timestamp;
use ovenbird_cache::{
    Artifact, Error as CacheError, Ledger, Store,
    inputs::{self, InputFile},
    publish,
};
use ovenbird_data::{
    annotations::{CategoryId, ImageId, ImageInfo},
    classes::ClassSplit,
    draw::{Labelled, drawn},
    evaluate::Detection,
    images::Image,
};
use ovenbird_stages::{
    Artifact as _, Progress,
    annotations::folder::is_image,
    artifacts::{AnnotationFile, Classes, Detections, Prompts},
    failed_items,
};
use serde::Serialize;

use crate::{
    chosen::{Chosen, places},
    error::{Error, ExitCode, Result},
    output::{count, print, say, to_json},
    pipeline::{Pipeline, Source, Step, step_id::StepId},
    plan::{self, Checked, FileInputs, Made, Seen, previous_run::PreviousRun},
    progress::TaskProgress,
    run::local::{Failure, Options, Task, WorkerContext, run_steps},
    run_args::RunArgs,
};
use copies::Copies;

/// Stands for the run's id in the records of predictions, which belong to no run.
pub(crate) const RUN: &str = "predict";
/// Kinds of steps that detect; a pipeline's trained detectors come before CLIP alone.
const DETECTING: [&str; 3] = ["detector/test", "localizer/test", "detect/zero-shot"];
/// The quality of pictures that are written as JPEG.
const JPEG_QUALITY: u8 = 92;
/// The widest column of class names.
const MAX_NAME: usize = 40;

/// Detect objects of any classes in images, with the detector of a pipeline that has run
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    chosen: Chosen,
    /// JPEG and PNG files, and folders of them
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// The classes to look for, with commas between them: `--classes "red mug, stapler"`; or the name of a file with one class a line:
    /// `--classes @names.txt` [default: the pipeline's classes]
    #[arg(long, value_name = "NAMES|@FILE")]
    classes: Option<String>,
    /// The step that detects, where the pipeline has several [default: its only `detector/test`, or else its only `localizer/test`, or else its only `detect/zero-shot`]
    #[arg(long, value_name = "STEP")]
    step: Option<String>,
    /// Show detections with this score or more, from 0 to 1
    #[arg(long, default_value = "0.3", value_name = "SCORE", value_parser = score)]
    min_score: f32,
    /// Write the images with boxes into this folder; files with the same name are replaced
    #[arg(long, default_value = "predictions", value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    pub(crate) machine: RunArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn score(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|score| (0.0..=1.0).contains(score)).ok_or_else(|| "expected a number from 0 to 1".into())
}

/// An image, and what was found in it.
#[derive(Serialize)]
struct Prediction {
    /// As typed, or below the folder that was typed.
    file: String,
    /// px; `None` where it could not be read.
    width: Option<u32>,
    height: Option<u32>,
    /// Where it is drawn with boxes.
    picture: Option<String>,
    /// Best first.
    detections: Vec<Found>,
    /// How many detections have lower scores than are shown.
    n_below_min_score: usize,
    /// Why it could not be read.
    error: Option<String>,
}

#[derive(Serialize)]
struct Found {
    class: String,
    score: f64,
    /// x, y, width, height in px.
    bbox: [f64; 4],
}

pub(crate) fn predict(home: &Path, args: &Args) -> Result<()> {
    let names = args.classes.as_deref().map(class_names).transpose()?;
    let scratch = tempfile::tempdir().map_err(|source| CacheError::Write { path: std::env::temp_dir(), source })?;
    let names_file = scratch.path().join("classes.json");
    let mut pipeline = args.chosen.load()?;
    let detecting = detecting_step(&pipeline, args.step.as_deref())?;
    let options = args.machine.options();
    let copies = copies::append(&mut pipeline, detecting, names.as_ref().map(|_| names_file.as_path()), options.cpu)?;
    let store = Store::open(home)?;
    let ledger = store.home().exists().then(|| Ledger::of(&store));
    let own_classes = pipeline.steps[detecting].inputs["classes"].clone();
    let made = stored(&pipeline, &copies, &own_classes, &store, ledger.as_ref(), |step| args.chosen.not_run(home, &step.id))?;

    let given = given(&args.images, &args.out, ledger.as_ref())?;
    let mut images: Vec<InputFile> = given.iter().filter_map(|given| given.file.clone().ok()).collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    let n_images = images.len();
    let mut files = FileInputs::from([(copies::IMAGES.into(), images)]);
    let own = [&own_classes].into_iter().chain(&copies.own_prompts);
    add_files(&mut files, own, ledger.as_ref())?;
    let Classes(own_classes) = Classes::open(&files_of(&own_classes, &files, &made))?;
    let step = &pipeline.steps[detecting];
    let classes = match names {
        None => own_classes,
        Some(names) => {
            let own_prompts = copies.own_prompts.iter().map(|source| Ok(Prompts::open(&files_of(source, &files, &made))?.names));
            let own_prompts = own_prompts.collect::<Result<Vec<_>>>()?;
            check_known(&names, &step.id, &own_classes, step.inputs.contains_key("prompts"), &own_prompts)?;
            let (base, novel) = names.into_iter().partition(|name| own_classes.base.contains(name));
            let classes = ClassSplit { base, novel };
            publish::replace(&names_file, &serde_json::to_vec(&classes).expect("BUG: names are plain JSON"))?;
            add_files(&mut files, [&Source::File(names_file)].into_iter(), None)?;
            classes
        }
    };
    say(&format!("`{}` ({}) looks for {} in {}\n", step.id, step.entry.kind, classes_in_words(&classes), count(n_images, "image")));
    if step.entry.kind == "detect/zero-shot" && classes.all().count() == 1 {
        say("note: CLIP alone gives each proposal to one of the classes: with a single class, to that one; name more to compare with\n");
    }
    let sources = pipeline.steps[copies.list..].iter().flat_map(|step| step.inputs.values());
    add_files(&mut files, sources, ledger.as_ref())?;
    ledger.iter().flat_map(Ledger::notices).for_each(|words| say(&format!("{words}\n")));
    let work = Work { pipeline: &pipeline, store: &store, options: &options, files: &files };
    let results = if n_images == 0 { Results::default() } else { work.run(&copies, made)? };
    let mut predictions: Vec<Prediction> = given.iter().map(|given| results.prediction(given, args.min_score)).collect();
    for (prediction, given) in predictions.iter_mut().zip(&given) {
        prediction.draw(given, &classes)?;
    }
    print(&if args.json { to_json("images", &predictions) } else { in_words(&predictions, args) })?;
    match predictions.iter().filter(|prediction| prediction.error.is_some()).count() {
        0 => Ok(()),
        n_problems => Err(Error::Inputs { n_problems }),
    }
}

/// The names that `--classes` gives.
fn class_names(text: &str) -> Result<Vec<String>> {
    let refused = |problem: String, hint: &str| Err(Error::Usage { problem: format!("--classes: {problem}"), hint: hint.into() });
    let names: Vec<String> = match text.strip_prefix('@') {
        None => text.split(',').map(|name| name.trim().to_owned()).collect(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(|source| CacheError::Read { path: path.into(), source })?;
            let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
            lines.map(str::to_owned).collect()
        }
    };
    if names.is_empty() || names.iter().any(String::is_empty) {
        let hint =
            "write names with commas between them, `--classes \"red mug, stapler\"`, or one a line in a file, `--classes @names.txt`";
        return refused(if names.is_empty() { "expected class names, found none" } else { "a class name is empty" }.into(), hint);
    }
    match names.iter().enumerate().find(|(place, name)| names[..*place].contains(name)) {
        Some((_, twice)) => refused(format!("`{twice}` is named twice"), "name each class once"),
        None => Ok(names),
    }
}

/// The place of the step that detects.
fn detecting_step(pipeline: &Pipeline, step: Option<&str>) -> Result<usize> {
    let detects = |place: &usize| DETECTING.contains(&pipeline.steps[*place].entry.kind);
    let of_kind =
        |kind: &str| -> Vec<usize> { (0..pipeline.steps.len()).filter(|place| pipeline.steps[*place].entry.kind == kind).collect() };
    let all = DETECTING.map(of_kind);
    let found = match step {
        Some(name) => places(pipeline, name)?.into_iter().filter(detects).collect(),
        None => all.iter().find(|places| !places.is_empty()).cloned().unwrap_or_default(),
    };
    let listed = |places: &[usize]| places.iter().map(|place| pipeline.steps[*place].id.to_string()).collect::<Vec<_>>().join(", ");
    let (problem, hint) = match (found[..].len(), step) {
        (1, _) => return Ok(found[0]),
        (0, _) if all.iter().all(Vec::is_empty) => {
            let hint =
                "add a step `detector/test`, `localizer/test` or `detect/zero-shot`; `ovenbird pipelines` lists pipelines that have one";
            (format!("no step of {} detects objects", pipeline.name), hint.to_owned())
        }
        (0, step) => {
            let words = format!("--step {}: the step detects no objects", step.unwrap_or_default());
            (words, format!("name one of {}", listed(&all.concat())))
        }
        (n, None) => (format!("{n} steps of {} detect objects", pipeline.name), format!("name one with `--step`: {}", listed(&found))),
        (n, Some(name)) => (format!("--step {name}: the stage has {n} instances"), format!("name one of {}", listed(&found))),
    };
    Err(Error::Usage { problem, hint })
}

/// The stored artifacts that copies of steps read. `not_run`: the error where one is missing.
fn stored(
    pipeline: &Pipeline,
    copies: &Copies,
    own_classes: &Source,
    store: &Store,
    ledger: Option<&Ledger>,
    not_run: impl Fn(&Step) -> Error,
) -> Result<Made> {
    let sources = pipeline.steps[copies.list..].iter().flat_map(|step| step.inputs.values()).chain([own_classes]);
    let read: BTreeSet<usize> =
        sources.filter_map(|source| if let Source::Step { step, .. } = source { Some(*step) } else { None }).collect();
    let read: Vec<usize> = read.into_iter().filter(|step| *step < copies.list).collect();
    let mut seen = plan::look(pipeline, &pipeline.needed(&read), store, ledger)?;
    let mut made = Made::new();
    // The last one first: to compute it, a run computes those before it.
    for place in read.into_iter().rev() {
        match seen.remove(&place) {
            Some(Seen::Stored(artifact)) if !artifact.is_dropped => drop(made.insert(place, *artifact)),
            _ => return Err(not_run(&pipeline.steps[place])),
        }
    }
    Ok(made)
}

/// Hashes the user's files among some sources.
fn add_files<'a>(files: &mut FileInputs, sources: impl Iterator<Item = &'a Source>, ledger: Option<&Ledger>) -> Result<()> {
    for source in sources {
        if let Source::File(path) = source
            && !files.contains_key(path)
        {
            files.insert(path.clone(), inputs::digest_path(path, ledger, Timestamp::now().as_nanosecond())?);
        }
    }
    Ok(())
}

/// The files of a source.
fn files_of(source: &Source, files: &FileInputs, made: &Made) -> Vec<InputFile> {
    match source {
        Source::File(path) => files[path].clone(),
        Source::Step { step, port } => made[step].port(port),
    }
}

/// Fails where the detector of a step cannot look for a class, as it has no embedding. `own_prompts`: the names in each of the embeddings that
/// no others can take the place of.
fn check_known(names: &[String], step: &StepId, own: &ClassSplit, has_prompts: bool, own_prompts: &[Vec<String>]) -> Result<()> {
    let refused = |unknown: &str, why: &str, known: &[String]| {
        let hint =
            format!("choose among {}; a pipeline whose class embeddings are of `prompts/ensemble` knows any class", known.join(", "));
        Err(Error::Usage { problem: format!("--classes: `{unknown}`: `{step}` {why}"), hint })
    };
    let unknown = |known: &[String]| names.iter().find(|name| !known.contains(name));
    if !has_prompts && let Some(unknown) = unknown(&own.base) {
        return refused(unknown, "was trained without class embeddings, and knows its base classes alone", &own.base);
    }
    for known in own_prompts {
        if let Some(unknown) = unknown(known) {
            return refused(unknown, "reads class embeddings that were learned or imported, and there is none of this class", known);
        }
    }
    Ok(())
}

/// `3 classes (2 novel)`.
fn classes_in_words(classes: &ClassSplit) -> String {
    let n_classes = classes.all().count();
    let noun = if n_classes == 1 { "class" } else { "classes" };
    match classes.novel.len() {
        0 => format!("{n_classes} {noun}"),
        n_novel => format!("{n_classes} {noun} ({n_novel} novel)"),
    }
}

/// An image as it was given.
struct Given {
    /// As typed, or below the folder that was typed.
    name: String,
    /// The file under that name, or why it cannot be read.
    file: Result<InputFile, String>,
    /// Where it is drawn with boxes.
    picture: PathBuf,
}

/// The images of some files and folders, in this order, each once. Pictures of earlier predictions, in a folder `out` below a given one, are
/// left out. Fails where a picture would replace an image.
fn given(paths: &[PathBuf], out: &Path, ledger: Option<&Ledger>) -> Result<Vec<Given>> {
    let now_ns = Timestamp::now().as_nanosecond();
    let pictures = out.canonicalize().ok();
    let (mut given, mut seen, mut targets) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for path in paths {
        let typed = path.display().to_string();
        let broken = |reason: String| Given { name: typed.clone(), file: Err(reason), picture: PathBuf::new() };
        let is_folder = path.is_dir();
        if !is_folder && !is_image(path) && path.exists() {
            given.push(broken("expected an image, a name ending in .jpg, .jpeg or .png".into()));
            continue;
        }
        let found = match inputs::digest_path(path, ledger, now_ns) {
            Ok(found) => found,
            Err(error) => {
                given.push(broken(Error::from(error).message()));
                continue;
            }
        };
        let n_before = given.len();
        let folder = is_folder.then(|| path.canonicalize().ok()).flatten();
        let below = pictures.as_ref().filter(|pictures| folder.is_some_and(|folder| pictures.starts_with(&folder) && **pictures != folder));
        for file in found {
            let full = file.path.canonicalize().unwrap_or_else(|_| file.path.clone());
            let is_picture = below.is_some_and(|pictures| full.starts_with(pictures));
            if is_picture || !is_image(&file.path) {
                continue;
            }
            if !seen.insert(full) {
                say(&format!("{}: the same image as one before, listed once\n", file.path.display()));
                continue;
            }
            let name = if is_folder { path.join(&file.name).display().to_string() } else { typed.clone() };
            let picture = free(&out.join(&file.name), &mut targets);
            given.push(Given { file: Ok(InputFile { name: name.clone(), ..file }), name, picture });
        }
        if is_folder && given.len() == n_before {
            given.push(broken("expected images in the folder, names ending in .jpg, .jpeg or .png; found none".into()));
        }
    }
    if let Some(Given { picture, .. }) =
        given.iter().find(|given| given.picture.canonicalize().is_ok_and(|picture| seen.contains(&picture)))
    {
        let problem = format!("--out {}: a picture would replace the image {}", out.display(), picture.display());
        return Err(Error::Usage { problem, hint: "choose another folder".into() });
    }
    Ok(given)
}

/// A path that is not taken: the path itself, or numbered, `cat-2.jpg`.
fn free(path: &Path, taken: &mut BTreeSet<PathBuf>) -> PathBuf {
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let (stem, extension) = (part(path.file_stem()), part(path.extension()));
    let numbered = (2..).map(|n| path.with_file_name(format!("{stem}-{n}.{extension}")));
    let mut paths = [path.to_owned()].into_iter().chain(numbered);
    paths.find(|path| taken.insert(path.clone())).expect("BUG: there are more numbers than images")
}

/// What running copies of steps needs.
struct Work<'a> {
    pipeline: &'a Pipeline,
    store: &'a Store,
    options: &'a Options,
    files: &'a FileInputs,
}

impl Work<'_> {
    /// Runs all copies.
    fn run(&self, copies: &Copies, mut made: Made) -> Result<Results> {
        let (_session, _recovered) = self.store.enter()?;
        let mut results = Results::default();
        for place in copies.list..=copies.detections {
            let artifact = self.step(place, &made)?;
            for unit in &artifact.manifest.units {
                for failed in failed_items(self.store, unit)? {
                    results.failed.entry(failed.item).or_insert(failed.reason);
                }
            }
            if place == copies.list {
                let images = AnnotationFile::open(&artifact.port("annotations"))?.load_images()?.images;
                if images.is_empty() {
                    return Ok(results);
                }
                results.images = images.into_iter().map(|image| (image.file_name.clone(), image)).collect();
            }
            made.insert(place, artifact);
        }
        let detections = Detections::open(&made[&copies.detections].port("detections"))?;
        results.names = detections.categories()?.unwrap_or_default();
        for piece in detections.pieces() {
            piece?.into_iter().for_each(|detection| results.detections.entry(detection.image_id).or_default().push(detection));
        }
        Ok(results)
    }

    /// The artifact of a step, stored or computed.
    fn step(&self, place: usize, made: &Made) -> Result<Artifact> {
        let Self { pipeline, store, options, files } = self;
        let step = &pipeline.steps[place];
        let work = match plan::check(step, true, files, made, store, &PreviousRun::default())? {
            Checked::Reused(artifact) => return Ok(*artifact),
            Checked::Run(work) => work,
            Checked::Lacks { .. } => panic!("BUG: `{}` reads from artifacts whose bytes are there", step.id),
        };
        let progress = Mutex::new((TaskProgress::new(&step.id.to_string()), 0, 0));
        let report = |said: Progress| {
            let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
            let (bar, done, total) = &mut *progress;
            match said {
                Progress::Total(n) => *total = n,
                Progress::Tick(n) => *done += n,
                Progress::Note(words) => say(&format!("{}: {words}\n", step.id)),
                Progress::Waiting
                | Progress::Flow { .. }
                | Progress::Measured { .. }
                | Progress::Failed(_)
                | Progress::Kept(_)
                | Progress::Committed { .. } => {}
            }
            bar.tell(*done, *total, "");
        };
        let n_devices = if step.entry.uses_device { options.devices.len().min(work.missing.len().max(1)) } else { 0 };
        let context = WorkerContext { store, devices: &options.devices[..n_devices], run: RUN, stop: &AtomicBool::new(false) };
        match run_steps(&[Task { step, work, report: &report }], context).pop().expect("BUG: one step has one result") {
            Ok(artifact) => Ok(artifact),
            Err(Failure::Known(error)) => Err(error),
            Err(Failure::Bug(words)) => {
                say(&format!("{}: {words}: this is a bug in ovenbird: please report it\n", step.id));
                Err(Error::StagesFailed { failed: vec![step.id.clone()], skipped: Vec::new(), worst: ExitCode::Stage })
            }
        }
    }
}

/// What copies of steps found.
#[derive(Default)]
struct Results {
    /// By file name.
    images: BTreeMap<String, ImageInfo>,
    /// The names of classes.
    names: BTreeMap<CategoryId, String>,
    /// Best first.
    detections: BTreeMap<ImageId, Vec<Detection>>,
    /// Why images could not be read, by file name.
    failed: BTreeMap<String, String>,
}

impl Results {
    fn prediction(&self, Given { name, file, .. }: &Given, min_score: f32) -> Prediction {
        let image = self.images.get(name);
        let error = file.as_ref().err().or_else(|| self.failed.get(name));
        // Most reasons begin with the file.
        let error = error.map(|reason| reason.strip_prefix(&format!("{name}: ")).unwrap_or(reason).to_owned());
        let mut prediction = Prediction {
            file: name.clone(),
            width: image.map(|image| image.width),
            height: image.map(|image| image.height),
            picture: None,
            detections: Vec::new(),
            n_below_min_score: 0,
            error,
        };
        let detections = image.and_then(|image| self.detections.get(&image.id)).into_iter().flatten();
        for Detection { category_id, xyxy, score, .. } in detections {
            if *score < min_score {
                prediction.n_below_min_score += 1;
                continue;
            }
            let bbox = [xyxy.x1, xyxy.y1, xyxy.width(), xyxy.height()].map(shortest);
            prediction.detections.push(Found { class: self.names[category_id].clone(), score: shortest(*score), bbox });
        }
        prediction
    }
}

/// The number with the fewest digits that is this one as f32.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().expect("BUG: a number is read as it is written")
}

impl Prediction {
    /// Draws the image with boxes, where it could be read.
    fn draw(&mut self, Given { file, picture, .. }: &Given, classes: &ClassSplit) -> Result<()> {
        let (Ok(file), None) = (file, &self.error) else { return Ok(()) };
        let image = Image::decode(&file.read()?, &file.path).map_err(ovenbird_stages::Error::from)?;
        let labelled = |Found { class, score, bbox: [x, y, width, height] }: &Found| Labelled {
            xyxy: [*x, *y, x + width, y + height].map(|side| side as f32).into(),
            label: format!("{class} {score:.2}"),
            colour: classes.all().position(|name| name == class).unwrap_or_default(),
        };
        let drawn = drawn(&image, &self.detections.iter().map(labelled).collect::<Vec<_>>());
        let is_png = picture.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        publish::replace(picture, &if is_png { drawn.to_png() } else { drawn.to_jpeg(JPEG_QUALITY) })?;
        self.picture = Some(picture.display().to_string());
        Ok(())
    }
}

/// A table for each image.
fn in_words(predictions: &[Prediction], Args { min_score, out, .. }: &Args) -> String {
    let classes = predictions.iter().flat_map(|prediction| &prediction.detections).map(|found| found.class.chars().count());
    let wide = classes.max().unwrap_or(0).clamp(5, MAX_NAME);
    let mut text = String::new();
    for Prediction { file, width, height, detections, n_below_min_score, error, .. } in predictions {
        let _infallible = match (error, width, height) {
            (Some(error), ..) => writeln!(text, "{file}: {error}"),
            (None, Some(width), Some(height)) => writeln!(text, "{file}, {width} x {height} px"),
            (None, ..) => writeln!(text, "{file}"),
        };
        if !detections.is_empty() {
            let _infallible = writeln!(text, "  {:wide$}  score       x       y       w       h", "class");
        }
        for Found { class, score, bbox: [x, y, width, height] } in detections {
            let class: String =
                if class.chars().count() > wide { class.chars().take(wide - 3).chain("...".chars()).collect() } else { class.clone() };
            let _infallible = writeln!(text, "  {class:wide$}  {score:5.3} {x:7.1} {y:7.1} {width:7.1} {height:7.1}");
        }
        if error.is_none() {
            let _infallible = match (detections.len(), n_below_min_score) {
                (0, 0) => writeln!(text, "  nothing found"),
                (0, n) => writeln!(text, "  nothing with a score of {min_score} or more; {n} with less"),
                (_, 0) => Ok(()),
                (_, n) => writeln!(text, "  and {n} with a score below {min_score}"),
            };
        }
    }
    let n_pictures = predictions.iter().filter(|prediction| prediction.picture.is_some()).count();
    if n_pictures > 0 {
        let _infallible = writeln!(text, "{} with boxes in {}", count(n_pictures, "picture"), out.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn class_names_are_separated_by_commas_or_lines() {
        assert_eq!(class_names("red mug,  stapler").unwrap(), ["red mug", "stapler"]);
        let file = tempfile::NamedTempFile::new().unwrap();
        publish::replace(file.path(), "\u{feff}salt, or pepper\n\n stapler \r\n".as_bytes()).unwrap();
        assert_eq!(class_names(&format!("@{}", file.path().display())).unwrap(), ["salt, or pepper", "stapler"]);
        publish::replace(file.path(), b"\n").unwrap();
        let none = format!("@{}", file.path().display());
        for (text, words) in [
            ("", "--classes: a class name is empty"),
            ("a,,b", "--classes: a class name is empty"),
            ("a, b, a", "--classes: `a` is named twice"),
            (&none, "--classes: expected class names, found none"),
        ] {
            assert_eq!(class_names(text).unwrap_err().to_string(), words);
        }
    }

    #[test]
    fn a_class_without_an_embedding_is_refused() {
        let own = ClassSplit { base: owned(&["owl"]), novel: owned(&["wren"]) };
        let refusal = |names: &[&str], has_prompts: bool, own_prompts: &[Vec<String>]| {
            check_known(&owned(names), &StepId::of_stage("test"), &own, has_prompts, own_prompts).map_err(|error| error.to_string())
        };
        assert_eq!(refusal(&["mug", "owl"], true, &[]), Ok(()));
        assert_eq!(refusal(&["owl"], false, &[]), Ok(()));
        assert_eq!(refusal(&["wren", "owl"], true, &[owned(&["owl", "wren", "heron"])]), Ok(()));
        let trained = "--classes: `wren`: `test` was trained without class embeddings, and knows its base classes alone";
        assert_eq!(refusal(&["owl", "wren"], false, &[]), Err(trained.into()));
        let learned = "--classes: `mug`: `test` reads class embeddings that were learned or imported, and there is none of this class";
        assert_eq!(refusal(&["owl", "mug"], true, &[owned(&["owl", "wren"])]), Err(learned.into()));
    }

    #[test]
    fn pictures_of_files_with_one_name_are_numbered() {
        let mut taken = BTreeSet::new();
        let found = ["a/cat.jpg", "b/cat.jpg", "a/cat.png", "c/cat.jpg"]
            .map(|path| free(&Path::new("out").join(Path::new(path).file_name().unwrap()), &mut taken).display().to_string());
        assert_eq!(found, ["out/cat.jpg", "out/cat-2.jpg", "out/cat.png", "out/cat-3.jpg"]);
    }
}
