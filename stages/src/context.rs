//! What a running stage may use: its inputs, its device, drafts of its units, the policy for items that fail, and progress.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use ovenbird_cache::{
    Claim, Digest, Draft, DraftFile, Lease, ReusableItems, Status, Store, UnitKey, UnitRecord, Watch, inputs::InputFile, unit_name,
    verify::Depth,
};
use ovenbird_data::annotations::ImageId;
use ovenbird_models::checkpoint::{not_finite, write_safetensors};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use crate::{
    Error, Result,
    error::{malformed, write_error},
    ports::{Artifact, Inputs, Out, PortInfo},
    units::Unit,
};

/// Progress that a running stage reports.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// How many items there are to do in this execution, once that is known.
    Total(u64),
    /// Some more items are done.
    Tick(u64),
    /// A note for the operator: a skipped item and why, a measurement.
    Note(String),
    /// It waits for another process, or for free space on the disk.
    Waiting,
    /// The network has worked on a batch.
    Flow {
        /// Crops or images in it.
        views: u64,
        /// Jobs that were ready when it began: 0 means that the network waits for decoding and cropping.
        ready: u64,
    },
    /// Measurements at a step of a training.
    Measured {
        /// Counted from 1.
        step: u64,
        /// By name: losses, learning rate.
        values: BTreeMap<String, f64>,
    },
    /// An item failed and is skipped.
    Failed(FailedItem),
    /// The finished work of a unit that was cut off is kept; how far it got, in words.
    Kept(String),
    /// A unit is published.
    Committed {
        /// Its place among the units of its stage.
        unit: usize,
        /// Size of its files.
        bytes: u64,
    },
}

/// An item that was skipped, and why.
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

/// The policy for items that fail, such as images that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum OnBadItem {
    /// The stage fails.
    #[default]
    Fail,
    /// The item is skipped and listed with its unit, unless more than this part of the stage's items fails.
    Skip {
        /// From 0 to 1.
        max_failed_ratio: f64,
    },
}

/// The file of a unit that lists its failed items; there only if there are some.
pub const FAILED_FILE: &str = "failed.json";

/// The file of a unit that lists what another try may bring, such as URLs whose host did not answer; there only if there is some. The unit is whole
/// without it.
pub const RETRY_FILE: &str = "retry.json";

/// The metric of a unit with failed items: how many items there are in all.
const FAILED_OF: &str = "failed_of";

/// Checkpoints kept before the last one, to continue from if that one is damaged.
const SPARE_CHECKPOINTS: usize = 1;
/// How often a transient failure is retried, counting the first attempt.
const ATTEMPTS: u32 = 4;
/// How long to wait before the second time; four times as long before each further one.
const BACK_OFF: Duration = Duration::from_millis(100);

/// All that a stage may use besides its parameters.
pub struct Context<'a> {
    /// Where units are published.
    pub store: &'a Store,
    /// The stage's kind.
    pub kind: &'static str,
    /// Every unit of the stage, the published ones too.
    pub units: &'a [Unit],
    /// Every item of the stage; units are ranges of them.
    pub items: &'a [Digest],
    /// The files at its input ports.
    pub inputs: &'a Inputs,
    /// In a dry run: how many items each stage makes; the others have no inputs. A training then has one checkpoint, after as many steps.
    pub most_items: Option<usize>,
    /// Where networks run: see [`Stage::USES_DEVICE`].
    pub device: tch::Device,
    /// Whether that device has instructions for bf16.
    pub has_bf16: bool,
    /// How many threads the stage may use besides the network's own.
    pub threads: usize,
    /// The policy for items that fail, such as images that cannot be decoded.
    pub on_bad_item: OnBadItem,
    /// How many items have failed so far, in published units and in those that are being made here.
    pub n_failed: &'a AtomicU64,
    /// Watches the processes that make other units of the stage.
    pub watch: &'a Mutex<Watch>,
    /// Whether the stage should stop where it is.
    pub is_stopped: &'a (dyn Fn() -> bool + Sync),
    /// Receives the progress.
    pub report: &'a (dyn Fn(Progress) + Send + Sync),
}

