//! What benchmarks of the whole program share.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Runs a command that must succeed, without its output: s, and its greatest resident memory in MiB.
pub(crate) fn watched(command: &mut Command) -> (f64, f64) {
    let clock = Instant::now();
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut peak: f64 = 0.0;
    while running.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        peak = peak.max(kib.unwrap_or(0.0) / 1024.0);
        thread::sleep(Duration::from_millis(2));
    }
    assert!(running.wait().unwrap().success(), "{command:?}");
    (clock.elapsed().as_secs_f64(), peak)
}
