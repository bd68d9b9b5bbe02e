//! Labels in the formats of COCO and LVIS v1.

use hotcoco::{Rle, mask};
use serde_json::{Value, json};

use super::{Dice, Labels, category_id, classes, paint::Mask, to_json};
use crate::boxes::{Xyxy, xywh_to_xyxy, xyxy_to_xywh};

/// Where and how large something is.
pub(super) struct Label {
    pub(super) xyxy: Xyxy,
    pub(super) area: f64,
    pub(super) segmentation: Value,
}

/// A label whose mask is a polygon.
pub(super) fn from_polygon(polygon: &[f64], width: usize, height: usize) -> Label {
    let rle = mask::fr_poly(polygon, height as u32, width as u32).expect("BUG: an outline has at least three corners");
    let axis = |first: usize| polygon.iter().copied().skip(first).step_by(2);
    let (low, high) = (|first| axis(first).fold(f64::MAX, f64::min), |first| axis(first).fold(f64::MIN, f64::max));
    let xyxy = xywh_to_xyxy([low(0), low(1), high(0) - low(0), high(1) - low(1)]);
    Label { xyxy, area: mask::area(&rle) as f64, segmentation: json!([polygon]) }
}

/// A label whose mask is run lengths.
pub(super) fn from_mask(covered: &Mask) -> Label {
    let rle = encode(covered);
    let xyxy = xywh_to_xyxy(mask::to_bbox(&rle));
    let segmentation = json!({"size": [covered.height, covered.width], "counts": mask::rle_to_string(&rle)});
    Label { xyxy, area: mask::area(&rle) as f64, segmentation }
}

fn encode(covered: &Mask) -> Rle {
    let column = |x: usize| (0..covered.height).map(move |y| u8::from(covered.covered[y * covered.width + x]));
    let columns: Vec<u8> = (0..covered.width).flat_map(column).collect();
    mask::encode(&columns, covered.height as u32, covered.width as u32).expect("BUG: one value a pixel")
}

fn annotations(scenes: &[Labels]) -> Vec<Value> {
    let objects = scenes.iter().flat_map(|scene| scene.objects.iter().map(move |object| (scene.id, object)));
    let annotation = |(place, (image, object)): (usize, (u64, &super::Object))| {
        json!({
            "id": place + 1,
            "image_id": image,
            "category_id": category_id(object.class),
            "bbox": xyxy_to_xywh(&object.xyxy),
            "area": object.area,
            "iscrowd": u8::from(object.is_crowd),
            "segmentation": object.segmentation,
        })
    };
    objects.enumerate().map(annotation).collect()
}

pub(super) fn coco_json(scenes: &[Labels]) -> Vec<u8> {
    let image = |scene: &Labels| json!({"id": scene.id, "file_name": scene.file_name, "width": scene.width, "height": scene.height});
    let category = |(place, name): (usize, &String)| {
        let shape = name.rsplit(' ').next();
        json!({"id": category_id(place), "name": name, "supercategory": shape})
    };
    to_json(&json!({
        "info": {"description": "Ovenbird toy world"},
        "images": scenes.iter().map(image).collect::<Vec<_>>(),
        "annotations": annotations(scenes),
        "categories": classes().all().enumerate().map(category).collect::<Vec<_>>(),
    }))
}

pub(super) fn lvis_json(seed: u64, scenes: &[Labels]) -> Vec<u8> {
    let split = classes();
    let n_classes = split.base.len() + split.novel.len();
    let image = |scene: &Labels| {
        let mut dice = Dice::new(seed, 9, scene.id as usize);
        let is_present = |class: &usize| scene.objects.iter().any(|object| object.class == *class);
        let absent: Vec<usize> = (0..n_classes).filter(|class| !is_present(class)).collect();
        let mut negative: Vec<u64> = (0..12).map(|_| category_id(*dice.pick(&absent))).collect();
        negative.sort_unstable();
        negative.dedup();
        let crowds = scene.objects.iter().filter(|object| object.is_crowd).map(|object| category_id(object.class));
        json!({
            "id": scene.id,
            "coco_url": format!("http://images.cocodataset.org/{}", scene.file_name),
            "width": scene.width,
            "height": scene.height,
            "neg_category_ids": negative,
            "not_exhaustive_category_ids": crowds.collect::<Vec<u64>>(),
        })
    };
    let count = |class: usize| {
        let of_class = |scene: &&Labels| scene.objects.iter().any(|object| object.class == class && !object.is_crowd);
        let instances = scenes.iter().flat_map(|scene| &scene.objects).filter(|object| object.class == class && !object.is_crowd);
        (scenes.iter().filter(of_class).count(), instances.count())
    };
    let category = |(place, name): (usize, &String)| {
        let frequency = match place {
            place if place >= split.base.len() => "r",
            place if place % 2 == 0 => "c",
            _ => "f",
        };
        let (images, instances) = count(place);
        json!({
            "id": category_id(place),
            "name": name,
            "frequency": frequency,
            "synset": format!("{}.n.01", name.replace(' ', "_")),
            "synonyms": [name],
            "def": format!("a {name} of the toy world"),
            "image_count": images,
            "instance_count": instances,
        })
    };
    // LVIS has no crowds: their classes are listed as not exhaustively annotated instead.
    let is_object = |annotation: &Value| annotation["iscrowd"] == 0;
    let without_crowd = |mut annotation: Value| {
        if let Some(fields) = annotation.as_object_mut() {
            fields.remove("iscrowd");
        }
        annotation
    };
    let annotations: Vec<Value> = annotations(scenes).into_iter().filter(is_object).map(without_crowd).collect();
    to_json(&json!({
        "info": {"description": "Ovenbird toy world"},
        "images": scenes.iter().map(image).collect::<Vec<_>>(),
        "annotations": annotations,
        "categories": split.all().enumerate().map(category).collect::<Vec<_>>(),
    }))
}
