//! The proposals of one image: rows of numbers, or fields of a dict.

use ovenbird_pickle::Value;

use super::{
    Proposal,
    containers::{Scores, field, is_xywh},
};
use crate::boxes::Xyxy;

/// The proposals of an image: rows, or fields of a dict.
pub(super) fn of_image(value: &Value, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let boxes = ["bboxes", "boxes", "proposal_boxes"].iter().find_map(|name| field(value, name));
    if let Some(boxes) = boxes {
        let (rated, logits) = (field(value, "scores"), field(value, "objectness_logits"));
        scores.are_logits |= rated.is_none() && logits.is_some();
        return of_fields(boxes, rated.or(logits), is_xywh(value)?, scores);
    }
    if let Some(entries) = value.as_entries() {
        let keys: Vec<&str> = entries.iter().filter_map(|(key, _)| key.as_str()).take(8).collect();
        return Err(format!("expected `bboxes` and `scores`, found a dict of {keys:?}"));
    }
    let of_the_only_class = match value.as_items() {
        Some([class]) if class.as_float().is_none() && rows(class).is_ok() && row(class).is_none() => Some(class),
        _ => None,
    };
    let (width, numbers) = rows(of_the_only_class.unwrap_or(value))?;
    proposals(width, &numbers, None, false, scores)
}

/// The same where boxes and scores are apart.
pub(super) fn of_fields(boxes: &Value, rated: Option<&Value>, is_xywh: bool, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let (width, numbers) = rows(boxes).map_err(|problem| format!("boxes: {problem}"))?;
    let rated = match rated {
        Some(rated) => Some(column(rated).map_err(|problem| format!("scores: {problem}"))?),
        None => None,
    };
    proposals(width, &numbers, rated.as_deref(), is_xywh, scores)
}

fn proposals(width: usize, numbers: &[f32], rated: Option<&[f32]>, is_xywh: bool, scores: &mut Scores) -> Result<Vec<Proposal>, String> {
    let n_boxes = numbers.len() / width.max(1);
    if let Some(rated) = rated
        && rated.len() != n_boxes
    {
        return Err(format!("expected as many scores as boxes, found {} and {n_boxes}", rated.len()));
    }
    let proposal = |(place, row): (usize, &[f32])| {
        let [x1, y1, a, b] = [row[0], row[1], row[2], row[3]];
        let (x2, y2) = if is_xywh { (x1 + a, y1 + b) } else { (a, b) };
        let score = rated.map(|rated| rated[place]).or_else(|| row.get(4).copied());
        scores.n_absent += usize::from(score.is_none());
        Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, score: score.unwrap_or(1.0) }
    };
    Ok(numbers.chunks_exact(width.max(1)).enumerate().map(proposal).collect())
}

/// Rows of 4 or 5 numbers, and which; of none, whatever their width.
fn rows(value: &Value) -> Result<(usize, Vec<f32>), String> {
    let nested = value.object_array();
    let value = nested.as_ref().unwrap_or(value);
    let Some(items) = value.as_items() else {
        let array = value.to_array().map_err(|problem| if is_tensor(value) { of_tensor() } else { problem })?;
        return match array.shape[..] {
            [0] | [0, _] | [_, 0] if array.shape.len() == 1 || array.shape[0] == 0 => Ok((5, Vec::new())),
            [_, width @ (4 | 5)] => Ok((width, array.to_f32()?)),
            _ => Err(format!("expected an array [N, 5] or [N, 4], found {:?}", array.shape)),
        };
    };
    let mut numbers = Vec::new();
    let mut width = None;
    for (place, item) in items.iter().enumerate() {
        let of_row = row(item).ok_or_else(|| match item.as_items() {
            _ if is_tensor(item) => of_tensor(),
            Some(items) => format!("row {place}: expected 4 or 5 numbers, found a list of {}", items.len()),
            None if items.len() > 1 && item.to_array().is_ok() => {
                format!("expected boxes of one class, found a list of {} arrays: proposals have no classes", items.len())
            }
            None => format!("row {place}: expected 4 or 5 numbers, found {}", item.kind()),
        })?;
        if *width.get_or_insert(of_row.len()) != of_row.len() {
            return Err(format!("row {place}: expected {} numbers, as in the rows before, found {}", numbers.len() / place, of_row.len()));
        }
        numbers.extend(of_row);
    }
    Ok((width.unwrap_or(5), numbers))
}

/// A box, with or without its score, as a list or an array of one axis.
fn row(value: &Value) -> Option<Vec<f32>> {
    let numbers = column(value).ok()?;
    matches!(numbers.len(), 4 | 5).then_some(numbers)
}

/// A list or an array of numbers, of one axis or with a second one of length 1.
fn column(value: &Value) -> Result<Vec<f32>, String> {
    let nested = value.object_array();
    let value = nested.as_ref().unwrap_or(value);
    let Some(items) = value.as_items() else {
        let array = value.to_array().map_err(|problem| if is_tensor(value) { of_tensor() } else { problem })?;
        return match array.shape[..] {
            [_] | [_, 1] => array.to_f32(),
            [0, _] => Ok(Vec::new()),
            _ => Err(format!("expected an array [N], found {:?}", array.shape)),
        };
    };
    let number = |item: &Value| match item.as_float() {
        Some(number) => Ok(number as f32),
        None => match item.to_array() {
            Ok(array) if array.shape.iter().product::<usize>() == 1 => Ok(array.to_f32()?[0]),
            Ok(array) => Err(format!("expected numbers, found an array {:?}", array.shape)),
            Err(_) => Err(format!("expected numbers, found {}", item.kind())),
        },
    };
    items.iter().map(number).collect()
}

fn is_tensor(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.callable.is_global("torch._utils", "_rebuild_tensor_v2"))
}

fn of_tensor() -> String {
    "expected a numpy array, found a tensor of torch: pickle `tensor.cpu().numpy()`".into()
}
