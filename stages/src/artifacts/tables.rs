//! Parquet tables with zstd: proposals and detections.
//!
//! Both have one row per box, grouped by image in ascending id: `image_id` u64, [`category_id` u64,] `x1 y1 x2 y2` f32 in px
//! of the original image, `score` f32[, `mask` utf8, null or `WIDTHxHEIGHT:` and COCO's packed run lengths]. An image without a box has
//! one row with nulls; in a table of detections these rows come last. The version is in the file's key-value metadata: 1, and for
//! detections 2, which also has the names of the categories there, as JSON by id. In tables of detections of version 1 images without a
//! box have no row, so it is unknown which images were processed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    iter, mem,
    path::Path,
    slice,
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, Float32Array, RecordBatch, StringArray, UInt64Array},
    datatypes::{Float32Type, UInt64Type},
};
use ovenbird_cache::{
    DraftFile,
    inputs::{Checked, InputFile},
};
use ovenbird_data::{
    annotations::{CategoryId, ImageId, ImageInfo},
    boxes::Xyxy,
    evaluate::Detection,
    proposals::Proposal,
};
use parquet::{
    arrow::{
        ArrowWriter, ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    Artifact, Error, Result,
    error::{malformed, write_error},
};

const FORMAT_KEY: &str = "ovenbird.table";
const PROPOSALS_FORMAT: u32 = 1;
const DETECTIONS_FORMAT: u32 = 2;
const CATEGORIES_KEY: &str = "ovenbird.categories";
/// The key under which a table says what it was made of, as json: the classes of a search, those without a row among them.
const SEARCH_KEY: &str = "ovenbird.search";
/// How far a box may reach outside its image, in px: proposal networks round.
const TOLERANCE_PX: f32 = 1.0;
/// Rows per read.
const BATCH_ROWS: usize = 1 << 16;

/// Class-agnostic boxes of every image, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposals {
    /// By image; an image without proposals has an empty list.
    pub by_image: BTreeMap<ImageId, Vec<Proposal>>,
}

impl Artifact for Proposals {
    const KIND: &'static str = "proposals";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str =
        "a table that `proposals/import` or `proposals/oln` made (Parquet); a pickle of mmdet comes in by `proposals/import`";

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut by_image: BTreeMap<ImageId, Vec<Proposal>> = BTreeMap::new();
        for file in files {
            let path = &file.path;
            for batch in Table::open(file, PROPOSALS_FORMAT, None)? {
                let batch = batch?;
                let (ids, boxes) = (ids(path, &batch, "image_id")?, boxes(path, &batch)?);
                for (image, (xyxy, score)) in ids.into_iter().zip(boxes) {
                    let of_image = by_image.entry(ImageId(image)).or_default();
                    // An image without proposals is kept as one row without a box.
                    if let Some(xyxy) = xyxy {
                        of_image.push(Proposal { xyxy, score });
                    }
                }
            }
        }
        Ok(Self { by_image })
    }
}

impl Proposals {
    /// The proposals of these images, in their order. Fails if an image has no entry.
    pub(crate) fn of_images<'a>(mut self, images: impl IntoIterator<Item = &'a ImageInfo>) -> Result<Vec<Vec<Proposal>>> {
        let of_image = |image: &ImageInfo| {
            self.by_image.remove(&image.id).ok_or_else(|| Error::Input {
                port: "proposals",
                problem: format!("none for image {}, which the annotations have", image.id),
                hint: "use the proposals that were made for these annotations".into(),
            })
        };
        images.into_iter().map(of_image).collect()
    }

    /// Fails where a box leaves its image: the proposals are then of other images, or of resized ones.
    pub(crate) fn check_within<'a>(&self, images: impl IntoIterator<Item = &'a ImageInfo>) -> Result<()> {
        for image in images {
            let (width, height) = (image.width as f32 + TOLERANCE_PX, image.height as f32 + TOLERANCE_PX);
            let leaves = |xyxy: &Xyxy| xyxy.x1 < -TOLERANCE_PX || xyxy.y1 < -TOLERANCE_PX || xyxy.x2 > width || xyxy.y2 > height;
            let outside = self.by_image.get(&image.id).into_iter().flatten().find(|proposal| leaves(&proposal.xyxy));
            if let Some(Proposal { xyxy: Xyxy { x1, y1, x2, y2 }, .. }) = outside {
                let size = format!("{} x {} px", image.width, image.height);
                return Err(Error::Input {
                    port: "proposals",
                    problem: format!("box [{x1}, {y1}, {x2}, {y2}] of image {} leaves the image of {size}", image.id),
                    hint: "use the proposals that were made for these annotations".into(),
                });
            }
        }
        Ok(())
    }

    /// The proposals of these images, in their order; `None` for an image without an entry, which an earlier step skipped.
    pub(crate) fn of_each<'a>(mut self, images: impl IntoIterator<Item = &'a ImageInfo>) -> Vec<Option<Vec<Proposal>>> {
        images.into_iter().map(|image| self.by_image.remove(&image.id)).collect()
    }

    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let (mut images, mut boxes) = (Vec::new(), Vec::new());
        for (image, proposals) in &self.by_image {
            if proposals.is_empty() {
                images.push(image.0);
                boxes.push(None);
            }
            for proposal in proposals {
                images.push(image.0);
                boxes.push(Some((proposal.xyxy, proposal.score)));
            }
        }
        let mut columns: Vec<(&str, ArrayRef)> = vec![("image_id", Arc::new(UInt64Array::from(images)))];
        check_numbers(&boxes)?;
        columns.extend(box_columns(&boxes));
        write_table(file, columns, PROPOSALS_FORMAT, Vec::new())
    }
}

