//! The command line: the list of commands, man pages, completions.

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use ovenbird_cache::{crash_at, publish};

use crate::{
    commands::{
        cache, check, diff, doctor, explain, export, init, log, pipelines, plan, predict, report, retry, run, schema, stages, status,
        verify,
    },
    error::{Error, ExitCode, Result},
    output::{DEFAULT_HOME, print},
};

/// Build open-vocabulary object detectors offline, from resumable, content-hashed stages
#[derive(Parser)]
#[command(name = "ovenbird", version, after_help = exit_codes(), max_term_width = 120, disable_help_subcommand = true)]
struct Cli {
    /// Folder for all results, logs and reports
    #[arg(long, global = true, env = "OVENBIRD_HOME", default_value = DEFAULT_HOME, value_name = "FOLDER")]
    home: PathBuf,
    /// For tests of crash safety: exit at the n-th step of publishing
    #[arg(long = "crash-at", global = true, env = "OVENBIRD_CRASH_AT", hide = true)]
    crash_step: Option<u32>,
    /// Print more on stderr: every event with its run, step and unit (-v), and messages of the libraries (-vv)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

/// The commands; each has a file of its name in `src/commands/`, but for the two that describe the command line itself.
#[derive(Subcommand)]
enum Command {
    Init(init::Args),
    Run(run::Args),
    Plan(plan::Args),
    Check(check::Args),
    Explain(explain::Args),
    Retry(retry::Args),
    Predict(predict::Args),
    Export(export::Args),
    Status(status::Args),
    Log(log::Args),
    Diff(diff::Args),
    Verify(verify::Args),
    Cache(cache::Args),
    Report(report::Args),
    Stages(stages::Args),
    Pipelines(pipelines::Args),
    Doctor(doctor::Args),
    Schema(schema::Args),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write man pages into a folder
    Man {
        /// The folder
        folder: PathBuf,
    },
}

fn exit_codes() -> String {
    let rows = ExitCode::TABLE.iter().map(|(code, meaning)| format!("  {:>3}  {meaning}\n", *code as u8));
    format!("Exit codes:\n{}", rows.collect::<String>())
}

/// Runs the program; returns the home with the result.
pub(crate) fn main() -> (PathBuf, Result<()>) {
    let cli = Cli::parse();
    (cli.home.clone(), begin(cli))
}

#[expect(clippy::disallowed_methods, reason = "what the operator asks for")]
fn begin(cli: Cli) -> Result<()> {
    let Cli { home, crash_step, verbose, command } = cli;
    if home.to_str().is_none() {
        let problem = format!("{}: the home's path is not UTF-8, and units and reports contain it", home.display());
        return Err(Error::Usage { problem, hint: "choose another with `--home FOLDER`".into() });
    }
    let level = ["error", "error,ovenbird=info", "debug"][usize::from(verbose.min(2))];
    let filter = match std::env::var_os("OVENBIRD_LOG") {
        None => level.into(),
        Some(filter) => filter.to_string_lossy().parse::<tracing_subscriber::EnvFilter>().map_err(|error| Error::Usage {
            problem: format!("OVENBIRD_LOG: {error}"),
            hint: "expected for example `OVENBIRD_LOG=error,ovenbird=info`; or unset it".into(),
        })?,
    };
    // A closed terminal does not end the program.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    log.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).init();
    if let Some(step) = crash_step {
        crash_at(step);
    }
    match &command {
        Command::Init(args) => init::init(&home, args),
        Command::Run(args) => run::run(&home, args),
        Command::Plan(args) => plan::plan(&home, args),
        Command::Check(args) => check::check(args),
        Command::Explain(args) => explain::explain(&home, args),
        Command::Retry(args) => retry::retry(&home, args),
        Command::Predict(args) => predict::predict(&home, args),
        Command::Export(args) => export::export(&home, args),
        Command::Status(args) => status::status(&home, args),
        Command::Log(args) => log::log(&home, args),
        Command::Diff(args) => diff::diff(&home, args),
        Command::Verify(args) => verify::verify(&home, args),
        Command::Cache(args) => cache::cache(&home, args),
        Command::Report(args) => report::report(&home, args),
        Command::Stages(args) => stages::stages(args),
        Command::Pipelines(args) => pipelines::pipelines(args),
        Command::Doctor(args) => doctor::doctor(&home, args),
        Command::Schema(args) => schema::schema(args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "ovenbird", &mut script);
            Ok(print(&String::from_utf8_lossy(&script))?)
        }
        Command::Man { folder } => man(folder),
    }
}

fn man(folder: &Path) -> Result<()> {
    let mut command = Cli::command();
    // Gives commands of commands their full names.
    command.build();
    let mut pages = vec![&command];
    while let Some(command) = pages.pop() {
        pages.extend(command.get_subcommands().filter(|command| command.get_name() != "help"));
        let page = clap_mangen::Man::new(command.clone());
        let mut text = Vec::new();
        page.render(&mut text).expect("BUG: writing to memory does not fail");
        publish::replace(&folder.join(page.get_filename()), &text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::local::Options;

    #[test]
    fn commands_that_make_things_take_the_same_devices_and_cores() {
        for command in ["run quickstart", "retry quickstart --failed", "predict quickstart a.png", "verify --fix"] {
            let words = format!("ovenbird {command} --device cpu,cpu --jobs 3");
            let cli = Cli::try_parse_from(words.split(' ')).unwrap_or_else(|error| panic!("{error}"));
            let Options { cpu, devices, .. } = match &cli.command {
                Command::Run(args) => args.machine.options(),
                Command::Retry(args) => args.machine.options(),
                Command::Predict(args) => args.machine.options(),
                Command::Verify(args) => args.machine.options(),
                _ => panic!("{words}"),
            };
            assert_eq!((cpu, devices), (3, vec![tch::Device::Cpu; 2]), "{command}");
        }
    }
}
