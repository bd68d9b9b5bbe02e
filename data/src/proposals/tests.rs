//! Pickles of every program that writes proposals, and what is refused.

use std::{collections::BTreeMap, fs, io::Write as _, path::Path};

use ovenbird_pickle::Value;

use super::{
    containers::{Scores, entries},
    matching::{Paths, order},
    *,
};
use crate::annotations::{Annotations, ImageId, ImageInfo, ImageOrder};

/// Of images with these ids and sizes, in the file's order.
fn annotations(images: &[(u64, u32, u32)]) -> Annotations {
    let file_order = images.iter().map(|(id, ..)| ImageId(*id)).collect();
    let mut images: Vec<ImageInfo> =
        images.iter().map(|(id, width, height)| ImageInfo { width: *width, height: *height, ..image(*id) }).collect();
    images.sort_by_key(|image| image.id);
    Annotations { images, file_order, categories: Vec::new(), category_order: Vec::new(), annotations: Vec::new() }
}

fn proposal(x1: f32, y1: f32, x2: f32, y2: f32, score: f32) -> Proposal {
    Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, score }
}

fn read(path: &Path) -> Result<Vec<Vec<Proposal>>> {
    let Pickled { entries, notes } = super::read(&fs::read(path).unwrap(), path)?;
    assert!(notes.is_empty(), "{notes:?}");
    match entries {
        Entries::InOrder(entries) => Ok(entries),
        Entries::Named(entries) => panic!("{entries:?}"),
    }
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
    let (six, five) = ([0.0_f32; 6], [0.0_f32; 5]);
    ovenbird_pickle::write_f32_arrays([(1, 5, five.as_slice()), (1, 6, six.as_slice())], &mut file).unwrap();
    let error = read(file.path()).unwrap_err().to_string();
    assert!(error.ends_with("image 1 of the list: expected an array [N, 5] or [N, 4], found [1, 6]"), "{error}");
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
            "proposals.pkl: image 9, row 0: box [0, 0, 42, 1] extends beyond the image of 40 x 30 px",
        ),
        (vec![vec![proposal(5.0, 0.0, 1.0, 1.0, 0.5)], vec![]], "proposals.pkl: image 4, row 0: box [5, 0, 1, 1] has x2 < x1 or y2 < y1"),
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
    let leaves = "image 4, row 0: box [0, 0, 80, 20] extends beyond the image of 20 x 80 px";
    refused(wide, tall, id, &format!("{leaves}, with entries in ascending image id"), &["set `with: {order: file}`"]);
    let in_file = "image 9, row 0: box [0, 0, 20, 80] extends beyond the image of 80 x 20 px";
    let order_of_file = "with entries in the order in which the annotations list the images";
    refused(tall, wide, file, &format!("{in_file}, {order_of_file}"), &["set `with: {order: id}`"]);
    let neither = "the boxes fit neither order of the images: in ascending id, image 9, row 0: box [0, 0, 20, 80] extends beyond the image of \
        80 x 20 px; in the order of the annotations' file, image 9, row 0: box [0, 0, 20, 80] extends beyond the image of 80 x 20 px";
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

fn forms() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/proposals/forms")
}

/// Images 2, 4 and 9, called `a/2.jpg` and so on.
fn three() -> Annotations {
    let mut annotations = annotations(&[(2, 40, 30), (4, 40, 30), (9, 40, 30)]);
    annotations.images.iter_mut().for_each(|image| image.file_name = format!("a/{}.jpg", image.id));
    annotations
}

