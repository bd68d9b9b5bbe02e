//! `annotations/relabel`: annotations whose objects have the classes that CLIP gives them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use ovenbird_data::{
    annotations::{Annotation, AnnotationId, Annotations, Category, CategoryId, ImageId},
    boxes::Xyxy,
    classes::ClassSplit,
    relabelled::write_relabelled,
};
use ovenbird_models::to_unit_length;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, Change, Changes, Classes, LabelFiles, Prompts, RegionFeatures, Regions, Relabelled, RelabelledClass},
    clip::space,
    training::named,
};

/// Classes that a note lists.
const MAX_NAMED: usize = 20;
/// Steps of the histogram of margins.
const MARGINS: usize = 10;

/// Gives the objects of base classes the classes that CLIP gives their regions: CORA's labels, which a localizer learns so that its anchors, named by the
/// same CLIP, find the objects that they lie on.
///
/// Each object of a base class gets the base class of the largest cosine, the one with the smaller category id of equal ones; boxes, order, ids and all else
/// stay as they are, byte for byte. Crowds and objects without an area keep their classes. The output `changes` undoes it: give it to another step as the
/// input `changes`. Files of other programs, one for each process, come in as `labels`. (CORA, section 6.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Relabel {
    /// What cosines are divided by before the softmax.
    pub temperature: f64,
    /// An object keeps its class where the probability of the new one is smaller.
    pub min_probability: f64,
    /// An object keeps its class where the probability of the new one is not larger than its own by this much.
    pub min_margin: f64,
    /// More names that an object may have, which have rows in `prompts`; an object that has one of them keeps its class. Names of novel classes are refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra: Vec<String>,
    /// Accept names of novel classes among `extra`: they are no secret any more then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_novel: bool,
}

impl Default for Relabel {
    fn default() -> Self {
        Self { temperature: 0.01, min_probability: 0.0, min_margin: 0.0, extra: Vec::new(), allow_novel: false }
    }
}

const ANNOTATIONS: In<AnnotationFile> = In::required("annotations", "COCO or LVIS json with the objects.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names; objects of base classes are relabelled.");
const FEATURES: In<RegionFeatures> =
    In::optional("features", "Embeddings of the annotated boxes of base classes (`region/embed` of `proposals/truth` with `classes`).");
const PROMPTS: In<Prompts> = In::optional("prompts", "Class embeddings of the same CLIP.");
const LABELS: In<LabelFiles> = In::optional("labels", "Files of another program instead of `features`: new category ids by annotation id.");
const CHANGES: In<Changes> = In::optional("changes", "What another step changed, instead of `features`: it is undone.");
const RELABELLED: Out<AnnotationFile> = Out::new("annotations", "The same json with other `category_id`s, otherwise unchanged.");
const CHANGED: Out<Changes> = Out::new(
    "changes",
    "json, by annotation id: the old and the new category id, and CLIP's probability of each (null where it is not known).",
);
const NEW_LABELS: Out<LabelFiles> = Out::new("labels", "json, by annotation id: the category id, of every object that was looked at.");
const SUMMARY: Out<Relabelled> = Out::new("summary", "json: agreement, classes before and after, which became which, margins.");

impl Stage for Relabel {
    const KIND: &'static str = "annotations/relabel";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] =
        &[ANNOTATIONS.info(), CLASSES.info(), FEATURES.info(), PROMPTS.info(), LABELS.info(), CHANGES.info()];
    const OUTPUTS: &'static [PortInfo] = &[RELABELLED.info(), CHANGED.info(), NEW_LABELS.info(), SUMMARY.info()];
    const SKIPS_ITEMS: bool = true;

