//! What a stage is: typed parameters, typed ports, units, and the work itself.
//!
//! A stage author writes a struct (its parameters, as an operator writes them under `with:`), four constants, and
//! [`Stage::run`]. Everything that must not be got wrong twice is here: which recipe names a unit, when a unit is
//! published, where randomness comes from.
//!
//! [`Stage::run`] receives all units that must be made, not one: a stage loads its network once and decodes the images of
//! the next unit while the network works on this one. It publishes each unit as soon as it is whole.

use std::{
    collections::{BTreeMap, HashSet},
    marker::PhantomData,
    ops::Range,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use ovenbird_cache::{
    Claim, Digest, Donors, Draft, DraftFile, Fingerprint, Lease, Recipe, Status, Store, UnitKey, UnitRecord, Watch, chunk,
    inputs::InputFile, unit_name,
};
use ovenbird_data::annotations::ImageId;
use ovenbird_models::checkpoint::{not_finite, write_safetensors};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tch::Tensor;

use crate::{Error, Result, Rider, artifacts::Artifact, clip::PRECISION, pass::ride};

/// A named kind of work. The implementing struct *is* its parameters.
pub trait Stage: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// How pipelines name it, such as `clip/globals`.
    const KIND: &'static str;
    /// Raised when the same recipe would give other results.
    const VERSION: u32;
    /// What it reads.
    const INPUTS: &'static [PortInfo];
    /// What it writes.
    const OUTPUTS: &'static [PortInfo];

    /// Contradictions among the parameters, all of them, found without touching files or devices.
    fn check(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// How the work is divided into what is done, lost and redone as a whole. Asked before every run and every plan, so it
    /// reads tables, never pixels or weights.
    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(Units::One)
    }

    /// Makes the given units, in order, publishing each by [`Context::commit`]. For a chain they are its last links. A stage that
    /// rides does so by riding alone.
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        ride(&[Stage::rider(self, units, cx)?])
    }

    /// Whether it runs a network on [`Context::device`]. A run gives such stages devices of their own; the others are given the CPU.
    const USES_DEVICE: bool = false;

    /// Whether the stage's items are the images of its port `annotations`, in ascending id, decoded from its port `images`: it can
    /// then share a pass over them with others.
    const RIDES: bool = false;

    /// How a stage that rides takes part in a pass.
    fn rider<'a>(&'a self, _units: &'a [Unit], _cx: &'a Context<'a>) -> Result<Rider<'a>> {
        panic!("BUG: `{}` does not ride", Self::KIND)
    }
}

/// Something wrong with a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which, below `with`: `clip.precision`; empty for the parameters as a whole.
    pub field: String,
    /// What was expected and what was found.
    pub problem: String,
}

impl Problem {
    /// The problems among some parameters, each given with whether it is sound and what was expected.
    pub(crate) fn unless(checks: &[(&str, bool, &str)]) -> Vec<Self> {
        let problem = |(field, _, expected): &(&str, bool, &str)| Self::new(*field, format!("expected {expected}"));
        checks.iter().filter(|(_, is_sound, _)| !is_sound).map(problem).collect()
    }

    /// Names a parameter and what is wrong with it.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// Whether an input may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It must be given.
    Required,
    /// It may be left out.
    Optional,
}

/// A port as the planner sees it.
#[derive(Debug, Clone, Copy)]
pub struct PortInfo {
    /// Its name under `in:`, or after the dot in `stage.output`.
    pub name: &'static str,
    /// What lies there, such as `features`; an edge joins equal kinds.
    pub kind: &'static str,
    /// Whether it may be left out (inputs).
    pub presence: Presence,
    /// How the names of such files end, in lower case; `/` stands for a folder.
    pub extensions: &'static [&'static str],
    /// What a file that a user brings must be: see [`Artifact::SHAPE`].
    pub shape: &'static str,
    /// What exactly is expected or written: shapes, units, order.
    pub doc: &'static str,
}

/// An input port. `T` is what a stage reads there.
#[derive(Debug)]
pub struct In<T> {
    info: PortInfo,
    kind: PhantomData<fn() -> T>,
}

// Deriving would ask the same of `T`.
impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<T> {}

impl<T: Artifact> In<T> {
    /// A port that must be given.
    pub const fn required(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Required, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }

