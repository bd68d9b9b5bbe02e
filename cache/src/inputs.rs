//! Content digests of the user's files.
//!
//! A file is hashed once; the ledger stores its digest with device, inode, size, mtime and ctime, in one table per input. As in
//! git, the digest is not stored if the file was hashed within [`RACY_NS`] after its last change: it may have changed again
//! within the resolution of the clock.
//!
//! Inputs are regular files and links to regular files anywhere. Nothing else is opened: reading a pipe may block, and a device may have
//! no end.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, FileType, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use arrow::{
    array::{ArrayRef, AsArray, FixedSizeBinaryArray, Int64Array, RecordBatch, StringArray, UInt64Array},
    datatypes::{Int64Type, UInt64Type},
    ipc::{reader::StreamReader, writer::StreamWriter},
};
use rustix::{fs::OFlags, io::Errno};

use crate::{Digest, Error, Fingerprint, Ledger, Result, shard::ShardReader};

/// The least time between the last change of a file and its hashing for the ledger to store the digest, in ns.
const RACY_NS: i128 = 2_000_000_000;
/// The number of files in one value of the ledger, which is rewritten if one of them changes.
const FILES_PER_VALUE: usize = 8192;

/// One file of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// Path below the input's folder, with `/`; for a single file its file name.
    pub name: String,
    /// Path on disk.
    pub path: PathBuf,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub digest: Digest,
    /// The unit that it belongs to; `None` for a file of the user.
    pub unit: Option<Fingerprint>,
}

impl InputFile {
    /// Reads the file and checks its digest. For shards see [`Self::shard`].
    pub fn read(&self) -> Result<Vec<u8>> {
        let bytes = read_file(&self.path).map_err(|source| self.unreadable(source))?;
        self.expect(Digest::of(&bytes))?;
        Ok(bytes)
    }

    /// Reads the first `n_bytes` without a check, to guess the file's format.
    pub fn begin(&self, n_bytes: u64) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        let read = open_file(&self.path).and_then(|file| file.take(n_bytes).read_to_end(&mut head));
        read.map_err(|source| self.unreadable(source))?;
        Ok(head)
    }

    /// Calls a reader that needs a path; hashes the file before, and checks after that it did not change.
    pub fn read_with<T, E: From<Error>>(&self, read: impl FnOnce(&Path) -> Result<T, E>) -> Result<T, E> {
        let checked = self.check()?;
        let made = read(&self.path);
        checked.still()?;
        made
    }

    /// Hashes the file before it is read in parts; [`Checked::still`] checks afterwards that it did not change.
    pub fn check(&self) -> Result<Checked<'_>> {
        let stat = self.stat()?;
        self.expect(self.hash()?)?;
        Ok(Checked { file: self, stat })
    }

    /// Opens a shard; each of its batches is checked as it is read.
    pub fn shard(&self) -> Result<ShardReader> {
        match &self.unit {
            None => self.read_with(|path| ShardReader::open(path, None)),
            Some(unit) => {
                let shard = ShardReader::open(&self.path, Some(unit))?;
                self.expect(shard.content())?;
                Ok(shard)
            }
        }
    }

    fn hash(&self) -> Result<Digest> {
        digest_file(&self.path).map_err(|error| match error {
            Error::Read { source, .. } => self.unreadable(source),
            other => other,
        })
    }

    fn stat(&self) -> Result<Stat> {
        let metadata = fs::metadata(&self.path).map_err(|source| self.unreadable(source))?;
        Ok(Stat::from(&metadata))
    }

    fn expect(&self, found: Digest) -> Result<()> {
        let (path, expected) = (self.path.clone(), self.digest);
        match self.unit {
            _ if found == expected => Ok(()),
            Some(_) => Err(Error::Flipped { path, what: "content".into(), expected, found }),
            None => Err(Error::Changed { path, expected, found }),
        }
    }

    /// The error of a file that was hashed and can no longer be read; a missing file of the home is damage, one of the user is not.
    fn unreadable(&self, source: io::Error) -> Error {
        match self.unit {
            Some(_) if source.kind() == io::ErrorKind::NotFound => Error::malformed(&self.path, "is missing"),
            None if source.kind() == io::ErrorKind::NotFound => Error::Gone { path: self.path.clone() },
            _ => Error::read(&self.path, source),
        }
    }
}

/// A file whose digest was checked before reading.
#[derive(Debug)]
pub struct Checked<'a> {
    file: &'a InputFile,
    stat: Stat,
}

