//! The units into which a stage's work is divided, and their names.

use std::ops::Range;

use ovenbird_cache::{Digest, Fingerprint, Recipe, chunk};

/// The division of a stage's work into units.
#[derive(Debug)]
pub enum Units {
    /// One unit.
    One,
    /// Items that do not depend on each other, divided into units by content.
    Independent {
        /// One digest per item, of its id and content, and all else that its result depends on besides the remaining inputs.
        items: Vec<Digest>,
        /// The ports whose content the item digests cover: a unit's name depends on its items instead of these ports.
        replaces: Vec<&'static str>,
    },
    /// Checkpoints of a training, each of which continues from the one before. The artifact holds the last one and those that are to stay.
    Chain {
        /// How many checkpoints.
        checkpoints: u32,
        /// How many steps of training in all.
        steps: u32,
        /// How many images a step sees.
        images_per_step: u32,
        /// Indices of the checkpoints that stay besides the last.
        stay: Vec<u32>,
    },
}

/// A piece of work that is made, verified, lost and redone as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its index among the units of its stage.
    pub index: usize,
    /// The items it holds, as a range of the stage's list; empty for units without items.
    pub items: Range<usize>,
    /// Its name.
    pub fingerprint: Fingerprint,
    /// For a unit with items: see [`ovenbird_cache::UnitKey::item_key`].
    pub item_key: Option<Fingerprint>,
    /// Whether the artifact holds it. Only checkpoints of a training may be left out.
    pub stays: bool,
}

/// How many steps of a training see so many images; at least one.
pub(crate) fn steps_for(n_images: usize, images_per_step: u32) -> u32 {
    u32::try_from(n_images / images_per_step.max(1) as usize).unwrap_or(u32::MAX).max(1)
}

impl Units {
    /// The number of items, or of steps of a training, or 1.
    pub fn count(&self) -> usize {
        match self {
            Self::One => 1,
            Self::Independent { items, .. } => items.len(),
            Self::Chain { steps, .. } => *steps as usize,
        }
    }

    /// Keeps the first items, or as many steps of a training as see so many images, up to its first checkpoint.
    pub fn truncate(&mut self, n_items: usize) {
        match self {
            Self::One => {}
            Self::Independent { items, .. } => items.truncate(n_items),
            Self::Chain { checkpoints, steps, images_per_step, .. } => {
                *steps = steps.div_ceil((*checkpoints).max(1)).min(steps_for(n_items, *images_per_step));
                *checkpoints = (*checkpoints).min(1);
            }
        }
    }

    /// The units of a stage with this recipe, with their names; and the items that they are ranges of.
    pub fn of(self, recipe: &Recipe) -> (Vec<Unit>, Vec<Digest>) {
        let without_items = |index: usize, fingerprint, stays| Unit { index, items: 0..0, fingerprint, item_key: None, stays };
        match self {
            Self::One => (vec![without_items(0, recipe.fingerprint(), true)], Vec::new()),
            Self::Chain { checkpoints, stay, .. } => {
                let chain = recipe.fingerprint();
                let checkpoint = |checkpoint: u32| {
                    let stays = checkpoint + 1 == checkpoints || stay.contains(&checkpoint);
                    without_items(checkpoint as usize, chain.part("ovenbird checkpoint 1", &checkpoint.to_le_bytes()), stays)
                };
                ((0..checkpoints).map(checkpoint).collect(), Vec::new())
            }
            Self::Independent { items, replaces } => {
                let mut shared = recipe.clone();
                shared.inputs.retain(|port, _| !replaces.contains(&port.as_str()));
                let item_key = shared.fingerprint();
                let unit = |(index, range): (usize, Range<usize>)| {
                    let content = Digest::of_list("ovenbird items 1", items[range.clone()].iter().map(|item| ("", *item)));
                    let fingerprint = item_key.part("ovenbird unit 1", content.as_bytes());
                    Unit { index, items: range, fingerprint, item_key: Some(item_key), stays: true }
                };
                (chunk::cut(&items).into_iter().enumerate().map(unit).collect(), items)
            }
        }
    }
}
