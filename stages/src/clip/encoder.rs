//! A frozen CLIP, as the stages use it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ovenbird_data::images::{Image, Preprocess, SquareResize};
use ovenbird_models::{
    Phase,
    checkpoint::Checkpoint,
    clip::{
        self, Activation,
        architecture::{self, ResizeMode},
        layout,
        settings::Settings,
    },
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::{activation, on_device, space::Space};
use crate::{
    Context, Error, Result,
    artifacts::{CheckpointFile, read_weights},
};

/// Squares of a forward pass. Part of the results: libtorch may sum in another order for another shape, so the last batch of a
/// unit is filled up with zeros and the shape is always the same.
const SQUARES: usize = 64;
/// Objects of a forward pass; each has four times the tokens of a square.
const OBJECTS: usize = 16;

/// The metric of a unit that names the precision it was computed in.
pub const PRECISION: &str = "precision";
/// The least cosine to f32 at which bf16 is chosen.
const LEAST_COSINE: f64 = 0.999;
/// By how much the norm of an embedding may differ from 1. It is computed in f32 of D numbers: below D x 2^-24 even where D is 1,024 and
/// every rounding goes the same way.
const NORM_TOLERANCE: f64 = 1e-3;

/// The arithmetic of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 if the device supports it (AVX-512 BF16 or AMX; NVIDIA from compute capability 8.0 on) and embeddings have a cosine of at least
    /// 0.999 to those in f32; otherwise f32. Chosen once per home for each checkpoint and set of parameters, before the first unit is made;
    /// later runs and other machines use the same.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// bfloat16, about four times as fast on processors that have it (AVX-512 BF16, AMX).
    Bf16,
    /// IEEE half precision, which the OADP reference uses on GPUs.
    F16,
}

impl Precision {
    /// The name and the tensor kind of each. `Auto` has no kind of its own.
    const KINDS: [(&str, Self, Kind); 3] =
        [("f32", Self::F32, Kind::Float), ("bf16", Self::Bf16, Kind::BFloat16), ("f16", Self::F16, Kind::Half)];
}

/// How CLIP is loaded and run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Clip {
    /// The arithmetic of the image tower; text is always encoded in f32.
    pub precision: Precision,
    /// The activation that the weights were trained with. Needed only if neither the checkpoint nor a config file in its folder names it; a
    /// wrong one gives wrong embeddings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gelu: Option<Activation>,
    /// For checkpoints with several CLIPs: the prefix of the tensor names, such as `teacher`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

/// A CLIP's weights, taken out of a checkpoint.
struct Weights<'a> {
    file: &'a CheckpointFile,
    checkpoint: Checkpoint,
    settings: Settings,
    space: Space,
}

/// The shape of a network's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputMode {
    /// Squares of the network's size, many at once.
    Squares,
    /// Images of any size, one by one: their shapes differ.
    Native,
    /// Squares with a mask of what is the object.
    Objects,
}

/// What a network is given at once: an image, a crop, or a square with the mask of an object.
pub(crate) struct View {
    pub(crate) pixels: Pixels,
    /// Of an object: the patches that are not of the object, see [`ovenbird_data::views::background`].
    pub(crate) background: Option<Vec<u8>>,
}

/// The pixels of a view.
pub(crate) enum Pixels {
    /// Decoded and cut: at the network's size, or of any size in [`InputMode::Native`].
    Ready(Image),
    /// The square of a rectangle, to be cut where the network runs: see [`Preprocess::square_of`].
    Square(Arc<Image>, [i64; 4]),
    /// The network's input itself, f32 `[3, S, S]`, in whatever way its colours are normalised. All views of a batch are, or none is.
    Input(Tensor),
}

/// Views on the device, or on their way there.
pub(crate) struct Batch {
    n_views: usize,
    pixels: BatchPixels,
    /// Of objects, `[B, G, G]`.
    backgrounds: Option<Tensor>,
}

/// The pixels of a batch.
enum BatchPixels {
    /// From 0 to 255, `[B, H, W, 3]`.
    Levels(Tensor),
    /// The network's input itself, f32 `[B, 3, H, W]`.
    Input(Tensor),
}

/// Embeddings that an accelerator may still be computing. A processor has them at once.
pub(crate) struct Pending(Tensor);

