//! CLIP features in Arrow shards.
//!
//! `image-features`: `image_id` u64, `embedding` `[D]`. `region-features`: one row per image: `image_id` u64, `width_px` and
//! `height_px` u32 of the original image, and lists of equal length: `embedding` `[N, D]`, `xyxy` f32 `[N, 4]` px of the
//! original image, `objectness` f32 `[N]`.
//!
//! Embeddings are f16 unless a parameter says otherwise. Arrow has no bf16: it is stored as u16 in a field whose metadata
//! says `ovenbird.bf16`. A record batch holds [`ROWS_PER_BATCH`] rows. The schema's metadata says which [`Space`] embeddings are of
//! (`ovenbird.clip`), if known.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, FixedSizeListArray, Float16Array, Float32Array, ListArray, RecordBatch, UInt16Array, UInt32Array,
        UInt64Array,
    },
    buffer::OffsetBuffer,
    datatypes::{DataType, Field, FieldRef, Float16Type, Float32Type, Schema, UInt16Type, UInt32Type, UInt64Type},
};
use half::{bf16, f16, slice::HalfFloatSliceExt as _};
use ovenbird_cache::{
    Digest, DraftFile, Fingerprint,
    inputs::InputFile,
    shard::{Compression, ShardReader, ShardWriter},
};
use ovenbird_data::{annotations::ImageId, boxes::Xyxy, views};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Error, Result,
    clip::space::{SPACE_KEY, Space},
    error::malformed,
};

/// Rows of a record batch: the smallest piece that is checked, and lost, as a whole.
pub(super) const ROWS_PER_BATCH: usize = 128;
const BF16_KEY: &str = "ovenbird.bf16";

/// The number format of stored embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE half precision: three digits of a unit-norm embedding.
    #[default]
    F16,
    /// bfloat16: two digits.
    Bf16,
    /// Single precision: twice the size.
    F32,
}

impl Dtype {
    pub(super) fn field(self, name: &str) -> Field {
        match self {
            Self::F16 => Field::new(name, DataType::Float16, false),
            Self::F32 => Field::new(name, DataType::Float32, false),
            Self::Bf16 => Field::new(name, DataType::UInt16, false).with_metadata(HashMap::from([(BF16_KEY.into(), "true".into())])),
        }
    }

    pub(super) fn array(self, values: &[f32]) -> ArrayRef {
        match self {
            Self::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                Arc::new(Float16Array::from_iter_values(halves))
            }
            Self::F32 => Arc::new(Float32Array::from_iter_values(values.iter().copied())),
            Self::Bf16 => Arc::new(UInt16Array::from_iter_values(values.iter().map(|value| bf16::from_f32(*value).to_bits()))),
        }
    }
}

/// Widens dtype numbers; `None` for a type that is no [`Dtype`].
fn widened(array: &dyn Array) -> Option<Vec<f32>> {
    if let Some(halves) = array.as_primitive_opt::<Float16Type>() {
        let mut numbers = vec![0.0; halves.len()];
        halves.values().convert_to_f32_slice(&mut numbers);
        return Some(numbers);
    }
    if let Some(singles) = array.as_primitive_opt::<Float32Type>() {
        return Some(singles.values().to_vec());
    }
    array.as_primitive_opt::<UInt16Type>().map(|bits| bits.values().iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect())
}

pub(super) fn vectors(item: Field, dim: usize) -> DataType {
    DataType::FixedSizeList(Arc::new(item), dim as i32)
}

pub(super) fn vector_array(item: Field, dim: usize, values: ArrayRef) -> FixedSizeListArray {
    FixedSizeListArray::new(Arc::new(item), dim as i32, values, None)
}

/// Writes `image-features`.
pub struct ImageFeaturesWriter {
    shard: ShardWriter,
    dtype: Dtype,
    dim: usize,
    image_ids: Vec<u64>,
    values: Vec<f32>,
}

impl ImageFeaturesWriter {
    /// Begins the shard of a unit with embeddings of `dim` numbers, of the embedding space `clip`, if known.
    pub fn new(file: DraftFile, unit: &Fingerprint, dtype: Dtype, dim: usize, clip: Option<Space>) -> Result<Self> {
        let schema = Schema::new(vec![
            Field::new("image_id", DataType::UInt64, false),
            Field::new("embedding", vectors(dtype.field("item"), dim), false),
        ])
        .with_metadata(clip.map(Space::entry).into_iter().collect());
        let shard = ShardWriter::new(file, &schema, unit, Compression::None)?;
        Ok(Self { shard, dtype, dim, image_ids: Vec::new(), values: Vec::new() })
    }

