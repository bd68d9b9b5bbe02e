//! `augmenter/import`: reads an augmenter that RALF's code trained.

use ovenbird_models::{
    augmenter::{Config, Fine},
    checkpoint::Checkpoint,
    rcnn::layout::LoadReport,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::network::{AugmenterFile, AugmenterSpec, Loaded, SPEC_KEY};
use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{CheckpointFile, read_weights},
};

/// Imports an augmenter that RALF's code trained, `lvis_strict.pth` or `coco_strict.pth`, and what `augmenter/export` wrote.
///
/// Dimension, layers, width and the number of concepts follow from the tensors; every tensor of the network must be there and fit, and
/// there must be no other. Attention heads and the scale of tokens cannot be seen in them: the parameters say what they were, RALF's by
/// default.
/// (RALF, section 8.2.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// Attention heads, a divisor of the embeddings' dimension.
    pub heads: i64,
    /// The scale of tokens that it was trained with.
    pub fine: Fine,
}

impl Default for Import {
    fn default() -> Self {
        Self { heads: 8, fine: Fine::Reference }
    }
}

const CHECKPOINT: In<CheckpointFile> = In::required("checkpoint", "A state dict under RALF's names: `.pth` or safetensors.");
const AUGMENTER: Out<AugmenterFile> =
    Out::new("augmenter", "The weights under RALF's names, safetensors, f32, and how the network is built.");

impl Stage for Import {
    const KIND: &'static str = "augmenter/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];
    const OUTPUTS: &'static [PortInfo] = &[AUGMENTER.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[("heads", self.heads > 0, "at least 1")])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let file = cx.inputs.read(CHECKPOINT)?.file;
        let checkpoint = read_weights(&file)?;
        let (Loaded { augmenter, spec, .. }, report) = self.load(&checkpoint)?;
        report.place.note().into_iter().for_each(|words| cx.note(words));
        let Config { dim, depth, n_concepts, .. } = spec.config;
        cx.note(format!(
            "the network has {depth} layers, retrieves {n_concepts} concepts for a region, and reads embeddings of {dim} numbers"
        ));
        let draft = cx.begin(unit)?;
        draft.write_tensors(AUGMENTER, "augmenter.safetensors", augmenter.parameters(), &spec.metadata())?;
        cx.tick(1);
        cx.commit(draft, [("tensors".into(), report.loaded.len().into())].into())
    }
}

