//! The object localisation network (Kim et al. 2022, "Learning Open-World Object Proposals without Learning to Classify"): proposals whose
//! scores predict how well a box localises an object of any class, not whether it looks like a labelled one.
//!
//! At each cell one anchor; its hidden features are brought to unit length, and give the distances to the four sides of the box and the
//! centerness. A head looks at the boxes again, corrects them, and says their overlap with the object. A score is the geometric mean of both
//! qualities. Names and rules are those of the authors' code, whose unused classifiers (`rpn_cls`, `fc_cls`) are not here.
//!
//! Differences: the authors' code leaves objects that touch the left or the upper border of the image out of the proposals' box loss, by
//! a check that was meant for distances; here they count. There anchors in the padding propose boxes, which nothing has taught them; here not.

use std::{cell::RefCell, collections::BTreeMap};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use super::{
    heads::{RegionRule, Trunk, TrunkConfig, box_regressor},
    regions::{POOL, REGION_CODER, RegionsConfig, pool},
    rpn::Proposals,
};
use crate::{
    Phase, Result,
    detection::{
        anchors::{Anchors, Cells},
        boxes::{Corners, ImageSize, Suppression, boxes_tensor, clip_to_image, corners, integers},
        fpn::{self, FINEST_STRIDE, Fpn, N_LEVELS},
        layers::sum_over,
        matching::{Assigner, Match, Sampler},
        resnet::{self, ResNet, StridePlace},
        roi_align::RoiAlign,
    },
    error::{check_count, check_sizes},
    layers::{Conv, ConvShape, Linear},
    parameters::{Fill, Init, Parameters},
};

/// The configuration of an [`Oln`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The backbone.
    pub backbone: resnet::Config,
    /// The pyramid.
    pub neck: fpn::Config,
    /// One anchor per cell: a single ratio.
    pub anchors: Anchors,
    /// How regions are pooled.
    pub pool: RoiAlign,
    /// The layers before the outputs for the box and its quality.
    pub trunk: TrunkConfig,
}

/// The anchors that train the distances to sides.
const BOXES: Assigner = Assigner { object_iou: 0.7, background_iou: 0.3, best_of_object_iou: Some(0.3) };
const BOX_SAMPLE: Sampler = Sampler { n: 256, object_fraction: 0.5, background_per_object: None };
/// Which anchors centerness is learned at. Background, of centerness 0, fills the sample where there are not enough objects: the paper says
/// otherwise, the code does so.
const CENTRES: Assigner = Assigner { object_iou: 0.3, background_iou: 0.1, best_of_object_iou: Some(0.3) };
const CENTRE_SAMPLE: Sampler = Sampler { n: 256, object_fraction: 1.0, background_per_object: None };
/// The regions that train the head: the sampled ones that match objects.
const REGIONS: RegionRule = RegionRule {
    assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
    sampler: Sampler { n: 512, object_fraction: 0.25, background_per_object: None },
    coder: REGION_CODER,
};
/// The number of the best proposals of each level that go through the head.
const PER_LEVEL: i64 = 2000;
/// The weight of the proposals' box loss.
const BOX_WEIGHT: f64 = 10.0;
/// Overlaps and unions are at least this.
const LEAST_OVERLAP: f64 = 1e-6;

impl Config {
    /// The authors': a ResNet-50 of torchvision's style, a plain pyramid of 256 channels, a head of two layers of 1,024.
    pub fn r50() -> Self {
        let RegionsConfig { backbone, neck, rpn } = RegionsConfig::oadp();
        Self {
            backbone: resnet::Config { stride: StridePlace::Middle, ..backbone },
            neck: fpn::Config { norm: fpn::Norm::Bias, ..neck },
            anchors: Anchors { ratios: vec![1.0], ..rpn.anchors },
            pool: POOL,
            trunk: TrunkConfig { n_convs: 0, n_fcs: 2, width: 1024 },
        }
    }