    /// Appends one image.
    pub fn push(&mut self, image: ImageId, embedding: &[f32]) -> Result<()> {
        assert_eq!(embedding.len(), self.dim, "BUG: an embedding of another width");
        self.image_ids.push(image.0);
        self.values.extend_from_slice(embedding);
        if self.image_ids.len() == ROWS_PER_BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.image_ids.is_empty() {
            return Ok(());
        }
        let ids: ArrayRef = Arc::new(UInt64Array::from(std::mem::take(&mut self.image_ids)));
        let embeddings = vector_array(self.dtype.field("item"), self.dim, self.dtype.array(&std::mem::take(&mut self.values)));
        let columns = [("image_id", ids), ("embedding", Arc::new(embeddings) as ArrayRef)];
        Ok(self.shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length"))?)
    }

    /// Writes what is left and finishes the file.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        Ok(self.shard.finish()?)
    }
}

/// One embedding per image.
#[derive(Debug, Clone)]
pub struct ImageFeatures {
    shards: Vec<InputFile>,
}

impl Artifact for ImageFeatures {
    const KIND: &'static str = "image-features";
    const EXTENSIONS: &'static [&'static str] = &["arrow", "/"];
    const SHAPE: &'static str = "embeddings that `clip/globals` or `globals/import` made (Arrow)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { shards: files.to_vec() })
    }
}

impl ImageFeatures {
    /// Every image with its embedding `[D]`, in order; each batch is checked as it is reached.
    pub fn rows(&self) -> impl Iterator<Item = Result<(ImageId, Vec<f32>)>> {
        rows_of(&self.shards, image_rows)
    }

    /// The CLIP that made them, if known.
    pub fn clip(&self) -> Result<Option<Space>> {
        clip_of(&self.shards)
    }

    /// The rows by their places.
    pub(crate) fn places(&self) -> Result<Places<'_>> {
        Places::of(&self.shards)
    }
}

impl Places<'_> {
    /// The images of a piece with their embeddings.
    pub(crate) fn images(&self, piece: &Piece) -> Result<Vec<(ImageId, Vec<f32>)>> {
        let (path, batch) = self.batch(piece)?;
        image_rows(path, &batch)
    }

    /// The regions of the images of a piece, one image after the other, and how many numbers an embedding has.
    pub(crate) fn regions(&self, piece: &Piece) -> Result<(impl Iterator<Item = Result<Regions>>, usize)> {
        let (path, batch) = self.batch(piece)?;
        let DataType::FixedSizeList(_, dim) = list_column(path, &batch, "embedding")?.value_type() else {
            return Err(malformed(path, "expected vectors in `embedding`"));
        };
        Ok(((0..batch.num_rows()).map(move |row| Ok(region_rows(path, &batch.slice(row, 1))?.remove(0))), dim as usize))
    }
}

/// The rows of some shards by their places in all of them together.
pub(crate) struct Places<'a> {
    shards: Vec<(&'a InputFile, ShardReader)>,
}

/// Some rows of a record batch.
pub(crate) struct Piece {
    shard: usize,
    batch: usize,
    rows: Range<usize>,
}

impl<'a> Places<'a> {
    fn of(files: &'a [InputFile]) -> Result<Self> {
        let open = |file: &'a InputFile| Ok((file, file.shard()?));
        Ok(Self { shards: files.iter().map(open).collect::<Result<_>>()? })
    }

    /// One digest per row, of its shard's content and its place in it. Reads no row.
    pub(crate) fn items(&self) -> Vec<Digest> {
        let of_shard = |(file, shard): &(&InputFile, ShardReader)| {
            let digest = file.digest;
            (0..shard.stats().rows).map(move |row| Digest::of_list("ovenbird row 1", [(row.to_string().as_str(), digest)]))
        };
        self.shards.iter().flat_map(of_shard).collect()
    }

    /// Some rows, cut where record batches end.
    pub(crate) fn pieces(&self, rows: &Range<usize>) -> Vec<Piece> {
        let (mut pieces, mut before) = (Vec::new(), 0);
        for (shard_idx, (_, shard)) in self.shards.iter().enumerate() {
            let n_rows = shard.stats().rows as usize;
            let [mut row, end] = [rows.start, rows.end].map(|row| row.clamp(before, before + n_rows) - before);
            while row < end {
                let batch = row / ROWS_PER_BATCH;
                let first = batch * ROWS_PER_BATCH;
                let last = end.min(first + ROWS_PER_BATCH);
                pieces.push(Piece { shard: shard_idx, batch, rows: row - first..last - first });
                row = last;
            }
            before += n_rows;
        }
        pieces
    }

