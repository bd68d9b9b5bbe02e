//! Serves a folder of pictures on a port of this machine, with the faults of the web in front of each: `toy-web FOLDER [PORT]`.
//!
//! `/NAME` is the picture; `/dead/NAME` is gone, `/moved/NAME` leads there, `/slow/NAME` never ends, `/html/NAME` is a page, `/busy/NAME` answers at the
//! second time, `/cut/NAME` ends early, `/private/NAME` is forbidden by robots.txt.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a program for trying things out ends where it fails, and says where it listens"
)]

#[path = "../tests/support/toy_web.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod toy_web;

use std::{fs, path::PathBuf, thread};

use toy_web::{Answer, Request, ToyWeb};

fn main() {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().expect("type: toy-web FOLDER [PORT]"));
    let port = args.next().map_or(0, |port| port.parse().expect("a port is a number"));
    let web = ToyWeb::start(port, move |request| answer(&folder, request));
    println!("http://{}/", web.address);
    loop {
        thread::park();
    }
}

fn answer(folder: &std::path::Path, request: &Request) -> Answer {
    if request.path == "/robots.txt" {
        return Answer::file("text/plain", "User-agent: *\nDisallow: /private/\n");
    }
    let path = request.path.trim_start_matches('/');
    let (kind, name) = path.split_once('/').unwrap_or(("", path));
    // Names without folders alone: nothing outside the folder is served.
    let is_name = !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.');
    let Some(bytes) = is_name.then(|| fs::read(folder.join(name)).ok()).flatten() else { return Answer::status(404) };
    match kind {
        "" | "private" => Answer::file("image/jpeg", bytes),
        "moved" => Answer::redirect(&format!("/{name}")),
        "slow" => Answer::Drip(b"HTTP/1.1 200 OK\r\n\r\n\xff\xd8\xff".to_vec()),
        "html" => Answer::file("image/jpeg", "<!doctype html><p>no picture"),
        "busy" if request.n_before == 0 => Answer::status(503),
        "busy" => Answer::file("image/jpeg", bytes),
        "cut" => Answer::Raw(
            [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes(), &bytes[..bytes.len() / 2]].concat(),
        ),
        _ => Answer::status(404),
    }
}
