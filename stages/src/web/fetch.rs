//! One URL to its end: attempts, redirects, limits, and what the answer holds.
//!
//! Requests are plain GETs over HTTP/1.1, without cookies, referrers or compression. Proxies that the environment names (`HTTP_PROXY`) are not used: a proxy
//! would look names up itself, past the check of addresses, and would show another address to the sites than the operator's own.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use md5::Md5;
use ovenbird_cache::Digest;
use ovenbird_data::{
    content,
    images::{Image, is_decoded},
};
use reqwest::{
    Client, Response, StatusCode,
    header::{LOCATION, RETRY_AFTER},
};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use url::Url;

use super::{
    address::{Refusal, Resolver},
    opt_out::{MAX_ROBOTS_BYTES, Rules, forbidden_by},
    spooled::{Conditions, Fetched, UrlRecord},
};
use crate::artifacts::DownloadState as State;

/// After so many pauses in a row a host's other URLs are not asked for.
const MAX_PAUSES: u32 = 10;
/// The longest that an answer's `Retry-After` is heeded.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// The longest pause between two attempts.
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// Bytes by which a picture is known.
const HEAD_BYTES: usize = 512;
/// Redirects of a robots.txt. (RFC 9309 asks for five.)
const ROBOTS_REDIRECTS: u32 = 5;
/// The longest URL that is tried, in bytes.
const MAX_URL: usize = 8192;
/// Connections to a host that wait for a next request.
const IDLE_PER_HOST: usize = 4;

/// How requests are made.
#[derive(Debug, Clone)]
pub(super) struct Manners {
    pub(super) user_agent: String,
    pub(super) concurrency: usize,
    pub(super) per_host: usize,
    /// Of one request.
    pub(super) timeout: Duration,
    /// Of all requests for a URL.
    pub(super) deadline: Duration,
    pub(super) attempts: u32,
    pub(super) back_off: Duration,
    pub(super) decoders: usize,
    pub(super) conditions: Conditions,
}

/// Why there is no image.
#[derive(Debug, Clone)]
struct Failure {
    state: State,
    reason: String,
    code: Option<u16>,
    bytes: u64,
    size: Option<[u32; 2]>,
    /// How long the host asks to wait.
    retry_after: Option<Duration>,
}

impl Failure {
    fn new(state: State, reason: impl Into<String>) -> Self {
        Self { state, reason: reason.into(), code: None, bytes: 0, size: None, retry_after: None }
    }

    fn of_answer(state: State, reason: impl Into<String>, code: StatusCode) -> Self {
        Self { code: Some(code.as_u16()), ..Self::new(state, reason) }
    }

    fn timeout(after: Duration) -> Self {
        Self::new(State::Timeout, format!("no whole answer within {:.0} s", after.as_secs_f64()))
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let state = match refusal {
            Refusal::Private(_) => State::PrivateAddress,
            Refusal::Unknown(_) => State::Unreachable,
        };
        Self::new(state, refusal.to_string())
    }
}

/// An image with its bytes.
pub(super) struct WithBytes {
    pub(super) record: UrlRecord,
    /// Of an image, with its request's turn: held until the image is kept, so that no more are in memory, or lost by a kill, than requests are made at once.
    pub(super) bytes: Option<(Vec<u8>, Turn)>,
}

/// Fetches URLs, many at once.
pub(super) struct Fetcher {
    client: Client,
    resolver: Resolver,
    manners: Manners,
    requests: Arc<Semaphore>,
    decoders: Semaphore,
    /// By host. Both maps are locked to look up and to add, never while waiting.
    hosts: Mutex<HashMap<String, Host>>,
    /// By scheme, host and port.
    rules: Mutex<HashMap<String, Arc<OnceCell<Rules>>>>,
}

/// The time that is left for a URL: waiting for other requests does not count.
struct TimeLeft(Duration);

impl TimeLeft {
    fn spend(&mut self, since: Instant) {
        self.0 = self.0.saturating_sub(since.elapsed());
    }
}

/// A host that is asked.
struct Host {
    requests: Arc<Semaphore>,
    /// When it may be asked again, where it asked for a pause.
    not_before: Option<Instant>,
    /// Pauses it asked for since it last sent an image.
    n_pauses: u32,
}

/// The right to make a request.
pub(super) struct Turn {
    _host: OwnedSemaphorePermit,
    _request: OwnedSemaphorePermit,
}

