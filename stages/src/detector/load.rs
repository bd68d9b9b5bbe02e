//! From a detector's file to a network that runs on images.

use ovenbird_data::classes::ClassSplit;

use super::{
    mask_rcnn::MaskRcnnPredictor,
    options::TestOptions,
    predictor::Predictor,
    sigmoid::SigmoidPredictor,
    spec::{DetectorFile, DetectorSpec},
};
use crate::{Context, Result};

/// Loads the detector of a file at a port, whatever its kind, to look for some classes.
pub(super) fn load(
    file: &DetectorFile,
    port: &'static str,
    options: &TestOptions,
    classes: &ClassSplit,
    cx: &Context<'_>,
) -> Result<Box<dyn Predictor>> {
    let (checkpoint, spec) = file.read()?;
    let source = (&checkpoint, file.file.path.as_path(), port);
    Ok(match &spec {
        DetectorSpec::Sigmoid(spec) => Box::new(SigmoidPredictor::load(spec, source, options, classes, cx)?),
        DetectorSpec::MaskRcnn(spec) => Box::new(MaskRcnnPredictor::load(spec, source, options, classes, cx)?),
    })
}