/// The failed items that a published unit lists.
pub fn failed_items(store: &Store, record: &UnitRecord) -> Result<Vec<FailedItem>> {
    listed_items(store, record, FAILED_FILE)
}

/// The items of a published unit that another try may bring: see [`RETRY_FILE`].
pub(crate) fn retriable_items(store: &Store, record: &UnitRecord) -> Result<Vec<FailedItem>> {
    listed_items(store, record, RETRY_FILE)
}

fn listed_items(store: &Store, record: &UnitRecord, name: &str) -> Result<Vec<FailedItem>> {
    let Some(listed) = record.files.iter().find(|file| file.name == name) else { return Ok(Vec::new()) };
    let path = store.unit_path(&unit_name(&record.key.kind, &record.key.fingerprint)).join(name);
    let unit = Some(record.key.fingerprint);
    let file = InputFile { name: name.into(), path, bytes: listed.bytes, digest: listed.content(), unit };
    serde_json::from_slice(&file.read()?).map_err(|error| malformed(&file.path, error.to_string()))
}

/// How many items failed in some units of a stage, in their order, and of how many; and why the last one failed.
///
/// Units with items list their own failed items; `n_items`: how many items the stage has. Checkpoints of a training have none, and the last
/// one lists all that failed so far.
pub fn count_failed(store: &Store, units: &[UnitRecord], n_items: usize) -> Result<([usize; 2], String)> {
    let (units, n_items) = match units {
        [.., last] if n_items == 0 => {
            (&units[units.len() - 1..], last.metrics.get(FAILED_OF).and_then(Value::as_u64).unwrap_or(0) as usize)
        }
        _ => (units, n_items),
    };
    let (mut n_failed, mut last) = (0, String::new());
    for unit in units {
        let failed = failed_items(store, unit)?;
        n_failed += failed.len();
        last = failed.into_iter().next_back().map_or(last, |failed| failed.reason);
    }
    // Older units without items do not say of how many.
    Ok(([if n_items == 0 { 0 } else { n_failed }, n_items], last))
}

/// Fails if more items have failed than the policy allows; `last`: why the last one failed.
pub fn refuse_too_many([n_failed, n_items]: [usize; 2], max_failed_ratio: f64, last: &str) -> Result<()> {
    if n_failed as f64 > max_failed_ratio * n_items as f64 {
        return Err(Error::TooManyFailed { n_failed: n_failed as u64, n_items, max_failed_ratio, last: last.into() });
    }
    Ok(())
}

