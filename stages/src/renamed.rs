//! Names of parameters and stages before 0.1.0, so that an old pipeline file is refused with the new name.

use std::collections::BTreeSet;

use schemars::Schema;
use serde_json::Value;

use crate::Problem;

/// Old and new names of parameters. `groups.*.` stands for the parameters of one group.
const PARAMETERS: &[(&str, &str)] = &[
    ("accumulate", "accumulation_steps"),
    ("average", "ema_decay"),
    ("batch", "batch_size"),
    ("checkpoints", "keep_checkpoints"),
    ("decay", "lr_schedule"),
    ("decay_epochs", "lr_epochs"),
    ("decay_steps", "lr_steps"),
    ("fits", "max_size` and `min_size"),
    ("gain", "weight"),
    ("groups.*.decay", "decay_mult"),
    ("groups.*.rate", "lr_mult"),
    ("joined", "ensemble"),
    ("label_warm_up", "label_warmup"),
    ("learning_rate", "lr"),
    ("longer_side", "max_size"),
    ("most_gradient", "clip_grad_norm"),
    ("most_per_image", "max_per_image"),
    ("number", "metric"),
    ("of", "iou_type"),
    ("overfull", "sum_above_one"),
    ("relations", "relation_loss"),
    ("shorter_side", "min_size"),
    ("steps_per_unit", "checkpoint_every"),
    ("stored", "dtype"),
    ("view", "resize"),
    ("warm_up_steps", "warmup_steps"),
];

/// Old and new values of parameters, by the parameter's name.
const VALUES: &[(&str, &str, &str)] = &[("keep", "all-min", "all-annotated")];

/// Old and new kinds of stages.
const KINDS: &[(&str, &str)] = &[("coco/split", "annotations/split")];

/// The kind that a stage of this old kind has now.
pub fn renamed_kind(old: &str) -> Option<&'static str> {
    KINDS.iter().find(|(kind, _)| *kind == old).map(|(_, new)| *new)
}

/// The first parameter, or value of one, that still has its old name. `schema`: that of the stage's parameters, which has the new name.
pub fn renamed_parameter(parameters: &Value, schema: &Schema) -> Option<Problem> {
    let mut fields = BTreeSet::new();
    collect_fields(schema.as_value(), &mut fields);
    find(parameters, "", Keys::Parameters, &fields)
}

/// The names of all parameters in a schema, at any depth.
fn collect_fields<'a>(schema: &'a Value, fields: &mut BTreeSet<&'a str>) {
    match schema {
        Value::Object(object) => {
            fields.extend(object.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name.as_str()));
            object.values().for_each(|value| collect_fields(value, fields));
        }
        Value::Array(list) => list.iter().for_each(|value| collect_fields(value, fields)),
        _ => {}
    }
}

/// The parameters that a new name stands for.
fn names(new: &str) -> impl Iterator<Item = &str> {
    new.split("` and `")
}

/// The keys of a mapping of parameters.
#[derive(Clone, Copy, PartialEq)]
enum Keys {
    Parameters,
    /// Names of groups, which the user chooses.
    Groups,
    /// The parameters of one group.
    OfGroup,
}

/// Looks below `path`.
fn find(value: &Value, path: &str, keys: Keys, fields: &BTreeSet<&str>) -> Option<Problem> {
    value.as_object()?.iter().find_map(|(key, value)| {
        let field = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let pattern = if keys == Keys::OfGroup { format!("groups.*.{key}") } else { key.clone() };
        let is_renamed = |(old, new): &&(&str, &str)| *old == pattern && names(new).all(|new| fields.contains(new));
        if keys != Keys::Groups
            && let Some((_, new)) = PARAMETERS.iter().find(is_renamed)
        {
            return Some(Problem::new(field, format!("`{key}` is now called `{new}`")));
        }
        let is_renamed = |(parameter, old, _): &&(&str, &str, &str)| parameter == key && value == old && fields.contains(parameter);
        if let Some((_, old, new)) = VALUES.iter().find(is_renamed) {
            return Some(Problem::new(field, format!("the value `{old}` is now called `{new}`")));
        }
        let below = match keys {
            Keys::Groups => Keys::OfGroup,
            Keys::Parameters if key == "groups" => Keys::Groups,
            Keys::Parameters | Keys::OfGroup => Keys::Parameters,
        };
        find(value, &field, below, fields)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::STAGES;

    #[test]
    fn no_stage_has_an_old_name_and_every_new_name_is_one_of_a_stage() {
        let schemas: Vec<Schema> = STAGES.iter().map(|stage| (stage.schema)()).collect();
        let mut fields = BTreeSet::new();
        schemas.iter().for_each(|schema| collect_fields(schema.as_value(), &mut fields));
        for (old, new) in PARAMETERS {
            assert!(!fields.contains(old), "{old}");
            assert!(names(new).all(|new| fields.contains(new)), "{new}");
        }
        for (old, new) in KINDS {
            assert!(crate::find(old).is_none() && crate::find(new).is_some(), "{old}");
        }
    }

    #[test]
    fn old_names_are_refused_with_the_new_ones() {
        for (kind, parameters, field, new) in [
            ("clip/globals", json!({"view": "native"}), "view", "`resize`"),
            ("detector/train", json!({"training": {"decay": "cosine"}}), "training.decay", "`lr_schedule`"),
            ("detector/train", json!({"training": {"groups": {"view": {"decay": 0.5}}}}), "training.groups.view.decay", "`decay_mult`"),
            ("oln/train", json!({"training": {"groups": {"a.b": {"rate": 0.5}}}}), "training.groups.a.b.rate", "`lr_mult`"),
            ("detector/import", json!({"fits": [1333, 800]}), "fits", "`max_size` and `min_size`"),
            ("annotations/split", json!({"keep": "all-min"}), "keep", "`all-annotated`"),
        ] {
            let problem = (crate::find(kind).unwrap().parse)(&parameters).err().unwrap();
            assert_eq!(problem.field, field);
            assert!(problem.problem.ends_with(&format!("is now called {new}")), "{}", problem.problem);
        }
        // A stage without the new name never had the old one.
        let other = (crate::find("eval/coco").unwrap().parse)(&json!({"view": "native"})).err().unwrap();
        assert!(other.problem.starts_with("unknown key `view`"), "{}", other.problem);
        let group = json!({"training": {"groups": {"view": {"decay_mult": 0.5}}}});
        assert!((crate::find("detector/train").unwrap().parse)(&group).is_ok());
    }
}