    /// A port that may be left out.
    pub const fn optional(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Optional, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }

    /// The port as the planner sees it.
    pub const fn info(&self) -> PortInfo {
        self.info
    }
}

/// An output port. `T` is what a stage downstream reads there.
#[derive(Debug)]
pub struct Out<T> {
    info: PortInfo,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T: Artifact> Out<T> {
    /// A port with its documentation.
    pub const fn new(name: &'static str, doc: &'static str) -> Self {
        Self {
            info: PortInfo { name, kind: T::KIND, presence: Presence::Required, extensions: T::EXTENSIONS, shape: T::SHAPE, doc },
            kind: PhantomData,
        }
    }

    /// The port as the planner sees it.
    pub const fn info(&self) -> PortInfo {
        self.info
    }
}

/// The files behind every input port of a stage.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// Files in order, by port.
    pub ports: BTreeMap<String, Vec<InputFile>>,
}

impl Inputs {
    /// Opens what lies at a port that must be given.
    pub fn read<T: Artifact>(&self, port: In<T>) -> Result<T> {
        T::open(self.files(port.info))
    }

    /// Opens what lies at a port, if it was given.
    pub fn read_if_given<T: Artifact>(&self, port: In<T>) -> Result<Option<T>> {
        self.ports.get(port.info.name).map(|files| T::open(files)).transpose()
    }

    fn files(&self, port: PortInfo) -> &[InputFile] {
        self.ports.get(port.name).expect("BUG: the planner checks that required ports are given")
    }
}

/// How a stage's work is divided.
#[derive(Debug)]
pub enum Units {
    /// All of it at once.
    One,
    /// Items that do not depend on each other, cut into units by content.
    Independent {
        /// One digest an item, covering all that the item's result depends on besides the remaining inputs: its id and its
        /// content.
        items: Vec<Digest>,
        /// The ports whose content the item digests stand for: a unit's identity holds its items in place of these.
        replaces: Vec<&'static str>,
    },
    /// Steps of which each continues the one before (training). The artifact holds the last one, and those that are to stay.
    Chain {
        /// How many.
        links: u32,
        /// How many steps they have all together.
        steps: u32,
        /// Places of those that stay besides the last.
        stay: Vec<u32>,
    },
}

/// A piece that is done, verified, lost and redone as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its place among the units of its stage.
    pub index: usize,
    /// Which items it holds, of the stage's own list; empty for one unit and for links of a chain.
    pub items: Range<usize>,
    /// Its name.
    pub fingerprint: Fingerprint,
    /// Of a unit that holds items: see [`UnitKey::family`].
    pub family: Option<Fingerprint>,
    /// Whether the artifact holds it. Only of links of a chain does it not hold all.
    pub stays: bool,
}

impl Units {
    /// How many items there are, or steps of a chain, or 1.
    pub fn count(&self) -> usize {
        match self {
            Self::One => 1,
            Self::Independent { items, .. } => items.len(),
            Self::Chain { steps, .. } => *steps as usize,
        }
    }

    /// Leaves the first items, or of a chain the first steps of the first link.
    pub fn truncate(&mut self, n_items: usize) {
        match self {
            Self::One => {}
            Self::Independent { items, .. } => items.truncate(n_items),
            Self::Chain { links, steps, .. } => {
                *steps = steps.div_ceil((*links).max(1)).min(u32::try_from(n_items).unwrap_or(u32::MAX));
                *links = (*links).min(1);
            }
        }
    }

    /// Names every unit of a stage with this recipe; the second list holds the items they are ranges of.
    pub fn of(self, recipe: &Recipe) -> (Vec<Unit>, Vec<Digest>) {
        let without_items = |index: usize, fingerprint, stays| Unit { index, items: 0..0, fingerprint, family: None, stays };
        match self {
            Self::One => (vec![without_items(0, recipe.fingerprint(), true)], Vec::new()),
            Self::Chain { links, stay, .. } => {
                let chain = recipe.fingerprint();
                let link = |link: u32| {
                    let stays = link + 1 == links || stay.contains(&link);
                    without_items(link as usize, chain.part("ovenbird link 1", &link.to_le_bytes()), stays)
                };
                ((0..links).map(link).collect(), Vec::new())
            }
            Self::Independent { items, replaces } => {
                let mut shared = recipe.clone();
                shared.inputs.retain(|port, _| !replaces.contains(&port.as_str()));
                let family = shared.fingerprint();
                let unit = |(index, range): (usize, Range<usize>)| {
                    let content = Digest::of_list("ovenbird items 1", items[range.clone()].iter().map(|item| ("", *item)));
                    let fingerprint = family.part("ovenbird unit 1", content.as_bytes());
                    Unit { index, items: range, fingerprint, family: Some(family), stays: true }
                };
                (chunk::cut(&items).into_iter().enumerate().map(unit).collect(), items)
            }
        }
    }
}