impl Context<'_> {
    /// Whether this is a dry run on the CPU, which tries a pipeline out before it goes to a GPU.
    pub(crate) fn is_light(&self) -> bool {
        self.most_items.is_some() && self.device == tch::Device::Cpu
    }

    /// Random numbers of a unit: the same in every run, on every machine.
    pub fn rng(&self, unit: &Unit) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(*unit.fingerprint.as_bytes())
    }

    /// Reports how many items this execution will make.
    pub fn total(&self, n_items: u64) {
        (self.report)(Progress::Total(n_items));
    }

    /// Reports that more items are done.
    pub fn tick(&self, n_items: u64) {
        (self.report)(Progress::Tick(n_items));
    }

    /// Reports that the network has embedded more views, and how many jobs were ready for it.
    pub(crate) fn flow(&self, n_views: usize, n_ready: usize) {
        (self.report)(Progress::Flow { views: n_views as u64, ready: n_ready as u64 });
    }

    /// Reports measurements at a step of a training, counted from 1.
    pub(crate) fn measured(&self, step: u64, values: &BTreeMap<String, f64>) {
        (self.report)(Progress::Measured { step, values: values.clone() });
    }

    /// Reports a note for the operator.
    pub fn note(&self, words: impl Into<String>) {
        (self.report)(Progress::Note(words.into()));
    }

    /// Fails with [`Error::Stopped`] once the stage should stop. [`Self::begin`] calls it; a stage whose units take long calls it in between.
    pub fn proceed(&self) -> Result<()> {
        if (self.is_stopped)() { Err(Error::Stopped) } else { Ok(()) }
    }

    /// Opens the draft of a unit without items. Dropping the draft discards the unit.
    pub fn begin(&self, unit: &Unit) -> Result<UnitDraft> {
        self.proceed()?;
        Ok(UnitDraft {
            draft: self.store.begin_unit(&self.key(unit))?,
            unit: unit.clone(),
            failed: Mutex::default(),
            n_items: AtomicU64::new(0),
            _lease: None,
        })
    }

    /// Opens the draft of a unit with items; `None` if another process is making the unit: processes share the work of a stage unit by
    /// unit.
    pub(crate) fn begin_claimed(&self, unit: &Unit) -> Result<Option<UnitDraft>> {
        self.proceed()?;
        match self.store.claim(self.kind, &unit.fingerprint, &mut self.watch.lock().unwrap_or_else(PoisonError::into_inner))? {
            Claim::Made(_) | Claim::Held(_) => Ok(None),
            Claim::Mine(lease) => {
                let draft = self.store.begin_unit(&self.key(unit))?;
                Ok(Some(UnitDraft { draft, unit: unit.clone(), failed: Mutex::default(), n_items: AtomicU64::new(0), _lease: Some(lease) }))
            }
        }
    }

    /// Units of the store that already hold items of this unit; `made_with`: a metric's name and the value that such a unit must have.
    pub(crate) fn reusable_items(&self, draft: &UnitDraft, made_with: Option<(&str, &str)>) -> Result<ReusableItems> {
        let Some(item_key) = draft.unit.item_key else { return Ok(ReusableItems::default()) };
        let wanted: HashSet<Digest> = self.items[draft.unit.items.clone()].iter().copied().collect();
        Ok(self.store.reusable_items(self.kind, &item_key, &wanted, made_with)?)
    }

    /// Prepares an item; transient failures, such as a network file system that does not answer, are retried.
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

    /// Returns a prepared item, or `None` if it failed and the stage's policy skips it; `n_items`: how many items the stage has.
    pub(crate) fn accept_or_skip<T>(&self, draft: &UnitDraft, item: &str, attempted: Attempted<T>, n_items: usize) -> Result<Option<T>> {
        let error = match attempted.result {
            Ok(prepared) => return Ok(Some(prepared)),
            Err(error) => error,
        };
        // Units of a training have no items of their own: each uses all of them.
        let n_failed = match self.items.is_empty() {
            true => draft.failed.lock().unwrap_or_else(PoisonError::into_inner).len() + 1,
            false => self.n_failed.fetch_add(1, Ordering::Relaxed) as usize + 1,
        };
        self.skip(draft, item, error, attempted.attempts, [n_failed, n_items])?;
        self.tick(1);
        Ok(None)
    }

    /// Lists a failed item with its unit. Fails if the stage's policy does not allow it; `counts`: how many items have failed so far, and of how many.
    pub(crate) fn skip(&self, draft: &UnitDraft, item: &str, error: Error, attempts: u32, counts: [usize; 2]) -> Result<()> {
        let OnBadItem::Skip { max_failed_ratio } = self.on_bad_item else { return Err(error) };
        use ovenbird_cache::Error::Read as Unreadable;
        use ovenbird_models::Error::{Malformed, Read};
        let (Error::Data(_) | Error::Cache(Unreadable { .. }) | Error::Models(Read { .. } | Malformed { .. })) = &error else {
            return Err(error);
        };
        let failed = FailedItem { item: item.into(), reason: with_sources(&error), attempts };
        refuse_too_many(counts, max_failed_ratio, &failed.reason)?;
        (self.report)(Progress::Failed(failed.clone()));
        draft.n_items.store(counts[1] as u64, Ordering::Relaxed);
        draft.failed.lock().unwrap_or_else(PoisonError::into_inner).push(failed);
        Ok(())
    }

    /// Notes that images are skipped because a port has nothing for them. Fails if the stage's policy does not allow it.
    pub(crate) fn skip_missing(&self, port: PortInfo, missing: &[ImageId], n_images: usize, hint: &str) -> Result<()> {
        let Some(first) = missing.first() else { return Ok(()) };
        let problem = format!("none for {} of {n_images} images, image {first} among them", missing.len());
        match self.on_bad_item {
            OnBadItem::Fail => {
                let hint = format!("{hint}; or skip these images: `on_bad_item: skip`");
                Err(Error::Input { port: port.name, problem, hint })
            }
            OnBadItem::Skip { max_failed_ratio } => {
                refuse_too_many([missing.len(), n_images], max_failed_ratio, &format!("image {first} has no `{}`", port.name))?;
                if missing.len() == n_images {
                    return Err(Error::Input { port: port.name, problem, hint: hint.into() });
                }
                self.note(format!("{}: {problem}: skipped", port.name));
                Ok(())
            }
        }
    }

    fn key(&self, unit: &Unit) -> UnitKey {
        UnitKey { kind: self.kind.into(), fingerprint: unit.fingerprint, item_key: unit.item_key }
    }

    /// Keeps the finished work of a unit that is cut off: the next run continues from it. `done`: how far it got, in words.
    pub(crate) fn keep_part(&self, draft: UnitDraft, items: &[Digest], metrics: BTreeMap<String, Value>, done: String) -> Result<()> {
        let UnitDraft { draft, unit, .. } = draft;
        self.store.keep_part(draft, self.key(&unit), items, metrics)?;
        (self.report)(Progress::Kept(done));
        Ok(())
    }

    /// The part of a unit that was cut off, every byte of it checked. A damaged one is set aside.
    pub(crate) fn part(&self, unit: &Unit) -> Result<Option<UnitRecord>> {
        let name = unit_name(self.kind, &unit.fingerprint);
        let problems = match self.store.part(self.kind, &unit.fingerprint)? {
            Status::Absent => return Ok(None),
            Status::Damaged(problems) => problems,
            Status::Valid(record) => {
                let findings = self.store.verify_part(&name, Depth::Full, &|_| {})?;
                if findings.is_empty() {
                    return Ok(Some(record));
                }
                findings.into_iter().map(|finding| finding.problem).collect()
            }
        };
        if let Some(path) = self.store.set_part_aside(&name, &problems.join("; "))? {
            self.note(format!("the work of a run that was stopped is damaged, and done again; it is now at {}", path.display()));
        }
        Ok(None)
    }

    /// Publishes a unit. Of the earlier checkpoints of a training that are not to stay, it deletes all but the last few.
    pub fn commit(&self, draft: UnitDraft, mut metrics: BTreeMap<String, Value>) -> Result<()> {
        let UnitDraft { draft, unit, failed, n_items, _lease } = draft;
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() {
            metrics.insert(FAILED_OF.into(), n_items.into_inner().into());
            draft.write(FAILED_FILE, &serde_json::to_vec_pretty(&failed).expect("BUG: names and reasons are plain JSON"))?;
        }
        let record = self.store.commit_unit(draft, self.key(&unit), &self.items[unit.items.clone()], metrics)?;
        self.store.remove_part(&unit_name(self.kind, &unit.fingerprint))?;
        (self.report)(Progress::Committed { unit: unit.index, bytes: record.bytes() });
        if unit.item_key.is_some() { Ok(()) } else { self.prune(&self.units[..unit.index]) }
    }

    /// Deletes checkpoints that are no longer needed.
    fn prune(&self, checkpoints: &[Unit]) -> Result<()> {
        for checkpoint in checkpoints.iter().rev().skip(SPARE_CHECKPOINTS).filter(|checkpoint| !checkpoint.stays) {
            let name = unit_name(self.kind, &checkpoint.fingerprint);
            if self.store.unit_path(&name).exists() {
                self.store.remove_unit(&name, "the training went on from later checkpoints")?;
            }
        }
        Ok(())
    }

    /// The failed items of a published unit: in a training, of the checkpoint before.
    pub(crate) fn failed_before(&self, index: usize) -> Result<Vec<FailedItem>> {
        match self.store.unit(self.kind, &self.units[index].fingerprint)? {
            Status::Valid(record) => failed_items(self.store, &record),
            Status::Damaged(_) | Status::Absent => Ok(Vec::new()),
        }
    }

    /// Opens an output port of a published unit: in a training, of the checkpoint before.
    pub fn published<T: Artifact>(&self, index: usize, port: Out<T>) -> Result<T> {
        let unit = &self.units[index];
        let Status::Valid(record) = self.store.unit(self.kind, &unit.fingerprint)? else {
            let problem = format!("unit {index} was published, but is damaged or gone");
            return Err(Error::Input { port: port.info().name, problem, hint: "type the same command again: it is made again".into() });
        };
        T::open(&self.store.unit_port(&record, port.info().name))
    }
}

