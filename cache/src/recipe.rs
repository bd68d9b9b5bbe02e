//! Recipes, their fingerprints, and the fields in which two recipes differ.
//!
//! A fingerprint is the BLAKE3 of a domain tag and the recipe's canonical JSON: keys sorted at every level, no spaces,
//! numbers as `serde_json` writes them. The manifest shows the same JSON and [`Recipe::diff`] compares it, so there is one
//! encoding to keep stable; a test pins it.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// Separates fingerprints of recipes from other uses of BLAKE3. Changing it requires a migration of all homes.
const RECIPE_DOMAIN: &str = "ovenbird recipe 1";

macro_rules! hash_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// All 64 hexadecimal digits.
            pub fn to_hex(&self) -> String {
                blake3::Hash::from_bytes(self.0).to_hex().to_string()
            }

            /// The 32 bytes.
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl From<blake3::Hash> for $name {
            fn from(hash: blake3::Hash) -> Self {
                Self(*hash.as_bytes())
            }
        }

        /// The first 12 hexadecimal digits, for messages.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.to_hex()[..12])
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = blake3::HexError;

            fn from_str(hex: &str) -> Result<Self, Self::Err> {
                blake3::Hash::from_hex(hex).map(Self::from)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.to_hex())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hash_newtype! {
    /// Identifies a result by the BLAKE3 of its recipe, before it exists.
    Fingerprint
}

hash_newtype! {
    /// Identifies existing content by its BLAKE3.
    Digest
}

impl Fingerprint {
    /// The first 32 hexadecimal digits: the name of the file or folder on disk.
    pub fn short(&self) -> String {
        self.to_hex()[..32].to_owned()
    }

    /// Derives the fingerprint of a part: a checkpoint of a training, the unit that holds certain items.
    pub fn part(&self, domain: &str, which: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(domain.as_bytes()).update(&[0]).update(&self.0).update(which);
        hasher.finalize().into()
    }
}

impl Digest {
    /// The digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        blake3::hash(bytes).into()
    }

    /// The digest of a list of named digests: a folder, a port, a unit's items. It depends on the names and their order.
    pub fn of_list<'a>(domain: &str, entries: impl IntoIterator<Item = (&'a str, Self)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(domain.as_bytes()).update(&[0]);
        for (name, digest) in entries {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(digest.as_bytes());
        }
        hasher.finalize().into()
    }
}

/// Everything that a result depends on: equal recipes give the same result.
///
/// The manifest holds the whole recipe. It is hashed for look-up, and compared field by field to say *why* a step must run again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The stage, such as `clip/globals`.
    pub kind: String,
    /// Raised by the stage's author when the same parameters and inputs give other results.
    pub version: u32,
    /// The typed parameters with every default filled in.
    pub params: Value,
    /// Content digest of each input by port.
    pub inputs: BTreeMap<String, Digest>,
}

impl Recipe {
    /// The fingerprint of the result.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut value = serde_json::to_value(self).expect("BUG: a recipe is plain JSON");
        // Another crate in the build may enable serde_json's `preserve_order`.
        value.sort_all_objects();
        let mut hasher = blake3::Hasher::new();
        hasher.update(RECIPE_DOMAIN.as_bytes()).update(&[0]).update(value.to_string().as_bytes());
        hasher.finalize().into()
    }

    /// The fields that differ from an earlier recipe, in a fixed order; empty if the recipes are equal.
    pub fn diff(&self, was: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.kind != was.kind {
            changes.push(Change { field: "use".into(), was: Some(was.kind.clone()), is: Some(self.kind.clone()) });
        }
        if self.version != was.version {
            let (was, is) = (Some(was.version.to_string()), Some(self.version.to_string()));
            changes.push(Change { field: "stage version".into(), was, is });
        }
        diff_values("with", &was.params, &self.params, &mut changes);
        let mut ports: Vec<&String> = was.inputs.keys().chain(self.inputs.keys()).collect();
        ports.sort();
        ports.dedup();
        for port in ports {
            let (was, is) = (was.inputs.get(port), self.inputs.get(port));
            if was != is {
                let (was, is) = (was.map(Digest::to_string), is.map(Digest::to_string));
                changes.push(Change { field: format!("in.{port}"), was, is });
            }
        }
        changes
    }
}

/// One field in which two recipes differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The field's path: `with.expand`, `in.proposals`, `stage version`.
    pub field: String,
    /// The earlier value; `None` if the field was absent.
    pub was: Option<String>,
    /// The new value; `None` if the field is absent.
    pub is: Option<String>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let absent = "(absent)";
        write!(f, "{}: {} -> {}", self.field, self.was.as_deref().unwrap_or(absent), self.is.as_deref().unwrap_or(absent))
    }
}

fn diff_values(field: &str, was: &Value, is: &Value, changes: &mut Vec<Change>) {
    match (was, is) {
        (Value::Object(was), Value::Object(is)) => {
            let mut keys: Vec<&String> = was.keys().chain(is.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let field = format!("{field}.{key}");
                match (was.get(key), is.get(key)) {
                    (Some(was), Some(is)) => diff_values(&field, was, is, changes),
                    (was, is) => changes.push(Change { field, was: was.map(shown), is: is.map(shown) }),
                }
            }
        }
        (was, is) if was == is => {}
        (was, is) => changes.push(Change { field: field.into(), was: Some(shown(was)), is: Some(shown(is)) }),
    }
}