    fn batch(&self, Piece { shard, batch, rows }: &Piece) -> Result<(&'a Path, RecordBatch)> {
        let (file, shard) = &self.shards[*shard];
        let n_expected = (shard.stats().rows as usize - batch * ROWS_PER_BATCH).min(ROWS_PER_BATCH);
        let read = if *batch < shard.n_batches() { Some(shard.batch(*batch)?) } else { None };
        match read.filter(|read| read.num_rows() == n_expected) {
            Some(read) => Ok((&file.path, read.slice(rows.start, rows.len()))),
            None => Err(malformed(&file.path, format!("batch {batch}: expected {n_expected} rows, found another number"))),
        }
    }
}

pub(super) fn image_rows(path: &Path, batch: &RecordBatch) -> Result<Vec<(ImageId, Vec<f32>)>> {
    let ids = u64_column(path, batch, "image_id")?;
    let (values, dim) = vector_column(path, column(path, batch, "embedding")?)?;
    Ok(ids.into_iter().map(ImageId).zip(values.chunks(dim.max(1)).map(<[f32]>::to_vec)).collect())
}

/// The rows of every batch of some shards, in order.
pub(super) fn rows_of<R>(
    shards: &[InputFile],
    read: impl Fn(&Path, &RecordBatch) -> Result<Vec<R>> + Copy,
) -> impl Iterator<Item = Result<R>> {
    batches(shards).flat_map(move |batch| flatten_result(batch.and_then(|(path, batch)| read(&path, &batch))))
}

/// The regions of one image with their embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct Regions {
    /// The image.
    pub image_id: ImageId,
    /// Its width and height.
    pub size_px: [u32; 2],
    /// Boxes, N of them.
    pub boxes: Vec<Xyxy>,
    /// Objectness, `[N]`.
    pub objectness: Vec<f32>,
    /// `[N, D]`, row by row.
    pub embeddings: Vec<f32>,
}

/// The box of the first block, which shows the whole image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WholeBox {
    /// The centre square, which the network gets. (Fixes defect 2 in docs/recipes/oadp.md.)
    #[default]
    Fixed,
    /// Its left, top, side and side: the reference stores these as xyxy.
    Reference,
}

impl WholeBox {
    /// The box of an image of `[width, height]` px.
    pub(crate) fn of(self, size: [u32; 2]) -> Xyxy {
        match self {
            Self::Fixed => views::whole_box(size),
            Self::Reference => views::reference_whole_box(size),
        }
    }
}

/// Writes `region-features`.
pub struct RegionFeaturesWriter {
    shard: ShardWriter,
    dtype: Dtype,
    dim: usize,
    rows: Vec<Regions>,
}

impl RegionFeaturesWriter {
    /// Begins the shard of a unit with embeddings of `dim` numbers, of the embedding space `clip`, if known.
    pub fn new(file: DraftFile, unit: &Fingerprint, dtype: Dtype, dim: usize, clip: Option<Space>) -> Result<Self> {
        let schema = Schema::new(vec![
            Field::new("image_id", DataType::UInt64, false),
            Field::new("width_px", DataType::UInt32, false),
            Field::new("height_px", DataType::UInt32, false),
            list_field("embedding", embedding_field(dtype, dim)),
            list_field("xyxy", box_field()),
            list_field("objectness", score_field()),
        ])
        .with_metadata(clip.map(Space::entry).into_iter().collect());
        let shard = ShardWriter::new(file, &schema, unit, Compression::None)?;
        Ok(Self { shard, dtype, dim, rows: Vec::new() })
    }