/// A unit that is being made.
pub struct UnitDraft {
    draft: Draft,
    unit: Unit,
    failed: Mutex<Vec<FailedItem>>,
    /// How many items there are of which some failed.
    n_items: AtomicU64,
    /// Released after the draft.
    _lease: Option<Lease>,
}

impl UnitDraft {
    /// Adds items that failed earlier; `n_items`: of how many.
    pub(crate) fn carry(&self, failed: impl IntoIterator<Item = FailedItem>, n_items: usize) {
        self.n_items.store(n_items as u64, Ordering::Relaxed);
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
        Ok(self.draft.create(&format!("{}/{name}", port.info().name))?)
    }

    /// As [`Self::create`], by the port's name.
    pub(crate) fn create_at(&self, port: &str, name: &str) -> Result<DraftFile> {
        Ok(self.draft.create(&format!("{port}/{name}"))?)
    }

    /// Writes tensors and text as safetensors at an output port. Fails if a number is not finite.
    pub(crate) fn write_tensors<T>(
        &self,
        port: Out<T>,
        name: &str,
        tensors: &BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        for (tensor, numbers) in tensors {
            if let Some(problem) = not_finite(numbers) {
                let what = format!("tensor `{tensor}` of {}/{name}", port.info().name);
                return Err(ovenbird_cache::Error::Unsound { what, problem }.into());
            }
        }
        let mut file = self.create(port, name)?;
        let path = file.path().to_owned();
        write_safetensors(tensors, metadata, &mut file).map_err(|source| write_error(&path, source))?;
        Ok(file.finish()?)
    }

    /// Adds a file of this disk with this content at an output port, without another copy of its bytes where the disk allows it.
    pub(crate) fn link<T>(&self, port: Out<T>, name: &str, source: &Path, content: Digest) -> Result<()> {
        Ok(self.draft.link(&format!("{}/{name}", port.info().name), source, content)?)
    }

    /// Lists what another try may bring, if there is some.
    pub(crate) fn write_retriable(&self, items: &[FailedItem]) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        Ok(self.draft.write(RETRY_FILE, &serde_json::to_vec_pretty(items).expect("BUG: names and reasons are plain JSON"))?)
    }

    /// Writes a whole file at an output port.
    pub fn write<T>(&self, port: Out<T>, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.draft.write(&format!("{}/{name}", port.info().name), bytes)?)
    }
}

/// The result of preparing an item.
pub(crate) struct Attempted<T> {
    pub(crate) result: Result<T>,
    pub(crate) attempts: u32,
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
