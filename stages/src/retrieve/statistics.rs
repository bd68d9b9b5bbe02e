//! `retrieve/statistics`: what a file of retrieved boxes holds, in numbers.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId},
    boxes::{Xyxy, xywh_to_xyxy},
    json,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Artifact, Context, In, Out, PortInfo, Result, Stage, Unit, artifacts::AnnotationFile, error::malformed, ports::only_file};

/// The numbers of a file of retrieved boxes, ours or LP-OVOD's: counts, cosines, objectness, areas and overlaps.
///
/// Compare your pseudo labels with those that LP-OVOD ships, or with those of other parameters. The numbers are those of LP-OVOD's
/// specification, section 6.4.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Statistics {}

const LABELS: In<AnnotationFile> = In::required("annotations", "COCO json whose annotations have `score` and `cosine` (`retrieve/boxes`).");
const NUMBERS: Out<StatisticsFile> = Out::new("statistics", "The numbers, json.");

/// The numbers of a file of retrieved boxes.
#[derive(Debug, Clone)]
pub struct StatisticsFile(pub Numbers);

impl Artifact for StatisticsFile {
    const KIND: &'static str = "statistics";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the numbers that `retrieve/statistics` wrote";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = only_file(Self::KIND, files)?;
        json::parse(&file.read()?).map(Self).map_err(|fault| malformed(&file.path, fault.to_string()))
    }
}

/// The fields that are read besides those of every annotation file.
#[derive(Deserialize)]
struct Scored {
    annotations: Vec<Score>,
}

#[derive(Deserialize)]
struct Score {
    /// Objectness.
    score: f64,
    cosine: f64,
}

/// The least, the mean and the greatest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// The least.
    pub min: f64,
    /// The mean.
    pub mean: f64,
    /// The greatest.
    pub max: f64,
}

/// The numbers of a class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OfClass {
    /// Boxes.
    pub boxes: usize,
    /// Images with one.
    pub images: usize,
    /// The cosine of the first box.
    pub first_cosine: f64,
    /// The cosine of the last box.
    pub last_cosine: f64,
}

/// The numbers of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// The file's size.
    pub bytes: u64,
    /// Boxes.
    pub boxes: usize,
    /// Images with a box.
    pub images: usize,
    /// Pairs of an image and a class that it has a box of.
    pub image_class_pairs: usize,
    /// By class, of those with a box.
    pub classes: BTreeMap<String, OfClass>,
    /// Whether cosines fall within every class, without equals.
    pub is_strictly_sorted: bool,
    /// Of all boxes.
    pub cosine: Option<Range>,
    /// Of all boxes.
    pub objectness: Option<Range>,
    /// Of all boxes, px².
    pub area: Option<Range>,
    /// The most boxes of one class in one image.
    pub max_boxes_of_a_class_in_an_image: usize,
    /// Pairs of boxes of one class in one image.
    pub pairs: usize,
    /// Those with an IoU above 0.5.
    pub pairs_above_half: usize,
    /// The greatest IoU of a pair.
    pub max_iou: f32,
    /// Boxes that leave their image.
    pub boxes_outside: usize,
}

impl Stage for Statistics {
    const KIND: &'static str = "retrieve/statistics";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[LABELS.info()];
    const OUTPUTS: &'static [PortInfo] = &[NUMBERS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let AnnotationFile { file } = cx.inputs.read(LABELS)?;
        let bytes = file.read()?;
        let labels = Annotations::parse(&bytes, &file.path)?;
        let Scored { annotations } = json::parse(&bytes).map_err(|fault| {
            let hint = Some("give a file of retrieved boxes: each annotation has `score`, the objectness, and `cosine`".into());
            ovenbird_data::Error::Malformed { path: file.path.clone(), problem: fault.to_string(), hint }
        })?;
        let numbers = numbers(&labels, &annotations, bytes.len() as u64);
        for (class, of_class) in &numbers.classes {
            let OfClass { boxes, images, first_cosine, last_cosine } = of_class;
            cx.note(format!("{class}: {boxes} boxes in {images} images, cosine {first_cosine:.4} to {last_cosine:.4}"));
        }
        let Numbers { boxes, images, image_class_pairs, pairs_above_half, max_iou, .. } = &numbers;
        cx.note(format!(
            "{boxes} boxes in {images} images, {image_class_pairs} pairs of an image and a class; {pairs_above_half} pairs of boxes overlap by more than \
             0.5, none by more than {max_iou:.5}"
        ));
        let draft = cx.begin(unit)?;
        draft.write(NUMBERS, "statistics.json", &serde_json::to_vec_pretty(&numbers).expect("BUG: numbers are plain JSON"))?;
        cx.tick(1);
        cx.commit(draft, [("boxes".into(), (*boxes).into()), ("images".into(), (*images).into())].into())
    }
}

