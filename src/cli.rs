//! The command line.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    thread,
    time::Duration,
};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use ovenbird_cache::{Error as CacheError, Ledger, Store, crash_at, publish, verify::Depth};
use serde_json::json;

use crate::{
    describe, doctor,
    error::{Error, ExitCode, Result, count},
    estimate, event, explain, export, history,
    keep::{self, Collection},
    machine,
    pipeline::{
        self, NAMED, Pipeline, Setting, Step, Title,
        matrix::{labels, plain_id},
    },
    plan::{self, Outlook},
    report,
    run::{self, Options},
    screen::{Screen, harmless},
    verify::{self, Wish},
};

/// How many items of a stage `run --estimate` measures where `--dry-run` does not say.
const SAMPLE: usize = 64;
/// The version of every `--json` form.
const JSON_VERSION: u32 = 1;

/// Build open-vocabulary object detectors offline, from resumable, content-hashed stages
#[derive(Parser)]
#[command(name = "ovenbird", version, after_help = exit_codes(), max_term_width = 120, disable_help_subcommand = true)]
struct Cli {
    /// Folder that holds all state: units, artifacts, runs
    #[arg(long, global = true, env = "OVENBIRD_HOME", default_value = ".ovenbird", value_name = "FOLDER")]
    home: PathBuf,
    /// For tests of crash safety: die at the n-th step of publishing
    #[arg(long = "crash-at", global = true, env = "OVENBIRD_CRASH_AT", hide = true)]
    crash_step: Option<u32>,
    /// Say more on stderr: every event with its run, stage and unit (-v), and what the libraries say (-vv)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a pipeline, or continue it; what is already right on disk is not done again
    Run {
        #[command(flatten)]
        wanted: Wanted,
        #[command(flatten)]
        machine: RunArgs,
        /// Hash every input file again instead of trusting its size and times
        #[arg(long)]
        rehash: bool,
        /// Only the first N items of every stage, and one unit of a training; results lie apart
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        dry_run: Option<u32>,
        /// Predict time, bytes and memory of every stage from a dry run, one stage after the other [default: of 64 items]
        #[arg(long)]
        estimate: bool,
    },
    /// Say what a run would do, stage by stage, and why
    Plan {
        #[command(flatten)]
        wanted: Wanted,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say why a stage, or one unit of it, would run or not, with the chain of causes
    Explain {
        #[command(flatten)]
        chosen: Chosen,
        /// A stage's id, or one of its units: `globals`, `globals/3`
        #[arg(value_name = "STAGE[/UNIT]")]
        what: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Try again what a run with `on_bad_item: skip` left out
    Retry {
        #[command(flatten)]
        wanted: Wanted,
        #[command(flatten)]
        machine: RunArgs,
        /// The items that failed
        #[arg(long, required = true)]
        failed: bool,
    },
    /// Copy what a stage made into a folder, for other programs
    Export {
        #[command(flatten)]
        chosen: Chosen,
        /// A stage's id, and where it has several outputs which: `detections`, `coco.evaluation`
        #[arg(value_name = "STAGE[.OUTPUT]")]
        what: String,
        /// Where to; what is not there is made, what has the same name is replaced
        folder: PathBuf,
    },
    /// Say how the latest run, or another, stands
    Status {
        /// A run's id [default: the latest]
        run: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List runs, or the events of one
    Log {
        /// A run's id
        run: Option<String>,
        /// Print JSON: one event a line for a run
        #[arg(long)]
        json: bool,
        /// Go on printing until the run ends
        #[arg(long, short, requires = "run")]
        follow: bool,
    },
    /// Say whether what lies in the home is what was published, and put right what is not
    Verify {
        /// Also the digest of every file
        #[arg(long)]
        full: bool,
        /// Also what the bytes mean, and whether input files rotted
        #[arg(long, conflicts_with = "full")]
        deep: bool,
        /// Compute this part of the rows of features again and compare: `0.1%`
        #[arg(long, value_name = "PERCENT", value_parser = percent)]
        recompute: Option<f64>,
        /// Set aside what is bad and make it again; nothing is deleted
        #[arg(long)]
        fix: bool,
        /// Only the k-th of n parts: `3/7`
        #[arg(long, value_name = "K/N", value_parser = kth_of)]
        subset: Option<(u64, u64)>,
        /// Stop after so long: `30m`; the same command continues
        #[arg(long, value_name = "TIME", value_parser = time)]
        max_duration: Option<Duration>,
        #[command(flatten)]
        machine: RunArgs,
        /// Read no faster: `200MB/s`
        #[arg(long, value_name = "RATE", value_parser = rate)]
        rate: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what takes space in the home, remove what is not needed, make the index anew
    Cache {
        #[command(subcommand)]
        what: CacheCommand,
    },
    /// Write one HTML file about a run: graph, tables, curves, pictures, manifests
    Report {
        /// A run's id [default: the latest]
        run: Option<String>,
        /// Where to write it [default: beside the run's log]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Print JSON instead: the numbers of every evaluation, and variants side by side
        #[arg(long, conflicts_with = "output")]
        json: bool,
    },
    /// List the stages, or document one: inputs, outputs, parameters, defaults
    Stages {
        /// A stage's kind, such as clip/globals
        kind: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the named pipelines, or print the file of one
    Pipelines {
        /// A pipeline's name
        name: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what this machine has, and what a CLIP checkpoint is and whether it works
    Doctor {
        /// A checkpoint of OpenAI, open_clip or Hugging Face, or the folder of one with its config file
        #[arg(long, value_name = "FILE")]
        clip: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a JSON Schema of pipeline files, for editors
    Schema,
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

#[derive(Subcommand)]
enum CacheCommand {
    /// Say what each stage takes, and how much of it no pipeline needs
    Du {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say which units no pipeline, pinned run or recent run needs; remove them with --delete
    Gc {
        /// Remove them
        #[arg(long)]
        delete: bool,
        /// Remove them also where it takes more than an hour to make them again
        #[arg(long, requires = "delete")]
        yes: bool,
        /// Keep what the last N runs used
        #[arg(long, default_value_t = 1, value_name = "N")]
        keep_runs: usize,
        /// Keep what runs used that began so long ago at most
        #[arg(long, default_value = "30d", value_name = "TIME", value_parser = time)]
        keep_for: Duration,
        /// Keep what is younger
        #[arg(long, default_value = "24h", value_name = "TIME", value_parser = time)]
        grace: Duration,
        /// Also drop what pipelines still need of a kind of stage, such as clip/blocks: the record stays, and the bytes are
        /// made again when something reads them
        #[arg(long, value_name = "KIND")]
        drop: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the ledger anew from what lies on the disk
    Rebuild,
    /// Keep what a run used
    Pin {
        /// A run's id
        run: String,
    },
    /// Keep it no longer
    Unpin {
        /// A run's id
        run: String,
    },
}

/// A pipeline and what is changed of it.
#[derive(clap::Args)]
struct Chosen {
    /// A named pipeline, or a file (written with a slash or ending in .yaml)
    pipeline: String,
    /// Change a variable, a parameter or an input of a stage: `--set seed=8`, `--set detect.score_threshold=0.1`, `--set
    /// detector.in.features=objects.features`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// Only this variant of the pipeline, or, given several times, these
    #[arg(long = "variant", value_name = "NAME")]
    variants: Vec<String>,
}

/// A pipeline, and how much of it.
#[derive(clap::Args)]
struct Wanted {
    #[command(flatten)]
    chosen: Chosen,
    /// Stop after this stage
    #[arg(long, value_name = "STAGE")]
    until: Option<String>,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
        Ok(Self { key: key.trim().into(), value: value.into() })
    }
}

/// How much of the machine a command uses. None of it changes a result.
#[derive(clap::Args)]
struct RunArgs {
    /// Processor cores for all stages together [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Where networks run: each stage takes one device, or, to share its images among them, all that are free; `cuda` is all that there
    /// are
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda|cuda:N,N")]
    device: Devices,
}

impl RunArgs {
    fn options(self) -> Options {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let cpu = self.jobs.map_or(cores, usize::from);
        Options { cpu, memory: machine::total_memory(), devices: self.device.0, rehash: false, is_measuring: false, is_repair: false }
    }
}

#[derive(Debug, Clone)]
struct Devices(Vec<tch::Device>);

impl FromStr for Devices {
    type Err = String;

    /// `cpu`, `cuda` for all, or `cuda:0,2` for some. `cpu,cpu` has two workers, as two accelerators would.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.split(',').all(|device| device == "cpu") {
            return Ok(Self(text.split(',').map(|_| tch::Device::Cpu).collect()));
        }
        let expected = "expected cpu, cuda, or cuda: and numbers, as in cuda:0,1";
        let chosen = text.strip_prefix("cuda").ok_or(expected)?;
        let n_devices = machine::n_accelerators().ok_or("libtorch's CUDA part is not here: `CUDA=1 make libtorch`, and build again")?;
        let indices: Vec<usize> = match chosen.strip_prefix(':') {
            Some(list) => list.split(',').map(|index| index.parse().map_err(|_| expected)).collect::<Result<_, _>>()?,
            None if chosen.is_empty() => (0..n_devices).collect(),
            None => return Err(expected.into()),
        };
        if indices.is_empty() || indices.iter().any(|index| *index >= n_devices) {
            return Err(format!("libtorch sees {} here; `ovenbird doctor` says more", count(n_devices, "CUDA device")));
        }
        if let Some(twice) = (1..indices.len()).find(|place| indices[..*place].contains(&indices[*place])) {
            return Err(format!("expected each CUDA device once, found {} twice", indices[twice]));
        }
        Ok(Self(indices.into_iter().map(tch::Device::Cuda).collect()))
    }
}

fn exit_codes() -> String {
    let rows = ExitCode::TABLE.iter().map(|(code, meaning)| format!("  {:>3}  {meaning}\n", *code as u8));
    format!("Exit codes:\n{}", rows.collect::<String>())
}

/// Runs the program; says in which home.
pub(crate) fn main() -> (PathBuf, Result<()>) {
    let cli = Cli::parse();
    (cli.home.clone(), begin(cli))
}

#[expect(clippy::disallowed_methods, reason = "what the operator asks for")]
fn begin(cli: Cli) -> Result<()> {
    let Cli { home, crash_step, verbose, command } = cli;
    if home.to_str().is_none() {
        let problem = format!("{}: the home's path is not UTF-8, and units and reports write it down", home.display());
        return Err(Error::Usage { problem, hint: "choose another with `--home FOLDER`".into() });
    }
    let level = ["error", "error,ovenbird=info", "debug"][usize::from(verbose.min(2))];
    let filter = match std::env::var_os("OVENBIRD_LOG") {
        None => level.into(),
        Some(filter) => filter.to_string_lossy().parse::<tracing_subscriber::EnvFilter>().map_err(|error| Error::Usage {
            problem: format!("OVENBIRD_LOG: {error}"),
            hint: "write it such as `OVENBIRD_LOG=error,ovenbird=info`, or unset it".into(),
        })?,
    };
    // A terminal that is gone is no reason to end.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    log.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).init();
    if let Some(step) = crash_step {
        crash_at(step);
    }
    match command {
        Command::Run { wanted, machine, rehash, dry_run, estimate } => {
            let sample = dry_run.map(|n| n as usize).or(estimate.then_some(SAMPLE));
            let options = Options { rehash, is_measuring: estimate, ..machine.options() };
            let Some(n) = sample else { return run(&home, &wanted, &options, None) };
            let name = if estimate { "estimate".to_owned() } else { n.to_string() };
            let apart = home.join("dry-run").join(name);
            if estimate {
                // What is there already would not be measured.
                Store::open(&apart)?.publisher().remove(&apart)?;
            }
            run(&apart, &wanted, &options, Some(n))
        }
        Command::Plan { wanted, json } => show_plan(&home, &wanted, json),
        Command::Explain { chosen, what, json } => explain(&home, &chosen, &what, json),
        Command::Retry { wanted, machine, failed: _ } => retry(&home, &wanted, &machine.options()),
        Command::Export { chosen, what, folder } => export(&home, &chosen, &what, &folder),
        Command::Status { run, json } => history::status(&home, run.as_deref(), json),
        Command::Log { run, json, follow } => history::log(&home, run.as_deref(), json, follow),
        Command::Verify { full, deep, recompute, fix, subset, max_duration, machine, rate, json } => {
            let depth = if deep {
                Depth::Deep
            } else if full {
                Depth::Full
            } else {
                Depth::Quick
            };
            verify::verify(&home, &Wish { depth, recompute, fix, subset, max_duration, rate, json, options: machine.options() })
        }
        Command::Cache { what } => match what {
            CacheCommand::Du { json } => keep::du(&home, json),
            CacheCommand::Gc { delete, yes, keep_runs, keep_for, grace, drop, json } => {
                keep::gc(&home, &Collection { keep_runs, keep_for, grace, dropped_kinds: drop, is_real: delete, is_sure: yes, json })
            }
            CacheCommand::Rebuild => keep::rebuild(&home),
            CacheCommand::Pin { run } => keep::pin(&home, &run),
            CacheCommand::Unpin { run } => keep::unpin(&home, &run),
        },
        Command::Report { run, output, json } => {
            let run = history::chosen(&home, run.as_deref())?;
            if json {
                return report::numbers(&Store::open(&home)?, &run);
            }
            let (path, note) = report::write(&Store::open(&home)?, &run, output.as_deref())?;
            print(&format!("{}\n{}", path.display(), note.map_or_else(String::new, |note| format!("{note}\n"))))
        }
        Command::Stages { kind, json } => print(&describe::stages(kind.as_deref(), json)?),
        Command::Pipelines { name, json } => pipelines(name.as_deref(), json),
        Command::Doctor { clip, json } => doctor::doctor(&home, clip.as_deref(), json),
        Command::Schema => print(&describe::schema()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ovenbird", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Man { folder } => man(&folder),
    }
}

/// Prints data to stdout, in which nothing drives a terminal; a reader that has gone away is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(harmless(text).as_bytes()).and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
            Err(CacheError::Write { path: "standard output".into(), source }.into())
        }
        _ => Ok(()),
    }
}

/// A versioned JSON document for `--json`.
pub(crate) fn to_json(key: &str, value: &impl serde::Serialize) -> String {
    let document = json!({"version": JSON_VERSION, key: value});
    format!("{}\n", serde_json::to_string_pretty(&document).expect("BUG: our own data is plain JSON"))
}

impl Chosen {
    fn pipeline(&self) -> Result<Pipeline> {
        pipeline::load(&self.pipeline, &self.settings, &self.variants)
    }
}

impl Wanted {
    /// The pipeline, and the steps that are wanted of it.
    fn load(&self) -> Result<(Pipeline, Vec<usize>)> {
        let pipeline = self.chosen.pipeline()?;
        let wanted = match &self.until {
            Some(until) => plan::needed(&pipeline, &places(&pipeline, until)?),
            None => (0..pipeline.steps.len()).collect(),
        };
        Ok((pipeline, wanted))
    }
}

/// The steps that a name stands for: one by its id, or all copies of a stage by the id that it has in the file.
fn places(pipeline: &Pipeline, name: &str) -> Result<Vec<usize>> {
    let is_named = |step: &Step| step.id == name || step.plain_id == name;
    let places: Vec<usize> = (0..pipeline.steps.len()).filter(|place| is_named(&pipeline.steps[*place])).collect();
    if !places.is_empty() {
        return Ok(places);
    }
    let mut stages: Vec<&str> = Vec::new();
    for Step { plain_id, .. } in &pipeline.steps {
        stages.extend((!stages.contains(&plain_id.as_str())).then_some(plain_id.as_str()));
    }
    let copies = pipeline.steps.iter().map(|step| step.id.as_str()).filter(|_| name.contains('@'));
    let hint = match pipeline::nearest(name, stages.iter().copied().chain(copies)) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("its stages are {}", stages.join(", ")),
    };
    Err(Error::Usage { problem: format!("{name}: the pipeline has no such stage"), hint })
}

fn run(home: &Path, wanted: &Wanted, options: &Options, most_items: Option<usize>) -> Result<()> {
    let name = &wanted.chosen.pipeline;
    let (mut pipeline, wanted) = wanted.load()?;
    pipeline.steps.iter_mut().for_each(|step| step.most_items = most_items);
    let store = Store::open(home)?;
    let pipeline = Arc::new(pipeline);
    let mut screen = Screen::new();
    let ended = run::run(&pipeline, &wanted, &store, options, &mut |event| screen.show(event))?;
    let (report, _is_new) = report::write(&store, &ended.run, None)?;
    let mut text = history::tables(&store, &ended.run)?;
    if let Some(error) = ended.error {
        print(&text)?;
        return Err(error);
    }
    let n_made = history::n_made(home, &ended.run)?;
    if n_made == 0 {
        text.push_str("nothing to do: every stage is there already\n");
    }
    if let Some(n) = most_items {
        text.push_str(&format!("a dry run of {n} items a stage; what it made lies apart, in {}\n", home.display()));
    }
    if options.is_measuring {
        text.push_str(&estimate::table(home, &ended.run)?);
    }
    text.push_str(&format!("report: {}\n", report.display()));
    text.push_str(&next_commands(name, &pipeline));
    print(&text)
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    number.filter(|number| *number > 0.0 && *number <= 100.0).map(|number| number / 100.0).ok_or_else(|| "expected such as 0.1%".into())
}

fn kth_of(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(k, n)| *k >= 1 && k <= n).ok_or_else(|| "expected K/N with K from 1 to N, such as 3/7".into())
}

fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("expected such as 90s, 30m, 8h or 30d".into()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a whole number of s, m, h or d, such as 8h".to_owned())?;
    // A hundred years are for ever.
    Ok(Duration::from_secs(number.saturating_mul(seconds).min(100 * 366 * 86_400)))
}

fn rate(text: &str) -> Result<u64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text).to_ascii_uppercase();
    let (number, unit) = bytes.split_at(bytes.find(|c: char| !c.is_ascii_digit()).unwrap_or(bytes.len()));
    let scale = match unit {
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("expected such as 200MB/s".into()),
    };
    let rate = number.parse::<u64>().map_err(|error| error.to_string())?.saturating_mul(scale);
    if rate > 0 { Ok(rate) } else { Err("expected more than 0".into()) }
}

/// Three commands worth typing after a run.
fn next_commands(name: &str, pipeline: &Pipeline) -> String {
    let tunable = pipeline.steps.iter().rev().find(|step| step.entry.kind.starts_with("detect/"));
    let change = tunable.map_or_else(String::new, |step| format!(" --set {}.nms_iou=0.4", step.plain_id));
    format!(
        "next:\n  ovenbird plan {name}{change}    what a changed parameter would run again\n  ovenbird stages    every stage with its parameters\n  ovenbird log    past runs and what they did\n"
    )
}

fn show_plan(home: &Path, wanted: &Wanted, json: bool) -> Result<()> {
    let (pipeline, wanted) = wanted.load()?;
    let store = Store::open(home)?;
    // A home that is not there yet is not made by asking.
    let ledger = home.exists().then(|| Ledger::of(&store));
    let outlooks = plan::outlook(&pipeline, &wanted, &store, ledger.as_ref())?;
    if json {
        let steps: Vec<_> = outlooks
            .iter()
            .map(|(step, outlook)| json!({"step": pipeline.steps[*step].id, "use": pipeline.steps[*step].entry.kind, "outlook": outlook}))
            .collect();
        return print(&to_json("plan", &steps));
    }
    let mut text = plan_lines(&pipeline, &outlooks);
    let n_of = |wanted: fn(&Outlook) -> bool| outlooks.iter().filter(|(_, outlook)| wanted(outlook)).count();
    let (reused, run) =
        (n_of(|outlook| matches!(outlook, Outlook::Reused | Outlook::Dropped)), n_of(|outlook| matches!(outlook, Outlook::Run { .. })));
    text.push_str(&format!("{reused} reused, {run} to run, {} depending on these\n", outlooks.len() - reused - run));
    print(&text)
}

/// A line a step; copies of a stage of which the same is to be said have one together.
fn plan_lines(pipeline: &Pipeline, outlooks: &[(usize, Outlook)]) -> String {
    let mut lines: Vec<(&str, String, Vec<&str>)> = Vec::new();
    for (place, outlook) in outlooks {
        let Step { id, plain_id, .. } = &pipeline.steps[*place];
        let words = outlook_words(pipeline, outlook);
        match lines.iter_mut().find(|(stage, known, _)| stage == plain_id && *known == words) {
            Some((_, _, ids)) => ids.push(id),
            None => lines.push((plain_id, words, vec![id])),
        }
    }
    let n_copies = |stage: &str| outlooks.iter().filter(|(place, _)| pipeline.steps[*place].plain_id == stage).count();
    let labelled = |(stage, words, ids): (&str, String, Vec<&str>)| {
        let are_all = ids.len() > 1 && ids.len() == n_copies(stage);
        let labels = if are_all { vec![format!("{stage} ({})", ids.len())] } else { labels(ids) };
        labels.into_iter().map(move |label| (label, words.clone()))
    };
    let lines: Vec<(String, String)> = lines.into_iter().flat_map(labelled).collect();
    let width = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    lines.iter().map(|(label, words)| format!("{label:width$}  {words}\n")).collect()
}

fn outlook_words(pipeline: &Pipeline, outlook: &Outlook) -> String {
    // Which copies is clear: those that the step reads from.
    let stages = |steps: &[String]| {
        let mut stages: Vec<&str> = steps.iter().map(|step| plain_id(step)).collect();
        stages.sort_by_key(|stage| pipeline.steps.iter().position(|step| step.plain_id == *stage));
        stages.join(", ")
    };
    match outlook {
        Outlook::Reused => "reused".to_owned(),
        Outlook::Dropped => "dropped  earlier; nothing that would run needs it".to_owned(),
        Outlook::Run { units_done: 0, reasons, .. } => format!("run      {}", reasons.join("; ")),
        Outlook::Run { units_done, units_total, reasons } => {
            format!("resume   {units_done} of {units_total} units are there; {}", reasons.join("; "))
        }
        Outlook::DependsOn { steps, reasons } if reasons.is_empty() => format!("depends  on what {} comes to", stages(steps)),
        Outlook::DependsOn { steps, reasons } => format!("run      after {}; {}", stages(steps), reasons.join("; ")),
    }
}

fn explain(home: &Path, chosen: &Chosen, what: &str, json: bool) -> Result<()> {
    let (stage, unit) = match what.split_once('/') {
        Some((stage, unit)) => {
            let unit = unit.parse().map_err(|_| Error::Usage {
                problem: format!("{what}: expected STAGE or STAGE/UNIT"),
                hint: "units are counted from 0, such as globals/3".into(),
            })?;
            (stage, Some(unit))
        }
        None => (what, None),
    };
    let pipeline = chosen.pipeline()?;
    let places = places(&pipeline, stage)?;
    explain::explain(&pipeline, &places, unit, &Store::open(home)?, json)
}

fn export(home: &Path, chosen: &Chosen, what: &str, folder: &Path) -> Result<()> {
    let (stage, port) = what.split_once('.').map_or((what, None), |(stage, port)| (stage, Some(port)));
    let pipeline = chosen.pipeline()?;
    match places(&pipeline, stage)?.as_slice() {
        [place] => export::export(&pipeline, *place, port, &Store::open(home)?, folder),
        copies => {
            let ids: Vec<&str> = copies.iter().map(|place| pipeline.steps[*place].id.as_str()).collect();
            let (problem, hint) = (format!("`{stage}` has {} copies", ids.len()), format!("name one of {}", ids.join(", ")));
            Err(Error::Usage { problem, hint })
        }
    }
}

/// Sets the units with failed items aside and runs; the items that did not fail are taken from there.
fn retry(home: &Path, wanted: &Wanted, options: &Options) -> Result<()> {
    let (pipeline, places) = wanted.load()?;
    let store = Store::open(home)?;
    let n_failed = plan::forget_failed(&pipeline, &places, &store)?;
    if n_failed == 0 {
        return print("no item of this pipeline failed\n");
    }
    run(home, wanted, options, None)
}

fn pipelines(name: Option<&str>, json: bool) -> Result<()> {
    if let Some(name) = name {
        let found = NAMED.iter().find(|(known, _)| *known == name);
        let nearest = || pipeline::nearest(name, NAMED.iter().map(|(known, _)| *known));
        let (_, text) = found.ok_or_else(|| Error::UnknownPipeline { name: name.into(), nearest: nearest() })?;
        return print(text);
    }
    let titles: Vec<Title> = NAMED.iter().map(|(_, text)| Title::of(text)).collect();
    if json {
        let list: Vec<_> = titles
            .iter()
            .map(|title| json!({"name": title.name, "description": title.description, "stages": title.stages.len()}))
            .collect();
        return print(&to_json("pipelines", &list));
    }
    let width = titles.iter().map(|title| title.name.len()).max().unwrap_or(0);
    let lines = titles.iter().map(|title| format!("{:width$}  {}\n", title.name, title.description.trim()));
    print(&lines.collect::<String>())
}

fn man(folder: &Path) -> Result<()> {
    let command = Cli::command();
    let mut pages = vec![(String::from("ovenbird.1"), command.clone())];
    for sub in command.get_subcommands() {
        let name = format!("ovenbird-{}", sub.get_name());
        pages.push((format!("{name}.1"), sub.clone().display_name(name)));
    }
    for (file, command) in pages {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).expect("BUG: writing to memory does not fail");
        publish::replace(&folder.join(file), &page)?;
    }
    Ok(())
}

/// The runs of a home, for messages.
pub(crate) fn known_runs(home: &Path) -> String {
    match event::runs(home).as_slice() {
        [] => "there is no run yet: `ovenbird run quickstart` makes one".into(),
        runs => format!("`ovenbird log` lists them; the latest is {}", runs[runs.len() - 1]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_that_make_things_take_the_same_devices_and_cores() {
        for command in ["run quickstart", "retry quickstart --failed", "verify --fix"] {
            let words = format!("ovenbird {command} --device cpu,cpu --jobs 3");
            let cli = Cli::try_parse_from(words.split(' ')).unwrap_or_else(|error| panic!("{error}"));
            let (Command::Run { machine, .. } | Command::Retry { machine, .. } | Command::Verify { machine, .. }) = cli.command else {
                panic!("{words}")
            };
            let Options { cpu, devices, .. } = machine.options();
            assert_eq!((cpu, devices), (3, vec![tch::Device::Cpu; 2]), "{command}");
        }
    }
}
