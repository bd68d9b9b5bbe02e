//! (in the making)

use std::path::{Path, PathBuf};

pub(crate) fn write(store: &ovenbird_cache::Store, run: &str, output: Option<&Path>) -> crate::error::Result<PathBuf> {
    let path = output.map_or_else(|| crate::event::run_folder(store.home(), run).join("report.html"), Path::to_owned);
    Ok(path)
}
