//! Batches of DetPro's prompt learning read from shards, in random order, beside batches from an array of all rows in memory: 2 million rows of 512
//! numbers in f16, a fifth of OV-LVIS; and a forward pass of the text tower (ViT-B/32) over the 49 prompts of OV-COCO, 20 tokens long: half of a step.
//!
//! Limit: a batch of 512 rows is 0.5 MB, read at 512 places; a step with the 866 prompts of OV-LVIS takes 2 TFLOP.
//!
//! Then the text tower's part of a step of RPL, over 96 names with descriptions of the mean length of LVIS's, 18 tokens: packed, pack by pack, and as many
//! texts of 77 tokens at once, as the reference has them. Limit: 77 / 18 = 4.3 times, by a third less since the first embeds each text twice.
//!
//! `make bench`.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and may end where it fails")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    time::Instant,
};

use half::{f16, slice::HalfFloatSliceExt as _};
use ovenbird_cache::{Publisher, Recipe, inputs::digest_path};
use ovenbird_data::annotations::ImageId;
use ovenbird_models::clip::{Activation, Clip, Config, ImageConfig, TextConfig, prompted::Prompted};
use ovenbird_stages::{
    Artifact as _,
    artifacts::{EMBEDDINGS_FILE, PromptRow, PromptSamples, PromptSamplesWriter, ROWS_FILE},
};
use rand::{SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use rustix::fs::{Advice, fadvise};
use tch::{Device, Kind, Tensor, nn, no_grad};

const SHARDS: usize = 8;
const ROWS: usize = 2_000_000;
const DIM: usize = 512;
const BATCH: usize = 512;
/// Prompts are as long as the longest.
const TOKENS: i64 = 20;
const CLASSES: usize = 96;
/// Batches that are read cold: of each row another page.
const COLD: usize = 100;

fn main() {
    tch::set_num_threads(std::thread::available_parallelism().map_or(1, usize::from) as i32);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // Of unit length.
    let number = |bit: usize| if bit == 0 { 1.0 } else { -1.0 } / (DIM as f32).sqrt();
    let row = |row: usize| -> Vec<f32> { (0..DIM).map(|place| number((row * 31 + place * 7) / 8 % 2)).collect() };
    for shard in 0..SHARDS {
        let draft = Publisher::default().begin(&folder.path().join(format!("unit-{shard}"))).unwrap();
        let recipe = Recipe { kind: "a".into(), version: 1, params: shard.into(), inputs: BTreeMap::new() };
        let files = [ROWS_FILE, EMBEDDINGS_FILE].map(|name| draft.create(name).unwrap());
        let mut writer = PromptSamplesWriter::new(files, &recipe.fingerprint(), &["owl".to_owned()], DIM, None).unwrap();
        for place in (shard..ROWS).step_by(SHARDS) {
            writer.push(PromptRow { image_id: ImageId(place as u64), class: Some(0), iou: 0.5 }, &row(place)).unwrap();
        }
        writer.finish().unwrap();
        assert!(draft.commit("unit.json", b"{}").unwrap());
    }
    let units = (0..SHARDS).flat_map(|shard| digest_path(&folder.path().join(format!("unit-{shard}")), None, 0).unwrap());
    let shards: Vec<_> = units.filter(|file| file.path.extension().is_some_and(|extension| extension == "arrow")).collect();
    let paths: Vec<_> = shards.iter().map(|file| file.path.clone()).collect();
    let mut order: Vec<usize> = (0..ROWS).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(1));

    let cold = cold(&paths, &order[..COLD * BATCH]);
    let samples = PromptSamples::open(&shards).unwrap().embeddings().unwrap();
    let before = anonymous_mib();
    let warm = batches_a_second(&order, |rows| samples.gather(rows.iter().copied()));
    let grown = anonymous_mib() - before;
    let all: Vec<f16> = samples.gather(0..ROWS).into_iter().map(f16::from_f32).collect();
    let in_memory = batches_a_second(&order, |rows| {
        let mut numbers = vec![0.0; rows.len() * DIM];
        for (row, numbers) in rows.iter().zip(numbers.chunks_exact_mut(DIM)) {
            all[row * DIM..][..DIM].convert_to_f32_slice(numbers);
        }
        numbers
    });
    println!(
        "batches/s of {BATCH} rows, one thread: {in_memory:.0} from an array, {warm:.0} from shards ({:.2}), {cold:.0} of rows at random places of a disk",
        warm / in_memory
    );
    println!("an epoch of {ROWS} rows from shards takes {grown:.1} MiB more memory");
    rpl();
    let step = forward();
    let epoch = |batches: f64| step.max(1.0 / batches);
    println!(
        "half of a step takes {step:.2} s, so an epoch from shards has {:.2} of the speed of one in memory, {:.2} where every row comes from the disk",
        epoch(in_memory) / epoch(warm),
        epoch(in_memory) / epoch(cold)
    );
}

