//! `ovenbird export`: copies a stage's output into a folder.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use indicatif::HumanBytes;
use ovenbird_cache::{Digest, Error as CacheError, FileRecord, Ledger, Store, inputs::InputFile, publish};

use crate::{
    chosen::{Chosen, places},
    error::{Error, Result},
    output::{count, print},
    pipeline::Step,
    plan::{self, Seen},
};

/// Copy the output of a step into a folder, for other programs
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    chosen: Chosen,
    /// A step's id, with the output's name where it has several: `detections`, `coco.evaluation`
    #[arg(value_name = "STEP[.OUTPUT]")]
    what: String,
    /// The folder; created if missing, files with the same name are replaced
    folder: PathBuf,
}

/// Copies the files of an output into a folder, checking each digest; a file that has the same bytes already is not written.
pub(crate) fn export(home: &Path, Args { chosen, what, folder }: &Args) -> Result<()> {
    let (stage, port) = what.split_once('.').map_or((what.as_str(), None), |(stage, port)| (stage, Some(port)));
    let (pipeline, store) = (chosen.load()?, Store::open(home)?);
    let places = places(&pipeline, stage)?;
    let [place] = places[..] else {
        let ids: Vec<String> = places.iter().map(|place| pipeline.steps[*place].id.to_string()).collect();
        let (problem, hint) = (format!("`{stage}` has {} instances", ids.len()), format!("name one of {}", ids.join(", ")));
        return Err(Error::Usage { problem, hint });
    };
    let step = &pipeline.steps[place];
    let port = output(step, port)?;
    let ledger = store.home().exists().then(|| Ledger::of(&store));
    let seen = plan::look(&pipeline, &pipeline.needed(&[place]), &store, ledger.as_ref())?.remove(&place);
    let Some(Seen::Stored(artifact)) = seen.filter(|seen| !matches!(seen, Seen::Stored(artifact) if artifact.is_dropped)) else {
        return Err(chosen.not_run(home, &step.id));
    };
    let records = artifact.records(port);
    let (n_files, mut n_bytes) = (records.len(), 0);
    for (name, (file, record)) in names(&records).into_iter().zip(&records) {
        n_bytes += copy(&file.path, record, &folder.join(name))?;
    }
    let text = format!("{} of `{}.{port}`, {}, in {}\n", count(n_files, "file"), step.id, HumanBytes(n_bytes), folder.display());
    Ok(print(&text)?)
}

/// The names of some files in a folder: their own, or, where several units have files of one name, with the unit's number before it.
fn names(records: &[(InputFile, &FileRecord)]) -> Vec<String> {
    let own: BTreeSet<&String> = records.iter().map(|(file, _)| &file.name).collect();
    if own.len() == records.len() {
        return records.iter().map(|(file, _)| file.name.clone()).collect();
    }
    let mut units: Vec<_> = records.iter().map(|(file, _)| file.unit).collect();
    units.dedup();
    let number = |file: &InputFile| units.iter().position(|unit| *unit == file.unit).unwrap_or_default();
    records.iter().map(|(file, _)| format!("{:05}-{}", number(file), file.name)).collect()
}

/// The named output, or the only one.
fn output<'a>(step: &Step, port: Option<&'a str>) -> Result<&'a str> {
    let names: Vec<&'static str> = step.entry.outputs.iter().map(|port| port.name).collect();
    let problem = match (port, names.as_slice()) {
        (None, [only]) => return Ok(only),
        (Some(port), _) if names.contains(&port) => return Ok(port),
        (None, _) => format!("`{}` has {}", step.id, count(names.len(), "output")),
        (Some(port), _) => format!("`{}` has no output `{port}`", step.id),
    };
    let all: Vec<String> = names.iter().map(|name| format!("{}.{name}", step.id)).collect();
    Err(Error::Usage { problem, hint: format!("name one of {}", all.join(", ")) })
}

/// Copies a file; returns its size.
fn copy(from: &Path, record: &FileRecord, to: &Path) -> Result<u64> {
    let bytes = fs::read(from).map_err(|source| CacheError::Read { path: from.to_owned(), source })?;
    let found = Digest::of(&bytes);
    if found != record.digest {
        return Err(CacheError::Flipped { path: from.to_owned(), what: "content".into(), expected: record.digest, found }.into());
    }
    if !fs::read(to).is_ok_and(|there| there == bytes) {
        publish::replace(to, &bytes)?;
    }
    Ok(record.bytes)
}
