//! Exact search: of many rows, those with the largest products with each query.
//!
//! It knows tensors and slices; where rows come from, and what a row stands for, its callers know.
//!
//! # What is exact
//!
//! The score of a row x for a query q is a sum in f64, in one order ([`dot`]) on every machine: `q . x`, under [`Measure::Cosine`] over the
//! length of x; then it is rounded to f32. Products of two f32 are exact in f64, so it does not matter whether a processor fuses them with
//! the addition. Hits are the rows of the largest scores; of equal scores, the lower place goes first. Nothing else decides: not the device,
//! the threads, the size of blocks, the kind of the fast product, nor how rows are split among calls or in which order they come.
//!
//! # What is fast
//!
//! A matrix product of all queries with a block of rows, in f32 or bf16, only tells between which bounds the exact scores lie. A row is a candidate
//! while its upper bound is not below the N-th largest lower one. After some thousands of rows hardly one in a thousand becomes one, and most give way to
//! better ones before the call ends, which is when the rest get exact scores. Accelerators compare where they multiplied, and only what passes
//! crosses the bus.
//!
//! # The bound
//!
//! Let `y` be x, or x over its length; `q'` and `y'` what the product gets of q and y; all lengths Euclidean. Then
//!
//! ```text
//! |q'.y' - q.y| <= |q' - q| |y'| + |q| |y' - y|                  (1)   Cauchy and Schwarz
//! |fast - q'.y'| <= g |q'| |y'|,  g = n e / (1 - n e)            (2)   Higham 2002, section 3.1
//! |exact - q.y| <= 2^-22 |q| |y|                                 (3)   f64 sums, one rounding to f32
//! ```
//!
//! (1) `|q' - q|` is computed for each query, and what rounding to bf16 changes of `y` for each row, of which the largest of the block counts.
//! Under cosine a length is a sum of D squares in f32, hence (D + 8) 2^-23 |y| more. Accelerators may round f32 factors to TF32, or cut them: 2^-10
//! more of both sides.
//! (2) holds for any order of the additions. Products of bf16 are exact in f32, and sums are f32 on every device that is used here (in bf16
//! an accelerator gets the rows, but multiplies in f32). e = 2^-23 allows for additions that cut instead of rounding, and n = 2 D + 16 for sums in
//! parts. The result of the bf16 product on a CPU is rounded to the nearest bf16. Rounding keeps order, and keeps what bf16 holds: if a score was at least a
//! bf16 number, it still is. So the threshold is rounded down to bf16, and (2) stays as it is.
//! (4) Processors may take numbers below 2^-126 for zero: D 2^-125 (|q| + |y| + 2).
//!
//! |y| is the largest of the block. Where |q| |y| exceeds 2^120, or n e 1/2, there is no bound, and every row gets an exact score.

mod candidates;
mod kernels;
#[cfg(test)]
mod tests;

use std::{
    mem,
    ops::AddAssign,
    panic,
    sync::{Barrier, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use candidates::{Candidate, Candidates, Passed, Query, Ranked, floor};
use half::{bf16, f16};
use kernels::{Buffers, Number, Space, dot, fast_square, widen};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    Error, Result,
    detection::boxes::{floats, integers},
    error::ensure,
};

/// Rows of a block.
const BLOCK_ROWS: usize = 8192;
/// A block has fewer rows if its scores would be more than these.
const BLOCK_SCORES: usize = 1024 * 1203;
/// A block has fewer rows if their numbers would be more than these.
const BLOCK_NUMBERS: usize = 1 << 21;
/// Candidates for each hit that a query keeps, before those are left out that others have overtaken.
const CANDIDATES_PER_HIT: usize = 4;
/// Candidates get exact scores in groups of so many.
const SETTLED_AT_ONCE: usize = 1 << 20;
/// Rows of the first block on an accelerator: without a threshold, all of them get exact scores. Each later block is as large as all before it.
const FIRST_ROWS: usize = 256;
/// Work on fewer numbers is not worth a thread.
const NUMBERS_PER_THREAD: usize = 1 << 18;
/// Squared f32 lengths from this on have lost nothing to underflow that matters.
const LEAST_SQUARE: f32 = 1e-18;

/// Rows to search, row-major `[n, D]`.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// As features are stored.
    F16(&'a [f16]),
    /// As networks compute them.
    F32(&'a [f32]),
}

/// The score of a row for a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The inner product with the row over its length. Queries are used as given: of unit length, they make it the cosine.
    Cosine,
    /// The inner product.
    InnerProduct,
}

/// The kind of number in which the fast product multiplies. It decides how long a search takes, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// f32, on an accelerator also TF32.
    F32,
    /// bf16, summed in f32.
    Bf16,
}

