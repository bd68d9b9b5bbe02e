//! Rows from which prompts are learned, in Arrow shards.
//!
//! `prompt-samples`: each unit has two shards with as many rows. `rows.arrow`: `image_id` u64, `class` i32, a place among the names in the
//! schema's metadata (`ovenbird.classes`, json) or -1 for none, `iou` f32; rows of an image follow one another. `embeddings.arrow`: `embedding`
//! f16 `[D]`, with the [`Space`] of embeddings in the metadata. What is chosen by class and IoU is thus chosen without reading embeddings.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use arrow::{
    array::{Array as _, ArrayRef, AsArray, Float32Array, Int32Array, RecordBatch, UInt64Array},
    datatypes::{DataType, Field, Float16Type, Float32Type, Int32Type, Schema},
};
use half::slice::HalfFloatSliceExt as _;
use ovenbird_cache::{
    DraftFile, Fingerprint,
    inputs::InputFile,
    shard::{Compression, ShardWriter},
};
use ovenbird_data::annotations::ImageId;

use super::features::{Dtype, batches, clip_of, column, u64_column, vector_array, vectors};
use crate::{Artifact, Error, Result, clip::Space, error::malformed};

/// The metadata key of the class names.
const CLASSES_KEY: &str = "ovenbird.classes";
/// The name of a unit's shard of rows.
pub const ROWS_FILE: &str = "rows.arrow";
/// The name of a unit's shard of embeddings.
pub const EMBEDDINGS_FILE: &str = "embeddings.arrow";
/// Rows of a record batch: a megabyte of embeddings with ViT-B/32.
const ROWS_PER_BATCH: usize = 1024;
/// The class of a row that has none.
const NO_CLASS: i32 = -1;

/// A proposal or an annotated object, without its embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptRow {
    /// The image that it is in.
    pub image_id: ImageId,
    /// A place among the class names.
    pub class: Option<usize>,
    /// The overlap with an object; 1 for the object itself.
    pub iou: f32,
}

/// Writes `prompt-samples`.
pub struct PromptSamplesWriter {
    rows_shard: ShardWriter,
    embeddings_shard: ShardWriter,
    dim: usize,
    rows: Vec<PromptRow>,
    embeddings: Vec<f32>,
}

impl PromptSamplesWriter {
    /// Begins both shards of a unit, with embeddings of `dim` numbers, of the embedding space `clip`, if known.
    pub fn new([rows, embeddings]: [DraftFile; 2], unit: &Fingerprint, names: &[String], dim: usize, clip: Option<Space>) -> Result<Self> {
        let field = |name: &str, kind: DataType| Field::new(name, kind, false);
        let names = serde_json::to_string(names).expect("BUG: names are plain JSON");
        let of_rows =
            Schema::new(vec![field("image_id", DataType::UInt64), field("class", DataType::Int32), field("iou", DataType::Float32)])
                .with_metadata([(CLASSES_KEY.to_owned(), names)].into());
        let of_embeddings = Schema::new(vec![field("embedding", vectors(Dtype::F16.field("item"), dim))])
            .with_metadata(clip.map(Space::entry).into_iter().collect());
        Ok(Self {
            rows_shard: ShardWriter::new(rows, &of_rows, unit, Compression::None)?,
            embeddings_shard: ShardWriter::new(embeddings, &of_embeddings, unit, Compression::None)?,
            dim,
            rows: Vec::new(),
            embeddings: Vec::new(),
        })
    }