/// A value on one line, as in a pipeline file. A number that was stored in single precision is written with its shortest digits: 0.4, not
/// 0.4000000059604645.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("[{}]", values.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            let entries = entries.iter().map(|(key, value)| format!("{key}: {}", shown(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(double) if f64::from(double as f32).to_bits() == double.to_bits() => format!("{:?}", double as f32),
            _ => number.to_string(),
        },
        Value::Null | Value::Bool(_) | Value::String(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            kind: "clip/objects".into(),
            version: 1,
            params: json!({"expand": 1.5, "clip": {"precision": "bf16"}}),
            inputs: BTreeMap::from([("images".into(), Digest::of(b"images")), ("proposals".into(), Digest::of(b"proposals"))]),
        }
    }

    /// Existing artifacts are found by these fingerprints: they change only in a commit that says so.
    #[test]
    fn recipes_keep_their_fingerprints() {
        let empty = Recipe { kind: "toy/world".into(), version: 1, params: json!({}), inputs: BTreeMap::new() };
        let found = [empty.fingerprint(), recipe().fingerprint(), recipe().fingerprint().part("test 1", b"3")].map(|name| name.to_hex());
        assert_eq!(
            found,
            [
                "b772369daba0e1b63621e4b4a91c5e734a8259644d484d95ae16983fc619d304",
                "c12271dcbe0b5e71573c7b5d814a007ee8d107ab3b520268b0702150e82ffc88",
                "63eaab562efcda4c6f84b57f8e3de29e07c17f90eeaccac35e7eac6bbe886f2e",
            ]
        );
    }

    #[test]
    fn the_order_of_keys_does_not_change_the_fingerprint() {
        let params = serde_json::from_str(r#"{"clip": {"precision": "bf16"}, "expand": 1.5}"#).unwrap();
        assert_eq!(Recipe { params, ..recipe() }.fingerprint(), recipe().fingerprint());
    }

    #[test]
    fn every_field_changes_the_fingerprint_and_is_named() {
        let mut swapped = recipe();
        swapped.inputs = BTreeMap::from([("images".into(), Digest::of(b"proposals")), ("proposals".into(), Digest::of(b"images"))]);
        let swapped_words = format!("in.images: {} -> {}", Digest::of(b"images"), Digest::of(b"proposals"));
        let cases = [
            (Recipe { kind: "clip/globals".into(), ..recipe() }, "use: clip/objects -> clip/globals"),
            (Recipe { version: 2, ..recipe() }, "stage version: 1 -> 2"),
            (Recipe { params: json!({"expand": 2.0, "clip": {"precision": "bf16"}}), ..recipe() }, "with.expand: 1.5 -> 2.0"),
            // As `0.4_f32` and `[0.7_f32]` are stored.
            (Recipe { params: json!({"expand": 0.4_f32, "clip": {"precision": "bf16"}}), ..recipe() }, "with.expand: 1.5 -> 0.4"),
            (
                Recipe { params: json!({"expand": [0.7_f32, 0.1], "clip": {"precision": "bf16"}}), ..recipe() },
                "with.expand: 1.5 -> [0.7, 0.1]",
            ),
            (
                Recipe { params: json!({"expand": 1.5, "clip": {"precision": "f32"}}), ..recipe() },
                r#"with.clip.precision: "bf16" -> "f32""#,
            ),
            (Recipe { params: json!({"expand": 1.5}), ..recipe() }, r#"with.clip: {precision: "bf16"} -> (absent)"#),
            (swapped, &swapped_words),
        ];
        for (changed, words) in cases {
            assert_ne!(changed.fingerprint(), recipe().fingerprint(), "{words}");
            assert_eq!(changed.diff(&recipe())[0].to_string(), words);
        }
        assert_eq!(recipe().diff(&recipe()), []);
    }

    proptest! {
        #[test]
        fn recipes_differ_in_fingerprint_exactly_when_they_differ(a in params(), b in params()) {
            let (a, b) = (Recipe { params: a, ..recipe() }, Recipe { params: b, ..recipe() });
            prop_assert_eq!(a == b, a.fingerprint() == b.fingerprint());
            prop_assert_eq!(a == b, a.diff(&b).is_empty());
        }

        #[test]
        fn recipes_survive_json(params in params()) {
            let recipe = Recipe { params, ..recipe() };
            let read: Recipe = serde_json::from_str(&serde_json::to_string(&recipe).unwrap()).unwrap();
            prop_assert_eq!(read.fingerprint(), recipe.fingerprint());
        }
    }

    fn params() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            (0..3i64).prop_map(Value::from),
            (-1e3..1e3f64).prop_map(Value::from),
            "[ab]{0,2}".prop_map(Value::from)
        ];
        prop::collection::btree_map("[abc]", leaf, 0..3).prop_map(|map| Value::Object(map.into_iter().collect()))
    }
}
