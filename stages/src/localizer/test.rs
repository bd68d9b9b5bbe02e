//! `localizer/test`: runs a trained localizer on images.

use super::{options::LocalizerOptions, predictor::LocalizerPredictor};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Detections, Queries},
    detector::{
        images::TestImages,
        ports::{ANNOTATIONS, CLASSES, IMAGES},
        predictor::{detect, detection_units},
        spec::DetectorFile,
    },
    region::frozen::{CHECKPOINT, PROMPTS, REGION_PROMPT},
};

const LOCALIZER: In<DetectorFile> =
    In::required("localizer", "A localizer from `localizer/train`, `localizer/import` or `detector/select`.");
const DETECTIONS: Out<Detections> = Out::new("detections", "Boxes (xyxy, px), categories and scores by image, best first.");
const QUERIES: Out<Queries> =
    Out::new("queries", "The ten surest queries of each image: anchor, the class that CLIP gave it, box (xyxy, px), objectness.");

impl Stage for LocalizerOptions {
    const KIND: &'static str = "localizer/test";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[IMAGES.info(), ANNOTATIONS.info(), CLASSES.info(), LOCALIZER.info(), CHECKPOINT.info(), REGION_PROMPT.info(), PROMPTS.info()];
    const OUTPUTS: &'static [PortInfo] = &[DETECTIONS.info(), QUERIES.info()];
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
        let (weights, spec) = cx.inputs.read(LOCALIZER)?.read_localizer(LOCALIZER.info().name, "run it with `detector/test`")?;
        let predictor = LocalizerPredictor::load(&spec, (&weights, LOCALIZER.info().name), self, &classes, cx)?;
        let images = TestImages::open(cx.inputs.read(IMAGES)?, cx.inputs.read(ANNOTATIONS)?.load_categories()?, cx)?;
        detect(&predictor, &images, &classes, (DETECTIONS, units), cx, |draft| {
            Queries(predictor.taken()).write(draft.create(QUERIES, "queries.parquet")?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&LocalizerOptions::default()).is_empty());
    }
}
