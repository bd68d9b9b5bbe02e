//! What came of links: one row for each URL that was tried, in a Parquet table with zstd.
//!
//! Class by class, best link first: `class` utf8, `rank` u32 (of the link, from 0; failures leave gaps among the images), `url` and `final_url` utf8,
//! `state` utf8 (see [`DownloadState`]), `code` u16 (HTTP, null without an answer), `bytes` u64, `sha256` utf8 (hexadecimal digits), `md5_matches` bool
//! (null where the link states no digest), `width` and `height` u32 px, `file` utf8 (in the folder of images; null without one), `attempts` u32, `time`
//! (UTC, ms), `reason` utf8. The metadata (`ovenbird.search`) lists the classes with how many images were wanted and how many links there are.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, TimestampMillisecondArray, UInt16Array, UInt32Array, UInt64Array,
    },
    datatypes::{TimestampMillisecondType, UInt16Type, UInt32Type, UInt64Type},
};
use ovenbird_cache::{DraftFile, inputs::InputFile};
use serde::{Deserialize, Serialize};

use super::{
    read_json,
    tables::{Table, described, write_table},
};
use crate::{Artifact, Result, error::malformed, ports::only_file};

const FORMAT: u32 = 1;

/// What came of a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DownloadState {
    /// The image is there.
    Downloaded,
    /// The image is there, and is another than when the links were made, by its MD5.
    Changed,
    /// A better link of the class has the same content.
    Duplicate,
    /// The image is smaller than asked for.
    TooSmall,
    /// More bytes or pixels than allowed.
    TooLarge,
    /// The answer is no JPEG, PNG, WebP or GIF.
    NotAnImage,
    /// An image that cannot be decoded to its end.
    DamagedImage,
    /// HTTP 404 or 410.
    Gone,
    /// Another HTTP status than 200 that will hardly change: 401, 403, 451.
    HttpError,
    /// Too many redirects, or one that leads nowhere.
    BadRedirect,
    /// No URL of HTTP or HTTPS, or one with a password.
    BadUrl,
    /// The host's address is not one of the public internet.
    PrivateAddress,
    /// The host's robots.txt forbids it.
    Robots,
    /// The answer's headers forbid use for machine learning.
    OptedOut,
    /// The host's robots.txt cannot be had, so that nothing is fetched from there for now.
    RobotsUnreachable,
    /// HTTP 408, 429 or 5xx.
    ServerError,
    /// No whole answer in time.
    Timeout,
    /// No connection, or a broken one.
    Unreachable,
    /// Fewer bytes than announced.
    CutShort,
}

impl DownloadState {
    /// All states, in the order in which summaries list them.
    pub const ALL: [Self; 19] = [
        Self::Downloaded,
        Self::Changed,
        Self::Duplicate,
        Self::TooSmall,
        Self::TooLarge,
        Self::NotAnImage,
        Self::DamagedImage,
        Self::Gone,
        Self::HttpError,
        Self::BadRedirect,
        Self::BadUrl,
        Self::PrivateAddress,
        Self::Robots,
        Self::OptedOut,
        Self::RobotsUnreachable,
        Self::ServerError,
        Self::Timeout,
        Self::Unreachable,
        Self::CutShort,
    ];

    /// As tables say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Downloaded => "downloaded",
            Self::Changed => "changed",
            Self::Duplicate => "duplicate",
            Self::TooSmall => "too-small",
            Self::TooLarge => "too-large",
            Self::NotAnImage => "not-an-image",
            Self::DamagedImage => "damaged-image",
            Self::Gone => "gone",
            Self::HttpError => "http-error",
            Self::BadRedirect => "bad-redirect",
            Self::BadUrl => "bad-url",
            Self::PrivateAddress => "private-address",
            Self::Robots => "robots",
            Self::OptedOut => "opted-out",
            Self::RobotsUnreachable => "robots-unreachable",
            Self::ServerError => "server-error",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::CutShort => "cut-short",
        }
    }

    /// Whether there is an image to use.
    pub fn has_image(self) -> bool {
        matches!(self, Self::Downloaded | Self::Changed)
    }

    /// Whether another try may succeed.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::RobotsUnreachable | Self::ServerError | Self::Timeout | Self::Unreachable | Self::CutShort)
    }

    /// How many rows have each state, in words: `240 downloaded, 31 gone`.
    pub(crate) fn summary(states: impl Iterator<Item = Self>) -> String {
        let mut counts: BTreeMap<Self, usize> = BTreeMap::new();
        states.for_each(|state| *counts.entry(state).or_default() += 1);
        counts.iter().map(|(state, n)| format!("{n} {}", state.word())).collect::<Vec<_>>().join(", ")
    }
}

