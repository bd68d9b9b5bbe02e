//! Steps that are repeated: `rounds: 2` makes `prompts-1` and `prompts-2` of `prompts`.
//!
//! A repeated step reads from repeated steps of its own round; `previous.STEP.OUTPUT` is of the round before. In the first round there is none: an input that
//! may be left out then is, and a step that needs it begins with the second round. Any other step reads from the last round. Parameters do not say which
//! round a step is of, so a further round costs only itself.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_stages::Presence;
use serde_yaml::Value as Yaml;

use super::{
    changes::{Change, Key},
    draft::{Draft, Given, Round},
    yaml::{Reader, shown},
};

/// The most rounds: each is a set of steps that a person looks at.
const MAX_ROUNDS: u64 = 20;
/// What an input of the round before begins with.
const PREVIOUS: &str = "previous.";

/// The id of a step as written.
pub(super) fn id_of(yaml: &Yaml) -> Option<String> {
    yaml.get("id").and_then(Yaml::as_str).map(str::to_owned)
}

/// The changes with those of one round of a step under the step's own id; those of its other rounds are left out.
pub(super) fn of_round(changes: &[Change], yaml: &Yaml, round: Option<Round>) -> Vec<Change> {
    let (Some(id), Some(round)) = (id_of(yaml), round) else { return changes.to_vec() };
    let renamed = |change: &Change| {
        let mut change = change.clone();
        if let Key::Parameter { stage, .. } | Key::Input { stage, .. } | Key::Use { stage } = &mut change.key
            && *stage == round.id(&id)
        {
            stage.clone_from(&id);
        }
        change
    };
    changes.iter().map(renamed).collect()
}

/// What an input of a repeated step stands for.
enum Meant {
    /// As it is written.
    Written,
    /// An output of a round of a step.
    Of(String),
    /// An output of a round that there is not.
    Nothing,
}

impl Reader {
    /// The rounds of a step: none as such where it is not repeated.
    pub(super) fn rounds(&mut self, stage_idx: usize, yaml: &Yaml, variables: &BTreeMap<String, Yaml>) -> Vec<Option<Round>> {
        let Some(written) = yaml.get("rounds") else { return vec![None] };
        let path = id_of(yaml).map_or_else(|| format!("stages.{stage_idx}.rounds"), |id| format!("stages.{id}.rounds"));
        let mut value = written.clone();
        self.substitute(&path, &mut value, variables);
        match value.as_u64() {
            Some(of @ 1..=MAX_ROUNDS) => (1..=of).map(|number| Some(Round { number, of })).collect(),
            _ => {
                self.push(path, format!("expected a whole number from 1 to {MAX_ROUNDS}, found {}", shown(&value)));
                self.broken.extend(id_of(yaml));
                Vec::new()
            }
        }
    }

