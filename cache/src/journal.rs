//! Append-only files of sealed lines: the journal of commits, and the logs of runs.
//!
//! Each line is a JSON object whose last field is `"seal"`: 32 hexadecimal digits of the BLAKE3 of the text before it, keyed by the file's
//! path in the home. A line is written in one call, so that a crash can tear only the last line and several processes may append at once.
//! A process that opens a journal with a torn last line appends `{"torn":true,..}` after it, which tells readers that the line was not damaged.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    disk::{DiskFile, Found},
    publish::{Publisher, parent_and_name},
};

const SEAL: &str = ",\"seal\":\"";
const SEAL_DIGITS: usize = 32;
const TORN: &str = "{\"torn\":true}";

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    key: [u8; 32],
    file: Box<dyn DiskFile>,
    /// Whether the last line was written in part, as on a full disk.
    is_torn: bool,
}

impl Journal {
    /// Opens a journal; creates it if it is missing. `place` is its path in the home.
    pub fn open(publisher: &Publisher, home: &Path, place: &str) -> Result<Self> {
        let path = home.join(place);
        let (parent, _) = parent_and_name(&path);
        publisher.create_dir_all(parent)?;
        let before = publisher.disk().look(&path);
        let file = publisher.disk().append(&path).map_err(|source| Error::write(&path, source))?;
        let mut is_torn = false;
        match before {
            Err(_) => publisher.sync_dir(parent)?,
            Ok(Found::File(0)) => {}
            Ok(_) => is_torn = !publisher.disk().read(&path).map_err(|source| Error::read(&path, source))?.ends_with(b"\n"),
        }
        Ok(Self { path, key: key(place), file, is_torn })
    }

    /// Appends a JSON object as a line.
    pub fn append(&mut self, object: &str) -> Result<()> {
        let end = if self.is_torn { format!("\n{}", sealed(TORN, &self.key)) } else { String::new() };
        let written = self.file.write_all(format!("{end}{}", sealed(object, &self.key)).as_bytes());
        self.is_torn = written.is_err();
        written.map_err(|source| Error::write(&self.path, source))
    }

    /// Fsyncs all lines appended so far.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync().map_err(|source| Error::write(&self.path, source))
    }
}

fn key(place: &str) -> [u8; 32] {
    *blake3::hash(format!("ovenbird journal 1 {place}").as_bytes()).as_bytes()
}

fn seal(text: &str, key: &[u8; 32]) -> String {
    blake3::keyed_hash(key, text.as_bytes()).to_hex()[..SEAL_DIGITS].to_owned()
}

fn sealed(object: &str, key: &[u8; 32]) -> String {
    let open = object.strip_suffix('}').expect("BUG: a line of a journal is a JSON object");
    format!("{open}{SEAL}{}\"}}\n", seal(open, key))
}

/// The lines of a journal, each either sound or damaged.
#[derive(Debug, Default)]
pub struct Lines {
    key: [u8; 32],
    text: String,
    /// Where each sound line lies in `text`, without its seal.
    sound: Vec<Range<usize>>,
    damaged: Vec<DamagedLine>,
    /// Size of the file.
    bytes: u64,
}

/// A line whose seal does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DamagedLine {
    /// Line number, from 1.
    pub number: usize,
    /// Whether it contains zero bytes, as after a power cut.
    pub has_zeros: bool,
}

impl Lines {
    /// Reads a journal; `None` if there is no file.
    pub fn read(publisher: &Publisher, home: &Path, place: &str) -> Result<Option<Self>> {
        let path = home.join(place);
        match publisher.disk().read(&path) {
            Ok(bytes) => Ok(Some(Self::of(&bytes, place))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::read(&path, source)),
        }
    }

    /// The object of the first line if it is sound. Only this line is read.
    pub fn first(home: &Path, place: &str) -> Result<Option<String>> {
        let path = home.join(place);
        let mut line = Vec::new();
        let read = File::open(&path).and_then(|file| BufReader::new(file).read_until(b'\n', &mut line));
        read.map_err(|source| Error::read(&path, source))?;
        Ok(Self::of(&line, place).sound().next())
    }

