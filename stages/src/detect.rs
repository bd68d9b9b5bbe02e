//! `detect/zero-shot`: region features against class embeddings.

use std::collections::BTreeSet;

use ovenbird_data::{annotations::CategoryId, boxes::nms_by_class, evaluate::Detection};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Detections, Prompts, RegionFeatures, Regions, category_names},
    clip::space,
};

/// Detection without a detector: each proposal gets the class with the most similar text embedding.
///
/// Class probability = softmax of cosines / temperature over all classes; score = probability^(1 - w) * objectness^w with w =
/// `objectness_weight`. Then NMS within each class, and the best `max_per_image`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ZeroShot {
    /// Divides cosines before the softmax; CLIP's own is 0.01.
    pub temperature: f64,
    /// The weight w of objectness in the score, from 0 to 1.
    pub objectness_weight: f64,
    /// Detections with this score or less are dropped.
    pub score_threshold: f32,
    /// NMS removes a box whose IoU with a better-scored box of its class is greater.
    pub nms_iou: f32,
    /// The most detections per image, best first.
    pub max_per_image: usize,
    /// Accept embeddings of two CLIPs, which is refused otherwise: cosines between them mean nothing, unless both share one space.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mixed_clips: bool,
}

impl Default for ZeroShot {
    fn default() -> Self {
        Self { temperature: 0.01, objectness_weight: 0.5, score_threshold: 0.01, nms_iou: 0.5, max_per_image: 300, mixed_clips: false }
    }
}

const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of proposals.");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json of the same images; category ids come from it.");
const DETECTIONS: Out<Detections> = Out::new("detections", "Boxes (xyxy, px), categories and scores by image, best first.");

