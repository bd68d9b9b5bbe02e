//! `detector/embed`: what a detector's box head makes of given boxes.

use ovenbird_data::training::Filter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::{
    images::{Normalisation, TestImages},
    spec::DetectorFile,
};
use crate::{
    Context, In, Inputs, PortInfo, Result, Stage, Unit, Units,
    artifacts::{Dtype, RegionFeaturesWriter, Regions},
    clip::features::{ANNOTATIONS, IMAGES, PROPOSALS, REGIONS, region_units},
};

/// Embeddings of given boxes by the box head of a trained detector: those that it compares with the classes.
///
/// The image is shown as `detector/test` shows it. With annotated boxes (`proposals/truth`), through `prompts/detpro-data`, `eval/regions` says how
/// often the head names objects rightly, without the noise of boxes and thresholds.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Embed {
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

const DETECTOR: In<DetectorFile> = In::required("detector", "A detector that compares regions with class embeddings.");

impl Stage for Embed {
    const KIND: &'static str = "detector/embed";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        region_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let (checkpoint, spec) = cx.inputs.read(DETECTOR)?.read_mask_rcnn(DETECTOR.info().name)?;
        let (detector, _store) = spec.network(&checkpoint, cx.device)?;
        let images = TestImages::open(cx.inputs.read(IMAGES)?, cx.inputs.read(ANNOTATIONS)?.load_images()?, cx)?;
        let images = images.with_proposals(PROPOSALS, cx)?;
        let dim = spec.config.embed_dim as usize;
        for unit in units {
            // A unit that another process or device makes is skipped.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let shard = draft.create(REGIONS, "regions.arrow")?;
            let mut shard = RegionFeaturesWriter::new(shard, &draft.unit().fingerprint, self.dtype, dim, spec.clip)?;
            let mut n_regions = 0;
            images.each(unit.items.clone(), (spec.fits, Filter::OpenCv), Normalisation::IMAGENET, &draft, cx, |image| {
                let (proposals, mut embeddings) = (image.proposals(), vec![0.0_f32; image.proposals().len() * dim]);
                n_regions += proposals.len();
                if let Some(shown) = image.given().filter(|_| !proposals.is_empty()) {
                    let said = detector.embed(&image.pixels, &[image.size], &[shown.boxes])?;
                    let said = said.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
                    said.copy_data(&mut embeddings, said.numel());
                }
                shard.push(Regions {
                    image_id: image.info.id,
                    size_px: image.placement.from,
                    boxes: proposals.iter().map(|proposal| proposal.xyxy).collect(),
                    objectness: proposals.iter().map(|proposal| proposal.score).collect(),
                    embeddings,
                })
            })?;
            shard.finish()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_regions.into())].into())?;
        }
        Ok(())
    }
}
