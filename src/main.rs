//! The program: command line, pipeline file -> plan -> run, progress, report.

mod chosen;
mod cli;
mod commands;
mod devices;
mod error;
mod event;
mod machine;
mod output;
mod pins;
mod pipeline;
mod plan;
mod progress;
mod quantities;
mod reason;
mod request;
mod results;
mod run;
mod run_args;
mod run_state;

use error::ExitCode;

fn main() {
    machine::silence_libtorch();
    let (home, result) = cli::main();
    let code = match result {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            output::say(&error.render(&home));
            error.exit_code(&home)
        }
    };
    leave(code)
}

/// Ends without running destructors: libtorch's take a quarter of the program's start-up time, and a stage that hangs cannot be joined.
#[expect(unsafe_code, reason = "a foreign function without preconditions")]
fn leave(code: ExitCode) -> ! {
    // SAFETY: `_exit` only ends the process. `output::print` flushes stdout.
    unsafe { libc::_exit(code as i32) }
}
