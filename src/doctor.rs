//! `ovenbird doctor`: what this machine has, and what a CLIP checkpoint is and whether it works.

use std::{path::Path, thread};

use indicatif::HumanBytes;
use ovenbird_cache::inputs;
use ovenbird_models::{
    Phase,
    checkpoint::Checkpoint,
    clip::{
        Clip, Config, ImageConfig,
        layout::{self, Layout},
        tokenizer::{Overlong, Padding, Tokenizer},
    },
};
use serde::Serialize;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    cli::{print, to_json},
    error::Result,
    machine,
};

/// Lines of what was found: a name and a value.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    value: String,
}

/// Runs the command.
pub(crate) fn doctor(home: &Path, clip: Option<&Path>, json: bool) -> Result<()> {
    let mut lines = of_machine(home);
    if let Some(path) = clip {
        lines.extend(checkpoint(path)?);
    }
    if json {
        return print(&to_json("doctor", &lines));
    }
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    print(&lines.iter().map(|Line { name, value }| format!("{name:width$}  {value}\n")).collect::<String>())
}

fn of_machine(home: &Path) -> Vec<Line> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let there = home.ancestors().find(|folder| folder.exists() && !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let bf16 =
        if machine::has_bf16(Device::Cpu) { "bf16 and f32" } else { "f32; bf16 is computed by other instructions, many times slower" };
    let accelerators = match machine::n_accelerators() {
        Some(n) => format!("{n} that libtorch sees"),
        None => "libtorch's CUDA part is not here; `CUDA=1 make libtorch`, and build again, to have it".into(),
    };
    let line = |name, value| Line { name, value };
    vec![
        line("program", format!("ovenbird {}, libtorch {}", env!("CARGO_PKG_VERSION"), ovenbird_models::LIBTORCH)),
        line("processor", format!("{}, {cores} cores", machine::processor())),
        line("arithmetic", bf16.into()),
        line("accelerators", accelerators),
        line("memory", HumanBytes(machine::total_memory()).to_string()),
        line("home", format!("{}, {} free", home.display(), HumanBytes(machine::free_space(there)))),
    ]
}

fn checkpoint(path: &Path) -> Result<Vec<Line>> {
    let checkpoint = Checkpoint::open(path).map_err(ovenbird_stages::Error::from)?;
    let tensors = checkpoint.tensors();
    let normalised = layout::normalise(tensors, path).map_err(ovenbird_stages::Error::from)?;
    let config = layout::config(tensors, path, None).map_err(ovenbird_stages::Error::from)?;
    let n_numbers: usize = normalised.tensors.values().map(Tensor::numel).sum();
    let kind = normalised.tensors.get("visual.proj").or(normalised.tensors.get("text_projection")).map(Tensor::kind);
    let digest = ovenbird_cache::files_digest(&inputs::digest_path(path, None, 0)?);
    let (layout_words, activation) = match normalised.layout {
        Layout::OpenAi => ("OpenAI's", "QuickGELU, as OpenAI trains"),
        Layout::OpenClip => {
            ("open_clip's", "exact GELU, as most of open_clip; weights of OpenAI, DFN and MetaCLIP need `clip: {gelu: quick}`")
        }
        Layout::HuggingFace => ("Hugging Face's CLIPModel", "QuickGELU; conversions of LAION's weights need `clip: {gelu: exact}`"),
    };
    let (ImageConfig::Vit { image_side: side, .. } | ImageConfig::ResNet { image_side: side, .. }) = config.image;
    let text = config.text;
    let line = |name, value| Line { name, value };
    let mut lines = vec![
        line("checkpoint", format!("{}, {}, {digest}", path.display(), HumanBytes(std::fs::metadata(path).map_or(0, |file| file.len())))),
        line("layout", format!("{layout_words} names")),
        line("image tower", image_words(&config)),
        line("text tower", format!("{} blocks of width {}, {} heads, context {}", text.depth, text.width, text.heads, text.context)),
        line("embedding", format!("{} numbers", config.embed_dim)),
        line("activation", activation.into()),
        line(
            "parameters",
            format!("{:.1} M, stored in {}", n_numbers as f64 / 1e6, kind.map_or_else(|| "?".into(), |kind| format!("{kind:?}"))),
        ),
        line(
            "preprocessing",
            format!(
                "short side to {side} px (antialiased bicubic, 8 bits), centre square, RGB / 255, minus mean, by standard deviation (OpenAI's)"
            ),
        ),
    ];
    lines.extend(self_test(&config, tensors, path)?);
    Ok(lines)
}

