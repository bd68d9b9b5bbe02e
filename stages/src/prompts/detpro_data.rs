//! `prompts/detpro-data`: rows of proposals and annotated objects, from which `prompts/detpro` learns.

use ovenbird_cache::Digest;
use ovenbird_data::{
    annotations::{Annotations, ImageId, ImageInfo},
    boxes::Xyxy,
    classes::ClassSplit,
};
use ovenbird_models::detpro::{MIN_IOU, RowIou, assign};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::naming::places_of_categories;
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{
        AnnotationFile, ByImage, Classes, EMBEDDINGS_FILE, PromptRow, PromptSamples, PromptSamplesWriter, ROWS_FILE, RegionFeatures,
        Regions,
    },
    clip::space,
    feed::stream,
};

/// Bytes of embeddings that may be ahead of the writer.
const ROOM: usize = 256 << 20;

/// Which annotated objects there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objects {
    /// Those of base classes: for training.
    #[default]
    Base,
    /// Those of base and novel classes: for validation.
    All,
}

/// Rows from which `prompts/detpro` learns: embeddings of proposals, with the class of the object that each matches and their IoU.
///
/// A proposal matches the object that it overlaps most, at an IoU of at least 0.5; one that an object overlaps most, at such an IoU, matches
/// that object. Proposals below an IoU of 0.1 are left out. Each object is a row of its own with an IoU of 1. Images without an object have no
/// rows. (DetPro, section 3.1.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DetproData {
    /// The objects that proposals match.
    pub objects: Objects,
    /// The IoU of a proposal that matches another object than the one that it overlaps most.
    pub iou: RowIou,
}

const FEATURES: In<RegionFeatures> = In::optional(
    "features",
    "Embeddings of proposals (`clip/proposals` or `embeddings/import`); without them the rows are the annotated objects alone.",
);
const TRUTH: In<RegionFeatures> =
    In::required("truth", "Embeddings of the annotated objects: `proposals/truth`, then `clip/proposals` with `min_side: 0`.");
const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the objects.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const SAMPLES: Out<PromptSamples> =
    Out::new("samples", "By row: `image_id`, `class` (a place in base ++ novel, -1 for none), `iou` f32, and `embedding` f16 [D].");

/// The objects of an image.
struct Labelled {
    image_id: ImageId,
    name: String,
    /// Class, a place in base ++ novel, and box, in the order of the annotations.
    objects: Vec<(usize, Xyxy)>,
}

impl Stage for DetproData {
    const KIND: &'static str = "prompts/detpro-data";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), TRUTH.info(), ANNOTATIONS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[SAMPLES.info()];
    const SKIPS_ITEMS: bool = true;

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let Classes(classes) = inputs.read(CLASSES)?;
        let item = |image: &Labelled| {
            let stated = format!("{} {:?}", image.image_id, image.objects);
            Digest::of_list("ovenbird labelled image 1", [(stated.as_str(), Digest::of(image.name.as_bytes()))])
        };
        let items = self.labelled(&inputs.read(ANNOTATIONS)?.load()?, &classes)?.iter().map(item).collect();
        Ok(Units::Independent { items, replaces: vec!["annotations"] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let images = self.labelled(&cx.inputs.read(ANNOTATIONS)?.load()?, &classes)?;
        let (features, truth) = (cx.inputs.read_if_given(FEATURES)?, cx.inputs.read(TRUTH)?);
        let (mut spaces, dim) = (vec![(TRUTH.info().name, truth.clip()?)], truth.dim()?);
        if let Some(features) = &features {
            spaces.insert(0, (FEATURES.info().name, features.clip()?));
            let of_features = features.dim()?;
            if dim != of_features {
                let problem = format!("embeddings of {dim} numbers, but those of `{}` have {of_features}", FEATURES.info().name);
                return Err(Error::Input { port: TRUTH.info().name, problem, hint: "make both with the same checkpoint".into() });
            }
        }
        let space = space::common(&spaces)?;
        let features = features.map(|features| features.by_image()).transpose()?;
        let embedded = Embedded { features, truth: truth.by_image()?, dim, rule: self.iou };
        // A dry run has features of its own images alone.
        let of_run = &images[..cx.items.len().min(images.len())];
        for (port, by_image) in embedded.features.iter().map(|features| (FEATURES, features)).chain([(TRUTH, &embedded.truth)]) {
            let labelled = of_run.iter().filter(|image| !image.objects.is_empty()).map(|image| image.image_id);
            let missing: Vec<ImageId> = labelled.filter(|image| !by_image.has(*image)).collect();
            cx.skip_missing(port.info(), &missing, of_run.len(), "make them for these annotations")?;
        }
        let names: Vec<String> = classes.all().cloned().collect();
        for unit in units {
            // A unit that another process makes is passed over.
            let Some(draft) = cx.begin_claimed(unit)? else { continue };
            let files = [draft.create(SAMPLES, ROWS_FILE)?, draft.create(SAMPLES, EMBEDDINGS_FILE)?];
            let mut writer = PromptSamplesWriter::new(files, &draft.unit().fingerprint, &names, dim, space)?;
            let counts = embedded.write(&draft, &images, &mut writer, cx)?;
            writer.finish()?;
            let metrics = [("images", unit.items.len()), ("rows", counts.rows), ("of_classes", counts.of_classes)];
            cx.commit(draft, metrics.map(|(name, n)| (name.to_owned(), n.into())).into())?;
        }
        Ok(())
    }
}

impl DetproData {
    /// The objects of each image. Fails where no image has one.
    fn labelled(&self, annotations: &Annotations, classes: &ClassSplit) -> Result<Vec<Labelled>> {
        let n_classes = match self.objects {
            Objects::Base => classes.base.len(),
            Objects::All => classes.all().count(),
        };
        let classes = places_of_categories(annotations, classes.all().take(n_classes));
        let by_image = annotations.by_image();
        let labelled = |image: &ImageInfo| {
            let objects = by_image.get(&image.id).into_iter().flatten().filter(|object| !object.is_crowd);
            let objects: Vec<_> = objects.filter_map(|object| Some((*classes.get(&object.category_id)?, object.xyxy))).collect();
            Labelled { image_id: image.id, name: image.file_name.clone(), objects }
        };
        let images: Vec<Labelled> = annotations.images.iter().map(labelled).collect();
        if images.iter().all(|image| image.objects.is_empty()) {
            let problem = format!("none of {} images has an object of these classes", images.len());
            let hint = "give classes and annotations of the same data set".into();
            return Err(Error::Input { port: ANNOTATIONS.info().name, problem, hint });
        }
        Ok(images)
    }
}

/// What the rows are made from.
struct Embedded {
    features: Option<ByImage<Regions>>,
    truth: ByImage<Regions>,
    dim: usize,
    rule: RowIou,
}

/// How many rows there are, and how many of a class.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    rows: usize,
    of_classes: usize,
}

