//! Conditions under which an evaluation's numbers are right by its rules and yet mislead, in words with counts.

use std::collections::BTreeSet;

use crate::{
    annotations::{Annotation, Annotations, CategoryId, ImageId, ImageInfo},
    evaluate::{Protocol, is_ignored},
};

/// How far a box may reach outside its image before it counts as leaving it, in px.
pub(crate) const TOLERANCE_PX: f64 = 1.0;

/// The warnings of an evaluation of some categories. `looked_at`: the images that the detector was run on, if known.
pub(crate) fn warnings(
    protocol: Protocol,
    annotations: &Annotations,
    categories: &BTreeSet<CategoryId>,
    looked_at: Option<&BTreeSet<ImageId>>,
) -> Vec<String> {
    let labels: Vec<&Annotation> = annotations.annotations.iter().filter(|label| categories.contains(&label.category_id)).collect();
    let objects: Vec<&Annotation> = labels.iter().copied().filter(|label| !is_ignored(protocol, label)).collect();
    let (n_images, n_labels, n_objects) = (annotations.images.len(), labels.len(), objects.len());
    let mut warnings = Vec::new();

    if let Some(looked_at) = looked_at {
        let is_missing = |image: &ImageId| !looked_at.contains(image);
        let n_missing = annotations.images.iter().filter(|image| is_missing(&image.id)).count();
        let n_lost = objects.iter().filter(|object| is_missing(&object.image_id)).count();
        warnings.extend((n_missing > 0).then(|| {
            format!(
                "{n_missing} of {n_images} images were skipped by an earlier step (`on_bad_item: skip`, or a dry run): their {n_lost} \
                 objects count as missed"
            )
        }));
    }
    if n_labels > 0 && n_objects == 0 {
        warnings.push(format!("{n_labels} of {n_labels} annotations are crowds (`iscrowd: 1`), so no object is left to evaluate"));
    }

    let n_empty = objects.iter().filter(|object| object.area <= 0.0).count();
    let n_unsaid = objects.iter().filter(|object| !object.has_area).count();
    let are_most = |n: usize| n > 0 && 2 * n >= n_objects;
    match protocol {
        Protocol::Lvis if n_empty > 0 => {
            warnings.push(format!("{n_empty} of {n_objects} annotations have area 0: LVIS does not evaluate them"));
        }
        Protocol::Coco if are_most(n_empty) => warnings
            .push(format!("{n_empty} of {n_objects} annotations have area 0, so they count as small: APs, APm and APl mean nothing")),
        Protocol::Lvis | Protocol::Coco => {}
    }
    if are_most(n_unsaid) {
        warnings.push(format!(
            "{n_unsaid} of {n_objects} annotations have no `area`, so that of the box is taken: APs, APm and APl are by size of box, not of \
             mask"
        ));
    }

    if protocol == Protocol::Lvis && n_images > 0 && annotations.images.iter().all(|image| image.neg_category_ids.is_empty()) {
        warnings.push(format!(
            "{n_images} of {n_images} images have no `neg_category_ids`: a class is evaluated only in images that show it, so false \
             detections in other images are not counted"
        ));
    }

    let are_corners = |label: &&&Annotation| annotations.image(label.image_id).is_some_and(|image| seem_corners(label.bbox, image));
    let n_corners = labels.iter().filter(are_corners).count();
    // A single box of a sound file may leave its image, too.
    if n_corners > 0 && 10 * n_corners >= n_labels {
        warnings.push(format!(
            "{n_corners} of {n_labels} boxes leave their image as [x, y, width, height] and fit it as [x1, y1, x2, y2]: the annotations \
             seem to have corners where COCO has sizes"
        ));
    }
    warnings
}

