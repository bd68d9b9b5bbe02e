//! Feature shards: Arrow IPC files with a BLAKE3 for each record batch, read through a memory map without copying.
//!
//! Layout: an ordinary Arrow IPC file (any Arrow reader opens it).
//! - Schema metadata: `ovenbird.shard` = format version, `ovenbird.unit` = fingerprint of the unit, 64 hexadecimal digits; and the
//!   writer's own entries, which hold for all rows.
//! - Footer metadata: `ovenbird.digests` = JSON list with the BLAKE3 of each record batch, over the bytes of its message and body
//!   in the file; `ovenbird.stats` = [`Stats`] as JSON; `ovenbird.root` = BLAKE3, keyed by the unit's fingerprint, of the columns
//!   with the writer's metadata, the digests and the stats.
//!
//! The unit's fingerprint depends on the recipe and on the digests of its items: a valid shard in the wrong place, or of another
//! model, does not match. (The index of a unit in a list is not part of it: data sets share units.) Offsets are u64.
//!
//! The *content* digest of a shard covers its columns, the writer's metadata and its batches, but not the unit's fingerprint: equal
//! features of two recipes are the same input for downstream stages.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::RecordBatch,
    buffer::Buffer,
    datatypes::{Schema, SchemaRef},
    error::ArrowError,
    ipc::{
        Block, CompressionType,
        convert::fb_to_schema,
        reader::{FileDecoder, read_footer_length},
        root_as_footer,
        writer::{FileWriter, IpcWriteOptions},
    },
};

use crate::{
    Digest, DraftFile, Error, Fingerprint, Result,
    stats::{Stats, StatsBuilder, invalid_values},
};

/// The format version that this program reads and writes.
pub const FORMAT: u32 = 2;
const FORMAT_KEY: &str = "ovenbird.shard";
const UNIT_KEY: &str = "ovenbird.unit";
const DIGESTS_KEY: &str = "ovenbird.digests";
const STATS_KEY: &str = "ovenbird.stats";
const ROOT_KEY: &str = "ovenbird.root";
/// `ARROW1` and two bytes of padding.
const HEADER_BYTES: usize = 8;
/// Length of the footer (i32) and `ARROW1`.
const TRAILER_BYTES: usize = 10;

/// The compression of batches. zstd saves 8 % on unit-norm CLIP features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Uncompressed: readers use the memory map without copying.
    None,
    /// zstd for each buffer: readers decompress into memory.
    Zstd,
}

/// Writes a shard into a draft.
pub struct ShardWriter {
    writer: FileWriter<Tee>,
    unit: Fingerprint,
    columns: String,
    stats: StatsBuilder,
    digests: Vec<Digest>,
    path: PathBuf,
}

