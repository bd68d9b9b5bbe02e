//! CORA's localizer beside its arithmetic in plain PyTorch (`benches/peers/cora.py`): the same weights, images and objects, the same threads, turn by
//! turn in two processes. A training step on two images of about 640 x 480 px, and the detections of one of 1066 x 800 px among 65 classes; CLIP
//! RN50, 1,000 queries, f32. First both sides compute a small batch, whose results and gradients must agree. Loading and decoding are on neither
//! side.
//!
//! Also the two ways of region features on the anchors of such an image, and the memory of the fast one in a process of its own.
//!
//! Limits: CLIP takes 0.08 TFLOP for an image of 640 x 480 px, and 3.1 GFLOP for a box by the exact way; the localizer some 0.05 TFLOP for an image
//! of that size, three times that with gradients.
//!
//! Weights are random: every query may be a detection, so that all are classified anew on both sides. What a detector gains that rules out seven
//! of ten is measured too.
//!
//! `make bench`, after `make peers`; `OVENBIRD_BENCH_ROUNDS` sets how many turns each side has (4), half as many at detection: some five minutes.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

#[path = "peer.rs"]
mod peer;
#[path = "turns.rs"]
mod turns;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::Command,
};

use ovenbird_models::{
    checkpoint::{Checkpoint, write_safetensors},
    clip::{
        Activation, Clip, Config as ClipConfig, ImageConfig, TextConfig,
        regions::{BatchSizes, Layer3, Layer4},
    },
    detection::boxes::ImageSize,
    detr::{
        Config, Localizer, Outputs,
        losses::{Divisor, losses},
        matching::{MatchRule, Target},
        prematch::{Favour, classify},
        scores::{Background, Selection, scores},
    },
    to_unit_length,
};
use peer::Peer;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, nn, no_grad};
use turns::{Turn, median, take_turns, timed};

const THREADS: i32 = 2;
const SIZE: ImageSize = ImageSize { width: 1066, height: 800 };
/// Images of training, of which the smaller one is padded.
const TRAINING: [ImageSize; 2] = [ImageSize { width: 640, height: 480 }, ImageSize { width: 600, height: 464 }];
/// Images on which both sides must agree.
const SMALL: [ImageSize; 2] = [ImageSize { width: 160, height: 128 }, ImageSize { width: 128, height: 96 }];
/// Objects of an image of training.
const OBJECTS: i64 = 7;
const BASE: i64 = 48;
const CLASSES: i64 = 65;
/// The queries whose boxes are classified on the small images; the peer has the same number.
const CHECKED: i64 = 50;
/// The queries that a detector classifies which rules out the others.
const FEW: usize = 300;
const TEMPERATURE: f64 = 100.0;
/// The argument of the process whose memory is read.
const MEMORY: &str = "memory";

fn main() {
    tch::set_num_threads(THREADS);
    if std::env::args().any(|argument| argument == MEMORY) {
        return memory();
    }
    let rounds: usize = std::env::var("OVENBIRD_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(4).max(1);
    let folder = tempfile::tempdir().unwrap();
    let mut ours = Ours::new(folder.path());

    ours.ways(rounds);
    let child = Command::new(std::env::current_exe().unwrap()).arg(MEMORY).status().unwrap();
    assert!(child.success());

    let Some(mut theirs) = Peer::start("torchvision", "cora.py", folder.path(), &[THREADS.to_string()]) else { return };
    ours.check(&mut theirs, folder.path());
    let anew = take_turns("training step", rounds, || ours.train(None), (&mut theirs, "train"));
    let maps = ours.maps(&ours.training);
    let kept = median((0..rounds).map(|_| ours.train(Some(&maps)).seconds));
    println!("training step whose maps are kept: {kept:.2} s, {:.2} of ours with CLIP, {:.2} of theirs", kept / anew[0], kept / anew[1]);
    let rounds = rounds.div_ceil(2);
    let all = take_turns("detection", rounds, || ours.detect(), (&mut theirs, "test"));
    ours.rule_out();
    let few = median((0..rounds).map(|_| ours.detect().seconds));
    println!("detection where {FEW} queries are classified: {few:.2} s, {:.2} of theirs", few / all[1]);
}

fn rn50() -> ClipConfig {
    ClipConfig {
        embed_dim: 1024,
        image: ImageConfig::ResNet { image_side: 224, layers: [3, 4, 6, 3], width: 64, heads: 32 },
        // The texts of classes are given.
        text: TextConfig { context: 8, vocabulary: 8, width: 64, heads: 1, depth: 1 },
        activation: Activation::QuickGelu,
    }
}

fn normal(size: &[i64]) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu))
}

