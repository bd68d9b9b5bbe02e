//! `annotations/pseudo-labels`: annotations with objects that CLIP recognises.

use std::collections::BTreeSet;

use ovenbird_data::{
    additions::{Added, write_with},
    annotations::{CategoryId, ImageId},
    boxes::{Xyxy, nms_by_class},
    classes::ClassSplit,
};
use ovenbird_models::{rcnn::classifier::LogitScale, to_unit_length};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, Prompts, RegionFeatures, Regions},
    clip::space,
};

/// Adds pseudo labels to annotations: proposals that CLIP recognises, so that a detector learns novel classes without human labels.
///
/// Of the `max_per_image` proposals with the greatest objectness, each gets its likeliest class, base or novel: probability = softmax of
/// logits / temperature over all classes, logits = cosine * scaler - bias with the prompts' learned scale, or else the cosine itself;
/// score = probability^`probability_power` * objectness^`objectness_power`. Those above `score_threshold` that NMS within each class keeps
/// are added with new ids, the box's area, their score, `iscrowd` 0 and no outline: masks cannot be learned from them. The defaults are
/// OADP's for COCO with learned prompts. For LVIS with ViLD's: `temperature` 0.40192, `probability_power` 0.71821, `objectness_power`
/// 0.74209, `nms_iou` 0.674, `score_threshold` 0.007. (OADP, section 6.8.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PseudoLabels {
    /// Divides logits before the softmax. Without it 1, if the prompts have a learned scale; otherwise it must be given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Exponent of the class probability in the score.
    pub probability_power: f64,
    /// Exponent of objectness in the score.
    pub objectness_power: f64,
    /// NMS removes a box whose IoU with a better-scored box of its class is greater.
    pub nms_iou: f32,
    /// Proposals with this score or less are not added.
    pub score_threshold: f32,
    /// The most proposals to consider per image, those of greatest objectness.
    pub max_per_image: usize,
    /// Accept embeddings of two CLIPs, which is refused otherwise: cosines between them mean nothing, unless both share one space.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mixed_clips: bool,
}

impl Default for PseudoLabels {
    fn default() -> Self {
        let (probability_power, objectness_power) = (0.306, 0.758);
        Self {
            temperature: None,
            probability_power,
            objectness_power,
            nms_iou: 0.49705,
            score_threshold: 0.5,
            max_per_image: 100,
            mixed_clips: false,
        }
    }
}

const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of proposals, for all images of the annotations.");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the categories of all classes.");
const MORE: Out<AnnotationFile> = Out::new("annotations", "The same json, otherwise unchanged, with more `annotations`.");
const ALL: Out<Classes> =
    Out::new("classes", "All class names as base classes: give these to a training, so that it learns novel classes.");