/// Scored boxes with their classes, and masks if the detector predicts them; not yet read.
#[derive(Debug, Clone)]
pub struct Detections {
    files: Vec<InputFile>,
}

impl Artifact for Detections {
    const KIND: &'static str = "detections";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str = "a table that `detect/zero-shot` or `detector/test` made (Parquet)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { files: files.to_vec() })
    }
}

impl Detections {
    /// Reads them piece by piece, in the files' order. An image with consecutive rows is in one piece.
    pub fn pieces(&self) -> impl Iterator<Item = Result<Vec<Detection>>> {
        Pieces { files: self.files.iter(), table: None, begun: Vec::new() }
    }

    /// The images that were processed, with or without detections; `None` for tables of version 1.
    pub fn looked_at(&self) -> Result<Option<BTreeSet<ImageId>>> {
        let mut looked_at = BTreeSet::new();
        for file in &self.files {
            let (path, table) = (&file.path, Table::open(file, DETECTIONS_FORMAT, Some("image_id"))?);
            if table.format < DETECTIONS_FORMAT {
                return Ok(None);
            }
            for batch in table {
                looked_at.extend(ids(path, &batch?, "image_id")?.into_iter().map(ImageId));
            }
        }
        Ok(Some(looked_at))
    }

    /// The names of the detector's categories, by id; `None` for tables of version 1. Fails if tables differ in a name.
    pub fn categories(&self) -> Result<Option<BTreeMap<CategoryId, String>>> {
        let mut categories: BTreeMap<CategoryId, String> = BTreeMap::new();
        for file in &self.files {
            let path = &file.path;
            let Some(named) = Table::open(file, DETECTIONS_FORMAT, None)?.categories else { return Ok(None) };
            let named: BTreeMap<CategoryId, String> =
                serde_json::from_str(&named).map_err(|error| malformed(path, format!("`{CATEGORIES_KEY}` in the metadata: {error}")))?;
            for (id, name) in named {
                let known = categories.entry(id).or_insert_with(|| name.clone());
                if *known != name {
                    return Err(malformed(path, format!("category {id} is `{name}`, but `{known}` in the tables before")));
                }
            }
        }
        Ok(Some(categories))
    }

    /// Writes a table and finishes the file. Masks have a column of their own only if there are some.
    ///
    /// `looked_at`: all processed images, with or without detections. `categories`: the names of the detector's categories.
    pub fn write(
        detections: &[Detection],
        looked_at: &BTreeSet<ImageId>,
        categories: &BTreeMap<CategoryId, String>,
        file: DraftFile,
    ) -> Result<()> {
        let mut empty = looked_at.clone();
        for detection in detections {
            empty.remove(&detection.image_id);
        }
        let n_empty = empty.len();
        let images = detections.iter().map(|detection| detection.image_id).chain(empty);
        let rows = || detections.iter().map(Some).chain(iter::repeat_n(None, n_empty));
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            ("image_id", Arc::new(images.map(|image| image.0).collect::<UInt64Array>())),
            ("category_id", Arc::new(rows().map(|row| row.map(|detection| detection.category_id.0)).collect::<UInt64Array>())),
        ];
        let boxes: Vec<_> = rows().map(|row| row.map(|detection| (detection.xyxy, detection.score))).collect();
        check_numbers(&boxes)?;
        columns.extend(box_columns(&boxes));
        if detections.iter().any(|detection| detection.mask.is_some()) {
            let text = |row: Option<&Detection>| row?.mask.as_ref().map(ToString::to_string);
            columns.push(("mask", Arc::new(rows().map(text).collect::<StringArray>())));
        }
        let names = serde_json::to_string(categories).expect("BUG: names by id are plain JSON");
        write_table(file, columns, DETECTIONS_FORMAT, vec![KeyValue::new(CATEGORIES_KEY.to_owned(), names)])
    }
}