impl Product {
    /// The faster one; `has_bf16`: the device multiplies bf16 faster than f32.
    ///
    /// Accelerators get rows as bf16 if they can, which halves what crosses the bus.
    pub fn fastest(has_bf16: bool) -> Self {
        if has_bf16 { Self::Bf16 } else { Self::F32 }
    }
}

/// A row among the best of a query.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hit {
    /// The row's place among all rows: the first place of its call, plus its index there.
    pub place: u64,
    /// The exact score, finite: what f32 cannot hold is the largest number it can.
    pub score: f32,
}

/// How many candidates were no vectors with a direction. They are never hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BadRows {
    /// Rows of zeros, under either measure: no network embeds anything as zero, so such a row is a failure upstream.
    pub zero: u64,
    /// Rows with a NaN.
    pub nan: u64,
    /// Other rows with an infinite number.
    pub infinite: u64,
}

impl AddAssign for BadRows {
    fn add_assign(&mut self, Self { zero, nan, infinite }: Self) {
        self.zero += zero;
        self.nan += nan;
        self.infinite += infinite;
    }
}

/// All that a search has found, enough to go on from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// For each query, the hits so far, best first; of equal scores the lower place first.
    pub hits: Vec<Vec<Hit>>,
    /// The candidates so far that were no vectors.
    pub bad_rows: BadRows,
}

/// Where the threads of a search spent their time, summed; for reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Reading rows, converting and normalising them.
    pub preparing: Duration,
    /// The fast product. Accelerators compute while other work goes on; waiting for them counts as selection.
    pub multiplying: Duration,
    /// Comparing fast scores with thresholds, and exact scores.
    pub selecting: Duration,
}

impl AddAssign for Spent {
    fn add_assign(&mut self, Self { preparing, multiplying, selecting }: Self) {
        self.preparing += preparing;
        self.multiplying += multiplying;
        self.selecting += selecting;
    }
}

/// A search in progress: the queries and the best rows so far.
#[derive(Debug)]
pub struct Search {
    queries: Queries,
    /// The queries for the fast product, `[Q, D]`.
    factor: Tensor,
    product: Product,
    /// Of each thread that was needed so far.
    spaces: Vec<Space>,
    /// Rows of a block at most.
    block_rows: usize,
    bad_rows: BadRows,
    /// Rows that were in a block so far.
    n_searched: usize,
    spent: Spent,
}