/// A URL that was tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Download {
    /// The rank of its link in its class, from 0.
    pub rank: u32,
    /// The link.
    pub url: String,
    /// Where redirects led to.
    pub final_url: String,
    /// What came of it.
    pub state: DownloadState,
    /// The last HTTP status, if there was an answer.
    pub code: Option<u16>,
    /// Bytes that came.
    pub bytes: u64,
    /// SHA-256 of the whole file, in hexadecimal digits.
    pub sha256: Option<String>,
    /// Whether its MD5 is the link's, if that has one.
    pub md5_matches: Option<bool>,
    /// `[width, height]` px, where the header was read.
    pub size: Option<[u32; 2]>,
    /// Its name in the folder of images, if it is there.
    pub file: Option<String>,
    /// Requests, without redirects.
    pub attempts: u32,
    /// When it was tried last, in ms since 1970, UTC; `None` where that is not known.
    pub time_ms: Option<i64>,
    /// Why there is no image, or what is remarkable about it.
    pub reason: Option<String>,
}

/// The downloads of a class.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClassDownloads {
    /// The class.
    pub class: String,
    /// How many images were asked for.
    pub wanted: u64,
    /// How many links the class has that may be used.
    pub links: u64,
    /// By rank.
    pub rows: Vec<Download>,
}

impl ClassDownloads {
    /// How many images there are.
    pub fn n_images(&self) -> usize {
        self.rows.iter().filter(|row| row.state.has_image()).count()
    }
}

/// Downloads by class.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Downloads {
    /// By class, in the order of the links.
    pub by_class: Vec<ClassDownloads>,
}

/// The metadata of the table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    classes: Vec<DescribedClass>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DescribedClass {
    class: String,
    wanted: u64,
    links: u64,
}

impl Artifact for Downloads {
    const KIND: &'static str = "downloads";
    const EXTENSIONS: &'static [&'static str] = &["parquet"];
    const SHAPE: &'static str = "a table that `web/download` or `web/import` made (Parquet)";

    fn open(files: &[InputFile]) -> Result<Self> {
        let mut by_class = Vec::new();
        for file in files {
            let (path, table) = (&file.path, Table::open(file, FORMAT, None)?);
            let Description { classes } = table.description()?;
            let mut at = by_class.len();
            by_class.extend(classes.into_iter().map(|DescribedClass { class, wanted, links }| ClassDownloads {
                class,
                wanted,
                links,
                rows: Vec::new(),
            }));
            for batch in table {
                let batch = batch?;
                let rows = rows(&batch).ok_or_else(|| malformed(path, "expected the columns of a table of downloads"))?;
                for (row, (class, download)) in rows.into_iter().enumerate() {
                    while by_class.get(at).is_some_and(|of_class: &ClassDownloads| of_class.class != class) {
                        at += 1;
                    }
                    let (Some(of_class), Some(download)) = (by_class.get_mut(at), download) else {
                        return Err(malformed(path, format!("row {row}: expected a state that this version knows, and classes in order")));
                    };
                    of_class.rows.push(download);
                }
            }
        }
        Ok(Self { by_class })
    }
}

/// The rows of a batch with their classes; `None` where a column is missing, and for a row whose state is unknown.
fn rows(batch: &RecordBatch) -> Option<Vec<(String, Option<Download>)>> {
    let texts = |name: &str| batch.column_by_name(name)?.as_string_opt::<i32>();
    let small = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<UInt32Type>();
    let [classes, urls, final_urls, states, sha256s, files, reasons] =
        [texts("class")?, texts("url")?, texts("final_url")?, texts("state")?, texts("sha256")?, texts("file")?, texts("reason")?];
    let [ranks, widths, heights, attempts] = [small("rank")?, small("width")?, small("height")?, small("attempts")?];
    let codes = batch.column_by_name("code")?.as_primitive_opt::<UInt16Type>()?;
    let times = batch.column_by_name("time")?.as_primitive_opt::<TimestampMillisecondType>()?;
    let bytes = batch.column_by_name("bytes")?.as_primitive_opt::<UInt64Type>()?;
    let matches = batch.column_by_name("md5_matches")?.as_boolean_opt()?;
    let text = |column: &StringArray, row: usize| column.is_valid(row).then(|| column.value(row).to_owned());
    let row = |row: usize| {
        let state = DownloadState::ALL.into_iter().find(|state| state.word() == states.value(row));
        let download = state.map(|state| Download {
            rank: ranks.value(row),
            url: urls.value(row).to_owned(),
            final_url: final_urls.value(row).to_owned(),
            state,
            code: codes.is_valid(row).then(|| codes.value(row)),
            bytes: bytes.value(row),
            sha256: text(sha256s, row),
            md5_matches: matches.is_valid(row).then(|| matches.value(row)),
            size: (widths.is_valid(row) && heights.is_valid(row)).then(|| [widths.value(row), heights.value(row)]),
            file: text(files, row),
            attempts: attempts.value(row),
            time_ms: times.is_valid(row).then(|| times.value(row)),
            reason: text(reasons, row),
        });
        (classes.value(row).to_owned(), download)
    };
    Some((0..batch.num_rows()).map(row).collect())
}

