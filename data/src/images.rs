//! RGB images: decoding, cropping, and the exact pixels that CLIP was trained on.
//!
//! Everything here equals Pillow and torchvision to the last bit, but for two things: JPEG decoders differ by a grey level
//! here and there, most where colour is stored at half the resolution; and Pillow cuts a grey PNG of 16 bits off at 255,
//! where this keeps the upper byte, as both do for colour. Resizing is that of Pillow up to 12, which CLIP was trained with:
//! along rows first. Pillow 13 begins with columns where the height shrinks much more than the width, as in a tall picture
//! that is hardly wider than the network's input.

mod preprocess;

use std::{fs, io::Cursor, path::Path};

use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder as _, ImageReader, Limits,
    codecs::{jpeg::JpegEncoder, png::PngEncoder},
    metadata::Orientation,
};

use jpeg_decoder::PixelFormat;
use zune_jpeg::zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};

use crate::{
    Error, Result, content,
    resize::{Kernel, antialiased},
};

pub use preprocess::{Preprocess, SquareResize};

/// An image in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// px.
    pub width: u32,
    /// px.
    pub height: u32,
    /// `[H, W, 3]`, red green blue.
    pub rgb: Vec<u8>,
}

impl Image {
    /// Reads a JPEG, PNG, WebP or GIF file, of several pictures the first; grey, palette, CMYK and transparent ones become RGB as Pillow's
    /// `convert("RGB")` does, but for transparent pixels of a GIF, which are black.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::decode(&bytes, path)
    }

    /// As [`Self::decode`], of an image whose size is known, `[width, height]` px: another one is refused before anything is decoded.
    pub fn decode_sized(bytes: &[u8], path: &Path, stated: [u32; 2]) -> Result<Self> {
        Self::decode_if(bytes, path, Some(stated))
    }

    /// As [`Self::decode_sized`], but a JPEG in colour or grey may come at a half, a quarter or an eighth of its size, rounded up: as small
    /// as leaves its shorter side at least as long as `least_side` px. Decoding takes less time, and resizing it then as well; the
    /// levels differ from those of the whole image resized, as of Pillow's `draft`.
    pub fn decode_draft(bytes: &[u8], path: &Path, stated: [u32; 2], least_side: u32) -> Result<Self> {
        // Where there is no draft, the usual way says what is wrong, if anything is.
        Self::draft(bytes, stated, least_side).map_or_else(|| Self::decode_sized(bytes, path, stated), Ok)
    }

    fn draft(bytes: &[u8], stated: [u32; 2], least_side: u32) -> Option<Self> {
        let shorter = stated[0].min(stated[1]);
        if shorter < 2 * least_side || is_too_large(stated) || !bytes.starts_with(JPEG_START) || !reaches_end(bytes) {
            return None;
        }
        let mut decoder = jpeg_decoder::Decoder::new(bytes);
        decoder.read_info().ok()?;
        let info = decoder.info().filter(|info| [info.width, info.height].map(u32::from) == stated)?;
        let channels = match info.pixel_format {
            PixelFormat::L8 => 1,
            PixelFormat::RGB24 => 3,
            PixelFormat::L16 | PixelFormat::CMYK32 => return None,
        };
        let [width, height] = stated.map(|side| (u64::from(side) * u64::from(least_side)).div_ceil(u64::from(shorter)) as u16);
        let (width, height) = decoder.scale(width, height).ok()?;
        let levels = decoder.decode().ok()?;
        let rgb = if channels == 3 { levels } else { levels.into_iter().flat_map(|level| [level; 3]).collect() };
        Some(Self { width: width.into(), height: height.into(), rgb })
    }

    /// Decodes a JPEG, PNG, WebP or GIF; `path` is for the message.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::decode_if(bytes, path, None)
    }

    /// The size of an image that decodes to its end, `[width, height]` px: fails where [`Self::decode`] does. Of a JPEG, the brightness alone is computed.
    pub fn check(bytes: &[u8], path: &Path) -> Result<[u32; 2]> {
        let decoder = header(bytes, path, None)?;
        let size = decoder.dimensions().into();
        if !(bytes.starts_with(JPEG_START) && has_brightness(bytes)) {
            DynamicImage::from_decoder(decoder).map_err(|error| not_an_image(path, &error))?;
        }
        Ok(size)
    }

    /// The size of an image, `[width, height]` px, from its header: fails where [`Self::decode`] would fail for what the header, or the
    /// end of a JPEG, says. `path` is for the message.
    pub fn size(bytes: &[u8], path: &Path) -> Result<[u32; 2]> {
        header(bytes, path, None).map(|decoder| decoder.dimensions().into())
    }

    /// The size that a header claims, however large, `[width, height]` px.
    pub fn claimed_size(bytes: &[u8]) -> Option<[u32; 2]> {
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok()?;
        reader.into_dimensions().ok().map(Into::into)
    }

    /// As [`Self::size`], of an image whose size is known, `[width, height]` px: fails where [`Self::decode_sized`] would.
    pub fn check_size(bytes: &[u8], path: &Path, stated: [u32; 2]) -> Result<()> {
        header(bytes, path, Some(stated)).map(drop)
    }

    /// As [`Self::decode_sized`], with transparent pixels before a white ground instead of without their transparency: of each level `c`
    /// with opacity `a` of 255 remains `rint(a / 255 * c + 255 - a)`. (PromptDet, section 8.)
    pub fn decode_on_white(bytes: &[u8], path: &Path, stated: [u32; 2]) -> Result<Self> {
        let decoder = header(bytes, path, Some(stated))?;
        let image = DynamicImage::from_decoder(decoder).map_err(|error| not_an_image(path, &error))?;
        let [width, height] = stated;
        if !image.color().has_alpha() {
            return Ok(Self { width, height, rgb: to_rgb8(image) });
        }
        let opacities: Vec<u8> = image.to_rgba8().pixels().map(|pixel| pixel.0[3]).collect();
        let mut rgb = to_rgb8(image);
        for (pixel, opacity) in rgb.as_chunks_mut::<3>().0.iter_mut().zip(opacities) {
            *pixel = pixel.map(|level| on_white(level, opacity));
        }
        Ok(Self { width, height, rgb })
    }

    fn decode_if(bytes: &[u8], path: &Path, stated: Option<[u32; 2]>) -> Result<Self> {
        let decoder = header(bytes, path, stated)?;
        let (width, height) = decoder.dimensions();
        let rgb = to_rgb8(DynamicImage::from_decoder(decoder).map_err(|error| not_an_image(path, &error))?);
        Ok(Self { width, height, rgb })
    }

    /// Encodes as JPEG, `quality` in 1..=100; neither side may be longer than [`MAX_JPEG_SIDE`].
    pub fn to_jpeg(&self, quality: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        let encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
        encoder.write_image(&self.rgb, self.width, self.height, ExtendedColorType::Rgb8).expect("BUG: writing to memory does not fail");
        bytes
    }

    /// Encodes as PNG, without loss.
    pub fn to_png(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let encoder = PngEncoder::new(&mut bytes);
        encoder.write_image(&self.rgb, self.width, self.height, ExtendedColorType::Rgb8).expect("BUG: writing to memory does not fail");
        bytes
    }

    /// The rectangle `[x1, y1, x2, y2]` px, half-open; black outside the image, as in Pillow.
    pub fn crop(&self, [x1, y1, x2, y2]: [i64; 4]) -> Self {
        assert!(x1 < x2 && y1 < y2, "BUG: an empty crop");
        let (width, height) = ((x2 - x1) as usize, (y2 - y1) as usize);
        let mut rgb = vec![0; width * height * 3];
        let (left, right) = (x1.clamp(0, i64::from(self.width)), x2.clamp(0, i64::from(self.width)));
        if left < right {
            for y in y1.max(0)..y2.min(i64::from(self.height)) {
                let from = (y as usize * self.width as usize + left as usize) * 3;
                let to = ((y - y1) as usize * width + (left - x1) as usize) * 3;
                let n_bytes = (right - left) as usize * 3;
                rgb[to..to + n_bytes].copy_from_slice(&self.rgb[from..from + n_bytes]);
            }
        }
        Self { width: width as u32, height: height as u32, rgb }
    }

    /// Swaps left and right.
    pub fn mirror(&mut self) {
        for row in self.rgb.chunks_exact_mut(3 * self.width as usize) {
            row.as_chunks_mut::<3>().0.reverse();
        }
    }

    /// Pillow's antialiased bicubic resize.
    pub fn resize(&self, width: u32, height: u32) -> Self {
        self.resize_of([0, 0, i64::from(self.width), i64::from(self.height)], width, height)
    }

    /// Resized as Pillow's antialiased bilinear filter does.
    pub fn resize_bilinear(&self, width: u32, height: u32) -> Self {
        let [from, to] = [[self.width, self.height], [width, height]].map(|size| size.map(|side| side as usize));
        let all = [0, 0, i64::from(self.width), i64::from(self.height)];
        Self { width, height, rgb: antialiased(Kernel::Bilinear, &self.rgb, from, all, to, [0, 0, to[0], to[1]]) }
    }

    /// As [`Self::crop`] and then [`Self::resize`], without the memory of the crop.
    pub fn resize_of(&self, rectangle: [i64; 4], width: u32, height: u32) -> Self {
        self.resize_window(rectangle, [width, height], [0, 0, width, height])
    }

    /// As [`Self::resize_of`] and then [`Self::crop`] to a window inside of it, without computing the pixels outside.
    fn resize_window(&self, rectangle: [i64; 4], to: [u32; 2], window: [u32; 4]) -> Self {
        let [from, to] = [[self.width, self.height], to].map(|size| size.map(|side| side as usize));
        let rgb = antialiased(Kernel::Bicubic, &self.rgb, from, rectangle, to, window.map(|edge| edge as usize));
        Self { width: window[2] - window[0], height: window[3] - window[1], rgb }
    }
}

