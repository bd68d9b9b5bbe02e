//! Queries of a localizer, drawn: the anchor with the class that CLIP gave it, and the box that it became.

use std::{collections::BTreeMap, fmt::Write as _};

use ovenbird_cache::Artifact;
use ovenbird_data::annotations::{Annotations, ImageId};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{AnnotationFile, Images, Queries, Query},
};

use super::{
    gallery,
    html::{escape, put},
    origins::Origins,
    page::Section,
    picture::{Boxed, Picture, Role},
};
use crate::{error::Result, pipeline::step_id::StepId};

/// Images that are shown, and queries of each.
const N_IMAGES: usize = 6;
const PER_IMAGE: usize = 5;

/// Queries of a step.
pub(super) struct Drawn {
    step: StepId,
    notes: Vec<String>,
    pictures: Vec<Picture>,
}

/// The queries of each step of a run that has some.
pub(super) fn drawn(origins: &Origins<'_>) -> Vec<Result<Drawn>> {
    let found = origins.outputs_of_kind(Queries::KIND).into_iter();
    found.filter_map(|(step, artifact, port)| of_step(step, artifact, port, origins).transpose()).collect()
}

/// `None` where an input is not there any more.
fn of_step(step: &StepId, artifact: &Artifact, port: &str, origins: &Origins<'_>) -> Result<Option<Drawn>> {
    let Some(annotations) = origins.files(step, "annotations")? else { return Ok(None) };
    let annotations = AnnotationFile::open(&annotations)?.load_categories()?;
    let Queries(all) = Queries::open(&artifact.port(port))?;
    let mut by_image: BTreeMap<ImageId, Vec<Query>> = BTreeMap::new();
    for query in all {
        by_image.entry(query.image_id).or_default().push(query);
    }
    // Those with the surest queries.
    let sureness = |queries: &[Query]| queries.first().map_or(0.0, |query| query.objectness);
    let mut chosen: Vec<(ImageId, Vec<Query>)> = by_image.into_iter().collect();
    chosen.sort_by(|(_, one), (_, other)| sureness(other).total_cmp(&sureness(one)));
    let mut notes = Vec::new();
    let images = gallery::images(step, &annotations, origins, &mut notes);
    let picture = |(image, queries): &(ImageId, Vec<Query>)| picture(*image, queries, &annotations, images.as_ref());
    let pictures = chosen.iter().take(N_IMAGES).filter_map(picture).collect();
    Ok(Some(Drawn { step: step.clone(), notes, pictures }))
}

fn picture(id: ImageId, queries: &[Query], annotations: &Annotations, images: Option<&Result<Images, String>>) -> Option<Picture> {
    let info = annotations.image(id)?;
    let size = [info.width, info.height];
    let jpeg = gallery::pictured(images, Some(info), gallery::jpeg);
    let mut boxes = Vec::new();
    for Query { class, xyxy, objectness, .. } in queries.iter().take(PER_IMAGE) {
        let role = Role::Detection { score: *objectness, is_right: None };
        boxes.push(Boxed { xyxy: xyxy.clipped(size), class: 0, name: class.clone(), is_novel: false, role });
    }
    for Query { class, anchor, .. } in queries.iter().take(PER_IMAGE) {
        let role = Role::Object { is_found: true };
        boxes.push(Boxed { xyxy: anchor.clipped(size), class: 0, name: class.clone(), is_novel: false, role });
    }
    Some(Picture { file_name: info.file_name.clone(), id, size, jpeg, boxes, words: String::new() })
}

impl Section for Drawn {
    fn part(&self) -> String {
        format!("{}.queries", self.step)
    }

    fn render(&self, out: &mut String) {
        put!(out, "<section><h2>{}: queries</h2>", escape(&self.step.to_string()));
        self.notes.iter().for_each(|note| put!(out, "<p class=\"quiet\">{}</p>", escape(note)));
        put!(
            out,
            "<p class=\"quiet\">The {PER_IMAGE} surest queries of {} images. Dashed: the anchor, which CLIP gave a class. Solid: the box that it became, with that class and \
             the query's objectness; detections are named once more.</p><div class=\"gallery\">",
            self.pictures.len()
        );
        self.pictures.iter().for_each(|picture| picture.render(out));
        out.push_str("</div></section>");
    }
}
