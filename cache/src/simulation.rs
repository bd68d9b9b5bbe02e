//! Simulated power cuts and failing calls: the store's guarantees, checked on every state that they may leave on a disk.
//!
//! The store runs on a disk in memory that records all operations. After each prefix of the operations, everything fsynced is
//! on the disk; of the other operations any subset is, and one write may be torn or zeros. File systems leave fewer states than
//! this. A device that ignores fsync is not simulated.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io::{self, Write},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex},
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::{
    Digest, Provenance, Recipe, Recovered, Result, Status, Store, UnitKey, UnitRecord,
    disk::{Disk, DiskFile, Found},
    lease::Owner,
    publish::{Publisher, TEMPORARY},
    unit_name,
};

const HOME: &str = "/home";

#[derive(Debug, Clone, PartialEq)]
enum Node {
    /// Shared between images until one of them changes it.
    File(Arc<Vec<u8>>),
    Folder(BTreeMap<String, usize>),
}

/// An entry of a folder: the folder's node, and the entry's name.
type Entry = (usize, String);

#[derive(Debug, Clone)]
enum Op {
    Create {
        at: Entry,
        node: usize,
    },
    Write {
        node: usize,
        offset: usize,
        bytes: Vec<u8>,
    },
    SyncFile(usize),
    Rename {
        from: Entry,
        to: Entry,
        node: usize,
    },
    Remove(Entry),
    SyncFolder(usize),
    /// Not an operation: a call of the store returned or is about to begin.
    Mark(Mark),
}

#[derive(Debug, Clone, PartialEq)]
enum Mark {
    Committed(String),
    WillGo(String),
    SetAside(String),
}

/// The content of a disk; the first node is the root.
#[derive(Debug, Clone)]
struct Image {
    nodes: Vec<Node>,
}

impl Image {
    fn empty() -> Self {
        Self { nodes: vec![Node::Folder(BTreeMap::new())] }
    }

    fn folder(&mut self, node: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[node] {
            Node::Folder(entries) => entries,
            Node::File(_) => panic!("BUG: a file has no entries"),
        }
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut node = 0;
        for part in path.components() {
            if let Component::Normal(name) = part {
                let Node::Folder(entries) = &self.nodes[node] else { return Err(io::ErrorKind::NotADirectory.into()) };
                node = *entries.get(name.to_str().unwrap()).ok_or(io::ErrorKind::NotFound)?;
            }
        }
        Ok(node)
    }

    fn entry(&self, path: &Path) -> io::Result<Entry> {
        let folder = self.find(path.parent().unwrap())?;
        match self.nodes[folder] {
            Node::Folder(_) => Ok((folder, path.file_name().unwrap().to_str().unwrap().to_owned())),
            Node::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// Applies an operation; does nothing where its entries or files do not exist.
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { at: (folder, name), node } => drop(self.folder(*folder).insert(name.clone(), *node)),
            Op::Write { node, offset, bytes } => {
                if let Node::File(content) = &mut self.nodes[*node] {
                    let content = Arc::make_mut(content);
                    content.resize(content.len().max(offset + bytes.len()), 0);
                    content[*offset..offset + bytes.len()].copy_from_slice(bytes);
                }
            }
            Op::Rename { from, to, node } => {
                if self.folder(from.0).get(&from.1) == Some(node) {
                    self.folder(from.0).remove(&from.1);
                    self.folder(to.0).insert(to.1.clone(), *node);
                }
            }
            Op::Remove((folder, name)) => drop(self.folder(*folder).remove(name)),
            Op::SyncFile(_) | Op::SyncFolder(_) | Op::Mark(_) => {}
        }
    }

