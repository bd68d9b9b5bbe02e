//! `annotations/web`: labels of images of the web, from the classes that they were found for.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::{annotations::CategoryId, images::Image};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Context, Error, In, Out, PortInfo, Problem, Result, Stage, Unit,
    artifacts::{AnnotationFile, ClassDownloads, Classes, DownloadState, Downloads, Images, Link, Links, WebCounts, WebTable},
    feed::in_parallel,
    web::{BelowMin, refuse_few},
};

/// Labels of whole images: each image of the web gets the class that it was found for. (PromptDet, section 9.1.)
///
/// Of each class the best images are used, by the ranks of their links. An image that was found for several classes has one entry and several labels. Boxes
/// are `[0, 0, 1, 1]`, which say nothing about where the object is.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Web {
    /// The most images of a class.
    pub per_class: usize,
    /// The least images of a class.
    pub min_per_class: usize,
    /// What happens where a class has fewer than `min_per_class`.
    pub below_min: BelowMin,
}

impl Default for Web {
    fn default() -> Self {
        Self { per_class: 300, min_per_class: 1, below_min: BelowMin::Warn }
    }
}

const IMAGES: In<Images> = In::required("images", "The images.");
const LINKS: In<Links> = In::required("links", "Links by class, best first.");
const DOWNLOADS: In<Downloads> =
    In::optional("downloads", "What came of the links. Without it the link's URL is a file name in `images`: a pool of your own.");
const CLASSES: In<Classes> = In::optional("classes", "Only these classes are labelled; without it all that have links.");
const CATEGORIES: In<AnnotationFile> = In::required("categories", "COCO or LVIS json whose category ids the labels get.");
const LABELS: Out<AnnotationFile> =
    Out::new("annotations", "COCO json: one box [0, 0, 1, 1] for each label, all `categories`, and the images that have a label.");
const TABLE: Out<WebTable> = Out::new("table", "By class: wanted, retrieved, downloaded, used, and why links led to no image.");

#[derive(Serialize)]
struct Labelled<'a> {
    images: Vec<LabelledImage<'a>>,
    annotations: Vec<Label>,
    categories: Vec<Category<'a>>,
}

#[derive(Serialize)]
struct LabelledImage<'a> {
    id: u64,
    file_name: &'a str,
    width: u32,
    height: u32,
}

#[derive(Serialize)]
struct Label {
    id: u64,
    image_id: u64,
    category_id: CategoryId,
    bbox: [u8; 4],
    area: u8,
    iscrowd: u8,
}

#[derive(Serialize)]
struct Category<'a> {
    id: CategoryId,
    name: &'a str,
}

/// What a class may use: files with their sizes, best first, and why other links led to none.
#[derive(Default)]
struct Candidates {
    files: Vec<(String, [u32; 2])>,
    n_there: usize,
    reasons: BTreeMap<String, usize>,
}

