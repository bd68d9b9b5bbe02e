//! `web/import`: images that img2dataset downloaded.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_data::images::Image;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    fetch::described,
    summary::{file_name, note},
};
use crate::{
    Context, Error, In, Out, PortInfo, Result, Stage, Unit,
    artifacts::{
        ClassDownloads, Download, DownloadState, Downloads, Images, Img2dataset, Link, Links,
        img2dataset::{SHARD_PLACES, Sample},
    },
    class_folder::{class_of, folder_name},
    feed::in_parallel,
};

/// Images that img2dataset downloaded, as `web/download` leaves them.
///
/// One folder per class, `files` or `webdataset` (tar) inside. A second run of img2dataset puts what it got into the next free shard, `00001`: an image there
/// fills the gap that it had in an earlier shard, by its URL. Ranks are places in the list of URLs, or those of `links`, where they are given. Of
/// URLs that failed the tables of the shards tell why.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Import {}

const FOLDER: In<Img2dataset> =
    In::required("folder", "Folders of classes: `CLASS/00000/000000017.jpg` and `.json`, or `CLASS/00000.tar`.");
const LINKS: In<Links> =
    In::optional("links", "The links that were downloaded: they give classes and ranks. Without them folders and keys do.");
const IMAGES: Out<Images> = Out::new("images", "Files named by their content, `ab/SHA256.jpg`.");
const DOWNLOADS: Out<Downloads> = Out::new("downloads", "One row per URL, those that failed as well where the folder knows them.");

impl Stage for Import {
    const KIND: &'static str = "web/import";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[FOLDER.info(), LINKS.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMAGES.info(), DOWNLOADS.info()];

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let [unit] = units else { return Ok(()) };
        let folders = cx.inputs.read(FOLDER)?.by_folder()?;
        let links = cx.inputs.read_if_given(LINKS)?;
        let classes = classes(folders, links.as_ref(), cx)?;
        cx.total(classes.len() as u64);
        let draft = cx.begin(unit)?;
        let (mut downloads, mut written) = (Downloads::default(), BTreeSet::new());
        for (class, n_links, samples) in classes {
            let read = in_parallel(samples.len(), cx.threads, |place| {
                cx.proceed()?;
                Ok(row(samples[place].0, &samples[place].1))
            })?;
            let (mut rows, mut seen) = (Vec::new(), BTreeSet::new());
            for result in read {
                let (mut row, bytes) = result?;
                if let (Some(file), Some(bytes)) = (row.file.clone(), bytes) {
                    if seen.insert(file.clone()) {
                        if written.insert(file.clone()) {
                            draft.write(IMAGES, &file, &bytes)?;
                        }
                    } else {
                        (row.state, row.file) = (DownloadState::Duplicate, None);
                        row.reason = Some("a better link of the class has the same content".into());
                    }
                }
                rows.push(row);
            }
            downloads.by_class.push(ClassDownloads { class, wanted: n_links as u64, links: n_links as u64, rows });
            cx.tick(1);
        }
        note(&downloads, cx);
        downloads.write(draft.create(DOWNLOADS, "downloads.parquet")?)?;
        let n_rows: usize = downloads.by_class.iter().map(|of_class| of_class.rows.len()).sum();
        cx.commit(draft, [("images".into(), written.len().into()), ("tried".into(), n_rows.into())].into())
    }
}

/// A class, how many links it has, and its samples by rank.
type ClassSamples = (String, usize, Vec<(usize, Sample)>);

/// The samples of each class: of the links, or of the folders.
fn classes(mut folders: BTreeMap<String, Vec<Sample>>, links: Option<&Links>, cx: &Context<'_>) -> Result<Vec<ClassSamples>> {
    let Some(links) = links else {
        let of_folder = |(folder, samples): (String, Vec<Sample>)| {
            let samples = by_rank(samples, None);
            (class_of(&folder), samples.len(), samples)
        };
        return Ok(folders.into_iter().map(of_folder).collect());
    };
    let mut classes = Vec::new();
    for (class, links) in &links.by_class {
        let samples = folders.remove(class).or_else(|| folders.remove(&folder_name(class))).unwrap_or_default();
        classes.push((class.clone(), Links::used(links).count(), by_rank(samples, Some(links))));
    }
    if !folders.is_empty() {
        let names: Vec<&str> = folders.keys().map(String::as_str).collect();
        if folders.len() > links.by_class.len() && classes.iter().all(|(.., samples)| samples.is_empty()) {
            return Err(Error::Input {
                port: FOLDER.info().name,
                problem: format!("expected folders named as the {} classes of `links`, found `{}` and others", classes.len(), names[0]),
                hint: "give the links that were downloaded, or none".into(),
            });
        }
        cx.note(format!("{} folders are of no class of the links, and left out: {}", names.len(), names.join(", ")));
    }
    Ok(classes)
}

