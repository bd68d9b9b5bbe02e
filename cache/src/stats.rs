//! Statistics of a shard's rows, stored in its footer: they show empty or invalid features without reading the rows.

use std::collections::BTreeMap;

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    datatypes::{DataType, Float16Type, Float32Type, UInt16Type, UInt64Type},
};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::Digest;

/// Statistics of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// Number of rows.
    pub rows: u64,
    /// BLAKE3 of the first column if its type is u64: the ids, each as 8 little-endian bytes.
    pub ids: Option<Digest>,
    /// Statistics of each column that has vectors, one or several per row.
    pub vectors: BTreeMap<String, VectorStats>,
}

/// Statistics of the vectors of a column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorStats {
    /// `f16`, `bf16` or `f32`.
    pub dtype: String,
    /// Length of a vector.
    pub dim: usize,
    /// Number of vectors.
    pub vectors: u64,
    /// Number of values that are NaN or infinite. The norms do not count their vectors.
    pub not_finite: u64,
    /// Number of vectors that are all zero.
    pub zero: u64,
    /// Least Euclidean norm; 0 without vectors.
    pub min_norm: f64,
    /// Mean Euclidean norm; 0 without vectors.
    pub mean_norm: f64,
    /// Greatest Euclidean norm; 0 without vectors.
    pub max_norm: f64,
}

/// Computes [`Stats`] batch by batch.
#[derive(Debug, Default)]
pub(crate) struct StatsBuilder {
    rows: u64,
    ids: Option<blake3::Hasher>,
    columns: BTreeMap<String, Sum>,
}

#[derive(Debug, Default)]
struct Sum {
    dtype: &'static str,
    dim: usize,
    vectors: u64,
    not_finite: u64,
    zero: u64,
    finite: u64,
    sum: f64,
    /// The least and the greatest norm.
    norms: Option<(f64, f64)>,
}

impl StatsBuilder {
    pub(crate) fn add(&mut self, batch: &RecordBatch) {
        self.rows += batch.num_rows() as u64;
        if let Some(ids) = batch.columns().first().and_then(|column| column.as_primitive_opt::<UInt64Type>()) {
            let hasher = self.ids.get_or_insert_with(blake3::Hasher::new);
            for id in ids.values() {
                hasher.update(&id.to_le_bytes());
            }
        }
        for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
            if let Some((dtype, dim, numbers)) = vectors(column) {
                let sum = self.columns.entry(field.name().clone()).or_default();
                (sum.dtype, sum.dim) = (dtype, dim);
                numbers.chunks_exact(dim.max(1)).for_each(|vector| sum.add(vector));
            }
        }
    }

    pub(crate) fn finish(self) -> Stats {
        let stats = |sum: Sum| {
            let (min_norm, max_norm) = sum.norms.unwrap_or((0.0, 0.0));
            let mean_norm = if sum.finite == 0 { 0.0 } else { sum.sum / sum.finite as f64 };
            let Sum { dtype, dim, vectors, not_finite, zero, .. } = sum;
            VectorStats { dtype: dtype.into(), dim, vectors, not_finite, zero, min_norm, mean_norm, max_norm }
        };
        let vectors = self.columns.into_iter().map(|(name, sum)| (name, stats(sum))).collect();
        Stats { rows: self.rows, ids: self.ids.map(|ids| ids.finalize().into()), vectors }
    }
}

impl Sum {
    fn add(&mut self, vector: &[f32]) {
        self.vectors += 1;
        // Eight sums in parallel; a single f64 sum is several times slower.
        let mut lanes = [0.0_f32; 8];
        let (eights, rest) = vector.as_chunks::<8>();
        for eight in eights {
            lanes.iter_mut().zip(eight).for_each(|(lane, number)| *lane += number * number);
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, number)| *lane += number * number);
        let square: f64 = lanes.iter().map(|lane| f64::from(*lane)).sum();
        if !square.is_finite() {
            self.not_finite += vector.iter().filter(|number| !number.is_finite()).count() as u64;
            return;
        }
        let norm = square.sqrt();
        self.zero += u64::from(vector.iter().all(|number| *number == 0.0));
        self.finite += 1;
        self.sum += norm;
        let (least, greatest) = self.norms.unwrap_or((norm, norm));
        self.norms = Some((least.min(norm), greatest.max(norm)));
    }
}

/// The dtype, vector length and values of a column of vectors, or of lists of vectors; `None` for other columns.
fn vectors(column: &ArrayRef) -> Option<(&'static str, usize, Vec<f32>)> {
    match column.data_type() {
        DataType::List(_) => {
            let lists = column.as_list::<i32>();
            let (first, last) = (lists.offsets().first()?, lists.offsets().last()?);
            vectors(&lists.values().slice(*first as usize, (last - first) as usize))
        }
        DataType::FixedSizeList(_, dim) => {
            let lists = column.as_fixed_size_list();
            let dim = *dim as usize;
            let values = lists.values().slice(lists.offset() * dim, lists.len() * dim);
            let (dtype, numbers) = match values.data_type() {
                DataType::Float16 => ("f16", values.as_primitive::<Float16Type>().values().iter().map(|number| number.to_f32()).collect()),
                DataType::Float32 => ("f32", values.as_primitive::<Float32Type>().values().to_vec()),
                DataType::UInt16 => {
                    let widen = |bits: &u16| bf16::from_bits(*bits).to_f32();
                    ("bf16", values.as_primitive::<UInt16Type>().values().iter().map(widen).collect())
                }
                _ => return None,
            };
            Some((dtype, dim, numbers))
        }
        _ => None,
    }
}

/// The greatest difference from 1 of an embedding's norm; rounding to bf16 changes norms.
const NORM_TOLERANCE: f64 = 0.02;

/// The problems that the statistics show, in words: values that are not finite, zero embeddings, norms other than 1.
pub(crate) fn invalid_values(stats: &Stats) -> Vec<String> {
    let mut problems = Vec::new();
    for (column, vectors) in &stats.vectors {
        if vectors.not_finite > 0 {
            problems.push(format!("`{column}`: {} numbers are not finite", vectors.not_finite));
        }
        if column == "embedding" && vectors.vectors > 0 {
            if vectors.zero > 0 {
                problems.push(format!("`embedding`: {} of {} rows are all zero", vectors.zero, vectors.vectors));
            }
            let (least, greatest) = (vectors.min_norm, vectors.max_norm);
            if least < 1.0 - NORM_TOLERANCE || greatest > 1.0 + NORM_TOLERANCE {
                problems.push(format!("`embedding`: norms from {least:.3} to {greatest:.3}, expected 1"));
            }
        }
    }
    problems
}
