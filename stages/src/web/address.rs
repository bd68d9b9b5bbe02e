//! Which hosts may be asked.
//!
//! Lists of links come from strangers: a link may lead to a service of the machine's own network. Names are therefore resolved here, every address is
//! checked, and the connection is made to the checked address; an address in a URL is checked too, at each redirect. Another spelling of an
//! address (`http://2130706433/`, `http://0x7f.1/`) is one and the same once the URL is parsed.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// How long an answer of the name service is used.
const KEPT: Duration = Duration::from_mins(10);

/// Why a host is not asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// None of its addresses is public.
    Private(IpAddr),
    /// Its name has no address, or the name service does not answer.
    Unknown(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Private(address) => write!(to, "{address} is not an address of the public internet"),
            Self::Unknown(problem) => write!(to, "the host's name has no address: {problem}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Whether an address belongs to the public internet. (RFC 6890 and the registries that it founded.)
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let is_reserved = match (a, b, c) {
        // This network, private use, loopback, and what is reserved.
        (0 | 10 | 127 | 240..=255, _, _) => true,
        // Carrier-grade NAT, link-local, private use.
        (100, 64..=127, _) | (169, 254, _) | (172, 16..=31, _) | (192, 168, _) => true,
        // Protocol assignments, documentation, 6to4 relays, benchmarks.
        (192, 0, 0 | 2) | (192, 88, 99) | (198, 18..=19, _) | (198, 51, 100) | (203, 0, 113) => true,
        // Multicast.
        (224..=239, _, _) => true,
        _ => false,
    };
    !is_reserved
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let parts = address.segments();
    let v4 = |high: u16, low: u16| {
        let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match parts {
        // Addresses of IPv4 in another dress: mapped, NAT64, 6to4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => v4(high, low),
        // Teredo and other protocol assignments, documentation.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
        // Of all others only 2000::/3 is given out.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Addresses by name, with the time when they were looked up.
type Known = HashMap<String, (Instant, Vec<IpAddr>)>;

/// Resolves names to addresses that may be asked.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    /// Hosts whose addresses may be private.
    private_hosts: Arc<[String]>,
    timeout: Duration,
    /// Locked to look up and to add, never while waiting.
    known: Arc<Mutex<Known>>,
}

impl Resolver {
    pub(super) fn new(private_hosts: &[String], timeout: Duration) -> Self {
        Self { private_hosts: private_hosts.into(), timeout, known: Arc::default() }
    }

    fn allows_private(&self, host: &str) -> bool {
        self.private_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(host))
    }

    /// Fails where the host of a URL may not be asked.
    pub(super) async fn check(&self, url: &Url) -> Result<(), Refusal> {
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(name)) => return self.addresses(name).await.map(drop),
            None => return Err(Refusal::Unknown("the URL names no host".into())),
        };
        if is_public(literal) || self.allows_private(url.host_str().unwrap_or_default()) { Ok(()) } else { Err(Refusal::Private(literal)) }
    }

    /// The addresses of a name that may be asked, at least one.
    async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Refusal> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some((since, addresses)) = known
            && since.elapsed() < KEPT
        {
            return Ok(addresses);
        }
        let found = tokio::time::timeout(self.timeout, tokio::net::lookup_host((name, 0))).await;
        let found: Vec<IpAddr> = match found {
            Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
            Ok(Err(error)) => return Err(Refusal::Unknown(error.to_string())),
            Err(_) => return Err(Refusal::Unknown("the name service does not answer".into())),
        };
        let public: Vec<IpAddr> = found.iter().copied().filter(|address| is_public(*address) || self.allows_private(name)).collect();
        match (public.is_empty(), found.first()) {
            (true, Some(private)) => Err(Refusal::Private(*private)),
            (true, None) => Err(Refusal::Unknown("the name service knows none".into())),
            (false, _) => {
                self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), (Instant::now(), public.clone()));
                Ok(public)
            }
        }
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let addresses = resolver.addresses(name.as_str()).await?;
            let addresses: Addrs = Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_internet_are_asked() {
        for (text, expected) in [
            ("8.8.8.8", true),
            ("0.0.0.0", false),
            ("10.1.2.3", false),
            ("100.64.0.1", false),
            ("100.128.0.1", true),
            ("127.0.0.1", false),
            ("127.255.255.254", false),
            ("169.254.169.254", false),
            ("172.15.0.1", true),
            ("172.16.0.1", false),
            ("172.31.255.255", false),
            ("192.0.0.8", false),
            ("192.168.1.1", false),
            ("198.18.0.1", false),
            ("203.0.113.7", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("2606:4700:4700::1111", true),
            ("::", false),
            ("::1", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:8.8.8.8", true),
            ("::127.0.0.1", false),
            ("64:ff9b::7f00:1", false),
            ("64:ff9b::808:808", true),
            ("64:ff9b:1::1", false),
            ("2002:7f00:1::", false),
            ("2002:a9fe:a9fe::1", false),
            ("2001::1", false),
            ("2001:db8::1", false),
            ("fc00::1", false),
            ("fd12:3456::1", false),
            ("fe80::1", false),
            ("fec0::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_public(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn an_address_is_found_out_in_any_spelling_and_behind_a_name() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let refusing = Resolver::new(&[], Duration::from_mins(1));
        for url in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1:8080/a.jpg",
            "http://127.1/",
            "http://[::1]/",
            "http://[::ffff:7f00:1]/",
            "http://１２７.0.0.1/",
            "http://localhost/",
        ] {
            let found = runtime.block_on(refusing.check(&Url::parse(url).unwrap()));
            assert!(matches!(found, Err(Refusal::Private(_))), "{url}: {found:?}");
        }
        assert_eq!(runtime.block_on(refusing.check(&Url::parse("http://8.8.8.8/").unwrap())), Ok(()));
        // The connection itself resolves through the same check.
        assert!(runtime.block_on(refusing.resolve("localhost".parse().unwrap())).is_err());
        let allowing = Resolver::new(&["127.0.0.1".into()], Duration::from_mins(1));
        assert_eq!(runtime.block_on(allowing.check(&Url::parse("http://127.1:80/").unwrap())), Ok(()));
        assert!(runtime.block_on(allowing.check(&Url::parse("http://127.0.0.2/").unwrap())).is_err());
        assert!(runtime.block_on(allowing.check(&Url::parse("http://localhost/").unwrap())).is_err());
    }
}
