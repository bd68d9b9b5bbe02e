//! What a worker does: makes the missing units of a step, or of several steps that share a pass over their images, waits for
//! what other processes make, and publishes the artifacts.

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
use ovenbird_stages::{AnyStage, Context, OnBadItem, Progress, Unit, failed_items, refuse_too_many, run_together};

use crate::{
    error::{Error, Result, count},
    machine::{self, free_space},
    pipeline::Step,
    plan::{self, Work},
};

/// How often to look whether another process has made what this one waits for.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often a unit is made again that is damaged as soon as it is published.
const MAX_DAMAGES: usize = 3;
/// How much has to be freed before a run that found the disk full goes on, in bytes.
const LEAST_ROOM: u64 = 16 << 20;
/// Where stages run that have no network.
const CPU: &[tch::Device] = &[tch::Device::Cpu];

/// Why a worker ended without an artifact.
pub(crate) enum Failure {
    Known(Error),
    /// A panic, which is always ours.
    Bug(String),
}

/// Runs something on a worker's thread; a panic comes back as a failure.
pub(crate) fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Failure::Known),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
            Err(Failure::Bug(words.unwrap_or_else(|| "a panic without words".into())))
        }
    }
}

/// What every worker of a run has.
#[derive(Clone, Copy)]
pub(crate) struct Shop<'a> {
    pub(crate) store: &'a Store,
    /// Those of the steps that run networks: see [`crate::devices`]. Several only for units that hold items.
    pub(crate) devices: &'a [tch::Device],
    /// The run's id.
    pub(crate) run: &'a str,
    /// Set when the operator asks to stop.
    pub(crate) stop: &'a AtomicBool,
}

/// A step to be made.
pub(crate) struct Task<'a> {
    pub(crate) step: &'a Step,
    pub(crate) work: Box<Work>,
    /// Receives progress.
    pub(crate) report: &'a (dyn Fn(Progress) + Send + Sync),
}

/// Makes some steps, which share a pass where there are several; says of each what came of it.
///
/// Where the shared pass fails, each goes on alone: one that is at fault does not take the others with it.
pub(crate) fn make(tasks: &[Task<'_>], shop: Shop<'_>) -> Vec<Result<Artifact, Failure>> {
    let making: Vec<Making<'_>> = tasks.iter().map(|task| Making::new(task, shop)).collect();
    if let [one] = &making[..] {
        return vec![guard(|| one.begin().and_then(|()| work_on(&making)).and_then(|()| one.publish()))];
    }
    let together = guard(|| making.iter().try_for_each(Making::begin).and_then(|()| work_on(&making)));
    let is_stopped = matches!(&together, Err(Failure::Known(Error::Stage(ovenbird_stages::Error::Stopped))));
    let alone = |one: &Making<'_>| {
        guard(|| {
            if together.is_err() && !is_stopped {
                work_on(std::slice::from_ref(one))?;
            }
            one.proceed()?;
            one.publish()
        })
    };
    making.iter().map(alone).collect()
}

/// A step in the making.
struct Making<'a> {
    task: &'a Task<'a>,
    shop: Shop<'a>,
    started: Timestamp,
    clock: Instant,
    n_failed: AtomicU64,
    /// Held for a moment.
    watch: Mutex<Watch>,
    /// Nobody waits for it: one worker holds it.
    waits_for: Mutex<Option<Owner>>,
    /// How often each unit was found damaged.
    damages: Mutex<BTreeMap<usize, usize>>,
}

/// A step's part in a pass.
struct Share<'a> {
    making: &'a Making<'a>,
    units: Vec<Unit>,
    lease: Option<Lease>,
}

/// What there is to do for a step.
enum Due {
    Nothing,
    /// Other processes are at all of it.
    Later,
    /// These units. The lease is on the whole step, where its units hold no items.
    Units(Vec<Unit>, Option<Lease>),
}

