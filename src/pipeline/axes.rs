//! Variants and seeds: one pipeline file, many trainings of it as one graph.
//!
//! A *combination* is a variant with a seed. The steps of each combination are resolved separately; equal steps of several
//! combinations (the same stage of the file, parameters with defaults, resources and policy, reading from equal steps) become
//! one step. The remaining steps are *instances* of a stage, and their ids say to which combinations they belong: `clip` to all,
//! `world@8` to those with seed 8, `prompts@vild` to those with the variant `vild`, `detector@vild,8` to one. An instance that
//! several variants share has the name of the first. Ids do not depend on which combinations are chosen, so an instance has
//! the same id in every run.
//!
//! Recipes do not contain variants: units and artifacts are shared with everything else in a home.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::words::suggestion;
use serde_json::Value;
use serde_yaml::Value as Yaml;

use super::{
    Source, Step,
    changes::{Change, Key},
    matrix::{Combination, Matrix},
    problem::Problem,
    yaml::{Reader, is_id, shown},
};

/// The variable that `seeds` are values of.
const SEED: &str = "seed";

/// The variants and seeds of a file.
pub(super) struct Axes {
    variants: Vec<Variant>,
    seeds: Vec<u64>,
    /// By place; a place is 0 where the file has none.
    chosen_variants: BTreeSet<usize>,
    chosen_seeds: BTreeSet<usize>,
}

struct Variant {
    name: String,
    changes: Vec<Change>,
}

impl Variant {
    /// What it changes, as `--set` takes it.
    fn settings(&self) -> Vec<String> {
        let setting = |Change { path, value, .. }: &Change| {
            let key = path.strip_prefix(&format!("variants.{}.", self.name)).unwrap_or(path);
            format!("{key}={}", shown(value))
        };
        self.changes.iter().map(setting).collect()
    }
}

/// The places of a combination's seed and variant in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    seed: usize,
    variant: usize,
}

/// The steps of one combination.
pub(super) struct Resolved {
    pub(super) at: At,
    pub(super) steps: Vec<Step>,
}

impl Reader {
    /// Reads `variants` and `seeds`. A seed from the command line is taken out of the changes: it chooses.
    pub(super) fn axes(&mut self, file: &BTreeMap<String, Yaml>, changes: &mut Vec<Change>, chosen: &[String]) -> Axes {
        let mut seeds = file.get("seeds").map_or_else(Vec::new, |yaml| self.seeds(yaml));
        let variants = file.get("variants").map_or_else(Vec::new, |yaml| self.variants(yaml, !seeds.is_empty()));

        let mut chosen_seeds: BTreeSet<usize> = (0..seeds.len().max(1)).collect();
        if !seeds.is_empty() {
            let seed = Key::Variable(SEED.into());
            let given: Vec<Change> = changes.extract_if(.., |change| change.key == seed).collect();
            if let Some(Change { path, value, .. }) = given.last() {
                match value.as_u64() {
                    Some(seed) => {
                        let place = seeds.iter().position(|known| *known == seed).unwrap_or_else(|| {
                            seeds.push(seed);
                            seeds.len() - 1
                        });
                        chosen_seeds = BTreeSet::from([place]);
                    }
                    None => self.push(path, format!("expected a whole number, found {}", shown(value))),
                }
            }
        }
        let mut chosen_variants = BTreeSet::new();
        for name in chosen {
            match variants.iter().position(|variant| variant.name == *name) {
                Some(place) => drop(chosen_variants.insert(place)),
                None => {
                    let known = match variants.as_slice() {
                        [] => ": the pipeline has none".into(),
                        variants => suggestion(name, variants.iter().map(|variant| variant.name.as_str())),
                    };
                    self.push(format!("--variant {name}"), format!("no variant `{name}`{known}"));
                }
            }
        }
        if chosen.is_empty() {
            chosen_variants.extend(0..variants.len().max(1));
        }
        Axes { variants, seeds, chosen_variants, chosen_seeds }
    }

