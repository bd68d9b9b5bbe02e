//! From an image to the square that a network sees.

use super::Image;

/// How pixels become a network's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocess {
    /// Side of the square that the network sees, in px.
    pub side_px: u32,
    /// How images that are not square become square.
    pub resize: SquareResize,
    /// Subtracted from red, green, blue in [0, 1].
    pub mean: [f32; 3],
    /// Then divided by.
    pub std: [f32; 3],
}

/// How images become square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SquareResize {
    /// The short side becomes the square's, and the centre is cropped (CLIP).
    Shortest,
    /// Both sides become the square's (SigLIP).
    Squash,
}

impl Preprocess {
    /// The number of values of one input, `3 * side * side`.
    pub fn n_numbers(&self) -> usize {
        3 * (self.side_px * self.side_px) as usize
    }

    /// The image as a square of the network's size, bicubic. [`SquareResize::Shortest`]: short side to S, long side truncated, centre crop
    /// with its offset rounded half to even.
    pub fn square(&self, image: &Image) -> Image {
        self.square_of(image, [0, 0, i64::from(image.width), i64::from(image.height)])
    }

    /// As [`Self::square`] of an image that had some size before [`Image::decode_draft`] made it smaller.
    pub fn square_of_draft(&self, draft: &Image, size: [u32; 2]) -> Image {
        let (to, [x, y]) = self.resized(size);
        let whole = [0, 0, i64::from(draft.width), i64::from(draft.height)];
        draft.resize_window(whole, to, [x, y, x + self.side_px, y + self.side_px])
    }

    /// As [`Self::square`] of the rectangle `[x1, y1, x2, y2]`, which is black where it leaves the image.
    pub fn square_of(&self, image: &Image, rectangle: [i64; 4]) -> Image {
        let [x1, y1, x2, y2] = rectangle;
        let (to, [x, y]) = self.resized([(x2 - x1) as u32, (y2 - y1) as u32]);
        image.resize_window(rectangle, to, [x, y, x + self.side_px, y + self.side_px])
    }

    /// The size that an image of some size is resized to, and where in it the centre square begins.
    pub fn resized(&self, [width, height]: [u32; 2]) -> ([u32; 2], [u32; 2]) {
        let side = self.side_px;
        if self.resize == SquareResize::Squash {
            return ([side, side], [0, 0]);
        }
        let long = |short: u32, long: u32| ((u64::from(side) * u64::from(long)) / u64::from(short)) as u32;
        let to = if width <= height { [side, long(width, height)] } else { [long(height, width), side] };
        (to, to.map(|length| (f64::from(length - side) / 2.0).round_ties_even() as u32))
    }

    /// Normalises an image into `out`, `[3, H, W]`.
    pub fn normalise(&self, image: &Image, out: &mut [f32]) {
        let n_pixels = (image.width * image.height) as usize;
        assert_eq!(out.len(), 3 * n_pixels, "BUG: a buffer of another size");
        // As torchvision: v / 255, minus mean, divided by std, each rounded to f32.
        let tables: [[f32; 256]; 3] =
            std::array::from_fn(|channel| std::array::from_fn(|value| (value as f32 / 255.0 - self.mean[channel]) / self.std[channel]));
        for (channel, plane) in out.chunks_exact_mut(n_pixels).enumerate() {
            for (number, pixel) in plane.iter_mut().zip(image.rgb.chunks_exact(3)) {
                *number = tables[channel][usize::from(pixel[channel])];
            }
        }
    }
}