impl Stage for ZeroShot {
    const KIND: &'static str = "detect/zero-shot";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), PROMPTS.info(), CLASSES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTIONS.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("temperature", self.temperature > 0.0 && self.temperature.is_finite(), "a number above 0"),
            ("objectness_weight", (0.0..=1.0).contains(&self.objectness_weight), "a number from 0 to 1"),
            ("score_threshold", (0.0..1.0).contains(&self.score_threshold), "a number from 0 to below 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
        let ids = Classes::category_ids(&annotations, classes.all())?;
        let names: Vec<String> = classes.all().cloned().collect();
        let (features, prompts) = (cx.inputs.read(FEATURES)?, cx.inputs.read(PROMPTS)?);
        space::common_unless(self.mixed_clips, &[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        let prompts = prompts.select(&names)?;
        cx.total(annotations.images.len() as u64);
        let (mut detections, mut looked_at) = (Vec::new(), BTreeSet::new());
        for regions in features.rows() {
            cx.proceed()?;
            let regions = regions?;
            looked_at.insert(regions.image_id);
            detections.extend(self.detect(&regions, &prompts, &ids)?);
            cx.tick(1);
        }
        let n_detections = detections.len();
        let draft = cx.begin(unit)?;
        let file = draft.create(DETECTIONS, "detections.parquet")?;
        Detections::write(&detections, &looked_at, &category_names(&annotations, &ids), file)?;
        cx.commit(draft, [("detections".into(), n_detections.into())].into())
    }
}

impl ZeroShot {
    fn detect(&self, regions: &Regions, prompts: &Tensor, ids: &[CategoryId]) -> Result<Vec<Detection>> {
        let n_regions = regions.boxes.len();
        if n_regions == 0 {
            return Ok(Vec::new());
        }
        let (dim, expected) = (regions.embeddings.len() / n_regions, prompts.size()[1] as usize);
        if dim != expected {
            return Err(Error::Input {
                port: "prompts",
                problem: format!("class embeddings have {expected} numbers, region embeddings {dim}"),
                hint: "make the prompts and the features with the same CLIP".into(),
            });
        }
        let embeddings = Tensor::from_slice(&regions.embeddings).view([n_regions as i64, dim as i64]);
        // [N, K]
        let probabilities = (embeddings.matmul(&prompts.tr()) / self.temperature).softmax(-1, Kind::Float).contiguous();
        let mut flat = vec![0.0_f32; probabilities.numel()];
        probabilities.copy_data(&mut flat, probabilities.numel());
        let (mut boxes, mut scores, mut classes) = (Vec::new(), Vec::new(), Vec::new());
        for (region, of_region) in flat.chunks_exact(ids.len()).enumerate() {
            let objectness = f64::from(regions.objectness[region]).max(0.0).powf(self.objectness_weight);
            for (class, probability) in of_region.iter().enumerate() {
                let score = (f64::from(*probability).powf(1.0 - self.objectness_weight) * objectness) as f32;
                if score > self.score_threshold {
                    boxes.push(regions.boxes[region]);
                    scores.push(score);
                    classes.push(class as u32);
                }
            }
        }
        let kept = nms_by_class(&boxes, &scores, &classes, self.nms_iou);
        let detection = |kept: usize| Detection {
            image_id: regions.image_id,
            category_id: ids[classes[kept] as usize],
            xyxy: boxes[kept],
            score: scores[kept],
            mask: None,
        };
        Ok(kept.into_iter().take(self.max_per_image).map(detection).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ovenbird_data::{
        annotations::{Annotation, Annotations},
        boxes::Xyxy,
        classes::ClassSplit,
        evaluate::{Evaluator, IouType, Metric, Protocol},
    };
    use ovenbird_models::to_unit_length;

    use super::*;
    use crate::golden::{cora, cora_regions, numbers};

    /// The measure of a region prompt by CORA's code, through its own evaluator: annotated boxes, cut off at the borders of four images, as detections of every
    /// class.
    #[test]
    fn annotated_boxes_are_named_as_by_cora_s_code() {
        let (golden, relabel) = (cora("prompt_eval"), cora("relabel"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/relabel/input.json");
        let annotations = Annotations::load(&path).unwrap();
        // Novel is 5 alone, by the list in CORA's code.
        let classes = ClassSplit { base: ["cat", "dog", "tie"].map(String::from).into(), novel: vec!["bus".into()] };
        let in_order: Vec<CategoryId> = numbers(&relabel["vocabulary_ids"]).into_iter().map(|id| CategoryId(id as u64)).collect();
        let stage = ZeroShot { objectness_weight: 0.0, score_threshold: 0.0, nms_iou: 1.0, max_per_image: 100, ..ZeroShot::default() };
        let mut evaluator = Evaluator::new(Protocol::Coco, IouType::Boxes, &annotations, &classes).unwrap();
        for image in &annotations.images {
            let size = [image.width, image.height];
            let of_image = |object: &&Annotation| object.image_id == image.id && !object.is_crowd;
            let boxes = annotations.annotations.iter().filter(of_image).map(|object| object.xyxy.clipped(size));
            let boxes: Vec<Xyxy> = boxes.filter(|xyxy| xyxy.area() > 0.0).collect();
            let regions = cora_regions(image.id, &boxes, Some(&relabel["table"]));
            let found = stage.detect(&regions, &to_unit_length(&relabel["text"]), &in_order).unwrap();
            let of = |name: &str| numbers(&golden[&format!("image{}.{name}", image.id)]);
            let (scores, labels, corners) = (of("scores"), of("labels"), of("boxes"));
            assert_eq!(found.len(), scores.len(), "image {}", image.id);
            // The best first, here as there; scores differ by 3e-3 at least, or are of one box.
            let mut found: Vec<&Detection> = found.iter().collect();
            found.sort_by(|one, other| other.score.total_cmp(&one.score));
            for (place, found) in found.into_iter().enumerate() {
                assert!((f64::from(found.score) - scores[place]).abs() < 1e-4, "image {}: {} {}", image.id, found.score, scores[place]);
                assert_eq!(found.category_id, in_order[labels[place] as usize]);
                let Xyxy { x1, y1, x2, y2 } = found.xyxy;
                let apart = [x1, y1, x2, y2].into_iter().zip(&corners[4 * place..]).map(|(one, other)| (f64::from(one) - other).abs());
                assert!(apart.fold(0.0, f64::max) < 1e-4, "image {}: {:?}", image.id, found.xyxy);
            }
            evaluator.judge(&stage.detect(&regions, &to_unit_length(&relabel["text"]), &in_order).unwrap()).unwrap();
        }
        let groups = evaluator.finish(None).unwrap().groups;
        let names =
            ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"];
        let ours = names.map(|name| groups["all"].get(Metric::named(name).unwrap()).unwrap_or(-1.0)).into_iter();
        let ours = ours.chain(["base", "novel"].map(|group| 100.0 * groups[group].get(Metric::AP50).unwrap()));
        for ((place, found), expected) in ours.enumerate().zip(numbers(&golden["stats"])) {
            assert!((found - expected).abs() < 1e-4, "{place}: {found} {expected}");
        }
    }
}
