//! `pool/import`: metadata of a pool in formats of other programs.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
};

use hdf5_pure::{DType, Dataset, File as Hdf5};
use ovenbird_cache::DraftFile;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Laion5b;
use crate::{
    Context, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{LAION_5B, METADATA_COLUMNS, MetadataColumn, MetadataWriter, PoolMetadata, PublishedLinks, withdrawn},
    error::malformed,
};

/// Rows that are read at once.
const BATCH_ROWS: u64 = 1 << 16;

/// Metadata of a pool from HDF5, as PromptDet's retrieval reads them, or from tab-separated lines, as CC3M and CC12M are published.
///
/// Of HDF5 the one-dimensional datasets of the group `dataset` are columns (`url`, `caption`, ..), whose rows stay in their order: they are those of
/// the index or of the embeddings that the file was made with. Of lines the field that begins with `http` is the URL and the other one the text.
/// Memory does not grow with the file. (PromptDet, section 7.)
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Import {
    /// Which edition of LAION-5B the table is of, where it has its columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub laion_5b: Option<Laion5b>,
}

const TABLE: In<PublishedLinks> = In::required("table", "URLs with their texts and, in HDF5, whatever else is known of the images.");
const METADATA: Out<PoolMetadata> =
    Out::new("metadata", "Parquet: `url`, `caption`, `md5`, `NSFW` utf8 and `punsafe` f32, those that are there.");

impl Stage for Import {
    const KIND: &'static str = "pool/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[TABLE.info()];
    const OUTPUTS: &'static [PortInfo] = &[METADATA.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let PublishedLinks { file } = cx.inputs.read(TABLE)?;
        let draft = cx.begin(unit)?;
        let is_lines = file.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tsv"));
        let create = || draft.create(METADATA, "metadata_0.parquet");
        let n_rows = file.read_with(|path| if is_lines { lines(path, create, cx) } else { self.hdf5(path, create, cx) })?;
        cx.tick(1);
        cx.commit(draft, [("rows".to_owned(), n_rows.into())].into())
    }
}

/// How many rows a run reads of a table of so many.
fn most(n_rows: u64, cx: &Context<'_>) -> u64 {
    cx.most_items.map_or(n_rows, |most| n_rows.min(most as u64))
}

