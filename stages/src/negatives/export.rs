//! `negatives/export`: negatives for RALF's code.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::{class_names, unnamed};
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Negatives, PublishedNegatives},
    error::write_error,
};

/// Negatives for RALF's code: a `neg_feature_*.pkl` that `torch.load` reads, with numpy arrays.
///
/// Classes go out in the order in which the data set's json lists its categories, as the reference numbers them; each must have negatives.
/// Each word is repeated for every class that lists it, and lists are filled with zeros to the length of the longest: up to 2.5 GB of
/// numbers at the size of LVIS, which the pickle stores as 3.7 GB of text. They are written row by row and never in memory. Names of words
/// are left out, as the format has no place for them. (RALF, section 6.3.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const NEGATIVES: In<Negatives> = In::required("negatives", "Words that classes are kept apart from.");
const ANNOTATIONS: In<AnnotationFile> =
    In::required("annotations", "The data set's original json, in the order of whose categories the classes go out.");
const EXPORTED: Out<PublishedNegatives> = Out::new(
    "file",
    "`neg_feature.pkl`: `feat_in` f16 [K, D], `feat_out_sim` and `feat_out_dis` f16 [K, M, D], `pad_out_sim` and `pad_out_dis` i64 [K].",
);

impl Stage for Export {
    const KIND: &'static str = "negatives/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[NEGATIVES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let classes = class_names(&cx.inputs.read(ANNOTATIONS)?)?;
        let negatives = cx.inputs.read(NEGATIVES)?;
        let features = unnamed(&negatives, &classes)?;
        let n_left_out = negatives.classes.len() - classes.len();
        if n_left_out > 0 {
            cx.note(format!("{n_left_out} of {} classes are left out: the annotations do not have them", negatives.classes.len()));
        }
        let draft = cx.begin(unit)?;
        let mut file = draft.create(EXPORTED, "neg_feature.pkl")?;
        let path = file.path().to_owned();
        features.write(&mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        cx.tick(1);
        cx.commit(draft, [("classes".into(), classes.len().into())].into())
    }
}
