//! `detect/zero-shot`, `eval/coco` and `eval/lvis`: region features against class embeddings, and how good that is.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::{
    annotations::{Annotations, CategoryId},
    boxes::nms_by_class,
    evaluate::{Detection, Evaluator, Metric, Shape},
    warnings::of_boxes,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Detections, EvaluationFile, Prompts, RegionFeatures, Regions},
    clip::space,
};

/// Detection without a detector: every proposal gets the class whose text is nearest.
///
/// Class probability = softmax of cosines / temperature over all classes; score = probability^(1 - w) * objectness^w with w =
/// `objectness_weight`. Then NMS within each class, and the best `max_per_image`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ZeroShot {
    /// Divides cosines before the softmax; CLIP's own is 0.01.
    pub temperature: f64,
    /// How much objectness counts, in [0, 1].
    pub objectness_weight: f64,
    /// Detections below are dropped.
    pub score_threshold: f32,
    /// A box falls when it overlaps a better one of its class by more.
    pub nms_iou: f32,
    /// Detections kept an image.
    pub max_per_image: usize,
}

impl Default for ZeroShot {
    fn default() -> Self {
        Self { temperature: 0.01, objectness_weight: 0.5, score_threshold: 0.01, nms_iou: 0.5, max_per_image: 300 }
    }
}

const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of proposals.");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "The labels of the same images: category ids are taken from there.");
const DETECTIONS: Out<Detections> = Out::new("detections", "Boxes (xyxy, px), categories and scores by image, best first.");
const EVALUATION: Out<EvaluationFile> =
    Out::new("evaluation", "AP and AR of all, base and novel classes, of every class, PR curves, and warnings.");

/// Category ids of some classes, by name.
pub(crate) fn category_ids<'a>(annotations: &Annotations, classes: impl Iterator<Item = &'a String>) -> Result<Vec<CategoryId>> {
    let id = |name: &String| {
        let found = annotations.categories.iter().find(|category| category.name == *name);
        found.map(|category| category.id).ok_or_else(|| Error::Input {
            port: "classes",
            problem: format!("the annotations have no class `{name}`"),
            hint: "use the classes and the annotations of the same split".into(),
        })
    };
    classes.map(id).collect()
}

/// The names of some categories.
pub(crate) fn category_names(annotations: &Annotations, ids: &[CategoryId]) -> BTreeMap<CategoryId, String> {
    ids.iter().filter_map(|id| Some((*id, annotations.category(*id)?.name.clone()))).collect()
}

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
        let ids = category_ids(&annotations, classes.all())?;
        let names: Vec<String> = classes.all().cloned().collect();
        let (features, prompts) = (cx.inputs.read(FEATURES)?, cx.inputs.read(PROMPTS)?);
        space::common(&[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
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

const FOUND: In<Detections> = In::required("detections", "Detections in the same images.");

/// What of an object has to lie in the right place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Of {
    /// Its box.
    #[default]
    Boxes,
    /// Its pixels: detections need masks, and annotations a `segmentation`. Sizes are those of masks.
    Masks,
}

impl Of {
    fn is_boxes(&self) -> bool {
        *self == Self::Boxes
    }
}

/// COCO evaluation of boxes or masks: all, base and novel classes by slices of one accumulation.
///
/// AP over at most 100 detections an image; AP50, AP75, sizes and AR over at most 1,000. All classes compete. (pycocotools;
/// OADP, section 6.6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Coco {
    /// What of an object has to lie in the right place.
    // A default that is not written has to be spelled out for the schema.
    #[serde(default, skip_serializing_if = "Of::is_boxes")]
    #[schemars(extend("default" = "boxes"))]
    pub iou_type: Of,
}

/// LVIS evaluation of boxes or masks: federated, 300 detections an image; APr, APc, APf and novel / base.
///
/// Images say which classes are absent for certain and which are not labelled exhaustively; everything else is not judged.
/// (lvis-api 0.5.3.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lvis {
    /// What of an object has to lie in the right place.
    // A default that is not written has to be spelled out for the schema.
    #[serde(default, skip_serializing_if = "Of::is_boxes")]
    #[schemars(extend("default" = "boxes"))]
    pub iou_type: Of,
}

