//! From a detector's file to a network that runs on images.

use ovenbird_data::classes::ClassSplit;
use ovenbird_models::rcnn::regions::RegionNetwork;
use tch::{Device, nn};

use super::{
    cosine::CosinePredictor,
    images::Normalisation,
    mask_rcnn::MaskRcnnPredictor,
    options::TestOptions,
    predictor::Predictor,
    sigmoid::SigmoidPredictor,
    spec::{DetectorFile, DetectorSpec},
};
use crate::{
    Artifact as _, Context, Error, Result,
    localizer::{options::LocalizerOptions, predictor::LocalizerPredictor},
};

/// Loads the detector of a file at a port, whatever its kind, to look for some classes. `localizer`: how CORA's localizer is run; without it there it is refused.
pub(super) fn load(
    file: &DetectorFile,
    port: &'static str,
    (options, localizer): (&TestOptions, Option<&LocalizerOptions>),
    classes: &ClassSplit,
    cx: &Context<'_>,
) -> Result<Box<dyn Predictor>> {
    let (checkpoint, whole) = file.read()?;
    let source = (&checkpoint, port);
    Ok(match &whole {
        DetectorSpec::Sigmoid(spec) => Box::new(SigmoidPredictor::load(spec, source, options, classes, cx)?),
        DetectorSpec::Cosine(spec) => Box::new(CosinePredictor::load(spec, source, options, classes, cx)?),
        DetectorSpec::MaskRcnn(spec) => Box::new(MaskRcnnPredictor::load(spec, source, options, classes, cx)?),
        DetectorSpec::Localizer(spec) => {
            let options = localizer.ok_or_else(|| Error::Input {
                port,
                problem: format!("a detector {}", whole.in_words()),
                hint: "run it with `localizer/test`".into(),
            })?;
            Box::new(LocalizerPredictor::load(spec, source, options, classes, cx)?)
        }
    })
}

/// The first stage of a detector, which proposes regions.
pub(crate) struct FirstStage {
    pub(crate) network: RegionNetwork,
    /// Maximum lengths of the longer and the shorter side of its images, in px.
    pub(crate) fits: [u32; 2],
    pub(crate) normalisation: Normalisation,
    /// Owns the weights.
    _store: nn::VarStore,
}

impl FirstStage {
    /// That of a detector's file, whatever its kind.
    pub(crate) fn load(file: &DetectorFile, device: Device) -> Result<Self> {
        let (checkpoint, spec) = file.read()?;
        let (network, store, fits, normalisation) = match &spec {
            DetectorSpec::Sigmoid(spec) => {
                let (detector, store) = spec.network(&checkpoint, device)?;
                (detector.regions, store, spec.fits, Normalisation::CLIP)
            }
            DetectorSpec::Cosine(spec) => {
                let (detector, store) = spec.network(&checkpoint, device)?;
                (detector.regions, store, spec.fits, Normalisation::IMAGENET)
            }
            DetectorSpec::MaskRcnn(spec) => {
                let (detector, store) = spec.network(&checkpoint, device)?;
                (detector.regions, store, spec.fits, Normalisation::IMAGENET)
            }
            DetectorSpec::Localizer(_) => {
                let problem = format!("a detector {}, which proposes no regions", spec.in_words());
                return Err(Error::Input {
                    port: DetectorFile::KIND,
                    problem,
                    hint: "give a two-stage detector (`detector/train`)".into(),
                });
            }
        };
        Ok(Self { network, fits, normalisation, _store: store })
    }
}
