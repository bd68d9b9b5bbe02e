//! The evaluations of a run: a table for each, or variants side by side, over seeds, and compared with the first variant.
//!
//! Missing results are named.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use ovenbird_cache::{Artifact, Status, Store};
use ovenbird_data::evaluate::{Evaluation, GROUPS, IouType, Metric, Protocol};
use ovenbird_stages::{
    Artifact as _, PortInfo, StageEntry,
    artifacts::{Curve, EvaluationFile},
    find,
};
use serde::Serialize;

use crate::{
    error::Result,
    event,
    pipeline::{
        matrix::{Combination, Matrix},
        step_id::StepId,
    },
    run_state::{RunState, StepState, state},
};

/// An evaluation among the artifacts of a run.
pub(crate) struct Evaluated {
    pub(crate) step: StepId,
    pub(crate) kind: String,
    /// The step's output with the evaluation.
    pub(crate) port: &'static str,
    pub(crate) evaluation: Evaluation,
}

/// The evaluations in the artifact of a step.
pub(crate) fn evaluations(store: &Store, step: &StepState) -> Result<Vec<Evaluated>> {
    let ports: Vec<&'static str> = evaluation_ports(&step.kind).collect();
    let Some(fingerprint) = step.fingerprint.filter(|_| !ports.is_empty()) else { return Ok(Vec::new()) };
    let Status::Valid(artifact) = store.artifact(&step.kind, &fingerprint)? else { return Ok(Vec::new()) };
    if artifact.is_dropped {
        return Ok(Vec::new());
    }
    let open = |port: &'static str| {
        let EvaluationFile(evaluation) = EvaluationFile::open(&artifact.port(port))?;
        Ok(Evaluated { step: step.id.clone(), kind: step.kind.clone(), port, evaluation })
    };
    ports.into_iter().map(open).collect()
}

/// The metric of an evaluation that papers compare: AP50 for COCO, AP for LVIS; of novel classes where there are some.
#[derive(Debug, Serialize)]
pub(crate) struct Headline {
    pub(crate) step: StepId,
    pub(crate) output: &'static str,
    pub(crate) group: Option<&'static str>,
    pub(crate) metric: Option<&'static str>,
    /// In [0, 1]; `None` where there is no result, or it cannot be read.
    pub(crate) value: Option<f64>,
}

impl fmt::Display for Headline {
    /// `coco novel AP50 57.4`, `coco –`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.step)?;
        match (self.group, self.metric, self.value) {
            (Some(group), Some(metric), Some(value)) => write!(f, " {group} {metric} {:.1}", 100.0 * value),
            _ => f.write_str(" –"),
        }
    }
}

/// The headline of every evaluation of some steps.
pub(crate) fn headlines(store: &Store, steps: &[StepState]) -> Vec<Headline> {
    let mut headlines = Vec::new();
    for step in steps {
        let found = evaluations(store, step).unwrap_or_default();
        for port in evaluation_ports(&step.kind) {
            let evaluation = found.iter().find(|found| found.port == port).map(|found| &found.evaluation);
            let metric = evaluation.map(|evaluation| evaluation.protocol.headline());
            let of = |group: &&'static str| Some((*group, evaluation?.groups.get(*group)?.get(metric?)?));
            let number = ["novel", "all"].iter().find_map(of);
            let (group, value) = number.unzip();
            headlines.push(Headline { step: step.id.clone(), output: port, group, metric: metric.and_then(|metric| metric.header), value });
        }
    }
    headlines
}

/// The outputs of a stage that are evaluations.
fn evaluation_ports(kind: &str) -> impl Iterator<Item = &'static str> + use<> {
    let outputs = find(kind).into_iter().flat_map(|entry| entry.outputs);
    outputs.filter(|port| port.kind == EvaluationFile::KIND).map(|port| port.name)
}

/// Fails where a reused artifact has an output that is printed or reported and whose bytes are damaged.
pub(crate) fn check_shown(entry: &StageEntry, artifact: &Artifact) -> Result<()> {
    let is_shown = |port: &&PortInfo| [EvaluationFile::KIND, Curve::KIND].contains(&port.kind) && !artifact.is_dropped;
    for port in entry.outputs.iter().filter(is_shown) {
        artifact.port(port.name).iter().try_for_each(|file| file.check().map(drop))?;
    }
    Ok(())
}

