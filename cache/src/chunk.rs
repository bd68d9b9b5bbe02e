//! Item lists cut into units by content, so that adding, removing or changing a few items changes a few units.
//!
//! A unit ends after an item whose digest, its first eight bytes read as a little-endian u64, is greater than those of the
//! [`WINDOW`] items before it and of the [`WINDOW`] items after it. No unit ends at an item with fewer neighbours on one side.
//! Therefore:
//! - Whether a unit ends at an item depends only on its neighbours, not on where the list begins: after k items are inserted,
//!   deleted or changed, at most 2k + 1 units are new (moving an item counts as deleting and inserting it).
//! - Units have `2 * WINDOW + 1` = 1,025 items on average, and at least [`MIN`] unless there is only one unit.
//! - More than [`MAX`] items without an end (one unit in thousands, or equal digests) are cut after the item with the greatest
//!   digest that leaves [`MIN`] items on both sides; repeated until no unit is longer.
//!
//! These numbers are part of the identity of every unit: a test pins them, and they never change.

use std::{collections::VecDeque, ops::Range};

use crate::recipe::Digest;

/// The number of neighbours on each side that an item must exceed for a unit to end after it.
const WINDOW: usize = 512;
/// The least number of items in a unit, unless it is the only one.
pub const MIN: usize = WINDOW;
/// The greatest number of items in a unit.
pub const MAX: usize = 4096;

/// Cuts a list of item digests into consecutive index ranges that cover it, one per unit; none for an empty list.
pub fn cut(items: &[Digest]) -> Vec<Range<usize>> {
    let heads: Vec<u64> = items.iter().map(head).collect();
    let mut units = Vec::new();
    let mut start = 0;
    for end in peaks(&heads).into_iter().map(|peak| peak + 1).chain((!items.is_empty()).then_some(items.len())) {
        divide(&heads, start..end, &mut units);
        start = end;
    }
    units
}

fn head(item: &Digest) -> u64 {
    u64::from_le_bytes(*item.as_bytes().first_chunk::<8>().expect("BUG: a digest has 32 bytes"))
}

/// The indices of the items that exceed all [`WINDOW`] neighbours on each side, ascending.
fn peaks(heads: &[u64]) -> Vec<usize> {
    const SPAN: usize = 2 * WINDOW + 1;
    let mut peaks = Vec::new();
    // Indices within the last SPAN items, with descending heads; equal heads in their order in the list.
    let mut falling: VecDeque<usize> = VecDeque::new();
    for (place, head) in heads.iter().enumerate() {
        while falling.back().is_some_and(|last| heads[*last] < *head) {
            falling.pop_back();
        }
        falling.push_back(place);
        if falling[0] + SPAN <= place {
            falling.pop_front();
        }
        let is_peak = place + 1 >= SPAN && falling[0] + WINDOW == place;
        // Two equal heads in the span: neither exceeds the other.
        if is_peak && falling.get(1).is_none_or(|second| heads[*second] < heads[falling[0]]) {
            peaks.push(falling[0]);
        }
    }
    peaks
}

/// Appends a range, cut into parts of at most [`MAX`] items.
fn divide(heads: &[u64], range: Range<usize>, units: &mut Vec<Range<usize>>) {
    if range.len() <= MAX {
        units.push(range);
        return;
    }
    // The item at an end belongs to the left part. The first of equal heads is taken.
    let ends = range.start + MIN..=range.end - MIN;
    let end = ends.max_by_key(|end| (heads[end - 1], usize::MAX - end)).expect("BUG: the range is longer than twice MIN");
    divide(heads, range.start..end, units);
    divide(heads, end..range.end, units);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn items(n: u32) -> Vec<Digest> {
        (0..n).map(|item| Digest::of(&item.to_le_bytes())).collect()
    }

    #[test]
    fn the_cut_of_a_fixed_list_never_changes() {
        let ends: Vec<usize> = cut(&items(10_000)).into_iter().map(|unit| unit.end).collect();
        assert_eq!(ends, [1227, 2572, 4228, 4796, 5327, 5856, 6809, 7501, 8310, 10_000]);
    }

    #[test]
    fn peaks_agree_with_their_definition() {
        let heads: Vec<u64> = items(6_000).iter().map(head).map(|head| head % 5_000).collect();
        let exceeds = |place: usize| {
            let window = place.checked_sub(WINDOW).map(|first| first..place + WINDOW + 1).filter(|window| window.end <= heads.len());
            window.is_some_and(|mut window| window.all(|other| other == place || heads[other] < heads[place]))
        };
        assert_eq!(peaks(&heads), (0..heads.len()).filter(|place| exceeds(*place)).collect::<Vec<_>>());
    }

    #[test]
    fn units_cover_the_list_within_their_bounds() {
        let same = vec![Digest::of(b"same"); 20_000];
        for list in [items(0), items(1), items(1_024), items(5_000), items(300_000), same] {
            let units = cut(&list);
            let mut next = 0;
            for unit in &units {
                assert_eq!(unit.start, next);
                assert!(unit.len() <= MAX && (unit.len() >= MIN || units.len() == 1), "{unit:?}");
                next = unit.end;
            }
            assert_eq!(next, list.len());
        }
        let n_units = cut(&items(300_000)).len();
        assert!((250..340).contains(&n_units), "{n_units} units of 300,000 items");
    }

    #[derive(Debug, Clone)]
    enum Edit {
        Insert(usize, u32),
        Delete(usize),
        Change(usize, u32),
        Move(usize, usize),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        let (place, name) = (0..1_usize << 32, 1_u32 << 31..u32::MAX);
        prop_oneof![
            (place.clone(), name.clone()).prop_map(|(at, name)| Edit::Insert(at, name)),
            place.clone().prop_map(Edit::Delete),
            (place.clone(), name).prop_map(|(at, name)| Edit::Change(at, name)),
            (place.clone(), place).prop_map(|(from, to)| Edit::Move(from, to)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn k_edits_make_at_most_2k_plus_1_new_units(first in 0..1_u32 << 30, edits in prop::collection::vec(edit(), 1..12)) {
            let before: Vec<Digest> = (first..first + 30_000).map(|item| Digest::of(&item.to_le_bytes())).collect();
            let mut after = before.clone();
            for edit in &edits {
                let n = after.len();
                match edit {
                    Edit::Insert(at, name) => after.insert(at % (n + 1), Digest::of(&name.to_le_bytes())),
                    Edit::Delete(at) => drop(after.remove(at % n)),
                    Edit::Change(at, name) => after[at % n] = Digest::of(&name.to_le_bytes()),
                    Edit::Move(from, to) => {
                        let item = after.remove(from % n);
                        after.insert(to % n, item);
                    }
                }
            }
            let contents = |items: &[Digest]| -> Vec<Vec<Digest>> { cut(items).into_iter().map(|unit| items[unit].to_vec()).collect() };
            let known: HashSet<Vec<Digest>> = contents(&before).into_iter().collect();
            let n_new = contents(&after).iter().filter(|unit| !known.contains(*unit)).count();
            // Moving an item counts as deleting and inserting it.
            let n_edits: usize = edits.iter().map(|edit| if matches!(edit, Edit::Move(..)) { 2 } else { 1 }).sum();
            prop_assert!(n_new <= 2 * n_edits + 1, "{n_new} new units after {n_edits} edits");
        }
    }
}