impl Search {
    /// A search that has seen no rows.
    ///
    /// `queries`: finite f32 `[Q, D]`, at least one; `limits`: for each query the most hits that it keeps, at least 1. The work space is at most
    /// 16 MiB a thread, unless Q or D is above 1,000,000, and does not grow with the rows; a hit takes 16 bytes, and at most 144
    /// during a call.
    pub fn new(queries: &Tensor, limits: &[usize], measure: Measure, product: Product, device: Device) -> Result<Self> {
        let is_matrix = matches!(queries.size()[..], [n, d] if n > 0 && d > 0) && queries.kind() == Kind::Float;
        ensure(is_matrix, "queries", "f32 [Q, D], Q and D at least 1", queries)?;
        let (n_queries, dimension) = (queries.size()[0] as usize, queries.size()[1] as usize);
        let values = floats(queries);
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("{} in query {}", values[place], place / dimension);
            return Err(Error::Input { what: "queries", expected: "finite numbers".into(), found });
        }
        if limits.len() != n_queries {
            let found = limits.len().to_string();
            return Err(Error::Input { what: "limits of hits", expected: format!("{n_queries}, one for each query"), found });
        }
        if let Some(place) = limits.iter().position(|&limit| limit == 0) {
            let found = format!("0 for query {place}");
            return Err(Error::Input { what: "limits of hits", expected: "at least 1".into(), found });
        }
        let selection = if device == Device::Cpu { Selection::Host } else { Selection::Device };
        let most_rows = (BLOCK_SCORES / n_queries).min(BLOCK_NUMBERS / dimension);
        let block_rows = BLOCK_ROWS.min(most_rows).max(1);
        let (queries, factor) = Queries::new(values, limits, measure, product, selection);
        Ok(Self {
            queries,
            factor: factor.to_device(device),
            product,
            spaces: Vec::new(),
            block_rows,
            bad_rows: BadRows::default(),
            n_searched: 0,
            spent: Spent::default(),
        })
    }

    /// Goes on from what an earlier search with the same arguments found in other rows.
    pub fn resume(mut self, found: Found) -> Result<Self> {
        let misfit = |expected: String, found: String| Err(Error::Input { what: "hits to go on from", expected, found });
        let n_queries = self.queries.all.len();
        if found.hits.len() != n_queries {
            return misfit(format!("hits of {n_queries} queries"), found.hits.len().to_string());
        }
        for (place, (query, hits)) in self.queries.all.iter_mut().zip(found.hits).enumerate() {
            if hits.len() > query.limit {
                return misfit(format!("at most {} hits of query {place}", query.limit), hits.len().to_string());
            }
            let in_order = hits.windows(2).all(|pair| Ranked(pair[0]) < Ranked(pair[1]));
            if !in_order || hits.iter().any(|hit| !hit.score.is_finite()) {
                return misfit(format!("hits of query {place} with finite scores, best first"), "others".into());
            }
            query.best = Mutex::new(hits.into_iter().map(Ranked).collect());
        }
        self.bad_rows = found.bad_rows;
        Ok(self)
    }

    /// Searches more rows, each once; their order does not matter, nor how they are split among calls. After an error a search is of no more use.
    ///
    /// `rows`: `[n, D]`; `first_place`: the place of the first, others follow it; `candidates`: for each row, whether it is searched, or all are.
    pub fn add(&mut self, rows: Rows<'_>, first_place: u64, candidates: Option<&[bool]>) -> Result<()> {
        let n_rows = self.check(rows, first_place, candidates)?;
        let indices = Mutex::new((0..n_rows).filter(|&row| candidates.is_none_or(|candidates| candidates[row])));
        let (queries, block_rows, n_before) = (&self.queries, self.block_rows, self.n_searched);
        let none = |query: &Query| Mutex::new(Candidates { all: Vec::new(), least: query.least() });
        let call = Call { rows, first_place, candidates: queries.all.iter().map(none).collect() };
        let n_threads = match queries.selection {
            Selection::Host => queries.n_pieces(n_rows * queries.dimension).min(n_rows.div_ceil(block_rows)).max(1),
            Selection::Device => 1,
        };
        while self.spaces.len() < n_threads {
            self.spaces.push(Space::new(self.product, queries.all.len(), queries.dimension, block_rows));
        }
        let work = |(space, factor): (&mut Space, Tensor)| -> Result<(BadRows, Spent, usize)> {
            let (mut bad_rows, mut spent, mut n_searched) = (BadRows::default(), Spent::default(), 0);
            loop {
                let most = match queries.selection {
                    Selection::Host => block_rows,
                    Selection::Device => (n_before + n_searched).max(FIRST_ROWS).min(block_rows),
                };
                let indices: Vec<usize> = locked(&indices).by_ref().take(most).collect();
                if indices.is_empty() {
                    return Ok((bad_rows, spent, n_searched));
                }
                n_searched += indices.len();
                let block = Block { call: &call, indices };
                bad_rows += match space {
                    Space::F32(buffers) => queries.search(&factor, &block, buffers, &mut spent)?,
                    Space::Bf16(buffers) => queries.search(&factor, &block, buffers, &mut spent)?,
                };
            }
        };
        let threads = self.spaces.iter_mut().take(n_threads).map(|space| (space, self.factor.shallow_clone())).collect();
        for done in at_once(threads, work) {
            let (bad_rows, spent, n_searched) = done?;
            self.bad_rows += bad_rows;
            self.spent += spent;
            self.n_searched += n_searched;
        }
        self.spent.selecting += self.queries.settle(&call);
        Ok(())
    }

    fn check(&self, rows: Rows<'_>, first_place: u64, candidates: Option<&[bool]>) -> Result<usize> {
        let (n_numbers, dimension) = (rows.n_numbers(), self.queries.dimension);
        if !n_numbers.is_multiple_of(dimension) {
            let found = format!("{n_numbers} numbers");
            return Err(Error::Input { what: "rows to search", expected: format!("rows of {dimension} numbers"), found });
        }
        let n_rows = n_numbers / dimension;
        if let Some(candidates) = candidates
            && candidates.len() != n_rows
        {
            let found = candidates.len().to_string();
            return Err(Error::Input { what: "candidates", expected: format!("{n_rows}, one for each row"), found });
        }
        if first_place.checked_add(n_rows as u64).is_none() {
            let expected = "places below 2^64".into();
            return Err(Error::Input { what: "rows to search", expected, found: format!("{n_rows} rows from {first_place} on") });
        }
        Ok(n_rows)
    }

    /// For each query, its hits so far: at most its limit, best first; of equal scores the lower place first.
    pub fn hits(&self) -> Vec<Vec<Hit>> {
        let sorted = |query: &Query| locked(&query.best).clone().into_sorted_vec().into_iter().map(|Ranked(hit)| hit).collect();
        self.queries.all.iter().map(sorted).collect()
    }

    /// How many candidates so far were no vectors.
    pub fn bad_rows(&self) -> BadRows {
        self.bad_rows
    }

    /// All that was found so far; [`Search::resume`] goes on from it.
    pub fn found(&self) -> Found {
        Found { hits: self.hits(), bad_rows: self.bad_rows }
    }

    /// Where the time was spent.
    pub fn spent(&self) -> Spent {
        self.spent
    }
}

