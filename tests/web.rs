//! Images of the web, fetched by the program from a small web of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use ovenbird_cache::{Store, UnitKey, inputs};
use ovenbird_data::images::Image;
use ovenbird_stages::{
    Artifact as _,
    artifacts::{Download, DownloadState, Downloads, Dropped, Link, Links},
};
use serde_json::{Value, json};

use crate::support::{
    World,
    toy_web::{Answer, Request, ToyWeb},
    until,
};

/// A picture whose content its number decides.
fn picture(number: u32) -> Vec<u8> {
    sized(number, 48, 40)
}

fn sized(number: u32, width: u32, height: u32) -> Vec<u8> {
    let level = |place: u32| (number.wrapping_mul(7919).wrapping_add(place).wrapping_mul(2_654_435_761) >> 24) as u8;
    Image { width, height, rgb: (0..3 * width * height).map(level).collect() }.to_jpeg(90)
}

/// A web in which every path is a picture of its own, but for those that `others` answers.
fn web(others: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> ToyWeb {
    ToyWeb::start(0, move |request| {
        if let Some(answer) = others(request) {
            return answer;
        }
        match request.path.as_str() {
            "/robots.txt" => Answer::status(404),
            path => {
                Answer::file("image/jpeg", picture(path.bytes().fold(7, |sum: u32, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))))
            }
        }
    })
}

/// A link to a URL.
fn link(url: impl Into<String>) -> Link {
    Link { url: url.into(), ..Link::default() }
}

/// Writes `links.parquet`.
fn write_links(world: &World, classes: Vec<(&str, Vec<Link>)>) {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(&home.path().join("home")).unwrap();
    let _session = store.enter().unwrap();
    let fingerprint = ovenbird_cache::Digest::of(b"links").to_hex().parse().unwrap();
    let draft = store.begin_unit(&UnitKey { kind: "pool/retrieve".into(), fingerprint, item_key: None }).unwrap();
    let file = draft.create("links.parquet").unwrap();
    let path = file.path().to_owned();
    let by_class = classes.into_iter().map(|(class, links)| (class.to_owned(), links)).collect();
    Links { by_class, ..Links::default() }.write(file).unwrap();
    world.write("links.parquet", fs::read(path).unwrap());
}

/// A pipeline of one download.
fn pipeline(with: &str) -> String {
    format!(
        "version: 1
name: web
stages:
  - id: images
    use: web/download
    in: {{links: ./links.parquet}}
    with: {{contact: me@example.org, allow_private: [127.0.0.1], back_off_s: 0.01, min_side: 1, {with}}}
"
    )
}

/// The newest table of downloads that was published.
fn downloads(world: &World) -> Downloads {
    newest(world, "web-download/")
}

fn newest(world: &World, kind: &str) -> Downloads {
    let tables = world.units().into_keys().filter(|name| name.contains(kind) && name.ends_with("downloads.parquet"));
    let tables: Vec<_> = tables.map(|name| world.path(".ovenbird").join(name)).collect();
    let path = tables.into_iter().max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap()).unwrap();
    Downloads::open(&inputs::digest_path(&path, None, 0).unwrap()).unwrap()
}

/// The rows of the only class.
fn rows(world: &World) -> Vec<Download> {
    let mut downloads = downloads(world);
    assert_eq!(downloads.by_class.len(), 1);
    downloads.by_class.remove(0).rows
}

fn states(rows: &[Download]) -> Vec<(u32, &'static str)> {
    rows.iter().map(|row| (row.rank, row.state.word())).collect()
}

/// A PNG of a few bytes that claims these sides.
fn bomb(side: u32) -> Vec<u8> {
    let mut png = Image { width: 2, height: 2, rgb: vec![0; 12] }.to_png();
    png[16..24].copy_from_slice(&[side.to_be_bytes(), side.to_be_bytes()].concat());
    let crc =
        png[12..29].iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1))));
    png[29..33].copy_from_slice(&(!crc).to_be_bytes());
    png
}

