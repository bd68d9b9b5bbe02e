//! `proposals/oracle`: the best detections that a set of proposals allows.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::{
    annotations::CategoryId,
    boxes::{Xyxy, nms_by_class},
    evaluate::Detection,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Detections, Proposals, category_names},
};

/// Gives each proposal the class of the object that it overlaps most: the upper bound of what a detector with these proposals can find.
///
/// Proposals that overlap no object are left out, then NMS within each class. The score is the overlap (IoU), so that the box that fits best
/// comes first. Evaluate the result with `eval/coco` or `eval/lvis`. (LP-OVOD, section 8.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Oracle {
    /// The least IoU of a proposal with its object.
    pub min_iou: f32,
    /// NMS removes a box whose IoU with a better one of its class is greater.
    pub nms_iou: f32,
}

impl Default for Oracle {
    fn default() -> Self {
        Self { min_iou: 0.5, nms_iou: 0.5 }
    }
}

const PROPOSALS: In<Proposals> = In::required("proposals", "Boxes (xyxy, px) and scores by image id.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the objects of all classes.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const DETECTIONS: Out<Detections> = Out::new("detections", "Boxes (xyxy, px), categories and overlaps by image, best first.");

impl Stage for Oracle {
    const KIND: &'static str = "proposals/oracle";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[PROPOSALS.info(), ANNOTATIONS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTIONS.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("min_iou", self.min_iou > 0.0 && self.min_iou <= 1.0, "a number above 0, at most 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let ids = Classes::category_ids(&annotations, classes.all())?;
        let proposals = cx.inputs.read(PROPOSALS)?.of_images(&annotations.images)?;
        let by_image = annotations.by_image();
        let (mut detections, mut seen) = (Vec::new(), BTreeSet::new());
        for (image, proposals) in annotations.images.iter().zip(proposals) {
            seen.insert(image.id);
            let labels = by_image.get(&image.id).into_iter().flatten().filter(|label| !label.is_crowd);
            let objects: Vec<(usize, Xyxy)> = labels.filter_map(|label| Some((place_of(&ids, label.category_id)?, label.xyxy))).collect();
            let fits: Vec<Fit> = proposals.iter().filter_map(|proposal| self.fit(proposal.xyxy, &objects)).collect();
            let boxes: Vec<Xyxy> = fits.iter().map(|fit| fit.xyxy).collect();
            let overlaps: Vec<f32> = fits.iter().map(|fit| fit.overlap).collect();
            let classes: Vec<u32> = fits.iter().map(|fit| fit.class as u32).collect();
            let kept = nms_by_class(&boxes, &overlaps, &classes, self.nms_iou);
            detections.extend(kept.into_iter().map(|place| Detection {
                image_id: image.id,
                category_id: ids[fits[place].class],
                xyxy: fits[place].xyxy,
                score: fits[place].overlap,
                mask: None,
            }));
        }
        let categories: BTreeMap<CategoryId, String> = category_names(&annotations, &ids);
        let draft = cx.begin(unit)?;
        Detections::write(&detections, &seen, &categories, draft.create(DETECTIONS, "detections.parquet")?)?;
        cx.tick(seen.len() as u64);
        cx.commit(draft, [("images".into(), seen.len().into()), ("detections".into(), detections.len().into())].into())
    }
}

/// A proposal with the object that it overlaps most.
struct Fit {
    xyxy: Xyxy,
    class: usize,
    overlap: f32,
}

impl Oracle {
    /// The object, of some with their classes, that a box overlaps most, the first of equals; `None` if it overlaps none enough.
    fn fit(&self, xyxy: Xyxy, objects: &[(usize, Xyxy)]) -> Option<Fit> {
        let overlaps = objects.iter().rev().map(|(class, object)| Fit { xyxy, class: *class, overlap: xyxy.iou(object) });
        overlaps.max_by(|one, other| one.overlap.total_cmp(&other.overlap)).filter(|fit| fit.overlap >= self.min_iou)
    }
}

fn place_of(ids: &[CategoryId], id: CategoryId) -> Option<usize> {
    ids.iter().position(|other| *other == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_gets_the_class_of_the_object_that_it_overlaps_most() {
        let xyxy = |x1: f32| Xyxy { x1, y1: 0.0, x2: x1 + 10.0, y2: 10.0 };
        let objects = [(3, xyxy(0.0)), (5, xyxy(4.0)), (6, xyxy(4.0))];
        let fit = |x1: f32| Oracle::default().fit(xyxy(x1), &objects).map(|fit| fit.class);
        // Of two objects in one place the first.
        assert_eq!([fit(0.0), fit(1.0), fit(3.0), fit(4.0), fit(9.0)], [Some(3), Some(3), Some(5), Some(5), None]);
    }
}
