//! `blocks/import` and `blocks/export`: embeddings of blocks from and for the OADP reference.

use ovenbird_data::{annotations::ImageInfo, boxes::Xyxy, views};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Error, In, Out, PortInfo, Result,
    artifacts::{
        Dtype, FeatureFiles, Piece, Places, RegionFeatures, Regions, Row, RowKind, WholeBox,
        feature_files::{Holds, Read, box_problem, slack_px, write_regions},
    },
    exchange::{FileWriter, Readable, Writable},
};

const IMPORTED: Out<RegionFeatures> =
    Out::new("features", "By image: `embedding` f16 [N, D] of unit norm, `xyxy` f32 [N, 4] px, `objectness` f32 [N].");

/// Embeddings of blocks that the OADP reference extracted, checked.
///
/// Reads the file `{id:012}.pth` of every image of the annotations: a dict of `embeddings` f16 [N, D] of unit norm and `bboxes` f16 [N, 4].
/// The first block is the whole image. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FromFiles {
    /// The box of the first row, which files may have in either form. `fixed` replaces it by the centre square that the embedding shows,
    /// computed from the image's size; `reference` keeps it as found, and refuses images where it is inside out (more than three times as
    /// long as high).
    pub whole_box: WholeBox,
}

impl Readable for FromFiles {
    const KIND: &'static str = "blocks/import";
    const FEATURES: PortInfo = IMPORTED.info();
    const ROWS: RowKind = RowKind::Regions(Dtype::F16);

    fn read(&self, files: &FeatureFiles, image: &ImageInfo) -> Result<Read<Row>> {
        let Read { mut row, dim } = files.regions(image, Holds::Blocks)?;
        self.check_boxes(&mut row, image, files)?;
        Ok(Read { row: Row::Regions(row), dim })
    }
}

impl FromFiles {
    fn check_boxes(&self, blocks: &mut Regions, image: &ImageInfo, files: &FeatureFiles) -> Result<()> {
        let size = blocks.size_px;
        let [fixed, reference] = [views::whole_box(size), views::reference_whole_box(size)];
        let slack = slack_px(size);
        let corners = |xyxy: &Xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2];
        let is_near = |a: &Xyxy, b: &Xyxy| corners(a).iter().zip(corners(b)).all(|(a, b)| (a - b).abs() <= slack);
        let others_hint = "these blocks seem to be of another image: give the annotations that they were extracted for";
        match blocks.boxes.first_mut() {
            Some(first) if is_near(first, &fixed) || is_near(first, &reference) => match self.whole_box {
                WholeBox::Fixed => *first = fixed,
                WholeBox::Reference => {
                    if let Some(problem) = box_problem(&[*first], 0, size) {
                        return Err(files.malformed(image, problem, "replace the boxes of whole images: `with: {whole_box: fixed}`"));
                    }
                }
            },
            Some(first) => {
                let [fixed, reference, found] = [fixed, reference, *first].map(|xyxy| corners(&xyxy));
                let problem = format!("bboxes, row 0: expected the whole image's box, {fixed:?} or {reference:?}, found {found:?}");
                return Err(files.malformed(image, problem, others_hint));
            }
            None => return Err(files.malformed(image, "bboxes: expected the whole image's box, found none".into(), others_hint)),
        }
        match box_problem(&blocks.boxes[1..], 1, size) {
            Some(problem) => Err(files.malformed(image, problem, others_hint)),
            None => Ok(()),
        }
    }
}

/// Embeddings of blocks as files that the OADP reference reads.
///
/// Writes the file `{id:012}.pth` of each image: a dict of `embeddings` f16 [N, D] and `bboxes` f16 [N, 4], which
/// `torch.load(weights_only=True)` reads. (OADP, section 1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ToFiles {
    /// The box of the first row to write, whichever the features have. The reference trains better on `fixed`; `reference` is the form that
    /// it writes itself.
    pub whole_box: WholeBox,
}

impl Writable for ToFiles {
    type Features = RegionFeatures;

    const KIND: &'static str = "blocks/export";
    const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of regions.");

