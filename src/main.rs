//! The operator's side of Ovenbird: command line, pipeline file -> plan -> run, live progress, report.

mod cli;
mod comparison;
mod describe;
mod devices;
mod doctor;
mod error;
mod estimate;
mod event;
mod explain;
mod export;
mod history;
mod keep;
mod machine;
mod mend;
mod pipeline;
mod plan;
mod recompute;
mod report;
mod run;
mod screen;
mod verify;
mod work;

use error::ExitCode;

fn main() {
    machine::silence_libtorch();
    let (home, result) = cli::main();
    let code = match result {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            screen::say(&error.render(&home));
            error.exit_code(&home)
        }
    };
    leave(code)
}

/// Ends at once: libtorch's destructors take a quarter of the program's start-up time and give back what the system takes
/// anyway, and a stage that hangs cannot be waited for.
#[expect(unsafe_code, reason = "a foreign function without preconditions")]
fn leave(code: ExitCode) -> ! {
    // SAFETY: `_exit` only ends the process. `cli::print` flushes what it prints.
    unsafe { libc::_exit(code as i32) }
}
