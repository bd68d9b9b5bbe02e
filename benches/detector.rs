//! Training steps and detections of a Mask R-CNN R50-FPN beside torchvision's: the same weights, the same two images of 426 x 320 px with five
//! objects each, the same threads, turn by turn in two processes. Loading, decoding and resizing are on neither side.
//!
//! Limits: convolutions and matrix products of both sides are oneDNN's; the rest is proposals, pooling, suppression, normalisation and the
//! optimizer, which are each side's own.
//!
//! Class-aware suppression of 1,000 boxes and 1,203 classes is measured too.
//!
//! `make bench`, after `make peers`; `OVENBIRD_BENCH_ROUNDS` sets how many turns each side has (10).
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

#[path = "peer.rs"]
mod peer;
#[path = "turns.rs"]
mod turns;

use std::path::Path;

use ovenbird_models::{
    checkpoint::Checkpoint,
    detection::boxes::{ImageSize, Suppression},
    rcnn::{
        layout,
        mask_head::ObjectMask,
        mask_rcnn::{MaskRcnn, MaskRcnnConfig, Objects},
    },
};
use peer::Peer;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, nn};
use turns::{Turn, take_turns, timed};

const THREADS: i32 = 2;
const SIZES: [ImageSize; 2] = [ImageSize { width: 426, height: 320 }; 2];

fn main() {
    let rounds: usize = std::env::var("OVENBIRD_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10).max(3);
    tch::set_num_threads(THREADS);
    let folder = tempfile::tempdir().unwrap();
    let Some(mut theirs) = Peer::start("torchvision", "mask_rcnn.py", folder.path(), &[THREADS.to_string()]) else { return };
    let mut ours = Ours::load(folder.path(), Kind::Float);

    take_turns("training step, f32", rounds, || ours.train(), (&mut theirs, "train"));
    take_turns("detection, f32", rounds, || ours.detect(), (&mut theirs, "detect"));
    take_turns("suppression of 1,000 boxes x 1,203 classes", 3, || ours.suppress(), (&mut theirs, "nms"));

    if !std::arch::is_x86_feature_detected!("avx512bf16") {
        println!("skipped bf16: this processor is no faster in it");
        return;
    }
    let mut ours = Ours::load(folder.path(), Kind::BFloat16);
    take_turns("training step, bf16 beside their f32", rounds, || ours.train(), (&mut theirs, "train"));
    take_turns("detection, bf16 beside their f32", rounds, || ours.detect(), (&mut theirs, "detect"));
}

/// The network, its optimizer, and what it looks at.
struct Ours {
    network: MaskRcnn,
    optimizer: nn::Optimizer,
    _weights: nn::VarStore,
    images: Tensor,
    objects: Vec<Objects>,
    boxes: Tensor,
    scores: Tensor,
    random: ChaCha8Rng,
}

impl Ours {
    fn load(folder: &Path, kind: Kind) -> Self {
        let weights = nn::VarStore::new(Device::Cpu);
        let network = MaskRcnn::new(&weights.root(), &MaskRcnnConfig::torchvision(90), 1).unwrap();
        let path = folder.join("weights.pth");
        let checkpoint = Checkpoint::open(&path).unwrap();
        layout::load(checkpoint.tensors(), network.parameters(), &path).unwrap().require_all(&path).unwrap();
        let inputs = Checkpoint::open(&folder.join("inputs.pth")).unwrap();
        let tensor = |name: &str| inputs.tensor(name).unwrap();
        let objects = |image: usize| Objects {
            boxes: tensor(&format!("boxes.{image}")),
            // torchvision counts background as 0.
            labels: tensor(&format!("labels.{image}")) - 1,
            masks: parts(&tensor(&format!("boxes.{image}")), &tensor(&format!("masks.{image}"))),
        };
        let sgd = nn::Sgd { momentum: 0.9, dampening: 0.0, wd: 1e-4, nesterov: false };
        Self {
            network,
            optimizer: nn::OptimizerConfig::build(sgd, &weights, 1e-10).unwrap(),
            _weights: weights,
            images: tensor("images").to_kind(kind),
            objects: (0..SIZES.len()).map(objects).collect(),
            boxes: tensor("nms_boxes"),
            scores: tensor("nms_scores"),
            random: ChaCha8Rng::seed_from_u64(1),
        }
    }

    fn train(&mut self) -> Turn {
        timed(|| {
            let loss = self.network.losses(&self.images, &SIZES, &self.objects, &mut self.random).unwrap().total();
            self.optimizer.backward_step(&loss);
            loss.double_value(&[])
        })
    }

    fn detect(&self) -> Turn {
        timed(|| self.network.detect(&self.images, &SIZES).unwrap().iter().map(|found| found.kept.rows.len() as f64).sum())
    }

    fn suppress(&self) -> Turn {
        let suppression = Suppression { iou: 0.5, keep: 300 };
        timed(|| suppression.of_classes(&self.boxes, &self.scores, 0.0).unwrap().scores.iter().copied().map(f64::from).sum())
    }
}

/// The part of each mask around its object.
fn parts(boxes: &Tensor, masks: &Tensor) -> Vec<ObjectMask> {
    let [_, height, width] = masks.size()[..] else { panic!("masks are [G, H, W]") };
    let part = |object: i64| {
        let [x1, y1, x2, y2] = [0, 1, 2, 3].map(|side| boxes.double_value(&[object, side]) as i64);
        let (left, top) = ((x1 - 2).max(0), (y1 - 2).max(0));
        let (right, bottom) = ((x2 + 3).min(width), (y2 + 3).min(height));
        let pixels = masks.get(object).narrow(0, top, bottom - top).narrow(1, left, right - left).contiguous();
        ObjectMask { pixels, left, top }
    };
    (0..masks.size()[0]).map(part).collect()
}