/// The evaluations of a run as text: a table for each, or, with variants or seeds, one table for all instances of an evaluation.
pub(crate) fn tables(store: &Store, run: &str) -> Result<String> {
    let RunState { steps, matrix, .. } = state(&event::read_log(store.home(), run)?);
    let mut evaluated = Vec::new();
    for step in &steps {
        evaluated.extend(evaluations(store, step)?);
    }
    if let Some(matrix) = matrix {
        return Ok(compare(&matrix, &steps, &evaluated).iter().map(Comparison::text).collect());
    }
    let table = |Evaluated { step, kind, evaluation, .. }: &Evaluated| {
        let of = match evaluation.iou_type {
            IouType::Boxes => "",
            IouType::Masks => ", masks",
        };
        format!("\n{step} ({kind}{of})\n{}\n", evaluation.table())
    };
    Ok(evaluated.iter().map(table).collect())
}

/// One evaluation in all combinations of a run. Numbers are in [0, 1].
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    /// The stage's id in the file, with the output where it has several: `coco`, `select.best`.
    pub(crate) evaluation: String,
    #[serde(rename = "use")]
    pub(crate) kind: String,
    /// `COCO, boxes`.
    pub(crate) of: String,
    /// The metric that papers compare: AP50 for COCO, AP for LVIS.
    pub(crate) headline: &'static str,
    /// The variant that the others are compared with; `None` where there is one row for all variants, or no variant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first: Option<String>,
    pub(crate) seeds: Vec<u64>,
    /// In the file's order.
    pub(crate) rows: Vec<Row>,
    /// Which results are missing, in words.
    pub(crate) missing: Vec<String>,
    /// The evaluations' warnings, with the instances that have them where not all have.
    pub(crate) warnings: Vec<String>,
}

/// A variant, over seeds.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// `None` where one row stands for all variants.
    pub(crate) variant: Option<String>,
    /// What the variant changes, as `--set` takes it.
    pub(crate) settings: Vec<String>,
    pub(crate) values: Vec<Value>,
}

/// A metric of a group of classes.
#[derive(Debug, Serialize)]
pub(crate) struct Value {
    pub(crate) group: &'static str,
    pub(crate) metric: &'static str,
    pub(crate) over_seeds: Spread,
    /// The difference to the first variant, seed by seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) difference: Option<Spread>,
    pub(crate) by_seed: Vec<BySeed>,
}

/// A metric with one seed.
#[derive(Debug, Serialize)]
pub(crate) struct BySeed {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    pub(crate) value: f64,
}

/// Mean and standard deviation of some numbers.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) mean: f64,
    /// Standard deviation of the sample (n - 1); `None` for one number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sd: Option<f64>,
}

impl Spread {
    fn of(numbers: &[f64]) -> Option<Self> {
        let n = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / n;
        let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
        (!numbers.is_empty()).then(|| Self { mean, sd: (numbers.len() > 1).then(|| (squares / (n - 1.0)).sqrt()) })
    }

    /// Times 100 and with its sign: `+2.3 ± 0.4`.
    pub(crate) fn signed(&self) -> String {
        // Never -0.0.
        let mean = if (100.0 * self.mean).abs() < 0.05 { 0.0 } else { 100.0 * self.mean };
        format!("{mean:+.1}{}", self.plus_minus())
    }

    fn plus_minus(&self) -> String {
        self.sd.map_or_else(String::new, |sd| format!(" ± {:.1}", 100.0 * sd))
    }
}

impl fmt::Display for Spread {
    /// Times 100: `50.8 ± 1.2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1}{}", 100.0 * self.mean, self.plus_minus())
    }
}

