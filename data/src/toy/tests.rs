use std::{collections::BTreeSet, path::Path};

use super::*;
use crate::annotations::Annotations;

const WORLD: World = World { seed: 7, side_px: 160 };

fn scenes(n: usize) -> Vec<Labels> {
    (0..n).map(|index| WORLD.scene(Set::Val, index).labels).collect()
}

fn load(json: &[u8]) -> Annotations {
    let folder = tempfile::tempdir().unwrap();
    let mut file = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
    std::io::Write::write_all(&mut file, json).unwrap();
    Annotations::load(file.path()).unwrap()
}

#[test]
fn a_place_of_a_seed_always_shows_the_same() {
    let (first, again) = (WORLD.scene(Set::Train, 5), WORLD.scene(Set::Train, 5));
    assert_eq!((&first.jpeg, &first.labels), (&again.jpeg, &again.labels));
    assert_ne!(first.jpeg, WORLD.scene(Set::Val, 5).jpeg);
    assert_ne!(first.jpeg, World { seed: 8, ..WORLD }.scene(Set::Train, 5).jpeg);
    assert_eq!(WORLD.web(3).text, WORLD.web(3).text);
}

#[test]
fn every_part_of_a_novel_class_occurs_in_base_classes() {
    let split = classes();
    assert_eq!((split.base.len(), split.novel.len(), split.duplicate()), (40, 20, None));
    let parts = |names: &[String]| -> BTreeSet<String> { names.iter().flat_map(|name| name.split(' ').map(str::to_owned)).collect() };
    assert!(parts(&split.base).is_superset(&parts(&split.novel)));
    assert_eq!(parts(&split.base).len(), SHAPES.len() + COLOURS.len() + PATTERNS.len());
}

#[test]
fn words_beside_the_classes_are_none_of_them() {
    let words = vocabulary();
    assert_eq!(words[..3], ["plain red cross", "plain red ring", "plain green circle"]);
    let split = classes();
    let distinct: BTreeSet<&String> = words.iter().chain(split.all()).collect();
    assert_eq!((words.len(), distinct.len()), (150, 210));
    let phrases = phrases();
    assert_eq!(
        (phrases.len(), phrases["dots"].len() + phrases["stripes"].len() + phrases["checks"].len() + phrases["one colour"].len()),
        (100, 84)
    );
    assert!(phrases["red cross"].contains(&"plain red cross".to_owned()));
}

#[test]
fn coco_labels_have_what_real_ones_have() {
    let scenes = scenes(60);
    let annotations = load(&coco_json(&scenes));
    assert_eq!((annotations.images.len(), annotations.categories.len()), (60, 60));
    let by_image = annotations.by_image();
    assert!(by_image.len() < 60, "some images are empty");
    assert!(annotations.annotations.iter().any(|annotation| annotation.is_crowd));
    for annotation in &annotations.annotations {
        let image = annotations.image(annotation.image_id).unwrap();
        let Xyxy { x1, y1, x2, y2 } = annotation.xyxy;
        assert!(x1 >= 0.0 && y1 >= 0.0 && x2 <= image.width as f32 && y2 <= image.height as f32 && x1 < x2 && y1 < y2);
        let mask = annotation.segmentation.drawn().unwrap().to_rle(image.height, image.width).unwrap();
        assert!((hotcoco::mask::area(&mask) as f64 - annotation.area).abs() < 1e-9);
    }
    let is_polygon = |annotation: &&crate::annotations::Annotation| annotation.segmentation.drawn().unwrap().polygons().is_some();
    let n_polygons = annotations.annotations.iter().filter(is_polygon).count();
    assert!(n_polygons > 20 && n_polygons < annotations.annotations.len());
}

#[test]
fn ids_are_unique_and_annotations_count_from_one() {
    let annotations = load(&coco_json(&scenes(20)));
    let ids: Vec<u64> = annotations.annotations.iter().map(|annotation| annotation.id.0).collect();
    assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
    let images: BTreeSet<_> = annotations.images.iter().map(|image| image.id).collect();
    assert_eq!(images.len(), 20);
}