/// A CLIP whose blocks all take part: at first they pass on what they get.
fn clip_weights() -> BTreeMap<String, Tensor> {
    let store = nn::VarStore::new(Device::Cpu);
    Clip::new(&store.root(), &rn50(), 1).unwrap();
    let weights: BTreeMap<String, Tensor> = store.variables().into_iter().map(|(name, tensor)| (name, tensor.detach())).collect();
    for (name, tensor) in &weights {
        let mut tensor = tensor.shallow_clone();
        if name.ends_with("bn3.weight") {
            let _in_place = tensor.fill_(0.25);
        } else if name.contains("bn") && name.ends_with("running_mean") {
            tensor.copy_(&(normal(&tensor.size()) * 0.1));
        }
    }
    weights
}

fn load_clip(weights: &BTreeMap<String, Tensor>) -> Clip {
    Clip::load_as(&rn50(), weights, Path::new("clip"), Device::Cpu, Kind::Float).unwrap()
}

/// Images, noise of several scales, and their objects.
struct Batch {
    /// `[B, 3, H, W]`.
    images: Tensor,
    sizes: Vec<ImageSize>,
    targets: Vec<Target>,
}

impl Batch {
    fn of(sizes: &[ImageSize]) -> Self {
        let ImageSize { width, height } = BatchSizes::of(sizes.to_vec()).padded;
        let images = Tensor::zeros([sizes.len() as i64, 3, height, width], (Kind::Float, Device::Cpu));
        for (image, &ImageSize { width, height }) in (0..).zip(sizes) {
            let mut part = images.get(image).narrow(1, 0, height).narrow(2, 0, width);
            for cell in [1, 8, 32] {
                let noise = normal(&[3, height / cell + 1, width / cell + 1]);
                part += noise
                    .repeat_interleave_self_int(cell, 1, None)
                    .repeat_interleave_self_int(cell, 2, None)
                    .narrow(1, 0, height)
                    .narrow(2, 0, width);
            }
        }
        Self { images, sizes: sizes.to_vec(), targets: Vec::new() }
    }

    /// Its tensors by the names that the peer reads.
    fn named(&self, batch: &str) -> BTreeMap<String, Tensor> {
        let sizes: Vec<i64> = self.sizes.iter().flat_map(|size| [size.height, size.width]).collect();
        let mut named = BTreeMap::from([
            (format!("{batch}.images"), self.images.shallow_clone()),
            (format!("{batch}.sizes"), Tensor::from_slice(&sizes).view([-1, 2])),
        ]);
        for (image, Target { boxes, labels }) in self.targets.iter().enumerate() {
            named.insert(format!("{batch}.boxes.{image}"), boxes.shallow_clone());
            named.insert(format!("{batch}.labels.{image}"), labels.shallow_clone());
        }
        named
    }
}

/// What CLIP makes of whole images.
struct Maps {
    layer3: Layer3,
    layer4: Layer4,
}

/// The networks, the optimizer, and what they look at.
struct Ours {
    clip: Clip,
    localizer: Localizer,
    optimizer: nn::Optimizer,
    _weights: nn::VarStore,
    /// `[K, D]`, base classes first.
    texts: Tensor,
    small: Batch,
    training: Batch,
    test: Batch,
    random: ChaCha8Rng,
}

