//! `oln/train`: an object localisation network, trained on base classes.

use std::collections::BTreeMap;

use ovenbird_models::{
    detection::boxes::ImageSize,
    rcnn::oln::{Config, Oln},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, nn};

use super::network::{OlnFile, OlnSpec};
use crate::{
    Context, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    detector::{
        batches::{self, Batch, DetectionLoader, boxes},
        ports::{ANNOTATIONS, CLASSES, IMAGES, PRETRAINED},
        pretrained::load_pretrained,
        spec::Network,
        training::{Epochs, Training},
    },
    training::{Criterion, Losses, Parameter, Ports, Weights, train},
};

/// Trains an object localisation network on the boxes of base classes, without their classes: centerness and sides of boxes at anchors, and
/// the overlap of regions with objects.
///
/// The defaults are the authors' for COCO (Kim et al. 2022): 8 epochs in batches of 16 images; the learning rate falls after epochs 6 and 7.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Size of the network. The ResNet-50 of `r50` is of torchvision's style here, of caffe style in `detector/train`.
    pub network: Network,
    /// How the network is trained.
    pub training: Training,
}

impl Default for Train {
    fn default() -> Self {
        let training = Training {
            steps: 58_640,
            lr_steps: vec![43_980, 51_310],
            max_size: [1333, 1333],
            min_size: [800, 800],
            weight_decay: 1e-4,
            ..Training::default()
        };
        Self { network: Network::R50, training }
    }
}

const PORTS: Ports<OlnFile> = Ports::new(
    Out::new(
        "network",
        "Weights under the authors' names, safetensors, f32, and how the network is built; one file for each checkpoint kept.",
    ),
    "network.safetensors",
);

impl Stage for Train {
    const KIND: &'static str = "oln/train";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), PRETRAINED.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        self.training.check()
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        batches::units(&self.training, Epochs::default(), inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let config = match self.network {
            Network::R50 => Config::r50(),
            Network::Toy => Config::toy(),
        };
        let store = nn::VarStore::new(cx.device);
        let network = Oln::new(&store.root(), &config, self.training.seed)?;
        load_pretrained(network.parameters(), units, cx)?;
        let spec = OlnSpec { config, fits: self.training.fits() };
        let training = self.training.light(cx);
        let loader = DetectionLoader::new(&training, Epochs::default(), cx)?;
        loader.look_for_images(cx)?;
        let criterion = OlnCriterion { network, spec, training: &training, device: cx.device };
        train(&loader.config(), &loader, &criterion, &PORTS, units, cx)
    }
}

/// A network in training.
struct OlnCriterion<'a> {
    network: Oln,
    spec: OlnSpec,
    training: &'a Training,
    device: Device,
}

impl Criterion for OlnCriterion<'_> {
    type Batch = Batch;

    fn parameters(&self) -> Result<BTreeMap<String, Parameter>> {
        self.training.grouped(self.network.parameters())
    }

    fn losses(&self, _step: u32, mut batch: Batch) -> Result<Losses> {
        let pixels = batch.pixels.on(self.device).to_kind(self.training.precision.kind());
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
        let objects: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.objects)).collect();
        let losses = self.network.losses(&pixels, &sizes, &objects, &mut batch.random)?;
        let terms = vec![
            ("rpn_boxes", losses.proposals),
            ("rpn_centerness", losses.centerness),
            ("boxes", losses.boxes),
            ("overlaps", losses.overlaps),
        ];
        Ok(Losses { terms, measures: Vec::new() })
    }

    fn weights(&self) -> Result<Weights> {
        let tensors = self.network.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Weights { tensors, metadata: self.spec.metadata() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Train::default()).is_empty());
    }
}
