//! A stage: typed parameters, typed ports, units, and the work itself.
//!
//! A stage author writes a struct (its parameters, as an operator writes them under `with:`), four constants, and
//! [`Stage::run`]. A stage whose items are images also implements [`ImageStage`]: several of them then share one pass over the images.
//!
//! [`Stage::run`] receives all units that must be made, not one: a stage loads its network once and decodes the images of
//! the next unit while the network works on this one. It publishes each unit as soon as it is whole.

use std::any::Any;

use ovenbird_cache::{inputs::InputFile, shown};
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Error, Result,
    context::Context,
    pass::{self, ImageConsumer},
    ports::{Inputs, PortInfo},
    units::{Unit, Units},
};

/// A named kind of work. The implementing struct *is* its parameters.
pub trait Stage: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// Its name in pipelines, such as `clip/globals`.
    const KIND: &'static str;
    /// Raised when the same recipe would give other results.
    const VERSION: u32;
    /// The input ports.
    const INPUTS: &'static [PortInfo];
    /// The output ports.
    const OUTPUTS: &'static [PortInfo];
    /// Whether it runs a network on [`Context::device`]. A run gives such stages devices of their own; the others are given the CPU.
    const USES_DEVICE: bool = false;
    /// Whether it has items, such as images, that `on_bad_item: skip` can skip.
    const SKIPS_ITEMS: bool = false;

    /// Contradictions among the parameters, all of them, found without touching files or devices. A problem says what was expected;
    /// the value that was found is added.
    fn check(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// Divides the work into units, which are made, lost and redone as a whole. Called before every run and every plan, so it reads
    /// tables, never pixels or weights.
    fn units(&self, _inputs: &Inputs) -> Result<Units> {
        Ok(Units::One)
    }

    /// Makes the given units, in order, and publishes each by [`Context::commit`]. For a chain they are its last checkpoints.
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()>;
}

/// A stage whose items are the images of its port `annotations`, in ascending id, decoded from its port `images`. It can share a pass over
/// them with others.
pub trait ImageStage: Stage {
    /// Prepares the stage's part in a pass that makes these units.
    fn consumer<'a>(&'a self, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>>;
}

/// Makes units of an image stage in a pass of its own.
pub(crate) fn run_alone(stage: &impl ImageStage, units: &[Unit], cx: &Context<'_>) -> Result<()> {
    pass::run(&[stage.consumer(units, cx)?])
}

/// Whether a parameter has its default: one that is newer than the stage's version is left out of recipes where it has.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Something wrong with a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The parameter's path below `with`: `clip.precision`; empty for the parameters as a whole.
    pub field: String,
    /// What was expected and what was found.
    pub problem: String,
}

/// The value at a path such as `training.max_size[0]`.
fn at<'a>(params: &'a Value, field: &str) -> Option<&'a Value> {
    let mut keys = field.split(['.', '[']).map(|key| key.trim_end_matches(']'));
    keys.try_fold(params, |value, key| match value {
        Value::Array(values) => values.get(key.parse::<usize>().ok()?),
        _ => value.get(key),
    })
}

impl Problem {
    /// The problems among some parameters, each given with whether its value is allowed and which values are.
    pub(crate) fn unless(checks: &[(&str, bool, &str)]) -> Vec<Self> {
        let problem = |(field, _, expected): &(&str, bool, &str)| Self::new(*field, format!("expected {expected}"));
        checks.iter().filter(|(_, is_sound, _)| !is_sound).map(problem).collect()
    }

