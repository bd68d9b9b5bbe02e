//! Images as networks get them: resized, normalised, padded.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use ovenbird_data::{
    Error as DataError,
    annotations::{Annotations, ImageId, ImageInfo},
    boxes::Xyxy,
    images::Image,
    proposals::Proposal,
    training::{Filter, Placement},
};
use ovenbird_models::{
    detection::boxes::{ImageSize, boxes_tensor},
    rcnn::rpn,
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{
    Context, In, Result, UnitDraft,
    artifacts::{ByImage, Images, Proposals, RegionFeatures, Regions},
    feed::stream,
};

/// How levels from 0 to 255 become a network's input: minus the mean, divided by the standard deviation, of red, green and blue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalisation {
    mean: [f32; 3],
    std: [f32; 3],
    padding: Padding,
}

/// The border that fills an image up to a multiple of 32 px when a detector is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Padding {
    /// Zeros after normalisation, as in training. (Fixes defect 11 in docs/recipes/lp-ovod.md.)
    #[default]
    Fixed,
    /// Black pixels that are normalised with the image, as in LP-OVOD's tests.
    Reference,
}

impl Normalisation {
    /// The statistics of ImageNet.
    pub(crate) const IMAGENET: Self = Self { mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375], padding: Padding::Fixed };
    /// CLIP's statistics, which LP-OVOD's detector takes. (LP-OVOD, section 5.3.)
    pub(crate) const CLIP: Self =
        Self { mean: [122.770_935, 116.746_01, 104.093_735], std: [68.500_534, 66.632_16, 70.323_166], padding: Padding::Fixed };

    /// The same with another border.
    pub(crate) fn padded(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// A rectangle `[x1, y1, x2, y2]` px of an image, half-open and inside it, f32 `[3, h, w]`.
    pub(crate) fn crop(&self, image: &Image, [x1, y1, x2, y2]: [i64; 4]) -> Tensor {
        let [x1, x2, width] = [x1, x2, i64::from(image.width)].map(|column| 3 * column as usize);
        let rows = image.rgb.chunks_exact(width).take(y2 as usize).skip(y1 as usize);
        let plane = |channel: usize| {
            let levels = rows.clone().flat_map(move |row| row[x1..x2].iter().skip(channel).step_by(3));
            levels.map(move |level| self.apply(channel, f32::from(*level)))
        };
        let numbers: Vec<f32> = (0..3).flat_map(plane).collect();
        Tensor::from_slice(&numbers).view([3, y2 - y1, (x2 - x1) as i64 / 3])
    }

    fn apply(&self, channel: usize, level: f32) -> f32 {
        (level - self.mean[channel]) / self.std[channel]
    }

    /// What fills the border of a channel.
    fn border(&self, channel: usize) -> f32 {
        match self.padding {
            Padding::Fixed => 0.0,
            Padding::Reference => self.apply(channel, 0.0),
        }
    }
}

/// Widths and heights of batches are multiples of this, in px.
pub(crate) const STRIDE: u32 = 32;
/// Bytes of images that may be decoded ahead of the network.
const ROOM: usize = 256 << 20;

/// Images on which a trained network is run.
pub(crate) struct TestImages {
    images: Images,
    pub(crate) annotations: Annotations,
    proposals: Option<BTreeMap<ImageId, Vec<Proposal>>>,
    /// Proposals with augmented embeddings.
    augmented: Option<ByImage<Regions>>,
}

/// The proposals to look at in an image, in px of the original image.
pub(crate) struct Given<'a> {
    proposals: Cow<'a, [Proposal]>,
    /// Their augmented embeddings, where there are some, `[N, D]`.
    embeddings: Option<Vec<f32>>,
}

/// An image as a network gets it.
pub(crate) struct TestImage<'a> {
    pub(crate) info: &'a ImageInfo,
    /// How the image was resized.
    pub(crate) placement: Placement,
    /// Size after resizing, without padding.
    pub(crate) size: ImageSize,
    /// `[1, 3, H, W]`, normalised.
    pub(crate) pixels: Tensor,
    /// The proposals to look at; without them the network makes its own.
    given: Option<Given<'a>>,
}

impl TestImages {
    /// The images of some annotations. Fails at once where files are missing.
    pub(crate) fn open(images: Images, annotations: Annotations, cx: &Context<'_>) -> Result<Self> {
        // Checkpoints of a training have no items of their own.
        let n_images = if cx.items.is_empty() { annotations.images.len() } else { cx.items.len() };
        images.look_for(annotations.images.iter().take(n_images), cx)?;
        Ok(Self { images, annotations, proposals: None, augmented: None })
    }