/// What a stage says while it works.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// How many items there are to do in this execution, once that is known.
    Total(u64),
    /// Some more items are done.
    Tick(u64),
    /// Something the operator should read: a skipped item and why, a measurement.
    Note(String),
    /// It waits for something outside: another process, room on the disk.
    Waiting,
    /// The network has worked on a batch.
    Flow {
        /// Crops or images in it.
        views: u64,
        /// Pieces of work that were ready when it began: 0 means that the network waits for decoding and cutting.
        ready: u64,
    },
    /// What was measured at a step of a training.
    Measured {
        /// Counted from 1.
        step: u64,
        /// By name: losses, learning rate.
        values: BTreeMap<String, f64>,
    },
    /// An item could not be read or understood, and is left out.
    Failed(FailedItem),
    /// A unit is published.
    Committed {
        /// Its place among the units of its stage.
        unit: usize,
        /// Size of its files.
        bytes: u64,
    },
}

/// An item that has no result, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailedItem {
    /// Its name: an image's file.
    pub item: String,
    /// What was expected and what was found.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// What to do about an item that cannot be read or understood.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum OnBadItem {
    /// The stage fails.
    #[default]
    Fail,
    /// The item is left out and noted with its unit, unless more than this part of a stage's items fails.
    Skip {
        /// From 0 to 1.
        max_failed_ratio: f64,
    },
}

/// The file of a unit that lists its failed items; there only if there are some.
pub const FAILED_FILE: &str = "failed.json";

/// How many links of a chain stay before the one that was made last: what there is to go on from when that one is damaged.
const SPARE_LINKS: usize = 2;
/// How often something is tried that may go well the next time.
const ATTEMPTS: u32 = 4;
/// How long to wait before the second time; four times as long before each further one.
const BACK_OFF: Duration = Duration::from_millis(100);

/// What a stage may use besides its parameters.
pub struct Context<'a> {
    /// Where units are published.
    pub store: &'a Store,
    /// The stage's kind.
    pub kind: &'static str,
    /// Every unit of the stage, the published ones too.
    pub units: &'a [Unit],
    /// Every item of the stage; units hold ranges of them.
    pub items: &'a [Digest],
    /// What the stage reads.
    pub inputs: &'a Inputs,
    /// How many items of each stage a dry run makes: of the others there is nothing to read. A chain has one link then, of as many steps.
    pub most_items: Option<usize>,
    /// Where networks run: see [`Stage::USES_DEVICE`].
    pub device: tch::Device,
    /// Whether that device has instructions for bf16.
    pub has_bf16: bool,
    /// How many threads the stage may keep busy besides the network's own.
    pub threads: usize,
    /// What to do about an item that cannot be read or understood.
    pub on_bad_item: OnBadItem,
    /// How many items have failed so far: of published units, whoever made them, and of those in the making here.
    pub n_failed: &'a AtomicU64,
    /// Watches the processes that make other units of the stage.
    pub watch: &'a Mutex<Watch>,
    /// Whether the stage should stop where it is.
    pub is_stopped: &'a (dyn Fn() -> bool + Sync),
    /// Receives progress.
    pub report: &'a (dyn Fn(Progress) + Send + Sync),
}

/// The failed items that a published unit lists.
pub fn failed_items(store: &Store, record: &UnitRecord) -> Result<Vec<FailedItem>> {
    let Some(listed) = record.files.iter().find(|file| file.name == FAILED_FILE) else { return Ok(Vec::new()) };
    let path = store.unit_path(&unit_name(&record.key.kind, &record.key.fingerprint)).join(FAILED_FILE);
    let unit = Some(record.key.fingerprint);
    let file = InputFile { name: FAILED_FILE.into(), path, bytes: listed.bytes, digest: listed.content(), unit };
    serde_json::from_slice(&file.read()?).map_err(|error| crate::error::malformed(&file.path, error.to_string()))
}

