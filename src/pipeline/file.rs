//! Pipeline files: from YAML text to a checked graph of stages.
//!
//! Everything that can be found without reading an input is found here, all of it at once: unknown keys (with the nearest
//! valid spelling), wrong values, unknown stages, missing inputs, edges between different kinds, cycles. Each problem has
//! its path (`stages.objects.with.expand`) and its line. A pipeline with variants and seeds is read once for each combination;
//! [`Axes::merged`] makes one graph of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use ovenbird_cache::inputs;
use ovenbird_data::words::{nearest, suggestion};
use ovenbird_stages::{AnyStage, OnBadItem, PortInfo, Presence, STAGES, StageEntry, renamed_parameter};
use serde_json::{Value, json};
use serde_yaml::Value as Yaml;

use super::{
    Pipeline, Request, Resources, Source, Step,
    axes::Resolved,
    changes::{Change, Key, Setting, with_below},
    draft::{Draft, Given, Round},
    lines::join,
    named::NAMED,
    problem::Fault,
    rounds::{id_of, of_round},
    step_id::StepId,
    yaml::{ID_WORDS, Reader, is_id, shown},
};
use crate::error::{Error, Result};

/// The version of pipeline files that this program reads.
pub(crate) const VERSION: u64 = 1;

const FILE_KEYS: &[&str] = &["version", "name", "description", "variables", "seeds", "variants", "stages"];
const STAGE_KEYS: &[&str] = &["id", "use", "rounds", "in", "with", "resources", "on_bad_item", "max_failed_ratio", "max_silence_s"];
const RESOURCE_KEYS: &[&str] = &["cpu", "memory", "gpu"];

/// The default of `max_failed_ratio`: the fraction of a stage's items that may fail with `on_bad_item: skip`.
pub(crate) const MAX_FAILED_RATIO: f64 = 0.001;

/// The default of `max_silence_s`: a stage without progress for so long has failed.
pub(crate) const MAX_SILENCE: Duration = Duration::from_secs(1800);

/// Reads and checks a pipeline: a named one, or a file (written with a slash). `variants` are the chosen ones; empty: all.
pub(crate) fn load(name: &str, settings: &[Setting], variants: &[String]) -> Result<Pipeline> {
    let (origin, file, text) = find(name)?;
    let folder = std::env::current_dir().unwrap_or_default();
    read(origin, Request { folder, file, text, settings: settings.to_vec(), variants: variants.to_vec() })
}

/// Reads and checks a pipeline again. Relative paths in it are those of the current folder.
pub(crate) fn read(origin: String, request: Request) -> Result<Pipeline> {
    let mut reader = Reader::new(&request.text);
    let pipeline = reader.pipeline(&request);
    match pipeline {
        Some(pipeline) if reader.problems.is_empty() => Ok(Pipeline { request, ..pipeline }),
        _ => {
            reader.problems.sort_by_key(|problem| problem.line);
            Err(Error::Pipeline { origin, problems: reader.problems })
        }
    }
}

/// Where a pipeline was found, its file, and its text.
fn find(name: &str) -> Result<(String, Option<PathBuf>, String)> {
    let is_path = name.contains('/') || name.ends_with(".yaml") || name.ends_with(".yml");
    let path = if is_path { PathBuf::from(name) } else { Path::new("pipelines").join(format!("{name}.yaml")) };
    match fs::read_to_string(&path) {
        Ok(text) => return Ok((path.display().to_string(), fs::canonicalize(&path).ok().or(Some(path)), text)),
        Err(source) if is_path || source.kind() != io::ErrorKind::NotFound => {
            return Err(ovenbird_cache::Error::Read { path, source }.into());
        }
        Err(_) => {}
    }
    match NAMED.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => Ok((format!("the pipeline `{name}`"), None, (*text).to_owned())),
        None => Err(Error::UnknownPipeline { name: name.into(), nearest: nearest(name, NAMED.iter().map(|(known, _)| *known)) }),
    }
}