    /// Adds the proposals at a port, if there are some. Fails where one leaves its image.
    pub(crate) fn with_proposals(self, port: In<Proposals>, cx: &Context<'_>) -> Result<Self> {
        let proposals = cx.inputs.read_if_given(port)?;
        if let Some(proposals) = &proposals {
            proposals.check_within(&self.annotations.images)?;
        }
        Ok(self.looking_at(proposals))
    }

    /// Adds the boxes at a port, if there are some, wherever they are.
    pub(crate) fn with_boxes(self, port: In<Proposals>, cx: &Context<'_>) -> Result<Self> {
        Ok(self.looking_at(cx.inputs.read_if_given(port)?))
    }

    fn looking_at(self, proposals: Option<Proposals>) -> Self {
        Self { proposals: proposals.map(|proposals| proposals.by_image), ..self }
    }

    /// Adds the proposals with augmented embeddings at a port, if there are some.
    pub(crate) fn with_augmented(self, port: In<RegionFeatures>, cx: &Context<'_>) -> Result<Self> {
        let augmented = cx.inputs.read_if_given(port)?;
        Ok(Self { augmented: augmented.map(|features| features.by_image()).transpose()?, ..self })
    }

    /// The proposals to look at in an image, unless the network makes its own.
    fn given(&self, info: &ImageInfo) -> Result<Option<Given<'_>>> {
        const MISSING: &str = "use the proposals of these images, or skip it";
        let refused = |problem: String, hint: &str| {
            let path = self.images.file(&info.file_name)?.path.clone();
            Err(DataError::Malformed { path, problem, hint: Some(hint.into()) }.into())
        };
        if let Some(augmented) = &self.augmented {
            if !augmented.has(info.id) {
                return refused("the augmented embeddings have no entry for this image".into(), MISSING);
            }
            let Regions { size_px, boxes, objectness, embeddings, .. } = augmented.get(info.id)?;
            if size_px != [info.width, info.height] {
                let ([width, height], ImageInfo { width: w, height: h, .. }) = (size_px, info);
                let problem = format!("augmented embeddings of an image of {width} x {height} px, expected {w} x {h}");
                return refused(problem, "make them from these annotations");
            }
            let proposals = boxes.into_iter().zip(objectness).map(|(xyxy, score)| Proposal { xyxy, score }).collect();
            return Ok(Some(Given { proposals, embeddings: Some(embeddings) }));
        }
        let Some(proposals) = &self.proposals else { return Ok(None) };
        match proposals.get(&info.id) {
            Some(proposals) => Ok(Some(Given { proposals: Cow::Borrowed(proposals), embeddings: None })),
            None => refused("the proposals have no entry for this image".into(), MISSING),
        }
    }

    /// Gives the images at some places one by one, in order, resized to fit a longer and a shorter side (px) and normalised. Images that
    /// cannot be read, or that the step that made the proposals skipped, are skipped or refused by the stage's policy.
    pub(crate) fn each(
        &self,
        mut places: Range<usize>,
        (fits, filter): ([u32; 2], Filter),
        normalisation: Normalisation,
        draft: &UnitDraft,
        cx: &Context<'_>,
        mut use_image: impl FnMut(TestImage<'_>) -> Result<()>,
    ) -> Result<()> {
        let info = |place: usize| &self.annotations.images[place];
        let bytes = |place: &usize| 3 * info(*place).width as usize * info(*place).height as usize;
        let prepare = |place: usize| {
            let info = info(place);
            let placement = Placement::within([info.width, info.height], fits, filter);
            let decode = || {
                let image = self.images.decode_sized(&info.file_name, placement.from)?;
                let given = self.given(info)?;
                Ok((Pixels::of(&[placement.pixels(&image)], normalisation), given))
            };
            (info, placement, cx.attempt(decode))
        };
        let next = || Ok(places.next().map(|place| (place, bytes(&place))));
        let n_items = if cx.items.is_empty() { self.annotations.images.len() } else { cx.items.len() };
        stream(cx.threads, ROOM, next, prepare, |(info, placement, prepared), n_ready| {
            let Some((pixels, given)) = cx.accept_or_skip(draft, &info.file_name, prepared, n_items)? else { return Ok(()) };
            let (size, pixels) = (placement.to.into(), pixels.on(cx.device));
            use_image(TestImage { info, placement, size, pixels, given })?;
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

impl TestImage<'_> {
    /// The proposals to look at, in px of the original image; none where the network makes its own.
    pub(crate) fn proposals(&self) -> &[Proposal] {
        self.given.as_ref().map_or(&[], |given| &given.proposals)
    }

    /// The proposals to look at, in px of the resized image.
    pub(crate) fn given(&self) -> Option<rpn::Proposals> {
        let proposals = &self.given.as_ref()?.proposals;
        let boxes: Vec<Xyxy> = proposals.iter().map(|proposal| self.placement.show(&proposal.xyxy)).collect();
        let scores: Vec<f32> = proposals.iter().map(|proposal| proposal.score).collect();
        let corners: Vec<[f32; 4]> = boxes.iter().map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).collect();
        Some(rpn::Proposals { boxes: boxes_tensor(&corners), scores: Tensor::from_slice(&scores) })
    }

    /// Their augmented embeddings, where there are some, `[N, D]` of unit length on the device of the pixels; `dim`: D.
    pub(crate) fn augmented(&self, dim: i64) -> Option<Tensor> {
        let embeddings = self.given.as_ref()?.embeddings.as_ref()?;
        Some(to_unit_length(&Tensor::from_slice(embeddings).view([-1, dim]).to_device(self.pixels.device())))
    }
}

/// A batch of images `[B, 3, H, W]`, normalised, with a border on the right and below.
pub(crate) struct Pixels {
    numbers: Vec<f32>,
    shape: [i64; 4],
}

impl Pixels {
    pub(crate) fn of(images: &[Image], normalisation: Normalisation) -> Self {
        let [width, height] = Self::longest(images).map(|side| side.next_multiple_of(STRIDE as usize));
        Self::sized(images, normalisation, [width, height])
    }

    /// The same with no more of a border than images of different sizes need, and networks that take no less than [`STRIDE`].
    pub(crate) fn tight(images: &[Image], normalisation: Normalisation) -> Self {
        Self::sized(images, normalisation, Self::longest(images).map(|side| side.max(STRIDE as usize)))
    }

    /// The greatest width and the greatest height.
    fn longest(images: &[Image]) -> [usize; 2] {
        let longest = |side: fn(&Image) -> u32| images.iter().map(side).max().unwrap_or(STRIDE) as usize;
        [longest(|image| image.width), longest(|image| image.height)]
    }

    fn sized(images: &[Image], normalisation: Normalisation, [width, height]: [usize; 2]) -> Self {
        let mut numbers = vec![0.0; images.len() * 3 * height * width];
        for (image, planes) in images.iter().zip(numbers.chunks_exact_mut(3 * height * width)) {
            for (channel, plane) in planes.chunks_exact_mut(height * width).enumerate() {
                plane.fill(normalisation.border(channel));
                for (row, levels) in plane.chunks_exact_mut(width).zip(image.rgb.chunks_exact(3 * image.width as usize)) {
                    for (number, pixel) in row.iter_mut().zip(levels.chunks_exact(3)) {
                        *number = normalisation.apply(channel, f32::from(pixel[channel]));
                    }
                }
            }
        }
        Self { numbers, shape: [images.len() as i64, 3, height as i64, width as i64] }
    }

    /// `[B, 3, H, W]` f32.
    pub(crate) fn on(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.numbers).view(self.shape).to_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crop_is_that_part_of_the_network_s_input() {
        let image = Image { width: 20, height: 31, rgb: (0..20 * 31 * 3_u32).map(|index| (index * 7 % 251) as u8).collect() };
        let whole = Pixels::of(std::slice::from_ref(&image), Normalisation::IMAGENET).on(Device::Cpu).get(0);
        for [x1, y1, x2, y2] in [[0, 0, 20, 31], [3, 5, 4, 6], [7, 0, 20, 2], [0, 30, 1, 31]] {
            let crop = Normalisation::IMAGENET.crop(&image, [x1, y1, x2, y2]);
            assert!(crop.equal(&whole.narrow(1, y1, y2 - y1).narrow(2, x1, x2 - x1)), "{x1} {y1} {x2} {y2}");
        }
    }

    /// S6 of LP-OVOD's specification, and the border's values there.
    #[test]
    fn the_border_alone_depends_on_the_order_of_padding() {
        let image = || Image { width: 20, height: 31, rgb: (0..20 * 31 * 3_u32).map(|index| (index % 251) as u8).collect() };
        let pixels = |padding| Pixels::of(&[image()], Normalisation::CLIP.padded(padding)).on(Device::Cpu);
        let (fixed, reference) = (pixels(Padding::Fixed), pixels(Padding::Reference));
        assert_eq!(fixed.size(), [1, 3, 32, 32]);
        let inside = |all: &Tensor| all.narrow(2, 0, 31).narrow(3, 0, 20);
        assert!(inside(&fixed).equal(&inside(&reference)));
        for (channel, border) in [-1.792, -1.752, -1.480].into_iter().enumerate() {
            for (row, column) in [(31, 0), (0, 20), (31, 31)] {
                let at = [0, channel as i64, row, column];
                assert!(fixed.double_value(&at).abs() < 1e-9 && (reference.double_value(&at) - border).abs() < 1e-3);
            }
        }
    }
}
