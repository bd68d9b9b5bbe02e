//! A pool: embeddings of very many images of the web, with a table of where the images are. It is read in place, block by block.
//!
//! Embeddings are `[N, D]` of f16 or f32: numpy's `img_emb_*.npy` with `metadata_*.parquet`, as LAION publishes them, or pairs of one stem, `.npy` or `.npz`
//! with `.parquet`, as DataComp and CommonPool are published. Shards are in the order of their numbers, or else of their names. Row k of the metadata is of
//! row k of the embeddings. Columns are known under several names ([`COLUMNS`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read as _},
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{Array as _, ArrayRef, AsArray as _, Float32Array, RecordBatch, StringArray},
    compute::{CastOptions, cast_with_options},
    datatypes::{DataType, Field, Float32Type, Schema},
};
use half::f16;
use ovenbird_cache::{
    DraftFile,
    inputs::{Checked, InputFile},
};
use parquet::{
    arrow::{
        ArrowWriter, ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection, RowSelector},
    },
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::properties::WriterProperties,
};
use zip::{CompressionMethod, ZipArchive};

use super::{MAX_NPY_HEADER, MatrixDtype, MatrixShape, NpyHeader};
use crate::{
    Artifact, Error, Result,
    error::{malformed, write_error},
    ports::only_file,
};

/// Rows of metadata that are read at once.
const BATCH_ROWS: usize = 1 << 16;
/// Bytes of an array that are read at once: they fit into a processor's cache.
const PIECE: usize = 1 << 20;

/// The names of each column, of which the first that is there is read.
pub(crate) const COLUMNS: [(&str, &[&str]); 5] = [
    ("url", &["url", "URL"]),
    ("caption", &["caption", "TEXT", "text", "CAPTION"]),
    ("md5", &["md5", "MD5", "hash"]),
    ("NSFW", &["NSFW", "nsfw"]),
    ("punsafe", &["punsafe", "nsfw_score_opennsfw2"]),
];

/// Columns that LAION-5B has, and no other pool.
pub(crate) const LAION_5B: [&str; 2] = ["punsafe", "pwatermark"];

/// Metadata that may be of the first edition of LAION-5B.
pub(crate) fn withdrawn(path: &Path) -> Error {
    ovenbird_data::Error::Malformed {
        path: path.to_owned(),
        problem: "has the columns of LAION-5B (`punsafe`, `pwatermark`), whose first edition was withdrawn for links to illegal images"
            .into(),
        hint: Some("use Re-LAION-5B and say `laion_5b: re-laion`; `laion_5b: accept-original` accepts the first edition".into()),
    }
    .into()
}

/// A folder of embeddings and metadata.
#[derive(Debug, Clone)]
pub struct Pool {
    files: Vec<InputFile>,
}

impl Artifact for Pool {
    const KIND: &'static str = "pool";
    const EXTENSIONS: &'static [&'static str] = &["/"];
    const SHAPE: &'static str = "a folder of `img_emb_*.npy` with `metadata_*.parquet`, or of pairs `NAME.npz` and `NAME.parquet`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { files: files.to_vec() })
    }
}

/// Tables of metadata, whose rows are those of a pool one after the other.
#[derive(Debug, Clone)]
pub struct PoolMetadata {
    files: Vec<InputFile>,
}

impl Artifact for PoolMetadata {
    const KIND: &'static str = "pool-metadata";
    const EXTENSIONS: &'static [&'static str] = &["parquet", "/"];
    const SHAPE: &'static str = "tables with a column `url` (Parquet), such as `pool/import` makes";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { files: files.to_vec() })
    }
}

/// A table in a format of another program.
#[derive(Debug, Clone)]
pub struct PublishedLinks {
    /// The file.
    pub file: InputFile,
}

impl Artifact for PublishedLinks {
    const KIND: &'static str = "published-links";
    const EXTENSIONS: &'static [&'static str] = &["h5", "hdf5", "tsv"];
    const SHAPE: &'static str = "an HDF5 file with the group `dataset`, or lines of URL and text with a tab between them (`.tsv`)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { file: only_file(Self::KIND, files)?.clone() })
    }
}

