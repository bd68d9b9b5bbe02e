//! `web/download`: images of the web, by links.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use ovenbird_cache::{Digest, Spool};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{runtime, task::JoinSet};
use url::Url;

use super::{
    fetch::{Fetcher, Manners, WithBytes},
    spooled::{Conditions, Spooled, UrlRecord, look_up},
    summary::{BelowMin, file_name, note, refuse_few},
};
use crate::{
    Context, Error, FailedItem, In, Inputs, Out, PortInfo, Problem, Result, Stage, Unit, UnitDraft, Units,
    artifacts::{ClassDownloads, Download as Row, DownloadState, Downloads, Images, Link, Links},
};

/// URLs that are under way for each request that may be made at once: the others wait for a busy host or for a pause.
const AHEAD: usize = 4;
/// How often a stop is looked for.
const GLANCE: Duration = Duration::from_millis(200);
/// Failed URLs, and hosts among them, after which a machine without any answer counts as cut off from the web.
const OFFLINE_AFTER: (usize, usize) = (40, 5);
/// Failed URLs after which the same holds where no others are left.
const OFFLINE_AT_END: usize = 10;
/// Threads for decoding, disk and the name service.
const BLOCKING_THREADS: usize = 64;

/// Whether sites that keep machines away are heeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OptOuts {
    /// robots.txt is obeyed, and so are `X-Robots-Tag` (`noai`, `noimageai`, `noindex`) and `tdm-reservation` of an answer.
    #[default]
    Heed,
    /// Nothing of this is looked at. You answer for it.
    Ignore,
}

/// Downloads the images that links lead to: of each class as many as asked for, best first, going down the list until so many are whole.
///
/// Images stay as they came, byte by byte, named by their content. Every URL that was tried has a row in `downloads` with what came of it; no failure
/// ends the run. Whatever came of a URL is kept in the home (`web/`): a run that was killed asks for nothing twice, more images of a class
/// (`per_class`) mean only more requests, and a home replays without a network. Failures that may pass (time-outs, 429, 5xx) are tried
/// again by `ovenbird retry` alone.
///
/// Only hosts of the public internet are asked, over HTTP or HTTPS, under a name with your contact. Proxies that the environment names (`HTTP_PROXY`) are
/// not used: on a machine that reaches the web through one alone, download elsewhere and use `web/import`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Download {
    /// Required: your e-mail address or web page, by which operators of sites reach you. It is sent with every request.
    pub contact: String,
    /// Images of each class.
    pub per_class: usize,
    /// Requests at once.
    pub concurrency: usize,
    /// Requests at once to the same host.
    pub per_host: usize,
    /// The longest that a request may take, in s.
    pub timeout_s: f64,
    /// The longest that all attempts and redirects of a URL may take, in s, with the pauses between them, but without those that its host asks for.
    pub deadline_s: f64,
    /// How often a URL is tried where the failure may pass.
    pub attempts: u32,
    /// The pause before the second attempt, in s; twice as long before each further one. A host's `Retry-After` in
    /// seconds holds for all its URLs, up to 60 s.
    pub back_off_s: f64,
    /// Larger files are refused, in bytes.
    pub max_bytes: u64,
    /// Larger images are refused before they are decoded, in px.
    pub max_pixels: u64,
    /// Images that are shorter on either side are left out, in px.
    pub min_side: u32,
    /// The most redirects of a URL.
    pub max_redirects: u32,
    /// Whether robots.txt and headers against machine learning are heeded.
    pub opt_outs: OptOuts,
    /// Hosts that may have addresses of a private network or of this machine, as URLs name them, such as a mirror of your own. All others are asked at
    /// public addresses alone, wherever links and redirects lead.
    pub allow_private: Vec<String>,
    /// The least images of a class.
    pub min_per_class: usize,
    /// What happens where a class has fewer than `min_per_class`.
    pub below_min: BelowMin,
}

