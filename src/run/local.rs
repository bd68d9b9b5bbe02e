//! Runs steps on this machine: a worker computes the missing units of a step, or of several steps that share a pass over their
//! images, waits for units that other processes compute, and publishes the artifacts.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::HumanBytes;
use jiff::Timestamp;
use ovenbird_cache::{Artifact, Claim, Lease, Owner, Provenance, Status, Store, UnitRecord, Watch, unit_name};
use ovenbird_stages::{AnyStage, Context, OnBadItem, Progress, Unit, count_failed, refuse_too_many, run_together};

use crate::{
    error::{Error, Result},
    machine::{self, free_space},
    output::count,
    pipeline::Step,
    plan::{self, Work},
};

/// How often to check whether another process has computed a unit, or the disk has space again.
const CHECK_EVERY: Duration = Duration::from_millis(200);
/// How often a unit is recomputed that is damaged as soon as it is published.
const MAX_DAMAGES: usize = 3;
/// How much has to be freed before a run continues that found the disk full, in bytes.
const MIN_FREED: u64 = 16 << 20;
/// The device of stages without a network.
const CPU: &[tch::Device] = &[tch::Device::Cpu];

/// The resources of a run; results do not depend on them.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Processor cores for all steps together.
    pub(crate) cpu: usize,
    /// Memory for all steps together, in bytes.
    pub(crate) memory: u64,
    /// Devices for networks, at least one: see [`crate::devices`].
    pub(crate) devices: Vec<tch::Device>,
    /// Whether to hash every input file again.
    pub(crate) rehash: bool,
    /// Whether steps run one after the other, so that each is measured by itself.
    pub(crate) is_measuring: bool,
    /// Whether the run repairs damaged results: it does not count as the pipeline's latest run.
    pub(crate) is_repair: bool,
    /// How long running steps have to keep what they have finished, once the user has asked to stop.
    pub(crate) grace: Duration,
    /// The places of the steps that are computed again though their artifacts are stored.
    pub(crate) forced: Vec<usize>,
}

/// Why a worker ended without an artifact.
pub(crate) enum Failure {
    Known(Error),
    /// A panic, which is always a bug of this program.
    Bug(String),
}

/// Calls a function; a panic is returned as a failure.
pub(crate) fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Failure::Known),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
            Err(Failure::Bug(words.unwrap_or_else(|| "a panic without a message".into())))
        }
    }
}

/// The data that all workers of a run share.
#[derive(Clone, Copy)]
pub(crate) struct WorkerContext<'a> {
    pub(crate) store: &'a Store,
    /// The devices of the steps: see [`crate::devices`]. Several only for units that hold items.
    pub(crate) devices: &'a [tch::Device],
    /// The run's id.
    pub(crate) run: &'a str,
    /// Set when the user asks to stop.
    pub(crate) stop: &'a AtomicBool,
}

/// A step to run.
pub(crate) struct Task<'a> {
    pub(crate) step: &'a Step,
    pub(crate) work: Box<Work>,
    /// Receives progress.
    pub(crate) report: &'a (dyn Fn(Progress) + Send + Sync),
}

/// Runs some steps, which share a pass where there are several; returns the artifact or failure of each.
///
/// If the shared pass fails, each step continues alone, so that only the faulty one fails.
pub(crate) fn run_steps(tasks: &[Task<'_>], context: WorkerContext<'_>) -> Vec<Result<Artifact, Failure>> {
    let runs: Vec<StepRun<'_>> = tasks.iter().map(|task| StepRun::new(task, context)).collect();
    if let [one] = &runs[..] {
        return vec![guard(|| one.begin().and_then(|()| run_missing(&runs)).and_then(|()| one.publish()))];
    }
    let together = guard(|| runs.iter().try_for_each(StepRun::begin).and_then(|()| run_missing(&runs)));
    let is_stopped = matches!(&together, Err(Failure::Known(Error::Stage(ovenbird_stages::Error::Stopped))));
    let alone = |one: &StepRun<'_>| {
        guard(|| {
            if together.is_err() && !is_stopped {
                run_missing(std::slice::from_ref(one))?;
            }
            one.proceed()?;
            one.publish()
        })
    };
    runs.iter().map(alone).collect()
}

