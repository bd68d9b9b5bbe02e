//! The run loop: checks steps, starts workers, and records events.
//!
//! One loop owns all state and receives messages from workers, signals and a timer; tokio hosts only this loop. Workers are plain
//! threads that get a stage, its missing units and a context. A step is checked once all steps that it reads from are done.
//!
//! If a step fails, the steps that depend on it are skipped, and all others run.

mod gauge;
pub(crate) mod local;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use ovenbird_cache::{
    Artifact, Fingerprint, Ledger, Recovered, Status, Store,
    verify::{Class, Depth},
};
use ovenbird_stages::{FailedItem, Progress};
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::MissedTickBehavior,
};

use crate::{
    devices::{self, Demand, DevicePool, Grant},
    error::{Error, ExitCode, Result},
    event::{self, Event, EventLog, Outcome, Stamped, StepInfo, Verdict},
    machine::{peak_memory, reset_peak_memory},
    output::count,
    pipeline::{Pipeline, Step, step_id::StepId},
    plan::{self, Checked, FileInputs, Made, Work, previous_run::PreviousRun},
    request::request_path,
    results::check_shown,
};
use gauge::{Gauge, SILENCE, Silence};
use local::{Failure, Options, Task, WorkerContext, guard, lacks_space};

/// How often progress is logged and shown.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// How often one file or unit that changed or was damaged while it was read makes steps be checked again.
const MAX_RECHECKS: usize = 3;

/// A run that has ended.
pub(crate) struct Ended {
    pub(crate) run: String,
    /// Why not everything is done, if so.
    pub(crate) error: Option<Error>,
}

/// Runs the wanted steps of a pipeline. Every event is logged, then passed to `show`.
pub(crate) fn run(
    pipeline: &Arc<Pipeline>,
    wanted: &[usize],
    store: &Store,
    options: &Options,
    show: &mut dyn FnMut(&Stamped),
) -> Result<Ended> {
    devices::check(pipeline, wanted, &options.devices)?;
    let run = new_run_id(store, Timestamp::now());
    let (_session, recovered) = store.enter()?;
    let ledger = Ledger::of(store).rehashing(options.rehash);
    ledger.begin();
    let log = EventLog::create(store, &run)?;
    store.keep(&request_path(&run), &pipeline.request)?;
    let mut coordinator = Coordinator::new(pipeline, wanted, store, options, run, log, show)?;
    coordinator.emit(Event::RunStarted {
        version: event::VERSION,
        run: coordinator.run.clone(),
        pipeline: pipeline.name.clone(),
        file: pipeline.request.file.clone(),
        description: pipeline.description.clone(),
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        is_repair: options.is_repair,
        steps: wanted.iter().map(|step| info(pipeline, &pipeline.steps[*step])).collect(),
        matrix: pipeline.matrix.clone(),
    })?;
    if let Some(words) = recovery_words(recovered) {
        coordinator.emit(Event::Notice { words })?;
    }
    let ledger = ledger.stopped_by(Arc::clone(&coordinator.stop));
    if let Some(damage) = coordinator.previous.damage.clone() {
        coordinator.emit(Event::Notice { words: format!("{damage}: set aside, and written again from the logs of earlier runs") })?;
    }
    let clock = Instant::now();
    let steps: Vec<&Step> = wanted.iter().map(|step| &pipeline.steps[*step]).collect();
    let error = coordinator.work(&steps, &ledger).err();
    let outcome = match &error {
        None => Outcome::Done,
        Some(Error::Interrupted) => Outcome::Interrupted,
        Some(_) => Outcome::Failed,
    };
    coordinator.emit(Event::RunEnded { outcome, wall_s: clock.elapsed().as_secs_f64() })?;
    Ok(Ended { run: coordinator.run, error })
}

/// The clean-up at the start of a run, in one line.
pub(crate) fn recovery_words(recovered: Recovered) -> Option<String> {
    let Recovered { swept, adopted, damaged_lines } = recovered;
    let swept = (swept > 0).then(|| format!("{} removed", count(swept, "unfinished file or folder")));
    let adopted = (adopted > 0).then(|| format!("{} adopted", count(adopted, "finished unit")));
    let done: Vec<String> = swept.into_iter().chain(adopted).collect();
    let cut_off = (!done.is_empty()).then(|| format!("an earlier run was cut off: {}; no finished unit is lost", done.join(", ")));
    let damaged = (damaged_lines > 0)
        .then(|| format!("{} of commits.jsonl damaged: `ovenbird verify --fix` repairs it", count(damaged_lines, "line")));
    let words: Vec<String> = cut_off.into_iter().chain(damaged).collect();
    (!words.is_empty()).then(|| words.join("; "))
}

/// `20261121-022350`, or with `-2` where that second has a run already.
fn new_run_id(store: &Store, started: Timestamp) -> String {
    let id = started.strftime("%Y%m%d-%H%M%S").to_string();
    let is_taken = |id: &str| event::run_folder(store.home(), id).exists();
    if !is_taken(&id) {
        return id;
    }
    let numbered = (2..).map(|n| format!("{id}-{n}")).find(|id| !is_taken(id));
    numbered.expect("BUG: there are more numbers than runs")
}

fn info(pipeline: &Pipeline, step: &Step) -> StepInfo {
    let after = step.upstream().into_iter().map(|step| pipeline.steps[step].id.clone()).collect();
    StepInfo { id: step.id.clone(), kind: step.entry.kind.into(), after }
}

/// The state of a step in the loop.
enum State {
    /// Waits for a step that it reads from.
    Waiting,
    Checking,
    /// Waits for cores, memory or devices.
    Queued(Box<Work>),
    Running(Gauge),
    /// Waits for a running step with the same recipe, and reuses its artifact.
    SameRecipe(usize),
    Done,
    /// A file changed or was damaged while it was read: the step is checked again once all others have ended.
    Recheck,
    Failed,
    Skipped,
}

enum Message {
    Checked(usize, Result<Checked, Failure>),
    Progress(usize, Progress),
    /// A worker has ended, with the results of its steps.
    Ended(Arc<Grant>, Vec<(usize, Result<Box<Artifact>, Failure>)>),
    Finished(usize, Result<Box<Artifact>, Failure>),
}

