//! Images of a run with annotated objects and detections: those that fit worst, those that fit best, and others at random.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use ovenbird_cache::{Artifact, Digest};
use ovenbird_data::{
    annotations::{Annotation, Annotations, CategoryId, ImageId, ImageInfo},
    evaluate::Detection,
    images::Image,
};
use ovenbird_stages::{
    Artifact as _, PortInfo,
    artifacts::{AnnotationFile, Classes, Detections, EvaluationFile, Images},
    find,
};

use super::{
    html::{escape, put},
    origins::{ImageInput, Origins},
    picture::{Boxed, Picture, Role},
};
use crate::{error::Result, output::count, pipeline::step_id::StepId, run_state::StepState};

/// The most images of each kind.
const PER_GROUP: usize = 6;
/// The most detections that are drawn on an image.
const MAX_DETECTIONS: usize = 12;
/// The longest side of an image in a report, px.
const MAX_SIDE: u32 = 800;
/// A detection finds an object of its class if their boxes overlap at least so much.
const MIN_IOU: f32 = 0.5;

/// The pictures of a report.
pub(super) struct Gallery {
    step: StepId,
    has_detections: bool,
    has_scores: bool,
    /// What to know about them.
    notes: Vec<String>,
    /// By heading.
    groups: Vec<(&'static str, Vec<Picture>)>,
    /// Names of the classes in the pictures, and whether they are novel, by the places that boxes have.
    classes: Vec<(String, bool)>,
}

/// What is known of the images of a step.
struct Subject {
    annotations: Annotations,
    /// The classes that count, and whether they are novel.
    classes: BTreeMap<CategoryId, (String, bool)>,
    /// The best detections of each image, best first; `None` where the step has none.
    detections: Option<BTreeMap<ImageId, Vec<Detection>>>,
    /// The images that the detector was run on; `None` where that is not known.
    looked_at: Option<BTreeSet<ImageId>>,
}

/// The pictures of the first evaluation; without one, of a step that detects; without one, of a step that reads annotated images.
/// `None` where there is none.
pub(super) fn gallery(steps: &[StepState], artifacts: &BTreeMap<StepId, Artifact>, origins: &Origins<'_>) -> Result<Option<Gallery>> {
    let has = |ports: &[PortInfo], kind: &str| ports.iter().any(|port| port.kind == kind);
    let there: Vec<&StepState> = steps.iter().filter(|step| artifacts.get(&step.id).is_some_and(|artifact| !artifact.is_dropped)).collect();
    let first = |is_wanted: &dyn Fn(&[PortInfo], &[PortInfo]) -> bool| {
        there.iter().find(|step| find(&step.kind).is_some_and(|entry| is_wanted(entry.inputs, entry.outputs))).copied()
    };
    let evaluates = |inputs: &[PortInfo], outputs: &[PortInfo]| {
        has(inputs, Detections::KIND) && has(inputs, AnnotationFile::KIND) && has(outputs, EvaluationFile::KIND)
    };
    let detects = |inputs: &[PortInfo], outputs: &[PortInfo]| has(inputs, AnnotationFile::KIND) && has(outputs, Detections::KIND);
    let reads = |inputs: &[PortInfo], _: &[PortInfo]| has(inputs, AnnotationFile::KIND) && has(inputs, Images::KIND);
    let Some(step) = first(&evaluates).or_else(|| first(&detects)).or_else(|| first(&reads)) else { return Ok(None) };
    let Some(subject) = Subject::of(step, &artifacts[&step.id], origins)? else { return Ok(None) };

    let mut notes = Vec::new();
    let Some(images) = images(&step.id, &subject.annotations, origins, &mut notes) else {
        notes.push(format!("None: no step of the run reads the images of `{}`, or they are gone.", step.id));
        let step = step.id.clone();
        return Ok(Some(Gallery { step, has_detections: false, has_scores: false, notes, groups: Vec::new(), classes: Vec::new() }));
    };
    let by_image = subject.annotations.by_image();
    let objects = |id: ImageId| -> Vec<&Annotation> {
        let objects = by_image.get(&id).into_iter().flatten().copied();
        objects.filter(|object| !object.is_crowd && subject.classes.contains_key(&object.category_id)).collect()
    };
    let scores: Vec<Score> = subject.annotations.images.iter().filter_map(|image| subject.score(image.id, &objects(image.id))).collect();
    let all = subject.annotations.images.iter().map(|image| image.id);
    let mut classes = Vec::new();
    let mut draw = |id: &ImageId| {
        let image = subject.annotations.image(*id).expect("BUG: the chosen images are annotated");
        subject.picture(image, &objects(*id), &images, &mut classes)
    };
    let groups = chosen(&scores, all).map(|(heading, ids)| (heading, ids.iter().map(&mut draw).collect::<Vec<_>>()));
    let groups = groups.into_iter().filter(|(_, pictures)| !pictures.is_empty()).collect();
    let (has_detections, has_scores) = (subject.detections.is_some(), !scores.is_empty());
    Ok(Some(Gallery { step: step.id.clone(), has_detections, has_scores, notes, groups, classes }))
}

/// The folder with the images that a step is about, or why it cannot be read; `None` where no step of the run reads them.
pub(super) fn images(
    step: &StepId,
    annotations: &Annotations,
    origins: &Origins<'_>,
    notes: &mut Vec<String>,
) -> Option<Result<Images, String>> {
    let mut problem = None;
    for ImageInput { step: reader, port, is_upstream } in origins.image_inputs(step) {
        let opened = origins.given(&reader, port).and_then(|given| match given {
            Some(given) => Ok(Some((Images::open(&given.files)?, given.was.is_some()))),
            None => Ok(None),
        });
        let found = match opened {
            Ok(Some((images, has_changed))) if annotations.images.iter().any(|image| images.file(&image.file_name).is_ok()) => {
                if has_changed {
                    notes.push(format!("The folder of images that `{reader}` read has changed since: images are shown as they are now."));
                }
                return Some(Ok(images));
            }
            Ok(Some(_)) => format!("it is not in the folder of images that `{reader}` reads"),
            Ok(None) => format!("the images that `{reader}` read are no longer in the home"),
            Err(error) => error.message(),
        };
        // Another step may read quite other images.
        if is_upstream {
            problem.get_or_insert(found);
        }
    }
    problem.map(Err)
}

/// A picture of an image of that folder, as a JPEG, or why there is none.
pub(super) fn pictured(
    images: Option<&Result<Images, String>>,
    info: Option<&ImageInfo>,
    make: impl FnOnce(&Images, &ImageInfo) -> Result<Vec<u8>>,
) -> Result<Vec<u8>, String> {
    match (images, info) {
        (Some(Ok(images)), Some(info)) => make(images, info).map_err(|error| error.message()),
        (Some(Err(problem)), _) => Err(problem.clone()),
        _ => Err("no step of the run reads its image".into()),
    }
}

impl Subject {
    /// `None` where an input is not there any more.
    fn of(step: &StepState, artifact: &Artifact, origins: &Origins<'_>) -> Result<Option<Self>> {
        let Some(annotations) = origins.files(&step.id, "annotations")? else { return Ok(None) };
        let annotations = AnnotationFile::open(&annotations)?.load_all()?;
        let split = match origins.files(&step.id, "classes")? {
            Some(files) => Some(Classes::open(&files)?.0),
            None => None,
        };
        let class = |name: &String| match &split {
            None => Some((name.clone(), false)),
            Some(split) => split.all().any(|known| known == name).then(|| (name.clone(), split.novel.contains(name))),
        };
        let classes: BTreeMap<CategoryId, (String, bool)> =
            annotations.categories.iter().filter_map(|category| Some((category.id, class(&category.name)?))).collect();

        let port = |ports: &[PortInfo]| ports.iter().find(|port| port.kind == Detections::KIND).map(|port| port.name);
        let Some(entry) = find(&step.kind) else { return Ok(None) };
        let files = match (port(entry.outputs), port(entry.inputs)) {
            (Some(port), _) => artifact.port(port),
            (None, Some(port)) => match origins.files(&step.id, port)? {
                Some(files) => files,
                None => return Ok(None),
            },
            (None, None) => return Ok(Some(Self { annotations, classes, detections: None, looked_at: None })),
        };
        let table = Detections::open(&files)?;
        let by_image = annotations.by_image();
        let mut detections: BTreeMap<ImageId, Vec<Detection>> = BTreeMap::new();
        for piece in table.pieces() {
            let mut touched = BTreeSet::new();
            for detection in piece?.into_iter().filter(|detection| classes.contains_key(&detection.category_id)) {
                touched.insert(detection.image_id);
                detections.entry(detection.image_id).or_default().push(Detection { mask: None, ..detection });
            }
            // Of each image, as many remain as count or are drawn.
            for id in touched {
                let of_image = detections.entry(id).or_default();
                of_image.sort_by(|a, b| b.score.total_cmp(&a.score));
                of_image.truncate(by_image.get(&id).map_or(0, Vec::len).max(MAX_DETECTIONS));
            }
        }
        Ok(Some(Self { looked_at: table.looked_at()?, annotations, classes, detections: Some(detections) }))
    }