    /// The steps with inputs of the rounds that they mean, without those steps that a round has not.
    pub(super) fn unrolled(&mut self, mut drafts: Vec<Draft>) -> Vec<Draft> {
        let of_draft = |draft: &Draft| {
            let round = draft.round?;
            Some((draft.id.strip_suffix(&round.id(""))?.to_owned(), round.of))
        };
        let rounds: BTreeMap<String, u64> = drafts.iter().filter_map(of_draft).collect();
        // Inputs whose round was found here: what else is not there was written so.
        let mut found: BTreeSet<(String, String)> = BTreeSet::new();
        for draft in &mut drafts {
            for (port, given) in &mut draft.inputs {
                match meant(&given.value, draft.round, &rounds) {
                    Ok(Meant::Written) => continue,
                    Ok(Meant::Of(value)) => given.value = value,
                    Ok(Meant::Nothing) => given.value = String::new(),
                    Err(problem) => {
                        self.push(given.path.clone(), problem);
                        continue;
                    }
                }
                found.insert((draft.id.clone(), port.clone()));
            }
        }
        // A step that is not there takes those with it that need it.
        let mut left_out: BTreeSet<String> = BTreeSet::new();
        loop {
            let is_gone =
                |given: &Given| given.value.is_empty() || given.value.split_once('.').is_some_and(|(id, _)| left_out.contains(id));
            let mut lacking = Vec::new();
            for draft in &mut drafts {
                let gone: Vec<String> = draft.inputs.iter().filter(|(_, given)| is_gone(given)).map(|(port, _)| port.clone()).collect();
                for port in gone {
                    let is_required = draft.entry.inputs.iter().any(|known| known.name == port && known.presence == Presence::Required);
                    let Given { value, path } = draft.inputs.remove(&port).expect("BUG: the port was found among the inputs");
                    match draft.round.filter(|_| found.contains(&(draft.id.clone(), port.clone()))) {
                        None => self.push(path, format!("`{value}` is not there: the step begins with the second round")),
                        Some(_) if is_required => lacking.push(draft.id.clone()),
                        Some(_) => {}
                    }
                }
            }
            if lacking.is_empty() {
                return drafts;
            }
            drafts.retain(|draft| !lacking.contains(&draft.id));
            left_out.extend(lacking);
        }
    }
}

