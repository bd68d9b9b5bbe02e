//! `clip/globals` and `clip/proposals`: embeddings of whole images, and of what proposals cut out of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, ImageId, ImageInfo},
    images::Image,
    proposals::Proposal,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::encoder::{BATCH, Clip};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{
        AnnotationFile, CheckpointFile, ImageFeatures, ImageFeaturesWriter, Images, NumberType, Proposals as ProposalTable, RegionFeatures,
        RegionFeaturesWriter, Regions, Shelf,
    },
    feed::in_order,
};

const IMAGES: In<Images> = In::required("images", "The folder that the annotations' file names are relative to.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json: which images, their ids and sizes.");
const CHECKPOINT: In<CheckpointFile> = In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face.");

/// What the network sees of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// The whole image at its own size; positions are interpolated (OADP's adaptive preprocessing).
    #[default]
    Native,
    /// The centre square at the size of CLIP's training.
    Square,
}

/// CLIP embeddings of whole images.
///
/// One unit-norm embedding an image, in ascending image id. (OADP, section 4.1: globals.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub struct Globals {
    /// How CLIP is run.
    pub clip: Clip,
    /// What the network sees of an image.
    pub view: View,
    /// How embeddings are stored.
    pub stored: NumberType,
}

const GLOBALS: Out<ImageFeatures> = Out::new("features", "By image: `image_id` u64, `embedding` [D], unit norm.");

/// One digest an image: its id and its content. Images are in ascending id.
fn image_items(annotations: &Annotations, images: &Images) -> Result<Vec<Digest>> {
    let item = |image: &ImageInfo| {
        let digest = images.digest(&image.file_name)?;
        let stated = format!("{} {}x{}", image.id, image.width, image.height);
        Ok(Digest::of_list("ovenbird image 1", [(stated.as_str(), digest)]))
    };
    annotations.images.iter().map(item).collect()
}

impl Stage for Globals {
    const KIND: &'static str = "clip/globals";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[GLOBALS.info()];

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let items = image_items(&inputs.read(ANNOTATIONS)?.load()?, &inputs.read(IMAGES)?)?;
        Ok(Units::Independent { items, replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let images = cx.inputs.read(IMAGES)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, cx.device)?;
        let prepare = |image: &ImageInfo| {
            let decoded = images.decode(&image.file_name, [image.width, image.height])?;
            Ok(match self.view {
                View::Native => decoded,
                View::Square => encoder.preprocess.square(&decoded),
            })
        };
        for draft in cx.drafts(units) {
            let draft = draft?;
            let Unit { items, fingerprint, .. } = draft.unit();
            let (of_unit, items) = (&annotations.images[items.clone()], &cx.items[items.clone()]);
            let mut shelf = Shelf::new(&cx.donors(&draft)?, items, of_unit, GLOBALS.info().name);
            let mut embeddings: Vec<Option<Vec<f32>>> = vec![None; of_unit.len()];
            for (place, item) in items.iter().enumerate() {
                if shelf.has(item) {
                    let (_, embedding) = shelf.take(item, of_unit[place].id)?;
                    embeddings[place] = Some(embedding);
                }
            }
            let fresh: Vec<usize> = (0..of_unit.len()).filter(|place| embeddings[*place].is_none()).collect();
            let n_taken = of_unit.len() - fresh.len();
            cx.tick(n_taken as u64);

            let mut group: Vec<(usize, Image)> = Vec::with_capacity(BATCH);
            let mut encode = |group: &mut Vec<(usize, Image)>| -> Result<()> {
                let (places, pixels): (Vec<_>, Vec<_>) = group.drain(..).unzip();
                let encoded = match self.view {
                    View::Square => encoder.squares(&pixels)?,
                    View::Native => pixels.iter().map(|pixels| encoder.native(pixels)).collect::<Result<Vec<_>>>()?.concat(),
                };
                for (place, embedding) in places.iter().zip(encoded.chunks_exact(encoder.dim())) {
                    embeddings[*place] = Some(embedding.to_vec());
                }
                cx.tick(places.len() as u64);
                cx.proceed()
            };
            let n_together = if self.view == View::Square { BATCH } else { 1 };
            in_order(
                &fresh,
                cx.threads,
                |place| cx.attempt(|| prepare(&of_unit[*place])),
                |place, pixels| {
                    let Some(pixels) = cx.kept(&draft, &of_unit[*place].file_name, pixels)? else { return Ok(()) };
                    group.push((*place, pixels));
                    if group.len() == n_together { encode(&mut group) } else { Ok(()) }
                },
            )?;
            encode(&mut group)?;

            let mut shard = ImageFeaturesWriter::new(draft.create(GLOBALS, "globals.arrow")?, fingerprint, self.stored, encoder.dim())?;
            for (image, embedding) in of_unit.iter().zip(&embeddings) {
                if let Some(embedding) = embedding {
                    shard.push(image.id, embedding)?;
                }
            }
            shard.finish()?;
            cx.commit(draft, [("images".into(), of_unit.len().into()), ("taken".into(), n_taken.into())].into())?;
        }
        Ok(())
    }
}