impl Import {
    fn load(&self, checkpoint: &Checkpoint) -> Result<(Loaded, LoadReport)> {
        let refused = |problem: String, hint: &str| {
            let (path, hint) = (checkpoint.path().to_owned(), Some(hint.to_owned()));
            Error::Models(ovenbird_models::Error::Malformed { path, problem, hint })
        };
        if checkpoint.metadata().contains_key(SPEC_KEY) {
            return Err(refused(
                "an augmenter that this program trained: it says itself how it is built, and with which CLIP".into(),
                "give it where an augmenter is needed, without importing it",
            ));
        }
        let config = Config::of_tensors(checkpoint.tensors(), self.heads, self.fine, checkpoint.path())?;
        if config.dim % self.heads != 0 {
            let problem = format!("expected a divisor of {}, the length of the network's embeddings, found {}", config.dim, self.heads);
            return Err(Error::Input { port: "heads", problem, hint: "give the heads that it was trained with: RALF's has 8".into() });
        }
        let loaded = Loaded::of(AugmenterSpec { config, clip: None }, checkpoint, Device::Cpu)?;
        let is_empty = |tensor: &Tensor| tensor.dim() == 2 && tensor.count_nonzero(None).int64_value(&[]) == 0;
        if let Some((name, _)) = checkpoint.tensors().iter().find(|(_, tensor)| is_empty(tensor)) {
            return Err(refused(
                format!("{name}: expected the weights of a trained network, found zeros alone"),
                "save the network after it was trained",
            ));
        }
        Ok(loaded)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ovenbird_models::{
        augmenter::Concepts,
        checkpoint::{Saved, write_safetensors, write_torch},
    };
    use tch::{Kind, no_grad};

    use super::*;
    use crate::golden::{detpro_ralf, error};

    /// Weights that RALF's own code saved.
    fn theirs(golden: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
        golden.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("aug/param/")?.to_owned(), tensor.shallow_clone()))).collect()
    }

    /// The file of a state dict, and what is loaded from it; an error names it `FILE`.
    fn load(stage: &Import, weights: &BTreeMap<String, Tensor>) -> Result<(Loaded, LoadReport), (String, String)> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_torch(&Saved::Dict(weights.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect()), &mut file).unwrap();
        stage.load(&Checkpoint::open(file.path()).unwrap()).map_err(|error| {
            let words = error.to_string().replace(&file.path().display().to_string(), "FILE");
            (words, error.hint().expect("every refusal says what to do"))
        })
    }

    const FOUR: Import = Import { heads: 4, fine: Fine::Reference };

    #[test]
    fn an_augmenter_of_ralf_s_code_computes_what_it_computed_there() {
        let golden = detpro_ralf("ralf");
        let weights = theirs(&golden);
        let nested: BTreeMap<_, _> = weights.iter().map(|(name, tensor)| (format!("state_dict.module.{name}"), tensor.copy())).collect();
        for weights in [weights, nested] {
            let (Loaded { augmenter, spec, .. }, report) = load(&FOUR, &weights).unwrap();
            let expected = Config { dim: 32, heads: 4, mlp_width: 64, depth: 2, n_concepts: 5, fine: Fine::Reference };
            assert_eq!((spec.config, report.loaded.len()), (expected, weights.len()));
            let concepts = Concepts::new(&golden["aug/concepts"]).unwrap();
            let out = no_grad(|| augmenter.forward(&golden["aug/x"], &concepts, None).unwrap().out());
            assert!(error(&out, &golden["aug/out"]) < 1e-4);
        }
    }

    #[test]
    fn what_is_no_augmenter_or_only_a_part_is_refused_tensor_by_tensor() {
        let weights = theirs(&detpro_ralf("ralf"));
        let changed = |name: &str, tensor: Option<Tensor>| {
            let mut weights: BTreeMap<_, _> = weights.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            match tensor {
                Some(tensor) => drop(weights.insert(name.to_owned(), tensor)),
                None => drop(weights.remove(name)),
            }
            weights
        };
        let refused = |weights: &BTreeMap<String, Tensor>, expected: &str| assert_eq!(load(&FOUR, weights).unwrap_err().0, expected);
        let zeros = |size: &[i64]| Some(Tensor::zeros(size, (Kind::Float, Device::Cpu)));
        refused(
            &changed("transformer.layers.1.norm2.bias", None),
            "FILE: 1 tensors do not fit the network: transformer.layers.1.norm2.bias: expected [32], found nothing",
        );
        refused(
            &changed("type_embedding", zeros(&[3, 32])),
            "FILE: 1 tensors do not fit the network: type_embedding: expected [2, 32], found [3, 32]",
        );
        refused(
            &changed("transformer.norm.weight", zeros(&[32])),
            "FILE: 1 tensors do not fit the network: transformer.norm.weight: expected nothing, found [32]",
        );
        refused(
            &changed("pos_embedding", zeros(&[5, 16])),
            "FILE: 1 tensors do not fit the network: pos_embedding: expected [-1, 32], found [5, 16]",
        );
        refused(
            &changed("region_learn_send.bias", Some(Tensor::from_slice(&[f32::NAN; 32]))),
            "FILE: region_learn_send.bias: expected finite numbers, found 32 of 32 that are not",
        );
        refused(
            &changed("region_learn_send.weight", zeros(&[32, 32])),
            "FILE: region_learn_send.weight: expected the weights of a trained network, found zeros alone",
        );
        let own = load(&FOUR, &weights).unwrap().0;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_safetensors(own.augmenter.parameters(), &own.spec.metadata(), &mut file).unwrap();
        let trained = FOUR.load(&Checkpoint::open(file.path()).unwrap()).unwrap_err();
        assert_eq!(trained.hint().unwrap(), "give it where an augmenter is needed, without importing it");
        let heads = load(&Import { heads: 5, fine: Fine::Reference }, &weights).unwrap_err();
        let words = "heads: expected a divisor of 32, the length of the network's embeddings, found 5";
        assert_eq!((heads.0.as_str(), heads.1.as_str()), (words, "give the heads that it was trained with: RALF's has 8"));
        let other = load(&FOUR, &BTreeMap::from([("visual.class_embedding".to_owned(), zeros(&[32]).unwrap())])).unwrap_err();
        assert_eq!(other.0, "FILE: expected an augmenter, with a tensor `region_learn_send.weight`, found `visual.class_embedding`");
        assert!(other.1.starts_with("give RALF's `lvis_strict.pth`"), "{}", other.1);
    }

    #[test]
    fn the_defaults_are_ralf_s() {
        let Import { heads, fine } = Import::default();
        assert_eq!((heads, fine), (Config::ralf(512).heads, Config::ralf(512).fine));
        assert!(Stage::check(&Import::default()).is_empty());
        assert_eq!(Stage::check(&Import { heads: 0, fine }).len(), 1);
    }
}
