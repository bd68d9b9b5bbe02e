//! The cheapest assignment of rows to columns.

use std::{cmp::Ordering, mem};

/// The cost of pairs, row-major.
pub(super) struct Costs {
    pub(super) n_rows: usize,
    pub(super) n_columns: usize,
    pub(super) values: Vec<f64>,
}

impl Costs {
    fn transposed(&self) -> Self {
        let values = (0..self.n_columns).flat_map(|column| self.values.iter().skip(column).step_by(self.n_columns).copied()).collect();
        Self { n_rows: self.n_columns, n_columns: self.n_rows, values }
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.n_columns..][..self.n_columns]
    }
}

/// The pairs (row, column) of the cheapest assignment, by row: as many as the shorter side has. All costs must be finite.
///
/// By shortest augmenting paths (Crouse 2016, "On implementing 2D rectangular assignment algorithms"). Of assignments of the same cost it
/// finds the one that scipy's `linear_sum_assignment` finds: the longer side are columns, the last column is looked at first, a column that
/// is free wins, and of several the first that was looked at.
pub(super) fn assign(costs: &Costs) -> Vec<(usize, usize)> {
    if costs.n_columns < costs.n_rows {
        let mut pairs: Vec<_> = columns_of_rows(&costs.transposed()).into_iter().enumerate().map(|(column, row)| (row, column)).collect();
        pairs.sort_unstable();
        return pairs;
    }
    columns_of_rows(costs).into_iter().enumerate().collect()
}

/// The column of each row; there are at least as many columns.
fn columns_of_rows(costs: &Costs) -> Vec<usize> {
    let (n_rows, n_columns) = (costs.n_rows, costs.n_columns);
    let (mut of_rows, mut of_columns) = (vec![0.0; n_rows], vec![0.0; n_columns]);
    let mut column_of = vec![usize::MAX; n_rows];
    let mut row_of: Vec<Option<usize>> = vec![None; n_columns];
    for start in 0..n_rows {
        let mut remaining: Vec<usize> = (0..n_columns).rev().collect();
        let mut shortest = vec![f64::INFINITY; n_columns];
        let mut before = vec![usize::MAX; n_columns];
        // The rows and columns of the tree of paths.
        let (mut rows, mut columns) = (vec![], vec![]);
        let (mut row, mut length) = (start, 0.0);
        let sink = loop {
            rows.push(row);
            let row_costs = costs.row(row);
            let (mut lowest, mut place) = (f64::INFINITY, usize::MAX);
            for (index, &column) in remaining.iter().enumerate() {
                let through = length + row_costs[column] - of_rows[row] - of_columns[column];
                if through < shortest[column] {
                    (shortest[column], before[column]) = (through, row);
                }
                let is_better = match shortest[column].partial_cmp(&lowest) {
                    Some(Ordering::Equal) => row_of[column].is_none(),
                    order => order == Some(Ordering::Less),
                };
                if is_better {
                    (lowest, place) = (shortest[column], index);
                }
            }
            length = lowest;
            let column = remaining.swap_remove(place);
            columns.push(column);
            match row_of[column] {
                Some(next) => row = next,
                None => break column,
            }
        };
        of_rows[start] += length;
        for &row in &rows[1..] {
            of_rows[row] += length - shortest[column_of[row]];
        }
        for &column in &columns {
            of_columns[column] -= length - shortest[column];
        }
        let mut column = sink;
        loop {
            let row = before[column];
            row_of[column] = Some(row);
            mem::swap(&mut column_of[row], &mut column);
            if row == start {
                break;
            }
        }
    }
    column_of
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(n_rows: usize, values: &[f64], expected: &[(usize, usize)]) {
        let costs = Costs { n_rows, n_columns: values.len() / n_rows, values: values.to_vec() };
        assert_eq!(assign(&costs), expected);
    }

    #[test]
    fn the_cheapest_pairs_are_found() {
        check(3, &[4., 1., 3., 2., 0., 5., 3., 2., 2.], &[(0, 1), (1, 0), (2, 2)]);
        check(1, &[3., -1., 2.], &[(0, 1)]);
        check(3, &[3., -1., 2.], &[(1, 0)]);
        check(2, &[1., 2., 9., 1., 9., 9.], &[(0, 1), (1, 0)]);
    }

    /// Answers of scipy 1.17.
    #[test]
    fn ties_are_settled_as_scipy_does() {
        check(2, &[1., 1., 1., 1.], &[(0, 0), (1, 1)]);
        check(2, &[7., 7., 7., 7., 7., 7.], &[(0, 0), (1, 1)]);
        check(3, &[7., 7., 7., 7., 7., 7.], &[(0, 0), (1, 1)]);
        check(2, &[1., 1., 5., 1., 1., 5.], &[(0, 0), (1, 1)]);
        check(3, &[0., 99., 0., 99., 99., 99.], &[(0, 0), (1, 1)]);
        check(3, &[2., 2., 0., 2., 1., 1., 1., 0., 2., 0., 0., 1.], &[(0, 2), (1, 3), (2, 1)]);
        check(5, &[1., 1., 0., 0., 0., 0., 0., 2., 0., 1., 2., 0., 0., 1., 0.], &[(0, 2), (1, 1), (2, 0)]);
        check(4, &[2., 0., 2., 2., 2., 0., 1., 1., 1., 1., 2., 1., 0., 2., 1., 2.], &[(0, 1), (1, 2), (2, 3), (3, 0)]);
        check(6, &[0., 1., 2., 0., 0., 1., 2., 0., 2., 1., 0., 1., 2., 2., 2., 0., 0., 2.], &[(0, 0), (1, 1), (3, 2)]);
        let tall = "220011120100200000211022000021101202002202211222102012002022211201110022121020001022";
        let tall: Vec<f64> = tall.bytes().map(|digit| f64::from(digit - b'0')).collect();
        check(12, &tall, &[(0, 2), (1, 1), (2, 0), (3, 3), (4, 6), (5, 5), (11, 4)]);
    }

    #[test]
    fn without_rows_or_columns_there_are_no_pairs() {
        for (n_rows, n_columns) in [(0, 0), (0, 3), (3, 0)] {
            assert!(assign(&Costs { n_rows, n_columns, values: vec![] }).is_empty());
        }
    }
}
