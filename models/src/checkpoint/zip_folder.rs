//! A folder of files in a zip archive that is too large to unpack: read in place, whole or in parts.
//!
//! The central directory is read once; a member is read when it is asked for, by any thread, and checked against its CRC. Archives of more
//! than 65,535 members or 4 GiB (zip64) are read, and members that are stored or deflated.
//!
//! An archive may come in parts. `zip -s` writes `name.z01`, `name.z02`, ..., `name.zip`, and its directory names a member's place by part
//! and offset in that part; programs that cut any file write `name.zip.001`, `name.zip.002`, ..., and the directory knows nothing of parts.
//! Either way the parts one after the other are the archive: no member and no header has to lie in one part alone.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::{AGAIN, ZIP_MARK};
use crate::{Error, Result};

/// The end of the central directory without its comment, and the longest comment.
const END_BYTES: usize = 22;
const MAX_COMMENT: u64 = 65_535;
const LOCATOR_BYTES: u64 = 20;
const END64_BYTES: usize = 56;
const ENTRY_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;
/// The mark of a field whose value is in the zip64 extra field.
const IN_EXTRA: u32 = u32::MAX;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;
/// The flag of encrypted members.
const ENCRYPTED: u16 = 1;
/// The most missing parts that a message names.
const MAX_NAMED: usize = 3;

/// A zip archive whose members are read one by one.
#[derive(Debug)]
pub struct ZipFolder {
    /// The archive, or its last part.
    path: PathBuf,
    parts: Vec<Part>,
    members: BTreeMap<String, Member>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
    /// Where it begins in the archive.
    start: u64,
    n_bytes: u64,
}

/// A file in the archive.
#[derive(Debug, Clone, Copy)]
struct Member {
    /// Where its local header lies in the archive.
    header_at: u64,
    /// As it lies in the archive.
    n_packed: u64,
    n_bytes: u64,
    crc: u32,
    method: u16,
    is_encrypted: bool,
}

/// How the directory of an archive in parts counts offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    /// From the start of the part, `name.z01`.
    ByPart,
    /// From the start of the first part, `name.zip.001`; also the archive that is whole.
    Bytes,
}

