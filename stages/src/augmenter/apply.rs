//! `augmenter/apply`: augmented embeddings of regions.

use ovenbird_models::{augmenter::Concepts, to_unit_length};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::network::{AugmenterFile, Loaded};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Result, Stage, Unit, Units, artifacts,
    artifacts::{Dtype, RegionFeatures, RegionFeaturesWriter, Regions},
    clip::space,
};

/// Regions of a forward pass. Part of the results: libtorch may sum in another order for another shape, so the last regions of an image are
/// filled up with zeros and the shape is always the same.
const REGIONS: usize = 256;

/// Embeddings of regions, augmented by concepts: what RAF compares with the classes.
///
/// The products of these with class embeddings, and with a detector's row of background, correct its scores. They depend on neither, so
/// classes, top k, fusion and threshold change without another pass of CLIP or of the augmenter. Boxes and objectness stay. (RALF,
/// sections 8.2 and 9.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Apply {
    /// The number format of stored embeddings.
    pub dtype: Dtype,
}

const AUGMENTER: In<AugmenterFile> = In::required("augmenter", "The trained network.");
const CONCEPTS: In<artifacts::Concepts> = In::required("concepts", "Phrases with embeddings of the same CLIP.");
const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of regions by the same CLIP.");
const AUGMENTED: Out<RegionFeatures> =
    Out::new("features", "The same regions: `embedding` [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

impl Stage for Apply {
    const KIND: &'static str = "augmenter/apply";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[AUGMENTER.info(), CONCEPTS.info(), FEATURES.info()];
    const OUTPUTS: &'static [PortInfo] = &[AUGMENTED.info()];
    const USES_DEVICE: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        Ok(Units::Independent { items: inputs.read(FEATURES)?.places()?.items(), replaces: vec![FEATURES.info().name] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let (features, concepts) = (cx.inputs.read(FEATURES)?, cx.inputs.read(CONCEPTS)?);
        let network = cx.inputs.read(AUGMENTER)?.load(cx.device)?;
        let space = space::common(&[
            (AUGMENTER.info().name, network.spec.clip),
            (CONCEPTS.info().name, concepts.clip),
            (FEATURES.info().name, features.clip()?),
        ])?;
        let (dim, found) = (network.spec.config.dim, features.dim()?);
        if found as i64 != dim {
            let problem = format!("embeddings of {found} numbers, the augmenter reads {dim}");
            return Err(Error::Input { port: FEATURES.info().name, problem, hint: "make them with the CLIP of its training".into() });
        }
        let concepts = concepts.for_augmenter(dim, network.spec.config.n_concepts, cx.device)?;
        let places = features.places()?;
        for unit in units {
            // A unit that another process or device makes is skipped.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let shard = draft.create(AUGMENTED, "regions.arrow")?;
            let mut shard = RegionFeaturesWriter::new(shard, &draft.unit().fingerprint, self.dtype, dim as usize, space)?;
            let mut n_regions = 0;
            for piece in places.pieces(&unit.items) {
                let (rows, _) = places.regions(&piece)?;
                for regions in rows {
                    let regions = regions?;
                    n_regions += regions.boxes.len();
                    let embeddings = augmented(&network, &concepts, &regions.embeddings, cx.device)?;
                    shard.push(Regions { embeddings, ..regions })?;
                    cx.tick(1);
                    cx.proceed()?;
                }
            }
            shard.finish()?;
            cx.commit(draft, [("images".into(), unit.items.len().into()), ("rows".into(), n_regions.into())].into())?;
        }
        Ok(())
    }
}

/// Augments embeddings `[N, D]`, row by row.
fn augmented(network: &Loaded, concepts: &Concepts, embeddings: &[f32], device: Device) -> Result<Vec<f32>> {
    let dim = network.spec.config.dim;
    let mut all = Vec::with_capacity(embeddings.len());
    for rows in embeddings.chunks(REGIONS * dim as usize) {
        let n = (rows.len() as i64) / dim;
        let rows = Tensor::from_slice(rows).view([n, dim]).constant_pad_nd([0, 0, 0, REGIONS as i64 - n]).to_device(device);
        let out = no_grad(|| Ok::<_, Error>(network.augmenter.forward(&to_unit_length(&rows), concepts, None)?.out()))?;
        let out = out.narrow(0, 0, n).to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1);
        all.extend(Vec::<f32>::try_from(out).map_err(ovenbird_models::Error::from)?);
    }
    Ok(all)
}