impl PoolMetadata {
    /// The tables in the order of their numbers, or else of their names.
    pub(crate) fn tables(&self) -> Result<Vec<&InputFile>> {
        let is_table = |file: &&InputFile| extension(file) == "parquet";
        let mut tables: Vec<&InputFile> = self.files.iter().filter(is_table).collect();
        if tables.is_empty() {
            let problem = format!("expected tables `.parquet`, found none among {} files", self.files.len());
            return Err(Error::Input { port: Self::KIND, problem, hint: "give a table, or a folder of tables".into() });
        }
        tables.sort_by_cached_key(|file| ShardName::of(&file.name));
        Ok(tables)
    }
}

/// What a shard is called: a number, where the name ends in one, or else the name without its extension.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum ShardName {
    Number(u64),
    Stem(String),
}

impl ShardName {
    fn of(file: &str) -> Self {
        let name = file.rsplit('/').next().unwrap_or(file);
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        let of_laion = ["img_emb_", "metadata_"].iter().find_map(|prefix| stem.strip_prefix(prefix)?.parse().ok());
        of_laion.map_or_else(|| Self::Stem(stem.to_owned()), Self::Number)
    }
}

/// One file of embeddings, with its metadata unless these come otherwise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolShard<'a> {
    pub(crate) embeddings: &'a InputFile,
    pub(crate) metadata: Option<&'a InputFile>,
}

impl Pool {
    /// The shards in order. `has_metadata`: whether the metadata come with the embeddings. Fails where a half of a pair is missing.
    pub(crate) fn shards(&self, has_metadata: bool) -> Result<Vec<PoolShard<'_>>> {
        let refused = |problem: String, hint: &str| Err(Error::Input { port: Self::KIND, problem, hint: hint.into() });
        let (mut embeddings, mut tables) = (BTreeMap::new(), BTreeMap::new());
        for file in &self.files {
            let stem = file.name.rsplit('/').next().unwrap_or(&file.name);
            let by_name = match extension(file).as_str() {
                // LAION's embeddings of texts lie beside those of images.
                "npy" | "npz" if !stem.starts_with("text_emb") => &mut embeddings,
                "parquet" => &mut tables,
                _ => continue,
            };
            if let Some(before) = by_name.insert(ShardName::of(&file.name), file) {
                let problem = format!("`{}` and `{}` are one shard by their names", before.name, file.name);
                return refused(problem, "keep one of them in the folder");
            }
        }
        if embeddings.is_empty() {
            let problem = format!("expected embeddings `.npy` or `.npz` in the folder, found none among {} files", self.files.len());
            return refused(problem, "give a folder with `img_emb_*.npy`; a table of links alone comes in by `pool/links`");
        }
        if !has_metadata {
            return Ok(embeddings.into_values().map(|embeddings| PoolShard { embeddings, metadata: None }).collect());
        }
        if let Some((_, table)) = tables.iter().find(|(name, _)| !embeddings.contains_key(name)) {
            let problem = format!("`{}` has no embeddings beside it", table.name);
            return refused(problem, "fetch the `.npy` or `.npz` of the same number, or move the table out of the folder");
        }
        let mut shards = Vec::new();
        for (name, embeddings) in embeddings {
            let Some(table) = tables.get(&name) else {
                let problem = format!("`{}` has no metadata beside it", embeddings.name);
                return refused(problem, "fetch the `.parquet` of the same number, or give all tables as `metadata`");
            };
            shards.push(PoolShard { embeddings, metadata: Some(table) });
        }
        Ok(shards)
    }
}

