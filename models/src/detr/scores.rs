//! From objectness and cosines to detections. Section 9 of CORA's specification, steps 2 to 5.
//!
//! A decoded box is classified anew, by [`Regions::exact`](crate::clip::regions::Regions::exact); the class of its anchor plays no part. Its
//! score for a class is the class's probability times its objectness, and one box may be a detection of several classes.
//!
//! Differences from the reference: those of [`Background`], [`Duplicates`] and [`Borders`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    Result,
    detection::boxes::{Corners, ImageSize, Kept, Suppression, boxes_tensor, clip_to_image, corners, cxcywh_to_xyxy, floats, is_floating},
    error::ensure,
};

/// Scores are at least this and at most 1 less this.
const EPS: f64 = 1e-5;
/// A pair of a box and a class is a detection if its score is above this.
const THRESHOLD: f32 = 0.001;
/// Scores are rounded several times on their way to the threshold; an objectness this much below it cannot reach it.
const ROUNDING: f32 = 1e-4;
/// A detection goes if its intersection over union with a better one is more than this.
const IOU: f32 = 0.5;
/// Up to so many pairs torchvision suppresses in one go, with shifted boxes; on a CPU.
const MOST_SHIFTED: usize = 1_000;

/// Whether the background is a class of the softmax over the classes of a box. (Defect 17.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Background {
    /// It is not.
    Fixed,
    /// It is, with a logit of 0, as in the reference: next to nothing at cosines of 0.2, and most of it where all cosines are below 0.
    #[default]
    Reference,
}

/// What happens to detections that overlap a better one of their class. (Defect 27.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Duplicates {
    /// They go; class by class.
    Fixed,
    /// They go, as by torchvision's kernel on a CPU: up to 1,000 pairs of a box and a class, those of class c are moved by c times (the largest
    /// coordinate + 1) and compared with all others, which rounds overlaps; class by class above.
    #[default]
    Reference,
    /// They stay, and so do scores below the threshold: the best pairs of a box and a class. (The reference without `use_nms`.)
    Kept,
}

/// Whether boxes are cut off at the borders of the image. (Defect 24.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Borders {
    /// They are, after duplicates are gone.
    Fixed,
    /// They are not, as in the reference.
    #[default]
    Reference,
}

/// Which pairs of a box and a class are detections. The defaults are the reference's for COCO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// What happens to detections that overlap a better one of their class.
    pub duplicates: Duplicates,
    /// The most detections of an image; 300 on LVIS.
    pub keep: usize,
    /// Whether boxes are cut off at the borders of the image.
    pub borders: Borders,
}

impl Default for Selection {
    fn default() -> Self {
        Self { duplicates: Duplicates::Reference, keep: 100, borders: Borders::Reference }
    }
}

/// The scores of boxes for classes, f32 `[N, C]`, from 1e-5 to 1 - 1e-5.
///
/// `cosines`: `[N, C]` of boxes with the texts of classes; `objectness`: logits `[N]`; `temperature`: what cosines are multiplied by before
/// the softmax, 100 in the reference.
pub fn scores(cosines: &Tensor, objectness: &Tensor, temperature: f64, background: Background) -> Result<Tensor> {
    let fits = matches!(cosines.size()[..], [_, c] if c >= 1) && is_floating(cosines);
    ensure(fits, "cosines of boxes", "floating [N, C], C at least 1", cosines)?;
    let [n, c] = [0, 1].map(|dimension| cosines.size()[dimension]);
    ensure(objectness.size() == [n] && is_floating(objectness), "objectness", &format!("floating [{n}]"), objectness)?;
    let scaled = cosines.to_kind(Kind::Float) * temperature;
    let scaled = match background {
        Background::Fixed => scaled,
        Background::Reference => scaled.constant_pad_nd([0, 1]),
    };
    let probabilities = scaled.softmax(1, Kind::Float).narrow(1, 0, c);
    let objectness = objectness.to_device(cosines.device()).to_kind(Kind::Float);
    Ok(stored_logits(&(probabilities * objectness.sigmoid().unsqueeze(1))).sigmoid())
}

/// The logits as which the reference stores scores.
fn stored_logits(scores: &Tensor) -> Tensor {
    let scores = scores.clamp(0.0, 1.0);
    let rest: Tensor = 1.0 - &scores;
    (scores.clamp_min(EPS) / rest.clamp_min(EPS)).log()
}

