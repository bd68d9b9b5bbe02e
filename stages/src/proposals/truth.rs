//! `proposals/truth`: annotated objects as proposals.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::{
    annotations::{Annotations, CategoryId},
    classes::ClassSplit,
    proposals::Proposal,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Proposals},
};

/// Annotated objects as proposals with a score of 1, so that `clip/proposals` can embed them.
///
/// Boxes are in the order of the annotations; crowds are left out. Every image has an entry, also one without an object.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Truth {}

const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the objects.");
const CLASSES: In<Classes> = In::optional("classes", "Base and novel class names; objects of other than base classes are then left out.");
const PROPOSALS: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) by image id, score 1.");

impl Stage for Truth {
    const KIND: &'static str = "proposals/truth";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[ANNOTATIONS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROPOSALS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let classes = cx.inputs.read_if_given(CLASSES)?.map(|Classes(classes)| classes);
        let proposals = proposals(&annotations, classes.as_ref())?;
        let [n_images, n_boxes] = [proposals.by_image.len(), proposals.by_image.values().map(Vec::len).sum()];
        let draft = cx.begin(unit)?;
        proposals.write(draft.create(PROPOSALS, "proposals.parquet")?)?;
        cx.tick(n_images as u64);
        cx.commit(draft, [("images".into(), n_images.into()), ("proposals".into(), n_boxes.into())].into())
    }
}

/// The objects of each image; `classes`: only those of its base classes. Fails where the annotations lack a base class.
fn proposals(annotations: &Annotations, classes: Option<&ClassSplit>) -> Result<Proposals> {
    let wanted: Option<BTreeSet<CategoryId>> = classes
        .map(|classes| Ok::<_, crate::Error>(Classes::category_ids(annotations, classes.base.iter())?.into_iter().collect()))
        .transpose()?;
    let mut by_image: BTreeMap<_, Vec<Proposal>> = annotations.images.iter().map(|image| (image.id, Vec::new())).collect();
    for object in annotations.annotations.iter().filter(|object| !object.is_crowd) {
        if wanted.as_ref().is_none_or(|wanted| wanted.contains(&object.category_id))
            && let Some(of_image) = by_image.get_mut(&object.image_id)
        {
            of_image.push(Proposal { xyxy: object.xyxy, score: 1.0 });
        }
    }
    Ok(Proposals { by_image })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn objects_are_proposals_in_the_order_of_the_annotations() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let image = |id: u64| format!(r#"{{"id": {id}, "file_name": "{id}.jpg", "width": 50, "height": 40}}"#);
        let object = |id: u64, category: u64, x: u64, crowd: u64| {
            format!(
                r#"{{"id": {id}, "image_id": 4, "category_id": {category}, "bbox": [{x}, 2, 10, 20], "iscrowd": {crowd}, "area": 200}}"#
            )
        };
        let objects = [object(9, 1, 30, 0), object(2, 2, 5, 0), object(3, 1, 1, 0), object(5, 1, 7, 1)].join(",");
        let categories = r#"{"id": 1, "name": "owl"}, {"id": 2, "name": "wren"}"#;
        write!(file, r#"{{"images": [{}, {}], "annotations": [{objects}], "categories": [{categories}]}}"#, image(4), image(7)).unwrap();
        let annotations = Annotations::load(file.path()).unwrap();
        let lefts = |classes: Option<&ClassSplit>| -> Vec<Vec<f32>> {
            let by_image = proposals(&annotations, classes).unwrap().by_image;
            assert!(by_image.values().flatten().all(|proposal| proposal.score.total_cmp(&1.0).is_eq()));
            by_image.values().map(|of_image| of_image.iter().map(|proposal| proposal.xyxy.x1).collect()).collect()
        };
        let order: Vec<f32> = annotations.annotations.iter().filter(|object| !object.is_crowd).map(|object| object.xyxy.x1).collect();
        assert_eq!(lefts(None), [order.clone(), Vec::new()]);
        let owls = ClassSplit { base: vec!["owl".into()], novel: vec!["wren".into()] };
        assert_eq!(lefts(Some(&owls)), [order.into_iter().filter(|x| (x - 5.0).abs() > 1.0).collect(), Vec::new()]);
        let other = ClassSplit { base: vec!["crane".into()], novel: Vec::new() };
        assert_eq!(proposals(&annotations, Some(&other)).unwrap_err().to_string(), "classes: the annotations have no class `crane`");
    }
}
