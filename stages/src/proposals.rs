//! Stages that make, import and export proposals.

pub mod export;
pub mod import;
pub mod oln;
pub mod oracle;
pub mod rpn;
pub mod truth;

use std::collections::BTreeMap;

use ovenbird_data::{boxes::Xyxy, proposals::Proposal, training::Placement};
use ovenbird_models::{detection::boxes::corners, rcnn};

use crate::{
    Context, Inputs, Out, Result, Unit, Units,
    artifacts::Proposals,
    detector::{
        images::TestImages,
        ports::{ANNOTATIONS, IMAGES},
        predictor::{Found, Predictor, predict_each},
    },
};

/// Units of stages whose items are images, which a network looks at.
fn network_units(inputs: &Inputs) -> Result<Units> {
    let items = inputs.read(IMAGES)?.items(&inputs.read(ANNOTATIONS)?.load_images()?)?;
    Ok(Units::Independent { items, replaces: vec![IMAGES.info().name, ANNOTATIONS.info().name] })
}

/// Writes what a network proposes in the images of some units.
fn propose(predictor: &dyn Predictor, port: Out<Proposals>, units: &[Unit], cx: &Context<'_>) -> Result<()> {
    let images = TestImages::open(cx.inputs.read(IMAGES)?, cx.inputs.read(ANNOTATIONS)?.load_images()?, cx)?;
    for unit in units {
        // A unit that another process or device makes is skipped.
        let Some(draft) = cx.begin_claimed(unit)? else { continue };
        let (mut by_image, mut n_proposals) = (BTreeMap::new(), 0);
        predict_each(predictor, &images, unit.items.clone(), &draft, cx, |info, found| {
            n_proposals += found.len();
            by_image.insert(info.id, found.into_iter().map(|Found { xyxy, score, .. }| Proposal { xyxy, score }).collect());
            Ok(())
        })?;
        Proposals { by_image }.write(draft.create(port, "proposals.parquet")?)?;
        cx.commit(draft, [("proposals".into(), n_proposals.into())].into())?;
    }
    Ok(())
}

/// Proposals of a network in an image as it was shown, in px of the original image.
fn found(proposals: &rcnn::rpn::Proposals, placement: &Placement) -> Result<Vec<Found>> {
    let scores = Vec::<f32>::try_from(&proposals.scores).map_err(ovenbird_models::Error::from)?;
    let found = |(corners, score)| Found { xyxy: placement.find(&Xyxy::from(corners)), class: 0, score, mask: None };
    Ok(corners(&proposals.boxes, "proposals")?.into_iter().zip(scores).map(found).collect())
}