    /// Every file by its path.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut open = vec![(PathBuf::from("/"), 0)];
        while let Some((path, node)) = open.pop() {
            match &self.nodes[node] {
                Node::File(bytes) => drop(files.insert(path, bytes.to_vec())),
                Node::Folder(entries) => open.extend(entries.iter().map(|(name, node)| (path.join(name), *node))),
            }
        }
        files
    }

    fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let mut open = vec![(String::new(), 0)];
        while let Some((path, node)) = open.pop() {
            hasher.update(path.as_bytes()).update(&[0]);
            match &self.nodes[node] {
                Node::File(bytes) => {
                    hasher.update(&bytes.len().to_le_bytes()).update(bytes);
                }
                Node::Folder(entries) => open.extend(entries.iter().map(|(name, node)| (format!("{path}/{name}"), *node))),
            }
        }
        hasher.finalize().into()
    }
}

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Failure {
    /// EIO.
    Broken,
    /// ENOSPC.
    Full,
    /// A write takes only half of its bytes and reports that, without an error.
    Short,
}

#[derive(Debug)]
struct Inner {
    image: Image,
    log: Vec<Op>,
    /// The number of changing calls so far.
    n_calls: usize,
    fail: Option<(usize, Failure)>,
    /// Files whose fsync failed.
    lost: HashSet<usize>,
}

/// A disk in memory.
#[derive(Debug, Clone)]
struct SimDisk(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    node: usize,
    /// Whether it is a journal, which is never replaced and may lose lines.
    is_appended: bool,
}

impl SimDisk {
    fn new(image: Image) -> Self {
        Self(Arc::new(Mutex::new(Inner { image, log: Vec::new(), n_calls: 0, fail: None, lost: HashSet::new() })))
    }

    fn fail_at(&self, call: usize, failure: Failure) {
        self.0.lock().unwrap().fail = Some((call, failure));
    }

    /// Makes a changing call: counts it, and fails if it is the chosen one.
    fn call<T>(&self, change: impl FnOnce(&mut Inner) -> io::Result<T>) -> io::Result<T> {
        let mut inner = self.0.lock().unwrap();
        let turn = inner.n_calls;
        inner.n_calls += 1;
        match inner.fail {
            Some((call, Failure::Broken)) if call == turn => Err(io::Error::from_raw_os_error(5)),
            Some((call, Failure::Full)) if call == turn => Err(io::ErrorKind::StorageFull.into()),
            _ => change(&mut inner),
        }
    }

    fn record(inner: &mut Inner, op: Op) {
        inner.image.apply(&op);
        inner.log.push(op);
    }

    fn mark(&self, mark: Mark) {
        self.0.lock().unwrap().log.push(Op::Mark(mark));
    }

    fn create(&self, path: &Path, node: Node) -> io::Result<usize> {
        self.call(|inner| {
            let at = inner.image.entry(path)?;
            if inner.image.folder(at.0).contains_key(&at.1) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let place = inner.image.nodes.len();
            inner.image.nodes.push(node);
            Self::record(inner, Op::Create { at, node: place });
            Ok(place)
        })
    }
}