/// The comparison for every evaluation stage among some steps, in their order.
pub(crate) fn compare(matrix: &Matrix, steps: &[StepState], evaluated: &[Evaluated]) -> Vec<Comparison> {
    let mut comparisons: Vec<Comparison> = Vec::new();
    for step in steps {
        let ports: Vec<&str> = evaluation_ports(&step.kind).collect();
        for port in &ports {
            let stage = &step.id.stage;
            let evaluation = if ports.len() > 1 { format!("{stage}.{port}") } else { stage.clone() };
            if comparisons.iter().all(|known| known.evaluation != evaluation) {
                let of_port = |id: &StepId| evaluated.iter().find(|found| found.step == *id && found.port == *port);
                let of_combination = |combination: &Combination| of_port(combination.steps.get(stage)?).map(|found| &found.evaluation);
                comparisons.push(one(matrix, stage, evaluation, &step.kind, of_combination));
            }
        }
    }
    comparisons
}

fn one<'a>(
    matrix: &Matrix,
    stage: &str,
    evaluation: String,
    kind: &str,
    of_combination: impl Fn(&Combination) -> Option<&'a Evaluation>,
) -> Comparison {
    let chosen: Vec<&String> = matrix.variants.iter().filter(|name| combinations_of(matrix, Some(name)).next().is_some()).collect();
    // If the evaluation is the same for all variants, there is one row.
    let of_seed = |seed: Option<u64>| {
        matrix.combinations.iter().filter(move |combination| combination.seed == seed).map(|combination| combination.steps.get(stage))
    };
    let is_common = chosen.len() > 1
        && matrix.combinations.iter().all(|combination| of_seed(combination.seed).all(|step| step == combination.steps.get(stage)));
    let variants: Vec<Option<&String>> =
        if is_common || chosen.is_empty() { vec![None] } else { chosen.iter().copied().map(Some).collect() };
    let first = matrix.variants.first().filter(|first| !is_common && chosen.contains(first));
    let found = |variant: Option<&String>| -> Vec<(Option<u64>, &Evaluation)> {
        let variant = variant.or_else(|| chosen.first().copied());
        combinations_of(matrix, variant).filter_map(|combination| Some((combination.seed, of_combination(combination)?))).collect()
    };
    let beside = first.map_or_else(Vec::new, |first| found(Some(first)));
    let row = |variant: &Option<&String>| {
        let is_first = variant.is_none() || *variant == first;
        let values = values(&found(*variant), if is_first { &[] } else { &beside });
        let settings = variant.and_then(|variant| matrix.settings.get(variant)).cloned().unwrap_or_default();
        Row { variant: variant.cloned(), settings, values }
    };
    let any = variants.iter().flat_map(|variant| found(*variant)).next().map(|(_, evaluation)| evaluation);
    Comparison {
        evaluation,
        kind: kind.into(),
        of: any.map_or_else(String::new, Evaluation::title),
        headline: any.map_or(Protocol::Coco, |evaluation| evaluation.protocol).headline().header.expect("BUG: headlines have a column"),
        first: first.cloned(),
        seeds: matrix
            .seeds
            .iter()
            .copied()
            .filter(|seed| matrix.combinations.iter().any(|combination| combination.seed == Some(*seed)))
            .collect(),
        rows: variants.iter().map(row).collect(),
        missing: missing(matrix, &variants, |combination| of_combination(combination).is_some()),
        warnings: warnings(matrix, stage, of_combination),
    }
}

/// The warnings of all instances of an evaluation, each once.
fn warnings<'a>(matrix: &Matrix, stage: &str, of_combination: impl Fn(&Combination) -> Option<&'a Evaluation>) -> Vec<String> {
    let instance = |combination: &Combination| Some((combination.steps.get(stage)?.clone(), of_combination(combination)?));
    let instances: BTreeMap<StepId, &Evaluation> = matrix.combinations.iter().filter_map(instance).collect();
    let mut listed: Vec<(&String, Vec<String>)> = Vec::new();
    for (id, words) in instances.iter().flat_map(|(id, evaluation)| evaluation.warnings.iter().map(move |words| (id.to_string(), words))) {
        match listed.iter_mut().find(|(known, _)| *known == words) {
            Some((_, ids)) => ids.push(id),
            None => listed.push((words, vec![id])),
        }
    }
    let words = |(words, ids): (&String, Vec<String>)| {
        if ids.len() == instances.len() { words.clone() } else { format!("{}: {words}", ids.join(", ")) }
    };
    listed.into_iter().map(words).collect()
}