/// A level with an opacity before white.
pub(crate) fn on_white(level: u8, opacity: u8) -> u8 {
    let (level, opacity) = (f64::from(level), f64::from(opacity));
    (opacity / 255.0 * level + 255.0 - opacity).round_ties_even() as u8
}

/// The longest side of a JPEG, px.
pub const MAX_JPEG_SIDE: u32 = 65_535;

const JPEG_START: &[u8] = &[0xff, 0xd8];
const PNG_START: &[u8] = b"\x89PNG\r\n\x1a\n";
/// The most pixels of an image that is decoded: a file of a few KB may claim any number, and each takes memory.
const MAX_PIXELS: u64 = 1 << 28;
/// Bytes of the widest pixels, four numbers of 16 bits.
const MAX_PIXEL_BYTES: u64 = 8;

const FORMATS: &str = "a JPEG, PNG, WebP or GIF image";

/// Whether a file begins as an image of a format that is decoded.
pub fn is_decoded(bytes: &[u8]) -> bool {
    bytes.starts_with(JPEG_START)
        || content::image_format(bytes).is_some_and(|format| ["a PNG", "a WebP", "a GIF"].contains(&format.name()))
}

fn is_too_large([width, height]: [u32; 2]) -> bool {
    u64::from(width) * u64::from(height) > MAX_PIXELS
}