fn extension(file: &InputFile) -> String {
    file.path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// Rows of embeddings, one after the other.
pub(crate) enum Vectors {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

/// The numbers of a shard.
enum Numbers {
    /// In the file, from this byte on.
    There(File, u64),
    /// Decompressed.
    Here(Vec<u8>),
}

/// The embeddings of a shard, read in place.
pub(crate) struct Embedded<'a> {
    file: &'a InputFile,
    checked: Checked<'a>,
    numbers: Numbers,
    shape: MatrixShape,
}

impl<'a> Embedded<'a> {
    /// Hashes the file and reads its header; `array`: which array of an `.npz`.
    pub(crate) fn open(file: &'a InputFile, array: Option<&str>) -> Result<Self> {
        let checked = file.check()?;
        let opened = File::open(&file.path).map_err(|source| read_error(file, source))?;
        let (numbers, header) = match extension(file).as_str() {
            "npz" => member(file, opened, array)?,
            _ => {
                let header = NpyHeader::of(&file.begin(MAX_NPY_HEADER)?).map_err(|problem| malformed(&file.path, problem))?;
                let found = file.bytes.saturating_sub(header.bytes);
                if let Some(expected) = header.shape().map(MatrixShape::bytes).filter(|expected| *expected != found) {
                    let problem = format!("expected {expected} bytes after the header ({}), found {found}", header.text);
                    return Err(malformed(&file.path, problem));
                }
                (Numbers::There(opened, header.bytes), header)
            }
        };
        match header.shape().filter(|shape| shape.dim > 0) {
            Some(shape) => Ok(Self { file, checked, numbers, shape }),
            None => Err(malformed(&file.path, format!("expected a matrix [N, D] of f16 or f32, row after row, found {}", header.text))),
        }
    }

    pub(crate) fn n_rows(&self) -> u64 {
        self.shape.n_rows
    }

    pub(crate) fn dim(&self) -> usize {
        self.shape.dim
    }

    /// Some rows.
    pub(crate) fn rows(&self, rows: Range<u64>) -> Result<Vectors> {
        let (dtype, dim) = (self.shape.dtype, self.shape.dim as u64);
        let bytes = [rows.start, rows.end].map(|row| row * dim * dtype.bytes());
        let n_numbers = ((rows.end - rows.start) * dim) as usize;
        Ok(match dtype {
            MatrixDtype::F16 => {
                let mut halves = Vec::with_capacity(n_numbers);
                self.read(bytes, |bytes| halves.extend(bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes))))?;
                Vectors::F16(halves)
            }
            MatrixDtype::F32 => {
                let mut singles = Vec::with_capacity(n_numbers);
                self.read(bytes, |bytes| singles.extend(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))))?;
                Vectors::F32(singles)
            }
        })
    }

    /// Hands over some bytes of the array, piece by piece, of whole numbers.
    fn read(&self, [mut from, to]: [u64; 2], mut take: impl FnMut(&[u8])) -> Result<()> {
        match &self.numbers {
            Numbers::Here(bytes) => take(&bytes[from as usize..to as usize]),
            Numbers::There(file, start) => {
                let mut piece = vec![0; PIECE.min((to - from) as usize)];
                while from < to {
                    let piece = &mut piece[..PIECE.min((to - from) as usize)];
                    file.read_exact_at(piece, start + from).map_err(|source| read_error(self.file, source))?;
                    take(piece);
                    from += piece.len() as u64;
                }
            }
        }
        Ok(())
    }

    /// Fails if the file changed since it was opened.
    pub(crate) fn still(&self) -> Result<()> {
        Ok(self.checked.still()?)
    }
}

/// An array of an `.npz`: the only one, or the one that is named.
fn member(file: &InputFile, opened: File, array: Option<&str>) -> Result<(Numbers, NpyHeader)> {
    let damaged = |problem: String| malformed(&file.path, problem);
    let mut archive = ZipArchive::new(opened).map_err(|error| damaged(format!("expected a zip archive (.npz): {error}")))?;
    let names: Vec<String> = archive.file_names().filter_map(|name| name.strip_suffix(".npy")).map(str::to_owned).collect();
    let listed = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let name = match (array, &names[..]) {
        (None, [name]) => name.clone(),
        (Some(array), _) if names.iter().any(|name| name == array) => array.to_owned(),
        (Some(array), _) => return Err(damaged(format!("expected an array `{array}`, found {listed}"))),
        (None, []) => return Err(damaged("expected an array, found none in the archive".into())),
        (None, _) => {
            let (problem, hint) = (format!("arrays {listed}: which?"), "name it: `with: {array: b32_img}`".into());
            return Err(ovenbird_data::Error::Malformed { path: file.path.clone(), problem, hint: Some(hint) }.into());
        }
    };
    let mut member = archive.by_name(&format!("{name}.npy")).map_err(|error| damaged(error.to_string()))?;
    let mut head = Vec::new();
    (&mut member).take(MAX_NPY_HEADER).read_to_end(&mut head).map_err(|source| read_error(file, source))?;
    let header = NpyHeader::of(&head).map_err(|problem| damaged(format!("{name}: {problem}")))?;
    let (start, size) = (member.data_start(), member.size());
    let expected = header.shape().map_or(size, |shape| shape.bytes().saturating_add(header.bytes));
    if expected != size {
        return Err(damaged(format!("{name}: expected {expected} bytes ({}), found {size}", header.text)));
    }
    if member.compression() == CompressionMethod::Stored {
        drop(member);
        return Ok((Numbers::There(archive.into_inner(), start + header.bytes), header));
    }
    // What follows of the member is decompressed behind what was read, and its checksum compared.
    let rest = (&mut member).take(size - head.len() as u64 + 1).read_to_end(&mut head);
    rest.map_err(|error| damaged(format!("{name}: {error}: the file is damaged, fetch it again")))?;
    if head.len() as u64 != size {
        return Err(damaged(format!("{name}: expected {size} bytes, found more")));
    }
    head.drain(..header.bytes as usize);
    Ok((Numbers::Here(head), header))
}

