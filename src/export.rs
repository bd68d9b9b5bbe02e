//! `ovenbird export`: what a stage made, laid where other programs look for it.

use std::{collections::BTreeMap, fs, path::Path};

use indicatif::HumanBytes;
use ovenbird_cache::{Digest, Error as CacheError, FileRecord, Ledger, Store, inputs::InputFile, publish};

use crate::{
    cli::print,
    error::{Error, Result, count},
    pipeline::{Pipeline, Step},
    plan::{self, Seen},
};

/// Copies the files of an output of a step into a folder. Each is checked on the way; one that is there already with the same bytes stays.
pub(crate) fn export(pipeline: &Pipeline, place: usize, port: Option<&str>, store: &Store, folder: &Path) -> Result<()> {
    let step = &pipeline.steps[place];
    let port = output(step, port)?;
    let ledger = store.home().exists().then(|| Ledger::of(store));
    let seen = plan::look(pipeline, &plan::needed(pipeline, &[place]), store, ledger.as_ref())?.remove(&place);
    let Some(Seen::There(artifact)) = seen.filter(|seen| !matches!(seen, Seen::There(artifact) if artifact.is_dropped)) else {
        let problem = format!("`{}` is not there as the pipeline stands", step.id);
        return Err(Error::Usage { problem, hint: format!("make it first: `ovenbird run {} --until {}`", pipeline.name, step.id) });
    };
    let mut by_name: BTreeMap<String, (InputFile, &FileRecord)> = BTreeMap::new();
    for (file, record) in artifact.records(port) {
        if let Some((other, _)) = by_name.insert(file.name.clone(), (file, record)) {
            let problem = format!("`{}.{port}` lies in several units, each with a file {}", step.id, other.name);
            let hint = "such files are for later stages; a stage that writes them for others, such as `globals/export`, can be exported";
            return Err(Error::Usage { problem, hint: hint.into() });
        }
    }
    let (n_files, mut n_bytes) = (by_name.len(), 0);
    for (name, (file, record)) in by_name {
        n_bytes += copy(&file.path, record, &folder.join(name))?;
    }
    print(&format!("{} of `{}.{port}`, {}, in {}\n", count(n_files, "file"), step.id, HumanBytes(n_bytes), folder.display()))
}

/// The output that is meant: the only one, or the one that is named.
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

/// Copies a file, and returns its bytes.
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
