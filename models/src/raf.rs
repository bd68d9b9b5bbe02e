//! RAF: scores of a detector, corrected by augmented embeddings of its proposals. Kim et al. 2024 (RALF, sections 9 and 10 of its
//! specification).
//!
//! A proposal is cut out of the network's input, put into a square, encoded by CLIP and augmented ([`crate::augmenter`]); `z` are its
//! cosines to the classes. This module has what comes before CLIP and what comes after `z`.
//!
//! Difference from the reference: one embedding for all boxes of an image (its `raf_box_level` false), which no published number uses, is
//! not built.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Result, detection::boxes::ImageSize, error::ensure};

/// What turns a colour that is normalised as detectors do it into one normalised as CLIP does it, `x a + b` for red, green and blue: with
/// mean (123.675, 116.28, 103.53) and deviation (58.395, 57.12, 57.375) on one side, CLIP's on the other.
const TO_CLIP: [[f64; 3]; 2] = [[0.852_475, 0.857_244, 0.815_876], [0.013_198, -0.006_994, -0.008_016]];
/// The gate subtracts this from the sigmoid of a cosine.
const GATE_OFFSET: f64 = 0.25;
/// The gate of a class that is not kept: sigmoid(0) less the offset.
const CLOSED_GATE: f32 = 0.25;

/// How scores and cosines become scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fusion {
    /// `score * (sigmoid(z) - 0.25)`: DetPro's.
    #[default]
    Gate,
    /// `softmax(log p + z)` over classes and background: OADP's.
    Softmax,
    /// `sigmoid(logit) + sigmoid(z)`: Object-Centric's. Every score is above 0.5, so that no threshold below drops any.
    Sum,
}

/// Whether background may be among the kept classes of a proposal. (Defect 29.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Background {
    /// It may, as in the reference.
    #[default]
    Reference,
    /// It never is: the kept ones are classes.
    Excluded,
}

/// The least score of a detection after a gate, which makes all scores smaller. (Defect 30.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Threshold {
    /// It stays, as in the reference: detections of low score vanish.
    #[default]
    Reference,
    /// It is multiplied by 0.25, the gate of a class that is not kept.
    Scaled,
}

/// How cosines correct scores. The defaults are those for DetPro on LVIS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// The classes of each proposal, those with the largest products, whose products are used; those of others are taken as 0. A product is
    /// that of the augmented embedding and the class embedding as it is: a cosine where that has unit length. OADP has 1 on COCO and 10 on
    /// LVIS, Object-Centric 1 and 20.
    pub top_k: usize,
    /// How scores and cosines become scores.
    pub fusion: Fusion,
    /// Whether background may be among the kept classes.
    pub background: Background,
    /// The least score of a detection after a gate.
    pub threshold: Threshold,
}

impl Default for Rule {
    fn default() -> Self {
        Self { top_k: 20, fusion: Fusion::Gate, background: Background::Reference, threshold: Threshold::Reference }
    }
}

impl Rule {
    /// The cosines of each row's kept classes, and 0 for others. `z`: `[N, K + 1]`, the last column is background.
    pub fn kept(&self, z: &Tensor) -> Result<Tensor> {
        ensure(matches!(z.size()[..], [_, columns] if columns > 0), "cosines of proposals", "[N, K + 1]", z)?;
        let columns = z.size()[1];
        let candidates = match self.background {
            Background::Reference => columns,
            Background::Excluded => columns - 1,
        };
        let n = i64::try_from(self.top_k).unwrap_or(i64::MAX).min(candidates);
        let (cosines, places) = z.narrow(1, 0, candidates).topk(n, 1, true, false);
        Ok(z.zeros_like().scatter(1, &places, &cosines))
    }

    /// The corrected scores, `[N, K + 1]`.
    ///
    /// `scores`: of the detector, `[N, K + 1]`, background last; for [`Fusion::Sum`] its logits. `z`: cosines of the augmented embeddings
    /// to the classes and to background, `[N, K + 1]`.
    pub fn fuse(&self, scores: &Tensor, z: &Tensor) -> Result<Tensor> {
        ensure(scores.size() == z.size(), "cosines of proposals", &format!("{:?}, as scores", scores.size()), z)?;
        let z = self.kept(z)?;
        Ok(match self.fusion {
            Fusion::Gate => scores * (z.sigmoid() - GATE_OFFSET),
            Fusion::Softmax => (scores.log() + z).softmax(-1, scores.kind()),
            Fusion::Sum => scores.sigmoid() + z.sigmoid(),
        })
    }

