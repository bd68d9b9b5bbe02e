//! `embeddings/export`: embeddings of proposals in one matrix, for other programs.

use std::io::Write as _;

use ovenbird_data::{
    annotations::ImageOrder,
    proposals::{self, IdMap, Proposal},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, IdMapFile, MatrixDtype, MatrixFile, MmdetProposals, RegionFeatures, Regions, narrowed},
    error::write_error,
};

/// Embeddings of proposals as LP-OVOD reads them: a matrix without a header, and the proposals and the id map that go with it.
///
/// Row by row in the order of the proposals in the pickle. numpy reads the matrix by `numpy.memmap(file, numpy.float16).reshape(-1, D)`.
/// (LP-OVOD, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// The number format of the matrix. LP-OVOD's extraction writes f16; its training reads f32 (defect 2 in docs/recipes/lp-ovod.md).
    pub dtype: MatrixDtype,
    /// The order of the images. Without it `file`, which LP-OVOD expects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<ImageOrder>,
}

const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of proposals.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS v1 json.");
const MATRIX: Out<MatrixFile> = Out::new("matrix", "[N, D], little-endian, without a header.");
const PROPOSALS: Out<MmdetProposals> = Out::new("proposals", "mmdet's pickle of the same proposals.");
const ID_MAP: Out<IdMapFile> = Out::new("id_map", "Which entry of the pickle is of which image, and how many boxes each has.");

impl Stage for Export {
    const KIND: &'static str = "embeddings/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[MATRIX.info(), PROPOSALS.info(), ID_MAP.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let images = annotations.images_in(self.order.unwrap_or(ImageOrder::File));
        let features = cx.inputs.read(FEATURES)?.by_image()?;
        cx.total(images.len() as u64);
        let draft = cx.begin(unit)?;
        let mut matrix = draft.create(MATRIX, "embeddings.bin")?;
        let path = matrix.path().to_owned();
        let (mut entries, mut n_rows) = (Vec::new(), 0);
        for image in &images {
            if !features.has(image.id) {
                return Err(Error::Input {
                    port: FEATURES.info().name,
                    problem: format!("none for image {}, which the annotations have", image.id),
                    hint: "use the features that were made for these annotations; if images were skipped, annotations without them".into(),
                });
            }
            let Regions { boxes, objectness, embeddings, .. } = features.get(image.id)?;
            matrix.write_all(&narrowed(&embeddings, self.dtype, &path)?).map_err(|source| write_error(&path, source))?;
            n_rows += boxes.len();
            entries.push(boxes.into_iter().zip(objectness).map(|(xyxy, score)| Proposal { xyxy, score }).collect::<Vec<Proposal>>());
            cx.tick(1);
            cx.proceed()?;
        }
        matrix.finish()?;
        let mut pickle = draft.create(PROPOSALS, "proposals.pkl")?;
        let path = pickle.path().to_owned();
        proposals::write_mmdet(&entries, &mut pickle).map_err(|source| write_error(&path, source))?;
        pickle.finish()?;
        draft.write(ID_MAP, "id_map.json", &IdMap::in_order(&images, &entries).to_json())?;
        cx.commit(draft, [("images".into(), images.len().into()), ("rows".into(), n_rows.into())].into())
    }
}
