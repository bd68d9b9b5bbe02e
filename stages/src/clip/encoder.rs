//! A frozen CLIP, as the stages use it.

use ovenbird_data::images::{Image, Preprocess};
use ovenbird_models::{
    checkpoint::Checkpoint,
    clip::{self, Activation, ImageConfig, Mode},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{Result, artifacts::CheckpointFile};

/// Images of a forward pass: what a stage collects before it calls [`Encoder::squares`]. Part of the results: libtorch may sum
/// in another order for another shape, so the last batch of a unit is filled up with zeros and the shape is always the same.
pub(crate) const BATCH: usize = 64;

/// The arithmetic of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16, about four times as fast where the processor has it; cosine to f32 at least 0.999 on trained weights.
    Bf16,
}

/// Which checkpoint file's conventions the weights follow, where the tensors cannot say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Gelu {
    /// x * sigmoid(1.702 x): OpenAI's weights.
    Quick,
    /// The exact one: most weights of open_clip.
    Exact,
}

/// How CLIP is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Clip {
    /// The arithmetic of the image tower; text is always encoded in f32.
    pub precision: Precision,
    /// The activation; without it, quick for OpenAI and Hugging Face layouts and exact for open_clip's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gelu: Option<Gelu>,
}

/// A loaded image tower with its preprocessing.
pub(crate) struct Encoder {
    clip: clip::Clip,
    pub(crate) preprocess: Preprocess,
}

impl Clip {
    /// Loads both towers in f32 on the CPU, for text.
    pub(crate) fn load_text(self, file: &CheckpointFile) -> Result<clip::Clip> {
        self.load_as(file, Device::Cpu, Kind::Float)
    }

    /// Loads the image tower for a device.
    pub(crate) fn load(self, file: &CheckpointFile, device: Device) -> Result<Encoder> {
        let kind = match self.precision {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let clip = self.load_as(file, device, kind)?;
        let (ImageConfig::Vit { image_side, .. } | ImageConfig::ResNet { image_side, .. }) = clip.config().image;
        Ok(Encoder { clip, preprocess: Preprocess::clip(image_side as u32) })
    }

    fn load_as(self, file: &CheckpointFile, device: Device, kind: Kind) -> Result<clip::Clip> {
        let activation = self.gelu.map(|gelu| match gelu {
            Gelu::Quick => Activation::QuickGelu,
            Gelu::Exact => Activation::Gelu,
        });
        let checkpoint = Checkpoint::open(&file.path)?;
        Ok(clip::Clip::load(checkpoint.tensors(), &file.path, activation, device, kind)?)
    }
}

impl Encoder {
    /// The dimension D of embeddings.
    pub(crate) fn dim(&self) -> usize {
        self.clip.config().embed_dim as usize
    }

    /// Unit-norm embeddings of square images at the network's size, `[N, D]` row by row.
    pub(crate) fn squares(&self, images: &[Image]) -> Result<Vec<f32>> {
        let mut embeddings = Vec::with_capacity(images.len() * self.dim());
        let n_numbers = self.preprocess.n_numbers();
        let mut pixels = vec![0.0; BATCH * n_numbers];
        for batch in images.chunks(BATCH) {
            for (place, numbers) in pixels.chunks_exact_mut(n_numbers).enumerate() {
                match batch.get(place) {
                    Some(image) => self.preprocess.normalise(image, numbers),
                    None => numbers.fill(0.0),
                }
            }
            let side = i64::from(self.preprocess.side_px);
            let rows = self.forward(&pixels, &[BATCH as i64, 3, side, side])?;
            embeddings.extend_from_slice(&rows[..batch.len() * self.dim()]);
        }
        Ok(embeddings)
    }

    /// The unit-norm embedding `[D]` of an image at its own size.
    pub(crate) fn native(&self, image: &Image) -> Result<Vec<f32>> {
        let mut pixels = vec![0.0; image.rgb.len()];
        self.preprocess.normalise(image, &mut pixels);
        self.forward(&pixels, &[1, 3, i64::from(image.height), i64::from(image.width)])
    }

    fn forward(&self, pixels: &[f32], shape: &[i64]) -> Result<Vec<f32>> {
        no_grad(|| {
            let images = Tensor::from_slice(pixels).view(shape).to_device(self.clip.device()).to_kind(self.clip.kind());
            let embeddings = self.clip.encode_image(&images, Mode::Eval)?;
            let embeddings = unit_norm(&embeddings.to_kind(Kind::Float)).to_device(Device::Cpu).contiguous();
            let mut rows = vec![0.0; embeddings.numel()];
            embeddings.copy_data(&mut rows, embeddings.numel());
            Ok(rows)
        })
    }
}

/// x / max(|x|, 1e-12) over the last axis.
pub(crate) fn unit_norm(rows: &Tensor) -> Tensor {
    rows / rows.norm_scalaropt_dim(2.0, [-1], true).clamp_min(1e-12)
}
