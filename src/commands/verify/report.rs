//! What to verify, and what was found.

use std::time::Duration;

use indicatif::HumanBytes;
use ovenbird_cache::verify::{Class, Depth, Finding};
use serde::Serialize;
use serde_json::json;

use super::recompute::Audit;
use crate::{
    output::{count, duration},
    run::local::Options,
};

/// What to verify and how.
pub(super) struct VerifyOptions {
    pub(super) depth: Depth,
    /// The share of the rows to recompute, from 0 to 1.
    pub(super) recompute: Option<f64>,
    pub(super) fix: bool,
    /// The k-th of n parts, from 1.
    pub(super) subset: Option<(u64, u64)>,
    pub(super) max_duration: Option<Duration>,
    /// Bytes a second.
    pub(super) rate: Option<u64>,
    pub(super) json: bool,
    pub(super) run: Options,
}

/// The result of `verify`.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    pub(super) units: usize,
    /// How many units an earlier scan had checked.
    pub(super) continued_after: usize,
    pub(super) bytes_read: u64,
    pub(super) wall_s: f64,
    /// Whether time ran out.
    pub(super) is_cut_short: bool,
    /// How many units had never been verified at this depth.
    pub(super) never_verified: usize,
    pub(super) findings: Vec<Finding>,
    pub(super) recomputed: Option<Audit>,
    pub(super) repaired: Vec<String>,
    /// What could not be repaired.
    pub(super) lost: Vec<Lost>,
}

/// Something that could not be repaired, and why.
#[derive(Debug, Serialize)]
pub(super) struct Lost {
    pub(super) what: String,
    pub(super) why: String,
}

/// The advice for a finding of a check of this depth: a lesser one would not find it again.
fn how_to_repair(class: Class, depth: Depth) -> String {
    let command = match depth {
        Depth::Quick => "`ovenbird verify --fix`",
        Depth::Full => "`ovenbird verify --full --fix`",
        Depth::Deep => "`ovenbird verify --deep --fix`",
    };
    match class {
        Class::Damaged | Class::Missing | Class::Manifest => format!("{command} moves it to `quarantine/` and recomputes it"),
        Class::Wrong => format!("{command} recomputes it and everything computed from it"),
        Class::Tainted => format!("{command} recomputes it if its inputs change"),
        Class::Record => {
            format!("{command} restores it from other records or names what is lost; `cache gc` deletes nothing until then")
        }
        Class::Choice => format!("{command} restores it from the units"),
        Class::Foreign => format!("{command} moves it to `quarantine/`"),
        Class::Leftover => format!("the next run, or {command}, removes it"),
        Class::Part => format!("{command} moves it to `quarantine/`; its work is done again"),
        Class::Ledger => "nothing to do: it is rebuilt".into(),
        Class::Input => "restore the file from where it came from".into(),
        Class::Suspect => "the bytes are intact; check the images and boxes that they were computed from".into(),
    }
}

impl Report {
    /// The report as text.
    pub(super) fn words(&self, options: &VerifyOptions) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let class = json!(finding.class);
            let class = class.as_str().unwrap_or_default().to_owned();
            text.push_str(&format!("{class:9} {}: {}\n", finding.path.display(), finding.problem));
            if !options.fix {
                text.push_str(&format!("          {}\n", how_to_repair(finding.class, options.depth)));
            }
        }
        text.extend(self.repaired.iter().map(|repaired| format!("repaired  {repaired}\n")));
        text.extend(self.lost.iter().map(|lost| format!("lost      {}: {}\n", lost.what, lost.why)));
        if let Some(audit) = &self.recomputed {
            text.push_str(&audit.to_string());
        }
        if self.continued_after > 0 {
            text.push_str(&format!("continued after {} that an earlier scan had checked\n", count(self.continued_after, "unit")));
        }
        let depth = json!(options.depth);
        let rate = HumanBytes((self.bytes_read as f64 / self.wall_s.max(1e-9)) as u64);
        text.push_str(&format!(
            "{} verified ({}), {} read in {} ({rate}/s), {}\n",
            count(self.units, "unit"),
            depth.as_str().unwrap_or_default(),
            HumanBytes(self.bytes_read),
            duration(self.wall_s),
            count(self.findings.len(), "finding"),
        ));
        if self.never_verified > 0 && !self.is_cut_short {
            text.push_str(&format!("{} had never been verified at this depth\n", count(self.never_verified, "unit")));
        }
        if self.is_cut_short {
            text.push_str("stopped at the time limit: type the same command again to continue\n");
        }
        text
    }
}
