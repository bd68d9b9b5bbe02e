//! `prompts/import`: class embeddings that another program made.

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::{
    clip::{
        self,
        prompted::{NamePlace, Prompted},
    },
    detpro::class_name,
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, no_grad};

use super::{
    described::{Renamed, described_prompts, prompted, published_names},
    published::{read, read_context, read_contexts},
};
use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, CheckpointFile, Classes, Descriptions, PROMPTS_FILE, Prompts, PublishedPrompts},
    clip::Clip,
    contract::is_default,
};

/// Class embeddings that another program made, checked.
///
/// OADP's `.pth` dicts name their rows. DetPro publishes rows without names, in the order of LVIS's category ids: give the original LVIS json
/// as `annotations`, which names them. Rows are not normalised; their least, mean and greatest norm are reported. What DetPro writes after an
/// epoch has other norms than 1: pass it through `prompts/mean`, alone or with others.
///
/// DetPro's learned context (`..._prompt.pth`, one tensor [M, C]) becomes embeddings of any classes: give `checkpoint` and `classes`. Their
/// names stand behind the context, without round brackets and with spaces for underscores; rows have unit norm. (OADP, sections 5.2 and 5.3;
/// DetPro, sections 3.2 and 3.6.)
///
/// RPL's checkpoint (`model.pth.tar-6`) has two contexts: give `descriptions`, too. Rows are those of `prompts/rpl`, not normalised. (PromptDet, sections
/// 1 and 6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// How CLIP is run, where the file is a context.
    #[serde(skip_serializing_if = "is_default")]
    pub clip: Clip,
    /// What classes are called in `descriptions`, where that is another name.
    #[serde(skip_serializing_if = "is_published")]
    pub renamed: Renamed,
}

impl Default for Import {
    fn default() -> Self {
        Self { clip: Clip::default(), renamed: published_names() }
    }
}

fn is_published(renamed: &Renamed) -> bool {
    *renamed == published_names()
}

const FILE: In<PublishedPrompts> =
    In::required("file", "A dict of `embeddings`, `names` and optionally `scaler` and `bias`; or one tensor of rows, or of a context.");
const ANNOTATIONS: In<AnnotationFile> =
    In::optional("annotations", "For files without names: the data set's original json, whose categories name the rows in ascending id.");
const CHECKPOINT: In<CheckpointFile> = In::optional("checkpoint", "For a context: CLIP weights: OpenAI, open_clip or Hugging Face.");
const CLASSES: In<Classes> = In::optional("classes", "For a context: base and novel class names.");
const DESCRIPTIONS: In<Descriptions> = In::optional("descriptions", "For RPL's contexts: what each class is.");
const IMPORTED: Out<Prompts> = Out::new(
    "prompts",
    "safetensors: `embeddings` f32 [K, D], `scaler` and `bias` where the file has them, `ctx1` and `ctx2` f32 [M, C] of RPL; metadata `names`, in its \
     order.",
);

impl Stage for Import {
    const KIND: &'static str = "prompts/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FILE.info(), ANNOTATIONS.info(), CHECKPOINT.info(), CLASSES.info(), DESCRIPTIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let PublishedPrompts { file } = cx.inputs.read(FILE)?;
        let annotations = cx.inputs.read_if_given(ANNOTATIONS)?.map(|file| file.load()).transpose()?;
        let refused = |port: PortInfo, problem: String, hint: &str| Err(Error::Input { port: port.name, problem, hint: hint.into() });
        let hint = "a context needs `checkpoint` and `classes`; rows need neither";
        let descriptions = cx.inputs.read_if_given(DESCRIPTIONS)?;
        let prompts = match (cx.inputs.read_if_given(CHECKPOINT)?, cx.inputs.read_if_given(CLASSES)?) {
            (None, None) if descriptions.is_some() => {
                return refused(CHECKPOINT.info(), format!("missing, but `{}` is given", DESCRIPTIONS.info().name), hint);
            }
            (None, None) => file.read_with(|path| read(path, annotations.as_ref()))?,
            (Some(_), Some(_)) if annotations.is_some() => {
                let problem = format!("given, but with `{}` the file is a context, which has no rows to name", CHECKPOINT.info().name);
                return refused(ANNOTATIONS.info(), problem, "leave `annotations` out");
            }
            (Some(checkpoint), Some(Classes(classes))) if let Some(descriptions) = &descriptions => {
                let contexts = file.read_with(read_contexts)?;
                let (clip, space) = self.clip.load_text(&checkpoint, Device::Cpu, cx)?;
                let names: Vec<String> = classes.all().cloned().collect();
                let texts = descriptions.of(&names, &self.renamed)?;
                let prompted = prompted(&clip, &texts, contexts[0].size()[0] as usize)?;
                let (tensors, metadata) = described_prompts(&prompted, &contexts, &names, &texts, space)?;
                cx.tick(1);
                let draft = cx.begin(unit)?;
                draft.write_tensors(IMPORTED, PROMPTS_FILE, &tensors, &metadata)?;
                return cx.commit(draft, [("classes".into(), texts.len().into())].into());
            }
            (Some(checkpoint), Some(Classes(classes))) => {
                let context = file.read_with(read_context)?;
                let (clip, space) = self.clip.load_text(&checkpoint, Device::Cpu, cx)?;
                let embeddings = embed(&clip, &classes, &context)?;
                Prompts { names: classes.all().cloned().collect(), embeddings, scale: None, clip: Some(space) }
            }
            (Some(_), None) => return refused(CLASSES.info(), format!("missing, but `{}` is given", CHECKPOINT.info().name), hint),
            (None, Some(_)) => return refused(CHECKPOINT.info(), format!("missing, but `{}` is given", CLASSES.info().name), hint),
        };
        cx.tick(1);
        let draft = cx.begin(unit)?;
        prompts.write(&draft, IMPORTED)?;
        cx.commit(draft, prompts.norms())
    }
}

/// The embeddings of classes behind a context, f32 `[K, D]`, of unit norm.
fn embed(clip: &clip::Clip, classes: &ClassSplit, context: &Tensor) -> Result<Tensor> {
    let names: Vec<String> = classes.all().map(|name| class_name(name)).collect();
    let n_context = context.size()[0] as usize;
    let prompted = Prompted::named(clip.causal_text()?, clip.tokenizer(), &names, n_context, NamePlace::End)?;
    Ok(no_grad(|| prompted.encode(context).map(|embeddings| to_unit_length(&embeddings)))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        golden::{detpro_ralf, error},
        prompts::golden::small_clip,
    };

    #[test]
    fn a_context_becomes_embeddings_of_other_classes() {
        let golden = detpro_ralf("detpro");
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let classes = ClassSplit { base: owned(&["aerosol_can", "zebra"]), novel: owned(&["iPod", "knob"]) };
        let found = embed(&small_clip(&golden), &classes, &golden["prompt/ctx"]).unwrap();
        let apart = error(&found, &to_unit_length(&golden["prompt/export_embedding"]));
        assert!(apart < 1e-4, "{apart}");
        let narrow = golden["prompt/ctx"].narrow(1, 0, 16);
        assert_eq!(
            embed(&small_clip(&golden), &classes, &narrow).unwrap_err().to_string(),
            "context: expected f32 [8, 32], found Float [8, 16]"
        );
    }
}