    /// Appends one image, which may have no regions.
    pub fn push(&mut self, regions: Regions) -> Result<()> {
        assert_eq!(regions.embeddings.len(), regions.boxes.len() * self.dim, "BUG: embeddings of another width");
        self.rows.push(regions);
        if self.rows.len() == ROWS_PER_BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        let offsets = OffsetBuffer::<i32>::from_lengths(rows.iter().map(|row| row.boxes.len()));
        let list = |item: FieldRef, values: ArrayRef| -> ArrayRef { Arc::new(ListArray::new(item, offsets.clone(), values, None)) };
        let flat = |values: fn(&Regions) -> &[f32]| rows.iter().map(values).collect::<Vec<_>>().concat();
        let embeddings = self.dtype.array(&flat(|row| &row.embeddings));
        let embeddings = vector_array(self.dtype.field("item"), self.dim, embeddings);
        let corners = |xyxy: &Xyxy| [xyxy.x1, xyxy.y1, xyxy.x2, xyxy.y2];
        let corners: Vec<f32> = rows.iter().flat_map(|row| row.boxes.iter().flat_map(corners)).collect();
        let boxes = vector_array(Dtype::F32.field("item"), 4, Dtype::F32.array(&corners));
        let side = |axis: usize| -> ArrayRef { Arc::new(UInt32Array::from_iter_values(rows.iter().map(|row| row.size_px[axis]))) };
        let columns: [(&str, ArrayRef); 6] = [
            ("image_id", Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| row.image_id.0)))),
            ("width_px", side(0)),
            ("height_px", side(1)),
            ("embedding", list(embedding_field(self.dtype, self.dim), Arc::new(embeddings))),
            ("xyxy", list(box_field(), Arc::new(boxes))),
            ("objectness", list(score_field(), Dtype::F32.array(&flat(|row| &row.objectness)))),
        ];
        Ok(self.shard.write(&RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length"))?)
    }

    /// Writes what is left and finishes the file.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        Ok(self.shard.finish()?)
    }
}

pub(super) fn list_field(name: &str, item: FieldRef) -> Field {
    Field::new(name, DataType::List(item), false)
}

pub(super) fn embedding_field(dtype: Dtype, dim: usize) -> FieldRef {
    Arc::new(Field::new("item", vectors(dtype.field("item"), dim), false))
}

fn box_field() -> FieldRef {
    embedding_field(Dtype::F32, 4)
}

fn score_field() -> FieldRef {
    Arc::new(Dtype::F32.field("item"))
}

/// Embeddings of the regions of each image.
#[derive(Debug, Clone)]
pub struct RegionFeatures {
    shards: Vec<InputFile>,
}

impl Artifact for RegionFeatures {
    const KIND: &'static str = "region-features";
    const EXTENSIONS: &'static [&'static str] = &["arrow", "/"];
    const SHAPE: &'static str = "embeddings that `clip/blocks`, `clip/objects`, `clip/proposals` or an import of these made (Arrow)";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { shards: files.to_vec() })
    }
}

impl RegionFeatures {
    /// Every image with its regions, in order; each batch is checked as it is reached.
    pub fn rows(&self) -> impl Iterator<Item = Result<Regions>> {
        rows_of(&self.shards, region_rows)
    }

    /// The CLIP that made them, if known.
    pub fn clip(&self) -> Result<Option<Space>> {
        clip_of(&self.shards)
    }

    /// The rows by their places.
    pub(crate) fn places(&self) -> Result<Places<'_>> {
        Places::of(&self.shards)
    }

    /// The numbers of an embedding.
    pub(crate) fn dim(&self) -> Result<usize> {
        let Some(file) = self.shards.first() else {
            return Err(Error::Input {
                port: "features",
                problem: "expected at least one shard, found none".into(),
                hint: "give embeddings of some images".into(),
            });
        };
        let shard = file.shard()?;
        let item = shard.schema().field_with_name("embedding").ok().and_then(|field| match field.data_type() {
            DataType::List(item) => Some(item.data_type().clone()),
            _ => None,
        });
        match item {
            Some(DataType::FixedSizeList(_, dim)) => Ok(dim as usize),
            _ => Err(malformed(&file.path, "expected lists of vectors in `embedding`")),
        }
    }
}

/// The regions of some images, as they lie in the memory map.
pub(crate) struct RegionBatch {
    path: PathBuf,
    batch: RecordBatch,
}