/// Owns all state of a run.
struct Coordinator<'a> {
    pipeline: &'a Arc<Pipeline>,
    store: &'a Store,
    options: &'a Options,
    run: String,
    log: EventLog,
    show: &'a mut dyn FnMut(&Stamped),
    sender: UnboundedSender<Message>,
    receiver: UnboundedReceiver<Message>,
    stop: Arc<AtomicBool>,
    states: BTreeMap<usize, State>,
    pool: DevicePool,
    made: Made,
    /// Steps whose bytes are needed: those that no step reads from, and those that a running step reads from.
    demanded: BTreeSet<usize>,
    previous: PreviousRun,
    /// The artifact of each step that is done, to report it once.
    settled: BTreeMap<usize, Fingerprint>,
    /// The user's files that changed during the run.
    changed: BTreeSet<PathBuf>,
    /// How often a file or a unit made steps be checked again.
    rechecks: BTreeMap<PathBuf, usize>,
    failed: Vec<StepId>,
    skipped: Vec<StepId>,
    worst: ExitCode,
}

impl<'a> Coordinator<'a> {
    fn new(
        pipeline: &'a Arc<Pipeline>,
        wanted: &[usize],
        store: &'a Store,
        options: &'a Options,
        run: String,
        log: EventLog,
        show: &'a mut dyn FnMut(&Stamped),
    ) -> Result<Self> {
        let (sender, receiver) = unbounded_channel();
        Ok(Self {
            pipeline,
            store,
            options,
            run,
            log,
            show,
            sender,
            receiver,
            stop: Arc::default(),
            states: wanted.iter().map(|step| (*step, State::Waiting)).collect(),
            pool: DevicePool::new(&options.devices),
            made: Made::new(),
            demanded: pipeline.ends(wanted),
            previous: PreviousRun::of(store, pipeline)?,
            settled: BTreeMap::new(),
            changed: BTreeSet::new(),
            rechecks: BTreeMap::new(),
            failed: Vec::new(),
            skipped: Vec::new(),
            worst: ExitCode::Success,
        })
    }

    fn emit(&mut self, event: Event) -> Result<()> {
        let stamped = Stamped { at: Timestamp::now(), event };
        self.log.append(&stamped)?;
        tracing::info!(run = self.run, event = %serde_json::to_string(&stamped.event).unwrap_or_default());
        (self.show)(&stamped);
        Ok(())
    }

    fn id(&self, place: usize) -> StepId {
        self.pipeline.steps[place].id.clone()
    }

