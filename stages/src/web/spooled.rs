//! What the spool remembers of a URL.
//!
//! A record says what came of a URL and under which conditions. It holds as long as another request could not end differently because of the
//! parameters: a robots.txt that was heeded tells nothing to a run that ignores it, and an image that was too large for 10 MB may fit into 30. Limits that can
//! be judged by the image itself (`min_side`, smaller limits) ask for no request at all.

use ovenbird_cache::{Digest, Spool, Store, UnitRecord};
use serde::{Deserialize, Serialize};

use crate::{Result, artifacts::DownloadState, context::retriable_items};

/// The parameters on which it depends what comes of a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Conditions {
    pub(super) max_bytes: u64,
    pub(super) max_pixels: u64,
    pub(super) max_redirects: u32,
    pub(super) heeds_opt_outs: bool,
    pub(super) private_hosts: Vec<String>,
}

/// An image in the spool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fetched {
    pub(super) sha256: String,
    pub(super) md5: String,
    /// BLAKE3, by which damage is found.
    pub(super) content: Digest,
    /// `[width, height]` px.
    pub(super) size: [u32; 2],
    /// `jpg`, `png`, `webp` or `gif`, by its content.
    pub(super) extension: String,
}

/// What came of a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UrlRecord {
    pub(super) url: String,
    pub(super) final_url: String,
    pub(super) state: DownloadState,
    pub(super) reason: Option<String>,
    pub(super) code: Option<u16>,
    pub(super) bytes: u64,
    /// Of an image that was refused, where its header was read.
    pub(super) size: Option<[u32; 2]>,
    pub(super) image: Option<Fetched>,
    pub(super) attempts: u32,
    pub(super) time_ms: i64,
    pub(super) under: Conditions,
}

impl UrlRecord {
    /// Whether another request under these conditions would be of no use.
    pub(super) fn holds(&self, now: &Conditions) -> bool {
        let then = &self.under;
        let hosts = |some: &Self, others: &Conditions| some.under.private_hosts.iter().all(|host| others.private_hosts.contains(host));
        let is_stricter = (now.heeds_opt_outs && !then.heeds_opt_outs) || !hosts(self, now);
        match self.state {
            DownloadState::TooLarge => match self.size {
                Some([width, height]) => !is_stricter && u64::from(width) * u64::from(height) > now.max_pixels,
                None => !is_stricter && now.max_bytes <= then.max_bytes,
            },
            DownloadState::Robots | DownloadState::OptedOut | DownloadState::RobotsUnreachable => now.heeds_opt_outs,
            DownloadState::PrivateAddress => now.private_hosts.iter().all(|host| then.private_hosts.contains(host)),
            DownloadState::BadRedirect => now.max_redirects <= then.max_redirects,
            DownloadState::BadUrl | DownloadState::Gone => true,
            DownloadState::Downloaded
            | DownloadState::Changed
            | DownloadState::Duplicate
            | DownloadState::TooSmall
            | DownloadState::NotAnImage
            | DownloadState::DamagedImage
            | DownloadState::HttpError
            | DownloadState::ServerError
            | DownloadState::Timeout
            | DownloadState::Unreachable
            | DownloadState::CutShort => !is_stricter,
        }
    }
}

/// A look into the spool.
pub(super) enum Spooled {
    /// The URL need not be asked for.
    Known(Box<UrlRecord>),
    /// It was never asked for, or under conditions that tell nothing.
    Unknown,
    /// What was there is damaged.
    Damaged,
}

/// What the spool has of a URL; of an image every byte is checked.
pub(super) fn look_up(spool: &Spool, url: &str, conditions: &Conditions) -> Spooled {
    match spool.record::<UrlRecord>(url) {
        Ok(Some(record)) if record.url == url && record.holds(conditions) => match &record.image {
            Some(image) if !spool.holds(&image.sha256, &image.content) => Spooled::Damaged,
            _ => Spooled::Known(Box::new(record)),
        },
        Ok(_) => Spooled::Unknown,
        Err(_) => Spooled::Damaged,
    }
}

/// Forgets the URLs that a unit lists as worth another try; returns how many.
pub fn forget_transient(store: &Store, unit: &UnitRecord) -> Result<usize> {
    let items = retriable_items(store, unit)?;
    let spool = store.spool();
    items.iter().try_for_each(|item| spool.forget(&item.item))?;
    Ok(items.len())
}