impl Ours {
    /// Writes into the folder what the peer reads.
    fn new(folder: &Path) -> Self {
        tch::manual_seed(1);
        let mut named = clip_weights();
        let clip = load_clip(&named);
        let store = nn::VarStore::new(Device::Cpu);
        let localizer = Localizer::new(&store.root(), &Config::cora(1024, 1024), 1).unwrap();
        for (name, tensor) in localizer.parameters() {
            // At first no box moves.
            if name.starts_with("bbox_embed.") && name.ends_with("layers.2.weight") {
                no_grad(|| tensor.shallow_clone().copy_(&(normal(&tensor.size()) * 0.02)));
            }
        }
        named.retain(|name, _| name.starts_with("visual."));
        named.extend(localizer.parameters().iter().map(|(name, tensor)| (name.clone(), tensor.detach())));
        let adamw = nn::AdamW { wd: 1e-4, ..nn::AdamW::default() };
        let optimizer = nn::OptimizerConfig::build(adamw, &store, 1e-10).unwrap();
        let texts = to_unit_length(&normal(&[CLASSES, 1024]));
        let [small, training, test] = [&SMALL[..], &TRAINING, &[SIZE]].map(Batch::of);
        let random = ChaCha8Rng::seed_from_u64(1);
        let mut ours = Self { clip, localizer, optimizer, _weights: store, texts, small, training, test, random };
        ours.small.targets = ours.objects(&ours.small);
        ours.training.targets = ours.objects(&ours.training);

        let write = |file: &str, tensors: &BTreeMap<String, Tensor>| {
            write_safetensors(tensors, &BTreeMap::new(), &mut File::create(folder.join(file)).unwrap()).unwrap();
        };
        write("weights.safetensors", &named);
        let mut inputs = BTreeMap::from([
            ("texts.all".to_owned(), ours.texts.shallow_clone()),
            ("texts.base".to_owned(), ours.base().contiguous()),
            ("small.classes".to_owned(), ours.named_anchors(&ours.maps(&ours.small))),
        ]);
        for (name, batch) in [("small", &ours.small), ("train", &ours.training), ("test", &ours.test)] {
            inputs.extend(batch.named(name));
        }
        write("inputs.safetensors", &inputs);
        ours
    }

    fn base(&self) -> Tensor {
        self.texts.narrow(0, 0, BASE)
    }

    fn anchors(&self) -> Tensor {
        self.localizer.anchors().detach().sigmoid()
    }

    /// Objects near some of the anchors, of the classes that CLIP sees there.
    fn objects(&self, batch: &Batch) -> Vec<Target> {
        let (anchors, classes) = (self.anchors(), self.named_anchors(&self.maps(batch)));
        let of_image = |image: i64| {
            let places = Tensor::arange(OBJECTS, (Kind::Int64, Device::Cpu)) * 13 + image;
            let boxes = anchors.index_select(0, &places) + normal(&[OBJECTS, 4]) * 0.02;
            Target { boxes, labels: classes.get(image).index_select(0, &places) }
        };
        (0..batch.sizes.len() as i64).map(of_image).collect()
    }

    fn maps(&self, batch: &Batch) -> Maps {
        let regions = self.clip.regions().unwrap();
        let layer3 = regions.layer3(&batch.images, &batch.sizes).unwrap();
        Maps { layer4: regions.layer4(&layer3).unwrap(), layer3 }
    }

    /// The base classes of anchors, `[B, N]`.
    fn named_anchors(&self, maps: &Maps) -> Tensor {
        let features = self.clip.regions().unwrap().fast(&maps.layer4, &self.anchors()).unwrap();
        classify(&features.matmul(&self.base().tr()), TEMPERATURE, None, None).unwrap().classes
    }

    fn look(&self, layer3: &Layer3, texts: &Tensor, classes: &Tensor, mut random: Option<&mut ChaCha8Rng>) -> Outputs {
        let memory = self.localizer.encode(&layer3.features, &layer3.valid(), random.as_deref_mut()).unwrap();
        self.localizer.decode(&memory, texts, classes, random).unwrap()
    }