impl Reader {
    fn pipeline(&mut self, request: &Request) -> Option<Pipeline> {
        let yaml: Yaml = match serde_yaml::from_str(&request.text) {
            Ok(yaml) => yaml,
            Err(error) => {
                let line = error.location().map(|location| location.line());
                self.push_at("yaml", line, error.to_string());
                return None;
            }
        };
        let Some(file) = self.keys("", &yaml, FILE_KEYS) else {
            self.push("yaml", "expected a mapping with `name` and `stages`");
            return None;
        };
        match file.get("version").map(|version| (version.as_u64(), version)) {
            Some((Some(VERSION), _)) => {}
            Some((Some(newer), _)) if newer > VERSION => {
                self.push("version", format!("version {newer} is newer than this program, which reads up to {VERSION}: update ovenbird"));
                return None;
            }
            Some((_, found)) => self.push("version", format!("expected {VERSION}, found {}", shown(found))),
            None => self.push("version", format!("missing; write `version: {VERSION}`")),
        }
        let name = self.text("name", file.get("name"));
        if let Some(name) = name.as_ref().filter(|name| !is_id(name)) {
            self.push("name", format!("`{name}`: {ID_WORDS}"));
        }
        let description = file.get("description").map_or(Some(String::new()), |_| self.text("description", file.get("description")));
        let variables = self.variables(file.get("variables"));
        let mut changes = self.changes(&request.settings);
        let axes = self.axes(&file, &mut changes, &request.variants);
        let Some(Yaml::Sequence(stages)) = file.get("stages") else {
            self.push("stages", "expected a list of steps");
            return None;
        };
        if stages.is_empty() {
            self.push("stages", "expected at least one step, found an empty list");
        }
        let n_before = self.problems.len();
        let (mut combinations, mut found) = (Vec::new(), Vec::new());
        for at in axes.combinations() {
            let steps = self.steps(stages, &variables, &axes.changes(at, &changes));
            found.push((at, self.problems.split_off(n_before)));
            combinations.extend(steps.map(|steps| Resolved { at, steps }));
        }
        self.problems.extend(axes.each_once(found));
        if !self.problems.is_empty() {
            return None;
        }
        let (steps, matrix) = axes.merged(combinations);
        Some(Pipeline { name: name?, description: description?, steps, matrix, request: Request::default() })
    }

    /// The steps of a pipeline with some changes, each after those it reads from.
    fn steps(&mut self, stages: &[Yaml], variables: &BTreeMap<String, Yaml>, changes: &[Change]) -> Option<Vec<Step>> {
        let mut variables = variables.clone();
        for Change { path, key, value } in changes {
            let Key::Variable(name) = key else { continue };
            match variables.get_mut(name) {
                Some(variable) => *variable = value.clone(),
                None => self.push(path, format!("no variable `{name}`{}", suggestion(name, variables.keys().map(String::as_str)))),
            }
        }
        let mut changes = changes.to_vec();
        for Change { path, value, .. } in changes.iter_mut().filter(|change| change.key.stage().is_some()) {
            self.substitute(path, value, &variables);
        }
        let mut ids = BTreeSet::new();
        let mut drafts = Vec::new();
        for (stage_idx, yaml) in stages.iter().enumerate() {
            for round in self.rounds(stage_idx, yaml, &variables) {
                if let Some(draft) = self.stage(stage_idx, yaml, round, &variables, &of_round(&changes, yaml, round)) {
                    if !ids.insert(draft.id.clone()) {
                        self.push(format!("stages.{}.id", draft.id), "two steps have this id");
                    }
                    // A change of a step that is repeated is one of all rounds.
                    ids.extend(draft.round.and_then(|_| id_of(yaml)));
                    drafts.push(draft);
                }
            }
        }
        let drafts = self.unrolled(drafts);
        ids.extend(self.broken.iter().cloned());
        for Change { path, key, .. } in &changes {
            if let Some(id) = key.stage().filter(|id| !ids.contains(*id)) {
                self.push(path, format!("no step `{id}`{}", suggestion(id, ids.iter().map(String::as_str))));
            }
        }
        let edges = self.edges(&drafts);
        let order = self.order(&drafts, &edges)?;
        let place: BTreeMap<usize, usize> = order.iter().enumerate().map(|(place, draft)| (*draft, place)).collect();
        let mut drafts: Vec<Option<(Draft, BTreeMap<String, Source>)>> = drafts.into_iter().zip(edges).map(Some).collect();
        let mut steps = Vec::new();
        for draft_idx in order {
            let (draft, mut inputs) = drafts[draft_idx].take().expect("BUG: the order names each stage once");
            for source in inputs.values_mut() {
                if let Source::Step { step, .. } = source {
                    *step = place[step];
                }
            }
            steps.push(Step {
                id: StepId::of_stage(&draft.id),
                entry: draft.entry,
                stage: draft.stage?,
                inputs,
                resources: draft.resources,
                on_bad_item: draft.on_bad_item,
                max_silence: draft.max_silence,
                most_items: None,
            });
        }
        Some(steps)
    }

