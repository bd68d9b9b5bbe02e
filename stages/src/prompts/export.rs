//! `prompts/export`: class embeddings for other programs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::published::{rows_by_id, write, write_tensor};
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit, UnitDraft,
    artifacts::{AnnotationFile, Prompts, PublishedPrompts, TrainingState, read_weights},
    error::write_error,
};

/// Class embeddings for other programs: a `.pth` dict, which OADP and `prompts/import` read.
///
/// With `annotations` the file is one tensor of rows, in ascending category id, as DetPro reads it: give the original LVIS json. What
/// `prompts/detpro` learned has a second file, its context. (OADP, section 5.2; DetPro, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings.");
/// The same file, for what class embeddings do not say.
const WHOLE_FILE: In<TrainingState> = In::required("prompts", "");
const ANNOTATIONS: In<AnnotationFile> =
    In::optional("annotations", "For DetPro: the data set's original json, in the order of whose category ids the rows are.");
const EXPORTED: Out<PublishedPrompts> = Out::new(
    "file",
    "`prompts.pth`: a dict of `embeddings` f32 [K, D], `names` (a list), and, if they were learned, `scaler` and `bias`, f32 []; with \
     `annotations` one tensor f32 [K, D].",
);
const CONTEXT: Out<PublishedPrompts> = Out::new("context", "`context.pth`: one tensor f32 [M, C]; no file where no context was learned.");

impl Stage for Export {
    const KIND: &'static str = "prompts/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[PROMPTS.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info(), CONTEXT.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let prompts = cx.inputs.read(PROMPTS)?;
        let rows = match cx.inputs.read_if_given(ANNOTATIONS)? {
            Some(file) => Some(rows_by_id(&prompts, &file.load_categories()?)?),
            None => None,
        };
        let draft = cx.begin(unit)?;
        match &rows {
            Some(rows) => write_one(&draft, EXPORTED, "prompts.pth", rows)?,
            None => {
                let mut file = draft.create(EXPORTED, "prompts.pth")?;
                let path = file.path().to_owned();
                write(&prompts, &mut file).map_err(|source| write_error(&path, source))?;
                file.finish()?;
            }
        }
        if let Some(context) = read_weights(&cx.inputs.read(WHOLE_FILE)?.file)?.tensors().get("context") {
            write_one(&draft, CONTEXT, "context.pth", context)?;
        }
        cx.tick(1);
        let n_classes = rows.map_or(prompts.names.len(), |rows| rows.size()[0] as usize);
        cx.commit(draft, [("classes".into(), n_classes.into())].into())
    }
}

/// Writes a file of one tensor.
fn write_one(draft: &UnitDraft, port: Out<PublishedPrompts>, name: &str, tensor: &Tensor) -> Result<()> {
    let mut file = draft.create(port, name)?;
    let path = file.path().to_owned();
    write_tensor(tensor, &mut file).map_err(|source| write_error(&path, source))?;
    Ok(file.finish()?)
}
