//! Training samples of a detector: the images and objects of an annotation file, their order, size and mirroring.
//!
//! The rules are those of mmdet 3 as OADP uses it (methods, section 6.2). Boxes and images go the same way through a [`Placement`]; boxes
//! of stored features do, too.
//!
//! Difference: this module uses no random numbers. The training loop draws each [`Placement`].

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    annotations::{AnnotationId, Annotations, CategoryId, ImageInfo},
    boxes::Xyxy,
    images::Image,
    masks::{Mask, Outline},
    resize::bilinear,
};

/// Images with a shorter side below this are left out, in px.
const LEAST_SIDE: u32 = 32;

/// An image to train on.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The image.
    pub info: ImageInfo,
    /// Its objects of the classes that are trained on, in the file's order.
    pub objects: Vec<Object>,
    /// Regions of many objects of one of these classes, px of the image.
    pub crowds: Vec<Xyxy>,
    /// The classes of all its labels, also those that are not trained on.
    pub categories: BTreeSet<CategoryId>,
}

/// An object to train on.
#[derive(Debug, Clone)]
pub struct Object {
    /// Its annotation.
    pub id: AnnotationId,
    /// Its box, px of the image.
    pub xyxy: Xyxy,
    /// Its class, as a place in the list of classes.
    pub class: usize,
    /// Its outline, where there is one.
    pub segmentation: Outline,
}

/// The images of some annotations that show a class of `classes` and are not tiny, with their objects. Left out are boxes that lie outside
/// the image or are smaller than a pixel; regions of many objects are none of the objects.
pub fn samples(annotations: &Annotations, classes: &[CategoryId]) -> Vec<Sample> {
    let class_of: BTreeMap<CategoryId, usize> = classes.iter().enumerate().map(|(class, id)| (*id, class)).collect();
    let by_image = annotations.by_image();
    let sample = |info: &ImageInfo| {
        let labels = by_image.get(&info.id)?;
        let shows_a_class = labels.iter().any(|label| class_of.contains_key(&label.category_id));
        if !shows_a_class || info.width.min(info.height) < LEAST_SIDE {
            return None;
        }
        let object = |label: &&crate::annotations::Annotation| {
            let class = *class_of.get(&label.category_id)?;
            let inside = label.xyxy.clipped([info.width, info.height]);
            let [_, _, width, height] = label.bbox;
            let counts = !label.is_crowd && inside.area() > 0.0 && label.area > 0.0 && width >= 1.0 && height >= 1.0;
            counts.then(|| Object { id: label.id, xyxy: label.xyxy, class, segmentation: label.segmentation.clone() })
        };
        let crowds = labels.iter().filter(|label| label.is_crowd && class_of.contains_key(&label.category_id));
        let crowds = crowds.map(|label| label.xyxy).collect();
        let categories = labels.iter().map(|label| label.category_id).collect();
        Some(Sample { info: info.clone(), objects: labels.iter().filter_map(object).collect(), crowds, categories })
    };
    annotations.images.iter().filter_map(sample).collect()
}

/// How often each image is seen in an epoch: ceil(max over its classes c of max(1, sqrt(threshold / f_c))), where f_c is the part of the
/// images that show c (LVIS, Gupta et al. 2019, appendix B; rounded up). `classes_of`: the classes of each image that count.
pub fn repeats<C: Ord + Copy>(classes_of: impl Iterator<Item = BTreeSet<C>>, threshold: f64) -> Vec<usize> {
    let all: Vec<BTreeSet<C>> = classes_of.collect();
    let mut n_images: BTreeMap<C, usize> = BTreeMap::new();
    for class in all.iter().flatten() {
        *n_images.entry(*class).or_default() += 1;
    }
    let of_class = |class: &C| (threshold / (n_images[class] as f64 / all.len() as f64)).sqrt().max(1.0);
    all.iter().map(|classes| classes.iter().map(of_class).fold(1.0, f64::max).ceil() as usize).collect()
}

/// Which classes a part of an image shows, ascending: those of objects that it overlaps at all, px of the image. (OADP, section 6.2.)
pub fn shown_classes(part: &Xyxy, objects: &[Object]) -> Vec<usize> {
    let overlaps = |xyxy: &Xyxy| part.x1.max(xyxy.x1) < part.x2.min(xyxy.x2) && part.y1.max(xyxy.y1) < part.y2.min(xyxy.y2);
    let classes: BTreeSet<usize> = objects.iter().filter(|object| overlaps(&object.xyxy)).map(|object| object.class).collect();
    classes.into_iter().collect()
}

