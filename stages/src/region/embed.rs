//! `region/embed`: what a frozen CLIP ResNet makes of given boxes.

use ovenbird_data::{
    boxes::Xyxy,
    training::{Filter, Placement},
};
use ovenbird_models::clip::regions::{self, Rules};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::frozen::{CHECKPOINT, Frozen, MAX_SIDE, REGION_PROMPT, without_border};
use crate::{
    Context, Inputs, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Dtype, RegionFeaturesWriter, Regions},
    clip::{
        Clip,
        features::{ANNOTATIONS, IMAGES, PROPOSALS, REGIONS, region_units},
    },
    contract::is_default,
    detector::images::{Normalisation, TestImages},
    localizer::batches::relative,
};

/// Embeddings of given boxes by a frozen CLIP ResNet: each is pooled from the third of its four layers, goes through the fourth, and through attention pooling
/// with the region prompt. One pass over an image serves all its boxes.
///
/// With annotated boxes (`proposals/truth`) `annotations/relabel` gives objects CLIP's classes; through `prompts/detpro-data`, `eval/regions` says how
/// often CLIP names objects rightly, and `detect/zero-shot` with `objectness_weight: 0`, `score_threshold: 0`, `nms_iou: 1` and `max_per_image: 100` their AP:
/// CORA's measure of a region prompt. Boxes are clipped to their images. (CORA, section 4: the exact way.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Embed {
    /// Activation, and which CLIP of a checkpoint with several. It computes in f32.
    pub clip: Clip,
    /// Maximum length of the longer side of images, in px.
    pub max_size: u32,
    /// Length of the shorter side of images, in px, unless the longer side would exceed `max_size`.
    pub min_size: u32,
    /// How boxes become cells of maps.
    #[serde(skip_serializing_if = "is_default")]
    pub rules: Rules,
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

impl Default for Embed {
    fn default() -> Self {
        Self { clip: Clip::default(), max_size: 1333, min_size: 800, rules: Rules::default(), dtype: Dtype::default() }
    }
}

impl Stage for Embed {
    const KIND: &'static str = "region/embed";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info(), REGION_PROMPT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("max_size", (32..=MAX_SIDE).contains(&self.max_size), "from 32 to 8192 px"),
            ("min_size", (32..=self.max_size).contains(&self.min_size), "from 32 px to `max_size`"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let frozen = Frozen::load(&self.clip, &cx.inputs.read(CHECKPOINT)?, cx.inputs.read_if_given(REGION_PROMPT)?, self.rules, cx)?;
        let (regions, dim) = (frozen.regions()?, frozen.dim() as usize);
        let images = TestImages::open(cx.inputs.read(IMAGES)?, cx.inputs.read(ANNOTATIONS)?.load_images()?, cx)?;
        let images = images.with_boxes(PROPOSALS, cx)?;
        for unit in units {
            // A unit that another process or device makes is skipped.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let shard = draft.create(REGIONS, "regions.arrow")?;
            let mut shard = RegionFeaturesWriter::new(shard, &draft.unit().fingerprint, self.dtype, dim, Some(frozen.space))?;
            let mut n_regions = 0;
            images.each(
                unit.items.clone(),
                ([self.max_size, self.min_size], Filter::Pillow),
                Normalisation::CLIP,
                &draft,
                cx,
                |image| {
                    let (proposals, mut embeddings) = (image.proposals(), vec![0.0_f32; image.proposals().len() * dim]);
                    n_regions += proposals.len();
                    let boxes: Vec<Xyxy> = proposals.iter().map(|proposal| proposal.xyxy).collect();
                    if !boxes.is_empty() {
                        let said = embed(&regions, &image.pixels, &image.placement, &boxes)?;
                        said.copy_data(&mut embeddings, said.numel());
                    }
                    shard.push(Regions {
                        image_id: image.info.id,
                        size_px: image.placement.from,
                        boxes,
                        objectness: proposals.iter().map(|proposal| proposal.score).collect(),
                        embeddings,
                    })
                },
            )?;
            shard.finish()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_regions.into())].into())?;
        }
        Ok(())
    }
}

/// Embeddings of boxes of an image, px of the original, f32 `[N, D]` on the CPU. `pixels`: `[1, 3, H, W]`, as the image is placed, with or without a border.
pub(crate) fn embed(regions: &regions::Regions<'_>, pixels: &Tensor, placement: &Placement, boxes: &[Xyxy]) -> Result<Tensor> {
    let size = placement.to.into();
    let boxes: Vec<[f32; 4]> = boxes.iter().map(|xyxy| relative(&placement.show(xyxy), placement.to)).collect();
    let boxes = Tensor::from_slice(boxes.as_flattened()).view([-1, 4]);
    let pixels = without_border(pixels, size);
    let said = regions.exact(&regions.layer3(&pixels, &[size])?, &[boxes])?;
    Ok(said.to_device(Device::Cpu).to_kind(Kind::Float).contiguous())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Embed::default()).is_empty());
    }
}