    /// As `localizer/train` makes a step, with libtorch's AdamW. `kept`: the maps, if they are known.
    fn train(&mut self, kept: Option<&Maps>) -> Turn {
        timed(|| {
            let made = kept.is_none().then(|| self.maps(&self.training));
            let maps = kept.or(made.as_ref()).unwrap();
            let classes = self.named_anchors(maps);
            let mut random = self.random.clone();
            let outputs = self.look(&maps.layer3, &self.base(), &classes, Some(&mut random));
            self.random = random;
            let losses = losses(&outputs, &classes, &self.training.targets, &MatchRule::default(), Divisor::Reference).unwrap();
            let total = losses.total();
            self.optimizer.backward_step_clip_norm(&total, 0.1);
            total.double_value(&[])
        })
    }

    /// As `localizer/test` makes detections.
    fn detect(&self) -> Turn {
        timed(|| {
            no_grad(|| {
                let (regions, Maps { layer3, layer4 }) = (self.clip.regions().unwrap(), self.maps(&self.test));
                let cosines = regions.fast(&layer4, &self.anchors()).unwrap().matmul(&self.texts.tr());
                let novel: Vec<i64> = (BASE..CLASSES).collect();
                let favour = Favour { factor: 8.0, classes: &novel };
                let classes = classify(&cosines, TEMPERATURE, Some(favour), None).unwrap().classes;
                let Outputs { boxes, objectness, .. } = self.look(&layer3, &self.texts, &classes, None);
                let (boxes, objectness) = (boxes.get(-1).get(0), objectness.get(-1).get(0));
                let selection = Selection::default();
                let needed = Tensor::from_slice(&selection.needed(&objectness));
                let (boxes, objectness) = (boxes.index_select(0, &needed), objectness.index_select(0, &needed));
                let cosines = regions.exact(&layer3, &[boxes.shallow_clone()]).unwrap().matmul(&self.texts.tr());
                let scores = scores(&cosines, &objectness, TEMPERATURE, Background::Reference).unwrap();
                selection.detections(&boxes, &scores, SIZE).unwrap().rows.len() as f64
            })
        })
    }

    /// Lowers objectness until few queries can be detections.
    fn rule_out(&self) {
        no_grad(|| {
            let maps = self.maps(&self.test);
            let cosines = self.clip.regions().unwrap().fast(&maps.layer4, &self.anchors()).unwrap().matmul(&self.texts.tr());
            let classes = classify(&cosines, TEMPERATURE, None, None).unwrap().classes;
            let objectness = self.look(&maps.layer3, &self.texts, &classes, None).objectness.get(-1).get(0);
            let least = objectness.topk(FEW as i64, 0, true, true).0.double_value(&[FEW as i64 - 1]);
            let mut bias = self.localizer.parameters()["objectness_embed.bias"].shallow_clone();
            bias += (0.001_f64 / 0.999).ln() - least;
        });
    }

    /// The time of anchors' features by the two ways.
    fn ways(&self, rounds: usize) {
        let (regions, Maps { layer3, layer4 }, anchors) = (self.clip.regions().unwrap(), self.maps(&self.test), self.anchors());
        let n = anchors.size()[0];
        let fast = || timed(|| regions.fast(&layer4, &anchors).unwrap().numel() as f64).seconds;
        let exact = || timed(|| regions.exact(&layer3, &[anchors.shallow_clone()]).unwrap().numel() as f64).seconds;
        fast();
        let turns: Vec<(f64, f64)> = (0..rounds.div_ceil(3)).map(|_| (median((0..3).map(|_| fast())), exact())).collect();
        let [fast, exact] = [|turn: &(f64, f64)| turn.0, |turn: &(f64, f64)| turn.1].map(|side| median(turns.iter().map(side)));
        let times = median(turns.iter().map(|(fast, exact)| exact / fast));
        println!("features of {n} anchors, 1066 x 800 px: {fast:.2} s by the fast way, {exact:.1} s by the exact one: {times:.0} times");
    }