/// Batches of `size` images in an order, none of which mixes wide and tall ones: each shape waits until it fills a batch. What is left
/// at the end makes batches of what is left, the last one smaller.
pub fn batches(order: &[usize], is_tall: impl Fn(usize) -> bool, size: usize) -> Vec<Vec<usize>> {
    let (mut batches, mut waiting) = (Vec::new(), [Vec::new(), Vec::new()]);
    for place in order {
        let shape = &mut waiting[usize::from(is_tall(*place))];
        shape.push(*place);
        if shape.len() == size {
            batches.push(std::mem::take(shape));
        }
    }
    batches.extend(waiting.concat().chunks(size).map(<[usize]>::to_vec));
    batches
}

/// The order in which batches of several loaders are shown in an epoch that shows all of them: always one of the loader that is least far through its own,
/// of those equally far the first. `lengths`: the batches of each. (PromptDet, section 9.5, whose progress is added up in f64.)
pub fn interleaved(lengths: &[usize]) -> Vec<usize> {
    let (mut done, mut progress) = (vec![0; lengths.len()], vec![0.0_f64; lengths.len()]);
    let next = || {
        let waiting = (0..lengths.len()).filter(|loader| done[*loader] < lengths[*loader]);
        let loader = waiting.reduce(|least, loader| if progress[loader] < progress[least] { loader } else { least })?;
        done[loader] += 1;
        progress[loader] += 1.0 / lengths[loader] as f64;
        Some(loader)
    };
    std::iter::from_fn(next).collect()
}

/// The box of each of two views of an image on which both are trained: that of the view whose network is surer, in both. Of equally sure ones it is that of
/// the second. `boxes`: in px of each view; what the views show of the image's border is not clipped. (PromptDet, section 9.4.)
pub fn agreed(views: [&Placement; 2], boxes: [Xyxy; 2], logits: [f32; 2]) -> [Xyxy; 2] {
    let [one, other] = boxes;
    if logits[0] > logits[1] { [one, views[0].carried(&one, views[1])] } else { [views[1].carried(&other, views[0]), other] }
}

/// How images become larger and smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filter {
    /// OpenCV's bilinear one, as mmdet uses it.
    #[default]
    OpenCv,
    /// Pillow's antialiased bilinear one, as torchvision's transforms use it.
    Pillow,
}

/// How an image is shown to a network: resized, then mirrored or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// `[width, height]` px of the image.
    pub from: [u32; 2],
    /// `[width, height]` of the training image, px.
    pub to: [u32; 2],
    /// Whether left is right.
    pub is_mirrored: bool,
    /// How it is resized.
    pub filter: Filter,
}

impl Placement {
    /// The largest size of the image's shape whose longer side is at most `longer` and whose shorter one at most `shorter` px; no side is
    /// below 1 px.
    pub fn fitting(from: [u32; 2], longer: u32, shorter: u32) -> Self {
        let [long, short] = [from[0].max(from[1]), from[0].min(from[1])].map(f64::from);
        let factor = (f64::from(longer) / long).min(f64::from(shorter) / short);
        Self { from, to: from.map(|side| ((f64::from(side) * factor + 0.5) as u32).max(1)), is_mirrored: false, filter: Filter::OpenCv }
    }

    /// The size of the image's shape whose shorter side is `shorter` px, or less, so that the longer one is at most `longer`, with Pillow's filter: the rule of
    /// DETR. The longer side is truncated, and no side is below 1 px. (CORA, section 2.2.)
    pub fn shorter(from: [u32; 2], longer: Option<u32>, shorter: u32) -> Self {
        let [long, short] = [from[0].max(from[1]), from[0].min(from[1])].map(f64::from);
        let shorter = match longer.map(f64::from) {
            Some(longer) if long / short * f64::from(shorter) > longer => (longer * short / long).round_ties_even(),
            _ => f64::from(shorter),
        };
        let side = |side: u32| if f64::from(side) > short { (shorter * f64::from(side) / short) as u32 } else { shorter as u32 };
        let is_there = shorter.total_cmp(&short).is_eq();
        let to = if is_there { from } else { from.map(|length| side(length).max(1)) };
        Self { from, to, is_mirrored: false, filter: Filter::Pillow }
    }

