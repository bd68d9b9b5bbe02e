//! `proposals/import`: proposals that another program made.

use ovenbird_data::{
    annotations::ImageOrder,
    proposals::{self, Pickled},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, IdMapFile, MmdetProposals, Proposals},
};

/// Proposals that another program made, matched to images and checked.
///
/// Reads pickles without Python: of mmdet 1 and 2 (a list over images of float arrays `N x 5`: x1, y1, x2, y2 in px, score), of mmdet 3 (a
/// dict from image path to `bboxes` and `scores`), of Detectron and detectron2 (a dict of the lists `ids`, `boxes`, and `scores` or
/// `objectness_logits`). There must be an entry for every image, and boxes must lie in their images. Boxes without scores get a score of 1.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// The order of the entries, for files without image ids or paths and without `id_map`. Without it, the order in which all boxes lie within their images; if
    /// both orders fit, the stage fails and asks for this parameter. It does not matter if the annotations list images in ascending id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<ImageOrder>,
    /// The most proposals to keep per image, best first. Without it all are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_image: Option<usize>,
}

const PICKLE: In<MmdetProposals> = In::required("proposals", "A pickle of mmdet, Detectron or detectron2.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS v1 json.");
const ID_MAP: In<IdMapFile> = In::optional(
    "id_map",
    "Which entry of a pickle without ids is of which image, as LP-OVOD keeps it: json, `{\"<image id>\": place, \"num_proposal\": [counts]}`.",
);
const IMPORTED: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) and scores by image id, in the file's order.");
const IMPORTED_MAP: Out<IdMapFile> = Out::new("id_map", "Which entry of the file is of which image, and how many boxes each has.");

impl Stage for Import {
    const KIND: &'static str = "proposals/import";
    const VERSION: u32 = 4;
    const INPUTS: &'static [PortInfo] = &[PICKLE.info(), ANNOTATIONS.info(), ID_MAP.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMPORTED.info(), IMPORTED_MAP.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let pickle = cx.inputs.read(PICKLE)?;
        let Pickled { entries, notes } = pickle.load()?;
        notes.into_iter().for_each(|words| cx.note(words));
        let id_map = cx.inputs.read_if_given(ID_MAP)?.map(|IdMapFile(id_map)| id_map);
        let matched = proposals::matched(entries, &annotations, self.order, id_map.as_ref(), pickle.path())?;
        let order_words = match matched.order {
            Some(ImageOrder::Id) => "id",
            Some(ImageOrder::File) => "file",
            None => "named",
        };
        if matched.n_others > 0 {
            cx.note(format!("proposals of {} images that the annotations do not have are skipped", matched.n_others));
        }
        if self.order.is_none()
            && !annotations.file_order.is_sorted()
            && let Some(order) = matched.order
        {
            let words = match order {
                ImageOrder::Id => "in ascending image id, and not as the annotations list the images",
                ImageOrder::File => "as the annotations list the images, and not in ascending image id",
            };
            cx.note(format!("entries are {words}: the boxes fit that order only (`with: {{order: {order_words}}}`)"));
        }
        let mut by_image = matched.by_image;
        if let Some(most) = self.max_per_image {
            for of_image in by_image.values_mut() {
                of_image.sort_by(|a, b| b.score.total_cmp(&a.score));
                of_image.truncate(most);
            }
        }
        let n_boxes: usize = by_image.values().map(Vec::len).sum();
        let n_images = by_image.len();
        let draft = cx.begin(unit)?;
        Proposals { by_image }.write(draft.create(IMPORTED, "proposals.parquet")?)?;
        draft.write(IMPORTED_MAP, "id_map.json", &matched.id_map.to_json())?;
        cx.tick(n_images as u64);
        let metrics = [("images", n_images.into()), ("proposals", n_boxes.into()), ("order", order_words.into())];
        cx.commit(draft, metrics.map(|(name, value)| (name.to_owned(), value)).into())
    }
}
