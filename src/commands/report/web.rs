//! What became of the images of the web that a run looked for: for each class a row of numbers and a contact sheet of those that are used.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use ovenbird_cache::Artifact;
use ovenbird_data::{
    annotations::ImageInfo,
    images::{Image, Preprocess, SquareResize},
};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Images, WebCounts, WebTable},
    find,
};

use super::{
    gallery,
    html::{escape, put},
    origins::Origins,
    picture::base64,
};
use crate::{error::Result, pipeline::step_id::StepId, run_state::StepState};

/// The most images of a class that are shown.
const PER_CLASS: usize = 20;
/// The most images of a report that are shown: with more classes or steps, fewer of each.
const PER_REPORT: usize = 1000;
/// The side of a shown image, px.
const SIDE: u32 = 96;

/// Images of the web that a step labelled.
pub(super) struct WebImages {
    step: StepId,
    table: WebTable,
    notes: Vec<String>,
    /// By class, those with images.
    sheets: Vec<(String, Vec<Shown>)>,
}

/// One image.
struct Shown {
    file_name: String,
    /// A JPEG of [`SIDE`] px, or why there is none.
    jpeg: Result<Vec<u8>, String>,
}

/// The images of each step of a run that labels images of the web.
pub(super) fn web_images<'a>(
    steps: &'a [StepState],
    artifacts: &'a BTreeMap<StepId, Artifact>,
    origins: &Origins<'_>,
) -> Vec<Result<WebImages>> {
    let has_table = |step: &&StepState| find(&step.kind).is_some_and(|entry| entry.outputs.iter().any(|port| port.kind == WebTable::KIND));
    let found: Vec<_> = steps
        .iter()
        .filter(has_table)
        .filter_map(|step| Some((&step.id, artifacts.get(&step.id).filter(|artifact| !artifact.is_dropped)?)))
        .collect();
    let n_pictures = PER_REPORT / found.len().max(1);
    found.into_iter().map(|(step, artifact)| of_step(step, artifact, n_pictures, origins)).collect()
}

/// `n_pictures`: the most images that are shown.
fn of_step(step: &StepId, artifact: &Artifact, n_pictures: usize, origins: &Origins<'_>) -> Result<WebImages> {
    let table = WebTable::open(&artifact.port("table"))?;
    let labels = AnnotationFile::open(&artifact.port("annotations"))?.load()?;
    let mut notes = Vec::new();
    let images = gallery::images(step, &labels, origins, &mut notes);
    let n_shown = PER_CLASS.min(n_pictures.div_ceil(table.classes.len().max(1)));
    let mut by_class: BTreeMap<&str, Vec<&ImageInfo>> = BTreeMap::new();
    for label in &labels.annotations {
        if let (Some(category), Some(info)) = (labels.category(label.category_id), labels.image(label.image_id)) {
            let of_class = by_class.entry(&category.name).or_default();
            if of_class.len() < n_shown {
                of_class.push(info);
            }
        }
    }
    let picture = |info: &&ImageInfo| {
        let jpeg = match &images {
            Some(Ok(images)) => shown(images, info).map_err(|error| error.message()),
            Some(Err(problem)) => Err(problem.clone()),
            None => Err("no step of the run reads its image".into()),
        };
        Shown { file_name: info.file_name.clone(), jpeg }
    };
    let sheet = |counts: &WebCounts| {
        let infos = by_class.get(counts.class.as_str())?;
        Some((counts.class.clone(), infos.iter().map(picture).collect()))
    };
    let sheets = table.classes.iter().filter_map(sheet).collect();
    Ok(WebImages { step: step.clone(), table, notes, sheets })
}

/// A whole image, squeezed into a square of black.
fn shown(images: &Images, info: &ImageInfo) -> Result<Vec<u8>> {
    let file = images.file(&info.file_name)?;
    let image = Image::decode_sized(&file.read()?, &file.path, [info.width, info.height]).map_err(ovenbird_stages::Error::from)?;
    let side = i64::from(info.width.max(info.height));
    let [left, top] = [info.width, info.height].map(|length| (i64::from(length) - side) / 2);
    let preprocess = Preprocess { side_px: SIDE, resize: SquareResize::Squash, mean: [0.0; 3], std: [1.0; 3] };
    Ok(preprocess.square_of(&image, [left, top, left + side, top + side]).to_jpeg(80))
}

impl WebImages {
    /// What the report shows by it.
    pub(super) fn part(&self) -> String {
        format!("{}.table", self.step)
    }

    pub(super) fn render(&self, out: &mut String) {
        put!(out, "<section><h2>{}: images of the web</h2>", escape(&self.step.to_string()));
        self.notes.iter().for_each(|note| put!(out, "<p class=\"quiet\">{}</p>", escape(note)));
        out.push_str("<div class=\"wide\"><table><tr><th>class</th>");
        for header in ["wanted", "retrieved", "downloaded", "used"] {
            put!(out, "<th class=\"number\">{header}</th>");
        }
        out.push_str("<th>links without an image</th></tr>");
        let sum = |number: fn(&WebCounts) -> usize| self.table.classes.iter().map(number).sum::<usize>();
        let numbers = |counts: &WebCounts| [counts.wanted, counts.retrieved, counts.downloaded, counts.used];
        for counts in &self.table.classes {
            row(out, &counts.class, numbers(counts), &counts.reasons);
        }
        let words: BTreeSet<&String> = self.table.classes.iter().flat_map(|counts| counts.reasons.keys()).collect();
        let of_word = |word: &String| self.table.classes.iter().filter_map(|counts| counts.reasons.get(word)).sum();
        let reasons = words.into_iter().map(|word| (word.clone(), of_word(word))).collect();
        let all = [sum(|counts| counts.wanted), sum(|counts| counts.retrieved), sum(|counts| counts.downloaded), sum(|counts| counts.used)];
        row(out, "all", all, &reasons);
        out.push_str("</table></div>");
        for (class, pictures) in &self.sheets {
            put!(out, "<details><summary>{} <span class=\"quiet\">the best {}</span></summary>", escape(class), pictures.len());
            out.push_str("<div class=\"contact gallery\">");
            for Shown { file_name: name, jpeg } in pictures {
                let words = escape(&jpeg.as_ref().err().map_or_else(|| name.clone(), |problem| format!("{name}: {problem}")));
                put!(out, "<figure><svg viewBox=\"0 0 {SIDE} {SIDE}\" role=\"img\" aria-label=\"{words}\"><title>{words}</title>");
                match jpeg {
                    Ok(jpeg) => put!(out, "<image width=\"{SIDE}\" height=\"{SIDE}\" href=\"data:image/jpeg;base64,{}\"/>", base64(jpeg)),
                    Err(_) => put!(out, "<rect class=\"nothing\" width=\"{SIDE}\" height=\"{SIDE}\"/>"),
                }
                out.push_str("</svg></figure>");
            }
            out.push_str("</div></details>");
        }
        out.push_str("</section>");
    }
}

fn row(out: &mut String, class: &str, numbers: [usize; 4], reasons: &BTreeMap<String, usize>) {
    put!(out, "<tr><td>{}</td>", escape(class));
    for number in numbers {
        put!(out, "<td class=\"number\">{number}</td>");
    }
    let reasons: Vec<String> = reasons.iter().map(|(word, n)| format!("{n} {word}")).collect();
    put!(out, "<td>{}</td></tr>", if reasons.is_empty() { "–".into() } else { escape(&reasons.join(", ")) });
}
