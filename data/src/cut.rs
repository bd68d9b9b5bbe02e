//! How training images are shown to DETR's descendants: mirrored or not, maybe resized and cut, and resized. (CORA, section 2.2.)
//!
//! Differences from the reference: this module uses no random numbers, the training loop draws each [`View`].

use crate::{boxes::Xyxy, images::Image, training::Placement};

/// A part of a resized image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cut {
    /// `[width, height]` px of the image before it is cut.
    pub resized: [u32; 2],
    /// Left, top, width, height, px, inside that.
    pub window: [u32; 4],
}

/// How an image is shown: as a whole, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Of the whole image, before it is cut.
    whole: Placement,
    cut: Option<[u32; 4]>,
    /// Of what was cut, or of the whole.
    last: Placement,
}

impl View {
    /// An image of `from` px, mirrored or not, of which `cut` is shown, or all of it, with a shorter side of `shorter` and a longer one of at most `longer` px.
    ///
    /// # Panics
    ///
    /// If the window is empty or leaves the resized image.
    pub fn new(from: [u32; 2], is_mirrored: bool, cut: Option<Cut>, longer: u32, shorter: u32) -> Self {
        let to = cut.map_or(from, |cut| cut.resized);
        let whole = Placement { to, is_mirrored, ..Placement::shorter(from, None, from[0].min(from[1])) };
        let cut = cut.map(|Cut { resized, window: [left, top, width, height] }| {
            assert!(width > 0 && height > 0 && left + width <= resized[0] && top + height <= resized[1], "BUG: a window outside");
            [left, top, width, height]
        });
        let size = cut.map_or(from, |[_, _, width, height]| [width, height]);
        Self { whole, cut, last: Placement::shorter(size, Some(longer), shorter) }
    }

    /// `[width, height]` px of what is shown.
    pub fn to(&self) -> [u32; 2] {
        self.last.to
    }

    /// Whether left is right.
    pub fn is_mirrored(&self) -> bool {
        self.whole.is_mirrored
    }

    /// The part of a box of the image that is shown, px of what is shown; none where nothing of it is.
    pub fn show(&self, xyxy: &Xyxy) -> Option<Xyxy> {
        let mut shown = self.whole.show(xyxy);
        if let Some([left, top, width, height]) = self.cut {
            let [left, top] = [left, top].map(|side| side as f32);
            shown = Xyxy { x1: shown.x1 - left, y1: shown.y1 - top, x2: shown.x2 - left, y2: shown.y2 - top }.clipped([width, height]);
        }
        (shown.x2 > shown.x1 && shown.y2 > shown.y1).then(|| self.last.show(&shown))
    }

    /// What is shown, packed RGB.
    pub fn pixels(&self, image: &Image) -> Image {
        let whole = self.whole.pixels(image);
        match self.cut.map(|window| window.map(i64::from)) {
            Some([left, top, width, height]) => self.last.pixels(&whole.crop([left, top, left + width, top + height])),
            None => self.last.pixels(&whole),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use super::*;

    /// The arrays of `tests/golden/cora/make.py`, row by row.
    fn golden() -> BTreeMap<String, Vec<f64>> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/transforms.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn image(golden: &BTreeMap<String, Vec<f64>>, name: &str) -> Image {
        let shape = &golden[&format!("{name}.shape")];
        let rgb = golden[name].iter().map(|level| *level as u8).collect();
        Image { width: shape[1] as u32, height: shape[0] as u32, rgb }
    }

    fn boxes(golden: &BTreeMap<String, Vec<f64>>, name: &str) -> Vec<Xyxy> {
        golden[name].as_chunks::<4>().0.iter().map(|corners| Xyxy::from(corners.map(|corner| corner as f32))).collect()
    }

    fn corners(xyxy: &Xyxy) -> [f32; 4] {
        [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]
    }

    fn assert_close(found: &[Xyxy], expected: &[Xyxy]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(corners(found).iter().zip(corners(expected)).all(|(one, other)| (one - other).abs() < 1e-5), "{found:?} {expected:?}");
        }
    }

    /// S1 of CORA's specification.
    #[test]
    fn sizes_are_those_of_cora() {
        let rows = golden()["size_rule_w_h_short_max_neww_newh"].as_chunks::<6>().0.to_vec();
        assert_eq!(rows.len(), 60);
        for row in rows {
            let [width, height, shorter, longer, to_width, to_height] = row.map(|side| side as u32);
            let longer = (longer > 0).then_some(longer);
            assert_eq!(Placement::shorter([width, height], longer, shorter).to, [to_width, to_height], "{row:?}");
        }
        let to = |from| Placement::shorter(from, Some(1333), 800).to;
        assert_eq!([to([640, 480]), to([640, 427]), to([427, 640])], [[1066, 800], [1199, 800], [800, 1199]]);
        assert_eq!([to([500, 281]), to([640, 240])], [[1332, 749], [1333, 500]]);
    }

    /// Pixels to the last bit.
    #[test]
    fn images_are_resized_mirrored_and_cut_as_by_cora_s_code() {
        let golden = golden();
        for name in ["up", "down", "capped", "same"] {
            let [image, expected] = ["image", "resized"].map(|what| image(&golden, &format!("{name}.{what}")));
            let [shorter, longer] = [0, 1].map(|place| golden[&format!("{name}.short_max")][place] as u32);
            let view = View::new([image.width, image.height], false, None, longer, shorter);
            assert_eq!(view.pixels(&image), expected, "{name}");
            let found: Vec<Xyxy> = boxes(&golden, &format!("{name}.boxes")).iter().filter_map(|xyxy| view.show(xyxy)).collect();
            assert_close(&found, &boxes(&golden, &format!("{name}.resized_boxes")));
        }
        let flipped = image(&golden, "flip.image");
        let size = [flipped.width, flipped.height];
        let view = View::new(size, true, None, 1000, size[0].min(size[1]));
        assert_eq!(view.pixels(&flipped), image(&golden, "flip.flipped"));
        let found: Vec<Xyxy> = boxes(&golden, "flip.boxes").iter().filter_map(|xyxy| view.show(xyxy)).collect();
        assert_close(&found, &boxes(&golden, "flip.flipped_boxes"));
        let whole = image(&golden, "crop.image");
        let [top, left, height, width] = [0, 1, 2, 3].map(|place| golden["crop.top_left_h_w"][place] as u32);
        let cut = Cut { resized: [whole.width, whole.height], window: [left, top, width, height] };
        let view = View::new(cut.resized, false, Some(cut), 1000, width.min(height));
        assert_eq!(view.pixels(&whole), image(&golden, "crop.cropped"));
        let found: Vec<Option<Xyxy>> = boxes(&golden, "crop.boxes").iter().map(|xyxy| view.show(xyxy)).collect();
        let kept: Vec<f64> = (0_u8..).zip(&found).filter(|(_, found)| found.is_some()).map(|(place, _)| f64::from(place)).collect();
        assert_eq!(kept, golden["crop.kept_labels"]);
        assert_close(&found.into_iter().flatten().collect::<Vec<_>>(), &boxes(&golden, "crop.kept_boxes"));
    }
}