    fn seeds(&mut self, yaml: &Yaml) -> Vec<u64> {
        let Yaml::Sequence(given) = yaml else {
            self.push("seeds", format!("expected a list of whole numbers, found {}", shown(yaml)));
            return Vec::new();
        };
        if given.is_empty() {
            self.push("seeds", "expected at least one; without `seeds`, the variable `seed` has its value");
        }
        let mut seeds = Vec::new();
        for (seed_idx, value) in given.iter().enumerate() {
            match value.as_u64() {
                Some(seed) if seeds.contains(&seed) => self.push(format!("seeds.{seed_idx}"), format!("{seed} is listed twice")),
                Some(seed) => seeds.push(seed),
                None => self.push(format!("seeds.{seed_idx}"), format!("expected a whole number, found {}", shown(value))),
            }
        }
        seeds
    }

    fn variants(&mut self, yaml: &Yaml, has_seeds: bool) -> Vec<Variant> {
        let Yaml::Mapping(given) = yaml else {
            self.push("variants", format!("expected a mapping from names to what they change, found {}", shown(yaml)));
            return Vec::new();
        };
        if given.is_empty() {
            self.push("variants", "expected at least one; one that changes nothing is written `NAME: {}`");
        }
        let mut variants = Vec::new();
        for (name, changed) in given {
            let Some(name) = name.as_str().filter(|name| is_id(name)) else {
                let name = shown(name);
                self.push(format!("variants.{name}"), format!("`{name}`: a variant's name has letters, digits, `-` and `_` only"));
                continue;
            };
            let path = format!("variants.{name}");
            if name.parse::<u64>().is_ok() {
                self.push(&path, format!("`{name}`: a number would be read as a seed in `step@{name}`; add a letter"));
                continue;
            }
            let Some(entries) = self.entries(&path, changed) else {
                self.push(path, format!("expected a mapping from what `--set` takes to values, found {}", shown(changed)));
                continue;
            };
            let change = |(key, value): (String, Yaml)| Change { path: format!("{path}.{key}"), key: Key::of(&key), value };
            let changes: Vec<Change> = entries.into_iter().map(change).collect();
            for Change { path, .. } in changes.iter().filter(|change| has_seeds && change.key == Key::Variable(SEED.into())) {
                self.push(path, "a variant cannot set `seed` where the file has `seeds`");
            }
            variants.push(Variant { name: name.to_owned(), changes });
        }
        variants
    }
}

impl Axes {
    fn n_variants(&self) -> usize {
        self.variants.len().max(1)
    }

    fn n_seeds(&self) -> usize {
        self.seeds.len().max(1)
    }

    /// Every combination of the file, chosen or not, seed by seed: a run works in this order, and all variants with one seed tell more
    /// than one variant with all seeds.
    pub(super) fn combinations(&self) -> Vec<At> {
        let seeds = 0..self.n_seeds();
        seeds.flat_map(|seed| (0..self.n_variants()).map(move |variant| At { seed, variant })).collect()
    }

    /// The changes of a combination; later ones override earlier ones.
    pub(super) fn changes(&self, at: At, from_command_line: &[Change]) -> Vec<Change> {
        let seed = self.seeds.get(at.seed);
        let seed = seed.map(|seed| Change { path: "seeds".into(), key: Key::Variable(SEED.into()), value: (*seed).into() });
        let of_variant = self.variants.get(at.variant).map_or(&[][..], |variant| &variant.changes);
        seed.into_iter().chain(of_variant.iter().cloned()).chain(from_command_line.iter().cloned()).collect()
    }

