//! Two-stage detectors as stages: trained ([`Train`]), asked what they see ([`Test`]), written for other programs ([`Export`]). Written after
//! ViLD (Gu et al. 2022) and OADP (methods, section 6).
//!
//! A trained detector's file says how it is built and asked ([`Card`]), so that nothing has to be repeated where it is used.

mod export;
mod import;
mod learner;
mod oln;
mod select;
mod test;
mod train;
mod training;

use std::{ops::Range, path::Path};

use ovenbird_cache::inputs::InputFile;
use ovenbird_data::{
    annotations::{Annotations, ImageInfo},
    classes::ClassSplit,
    images::Image,
    training::Placement,
};
use ovenbird_models::{
    checkpoint::Checkpoint,
    detection::boxes::ImageSize,
    rcnn::{
        Config,
        classifier::{LogitScale, Vocabulary},
    },
    to_unit_length,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tch::{Device, Kind, Tensor};

use self::training::NetworkFile;
pub use self::{
    export::Export,
    import::Import,
    oln::{OlnFile, OlnPropose, OlnTrain},
    select::{Checkpoints, Select},
    test::Test,
    train::Train,
    training::Training,
};
use crate::{
    Artifact, Context, Error, In, Inputs, Result, UnitDraft,
    artifacts::{AnnotationFile, CheckpointFile, Classes, Images, Prompts},
    clip::{Space, space},
    error::malformed,
    feed::stream,
    ports::last_file,
};

const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images; of training, its objects.");
const PRETRAINED: In<CheckpointFile> =
    In::optional("pretrained", "Weights to begin with: of mmdet, torchvision, a ResNet, or SoCo. What does not fit is listed.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const PROMPTS: In<Prompts> = In::optional(
    "prompts",
    "Class embeddings. Without them every base class gets a direction of its own, and novel ones none: they are found by chance alone.",
);

const MULTILABEL_PROMPTS: In<Prompts> = In::optional(
    "multilabel_prompts",
    "Class embeddings with a learned scale (`prompts/multilabel`), for the heads that learn CLIP's embeddings; without, they use `prompts`.",
);

/// Red, green, blue of ImageNet: taken off, and divided by.
const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
const STD: [f32; 3] = [58.395, 57.12, 57.375];
/// Batches are as wide and high as a multiple of this, in px.
const GRAIN: u32 = 32;
/// The dimension of class embeddings where there are no prompts.
const DIM_WITHOUT_PROMPTS: i64 = 128;

/// Under which key of a file's metadata its [`Card`] is.
const CARD_KEY: &str = "ovenbird.detector";
/// Under which key it is after how many steps of training a file was written.
const STEP_KEY: &str = "ovenbird.step";

/// How a trained detector is built and asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Card {
    config: Config,
    /// Longer and shorter side that images are fitted into, in px.
    fits: [u32; 2],
    /// Whether classes have embeddings of their names.
    has_prompts: bool,
    /// Whether the heads that learned CLIP's embeddings have others than the box head.
    has_multilabel_prompts: bool,
    /// How cosines become logits, where class embeddings bring no scale.
    scale: LogitScale,
    /// Which CLIP it learned embeddings of, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clip: Option<Space>,
}

/// The classes that a detector tells apart, base ++ novel.
struct ClassTables {
    /// As the box head compares with them.
    text: Vocabulary,
    /// As the heads do that learned CLIP's embeddings of images.
    image: Vocabulary,
}

/// A trained detector: of several checkpoints of a training, the last.
pub struct DetectorFile {
    file: InputFile,
}

impl Artifact for DetectorFile {
    const KIND: &'static str = "detector";
    const EXTENSIONS: &'static [&'static str] = &["safetensors"];
    const SHAPE: &'static str =
        "a detector that `detector/train` or `detector/import` made; one of another program comes in by `detector/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: last_file(Self::KIND, files)?.clone() })
    }
}

impl NetworkFile for DetectorFile {
    fn file(&self) -> &InputFile {
        &self.file
    }
}

impl DetectorFile {
    fn card(&self, checkpoint: &Checkpoint) -> Result<Card> {
        card_of(checkpoint, CARD_KEY, &self.file.path)
    }
}

