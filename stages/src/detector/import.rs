//! `detector/import`: reads a detector that another program trained.

use std::collections::BTreeMap;

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    checkpoint::Checkpoint,
    rcnn::{
        Detector,
        classifier::LogitScale,
        cosine::CosineDetector,
        layout,
        sigmoid::{self, Activation, NovelConfig, SigmoidDetector},
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, nn};

use super::spec::{CosineSpec, DetectorFile, DetectorSpec, ExtraHeads, MaskRcnnSpec, Network, SigmoidSpec};
use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, Classes, read_weights},
    error::malformed,
};

/// Imports a detector that another program trained: checkpoints of OADP, DetPro, LP-OVOD and PromptDet, and files that `detector/export` wrote.
///
/// LP-OVOD's have a linear classifier, whose rows `classes` names: base classes, and novel ones if they were probed, in its order. The heads follow from the tensors in the checkpoint; all tensors of the network must be there and fit. The file does not say how the
/// detector is used: the parameters do, with OADP's values for COCO as defaults. (OADP, sections 6.1 and 6.7.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// Size of the network.
    pub network: Network,
    /// Temperature of cosines in detection.
    pub test_temperature: f64,
    /// Whether the heads that learned CLIP's embeddings use `multilabel_prompts`.
    pub multilabel_prompts: bool,
    /// Maximum length of the longer side of images, in px.
    pub max_size: u32,
    /// Length of the shorter side of images, in px, unless the longer side would exceed `max_size`.
    pub min_size: u32,
}

impl Default for Import {
    fn default() -> Self {
        Self { network: Network::R50, test_temperature: 0.01, multilabel_prompts: true, max_size: 1333, min_size: 800 }
    }
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "Weights under the names of mmdet and OADP, DetPro, LP-OVOD or PromptDet: `.pth` or safetensors.");
const CLASSES: In<Classes> =
    In::optional("classes", "Base and novel class names: of a detector with a linear classifier (LP-OVOD), the classes of its rows.");
const DETECTOR: Out<DetectorFile> = Out::new("detector", "Weights under mmdet's names, safetensors, f32, and how the network is built.");
/// A tensor with as many rows as embeddings have numbers: of OADP and of DetPro.
const PROJECTIONS: [&str; 2] = ["roi_head.bbox_head.fc_cls._linear.weight", "roi_head.projection.weight"];
/// The rows of base classes of a detector of LP-OVOD, those of novel classes, and the matrix that makes embeddings.
const PROTOTYPE: &str = "roi_head.prototype";
const PROTOTYPE_NOVEL: &str = "roi_head.prototype_novel";
const IMAGE_PROJECTION: &str = "roi_head.projection_for_image.weight";
/// The scale of cosines of a detector of PromptDet, and the matrix that makes embeddings.
const COSINE_SCALE: &str = "roi_head.bbox_head.scale";
const COSINE_PROJECTION: &str = "roi_head.bbox_head.fc_cls.weight";
/// The end of the names of OADP's counters of warm-up steps of label losses.
const LABEL_COUNTER: &str = "_loss._weight._steps";

impl Stage for Import {
    const KIND: &'static str = "detector/import";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTOR.info()];