impl Selection {
    /// The boxes, of those with `objectness` (logits `[N]`), that may be detections: the others need not be classified.
    ///
    /// A score is at most the sigmoid of the objectness, so that [`Self::detections`] of these boxes alone are those of all.
    pub fn needed(&self, objectness: &Tensor) -> Vec<i64> {
        let may_be = |objectness: f32| match self.duplicates {
            Duplicates::Fixed | Duplicates::Reference => objectness > THRESHOLD * (1.0 - ROUNDING),
            Duplicates::Kept => !objectness.is_nan(),
        };
        (0..).zip(floats(&objectness.sigmoid())).filter(|&(_, objectness)| may_be(objectness)).map(|(index, _)| index).collect()
    }

    /// The detections of one image, best first, xyxy in px of an image of size `image`.
    ///
    /// `boxes`: `[N, 4]`, cxcywh, relative to the image; `scores`: `[N, C]` of [`scores`]. Boxes with any number that is not finite, among their
    /// own or their scores, are none.
    pub fn detections(&self, boxes: &Tensor, scores: &Tensor, image: ImageSize) -> Result<Kept> {
        ensure(matches!(boxes.size()[..], [_, 4]) && is_floating(boxes), "boxes", "floating [N, 4]", boxes)?;
        let n = boxes.size()[0];
        let fits = matches!(scores.size()[..], [rows, c] if rows == n && c >= 1) && is_floating(scores);
        ensure(fits, "scores of boxes", &format!("floating [{n}, C], C at least 1"), scores)?;
        let [boxes, scores] = [boxes, scores].map(|tensor| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float));
        let all = Tensor::cat(&[&boxes, &scores], 1);
        // [N], the indices of rows.
        let finite = all.isfinite().all_dim(1, false).nonzero().view(-1);
        let boxes = cxcywh_to_xyxy(&boxes.index_select(0, &finite));
        let scores = scores.index_select(0, &finite);

        let suppression = Suppression { iou: IOU, keep: self.keep };
        let mut kept = match self.duplicates {
            Duplicates::Fixed => suppression.of_classes(&boxes, &scores, THRESHOLD)?,
            Duplicates::Reference => suppress_shifted(&suppression, &boxes, &scores)?,
            Duplicates::Kept => Suppression { iou: f32::INFINITY, ..suppression }.of_classes(&boxes, &scores, f32::NEG_INFINITY)?,
        };
        let size = [image.width, image.height].map(|px| px as f32);
        kept.boxes *= Tensor::from_slice(&[size, size].concat());
        if self.borders == Borders::Fixed {
            kept.boxes = clip_to_image(&kept.boxes, image);
        }
        for row in &mut kept.rows {
            *row = finite.int64_value(&[*row]);
        }
        Ok(kept)
    }
}

