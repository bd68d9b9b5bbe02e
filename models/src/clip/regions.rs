//! Features of regions by a frozen CLIP ResNet, in two ways. CORA, Wu et al., CVPR 2023, <https://arxiv.org/abs/2303.13076>, section 4 of
//! its specification.
//!
//! [`Regions::exact`] pools a box from layer 3 and gives it layer 4 and the attention pooling of its own. It is what region prompts are
//! trained with and what boxes are classified with. [`Regions::fast`] projects the cells of layer 4 of the whole image once and pools
//! queries, keys and values; it is for a thousand anchors an image. Features of one box by the two ways differ, and each takes its own kind
//! of map, [`Layer3`] or [`Layer4`], so that they cannot be mixed up.
//!
//! A region prompt (section 5 there) is another position table of the attention pooling: [`Regions::with_table`] uses one, and
//! [`Regions::pool`] has gradients to one, from grids that [`Regions::grids`] makes and that can be kept.
//!
//! Boxes are cxcywh, relative to their image without its padding. They may lie outside; boxes without area have a feature too, which is the
//! same for all of them. Everything is in f32, and nothing but [`Regions::pool`] has gradients.
//!
//! Differences from the reference: none but those of [`Rules`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::{
    Clip,
    resnet::{AttentionPool, ModifiedResNet, REDUCTION},
    to_unit_length,
};
use crate::{
    Error, Phase, Result,
    detection::{
        boxes::{ImageSize, cxcywh_to_xyxy, is_floating},
        roi_align::{Alignment, Level, RoiAlign, Sampling},
    },
    error::{check_count, ensure},
};

/// Layer 3 is this many times smaller than the image.
const STRIDE_3: i64 = 16;
/// Layer 4 is this many times smaller than the image.
const STRIDE_4: i64 = 32;
/// The size of the pooled boxes that go through layer 4 at once, bytes; what layer 4 makes of them takes four times as much.
const EXACT_CHUNK: i64 = 1 << 26;
/// The size of the products of queries with the keys of cells that are computed at once, bytes; there are about four of this size.
const FAST_CHUNK: i64 = 1 << 26;

/// Whether anchors that stick out of the image are cut off before they are pooled. (Defect 3.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Overhang {
    /// They are: every pooled cell has the whole bias of its projection.
    Fixed,
    /// They are not, as in the reference: a cell outside lacks its part of the biases of queries, keys and values.
    #[default]
    Reference,
}

/// The width and height of an image in cells of a map, by which boxes are multiplied. (Defect 15.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Extent {
    /// The size in px over the map's stride.
    Fixed,
    /// The number of cells that are not padding, as in the reference: up to one more than the image is wide, or one less.
    #[default]
    Reference,
}

/// The choices between the reference's arithmetic and a repaired one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// Whether anchors that stick out of the image are cut off; for [`Regions::fast`] alone.
    pub overhang: Overhang,
    /// The width and height of an image in cells.
    pub extent: Extent,
}

/// The sizes of the images of a batch, and of the batch itself, px. Padding is to the right of an image and below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSizes {
    /// The size that all images are padded to.
    pub padded: ImageSize,
    /// The size of each image.
    pub images: Vec<ImageSize>,
}

impl BatchSizes {
    /// The sizes of images that are padded to the greatest width and the greatest height among them.
    pub fn of(images: Vec<ImageSize>) -> Self {
        let most = |side: fn(&ImageSize) -> i64| images.iter().map(side).max().unwrap_or(0);
        Self { padded: ImageSize { width: most(|size| size.width), height: most(|size| size.height) }, images }
    }

    /// For each image, the rows and columns of a map of some stride that are not padding (section 2.3).
    fn valid(&self, stride: i64) -> Vec<[i64; 2]> {
        let of_image = |image: &ImageSize| {
            let ImageSize { width, height } = self.padded;
            [valid_cells(image.height, height, stride), valid_cells(image.width, width, stride)]
        };
        self.images.iter().map(of_image).collect()
    }

    /// For each image, its width and height in cells of a map of some stride.
    fn extents(&self, stride: i64, rule: Extent) -> Vec<[f32; 2]> {
        match rule {
            Extent::Fixed => self.images.iter().map(|image| [image.width, image.height].map(|px| px as f32 / stride as f32)).collect(),
            Extent::Reference => self.valid(stride).into_iter().map(|[rows, columns]| [columns as f32, rows as f32]).collect(),
        }
    }

