//! `annotations/split` and `proposals/import`: what others made, checked and in the form that every later stage reads; `proposals/export`: the
//! way back.

use ovenbird_data::{
    Error as DataError,
    annotations::ImageOrder,
    classes::ClassSplit,
    proposals::{self, Pickled},
    split::{Keep as KeptLabels, write_split},
    warnings::of_boxes,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Classes, MmdetProposals, Proposals},
    contract::write_error,
};

/// Which classes are base and which are novel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ClassList {
    /// From the `classes` input.
    #[default]
    Input,
    /// The 48 base and 17 novel classes of COCO.
    #[serde(rename = "coco-48-17")]
    Coco4817,
    /// LVIS: frequent and common classes are base, rare ones novel.
    LvisFrequency,
}

/// Which labels and images stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Every listed class, every image (`.65`, `.1203`).
    #[default]
    All,
    /// Labels of base classes, every image (`.48`, `.866`).
    Base,
    /// Every listed class, images with at least one label (`.65.min`).
    AllAnnotated,
}

/// Annotations for open-vocabulary detection: classes renumbered as base ++ novel, novel labels kept or dropped.
///
/// New ids count from 0. Image and annotation ids, boxes, masks, areas and unknown fields keep their tokens exactly. LVIS
/// files must be covered by the class list; classes of COCO that are not listed are dropped. (OADP, annotation building.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Where the class list comes from.
    #[serde(default)]
    pub classes: ClassList,
    /// Which labels and images stay.
    #[serde(default)]
    pub keep: Keep,
}

const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS v1 json.");
const CLASSES: In<Classes> = In::optional("classes", "Base and novel class names, for `classes: input`.");
const SPLIT: Out<AnnotationFile> = Out::new("annotations", "The renumbered json: `categories`, `annotations`, `images`, no spaces.");
const LIST: Out<Classes> = Out::new("classes", "The class names; a class's new id is its place in base ++ novel.");

impl Stage for Split {
    const KIND: &'static str = "annotations/split";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[ANNOTATIONS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[SPLIT.info(), LIST.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let annotations = cx.inputs.read(ANNOTATIONS)?;
        // Contradictions are found before anything is built on the file.
        let checked = annotations.load()?;
        let classes = match self.classes {
            ClassList::Input => {
                let given = cx.inputs.read_if_given(CLASSES)?.map(|Classes(classes)| classes);
                given.ok_or_else(|| Error::Input {
                    port: "classes",
                    problem: "missing, but `classes: input` takes the class list from there".into(),
                    hint: "give `in: {classes: ...}`, or `with: {classes: coco-48-17}` or `lvis-frequency`".into(),
                })?
            }
            ClassList::Coco4817 => ClassSplit::coco_48_17(),
            ClassList::LvisFrequency => ClassSplit::by_frequency(&checked).ok_or_else(|| DataError::Malformed {
                path: annotations.file.path.clone(),
                problem: "a category without `frequency`".into(),
                hint: Some("`lvis-frequency` needs LVIS v1 annotations".into()),
            })?,
        };
        if let Some(words) = of_boxes(&checked) {
            cx.note(format!("{words}: they are kept as they are"));
        }
        drop(checked);
        let keep = match self.keep {
            Keep::All => KeptLabels::All,
            Keep::Base => KeptLabels::Base,
            Keep::AllAnnotated => KeptLabels::AllAnnotated,
        };
        let draft = cx.begin(unit)?;
        let mut file = draft.create(SPLIT, "annotations.json")?;
        let counts = write_split(&annotations.file.read()?, &annotations.file.path, &classes, keep, &mut file)?;
        file.finish()?;
        draft.write(LIST, "classes.json", &serde_json::to_vec(&classes).expect("BUG: names are plain JSON"))?;
        cx.tick(counts.images as u64);
        cx.commit(draft, [("images".into(), counts.images.into()), ("annotations".into(), counts.annotations.into())].into())
    }
}

/// The order of the entries of a file that has one an image and no ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Ascending image id.
    Id,
    /// As the annotations' file lists the images, which is what mmdet reads and writes.
    File,
}