/// Writes to a file, and hashes the bytes since the last mark.
struct Tee {
    file: DraftFile,
    since_mark: blake3::Hasher,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n_written = self.file.write(bytes)?;
        self.since_mark.update(&bytes[..n_written]);
        Ok(n_written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl ShardWriter {
    /// Starts a shard of a unit. `schema` must not use dictionaries.
    pub fn new(file: DraftFile, schema: &Schema, unit: &Fingerprint, compression: Compression) -> Result<Self> {
        let path = file.path().to_owned();
        let mut metadata: HashMap<String, String> = schema.metadata().clone();
        metadata.insert(FORMAT_KEY.into(), FORMAT.to_string());
        metadata.insert(UNIT_KEY.into(), unit.to_hex());
        let codec = match compression {
            Compression::None => None,
            Compression::Zstd => Some(CompressionType::ZSTD),
        };
        let begin = || {
            let options = IpcWriteOptions::default().try_with_compression(codec)?;
            let schema = schema.clone().with_metadata(metadata);
            FileWriter::try_new_with_options(Tee { file, since_mark: blake3::Hasher::new() }, &schema, options)
        };
        let writer = begin().map_err(|error| from_arrow(&path, error))?;
        let stats = StatsBuilder::default();
        let mut shard = Self { writer, unit: *unit, columns: columns(schema), stats, digests: Vec::new(), path };
        let _header: blake3::Hash = shard.mark();
        Ok(shard)
    }

    /// Appends a record batch.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.writer.write(batch).map_err(|error| from_arrow(&self.path, error))?;
        let digest = self.mark();
        self.digests.push(digest.into());
        self.stats.add(batch);
        Ok(())
    }

    /// Writes the footer, fsyncs, and adds the file to its draft. Fails with [`Error::Unsound`] if values are invalid.
    pub fn finish(mut self) -> Result<()> {
        let digests = serde_json::to_string(&self.digests).expect("BUG: a list of strings is plain JSON");
        let stats = self.stats.finish();
        // The same check as in `verify`.
        if let Some(problem) = invalid_values(&stats).into_iter().next() {
            return Err(Error::Unsound { what: format!("a shard of unit {}", self.unit), problem });
        }
        let stats = serde_json::to_string(&stats).expect("BUG: numbers are plain JSON");
        self.writer.write_metadata(ROOT_KEY, root(&self.unit, &self.columns, &digests, &stats).to_hex());
        self.writer.write_metadata(DIGESTS_KEY, digests);
        self.writer.write_metadata(STATS_KEY, stats);
        let tee = self.writer.into_inner().map_err(|error| from_arrow(&self.path, error))?;
        tee.file.finish_with(Some(content(&self.columns, &self.digests)))
    }

    fn mark(&mut self) -> blake3::Hash {
        let since_mark = &mut self.writer.get_mut().since_mark;
        let digest = since_mark.finalize();
        since_mark.reset();
        digest
    }
}

/// The columns as text: one line per column with name, type and nullability, then one line per entry of the writer's metadata, by key.
fn columns(schema: &Schema) -> String {
    let columns = schema.fields().iter().map(|field| format!("{} {} {}\n", field.name(), field.data_type(), field.is_nullable()));
    let metadata = schema.metadata().iter().filter(|(key, _)| ![FORMAT_KEY, UNIT_KEY].contains(&key.as_str()));
    let metadata: BTreeMap<&String, &String> = metadata.collect();
    columns.chain(metadata.into_iter().map(|(key, value)| format!("{key} = {value}\n"))).collect()
}

/// The content digest, as described at the top of this file.
fn content(columns: &str, digests: &[Digest]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(columns.as_bytes());
    for digest in digests {
        hasher.update(digest.as_bytes());
    }
    hasher.finalize().into()
}

fn root(unit: &Fingerprint, columns: &str, digests: &str, stats: &str) -> Digest {
    let mut hasher = blake3::Hasher::new_keyed(unit.as_bytes());
    for part in [columns, digests, stats] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().into()
}

fn from_arrow(path: &Path, error: ArrowError) -> Error {
    match error {
        ArrowError::IoError(_, source) => Error::write(path, source),
        other => Error::malformed(path, other.to_string()),
    }
}

/// An open shard. Its batches share the memory map, which is freed with the last of them.
#[derive(Debug)]
pub struct ShardReader {
    path: PathBuf,
    bytes: Buffer,
    decoder: FileDecoder,
    blocks: Vec<Block>,
    digests: Vec<Digest>,
    schema: SchemaRef,
    unit: Fingerprint,
    stats: Stats,
}

impl ShardReader {
    /// Opens a shard and checks its footer; each batch is checked when it is read. Fails if the shard belongs to another unit than
    /// `unit`; `None` accepts any.
    pub fn open(path: &Path, unit: Option<&Fingerprint>) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::read(path, source))?;
        let bytes = map(&file).map_err(|source| Error::read(path, source))?;
        let shard = Self::from_bytes(path, &bytes)?;
        match unit {
            Some(unit) if *unit != shard.unit => {
                Err(Error::malformed(path, format!("is a shard of unit {}, expected a shard of unit {unit}", shard.unit)))
            }
            _ => Ok(shard),
        }
    }

    fn from_bytes(path: &Path, bytes: &Buffer) -> Result<Self> {
        let malformed = |problem: String| Error::malformed(path, problem);
        if bytes.len() < HEADER_BYTES + TRAILER_BYTES || &bytes[..6] != b"ARROW1" {
            return Err(malformed(format!("expected a feature shard, found {} bytes that do not start with ARROW1", bytes.len())));
        }
        let body = bytes.len() - TRAILER_BYTES;
        let trailer = bytes[body..].try_into().expect("BUG: the trailer has ten bytes");
        let footer_bytes =
            read_footer_length(trailer).map_err(|_| malformed("expected a footer at the end, found none: the file is cut short".into()))?;
        let start = body.checked_sub(footer_bytes).filter(|start| *start >= HEADER_BYTES);
        let start = start.ok_or_else(|| malformed(format!("footer of {footer_bytes} bytes lies outside the file")))?;
        let footer = root_as_footer(&bytes[start..body]).map_err(|error| malformed(format!("footer: {error}")))?;
        let schema = footer.schema().filter(|schema| schema.fields().is_some_and(|fields| fields.iter().all(|field| is_known(&field))));
        let schema = fb_to_schema(schema.ok_or_else(|| malformed("expected a schema of known types in the footer".into()))?);

        let version = schema.metadata().get(FORMAT_KEY).and_then(|version| version.parse().ok());
        let version: u32 = version.ok_or_else(|| malformed(format!("expected `{FORMAT_KEY}` in the schema: not a feature shard")))?;
        let other_format = Error::OtherFormat { path: path.to_owned(), found: version, known: FORMAT };
        let unit = schema.metadata().get(UNIT_KEY).and_then(|unit| unit.parse().ok());
        let unit = unit.ok_or_else(|| malformed(format!("expected a fingerprint at `{UNIT_KEY}`")))?;
        let metadata = |key: &str| {
            let entry = footer.custom_metadata().into_iter().flatten().find(|entry| entry.key() == Some(key));
            entry.and_then(|entry| entry.value()).ok_or_else(|| malformed(format!("expected `{key}` in the footer")))
        };
        let (digests_text, stats_text, expected) = (metadata(DIGESTS_KEY)?, metadata(STATS_KEY)?, metadata(ROOT_KEY)?);
        let found = root(&unit, &columns(&schema), digests_text, stats_text);
        let expected: Digest = expected.parse().map_err(|_| malformed(format!("expected a digest at `{ROOT_KEY}`")))?;
        match (version == FORMAT, expected == found) {
            (true, _) => {}
            (false, true) => return Err(malformed(format!("says format {version}, but its digest is that of format {FORMAT}"))),
            (false, false) => return Err(other_format),
        }
        if expected != found {
            return Err(Error::Flipped { path: path.to_owned(), what: "the footer".into(), expected, found });
        }
        let digests: Vec<Digest> = serde_json::from_str(digests_text).map_err(|error| malformed(format!("`{DIGESTS_KEY}`: {error}")))?;
        let stats: Stats = serde_json::from_str(stats_text).map_err(|error| malformed(format!("`{STATS_KEY}`: {error}")))?;

        let blocks: Vec<Block> = footer.recordBatches().into_iter().flatten().copied().collect();
        if blocks.len() != digests.len() {
            return Err(malformed(format!("{} record batches, but {} digests", blocks.len(), digests.len())));
        }
        for (batch_idx, block) in blocks.iter().enumerate() {
            let end = extent(block).and_then(|(offset, length)| offset.checked_add(length));
            if end.is_none_or(|end| end > start) {
                return Err(malformed(format!("batch {batch_idx} lies outside the file")));
            }
        }
        let schema = Arc::new(schema);
        let decoder = FileDecoder::new(Arc::clone(&schema), footer.version());
        Ok(Self { path: path.to_owned(), bytes: bytes.clone(), decoder, blocks, digests, schema, unit, stats })
    }

    /// The schema, with the writer's metadata.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The unit that the shard belongs to.
    pub fn unit(&self) -> Fingerprint {
        self.unit
    }

    /// The content digest, from the footer; it does not depend on the unit.
    pub fn content(&self) -> Digest {
        content(&columns(&self.schema), &self.digests)
    }

    /// The statistics of the rows.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The number of record batches.
    pub fn n_batches(&self) -> usize {
        self.blocks.len()
    }

    /// Checks a record batch against its digest and returns it without copying.
    pub fn batch(&self, batch_idx: usize) -> Result<RecordBatch> {
        let block = &self.blocks[batch_idx];
        let (offset, length) = extent(block).expect("BUG: blocks were checked when the shard was opened");
        let bytes = self.bytes.slice_with_length(offset, length);
        let (expected, found) = (self.digests[batch_idx], Digest::of(&bytes));
        if expected != found {
            return Err(Error::Flipped { path: self.path.clone(), what: format!("batch {batch_idx}"), expected, found });
        }
        let batch = self.decoder.read_record_batch(block, &bytes).map_err(|error| Error::malformed(&self.path, error.to_string()))?;
        batch.ok_or_else(|| Error::malformed(&self.path, format!("batch {batch_idx} is empty")))
    }

    /// All record batches in order, each checked when it is read.
    pub fn batches(&self) -> impl Iterator<Item = Result<RecordBatch>> {
        (0..self.n_batches()).map(|batch_idx| self.batch(batch_idx))
    }
}

