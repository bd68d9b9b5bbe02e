//! `oln/train` and `proposals/oln`: proposals from a network that has learned how well boxes lie on objects, and nothing of classes.

use std::collections::BTreeMap;

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{boxes::Xyxy, proposals::Proposal};
use ovenbird_models::{
    detection::boxes::{ImageSize, Suppression, corners},
    rcnn::{
        layout,
        oln::{Config, Oln},
    },
};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Tensor, nn};

use super::{
    ANNOTATIONS, CLASSES, IMAGES, PRETRAINED, View, Viewing, card_of,
    learner::{begin_with_pretrained, boxes},
    train::Network,
    training::{Assessment, Batch, Course, Learner, NetworkFile, Ports, Training, train},
};
use crate::{
    Artifact, Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Proposals, read_weights},
    ports::last_file,
};

/// Under which key of a file's metadata its [`Card`] is.
const CARD_KEY: &str = "ovenbird.oln";

/// How a trained network is built and asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Card {
    config: Config,
    /// Longer and shorter side that images are fitted into, in px.
    fits: [u32; 2],
}

/// A trained object localisation network: of several checkpoints of a training, the last.
pub struct OlnFile {
    file: InputFile,
}

impl Artifact for OlnFile {
    const KIND: &'static str = "oln";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str = "a network that `oln/train` made";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

impl NetworkFile for OlnFile {
    fn file(&self) -> &InputFile {
        &self.file
    }
}

/// Trains an object localisation network on base boxes, whatever their classes: centerness and sides at anchors, overlap of regions.
///
/// The defaults are the authors' for COCO (Kim et al. 2022): 8 epochs of 16 images, the learning rate falls after 6 and 7.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OlnTrain {
    /// How large the network is; `r50` is of torchvision's style here.
    pub network: Network,
    /// How it is trained.
    pub training: Training,
}

impl Default for OlnTrain {
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

const PORTS: Ports<OlnFile> = Ports::new(Out::new(
    "network",
    "Weights under the authors' names, safetensors, f32, and how the network is built; of every unit that stays.",
));

impl Stage for OlnTrain {
    const KIND: &'static str = "oln/train";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), PRETRAINED.info()];
    const OUTPUTS: &'static [PortInfo] = &[PORTS.weights.info(), PORTS.state.info(), PORTS.curve.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        self.training.check()
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        self.training.units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let config = match self.network {
            Network::R50 => Config::r50(),
            Network::Toy => Config::toy(),
        };
        let store = nn::VarStore::new(cx.device);
        let network = Oln::new(&store.root(), &config, self.training.seed)?;
        begin_with_pretrained(network.parameters(), units, cx)?;
        let card = serde_json::to_string(&Card { config, fits: self.training.fits() }).expect("BUG: a card is plain JSON");
        let course = Course::of(&self.training, cx)?;
        train(&network, &course, &PORTS, &BTreeMap::from([(CARD_KEY.to_owned(), card)]), units, cx)
    }
}

impl Learner for Oln {
    fn parameters(&self) -> &BTreeMap<String, Tensor> {
        self.parameters()
    }

    fn assess(&self, images: &Tensor, batch: &Batch, random: &mut ChaCha8Rng) -> Result<Assessment> {
        let sizes: Vec<ImageSize> = batch.images.iter().map(|image| image.size).collect();
        let objects: Vec<Tensor> = batch.images.iter().map(|image| boxes(&image.objects)).collect();
        let losses = self.losses(images, &sizes, &objects, random)?;
        let losses = vec![
            ("rpn_boxes", losses.proposals),
            ("rpn_centerness", losses.centerness),
            ("boxes", losses.boxes),
            ("overlaps", losses.overlaps),
        ];
        Ok(Assessment { losses, measures: Vec::new() })
    }
}

/// Proposes boxes that may hold objects of any class, by a trained object localisation network.
///
/// A score is the geometric mean of centerness and of the overlap that the network expects. Images one by one, fitted into the sides that
/// it was trained with; boxes are xyxy in px of the image. (Kim et al. 2022, section 3.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OlnPropose {
    /// A box falls when it overlaps a better one by more.
    pub nms_iou: f32,
    /// Proposals kept an image.
    pub max_per_image: usize,
}

impl Default for OlnPropose {
    fn default() -> Self {
        Self { nms_iou: 0.7, max_per_image: 1500 }
    }
}

const NETWORK: In<OlnFile> = In::required("network", "What `oln/train` made.");
const PROPOSALS: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) and scores by image id, best first.");

impl Stage for OlnPropose {
    const KIND: &'static str = "proposals/oln";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), NETWORK.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROPOSALS.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("nms_iou", (0.0..=1.0).contains(&self.nms_iou), "a number from 0 to 1"),
            ("max_per_image", self.max_per_image > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let items = inputs.read(IMAGES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?)?;
        Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let images = cx.inputs.read(IMAGES)?;
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let OlnFile { file } = cx.inputs.read(NETWORK)?;
        let (checkpoint, path) = (read_weights(&file)?, &file.path);
        let card: Card = card_of(&checkpoint, CARD_KEY, path)?;
        let store = nn::VarStore::new(cx.device);
        let network = Oln::blank(&store.root(), &card.config)?;
        layout::load(checkpoint.tensors(), network.parameters(), path)?.require_all(path)?;
        let suppression = Suppression { iou: self.nms_iou, keep: self.max_per_image };
        let viewing = Viewing::of(images, annotations, cx)?;
        for unit in units {
            // One that another process or device makes is passed by.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let (mut by_image, mut n_proposals) = (BTreeMap::new(), 0);
            viewing.each(unit.items.clone(), card.fits, &draft, cx, |View { info, placement, size, pixels }| {
                for found in network.propose(&pixels, &[size], &suppression)? {
                    let scores = Vec::<f32>::try_from(&found.scores).map_err(ovenbird_models::Error::from)?;
                    let proposal = |(corners, score)| Proposal { xyxy: placement.find(&Xyxy::from(corners)), score };
                    let proposals: Vec<Proposal> = corners(&found.boxes, "proposals")?.into_iter().zip(scores).map(proposal).collect();
                    n_proposals += proposals.len();
                    by_image.insert(info.id, proposals);
                }
                Ok(())
            })?;
            Proposals { by_image }.write(draft.create(PROPOSALS, "proposals.parquet")?)?;
            cx.commit(draft, [("proposals".into(), n_proposals.into())].into())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&OlnTrain::default()).is_empty() && Stage::check(&OlnPropose::default()).is_empty());
    }
}