impl ZipFolder {
    /// Opens an archive, or the parts of one in any order, and reads its directory.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let (paths, split) = in_order(paths)?;
        let mut parts = Vec::new();
        let mut start = 0;
        for path in paths {
            let read = |source| Error::Read { path: path.clone(), source };
            let file = File::open(&path).map_err(read)?;
            let n_bytes = file.metadata().map_err(read)?.len();
            parts.push(Part { path, file, start, n_bytes });
            start += n_bytes;
        }
        let path = parts.last().map(|part| part.path.clone()).unwrap_or_default();
        let mut folder = Self { path, parts, members: BTreeMap::new() };
        folder.members = folder.directory(split)?;
        Ok(folder)
    }

    /// The archive, or its last part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all members, sorted, with the folders that they are in.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The content of a member, checked against its CRC. Fails, naming the member, where there is none or it is damaged.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let Some(member) = self.members.get(name) else {
            return Err(self.damaged(format!("entry {name}: expected it among {}, found none", self.members.len())));
        };
        let Member { header_at, n_packed, n_bytes, crc, method, is_encrypted } = *member;
        if is_encrypted || !matches!(method, STORED | DEFLATED) {
            let found = if is_encrypted { "an encrypted one".to_owned() } else { format!("compression method {method}") };
            let hint = "make the archive again with `zip -r`, without a password".to_owned();
            let problem = format!("entry {name}: expected a stored or deflated entry, found {found}");
            return Err(Error::Malformed { path: self.path.clone(), problem, hint: Some(hint) });
        }
        let (Ok(packed_length), Ok(length)) = (u32::try_from(n_packed), u32::try_from(n_bytes)) else {
            return Err(self.damaged(format!("entry {name}: expected less than 4 GiB, found {n_bytes} bytes")));
        };
        let header = self.bytes(header_at, LOCAL_BYTES as u64, || format!("entry {name}"))?;
        if !header.starts_with(ZIP_MARK) {
            return Err(self.damaged(format!("entry {name}: expected its header at byte {header_at}, found {:02x?}", &header[..4])));
        }
        let data_at = header_at + LOCAL_BYTES as u64 + u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
        let packed = self.bytes(data_at, n_packed, || format!("entry {name}"))?;
        // The member as a stream: its own header may leave out what the directory says.
        let mut stream = vec![b'P', b'K', 3, 4, 20, 0, 0, 0];
        stream.extend(method.to_le_bytes());
        stream.extend([0; 4]);
        [crc, packed_length, length, 0].into_iter().for_each(|field| stream.extend(field.to_le_bytes()));
        let mut stream = stream.chain(packed.as_slice());
        let mut content = Vec::new();
        let mut unpack = || -> io::Result<()> {
            let file = zip::read::read_zipfile_from_stream(&mut stream)?.ok_or_else(|| io::Error::other("no entry"))?;
            // The length may be a lie: no more is kept ready than deflating can save.
            content.reserve_exact(n_bytes.min(n_packed.saturating_mul(1032)) as usize);
            file.take(n_bytes + 1).read_to_end(&mut content).map(drop)
        };
        unpack().map_err(|error| self.damaged(format!("entry {name}: {error}")))?;
        if content.len() as u64 != n_bytes {
            return Err(self.damaged(format!("entry {name}: expected {n_bytes} bytes, found {}", content.len())));
        }
        Ok(content)
    }

    /// Reads the central directory.
    fn directory(&self, split: Split) -> Result<BTreeMap<String, Member>> {
        let total = self.n_bytes();
        let tail_at = total.saturating_sub(END_BYTES as u64 + MAX_COMMENT);
        let tail = self.bytes(tail_at, total - tail_at, || "the end of the archive".into())?;
        let is_end =
            |at: &usize| tail[*at..].starts_with(b"PK\x05\x06") && *at + END_BYTES + usize::from(u16_at(&tail, at + 20)) == tail.len();
        let Some(end_at) = (0..(tail.len() + 1).saturating_sub(END_BYTES)).rev().find(is_end) else {
            let problem = "expected a zip archive with its directory at the end, found none".to_owned();
            let hint = "the archive is cut short or its last part is missing: download it again, and give all of its parts in one folder";
            return Err(self.malformed(problem, hint));
        };
        let end = &tail[end_at..];
        // Of an archive of zip64 the fields are full, and the true ones stand before.
        let mut directory_disk = u32::from(u16_at(end, 6));
        let mut n_members = u64::from(u16_at(end, 10));
        let (mut n_bytes, mut offset) = (u64::from(u32_at(end, 12)), u64::from(u32_at(end, 16)));
        let end_at = tail_at + end_at as u64;
        let locator = match end_at.checked_sub(LOCATOR_BYTES) {
            Some(at) => self.bytes(at, LOCATOR_BYTES, || "the end of the archive".into())?,
            None => Vec::new(),
        };
        if locator.starts_with(b"PK\x06\x07") {
            let n_disks = u32_at(&locator, 16);
            self.check_parts(n_disks.max(1), split)?;
            let at = self.place(u32_at(&locator, 4), u64_at(&locator, 8), split, "the zip64 end")?;
            let end64 = self.bytes(at, END64_BYTES as u64, || "the zip64 end".into())?;
            if !end64.starts_with(b"PK\x06\x06") {
                return Err(self.damaged(format!("expected the zip64 end of the directory at byte {at}, found {:02x?}", &end64[..4])));
            }
            directory_disk = u32_at(&end64, 20);
            n_members = u64_at(&end64, 32);
            (n_bytes, offset) = (u64_at(&end64, 40), u64_at(&end64, 48));
        } else {
            self.check_parts(u32::from(u16_at(end, 4)) + 1, split)?;
        }
        let at = self.place(directory_disk, offset, split, "the directory")?;
        if at.checked_add(n_bytes).is_none_or(|directory_end| directory_end > end_at) {
            let problem = format!("expected the directory before byte {end_at}, found it from byte {at} on with {n_bytes} bytes");
            return Err(self.damaged(problem));
        }
        let entries = self.bytes(at, n_bytes, || "the directory".into())?;
        self.members_of(&entries, n_members, split)
    }

    fn members_of(&self, mut entries: &[u8], n_members: u64, split: Split) -> Result<BTreeMap<String, Member>> {
        let mut members = BTreeMap::new();
        let mut n_found = 0;
        while !entries.is_empty() {
            let cut = || self.damaged(format!("the directory, entry {n_found}: expected a header, found the end or other bytes"));
            let Some(fixed) = entries.get(..ENTRY_BYTES).filter(|fixed| fixed.starts_with(b"PK\x01\x02")) else { return Err(cut()) };
            let [name_length, extra_length, comment_length] = [28, 30, 32].map(|at| usize::from(u16_at(fixed, at)));
            let rest = &entries[ENTRY_BYTES..];
            let length = name_length + extra_length + comment_length;
            let (Some(name), Some(next)) = (rest.get(..name_length), rest.get(length..)) else { return Err(cut()) };
            let name = String::from_utf8_lossy(name).into_owned();
            let extra = Extra64::of(&rest[name_length..name_length + extra_length]);
            let member = extra.and_then(|mut extra| {
                let n_bytes = extra.or(u32_at(fixed, 24))?;
                let n_packed = extra.or(u32_at(fixed, 20))?;
                let offset = extra.or(u32_at(fixed, 42))?;
                let disk = if u16_at(fixed, 34) == u16::MAX { extra.disk()? } else { u32::from(u16_at(fixed, 34)) };
                Some((n_bytes, n_packed, offset, disk))
            });
            let Some((n_bytes, n_packed, offset, disk)) = member else {
                return Err(self.damaged(format!("entry {name}: expected its length in the zip64 field, found none")));
            };
            n_found += 1;
            entries = next;
            if name.ends_with('/') {
                continue;
            }
            let header_at = self.place(disk, offset, split, &name)?;
            let (crc, method, is_encrypted) = (u32_at(fixed, 16), u16_at(fixed, 10), u16_at(fixed, 8) & ENCRYPTED != 0);
            let member = Member { header_at, n_packed, n_bytes, crc, method, is_encrypted };
            if members.insert(name.clone(), member).is_some() {
                return Err(self.damaged(format!("entry {name}: two of this name")));
            }
        }
        // Without zip64, writers count modulo 65,536.
        if n_found != n_members && n_found % 65_536 != n_members {
            return Err(self.damaged(format!("the directory: expected {n_members} entries, found {n_found}")));
        }
        Ok(members)
    }

    /// Fails where parts are missing.
    fn check_parts(&self, n_parts: u32, split: Split) -> Result<()> {
        let n_found = self.parts.len();
        let n_expected = match split {
            Split::Bytes => 1,
            Split::ByPart => n_found,
        };
        if n_parts as usize == n_expected {
            return Ok(());
        }
        let stem = self.path.with_extension("");
        let stem = stem.file_name().unwrap_or_default().to_string_lossy();
        let is_there = |name: &String| self.parts.iter().any(|part| part.path.file_name().is_some_and(|found| *found == **name));
        let missing: Vec<String> =
            (1..n_parts).map(|number| format!("{stem}.z{number:02}")).filter(|name| !is_there(name)).take(MAX_NAMED).collect();
        let missing = if missing.is_empty() { String::new() } else { format!("; missing: {}", missing.join(", ")) };
        let problem = format!("expected the {n_parts} parts of a split archive, found {n_found}{missing}");
        Err(self.malformed(problem, "put all parts, `name.z01` to `name.zip`, into one folder, and give the folder"))
    }

    /// Where in the archive an offset of a part lies.
    fn place(&self, disk: u32, offset: u64, split: Split, what: &str) -> Result<u64> {
        let start = match split {
            Split::Bytes => Some(0),
            Split::ByPart => self.parts.get(disk as usize).map(|part| part.start),
        };
        let place = start.and_then(|start| start.checked_add(offset)).filter(|place| *place < self.n_bytes());
        place.ok_or_else(|| {
            let (n_bytes, part) = (self.n_bytes(), disk + 1);
            self.damaged(format!(
                "{what}: expected a place in {n_bytes} bytes of {} parts, found byte {offset} of part {part}",
                self.parts.len()
            ))
        })
    }

    fn n_bytes(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.start + part.n_bytes)
    }

    /// Bytes of the archive, from one part or several. `what`: for messages.
    fn bytes(&self, at: u64, n_bytes: u64, what: impl Fn() -> String) -> Result<Vec<u8>> {
        let end = at.checked_add(n_bytes).filter(|end| *end <= self.n_bytes());
        let Some(end) = end else {
            let found = self.n_bytes().saturating_sub(at);
            return Err(self.damaged(format!("{}: expected {n_bytes} bytes from byte {at} on, found {found}", what())));
        };
        let mut bytes = vec![0; n_bytes as usize];
        for Part { path, file, start, n_bytes } in &self.parts {
            let (from, to) = (at.max(*start), end.min(start + n_bytes));
            if from < to {
                let read = file.read_exact_at(&mut bytes[(from - at) as usize..(to - at) as usize], from - start);
                read.map_err(|source| Error::Read { path: path.clone(), source })?;
            }
        }
        Ok(bytes)
    }

    fn malformed(&self, problem: String, hint: &str) -> Error {
        Error::Malformed { path: self.path.clone(), problem, hint: Some(hint.into()) }
    }

    fn damaged(&self, problem: String) -> Error {
        self.malformed(problem, AGAIN)
    }
}