#[cfg(test)]
impl Search {
    /// Makes blocks of this many rows.
    fn n_rows_per_block(&mut self, n_rows: usize) {
        self.block_rows = n_rows;
    }

    /// Takes the CPU for an accelerator.
    fn select_on_device(&mut self) {
        self.queries.selection = Selection::Device;
        self.factor = self.factor.to_kind(Kind::Float);
    }
}

/// What a call searches, and what it has found.
struct Call<'a> {
    rows: Rows<'a>,
    first_place: u64,
    /// Of each query.
    candidates: Vec<Mutex<Candidates>>,
}

/// Some of the rows of a call.
struct Block<'a> {
    call: &'a Call<'a>,
    /// Of the rows of the call; slot i of a block is row `indices[i]`.
    indices: Vec<usize>,
}

impl Rows<'_> {
    fn n_numbers(&self) -> usize {
        match self {
            Self::F16(numbers) => numbers.len(),
            Self::F32(numbers) => numbers.len(),
        }
    }

    /// One row as f32; `scratch`: `[D]`.
    fn row<'s>(&'s self, index: usize, scratch: &'s mut [f32]) -> &'s [f32] {
        let range = index * scratch.len()..(index + 1) * scratch.len();
        match self {
            Self::F16(numbers) => {
                widen(&numbers[range], scratch);
                scratch
            }
            Self::F32(numbers) => &numbers[range],
        }
    }
}