/// Fails where more items have failed than a policy allows; `last`: why the last one did.
pub fn refuse_too_many([n_failed, n_items]: [usize; 2], max_failed_ratio: f64, last: &str) -> Result<()> {
    if n_failed as f64 > max_failed_ratio * n_items as f64 {
        return Err(Error::TooManyFailed { n_failed: n_failed as u64, n_items, max_failed_ratio, last: last.into() });
    }
    Ok(())
}

impl Context<'_> {
    /// Random numbers of a unit: the same in every run, on every machine.
    pub fn rng(&self, unit: &Unit) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(*unit.fingerprint.as_bytes())
    }

    /// Says how many items there are to do in this execution.
    pub fn total(&self, n_items: u64) {
        (self.report)(Progress::Total(n_items));
    }

    /// Says that more items are done.
    pub fn tick(&self, n_items: u64) {
        (self.report)(Progress::Tick(n_items));
    }

    /// Says that the network has worked on some more views, and how many pieces of work were ready for it.
    pub(crate) fn flow(&self, n_views: usize, n_ready: usize) {
        (self.report)(Progress::Flow { views: n_views as u64, ready: n_ready as u64 });
    }

    /// Says what was measured at a step of a training, counted from 1.
    pub(crate) fn measured(&self, step: u64, values: &BTreeMap<String, f64>) {
        (self.report)(Progress::Measured { step, values: values.clone() });
    }

    /// Says something that the operator should read.
    pub fn note(&self, words: impl Into<String>) {
        (self.report)(Progress::Note(words.into()));
    }

    /// Fails with [`Error::Stopped`] once the stage should stop. Asked at every [`Self::begin`]; a stage asks by
    /// itself where a unit takes long and can be cut short.
    pub fn proceed(&self) -> Result<()> {
        if (self.is_stopped)() { Err(Error::Stopped) } else { Ok(()) }
    }

    /// Opens the draft of a unit that holds no items. Dropping it loses the unit, and nothing else.
    pub fn begin(&self, unit: &Unit) -> Result<UnitDraft> {
        self.proceed()?;
        Ok(UnitDraft { draft: self.store.begin_unit(&self.key(unit))?, unit: unit.clone(), failed: Mutex::default(), _lease: None })
    }

    /// Opens the draft of a unit that holds items; none where another process makes it meanwhile: several share the work of a
    /// stage unit by unit.
    pub(crate) fn begin_claimed(&self, unit: &Unit) -> Result<Option<UnitDraft>> {
        self.proceed()?;
        match self.store.claim(self.kind, &unit.fingerprint, &mut self.watch.lock().unwrap_or_else(PoisonError::into_inner))? {
            Claim::Made(_) | Claim::Held(_) => Ok(None),
            Claim::Mine(lease) => {
                let draft = self.store.begin_unit(&self.key(unit))?;
                Ok(Some(UnitDraft { draft, unit: unit.clone(), failed: Mutex::default(), _lease: Some(lease) }))
            }
        }
    }

    /// What the store holds already of the items of some units, in the same arithmetic.
    pub(crate) fn donors(&self, draft: &UnitDraft, precision: Option<&str>) -> Result<Donors> {
        let Some(family) = draft.unit.family else { return Ok(Donors::default()) };
        let wanted: HashSet<Digest> = self.items[draft.unit.items.clone()].iter().copied().collect();
        Ok(self.store.donors(self.kind, &family, &wanted, precision.map(|precision| (PRECISION, precision)))?)
    }

    /// Prepares an item; what may go well the next time (a network file system that does not answer) is tried again.
    pub(crate) fn attempt<T>(&self, prepare: impl Fn() -> Result<T>) -> Attempted<T> {
        let mut pause = BACK_OFF;
        for attempts in 1.. {
            match prepare() {
                Err(error) if attempts < ATTEMPTS && error.is_transient() && self.proceed().is_ok() => thread::sleep(pause),
                result => return Attempted { result, attempts },
            }
            pause *= 4;
        }
        unreachable!("the last attempt returns")
    }

    /// A prepared item of a unit, or `None` for one that failed and is left out by the stage's policy; `n_items`: how many the stage prepares
    /// in all.
    pub(crate) fn kept<T>(&self, draft: &UnitDraft, item: &str, attempted: Attempted<T>, n_items: usize) -> Result<Option<T>> {
        let error = match attempted.result {
            Ok(prepared) => return Ok(Some(prepared)),
            Err(error) => error,
        };
        // Links of a chain have no items of their own: each sees all of them.
        let n_failed = match self.items.is_empty() {
            true => draft.failed.lock().unwrap_or_else(PoisonError::into_inner).len() + 1,
            false => self.n_failed.fetch_add(1, Ordering::Relaxed) as usize + 1,
        };
        self.left_out(draft, item, error, attempted.attempts, [n_failed, n_items])?;
        self.tick(1);
        Ok(None)
    }

    /// Notes an item that failed with its unit, unless the stage's policy does not allow it; `counts`: how many have failed so far, and of how many.
    pub(crate) fn left_out(&self, draft: &UnitDraft, item: &str, error: Error, attempts: u32, counts: [usize; 2]) -> Result<()> {
        let OnBadItem::Skip { max_failed_ratio } = self.on_bad_item else { return Err(error) };
        use ovenbird_cache::Error::Read as Unreadable;
        use ovenbird_models::Error::{Malformed, Read};
        let (Error::Data(_) | Error::Cache(Unreadable { .. }) | Error::Models(Read { .. } | Malformed { .. })) = &error else {
            return Err(error);
        };
        let failed = FailedItem { item: item.into(), reason: with_sources(&error), attempts };
        refuse_too_many(counts, max_failed_ratio, &failed.reason)?;
        (self.report)(Progress::Failed(failed.clone()));
        draft.failed.lock().unwrap_or_else(PoisonError::into_inner).push(failed);
        Ok(())
    }

    /// Has images left out for which a port has nothing, by the stage's policy: says of how many of `n_images`, and names the first.
    pub(crate) fn leave_out_missing(&self, port: PortInfo, missing: &[ImageId], n_images: usize, hint: &str) -> Result<()> {
        let Some(first) = missing.first() else { return Ok(()) };
        let problem = format!("none for {} of {n_images} images, image {first} among them", missing.len());
        match self.on_bad_item {
            OnBadItem::Fail => {
                let hint = format!("{hint}; or leave these images out: `on_bad_item: skip`");
                Err(Error::Input { port: port.name, problem, hint })
            }
            OnBadItem::Skip { max_failed_ratio } => {
                refuse_too_many([missing.len(), n_images], max_failed_ratio, &format!("image {first} has no `{}`", port.name))?;
                if missing.len() == n_images {
                    return Err(Error::Input { port: port.name, problem, hint: hint.into() });
                }
                self.note(format!("{}: {problem}: left out", port.name));
                Ok(())
            }
        }
    }

    fn key(&self, unit: &Unit) -> UnitKey {
        UnitKey { kind: self.kind.into(), fingerprint: unit.fingerprint, family: unit.family }
    }

    /// Publishes a unit. Of the links of a chain that do not stay, the last few before it are kept.
    pub fn commit(&self, draft: UnitDraft, metrics: BTreeMap<String, Value>) -> Result<()> {
        let UnitDraft { draft, unit, failed, _lease } = draft;
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() {
            draft.write(FAILED_FILE, &serde_json::to_vec_pretty(&failed).expect("BUG: names and reasons are plain JSON"))?;
        }
        let record = self.store.commit_unit(draft, self.key(&unit), &self.items[unit.items.clone()], metrics)?;
        (self.report)(Progress::Committed { unit: unit.index, bytes: record.bytes() });
        if unit.family.is_some() { Ok(()) } else { self.prune(&self.units[..unit.index]) }
    }

    /// Removes the links of a chain that later ones have made superfluous.
    fn prune(&self, links: &[Unit]) -> Result<()> {
        for link in links.iter().rev().skip(SPARE_LINKS).filter(|link| !link.stays) {
            let name = unit_name(self.kind, &link.fingerprint);
            if self.store.unit_path(&name).exists() {
                self.store.remove_unit(&name, "the training went on from later links")?;
            }
        }
        Ok(())
    }

    /// What failed in a published unit: the link before, for a chain.
    pub(crate) fn failed_before(&self, index: usize) -> Result<Vec<FailedItem>> {
        match self.store.unit(self.kind, &self.units[index].fingerprint)? {
            Status::Valid(record) => failed_items(self.store, &record),
            Status::Damaged(_) | Status::Absent => Ok(Vec::new()),
        }
    }

    /// The files at an output port of a published unit: the link before, for a chain.
    pub fn published<T: Artifact>(&self, index: usize, port: Out<T>) -> Result<T> {
        let unit = &self.units[index];
        let Status::Valid(record) = self.store.unit(self.kind, &unit.fingerprint)? else {
            let problem = format!("unit {index} was published, but is no longer whole");
            return Err(Error::Input { port: port.info.name, problem, hint: "type the same command again: it is made again".into() });
        };
        T::open(&self.store.unit_port(&record, port.info.name))
    }
}