/// Works until nothing is missing of any of the steps.
fn work_on(making: &[Making<'_>]) -> Result<()> {
    loop {
        let (mut due, mut is_waiting) = (Vec::new(), false);
        for making in making {
            match making.due()? {
                Due::Nothing => {}
                Due::Later => is_waiting = true,
                Due::Units(units, lease) => due.push(Share { making, units, lease }),
            }
        }
        match &due[..] {
            [] if is_waiting => thread::sleep(LOOK_EVERY),
            [] => return Ok(()),
            [first, ..] => match due.iter().try_for_each(|share| share.making.count_failed()).map(|()| run_on_devices(&due))? {
                Err(error) if error.is_disk_full() => wait_for_room(first.making)?,
                result => result?,
            },
        }
    }
}

/// Runs stages in one pass on every device that they were given, on a thread for each: units that hold items are claimed one by one,
/// so that devices share them as processes do. Stages that run no network run once.
///
/// What fails on one device stops the others.
fn run_on_devices(due: &[Share<'_>]) -> Result<(), ovenbird_stages::Error> {
    let Shop { devices, stop, .. } = due[0].making.shop;
    let devices = if devices.is_empty() { CPU } else { devices };
    assert!(devices.len() == 1 || due.iter().all(|share| share.lease.is_none()), "BUG: a step that cannot be shared has one device");
    let has_failed = AtomicBool::new(false);
    let is_stopped = || stop.load(Ordering::Relaxed) || has_failed.load(Ordering::Relaxed);
    let run_on = |device: tch::Device| {
        let contexts: Vec<Context<'_>> = due.iter().map(|share| share.making.context(device, devices.len(), &is_stopped)).collect();
        let result = match (due, &contexts[..]) {
            ([share], [context]) => share.making.task.step.stage.run(&share.units, context),
            _ => {
                let stages = due
                    .iter()
                    .zip(&contexts)
                    .map(|(Share { making, units, .. }, context)| (making.task.step.entry, &*making.task.step.stage, &units[..], context));
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
    // Devices that were stopped because of another one's failure are not the cause.
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    let is_cause = |failure: &ovenbird_stages::Error| !matches!(failure, ovenbird_stages::Error::Stopped);
    let cause = failures.iter().position(is_cause).unwrap_or(0);
    failures.into_iter().nth(cause).map_or(Ok(()), Err)
}

impl<'a> Making<'a> {
    fn new(task: &'a Task<'a>, shop: Shop<'a>) -> Self {
        Self {
            task,
            shop,
            started: Timestamp::now(),
            clock: Instant::now(),
            n_failed: AtomicU64::new(0),
            watch: Mutex::default(),
            waits_for: Mutex::default(),
            damages: Mutex::default(),
        }
    }

    /// What the stage may use on one of some devices.
    fn context<'b>(&'b self, device: tch::Device, n_devices: usize, is_stopped: &'b (dyn Fn() -> bool + Sync)) -> Context<'b> {
        let Task { step, work, report } = self.task;
        Context {
            store: self.shop.store,
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

    /// Fails once the operator has asked to stop.
    fn proceed(&self) -> Result<()> {
        if self.shop.stop.load(Ordering::Relaxed) { Err(ovenbird_stages::Error::Stopped.into()) } else { Ok(()) }
    }

    /// Says how much there is to do, and writes down which units there will be.
    fn begin(&self) -> Result<()> {
        let Task { step, work, report } = self.task;
        let n_items: usize = work.missing.iter().map(|unit| work.units[*unit].items.len()).sum();
        if n_items > 0 {
            report(Progress::Total(n_items as u64));
        }
        let (store, kind) = (self.shop.store, step.entry.kind);
        self.count_failed()?;
        let family = work.units.first().and_then(|unit| unit.family);
        if let Some(unit_bytes) = store.mean_unit_bytes(kind, family)?
            && let Some(words) = lacks_room(store, work.missing.len(), unit_bytes)
        {
            report(Progress::Note(words));
        }
        Ok(store.write_plan(&work.recipe, &work.units.iter().map(|unit| unit.fingerprint).collect::<Vec<_>>())?)
    }

    /// Counts the items that failed in published units, whoever made them; fails where they are more than the policy allows.
    fn count_failed(&self) -> Result<()> {
        let (Task { step, work, .. }, store) = (self.task, self.shop.store);
        let OnBadItem::Skip { max_failed_ratio } = step.on_bad_item else { return Ok(()) };
        let (mut n_failed, mut last) = (0, String::new());
        for unit in work.units.iter().filter(|unit| unit.family.is_some()) {
            if let Status::Valid(record) = store.unit(step.entry.kind, &unit.fingerprint)? {
                let failed = failed_items(store, &record)?;
                n_failed += failed.len();
                last = failed.into_iter().next_back().map_or(last, |failed| failed.reason);
            }
        }
        self.n_failed.store(n_failed as u64, Ordering::Relaxed);
        if n_failed == 0 { Ok(()) } else { Ok(refuse_too_many([n_failed, work.items.len()], max_failed_ratio, &last)?) }
    }

    /// What is missing; what is damaged of it is set aside.
    fn due(&self) -> Result<Due> {
        let (Task { step, work, report }, store) = (self.task, self.shop.store);
        let kind = step.entry.kind;
        loop {
            let missing = plan::missing(step, store, &work.units, work.is_chain)?;
            if missing.is_empty() {
                return Ok(Due::Nothing);
            }
            self.proceed()?;
            // Units that hold items are claimed one by one by the stage; anything else is one process's as a whole.
            let first = &work.units[missing[0]];
            let claimed = if first.family.is_some() { &first.fingerprint } else { &work.recipe.fingerprint() };
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
                        report(Progress::Note(format!("waits for {}, which is making it", holder.words())));
                        *waits_for = Some(holder);
                    }
                    report(Progress::Waiting);
                    return Ok(Due::Later);
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
                        // With more items it is another artifact to those that read it.
                        store.quarantine_manifest(&store.manifest_path(kind, &work.recipe.fingerprint()), "some items failed")?;
                    }
                    Status::Valid(_) | Status::Absent => {}
                }
            }
            // The stage claims units that hold items by itself.
            let lease = first.family.is_none().then_some(lease);
            return Ok(Due::Units(missing, lease));
        }
    }

    fn publish(&self) -> Result<Artifact> {
        self.count_failed()?;
        let (Task { step, work, .. }, store) = (self.task, self.shop.store);
        let (kind, units) = (step.entry.kind, &work.units);
        let record = |unit: &Unit| -> Result<UnitRecord> {
            match store.unit(kind, &unit.fingerprint)? {
                Status::Valid(record) => Ok(record),
                Status::Damaged(findings) => Err(damaged(store, kind, unit, &findings.join("; "))),
                Status::Absent => Err(damaged(store, kind, unit, "is gone")),
            }
        };
        let records = units.iter().filter(|unit| unit.stays).map(record).collect::<Result<Vec<_>>>()?;
        let made = Provenance {
            program: format!("ovenbird {}", env!("CARGO_PKG_VERSION")),
            run: self.shop.run.to_owned(),
            host: machine::host(),
            device: machine::device_names(if step.entry.uses_device { self.shop.devices } else { CPU }),
            libtorch: ovenbird_models::LIBTORCH.into(),
            started: self.started.to_string(),
            wall_s: self.clock.elapsed().as_secs_f64(),
        };
        let ports: Vec<&str> = step.entry.outputs.iter().map(|port| port.name).collect();
        Ok(store.commit_artifact(work.recipe.clone(), &ports, records, made)?)
    }
}

/// That a unit was published and is not what it was.
fn damaged(store: &Store, kind: &str, unit: &Unit, problem: &str) -> Error {
    let path = store.unit_path(&unit_name(kind, &unit.fingerprint));
    ovenbird_cache::Error::Malformed { path, problem: format!("was published just now, and is damaged: {problem}") }.into()
}

/// Says so where the disk will not hold some more units of a size.
pub(crate) fn lacks_room(store: &Store, n_units: usize, unit_bytes: u64) -> Option<String> {
    let (free, needed) = (free_space(store.home()), n_units as u64 * unit_bytes);
    (needed > free).then(|| {
        let (needed, free) = (HumanBytes(needed), HumanBytes(free));
        let at = store.home().display();
        format!("needs about {needed} for {} and finds {free} at {at}: it will pause when the disk is full", count(n_units, "unit"))
    })
}

/// Waits until the disk has room again. Nothing is damaged meanwhile: what was in the making is lost, and made again.
fn wait_for_room(making: &Making<'_>) -> Result<()> {
    let (store, report) = (making.shop.store, making.task.report);
    let at_least = free_space(store.home()) + LEAST_ROOM;
    let words = format!(
        "the disk is full: paused. Free {} or more at {}, and it continues by itself",
        HumanBytes(LEAST_ROOM),
        store.home().display()
    );
    report(Progress::Note(words));
    while free_space(store.home()) < at_least {
        making.proceed()?;
        report(Progress::Waiting);
        thread::sleep(LOOK_EVERY);
    }
    report(Progress::Note("there is room again: continues".into()));
    Ok(())
}
