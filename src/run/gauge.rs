//! The progress of a running step, and for how long there was none.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ovenbird_cache::Fingerprint;

use crate::{devices::Grant, plan::Work};

/// The user is told after so long without progress.
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// The reaction to a step without progress.
pub(super) enum Silence {
    /// Tell the user, once.
    Tell,
    /// Give the step up.
    GiveUp,
}

/// The progress of a running step.
pub(super) struct Gauge {
    pub(super) started: Instant,
    pub(super) fingerprint: Fingerprint,
    /// The places of the steps that share its pass, itself included: progress of one is progress of all.
    pub(super) together: Arc<[usize]>,
    pub(super) devices: Arc<Grant>,
    pub(super) last_progress: Instant,
    /// Whether the user was told that there is no progress.
    pub(super) is_silent: bool,
    pub(super) failed: u64,
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) units_left: usize,
    pub(super) bytes: u64,
    /// When it began or last published a unit.
    pub(super) saved: Instant,
    /// Whether it kept what it had finished when it was asked to stop.
    pub(super) is_kept: bool,
    /// Crops or images that went through the network.
    pub(super) views: u64,
    /// Batches that were ready for the network when it last reported.
    pub(super) ready: u64,
    /// Whether something changed since it was last shown.
    pub(super) is_stale: bool,
}

impl Gauge {
    pub(super) fn new(work: &Work, together: Arc<[usize]>, devices: Arc<Grant>) -> Self {
        let now = Instant::now();
        Self {
            started: now,
            fingerprint: work.recipe.fingerprint(),
            together,
            devices,
            last_progress: now,
            is_silent: false,
            failed: 0,
            done: 0,
            total: 0,
            units_left: work.missing.len(),
            bytes: 0,
            saved: now,
            is_kept: false,
            views: 0,
            ready: 0,
            is_stale: false,
        }
    }

    /// Notes progress.
    pub(super) fn progressed(&mut self) {
        (self.last_progress, self.is_silent) = (Instant::now(), false);
    }

    /// The reaction to the time since the last progress. After `max_silence` the step counts as hanging.
    pub(super) fn silence(&mut self, max_silence: Duration) -> Option<Silence> {
        let silence = self.last_progress.elapsed();
        if silence > max_silence {
            return Some(Silence::GiveUp);
        }
        (silence > SILENCE && !std::mem::replace(&mut self.is_silent, silence > SILENCE)).then_some(Silence::Tell)
    }
}
