//! `ovenbird stages`: the stages, with their documentation from the types.

use ovenbird_cache::shown;
use ovenbird_data::words::nearest;
use ovenbird_stages::{PortInfo, Presence, STAGES, StageEntry};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    output::{print, to_json},
};

/// List the stages, or document one: inputs, outputs, parameters, defaults
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A stage's kind, such as clip/globals
    kind: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn stages(Args { kind, json }: &Args) -> Result<()> {
    let chosen: Vec<&StageEntry> = match kind {
        None => STAGES.iter().collect(),
        Some(kind) => {
            let found = ovenbird_stages::find(kind).ok_or_else(|| Error::Usage {
                problem: format!("no stage `{kind}`"),
                hint: match nearest(kind, STAGES.iter().map(|entry| entry.kind)) {
                    Some(nearest) => format!("did you mean `{nearest}`? `ovenbird stages` lists all"),
                    None => "`ovenbird stages` lists all".into(),
                },
            })?;
            vec![found]
        }
    };
    if *json {
        return Ok(print(&to_json("stages", &chosen.iter().map(|entry| as_json(entry)).collect::<Vec<_>>()))?);
    }
    if kind.is_some() {
        return Ok(print(&chosen.iter().map(|entry| page(entry)).collect::<String>())?);
    }
    let width = STAGES.iter().map(|entry| entry.kind.len()).max().unwrap_or(0);
    let line = |entry: &&StageEntry| format!("{:width$}  {}\n", entry.kind, first_sentence(&entry.doc()));
    Ok(print(&chosen.iter().map(line).collect::<String>())?)
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
            let optional = if port.presence == Presence::Optional { ", optional" } else { "" };
            text.push_str(&format!("  {}: {}{optional}\n{}\n", port.name, port.kind, indented(port.doc, "      ")));
        }
    }
    let schema = (entry.schema)();
    let definitions = schema.get("$defs").cloned().unwrap_or_default();
    if schema.get("properties").and_then(Value::as_object).is_some_and(|properties| !properties.is_empty()) {
        text.push_str("\nParameters\n");
        push_properties(&mut text, schema.as_value(), &definitions, &Value::Null, "  ");
    }
    text
}

/// Documents the fields of a schema. `defaults`: those of the mapping, which replace the fields' own.
fn push_properties(text: &mut String, schema: &Value, definitions: &Value, defaults: &Value, indent: &str) {
    let is_required = |name: &str| schema.get("required").and_then(Value::as_array).is_some_and(|names| names.contains(&json!(name)));
    for (name, schema) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let default = defaults.get(name).or_else(|| schema.get("default"));
        let words = match default {
            // The fields have theirs below.
            Some(Value::Object(fields)) if !fields.is_empty() => String::new(),
            Some(default) => format!(" = {}", shown(default)),
            None if is_required(name) => " (required)".into(),
            None => " (optional)".into(),
        };
        text.push_str(&format!("{indent}{name}: {}{words}\n", type_words(schema, definitions)));
        if let Some(doc) = schema.get("description").and_then(Value::as_str) {
            text.push_str(&format!("{}\n", indented(doc, &format!("{indent}    "))));
        }
        push_details(text, schema, definitions, default.unwrap_or(&Value::Null), &format!("{indent}    "));
    }
}

/// Documents the values of a parameter that has a few, and the entries of a mapping.
fn push_details(text: &mut String, schema: &Value, definitions: &Value, defaults: &Value, indent: &str) {
    let schema = resolved(schema, definitions);
    push_properties(text, schema, definitions, defaults, indent);
    for case in ["oneOf", "anyOf"].into_iter().filter_map(|cases| schema.get(cases)?.as_array()).flatten() {
        match (case.get("const").and_then(Value::as_str), case.get("description").and_then(Value::as_str)) {
            (Some(value), Some(doc)) => {
                let doc = indented(&format!("{value}: {doc}"), &format!("{indent}  "));
                text.push_str(&format!("{indent}{}\n", doc.trim_start()));
            }
            _ => push_details(text, case, definitions, defaults, indent),
        }
    }
}

/// The definition that a schema refers to, or the schema itself.
fn resolved<'a>(schema: &'a Value, definitions: &'a Value) -> &'a Value {
    let one = schema.get("allOf").and_then(Value::as_array).and_then(|all| all.first()).unwrap_or(schema);
    let name = one.get("$ref").and_then(Value::as_str).and_then(|reference| reference.rsplit('/').next());
    name.and_then(|name| definitions.get(name)).unwrap_or(one)
}

/// A type in words: `whole number`, `one of f16, bf16, f32`, `a list of text`.
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
    match schema.get("type") {
        Some(Value::String(kind)) if kind == "array" => {
            let items = schema.get("items").map_or_else(|| "anything".into(), |items| type_words(items, definitions));
            format!("a list of {items}")
        }
        Some(Value::String(kind)) => type_name(kind).into(),
        Some(Value::Array(kinds)) => {
            let given = kinds.iter().filter_map(Value::as_str).filter(|kind| *kind != "null");
            given.map(type_name).collect::<Vec<_>>().join(" or ")
        }
        _ => "anything".into(),
    }
}

/// A type of JSON in plain words.
fn type_name(kind: &str) -> &str {
    match kind {
        "integer" => "whole number",
        "string" => "text",
        "boolean" => "true or false",
        "object" => "a mapping",
        other => other,
    }
}

fn words_of(values: &[Value]) -> String {
    values.iter().map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
}

fn indented(text: &str, indent: &str) -> String {
    text.lines().map(|line| format!("{indent}{line}").trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