fn read_error(file: &InputFile, source: io::Error) -> Error {
    ovenbird_cache::Error::Read { path: file.path.clone(), source }.into()
}

/// Which rows are left out as unsafe for work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unsafe {
    /// None are left out.
    pub(crate) keep_all: bool,
    /// Rows of which the table is not sure are left out too.
    pub(crate) drop_unsure: bool,
    /// The most of `punsafe`.
    pub(crate) max_punsafe: f32,
}

/// What a row may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    Candidate,
    Unsafe,
    WithoutUrl,
}

/// What a table says of a link.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LinkText {
    pub(crate) url: String,
    pub(crate) md5: Option<String>,
    pub(crate) caption: Option<String>,
}

/// The tables of a pool's metadata, of whose rows some are read.
pub(crate) struct PoolRows<'a> {
    tables: Vec<Table<'a>>,
}

/// One table.
struct Table<'a> {
    file: &'a InputFile,
    checked: Checked<'a>,
    n_rows: u64,
    schema: Arc<Schema>,
}

impl<'a> PoolRows<'a> {
    /// Hashes the tables and reads what columns they have. Fails where one has no URLs.
    pub(crate) fn open(files: impl IntoIterator<Item = &'a InputFile>) -> Result<Self> {
        let open = |file: &'a InputFile| {
            let checked = file.check()?;
            let builder = builder(file)?;
            let table = Table {
                file,
                checked,
                n_rows: builder.metadata().file_metadata().num_rows().max(0) as u64,
                schema: Arc::clone(builder.schema()),
            };
            if table.column("url").is_none() {
                let found = table.schema.fields().iter().map(|field| field.name().as_str()).collect::<Vec<_>>().join(", ");
                return Err(malformed(&file.path, format!("expected a column `url` or `URL`, found {found}")));
            }
            Ok(table)
        };
        Ok(Self { tables: files.into_iter().map(open).collect::<Result<_>>()? })
    }

    pub(crate) fn n_rows(&self) -> u64 {
        self.tables.iter().map(|table| table.n_rows).sum()
    }

    /// Whether every table says which images are unsafe for work.
    pub(crate) fn know_unsafe(&self) -> bool {
        self.tables.iter().all(|table| table.column("NSFW").is_some() || table.column("punsafe").is_some())
    }

    /// Fails where a table has the columns of LAION-5B and nobody said of which edition it is.
    pub(crate) fn refuse_withdrawn(&self) -> Result<()> {
        let has = |table: &Table<'_>, name: &str| table.schema.fields().iter().any(|field| field.name() == name);
        let found = self.tables.iter().find(|table| LAION_5B.iter().all(|name| has(table, name)));
        found.map_or(Ok(()), |table| Err(withdrawn(&table.file.path)))
    }

    /// What each row may be, from one on, in order, a batch at a time.
    pub(crate) fn kinds(&self, from: u64, which: Unsafe) -> impl Iterator<Item = Result<Vec<Row>>> {
        let mut first = 0;
        let begun = self.tables.iter().filter_map(move |table| {
            let before = first;
            first += table.n_rows;
            (first > from).then(|| (table, from.saturating_sub(before) as usize))
        });
        let of_table = move |(table, n_before): (&Table<'a>, usize)| {
            let selection = (n_before > 0)
                .then(|| RowSelection::from(vec![RowSelector::skip(n_before), RowSelector::select(table.n_rows as usize - n_before)]));
            table.batches(&["url", "NSFW", "punsafe"], selection, move |batch| kinds(batch, which))
        };
        begun.flat_map(of_table)
    }

    /// What the tables say of some rows, which are counted through all tables.
    pub(crate) fn links(&self, rows: &BTreeSet<u64>) -> Result<BTreeMap<u64, LinkText>> {
        let (mut links, mut first) = (BTreeMap::new(), 0);
        for table in &self.tables {
            let of_table: Vec<u64> = rows.range(first..first + table.n_rows).copied().collect();
            if !of_table.is_empty() {
                let selection = selection(of_table.iter().map(|row| (row - first) as usize));
                let mut read = of_table.into_iter();
                for found in table.batches(&["url", "caption", "md5"], Some(selection), texts) {
                    links.extend((&mut read).zip(found?));
                }
            }
            first += table.n_rows;
        }
        Ok(links)
    }

    /// All rows of the tables, in order, with what each may be, a batch at a time.
    pub(crate) fn all(&self, which: Unsafe) -> impl Iterator<Item = Result<Vec<(Row, LinkText)>>> {
        let both = move |batch: &RecordBatch| Ok(kinds(batch, which)?.into_iter().zip(texts(batch)?).collect());
        self.tables.iter().flat_map(move |table| table.batches(&COLUMNS.map(|(name, _)| name), None, both))
    }

    /// The rows of one of the tables.
    pub(crate) fn n_rows_of(&self, file: &InputFile) -> u64 {
        self.tables.iter().filter(|table| table.file.path == file.path).map(|table| table.n_rows).sum()
    }

    /// Fails if a table changed since it was opened.
    pub(crate) fn still(&self) -> Result<()> {
        self.tables.iter().try_for_each(|table| Ok(table.checked.still()?))
    }
}