/// A unit in the making.
pub struct UnitDraft {
    draft: Draft,
    unit: Unit,
    failed: Mutex<Vec<FailedItem>>,
    /// Let go after the draft.
    _lease: Option<Lease>,
}

impl UnitDraft {
    /// Lists items that failed earlier.
    pub(crate) fn carry(&self, failed: impl IntoIterator<Item = FailedItem>) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).extend(failed);
    }

    /// The items that failed so far.
    pub(crate) fn failed(&self) -> Vec<FailedItem> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The unit being made.
    pub fn unit(&self) -> &Unit {
        &self.unit
    }

    /// Opens a file at an output port; several may be open at once.
    pub fn create<T>(&self, port: Out<T>, name: &str) -> Result<DraftFile> {
        Ok(self.draft.create(&format!("{}/{name}", port.info.name))?)
    }

    /// As [`Self::create`], by the port's name.
    pub(crate) fn create_at(&self, port: &str, name: &str) -> Result<DraftFile> {
        Ok(self.draft.create(&format!("{port}/{name}"))?)
    }

    /// Writes tensors and text as safetensors at an output port. Fails where a number is none.
    pub(crate) fn write_tensors<T>(
        &self,
        port: Out<T>,
        name: &str,
        tensors: &BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        for (tensor, numbers) in tensors {
            if let Some(problem) = not_finite(numbers) {
                let what = format!("tensor `{tensor}` of {}/{name}", port.info.name);
                return Err(ovenbird_cache::Error::Unsound { what, problem }.into());
            }
        }
        let mut file = self.create(port, name)?;
        let path = file.path().to_owned();
        write_safetensors(tensors, metadata, &mut file).map_err(|source| write_error(&path, source))?;
        Ok(file.finish()?)
    }

    /// Writes a whole file at an output port.
    pub fn write<T>(&self, port: Out<T>, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.draft.write(&format!("{}/{name}", port.info.name), bytes)?)
    }
}

