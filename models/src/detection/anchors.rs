//! The boxes that a region proposal network starts from: at every cell of every level, one of each shape.

use std::iter;

use serde::{Deserialize, Serialize};

use super::boxes::Corners;

/// The anchors of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchors {
    /// The side of a square anchor, in strides of its level.
    pub scale: f64,
    /// Height over width, one anchor for each.
    pub ratios: Vec<f64>,
    /// How anchors lie on cells.
    pub grid: Grid,
}

/// How anchors lie on the cells of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// mmdet's: the stride of a level is a power of two, corners are not rounded.
    Exact,
    /// torchvision's: corners are rounded to whole px, half to even, and the stride is the batch's side over the level's, rounded down.
    Rounded,
}

/// A level of a pyramid, as far as anchors need to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cells {
    /// The number of rows.
    pub height: i64,
    /// The number of columns.
    pub width: i64,
    /// The px between two cells.
    pub stride: i64,
}

impl Anchors {
    /// The anchors of a cell at the origin, one for each ratio.
    fn at_origin(&self, stride: i64) -> Vec<Corners> {
        let side = self.scale * stride as f64;
        let corners = |ratio: &f64| {
            let (half_width, half_height) = (0.5 * side / ratio.sqrt(), 0.5 * side * ratio.sqrt());
            [-half_width, -half_height, half_width, half_height].map(|corner| match self.grid {
                Grid::Exact => corner as f32,
                Grid::Rounded => (corner as f32).round_ties_even(),
            })
        };
        self.ratios.iter().map(corners).collect()
    }

    /// The anchors of a level, row by row, column by column, ratio by ratio; px. Cell (0, 0) is centred at (0, 0).
    ///
    /// `batch`: height and width of the images, padding included, px.
    pub fn of_level(&self, cells: Cells, batch: [i64; 2]) -> Vec<Corners> {
        let origin = self.at_origin(cells.stride);
        let [step_y, step_x] = match self.grid {
            Grid::Exact => [cells.stride; 2],
            Grid::Rounded => [batch[0] / cells.height, batch[1] / cells.width],
        };
        (0..cells.height)
            .flat_map(|row| (0..cells.width).map(move |column| [(column * step_x) as f32, (row * step_y) as f32]))
            .flat_map(|[x, y]| iter::zip(&origin, iter::repeat([x, y, x, y])))
            .map(|(corners, shift)| [0, 1, 2, 3].map(|side| corners[side] + shift[side]))
            .collect()
    }
}
