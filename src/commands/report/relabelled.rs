//! The objects of a run that got other classes: tables of classes, and pictures of objects with the old and the new name.

use std::{collections::BTreeMap, fmt::Write as _};

use ovenbird_cache::Artifact;
use ovenbird_data::{
    annotations::{Annotation, Annotations},
    boxes::Xyxy,
};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Change, Changes, Images, Relabelled, RelabelledClass},
};

use super::{
    contact::{self, Cutting},
    gallery,
    html::{escape, put},
    origins::Origins,
    page::Section,
};
use crate::{error::Result, pipeline::step_id::StepId};

/// The most objects that are shown of a change from one class to another, and the most such changes.
const PER_CHANGE: usize = 5;
const MOST_CHANGES: usize = 12;

/// What a step that relabels objects did.
pub(super) struct Changed {
    step: StepId,
    summary: Relabelled,
    notes: Vec<String>,
    pictures: Vec<Shown>,
}

/// One object.
struct Shown {
    /// A JPEG of [`contact::SIDE`] px, or why there is none.
    jpeg: Result<Vec<u8>, String>,
    /// The box in the picture, px.
    inner: Xyxy,
    /// The old and the new class.
    names: [String; 2],
    words: String,
}

/// What each step of a run that relabels objects did.
pub(super) fn changed(origins: &Origins<'_>) -> Vec<Result<Changed>> {
    let found = origins.outputs_of_kind(Relabelled::KIND).into_iter();
    found.map(|(step, artifact, port)| of_step(step, artifact, port, origins)).collect()
}

fn of_step(step: &StepId, artifact: &Artifact, port: &str, origins: &Origins<'_>) -> Result<Changed> {
    let summary = Relabelled::open(&artifact.port(port))?;
    let Changes(changes) = Changes::open(&artifact.port("changes"))?;
    let annotations = AnnotationFile::open(&artifact.port("annotations"))?.load()?;
    let mut notes = Vec::new();
    let images = gallery::images(step, &annotations, origins, &mut notes);
    let name = |id| annotations.category(id).map(|category| category.name.clone()).unwrap_or_default();
    let mut of_change: BTreeMap<[String; 2], Vec<(&Annotation, Change)>> = BTreeMap::new();
    for object in &annotations.annotations {
        if let Some(change) = changes.get(&object.id) {
            of_change.entry([name(change.0), name(change.1)]).or_default().push((object, *change));
        }
    }
    let mut pictures = Vec::new();
    for (old, new, _) in summary.confusion.iter().take(MOST_CHANGES) {
        let names = [old.clone(), new.clone()];
        let objects = of_change.get(&names).map(Vec::as_slice).unwrap_or_default();
        pictures
            .extend(objects.iter().take(PER_CHANGE).map(|(object, change)| shown(object, *change, &names, &annotations, images.as_ref())));
    }
    Ok(Changed { step: step.clone(), summary, notes, pictures })
}

fn shown(
    object: &Annotation,
    Change(_, _, p_old, p_new): Change,
    names: &[String; 2],
    annotations: &Annotations,
    images: Option<&Result<Images, String>>,
) -> Shown {
    let Cutting { rectangle, inner } = Cutting::around(&object.xyxy);
    let info = annotations.image(object.image_id);
    let file_name = info.map_or("", |info| info.file_name.as_str());
    let percent = |p: Option<f64>| p.map_or_else(|| "–".into(), |p| format!("{:.1} %", 100.0 * p));
    let words = format!("{file_name}, object {}: {} {}, {} {}", object.id, names[0], percent(p_old), names[1], percent(p_new));
    let jpeg = gallery::pictured(images, info, |images, info| contact::cut(images, info, rectangle));
    Shown { jpeg, inner, names: names.clone(), words }
}

impl Section for Changed {
    fn part(&self) -> String {
        format!("{}.summary", self.step)
    }

    fn render(&self, out: &mut String) {
        let Relabelled { objects, unchanged, classes, confusion, .. } = &self.summary;
        put!(out, "<section><h2>{}: classes by CLIP</h2>", escape(&self.step.to_string()));
        let percent = 100.0 * *unchanged as f64 / (*objects).max(1) as f64;
        put!(out, "<p>{unchanged} of {objects} objects keep their class ({percent:.1} %).</p>");
        let lost: Vec<&str> =
            classes.iter().filter(|class| class.before > 0 && class.after == 0).map(|class| class.name.as_str()).collect();
        if !lost.is_empty() {
            put!(out, "<p class=\"failure\">Without any object now: {}.</p>", escape(&lost.join(", ")));
        }
        self.notes.iter().for_each(|note| put!(out, "<p class=\"quiet\">{}</p>", escape(note)));
        out.push_str("<details><summary>Objects by class</summary><div class=\"wide\"><table><tr><th>class</th>");
        for header in ["before", "after", "kept"] {
            put!(out, "<th class=\"number\">{header}</th>");
        }
        out.push_str("</tr>");
        for RelabelledClass { name, before, after, unchanged } in classes {
            put!(out, "<tr><td>{}</td>", escape(name));
            for number in [before, after, unchanged] {
                put!(out, "<td class=\"number\">{number}</td>");
            }
            out.push_str("</tr>");
        }
        out.push_str("</table></div></details>");
        if confusion.is_empty() {
            return out.push_str("</section>");
        }
        out.push_str("<details><summary>Which class became which</summary><div class=\"wide\"><table><tr><th>from</th><th>to</th><th class=\"number\">objects</th></tr>");
        for (old, new, n) in confusion {
            put!(out, "<tr><td>{}</td><td>{}</td><td class=\"number\">{n}</td></tr>", escape(old), escape(new));
        }
        out.push_str("</table></div></details>");
        put!(out, "<details><summary>Objects that changed <span class=\"quiet\">{} of them</span></summary>", self.pictures.len());
        out.push_str("<div class=\"contact gallery\">");
        self.pictures.iter().for_each(|picture| picture.render(out));
        out.push_str("</div></details></section>");
    }
}

impl Shown {
    fn render(&self, out: &mut String) {
        let Self { jpeg, inner, names: [old, new], words } = self;
        contact::begin_figure(out, jpeg, words);
        let Xyxy { x1, y1, .. } = inner;
        put!(out, "<rect class=\"found\" x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>", inner.width(), inner.height());
        put!(out, "</svg><figcaption>{} &rarr; {}</figcaption></figure>", escape(old), escape(new));
    }
}
