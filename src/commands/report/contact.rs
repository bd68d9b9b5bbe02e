//! What contact sheets of a report share: how many pictures they show, and how a small one is made.

use std::fmt::Write as _;

use ovenbird_data::{
    annotations::ImageInfo,
    boxes::Xyxy,
    images::{Image, Preprocess, SquareResize},
};
use ovenbird_stages::artifacts::Images;

use super::{
    html::{escape, put},
    picture::base64,
};
use crate::error::Result;

/// The most pictures of a class that are shown.
pub(super) const PER_CLASS: usize = 20;
/// The most pictures of a sort that a report shows: with more classes or steps, fewer of each.
pub(super) const PER_REPORT: usize = 1000;
/// The side of a picture, px.
pub(super) const SIDE: u32 = 96;

/// How many times its longer side the surroundings of a box are wide.
const SURROUNDINGS: f32 = 1.3;

/// The part of an image that shows a box in its surroundings.
pub(super) struct Cutting {
    /// px of the image.
    pub(super) rectangle: [i64; 4],
    /// The box in a picture of the part, px.
    pub(super) inner: Xyxy,
}

impl Cutting {
    /// The part around a box in px of the image.
    pub(super) fn around(xyxy: &Xyxy) -> Self {
        let side = (SURROUNDINGS * xyxy.width().max(xyxy.height())).max(1.0);
        let [x, y] = [(xyxy.x1 + xyxy.x2) / 2.0, (xyxy.y1 + xyxy.y2) / 2.0].map(|centre| (centre - side / 2.0).round());
        let side = side.ceil();
        let scale = SIDE as f32 / side;
        let inner = Xyxy { x1: (xyxy.x1 - x) * scale, y1: (xyxy.y1 - y) * scale, x2: (xyxy.x2 - x) * scale, y2: (xyxy.y2 - y) * scale };
        Self { rectangle: [x, y, x + side, y + side].map(|corner| corner as i64), inner }
    }
}

/// A square part of an image as a JPEG of [`SIDE`] px, black where it leaves the image.
pub(super) fn cut(images: &Images, info: &ImageInfo, rectangle: [i64; 4]) -> Result<Vec<u8>> {
    let file = images.file(&info.file_name)?;
    let image = Image::decode_sized(&file.read()?, &file.path, [info.width, info.height]).map_err(ovenbird_stages::Error::from)?;
    let preprocess = Preprocess { side_px: SIDE, resize: SquareResize::Squash, mean: [0.0; 3], std: [1.0; 3] };
    Ok(preprocess.square_of(&image, rectangle).to_jpeg(80))
}

/// Begins a figure with a picture, or with an empty square where there is none; `words`: what it shows. What is drawn on it and the figure's end follow.
pub(super) fn begin_figure(out: &mut String, jpeg: &Result<Vec<u8>, String>, words: &str) {
    put!(out, "<figure><svg viewBox=\"0 0 {SIDE} {SIDE}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>", escape(words));
    match jpeg {
        Ok(jpeg) => put!(out, "<image width=\"{SIDE}\" height=\"{SIDE}\" href=\"data:image/jpeg;base64,{}\"/>", base64(jpeg)),
        Err(_) => put!(out, "<rect class=\"nothing\" width=\"{SIDE}\" height=\"{SIDE}\"/>"),
    }
}