impl Stage for PseudoLabels {
    const KIND: &'static str = "annotations/pseudo-labels";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), PROMPTS.info(), CLASSES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[MORE.info(), ALL.info()];
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_power = |power: f64| (0.0..=1.0).contains(&power);
        Problem::unless(&[
            ("temperature", self.temperature.is_none_or(|t| t.is_finite() && t > 0.0), "a number above 0"),
            ("probability_power", is_power(self.probability_power), "a number from 0 to 1"),
            ("objectness_power", is_power(self.objectness_power), "a number from 0 to 1"),
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("score_threshold", (0.0..1.0).contains(&self.score_threshold), "a number from 0 to below 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let file = cx.inputs.read(ANNOTATIONS)?;
        let annotations = file.load()?;
        let ids = Classes::category_ids(&annotations, classes.all())?;
        let (features, prompts) = (cx.inputs.read(FEATURES)?, cx.inputs.read(PROMPTS)?);
        space::common_unless(self.mixed_clips, &[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        let labeller = self.labeller(&prompts, &classes.all().cloned().collect::<Vec<_>>(), ids)?;
        let images = &annotations.images[..annotations.images.len().min(cx.most_items.unwrap_or(usize::MAX))];
        let mut waiting: BTreeSet<_> = images.iter().map(|image| image.id).collect();
        cx.total(waiting.len() as u64);
        let mut added = Vec::new();
        for regions in features.rows() {
            cx.proceed()?;
            let regions = regions?;
            if waiting.remove(&regions.image_id) {
                added.extend(labeller.label(&regions)?);
                cx.tick(1);
            }
        }
        let missing: Vec<ImageId> = waiting.into_iter().collect();
        let hint = "extract features for these annotations: `clip/objects` or `objects/import` with the same `annotations`";
        cx.skip_missing(FEATURES.info(), &missing, images.len(), hint)?;
        let base = Classes::category_ids(&annotations, classes.base.iter())?;
        let n_base = added.iter().filter(|object| base.contains(&object.category_id)).count();
        let draft = cx.begin(unit)?;
        let mut json = draft.create(MORE, "annotations.json")?;
        write_with(&file.file.read()?, &file.file.path, &added, &mut json)?;
        json.finish()?;
        let all = ClassSplit { base: classes.all().cloned().collect(), novel: Vec::new() };
        draft.write(ALL, "classes.json", &serde_json::to_vec(&all).expect("BUG: names are plain JSON"))?;
        cx.commit(draft, [("base".into(), n_base.into()), ("novel".into(), (added.len() - n_base).into())].into())
    }
}

/// Selects the pseudo labels of an image.
struct Labeller<'a> {
    stage: &'a PseudoLabels,
    /// f32 `[K, D]`.
    prompts: Tensor,
    /// Logits are cosines times this, less the bias.
    factor: f64,
    bias: f64,
    /// Category ids, K of them.
    ids: Vec<CategoryId>,
}

impl PseudoLabels {
    fn labeller(&self, prompts: &Prompts, names: &[String], ids: Vec<CategoryId>) -> Result<Labeller<'_>> {
        let (factor, bias) = match (prompts.scale, self.temperature) {
            (Some(LogitScale::Affine { scaler, bias }), temperature) => {
                let temperature = temperature.unwrap_or(1.0);
                (scaler / temperature, bias / temperature)
            }
            (Some(LogitScale::Temperature { test, .. }), temperature) => (1.0 / (test * temperature.unwrap_or(1.0)), 0.0),
            (None, Some(temperature)) => (1.0 / temperature, 0.0),
            (None, None) => {
                return Err(Error::Input {
                    port: PROMPTS.info().name,
                    problem: "no scale was learned with these, and `temperature` is not given".into(),
                    hint: "give `with: {temperature: 0.40192}`, as OADP does for ViLD's prompts, or prompts with a learned scale".into(),
                });
            }
        };
        Ok(Labeller { stage: self, prompts: prompts.select(names)?, factor, bias, ids })
    }
}

impl Labeller<'_> {
    /// The pseudo labels of an image, best first.
    fn label(&self, regions: &Regions) -> Result<Vec<Added>> {
        let (image_id, n_regions) = (regions.image_id, regions.boxes.len());
        if n_regions == 0 {
            return Ok(Vec::new());
        }
        let (dim, expected) = (regions.embeddings.len() / n_regions, self.prompts.size()[1] as usize);
        if dim != expected {
            return Err(Error::Input {
                port: PROMPTS.info().name,
                problem: format!("class embeddings have {expected} numbers, region embeddings {dim}"),
                hint: "make the prompts and the features with the same CLIP".into(),
            });
        }
        let mut order: Vec<usize> = (0..n_regions).collect();
        order.sort_by(|a, b| regions.objectness[*b].total_cmp(&regions.objectness[*a]));
        order.truncate(self.stage.max_per_image);
        // A box without an area is no object.
        order.retain(|region| regions.boxes[*region].width() > 0.0 && regions.boxes[*region].height() > 0.0);
        if order.is_empty() {
            return Ok(Vec::new());
        }
        let embeddings: Vec<f32> = order.iter().flat_map(|region| &regions.embeddings[region * dim..][..dim]).copied().collect();
        let embeddings = to_unit_length(&Tensor::from_slice(&embeddings).view([order.len() as i64, dim as i64]));
        // [N, K]
        let logits = embeddings.matmul(&self.prompts.tr()) * self.factor - self.bias;
        let (probabilities, classes) = logits.softmax(-1, Kind::Float).max_dim(-1, false);
        let probabilities = Vec::<f32>::try_from(probabilities).map_err(ovenbird_models::Error::from)?;
        let classes = Vec::<i64>::try_from(classes).map_err(ovenbird_models::Error::from)?;

        let (mut boxes, mut scores, mut of_class) = (Vec::<Xyxy>::new(), Vec::new(), Vec::new());
        for ((region, probability), class) in order.into_iter().zip(probabilities).zip(classes) {
            let objectness = f64::from(regions.objectness[region]).max(0.0);
            let score = f64::from(probability).powf(self.stage.probability_power) * objectness.powf(self.stage.objectness_power);
            if score as f32 > self.stage.score_threshold {
                boxes.push(regions.boxes[region]);
                scores.push(score as f32);
                of_class.push(class as u32);
            }
        }
        let added = |kept: usize| {
            let category_id = self.ids[of_class[kept] as usize];
            Added { image_id, category_id, xyxy: boxes[kept], score: scores[kept] }
        };
        Ok(nms_by_class(&boxes, &scores, &of_class, self.stage.nms_iou).into_iter().map(added).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use ovenbird_data::annotations::ImageId;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        /// `[K, D]`.
        prompts: Vec<Vec<f32>>,
        images: Vec<GoldenImage>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct GoldenImage {
        boxes: Vec<[f32; 4]>,
        objectness: Vec<f32>,
        embeddings: Vec<Vec<f32>>,
    }

    #[derive(Deserialize)]
    struct Case {
        /// Scaler and bias.
        scale: Option<[f64; 2]>,
        with: PseudoLabels,
        /// By image: box, class, score.
        added: Vec<Vec<([f32; 4], u64, f32)>>,
    }

    /// make.py follows the reference with numpy and torchvision's NMS.
    #[test]
    fn objects_are_those_that_the_reference_finds() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pseudo-labels/golden.json");
        let golden: Golden = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let names: Vec<String> = (0..golden.prompts.len()).map(|class| class.to_string()).collect();
        let ids: Vec<CategoryId> = (0..golden.prompts.len() as u64).map(CategoryId).collect();
        assert_eq!(golden.cases.len(), 3);
        for Case { scale, with, added } in golden.cases {
            let embeddings = Tensor::from_slice(&golden.prompts.concat()).view([names.len() as i64, -1]);
            let scale = scale.map(|[scaler, bias]| LogitScale::Affine { scaler, bias });
            let labeller = with.labeller(&Prompts { names: names.clone(), embeddings, scale, clip: None }, &names, ids.clone()).unwrap();
            for (image, expected) in golden.images.iter().zip(added) {
                let regions = Regions {
                    image_id: ImageId(1),
                    size_px: [640, 480],
                    boxes: image.boxes.iter().map(|corners| Xyxy::from(*corners)).collect(),
                    objectness: image.objectness.clone(),
                    embeddings: image.embeddings.concat(),
                };
                let found = labeller.label(&regions).unwrap();
                let words = |found: &Added| ([found.xyxy.x1, found.xyxy.y1, found.xyxy.x2, found.xyxy.y2], found.category_id.0);
                let expected_words: Vec<_> = expected.iter().map(|(corners, class, _)| (*corners, *class)).collect();
                assert_eq!(found.iter().map(words).collect::<Vec<_>>(), expected_words, "{with:?}");
                assert!(found.iter().zip(&expected).all(|(found, (_, _, score))| (found.score - score).abs() < 1e-5), "{found:?}");
            }
        }
    }

    #[test]
    fn the_defaults_pass_their_own_check_and_prompts_without_a_scale_need_a_temperature() {
        let stage = PseudoLabels::default();
        assert!(Stage::check(&stage).is_empty());
        let prompts = Prompts { names: vec!["a".into()], embeddings: Tensor::from_slice(&[1.0_f32]).view([1, 1]), scale: None, clip: None };
        let error = stage.labeller(&prompts, &["a".into()], vec![CategoryId(1)]).err().unwrap().to_string();
        assert_eq!(error, "prompts: no scale was learned with these, and `temperature` is not given");
    }
}
