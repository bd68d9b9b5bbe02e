//! Parquet tables with zstd: proposals and detections.
//!
//! Both hold one row a box, grouped by image in ascending id: `image_id` u64, [`category_id` u64,] `x1 y1 x2 y2` f32 in px
//! of the original image, `score` f32[, `mask` utf8, null or `WIDTHxHEIGHT:` and COCO's packed run lengths]. The version is in the
//! file's key-value metadata.

use std::{collections::BTreeMap, fs::File, mem, path::Path, slice, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, Float32Array, RecordBatch, StringArray, UInt64Array},
    datatypes::{Float32Type, UInt64Type},
};
use ovenbird_cache::{
    DraftFile,
    inputs::{Checked, InputFile},
};
use ovenbird_data::{
    annotations::{Annotations, CategoryId, ImageId, ImageInfo},
    boxes::Xyxy,
    evaluate::Detection,
    proposals::Proposal,
};
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};

use super::Artifact;
use crate::{Error, Result, contract::write_error, error::malformed};

const FORMAT_KEY: &str = "ovenbird.table";
const FORMAT: &str = "1";
/// Rows that are read at once.
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

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut by_image: BTreeMap<ImageId, Vec<Proposal>> = BTreeMap::new();
        for file in files {
            let path = &file.path;
            for batch in Table::open(file)? {
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
    /// The proposals of every image of some annotations, in ascending image id. Fails where an image has no entry.
    pub(crate) fn of_images(mut self, annotations: &Annotations) -> Result<Vec<Vec<Proposal>>> {
        let of_image = |image: &ImageInfo| {
            self.by_image.remove(&image.id).ok_or_else(|| Error::Input {
                port: "proposals",
                problem: format!("none for image {}, which the annotations have", image.id),
                hint: "use the proposals that `proposals/import` made for these annotations".into(),
            })
        };
        annotations.images.iter().map(of_image).collect()
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
        write_table(file, columns)
    }
}

/// Scored boxes with their classes, and masks where a detector draws some; not yet read.
#[derive(Debug, Clone)]
pub struct Detections {
    files: Vec<InputFile>,
}

impl Artifact for Detections {
    const KIND: &'static str = "detections";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { files: files.to_vec() })
    }
}

impl Detections {
    /// Reads them piece by piece, in the files' order. An image whose rows lie together is in one piece.
    pub fn pieces(&self) -> impl Iterator<Item = Result<Vec<Detection>>> {
        Pieces { files: self.files.iter(), table: None, begun: Vec::new() }
    }

    /// Writes a table and finishes the file. Masks have a column of their own only if there are some.
    pub fn write(detections: &[Detection], file: DraftFile) -> Result<()> {
        let ids = |id: fn(&Detection) -> u64| -> ArrayRef { Arc::new(detections.iter().map(id).collect::<UInt64Array>()) };
        let mut columns =
            vec![("image_id", ids(|detection| detection.image_id.0)), ("category_id", ids(|detection| detection.category_id.0))];
        let boxes: Vec<_> = detections.iter().map(|detection| Some((detection.xyxy, detection.score))).collect();
        check_numbers(&boxes)?;
        columns.extend(box_columns(&boxes));
        if detections.iter().any(|detection| detection.mask.is_some()) {
            let text = |detection: &Detection| detection.mask.as_ref().map(ToString::to_string);
            columns.push(("mask", Arc::new(detections.iter().map(text).collect::<StringArray>())));
        }
        write_table(file, columns)
    }
}

struct Pieces<'a> {
    files: slice::Iter<'a, InputFile>,
    table: Option<Table<'a>>,
    /// Rows that are read, of which those of the last image may go on.
    begun: Vec<Detection>,
}