fn combinations_of<'a>(matrix: &'a Matrix, variant: Option<&String>) -> impl Iterator<Item = &'a Combination> {
    matrix.combinations.iter().filter(move |combination| combination.variant.as_ref() == variant)
}

/// Every metric of every group that some seed has, with the differences to another row.
fn values(found: &[(Option<u64>, &Evaluation)], beside: &[(Option<u64>, &Evaluation)]) -> Vec<Value> {
    let number = |evaluation: &Evaluation, group: &str, metric: &Metric| evaluation.groups.get(group)?.get(metric);
    let mut values = Vec::new();
    for group in GROUPS {
        for (header, metric) in Metric::columns(found.iter().flat_map(|(_, evaluation)| evaluation.groups.values())) {
            let of =
                |(seed, evaluation): &(Option<u64>, &Evaluation)| Some(BySeed { seed: *seed, value: number(evaluation, group, metric)? });
            let by_seed: Vec<BySeed> = found.iter().filter_map(of).collect();
            let others: Vec<BySeed> = beside.iter().filter_map(of).collect();
            let other = |seed: Option<u64>| others.iter().find(|other| other.seed == seed).map(|other| other.value);
            let differences: Vec<f64> = by_seed.iter().filter_map(|mine| Some(mine.value - other(mine.seed)?)).collect();
            let numbers: Vec<f64> = by_seed.iter().map(|mine| mine.value).collect();
            if let Some(over_seeds) = Spread::of(&numbers) {
                values.push(Value { group, metric: header, over_seeds, difference: Spread::of(&differences), by_seed });
            }
        }
    }
    values
}

fn missing(matrix: &Matrix, rows: &[Option<&String>], is_there: impl Fn(&Combination) -> bool) -> Vec<String> {
    let list = |names: &[String]| names.join(", ");
    let variants: Vec<String> = matrix
        .variants
        .iter()
        .filter(|variant| combinations_of(matrix, Some(variant)).next().is_none())
        .map(|variant| format!("`{variant}`"))
        .collect();
    let chosen: BTreeSet<u64> = matrix.combinations.iter().filter_map(|combination| combination.seed).collect();
    let seeds: Vec<String> = matrix.seeds.iter().filter(|seed| !chosen.contains(seed)).map(u64::to_string).collect();
    let mut missing = Vec::new();
    missing.extend((!variants.is_empty()).then(|| format!("{} not chosen", list(&variants))));
    missing.extend((!seeds.is_empty()).then(|| format!("seed {} not chosen", list(&seeds))));
    for variant in rows {
        let combinations = matrix.combinations.iter().filter(|combination| variant.is_none() || combination.variant.as_ref() == *variant);
        let lacking: Vec<&Combination> = combinations.filter(|combination| !is_there(combination)).collect();
        let seeds: BTreeSet<u64> = lacking.iter().filter_map(|combination| combination.seed).collect();
        let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
        let who = variant.map_or_else(|| "there is".into(), |variant| format!("`{variant}` has"));
        let with = if seeds.is_empty() { String::new() } else { format!(" with seed {}", list(&seeds)) };
        missing.extend((!lacking.is_empty()).then(|| format!("{who} no result{with}")));
    }
    missing
}

