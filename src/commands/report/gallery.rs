//! Images with ground truth and detections.

use std::{collections::BTreeMap, fmt::Write as _};

use ovenbird_cache::{Artifact, inputs::InputFile};
use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageInfo},
    boxes::Xyxy,
    classes::ClassSplit,
    evaluate::Detection,
};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Classes, Detections, Images},
    find,
};

use super::html::{escape, put};
use crate::{error::Result, pipeline::step_id::StepId, run_state::StepState};

/// The most images in a report.
const MAX_PICTURES: usize = 12;
/// The most detections drawn on one image.
const MAX_BOXES: usize = 8;

/// An image with boxes.
pub(super) struct Picture {
    jpeg: Vec<u8>,
    width: u32,
    height: u32,
    truth: Vec<Named>,
    found: Vec<Named>,
}

struct Named {
    xyxy: Xyxy,
    name: String,
    is_novel: bool,
    score: Option<f32>,
}

/// The files behind an input of an artifact: the output of another step of the run with the same content digest.
fn input(artifacts: &BTreeMap<StepId, Artifact>, of: &Artifact, port: &str) -> Option<Vec<InputFile>> {
    let wanted = of.manifest.recipe.inputs.get(port)?;
    let outputs = artifacts
        .values()
        .filter(|artifact| !artifact.is_dropped)
        .flat_map(|artifact| artifact.manifest.ports.iter().map(move |(name, digest)| (artifact, name, digest)));
    let (artifact, name, _) = outputs.into_iter().find(|(_, _, digest)| *digest == wanted)?;
    Some(artifact.port(name))
}

/// Images for the first evaluation whose inputs are artifacts of the run; empty where there is none. Fails where one cannot be read.
pub(super) fn pictures(steps: &[StepState], artifacts: &BTreeMap<StepId, Artifact>) -> Result<Vec<Picture>> {
    let evaluations = steps.iter().filter(|step| step.kind.starts_with("eval/")).filter_map(|step| artifacts.get(&step.id));
    for evaluation in evaluations {
        let pictures = of_evaluation(steps, artifacts, evaluation)?;
        if !pictures.is_empty() {
            return Ok(pictures);
        }
    }
    Ok(Vec::new())
}

fn of_evaluation(steps: &[StepState], artifacts: &BTreeMap<StepId, Artifact>, evaluation: &Artifact) -> Result<Vec<Picture>> {
    let [annotations, detections, classes] = ["annotations", "detections", "classes"].map(|port| input(artifacts, evaluation, port));
    let (Some(annotations), Some(detections), Some(classes)) = (annotations, detections, classes) else { return Ok(Vec::new()) };
    let annotations = AnnotationFile::open(&annotations)?.load()?;
    let detections = Detections::open(&detections)?;
    let Classes(classes) = Classes::open(&classes)?;
    let Some(ImageInfo { file_name: first, .. }) = annotations.images.first() else { return Ok(Vec::new()) };
    let there = |step: &StepState| artifacts.get(&step.id).filter(|artifact| !artifact.is_dropped);
    let ports = steps.iter().filter_map(|step| Some((there(step)?, find(&step.kind)?)));
    let folders = ports.flat_map(|(artifact, entry)| {
        entry.outputs.iter().filter(|port| port.kind == Images::KIND).map(move |port| artifact.port(port.name))
    });
    let images = folders.filter_map(|files| Images::open(&files).ok()).find(|images| images.file(first).is_ok());
    let Some(images) = images else { return Ok(Vec::new()) };

    let novel = |id: CategoryId| annotations.category(id).is_some_and(|category| classes.novel.contains(&category.name));
    let by_image = annotations.by_image();
    // Images with most novel objects first, then in ascending id.
    let mut order: Vec<&ImageInfo> = annotations.images.iter().collect();
    order.sort_by_key(|image| {
        let n_novel = by_image.get(&image.id).map_or(0, |objects| objects.iter().filter(|object| novel(object.category_id)).count());
        std::cmp::Reverse(n_novel.min(2))
    });
    order.truncate(MAX_PICTURES);
    // Only the detections on these images are kept in memory.
    let is_shown = |detection: &Detection| order.iter().any(|image| image.id == detection.image_id);
    let mut found = Vec::new();
    for piece in detections.pieces() {
        found.extend(piece?.into_iter().filter(is_shown));
    }
    let picture = |image: &ImageInfo| picture(image, &images, &annotations, &found, &classes);
    order.into_iter().map(picture).collect()
}