/// Reads the header of an image, and checks the size against a stated one.
fn header<'a>(bytes: &'a [u8], path: &Path, stated: Option<[u32; 2]>) -> Result<impl ImageDecoder + 'a> {
    let refused = |problem: String, hint: String| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) };
    if !is_decoded(bytes)
        && let Some(found) = content::describe(bytes)
    {
        let hint = match content::image_format(bytes) {
            Some(_) => format!("it is {found} with another extension: convert it to JPEG or PNG, or skip it with `on_bad_item: skip`"),
            None => "it is not an image: download it again, or skip it with `on_bad_item: skip`".into(),
        };
        return Err(refused(format!("expected {FORMATS}, found {found}"), hint));
    }
    // The decoder forgives a JPEG that ends early and fills the rest with grey.
    if bytes.starts_with(JPEG_START) && !reaches_end(bytes) {
        return Err(cut_short(path, format!("a JPEG without its end: {} bytes", bytes.len())));
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| not_an_image(path, &error.into()))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_PIXELS * MAX_PIXEL_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| not_an_image(path, &error))?;
    let (width, height) = decoder.dimensions();
    let size = |[width, height]: [u32; 2]| format!("{width} x {height}");
    if let Some(stated) = stated.filter(|stated| *stated != [width, height]) {
        let problem = format!("the annotations say {} px, the image has {}", size(stated), size([width, height]));
        return Err(match (stated == [height, width], orientation(bytes)) {
            (false, _) => {
                refused(problem, "use the images the annotations were made for; a resized copy does not fit its boxes".into())
            }
            (true, Some(tag @ 5..=8)) => refused(
                format!("{problem}: width and height are exchanged, and the file has the EXIF orientation {tag}, by which viewers turn it"),
                "turn the pixels and drop the tag (`mogrify -auto-orient FILE` or `exiftran -ai FILE`): images are taken as they are stored"
                    .into(),
            ),
            (true, _) => refused(
                format!("{problem}: width and height are exchanged"),
                "use the images the annotations were made for, or exchange `width` and `height` in the annotations".into(),
            ),
        });
    }
    if is_too_large([width, height]) {
        let problem = format!("{} px, more than the {MAX_PIXELS} px that an image may have", size([width, height]));
        return Err(refused(problem, "cut it into smaller images, or skip it with `on_bad_item: skip`".into()));
    }
    Ok(decoder)
}

/// Whether the brightness of a JPEG decodes to its end. All coefficients are read for that, also those of colours.
fn has_brightness(bytes: &[u8]) -> bool {
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options.jpeg_set_out_colorspace(ColorSpace::Luma)).decode().is_ok()
}

fn not_an_image(path: &Path, error: &image::ImageError) -> Error {
    cut_short(path, format!("expected {FORMATS}: {error}"))
}