    /// The least corrected score of a detection, where that of a score is `threshold`.
    pub fn threshold(&self, threshold: f32) -> f32 {
        match (self.fusion, self.threshold) {
            (Fusion::Gate, Threshold::Scaled) => threshold * CLOSED_GATE,
            (Fusion::Gate, Threshold::Reference) | (Fusion::Softmax | Fusion::Sum, _) => threshold,
        }
    }
}

/// How the colours that CLIP sees are normalised. (Defect 28.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Normalisation {
    /// As the detector's, as in the reference.
    #[default]
    Reference,
    /// As CLIP's.
    Clip,
}

/// How crops are made smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Antialias {
    /// Pixels in between are left out, as in the reference.
    #[default]
    Off,
    /// Every pixel counts.
    On,
}

/// How proposals become pictures for CLIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CropRule {
    /// How colours are normalised.
    pub normalisation: Normalisation,
    /// How crops are made smaller.
    pub antialias: Antialias,
}

impl CropRule {
    /// A picture as a square, f32 `[3, side, side]`, as large as fits, in the middle between bars of zeros.
    ///
    /// `picture`: f32 `[3, h, w]`, h and w at least 1, normalised as the detector's input.
    pub fn square(&self, picture: &Tensor, side: i64) -> Result<Tensor> {
        ensure(
            matches!(picture.size()[..], [3, height, width] if height > 0 && width > 0),
            "picture",
            "[3, h, w], at least one pixel",
            picture,
        )?;
        let picture = match self.normalisation {
            Normalisation::Reference => picture.shallow_clone(),
            Normalisation::Clip => {
                let [factor, summand] =
                    TO_CLIP.map(|of_colours| Tensor::from_slice(&of_colours.map(|number| number as f32)).view([3, 1, 1]));
                picture * factor + summand
            }
        };
        Ok(Letterbox::of([picture.size()[1], picture.size()[2]], side).apply(&picture, self.antialias))
    }
}

/// A picture in a square: as large as fits, in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Letterbox {
    height: i64,
    width: i64,
    /// Rows and columns around it.
    top: i64,
    bottom: i64,
    left: i64,
    right: i64,
}

impl Letterbox {
    /// `size_hw`: of the picture, px, at least 1.
    fn of(size_hw: [i64; 2], side: i64) -> Self {
        let longer = size_hw[0].max(size_hw[1]) as f64;
        let [height, width] = size_hw.map(|length| (length as f64 / longer * side as f64).ceil() as i64);
        let (top, left) = ((side - height) / 2, (side - width) / 2);
        Self { height, width, top, bottom: side - height - top, left, right: side - width - left }
    }

    /// `picture`: `[C, h, w]`. Bilinear, half-pixel centres.
    fn apply(&self, picture: &Tensor, antialias: Antialias) -> Tensor {
        let (picture, size) = (picture.unsqueeze(0), [self.height, self.width]);
        let resized = match antialias {
            Antialias::Off => picture.upsample_bilinear2d(size, false, None, None),
            Antialias::On => picture.internal_upsample_bilinear2d_aa(size, false, None, None),
        };
        resized.squeeze_dim(0).constant_pad_nd([self.left, self.right, self.top, self.bottom])
    }
}

/// A box `[x1, y1, x2, y2]` px, none of them NaN, as whole pixels of an image without padding, at least one wide and one high. (Section 9.)
pub fn whole_pixels([x1, y1, x2, y2]: [f32; 4], size: ImageSize) -> [i64; 4] {
    let cut = |corner: f32, most: i64| corner.clamp(0.0, most as f32) as i64;
    let [x1, x2] = at_least_one(cut(x1, size.width), cut(x2, size.width));
    let [y1, y2] = at_least_one(cut(y1, size.height), cut(y2, size.height));
    [x1, y1, x2, y2]
}

