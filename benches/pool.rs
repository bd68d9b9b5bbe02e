//! `pool/retrieve` as an operator runs it: 1,203 classes, the best 500 of each, in a pool of LAION's layout on the disk, shards of a million rows of 512 numbers in f16.
//! The whole run is timed, hashing and links included, and its greatest memory; then a run that is killed again and again, to the same bytes. Beside it
//! faiss's `IndexFlatIP`, which holds f32 in memory, searches a million of the rows.
//!
//! Limits: reading each row once (1,024 bytes), and 1.2 MFLOP a row.
//!
//! 1,000,000 rows (1 GB), or with `OVENBIRD_BENCH_SEARCH=full` 10,000,000 (10 GB). `make bench`, after `make peers`.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

#[path = "peer.rs"]
mod peer;
#[path = "support.rs"]
mod support;
#[path = "vectors.rs"]
mod vectors;

use std::{
    fs,
    io::{BufWriter, Write as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use half::f16;
use peer::Peer;
use serde_json::json;
use vectors::vectors;

const D: usize = 512;
const N_CLASSES: usize = 1203;
const N_HITS: usize = 500;
const SHARD_ROWS: usize = 1_000_000;
const PART: usize = 65_536;

const PIPELINE: &str = "version: 1
name: pool
stages:
  - {id: import, use: pool/import, in: {table: ./table.tsv}}
  - id: retrieve
    use: pool/retrieve
    in: {pool: ./pool, metadata: import.metadata, prompts: ./prompts.safetensors, classes: ./classes.json}
    with: {split: all, per_class: 500}
    resources: {cpu: 2}
";

fn main() {
    let n_shards = if std::env::var("OVENBIRD_BENCH_SEARCH").is_ok_and(|size| size == "full") { 10 } else { 1 };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("pool")).unwrap();
    for shard in 0..n_shards {
        write_shard(&path(&format!("pool/img_emb_{shard}.npy")), shard);
    }
    let mut table = BufWriter::new(fs::File::create(path("table.tsv")).unwrap());
    for row in 0..n_shards * SHARD_ROWS {
        writeln!(table, "https://images.example/{row:09}/a-file-name-of-usual-length.jpg\tthe text beside picture {row}, of usual length")
            .unwrap();
    }
    table.flush().unwrap();
    let queries = vectors::<D>(u64::MAX, N_CLASSES);
    let names: Vec<String> = (0..N_CLASSES).map(|class| format!("class {class}")).collect();
    let header = json!({
        "__metadata__": {"names": serde_json::to_string(&names).unwrap()},
        "embeddings": {"dtype": "F32", "shape": [N_CLASSES, D], "data_offsets": [0, 4 * N_CLASSES * D]},
    })
    .to_string();
    let numbers: Vec<u8> = queries.iter().flat_map(|number| number.to_le_bytes()).collect();
    fs::write(path("prompts.safetensors"), [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &numbers].concat()).unwrap();
    fs::write(path("classes.json"), json!({"base": names, "novel": []}).to_string()).unwrap();
    fs::write(path("pool.yaml"), PIPELINE).unwrap();

    let ovenbird = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        command.args(args).current_dir(folder.path());
        command
    };
    support::watched(&mut ovenbird(&["run", "./pool.yaml", "--until", "import"]));
    let n_rows = n_shards * SHARD_ROWS;
    let (seconds, mib) = support::watched(&mut ovenbird(&["run", "./pool.yaml"]));
    let rows_per_s = n_rows as f64 / seconds;
    println!("{n_rows} rows, {N_CLASSES} classes: {seconds:.1} s, {:.2} million rows/s, {mib:.0} MiB resident at most", rows_per_s / 1e6);
    let units = || -> Vec<_> {
        let kind = fs::read_dir(folder.path().join(".ovenbird/units/pool-retrieve")).into_iter().flatten().flatten();
        kind.map(|unit| unit.path()).filter(|unit| unit.join("unit.json").exists()).collect()
    };
    let last = |units: Vec<std::path::PathBuf>| {
        let latest = units.into_iter().max_by_key(|unit| fs::metadata(unit.join("unit.json")).unwrap().modified().unwrap()).unwrap();
        fs::read(latest.join("links/links.parquet")).unwrap()
    };
    let whole = last(units());
    for unit in units() {
        fs::remove_dir_all(unit).unwrap();
    }
    fs::remove_dir_all(folder.path().join(".ovenbird/artifacts")).unwrap();
    let mut n_kills = 0;
    // At any moment, and as soon as there is another checkpoint.
    for patience in [0.1, 0.3, 1.0, 1.0] {
        let mut running = ovenbird(&["run", "./pool.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let (before, clock) = (units(), Instant::now());
        let is_over = || clock.elapsed().as_secs_f64() > patience * seconds || units().iter().any(|unit| !before.contains(unit));
        while running.try_wait().unwrap().is_none() && !is_over() {
            thread::sleep(Duration::from_millis(20));
        }
        n_kills += usize::from(running.try_wait().unwrap().is_none());
        drop(running.kill());
        running.wait().unwrap();
    }
    support::watched(&mut ovenbird(&["run", "./pool.yaml"]));
    println!("killed {n_kills} times: {}", if last(units()) == whole { "the same bytes" } else { "OTHER BYTES" });

    if let Some(theirs) = faiss(folder.path(), &queries) {
        let theirs = SHARD_ROWS as f64 / theirs;
        println!("faiss: {:.2} million rows/s in memory; ratio {:.2}, goal 1.5", theirs / 1e6, rows_per_s / theirs);
    }
}

/// Seconds that faiss takes for the first shard, its best of three; none, aloud, where it is not set up.
fn faiss(folder: &Path, queries: &[f32]) -> Option<f64> {
    let shard = fs::read(folder.join("pool/img_emb_0.npy")).unwrap();
    fs::write(folder.join("rows.f16"), &shard[shard.len() - 2 * D * SHARD_ROWS..]).unwrap();
    fs::write(folder.join("queries.f32"), queries.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    fs::write(folder.join("n_rows"), SHARD_ROWS.to_string()).unwrap();
    let mut peer = Peer::start("faiss", "search.py", folder, &[D.to_string(), N_HITS.to_string(), "2".into()])?;
    let seconds = (0..3).map(|_| peer.ask(&N_CLASSES.to_string()).parse().unwrap());
    Some(seconds.fold(f64::INFINITY, f64::min))
}

fn write_shard(path: &Path, shard: usize) {
    let clock = Instant::now();
    let header = format!("{{'descr': '<f2', 'fortran_order': False, 'shape': ({SHARD_ROWS}, {D}), }}\n");
    let mut file = BufWriter::new(fs::File::create(path).unwrap());
    file.write_all(&[b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    for first in (0..SHARD_ROWS).step_by(PART) {
        let numbers = vectors::<D>((shard * SHARD_ROWS + first) as u64, PART.min(SHARD_ROWS - first));
        let bytes: Vec<u8> = numbers.into_iter().flat_map(|number| f16::from_f32(number).to_le_bytes()).collect();
        file.write_all(&bytes).unwrap();
    }
    file.flush().unwrap();
    if shard == 0 {
        println!("a shard is written in {:.0} s", clock.elapsed().as_secs_f64());
    }
}