impl Pending {
    /// Embeddings of the batch's views, `[N, D]` row by row; waits for them.
    pub(crate) fn rows(self) -> Vec<f32> {
        let embeddings = self.0.to_device(Device::Cpu).contiguous();
        let mut rows = vec![0.0; embeddings.numel()];
        embeddings.copy_data(&mut rows, embeddings.numel());
        rows
    }
}

/// A loaded image tower with its preprocessing.
pub(crate) struct Encoder {
    clip: clip::Clip,
    /// The checkpoint's file, for messages.
    origin: PathBuf,
    /// The embedding space.
    pub(crate) space: Space,
    pub(crate) preprocess: Preprocess,
    mode: InputMode,
    /// Whether embeddings have unit norm; otherwise they are the network's outputs as they are.
    normalises: bool,
    /// `f32`, `bf16` or `f16`.
    pub(crate) precision: &'static str,
    /// `[1, 3, 1, 1]`, f32, on the device.
    mean: Tensor,
    std: Tensor,
}

impl Clip {
    /// Loads both towers in f32, for text.
    pub(crate) fn load_text(&self, file: &CheckpointFile, device: Device, cx: &Context<'_>) -> Result<(clip::Clip, Space)> {
        let weights = self.weights(file, cx)?;
        Ok((weights.load(device, Kind::Float)?, weights.space))
    }

    /// Loads the image tower for a stage.
    pub(crate) fn load(&self, file: &CheckpointFile, mode: InputMode, cx: &Context<'_>) -> Result<Encoder> {
        let weights = self.weights(file, cx)?;
        let load = |precision: Precision| -> Result<Encoder> {
            let found = Precision::KINDS.iter().find(|(_, known, _)| *known == precision);
            let (name, _, kind) = found.expect("BUG: `auto` is settled before");
            Ok(Encoder::new(weights.load(cx.device, *kind)?, weights.space, &file.file.path, mode, name))
        };
        if cx.is_light() && (self.precision == Precision::F16 || self.precision == Precision::Bf16 && !cx.has_bf16) {
            cx.note("a dry run on the CPU: computes in f32, since half precision is slow here");
            return load(Precision::F32);
        }
        if self.precision != Precision::Auto {
            return load(self.precision);
        }
        let item_key = cx.units.first().and_then(|unit| unit.item_key).expect("BUG: stages that embed images have units that hold items");
        // Networks that were compared need not be loaded again.
        let (mut compared, mut why) = (Vec::new(), "as chosen earlier in this home".to_owned());
        let chosen = cx.store.choice(cx.kind, &item_key, PRECISION, || -> Result<String> {
            if !cx.has_bf16 {
                why = "the device has no bf16".into();
                return Ok("f32".into());
            }
            let (single, half) = (load(Precision::F32)?, load(Precision::Bf16)?);
            let cosine = least_cosine(&single, &half)?;
            compared = vec![single, half];
            let keeps = cosine >= LEAST_COSINE;
            why = format!("the device has bf16, with a cosine of {cosine:.5} to f32; at least {LEAST_COSINE} is required");
            Ok(if keeps { "bf16" } else { "f32" }.into())
        })?;
        let known = Precision::KINDS.iter().find(|(name, ..)| *name == chosen).map(|(_, precision, _)| *precision);
        let precision = known.ok_or_else(|| Error::Input {
            port: "clip.precision",
            problem: format!("this home chose `{chosen}`, which this program does not know"),
            hint: "update ovenbird, or say which: `with: {clip: {precision: f32}}`".into(),
        })?;
        cx.note(format!("computes in {chosen}: {why}"));
        if precision == Precision::Bf16 && !cx.has_bf16 {
            cx.note("the device has no bf16 and emulates it many times slower: use a device that has it");
        }
        match compared.into_iter().find(|encoder| encoder.precision == chosen) {
            Some(encoder) => Ok(encoder),
            None => load(precision),
        }
    }

    /// The weights of the CLIP at `prefix`; notes which tensors of the file are not used.
    fn weights<'a>(&self, file: &'a CheckpointFile, cx: &Context<'_>) -> Result<Weights<'a>> {
        let (weights, notes) = self.read(file)?;
        for words in notes {
            cx.note(format!("{}: {words}", file.file.path.display()));
        }
        Ok(weights)
    }

