//! `ovenbird explain`: why a stage, or a unit of it, would run or would not.

use std::{collections::BTreeMap, fmt, path::Path};

use ovenbird_cache::{FileRecord, Ledger, Status, Store, unit_name};
use serde::Serialize;
use serde_json::json;

use crate::{
    chosen::{Chosen, places},
    error::{Error, Result},
    output::{count, print, to_json},
    pipeline::{Pipeline, Step, step_id::StepId},
    plan::{self, Seen, previous_run::PreviousRun},
    reason::{self, Sources},
};

/// Explain why a step, or one unit of it, would run or would not
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    chosen: Chosen,
    /// A step's id, or a unit of it: `globals`, `globals/3`
    #[arg(value_name = "STEP[/UNIT]")]
    what: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Explains all instances of a stage, each with the steps before it that make it run.
pub(crate) fn explain(home: &Path, Args { chosen, what, json }: &Args) -> Result<()> {
    let (stage, unit) = match what.split_once('/') {
        Some((stage, unit)) => {
            let unit = unit.parse().map_err(|_| Error::Usage {
                problem: format!("{what}: expected STEP or STEP/UNIT"),
                hint: "units are counted from 0, such as globals/3".into(),
            })?;
            (stage, Some(unit))
        }
        None => (what.as_str(), None),
    };
    let pipeline = chosen.load()?;
    let places = places(&pipeline, stage)?;
    let store = &Store::open(home)?;
    let ledger = store.home().exists().then(|| Ledger::of(store));
    let seen = plan::look(&pipeline, &pipeline.needed(&places), store, ledger.as_ref())?;
    if let Some(unit) = unit {
        let of_step = |place: &usize| ExplainedUnit::of(&pipeline.steps[*place], &seen[place], unit, store, ledger.as_ref());
        let told = places.iter().map(of_step).collect::<Result<Vec<_>>>()?;
        return Ok(print(&if *json { to_json("units", &told) } else { told.iter().map(ToString::to_string).collect() })?);
    }
    let (previous, mut causes) = (PreviousRun::of(store, &pipeline)?, Vec::new());
    places.iter().for_each(|place| chain(&pipeline, &seen, &previous, *place, 0, &mut causes));
    if *json {
        let list: Vec<_> = causes.iter().map(|(depth, step, words)| json!({"depth": depth, "step": step, "words": words})).collect();
        return Ok(print(&to_json("explain", &list))?);
    }
    let line = |(depth, step, words): &(usize, StepId, Vec<String>)| {
        let indent = "  ".repeat(*depth);
        let because = if *depth == 0 { "" } else { "because " };
        let of_step = pipeline.steps.iter().find(|known| known.id == *step);
        let sources = of_step.map_or_else(Sources::new, |step| reason::sources(&pipeline, step));
        let more: String = words[1..].iter().map(|words| format!("{indent}    {}\n", reason::in_words(words, &sources))).collect();
        format!("{indent}{because}{step}: {}\n{more}", words[0])
    };
    Ok(print(&causes.iter().map(line).collect::<String>())?)
}