/// What to know of annotated boxes before anything is made from them, in words with counts: real data sets have a few that are empty or
/// leave their image.
pub fn of_boxes(annotations: &Annotations) -> Option<String> {
    let (mut n_empty, mut n_outside, mut n_leaving) = (0_usize, 0_usize, 0_usize);
    let mut first = None;
    for label in &annotations.annotations {
        let Some(image) = annotations.image(label.image_id) else { continue };
        let ([x, y, width, height], [right, bottom]) = (label.bbox, [image.width, image.height].map(f64::from));
        let is_empty = width <= 0.0 || height <= 0.0;
        let is_outside = x >= right || y >= bottom || x + width <= 0.0 || y + height <= 0.0;
        let leaves = x < -TOLERANCE_PX || y < -TOLERANCE_PX || x + width > right + TOLERANCE_PX || y + height > bottom + TOLERANCE_PX;
        match (is_empty, is_outside, leaves) {
            (true, _, _) => n_empty += 1,
            (false, true, _) => n_outside += 1,
            (false, false, true) => n_leaving += 1,
            (false, false, false) => continue,
        }
        first.get_or_insert(label.id);
    }
    let counts = [(n_empty, "have no area"), (n_outside, "lie outside their image"), (n_leaving, "reach more than 1 px outside it")];
    let counts: Vec<String> = counts.into_iter().filter(|(n, _)| *n > 0).map(|(n, words)| format!("{n} {words}")).collect();
    let n_labels = annotations.annotations.len();
    Some(format!("of {n_labels} annotated boxes {} (annotation {} is the first)", counts.join(", "), first?))
}