/// Embeddings `[N, D]` in the number format of their shard; bf16 is widened.
pub(crate) enum Embeddings<'a> {
    F16(&'a [f16]),
    F32(Cow<'a, [f32]>),
}

impl RegionBatch {
    /// The numbers of all embeddings, region by region.
    pub(crate) fn embeddings(&self) -> Result<Embeddings<'_>> {
        let lists = list_column(&self.path, &self.batch, "embedding")?;
        let [first, last] = [0, lists.len()].map(|row| lists.value_offsets()[row] as usize);
        let vectors = lists.values().as_fixed_size_list_opt().ok_or_else(|| malformed(&self.path, "expected vectors"))?;
        let dim = vectors.value_length() as usize;
        let numbers = (vectors.offset() + first) * dim..(vectors.offset() + last) * dim;
        if let Some(halves) = vectors.values().as_primitive_opt::<Float16Type>() {
            return Ok(Embeddings::F16(&halves.values()[numbers]));
        }
        if let Some(singles) = vectors.values().as_primitive_opt::<Float32Type>() {
            return Ok(Embeddings::F32(Cow::Borrowed(&singles.values()[numbers])));
        }
        let values = vectors.values().slice(numbers.start, numbers.len());
        Ok(Embeddings::F32(widened(&values).ok_or_else(|| malformed(&self.path, "expected f16, bf16 or f32"))?.into()))
    }

    /// The objectness of all regions.
    pub(crate) fn objectness(&self) -> Result<Vec<f32>> {
        let lists = list_column(&self.path, &self.batch, "objectness")?;
        let [first, last] = [0, lists.len()].map(|row| lists.value_offsets()[row] as usize);
        widened(&lists.values().slice(first, last - first)).ok_or_else(|| malformed(&self.path, "expected numbers in `objectness`"))
    }

    /// The image and the box of a region, by its place in the batch.
    pub(crate) fn region(&self, place: usize) -> Result<(ImageId, Xyxy)> {
        let lists = list_column(&self.path, &self.batch, "xyxy")?;
        let offsets = lists.value_offsets();
        let place = place + offsets[0] as usize;
        let row = offsets.partition_point(|offset| *offset as usize <= place) - 1;
        let image = u64_column(&self.path, &self.batch, "image_id")?[row];
        let (corners, four) = vector_column(&self.path, &lists.values().slice(place, 1))?;
        match corners[..] {
            [x1, y1, x2, y2] if four == 4 => Ok((ImageId(image), Xyxy { x1, y1, x2, y2 })),
            _ => Err(malformed(&self.path, "expected vectors of 4 in `xyxy`")),
        }
    }
}

impl RegionFeatures {
    /// The number of shards.
    pub(crate) fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// The record batches of some shards in order; each is checked as it is reached.
    pub(crate) fn batches(&self, shards: Range<usize>) -> impl Iterator<Item = Result<RegionBatch>> {
        batches(&self.shards[shards]).map(|batch| batch.map(|(path, batch)| RegionBatch { path, batch }))
    }

    /// Makes regions accessible by image.
    pub(crate) fn by_image(&self) -> Result<ByImage<Regions>> {
        ByImage::of(&self.shards, region_rows)
    }
}

impl ImageFeatures {
    /// Makes embeddings accessible by image.
    pub(crate) fn by_image(&self) -> Result<ByImage<(ImageId, Vec<f32>)>> {
        ByImage::of(&self.shards, image_rows)
    }
}

/// Rows of images, read from the memory map when they are asked for.
pub(crate) struct ByImage<R> {
    batches: Vec<(PathBuf, RecordBatch)>,
    /// Batch and row of each image.
    places: BTreeMap<ImageId, (usize, usize)>,
    read: fn(&Path, &RecordBatch) -> Result<Vec<R>>,
}

impl<R> ByImage<R> {
    /// Checks every batch once, and indexes the images. Rows are read later, when they are asked for.
    fn of(shards: &[InputFile], read: fn(&Path, &RecordBatch) -> Result<Vec<R>>) -> Result<Self> {
        let batches = batches(shards).collect::<Result<Vec<_>>>()?;
        let mut places = BTreeMap::new();
        for (batch_idx, (path, batch)) in batches.iter().enumerate() {
            let ids = u64_column(path, batch, "image_id")?.into_iter().enumerate();
            places.extend(ids.map(|(row_idx, image)| (ImageId(image), (batch_idx, row_idx))));
        }
        Ok(Self { batches, places, read })
    }

    /// Whether there is a row for an image, with or without regions.
    pub(crate) fn has(&self, image: ImageId) -> bool {
        self.places.contains_key(&image)
    }

    /// The row of an image that has one.
    pub(crate) fn get(&self, image: ImageId) -> Result<R> {
        let (batch_idx, row_idx) = self.places[&image];
        let (path, batch) = &self.batches[batch_idx];
        Ok((self.read)(path, &batch.slice(row_idx, 1))?.remove(0))
    }
}