    fn is_looked_at(&self, id: ImageId) -> bool {
        self.looked_at.as_ref().is_none_or(|looked_at| looked_at.contains(&id))
    }

    /// The detections of an image that count: as many as it has objects, the best ones.
    fn counted(&self, id: ImageId, n_objects: usize) -> &[Detection] {
        let found = self.detections.as_ref().and_then(|detections| detections.get(&id)).map_or(&[][..], Vec::as_slice);
        &found[..found.len().min(n_objects)]
    }

    /// `None` for an image without objects, or without a look at it.
    fn score(&self, id: ImageId, objects: &[&Annotation]) -> Option<Score> {
        if objects.is_empty() || self.detections.is_none() || !self.is_looked_at(id) {
            return None;
        }
        let n_found = matches(objects, self.counted(id, objects.len())).iter().flatten().count();
        Some(Score { id, n_found, n_objects: objects.len() })
    }

    fn picture(
        &self,
        image: &ImageInfo,
        objects: &[&Annotation],
        images: &Result<Images, String>,
        classes: &mut Vec<(String, bool)>,
    ) -> Picture {
        let found = match objects.len() {
            // Nothing is to be found; the surest mistakes are shown.
            0 => self.counted(image.id, MAX_DETECTIONS.div_ceil(2)),
            n_objects => self.counted(image.id, n_objects),
        };
        let matches = matches(objects, found);
        let mut boxed = |category_id: CategoryId, xyxy, role| {
            let known = &self.classes[&category_id];
            let class = classes.iter().position(|class| class == known).unwrap_or_else(|| {
                classes.push(known.clone());
                classes.len() - 1
            });
            let (name, is_novel) = known.clone();
            Boxed { xyxy, class, name, is_novel, role }
        };
        let mut boxes = Vec::new();
        for (detection, hit) in found.iter().zip(&matches).take(MAX_DETECTIONS) {
            let is_right = (!objects.is_empty()).then_some(hit.is_some());
            boxes.push(boxed(detection.category_id, detection.xyxy, Role::Detection { score: detection.score, is_right }));
        }
        for (place, object) in objects.iter().enumerate() {
            boxes.push(boxed(object.category_id, object.xyxy, Role::Object { is_found: matches.contains(&Some(place)) }));
        }
        let n_found = matches.iter().flatten().count();
        let words = match (&self.detections, objects.len()) {
            (Some(_), _) if !self.is_looked_at(image.id) => "Skipped by an earlier step: no detections.".into(),
            (Some(_), 0) => "No annotated objects.".into(),
            (Some(_), n_objects) => format!("{n_found} of {n_objects} objects found."),
            (None, 0) => String::new(),
            (None, n_objects) => format!("{}.", count(n_objects, "annotated object")),
        };
        let jpeg = pictured(Some(images), Some(image), jpeg);
        Picture { file_name: image.file_name.clone(), id: image.id, size: [image.width, image.height], jpeg, boxes, words }
    }
}

/// An image as it is embedded: without EXIF, which would turn it against its boxes, and no larger than needed.
pub(super) fn jpeg(images: &Images, image: &ImageInfo) -> Result<Vec<u8>> {
    let file = images.file(&image.file_name)?;
    let decoded = Image::decode_sized(&file.read()?, &file.path, [image.width, image.height]).map_err(ovenbird_stages::Error::from)?;
    let longer = decoded.width.max(decoded.height);
    if longer <= MAX_SIDE {
        return Ok(decoded.to_jpeg(85));
    }
    let side = |side: u32| (u64::from(side) * u64::from(MAX_SIDE) / u64::from(longer)).max(1) as u32;
    Ok(decoded.resize(side(decoded.width), side(decoded.height)).to_jpeg(85))
}

/// By detection, best first: the place of the object that it finds, of its class, the one that it overlaps most. Each object is found once.
fn matches(objects: &[&Annotation], detections: &[Detection]) -> Vec<Option<usize>> {
    let mut is_found = vec![false; objects.len()];
    let one = |detection: &Detection| {
        let free = objects.iter().enumerate().filter(|(place, object)| !is_found[*place] && object.category_id == detection.category_id);
        let overlaps = free.map(|(place, object)| (place, object.xyxy.iou(&detection.xyxy)));
        let (best, _) = overlaps.filter(|(_, iou)| *iou >= MIN_IOU).max_by(|(_, a), (_, b)| a.total_cmp(b))?;
        is_found[best] = true;
        Some(best)
    };
    detections.iter().map(one).collect()
}

/// How many objects of an image its best detections find.
#[derive(Debug, Clone, Copy)]
struct Score {
    id: ImageId,
    n_found: usize,
    n_objects: usize,
}

/// The images to show, by heading. Of equal scores, images with more objects come first; random ones depend on the ids alone.
fn chosen(scores: &[Score], all: impl Iterator<Item = ImageId>) -> [(&'static str, Vec<ImageId>); 3] {
    let value = |score: &Score| score.n_found as f64 / score.n_objects as f64;
    let more = |a: &Score, b: &Score| b.n_objects.cmp(&a.n_objects).then(a.id.cmp(&b.id));
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| value(a).total_cmp(&value(b)).then_with(|| more(a, b)));
    // Where there are few, no image is both.
    let rest = sorted.split_off(sorted.len().div_ceil(2).min(PER_GROUP));
    let worst: Vec<ImageId> = sorted.into_iter().map(|score| score.id).collect();
    let mut sorted = rest;
    sorted.sort_by(|a, b| value(b).total_cmp(&value(a)).then_with(|| more(a, b)));
    let best: Vec<ImageId> = sorted.into_iter().take(PER_GROUP).map(|score| score.id).collect();
    let mut others: Vec<ImageId> = all.filter(|id| !worst.contains(id) && !best.contains(id)).collect();
    others.sort_by_key(|id| (Digest::of(format!("picture {id}").as_bytes()), *id));
    others.truncate(PER_GROUP);
    [("Worst", worst), ("Best", best), ("Random", others)]
}

impl Gallery {
    /// Whether an image can be shown.
    pub(super) fn has_images(&self) -> bool {
        self.groups.iter().flat_map(|(_, pictures)| pictures).any(|picture| picture.jpeg.is_ok())
    }