impl Downloads {
    /// How many images each class has.
    pub(crate) fn counts(&self) -> Vec<(String, usize)> {
        self.by_class.iter().map(|of_class| (of_class.class.clone(), of_class.n_images())).collect()
    }

    /// Writes the table and finishes the file.
    pub fn write(&self, file: DraftFile) -> Result<()> {
        let rows = || self.by_class.iter().flat_map(|of_class| of_class.rows.iter().map(move |row| (&of_class.class, row)));
        let side = |place: usize| Arc::new(rows().map(|(_, row)| row.size.map(|size| size[place])).collect::<UInt32Array>());
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("class", Arc::new(rows().map(|(class, _)| Some(class)).collect::<StringArray>())),
            ("rank", Arc::new(rows().map(|(_, row)| row.rank).collect::<UInt32Array>())),
            ("url", Arc::new(rows().map(|(_, row)| Some(&row.url)).collect::<StringArray>())),
            ("final_url", Arc::new(rows().map(|(_, row)| Some(&row.final_url)).collect::<StringArray>())),
            ("state", Arc::new(rows().map(|(_, row)| Some(row.state.word())).collect::<StringArray>())),
            ("code", Arc::new(rows().map(|(_, row)| row.code).collect::<UInt16Array>())),
            ("bytes", Arc::new(rows().map(|(_, row)| row.bytes).collect::<UInt64Array>())),
            ("sha256", Arc::new(rows().map(|(_, row)| row.sha256.as_ref()).collect::<StringArray>())),
            ("md5_matches", Arc::new(rows().map(|(_, row)| row.md5_matches).collect::<BooleanArray>())),
            ("width", side(0)),
            ("height", side(1)),
            ("file", Arc::new(rows().map(|(_, row)| row.file.as_ref()).collect::<StringArray>())),
            ("attempts", Arc::new(rows().map(|(_, row)| row.attempts).collect::<UInt32Array>())),
            ("time", Arc::new(rows().map(|(_, row)| row.time_ms).collect::<TimestampMillisecondArray>().with_timezone("UTC"))),
            ("reason", Arc::new(rows().map(|(_, row)| row.reason.as_ref()).collect::<StringArray>())),
        ];
        let class =
            |of_class: &ClassDownloads| DescribedClass { class: of_class.class.clone(), wanted: of_class.wanted, links: of_class.links };
        let description = Description { classes: self.by_class.iter().map(class).collect() };
        write_table(file, columns, FORMAT, vec![described(&description)])
    }
}

/// What came of each class on the way from links to labels, for reports.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebTable {
    /// By class, in the order of the links.
    pub classes: Vec<WebCounts>,
}

/// The numbers of a class.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebCounts {
    /// The class.
    pub class: String,
    /// Images that were asked for.
    pub wanted: usize,
    /// Links that may be used.
    pub retrieved: usize,
    /// Images that are there.
    pub downloaded: usize,
    /// Images with a label.
    pub used: usize,
    /// Why links led to no image: how many, by state.
    pub reasons: BTreeMap<String, usize>,
}

impl WebTable {
    /// The numbers of all classes together.
    pub fn total(&self) -> WebCounts {
        let mut total = WebCounts { class: "all".into(), ..WebCounts::default() };
        for WebCounts { class: _, wanted, retrieved, downloaded, used, reasons } in &self.classes {
            total.wanted += wanted;
            total.retrieved += retrieved;
            total.downloaded += downloaded;
            total.used += used;
            for (state, n) in reasons {
                *total.reasons.entry(state.clone()).or_default() += n;
            }
        }
        total
    }
}

impl Artifact for WebTable {
    const KIND: &'static str = "web-table";
    const EXTENSIONS: &'static [&'static str] = &["json"];
    const SHAPE: &'static str = "the table that `annotations/web` made";

    fn open(files: &[InputFile]) -> Result<Self> {
        read_json(only_file(Self::KIND, files)?)
    }
}