impl Default for Download {
    fn default() -> Self {
        Self {
            contact: String::new(),
            per_class: 300,
            concurrency: 64,
            per_host: 4,
            timeout_s: 20.0,
            deadline_s: 120.0,
            attempts: 3,
            back_off_s: 1.0,
            max_bytes: 20_000_000,
            max_pixels: 1 << 26,
            min_side: 32,
            max_redirects: 5,
            opt_outs: OptOuts::Heed,
            allow_private: Vec::new(),
            min_per_class: 1,
            below_min: BelowMin::Warn,
        }
    }
}

const LINKS: In<Links> = In::required("links", "Links by class, best first.");
const IMAGES: Out<Images> =
    Out::new("images", "Files named by their content, `ab/SHA256.jpg`, as they came; each once, whatever its classes.");
const DOWNLOADS: Out<Downloads> =
    Out::new("downloads", "One row per URL that was tried: class, rank, state, HTTP status, size, digests, file, reason.");

impl Stage for Download {
    const KIND: &'static str = "web/download";
    const VERSION: u32 = 1;
    const INPUTS: &'static [PortInfo] = &[LINKS.info()];
    const OUTPUTS: &'static [PortInfo] = &[IMAGES.info(), DOWNLOADS.info()];

    fn check(&self) -> Vec<Problem> {
        let seconds = |seconds: f64| seconds > 0.0 && seconds <= 86_400.0;
        Problem::unless(&[
            (
                "contact",
                is_contact(&self.contact),
                "your e-mail address or the URL of your page, by which operators of sites reach you (`contact: me@example.org`)",
            ),
            ("per_class", self.per_class > 0, "at least 1"),
            ("concurrency", (1..=4096).contains(&self.concurrency), "from 1 to 4096"),
            ("per_host", (1..=64).contains(&self.per_host), "from 1 to 64"),
            ("timeout_s", seconds(self.timeout_s), "a time above 0 s, at most a day"),
            ("deadline_s", seconds(self.deadline_s) && self.deadline_s >= self.timeout_s, "at least `timeout_s`, at most a day"),
            ("attempts", (1..=20).contains(&self.attempts), "from 1 to 20"),
            ("back_off_s", (0.0..=3600.0).contains(&self.back_off_s), "from 0 to 3600 s"),
            ("max_bytes", (1..=1 << 30).contains(&self.max_bytes), "from 1 byte to 1 GiB"),
            ("max_pixels", (1..=1 << 28).contains(&self.max_pixels), "from 1 to 268435456 px"),
            ("max_redirects", self.max_redirects <= 20, "at most 20"),
            ("min_per_class", self.min_per_class <= self.per_class, "at most `per_class`"),
        ])
    }

    fn units(&self, inputs: &Inputs) -> Result<Units> {
        let links = inputs.read(LINKS)?;
        let item = |(class, links): &(String, Vec<Link>)| {
            let mut text = class.clone();
            for (rank, link) in Links::used(links) {
                text.push_str(&format!("\n{rank} {} {}", link.md5.as_deref().unwrap_or("-"), link.url));
            }
            Digest::of_list("ovenbird links of a class 1", [(text.as_str(), Digest::of(b""))])
        };
        Ok(Units::Independent { items: links.by_class.iter().map(item).collect(), replaces: vec![LINKS.info().name] })
    }

    fn run(&self, units: &[Unit], cx: &Context<'_>) -> Result<()> {
        let links = cx.inputs.read(LINKS)?;
        let cut_off = |problem: String| Error::Input {
            port: Self::KIND,
            problem,
            hint: "check the certificates and the network of this machine".into(),
        };
        let (fetcher, n_roots) =
            Fetcher::new(self.manners(cx.threads)).map_err(|problem| cut_off(format!("cannot make a client of HTTP: {problem}")))?;
        if n_roots == 0 {
            cx.note("this machine has no root certificates, so no URL of HTTPS can be fetched: install the package `ca-certificates`");
        }
        if cx.most_items.is_some() {
            cx.note("a dry run: a few images of each class are downloaded");
        }
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .build()
            .map_err(|error| cut_off(format!("cannot start the network's thread: {error}")))?;
        let shared =
            Arc::new(Shared { fetcher, spool: cx.store.spool(), conditions: self.conditions(), asked: RwLock::new(Some(BTreeSet::new())) });
        let made = units.iter().try_for_each(|unit| {
            let Some(draft) = cx.begin_claimed(unit)? else { return Ok(()) };
            let wanted = self.per_class.min(cx.most_items.unwrap_or(usize::MAX));
            let mut classes: Vec<ClassWork<'_>> =
                links.by_class[unit.items.clone()].iter().map(|(class, links)| ClassWork::new(class, links, wanted)).collect();
            let n_damaged = runtime.block_on(self.download(&mut classes, &shared, cx))?;
            if n_damaged > 0 {
                cx.note(format!("{n_damaged} downloads in the home were damaged, and their URLs were asked for again"));
            }
            self.publish(draft, &classes, &shared.spool, cx)
        });
        // A name service that does not answer must not hold the run.
        runtime.shutdown_background();
        made
    }
}

