//! `negatives/import`: negatives that RALF's code retrieved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::{class_names, named};
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Negatives, PublishedNegatives},
};

/// Negatives of RALF, `neg_feature_lvis.pkl` or `neg_feature_coco.pkl`, checked: for each class its hard and its easy words.
///
/// The file has no names. Its classes are the categories of the data set's json as it lists them, and get their names from there, so give
/// the original json as `annotations`. Words are called by their place among all different words: "0", "1" and so on. Rows must have unit
/// norm; those of f32 are rounded to f16. A word on the lists of several classes is kept once, so that up to 7.3 GB become some 30 MB; while
/// the file is read it is in memory. (RALF, section 6.3.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {}

const FILE: In<PublishedNegatives> = In::required("file", "What RALF's `feature_gen.py` wrote.");
const ANNOTATIONS: In<AnnotationFile> =
    In::required("annotations", "The data set's original json, whose categories name the classes of the file in their order.");
const NEGATIVES: Out<Negatives> = Out::new(
    "negatives",
    "safetensors: `anchors` f16 [K, D] of the classes and `words` f16 [V, D], unit norm; for each class the places of its `hard` and \
     `easy` words; metadata `classes`, in the order of the file, and `words`.",
);

impl Stage for Import {
    const KIND: &'static str = "negatives/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILE.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[NEGATIVES.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let classes = class_names(&cx.inputs.read(ANNOTATIONS)?)?;
        let file = cx.inputs.read(FILE)?;
        let negatives = named(&file.load()?, classes, file.path())?;
        let (mut metrics, words) = negatives.counts();
        metrics.insert("classes".into(), negatives.classes.len().into());
        cx.note(words);
        let draft = cx.begin(unit)?;
        negatives.write(&draft, NEGATIVES)?;
        cx.tick(1);
        cx.commit(draft, metrics)
    }
}