/// Where fast scores are compared with floors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Selection {
    /// In memory.
    Host,
    /// On the device, so that only what passes crosses the bus.
    Device,
}

/// All queries of a search.
#[derive(Debug)]
struct Queries {
    measure: Measure,
    selection: Selection,
    dimension: usize,
    /// `[Q, D]`, for exact scores.
    values: Vec<f32>,
    all: Vec<Query>,
    n_threads: usize,
    /// Work on fewer numbers is not worth a thread.
    numbers_per_thread: usize,
    /// What normalising changes of y, of |y|.
    normalising_error: f64,
    /// What an accelerator changes of a factor, of its length.
    tf32_error: f64,
    /// `g` of the bound, infinite if there is none.
    sum_error: f64,
}

impl Queries {
    fn new(values: Vec<f32>, limits: &[usize], measure: Measure, product: Product, selection: Selection) -> (Self, Tensor) {
        let dimension = values.len() / limits.len();
        let d = dimension as f64;
        let tf32_error = if selection == Selection::Device { 2_f64.powi(-10) } else { 0.0 };
        let normalising_error = match measure {
            Measure::Cosine => (d + 8.0) * 2_f64.powi(-23),
            Measure::InnerProduct => 0.0,
        };
        let rounded: Vec<f32> = match product {
            Product::F32 => values.clone(),
            Product::Bf16 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        };
        let query = |((row, rounded), &limit): ((&[f32], &[f32]), &usize)| {
            let difference = row.iter().zip(rounded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
            let factor_length = up(dot(rounded, rounded).sqrt());
            let factor_error = up(difference) + tf32_error * factor_length;
            Query { limit, best: Mutex::default(), length: up(dot(row, row).sqrt()), factor_length, factor_error }
        };
        let all = values.chunks(dimension).zip(rounded.chunks(dimension)).zip(limits).map(query).collect();
        let kind = match (product, selection) {
            (Product::Bf16, Selection::Host) => Kind::BFloat16,
            (Product::F32, _) | (Product::Bf16, Selection::Device) => Kind::Float,
        };
        let factor = Tensor::from_slice(&rounded).view([-1, dimension as i64]).to_kind(kind);
        let n_errors = (2.0 * d + 16.0) * 2_f64.powi(-23);
        let queries = Self {
            measure,
            selection,
            dimension,
            values,
            all,
            n_threads: usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1),
            numbers_per_thread: NUMBERS_PER_THREAD,
            normalising_error,
            tf32_error,
            sum_error: if n_errors < 0.5 { n_errors / (1.0 - n_errors) } else { f64::INFINITY },
        };
        (queries, factor)
    }

    /// What the fast score of a row of a block may differ from the exact one by; infinite if there is no bound.
    fn slack(&self, query: &Query, &Prepared { longest: length, rounding, .. }: &Prepared) -> f64 {
        let d = self.dimension as f64;
        let row_error =
            up(rounding + self.normalising_error * length + self.tf32_error * (rounding + (1.0 + self.normalising_error) * length));
        let factor_length = length + row_error;
        let most = (query.length * length).max(query.length).max(length).max(query.factor_length * factor_length);
        if most.is_nan() || most > 2_f64.powi(120) {
            return f64::INFINITY;
        }
        let of_factors = query.factor_error * factor_length + query.length * row_error;
        let of_sums = self.sum_error * query.factor_length * factor_length;
        let of_exact = 2_f64.powi(-22) * query.length * length;
        let of_underflow = d * 2_f64.powi(-125) * (query.length + length + 2.0);
        up(of_factors + of_sums + of_exact + of_underflow)
    }

