//! Ports, units and passes of the stages that embed images and regions of images.
//!
//! Differences from the OADP reference are parameters, whose documentation names the default. Always different: boxes are stored in f32
//! (there f16), an image without proposals has an empty row (there a crash), and proposals are matched to images by id.

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, ImageId, ImageInfo},
    proposals::Proposal,
};

use super::encoder::Encoder;
use crate::{
    Context, In, Inputs, Out, Result, Unit, Units,
    artifacts::{AnnotationFile, CheckpointFile, ImageFeatures, Images, Proposals, RegionFeatures, Regions, RowKind},
    pass::{ImageConsumer, ImageList, Views},
};

pub(crate) const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
pub(crate) const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
pub(super) const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
pub(crate) const PROPOSALS: In<Proposals> = In::required("proposals", "Boxes in the images of `annotations`.");

pub(super) const GLOBALS: Out<ImageFeatures> = Out::new("features", "By image: `image_id` u64, `embedding` [D], unit norm.");
pub(crate) const REGIONS: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Units of stages whose items are images alone.
pub(super) fn image_units(inputs: &Inputs) -> Result<Units> {
    let items = inputs.read(IMAGES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?)?;
    Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
}

/// Units of stages whose items are images with their proposals.
pub(crate) fn region_units(inputs: &Inputs) -> Result<Units> {
    let annotations = inputs.read(ANNOTATIONS)?.load_images()?;
    let proposals = inputs.read(PROPOSALS)?.of_each(&annotations.images);
    let images = inputs.read(IMAGES)?.items(&annotations)?;
    let item = |(image, proposals): (Digest, &Option<Vec<Proposal>>)| {
        let Some(proposals) = proposals else { return Digest::of_list("ovenbird regions 1", [("image without proposals", image)]) };
        let numbers = proposals.iter().flat_map(|Proposal { xyxy, score }| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2, *score]);
        let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
        Digest::of_list("ovenbird regions 1", [("image", image), ("proposals", Digest::of(&bytes))])
    };
    let items = images.into_iter().zip(&proposals).map(item).collect();
    Ok(Units::Independent { items, replaces: vec!["images", "annotations", "proposals"] })
}

/// The proposals of every image, by its place; `None` where an earlier step skipped it.
pub(super) struct ImageProposals(Vec<Option<Vec<Proposal>>>);

impl ImageProposals {
    /// Those that are large enough on both sides. Images without any are skipped or refused by the stage's policy.
    pub(super) fn large(min_side: f32, cx: &Context<'_>) -> Result<(Annotations, Self)> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let proposals = cx.inputs.read(PROPOSALS)?;
        proposals.check_within(&annotations.images)?;
        let mut proposals = proposals.of_each(&annotations.images);
        let items = annotations.images.iter().zip(&proposals).take(cx.items.len());
        let missing: Vec<ImageId> = items.filter(|(_, proposals)| proposals.is_none()).map(|(image, _)| image.id).collect();
        let hint = "use the proposals that were made for these annotations";
        cx.skip_missing(PROPOSALS.info(), &missing, cx.items.len(), hint)?;
        let count = |proposals: &[Option<Vec<Proposal>>]| proposals.iter().take(cx.items.len()).flatten().map(Vec::len).sum::<usize>();
        let n_given = count(&proposals);
        for of_image in proposals.iter_mut().flatten() {
            of_image.retain(|proposal| proposal.xyxy.width() >= min_side && proposal.xyxy.height() >= min_side);
        }
        let n_small = n_given - count(&proposals);
        if n_small > 0 {
            cx.note(format!("{n_small} of {n_given} proposals are smaller than {min_side} px and left out"));
        }
        Ok((annotations, Self(proposals)))
    }

    pub(super) fn of(&self, place: usize) -> &[Proposal] {
        self.0[place].as_deref().unwrap_or_default()
    }

    /// The number of views of an image with so many for each proposal; an image to be refused has one.
    pub(super) fn n_views(&self, place: usize, per_proposal: usize) -> usize {
        self.0[place].as_ref().map_or(1, |proposals| proposals.len() * per_proposal)
    }

    /// See [`Views::refusal`].
    pub(super) fn refusal(&self, place: usize) -> Option<(String, &'static str)> {
        let is_missing = self.0[place].is_none();
        is_missing.then(|| ("the step that made the proposals skipped it".into(), "mend the file, and `ovenbird retry` that step"))
    }
}

/// A part in a pass over the images of the annotations, with a network.
pub(super) fn consumer<'a>(
    (units, cx): (&'a [Unit], &'a Context<'a>),
    annotations: Annotations,
    encoder: Encoder,
    views: impl Views + 'a,
    port: &'static str,
    rows: RowKind,
) -> Result<ImageConsumer<'a>> {
    let list = ImageList { images: cx.inputs.read(IMAGES)?, infos: annotations.images };
    Ok(ImageConsumer { cx, units, list, views: Box::new(views), encoder: Some(encoder), port, rows })
}

/// The regions of an image that are these proposals.
pub(super) fn regions(info: &ImageInfo, proposals: &[Proposal], embeddings: Vec<f32>) -> Regions {
    Regions {
        image_id: info.id,
        size_px: [info.width, info.height],
        boxes: proposals.iter().map(|proposal| proposal.xyxy).collect(),
        objectness: proposals.iter().map(|proposal| proposal.score).collect(),
        embeddings,
    }
}
