//! `detections/export`: detections for the programs of others.

use std::io::{self, BufWriter, Write as _};

use ovenbird_data::{boxes::Xyxy, evaluate::Detection};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{Detections, ResultsFile},
    contract::write_error,
};

/// Detections as one results file of COCO and LVIS, which pycocotools' `loadRes` and lvis-api's `LVISResults` read.
///
/// A list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, with `"segmentation"` (packed run lengths) where there
/// are masks; a line each, in the detections' order. Ids are those of the annotations that were detected with, numbers the shortest
/// decimals of f32. Who evaluates masks with pycocotools or lvis-api takes `bbox` out first, as mmdet does: otherwise small, medium and
/// large go by boxes.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {}

const DETECTIONS: In<Detections> = In::required("detections", "Boxes, categories and scores; masks are optional.");
const RESULTS: Out<ResultsFile> = Out::new("results", "A results file of COCO and LVIS, json.");

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
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[DETECTIONS.info()];
    const OUTPUTS: &'static [PortInfo] = &[RESULTS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let draft = cx.begin(unit)?;
        let mut file = draft.create(RESULTS, "results.json")?;
        let path = file.path().to_owned();
        let failed = |source: io::Error| write_error(&path, source);
        let mut out = BufWriter::with_capacity(1 << 20, &mut file);
        let (mut n_detections, mut before) = (0_u64, "[\n");
        for detections in cx.inputs.read(DETECTIONS)?.pieces() {
            for detection in &detections? {
                out.write_all(before.as_bytes()).map_err(failed)?;
                serde_json::to_writer(&mut out, &entry(detection)).map_err(|error| failed(error.into()))?;
                (n_detections, before) = (n_detections + 1, ",\n");
            }
            cx.proceed()?;
        }
        let end = if n_detections == 0 { "[]\n" } else { "\n]\n" };
        out.write_all(end.as_bytes()).and_then(|()| out.flush()).map_err(failed)?;
        drop(out);
        file.finish()?;
        cx.tick(1);
        cx.commit(draft, [("detections".into(), n_detections.into())].into())
    }
}

fn entry(detection: &Detection) -> Entry<'_> {
    let Detection { image_id, category_id, xyxy, score, mask } = detection;
    let Xyxy { x1, y1, .. } = *xyxy;
    let bbox = [x1, y1, xyxy.width(), xyxy.height()];
    let segmentation = mask.as_ref().map(|mask| Runs { size: [mask.size[1], mask.size[0]], counts: &mask.counts });
    Entry { image_id: image_id.0, category_id: category_id.0, bbox, score: *score, segmentation }
}
