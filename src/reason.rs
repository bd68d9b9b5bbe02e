//! Reasons why a step runs, in words: inputs and the steps that they come from have names. Logs and JSON forms have the digests.

use std::collections::BTreeMap;

use crate::pipeline::{Pipeline, Source, Step};

/// The source of each input of a step: `world.train`, `./labels.json`.
pub(crate) type Sources = BTreeMap<String, String>;

/// The sources of a step's inputs.
pub(crate) fn sources(pipeline: &Pipeline, step: &Step) -> Sources {
    let named = |(port, source): (&String, &Source)| {
        let source = match source {
            Source::File(path) => path.display().to_string(),
            Source::Step { step, port } => format!("{}.{port}", pipeline.steps[*step].id),
        };
        (port.clone(), source)
    };
    step.inputs.iter().map(named).collect()
}

/// A reason in words; one about an input (`in.PORT: OLD -> NEW`) names the source of the input, others stay.
pub(crate) fn in_words(reason: &str, sources: &Sources) -> String {
    let change = reason.strip_prefix("in.").and_then(|rest| rest.split_once(": "));
    let Some((port, (was, is))) = change.and_then(|(port, change)| Some((port, change.split_once(" -> ")?))) else {
        return reason.to_owned();
    };
    let verb = match (was, is) {
        ("(absent)", _) => "is new",
        (_, "(absent)") => "is no longer given",
        _ => "changed",
    };
    let source = match sources.get(port) {
        None => String::new(),
        Some(path) if path.contains('/') => format!(" ({path})"),
        Some(output) => format!(" (from `{}`)", output.rsplit_once('.').map_or(output.as_str(), |(step, _)| step)),
    };
    format!("input `{port}` {verb}{source}")
}

/// Several reasons in one line.
pub(crate) fn listed(reasons: &[String], sources: &Sources) -> String {
    reasons.iter().map(|reason| in_words(reason, sources)).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_named_with_its_source_and_without_digests() {
        let sources = Sources::from([("captions".into(), "world@a,7.web".into()), ("annotations".into(), "./labels.json".into())]);
        let check = |reason: &str, expected: &str| assert_eq!(in_words(reason, &sources), expected);
        check("in.captions: 65ada2b2ae98 -> d4f387b8d1e3", "input `captions` changed (from `world@a,7`)");
        check("in.annotations: 65ada2b2ae98 -> d4f387b8d1e3", "input `annotations` changed (./labels.json)");
        check("in.annotations: (absent) -> d4f387b8d1e3", "input `annotations` is new (./labels.json)");
        check("in.boxes: d4f387b8d1e3 -> (absent)", "input `boxes` is no longer given");
        check("with.nms_iou: 0.5 -> 0.4", "with.nms_iou: 0.5 -> 0.4");
        check("first run", "first run");
    }
}