impl Fetcher {
    /// Fails, in words, where there can be no client. `root_certificates`: how many the machine has; without any no HTTPS succeeds.
    pub(super) fn new(manners: Manners) -> Result<(Self, usize), String> {
        let resolver = Resolver::new(&manners.conditions.private_hosts, manners.timeout);
        let mut roots = rustls::RootCertStore::empty();
        let (n_roots, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .user_agent(&manners.user_agent)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .no_proxy()
            .dns_resolver(resolver.clone())
            .connect_timeout(manners.timeout)
            .pool_max_idle_per_host(manners.per_host.min(IDLE_PER_HOST))
            .build()
            .map_err(|error| with_sources(&error))?;
        let fetcher = Self {
            client,
            resolver,
            requests: Arc::new(Semaphore::new(manners.concurrency)),
            decoders: Semaphore::new(manners.decoders.max(1)),
            hosts: Mutex::default(),
            rules: Mutex::default(),
            manners,
        };
        Ok((fetcher, n_roots))
    }

    /// Fetches a URL; a failure is a result as well.
    pub(super) async fn fetch(&self, link: &str) -> WithBytes {
        let mut left = TimeLeft(self.manners.deadline);
        let mut at = link.to_owned();
        let mut attempts = 0;
        let found = loop {
            attempts += 1;
            let found = self.attempt(link, &mut at, &mut left).await;
            let Err(failure) = &found else { break found };
            if !failure.state.is_transient() || failure.state == State::RobotsUnreachable || attempts >= self.manners.attempts {
                break found;
            }
            let back_off = self.manners.back_off.saturating_mul(1 << (attempts - 1).min(16)).min(MAX_BACK_OFF);
            // What the host asked for is heeded before its next request.
            if back_off.max(failure.retry_after.map_or(Duration::ZERO, |asked| asked.min(MAX_RETRY_AFTER))) >= left.0 {
                break found;
            }
            let since = Instant::now();
            tokio::time::sleep(back_off).await;
            left.spend(since);
        };
        let record = UrlRecord {
            url: link.to_owned(),
            final_url: at,
            state: State::Downloaded,
            reason: None,
            code: Some(200),
            bytes: 0,
            size: None,
            image: None,
            attempts,
            time_ms: now_ms(),
            under: self.manners.conditions.clone(),
        };
        match found {
            Ok((image, bytes, turn)) => {
                let record = UrlRecord { bytes: bytes.len() as u64, size: Some(image.size), image: Some(image), ..record };
                WithBytes { record, bytes: Some((bytes, turn)) }
            }
            Err(Failure { state, reason, code, bytes, size, retry_after: _ }) => {
                WithBytes { record: UrlRecord { state, reason: Some(reason), code, bytes, size, ..record }, bytes: None }
            }
        }
    }

    /// Follows a link to an image. `at`: receives where it led.
    async fn attempt(&self, link: &str, at: &mut String, left: &mut TimeLeft) -> Result<(Fetched, Vec<u8>, Turn), Failure> {
        let mut url = parsed(link).map_err(|problem| Failure::new(State::BadUrl, problem))?;
        for n_redirects in 0.. {
            url.as_str().clone_into(at);
            let prefix = if n_redirects > 0 { "redirected: " } else { "" };
            let told = |failure: Failure| Failure { reason: format!("{prefix}{}", failure.reason), ..failure };
            let since = Instant::now();
            self.resolver.check(&url).await.map_err(|refusal| told(refusal.into()))?;
            left.spend(since);
            if self.manners.conditions.heeds_opt_outs {
                self.heed_robots(&url).await?;
            }
            let turn = self.turn(&url).await?;
            let limit = self.manners.timeout.min(left.0);
            let since = Instant::now();
            let answer = tokio::time::timeout(limit, self.answer(&url)).await;
            left.spend(since);
            if let Ok(answer) = &answer {
                self.heed_pause(&url, answer);
            }
            let next = match answer {
                Err(_) => return Err(told(Failure::timeout(limit))),
                Ok(Err(failure)) => return Err(failure),
                Ok(Ok(Answer::Image(bytes))) => return self.judge(bytes).await.map(|(image, bytes)| (image, bytes, turn)),
                Ok(Ok(Answer::Redirect(code, to))) => to.and_then(|to| redirected(&url, &to)).map_err(|problem| (code, problem)),
            };
            url = next.map_err(|(code, problem)| Failure::of_answer(State::BadRedirect, problem, code))?;
            if n_redirects >= self.manners.conditions.max_redirects {
                return Err(Failure::new(
                    State::BadRedirect,
                    format!("more than {n_redirects} redirects, the last to {}", short(url.as_str())),
                ));
            }
        }
        unreachable!("redirects end")
    }

    /// Waits for the right to make a request. The host's turn comes first, so that nobody holds a general one while waiting for a busy host, or
    /// for one that asked for a pause. Fails where a host does nothing but ask for pauses.
    async fn turn(&self, url: &Url) -> Result<Turn, Failure> {
        let acquired = "BUG: these semaphores are never closed";
        let host = self.at_host(url, |host| Arc::clone(&host.requests)).acquire_owned().await.expect(acquired);
        loop {
            let (not_before, n_pauses) = self.at_host(url, |host| (host.not_before, host.n_pauses));
            if n_pauses > MAX_PAUSES {
                return Err(Failure::new(State::ServerError, format!("the host asked for a pause {n_pauses} times in a row")));
            }
            match not_before.filter(|until| *until > Instant::now()) {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => break,
            }
        }
        Ok(Turn { _host: host, _request: Arc::clone(&self.requests).acquire_owned().await.expect(acquired) })
    }

    fn at_host<T>(&self, url: &Url, look: impl FnOnce(&mut Host) -> T) -> T {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Host { requests: Arc::new(Semaphore::new(self.manners.per_host)), not_before: None, n_pauses: 0 };
        look(hosts.entry(url.host_str().unwrap_or_default().to_owned()).or_insert_with(new))
    }

    /// Heeds what an answer says of when to come again.
    fn heed_pause(&self, url: &Url, answer: &Result<Answer, Failure>) {
        match answer {
            Ok(Answer::Image(_)) => self.at_host(url, |host| host.n_pauses = 0),
            Err(Failure { retry_after: Some(asked), .. }) => self.at_host(url, |host| {
                let now = Instant::now();
                // Answers that were under way together ask for one pause.
                host.n_pauses += u32::from(host.not_before.is_none_or(|until| until <= now));
                host.not_before = Some(now + (*asked).min(MAX_RETRY_AFTER)).max(host.not_before);
            }),
            _ => {}
        }
    }

    /// The answer to one request, to its last byte.
    async fn answer(&self, url: &Url) -> Result<Answer, Failure> {
        let mut response = self.client.get(url.clone()).header("accept", "image/*").send().await.map_err(|error| transport(&error))?;
        let code = response.status();
        if code.is_redirection() && code != StatusCode::NOT_MODIFIED {
            let to = match response.headers().get(LOCATION).map(|to| str::from_utf8(to.as_bytes())) {
                Some(Ok(to)) => Ok(to.to_owned()),
                Some(Err(_)) => Err(format!("HTTP {} with a Location that is no text", code.as_u16())),
                None => Err(format!("HTTP {} without a Location", code.as_u16())),
            };
            return Ok(Answer::Redirect(code, to));
        }
        if code != StatusCode::OK {
            return Err(refused(code, &response));
        }
        if self.manners.conditions.heeds_opt_outs
            && let Some(why) = forbidden_by(response.headers())
        {
            return Err(Failure::of_answer(State::OptedOut, why, code));
        }
        let max_bytes = self.manners.conditions.max_bytes;
        let too_large = |bytes: u64| {
            let reason = format!("more than {max_bytes} bytes");
            Failure { bytes, ..Failure::of_answer(State::TooLarge, reason, code) }
        };
        if let Some(announced) = response.content_length()
            && announced > max_bytes
        {
            let reason = format!("{announced} bytes, more than {max_bytes}");
            return Err(Failure { reason, ..too_large(0) });
        }
        let mut bytes = Vec::new();
        let mut is_known = false;
        loop {
            let chunk = response.chunk().await.map_err(|error| {
                let failure = transport(&error);
                let state = if failure.state == State::Timeout { State::Timeout } else { State::CutShort };
                let reason = format!("after {} bytes: {}", bytes.len(), failure.reason);
                Failure { state, reason, code: Some(code.as_u16()), bytes: bytes.len() as u64, ..failure }
            })?;
            let Some(chunk) = chunk else { break };
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > max_bytes {
                return Err(too_large(bytes.len() as u64));
            }
            if !is_known && bytes.len() >= HEAD_BYTES {
                is_known = is_decoded(&bytes);
                if !is_known {
                    return Err(not_an_image(&bytes, code));
                }
            }
        }
        if is_decoded(&bytes) { Ok(Answer::Image(bytes)) } else { Err(not_an_image(&bytes, code)) }
    }

    /// Decodes an image to its end, and names it by its content.
    async fn judge(&self, bytes: Vec<u8>) -> Result<(Fetched, Vec<u8>), Failure> {
        let _turn = self.decoders.acquire().await;
        let max_pixels = self.manners.conditions.max_pixels;
        let n_bytes = bytes.len() as u64;
        let judged = tokio::task::spawn_blocking(move || judged(&bytes, max_pixels).map(|image| (image, bytes))).await;
        // A decoder that panics does so because of the image.
        let judged = judged.unwrap_or_else(|_| Err(Failure::of_answer(State::DamagedImage, "the decoder gave up", StatusCode::OK)));
        judged.map_err(|failure| Failure { bytes: n_bytes, ..failure })
    }

    /// Fails where a host's robots.txt forbids a URL, or cannot be had.
    async fn heed_robots(&self, url: &Url) -> Result<(), Failure> {
        let cell = {
            let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(rules.entry(url.origin().ascii_serialization()).or_default())
        };
        match cell.get_or_init(|| self.rules_of(url)).await {
            Rules::None => Ok(()),
            Rules::Robot(robot) if robot.allowed(url.as_str()) => Ok(()),
            Rules::Robot(_) => Err(Failure::new(State::Robots, "robots.txt forbids it")),
            Rules::Unreachable(reason) => Err(Failure::new(State::RobotsUnreachable, reason.clone())),
        }
    }

    /// The rules of a URL's host.
    async fn rules_of(&self, url: &Url) -> Rules {
        let Ok(start) = url.join("/robots.txt") else { return Rules::None };
        let mut reason = String::new();
        for attempt in 0..self.manners.attempts {
            if attempt > 0 {
                tokio::time::sleep(self.manners.back_off.saturating_mul(1 << (attempt - 1).min(16)).min(MAX_BACK_OFF)).await;
            }
            match self.robots(start.clone()).await {
                Ok(rules) => return rules,
                Err(problem) => reason = format!("robots.txt: {problem}"),
            }
        }
        Rules::Unreachable(reason)
    }

    async fn robots(&self, mut url: Url) -> Result<Rules, String> {
        for _ in 0..=ROBOTS_REDIRECTS {
            self.resolver.check(&url).await.map_err(|refusal| refusal.to_string())?;
            let _turn = self.turn(&url).await.map_err(|failure| failure.reason)?;
            let limit = self.manners.timeout;
            let text = async {
                let mut response = self.client.get(url.clone()).send().await.map_err(|error| transport(&error).reason)?;
                let code = response.status();
                if code.is_redirection() {
                    let to = response.headers().get(LOCATION).and_then(|to| str::from_utf8(to.as_bytes()).ok()).unwrap_or_default();
                    return Ok(Robots::Elsewhere(redirected(&url, to)?));
                }
                if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS && code != StatusCode::REQUEST_TIMEOUT {
                    return Ok(Robots::Rules(Rules::None));
                }
                if !code.is_success() {
                    return Err(format!("HTTP {}", code.as_u16()));
                }
                let mut text = Vec::new();
                while let Some(chunk) = response.chunk().await.map_err(|error| transport(&error).reason)? {
                    text.extend_from_slice(&chunk);
                    if text.len() >= MAX_ROBOTS_BYTES {
                        text.truncate(MAX_ROBOTS_BYTES);
                        break;
                    }
                }
                Ok::<_, String>(Robots::Rules(Rules::parse(&text)))
            };
            match tokio::time::timeout(limit, text).await {
                Err(_) => return Err(Failure::timeout(limit).reason),
                Ok(Err(problem)) => return Err(problem),
                Ok(Ok(Robots::Rules(rules))) => return Ok(rules),
                Ok(Ok(Robots::Elsewhere(to))) => url = to,
            }
        }
        // Too many redirects are taken for a missing file. (RFC 9309, section 2.3.1.2.)
        Ok(Rules::None)
    }
}

enum Robots {
    Rules(Rules),
    Elsewhere(Url),
}

enum Answer {
    /// Bytes that begin as an image.
    Image(Vec<u8>),
    /// Where to, or what is wrong with it.
    Redirect(StatusCode, Result<String, String>),
}

/// A URL that may be asked for, or what is wrong with it.
fn parsed(link: &str) -> Result<Url, String> {
    if link.len() > MAX_URL {
        return Err(format!("a URL of {} bytes, more than {MAX_URL}", link.len()));
    }
    let url = Url::parse(link.trim()).map_err(|error| format!("{error}: `{}`", short(link)))?;
    sound(url)
}

fn redirected(from: &Url, to: &str) -> Result<Url, String> {
    if to.is_empty() || to.len() > MAX_URL {
        return Err(format!("redirected to a URL of {} bytes", to.len()));
    }
    let url = from.join(to).map_err(|error| format!("redirected to `{}`: {error}", short(to)))?;
    sound(url).map_err(|problem| format!("redirected: {problem}"))
}

fn sound(mut url: Url) -> Result<Url, String> {
    if !["http", "https"].contains(&url.scheme()) {
        return Err(format!("expected a URL of http or https, found `{}`", short(url.as_str())));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a URL with a user's name or password".into());
    }
    url.set_fragment(None);
    Ok(url)
}

/// A text of strangers as it stands in messages: its beginning.
fn short(text: &str) -> &str {
    &text[..text.floor_char_boundary(120)]
}

/// Why a status is no image.
fn refused(code: StatusCode, response: &Response) -> Failure {
    let reason = format!("HTTP {}", code.as_u16());
    let state = match code.as_u16() {
        404 | 410 => State::Gone,
        408 | 425 | 429 | 500.. => State::ServerError,
        _ => State::HttpError,
    };
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Failure { retry_after: seconds.map(Duration::from_secs), ..Failure::of_answer(state, reason, code) }
}

fn not_an_image(bytes: &[u8], code: StatusCode) -> Failure {
    let found = content::describe(bytes).unwrap_or("bytes of no known format");
    let reason = format!("expected a JPEG, PNG, WebP or GIF image, found {found}");
    Failure { bytes: bytes.len() as u64, ..Failure::of_answer(State::NotAnImage, reason, code) }
}

/// Why a request broke.
fn transport(error: &reqwest::Error) -> Failure {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = source {
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return refusal.clone().into();
        }
        source = cause.source();
    }
    let state = if error.is_timeout() { State::Timeout } else { State::Unreachable };
    let url_less = std::error::Error::source(error).map_or_else(|| error.to_string(), with_sources);
    Failure::new(state, short(&url_less))
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The digests and the size of an image that decodes to its end.
fn judged(bytes: &[u8], max_pixels: u64) -> Result<Fetched, Failure> {
    let damaged = |error: ovenbird_data::Error| {
        let reason = match error {
            ovenbird_data::Error::Malformed { problem, .. } => problem,
            other => other.to_string(),
        };
        Failure::of_answer(State::DamagedImage, short(&reason), StatusCode::OK)
    };
    if let Some(size @ [width, height]) = Image::claimed_size(bytes)
        && u64::from(width) * u64::from(height) > max_pixels
    {
        let reason = format!("{width} x {height} px, more than {max_pixels} px in all");
        return Err(Failure { size: Some(size), ..Failure::of_answer(State::TooLarge, reason, StatusCode::OK) });
    }
    let size = Image::check(bytes, Path::new("")).map_err(damaged)?;
    Ok(described(bytes, size))
}

/// The digests and the kind of an image whose size is known.
pub(super) fn described(bytes: &[u8], size: [u32; 2]) -> Fetched {
    let extension = match content::image_format(bytes).map(content::Format::name) {
        Some("a PNG") => "png",
        Some("a WebP") => "webp",
        Some("a GIF") => "gif",
        _ => "jpg",
    };
    Fetched {
        sha256: hexadecimal(&Sha256::digest(bytes)),
        md5: hexadecimal(&Md5::digest(bytes)),
        content: Digest::of(bytes),
        size,
        extension: extension.into(),
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Now, in ms since 1970.
#[expect(clippy::disallowed_methods, reason = "the table of downloads says when the web gave an answer; no result depends on it")]
pub(super) fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_strangers_are_refused_in_words() {
        for (url, problem) in [
            ("ftp://a/b.jpg", "expected a URL of http or https"),
            ("file:///etc/passwd", "expected a URL of http or https"),
            ("data:image/png;base64,xxxx", "expected a URL of http or https"),
            ("//a/b.jpg", "relative URL without a base"),
            ("", "relative URL without a base"),
            ("http://", "empty host"),
            ("http://user:secret@a/b.jpg", "a URL with a user's name or password"),
            ("http://user@a/b.jpg", "a URL with a user's name or password"),
            ("http://a:99999/", "invalid port"),
            ("http://[::1/", "invalid IPv6"),
        ] {
            let found = parsed(url).unwrap_err();
            assert!(found.contains(problem), "{url}: {found}");
        }
        assert!(parsed(&format!("http://a/{}", "b".repeat(MAX_URL))).is_err());
        assert_eq!(parsed(" http://A/ü b.jpg#part ").unwrap().as_str(), "http://a/%C3%BC%20b.jpg");
        let from = Url::parse("https://a/b/c").unwrap();
        assert_eq!(redirected(&from, "../d.jpg").unwrap().as_str(), "https://a/d.jpg");
        for to in ["file:///etc/passwd", "", "gopher://a/", "http://me:too@a/"] {
            assert!(redirected(&from, to).is_err(), "{to}");
        }
    }
}