    /// Appends a row.
    pub fn push(&mut self, row: PromptRow, embedding: &[f32]) -> Result<()> {
        assert_eq!(embedding.len(), self.dim, "BUG: an embedding of another width");
        self.rows.push(row);
        self.embeddings.extend_from_slice(embedding);
        if self.rows.len() == ROWS_PER_BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let (rows, embeddings) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.embeddings));
        let class = |row: &PromptRow| row.class.map_or(NO_CLASS, |class| class as i32);
        let columns: [(&str, ArrayRef); 3] = [
            ("image_id", Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| row.image_id.0)))),
            ("class", Arc::new(Int32Array::from_iter_values(rows.iter().map(class)))),
            ("iou", Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| row.iou)))),
        ];
        self.rows_shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length"))?;
        let embeddings = vector_array(Dtype::F16.field("item"), self.dim, Dtype::F16.array(&embeddings));
        let columns = [("embedding", Arc::new(embeddings) as ArrayRef)];
        Ok(self.embeddings_shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: one column"))?)
    }

    /// Writes what is left and finishes both files.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.rows_shard.finish()?;
        Ok(self.embeddings_shard.finish()?)
    }
}

/// Rows from which prompts are learned, not yet read.
#[derive(Debug, Clone)]
pub struct PromptSamples {
    shards: Vec<InputFile>,
}

impl Artifact for PromptSamples {
    const KIND: &'static str = "prompt-samples";
    const EXTENSIONS: &'static [&'static str] = &["/"];
    const SHAPE: &'static str = "a folder of the two shards that `prompts/detpro-data` made (Arrow)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { shards: files.to_vec() })
    }
}

/// All rows, without their embeddings.
#[derive(Debug)]
pub struct PromptRows {
    /// The class names that rows refer to.
    pub names: Vec<String>,
    /// A place among them, by row.
    pub classes: Vec<Option<u32>>,
    /// Overlaps with an object, by row.
    pub ious: Vec<f32>,
    /// The first row of each image.
    first_rows: Vec<(usize, ImageId)>,
}

impl PromptRows {
    /// The image of a row.
    pub fn image_of(&self, row: usize) -> ImageId {
        self.first_rows[self.first_rows.partition_point(|(first, _)| *first <= row) - 1].1
    }
}

/// The embeddings of all rows, read from the memory map when they are asked for.
pub struct PromptEmbeddings {
    batches: Vec<(PathBuf, RecordBatch)>,
    /// The first row of each batch.
    first_rows: Vec<usize>,
    /// How many rows there are.
    pub n_rows: usize,
    /// The numbers of an embedding.
    pub dim: usize,
}

impl PromptSamples {
    /// The shards of rows and those of embeddings, each in the order of units.
    fn parts(&self) -> Result<[Vec<InputFile>; 2]> {
        let mut parts = [Vec::new(), Vec::new()];
        for file in &self.shards {
            let has_embeddings = file.shard()?.schema().field_with_name("embedding").is_ok();
            parts[usize::from(has_embeddings)].push(file.clone());
        }
        let [rows, embeddings] = &parts;
        if rows.is_empty() || rows.len() != embeddings.len() {
            return Err(Error::Input {
                port: "samples",
                problem: format!("expected as many shards of rows as of embeddings, found {} and {}", rows.len(), embeddings.len()),
                hint: "give the whole output of `prompts/detpro-data`".into(),
            });
        }
        for (rows, embeddings) in rows.iter().zip(embeddings) {
            let [expected, found] = [rows.shard()?.stats().rows, embeddings.shard()?.stats().rows];
            if expected != found {
                return Err(malformed(
                    &embeddings.path,
                    format!("expected {expected} rows, as {} has, found {found}", rows.path.display()),
                ));
            }
        }
        Ok(parts)
    }

