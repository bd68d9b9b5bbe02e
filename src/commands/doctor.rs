//! `ovenbird doctor`: describes the machine, and describes and tests a CLIP checkpoint.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread,
};

use indicatif::HumanBytes;
use ovenbird_cache::inputs;
use ovenbird_models::{
    Phase,
    checkpoint::{Checkpoint, not_finite},
    clip::{
        Activation, Clip,
        architecture::{Architecture, Preprocessing, ResizeMode},
        layout,
        settings::{Settings, Sourced},
        tokenizer::Overlong,
    },
};
use ovenbird_stages::{Artifact as _, Error as StageError, artifacts::CheckpointFile, clip::activation};
use serde::Serialize;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::Result,
    machine,
    output::{print, to_json},
};

/// Only its mean and standard deviation are compared.
const OPENAI: Preprocessing = Preprocessing::openai(224);

/// Describe this machine, and describe and test a CLIP checkpoint
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A checkpoint of OpenAI, open_clip or Hugging Face, or its folder with the config file
    #[arg(long, value_name = "FILE")]
    clip: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A line of the output.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    value: String,
}

/// Fails, after printing everything, where a checkpoint does not pass its self-test.
pub(crate) fn doctor(home: &Path, Args { clip, json }: &Args) -> Result<()> {
    let mut lines = of_machine(home);
    let failure = match clip {
        Some(path) => {
            let (of_checkpoint, failure) = checkpoint(path)?;
            lines.extend(of_checkpoint);
            failure
        }
        None => None,
    };
    if *json {
        print(&to_json("doctor", &lines))?;
    } else {
        let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
        print(&lines.iter().map(|Line { name, value }| format!("{name:width$}  {value}\n")).collect::<String>())?;
    }
    failure.map_or(Ok(()), |failure| Err(failure.into()))
}

fn of_machine(home: &Path) -> Vec<Line> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let existing = home.ancestors().find(|folder| folder.exists() && !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let bf16 = if machine::has_bf16(Device::Cpu) { "bf16 and f32" } else { "f32; bf16 is emulated, many times slower" };
    let accelerators = match machine::n_accelerators() {
        Some(n) => format!("{n} visible to libtorch"),
        None => "libtorch has no CUDA support here; run `CUDA=1 make libtorch` and build again to add it".into(),
    };
    let line = |name, value| Line { name, value };
    vec![
        line("program", format!("ovenbird {}, libtorch {}", env!("CARGO_PKG_VERSION"), ovenbird_models::LIBTORCH)),
        line("processor", format!("{}, {cores} cores", machine::processor())),
        line("arithmetic", bf16.into()),
        line("accelerators", accelerators),
        line("memory", HumanBytes(machine::total_memory()).to_string()),
        line("home", format!("{}, {} free", home.display(), HumanBytes(machine::free_space(existing)))),
    ]
}

/// Describes and tests a checkpoint; the second value says why it does not work, if it does not.
fn checkpoint(path: &Path) -> Result<(Vec<Line>, Option<StageError>)> {
    let files = inputs::digest_path(path, None, 0)?;
    let file = CheckpointFile::open(&files)?;
    let checkpoint = Checkpoint::open(&file.file.path).map_err(StageError::from)?;
    let place = layout::place(checkpoint.tensors(), None, &file.file.path).map_err(StageError::from)?;
    let checkpoint = checkpoint.at(&place);
    let tensors = checkpoint.tensors();
    let normalised = layout::normalise(tensors, &file.file.path).map_err(StageError::from)?;
    let settings = activation::stated(&file, &checkpoint)?;
    let (settings, activation) = match &settings.activation {
        Some(Sourced { value, source }) => (settings.clone(), format!("{value}: {source}")),
        None => (
            Settings { activation: Settings::from(Activation::QuickGelu).activation, ..settings },
            format!("the file cannot tell: a pipeline has to say {}; tested here with QuickGELU", activation::how_to_say(&file)),
        ),
    };
    let architecture = layout::architecture(tensors, &file.file.path, &settings).map_err(StageError::from)?;
    let n_numbers: usize = normalised.tensors.values().map(Tensor::numel).sum();
    let kind = normalised.tensors.get("visual.proj").or(normalised.tensors.get("text_projection")).map(Tensor::kind);
    let [image_words, text_words] = architecture.describe();
    let Preprocessing { image_side: side, resize, mean, std } = architecture.preprocessing();
    let square = match resize {
        ResizeMode::Shortest => format!("short side to {side} px (antialiased bicubic, 8 bits), centre square"),
        ResizeMode::Squash => format!("both sides to {side} px (antialiased bicubic, 8 bits)"),
    };
    let whose = if (mean, std) == (OPENAI.mean, OPENAI.std) { "OpenAI's".into() } else { format!("{mean:?} and {std:?}") };
    let line = |name, value| Line { name, value };
    let mut lines = vec![
        line(
            "checkpoint",
            format!(
                "{}, {}, {}",
                path.display(),
                HumanBytes(files.iter().map(|file| file.bytes).sum()),
                ovenbird_cache::files_digest(&files)
            ),
        ),
        line("layout", format!("{} names", normalised.layout.name)),
        line("image tower", image_words),
        line("text tower", text_words),
        line("embedding", format!("{} numbers", architecture.embed_dim())),
        line("activation", activation),
        line(
            "parameters",
            format!("{:.1} M, stored in {}", n_numbers as f64 / 1e6, kind.map_or_else(|| "?".into(), |kind| format!("{kind:?}"))),
        ),
        line("preprocessing", format!("{square}, RGB / 255, minus mean, by standard deviation ({whose})")),
    ];
    lines.extend(place.note().into_iter().chain(normalised.notes()).map(|words| line("note", words)));
    let broken: Vec<&str> =
        normalised.tensors.iter().filter(|(_, tensor)| not_finite(tensor).is_some()).map(|(name, _)| name.as_str()).collect();
    let (of_test, failure) = if broken.is_empty() {
        self_test(&architecture, tensors, &file.file.path)?
    } else {
        let problem = format!("NaN or infinity in {}", broken.join(", "));
        (vec![line("self-test", format!("FAILED: {problem}"))], Some(problem))
    };
    lines.extend(of_test);
    let failure = failure.map(|problem| {
        StageError::Models(ovenbird_models::Error::Malformed {
            path: file.file.path.clone(),
            problem: format!("the self-test failed: {problem}"),
            hint: Some("use another checkpoint: download it again, or take one from before its training diverged".into()),
        })
    });
    Ok((lines, failure))
}