    fn variables(&mut self, yaml: Option<&Yaml>) -> BTreeMap<String, Yaml> {
        let Some(yaml) = yaml else { return BTreeMap::new() };
        self.entries("variables", yaml).unwrap_or_else(|| {
            self.push("variables", "expected a mapping from names to default values");
            BTreeMap::new()
        })
    }

    fn stage(
        &mut self,
        stage_idx: usize,
        yaml: &Yaml,
        round: Option<Round>,
        variables: &BTreeMap<String, Yaml>,
        changes: &[Change],
    ) -> Option<Draft> {
        let place = format!("stages.{stage_idx}");
        let id = id_of(yaml);
        let path = id.as_ref().map_or_else(|| place.clone(), |id| format!("stages.{id}"));
        let Some(mut keys) = self.keys(&path, yaml, STAGE_KEYS) else {
            self.push(path, "expected a mapping with `id` and `use`");
            return None;
        };
        let id = self.text(&format!("{path}.id"), keys.get("id"));
        if let Some(id) = &id
            && !is_id(id)
        {
            self.push(format!("{path}.id"), format!("`{id}`: {ID_WORDS}"));
        }
        for key in ["in", "with", "resources"] {
            if let Some(value) = keys.get_mut(key) {
                self.substitute(&format!("{path}.{key}"), value, variables);
            }
        }
        let replaced = |key: &Key| matches!(key, Key::Use { stage } if Some(stage) == id.as_ref());
        let (use_path, kind) = match changes.iter().rev().find(|change| replaced(&change.key)) {
            Some(Change { path, value, .. }) => (path.clone(), Some(value)),
            None => (format!("{path}.use"), keys.get("use")),
        };
        let kind = self.text(&use_path, kind);
        let (id, kind) = (id?, kind?);
        let Some(entry) = ovenbird_stages::find(&kind) else {
            self.broken.insert(id);
            let renamed = ovenbird_stages::renamed_kind(&kind).map(|new| format!(": it is now called `{new}`"));
            let hint = renamed.unwrap_or_else(|| suggestion(&kind, STAGES.iter().map(|entry| entry.kind)));
            self.push(use_path, format!("no stage `{kind}`{hint}"));
            return None;
        };
        let with = keys.get("with").cloned().unwrap_or(Yaml::Null);
        let stage = self.parameters(&path, &id, entry, &with, changes);
        let inputs = self.inputs(&path, &id, entry, keys.get("in"), changes);
        let resources = self.resources(&path, entry, keys.get("resources"));
        let on_bad_item = self.on_bad_item(&path, entry, keys.get("on_bad_item"), keys.get("max_failed_ratio"));
        let max_silence = match keys.get("max_silence_s").map(|given| (given.as_u64(), given)) {
            None => MAX_SILENCE,
            Some((Some(seconds @ 1..), _)) => Duration::from_secs(seconds),
            Some((_, found)) => {
                self.push(format!("{path}.max_silence_s"), format!("expected a whole number of seconds, found {}", shown(found)));
                MAX_SILENCE
            }
        };
        let id = round.map_or(id.clone(), |round| round.id(&id));
        Some(Draft { id, entry, stage, inputs, resources, on_bad_item, max_silence, round })
    }

