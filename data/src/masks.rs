//! Masks: which pixels of an image belong to an object.
//!
//! COCO keeps them as polygons or as run lengths, plain or packed into text, column by column; outside this module pixels run
//! row by row, and sizes are `[width, height]`. The run length arithmetic is `hotcoco`'s, which is pycocotools' own.

use hotcoco::{Rle, mask};

pub use hotcoco::Segmentation;

use crate::boxes::{Xyxy, xywh_to_xyxy};

/// The pixels of an object in an image of a known size.
#[derive(Debug, Clone, PartialEq)]
pub struct Mask {
    rle: Rle,
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

    /// The mask of given pixels, `[H, W]`. Fails when there are more or fewer than the size says.
    pub fn from_pixels(pixels: &[bool], [width, height]: [u32; 2]) -> Result<Self, String> {
        let (n_columns, n_rows) = (width as usize, height as usize);
        if n_columns.checked_mul(n_rows) != Some(pixels.len()) {
            return Err(format!("expected {width} x {height} pixels, found {}", pixels.len()));
        }
        let columns: Vec<u8> = (0..n_columns).flat_map(|x| (0..n_rows).map(move |y| u8::from(pixels[y * n_columns + x]))).collect();
        mask::encode(&columns, height, width).map(|rle| Self { rle }).map_err(|error| error.to_string())
    }

    /// Every pixel of the image, `[H, W]`.
    pub fn to_pixels(&self) -> Vec<bool> {
        let (n_columns, n_rows) = (self.rle.w as usize, self.rle.h as usize);
        let columns = mask::decode(&self.rle);
        (0..n_rows).flat_map(|y| (0..n_columns).map(move |x| (x, y))).map(|(x, y)| columns[x * n_rows + y] != 0).collect()
    }

    /// As COCO json holds it: run lengths packed into text.
    pub fn to_segmentation(&self) -> Segmentation {
        Segmentation::CompressedRle { size: [self.rle.h, self.rle.w], counts: mask::rle_to_string(&self.rle) }
    }

    /// Size of the image, `[width, height]`.
    pub fn size(&self) -> [u32; 2] {
        [self.rle.w, self.rle.h]
    }

    /// How many pixels there are.
    pub fn area(&self) -> u64 {
        mask::area(&self.rle)
    }

    /// The smallest box around the pixels; `None` where there are none.
    pub fn bounds(&self) -> Option<Xyxy> {
        (self.area() > 0).then(|| xywh_to_xyxy(mask::to_bbox(&self.rle)))
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
