//! The run loop: checks steps, starts workers, and records events.
//!
//! One loop owns all state and receives messages from workers, signals and a timer; tokio hosts only this loop. Workers are plain
//! threads that get a stage, its missing units and a context. A step is checked once all steps that it reads from are done.
//!
//! If a step fails, the steps that depend on it are skipped, and all others run.

mod gauge;
pub(crate) mod local;
#[cfg(test)]
mod tests;

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
    Artifact, Fingerprint, Ledger, Owner, Recovered, Status, Store,
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
    machine::{host, peak_memory, reset_peak_memory},
    output::{count, duration},
    pipeline::{Pipeline, Step, step_id::StepId},
    plan::{self, Checked, FileInputs, Made, Work, previous_run::PreviousRun},
    reason,
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
        process: Some(Owner::me().to_string()),
        host: Some(host()),
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
    StepInfo { id: step.id.clone(), kind: step.entry.kind.into(), after, inputs: reason::sources(pipeline, step) }
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
    /// Once the user has asked to stop: when running steps that have not ended are given up.
    given_up: Option<Instant>,
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
            given_up: None,
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
            if self.given_up.is_some_and(|at| Instant::now() >= at) {
                return self.give_up();
            }
        }
    }

    /// Asks running steps to keep what they have finished and to end; the second time, gives them up.
    fn interrupt(&mut self) -> Result<()> {
        let is_second = self.stop.swap(true, Ordering::SeqCst);
        self.given_up = Some(if is_second { Instant::now() } else { Instant::now() + self.options.grace });
        if is_second { Ok(()) } else { self.emit(Event::Interrupted) }
    }

    /// Says of every running step how much of its work is lost. Their threads end with the program.
    fn give_up(&mut self) -> Result<()> {
        let running = self.states.iter().filter(|(_, state)| matches!(state, State::Running(_))).map(|(place, _)| *place);
        running.collect::<Vec<_>>().into_iter().try_for_each(|place| self.stopped(place))
    }

    /// Notes that a step has stopped, and how much of its work is lost.
    fn stopped(&mut self, place: usize) -> Result<()> {
        let before = self.states.insert(place, State::Failed);
        let Some(State::Running(gauge)) = before else { return Ok(()) };
        if gauge.is_kept {
            return Ok(());
        }
        let words = format!("stopped: {} of work will be done again", duration(gauge.saved.elapsed().as_secs_f64()));
        self.emit(Event::StepNote { step: self.id(place), words })
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
                refused.push((*place, Error::Usage { problem, hint: "write `gpu: 1`, or leave out `gpu`".into() }));
            } else if needed > n_left {
                refused.push((*place, Error::LacksDevices { needed, n_left }));
            }
        }
        refused.into_iter().try_for_each(|(place, error)| self.fail(place, &Failure::Known(error)))
    }

    fn start_check(&self, place: usize, files: Arc<FileInputs>) {
        let (pipeline, store, sender) = (Arc::clone(self.pipeline), self.store.clone(), self.sender.clone());
        let (previous, is_demanded) = (self.previous.clone(), self.demanded.contains(&place));
        let is_forced = self.options.forced.contains(&place) && !self.settled.contains_key(&place);
        let made: Made = pipeline.steps[place].upstream().into_iter().map(|step| (step, self.made[&step].clone())).collect();
        thread::spawn(move || {
            let step = &pipeline.steps[place];
            let checked = guard(|| match plan::check(step, is_demanded || is_forced, &files, &made, &store, &previous)? {
                Checked::Reused(stored) if is_forced => plan::anew(step, &files, &made, stored),
                checked => Ok(checked),
            });
            // The receiver is gone once the loop has ended because its log could not be written.
            drop(sender.send(Message::Checked(place, checked)));
        });
    }

    /// Whether two steps can share a pass over the same images.
    fn share_a_pass(&self, one: usize, other: usize) -> bool {
        let is_alone = [one, other].map(|place| one != other && self.options.forced.contains(&place));
        let [one, other] = [one, other].map(|place| &self.pipeline.steps[place]);
        let is_same = |port: &str| one.inputs.get(port) == other.inputs.get(port);
        !self.options.is_measuring
            && is_alone.iter().all(|is_alone| !is_alone)
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
            let finished = match (&tasks[..], tasks[0].work.stored.as_deref()) {
                ([task], Some(stored)) => vec![local::run_anew(task, stored, context)],
                (tasks, _) => local::run_steps(tasks, context),
            };
            let finished = finished.into_iter().map(|finished| finished.map(Box::new));
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
                gauge.saved = Instant::now();
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
            Progress::Kept(words) => {
                gauge.is_kept = true;
                return self.emit(Event::StepNote { step, words });
            }
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
        // The run as a whole reports that it was stopped.
        if matches!(failure, Failure::Known(Error::Stage(ovenbird_stages::Error::Stopped))) {
            return self.stopped(place);
        }
        self.states.insert(place, State::Failed);
        self.release(place);
        let (error, hint, code) = match failure {
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
            self.emit(Event::Notice { words: format!("the damaged unit {unit} was moved to {}", aside.display()) })?;
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
