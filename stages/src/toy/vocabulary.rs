//! `toy/vocabulary`: words beside the classes of the toy world.

use std::collections::BTreeMap;

use ovenbird_data::toy;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Out, PortInfo, Result, Stage, Unit,
    artifacts::{Descriptions, Phrase, Phrases, PublishedVocabulary},
};

/// Words beside the classes of the toy world: it takes the place of V3Det's names, in their form, and of phrases from descriptions.
///
/// Descriptions of the classes take the place of those that PromptDet's authors wrote.
///
/// The 84 combinations of pattern, colour and shape that no class has, 36 of colour and shape, 24 of pattern and shape, and the six shapes.
/// (RALF, section 12.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Vocabulary {}

const VOCABULARY: Out<PublishedVocabulary> = Out::new("vocabulary", r#"150 names, json: `{"0": "plain red cross", "1": ...}`."#);
const STRICT: Out<PublishedVocabulary> = Out::new("strict", "The first 84 of these, the combinations, json: a list.");
const PHRASES: Out<Phrases> = Out::new("phrases", "100 phrases of what these combinations are described by, with their names.");
const DESCRIPTIONS: Out<Descriptions> =
    Out::new("descriptions", r#"A description of each class, json: `{"striped red circle": "a circle in red, with stripes", ...}`."#);

impl Stage for Vocabulary {
    const KIND: &'static str = "toy/vocabulary";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[];
    const OUTPUTS: &'static [PortInfo] = &[VOCABULARY.info(), STRICT.info(), PHRASES.info(), DESCRIPTIONS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let names = toy::vocabulary();
        let rows: Vec<String> = names.iter().enumerate().map(|(place, name)| format!("\"{place}\": \"{name}\"")).collect();
        let draft = cx.begin(unit)?;
        draft.write(VOCABULARY, "v3det_toy.json", format!("{{{}}}", rows.join(", ")).as_bytes())?;
        draft.write(STRICT, "v3det_toy_strict.json", &serde_json::to_vec(&toy::combinations()).expect("BUG: names are plain JSON"))?;
        let phrases: Vec<Phrase> = toy::phrases().into_iter().map(|(phrase, sources)| Phrase { phrase, sources }).collect();
        draft.write(PHRASES, "phrases.json", &serde_json::to_vec(&phrases).expect("BUG: phrases are plain JSON"))?;
        let descriptions: serde_json::Map<_, _> = toy::descriptions().into_iter().map(|(name, text)| (name, text.into())).collect();
        draft.write(DESCRIPTIONS, "descriptions.json", &serde_json::to_vec(&descriptions).expect("BUG: descriptions are plain JSON"))?;
        cx.tick(1);
        cx.commit(draft, BTreeMap::from([("names".to_owned(), names.len().into())]))
    }
}