/// `scores`: of the annotations, in the file's order.
fn numbers(labels: &Annotations, scores: &[Score], bytes: u64) -> Numbers {
    let mut by_class: BTreeMap<CategoryId, Vec<usize>> = BTreeMap::new();
    let mut by_pair: BTreeMap<(ImageId, CategoryId), Vec<Xyxy>> = BTreeMap::new();
    let mut boxes_outside = 0;
    for (place, label) in labels.annotations.iter().enumerate() {
        let xyxy = xywh_to_xyxy(label.bbox);
        by_class.entry(label.category_id).or_default().push(place);
        by_pair.entry((label.image_id, label.category_id)).or_default().push(xyxy);
        let is_inside = labels.image(label.image_id).is_some_and(|image| {
            xyxy.x1 >= 0.0 && xyxy.y1 >= 0.0 && xyxy.x2 <= image.width as f32 + 1e-3 && xyxy.y2 <= image.height as f32 + 1e-3
        });
        boxes_outside += usize::from(!is_inside);
    }
    let cosine = |place: usize| scores[place].cosine;
    let of_class = |places: &Vec<usize>| OfClass {
        boxes: places.len(),
        images: places.iter().map(|place| labels.annotations[*place].image_id).collect::<BTreeSet<ImageId>>().len(),
        first_cosine: cosine(places[0]),
        last_cosine: cosine(places[places.len() - 1]),
    };
    let name = |id: &CategoryId| labels.category(*id).map_or_else(|| id.to_string(), |category| category.name.clone());
    let overlaps: Vec<f32> = by_pair
        .values()
        .flat_map(|boxes| (0..boxes.len()).flat_map(move |place| boxes[..place].iter().map(move |other| boxes[place].iou(other))))
        .collect();
    Numbers {
        bytes,
        boxes: labels.annotations.len(),
        images: labels.annotations.iter().map(|label| label.image_id).collect::<BTreeSet<ImageId>>().len(),
        image_class_pairs: by_pair.len(),
        is_strictly_sorted: by_class.values().all(|places| places.windows(2).all(|pair| cosine(pair[0]) > cosine(pair[1]))),
        classes: by_class.iter().map(|(id, places)| (name(id), of_class(places))).collect(),
        cosine: range(scores.iter().map(|score| score.cosine)),
        objectness: range(scores.iter().map(|score| score.score)),
        area: range(labels.annotations.iter().map(|label| label.bbox[2] * label.bbox[3])),
        max_boxes_of_a_class_in_an_image: by_pair.values().map(Vec::len).max().unwrap_or(0),
        pairs: overlaps.len(),
        pairs_above_half: overlaps.iter().filter(|overlap| **overlap > 0.5).count(),
        max_iou: overlaps.into_iter().fold(0.0, f32::max),
        boxes_outside,
    }
}

fn range(numbers: impl Iterator<Item = f64> + Clone) -> Option<Range> {
    let n = numbers.clone().count();
    let (min, max) = numbers.clone().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), number| (min.min(number), max.max(number)));
    (n > 0).then(|| Range { min, mean: numbers.sum::<f64>() / n as f64, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_file_are_counted() {
        let label = |id: u64, image: u64, category: u64, bbox: [f64; 4], cosine: f64| serde_json::json!({"id": id, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0, "score": 0.5 + cosine, "cosine": cosine});
        let file = serde_json::json!({
            "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}, {"id": 2, "file_name": "b.jpg", "width": 100, "height": 50}],
            "categories": [{"id": 6, "name": "bus"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
            "annotations": [
                label(1, 1, 6, [0.0, 0.0, 10.0, 10.0], 0.375), label(2, 1, 6, [0.0, 2.5, 10.0, 10.0], 0.25), label(3, 2, 6, [0.0, 0.0, 100.0, 50.0], 0.125),
                label(4, 1, 17, [95.0, 0.0, 10.0, 10.0], 0.25),
            ],
        });
        let bytes = serde_json::to_vec(&file).unwrap();
        let labels = Annotations::parse(&bytes, "l.json".as_ref()).unwrap();
        let Scored { annotations } = json::parse(&bytes).unwrap();
        let found = numbers(&labels, &annotations, bytes.len() as u64);
        assert_eq!((found.boxes, found.images, found.image_class_pairs, found.boxes_outside), (4, 2, 3, 1));
        assert_eq!((found.max_boxes_of_a_class_in_an_image, found.pairs, found.pairs_above_half), (2, 1, 1));
        assert!(found.is_strictly_sorted && (found.max_iou - 0.6).abs() < 1e-6);
        assert_eq!(found.classes["bus"], OfClass { boxes: 3, images: 2, first_cosine: 0.375, last_cosine: 0.125 });
        assert_eq!(found.cosine, Some(Range { min: 0.125, mean: 0.25, max: 0.375 }));
        assert_eq!(found.area.map(|area| area.max), Some(5000.0));
        assert!(!found.classes.contains_key("dog"));
    }
}