impl Checked<'_> {
    /// Fails if the file changed since the check.
    pub fn still(&self) -> Result<()> {
        if self.file.stat()? == self.stat { Ok(()) } else { self.file.check().map(drop) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
}

impl Stat {
    fn of(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(|source| Error::read(path, source))?;
        Ok(Self::from(&metadata))
    }
}

impl From<&fs::Metadata> for Stat {
    fn from(metadata: &fs::Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
            ctime_ns: metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec(),
        }
    }
}

/// The type of an entry that is neither a file nor a folder, in words: `a named pipe`, `a dead link`. `None` for files, folders, and
/// paths that do not exist.
pub fn stray(path: &Path) -> Option<&'static str> {
    match fs::metadata(path) {
        Ok(metadata) => other_kind(metadata.file_type()),
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => Some("a loop of links"),
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => Some("a dead link"),
        Err(_) => None,
    }
}

fn other_kind(kind: FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_dir() {
        None
    } else if kind.is_fifo() {
        Some("a named pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}

/// Opens a regular file. Never blocks, even if a pipe takes its place after the check.
fn open_file(path: &Path) -> io::Result<File> {
    let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("expected a file, found {what}"));
    if let Some(what) = stray(path) {
        return Err(refused(what));
    }
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    match file.metadata()?.file_type() {
        kind if kind.is_file() => Ok(file),
        kind => Err(refused(other_kind(kind).unwrap_or("a folder"))),
    }
}

/// Reads a regular file; never blocks.
pub(crate) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_file(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The digests of a file, or of all files below a folder in ascending order of name; hidden files are not read.
///
/// Entries of a folder that are not files are skipped, with a notice of the ledger: pipes, devices, sockets, dead links, names that are not
/// UTF-8, and links to a folder that contains them. All other links are followed. `now_ns` is the time in ns since 1970, to recognise files
/// that changed just now. Without a ledger everything is hashed. Fails if the path is neither a file nor a folder, if a file cannot be
/// read, and when the ledger is told to stop.
pub fn digest_path(path: &Path, ledger: Option<&Ledger>, now_ns: i128) -> Result<Vec<InputFile>> {
    let check_stop = || if ledger.is_some_and(Ledger::is_stopped) { Err(Error::Stopped) } else { Ok(()) };
    let found = if path.is_dir() {
        let mut walk = Walk { check_stop: &check_stop, found: Vec::new(), skipped: BTreeMap::new(), within: Vec::new() };
        walk.enter(path, "")?;
        if let (Some(ledger), Some(notice)) = (ledger, walk.notice(path)) {
            ledger.say(notice);
        }
        walk.found
    } else {
        open_file(path).map_err(|source| Error::read(path, source))?;
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        vec![(name, path.to_owned())]
    };
    let stats = in_parallel(found.len(), |file_idx| {
        check_stop()?;
        Stat::of(&found[file_idx].1)
    })?;
    let root = path.canonicalize().map_err(|source| Error::read(path, source))?.display().to_string();
    let mut digests = match ledger.filter(|ledger| !ledger.is_rehashing()) {
        Some(ledger) => Table::read(ledger, &root).look_up(&found, &stats),
        None => vec![None; found.len()],
    };
    let doubted = ledger.map(Ledger::doubted).unwrap_or_default();
    let unknown: Vec<usize> = (0..found.len()).filter(|idx| digests[*idx].is_none() || doubted.contains(&found[*idx].1)).collect();
    let hashed = in_parallel(unknown.len(), |place| digest_unless_stopped(&found[unknown[place]].1, &check_stop))?;
    for (file_idx, digest) in unknown.iter().zip(&hashed) {
        digests[*file_idx] = Some(*digest);
    }
    let digests: Vec<Digest> = digests.into_iter().map(|digest| digest.expect("BUG: every unknown file was hashed")).collect();
    if let Some(ledger) = ledger
        && !unknown.is_empty()
    {
        Table::write(ledger, &root, &found, &stats, &digests, now_ns);
    }
    let files = found.into_iter().zip(stats).zip(digests);
    Ok(files.map(|(((name, path), stat), digest)| InputFile { name, path, bytes: stat.size, digest, unit: None }).collect())
}

/// Hashes every file in the ledger whose size and times are unchanged, to find input files that rotted on disk. Calls `visit`
/// with each file and its problem, if it has one.
pub fn verify_remembered(ledger: &Ledger, visit: &mut dyn FnMut(&Path, Option<String>)) {
    let roots = ledger.with(|db| db.scan_prefix(b"inputs:").keys().collect::<sled::Result<Vec<_>>>()).unwrap_or_default();
    let root =
        |key: &sled::IVec| Some(String::from_utf8_lossy(key.strip_prefix(b"inputs:")?.split(|byte| *byte == 0).next()?).into_owned());
    let mut roots: Vec<String> = roots.iter().filter_map(root).collect();
    roots.dedup();
    for root in roots {
        let is_folder = Path::new(&root).is_dir();
        for batch in Table::read(ledger, &root).batches {
            for row in 0..batch.num_rows() {
                let (name, was, digest) = Table::row(&batch, row);
                let path = if is_folder { Path::new(&root).join(name) } else { PathBuf::from(&root) };
                // Other files changed visibly; the next run hashes them again.
                if Stat::of(&path).is_ok_and(|stat| stat == was) {
                    let found = digest_file(&path).map_err(|error| error.to_string());
                    let problem = match found {
                        Ok(found) if found == digest => None,
                        Ok(found) => Some(format!("changed although its size and times did not: expected {digest}, found {found}")),
                        Err(error) => Some(error),
                    };
                    visit(&path, problem);
                }
            }
        }
    }
}

/// A walk through a folder.
struct Walk<'a> {
    check_stop: &'a dyn Fn() -> Result<()>,
    found: Vec<(String, PathBuf)>,
    /// Skipped entries by type: their number, and the first name.
    skipped: BTreeMap<&'static str, (usize, String)>,
    /// Device and inode of the current folder and those above it.
    within: Vec<(u64, u64)>,
}

impl Walk<'_> {
    fn enter(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let read = |source| Error::read(folder, source);
        let metadata = fs::metadata(folder).map_err(read)?;
        let this = (metadata.dev(), metadata.ino());
        if self.within.contains(&this) {
            self.skip("a folder within itself", prefix.trim_end_matches('/').to_owned());
            return Ok(());
        }
        self.within.push(this);
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder).map_err(read)? {
            (self.check_stop)()?;
            let entry = entry.map_err(read)?;
            let kind = entry.file_type().map_err(read)?;
            let lossy = entry.file_name().to_string_lossy().into_owned();
            if lossy.starts_with('.') {
                continue;
            }
            let is_link = kind.is_symlink();
            let what = if is_link { stray(&entry.path()) } else { other_kind(kind) };
            match (what, entry.file_name().into_string()) {
                (Some(what), _) => self.skip(what, format!("{prefix}{lossy}")),
                (None, Err(_)) => self.skip("a name that is not UTF-8", format!("{prefix}{lossy}")),
                // Links to folders are followed.
                (None, Ok(name)) => entries.push((name, kind.is_dir() || (is_link && entry.path().is_dir()))),
            }
        }
        entries.sort_unstable();
        for (name, is_folder) in entries {
            let path = folder.join(&name);
            if is_folder {
                self.enter(&path, &format!("{prefix}{name}/"))?;
            } else {
                self.found.push((format!("{prefix}{name}"), path));
            }
        }
        self.within.pop();
        Ok(())
    }

    fn skip(&mut self, what: &'static str, name: String) {
        let (n, first) = self.skipped.entry(what).or_insert((0, name.clone()));
        *n += 1;
        if name < *first {
            *first = name;
        }
    }

    /// The notice about skipped entries, if there are any.
    fn notice(&self, folder: &Path) -> Option<String> {
        let kind = |(what, (n, first)): (&&str, &(usize, String))| {
            if *n == 1 { format!("{what} ({first})") } else { format!("{what} ({first} and {} more)", n - 1) }
        };
        let kinds: Vec<String> = self.skipped.iter().map(kind).collect();
        (!kinds.is_empty()).then(|| format!("{}: skipped {}", folder.display(), kinds.join(", ")))
    }
}