fn cut_short(path: &Path, problem: String) -> Error {
    let hint = Some("the file is cut short or damaged: fetch or make it again".into());
    Error::Malformed { path: path.to_owned(), problem, hint }
}

/// Whether a file has an EXIF orientation by which viewers turn or mirror it.
pub fn is_turned(bytes: &[u8]) -> bool {
    orientation(bytes).is_some_and(|tag| tag > 1)
}

/// Whether a file has an EXIF orientation that moves pixels and not the size of `[width, height]` px, which is therefore not found out by
/// the size.
pub fn is_turned_in_place(bytes: &[u8], [width, height]: [u32; 2]) -> bool {
    match orientation(bytes) {
        Some(2..=4) => true,
        Some(5..=8) => width == height,
        Some(_) | None => false,
    }
}

/// The EXIF orientation of a JPEG or PNG, 1 to 8. (CIPA DC-008, tag 274.)
fn orientation(bytes: &[u8]) -> Option<u8> {
    let exif = if bytes.starts_with(JPEG_START) {
        jpeg_segments(bytes).find_map(|(marker, content)| content.strip_prefix(b"Exif\0\0").filter(|_| marker == 0xe1))?
    } else {
        png_chunks(bytes.strip_prefix(PNG_START)?).find_map(|(kind, content)| (kind == b"eXIf").then_some(content))?
    };
    Orientation::from_exif_chunk(exif).map(Orientation::to_exif)
}

/// The segments of a JPEG's head, up to the first scan.
fn jpeg_segments(jpeg: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = &jpeg[JPEG_START.len()..];
    std::iter::from_fn(move || {
        while let [0xff, 0xff, ..] = rest {
            rest = &rest[1..];
        }
        let &[0xff, marker, high, low, ..] = rest else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let content = rest.get(4..2 + length).filter(|_| marker != 0xda)?;
        rest = &rest[2 + length..];
        Some((marker, content))
    })
}

/// The chunks of a PNG after its signature, up to its pixels.
fn png_chunks(mut rest: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let (kind, content) = (rest.get(4..8)?, rest.get(8..8_usize.checked_add(length)?)?);
        rest = rest.get(8 + length + 4..)?;
        (kind != b"IDAT").then_some((kind, content))
    })
}

/// Whether a JPEG's segments lead to its end marker. A search for the marker's two bytes would also find that of a
/// thumbnail, and miss it in front of trailing bytes.
fn reaches_end(jpeg: &[u8]) -> bool {
    let mut rest = &jpeg[JPEG_START.len()..];
    loop {
        // Compressed data and stray bytes, up to a marker that is not a stuffed byte (00), a restart or a fill byte.
        let marker = rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0x00 | 0x01 | 0xd0..=0xd7 | 0xff));
        let Some(at) = marker else { return false };
        if rest[at + 1] == 0xd9 {
            return true;
        }
        // The length of a segment counts its own two bytes.
        let Some(&[high, low]) = rest.get(at + 2..at + 4) else { return false };
        let Some(after) = rest.get(at + 2 + usize::from(u16::from_be_bytes([high, low])).max(2)..) else { return false };
        rest = after;
    }
}

