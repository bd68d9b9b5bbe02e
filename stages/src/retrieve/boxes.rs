//! `retrieve/boxes`: pseudo labels of novel classes, the proposals most similar to their names.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId, ImageInfo},
    boxes::xyxy_to_xywh,
    classes::ClassSplit,
};
use ovenbird_models::{
    search::{Found, Hit, Measure, Product, Rows, Search},
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{AnnotationFile, Classes, Embeddings, Hits, Prompts, RegionFeatures, RegionHit, Searched},
    clip::space,
};

/// Shards of features that are searched between two checkpoints: some 16,000 images.
const SHARDS_PER_UNIT: usize = 16;
/// The images of a shard, about.
const IMAGES_PER_SHARD: u32 = 1024;

/// Pseudo labels of novel classes: for each the proposals whose embeddings are most similar to the class's, over all images.
///
/// Only proposals with enough objectness take part. The search is exact and goes through the features once; memory does not grow with them.
/// There is no NMS, no limit for an image, and no label of a novel class is read. Of equal cosines the proposal that comes first wins.
/// (LP-OVOD, section 6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Boxes {
    /// The least objectness of a proposal, inclusive. LP-OVOD's shipped pseudo labels begin at 0.6; its script says 0.5.
    pub min_objectness: f32,
    /// Boxes for each novel class.
    pub per_class: usize,
    /// Accept embeddings of two CLIPs, which is refused otherwise: cosines between them mean nothing, unless both share one space.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mixed_clips: bool,
}

impl Default for Boxes {
    fn default() -> Self {
        Self { min_objectness: 0.6, per_class: 100, mixed_clips: false }
    }
}

const FEATURES: In<RegionFeatures> = In::required("features", "Embeddings of proposals (`clip/proposals`, `embeddings/import`).");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP; their lengths do not matter.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names; boxes are retrieved for the novel ones.");
const ANNOTATIONS: In<AnnotationFile> =
    In::required("annotations", "COCO or LVIS json of the same images: their names and sizes. Its labels are not read.");
const CATEGORIES: In<AnnotationFile> = In::optional(
    "categories",
    "COCO or LVIS json whose category ids the pseudo labels get; without it those of `annotations`. LP-OVOD needs COCO's own.",
);
const LABELS: Out<AnnotationFile> = Out::new(
    "annotations",
    "COCO json of the boxes with `score` (objectness) and `cosine`, the classes' `categories`, and the images that have some.",
);
const HITS: Out<Hits> = Out::new("hits", "The boxes of each class, best first, with image, objectness and cosine.");

