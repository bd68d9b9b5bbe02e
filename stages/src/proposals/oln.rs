//! `proposals/oln`: proposals from a trained object localisation network.

use ovenbird_models::{
    detection::boxes::Suppression,
    rcnn::{layout, oln as network},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::nn;

use super::{found, network_units, propose};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::Proposals,
    contract::is_default,
    detector::{
        images::{Normalisation, TestImage},
        ports::{ANNOTATIONS, IMAGES},
        predictor::{Found, Predictor},
    },
    oln::network::OlnFile,
};

/// Proposes boxes that may hold objects of any class, with a trained object localisation network.
///
/// The score of a box is the geometric mean of its predicted centerness and its predicted overlap with an object. Images are resized as in
/// training; boxes are xyxy in px of the original image. (Kim et al. 2022, section 3.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Oln {
    /// NMS removes a box whose IoU with a better one is greater.
    pub nms_iou: f32,
    /// Proposals kept per image.
    pub max_per_image: usize,
    /// Boxes smaller than this on either side are left out, in px of the original image. A network never learns from anchors that cross the
    /// border of an image, where it may see small objects.
    #[serde(skip_serializing_if = "is_default")]
    pub min_side: f32,
}

impl Default for Oln {
    fn default() -> Self {
        Self { nms_iou: 0.7, max_per_image: 1500, min_side: 0.0 }
    }
}

const NETWORK: In<OlnFile> = In::required("network", "A network from `oln/train`.");
const PROPOSALS: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) and scores by image, best first.");

impl Stage for Oln {
    const KIND: &'static str = "proposals/oln";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), NETWORK.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROPOSALS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
            ("min_side", self.min_side >= 0.0, "0 px or more"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        network_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let predictor = OlnPredictor::load(&cx.inputs.read(NETWORK)?, self, cx)?;
        propose(&predictor, PROPOSALS, units, cx)
    }
}

/// A trained network with the rule by which boxes are kept.
struct OlnPredictor {
    network: network::Oln,
    suppression: Suppression,
    min_side: f32,
    fits: [u32; 2],
    /// Owns the weights.
    _store: nn::VarStore,
}

impl OlnPredictor {
    fn load(file: &OlnFile, stage: &Oln, cx: &Context<'_>) -> Result<Self> {
        let (checkpoint, spec) = file.read()?;
        let (network, store) =
            layout::filled(&checkpoint, cx.device, |root| network::Oln::blank(root, &spec.config), network::Oln::parameters)?;
        let suppression = Suppression { iou: stage.nms_iou, keep: stage.max_per_image };
        Ok(Self { network, suppression, min_side: stage.min_side, fits: spec.fits, _store: store })
    }
}

impl Predictor for OlnPredictor {
    fn fits(&self) -> [u32; 2] {
        self.fits
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn predict(&self, TestImage { placement, size, pixels, .. }: &TestImage<'_>, _n_threads: usize) -> Result<Vec<Found>> {
        // Both axes have the same scale, up to a px.
        let scale = placement.to[0] as f32 / placement.from[0] as f32;
        found(&self.network.propose(pixels, &[*size], &self.suppression, self.min_side * scale)?[0], placement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Oln::default()).is_empty());
    }
}