/// Computes a step again whose artifact is stored; the stored one stays if the step fails or is stopped. Results go to a home of their own,
/// and replace the stored ones only where they differ.
pub(crate) fn run_anew(task: &Task<'_>, stored: &Artifact, context: WorkerContext<'_>) -> Result<Artifact, Failure> {
    let (store, kind) = (context.store, task.step.entry.kind);
    let fingerprint = task.work.recipe.fingerprint();
    // Another process that forces the same step would work in the same folder.
    let folder = store.home().join("dry-run").join(format!("force-{}", unit_name(kind, &fingerprint).replace('/', ".")));
    let lease = guard(|| match store.lease(&format!("{}.force", unit_name(kind, &fingerprint)))? {
        Ok(lease) => Ok(lease),
        Err(holder) => Err(Error::ForcedElsewhere { holder: holder.words() }),
    })?;
    let separate = guard(|| Ok(Store::open(&folder)?))?;
    let session = guard(|| Ok(separate.enter()?))?;
    // The precision of a network and such: the same choice gives the same bytes.
    guard(|| Ok(separate.take_choices(store, kind)?))?;
    let computed = run_steps(std::slice::from_ref(task), WorkerContext { store: &separate, ..context }).into_iter().next();
    let computed = computed.expect("BUG: one step has one result")?;
    let ended = guard(|| {
        let differing: Vec<&str> = computed
            .manifest
            .ports
            .iter()
            .filter(|(port, digest)| stored.manifest.ports.get(*port) != Some(*digest))
            .map(|(port, _)| port.as_str())
            .collect();
        if differing.is_empty() {
            (task.report)(Progress::Note("computed again: the same bytes".into()));
            return Ok(stored.clone());
        }
        (task.report)(Progress::Note(format!("computed again: different: {}; the earlier result is in quarantine", differing.join(", "))));
        replace(store, stored, &separate, &computed)
    })?;
    drop(session);
    guard(|| Ok(store.publisher().remove(&folder)?))?;
    drop(lease);
    Ok(ended)
}

/// Moves an artifact to quarantine, and puts one of another home in its place. After a crash in between, the step is computed again.
fn replace(store: &Store, stored: &Artifact, from: &Store, by: &Artifact) -> Result<Artifact> {
    let why = "computed again by force, with a different result";
    let recipe = &stored.manifest.recipe;
    store.quarantine_manifest(&store.manifest_path(&recipe.kind, &stored.manifest.fingerprint), why)?;
    for unit in &by.manifest.units {
        let name = unit_name(&recipe.kind, &unit.key.fingerprint);
        store.condemn(&name, &[why.into()])?;
        store.adopt_unit(from, &name)?;
    }
    let ports: Vec<&str> = by.manifest.ports.keys().map(String::as_str).collect();
    Ok(store.commit_artifact(recipe.clone(), &ports, by.manifest.units.clone(), by.manifest.made.clone())?)
}

/// A step that is running.
struct StepRun<'a> {
    task: &'a Task<'a>,
    context: WorkerContext<'a>,
    started: Timestamp,
    clock: Instant,
    n_failed: AtomicU64,
    /// Locked only briefly.
    watch: Mutex<Watch>,
    /// The process that this one waits for. Only one thread locks it.
    waits_for: Mutex<Option<Owner>>,
    /// By unit: how often it was damaged.
    damages: Mutex<BTreeMap<usize, usize>>,
}

/// A step's part in a pass.
struct Share<'a> {
    run: &'a StepRun<'a>,
    units: Vec<Unit>,
    lease: Option<Lease>,
}

