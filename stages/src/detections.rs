//! `detections/export`: detections for other programs.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write as _},
};

use ovenbird_data::{
    annotations::{Annotations, CategoryId},
    boxes::Xyxy,
    evaluate::Detection,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{AnnotationFile, Detections, ResultsFile},
    error::write_error,
};

/// Detections as a COCO or LVIS results file, which pycocotools' `loadRes` and lvis-api's `LVISResults` read.
///
/// A list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, with `"segmentation"` (run-length encoding) if there are
/// masks; one line a detection, in the order of the input. Category ids are those of the annotations given here, matched by name:
/// `annotations/split` renumbers categories, so give the json that the results will be evaluated with. To evaluate masks with pycocotools
/// or lvis-api, remove `bbox` first, as mmdet does; otherwise small, medium and large are decided by box area.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Whose category ids the results have.
    pub category_ids: From,
    /// Whose images the results have detections in. pycocotools refuses images that its annotations lack.
    pub images: From,
}

/// One of the two inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// The annotations' that are given here.
    #[default]
    Annotations,
    /// The detections'.
    Detections,
}

const DETECTIONS: In<Detections> = In::required("detections", "Boxes, categories and scores; masks are optional.");
const ANNOTATIONS: In<AnnotationFile> = In::required(
    "annotations",
    "COCO or LVIS json whose category ids the results get: your own file, not the one that `annotations/split` made.",
);
const RESULTS: Out<ResultsFile> = Out::new("results", "A COCO or LVIS results file, json.");

/// One line of the file.
#[derive(Serialize)]
struct Entry<'a> {
    image_id: u64,
    category_id: u64,
    /// x, y, width, height.
    bbox: [f32; 4],
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    segmentation: Option<Runs<'a>>,
}

/// Packed run lengths.
#[derive(Serialize)]
struct Runs<'a> {
    /// Height, width.
    size: [u32; 2],
    counts: &'a str,
}

impl Stage for Export {
    const KIND: &'static str = "detections/export";
    const VERSION: u32 = 3;
    const INPUTS: &'static [PortInfo] = &[DETECTIONS.info(), ANNOTATIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[RESULTS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let annotations = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
        let detections = cx.inputs.read(DETECTIONS)?;
        let ids = match self.category_ids {
            From::Annotations => category_ids(&detections, &annotations)?,
            From::Detections => named_categories(&detections)?.into_keys().map(|id| (id, id)).collect(),
        };
        let draft = cx.begin(unit)?;
        let mut file = draft.create(RESULTS, "results.json")?;
        let path = file.path().to_owned();
        let failed = |source: io::Error| write_error(&path, source);
        let mut out = BufWriter::with_capacity(1 << 20, &mut file);
        let (mut n_detections, mut n_left, mut before) = (0_u64, 0_usize, "[\n");
        for piece in detections.pieces() {
            for detection in &piece? {
                if self.images == From::Annotations && annotations.image(detection.image_id).is_none() {
                    n_left += 1;
                    continue;
                }
                out.write_all(before.as_bytes()).map_err(failed)?;
                serde_json::to_writer(&mut out, &entry(detection, &ids)?).map_err(|error| failed(error.into()))?;
                (n_detections, before) = (n_detections + 1, ",\n");
            }
            cx.proceed()?;
        }
        let end = if n_detections == 0 { "[]\n" } else { "\n]\n" };
        out.write_all(end.as_bytes()).and_then(|()| out.flush()).map_err(failed)?;
        drop(out);
        file.finish()?;
        if n_left > 0 {
            cx.note(format!("{n_left} detections are not exported: the annotations do not have their images (`images: annotations`)"));
        }
        cx.tick(1);
        cx.commit(draft, [("detections".into(), n_detections.into())].into())
    }
}

/// The names of the detections' categories.
fn named_categories(detections: &Detections) -> Result<BTreeMap<CategoryId, String>> {
    detections.categories()?.ok_or_else(|| Error::Input {
        port: "detections",
        problem: "the table does not name its categories: it is of an earlier version".into(),
        hint: "make the detections again".into(),
    })
}

/// The annotations' id of each category of the detections, by name.
fn category_ids(detections: &Detections, annotations: &Annotations) -> Result<BTreeMap<CategoryId, CategoryId>> {
    let names = named_categories(detections)?;
    let by_name: BTreeMap<&str, CategoryId> = annotations.categories.iter().map(|category| (category.name.as_str(), category.id)).collect();
    let id = |(id, name): (CategoryId, String)| match by_name.get(name.as_str()) {
        Some(found) => Ok((id, *found)),
        None => Err(Error::Input {
            port: "annotations",
            problem: format!("no category is named `{name}`, which the detections have"),
            hint: "give the json that the detections' annotations were split from".into(),
        }),
    };
    names.into_iter().map(id).collect()
}

fn entry<'a>(detection: &'a Detection, ids: &BTreeMap<CategoryId, CategoryId>) -> Result<Entry<'a>> {
    let Detection { image_id, category_id, xyxy, score, mask } = detection;
    let Xyxy { x1, y1, .. } = *xyxy;
    let bbox = [x1, y1, xyxy.width(), xyxy.height()];
    let category_id = ids.get(category_id).ok_or_else(|| Error::Input {
        port: "detections",
        problem: format!("image {image_id}: a detection of category {category_id}, which the table does not name"),
        hint: "make the detections again".into(),
    })?;
    let segmentation = mask.as_ref().map(|mask| Runs { size: [mask.size[1], mask.size[0]], counts: &mask.counts });
    Ok(Entry { image_id: image_id.0, category_id: category_id.0, bbox, score: *score, segmentation })
}