    fn parameters(&mut self, path: &str, id: &str, entry: &StageEntry, with: &Yaml, changes: &[Change]) -> Option<Box<dyn AnyStage>> {
        let path = format!("{path}.with");
        let schema = (entry.schema)();
        let known: Vec<&str> =
            schema.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        if let Some(problem) = serde_json::to_value(with).ok().and_then(|with| renamed_parameter(&with, &schema)) {
            self.push(join(&path, &problem.field), problem.problem);
            return None;
        }
        let Some(mut params) = self.keys(&path, with, &known) else {
            self.push(path, format!("expected a mapping of parameters, found {}", shown(with)));
            return None;
        };
        for Change { path, key, value } in changes {
            let Key::Parameter { path: param, .. } = key else { continue };
            if key.stage() != Some(id) {
                continue;
            }
            let (name, below) = param.split_once('.').map_or((param.as_str(), None), |(name, below)| (name, Some(below)));
            if !known.contains(&name) {
                let hint = match renamed_parameter(&json!({name: null}), &schema) {
                    Some(problem) => format!(": {}", problem.problem),
                    None => suggestion(name, known.iter().copied()),
                };
                self.push(path, format!("no parameter `{name}`{hint}"));
                continue;
            }
            let old = params.remove(name).unwrap_or(Yaml::Null);
            if below.is_none() && value.is_null() && old.is_mapping() {
                // Taken away, as an input is.
                continue;
            }
            match with_below(old, below, value.clone()) {
                Some(new) => drop(params.insert(name.to_owned(), new)),
                None => self.push(path, format!("`{name}` is not a mapping with such an entry")),
            }
        }
        let params = match serde_json::to_value(&params) {
            Ok(params) => params,
            Err(error) => {
                self.push(path, error.to_string());
                return None;
            }
        };
        // A value that a change brought is wrong there, not in the stage.
        let place = |field: &str| {
            let change = changes.iter().rev().find(|change| change.key.holds(id, field));
            change.map_or_else(|| join(&path, field), |change| change.path.clone())
        };
        match (entry.parse)(&params) {
            Ok(stage) => {
                for problem in stage.check() {
                    self.push(place(&problem.field), problem.problem);
                }
                Some(stage)
            }
            Err(problem) => {
                self.push(place(&problem.field), problem.problem);
                None
            }
        }
    }

    fn inputs(&mut self, path: &str, id: &str, entry: &StageEntry, yaml: Option<&Yaml>, changes: &[Change]) -> BTreeMap<String, Given> {
        let path = format!("{path}.in");
        let ports: Vec<&str> = entry.inputs.iter().map(|port| port.name).collect();
        let Some(written) = self.keys(&path, yaml.unwrap_or(&Yaml::Null), &ports) else {
            self.push(path, "expected a mapping from inputs to files or `step.output`");
            return BTreeMap::new();
        };
        let mut given: BTreeMap<String, (Yaml, String)> = BTreeMap::new();
        given.extend(written.into_iter().map(|(port, value)| (port.clone(), (value, join(&path, &port)))));
        let mut taken_away = BTreeMap::new();
        for Change { path, key, value } in changes {
            let Key::Input { stage, port } = key else { continue };
            if stage != id {
                continue;
            }
            if !ports.contains(&port.as_str()) {
                self.push(path, format!("no input `{port}`{}", suggestion(port, ports.iter().copied())));
            } else if value.is_null() {
                given.remove(port);
                taken_away.insert(port.clone(), path.clone());
            } else {
                given.insert(port.clone(), (value.clone(), path.clone()));
            }
        }
        for port in entry.inputs.iter().filter(|port| port.presence == Presence::Required && !given.contains_key(port.name)) {
            let path = taken_away.remove(port.name).unwrap_or_else(|| join(&path, port.name));
            self.push(path, format!("missing: `{}` needs {} here ({})", entry.kind, port.kind, port.doc));
        }
        let text = |(port, (value, path)): (String, (Yaml, String))| {
            let value = self.text(&path, Some(&value))?;
            Some((port, Given { value, path }))
        };
        given.into_iter().filter_map(text).collect()
    }

