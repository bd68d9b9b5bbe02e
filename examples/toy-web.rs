//! The web of the toy world, on a port of this machine: `toy-web [PORT]`, by default 8391, to which `promptdet-toy` links.
//!
//! It serves the web set of any seed. Some links are dead, others lead on, end early, or lead to a page or to another picture than before (`toy::trouble`); robots may
//! not go to `/private/`.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a program for trying things out ends where it fails, and says where it listens"
)]

#[path = "../tests/support/toy_web.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod toy_web;

use std::thread;

use toy_web::ToyWeb;

fn main() {
    let port = std::env::args().nth(1).map_or(8391, |port| port.parse().expect("a port is a number"));
    let web = ToyWeb::start(port, toy_web::of_world);
    println!("serving http://{}/ until Ctrl-C", web.address);
    loop {
        thread::park();
    }
}