/// What came of preparing an item.
pub(crate) struct Attempted<T> {
    pub(crate) result: Result<T>,
    pub(crate) attempts: u32,
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The object-safe twin of [`Stage`], for the registry and the program.
pub trait AnyStage: Send + Sync {
    /// The parameters with every default filled in.
    fn params(&self) -> Value;
    /// See [`Stage::check`].
    fn check(&self) -> Vec<Problem>;
    /// See [`Stage::units`].
    fn units(&self, inputs: &Inputs) -> Result<Units>;
    /// See [`Stage::run`].
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()>;
    /// See [`Stage::RIDES`].
    fn rides(&self) -> bool {
        false
    }
    /// See [`Stage::rider`].
    fn rider<'a>(&'a self, _units: &'a [Unit], _cx: &'a Context<'a>) -> Result<Rider<'a>> {
        panic!("BUG: this stage does not ride")
    }
}

impl<S: Stage> AnyStage for S {
    fn params(&self) -> Value {
        serde_json::to_value(self).expect("BUG: parameters are plain JSON")
    }

    fn check(&self) -> Vec<Problem> {
        Stage::check(self)
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Stage::units(self, inputs).map_err(|error| brought(error, inputs, S::INPUTS))
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        Stage::run(self, units, cx).map_err(|error| brought(error, cx.inputs, S::INPUTS))
    }

    fn rides(&self) -> bool {
        S::RIDES
    }