/// The work that is left for a step.
enum Pending {
    Nothing,
    /// Other processes are computing all missing units.
    Elsewhere,
    /// These units. The lease is for the whole step where its units hold no items.
    Units(Vec<Unit>, Option<Lease>),
}

/// Runs until no unit of any step is missing.
fn run_missing(runs: &[StepRun<'_>]) -> Result<()> {
    loop {
        let (mut due, mut is_waiting) = (Vec::new(), false);
        for run in runs {
            match run.pending()? {
                Pending::Nothing => {}
                Pending::Elsewhere => is_waiting = true,
                Pending::Units(units, lease) => due.push(Share { run, units, lease }),
            }
        }
        match &due[..] {
            [] if is_waiting => thread::sleep(CHECK_EVERY),
            [] => return Ok(()),
            [first, ..] => match due.iter().try_for_each(|share| share.run.count_failed()).map(|()| run_on_devices(&due))? {
                Err(error) if error.is_disk_full() => wait_for_space(first.run)?,
                result => result?,
            },
        }
    }
}

/// Runs stages in one pass on each of their devices, with a thread for each device: units that hold items are claimed one by one, so
/// devices share them as processes do. Stages without a network run once.
///
/// A failure on one device stops the others.
fn run_on_devices(due: &[Share<'_>]) -> Result<(), ovenbird_stages::Error> {
    let WorkerContext { devices, stop, .. } = due[0].run.context;
    let devices = if devices.is_empty() { CPU } else { devices };
    assert!(devices.len() == 1 || due.iter().all(|share| share.lease.is_none()), "BUG: a step that cannot be shared has one device");
    let has_failed = AtomicBool::new(false);
    let is_stopped = || stop.load(Ordering::Relaxed) || has_failed.load(Ordering::Relaxed);
    let run_on = |device: tch::Device| {
        let contexts: Vec<Context<'_>> = due.iter().map(|share| share.run.stage_context(device, devices.len(), &is_stopped)).collect();
        let result = match (due, &contexts[..]) {
            ([share], [context]) => share.run.task.step.stage.run(&share.units, context),
            _ => {
                let stages = due
                    .iter()
                    .zip(&contexts)
                    .map(|(Share { run, units, .. }, context)| (run.task.step.entry, &*run.task.step.stage, &units[..], context));
                run_together(&stages.collect::<Vec<(_, &dyn AnyStage, _, _)>>())
            }
        };
        if result.is_err() {
            has_failed.store(true, Ordering::Relaxed);
        }
        result
    };
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = devices[1..].iter().map(|device| scope.spawn(|| run_on(*device))).collect();
        let first = run_on(devices[0]);
        let others = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        std::iter::once(first).chain(others).collect()
    });
    // Devices that stopped because of a failure on another one are not the cause.
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    let is_cause = |failure: &ovenbird_stages::Error| !matches!(failure, ovenbird_stages::Error::Stopped);
    let cause = failures.iter().position(is_cause).unwrap_or(0);
    failures.into_iter().nth(cause).map_or(Ok(()), Err)
}

impl<'a> StepRun<'a> {
    fn new(task: &'a Task<'a>, context: WorkerContext<'a>) -> Self {
        Self {
            task,
            context,
            started: Timestamp::now(),
            clock: Instant::now(),
            n_failed: AtomicU64::new(0),
            watch: Mutex::default(),
            waits_for: Mutex::default(),
            damages: Mutex::default(),
        }
    }

    /// The context of the stage on one of several devices.
    fn stage_context<'b>(&'b self, device: tch::Device, n_devices: usize, is_stopped: &'b (dyn Fn() -> bool + Sync)) -> Context<'b> {
        let Task { step, work, report } = self.task;
        Context {
            store: self.context.store,
            kind: step.entry.kind,
            units: &work.units,
            items: &work.items,
            inputs: &work.inputs,
            most_items: step.most_items,
            device,
            has_bf16: machine::has_bf16(device),
            threads: step.resources.cpu.div_ceil(n_devices),
            on_bad_item: step.on_bad_item,
            n_failed: &self.n_failed,
            watch: &self.watch,
            is_stopped,
            report,
        }
    }