/// Whether a text can be a contact, and stand in a header.
fn is_contact(contact: &str) -> bool {
    let is_plain = contact.len() <= 200 && contact.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'(' | b')'));
    let is_mail = contact.split_once('@').is_some_and(|(name, host)| !name.is_empty() && host.contains('.') && !host.ends_with('.'));
    let is_page = ["http://", "https://"].iter().any(|scheme| contact.starts_with(scheme)) && Url::parse(contact).is_ok();
    is_plain && (is_mail || is_page)
}

/// What the URLs under way share.
struct Shared {
    fetcher: Fetcher,
    spool: Spool,
    conditions: Conditions,
    /// The URLs of which nothing was known before; none once nothing is to be kept any more.
    asked: RwLock<Option<BTreeSet<String>>>,
}

impl Shared {
    /// Forgets what came of URLs that this run asked for, where none was answered, and lets nothing more be kept.
    fn forget_asked(&self) -> Result<()> {
        let asked = self.asked.write().unwrap_or_else(PoisonError::into_inner).take();
        Ok(asked.into_iter().flatten().try_for_each(|url| self.spool.forget(&url))?)
    }
}

/// What came of a URL, and whether it was asked for.
struct Obtained {
    record: UrlRecord,
    is_asked: bool,
    was_damaged: bool,
}

/// Takes a URL from the spool, or from the web into the spool.
async fn obtain(shared: Arc<Shared>, url: String) -> Result<Obtained> {
    let gone = "BUG: reading and writing the spool does not panic";
    let (also, of) = (Arc::clone(&shared), url.clone());
    let spooled = tokio::task::spawn_blocking(move || look_up(&also.spool, &of, &also.conditions)).await.expect(gone);
    let was_damaged = match spooled {
        Spooled::Known(record) => return Ok(Obtained { record: *record, is_asked: false, was_damaged: false }),
        Spooled::Unknown => false,
        Spooled::Damaged => true,
    };
    if let Some(asked) = &mut *shared.asked.write().unwrap_or_else(PoisonError::into_inner) {
        asked.insert(url.clone());
    }
    let WithBytes { record, bytes } = shared.fetcher.fetch(&url).await;
    let kept = tokio::task::spawn_blocking(move || {
        let asked = shared.asked.read().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none() {
            return Ok(record);
        }
        // The record last: it says that the file is there.
        if let (Some(image), Some((bytes, _))) = (&record.image, &bytes) {
            shared.spool.put(&image.sha256, bytes)?;
        }
        shared.spool.keep(&url, &record)?;
        Ok::<_, Error>(record)
    });
    Ok(Obtained { record: kept.await.expect(gone)?, is_asked: true, was_damaged })
}

/// A class whose links are followed.
struct ClassWork<'a> {
    class: &'a str,
    /// The links that may be used, best first, with their ranks.
    links: Vec<(usize, &'a Link)>,
    wanted: usize,
    /// How many links were begun.
    n_begun: usize,
    n_under_way: usize,
    /// By place among the links.
    found: BTreeMap<usize, UrlRecord>,
    /// The contents that count, by SHA-256.
    whole: BTreeSet<String>,
}

