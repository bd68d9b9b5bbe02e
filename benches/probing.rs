//! Linear probing from stored features beside the reference's way, which computes the features anew in every step: two images through the frozen
//! detector (LP-OVOD's, ResNet-50, 1333 x 800 px), its proposals, the features of 220 regions of each, then the same step of the classifier.
//!
//! Limit: the detector takes some 0.6 TFLOP for an image, the step 2 x 3 x 440 x 1,024 x 17 = 0.05 GFLOP and the reading of 0.9 MB.
//!
//! `make bench`.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and may end where it fails")]

use std::time::Instant;

use ovenbird_models::{
    Phase,
    detection::{
        boxes::{ImageSize, Suppression},
        matching::{Assigner, Sampler, Truth},
    },
    rcnn::{
        heads::RegionRule,
        regions::REGION_CODER,
        rpn::ProposalRule,
        sigmoid::{Config, SigmoidDetector, focal_loss},
    },
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, nn, no_grad};

const STEPS: usize = 3;
const IMAGES: usize = 2;
const REGIONS: usize = 220;
const CLASSES: i64 = 17;

fn main() {
    tch::set_num_threads(std::thread::available_parallelism().map_or(1, usize::from) as i32);
    let store = nn::VarStore::new(Device::Cpu);
    let detector = SigmoidDetector::new(&store.root(), &Config::r50(48, Some(512)), 1).unwrap();
    let rows = Tensor::zeros([CLASSES, 1024], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let mut random = ChaCha8Rng::seed_from_u64(1);

    let mut stored = Vec::new();
    let clock = Instant::now();
    for _ in 0..STEPS {
        let batch: Vec<(Tensor, Tensor)> = (0..IMAGES).map(|_| features(&detector, &mut random)).collect();
        step(&rows, &batch);
        stored.push(batch);
    }
    let anew = clock.elapsed().as_secs_f64() / STEPS as f64;
    let clock = Instant::now();
    let n_steps = 100 * STEPS;
    (0..n_steps).for_each(|place| step(&rows, &stored[place % STEPS]));
    let cached = clock.elapsed().as_secs_f64() / n_steps as f64;
    println!(
        "a step on {IMAGES} images: {anew:.2} s with the detector, {:.2} ms from stored features: {:.0} times",
        1e3 * cached,
        anew / cached
    );
}

/// The features and labels of an image's sampled regions.
fn features(detector: &SigmoidDetector, random: &mut ChaCha8Rng) -> (Tensor, Tensor) {
    no_grad(|| {
        let size = ImageSize { width: 1333, height: 800 };
        let pixels = Tensor::randn([1, 3, 800, 1344], (Kind::Float, Device::Cpu));
        let pyramid = detector.regions.forward(&pixels, Phase::Test).unwrap();
        let rule = ProposalRule { per_level: 2000, suppression: Suppression { iou: 0.7, keep: 1000 }, least_side: 0.0 };
        let proposals = detector.regions.rpn.proposals(&pyramid.predictions, &[size], &rule).unwrap().remove(0);
        let rule = RegionRule {
            assigner: Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None },
            sampler: Sampler { n: REGIONS, object_fraction: 0.25, background_per_object: None },
            coder: REGION_CODER,
        };
        let object = Tensor::from_slice(&[200.0_f32, 100.0, 500.0, 400.0]).view([1, 4]);
        let sample = rule.choose(&proposals.boxes, &Truth::from(object), &Tensor::from_slice(&[3_i64]), CLASSES, random).unwrap();
        let features = detector.features(&pyramid, &[sample.boxes.shallow_clone()], Phase::Test).unwrap().features;
        (features, sample.labels)
    })
}

/// The gradient of the classifier, and a step along it.
fn step(rows: &Tensor, batch: &[(Tensor, Tensor)]) {
    let features = Tensor::cat(&batch.iter().map(|(features, _)| features).collect::<Vec<_>>(), 0);
    let labels = Tensor::cat(&batch.iter().map(|(_, labels)| labels).collect::<Vec<_>>(), 0);
    focal_loss(&features.matmul(&rows.tr()), &labels).unwrap().backward();
    no_grad(|| {
        let mut rows = rows.shallow_clone();
        rows -= rows.grad() * 1e-3;
        rows.zero_grad();
    });
}