#[test]
fn what_stands_in_front_is_taken_from_a_mask_and_can_take_the_label() {
    let columns = |n: usize| Mask { width: 10, height: 10, covered: (0..100).map(|place| place % 10 < n).collect() };
    let placed = [Placed { class: 3, centre: [5.0, 5.0], radius: 5.0, mask: columns(10), look: None }];
    let area = |n: usize| visible(&placed, &[columns(n)], 10, 10).first().map(|object| object.area);
    assert_eq!([area(0), area(4), area(7), area(8)], [Some(100.0), Some(60.0), Some(30.0), None]);
}

#[test]
fn the_outline_of_every_shape_is_where_it_is_painted() {
    for (shape, name) in SHAPES.into_iter().enumerate().filter(|(_, name)| *name != "ring") {
        let mut dice = Dice::new(3, 9, shape);
        let mut canvas = Canvas::background(&mut dice, 120, 110);
        let look = Look::new(&mut dice, Kind { shape, colour: 0, pattern: 0 }, 44.0);
        let mask = canvas.draw(&look, [61.0, 54.0]);
        let outline = hotcoco::mask::fr_poly(&look.polygon([61.0, 54.0]).unwrap(), 110, 120).unwrap();
        let filled = hotcoco::mask::decode(&outline);
        let differ = (0..mask.covered.len()).filter(|place| mask.covered[*place] != (filled[place % 120 * 110 + place / 120] != 0)).count();
        assert!(differ * 40 < mask.area(), "{name}: {differ} of {} px differ", mask.area());
    }
}

#[test]
fn lvis_labels_are_federated_and_novel_classes_are_rare() {
    let annotations = load(&lvis_json(7, &scenes(60)));
    let split = ClassSplit::by_frequency(&annotations).unwrap();
    assert_eq!(split.novel, classes().novel);
    let by_image = annotations.by_image();
    for image in &annotations.images {
        let present: BTreeSet<_> = by_image.get(&image.id).into_iter().flatten().map(|annotation| annotation.category_id).collect();
        assert!(!image.neg_category_ids.is_empty() && image.neg_category_ids.iter().all(|id| !present.contains(id)));
    }
    assert!(annotations.images.iter().any(|image| !image.not_exhaustive_category_ids.is_empty()));
    for image in &annotations.images {
        assert!(image.not_exhaustive_category_ids.iter().all(|id| !image.neg_category_ids.contains(id)));
    }
}

#[test]
fn proposals_find_most_objects_and_stay_inside() {
    let (mut found, mut total) = (0, 0);
    for scene in scenes(60) {
        let image = crate::annotations::ImageInfo {
            id: crate::annotations::ImageId(scene.id),
            file_name: String::new(),
            width: scene.width,
            height: scene.height,
            neg_category_ids: vec![],
            not_exhaustive_category_ids: vec![],
        };
        let annotations = Annotations {
            file_order: vec![image.id],
            images: vec![image],
            categories: vec![],
            category_order: vec![],
            annotations: vec![],
        };
        let entries = crate::proposals::Entries::InOrder(vec![scene.proposals.clone()]);
        crate::proposals::matched(entries, &annotations, None, None, Path::new("proposals")).unwrap();
        assert!(scene.proposals.is_sorted_by(|a, b| a.score >= b.score));
        for object in scene.objects.iter().filter(|object| !object.is_crowd) {
            total += 1;
            found += usize::from(scene.proposals.iter().any(|proposal| proposal.xyxy.iou(&object.xyxy) > 0.5));
        }
    }
    let recall = f64::from(found as u32) / f64::from(total as u32);
    assert!((0.85..0.99).contains(&recall), "{recall}");
}

#[test]
fn every_class_is_named_on_the_web() {
    let texts: Vec<String> = (0..1500).map(|index| WORLD.web(index).text).collect();
    let is_named = |name: &&String| texts.iter().any(|text| text.contains(name.as_str()));
    assert_eq!(classes().all().filter(is_named).count(), 60);
}

#[test]
fn most_captions_name_what_is_seen_and_some_do_not() {
    let n_right = (0..400).filter(|index| {
        let text = WORLD.web(*index).text.to_lowercase();
        SHAPES.iter().any(|shape| text.contains(shape)) && COLOURS.iter().any(|colour| text.contains(colour))
    });
    assert!((360..400).contains(&n_right.count()));
}