    fn check(&self, n_images: i64) -> Result<()> {
        check_count("image sizes", n_images, self.images.len())?;
        let ImageSize { width, height } = self.padded;
        match self.images.iter().find(|image| !(1..=width).contains(&image.width) || !(1..=height).contains(&image.height)) {
            Some(image) => Err(Error::Input {
                what: "image sizes",
                expected: format!("from 1 x 1 to {width} x {height} px, the size of the batch"),
                found: format!("{} x {} px", image.width, image.height),
            }),
            None => Ok(()),
        }
    }
}

/// The cells of a map along one axis: the stem rounds up, every pooling down.
fn n_cells(side_px: i64, stride: i64) -> i64 {
    (side_px + 1) / 2 / (stride / 2)
}

/// The cells along one axis whose sampled px are not padding; px are sampled as libtorch's nearest neighbours are, in f32.
fn valid_cells(side_px: i64, padded_px: i64, stride: i64) -> i64 {
    let n = n_cells(padded_px, stride);
    let ratio = padded_px as f32 / n as f32;
    let sampled = |cell: i64| ((cell as f32 * ratio).floor() as i64).min(padded_px - 1);
    (0..n).filter(|&cell| sampled(cell) < side_px).count() as i64
}

/// Layer 3 of a batch of whole images.
#[derive(Debug)]
pub struct Layer3 {
    /// f32 `[B, C4 / 2, H / 16, W / 16]`, both rounded as the network does it.
    pub features: Tensor,
    /// The images' sizes.
    pub sizes: BatchSizes,
}

impl Layer3 {
    /// For each image, `[Hv, Wv]`: the rows and columns that are not padding.
    pub fn valid(&self) -> Vec<[i64; 2]> {
        self.sizes.valid(STRIDE_3)
    }
}

/// Layer 4 of a batch of whole images.
#[derive(Debug)]
pub struct Layer4 {
    /// f32 `[B, C4, H / 32, W / 32]`, both rounded as the network does it.
    pub features: Tensor,
    /// The images' sizes.
    pub sizes: BatchSizes,
}

impl Layer4 {
    /// For each image, `[Hv, Wv]`: the rows and columns that are not padding.
    pub fn valid(&self) -> Vec<[i64; 2]> {
        self.sizes.valid(STRIDE_4)
    }
}

impl Clip {
    /// Features of regions by the image tower. Fails where it is not a modified ResNet in f32.
    pub fn regions(&self) -> Result<Regions<'_>> {
        let Some(resnet) = self.towers.image.resnet() else {
            let expected = "a modified ResNet, whose layers regions are pooled from".into();
            return Err(Error::Input { what: "image tower", expected, found: self.architecture.describe()[0].clone() });
        };
        if self.kind != Kind::Float {
            let expected = "Float: regions are computed in f32".into();
            return Err(Error::Input { what: "kind of the image tower", expected, found: format!("{:?}", self.kind) });
        }
        let pool = resnet.attnpool.detached();
        let table = pool.positional_embedding.shallow_clone();
        Ok(Regions { resnet, pool, table, rules: Rules::default(), device: self.device })
    }
}

/// Features of regions by one CLIP. C4 stands for the channels of layer 4, s for the side of the attention pooling's grid.
#[derive(Debug)]
pub struct Regions<'a> {
    resnet: &'a ModifiedResNet,
    pool: AttentionPool,
    /// The position table in use.
    table: Tensor,
    rules: Rules,
    device: Device,
}

