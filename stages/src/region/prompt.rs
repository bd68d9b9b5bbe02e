//! `region/prompt`: learns the region prompt of a frozen CLIP ResNet.

use std::collections::BTreeMap;

use ovenbird_models::{
    clip::regions::{Extent, Rules},
    detection::boxes::ImageSize,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Reduction, Tensor};

use super::frozen::{CHECKPOINT, Frozen, Kept, PROMPTS};
use crate::{
    Context, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, RegionPromptFile, TABLE},
    clip::{Clip, Space},
    contract::is_default,
    detector::{
        batches::{self, DetectionLoader},
        ports::{ANNOTATIONS, CLASSES, IMAGES},
        training::{Epochs, OptimizerKind, Training},
    },
    localizer::batches::{Cuts, RegionBatch, RegionLoader, Shown, Together},
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
            ("training.groups", self.training.groups.is_empty(), "none, as one table is trained"),
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
        let texts = frozen.texts(&prompts, &classes.base, cx)?;
        let loader = DetectionLoader::new(&self.training, Epochs::default(), cx)?;
        loader.look_for_images(cx)?;
        let loader = RegionLoader::new(loader, &self.cuts, self.together)?;
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
        let boxes = |image: &Shown| Tensor::from_slice(image.boxes.as_flattened()).view([-1, 4]);
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.view.to().into()).collect();
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

    /// The loss of boxes, of which these `[N, C, s, s]` are pooled and these i64 `[N]` are the classes; at least one.
    fn compare(&self, grids: &Tensor, labels: &Tensor) -> Result<Losses> {
        let features = self.frozen.regions()?.pool(&self.table, grids)?;
        Ok(losses(&features.matmul(&self.texts.tr()), labels, self.temperature))
    }
}

/// The cross entropy of cosines `[N, K]` with the texts of classes, of which i64 `[N]` are the right ones.
fn losses(cosines: &Tensor, labels: &Tensor, temperature: f64) -> Losses {
    let logits = cosines / temperature;
    let accuracy = logits.argmax(1, false).eq_tensor(labels).to_kind(Kind::Float).mean(Kind::Float);
    let loss = logits.cross_entropy_loss(labels, None::<Tensor>, Reduction::Mean, -100, 0.0);
    Losses { terms: vec![("classes", loss)], measures: vec![("accuracy", accuracy)] }
}