/// Whether shards have columns of this type. Arrow's conversion panics at types that it does not know, and a footer may be damaged.
fn is_known(field: &arrow::ipc::Field<'_>) -> bool {
    use arrow::ipc::{Precision, Type};
    let has_known_child = || field.children().is_some_and(|children| children.len() == 1 && is_known(&children.get(0)));
    field.name().is_some()
        && field.dictionary().is_none()
        && match field.type_type() {
            Type::Int => field.type_as_int().is_some_and(|int| [8, 16, 32, 64].contains(&int.bitWidth())),
            Type::FloatingPoint => {
                let known = [Precision::HALF, Precision::SINGLE, Precision::DOUBLE];
                field.type_as_floating_point().is_some_and(|float| known.contains(&float.precision()))
            }
            Type::Utf8 | Type::Binary | Type::LargeUtf8 | Type::LargeBinary | Type::Bool => true,
            Type::List | Type::LargeList => has_known_child(),
            Type::FixedSizeList => field.type_as_fixed_size_list().is_some() && has_known_child(),
            _ => false,
        }
}

fn extent(block: &Block) -> Option<(usize, usize)> {
    let length = usize::try_from(block.metaDataLength()).ok()?.checked_add(usize::try_from(block.bodyLength()).ok()?)?;
    Some((usize::try_from(block.offset()).ok()?, length))
}