impl Table<'_> {
    /// The name under which the table has a column.
    fn column(&self, column: &str) -> Option<&'static str> {
        let names = COLUMNS.iter().find(|(known, _)| *known == column).map_or(&[][..], |(_, names)| names);
        let is_there = |name: &&&str| {
            let field = self.schema.fields().iter().find(|field| field.name() == **name);
            // LAION-5B's `hash` is a number made of URL and text. A column of nulls says nothing.
            field.is_some_and(|field| (column != "md5" || !field.data_type().is_numeric()) && !field.data_type().is_null())
        };
        names.iter().find(is_there).copied()
    }

    /// What is read of each batch of some columns, those that are there, under the names of [`COLUMNS`]. Where the table cannot be read, an error comes instead.
    fn batches<T, F: Fn(&RecordBatch) -> Result<T, String>>(
        &self,
        columns: &[&'static str],
        selection: Option<RowSelection>,
        read: F,
    ) -> impl Iterator<Item = Result<T>> + use<T, F> {
        let path = self.file.path.clone();
        let there: Vec<(&'static str, &'static str)> = columns.iter().filter_map(|column| Some((*column, self.column(column)?))).collect();
        let opened = self.reader(&there, selection);
        let of_batch = move |batch: RecordBatch| -> Result<T> {
            let columns = there.iter().filter_map(|(column, name)| Some((*column, Arc::clone(batch.column_by_name(name)?), true)));
            let renamed = RecordBatch::try_from_iter_with_nullable(columns).map_err(|error| error.to_string());
            renamed.and_then(|batch| read(&batch)).map_err(|problem| malformed(&path, problem))
        };
        let path = self.file.path.clone();
        let (batches, unreadable) = opened.map_or_else(|error| (None, Some(Err(error))), |batches| (Some(batches), None));
        let read = batches.into_iter().flatten().map(move |batch| of_batch(batch.map_err(|error| malformed(&path, error.to_string()))?));
        read.chain(unreadable)
    }

    fn reader(&self, there: &[(&str, &str)], selection: Option<RowSelection>) -> Result<ParquetRecordBatchReader> {
        let builder = builder(self.file)?;
        let mask = ProjectionMask::columns(builder.parquet_schema(), there.iter().map(|(_, name)| *name));
        let builder = builder.with_batch_size(BATCH_ROWS).with_projection(mask);
        let builder = match selection {
            Some(selection) => builder.with_row_selection(selection),
            None => builder,
        };
        builder.build().map_err(|error| malformed(&self.file.path, error.to_string()))
    }
}

fn builder(file: &InputFile) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let opened = File::open(&file.path).map_err(|source| read_error(file, source))?;
    ParquetRecordBatchReaderBuilder::try_new(opened).map_err(|error| malformed(&file.path, format!("expected a Parquet table: {error}")))
}