    /// The problems of all combinations, each once, and with which variants or seeds it occurs where not with all.
    pub(super) fn each_once(&self, found: Vec<(At, Vec<Problem>)>) -> Vec<Problem> {
        let mut told: Vec<(Problem, BTreeSet<At>)> = Vec::new();
        for (at, problem) in found.into_iter().flat_map(|(at, problems)| problems.into_iter().map(move |problem| (at, problem))) {
            match told.iter_mut().find(|(known, _)| *known == problem) {
                Some((_, places)) => drop(places.insert(at)),
                None => told.push((problem, BTreeSet::from([at]))),
            }
        }
        let with_places = |(mut problem, places): (Problem, BTreeSet<At>)| {
            let variants: BTreeSet<usize> = places.iter().map(|at| at.variant).collect();
            let seeds: BTreeSet<usize> = places.iter().map(|at| at.seed).collect();
            let is_told = problem.path.starts_with("variants.");
            if variants.len() < self.n_variants() && !is_told {
                let names: Vec<String> = variants.iter().map(|variant| format!("`{}`", self.variants[*variant].name)).collect();
                problem.only_with = format!(" (with the variant {})", names.join(", "));
            } else if seeds.len() < self.n_seeds() && !is_told {
                let seeds: Vec<String> = seeds.iter().map(|seed| self.seeds[*seed].to_string()).collect();
                problem.only_with = format!(" (with the seed {})", seeds.join(", "));
            }
            problem
        };
        told.into_iter().map(with_places).collect()
    }

    /// The steps of the chosen combinations, each once, after those it reads from.
    pub(super) fn merged(self, resolved: Vec<Resolved>) -> (Vec<Step>, Option<Matrix>) {
        let mut instances: Vec<Instance> = Vec::new();
        let mut combinations: Vec<(At, Vec<usize>)> = Vec::new();
        for Resolved { at, steps } in resolved {
            let mut places = Vec::new();
            for mut step in steps {
                move_sources(&mut step, &places);
                let params = step.stage.params();
                let place = instances.iter().position(|instance| instance.equals(&step, &params)).unwrap_or_else(|| {
                    instances.push(Instance { step, params, combinations: BTreeSet::new() });
                    instances.len() - 1
                });
                instances[place].combinations.insert(at);
                places.push(place);
            }
            combinations.push((at, places));
        }
        for Instance { step, combinations, .. } in &mut instances {
            (step.id.variant, step.id.seed) = self.names(combinations);
        }
        if self.variants.is_empty() && self.seeds.is_empty() {
            return (instances.into_iter().map(|instance| instance.step).collect(), None);
        }

        combinations.retain(|(at, _)| self.chosen_variants.contains(&at.variant) && self.chosen_seeds.contains(&at.seed));
        let combination = |(at, places): &(At, Vec<usize>)| Combination {
            variant: self.variants.get(at.variant).map(|variant| variant.name.clone()),
            seed: self.seeds.get(at.seed).copied(),
            steps: places.iter().map(|place| &instances[*place].step.id).map(|id| (id.stage.clone(), id.clone())).collect(),
        };
        let matrix = Matrix {
            variants: self.variants.iter().map(|variant| variant.name.clone()).collect(),
            seeds: self.seeds.clone(),
            settings: self.variants.iter().map(|variant| (variant.name.clone(), variant.settings())).collect(),
            combinations: combinations.iter().map(combination).collect(),
        };
        let is_kept: BTreeSet<usize> = combinations.iter().flat_map(|(_, places)| places).copied().collect();
        // No step that is kept reads from one that is not.
        let new_places: Vec<usize> = (0..instances.len()).map(|place| is_kept.range(..place).count()).collect();
        let kept = instances.into_iter().enumerate().filter(|(place, _)| is_kept.contains(place));
        let steps = kept.map(|(_, Instance { mut step, .. })| {
            move_sources(&mut step, &new_places);
            step
        });
        (steps.collect(), Some(matrix))
    }