    /// Fails where a checkpoint has no CLIP that these parameters choose.
    pub fn check(&self, file: &CheckpointFile) -> Result<()> {
        let (Weights { checkpoint, settings, .. }, _) = self.read(file)?;
        layout::architecture(checkpoint.tensors(), &file.file.path, &settings)?;
        Ok(())
    }

    /// The weights of the CLIP at `prefix`, and notes: its activation, and which tensors of the file are not used.
    fn read<'a>(&self, file: &'a CheckpointFile) -> Result<(Weights<'a>, Vec<String>)> {
        let (checkpoint, path) = (read_weights(&file.file)?, &file.file.path);
        let place = layout::place(checkpoint.tensors(), self.prefix.as_deref(), path)?;
        let checkpoint = checkpoint.at(&place);
        let settings = activation::settle(self.gelu, file, &checkpoint)?;
        let normalised = layout::normalise(checkpoint.tensors(), path)?;
        let activation = settings.activation.as_ref().map(|found| format!("activation `{}`, from {}", found.value.name(), found.source));
        let notes = activation.into_iter().chain(place.note()).chain(normalised.notes()).collect();
        let space = Space::of(&normalised.tensors, normalised.layout.projections);
        Ok((Weights { file, space, checkpoint, settings }, notes))
    }
}

impl Weights<'_> {
    fn load(&self, device: Device, kind: Kind) -> Result<clip::Clip> {
        Ok(clip::Clip::load(self.checkpoint.tensors(), &self.file.file.path, self.settings.clone(), device, kind)?)
    }
}

/// The least cosine between the embeddings of four test patterns by two networks.
fn least_cosine(one: &Encoder, other: &Encoder) -> Result<f64> {
    let side = one.preprocess.side_px;
    let pattern = |n: u32| {
        let level = move |x: u32, y: u32, channel: u32| ((x * (n + channel) + y * (5 - n) + (x / 16 + y / 16) * 64) % 256) as u8;
        let rgb = (0..side).flat_map(|y| (0..side).flat_map(move |x| (0..3).map(move |channel| level(x, y, channel)))).collect();
        let n_cells = one.object_grid().unwrap_or(0).pow(2);
        View {
            pixels: Pixels::Ready(Image { width: side, height: side, rgb }),
            background: Some((0..n_cells).map(|cell| u8::from(cell % 3 > 0)).collect()),
        }
    };
    let views: Vec<View> = (1..=4).map(pattern).collect();
    let embed = |encoder: &Encoder| -> Result<Vec<f32>> {
        let mut rows = Vec::new();
        for views in views.chunks(encoder.batch()) {
            rows.extend(encoder.begin(&encoder.upload(views))?.rows());
        }
        Ok(rows)
    };
    let (exact, rounded) = (embed(one)?, embed(other)?);
    if let Some(problem) = embedding_problem(&exact, one.dim()) {
        return Err(one.unsound(&format!("a test pattern: {problem}")));
    }
    let cosine = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosines = exact.chunks_exact(one.dim()).zip(rounded.chunks_exact(one.dim())).map(cosine);
    // NaN counts as no similarity.
    Ok(cosines.map(|cosine| if cosine.is_nan() { f64::NEG_INFINITY } else { cosine }).fold(1.0, f64::min))
}

/// Describes the first of some embeddings `[N, D]` whose norm is not 1; `None` if all are sound.
fn embedding_problem(embeddings: &[f32], dim: usize) -> Option<String> {
    let n = embeddings.len() / dim.max(1);
    embeddings.chunks_exact(dim.max(1)).enumerate().find_map(|(row, embedding)| {
        let norm = embedding.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
        let is_sound = (norm - 1.0).abs() <= NORM_TOLERANCE;
        (!is_sound).then(|| format!("expected an embedding of norm 1, found norm {norm} (embedding {} of {n})", row + 1))
    })
}

/// Cuts squares out of images for a network.
#[derive(Clone, Copy)]
pub(crate) struct Cropper {
    preprocess: Preprocess,
    /// Whether squares are cut on the accelerator, which has the whole image; threads then only pass the rectangles.
    is_on_device: bool,
}

