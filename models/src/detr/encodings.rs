//! Places as sines: of the cells of a map, and of boxes; and the logarithm of odds with a floor.
//!
//! An axis has half as many numbers as a query or a token.

use std::f64::consts::TAU;

use tch::{Kind, Tensor};

/// The temperature of cells. (Section 7.1.)
const MAP_TEMPERATURE: f64 = 20.0;
/// The temperature of boxes. (Section 7.4.)
const BOX_TEMPERATURE: f64 = 10_000.0;
/// What is added to the number of cells along an axis.
const AXIS_EPS: f64 = 1e-6;
/// The floor of [`logit`] where a box is refined for the next layer. (Defect 25.)
pub(crate) const REFINEMENT_EPS: f64 = 1e-3;
/// The floor of [`logit`] where a layer's boxes are read out. (Defect 25.)
pub(crate) const OUTPUT_EPS: f64 = 1e-5;

/// The frequencies of the pairs of sine and cosine on an axis of `n` numbers.
fn frequencies(n: i64, temperature: f64) -> Vec<f64> {
    (0..n / 2).map(|pair| temperature.powf(-2.0 * pair as f64 / n as f64)).collect()
}

/// Sines and cosines of angles, next to each other: `[..., P]` to `[..., 2 P]`.
fn waves(angles: &Tensor) -> Tensor {
    Tensor::stack(&[angles.sin(), angles.cos()], -1).flatten(-2, -1)
}

/// Encodes the cells of maps of `[height, width]`, row by row: f64 `[B, height width, hidden]`, first y, then x. (Section 7.1.)
///
/// `valid`: of each image, the rows and columns that are not padding. Cells of padding get finite numbers without meaning.
pub(crate) fn image_encoding(valid: &[[i64; 2]], [height, width]: [i64; 2], hidden: i64) -> Tensor {
    let n = hidden / 2;
    let frequencies = Tensor::from_slice(&frequencies(n, MAP_TEMPERATURE));
    let axis = |cells: i64, n_valid: i64| {
        let angle = |cell: i64| ((cell + 1).min(n_valid) as f64 - 0.5) / (n_valid as f64 + AXIS_EPS) * TAU;
        let angles: Vec<f64> = (0..cells).map(angle).collect();
        // [cells, n]
        waves(&(Tensor::from_slice(&angles).unsqueeze(1) * &frequencies))
    };
    let of_image = |&[n_rows, n_columns]: &[i64; 2]| {
        let y = axis(height, n_rows).unsqueeze(1).expand([height, width, n], false);
        let x = axis(width, n_columns).unsqueeze(0).expand([height, width, n], false);
        Tensor::cat(&[y, x], 2).view([height * width, hidden])
    };
    Tensor::stack(&valid.iter().map(of_image).collect::<Vec<_>>(), 0)
}

/// Encodes boxes, cxcywh, `[..., 4]`: `[..., 2 hidden]`, of y, x, width and height in this order. (Section 7.4.)
pub(crate) fn box_encoding(boxes: &Tensor, hidden: i64) -> Tensor {
    let frequencies: Vec<f64> = frequencies(hidden / 2, BOX_TEMPERATURE).into_iter().map(|frequency| TAU * frequency).collect();
    let frequencies = Tensor::from_slice(&frequencies).to_kind(boxes.kind()).to_device(boxes.device());
    let order = Tensor::from_slice(&[1_i64, 0, 2, 3]).to_device(boxes.device());
    // [..., 4, hidden / 4]
    waves(&(boxes.index_select(-1, &order).unsqueeze(-1) * frequencies)).flatten(-2, -1)
}

/// The logarithm of the odds of shares, which are first clamped to [0, 1]; share and rest count as at least `eps`.
pub(crate) fn logit(x: &Tensor, eps: f64) -> Tensor {
    let x = x.clamp(0.0, 1.0);
    let rest: Tensor = 1.0 - &x;
    (x.clamp_min(eps) / rest.clamp_min(eps)).log()
}

