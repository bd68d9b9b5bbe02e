//! `augmenter/export`: writes an augmenter for RALF's code.

use std::{collections::BTreeMap, io};

use ovenbird_models::{
    augmenter::{Config, Fine},
    checkpoint::{Saved, write_torch},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::network::AugmenterFile;
use crate::{Context, In, Out, PortInfo, Result, Stage, Unit, artifacts::CheckpointFile, error::write_error};

/// Exports an augmenter as the state dict that RALF's code loads: a `.pth` file that `torch.load` reads.
///
/// A state dict says neither how many attention heads there are nor the scale of tokens; if they are other than RALF's, a note says so.
/// (RALF, section 8.2.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const AUGMENTER: In<AugmenterFile> = In::required("augmenter", "The trained network.");
const CHECKPOINT: Out<CheckpointFile> = Out::new("checkpoint", "`augmenter.pth`: a dict of all parameters, f32, under RALF's names.");

impl Stage for Export {
    const KIND: &'static str = "augmenter/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[AUGMENTER.info()];
    const OUTPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let network = cx.inputs.read(AUGMENTER)?.load(Device::Cpu)?;
        if let Some(words) = unlike_ralf(&network.spec.config) {
            cx.note(words);
        }
        let weights = network.augmenter.parameters();
        let draft = cx.begin(unit)?;
        let mut file = draft.create(CHECKPOINT, "augmenter.pth")?;
        let path = file.path().to_owned();
        write(weights, &mut file).map_err(|source| write_error(&path, source))?;
        file.finish()?;
        cx.tick(1);
        cx.commit(draft, [("tensors".into(), weights.len().into())].into())
    }
}

fn write(weights: &BTreeMap<String, Tensor>, out: impl io::Write) -> io::Result<()> {
    let weights = weights.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor)));
    write_torch(&Saved::Dict(weights.collect()), out)
}

/// What RALF's code does otherwise with the same weights, without noticing.
fn unlike_ralf(config: &Config) -> Option<String> {
    let ralf = Config::ralf(config.dim);
    let heads = (config.heads != ralf.heads).then(|| format!("{} attention heads, RALF's has {}", config.heads, ralf.heads));
    let fine = match config.fine {
        Fine::Reference => None,
        Fine::Scaled => Some("scaled tokens, which RALF's has not".to_owned()),
    };
    let unlike: Vec<String> = heads.into_iter().chain(fine).collect();
    let words = || format!("the network has {}: RALF's code would give other results with these weights", unlike.join(", and "));
    (!unlike.is_empty()).then(words)
}

#[cfg(test)]
mod tests {
    use ovenbird_models::{augmenter::Augmenter, checkpoint::Checkpoint};
    use tch::nn;

    use super::{
        super::network::{AugmenterSpec, Loaded},
        *,
    };

    #[test]
    fn what_goes_out_comes_in_as_it_was() {
        let config = Config { n_concepts: 7, depth: 2, mlp_width: 48, fine: Fine::Scaled, ..Config::ralf(32) };
        let store = nn::VarStore::new(Device::Cpu);
        let trained = Augmenter::new(&store.root(), &config, 3).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write(trained.parameters(), &mut file).unwrap();
        let checkpoint = Checkpoint::open(file.path()).unwrap();
        let found = Config::of_tensors(checkpoint.tensors(), 8, Fine::Scaled, file.path()).unwrap();
        assert_eq!(found, config);
        let (loaded, report) = Loaded::of(AugmenterSpec { config: found, clip: None }, &checkpoint, Device::Cpu).unwrap();
        assert_eq!((report.loaded.len(), report.place.note()), (trained.parameters().len(), None));
        assert!(trained.parameters().iter().all(|(name, tensor)| loaded.augmenter.parameters()[name].equal(tensor)));
    }

    #[test]
    fn what_no_tensor_shows_is_said_where_it_is_not_ralf_s() {
        let ralf = Config::ralf(512);
        assert_eq!(unlike_ralf(&ralf), None);
        assert_eq!(unlike_ralf(&Config { n_concepts: 10, ..ralf }), None);
        assert_eq!(
            unlike_ralf(&Config { heads: 4, fine: Fine::Scaled, ..ralf }).unwrap(),
            "the network has 4 attention heads, RALF's has 8, and scaled tokens, which RALF's has not: RALF's code would give other \
             results with these weights"
        );
    }
}
