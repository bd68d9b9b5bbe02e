//! What the retrievals of a run found: for each class a row of numbers and a contact sheet of its best boxes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use ovenbird_cache::Artifact;
use ovenbird_data::{
    annotations::{Annotations, ImageId},
    boxes::Xyxy,
};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Hits, Images, RegionHit, Searched},
};

use super::{
    contact::{self, Cutting, PER_CLASS, PER_REPORT},
    gallery,
    html::{escape, put},
    origins::Origins,
    page::Section,
};
use crate::{
    error::{Error, Result},
    output::count,
    pipeline::step_id::StepId,
};

/// A box is right if it overlaps an object of its class at least so much.
const MIN_IOU: f32 = 0.5;

/// What a step retrieved.
pub(super) struct Retrieved {
    step: StepId,
    searched: Searched,
    notes: Vec<String>,
    classes: Vec<Sheet>,
}

/// The boxes of a class.
struct Sheet {
    name: String,
    n_boxes: usize,
    images: BTreeSet<ImageId>,
    /// The greatest and the least.
    cosines: Option<[f32; 2]>,
    /// How many overlap an object of the class, where objects are annotated.
    n_right: Option<usize>,
    pictures: Vec<Shown>,
}

/// One box.
struct Shown {
    /// A JPEG of [`contact::SIDE`] px, or why there is none.
    jpeg: Result<Vec<u8>, String>,
    /// The box in the picture, px.
    inner: Xyxy,
    is_right: Option<bool>,
    cosine: f32,
    words: String,
}

/// What each step of a run that retrieves boxes found.
pub(super) fn retrieved(origins: &Origins<'_>) -> Vec<Result<Retrieved>> {
    let found = origins.outputs_of_kind(Hits::KIND);
    let n_pictures = PER_REPORT / found.len().max(1);
    found.into_iter().map(|(step, artifact, port)| of_step(step, artifact, port, n_pictures, origins)).collect()
}

/// `n_pictures`: the most boxes that are shown.
fn of_step(step: &StepId, artifact: &Artifact, port: &str, n_pictures: usize, origins: &Origins<'_>) -> Result<Retrieved> {
    let Hits { by_class, searched } = Hits::open(&artifact.port(port)).map_err(Error::from)?;
    let labels = AnnotationFile::open(&artifact.port("annotations")).map_err(Error::from)?.load()?;
    let mut notes = Vec::new();
    let truth = truth(step, &labels, by_class.iter().map(|(class, _)| class), origins);
    let images = gallery::images(step, &labels, origins, &mut notes);
    let n_shown = PER_CLASS.min(n_pictures.div_ceil(by_class.len().max(1)));
    let mut sheets = Vec::new();
    for (name, hits) in by_class {
        let is_right = |hit: &RegionHit| truth.as_ref().map(|truth| truth.has(&name, hit));
        let judged: Option<Vec<bool>> = hits.iter().map(is_right).collect();
        let shown = hits.iter().take(n_shown).map(|hit| shown(hit, &labels, images.as_ref(), is_right(hit)));
        sheets.push(Sheet {
            n_boxes: hits.len(),
            images: hits.iter().map(|hit| hit.image_id).collect(),
            cosines: hits.first().zip(hits.last()).map(|(best, last)| [best.cosine, last.cosine]),
            n_right: judged.map(|judged| judged.into_iter().filter(|is_right| *is_right).count()),
            pictures: shown.collect(),
            name,
        });
    }
    Ok(Retrieved { step: step.clone(), searched, notes, classes: sheets })
}

/// Annotated objects of the retrieved classes.
struct Truth {
    objects: BTreeMap<(ImageId, String), Vec<Xyxy>>,
}

impl Truth {
    fn has(&self, class: &str, hit: &RegionHit) -> bool {
        let objects = self.objects.get(&(hit.image_id, class.to_owned()));
        objects.is_some_and(|objects| objects.iter().any(|object| object.iou(&hit.xyxy) >= MIN_IOU))
    }
}

/// The objects of the retrieved classes in annotations that steps before this one were made from: a split drops them, so that no stage sees
/// them. `None` where there are none.
fn truth<'a>(step: &StepId, labels: &Annotations, classes: impl Iterator<Item = &'a String>, origins: &Origins<'_>) -> Option<Truth> {
    let classes: BTreeSet<&String> = classes.collect();
    for (reader, port) in origins.inputs_of_kind(step, AnnotationFile::KIND) {
        let Some(annotations) =
            origins.files(&reader, port).ok().flatten().and_then(|files| AnnotationFile::open(&files).ok()?.load_all().ok())
        else {
            continue;
        };
        let mut objects: BTreeMap<(ImageId, String), Vec<Xyxy>> = BTreeMap::new();
        for label in annotations.annotations.iter().filter(|label| !label.is_crowd && labels.image(label.image_id).is_some()) {
            let name = annotations.category(label.category_id).map(|category| &category.name).filter(|name| classes.contains(name));
            if let Some(name) = name {
                objects.entry((label.image_id, name.clone())).or_default().push(label.xyxy);
            }
        }
        if !objects.is_empty() {
            return Some(Truth { objects });
        }
    }
    None
}

