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