    /// Reads all rows; none of their embeddings.
    pub fn rows(&self) -> Result<PromptRows> {
        let [shards, _] = self.parts()?;
        let mut names: Option<Vec<String>> = None;
        for file in &shards {
            let shard = file.shard()?;
            let written = shard.schema().metadata().get(CLASSES_KEY).and_then(|names| serde_json::from_str::<Vec<String>>(names).ok());
            let written = written.ok_or_else(|| malformed(&file.path, format!("expected class names at `{CLASSES_KEY}`, found none")))?;
            match &names {
                Some(names) if *names != written => return Err(malformed(&file.path, "expected the class names of the shards before")),
                Some(_) => {}
                None => names = Some(written),
            }
        }
        let names = names.expect("BUG: there is a shard");
        let (mut classes, mut ious, mut first_rows) = (Vec::new(), Vec::new(), Vec::<(usize, ImageId)>::new());
        for batch in batches(&shards) {
            let (path, batch) = batch?;
            let wrong = |name: &str, kind: &str| malformed(&path, format!("expected {kind} in `{name}`"));
            let of_batch = column(&path, &batch, "class")?.as_primitive_opt::<Int32Type>().ok_or_else(|| wrong("class", "i32"))?;
            let overlaps = column(&path, &batch, "iou")?.as_primitive_opt::<Float32Type>().ok_or_else(|| wrong("iou", "f32"))?;
            for (place, image) in u64_column(&path, &batch, "image_id")?.into_iter().enumerate() {
                if first_rows.last().is_none_or(|(_, last)| last.0 != image) {
                    first_rows.push((ious.len() + place, ImageId(image)));
                }
            }
            ious.extend_from_slice(overlaps.values());
            for class in of_batch.values() {
                classes.push(match usize::try_from(*class) {
                    Ok(place) if place < names.len() => Some(*class as u32),
                    Err(_) if *class == NO_CLASS => None,
                    Ok(_) | Err(_) => {
                        return Err(malformed(&path, format!("expected a class from -1 to {}, found {class}", names.len() - 1)));
                    }
                });
            }
        }
        if let Some(row) = ious.iter().position(|iou| !(0.0..=1.0).contains(iou)) {
            return Err(malformed(&shards[0].path, format!("row {row}: expected an IoU from 0 to 1, found {}", ious[row])));
        }
        Ok(PromptRows { names, classes, ious, first_rows })
    }

    /// Checks every batch of embeddings once. They are read later, when they are asked for.
    pub fn embeddings(&self) -> Result<PromptEmbeddings> {
        let [_, shards] = self.parts()?;
        let batches = batches(&shards).collect::<Result<Vec<_>>>()?;
        let (mut first_rows, mut n_rows, mut widths) = (Vec::new(), 0, BTreeMap::new());
        for (path, batch) in &batches {
            first_rows.push(n_rows);
            n_rows += batch.num_rows();
            let column = column(path, batch, "embedding")?.as_fixed_size_list_opt();
            let column = column.filter(|column| column.values().as_primitive_opt::<Float16Type>().is_some());
            let dim = column.ok_or_else(|| malformed(path, "expected vectors of f16 in `embedding`"))?.value_length() as usize;
            widths.insert(dim, path);
        }
        match widths.into_iter().collect::<Vec<_>>()[..] {
            [(dim, _)] => Ok(PromptEmbeddings { first_rows, n_rows, dim, batches }),
            [] => Ok(PromptEmbeddings { first_rows, n_rows, dim: 0, batches: Vec::new() }),
            [(expected, _), (found, path), ..] => {
                Err(malformed(path, format!("embeddings of {found} numbers, but {expected} in other shards")))
            }
        }
    }

    /// The CLIP that made the embeddings, if known.
    pub fn clip(&self) -> Result<Option<Space>> {
        let [_, shards] = self.parts()?;
        clip_of(&shards)
    }
}

impl PromptEmbeddings {
    /// The embeddings of some rows, `[N, D]` row by row.
    pub fn gather(&self, rows: impl IntoIterator<Item = usize>) -> Vec<f32> {
        let mut numbers = Vec::new();
        for row in rows {
            let batch_idx = self.first_rows.partition_point(|first| *first <= row) - 1;
            let (_, batch) = &self.batches[batch_idx];
            let vectors = batch.column(0).as_fixed_size_list();
            let start = (vectors.offset() + row - self.first_rows[batch_idx]) * self.dim;
            let halves = &vectors.values().as_primitive::<Float16Type>().values()[start..start + self.dim];
            let end = numbers.len();
            numbers.resize(end + self.dim, 0.0);
            halves.convert_to_f32_slice(&mut numbers[end..]);
        }
        numbers
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use ovenbird_cache::{Publisher, Recipe, inputs::digest_path};
    use tempfile::TempDir;

    use super::*;

    /// The shards that are written into a folder, as inputs of a stage; they are there as long as the folder.
    pub(crate) fn shards(write: impl FnOnce(&dyn Fn(&str) -> DraftFile, &Fingerprint)) -> (TempDir, Vec<InputFile>) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("unit");
        let draft = Publisher::default().begin(&target).unwrap();
        let recipe = Recipe { kind: "a".into(), version: 1, params: serde_json::Value::Null, inputs: BTreeMap::new() };
        write(&|name| draft.create(name).unwrap(), &recipe.fingerprint());
        assert!(draft.commit("unit.json", b"{}").unwrap());
        let mut files = digest_path(&target, None, 0).unwrap();
        files.retain(|file| file.path.extension().is_some_and(|extension| extension == "arrow"));
        (folder, files)
    }