    fn search<T: Number>(&self, factor: &Tensor, block: &Block<'_>, buffers: &mut Buffers<T>, spent: &mut Spent) -> Result<BadRows> {
        let clock = Instant::now();
        let prepared = match self.selection {
            Selection::Host => self.prepare(block, buffers, 1),
            Selection::Device => self.prepare(block, buffers, self.n_pieces(block.indices.len() * self.dimension)),
        };
        let prepared_at = clock.elapsed();
        spent.preparing += prepared_at;
        let n_slots = block.indices.len() as i64;
        let rows = buffers.rows.view([n_slots, self.dimension as i64]);
        let multiplied_at = match self.selection {
            Selection::Host => {
                drop(factor.f_mm_out(&buffers.scores.view([self.all.len() as i64, n_slots]), &rows.tr())?);
                let multiplied_at = clock.elapsed();
                self.select(block, &prepared, buffers.scores.numbers(self.all.len() * block.indices.len()));
                multiplied_at
            }
            Selection::Device => {
                let rows = rows.f_to_device(factor.device())?.f_to_kind(Kind::Float)?;
                let scores = factor.f_mm(&rows.tr())?;
                let multiplied_at = clock.elapsed();
                self.select_on_device(block, &prepared, &scores)?;
                multiplied_at
            }
        };
        spent.multiplying += multiplied_at - prepared_at;
        spent.selecting += clock.elapsed() - multiplied_at;
        Ok(prepared.bad_rows)
    }

    /// Writes the rows of a block as the product takes them. Rows that are no vectors become zeros.
    fn prepare<T: Number>(&self, block: &Block<'_>, buffers: &mut Buffers<T>, n_pieces: usize) -> Prepared {
        let (d, measure) = (self.dimension, self.measure);
        let n_slots = block.indices.len();
        let per_piece = n_slots.div_ceil(n_pieces);
        let slots = buffers.rows.numbers(n_slots * d).chunks_mut(per_piece * d);
        let pieces = block.indices.chunks(per_piece).zip(slots).collect();
        let prepare = |(indices, slots): (&[usize], &mut [T])| {
            let mut prepared = Prepared { is_vector: Vec::with_capacity(indices.len()), ..Prepared::default() };
            let mut scratch = vec![0.0; d];
            for (&index, slot) in indices.iter().zip(slots.chunks_exact_mut(d)) {
                prepared.add(block.call.rows.row(index, &mut scratch), measure, slot);
            }
            prepared
        };
        let mut all = Prepared::default();
        for piece in at_once(pieces, prepare) {
            all.is_vector.extend(piece.is_vector);
            all.longest = all.longest.max(piece.longest);
            all.rounding = all.rounding.max(piece.rounding);
            all.bad_rows += piece.bad_rows;
        }
        // Sums of D squares in f32, in which squares below 2^-126 are lost.
        let sum_error = 1.0 + (d as f64 + 8.0) * 2_f64.powi(-23);
        all.longest = up(all.longest * sum_error);
        all.rounding = up(all.rounding * sum_error + (d as f64).sqrt() * 2_f64.powi(-63)).min(T::ROUNDING * all.longest);
        all
    }