/// The ledger's table for one input, in the order of [`Walk`].
struct Table {
    /// Columns: name, dev, ino, size, mtime, ctime, digest.
    batches: Vec<RecordBatch>,
}

impl Table {
    fn prefix(root: &str) -> Vec<u8> {
        [b"inputs:", root.as_bytes(), b"\0"].concat()
    }

    /// Reads the table; values that cannot be parsed are ignored.
    fn read(ledger: &Ledger, root: &str) -> Self {
        let values = ledger.with(|db| db.scan_prefix(Self::prefix(root)).values().collect::<sled::Result<Vec<_>>>());
        let batch = |value: &sled::IVec| StreamReader::try_new(&value[..], None).ok()?.next()?.ok();
        Self { batches: values.unwrap_or_default().iter().filter_map(batch).collect() }
    }

    /// The digest of each file whose size and times are unchanged; `None` for the others.
    fn look_up(&self, found: &[(String, PathBuf)], stats: &[Stat]) -> Vec<Option<Digest>> {
        let rows = || self.batches.iter().flat_map(|batch| (0..batch.num_rows()).map(move |row| Self::row(batch, row)));
        let mut by_name: Option<HashMap<&str, (Stat, Digest)>> = None;
        // Both lists are in the same order; names are looked up only after the first difference.
        let mut in_order = rows();
        let known = |((name, _), stat): (&(String, PathBuf), &Stat)| {
            let (was, digest) = match in_order.next().filter(|(was, ..)| by_name.is_none() && was == name) {
                Some((_, was, digest)) => (was, digest),
                None => {
                    let by_name = by_name.get_or_insert_with(|| rows().map(|(name, was, digest)| (name, (was, digest))).collect());
                    *by_name.get(name.as_str())?
                }
            };
            (was == *stat).then_some(digest)
        };
        found.iter().zip(stats).map(known).collect()
    }

