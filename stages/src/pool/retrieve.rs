//! `pool/retrieve`: for each class the images of a pool that are most similar to its embedding.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
};

use ovenbird_data::annotations::{Annotations, ImageId};
use ovenbird_models::{
    search::{Found, Hit, Measure, Product, Rows, Search},
    to_unit_length,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Kind;

use super::{Laion5b, Nsfw};
use crate::{
    Context, Error, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, Units,
    artifacts::{
        AnnotationFile, Classes, Dropped, Embedded, ImageFeatures, Link, LinkText, Links, Pool, PoolMetadata, PoolRow, PoolRows,
        PoolSearched, PoolShard, Prompts, Vectors,
    },
    clip::space,
    feed::stream,
    training::named,
};

/// A checkpoint is written after so many bytes of embeddings: a few of LAION's shards of a million rows, or many small ones. It takes seconds to write the links of
/// a thousand classes.
const UNIT_BYTES: u64 = 4 << 30;
/// Rows that are read at once.
const BLOCK_ROWS: u64 = 1 << 16;
/// Bytes of rows that may be ahead of the search.
const ROOM: usize = 128 << 20;
/// Class names that a note lists.
const MAX_NAMED: usize = 10;

/// The images of a pool that are most similar to each class: links for `web/download`, best first.
///
/// A pool is what LAION, DataComp or CommonPool publish, read in place, or images of one's own (`features` of `clip/globals`). The search is exact and goes
/// through the pool once; memory does not grow with it, and a run that is stopped continues after the last whole shards. No index is needed. Of
/// equal cosines the row that comes first wins. Images that the pool calls unsafe for work are left out. A class's hits are
/// its `per_class` best rows; of those with one URL, or one MD5, the best is used, and the others are listed as dropped. (PromptDet, section 7.)
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retrieve {
    /// Which classes.
    pub split: Split,
    /// Hits for each class. PromptDet takes 300 for base classes and 500 for novel ones. More than are wanted, since many links are dead.
    pub per_class: usize,
    /// Other numbers of hits, by class.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, usize>,
    /// The least cosine of a hit that is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_similarity: Option<f32>,
    /// Which rows are left out as unsafe for work.
    pub nsfw: Nsfw,
    /// The most of a column `punsafe`, a probability.
    pub max_punsafe: f32,
    /// Which edition of LAION-5B the metadata are of, where they have its columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub laion_5b: Option<Laion5b>,
    /// Which array of an `.npz`, such as `b32_img`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub array: Option<String>,
    /// Accept embeddings of two CLIPs, which is refused otherwise: cosines between them mean nothing, unless both share one space.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mixed_clips: bool,
}

/// A part of the classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// For prompts (`prompts/rpl`).
    Base,
    /// For a detector that trains itself.
    #[default]
    Novel,
    /// Both.
    All,
}

impl Default for Retrieve {
    fn default() -> Self {
        Self {
            split: Split::default(),
            per_class: 500,
            limits: BTreeMap::new(),
            min_similarity: None,
            nsfw: Nsfw::default(),
            max_punsafe: 0.5,
            laion_5b: None,
            array: None,
            mixed_clips: false,
        }
    }
}

const POOL: In<Pool> = In::optional("pool", "Embeddings of CLIP, with their metadata unless these are given as `metadata`.");
const METADATA: In<PoolMetadata> =
    In::optional("metadata", "Tables of metadata, whose rows are those of the pool's embeddings one after the other (`pool/import`).");
const FEATURES: In<ImageFeatures> = In::optional("features", "Instead of a pool: embeddings of images of one's own (`clip/globals`).");
const ANNOTATIONS: In<AnnotationFile> = In::optional("annotations", "With `features`: the json that names these images.");
const PROMPTS: In<Prompts> = In::required("prompts", "Class embeddings of the same CLIP; their lengths do not matter.");
const CLASSES: In<Classes> = In::required("classes", "Base and novel class names.");
const LINKS: Out<Links> = Out::new(
    "links",
    "For each class its hits, best first: URL, cosine, MD5, text, row of the pool, and why a hit is not used. Of `features` the URL is the file's name.",
);

