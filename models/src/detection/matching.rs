//! Matching of boxes to objects in training, and sampling of the matches.
//!
//! Plain loops on the CPU: the choice depends on boxes and the generator alone, not on a device or on threads.

use rand_chacha::{ChaCha8Rng, rand_core::RngCore};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::boxes::{Corners, corners, iou, share_within};
use crate::Result;

/// A box with at least this share of its area in a crowd is not background (mmdet's `ignore_iof_thr`, where it is used).
const CROWDED: f32 = 0.5;

/// The annotated objects of an image, px.
#[derive(Debug)]
pub struct Truth {
    /// `[G, 4]`.
    pub objects: Tensor,
    /// `[C, 4]`, crowd regions: boxes within them are not trained as background.
    pub crowds: Tensor,
}

impl From<Tensor> for Truth {
    /// Objects alone.
    fn from(objects: Tensor) -> Self {
        Self { objects, crowds: Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)) }
    }
}

impl Truth {
    /// Changes background boxes within a crowd to ignored ones.
    pub(crate) fn ignore_crowded(&self, boxes: &[Corners], matches: &mut [Match]) -> Result<()> {
        let crowds = corners(&self.crowds, "crowds")?;
        for (found, &inner) in matches.iter_mut().zip(boxes) {
            if *found == Match::Background && crowds.iter().any(|&crowd| share_within(inner, crowd) >= CROWDED) {
                *found = Match::Ignored;
            }
        }
        Ok(())
    }
}

/// The match of a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// The object of this index.
    Object(usize),
    /// No object.
    Background,
    /// Neither: the box is not used in training.
    Ignored,
}

/// Thresholds of intersection over union for matching boxes to objects (mmdet's `MaxIoUAssigner`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assigner {
    /// At least this with an object: it stands for the object it overlaps most.
    pub object_iou: f32,
    /// Less than this with every object: background.
    pub background_iou: f32,
    /// An object also gets the boxes that overlap it most, whatever they overlap more, if that is at least this; none switches it off.
    pub best_of_object_iou: Option<f32>,
}

/// The match of a box that is among the best of an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// The object that it is the best of, the last one of several (mmdet).
    #[default]
    Claimant,
    /// The object that the box overlaps most (torchvision).
    Nearest,
}

impl Assigner {
    /// Matches each of `boxes` to `objects`. If a box is the best of two objects, the later object gets it.
    pub fn assign(&self, boxes: &[Corners], objects: &[Corners]) -> Vec<Match> {
        self.assign_claims(boxes, objects, Claim::Claimant)
    }

    /// The same, with another rule for such boxes.
    pub fn assign_claims(&self, boxes: &[Corners], objects: &[Corners], claim: Claim) -> Vec<Match> {
        let mut best_of_box = vec![(0.0_f32, 0_usize); boxes.len()];
        let mut best_of_object = vec![0.0_f32; objects.len()];
        for (place, &corners) in boxes.iter().enumerate() {
            for (object, &target) in objects.iter().enumerate() {
                let overlap = iou(corners, target);
                if overlap > best_of_box[place].0 {
                    best_of_box[place] = (overlap, object);
                }
                best_of_object[object] = best_of_object[object].max(overlap);
            }
        }
        let mut matches: Vec<Match> = best_of_box
            .iter()
            .map(|&(overlap, object)| match overlap {
                overlap if overlap >= self.object_iou && !objects.is_empty() => Match::Object(object),
                overlap if overlap < self.background_iou => Match::Background,
                _ => Match::Ignored,
            })
            .collect();
        let Some(least) = self.best_of_object_iou else { return matches };
        for (object, &target) in objects.iter().enumerate().filter(|&(object, _)| best_of_object[object] >= least.max(f32::MIN_POSITIVE)) {
            for (place, &corners) in boxes.iter().enumerate() {
                // The same operations on the same numbers: equality is exact.
                if iou(corners, target).total_cmp(&best_of_object[object]).is_eq() {
                    matches[place] = Match::Object(match claim {
                        Claim::Claimant => object,
                        Claim::Nearest => best_of_box[place].1,
                    });
                }
            }
        }
        matches
    }
}

/// The number of boxes of an image that are used in training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampler {
    /// The most boxes per image.
    pub n: usize,
    /// The largest share of matched boxes; background fills the rest.
    pub object_fraction: f64,
    /// The most boxes of background for each matched one, and as many where none matches (mmdet's `neg_pos_ub`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background_per_object: Option<usize>,
}

/// The boxes of an image that are used in training.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Indices of boxes that stand for objects, ascending.
    pub objects: Vec<usize>,
    /// Indices of boxes that are background, ascending.
    pub background: Vec<usize>,
}

impl Sampler {
    /// Samples boxes evenly, matched ones first; the result depends only on `rng`.
    pub fn draw(&self, matches: &[Match], rng: &mut ChaCha8Rng) -> Sample {
        let places = |wanted: fn(&Match) -> bool| -> Vec<usize> {
            matches.iter().enumerate().filter(|(_, found)| wanted(found)).map(|(place, _)| place).collect()
        };
        let n_objects = ((self.n as f64 * self.object_fraction) as usize).min(self.n);
        let objects = some_of(places(|found| matches!(found, Match::Object(_))), n_objects, rng);
        let most = self.background_per_object.map_or(usize::MAX, |n| n.saturating_mul(objects.len().max(1)));
        let background = some_of(places(|found| matches!(found, Match::Background)), (self.n - objects.len()).min(most), rng);
        Sample { objects, background }
    }
}

/// At most `n` of `places`, each set as likely as another; ascending.
pub(crate) fn some_of(mut places: Vec<usize>, n: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    if places.len() > n {
        for place in 0..n {
            let n_left = (places.len() - place) as u128;
            // The upper half of a product is even to 2^-64 times the number of places.
            let step = (u128::from(rng.next_u64()) * n_left) >> 64;
            places.swap(place, place + step as usize);
        }
        places.truncate(n);
        places.sort_unstable();
    }
    places
}
