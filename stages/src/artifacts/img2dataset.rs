//! Images with their metadata as img2dataset leaves them, in one folder per class.
//!
//! ```text
//! CLASS/00000/000000017.jpg    an image; the key is the shard (5 digits) and the place in the list of URLs (4 digits)
//! CLASS/00000/000000017.json   `url`, `key`, `status`, `error_message`, `width`, `height`, ..
//! CLASS/00000.tar              the same two files, packed (`output_format webdataset`)
//! CLASS/00000.parquet          one row per URL of the shard, those that failed as well
//! ```

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt as _, path::Path};

use arrow::array::{Array as _, ArrayRef, AsArray as _, RecordBatch};
use ovenbird_cache::inputs::InputFile;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::{Deserialize, Serialize};

use crate::{Artifact, Error, Result, error::malformed};

/// A folder of img2dataset, not yet read.
#[derive(Debug, Clone)]
pub struct Img2dataset {
    files: Vec<InputFile>,
}

impl Artifact for Img2dataset {
    const KIND: &'static str = "img2dataset";
    const EXTENSIONS: &'static [&'static str] = &["/"];
    const SHAPE: &'static str = "a folder of img2dataset's outputs, one per class: `CLASS/00000/000000017.jpg` or `CLASS/00000.tar`";

    fn open(files: &[InputFile]) -> Result<Self> {
        Ok(Self { files: files.to_vec() })
    }
}

/// What img2dataset says of a URL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Metadata {
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) status: String,
    pub(crate) error_message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) width: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) height: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) original_width: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) original_height: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
}

/// The places of a shard.
pub(crate) const SHARD_PLACES: u64 = 10_000;

/// The key of an image.
pub(crate) fn key(shard: u64, place: u64) -> String {
    format!("{shard:05}{place:04}")
}

/// One URL of a shard.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    /// Its shard and its place in it.
    pub(crate) at: [u64; 2],
    pub(crate) metadata: Metadata,
    /// The image's bytes, and where they are.
    pub(crate) image: Option<Source>,
}

/// Where an image's bytes are.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    file: InputFile,
    /// Of a packed image.
    range: Option<(usize, usize)>,
}

impl Source {
    /// Reads the image. An archive was checked as a whole when its list was read.
    pub(crate) fn read(&self) -> Result<Vec<u8>> {
        let Some((from, to)) = self.range else { return Ok(self.file.read()?) };
        let mut bytes = vec![0; to - from];
        let read = File::open(&self.file.path).and_then(|file| file.read_exact_at(&mut bytes, from as u64));
        read.map_err(|source| ovenbird_data::Error::Read { path: self.file.path.clone(), source })?;
        Ok(bytes)
    }
}

impl Img2dataset {
    /// The samples of each class's folder, shard by shard.
    pub(crate) fn by_folder(&self) -> Result<BTreeMap<String, Vec<Sample>>> {
        let mut by_folder: BTreeMap<String, BTreeMap<[u64; 2], Sample>> = BTreeMap::new();
        let mut n_known = 0_usize;
        for file in &self.files {
            let Some((folder, rest)) = file.name.split_once('/') else { continue };
            let samples = by_folder.entry(folder.to_owned()).or_default();
            n_known += 1;
            match rest.rsplit_once('.') {
                Some((_, "tar")) => unpack(file, samples)?,
                Some((_, "parquet")) => listed(file, samples)?,
                Some((stem, extension)) => add(stem, extension, &Source { file: file.clone(), range: None }, samples)?,
                None => n_known -= 1,
            }
        }
        // An export of no image is empty, too.
        if n_known == 0 && !self.files.is_empty() {
            return Err(Error::Input {
                port: Self::KIND,
                problem: format!("expected folders of classes with shards in them, found none in {} files", self.files.len()),
                hint: format!("give {}", Self::SHAPE),
            });
        }
        Ok(by_folder.into_iter().map(|(folder, samples)| (folder, samples.into_values().collect())).collect())
    }
}

/// The shard and the place that a key names.
fn place_of(key: &str) -> Option<[u64; 2]> {
    let is_key = key.len() == 9 && key.bytes().all(|digit| digit.is_ascii_digit());
    let (shard, place) = is_key.then(|| key.split_at(key.len() - 4))?;
    Some([shard.parse().ok()?, place.parse().ok()?])
}