    fn row(batch: &RecordBatch, row: usize) -> (&str, Stat, Digest) {
        let unsigned = |column: usize| batch.column(column).as_primitive::<UInt64Type>().value(row);
        let signed = |column: usize| batch.column(column).as_primitive::<Int64Type>().value(row);
        let stat = Stat { dev: unsigned(1), ino: unsigned(2), size: unsigned(3), mtime_ns: signed(4), ctime_ns: signed(5) };
        let digest = batch.column(6).as_fixed_size_binary().value(row);
        let digest = blake3::Hash::from_bytes(digest.try_into().expect("BUG: the column has 32 bytes a value"));
        (batch.column(0).as_string::<i32>().value(row), stat, digest.into())
    }

    fn write(ledger: &Ledger, root: &str, found: &[(String, PathBuf)], stats: &[Stat], digests: &[Digest], now_ns: i128) {
        let is_old_enough = |stat: &Stat| now_ns - i128::from(stat.mtime_ns.max(stat.ctime_ns)) > RACY_NS;
        let rows: Vec<usize> = (0..found.len()).filter(|file_idx| is_old_enough(&stats[*file_idx])).collect();
        let values: Vec<Vec<u8>> = rows.chunks(FILES_PER_VALUE).map(|rows| encode(rows, found, stats, digests)).collect();
        let prefix = Self::prefix(root);
        // If this fails, the files are hashed again.
        let _lost = ledger.with(|db| {
            for (value_idx, value) in values.iter().enumerate() {
                let key = [&prefix[..], &(value_idx as u32).to_be_bytes()].concat();
                if db.get(&key)?.is_none_or(|was| was != value) {
                    db.insert(key, &value[..])?;
                }
            }
            for key in db.scan_prefix(&prefix).keys().skip(values.len()).collect::<sled::Result<Vec<_>>>()? {
                db.remove(key)?;
            }
            Ok(())
        });
    }
}

fn encode(rows: &[usize], found: &[(String, PathBuf)], stats: &[Stat], digests: &[Digest]) -> Vec<u8> {
    let unsigned =
        |field: fn(&Stat) -> u64| -> ArrayRef { Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| field(&stats[*row])))) };
    let signed =
        |field: fn(&Stat) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| field(&stats[*row])))) };
    let names = StringArray::from_iter_values(rows.iter().map(|row| &found[*row].0));
    let digests = FixedSizeBinaryArray::try_from_iter(rows.iter().map(|row| digests[*row].as_bytes()));
    let columns: [(&str, ArrayRef); 7] = [
        ("name", Arc::new(names)),
        ("dev", unsigned(|stat| stat.dev)),
        ("ino", unsigned(|stat| stat.ino)),
        ("size", unsigned(|stat| stat.size)),
        ("mtime_ns", signed(|stat| stat.mtime_ns)),
        ("ctime_ns", signed(|stat| stat.ctime_ns)),
        ("digest", Arc::new(digests.expect("BUG: digests have 32 bytes"))),
    ];
    let batch = RecordBatch::try_from_iter(columns).expect("BUG: columns of equal length");
    let mut bytes = Vec::new();
    let mut write = || {
        let mut writer = StreamWriter::try_new(&mut bytes, &batch.schema())?;
        writer.write(&batch)?;
        writer.finish()
    };
    write().expect("BUG: writing to memory does not fail");
    bytes
}