    /// The variant and the seed in the id of a step of some combinations.
    fn names(&self, combinations: &BTreeSet<At>) -> (Option<String>, Option<u64>) {
        let (n_variants, n_seeds) = (self.n_variants(), self.n_seeds());
        let variants: BTreeSet<usize> = combinations.iter().map(|at| at.variant).collect();
        let seeds: BTreeSet<usize> = combinations.iter().map(|at| at.seed).collect();
        let is_product = combinations.len() == variants.len() * seeds.len();
        let first = combinations.first().expect("BUG: every step belongs to a combination");
        let variant = self.variants.get(first.variant).map(|variant| variant.name.clone());
        let variant = variant.filter(|_| !is_product || variants.len() < n_variants);
        let seed = self.seeds.get(first.seed).copied();
        (variant, seed.filter(|_| !is_product || seeds.len() < n_seeds))
    }
}

/// A step that one or more combinations share.
struct Instance {
    step: Step,
    params: Value,
    combinations: BTreeSet<At>,
}

impl Instance {
    /// Whether this equals a step whose sources are places of instances.
    fn equals(&self, other: &Step, params: &Value) -> bool {
        let Step { id, entry, stage: _, inputs, resources, on_bad_item, max_silence, most_items } = &self.step;
        id.stage == other.id.stage
            && entry.kind == other.entry.kind
            && self.params == *params
            && *inputs == other.inputs
            && *resources == other.resources
            && *on_bad_item == other.on_bad_item
            && *max_silence == other.max_silence
            && *most_items == other.most_items
    }
}

