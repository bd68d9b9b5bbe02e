//! Exact search for the best rows of each query beside faiss's `IndexFlatIP` on the same rows: 512 numbers each, the best 100 for 17 queries and for 1,203. All
//! rows are in memory on both sides, f16 on ours, which is how features are stored, and f32 on theirs, which is all that this index takes. They search turn by
//! turn in two processes, and have to find the same rows.
//!
//! Limits: the matrix product alone, in blocks of 4,096 rows, and reading the rows once.
//!
//! Then the same rows from a file, by blocks, with the greatest anonymous memory: 1,000,000 rows (1 GB), or 10,000,000 (10 GB)
//! with `OVENBIRD_BENCH_SEARCH=full`.
//!
//! `make bench`, after `make peers`.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

#[path = "peer.rs"]
mod peer;
#[path = "vectors.rs"]
mod vectors;

use std::{
    fs,
    hint::black_box,
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use half::f16;
use ovenbird_models::search::{Hit, Measure, Product, Rows, Search, Spent};
use peer::Peer;
use tch::{Device, Kind, Tensor};
use vectors::vectors;

const D: usize = 512;
const N_HITS: usize = 100;
const N_QUERIES: [usize; 2] = [17, 1203];
/// Rows in memory.
const N_ROWS: usize = 1_000_000;
/// Rows of a call when they come from a file: 64 MB.
const PART: usize = 65_536;
const THREADS: i32 = 2;
/// Turns that count.
const ROUNDS: usize = 5;

fn main() {
    tch::set_num_threads(THREADS);
    let is_full = std::env::var("OVENBIRD_BENCH_SEARCH").is_ok_and(|size| size == "full");
    let n_rows_of_file = if is_full { 10 * N_ROWS } else { N_ROWS };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.f16");
    write_rows(&path, n_rows_of_file);
    let queries = vectors::<D>(u64::MAX, N_QUERIES[1]);
    write_numbers(&folder.path().join("queries.f32"), queries.iter().flat_map(|number| number.to_le_bytes()));
    fs::write(folder.path().join("n_rows"), N_ROWS.to_string()).unwrap();
    let has_bf16 = std::arch::is_x86_feature_detected!("avx512bf16");
    let products = if has_bf16 { vec![Product::Bf16, Product::F32] } else { vec![Product::F32] };

    for n_queries in N_QUERIES {
        from_file(&path, n_rows_of_file, &queries[..n_queries * D], products[0]);
    }

    let rows = read(&fs::File::open(&path).unwrap(), 0, N_ROWS);
    let floats: Vec<f32> = rows.iter().map(|number| number.to_f32()).collect();
    let folder = folder.path();
    let peer = Peer::start("faiss", "search.py", folder, &[D.to_string(), N_HITS.to_string(), THREADS.to_string()]);
    let mut peer = peer.map(|peer| (peer, folder));
    for n_queries in N_QUERIES {
        let queries = &queries[..n_queries * D];
        for &product in &products {
            let what = format!("{n_queries} queries, {product:?}");
            let (alone, flop) = product_alone(queries, product);
            println!("{what}: product alone {:.0} ns a row, {:.0} GFLOP/s", 1e9 * alone, flop / alone / 1e9);
            compare(&format!("{what}, f16 rows"), Rows::F16(&rows), queries, product, alone, &mut peer);
            if product == products[0] {
                compare(&format!("{what}, f32 rows"), Rows::F32(&floats), queries, product, alone, &mut peer);
            }
        }
    }
    println!("reading f16 rows once: {:.0} ns a row", 1e9 * reading(&rows));
}

/// Our search and theirs in turn, after one each that does not count. `peer`: with its folder.
fn compare(what: &str, rows: Rows<'_>, queries: &[f32], product: Product, alone: f64, peer: &mut Option<(Peer, &Path)>) {
    let mut turns = Vec::new();
    for _ in 0..=ROUNDS {
        let clock = Instant::now();
        let mut search = search(queries, product);
        search.add(rows, 0, None).unwrap();
        let ours = clock.elapsed().as_secs_f64();
        let theirs = peer.as_mut().map(|(peer, _)| peer.ask(&(queries.len() / D).to_string()).parse().unwrap());
        if let Some((_, folder)) = peer {
            assert_same(folder, &search.hits());
        }
        turns.push((ours, theirs, search.spent()));
    }
    turns.remove(0);
    turns.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (ours, _, spent) = turns[ROUNDS / 2];
    println!(
        "{what}: {:.2} million rows/s ({:.2} s), {:.2} of the time of the product alone; {}",
        speed(ours),
        ours,
        ours / (alone * N_ROWS as f64),
        parts(&spent)
    );
    if peer.is_some() {
        let mut ratios: Vec<f64> = turns.iter().map(|(ours, theirs, _)| theirs.unwrap() / ours).collect();
        let mut theirs: Vec<f64> = turns.iter().map(|(_, theirs, _)| theirs.unwrap()).collect();
        ratios.sort_by(f64::total_cmp);
        theirs.sort_by(f64::total_cmp);
        let theirs = theirs[ROUNDS / 2];
        println!(
            "  faiss: {:.2} million rows/s ({theirs:.2} s); ratio {:.2} ({:.2} to {:.2} of {ROUNDS} turns)",
            speed(theirs),
            ratios[ROUNDS / 2],
            ratios[0],
            ratios[ROUNDS - 1]
        );
    }
}

fn speed(seconds: f64) -> f64 {
    N_ROWS as f64 / seconds / 1e6
}

fn parts(spent: &Spent) -> String {
    let [preparing, multiplying, selecting] = [spent.preparing, spent.multiplying, spent.selecting].map(|part| part.as_secs_f64());
    format!(
        "preparing {preparing:.2} s, product {multiplying:.2} s, selection {selecting:.3} s ({:.0} % of the product)",
        100.0 * selecting / multiplying
    )
}

fn search(queries: &[f32], product: Product) -> Search {
    let n_queries = queries.len() / D;
    let queries = Tensor::from_slice(queries).view([n_queries as i64, D as i64]);
    Search::new(&queries, &vec![N_HITS; n_queries], Measure::InnerProduct, product, Device::Cpu).unwrap()
}

/// Searches a file by blocks, and says how fast, and in how much memory.
fn from_file(path: &Path, n_rows: usize, queries: &[f32], product: Product) {
    let file = fs::File::open(path).unwrap();
    let before = anonymous_mib();
    let is_done = AtomicBool::new(false);
    let (seconds, spent, peak) = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak: f64 = 0.0;
            while !is_done.load(Ordering::Relaxed) {
                peak = peak.max(anonymous_mib());
                thread::sleep(Duration::from_millis(20));
            }
            peak
        });
        let clock = Instant::now();
        let mut search = search(queries, product);
        for first in (0..n_rows).step_by(PART) {
            let part = read(&file, first, PART.min(n_rows - first));
            search.add(Rows::F16(&part), first as u64, None).unwrap();
        }
        let seconds = clock.elapsed().as_secs_f64();
        is_done.store(true, Ordering::Relaxed);
        (seconds, search.spent(), watch.join().unwrap())
    });
    println!(
        "{} queries, {product:?}, {n_rows} rows from a file of {:.1} GB: {seconds:.1} s, {:.2} million rows/s; {}; anonymous memory {before:.0} MiB before, at most {peak:.0} MiB",
        queries.len() / D,
        (n_rows * D * 2) as f64 / 1e9,
        n_rows as f64 / seconds / 1e6,
        parts(&spent),
    );
}