struct Pieces<'a> {
    files: slice::Iter<'a, InputFile>,
    table: Option<Table<'a>>,
    /// Rows that are read; the last image may have more.
    begun: Vec<Detection>,
}

impl Iterator for Pieces<'_> {
    type Item = Result<Vec<Detection>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(table) = &mut self.table else {
                match self.files.next().map(|file| Table::open(file, DETECTIONS_FORMAT, None)) {
                    Some(Ok(table)) => self.table = Some(table),
                    Some(Err(error)) => return Some(Err(error)),
                    None if self.begun.is_empty() => return None,
                    None => return Some(Ok(mem::take(&mut self.begun))),
                }
                continue;
            };
            let format = table.format;
            match table.next().map(|batch| detections(&table.file.path, &batch?, format)) {
                Some(Ok(rows)) => self.begun.extend(rows),
                Some(Err(error)) => return Some(Err(error)),
                None => self.table = None,
            }
            let last = self.begun.last().map(|detection| detection.image_id);
            let n_whole = self.begun.iter().rposition(|detection| Some(detection.image_id) != last).map_or(0, |place| place + 1);
            if n_whole > 0 {
                let begun = self.begun.split_off(n_whole);
                return Some(Ok(mem::replace(&mut self.begun, begun)));
            }
        }
    }
}

fn detections(path: &Path, batch: &RecordBatch, format: u32) -> Result<Vec<Detection>> {
    let (images, categories) = (ids(path, batch, "image_id")?, ids(path, batch, "category_id")?);
    let masks = match batch.column_by_name("mask") {
        Some(column) => Some(column.as_string_opt::<i32>().ok_or_else(|| malformed(path, "expected a utf8 column `mask`"))?),
        None => None,
    };
    let rows = images.into_iter().zip(categories).zip(boxes(path, batch)?).enumerate();
    let detection = |(row, ((image, category), (xyxy, score)))| {
        let xyxy = match xyxy {
            Some(xyxy) => xyxy,
            None if format >= DETECTIONS_FORMAT => return Ok(None),
            None => return Err(malformed(path, "a detection without a box")),
        };
        let mask = masks.filter(|masks| masks.is_valid(row)).map(|masks| masks.value(row).parse().map(Box::new));
        let mask = mask.transpose().map_err(|problem: String| malformed(path, format!("image {image}: {problem}")))?;
        Ok(Some(Detection { image_id: ImageId(image), category_id: CategoryId(category), xyxy, score, mask }))
    };
    rows.map(detection).filter_map(Result::transpose).collect()
}

pub(super) fn box_columns(boxes: &[Option<(Xyxy, f32)>]) -> [(&'static str, ArrayRef); 5] {
    let column = |value: fn(&(Xyxy, f32)) -> f32| -> ArrayRef {
        Arc::new(boxes.iter().map(|row| row.as_ref().map(value)).collect::<Float32Array>())
    };
    [
        ("x1", column(|row| row.0.x1)),
        ("y1", column(|row| row.0.y1)),
        ("x2", column(|row| row.0.x2)),
        ("y2", column(|row| row.0.y2)),
        ("score", column(|row| row.1)),
    ]
}

/// Fails if a box or a score is not finite.
pub(super) fn check_numbers(boxes: &[Option<(Xyxy, f32)>]) -> Result<()> {
    let is_sound = |(Xyxy { x1, y1, x2, y2 }, score): &(Xyxy, f32)| [x1, y1, x2, y2, score].into_iter().all(|number| number.is_finite());
    match boxes.iter().flatten().find(|row| !is_sound(row)) {
        None => Ok(()),
        Some((xyxy, score)) => {
            let problem = format!("expected finite numbers, found {xyxy:?}, score {score}");
            Err(ovenbird_cache::Error::Unsound { what: "a table of boxes".into(), problem }.into())
        }
    }
}

/// Writes a table with its format and further entries in the metadata, and finishes the file.
pub(super) fn write_table(mut file: DraftFile, columns: Vec<(&str, ArrayRef)>, format: u32, mut entries: Vec<KeyValue>) -> Result<()> {
    let nullable = columns.into_iter().map(|(name, array)| (name, array, true));
    let batch = RecordBatch::try_from_iter_with_nullable(nullable).expect("BUG: all columns have one value a row");

    entries.insert(0, KeyValue::new(FORMAT_KEY.to_owned(), format.to_string()));
    let path = file.path().to_owned();
    let write = || -> Result<(), ParquetError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_key_value_metadata(Some(entries))
            .build();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(())
    };
    write().map_err(|error| write_error(&path, std::io::Error::other(error)))?;
    Ok(file.finish()?)
}