/// What a file says of how its network is built.
fn card_of<T: DeserializeOwned>(checkpoint: &Checkpoint, key: &str, path: &Path) -> Result<T> {
    let expected = format!("expected the network's configuration under `{key}` in the metadata");
    let text = checkpoint.metadata().get(key).ok_or_else(|| malformed(path, format!("{expected}, found none")))?;
    serde_json::from_str(text).map_err(|error| malformed(path, format!("{expected}: {error}")))
}

/// Class embeddings f32 `[K, D]` of base ++ novel.
fn class_embeddings(inputs: &Inputs, classes: &ClassSplit) -> Result<Tensor> {
    let names: Vec<String> = classes.all().cloned().collect();
    if let Some(prompts) = inputs.read_if_given(PROMPTS)? {
        return Ok(prompts.select(&names)?.to_kind(Kind::Float));
    }
    // Were novel classes to get directions that nothing in training keeps regions away from, one of them would win them all.
    let direction = |name: &String| {
        let mut random = ChaCha8Rng::from_seed(*ovenbird_cache::Digest::of(name.as_bytes()).as_bytes());
        let numbers: Vec<f32> = (0..DIM_WITHOUT_PROMPTS).map(|_| random.random_range(-1.0..1.0)).collect();
        Tensor::from_slice(&numbers)
    };
    let rows = Tensor::stack(&classes.base.iter().map(direction).collect::<Vec<_>>(), 0);
    Ok(to_unit_length(&rows).constant_pad_nd([0, 0, 0, classes.novel.len() as i64]))
}

/// The spaces of the class embeddings that are given, by port.
fn spaces_of_prompts(inputs: &Inputs) -> Result<[(&'static str, Option<Space>); 2]> {
    let [text, image] = [PROMPTS, MULTILABEL_PROMPTS]
        .map(|port| Ok::<_, Error>((port.info().name, inputs.read_if_given(port)?.and_then(|prompts| prompts.clip))));
    Ok([text?, image?])
}

impl Card {
    /// Refuses class embeddings of another CLIP than that of the detector, which lies at a port.
    fn check_clip(&self, port: &'static str, inputs: &Inputs) -> Result<()> {
        let [text, image] = spaces_of_prompts(inputs)?;
        space::common(&[(port, self.clip), text, image]).map(drop)
    }

    /// The classes at the ports; `embeddings`: [`class_embeddings`] of them. Refuses class embeddings of another space than the detector's.
    fn tables(&self, embeddings: Tensor, inputs: &Inputs, classes: &ClassSplit, device: Device) -> Result<ClassTables> {
        check_given(PROMPTS, self.has_prompts, inputs)?;
        check_given(MULTILABEL_PROMPTS, self.has_multilabel_prompts, inputs)?;
        let vocabulary = |port: In<Prompts>, embeddings: Tensor, scale: LogitScale| {
            let (dim, expected) = (embeddings.size()[1], self.config.embed_dim);
            if dim != expected {
                let problem = format!("class embeddings have {dim} numbers, the detector's space has {expected}");
                return Err(Error::Input { port: port.info().name, problem, hint: PROMPTS_HINT.into() });
            }
            Ok(Vocabulary::new(embeddings.to_device(device), classes.base.len() as i64, scale)?)
        };
        let text = vocabulary(PROMPTS, embeddings, self.scale)?;
        let image = match inputs.read_if_given(MULTILABEL_PROMPTS)? {
            Some(prompts) => {
                let names: Vec<String> = classes.all().cloned().collect();
                let embeddings = prompts.select(&names)?.to_kind(Kind::Float);
                vocabulary(MULTILABEL_PROMPTS, embeddings, prompts.scale.unwrap_or(self.scale))?
            }
            None => text.clone(),
        };
        Ok(ClassTables { text, image })
    }
}

/// Refuses class embeddings where a detector was trained without, and the other way round.
fn check_given(port: In<Prompts>, was_given: bool, inputs: &Inputs) -> Result<()> {
    let port = port.info().name;
    let problem = match (was_given, inputs.ports.contains_key(port)) {
        (true, false) => format!("the detector was trained with `{port}`, and gets none"),
        (false, true) => format!("the detector was trained without `{port}`, and gets some"),
        (true, true) | (false, false) => return Ok(()),
    };
    Err(Error::Input { port, problem, hint: PROMPTS_HINT.into() })
}

const PROMPTS_HINT: &str = "use the prompts (or none) that the detector was trained with, or others of the same CLIP";

/// Images to be shown to a network that is trained.
struct Viewing {
    images: Images,
    annotations: Annotations,
}

/// An image shown alone.
struct View<'a> {
    info: &'a ImageInfo,
    placement: Placement,
    /// Of what is shown, without padding.
    size: ImageSize,
    /// `[1, 3, H, W]`, normalised.
    pixels: Tensor,
}

