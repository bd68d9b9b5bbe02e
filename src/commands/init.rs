//! `ovenbird init`: writes a pipeline for a data set that it is shown.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use ovenbird_cache::{inputs, publish};
use ovenbird_data::words::nearest;
use ovenbird_stages::{
    Artifact as _, Error as StageError,
    artifacts::{AnnotationFile, CheckpointFile},
    clip::Clip,
};

use crate::{
    error::{Error, Result},
    output::{as_typed, count, print},
    pipeline::{Request, file},
};

/// Write a pipeline for a COCO or LVIS json, or for a folder of pictures
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A COCO or LVIS json, or a folder of JPEG and PNG files
    data: PathBuf,
    /// The folder that the json's file names are relative to
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// CLIP weights, to embed images and to detect objects
    #[arg(long, value_name = "FILE")]
    clip: Option<PathBuf>,
    /// Proposals for the json: a pickle of mmdet, Detectron or detectron2, or Parquet of this program
    #[arg(long, value_name = "FILE")]
    proposals: Option<PathBuf>,
    /// Classes that are novel; all others are base
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    novel: Vec<String>,
    /// The pipeline file to write; must not exist
    #[arg(long, short, value_name = "FILE", default_value = "mine.yaml")]
    output: PathBuf,
}

/// The longest line of a list of names.
const LINE: usize = 120;

/// The lines that a pipeline begins with.
const HEAD: &str = "# Written by `ovenbird init`; change it as you like. `ovenbird stages KIND` documents every parameter.
version: 1
";

