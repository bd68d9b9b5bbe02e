//! Stages that exchange images with the web.
//!
//! ```text
//! download.rs   web/download: which links are tried, top-up, what is published
//! fetch.rs      one URL to its end: attempts, redirects, limits, what the answer holds
//! address.rs    which hosts may be asked: the public internet alone, checked where names become addresses
//! opt_out.rs    robots.txt, and headers by which a site keeps machines away
//! spooled.rs    what the spool of the home remembers of a URL, and whether it still holds
//! summary.rs    what operators are told by class
//! import.rs     web/import: img2dataset's folders in
//! export.rs     web/export: the same out
//! ```

mod address;
pub mod download;
pub mod export;
mod fetch;
pub mod import;
mod opt_out;
mod spooled;
mod summary;

pub use spooled::forget_transient;
pub use summary::BelowMin;
pub(crate) use summary::refuse_few;