impl Import {
    fn hdf5(&self, path: &Path, create: impl FnOnce() -> Result<DraftFile>, cx: &Context<'_>) -> Result<u64> {
        let damaged = |error: hdf5_pure::Error| malformed(path, error.to_string());
        let file = Hdf5::open_streaming(path).map_err(|error| malformed(path, format!("expected HDF5: {error}")))?;
        let group = file.group("dataset").map_err(|error| malformed(path, format!("expected the group `dataset`: {error}")))?;
        let names = group.datasets().map_err(damaged)?;
        if self.laion_5b.is_none() && LAION_5B.iter().all(|name| names.iter().any(|known| known == name)) {
            return Err(withdrawn(path));
        }
        let mut columns: Vec<(&str, Dataset, DType)> = Vec::new();
        let mut length = None;
        for (column, known) in METADATA_COLUMNS {
            let Some(name) = known.iter().find(|known| names.iter().any(|name| name == *known)) else { continue };
            let dataset = group.dataset(name).map_err(damaged)?;
            let shape = dataset.shape().map_err(damaged)?;
            let [n_rows] = shape[..] else {
                return Err(malformed(path, format!("dataset/{name}: expected one dimension, found the shape {shape:?}")));
            };
            let before = *length.get_or_insert(n_rows);
            if before != n_rows {
                return Err(malformed(path, format!("dataset/{name}: expected {before} rows, as the columns before, found {n_rows}")));
            }
            let dtype = dataset.dtype().map_err(damaged)?;
            let is_text = matches!(dtype, DType::VariableLengthString | DType::String);
            if !is_text && column == "md5" {
                continue;
            }
            if !is_text && column != "punsafe" {
                return Err(malformed(path, format!("dataset/{name}: expected texts, found {dtype}")));
            }
            columns.push((column, dataset, dtype));
        }
        let (Some(n_rows), Some(("url", urls, _))) = (length, columns.first()) else {
            return Err(malformed(path, format!("expected a column `url` in the group `dataset`, found {}", names.join(", "))));
        };
        if n_rows == 0 {
            return Err(malformed(path, "expected rows in the group `dataset`, found none"));
        }
        let n_rows = most(n_rows, cx);
        let mut writer = MetadataWriter::new(create()?, &columns.iter().map(|(column, ..)| *column).collect::<Vec<_>>())?;
        // A library reads a chunk that it does not find as one that nobody wrote: empty texts.
        let chunk_rows = urls.chunk_shape().map_err(damaged)?.and_then(|shape| shape.first().copied()).unwrap_or(n_rows).max(2);
        let (mut first, mut n_empty, mut n_without) = (0, 0, 0_u64);
        while first < n_rows {
            let n = BATCH_ROWS.min(n_rows - first);
            let mut read = Vec::new();
            for (column, dataset, dtype) in &columns {
                let values = match (*column, dtype) {
                    ("punsafe", DType::VariableLengthString | DType::String) => {
                        let texts = dataset.read_string_rows(first, n).map_err(damaged)?;
                        MetadataColumn::Number(texts.iter().map(|text| text.trim().parse().ok()).collect())
                    }
                    ("punsafe", DType::F64) => MetadataColumn::Number(
                        dataset.read_f64_rows(first, n).map_err(damaged)?.iter().map(|number| Some(*number as f32)).collect(),
                    ),
                    ("punsafe", _) => {
                        MetadataColumn::Number(dataset.read_f32_rows(first, n).map_err(damaged)?.into_iter().map(Some).collect())
                    }
                    _ => MetadataColumn::Text(dataset.read_string_rows(first, n).map_err(damaged)?.into_iter().map(Some).collect()),
                };
                if values.len() as u64 != n {
                    return Err(malformed(
                        path,
                        format!("dataset/{column}: expected {n} rows from row {first} on, found {}", values.len()),
                    ));
                }
                if let ("url", MetadataColumn::Text(texts)) = (*column, &values) {
                    for (row, url) in (first..).zip(texts) {
                        let url = url.as_deref().unwrap_or_default();
                        if url.contains('\u{fffd}') {
                            return Err(malformed(path, format!("dataset/url: row {row}: expected UTF-8")));
                        }
                        n_empty = if url.is_empty() { n_empty + 1 } else { 0 };
                        n_without += u64::from(url.is_empty());
                        if n_empty >= chunk_rows.min(n_rows) {
                            let problem = format!(
                                "dataset/url: {n_empty} rows up to row {row} are empty, a whole chunk: the file is damaged, or was never filled"
                            );
                            return Err(malformed(path, problem));
                        }
                    }
                }
                read.push(values);
            }
            writer.push(read)?;
            first += n;
            cx.proceed()?;
        }
        writer.finish()?;
        if n_without > 0 {
            cx.note(format!("{n_without} of {n_rows} rows have no URL"));
        }
        Ok(n_rows)
    }
}

fn lines(path: &Path, create: impl FnOnce() -> Result<DraftFile>, cx: &Context<'_>) -> Result<u64> {
    let failed = |source| ovenbird_data::Error::Read { path: path.to_owned(), source };
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let mut writer = MetadataWriter::new(create()?, &["url", "caption"])?;
    let (mut urls, mut captions, mut n_rows, mut place_of_url) = (Vec::new(), Vec::new(), 0_u64, None);
    let mut line = Vec::new();
    loop {
        line.clear();
        let is_end = file.read_until(b'\n', &mut line).map_err(failed)? == 0 || cx.most_items.is_some_and(|most| n_rows >= most as u64);
        if urls.len() as u64 == BATCH_ROWS || is_end && !urls.is_empty() {
            let columns = [&mut urls, &mut captions].map(|texts| MetadataColumn::Text(std::mem::take(texts)));
            writer.push(columns.into())?;
            cx.proceed()?;
        }
        if is_end {
            break;
        }
        n_rows += 1;
        let text = std::str::from_utf8(&line).map_err(|_| malformed(path, format!("line {n_rows}: expected UTF-8")))?;
        let text = if n_rows == 1 { text.trim_start_matches('\u{feff}') } else { text };
        let fields: Vec<&str> = text.trim_end_matches(['\r', '\n']).split('\t').collect();
        let [one, other] = fields[..] else {
            return Err(malformed(path, format!("line {n_rows}: expected two fields with a tab between them, found {}", fields.len())));
        };
        let is_url = |text: &str| text.starts_with("http://") || text.starts_with("https://");
        let place = *place_of_url.get_or_insert(usize::from(!is_url(one)));
        let (url, caption) = if place == 0 { (one, other) } else { (other, one) };
        if !is_url(url) {
            return Err(malformed(
                path,
                format!("line {n_rows}: expected a URL (http..) in field {}, found `{}`", place + 1, &url[..url.floor_char_boundary(100)]),
            ));
        }
        urls.push(Some(url.to_owned()));
        captions.push(Some(caption.to_owned()));
    }
    if n_rows == 0 {
        return Err(malformed(path, "expected lines of URL and text, found an empty file"));
    }
    writer.finish()?;
    Ok(n_rows)
}