    /// For images of 128 to 256 px of a toy world, from scratch.
    pub fn toy() -> Self {
        let RegionsConfig { backbone, neck, rpn } = RegionsConfig::toy();
        let trunk = TrunkConfig { n_convs: 0, n_fcs: 2, width: 256 };
        Self { backbone, neck, anchors: Anchors { ratios: vec![1.0], ..rpn.anchors }, pool: RoiAlign { finest_scale: 28.0, ..POOL }, trunk }
    }

    fn check(&self) -> Result<()> {
        let sizes = [("backbone.width", self.backbone.width), ("neck.channels", self.neck.channels), ("pool.side", self.pool.side)];
        check_sizes(sizes.into_iter().chain(self.trunk.sizes()))
    }
}

/// The network.
#[derive(Debug)]
pub struct Oln {
    backbone: ResNet,
    neck: Fpn,
    rpn_conv: Conv,
    rpn_reg: Conv,
    rpn_obj: Conv,
    trunk: Trunk,
    fc_reg: Linear,
    fc_bbox_score: Linear,
    parameters: BTreeMap<String, Tensor>,
    config: Config,
}

/// The predictions for a batch of images, before the head.
struct Seen {
    levels: [Tensor; N_LEVELS],
    /// Of each level, `[B, A, 4]`: from an anchor's centre to the upper, lower, left and right side, in its heights and widths.
    sides: Vec<Tensor>,
    /// Of each level, logits `[B, A]`.
    centerness: Vec<Tensor>,
    /// Of each level.
    anchors: Vec<Vec<Corners>>,
}

/// The losses of the network, f32 scalars.
#[derive(Debug)]
pub struct Losses {
    /// What proposals' overlaps with their objects lack to 1, tenfold.
    pub proposals: Tensor,
    /// The absolute differences of centerness.
    pub centerness: Tensor,
    /// The absolute differences of the head's deltas.
    pub boxes: Tensor,
    /// The absolute errors of the overlaps that the head predicts.
    pub overlaps: Tensor,
}

impl Oln {
    /// Declares the network under `path`, in f32, with first values that depend on `seed` and the parameters' names alone.
    pub fn new(path: &nn::Path<'_>, config: &Config, seed: u64) -> Result<Self> {
        Self::declare(path, config, Fill::Seed(seed))
    }

    /// Declares a network of zeros, which a checkpoint is about to overwrite.
    pub fn blank(path: &nn::Path<'_>, config: &Config) -> Result<Self> {
        Self::declare(path, config, Fill::Blank)
    }

    fn declare(path: &nn::Path<'_>, config: &Config, fill: Fill) -> Result<Self> {
        config.check()?;
        let declared = RefCell::default();
        let root = &Parameters::new(path, fill, &declared);
        let (channels, side, width) = (config.neck.channels, config.pool.side, config.trunk.width);
        let conv = |name: &str, n_out, side| {
            Conv::with_bias(&(&(root / "rpn_head") / name), ConvShape::new(channels, n_out, side), Init::Normal(0.01))
        };
        let head = &(&(root / "roi_head") / "bbox_head");
        let network = Self {
            backbone: ResNet::declare(&(root / "backbone"), &config.backbone),
            neck: Fpn::declare(&(root / "neck"), &config.neck, config.backbone.channels()),
            rpn_conv: conv("rpn_conv", channels, 3),
            rpn_reg: conv("rpn_reg", 4, 1),
            rpn_obj: conv("rpn_obj", 1, 1),
            trunk: Trunk::declare(head, &config.trunk, [channels, side, side]),
            fc_reg: box_regressor(head, width, 4),
            fc_bbox_score: Linear::declare(&(head / "fc_bbox_score"), width, 1, Init::Normal(0.01), Init::Constant(0.0)),
            parameters: BTreeMap::new(),
            config: config.clone(),
        };
        Ok(Self { parameters: declared.into_inner(), ..network })
    }

