//! The units into which a stage's work is divided, and their names.

use std::ops::Range;

use ovenbird_cache::{Digest, Fingerprint, Recipe, chunk};

/// How a stage's work is divided.
#[derive(Debug)]
pub enum Units {
    /// All of it at once.
    One,
    /// Items that do not depend on each other, cut into units by content.
    Independent {
        /// One digest an item, covering all that the item's result depends on besides the remaining inputs: its id and its
        /// content.
        items: Vec<Digest>,
        /// The ports whose content the item digests stand for: a unit's identity holds its items in place of these.
        replaces: Vec<&'static str>,
    },
    /// Steps of which each continues the one before (training). The artifact holds the last one, and those that are to stay.
    Chain {
        /// How many.
        links: u32,
        /// How many steps they have all together.
        steps: u32,
        /// Places of those that stay besides the last.
        stay: Vec<u32>,
    },
}

/// A piece that is done, verified, lost and redone as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its place among the units of its stage.
    pub index: usize,
    /// Which items it holds, of the stage's own list; empty for one unit and for links of a chain.
    pub items: Range<usize>,
    /// Its name.
    pub fingerprint: Fingerprint,
    /// Of a unit that holds items: see [`UnitKey::family`].
    pub family: Option<Fingerprint>,
    /// Whether the artifact holds it. Only of links of a chain does it not hold all.
    pub stays: bool,
}

impl Units {
    /// How many items there are, or steps of a chain, or 1.
    pub fn count(&self) -> usize {
        match self {
            Self::One => 1,
            Self::Independent { items, .. } => items.len(),
            Self::Chain { steps, .. } => *steps as usize,
        }
    }

    /// Leaves the first items, or of a chain the first steps of the first link.
    pub fn truncate(&mut self, n_items: usize) {
        match self {
            Self::One => {}
            Self::Independent { items, .. } => items.truncate(n_items),
            Self::Chain { links, steps, .. } => {
                *steps = steps.div_ceil((*links).max(1)).min(u32::try_from(n_items).unwrap_or(u32::MAX));
                *links = (*links).min(1);
            }
        }
    }

    /// Names every unit of a stage with this recipe; the second list holds the items they are ranges of.
    pub fn of(self, recipe: &Recipe) -> (Vec<Unit>, Vec<Digest>) {
        let without_items = |index: usize, fingerprint, stays| Unit { index, items: 0..0, fingerprint, family: None, stays };
        match self {
            Self::One => (vec![without_items(0, recipe.fingerprint(), true)], Vec::new()),
            Self::Chain { links, stay, .. } => {
                let chain = recipe.fingerprint();
                let link = |link: u32| {
                    let stays = link + 1 == links || stay.contains(&link);
                    without_items(link as usize, chain.part("ovenbird link 1", &link.to_le_bytes()), stays)
                };
                ((0..links).map(link).collect(), Vec::new())
            }
            Self::Independent { items, replaces } => {
                let mut shared = recipe.clone();
                shared.inputs.retain(|port, _| !replaces.contains(&port.as_str()));
                let family = shared.fingerprint();
                let unit = |(index, range): (usize, Range<usize>)| {
                    let content = Digest::of_list("ovenbird items 1", items[range.clone()].iter().map(|item| ("", *item)));
                    let fingerprint = family.part("ovenbird unit 1", content.as_bytes());
                    Unit { index, items: range, fingerprint, family: Some(family), stays: true }
                };
                (chunk::cut(&items).into_iter().enumerate().map(unit).collect(), items)
            }
        }
    }
}