/// Adds a file by its name; names of other programs are left out.
fn add(stem: &str, extension: &str, source: &Source, samples: &mut BTreeMap<[u64; 2], Sample>) -> Result<()> {
    let Some(at) = place_of(stem.rsplit('/').next().unwrap_or(stem)) else { return Ok(()) };
    match extension {
        "jpg" | "jpeg" | "png" | "webp" | "gif" => {
            let sample = samples.entry(at).or_default();
            (sample.at, sample.image) = (at, Some(source.clone()));
        }
        "json" => {
            let metadata =
                serde_json::from_slice(&source.read()?).map_err(|error| malformed(&source.file.path, format!("{stem}.json: {error}")))?;
            let sample = samples.entry(at).or_default();
            (sample.at, sample.metadata) = (at, metadata);
        }
        _ => {}
    }
    Ok(())
}

/// Adds the rows of a shard's table, where the samples themselves do not say as much.
fn listed(input: &InputFile, samples: &mut BTreeMap<[u64; 2], Sample>) -> Result<()> {
    let path = &input.path;
    let checked = input.check()?;
    let file = File::open(path).map_err(|source| ovenbird_data::Error::Read { path: path.clone(), source })?;
    let batches = ParquetRecordBatchReaderBuilder::try_new(file).and_then(ParquetRecordBatchReaderBuilder::build);
    for batch in batches.map_err(|error| malformed(path, error.to_string()))? {
        let batch = batch.map_err(|error| malformed(path, error.to_string()))?;
        let [urls, keys, statuses, errors] = ["url", "key", "status", "error_message"].map(|name| texts(&batch, name));
        let (Some(urls), Some(keys), Some(statuses)) = (urls, keys, statuses) else {
            return Err(malformed(path, "expected columns `url`, `key` and `status` of text"));
        };
        for row in 0..batch.num_rows() {
            let Some(at) = keys[row].as_deref().and_then(place_of) else {
                return Err(malformed(path, format!("row {row}: expected a key of nine digits")));
            };
            let sample = samples.entry(at).or_default();
            sample.at = at;
            if sample.metadata.url.is_empty() {
                let text = |column: &[Option<String>]| column[row].clone().unwrap_or_default();
                sample.metadata = Metadata {
                    url: text(&urls),
                    key: text(&keys),
                    status: text(&statuses),
                    error_message: errors.as_ref().and_then(|errors| errors[row].clone()),
                    ..Metadata::default()
                };
            }
        }
    }
    Ok(checked.still()?)
}

fn texts(batch: &RecordBatch, name: &str) -> Option<Vec<Option<String>>> {
    let column: &ArrayRef = batch.column_by_name(name)?;
    let rows = 0..column.len();
    if let Some(texts) = column.as_string_opt::<i32>() {
        return Some(rows.map(|row| texts.is_valid(row).then(|| texts.value(row).to_owned())).collect());
    }
    let texts = column.as_string_opt::<i64>()?;
    Some(rows.map(|row| texts.is_valid(row).then(|| texts.value(row).to_owned())).collect())
}

/// Adds the files of a tar archive.
fn unpack(input: &InputFile, samples: &mut BTreeMap<[u64; 2], Sample>) -> Result<()> {
    let bytes = input.read()?;
    for (name, range) in tar_entries(&bytes, &input.path)? {
        if let Some((stem, extension)) = name.rsplit_once('.') {
            add(stem, extension, &Source { file: input.clone(), range: Some(range) }, samples)?;
        }
    }
    Ok(())
}

/// The regular files of a tar archive, with where their bytes are. Names longer than a header holds are not img2dataset's, and left out.
fn tar_entries(bytes: &[u8], path: &Path) -> Result<Vec<(String, (usize, usize))>> {
    const BLOCK: usize = 512;
    let mut entries = Vec::new();
    let mut at = 0;
    loop {
        let header =
            bytes.get(at..at + BLOCK).ok_or_else(|| malformed(path, format!("the archive ends within the header at byte {at}")))?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(entries);
        }
        let text = |range: std::ops::Range<usize>| {
            let field = &header[range];
            String::from_utf8_lossy(field.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
        };
        let size = usize::from_str_radix(text(124..136).trim(), 8);
        let (Ok(size), b"ustar") = (size, &header[257..262]) else {
            return Err(malformed(path, format!("expected a header of tar at byte {at}")));
        };
        let (from, to) = (at + BLOCK, (at + BLOCK).saturating_add(size));
        if to > bytes.len() {
            return Err(malformed(path, format!("the archive ends within `{}`", text(0..100))));
        }
        if matches!(header[156], b'0' | 0) {
            entries.push((text(0..100), (from, to)));
        }
        at = from + size.next_multiple_of(BLOCK);
    }
}

