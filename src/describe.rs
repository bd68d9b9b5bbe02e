//! What the program says about itself, made from the types: `ovenbird stages` and `ovenbird schema`.

use ovenbird_stages::{PortInfo, Presence, STAGES, StageEntry};
use serde_json::{Map, Value, json};

use crate::{
    cli::to_json,
    error::{Error, Result},
    pipeline::{self, nearest},
};

/// `ovenbird stages [KIND]`.
pub(crate) fn stages(kind: Option<&str>, json: bool) -> Result<String> {
    let chosen: Vec<&StageEntry> = match kind {
        None => STAGES.iter().collect(),
        Some(kind) => {
            let found = ovenbird_stages::find(kind).ok_or_else(|| Error::Usage {
                problem: format!("no stage `{kind}`"),
                hint: match nearest(kind, STAGES.iter().map(|entry| entry.kind)) {
                    Some(nearest) => format!("did you mean `{nearest}`? `ovenbird stages` lists them"),
                    None => "`ovenbird stages` lists them".into(),
                },
            })?;
            vec![found]
        }
    };
    if json {
        return Ok(to_json("stages", &chosen.iter().map(|entry| as_json(entry)).collect::<Vec<_>>()));
    }
    if kind.is_some() {
        return Ok(chosen.iter().map(|entry| page(entry)).collect());
    }
    let width = STAGES.iter().map(|entry| entry.kind.len()).max().unwrap_or(0);
    let line = |entry: &&StageEntry| format!("{:width$}  {}\n", entry.kind, first_sentence(&entry.doc()));
    Ok(chosen.iter().map(line).collect())
}

fn first_sentence(doc: &str) -> String {
    doc.split("\n\n").next().unwrap_or_default().replace('\n', " ").trim_end_matches('.').to_owned()
}

fn as_json(entry: &StageEntry) -> Value {
    let ports = |ports: &[PortInfo]| -> Vec<Value> {
        ports
            .iter()
            .map(|port| json!({"name": port.name, "kind": port.kind, "required": port.presence == Presence::Required, "doc": port.doc}))
            .collect()
    };
    let (inputs, outputs) = (ports(entry.inputs), ports(entry.outputs));
    json!({"kind": entry.kind, "version": entry.version, "inputs": inputs, "outputs": outputs, "parameters": (entry.schema)()})
}

fn page(entry: &StageEntry) -> String {
    let mut text = format!("{} (version {})\n\n{}\n", entry.kind, entry.version, indented(&entry.doc(), "  "));
    for (title, ports) in [("Inputs", entry.inputs), ("Outputs", entry.outputs)] {
        if ports.is_empty() {
            continue;
        }
        text.push_str(&format!("\n{title}\n"));
        for port in ports {
            let optional = if port.presence == Presence::Optional { ", may be left out" } else { "" };
            text.push_str(&format!("  {}: {}{optional}\n{}\n", port.name, port.kind, indented(port.doc, "      ")));
        }
    }
    let schema = (entry.schema)();
    let definitions = schema.get("$defs").cloned().unwrap_or_default();
    if let Some(properties) = schema.get("properties").and_then(Value::as_object).filter(|properties| !properties.is_empty()) {
        text.push_str("\nParameters\n");
        push_properties(&mut text, properties, &definitions, "  ");
    }
    text
}

fn push_properties(text: &mut String, properties: &Map<String, Value>, definitions: &Value, indent: &str) {
    for (name, schema) in properties {
        let lists = |key: &str, what: Value| schema.get(key).and_then(Value::as_array).is_some_and(|listed| listed.contains(&what));
        let is_optional = lists("anyOf", json!({"type": "null"})) || lists("type", json!("null"));
        let default = match schema.get("default") {
            // A parameter in single precision is not shown with the digits of double precision.
            Some(Value::Number(number)) if number.is_f64() => format!(" = {:?}", number.as_f64().unwrap_or(f64::NAN) as f32),
            Some(default) => format!(" = {default}"),
            None if is_optional => " (may be left out)".into(),
            None => " (must be given)".into(),
        };
        text.push_str(&format!("{indent}{name}: {}{default}\n", type_words(schema, definitions)));
        if let Some(doc) = schema.get("description").and_then(Value::as_str) {
            text.push_str(&format!("{}\n", indented(doc, &format!("{indent}    "))));
        }
        push_details(text, schema, definitions, &format!("{indent}    "));
    }
}