    /// Samples of these rows: image, class, IoU and embedding of each.
    pub(crate) fn samples(names: &[&str], rows: &[(u64, Option<usize>, f32, Vec<f32>)]) -> (TempDir, PromptSamples) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let dim = rows[0].3.len();
        let (folder, files) = shards(|create, unit| {
            let files = [create(ROWS_FILE), create(EMBEDDINGS_FILE)];
            let mut writer = PromptSamplesWriter::new(files, unit, &names, dim, None).unwrap();
            for (image, class, iou, embedding) in rows {
                writer.push(PromptRow { image_id: ImageId(*image), class: *class, iou: *iou }, embedding).unwrap();
            }
            writer.finish().unwrap();
        });
        (folder, PromptSamples::open(&files).unwrap())
    }

    /// A vector of unit norm.
    fn axis(row: usize) -> Vec<f32> {
        (0..13).map(|place| if place == row % 13 { 1.0 } else { 0.0 }).collect()
    }

    /// More rows than a batch holds.
    fn rows() -> Vec<(u64, Option<usize>, f32, Vec<f32>)> {
        let row = |row: u64| (row / 7, (row % 3).checked_sub(1).map(|class| class as usize), row as f32 / 4096.0, axis(row as usize));
        (0..2 * ROWS_PER_BATCH as u64 + 5).map(row).collect()
    }

    #[test]
    fn rows_come_back_as_they_were_written_in_any_order() {
        let rows = rows();
        let (_folder, samples) = samples(&["owl", "wren"], &rows);
        let found = samples.rows().unwrap();
        assert_eq!(found.names, ["owl", "wren"]);
        for (row, (image, class, iou, _)) in rows.iter().enumerate() {
            let expected = (ImageId(*image), class.map(|class| class as u32), iou.to_bits());
            assert_eq!((found.image_of(row), found.classes[row], found.ious[row].to_bits()), expected);
        }
        let embeddings = samples.embeddings().unwrap();
        assert_eq!((embeddings.n_rows, embeddings.dim), (rows.len(), 13));
        let order = [2052, 0, 1023, 1024, 7, 2047, 7];
        let expected: Vec<f32> = order.iter().flat_map(|row| rows[*row].3.clone()).collect();
        assert_eq!(embeddings.gather(order), expected);
        assert_eq!(embeddings.gather([]), Vec::<f32>::new());
        assert_eq!(samples.clip().unwrap(), None);
    }

    #[test]
    fn half_of_the_shards_are_no_samples() {
        let (_folder, samples) = samples(&["owl", "wren"], &rows());
        let half = PromptSamples { shards: samples.shards[..1].to_vec() };
        let said = half.rows().unwrap_err().to_string();
        assert_eq!(said, "samples: expected as many shards of rows as of embeddings, found 0 and 1");
        assert_eq!(half.embeddings().err().unwrap().to_string(), said);
    }

    #[test]
    fn shards_of_other_classes_do_not_go_together() {
        let (_one, one) = samples(&["owl", "wren"], &rows());
        let (_other, other) = samples(&["wren", "owl"], &rows());
        let both = PromptSamples { shards: [one.shards, other.shards].concat() };
        assert!(both.rows().unwrap_err().to_string().ends_with("expected the class names of the shards before"));
    }
}