/// Whether a box that should be `[x, y, width, height]` fits its image only as corners.
fn seem_corners([x, y, width, height]: [f64; 4], image: &ImageInfo) -> bool {
    let [right, bottom] = [image.width, image.height].map(|side| f64::from(side) + TOLERANCE_PX);
    let leaves = x + width > right || y + height > bottom;
    leaves && x < width && y < height && width <= right && height <= bottom
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        annotations::{AnnotationId, Category, Frequency},
        boxes::xywh_to_xyxy,
        masks::Outline,
    };

    /// Two images of 100 x 80 px, each with two owls.
    fn owls() -> Annotations {
        let image = |id: u64| ImageInfo {
            id: ImageId(id),
            file_name: "a.jpg".into(),
            width: 100,
            height: 80,
            neg_category_ids: vec![CategoryId(3)],
            not_exhaustive_category_ids: Vec::new(),
        };
        let category = |id: u64| Category {
            id: CategoryId(id),
            name: format!("class {id}"),
            frequency: Some(Frequency::Rare),
            synset: None,
            synonyms: Vec::new(),
        };
        let label = |id: u64| Annotation {
            id: AnnotationId(id),
            image_id: ImageId(1 + id % 2),
            category_id: CategoryId(2),
            bbox: [50.0, 40.0, 20.0, 20.0],
            xyxy: xywh_to_xyxy([50.0, 40.0, 20.0, 20.0]),
            area: 300.0,
            has_area: true,
            is_crowd: false,
            segmentation: Outline::Missing,
        };
        Annotations {
            images: [1, 2].map(image).into(),
            file_order: [1, 2].map(ImageId).into(),
            categories: [2, 3].map(category).into(),
            category_order: [2, 3].map(CategoryId).into(),
            annotations: (1..=4).map(label).collect(),
        }
    }

    /// What is said after a change of the labels, of `category` 2 or of 3.
    fn after(protocol: Protocol, change: impl Fn(&mut Annotations)) -> Vec<String> {
        let mut annotations = owls();
        change(&mut annotations);
        warnings(protocol, &annotations, &BTreeSet::from([CategoryId(2)]), None)
    }

    fn each(annotations: &mut Annotations, n: usize, change: fn(&mut Annotation)) {
        annotations.annotations.iter_mut().take(n).for_each(change);
    }

    #[test]
    fn of_sound_annotations_nothing_is_said() {
        for protocol in [Protocol::Coco, Protocol::Lvis] {
            assert!(after(protocol, |_| {}).is_empty());
            let all = BTreeSet::from([1, 2].map(ImageId));
            assert!(warnings(protocol, &owls(), &BTreeSet::from([CategoryId(2)]), Some(&all)).is_empty());
            // Without objects, too.
            assert!(after(protocol, |owls| owls.annotations.clear()).is_empty());
        }
    }

    #[test]
    fn boxes_that_are_empty_or_leave_their_image_are_counted() {
        let said = |change: &dyn Fn(&mut Annotations)| {
            let mut owls = owls();
            change(&mut owls);
            of_boxes(&owls)
        };
        assert_eq!(said(&|_| {}), None);
        // Within a pixel.
        assert_eq!(said(&|owls| each(owls, 4, |label| label.bbox = [-1.0, -0.5, 102.0, 81.5])), None);
        let several = |owls: &mut Annotations| {
            owls.annotations[1].bbox = [5.0, 5.0, 0.0, 9.0];
            owls.annotations[2].bbox = [100.0, 5.0, 9.0, 9.0];
            owls.annotations[3].bbox = [95.0, 5.0, 9.0, 9.0];
        };
        let expected = "of 4 annotated boxes 1 have no area, 1 lie outside their image, 1 reach more than 1 px outside it (annotation 2 is the \
                        first)";
        assert_eq!(said(&several).as_deref(), Some(expected));
    }

    #[test]
    fn objects_without_area_are_counted() {
        let empty = |n: usize| move |owls: &mut Annotations| each(owls, n, |label| label.area = 0.0);
        assert!(after(Protocol::Coco, empty(1)).is_empty());
        let expected = "2 of 4 annotations have area 0, so they count as small: APs, APm and APl mean nothing";
        assert_eq!(after(Protocol::Coco, empty(2)), [expected]);
        assert_eq!(after(Protocol::Lvis, empty(1)), ["1 of 4 annotations have area 0: LVIS does not evaluate them"]);
        let unsaid = |owls: &mut Annotations| each(owls, 4, |label| label.has_area = false);
        let expected = "4 of 4 annotations have no `area`, so that of the box is taken: APs, APm and APl are by size of box, not of mask";
        assert_eq!(after(Protocol::Coco, unsaid), [expected]);
    }

    #[test]
    fn crowds_alone_leave_nothing_to_evaluate_in_coco() {
        let crowds = |n: usize| move |owls: &mut Annotations| each(owls, n, |label| label.is_crowd = true);
        let expected = "4 of 4 annotations are crowds (`iscrowd: 1`), so no object is left to evaluate";
        assert_eq!(after(Protocol::Coco, crowds(4)), [expected]);
        assert!(after(Protocol::Coco, crowds(3)).is_empty());
        assert!(after(Protocol::Lvis, crowds(4)).is_empty());
    }

    #[test]
    fn lvis_without_absent_classes_is_counted() {
        let none = |owls: &mut Annotations| owls.images.iter_mut().for_each(|image| image.neg_category_ids.clear());
        let expected = "2 of 2 images have no `neg_category_ids`: a class is evaluated only in images that show it, so false detections in \
                        other images are not counted";
        assert_eq!(after(Protocol::Lvis, none), [expected]);
        assert!(after(Protocol::Coco, none).is_empty());
    }

    #[test]
    fn boxes_that_seem_to_be_corners_are_counted() {
        let corners = |owls: &mut Annotations| each(owls, 3, |label| label.bbox = [50.0, 40.0, 70.0, 60.0]);
        let expected = "3 of 4 boxes leave their image as [x, y, width, height] and fit it as [x1, y1, x2, y2]: the annotations seem to have \
                        corners where COCO has sizes";
        assert_eq!(after(Protocol::Coco, corners), [expected]);
        // Outside either way: of another size than said, perhaps.
        assert!(after(Protocol::Coco, |owls| each(owls, 4, |label| label.bbox = [50.0, 40.0, 120.0, 60.0])).is_empty());
        // One of twenty.
        let few = |owls: &mut Annotations| {
            owls.annotations = (0..5).flat_map(|_| owls.annotations.clone()).collect();
            each(owls, 1, |label| label.bbox = [50.0, 40.0, 70.0, 60.0]);
        };
        assert!(after(Protocol::Coco, few).is_empty());
    }

    #[test]
    fn images_that_were_not_looked_at_are_counted_with_their_objects() {
        let looked_at = BTreeSet::from([ImageId(2)]);
        let said = |categories: u64| warnings(Protocol::Coco, &owls(), &BTreeSet::from([CategoryId(categories)]), Some(&looked_at));
        let expected = |n: usize| {
            format!("1 of 2 images were skipped by an earlier step (`on_bad_item: skip`, or a dry run): their {n} objects count as missed")
        };
        assert_eq!((said(2), said(3)), (vec![expected(2)], vec![expected(0)]));
    }
}