    fn places(features: &RegionFeatures) -> Result<Places<'_>> {
        features.places()
    }

    fn write(&self, places: &Places<'_>, piece: &Piece, files: &FileWriter<'_>) -> Result<()> {
        let (mut rows, dim) = places.regions(piece)?;
        rows.try_for_each(|blocks| {
            let blocks = self.with_whole_box(blocks?)?;
            files.write(blocks.image_id, |out| write_regions(&blocks, dim, Holds::Blocks, out))
        })
    }
}

impl ToFiles {
    /// Replaces the box of the first block. Fails where that is not the whole image.
    fn with_whole_box(&self, mut blocks: Regions) -> Result<Regions> {
        let size = blocks.size_px;
        let is_whole = |xyxy: &Xyxy| *xyxy == views::whole_box(size) || *xyxy == views::reference_whole_box(size);
        match blocks.boxes.first_mut() {
            Some(first) if is_whole(first) => *first = self.whole_box.of(size),
            Some(_) | None => {
                return Err(Error::Input {
                    port: "features",
                    problem: format!("image {}: the first region is not the whole image: these are no blocks", blocks.image_id),
                    hint: "give what `clip/blocks` made; objects have `objects/export`".into(),
                });
            }
        }
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifacts::feature_files::tests::{golden, golden_files, golden_image, image};

    #[test]
    fn the_box_of_the_whole_image_is_mended_or_kept_and_never_inside_out() {
        let (files, golden) = (golden_files("blocks"), golden());
        let found = |place: usize, whole_box: WholeBox| {
            let image = golden_image(&golden[place]);
            let Read { mut row, .. } = files.regions(&image, Holds::Blocks).unwrap();
            let stage = FromFiles { whole_box };
            stage.check_boxes(&mut row, &image, &files).map(|()| row.boxes[0]).map_err(|error| (error.to_string(), error.hint()))
        };
        assert_eq!(found(0, WholeBox::Fixed).unwrap(), Xyxy::from([80.0, 0.0, 560.0, 480.0]));
        assert_eq!(found(0, WholeBox::Reference).unwrap(), Xyxy::from([80.0, 0.0, 480.0, 480.0]));
        assert_eq!(found(1, WholeBox::Fixed).unwrap(), Xyxy::from([0.0, 83.5, 333.0, 416.5]));
        // 700 x 200.
        assert_eq!(found(2, WholeBox::Fixed).unwrap(), Xyxy::from([250.0, 0.0, 450.0, 200.0]));
        let (problem, hint) = found(2, WholeBox::Reference).unwrap_err();
        assert!(problem.ends_with("000000000139.pth: bboxes, row 0: box [250, 0, 200, 200] has x2 < x1 or y2 < y1"), "{problem}");
        assert_eq!(hint.unwrap(), "replace the boxes of whole images: `with: {whole_box: fixed}`");
    }

    #[test]
    fn blocks_of_another_image_are_found_out() {
        let (files, golden) = (golden_files("blocks"), golden());
        let Read { row, .. } = files.regions(&golden_image(&golden[0]), Holds::Blocks).unwrap();
        let problem = |size: [u32; 2], change: fn(&mut Regions)| {
            let mut row = Regions { size_px: size, ..row.clone() };
            change(&mut row);
            FromFiles::default().check_boxes(&mut row, &image(9, size), &files).unwrap_err().to_string()
        };
        let turned = problem([480, 640], |_| {});
        assert!(turned.contains("bboxes, row 0: expected the whole image's box, [0.0, 80.0, 480.0, 560.0] or"), "{turned}");
        let none = problem([640, 480], |row| row.boxes.clear());
        assert!(none.ends_with("bboxes: expected the whole image's box, found none"), "{none}");
        let inside_out = problem([640, 480], |row| row.boxes[2] = Xyxy::from([9.0, 1.0, 3.0, 2.0]));
        assert!(inside_out.ends_with("bboxes, row 2: box [9, 1, 3, 2] has x2 < x1 or y2 < y1"), "{inside_out}");
        let outside = problem([640, 480], |row| row.boxes[1] = Xyxy::from([9.0, 1.0, 643.0, 2.0]));
        assert!(outside.ends_with("bboxes, row 1: box [9, 1, 643, 2] extends beyond the image of 640 x 480 px"), "{outside}");
    }
}
