//! `region/prompt`: learns the region prompt of a frozen CLIP ResNet.

use std::collections::BTreeMap;

use ovenbird_models::{
    clip::regions::{Extent, Rules},
    detection::boxes::ImageSize,
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::frozen::{CHECKPOINT, Frozen, Kept, image_size};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Prompts, RegionPromptFile, TABLE},
    clip::{Clip, Space, space},
    contract::is_default,
    detector::{
        batches::{self, DetectionLoader},
        ports::{ANNOTATIONS, CLASSES, IMAGES},
        training::{Epochs, OptimizerKind, Training},
    },
    localizer::batches::{Cuts, RegionBatch, RegionLoader, Together},
    training::{Criterion, Losses, Parameter, Ports, Weights, train},
};

/// Learns the region prompt of a CLIP ResNet: the position table of its attention pooling, so that it names regions of an image as well as whole pictures.
/// Everything else is frozen.
///
/// Annotated boxes of base classes are embedded as `region/embed` does, and compared with the class embeddings of base classes; the loss is the cross entropy,
/// a mean over the boxes of a batch. The defaults are CORA's for COCO, 16 images a step. Use `region/embed` to measure the result. (CORA, section 5.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Prompt {
    /// Activation, and which CLIP of a checkpoint with several. It computes in f32.
    pub clip: Clip,
    /// What cosines are divided by before the softmax.
    pub temperature: f64,
    /// How parts of images are cut out.
    pub cuts: Cuts,
    /// What the pixels of an image are computed with.
    #[serde(skip_serializing_if = "is_default")]
    pub together: Together,
    /// The width and height of an image in cells of a map.
    #[serde(skip_serializing_if = "is_default")]
    pub extent: Extent,
    /// How the table is trained; `precision` is f32.
    pub training: Training,
}

impl Default for Prompt {
    fn default() -> Self {
        Self {
            clip: Clip::default(),
            temperature: 0.01,
            cuts: Cuts::default(),
            together: Together::default(),
            extent: Extent::default(),
            training: Training {
                seed: 42,
                epochs: Some(5),
                lr_steps: Vec::new(),
                lr_epochs: vec![4],
                batch_size: 16,
                max_size: [1333, 1333],
                min_size: [480, 800],
                size_step: 32,
                optimizer: OptimizerKind::Adamw,
                lr: 1e-4,
                warmup_steps: 0,
                weight_decay: 1e-4,
                clip_grad_norm: Some(0.1),
                ..Training::default()
            },
        }
    }
}

const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");
const PORTS: Ports<RegionPromptFile> = Ports::new(
    Out::new("region_prompt", "safetensors: `attnpool.positional_embedding` f32 [1 + s * s, C]; one file for each checkpoint kept."),
    "region_prompt.safetensors",
);

impl Stage for Prompt {
    const KIND: &'static str = "region/prompt";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), CHECKPOINT.info(), PROMPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_f32 = self.training.precision == Training::default().precision;
        let mut problems = Problem::unless(&[
            ("temperature", self.temperature > 0.0 && self.temperature.is_finite(), "a number above 0"),
            ("training.precision", is_f32, "f32"),
        ]);
        problems.extend(self.cuts.check());
        problems.extend(self.training.check());
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        batches::units(&self.training, Epochs::default(), inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (prompts, rules) = (cx.inputs.read(PROMPTS)?, Rules { extent: self.extent, ..Rules::default() });
        let frozen = Frozen::load(&self.clip, &cx.inputs.read(CHECKPOINT)?, None, rules, cx)?;
        space::common(&[(CHECKPOINT.info().name, Some(frozen.space)), (PROMPTS.info().name, prompts.clip)])?;
        let texts = to_unit_length(&prompts.select(&classes.base)?).to_device(cx.device);
        let loader = DetectionLoader::new(&self.training, Epochs::default(), cx)?;
        loader.look_for_images(cx)?;
        let loader = RegionLoader::new(loader, &self.cuts, self.together);
        let table = frozen.regions()?.table().copy().set_requires_grad(true);
        let kept = loader.shows_few_views().then(Kept::default);
        let criterion = TableCriterion { frozen: &frozen, table, texts, temperature: self.temperature, kept };
        train(&loader.config(), &loader, &criterion, &PORTS, units, cx)
    }
}

/// A table in training.
struct TableCriterion<'a> {
    frozen: &'a Frozen,
    /// `[1 + s * s, C]`.
    table: Tensor,
    /// f32 `[K, D]` of unit length.
    texts: Tensor,
    temperature: f64,
    /// What pooling is given of images that are shown in few ways.
    kept: Option<Kept>,
}

impl TableCriterion<'_> {
    /// What is pooled of the boxes of a batch, `[N, C, s, s]`.
    fn grids(&self, batch: &RegionBatch) -> Result<Tensor> {
        let regions = self.frozen.regions()?;
        let device = self.table.device();
        let boxes = |image: &crate::localizer::batches::Shown| Tensor::from_slice(image.boxes.as_flattened()).view([-1, 4]);
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image_size(image.view.to())).collect();
        if let [all] = &batch.pixels[..] {
            let boxes: Vec<Tensor> = batch.images.iter().map(boxes).collect();
            return Ok(regions.grids(&regions.layer3(&all.on(device), &sizes)?, &boxes)?);
        }
        let grids = batch.images.iter().zip(&batch.pixels).zip(sizes).map(|((image, pixels), size)| {
            let make = || Ok(vec![regions.grids(&regions.layer3(&pixels.on(device), &[size])?, &[boxes(image)])?]);
            match &self.kept {
                Some(kept) => kept.get((image.place, image.view.is_mirrored()), make),
                None => make(),
            }
        });
        let grids: Vec<Tensor> = grids.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        Ok(Tensor::cat(&grids, 0))
    }
}

impl Criterion for TableCriterion<'_> {
    type Batch = RegionBatch;

    fn parameters(&self) -> BTreeMap<String, Parameter> {
        BTreeMap::from([(TABLE.to_owned(), Parameter::plain(&self.table))])
    }

    fn losses(&self, _step: u32, batch: RegionBatch) -> Result<Losses> {
        let labels: Vec<i64> = batch.images.iter().flat_map(|image| image.classes.iter().map(|class| *class as i64)).collect();
        if labels.is_empty() {
            // A step without boxes is a step: the optimizer's momentum moves the table.
            return Ok(Losses { terms: vec![("classes", (&self.table * 0.0).sum(Kind::Float))], measures: Vec::new() });
        }
        let labels = Tensor::from_slice(&labels).to_device(self.table.device());
        let features = self.frozen.regions()?.pool(&self.table, &self.grids(&batch)?)?;
        let logits = features.matmul(&self.texts.tr()) / self.temperature;
        let accuracy = logits.argmax(1, false).eq_tensor(&labels).to_kind(Kind::Float).mean(Kind::Float);
        let loss = logits.cross_entropy_loss(&labels, None::<Tensor>, Reduction::Mean, -100, 0.0);
        Ok(Losses { terms: vec![("classes", loss)], measures: vec![("accuracy", accuracy)] })
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = BTreeMap::from([(TABLE.to_owned(), self.table.shallow_clone())]);
        Ok(Weights { tensors, metadata: [Space::entry(self.frozen.space)].into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Prompt::default()).is_empty());
    }
}
