//! `ovenbird diff`: how two runs differ: commands, steps, recipes, metrics.

use std::{collections::BTreeMap, path::Path};

use ovenbird_cache::{Change, Manifest, Store};
use ovenbird_data::evaluate::{GROUPS, Metric};
use serde::Serialize;

use crate::{
    error::Result,
    event,
    output::{print, to_json},
    pipeline::step_id::{StepId, labels},
    reason::{self, Sources},
    results::{Evaluated, evaluations},
    run_state::{RunState, StepState, find_run, state_in},
};

/// Compare two runs: commands, steps, parameters, inputs, metrics
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The id of the first run
    first: String,
    /// The id of the second run
    second: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn diff(home: &Path, Args { first, second, json }: &Args) -> Result<()> {
    let runs = [find_run(home, Some(first))?, find_run(home, Some(second))?];
    let store = Store::open(home)?;
    let [first, second] = [state_in(&store, &runs[0])?, state_in(&store, &runs[1])?];
    let difference = Difference::between(&store, &first, &second)?;
    if *json {
        return Ok(print(&to_json("diff", &difference))?);
    }
    Ok(print(&difference.text(&sources(home, &runs)?))?)
}

/// The sources of the inputs of each step, in either run.
fn sources(home: &Path, runs: &[String]) -> Result<BTreeMap<StepId, Sources>> {
    let mut sources = BTreeMap::new();
    for run in runs {
        sources.extend(event::read_start(home, run)?.into_iter().flat_map(|start| start.sources()));
    }
    Ok(sources)
}

/// How two runs differ.
#[derive(Serialize)]
struct Difference {
    runs: [Compared; 2],
    only_in_first: Vec<StepId>,
    only_in_second: Vec<StepId>,
    /// The steps of both whose recipes differ.
    steps: Vec<ChangedStep>,
    /// The steps of both that cannot be compared.
    not_compared: Vec<NotCompared>,
    metrics: Vec<ChangedMetric>,
}

/// A run that is compared.
#[derive(Serialize)]
struct Compared {
    run: String,
    command: String,
    outcome: String,
}

/// A step whose recipes differ.
#[derive(Serialize)]
struct ChangedStep {
    step: StepId,
    changes: Vec<Change>,
}

/// A step whose recipe is not known in one of the runs.
#[derive(Serialize)]
struct NotCompared {
    step: StepId,
    because: String,
}

/// A metric with different values. Values are in [0, 1].
#[derive(Serialize)]
struct ChangedMetric {
    step: StepId,
    output: &'static str,
    group: &'static str,
    metric: &'static str,
    /// `None` where the run has no such value.
    first: Option<f64>,
    second: Option<f64>,
}

impl Difference {
    fn between(store: &Store, first: &RunState, second: &RunState) -> Result<Self> {
        let lacking = |some: &RunState, others: &RunState| -> Vec<StepId> {
            let is_lacking = |step: &&StepState| others.steps.iter().all(|other| other.id != step.id);
            some.steps.iter().filter(is_lacking).map(|step| step.id.clone()).collect()
        };
        let compared =
            |run: &RunState| Compared { run: run.run.clone(), command: run.command.replace('\n', " "), outcome: run.outcome_words() };
        let (mut steps, mut not_compared, mut metrics) = (Vec::new(), Vec::new(), Vec::new());
        for step in &second.steps {
            let Some(was) = first.steps.iter().find(|was| was.id == step.id) else { continue };
            if was.fingerprint != step.fingerprint || was.kind != step.kind {
                match (known(store, first, was)?, known(store, second, step)?) {
                    (Ok(was), Ok(is)) => steps.push(ChangedStep { step: step.id.clone(), changes: is.recipe.diff(&was.recipe) }),
                    (Err(because), _) | (_, Err(because)) => not_compared.push(NotCompared { step: step.id.clone(), because }),
                }
            }
            metrics.extend(changed_metrics(store, was, step)?);
        }
        Ok(Self {
            runs: [compared(first), compared(second)],
            only_in_first: lacking(first, second),
            only_in_second: lacking(second, first),
            steps,
            not_compared,
            metrics,
        })
    }