/// Anonymous memory of this process.
fn anonymous_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap() / 1024.0
}

/// The product of queries and rows in blocks: s a row, and FLOP a row.
fn product_alone(queries: &[f32], product: Product) -> (f64, f64) {
    let kind = if product == Product::Bf16 { Kind::BFloat16 } else { Kind::Float };
    let n_queries = (queries.len() / D) as i64;
    let queries = Tensor::from_slice(queries).view([n_queries, D as i64]).to_kind(kind);
    let block_rows: i64 = 4096;
    let rows = Tensor::ones([block_rows, D as i64], (kind, Device::Cpu));
    let scores = Tensor::zeros([n_queries, block_rows], (kind, Device::Cpu));
    let n_blocks = N_ROWS as i64 / block_rows;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let clock = Instant::now();
        for _ in 0..n_blocks {
            drop(queries.mm_out(&scores, &rows.tr()));
        }
        best = best.min(clock.elapsed().as_secs_f64());
    }
    (best / (n_blocks * block_rows) as f64, 2.0 * D as f64 * n_queries as f64)
}

/// What a pass over the rows takes, by as many threads: s a row.
fn reading(rows: &[f16]) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let clock = Instant::now();
        thread::scope(|scope| {
            for part in rows.chunks(rows.len().div_ceil(THREADS as usize)) {
                scope.spawn(|| black_box(part.iter().fold(0_u16, |all, number| all ^ number.to_bits())));
            }
        });
        best = best.min(clock.elapsed().as_secs_f64());
    }
    best / (rows.len() / D) as f64
}

