//! `prompts/import`: class embeddings that another program made.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::published::read;
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Prompts, PublishedPrompts},
};

/// Class embeddings that another program made, checked.
///
/// OADP's `.pth` dicts name their rows. DetPro publishes rows without names, in the order of LVIS's category ids: give the original LVIS json
/// as `annotations`, which names them. Rows are not normalised; their least, mean and greatest norm are reported.
/// (OADP, sections 5.2 and 5.3.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {}

const FILE: In<PublishedPrompts> =
    In::required("file", "A dict of `embeddings`, `names` and optionally `scaler` and `bias`; or one tensor of rows.");
const ANNOTATIONS: In<AnnotationFile> =
    In::optional("annotations", "For files without names: the data set's original json, whose categories name the rows in ascending id.");
const IMPORTED: Out<Prompts> = Out::new(
    "prompts",
    "safetensors: `embeddings` f32 [K, D], `scaler` and `bias` where the file has them; metadata `names`, in its order.",
);

impl Stage for Import {
    const KIND: &'static str = "prompts/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILE.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let PublishedPrompts { file } = cx.inputs.read(FILE)?;
        let annotations = cx.inputs.read_if_given(ANNOTATIONS)?.map(|file| file.load()).transpose()?;
        let prompts = file.read_with(|path| read(path, annotations.as_ref()))?;
        cx.tick(1);
        let draft = cx.begin(unit)?;
        prompts.write(&draft, IMPORTED)?;
        cx.commit(draft, prompts.norms())
    }
}