    /// By the rule that goes with a filter: [`Self::fitting`] or [`Self::shorter`].
    pub fn within(from: [u32; 2], [longer, shorter]: [u32; 2], filter: Filter) -> Self {
        match filter {
            Filter::OpenCv => Self::fitting(from, longer, shorter),
            Filter::Pillow => Self::shorter(from, Some(longer), shorter),
        }
    }

    /// The same, mirrored.
    pub fn mirrored(self) -> Self {
        Self { is_mirrored: !self.is_mirrored, ..self }
    }

    /// A box of the image in the training image, clipped to it.
    pub fn show(&self, xyxy: &Xyxy) -> Xyxy {
        let [x, y] = [0, 1].map(|axis| self.to[axis] as f32 / self.from[axis] as f32);
        self.flipped(Xyxy { x1: xyxy.x1 * x, y1: xyxy.y1 * y, x2: xyxy.x2 * x, y2: xyxy.y2 * y }.clipped(self.to))
    }

    /// A box of the training image in the image, clipped to it.
    pub fn find(&self, xyxy: &Xyxy) -> Xyxy {
        let Xyxy { x1, y1, x2, y2 } = self.flipped(*xyxy);
        let [x, y] = [0, 1].map(|axis| self.from[axis] as f32 / self.to[axis] as f32);
        Xyxy { x1: x1 * x, y1: y1 * y, x2: x2 * x, y2: y2 * y }.clipped(self.from)
    }

    /// A box of the training image in another one of the same image, not clipped.
    pub fn carried(&self, xyxy: &Xyxy, to: &Self) -> Xyxy {
        let factor = |view: &Self, axis: usize| view.to[axis] as f32 / view.from[axis] as f32;
        let [x, y] = [0, 1].map(|axis| factor(to, axis) / factor(self, axis));
        let Xyxy { x1, y1, x2, y2 } = self.flipped(*xyxy);
        to.flipped(Xyxy { x1: x1 * x, y1: y1 * y, x2: x2 * x, y2: y2 * y })
    }

    /// A box of the training image before it was mirrored, or after.
    fn flipped(&self, xyxy: Xyxy) -> Xyxy {
        let width = self.to[0] as f32;
        if self.is_mirrored { Xyxy { x1: width - xyxy.x2, x2: width - xyxy.x1, ..xyxy } } else { xyxy }
    }

    /// The pixels of the training image, packed RGB.
    pub fn pixels(&self, image: &Image) -> Image {
        assert_eq!([image.width, image.height], self.from, "BUG: a view of another image");
        let [width, height] = self.to;
        let mut shown = match self.filter {
            _ if self.from == self.to => image.clone(),
            Filter::Pillow => image.resize_bilinear(width, height),
            Filter::OpenCv => {
                let [from, to] = [self.from, self.to].map(|size| size.map(|side| side as usize));
                Image { width, height, rgb: bilinear(&image.rgb, from, to) }
            }
        };
        if self.is_mirrored {
            shown.mirror();
        }
        shown
    }
}

/// A part of a mask, as it is shown: it holds all pixels of the object and some of none around them, except where the image ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownMask {
    /// The first column and row, px of the training image.
    pub from: [u32; 2],
    /// `[width, height]` px.
    pub size: [u32; 2],
    /// `[H, W]`, 1 where the object is.
    pub pixels: Vec<u8>,
}

/// How many px of none there are around the pixels of a [`ShownMask`].
const MARGIN: u32 = 2;