impl<'a> ClassWork<'a> {
    fn new(class: &'a str, links: &'a [Link], wanted: usize) -> Self {
        let links = Links::used(links).collect();
        Self { class, links, wanted, n_begun: 0, n_under_way: 0, found: BTreeMap::new(), whole: BTreeSet::new() }
    }

    /// The place of the next link to follow. As many are under way as could still be needed if none failed, so that which are tried does not
    /// depend on which answers come first.
    fn next(&mut self) -> Option<usize> {
        let is_needed = self.n_begun < self.links.len() && self.whole.len() + self.n_under_way < self.wanted;
        is_needed.then(|| {
            (self.n_begun, self.n_under_way) = (self.n_begun + 1, self.n_under_way + 1);
            self.n_begun - 1
        })
    }

    fn is_done(&self) -> bool {
        self.n_under_way == 0 && (self.n_begun == self.links.len() || self.whole.len() >= self.wanted)
    }
}

impl Download {
    fn conditions(&self) -> Conditions {
        Conditions {
            max_bytes: self.max_bytes,
            max_pixels: self.max_pixels,
            max_redirects: self.max_redirects,
            heeds_opt_outs: self.opt_outs == OptOuts::Heed,
            private_hosts: self.allow_private.clone(),
        }
    }

    fn manners(&self, threads: usize) -> Manners {
        Manners {
            user_agent: format!("ovenbird/{} (+{})", env!("CARGO_PKG_VERSION"), self.contact),
            concurrency: self.concurrency,
            per_host: self.per_host,
            timeout: Duration::from_secs_f64(self.timeout_s),
            deadline: Duration::from_secs_f64(self.deadline_s),
            attempts: self.attempts,
            back_off: Duration::from_secs_f64(self.back_off_s),
            decoders: threads,
            conditions: self.conditions(),
        }
    }

