//! `web/download` beside img2dataset: 4,000 links to photographs of 640 x 480 px on a server of this machine, which takes the same part of the cores from both.
//! Both keep the files as they come (`resize_mode: no` there) and decode each. Ours also asks robots.txt, hashes, checks addresses and syncs its record of each link.
//! Then a run that is killed three times: how many links were asked for more than once.
//!
//! Limit: the server alone, as fast as a client that throws everything away gets its files.
//!
//! `make bench`, after `make peers`.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark prints, and may end where it fails")]

#[path = "support.rs"]
mod support;
#[path = "../tests/support/toy_web.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod toy_web;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use ovenbird_data::images::Image;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use toy_web::{Answer, ToyWeb};

const N_LINKS: usize = 4000;
/// Requests at once, of both.
const CONCURRENCY: usize = 64;
const ROUNDS: usize = 3;

fn main() {
    let pictures: Vec<Vec<u8>> = (0..64).map(photograph).collect();
    println!("{N_LINKS} photographs of {:.0} kB", pictures.iter().map(Vec::len).sum::<usize>() as f64 / 64.0 / 1e3);
    let web = ToyWeb::start(0, move |request| {
        let number = request.path.strip_prefix('/').and_then(|path| path.strip_suffix(".jpg")?.parse::<usize>().ok());
        number.map_or_else(
            || Answer::status(404),
            |number| {
                // Another content for each link: a comment behind the end of the picture.
                let mut bytes = pictures[number % pictures.len()].clone();
                bytes.extend_from_slice(&number.to_le_bytes());
                Answer::file("image/jpeg", bytes)
            },
        )
    });
    let folder = tempfile::tempdir().unwrap();
    let urls: Vec<String> = (0..N_LINKS).map(|number| web.url(&format!("/{number}.jpg"))).collect();
    fs::write(folder.path().join("urls.txt"), urls.join("\n") + "\n").unwrap();
    fs::write(folder.path().join("table.tsv"), urls.iter().map(|url| format!("{url}\ta photograph\n")).collect::<String>()).unwrap();
    let pipeline = format!(
        "version: 1
name: download
stages:
  - {{id: table, use: pool/import, in: {{table: ./table.tsv}}}}
  - {{id: links, use: pool/links, in: {{metadata: table.metadata}}}}
  - id: download
    use: web/download
    in: {{links: links.links}}
    with: {{contact: bench@localhost.invalid, per_class: {N_LINKS}, concurrency: {CONCURRENCY}, per_host: {CONCURRENCY}, allow_private: [127.0.0.1]}}
    resources: {{cpu: 2}}
"
    );
    fs::write(folder.path().join("download.yaml"), pipeline).unwrap();
    let ovenbird = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        command.args(args).current_dir(folder.path());
        command
    };
    println!("the server alone: {:.0} images/s", N_LINKS as f64 / alone(&urls));
    support::watched(&mut ovenbird(&["run", "./download.yaml", "--until", "links"]));
    let fresh = || {
        for part in ["web", "artifacts", "units/web-download", "pipelines"] {
            drop(fs::remove_dir_all(folder.path().join(".ovenbird").join(part)));
        }
    };
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        fresh();
        let (ours, mib) = support::watched(&mut ovenbird(&["run", "./download.yaml"]));
        println!("ours: {:.0} images/s ({ours:.1} s, the whole command), {mib:.0} MiB at most", N_LINKS as f64 / ours);
        let Some(theirs) = img2dataset(folder.path()) else { break };
        println!("img2dataset: {:.0} images/s ({theirs:.1} s, without starting Python)", N_LINKS as f64 / theirs);
        ratios.push(theirs / ours);
    }
    ratios.sort_by(f64::total_cmp);
    if let Some(ratio) = ratios.get(ratios.len() / 2) {
        println!("ratio {ratio:.2} ({:.2} to {:.2}), goal 1.5", ratios[0], ratios[ratios.len() - 1]);
    }

    fresh();
    let before = web.counts();
    for _ in 0..3 {
        let mut running = ovenbird(&["run", "./download.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(1500));
        drop(running.kill());
        running.wait().unwrap();
    }
    support::watched(&mut ovenbird(&["run", "./download.yaml"]));
    let n_again = web.counts().iter().filter(|(path, n)| path.ends_with(".jpg") && **n > before.get(*path).unwrap_or(&0) + 1).count();
    println!("killed three times: {n_again} links were asked for again; in flight were up to {}", 3 * CONCURRENCY);
}

/// Seconds in which as many threads read all files and throw them away.
fn alone(urls: &[String]) -> f64 {
    let clock = Instant::now();
    thread::scope(|scope| {
        for part in urls.chunks(urls.len().div_ceil(CONCURRENCY)) {
            scope.spawn(move || {
                for url in part {
                    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
                    let mut stream = TcpStream::connect(host).unwrap();
                    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).unwrap();
                    assert!(bytes.len() > 1000);
                }
            });
        }
    });
    clock.elapsed().as_secs_f64()
}

/// Seconds that img2dataset takes; none, aloud, where it is not set up.
fn img2dataset(folder: &Path) -> Option<f64> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/img2dataset/bin/python");
    if !Command::new(&python).args(["-c", "import img2dataset"]).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        println!("skipped: img2dataset is not set up (`make peers`)");
        return None;
    }
    drop(fs::remove_dir_all(folder.join("theirs")));
    let output = Command::new(python)
        .arg(root.join("benches/peers/download.py"))
        .args([folder.join("urls.txt"), folder.join("theirs")])
        .args([CONCURRENCY.to_string(), N_LINKS.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().last()?.parse().ok()
}

/// A picture of 640 x 480 px with the detail of a photograph.
fn photograph(seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (width, height) = (640_u32, 480_u32);
    let coarse: Vec<u8> = (0..3 * 41 * 31).map(|_| random.random()).collect();
    let mut rgb = Vec::with_capacity((3 * width * height) as usize);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let at = |x: u32, y: u32| i32::from(coarse[(3 * (41 * (y / 16) + x / 16) + channel) as usize]);
                let value = (at(x, y) * (16 - (x % 16) as i32) + at((x + 16).min(640), y) * (x % 16) as i32) / 16;
                rgb.push((value + random.random_range(-12..=12)).clamp(0, 255) as u8);
            }
        }
    }
    Image { width, height, rgb }.to_jpeg(85)
}
