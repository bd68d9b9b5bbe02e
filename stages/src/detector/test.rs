//! `detector/test`: runs a trained detector on images.

use super::{
    images::TestImages,
    load::load,
    options::TestOptions,
    ports::{ANNOTATIONS, AUGMENTED, CLASSES, IMAGES, MULTILABEL_PROMPTS, PROMPTS, PROPOSALS},
    predictor::{detect, detection_units},
    spec::DetectorFile,
};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Detections},
};

const DETECTOR: In<DetectorFile> = In::required("detector", "A detector from `detector/train`, `detector/import` or `detector/select`.");
const DETECTIONS: Out<Detections> =
    Out::new("detections", "Boxes (xyxy, px), categories and scores by image, best first; masks, if the detector has a mask head.");

impl Stage for TestOptions {
    const KIND: &'static str = "detector/test";
    const VERSION: u32 = 5;
    const INPUTS: &'static [PortInfo] = &[
        IMAGES.info(),
        ANNOTATIONS.info(),
        CLASSES.info(),
        PROMPTS.info(),
        MULTILABEL_PROMPTS.info(),
        PROPOSALS.info(),
        AUGMENTED.info(),
        DETECTOR.info(),
    ];
    const OUTPUTS: &'static [PortInfo] = &[DETECTIONS.info()];
    const USES_DEVICE: bool = true;
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        self.check()
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        detection_units(inputs)
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let predictor = load(&cx.inputs.read(DETECTOR)?, DETECTOR.info().name, (self, None), &classes, cx)?;
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
        let images = TestImages::open(cx.inputs.read(IMAGES)?, annotations, cx)?.with_proposals(PROPOSALS, cx)?;
        detect(&*predictor, &images.with_augmented(AUGMENTED, cx)?, &classes, (DETECTIONS, units), cx, |_| Ok(()))
    }
}