    fn work(&mut self, steps: &[&Step], ledger: &Ledger) -> Result<()> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("BUG: a current-thread runtime needs nothing but memory");
        let mut signals = {
            let _inside = runtime.enter();
            Signals::listen()
        };
        loop {
            ledger.doubt(std::mem::take(&mut self.changed));
            let files = self.digest(steps, ledger, &runtime, &mut signals);
            for words in ledger.notices() {
                self.emit(Event::Notice { words })?;
            }
            runtime.block_on(self.turn(&Arc::new(files?), &mut signals))?;
            if self.stop.load(Ordering::SeqCst) {
                return Err(Error::Interrupted);
            }
            if !self.states.values().any(|state| matches!(state, State::Recheck)) {
                break;
            }
            self.recheck();
        }
        if self.failed.is_empty() {
            return Ok(());
        }
        let (failed, skipped) = (std::mem::take(&mut self.failed), std::mem::take(&mut self.skipped));
        Err(Error::StagesFailed { failed, skipped, worst: self.worst })
    }

    /// Hashes the input files on a separate thread, so that the user can stop it.
    fn digest(&mut self, steps: &[&Step], ledger: &Ledger, runtime: &runtime::Runtime, signals: &mut Signals) -> Result<FileInputs> {
        let (sender, mut receiver) = unbounded_channel();
        let files = thread::scope(|scope| {
            // The receiver is gone once the log could not be written.
            scope.spawn(move || drop(sender.send(plan::digest_files(steps, Some(ledger)))));
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        files = receiver.recv() => return files.expect("BUG: hashing does not panic"),
                        () = signals.recv() => self.interrupt()?,
                    }
                }
            })
        });
        if self.stop.load(Ordering::SeqCst) { Err(Error::Interrupted) } else { files }
    }

    /// Has every step checked again that did not fail: a changed file may be the input of several.
    fn recheck(&mut self) {
        self.made.clear();
        let wanted: Vec<usize> = self.states.keys().copied().collect();
        self.demanded = self.pipeline.ends(&wanted);
        for state in self.states.values_mut() {
            if !matches!(state, State::Failed | State::Skipped) {
                *state = State::Waiting;
            }
        }
    }

    async fn turn(&mut self, files: &Arc<FileInputs>, signals: &mut Signals) -> Result<()> {
        let mut timer = tokio::time::interval(PROGRESS_EVERY);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_what_can(files)?;
            if !self.states.values().any(|state| matches!(state, State::Checking | State::Running(_))) {
                return Ok(());
            }
            tokio::select! {
                Some(message) = self.receiver.recv() => self.handle(message)?,
                () = signals.recv() => self.interrupt()?,
                _ = timer.tick() => self.tell_progress()?,
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a second Ctrl-C ends the program at once; published units are safe")]
    fn interrupt(&mut self) -> Result<()> {
        if self.stop.swap(true, Ordering::SeqCst) {
            std::process::exit(ExitCode::Interrupted as i32);
        }
        self.emit(Event::Interrupted)
    }

    fn start_what_can(&mut self, files: &Arc<FileInputs>) -> Result<()> {
        self.fail_without_devices()?;
        let places: Vec<usize> = self.states.keys().copied().collect();
        for place in places {
            if self.stop.load(Ordering::SeqCst) {
                return Ok(());
            }
            let sources = self.pipeline.steps[place].upstream();
            match &self.states[&place] {
                State::Waiting => {
                    let is_lost = |step: &usize| matches!(self.states.get(step), Some(State::Failed | State::Skipped));
                    if let Some(lost) = sources.iter().find(|step| is_lost(step)) {
                        let because = self.id(*lost);
                        self.states.insert(place, State::Skipped);
                        self.skipped.push(self.id(place));
                        self.emit(Event::StepSkipped { step: self.id(place), because })?;
                    } else if sources.iter().all(|step| self.made.contains_key(step)) {
                        self.states.insert(place, State::Checking);
                        self.start_check(place, Arc::clone(files));
                    }
                }
                State::Queued(_) if self.fits(place) && !self.may_be_joined(place) => {
                    let Some((together, grant)) = self.with_devices(place) else { continue };
                    let (mut tasks, together, grant): (_, Arc<[usize]>, _) = (Vec::new(), together.into(), Arc::new(grant));
                    if together.len() > 1 {
                        let ids: Vec<String> = together.iter().map(|place| self.id(*place).to_string()).collect();
                        self.emit(Event::Notice { words: format!("one pass over the images serves {}", ids.join(", ")) })?;
                    }
                    for &place in together.iter() {
                        let Some(State::Queued(work)) = self.states.remove(&place) else { continue };
                        self.states.insert(place, State::Running(Gauge::new(&work, Arc::clone(&together), Arc::clone(&grant))));
                        self.emit(Event::StepStarted { step: self.id(place) })?;
                        tasks.push((place, work));
                    }
                    if self.options.is_measuring {
                        reset_peak_memory();
                    }
                    self.start_worker(tasks, grant);
                }
                State::Queued(_)
                | State::Checking
                | State::Running(_)
                | State::SameRecipe(_)
                | State::Done
                | State::Recheck
                | State::Failed
                | State::Skipped => {}
            }
        }
        Ok(())
    }

    /// Whether a step's cores and memory are free; a step that asks for more than the machine has runs alone.
    fn fits(&self, place: usize) -> bool {
        let running = self.states.iter().filter(|(_, state)| matches!(state, State::Running(_)));
        let running: Vec<_> = running.map(|(place, _)| self.pipeline.steps[*place].resources).collect();
        let wanted = self.pipeline.steps[place].resources;
        let cpu: usize = running.iter().map(|used| used.cpu).sum();
        let memory: u64 = running.iter().map(|used| used.memory).sum();
        running.is_empty()
            || (!self.options.is_measuring && cpu + wanted.cpu <= self.options.cpu && memory + wanted.memory <= self.options.memory)
    }

    /// The devices that a queued step asks for.
    fn demand(&self, place: usize) -> Demand {
        match &self.states[&place] {
            State::Queued(work) => Demand::of(&self.pipeline.steps[place], work),
            _ => Demand::NONE,
        }
    }

    /// Takes the devices for a queued step and for those that share its pass; `None` where it has to wait. Steps without networks do not
    /// wait for steps with networks.
    fn with_devices(&mut self, place: usize) -> Option<(Vec<usize>, Grant)> {
        let together = self.sharing_a_pass(place);
        let demand = together.iter().map(|place| self.demand(*place)).fold(Demand::NONE, Demand::joined);
        if let Some(grant) = self.pool.take(demand) {
            return Some((together, grant));
        }
        let grant = self.pool.take(self.demand(place)).filter(|grant| grant.devices.is_empty())?;
        Some((together.into_iter().filter(|place| self.demand(*place) == Demand::NONE).collect(), grant))
    }

    /// Fails the queued steps that cannot get their devices in this run.
    fn fail_without_devices(&mut self) -> Result<()> {
        let (mut refused, n_left) = (Vec::new(), self.pool.n_left());
        for (place, state) in &self.states {
            let State::Queued(work) = state else { continue };
            let step = &self.pipeline.steps[*place];
            let Demand { least: needed, .. } = Demand::of(step, work);
            if needed > 1 && work.units.iter().all(|unit| unit.item_key.is_none()) {
                let problem = format!("`resources.gpu` asks for {needed} devices, but `{}` runs on one", step.entry.kind);
                refused.push((*place, Error::Usage { problem, hint: "write `gpu: 1`, or leave it out".into() }));
            } else if needed > n_left {
                refused.push((*place, Error::LacksDevices { needed, n_left }));
            }
        }
        refused.into_iter().try_for_each(|(place, error)| self.fail(place, &Failure::Known(error)))
    }

    fn start_check(&self, place: usize, files: Arc<FileInputs>) {
        let (pipeline, store, sender) = (Arc::clone(self.pipeline), self.store.clone(), self.sender.clone());
        let (previous, is_demanded) = (self.previous.clone(), self.demanded.contains(&place));
        let made: Made = pipeline.steps[place].upstream().into_iter().map(|step| (step, self.made[&step].clone())).collect();
        thread::spawn(move || {
            let checked = guard(|| plan::check(&pipeline.steps[place], is_demanded, &files, &made, &store, &previous));
            // The receiver is gone once the loop has ended because its log could not be written.
            drop(sender.send(Message::Checked(place, checked)));
        });
    }

    /// Whether two steps can share a pass over the same images.
    fn share_a_pass(&self, one: usize, other: usize) -> bool {
        let [one, other] = [one, other].map(|place| &self.pipeline.steps[place]);
        let is_same = |port: &str| one.inputs.get(port) == other.inputs.get(port);
        !self.options.is_measuring
            && one.entry.consumer.is_some()
            && other.entry.consumer.is_some()
            && is_same("images")
            && is_same("annotations")
    }

    /// The places of the queued steps that share a pass with a queued step, itself included.
    fn sharing_a_pass(&self, place: usize) -> Vec<usize> {
        let queued = self.states.iter().filter(|(_, state)| matches!(state, State::Queued(_))).map(|(place, _)| *place);
        queued.filter(|other| *other == place || self.share_a_pass(place, *other)).collect()
    }

    /// Whether a step that is being checked may be able to share a pass with a queued step.
    fn may_be_joined(&self, place: usize) -> bool {
        self.states.iter().any(|(other, state)| matches!(state, State::Checking) && self.share_a_pass(place, *other))
    }

    fn start_worker(&self, tasks: Vec<(usize, Box<Work>)>, grant: Arc<Grant>) {
        let (pipeline, store, sender) = (Arc::clone(self.pipeline), self.store.clone(), self.sender.clone());
        let (run, stop) = (self.run.clone(), Arc::clone(&self.stop));
        thread::spawn(move || {
            let places: Vec<usize> = tasks.iter().map(|(place, _)| *place).collect();
            let reports: Vec<_> = places
                .iter()
                .map(|place| {
                    let (progress, place) = (sender.clone(), *place);
                    move |said| drop(progress.send(Message::Progress(place, said)))
                })
                .collect();
            let task = |((place, work), report)| Task { step: &pipeline.steps[place], work, report };
            let reports = reports.iter().map(|report| report as &(dyn Fn(Progress) + Send + Sync));
            let tasks: Vec<Task<'_>> = tasks.into_iter().zip(reports).map(task).collect();
            let context = WorkerContext { store: &store, devices: &grant.devices, run: &run, stop: &stop };
            let finished = local::run_steps(&tasks, context).into_iter().map(|finished| finished.map(Box::new));
            let finished = places.iter().copied().zip(finished).collect();
            // The receiver is gone once the loop has ended because its log could not be written.
            drop(sender.send(Message::Ended(grant, finished)));
        });
    }

    /// Handles a message of a worker.
    fn handle(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Ended(grant, finished) => {
                self.pool.give_back(&grant);
                finished.into_iter().try_for_each(|(place, finished)| self.handle(Message::Finished(place, finished)))
            }
            // A step that was given up as hanging has ended after all.
            Message::Finished(place, _) if matches!(self.states[&place], State::Failed) => Ok(()),
            Message::Checked(place, Ok(Checked::Reused(artifact))) => {
                if let Err(error) = check_shown(self.pipeline.steps[place].entry, &artifact) {
                    return self.fail(place, &Failure::Known(error));
                }
                let fingerprint = artifact.manifest.fingerprint;
                let verdict = if artifact.is_dropped { Verdict::Dropped } else { Verdict::Reused };
                if self.settled.get(&place) != Some(&fingerprint) {
                    self.emit(Event::StepChecked { step: self.id(place), fingerprint, verdict })?;
                }
                self.done(place, *artifact)
            }
            Message::Checked(place, Ok(Checked::Lacks { sources, .. })) => {
                for source in sources {
                    if self.demanded.insert(source) {
                        self.made.remove(&source);
                        self.states.insert(source, State::Waiting);
                    }
                }
                self.states.insert(place, State::Waiting);
                Ok(())
            }
            Message::Checked(place, Ok(Checked::Run(work))) => {
                let (units_total, units_done) = (work.units.len(), work.units.len() - work.missing.len());
                let sample = self.pipeline.steps[place].most_items.map(|_| (work.n_made as u64, work.n_whole as u64));
                let verdict = Verdict::Run { units_done, units_total, reasons: work.reasons.clone(), sample };
                let fingerprint = work.recipe.fingerprint();
                if let Some(same) = self.step_with(&fingerprint) {
                    self.states.insert(place, State::SameRecipe(same));
                    let words = format!("has the same recipe as {}, and waits for it", self.id(same));
                    return self.emit(Event::StepNote { step: self.id(place), words });
                }
                self.states.insert(place, State::Queued(work));
                self.emit(Event::StepChecked { step: self.id(place), fingerprint, verdict })
            }
            Message::Progress(place, said) => self.note(place, said),
            Message::Finished(place, Ok(artifact)) => {
                if let Some(State::Running(gauge)) = self.states.get(&place) {
                    let Gauge { started, done, bytes, failed, .. } = gauge;
                    let (items, bytes, failed, wall_s) = (*done, *bytes, *failed, started.elapsed().as_secs_f64());
                    let peak_bytes = peak_memory();
                    let (fingerprint, ports) = (artifact.manifest.fingerprint, artifact.manifest.ports.clone());
                    self.emit(Event::StepDone { step: self.id(place), fingerprint, ports, items, failed, bytes, wall_s, peak_bytes })?;
                }
                self.done(place, *artifact)
            }
            Message::Checked(place, Err(failure)) | Message::Finished(place, Err(failure)) => self.fail(place, &failure),
        }
    }

    /// Notes the artifact of a step.
    fn done(&mut self, place: usize, artifact: Artifact) -> Result<()> {
        if !self.options.is_repair {
            self.previous.record(self.store, &self.pipeline.steps[place].id, artifact.manifest.fingerprint)?;
        }
        self.states.insert(place, State::Done);
        self.settled.insert(place, artifact.manifest.fingerprint);
        self.made.insert(place, artifact);
        self.release(place);
        Ok(())
    }

    /// The step of this run that computes or will compute an artifact.
    fn step_with(&self, fingerprint: &Fingerprint) -> Option<usize> {
        let makes = |state: &State| match state {
            State::Queued(work) => work.recipe.fingerprint() == *fingerprint,
            State::Running(gauge) => gauge.fingerprint == *fingerprint,
            State::Waiting | State::Checking | State::SameRecipe(_) | State::Done | State::Recheck | State::Failed | State::Skipped => {
                false
            }
        };
        self.states.iter().find(|(_, state)| makes(state)).map(|(place, _)| *place)
    }

    /// Has the steps checked again that waited for a step with the same recipe.
    fn release(&mut self, ended: usize) {
        for state in self.states.values_mut() {
            if matches!(state, State::SameRecipe(place) if *place == ended) {
                *state = State::Waiting;
            }
        }
    }

    /// Notes progress of a step.
    fn note(&mut self, place: usize, said: Progress) -> Result<()> {
        let step = self.id(place);
        let Some(State::Running(Gauge { together, .. })) = self.states.get(&place) else { return Ok(()) };
        for other in Arc::clone(together).iter() {
            if let Some(State::Running(gauge)) = self.states.get_mut(other) {
                gauge.progressed();
            }
        }
        let Some(State::Running(gauge)) = self.states.get_mut(&place) else { return Ok(()) };
        gauge.is_stale = true;
        match said {
            Progress::Total(total) => gauge.total = total,
            Progress::Tick(n_items) => gauge.done += n_items,
            Progress::Waiting => gauge.is_stale = false,
            Progress::Flow { views, ready } => {
                gauge.views += views;
                gauge.ready = ready;
            }
            Progress::Committed { unit, bytes } => {
                let is_first = gauge.bytes == 0;
                gauge.bytes += bytes;
                gauge.units_left = gauge.units_left.saturating_sub(1);
                let lacks = if is_first { lacks_space(self.store, gauge.units_left, bytes) } else { None };
                self.emit(Event::UnitCommitted { step: step.clone(), unit, bytes })?;
                return lacks.map_or(Ok(()), |words| self.emit(Event::StepNote { step, words }));
            }
            Progress::Measured { step: at_step, values } => return self.emit(Event::Measured { step, at_step, values }),
            Progress::Failed(FailedItem { item, reason, attempts }) => {
                gauge.failed += 1;
                return self.emit(Event::ItemFailed { step, item, reason, attempts });
            }
            Progress::Note(words) => return self.emit(Event::StepNote { step, words }),
        }
        Ok(())
    }

    fn tell_progress(&mut self) -> Result<()> {
        let (mut events, mut hanging) = (Vec::new(), Vec::new());
        for (place, state) in &mut self.states {
            let State::Running(gauge) = state else { continue };
            let Step { id, max_silence, .. } = &self.pipeline.steps[*place];
            let step = id.clone();
            match gauge.silence(*max_silence) {
                Some(Silence::GiveUp) => {
                    hanging.push((*place, *max_silence));
                    self.pool.lose(&gauge.devices);
                }
                Some(Silence::Tell) => {
                    let words = format!("no progress for {} s; it fails after {} s", SILENCE.as_secs(), max_silence.as_secs());
                    events.push(Event::StepNote { step: step.clone(), words });
                }
                None => {}
            }
            if std::mem::take(&mut gauge.is_stale) {
                let Gauge { done, total, views, ready, .. } = *gauge;
                events.push(Event::StepProgress { step, done, total, views, ready });
            }
        }
        events.into_iter().try_for_each(|event| self.emit(event))?;
        // The thread of a hanging step ends with the program.
        hanging.into_iter().try_for_each(|(place, after)| self.fail(place, &Failure::Known(Error::Hangs { after })))
    }

    fn fail(&mut self, place: usize, failure: &Failure) -> Result<()> {
        let step = self.id(place);
        if let Failure::Known(error @ Error::Stage(cause)) = failure
            && self.may_succeed_again(cause)?
        {
            self.states.insert(place, State::Recheck);
            self.release(place);
            let words = format!("{}: nothing was published, and the step is checked again", error.message());
            return self.emit(Event::StepNote { step, words });
        }
        self.states.insert(place, State::Failed);
        self.release(place);
        let (error, hint, code) = match failure {
            // The run as a whole reports this.
            Failure::Known(Error::Stage(ovenbird_stages::Error::Stopped)) => return Ok(()),
            Failure::Known(error) => (error.message(), error.hint(self.store.home()), error.exit_code(self.store.home())),
            Failure::Bug(words) => {
                let hint = "this is a bug in ovenbird: please report it with the run's log; finished units are kept";
                (words.clone(), Some(hint.to_owned()), ExitCode::Stage)
            }
        };
        self.failed.push(step.clone());
        self.worst = self.worst.max(code);
        self.emit(Event::StepFailed { step, error, hint })
    }

    /// Whether a failed step may succeed when it is checked again: a file of the user changed while it was read, or a stored unit is
    /// damaged and is now set aside.
    fn may_succeed_again(&mut self, error: &ovenbird_stages::Error) -> Result<bool> {
        if let Some(path) = error.changed_file() {
            self.changed.insert(path.to_owned());
            return Ok(self.is_to_be_rechecked(path.to_owned()));
        }
        let Some(unit) = error.damaged_file().and_then(|path| self.store.unit_of(path)) else { return Ok(false) };
        // A file that cannot be used may still be intact.
        let findings = self.store.verify_unit(&unit, Depth::Full, &|_| {})?;
        let damage: Vec<String> = findings.into_iter().filter(|finding| finding.class == Class::Damaged).map(|it| it.problem).collect();
        if !damage.is_empty()
            && let Some(aside) = self.store.quarantine(&unit, &damage)?
        {
            self.emit(Event::Notice { words: format!("the damaged unit {unit} was set aside at {}", aside.display()) })?;
        }
        let may_succeed = match self.store.unit_at(&unit)? {
            Status::Absent => true,
            // Another process has recomputed it.
            Status::Valid(_) => matches!(error, ovenbird_stages::Error::Cache(ovenbird_cache::Error::Flipped { .. })),
            Status::Damaged(_) => false,
        };
        Ok(may_succeed && self.is_to_be_rechecked(unit.into()))
    }

    fn is_to_be_rechecked(&mut self, because: PathBuf) -> bool {
        let n_times = self.rechecks.entry(because).or_default();
        *n_times += 1;
        *n_times <= MAX_RECHECKS
    }
}