    /// Makes candidates of the rows of a block whose fast scores, `[Q, slots]`, are not below what N others have.
    fn select<T: Number>(&self, block: &Block<'_>, prepared: &Prepared, scores: &[T]) {
        let n_slots = block.indices.len();
        for (place, (query, scores)) in self.all.iter().zip(scores.chunks_exact(n_slots)).enumerate() {
            let slack = self.slack(query, prepared);
            let most = query.limit.saturating_mul(CANDIDATES_PER_HIT);
            let mut candidates = locked(&block.call.candidates[place]);
            let (mut from, mut lowest) = (0, T::floor(floor(candidates.least, slack)));
            while let Some(skipped) = T::first_not_below(lowest, &scores[from..]) {
                let slot = from + skipped;
                from = slot + 1;
                if !prepared.is_vector[slot] {
                    continue;
                }
                candidates.all.push(Candidate::new(block.indices[slot], scores[slot], slack));
                if candidates.all.len() < most {
                    continue;
                }
                candidates.prune(query.limit);
                // Rows so alike that bounds cannot tell them apart.
                if candidates.all.len() > most - query.limit {
                    let alike = mem::take(&mut candidates.all);
                    drop(candidates);
                    let mut passed: Vec<Passed> = alike.into_iter().map(|candidate| Passed { candidate, query: place }).collect();
                    passed.sort_unstable_by_key(|passed| passed.candidate.row);
                    self.score(block.call, &passed);
                    candidates = locked(&block.call.candidates[place]);
                    candidates.least = candidates.least.max(query.least());
                }
                lowest = T::floor(floor(candidates.least, slack));
            }
        }
    }

    /// The same, where the scores are on a device: floors go there, and what is not below them comes back and gets exact scores.
    fn select_on_device(&self, block: &Block<'_>, prepared: &Prepared, scores: &Tensor) -> Result<()> {
        let floors: Vec<f32> = self.all.iter().map(|query| floor(query.least(), self.slack(query, prepared))).collect();
        let floors = Tensor::from_slice(&floors).f_to_device(scores.device())?.view([-1, 1]);
        // Not "at least": a NaN has to pass. [passed, 2]: query and slot.
        let passed = integers(&scores.f_lt_tensor(&floors)?.f_logical_not()?.f_nonzero()?);
        let (passed, _) = passed.as_chunks::<2>();
        let of_vectors = passed.iter().filter(|[_, slot]| prepared.is_vector[*slot as usize]);
        let passed = of_vectors.map(|[query, slot]| {
            let candidate = Candidate { row: block.indices[*slot as usize], least: f32::NEG_INFINITY, most: f32::INFINITY };
            Passed { candidate, query: *query as usize }
        });
        self.score_at_once(block.call, passed.collect());
        Ok(())
    }

    /// Gives exact scores to the candidates that are left; returns the time that the threads spent on it.
    fn settle(&self, call: &Call<'_>) -> Duration {
        let (mut clock, mut spent, mut passed) = (Instant::now(), Duration::ZERO, Vec::new());
        for (place, (query, candidates)) in self.all.iter().zip(&call.candidates).enumerate() {
            let mut candidates = locked(candidates);
            candidates.prune(query.limit);
            passed.extend(mem::take(&mut candidates.all).into_iter().map(|candidate| Passed { candidate, query: place }));
            if passed.len() >= SETTLED_AT_ONCE || place + 1 == self.all.len() {
                spent += clock.elapsed() + self.score_at_once(call, mem::take(&mut passed));
                clock = Instant::now();
            }
        }
        spent
    }

    /// [`Queries::score`] in several threads; returns the time that they spent.
    fn score_at_once(&self, call: &Call<'_>, mut passed: Vec<Passed>) -> Duration {
        let clock = Instant::now();
        passed.sort_unstable_by_key(|passed| passed.candidate.row);
        let sorted = clock.elapsed();
        let per_piece = passed.len().div_ceil(self.n_pieces(passed.len() * self.dimension)).max(1);
        let score = |passed: &[Passed]| {
            let clock = Instant::now();
            self.score(call, passed);
            clock.elapsed()
        };
        sorted + at_once(passed.chunks(per_piece).collect(), score).into_iter().sum::<Duration>()
    }