impl Cropper {
    /// The side of the network's squares, in px.
    pub(crate) fn side_px(&self) -> u32 {
        self.preprocess.side_px
    }

    /// The square of a rectangle: see [`Preprocess::square_of`].
    pub(crate) fn square(&self, image: &Arc<Image>, rectangle: [i64; 4]) -> Pixels {
        if self.is_on_device {
            Pixels::Square(Arc::clone(image), rectangle)
        } else {
            Pixels::Ready(self.preprocess.square_of(image, rectangle))
        }
    }
}

/// How images are prepared for a CLIP.
pub(crate) fn preprocess_of(clip: &clip::Clip) -> Preprocess {
    let architecture::Preprocessing { image_side, resize, mean, std } = clip.preprocessing();
    let resize = match resize {
        ResizeMode::Shortest => SquareResize::Shortest,
        ResizeMode::Squash => SquareResize::Squash,
    };
    Preprocess { side_px: image_side as u32, resize, mean, std }
}

impl Encoder {
    fn new(clip: clip::Clip, space: Space, origin: &Path, mode: InputMode, precision: &'static str) -> Self {
        let preprocess = preprocess_of(&clip);
        let channels = |numbers: &[f32; 3]| Tensor::from_slice(numbers).view([1, 3, 1, 1]).to_device(clip.device());
        let (mean, std) = (channels(&preprocess.mean), channels(&preprocess.std));
        Self { clip, origin: origin.to_owned(), space, preprocess, mode, normalises: true, precision, mean, std }
    }

    /// The same, with embeddings as the network computes them, without unit norm.
    pub(crate) fn unnormalised(self) -> Self {
        Self { normalises: false, ..self }
    }

    /// Describes the first of some embeddings `[N, D]` of this network that is not sound; `None` if all are.
    pub(crate) fn problem(&self, embeddings: &[f32]) -> Option<String> {
        if self.normalises {
            return embedding_problem(embeddings, self.dim());
        }
        let n = embeddings.len() / self.dim();
        embeddings.chunks_exact(self.dim()).enumerate().find_map(|(row, embedding)| {
            let is_sound = embedding.iter().all(|number| number.is_finite()) && embedding.iter().any(|number| *number != 0.0);
            (!is_sound).then(|| format!("expected finite numbers, not all 0, found others (embedding {} of {n})", row + 1))
        })
    }

    /// The error that embeddings are not unit vectors.
    pub(crate) fn unsound(&self, problem: &str) -> Error {
        let hint = "look at the checkpoint and at the image: `ovenbird doctor --clip FILE` tests the checkpoint".into();
        let problem = format!("{problem}; computed in {}", self.precision);
        ovenbird_models::Error::Malformed { path: self.origin.clone(), problem, hint: Some(hint) }.into()
    }

    /// Cuts squares for this network.
    pub(crate) fn cropper(&self) -> Cropper {
        Cropper { preprocess: self.preprocess, is_on_device: self.clip.device() != Device::Cpu }
    }

    /// The dimension D of embeddings.
    pub(crate) fn dim(&self) -> usize {
        self.clip.embed_dim() as usize
    }

    /// The least side of an image that the network accepts at its own size, in px.
    pub(crate) fn least_side(&self) -> u32 {
        self.clip.least_side() as u32
    }

    /// The side of the grid of object masks; `None` for a ResNet.
    pub(crate) fn object_grid(&self) -> Option<usize> {
        self.clip.object_grid().map(|side| side as usize)
    }

    /// Views per forward pass.
    pub(crate) fn batch(&self) -> usize {
        match self.mode {
            InputMode::Squares => SQUARES,
            InputMode::Native => 1,
            InputMode::Objects => OBJECTS,
        }
    }

    /// Puts views on the device as a batch, filled up to its size.
    pub(crate) fn upload(&self, views: &[View]) -> Batch {
        no_grad(|| Batch {
            n_views: views.len(),
            pixels: self.input(views).map_or_else(|| BatchPixels::Levels(self.levels(views)), BatchPixels::Input),
            backgrounds: (self.mode == InputMode::Objects).then(|| self.backgrounds(views)),
        })
    }

