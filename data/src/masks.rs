//! Masks: which pixels of an image belong to an object.
//!
//! COCO keeps them as polygons or as run lengths, plain or packed into text, column by column; outside this module pixels run
//! row by row, and sizes are `[width, height]`. The run length arithmetic is `hotcoco`'s, which is pycocotools' own.
//!
//! Masks of a detector within boxes are pasted as mmdet does (`_do_paste_mask`, that is `grid_sample`, bilinear, without aligned
//! corners, zeros outside). Where this differs: a box without area holds nothing, and pixels farther from the box are never looked
//! at, which changes nothing at a threshold of 0.5.

use std::{borrow::Cow, fmt, ops::Range, str::FromStr};

use hotcoco::{Rle, mask};
use serde_json::Value;

pub use hotcoco::Segmentation;

use crate::{
    annotations::{AnnotationId, ImageId},
    boxes::{Xyxy, xywh_to_xyxy},
};

/// The least probability of a pixel that belongs to an object.
const THRESHOLD: f32 = 0.5;

/// The pixels of an object in an image of a known size.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    rle: Rle,
}

/// A mask as tables hold it: `WIDTHxHEIGHT:` and COCO's run lengths, packed into text. That they are sound is known once they are
/// unpacked ([`Mask::from_packed`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedMask {
    /// Size of the image, `[width, height]`.
    pub size: [u32; 2],
    /// The run lengths.
    pub counts: Box<str>,
}

/// The outline of an object in a file.
#[derive(Debug, Clone, Default)]
pub enum Outline {
    /// Nothing.
    #[default]
    Missing,
    /// Polygons or run lengths.
    Drawn(Segmentation),
    /// Something of another shape, in words; of no use where outlines are, and no harm where they are not.
    Other(&'static str),
}

impl From<Segmentation> for Outline {
    fn from(segmentation: Segmentation) -> Self {
        match &segmentation {
            // What some tools write, and a list of polygons by its shape.
            Segmentation::Polygon(polygons) if polygons.len() > 2 && polygons.iter().all(|polygon| polygon.len() == 2) => {
                Self::Other("a list of points instead of a list of polygons")
            }
            _ => Self::Drawn(segmentation),
        }
    }
}

impl Outline {
    /// The outline that a json value describes, in shapes other than COCO's.
    pub(crate) fn of_json(json: &str) -> Self {
        if let Ok(segmentation) = serde_json::from_str::<Segmentation>(json) {
            return segmentation.into();
        }
        let is_point = |value: &Value| value.as_object().is_some_and(|point| point.contains_key("x") && point.contains_key("y"));
        Self::Other(match serde_json::from_str::<Value>(json) {
            Ok(Value::String(text)) if text.trim().is_empty() => "an empty text",
            Ok(Value::Object(_)) => "an object without `size` and `counts`",
            Ok(Value::Array(list)) if list.iter().all(Value::is_number) => "one list of numbers instead of a list of polygons",
            Ok(Value::Array(list)) if list.iter().all(is_point) => "a list of points instead of a list of polygons",
            Ok(_) | Err(_) => "something else than a list of polygons or run lengths",
        })
    }

    /// Polygons or run lengths.
    pub fn drawn(&self) -> Option<&Segmentation> {
        match self {
            Self::Drawn(segmentation) => Some(segmentation),
            Self::Missing | Self::Other(_) => None,
        }
    }
}

impl PackedMask {
    /// How many pixels there are in an image of `[width, height]` px. Fails, in words, for a mask of another size and for runs that are
    /// not sound.
    pub fn area_in(&self, size: [u32; 2]) -> Result<u64, String> {
        let ([width, height], [expected_width, expected_height]) = (self.size, size);
        if self.size != size {
            return Err(format!("expected a mask of {expected_width} x {expected_height} px, found {width} x {height}"));
        }
        mask::area_from_string(&self.counts, height, width).map_err(|error| format!("mask: {error}"))
    }