/// An entry of the metadata that says what a table was made of.
pub(super) fn described(description: &impl Serialize) -> KeyValue {
    KeyValue::new(SEARCH_KEY.to_owned(), serde_json::to_string(description).expect("BUG: names and counts are plain JSON"))
}

/// A table that is being read.
pub(super) struct Table<'a> {
    file: &'a InputFile,
    format: u32,
    /// Names by id, JSON.
    categories: Option<String>,
    /// The description of a search, JSON.
    search: Option<String>,
    batches: ParquetRecordBatchReader,
    /// The check that the file did not change, made at the end.
    checked: Option<Checked<'a>>,
}

impl<'a> Table<'a> {
    /// Opens a table of a format up to `newest`, to read all columns or `only` one.
    pub(super) fn open(input: &'a InputFile, newest: u32, only: Option<&str>) -> Result<Self> {
        let (checked, path) = (input.check()?, &input.path);
        let file = File::open(path).map_err(|source| ovenbird_data::Error::Read { path: path.to_owned(), source })?;
        let damaged = |error: ParquetError| malformed(path, error.to_string());
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(damaged)?;
        let entries = builder.metadata().file_metadata().key_value_metadata();
        let entry = |key: &str| entries?.iter().find(|entry| entry.key == key)?.value.clone();
        let found = entry(FORMAT_KEY);
        let format = found.as_ref().and_then(|found| found.parse().ok()).filter(|format| (1..=newest).contains(format));
        let Some(format) = format else {
            let (newest, found) = (if newest > 1 { format!("1 to {newest}") } else { "1".into() }, found.unwrap_or_else(|| "none".into()));
            return Err(malformed(path, format!("expected a table of format {newest}, found {found}")));
        };
        let (categories, search) = (entry(CATEGORIES_KEY), entry(SEARCH_KEY));
        let columns = only.map_or_else(ProjectionMask::all, |only| ProjectionMask::columns(builder.parquet_schema(), [only]));
        let batches = builder.with_batch_size(BATCH_ROWS).with_projection(columns).build().map_err(damaged)?;
        Ok(Self { file: input, format, categories, search, batches, checked: Some(checked) })
    }

    /// What the table says it was made of: see [`described`].
    pub(super) fn description<D: DeserializeOwned>(&self) -> Result<D> {
        let path = &self.file.path;
        let text = self.search.as_ref().ok_or_else(|| malformed(path, format!("expected `{SEARCH_KEY}` in the metadata")))?;
        serde_json::from_str(text).map_err(|error| malformed(path, format!("`{SEARCH_KEY}` in the metadata: {error}")))
    }
}

impl Iterator for Table<'_> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.batches.next() {
            Some(batch) => Some(batch.map_err(|error| malformed(&self.file.path, error.to_string()))),
            None => self.checked.take()?.still().err().map(|error| Err(error.into())),
        }
    }
}

pub(super) fn ids(path: &Path, batch: &RecordBatch, name: &str) -> Result<Vec<u64>> {
    let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let column = column.ok_or_else(|| malformed(path, format!("expected a u64 column `{name}`")))?;
    Ok(column.values().to_vec())
}

pub(super) fn boxes(path: &Path, batch: &RecordBatch) -> Result<Vec<(Option<Xyxy>, f32)>> {
    let column = |name: &str| -> Result<Float32Array> {
        let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<Float32Type>());
        column.cloned().ok_or_else(|| malformed(path, format!("expected an f32 column `{name}`")))
    };
    let (x1, y1, x2, y2, score) = (column("x1")?, column("y1")?, column("x2")?, column("y2")?, column("score")?);
    let is_finite = |row: usize| [&x1, &y1, &x2, &y2, &score].iter().all(|column| column.is_null(row) || column.value(row).is_finite());
    if let Some(row) = (0..batch.num_rows()).find(|row| !is_finite(*row)) {
        return Err(malformed(path, format!("expected finite numbers in a box and its score, found others in row {row} of a batch")));
    }
    let row = |row: usize| {
        let xyxy = x1.is_valid(row).then(|| Xyxy { x1: x1.value(row), y1: y1.value(row), x2: x2.value(row), y2: y2.value(row) });
        (xyxy, score.value(row))
    };
    Ok((0..batch.num_rows()).map(row).collect())
}