#[cfg(test)]
impl Source {
    /// One that cannot be read.
    pub(crate) fn of_test() -> Self {
        let file = InputFile { name: "a".into(), path: "a".into(), bytes: 0, digest: ovenbird_cache::Digest::of(b""), unit: None };
        Self { file, range: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_shards_and_places() {
        assert_eq!(place_of("000000017"), Some([0, 17]));
        assert_eq!(place_of("000019999"), Some([1, 9999]));
        assert_eq!(key(1, 17), "000010017");
        for other in ["17", "00000001x", "", "readme"] {
            assert_eq!(place_of(other), None, "{other}");
        }
    }

    /// A member of a tar archive, as Python writes it.
    fn member(name: &str, content: &[u8]) -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[156] = b'0';
        header[257..262].copy_from_slice(b"ustar");
        let mut member = [header, content.to_vec()].concat();
        member.resize(member.len().next_multiple_of(512), 0);
        member
    }

    /// A shard's table as pyarrow writes it: with Snappy.
    fn table(rows: &[[&str; 4]]) -> Vec<u8> {
        use arrow::array::StringArray;
        use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
        let column = |place: usize| -> ArrayRef {
            std::sync::Arc::new(rows.iter().map(|row| Some(row[place]).filter(|text| !text.is_empty())).collect::<StringArray>())
        };
        let columns = ["url", "key", "status", "error_message"].into_iter().enumerate().map(|(place, name)| (name, column(place), true));
        let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
        let mut bytes = Vec::new();
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn folders_archives_and_tables_are_one_list_of_samples() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| ovenbird_cache::publish::replace(&folder.path().join(name), bytes).unwrap();
        write("owl/00000/000000002.jpg", b"two");
        write(
            "owl/00000/000000002.json",
            br#"{"url": "http://a/2", "key": "000000002", "status": "success", "exif": "{}", "width": 1024}"#,
        );
        let archive = [member("000010000.jpg", b"image of 0"), member("000010000.json", br#"{"url": "http://a/0"}"#), vec![0; 1024]];
        write("owl/00001.tar", &archive.concat());
        let failed = ["http://a/1", "000000001", "failed_to_download", "HTTP Error 404: Not Found"];
        write("owl/00000.parquet", &table(&[failed, ["http://a/2", "000000002", "success", ""]]));
        write("owl/00000_stats.json", b"{}");
        write("notes.txt", b"of somebody");
        let files = ovenbird_cache::inputs::digest_path(folder.path(), None, 0).unwrap();
        let by_folder = Img2dataset::open(&files).unwrap().by_folder().unwrap();
        assert_eq!(by_folder.keys().collect::<Vec<_>>(), ["owl"]);
        let found: Vec<_> = by_folder["owl"]
            .iter()
            .map(|sample| (sample.at, sample.metadata.url.as_str(), sample.image.as_ref().map(|image| image.read().unwrap())))
            .collect();
        let image = |bytes: &[u8]| Some(bytes.to_vec());
        assert_eq!(
            found,
            [([0, 1], "http://a/1", None), ([0, 2], "http://a/2", image(b"two")), ([1, 0], "http://a/0", image(b"image of 0"))]
        );
        assert_eq!(by_folder["owl"][0].metadata.error_message.as_deref(), Some("HTTP Error 404: Not Found"));

        write("owl/00002.parquet", b"no table");
        let files = ovenbird_cache::inputs::digest_path(folder.path(), None, 0).unwrap();
        assert!(Img2dataset::open(&files).unwrap().by_folder().unwrap_err().to_string().contains("00002.parquet"));
    }

    #[test]
    fn an_archive_cut_anywhere_is_an_error_and_never_a_panic() {
        let archive = [member("000000001.jpg", b"image"), vec![0; 1024]].concat();
        let entries = tar_entries(&archive, Path::new("00000.tar")).unwrap();
        assert_eq!(entries, [("000000001.jpg".to_owned(), (512, 517))]);
        for length in 0..1536 {
            assert!(tar_entries(&archive[..length], Path::new("00000.tar")).is_err(), "{length}");
        }
    }
}
