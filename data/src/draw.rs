//! Boxes with labels, drawn on images.
//!
//! Letters are those of a font of 8 x 8 px: Latin and Greek; others are drawn as a question mark.

use font8x8::{BASIC_FONTS, GREEK_FONTS, LATIN_FONTS, UnicodeFonts as _};

use crate::{boxes::Xyxy, images::Image};

/// Colours of boxes, red green blue; light enough for black letters.
const COLOURS: [[u8; 3]; 10] = [
    [255, 190, 0],
    [80, 220, 100],
    [255, 120, 120],
    [90, 190, 255],
    [255, 130, 230],
    [0, 225, 210],
    [210, 230, 60],
    [255, 150, 60],
    [190, 165, 255],
    [215, 215, 215],
];
const BLACK: [u8; 3] = [0; 3];
/// The side of a letter in the font, in px.
const LETTER: i64 = 8;
/// Images whose longer side is below this are enlarged by a whole number, so that labels can be read, in px.
const LEGIBLE: u32 = 800;
/// An image of this longer side has letters of the font's size; those of larger images are as many times larger, in px.
const UNSCALED: u32 = 380;

/// A box with a label.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled {
    /// In px of the image.
    pub xyxy: Xyxy,
    /// One line of text.
    pub label: String,
    /// Boxes of one number have one colour.
    pub colour: usize,
}

/// Draws boxes and their labels on a copy of an image, the first on top. A small image is enlarged.
pub fn drawn(image: &Image, boxes: &[Labelled]) -> Image {
    let factor = (LEGIBLE / image.width.max(image.height)).max(1);
    let mut canvas = enlarged(image, factor);
    let longer = canvas.width.max(canvas.height);
    let scale = i64::from((longer / UNSCALED).max(1));
    let line = 2 * scale;
    for Labelled { xyxy, label, colour } in boxes.iter().rev() {
        let colour = COLOURS[colour % COLOURS.len()];
        let [x1, y1, x2, y2] = [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2].map(|side| (side * factor as f32).round() as i64);
        fill(&mut canvas, [x1, y1, x2, y1 + line], colour);
        fill(&mut canvas, [x1, y2 - line, x2, y2], colour);
        fill(&mut canvas, [x1, y1, x1 + line, y2], colour);
        fill(&mut canvas, [x2 - line, y1, x2, y2], colour);
        write(&mut canvas, [x1, y1], label, scale, colour);
    }
    canvas
}

/// Writes a label above a corner, or below it at the top of the image; the whole label lies in the image where it fits.
fn write(canvas: &mut Image, [x, y]: [i64; 2], label: &str, scale: i64, colour: [u8; 3]) {
    let (side, margin) = (LETTER * scale, scale);
    let width = label.chars().count() as i64 * side + 2 * margin;
    let height = side + 2 * margin;
    let left = x.min(i64::from(canvas.width) - width).max(0);
    let top = if y >= height { y - height } else { y.max(0) };
    fill(canvas, [left, top, left + width, top + height], colour);
    for (place, letter) in label.chars().enumerate() {
        let (left, top) = (left + margin + place as i64 * side, top + margin);
        for (row, bits) in glyph(letter).into_iter().enumerate() {
            for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                let (x, y) = (left + column * scale, top + row as i64 * scale);
                fill(canvas, [x, y, x + scale, y + scale], BLACK);
            }
        }
    }
}

/// The rows of a letter; the lowest bit is the leftmost pixel.
fn glyph(letter: char) -> [u8; 8] {
    let known = BASIC_FONTS.get(letter).or_else(|| LATIN_FONTS.get(letter)).or_else(|| GREEK_FONTS.get(letter));
    known.or_else(|| BASIC_FONTS.get('?')).unwrap_or_default()
}

/// Fills the part of a rectangle, half-open, that lies in the image.
fn fill(canvas: &mut Image, [x1, y1, x2, y2]: [i64; 4], colour: [u8; 3]) {
    let (width, height) = (i64::from(canvas.width), i64::from(canvas.height));
    for y in y1.clamp(0, height)..y2.clamp(0, height) {
        for x in x1.clamp(0, width)..x2.clamp(0, width) {
            let place = 3 * (y * width + x) as usize;
            canvas.rgb[place..place + 3].copy_from_slice(&colour);
        }
    }
}

/// The image with each pixel repeated on both axes.
fn enlarged(image: &Image, factor: u32) -> Image {
    let factor = factor as usize;
    let mut rgb = Vec::with_capacity(image.rgb.len() * factor * factor);
    for row in image.rgb.chunks_exact(3 * image.width as usize) {
        let row: Vec<u8> = row.chunks_exact(3).flat_map(|pixel| pixel.repeat(factor)).collect();
        (0..factor).for_each(|_| rgb.extend_from_slice(&row));
    }
    Image { width: image.width * factor as u32, height: image.height * factor as u32, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(width: u32, height: u32) -> Image {
        Image { width, height, rgb: vec![90; 3 * (width * height) as usize] }
    }

    #[test]
    fn boxes_lie_where_they_are_and_labels_inside_the_image() {
        let labelled = |corners: [f32; 4]| Labelled { xyxy: corners.into(), label: "red mug 0.93".into(), colour: 1 };
        let drawn_at = |corners| drawn(&grey(640, 400), &[labelled(corners)]);
        let pixel = |image: &Image, x: u32, y: u32| -> [u8; 3] {
            let place = 3 * (y * image.width + x) as usize;
            image.rgb[place..place + 3].try_into().unwrap()
        };
        let inside = drawn_at([100.0, 100.0, 300.0, 200.0]);
        for (x, y) in [(100, 100), (299, 199), (200, 101), (101, 150)] {
            assert_eq!(pixel(&inside, x, y), COLOURS[1], "{x} {y}");
        }
        for (x, y) in [(98, 150), (300, 150), (150, 200), (200, 150), (300, 95)] {
            assert_eq!(pixel(&inside, x, y), [90; 3], "{x} {y}");
        }
        // The label has 12 letters and lies above the box.
        assert_eq!(pixel(&inside, 100 + 12 * 8 + 1, 91), COLOURS[1]);
        // At the corners, and outside of the image.
        for corners in [[0.0, 0.0, 640.0, 400.0], [630.0, 2.0, 640.0, 9.0], [-50.0, -50.0, 700.0, 500.0], [5.0, 399.5, 5.2, 400.0]] {
            let image = drawn_at(corners);
            let black = image.rgb.chunks_exact(3).filter(|pixel| *pixel == BLACK).count();
            let letters = "red mug 0.93".chars().map(|letter| glyph(letter).map(u8::count_ones).iter().sum::<u32>()).sum::<u32>();
            assert_eq!(black, letters as usize, "{corners:?}");
        }
    }

    #[test]
    fn small_images_are_enlarged_and_nothing_else_is_changed() {
        let image = Image { width: 2, height: 1, rgb: vec![1, 2, 3, 4, 5, 6] };
        let large = drawn(&image, &[]);
        assert_eq!([large.width, large.height], [800, 400]);
        assert!(
            large.rgb[..1200].chunks(3).all(|pixel| pixel == [1, 2, 3]) && large.rgb[1200..2400].chunks(3).all(|pixel| pixel == [4, 5, 6])
        );
        assert_eq!(drawn(&grey(700, 20), &[]), grey(700, 20));
    }

    #[test]
    fn letters_without_a_glyph_are_question_marks() {
        assert_eq!(glyph('杯'), glyph('?'));
        assert_ne!(glyph('é'), glyph('?'));
    }
}