    fn text(&self, sources: &BTreeMap<StepId, Sources>) -> String {
        let [first, second] = &self.runs;
        let mut text = format!("{}  {}  {}\n", first.run, first.command, first.outcome);
        text.push_str(&format!("{}  {}  {}\n", second.run, second.command, second.outcome));
        for (run, steps) in [(first, &self.only_in_first), (second, &self.only_in_second)] {
            if !steps.is_empty() {
                text.push_str(&format!("only in {}: {}\n", run.run, labels(steps).join(", ")));
            }
        }
        for ChangedStep { step, changes } in &self.steps {
            let sources = sources.get(step).cloned().unwrap_or_default();
            text.push_str(&format!("{step}\n"));
            text.extend(changes.iter().map(|change| format!("  {}\n", reason::in_words(&change.to_string(), &sources))));
        }
        for NotCompared { step, because } in &self.not_compared {
            text.push_str(&format!("{step}\n  not compared: {because}\n"));
        }
        if !self.metrics.is_empty() {
            let row = |metric: &ChangedMetric| {
                let (was, is) = shortest(metric.first, metric.second);
                [format!("{} {} {}", metric.step, metric.group, metric.metric), was, is]
            };
            let mut rows = vec![["metric".to_owned(), first.run.clone(), second.run.clone()]];
            rows.extend(self.metrics.iter().map(row));
            let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            let widths = [0, 1, 2].map(width);
            let line = |[name, was, is]: &[String; 3]| format!("{name:0$}  {was:>1$}  {is:>2$}\n", widths[0], widths[1], widths[2]);
            text.extend(rows.iter().map(line));
        }
        if self.is_empty() {
            text.push_str("no step, parameter, input or metric differs\n");
        }
        text
    }

    fn is_empty(&self) -> bool {
        self.only_in_first.is_empty()
            && self.only_in_second.is_empty()
            && self.steps.is_empty()
            && self.not_compared.is_empty()
            && self.metrics.is_empty()
    }
}

/// The manifest of a step, or why it is not known.
fn known(store: &Store, run: &RunState, step: &StepState) -> Result<Result<Manifest, String>> {
    let Some(fingerprint) = &step.fingerprint else { return Ok(Err(format!("run {} did not reach it", run.run))) };
    let manifest = store.manifest(&step.kind, fingerprint)?;
    Ok(manifest.ok_or_else(|| format!("its result of run {} is not in the home", run.run)))
}

/// The metrics of a step that differ between two runs.
fn changed_metrics(store: &Store, was: &StepState, is: &StepState) -> Result<Vec<ChangedMetric>> {
    if was.fingerprint == is.fingerprint {
        return Ok(Vec::new());
    }
    let (before, after) = (evaluations(store, was)?, evaluations(store, is)?);
    let mut ports: Vec<&'static str> = before.iter().chain(&after).map(|found| found.port).collect();
    ports.sort_unstable();
    ports.dedup();
    let summaries = before.iter().chain(&after).flat_map(|found| found.evaluation.groups.values());
    let mut changed = Vec::new();
    for output in ports {
        for group in GROUPS {
            for (header, metric) in Metric::columns(summaries.clone()) {
                let value = |found: &[Evaluated]| {
                    found.iter().find(|found| found.port == output).and_then(|found| found.evaluation.groups.get(group)?.get(metric))
                };
                let (first, second) = (value(&before), value(&after));
                if first != second {
                    changed.push(ChangedMetric { step: is.id.clone(), output, group, metric: header, first, second });
                }
            }
        }
    }
    Ok(changed)
}

/// Two numbers x 100 with as few decimals, one at least, as show a difference.
fn shortest(was: Option<f64>, is: Option<f64>) -> (String, String) {
    let shown = |value: Option<f64>, decimals: usize| value.map_or_else(|| "–".into(), |value| format!("{:.decimals$}", 100.0 * value));
    let both = (1..=15).map(|decimals| (shown(was, decimals), shown(is, decimals)));
    both.clone().find(|(was, is)| was != is).unwrap_or_else(|| (shown(was, 15), shown(is, 15)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_as_many_decimals_as_show_the_difference() {
        let check = |was: Option<f64>, is: Option<f64>, expected: (&str, &str)| {
            assert_eq!(shortest(was, is), (expected.0.into(), expected.1.into()));
        };
        check(Some(0.5741), Some(0.551), ("57.4", "55.1"));
        check(Some(0.57411), Some(0.57442), ("57.41", "57.44"));
        check(None, Some(0.5), ("–", "50.0"));
    }
}
