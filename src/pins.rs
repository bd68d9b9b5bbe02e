//! Pinned runs: their artifacts are kept by `cache gc`.

use std::collections::BTreeSet;

use ovenbird_cache::{
    Store,
    verify::{Class, Finding},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    event,
    output::count,
    run_state,
};

/// The record of a pinned run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pin {
    pub(crate) run: String,
    /// The artifacts that the run used, by their names of 32 digits.
    pub(crate) artifacts: BTreeSet<String>,
}

/// The path of a pin in the home.
pub(crate) fn pin_path(run: &str) -> String {
    format!("pins/{run}.json")
}

/// Pins a run: reads its artifacts from its log. Fails where the log is damaged.
pub(crate) fn write_pin(store: &Store, run: &str) -> Result<()> {
    let n_damaged = event::log_damage(store.home(), run)?;
    if n_damaged > 0 {
        let path = store.home().join(event::log_path(run));
        let problem = format!("{} damaged: the artifacts of the run are not known", count(n_damaged, "line"));
        return Err(Error::DamagedRecords { findings: vec![Finding { class: Class::Record, unit: None, path, problem }] });
    }
    let steps = run_state::state(&event::read_log(store.home(), run)?).steps;
    let artifacts = steps.iter().filter_map(|step| step.fingerprint.map(|fingerprint| fingerprint.short())).collect();
    Ok(store.keep(&pin_path(run), &Pin { run: run.into(), artifacts })?)
}