    /// Fails where the sides do not compute the same.
    fn check(&self, theirs: &mut Peer, folder: &Path) {
        theirs.ask("check");
        let found = Checkpoint::open(&folder.join("peer.safetensors")).unwrap();
        let (regions, maps) = (self.clip.regions().unwrap(), self.maps(&self.small));
        let classes = self.named_anchors(&maps);
        let outputs = self.look(&maps.layer3, &self.base(), &classes, None);
        let loss = losses(&outputs, &classes, &self.small.targets, &MatchRule::default(), Divisor::Reference).unwrap();
        assert!(loss.n_matched() as i64 >= OBJECTS, "{} objects have a query", loss.n_matched());
        loss.total().backward();
        let last = outputs.boxes.get(-1).detach();
        let boxes: Vec<Tensor> = (0..SMALL.len() as i64).map(|image| last.get(image).narrow(0, 0, CHECKED)).collect();
        let mut ours = BTreeMap::from([
            ("anchors".to_owned(), regions.fast(&maps.layer4, &self.anchors()).unwrap()),
            ("boxes".to_owned(), outputs.boxes.detach()),
            ("objectness".to_owned(), outputs.objectness.detach()),
            ("loss".to_owned(), loss.total().detach()),
            ("exact".to_owned(), regions.exact(&maps.layer3, &boxes).unwrap()),
        ]);
        for (name, tensor) in self.localizer.parameters() {
            let mut tensor = tensor.shallow_clone();
            ours.insert(format!("gradient.{name}"), tensor.grad().copy());
            tensor.zero_grad();
        }
        assert!(ours.keys().eq(found.tensors().keys()));
        let length = |tensor: &Tensor| tensor.norm().double_value(&[]);
        let gradients = || ours.iter().filter(|(name, _)| name.starts_with("gradient."));
        let whole = gradients().map(|(_, gradient)| length(gradient).powi(2)).sum::<f64>().sqrt();
        let mut most = [0.0_f64; 2];
        for (name, ours) in &ours {
            let theirs = found.tensor(name).unwrap();
            let is_gradient = name.starts_with("gradient.");
            // A gradient's difference as a part of its length, that of the other numbers as a part of the greatest. Gradients of keys nearly cancel
            // out, so that roundings of the whole are seen in them.
            let apart = match is_gradient {
                true => length(&(ours - &theirs)) / length(&theirs).max(1e-4 * whole),
                false => (ours - &theirs).abs().max().double_value(&[]) / theirs.abs().max().double_value(&[]),
            };
            assert!(apart < if is_gradient { 3e-4 } else { 1e-5 }, "{name}: {apart}");
            let most = &mut most[usize::from(is_gradient)];
            *most = most.max(apart);
        }
        println!("both sides agree: results to {:.0e}, gradients to {:.0e}; {} objects matched", most[0], most[1], loss.n_matched());
    }
}

/// Prints the peak memory of this process, in which nothing happens but the fast way.
fn memory() {
    let resident = |field: &str| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        kib.unwrap() / 1024.0
    };
    let library = resident("VmRSS:");
    let store = nn::VarStore::new(Device::Cpu);
    let clip = Clip::new(&store.root(), &rn50(), 1).unwrap();
    let anchors = normal(&[1000, 4]).sigmoid();
    let layer4 = Layer4 { features: normal(&[1, 2048, 25, 33]), sizes: BatchSizes::of(vec![SIZE]) };
    let network = resident("VmRSS:");
    // Sets the peak back to what is resident.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    drop(clip.regions().unwrap().fast(&layer4, &anchors).unwrap());
    let peak = resident("VmHWM:");
    println!(
        "peak memory of the fast way: {peak:.0} MiB, of which {:.0} MiB the network and {library:.0} MiB the program; {:.0} MiB for the image",
        network - library,
        peak - network
    );
}