/// What an input means in a round; `rounds`: how many each repeated step has.
fn meant(value: &str, round: Option<Round>, rounds: &BTreeMap<String, u64>) -> Result<Meant, String> {
    let (is_previous, written) = value.strip_prefix(PREVIOUS).map_or((false, value), |written| (true, written));
    let Some((id, output)) = written.split_once('.').filter(|_| !value.contains('/')) else { return Ok(Meant::Written) };
    match (rounds.get(id), round, is_previous) {
        (None, _, false) => Ok(Meant::Written),
        (None, _, true) => Err(format!("`{value}`: no step `{id}` with `rounds`")),
        (Some(_), None, true) => Err(format!("`{value}`: this step has no `rounds`")),
        (Some(of), None, false) => Ok(Meant::Of(format!("{id}-{of}.{output}"))),
        (Some(_), Some(Round { number: 1, .. }), true) => Ok(Meant::Nothing),
        (Some(of), Some(Round { number, .. }), _) => {
            let number = if is_previous { number - 1 } else { number };
            match number <= *of {
                true => Ok(Meant::Of(format!("{id}-{number}.{output}"))),
                false => Err(format!("`{value}`: the step `{id}` has {of} rounds, this one more")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        error::Error,
        pipeline::{Request, Source, changes::Setting, file},
    };

    const TEXT: &str = "version: 1
name: rounds
variables: {rounds: 3}
stages:
  - {id: world, use: toy/world}
  - {id: clip, use: toy/clip, in: {held_out_images: world.held_out_images, held_out: world.held_out}}
  - {id: words, use: toy/vocabulary}
  - id: crops
    use: crops/objects
    with: {rule: rpl}
    in: {images: world.images, annotations: world.train}
  - id: links
    use: pool/retrieve
    rounds: \"${rounds}\"
    in: {pool: /, prompts: previous.prompts.prompts, classes: world.classes}
  - id: kept
    use: pool/links
    rounds: \"${rounds}\"
    in: {metadata: /}
  - id: prompts
    use: prompts/rpl
    rounds: \"${rounds}\"
    in: {checkpoint: clip.checkpoint, classes: world.classes, descriptions: words.descriptions, crops: crops.crops, annotations: world.train}
  - id: out
    use: prompts/export
    in: {prompts: prompts.prompts}
";

    /// The steps, each with the steps that it reads from; or the problems.
    fn read(text: &str, settings: &[(&str, &str)]) -> Result<Vec<(String, Vec<String>)>, String> {
        let settings = settings.iter().map(|(key, value)| Setting { key: (*key).into(), value: (*value).into() }).collect();
        let pipeline = file::read("rounds".into(), Request { text: text.into(), settings, ..Request::default() });
        let pipeline = pipeline.map_err(|error| match error {
            Error::Pipeline { problems, .. } => problems.iter().map(|problem| format!("{}: {}\n", problem.path, problem.fault)).collect(),
            other => other.to_string(),
        })?;
        let id = |step: usize| pipeline.steps[step].id.to_string();
        let sources = |step: &crate::pipeline::Step| {
            let of = |source: &Source| match source {
                Source::Step { step, port } => Some(format!("{}.{port}", id(*step))),
                Source::File(_) => None,
            };
            step.inputs.values().filter_map(of).collect()
        };
        Ok(pipeline.steps.iter().map(|step| (step.id.to_string(), sources(step))).collect())
    }

    #[test]
    fn a_round_reads_from_itself_and_from_the_one_before() {
        let steps = read(TEXT, &[]).unwrap();
        let of = |id: &str| &steps.iter().find(|(step, _)| step == id).unwrap_or_else(|| panic!("no {id}: {steps:?}")).1;
        assert!(!steps.iter().any(|(step, _)| step == "links-1"), "the first round has nothing to search for");
        assert!(of("links-2").contains(&"prompts-1.prompts".into()) && of("links-3").contains(&"prompts-2.prompts".into()));
        assert_eq!(of("out"), &["prompts-3.prompts"]);
        let once = read(TEXT, &[("rounds", "1")]).unwrap();
        assert!(once.iter().all(|(step, _)| !step.starts_with("links")), "{once:?}");
        assert_eq!(once.iter().find(|(step, _)| step == "out").unwrap().1, ["prompts-1.prompts"]);
    }

    #[test]
    fn changes_are_of_all_rounds_or_of_one() {
        assert!(read(TEXT, &[("prompts.lr", "0.1"), ("prompts-2.epochs", "3")]).is_ok());
        let problems = read(TEXT, &[("prompts-2.epochs", "0")]).unwrap_err();
        assert!(problems.starts_with("--set prompts-2.epochs: expected from 1 to 1000, found 0\n"), "{problems}");
        assert!(read(TEXT, &[("prompts-4.epochs", "3")]).unwrap_err().contains("no step `prompts-4`"));
    }

    #[test]
    fn rounds_that_there_are_not_are_refused() {
        for (from, to, expected) in [
            ("{rounds: 3}", "{rounds: 0}", "stages.links.rounds: expected a whole number from 1 to 20, found 0"),
            ("{prompts: prompts.prompts}", "{prompts: previous.prompts.prompts}", "this step has no `rounds`"),
            ("previous.prompts.prompts", "previous.clip.prompts", "no step `clip` with `rounds`"),
            ("    use: pool/links\n    rounds: \"${rounds}\"", "    use: pool/links\n    rounds: 2", ""),
            ("{metadata: /}", "{metadata: links.links}", "expected pool-metadata, but `links-2.links` is links"),
            ("use: prompts/rpl", "use: prompts/rlp", "no stage `prompts/rlp`"),
            (
                "crops: crops.crops, annotations: world.train}",
                "crops: crops.crops, annotations: labels-9.annotations}",
                "no step `labels-9`",
            ),
            ("{prompts: prompts.prompts}", "{prompts: prompts-7.prompts}", "no step `prompts-7`"),
        ] {
            assert!(TEXT.contains(from), "{from}");
            let found = read(&TEXT.replace(from, to), &[]).err().unwrap_or_default();
            assert!(found.contains(expected), "{expected}: {found}");
        }
        let reads_later = TEXT.replace("{prompts: prompts.prompts}", "{prompts: prompts.prompts}\n  - {id: get, use: pool/links, in: {metadata: late.metadata}}\n  - {id: late, use: pool/import, rounds: 1, in: {table: previous.late.table}}");
        assert!(read(&reads_later, &[]).unwrap_err().contains("`late-1.metadata` is not there: the step begins with the second round"));
    }
}