/// CLIP embeddings of what proposals cut out.
///
/// For each proposal at least `min_side` px on both sides: expand the box about its centre, clip it to the image, round its
/// corners half to even, resize and centre-crop as CLIP does, encode. With several expansions the unit-norm embeddings are
/// added and normalised again (ViLD uses 1.0 and 1.5).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Proposals {
    /// How CLIP is run.
    pub clip: Clip,
    /// By how much boxes grow on each axis, one crop an entry.
    pub expand: Vec<f32>,
    /// Proposals smaller than this on either side are left out, in px.
    pub min_side: f32,
    /// How embeddings are stored.
    pub stored: NumberType,
}

impl Default for Proposals {
    fn default() -> Self {
        Self { clip: Clip::default(), expand: vec![1.0], min_side: 4.0, stored: NumberType::default() }
    }
}

const PROPOSALS: In<ProposalTable> = In::required("proposals", "Boxes of every image of the annotations.");
const REGIONS: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` [N, D], unit norm; `xyxy` f32 [N, 4] px, as proposed; `objectness` f32 [N].");

impl Proposals {
    fn is_kept(&self, proposal: &Proposal) -> bool {
        proposal.xyxy.width() >= self.min_side && proposal.xyxy.height() >= self.min_side
    }
}

impl Stage for Proposals {
    const KIND: &'static str = "clip/proposals";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), ANNOTATIONS.info(), PROPOSALS.info(), CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[REGIONS.info()];

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.expand.is_empty() || self.expand.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            problems.push(Problem::new("expand", format!("expected factors above 0, found {:?}", self.expand)));
        }
        if self.min_side.is_nan() || self.min_side < 0.0 {
            problems.push(Problem::new("min_side", format!("expected 0 or more, found {}", self.min_side)));
        }
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let annotations = inputs.read(ANNOTATIONS)?.load()?;
        let proposals = of_images(&annotations, inputs.read(PROPOSALS)?)?;
        let images = image_items(&annotations, &inputs.read(IMAGES)?)?;
        let item = |(image, proposals): (Digest, &Vec<Proposal>)| {
            let numbers = proposals.iter().flat_map(|Proposal { xyxy, score }| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2, *score]);
            let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
            Digest::of_list("ovenbird regions 1", [("image", image), ("proposals", Digest::of(&bytes))])
        };
        let items = images.into_iter().zip(&proposals).map(item).collect();
        Ok(Units::Independent { items, replaces: vec!["images", "annotations", "proposals"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load()?;
        let proposals = of_images(&annotations, cx.inputs.read(PROPOSALS)?)?;
        let images = cx.inputs.read(IMAGES)?;
        let encoder = self.clip.load(&cx.inputs.read(CHECKPOINT)?, cx.device)?;
        let dim = encoder.dim();
        let items: Vec<(&ImageInfo, &Vec<Proposal>)> = annotations.images.iter().zip(&proposals).collect();
        let prepare = |(image, proposals): &(&ImageInfo, &Vec<Proposal>)| {
            let decoded = images.decode(&image.file_name, [image.width, image.height])?;
            let crop = |proposal: &Proposal, factor: f32| {
                encoder.preprocess.square(&decoded.crop(proposal.xyxy.expanded(factor, [image.width, image.height])))
            };
            let kept: Vec<Proposal> = proposals.iter().filter(|proposal| self.is_kept(proposal)).copied().collect();
            let crops = kept.iter().flat_map(|proposal| self.expand.iter().map(move |factor| (proposal, *factor)));
            let crops: Vec<Image> = crops.map(|(proposal, factor)| crop(proposal, factor)).collect();
            Ok((kept, crops))
        };
        for draft in cx.drafts(units) {
            let draft = draft?;
            let unit = draft.unit().clone();
            let of_unit = &annotations.images[unit.items.clone()];
            let mut shelf = Shelf::new(&cx.donors(&draft)?, &cx.items[unit.items.clone()], of_unit, REGIONS.info().name);
            let mut shard = RegionFeaturesWriter::new(draft.create(REGIONS, "regions.arrow")?, &unit.fingerprint, self.stored, dim)?;
            // Crops of several images share a batch; an image is written once its last crop is encoded.
            let mut pending =
                Pending { dim, per_region: self.expand.len(), crops: Vec::new(), embeddings: Vec::new(), images: VecDeque::new() };
            let (mut n_regions, mut n_taken) = (0, 0);
            let places: Vec<usize> = unit.items.clone().collect();
            let taken: BTreeSet<usize> = places.iter().copied().filter(|place| shelf.has(&cx.items[*place])).collect();
            let prepared = |place: &usize| (!taken.contains(place)).then(|| cx.attempt(|| prepare(&items[*place])));
            in_order(&places, cx.threads, prepared, |place, prepared| {
                let (image, _) = items[*place];
                let Some(prepared) = prepared else {
                    let regions: Regions = shelf.take(&cx.items[*place], image.id)?;
                    (n_regions, n_taken) = (n_regions + regions.boxes.len(), n_taken + 1);
                    pending.images.push_back(Waiting::Taken(regions));
                    return pending.write_whole(&mut shard, cx);
                };
                let Some((kept, crops)) = cx.kept(&draft, &image.file_name, prepared)? else { return Ok(()) };
                n_regions += kept.len();
                pending.crops.extend(crops);
                pending.images.push_back(Waiting::ForCrops(image.id, [image.width, image.height], kept));
                while pending.crops.len() >= BATCH {
                    let rest = pending.crops.split_off(BATCH);
                    pending.embeddings.extend(encoder.squares(&std::mem::replace(&mut pending.crops, rest))?);
                }
                pending.write_whole(&mut shard, cx)?;
                cx.proceed()
            })?;
            pending.embeddings.extend(encoder.squares(&std::mem::take(&mut pending.crops))?);
            pending.write_whole(&mut shard, cx)?;
            shard.finish()?;
            let metrics = [("images", unit.items.len()), ("regions", n_regions), ("taken", n_taken)];
            cx.commit(draft, metrics.map(|(name, n)| (name.to_owned(), n.into())).into())?;
        }
        Ok(())
    }
}

/// Images whose crops are not all encoded yet, and what follows them.
struct Pending {
    dim: usize,
    per_region: usize,
    crops: Vec<Image>,
    /// Of the crops of `images`, in order.
    embeddings: Vec<f32>,
    images: VecDeque<Waiting>,
}

enum Waiting {
    ForCrops(ImageId, [u32; 2], Vec<Proposal>),
    Taken(Regions),
}

impl Pending {
    fn write_whole(&mut self, shard: &mut RegionFeaturesWriter<'_>, cx: &Context<'_>) -> Result<()> {
        let (mut n_written, mut used) = (0, 0);
        while let Some(front) = self.images.pop_front() {
            let regions = match front {
                Waiting::Taken(regions) => regions,
                Waiting::ForCrops(image_id, size_px, kept) => {
                    let n_numbers = kept.len() * self.per_region * self.dim;
                    if self.embeddings.len() - used < n_numbers {
                        self.images.push_front(Waiting::ForCrops(image_id, size_px, kept));
                        break;
                    }
                    let embeddings = self.embeddings[used..used + n_numbers].chunks(self.per_region * self.dim);
                    used += n_numbers;
                    Regions {
                        image_id,
                        size_px,
                        boxes: kept.iter().map(|proposal| proposal.xyxy).collect(),
                        objectness: kept.iter().map(|proposal| proposal.score).collect(),
                        embeddings: embeddings.flat_map(|crops| averaged(crops, self.dim)).collect(),
                    }
                }
            };
            shard.push(regions)?;
            n_written += 1;
        }
        self.embeddings.drain(..used);
        cx.tick(n_written);
        Ok(())
    }
}

/// The normalised sum of unit-norm embeddings of one region; one embedding stays as it is.
fn averaged(crops: &[f32], dim: usize) -> Vec<f32> {
    if crops.len() == dim {
        return crops.to_vec();
    }
    let mut sum = vec![0.0; dim];
    for crop in crops.chunks_exact(dim) {
        sum.iter_mut().zip(crop).for_each(|(sum, number)| *sum += number);
    }
    let norm = sum.iter().map(|number| number * number).sum::<f32>().sqrt().max(1e-12);
    sum.into_iter().map(|number| number / norm).collect()
}

/// The proposals of every image of the annotations, in ascending image id. Images without an entry are named.
fn of_images(annotations: &Annotations, proposals: ProposalTable) -> Result<Vec<Vec<Proposal>>> {
    let mut by_image: BTreeMap<_, _> = proposals.by_image;
    let of_image = |image: &ImageInfo| {
        by_image.remove(&image.id).ok_or_else(|| Error::Input {
            port: "proposals",
            problem: format!("none for image {}, which the annotations have", image.id),
            hint: "use the proposals that `proposals/import` made for these annotations".into(),
        })
    };
    annotations.images.iter().map(of_image).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_crops_are_averaged_to_unit_norm() {
        assert_eq!(averaged(&[0.6, 0.8], 2), [0.6, 0.8]);
        let mean = averaged(&[1.0, 0.0, 0.0, 1.0], 2);
        assert!(mean.iter().all(|number| (number - 0.5_f32.sqrt()).abs() < 1e-6), "{mean:?}");
    }
}