    /// Follows the links of classes. Returns how many entries of the spool were damaged.
    async fn download(&self, classes: &mut [ClassWork<'_>], shared: &Arc<Shared>, cx: &Context<'_>) -> Result<usize> {
        let mut under_way: JoinSet<(String, Result<Obtained>)> = JoinSet::new();
        // The places, class and link, that wait for a URL: two classes may have it.
        let mut waiting: HashMap<String, Vec<(usize, usize)>> = HashMap::new();
        let mut open: Vec<usize> = (0..classes.len()).collect();
        let mut silent = Silence::default();
        let mut n_damaged = 0;
        loop {
            cx.proceed()?;
            open.retain(|place| {
                let is_done = classes[*place].is_done();
                if is_done {
                    cx.tick(1);
                }
                !is_done
            });
            let mut open_from = 0;
            while under_way.len() < AHEAD * self.concurrency && open_from < open.len() {
                let class = open[open_from];
                let Some(link) = classes[class].next() else {
                    open_from += 1;
                    continue;
                };
                let url = &classes[class].links[link].1.url;
                let places = waiting.entry(url.clone()).or_default();
                places.push((class, link));
                if places.len() == 1 {
                    let (shared, url) = (Arc::clone(shared), url.clone());
                    under_way.spawn(async move { (url.clone(), obtain(shared, url).await) });
                }
            }
            if open.is_empty() {
                if let Err(error) = silent.end() {
                    shared.forget_asked()?;
                    return Err(error);
                }
                return Ok(n_damaged);
            }
            let Ok(Some(ended)) = tokio::time::timeout(GLANCE, under_way.join_next()).await else { continue };
            let (url, obtained) = ended.expect("BUG: a download does not panic");
            let Obtained { record, is_asked, was_damaged } = obtained?;
            n_damaged += usize::from(was_damaged);
            if let Err(error) = silent.listen(&record, is_asked) {
                under_way.shutdown().await;
                shared.forget_asked()?;
                return Err(error);
            }
            for (class, link) in waiting.remove(&url).unwrap_or_default() {
                let work = &mut classes[class];
                work.n_under_way -= 1;
                if let Some(image) = record.image.as_ref().filter(|_| self.refusal(&record).is_none()) {
                    work.whole.insert(image.sha256.clone());
                }
                work.found.insert(link, record.clone());
            }
        }
    }

    /// Why an image that is there is not used.
    fn refusal(&self, record: &UrlRecord) -> Option<(DownloadState, String)> {
        let [width, height] = record.image.as_ref()?.size;
        if record.bytes > self.max_bytes {
            Some((DownloadState::TooLarge, format!("{} bytes, more than {}", record.bytes, self.max_bytes)))
        } else if u64::from(width) * u64::from(height) > self.max_pixels {
            Some((DownloadState::TooLarge, format!("{width} x {height} px, more than {} px in all", self.max_pixels)))
        } else if width.min(height) < self.min_side {
            Some((DownloadState::TooSmall, format!("{width} x {height} px, shorter than {} px", self.min_side)))
        } else {
            None
        }
    }

    /// The rows of a class, by rank.
    fn rows(&self, work: &ClassWork<'_>) -> Vec<Row> {
        let mut seen = BTreeSet::new();
        let row = |(place, record): (&usize, &UrlRecord)| {
            let (rank, link) = work.links[*place];
            let md5 = link.md5.as_deref().map(str::trim).filter(|md5| md5.len() == 32);
            let md5_matches = record.image.as_ref().zip(md5).map(|(image, md5)| image.md5.eq_ignore_ascii_case(md5));
            let (state, reason) = match (&record.image, self.refusal(record)) {
                (None, _) => (record.state, record.reason.clone()),
                (Some(_), Some((state, reason))) => (state, Some(reason)),
                (Some(image), None) if !seen.insert(image.sha256.clone()) => {
                    (DownloadState::Duplicate, Some("a better link of the class has the same content".into()))
                }
                (Some(_), None) if md5_matches == Some(false) => {
                    (DownloadState::Changed, Some("another MD5 than when the links were made".into()))
                }
                (Some(_), None) => (DownloadState::Downloaded, None),
            };
            Row {
                rank: rank as u32,
                url: record.url.clone(),
                final_url: record.final_url.clone(),
                state,
                code: record.code,
                bytes: record.bytes,
                sha256: record.image.as_ref().map(|image| image.sha256.clone()),
                md5_matches,
                size: record.size,
                file: record.image.as_ref().filter(|_| state.has_image()).map(|image| file_name(&image.sha256, &image.extension)),
                attempts: record.attempts,
                time_ms: Some(record.time_ms),
                reason,
            }
        };
        work.found.iter().map(row).collect()
    }

    fn publish(&self, draft: UnitDraft, classes: &[ClassWork<'_>], spool: &Spool, cx: &Context<'_>) -> Result<()> {
        let of_class = |work: &ClassWork<'_>| ClassDownloads {
            class: work.class.into(),
            wanted: work.wanted as u64,
            links: work.links.len() as u64,
            rows: self.rows(work),
        };
        let downloads = Downloads { by_class: classes.iter().map(of_class).collect() };
        note(&downloads, cx);
        let min = self.min_per_class.min(cx.most_items.unwrap_or(usize::MAX));
        refuse_few(&downloads.counts(), min, self.below_min, LINKS.info().name, cx)?;
        let mut images = BTreeMap::new();
        for record in classes.iter().flat_map(|work| work.found.values()).filter(|record| self.refusal(record).is_none()) {
            if let Some(image) = &record.image {
                images.insert(file_name(&image.sha256, &image.extension), image);
            }
        }
        for (name, image) in &images {
            draft.link(IMAGES, name, &spool.path(&image.sha256), image.content)?;
        }
        let rows = || downloads.by_class.iter().flat_map(|of_class| &of_class.rows);
        let transient: BTreeMap<&str, &Row> = rows().filter(|row| row.state.is_transient()).map(|row| (row.url.as_str(), row)).collect();
        let failed = |row: &&Row| FailedItem {
            item: row.url.clone(),
            reason: row.reason.clone().unwrap_or_else(|| row.state.word().into()),
            attempts: row.attempts,
        };
        if !transient.is_empty() {
            cx.note(format!("{} failures may pass: `ovenbird retry PIPELINE --failed` asks again", transient.len()));
        }
        draft.write_retriable(&transient.values().map(failed).collect::<Vec<_>>())?;
        downloads.write(draft.create(DOWNLOADS, "downloads.parquet")?)?;
        let mut metrics: BTreeMap<String, serde_json::Value> = BTreeMap::new();
        metrics.insert("classes".into(), classes.len().into());
        metrics.insert("images".into(), images.len().into());
        metrics.insert("tried".into(), rows().count().into());
        for state in DownloadState::ALL {
            let n_rows = rows().filter(|row| row.state == state).count();
            if n_rows > 0 {
                metrics.insert(state.word().replace('-', "_"), n_rows.into());
            }
        }
        cx.commit(draft, metrics)
    }
}

/// Whether any host has answered yet.
#[derive(Default)]
struct Silence {
    has_ended: bool,
    /// URLs without an answer, while there was none.
    n_urls: usize,
    hosts: BTreeSet<String>,
    /// The last of them, and why.
    last: String,
}

impl Silence {
    /// Fails where many hosts were asked and none answered: the fault is then this machine's, and not a property of the URLs. An answer of an earlier run
    /// counts: what is asked for again may well be dead.
    fn listen(&mut self, record: &UrlRecord, is_asked: bool) -> Result<()> {
        let is_silent = matches!(record.state, DownloadState::Unreachable | DownloadState::Timeout | DownloadState::RobotsUnreachable);
        if self.has_ended
            || (is_silent && (record.code.is_some() || !is_asked))
            || matches!(record.state, DownloadState::BadUrl | DownloadState::PrivateAddress)
        {
            return Ok(());
        }
        if !is_silent {
            *self = Self { has_ended: true, ..Self::default() };
            return Ok(());
        }
        self.n_urls += 1;
        self.hosts.extend(Url::parse(&record.url).ok().and_then(|url| Some(url.host_str()?.to_owned())));
        self.last = format!("{}: {}", record.url, record.reason.as_deref().unwrap_or_default());
        if self.n_urls < OFFLINE_AFTER.0 || self.hosts.len() < OFFLINE_AFTER.1 { Ok(()) } else { Err(self.error()) }
    }