fn write_rows(path: &Path, n_rows: usize) {
    let file = fs::File::create(path).unwrap();
    let (file, parts) = (&file, (0..n_rows).step_by(PART).collect::<Vec<_>>());
    thread::scope(|scope| {
        for parts in parts.chunks(parts.len().div_ceil(THREADS as usize)) {
            scope.spawn(move || {
                for &first in parts {
                    let numbers = vectors::<D>(first as u64, PART.min(n_rows - first));
                    let bytes: Vec<u8> = numbers.into_iter().flat_map(|number| f16::from_f32(number).to_le_bytes()).collect();
                    file.write_all_at(&bytes, (first * D * 2) as u64).unwrap();
                }
            });
        }
    });
}

fn write_numbers(path: &Path, bytes: impl Iterator<Item = u8>) {
    let mut file = BufWriter::new(fs::File::create(path).unwrap());
    file.write_all(&bytes.collect::<Vec<_>>()).unwrap();
    file.flush().unwrap();
}

fn read(file: &fs::File, first: usize, n_rows: usize) -> Vec<f16> {
    let mut numbers = Vec::with_capacity(n_rows * D);
    let mut bytes = vec![0; PART.min(n_rows) * D * 2];
    for from in (0..n_rows).step_by(PART) {
        let bytes = &mut bytes[..PART.min(n_rows - from) * D * 2];
        file.read_exact_at(bytes, ((first + from) * D * 2) as u64).unwrap();
        numbers.extend(bytes.as_chunks().0.iter().map(|&pair| f16::from_le_bytes(pair)));
    }
    numbers
}

/// Their last ids are ours, where neighbours are not so close that f32 sums decide.
fn assert_same(folder: &Path, hits: &[Vec<Hit>]) {
    let ids = fs::read(folder.join("ids.i64")).unwrap();
    let scores = fs::read(folder.join("scores.f32")).unwrap();
    let theirs =
        ids.as_chunks().0.iter().map(|&id| i64::from_le_bytes(id)).zip(scores.as_chunks().0.iter().map(|&score| f32::from_le_bytes(score)));
    let ours: Vec<&Hit> = hits.iter().flatten().collect();
    assert_eq!(ours.len(), ids.len() / 8);
    for (hit, (id, score)) in ours.iter().zip(theirs) {
        assert!((hit.score - score).abs() < 1e-6, "faiss says {score}, we {}", hit.score);
        let is_close = |other: &&&Hit| other.place == id as u64 && (other.score - hit.score).abs() < 1e-6;
        assert!(hit.place == id as u64 || ours.iter().any(|other| is_close(&other)), "faiss says {id}, we {}", hit.place);
    }
}