const EVAL_INPUTS: &[PortInfo] = &[ANNOTATIONS.info(), FOUND.info(), CLASSES.info()];

impl Stage for Coco {
    const KIND: &'static str = "eval/coco";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = EVAL_INPUTS;
    const OUTPUTS: &'static [PortInfo] = &[EVALUATION.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        evaluate(units, cx, Metric::Coco, self.iou_type)
    }
}

impl Stage for Lvis {
    const KIND: &'static str = "eval/lvis";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = EVAL_INPUTS;
    const OUTPUTS: &'static [PortInfo] = &[EVALUATION.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        evaluate(units, cx, Metric::Lvis, self.iou_type)
    }
}

fn evaluate(units: &[Unit], cx: &Context<'_>, metric: Metric, of: Of) -> Result<()> {
    let [unit] = units else { return Ok(()) };
    let Classes(classes) = cx.inputs.read(CLASSES)?;
    let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
    let shape = match of {
        Of::Boxes => Shape::Boxes,
        Of::Masks => Shape::Masks,
    };
    let port = |port: &'static str, hint: &'static str| move |problem: String| Error::Input { port, problem, hint: hint.into() };
    let hint = match of {
        Of::Boxes => "use the classes and the annotations of the same split",
        Of::Masks => "masks need annotations with the outlines of all objects; otherwise evaluate `iou_type: boxes`",
    };
    let mut evaluator = Evaluator::new(metric, shape, &annotations, &classes).map_err(port("annotations", hint))?;
    let hint = match of {
        Of::Boxes => "evaluate detections against the annotations they were made for",
        Of::Masks => {
            "evaluate detections of a `detector/test` whose detector has a mask head, against the annotations they were made for; \
             otherwise evaluate `iou_type: boxes`"
        }
    };
    cx.total(annotations.images.len() as u64);
    let table = cx.inputs.read(FOUND)?;
    for (id, name) in table.categories()?.into_iter().flatten() {
        if let Some(category) = annotations.category(id).filter(|category| category.name != name) {
            let problem = format!("category {id} is `{name}`, but `{}` in the annotations", category.name);
            return Err(port("detections", "evaluate detections against the annotations they were made for")(problem));
        }
    }
    let (mut n_judged, mut n_stray) = (0, 0);
    for detections in table.pieces() {
        let mut detections = detections?;
        let n_found = detections.len();
        detections.retain(|detection| annotations.image(detection.image_id).is_some());
        n_stray += n_found - detections.len();
        n_judged += detections.len();
        evaluator.judge(&detections).map_err(port("detections", hint))?;
        cx.proceed()?;
    }
    if let Some(words) = evaluator.remarks().map_err(port("detections", hint))? {
        cx.note(words);
    }
    if let Some(words) = of_boxes(&annotations) {
        cx.note(words);
    }
    if n_judged == 0 && n_stray > 0 {
        return Err(Error::Input {
            port: "detections",
            problem: format!("none of {n_stray} is in an image of the annotations"),
            hint: "evaluate detections against annotations of the same images".into(),
        });
    }
    if n_stray > 0 {
        cx.note(format!("{n_stray} detections in images that the annotations leave out are not judged"));
    }
    let evaluation = evaluator.finish(table.looked_at()?.as_ref()).map_err(port("detections", hint))?;
    let metrics = evaluation.groups.iter().map(|(group, summary)| (format!("{group}.ap50"), summary.ap50.into()));
    let metrics = metrics.collect();
    let draft = cx.begin(unit)?;
    draft.write(EVALUATION, "evaluation.json", &serde_json::to_vec(&evaluation).expect("BUG: numbers are plain JSON"))?;
    cx.tick(annotations.images.len() as u64);
    cx.commit(draft, metrics)
}
