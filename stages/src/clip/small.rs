//! Small CLIPs for the toy world: how they are built, and how well they name pictures that they have not seen.

use ovenbird_models::{
    Phase,
    clip::{Activation, Clip, Config, ImageConfig, TextConfig},
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use super::encoder::preprocess_of;
use crate::{
    Context, In, Result,
    artifacts::{Captions, Images},
    prompts::texts::mean_embedding,
};

/// OpenAI's activation.
pub(crate) const ACTIVATION: Activation = Activation::QuickGelu;
/// Side of the network's input, px.
pub(crate) const SIDE: u32 = 64;
/// Pictures of [`zero_shot_accuracy`].
pub(crate) const HELD_OUT_IMAGES: In<Images> =
    In::optional("held_out_images", "Clean pictures of one class each, to measure zero-shot accuracy.");
/// Their class names.
pub(crate) const HELD_OUT: In<Captions> = In::optional("held_out", "The class name of each held-out picture.");
/// The metric's name.
pub(crate) const ZERO_SHOT_ACCURACY: &str = "zero_shot_accuracy";
/// Pictures of a forward pass.
const BATCH_SIZE: usize = 128;

/// The kind of image tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// A vision transformer: 64 px, patches of 8 px, width 128, 3 blocks.
    Vit,
    /// A ModifiedResNet with attention pooling: 64 px, width 16, one bottleneck a level.
    #[default]
    Resnet,
}

impl Architecture {
    /// The sizes of the network.
    pub(crate) fn config(self) -> Config {
        let image_side = i64::from(SIDE);
        let image = match self {
            Self::Vit => ImageConfig::Vit { image_side, patch: 8, width: 128, depth: 3, heads: 2, mlp_width: 512 },
            Self::Resnet => ImageConfig::ResNet { image_side, layers: [1, 1, 1, 1], width: 16, heads: 8 },
        };
        let text = TextConfig { context: 77, vocabulary: 49_408, width: 128, heads: 2, depth: 2 };
        Config { embed_dim: 128, image, text, activation: ACTIVATION }
    }
}

/// The fraction of the held-out pictures whose nearest text is that of their class, and a note of it; `None` without held-out pictures.
pub(crate) fn zero_shot_accuracy(clip: &Clip, cx: &Context<'_>) -> Result<Option<f64>> {
    let (Some(images), Some(Captions(held_out))) = (cx.inputs.read_if_given(HELD_OUT_IMAGES)?, cx.inputs.read_if_given(HELD_OUT)?) else {
        return Ok(None);
    };
    let mut names: Vec<&String> = held_out.iter().map(|picture| &picture.text).collect();
    names.sort();
    names.dedup();
    let row = |name: &&String| mean_embedding(clip, &[format!("a photo of a {name}"), format!("This is a {name}")]);
    let classes = to_unit_length(&Tensor::stack(&names.iter().map(row).collect::<Result<Vec<_>>>()?, 0));
    let (preprocess, side, mut n_right) = (preprocess_of(clip), clip.image_side(), 0);
    for pictures in held_out.chunks(BATCH_SIZE) {
        let mut pixels = vec![0.0; pictures.len() * preprocess.n_numbers()];
        for (picture, numbers) in pictures.iter().zip(pixels.chunks_exact_mut(preprocess.n_numbers())) {
            preprocess.normalise(&preprocess.square(&images.decode(&picture.file)?), numbers);
        }
        let nearest = no_grad(|| -> Result<Tensor> {
            let images = Tensor::from_slice(&pixels).view([pictures.len() as i64, 3, side, side]).to_device(clip.device());
            Ok(clip.encode_image_features(&images, Phase::Test)?.matmul(&classes.tr()).argmax(-1, false))
        })?;
        for (picture, place) in pictures.iter().zip(Vec::<i64>::try_from(&nearest).map_err(ovenbird_models::Error::from)?) {
            n_right += usize::from(*names[place as usize] == picture.text);
        }
    }
    let accuracy = n_right as f64 / held_out.len().max(1) as f64;
    cx.note(format!("zero-shot accuracy on held-out pictures: {:.1} %", 100.0 * accuracy));
    Ok(Some(accuracy))
}
