//! The operator's side of Ovenbird: command line, pipeline file -> plan -> run, live progress, report.

mod cli;
mod describe;
mod error;
mod event;
mod explain;
mod history;
mod keep;
mod pipeline;
mod plan;
mod recompute;
mod report;
mod run;
mod screen;
mod verify;

use std::process::ExitCode;

#[expect(clippy::print_stderr, reason = "the one place where errors are printed")]
fn main() -> ExitCode {
    match cli::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("{}", error.render());
            ExitCode::from(error.exit_code() as u8)
        }
    }
}
