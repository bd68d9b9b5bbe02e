//! `prompts/export`: class embeddings for other programs.

use std::io;

use ovenbird_cache::DraftFile;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    described::RPL_CONTEXT,
    published::{rows_by_id, write, write_contexts, write_tensor},
};
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit, UnitDraft,
    artifacts::{AnnotationFile, Prompts, PublishedPrompts, TrainingState, read_weights},
    error::write_error,
};

/// Class embeddings for other programs: a `.pth` dict, which OADP and `prompts/import` read.
///
/// With `annotations` the file is one tensor of rows, in ascending category id, as DetPro reads it: give the original LVIS json. What
/// `prompts/detpro` or `prompts/rpl` learned has a second file, its context. (OADP, section 5.2; DetPro, section 1; PromptDet, section 1.)
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
const CONTEXT: Out<PublishedPrompts> = Out::new(
    "context",
    "`context.pth`: one tensor f32 [M, C]; of `prompts/rpl` a dict with `state_dict`: `ctx1` and `ctx2`; no file where no context was learned.",
);

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
            Some(rows) => write_one(&draft, EXPORTED, "prompts.pth", |file| write_tensor(rows, file))?,
            None => write_one(&draft, EXPORTED, "prompts.pth", |file| write(&prompts, file))?,
        }
        let learned = read_weights(&cx.inputs.read(WHOLE_FILE)?.file)?;
        let learned = |name: &str| learned.tensors().get(name);
        if let Some(context) = learned("context") {
            write_one(&draft, CONTEXT, "context.pth", |file| write_tensor(context, file))?;
        }
        if let [Some(before), Some(behind)] = RPL_CONTEXT.map(learned) {
            write_one(&draft, CONTEXT, "context.pth", |file| write_contexts([before, behind], file))?;
        }
        cx.tick(1);
        let n_classes = rows.map_or(prompts.names.len(), |rows| rows.size()[0] as usize);
        cx.commit(draft, [("classes".into(), n_classes.into())].into())
    }
}

/// Writes a file.
fn write_one(
    draft: &UnitDraft,
    port: Out<PublishedPrompts>,
    name: &str,
    content: impl FnOnce(&mut DraftFile) -> io::Result<()>,
) -> Result<()> {
    let mut file = draft.create(port, name)?;
    let path = file.path().to_owned();
    content(&mut file).map_err(|source| write_error(&path, source))?;
    Ok(file.finish()?)
}
