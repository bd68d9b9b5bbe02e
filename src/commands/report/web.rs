//! What became of the images of the web that a run looked for: for each class a row of numbers and a contact sheet of those that are used.

use std::{collections::BTreeMap, fmt::Write as _};

use ovenbird_cache::Artifact;
use ovenbird_data::annotations::ImageInfo;
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Images, WebCounts, WebTable},
};

use super::{
    contact::{self, PER_CLASS, PER_REPORT},
    gallery,
    html::{escape, put},
    origins::Origins,
    page::Section,
};
use crate::{error::Result, pipeline::step_id::StepId};

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
    /// A JPEG of [`contact::SIDE`] px, or why there is none.
    jpeg: Result<Vec<u8>, String>,
}

/// The images of each step of a run that labels images of the web.
pub(super) fn web_images(origins: &Origins<'_>) -> Vec<Result<WebImages>> {
    let found = origins.outputs_of_kind(WebTable::KIND);
    let n_pictures = PER_REPORT / found.len().max(1);
    found.into_iter().map(|(step, artifact, port)| of_step(step, artifact, port, n_pictures, origins)).collect()
}

/// `n_pictures`: the most images that are shown.
fn of_step(step: &StepId, artifact: &Artifact, port: &str, n_pictures: usize, origins: &Origins<'_>) -> Result<WebImages> {
    let table = WebTable::open(&artifact.port(port))?;
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
    let picture =
        |info: &&ImageInfo| Shown { file_name: info.file_name.clone(), jpeg: gallery::pictured(images.as_ref(), Some(info), whole) };
    let sheet = |counts: &WebCounts| {
        let infos = by_class.get(counts.class.as_str())?;
        Some((counts.class.clone(), infos.iter().map(picture).collect()))
    };
    let sheets = table.classes.iter().filter_map(sheet).collect();
    Ok(WebImages { step: step.clone(), table, notes, sheets })
}

/// A whole image in the middle of a black square.
fn whole(images: &Images, info: &ImageInfo) -> Result<Vec<u8>> {
    let side = i64::from(info.width.max(info.height));
    let [left, top] = [info.width, info.height].map(|length| (i64::from(length) - side) / 2);
    contact::cut(images, info, [left, top, left + side, top + side])
}

impl Section for WebImages {
    fn part(&self) -> String {
        format!("{}.table", self.step)
    }

    fn render(&self, out: &mut String) {
        put!(out, "<section><h2>{}: images of the web</h2>", escape(&self.step.to_string()));
        self.notes.iter().for_each(|note| put!(out, "<p class=\"quiet\">{}</p>", escape(note)));
        out.push_str("<div class=\"wide\"><table><tr><th>class</th>");
        for header in ["wanted", "retrieved", "downloaded", "used"] {
            put!(out, "<th class=\"number\">{header}</th>");
        }
        out.push_str("<th>links without an image</th></tr>");
        for counts in self.table.classes.iter().chain([&self.table.total()]) {
            row(out, counts);
        }
        out.push_str("</table></div>");
        for (class, pictures) in &self.sheets {
            put!(out, "<details><summary>{} <span class=\"quiet\">the best {}</span></summary>", escape(class), pictures.len());
            out.push_str("<div class=\"contact gallery\">");
            for Shown { file_name, jpeg } in pictures {
                let words = jpeg.as_ref().err().map_or_else(|| file_name.clone(), |problem| format!("{file_name}: {problem}"));
                contact::begin_figure(out, jpeg, &words);
                out.push_str("</svg></figure>");
            }
            out.push_str("</div></details>");
        }
        out.push_str("</section>");
    }
}

fn row(out: &mut String, WebCounts { class, wanted, retrieved, downloaded, used, reasons }: &WebCounts) {
    put!(out, "<tr><td>{}</td>", escape(class));
    for number in [wanted, retrieved, downloaded, used] {
        put!(out, "<td class=\"number\">{number}</td>");
    }
    let reasons: Vec<String> = reasons.iter().map(|(word, n)| format!("{n} {word}")).collect();
    put!(out, "<td>{}</td></tr>", if reasons.is_empty() { "–".into() } else { escape(&reasons.join(", ")) });
}
