//! Images as networks get them: resized, normalised, padded.

use std::ops::Range;

use ovenbird_data::{
    annotations::{Annotations, ImageInfo},
    images::Image,
    training::Placement,
};
use ovenbird_models::detection::boxes::ImageSize;
use tch::{Device, Tensor};

use crate::{Context, Result, UnitDraft, artifacts::Images, feed::stream};

/// Mean and standard deviation of red, green and blue in ImageNet.
const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
const STD: [f32; 3] = [58.395, 57.12, 57.375];
/// Widths and heights of batches are multiples of this, in px.
const STRIDE: u32 = 32;
/// Bytes of images that may be decoded ahead of the network.
const ROOM: usize = 256 << 20;

/// Images on which a trained network is run.
pub(crate) struct TestImages {
    images: Images,
    pub(crate) annotations: Annotations,
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
}

impl TestImages {
    /// The images of some annotations. Fails at once where files are missing.
    pub(crate) fn open(images: Images, annotations: Annotations, cx: &Context<'_>) -> Result<Self> {
        // Checkpoints of a training have no items of their own.
        let n_images = if cx.items.is_empty() { annotations.images.len() } else { cx.items.len() };
        images.look_for(annotations.images.iter().take(n_images), cx)?;
        Ok(Self { images, annotations })
    }

    /// Gives the images at some places one by one, in order, resized to fit a longer and a shorter side (px). Images that cannot be read are
    /// skipped or refused by the stage's policy.
    pub(crate) fn each(
        &self,
        mut places: Range<usize>,
        fits: [u32; 2],
        draft: &UnitDraft,
        cx: &Context<'_>,
        mut use_image: impl FnMut(TestImage<'_>) -> Result<()>,
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
            use_image(TestImage { info, placement, size: ImageSize { width, height }, pixels: pixels.on(cx.device) })?;
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

/// A batch of images `[B, 3, H, W]`, normalised, padded with zeros on the right and below.
pub(crate) struct Pixels {
    numbers: Vec<f32>,
    shape: [i64; 4],
}

impl Pixels {
    pub(crate) fn of(images: &[Image]) -> Self {
        let longest = |side: fn(&Image) -> u32| images.iter().map(side).max().unwrap_or(STRIDE).next_multiple_of(STRIDE) as usize;
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

    /// `[B, 3, H, W]` f32.
    pub(crate) fn on(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.numbers).view(self.shape).to_device(device)
    }
}
