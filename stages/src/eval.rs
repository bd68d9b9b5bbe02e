//! `eval/coco` and `eval/lvis`: average precision and recall of detections.

pub mod anchors;
pub mod regions;

use ovenbird_data::{
    evaluate::{Evaluator, IouType, Metric, Protocol},
    warnings::of_boxes,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Detections, EvaluationFile},
};

const FOUND: In<Detections> = In::required("detections", "Detections in the images of the annotations.");

/// COCO evaluation of boxes or masks, for all, base and novel classes.
///
/// AP counts at most 100 detections per image; AP50, AP75, AP by size and AR at most 1,000. The limit is over all classes together.
/// (pycocotools; OADP, section 6.6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Coco {
    /// Whether boxes or masks are compared with the annotations.
    // A default that is not written has to be spelled out for the schema.
    #[serde(default, skip_serializing_if = "is_boxes")]
    #[schemars(extend("default" = "boxes"))]
    pub iou_type: IouType,
}

/// LVIS evaluation of boxes or masks: federated, 300 detections per image; APr, APc, APf, and AP of base and novel classes.
///
/// An image counts for a class only if the annotations say that the class is there or absent; classes that are not labelled exhaustively
/// give no false positives.
/// (lvis-api 0.5.3.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lvis {
    /// Whether boxes or masks are compared with the annotations.
    // A default that is not written has to be spelled out for the schema.
    #[serde(default, skip_serializing_if = "is_boxes")]
    #[schemars(extend("default" = "boxes"))]
    pub iou_type: IouType,
}

const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json of the same images, with the ground truth.");
const EVALUATION: Out<EvaluationFile> =
    Out::new("evaluation", "AP and AR for all, base and novel classes and for each class, precision-recall curves, and warnings.");

fn is_boxes(iou_type: &IouType) -> bool {
    *iou_type == IouType::Boxes
}

const EVAL_INPUTS: &[PortInfo] = &[ANNOTATIONS.info(), FOUND.info(), CLASSES.info()];

impl Stage for Coco {
    const KIND: &'static str = "eval/coco";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = EVAL_INPUTS;
    const OUTPUTS: &'static [PortInfo] = &[EVALUATION.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        evaluate(units, cx, Protocol::Coco, self.iou_type)
    }
}

impl Stage for Lvis {
    const KIND: &'static str = "eval/lvis";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] = EVAL_INPUTS;
    const OUTPUTS: &'static [PortInfo] = &[EVALUATION.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        evaluate(units, cx, Protocol::Lvis, self.iou_type)
    }
}

fn evaluate(units: &[Unit], cx: &Context<'_>, protocol: Protocol, iou_type: IouType) -> Result<()> {
    let [unit] = units else { return Ok(()) };
    let Classes(classes) = cx.inputs.read(CLASSES)?;
    let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
    let port = |port: &'static str, hint: &'static str| move |problem: String| Error::Input { port, problem, hint: hint.into() };
    let hint = match iou_type {
        IouType::Boxes => "use the classes and the annotations of the same split",
        IouType::Masks => "masks need annotations with a `segmentation` of every object; otherwise evaluate `iou_type: boxes`",
    };
    let mut evaluator = Evaluator::new(protocol, iou_type, &annotations, &classes).map_err(port("annotations", hint))?;
    let hint = match iou_type {
        IouType::Boxes => "evaluate detections against the annotations they were made for",
        IouType::Masks => {
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
            problem: format!("none of {n_stray} detections is in an image of the annotations"),
            hint: "evaluate detections against annotations of the same images".into(),
        });
    }
    if n_stray > 0 {
        cx.note(format!("{n_stray} detections are in images that the annotations do not have, and are not evaluated"));
    }
    let evaluation = evaluator.finish(table.looked_at()?.as_ref()).map_err(port("detections", hint))?;
    let metrics = evaluation.groups.iter().map(|(group, summary)| (format!("{group}.ap50"), summary.get(Metric::AP50).into()));
    let metrics = metrics.collect();
    let draft = cx.begin(unit)?;
    draft.write(EVALUATION, "evaluation.json", &serde_json::to_vec(&evaluation).expect("BUG: numbers are plain JSON"))?;
    cx.tick(annotations.images.len() as u64);
    cx.commit(draft, metrics)
}
