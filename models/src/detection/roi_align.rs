//! RoIAlign (Mask R-CNN, section 3) over the levels of a pyramid, with gradients to the features, on any device.
//!
//! A pooled cell is a weighted sum of feature cells, and the weights are products of one along y and one along x. So the whole pooling of
//! a batch is one sparse matrix, with a row for each pooled cell, times the features, with a row for each feature cell of each level. The
//! matrix is built here from the boxes, duplicates merged; libtorch multiplies, and differentiates.
//!
//! Two of its kernels can. That of sparse matrices (CSR) is the fastest on a CPU; cuSPARSE does not promise the same bits in every run, so
//! that other devices take that of embedding tables, whose sums are in a fixed order. Of 512 boxes over 256 channels, one core pools
//!
//! | map       | CSR               | embedding tables   | torchvision's kernel |
//! |-----------|-------------------|--------------------|----------------------|
//! | 80 x 80   | 16 ms, both 59 ms | 66 ms, both 103 ms | 75 ms, both 574 ms   |
//! | 200 x 200 | 24 ms, both 113 ms| 86 ms, both 200 ms | 151 ms, both 764 ms  |
//!
//! where "both" is with gradients, and only CSR includes the building of the matrix.
//!
//! Boxes get no gradients, as in the reference implementations. The arithmetic of sampling points is torchvision's, in f32.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::boxes::{Corners, corners, is_floating};
use crate::{Error, Result, error::ensure};

/// The mode of libtorch's `embedding_bag` that adds.
const SUM: i64 = 0;
/// Boxes farther out than this are no boxes of an image, px.
const MAX_COORDINATE: f32 = 1e6;

/// Pooling of boxes to feature maps of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoiAlign {
    /// The side of a pooled map, in cells.
    pub side: i64,
    /// The number of sampling points of a pooled cell.
    pub sampling: Sampling,
    /// Where feature cells lie.
    pub alignment: Alignment,
    /// The side in px from which a box is taken from the second level (56 in FPN; every doubling is another level).
    pub finest_scale: f32,
}

/// The number of sampling points of a pooled cell, along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// As many as the pooled cell spans feature cells, rounded up.
    Adaptive,
    /// Always this many.
    Fixed(u32),
}

/// Where feature cells lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alignment {
    /// The centre of cell (0, 0) is half a cell from the corner (`aligned = True`).
    Centre,
    /// The centre of cell (0, 0) is the corner, and boxes are at least one cell wide (`aligned = False`).
    Corner,
}

/// A level of a feature pyramid.
#[derive(Debug)]
pub struct Level<'a> {
    /// `[B, C, h, w]`.
    pub features: &'a Tensor,
    /// The px between two cells.
    pub stride: i64,
}

impl RoiAlign {
    /// The level, of `n_levels` from the finest on, that a box is taken from (FPN, equation 1, as mmdet computes it).
    pub(crate) fn level_of(&self, [x1, y1, x2, y2]: [f32; 4], n_levels: usize) -> usize {
        let side = ((x2 - x1) * (y2 - y1)).max(0.0).sqrt();
        // An empty box has the logarithm of 1e-6, far below zero, which the cast makes 0.
        let level = (side / self.finest_scale + 1e-6).log2().floor() as usize;
        level.min(n_levels - 1)
    }

