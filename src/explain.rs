//! `ovenbird explain`: why a stage, or a unit of it, would run or would not, with the chain of causes.

use std::collections::BTreeMap;

use ovenbird_cache::{FileRecord, Ledger, Status, Store, unit_name};
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::{print, to_json},
    error::{Error, Result, count},
    pipeline::{Pipeline, Source, Step},
    plan::{self, Seen, upstream},
};

/// Explains a step, or the copies of one, and those of the steps before them that are causes.
pub(crate) fn explain(pipeline: &Pipeline, places: &[usize], unit: Option<usize>, store: &Store, json: bool) -> Result<()> {
    let ledger = store.home().exists().then(|| Ledger::of(store));
    let seen = plan::look(pipeline, &plan::needed(pipeline, places), store, ledger.as_ref())?;
    if let Some(unit) = unit {
        let of_step = |place: &usize| UnitTold::of(&pipeline.steps[*place], &seen[place], unit, store, ledger.as_ref());
        let told = places.iter().map(of_step).collect::<Result<Vec<_>>>()?;
        return print(&if json { to_json("units", &told) } else { told.iter().map(UnitTold::words).collect() });
    }
    let mut causes = Vec::new();
    places.iter().for_each(|place| chain(pipeline, &seen, *place, 0, &mut causes));
    if json {
        let list: Vec<_> = causes.iter().map(|(depth, step, words)| json!({"depth": depth, "step": step, "words": words})).collect();
        return print(&to_json("explain", &list));
    }
    let line = |(depth, step, words): &(usize, String, Vec<String>)| {
        let indent = "  ".repeat(*depth);
        let because = if *depth == 0 { "" } else { "because " };
        let more: String = words[1..].iter().map(|words| format!("{indent}    {words}\n")).collect();
        format!("{indent}{because}{step}: {}\n{more}", words[0])
    };
    print(&causes.iter().map(line).collect::<String>())
}

/// A step and, below it, those that make it run.
fn chain(pipeline: &Pipeline, seen: &BTreeMap<usize, Seen>, place: usize, depth: usize, causes: &mut Vec<(usize, String, Vec<String>)>) {
    let step = &pipeline.steps[place];
    if causes.iter().any(|(_, id, _)| *id == step.id) {
        return;
    }
    match &seen[&place] {
        Seen::There(artifact) => {
            let made = &artifact.manifest.made;
            let is_there = if artifact.is_dropped { "was dropped, and nothing needs it" } else { "is there" };
            let words = vec![
                format!("{is_there}: nothing it is made from has changed ({})", artifact.manifest.fingerprint),
                format!("made by run {} on {} with {}, {}", made.run, made.host, made.program, made.device),
            ];
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Runs(work) => {
            let n_done = work.units.len() - work.missing.len();
            let mut words = vec![format!("would run, {n_done} of {} are there", count(work.units.len(), "unit"))];
            words.extend(work.reasons.iter().map(|reason| named_source(pipeline, step, reason)));
            causes.push((depth, step.id.clone(), words));
        }
        Seen::Waits { steps, reasons } => {
            let whether = if reasons.is_empty() { "would run if what it reads changes: it waits for" } else { "would run after" };
            let mut words = vec![format!("{whether} {}", steps.join(", "))];
            words.extend(reasons.iter().map(|reason| named_source(pipeline, step, reason)));
            causes.push((depth, step.id.clone(), words));
            for source in upstream(step).into_iter().filter(|source| !matches!(seen[source], Seen::There(_))) {
                chain(pipeline, seen, source, depth + 1, causes);
            }
        }
    }
}

/// A reason `in.PORT: was -> is` with where the port comes from.
fn named_source(pipeline: &Pipeline, step: &Step, reason: &str) -> String {
    let port = reason.strip_prefix("in.").and_then(|rest| rest.split_once(':')).map(|(port, _)| port);
    match port.and_then(|port| step.inputs.get(port)) {
        Some(Source::File(path)) => format!("{reason} (the file or folder {} has changed)", path.display()),
        Some(Source::Step { step, port }) => format!("{reason} (`{}.{port}` has come out different)", pipeline.steps[*step].id),
        None => reason.to_owned(),
    }
}

/// What is said of one unit of a step.
#[derive(Serialize)]
struct UnitTold {
    step: String,
    /// `KIND/FINGERPRINT`, where that is known.
    unit: Option<String>,
    /// `there`, `damaged`, `to be made`, `not known yet`.
    state: &'static str,
    /// What is damaged, or which steps have to run before it is known.
    words: Vec<String>,
    items: usize,
    files: Vec<FileTold>,
    /// When and how closely it was verified last.
    verified: Option<String>,
}

#[derive(Serialize)]
struct FileTold {
    name: String,
    bytes: u64,
    digest: String,
}

impl UnitTold {
    fn of(step: &Step, seen: &Seen, unit: usize, store: &Store, ledger: Option<&Ledger>) -> Result<Self> {
        let kind = step.entry.kind;
        let mut told =
            Self { step: step.id.clone(), unit: None, state: "to be made", words: Vec::new(), items: 0, files: Vec::new(), verified: None };
        let fingerprint = match seen {
            Seen::There(artifact) => artifact.manifest.units.get(unit).map(|unit| unit.key.fingerprint),
            Seen::Runs(work) => work.units.get(unit).map(|unit| unit.fingerprint),
            Seen::Waits { steps, .. } => return Ok(Self { state: "not known yet", words: steps.clone(), ..told }),
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
                let file = |file: &FileRecord| FileTold { name: file.name.clone(), bytes: file.bytes, digest: file.digest.to_string() };
                (told.state, told.items) = ("there", store.items_of(&record)?.len());
                told.files = record.files.iter().map(file).collect();
                let verified = ledger.and_then(|ledger| ledger.verified().get(&name).copied());
                let verified = verified.and_then(|was| Some((was.depth, jiff::Timestamp::from_second(was.at).ok()?)));
                told.verified = verified.map(|(depth, at)| format!("{at} ({})", format!("{depth:?}").to_lowercase()));
            }
        }
        Ok(Self { unit: Some(name), ..told })
    }

    fn words(&self) -> String {
        let Some(unit) = &self.unit else {
            return format!("{}: its units are not known before {} ran\n", self.step, self.words.join(", "));
        };
        let files = || self.files.iter().map(|file| format!("  {}  {} bytes  {}\n", file.name, file.bytes, file.digest));
        let verified = self.verified.as_ref().map_or_else(|| "never verified".into(), |when| format!("last verified {when}"));
        match self.state {
            "there" => format!("{}: {unit}: is there, {} items, {verified}\n{}", self.step, self.items, files().collect::<String>()),
            "damaged" => format!("{}: {unit}: is damaged and is made again\n  {}\n", self.step, self.words.join("\n  ")),
            _ => format!("{}: {unit}: has to be made\n", self.step),
        }
    }
}