/// The selection of some ascending rows.
fn selection(rows: impl Iterator<Item = usize>) -> RowSelection {
    let (mut selectors, mut next) = (Vec::new(), 0);
    for row in rows {
        if row > next {
            selectors.push(RowSelector::skip(row - next));
        }
        selectors.push(RowSelector::select(1));
        next = row + 1;
    }
    selectors.into()
}

/// A column of texts, where it is there.
fn text(batch: &RecordBatch, name: &str) -> Result<Option<StringArray>, String> {
    let Some(column) = batch.column_by_name(name) else { return Ok(None) };
    let value = match column.data_type() {
        DataType::Dictionary(_, value) => value,
        other => other,
    };
    if !(value.is_string() || value.is_binary()) {
        return Err(format!("column `{name}`: expected texts, found {value}"));
    }
    converted(column, name, &DataType::Utf8).map(|column| Some(column.as_string::<i32>().clone()))
}

/// A column in another type; fails at a value that has none in it.
fn converted(column: &ArrayRef, name: &str, into: &DataType) -> Result<ArrayRef, String> {
    let strictly = CastOptions { safe: false, ..CastOptions::default() };
    cast_with_options(column, into, &strictly).map_err(|error| format!("column `{name}`: {error}"))
}

/// What a table says of whether an image is unsafe for work.
#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Unsafe,
    Safe,
    Unsure,
}

/// The verdicts of a column of words, of truth values or of probabilities.
fn verdicts(batch: &RecordBatch, name: &str, max_punsafe: f32) -> Result<Option<Vec<Verdict>>, String> {
    let Some(column) = batch.column_by_name(name) else { return Ok(None) };
    let of_number = |number: f32| match () {
        // A NaN is not known to be at most the limit.
        () if number.is_nan() || number > max_punsafe => Verdict::Unsafe,
        () => Verdict::Safe,
    };
    if column.data_type().is_numeric() || *column.data_type() == DataType::Boolean {
        let numbers = converted(column, name, &DataType::Float32)?;
        let numbers = numbers.as_primitive::<Float32Type>();
        return Ok(Some(numbers.iter().map(|number| number.map_or(Verdict::Unsure, of_number)).collect()));
    }
    let Some(words) = text(batch, name)? else { return Ok(None) };
    let verdict = |word: Option<&str>| {
        let word = word.unwrap_or_default().trim().to_ascii_uppercase();
        match word.as_str() {
            "NSFW" | "UNSAFE" | "LIKELY" | "VERY_LIKELY" | "TRUE" | "YES" => Verdict::Unsafe,
            "UNLIKELY" | "VERY_UNLIKELY" | "SFW" | "SAFE" | "FALSE" | "NO" => Verdict::Safe,
            other => other.parse().map_or(Verdict::Unsure, of_number),
        }
    };
    Ok(Some(words.iter().map(verdict).collect()))
}

fn kinds(batch: &RecordBatch, which: Unsafe) -> Result<Vec<Row>, String> {
    let urls = text(batch, "url")?.ok_or("no column of URLs")?;
    let mut said = Vec::new();
    if !which.keep_all {
        for name in ["NSFW", "punsafe"] {
            said.extend(verdicts(batch, name, which.max_punsafe)?);
        }
    }
    let is_unsafe = |row: usize| {
        let is = |verdict: Verdict| said.iter().any(|of_column| of_column[row] == verdict);
        is(Verdict::Unsafe) || which.drop_unsure && is(Verdict::Unsure)
    };
    let kind = |row: usize| match () {
        () if urls.is_null(row) || urls.value(row).trim().is_empty() => Row::WithoutUrl,
        () if is_unsafe(row) => Row::Unsafe,
        () => Row::Candidate,
    };
    Ok((0..batch.num_rows()).map(kind).collect())
}

