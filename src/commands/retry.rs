//! `ovenbird retry`: runs items again that were skipped, and asks again for URLs whose host did not answer.

use std::path::Path;

use ovenbird_cache::{FileRecord, Store, UnitRecord, unit_name};
use ovenbird_stages::{FAILED_FILE, RETRY_FILE, web::forget_transient};

use super::run::run_and_report;
use crate::{chosen::Wanted, error::Result, output::print, pipeline::Pipeline, plan::previous_run::PreviousRun, run_args::RunArgs};

/// Run items again that were skipped (`on_bad_item: skip`), and downloads that may succeed now
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    pub(crate) machine: RunArgs,
    /// Items that failed; required, as there is nothing else to retry
    #[arg(long, required = true)]
    failed: bool,
}

/// Sets the units with failed items aside and runs the pipeline; the results of the other items are reused.
pub(crate) fn retry(home: &Path, Args { wanted, machine, failed: _ }: &Args) -> Result<()> {
    let (pipeline, places) = wanted.load()?;
    if set_failed_aside(&pipeline, &places, &Store::open(home)?)? == 0 {
        return Ok(print("no item of this pipeline failed\n")?);
    }
    run_and_report(home, wanted, &machine.options(), None)
}

/// Sets aside the units with failed items of some steps, as the previous run left them; returns how many. Their artifacts may change, so
/// their manifests are set aside too.
fn set_failed_aside(pipeline: &Pipeline, wanted: &[usize], store: &Store) -> Result<usize> {
    let previous = PreviousRun::of(store, pipeline)?;
    let mut n_set_aside = 0;
    for step in wanted.iter().map(|place| &pipeline.steps[*place]) {
        let Some(fingerprint) = previous.steps.get(&step.id) else { continue };
        let Some(manifest) = store.manifest(step.entry.kind, fingerprint)? else { continue };
        let is_listed = |file: &FileRecord| [FAILED_FILE, RETRY_FILE].contains(&file.name.as_str());
        let failed: Vec<&UnitRecord> = manifest.units.iter().filter(|unit| unit.files.iter().any(is_listed)).collect();
        for unit in &failed {
            // First: if this is cut off, the unit still lists what is to be tried.
            forget_transient(store, unit)?;
            store.quarantine(&unit_name(step.entry.kind, &unit.key.fingerprint), &["its failed items are run again".into()])?;
        }
        if !failed.is_empty() {
            store.quarantine_manifest(&store.manifest_path(step.entry.kind, fingerprint), "its failed items are run again")?;
        }
        n_set_aside += failed.len();
    }
    Ok(n_set_aside)
}