impl Stage for Web {
    const KIND: &'static str = "annotations/web";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[IMAGES.info(), LINKS.info(), DOWNLOADS.info(), CLASSES.info(), CATEGORIES.info()];
    const OUTPUTS: &'static [PortInfo] = &[LABELS.info(), TABLE.info()];

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("per_class", self.per_class > 0, "at least 1"),
            ("min_per_class", self.min_per_class <= self.per_class, "at most `per_class`"),
        ])
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let (images, links) = (cx.inputs.read(IMAGES)?, cx.inputs.read(LINKS)?);
        let downloads = cx.inputs.read_if_given(DOWNLOADS)?;
        let categories = cx.inputs.read(CATEGORIES)?.load_categories()?;
        let mut by_class = links.by_class;
        if let Some(Classes(classes)) = cx.inputs.read_if_given(CLASSES)? {
            let names: BTreeSet<&String> = classes.all().collect();
            by_class.retain(|(class, _)| names.contains(class));
            if by_class.is_empty() {
                let problem = format!("none of {} classes has links", names.len());
                return Err(Error::Input {
                    port: CLASSES.info().name,
                    problem,
                    hint: "give the classes that links were retrieved for".into(),
                });
            }
        }
        let ids = Classes::category_ids(&categories, by_class.iter().map(|(class, _)| class))?;
        let mut of_class: BTreeMap<&str, &ClassDownloads> = BTreeMap::new();
        for class in downloads.iter().flat_map(|downloads| &downloads.by_class) {
            of_class.insert(&class.class, class);
        }
        cx.total(by_class.len() as u64);
        let draft = cx.begin(unit)?;
        let wanted = self.per_class.min(cx.most_items.unwrap_or(usize::MAX));
        let (mut table, mut chosen) = (WebTable::default(), Vec::new());
        for (class, links) in &by_class {
            cx.proceed()?;
            let candidates = match &downloads {
                // A dry run downloads images of the first classes alone.
                Some(_) if cx.most_items.is_some() && !of_class.contains_key(class.as_str()) => Candidates::default(),
                Some(_) => downloaded(class, links, of_class.get(class.as_str()).copied(), &images)?,
                None => pooled(links, wanted, &images, cx)?,
            };
            let used: Vec<(String, [u32; 2])> = candidates.files.into_iter().take(wanted).collect();
            table.classes.push(WebCounts {
                class: class.clone(),
                wanted,
                retrieved: Links::used(links).count(),
                downloaded: candidates.n_there,
                used: used.len(),
                reasons: candidates.reasons,
            });
            chosen.push(used);
            cx.tick(1);
        }
        let counts: Vec<(String, usize)> = table.classes.iter().map(|counts| (counts.class.clone(), counts.used)).collect();
        let min = if cx.most_items.is_some() { 0 } else { self.min_per_class };
        refuse_few(&counts, min, self.below_min, LINKS.info().name, cx)?;

        let (mut entries, mut image_ids, mut labels) = (Vec::new(), BTreeMap::new(), Vec::new());
        for (category_id, files) in ids.iter().zip(&chosen) {
            for (file_name, [width, height]) in files {
                let id = *image_ids.entry(file_name).or_insert_with(|| {
                    let id = entries.len() as u64 + 1;
                    entries.push(LabelledImage { id, file_name, width: *width, height: *height });
                    id
                });
                let label = labels.len() as u64 + 1;
                labels.push(Label { id: label, image_id: id, category_id: *category_id, bbox: [0, 0, 1, 1], area: 1, iscrowd: 0 });
            }
        }
        let (n_images, n_labels) = (entries.len(), labels.len());
        if n_labels > n_images {
            cx.note(format!("{n_labels} labels of {n_images} images: some images were found for several classes"));
        }
        let categories = categories.categories.iter().map(|category| Category { id: category.id, name: &category.name }).collect();
        let labelled = Labelled { images: entries, annotations: labels, categories };
        let plain = "BUG: names and numbers are plain JSON";
        draft.write(LABELS, "annotations.json", &serde_json::to_vec(&labelled).expect(plain))?;
        draft.write(TABLE, "table.json", &serde_json::to_vec_pretty(&table).expect(plain))?;
        let total = table.total();
        let sums = [
            ("images", n_images),
            ("labels", n_labels),
            ("wanted", total.wanted),
            ("retrieved", total.retrieved),
            ("downloaded", total.downloaded),
            ("classes_without_images", table.classes.iter().filter(|counts| counts.used == 0).count()),
        ];
        cx.commit(draft, sums.map(|(name, n)| (name.to_owned(), n.into())).into())
    }
}

/// The images that were downloaded for a class.
fn downloaded(class: &str, links: &[Link], downloads: Option<&ClassDownloads>, images: &Images) -> Result<Candidates> {
    let refused = |problem: String, hint: &str| Err(Error::Input { port: DOWNLOADS.info().name, problem, hint: hint.into() });
    let hint = "give the downloads that were made from these links";
    let Some(downloads) = downloads else { return refused(format!("no class `{class}`, which the links have"), hint) };
    let urls: BTreeMap<usize, &str> = Links::used(links).map(|(rank, link)| (rank, link.url.as_str())).collect();
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut files = Vec::new();
    for row in &downloads.rows {
        let rank = row.rank as usize;
        if urls.get(&rank).is_none_or(|url| *url != row.url) {
            return refused(format!("{class}: rank {rank} is {}, which is another link there", row.url), hint);
        }
        match (&row.file, row.size) {
            (Some(file), Some(size)) => {
                images.file(file)?;
                files.push((file.clone(), size));
            }
            _ => *reasons.entry(row.state.word().into()).or_default() += 1,
        }
    }
    Ok(Candidates { n_there: files.len(), files, reasons })
}

/// The images of a pool that a class may use, as many as wanted; their sizes are read from their headers.
fn pooled(links: &[Link], wanted: usize, images: &Images, cx: &Context<'_>) -> Result<Candidates> {
    let names: Vec<&str> = Links::used(links).map(|(_, link)| link.url.as_str()).collect();
    let (mut files, mut reasons) = (Vec::new(), BTreeMap::new());
    let mut rest = names.as_slice();
    while files.len() < wanted && !rest.is_empty() {
        let (some, others) = rest.split_at((wanted - files.len()).min(rest.len()));
        rest = others;
        let sizes = in_parallel(some.len(), cx.threads, |place| {
            let Ok(file) = images.file(some[place]) else { return Ok(Err(DownloadState::Gone)) };
            Ok(Image::size(&file.read()?, &file.path).map_err(|_| DownloadState::DamagedImage))
        })?;
        for (name, size) in some.iter().zip(sizes) {
            match size {
                Ok(size) => files.push(((*name).to_owned(), size)),
                Err(state) => *reasons.entry(state.word().to_owned()).or_default() += 1,
            }
        }
    }
    Ok(Candidates { n_there: files.len(), files, reasons })
}