    /// Offers rows with their exact scores to queries, unless they are below what these have by then.
    ///
    /// In the order of rows: a row may be far from a processor's caches, queries are not.
    fn score(&self, call: &Call<'_>, passed: &[Passed]) {
        let d = self.dimension;
        let mut scratch = vec![0.0; d];
        for of_row in passed.chunk_by(|a, b| a.candidate.row == b.candidate.row) {
            let index = of_row[0].candidate.row;
            let row = call.rows.row(index, &mut scratch);
            let divisor = match self.measure {
                Measure::Cosine => dot(row, row).sqrt(),
                Measure::InnerProduct => 1.0,
            };
            for Passed { candidate, query: place } in of_row {
                let query = &self.all[*place];
                if candidate.most >= query.least() {
                    let score = dot(&self.values[place * d..][..d], row) / divisor;
                    // The sum makes -0 to 0, which are otherwise two scores.
                    let score = (score as f32).clamp(f32::MIN, f32::MAX) + 0.0;
                    query.offer(Hit { place: call.first_place + index as u64, score });
                }
            }
        }
    }

    fn n_pieces(&self, n_numbers: usize) -> usize {
        (n_numbers / self.numbers_per_thread).clamp(1, self.n_threads)
    }
}

/// What is known of the rows of a block once they are prepared.
#[derive(Default)]
struct Prepared {
    /// For each slot, whether its row can be a hit.
    is_vector: Vec<bool>,
    /// The largest |y|.
    longest: f64,
    /// The most that rounding has changed of a y.
    rounding: f64,
    bad_rows: BadRows,
}

impl Prepared {
    /// Writes a row into its slot.
    fn add<T: Number>(&mut self, row: &[f32], measure: Measure, slot: &mut [T]) {
        let square = fast_square(row);
        if square.is_finite() && square >= LEAST_SQUARE {
            let length = square.sqrt();
            let (factor, length) = match measure {
                Measure::Cosine => (1.0 / length, 1.0),
                Measure::InnerProduct => (1.0, f64::from(length)),
            };
            self.round(row, factor, slot);
            self.longest = self.longest.max(length);
            self.is_vector.push(true);
            return;
        }
        // Bad, or so long or short that f32 does not hold the square.
        let length = dot(row, row).sqrt();
        if length.is_finite() && length > 0.0 {
            let (divisor, length) = match measure {
                Measure::Cosine => (length, 1.0),
                Measure::InnerProduct => (1.0, length),
            };
            let row: Vec<f32> = row.iter().map(|&value| (f64::from(value) / divisor) as f32).collect();
            self.round(&row, 1.0, slot);
            self.longest = self.longest.max(length);
            self.is_vector.push(true);
            return;
        }
        slot.fill(T::ZERO);
        self.is_vector.push(false);
        match () {
            () if row.iter().any(|value| value.is_nan()) => self.bad_rows.nan += 1,
            () if row.iter().any(|value| value.is_infinite()) => self.bad_rows.infinite += 1,
            () => self.bad_rows.zero += 1,
        }
    }

    fn round<T: Number>(&mut self, row: &[f32], factor: f32, slot: &mut [T]) {
        self.rounding = self.rounding.max(f64::from(T::scale(row, factor, slot)).sqrt());
    }
}

/// Rounds a bound up, by more than a few operations in f64 round.
fn up(bound: f64) -> f64 {
    bound * (1.0 + 1e-12)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does all pieces of work at the same time; results are in the order of the pieces. A single piece is done in the caller's thread, others in threads of their
/// own, in each of which libtorch computes in one thread: its own threads would spin on these cores while they wait.
fn at_once<T: Send, R: Send>(mut pieces: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if pieces.len() < 2 {
        return pieces.pop().map(work).into_iter().collect();
    }
    let n_threads_of_caller = tch::get_num_threads();
    let are_set = Barrier::new(pieces.len() + 1);
    thread::scope(|scope| {
        let (work, are_set) = (&work, &are_set);
        let in_thread = |piece| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                are_set.wait();
                work(piece)
            })
        };
        let threads: Vec<_> = pieces.into_iter().map(in_thread).collect();
        are_set.wait();
        // What a thread sets is also where threads begin that libtorch has not seen yet.
        tch::set_num_threads(n_threads_of_caller);
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))).collect()
    })
}