/// The signals that ask a run to stop.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// SIGUSR1: Slurm can send it some time before it ends a job.
    warning: Signal,
}

impl Signals {
    fn listen() -> Self {
        let listen = |kind| signal(kind).expect("BUG: SIGINT, SIGTERM and SIGUSR1 can be listened to");
        let (interrupt, terminate) = (listen(SignalKind::interrupt()), listen(SignalKind::terminate()));
        Self { interrupt, terminate, warning: listen(SignalKind::user_defined1()) }
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.warning.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::{Condvar, Mutex},
    };

    use ovenbird_cache::{Claim, Digest, inputs::InputFile};
    use ovenbird_stages::{AnyStage, Context, In, Inputs, OnBadItem, Out, PortInfo, StageEntry, Unit, Units, artifacts::AnnotationFile};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        machine,
        pipeline::{Request, Resources, Source},
        run_state::{self, StepState, StepStatus},
    };

    const LEFT: In<AnnotationFile> = In::optional("left", "a number");
    const RIGHT: In<AnnotationFile> = In::optional("right", "a number");
    const SUM: Out<AnnotationFile> = Out::new("sum", "a number");
    const ENTRY: &StageEntry = &StageEntry {
        kind: "test/sum",
        version: 1,
        inputs: &[LEFT.info(), RIGHT.info()] as &[PortInfo],
        outputs: &[SUM.info()] as &[PortInfo],
        uses_device: false,
        consumer: None,
        schema: || schemars::schema_for!(u8),
        parse: |_| Ok(Box::new(Sum { number: 0 })),
    };

    /// Adds its number and its inputs, modulo 4: small, so that a changed input often comes to the same.
    struct Sum {
        number: u8,
    }

    fn sum(number: u8, inputs: impl IntoIterator<Item = u8>) -> u8 {
        inputs.into_iter().fold(number, |sum, input| sum + input) % 4
    }

    fn read(files: &[InputFile]) -> u8 {
        fs::read_to_string(&files[0].path).unwrap().parse().unwrap()
    }

    /// Never says anything again.
    struct Hung;

    impl AnyStage for Hung {
        fn params(&self) -> Value {
            json!({})
        }

        fn check(&self) -> Vec<ovenbird_stages::Problem> {
            Vec::new()
        }

        fn units(&self, _inputs: &Inputs) -> ovenbird_stages::Result<Units> {
            Ok(Units::One)
        }

        fn run(&self, _units: &[Unit], _cx: &Context<'_>) -> ovenbird_stages::Result<()> {
            loop {
                thread::park();
            }
        }
    }

    /// What [`Network`]s do on their devices, seen from outside.
    #[derive(Default)]
    struct Floor {
        /// Each waits here for the others that it is to meet.
        seen: Mutex<Seen>,
        changed: Condvar,
    }

    #[derive(Default)]
    struct Seen {
        /// Who is at work where.
        busy: BTreeMap<String, String>,
        /// Where each has been at work.
        by_step: BTreeMap<String, BTreeSet<String>>,
        /// Two at work on one device.
        clashes: Vec<String>,
        /// How many are at work now, and how many were at most.
        n_busy: usize,
        most_busy: usize,
    }

    impl Floor {
        /// Works on a device until some steps have worked on so many devices, all together, or so many at the same time: CPUs have one name.
        fn work(&self, step: &str, device: tch::Device, n_devices: usize) {
            let device = format!("{device:?}");
            let mut seen = self.seen.lock().unwrap();
            if let Some(other) = seen.busy.insert(device.clone(), step.into()) {
                seen.clashes.push(format!("{step} and {other} on {device}"));
            }
            seen.by_step.entry(step.into()).or_default().insert(device.clone());
            seen.n_busy += 1;
            seen.most_busy = seen.most_busy.max(seen.n_busy);
            self.changed.notify_all();
            let are_few =
                |seen: &mut Seen| seen.most_busy < n_devices && seen.by_step.values().flatten().collect::<BTreeSet<_>>().len() < n_devices;
            // The bound is for a run that never comes to it.
            let (mut seen, _) = self.changed.wait_timeout_while(seen, Duration::from_secs(20), are_few).unwrap();
            seen.busy.remove(&device);
            seen.n_busy -= 1;
        }

        fn devices_of(&self, step: &str) -> Vec<String> {
            self.seen.lock().unwrap().by_step.get(step).into_iter().flatten().cloned().collect()
        }
    }

    /// A stage with a network: a training, or an extraction, whose units hold items.
    struct Network {
        id: &'static str,
        n_items: u32,
        /// On how many devices it and others are to have been before it ends.
        meets: usize,
        floor: Arc<Floor>,
    }

    const NETWORK: &StageEntry = &StageEntry { kind: "test/network", uses_device: true, ..*ENTRY };

    impl AnyStage for Network {
        fn params(&self) -> Value {
            json!({"id": self.id})
        }

        fn check(&self) -> Vec<ovenbird_stages::Problem> {
            Vec::new()
        }

        fn units(&self, _inputs: &Inputs) -> ovenbird_stages::Result<Units> {
            let items = (0..self.n_items).map(|item| Digest::of(&item.to_le_bytes())).collect();
            Ok(if self.n_items == 0 { Units::One } else { Units::Independent { items, replaces: Vec::new() } })
        }

        fn run(&self, units: &[Unit], cx: &Context<'_>) -> ovenbird_stages::Result<()> {
            self.floor.work(self.id, cx.device, self.meets);
            for unit in units {
                let claimed =
                    unit.item_key.map(|_| cx.store.claim(cx.kind, &unit.fingerprint, &mut cx.watch.lock().unwrap())).transpose()?;
                if let None | Some(Claim::Mine(_)) = &claimed {
                    let draft = cx.begin(unit)?;
                    draft.write(SUM, "sum.json", format!("{} {:?}", self.id, unit.items).as_bytes())?;
                    cx.commit(draft, [].into())?;
                }
            }
            Ok(())
        }
    }

    /// Steps with networks, each with how many items it has (none: a training) and `resources.gpu`.
    fn networks(steps: &[(&'static str, u32, usize)], meets: usize) -> (Pipeline, Arc<Floor>) {
        let mut pipeline = pipeline(&vec![(0, None, None); steps.len()]);
        let floor = Arc::<Floor>::default();
        for (step, (id, n_items, gpu)) in pipeline.steps.iter_mut().zip(steps) {
            (step.id, step.entry, step.resources.gpu) = ((*id).into(), NETWORK, *gpu);
            step.stage = Box::new(Network { id, n_items: *n_items, meets, floor: Arc::clone(&floor) });
        }
        (pipeline, floor)
    }

    const CUDA: [tch::Device; 2] = [tch::Device::Cuda(0), tch::Device::Cuda(1)];

    fn run_on(devices: &[tch::Device], pipeline: Pipeline, store: &Store) -> Result<Ended> {
        let options = Options { cpu: 8, memory: 1 << 30, devices: devices.to_vec(), rehash: false, is_measuring: false, is_repair: false };
        let wanted: Vec<usize> = (0..pipeline.steps.len()).collect();
        run(&Arc::new(pipeline), &wanted, store, &options, &mut |_| {})
    }

    fn made_on(store: &Store, run: &str) -> Vec<(String, String)> {
        let device = |step: StepState| {
            let Status::Valid(artifact) = store.artifact(&step.kind, &step.fingerprint.unwrap()).unwrap() else { panic!("{}", step.id) };
            (step.id.to_string(), artifact.manifest.made.device)
        };
        states(store, run).into_iter().map(device).collect()
    }

    /// The files of all units, by name.
    fn unit_files(store: &Store) -> BTreeMap<String, Vec<u8>> {
        let units = store.unit_names().unwrap().into_iter();
        units.map(|unit| (unit.clone(), fs::read(store.unit_path(&unit).join("sum/sum.json")).unwrap())).collect()
    }

    #[test]
    fn trainings_at_the_same_time_have_a_device_each() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (pipeline, floor) = networks(&[("one", 0, 0), ("two", 0, 0), ("three", 0, 1)], 2);
        let ended = run_on(&CUDA, pipeline, &store).unwrap();
        assert!(ended.error.is_none(), "{:?}", ended.error);
        assert_eq!(floor.seen.lock().unwrap().clashes, [""; 0]);
        let used: Vec<Vec<String>> = ["one", "two", "three"].map(|id| floor.devices_of(id)).into();
        assert!(used.iter().all(|devices| devices.len() == 1) && used.concat().iter().collect::<BTreeSet<_>>().len() == 2, "{used:?}");
        assert_eq!(made_on(&store, &ended.run).into_iter().map(|(_, device)| device).collect::<Vec<_>>(), used.concat());
    }

    #[test]
    fn of_two_cpus_no_two_steps_share_one() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (pipeline, floor) = networks(&[("one", 0, 0), ("two", 0, 0), ("three", 0, 0), ("extraction", 6000, 0)], 2);
        let ended = run_on(&[tch::Device::Cpu; 2], pipeline, &store).unwrap();
        assert!(ended.error.is_none(), "{:?}", ended.error);
        assert_eq!(floor.seen.lock().unwrap().most_busy, 2);
    }

    #[test]
    fn an_extraction_takes_the_devices_that_a_training_leaves() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (mut pipeline, floor) = networks(&[("training", 0, 0), ("gate", 0, 0), ("extraction", 6000, 0)], 3);
        gate(&mut pipeline, &floor);
        let ended = run_on(&CUDA, pipeline, &store).unwrap();
        assert!(ended.error.is_none(), "{:?}", ended.error);
        assert_eq!(floor.seen.lock().unwrap().clashes, [""; 0]);
        let made = made_on(&store, &ended.run);
        assert_eq!([&made[0], &made[2]], [&("training".into(), "Cuda(0)".into()), &("extraction".into(), "Cuda(1)".into())]);
    }

    #[test]
    fn extractions_share_all_devices_one_after_the_other_and_come_to_the_same_bytes() {
        let (home, alone) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (store, alone) = (Store::open(home.path()).unwrap(), Store::open(alone.path()).unwrap());
        let steps = [("one", 6000, 0), ("two", 9000, 2)];
        let (pipeline, floor) = networks(&steps, 2);
        let ended = run_on(&CUDA, pipeline, &store).unwrap();
        assert!(ended.error.is_none(), "{:?}", ended.error);
        assert_eq!(floor.seen.lock().unwrap().clashes, [""; 0]);
        for id in ["one", "two"] {
            assert_eq!(floor.devices_of(id), ["Cuda(0)", "Cuda(1)"], "{id}");
        }
        assert!(made_on(&store, &ended.run).iter().all(|(_, device)| device == "Cuda(0), Cuda(1)"));
        for devices in [&[tch::Device::Cpu][..], &[tch::Device::Cpu; 2]] {
            let (pipeline, _) = networks(&steps.map(|(id, n_items, _)| (id, n_items, 0)), 1);
            assert!(run_on(devices, pipeline, &alone).unwrap().error.is_none());
            assert!(unit_files(&store).len() > 4 && unit_files(&store) == unit_files(&alone));
        }
    }

    #[test]
    fn steps_without_a_network_neither_take_devices_nor_wait_for_them() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (mut pipeline, floor) = networks(&[("training", 0, 0), ("annotations", 0, 0)], 2);
        pipeline.steps[1].entry = ENTRY;
        let ended = run_on(&CUDA[..1], pipeline, &store).unwrap();
        assert!(ended.error.is_none(), "{:?}", ended.error);
        // The training waits until both are at work.
        assert_eq!((floor.devices_of("training"), floor.devices_of("annotations")), (vec!["Cuda(0)".into()], vec!["Cpu".to_owned()]));
        let made = made_on(&store, &ended.run);
        assert_eq!(made, [("training".into(), "Cuda(0)".into()), ("annotations".into(), machine::processor())]);
    }

    #[test]
    fn more_devices_than_there_are_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let Err(error) = run_on(&CUDA, networks(&[("one", 10, 3), ("two", 10, 2), ("three", 0, 4)], 1).0, &store) else { panic!() };
        let words = "the run has 2 devices, and `one` asks for 3 (`resources.gpu`), `three` asks for 4 (`resources.gpu`)";
        assert_eq!((error.message(), error.exit_code(store.home())), (words.into(), ExitCode::Usage));
        assert!(event::runs(store.home()).is_empty());
        let ended = run_on(&CUDA, networks(&[("one", 10, 2), ("two", 0, 2)], 1).0, &store).unwrap();
        let Some(Error::StagesFailed { failed, .. }) = ended.error else { panic!("{:?}", ended.error) };
        assert_eq!(failed, ["two".into()]);
        let two = states(&store, &ended.run).into_iter().find(|step| step.id.stage == "two").unwrap();
        assert!(two.words.contains("`resources.gpu` asks for 2 devices, but `test/network` runs on one"), "{}", two.words);
    }

    /// Has the second step end once the first one is at work on a device, and the others begin after it.
    fn gate(pipeline: &mut Pipeline, floor: &Arc<Floor>) {
        let stage = Network { id: "gate", n_items: 0, meets: 2, floor: Arc::clone(floor) };
        (pipeline.steps[1].stage, pipeline.steps[1].entry) = (Box::new(stage), ENTRY);
        for step in &mut pipeline.steps[2..] {
            step.inputs = [("left".to_owned(), Source::Step { step: 1, port: "sum".into() })].into();
        }
    }

    /// A stage that hangs, and after it these steps.
    fn run_beside_one_that_hangs(devices: &[tch::Device], steps: &[(&'static str, u32, usize)]) -> (Vec<StepState>, Arc<Floor>) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let (mut pipeline, floor) = networks(&[&[("hung", 0, 0), ("gate", 0, 0)], steps].concat(), 1);
        pipeline.steps[0].stage = Box::new(Network { id: "hung", n_items: 0, meets: usize::MAX, floor: Arc::clone(&floor) });
        pipeline.steps[0].max_silence = Duration::from_secs(1);
        gate(&mut pipeline, &floor);
        let ended = run_on(devices, pipeline, &store).unwrap();
        (states(&store, &ended.run), floor)
    }

    #[test]
    fn nobody_gets_the_device_of_a_step_that_hangs() {
        let failed = |steps: &[StepState]| -> Vec<String> {
            steps.iter().filter(|step| step.state == StepStatus::Failed).map(|step| step.id.to_string()).collect()
        };
        let (steps, floor) = run_beside_one_that_hangs(&CUDA[..1], &[("one", 0, 0)]);
        assert_eq!((failed(&steps), floor.devices_of("one")), (vec!["hung".into(), "one".into()], vec![]));
        let words = "needs 1 device and only 0 can be used: stages that hang hold the others";
        assert!(steps[2].words.contains(words), "{}", steps[2].words);

        let (steps, floor) = run_beside_one_that_hangs(&CUDA, &[("one", 0, 0), ("both", 6000, 2), ("two", 6000, 0)]);
        assert_eq!(failed(&steps), ["hung", "both"]);
        assert_eq!((floor.devices_of("one"), floor.devices_of("two")), (vec!["Cuda(1)".into()], vec!["Cuda(1)".to_owned()]));
    }

    fn states(store: &Store, run: &str) -> Vec<StepState> {
        run_state::state(&event::read_log(store.home(), run).unwrap()).steps
    }

    #[test]
    fn a_stage_that_hangs_is_given_up_and_the_others_are_not() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let options =
            Options { cpu: 2, memory: 1 << 30, devices: vec![tch::Device::Cpu], rehash: false, is_measuring: false, is_repair: false };
        let mut pipeline = pipeline(&[(1, None, None), (2, None, None), (3, Some(0), None)]);
        pipeline.steps[0].stage = Box::new(Hung);
        pipeline.steps[0].max_silence = Duration::from_secs(1);
        let ended = run(&Arc::new(pipeline), &[0, 1, 2], &store, &options, &mut |_| {}).unwrap();
        let Some(Error::StagesFailed { failed, skipped, worst: ExitCode::Stage }) = ended.error else { panic!("{:?}", ended.error) };
        assert_eq!((failed, skipped), (vec!["s0".into()], vec!["s2".into()]));
        let done = states(&store, &ended.run).into_iter().filter(|step| step.state == StepStatus::Done).map(|step| step.id.to_string());
        assert_eq!(done.collect::<Vec<_>>(), ["s1"]);
    }

    #[test]
    fn of_steps_with_the_same_recipe_one_runs_and_the_others_reuse_its_artifact() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let options =
            Options { cpu: 4, memory: 1 << 30, devices: vec![tch::Device::Cpu], rehash: false, is_measuring: false, is_repair: false };
        // The sums of 1 and 5 are one number, modulo 4, and what reads them comes to one recipe.
        let pipeline = pipeline(&[(1, None, None), (5, None, None), (2, Some(0), None), (2, Some(1), None), (3, Some(3), None)]);
        let mut started = Vec::new();
        let mut note = |stamped: &Stamped| {
            if let Event::StepStarted { step } = &stamped.event {
                started.push(step.to_string());
            }
        };
        let ended = run(&Arc::new(pipeline), &[0, 1, 2, 3, 4], &store, &options, &mut note).unwrap();
        assert!(ended.error.is_none());
        started.sort();
        assert!(started.len() == 4 && started[..2] == ["s0", "s1"] && started[3] == "s4", "{started:?}");
        assert!(states(&store, &ended.run).iter().all(|step| [StepStatus::Done, StepStatus::Reused].contains(&step.state)));
    }

    #[test]
    fn too_little_disk_space_is_reported_beforehand() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        assert_eq!(lacks_space(&store, 3, 100), None);
        let words = lacks_space(&store, 1_000_000, 1 << 40).unwrap();
        assert!(words.starts_with("needs about 976.56 PiB for 1000000 units, and "), "{words}");
    }

    impl AnyStage for Sum {
        fn params(&self) -> Value {
            json!({"number": self.number})
        }

        fn check(&self) -> Vec<ovenbird_stages::Problem> {
            Vec::new()
        }

        fn units(&self, _inputs: &Inputs) -> ovenbird_stages::Result<Units> {
            Ok(Units::One)
        }

        fn run(&self, units: &[Unit], cx: &Context<'_>) -> ovenbird_stages::Result<()> {
            let draft = cx.begin(&units[0])?;
            let sum = sum(self.number, cx.inputs.ports.values().map(|files| read(files)));
            draft.write(SUM, "sum.json", sum.to_string().as_bytes())?;
            cx.commit(draft, [].into())
        }
    }

    /// What a step is made from: its number, and what it reads.
    type Made = (u8, Option<u8>, Option<u8>);
    /// A step: its number, and the earlier steps that it reads from.
    type Node = (u8, Option<usize>, Option<usize>);

    fn pipeline(nodes: &[Node]) -> Pipeline {
        let step = |(place, (number, left, right)): (usize, &Node)| {
            let source = |port: &str, step: &Option<usize>| Some((port.to_owned(), Source::Step { step: (*step)?, port: "sum".into() }));
            Step {
                id: StepId::of_stage(&format!("s{place}")),
                entry: ENTRY,
                stage: Box::new(Sum { number: *number }),
                inputs: source("left", left).into_iter().chain(source("right", right)).collect(),
                resources: Resources { cpu: 1, memory: 0, gpu: 0 },
                on_bad_item: OnBadItem::Fail,
                max_silence: Duration::from_secs(1800),
                most_items: None,
            }
        };
        let steps = nodes.iter().enumerate().map(step).collect();
        Pipeline { name: "sums".into(), description: String::new(), steps, matrix: None, request: Request::default() }
    }

    /// What every step comes to, and what it is made from.
    fn expected(nodes: &[Node]) -> Vec<(u8, Made)> {
        let mut sums: Vec<(u8, Made)> = Vec::new();
        for (number, left, right) in nodes {
            let of = |step: &Option<usize>| step.map(|step| sums[step].0);
            let recipe = (*number, of(left), of(right));
            sums.push((sum(*number, recipe.1.into_iter().chain(recipe.2)), recipe));
        }
        sums
    }

    fn nodes() -> impl Strategy<Value = Vec<Node>> {
        let node = (0..4_u8, any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4_u8);
        prop::collection::vec(node, 1..9).prop_map(|drawn| {
            let earlier =
                |place: usize, index: prop::sample::Index, is_there: bool| (place > 0 && is_there).then(|| index.index(place.max(1)));
            let node = |(place, (number, left, right, ports)): (usize, (u8, prop::sample::Index, prop::sample::Index, u8))| {
                (number, earlier(place, left, ports & 1 == 1), earlier(place, right, ports & 2 == 2))
            };
            drawn.into_iter().enumerate().map(node).collect()
        })
    }

    /// Changes a number, or where a port reads from, without making a circle.
    fn edited(mut nodes: Vec<Node>, place: prop::sample::Index, number: u8, source: Option<prop::sample::Index>) -> Vec<Node> {
        let place = place.index(nodes.len());
        match source.filter(|_| place > 0) {
            Some(source) => nodes[place].1 = Some(source.index(place)),
            None => nodes[place].0 = number,
        }
        nodes
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        /// After any edits, what an incremental run comes to is what a clean run comes to, and it makes exactly what was never
        /// made before.
        #[test]
        fn incremental_runs_equal_clean_ones_and_make_the_least(
            first in nodes(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8, prop::option::of(any::<prop::sample::Index>())), 1..5),
        ) {
            let home = tempfile::tempdir().unwrap();
            let store = Store::open(home.path()).unwrap();
            let options = Options { cpu: 2, memory: 1 << 30, devices: vec![tch::Device::Cpu], rehash: false, is_measuring: false, is_repair: false };
            let mut known = BTreeSet::new();
            let mut nodes = first;
            for edit in std::iter::once(None).chain(edits.into_iter().map(Some)) {
                if let Some((place, number, source)) = edit {
                    nodes = edited(nodes, place, number, source);
                }
                let sums = expected(&nodes);
                let new: BTreeSet<_> = sums.iter().map(|(_, recipe)| *recipe).filter(|recipe| !known.contains(recipe)).collect();
                let wanted: Vec<usize> = (0..nodes.len()).collect();
                let mut n_made = 0;
                let mut count_made = |stamped: &Stamped| n_made += usize::from(matches!(stamped.event, Event::UnitCommitted { .. }));
                let ended = run(&Arc::new(pipeline(&nodes)), &wanted, &store, &options, &mut count_made).unwrap();
                prop_assert!(ended.error.is_none());
                prop_assert_eq!(n_made, new.len(), "{:?}", nodes);
                for (step, (sum, _)) in states(&store, &ended.run).into_iter().zip(&sums) {
                    let Status::Valid(artifact) = store.artifact(&step.kind, &step.fingerprint.unwrap()).unwrap() else { panic!("{}", step.id) };
                    prop_assert_eq!(read(&artifact.port("sum")), *sum);
                }
                known.extend(new);
            }
        }
    }
}