    /// Every parameter and running statistic by the authors' name; they share memory with the network's.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    fn look(&self, images: &Tensor, phase: Phase) -> Result<Seen> {
        let levels = self.neck.forward(&self.backbone.forward(images, phase)?, phase);
        let (b, batch) = (images.size()[0], [images.size()[2], images.size()[3]]);
        let (mut sides, mut centerness, mut anchors) = (Vec::new(), Vec::new(), Vec::new());
        for (place, level) in levels.iter().enumerate() {
            let hidden = self.rpn_conv.forward(level).relu().to_kind(Kind::Float);
            let hidden = &hidden / hidden.norm_scalaropt_dim(2.0, 1_i64, true).clamp_min(1e-12);
            sides.push(self.rpn_reg.forward(&hidden).permute([0, 2, 3, 1]).reshape([b, -1, 4]));
            centerness.push(self.rpn_obj.forward(&hidden).reshape([b, -1]));
            let cells = Cells { height: level.size()[2], width: level.size()[3], stride: FINEST_STRIDE << place };
            anchors.push(self.config.anchors.of_level(cells, batch));
        }
        Ok(Seen { levels, sides, centerness, anchors })
    }

    /// Looks at regions of each image again: deltas `[N, 4]` and logits of overlaps `[N]`, f32.
    fn look_again(&self, seen: &Seen, regions: &[Tensor], phase: Phase) -> Result<(Tensor, Tensor)> {
        let hidden = self.trunk.forward(&pool(&seen.levels, &self.config.pool, regions)?, phase)?;
        let overlaps = self.fc_bbox_score.forward(&hidden).squeeze_dim(1);
        Ok((self.fc_reg.forward(&hidden).to_kind(Kind::Float), overlaps.to_kind(Kind::Float)))
    }

    /// Makes proposals of images f32 `[B, 3, H, W]`, normalised, H and W at least 32, without gradients. Scores lie in (0, 1).
    ///
    /// `sizes`: of each image, without padding; boxes go whose width or height is below `least_side`, px.
    pub fn propose(&self, images: &Tensor, sizes: &[ImageSize], suppression: &Suppression, least_side: f32) -> Result<Vec<Proposals>> {
        check_count("image sizes", images.size()[0], sizes.len())?;
        tch::no_grad(|| {
            let seen = self.look(images, Phase::Test)?;
            let first = seen.proposals(sizes)?;
            let regions: Vec<Tensor> = first.iter().map(|proposals| proposals.boxes.shallow_clone()).collect();
            let (deltas, overlaps) = self.look_again(&seen, &regions, Phase::Test)?;
            let (deltas, overlaps) = (deltas.to_device(Device::Cpu), overlaps.sigmoid().to_device(Device::Cpu));
            let mut row = 0;
            let proposals = |(Proposals { boxes, scores }, &size): (&Proposals, &ImageSize)| {
                let n = boxes.size()[0];
                let boxes = clip_to_image(&REGION_CODER.decode(boxes, &deltas.narrow(0, row, n))?, size);
                let scores = (scores * overlaps.narrow(0, row, n)).sqrt();
                row += n;
                let sides = boxes.narrow(1, 2, 2) - boxes.narrow(1, 0, 2);
                let is_large = sides.ge(f64::from(least_side)).all_dim(1, false).nonzero().squeeze_dim(1);
                let [boxes, scores] = [boxes, scores].map(|all| all.index_select(0, &is_large));
                let kept = suppression.of_groups(&boxes, &scores, &is_large.zeros_like())?;
                let kept = Tensor::from_slice(&kept);
                Ok(Proposals { boxes: boxes.index_select(0, &kept), scores: scores.index_select(0, &kept) })
            };
            first.iter().zip(sizes).map(proposals).collect()
        })
    }

    /// Computes the losses against the objects of each image; `rng` samples anchors and regions.
    ///
    /// `images`: f32, bf16 or f16 `[B, 3, H, W]`; `sizes`: of each, without padding; `objects`: for each image `[G, 4]`, px.
    pub fn losses(&self, images: &Tensor, sizes: &[ImageSize], objects: &[Tensor], rng: &mut ChaCha8Rng) -> Result<Losses> {
        check_count("image sizes", images.size()[0], sizes.len())?;
        check_count("images with objects", images.size()[0], objects.len())?;
        let seen = self.look(images, Phase::Train)?;
        let (proposals, centerness) = seen.losses(sizes, objects, rng)?;

        let (mut regions, mut expected, mut overlaps, mut n) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (Proposals { boxes, .. }, objects) in tch::no_grad(|| seen.proposals(sizes))?.iter().zip(objects) {
            let labels = Tensor::zeros([objects.size()[0]], (Kind::Int64, Device::Cpu));
            let sample = REGIONS.choose(boxes, &objects.shallow_clone().into(), &labels, 1, rng)?;
            n += sample.labels.size()[0] as usize;
            let on_objects = sample.boxes.narrow(0, 0, sample.objects.len() as i64);
            let targets: Vec<i64> = sample.objects.iter().map(|object| *object as i64).collect();
            overlaps.push(overlaps_of(&on_objects, &objects.index_select(0, &Tensor::from_slice(&targets))));
            expected.push(sample.deltas);
            regions.push(on_objects);
        }
        let (deltas, said) = self.look_again(&seen, &regions, Phase::Train)?;
        let joined = |parts: &[Tensor]| Tensor::cat(parts, 0).to_device(deltas.device());
        Ok(Losses {
            proposals,
            centerness,
            boxes: sum_over(&(&deltas - joined(&expected)).abs(), n),
            overlaps: sum_over(&(said.sigmoid() - joined(&overlaps)).abs(), n),
        })
    }
}

