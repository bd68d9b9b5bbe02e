//! `ovenbird schema`: a JSON Schema of pipeline files.

use ovenbird_stages::{PortInfo, Presence, STAGES};
use serde_json::{Map, Value, json};

use crate::{
    error::Result,
    output::print,
    pipeline::file::{MAX_FAILED_RATIO, MAX_SILENCE, VERSION},
};

/// Print a JSON Schema of pipeline files, for editors
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn schema(Args {}: &Args) -> Result<()> {
    let text = |description: &str| json!({"type": "string", "description": description});
    let (mut definitions, mut conditions) = (Map::new(), Vec::new());
    for entry in STAGES {
        let mut with = Value::from((entry.schema)());
        if let Some(with) = with.as_object_mut() {
            with.remove("$schema");
            if let Some(Value::Object(mut own)) = with.remove("$defs") {
                definitions.append(&mut own);
            }
        }
        let port = |port: &PortInfo| (port.name.to_owned(), text(&format!("{}: {}", port.kind, port.doc)));
        let inputs: Map<String, Value> = entry.inputs.iter().map(port).collect();
        let required: Vec<&str> = entry.inputs.iter().filter(|port| port.presence == Presence::Required).map(|port| port.name).collect();
        let inputs = json!({"type": "object", "properties": inputs, "required": required, "additionalProperties": false});
        let is_used = json!({"properties": {"use": {"const": entry.kind}}});
        conditions.push(json!({"if": is_used, "then": {"properties": {"with": with, "in": inputs}}}));
    }
    let resources = json!({
        "type": "object",
        "description": "What the step uses while it runs",
        "properties": {
            "cpu": {"type": "integer", "minimum": 1, "default": 1},
            "memory": {"type": "string", "pattern": r"^[0-9.]+ ?([KMGT]i?B|kB)$", "default": "1GiB"},
            "gpu": {"type": "integer", "minimum": 0, "default": 0, "description": "How many devices of --device the step takes; 0: one, or, for steps that process images, all that are free"},
        },
        "additionalProperties": false,
    });
    let kinds: Vec<&str> = STAGES.iter().map(|entry| entry.kind).collect();
    let stage = json!({
        "type": "object",
        "required": ["id", "use"],
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$", "description": "How other stages refer to it"},
            "use": {"enum": kinds, "description": "The kind of work: see `ovenbird stages`"},
            "in": {"type": "object", "description": "Inputs: `stage.output`, or a path with a slash"},
            "with": {"type": "object", "description": "Parameters"},
            "rounds": {"description": "How often the step is repeated, a number or a variable: see docs/operating.md, Rounds"},
            "resources": resources,
            "on_bad_item": {"enum": ["fail", "skip"], "default": "fail", "description": "What to do with an item that cannot be read: fail, or skip it and report it"},
            "max_silence_s": {"type": "integer", "minimum": 1, "default": MAX_SILENCE.as_secs(), "description": "The stage fails as hanging after so many seconds without progress"},
            "max_failed_ratio": {"type": "number", "minimum": 0, "maximum": 1, "default": MAX_FAILED_RATIO, "description": "With `on_bad_item: skip`: the stage fails if more than this fraction of its items fails"},
        },
        "additionalProperties": false,
        "allOf": conditions,
    });
    let document = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Ovenbird pipeline",
        "type": "object",
        "required": ["version", "name", "stages"],
        "properties": {
            "version": {"const": VERSION},
            "name": text("The name under which runs are listed"),
            "description": text("A sentence about it"),
            "variables": {"type": "object", "description": "Names with default values, used as ${name}, changed by --set name=value"},
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": true, "description": "Values of the variable `seed`: every stage that depends on it runs once for each"},
            "variants": {
                "type": "object",
                "description": "By name, the changes of each variant: `variable`, `step.parameter`, `step.in.input` (null removes an input) or `step.use`. The others are compared with the first",
                "minProperties": 1,
                "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
                "additionalProperties": {"type": ["object", "null"]},
            },
            "stages": {"type": "array", "items": stage},
        },
        "additionalProperties": false,
        "$defs": definitions,
    });
    Ok(print(&format!("{}\n", serde_json::to_string_pretty(&document).expect("BUG: a schema is plain JSON")))?)
}
