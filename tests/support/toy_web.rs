//! A small web on a port of this machine: pictures, and everything that goes wrong with pictures in the wild. It counts who asked for what.
//!
//! One thread per connection, one request per connection. It never waits for a clock but where an answer is meant to be slow.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use ovenbird_data::toy::{Trouble, World, trouble};

/// What is sent.
#[derive(Clone)]
pub(crate) enum Answer {
    /// A status with headers and a body; the length is added.
    Whole(u16, Vec<(String, Vec<u8>)>, Vec<u8>),
    /// These bytes, and the end of the connection.
    Raw(Vec<u8>),
    /// A head and then one byte now and then, without end.
    Drip(Vec<u8>),
    /// Nothing, until the client gives up.
    Silence,
}

impl Answer {
    /// A status without more.
    pub(crate) fn status(code: u16) -> Self {
        Self::Whole(code, Vec::new(), b"sorry".to_vec())
    }

    /// A file of some type.
    pub(crate) fn file(kind: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::Whole(200, vec![("Content-Type".into(), kind.into())], body.into())
    }

    /// The way to another place.
    pub(crate) fn redirect(to: &str) -> Self {
        Self::Whole(302, vec![("Location".into(), to.into())], Vec::new())
    }

    /// The same with another header.
    pub(crate) fn with(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        if let Self::Whole(_, headers, _) = &mut self {
            headers.push((name.into(), value.into()));
        }
        self
    }

    fn send(&self, stream: &mut TcpStream, is_over: &AtomicBool) -> std::io::Result<()> {
        match self {
            Self::Whole(code, headers, body) => {
                let mut head = format!("HTTP/1.1 {code} toy\r\nConnection: close\r\nContent-Length: {}\r\n", body.len()).into_bytes();
                for (name, value) in headers {
                    head.extend_from_slice(format!("{name}: ").as_bytes());
                    head.extend_from_slice(value);
                    head.extend_from_slice(b"\r\n");
                }
                head.extend_from_slice(b"\r\n");
                stream.write_all(&head)?;
                stream.write_all(body)
            }
            Self::Raw(bytes) => stream.write_all(bytes),
            Self::Drip(head) => {
                stream.write_all(head)?;
                while !is_over.load(Ordering::Relaxed) {
                    stream.write_all(b"x")?;
                    thread::sleep(Duration::from_millis(50));
                }
                Ok(())
            }
            // Ends when the client hangs up.
            Self::Silence => stream.read(&mut [0; 64]).map(drop),
        }
    }
}

/// A request: its path, and its headers in lower case.
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) head: String,
    /// How often the path was asked for before.
    pub(crate) n_before: usize,
}

/// A web that is up until it is dropped.
pub(crate) struct ToyWeb {
    pub(crate) address: SocketAddr,
    counts: Arc<Mutex<BTreeMap<String, usize>>>,
    is_over: Arc<AtomicBool>,
}

impl ToyWeb {
    /// Serves on a free port, or on a given one.
    pub(crate) fn start(port: u16, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let address = listener.local_addr().unwrap();
        let counts: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
        let is_over = Arc::new(AtomicBool::new(false));
        let (shared, ending, answer) = (Arc::clone(&counts), Arc::clone(&is_over), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if ending.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let (counts, ending, answer) = (Arc::clone(&shared), Arc::clone(&ending), Arc::clone(&answer));
                thread::spawn(move || {
                    if let Some(request) = read_request(&mut stream, &counts) {
                        let _hung_up = answer(&request).send(&mut stream, &ending);
                        let _hung_up = stream.shutdown(std::net::Shutdown::Write);
                        // Until the client has read it all: closing with unread bytes would reset the connection.
                        let _hung_up = stream.read(&mut [0; 64]);
                    }
                });
            }
        });
        Self { address, counts, is_over }
    }

    /// The URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// How often each path was asked for.
    pub(crate) fn counts(&self) -> BTreeMap<String, usize> {
        self.counts.lock().unwrap().clone()
    }
}

impl Drop for ToyWeb {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Wakes the listener.
        drop(TcpStream::connect(self.address));
    }
}

/// The web set of the toy world with its troubles, of whatever seed a path names.
pub(crate) fn of_world(request: &Request) -> Answer {
    if request.path == "/robots.txt" {
        return Answer::file("text/plain", "User-agent: *\nDisallow: /private/\n");
    }
    let mut parts = request.path.trim_start_matches('/').split('/');
    let place = (|| {
        let (folder, seed, name) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
        let index: usize = name.strip_suffix(".jpg")?.parse().ok()?;
        parts.next().is_none().then_some((folder, seed, index))
    })();
    let Some((folder @ ("pictures" | "private" | "moved"), seed, index)) = place else { return Answer::status(404) };
    let picture = |index: usize| World { seed, side_px: 320 }.web(index).jpeg;
    match trouble(seed, index) {
        Trouble::Gone => Answer::status(404),
        Trouble::Moved if folder != "moved" => Answer::redirect(&format!("/moved/{seed}/{index:08}.jpg")),
        Trouble::Page => Answer::file("image/jpeg", "<!doctype html><p>no picture"),
        Trouble::Failing => Answer::status(503),
        Trouble::Changed => Answer::file("image/jpeg", picture(index + 1)),
        Trouble::Cut => {
            let bytes = picture(index);
            Answer::Raw(
                [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes(), &bytes[..bytes.len() / 2]].concat(),
            )
        }
        Trouble::Forbidden | Trouble::Moved | Trouble::Duplicate(_) | Trouble::Unsafe | Trouble::None => {
            Answer::file("image/jpeg", picture(index))
        }
    }
}

fn read_request(stream: &mut TcpStream, counts: &Mutex<BTreeMap<String, usize>>) -> Option<Request> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 1 << 16 || stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1)?.to_owned();
    let mut counts = counts.lock().unwrap();
    let count = counts.entry(path.clone()).or_default();
    *count += 1;
    Some(Request { n_before: *count - 1, path, head: head.to_lowercase() })
}