impl Stage for Retrieve {
    const KIND: &'static str = "pool/retrieve";
    const VERSION: u32 = 2;
    const INPUTS: &'static [PortInfo] =
        &[POOL.info(), METADATA.info(), FEATURES.info(), ANNOTATIONS.info(), PROMPTS.info(), CLASSES.info()];
    const OUTPUTS: &'static [PortInfo] = &[LINKS.info()];
    const USES_DEVICE: bool = true;

    fn check(&self) -> Vec<Problem> {
        Problem::unless(&[
            ("per_class", (1..=100_000).contains(&self.per_class), "from 1 to 100000"),
            ("limits", self.limits.values().all(|limit| (1..=100_000).contains(limit)), "numbers from 1 to 100000"),
            ("min_similarity", self.min_similarity.is_none_or(|least| (-1.0..=1.0).contains(&least)), "a number from -1 to 1"),
            ("max_punsafe", (0.0..=1.0).contains(&self.max_punsafe), "a number from 0 to 1"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let (pool, has_metadata) = (given(inputs)?, inputs.read_if_given(METADATA)?.is_none());
        let Some(pool) = pool else {
            return Ok(Units::Chain { checkpoints: 1, steps: 1, images_per_step: 1 << 20, stay: Vec::new() });
        };
        let shards = pool.shards(has_metadata)?;
        let bytes: u64 = shards.iter().map(|shard| shard.embeddings.bytes).sum();
        Ok(Units::Chain {
            checkpoints: groups(&shards).len() as u32,
            steps: u32::try_from(shards.len()).unwrap_or(u32::MAX),
            // Of 512 numbers of f16.
            images_per_step: u32::try_from(bytes / 1024 / shards.len() as u64).unwrap_or(u32::MAX).max(1),
            stay: Vec::new(),
        })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let Some(first) = units.first() else { return Ok(()) };
        let before = first.index.checked_sub(1).map(|before| cx.published(before, LINKS)).transpose()?;
        let mut retrieval = Retrieval::new(self, before, cx)?;
        let Some(pool) = given(cx.inputs)? else { return retrieval.of_features(units, cx) };
        let metadata = cx.inputs.read_if_given(METADATA)?;
        let tables = metadata.as_ref().map(|metadata| PoolRows::open(metadata.tables()?)).transpose()?;
        let shards = pool.shards(tables.is_none())?;
        if let Some(tables) = &tables {
            self.look_at(tables, cx, first.index == 0)?;
        }
        cx.note("a pool does not say which CLIP made it: make sure that it is that of the prompts");
        let groups = groups(&shards);
        let of_units = || units.iter().map(|unit| &shards[groups[unit.index].clone()]);
        cx.total(of_units().map(<[_]>::len).sum::<usize>() as u64);
        for (unit, shards) in units.iter().zip(of_units()) {
            let draft = cx.begin(unit)?;
            match &tables {
                Some(tables) => retrieval.of_shards(shards, tables, 0, cx)?,
                None => {
                    let tables = PoolRows::open(shards.iter().filter_map(|shard| shard.metadata))?;
                    self.look_at(&tables, cx, unit.index == 0)?;
                    let first_row = retrieval.searched.rows;
                    retrieval.of_shards(shards, &tables, first_row, cx)?;
                }
            }
            let links = retrieval.links();
            links.write(draft.create(LINKS, "links.parquet")?)?;
            if unit.index + 1 == cx.units.len() {
                if let Some(tables) = &tables {
                    retrieval.expect_end(tables.n_rows(), cx)?;
                }
                self.remarks(&links, cx);
            }
            cx.commit(draft, metrics(&links))?;
        }
        Ok(())
    }
}

/// The pool, where it is one and not features; fails unless exactly one of them is given, with what belongs to it.
fn given(inputs: &Inputs) -> Result<Option<Pool>> {
    let refused =
        |port: PortInfo, problem: &str, hint: &str| Err(Error::Input { port: port.name, problem: problem.into(), hint: hint.into() });
    let [features, annotations, metadata] =
        [FEATURES.info(), ANNOTATIONS.info(), METADATA.info()].map(|port| inputs.ports.contains_key(port.name));
    match inputs.read_if_given(POOL)? {
        Some(_) if features => refused(POOL.info(), "given beside `features`", "give one of them"),
        Some(_) if annotations => refused(ANNOTATIONS.info(), "given without `features`", "take it away: a pool has URLs"),
        Some(pool) => Ok(Some(pool)),
        None if !features => refused(POOL.info(), "missing", "give a `pool`, or `features` with their `annotations`"),
        None if metadata => refused(METADATA.info(), "given without `pool`", "take it away: `annotations` name the images of `features`"),
        None if !annotations => refused(ANNOTATIONS.info(), "missing, but `features` are given", "give the json that names their images"),
        None => Ok(None),
    }
}

/// The shards of each checkpoint.
fn groups(shards: &[PoolShard<'_>]) -> Vec<Range<usize>> {
    let (mut groups, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (place, shard) in shards.iter().enumerate() {
        bytes += shard.embeddings.bytes;
        if bytes >= UNIT_BYTES || place + 1 == shards.len() {
            groups.push(start..place + 1);
            (start, bytes) = (place + 1, 0);
        }
    }
    groups
}

impl Retrieve {
    /// Refuses metadata that were withdrawn, and notes what they do not say.
    fn look_at(&self, tables: &PoolRows<'_>, cx: &Context<'_>, is_first: bool) -> Result<()> {
        if self.laion_5b.is_none() {
            tables.refuse_withdrawn()?;
        }
        if is_first {
            self.nsfw.note_unknown(tables, cx);
        }
        Ok(())
    }

    /// What an operator should know of the hits.
    fn remarks(&self, links: &Links, cx: &Context<'_>) {
        let PoolSearched { rows, candidates, unsafe_rows, without_url, bad_rows } = &links.searched;
        cx.note(format!("searched {candidates} of {rows} images; {unsafe_rows} are unsafe for work, {without_url} have no URL"));
        if bad_rows.zero + bad_rows.nan + bad_rows.infinite > 0 {
            let (zero, nan, infinite) = (bad_rows.zero, bad_rows.nan, bad_rows.infinite);
            cx.note(format!("{zero} embeddings are zero, {nan} NaN and {infinite} infinite: they are never retrieved"));
        }
        let n_used = |links: &[Link]| Links::used(links).count();
        let few: Vec<String> = links
            .by_class
            .iter()
            .filter(|(class, links)| n_used(links) < self.limit(class))
            .map(|(class, links)| format!("{class} ({})", n_used(links)))
            .collect();
        if !few.is_empty() {
            let words = named(&few, MAX_NAMED);
            cx.note(format!("fewer links than hits, without duplicates and dissimilar ones, of {} classes: {words}", few.len()));
        }
    }

    fn limit(&self, class: &str) -> usize {
        self.limits.get(class).copied().unwrap_or(self.per_class)
    }

    /// Why a hit is not used, by the better ones of its class.
    fn dropped<'a>(
        &self,
        similarity: f32,
        text: &'a LinkText,
        urls: &mut HashSet<&'a str>,
        contents: &mut HashSet<&'a str>,
    ) -> Option<Dropped> {
        let has_new_url = urls.insert(&text.url);
        let has_new_content = text.md5.as_ref().is_none_or(|md5| contents.insert(md5));
        match () {
            () if !has_new_url => Some(Dropped::DuplicateUrl),
            () if !has_new_content => Some(Dropped::DuplicateContent),
            () if self.min_similarity.is_some_and(|least| similarity < least) => Some(Dropped::Dissimilar),
            () => None,
        }
    }
}

fn metrics(links: &Links) -> BTreeMap<String, serde_json::Value> {
    let PoolSearched { rows, candidates, unsafe_rows, without_url, bad_rows } = &links.searched;
    let n_links: usize = links.by_class.iter().map(|(_, links)| Links::used(links).count()).sum();
    let n_without = links.by_class.iter().filter(|(_, links)| Links::used(links).next().is_none()).count();
    let counts = [
        ("links", n_links as u64),
        ("classes_without_links", n_without as u64),
        ("searched", *rows),
        ("candidates", *candidates),
        ("unsafe", *unsafe_rows),
        ("without_url", *without_url),
        ("bad_rows", bad_rows.zero + bad_rows.nan + bad_rows.infinite),
    ];
    counts.map(|(name, n)| (name.to_owned(), n.into())).into()
}

/// A search, with what is known of its hits.
struct Retrieval<'a> {
    stage: &'a Retrieve,
    search: Search,
    classes: Vec<String>,
    dim: usize,
    /// By row, of all hits after the last checkpoint.
    texts: BTreeMap<u64, LinkText>,
    searched: PoolSearched,
}

impl<'a> Retrieval<'a> {
    /// A search that goes on after what was found before.
    fn new(stage: &'a Retrieve, before: Option<Links>, cx: &Context<'_>) -> Result<Self> {
        let Classes(classes) = cx.inputs.read(CLASSES)?;
        let prompts = cx.inputs.read(PROMPTS)?;
        if let Some(features) = cx.inputs.read_if_given(FEATURES)? {
            space::common_unless(stage.mixed_clips, &[(FEATURES.info().name, features.clip()?), (PROMPTS.info().name, prompts.clip)])?;
        }
        if let Some(unknown) = stage.limits.keys().find(|class| !classes.all().any(|known| known == *class)) {
            let problem = format!("`limits` names `{unknown}`, which is no class");
            return Err(Error::Input { port: CLASSES.info().name, problem, hint: "write it as the class list does".into() });
        }
        let names = match stage.split {
            Split::Base => classes.base,
            Split::Novel => classes.novel,
            Split::All => classes.all().cloned().collect(),
        };
        if names.is_empty() {
            let problem = "expected at least one class to retrieve images of, found none".into();
            return Err(Error::Input { port: CLASSES.info().name, problem, hint: "set `split` to the classes that there are".into() });
        }
        let queries = to_unit_length(&prompts.select(&names)?.to_kind(Kind::Float));
        let limits: Vec<usize> = names.iter().map(|class| stage.limit(class)).collect();
        let search = Search::new(&queries, &limits, Measure::Cosine, Product::fastest(cx.has_bf16), cx.device)?;
        let (mut texts, mut found, mut searched) = (BTreeMap::new(), Found::default(), PoolSearched::default());
        found.hits = vec![Vec::new(); names.len()];
        if let Some(Links { by_class, searched: before }) = before {
            let hit = |link: &Link| Hit { place: link.place, score: link.similarity.unwrap_or(f32::MIN) };
            found.hits = by_class.iter().map(|(_, links)| links.iter().map(hit).collect()).collect();
            found.bad_rows = before.bad_rows;
            let links = by_class.into_iter().flat_map(|(_, links)| links);
            texts.extend(links.map(|Link { place, url, md5, caption, .. }| (place, LinkText { url, md5, caption })));
            searched = before;
        }
        let dim = queries.size()[1] as usize;
        Ok(Self { stage, search: search.resume(found)?, classes: names, dim, texts, searched })
    }

    /// Searches the shards of a checkpoint. Row `first_row` of the pool is the first of `tables`.
    fn of_shards(&mut self, shards: &[PoolShard<'_>], tables: &PoolRows<'_>, first_row: u64, cx: &Context<'_>) -> Result<()> {
        let mut kinds = Kinds {
            batches: Box::new(tables.kinds(self.searched.rows - first_row, self.stage.nsfw.rule(self.stage.max_punsafe))),
            read: Vec::new(),
        };
        let is_dry = cx.most_items.is_some();
        let mut left = shards[..if is_dry { 1 } else { shards.len() }].iter();
        let array = self.stage.array.as_deref();
        // The digest of the next shard is checked while one is searched.
        stream(
            1,
            1,
            || Ok(left.next().map(|shard| (shard, 1))),
            |shard| (shard, Embedded::open(shard.embeddings, array)),
            |(shard, embedded), _| self.of_shard(shard, &embedded?, &mut kinds, tables, cx),
        )?;
        self.read_texts(|new| {
            let of_tables = new.iter().map(|row| row - first_row).collect();
            Ok(tables.links(&of_tables)?.into_iter().map(|(row, text)| (row + first_row, text)).collect())
        })?;
        tables.still()
    }

    /// Searches one of these shards.
    fn of_shard(
        &mut self,
        PoolShard { embeddings: file, metadata }: &PoolShard<'_>,
        embedded: &Embedded<'_>,
        kinds: &mut Kinds<'_>,
        tables: &PoolRows<'_>,
        cx: &Context<'_>,
    ) -> Result<()> {
        let is_dry = cx.most_items.is_some();
        self.check_dim(POOL.info(), embedded.dim())?;
        let n_rows = if is_dry { embedded.n_rows().min(BLOCK_ROWS) } else { embedded.n_rows() };
        let (first_of_shard, row_bytes) = (self.searched.rows, 4 * self.dim);
        let mut blocks = (0..n_rows).step_by(BLOCK_ROWS as usize).map(|row| row..n_rows.min(row + BLOCK_ROWS));
        stream(
            1,
            ROOM,
            || {
                Ok(blocks.next().map(|rows| {
                    let bytes = (rows.end - rows.start) as usize * row_bytes;
                    (rows, bytes)
                }))
            },
            |rows| Ok((embedded.rows(rows.clone())?, rows)),
            |read: Result<(Vectors, Range<u64>)>, _| {
                let (vectors, rows) = read?;
                let Some(kinds) = kinds.take((rows.end - rows.start) as usize)? else {
                    let n_left = n_rows - rows.start;
                    let problem = format!("row {} of `{}` and those after it, {n_left} in all, have no metadata", rows.start, file.name);
                    return Err(misfit(problem, metadata.is_some()));
                };
                self.add(&vectors, &kinds)?;
                cx.proceed()
            },
        )?;
        embedded.still()?;
        if let Some(table) = metadata.filter(|_| !is_dry) {
            let (n_rows, n_described) = (self.searched.rows - first_of_shard, tables.n_rows_of(table));
            if n_rows != n_described {
                let problem = format!("`{}` has {n_rows} rows, `{}` has {n_described}", file.name, table.name);
                return Err(misfit(problem, true));
            }
        }
        cx.tick(1);
        Ok(())
    }

    /// Searches images of one's own, in one checkpoint.
    fn of_features(mut self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let features = cx.inputs.read(FEATURES)?;
        let Some(annotations) = cx.inputs.read_if_given(ANNOTATIONS)? else { return Ok(()) };
        let annotations: Annotations = annotations.load_images()?;
        let draft = cx.begin(unit)?;
        let places = features.places()?;
        let mut ids: Vec<ImageId> = Vec::new();
        for piece in places.pieces(&(0..places.items().len())) {
            let rows = places.images(&piece)?;
            if let Some((_, embedding)) = rows.first() {
                self.check_dim(FEATURES.info(), embedding.len())?;
            }
            let numbers: Vec<f32> = rows.iter().flat_map(|(_, embedding)| embedding).copied().collect();
            ids.extend(rows.iter().map(|(image, _)| *image));
            self.add(&Vectors::F32(numbers), &vec![PoolRow::Candidate; rows.len()])?;
            cx.proceed()?;
        }
        self.read_texts(|new| {
            let text = |row: &u64| {
                let image = ids[*row as usize];
                let info = annotations.image(image).ok_or_else(|| Error::Input {
                    port: ANNOTATIONS.info().name,
                    problem: format!("no image {image}, of which the features have an embedding"),
                    hint: "give the annotations that the features were made for".into(),
                })?;
                Ok((*row, LinkText { url: info.file_name.clone(), md5: None, caption: None }))
            };
            new.iter().map(text).collect()
        })?;
        let links = self.links();
        links.write(draft.create(LINKS, "links.parquet")?)?;
        self.stage.remarks(&links, cx);
        cx.tick(1);
        cx.commit(draft, metrics(&links))
    }

    fn check_dim(&self, port: PortInfo, found: usize) -> Result<()> {
        if found == self.dim {
            return Ok(());
        }
        let problem = format!("embeddings have {found} numbers, class embeddings {}", self.dim);
        Err(Error::Input { port: port.name, problem, hint: "make the prompts with the CLIP that made the embeddings".into() })
    }

    /// Searches the next rows.
    fn add(&mut self, vectors: &Vectors, kinds: &[PoolRow]) -> Result<()> {
        let rows = match vectors {
            Vectors::F16(halves) => Rows::F16(halves),
            Vectors::F32(singles) => Rows::F32(singles),
        };
        let candidates: Vec<bool> = kinds.iter().map(|kind| *kind == PoolRow::Candidate).collect();
        self.search.add(rows, self.searched.rows, Some(&candidates))?;
        let count = |which: PoolRow| kinds.iter().filter(|kind| **kind == which).count() as u64;
        self.searched.rows += kinds.len() as u64;
        self.searched.candidates += count(PoolRow::Candidate);
        self.searched.unsafe_rows += count(PoolRow::Unsafe);
        self.searched.without_url += count(PoolRow::WithoutUrl);
        self.searched.bad_rows = self.search.bad_rows();
        Ok(())
    }

    /// Forgets rows that are no longer hits, and reads the texts of new ones.
    fn read_texts(&mut self, read: impl FnOnce(&BTreeSet<u64>) -> Result<BTreeMap<u64, LinkText>>) -> Result<()> {
        let places: BTreeSet<u64> = self.search.hits().iter().flatten().map(|hit| hit.place).collect();
        self.texts.retain(|place, _| places.contains(place));
        let new = places.into_iter().filter(|place| !self.texts.contains_key(place)).collect();
        self.texts.extend(read(&new)?);
        Ok(())
    }

    /// Fails where there are more rows of metadata than embeddings.
    fn expect_end(&self, n_described: u64, cx: &Context<'_>) -> Result<()> {
        if cx.most_items.is_some() || self.searched.rows == n_described {
            return Ok(());
        }
        let problem = format!("{} embeddings, but {n_described} rows of metadata", self.searched.rows);
        Err(misfit(problem, false))
    }

    /// All that was found so far.
    fn links(&self) -> Links {
        let of_class = |hits: Vec<Hit>| {
            let (mut urls, mut contents) = (HashSet::new(), HashSet::new());
            let link = |hit: Hit| {
                let text = &self.texts[&hit.place];
                let dropped = self.stage.dropped(hit.score, text, &mut urls, &mut contents);
                let LinkText { url, md5, caption } = text.clone();
                Link { place: hit.place, url, similarity: Some(hit.score), md5, caption, dropped }
            };
            hits.into_iter().map(link).collect()
        };
        let by_class = self.classes.iter().cloned().zip(self.search.hits().into_iter().map(of_class)).collect();
        Links { by_class, searched: self.searched.clone() }
    }
}

/// Embeddings and metadata that are not of the same images.
fn misfit(problem: String, are_pairs: bool) -> Error {
    let hint = match are_pairs {
        true => "fetch both files of this shard again: one of them is of another shard, or cut short",
        false => "give the tables that belong to this folder of embeddings, all of them",
    };
    Error::Input { port: if are_pairs { POOL.info().name } else { METADATA.info().name }, problem, hint: hint.into() }
}

/// What rows may be, in pieces of any length.
struct Kinds<'a> {
    batches: Box<dyn Iterator<Item = Result<Vec<PoolRow>>> + 'a>,
    /// Read and not taken yet.
    read: Vec<PoolRow>,
}

impl Kinds<'_> {
    /// The next so many, if there are so many.
    fn take(&mut self, n: usize) -> Result<Option<Vec<PoolRow>>> {
        while self.read.len() < n {
            match self.batches.next() {
                Some(batch) => self.read.extend(batch?),
                None => return Ok(None),
            }
        }
        let left = self.read.split_off(n);
        Ok(Some(std::mem::replace(&mut self.read, left)))
    }
}
