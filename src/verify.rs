//! `ovenbird verify`: whether a home holds what was published, and putting right what does not.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::HumanBytes;
use jiff::Timestamp;
use ovenbird_cache::{
    CURSOR, Fingerprint, Ledger, Manifest, Status, Store, inputs,
    verify::{Class, Depth, Finding},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    cli::{print, to_json},
    error::{Error, Result, count},
    event::{self, Event},
    mend::{self, Mended},
    pipeline::{self, Pipeline, Request},
    plan, recompute,
    run::{self, Options},
    screen::{Phase, Screen, duration},
};

/// How much work a kill costs.
const NOTE_EVERY: Duration = Duration::from_secs(5);

/// What to verify and how.
pub(crate) struct Wish {
    pub(crate) depth: Depth,
    /// Which part of the rows to compute again, from 0 to 1.
    pub(crate) recompute: Option<f64>,
    pub(crate) fix: bool,
    /// The k-th of n parts, from 1.
    pub(crate) subset: Option<(u64, u64)>,
    pub(crate) max_duration: Option<Duration>,
    /// Bytes a second.
    pub(crate) rate: Option<u64>,
    pub(crate) json: bool,
    pub(crate) options: Options,
}

/// How far an earlier scan came that was cut short.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Cursor {
    depth: Depth,
    subset: Option<(u64, u64)>,
    /// The last unit, in order, before which all are done.
    after: String,
}

/// What a scan came to.
#[derive(Debug, Default, Serialize)]
struct Report {
    units: usize,
    /// Units that an earlier scan had done.
    continued_after: usize,
    bytes_read: u64,
    wall_s: f64,
    /// Whether time ran out.
    is_cut_short: bool,
    /// Units never verified as closely as this before this scan.
    never_verified: usize,
    findings: Vec<Finding>,
    recomputed: Option<recompute::Audit>,
    repaired: Vec<String>,
    /// What could not be put right, and why.
    lost: Vec<Lost>,
}

#[derive(Debug, Serialize)]
struct Lost {
    what: String,
    why: String,
}

/// Runs the command.
pub(crate) fn verify(home: &Path, wish: &Wish) -> Result<()> {
    let home = std::path::absolute(home).unwrap_or_else(|_| home.to_owned());
    if !home.exists() {
        let problem = format!("{}: there is no home here", home.display());
        return Err(Error::Usage { problem, hint: "name it with `--home FOLDER`".into() });
    }
    let store = Store::open_to_repair(&home)?;
    // What is no file or folder where one belongs cannot be looked into: it comes first, and alone.
    let misplaced = store.misplaced()?;
    let mut repaired = Vec::new();
    if wish.fix {
        for finding in &misplaced {
            let place = store.home().join("quarantine").join("misplaced");
            if let Some(aside) = store.publisher().set_aside(&finding.path, &place)? {
                repaired.push(format!("{}: {}: set aside at {}", finding.path.display(), finding.problem, aside.display()));
            }
        }
    } else if !misplaced.is_empty() {
        let report = Report { findings: misplaced, ..Report::default() };
        print(&if wish.json { to_json("verify", &report) } else { words(&report, wish) })?;
        return Err(Error::Damage { n_left: report.findings.len(), is_fixed: false });
    }
    let mut report = scan(&store, wish)?;
    report.repaired = repaired;
    if let Some(part) = wish.recompute {
        let audit = recompute::audit(&store, part, wish.options.devices[0])?;
        report.findings.extend(audit.findings());
        report.recomputed = Some(audit);
    }
    let sharing = sharing(&store, &report.findings)?;
    report.findings.extend(sharing);
    let tainted = tainted(&store, &report.findings)?;
    report.findings.extend(tainted);
    let n_bad = report.findings.iter().filter(|finding| finding.class != Class::Suspect).count();
    if wish.fix && n_bad > 0 {
        fix(&store, wish, &mut report)?;
    }
    let text = if wish.json { to_json("verify", &report) } else { words(&report, wish) };
    print(&text)?;
    let n_left = if wish.fix { report.lost.len() } else { n_bad };
    if n_left == 0 { Ok(()) } else { Err(Error::Damage { n_left, is_fixed: wish.fix }) }
}

fn is_in(subset: Option<(u64, u64)>, unit: &str) -> bool {
    subset.is_none_or(|(k, n)| {
        let digest = ovenbird_cache::Digest::of(unit.as_bytes());
        let head = digest.as_bytes().first_chunk::<8>().expect("BUG: a digest has 32 bytes");
        u64::from_le_bytes(*head) % n == k - 1
    })
}

