//! `detector/test`: runs a trained detector on images.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_cache::Digest;
use ovenbird_data::annotations::CategoryId;

use super::{
    images::TestImages,
    load::load,
    options::TestOptions,
    ports::{ANNOTATIONS, AUGMENTED, CLASSES, IMAGES, MULTILABEL_PROMPTS, PROMPTS, PROPOSALS},
    predictor::{detection, predict_each},
    spec::DetectorFile,
};
use crate::{
    Context, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{Classes, Detections, category_names},
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
        let annotations = inputs.read(ANNOTATIONS)?.load_categories()?;
        let Classes(classes) = inputs.read(CLASSES)?;
        let ids: Vec<u8> = Classes::category_ids(&annotations, classes.all())?.iter().flat_map(|id| id.0.to_le_bytes()).collect();
        let ids = Digest::of(&ids);
        let images = inputs.read(IMAGES)?.items(&annotations)?;
        let item = |image: Digest| Digest::of_list("ovenbird detection 1", [("image", image), ("categories", ids)]);
        Ok(Units::Independent { items: images.into_iter().map(item).collect(), replaces: vec!["images", "annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let predictor = load(&cx.inputs.read(DETECTOR)?, DETECTOR.info().name, self, &classes, cx)?;
        let ids = Classes::category_ids(&annotations, classes.all())?;
        let categories: BTreeMap<CategoryId, String> = category_names(&annotations, &ids);
        let images = TestImages::open(cx.inputs.read(IMAGES)?, annotations, cx)?.with_proposals(PROPOSALS, cx)?;
        let images = images.with_augmented(AUGMENTED, cx)?;
        for unit in units {
            // A unit that another process or device makes is skipped.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let (mut detections, mut seen) = (Vec::new(), BTreeSet::new());
            predict_each(&*predictor, &images, unit.items.clone(), &draft, cx, |info, found| {
                seen.insert(info.id);
                detections.extend(found.into_iter().map(|found| detection(info.id, &ids, found)));
                Ok(())
            })?;
            Detections::write(&detections, &seen, &categories, draft.create(DETECTIONS, "detections.parquet")?)?;
            cx.commit(draft, [("detections".into(), detections.len().into())].into())?;
        }
        Ok(())
    }
}