    fn resources(&mut self, path: &str, entry: &StageEntry, yaml: Option<&Yaml>) -> Resources {
        let path = format!("{path}.resources");
        let mut resources = Resources::default();
        let Some(given) = self.keys(&path, yaml.unwrap_or(&Yaml::Null), RESOURCE_KEYS) else {
            self.push(path, "expected a mapping with `cpu`, `memory`, `gpu`");
            return resources;
        };
        for (key, value) in given {
            let number = value.as_u64();
            match (key.as_str(), number) {
                ("cpu", Some(cpu)) if cpu > 0 => resources.cpu = cpu as usize,
                ("gpu", Some(1..)) if !entry.uses_device => {
                    self.push(join(&path, &key), format!("`{}` runs no network: leave `gpu` out", entry.kind));
                }
                ("gpu", Some(gpu)) => resources.gpu = gpu as usize,
                ("memory", _) => match value.as_str().and_then(parse_bytes) {
                    Some(bytes) => resources.memory = bytes,
                    None => self.push(join(&path, &key), format!("expected a size such as `4GiB`, found {}", shown(&value))),
                },
                _ => self.push(join(&path, &key), format!("expected a whole number, found {}", shown(&value))),
            }
        }
        resources
    }

    fn on_bad_item(&mut self, path: &str, entry: &StageEntry, policy: Option<&Yaml>, ratio: Option<&Yaml>) -> OnBadItem {
        let max_failed_ratio = match ratio.map(|ratio| (ratio.as_f64(), ratio)) {
            None => MAX_FAILED_RATIO,
            Some((Some(ratio), _)) if (0.0..=1.0).contains(&ratio) => ratio,
            Some((_, found)) => {
                self.push(format!("{path}.max_failed_ratio"), format!("expected a number from 0 to 1, found {}", shown(found)));
                MAX_FAILED_RATIO
            }
        };
        match policy.map(|policy| (policy.as_str(), policy)) {
            Some((Some("skip"), _)) if !entry.skips_items => {
                let why = format!("`{}` has no items that could be skipped: leave `on_bad_item: skip` out", entry.kind);
                self.push(format!("{path}.on_bad_item"), why);
            }
            Some((Some("skip"), _)) => return OnBadItem::Skip { max_failed_ratio },
            None | Some((Some("fail"), _)) if ratio.is_some() => {
                self.push(format!("{path}.max_failed_ratio"), "has a meaning only with `on_bad_item: skip`");
            }
            None | Some((Some("fail"), _)) => {}
            Some((_, found)) => self.push(format!("{path}.on_bad_item"), format!("expected `fail` or `skip`, found {}", shown(found))),
        }
        OnBadItem::Fail
    }

    /// The source of every input of every stage, by the place of stages in the file.
    fn edges(&mut self, drafts: &[Draft]) -> Vec<BTreeMap<String, Source>> {
        let mut all = Vec::new();
        for draft in drafts {
            let mut edges = BTreeMap::new();
            for (port, Given { value, path }) in &draft.inputs {
                if value.split_once('.').is_some_and(|(id, _)| self.broken.contains(id)) {
                    continue;
                }
                let wanted = draft.entry.inputs.iter().find(|known| known.name == port).expect("BUG: unknown ports were left out");
                match source(value, wanted, drafts, &self.broken) {
                    Ok(source) => drop(edges.insert(port.clone(), source)),
                    Err(fault) => self.push(path, fault),
                }
            }
            all.push(edges);
        }
        all
    }

