//! `proposals/export`: proposals for other programs.

use ovenbird_data::{
    annotations::ImageOrder,
    proposals::{self, IdMap},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, IdMapFile, MmdetProposals, Proposals},
    error::write_error,
};

/// Proposals as a pickle that mmdet reads, written without Python.
///
/// The pickle is a list with one float32 array `N x 5` per image of the annotations: x1, y1, x2, y2 in px, score; in the order of the
/// proposals. Readers match entries with images by position alone, so give the annotations that the pickle will be read with.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// The order of the entries. Without it `id`, with a note if the annotations list their images in another order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<ImageOrder>,
}

const PROPOSALS: In<Proposals> = In::required("proposals", "Boxes (xyxy, px) and scores by image id.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS v1 json.");
const EXPORTED: Out<MmdetProposals> = Out::new("proposals", "mmdet's pickle.");
const ID_MAP: Out<IdMapFile> =
    Out::new("id_map", "Which entry is of which image, and how many boxes each has, as LP-OVOD's `..._id_map.json`.");

impl Stage for Export {
    const KIND: &'static str = "proposals/export";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] = &[PROPOSALS.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info(), ID_MAP.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let proposals = cx.inputs.read(PROPOSALS)?;
        let n_entries = proposals.by_image.len();
        if self.order.is_none() && !annotations.file_order.is_sorted() {
            cx.note("entries are in ascending image id, but the annotations list the images in another order: mmdet needs `with: {order: file}`");
        }
        let images = annotations.images_in(self.order.unwrap_or(ImageOrder::Id));
        let boxes = proposals.of_images(images.iter().copied())?;
        if n_entries > boxes.len() {
            cx.note(format!("proposals of {} images that the annotations do not have are skipped", n_entries - boxes.len()));
        }
        let draft = cx.begin(unit)?;
        let mut pickle = draft.create(EXPORTED, "proposals.pkl")?;
        let path = pickle.path().to_owned();
        proposals::write_mmdet(&boxes, &mut pickle).map_err(|source| write_error(&path, source))?;
        pickle.finish()?;
        draft.write(ID_MAP, "id_map.json", &IdMap::in_order(&images, &boxes).to_json())?;
        cx.tick(boxes.len() as u64);
        let n_boxes: usize = boxes.iter().map(Vec::len).sum();
        cx.commit(draft, [("images".into(), boxes.len().into()), ("proposals".into(), n_boxes.into())].into())
    }
}