/// A side of at least a pixel, by moving its beginning, or its end where it begins in the first pixel.
fn at_least_one(begin: i64, end: i64) -> [i64; 2] {
    match (end > begin, begin > 0) {
        (true, _) => [begin, end],
        (false, true) => [begin - 1, end.max(begin)],
        (false, false) => [begin, begin + 1],
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        detection::boxes::corners,
        golden::{detpro_ralf, error},
    };

    fn matrix(numbers: &[f32], columns: i64) -> Tensor {
        Tensor::from_slice(numbers).view([-1, columns])
    }

    fn integers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.to_kind(Kind::Int64).view(-1)).unwrap()
    }

    const GATE: Rule = Rule { top_k: 2, fusion: Fusion::Gate, background: Background::Reference, threshold: Threshold::Reference };

    /// Scores of classes and background by RALF's own code, before and after the gate.
    #[test]
    fn gated_scores_are_those_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let rule = Rule { top_k: integers(&golden["raf/top_k"])[0] as usize, ..Rule::default() };
        let found = rule.fuse(&golden["raf/score_without"], &golden["raf/z"]).unwrap();
        // Most scores are far below 1.
        let apart = (&found - &golden["raf/score"]).abs() / (&golden["raf/score"] + 1e-6);
        assert!(apart.max().double_value(&[]) < 1e-4);
    }

    /// Both other fusions, with the cosines that are kept, by RALF's own code.
    #[test]
    fn other_fusions_are_those_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let rule = Rule { top_k: integers(&golden["oadp/top_k"])[0] as usize, fusion: Fusion::Softmax, ..Rule::default() };
        assert!(error(&rule.kept(&golden["oadp/z"]).unwrap(), &golden["oadp/z_masked"]) < 1e-6);
        assert!(error(&rule.fuse(&golden["oadp/prob"], &golden["oadp/z"]).unwrap(), &golden["oadp/fused"]) < 1e-4);
        // Here only masked cosines are known: all of them are kept.
        let rule = Rule { top_k: 5, fusion: Fusion::Sum, ..Rule::default() };
        assert!(error(&rule.fuse(&golden["centric/logits"], &golden["centric/z_masked"]).unwrap(), &golden["centric/probs"]) < 1e-4);
    }

    /// Parity check 20 of the specification.
    #[test]
    fn the_gate_has_the_values_of_the_specification() {
        let z = matrix(&[0.31, 0.24, 0.28, 0.05, -0.10, 0.29], 6);
        let factors = |rule: Rule| rule.fuse(&Tensor::ones([1, 6], (Kind::Float, Device::Cpu)), &z).unwrap();
        let expected = matrix(&[0.326_885, 0.25, 0.25, 0.25, 0.25, 0.321_996], 6);
        assert!(error(&factors(GATE), &expected) < 1e-6);
        let excluded = Rule { background: Background::Excluded, ..GATE };
        assert!(error(&factors(excluded), &matrix(&[0.326_885, 0.25, 0.319_546, 0.25, 0.25, 0.25], 6)) < 1e-6);
        let scores = GATE.fuse(&matrix(&[0.5, 0.2, 0.004, 0.0003, 0.1, 0.0], 6), &z).unwrap();
        assert!(error(&scores, &matrix(&[0.163_443, 0.05, 0.001, 0.000_075, 0.025, 0.0], 6)) < 1e-6);
        let n_above = |rule: Rule| integers(&scores.gt(f64::from(rule.threshold(1e-4))).sum(Kind::Int64))[0];
        assert_eq!([n_above(GATE), n_above(Rule { threshold: Threshold::Scaled, ..GATE })], [4, 5]);
        let many = Rule { top_k: usize::MAX, ..excluded };
        assert!(error(&many.kept(&z).unwrap(), &matrix(&[0.31, 0.24, 0.28, 0.05, -0.10, 0.0], 6)) < 1e-7);
    }

    /// Parity check 21 of the specification.
    #[test]
    fn other_fusions_have_the_values_of_the_specification() {
        let (z, rule) = (matrix(&[0.31, 0.0, 0.0], 3), |fusion| Rule { fusion, ..GATE });
        let found = rule(Fusion::Softmax).fuse(&matrix(&[0.6, 0.3, 0.1], 3), &z).unwrap();
        assert!(error(&found, &matrix(&[0.671_608, 0.246_294, 0.082_098], 3)) < 1e-6);
        let found = rule(Fusion::Sum).fuse(&matrix(&[-4.0, -1.0, 2.0], 3), &z).unwrap();
        assert!(error(&found, &matrix(&[0.594_871, 0.768_941, 1.380_797], 3)) < 1e-6);
    }

    /// Sizes of pictures and of their bars by RALF's own code, and parity check 19.
    #[test]
    fn squares_are_laid_out_as_by_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let (sizes, geometry) = (integers(&golden["letterbox/geometry_hw"]), integers(&golden["letterbox/geometry"]));
        let expected = geometry.as_chunks::<6>().0;
        assert_eq!((sizes.len(), expected.len()), (50, 25));
        let numbers = |size: &[i64; 2]| {
            let Letterbox { height, width, top, bottom, left, right } = Letterbox::of(*size, 224);
            [height, width, top, bottom, left, right]
        };
        for (size, expected) in sizes.as_chunks::<2>().0.iter().zip(expected) {
            assert_eq!(numbers(size), *expected, "{size:?}");
        }
        assert_eq!(numbers(&[50, 100]), [112, 224, 56, 56, 0, 0]);
        assert_eq!(numbers(&[100, 30]), [224, 68, 0, 0, 78, 78]);
        assert_eq!(numbers(&[1, 300]), [1, 224, 111, 112, 0, 0]);
        assert_eq!(numbers(&[97, 41]), [224, 95, 0, 0, 64, 65]);
    }

    /// Pixels by RALF's own code, and parity check 19.
    #[test]
    fn squares_have_the_pixels_of_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let picture = golden["letterbox/in"].get(0);
        let found = Letterbox::of([23, 41], 32).apply(&picture, Antialias::Off);
        assert!(error(&found, &golden["letterbox/out32"]) < 1e-4);
        let whole = CropRule::default().square(&picture, 32).unwrap();
        assert!(error(&whole, &golden["letterbox/out32"]) < 1e-4);
        let smooth = CropRule { antialias: Antialias::On, ..CropRule::default() }.square(&picture, 32).unwrap();
        assert!(error(&smooth, &whole) > 1e-3);
        let small = Letterbox::of([2, 3], 4).apply(&matrix(&[0., 3., 6., 9., 12., 15.], 3).unsqueeze(0), Antialias::Off);
        let rows = [0., 1.875, 4.125, 6., 4.5, 6.375, 8.625, 10.5, 9., 10.875, 13.125, 15., 0., 0., 0., 0.];
        assert!(error(&small, &matrix(&rows, 4).unsqueeze(0)) < 1e-6);
    }

    /// Parity check 19: a grey of 128, as detectors and as CLIP normalise it.
    #[test]
    fn colours_are_normalised_as_clip_s() {
        let grey = matrix(&[0.074_065, 0.205_182, 0.426_492], 1).view([3, 1, 1]).expand([3, 3, 3], false);
        let square = |normalisation| CropRule { normalisation, ..CropRule::default() }.square(&grey, 6).unwrap();
        let of_pixel = |square: &Tensor| square.select(1, 2).select(1, 2).view([3, 1]);
        assert!(error(&of_pixel(&square(Normalisation::Reference)), &grey.select(1, 0).select(1, 0).view([3, 1])) < 1e-6);
        assert!(error(&of_pixel(&square(Normalisation::Clip)), &matrix(&[0.076_336, 0.168_897, 0.339_949], 1)) < 2e-6);
        let refusal = CropRule::default().square(&grey.narrow(1, 0, 0), 6).unwrap_err().to_string();
        assert!(refusal.starts_with("picture: expected [3, h, w], at least one pixel, found"), "{refusal}");
    }

    /// The rectangles that RALF's own code cuts out of an image of 50 x 60 px.
    #[test]
    fn boxes_are_whole_pixels_as_by_ralf_s_code() {
        let golden = detpro_ralf("ralf");
        let boxes = golden["raf/boxes"].narrow(1, 0, 4);
        let size = ImageSize { width: 50, height: 60 };
        let expected = integers(&golden["raf/crop_xyxy"]);
        let found: Vec<i64> = corners(&boxes, "boxes").unwrap().into_iter().flat_map(|corners| whole_pixels(corners, size)).collect();
        assert_eq!(found, expected);
        assert_eq!(whole_pixels([70.0, 5.0, 80.0, 5.0], size), [49, 4, 50, 5]);
    }
}
