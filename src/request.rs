//! The request of a run: its pipeline file and settings, kept so that the run can be repeated.

use std::io::ErrorKind;

use ovenbird_cache::Store;

use crate::{
    error::Result,
    pipeline::{Pipeline, Request, file},
};

/// The path of a run's request in the home.
pub(crate) fn request_path(run: &str) -> String {
    format!("runs/{run}/request.json")
}

/// Reads the pipeline of a run, and changes to the folder that its paths are relative to.
pub(crate) fn read_request(store: &Store, run: &str) -> Result<Pipeline> {
    let path = || store.home().join(request_path(run));
    let request: Option<Request> = store.kept(&request_path(run))?;
    let request = request.ok_or_else(|| ovenbird_cache::Error::Read { path: path(), source: ErrorKind::NotFound.into() })?;
    std::env::set_current_dir(&request.folder).map_err(|source| ovenbird_cache::Error::Read { path: request.folder.clone(), source })?;
    file::read(format!("the pipeline of run {run}"), request)
}