    fn check(&self) -> Vec<Problem> {
        let is_part = |number: f64| (0.0..=1.0).contains(&number);
        Problem::unless(&[
            ("temperature", self.temperature > 0.0 && self.temperature.is_finite(), "a number above 0"),
            ("min_probability", is_part(self.min_probability), "a number from 0 to 1"),
            ("min_margin", is_part(self.min_margin), "a number from 0 to 1"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (file, Classes(classes)) = (cx.inputs.read(ANNOTATIONS)?, cx.inputs.read(CLASSES)?);
        let annotations = file.load()?;
        let by_clip = cx.inputs.read_both(FEATURES, PROMPTS)?;
        let labels = match (by_clip, cx.inputs.read_if_given(LABELS)?, cx.inputs.read_if_given(CHANGES)?) {
            (Some((features, prompts)), None, None) => self.by_clip(&annotations, &classes, (&features, &prompts), cx)?,
            (None, Some(LabelFiles(given)), None) => self.given(&annotations, &classes, &given, cx)?,
            (None, None, Some(Changes(changes))) => undone(&annotations, &changes)?,
            _ => {
                return Err(Error::Input {
                    port: FEATURES.info().name,
                    problem: "expected one of three: `features` with `prompts`, `labels`, or `changes`".into(),
                    hint: "give one of them and leave the others out".into(),
                });
            }
        };
        let summary = summary(&annotations, &labels);
        let share = summary.unchanged as f64 / summary.objects.max(1) as f64;
        cx.note(format!("{} of {} objects keep their class ({:.1} %)", summary.unchanged, summary.objects, 100.0 * share));
        let lost: Vec<&String> =
            summary.classes.iter().filter(|class| class.before > 0 && class.after == 0).map(|class| &class.name).collect();
        if !lost.is_empty() {
            cx.note(format!("{} classes have no object left, so nothing teaches them: {}", lost.len(), named(&lost, MAX_NAMED)));
        }
        let changes: BTreeMap<AnnotationId, Change> =
            labels.iter().filter(|(_, label)| label.0 != label.1).map(|(id, label)| (*id, *label)).collect();
        let draft = cx.begin(unit)?;
        let mut json = draft.create(RELABELLED, "annotations.json")?;
        let new = changes.iter().map(|(id, label)| (*id, label.1)).collect();
        write_relabelled(&file.file.read()?, &file.file.path, &new, &mut json)?;
        json.finish()?;
        draft.write(CHANGED, "changes.json", &bytes(&Changes(changes)))?;
        let all = LabelFiles(labels.iter().map(|(id, label)| (*id, label.1)).collect());
        draft.write(NEW_LABELS, "export_label_0.json", &bytes(&all))?;
        draft.write(SUMMARY, "summary.json", &bytes(&summary))?;
        let metrics = [("objects", summary.objects.into()), ("agreement", share.into()), ("lost_classes", lost.len().into())];
        cx.commit(draft, metrics.map(|(name, value): (&str, Value)| (name.to_owned(), value)).into())
    }
}

fn bytes(content: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(content).expect("BUG: ids and numbers are plain JSON")
}

/// The labels of objects: the old one, the new one, and CLIP's probability of each.
type Labels = BTreeMap<AnnotationId, Change>;

impl Relabel {
    /// Labels by the nearest class embedding.
    fn by_clip(
        &self,
        annotations: &Annotations,
        classes: &ClassSplit,
        (features, prompts): (&RegionFeatures, &Prompts),
        cx: &Context<'_>,
    ) -> Result<Labels> {
        space::common(&[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        let leaked: Vec<&String> = self.extra.iter().filter(|name| classes.novel.contains(name)).collect();
        if !leaked.is_empty() {
            let words = format!("{} of `extra` are names of novel classes: {}", leaked.len(), named(&leaked, MAX_NAMED));
            if !self.allow_novel {
                let hint = "leave them out, or say `allow_novel: true`: what is trained with these labels has then seen novel names".into();
                return Err(Error::Input { port: "extra", problem: words, hint });
            }
            cx.note(format!("{words}; what is trained with these labels has seen them"));
        }
        let mut vocabulary: Vec<(CategoryId, &String)> =
            Classes::category_ids(annotations, classes.base.iter())?.into_iter().zip(&classes.base).collect();
        vocabulary.sort_unstable();
        let ids: Vec<CategoryId> = vocabulary.iter().map(|(id, _)| *id).collect();
        let names: Vec<String> = vocabulary.iter().map(|(_, name)| *name).chain(&self.extra).cloned().collect();
        let rows = to_unit_length(&prompts.select(&names)?);
        let base: BTreeSet<CategoryId> = ids.iter().copied().collect();
        let by_image = annotations.by_image();
        let images = &annotations.images[..annotations.images.len().min(cx.most_items.unwrap_or(usize::MAX))];
        let mut waiting: BTreeSet<ImageId> = images.iter().map(|image| image.id).collect();
        cx.total(waiting.len() as u64);
        let mut labels = Labels::new();
        for regions in features.rows() {
            cx.proceed()?;
            let regions = regions?;
            if !waiting.remove(&regions.image_id) {
                continue;
            }
            let objects: Vec<&Annotation> = by_image.get(&regions.image_id).map(|all| all.to_vec()).unwrap_or_default();
            let objects = objects.into_iter().filter(|object| !object.is_crowd && base.contains(&object.category_id)).collect();
            labels.extend(self.labels(objects, &regions, &rows, &ids)?);
            cx.tick(1);
        }
        let missing: Vec<ImageId> = waiting.into_iter().collect();
        let hint = "embed the annotated boxes of these annotations: `proposals/truth`, then `region/embed`";
        cx.skip_missing(FEATURES.info(), &missing, images.len(), hint)?;
        Ok(labels)
    }

    /// The labels of an image's objects, whose regions are these. `rows`: f32 `[V, D]`, the first ones of the categories `ids`.
    fn labels(
        &self,
        objects: Vec<&Annotation>,
        regions: &Regions,
        rows: &Tensor,
        ids: &[CategoryId],
    ) -> Result<Vec<(AnnotationId, Change)>> {
        let refused = |problem: String| Error::Input {
            port: FEATURES.info().name,
            problem: format!("image {}: {problem}", regions.image_id),
            hint: "embed the annotated boxes of these annotations and classes: `proposals/truth` with `classes`, then `region/embed`"
                .into(),
        };
        let is_same = |(object, xyxy): (&&Annotation, &Xyxy)| object.xyxy == *xyxy;
        if objects.len() != regions.boxes.len() || !objects.iter().zip(&regions.boxes).all(is_same) {
            return Err(refused(format!(
                "expected the boxes of {} objects of base classes, found {} other boxes",
                objects.len(),
                regions.boxes.len()
            )));
        }
        if objects.is_empty() {
            return Ok(Vec::new());
        }
        let n = objects.len() as i64;
        let (dim, expected) = (regions.embeddings.len() as i64 / n, rows.size()[1]);
        if dim != expected {
            return Err(refused(format!("embeddings have {dim} numbers, class embeddings {expected}")));
        }
        let embeddings = to_unit_length(&Tensor::from_slice(&regions.embeddings).view([n, dim]));
        let logits = embeddings.matmul(&rows.tr()) / self.temperature;
        let probabilities =
            Vec::<Vec<f64>>::try_from(logits.to_kind(Kind::Double).softmax(-1, Kind::Double)).map_err(ovenbird_models::Error::from)?;
        let label = |(object, of_names): (&Annotation, Vec<f64>)| {
            // Outside the image a box has no area either.
            if object.xyxy.clipped(regions.size_px).area() <= 0.0 {
                return None;
            }
            let old = ids.iter().position(|id| *id == object.category_id).expect("BUG: objects are of base classes");
            // The first of equally probable ones.
            let best = (1..of_names.len()).fold(0, |best, name| if of_names[name] > of_names[best] { name } else { best });
            let is_sure = of_names[best] >= self.min_probability && of_names[best] - of_names[old] >= self.min_margin;
            let new = if best < ids.len() && is_sure { best } else { old };
            Some((object.id, Change(ids[old], ids[new], Some(of_names[old]), Some(of_names[new]))))
        };
        Ok(objects.into_iter().zip(probabilities).filter_map(label).collect())
    }
}

impl Relabel {
    /// Labels that another program made.
    fn given(
        &self,
        annotations: &Annotations,
        classes: &ClassSplit,
        given: &BTreeMap<AnnotationId, CategoryId>,
        cx: &Context<'_>,
    ) -> Result<Labels> {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: LABELS.info().name, problem, hint: hint.into() });
        if given.is_empty() {
            return refused("expected a label at least, found none".into(), "give the folder of `export_label_0.json` and so on");
        }
        for (id, new) in given {
            let Some(category) = annotations.category(*new) else {
                let problem = format!("annotation {id} is given category {new}, which the annotations do not have");
                return refused(problem, "give labels that were made for these annotations");
            };
            if classes.novel.contains(&category.name) && !self.allow_novel {
                let problem = format!("annotation {id} is given the novel class `{}`", category.name);
                return refused(
                    problem,
                    "leave it out, or say `allow_novel: true`: what is trained with these labels has then seen a novel class",
                );
            }
        }
        let label = |object: &Annotation| Some((object.id, Change(object.category_id, *given.get(&object.id)?, None, None)));
        let labels: Labels = annotations.annotations.iter().filter_map(label).collect();
        if labels.len() < given.len() {
            cx.note(format!("{} of {} labels are of no annotation here and left out", given.len() - labels.len(), given.len()));
        }
        let base: BTreeSet<CategoryId> = Classes::category_ids(annotations, classes.base.iter())?.into_iter().collect();
        let is_meant = |object: &&Annotation| !object.is_crowd && base.contains(&object.category_id);
        let meant: Vec<&Annotation> = annotations.annotations.iter().filter(is_meant).collect();
        let n_without = meant.iter().filter(|object| !given.contains_key(&object.id)).count();
        if n_without > 0 {
            cx.note(format!(
                "{n_without} of {} objects of base classes have no label and keep their class: is a file missing?",
                meant.len()
            ));
        }
        Ok(labels)
    }
}

/// The labels from before some changes. Fails where an object does not have what it was changed to.
fn undone(annotations: &Annotations, changes: &BTreeMap<AnnotationId, Change>) -> Result<Labels> {
    let by_id: BTreeMap<AnnotationId, &Annotation> = annotations.annotations.iter().map(|object| (object.id, object)).collect();
    let undo = |(id, Change(old, new, p_old, p_new)): (&AnnotationId, &Change)| {
        let found = by_id.get(id).map(|object| object.category_id);
        if annotations.category(*old).is_none() {
            return Err(Error::Input {
                port: CHANGES.info().name,
                problem: format!("annotation {id} had category {old}, which the annotations do not have"),
                hint: "give the annotations and the changes of the same step".into(),
            });
        }
        if found == Some(*new) {
            return Ok((*id, Change(*new, *old, *p_new, *p_old)));
        }
        let found = found.map_or_else(|| "none".to_owned(), |found| format!("one of category {found}"));
        Err(Error::Input {
            port: CHANGES.info().name,
            problem: format!("expected an annotation {id} of category {new}, found {found}"),
            hint: "give the annotations and the changes of the same step".into(),
        })
    };
    changes.iter().map(undo).collect()
}

fn summary(annotations: &Annotations, labels: &Labels) -> Relabelled {
    let (mut confusion, mut margins): (BTreeMap<(CategoryId, CategoryId), usize>, _) = (BTreeMap::new(), vec![0; MARGINS]);
    for Change(old, new, p_old, p_new) in labels.values() {
        *confusion.entry((*old, *new)).or_default() += 1;
        if let (true, Some(p_old), Some(p_new)) = (old != new, p_old, p_new) {
            margins[((p_new - p_old).max(0.0) * MARGINS as f64).min(MARGINS as f64 - 1.0) as usize] += 1;
        }
    }
    let count = |counts: &dyn Fn(CategoryId, CategoryId) -> bool| {
        confusion.iter().filter(|((old, new), _)| counts(*old, *new)).map(|(_, n)| *n).sum::<usize>()
    };
    let class = |category: &Category| {
        let id = category.id;
        let [before, after] = [count(&|old, _| old == id), count(&|_, new| new == id)];
        let unchanged = count(&|old, new| old == id && new == id);
        (before + after > 0).then(|| RelabelledClass { name: category.name.clone(), before, after, unchanged })
    };
    let mut categories: Vec<&Category> = annotations.categories.iter().collect();
    categories.sort_by_key(|category| category.id);
    let name = |id: CategoryId| annotations.category(id).map(|category| category.name.clone()).unwrap_or_default();
    let mut moved: Vec<(String, String, usize)> =
        confusion.iter().filter(|((old, new), _)| old != new).map(|((old, new), n)| (name(*old), name(*new), *n)).collect();
    moved.sort_by_key(|(_, _, n)| Reverse(*n));
    Relabelled {
        objects: labels.len(),
        unchanged: count(&|old, new| old == new),
        classes: categories.into_iter().filter_map(class).collect(),
        confusion: moved,
        margins,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::golden;

    fn path(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cora/relabel").join(name)
    }

    /// B1 of CORA's specification: files of two processes of its own code, merged by its own tool; the later one wins.
    #[test]
    fn files_of_two_processes_are_merged_as_by_cora_s_tool() {
        let input = fs::read(path("input.json")).unwrap();
        let annotations = Annotations::parse_all(&input, &path("input.json")).unwrap();
        let mut given = BTreeMap::new();
        for file in ["merge_label_0.json", "merge_label_1.json"] {
            given.extend(serde_json::from_slice::<BTreeMap<AnnotationId, CategoryId>>(&fs::read(path(file)).unwrap()).unwrap());
        }
        let mut out = Vec::new();
        let new = annotations.annotations.iter().filter_map(|object| Some((object.id, *given.get(&object.id)?))).collect();
        write_relabelled(&input, &path("input.json"), &new, &mut out).unwrap();
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(parse(&out), parse(&fs::read(path("merge_out.json")).unwrap()));
    }

    /// The pooled regions of CORA's own code get its labels, at both sizes of batches.
    #[test]
    fn regions_get_the_labels_of_cora_s_code() {
        let golden = golden::cora("relabel");
        let input = fs::read(path("input.json")).unwrap();
        let annotations = Annotations::parse_all(&input, &path("input.json")).unwrap();
        let ids: Vec<i64> = Vec::try_from(&golden["annotation_ids"]).unwrap();
        let objects: Vec<&Annotation> =
            ids.iter().map(|id| annotations.annotations.iter().find(|object| object.id.0 == *id as u64).unwrap()).collect();
        let vocabulary: Vec<CategoryId> =
            Vec::<i64>::try_from(&golden["vocabulary_ids"]).unwrap().into_iter().map(|id| CategoryId(id as u64)).collect();
        let expected: BTreeMap<AnnotationId, CategoryId> =
            serde_json::from_slice(&fs::read(path("export_label_batch2.json")).unwrap()).unwrap();
        let embeddings = Vec::<f32>::try_from(golden["feat_pooled_batch2"].flatten(0, -1)).unwrap();
        let regions = Regions {
            image_id: objects[0].image_id,
            // The objects are of images of several sizes.
            size_px: [90, 70],
            boxes: objects.iter().map(|object| object.xyxy).collect(),
            objectness: vec![1.0; objects.len()],
            embeddings,
        };
        let rows = to_unit_length(&golden["text"]);
        let labels = Relabel::default().labels(objects.clone(), &regions, &rows, &vocabulary).unwrap();
        assert_eq!(labels.iter().map(|(id, label)| (*id, label.1)).collect::<BTreeMap<_, _>>(), expected);
        let logits = Vec::<Vec<f64>>::try_from(golden["logits_batch2"].to_kind(Kind::Double).softmax(-1, Kind::Double)).unwrap();
        for ((_, Change(_, new, _, p_new)), of_names) in labels.iter().zip(logits) {
            let place = vocabulary.iter().position(|id| id == new).unwrap();
            assert!((p_new.unwrap() - of_names[place]).abs() < 1e-3);
        }
        // Nobody is as sure as this, so all keep their classes; and a margin that only some reach.
        let kept = Relabel { min_probability: 1.0, ..Relabel::default() }.labels(objects.clone(), &regions, &rows, &vocabulary).unwrap();
        assert!(kept.iter().all(|(_, label)| label.0 == label.1));
        // Other boxes are no boxes of these objects.
        let moved = Regions { boxes: regions.boxes.iter().map(|xyxy| Xyxy { x1: xyxy.x1 - 1.0, ..*xyxy }).collect(), ..regions.clone() };
        assert!(Relabel::default().labels(objects, &moved, &rows, &vocabulary).unwrap_err().to_string().contains("other boxes"));
    }

    /// The pixels of four images, as in a test, one by one, all boxes but the crowd. B3: with CLIP's own table other labels.
    #[test]
    fn images_get_the_labels_of_cora_s_code() {
        let golden = golden::cora("relabel");
        let input = fs::read(path("input.json")).unwrap();
        let annotations = Annotations::parse_all(&input, &path("input.json")).unwrap();
        let of_file = |name: &str| serde_json::from_slice::<Value>(&fs::read(path("labels_batch1.json")).unwrap()).unwrap()[name].clone();
        let vocabulary: Vec<CategoryId> =
            Vec::<i64>::try_from(&golden["vocabulary_ids"]).unwrap().into_iter().map(|id| CategoryId(id as u64)).collect();
        let ids: Vec<u64> = golden::numbers(&golden["annotation_ids"]).into_iter().map(|id| id as u64).collect();
        for (name, table) in [("lab", Some(&golden["table"])), ("lab_plain_table", None)] {
            let mut labels = Labels::new();
            for image in &annotations.images {
                let objects: Vec<&Annotation> =
                    annotations.annotations.iter().filter(|object| object.image_id == image.id && !object.is_crowd).collect();
                let boxes: Vec<Xyxy> = objects.iter().map(|object| object.xyxy).collect();
                let regions = golden::cora_regions(image.id, &boxes, table);
                if table.is_some() {
                    let embeddings = Tensor::from_slice(&regions.embeddings).view([-1, 16]);
                    let cosines = embeddings.matmul(&golden["text"].tr()) * 100.0;
                    for (row, object) in (0..).zip(&objects) {
                        if let Some(place) = ids.iter().position(|id| *id == object.id.0) {
                            let apart = golden::error(&cosines.get(row), &golden["logits_batch1"].get(place as i64));
                            assert!(apart < 2e-3, "{}: {apart}", object.id);
                        }
                    }
                }
                labels.extend(Relabel::default().labels(objects, &regions, &golden["text"], &vocabulary).unwrap());
            }
            let expected: BTreeMap<AnnotationId, CategoryId> = serde_json::from_value(of_file(name)).unwrap();
            assert_eq!(labels.iter().map(|(id, label)| (*id, label.1)).collect::<BTreeMap<_, _>>(), expected, "{name}");
        }
    }

    /// B2, and that what was changed can be undone.
    #[test]
    fn a_second_time_changes_nothing_and_changes_are_undone() {
        let input = fs::read(path("input.json")).unwrap();
        let annotations = Annotations::parse_all(&input, &path("input.json")).unwrap();
        let objects = &annotations.annotations;
        let (one, other) = (&objects[0], objects.iter().find(|object| object.category_id != objects[0].category_id).unwrap());
        let changes = BTreeMap::from([(one.id, Change(one.category_id, other.category_id, Some(0.1), Some(0.9)))]);
        let write = |json: &[u8], labels: &Labels| {
            let mut out = Vec::new();
            write_relabelled(json, &path("input.json"), &labels.iter().map(|(id, label)| (*id, label.1)).collect(), &mut out).unwrap();
            out
        };
        let changed = write(&input, &changes);
        assert!(changed != input && write(&changed, &changes) == changed);
        let after = Annotations::parse_all(&changed, &path("input.json")).unwrap();
        assert_eq!(write(&changed, &undone(&after, &changes).unwrap()), input);
        let error = undone(&annotations, &changes).unwrap_err().to_string();
        assert!(error.contains(&format!("annotation {}", one.id)), "{error}");
        let summary = summary(&annotations, &changes);
        assert_eq!((summary.objects, summary.unchanged, summary.confusion.len(), summary.margins[8]), (1, 0, 1, 1));
    }

    #[test]
    fn the_defaults_are_parameters_that_pass_their_own_check() {
        assert!(Stage::check(&Relabel::default()).is_empty());
    }
}