    /// Fails once the user has asked to stop.
    fn proceed(&self) -> Result<()> {
        if self.context.stop.load(Ordering::Relaxed) { Err(ovenbird_stages::Error::Stopped.into()) } else { Ok(()) }
    }

    /// Reports the amount of work, and records the planned units.
    fn begin(&self) -> Result<()> {
        let Task { step, work, report } = self.task;
        let n_items: usize = work.missing.iter().map(|unit| work.units[*unit].items.len()).sum();
        if n_items > 0 {
            report(Progress::Total(n_items as u64));
        }
        let (store, kind) = (self.context.store, step.entry.kind);
        self.count_failed()?;
        let item_key = work.units.first().and_then(|unit| unit.item_key);
        if let Some(unit_bytes) = store.mean_unit_bytes(kind, item_key)?
            && let Some(words) = lacks_space(store, work.missing.len(), unit_bytes)
        {
            report(Progress::Note(words));
        }
        Ok(store.write_plan(&work.recipe, &work.units.iter().map(|unit| unit.fingerprint).collect::<Vec<_>>())?)
    }

    /// Counts the failed items of published units, of all processes; fails where they are more than the policy allows.
    fn count_failed(&self) -> Result<()> {
        let (Task { step, work, .. }, store) = (self.task, self.context.store);
        let OnBadItem::Skip { max_failed_ratio } = step.on_bad_item else { return Ok(()) };
        let mut published = Vec::new();
        for unit in &work.units {
            if let Status::Valid(record) = store.unit(step.entry.kind, &unit.fingerprint)? {
                published.push(record);
            }
        }
        let (counts, last) = count_failed(store, &published, work.items.len())?;
        self.n_failed.store(counts[0] as u64, Ordering::Relaxed);
        Ok(refuse_too_many(counts, max_failed_ratio, &last)?)
    }

    /// The missing units; damaged ones are set aside.
    fn pending(&self) -> Result<Pending> {
        let (Task { step, work, report }, store) = (self.task, self.context.store);
        let kind = step.entry.kind;
        loop {
            let missing = plan::missing(step, store, &work.units, work.is_chain)?;
            if missing.is_empty() {
                return Ok(Pending::Nothing);
            }
            self.proceed()?;
            // The stage claims units with items one by one; other steps are claimed as a whole.
            let first = &work.units[missing[0]];
            let claimed = if first.item_key.is_some() { &first.fingerprint } else { &work.recipe.fingerprint() };
            let claim = store.claim(kind, claimed, &mut self.watch.lock().unwrap_or_else(PoisonError::into_inner))?;
            let lease = match claim {
                Claim::Mine(lease) => lease,
                Claim::Made(record) if plan::is_whole(step, &record) => continue,
                Claim::Made(record) => {
                    store.quarantine(&unit_name(kind, &record.key.fingerprint), &["some items failed".into()])?;
                    continue;
                }
                Claim::Held(holder) => {
                    let mut waits_for = self.waits_for.lock().unwrap_or_else(PoisonError::into_inner);
                    if waits_for.as_ref() != Some(&holder) {
                        report(Progress::Note(format!("waits for {}, which is computing it", holder.words())));
                        *waits_for = Some(holder);
                    }
                    report(Progress::Waiting);
                    return Ok(Pending::Elsewhere);
                }
            };
            let missing: Vec<Unit> = missing.into_iter().map(|unit| work.units[unit].clone()).collect();
            for unit in &missing {
                match store.unit(kind, &unit.fingerprint)? {
                    Status::Damaged(findings) => {
                        let mut damages = self.damages.lock().unwrap_or_else(PoisonError::into_inner);
                        let n_times = damages.entry(unit.index).or_default();
                        *n_times += 1;
                        if *n_times > MAX_DAMAGES {
                            return Err(damaged(store, kind, unit, &format!("again and again: {}", findings.join("; "))));
                        }
                        drop(store.quarantine(&unit_name(kind, &unit.fingerprint), &findings)?);
                    }
                    Status::Valid(record) if !plan::is_whole(step, &record) => {
                        drop(store.quarantine(&unit_name(kind, &unit.fingerprint), &["some items failed".into()])?);
                        // With more items the artifact changes for steps that read it.
                        store.quarantine_manifest(&store.manifest_path(kind, &work.recipe.fingerprint()), "some items failed")?;
                    }
                    Status::Valid(_) | Status::Absent => {}
                }
            }
            // The stage claims units with items itself.
            let lease = first.item_key.is_none().then_some(lease);
            return Ok(Pending::Units(missing, lease));
        }
    }