fn shown(hit: &RegionHit, labels: &Annotations, images: Option<&Result<Images, String>>, is_right: Option<bool>) -> Shown {
    let RegionHit { image_id, xyxy, objectness, cosine, .. } = hit;
    let Cutting { rectangle, inner } = Cutting::around(xyxy);
    let info = labels.image(*image_id);
    let file_name = info.map_or("", |info| info.file_name.as_str());
    let words = format!("{file_name}, image {image_id}: cosine {cosine:.3}, objectness {objectness:.2}");
    let jpeg = gallery::pictured(images, info, |images, info| contact::cut(images, info, rectangle));
    Shown { jpeg, inner, is_right, cosine: *cosine, words }
}

impl Section for Retrieved {
    fn part(&self) -> String {
        format!("{}.boxes", self.step)
    }

    fn render(&self, out: &mut String) {
        let Searched { regions, candidates, bad_rows } = &self.searched;
        put!(out, "<section><h2>{}: retrieved boxes</h2>", escape(&self.step.to_string()));
        put!(out, "<p class=\"quiet\">The best of {candidates} candidates among {regions} proposals, by cosine to the class.</p>");
        let n_bad = bad_rows.zero + bad_rows.nan + bad_rows.infinite;
        if n_bad > 0 {
            put!(out, "<p class=\"failure\">{} without a direction: never retrieved.</p>", count(n_bad as usize, "embedding"));
        }
        self.notes.iter().for_each(|note| put!(out, "<p class=\"quiet\">{}</p>", escape(note)));
        self.table(out);
        for Sheet { name, pictures, .. } in self.classes.iter().filter(|sheet| !sheet.pictures.is_empty()) {
            put!(out, "<details><summary>★ {} <span class=\"quiet\">the best {}</span></summary>", escape(name), pictures.len());
            out.push_str("<div class=\"contact gallery\">");
            pictures.iter().for_each(|picture| picture.render(out));
            out.push_str("</div></details>");
        }
        out.push_str("</section>");
    }
}

impl Retrieved {
    fn table(&self, out: &mut String) {
        let has_truth = self.classes.iter().any(|sheet| sheet.n_right.is_some());
        out.push_str("<div class=\"wide\"><table><tr><th>class</th><th class=\"number\">boxes</th><th class=\"number\">images</th>");
        out.push_str("<th class=\"number\">best cosine</th><th class=\"number\">last cosine</th>");
        out.push_str(if has_truth { "<th class=\"number\">precision</th></tr>" } else { "</tr>" });
        let row = |name: &str, [n_boxes, n_images]: [usize; 2], cosines: Option<[f32; 2]>, n_right: Option<usize>| {
            let [best, last] = cosines.map_or(["–".into(), "–".into()], |cosines| cosines.map(|cosine| format!("{cosine:.3}")));
            let mut row = format!("<tr><td>{}</td><td class=\"number\">{n_boxes}</td><td class=\"number\">{n_images}</td>", escape(name));
            put!(row, "<td class=\"number\">{best}</td><td class=\"number\">{last}</td>");
            if has_truth {
                let precision = n_right.filter(|_| n_boxes > 0).map(|n_right| 100.0 * n_right as f64 / n_boxes as f64);
                put!(row, "<td class=\"number\">{}</td>", precision.map_or_else(|| "–".into(), |percent| format!("{percent:.0} %")));
            }
            row + "</tr>"
        };
        for Sheet { name, n_boxes, images, cosines, n_right, .. } in &self.classes {
            out.push_str(&row(name, [*n_boxes, images.len()], *cosines, *n_right));
        }
        let images: BTreeSet<&ImageId> = self.classes.iter().flat_map(|sheet| &sheet.images).collect();
        let sum = |number: fn(&Sheet) -> usize| self.classes.iter().map(number).sum::<usize>();
        let all: Vec<[f32; 2]> = self.classes.iter().filter_map(|sheet| sheet.cosines).collect();
        let range = all.iter().copied().reduce(|[best, last], [other_best, other_last]| [best.max(other_best), last.min(other_last)]);
        let n_right = has_truth.then(|| sum(|sheet| sheet.n_right.unwrap_or(0)));
        out.push_str(&row("all", [sum(|sheet| sheet.n_boxes), images.len()], range, n_right));
        out.push_str("</table></div>");
        if has_truth {
            put!(
                out,
                "<p class=\"quiet\">Precision: the boxes that overlap an annotated object of their class by an IoU of {MIN_IOU}. Retrieval does not read these annotations.</p>"
            );
        }
    }
}

impl Shown {
    fn render(&self, out: &mut String) {
        let Self { jpeg, inner, is_right, cosine, words } = self;
        let (mark, class) = match is_right {
            Some(true) => (" ✓", "found novel"),
            Some(false) => (" ✗", "found"),
            None => ("", "found novel"),
        };
        contact::begin_figure(out, jpeg, words);
        let Xyxy { x1, y1, .. } = inner;
        put!(out, "<rect class=\"{class}\" x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>", inner.width(), inner.height());
        put!(out, "</svg><figcaption>{cosine:.3}{mark}</figcaption></figure>");
    }
}