/// Calls `work` for every index below `n` on all cores; the results are in order.
fn in_parallel<T: Send>(n: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    const SPAN: usize = 64;
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(n.div_ceil(SPAN)).max(1);
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, Vec<T>)>> {
        let mut spans = Vec::new();
        loop {
            let first = next.fetch_add(SPAN, Ordering::Relaxed);
            if first >= n {
                return Ok(spans);
            }
            spans.push((first, (first..n.min(first + SPAN)).map(&work).collect::<Result<_>>()?));
        }
    };
    let mut spans = thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(worker)).collect();
        let finished = workers.into_iter().map(|worker| worker.join().expect("BUG: hashing does not panic"));
        finished.collect::<Result<Vec<_>>>()
    })?
    .into_iter()
    .flatten()
    .collect::<Vec<_>>();
    spans.sort_by_key(|(first, _)| *first);
    Ok(spans.into_iter().flat_map(|(_, results)| results).collect())
}

/// The BLAKE3 of a file's content.
pub fn digest_file(path: &Path) -> Result<Digest> {
    digest_unless_stopped(path, &|| Ok(()))
}

/// As [`digest_file`]; ends with the error of `check_stop`, which is called before each read.
fn digest_unless_stopped(path: &Path, check_stop: &dyn Fn() -> Result<()>) -> Result<Digest> {
    let read = |source| Error::read(path, source);
    let mut file = open_file(path).map_err(read)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = [0; 1 << 16];
    loop {
        check_stop()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(n_bytes) => drop(hasher.update(&buffer[..n_bytes])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::{
        Store,
        publish::{Publisher, replace},
    };

    const LATER: i128 = 1 << 100;

    fn ledger(home: &Path) -> Ledger {
        Ledger::of(&Store::open(&home.join("home")).unwrap())
    }

    #[test]
    fn a_folder_lists_its_files_by_name_without_hidden_ones() {
        let home = tempfile::tempdir().unwrap();
        for name in ["b.jpg", "a/2.jpg", "a/1.jpg", ".hidden"] {
            replace(&home.path().join(name), name.as_bytes()).unwrap();
        }
        let files = digest_path(home.path(), None, LATER).unwrap();
        let names: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.digest)).collect();
        assert_eq!(names, ["a/1.jpg", "a/2.jpg", "b.jpg"].map(|name| (name, Digest::of(name.as_bytes()))));
    }

    /// Creates a named pipe.
    pub(crate) fn fifo(path: &Path) {
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a scratch folder of a test")]
    fn entries_that_are_not_files_are_skipped_with_a_notice_and_are_errors_as_inputs() {
        use std::os::unix::{ffi::OsStrExt as _, fs::symlink, net::UnixListener};
        let home = tempfile::tempdir().unwrap();
        let (folder, ledger) = (home.path().join("folder"), ledger(home.path()));
        for name in ["a.jpg", "inner/b.jpg", "elsewhere/c.jpg"] {
            replace(&home.path().join("folder").join(name), b"content").unwrap();
        }
        fs::rename(folder.join("elsewhere"), home.path().join("elsewhere")).unwrap();
        let at = |name: &str| folder.join(name);
        fifo(&at("pipe"));
        fifo(&at(".hidden"));
        let _socket = UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/zero", at("zero")).unwrap();
        symlink("gone.jpg", at("dead")).unwrap();
        symlink("gone.png", at("also-dead")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink(".", at("inner/itself")).unwrap();
        symlink("..", at("inner/above")).unwrap();
        fs::write(folder.join(std::ffi::OsStr::from_bytes(b"\xff.jpg")), b"content").unwrap();
        // Links to other files and folders are followed, also out of the folder.
        symlink("inner", at("linked")).unwrap();
        symlink(home.path().join("elsewhere"), at("out")).unwrap();
        symlink("a.jpg", at("z.jpg")).unwrap();

        let names: Vec<String> = digest_path(&folder, Some(&ledger), LATER).unwrap().into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["a.jpg", "inner/b.jpg", "linked/b.jpg", "out/c.jpg", "z.jpg"]);
        let expected = "skipped a dead link (also-dead and 1 more), a device (zero), a folder within itself (inner/above and 3 more), \
                        a loop of links (loop), a name that is not UTF-8 (\u{fffd}.jpg), a named pipe (pipe), a socket (socket)";
        assert_eq!(ledger.notices(), [format!("{}: {expected}", folder.display())]);

        for (name, what) in
            [("pipe", "a named pipe"), ("zero", "a device"), ("dead", "a dead link"), ("loop", "a loop of links"), ("socket", "a socket")]
        {
            assert_eq!(stray(&at(name)), Some(what));
            let Err(Error::Read { path, source }) = digest_path(&at(name), None, LATER) else { panic!("{name}") };
            assert_eq!((path, source.to_string()), (at(name), format!("expected a file, found {what}")));
            assert!(digest_file(&at(name)).is_err(), "{name}");
        }
        assert_eq!((stray(&at("a.jpg")), stray(&folder), stray(&at("nothing"))), (None, None, None));
    }

    #[test]
    fn hashing_stops_on_request() {
        let home = tempfile::tempdir().unwrap();
        replace(&home.path().join("folder/a"), b"one").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let ledger = ledger(home.path()).stopped_by(Arc::clone(&stop));
        assert_eq!(digest_path(&home.path().join("folder"), Some(&ledger), LATER).unwrap().len(), 1);
        stop.store(true, Ordering::SeqCst);
        for path in ["folder", "folder/a"] {
            assert!(matches!(digest_path(&home.path().join(path), Some(&ledger), LATER), Err(Error::Stopped)));
        }
        // In the middle of a file.
        let n_reads = AtomicUsize::new(0);
        let check_stop = || if n_reads.fetch_add(1, Ordering::SeqCst) < 2 { Ok(()) } else { Err(Error::Stopped) };
        replace(&home.path().join("large"), &vec![0; 1 << 20]).unwrap();
        assert!(matches!(digest_unless_stopped(&home.path().join("large"), &check_stop), Err(Error::Stopped)));
        assert_eq!(n_reads.load(Ordering::SeqCst), 3);
    }

    /// Stores a wrong digest in the ledger, to show that the ledger is used.
    fn store_wrong_digest(ledger: &Ledger, path: &Path) -> Digest {
        let root = path.canonicalize().unwrap().display().to_string();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        Table::write(ledger, &root, &[(name, path.to_owned())], &[Stat::of(path).unwrap()], &[Digest::of(b"wrong")], LATER);
        Digest::of(b"wrong")
    }

    #[test]
    fn a_stored_digest_is_used_until_the_file_changes_or_all_are_hashed_again() {
        let home = tempfile::tempdir().unwrap();
        let (path, ledger) = (home.path().join("file"), ledger(home.path()));
        let digest = |ledger: &Ledger| digest_path(&path, Some(ledger), LATER).unwrap()[0].digest;
        replace(&path, b"one").unwrap();
        assert_eq!(digest(&ledger), Digest::of(b"one"));
        let wrong = store_wrong_digest(&ledger, &path);
        assert_eq!(digest(&ledger), wrong);
        assert_eq!(digest(&ledger.rehashing(true)), Digest::of(b"one"));
        replace(&path, b"two").unwrap();
        assert_eq!(digest(&self::ledger(home.path())), Digest::of(b"two"));
    }

    #[test]
    fn the_digest_of_a_file_that_changed_just_now_is_not_stored() {
        let home = tempfile::tempdir().unwrap();
        let (path, ledger) = (home.path().join("file"), ledger(home.path()));
        replace(&path, b"one").unwrap();
        let now_ns = i128::from(Stat::of(&path).unwrap().mtime_ns);
        digest_path(&path, Some(&ledger), now_ns).unwrap();
        let root = path.canonicalize().unwrap().display().to_string();
        assert_eq!(Table::read(&ledger, &root).batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 0);
    }

    #[test]
    fn a_reader_gets_the_bytes_that_were_hashed() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        replace(&path, b"one").unwrap();
        let file = digest_path(&path, None, LATER).unwrap().remove(0);
        let text = |path: &Path| Ok::<_, Error>(fs::read(path).unwrap());
        assert_eq!((file.read().unwrap(), file.read_with(text).unwrap()), (b"one".to_vec(), b"one".to_vec()));
        // Written again with the same content.
        let during = |path: &Path| {
            replace(path, b"one").unwrap();
            text(path)
        };
        assert_eq!(file.read_with(during).unwrap(), b"one");
        // Replaced after it was hashed for the reader, before it was read.
        let during = |path: &Path| {
            replace(path, b"two").unwrap();
            text(path)
        };
        assert!(matches!(file.read_with(during), Err(Error::Changed { .. })));
        assert!(matches!(file.read(), Err(Error::Changed { .. })));
        assert!(matches!(file.read_with(text), Err(Error::Changed { .. })));
        // If the reader fails because of the change, the change is reported.
        replace(&path, b"one").unwrap();
        let during = |path: &Path| {
            replace(path, b"two").unwrap();
            Err::<(), _>(Error::malformed(path, "expected one"))
        };
        assert!(matches!(file.read_with(during), Err(Error::Changed { .. })));
        let ours = InputFile { unit: Some(blake3::hash(b"unit").into()), ..file };
        assert!(matches!(ours.read(), Err(Error::Flipped { .. })));
        Publisher::default().remove(&path).unwrap();
        assert!(matches!(ours.read(), Err(Error::Malformed { .. })));
        assert!(matches!(InputFile { unit: None, ..ours }.read(), Err(Error::Gone { .. })));
    }

    #[test]
    fn a_sound_shard_of_the_same_unit_with_other_rows_does_not_pass() {
        let home = tempfile::tempdir().unwrap();
        let unit: Fingerprint = blake3::hash(b"unit").into();
        let shard = |name: &str, id: u64| {
            let draft = Publisher::default().begin(&home.path().join(name)).unwrap();
            let schema = arrow::datatypes::Schema::new(vec![arrow::datatypes::Field::new("id", arrow::datatypes::DataType::UInt64, false)]);
            let mut writer =
                crate::shard::ShardWriter::new(draft.create("0.arrow").unwrap(), &schema, &unit, crate::shard::Compression::None).unwrap();
            writer.write(&RecordBatch::try_from_iter([("id", Arc::new(UInt64Array::from(vec![id])) as ArrayRef)]).unwrap()).unwrap();
            writer.finish().unwrap();
            let record = draft.files().remove(0);
            draft.commit("record", b"").unwrap();
            (home.path().join(name).join("0.arrow"), record)
        };
        let ((path, record), (other, _)) = (shard("one", 1), shard("two", 2));
        let file = InputFile { name: "0.arrow".into(), path, bytes: record.bytes, digest: record.content(), unit: Some(unit) };
        file.shard().unwrap();
        assert!(matches!(InputFile { path: other, ..file }.shard(), Err(Error::Flipped { .. })));
    }

    #[test]
    fn a_file_found_changed_is_hashed_again_despite_the_ledger() {
        let home = tempfile::tempdir().unwrap();
        let (path, ledger) = (home.path().join("file"), ledger(home.path()));
        replace(&path, b"one").unwrap();
        let wrong = store_wrong_digest(&ledger, &path);
        let digest = |ledger: &Ledger| digest_path(&path, Some(ledger), LATER).unwrap()[0].digest;
        assert_eq!(digest(&ledger), wrong);
        ledger.doubt([path.clone()]);
        assert_eq!(digest(&ledger), Digest::of(b"one"));
        assert_eq!(digest(&self::ledger(home.path())), Digest::of(b"one"));
    }

    #[test]
    fn a_file_that_changes_or_disappears_does_not_affect_the_digests_of_others() {
        let home = tempfile::tempdir().unwrap();
        let (folder, ledger) = (home.path().join("folder"), ledger(home.path()));
        for file in 0..300 {
            replace(&folder.join(format!("{file:03}")), &[file as u8, (file >> 8) as u8]).unwrap();
        }
        let first = digest_path(&folder, Some(&ledger), LATER).unwrap();
        replace(&folder.join("007"), b"changed").unwrap();
        Publisher::default().remove(&folder.join("100")).unwrap();
        let second = digest_path(&folder, Some(&ledger), LATER).unwrap();
        assert_eq!(second.len(), 299);
        let changed: Vec<&str> = second.iter().filter(|file| !first.contains(file)).map(|file| file.name.as_str()).collect();
        assert_eq!(changed, ["007"]);
        assert_eq!(digest_path(&folder, Some(&ledger), LATER).unwrap(), second);
    }
}