    pub(super) fn render(&self, out: &mut String) {
        let Self { step, has_detections, has_scores, notes, groups, classes } = self;
        put!(out, "<section id=\"pictures\"><h2>Pictures of {}</h2>", escape(&step.to_string()));
        notes.iter().for_each(|note| put!(out, "<p class=\"failure\">{}</p>", escape(note)));
        if groups.is_empty() {
            return out.push_str("</section>");
        }
        if *has_scores {
            put!(
                out,
                "<p>The {PER_GROUP} images with the lowest score, the {PER_GROUP} with the highest, and up to {PER_GROUP} of the others, chosen at random by their \
                 ids. The score of an image with n annotated objects: the part of them that its n best detections find, with the class and IoU &ge; {MIN_IOU}.</p>"
            );
        }
        out.push_str(match (*has_detections, *has_scores) {
            (true, true) => {
                "<p class=\"quiet\">Solid: those detections, &#10003; right, &#10007; wrong. Dashed: annotated objects; a name on white: not found. \
                 &#9733; and orange: novel classes.</p>"
            }
            (true, false) => "<p class=\"quiet\">Solid: the best detections. &#9733; and orange: novel classes.</p>",
            (false, _) => "<p class=\"quiet\">Dashed: annotated objects. &#9733; and orange: novel classes.</p>",
        });
        self.filter(out);
        for (heading, pictures) in groups {
            put!(out, "<div class=\"group\"><h3>{heading}</h3><div class=\"gallery\">");
            pictures.iter().for_each(|picture| picture.render(out));
            out.push_str("</div></div>");
        }
        if classes.len() > 1 {
            put!(out, "<script>{}</script>", include_str!("filter.js").trim());
        }
        out.push_str("</section>");
    }

