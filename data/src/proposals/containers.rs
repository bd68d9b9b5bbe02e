//! The containers of pickled proposals: lists and dicts over images, and what names an image in them.

use ovenbird_pickle::{NumpyArray, Value};

use super::{
    Entries, ImageName, Proposal,
    rows::{of_fields, of_image},
};

/// The state of the scores of a whole file.
#[derive(Debug, Default)]
pub(super) struct Scores {
    /// Boxes that have none.
    pub(super) n_absent: usize,
    /// Whether they are called logits.
    pub(super) are_logits: bool,
}

impl Scores {
    /// Turns logits into scores; returns notes about assumptions.
    pub(super) fn settle(self, entries: &mut Entries) -> Vec<String> {
        let mut notes = Vec::new();
        if self.n_absent > 0 {
            notes.push(format!(
                "{} have no scores: each is taken as 1, so that none comes before another",
                plural(self.n_absent, "box", "boxes")
            ));
        }
        if self.are_logits {
            let of_images: Vec<&mut Vec<Proposal>> = match entries {
                Entries::InOrder(images) => images.iter_mut().collect(),
                Entries::Named(images) => images.iter_mut().map(|(_, of_image)| of_image).collect(),
            };
            let mut scores: Vec<&mut f32> = of_images.into_iter().flatten().map(|proposal| &mut proposal.score).collect();
            // Detectron's files say `objectness_logits` of probabilities once detectron2 has renamed their fields.
            if scores.iter().all(|score| (0.0..=1.0).contains(&**score)) {
                notes.push("`objectness_logits` are all from 0 to 1, and taken as scores".into());
            } else {
                scores.iter_mut().for_each(|score| **score = 1.0 / (1.0 + (-**score).exp()));
                notes.push("scores are the sigmoid of `objectness_logits`".into());
            }
        }
        notes
    }
}

fn plural(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

pub(super) fn entries(value: &Value, scores: &mut Scores) -> Result<Entries, String> {
    if let Some(columns) = value.as_entries() {
        let column = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, value.get(name)?)));
        if let Some((_, boxes)) = column(&["boxes", "bboxes"])
            && let Some((ids_name, ids)) = column(&["ids", "indexes", "image_ids", "img_ids"])
        {
            let ids = items(ids).ok_or_else(|| format!("`{ids_name}`: expected a list over images, found {}", ids.kind()))?;
            let boxes = items(boxes).ok_or_else(|| format!("`boxes`: expected a list over images, found {}", boxes.kind()))?;
            let rated = match column(&["scores", "objectness_logits"]) {
                Some((name, rated)) => {
                    scores.are_logits = name == "objectness_logits";
                    let rated = items(rated).ok_or_else(|| format!("`{name}`: expected a list over images, found {}", rated.kind()))?;
                    rated.into_iter().map(Some).collect()
                }
                None => vec![None; boxes.len()],
            };
            if ids.len() != boxes.len() || rated.len() != boxes.len() {
                return Err(format!(
                    "expected lists of one length, found {} ids, boxes of {} images and scores of {}",
                    ids.len(),
                    boxes.len(),
                    rated.len()
                ));
            }
            let is_xywh = is_xywh(value)?;
            let of_image = |((id, boxes), rated): ((&Value, &Value), &Option<Value>)| {
                let name = name_of(id).ok_or_else(|| format!("`{ids_name}`: expected ids of images, found {}", id.kind()))?;
                let proposals = of_fields(boxes, rated.as_ref(), is_xywh, scores).map_err(|problem| format!("image {name}: {problem}"))?;
                Ok((name, proposals))
            };
            return ids.iter().zip(&boxes).zip(&rated).map(of_image).collect::<Result<_, String>>().map(Entries::Named);
        }
        let of_image = |(key, value): &(Value, Value)| {
            let keys = || columns.iter().filter_map(|(key, _)| key.as_str()).take(8).collect::<Vec<_>>();
            let name = name_of(key).ok_or_else(|| format!("expected ids or paths of images as keys of the dict, found {}", key.kind()))?;
            let proposals = of_image(value, scores).map_err(|problem| match &name {
                ImageName::Text(text) if !text.contains('.') => format!("a dict of {:?}: `{text}`: {problem}", keys()),
                name => format!("image {name}: {problem}"),
            })?;
            Ok((name, proposals))
        };
        return columns.iter().map(of_image).collect::<Result<_, String>>().map(Entries::Named);
    }
    let images = items(value).ok_or_else(|| format!("expected a list or a dict over images, found {}", value.kind()))?;
    let mut names = Vec::new();
    let mut all = Vec::new();
    for (place, value) in images.iter().enumerate() {
        let name = field(value, "img_id").or_else(|| field(value, "image_id")).or_else(|| field(value, "img_path"));
        names.extend(name.and_then(name_of));
        let value = field(value, "pred_instances").unwrap_or(value);
        all.push(of_image(value, scores).map_err(|problem| format!("image {place} of the list: {problem}"))?);
    }
    match names.len() {
        0 => Ok(Entries::InOrder(all)),
        n if n == all.len() => Ok(Entries::Named(names.into_iter().zip(all).collect())),
        n => Err(format!("expected `img_id` or `img_path` in every entry of the list or in none, found it in {n} of {}", all.len())),
    }
}

/// The items of a list, a tuple, or an array along its first axis.
fn items(value: &Value) -> Option<Vec<Value>> {
    match value.as_items() {
        Some(items) => Some(items.to_vec()),
        None => value.object_array().and_then(|list| Some(list.as_list()?.to_vec())).or_else(|| value.array_items()),
    }
}

/// An entry of a dict, or an attribute of an object (`InstanceData` of mmengine).
pub(super) fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).or_else(|| value.as_object()?.state.as_ref()?.get(name))
}

/// The image name that a value holds.
fn name_of(value: &Value) -> Option<ImageName> {
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(ImageName::Id(number as i64));
    match value {
        Value::Str(text) => Some(ImageName::Text(text.to_string())),
        Value::Bytes(bytes) => Some(ImageName::Text(String::from_utf8(bytes.to_vec()).ok()?)),
        Value::Int(id) => Some(ImageName::Id(*id)),
        Value::Float(number) => whole(*number),
        _ => match value.to_array().ok()? {
            // An id beyond 2^24 has no f32.
            array @ NumpyArray { .. } if array.shape.iter().product::<usize>() == 1 => array.to_f64().ok().and_then(|ids| whole(ids[0])),
            _ => None,
        },
    }
}

/// How detectron2 keeps boxes as corners in px, and as a corner and a size.
const XYXY_ABS: i64 = 0;
const XYWH_ABS: i64 = 1;

/// Whether `bbox_mode` states that boxes are a corner and a size.
pub(super) fn is_xywh(value: &Value) -> Result<bool, String> {
    let Some(mode) = field(value, "bbox_mode") else { return Ok(false) };
    // An `IntEnum` is pickled as a call with its number.
    let number = mode.as_int().or_else(|| mode.as_object()?.args.first()?.as_int());
    match number {
        Some(XYXY_ABS) => Ok(false),
        Some(XYWH_ABS) => Ok(true),
        found => {
            let found = found.map_or_else(|| mode.kind(), |number| number.to_string());
            Err(format!("`bbox_mode`: expected {XYXY_ABS} (XYXY_ABS) or {XYWH_ABS} (XYWH_ABS), boxes in px, found {found}"))
        }
    }
}