/// Suppression as torchvision does it on a CPU.
fn suppress_shifted(suppression: &Suppression, boxes: &Tensor, scores: &Tensor) -> Result<Kept> {
    let (corners, n_classes) = (corners(boxes, "boxes")?, scores.size()[1] as usize);
    let pairs: Vec<(usize, f32)> = floats(scores).into_iter().enumerate().filter(|&(_, score)| score > THRESHOLD).collect();
    if pairs.len() > MOST_SHIFTED {
        return suppression.of_classes(boxes, scores, THRESHOLD);
    }
    let box_of = |pair: usize| corners[pair / n_classes];
    let most = pairs.iter().flat_map(|&(pair, _)| box_of(pair)).fold(f32::NEG_INFINITY, f32::max);
    let shifted = |&(pair, _): &(usize, f32)| {
        let shift = (pair % n_classes) as f32 * (most + 1.0);
        box_of(pair).map(|corner| corner + shift)
    };
    let shifted: Vec<Corners> = pairs.iter().map(shifted).collect();
    let of_pairs = Tensor::from_slice(&pairs.iter().map(|&(_, score)| score).collect::<Vec<_>>());
    let one_group = Tensor::zeros([pairs.len() as i64], (Kind::Int64, Device::Cpu));
    let kept = suppression.of_groups(&boxes_tensor(&shifted), &of_pairs, &one_group)?;
    let kept: Vec<(usize, f32)> = kept.into_iter().map(|index| pairs[index as usize]).collect();
    Ok(Kept {
        boxes: boxes_tensor(&kept.iter().map(|&(pair, _)| box_of(pair)).collect::<Vec<_>>()),
        rows: kept.iter().map(|&(pair, _)| (pair / n_classes) as i64).collect(),
        classes: kept.iter().map(|&(pair, _)| (pair % n_classes) as i64).collect(),
        scores: kept.iter().map(|&(_, score)| score).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{cora, cora_values, error};

    fn tensor<const N: usize>(rows: &[[f32; N]]) -> Tensor {
        Tensor::from_slice(rows.as_flattened()).view([rows.len() as i64, N as i64])
    }

    #[test]
    fn scores_equal_the_references_and_keep_to_their_floors() {
        let golden = cora("postprocess");
        for case in ["f1", "background_matters", "floors"] {
            let of = |name: &str| &golden[format!("{case}.{name}").as_str()];
            let found = scores(of("cos"), of("obj"), 100.0, Background::Reference).unwrap();
            let difference = error(&found, &of("logit").sigmoid());
            assert!(difference < 1e-6, "{case}: {difference:.1e}");
            let (least, most) = (found.min().double_value(&[]), found.max().double_value(&[]));
            assert!(least > 0.99e-5 && most < 1.0 - 0.9e-5);
        }
        // F1 of the specification.
        let cosines = tensor(&[[0.26, 0.24, 0.20], [0.18, 0.22, 0.215]]);
        let found = scores(&cosines, &Tensor::from_slice(&[0.3_f32, -1.0]), 100.0, Background::Reference).unwrap();
        let expected = tensor(&[[0.504865, 0.068326, 0.001251], [0.003032, 0.165518, 0.100392]]);
        assert!(error(&found, &expected) < 1e-6);
        let expected = tensor(&[[0.019461, -2.612692, -6.682212], [-5.795639, -1.617731, -2.192879]]);
        assert!(error(&stored_logits(&found), &expected) < 2e-5);
    }

    #[test]
    fn without_background_its_mass_goes_to_the_classes() {
        let cosines = tensor(&[[-0.1, -0.12]]);
        let objectness = Tensor::from_slice(&[0.0_f32]);
        let sum = |background| scores(&cosines, &objectness, 100.0, background).unwrap().sum(Kind::Float).double_value(&[]);
        assert!(sum(Background::Reference) < 1e-3);
        assert!((sum(Background::Fixed) - 0.5).abs() < 1e-4);
    }

    #[track_caller]
    fn check(case: &str, selection: &Selection) {
        let golden = cora("postprocess");
        let of = |name: &str| &golden[format!("{case}.{name}").as_str()];
        for (image, size) in (0..).zip(Vec::<Vec<i64>>::try_from(of("sizes")).unwrap()) {
            let size = ImageSize { width: size[1], height: size[0] };
            let kept = selection.detections(&of("boxes").get(image), &of("logit").get(image).sigmoid(), size).unwrap();
            assert_eq!(Tensor::from_slice(&kept.classes), *of(&format!("labels{image}")), "{case}");
            let expected = of(&format!("dets{image}"));
            assert_eq!(kept.boxes.size(), expected.size(), "{case}");
            if !kept.scores.is_empty() {
                assert!(error(&kept.boxes, expected) < 1e-3, "{case}");
                assert!(error(&Tensor::from_slice(&kept.scores), of(&format!("scores{image}"))) < 1e-6, "{case}");
            }
        }
    }

    #[test]
    fn detections_equal_the_references() {
        let selection = Selection::default();
        for case in ["small", "big", "nonfinite", "nothing", "iou_exactly_half", "coordinate_trick_class0", "coordinate_trick_class63"] {
            check(case, &selection);
        }
        check("big_lvis300", &Selection { keep: 300, ..selection });
        check("no_nms", &Selection { duplicates: Duplicates::Kept, ..selection });
    }

    #[test]
    fn a_box_that_is_not_a_number_is_no_detection_and_an_infinite_logit_is_a_score_of_1() {
        let golden = cora("postprocess");
        let [boxes, logits] = ["nonfinite.boxes", "nonfinite.logit"].map(|name| golden[name].get(0));
        let selection = Selection { duplicates: Duplicates::Kept, ..Selection::default() };
        let size = ImageSize { width: 640, height: 480 };
        let kept = selection.detections(&boxes, &logits.sigmoid(), size).unwrap();
        assert!(!kept.rows.contains(&1));
        assert_eq!((kept.rows.len(), kept.rows[0], kept.classes[0], kept.scores[0].to_bits()), (24, 3, 2, 1.0_f32.to_bits()));
        let kept = selection.detections(&boxes, &(logits.sigmoid() / logits.isfinite()), size).unwrap();
        assert!(kept.rows.len() == 18 && !kept.rows.contains(&3));
    }

    #[test]
    fn overlaps_do_not_depend_on_the_class_where_boxes_are_not_moved() {
        let golden = cora("postprocess");
        for (class, n_of_reference) in [(0, 1), (63, 2)] {
            let of = |name: &str| golden[format!("coordinate_trick_class{class}.{name}").as_str()].get(0);
            let n_kept = |duplicates| {
                let selection = Selection { duplicates, ..Selection::default() };
                selection.detections(&of("boxes"), &of("logit").sigmoid(), ImageSize { width: 640, height: 480 }).unwrap().rows.len()
            };
            assert_eq!([n_kept(Duplicates::Reference), n_kept(Duplicates::Fixed)], [n_of_reference, 1]);
        }
        // Above 1,000 pairs the reference works class by class too.
        check("big", &Selection { duplicates: Duplicates::Fixed, ..Selection::default() });
    }

    #[test]
    fn boxes_compete_within_a_class() {
        // F2 of the specification: an intersection over union of 0.906921.
        let boxes = tensor(&[[0.3, 0.3, 0.4, 0.4], [0.31, 0.31, 0.38, 0.42]]);
        let size = ImageSize { width: 100, height: 100 };
        for duplicates in [Duplicates::Fixed, Duplicates::Reference] {
            let selection = Selection { duplicates, ..Selection::default() };
            let same = selection.detections(&boxes, &tensor(&[[0.8, 1e-5], [0.6, 1e-5]]), size).unwrap();
            assert_eq!((same.rows, same.classes), (vec![0], vec![0]));
            let other = selection.detections(&boxes, &tensor(&[[0.8, 1e-5], [1e-5, 0.6]]), size).unwrap();
            assert_eq!((other.rows, other.classes), (vec![0, 1], vec![0, 1]));
        }
    }

    #[test]
    fn boxes_are_cut_off_at_borders_on_request() {
        let boxes = tensor(&[[0.1, 0.9, 0.4, 0.4]]);
        let found = |borders| {
            let selection = Selection { borders, ..Selection::default() };
            selection.detections(&boxes, &tensor(&[[0.8]]), ImageSize { width: 100, height: 50 }).unwrap().boxes
        };
        assert!(error(&found(Borders::Reference), &tensor(&[[-10.0, 35.0, 30.0, 55.0]])) < 1e-4);
        assert!(error(&found(Borders::Fixed), &tensor(&[[0.0, 35.0, 30.0, 50.0]])) < 1e-4);
    }

    #[test]
    fn boxes_that_need_no_classes_are_no_detections() {
        let (n, c) = (400, 5);
        // Many at the threshold, and cosines so far apart that some probabilities are 1.
        let objectness = cora_values("objectness", &[n], 0.01, -6.906_755).index_fill(0, &Tensor::from_slice(&[3_i64, 70]), 2.0);
        let objectness =
            Tensor::cat(&[objectness, cora_values("more", &[n], 3.0, -8.0), Tensor::from_slice(&[f32::NAN, f32::NEG_INFINITY])], 0);
        let n = objectness.size()[0];
        let boxes = Tensor::cat(&[cora_values("centres", &[n, 2], 0.5, 0.5), cora_values("sides", &[n, 2], 0.05, 0.06)], 1);
        let cosines = cora_values("cosines", &[n, c], 0.4, 0.2);
        let image = ImageSize { width: 640, height: 480 };
        for duplicates in [Duplicates::Fixed, Duplicates::Reference, Duplicates::Kept] {
            let selection = Selection { duplicates, keep: 1000, ..Selection::default() };
            let of = |rows: &[i64]| {
                let rows = Tensor::from_slice(rows);
                let [boxes, cosines, objectness] = [&boxes, &cosines, &objectness].map(|tensor| tensor.index_select(0, &rows));
                let scores = scores(&cosines, &objectness, 100.0, Background::Reference).unwrap();
                let kept = selection.detections(&boxes, &scores, image).unwrap();
                let rows = rows.index_select(0, &Tensor::from_slice(&kept.rows));
                (rows, kept.classes, kept.scores, kept.boxes)
            };
            let needed = selection.needed(&objectness);
            match duplicates {
                Duplicates::Kept => assert_eq!(needed.len() as i64, n - 1),
                Duplicates::Fixed | Duplicates::Reference => assert!((100..600).contains(&needed.len()), "{}", needed.len()),
            }
            let all = of(&(0..n).collect::<Vec<_>>());
            assert!(all.1.len() > 100);
            assert_eq!(of(&needed), all);
        }
    }
}