    /// Pools boxes: `[N, C, side, side]` in the features' kind and on their device, image after image.
    ///
    /// `levels`: from the finest on, of one batch size B and one C; `boxes`: for each of the B images `[N_b, 4]`, px.
    pub fn forward(&self, levels: &[Level<'_>], boxes: &[Tensor]) -> Result<Tensor> {
        let (b, c) = self.check(levels, boxes.len())?;
        let (device, kind) = (levels[0].features.device(), levels[0].features.kind());
        let mut grids = Vec::with_capacity(levels.len());
        let mut n_cells = 0;
        for level in levels {
            let [height, width] = [2, 3].map(|dimension| level.features.size()[dimension]);
            grids.push(FeatureGrid { first_cell: n_cells, height, width, scale: 1.0 / level.stride as f32 });
            n_cells += b * height * width;
        }
        let mut matrix = SparseRows::default();
        for (image, boxes) in boxes.iter().enumerate() {
            for corners in tame(boxes)? {
                self.add_rows(&grids[self.level_of(corners, grids.len())], image as i64, corners, &mut matrix);
            }
        }
        // [cells of all levels, C]; what a convolution leaves channels-last is only viewed.
        let cells = levels.iter().map(|level| level.features.permute([0, 2, 3, 1]).reshape([-1, c]).to_kind(Kind::Float));
        let cells = Tensor::cat(&cells.collect::<Vec<_>>(), 0);
        let pooled = match device {
            Device::Cpu => matrix.times_by_csr(&cells),
            Device::Cuda(_) | Device::Mps | Device::Vulkan => matrix.times_by_bags(&cells),
        };
        Ok(pooled.view([-1, self.side, self.side, c]).permute([0, 3, 1, 2]).to_kind(kind))
    }

    /// The pooling of boxes to one map, as two matrices a box: f32 `[N, side, h]` of rows and `[N, side, w]` of columns, on the CPU. A pooled map
    /// is the rows' matrix times the map times the columns' matrix transposed.
    ///
    /// What is linear in pooled maps can thus be computed without them. `boxes`: `[N, 4]`, in cells; `cells`: the map's h and w.
    pub(crate) fn matrices(&self, boxes: &Tensor, cells: [i64; 2]) -> Result<[Tensor; 2]> {
        let corners = tame(boxes)?;
        let matrix = |axis: usize, n_cells: i64| {
            let mut values = vec![0.0_f32; corners.len() * self.side as usize * n_cells as usize];
            let pooled_cells = corners.iter().flat_map(|corners| self.weights(corners[axis], corners[axis + 2], n_cells));
            for (row, weights) in values.chunks_exact_mut(n_cells as usize).zip(pooled_cells) {
                for (cell, weight) in weights {
                    row[cell as usize] = weight;
                }
            }
            Tensor::from_slice(&values).view([corners.len() as i64, self.side, n_cells])
        };
        Ok([matrix(1, cells[0]), matrix(0, cells[1])])
    }

    fn check(&self, levels: &[Level<'_>], n_images: usize) -> Result<(i64, i64)> {
        if self.side < 1 || self.sampling == Sampling::Fixed(0) {
            let found = format!("side {}, {:?} sampling", self.side, self.sampling);
            return Err(Error::Input { what: "RoIAlign", expected: "a side and a number of points of at least 1".into(), found });
        }
        let Some(first) = levels.first() else {
            return Err(Error::Input { what: "levels to pool from", expected: "at least one".into(), found: "none".into() });
        };
        let c = first.features.size().get(1).copied().unwrap_or_default();
        for Level { features, stride } in levels {
            let fits = matches!(features.size()[..], [b, level_c, h, w] if b == n_images as i64 && level_c == c && h > 0 && w > 0);
            let is_fine = fits && *stride > 0 && is_floating(features);
            ensure(is_fine, "levels to pool from", &format!("floating [{n_images}, {c}, h, w] and a positive stride"), features)?;
        }
        Ok((n_images as i64, c))
    }

    /// Adds the rows of one box, a row for each pooled cell.
    fn add_rows(&self, grid: &FeatureGrid, image: i64, [x1, y1, x2, y2]: Corners, matrix: &mut SparseRows) {
        let rows = self.weights(y1 * grid.scale, y2 * grid.scale, grid.height);
        let columns = self.weights(x1 * grid.scale, x2 * grid.scale, grid.width);
        let first_cell = grid.first_cell + image * grid.height * grid.width;
        for row_weights in &rows {
            for column_weights in &columns {
                for &(row, row_weight) in row_weights {
                    for &(column, column_weight) in column_weights {
                        matrix.columns.push(first_cell + row * grid.width + column);
                        matrix.values.push(row_weight * column_weight);
                    }
                }
                matrix.row_ends.push(matrix.columns.len() as i64);
            }
        }
    }

    /// For each pooled cell along one axis, the feature cells it takes from, ascending, and how much; `n_cells` of them, and `low` and `high`
    /// in cells.
    fn weights(&self, low: f32, high: f32, n_cells: i64) -> Vec<Vec<(i64, f32)>> {
        let (low, extent) = match self.alignment {
            Alignment::Centre => (low - 0.5, (high - 0.5) - (low - 0.5)),
            Alignment::Corner => (low, (high - low).max(1.0)),
        };
        let bin = extent / self.side as f32;
        let n_points = match self.sampling {
            Sampling::Adaptive => bin.ceil().max(0.0) as u32,
            Sampling::Fixed(n) => n,
        };
        let last = n_cells - 1;
        let pooled_cell = |cell: i64| {
            let mut weights: Vec<(i64, f32)> = Vec::new();
            let mut add = |cell: i64, weight: f32| match weights.iter_mut().rev().find(|(at, _)| *at == cell) {
                Some((_, sum)) => *sum += weight,
                None => weights.push((cell, weight)),
            };
            for point in 0..n_points {
                let at = low + cell as f32 * bin + (point as f32 + 0.5) * bin / n_points as f32;
                // Points up to a cell outside take the value of the border, those farther out none.
                if at < -1.0 || at > n_cells as f32 {
                    continue;
                }
                let at = at.max(0.0);
                let below = at as i64;
                if below >= last {
                    add(last, 1.0);
                } else {
                    let to_above = at - below as f32;
                    add(below, 1.0 - to_above);
                    add(below + 1, to_above);
                }
            }
            weights.iter_mut().for_each(|(_, weight)| *weight /= n_points as f32);
            weights
        };
        (0..self.side).map(pooled_cell).collect()
    }
}

/// The corners of boxes to pool, if they can be those of boxes in an image.
fn tame(boxes: &Tensor) -> Result<Vec<Corners>> {
    let corners = corners(boxes, "boxes to pool")?;
    match corners.as_flattened().iter().find(|corner| corner.is_nan() || corner.abs() > MAX_COORDINATE) {
        Some(wild) => Err(Error::Input {
            what: "boxes to pool",
            expected: format!("corners between -{MAX_COORDINATE} and {MAX_COORDINATE} px"),
            found: wild.to_string(),
        }),
        None => Ok(corners),
    }
}

/// Where the cells of a level lie among those of all levels.
struct FeatureGrid {
    first_cell: i64,
    height: i64,
    width: i64,
    /// Cells of a px.
    scale: f32,
}

/// A matrix in compressed rows.
#[derive(Default)]
pub(super) struct SparseRows {
    /// For each row, how many values there are up to its end.
    pub(super) row_ends: Vec<i64>,
    pub(super) columns: Vec<i64>,
    pub(super) values: Vec<f32>,
}

impl SparseRows {
    /// Row starts and the end, columns, values.
    fn to_tensors(&self, device: Device) -> [Tensor; 3] {
        let starts = Tensor::cat(&[Tensor::from_slice(&[0_i64]), Tensor::from_slice(&self.row_ends)], 0);
        [starts, Tensor::from_slice(&self.columns), Tensor::from_slice(&self.values)].map(|tensor| tensor.to_device(device))
    }

    /// The product with `dense` f32 `[columns, C]`, by the kernel of sparse matrices.
    pub(super) fn times_by_csr(&self, dense: &Tensor) -> Tensor {
        let [starts, columns, values] = self.to_tensors(dense.device());
        let shape = [self.row_ends.len() as i64, dense.size()[0]];
        // The checks that this leaves out are a pass over indices that were made above, and a warning on the operator's screen.
        Tensor::internal_sparse_csr_tensor_unsafe(&starts, &columns, &values, shape, (Kind::Float, dense.device())).mm(dense)
    }

    /// The same product, by the kernel of embedding tables.
    pub(super) fn times_by_bags(&self, dense: &Tensor) -> Tensor {
        if self.columns.is_empty() {
            return Tensor::zeros([self.row_ends.len() as i64, dense.size()[1]], (Kind::Float, dense.device()));
        }
        let [starts, columns, values] = self.to_tensors(dense.device());
        let (scale_by_frequency, sparse_gradient, starts_have_end) = (false, false, true);
        Tensor::embedding_bag(dense, &columns, &starts, scale_by_frequency, SUM, sparse_gradient, Some(&values), starts_have_end).0
    }
}