/// Answers that the web gives, each with the state and a part of the reason that become of it.
fn hostile() -> Vec<(&'static str, Answer, DownloadState, &'static str)> {
    use DownloadState as S;
    let whole = picture(1);
    let head = |length: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    let jpeg = |body: Vec<u8>| Answer::file("image/jpeg", body);
    let flood = |n: usize| {
        let lines: String = (0..n).map(|place| format!("X-Flood-{place}: {}\r\n", "x".repeat(100))).collect();
        Answer::Raw([format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: 5\r\n\r\n").into_bytes(), b"hello".to_vec()].concat())
    };
    vec![
        ("ok", jpeg(whole.clone()), S::Downloaded, ""),
        ("404", Answer::status(404), S::Gone, "HTTP 404"),
        ("410", Answer::status(410), S::Gone, "HTTP 410"),
        ("401", Answer::status(401), S::HttpError, "HTTP 401"),
        ("403", Answer::status(403), S::HttpError, "HTTP 403"),
        ("451", Answer::status(451), S::HttpError, "HTTP 451"),
        ("204", Answer::Raw(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()), S::HttpError, "HTTP 204"),
        ("206", Answer::Whole(206, Vec::new(), whole.clone()), S::HttpError, "HTTP 206"),
        ("304", Answer::Raw(b"HTTP/1.1 304 Not Modified\r\n\r\n".to_vec()), S::HttpError, "HTTP 304"),
        ("429", Answer::status(429).with("Retry-After", "0"), S::ServerError, "HTTP 429"),
        ("429-for-an-hour", Answer::status(429).with("Retry-After", "3600"), S::ServerError, "HTTP 429"),
        ("429-for-never", Answer::status(429).with("Retry-After", "99999999999999999999"), S::ServerError, "HTTP 429"),
        ("500", Answer::status(500), S::ServerError, "HTTP 500"),
        ("503", Answer::status(503), S::ServerError, "HTTP 503"),
        ("599", Answer::status(599), S::ServerError, "HTTP 599"),
        ("silence", Answer::Silence, S::Timeout, "no whole answer"),
        ("drip", Answer::Drip([head(1 << 20), b"\xff\xd8\xff".to_vec()].concat()), S::Timeout, "no whole answer"),
        ("drip-of-headers", Answer::Drip(b"HTTP/1.1 200 OK\r\nX-Slow: ".to_vec()), S::Timeout, "no whole answer"),
        ("hangs-up", Answer::Raw(Vec::new()), S::Unreachable, ""),
        ("no-http", Answer::Raw(b"SSH-2.0-OpenSSH_9.6\r\n".to_vec()), S::Unreachable, ""),
        ("half-a-status", Answer::Raw(b"HTTP/1.1 2".to_vec()), S::Unreachable, ""),
        ("short-of-its-length", Answer::Raw([head(whole.len() + 9), whole.clone()].concat()), S::CutShort, "after"),
        ("longer-than-its-length", Answer::Raw([head(whole.len() - 9), whole.clone()].concat()), S::DamagedImage, ""),
        ("length-is-no-number", Answer::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nhello".to_vec()), S::Unreachable, ""),
        (
            "two-lengths",
            Answer::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello".to_vec()),
            S::Unreachable,
            "",
        ),
        (
            "nonsense-in-chunks",
            Answer::Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\xff\xd8\xff\r\n".to_vec()),
            S::CutShort,
            "after 0 bytes",
        ),
        (
            "chunks-without-end",
            Answer::Raw(
                [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n".to_vec(), whole[..3].to_vec(), b"\r\n".to_vec()].concat(),
            ),
            S::CutShort,
            "after",
        ),
        ("html-as-jpeg", jpeg(b"<!doctype html><p>hello".to_vec()), S::NotAnImage, "found a web page"),
        ("long-html-as-jpeg", jpeg(format!("<html>{}", "x".repeat(1 << 20)).into_bytes()), S::NotAnImage, "found a web page"),
        ("svg", Answer::file("image/svg+xml", "<svg xmlns=\"http://www.w3.org/2000/svg\"/>"), S::NotAnImage, "found an SVG"),
        ("gzip", jpeg(b"\x1f\x8b\x08\0\0\0\0\0".to_vec()).with("Content-Encoding", "gzip"), S::NotAnImage, "found a gzip archive"),
        ("avif", jpeg(b"\0\0\0\x1cftypavif".to_vec()), S::NotAnImage, "found an AVIF"),
        ("noise", jpeg((0..999_u32).map(|place| (place * place % 251) as u8).collect()), S::NotAnImage, "no known format"),
        ("empty", jpeg(Vec::new()), S::NotAnImage, "found an empty file"),
        ("30-mb", jpeg([whole.clone(), vec![0; 30_000_000]].concat()), S::TooLarge, "more than 20000000"),
        (
            "30-mb-unannounced",
            Answer::Raw([b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), whole.clone(), vec![0; 30_000_000]].concat()),
            S::TooLarge,
            "more than 20000000",
        ),
        ("says-a-terabyte", Answer::Raw([head(1 << 40), b"\xff\xd8\xff".to_vec()].concat()), S::TooLarge, "1099511627776 bytes"),
        ("png-bomb", Answer::file("image/png", bomb(30_000)), S::TooLarge, "30000 x 30000 px"),
        ("png-of-no-pixels", Answer::file("image/png", bomb(0)), S::DamagedImage, ""),
        ("png-that-lies", Answer::file("image/png", bomb(500)), S::DamagedImage, ""),
        ("cut-jpeg", jpeg(whole[..whole.len() / 2].to_vec()), S::DamagedImage, "without its end"),
        ("jpeg-head-alone", jpeg(b"\xff\xd8\xff\xd9".to_vec()), S::DamagedImage, ""),
        ("webp-head-alone", jpeg(b"RIFF\x10\0\0\0WEBPVP8 ".to_vec()), S::DamagedImage, ""),
        ("gif-head-alone", jpeg(b"GIF89a\xff\xff\xff\xff\x80\0\0".to_vec()), S::DamagedImage, ""),
        ("to-nowhere", Answer::Whole(302, Vec::new(), Vec::new()), S::BadRedirect, "without a Location"),
        ("to-itself", Answer::redirect("/to-itself"), S::BadRedirect, "redirects"),
        ("to-binary", Answer::Whole(302, vec![("Location".into(), b"/\xff\xfe".to_vec())], Vec::new()), S::BadRedirect, "no text"),
        ("to-a-file", Answer::redirect("file:///etc/passwd"), S::BadRedirect, "http or https"),
        ("to-a-password", Answer::redirect("http://me:secret@127.0.0.1/"), S::BadRedirect, "password"),
        ("to-metadata", Answer::redirect("http://169.254.169.254/latest/meta-data/"), S::PrivateAddress, "169.254.169.254"),
        ("to-loopback", Answer::redirect("http://127.0.0.2/"), S::PrivateAddress, "127.0.0.2"),
        ("to-localhost", Answer::redirect("http://localhost/"), S::PrivateAddress, "not an address of the public internet"),
        ("to-a-number", Answer::redirect("//2130706434/"), S::PrivateAddress, "127.0.0.2"),
        ("to-ipv6", Answer::redirect("http://[::1]/"), S::PrivateAddress, "::1"),
        ("to-mapped-ipv6", Answer::redirect("http://[::ffff:10.0.0.1]/"), S::PrivateAddress, "not an address of the public internet"),
        ("to-a-broken-url", Answer::redirect("http://[::1/"), S::BadRedirect, "redirected to"),
        ("many-headers", flood(400), S::Unreachable, ""),
        ("endless-headers", flood(20_000), S::Unreachable, ""),
        ("binary-headers", jpeg(picture(2)).with("X-Binary", b"\xff\xfe\x80".to_vec()), S::Downloaded, ""),
        ("broken-header", Answer::Raw(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\nhello".to_vec()), S::Unreachable, ""),
        ("says-text", Answer::file("text/html", picture(3)), S::Downloaded, ""),
        ("noai", jpeg(picture(4)).with("X-Robots-Tag", "noai, noimageai"), S::OptedOut, "noai"),
        ("tdm", jpeg(picture(5)).with("TDM-Reservation", "1"), S::OptedOut, "tdm-reservation"),
        ("for-others", jpeg(picture(6)).with("X-Robots-Tag", "otherbot: noai"), S::Downloaded, ""),
    ]
}

#[test]
fn no_answer_of_the_web_is_fatal_and_each_is_recorded_with_its_reason() {
    let answers: BTreeMap<String, Answer> = hostile().into_iter().map(|(name, answer, ..)| (format!("/{name}"), answer)).collect();
    let web = web(move |request| answers.get(&request.path).cloned());
    let world = World::new();
    let urls = [
        ("ftp://example.org/a.jpg", DownloadState::BadUrl, "http or https"),
        ("file:///etc/passwd", DownloadState::BadUrl, "http or https"),
        ("a.jpg", DownloadState::BadUrl, "relative URL"),
        ("", DownloadState::BadUrl, "relative URL"),
        ("http://me:secret@127.0.0.1/a.jpg", DownloadState::BadUrl, "password"),
        ("http://0x7f.2/a.jpg", DownloadState::PrivateAddress, "127.0.0.2"),
        ("http://[fd00::1]/a.jpg", DownloadState::PrivateAddress, "fd00::1"),
        ("http://127.0.0.1:1/a.jpg", DownloadState::RobotsUnreachable, "robots.txt"),
        ("http://name.invalid/a.jpg", DownloadState::Unreachable, "has no address"),
    ];
    let links = hostile().iter().map(|(name, ..)| link(web.url(&format!("/{name}")))).chain(urls.map(|(url, ..)| link(url))).collect();
    write_links(&world, vec![("owl", links)]);
    world.write("web.yaml", pipeline("per_class: 200, per_host: 64, timeout_s: 3, deadline_s: 6, attempts: 2"));
    let output = world.run(["run", "./web.yaml"]).success();
    let rows = rows(&world);
    let expected = hostile().into_iter().map(|(name, _, state, reason)| (web.url(&format!("/{name}")), state, reason));
    let expected: Vec<_> = expected.chain(urls.map(|(url, state, reason)| (url.to_owned(), state, reason))).collect();
    assert!(expected.len() > 40 && rows.len() == expected.len(), "{}", rows.len());
    let mut wrong = Vec::new();
    for (row, (url, state, reason)) in rows.iter().zip(expected) {
        let is_told = row.reason.as_deref().unwrap_or_default().contains(reason) && row.reason.is_some() != row.state.has_image();
        if row.url != url || row.state != state || !is_told || row.file.is_some() != row.state.has_image() {
            wrong.push(format!("{url}: expected {state:?} ({reason}), found {:?}: {:?}", row.state, row.reason));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Only what may pass is tried again, and nothing of another host was asked.
    let counts = web.counts();
    assert_eq!([counts["/404"], counts["/500"], counts["/html-as-jpeg"], counts["/cut-jpeg"], counts["/429"]], [1, 2, 1, 1, 2]);
    assert_eq!(counts["/429-for-an-hour"], 1);
    assert!(output.stderr.contains("owl: 4 of 200 images; 73 of 73 links tried: 4 downloaded"), "{}", output.stderr);
}

#[test]
fn a_contact_is_asked_for_before_anything_runs() {
    let world = World::new();
    write_links(&world, vec![("owl", vec![link("http://127.0.0.1:1/a.jpg")])]);
    let text = pipeline("per_class: 1");
    world.refuses(&text, "contact: me@example.org, ", "", "contact");
    world.refuses(&text, "me@example.org", "me", "by which operators of sites reach you");
}

#[test]
fn nothing_is_asked_at_addresses_that_are_not_public() {
    let web = web(|_| None);
    let world = World::new();
    let port = web.address.port();
    let urls = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"]
        .map(|host| link(format!("http://{host}:{port}/a.jpg")));
    write_links(&world, vec![("owl", urls.to_vec())]);
    world.write("web.yaml", pipeline("per_class: 9").replace("allow_private: [127.0.0.1], ", ""));
    let output = world.run(["run", "./web.yaml"]).success();
    assert!(rows(&world).iter().all(|row| row.state == DownloadState::PrivateAddress), "{:?}", rows(&world));
    assert_eq!(web.counts(), BTreeMap::new());
    assert!(output.stderr.contains("no image of 1 of 1 classes: owl"), "{}", output.stderr);
    // Allowed later, they are asked: the records of the refusals do not hold.
    world.write("web.yaml", pipeline("per_class: 9"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(rows(&world)[0].state, DownloadState::Downloaded);
}

#[test]
fn failures_are_made_up_for_by_further_links_and_leave_gaps_in_the_ranks() {
    let web = web(|request| match request.path.as_str() {
        "/1" | "/3" => Some(Answer::status(404)),
        "/4" => Some(Answer::file("image/jpeg", sized(4, 9, 40))),
        // The same content as /0.
        "/5" | "/0" => Some(Answer::file("image/jpeg", picture(77))),
        _ => None,
    });
    let world = World::new();
    let mut links: Vec<Link> = (0..12).map(|number| link(web.url(&format!("/{number}")))).collect();
    links[2].dropped = Some(Dropped::DuplicateUrl);
    links[6].md5 = Some("0123456789abcdef0123456789abcdef".into());
    let other = vec![link(web.url("/gone")), link(web.url("/7"))];
    write_links(&world, vec![("owl", links), ("wren", other), ("finch", Vec::new())]);
    let with = |n: usize, more: &str| pipeline(&format!("per_class: {n}, {more}")).replace("min_side: 1", "min_side: 10");
    world.write("web.yaml", with(3, ""));
    let output = world.run(["run", "./web.yaml"]).success();
    let expected = [(0, "downloaded"), (1, "gone"), (3, "gone"), (4, "too-small"), (5, "duplicate"), (6, "changed"), (7, "downloaded")];
    let found = downloads(&world);
    assert_eq!(states(&found.by_class[0].rows), expected);
    assert_eq!(found.by_class[0].rows[5].md5_matches, Some(false));
    assert!(output.stderr.contains("no image of 1 of 3 classes: finch"), "{}", output.stderr);
    assert!(output.stderr.contains("wren: 2 of 3 images; 2 of 2 links tried: 2 downloaded"), "{}", output.stderr);
    let counts = web.counts();
    assert!(!counts.contains_key("/2") && !counts.contains_key("/8") && counts.values().all(|count| *count == 1), "{counts:?}");
    // The bytes are those of the web, named by their content.
    let file = found.by_class[0].rows[0].file.clone().unwrap();
    assert_eq!(fs::read(world.find(&["web-download", &file])).unwrap(), picture(77));
    assert!(file.ends_with(&format!("{}.jpg", found.by_class[0].rows[0].sha256.as_ref().unwrap())));
    // More images ask for the further links alone.
    world.write("web.yaml", with(4, ""));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(states(&downloads(&world).by_class[0].rows), [&expected[..], &[(8, "downloaded")]].concat());
    // The rules of a host are asked for once a run.
    assert!(web.counts().iter().all(|(path, count)| *count == 1 || path == "/robots.txt"), "{:?}", web.counts());
    // Without the web, the home replays what it has, under other parameters as well.
    drop(web);
    world.write("web.yaml", with(2, "max_bytes: 1000000, per_host: 2"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(states(&downloads(&world).by_class[0].rows), expected[..6]);
    // A class with too few may stop the run.
    world.write("web.yaml", with(4, "min_per_class: 1, below_min: stop"));
    let stopped = world.run(["run", "./web.yaml"]);
    assert!(stopped.code == 4 && stopped.stderr.contains("fewer than 1 images of 1 of 3 classes: finch (0)"), "{}", stopped.stderr);
}

#[test]
fn one_changed_class_asks_for_its_own_links_alone_and_classes_share_what_they_share() {
    let web = web(|_| None);
    let world = World::new();
    let url = |path: &str| link(web.url(path));
    write_links(&world, vec![("owl", vec![url("/a"), url("/b")]), ("wren", vec![url("/b"), url("/c")])]);
    world.write("web.yaml", pipeline("per_class: 5"));
    world.run(["run", "./web.yaml"]).success();
    write_links(&world, vec![("owl", vec![url("/a"), url("/b")]), ("wren", vec![url("/b"), url("/d")])]);
    world.run(["run", "./web.yaml"]).success();
    let counts = web.counts();
    assert_eq!(counts.keys().map(String::as_str).collect::<Vec<_>>(), ["/a", "/b", "/c", "/d", "/robots.txt"]);
    assert!(counts.iter().all(|(path, count)| *count == 1 || path == "/robots.txt"), "{counts:?}");
}

#[test]
fn robots_txt_is_obeyed_fetched_once_and_may_be_ignored() {
    let web = web(|request| match request.path.as_str() {
        "/robots.txt" => {
            Some(Answer::file("text/plain", "User-agent: *\nDisallow: /private/\n\nUser-agent: ovenbird\nDisallow: /closed/\n"))
        }
        "/noai.jpg" => Some(Answer::file("image/jpeg", picture(9)).with("X-Robots-Tag", "noai")),
        _ => None,
    });
    let busy = self::web(|request| (request.path == "/robots.txt").then(|| Answer::status(503)));
    let agents = self::web(|request| (!request.head.contains("user-agent: ovenbird/0.1.0 (+me@example.org)")).then(|| Answer::status(400)));
    let world = World::new();
    let links = ["/private/a.jpg", "/closed/a.jpg", "/a.jpg", "/noai.jpg"].map(|path| link(web.url(path)));
    let links = links.into_iter().chain([link(busy.url("/b.jpg")), link(agents.url("/c.jpg"))]).collect();
    write_links(&world, vec![("owl", links)]);
    world.write("web.yaml", pipeline("per_class: 9, attempts: 2"));
    world.run(["run", "./web.yaml"]).success();
    // The group for this program counts, and then the one for all does not.
    let expected = [(0, "downloaded"), (1, "robots"), (2, "downloaded"), (3, "opted-out"), (4, "robots-unreachable"), (5, "downloaded")];
    assert_eq!(states(&rows(&world)), expected);
    assert_eq!((web.counts()["/robots.txt"], busy.counts()["/robots.txt"]), (1, 2));
    assert!(!busy.counts().contains_key("/b.jpg") && !web.counts().contains_key("/closed/a.jpg"));
    world.write("web.yaml", pipeline("per_class: 9, opt_outs: ignore"));
    world.run(["run", "./web.yaml"]).success();
    assert!(rows(&world).iter().all(|row| row.state == DownloadState::Downloaded), "{:?}", states(&rows(&world)));
    assert_eq!((web.counts()["/robots.txt"], web.counts()["/a.jpg"], web.counts()["/closed/a.jpg"]), (1, 1, 1));
    // What was fetched while they were ignored does not count while they are heeded.
    world.write("web.yaml", pipeline("per_class: 8"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(rows(&world)[1].state, DownloadState::Robots);
}

#[test]
fn what_may_pass_is_asked_for_again_by_retry_alone() {
    let web = web(|request| match request.path.as_str() {
        "/busy" if request.n_before < 2 => Some(Answer::status(503)),
        "/gone" => Some(Answer::status(404)),
        _ => None,
    });
    let world = World::new();
    write_links(&world, vec![("owl", ["/busy", "/gone", "/a"].map(|path| link(web.url(path))).to_vec())]);
    world.write("web.yaml", pipeline("per_class: 2, attempts: 2"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(states(&rows(&world)), [(0, "server-error"), (1, "gone"), (2, "downloaded")]);
    assert!(world.run(["run", "./web.yaml"]).success().stdout.contains("nothing to do"));
    world.write("web.yaml", pipeline("per_class: 3, attempts: 2"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(web.counts()["/busy"], 2);
    world.run(["retry", "./web.yaml", "--failed"]).success();
    assert_eq!(states(&rows(&world)), [(0, "downloaded"), (1, "gone"), (2, "downloaded")]);
    let counts = web.counts();
    assert_eq!([counts["/busy"], counts["/gone"], counts["/a"]], [3, 1, 1]);
    assert!(world.run(["retry", "./web.yaml", "--failed"]).success().stdout.contains("no item of this pipeline failed"));
}

#[test]
fn a_machine_without_a_network_fails_and_records_nothing() {
    let world = World::new();
    // Nobody listens at these.
    let hosts: Vec<String> = (2..8).map(|last| format!("127.0.0.{last}")).collect();
    let links = (0..60).map(|number| link(format!("http://{}:1/{number}.jpg", hosts[number % hosts.len()]))).collect();
    write_links(&world, vec![("owl", links)]);
    world.write("web.yaml", pipeline("per_class: 60, attempts: 1").replace("[127.0.0.1]", &format!("[{}]", hosts.join(", "))));
    let failed = world.run(["run", "./web.yaml"]);
    assert!(failed.code == 4 && failed.stderr.contains("none of 40 URLs of 6 hosts was reached"), "{}", failed.stderr);
    assert!(failed.stderr.contains("compute nodes often have none"), "{}", failed.stderr);
    assert!(recorded(&world).is_empty(), "{:?}", recorded(&world));

    // A single host, and fewer links.
    let dead = || (0..12).map(|number| link(format!("http://127.0.0.2:1/{number}.jpg")));
    write_links(&world, vec![("owl", dead().collect())]);
    let failed = world.run(["run", "./web.yaml"]);
    assert!(failed.code == 4 && failed.stderr.contains("none of 12 URLs of 1 hosts was reached"), "{}", failed.stderr);
    assert!(recorded(&world).is_empty(), "{:?}", recorded(&world));

    // Where others have answered, now or before, links are dead: they are told, and asked for again by `retry`, which finds them dead again.
    let web = web(|_| None);
    let known: Vec<Link> = (0..5).map(|number| link(web.url(&format!("/{number}.jpg")))).collect();
    let allowed = format!("[127.0.0.1, {}]", hosts.join(", "));
    world.write("web.yaml", pipeline("per_class: 60, attempts: 1").replace("[127.0.0.1]", &allowed));
    write_links(&world, vec![("owl", known.clone())]);
    world.run(["run", "./web.yaml"]).success();
    let asked = web.counts();
    write_links(&world, vec![("owl", known.into_iter().chain(dead()).collect())]);
    let run = world.run(["run", "./web.yaml"]).success();
    assert!(run.stderr.contains("12 failures may pass: `ovenbird retry PIPELINE --failed` asks again"), "{}", run.stderr);
    let again = world.run(["retry", "./web.yaml", "--failed"]).success();
    assert!(again.stderr.contains("5 downloaded, 12 robots-unreachable"), "{}", again.stderr);
    assert_eq!(web.counts(), asked);
}

/// A host that asks for a pause gets one, from all its URLs.
#[test]
fn a_pause_that_a_host_asks_for_holds_for_all_its_urls() {
    let answered: Arc<Mutex<Vec<(Instant, bool)>>> = Arc::default();
    let noted = Arc::clone(&answered);
    let web = web(move |request| {
        let is_picture = request.path.ends_with(".jpg");
        let is_busy = is_picture && request.n_before == 0;
        if is_picture {
            noted.lock().unwrap().push((Instant::now(), is_busy));
        }
        is_busy.then(|| Answer::status(429).with("Retry-After", "1"))
    });
    let world = World::new();
    write_links(&world, vec![("owl", (0..3).map(|number| link(web.url(&format!("/{number}.jpg")))).collect())]);
    world.write("web.yaml", pipeline("per_class: 3, attempts: 2, per_host: 1"));
    world.run(["run", "./web.yaml"]).success();
    assert_eq!(states(&rows(&world)), [(0, "downloaded"), (1, "downloaded"), (2, "downloaded")]);
    let answered = answered.lock().unwrap();
    assert_eq!(answered.len(), 6);
    for pair in answered.windows(2).filter(|pair| pair[0].1) {
        let waited = pair[1].0 - pair[0].0;
        assert!(waited >= Duration::from_millis(950), "{waited:?} after a request to wait for a second");
    }
}

/// The URLs of which the home has a record.
fn recorded(world: &World) -> BTreeSet<String> {
    let folders = fs::read_dir(world.path(".ovenbird/web/records")).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten()).map(|file| file.path());
    let whole = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let url = |path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap()["content"]["url"].as_str().unwrap().to_owned();
    whole.map(url).collect()
}

#[test]
fn a_run_that_was_killed_goes_on_and_asks_for_nothing_twice_that_had_arrived() {
    let web = web(|_| None);
    let world = World::new();
    let links = |from: u32| (from..from + 60).map(|number| link(web.url(&format!("/{number}")))).collect();
    write_links(&world, vec![("owl", links(0)), ("wren", links(50))]);
    world.write("web.yaml", pipeline("per_class: 60, concurrency: 2, per_host: 2"));
    let mut settled = BTreeMap::new();
    for at_least in [5, 25, 60] {
        let mut running = world.command(["run", "./web.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until(|| recorded(&world).len() >= at_least || !world.units_of("web/download").is_empty());
        drop(running.kill());
        running.wait().unwrap();
        let counts = web.counts();
        for url in recorded(&world) {
            let path = url.trim_start_matches(&web.url("")).to_owned();
            settled.entry(path.clone()).or_insert(counts[&path]);
        }
    }
    world.run(["run", "./web.yaml"]).success();
    let counts = web.counts();
    for (path, count) in settled {
        assert_eq!(counts[&path], count, "{path}");
    }
    let found = downloads(&world);
    assert!(found.by_class.iter().all(|of_class| of_class.n_images() == 60));
    assert_eq!(world.units().into_keys().filter(|name| name.ends_with(".jpg") && name.contains("web-download")).count(), 110);
    assert!(world.run(["verify", "--full"]).success().code == 0);
}

#[test]
fn a_damaged_download_counts_as_not_there() {
    let web = web(|_| None);
    let world = World::new();
    write_links(&world, vec![("owl", ["/a", "/b"].map(|path| link(web.url(path))).to_vec())]);
    world.write("web.yaml", pipeline("per_class: 2"));
    world.run(["run", "./web.yaml"]).success();
    let sha256 = rows(&world)[0].sha256.clone().unwrap();
    let spooled = world.path(".ovenbird/web/files").join(&sha256[..2]).join(&sha256);
    let mut bytes = fs::read(&spooled).unwrap();
    bytes[100] ^= 1;
    fs::write(&spooled, bytes).unwrap();
    world.write("web.yaml", pipeline("per_class: 3"));
    let output = world.run(["run", "./web.yaml"]).success();
    assert!(output.stderr.contains("1 downloads in the home were damaged"), "{}", output.stderr);
    assert_eq!([web.counts()["/a"], web.counts()["/b"]], [2, 1]);
    // `cache du` knows the folder, and `cache gc` deletes it when it is told to; units keep their files.
    assert!(world.run(["cache", "du"]).success().stdout.contains("downloads (web)"));
    world.run(["cache", "gc", "--downloads", "--delete"]).success();
    assert!(!world.path(".ovenbird/web").exists());
    assert!(world.run(["run", "./web.yaml"]).success().stdout.contains("nothing to do"));
}

#[test]
fn downloads_go_out_and_come_in_as_img2dataset_and_become_labels() {
    let web = web(|request| match request.path.as_str() {
        "/1" => Some(Answer::status(404)),
        "/both" => Some(Answer::file("image/jpeg", picture(5))),
        _ => None,
    });
    let world = World::new();
    let links = |paths: &[&str]| paths.iter().map(|path| link(web.url(path))).collect();
    write_links(&world, vec![("cup/mug", links(&["/0", "/1", "/both", "/3"])), ("owl", links(&["/both"])), ("wren", links(&["/1"]))]);
    let categories = json!({
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "owl"}, {"id": 3, "name": "cup/mug"}, {"id": 9, "name": "wren"}, {"id": 11, "name": "crow"}],
    });
    world.write("categories.json", categories.to_string());
    world.write("classes.json", r#"{"base": ["owl"], "novel": ["cup/mug"]}"#);
    let text = pipeline("per_class: 9")
        + "  - {id: out, use: web/export, in: {images: images.images, downloads: images.downloads}}
  - {id: in, use: web/import, in: {folder: out.folder, links: ./links.parquet}}
  - {id: alone, use: web/import, in: {folder: out.folder}}
  - id: labels
    use: annotations/web
    in: {images: images.images, links: ./links.parquet, downloads: images.downloads, categories: ./categories.json}
    with: {per_class: 2}
  - id: again
    use: annotations/web
    in: {images: in.images, links: ./links.parquet, downloads: in.downloads, classes: ./classes.json, categories: ./categories.json}
";
    world.write("web.yaml", &text);
    let output = world.run(["run", "./web.yaml"]).success();
    assert!(output.stderr.contains("no image of 1 of 3 classes: wren"), "{}", output.stderr);
    let exported: Vec<String> = world.units().into_keys().filter_map(|name| Some(name.split_once("/folder/")?.1.to_owned())).collect();
    let expected = ["cup%2Fmug/00000/000000000", "cup%2Fmug/00000/000000002", "cup%2Fmug/00000/000000003", "owl/00000/000000000"];
    assert_eq!(exported, expected.iter().flat_map(|stem| [format!("{stem}.jpg"), format!("{stem}.json")]).collect::<Vec<_>>());
    let jsons = |name: &str| -> Vec<Value> {
        let found = world.units().into_iter().filter(|(path, _)| path.contains("annotations-web") && path.ends_with(name));
        found.map(|(_, bytes)| serde_json::from_slice(&bytes).unwrap()).collect()
    };
    let labels = jsons("annotations.json").into_iter().find(|labels| labels["annotations"].as_array().unwrap().len() == 3).unwrap();
    assert_eq!(labels["images"].as_array().unwrap().len(), 2);
    let box_of = |id: u64, image: u64, category: u64| json!({"id": id, "image_id": image, "category_id": category, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0});
    assert_eq!(labels["annotations"], json!([box_of(1, 1, 3), box_of(2, 2, 3), box_of(3, 2, 7)]));
    assert_eq!(labels["categories"].as_array().unwrap().len(), 4);
    assert_eq!((&labels["images"][0]["width"], &labels["images"][0]["height"]), (&json!(48), &json!(40)));
    let table = jsons("table.json").into_iter().find(|table| table["classes"].as_array().unwrap().len() == 3).unwrap();
    let expected = json!({"class": "cup/mug", "wanted": 2, "retrieved": 4, "downloaded": 3, "used": 2, "reasons": {"gone": 1}});
    assert_eq!(table["classes"][0], expected);
    // Imported, the same images have the same names and ranks, and classes limit the labels.
    let imported = newest(&world, "web-import/");
    assert_eq!(imported.by_class.iter().map(|of_class| of_class.class.as_str()).filter(|class| *class == "cup/mug").count(), 1);
    let again = jsons("annotations.json").into_iter().find(|labels| labels["annotations"].as_array().unwrap().len() == 4).unwrap();
    assert_eq!(again["images"].as_array().unwrap().len(), 3);
}

#[test]
fn a_pool_of_ones_own_images_is_labelled_by_their_names() {
    let world = World::new();
    world.write("pool/a.jpg", picture(1));
    world.write("pool/b.jpg", "no image");
    world.write("pool/c.jpg", sized(2, 30, 20));
    let links = ["a.jpg", "b.jpg", "gone.jpg", "c.jpg"].map(link).to_vec();
    write_links(&world, vec![("owl", links)]);
    world.write("categories.json", json!({"images": [], "annotations": [], "categories": [{"id": 7, "name": "owl"}]}).to_string());
    let text = "version: 1
name: web
stages:
  - id: labels
    use: annotations/web
    in: {images: ./pool, links: ./links.parquet, categories: ./categories.json}
";
    world.write("web.yaml", text);
    world.run(["run", "./web.yaml"]).success();
    let labels: Value = serde_json::from_slice(&fs::read(world.find(&["annotations-web", "annotations.json"])).unwrap()).unwrap();
    let expected = json!([
        {"id": 1, "file_name": "a.jpg", "width": 48, "height": 40},
        {"id": 2, "file_name": "c.jpg", "width": 30, "height": 20},
    ]);
    assert_eq!(labels["images"], expected);
    let table: Value = serde_json::from_slice(&fs::read(world.find(&["annotations-web", "table.json"])).unwrap()).unwrap();
    assert_eq!(table["classes"][0]["reasons"], json!({"damaged-image": 1, "gone": 1}));
    world.write("other.parquet", "no table");
    world.refuses(text, "links: ./links.parquet", "links: ./other.parquet", "give `links` a table of links");
}