    /// A problem of a parameter.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// The object-safe twin of [`Stage`], for the registry and the program.
pub trait AnyStage: Any + Send + Sync {
    /// The parameters with every default filled in.
    fn params(&self) -> Value;
    /// See [`Stage::check`].
    fn check(&self) -> Vec<Problem>;
    /// See [`Stage::units`].
    fn units(&self, inputs: &Inputs) -> Result<Units>;
    /// See [`Stage::run`].
    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()>;
}

impl<S: Stage> AnyStage for S {
    fn params(&self) -> Value {
        serde_json::to_value(self).expect("BUG: parameters are plain JSON")
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Stage::check(self);
        let params = AnyStage::params(self);
        for Problem { field, problem } in &mut problems {
            if let Some(found) = at(&params, field) {
                problem.push_str(&format!(", found {}", shown(found)));
            }
        }
        problems
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Stage::units(self, inputs).map_err(|error| blame_user(error, inputs, S::INPUTS))
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        Stage::run(self, units, cx).map_err(|error| blame_user(error, cx.inputs, S::INPUTS))
    }
}

/// [`ImageStage::consumer`] of a stage whose type is known to the registry alone.
pub(crate) fn consumer<'a, S: ImageStage>(stage: &'a dyn AnyStage, units: &'a [Unit], cx: &'a Context<'a>) -> Result<ImageConsumer<'a>> {
    let stage: &dyn Any = stage;
    let stage: &S = stage.downcast_ref().expect("BUG: a stage and its entry are of one kind");
    stage.consumer(units, cx).map_err(|error| blame_user(error, cx.inputs, S::INPUTS))
}

/// Turns an error about a file that the user brought into one that the user can repair. Readers report a malformed file as damage of the
/// home, because they do not know where it came from.
fn blame_user(error: Error, inputs: &Inputs, ports: &[PortInfo]) -> Error {
    use ovenbird_cache::Error::{Flipped, Malformed, OtherFormat};
    let (path, problem) = match &error {
        Error::Cache(Malformed { path, problem }) => (path, problem.clone()),
        Error::Cache(Flipped { path, what, .. }) => (path, format!("{what} does not match the digest in the file: it is damaged")),
        Error::Cache(OtherFormat { path, found, known }) => (path, format!("expected format {known}, found {found}")),
        _ => return error,
    };
    let is_there = |file: &InputFile| file.unit.is_none() && file.path == *path;
    let port = ports.iter().find(|port| inputs.ports.get(port.name).is_some_and(|files| files.iter().any(is_there)));
    match port {
        Some(PortInfo { name, shape, .. }) => {
            let hint = Some(format!("give `{name}` {shape}"));
            Error::Data(ovenbird_data::Error::Malformed { path: path.clone(), problem, hint })
        }
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ovenbird_cache::{Digest, Fingerprint, Recipe};

    use super::*;
    use crate::{STAGES, artifacts, ports::Artifact as _};

    fn file(name: &str, unit: Option<Fingerprint>) -> InputFile {
        InputFile { name: name.into(), path: name.into(), bytes: 0, digest: Digest::of(b""), unit }
    }

    #[test]
    fn a_fault_of_a_file_that_the_user_brought_is_none_of_the_home_at_any_port() {
        let damages: [fn() -> ovenbird_cache::Error; 3] = [
            || ovenbird_cache::Error::Malformed { path: "file".into(), problem: "expected an object, found a list".into() },
            || ovenbird_cache::Error::Flipped {
                path: "file".into(),
                what: "batch 1".into(),
                expected: Digest::of(b"a"),
                found: Digest::of(b"b"),
            },
            || ovenbird_cache::Error::OtherFormat { path: "file".into(), found: 2, known: 1 },
        ];
        let recipe = Recipe { kind: "a".into(), version: 1, params: Value::Null, inputs: BTreeMap::new() };
        let unit = Some(recipe.fingerprint());
        for port in STAGES.iter().flat_map(|stage| stage.inputs) {
            for damage in damages {
                let said = |unit| {
                    let inputs = Inputs { ports: [(port.name.to_owned(), vec![file("other", None), file("file", unit)])].into() };
                    blame_user(Error::Cache(damage()), &inputs, &[*port])
                };
                let error = said(None);
                assert!(matches!(error, Error::Data(_)), "{}: {error}", port.name);
                assert_eq!(error.hint().unwrap(), format!("give `{}` {}", port.name, port.shape));
                assert!(matches!(said(unit), Error::Cache(_)), "{}", port.name);
            }
        }
    }

    #[test]
    fn a_class_list_of_another_shape_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("classes.json");
        let read = |json: &str| {
            let mut written = tempfile::NamedTempFile::new_in(&folder).unwrap();
            std::io::Write::write_all(&mut written, json.as_bytes()).unwrap();
            written.persist(&path).unwrap();
            let file = InputFile { path: path.clone(), digest: Digest::of(json.as_bytes()), ..file("classes.json", None) };
            artifacts::Classes::open(&[file]).map(|artifacts::Classes(classes)| classes).map_err(|error| error.to_string())
        };
        assert_eq!(read("\u{feff}{\"base\": [\"owl\"], \"novel\": []}").unwrap().base, ["owl"]);
        for (json, problem) in [
            (r#"["owl", "wren"]"#, "expected an object, found another value"),
            (r#"[["owl"], ["wren"]]"#, "expected an object, found another value"),
            (r#""owl""#, "expected an object, found another value"),
            (r#"{"seen": ["owl"], "unseen": []}"#, "unknown key `seen`; expected one of `base`, `novel`"),
            (r#"{"base": ["owl"]}"#, "expected the key `novel`, found none"),
            (r#"{"base": "owl", "novel": []}"#, "base: expected a list, found the text \"owl\""),
            ("<html>", "expected json, found a web page"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
