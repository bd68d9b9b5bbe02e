//! `prompts/ensemble`: class embeddings, averaged over sentences with the class name.

use std::collections::BTreeSet;

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::to_unit_length;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{templates::Templates, texts::mean_embedding};
use crate::{
    Context, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, Classes, Prompts},
    clip::Clip,
};

/// Class embeddings: the mean text embedding of sentences with the class name.
///
/// Each sentence is encoded and normalised, then the sentences are averaged. Rows are in the order of base classes, then novel ones. ViLD
/// uses the mean as it is, with a norm below 1 (`renormalise: false`); CLIP normalises it again. OADP's `vild.pth`, which COCO and LVIS
/// share, is made with `classes` and `more_classes`. (OADP, section 5.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ensemble {
    /// Precision, activation, and which CLIP of a checkpoint with several.
    pub clip: Clip,
    /// The sentences.
    pub templates: Templates,
    /// Normalise the mean to unit norm.
    pub renormalise: bool,
    /// Replace underscores in class names by spaces.
    pub spaces: bool,
}

const CHECKPOINT: In<CheckpointFile> =
    In::required("checkpoint", "CLIP weights: OpenAI, open_clip or Hugging Face; a file, or a folder with its config.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const MORE_CLASSES: In<Classes> = In::optional("more_classes", "Class names of a second data set, to make one file for both.");
const PROMPTS: Out<Prompts> = Out::new(
    "prompts",
    "safetensors: `embeddings` f32 [K, D]; metadata `names`, base ++ novel, or of two class lists every name once, by code points.",
);

impl Stage for Ensemble {
    const KIND: &'static str = "prompts/ensemble";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info(), CLASSES.info(), MORE_CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[PROMPTS.info()];

    fn check(&self) -> Vec<Problem> {
        let sentences = self.templates.sentences();
        let mut problems: Vec<Problem> = sentences
            .iter()
            .enumerate()
            .filter(|(_, sentence)| sentence.matches("{}").count() != 1)
            .map(|(sentence_idx, _)| Problem::new(format!("templates[{sentence_idx}]"), "expected one {} for the class name"))
            .collect();
        if sentences.is_empty() {
            problems.push(Problem::new("templates", "expected at least one sentence"));
        }
        problems
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (clip, space) = self.clip.load_text(&cx.inputs.read(CHECKPOINT)?, Device::Cpu, cx)?;
        let names = names(&classes, cx.inputs.read_if_given(MORE_CLASSES)?.map(|Classes(more)| more).as_ref());
        cx.total(names.len() as u64);
        let mut rows = Vec::new();
        for name in &names {
            cx.proceed()?;
            let name = if self.spaces { name.replace('_', " ") } else { name.clone() };
            rows.push(mean_embedding(&clip, &self.templates.texts(&name))?);
            cx.tick(1);
        }
        let mut embeddings = Tensor::stack(&rows, 0);
        if self.renormalise {
            embeddings = to_unit_length(&embeddings);
        }
        let draft = cx.begin(unit)?;
        let prompts = Prompts { names, embeddings, scale: None, clip: Some(space) };
        prompts.write(&draft, PROMPTS)?;
        cx.commit(draft, prompts.norms())
    }
}

/// The names of the rows, in order.
fn names(classes: &ClassSplit, more: Option<&ClassSplit>) -> Vec<String> {
    match more {
        None => classes.all().cloned().collect(),
        Some(more) => classes.all().chain(more.all()).cloned().collect::<BTreeSet<String>>().into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use ovenbird_models::clip::{self, Activation, Config, ImageConfig, TextConfig};
    use tch::Kind;

    use super::*;
    use crate::{
        golden::{lp_ovod, numbers, with_tower},
        prompts::golden,
    };

    /// Parity checks R2 and R3 of OADP's specification.
    #[test]
    fn rows_of_vild_are_those_of_a_hugging_face_text_tower() {
        let expected = golden::read("vild.json");
        let config = Config {
            embed_dim: 48,
            image: ImageConfig::Vit { image_side: 224, patch: 32, width: 64, depth: 1, heads: 1, mlp_width: 256 },
            text: TextConfig { context: 77, vocabulary: 49_408, width: 64, heads: 2, depth: 2 },
            activation: Activation::QuickGelu,
        };
        let weights = golden::weights(&expected);
        let clip = clip::Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap();
        let mut norms = Vec::new();
        for (name, row) in golden::names(&expected["names"]).iter().zip(expected["rows"].as_array().unwrap()) {
            let found = mean_embedding(&clip, &Templates::Vild74.texts(name)).unwrap();
            let expected = golden::tensor(row, &[48]);
            let (apart, normalised) = (golden::error(&found, &expected), to_unit_length(&found.unsqueeze(0)).squeeze());
            println!("{name}: {apart:.1e}");
            assert!(apart < 1e-5, "{name}: {apart}");
            norms.push(found.norm().double_value(&[]));
            assert!(golden::error(&normalised, &expected) > 1e-2, "{name}: rows of unit norm would pass for the published ones");
        }
        assert!(norms.iter().all(|norm| *norm < 1.0) && norms.len() == 5, "{norms:?}");
    }

    /// Rows of LP-OVOD's three kinds of prompts, by its own code and a small text tower. Its mean of 74 sentences is not normalised again.
    #[test]
    fn rows_of_lp_ovod_are_those_of_its_code() {
        let golden = lp_ovod();
        let config = Config {
            embed_dim: 16,
            image: ImageConfig::Vit { image_side: 32, patch: 16, width: 64, depth: 1, heads: 1, mlp_width: 256 },
            text: TextConfig { context: 77, vocabulary: 49_408, width: 32, heads: 4, depth: 2 },
            activation: Activation::QuickGelu,
        };
        let store = tch::nn::VarStore::new(Device::Cpu);
        clip::Clip::new(&store.root(), &config, 1).unwrap();
        let weights = with_tower(&golden, store.variables().into_iter().collect());
        let clip = clip::Clip::load_as(&config, &weights, Path::new("clip.safetensors"), Device::Cpu, Kind::Float).unwrap();
        let ClassSplit { base: mut names, novel } = ClassSplit::coco_48_17();
        for (place, name) in [4, 5, 11, 12, 15, 16, 21, 23, 27, 29, 32, 34, 45, 47, 54, 58, 63].into_iter().zip(novel) {
            names.insert(place, name);
        }
        for (templates, expected, is_unit) in
            [(Templates::BareName, "bare", true), (Templates::Ensemble63, "ensemble63", true), (Templates::Vild74, "mean74", false)]
        {
            for (place, class) in numbers(&golden["text/classes"]).into_iter().enumerate() {
                let mut found = mean_embedding(&clip, &templates.texts(&names[class as usize])).unwrap();
                let norm = found.norm().double_value(&[]);
                if is_unit {
                    found = to_unit_length(&found.unsqueeze(0)).squeeze();
                } else {
                    assert!(norm < 1.0 - 1e-4, "{norm}");
                }
                let apart = golden::error(&found, &golden_row(&golden, expected, place as i64));
                assert!(apart < 1e-4, "{expected}, {}: {apart}", names[class as usize]);
            }
        }
    }

    fn golden_row(golden: &BTreeMap<String, Tensor>, name: &str, place: i64) -> Tensor {
        golden[&format!("text/{name}")].get(place)
    }

    /// The rule of methods/oadp, section 5.1, by which COCO's 65 classes and the 1,203 of LVIS make 1,217. (LVIS's names are not here to show it.)
    #[test]
    fn two_class_lists_share_rows_in_the_order_of_code_points() {
        let split = |base: &[&str], novel: &[&str]| {
            let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            ClassSplit { base: owned(base), novel: owned(novel) }
        };
        let coco = split(&["tv", "baseball bat", "person"], &["bus"]);
        let lvis = split(&["person", "bus_(vehicle)", "baseball_bat", "Bible"], &["wolf"]);
        assert_eq!(names(&coco, None), ["tv", "baseball bat", "person", "bus"]);
        let union = ["Bible", "baseball bat", "baseball_bat", "bus", "bus_(vehicle)", "person", "tv", "wolf"];
        assert_eq!(names(&coco, Some(&lvis)), union);
        assert_eq!(names(&lvis, Some(&coco)), union);
    }
}