impl Seen {
    /// The best of each level for each image, without suppression: on the CPU, px, within the image, with their centerness.
    ///
    /// Anchors whose centre lies in the padding are left out: training never sees one, and what they say becomes slivers at the image's border.
    fn proposals(&self, sizes: &[ImageSize]) -> Result<Vec<Proposals>> {
        let of_image = |(image, &size): (usize, &ImageSize)| {
            let (mut boxes, mut scores) = (Vec::new(), Vec::new());
            let (width, height) = (2.0 * size.width as f32, 2.0 * size.height as f32);
            for (level, anchors) in self.anchors.iter().enumerate() {
                let is_in_image = |(_, [x1, y1, x2, y2]): &(usize, &Corners)| x1 + x2 < width && y1 + y2 < height;
                let inside: Vec<i64> = anchors.iter().enumerate().filter(is_in_image).map(|(place, _)| place as i64).collect();
                let inside = Tensor::from_slice(&inside).to_device(self.centerness[level].device());
                let logits = self.centerness[level].get(image as i64).index_select(0, &inside);
                let (logits, best) = logits.topk(PER_LEVEL.min(logits.size()[0]), 0, true, true);
                let best = inside.index_select(0, &best);
                let sides = self.sides[level].get(image as i64).index_select(0, &best).to_device(Device::Cpu);
                let anchors: Vec<Corners> = integers(&best).into_iter().map(|place| anchors[place as usize]).collect();
                boxes.push(clip_to_image(&around(&boxes_tensor(&anchors), &sides), size));
                scores.push(logits.sigmoid().to_device(Device::Cpu));
            }
            Ok(Proposals { boxes: Tensor::cat(&boxes, 0), scores: Tensor::cat(&scores, 0) })
        };
        sizes.iter().enumerate().map(of_image).collect()
    }

