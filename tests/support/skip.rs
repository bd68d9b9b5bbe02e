//! How a test that cannot run here says so; also used by the tests of other crates.

use std::{
    io::{self, Write as _},
    thread,
};

/// Says on stderr which test is skipped, and why. What the print macros write is captured, and shown of failed tests only.
pub(crate) fn skip(why: &str) {
    let line = format!("skipped {}: {why}\n", thread::current().name().unwrap_or("a test"));
    drop(io::stderr().write_all(line.as_bytes()));
}
