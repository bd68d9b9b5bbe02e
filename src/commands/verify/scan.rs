//! Checks units, manifests, records and inputs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::HumanBytes;
use jiff::Timestamp;
use ovenbird_cache::{
    CURSOR, Ledger, Manifest, Status, Store, inputs,
    verify::{Class, Depth, Finding},
};
use serde::{Deserialize, Serialize};

use super::report::{Report, VerifyOptions};
use crate::{error::Result, progress::TaskProgress};

/// How often the position of a scan is saved.
const NOTE_EVERY: Duration = Duration::from_secs(5);

/// The position of a scan that stopped early.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Cursor {
    depth: Depth,
    subset: Option<(u64, u64)>,
    /// All units up to this one, in order, are done.
    after: String,
}

/// Whether a unit belongs to a part of the home.
fn is_in(subset: Option<(u64, u64)>, unit: &str) -> bool {
    subset.is_none_or(|(k, n)| {
        let digest = ovenbird_cache::Digest::of(unit.as_bytes());
        let head = digest.as_bytes().first_chunk::<8>().expect("BUG: a digest has 32 bytes");
        u64::from_le_bytes(*head) % n == k - 1
    })
}

/// Checks a home as closely as asked.
pub(super) fn scan(store: &Store, options: &VerifyOptions) -> Result<Report> {
    let clock = Instant::now();
    let ledger = Ledger::of(store);
    let mut report = Report::default();
    let names = store.unit_names()?;
    if !names.is_empty() && !store.home().join("ledger").exists() {
        let problem = "is missing: it held verification times and the digests of inputs".into();
        report.findings.push(Finding { class: Class::Ledger, unit: None, path: store.home().join("ledger"), problem });
    }
    let mut units: Vec<String> = names.into_iter().filter(|unit| is_in(options.subset, unit)).collect();
    let verified = ledger.verified();
    report.never_verified = units.iter().filter(|unit| verified.get(*unit).is_none_or(|was| was.depth < options.depth)).count();
    for words in ledger.notices() {
        let path = store.home().join("ledger");
        report.findings.push(Finding { class: Class::Ledger, unit: None, path, problem: words });
    }
    // A damaged cursor is among the findings below.
    let cursor: Option<Cursor> = store.kept(CURSOR).ok().flatten();
    if let Some(cursor) = cursor.filter(|cursor| cursor.depth == options.depth && cursor.subset == options.subset) {
        let n_before = units.len();
        units.retain(|unit| *unit > cursor.after);
        report.continued_after = n_before - units.len();
    }
    report.units = units.len();

    let n_threads = options.run.cpu.min(units.len()).max(1);
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let bucket = Mutex::new((clock, 0_u64));
    let read = |n_bytes: u64| {
        let (since, total) = {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.1 += n_bytes;
            *bucket
        };
        if let Some(rate) = options.rate {
            let due = Duration::from_secs_f64(total as f64 / rate as f64);
            thread::sleep(due.saturating_sub(since.elapsed()));
        }
    };
    let (sender, receiver) = mpsc::channel();
    let worker = |sender: mpsc::Sender<(usize, Result<Vec<Finding>, ovenbird_cache::Error>)>| {
        while !is_over.load(Ordering::Relaxed) {
            let unit_idx = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(unit_idx) else { return };
            if sender.send((unit_idx, store.verify_unit(unit, options.depth, &read))).is_err() {
                return;
            }
        }
    };
    let mut done = vec![false; units.len()];
    let mut n_whole = 0;
    thread::scope(|scope| -> Result<()> {
        let worker = &worker;
        for _ in 0..n_threads {
            let sender = sender.clone();
            scope.spawn(move || worker(sender));
        }
        drop(sender);
        let mut progress = TaskProgress::new("verify");
        let (mut noted, mut fresh, mut n_done) = (Instant::now(), Vec::new(), 0);
        for (unit_idx, found) in receiver {
            let found = found?;
            if !found.iter().any(|finding| matches!(finding.class, Class::Damaged | Class::Wrong)) {
                fresh.push(units[unit_idx].clone());
            }
            report.findings.extend(found);
            done[unit_idx] = true;
            n_done += 1;
            while done.get(n_whole) == Some(&true) {
                n_whole += 1;
            }
            let total = bucket.lock().unwrap_or_else(PoisonError::into_inner).1;
            progress.tell(n_done, units.len() as u64, &HumanBytes(total).to_string());
            if noted.elapsed() > NOTE_EVERY && n_whole > 0 {
                ledger.note_verified(&std::mem::take(&mut fresh), options.depth, Timestamp::now().as_second());
                let cursor = Cursor { depth: options.depth, subset: options.subset, after: units[n_whole - 1].clone() };
                store.keep(CURSOR, &cursor)?;
                noted = Instant::now();
            }
            if options.max_duration.is_some_and(|most| clock.elapsed() > most) {
                is_over.store(true, Ordering::Relaxed);
            }
        }
        ledger.note_verified(&fresh, options.depth, Timestamp::now().as_second());
        Ok(())
    })?;
    report.is_cut_short = n_whole < units.len();
    if report.is_cut_short {
        if n_whole > 0 {
            store.keep(CURSOR, &Cursor { depth: options.depth, subset: options.subset, after: units[n_whole - 1].clone() })?;
        }
    } else if report.continued_after > 0 {
        store.remove_record(CURSOR, "the scan is over")?;
    }

    for path in store.manifest_paths()? {
        report.findings.extend(store.verify_manifest(&path)?);
    }
    for unit in store.part_names()? {
        report.findings.extend(store.verify_part(&unit, options.depth, &read)?);
    }
    report.findings.extend(store.verify_house()?);
    report.findings.extend(store.verify_records()?);
    if options.depth == Depth::Deep && !report.is_cut_short {
        let mut progress = TaskProgress::new("inputs");
        let mut n_files = 0;
        inputs::verify_remembered(&ledger, &mut |path, problem| {
            n_files += 1;
            progress.tell(n_files, 0, "");
            if let Some(problem) = problem {
                report.findings.push(Finding { class: Class::Input, unit: None, path: path.to_owned(), problem });
            }
        });
    }
    // A missing unit is found in the journal and in each manifest that lists it; a misplaced folder is found twice above.
    report.findings.sort_by(|a, b| (a.class, &a.unit, &a.path, &a.problem).cmp(&(b.class, &b.unit, &b.path, &b.problem)));
    report.findings.dedup_by(|a, b| a.class == Class::Missing && b.class == Class::Missing && a.unit == b.unit);
    report.bytes_read = bucket.lock().unwrap_or_else(PoisonError::into_inner).1;
    report.wall_s = clock.elapsed().as_secs_f64();
    Ok(report)
}