    /// The losses of proposals and of centerness.
    fn losses(&self, sizes: &[ImageSize], objects: &[Tensor], rng: &mut ChaCha8Rng) -> Result<(Tensor, Tensor)> {
        let all: Vec<Corners> = self.anchors.concat();
        let (mut rows, mut from, mut to, mut n) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let (mut centre_rows, mut expected) = (Vec::new(), Vec::new());
        for (image, (&size, objects)) in sizes.iter().zip(objects).enumerate() {
            let objects = corners(objects, "objects")?;
            let (width, height) = (size.width as f32, size.height as f32);
            let is_inside = |&place: &usize| {
                let [x1, y1, x2, y2] = all[place];
                x1 >= 0.0 && y1 >= 0.0 && x2 < width && y2 < height
            };
            let places: Vec<usize> = (0..all.len()).filter(is_inside).collect();
            let anchors: Vec<Corners> = places.iter().map(|&place| all[place]).collect();
            let row = |place: usize| (image * all.len() + places[place]) as i64;
            let object_of = |matches: &[Match], place: usize| match matches[place] {
                Match::Object(object) => Some(objects[object]),
                Match::Background | Match::Ignored => None,
            };

            let matches = BOXES.assign(&anchors, &objects);
            let sample = BOX_SAMPLE.draw(&matches, rng);
            n += sample.objects.len().max(1) + sample.background.len().max(1);
            for &place in &sample.objects {
                rows.push(row(place));
                from.push(anchors[place]);
                to.extend(object_of(&matches, place));
            }

            let matches = CENTRES.assign(&anchors, &objects);
            let sample = CENTRE_SAMPLE.draw(&matches, rng);
            for &place in sample.objects.iter().chain(&sample.background) {
                centre_rows.push(row(place));
                expected.push(object_of(&matches, place).map_or(0.0, |object| centerness_of(anchors[place], object)));
            }
        }
        let [sides, centerness] = [&self.sides, &self.centerness].map(|levels| Tensor::cat(levels, 1).flatten(0, 1).to_kind(Kind::Float));
        let on_device = |tensor: Tensor| tensor.to_device(sides.device());
        let said = around(&on_device(boxes_tensor(&from)), &sides.index_select(0, &on_device(Tensor::from_slice(&rows))));
        let lacking = 1.0 - overlaps_of(&said, &on_device(boxes_tensor(&to))).clamp_min(LEAST_OVERLAP);
        let said = centerness.index_select(0, &on_device(Tensor::from_slice(&centre_rows))).sigmoid();
        let apart = (said - on_device(Tensor::from_slice(&expected))).abs();
        Ok((sum_over(&lacking, n) * BOX_WEIGHT, sum_over(&apart, n)))
    }
}

/// The boxes `[N, 4]` whose sides lie at distances (upper, lower, left, right; in heights and widths) from the centres of anchors `[N, 4]`.
fn around(anchors: &Tensor, sides: &Tensor) -> Tensor {
    let [x1, y1, x2, y2] = [0, 1, 2, 3].map(|side| anchors.select(1, side));
    let [up, down, left, right] = [0, 1, 2, 3].map(|side| sides.select(1, side).to_kind(Kind::Float));
    let (x, y, width, height) = ((&x1 + &x2) * 0.5, (&y1 + &y2) * 0.5, x2 - x1, y2 - y1);
    Tensor::stack(&[&x - left * &width, &y - up * &height, &x + right * &width, &y + down * &height], 1)
}

/// The centerness of a box centre in an object: 1 at its centre, 0 on its border and beyond (FCOS, equation 3).
fn centerness_of([x1, y1, x2, y2]: Corners, object: Corners) -> f32 {
    let (x, y) = ((x1 + x2) * 0.5, (y1 + y2) * 0.5);
    let [left, up, right, down] = [x - object[0], y - object[1], object[2] - x, object[3] - y];
    if left.min(up).min(right).min(down) <= 0.0 {
        return 0.0;
    }
    (left.min(right) / left.max(right) * (up.min(down) / up.max(down))).sqrt()
}

/// The intersection over union of each box `[N, 4]` with the one in its row, with gradients.
fn overlaps_of(boxes: &Tensor, others: &Tensor) -> Tensor {
    let low = boxes.narrow(1, 0, 2).maximum(&others.narrow(1, 0, 2));
    let high = boxes.narrow(1, 2, 2).minimum(&others.narrow(1, 2, 2));
    let area = |size: Tensor| size.select(1, 0) * size.select(1, 1);
    let [one, other] = [boxes, others].map(|boxes| area(boxes.narrow(1, 2, 2) - boxes.narrow(1, 0, 2)));
    let shared = area((high - low).clamp_min(0.0));
    let union = (one + other - &shared).clamp_min(LEAST_OVERLAP);
    shared / union
}