    /// As COCO json holds it.
    pub fn to_segmentation(&self) -> Segmentation {
        let [width, height] = self.size;
        Segmentation::CompressedRle { size: [height, width], counts: self.counts.to_string() }
    }
}

impl fmt::Display for PackedMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [width, height] = self.size;
        write!(f, "{width}x{height}:{}", self.counts)
    }
}

impl FromStr for PackedMask {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (size, counts) = text.split_once(':')?;
            let (width, height) = size.split_once('x')?;
            Some(Self { size: [width.parse().ok()?, height.parse().ok()?], counts: counts.into() })
        };
        parsed().ok_or_else(|| format!("expected a mask `WIDTHxHEIGHT:RUNS`, found `{}`", text.chars().take(20).collect::<String>()))
    }
}

impl Mask {
    /// The mask of an annotation of an image of `[width, height]` px.
    ///
    /// Fails, in words, for run lengths of another size, for those that reach beyond their image, and for text that is none.
    pub fn from_segmentation(segmentation: &Segmentation, size: [u32; 2]) -> Result<Self, String> {
        let [width, height] = size;
        let rle = segmentation.to_rle(height, width).map_err(|error| format!("segmentation: {error}"))?;
        if (rle.w, rle.h) != (width, height) {
            return Err(format!("segmentation: expected run lengths of {width} x {height} px, found {} x {}", rle.w, rle.h));
        }
        Ok(Self { rle })
    }

    /// The union of polygons, each `[x, y, x, y, ...]` in px; what lies outside the image is cut off. A polygon of fewer than
    /// three corners is empty. Fails for images of 2³² pixels or more.
    pub fn from_polygons(polygons: &[Vec<f64>], [width, height]: [u32; 2]) -> Result<Self, String> {
        mask::fr_polys(polygons, height, width).map(|rle| Self { rle }).map_err(|error| error.to_string())
    }

    /// The mask of given pixels, `[H, W]`. Fails if their number differs from the size.
    pub fn from_pixels(pixels: &[bool], [width, height]: [u32; 2]) -> Result<Self, String> {
        let (n_columns, n_rows) = (width as usize, height as usize);
        if n_columns.checked_mul(n_rows) != Some(pixels.len()) {
            return Err(format!("expected {width} x {height} pixels, found {}", pixels.len()));
        }
        let columns: Vec<u8> = (0..n_columns).flat_map(|x| (0..n_rows).map(move |y| u8::from(pixels[y * n_columns + x]))).collect();
        mask::encode(&columns, height, width).map(|rle| Self { rle }).map_err(|error| error.to_string())
    }

    /// The mask that a detector predicts within a box, in the image: the pixels whose centres have a probability of at least 0.5 by bilinear
    /// interpolation.
    ///
    /// `probabilities`: `[side, side]`, row by row, in [0, 1], of cells that divide the box evenly; beyond them it is 0. `xyxy`: px of the
    /// image; what lies outside is cut off. Fails for other shapes and for images of 2³² pixels or more.
    pub fn paste(probabilities: &[f32], side: usize, xyxy: &Xyxy, [width, height]: [u32; 2]) -> Result<Self, String> {
        if side == 0 || side.checked_mul(side) != Some(probabilities.len()) {
            return Err(format!("expected {side} x {side} probabilities, found {}", probabilities.len()));
        }
        if width.checked_mul(height).is_none() {
            return Err(format!("expected an image of less than 2³² px, found {width} x {height}"));
        }
        let (columns, rows) = (Axis::new([xyxy.x1, xyxy.x2], side, width), Axis::new([xyxy.y1, xyxy.y2], side, height));
        let spans = rows.spans();
        let mut runs = Runs::default();
        runs.push(columns.pixels.start as u32 * height, false);
        // Column by column, with a border of zeros.
        let stride = side + 2;
        let mut grid = vec![0.0; stride * stride];
        for (row, of_row) in probabilities.chunks_exact(side).enumerate() {
            of_row.iter().enumerate().for_each(|(column, probability)| grid[(column + 1) * stride + row + 1] = *probability);
        }
        let mut cells = vec![0.0; stride];
        for column in &columns.places {
            let (left, right) = grid[column.cell * stride..][..2 * stride].split_at(stride);
            for (cell, (left, right)) in cells.iter_mut().zip(left.iter().zip(right)) {
                *cell = column.between(*left, *right);
            }
            runs.push(rows.pixels.start as u32, false);
            for (cell, span) in &spans {
                // Between two cells of which both belong, or neither does, there is nothing to find out.
                let (above, below) = (cells[*cell], cells[*cell + 1]);
                match (above >= THRESHOLD, below >= THRESHOLD) {
                    (true, true) => runs.push(span.len() as u32, true),
                    (false, false) => runs.push(span.len() as u32, false),
                    (true, false) | (false, true) => {
                        rows.places[span.clone()].iter().for_each(|row| runs.push(1, row.between(above, below) >= THRESHOLD));
                    }
                }
            }
            runs.push(height - rows.pixels.end as u32, false);
        }
        runs.push((width - columns.pixels.end as u32) * height, false);
        Ok(Self { rle: Rle { h: height, w: width, counts: runs.finish() } })
    }