impl Stage for Boxes {
    const KIND: &'static str = "retrieve/boxes";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FEATURES.info(), PROMPTS.info(), CLASSES.info(), ANNOTATIONS.info(), CATEGORIES.info()];
    const OUTPUTS: &'static [PortInfo] = &[LABELS.info(), HITS.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("min_objectness", (0.0..=1.0).contains(&self.min_objectness), "a number from 0 to 1"),
            ("per_class", self.per_class > 0, "at least 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let n_shards = u32::try_from(inputs.read(FEATURES)?.n_shards()).unwrap_or(u32::MAX).max(1);
        let checkpoints = n_shards.div_ceil(SHARDS_PER_UNIT as u32);
        Ok(Units::Chain { checkpoints, steps: n_shards, images_per_step: IMAGES_PER_SHARD, stay: Vec::new() })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Some(first) = units.first() else { return Ok(()) };
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let (annotations, categories) = match cx.inputs.read_if_given(CATEGORIES)? {
            Some(file) => (cx.inputs.read(ANNOTATIONS)?.load_images()?, file.load_categories()?),
            None => {
                let both = cx.inputs.read(ANNOTATIONS)?.load_categories()?;
                (both.clone(), both)
            }
        };
        // Fails before the search where a class has no category.
        Classes::category_ids(&categories, classes.all())?;
        let (features, prompts) = (cx.inputs.read(FEATURES)?, cx.inputs.read(PROMPTS)?);
        space::common_unless(self.mixed_clips, &[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        if features.clip()?.is_none() {
            cx.note("the features do not say which CLIP made them: make sure that it is that of the prompts");
        }
        if cx.most_items.is_some() {
            cx.note("a dry run: proposals of any objectness are retrieved, and a whole image where there are none, since networks are hardly trained");
        }
        let before = first.index.checked_sub(1).map(|before| cx.published(before, HITS)).transpose()?;
        let mut retrieval = Retrieval::new(self, &classes, &prompts, features.dim()?, before, cx)?;
        let n_shards = features.n_shards();
        let begins = |index: usize| if index == cx.units.len() { n_shards } else { (index * SHARDS_PER_UNIT).min(n_shards) };
        cx.total((n_shards - begins(first.index)) as u64);
        for unit in units {
            let draft = cx.begin(unit)?;
            for shard in begins(unit.index)..begins(unit.index + 1) {
                for batch in features.batches(shard..shard + 1) {
                    let batch = batch?;
                    retrieval.add(&batch.embeddings()?, &batch.objectness()?, |place| batch.region(place))?;
                    cx.proceed()?;
                }
                cx.tick(1);
            }
            let mut hits = retrieval.hits();
            if let Some(image) = annotations.images.first().filter(|_| cx.most_items.is_some()) {
                hits.fill_up(image);
            }
            let labels = Labels::of(&hits, &classes, &categories, &annotations)?;
            let json = serde_json::to_vec(&labels).expect("BUG: names and numbers are plain JSON");
            draft.write(LABELS, "annotations.json", &json)?;
            hits.write(draft.create(HITS, "hits.parquet")?)?;
            if unit.index + 1 == cx.units.len() {
                self.remarks(&hits).into_iter().for_each(|words| cx.note(words));
            }
            let n_hits: usize = hits.by_class.iter().map(|(_, hits)| hits.len()).sum();
            let Searched { regions, candidates, bad_rows } = hits.searched;
            let n_bad = bad_rows.zero + bad_rows.nan + bad_rows.infinite;
            let counts = [
                ("boxes", n_hits as u64),
                ("images", labels.images.len() as u64),
                ("searched", regions),
                ("candidates", candidates),
                ("bad_rows", n_bad),
            ];
            cx.commit(draft, counts.map(|(name, n)| (name.to_owned(), n.into())).into())?;
        }
        Ok(())
    }
}

impl Boxes {
    /// What an operator should know of the hits.
    fn remarks(&self, hits: &Hits) -> Vec<String> {
        let mut remarks = Vec::new();
        let Searched { regions, candidates, bad_rows } = &hits.searched;
        let which =
            if candidates < regions { format!(", those with an objectness of {} or more", self.min_objectness) } else { String::new() };
        remarks.push(format!("searched {candidates} of {regions} proposals{which}"));
        if bad_rows.zero + bad_rows.nan + bad_rows.infinite > 0 {
            remarks.push(format!(
                "{} embeddings are zero, {} NaN and {} infinite: they are never retrieved",
                bad_rows.zero, bad_rows.nan, bad_rows.infinite
            ));
        }
        let few = hits.by_class.iter().filter(|(_, hits)| hits.len() < self.per_class);
        let few: Vec<String> = few.map(|(class, hits)| format!("{class} ({})", hits.len())).collect();
        if !few.is_empty() {
            remarks.push(format!("fewer than {} boxes, as there are no more candidates: {}", self.per_class, few.join(", ")));
        }
        remarks
    }
}

/// A search, with the regions behind its hits.
struct Retrieval {
    search: Search,
    classes: Vec<String>,
    min_objectness: f32,
    /// By place, of all hits so far and some that were.
    regions: BTreeMap<u64, RegionHit>,
    n_regions: u64,
    n_candidates: u64,
}

impl Retrieval {
    /// A search that goes on after what was found before.
    fn new(stage: &Boxes, classes: &ClassSplit, prompts: &Prompts, dim: usize, before: Option<Hits>, cx: &Context<'_>) -> Result<Self> {
        if classes.novel.is_empty() {
            let problem = "expected at least one novel class, found none".into();
            return Err(Error::Input { port: CLASSES.info().name, problem, hint: "name the classes to retrieve under `novel`".into() });
        }
        let rows = prompts.select(&classes.novel)?;
        if rows.size()[1] != dim as i64 {
            return Err(Error::Input {
                port: PROMPTS.info().name,
                problem: format!("class embeddings have {} numbers, embeddings of proposals {dim}", rows.size()[1]),
                hint: "make the prompts and the features with the same CLIP".into(),
            });
        }
        let min_objectness = if cx.most_items.is_some() { f32::NEG_INFINITY } else { stage.min_objectness };
        Self::of(stage, classes.novel.clone(), &rows, before, (Product::fastest(cx.has_bf16), cx.device), min_objectness)
    }

    /// `rows`: class embeddings `[K, D]`.
    fn of(
        stage: &Boxes,
        classes: Vec<String>,
        rows: &Tensor,
        before: Option<Hits>,
        (product, device): (Product, tch::Device),
        min_objectness: f32,
    ) -> Result<Self> {
        let limits = vec![stage.per_class; classes.len()];
        let search = Search::new(&to_unit_length(&rows.to_kind(Kind::Float)), &limits, Measure::Cosine, product, device)?;
        let (mut regions, mut found, mut searched) = (BTreeMap::new(), Found::default(), Searched::default());
        if let Some(Hits { by_class, searched: before }) = before {
            let hit = |hit: &RegionHit| Hit { place: hit.place, score: hit.cosine };
            found.hits = by_class.iter().map(|(_, hits)| hits.iter().map(hit).collect()).collect();
            found.bad_rows = before.bad_rows;
            regions.extend(by_class.into_iter().flat_map(|(_, hits)| hits).map(|hit| (hit.place, hit)));
            searched = before;
        } else {
            found.hits = vec![Vec::new(); classes.len()];
        }
        Ok(Self {
            search: search.resume(found)?,
            classes,
            min_objectness,
            regions,
            n_regions: searched.regions,
            n_candidates: searched.candidates,
        })
    }

    /// Searches some more regions; `region`: the image and the box of one, by its place among these.
    fn add(
        &mut self,
        embeddings: &Embeddings<'_>,
        objectness: &[f32],
        region: impl Fn(usize) -> Result<(ImageId, ovenbird_data::boxes::Xyxy)>,
    ) -> Result<()> {
        let candidates: Vec<bool> = objectness.iter().map(|objectness| *objectness >= self.min_objectness).collect();
        let rows = match embeddings {
            Embeddings::F16(halves) => Rows::F16(halves),
            Embeddings::F32(singles) => Rows::F32(singles),
        };
        let first = self.n_regions;
        self.search.add(rows, first, Some(&candidates))?;
        self.n_regions += objectness.len() as u64;
        self.n_candidates += candidates.iter().filter(|is_candidate| **is_candidate).count() as u64;
        let found = self.search.hits();
        let places: BTreeSet<u64> = found.iter().flatten().map(|hit| hit.place).collect();
        self.regions.retain(|place, _| places.contains(place));
        for place in places.range(first..) {
            let (image_id, xyxy) = region((place - first) as usize)?;
            let objectness = objectness[(place - first) as usize];
            self.regions.insert(*place, RegionHit { place: *place, image_id, xyxy, objectness, cosine: 0.0 });
        }
        Ok(())
    }

    /// All that was found so far.
    fn hits(&self) -> Hits {
        let hit = |hit: &Hit| RegionHit { cosine: hit.score, ..self.regions[&hit.place].clone() };
        let of_class = self.search.hits().into_iter().map(|hits| hits.iter().map(hit).collect());
        let searched = Searched { regions: self.n_regions, candidates: self.n_candidates, bad_rows: self.search.bad_rows() };
        Hits { by_class: self.classes.iter().cloned().zip(of_class).collect(), searched }
    }
}

/// The file of pseudo labels, as LP-OVOD ships it. (Section 6.3.)
#[derive(Debug, Serialize)]
struct Labels {
    /// In the order of their first use.
    images: Vec<LabelledImage>,
    /// Class by class, best first.
    annotations: Vec<Label>,
    categories: Vec<Category>,
}

#[derive(Debug, Serialize)]
struct LabelledImage {
    file_name: String,
    width: u32,
    height: u32,
    id: u64,
}

#[derive(Debug, Serialize)]
struct Label {
    segmentation: [(); 0],
    area: f64,
    /// x, y, width, height.
    bbox: [f64; 4],
    image_id: u64,
    id: u64,
    category_id: u64,
    iscrowd: u8,
    /// Objectness.
    score: f64,
    cosine: f64,
}

#[derive(Debug, Serialize)]
struct Category {
    id: u64,
    name: String,
}

impl Labels {
    fn of(hits: &Hits, classes: &ClassSplit, categories: &Annotations, annotations: &Annotations) -> Result<Self> {
        let names: BTreeSet<&String> = classes.all().collect();
        let ids: Vec<CategoryId> = Classes::category_ids(categories, hits.by_class.iter().map(|(class, _)| class))?;
        let (mut images, mut seen, mut labels) = (Vec::new(), BTreeSet::new(), Vec::new());
        for (id, (_, hits)) in ids.iter().zip(&hits.by_class) {
            for hit in hits {
                if seen.insert(hit.image_id) {
                    let ImageInfo { file_name, width, height, .. } = annotations.image(hit.image_id).ok_or_else(|| Error::Input {
                        port: ANNOTATIONS.info().name,
                        problem: format!("no image {}, of which the features have regions", hit.image_id),
                        hint: "give the annotations that the features were made for".into(),
                    })?;
                    images.push(LabelledImage { file_name: file_name.clone(), width: *width, height: *height, id: hit.image_id.0 });
                }
                let bbox @ [_, _, width, height] = xyxy_to_xywh(&hit.xyxy);
                labels.push(Label {
                    segmentation: [],
                    area: width * height,
                    bbox,
                    image_id: hit.image_id.0,
                    id: labels.len() as u64 + 1,
                    category_id: id.0,
                    iscrowd: 0,
                    score: hit.objectness.into(),
                    cosine: hit.cosine.into(),
                });
            }
        }
        let listed = categories.categories.iter().filter(|category| names.contains(&category.name));
        let categories = listed.map(|category| Category { id: category.id.0, name: category.name.clone() }).collect();
        Ok(Self { images, annotations: labels, categories })
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use ovenbird_data::boxes::Xyxy;
    use tch::Device;

    use super::*;
    use crate::golden::{lp_ovod, numbers};

    /// LP-OVOD's own code on 33 images, in chunks of 8 with 40 hits each: one row has exactly the least objectness, one the next number below it.
    #[test]
    fn boxes_are_those_that_lp_ovod_s_code_retrieves() {
        let golden = lp_ovod();
        let halves: Vec<f16> = numbers(&golden["retrieve/embeddings_f16"]).into_iter().map(f16::from_f64).collect();
        let proposals: Vec<f32> = numbers(&golden["retrieve/proposals"]).into_iter().map(|number| number as f32).collect();
        let [counts, image_ids] = ["retrieve/counts", "retrieve/image_ids"].map(|name| numbers(&golden[name]));
        let image_of: Vec<u64> = counts.iter().zip(&image_ids).flat_map(|(n, id)| vec![*id as u64; *n as usize]).collect();
        let region = |row: usize| {
            let [x1, y1, x2, y2] = [0, 1, 2, 3].map(|corner| proposals[5 * row + corner]);
            Ok((ImageId(image_of[row]), Xyxy { x1, y1, x2, y2 }))
        };
        let stage = Boxes { per_class: 15, ..Boxes::default() };
        let classes: Vec<String> = (0..4).map(|class| format!("class {class}")).collect();
        for (product, piece) in [(Product::F32, 389), (Product::Bf16, 389), (Product::F32, 7)] {
            let mut retrieval =
                Retrieval::of(&stage, classes.clone(), &golden["retrieve/text"], None, (product, Device::Cpu), 0.6).unwrap();
            for first in (0..389).step_by(piece) {
                let n = piece.min(389 - first);
                let objectness: Vec<f32> = (first..first + n).map(|row| proposals[5 * row + 4]).collect();
                retrieval.add(&Embeddings::F16(&halves[16 * first..][..16 * n]), &objectness, |place| region(first + place)).unwrap();
                // As after a run that was stopped here.
                let before = Some(retrieval.hits());
                retrieval = Retrieval::of(&stage, classes.clone(), &golden["retrieve/text"], before, (product, Device::Cpu), 0.6).unwrap();
            }
            let hits = retrieval.hits();
            let found: Vec<&RegionHit> = hits.by_class.iter().flat_map(|(_, hits)| hits).collect();
            assert_eq!(found.len(), 60);
            let expected = |name: &str| numbers(&golden[&format!("retrieve/hit_{name}")]);
            let (images, rows, cosines, objectness) = (expected("image_id"), expected("row"), expected("cosine"), expected("objectness"));
            let boxes = expected("bbox_xywh");
            for (place, hit) in found.iter().enumerate() {
                assert_eq!((hit.image_id.0, hit.place), (images[place] as u64, rows[place] as u64), "{place}");
                assert!(
                    (f64::from(hit.cosine) - cosines[place]).abs() < 1e-5 && (f64::from(hit.objectness) - objectness[place]).abs() < 1e-7
                );
                assert!(xyxy_to_xywh(&hit.xyxy).iter().zip(&boxes[4 * place..]).all(|(found, expected)| (found - expected).abs() < 1e-4));
            }
            assert!(found.iter().all(|hit| hit.objectness >= 0.6));
        }
    }

    #[test]
    fn the_images_of_pseudo_labels_stand_in_the_order_of_their_first_use() {
        let golden = lp_ovod();
        let [images, expected] = ["retrieve/hit_image_id", "retrieve/images_in_order"].map(|name| numbers(&golden[name]));
        let hit = |image: &f64| RegionHit {
            place: 0,
            image_id: ImageId(*image as u64),
            xyxy: [1.0, 2.0, 11.0, 5.0].into(),
            objectness: 0.75,
            cosine: 0.5,
        };
        let of_class = |class: usize| images[15 * class..][..15].iter().map(hit).collect();
        let names = ["bus", "cat", "dog", "cow"];
        let by_class = names.iter().enumerate().map(|(class, name)| ((*name).to_owned(), of_class(class))).collect();
        let hits = Hits { by_class, searched: Searched::default() };
        let classes = ClassSplit { base: vec!["person".into()], novel: names.map(String::from).to_vec() };
        let listed: Vec<String> =
            expected.iter().map(|id| format!(r#"{{"id": {id}, "file_name": "{id:012}.jpg", "width": 40, "height": 30}}"#)).collect();
        let categories = ["person", "bus", "train", "cat", "dog", "cow"].iter().zip([1, 6, 7, 17, 18, 21]);
        let categories: Vec<String> = categories.map(|(name, id)| format!(r#"{{"id": {id}, "name": "{name}"}}"#)).collect();
        let json = format!(r#"{{"images": [{}], "annotations": [], "categories": [{}]}}"#, listed.join(","), categories.join(","));
        let annotations = Annotations::parse(json.as_bytes(), "a.json".as_ref()).unwrap();
        let labels = Labels::of(&hits, &classes, &annotations, &annotations).unwrap();
        assert_eq!(labels.images.iter().map(|image| image.id as f64).collect::<Vec<_>>().len(), expected.len());
        assert!(labels.images.iter().zip(&expected).all(|(image, id)| image.id == *id as u64));
        let text = serde_json::to_string(&labels).unwrap();
        let first = format!(
            r#""annotations":[{{"segmentation":[],"area":30.0,"bbox":[1.0,2.0,10.0,3.0],"image_id":{},"id":1,"category_id":6,"iscrowd":0,"score":0.75,"cosine":0.5}}"#,
            images[0]
        );
        assert!(text.contains(&first), "{text}");
        // Categories that are no classes are left out.
        assert!(text.ends_with(r#""categories":[{"id":1,"name":"person"},{"id":6,"name":"bus"},{"id":17,"name":"cat"},{"id":18,"name":"dog"},{"id":21,"name":"cow"}]}"#));
    }
}
