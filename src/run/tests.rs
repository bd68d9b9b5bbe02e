//! Runs of made-up stages: devices, hanging stages, equal recipes, and random pipelines against a model.

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
    skips_items: true,
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
            let claimed = unit.item_key.map(|_| cx.store.claim(cx.kind, &unit.fingerprint, &mut cx.watch.lock().unwrap())).transpose()?;
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

/// The options of a plain run.
fn options(cpu: usize, devices: &[tch::Device]) -> Options {
    let devices = devices.to_vec();
    Options {
        cpu,
        memory: 1 << 30,
        devices,
        rehash: false,
        is_measuring: false,
        is_repair: false,
        grace: Duration::from_secs(60),
        forced: Vec::new(),
    }
}

fn run_on(devices: &[tch::Device], pipeline: Pipeline, store: &Store) -> Result<Ended> {
    let options = options(8, devices);
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
    let words = "needs 1 device and only 0 can be used: steps that hang hold the others";
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
    let options = options(2, &[tch::Device::Cpu]);
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
    let options = options(4, &[tch::Device::Cpu]);
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
        let earlier = |place: usize, index: prop::sample::Index, is_there: bool| (place > 0 && is_there).then(|| index.index(place.max(1)));
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
        let options = options(2, &[tch::Device::Cpu]);
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