impl Disk for SimDisk {
    fn create_dir(&self, folder: &Path) -> io::Result<()> {
        self.create(folder, Node::Folder(BTreeMap::new())).map(drop)
    }

    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let node = self.create(path, Node::File(Arc::default()))?;
        Ok(Box::new(SimFile { disk: self.clone(), node, is_appended: false }))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let there = self.0.lock().unwrap().image.find(path);
        match there {
            Ok(node) => Ok(Box::new(SimFile { disk: self.clone(), node, is_appended: true })),
            Err(_) => Ok(Box::new(SimFile { disk: self.clone(), node: self.create(path, Node::File(Arc::default()))?, is_appended: true })),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let inner = self.0.lock().unwrap();
        match &inner.image.nodes[inner.image.find(path)?] {
            Node::File(bytes) => Ok(bytes.to_vec()),
            Node::Folder(_) => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn look(&self, path: &Path) -> io::Result<Found> {
        let inner = self.0.lock().unwrap();
        Ok(match &inner.image.nodes[inner.image.find(path)?] {
            Node::File(bytes) => Found::File(bytes.len() as u64),
            Node::Folder(_) => Found::Folder,
        })
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, bool)>> {
        let inner = self.0.lock().unwrap();
        let Node::Folder(entries) = &inner.image.nodes[inner.image.find(folder)?] else {
            return Err(io::ErrorKind::NotADirectory.into());
        };
        let is_folder = |node: &usize| matches!(inner.image.nodes[*node], Node::Folder(_));
        Ok(entries.iter().map(|(name, node)| (name.clone(), is_folder(node))).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(|inner| {
            let node = inner.image.find(from)?;
            let (from, to) = (inner.image.entry(from)?, inner.image.entry(to)?);
            if let Some(there) = inner.image.folder(to.0).get(&to.1).copied()
                && matches!(&inner.image.nodes[there], Node::Folder(entries) if !entries.is_empty())
            {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            Self::record(inner, Op::Rename { from, to, node });
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.call(|inner| {
            inner.image.find(path)?;
            let entry = inner.image.entry(path)?;
            Self::record(inner, Op::Remove(entry));
            Ok(())
        })
    }

    fn remove_dir(&self, folder: &Path) -> io::Result<()> {
        self.call(|inner| {
            let node = inner.image.find(folder)?;
            if !inner.image.folder(node).is_empty() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            let entry = inner.image.entry(folder)?;
            Self::record(inner, Op::Remove(entry));
            Ok(())
        })
    }

    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        self.call(|inner| {
            let node = inner.image.find(folder)?;
            Self::record(inner, Op::SyncFolder(node));
            Ok(())
        })
    }
}

impl Write for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let node = self.node;
        self.disk.call(|inner| {
            let is_short = inner.fail == Some((inner.n_calls - 1, Failure::Short));
            let bytes = if is_short && bytes.len() > 1 { &bytes[..bytes.len() / 2] } else { bytes };
            let Node::File(content) = &inner.image.nodes[node] else { panic!("BUG: written to a folder") };
            let offset = content.len();
            SimDisk::record(inner, Op::Write { node, offset, bytes: bytes.to_vec() });
            Ok(bytes.len())
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn sync(&mut self) -> io::Result<()> {
        let node = self.node;
        assert!(!self.disk.0.lock().unwrap().lost.contains(&node), "a file whose fsync has failed is fsynced again");
        let synced = self.disk.call(|inner| {
            SimDisk::record(inner, Op::SyncFile(node));
            Ok(())
        });
        if synced.is_err() && !self.is_appended {
            self.disk.0.lock().unwrap().lost.insert(node);
        }
        synced
    }
}

/// The work that the store does in a simulation.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    n_units: u8,
    n_files: u8,
    /// Whether the first unit is moved to quarantine and made again.
    with_quarantine: bool,
    /// Whether the last unit is deleted and made again.
    with_removal: bool,
}

const KIND: &str = "clip/globals";

fn key(unit: u8) -> UnitKey {
    UnitKey { kind: KIND.into(), fingerprint: blake3::hash(&[unit]).into(), item_key: Some(blake3::hash(b"item_key").into()) }
}

fn name(unit: u8) -> String {
    unit_name(KIND, &key(unit).fingerprint)
}

impl Scenario {
    fn recipe() -> Recipe {
        Recipe { kind: KIND.into(), version: 1, params: json!({}), inputs: BTreeMap::new() }
    }

    fn make(self, store: &Store, unit: u8) -> Result<UnitRecord> {
        let draft = store.begin_unit(&key(unit))?;
        for file in 0..self.n_files {
            draft.write(&format!("features/{file}.arrow"), &[unit ^ file; 700])?;
        }
        store.commit_unit(draft, key(unit), &[Digest::of(&[unit])], BTreeMap::new())
    }

    /// Makes everything that is missing, as a run does.
    fn finish(self, store: &Store, mark: &dyn Fn(Mark)) -> Result<()> {
        store.settle()?;
        store.write_plan(&Self::recipe(), &(0..self.n_units).map(|unit| key(unit).fingerprint).collect::<Vec<_>>())?;
        let mut records = Vec::new();
        for unit in 0..self.n_units {
            records.push(match store.unit_at(&name(unit))? {
                Status::Valid(record) => record,
                Status::Damaged(findings) => {
                    store.quarantine(&name(unit), &findings)?;
                    self.make(store, unit)?
                }
                Status::Absent => self.make(store, unit)?,
            });
            mark(Mark::Committed(name(unit)));
        }
        if !matches!(store.artifact(KIND, &Self::recipe().fingerprint())?, Status::Valid(_)) {
            let text = || String::from("test");
            let made =
                Provenance { program: text(), run: text(), host: text(), device: text(), libtorch: text(), started: text(), wall_s: 0.0 };
            store.commit_artifact(Self::recipe(), &["features"], records, made)?;
        }
        Ok(())
    }

    /// Does the whole work on an empty disk.
    fn run(self, store: &Store, mark: &dyn Fn(Mark)) -> Result<()> {
        self.finish(store, mark)?;
        if self.with_quarantine {
            mark(Mark::WillGo(name(0)));
            store.quarantine(&name(0), &["for a test".into()])?;
            mark(Mark::SetAside(name(0)));
            self.finish(store, mark)?;
        }
        if self.with_removal {
            let last = name(self.n_units - 1);
            mark(Mark::WillGo(last.clone()));
            store.remove_unit(&last, "for a test")?;
            self.finish(store, mark)?;
        }
        Ok(())
    }
}

fn store_on(disk: &SimDisk, owner: Owner) -> Store {
    Store::open_on(Publisher::new(Arc::new(disk.clone()), owner), Path::new(HOME)).unwrap()
}

fn home() -> Image {
    let mut image = Image::empty();
    image.nodes.push(Node::Folder(BTreeMap::new()));
    image.folder(0).insert("home".into(), 1);
    image
}

/// The files of units and artifacts on a disk, without journal, plans and quarantine.
fn results(image: &Image) -> BTreeMap<PathBuf, Vec<u8>> {
    let is_result = |path: &PathBuf| path.starts_with("/home/units") || path.starts_with("/home/artifacts");
    image.files().into_iter().filter(|(path, _)| is_result(path)).collect()
}

/// Calls `visit` with every state that a power cut after the first `n_done` operations may leave, and the operations lost in it.
fn crash_states(base: &Image, log: &[Op], n_done: usize, nodes: &[Node], random: &mut ChaCha8Rng, visit: &mut dyn FnMut(Image, &[usize])) {
    let done = &log[..n_done];
    let synced_after = |place: usize, is_sync: &dyn Fn(&Op) -> bool| done[place + 1..].iter().any(is_sync);
    let folder_synced = |place: usize, folder: usize| synced_after(place, &|op| matches!(op, Op::SyncFolder(synced) if *synced == folder));
    let is_durable = |place: usize| match &done[place] {
        Op::Create { at: (folder, _), .. } | Op::Remove((folder, _)) => folder_synced(place, *folder),
        Op::Rename { from, to, .. } => folder_synced(place, from.0) && folder_synced(place, to.0),
        Op::Write { node, .. } => synced_after(place, &|op| matches!(op, Op::SyncFile(synced) if synced == node)),
        Op::SyncFile(_) | Op::SyncFolder(_) | Op::Mark(_) => true,
    };
    let pending: Vec<usize> = (0..n_done).filter(|place| !is_durable(*place)).collect();
    let mut start = base.clone();
    // New nodes are empty until something is written to them.
    start.nodes.extend(nodes[base.nodes.len()..].iter().map(|node| match node {
        Node::File(_) => Node::File(Arc::default()),
        Node::Folder(_) => Node::Folder(BTreeMap::new()),
    }));
    // Operations before the first pending one are the same in all states.
    let n_same = pending.first().copied().unwrap_or(n_done);
    done[..n_same].iter().for_each(|op| start.apply(op));
    const MOST: u32 = 10;
    let n_pending = pending.len() as u32;
    let n_subsets = 1_u64 << n_pending.min(MOST);
    for subset in 0..n_subsets {
        let chosen: u64 = if n_pending <= MOST { subset } else { random.random() };
        let lost: Vec<usize> = pending.iter().enumerate().filter(|(bit, _)| chosen >> bit & 1 == 0).map(|(_, place)| *place).collect();
        let torn = pending.iter().rev().find(|place| !lost.contains(place) && matches!(done[**place], Op::Write { .. }));
        // The whole write, half of it, its full sectors, zeros.
        for tear in 0..if torn.is_some() { 4 } else { 1 } {
            let mut image = start.clone();
            for (place, op) in done.iter().enumerate().skip(n_same).filter(|(place, _)| !lost.contains(place)) {
                match op {
                    Op::Write { node, offset, bytes } if Some(&place) == torn => {
                        let bytes = match tear {
                            0 => bytes.clone(),
                            1 => bytes[..bytes.len() / 2].to_vec(),
                            2 => bytes[..bytes.len() / 512 * 512].to_vec(),
                            _ => vec![0; bytes.len()],
                        };
                        image.apply(&Op::Write { node: *node, offset: *offset, bytes });
                    }
                    op => image.apply(op),
                }
            }
            visit(image, &lost);
        }
    }
}

/// Checks the guarantees on one state.
///
/// With `to_the_end` the work is then finished and the results compared with `expected`. Returns a disk with the operations of the recovery.
fn check(
    scenario: Scenario,
    image: &Image,
    marks: &[&Mark],
    expected: &BTreeMap<PathBuf, Vec<u8>>,
    to_the_end: bool,
    said: &dyn Fn() -> String,
) -> SimDisk {
    let disk = SimDisk::new(image.clone());
    let store = store_on(&disk, Owner::me().clone());
    store.recover().unwrap();
    // The operations of the recovery, before the work continues.
    let recovery = SimDisk(Arc::new(Mutex::new(Inner {
        image: image.clone(),
        log: disk.0.lock().unwrap().log.clone(),
        n_calls: 0,
        fail: None,
        lost: HashSet::new(),
    })));
    assert_eq!(store.recover().unwrap(), Recovered::default(), "a second recovery changes something: {}", said());
    let now = disk.0.lock().unwrap().image.clone();
    let files = now.files();
    assert!(!files.keys().any(|path| path.to_string_lossy().contains(TEMPORARY)), "an unfinished file stays: {}", said());
    let mut valid = BTreeSet::new();
    for unit in store.unit_names().unwrap() {
        if let Ok(Status::Valid(_)) = store.unit_at(&unit) {
            let folder = store.unit_path(&unit);
            for (path, bytes) in files.iter().filter(|(path, _)| path.starts_with(&folder)) {
                assert_eq!(expected.get(path), Some(bytes), "{} is reported valid and is wrong: {}", path.display(), said());
            }
            valid.insert(unit);
        }
    }
    let mut returned = BTreeSet::new();
    for mark in marks {
        match mark {
            Mark::Committed(unit) => drop(returned.insert(unit.clone())),
            Mark::WillGo(unit) => drop(returned.remove(unit)),
            Mark::SetAside(unit) => {
                let place = Path::new(HOME).join("quarantine").join(unit.replace('/', "."));
                assert!(files.keys().any(|path| path.starts_with(&place)), "a unit in quarantine is lost: {}", said());
            }
        }
    }
    assert!(returned.is_subset(&valid), "a commit returned and its unit is missing: {}", said());
    let noted: BTreeSet<String> = store.noted_units().unwrap().into_keys().collect();
    assert!(valid.is_subset(&noted), "a unit exists and is not noted: {}", said());
    if to_the_end {
        scenario.finish(&store, &|_| {}).unwrap();
        assert!(results(&disk.0.lock().unwrap().image) == *expected, "other results than an undisturbed run: {}", said());
    }
    recovery
}

/// Checks every crash state of a scenario; returns the number of states, and of states after a second crash during recovery.
fn crash_everywhere(scenario: Scenario) -> (usize, usize) {
    let base = home();
    let disk = SimDisk::new(base.clone());
    let mark = |mark| disk.mark(mark);
    scenario.run(&store_on(&disk, Owner::dead(1)), &mark).unwrap();
    let inner = disk.0.lock().unwrap();
    let (log, nodes, expected) = (&inner.log, &inner.image.nodes, results(&inner.image));
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let mut seen = HashSet::new();
    let (mut n_checked, mut n_nested) = (0, 0);
    for n_done in 0..=log.len() {
        let marks: Vec<&Mark> = log[..n_done].iter().filter_map(|op| if let Op::Mark(mark) = op { Some(mark) } else { None }).collect();
        let mut states = Vec::new();
        crash_states(&base, log, n_done, nodes, &mut random, &mut |image, lost| {
            if seen.insert((image.digest(), marks.len())) {
                states.push((image, lost.to_vec()));
            }
        });
        for (image, lost) in states {
            n_checked += 1;
            let said = || {
                let lost: Vec<_> = lost.iter().map(|place| &log[*place]).collect();
                format!("{scenario:?}, after {n_done} operations, lost {lost:?}")
            };
            let recovery = check(scenario, &image, &marks, &expected, n_checked % 4 == 0, &said);
            if n_checked % 1500 == 0 {
                // The recovery crashes as well.
                let inner = recovery.0.lock().unwrap();
                let mut nodes = image.nodes.clone();
                let n_new = inner.log.iter().filter(|op| matches!(op, Op::Create { .. })).count();
                nodes.extend((0..n_new).map(|_| Node::File(Arc::default())));
                for n_recovered in 0..=inner.log.len() {
                    crash_states(&image, &inner.log, n_recovered, &nodes, &mut random, &mut |image, _| {
                        n_nested += 1;
                        drop(check(scenario, &image, &marks, &expected, n_nested % 4 == 0, &said));
                    });
                }
            }
        }
    }
    (seen.len(), n_nested)
}

#[test]
fn the_guarantees_hold_after_a_power_cut_at_any_moment() {
    let scenarios = [
        Scenario { n_units: 4, n_files: 3, with_quarantine: true, with_removal: true },
        Scenario { n_units: 2, n_files: 1, with_quarantine: true, with_removal: true },
        Scenario { n_units: 2, n_files: 5, with_quarantine: true, with_removal: false },
        Scenario { n_units: 2, n_files: 4, with_quarantine: false, with_removal: true },
        Scenario { n_units: 3, n_files: 7, with_quarantine: true, with_removal: true },
        Scenario { n_units: 4, n_files: 8, with_quarantine: true, with_removal: true },
    ];
    let counts = std::thread::scope(|scope| {
        let workers: Vec<_> = scenarios.iter().map(|scenario| scope.spawn(|| crash_everywhere(*scenario))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    let (n_states, n_nested) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    println!("{n_states} states after a crash, {n_nested} after a second one during recovery: {counts:?}");
    assert!(n_states >= 50_000, "only {n_states} states");
}

#[test]
fn if_any_call_fails_no_result_is_wrong_and_the_work_can_continue() {
    let scenario = Scenario { n_units: 2, n_files: 2, with_quarantine: true, with_removal: true };
    let undisturbed = SimDisk::new(home());
    scenario.run(&store_on(&undisturbed, Owner::me().clone()), &|_| {}).unwrap();
    let inner = undisturbed.0.lock().unwrap();
    let (expected, n_calls) = (results(&inner.image), inner.n_calls);
    drop(inner);
    let mut n_errors = 0;
    for failure in [Failure::Broken, Failure::Full, Failure::Short] {
        for call in 0..n_calls {
            let disk = SimDisk::new(home());
            disk.fail_at(call, failure);
            let store = store_on(&disk, Owner::me().clone());
            let ended = scenario.run(&store, &|_| {});
            n_errors += usize::from(ended.is_err());
            // A later process removes what this one could not.
            let later = store_on(&disk, Owner::me().clone());
            later.recover().unwrap();
            for unit in later.unit_names().unwrap() {
                if let Ok(Status::Valid(_)) = later.unit_at(&unit) {
                    let files = disk.0.lock().unwrap().image.files();
                    let wrong =
                        files.iter().find(|(path, bytes)| path.starts_with(later.unit_path(&unit)) && expected.get(*path) != Some(bytes));
                    assert!(wrong.is_none(), "{failure:?} at call {call}: {wrong:?}");
                }
            }
            scenario.finish(&later, &|_| {}).unwrap();
            let found = results(&disk.0.lock().unwrap().image);
            let found: BTreeMap<_, _> = found.into_iter().filter(|(path, _)| !path.to_string_lossy().contains(TEMPORARY)).collect();
            assert!(found == expected, "{failure:?} at call {call}: other results than an undisturbed run");
        }
    }
    println!("{n_calls} calls, each failing in three ways; {n_errors} errors");
    assert!(n_errors >= n_calls);
}
