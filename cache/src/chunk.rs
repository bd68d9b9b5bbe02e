//! Item lists cut into units by content, so that adding, removing or changing a few items changes a few units.
//!
//! A unit ends after an item whose digest, read as a little-endian u64 from its first eight bytes, is a multiple of
//! [`MEAN`], once the unit holds at least [`MIN`] items; it ends in any case at [`MAX`] items. The three numbers are part
//! of every unit's identity: they are pinned by a test and never change.

use std::ops::Range;

use crate::recipe::Digest;

/// The odds, one in `MEAN`, that an item is the last of its unit.
pub const MEAN: u64 = 1024;
/// No unit but the last is smaller.
pub const MIN: usize = 256;
/// No unit is larger.
pub const MAX: usize = 4096;

/// Cuts a list of items, given by their digests, into consecutive ranges that cover it. An empty list has no units.
pub fn cut(items: &[Digest]) -> Vec<Range<usize>> {
    let mut units = Vec::new();
    let mut start = 0;
    for (item_idx, digest) in items.iter().enumerate() {
        let n_items = item_idx + 1 - start;
        let head = digest.as_bytes().first_chunk::<8>().expect("BUG: a digest has 32 bytes");
        if n_items == MAX || (n_items >= MIN && u64::from_le_bytes(*head).is_multiple_of(MEAN)) {
            units.push(start..item_idx + 1);
            start = item_idx + 1;
        }
    }
    if start < items.len() {
        units.push(start..items.len());
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(n: u32) -> Vec<Digest> {
        (0..n).map(|item| Digest::of(&item.to_le_bytes())).collect()
    }

    #[test]
    fn the_cut_of_a_fixed_list_never_changes() {
        let ends: Vec<usize> = cut(&items(10_000)).into_iter().map(|unit| unit.end).collect();
        assert_eq!(ends, [2276, 2708, 4242, 4554, 5135, 9231, 9890, 10_000]);
    }

    #[test]
    fn units_cover_the_list_within_their_bounds() {
        for n in [0, 1, 255, 256, 5_000, 50_000] {
            let units = cut(&items(n));
            let mut next = 0;
            for (unit_idx, unit) in units.iter().enumerate() {
                assert_eq!(unit.start, next);
                assert!(unit.len() <= MAX && (unit.len() >= MIN || unit_idx + 1 == units.len()));
                next = unit.end;
            }
            assert_eq!(next, n as usize);
        }
    }

    #[test]
    fn one_changed_item_changes_few_units() {
        let before = items(50_000);
        let mut after = before.clone();
        after[20_000] = Digest::of(b"changed");
        let contents = |items: &[Digest]| -> Vec<Vec<Digest>> { cut(items).into_iter().map(|unit| items[unit].to_vec()).collect() };
        let (before, after) = (contents(&before), contents(&after));
        assert!(after.iter().filter(|unit| !before.contains(unit)).count() <= 3);
    }
}