/// Embeds two patterns and two texts; the numbers can be compared between machines. The second value says what is wrong, if anything.
fn self_test(architecture: &Architecture, tensors: &BTreeMap<String, Tensor>, path: &Path) -> Result<(Vec<Line>, Option<String>)> {
    let load = |kind: Kind| Clip::load_as(architecture, tensors, path, Device::Cpu, kind).map_err(StageError::from);
    let side = architecture.preprocessing().image_side;
    let wave = |period: f64| {
        let ramp = Tensor::arange(side, (Kind::Float, Device::Cpu)) * (std::f64::consts::TAU / period);
        (ramp.sin().unsqueeze(0) + ramp.cos().unsqueeze(1)).expand([3, side, side], false).contiguous()
    };
    let images = Tensor::stack(&[wave(16.0), wave(90.0)], 0);
    no_grad(|| {
        let (single, half) = (load(Kind::Float)?, load(Kind::BFloat16)?);
        let tokens = single.tokenizer().batch(&["a photo of a cat.", "a photo of a dog."], Overlong::Refuse).map_err(StageError::from)?;
        let embed = |clip: &Clip| -> Result<Tensor> {
            Ok(clip.encode_image_features(&images, Phase::Test).map_err(StageError::from)?.to_kind(Kind::Float))
        };
        let (exact, rounded) = (embed(&single)?, embed(&half)?);
        let texts = single.encode_text_features(&tokens).map_err(StageError::from)?;
        let cosine = |a: &Tensor, b: &Tensor| (a * b).sum(Kind::Double).double_value(&[]);
        let agree = [0, 1].map(|row| cosine(&exact.get(row), &rounded.get(row)));
        // Embeddings of nothing but zeros have no unit length: they come as NaN.
        let broken: Vec<&str> = [("image", &exact), ("text", &texts), ("bf16 image", &rounded)]
            .into_iter()
            .filter(|(_, rows)| rows.isfinite().all().int64_value(&[]) == 0)
            .map(|(name, _)| name)
            .collect();
        let failure = (!broken.is_empty()).then(|| format!("{} embeddings are zero or not finite", broken.join(", ")));
        let line = |name, value| Line { name, value };
        let lines = vec![
            line("self-test", failure.as_ref().map_or_else(|| "every number is finite".into(), |problem| format!("FAILED: {problem}"))),
            line("  images", format!("cosine {:.5} between two patterns", cosine(&exact.get(0), &exact.get(1)))),
            line(
                "  texts",
                format!("cosine {:.5} between `a photo of a cat.` and `a photo of a dog.`", cosine(&texts.get(0), &texts.get(1))),
            ),
            // `f64::min` would leave NaN out.
            line("  bf16", format!("cosine at least {:.5} to f32", if agree[0] >= agree[1] { agree[1] } else { agree[0] })),
        ];
        Ok((lines, failure))
    })
}