fn scan(store: &Store, wish: &Wish) -> Result<Report> {
    let clock = Instant::now();
    let ledger = Ledger::of(store);
    let mut report = Report::default();
    let names = store.unit_names()?;
    if !names.is_empty() && !store.home().join("ledger").exists() {
        let problem = "is missing: when units were verified, and the digests of inputs, are not known".into();
        report.findings.push(Finding { class: Class::Ledger, unit: None, path: store.home().join("ledger"), problem });
    }
    let mut units: Vec<String> = names.into_iter().filter(|unit| is_in(wish.subset, unit)).collect();
    let verified = ledger.verified();
    report.never_verified = units.iter().filter(|unit| verified.get(*unit).is_none_or(|was| was.depth < wish.depth)).count();
    for words in ledger.notices() {
        let path = store.home().join("ledger");
        report.findings.push(Finding { class: Class::Ledger, unit: None, path, problem: words });
    }
    // One that is damaged is a finding.
    let cursor: Option<Cursor> = store.kept(CURSOR).ok().flatten();
    if let Some(cursor) = cursor.filter(|cursor| cursor.depth == wish.depth && cursor.subset == wish.subset) {
        let n_before = units.len();
        units.retain(|unit| *unit > cursor.after);
        report.continued_after = n_before - units.len();
    }
    report.units = units.len();

    let n_threads = wish.options.cpu.min(units.len()).max(1);
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let bucket = Mutex::new((clock, 0_u64));
    let read = |n_bytes: u64| {
        let (since, total) = {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.1 += n_bytes;
            *bucket
        };
        if let Some(rate) = wish.rate {
            let due = Duration::from_secs_f64(total as f64 / rate as f64);
            thread::sleep(due.saturating_sub(since.elapsed()));
        }
    };
    let (sender, receiver) = mpsc::channel();
    let worker = |sender: mpsc::Sender<(usize, Result<Vec<Finding>, ovenbird_cache::Error>)>| {
        while !is_over.load(Ordering::Relaxed) {
            let unit_idx = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(unit_idx) else { return };
            if sender.send((unit_idx, store.verify_unit(unit, wish.depth, &read))).is_err() {
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
        let mut phase = Phase::new("verify");
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
            phase.tell(n_done, units.len() as u64, &HumanBytes(total).to_string());
            if noted.elapsed() > NOTE_EVERY && n_whole > 0 {
                ledger.note_verified(&std::mem::take(&mut fresh), wish.depth, Timestamp::now().as_second());
                let cursor = Cursor { depth: wish.depth, subset: wish.subset, after: units[n_whole - 1].clone() };
                store.keep(CURSOR, &cursor)?;
                noted = Instant::now();
            }
            if wish.max_duration.is_some_and(|most| clock.elapsed() > most) {
                is_over.store(true, Ordering::Relaxed);
            }
        }
        ledger.note_verified(&fresh, wish.depth, Timestamp::now().as_second());
        Ok(())
    })?;
    report.is_cut_short = n_whole < units.len();
    if report.is_cut_short {
        if n_whole > 0 {
            store.keep(CURSOR, &Cursor { depth: wish.depth, subset: wish.subset, after: units[n_whole - 1].clone() })?;
        }
    } else if report.continued_after > 0 {
        store.remove_record(CURSOR, "the scan is over")?;
    }

    for path in store.manifest_paths()? {
        report.findings.extend(store.verify_manifest(&path)?);
    }
    report.findings.extend(store.verify_house()?);
    report.findings.extend(store.verify_records()?);
    if wish.depth == Depth::Deep && !report.is_cut_short {
        let mut phase = Phase::new("inputs");
        let mut n_files = 0;
        inputs::verify_remembered(&ledger, &mut |path, problem| {
            n_files += 1;
            phase.tell(n_files, 0, "");
            if let Some(problem) = problem {
                report.findings.push(Finding { class: Class::Input, unit: None, path: path.to_owned(), problem });
            }
        });
    }
    // A unit that is missing shows in the journal and in each manifest that lists it; what lies in a record's place in two of the above.
    report.findings.sort_by(|a, b| (a.class, &a.unit, &a.path, &a.problem).cmp(&(b.class, &b.unit, &b.path, &b.problem)));
    report.findings.dedup_by(|a, b| a.class == Class::Missing && b.class == Class::Missing && a.unit == b.unit);
    report.bytes_read = bucket.lock().unwrap_or_else(PoisonError::into_inner).1;
    report.wall_s = clock.elapsed().as_secs_f64();
    Ok(report)
}