impl Embedded {
    /// Writes the rows of a unit; threads read ahead of the one that writes.
    fn write(&self, draft: &UnitDraft, images: &[Labelled], writer: &mut PromptSamplesWriter, cx: &Context<'_>) -> Result<Counts> {
        let mut places = draft.unit().items.clone();
        // Reading an image's rows takes as much again as the rows.
        let next = || Ok(places.next().map(|place| (place, self.dim * 4 * 1024)));
        let prepare = |place: usize| (place, cx.attempt(|| self.rows(&images[place])));
        let mut counts = Counts::default();
        stream(cx.threads, ROOM, next, prepare, |(place, attempted), _| {
            if let Some(rows) = cx.accept_or_skip(draft, &images[place].name, attempted, cx.items.len())? {
                for (row, embedding) in &rows {
                    counts.rows += 1;
                    counts.of_classes += usize::from(row.class.is_some());
                    writer.push(*row, embedding)?;
                }
                cx.tick(1);
            }
            cx.proceed()
        })?;
        Ok(counts)
    }

    /// The rows of an image: its proposals in their order, then its objects. None where there is no object, or an earlier step skipped the
    /// image.
    fn rows(&self, image: &Labelled) -> Result<Vec<(PromptRow, Vec<f32>)>> {
        let image_id = image.image_id;
        let is_skipped = |features: &ByImage<Regions>| !features.has(image_id);
        if image.objects.is_empty() || self.features.as_ref().is_some_and(is_skipped) || is_skipped(&self.truth) {
            return Ok(Vec::new());
        }
        let truth = self.truth.get(image_id)?;
        let boxes = |boxes: &mut dyn Iterator<Item = &Xyxy>| boxes.map(corners).collect::<Vec<_>>();
        let objects = boxes(&mut image.objects.iter().map(|(_, xyxy)| xyxy));
        let mut rows = Vec::new();
        if let Some(features) = &self.features {
            let proposals = features.get(image_id)?;
            let assigned = assign(&boxes(&mut proposals.boxes.iter()), &objects, self.rule);
            for (found, embedding) in assigned.iter().zip(proposals.embeddings.chunks_exact(self.dim)) {
                if found.iou >= MIN_IOU {
                    let class = found.object.map(|object| image.objects[object].0);
                    rows.push((PromptRow { image_id, class, iou: found.iou }, embedding.to_vec()));
                }
            }
        }
        for ((class, _), row) in image.objects.iter().zip(rows_of(&objects, &truth)?) {
            let embedding = truth.embeddings[row * self.dim..][..self.dim].to_vec();
            rows.push((PromptRow { image_id, class: Some(*class), iou: 1.0 }, embedding));
        }
        Ok(rows)
    }
}

fn corners(xyxy: &Xyxy) -> [f32; 4] {
    [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2]
}