#[expect(unsafe_code, reason = "a memory map is sound only while the file is not truncated: published files are immutable")]
fn map(file: &File) -> std::io::Result<Buffer> {
    // SAFETY: shards are renamed into place whole and never written again; replacing a shard creates a new inode and does not
    // change this map.
    let map = unsafe { memmap2::Mmap::map(file)? };
    Ok(Buffer::from(bytes::Bytes::from_owner(map)))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use arrow::{
        array::{ArrayRef, AsArray, Float16Array, ListArray, UInt64Array},
        datatypes::{DataType, Field, Float16Type, UInt64Type},
    };
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::{FileRecord, publish::Publisher};

    fn unit() -> Fingerprint {
        blake3::hash(b"unit").into()
    }

    fn schema() -> Schema {
        let ragged = DataType::List(Arc::new(Field::new_list_field(DataType::Float16, true)));
        Schema::new(vec![Field::new("image_id", DataType::UInt64, false), Field::new("values", ragged, false)])
    }

    /// One batch from ragged rows: image ids and, for each, any number of values.
    fn batch(rows: &[(u64, Vec<f16>)]) -> RecordBatch {
        let ids: ArrayRef = Arc::new(UInt64Array::from_iter_values(rows.iter().map(|(id, _)| *id)));
        let values = ListArray::from_iter_primitive::<Float16Type, _, _>(
            rows.iter().map(|(_, values)| Some(values.iter().copied().map(Some).collect::<Vec<_>>())),
        );
        RecordBatch::try_new(Arc::new(schema()), vec![ids, Arc::new(values)]).unwrap()
    }

    fn written(home: &Path, batches: &[RecordBatch], unit: Fingerprint, compression: Compression) -> (PathBuf, FileRecord) {
        written_with(&schema(), home, batches, unit, compression)
    }

    fn written_with(
        schema: &Schema,
        home: &Path,
        batches: &[RecordBatch],
        unit: Fingerprint,
        compression: Compression,
    ) -> (PathBuf, FileRecord) {
        let target = home.join(unit.to_hex());
        let draft = Publisher::default().begin(&target).unwrap();
        let mut shard = ShardWriter::new(draft.create("features/0.arrow").unwrap(), schema, &unit, compression).unwrap();
        for batch in batches {
            shard.write(batch).unwrap();
        }
        shard.finish().unwrap();
        let record = draft.files()[0].clone();
        draft.commit("unit.json", b"{}").unwrap();
        (target.join("features/0.arrow"), record)
    }

    fn halves(values: &[f32]) -> Vec<f16> {
        values.iter().copied().map(f16::from_f32).collect()
    }

    fn two_batches() -> [RecordBatch; 2] {
        [batch(&[(1, halves(&[1.0, 2.0])), (2, vec![])]), batch(&[(3, halves(&[f32::NAN]))])]
    }

    #[test]
    fn a_shard_returns_the_rows_and_the_unit_it_was_written_with() {
        let home = tempfile::tempdir().unwrap();
        for (compression, unit) in [(Compression::None, unit()), (Compression::Zstd, blake3::hash(b"zstd").into())] {
            let (path, _) = written(home.path(), &two_batches(), unit, compression);
            let reader = ShardReader::open(&path, None).unwrap();
            assert_eq!(reader.unit(), unit);
            let ids: Vec<u64> =
                reader.batches().flat_map(|batch| batch.unwrap().column(0).as_primitive::<UInt64Type>().values().to_vec()).collect();
            assert_eq!(ids, [1, 2, 3]);
            let last = reader.batch(1).unwrap();
            let values: &Float16Array = last.column(1).as_list::<i32>().values().as_primitive();
            assert!(values.value(0).is_nan());
        }
    }

    #[test]
    fn the_content_digest_depends_on_every_value_and_not_on_the_unit() {
        let home = tempfile::tempdir().unwrap();
        let (_, first) = written(home.path(), &two_batches(), unit(), Compression::None);
        let (_, other_unit) = written(home.path(), &two_batches(), blake3::hash(b"other").into(), Compression::None);
        let mut changed = two_batches();
        changed[1] = batch(&[(3, halves(&[0.0]))]);
        let (_, other_value) = written(home.path(), &changed, blake3::hash(b"third").into(), Compression::None);
        assert_ne!(first.digest, other_unit.digest);
        assert_eq!(first.content(), other_unit.content());
        assert_ne!(first.content(), other_value.content());
    }

    #[test]
    fn the_writers_metadata_are_content_and_are_sealed() {
        let home = tempfile::tempdir().unwrap();
        let with = |value: &str| {
            let schema = schema().with_metadata(HashMap::from([("who".to_owned(), value.to_owned())]));
            written_with(&schema, &home.path().join(value), &two_batches(), unit(), Compression::None)
        };
        let ((path, one), (_, other)) = (with("this-one"), with("that-one"));
        let (_, nothing) = written(home.path(), &two_batches(), unit(), Compression::None);
        assert!(one.content() != other.content() && one.content() != nothing.content());
        assert_eq!(ShardReader::open(&path, None).unwrap().schema().metadata()["who"], "this-one");

        let mut bytes = fs::read(&path).unwrap();
        let places: Vec<usize> = (0..bytes.len() - 8).filter(|at| &bytes[*at..*at + 8] == b"this-one").collect();
        assert!(!places.is_empty());
        for at in places {
            bytes[at..at + 8].copy_from_slice(b"that-one");
        }
        let problem = ShardReader::from_bytes(&path, &Buffer::from(bytes)).unwrap_err();
        assert!(matches!(problem, Error::Flipped { .. }), "{problem}");
    }

    #[test]
    fn the_same_rows_have_the_same_bytes() {
        let home = tempfile::tempdir().unwrap();
        let digests = ["one", "two"].map(|folder| written(&home.path().join(folder), &two_batches(), unit(), Compression::None).1.digest);
        assert_eq!(digests[0], digests[1]);
    }

    #[test]
    fn batches_are_mapped_not_copied() {
        let home = tempfile::tempdir().unwrap();
        let (path, _) = written(home.path(), &two_batches(), unit(), Compression::None);
        let reader = ShardReader::open(&path, None).unwrap();
        let batch = reader.batch(0).unwrap();
        let ids = batch.column(0).as_primitive::<UInt64Type>().values().as_ptr() as usize;
        let map = reader.bytes.as_ptr() as usize;
        assert!((map..map + reader.bytes.len()).contains(&ids));
    }

    #[test]
    fn every_flipped_byte_of_a_batch_is_found() {
        let home = tempfile::tempdir().unwrap();
        let (path, _) = written(home.path(), &two_batches(), unit(), Compression::None);
        let sound = fs::read(&path).unwrap();
        let reader = ShardReader::open(&path, None).unwrap();
        let (offset, length) = extent(&reader.blocks[1]).unwrap();
        for at in offset..offset + length {
            let mut damaged = sound.clone();
            damaged[at] ^= 0x10;
            let reader = ShardReader::from_bytes(&path, &Buffer::from(damaged)).unwrap();
            assert!(reader.batch(0).is_ok());
            assert!(matches!(reader.batch(1), Err(Error::Flipped { .. })), "byte {at}");
        }
    }

    /// Arrow's conversion of a schema panics at types that it does not know; a flipped bit may create such a type.
    #[test]
    fn a_flipped_bit_of_a_footer_is_found_or_changes_nothing_and_never_panics() {
        let home = tempfile::tempdir().unwrap();
        let (path, _) = written(home.path(), &two_batches(), unit(), Compression::None);
        let sound = fs::read(&path).unwrap();
        let (content, blocks) = {
            let reader = ShardReader::open(&path, None).unwrap();
            (reader.content(), reader.blocks.clone())
        };
        let last = blocks.iter().filter_map(extent).map(|(offset, length)| offset + length).max().unwrap();
        let mut n_found = 0;
        for bit in last * 8..sound.len() * 8 {
            let mut damaged = sound.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            match ShardReader::from_bytes(&path, &Buffer::from(damaged)) {
                Err(Error::Flipped { .. } | Error::Malformed { .. }) => n_found += 1,
                Err(error) => panic!("bit {bit}: {error}"),
                Ok(reader) => {
                    assert_eq!(reader.content(), content, "bit {bit}");
                    for batch_idx in 0..reader.n_batches() {
                        let _found_or_the_same = reader.batch(batch_idx).map(|batch| assert!(batch.num_rows() > 0));
                    }
                }
            }
        }
        assert!(n_found > 1000, "{n_found}");
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_not_a_panic() {
        let home = tempfile::tempdir().unwrap();
        let (path, _) = written(home.path(), &two_batches(), unit(), Compression::None);
        let sound = fs::read(&path).unwrap();
        for length in 0..sound.len() {
            let problem = ShardReader::from_bytes(&path, &Buffer::from(sound[..length].to_vec())).unwrap_err();
            assert!(matches!(problem, Error::Malformed { .. }), "cut to {length}: {problem}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_with_both_versions() {
        let home = tempfile::tempdir().unwrap();
        let (path, _) = written(home.path(), &two_batches(), unit(), Compression::None);
        let mut bytes = fs::read(&path).unwrap();
        // The key is followed by its value: a length-prefixed string "2".
        let keys: Vec<usize> = (0..bytes.len() - 14).filter(|at| &bytes[*at..*at + 14] == FORMAT_KEY.as_bytes()).collect();
        for key in keys {
            for at in key.saturating_sub(24)..key + 40 {
                if bytes[at] == b'2' && bytes[at - 4..at] == [1, 0, 0, 0] {
                    bytes[at] = b'9';
                }
            }
        }
        // Only the number differs: a flipped bit.
        let problem = ShardReader::from_bytes(&path, &Buffer::from(bytes.clone())).unwrap_err();
        assert!(matches!(problem, Error::Malformed { .. }) && problem.to_string().contains("says format 9"), "{problem}");
        // A real newer format differs in more.
        let rows = bytes.windows(7).position(|window| window == b"\"rows\":").unwrap() + 7;
        bytes[rows] = b'7';
        let problem = ShardReader::from_bytes(&path, &Buffer::from(bytes)).unwrap_err();
        assert!(matches!(problem, Error::OtherFormat { found: 9, known: 2, .. }), "{problem}");
    }

    #[test]
    fn an_ordinary_arrow_file_is_not_a_shard() {
        let mut bytes = Vec::new();
        let mut writer = FileWriter::try_new(&mut bytes, &schema()).unwrap();
        writer.write(&two_batches()[0]).unwrap();
        writer.finish().unwrap();
        drop(writer);
        let problem = ShardReader::from_bytes(Path::new("other.arrow"), &Buffer::from(bytes)).unwrap_err();
        assert_eq!(problem.to_string(), "other.arrow: expected `ovenbird.shard` in the schema: not a feature shard");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn ragged_rows_survive(rows in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u16>(), 0..5)), 0..20)) {
            let rows: Vec<(u64, Vec<f16>)> = rows.into_iter().map(|(id, bits)| (id, bits.into_iter().map(f16::from_bits).collect())).collect();
            let home = tempfile::tempdir().unwrap();
            let (path, _) = written(home.path(), &[batch(&rows)], unit(), Compression::None);
            let read = ShardReader::open(&path, None).unwrap().batch(0).unwrap();
            for (row_idx, (id, values)) in rows.iter().enumerate() {
                prop_assert_eq!(read.column(0).as_primitive::<UInt64Type>().value(row_idx), *id);
                let row = read.column(1).as_list::<i32>().value(row_idx);
                let bits: Vec<u16> = row.as_primitive::<Float16Type>().values().iter().map(|value| value.to_bits()).collect();
                let expected: Vec<u16> = values.iter().map(|value| value.to_bits()).collect();
                prop_assert_eq!(bits, expected);
            }
        }
    }
}