/// The zip64 extra field of an entry: the values that did not fit, in order.
struct Extra64<'a>(&'a [u8]);

impl<'a> Extra64<'a> {
    /// The field among all extra fields; empty where there is none. `None` if the fields are cut short.
    fn of(mut fields: &'a [u8]) -> Option<Self> {
        while fields.len() >= 4 {
            let (kind, length) = (u16_at(fields, 0), usize::from(u16_at(fields, 2)));
            let field = fields.get(4..4 + length)?;
            if kind == 1 {
                return Some(Self(field));
            }
            fields = &fields[4 + length..];
        }
        Some(Self(&[]))
    }

    /// A value of 32 bits, or the next one of this field in its place.
    fn or(&mut self, value: u32) -> Option<u64> {
        if value != IN_EXTRA {
            return Some(value.into());
        }
        let (first, rest) = self.0.split_at_checked(8)?;
        self.0 = rest;
        Some(u64_at(first, 0))
    }

    fn disk(&self) -> Option<u32> {
        self.0.get(..4).map(|bytes| u32_at(bytes, 0))
    }
}

/// The parts of an archive in their order. Fails where one is missing in between, or files belong to different archives.
fn in_order(paths: &[PathBuf]) -> Result<(Vec<PathBuf>, Split)> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let [first, others @ ..] = paths else {
        return Err(Error::Input { what: "parts", expected: "a zip archive or its parts".into(), found: "no files".into() });
    };
    let malformed = |problem: String| {
        let hint = "give a folder with the parts of one archive and nothing else: `name.z01`, `name.z02`, ..., `name.zip`, or \
                    `name.zip.001`, `name.zip.002`, ...";
        Error::Malformed { path: first.clone(), problem, hint: Some(hint.into()) }
    };
    // The number of a part, 0 for the last one of `zip -s`, and what the parts of an archive have in common.
    let parsed = |path: &PathBuf| {
        let (stem, extension) = (name(&path.with_extension("")), path.extension().unwrap_or_default().to_string_lossy().into_owned());
        let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let lower = extension.to_ascii_lowercase();
        match lower.strip_prefix('z') {
            _ if lower == "zip" => Some((stem, Split::ByPart, 0)),
            Some(digits) if is_number(digits) => Some((stem, Split::ByPart, digits.parse::<u32>().ok()?)),
            _ if is_number(&lower) => Some((stem, Split::Bytes, lower.parse().ok()?)),
            _ => None,
        }
    };
    if others.is_empty() && parsed(first).is_none_or(|(_, split, number)| split == Split::ByPart && number == 0) {
        return Ok((vec![first.clone()], Split::Bytes));
    }
    let mut numbered = Vec::new();
    let mut of_first = None;
    for path in paths {
        let Some((stem, split, number)) = parsed(path) else {
            return Err(malformed(format!("expected a part of a zip archive, found `{}`", name(path))));
        };
        let (of_stem, of_split) = of_first.get_or_insert((stem.clone(), split));
        if (&*of_stem, *of_split) != (&stem, split) {
            return Err(malformed(format!("expected the parts of one archive, found `{}` and `{}`", name(first), name(path))));
        }
        numbered.push((if number == 0 && split == Split::ByPart { u32::MAX } else { number }, path.clone()));
    }
    let (stem, split) = of_first.unwrap_or((String::new(), Split::Bytes));
    numbered.sort();
    for (place, (number, _)) in numbered.iter().enumerate() {
        let expected = place as u32 + 1;
        let is_last = split == Split::ByPart && place + 1 == numbered.len();
        let missing = match split {
            _ if is_last && *number != u32::MAX => format!("{stem}.zip"),
            Split::ByPart if !is_last && *number != expected => format!("{stem}.z{expected:02}"),
            Split::Bytes if *number != expected => format!("{stem}.{expected:03}"),
            Split::ByPart | Split::Bytes => continue,
        };
        return Err(malformed(format!("expected the part `{missing}`, found none among {}", numbered.len())));
    }
    Ok((numbered.into_iter().map(|(_, path)| path).collect(), split))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "scratch files of a test")]