impl Regions<'_> {
    /// The same with other rules.
    #[must_use]
    pub fn with_rules(self, rules: Rules) -> Self {
        Self { rules, ..self }
    }

    /// The same with a region prompt: a position table `[1 + s * s, C4]` in place of CLIP's own. Fails for any other shape.
    pub fn with_table(self, table: &Tensor) -> Result<Self> {
        self.pool.check_table(table)?;
        Ok(Self { table: table.detach().to_device(self.device).to_kind(Kind::Float), ..self })
    }

    /// The position table in use, f32 `[1 + s * s, C4]`; row 0 belongs to the mean, the others to the grid, row by row.
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// The side s of the grid.
    pub fn side(&self) -> i64 {
        self.pool.side()
    }

    /// Layer 3 of whole images.
    ///
    /// `images`: `[B, 3, H, W]` of any floating kind, normalised as [`Clip::preprocessing`] says, then padded with zeros at the right and below;
    /// `sizes`: of each of them without padding.
    pub fn layer3(&self, images: &Tensor, sizes: &[ImageSize]) -> Result<Layer3> {
        let fits = matches!(images.size()[..], [b, 3, h, w] if b >= 1 && h >= REDUCTION && w >= REDUCTION) && is_floating(images);
        ensure(fits, "images", &format!("floating [B, 3, H, W], H and W at least {REDUCTION}"), images)?;
        let size = images.size();
        let sizes = BatchSizes { padded: ImageSize { width: size[3], height: size[2] }, images: sizes.to_vec() };
        sizes.check(size[0])?;
        let images = images.to_device(self.device).to_kind(Kind::Float);
        let features =
            no_grad(|| (0..3).fold(self.resnet.stem(&images, Phase::Test), |x, index| self.resnet.layer(index, &x, Phase::Test)));
        Ok(Layer3 { features, sizes })
    }

    /// Layer 4 of whole images.
    pub fn layer4(&self, layer3: &Layer3) -> Result<Layer4> {
        let features = self.checked_layer3(layer3)?;
        Ok(Layer4 { features: no_grad(|| self.resnet.layer(3, &features, Phase::Test)), sizes: layer3.sizes.clone() })
    }

    /// Features of boxes by the exact way: f32 `[N, D]` of unit length, image after image.
    ///
    /// `boxes`: for each image `[N_b, 4]`, cxcywh, relative. Fails for corners that are not finite or farther out than 1,000,000 cells.
    pub fn exact(&self, layer3: &Layer3, boxes: &[Tensor]) -> Result<Tensor> {
        self.by_chunks(layer3, boxes, |grids| to_unit_length(&self.pool.pool(grids, &self.table)))
    }

    /// Layer 4 of each box by itself: f32 `[N, C4, s, s]`, image after image; what [`Self::exact`] pools. The same in `boxes`.
    pub fn grids(&self, layer3: &Layer3, boxes: &[Tensor]) -> Result<Tensor> {
        self.by_chunks(layer3, boxes, Tensor::shallow_clone)
    }

    /// Pools grids `[N, C4, s, s]` with a position table `[1 + s * s, C4]`: f32 `[N, D]` of unit length. Gradients flow to the table alone.
    pub fn pool(&self, table: &Tensor, grids: &Tensor) -> Result<Tensor> {
        self.pool.check_table(table)?;
        let (s, c) = (self.side(), self.pool.width());
        let fits = matches!(grids.size()[..], [_, grid_c, h, w] if [grid_c, h, w] == [c, s, s]) && is_floating(grids);
        ensure(fits, "grids", &format!("floating [N, {c}, {s}, {s}]"), grids)?;
        let grids = grids.detach().to_device(self.device).to_kind(Kind::Float);
        Ok(to_unit_length(&self.pool.pool(&grids, &table.to_device(self.device).to_kind(Kind::Float))))
    }

    /// Features of the same boxes in every image by the fast way: f32 `[B, N, D]` of unit length.
    ///
    /// The mean of a box is its query, but unlike in [`Self::exact`] no key or value. (Defect 1: the published detectors are trained so.)
    /// `boxes`: `[N, 4]`, cxcywh, relative. Fails for corners that are not finite or farther out than 1,000,000 cells.
    pub fn fast(&self, layer4: &Layer4, boxes: &Tensor) -> Result<Tensor> {
        let Layer4 { features, sizes } = layer4;
        let features = self.checked(features, sizes, STRIDE_4, self.pool.width(), "layer 4")?;
        check_boxes(boxes)?;
        let extents = sizes.extents(STRIDE_4, self.rules.extent);
        no_grad(|| self.pool.fast(&features, &extents, boxes, &self.table, self.rules.overhang))
    }

    /// What `finish` makes of grids, a limited number of boxes at once.
    fn by_chunks(&self, layer3: &Layer3, boxes: &[Tensor], finish: impl Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let features = self.checked_layer3(layer3)?;
        check_count("boxes", features.size()[0], boxes.len())?;
        boxes.iter().try_for_each(check_boxes)?;
        let extents = layer3.sizes.extents(STRIDE_3, self.rules.extent);
        let boxes: Vec<Tensor> = boxes.iter().zip(extents).map(|(boxes, extent)| in_cells(&cxcywh_to_xyxy(boxes), extent)).collect();
        let (s, c) = (self.side(), self.pool.width());
        if boxes.iter().all(|boxes| boxes.size()[0] == 0) {
            return Ok(no_grad(|| finish(&Tensor::zeros([0, c, s, s], (Kind::Float, self.device)))));
        }
        no_grad(|| {
            let chunk_of = |boxes: Vec<Tensor>| {
                let pooled = roi_align(2 * s, &features, &boxes)?;
                Ok(finish(&self.resnet.layer(3, &pooled, Phase::Test)))
            };
            let most = boxes_at_once(EXACT_CHUNK, 4 * s * s * features.size()[1]);
            let chunks: Vec<Tensor> = chunks(&boxes, most).into_iter().map(chunk_of).collect::<Result<_>>()?;
            Ok(Tensor::cat(&chunks, 0))
        })
    }

    fn checked_layer3(&self, layer3: &Layer3) -> Result<Tensor> {
        self.checked(&layer3.features, &layer3.sizes, STRIDE_3, self.pool.width() / 2, "layer 3")
    }

    /// The features of a map on the weights' device, if they and their sizes are those of one batch.
    fn checked(&self, features: &Tensor, sizes: &BatchSizes, stride: i64, c: i64, what: &'static str) -> Result<Tensor> {
        let ImageSize { width, height } = sizes.padded;
        let cells = [n_cells(height, stride), n_cells(width, stride)];
        let fits = matches!(features.size()[..], [b, map_c, h, w] if b >= 1 && map_c == c && [h, w] == cells) && is_floating(features);
        let [h, w] = cells;
        ensure(fits, what, &format!("floating [B, {c}, {h}, {w}], of images of {width} x {height} px"), features)?;
        sizes.check(features.size()[0])?;
        Ok(features.detach().to_device(self.device).to_kind(Kind::Float))
    }
}

