//! Crops resized where the network runs: an accelerator gets an image once, and cuts its many squares out by itself.
//!
//! The rule is that of [`Preprocess::square_of`], in f32 instead of fixed point: a level may differ by one. Each axis is a product of a
//! matrix of taps with the image, because that is what accelerators do best; the taps are computed there, too.

use ovenbird_data::images::{Image, Preprocess};
use tch::{Device, Kind, Tensor};

/// Bytes `[N]` on a device. An accelerator fetches them from pinned memory by itself, while this thread goes on.
pub(crate) fn upload(bytes: &[u8], device: Device) -> Tensor {
    let here = Tensor::from_slice(bytes);
    if device == Device::Cpu { here } else { here.pin_memory(device).to_device_(device, Kind::Uint8, true, false) }
}

/// Squares `[N, S, S, 3]` of levels, f32, cut out of one image: see [`Preprocess::square_of`].
pub(crate) fn squares(preprocess: &Preprocess, image: &Image, rectangles: &[[i64; 4]], device: Device) -> Tensor {
    let (n, side) = (rectangles.len() as i64, i64::from(preprocess.side_px));
    let [height, width] = [i64::from(image.height), i64::from(image.width)];
    let plans: Vec<([i64; 2], [i64; 2])> = rectangles
        .iter()
        .map(|[x1, y1, x2, y2]| preprocess.resized([(x2 - x1) as u32, (y2 - y1) as u32]))
        .map(|(to, offset)| (to.map(i64::from), offset.map(i64::from)))
        .collect();
    let axis = |axis: usize, length: i64| {
        let plan = |(rectangle, (to, offset)): (&[i64; 4], &([i64; 2], [i64; 2]))| {
            [rectangle[axis] as f64, (rectangle[axis + 2] - rectangle[axis]) as f64, to[axis] as f64, offset[axis] as f64]
        };
        taps(&rectangles.iter().zip(&plans).map(plan).collect::<Vec<_>>(), side, length, device)
    };
    let levels = upload(&image.rgb, device).view([height, width, 3]).to_kind(Kind::Float);
    // Along rows first, rounded in between, as Pillow: [N S, W] x [W, H 3].
    let columns = levels.permute([1, 0, 2]).reshape([width, height * 3]);
    let narrowed = to_levels(&axis(0, width).view([n * side, width]).matmul(&columns));
    let rows = narrowed.view([n, side, height, 3]).permute([0, 2, 1, 3]).reshape([n, height, side * 3]);
    to_levels(&axis(1, height).bmm(&rows)).view([n, side, side, 3])
}

/// Matrices `[N, S, length]` f32 that make the S targets of an axis from its pixels. Of each: where the rectangle begins and how long
/// it is, how long it becomes, and at which target the window begins.
fn taps(plans: &[[f64; 4]], side: i64, length: i64, device: Device) -> Tensor {
    let n = plans.len() as i64;
    let of =
        |field: usize| Tensor::from_slice(&plans.iter().map(|plan| plan[field]).collect::<Vec<f64>>()).to_device(device).view([n, 1, 1]);
    let (start, from, to, offset) = (of(0), of(1), of(2), of(3));
    let scale = &from / &to;
    let reduction = scale.clamp_min(1.0);
    let reach = &reduction * 2.0;
    let most_taps = plans.iter().map(|plan| (4.0 * (plan[1] / plan[2]).max(1.0)).ceil() as i64 + 2).max().unwrap_or(1);
    let target = Tensor::arange(side, (Kind::Double, device)).view([1, side, 1]);
    let centre = (target + offset + 0.5) * &scale;
    let first = (&centre - &reach + 0.5).clamp_min(0.0).floor();
    let last = (&centre + &reach + 0.5).floor().minimum(&from);
    // [N, S, taps]: sources counted from the rectangle's begin.
    let source = &first + Tensor::arange(most_taps, (Kind::Double, device)).view([1, 1, most_taps]);
    let weights = cubic(&((&source - &centre + 0.5) / &reduction)) * source.lt_tensor(&last);
    // An axis that keeps its length is left alone.
    let is_kept = from.eq_tensor(&to);
    let alone = (&source - centre + 0.5).abs().lt(0.25).to_kind(Kind::Double);
    let weights = alone.where_self(&is_kept, &weights);
    let weights = &weights / weights.sum_dim_intlist([-1_i64].as_slice(), true, Kind::Double);
    let pixel = source + start;
    let is_inside = pixel.ge(0.0).logical_and(&pixel.lt(length as f64));
    let weights = (weights * is_inside).to_kind(Kind::Float);
    let pixel = pixel.clamp(0.0, (length - 1) as f64).to_kind(Kind::Int64);
    Tensor::zeros([n, side, length], (Kind::Float, device)).scatter_add(2, &pixel, &weights)
}

/// Keys' cubic convolution with a = -0.5.
fn cubic(x: &Tensor) -> Tensor {
    let x = x.abs();
    let near = (&x * 1.5 - 2.5) * &x * &x + 1.0;
    let far = (((&x - 5.0) * &x + 8.0) * &x - 4.0) * -0.5;
    let outside = far.where_self(&x.lt(2.0), &x.zeros_like());
    near.where_self(&x.lt(1.0), &outside)
}

fn to_levels(sums: &Tensor) -> Tensor {
    (sums + 0.5).floor().clamp(0.0, 255.0)
}

#[cfg(test)]
mod tests {
    use ovenbird_data::images::SquareResize;

    use super::*;

    fn picture(width: u32, height: u32) -> Image {
        let level = |x: u32, y: u32, channel: u32| ((x * (3 + channel) + y * (7 - channel) + (x / 9 + y / 5) * 96) % 256) as u8;
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |channel| level(x, y, channel)))).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn squares_cut_on_a_device_are_within_one_level_of_pillow_s() {
        let preprocess = Preprocess { side_px: 56, resize: SquareResize::Shortest, mean: [0.0; 3], std: [1.0; 3] };
        let image = picture(160, 120);
        let rectangles = [
            [0, 0, 160, 120],
            [10, 20, 66, 76],
            [10, 20, 67, 76],
            [-40, -30, 100, 110],
            [-200, -200, 300, 300],
            [100, 3, 109, 119],
            [150, 110, 175, 134],
        ];
        let found = squares(&preprocess, &image, &rectangles, Device::Cpu);
        let (mut n_other, mut n_levels) = (0, 0);
        for (place, rectangle) in rectangles.iter().enumerate() {
            let expected = preprocess.square_of(&image, *rectangle);
            let expected = Tensor::from_slice(&expected.rgb).view([56, 56, 3]).to_kind(Kind::Float);
            let apart = (found.get(place as i64) - expected).abs();
            assert!(apart.max().double_value(&[]) <= 1.0, "{rectangle:?}: {}", apart.max().double_value(&[]));
            n_other += apart.gt(0.5).sum(Kind::Int64).int64_value(&[]);
            n_levels += apart.numel() as i64;
        }
        assert!(n_other * 1000 < n_levels, "{n_other} of {n_levels} levels differ");
    }
}