/// Batches a second that the disk gives: as many rows as a batch has, at random places of files that are not in the page cache.
fn cold(paths: &[PathBuf], order: &[usize]) -> f64 {
    let files: Vec<File> = paths.iter().filter(|path| path.ends_with(EMBEDDINGS_FILE)).map(|path| File::open(path).unwrap()).collect();
    for file in &files {
        file.sync_all().unwrap();
        fadvise(file, 0, None, Advice::DontNeed).unwrap();
        fadvise(file, 0, None, Advice::Random).unwrap();
    }
    batches_a_second(order, |rows| {
        let mut bytes = vec![0; 2 * DIM];
        for row in rows {
            files[row % SHARDS].read_exact_at(&mut bytes, (row / SHARDS * 2 * DIM) as u64).unwrap();
        }
        vec![f32::from(bytes[0]); rows.len() * DIM]
    })
}

fn batches_a_second(order: &[usize], gather: impl Fn(&[usize]) -> Vec<f32>) -> f64 {
    let clock = Instant::now();
    for rows in order.chunks(BATCH) {
        assert_eq!(std::hint::black_box(gather(rows)).len(), rows.len() * DIM);
    }
    order.len().div_ceil(BATCH) as f64 / clock.elapsed().as_secs_f64()
}

/// Memory of this process that is in no file, MiB.
fn anonymous_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

fn text_tower(context: i64) -> Config {
    Config {
        embed_dim: 512,
        image: ImageConfig::Vit { image_side: 32, patch: 32, width: 64, depth: 1, heads: 1, mlp_width: 64 },
        text: TextConfig { context, vocabulary: 49_408, width: 512, heads: 8, depth: 12 },
        activation: Activation::QuickGelu,
    }
}

/// Prints how much faster the text tower's part of a step of RPL is than over texts of 77 tokens.
fn rpl() {
    let mut store = nn::VarStore::new(Device::Cpu);
    let clip = Clip::new(&store.root(), &text_tower(77), 1).unwrap();
    store.freeze();
    let prompted = |n_words: usize| {
        let texts: Vec<(String, String)> =
            (0..CLASSES).map(|class| (format!("owl {}", class % 10), vec!["bird"; n_words].join(" "))).collect();
        Prompted::described(clip.causal_text().unwrap(), clip.tokenizer(), &texts, 1).unwrap()
    };
    let context = Tensor::randn([2, 512], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let gradient = Tensor::randn([CLASSES as i64, 512], (Kind::Float, Device::Cpu));
    let clocked = |step: &dyn Fn()| {
        step();
        let clock = Instant::now();
        step();
        clock.elapsed().as_secs_f64()
    };
    // Start, two vectors, two tokens of the name, the full stop and the end are 7.
    let (short, long) = (prompted(11), prompted(70));
    let packed = clocked(&|| {
        drop(no_grad(|| short.encode(&context)).unwrap());
        drop(short.gradient(&context, &gradient).unwrap());
    });
    let whole = clocked(&|| {
        drop(Tensor::run_backward(&[(long.encode(&context).unwrap() * &gradient).sum(Kind::Float)], &[&context], false, false));
    });
    println!(
        "the text tower's part of a step of RPL over {CLASSES} classes: {packed:.2} s, over texts of 77 tokens {whole:.2} s: {:.1} times",
        whole / packed
    );
}

/// A forward pass of the text tower over 49 prompts, s.
fn forward() -> f64 {
    let store = nn::VarStore::new(Device::Cpu);
    let clip = Clip::new(&store.root(), &text_tower(TOKENS), 1).unwrap();
    let tokens = Tensor::randint_low(1, 40_000, [49, TOKENS], (Kind::Int64, Device::Cpu));
    no_grad(|| {
        drop(clip.encode_text(&tokens).unwrap());
        let clock = Instant::now();
        drop(clip.encode_text(&tokens).unwrap());
        clock.elapsed().as_secs_f64()
    })
}