    /// The mask that a table holds. Fails, in words, for run lengths that reach beyond their image and for text that is none.
    pub fn from_packed(packed: &PackedMask) -> Result<Self, String> {
        let [width, height] = packed.size;
        mask::rle_from_string(&packed.counts, height, width).map(|rle| Self { rle }).map_err(|error| format!("mask: {error}"))
    }

    /// As tables hold it.
    pub fn to_packed(&self) -> PackedMask {
        PackedMask { size: self.size(), counts: mask::rle_to_string(&self.rle).into() }
    }

    /// Every pixel of the image, `[H, W]`.
    pub fn to_pixels(&self) -> Vec<bool> {
        let (n_columns, n_rows) = (self.rle.w as usize, self.rle.h as usize);
        let columns = mask::decode(&self.rle);
        (0..n_rows).flat_map(|y| (0..n_columns).map(move |x| (x, y))).map(|(x, y)| columns[x * n_rows + y] != 0).collect()
    }

    /// As COCO json holds it: run lengths packed into text.
    pub fn to_segmentation(&self) -> Segmentation {
        self.to_packed().to_segmentation()
    }

    /// Size of the image, `[width, height]`.
    pub fn size(&self) -> [u32; 2] {
        [self.rle.w, self.rle.h]
    }

    /// The number of pixels.
    pub fn area(&self) -> u64 {
        mask::area(&self.rle)
    }

    /// The smallest box around the pixels; `None` where there are none.
    pub fn bounds(&self) -> Option<Xyxy> {
        (self.area() > 0).then(|| xywh_to_xyxy(mask::to_bbox(&self.rle)))
    }
}

/// Checks that objects have outlines. The message names the first that has none and counts them.
///
/// A missing segmentation is none, and so are polygons all of which have fewer than three corners, and run lengths without a pixel. Other
/// polygons are not drawn for it: millions would take seconds. Whether run lengths are sound is not checked.
pub fn check_outlines<'a>(objects: impl Iterator<Item = (AnnotationId, ImageId, &'a Outline)>) -> Result<(), String> {
    let (mut first, mut n_without, mut n_objects) = (None, 0_usize, 0_usize);
    for (annotation, image, outline) in objects {
        n_objects += 1;
        if let Some(why) = lack_of_outline(outline) {
            n_without += 1;
            first.get_or_insert((annotation, image, why));
        }
    }
    let Some((annotation, image, why)) = first else { return Ok(()) };
    Err(format!("annotation {annotation} of image {image} has {why}; {n_without} of {n_objects} annotations have no outline"))
}