const GLOBALS: &str = "  # The CLIP embedding of each whole image.
  - id: globals
    use: clip/globals
    in: {images: \"IMAGES\", annotations: LIST.annotations, checkpoint: \"CLIP\"}
    with: {resize: square}
";

const FOLDER: &str = "  # A list of the pictures with ids and sizes, which other steps read as annotations.
  - id: list
    use: annotations/folder
    in: {images: \"IMAGES\"}
";

const SPLIT: &str = "  # Base and novel classes; a detector numbers them in this order.
  - id: split
    use: annotations/split
    in: {annotations: \"JSON\"}
    with:
CLASSES";

const PROMPTS: &str = "  # The CLIP embedding of each class name, averaged over sentences with it.
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: \"CLIP\", classes: split.classes}
";

const IMPORT: &str = "  # The proposals, matched to the images and checked.
  - id: proposals
    use: proposals/import
    in: {proposals: \"PROPOSALS\", annotations: \"JSON\"}
";

const DETECT: &str = "  # The CLIP embedding of each proposal.
  - id: regions
    use: clip/proposals
    in: {images: \"IMAGES\", annotations: split.annotations, proposals: BOXES, checkpoint: \"CLIP\"}
  # The classes of each proposal, by the similarity of its embedding to those of the names.
  - id: detect
    use: detect/zero-shot
    in: {features: regions.features, prompts: prompts.prompts, classes: split.classes, annotations: split.annotations}
  # AP of base and novel classes.
  - id: evaluation
    use: eval/PROTOCOL
    in: {annotations: split.annotations, detections: detect.detections, classes: split.classes}
";

pub(crate) fn init(home: &Path, args: &Args) -> Result<()> {
    let Args { data, images, clip, proposals, novel, output } = args;
    let refused = |problem: String, hint: &str| Err(Error::Usage { problem, hint: hint.into() });
    if output.exists() {
        return refused(format!("{} exists, and is not overwritten", output.display()), "choose another name with `-o FILE`");
    }
    let mut text = format!("{HEAD}name: {}\nstages:\n", name_of(output));
    if data.is_dir() {
        if images.is_some() || proposals.is_some() || !novel.is_empty() {
            let problem = "`--images`, `--proposals` and `--novel` are for a json of annotations, and this is a folder".to_owned();
            return refused(problem, "give the json instead of the folder, or leave them out");
        }
        text.push_str(FOLDER);
        if clip.is_some() {
            text.push_str(&GLOBALS.replace("LIST", "list"));
        }
    } else {
        let Some(folder) = images else {
            let hint = "give it with `--images FOLDER`, or give the folder alone, if there are no annotations";
            return refused("the folder of the images is missing".into(), hint);
        };
        if !folder.is_dir() {
            return refused(
                format!("--images: {} is no folder", folder.display()),
                "give the folder that the json's file names are relative to",
            );
        }
        of_json(args, &mut text)?;
    }
    if let Some(clip) = clip
        && !says_activation(clip)?
    {
        let with = "with: {clip: {gelu: quick}}  # the file does not say it: `quick` for OpenAI's weights, `exact` for most others\n";
        text = text.replace("    with: {resize: square}\n", &format!("    {}", with.replace("{clip: ", "{resize: square, clip: ")));
        for line in ["classes: split.classes}\n  #", "checkpoint: \"CLIP\"}\n  #"] {
            let (head, _) = line.split_once("  #").expect("BUG: the line has a comment after it");
            text = text.replace(line, &format!("{head}    {with}  #"));
        }
    }
    let folder = images.as_ref().unwrap_or(data);
    for (word, path) in [("JSON", Some(data)), ("IMAGES", Some(folder)), ("CLIP", clip.as_ref()), ("PROPOSALS", proposals.as_ref())] {
        if let Some(path) = path {
            text = text.replace(&format!("\"{word}\""), &with_slash(path)?);
        }
    }
    let folder = std::env::current_dir().unwrap_or_default();
    let request = Request { folder, file: None, text: text.clone(), settings: Vec::new(), variants: Vec::new() };
    let pipeline = file::read(output.display().to_string(), request)?;
    publish::replace(output, text.as_bytes())?;
    let written = if output.to_string_lossy().contains('/') { output.display().to_string() } else { format!("./{}", output.display()) };
    let (n_steps, next) = (count(pipeline.steps.len(), "step"), as_typed(home, &["check".into(), written]));
    let more = if clip.is_none() { "\nwith `--clip FILE` it would embed the images, too" } else { "" };
    Ok(print(&format!("{}: {n_steps}{more}\nnext: {next}\n", output.display()))?)
}

/// The steps for a json.
fn of_json(Args { data, clip, proposals, novel, .. }: &Args, text: &mut String) -> Result<()> {
    let annotations = AnnotationFile::open(&inputs::digest_path(data, None, 0)?)?.load_all()?;
    let names: Vec<&str> = annotations.categories.iter().map(|category| category.name.as_str()).collect();
    if let Some(unknown) = novel.iter().find(|name| !names.contains(&name.trim())) {
        let hint = match nearest(unknown, names.iter().copied()) {
            Some(nearest) => format!("did you mean `{nearest}`?"),
            None => "name classes as the json does".into(),
        };
        return Err(Error::Usage { problem: format!("--novel: {} has no class `{unknown}`", data.display()), hint });
    }
    if names.is_empty() {
        let hint = "give a json with `categories`, or the folder of the images alone".into();
        return Err(Error::Usage { problem: format!("{} names no classes", data.display()), hint });
    }
    let is_lvis = annotations.categories.iter().all(|category| category.frequency.is_some());
    let is_novel = |name: &&str| novel.iter().any(|novel| novel.trim() == *name);
    let classes = if is_lvis && novel.is_empty() {
        "      # Frequent and common classes are base, rare ones novel.\n      classes: lvis-frequency\n".to_owned()
    } else {
        let (novel, base): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| is_novel(name));
        format!("      classes:\n        base: {}\n        novel: {}\n", list(&base), list(&novel))
    };
    text.push_str(&SPLIT.replace("CLASSES", &classes));
    let is_pickle = |path: &Path| path.extension().is_some_and(|extension| extension == "pkl" || extension == "pickle");
    let boxes = match proposals {
        Some(path) if is_pickle(path) => {
            text.push_str(IMPORT);
            "proposals.proposals"
        }
        Some(_) | None => "\"PROPOSALS\"",
    };
    if clip.is_some() {
        text.push_str(PROMPTS);
        match proposals {
            Some(_) => text.push_str(&DETECT.replace("BOXES", boxes).replace("PROTOCOL", if is_lvis { "lvis" } else { "coco" })),
            None => text.push_str(&GLOBALS.replace("LIST", "split")),
        }
    }
    Ok(())
}

/// Whether a checkpoint says with which activation it was trained. Fails if it is no CLIP.
fn says_activation(path: &Path) -> Result<bool> {
    match Clip::default().check(&CheckpointFile::open(&inputs::digest_path(path, None, 0)?)?) {
        Ok(()) => Ok(true),
        Err(StageError::Input { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The name of the pipeline in a file.
fn name_of(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let name: String = stem.chars().map(plain).collect();
    if name.is_empty() { "mine".into() } else { name }
}

/// A path as pipelines write it, with a slash.
fn with_slash(path: &Path) -> Result<String> {
    let Some(text) = path.to_str() else {
        let problem = format!("{}: pipelines are text in UTF-8, and this path is not", path.display());
        return Err(Error::Usage { problem, hint: "rename it".into() });
    };
    Ok(scalar(&if text.contains('/') { text.to_owned() } else { format!("./{text}") }))
}

/// A list of names, on lines of a readable length.
fn list(names: &[&str]) -> String {
    let (mut text, mut line) = (String::from("["), 0);
    for (place, name) in names.iter().enumerate() {
        let name = scalar(name);
        if place > 0 {
            let is_full = line + name.len() > LINE;
            text.push_str(if is_full { ",\n          " } else { ", " });
            line = if is_full { 0 } else { line };
        }
        line += name.len() + 2;
        let _infallible = write!(text, "{name}");
    }
    text + "]"
}

/// Text in YAML, in quotes where it would not be read as text otherwise.
fn scalar(text: &str) -> String {
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '.')
        && !text.ends_with(' ')
        && text.chars().all(|c| c.is_alphanumeric() || " _-./()+".contains(c))
        && matches!(serde_yaml::from_str(text), Ok(serde_yaml::Value::String(read)) if read == text)
        // YAML 1.1 reads these as true and false.
        && !["y", "n", "yes", "no", "on", "off"].contains(&text.to_lowercase().as_str());
    if is_plain {
        return text.to_owned();
    }
    // JSON leaves some characters as they are that end a line in YAML, or that it refuses.
    let escaped = |c: char| {
        if c == '\u{7f}' || ('\u{80}'..='\u{9f}').contains(&c) || "\u{2028}\u{2029}\u{feff}".contains(c) {
            format!("\\u{:04x}", u32::from(c))
        } else {
            c.to_string()
        }
    };
    serde_json::Value::from(text).to_string().chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_text_that_they_are() {
        let names = [
            "cat",
            "tea pot",
            "no",
            "7",
            "null",
            "a: b",
            "t'shirt",
            "\"x\"",
            "caf\u{e9}",
            "a, b",
            "[x]",
            "#1",
            " x",
            "true",
            "1e3",
            "~",
            "a #b",
            "a\u{85}b",
            "a\u{2028}b\u{7f}",
        ];
        let many: Vec<&str> = names.iter().copied().cycle().take(200).collect();
        let read: Vec<String> = serde_yaml::from_str(&list(&many)).unwrap();
        assert_eq!(read, many);
        assert_eq!(list(&["cat", "no"]), "[cat, \"no\"]");
    }
}
