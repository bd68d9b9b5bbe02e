//! `detector/export`: writes a trained detector for other programs.

use std::{collections::BTreeMap, io::Write};

use ovenbird_models::{
    checkpoint::{Saved, write_torch},
    rcnn::{layout, sigmoid::Activation},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::spec::{DetectorFile, DetectorSpec, SigmoidSpec};
use crate::{Context, Error, In, Out, PortInfo, Result, Stage, Unit, artifacts::CheckpointFile, contract::is_default, error::write_error};

/// Exports a trained detector in mmdet's format: a `.pth` file that `torch.load` reads, with `state_dict` and `meta`.
///
/// `meta` says, as plain data, how the detector is built and used. Class embeddings are not in the
/// file.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Whose names tensors have, of a detector that compares with class embeddings.
    #[serde(skip_serializing_if = "is_default")]
    pub names: Names,
}

/// Whose names the tensors of a detector have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Names {
    /// mmdet's and OADP's.
    #[default]
    Oadp,
    /// DetPro's, which has places for a box head, an object head (`features`) and a mask head.
    Detpro,
}

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
        if let DetectorSpec::Localizer(_) = &spec {
            let problem = format!("a detector {}", spec.in_words());
            return Err(Error::Input { port: DETECTOR.info().name, problem, hint: "export it with `localizer/export`".into() });
        }
        let renamed = match (self.names, &spec) {
            (Names::Oadp, _) => None,
            (Names::Detpro, DetectorSpec::MaskRcnn(spec)) if spec.config.block_head.is_none() && !spec.config.has_global_head => {
                Some(layout::to_detpro(checkpoint.tensors()))
            }
            (Names::Detpro, _) => {
                let problem =
                    "expected a box head that compares with class embeddings, and at most an object head and a mask head beside it".into();
                let hint = "export it with `names: oadp`, which has a name for every head".into();
                return Err(Error::Input { port: DETECTOR.info().name, problem, hint });
            }
        };
        let weights = renamed.as_ref().unwrap_or(checkpoint.tensors());
        let draft = cx.begin(&units[0])?;
        let mut archive = draft.create(CHECKPOINT, "detector.pth")?;
        let path = archive.path().to_owned();
        write(weights, &spec, &mut archive).map_err(|source| write_error(&path, source))?;
        archive.finish()?;
        cx.commit(draft, [("tensors".into(), weights.len().into())].into())
    }
}

fn write(weights: &BTreeMap<String, Tensor>, spec: &DetectorSpec, out: impl Write) -> std::io::Result<()> {
    let weights = weights.iter().map(|(name, tensor)| (name.clone(), Saved::Tensor(tensor))).collect();
    let spec = serde_json::to_value(spec).expect("BUG: a specification is plain JSON");
    let all = [("meta", Saved::from(&spec)), ("state_dict", Saved::Dict(weights))];
    write_torch(&Saved::Dict(all.map(|(key, value)| (key.to_owned(), value)).into()), out)
}

#[cfg(test)]
mod tests {
    use ovenbird_models::{
        checkpoint::{Checkpoint, write_safetensors},
        rcnn::{Config, Detector, classifier::LogitScale},
    };
    use tch::{Device, Kind, nn};

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
        write(Checkpoint::open(made.path()).unwrap().tensors(), &DetectorSpec::MaskRcnn(spec.clone()), &mut exported).unwrap();

        let (_others, other) = build(2);
        let read = Checkpoint::open(exported.path()).unwrap();
        let report = layout::load(read.tensors(), other.parameters(), exported.path()).unwrap().require_all(exported.path()).unwrap();
        assert_eq!(report.loaded.len(), trained.parameters().len());
        assert!(trained.parameters().iter().all(|(name, tensor)| other.parameters()[name].equal(tensor)));
    }

    /// Names of DetPro's detector as its specification lists them (section 4), a CLIP beside it.
    #[test]
    fn a_detector_goes_out_and_comes_in_under_the_names_of_detpro() {
        let config = Config { block_head: None, has_global_head: false, ..Config::toy(16) };
        let build = |seed| {
            let weights = nn::VarStore::new(Device::Cpu);
            let detector = Detector::new(&weights.root(), &config, seed).unwrap();
            (weights, detector)
        };
        let ((_weights, trained), (_others, other)) = (build(1), build(2));
        let mut theirs = layout::to_detpro(trained.parameters());
        for (name, size) in [
            ("roi_head.projection.weight", vec![16, 256]),
            ("roi_head.projection_for_image.bias", vec![16]),
            ("roi_head.bg_embedding.weight", vec![16, 1]),
            ("roi_head.bg_embedding.bias", vec![16]),
            ("roi_head.bbox_head.shared_convs_for_image.0.bn.running_var", vec![64]),
            ("roi_head.bbox_head.shared_fcs_for_image.0.bias", vec![256]),
            ("roi_head.bbox_head.shared_convs.0.conv.weight", vec![64, 64, 3, 3]),
            ("roi_head.bbox_head.fc_reg.bias", vec![4]),
        ] {
            assert_eq!(theirs[name].size(), size, "{name}");
        }
        assert!(!theirs.keys().any(|name| name.contains("_object_head") || name.contains("fc_cls")));
        // What training made of the bias counts too.
        let bias = Tensor::arange(16, (Kind::Float, Device::Cpu));
        theirs.insert("roi_head.bg_embedding.bias".into(), bias.shallow_clone());
        theirs.insert("roi_head.clip_model.visual.conv1.weight".into(), Tensor::zeros([4, 3, 2, 2], (Kind::Float, Device::Cpu)));
        let origin = std::path::Path::new("epoch_20.pth");
        let report = layout::load(&theirs, other.parameters(), origin).unwrap().require_all(origin).unwrap();
        assert_eq!(report.clip, ["roi_head.clip_model.visual.conv1.weight"]);
        for (name, tensor) in trained.parameters() {
            let expected = match name.as_str() {
                "roi_head.bbox_head.fc_cls._bg_embedding" => tensor + &bias,
                "roi_head._object_head.fc_cls._bg_embedding" => tensor.zeros_like(),
                _ => tensor.shallow_clone(),
            };
            assert!(other.parameters()[name].equal(&expected), "{name}");
        }
        let without = theirs.into_iter().filter(|(name, _)| name != "roi_head.bg_embedding.bias").collect();
        let refusal = layout::load(&without, other.parameters(), origin).unwrap_err().to_string();
        assert!(refusal.contains("roi_head.bg_embedding.weight is [16, 1]: expected a bias for each of its rows, found None"), "{refusal}");
    }
}