/// Bytes of images that may be ahead of a network.
const ROOM: usize = 256 << 20;

impl Viewing {
    /// The images of the ports, which are looked for first.
    fn of(images: Images, annotations: Annotations, cx: &Context<'_>) -> Result<Self> {
        // Links of a chain have no items of their own.
        let n_images = if cx.items.is_empty() { annotations.images.len() } else { cx.items.len() };
        images.look_for(annotations.images.iter().take(n_images), cx)?;
        Ok(Self { images, annotations })
    }

    /// Shows the images at some places, one by one, in order, each fitted into a longer and a shorter side (px). One that cannot be read is
    /// left out by the stage's policy.
    fn each(
        &self,
        mut places: Range<usize>,
        fits: [u32; 2],
        draft: &UnitDraft,
        cx: &Context<'_>,
        mut see: impl FnMut(View<'_>) -> Result<()>,
    ) -> Result<()> {
        let info = |place: usize| &self.annotations.images[place];
        let bytes = |place: &usize| 3 * info(*place).width as usize * info(*place).height as usize;
        let prepare = |place: usize| {
            let info = info(place);
            let placement = Placement::fitting([info.width, info.height], fits[0], fits[1]);
            let decode = || Ok(Pixels::of(&[placement.pixels(&self.images.decode_sized(&info.file_name, placement.from)?)]));
            (info, placement, cx.attempt(decode))
        };
        let next = || Ok(places.next().map(|place| (place, bytes(&place))));
        let n_items = if cx.items.is_empty() { self.annotations.images.len() } else { cx.items.len() };
        stream(cx.threads, ROOM, next, prepare, |(info, placement, pixels), n_ready| {
            let Some(pixels) = cx.accept_or_skip(draft, &info.file_name, pixels, n_items)? else { return Ok(()) };
            let [width, height] = placement.to.map(i64::from);
            see(View { info, placement, size: ImageSize { width, height }, pixels: pixels.on(cx.device) })?;
            cx.flow(1, n_ready);
            cx.tick(1);
            cx.proceed()
        })?;
        if let Some(remarks) = self.images.remarks() {
            cx.note(remarks);
        }
        Ok(())
    }
}

/// Images as a network sees them: `[B, 3, H, W]`, normalised, right and below padded with zeros.
struct Pixels {
    numbers: Vec<f32>,
    shape: [i64; 4],
}

impl Pixels {
    fn of(images: &[Image]) -> Self {
        let longest = |side: fn(&Image) -> u32| images.iter().map(side).max().unwrap_or(GRAIN).next_multiple_of(GRAIN) as usize;
        let (width, height) = (longest(|image| image.width), longest(|image| image.height));
        let mut numbers = vec![0.0; images.len() * 3 * height * width];
        for (image, planes) in images.iter().zip(numbers.chunks_exact_mut(3 * height * width)) {
            for (channel, plane) in planes.chunks_exact_mut(height * width).enumerate() {
                for (row, levels) in plane.chunks_exact_mut(width).zip(image.rgb.chunks_exact(3 * image.width as usize)) {
                    for (number, pixel) in row.iter_mut().zip(levels.chunks_exact(3)) {
                        *number = (f32::from(pixel[channel]) - MEAN[channel]) / STD[channel];
                    }
                }
            }
        }
        Self { numbers, shape: [images.len() as i64, 3, height as i64, width as i64] }
    }

    fn on(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.numbers).view(self.shape).to_device(device)
    }
}
