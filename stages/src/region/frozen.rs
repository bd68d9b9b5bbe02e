//! A frozen CLIP whose regions are embedded.

use std::{cell::RefCell, collections::BTreeMap};

use ovenbird_models::{
    clip::{
        self,
        regions::{Regions, Rules},
    },
    detection::boxes::ImageSize,
    to_unit_length,
};
use tch::{Tensor, no_grad};

use crate::{
    Context, Error, In, Result,
    artifacts::{CheckpointFile, Prompts, RegionPromptFile},
    clip::{Clip, Space, space},
    detector::images::STRIDE,
};

pub(crate) const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights with a ResNet: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
pub(crate) const REGION_PROMPT: In<RegionPromptFile> = In::optional(
    "region_prompt",
    "The position table of its attention pooling (`region/prompt`, or CORA's `.pth`); without it CLIP's own.",
);

pub(crate) const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP.");

/// The longest side of images, px: more takes more memory than machines have.
pub(crate) const MAX_SIDE: u32 = 8192;
/// Bytes of maps that are kept.
const KEPT: usize = 2 << 30;

/// A CLIP with its region prompt, in f32.
pub(crate) struct Frozen {
    clip: clip::Clip,
    table: Option<Tensor>,
    rules: Rules,
    pub(crate) space: Space,
}

impl Frozen {
    /// The CLIP at a port, with the region prompt at another, if it is given.
    pub(crate) fn load(
        clip: &Clip,
        checkpoint: &CheckpointFile,
        prompt: Option<RegionPromptFile>,
        rules: Rules,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let (clip, space) = clip.load_text(checkpoint, cx.device, cx)?;
        clip.regions().map_err(|error| Error::Input {
            port: CHECKPOINT.info().name,
            problem: format!("{}: {error}", checkpoint.file.path.display()),
            hint: "give a CLIP with a ResNet: RN50, RN101, RN50x4 and the like".into(),
        })?;
        let table = match prompt {
            Some(file) => {
                let (table, trained_with) = file.read()?;
                space::common(&[(CHECKPOINT.info().name, Some(space)), (REGION_PROMPT.info().name, trained_with)])?;
                // Fails for a table of another grid.
                clip.regions()?.with_table(&table).map_err(|error| Error::Input {
                    port: REGION_PROMPT.info().name,
                    problem: format!("{}: {error}", file.file.path.display()),
                    hint: "give a region prompt that was trained for this CLIP (`region/prompt`)".into(),
                })?;
                let table = table.to_device(cx.device);
                if clip.regions()?.table().equal(&table) {
                    cx.note(format!("{}: the table of this CLIP itself, so regions have no prompt", file.file.path.display()));
                }
                Some(table)
            }
            None => None,
        };
        Ok(Self { clip, table, rules, space })
    }

    /// A CLIP that is at hand, with a region prompt.
    #[cfg(test)]
    pub(crate) fn of(clip: clip::Clip, table: Option<Tensor>) -> Self {
        Self { clip, table, rules: Rules::default(), space: Space::of(&BTreeMap::new(), &[]) }
    }

    /// Its regions, with the region prompt.
    pub(crate) fn regions(&self) -> Result<Regions<'_>> {
        let regions = self.clip.regions()?.with_rules(self.rules);
        Ok(match &self.table {
            Some(table) => regions.with_table(table)?,
            None => regions,
        })
    }

    /// The embeddings of some classes at [`PROMPTS`], f32 `[K, D]` of unit length. Fails where they are of another CLIP.
    pub(crate) fn texts(&self, prompts: &Prompts, classes: &[String], cx: &Context<'_>) -> Result<Tensor> {
        space::common(&[(CHECKPOINT.info().name, Some(self.space)), (PROMPTS.info().name, prompts.clip)])?;
        let texts = to_unit_length(&prompts.select(classes)?).to_device(cx.device);
        if texts.size()[1] != self.dim() {
            let problem = format!("class embeddings have {} numbers, regions {}", texts.size()[1], self.dim());
            return Err(Error::Input { port: PROMPTS.info().name, problem, hint: "make them with the CLIP at `checkpoint`".into() });
        }
        Ok(texts)
    }

    /// The dimension D of embeddings.
    pub(crate) fn dim(&self) -> i64 {
        self.clip.embed_dim()
    }
}

/// The input of a network for one image, `[1, 3, H, W]`, without a border but what a side below 32 px needs. `pixels`: with any border.
pub(crate) fn without_border(pixels: &Tensor, size: ImageSize) -> Tensor {
    let ImageSize { width, height } = padded(size);
    pixels.narrow(2, 0, height).narrow(3, 0, width)
}

/// The size of that input.
pub(crate) fn padded(ImageSize { width, height }: ImageSize) -> ImageSize {
    ImageSize { width: width.max(STRIDE.into()), height: height.max(STRIDE.into()) }
}

/// Tensors by an image's place, and whether left is right.
type ByView = BTreeMap<(usize, bool), Vec<Tensor>>;

/// What a frozen network makes of images that are shown in few ways.
#[derive(Default)]
pub(crate) struct Kept {
    /// With their bytes.
    tensors: RefCell<(ByView, usize)>,
}

impl Kept {
    /// What is kept under a key, or else is made, and kept while there is room.
    pub(crate) fn get(&self, key: (usize, bool), make: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        let copies = |tensors: &[Tensor]| tensors.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        if let Some(kept) = self.tensors.borrow().0.get(&key) {
            return Ok(copies(kept));
        }
        let made = no_grad(make)?;
        let n_bytes: usize = made.iter().map(|tensor| 4 * tensor.numel()).sum();
        let mut tensors = self.tensors.borrow_mut();
        if tensors.1 + n_bytes <= KEPT {
            tensors.1 += n_bytes;
            tensors.0.insert(key, copies(&made));
        }
        Ok(made)
    }
}
