//! What contact sheets of a report share: how many pictures they show, and how a small one is made.

use std::fmt::Write as _;

use ovenbird_data::{
    annotations::ImageInfo,
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