    /// Fails where all URLs were tried, some more than a few, and none was answered.
    fn end(&self) -> Result<()> {
        if self.n_urls < OFFLINE_AT_END { Ok(()) } else { Err(self.error()) }
    }

    fn error(&self) -> Error {
        let Self { n_urls, hosts, last, .. } = self;
        Error::Input {
            port: LINKS.info().name,
            problem: format!("none of {n_urls} URLs of {} hosts was reached; the last, {last}", hosts.len()),
            hint: "run it where there is a network: compute nodes often have none; the home can then go to another machine".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_is_required_and_fits_a_header() {
        let problems = Stage::check(&Download::default());
        assert!(problems.len() == 1 && problems[0].field == "contact", "{problems:?}");
        for (contact, expected) in [
            ("me@example.org", true),
            ("https://example.org/crawl", true),
            ("", false),
            ("me", false),
            ("me@", false),
            ("@example.org", false),
            ("me@example.org\r\nX: y", false),
            ("mé@example.org", false),
            ("me (at) example.org", false),
            ("https://", false),
        ] {
            assert_eq!(is_contact(contact), expected, "{contact}");
        }
    }

    #[test]
    fn as_many_links_are_tried_as_are_needed_and_no_more() {
        let links: Vec<Link> = (0..10).map(|rank| Link { url: format!("http://a/{rank}"), ..Link::default() }).collect();
        let mut work = ClassWork::new("owl", &links, 3);
        assert_eq!([(); 4].map(|()| work.next()), [Some(0), Some(1), Some(2), None]);
        // Two fail and one is whole, in whatever order.
        work.n_under_way -= 1;
        assert_eq!([work.next(), work.next()], [Some(3), None]);
        work.whole.insert("content".into());
        work.n_under_way -= 1;
        assert_eq!(work.next(), None);
        work.n_under_way -= 1;
        assert_eq!([work.next(), work.next()], [Some(4), None]);
        assert!(!work.is_done());
    }
}
