//! Proposals: class-agnostic boxes with objectness, as mmdet keeps them.
//!
//! The file is a pickled list over images of float arrays `N x 5` (x1, y1, x2, y2 in px of the original image, score); there
//! are no image ids inside. Entries are in ascending image id or, as mmdet itself writes them, in the order in which the annotation file
//! lists the images; where these differ, [`order`] finds out which it is.

use std::{
    io::{self, Write},
    path::Path,
};

use ovenbird_pickle::Value;

use crate::{
    Error, Result,
    annotations::{Annotations, ImageInfo, ImageOrder},
    boxes::Xyxy,
};

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
    // `np.array([])`: no proposals.
    if array.shape == [0] {
        return Ok(Vec::new());
    }
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

/// What is wrong with an entry, and what to do about it.
struct Misfit {
    problem: String,
    hint: &'static str,
}

/// Checks proposals against images, and finds the order in which their entries are.
///
/// There must be as many entries as images, every number finite, no box inside out or more than 1 px outside its image, and every score
/// in [0, 1]. Where the file lists its images in ascending id there is one order only. Otherwise it is the one that was `asked` for, or
/// the only one that the boxes fit; fails where they fit both or neither. `path` is for the message.
pub fn order(proposals: &[Vec<Proposal>], annotations: &Annotations, asked: Option<ImageOrder>, path: &Path) -> Result<ImageOrder> {
    let malformed = |problem: String, hint: String| Err(Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) });
    if proposals.len() != annotations.images.len() {
        let (n_proposals, n_images) = (proposals.len(), annotations.images.len());
        let problem = format!("proposals of {n_proposals} images, but the annotations have {n_images}");
        return malformed(problem, "use the proposals made for exactly these annotations".into());
    }
    let check_in = |order: ImageOrder| check(proposals, &annotations.images_in(order));
    if annotations.file_order.is_sorted() {
        return match check_in(ImageOrder::Id) {
            Ok(()) => Ok(asked.unwrap_or(ImageOrder::Id)),
            Err(Misfit { problem, hint }) => malformed(problem, hint.into()),
        };
    }
    match (asked, check_in(ImageOrder::Id), check_in(ImageOrder::File)) {
        (Some(ImageOrder::Id) | None, Ok(()), Err(_)) | (Some(ImageOrder::Id), Ok(()), Ok(())) => Ok(ImageOrder::Id),
        (Some(ImageOrder::File) | None, Err(_), Ok(())) | (Some(ImageOrder::File), Ok(()), Ok(())) => Ok(ImageOrder::File),
        (Some(ImageOrder::Id), Err(Misfit { problem, .. }), Ok(())) => malformed(
            format!("{problem}, with entries in ascending image id"),
            "the boxes fit the order in which the annotations list the images: set `with: {order: file}`".into(),
        ),
        (Some(ImageOrder::File), Ok(()), Err(Misfit { problem, .. })) => malformed(
            format!("{problem}, with entries in the order in which the annotations list the images"),
            "the boxes fit ascending image ids: set `with: {order: id}`".into(),
        ),
        (None, Ok(()), Ok(())) => malformed(
            "the entries have no image ids, the annotations do not list the images in ascending id, and the boxes fit both orders".into(),
            "set `with: {order: file}` if the entries are in the order in which the annotations list the images, as mmdet writes them; \
             set `with: {order: id}` if they are in ascending image id"
                .into(),
        ),
        (_, Err(by_id), Err(in_file)) => malformed(
            format!(
                "the boxes fit neither order of the images: in ascending id, {}; in the order of the annotations' file, {}",
                by_id.problem, in_file.problem
            ),
            format!("{}; `with: {{order: file}}` or `{{order: id}}` says which order entries have", by_id.hint),
        ),
    }
}