/// The samples by rank, each URL once: of several tries one with an image.
fn by_rank(samples: Vec<Sample>, links: Option<&[Link]>) -> Vec<(usize, Sample)> {
    let mut of_links: BTreeMap<&str, usize> = BTreeMap::new();
    for (rank, link) in links.into_iter().flat_map(Links::used) {
        of_links.entry(&link.url).or_insert(rank);
    }
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    let mut found: BTreeMap<usize, Sample> = BTreeMap::new();
    for sample in samples {
        let [shard, place] = sample.at;
        let url = &sample.metadata.url;
        let by_key = (shard * SHARD_PLACES + place) as usize;
        let rank = match (links, url.is_empty()) {
            (Some(_), false) => match of_links.get(url.as_str()) {
                Some(rank) => *rank,
                // Of other links.
                None => continue,
            },
            (None, false) => *ranks.entry(url.clone()).or_insert_with(|| {
                // A second run lists the same URLs again, from the first place: an empty place there is this URL's.
                let place = place as usize;
                if shard > 0 && !found.contains_key(&place) { place } else { by_key }
            }),
            (_, true) => by_key,
        };
        let is_better = found.get(&rank).is_none_or(|before| before.image.is_none() && sample.image.is_some());
        if is_better {
            found.insert(rank, sample);
        }
    }
    found.into_iter().collect()
}

/// The row of a sample, and the bytes of its image.
fn row(rank: usize, sample: &Sample) -> Result<(Download, Option<Vec<u8>>)> {
    let metadata = &sample.metadata;
    let mut row = Download {
        rank: rank as u32,
        url: metadata.url.clone(),
        final_url: metadata.url.clone(),
        state: DownloadState::Downloaded,
        code: None,
        bytes: 0,
        sha256: None,
        md5_matches: None,
        size: None,
        file: None,
        attempts: 1,
        time_ms: None,
        reason: None,
    };
    let Some(source) = &sample.image else {
        let reason = metadata.error_message.clone().unwrap_or_else(|| metadata.status.clone());
        row.state = state_of(&reason);
        row.reason = Some(if reason.is_empty() { "no file of it is there".into() } else { reason });
        return Ok((row, None));
    };
    let bytes = source.read()?;
    row.bytes = bytes.len() as u64;
    let path = std::path::Path::new(&metadata.key);
    match Image::decode(&bytes, path) {
        Ok(image) => {
            let size = [image.width, image.height];
            let image = described(&bytes, size);
            row.size = Some(size);
            row.file = Some(file_name(&image.sha256, &image.extension));
            row.sha256 = Some(image.sha256);
            Ok((row, Some(bytes)))
        }
        Err(error) => {
            (row.state, row.reason) = (DownloadState::DamagedImage, Some(error.to_string()));
            Ok((row, None))
        }
    }
}

/// The state that an error of img2dataset (of Python's urllib) means.
fn state_of(message: &str) -> DownloadState {
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if has(&["Error 404", "Error 410"]) {
        DownloadState::Gone
    } else if has(&["Error 429", "Error 5"]) {
        DownloadState::ServerError
    } else if has(&["HTTP Error"]) {
        DownloadState::HttpError
    } else if has(&["timed out", "timeout"]) {
        DownloadState::Timeout
    } else if has(&["decod", "Image", "image"]) {
        DownloadState::NotAnImage
    } else {
        DownloadState::Unreachable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: [u64; 2], url: &str, has_image: bool) -> Sample {
        use crate::artifacts::img2dataset::{Metadata, Source};
        let metadata = Metadata { url: url.into(), ..Metadata::default() };
        Sample { at, metadata, image: has_image.then(Source::of_test) }
    }

    #[test]
    fn later_shards_fill_the_gaps_of_the_first_by_url() {
        let samples = vec![
            sample([0, 0], "a", true),
            sample([0, 1], "b", false),
            sample([0, 2], "c", true),
            // A second run over the same list; `d` has no row in the first shard.
            sample([1, 0], "a", true),
            sample([1, 1], "b", true),
            sample([1, 3], "d", true),
        ];
        let ranks: Vec<(usize, String, bool)> =
            by_rank(samples.clone(), None).into_iter().map(|(rank, sample)| (rank, sample.metadata.url, sample.image.is_some())).collect();
        let expected = [(0, "a"), (1, "b"), (2, "c"), (3, "d")];
        assert_eq!(ranks, expected.map(|(rank, url)| (rank, url.to_owned(), true)));
        let links = ["d", "x", "a"].map(|url| Link { url: url.into(), ..Link::default() });
        let ranks: Vec<(usize, String)> =
            by_rank(samples, Some(&links)).into_iter().map(|(rank, sample)| (rank, sample.metadata.url)).collect();
        assert_eq!(ranks, [(0, "d".to_owned()), (2, "a".to_owned())]);
    }
}