    /// Publishes the artifact from its units.
    fn publish(&self) -> Result<Artifact> {
        self.count_failed()?;
        let (Task { step, work, .. }, store) = (self.task, self.context.store);
        let (kind, units) = (step.entry.kind, &work.units);
        let record = |unit: &Unit| -> Result<UnitRecord> {
            match store.unit(kind, &unit.fingerprint)? {
                Status::Valid(record) => Ok(record),
                Status::Damaged(findings) => Err(damaged(store, kind, unit, &findings.join("; "))),
                Status::Absent => Err(damaged(store, kind, unit, "is missing")),
            }
        };
        let records = units.iter().filter(|unit| unit.stays).map(record).collect::<Result<Vec<_>>>()?;
        let made = Provenance {
            program: format!("ovenbird {}", env!("CARGO_PKG_VERSION")),
            run: self.context.run.to_owned(),
            host: machine::host(),
            device: machine::device_names(if step.entry.uses_device { self.context.devices } else { CPU }),
            libtorch: ovenbird_models::LIBTORCH.into(),
            started: self.started.to_string(),
            wall_s: self.clock.elapsed().as_secs_f64(),
        };
        let ports: Vec<&str> = step.entry.outputs.iter().map(|port| port.name).collect();
        Ok(store.commit_artifact(work.recipe.clone(), &ports, records, made)?)
    }
}

/// The error of a unit that is damaged right after it was published.
fn damaged(store: &Store, kind: &str, unit: &Unit, problem: &str) -> Error {
    let path = store.unit_path(&unit_name(kind, &unit.fingerprint));
    ovenbird_cache::Error::Malformed { path, problem: format!("was published just now, and is damaged: {problem}") }.into()
}

/// A warning where the disk has no space for some units of a size.
pub(crate) fn lacks_space(store: &Store, n_units: usize, unit_bytes: u64) -> Option<String> {
    let (free, needed) = (free_space(store.home()), n_units as u64 * unit_bytes);
    (needed > free).then(|| {
        let (needed, free) = (HumanBytes(needed), HumanBytes(free));
        let at = store.home().display();
        format!("needs about {needed} for {}, and {free} are free at {at}: it will pause when the disk is full", count(n_units, "unit"))
    })
}

/// Waits until the disk has space again. Unfinished units are lost and computed again.
fn wait_for_space(run: &StepRun<'_>) -> Result<()> {
    let (store, report) = (run.context.store, run.task.report);
    let at_least = free_space(store.home()) + MIN_FREED;
    let words =
        format!("the disk is full: paused. Free {} or more at {}, and the run continues", HumanBytes(MIN_FREED), store.home().display());
    report(Progress::Note(words));
    while free_space(store.home()) < at_least {
        run.proceed()?;
        report(Progress::Waiting);
        thread::sleep(CHECK_EVERY);
    }
    report(Progress::Note("the disk has space again: continues".into()));
    Ok(())
}