/// What the parts of a parameter mean: its values, where it has a few, and the entries of a mapping.
fn push_details(text: &mut String, schema: &Value, definitions: &Value, indent: &str) {
    let schema = resolved(schema, definitions);
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        push_properties(text, properties, definitions, indent);
    }
    for case in ["oneOf", "anyOf"].into_iter().filter_map(|cases| schema.get(cases)?.as_array()).flatten() {
        match (case.get("const").and_then(Value::as_str), case.get("description").and_then(Value::as_str)) {
            (Some(value), Some(doc)) => {
                let doc = indented(&format!("{value}: {doc}"), &format!("{indent}  "));
                text.push_str(&format!("{indent}{}\n", doc.trim_start()));
            }
            _ => push_details(text, case, definitions, indent),
        }
    }
}

/// What a schema refers to, or itself.
fn resolved<'a>(schema: &'a Value, definitions: &'a Value) -> &'a Value {
    let one = schema.get("allOf").and_then(Value::as_array).and_then(|all| all.first()).unwrap_or(schema);
    let name = one.get("$ref").and_then(Value::as_str).and_then(|reference| reference.rsplit('/').next());
    name.and_then(|name| definitions.get(name)).unwrap_or(one)
}

/// A type in words: `integer`, `one of f16, bf16, f32`, `a mapping with base, novel`.
fn type_words(schema: &Value, definitions: &Value) -> String {
    let schema = resolved(schema, definitions);
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return format!("one of {}", words_of(values));
    }
    for alternatives in ["oneOf", "anyOf"] {
        if let Some(cases) = schema.get(alternatives).and_then(Value::as_array) {
            let given = cases.iter().filter(|case| case.get("type").is_none_or(|kind| kind != "null"));
            let words: Vec<String> = given.map(|case| type_words(case, definitions)).collect();
            return words.join(" or ");
        }
    }
    if let Some(value) = schema.get("const") {
        return value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    }
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        return format!("a mapping with {}", properties.keys().cloned().collect::<Vec<_>>().join(", "));
    }
    match schema.get("type") {
        Some(Value::String(kind)) if kind == "array" => {
            let items = schema.get("items").map_or_else(|| "anything".into(), |items| type_words(items, definitions));
            format!("a list of {items}")
        }
        Some(Value::String(kind)) => kind.clone(),
        Some(Value::Array(kinds)) => words_of(&kinds.iter().filter(|kind| *kind != "null").cloned().collect::<Vec<_>>()),
        _ => "anything".into(),
    }
}

fn words_of(values: &[Value]) -> String {
    values.iter().map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
}

fn indented(text: &str, indent: &str) -> String {
    text.lines().map(|line| format!("{indent}{line}").trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// `ovenbird schema`: a JSON Schema of pipeline files.
pub(crate) fn schema() -> String {
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
        "description": "What the stage occupies while it runs",
        "properties": {
            "cpu": {"type": "integer", "minimum": 1, "default": 1},
            "memory": {"type": "string", "pattern": r"^[0-9.]+ ?([KMGT]i?B|kB)$", "default": "1GiB"},
            "gpu": {"type": "integer", "minimum": 0, "default": 0, "description": "How many of the devices of --device the stage waits for and takes; 0: one, or, where its units hold images, all that are free"},
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
            "resources": resources,
            "on_bad_item": {"enum": ["fail", "skip"], "default": "fail", "description": "What to do about an item that cannot be read or understood"},
            "max_silence_s": {"type": "integer", "minimum": 1, "default": pipeline::MAX_SILENCE.as_secs(), "description": "After so many seconds without any progress the stage counts as hanging, and has failed"},
            "max_failed_ratio": {"type": "number", "minimum": 0, "maximum": 1, "default": pipeline::MAX_FAILED_RATIO, "description": "With `on_bad_item: skip`: the stage fails once more than this part of its items has"},
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
            "version": {"const": pipeline::VERSION},
            "name": text("How runs of it are listed"),
            "description": text("What it is for, in a sentence"),
            "variables": {"type": "object", "description": "Names with default values, used as ${name}, changed by --set name=value"},
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": true, "description": "Values of the variable `seed`: everything that depends on it is made with each"},
            "variants": {
                "type": "object",
                "description": "By name, what each changes: `variable`, `stage.parameter` or `stage.in.input` (null takes an input away). The first is what the others are compared with",
                "minProperties": 1,
                "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
                "additionalProperties": {"type": ["object", "null"]},
            },
            "stages": {"type": "array", "items": stage},
        },
        "additionalProperties": false,
        "$defs": definitions,
    });
    format!("{}\n", serde_json::to_string_pretty(&document).expect("BUG: a schema is plain JSON"))
}