pub(super) fn region_rows(path: &Path, batch: &RecordBatch) -> Result<Vec<Regions>> {
    let ids = u64_column(path, batch, "image_id")?;
    let side = |name: &str| {
        let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt32Type>());
        column.ok_or_else(|| malformed(path, format!("expected a column `{name}` of u32")))
    };
    let (widths, heights) = (side("width_px")?, side("height_px")?);
    let embeddings = list_column(path, batch, "embedding")?;
    let (boxes, scores) = (list_column(path, batch, "xyxy")?, list_column(path, batch, "objectness")?);
    let row = |(row_idx, image_id): (usize, u64)| {
        let (embeddings, _) = vector_column(path, &embeddings.value(row_idx))?;
        let (corners, four) = vector_column(path, &boxes.value(row_idx))?;
        let objectness = widened(&scores.value(row_idx)).ok_or_else(|| malformed(path, "expected numbers in `objectness`"))?;
        if four != 4 || corners.len() != 4 * objectness.len() {
            return Err(malformed(path, format!("image {image_id}: boxes and objectness do not have the same length")));
        }
        let boxes = corners.chunks_exact(4).map(|corner| Xyxy { x1: corner[0], y1: corner[1], x2: corner[2], y2: corner[3] }).collect();
        let size_px = [widths.value(row_idx), heights.value(row_idx)];
        Ok(Regions { image_id: ImageId(image_id), size_px, boxes, objectness, embeddings })
    };
    ids.into_iter().enumerate().map(row).collect()
}

/// The space that all of some shards say their embeddings are of.
pub(super) fn clip_of(shards: &[InputFile]) -> Result<Option<Space>> {
    let clip = |file: &InputFile| {
        let shard = file.shard()?;
        Space::read(shard.schema().metadata().get(SPACE_KEY)).map_err(|problem| malformed(&file.path, problem))
    };
    let Some((first, rest)) = shards.split_first() else { return Ok(None) };
    let expected = clip(first)?;
    for file in rest {
        if clip(file)? != expected {
            return Err(Error::Input {
                port: "features",
                problem: format!("{} and {} are of different CLIPs", first.path.display(), file.path.display()),
                hint: "give shards of one CLIP".into(),
            });
        }
    }
    Ok(expected)
}

/// Every record batch of some shards in order, with the path of its shard for messages.
pub(super) fn batches(shards: &[InputFile]) -> impl Iterator<Item = Result<(PathBuf, RecordBatch)>> {
    shards.iter().flat_map(|file| {
        let batches = file.shard().map(|shard| {
            let n_batches = shard.n_batches();
            (0..n_batches).map(move |batch_idx| Ok((file.path.clone(), shard.batch(batch_idx)?)))
        });
        let (batches, error) = match batches {
            Ok(batches) => (Some(batches), None),
            Err(error) => (None, Some(Err(error.into()))),
        };
        batches.into_iter().flatten().chain(error)
    })
}

fn flatten_result<T>(rows: Result<Vec<T>>) -> impl Iterator<Item = Result<T>> {
    let (rows, error) = match rows {
        Ok(rows) => (rows, None),
        Err(error) => (Vec::new(), Some(Err(error))),
    };
    rows.into_iter().map(Ok).chain(error)
}

pub(super) fn column<'a>(path: &Path, batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    batch.column_by_name(name).ok_or_else(|| malformed(path, format!("expected a column `{name}`")))
}

pub(super) fn u64_column(path: &Path, batch: &RecordBatch, name: &str) -> Result<Vec<u64>> {
    let ids = column(path, batch, name)?.as_primitive_opt::<UInt64Type>();
    Ok(ids.ok_or_else(|| malformed(path, format!("expected u64 in `{name}`")))?.values().to_vec())
}

pub(super) fn list_column<'a>(path: &Path, batch: &'a RecordBatch, name: &str) -> Result<&'a ListArray> {
    let list = column(path, batch, name)?.as_list_opt::<i32>();
    list.ok_or_else(|| malformed(path, format!("expected lists in `{name}`")))
}

/// The numbers of a column of vectors, and how many each vector has.
pub(super) fn vector_column(path: &Path, array: &ArrayRef) -> Result<(Vec<f32>, usize)> {
    let vectors = array.as_fixed_size_list_opt().ok_or_else(|| malformed(path, "expected vectors"))?;
    let dim = vectors.value_length() as usize;
    let values = vectors.values().slice(vectors.offset() * dim, vectors.len() * dim);
    Ok((widened(&values).ok_or_else(|| malformed(path, "expected f16, bf16 or f32"))?, dim))
}