impl Criterion for TableCriterion<'_> {
    type Batch = RegionBatch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        Ok(BTreeMap::from([(TABLE.to_owned(), Parameter::plain(&self.table))]))
    }

    fn losses(&self, _step: u32, batch: RegionBatch) -> Result<Losses> {
        let labels: Vec<i64> = batch.images.iter().flat_map(|image| image.classes.iter().map(|class| *class as i64)).collect();
        if labels.is_empty() {
            // A step without boxes is a step: the optimizer's momentum moves the table.
            return Ok(Losses { terms: vec![("classes", (&self.table * 0.0).sum(Kind::Float))], measures: Vec::new() });
        }
        self.compare(&self.grids(&batch)?, &Tensor::from_slice(&labels).to_device(self.table.device()))
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = BTreeMap::from([(TABLE.to_owned(), self.table.shallow_clone())]);
        Ok(Weights { tensors, metadata: [Space::entry(self.frozen.space)].into() })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, no_grad};

    use super::*;
    use crate::{
        golden::{CORA_SIZES, cora, cora_clip, cora_images, error, numbers},
        training::{Optimizer, OptimizerConfig, Schedule},
    };

    /// A1 of the specification.
    #[test]
    fn the_loss_of_classes_has_the_values_of_the_specification() {
        let cosines = Tensor::from_slice(&[0.30_f32, 0.25, 0.20]).view([1, 3]).set_requires_grad(true);
        let loss = &losses(&cosines, &Tensor::from_slice(&[1_i64]), 0.01).terms[0].1;
        assert!((loss.double_value(&[]) - 5.006_760).abs() < 1e-5);
        loss.backward();
        // 100 times as large as the loss's.
        assert!(error(&cosines.grad(), &Tensor::from_slice(&[99.326_24_f32, -99.330_74, 0.004_509]).view([1, 3])) < 2e-4);
    }

    /// A2 of the specification, and steps of CORA's code: three at its own rate, the second on a batch in which an image has no box, and six on one batch
    /// at a hundred times that rate, where the weight decay has an effect.
    #[test]
    fn a_table_takes_the_steps_of_cora_s_code() {
        let golden = cora("prompt_train");
        let frozen = Frozen::of(cora_clip(), None);
        let regions = frozen.regions().unwrap();
        let layer3 = regions.layer3(&cora_images(), &CORA_SIZES).unwrap();
        let boxes = |name: &str| golden.get(name).map_or_else(|| Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)), Tensor::shallow_clone);
        let grids =
            ["a", "b"].map(|batch| regions.grids(&layer3, &[0, 1].map(|image| boxes(&format!("boxes_{batch}_image{image}")))).unwrap());
        let labels = [&golden["labels_a"], &golden["labels_b"]];
        let big_rate = OptimizerConfig { schedule: Schedule { peak: 1e-2, ..config().schedule }, ..config() };
        for (config, batches, [losses, lengths]) in
            [(config(), [0, 1, 0].as_slice(), ["loss", "grad_norm"]), (big_rate, &[0; 6], ["big_lr_loss", "big_lr_norm"])]
        {
            let is_big = losses == "big_lr_loss";
            let table = golden["table0"].copy().set_requires_grad(true);
            let criterion = TableCriterion { frozen: &frozen, table, texts: golden["text"].shallow_clone(), temperature: 0.01, kept: None };
            let mut optimizer = Optimizer::new(&config, criterion.parameters().unwrap());
            // Logits are a hundred cosines and agree to 1e-4, and so does the loss; its gradient is as much larger, and its length agrees to 2e-5 of
            // itself, as that of a whole training does. Steps of 0.01 make of the last bits of a gradient differences of the table.
            let [most, most_of_length] = if is_big { [1e-3; 2] } else { [1e-4, 2e-5] };
            let near =
                |found: f64, expected: f64, most: f64, what: &str| assert!((found - expected).abs() < most, "{what}: {found} {expected}");
            for (step, &batch) in batches.iter().enumerate() {
                let Losses { terms, .. } = criterion.compare(&grids[batch], labels[batch]).unwrap();
                near(terms[0].1.double_value(&[]), numbers(&golden[losses])[step], most, losses);
                terms[0].1.backward();
                let gradient = criterion.table.grad().copy();
                if let Some(expected) = golden.get(&format!("grad_step{step}")).filter(|_| !is_big) {
                    assert!(error(&gradient, expected) < 1e-5);
                }
                let length = numbers(&golden[lengths])[step];
                near(optimizer.step(step as u32).unwrap(), length, most_of_length * length, lengths);
                if !is_big {
                    // Adam divides a gradient by its size: where the last bits of the whole are a part of it, the number may be off by two steps.
                    let apart = no_grad(|| (&criterion.table - &golden[&format!("table{}", step + 1)]).abs());
                    let of_large = &apart * gradient.abs().ge(1e-5);
                    let most = 2e-4 * (step + 1) as f64;
                    assert!(of_large.max().double_value(&[]) < 1e-6 && apart.max().double_value(&[]) < most, "{step}");
                }
            }
            if is_big {
                assert!(error(&criterion.table.detach(), &golden["big_lr_table6"]) < 1e-3);
            }
        }
        // Nothing but the table has changed.
        assert!(error(&regions.grids(&layer3, &[boxes("boxes_a_image0"), boxes("boxes_a_image1")]).unwrap(), &grids[0]) <= 0.0);
    }

    /// The optimizer of the defaults.
    fn config() -> OptimizerConfig {
        Training { epochs: None, lr_epochs: Vec::new(), ..Prompt::default().training }.config().optimizer
    }

    /// A batch without boxes is a step: the momentum of the ones before moves the table. (Section 5: 6.7e-5 and 5.2e-5 after one of 1.0e-4.)
    #[test]
    fn steps_without_boxes_are_those_of_the_specification() {
        let config = config();
        let table = Tensor::from_slice(&[1.0_f32, -2.0]).set_requires_grad(true);
        let mut optimizer = Optimizer::new(&config, BTreeMap::from([(TABLE.to_owned(), Parameter::plain(&table))]));
        (&table * 3.0).sum(Kind::Float).backward();
        let moved = [1.0e-4, 6.7e-5, 5.2e-5].into_iter().enumerate().map(|(step, expected)| {
            let before = table.double_value(&[0]);
            optimizer.step(step as u32).unwrap();
            (before - table.double_value(&[0]), expected)
        });
        for (found, expected) in moved.collect::<Vec<_>>() {
            assert!((found - expected).abs() < 5e-7, "{found} {expected}");
        }
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Prompt::default()).is_empty());
    }
}