    fn of(bytes: &[u8], place: &str) -> Self {
        let key = key(place);
        // A replaced byte breaks the seal of its line.
        let text = String::from_utf8_lossy(bytes).into_owned();
        let mut lines = Self { key, bytes: bytes.len() as u64, ..Self::default() };
        let (mut start, mut suspect) = (0, None);
        for (line_idx, line) in text.split_inclusive('\n').enumerate() {
            let (begin, end) = (start, start + line.trim_end_matches('\n').len());
            start += line.len();
            let content = &text[begin..end];
            match open_of(content, &key) {
                Some(TORN_OPEN) => suspect = None,
                Some(open) => {
                    lines.damaged.extend(suspect.take());
                    lines.sound.push(begin..begin + open.len());
                }
                None if content.is_empty() => {}
                None => {
                    lines.damaged.extend(suspect.take());
                    suspect = Some(DamagedLine { number: line_idx + 1, has_zeros: content.contains('\0') });
                }
            }
        }
        // A last line without an end may be torn, or is being written now.
        lines.damaged.extend(suspect.filter(|_| text.ends_with('\n')));
        lines.text = text;
        lines
    }

    /// The objects of the lines whose seal fits, in order.
    pub fn sound(&self) -> impl Iterator<Item = String> {
        self.sound.iter().map(|line| format!("{}}}", &self.text[line.clone()]))
    }

    /// The lines whose seal does not fit.
    pub fn damaged(&self) -> &[DamagedLine] {
        &self.damaged
    }

    /// The size of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes of a journal with only the sound lines.
    pub fn mended(&self) -> Vec<u8> {
        self.sound().map(|line| sealed(&line, &self.key)).collect::<String>().into_bytes()
    }
}

const TORN_OPEN: &str = "{\"torn\":true";

/// A line without its seal; `None` if the seal does not fit.
fn open_of<'a>(line: &'a str, key: &[u8; 32]) -> Option<&'a str> {
    let (open, rest) = line.rsplit_once(SEAL)?;
    (rest.strip_suffix("\"}")? == seal(open, key)).then_some(open)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::publish::replace;

    const PLACE: &str = "runs/1/events.jsonl";

    fn append(home: &Path, lines: &[&str]) {
        let mut journal = Journal::open(&Publisher::default(), home, PLACE).unwrap();
        lines.iter().for_each(|line| journal.append(line).unwrap());
    }

    fn read(home: &Path) -> (Vec<String>, Vec<usize>) {
        let lines = Lines::read(&Publisher::default(), home, PLACE).unwrap().unwrap();
        (lines.sound().collect(), lines.damaged().iter().map(|line| line.number).collect())
    }

    #[test]
    fn any_flipped_bit_of_a_line_is_damage_of_that_line() {
        let home = tempfile::tempdir().unwrap();
        append(home.path(), &["{\"n\":1}", "{\"n\":2}", "{\"n\":3}"]);
        let sound = fs::read(home.path().join(PLACE)).unwrap();
        let length = sound.len() / 3;
        for byte in length..2 * length {
            for bit in 0..8 {
                let mut damaged = sound.clone();
                damaged[byte] ^= 1 << bit;
                let lines = Lines::of(&damaged, PLACE);
                assert!(!lines.damaged().is_empty() && lines.sound().count() < 3, "byte {byte}, bit {bit}");
            }
        }
        assert_eq!(Lines::of(&sound, "runs/2/events.jsonl").damaged().len(), 3, "a journal in another one's place");
        assert!(Lines::of(&Lines::of(&sound, PLACE).mended(), PLACE).damaged().is_empty());
    }

    #[test]
    fn a_torn_last_line_is_no_damage_and_does_not_swallow_the_next() {
        let home = tempfile::tempdir().unwrap();
        append(home.path(), &["{\"n\":1}", "{\"n\":2}"]);
        let sound = fs::read(home.path().join(PLACE)).unwrap();
        for end in sound.len() / 2 + 1..sound.len() {
            replace(&home.path().join(PLACE), &sound[..end]).unwrap();
            let before = read(home.path());
            assert!(before.1.is_empty() && before.0.len() < 3, "{end}");
            append(home.path(), &["{\"n\":3}"]);
            let (lines, damaged) = read(home.path());
            assert!(damaged.is_empty() && lines.last().unwrap() == "{\"n\":3}", "{end}: {lines:?} {damaged:?}");
        }
    }
}