    /// A choice of classes, which only a script can follow: it shows the choice, too.
    fn filter(&self, out: &mut String) {
        let mut sorted: Vec<(usize, &(String, bool))> = self.classes.iter().enumerate().collect();
        sorted.sort_by_key(|(_, (name, is_novel))| (!is_novel, name));
        if sorted.len() < 2 {
            return;
        }
        out.push_str("<p id=\"filter\" hidden><label>Show <select><option value=\"\">all classes</option>");
        for (place, (name, is_novel)) in sorted {
            let star = if *is_novel { "&#9733; " } else { "" };
            put!(out, "<option value=\"{place}\">{star}{}</option>", escape(name));
        }
        out.push_str("</select></label></p>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(found: &[(u64, usize, usize)]) -> Vec<Score> {
        found.iter().map(|(id, n_found, n_objects)| Score { id: ImageId(*id), n_found: *n_found, n_objects: *n_objects }).collect()
    }

    fn ids(images: &[ImageId]) -> Vec<u64> {
        images.iter().map(|id| id.0).collect()
    }

    #[test]
    fn the_worst_and_the_best_are_of_the_score_and_the_random_ones_of_the_rest() {
        let found: Vec<(u64, usize, usize)> = (1..=40).map(|id| (id, id as usize / 4, 10)).collect();
        let [(_, worst), (_, best), (_, random)] = chosen(&scores(&found), (1..=50).map(ImageId));
        assert_eq!((ids(&worst), ids(&best)), (vec![1, 2, 3, 4, 5, 6], vec![40, 36, 37, 38, 39, 32]));
        assert_eq!(random.len(), 6);
        assert!(random.iter().all(|id| !worst.contains(id) && !best.contains(id)));
        let [.., (_, again)] = chosen(&scores(&found), (1..=50).rev().map(ImageId));
        assert_eq!(again, random);
    }

    #[test]
    fn few_images_are_shown_once_and_of_equal_scores_those_with_more_objects_come_first() {
        let [(_, worst), (_, best), (_, random)] = chosen(&scores(&[(1, 0, 2), (2, 0, 9), (3, 4, 4)]), (1..=4).map(ImageId));
        assert_eq!((ids(&worst), ids(&best), ids(&random)), (vec![2, 1], vec![3], vec![4]));
        let [(_, worst), (_, best), (_, random)] = chosen(&[], (1..=2).map(ImageId));
        assert_eq!((worst.len(), best.len(), random.len()), (0, 0, 2));
    }
}