impl AttentionPool {
    /// The channels C4.
    fn width(&self) -> i64 {
        self.positional_embedding.size()[1]
    }

    /// The side s of the grid.
    fn side(&self) -> i64 {
        ((self.positional_embedding.size()[0] - 1) as f64).sqrt().round() as i64
    }

    fn check_table(&self, table: &Tensor) -> Result<()> {
        let expected = self.positional_embedding.size();
        ensure(table.size() == expected && is_floating(table), "region prompt", &format!("floating {expected:?}"), table)
    }

    /// The fast way, on layer 4 `map` f32 `[B, C, h, w]` of images as wide and high as `extents` say in cells.
    ///
    /// RoIAlign is linear: a key is the sum of some cells' keys by the weights of [`RoiAlign::matrices`], so its product with a query is the same
    /// sum of products, and what attention takes is a sum of the cells' values. No key and no value of a box is written down. Of 1,000 anchors
    /// on the layer 4 of RN50 (2,048 channels, 25 x 33), one core makes features in 0.55 s; by pooled
    /// queries, keys and values it was 5.0 s.
    fn fast(&self, map: &Tensor, extents: &[[f32; 2]], boxes: &Tensor, table: &Tensor, overhang: Overhang) -> Result<Tensor> {
        let (b, c, h, w) = map.size4().expect("BUG: a checked map has four dimensions");
        let (s, n, heads) = (self.side(), boxes.size()[0], self.heads);
        if n == 0 {
            return Ok(Tensor::zeros([b, 0, self.c_proj.weight.size()[0]], (Kind::Float, map.device())));
        }
        let split = |tokens: &Tensor| tokens.reshape([-1, heads, c / heads]);
        let of_query = table.narrow(0, 0, 1).matmul(&self.q_proj.weight.tr());
        let [of_keys, of_values] = [&self.k_proj, &self.v_proj].map(|linear| split(&table.narrow(0, 1, s * s).matmul(&linear.weight.tr())));
        let corners = cxcywh_to_xyxy(boxes);
        let corners = match overhang {
            Overhang::Fixed => corners.clamp(0.0, 1.0),
            Overhang::Reference => corners,
        };
        let most = boxes_at_once(FAST_CHUNK, heads * h * w);
        let mut features = Vec::new();
        for (image, &extent) in extents.iter().enumerate() {
            let cells = map.get(image as i64).flatten(1, 2).tr();
            let queries = self.q_proj.forward(&cells).view([h, w, c]);
            let (keys, values) = (split(&self.k_proj.forward(&cells)), split(&self.v_proj.forward(&cells)));
            for chunk in in_cells(&corners, extent).split(most, 0) {
                let [rows, columns] = pooling(s).matrices(&chunk, [h, w])?.map(|matrix| matrix.to_device(map.device()));
                let mean = [&rows, &columns].map(|matrix| matrix.mean_dim(1, false, None::<Kind>));
                let q = split(&(sum("ny,nx,yxc->nc", &[&mean[0], &mean[1], &queries]) + &of_query));
                let of_cells = sum("nhd,chd->nhc", &[&q, &keys]).view([-1, heads, h, w]);
                let logits = sum("nhyx,niy,njx->nhij", &[&of_cells, &rows, &columns]).flatten(2, 3) + sum("nhd,thd->nht", &[&q, &of_keys]);
                let shares = (logits * ((c / heads) as f64).powf(-0.5)).softmax(-1, Kind::Float);
                let of_cells = sum("nhij,niy,njx->nhyx", &[&shares.view([-1, heads, s, s]), &rows, &columns]).flatten(2, 3);
                let taken = sum("nhc,chd->nhd", &[&of_cells, &values]) + sum("nht,thd->nhd", &[&shares, &of_values]);
                features.push(to_unit_length(&self.c_proj.forward(&taken.flatten(1, 2))));
            }
        }
        Ok(Tensor::cat(&features, 0).view([b, n, -1]))
    }
}