/// Units that share items with a unit whose content is wrong: units reuse each other's rows.
pub(super) fn sharing(store: &Store, findings: &[Finding]) -> Result<Vec<Finding>> {
    let mut wrong: BTreeSet<String> =
        findings.iter().filter(|finding| finding.class == Class::Wrong).filter_map(|finding| finding.unit.clone()).collect();
    let (mut open, mut found) = (wrong.iter().cloned().collect::<Vec<_>>(), Vec::new());
    let noted = if open.is_empty() { BTreeMap::new() } else { store.noted_units()? };
    while let Some(unit) = open.pop() {
        let Status::Valid(record) = store.unit_at(&unit)? else { continue };
        // A damaged list is among the findings already.
        let items: BTreeSet<_> = store.items_of(&record).unwrap_or_default().into_iter().collect();
        for (other, _) in noted.iter().filter(|(_, noted)| record.key.item_key.is_some() && noted.item_key == record.key.item_key) {
            let Status::Valid(record) = store.unit_at(other)? else { continue };
            if !wrong.contains(other) && store.items_of(&record).unwrap_or_default().iter().any(|item| items.contains(item)) {
                wrong.insert(other.clone());
                open.push(other.clone());
                let problem = format!("holds rows of the same items as {unit}, which is wrong");
                found.push(Finding { class: Class::Wrong, unit: Some(other.clone()), path: other.into(), problem });
            }
        }
    }
    Ok(found)
}

/// Artifacts computed from units whose content is wrong. Damaged bytes taint nothing: readers check digests.
pub(super) fn tainted(store: &Store, findings: &[Finding]) -> Result<Vec<Finding>> {
    let wrong: BTreeSet<&String> =
        findings.iter().filter(|finding| finding.class == Class::Wrong).filter_map(|finding| finding.unit.as_ref()).collect();
    if wrong.is_empty() {
        return Ok(Vec::new());
    }
    let manifests = store.manifests()?;
    let holds_wrong = |manifest: &&Manifest| manifest.unit_names().any(|unit| wrong.contains(&unit));
    let sources: Vec<&Manifest> = manifests.iter().filter(holds_wrong).collect();
    let finding = |manifest: &Manifest| Finding {
        class: Class::Tainted,
        unit: None,
        path: store.manifest_path(&manifest.recipe.kind, &manifest.fingerprint),
        problem: format!("`{}` was computed from wrong content", manifest.recipe.kind),
    };
    Ok(Store::made_from(&manifests, &sources).into_iter().map(finding).collect())
}
