//! Proposals: class-agnostic boxes with objectness, as mmdet keeps them.
//!
//! The file is a pickled list over images of float arrays `N x 5` (x1, y1, x2, y2 in px of the original image, score); there
//! are no image ids inside. Entry k belongs to the k-th image in ascending id.

use std::{
    io::{self, Write},
    path::Path,
};

use ovenbird_pickle::Value;

use crate::{Error, Result, annotations::ImageInfo, boxes::Xyxy};

/// How far a box may reach outside its image, in px: proposal networks round.
const TOLERANCE_PX: f32 = 1.0;

/// A box that may hold an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proposal {
    /// The box.
    pub xyxy: Xyxy,
    /// How sure the proposal network is, in [0, 1].
    pub score: f32,
}

/// Reads a pickle of mmdet; `path` is for the message. Arrays are float32 or float64; a list of one array an image (one class) is taken for the array.
pub fn read_mmdet(pickle: &[u8], path: &Path) -> Result<Vec<Vec<Proposal>>> {
    let malformed = |problem: String| Error::Malformed {
        path: path.to_owned(),
        problem,
        hint: Some("expected what mmdet's `--out` writes: a pickled list over images of float arrays N x 5".into()),
    };
    let value = ovenbird_pickle::read(pickle).map_err(|error| malformed(error.to_string()))?;
    let images = value.as_items().ok_or_else(|| malformed("expected a list over images".into()))?;
    let image =
        |(place, value): (usize, &Value)| of_image(value).map_err(|problem| malformed(format!("image {place} of the list: {problem}")));
    images.iter().enumerate().map(image).collect()
}

fn of_image(value: &Value) -> Result<Vec<Proposal>, String> {
    let value = match value.as_items() {
        Some([of_the_only_class]) => of_the_only_class,
        Some(classes) => return Err(format!("expected an array or a list of one, found a list of {}", classes.len())),
        None => value,
    };
    let array = value.to_array()?;
    let [n_boxes, 5] = array.shape.as_slice() else { return Err(format!("expected an array [N, 5], found {:?}", array.shape)) };
    let numbers = array.to_f32()?;
    let (rows, _) = numbers.as_chunks::<5>();
    debug_assert_eq!(rows.len(), *n_boxes);
    Ok(rows.iter().map(|[x1, y1, x2, y2, score]| Proposal { xyxy: Xyxy { x1: *x1, y1: *y1, x2: *x2, y2: *y2 }, score: *score }).collect())
}

/// Writes the same, float32.
pub fn write_mmdet(images: &[Vec<Proposal>], out: &mut impl Write) -> io::Result<()> {
    let row = |proposal: &Proposal| [proposal.xyxy.x1, proposal.xyxy.y1, proposal.xyxy.x2, proposal.xyxy.y2, proposal.score];
    let array = |proposals: &Vec<Proposal>| (proposals.len(), 5, proposals.iter().flat_map(row).collect::<Vec<f32>>());
    ovenbird_pickle::write_f32_arrays(images.iter().map(array), out)
}