fn picture(
    image: &ImageInfo,
    images: &Images,
    annotations: &Annotations,
    detections: &[Detection],
    classes: &ClassSplit,
) -> Result<Picture> {
    let named = |id: CategoryId, xyxy: Xyxy, score: Option<f32>| -> Option<Named> {
        let name = annotations.category(id)?.name.clone();
        Some(Named { xyxy, is_novel: classes.novel.contains(&name), name, score })
    };
    let truth = annotations.annotations.iter().filter(|object| object.image_id == image.id && !object.is_crowd);
    let truth: Vec<Named> = truth.filter_map(|object| named(object.category_id, object.xyxy, None)).collect();
    let mut found: Vec<&Detection> = detections.iter().filter(|detection| detection.image_id == image.id).collect();
    found.sort_by(|a, b| b.score.total_cmp(&a.score));
    let least = found.first().map_or(0.0, |best| 0.5 * best.score);
    // Where detections overlap, only the best one is drawn.
    let mut shown: Vec<&Detection> = Vec::new();
    for detection in found.into_iter().take_while(|detection| detection.score >= least) {
        if shown.len() < MAX_BOXES.min(truth.len() + 1) && shown.iter().all(|better| better.xyxy.iou(&detection.xyxy) < 0.3) {
            shown.push(detection);
        }
    }
    let found = shown.into_iter().filter_map(|detection| named(detection.category_id, detection.xyxy, Some(detection.score))).collect();
    let jpeg = images.file(&image.file_name)?.read()?;
    Ok(Picture { jpeg, width: image.width, height: image.height, truth, found })
}

impl Picture {
    pub(super) fn render(&self, out: &mut String) {
        let Self { width, height, .. } = self;
        let kind = if self.jpeg.starts_with(b"\x89PNG") { "png" } else { "jpeg" };
        put!(
            out,
            "<figure><svg viewBox=\"0 0 {width} {height}\" role=\"img\"><image width=\"{width}\" height=\"{height}\" href=\"data:image/{kind};base64,{}\"/>",
            base64(&self.jpeg)
        );
        let text_px = f64::from(*width.max(height)) / 32.0;
        for (class, boxes) in [("truth", &self.truth), ("found", &self.found)] {
            for Named { xyxy, is_novel, .. } in boxes {
                let novel = if *is_novel { " novel" } else { "" };
                put!(
                    out,
                    "<rect class=\"{class}{novel}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                    xyxy.x1,
                    xyxy.y1,
                    xyxy.width(),
                    xyxy.height()
                );
            }
        }
        for Named { xyxy, name, is_novel, score } in &self.found {
            let (star, novel) = if *is_novel { ("★ ", " novel") } else { ("", "") };
            let label = format!("{star}{name} {:.2}", score.unwrap_or(0.0));
            // Labels stay inside the image.
            let room = f64::from(*width) - 0.64 * text_px * label.chars().count() as f64;
            let (x, y) = (f64::from(xyxy.x1).min(room.max(0.0)).max(0.0), (f64::from(xyxy.y1) - 3.0).max(text_px));
            put!(
                out,
                "<text class=\"label{novel}\" x=\"{x:.1}\" y=\"{y:.1}\" style=\"font-size:{text_px:.1}px\">{}</text>",
                escape(&label)
            );
        }
        let names: Vec<String> =
            self.truth.iter().map(|named| format!("{}{}", if named.is_novel { "★ " } else { "" }, named.name)).collect();
        put!(
            out,
            "</svg><figcaption>Ground truth: {}</figcaption></figure>",
            escape(&if names.is_empty() { "nothing".into() } else { names.join(", ") })
        );
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let number = group.iter().enumerate().fold(0_u32, |number, (place, byte)| number | u32::from(*byte) << (16 - 8 * place));
        for digit in 0..4 {
            let is_filled = digit <= group.len();
            text.push(if is_filled { char::from(DIGITS[(number >> (18 - 6 * digit)) as usize & 63]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    /// The examples of RFC 4648, section 10.
    #[test]
    fn base64_equals_the_rfc() {
        let found = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(found, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }
}