/// Units that hold items of a unit whose content is wrong: units of a family take each other's rows.
fn sharing(store: &Store, findings: &[Finding]) -> Result<Vec<Finding>> {
    let mut wrong: BTreeSet<String> =
        findings.iter().filter(|finding| finding.class == Class::Wrong).filter_map(|finding| finding.unit.clone()).collect();
    let (mut open, mut found) = (wrong.iter().cloned().collect::<Vec<_>>(), Vec::new());
    let noted = if open.is_empty() { BTreeMap::new() } else { store.noted_units()? };
    while let Some(unit) = open.pop() {
        let Status::Valid(record) = store.unit_at(&unit)? else { continue };
        // A list that is damaged is a finding of its own.
        let items: BTreeSet<_> = store.items_of(&record).unwrap_or_default().into_iter().collect();
        for (other, _) in noted.iter().filter(|(_, noted)| record.key.family.is_some() && noted.family == record.key.family) {
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

/// What was made from units whose content is wrong. Bytes that were damaged after they were published are read by nobody: who reads, checks.
fn tainted(store: &Store, findings: &[Finding]) -> Result<Vec<Finding>> {
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
        problem: format!("`{}` was made from content that is wrong", manifest.recipe.kind),
    };
    Ok(Store::made_from(&manifests, &sources).into_iter().map(finding).collect())
}

/// Sets aside what is bad, makes it again through its recipe, and looks again. Everything else stays untouched.
fn fix(store: &Store, wish: &Wish, report: &mut Report) -> Result<()> {
    let manifests = store.manifests()?;
    let is_record = |finding: &&Finding| finding.class == Class::Record;
    // The home's format first: nothing else can be entered without.
    let mut records: Vec<Finding> = report.findings.iter().filter(is_record).cloned().collect();
    records.sort_by_key(|finding| !finding.path.ends_with("format.json"));
    for finding in records {
        let what = finding.path.display().to_string();
        match mend::mend(store, &finding) {
            Ok(Mended::Again(how)) => report.repaired.push(format!("{what}: {how}")),
            Ok(Mended::Lost(why)) => report.lost.push(Lost { what, why }),
            Err(error) => report.lost.push(Lost { what, why: error.words() }),
        }
    }
    let (_session, _swept) = store.enter()?;
    let mut bad_units: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // Folder names of artifacts that have to be there again.
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for finding in &report.findings {
        match (finding.class, &finding.unit) {
            (Class::Damaged | Class::Wrong | Class::Missing, Some(unit)) => {
                bad_units.entry(unit.clone()).or_default().push(format!("{}: {}", finding.path.display(), finding.problem));
            }
            (Class::Choice, _) => drop(store.publisher().set_aside(&finding.path, &store.home().join("quarantine").join("choices"))?),
            (Class::Foreign, _) => drop(store.publisher().set_aside(&finding.path, &store.home().join("quarantine").join("foreign"))?),
            (Class::Manifest | Class::Tainted, _) => {
                // Nothing happens to one that is gone; one that comes out the same is published again from its units.
                store.quarantine_manifest(&finding.path, &finding.problem)?;
                wanted.extend(finding.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
            }
            (Class::Input, _) => {
                let why = format!("{}; restore the file: it is the only copy", finding.problem);
                report.lost.push(Lost { what: finding.path.display().to_string(), why });
            }
            (Class::Damaged | Class::Wrong | Class::Missing | Class::Record | Class::Leftover | Class::Ledger | Class::Suspect, _) => {}
        }
    }
    for (unit, problems) in &bad_units {
        let is_wrong = report.findings.iter().any(|finding| finding.class == Class::Wrong && finding.unit.as_ref() == Some(unit));
        match store.lease(unit)? {
            Err(holder) => {
                let why = format!("{} is making it; verify again later", holder.words());
                report.lost.push(Lost { what: unit.clone(), why });
            }
            Ok(_lease) => {
                let aside = if is_wrong { store.condemn(unit, problems)? } else { store.quarantine(unit, problems)? };
                if aside.is_none() {
                    store.note_gone(unit, &problems.join("; "))?;
                }
            }
        }
        for manifest in manifests.iter().filter(|manifest| manifest.unit_names().any(|listed| listed == *unit)) {
            wanted.insert(manifest.fingerprint.short());
            // What is right is other content to those that read it.
            if is_wrong {
                let path = store.manifest_path(&manifest.recipe.kind, &manifest.fingerprint);
                store.quarantine_manifest(&path, &format!("what its unit {unit} says is wrong"))?;
            }
        }
    }
    for (run, steps) in runs_of(store, &wanted, &mut report.lost) {
        let made = read_request(store, &run).and_then(|pipeline| {
            let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| steps.contains(&pipeline.steps[*place].id)).collect();
            let needed = plan::needed(&pipeline, &places);
            let mut screen = Screen::new();
            run::run(&Arc::new(pipeline), &needed, store, &Options { is_repair: true, ..wish.options.clone() }, &mut |event| {
                screen.show(event);
            })
        });
        match made {
            Ok(ended) => {
                if let Some(error) = ended.error {
                    report.lost.push(Lost {
                        what: format!("{} of run {run}", steps.iter().cloned().collect::<Vec<_>>().join(", ")),
                        why: error.words(),
                    });
                }
            }
            Err(error) => report
                .lost
                .push(Lost { what: format!("{} of run {run}", steps.iter().cloned().collect::<Vec<_>>().join(", ")), why: error.words() }),
        }
    }
    // Look again, at what was bad and at nothing else.
    let listed_now: BTreeSet<String> = store.manifests()?.iter().flat_map(Manifest::unit_names).collect();
    for unit in bad_units.keys() {
        let listed = manifests.iter().flat_map(|manifest| {
            let kind = &manifest.recipe.kind;
            manifest.units.iter().filter(move |listed| ovenbird_cache::unit_name(kind, &listed.key.fingerprint) == *unit)
        });
        let before = listed.into_iter().next().map(|listed| listed.files.clone());
        let still = store.verify_unit(unit, wish.depth.max(Depth::Full), &|_| {})?;
        if let Some(finding) = still.iter().find(|finding| finding.class == Class::Wrong) {
            let why = format!("made again, and wrong again: {}; look at what it is made from", finding.problem);
            report.lost.push(Lost { what: unit.clone(), why });
            continue;
        }
        let still_bad = still.iter().any(|finding| finding.class == Class::Damaged);
        match (store.unit_at(unit)?, before) {
            (Status::Valid(now), Some(before)) if !still_bad && now.files == before => {
                report.repaired.push(format!("{unit}: made again, with the same digests"));
            }
            (Status::Valid(_), Some(_)) if !still_bad => report.repaired.push(format!("{unit}: made again, with other digests")),
            (Status::Valid(_), None) if !still_bad => report.repaired.push(format!("{unit}: is sound again")),
            // Made from what was wrong itself, it has another name now.
            (Status::Absent, _) if !listed_now.contains(unit) => report.repaired.push(format!("{unit}: set aside; no artifact needs it")),
            _ => {
                let why = "could not be made again; what depends on it can be read no more".to_owned();
                report.lost.push(Lost { what: unit.clone(), why });
            }
        }
    }
    Ok(())
}

/// The runs that make artifacts again, each with the steps that it had them in: of every pipeline that has an artifact now its latest run
/// with it; otherwise the latest of any.
fn runs_of(store: &Store, wanted: &BTreeSet<String>, lost: &mut Vec<Lost>) -> BTreeMap<String, BTreeSet<String>> {
    let last = plan::Last::of_all(store).unwrap_or_default();
    let now: BTreeMap<String, BTreeMap<String, Fingerprint>> =
        last.into_iter().map(|last| (plan::Last::place(&last.pipeline, last.file.as_deref()), last.steps)).collect();
    // Of each artifact, the latest first: run, pipeline, step, and whether the pipeline has it there now.
    let mut had: BTreeMap<String, Vec<(String, String, String, bool)>> = BTreeMap::new();
    for run in event::runs(store.home()).into_iter().rev().filter(|run| store.home().join(request_place(run)).exists()) {
        let mut pipeline = String::new();
        for stamped in event::read_log(store.home(), &run).unwrap_or_default() {
            match stamped.event {
                Event::RunStarted { pipeline: name, file, .. } => pipeline = plan::Last::place(&name, file.as_deref()),
                Event::StepChecked { step, fingerprint, .. } if wanted.contains(&fingerprint.short()) => {
                    let is_now = now.get(&pipeline).and_then(|steps| steps.get(&step)) == Some(&fingerprint);
                    had.entry(fingerprint.short()).or_default().push((run.clone(), pipeline.clone(), step, is_now));
                }
                _ => {}
            }
        }
    }
    let mut runs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for artifact in wanted {
        let Some(candidates) = had.get(artifact) else {
            let why = "no run that made it is recorded; run its pipeline again".to_owned();
            lost.push(Lost { what: format!("artifact {artifact}"), why });
            continue;
        };
        let mut pipelines = BTreeSet::new();
        let now = candidates.iter().filter(|(_, pipeline, step, is_now)| *is_now && pipelines.insert((pipeline, step)));
        let mut chosen: Vec<_> = now.collect();
        chosen.extend(candidates.first().filter(|_| chosen.is_empty()));
        for (run, _, step, _) in chosen {
            runs.entry(run.clone()).or_default().insert(step.clone());
        }
    }
    runs
}

/// Where a run keeps what it was asked, in the home.
pub(crate) fn request_place(run: &str) -> String {
    format!("runs/{run}/request.json")
}

/// Reads the pipeline of a run again, and goes to the folder that its paths are relative to.
pub(crate) fn read_request(store: &Store, run: &str) -> Result<Pipeline> {
    let path = || store.home().join(request_place(run));
    let request: Option<Request> = store.kept(&request_place(run))?;
    let request = request.ok_or_else(|| ovenbird_cache::Error::Read { path: path(), source: ErrorKind::NotFound.into() })?;
    std::env::set_current_dir(&request.folder).map_err(|source| ovenbird_cache::Error::Read { path: request.folder.clone(), source })?;
    pipeline::read(format!("the pipeline of run {run}"), request)
}

fn how_to_repair(class: Class) -> &'static str {
    match class {
        Class::Damaged | Class::Missing | Class::Manifest => "`ovenbird verify --fix` sets it aside and makes it again",
        Class::Wrong => "`ovenbird verify --fix` makes it again, and what was made from it",
        Class::Tainted => "`ovenbird verify --fix` makes it again, if what it was made from comes out otherwise",
        Class::Record => "`ovenbird verify --fix` mends it as other records tell, or says what is lost; `cache gc` removes nothing before",
        Class::Choice => "`ovenbird verify --fix` sets it aside: it is read off the units that are there",
        Class::Foreign => "`ovenbird verify --fix` moves it into the quarantine",
        Class::Leftover => "the next run, or `ovenbird verify --fix`, removes it",
        Class::Ledger => "nothing to do: it is begun anew",
        Class::Input => "restore the file from where it came from",
        Class::Suspect => "the bytes are what was published; look whether the images and boxes they were made from are right",
    }
}

fn words(report: &Report, wish: &Wish) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let class = json!(finding.class);
        let class = class.as_str().unwrap_or_default().to_owned();
        text.push_str(&format!("{class:9} {}: {}\n", finding.path.display(), finding.problem));
        if !wish.fix {
            text.push_str(&format!("          {}\n", how_to_repair(finding.class)));
        }
    }
    text.extend(report.repaired.iter().map(|repaired| format!("repaired  {repaired}\n")));
    text.extend(report.lost.iter().map(|lost| format!("lost      {}: {}\n", lost.what, lost.why)));
    if let Some(audit) = &report.recomputed {
        text.push_str(&audit.words());
    }
    if report.continued_after > 0 {
        text.push_str(&format!("continued after {} that an earlier scan had done\n", count(report.continued_after, "unit")));
    }
    let depth = json!(wish.depth);
    let rate = HumanBytes((report.bytes_read as f64 / report.wall_s.max(1e-9)) as u64);
    text.push_str(&format!(
        "{} verified ({}), {} read in {} ({rate}/s), {}\n",
        count(report.units, "unit"),
        depth.as_str().unwrap_or_default(),
        HumanBytes(report.bytes_read),
        duration(report.wall_s),
        count(report.findings.len(), "finding"),
    ));
    if report.never_verified > 0 && !report.is_cut_short {
        text.push_str(&format!("{} had never been verified as closely as this\n", count(report.never_verified, "unit")));
    }
    if report.is_cut_short {
        text.push_str("time is up: type the same command again to continue\n");
    }
    text
}