/// What the sizes are called, where they have a name.
fn image_words(config: &Config) -> String {
    match &config.image {
        ImageConfig::Vit { image_side, patch, width, depth, heads, .. } => {
            let name = match (width, depth) {
                (768, 12) => "ViT-B",
                (1024, 24) => "ViT-L",
                (1280, 32) => "ViT-H",
                _ => "ViT",
            };
            format!("{name}/{patch} at {image_side} px: {depth} blocks of width {width}, {heads} heads")
        }
        ImageConfig::ResNet { image_side, layers, width, heads } => {
            let name = match (layers, width) {
                ([3, 4, 6, 3], 64) => "RN50",
                ([3, 4, 23, 3], 64) => "RN101",
                ([4, 6, 10, 6], 80) => "RN50x4",
                ([6, 8, 18, 8], 96) => "RN50x16",
                _ => "ModifiedResNet",
            };
            format!("{name} at {image_side} px: {layers:?} bottlenecks of width {width}, {heads} heads in the pooling")
        }
    }
}

/// Embeds two patterns and two texts; what is said can be compared from machine to machine.
fn self_test(config: &Config, tensors: &std::collections::BTreeMap<String, Tensor>, path: &Path) -> Result<Vec<Line>> {
    let load = |kind: Kind| Clip::load_as(config, tensors, path, Device::Cpu, kind).map_err(ovenbird_stages::Error::from);
    let (ImageConfig::Vit { image_side: side, .. } | ImageConfig::ResNet { image_side: side, .. }) = config.image;
    let wave = |period: f64| {
        let ramp = Tensor::arange(side, (Kind::Float, Device::Cpu)) * (std::f64::consts::TAU / period);
        (ramp.sin().unsqueeze(0) + ramp.cos().unsqueeze(1)).expand([3, side, side], false).contiguous()
    };
    let images = Tensor::stack(&[wave(16.0), wave(90.0)], 0);
    let tokens = Tokenizer::new().batch(&["a photo of a cat.", "a photo of a dog."], Padding::Context77, Overlong::Refuse);
    let tokens = tokens.map_err(ovenbird_stages::Error::from)?;
    no_grad(|| {
        let (single, half) = (load(Kind::Float)?, load(Kind::BFloat16)?);
        let embed = |clip: &Clip| -> Result<Tensor> {
            Ok(clip.encode_image_features(&images, Phase::Test).map_err(ovenbird_stages::Error::from)?.to_kind(Kind::Float))
        };
        let (exact, rounded) = (embed(&single)?, embed(&half)?);
        let texts = single.encode_text_features(&tokens).map_err(ovenbird_stages::Error::from)?;
        let cosine = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Double).double_value(&[]);
        let is_finite = exact.isfinite().all().int64_value(&[]) == 1 && texts.isfinite().all().int64_value(&[]) == 1;
        let agree = (0..2).map(|row| cosine(&exact.get(row), &rounded.get(row))).fold(1.0, f64::min);
        let line = |name, value| Line { name, value };
        Ok(vec![
            line(
                "self-test",
                (if is_finite { "every number is finite" } else { "FAILED: embeddings hold numbers that are not finite" }).into(),
            ),
            line("  images", format!("cosine {:.5} between two patterns", cosine(&exact.get(0), &exact.get(1)))),
            line(
                "  texts",
                format!("cosine {:.5} between `a photo of a cat.` and `a photo of a dog.`", cosine(&texts.get(0), &texts.get(1))),
            ),
            line("  bf16", format!("cosine at least {agree:.5} to f32")),
        ])
    })
}