/// The sum of products that `equation` names.
fn sum(equation: &str, tensors: &[&Tensor]) -> Tensor {
    Tensor::einsum(equation, tensors, None::<i64>)
}

/// With one level its scale says nothing.
fn pooling(side: i64) -> RoiAlign {
    RoiAlign { side, sampling: Sampling::Adaptive, alignment: Alignment::Centre, finest_scale: 1.0 }
}

/// Pools boxes, xyxy in cells, to `[N, C, side, side]`.
fn roi_align(side: i64, map: &Tensor, boxes: &[Tensor]) -> Result<Tensor> {
    pooling(side).forward(&[Level { features: map, stride: 1 }], boxes)
}

fn check_boxes(boxes: &Tensor) -> Result<()> {
    ensure(matches!(boxes.size()[..], [_, 4]) && is_floating(boxes), "boxes of regions", "floating [N, 4]", boxes)
}

/// Relative boxes in cells of a map.
fn in_cells(boxes: &Tensor, [width, height]: [f32; 2]) -> Tensor {
    boxes * Tensor::from_slice(&[width, height, width, height]).to_device(boxes.device())
}

/// How many boxes of so many numbers each fill some bytes.
fn boxes_at_once(bytes: i64, n_numbers: i64) -> i64 {
    (bytes / (4 * n_numbers)).max(1)
}

/// The boxes of images in pieces of `most` boxes, image after image; a piece has an entry for each image.
fn chunks(boxes: &[Tensor], most: i64) -> Vec<Vec<Tensor>> {
    let n_boxes: Vec<i64> = boxes.iter().map(|boxes| boxes.size()[0]).collect();
    let piece = |start: i64| {
        let mut first = 0;
        let of_image = |(boxes, &n): (&Tensor, &i64)| {
            let [from, to] = [start, start + most].map(|place| (place - first).clamp(0, n));
            first += n;
            boxes.narrow(0, from, to - from)
        };
        boxes.iter().zip(&n_boxes).map(of_image).collect()
    };
    (0..n_boxes.iter().sum()).step_by(most as usize).map(piece).collect()
}

#[cfg(test)]
pub(crate) mod tests;
