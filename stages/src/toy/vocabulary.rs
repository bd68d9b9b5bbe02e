//! `toy/vocabulary`: words beside the classes of the toy world.

use std::collections::BTreeMap;

use ovenbird_data::toy;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Context, Out, PortInfo, Result, Stage, Unit, artifacts::PublishedVocabulary};

/// Words beside the classes of the toy world: it takes the place of V3Det's names, in their form.
///
/// The 84 combinations of pattern, colour and shape that no class has, 36 of colour and shape, 24 of pattern and shape, and the six shapes.
/// (RALF, section 12.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Vocabulary {}

const VOCABULARY: Out<PublishedVocabulary> = Out::new("vocabulary", r#"150 names, json: `{"0": "plain red cross", "1": ...}`."#);

impl Stage for Vocabulary {
    const KIND: &'static str = "toy/vocabulary";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[];
    const OUTPUTS: &'static [PortInfo] = &[VOCABULARY.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let names = toy::vocabulary();
        let rows: Vec<String> = names.iter().enumerate().map(|(place, name)| format!("\"{place}\": \"{name}\"")).collect();
        let draft = cx.begin(unit)?;
        draft.write(VOCABULARY, "v3det_toy.json", format!("{{{}}}", rows.join(", ")).as_bytes())?;
        cx.tick(1);
        cx.commit(draft, BTreeMap::from([("names".to_owned(), names.len().into())]))
    }
}