impl Order {
    fn of_data(self) -> ImageOrder {
        match self {
            Self::Id => ImageOrder::Id,
            Self::File => ImageOrder::File,
        }
    }
}

/// Proposals that another program made, matched to images and checked.
///
/// Reads pickles without Python: of mmdet 1 and 2 (a list over images of float arrays `N x 5`: x1, y1, x2, y2 in px, score), of mmdet 3 (a
/// dict from image path to `bboxes` and `scores`), of Detectron and detectron2 (a dict of the lists `ids`, `boxes`, and `scores` or
/// `objectness_logits`). There must be an entry for every image, and boxes must lie in their images. Boxes without scores get a score of 1.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// The order of entries that do not say which image they are of; it makes no difference to others. Without it, the order that the boxes fit: boxes must lie in their images. If they fit both orders, the
    /// stage fails and asks for this parameter. It makes no difference where the annotations list their images in ascending id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Keeps at most this many proposals an image, best first; all without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_image: Option<usize>,
}

const PICKLE: In<MmdetProposals> = In::required("proposals", "A pickle of mmdet, Detectron or detectron2.");
const IMPORTED: Out<Proposals> = Out::new("proposals", "Boxes (xyxy, px) and scores by image id, in the file's order.");

impl Stage for Import {
    const KIND: &'static str = "proposals/import";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[PICKLE.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        let pickle = cx.inputs.read(PICKLE)?;
        let Pickled { entries, notes } = pickle.load()?;
        notes.into_iter().for_each(|words| cx.note(words));
        let matched = proposals::matched(entries, &annotations, self.order.map(Order::of_data), pickle.path())?;
        let order_words = match matched.order {
            Some(ImageOrder::Id) => "id",
            Some(ImageOrder::File) => "file",
            None => "named",
        };
        if matched.n_others > 0 {
            cx.note(format!("entries of {} images that the annotations do not have are left out", matched.n_others));
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
        cx.tick(n_images as u64);
        let metrics = [("images", n_images.into()), ("proposals", n_boxes.into()), ("order", order_words.into())];
        cx.commit(draft, metrics.map(|(name, value)| (name.to_owned(), value)).into())
    }
}

/// Proposals as the pickle that mmdet reads, without Python.
///
/// A list over the images of the annotations of float32 arrays `N x 5`: x1, y1, x2, y2 in px, score; in the order of the proposals.
/// Readers match entries with images by their places alone, so give the annotations that they will be read with.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// The order of the entries; `id` without it, with a note where the annotations list their images in another order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
}

const PROPOSALS: In<Proposals> = In::required("proposals", "Boxes (xyxy, px) and scores by image id.");
const EXPORTED: Out<MmdetProposals> = Out::new("proposals", "mmdet's pickle.");

impl Stage for Export {
    const KIND: &'static str = "proposals/export";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[PROPOSALS.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[EXPORTED.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let mut annotations = cx.inputs.read(ANNOTATIONS)?.load_images()?;
        annotations.images.truncate(cx.most_items.unwrap_or(usize::MAX));
        let proposals = cx.inputs.read(PROPOSALS)?;
        let n_entries = proposals.by_image.len();
        if self.order.is_none() && !annotations.file_order.is_sorted() {
            cx.note("entries are in ascending image id, but the annotations list the images in another order: mmdet needs `with: {order: file}`");
        }
        let boxes = proposals.of_images(annotations.images_in(self.order.map_or(ImageOrder::Id, Order::of_data)))?;
        if n_entries > boxes.len() {
            cx.note(format!("proposals of {} images that the annotations do not have are left out", n_entries - boxes.len()));
        }
        let draft = cx.begin(unit)?;
        let mut pickle = draft.create(EXPORTED, "proposals.pkl")?;
        let path = pickle.path().to_owned();
        proposals::write_mmdet(&boxes, &mut pickle).map_err(|source| write_error(&path, source))?;
        pickle.finish()?;
        cx.tick(boxes.len() as u64);
        let n_boxes: usize = boxes.iter().map(Vec::len).sum();
        cx.commit(draft, [("images".into(), boxes.len().into()), ("proposals".into(), n_boxes.into())].into())
    }
}