#[test]
fn every_form_says_the_same() {
    let two = vec![proposal(0.0, 0.25, 10.5, 20.0, 0.75), proposal(1.5, 2.0, 30.0, 29.125, 0.5)];
    let expected = BTreeMap::from([(ImageId(2), two[..1].to_vec()), (ImageId(4), vec![]), (ImageId(9), two.clone())]);
    let mut paths: Vec<_> = fs::read_dir(forms()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert_eq!(paths.len(), 28);
    for path in paths {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let Pickled { entries, notes } = super::read(&fs::read(&path).unwrap(), &path).unwrap();
        let is_named = ["by-", "mmdet-3", "detectron"].iter().any(|start| name.starts_with(start));
        assert_eq!(matches!(entries, Entries::Named(_)), is_named, "{name}");
        let said =
            if name.starts_with("detectron2") { vec!["`objectness_logits` are all from 0 to 1, and taken as scores"] } else { vec![] };
        assert_eq!(notes, said, "{name}");
        let Matched { by_image, order, n_others, id_map } = matched(entries, &three(), None, None, &path).unwrap();
        assert!(by_image.iter().all(|(image, boxes)| id_map.counts[id_map.places[image]] == boxes.len() as u64));
        assert_eq!((order.is_none(), n_others), (is_named, 0), "{name}");
        if name == "one-array" {
            assert!(by_image.values().all(|of_image| *of_image == two), "{by_image:?}");
        } else {
            assert_eq!(by_image, expected, "{name}");
        }
    }
}

fn float(numbers: &[f64]) -> Value {
    Value::List(numbers.iter().map(|number| Value::Float(*number)).collect())
}

fn list(items: &[Value]) -> Value {
    Value::List(items.into())
}

fn dict(entries: &[(&str, Value)]) -> Value {
    Value::Dict(entries.iter().map(|(key, value)| (Value::Str((*key).into()), value.clone())).collect())
}

#[test]
fn what_is_taken_for_granted_is_said() {
    let mut scores = Scores::default();
    let value = list(&[list(&[float(&[0.0, 0.0, 4.0, 4.0]), float(&[1.0, 1.0, 4.0, 4.0])])]);
    let mut found = entries(&value, &mut scores).unwrap();
    assert_eq!(scores.settle(&mut found), ["2 boxes have no scores: each is taken as 1, so that none comes before another"]);
    assert_eq!(found, Entries::InOrder(vec![vec![proposal(0.0, 0.0, 4.0, 4.0, 1.0), proposal(1.0, 1.0, 4.0, 4.0, 1.0)]]));

    let mut scores = Scores::default();
    let boxes = list(&[list(&[float(&[0.0, 0.0, 4.0, 4.0]), float(&[1.0, 1.0, 4.0, 4.0])])]);
    let value = dict(&[("ids", list(&[Value::Int(7)])), ("boxes", boxes), ("objectness_logits", list(&[float(&[0.0, -40.0])]))]);
    let mut found = entries(&value, &mut scores).unwrap();
    assert_eq!(scores.settle(&mut found), ["scores are the sigmoid of `objectness_logits`"]);
    let Entries::Named(images) = found else { panic!() };
    assert_eq!((images[0].0.clone(), images[0].1[0].score, images[0].1[1].score < 1e-10), (ImageName::Id(7), 0.5, true));
}

#[test]
fn forms_that_are_not_read_are_named_for_what_they_are() {
    let tensor = Value::Object(std::sync::Arc::new(ovenbird_pickle::Object {
        callable: Value::Global { module: "torch._utils".into(), name: "_rebuild_tensor_v2".into() },
        args: [].into(),
        kwargs: None,
        state: None,
        items: [].into(),
        entries: [].into(),
    }));
    let row = float(&[0.0, 0.0, 4.0, 4.0, 0.5]);
    let ids = list(&[Value::Int(7)]);
    let cases = [
        (list(std::slice::from_ref(&tensor)), "image 0 of the list: expected a numpy array, found a tensor of torch"),
        (list(&[list(&[tensor.clone(), tensor.clone()])]), "image 0 of the list: expected a numpy array, found a tensor of torch"),
        (list(&[Value::None]), "image 0 of the list: expected a numpy array, found None"),
        (list(&[list(&[row.clone(), float(&[1.0])])]), "image 0 of the list: row 1: expected 4 or 5 numbers, found a list of 1"),
        (list(&[list(&[row.clone(), float(&[0.0; 4])])]), "image 0 of the list: row 1: expected 5 numbers, as in the rows before, found 4"),
        (list(&[dict(&[("bbox", row.clone())])]), "image 0 of the list: expected `bboxes` and `scores`, found a dict of [\"bbox\"]"),
        (
            dict(&[("scores", list(std::slice::from_ref(&row))), ("x", Value::None)]),
            "a dict of [\"scores\", \"x\"]: `x`: expected a numpy array, found None",
        ),
        (
            dict(&[("ids", ids.clone()), ("boxes", list(&[list(std::slice::from_ref(&row))])), ("bbox_mode", Value::Int(2))]),
            "`bbox_mode`: expected 0 (XYXY_ABS) or 1 (XYWH_ABS), boxes in px, found 2",
        ),
        (
            dict(&[("ids", ids.clone()), ("boxes", list(&[]))]),
            "expected lists of one length, found 1 ids, boxes of 0 images and scores of 0",
        ),
        (
            dict(&[("ids", ids), ("boxes", list(&[list(&[row])])), ("scores", list(&[float(&[])]))]),
            "image 7: expected as many scores as boxes, found 0 and 1",
        ),
        (Value::Int(3), "expected a list or a dict over images, found an integer"),
    ];
    for (value, expected) in cases {
        let problem = entries(&value, &mut Scores::default()).unwrap_err();
        assert!(problem.starts_with(expected), "{problem}\n{expected}");
    }
    let files: [(&[u8], &str); 7] = [
        (b"", "found an empty file"),
        (b"[[1, 2]]", "found JSON"),
        (b"PK\x03\x04", "found a zip archive, as torch.save and numpy.savez write it"),
        (b"<!DOCTYPE html>", "found a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "found a pointer of Git LFS"),
        (b"\x93NUMPY\x01\x00\x12\x00{'descr': '<f4'}   ", "found a .npy file of one array of numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff{", ".npy header: the file is cut short"),
    ];
    for (bytes, expected) in files {
        let error = super::read(bytes, Path::new("proposals.pkl")).unwrap_err();
        assert!(error.to_string().ends_with(expected) && error.hint().is_some(), "{error}");
    }
}

#[test]
fn named_entries_are_matched_whatever_the_order_and_those_that_do_not_belong_are_named() {
    let entry = |name: &str| (ImageName::Text(name.into()), vec![proposal(0.0, 0.0, 4.0, 4.0, 0.5)]);
    let find = |names: &[&str]| {
        matched(Entries::Named(names.iter().map(|name| entry(name)).collect()), &three(), None, None, Path::new("p.pkl"))
            .map_err(|error| error.to_string())
    };
    let others = find(&["x/a/9.jpg", "2.jpg", "4", "b/2.jpg", "17"]).unwrap();
    assert_eq!((others.by_image.len(), others.n_others), (3, 2));
    let expected = "p.pkl: no entry for 2 of the 3 images of the annotations, of which image 4 (`a/4.jpg`) is the first; \
                    `b/3.jpg` is the first of 1 that they do not have";
    assert_eq!(find(&["b/3.jpg", "2.jpg"]).unwrap_err(), expected);
    assert_eq!(find(&["2.jpg", "a/2.jpg"]).unwrap_err(), "p.pkl: image 2: two entries, the second as `a/2.jpg`");
    // Names that stand for two images are nobody's.
    let mut twice = three();
    twice.images[0].file_name = "b/4.jpg".into();
    assert_eq!(Paths::of(&twice).image(&ImageName::Text("4.jpg".into()), &twice), None);
    assert_eq!(Paths::of(&twice).image(&ImageName::Text("data/b/4.jpg".into()), &twice), Some(ImageId(2)));

    let mut large = three();
    large.images[2].width = 2;
    let entries = Entries::Named(["2.jpg", "4.jpg", "9.jpg"].map(entry).into());
    let error = matched(entries, &large, None, None, Path::new("p.pkl")).unwrap_err();
    assert_eq!(error.to_string(), "p.pkl: image 9, row 0: box [0, 0, 4, 4] extends beyond the image of 2 x 30 px");
    assert!(!error.hint().unwrap().contains("order"));
}

/// The images of LVIS v1 are named by `coco_url`, and their ids do not ascend; mmdet 2 writes entries in the order of the file.
#[test]
fn entries_of_mmdet_are_bound_to_the_images_of_lvis_in_the_order_that_is_asked_for() {
    let image = |id: u64| {
        format!(r#"{{"id": {id}, "coco_url": "http://images.cocodataset.org/train2017/{id:012}.jpg", "width": 40, "height": 30}}"#)
    };
    let json = format!(r#"{{"images": [{}], "annotations": [], "categories": []}}"#, [391_895, 9, 522_418].map(image).join(","));
    let annotations = Annotations::parse(json.as_bytes(), Path::new("lvis_v1_train.json")).unwrap();
    // As many boxes as the entry's place, so that counts tell, too; scores as different as f32 allows.
    let entry = |place: usize| (0..=place).map(|k| proposal(0.0, 1.0, 10.5, 20.0, (place * 10 + k) as f32 / 64.0)).collect::<Vec<_>>();
    let written: Vec<Vec<Proposal>> = (0..3).map(entry).collect();
    let mut bytes = Vec::new();
    write_mmdet(&written, &mut bytes).unwrap();
    let path = Path::new("rpn_r101_fpn_lvis_train.pkl");
    let found = |asked| {
        let Pickled { entries, .. } = super::read(&bytes, path).unwrap();
        matched(entries, &annotations, asked, None, path)
    };
    for (asked, ids) in [(ImageOrder::File, [391_895, 9, 522_418]), (ImageOrder::Id, [9, 391_895, 522_418])] {
        let Matched { by_image, id_map, order, n_others } = found(Some(asked)).unwrap();
        assert_eq!((order, n_others), (Some(asked), 0));
        for (place, id) in ids.map(ImageId).into_iter().enumerate() {
            assert_eq!(by_image[&id], written[place], "{asked:?}, image {id}");
            assert_eq!((id_map.places[&id], id_map.counts[place]), (place, place as u64 + 1));
        }
    }
    // The boxes fit both orders, and nobody guesses.
    let error = found(None).unwrap_err();
    assert!(error.hint().unwrap().contains("`with: {order: file}`"), "{error}");
}
