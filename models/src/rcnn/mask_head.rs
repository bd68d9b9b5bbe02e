//! The mask head (Mask R-CNN, section 3): its network, its training targets and its loss.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use super::regions::Pyramid;
use crate::{
    Error, Phase, Result,
    detection::{
        Detections,
        boxes::{Corners, Kept, boxes_tensor, corners},
        layers::{ConvModule, sum_over},
        roi_align::{Alignment, Level, RoiAlign, Sampling},
    },
    error::ensure,
    layers::{Conv, ConvShape},
    parameters::{Init, Parameters},
};

/// A mask head, and how its regions are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskConfig {
    /// How its regions are pooled.
    pub pool: RoiAlign,
    /// The head.
    pub head: MaskHeadConfig,
}

impl MaskConfig {
    pub(super) fn sizes(&self) -> [(&'static str, i64); 3] {
        [("mask pool.side", self.pool.side), ("mask head.channels", self.head.channels), ("mask head.n_masks", self.head.n_masks)]
    }
}

/// The configuration of a [`MaskHead`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskHeadConfig {
    /// 3 x 3 convolutions with ReLU.
    pub n_convs: usize,
    /// Their channels.
    pub channels: i64,
    /// The masks of a region: 1 for all classes, or one for each class.
    pub n_masks: i64,
}

/// Predicts the mask of a region, at twice the side of the pooled features (Mask R-CNN, figure 4).
#[derive(Debug)]
pub struct MaskHead {
    convs: Vec<ConvModule>,
    upsample: Upsample,
    conv_logits: Conv,
    channels: i64,
    n_masks: i64,
}

/// A transposed convolution of kernel 2 and stride 2.
#[derive(Debug)]
struct Upsample {
    /// `[in, out, 2, 2]`.
    weight: Tensor,
    bias: Tensor,
}

impl MaskHead {
    pub(crate) fn declare(at: &Parameters<'_>, config: &MaskHeadConfig, channels: i64) -> Self {
        let MaskHeadConfig { n_convs, channels: inner, n_masks } = *config;
        let convs = &(at / "convs");
        let conv = |index| {
            let shape = ConvShape::new(if index == 0 { channels } else { inner }, inner, 3);
            ConvModule::plain(&(convs / index), shape, shape.kaiming())
        };
        let upsample = &(at / "upsample");
        let logits = ConvShape::new(inner, n_masks, 1);
        Self {
            convs: (0..n_convs).map(conv).collect(),
            upsample: Upsample {
                weight: upsample.trainable("weight", &[inner, inner, 2, 2], Init::fan_out(4 * inner)),
                bias: upsample.trainable("bias", &[inner], Init::Constant(0.0)),
            },
            conv_logits: Conv::with_bias(&(at / "conv_logits"), logits, logits.kaiming()),
            channels,
            n_masks,
        }
    }

    /// Returns logits f32 `[N, 2 side, 2 side]` of one mask for each region.
    ///
    /// `pooled`: `[N, C, side, side]`; `classes`: the class of each region, which does not matter if there is one mask for all.
    pub fn forward(&self, pooled: &Tensor, classes: &[i64]) -> Result<Tensor> {
        let fits = matches!(pooled.size()[..], [n, c, _, _] if n == classes.len() as i64 && c == self.channels);
        ensure(fits, "pooled features", &format!("[{}, {}, side, side]", classes.len(), self.channels), pooled)?;
        let n_masks = self.n_masks;
        if n_masks > 1
            && let Some(class) = classes.iter().find(|class| !(0..n_masks).contains(class))
        {
            return Err(Error::Input { what: "classes of masks", expected: format!("0 to {}", n_masks - 1), found: class.to_string() });
        }
        let maps = self.convs.iter().fold(pooled.shallow_clone(), |x, conv| conv.forward(&x, Phase::Test).relu());
        let Upsample { weight, bias } = &self.upsample;
        let [weight, bias] = [weight, bias].map(|tensor| tensor.to_kind(maps.kind()));
        let maps = maps.conv_transpose2d(&weight, Some(&bias), 2, 0, 0, 1, 1).relu();
        // [N, masks, 2 side, 2 side].
        let logits = self.conv_logits.forward(&maps).to_kind(Kind::Float);
        let (n, side) = (logits.size()[0], logits.size()[2]);
        let column: Vec<i64> = classes.iter().map(|&class| if n_masks > 1 { class } else { 0 }).collect();
        let column = Tensor::from_slice(&column).to_device(logits.device()).reshape([n, 1, 1, 1]).expand([n, 1, side, side], false);
        Ok(logits.gather(1, &column, false).squeeze_dim(1))
    }
}

/// The cross entropy of mask logits `[N, side, side]` with `targets` of the same shape, from 0 to 1: its mean, and 0 where there are none.
pub fn mask_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    ensure(targets.size() == logits.size(), "mask targets", &format!("{:?}", logits.size()), targets)?;
    let targets = targets.to_device(logits.device()).to_kind(Kind::Float);
    let entropy = logits.binary_cross_entropy_with_logits(&targets, None::<&Tensor>, None::<&Tensor>, Reduction::None);
    Ok(sum_over(&entropy, entropy.numel()))
}