fn lack_of_outline(outline: &Outline) -> Option<Cow<'static, str>> {
    let segmentation = match outline {
        Outline::Missing => return Some("no `segmentation`".into()),
        Outline::Other(found) => return Some(format!("{found} as `segmentation`").into()),
        Outline::Drawn(segmentation) => segmentation,
    };
    match segmentation.polygons() {
        Some(polygons) if polygons.is_empty() => Some("an empty list as `segmentation`".into()),
        Some(polygons) => {
            polygons.iter().all(|polygon| polygon.len() < 6).then_some("a `segmentation` of polygons with fewer than three corners".into())
        }
        None => {
            let rle = segmentation.rle_ref().and_then(|runs| runs.to_rle().ok());
            rle.is_some_and(|rle| mask::area(&rle) == 0).then_some("a `segmentation` of run lengths without a pixel".into())
        }
    }
}

/// Pixels along one side of an image that a box reaches, and where they lie among the cells that divide it.
struct Axis {
    /// Which pixels.
    pixels: Range<usize>,
    /// One for each of them.
    places: Vec<Place>,
}

/// A place among cells.
struct Place {
    /// The cell before it, counted from 1; 0 stands for what is before the first.
    cell: usize,
    /// How far it is from that cell to the next, in [0, 1].
    way: f32,
}

impl Axis {
    /// `ends`: of the box, px; `side`: how many cells; `length`: of the image, px.
    fn new([start, end]: [f32; 2], side: usize, length: u32) -> Self {
        // Without area, or not a number.
        if (end - start).is_nan() || end <= start {
            return Self { pixels: 0..0, places: Vec::new() };
        }
        let length = length as usize;
        let first = (start.floor() as usize).min(length);
        let pixels = first..(end.ceil() as usize).clamp(first, length);
        let place = |pixel: usize| {
            // In [-1, 1] between the ends, then in cells, as `grid_sample` computes it.
            let at = (pixel as f32 + 0.5 - start) / (end - start) * 2.0 - 1.0;
            let at = (at + 1.0) * (side as f32 / 2.0) - 0.5;
            let before = at.floor().clamp(-1.0, side as f32 - 1.0);
            Place { cell: (before + 1.0) as usize, way: (at - before).clamp(0.0, 1.0) }
        };
        Self { places: pixels.clone().map(place).collect(), pixels }
    }

    /// The pixels between each two neighbouring cells, as places, with the cell before them.
    fn spans(&self) -> Vec<(usize, Range<usize>)> {
        let mut spans: Vec<(usize, Range<usize>)> = Vec::new();
        for (place, Place { cell, .. }) in self.places.iter().enumerate() {
            match spans.last_mut() {
                Some((last, span)) if last == cell => span.end = place + 1,
                Some(_) | None => spans.push((*cell, place..place + 1)),
            }
        }
        spans
    }
}

impl Place {
    fn between(&self, before: f32, after: f32) -> f32 {
        before * (1.0 - self.way) + after * self.way
    }
}

/// Run lengths in the making: of pixels that do not belong, then of those that do, and so on.
#[derive(Default)]
struct Runs {
    counts: Vec<u32>,
    /// Of the run that is still going on.
    n_pixels: u32,
    /// Whether its pixels belong.
    belong: bool,
}

impl Runs {
    /// Adds pixels, in all no more than the image has.
    fn push(&mut self, n_pixels: u32, belong: bool) {
        if belong == self.belong || n_pixels == 0 {
            self.n_pixels += n_pixels;
        } else {
            self.counts.push(self.n_pixels);
            (self.n_pixels, self.belong) = (n_pixels, belong);
        }
    }

    fn finish(mut self) -> Vec<u32> {
        self.counts.push(self.n_pixels);
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        /// Width, height.
        size: [u32; 2],
        segmentation: Segmentation,
        counts: String,
        area: u64,
        xywh: [f64; 4],
        row_sums: Vec<usize>,
        pixels: Option<Vec<u8>>,
    }

