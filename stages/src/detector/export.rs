//! `detector/export`: writes a trained detector for other programs.

use std::io::Write;

use ovenbird_models::{
    checkpoint::{Checkpoint, Saved, write_torch},
    rcnn::sigmoid::Activation,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::spec::{DetectorFile, DetectorSpec, SigmoidSpec};
use crate::{Context, Error, In, Out, PortInfo, Result, Stage, Unit, artifacts::CheckpointFile, error::write_error};

/// Exports a trained detector in mmdet's format: a `.pth` file that `torch.load` reads, with `state_dict` and `meta`.
///
/// Tensors have the names of mmdet and OADP. `meta` says, as plain data, how the detector is built and used. Class embeddings are not in the
/// file.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const DETECTOR: In<DetectorFile> = In::required("detector", "A detector from `detector/train`, `detector/import` or `detector/select`.");
const CHECKPOINT: Out<CheckpointFile> = Out::new("checkpoint", "`detector.pth`: a dict of `state_dict` and `meta`.");

impl Stage for Export {
    const KIND: &'static str = "detector/export";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[DETECTOR.info()];
    const OUTPUTS: &'static [PortInfo] = &[CHECKPOINT.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let (checkpoint, spec) = cx.inputs.read(DETECTOR)?.read()?;
        if let DetectorSpec::Sigmoid(SigmoidSpec { config, .. }) = &spec
            && config.novel.is_some_and(|novel| novel.activation != Activation::Sigmoid)
        {
            let problem = "its novel classes have a softmax, which checkpoints of LP-OVOD have no place for".into();
            let hint = "probe with `classifier: sigmoid`, or export the detector before probing".into();
            return Err(Error::Input { port: DETECTOR.info().name, problem, hint });
        }
        let draft = cx.begin(&units[0])?;
        let mut archive = draft.create(CHECKPOINT, "detector.pth")?;
        let path = archive.path().to_owned();
        write(&checkpoint, &spec, &mut archive).map_err(|source| write_error(&path, source))?;
        archive.finish()?;
        cx.commit(draft, [("tensors".into(), checkpoint.tensors().len().into())].into())
    }
}

fn write(checkpoint: &Checkpoint, spec: &DetectorSpec, out: impl Write) -> std::io::Result<()> {
    let weights = checkpoint.tensors().iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect();
    let spec = serde_json::to_value(spec).expect("BUG: a specification is plain JSON");
    let all = [("meta", Saved::from(&spec)), ("state_dict", Saved::Dict(weights))];
    write_torch(&Saved::Dict(all.map(|(key, value)| (key.to_owned(), value)).into()), out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ovenbird_models::{
        checkpoint::write_safetensors,
        rcnn::{Config, Detector, classifier::LogitScale, layout},
    };
    use tch::{Device, nn};

    use super::{super::spec::MaskRcnnSpec, *};

    #[test]
    fn an_exported_detector_is_read_back_whole() {
        let spec = MaskRcnnSpec {
            config: Config::toy(16),
            fits: [256, 192],
            has_prompts: true,
            has_multilabel_prompts: false,
            scale: LogitScale::Temperature { train: 0.007, test: 0.01 },
            clip: None,
        };
        let build = |seed| {
            let weights = nn::VarStore::new(Device::Cpu);
            let detector = Detector::new(&weights.root(), &spec.config, seed).unwrap();
            (weights, detector)
        };
        let (_weights, trained) = build(1);
        let mut made = tempfile::NamedTempFile::new().unwrap();
        write_safetensors(trained.parameters(), &BTreeMap::new(), &mut made).unwrap();
        let mut exported = tempfile::NamedTempFile::new().unwrap();
        write(&Checkpoint::open(made.path()).unwrap(), &DetectorSpec::MaskRcnn(spec.clone()), &mut exported).unwrap();

        let (_others, other) = build(2);
        let read = Checkpoint::open(exported.path()).unwrap();
        let report = layout::load(read.tensors(), other.parameters(), exported.path()).unwrap().require_all(exported.path()).unwrap();
        assert_eq!(report.loaded.len(), trained.parameters().len());
        assert!(trained.parameters().iter().all(|(name, tensor)| other.parameters()[name].equal(tensor)));
    }
}