    /// Stages in an order in which each comes after those it reads from, the file's order where there is a choice.
    fn order(&mut self, drafts: &[Draft], edges: &[BTreeMap<String, Source>]) -> Option<Vec<usize>> {
        let mut order: Vec<usize> = Vec::new();
        while order.len() < drafts.len() {
            let is_ready = |draft: &usize| {
                let mut sources = edges[*draft].values();
                !order.contains(draft) && sources.all(|source| !matches!(source, Source::Step { step, .. } if !order.contains(step)))
            };
            match (0..drafts.len()).find(is_ready) {
                Some(ready) => order.push(ready),
                None => {
                    let stuck: Vec<&str> = circle(edges, &order).into_iter().map(|draft| drafts[draft].id.as_str()).collect();
                    self.push(
                        format!("stages.{}.in", stuck[0]),
                        format!("these steps wait for each other in a circle: {}", stuck.join(", ")),
                    );
                    return None;
                }
            }
        }
        Some(order)
    }
}

/// Steps that wait for each other. `done`: those that wait for none of them.
fn circle(edges: &[BTreeMap<String, Source>], done: &[usize]) -> Vec<usize> {
    let next = |draft: usize| {
        let mut sources = edges[draft].values();
        sources.find_map(|source| match source {
            Source::Step { step, .. } if !done.contains(step) => Some(*step),
            _ => None,
        })
    };
    // Every step that is not done waits for another one, so a walk comes back to a step.
    let mut walk: Vec<usize> = (0..edges.len()).filter(|draft| !done.contains(draft)).take(1).collect();
    while let Some(step) = walk.last().and_then(|last| next(*last)) {
        if let Some(start) = walk.iter().position(|seen| *seen == step) {
            return walk.split_off(start);
        }
        walk.push(step);
    }
    walk
}

fn source(value: &str, wanted: &PortInfo, drafts: &[Draft], broken: &BTreeSet<String>) -> Result<Source, Fault> {
    if value.contains('/') {
        let path = PathBuf::from(value);
        if let Some(found) = inputs::stray(&path) {
            return Err(format!("expected {}, found {found} at `{value}`", usual(wanted)).into());
        }
        // The stage checks a file by its content; only files and folders are told apart here.
        let takes_folders = wanted.extensions.contains(&"/");
        let takes_files = wanted.extensions != ["/"];
        return match (path.is_dir(), path.exists()) {
            (true, _) if !takes_folders => Err(format!("expected {}, found a folder at `{value}`", usual(wanted)).into()),
            (false, true) if !takes_files => Err(format!("expected {}, found a file at `{value}`", usual(wanted)).into()),
            (_, true) => Ok(Source::File(path)),
            (_, false) => Err(Fault::NoFile(value.into())),
        };
    }
    let Some((id, output)) = value.split_once('.') else {
        let hint = if Path::new(value).exists() { format!(": write ./{value}") } else { String::new() };
        return Err(format!("expected `step.output` or a path with a slash, found `{value}`{hint}").into());
    };
    let Some(step) = drafts.iter().position(|draft| draft.id == id) else {
        let nearest = suggestion(id, drafts.iter().map(|draft| draft.id.as_str()).chain(broken.iter().map(String::as_str)));
        return Err(format!("no step `{id}`{nearest} (a file is written with a slash: ./{value})").into());
    };
    let outputs = drafts[step].entry.outputs;
    let Some(found) = outputs.iter().find(|known| known.name == output) else {
        let kind = drafts[step].entry.kind;
        let words = match Path::new(value).exists() {
            true => format!("`{kind}` has no output `{output}`; the file `{value}` is written with a slash: ./{value}"),
            false => format!("`{kind}` has no output `{output}`{}", suggestion(output, outputs.iter().map(|port| port.name))),
        };
        return Err(words.into());
    };
    if found.kind != wanted.kind {
        return Err(format!("expected {}, but `{value}` is {}", wanted.kind, found.kind).into());
    }
    Ok(Source::Step { step, port: output.to_owned() })
}

/// A kind, with the usual extensions of its files.
fn usual(wanted: &PortInfo) -> String {
    let extension = |extension: &&str| if *extension == "/" { "a folder".to_owned() } else { format!(".{extension}") };
    format!("{} ({})", wanted.kind, wanted.extensions.iter().map(extension).collect::<Vec<_>>().join(", "))
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let number: f64 = number.trim().parse().ok().filter(|number| *number >= 0.0)?;
    let unit = match unit {
        "KiB" => 1_u64 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    Some((number * unit as f64) as u64)
}
