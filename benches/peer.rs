//! A peer: a Python program of `benches/peers` that does what it is told, line by line, and answers each with a line.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// A peer that is ready.
pub(crate) struct Peer {
    process: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a program; none, aloud, where its package is not set up. The program gets `folder` and the other arguments.
    pub(crate) fn start(package: &str, program: &str, folder: &Path, others: &[impl AsRef<OsStr>]) -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/peers/bin/python");
        let import = format!("import {package}");
        if !Command::new(&python).args(["-c", &import]).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            println!("skipped: {package} is not set up (`make peers`)");
            return None;
        }
        let mut command = Command::new(python);
        command.arg(root.join("benches/peers").join(program)).arg(folder).args(others);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (asks, answers) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let mut peer = Self { process, asks, answers };
        assert_eq!(peer.line(), "ready");
        Some(peer)
    }

    /// Its answer, once it has done some work.
    pub(crate) fn ask(&mut self, work: &str) -> String {
        writeln!(self.asks, "{work}").unwrap();
        self.line()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