#[cfg(test)]
mod tests {
    use ovenbird_cache::{Recipe, Store, UnitKey, inputs};

    use super::*;

    /// A table as `write` leaves it.
    fn table(write: impl FnOnce(DraftFile) -> Result<()>) -> (tempfile::TempDir, Detections) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("home")).unwrap();
        let _session = store.enter().unwrap();
        let recipe = Recipe { kind: "detector/test".into(), version: 1, params: serde_json::json!({}), inputs: BTreeMap::new() };
        let draft = store.begin_unit(&UnitKey { kind: recipe.kind.clone(), fingerprint: recipe.fingerprint(), item_key: None }).unwrap();
        let file = draft.create("detections/detections.parquet").unwrap();
        let path = file.path().to_owned();
        write(file).unwrap();
        let kept = folder.path().join("detections.parquet");
        assert!(std::fs::copy(path, &kept).is_ok());
        let detections = Detections::open(&inputs::digest_path(&kept, None, 0).unwrap()).unwrap();
        (folder, detections)
    }

    fn detection(image: u64) -> Detection {
        let xyxy = [1.0, 2.0, 3.0, 4.0].into();
        Detection { image_id: ImageId(image), category_id: CategoryId(5), xyxy, score: 0.5, mask: None }
    }

    fn read(detections: &Detections) -> Vec<Detection> {
        detections.pieces().map(Result::unwrap).collect::<Vec<_>>().concat()
    }

    #[test]
    fn images_in_which_nothing_was_found_are_known_and_have_no_detections() {
        let (looked_at, categories) = (BTreeSet::from([2, 4, 9].map(ImageId)), BTreeMap::from([(CategoryId(5), "owl".to_owned())]));
        for found in [vec![detection(4), detection(4)], vec![]] {
            let (_folder, detections) = table(|file| Detections::write(&found, &looked_at, &categories, file));
            assert_eq!(read(&detections), found);
            assert_eq!(detections.looked_at().unwrap(), Some(looked_at.clone()));
            assert_eq!(detections.categories().unwrap(), Some(categories.clone()));
        }
    }

    #[test]
    fn tables_of_before_are_read_and_do_not_say_what_was_looked_at() {
        let ids = |id: u64| -> ArrayRef { Arc::new(UInt64Array::from(vec![id])) };
        let found = detection(4);
        let mut columns = vec![("image_id", ids(4)), ("category_id", ids(5))];
        columns.extend(box_columns(&[Some((found.xyxy, found.score))]));
        let (_folder, detections) = table(|file| write_table(file, columns, 1, Vec::new()));
        assert_eq!((read(&detections), detections.looked_at().unwrap(), detections.categories().unwrap()), (vec![found], None, None));
    }

    #[test]
    fn tables_of_later_formats_are_refused() {
        let (_folder, detections) =
            table(|file| write_table(file, vec![("image_id", Arc::new(UInt64Array::from(vec![4])))], 3, Vec::new()));
        let error = detections.looked_at().unwrap_err().to_string();
        assert!(error.contains("expected a table of format 1 to 2, found 3"), "{error}");
    }

    #[test]
    fn boxes_that_are_no_numbers_are_neither_written_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let _session = store.enter().unwrap();
        let key = UnitKey {
            kind: "detect/zero-shot".into(),
            fingerprint: ovenbird_cache::Digest::of(b"boxes").to_hex().parse().unwrap(),
            item_key: None,
        };
        let draft = store.begin_unit(&key).unwrap();
        let xyxy = Xyxy { x1: 1.0, y1: 2.0, x2: 3.0, y2: f32::INFINITY };
        let detection = Detection { image_id: ImageId(4), category_id: CategoryId(5), xyxy, score: 0.5, mask: None };
        let refused =
            Detections::write(&[detection], &BTreeSet::new(), &BTreeMap::new(), draft.create("one.parquet").unwrap()).unwrap_err();
        assert!(refused.to_string().contains("y2: inf"), "{refused}");

        // As another program might write it.
        let ids: ArrayRef = Arc::new(UInt64Array::from(vec![4]));
        let mut columns = vec![("image_id", Arc::clone(&ids)), ("category_id", ids)];
        columns.extend(box_columns(&[Some((xyxy, 0.5))]));
        let file = draft.create("two.parquet").unwrap();
        let path = file.path().to_owned();
        write_table(file, columns, 1, Vec::new()).unwrap();
        let files = inputs::digest_path(&path, None, 0).unwrap();
        let refused = Detections::open(&files).unwrap().pieces().next().unwrap().unwrap_err();
        assert!(refused.to_string().contains("expected finite numbers"), "{refused}");
    }
}