/// Where an object is in its image.
#[derive(Debug)]
pub struct ObjectMask {
    /// u8 `[h, w]`, not 0 where the object is: a part of the image that holds all of it and at least 2 px around it, except where the image
    /// ends. RoIAlign goes on with the last px for one px beyond a border, and with 0 from there, so that such a part is as good as the whole.
    pub pixels: Tensor,
    /// The part's first column, px of the image.
    pub left: i64,
    /// The part's first row, px of the image.
    pub top: i64,
}

/// The target of a mask head within a box.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRule {
    /// Where the px of a mask lie.
    pub alignment: Alignment,
    /// A cell is 1 if the object covers at least this share of it, else 0; `None`: the share itself.
    pub threshold: Option<f64>,
}

impl MaskRule {
    /// mmdet's.
    pub const MMDET: Self = Self { alignment: Alignment::Centre, threshold: Some(0.5) };
    /// torchvision's.
    pub const TORCHVISION: Self = Self { alignment: Alignment::Corner, threshold: None };

    /// The masks of objects within boxes, by RoIAlign: f32 `[N, side, side]`, from 0 to 1.
    ///
    /// `masks`: of the objects of one image; `boxes`: `[N, 4]`, px of that image; `objects`: for each box which mask it is.
    pub fn targets(&self, masks: &[ObjectMask], boxes: &Tensor, objects: &[usize], side: i64) -> Result<Tensor> {
        if let Some(object) = objects.iter().find(|&&object| object >= masks.len()) {
            let expected = format!("indices of {} masks", masks.len());
            return Err(Error::Input { what: "objects of masks", expected, found: object.to_string() });
        }
        for ObjectMask { pixels, .. } in masks {
            let fits = pixels.kind() == Kind::Uint8 && matches!(pixels.size()[..], [h, w] if h > 0 && w > 0);
            ensure(fits, "pixels of a mask", "u8 [h, w], both at least 1", pixels)?;
        }
        let boxes = corners(boxes, "boxes of masks")?;
        if boxes.len() != objects.len() {
            let expected = format!("as many as objects, {}", objects.len());
            return Err(Error::Input { what: "boxes of masks", expected, found: boxes.len().to_string() });
        }
        if boxes.is_empty() {
            return Ok(Tensor::zeros([0, side, side], (Kind::Float, Device::Cpu)));
        }
        let mut rows_of = BTreeMap::<usize, Vec<usize>>::new();
        for (row, &object) in objects.iter().enumerate() {
            rows_of.entry(object).or_default().push(row);
        }
        let pool = RoiAlign { side, sampling: Sampling::Adaptive, alignment: self.alignment, finest_scale: 56.0 };
        let mut places = vec![0_i64; boxes.len()];
        let (mut shares, mut n_done) = (vec![], 0);
        for (object, rows) in rows_of {
            let ObjectMask { pixels, left, top } = &masks[object];
            let shares_of = pixels.to_device(Device::Cpu).ne(0).to_kind(Kind::Float).view([1, 1, pixels.size()[0], pixels.size()[1]]);
            let [left, top] = [left, top].map(|&first| first as f32);
            let within = |[x1, y1, x2, y2]: Corners| [x1 - left, y1 - top, x2 - left, y2 - top];
            let boxes = boxes_tensor(&rows.iter().map(|&row| within(boxes[row])).collect::<Vec<_>>());
            shares.push(pool.forward(&[Level { features: &shares_of, stride: 1 }], &[boxes])?);
            for row in rows {
                places[row] = n_done;
                n_done += 1;
            }
        }
        let shares = Tensor::cat(&shares, 0).index_select(0, &Tensor::from_slice(&places)).squeeze_dim(1);
        Ok(match self.threshold {
            Some(threshold) => shares.ge(threshold).to_kind(Kind::Float),
            None => shares,
        })
    }
}

/// Draws the mask of every detection, where there is a head for it.
pub(super) fn with_masks(kept: Vec<Kept>, pyramid: &Pyramid, head: Option<(&MaskHead, &RoiAlign)>) -> Result<Vec<Detections>> {
    let Some((head, pool)) = head else { return Ok(kept.into_iter().map(|kept| Detections { kept, masks: None }).collect()) };
    let pooled = pyramid.pool(pool, &kept.iter().map(|kept| kept.boxes.shallow_clone()).collect::<Vec<_>>())?;
    let classes: Vec<i64> = kept.iter().flat_map(|kept| &kept.classes).copied().collect();
    let counts: Vec<i64> = kept.iter().map(|kept| kept.rows.len() as i64).collect();
    let masks = head.forward(&pooled, &classes)?.split_with_sizes(counts, 0);
    Ok(kept.into_iter().zip(masks).map(|(kept, masks)| Detections { kept, masks: Some(masks) }).collect())
}
