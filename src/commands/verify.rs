//! `ovenbird verify`: checks stored results, and repairs them with `--fix`.

mod recompute;
mod records;
mod repair;
mod report;
mod scan;

use std::{path::Path, time::Duration};

use ovenbird_cache::{
    Store,
    verify::{Class, Depth},
};

use crate::{
    error::{Error, Result},
    output::{print, to_json},
    quantities::{kth_of, percent, rate, time},
    run_args::RunArgs,
};
use report::{Report, VerifyOptions};

/// Check stored results; repair them with --fix
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also check the digest of every file
    #[arg(long)]
    full: bool,
    /// Also check that the content makes sense, and that input files have not changed
    #[arg(long, conflicts_with = "full")]
    deep: bool,
    /// Recompute this share of the rows of features and compare: `0.1%`
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    recompute: Option<f64>,
    /// Set damaged results aside and recompute them; nothing is deleted
    #[arg(long)]
    fix: bool,
    /// Check only the k-th of n parts: `3/7`
    #[arg(long, value_name = "K/N", value_parser = kth_of)]
    subset: Option<(u64, u64)>,
    /// Stop after this time: `30m`; the same command continues
    #[arg(long, value_name = "TIME", value_parser = time)]
    max_duration: Option<Duration>,
    #[command(flatten)]
    pub(crate) machine: RunArgs,
    /// Limit the reading speed: `200MB/s`
    #[arg(long, value_name = "RATE", value_parser = rate)]
    rate: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(&self) -> VerifyOptions {
        let Self { full, deep, recompute, fix, subset, max_duration, machine, rate, json } = self;
        let depth = match (deep, full) {
            (true, _) => Depth::Deep,
            (false, true) => Depth::Full,
            (false, false) => Depth::Quick,
        };
        let (max_duration, rate, run) = (*max_duration, *rate, machine.options());
        VerifyOptions { depth, recompute: *recompute, fix: *fix, subset: *subset, max_duration, rate, json: *json, run }
    }
}

pub(crate) fn verify(home: &Path, args: &Args) -> Result<()> {
    let options = &args.options();
    let home = std::path::absolute(home).unwrap_or_else(|_| home.to_owned());
    if !home.exists() {
        return Err(Error::NoHome { home });
    }
    let store = Store::open_to_repair(&home)?;
    // Where something else is in the place of a file or folder, nothing below it can be checked.
    let misplaced = store.misplaced()?;
    let mut repaired = Vec::new();
    if options.fix {
        for finding in &misplaced {
            let place = store.home().join("quarantine").join("misplaced");
            if let Some(aside) = store.publisher().set_aside(&finding.path, &place)? {
                repaired.push(format!("{}: {}: set aside at {}", finding.path.display(), finding.problem, aside.display()));
            }
        }
    } else if !misplaced.is_empty() {
        let report = Report { findings: misplaced, ..Report::default() };
        print(&if options.json { to_json("verify", &report) } else { report.words(options) })?;
        return Err(Error::Damage { n_left: report.findings.len(), is_fixed: false });
    }
    let mut report = scan::scan(&store, options)?;
    report.repaired = repaired;
    if let Some(part) = options.recompute {
        let audit = recompute::audit(&store, part, options.run.devices[0])?;
        report.findings.extend(audit.findings());
        report.recomputed = Some(audit);
    }
    let sharing = scan::sharing(&store, &report.findings)?;
    report.findings.extend(sharing);
    let tainted = scan::tainted(&store, &report.findings)?;
    report.findings.extend(tainted);
    let n_bad = report.findings.iter().filter(|finding| finding.class != Class::Suspect).count();
    if options.fix && n_bad > 0 {
        repair::repair(&store, options, &mut report)?;
    }
    let text = if options.json { to_json("verify", &report) } else { report.words(options) };
    print(&text)?;
    let n_left = if options.fix { report.lost.len() } else { n_bad };
    if n_left == 0 { Ok(()) } else { Err(Error::Damage { n_left, is_fixed: options.fix }) }
}