    /// Begins to compute the embeddings of a batch.
    pub(crate) fn begin(&self, batch: &Batch) -> Result<Pending> {
        no_grad(|| {
            let pixels = match &batch.pixels {
                BatchPixels::Levels(levels) => self.normalised(levels),
                BatchPixels::Input(input) => input.shallow_clone(),
            };
            let pixels = pixels.to_kind(self.clip.kind());
            let embeddings = match &batch.backgrounds {
                None => self.clip.encode_image(&pixels, Phase::Test)?,
                Some(backgrounds) => self.clip.encode_objects(&pixels, backgrounds)?,
            };
            let embeddings = embeddings.to_kind(Kind::Float);
            let embeddings = if self.normalises { to_unit_length(&embeddings) } else { embeddings };
            Ok(Pending(embeddings.narrow(0, 0, batch.n_views as i64)))
        })
    }

    /// The network's input on the device, of views that are such, filled up with zeros.
    fn input(&self, views: &[View]) -> Option<Tensor> {
        let inputs = views.iter().map(|view| if let Pixels::Input(input) = &view.pixels { Some(input) } else { None });
        let inputs: Vec<&Tensor> = inputs.collect::<Option<_>>()?;
        let n_missing = (self.batch() - views.len()) as i64;
        Some(Tensor::stack(&inputs, 0).constant_pad_nd([0, 0, 0, 0, 0, 0, 0, n_missing]).to_device(self.clip.device()))
    }