/// Collects a step and, one level deeper, the steps that make it run.
fn chain(
    pipeline: &Pipeline,
    seen: &BTreeMap<usize, Seen>,
    previous: &PreviousRun,
    place: usize,
    depth: usize,
    causes: &mut Vec<(usize, StepId, Vec<String>)>,
) {
    let step = &pipeline.steps[place];
    if causes.iter().any(|(_, id, _)| *id == step.id) {
        return;
    }
    match &seen[&place] {
        Seen::Stored(artifact) => {
            let made = &artifact.manifest.made;
            let is_there = if artifact.is_dropped { "was dropped, and no step needs it" } else { "is stored" };
            let words = vec![
                format!("{is_there}: recipe and inputs have not changed ({})", artifact.manifest.fingerprint),
                format!("made by run {} on {} with {}, {}", made.run, made.host, made.program, made.device),
            ];
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Runs(work) => {
            let n_done = work.units.len() - work.missing.len();
            let mut words = vec![format!("would run, {n_done} of {} done", count(work.units.len(), "unit"))];
            words.extend(work.reasons.iter().cloned());
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Waits { steps, reasons } => {
            let is_certain = !reasons.is_empty() || !previous.steps.contains_key(&step.id);
            let of = steps.iter().map(|step| format!("`{step}`")).collect::<Vec<_>>();
            let mut words = vec![match is_certain {
                true => format!("would run after {}", of.join(", ")),
                false => format!("will run again if {} gives a different result", of.join(" or ")),
            }];
            words.extend(reasons.iter().cloned());
            causes.push((depth, step.id.clone(), words));
            for source in step.upstream().into_iter().filter(|source| !matches!(seen[source], Seen::Stored(_))) {
                chain(pipeline, seen, previous, source, depth + 1, causes);
            }
        }
    }
}

/// A unit of a step.
#[derive(Serialize)]
struct ExplainedUnit {
    step: StepId,
    /// `KIND/FINGERPRINT`, where that is known.
    unit: Option<String>,
    /// `there`, `damaged`, `to be made`, `not known yet`.
    state: &'static str,
    /// The damage, or the steps that have to run before the unit is known.
    words: Vec<String>,
    items: usize,
    files: Vec<ExplainedFile>,
    /// When and how closely it was verified last.
    verified: Option<String>,
}

#[derive(Serialize)]
struct ExplainedFile {
    name: String,
    bytes: u64,
    digest: String,
}

impl ExplainedUnit {
    fn of(step: &Step, seen: &Seen, unit: usize, store: &Store, ledger: Option<&Ledger>) -> Result<Self> {
        let kind = step.entry.kind;
        let mut told =
            Self { step: step.id.clone(), unit: None, state: "to be made", words: Vec::new(), items: 0, files: Vec::new(), verified: None };
        let fingerprint = match seen {
            Seen::Stored(artifact) => artifact.manifest.units.get(unit).map(|unit| unit.key.fingerprint),
            Seen::Runs(work) => work.units.get(unit).map(|unit| unit.fingerprint),
            Seen::Waits { steps, .. } => {
                return Ok(Self { state: "not known yet", words: steps.iter().map(ToString::to_string).collect(), ..told });
            }
        };
        let fingerprint = fingerprint.ok_or_else(|| Error::Usage {
            problem: format!("{}: there is no unit {unit}", step.id),
            hint: "units are counted from 0".into(),
        })?;
        let name = unit_name(kind, &fingerprint);
        match store.unit(kind, &fingerprint)? {
            Status::Absent => {}
            Status::Damaged(findings) => (told.state, told.words) = ("damaged", findings),
            Status::Valid(record) => {
                let file =
                    |file: &FileRecord| ExplainedFile { name: file.name.clone(), bytes: file.bytes, digest: file.digest.to_string() };
                (told.state, told.items) = ("there", store.items_of(&record)?.len());
                told.files = record.files.iter().map(file).collect();
                let verified = ledger.and_then(|ledger| ledger.verified().get(&name).copied());
                let verified = verified.and_then(|was| Some((was.depth, jiff::Timestamp::from_second(was.at).ok()?)));
                told.verified = verified.map(|(depth, at)| format!("{at} ({})", format!("{depth:?}").to_lowercase()));
            }
        }
        Ok(Self { unit: Some(name), ..told })
    }
}

impl fmt::Display for ExplainedUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(unit) = &self.unit else {
            return writeln!(f, "{}: its units are known only after {} ran", self.step, self.words.join(", "));
        };
        let files = || self.files.iter().map(|file| format!("  {}  {} bytes  {}\n", file.name, file.bytes, file.digest));
        let verified = self.verified.as_ref().map_or_else(|| "never verified".into(), |when| format!("last verified {when}"));
        match self.state {
            "there" => write!(f, "{}: {unit}: is stored, {} items, {verified}\n{}", self.step, self.items, files().collect::<String>()),
            "damaged" => writeln!(f, "{}: {unit}: is damaged and will be recomputed\n  {}", self.step, self.words.join("\n  ")),
            _ => writeln!(f, "{}: {unit}: has to be computed", self.step),
        }
    }
}