/// Replaces the places that a step reads from.
fn move_sources(step: &mut Step, places: &[usize]) {
    for source in step.inputs.values_mut() {
        if let Source::Step { step, .. } = source {
            *step = places[*step];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Error,
        pipeline::{Pipeline, Request, changes::Setting, file},
    };

    const STAGES: &str = "stages:
  - id: world
    use: toy/world
    with: {seed: \"${seed}\"}
  - id: clip
    use: clip/pretrain
    in: {images: world.web_images, captions: world.captions, held_out_images: world.held_out_images, held_out: world.held_out}
    with: {seed: 7, steps: \"${steps}\"}
  - id: val
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
    with: {keep: all-annotated}
  - id: names
    use: annotations/split
    in: {annotations: world.val, classes: world.classes}
    with: {keep: base}
  - id: lvis
    use: annotations/split
    in: {annotations: world.lvis_val}
    with: {classes: lvis-frequency}
  - id: prompts
    use: prompts/ensemble
    in: {checkpoint: clip.checkpoint, classes: val.classes}
";

    fn read(head: &str, settings: &[&str], variants: &[&str]) -> Result<Pipeline, Error> {
        read_all(&format!("{head}{STAGES}"), settings, variants)
    }

    fn read_all(text: &str, settings: &[&str], variants: &[&str]) -> Result<Pipeline, Error> {
        let setting = |text: &&str| {
            let (key, value) = text.split_once('=').unwrap();
            Setting { key: key.into(), value: value.into() }
        };
        let text = format!("version: 1\nname: test\n{text}");
        let settings = settings.iter().map(setting).collect();
        let variants = variants.iter().map(|name| (*name).to_owned()).collect();
        file::read("test".into(), Request { folder: ".".into(), file: None, text, settings, variants })
    }

    /// The steps, and below them those of each combination.
    fn shown(head: &str, settings: &[&str], variants: &[&str]) -> String {
        let pipeline = read(head, settings, variants).unwrap_or_else(|error| panic!("{}", error.message()));
        let mut text: String = pipeline.steps.iter().map(|step| format!("{}\n", step.id)).collect();
        for Combination { variant, seed, steps } in pipeline.matrix.map_or_else(Vec::new, |matrix| matrix.combinations) {
            let steps: Vec<String> = steps.values().map(ToString::to_string).collect();
            text.push_str(&format!(
                "{} {}: {}\n",
                variant.unwrap_or_default(),
                seed.map_or_else(String::new, |seed| seed.to_string()),
                steps.join(" ")
            ));
        }
        text
    }

    fn problems(head: &str, settings: &[&str], variants: &[&str]) -> String {
        problems_of(&format!("{head}{STAGES}"), settings, variants)
    }

    fn problems_of(text: &str, settings: &[&str], variants: &[&str]) -> String {
        match read_all(text, settings, variants) {
            Err(Error::Pipeline { problems, .. }) => problems.iter().map(|problem| format!("  {problem}\n")).collect(),
            Err(error) => panic!("{}", error.message()),
            Ok(_) => String::new(),
        }
    }

    const BOTH: &str = "variables: {seed: 7, steps: 10}
seeds: [7, 8]
variants:
  plain: {}
  long: {steps: 20}
  blind: {clip.in.held_out: null, clip.in.held_out_images: null, world.seed: 3}
";

    #[test]
    fn without_variants_and_seeds_nothing_is_new() {
        insta::assert_snapshot!(shown("variables: {seed: 7, steps: 10}\n", &[], &[]), @r"
        world
        clip
        val
        names
        lvis
        prompts
        ");
    }

    #[test]
    fn an_instance_is_named_after_what_it_depends_on() {
        insta::assert_snapshot!(shown("variables: {seed: 7, steps: 10}\nseeds: [7, 8]\n", &["world.seed=1"], &[]), @r"
        world
        clip
        val
        names
        lvis
        prompts
         7: clip lvis names prompts val world
         8: clip lvis names prompts val world
        ");
        insta::assert_snapshot!(shown("variables: {seed: 7, steps: 10}\nvariants: {plain: {}, long: {steps: 20}, longer: {steps: 20, lvis.keep: base}}\n", &[], &[]), @r"
        world
        clip@plain
        val
        names
        lvis@plain
        prompts@plain
        clip@long
        prompts@long
        lvis@longer
        plain : clip@plain lvis@plain names prompts@plain val world
        long : clip@long lvis@plain names prompts@long val world
        longer : clip@long lvis@longer names prompts@long val world
        ");
        insta::assert_snapshot!(shown(BOTH, &[], &[]), @r"
        world@plain,7
        clip@plain,7
        val@plain,7
        names@plain,7
        lvis@plain,7
        prompts@plain,7
        clip@long,7
        prompts@long,7
        world@blind
        clip@blind
        val@blind
        names@blind
        lvis@blind
        prompts@blind
        world@plain,8
        clip@plain,8
        val@plain,8
        names@plain,8
        lvis@plain,8
        prompts@plain,8
        clip@long,8
        prompts@long,8
        plain 7: clip@plain,7 lvis@plain,7 names@plain,7 prompts@plain,7 val@plain,7 world@plain,7
        long 7: clip@long,7 lvis@plain,7 names@plain,7 prompts@long,7 val@plain,7 world@plain,7
        blind 7: clip@blind lvis@blind names@blind prompts@blind val@blind world@blind
        plain 8: clip@plain,8 lvis@plain,8 names@plain,8 prompts@plain,8 val@plain,8 world@plain,8
        long 8: clip@long,8 lvis@plain,8 names@plain,8 prompts@long,8 val@plain,8 world@plain,8
        blind 8: clip@blind lvis@blind names@blind prompts@blind val@blind world@blind
        ");
    }

    #[test]
    fn ids_do_not_depend_on_what_is_chosen() {
        insta::assert_snapshot!(shown(BOTH, &["seed=8"], &["blind", "long"]), @r"
        world@blind
        clip@blind
        val@blind
        names@blind
        lvis@blind
        prompts@blind
        world@plain,8
        val@plain,8
        names@plain,8
        lvis@plain,8
        clip@long,8
        prompts@long,8
        long 8: clip@long,8 lvis@plain,8 names@plain,8 prompts@long,8 val@plain,8 world@plain,8
        blind 8: clip@blind lvis@blind names@blind prompts@blind val@blind world@blind
        ");
        insta::assert_snapshot!(shown(BOTH, &["seed=9"], &["plain"]), @r"
        world@plain,9
        clip@plain,9
        val@plain,9
        names@plain,9
        lvis@plain,9
        prompts@plain,9
        plain 9: clip@plain,9 lvis@plain,9 names@plain,9 prompts@plain,9 val@plain,9 world@plain,9
        ");
    }

    #[test]
    fn a_variant_is_stronger_than_the_file_and_the_command_line_than_a_variant() {
        let head = "variables: {seed: 7, steps: 10}\nvariants: {a: {steps: 20, clip.batch_size: 4, prompts.in.classes: names.classes}}\n";
        let of = |settings: &[&str]| {
            let pipeline = read(head, settings, &[]).unwrap_or_else(|error| panic!("{}", error.message()));
            let step = |id: &str| pipeline.steps.iter().find(|step| step.id.stage == id).unwrap();
            let Source::Step { step: source, .. } = step("prompts").inputs["classes"] else { panic!("a file") };
            let params = step("clip").stage.params();
            (params["steps"].as_u64().unwrap(), params["batch_size"].as_u64().unwrap(), pipeline.steps[source].id.to_string())
        };
        assert_eq!(of(&[]), (20, 4, "names".into()));
        assert_eq!(of(&["steps=30"]), (30, 4, "names".into()));
        assert_eq!(of(&["clip.steps=40", "clip.batch_size=5", "prompts.in.classes=val.classes"]), (40, 5, "val".into()));
        // Variables within a change.
        assert_eq!(of(&["clip.batch_size=${seed}"]), (20, 7, "names".into()));
    }

    #[test]
    fn an_input_is_taken_away() {
        let n_inputs = |settings: &[&str]| {
            let pipeline = read("variables: {seed: 7, steps: 10}\n", settings, &[]).unwrap_or_else(|error| panic!("{}", error.message()));
            pipeline.steps.iter().find(|step| step.id.stage == "clip").unwrap().inputs.len()
        };
        assert_eq!((n_inputs(&[]), n_inputs(&["clip.in.held_out=null"])), (4, 3));
    }

    #[test]
    fn a_mapping_of_parameters_is_taken_away() {
        let clip_of_prompts = |settings: &[&str]| {
            let pipeline = read("variables: {seed: 7, steps: 10}\n", settings, &[]).unwrap_or_else(|error| panic!("{}", error.message()));
            pipeline.steps.iter().find(|step| step.id.stage == "prompts").unwrap().stage.params()["clip"].clone()
        };
        let default = clip_of_prompts(&[]);
        let other = clip_of_prompts(&["prompts.clip.prefix=teacher"]);
        assert_ne!(default, other);
        assert_eq!(default, clip_of_prompts(&["prompts.clip.prefix=teacher", "prompts.clip=null"]));
    }

    #[test]
    fn a_step_becomes_another_stage() {
        let head = "variables: {seed: 7}
variants:
  given: {}
  trained: {clip.use: clip/pretrain, clip.in.images: world.web_images, clip.in.captions: world.captions}
";
        let stages = STAGES
            .replace("    with: {seed: 7, steps: \"${steps}\"}\n", "")
            .replace("use: clip/pretrain\n    in: {images: world.web_images, captions: world.captions, ", "use: toy/clip\n    in: {");
        let pipeline = read_all(&format!("{head}{stages}"), &[], &[]).unwrap_or_else(|error| panic!("{}", error.message()));
        let kinds = pipeline.steps.iter().filter(|step| step.id.stage == "clip").map(|step| (step.id.to_string(), step.entry.kind));
        assert_eq!(kinds.collect::<Vec<_>>(), [("clip@given".to_owned(), "toy/clip"), ("clip@trained".to_owned(), "clip/pretrain")]);
        let unknown = problems("variables: {seed: 7, steps: 10}\n", &["clip.use=toy/clop"], &[]);
        assert!(unknown.starts_with("  --set clip.use: no stage `toy/clop`, did you mean `toy/clip`?\n"), "{unknown}");
    }

    #[test]
    fn every_mistake_is_named_with_its_place() {
        let head = "variables: {seed: 7, steps: 10}
seeds: [7, eight, 7]
variants:
  \"a,b\": {}
  \"12\": {}
  wrong: 3
  c:
    step: 20
    clip.step: 20
    clip.steps: -1
    cilp.steps: 3
    clip.in.image: world.web_images
    clip.in.images: world.web_image
    clip.in.captions: null
    val.in.annotations: [world.val]
    world.seed.deeper: 3
    seed: 8
  d: {steps: none}
";
        insta::assert_snapshot!(problems(head, &["clip.in.picture=world.val", "prompts.in.classes=clip.checkpoint"], &["e"]), @r#"
        --variant e: no variant `e`; expected one of `c`, `d`
        --set clip.in.picture: no input `picture`; expected one of `images`, `captions`, `held_out_images`, `held_out`
        --set prompts.in.classes: expected classes, but `clip.checkpoint` is checkpoint
        line 4: seeds.1: expected a whole number, found eight
        line 4: seeds.2: 7 is listed twice
        line 6: variants.a,b: `a,b`: a variant's name has letters, digits, `-` and `_` only
        line 7: variants.12: `12`: a number would be read as a seed in `step@12`; add a letter
        line 8: variants.wrong: expected a mapping from what `--set` takes to values, found 3
        line 10: variants.c.step: no variable `step`, did you mean `steps`?
        line 11: variants.c.clip.step: no parameter `step`, did you mean `steps`?
        line 12: variants.c.clip.steps: expected a whole number from 0 to 4294967295, found -1
        line 13: variants.c.cilp.steps: no step `cilp`, did you mean `clip`?
        line 14: variants.c.clip.in.image: no input `image`, did you mean `images`?
        line 15: variants.c.clip.in.images: `toy/world` has no output `web_image`, did you mean `web_images`?
        line 16: variants.c.clip.in.captions: missing: `clip/pretrain` needs captions here (The caption of each picture.)
        line 17: variants.c.val.in.annotations: expected text, found ["world.val"]
        line 18: variants.c.world.seed.deeper: `seed` is not a mapping with such an entry
        line 19: variants.c.seed: a variant cannot set `seed` where the file has `seeds`
        line 28: stages.clip.with.steps: expected a whole number of 0 or more, found the text "none" (with the variant `d`)
        "#);
        let seedless = STAGES.replace("\"${seed}\"", "7");
        insta::assert_snapshot!(problems_of(&format!("variables: {{steps: 10}}\nseeds: [7]\n{seedless}"), &[], &[]), @r"
        line 4: seeds: no variable `seed`; expected `steps`
        ");
        let empty = "variables: {seed: 7, steps: 10}\nseeds: []\nvariants: {}\n";
        insta::assert_snapshot!(problems(empty, &[], &[]), @r"
        line 4: seeds: expected at least one; without `seeds`, the variable `seed` has its value
        line 5: variants: expected at least one; one that changes nothing is written `NAME: {}`
        ");
        insta::assert_snapshot!(problems("variables: {seed: 7, steps: 10}\nseeds: 3\nvariants: [a]\n", &[], &[]), @r#"
        line 4: seeds: expected a list of whole numbers, found 3
        line 5: variants: expected a mapping from names to what they change, found ["a"]
        "#);
        insta::assert_snapshot!(problems(BOTH, &["seed=some"], &["blnd"]), @r"
        --set seed: expected a whole number, found some
        --variant blnd: no variant `blnd`, did you mean `blind`?
        ");
    }

    #[test]
    fn the_request_of_an_earlier_program_is_read() {
        let request: Request = serde_json::from_str(r#"{"folder": ".", "text": "", "settings": []}"#).unwrap();
        assert!(request.variants.is_empty());
    }
}