    /// Levels `[B, H, W, 3]` on the device: of images that are ready, and of squares that are cut there.
    fn levels(&self, views: &[View]) -> Tensor {
        let (device, mut parts) = (self.clip.device(), Vec::new());
        let alike = |one: &View, other: &View| match (&one.pixels, &other.pixels) {
            (Pixels::Ready(_), Pixels::Ready(_)) => true,
            (Pixels::Square(one, _), Pixels::Square(other, _)) => Arc::ptr_eq(one, other),
            _ => false,
        };
        for group in views.chunk_by(alike) {
            let ready = group.iter().filter_map(|view| if let Pixels::Ready(image) = &view.pixels { Some(image) } else { None });
            let ready: Vec<&Image> = ready.collect();
            if let Some(Image { width, height, .. }) = ready.first() {
                assert!(
                    ready.iter().all(|image| (&image.width, &image.height) == (width, height)),
                    "BUG: views of different sizes in a batch"
                );
                let levels = ready.iter().map(|image| &image.rgb[..]).collect::<Vec<_>>().concat();
                let shape = [ready.len() as i64, i64::from(*height), i64::from(*width), 3];
                parts.push(on_device::upload(&levels, device).view(shape));
            } else if let Pixels::Square(image, _) = &group[0].pixels {
                let rectangle = |view: &View| if let Pixels::Square(_, rectangle) = view.pixels { Some(rectangle) } else { None };
                let rectangles: Vec<[i64; 4]> = group.iter().filter_map(rectangle).collect();
                parts.push(on_device::squares(&self.preprocess, image, &rectangles, device));
            }
        }
        let levels = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) };
        match self.batch() - views.len() {
            0 => levels,
            n_missing => levels.constant_pad_nd([0, 0, 0, 0, 0, 0, 0, n_missing as i64]),
        }
    }

    /// Levels `[B, H, W, 3]` as the network's input `[B, 3, H, W]`: v / 255, minus mean, divided by std, each rounded to f32.
    fn normalised(&self, levels: &Tensor) -> Tensor {
        let mut pixels = levels.permute([0, 3, 1, 2]).to_kind(Kind::Float).contiguous();
        pixels = pixels.g_div_scalar_(255.0);
        pixels = pixels.g_sub_(&self.mean);
        pixels.g_div_(&self.std)
    }

    fn backgrounds(&self, views: &[View]) -> Tensor {
        let grid = self.object_grid().expect("BUG: only transformers are asked for objects");
        let mut cells: Vec<u8> = Vec::with_capacity(self.batch() * grid * grid);
        for view in views {
            cells.extend_from_slice(view.background.as_ref().expect("BUG: an object has a mask"));
        }
        cells.resize(self.batch() * grid * grid, 0);
        on_device::upload(&cells, self.clip.device()).view([self.batch() as i64, grid as i64, grid as i64])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ovenbird_data::toy::{Set, World};
    use ovenbird_models::clip::{Config, ImageConfig, TextConfig};
    use tch::nn;

    use super::*;

    fn encoder(mode: InputMode) -> Encoder {
        let config = Config {
            embed_dim: 32,
            image: ImageConfig::Vit { image_side: 64, patch: 16, width: 64, depth: 2, heads: 2, mlp_width: 128 },
            text: TextConfig { context: 8, vocabulary: 50, width: 32, heads: 1, depth: 1 },
            activation: Activation::QuickGelu,
        };
        let weights = nn::VarStore::new(Device::Cpu);
        clip::Clip::new(&weights.root(), &config, 3).unwrap();
        let tensors: BTreeMap<String, Tensor> = weights.variables().into_iter().collect();
        let network = clip::Clip::load_as(&config, &tensors, "clip".as_ref(), Device::Cpu, Kind::Float).unwrap();
        Encoder::new(network, Space::of(&tensors, layout::CLIP_PROJECTIONS), Path::new("clip.pt"), mode, "f32")
    }

    #[test]
    fn an_image_of_the_least_side_can_be_shown_and_a_smaller_one_cannot() {
        let resnet = ImageConfig::ResNet { image_side: 64, width: 8, layers: [1, 1, 1, 1], heads: 4 };
        let vit = ImageConfig::Vit { image_side: 64, patch: 16, width: 64, depth: 1, heads: 2, mlp_width: 128 };
        for image in [resnet, vit] {
            let text = TextConfig { context: 8, vocabulary: 50, width: 32, heads: 1, depth: 1 };
            let config = Config { embed_dim: 32, image, text, activation: Activation::QuickGelu };
            let weights = nn::VarStore::new(Device::Cpu);
            clip::Clip::new(&weights.root(), &config, 3).unwrap();
            let tensors: BTreeMap<String, Tensor> = weights.variables().into_iter().collect();
            let network = clip::Clip::load_as(&config, &tensors, "clip".as_ref(), Device::Cpu, Kind::Float).unwrap();
            let encoder =
                Encoder::new(network, Space::of(&tensors, layout::CLIP_PROJECTIONS), Path::new("clip.pt"), InputMode::Native, "f32");
            let least = encoder.least_side();
            let shown = |[width, height]: [u32; 2]| {
                let rgb = vec![90; 3 * width as usize * height as usize];
                let view = View { pixels: Pixels::Ready(Image { width, height, rgb }), background: None };
                encoder.begin(&encoder.upload(&[view])).is_ok()
            };
            assert!(shown([least, 70]) && shown([70, least]), "{:?}", config.image);
            assert!(!shown([least - 1, 70]) && !shown([70, least - 1]), "{:?}", config.image);
        }
    }

    fn embed(encoder: &Encoder, views: &[View]) -> Vec<f32> {
        encoder.begin(&encoder.upload(views)).unwrap().rows()
    }

    /// Pillow decodes with libjpeg-turbo; the pictures are those of `tests/golden/images/make.py`.
    #[test]
    fn what_decoders_differ_by_does_not_change_embeddings() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/images");
        let encoder = encoder(InputMode::Squares);
        let mut n_levels = 0;
        for name in ["half.jpg", "full.jpg", "progressive.jpg", "grey.jpg", "cmyk.jpg", "exif.jpg"] {
            let ours = Image::open(&folder.join(name)).unwrap();
            let pillow_s = Image::open(&folder.join(format!("pillow/{name}.png"))).unwrap();
            n_levels += ours.rgb.iter().zip(&pillow_s.rgb).filter(|(one, other)| one != other).count();
            let view = |image: &Image| View { pixels: Pixels::Ready(encoder.preprocess.square(image)), background: None };
            let embeddings = embed(&encoder, &[view(&ours), view(&pillow_s)]);
            let (one, other) = embeddings.split_at(32);
            let cosine: f32 = one.iter().zip(other).map(|(a, b)| a * b).sum();
            assert!(cosine >= 0.9995, "{name}: {cosine}");
        }
        assert!(n_levels > 0, "the decoders agree: this test shows nothing");
    }

    /// Cosines are those of the documentation of `resize: draft`, 0.98 at the least. Processors add the products of a patch and a filter in
    /// other orders: 16 x 16 x 3 summands, so some 768 x 2^-24 = 5e-5 of an embedding, and less than 1e-3 of a cosine after both blocks.
    /// Another scene has to be further away than that.
    #[test]
    fn drafts_keep_what_embeddings_say() {
        let encoder = encoder(InputMode::Squares);
        let world = World { seed: 5, side_px: 320 };
        let mut views = Vec::new();
        for index in 0..5 {
            let path = Path::new("scene.jpg");
            let jpeg = world.scene(Set::Val, index).jpeg;
            let image = Image::decode(&jpeg, path).unwrap();
            let size = [image.width, image.height];
            let draft = Image::decode_draft(&jpeg, path, size, encoder.preprocess.side_px).unwrap();
            assert!(
                draft.width <= image.width.div_ceil(2) && draft.height <= image.height.div_ceil(2),
                "{} x {}",
                draft.width,
                draft.height
            );
            let squares = [encoder.preprocess.square(&image), encoder.preprocess.square_of_draft(&draft, size)];
            assert_ne!(squares[0], squares[1], "{index}: the draft was not used");
            views.extend(squares.map(|pixels| View { pixels: Pixels::Ready(pixels), background: None }));
        }
        let embeddings = embed(&encoder, &views);
        let rows: Vec<&[f32]> = embeddings.chunks_exact(32).collect();
        let cosine = |one: usize, other: usize| -> f32 { rows[one].iter().zip(rows[other]).map(|(a, b)| a * b).sum() };
        for square in (0..10).step_by(2) {
            let own = cosine(square, square + 1);
            let nearest = (0..10).step_by(2).filter(|other| *other != square).map(|other| cosine(other, square + 1)).fold(-1.0, f32::max);
            assert!(own >= 0.98 - 1e-3 && own > nearest + 1e-3, "{square}: {own}, to another scene {nearest}");
        }
    }

    /// A square's levels and the network's input made of them, in a batch that is filled up.
    #[test]
    fn an_input_that_is_given_is_used_as_it_is() {
        let encoder = encoder(InputMode::Squares);
        let image = Image { width: 64, height: 64, rgb: (0..3 * 64 * 64_u32).map(|index| (index * 31 % 251) as u8).collect() };
        let mut numbers = vec![0.0; encoder.preprocess.n_numbers()];
        encoder.preprocess.normalise(&image, &mut numbers);
        let input = Tensor::from_slice(&numbers).view([3, 64, 64]);
        let view = |pixels| View { pixels, background: None };
        let [levels, given] = [Pixels::Ready(image), Pixels::Input(input)].map(|pixels| embed(&encoder, &[view(pixels)]));
        assert!(levels.len() == 32 && levels.iter().zip(&given).all(|(one, other)| (one - other).abs() < 1e-5));
    }

    /// The path that accelerators take, on the CPU.
    #[test]
    fn objects_cut_on_the_device_are_those_cut_by_threads() {
        let encoder = encoder(InputMode::Objects);
        let rgb =
            (0..150 * 90 * 3_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 / 4 + (index / 450 % 3 * 60) as u8).collect();
        let image = Arc::new(Image { width: 150, height: 90, rgb });
        let views = |is_on_device: bool| -> Vec<View> {
            let cropper = Cropper { preprocess: encoder.preprocess, is_on_device };
            let rectangles = [[0, 0, 90, 90], [-20, -30, 120, 110], [100, 40, 131, 71]];
            let view = |(n, rectangle): (usize, [i64; 4])| View {
                pixels: cropper.square(&image, rectangle),
                background: Some((0..64).map(|cell| u8::from(cell % (n + 2) > 0)).collect()),
            };
            rectangles.into_iter().enumerate().map(view).collect()
        };
        let (threads, device) = (embed(&encoder, &views(false)), embed(&encoder, &views(true)));
        assert_eq!((threads.len(), device.len()), (96, 96));
        for (one, other) in threads.chunks_exact(32).zip(device.chunks_exact(32)) {
            let cosine: f32 = one.iter().zip(other).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.9999, "{cosine}");
        }
    }
}
