//! The best rows of a query so far, and those that may be among them.

use std::{cmp::Ordering, collections::BinaryHeap, sync::Mutex};

use super::{Hit, kernels::Number, locked};

/// A hit in the order of hits: less is better, so that the greatest of a heap is the first to give way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranked(pub(super) Hit);

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.score.total_cmp(&self.0.score).then(self.0.place.cmp(&other.0.place))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

/// One query.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) limit: usize,
    pub(super) best: Mutex<BinaryHeap<Ranked>>,
    /// |q|.
    pub(super) length: f64,
    /// |q'|.
    pub(super) factor_length: f64,
    /// |q' - q|, at most.
    pub(super) factor_error: f64,
}

impl Query {
    /// Keeps the hit if it is among the best.
    pub(super) fn offer(&self, hit: Hit) {
        let mut best = locked(&self.best);
        if best.len() < self.limit {
            best.push(Ranked(hit));
            return;
        }
        let mut worst = best.peek_mut().expect("BUG: a limit is at least 1");
        if Ranked(hit) < *worst {
            *worst = Ranked(hit);
        }
    }

    /// The N-th best exact score: rows with lower ones are no hits.
    pub(super) fn least(&self) -> f32 {
        let best = locked(&self.best);
        best.peek().filter(|_| best.len() == self.limit).map_or(f32::NEG_INFINITY, |Ranked(worst)| worst.score)
    }
}

/// The fast scores below this belong to rows whose exact scores are below `least`. Infinite where there is no such score.
pub(super) fn floor(least: f32, slack: f64) -> f32 {
    // No bound minus no bound is no number, but a floor.
    if slack.is_finite() { ((f64::from(least) - slack) as f32).next_down() } else { f32::NEG_INFINITY }
}

/// A row of a call, before its exact score is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) row: usize,
    /// The exact score, at least.
    pub(super) least: f32,
    /// The exact score, at most.
    pub(super) most: f32,
}

impl Candidate {
    /// A row with a fast score that may differ by `slack` from the exact one.
    pub(super) fn new<T: Number>(row: usize, score: T, slack: f64) -> Self {
        let [least, most] = score.bounds().map(f64::from);
        let (least, most) = ((least - slack) as f32, (most + slack) as f32);
        if least.is_finite() && most.is_finite() {
            return Self { row, least: least.next_down(), most: most.next_up() };
        }
        Self { row, least: f32::NEG_INFINITY, most: f32::INFINITY }
    }
}

/// The candidates of a query during a call.
#[derive(Debug)]
pub(super) struct Candidates {
    pub(super) all: Vec<Candidate>,
    /// There are N rows with exact scores of at least this.
    pub(super) least: f32,
}

impl Candidates {
    /// Leaves out the candidates that `limit` others have overtaken.
    pub(super) fn prune(&mut self, limit: usize) {
        if self.all.len() >= limit {
            let (_, nth, _) = self.all.select_nth_unstable_by(limit - 1, |a, b| b.least.total_cmp(&a.least));
            self.least = self.least.max(nth.least);
        }
        self.all.retain(|candidate| candidate.most >= self.least);
    }
}

/// A row that may be a hit of a query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Passed {
    pub(super) candidate: Candidate,
    /// Its place among all.
    pub(super) query: usize,
}
