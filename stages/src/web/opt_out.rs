//! What sites say against machines: robots.txt, and headers of an answer.
//!
//! The rules of a host are fetched once. A robots.txt that is missing (4xx) allows everything; one that cannot be had (5xx, no answer, one that
//! cannot be read) allows nothing. (RFC 9309.) Of headers count `X-Robots-Tag` with `noai`, `noimageai`, `noindex`, `noimageindex` or `none`, for all agents or
//! this one, and `tdm-reservation: 1` (W3C's TDMRep).

use reqwest::header::HeaderMap;
use texting_robots::Robot;

/// The name by which rules address this program.
pub(super) const AGENT: &str = "ovenbird";
/// The most bytes of a robots.txt that are read; RFC 9309 asks for 500 KiB.
pub(super) const MAX_ROBOTS_BYTES: usize = 512 << 10;

/// The rules of a host.
pub(super) enum Rules {
    /// There are none.
    None,
    /// Those of its robots.txt.
    Robot(Robot),
    /// They cannot be had, for this reason.
    Unreachable(String),
}

impl Rules {
    /// Parses a robots.txt.
    pub(super) fn parse(text: &[u8]) -> Self {
        // The parser is not ours: whatever it does with a stranger's text, the others go on.
        match std::panic::catch_unwind(|| Robot::new(AGENT, text)) {
            Ok(Ok(robot)) => Self::Robot(robot),
            Ok(Err(_)) | Err(_) => Self::Unreachable("robots.txt cannot be read".into()),
        }
    }
}

/// Directives of `X-Robots-Tag` that forbid use of an image for machine learning, or its listing.
const FORBIDDING: [&str; 5] = ["noai", "noimageai", "noindex", "noimageindex", "none"];
/// Directives with a value, which are no agents.
const WITH_VALUE: [&str; 4] = ["max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"];

/// Why the headers of an answer forbid its use, if they do.
pub(super) fn forbidden_by(headers: &HeaderMap) -> Option<String> {
    for value in headers.get_all("x-robots-tag") {
        let text = String::from_utf8_lossy(value.as_bytes()).to_lowercase();
        let mut is_ours = true;
        for part in text.split(',') {
            let mut directive = part.trim();
            if let Some((name, rest)) = directive.split_once(':') {
                if WITH_VALUE.contains(&name.trim()) {
                    continue;
                }
                is_ours = [AGENT, "*"].contains(&name.trim());
                directive = rest.trim();
            }
            if is_ours && FORBIDDING.contains(&directive) {
                return Some(format!("X-Robots-Tag: {directive}"));
            }
        }
    }
    let is_reserved = |value: &reqwest::header::HeaderValue| value.as_bytes().trim_ascii() == b"1";
    headers.get_all("tdm-reservation").iter().any(is_reserved).then(|| "tdm-reservation: 1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_forbid_for_all_or_for_us() {
        for (name, value, expected) in [
            ("x-robots-tag", "noai", Some("X-Robots-Tag: noai")),
            ("x-robots-tag", "nofollow, NoImageAI", Some("X-Robots-Tag: noimageai")),
            ("x-robots-tag", "noindex", Some("X-Robots-Tag: noindex")),
            ("x-robots-tag", "ovenbird: noindex, nofollow", Some("X-Robots-Tag: noindex")),
            ("x-robots-tag", "googlebot: noindex, noai", None),
            ("x-robots-tag", "googlebot: noindex, ovenbird: noai", Some("X-Robots-Tag: noai")),
            ("x-robots-tag", "max-snippet: 20, noai", Some("X-Robots-Tag: noai")),
            ("x-robots-tag", "unavailable_after: 25 Jun 2030 15:00:00 PST", None),
            ("x-robots-tag", "all", None),
            ("tdm-reservation", "1", Some("tdm-reservation: 1")),
            ("tdm-reservation", "0", None),
            ("content-type", "noai", None),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(forbidden_by(&headers).as_deref(), expected, "{name}: {value}");
        }
    }

    #[test]
    fn rules_are_those_for_us_or_for_all() {
        let allows = |text: &str, url: &str| match Rules::parse(text.as_bytes()) {
            Rules::Robot(robot) => robot.allowed(url),
            Rules::None | Rules::Unreachable(_) => panic!("no rules"),
        };
        let text = "User-agent: *\nDisallow: /private/\n\nUser-agent: ovenbird\nDisallow: /\nAllow: /open/";
        assert!(!allows(text, "http://a/x.jpg") && allows(text, "http://a/open/x.jpg"));
        assert!(allows("User-agent: *\nDisallow: /private/", "http://a/x.jpg"));
        assert!(!allows("User-agent: *\nDisallow: /private/", "http://a/private/x.jpg"));
        assert!(allows("", "http://a/x.jpg"));
    }
}