fn texts(batch: &RecordBatch) -> Result<Vec<LinkText>, String> {
    let [urls, captions, md5s] = [text(batch, "url")?, text(batch, "caption")?, text(batch, "md5")?];
    let value = |column: &Option<StringArray>, row: usize| {
        let text = column.as_ref().filter(|column| column.is_valid(row))?.value(row).trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    let is_md5 = |text: &String| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let of_row = |row: usize| LinkText {
        url: value(&urls, row).unwrap_or_default(),
        md5: value(&md5s, row).filter(is_md5).map(|md5| md5.to_ascii_lowercase()),
        caption: value(&captions, row),
    };
    Ok((0..batch.num_rows()).map(of_row).collect())
}

/// A column of metadata; a null where nothing is known.
pub(crate) enum Column {
    Text(Vec<Option<String>>),
    Number(Vec<Option<f32>>),
}

impl Column {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Text(texts) => texts.len(),
            Self::Number(numbers) => numbers.len(),
        }
    }

    fn array(self) -> ArrayRef {
        match self {
            Self::Text(texts) => Arc::new(texts.into_iter().collect::<StringArray>()),
            Self::Number(numbers) => Arc::new(numbers.into_iter().collect::<Float32Array>()),
        }
    }
}

/// Writes a table of metadata, a batch of rows at a time.
pub(crate) struct MetadataWriter {
    writer: ArrowWriter<DraftFile>,
    schema: Arc<Schema>,
    path: PathBuf,
}

impl MetadataWriter {
    /// `columns`: names of [`COLUMNS`].
    pub(crate) fn new(file: DraftFile, columns: &[&'static str]) -> Result<Self> {
        let field = |name: &&str| Field::new(*name, if *name == "punsafe" { DataType::Float32 } else { DataType::Utf8 }, true);
        let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
        let path = file.path().to_owned();
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
        let writer = ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties)).map_err(|error| unwritten(&path, error))?;
        Ok(Self { writer, schema, path })
    }

    /// Appends rows: a column for each name.
    pub(crate) fn push(&mut self, columns: Vec<Column>) -> Result<()> {
        let arrays = columns.into_iter().map(Column::array).collect();
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), arrays).expect("BUG: columns of equal length and of their kinds");
        self.writer.write(&batch).map_err(|error| unwritten(&self.path, error))
    }

    /// Writes what is left and finishes the file.
    pub(crate) fn finish(self) -> Result<()> {
        let file = self.writer.into_inner().map_err(|error| unwritten(&self.path, error))?;
        Ok(file.finish()?)
    }
}