/// Checks each entry against the image at the same place. Fails at the first that does not fit, and names its image and row.
fn check(proposals: &[Vec<Proposal>], images: &[&ImageInfo]) -> Result<(), Misfit> {
    let misfit = |problem: String, hint: &'static str| Err(Misfit { problem, hint });
    for (of_image, image) in proposals.iter().zip(images) {
        let (width, height) = (image.width as f32 + TOLERANCE_PX, image.height as f32 + TOLERANCE_PX);
        for (row, Proposal { xyxy, score }) in of_image.iter().enumerate() {
            let Xyxy { x1, y1, x2, y2 } = *xyxy;
            let place = format!("image {}, row {row}", image.id);
            if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
                return misfit(
                    format!("{place}: expected finite numbers, found [{x1}, {y1}, {x2}, {y2}], score {score}"),
                    "make the proposals again",
                );
            }
            if xyxy.width() < 0.0 || xyxy.height() < 0.0 {
                return misfit(format!("{place}: box [{x1}, {y1}, {x2}, {y2}] is inside out"), "expected x1, y1, x2, y2, score");
            }
            if x1 < -TOLERANCE_PX || y1 < -TOLERANCE_PX || x2 > width || y2 > height {
                let problem = format!("{place}: box [{x1}, {y1}, {x2}, {y2}] leaves the image of {} x {} px", image.width, image.height);
                return misfit(problem, "the proposals seem to be of other images, or of resized ones, or in another order");
            }
            if !(0.0..=1.0).contains(score) {
                return misfit(format!("{place}: expected a score in [0, 1], found {score}"), "expected x1, y1, x2, y2, score");
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

    /// Of images with these ids and sizes, in the file's order.
    fn annotations(images: &[(u64, u32, u32)]) -> Annotations {
        let file_order = images.iter().map(|(id, ..)| ImageId(*id)).collect();
        let mut images: Vec<ImageInfo> =
            images.iter().map(|(id, width, height)| ImageInfo { width: *width, height: *height, ..image(*id) }).collect();
        images.sort_by_key(|image| image.id);
        Annotations { images, file_order, categories: Vec::new(), annotations: Vec::new() }
    }

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
        let order = order(&proposals, &annotations(&[(4, 40, 30)]), None, Path::new("proposals.pkl"));
        assert_eq!(order.unwrap(), ImageOrder::Id);
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
            (vec![vec![]], "proposals.pkl: proposals of 1 images, but the annotations have 2"),
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
            let error = order(&proposals, &annotations(&[(4, 40, 30), (9, 40, 30)]), None, Path::new("proposals.pkl")).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_order_of_entries_is_what_the_boxes_fit_or_what_is_said() {
        let (wide, tall) = (proposal(0.0, 0.0, 80.0, 20.0, 0.5), proposal(0.0, 0.0, 20.0, 80.0, 0.5));
        let small = proposal(1.0, 1.0, 9.0, 9.0, 0.5);
        // Image 9, the first one of the file, is wide.
        let unsorted = annotations(&[(9, 80, 20), (4, 20, 80)]);
        let find = |first: Proposal, second: Proposal, asked: Option<ImageOrder>| {
            order(&[vec![first], vec![second]], &unsorted, asked, Path::new("proposals.pkl"))
                .map_err(|error| (error.to_string(), error.hint().unwrap()))
        };
        let (id, file) = (Some(ImageOrder::Id), Some(ImageOrder::File));
        for asked in [None, file] {
            assert_eq!(find(wide, tall, asked), Ok(ImageOrder::File));
        }
        for asked in [None, id] {
            assert_eq!(find(tall, wide, asked), Ok(ImageOrder::Id));
        }
        // The last row of the last image decides.
        assert_eq!(find(small, tall, None), Ok(ImageOrder::File));
        assert_eq!(find(small, small, id), Ok(ImageOrder::Id));
        assert_eq!(find(small, small, file), Ok(ImageOrder::File));

        let refused = |first, second, asked, problem: &str, hints: &[&str]| {
            let (error, hint) = find(first, second, asked).unwrap_err();
            assert_eq!(error, format!("proposals.pkl: {problem}"));
            assert!(hints.iter().all(|words| hint.contains(words)), "{hint}");
        };
        let both = "the entries have no image ids, the annotations do not list the images in ascending id, and the boxes fit both orders";
        refused(small, small, None, both, &["`with: {order: file}`", "`with: {order: id}`"]);
        let leaves = "image 4, row 0: box [0, 0, 80, 20] leaves the image of 20 x 80 px";
        refused(wide, tall, id, &format!("{leaves}, with entries in ascending image id"), &["set `with: {order: file}`"]);
        let in_file = "image 9, row 0: box [0, 0, 20, 80] leaves the image of 80 x 20 px";
        let order_of_file = "with entries in the order in which the annotations list the images";
        refused(tall, wide, file, &format!("{in_file}, {order_of_file}"), &["set `with: {order: id}`"]);
        let neither = "the boxes fit neither order of the images: in ascending id, image 9, row 0: box [0, 0, 20, 80] leaves the image of \
            80 x 20 px; in the order of the annotations' file, image 9, row 0: box [0, 0, 20, 80] leaves the image of 80 x 20 px";
        refused(tall, tall, None, neither, &["`with: {order: file}`", "{order: id}"]);

        // Ascending ids are one order, whatever is asked for.
        let sorted = annotations(&[(4, 20, 80), (9, 80, 20)]);
        for asked in [None, id, file] {
            let found = order(&[vec![tall], vec![wide]], &sorted, asked, Path::new("proposals.pkl"));
            assert_eq!(found.unwrap(), asked.unwrap_or(ImageOrder::Id));
        }
    }

    #[test]
    fn an_empty_array_without_columns_has_no_proposals() {
        let bytes = b"\x80\x02]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x00\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x00tba.";
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        assert_eq!(read(file.path()).unwrap(), [vec![]]);
    }
}