impl Iterator for Pieces<'_> {
    type Item = Result<Vec<Detection>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(table) = &mut self.table else {
                match self.files.next().map(Table::open) {
                    Some(Ok(table)) => self.table = Some(table),
                    Some(Err(error)) => return Some(Err(error)),
                    None if self.begun.is_empty() => return None,
                    None => return Some(Ok(mem::take(&mut self.begun))),
                }
                continue;
            };
            match table.next().map(|batch| detections(&table.file.path, &batch?)) {
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

fn detections(path: &Path, batch: &RecordBatch) -> Result<Vec<Detection>> {
    let (images, categories) = (ids(path, batch, "image_id")?, ids(path, batch, "category_id")?);
    let masks = match batch.column_by_name("mask") {
        Some(column) => Some(column.as_string_opt::<i32>().ok_or_else(|| malformed(path, "expected a utf8 column `mask`"))?),
        None => None,
    };
    let rows = images.into_iter().zip(categories).zip(boxes(path, batch)?).enumerate();
    let detection = |(row, ((image, category), (xyxy, score)))| {
        let xyxy = Option::ok_or_else(xyxy, || malformed(path, "a detection without a box"))?;
        let mask = masks.filter(|masks| masks.is_valid(row)).map(|masks| masks.value(row).parse().map(Box::new));
        let mask = mask.transpose().map_err(|problem: String| malformed(path, format!("image {image}: {problem}")))?;
        Ok(Detection { image_id: ImageId(image), category_id: CategoryId(category), xyxy, score, mask })
    };
    rows.map(detection).collect()
}

fn box_columns(boxes: &[Option<(Xyxy, f32)>]) -> [(&'static str, ArrayRef); 5] {
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

/// Fails where a box or a score is no number.
fn check_numbers(boxes: &[Option<(Xyxy, f32)>]) -> Result<()> {
    let is_sound = |(Xyxy { x1, y1, x2, y2 }, score): &(Xyxy, f32)| [x1, y1, x2, y2, score].into_iter().all(|number| number.is_finite());
    match boxes.iter().flatten().find(|row| !is_sound(row)) {
        None => Ok(()),
        Some((xyxy, score)) => {
            let problem = format!("expected finite numbers, found {xyxy:?}, score {score}");
            Err(ovenbird_cache::Error::Unsound { what: "a table of boxes".into(), problem }.into())
        }
    }
}

fn write_table(mut file: DraftFile, columns: Vec<(&str, ArrayRef)>) -> Result<()> {
    let nullable = columns.into_iter().map(|(name, array)| (name, array, true));
    let batch = RecordBatch::try_from_iter_with_nullable(nullable).expect("BUG: all columns have one value a row");

    let path = file.path().to_owned();
    let mut write = || -> Result<(), ParquetError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_key_value_metadata(Some(vec![KeyValue::new(FORMAT_KEY.to_owned(), FORMAT.to_owned())]))
            .build();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(())
    };
    write().map_err(|error| write_error(&path, std::io::Error::other(error)))?;
    Ok(file.finish()?)
}

/// A table that is being read.
struct Table<'a> {
    file: &'a InputFile,
    batches: ParquetRecordBatchReader,
    /// What is still to be asked at the end.
    checked: Option<Checked<'a>>,
}

impl<'a> Table<'a> {
    fn open(input: &'a InputFile) -> Result<Self> {
        let (checked, path) = (input.check()?, &input.path);
        let file = File::open(path).map_err(|source| ovenbird_data::Error::Read { path: path.to_owned(), source })?;
        let damaged = |error: ParquetError| malformed(path, error.to_string());
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(damaged)?;
        let entries = builder.metadata().file_metadata().key_value_metadata();
        let format = entries.and_then(|entries| entries.iter().find(|entry| entry.key == FORMAT_KEY)).and_then(|entry| entry.value.clone());
        if format.as_deref() != Some(FORMAT) {
            let found = format.unwrap_or_else(|| "none".into());
            return Err(malformed(path, format!("expected a table of format {FORMAT}, found {found}")));
        }
        let batches = builder.with_batch_size(BATCH_ROWS).build().map_err(damaged)?;
        Ok(Self { file: input, batches, checked: Some(checked) })
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

fn ids(path: &Path, batch: &RecordBatch, name: &str) -> Result<Vec<u64>> {
    let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt64Type>());
    let column = column.ok_or_else(|| malformed(path, format!("expected a u64 column `{name}`")))?;
    Ok(column.values().to_vec())
}

fn boxes(path: &Path, batch: &RecordBatch) -> Result<Vec<(Option<Xyxy>, f32)>> {
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
    use ovenbird_cache::{Store, UnitKey};

    use super::*;

    #[test]
    fn boxes_that_are_no_numbers_are_neither_written_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let _session = store.enter().unwrap();
        let key = UnitKey {
            kind: "detect/zero-shot".into(),
            fingerprint: ovenbird_cache::Digest::of(b"boxes").to_hex().parse().unwrap(),
            family: None,
        };
        let draft = store.begin_unit(&key).unwrap();
        let xyxy = Xyxy { x1: 1.0, y1: 2.0, x2: 3.0, y2: f32::INFINITY };
        let detection = Detection { image_id: ImageId(4), category_id: CategoryId(5), xyxy, score: 0.5, mask: None };
        let refused = Detections::write(&[detection], draft.create("one.parquet").unwrap()).unwrap_err();
        assert!(refused.to_string().contains("y2: inf"), "{refused}");

        // As another program might write it.
        let ids: ArrayRef = Arc::new(UInt64Array::from(vec![4]));
        let mut columns = vec![("image_id", Arc::clone(&ids)), ("category_id", ids)];
        columns.extend(box_columns(&[Some((xyxy, 0.5))]));
        let file = draft.create("two.parquet").unwrap();
        let path = file.path().to_owned();
        write_table(file, columns).unwrap();
        let files = ovenbird_cache::inputs::digest_path(&path, None, 0).unwrap();
        let refused = Detections::open(&files).unwrap().pieces().next().unwrap().unwrap_err();
        assert!(refused.to_string().contains("expected finite numbers"), "{refused}");
    }
}