fn unwritten(path: &Path, error: ParquetError) -> Error {
    write_error(path, io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use arrow::array::{BooleanArray, Int64Array, ListArray};
    use arrow::datatypes::Int64Type;
    use ovenbird_cache::inputs::digest_path;
    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;

    fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true))).unwrap()
    }

    fn words(words: &[Option<&str>]) -> ArrayRef {
        Arc::new(words.iter().copied().collect::<StringArray>())
    }

    /// How many of some rows are left out as unsafe, and how many more where the table is not sure.
    fn n_unsafe(name: &str, column: ArrayRef) -> [usize; 2] {
        let urls = words(&vec![Some("http://a.example/"); column.len()]);
        let batch = batch(vec![("url", urls), (name, column)]);
        [false, true].map(|drop_unsure| {
            let kinds = kinds(&batch, Unsafe { keep_all: false, drop_unsure, max_punsafe: 0.5 }).unwrap();
            kinds.iter().filter(|kind| **kind == Row::Unsafe).count()
        })
    }

    #[test]
    fn unsafe_rows_are_known_by_words_truth_values_and_numbers() {
        let laion = [Some("UNLIKELY"), Some("UNSURE"), Some("NSFW"), None];
        assert_eq!(n_unsafe("NSFW", words(&laion)), [1, 3]);
        let others = ["nsfw ", "True", " yes", "unsafe", "VERY_LIKELY", "0.99", "1", "sfw", "false", "0.1", "0", "porn?"];
        assert_eq!(n_unsafe("NSFW", words(&others.map(Some))), [7, 8]);
        assert_eq!(n_unsafe("NSFW", Arc::new(BooleanArray::from(vec![true, false]))), [1, 1]);
        assert_eq!(n_unsafe("NSFW", Arc::new(Int64Array::from(vec![Some(1), Some(0), None]))), [1, 2]);
        let probabilities = Float32Array::from(vec![Some(0.5), Some(0.51), Some(f32::NAN), None]);
        assert_eq!(n_unsafe("punsafe", Arc::new(probabilities)), [2, 3]);
        assert_eq!(n_unsafe("punsafe", words(&[Some("0.9"), Some("bad"), Some("0.1")])), [1, 2]);
        let all = Unsafe { keep_all: true, drop_unsure: false, max_punsafe: 0.5 };
        let list: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(1)])]));
        let of_list = batch(vec![("url", words(&[Some("http://a.example/")])), ("NSFW", list)]);
        assert_eq!(kinds(&of_list, all).unwrap(), [Row::Candidate]);
        assert!(kinds(&of_list, Unsafe { keep_all: false, ..all }).unwrap_err().starts_with("column `NSFW`: expected texts, found List"));
    }

    #[test]
    fn urls_are_texts() {
        let all = Unsafe { keep_all: true, drop_unsure: false, max_punsafe: 0.5 };
        let numbers = batch(vec![("url", Arc::new(Int64Array::from(vec![5])))]);
        assert_eq!(kinds(&numbers, all).unwrap_err(), "column `url`: expected texts, found Int64");
        let bytes = |url: &[u8]| batch(vec![("url", Arc::new(arrow::array::BinaryArray::from(vec![url])) as ArrayRef)]);
        assert_eq!(texts(&bytes(b"http://a.example/")).unwrap()[0].url, "http://a.example/");
        assert!(kinds(&bytes(b"http://\xff/"), all).unwrap_err().starts_with("column `url`: "));
        let md5s = ["D41D8CD98F00B204E9800998ECF8427E", "none", "5"];
        let rows = batch(vec![("url", words(&[Some("a"), Some(" "), None])), ("md5", words(&md5s.map(Some)))]);
        assert_eq!(kinds(&rows, all).unwrap(), [Row::Candidate, Row::WithoutUrl, Row::WithoutUrl]);
        let found = texts(&rows).unwrap().into_iter().map(|text| text.md5).collect::<Vec<_>>();
        assert_eq!(found, [Some("d41d8cd98f00b204e9800998ecf8427e".into()), None, None]);
    }

    #[test]
    fn withdrawn_metadata_are_refused_until_somebody_says_what_they_are() {
        let write = |columns: &[&str]| {
            let rows = batch(columns.iter().map(|name| (*name, words(&[Some("0.1")]))).collect());
            let mut file = tempfile::Builder::new().suffix(".parquet").tempfile().unwrap();
            let mut writer = ArrowWriter::try_new(file.as_file_mut(), rows.schema(), None).unwrap();
            writer.write(&rows).unwrap();
            drop(writer.close().unwrap());
            let input = digest_path(file.path(), None, 0).unwrap();
            (file, input)
        };
        let (_file, laion) = write(&["URL", "punsafe", "pwatermark"]);
        assert!(PoolRows::open(&laion).unwrap().refuse_withdrawn().unwrap_err().to_string().contains("columns of LAION-5B"));
        let (_file, other) = write(&["URL", "punsafe"]);
        assert!(PoolRows::open(&other).unwrap().refuse_withdrawn().is_ok());
        let (_file, none) = write(&["link"]);
        let error = PoolRows::open(&none).err().unwrap().to_string();
        assert!(error.contains("expected a column `url` or `URL`, found link"), "{error}");
    }

    #[test]
    fn archives_that_lie_about_their_arrays_are_refused() {
        let open = |header: &str, stored: bool| {
            let mut file = tempfile::Builder::new().suffix(".npz").tempfile().unwrap();
            let mut archive = ZipWriter::new(file.as_file_mut());
            let method = if stored { CompressionMethod::Stored } else { CompressionMethod::Deflated };
            archive.start_file("a.npy", SimpleFileOptions::default().compression_method(method)).unwrap();
            let head = [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes()].concat();
            archive.write_all(&[&head[..], &[0; 64]].concat()).unwrap();
            assert!(archive.finish().is_ok());
            let input = digest_path(file.path(), None, 0).unwrap().remove(0);
            Embedded::open(&input, None).map(|embedded| embedded.n_rows()).map_err(|error| error.to_string())
        };
        let header = |shape: &str| format!("{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}\n");
        for stored in [true, false] {
            assert_eq!(open(&header("(8, 4)"), stored).unwrap(), 8);
            for shape in ["(9, 4)", "(576460752303423496, 16)", "(18446744073709551615, 18446744073709551615)"] {
                assert!(open(&header(shape), stored).unwrap_err().contains("a: expected "), "{shape}");
            }
            assert!(open(&header("(32,)"), stored).unwrap_err().contains("expected a matrix [N, D] of f16 or f32"));
        }
    }
}