mod tests {
    use std::{
        fs,
        io::{Cursor, Seek as _, SeekFrom, Write as _},
        process::Command,
        thread,
    };

    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    use super::*;

    /// The content of member `i`: long enough that deflating changes it.
    fn content(i: usize) -> Vec<u8> {
        (0..3000).map(|place| (place * i / 7) as u8).collect()
    }

    fn name(i: usize) -> String {
        format!("data/train2017/{i:012}.pth")
    }

    /// An archive of `n` members, every second one deflated.
    fn archive(n: usize) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.add_directory("data/train2017/", SimpleFileOptions::default()).unwrap();
        for i in 0..n {
            let method = if i % 2 == 0 { CompressionMethod::Stored } else { CompressionMethod::Deflated };
            zip.start_file(name(i), SimpleFileOptions::default().compression_method(method).large_file(i == 2)).unwrap();
            zip.write_all(&content(i)).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn put(folder: &Path, files: &[(&str, &[u8])]) -> Vec<PathBuf> {
        files.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).unwrap());
        files.iter().map(|(name, _)| folder.join(name)).collect()
    }

    fn opened(files: &[(&str, &[u8])]) -> Result<ZipFolder> {
        let folder = tempfile::tempdir().unwrap();
        ZipFolder::open(&put(folder.path(), files))
    }

    /// What is wrong, without the path.
    fn problem<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(Error::Malformed { problem, hint: Some(_), .. }) => problem,
            other => panic!("expected a malformed file, found {other:?}"),
        }
    }

    fn is_whole(folder: &ZipFolder, n: usize) {
        assert_eq!(folder.names().collect::<Vec<_>>(), (0..n).map(name).collect::<Vec<_>>());
        for i in 0..n {
            assert_eq!(folder.read(&name(i)).unwrap(), content(i), "{i}");
        }
    }

    #[test]
    fn members_are_read_by_name_whether_stored_or_deflated() {
        is_whole(&opened(&[("a.zip", &archive(5))]).unwrap(), 5);
        // Whatever its name, one file is an archive.
        is_whole(&opened(&[("a.bin", &archive(5))]).unwrap(), 5);
        let folder = opened(&[("a.zip", &archive(2))]).unwrap();
        assert_eq!(problem(folder.read("b.pth")), "entry b.pth: expected it among 2, found none");
    }

    #[test]
    fn several_threads_read_at_once() {
        let folder = opened(&[("a.zip", &archive(40))]).unwrap();
        thread::scope(|scope| {
            for start in 0..4 {
                let folder = &folder;
                scope.spawn(move || (start..40).step_by(4).for_each(|i| assert_eq!(folder.read(&name(i)).unwrap(), content(i))));
            }
        });
    }

    #[test]
    fn an_archive_of_more_than_65535_members_is_read() {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for i in 0..65_540 {
            zip.start_file(format!("{i}"), SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
        }
        zip.write_all(b"last").unwrap();
        let bytes = zip.finish().unwrap().into_inner();
        assert!(bytes.windows(4).any(|window| window == b"PK\x06\x06"), "the archive is of zip64");
        let folder = opened(&[("a.zip", &bytes)]).unwrap();
        assert_eq!((folder.names().count(), folder.read("65539").unwrap()), (65_540, b"last".to_vec()));
    }

    /// The file is 5 GiB long, almost all of it a hole.
    #[test]
    fn an_archive_of_more_than_4_gib_is_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.seek(SeekFrom::Start(5 << 30)).unwrap();
        let mut zip = ZipWriter::new(file);
        zip.start_file("a.pth", SimpleFileOptions::default()).unwrap();
        zip.write_all(&content(3)).unwrap();
        let file = zip.finish().unwrap();
        let folder = ZipFolder::open(&[file.path().to_owned()]).unwrap();
        assert!(folder.members["a.pth"].header_at >= 5 << 30);
        assert_eq!(folder.read("a.pth").unwrap(), content(3));
    }

    #[test]
    fn parts_of_bytes_are_one_archive_wherever_they_are_cut() {
        let bytes = archive(5);
        for cuts in [[1, 2], [100, 5000], [bytes.len() - 30, bytes.len() - 10]] {
            let [first, second] = cuts;
            let parts = [("a.zip.003", &bytes[second..]), ("a.zip.001", &bytes[..first]), ("a.zip.002", &bytes[first..second])];
            is_whole(&opened(&parts).unwrap(), 5);
            assert_eq!(problem(opened(&parts[..2])), "expected the part `a.zip.002`, found none among 2");
            assert_eq!(problem(opened(&[parts[0], parts[2]])), "expected the part `a.zip.001`, found none among 2");
            let cut = problem(opened(&parts[1..]));
            assert!(cut.starts_with("expected a zip archive with its directory at the end"), "{cut}");
        }
    }

    /// The archive as `zip -s` would split it at these bytes: its directory counts from the start of each part.
    fn split(mut bytes: Vec<u8>, cuts: &[usize]) -> Vec<Vec<u8>> {
        // The marker of a split archive moves everything by four bytes.
        bytes.splice(0..0, *b"PK\x07\x08");
        let cuts: Vec<usize> = cuts.iter().map(|cut| cut + 4).collect();
        let place = |at: usize| {
            let disk = cuts.iter().filter(|cut| **cut <= at).count();
            (disk as u16, at - disk.checked_sub(1).map_or(0, |before| cuts[before]))
        };
        let end = bytes.len() - END_BYTES;
        let directory = u32_at(&bytes, end + 16) as usize + 4;
        let mut at = directory;
        while at < end {
            let (disk, offset) = place(u32_at(&bytes, at + 42) as usize + 4);
            bytes[at + 34..at + 36].copy_from_slice(&disk.to_le_bytes());
            bytes[at + 42..at + 46].copy_from_slice(&(offset as u32).to_le_bytes());
            at += ENTRY_BYTES + [28, 30, 32].map(|field| usize::from(u16_at(&bytes, at + field))).iter().sum::<usize>();
        }
        let (disk, offset) = place(directory);
        bytes[end + 4..end + 6].copy_from_slice(&(cuts.len() as u16).to_le_bytes());
        bytes[end + 6..end + 8].copy_from_slice(&disk.to_le_bytes());
        bytes[end + 16..end + 20].copy_from_slice(&(offset as u32).to_le_bytes());
        let ends = cuts.iter().copied().chain([bytes.len()]);
        ends.scan(0, |start, end| Some(bytes[std::mem::replace(start, end)..end].to_vec())).collect()
    }

    #[test]
    fn parts_of_zip_are_one_archive() {
        let bytes = archive(5);
        let directory = u32_at(&bytes, bytes.len() - 6) as usize;
        // In the data of a member, and in the directory.
        for cuts in [[2000, 4000], [3500, directory], [3500, directory + 50]] {
            let parts = split(bytes.clone(), &cuts);
            let named = [("a.zip", parts[2].as_slice()), ("a.z01", &parts[0]), ("a.z02", &parts[1])];
            is_whole(&opened(&named).unwrap(), 5);
            assert_eq!(problem(opened(&named[..2])), "expected the 3 parts of a split archive, found 2; missing: a.z02");
            assert_eq!(problem(opened(&named[..1])), "expected the 3 parts of a split archive, found 1; missing: a.z01, a.z02");
            assert_eq!(problem(opened(&[named[0], named[2]])), "expected the part `a.z01`, found none among 2");
            assert_eq!(problem(opened(&named[1..])), "expected the part `a.zip`, found none among 2");
        }
    }

    /// Parts that Info-ZIP itself wrote, where it is installed.
    #[test]
    fn what_zip_splits_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let noise = |i: usize| (0..50_000_usize).map(|place| ((place * 7919 + i * 104_729) ^ (place >> 3)) as u8).collect::<Vec<u8>>();
        for i in 0..5 {
            fs::write(folder.path().join(format!("{i}.pth")), noise(i)).unwrap();
        }
        let zipped = Command::new("zip").args(["-q", "-0", "-s", "64k", "a.zip", "-r", "."]).current_dir(folder.path()).output();
        if !zipped.is_ok_and(|output| output.status.success()) {
            crate::skip::skip("Info-ZIP is not installed");
            return;
        }
        let files = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let parts: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|ending| ending != "pth")).collect();
        assert!(parts.len() > 3, "{parts:?}");
        let opened = ZipFolder::open(&parts).unwrap();
        for i in 0..5 {
            assert_eq!(opened.read(&format!("{i}.pth")).unwrap(), noise(i));
        }
    }

    #[test]
    fn files_that_are_no_parts_of_one_archive_are_named() {
        let bytes = archive(1);
        let both = |first, second| problem(opened(&[(first, &bytes), (second, &bytes)]));
        assert_eq!(both("a.zip", "notes.txt"), "expected a part of a zip archive, found `notes.txt`");
        assert_eq!(both("a.zip", "b.zip"), "expected the parts of one archive, found `a.zip` and `b.zip`");
        assert_eq!(both("a.zip", "a.zip.001"), "expected the parts of one archive, found `a.zip` and `a.zip.001`");
        assert_eq!(opened(&[]).unwrap_err().to_string(), "parts: expected a zip archive or its parts, found no files");
    }

    #[test]
    fn damage_is_an_error_that_names_the_member() {
        let bytes = archive(4);
        let folder = opened(&[("a.zip", &bytes)]).unwrap();
        let at = folder.members[&name(2)].header_at as usize;
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            problem(opened(&[("a.zip", &bytes)]).and_then(|folder| folder.read(&name(2))))
        };
        let entry = format!("entry {}", name(2));
        assert_eq!(changed(&|bytes| bytes[at + 1000] ^= 1), format!("{entry}: Invalid checksum"));
        assert_eq!(changed(&|bytes| bytes[at] ^= 1), format!("{entry}: expected its header at byte {at}, found [51, 4b, 03, 04]"));
        // The deflated one after it.
        let other = folder.members[&name(3)].header_at as usize;
        let mut hurt = bytes.clone();
        hurt[other + LOCAL_BYTES + name(3).len() + 20] ^= 0xff;
        let hurt = opened(&[("a.zip", &hurt)]).unwrap();
        assert!(problem(hurt.read(&name(3))).starts_with(&format!("entry {}: ", name(3))));
        assert_eq!(hurt.read(&name(2)).unwrap(), content(2));
        // Lengths and places that are lies.
        let place = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
        let mut directory = place;
        while bytes[directory + ENTRY_BYTES..].starts_with(b"data/train2017/")
            && !bytes[directory + ENTRY_BYTES..].starts_with(name(3).as_bytes())
        {
            directory += ENTRY_BYTES + [28, 30, 32].map(|field| usize::from(u16_at(&bytes, directory + field))).iter().sum::<usize>();
        }
        let lie = |field: usize, value: u32| {
            let mut bytes = bytes.clone();
            bytes[directory + field..directory + field + 4].copy_from_slice(&value.to_le_bytes());
            problem(opened(&[("a.zip", &bytes)]).and_then(|folder| folder.read(&name(3))))
        };
        for (field, value) in [(20, 1 << 30), (24, 2999), (24, 1 << 31), (42, 1 << 30), (42, 7), (20, 10)] {
            assert!(
                lie(field, value).starts_with(&name(3)) || lie(field, value).starts_with(&format!("entry {}: ", name(3))),
                "{field} {value}"
            );
        }
    }

    #[test]
    fn every_cut_and_flipped_bit_is_survived() {
        let bytes = archive(3);
        for length in 0..bytes.len() {
            assert!(opened(&[("a.zip", &bytes[..length])]).is_err(), "cut to {length}");
        }
        for at in (0..bytes.len()).rev().take(400) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            if let Ok(folder) = opened(&[("a.zip", &flipped)]) {
                for name in folder.names() {
                    let _may_be_damaged = folder.read(name);
                }
            }
        }
    }
}