    fn rider<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<Rider<'a>> {
        Stage::rider(self, units, cx).map_err(|error| brought(error, cx.inputs, S::INPUTS))
    }
}

/// Readers do not know whose files they read: a fault of one that the user brought is the user's to mend, and the home is sound.
fn brought(error: Error, inputs: &Inputs, ports: &[PortInfo]) -> Error {
    use ovenbird_cache::Error::{Flipped, Malformed, OtherFormat};
    let (path, problem) = match &error {
        Error::Cache(Malformed { path, problem }) => (path, problem.clone()),
        Error::Cache(Flipped { path, what, .. }) => (path, format!("{what} does not match the digest in the file: it is damaged")),
        Error::Cache(OtherFormat { path, found, known }) => (path, format!("expected format {known}, found {found}")),
        _ => return error,
    };
    let is_there = |file: &InputFile| file.unit.is_none() && file.path == *path;
    let port = ports.iter().find(|port| inputs.ports.get(port.name).is_some_and(|files| files.iter().any(is_there)));
    match port {
        Some(PortInfo { name, shape, .. }) => {
            let hint = Some(format!("give `{name}` {shape}"));
            Error::Data(ovenbird_data::Error::Malformed { path: path.clone(), problem, hint })
        }
        None => error,
    }
}

/// An IO error of a file being written into a draft, in the store's words.
pub(crate) fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::Cache(ovenbird_cache::Error::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{STAGES, artifacts};

    fn file(name: &str, unit: Option<Fingerprint>) -> InputFile {
        InputFile { name: name.into(), path: name.into(), bytes: 0, digest: Digest::of(b""), unit }
    }

    #[test]
    fn a_fault_of_a_file_that_the_user_brought_is_none_of_the_home_at_any_port() {
        let damages: [fn() -> ovenbird_cache::Error; 3] = [
            || ovenbird_cache::Error::Malformed { path: "file".into(), problem: "expected an object, found a list".into() },
            || ovenbird_cache::Error::Flipped {
                path: "file".into(),
                what: "batch 1".into(),
                expected: Digest::of(b"a"),
                found: Digest::of(b"b"),
            },
            || ovenbird_cache::Error::OtherFormat { path: "file".into(), found: 2, known: 1 },
        ];
        let recipe = Recipe { kind: "a".into(), version: 1, params: Value::Null, inputs: BTreeMap::new() };
        let unit = Some(recipe.fingerprint());
        for port in STAGES.iter().flat_map(|stage| stage.inputs) {
            for damage in damages {
                let said = |unit| {
                    let inputs = Inputs { ports: [(port.name.to_owned(), vec![file("other", None), file("file", unit)])].into() };
                    brought(Error::Cache(damage()), &inputs, &[*port])
                };
                let error = said(None);
                assert!(matches!(error, Error::Data(_)), "{}: {error}", port.name);
                assert_eq!(error.hint().unwrap(), format!("give `{}` {}", port.name, port.shape));
                assert!(matches!(said(unit), Error::Cache(_)), "{}", port.name);
            }
        }
    }

    #[test]
    fn a_class_list_of_another_shape_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("classes.json");
        let read = |json: &str| {
            let mut written = tempfile::NamedTempFile::new_in(&folder).unwrap();
            std::io::Write::write_all(&mut written, json.as_bytes()).unwrap();
            written.persist(&path).unwrap();
            let file = InputFile { path: path.clone(), digest: Digest::of(json.as_bytes()), ..file("classes.json", None) };
            artifacts::Classes::open(&[file]).map(|artifacts::Classes(classes)| classes).map_err(|error| error.to_string())
        };
        assert_eq!(read("\u{feff}{\"base\": [\"owl\"], \"novel\": []}").unwrap().base, ["owl"]);
        for (json, problem) in [
            (r#"["owl", "wren"]"#, "expected an object, found another value"),
            (r#"[["owl"], ["wren"]]"#, "expected an object, found another value"),
            (r#""owl""#, "expected an object, found another value"),
            (r#"{"seen": ["owl"], "unseen": []}"#, "unknown field `seen`, expected `base` or `novel`"),
            (r#"{"base": ["owl"]}"#, "expected `novel`, found none"),
            (r#"{"base": "owl", "novel": []}"#, "base: expected a list, found the text \"owl\""),
            ("<html>", "expected json, found a web page"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