/// Checks proposals against the images they are for, in ascending id; `path` is for the message.
///
/// There must be as many entries as images, every number finite, no box inside out or more than 1 px outside its image, and
/// every score in [0, 1]. Fails at the first that is not so, and names its image and row.
pub fn check(proposals: &[Vec<Proposal>], images: &[ImageInfo], path: &Path) -> Result<()> {
    let malformed = |problem: String, hint: &str| Err(Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) });
    if proposals.len() != images.len() {
        let (n_proposals, n_images) = (proposals.len(), images.len());
        let problem =
            format!("proposals of {n_proposals} images, but the annotations have {n_images}: entries belong to images in ascending id");
        return malformed(problem, "use the proposals made for exactly these annotations");
    }
    for (of_image, image) in proposals.iter().zip(images) {
        let (width, height) = (image.width as f32 + TOLERANCE_PX, image.height as f32 + TOLERANCE_PX);
        for (row, Proposal { xyxy, score }) in of_image.iter().enumerate() {
            let Xyxy { x1, y1, x2, y2 } = *xyxy;
            let place = format!("image {}, row {row}", image.id);
            if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
                return malformed(
                    format!("{place}: expected finite numbers, found [{x1}, {y1}, {x2}, {y2}], score {score}"),
                    "make the proposals again",
                );
            }
            if xyxy.width() < 0.0 || xyxy.height() < 0.0 {
                return malformed(format!("{place}: box [{x1}, {y1}, {x2}, {y2}] is inside out"), "expected x1, y1, x2, y2, score");
            }
            if x1 < -TOLERANCE_PX || y1 < -TOLERANCE_PX || x2 > width || y2 > height {
                let problem = format!("{place}: box [{x1}, {y1}, {x2}, {y2}] leaves the image of {} x {} px", image.width, image.height);
                return malformed(problem, "the proposals seem to be of other images, or of resized ones");
            }
            if !(0.0..=1.0).contains(score) {
                return malformed(format!("{place}: expected a score in [0, 1], found {score}"), "expected x1, y1, x2, y2, score");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::annotations::ImageId;

    fn proposal(x1: f32, y1: f32, x2: f32, y2: f32, score: f32) -> Proposal {
        Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, score }
    }

    fn read(path: &Path) -> Result<Vec<Vec<Proposal>>> {
        read_mmdet(&fs::read(path).unwrap(), path)
    }

    fn image(id: u64) -> ImageInfo {
        let (neg_category_ids, not_exhaustive_category_ids) = (Vec::new(), Vec::new());
        ImageInfo { id: ImageId(id), file_name: "a.jpg".into(), width: 40, height: 30, neg_category_ids, not_exhaustive_category_ids }
    }

    #[test]
    fn pickles_written_by_numpy_are_read() {
        for protocol in [0, 2, 4, 5] {
            let path = format!("{}/../tests/golden/pickle/arrays-{protocol}.pkl", env!("CARGO_MANIFEST_DIR"));
            let read = read(Path::new(&path)).unwrap();
            let two = vec![proposal(0.0, 0.25, 0.5, 0.75, 1.0), proposal(1.25, 1.5, 1.75, 2.0, 2.25)];
            assert_eq!(read, [two.clone(), two.clone(), vec![], two]);
        }
    }

    #[test]
    fn arrays_and_lists_of_one_class_are_read_from_every_protocol() {
        let two = vec![proposal(0.0, 0.25, 10.5, 20.0, 0.75), proposal(1.5, 2.0, 30.0, 29.125, 0.5)];
        let expected = [two.clone(), two.clone(), vec![], two[1..].to_vec()];
        for name in ["flat", "list", "tuple"] {
            for protocol in [2, 4, 5] {
                let path = format!("{}/../tests/golden/proposals/{name}-{protocol}.pkl", env!("CARGO_MANIFEST_DIR"));
                assert_eq!(read(Path::new(&path)).unwrap(), expected, "{name} {protocol}");
            }
        }
    }

    #[test]
    fn boxes_may_reach_a_pixel_out() {
        let proposals = [vec![proposal(-1.0, -0.5, 41.0, 31.0, 1.0), proposal(3.0, 3.0, 3.0, 3.0, 0.0)]];
        check(&proposals, &[image(4)], Path::new("proposals.pkl")).unwrap();
    }

    #[test]
    fn what_is_no_list_of_arrays_is_named_with_its_place() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let (four, five) = ([0.0_f32; 4], [0.0_f32; 5]);
        ovenbird_pickle::write_f32_arrays([(1, 5, five.as_slice()), (1, 4, four.as_slice())], &mut file).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("image 1 of the list: expected an array [N, 5], found [1, 4]"), "{error}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proposals.pkl");
        let proposals = vec![vec![proposal(0.0, 1.0, 20.5, 30.0, 0.75)], vec![]];
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write_mmdet(&proposals, &mut file).unwrap();
        file.persist(&path).unwrap();
        assert_eq!(read(&path).unwrap(), proposals);
    }

    #[test]
    fn proposals_that_cannot_belong_to_these_images_are_named() {
        let cases = [
            (vec![vec![]], "proposals.pkl: proposals of 1 images, but the annotations have 2: entries belong to images in ascending id"),
            (
                vec![vec![], vec![proposal(0.0, 0.0, 42.0, 1.0, 0.5)]],
                "proposals.pkl: image 9, row 0: box [0, 0, 42, 1] leaves the image of 40 x 30 px",
            ),
            (vec![vec![proposal(5.0, 0.0, 1.0, 1.0, 0.5)], vec![]], "proposals.pkl: image 4, row 0: box [5, 0, 1, 1] is inside out"),
            (vec![vec![proposal(0.0, 0.0, 1.0, 1.0, 1.5)], vec![]], "proposals.pkl: image 4, row 0: expected a score in [0, 1], found 1.5"),
            (
                vec![vec![proposal(0.0, f32::NAN, 1.0, 1.0, 0.5)], vec![]],
                "proposals.pkl: image 4, row 0: expected finite numbers, found [0, NaN, 1, 1], score 0.5",
            ),
        ];
        for (proposals, expected) in cases {
            let error = check(&proposals, &[image(4), image(9)], Path::new("proposals.pkl")).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