    fn check(&self) -> Vec<Problem> {
        let is_temperature = self.test_temperature > 0.0 && self.test_temperature.is_finite();
        Problem::unless(&[
            ("test_temperature", is_temperature, "a number above 0"),
            ("min_size", (32..=self.max_size).contains(&self.min_size), "from 32 px to `max_size`"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let file = cx.inputs.read(CHECKPOINT)?;
        let checkpoint = read_weights(&file.file)?;
        let store = nn::VarStore::new(Device::Cpu);
        let (spec, parameters) = match (ending(&checkpoint, PROTOTYPE), ending(&checkpoint, COSINE_SCALE)) {
            (Some(prototype), _) => {
                let spec = self.sigmoid_spec(&checkpoint, prototype.size()[0], cx)?;
                let detector = SigmoidDetector::blank(&store.root(), &spec.config)?;
                (DetectorSpec::Sigmoid(spec), views(detector.parameters()))
            }
            (None, Some(_)) => {
                let spec = self.cosine_spec(&checkpoint)?;
                let detector = CosineDetector::blank(&store.root(), &spec.config)?;
                (DetectorSpec::Cosine(spec), views(detector.parameters()))
            }
            (None, None) => {
                let spec = self.spec(&checkpoint)?;
                let detector = Detector::blank(&store.root(), &spec.config)?;
                (DetectorSpec::MaskRcnn(spec), views(detector.parameters()))
            }
        };
        let report = layout::load(checkpoint.tensors(), &parameters, &file.file.path)?.require_all(&file.file.path)?;
        report.place.note().into_iter().for_each(|words| cx.note(words));
        if let Some(first) = report.clip.first() {
            cx.note(format!("{} tensors of a CLIP beside the detector are left out, `{first}` among them", report.clip.len()));
        }
        if let Some((name, steps)) = report.counters.iter().find(|(name, _)| name.ends_with(LABEL_COUNTER)) {
            let behaviour = if *steps <= 1 { "reference" } else { "fixed" };
            cx.note(format!("the detector was trained as with `label_warmup: {behaviour}`: {name} is {steps}"));
        }
        let draft = cx.begin(unit)?;
        draft.write_tensors(DETECTOR, "network.safetensors", &parameters, &spec.metadata())?;
        cx.commit(draft, [("tensors".into(), report.loaded.len().into())].into())
    }
}

/// The tensor with a name, or with something before it.
fn ending<'a>(checkpoint: &'a Checkpoint, name: &str) -> Option<&'a Tensor> {
    checkpoint.tensors().iter().find(|(other, _)| other.ends_with(name)).map(|(_, tensor)| tensor)
}

/// The same tensors, for longer than the network.
fn views(parameters: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

impl Import {
    /// Of a detector of LP-OVOD, whose classifier has `n_base` rows.
    fn sigmoid_spec(&self, checkpoint: &Checkpoint, n_base: i64, cx: &Context<'_>) -> Result<SigmoidSpec> {
        let refused = |problem: String| Error::Input {
            port: CLASSES.info().name,
            problem,
            hint: "give the classes that the detector was trained on, in its order: of COCO those of `annotations/split`".into(),
        };
        let Some(Classes(ClassSplit { base, novel })) = cx.inputs.read_if_given(CLASSES)? else {
            return Err(refused("none are given, but the detector has a linear classifier, whose rows have no names".into()));
        };
        let size = |name: &str, axis: usize| ending(checkpoint, name).and_then(|tensor| tensor.size().get(axis).copied());
        let novel = match size(PROTOTYPE_NOVEL, 0) {
            Some(rows) if rows != novel.len() as i64 => {
                return Err(refused(format!("{} novel classes, but the detector has rows for {rows}", novel.len())));
            }
            Some(_) => novel,
            None => Vec::new(),
        };
        if base.len() as i64 != n_base {
            return Err(refused(format!("{} base classes, but the detector has rows for {n_base}", base.len())));
        }
        let config = self.network.sigmoid_config(base.len(), size(IMAGE_PROJECTION, 0).map(|dim| dim as usize));
        let n_classes = novel.len() as i64;
        let novel_config = (n_classes > 0).then_some(NovelConfig { n_classes, activation: Activation::Sigmoid });
        let config = sigmoid::Config { novel: novel_config, ..config };
        Ok(SigmoidSpec { config, fits: [self.max_size, self.min_size], base, novel, clip: None })
    }

    /// Of a detector of PromptDet.
    fn cosine_spec(&self, checkpoint: &Checkpoint) -> Result<CosineSpec> {
        let Some([dim, _]) = ending(checkpoint, COSINE_PROJECTION).and_then(|tensor| <[i64; 2]>::try_from(tensor.size()).ok()) else {
            let problem = format!("expected a matrix `{COSINE_PROJECTION}` beside `{COSINE_SCALE}`, as detectors of PromptDet have it");
            return Err(malformed(checkpoint.path(), problem));
        };
        let has_masks = checkpoint.names().any(|name| name.contains("roi_head.mask_head."));
        Ok(CosineSpec { config: self.network.cosine_config(dim, has_masks), fits: [self.max_size, self.min_size], clip: None })
    }

    fn spec(&self, checkpoint: &Checkpoint) -> Result<MaskRcnnSpec> {
        let projection = checkpoint.tensors().iter().find(|(name, _)| PROJECTIONS.iter().any(|projection| name.ends_with(projection)));
        let Some([embed_dim, _]) = projection.map(|(_, tensor)| tensor.size()).and_then(|size| <[i64; 2]>::try_from(size).ok()) else {
            return Err(malformed(
                checkpoint.path(),
                format!(
                    "expected a detector of OADP or DetPro, with a matrix `{}` or `{}`, of LP-OVOD, with `{PROTOTYPE}`, or of PromptDet, with `{COSINE_SCALE}`",
                    PROJECTIONS[0], PROJECTIONS[1]
                ),
            ));
        };
        let has = |part: &str| checkpoint.names().any(|name| name.contains(part));
        let heads = ExtraHeads {
            object: has("roi_head._object_head.") || has("roi_head.projection_for_image."),
            block: has("roi_head._block_head."),
            global: has("_global_head."),
            mask: has("roi_head.mask_head."),
        };
        Ok(MaskRcnnSpec {
            config: self.network.config(embed_dim, heads),
            has_prompts: true,
            has_multilabel_prompts: self.multilabel_prompts,
            fits: [self.max_size, self.min_size],
            // The detector is not trained further, so the training temperature does not matter.
            scale: LogitScale::Temperature { train: self.test_temperature, test: self.test_temperature },
            clip: None,
        })
    }
}