/// A bias of attention that hides the padding of maps of `[height, width]`: f64 `[B, 1, 1, height width]`, 0 or minus infinity; none where there
/// is no padding.
pub(crate) fn padding_bias(valid: &[[i64; 2]], [height, width]: [i64; 2]) -> Option<Tensor> {
    if valid.iter().all(|&size| size == [height, width]) {
        return None;
    }
    let of_image = |&[n_rows, n_columns]: &[i64; 2]| {
        let bias = Tensor::full([height, width], f64::NEG_INFINITY, (Kind::Double, tch::Device::Cpu));
        drop(bias.narrow(0, 0, n_rows).narrow(1, 0, n_columns).fill_(0.0));
        bias.view([1, 1, height * width])
    };
    Some(Tensor::stack(&valid.iter().map(of_image).collect::<Vec<_>>(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{cora, error};

    /// Differences between f32 and f64 of CORA's code times five: angles of up to 2 pi in f32, that is 5e-7, and sines of them.
    const ROUNDING: f64 = 3e-6;

    #[test]
    fn encodings_are_those_of_cora_s_code() {
        let golden = cora("encodings");
        let valid = [[6, 8], [5, 7], [1, 1]];
        // [3, 6, 8, 256]
        let expected = golden["image_encoding"].permute([0, 2, 3, 1]);
        let found = image_encoding(&valid, [6, 8], 256).view([3, 6, 8, 256]);
        let bias = padding_bias(&valid, [6, 8]).unwrap().view([3, 6, 8]);
        for (image, &[rows, columns]) in valid.iter().enumerate() {
            let cut = |map: &Tensor| map.get(image as i64).narrow(0, 0, rows).narrow(1, 0, columns);
            assert!(error(&cut(&found), &cut(&expected)) < ROUNDING, "{image}");
        }
        assert_eq!(bias.lt(0.0).to_kind(Kind::Uint8), golden["image_mask"]);
        assert!(padding_bias(&[[6, 8], [6, 8]], [6, 8]).is_none());
        assert!(error(&box_encoding(&golden["query_ref"], 256), &golden["query_sine"]) < ROUNDING);
    }

    #[test]
    fn logits_are_those_of_cora_s_code() {
        let golden = cora("encodings");
        let x = &golden["logit_x"];
        // Near 0 and 1 a rounding of 1 - x by 6e-8 is 6e-8 / eps of the odds.
        let tail = x.lt(0.01).logical_or(&x.gt(0.99));
        for (eps, name) in [(REFINEMENT_EPS, "logit_eps1e3"), (OUTPUT_EPS, "logit_eps1e5")] {
            let apart = (logit(x, eps) - &golden[name]).abs();
            assert!(apart.masked_fill(&tail, 0.0).max().double_value(&[]) < 1e-6 && apart.max().double_value(&[]) < 1e-3, "{name}");
        }
    }

    fn close(found: &Tensor, first: i64, expected: &[f64]) {
        let apart = error(&found.narrow(0, first, expected.len() as i64), &Tensor::from_slice(expected));
        // Printed to six digits.
        assert!(apart < 1e-6, "{first}: {apart}");
    }

    /// E1 to E3, L1 and L2 of the specification.
    #[test]
    fn encodings_have_the_values_of_the_specification() {
        let of_box = box_encoding(&Tensor::from_slice(&[0.5, 0.25, 0.2, 0.4]), 256);
        close(&of_box, 0, &[1.0, 0.0, 0.977_918, 0.208_991]);
        close(&of_box, 126, &[0.000_181, 1.0, 0.0, -1.0, 0.408_751, -0.912_646]);
        close(&of_box, 256, &[0.951_057, 0.309_017]);
        close(&of_box, 384, &[0.587_785, -0.809_017]);
        let whole = image_encoding(&[[2, 3]], [2, 3], 256).get(0);
        close(&whole.get(0), 0, &[1.0, 0.000_001, 0.997_421, 0.071_771]);
        close(&whole.get(0), 127, &[0.996_615, 0.866_025, 0.5]);
        close(&whole.get(5), 0, &[-1.0, -0.000_002]);
        close(&whole.get(5), 126, &[0.244_409, 0.969_672, -0.866_026, 0.499_998]);
        close(&whole.get(5), 254, &[0.270_917, 0.962_603]);
        let part = image_encoding(&[[2, 3]], [3, 4], 8).get(0);
        close(&part.get(0), 0, &[1.0, 0.000_001, 0.344_063, 0.938_947, 0.866_025, 0.5, 0.232_026, 0.972_709]);
        close(&part.get(6), 0, &[-1.0, -0.000_002, 0.869_269, 0.494_339, -0.866_026, 0.499_998, 0.921_063, 0.389_413]);
        assert!(bool::try_from(part.isfinite().all()).unwrap());
        let x = Tensor::from_slice(&[0.0, 1e-4, 0.3, 0.9995, 1.0]);
        close(&logit(&x, REFINEMENT_EPS), 0, &[-6.907_755, -6.907_655, -0.847_298, 6.907_255, 6.907_755]);
        close(&logit(&x, OUTPUT_EPS), 0, &[-11.512_925, -9.210_240, -0.847_298, 7.600_402, 11.512_925]);
        let (x, delta) = (Tensor::from_slice(&[0.5, 0.9997, 0.1, 0.0004]), Tensor::from_slice(&[0.2, -0.1, 0.3, 0.0]));
        close(&(logit(&x, REFINEMENT_EPS) + &delta).sigmoid(), 0, &[0.549_834, 0.998_896, 0.130_423, 0.000_999]);
        close(&(logit(&x, OUTPUT_EPS) + &delta).sigmoid(), 0, &[0.549_834, 0.999_668, 0.130_423, 0.000_400]);
    }
}