/// The row of each object among the embedded ones: the first with exactly its box that no object before it has.
fn rows_of(objects: &[[f32; 4]], truth: &Regions) -> Result<Vec<usize>> {
    let bits = |corners: [f32; 4]| corners.map(f32::to_bits);
    let mut is_used = vec![false; truth.boxes.len()];
    let row = |object: &[f32; 4]| {
        let is_its = |row: &usize| !is_used[*row] && bits(corners(&truth.boxes[*row])) == bits(*object);
        let row = (0..truth.boxes.len()).find(is_its).ok_or_else(|| Error::Input {
            port: TRUTH.info().name,
            problem: format!("no embedding of the object {object:?} of image {}, among {}", truth.image_id, truth.boxes.len()),
            hint: "embed what `proposals/truth` made of these annotations, by `clip/proposals` with `min_side: 0`; \
                   with `objects: all` it must not be given `classes`"
                .into(),
        })?;
        is_used[row] = true;
        Ok(row)
    };
    objects.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::{
        Artifact as _,
        artifacts::{Dtype, RegionFeaturesWriter, prompt_samples::tests::shards},
    };

    const OBJECTS: [[f32; 4]; 2] = [[0.0, 0.0, 100.0, 100.0], [10.0, 0.0, 90.0, 60.0]];

    fn axis(row: usize) -> [f32; 4] {
        std::array::from_fn(|place| if place == row { 1.0 } else { 0.0 })
    }

    /// Features of image 5, whose embeddings are 1 at the place of the row and 0 elsewhere.
    fn features(boxes: &[[f32; 4]]) -> (TempDir, ByImage<Regions>) {
        let (folder, files) = shards(|create, unit| {
            let mut writer = RegionFeaturesWriter::new(create("regions.arrow"), unit, Dtype::F16, 4, None).unwrap();
            let regions = Regions {
                image_id: ImageId(5),
                size_px: [200, 200],
                boxes: boxes.iter().map(|corners| Xyxy::from(*corners)).collect(),
                objectness: vec![1.0; boxes.len()],
                embeddings: (0..boxes.len()).flat_map(axis).collect(),
            };
            writer.push(regions).unwrap();
            writer.finish().unwrap();
        });
        (folder, RegionFeatures::open(&files).unwrap().by_image().unwrap())
    }

    fn labelled(image: u64, classes: &[usize]) -> Labelled {
        let objects = classes.iter().zip(OBJECTS).map(|(class, corners)| (*class, Xyxy::from(corners))).collect();
        Labelled { image_id: ImageId(image), name: "a.jpg".into(), objects }
    }

    /// Parity check 3, with the rows of the objects themselves.
    #[test]
    fn rows_are_proposals_that_overlap_an_object_and_the_objects() {
        let proposals = [[0.0, 0.0, 100.0, 95.0], [0.0, 0.0, 40.0, 100.0], [150.0, 150.0, 160.0, 160.0], [0.0, 60.0, 100.0, 100.0]];
        let (_proposals, features) = features(&proposals);
        // Objects of other classes are there too, in another order.
        let (_truth, truth) = self::features(&[OBJECTS[1], [7.0, 7.0, 9.0, 9.0], OBJECTS[0]]);
        let embedded = Embedded { features: Some(features), truth, dim: 4, rule: RowIou::Reference };
        let rows = embedded.rows(&labelled(5, &[7, 9])).unwrap();
        let expected = [(Some(9), 0.95, 0), (None, 0.4, 1), (None, 0.4, 3), (Some(7), 1.0, 2), (Some(9), 1.0, 0)];
        assert_eq!(rows.len(), expected.len());
        for ((row, embedding), (class, iou, place)) in rows.iter().zip(expected) {
            assert!(row.class == class && (row.iou - iou).abs() < 1e-5 && row.image_id == ImageId(5), "{row:?}");
            assert_eq!(*embedding, axis(place));
        }
        let fixed = Embedded { rule: RowIou::Fixed, ..embedded };
        assert!((fixed.rows(&labelled(5, &[7, 9])).unwrap()[0].0.iou - 0.505_263).abs() < 1e-5);
        // Without an object, and without features of the image.
        assert!(fixed.rows(&labelled(5, &[])).unwrap().is_empty() && fixed.rows(&labelled(6, &[7])).unwrap().is_empty());
        // Without proposals.
        let objects = Embedded { features: None, ..fixed }.rows(&labelled(5, &[7, 9])).unwrap();
        assert_eq!(objects.iter().map(|(row, _)| (row.class, row.iou)).collect::<Vec<_>>(), [(Some(7), 1.0), (Some(9), 1.0)]);
    }

    #[test]
    fn an_object_without_an_embedding_is_named() {
        let (_proposals, features) = features(&OBJECTS);
        let (_truth, truth) = self::features(&OBJECTS[..1]);
        let embedded = Embedded { features: Some(features), truth, dim: 4, rule: RowIou::Fixed };
        let error = embedded.rows(&labelled(5, &[7, 9])).unwrap_err();
        assert_eq!(error.to_string(), "truth: no embedding of the object [10.0, 0.0, 90.0, 60.0] of image 5, among 1");
        assert!(error.hint().unwrap().contains("min_side: 0"));
    }
}
