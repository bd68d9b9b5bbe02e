//! Distillation from an image tower's embeddings: the losses of OADP's distillation pyramid (section 6.4).
//!
//! Embeddings are f32 `[N, D]` of unit length, of the head and of the tower, row by row of the same thing. All losses are f32 scalars, and
//! 0 where there are no rows.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::{Result, detection::layers::sum_over, error::ensure};

/// The mean absolute difference of all numbers: of objects, and of blocks.
pub fn embedding_loss(said: &Tensor, expected: &Tensor) -> Result<Tensor> {
    check(said, expected)?;
    Ok(sum_over(&(said - expected).abs(), said.numel()))
}

/// The mean squared difference of all cosines between two rows: how blocks lie to each other, and each to itself.
pub fn relation_loss(said: &Tensor, expected: &Tensor) -> Result<Tensor> {
    check(said, expected)?;
    let cosines = |rows: &Tensor| rows.matmul(&rows.tr());
    let apart = (cosines(said) - cosines(expected)).square();
    Ok(sum_over(&apart, apart.numel()))
}

/// The sum of all squared differences: of whole images. Twice as many images, twice the loss.
pub fn image_embedding_loss(said: &Tensor, expected: &Tensor) -> Result<Tensor> {
    check(said, expected)?;
    Ok((said - expected).square().sum(Kind::Float))
}

fn check(said: &Tensor, expected: &Tensor) -> Result<()> {
    let fits = said.size() == expected.size() && said.dim() == 2;
    ensure(fits, "embeddings to learn", &format!("{:?}, as the head's", said.size()), expected)
}

/// The mean of a loss over groups of images: the rows of images that are taken together. A reference that trains with a few images on each of
/// several devices takes its losses so. `n_rows`: of each image; `size`: images of a group, the last of which may be smaller.
pub fn mean_over_groups(n_rows: &[i64], size: usize, loss: impl Fn(Range<i64>) -> Result<Tensor>) -> Result<Tensor> {
    let mut first = 0;
    let of_group = |n_rows: &[i64]| {
        let rows = first..first + n_rows.iter().sum::<i64>();
        first = rows.end;
        loss(rows)
    };
    let losses = n_rows.chunks(size).map(of_group).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&losses, 0).mean(Kind::Float))
}

/// How many of the labels are among the `best` highest logits of their rows, from 0 to 1: the mean over the classes that occur, and 0 where none
/// does. `logits`, `labels`: `[N, K]`, labels 1 or 0. (Macro recall, as scikit-learn has it.)
pub fn recall(logits: &Tensor, labels: &Tensor, best: i64) -> Tensor {
    tch::no_grad(|| {
        let (_, columns) = logits.topk(best.min(logits.size()[1]), 1, true, false);
        let is_among = logits.zeros_like().scatter_value(1, &columns, 1.0);
        let n_labels = labels.sum_dim_intlist([0_i64].as_slice(), false, Kind::Float);
        let n_found = (is_among * labels).sum_dim_intlist([0_i64].as_slice(), false, Kind::Float);
        let n_classes = n_labels.gt(0.0).sum(Kind::Float);
        (n_found / n_labels.clamp_min(1.0)).sum(Kind::Float) / n_classes.clamp_min(1.0)
    })
}