/// Drops transparency, and of 16 bits the lower 8, as Pillow does; the decoder's own conversion rounds.
fn to_rgb8(image: DynamicImage) -> Vec<u8> {
    let upper = |levels: &[u16]| levels.iter().map(|level| (level >> 8) as u8).collect();
    match image {
        DynamicImage::ImageLuma16(image) => image.into_raw().iter().flat_map(|level| [(level >> 8) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(image) => image.into_raw().chunks_exact(2).flat_map(|pixel| [(pixel[0] >> 8) as u8; 3]).collect(),
        DynamicImage::ImageRgb16(image) => upper(&image),
        DynamicImage::ImageRgba16(image) => {
            image.into_raw().chunks_exact(4).flat_map(|pixel| [0, 1, 2].map(|channel| (pixel[channel] >> 8) as u8)).collect()
        }
        other => other.into_rgb8().into_raw(),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use serde::Deserialize;
    use sha2::{Digest as _, Sha256};

    use super::*;

    /// OpenAI's, by which the goldens were made.
    fn clip(side_px: u32) -> Preprocess {
        let (mean, std) = ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);
        Preprocess { side_px, resize: SquareResize::Shortest, mean, std }
    }

    /// The picture of make.py: smooth colours with sharp edges and noise, from integers alone.
    fn picture(width: u32, height: u32) -> Image {
        let pixel = |x: u32, y: u32, channel: u32| -> u8 {
            let wave = (x * (3 + channel) + y * (7 - channel)) % 256;
            let noise = (x.wrapping_mul(73_856_093) ^ y.wrapping_mul(19_349_663) ^ channel.wrapping_mul(83_492_791)) % 64;
            let block = ((x / 9 + y / 5 + channel) % 2) * 96;
            ((wave / 2 + noise + block) % 256) as u8
        };
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |channel| pixel(x, y, channel)))).collect();
        Image { width, height, rgb }
    }

    /// A byte changed at each of many places of a JPEG, and the JPEG cut there.
    #[test]
    fn what_a_check_passes_decodes() {
        let path = Path::new("image");
        assert_eq!(Image::check(&picture(5, 3).to_png(), path).unwrap(), [5, 3]);
        for name in ["full", "half", "grey", "cmyk", "progressive"] {
            let jpeg = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/images/{name}.jpg"))).unwrap();
            let (stride, mut n_refused, mut n) = (jpeg.len() / 300 + 1, 0, 0);
            for place in (0..jpeg.len()).step_by(stride) {
                let mut flipped = jpeg.clone();
                flipped[place] ^= 0x55;
                for bytes in [&jpeg, &flipped, &jpeg[..place]] {
                    let found = Image::check(bytes, path).map_err(|error| error.to_string());
                    let expected = Image::decode(bytes, path).map(|image| [image.width, image.height]).map_err(|error| error.to_string());
                    (n, n_refused) = (n + 1, n_refused + usize::from(found.is_err()));
                    assert_eq!(found, expected, "{name}, {place}");
                }
            }
            assert!(n_refused > n / 3 && n_refused < n * 2 / 3 + 1, "{name}: {n_refused} of {n}");
        }
    }

    #[derive(Deserialize)]
    struct Golden {
        /// `WxH` -> what torchvision's CLIP transform makes of the picture, before normalisation.
        fixed: BTreeMap<String, Resized>,
        /// `WxH-wxh` -> Pillow's bicubic resize.
        resized: BTreeMap<String, Resized>,
        /// Name -> RGB of an encoded file.
        decoded: BTreeMap<String, Resized>,
        /// Name of a JPEG -> Pillow's mean of its red, green and blue, and the RGB of some pixels.
        jpeg: BTreeMap<String, Jpeg>,
        /// Normalised values of grey levels 0, 1, 128, 255, by channel.
        normalised: Vec<[f32; 3]>,
    }

    #[derive(Deserialize)]
    struct Resized {
        sha256: String,
        size: [u32; 2],
    }

    #[derive(Deserialize)]
    struct Jpeg {
        size: [u32; 2],
        mean: [f64; 3],
        /// Every 37th pixel.
        pixels: Vec<[u8; 3]>,
    }

    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/images")
    }

    fn golden() -> Golden {
        serde_json::from_slice(&fs::read(folder().join("golden.json")).unwrap()).unwrap()
    }

    fn sha256(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn size(text: &str) -> [u32; 2] {
        let (width, height) = text.split_once('x').unwrap();
        [width.parse().unwrap(), height.parse().unwrap()]
    }

    #[test]
    fn resizing_equals_pillow_to_the_last_bit() {
        for (name, expected) in golden().resized {
            let [from, to] = [name.split_once('-').unwrap().0, name.split_once('-').unwrap().1].map(size);
            let resized = picture(from[0], from[1]).resize(to[0], to[1]);
            assert_eq!(sha256(&resized.rgb), expected.sha256, "{name}");
        }
    }

    #[test]
    fn the_fixed_preprocess_equals_torchvision_to_the_last_bit() {
        for (name, expected) in golden().fixed {
            let [width, height] = size(&name);
            assert_eq!(sha256(&clip(224).square(&picture(width, height)).rgb), expected.sha256, "{name}");
        }
    }

    #[test]
    fn normalisation_equals_torchvision() {
        let clip = clip(224);
        for (level, expected) in [0_u8, 1, 128, 255].into_iter().zip(golden().normalised) {
            let mut found = [0.0; 3];
            clip.normalise(&Image { width: 1, height: 1, rgb: vec![level; 3] }, &mut found);
            assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= 1e-7), "{found:?} {expected:?}");
        }
    }

    #[test]
    fn files_of_every_kind_become_the_rgb_that_pillow_makes() {
        for (name, expected) in golden().decoded {
            let image = Image::open(&folder().join(&name)).unwrap();
            assert_eq!([image.width, image.height], expected.size);
            assert_eq!(sha256(&image.rgb), expected.sha256, "{name}");
        }
    }

    /// Smooth pictures: decoders differ in how they enlarge colour that is stored at half the resolution.
    #[test]
    fn jpegs_of_every_kind_are_within_three_levels_of_pillow() {
        for (name, expected) in golden().jpeg {
            let image = Image::open(&folder().join(&name)).unwrap();
            assert_eq!([image.width, image.height], expected.size, "{name}");
            let pixels: Vec<&[u8]> = image.rgb.chunks_exact(3).collect();
            for (place, levels) in expected.pixels.iter().enumerate() {
                assert!(pixels[37 * place].iter().zip(levels).all(|(found, level)| found.abs_diff(*level) <= 3), "{name} {place}");
            }
            for (channel, mean) in expected.mean.into_iter().enumerate() {
                let found = pixels.iter().map(|pixel| f64::from(pixel[channel])).sum::<f64>() / pixels.len() as f64;
                assert!((found - mean).abs() < 0.5, "{name}: mean of channel {channel}: {found}, expected {mean}");
            }
        }
    }

    #[derive(Deserialize)]
    struct Pixels {
        size: [u32; 2],
        rgb: Vec<u8>,
    }

    #[test]
    fn webps_and_gifs_are_those_of_pillow() {
        let folder = folder().join("../formats");
        let golden: BTreeMap<String, Pixels> = serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
        for (name, Pixels { size, rgb }) in golden {
            let image = Image::open(&folder.join(&name)).unwrap();
            assert_eq!([image.width, image.height], size, "{name}");
            let tolerance = if ["lossy.webp", "animated.webp"].contains(&name.as_str()) { 3 } else { 0 };
            let apart = image.rgb.iter().zip(&rgb).map(|(found, level)| found.abs_diff(*level)).max();
            assert!(apart <= Some(tolerance) && image.rgb.len() == rgb.len(), "{name}: {apart:?}");
        }
    }

    #[test]
    fn a_webp_or_a_gif_cut_anywhere_is_an_error_or_an_image_and_never_a_panic() {
        for name in ["lossless.webp", "alpha.webp", "lossy.webp", "animated.webp", "plain.gif", "animated.gif"] {
            let bytes = fs::read(folder().join("../formats").join(name)).unwrap();
            for length in (0..bytes.len()).step_by(7) {
                // Bytes after the first picture may be missing.
                drop(Image::decode(&bytes[..length], Path::new(name)));
            }
            assert!(Image::decode(&bytes[..bytes.len() / 4], Path::new(name)).is_err(), "{name}");
        }
    }

    fn draft(path: &Path, stated: [u32; 2], least_side: u32) -> Result<Image> {
        Image::decode_draft(&fs::read(path).unwrap(), path, stated, least_side)
    }

    #[test]
    fn drafts_are_those_of_pillow() {
        for name in ["half.jpg", "full.jpg", "progressive.jpg", "grey.jpg", "exif.jpg"] {
            let expected = Image::open(&folder().join(format!("pillow/draft-{name}.png"))).unwrap();
            let draft = draft(&folder().join(name), [61, 45], 22).unwrap();
            assert_eq!([draft.width, draft.height], [31, 23], "{name}");
            let apart: Vec<u8> = draft.rgb.iter().zip(&expected.rgb).map(|(found, level)| found.abs_diff(*level)).collect();
            let mean = apart.iter().map(|levels| f64::from(*levels)).sum::<f64>() / apart.len() as f64;
            assert!(apart.iter().max() <= Some(&6) && mean <= 1.0, "{name}: {:?}, {mean} on the average", apart.iter().max());
        }
        // What has no draft, or would become too small, is decoded as ever.
        for (name, least_side) in [("cmyk.jpg", 22), ("half.jpg", 23), ("rgb.png", 1)] {
            let (path, whole) = (folder().join(name), Image::open(&folder().join(name)).unwrap());
            assert_eq!(draft(&path, [whole.width, whole.height], least_side).unwrap(), whole, "{name}");
        }
        let refused = draft(&folder().join("half.jpg"), [61, 46], 22).unwrap_err();
        assert!(refused.to_string().contains("the annotations say 61 x 46 px, the image has 61 x 45"), "{refused}");
    }

    #[test]
    fn a_jpeg_cut_anywhere_is_an_error_that_names_it() {
        let bytes = picture(64, 48).to_jpeg(90);
        assert!(Image::decode(&bytes, Path::new("whole.jpg")).is_ok());
        for length in (0..bytes.len() - 2).step_by(97).chain([bytes.len() - 2, bytes.len() - 1]) {
            let error = Image::decode(&bytes[..length], Path::new("cut.jpg")).unwrap_err().to_string();
            assert!(error.starts_with("cut.jpg: "), "{error}");
        }
    }

    fn refused(bytes: &[u8], stated: Option<[u32; 2]>) -> (String, String) {
        let error = Image::decode_if(bytes, Path::new("a.jpg"), stated).unwrap_err();
        (error.to_string(), error.hint().unwrap())
    }

    #[test]
    fn images_of_other_formats_and_what_is_none_are_named_by_content() {
        for (bytes, found, hint) in [
            (b"BM\x9a\0\0\0\0\0\0\0\x36".as_slice(), "a BMP", "it is a BMP with another extension: convert it to JPEG or PNG, or skip it"),
            (b"II*\0", "a TIFF", "convert it"),
            (b"\0\0\0\x1cftypavif", "an AVIF", "convert it"),
            (b"\0\0\0\x1cftypheic", "a HEIC", "convert it"),
            (b"\xff\x0a", "a JPEG XL", "convert it"),
            (b"\0\0\x01\0", "an icon (ICO)", "convert it"),
            (b"8BPS", "a Photoshop file (PSD)", "convert it"),
            (b"<svg>", "an SVG", "convert it"),
            (b"<html>", "a web page", "it is not an image: download it again"),
            (b"", "an empty file", "download it again"),
        ] {
            let (problem, advice) = refused(bytes, None);
            assert_eq!(problem, format!("a.jpg: expected a JPEG, PNG, WebP or GIF image, found {found}"));
            assert!(advice.contains(hint) && advice.contains("`on_bad_item: skip`"), "{advice}");
        }
        assert!(refused(b"no picture", None).1.contains("cut short or damaged"));
    }

    /// A JPEG with an EXIF orientation, as cameras write it.
    fn turned(image: &Image, tag: u8) -> Vec<u8> {
        let jpeg = image.to_jpeg(90);
        let exif = [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".as_slice(), &[tag], b"\0\0\0\0\0\0"].concat();
        [&jpeg[..2], &[0xff, 0xe1], &(exif.len() as u16 + 2).to_be_bytes(), &exif, &jpeg[2..]].concat()
    }

    #[test]
    fn an_exif_orientation_is_named_where_it_explains_the_size_and_found_where_it_does_not() {
        let (wide, square) = (picture(64, 48), picture(48, 48));
        for tag in 5..=8 {
            let (problem, hint) = refused(&turned(&wide, tag), Some([48, 64]));
            let expected = "a.jpg: the annotations say 48 x 64 px, the image has 64 x 48: width and height are exchanged, and the file has the \
                            EXIF orientation";
            assert!(problem.starts_with(&format!("{expected} {tag}")), "{problem}");
            assert!(hint.starts_with("turn the pixels and drop the tag"), "{hint}");
            assert!(!is_turned_in_place(&turned(&wide, tag), [64, 48]) && is_turned_in_place(&turned(&square, tag), [48, 48]));
        }
        for tag in 0..=9 {
            assert_eq!(is_turned_in_place(&turned(&wide, tag), [64, 48]), (2..=4).contains(&tag), "{tag}");
            assert_eq!(Image::decode_sized(&turned(&wide, tag), Path::new("a.jpg"), [64, 48]).unwrap().width, 64);
        }
        let (problem, hint) = refused(&turned(&wide, 1), Some([48, 64]));
        assert!(
            problem.ends_with("the image has 64 x 48: width and height are exchanged") && hint.contains("exchange `width` and `height`")
        );
        assert!(refused(&wide.to_jpeg(90), Some([32, 24])).1.contains("a resized copy does not fit"));
        let png = wide.to_png();
        let exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0";
        // Behind the header; its checksum is not looked at here.
        let png = [&png[..33], &(exif.len() as u32).to_be_bytes(), b"eXIf", exif, &[0; 4], &png[33..]].concat();
        assert!(is_turned_in_place(&png, [64, 48]) && !is_turned_in_place(&wide.to_png(), [64, 48]) && !is_turned_in_place(b"", [1, 1]));
        for length in 0..200 {
            is_turned_in_place(&png[..length], [64, 48]);
            is_turned_in_place(&turned(&wide, 6)[..length], [64, 48]);
        }
    }

    /// Resident memory at its peak, in KiB.
    fn peak_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
    }

    #[test]
    fn an_image_that_claims_too_many_pixels_is_refused_before_it_takes_memory() {
        let side = 65_500_u16.to_be_bytes();
        // A sound picture whose header is another's.
        let mut jpeg = picture(64, 48).to_jpeg(90);
        let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[side, side].concat());
        let mut png = picture(64, 48).to_png();
        let side = 200_000_u32.to_be_bytes();
        png[16..24].copy_from_slice(&[side, side].concat());
        let checksum = png[12..29]
            .iter()
            .fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1))));
        png[29..33].copy_from_slice(&(!checksum).to_be_bytes());
        let (before, started) = (peak_kib(), std::time::Instant::now());
        for (bytes, side) in [(&jpeg, 65_500), (&png, 200_000)] {
            let stated = [side, side];
            let (problem, hint) = refused(bytes, None);
            assert_eq!(problem, format!("a.jpg: {side} x {side} px, more than the 268435456 px that an image may have"));
            assert!(hint.contains("`on_bad_item: skip`"), "{hint}");
            let draft = Image::decode_draft(bytes, Path::new("a.jpg"), stated, 224).unwrap_err().to_string();
            let sized = Image::decode_sized(bytes, Path::new("a.jpg"), stated).unwrap_err().to_string();
            assert_eq!((&draft, &sized), (&problem, &problem));
        }
        // Other tests run beside this one.
        assert!(started.elapsed().as_secs() < 5 && peak_kib() - before < 1 << 20);
    }

    #[test]
    fn a_thumbnail_does_not_hide_that_a_jpeg_is_cut() {
        let (whole, thumbnail) = (picture(64, 48).to_jpeg(90), picture(16, 12).to_jpeg(60));
        let length = (thumbnail.len() as u16 + 2).to_be_bytes();
        let bytes = [&whole[..2], &[0xff, 0xe1], &length, &thumbnail, &whole[2..]].concat();
        assert_eq!(Image::decode(&bytes, Path::new("whole.jpg")).unwrap().width, 64);
        let cut = &bytes[..bytes.len() - whole.len() / 2];
        assert!(Image::decode(cut, Path::new("cut.jpg")).unwrap_err().hint().unwrap().contains("fetch or make it again"));
    }

    #[test]
    fn bytes_after_the_end_of_a_jpeg_are_no_fault() {
        let image = picture(40, 30);
        let bytes = [image.to_jpeg(90), vec![0; 5000]].concat();
        assert_eq!(Image::decode(&bytes, Path::new("long.jpg")).unwrap().width, 40);
    }

    #[test]
    fn a_png_holds_the_same_pixels() {
        let image = picture(31, 17);
        assert_eq!(Image::decode(&image.to_png(), Path::new("again.png")).unwrap(), image);
    }

    #[test]
    fn resizing_a_rectangle_is_cutting_it_out_and_resizing_it() {
        let image = picture(97, 61);
        let rectangles = [
            [0, 0, 97, 61],
            [10, 20, 50, 31],
            [-30, -7, 40, 90],
            [-300, -200, 400, 300],
            [90, 50, 130, 80],
            [96, 60, 97, 61],
            [-9, 3, -2, 8],
        ];
        for rectangle in rectangles {
            for (width, height) in [(32, 32), (224, 130), (7, 200)] {
                let expected = image.crop(rectangle).resize(width, height);
                assert!(image.resize_of(rectangle, width, height) == expected, "{rectangle:?} {width}x{height}");
            }
            let clip = clip(48);
            assert!(clip.square_of(&image, rectangle) == clip.square(&image.crop(rectangle)), "{rectangle:?}");
        }
    }

    /// A sliver of 3 x 400 becomes 224 x 29,866 before its centre is cut out.
    #[test]
    fn windows_equal_the_whole_image_resized_and_cut() {
        let rgb = (0..420 * 64 * 3_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let image = Image { width: 64, height: 420, rgb };
        for rectangle in [[20, 10, 23, 410], [0, 0, 33, 65], [10, 20, 64, 47], [5, 6, 7, 8]] {
            let preprocess = Preprocess { side_px: 32, resize: SquareResize::Shortest, mean: [0.0; 3], std: [1.0; 3] };
            let [x1, y1, x2, y2] = rectangle;
            let (to, [left, top]) = preprocess.resized([(x2 - x1) as u32, (y2 - y1) as u32]);
            let whole = image.resize_window(rectangle, to, [0, 0, to[0], to[1]]);
            let row = |row: u32| &whole.rgb[3 * (((top + row) * to[0]) + left) as usize..][..3 * 32];
            let cut: Vec<u8> = (0..32).flat_map(row).copied().collect();
            assert_eq!(preprocess.square_of(&image, rectangle).rgb, cut, "{rectangle:?}");
        }
    }

    #[test]
    fn a_squashed_square_shows_the_whole_image() {
        let image = picture(90, 60);
        let squash = Preprocess { resize: SquareResize::Squash, ..clip(48) };
        assert_eq!(squash.resized([90, 60]), ([48, 48], [0, 0]));
        assert!(squash.square(&image) == image.resize(48, 48) && squash.square(&image) != clip(48).square(&image));
    }

    #[test]
    fn a_crop_may_leave_the_image_and_is_black_there() {
        let image = Image { width: 2, height: 1, rgb: vec![1, 2, 3, 4, 5, 6] };
        let crop = image.crop([-1, -1, 2, 1]);
        assert_eq!((crop.width, crop.height), (3, 2));
        assert_eq!(crop.rgb, [[0; 9], [0, 0, 0, 1, 2, 3, 4, 5, 6]].concat());
        assert_eq!(image.crop([5, 5, 6, 6]).rgb, [0, 0, 0]);
    }
}