    fn cases() -> Vec<(Case, Mask)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/masks/golden.json");
        let cases: Vec<Case> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let mask = |case: &Case| Mask::from_segmentation(&case.segmentation, case.size).unwrap();
        cases.into_iter().map(|case| (mask(&case), case)).map(|(mask, case)| (case, mask)).collect()
    }

    #[test]
    fn polygons_and_runs_become_the_runs_of_pycocotools() {
        for (case, mask) in cases() {
            let Segmentation::CompressedRle { size, counts } = mask.to_segmentation() else { panic!("expected packed run lengths") };
            assert_eq!((size, counts), ([case.size[1], case.size[0]], case.counts));
        }
    }

    #[test]
    fn areas_and_bounds_equal_pycocotools() {
        for (case, mask) in cases() {
            assert_eq!(mask.area(), case.area);
            assert_eq!(mask.bounds(), (case.area > 0).then(|| xywh_to_xyxy(case.xywh)));
        }
    }

    #[test]
    fn pixels_run_row_by_row() {
        let cases = cases();
        let (first, mask) = &cases[0];
        let expected: Vec<bool> = first.pixels.iter().flatten().map(|pixel| *pixel != 0).collect();
        assert_eq!(mask.to_pixels(), expected);
        for (case, mask) in &cases {
            let pixels = mask.to_pixels();
            let rows = pixels.chunks_exact(case.size[0] as usize);
            assert_eq!(rows.map(|row| row.iter().filter(|pixel| **pixel).count()).collect::<Vec<_>>(), case.row_sums);
        }
    }

    #[test]
    fn packed_runs_give_back_the_mask() {
        for (case, mask) in cases() {
            assert_eq!(Mask::from_segmentation(&mask.to_segmentation(), case.size).unwrap(), mask);
        }
    }

    #[derive(Deserialize)]
    struct Pasted {
        side: usize,
        /// In 512ths.
        probabilities: Vec<u16>,
        xyxy: [f32; 4],
        size: [u32; 2],
        counts: String,
    }

    #[test]
    fn masks_of_boxes_are_pasted_as_mmdet_does() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/masks/pasted.json");
        let cases: Vec<Pasted> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for (place, Pasted { side, probabilities, xyxy, size, counts }) in cases.into_iter().enumerate() {
            let probabilities: Vec<f32> = probabilities.into_iter().map(|number| f32::from(number) / 512.0).collect();
            let mask = Mask::paste(&probabilities, side, &xyxy.into(), size).unwrap();
            assert_eq!(mask.to_packed(), PackedMask { size, counts: counts.into() }, "case {place}: {side} cells in {xyxy:?}");
        }
    }

    #[test]
    fn boxes_without_area_and_beside_the_image_hold_nothing() {
        for xyxy in
            [[3.0, 3.0, 3.0, 9.0], [9.0, 3.0, 4.0, 9.0], [f32::NAN, 3.0, 4.0, 9.0], [40.0, 3.0, 50.0, 9.0], [-9.0, -9.0, -4.0, -1.0]]
        {
            let mask = Mask::paste(&[1.0; 4], 2, &xyxy.into(), [12, 10]).unwrap();
            assert_eq!((mask.area(), mask.size()), (0, [12, 10]), "{xyxy:?}");
        }
        let whole = Mask::paste(&[1.0; 4], 2, &[f32::MIN, -3.0, f32::MAX, 1e9].into(), [12, 10]).unwrap();
        assert!(whole.area() <= 120);
    }

    #[test]
    fn what_is_no_mask_of_a_box_is_refused() {
        let refused = |probabilities: &[f32], side, size| Mask::paste(probabilities, side, &[0.0, 0.0, 2.0, 2.0].into(), size).unwrap_err();
        assert_eq!(refused(&[1.0; 5], 2, [4, 4]), "expected 2 x 2 probabilities, found 5");
        assert_eq!(refused(&[], 0, [4, 4]), "expected 0 x 0 probabilities, found 0");
        assert_eq!(refused(&[1.0], 1, [1 << 16, 1 << 16]), "expected an image of less than 2³² px, found 65536 x 65536");
    }

    #[test]
    fn packed_masks_are_text_and_come_back() {
        for (_, mask) in cases() {
            let text = mask.to_packed().to_string();
            assert_eq!(Mask::from_packed(&text.parse().unwrap()).unwrap(), mask, "{text}");
        }
        for wrong in ["", "4x3", "4:00", "ax3:00", "-4x3:00"] {
            assert_eq!(wrong.parse::<PackedMask>().unwrap_err(), format!("expected a mask `WIDTHxHEIGHT:RUNS`, found `{wrong}`"));
        }
        let too_long = PackedMask { size: [2, 2], counts: Mask::from_pixels(&[true; 9], [3, 3]).unwrap().to_packed().counts };
        assert!(Mask::from_packed(&too_long).unwrap_err().starts_with("mask: "));
    }

    #[test]
    fn what_outlines_nothing_is_named_and_counted() {
        let polygons = |polygons: &[&[f64]]| Some(Segmentation::Polygon(polygons.iter().map(|polygon| polygon.to_vec()).collect()));
        let runs = |counts: &[u32]| Some(Segmentation::UncompressedRle { size: [3, 4], counts: counts.to_vec() });
        let packed = |pixels: &[bool]| Some(Mask::from_pixels(pixels, [4, 3]).unwrap().to_segmentation());
        let triangle: &[f64] = &[0.0, 0.0, 3.0, 0.0, 3.0, 2.0];
        let check = |segmentation: Option<Segmentation>| {
            let sound = polygons(&[triangle]);
            let outlines = [&sound, &segmentation, &segmentation].map(|drawn| drawn.clone().map_or(Outline::Missing, Outline::from));
            check_outlines(outlines.iter().zip(1..).map(|(outline, id)| (AnnotationId(id), ImageId(7), outline)))
        };
        for sound in [polygons(&[triangle, &[1.0, 1.0]]), runs(&[2, 1, 9]), packed(&[true; 12])] {
            assert_eq!(check(sound), Ok(()));
        }
        let empty = [
            (None, "no `segmentation`"),
            (polygons(&[]), "an empty list as `segmentation`"),
            (polygons(&[&[]]), "a `segmentation` of polygons with fewer than three corners"),
            (polygons(&[&triangle[..4], &[1.0, 1.0]]), "a `segmentation` of polygons with fewer than three corners"),
            (runs(&[12]), "a `segmentation` of run lengths without a pixel"),
            (runs(&[]), "a `segmentation` of run lengths without a pixel"),
            (packed(&[false; 12]), "a `segmentation` of run lengths without a pixel"),
        ];
        for (segmentation, why) in empty {
            assert_eq!(check(segmentation), Err(format!("annotation 2 of image 7 has {why}; 2 of 3 annotations have no outline")));
        }
        let other = Outline::of_json("[1, 2, 3, 4, 5, 6]");
        assert_eq!(
            check_outlines([(AnnotationId(2), ImageId(7), &other)].into_iter()),
            Err("annotation 2 of image 7 has one list of numbers instead of a list of polygons as `segmentation`; 1 of 1 annotations have no outline".into())
        );
    }

    #[test]
    fn runs_that_do_not_fit_their_image_are_named() {
        let runs = |counts: &[u32]| Segmentation::UncompressedRle { size: [3, 4], counts: counts.to_vec() };
        let other_size = Mask::from_segmentation(&runs(&[2, 10]), [3, 4]).unwrap_err();
        assert_eq!(other_size, "segmentation: expected run lengths of 3 x 4 px, found 4 x 3");
        assert!(Mask::from_segmentation(&runs(&[2, 11]), [4, 3]).unwrap_err().starts_with("segmentation: "));
        assert_eq!(Mask::from_pixels(&[true; 5], [2, 3]).unwrap_err(), "expected 2 x 3 pixels, found 5");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pixels_survive(width in 1..20_u32, height in 1..20_u32, bits in prop::collection::vec(any::<bool>(), 400)) {
            let pixels = &bits[..(width * height) as usize];
            let mask = Mask::from_pixels(pixels, [width, height]).unwrap();
            prop_assert_eq!(mask.to_pixels(), pixels);
            prop_assert_eq!(mask.area(), pixels.iter().filter(|pixel| **pixel).count() as u64);
        }
    }
}