impl Comparison {
    /// The groups that have a column, in order.
    pub(crate) fn groups(&self) -> Vec<&'static str> {
        GROUPS.into_iter().filter(|group| self.rows.iter().any(|row| self.headline_of(row, group).is_some())).collect()
    }

    /// The headline of a group in a row.
    pub(crate) fn headline_of<'a>(&self, row: &'a Row, group: &str) -> Option<&'a Value> {
        row.values.iter().find(|value| value.group == group && value.metric == self.headline)
    }

    /// A sentence that explains the columns.
    pub(crate) fn legend(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        let over = match seeds.as_slice() {
            [] => String::new(),
            [seed] => format!(", seed {seed}"),
            seeds => format!(", mean ± standard deviation over the seeds {}", seeds.join(", ")),
        };
        let beside = match &self.first {
            Some(first) if self.rows.len() > 1 => format!("; with a sign, the difference to {first}"),
            _ => String::new(),
        };
        format!("{}{over}{beside}", self.headline)
    }

    /// A table of the headlines, numbers x 100.
    pub(crate) fn text(&self) -> String {
        let mut columns = vec![vec!["variant".to_owned()]];
        columns[0].extend(self.rows.iter().map(|row| row.variant.clone().unwrap_or_else(|| "all".into())));
        for group in self.groups() {
            let of = |row: &Row| self.headline_of(row, group).map_or_else(|| "–".into(), |value| value.over_seeds.to_string());
            columns.push(std::iter::once(group.to_owned()).chain(self.rows.iter().map(of)).collect());
            let difference = |row: &Row| self.headline_of(row, group)?.difference.as_ref().map(Spread::signed);
            let differences: Vec<String> = self.rows.iter().map(|row| difference(row).unwrap_or_default()).collect();
            if differences.iter().any(|words| !words.is_empty()) {
                columns.push(std::iter::once(String::new()).chain(differences).collect());
            }
        }
        let width = |column: &[String]| column.iter().map(|cell| cell.chars().count()).max().unwrap_or(0);
        let of = if self.of.ends_with("masks") { ", masks" } else { "" };
        let mut text = format!("\n{} ({}{of}): {}\n", self.evaluation, self.kind, self.legend());
        for line in 0..=self.rows.len() {
            let (first, others) = columns.split_first().expect("BUG: the variants have a column");
            let cells: String = others.iter().map(|column| format!("  {:>width$}", column[line], width = width(column))).collect();
            text.push_str(format!("{:width$}{cells}", first[line], width = width(first)).trim_end());
            text.push('\n');
        }
        text.extend(self.missing.iter().map(|words| format!("missing: {words}\n")));
        text.extend(self.warnings.iter().map(|words| format!("warning: {words}\n")));
        text
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_data::evaluate::{IouType, Summary};

    use super::*;

    fn matrix(variants: &[&str], seeds: &[u64]) -> Matrix {
        let combination = |variant: Option<&str>, seed: Option<u64>| {
            let id = variant.map(str::to_owned).into_iter().chain(seed.map(|seed| seed.to_string())).collect::<Vec<_>>().join(",");
            Combination { variant: variant.map(str::to_owned), seed, steps: BTreeMap::from([("coco".into(), format!("coco@{id}").into())]) }
        };
        let variant_or_none: Vec<Option<&str>> =
            if variants.is_empty() { vec![None] } else { variants.iter().copied().map(Some).collect() };
        let seed_or_none: Vec<Option<u64>> = if seeds.is_empty() { vec![None] } else { seeds.iter().copied().map(Some).collect() };
        let combinations = seed_or_none.iter().flat_map(|seed| variant_or_none.iter().map(|variant| combination(*variant, *seed)));
        Matrix {
            variants: variants.iter().map(|name| (*name).to_owned()).collect(),
            seeds: seeds.to_vec(),
            settings: BTreeMap::new(),
            combinations: combinations.collect(),
        }
    }

    /// The table of a run whose evaluations have these AP50s, of novel classes and of all.
    fn table(matrix: &Matrix, found: &[(&str, f64, f64)]) -> String {
        let state = |id: &StepId| StepState::waiting(id.clone(), "eval/coco");
        let steps: Vec<StepState> = matrix.combinations.iter().flat_map(|combination| combination.steps.values()).map(state).collect();
        let evaluated = |(id, novel, all): &(&str, f64, f64)| {
            let group = |ap50: f64| Summary::default().with(Metric::AP50, ap50);
            let groups = BTreeMap::from([("novel".to_owned(), group(*novel)), ("all".to_owned(), group(*all))]);
            let (classes, curves) = (Vec::new(), BTreeMap::new());
            let warnings = if *all < 0.2 { vec!["4 of 4 boxes are odd".to_owned()] } else { Vec::new() };
            let evaluation = Evaluation {
                format: 2,
                protocol: Protocol::Coco,
                iou_type: IouType::Boxes,
                groups,
                classes,
                curves,
                warnings,
                n_images_without_detections: None,
            };
            Evaluated { step: format!("coco{id}").into(), kind: "eval/coco".into(), port: "evaluation", evaluation }
        };
        let found: Vec<Evaluated> = found.iter().map(evaluated).collect();
        compare(matrix, &steps, &found).iter().map(Comparison::text).collect()
    }

    #[test]
    fn variants_are_compared_seed_by_seed() {
        let found = [("@a,1", 0.1, 0.5), ("@b,1", 0.3, 0.5), ("@a,2", 0.2, 0.7), ("@b,2", 0.5, 0.6)];
        insta::assert_snapshot!(table(&matrix(&["a", "b"], &[1, 2]), &found), @r"
        coco (eval/coco): AP50, mean ± standard deviation over the seeds 1, 2; with a sign, the difference to a
        variant        novel                       all
        a         15.0 ± 7.1               60.0 ± 14.1
        b        40.0 ± 14.1  +25.0 ± 7.1   55.0 ± 7.1  -5.0 ± 7.1
        ");
    }

    #[test]
    fn what_is_missing_is_said_and_differences_are_of_seeds_that_both_have() {
        let mut matrix = matrix(&["a", "b", "c"], &[1, 2, 3]);
        matrix.combinations.retain(|combination| combination.variant.as_deref() != Some("c") && combination.seed != Some(3));
        insta::assert_snapshot!(table(&matrix, &[("@a,1", 0.1, 0.5), ("@b,1", 0.3, 0.5), ("@b,2", 0.5, 0.6)]), @r"
        coco (eval/coco): AP50, mean ± standard deviation over the seeds 1, 2; with a sign, the difference to a
        variant        novel                all
        a               10.0               50.0
        b        40.0 ± 14.1  +20.0  55.0 ± 7.1  +0.0
        missing: `c` not chosen
        missing: seed 3 not chosen
        missing: `a` has no result with seed 2
        ");
    }

    #[test]
    fn without_seeds_there_is_no_spread_and_without_variants_no_difference() {
        insta::assert_snapshot!(table(&matrix(&["a", "b"], &[]), &[("@a", 0.1, 0.5), ("@b", 0.3, 0.4996)]), @r"
        coco (eval/coco): AP50; with a sign, the difference to a
        variant  novel          all
        a         10.0         50.0
        b         30.0  +20.0  50.0  +0.0
        ");
        insta::assert_snapshot!(table(&matrix(&[], &[1, 2]), &[("@1", 0.1, 0.5), ("@2", 0.3, 0.7)]), @r"
        coco (eval/coco): AP50, mean ± standard deviation over the seeds 1, 2
        variant        novel          all
        all      20.0 ± 14.1  60.0 ± 14.1
        ");
    }

    #[test]
    fn a_warning_is_printed_once_with_the_instances_that_have_it() {
        let found = [("@a,1", 0.1, 0.1), ("@b,1", 0.3, 0.5), ("@a,2", 0.2, 0.1), ("@b,2", 0.5, 0.6)];
        let text = table(&matrix(&["a", "b"], &[1, 2]), &found);
        assert!(text.ends_with("\nwarning: coco@a,1, coco@a,2: 4 of 4 boxes are odd\n"), "{text}");
        let text = table(&matrix(&["a", "b"], &[1]), &[("@a,1", 0.1, 0.1), ("@b,1", 0.3, 0.1)]);
        assert!(text.ends_with("\nwarning: 4 of 4 boxes are odd\n"), "{text}");
    }

    #[test]
    fn an_evaluation_that_no_variant_changes_has_one_row() {
        let mut matrix = matrix(&["a", "b"], &[1]);
        matrix
            .combinations
            .iter_mut()
            .for_each(|combination| combination.steps = BTreeMap::from([("coco".into(), StepId::of_stage("coco"))]));
        insta::assert_snapshot!(table(&matrix, &[("", 0.1, 0.5)]), @r"
        coco (eval/coco): AP50, seed 1
        variant  novel   all
        all       10.0  50.0
        ");
    }
}
