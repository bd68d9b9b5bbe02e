//! Links to images of the web: what a search of a pool found for each class, in a Parquet table with zstd.
//!
//! One row per hit, class by class, best first: `class` utf8, `rank` u32 (from 0, within the class), `url` utf8, `similarity` f32 (cosine; null where
//! nothing was compared), `md5` utf8 and `caption` utf8 (null where the pool has none), `place` u64 (the row of the pool), `dropped` utf8 (why a
//! hit is not used, or null). The metadata describes the search (`ovenbird.search`): the classes, those without a hit among them, and how much
//! was searched.

use std::sync::Arc;

use arrow::{
    array::{Array, ArrayRef, AsArray, Float32Array, RecordBatch, StringArray, UInt32Array, UInt64Array},
    datatypes::Float32Type,
};
use ovenbird_cache::{DraftFile, inputs::InputFile};
use ovenbird_models::search::BadRows;
use serde::{Deserialize, Serialize};

use super::tables::{Table, described, ids, write_table};
use crate::{Artifact, Result, error::malformed, ports::last_file};

const FORMAT: u32 = 1;

/// A link to an image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Link {
    /// The row of the pool.
    pub place: u64,
    /// Where the image is; of images that are here already, the file's name in their folder.
    pub url: String,
    /// Cosine of the image's embedding to the class's.
    pub similarity: Option<f32>,
    /// MD5 of the file when the pool was made, in hexadecimal digits.
    pub md5: Option<String>,
    /// The text that stood beside the image.
    pub caption: Option<String>,
    /// Why the link is not used.
    pub dropped: Option<Dropped>,
}

/// Why a link is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// A better hit of the class has the same URL.
    DuplicateUrl,
    /// A better hit of the class has the same content, by its digest.
    DuplicateContent,
    /// The cosine is below the least that is accepted.
    Dissimilar,
}

impl Dropped {
    const ALL: [Self; 3] = [Self::DuplicateUrl, Self::DuplicateContent, Self::Dissimilar];

    /// As tables say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::DuplicateUrl => "duplicate-url",
            Self::DuplicateContent => "duplicate-content",
            Self::Dissimilar => "dissimilar",
        }
    }
}

/// How much of a pool was searched.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolSearched {
    /// All rows.
    pub rows: u64,
    /// Those that were compared.
    pub candidates: u64,
    /// Rows that are left out as unsafe for work.
    pub unsafe_rows: u64,
    /// Rows without a URL.
    pub without_url: u64,
    /// Candidates without a direction.
    pub bad_rows: BadRows,
}

/// Links by class.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Links {
    /// By class, best first; their ranks are their places.
    pub by_class: Vec<(String, Vec<Link>)>,
    /// How much was searched.
    pub searched: PoolSearched,
}

/// The metadata of the table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    classes: Vec<String>,
    searched: PoolSearched,
}

impl Artifact for Links {
    const KIND: &'static str = "links";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str = "a table of links that `pool/retrieve` or `pool/links` made (Parquet)";

    fn open(files: &[InputFile]) -> Result<Self> {
        let file = last_file(Self::KIND, files)?;
        let (path, table) = (&file.path, Table::open(file, FORMAT, None)?);
        let Description { classes, searched } = table.description()?;
        let mut by_class: Vec<(String, Vec<Link>)> = classes.into_iter().map(|class| (class, Vec::new())).collect();
        let mut at = 0;
        for batch in table {
            let batch = batch?;
            let places = ids(path, &batch, "place")?;
            let [classes, urls, md5s, captions, dropped] = ["class", "url", "md5", "caption", "dropped"].map(|name| texts(&batch, name));
            let similarities = batch.column_by_name("similarity").and_then(|column| column.as_primitive_opt::<Float32Type>());
            let (Some(classes), Some(urls), Some(md5s), Some(captions), Some(dropped), Some(similarities)) =
                (classes, urls, md5s, captions, dropped, similarities)
            else {
                return Err(malformed(
                    path,
                    "expected columns `class`, `url`, `md5`, `caption`, `dropped` of utf8 and `similarity` of f32",
                ));
            };
            let text = |column: &StringArray, row: usize| column.is_valid(row).then(|| column.value(row).to_owned());
            for (row, place) in places.into_iter().enumerate() {
                let dropped =
                    match text(dropped, row) {
                        None => None,
                        Some(word) => Some(Dropped::ALL.into_iter().find(|dropped| dropped.word() == word).ok_or_else(|| {
                            malformed(path, format!("row {row}: `dropped` is `{word}`, which this version does not know"))
                        })?),
                    };
                // Rows come class by class.
                while by_class.get(at).is_some_and(|(class, _)| class != classes.value(row)) {
                    at += 1;
                }
                let (Some((_, links)), true) = (by_class.get_mut(at), urls.is_valid(row)) else {
                    return Err(malformed(path, format!("row {row}: expected a URL, and classes in the order of the metadata")));
                };
                links.push(Link {
                    place,
                    url: urls.value(row).to_owned(),
                    similarity: similarities.is_valid(row).then(|| similarities.value(row)),
                    md5: text(md5s, row),
                    caption: text(captions, row),
                    dropped,
                });
            }
        }
        Ok(Self { by_class, searched })
    }
}

fn texts<'a>(batch: &'a RecordBatch, name: &str) -> Option<&'a StringArray> {
    batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>())
}

impl Links {
    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let rows = || self.by_class.iter().flat_map(|(class, links)| links.iter().enumerate().map(move |(rank, link)| (class, rank, link)));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("class", Arc::new(rows().map(|(class, _, _)| Some(class)).collect::<StringArray>())),
            ("rank", Arc::new(rows().map(|(_, rank, _)| rank as u32).collect::<UInt32Array>())),
            ("url", Arc::new(rows().map(|(_, _, link)| Some(&link.url)).collect::<StringArray>())),
            ("similarity", Arc::new(rows().map(|(_, _, link)| link.similarity).collect::<Float32Array>())),
            ("md5", Arc::new(rows().map(|(_, _, link)| link.md5.as_ref()).collect::<StringArray>())),
            ("caption", Arc::new(rows().map(|(_, _, link)| link.caption.as_ref()).collect::<StringArray>())),
            ("place", Arc::new(rows().map(|(_, _, link)| link.place).collect::<UInt64Array>())),
            ("dropped", Arc::new(rows().map(|(_, _, link)| link.dropped.map(Dropped::word)).collect::<StringArray>())),
        ];
        let classes = self.by_class.iter().map(|(class, _)| class.clone()).collect();
        let description = Description { classes, searched: self.searched.clone() };
        write_table(file, columns, FORMAT, vec![described(&description)])
    }

    /// The links of a class that are used, best first, with their ranks.
    pub fn used(links: &[Link]) -> impl Iterator<Item = (usize, &Link)> {
        links.iter().enumerate().filter(|(_, link)| link.dropped.is_none())
    }
}