impl Placement {
    /// What is shown of a mask: of each pixel the nearest one above and to the left, as OpenCV's INTER_NEAREST (mmdet resizes masks so).
    pub fn show_mask(&self, mask: &Mask) -> ShownMask {
        assert_eq!(mask.size(), self.from, "BUG: a mask of another image");
        let all = mask.to_pixels();
        let source = |axis: usize, place: u32| {
            let place = if axis == 0 && self.is_mirrored { self.to[0] - 1 - place } else { place };
            let step = f64::from(self.from[axis]) / f64::from(self.to[axis]);
            ((f64::from(place) * step) as u32).min(self.from[axis] - 1)
        };
        let [x1, x2, y1, y2] = mask.bounds().map_or([0; 4], |Xyxy { x1, y1, x2, y2 }| [x1, x2, y1, y2].map(|side| side as u32));
        let part = |axis: usize, low: u32, high: u32| {
            let mut inside = (0..self.to[axis]).filter(|place| (low..high).contains(&source(axis, *place)));
            let first = inside.next().unwrap_or(0);
            let last = inside.next_back().unwrap_or(first);
            [first.saturating_sub(MARGIN), (last + 1 + MARGIN).min(self.to[axis])]
        };
        let ([left, right], [top, bottom]) = (part(0, x1, x2), part(1, y1, y2));
        let columns: Vec<usize> = (left..right).map(|x| source(0, x) as usize).collect();
        let row = |y: u32| {
            let row = &all[source(1, y) as usize * self.from[0] as usize..][..self.from[0] as usize];
            columns.iter().map(|column| u8::from(row[*column]))
        };
        ShownMask { from: [left, top], size: [right - left, bottom - top], pixels: (top..bottom).flat_map(row).collect() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        from: [u32; 2],
        to: [u32; 2],
        rgb: Vec<u8>,
    }

    fn picture([width, height]: [u32; 2]) -> Image {
        let level = |x: u32, y: u32, c: u32| ((x * (37 + 11 * c) + y * (101 - 7 * c) + x * y) % 256) as u8;
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| level(x, y, c)))).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn resizing_is_that_of_opencv() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/golden/training/resize.json")).unwrap();
        let (mut n_apart, mut n_levels) = (0, 0);
        for Case { from, to, rgb } in cases {
            let shown = Placement { from, to, is_mirrored: false, filter: Filter::OpenCv }.pixels(&picture(from));
            assert_eq!((shown.width, shown.height, shown.rgb.len()), (to[0], to[1], rgb.len()));
            let apart: Vec<u8> = shown.rgb.iter().zip(&rgb).map(|(found, expected)| found.abs_diff(*expected)).collect();
            assert!(apart.iter().all(|levels| *levels <= 1), "{from:?} to {to:?}: {:?}", apart.iter().max());
            n_apart += apart.iter().filter(|levels| **levels > 0).count();
            n_levels += apart.len();
        }
        assert!(n_apart * 100 <= n_levels, "{n_apart} of {n_levels}");
    }

    #[test]
    fn sizes_are_those_of_mmdet() {
        let to = |from, longer, shorter| Placement::fitting(from, longer, shorter).to;
        assert_eq!(to([640, 480], 1333, 800), [1067, 800]);
        assert_eq!(to([640, 427], 1331, 667), [1000, 667]);
        assert_eq!(to([333, 500], 1333, 800), [800, 1201]);
        assert_eq!(to([1000, 224], 1333, 800), [1333, 299]);
        // There a side of 0 px, and a failure.
        assert_eq!(to([1, 3000], 1333, 800), [1, 1333]);
    }

    #[test]
    fn a_mirrored_picture_is_the_picture_mirrored() {
        let plain = Placement { from: [4, 3], to: [4, 3], is_mirrored: false, filter: Filter::OpenCv };
        let image = picture([4, 3]);
        assert_eq!(plain.pixels(&image), image);
        let mirrored = plain.mirrored().pixels(&image);
        let pixel = |image: &Image, x: usize, y: usize| image.rgb[3 * (4 * y + x)..][..3].to_vec();
        for (x, y) in [(0, 0), (1, 2), (3, 1)] {
            assert_eq!(pixel(&mirrored, 3 - x, y), pixel(&image, x, y));
        }
    }

    #[derive(Deserialize)]
    struct MaskCase {
        from: [u32; 2],
        to: [u32; 2],
        mirrored: bool,
        mask: Vec<u8>,
        pixels: Vec<[u32; 2]>,
    }

    #[test]
    fn masks_are_shown_where_opencv_shows_them() {
        let cases: Vec<MaskCase> = serde_json::from_str(include_str!("../../tests/golden/training/masks.json")).unwrap();
        for MaskCase { from, to, mirrored, mask, pixels } in cases {
            let mask = Mask::from_pixels(&mask.iter().map(|pixel| *pixel != 0).collect::<Vec<_>>(), from).unwrap();
            let ShownMask { from: [left, top], size: [width, height], pixels: found } =
                Placement { from, to, is_mirrored: mirrored, filter: Filter::OpenCv }.show_mask(&mask);
            assert_eq!(found.len(), (width * height) as usize);
            let place = |place: usize| [left + place as u32 % width, top + place as u32 / width];
            let found: Vec<[u32; 2]> = (0..found.len()).filter(|at| found[*at] != 0).map(place).collect();
            assert_eq!(found, pixels, "{from:?} to {to:?}");
            // Two pixels of none on every side that is not the image's.
            let nearest = |axis: usize| pixels.iter().map(|pixel| pixel[axis]).min().unwrap();
            assert_eq!([left, top], [nearest(0).saturating_sub(2), nearest(1).saturating_sub(2)]);
            assert!(width < to[0] && height < to[1]);
        }
        let nothing = Mask::from_pixels(&[false; 12], [4, 3]).unwrap();
        assert!(
            Placement { from: [4, 3], to: [8, 6], is_mirrored: true, filter: Filter::OpenCv }
                .show_mask(&nothing)
                .pixels
                .iter()
                .all(|pixel| *pixel == 0)
        );
    }

    #[test]
    fn what_is_no_object_is_left_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let label = |id: u64, image: u64, category: u64, bbox: [f64; 4], is_crowd: u8| json!({"id": id, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": is_crowd});
        let image = |id: u64, side: u32| json!({"id": id, "file_name": format!("{id}.jpg"), "width": 100, "height": side});
        let content = json!({
            "images": [image(1, 80), image(2, 31), image(3, 80), image(4, 80)],
            "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
            "annotations": [
                label(1, 1, 9, [10.0, 10.0, 20.0, 20.0], 0), label(2, 1, 9, [10.0, 10.0, 20.0, 20.0], 1),
                label(3, 1, 9, [10.0, 10.0, 0.5, 20.0], 0), label(4, 1, 9, [99.0, 10.0, 20.0, 20.0], 0), label(5, 1, 7, [1.0, 1.0, 9.0, 9.0], 0),
                label(6, 2, 9, [1.0, 1.0, 9.0, 9.0], 0), label(7, 3, 7, [1.0, 1.0, 9.0, 9.0], 0), label(8, 4, 9, [0.0, 0.0, 50.0, 50.0], 1),
            ],
        });
        serde_json::to_writer(&file, &content).unwrap();
        let annotations = Annotations::load(file.path()).unwrap();
        let found = samples(&annotations, &[CategoryId(9)]);
        let named: Vec<(u64, Vec<u64>)> =
            found.iter().map(|sample| (sample.info.id.0, sample.objects.iter().map(|object| object.id.0).collect())).collect();
        // Of image 2 a side is too short; 3 has none of the classes; 4 has a region of many of them, and no object.
        assert_eq!(named, [(1, vec![1, 4]), (4, vec![])]);
        assert_eq!(found[0].objects[0].class, 0);
        assert_eq!(found[0].crowds, [Xyxy { x1: 10.0, y1: 10.0, x2: 30.0, y2: 30.0 }]);
    }

    #[test]
    fn a_part_shows_the_classes_that_it_overlaps_at_all() {
        let object = |id: u64, corners: [f32; 4], class| Object {
            id: AnnotationId(id),
            xyxy: corners.into(),
            class,
            segmentation: Outline::Missing,
        };
        let objects = [
            object(1, [10.0, 10.0, 20.0, 20.0], 5),
            object(2, [19.9, 0.0, 90.0, 9.0], 2),
            object(3, [20.0, 10.0, 30.0, 20.0], 7),
            object(4, [0.0, 0.0, 100.0, 100.0], 5),
            object(5, [15.0, 15.0, 15.0, 18.0], 1),
        ];
        let shown = |corners: [f32; 4]| shown_classes(&corners.into(), &objects);
        assert_eq!(shown([0.0, 0.0, 20.0, 20.0]), [2, 5]);
        assert_eq!(shown([20.0, 9.0, 40.0, 40.0]), [5, 7]);
        // A box that is inside out, as the reference stores some, shows nothing.
        assert!(shown([40.0, 0.0, 20.0, 50.0]).is_empty());
    }

    #[test]
    fn rare_classes_are_seen_more_often() {
        for (n_images, expected) in [(4000, 2), (3000, 2), (1000, 1)] {
            let mut all = vec![BTreeSet::from([0]); n_images];
            all[17] = BTreeSet::from([0, 1]);
            let repeats = repeats(all.into_iter(), 1e-3);
            assert_eq!((repeats[17], repeats[0]), (expected, 1), "{n_images}");
        }
    }

    #[test]
    fn batches_do_not_mix_shapes_but_at_the_end() {
        let order = [0, 1, 2, 3, 4, 5, 6];
        assert_eq!(batches(&order, |place| place % 2 == 1, 2), [vec![0, 2], vec![1, 3], vec![4, 6], vec![5]]);
        assert_eq!(batches(&order, |place| place == 3, 4), [vec![0, 1, 2, 4], vec![5, 6, 3]]);
    }

    proptest! {
        #[test]
        fn boxes_go_and_come_back(x in 0.0_f32..500.0, y in 0.0_f32..400.0, w in 1.0_f32..140.0, h in 1.0_f32..80.0, longer in 200_u32..1400) {
            let placement = Placement::fitting([640, 480], longer, 800);
            let xyxy = Xyxy { x1: x, y1: y, x2: x + w, y2: y + h };
            let close = |one: &Xyxy, other: &Xyxy| {
                [(one.x1, other.x1), (one.y1, other.y1), (one.x2, other.x2), (one.y2, other.y2)].iter().all(|(a, b)| (a - b).abs() < 1e-2)
            };
            for placement in [placement, placement.mirrored()] {
                prop_assert!(close(&placement.find(&placement.show(&xyxy)), &xyxy));
            }
            prop_assert_eq!(placement.mirrored().mirrored(), placement);
            // Mirrored, then scaled, is scaled, then mirrored.
            let here = Placement { from: placement.from, to: placement.from, is_mirrored: true, filter: Filter::OpenCv };
            prop_assert!(close(&placement.show(&here.show(&xyxy)), &placement.mirrored().show(&xyxy)));
            let mirrored = Xyxy { x1: 640.0 - (x + w), x2: 640.0 - x, ..xyxy };
            prop_assert!(close(&here.show(&xyxy), &mirrored));
            prop_assert!(close(&here.show(&here.show(&xyxy)), &xyxy));
        }
    }

    /// The arrays of `tests/golden/promptdet/make.py`, row by row.
    fn promptdet() -> BTreeMap<String, Vec<f64>> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/promptdet/views.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// T8 of PromptDet's specification: orders of its own code, one of which exact fractions would not give.
    #[test]
    fn batches_are_interleaved_as_by_promptdet_s_code() {
        let golden = promptdet();
        for (place, lengths) in golden["order/lengths"].as_chunks::<2>().0.iter().enumerate() {
            let expected: Vec<usize> = golden[&format!("order/sequence_{place}")].iter().map(|loader| *loader as usize).collect();
            assert_eq!(interleaved(&lengths.map(|length| length as usize)), expected, "{lengths:?}");
        }
        let words = |lengths: &[usize]| interleaved(lengths).iter().map(ToString::to_string).collect::<String>();
        assert_eq!([words(&[6, 4]), words(&[5, 2]), words(&[10, 3])], ["0101001010", "0100100", "0100010001000"]);
        assert_eq!((words(&[]), words(&[0, 2]), words(&[2, 0, 1])), (String::new(), "11".into(), "020".into()));
    }

    /// T6: 30 images of PromptDet's own code, ties among them.
    #[test]
    fn boxes_go_from_view_to_view_as_by_promptdet_s_code() {
        let golden = promptdet();
        let rows = golden["views/in"].as_chunks::<18>().0.iter().zip(golden["views/out"].as_chunks::<8>().0);
        let mut n = 0;
        for (row, expected) in rows {
            let size = |at: usize| [row[at] as u32, row[at + 1] as u32];
            let view = |at: usize| Placement { from: size(0), to: size(at), is_mirrored: row[at + 2] > 0.0, filter: Filter::OpenCv };
            let corners = |at: usize| Xyxy::from([0, 1, 2, 3].map(|corner| row[at + corner] as f32));
            let found = agreed([&view(2), &view(5)], [corners(8), corners(12)], [row[16] as f32, row[17] as f32]);
            let found = found.map(|xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]).concat();
            for (found, expected) in found.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{row:?}: {found}, expected {expected}");
            }
            n += 1;
        }
        assert_eq!(n, 30);
        let view = |side: u32, is_mirrored| Placement { from: [1024, 1024], to: [side, side], is_mirrored, filter: Filter::OpenCv };
        let found = view(200, true).carried(&Xyxy::from([20.0, 30.0, 120.0, 150.0]), &view(600, false));
        let corners = [found.x1, found.y1, found.x2, found.y2];
        assert!(corners.iter().zip([240.0, 90.0, 540.0, 450.0]).all(|(found, expected)| (found - expected).abs() < 1e-3), "{corners:?}");
    }
}
