//! Who is at work: names of processes, and leases on units in the making.
//!
//! A lease is a symbolic link `HOME/leases/KIND.FINGERPRINT` whose target is the holder's name: one system call takes it, and
//! it never lies half written. It is broken only when its holder is dead: one of the same boot and process namespace when that process, by
//! pid and start time, is over; any other when its session file has not been touched for [`SILENCE`]. Names of machines prove nothing: two
//! may have the same. Losing a lease wrongly costs time, never results: a unit is published by one rename, and who comes second takes what
//! is there.
#![expect(clippy::disallowed_methods, reason = "leases are not results: they need no fsync and die with the machine")]

use std::{
    collections::HashMap,
    fmt, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process,
    str::FromStr,
    sync::{
        OnceLock,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use crate::{Error, Result};

/// How long the session of a process that cannot be looked at must have been silent before its leases are broken.
const SILENCE: Duration = Duration::from_secs(300);
/// How long it must have been watched meanwhile: clocks may be set.
const WATCHED: Duration = Duration::from_secs(30);
/// How long it must have been silent before what it left unfinished is removed.
const LONG_SILENCE: Duration = Duration::from_secs(12 * 300);
/// How often a process says that it lives.
const BEAT_EVERY: Duration = Duration::from_secs(10);

/// The name of a process: boot and process namespace, pid and start time. No two processes ever share one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Of the boot's id, which no two machines share, and the process namespace, which containers do not.
    boot: String,
    pid: u32,
    /// In clock ticks since the boot.
    start: u64,
}

impl Owner {
    /// This process.
    pub fn me() -> &'static Self {
        static ME: OnceLock<Owner> = OnceLock::new();
        ME.get_or_init(|| {
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
            let boot = blake3::hash(format!("{boot}{}", namespace.display()).as_bytes()).to_hex()[..16].to_owned();
            let pid = process::id();
            Self { boot, pid, start: start_of(pid).unwrap_or(0) }
        })
    }

    /// Whether this process could see that one.
    fn is_near(&self) -> bool {
        self.boot == Self::me().boot
    }

    /// Whether the process is over for certain. Of another boot's or another machine's nothing is certain.
    pub fn is_dead(&self) -> bool {
        self.is_near() && start_of(self.pid) != Some(self.start)
    }

    /// For people: `process 4711`, or where it is when it is elsewhere.
    pub fn words(&self) -> String {
        let elsewhere = if self.is_near() { "" } else { " of another machine, or of this one before it was started again" };
        format!("process {}{elsewhere}", self.pid)
    }

    /// One of this boot that is over.
    #[cfg(test)]
    pub(crate) fn dead(pid: u32) -> Self {
        Self { start: u64::MAX, pid, ..Self::me().clone() }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.boot, self.pid, self.start)
    }
}

impl FromStr for Owner {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.');
        let mut next = || parts.next().ok_or(());
        let boot = next()?.to_owned();
        let (pid, start) = (next()?.parse().map_err(drop)?, next()?.parse().map_err(drop)?);
        if parts.next().is_some() { Err(()) } else { Ok(Self { boot, pid, start }) }
    }
}

/// When a living process began, in clock ticks since the boot; `None` for one that is over or only waits to be reaped.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The right to make a unit, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
}

impl Lease {
    /// Takes a lease, or says who has it.
    pub(crate) fn take(path: &Path) -> Result<Result<Self, Owner>> {
        loop {
            let error = match symlink(Owner::me().to_string(), path) {
                Ok(()) => return Ok(Ok(Self { path: path.to_owned() })),
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::AlreadyExists => {}
                io::ErrorKind::NotFound => {
                    let folder = path.parent().unwrap_or(Path::new("."));
                    fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))?;
                    continue;
                }
                _ => return Err(Error::write(path, error)),
            }
            match holder(path) {
                // Let go in this moment.
                None => {}
                Some(holder) if holder.is_dead() => break_lease(path, &holder),
                Some(holder) => return Ok(Err(holder)),
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if holder(&self.path).as_ref() == Some(Owner::me()) {
            let _already_gone = fs::remove_file(&self.path);
        }
    }
}

/// Who holds a lease. What is no lease of ours counts as a dead process's.
fn holder(path: &Path) -> Option<Owner> {
    let nobody = || Owner { start: u64::MAX, ..Owner::me().clone() };
    match fs::read_link(path) {
        Ok(target) => Some(target.to_string_lossy().parse().unwrap_or_else(|()| nobody())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(nobody()),
    }
}

/// Removes a dead process's lease. Of several who try, one succeeds; a lease taken anew in between is put back.
pub(crate) fn break_lease(path: &Path, dead: &Owner) {
    let aside = path.with_extension(format!("broken-by-{}", Owner::me()));
    if fs::rename(path, &aside).is_err() {
        return;
    }
    match holder(&aside) {
        Some(found) if found != *dead && !found.is_dead() => {
            let _taken_again = symlink(found.to_string(), path);
        }
        _ => {}
    }
    let _already_gone = fs::remove_file(&aside);
}

/// A process that is at work in a home; a thread says so every few seconds, whatever the process does meanwhile.
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
    /// Dropping it stops the heart.
    heart: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Session {
    pub(crate) fn begin(home: &Path) -> Result<Self> {
        let path = session_path(home, Owner::me());
        let folder = home.join("sessions");
        fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
        fs::write(&path, b"1").map_err(|source| Error::write(&path, source))?;
        let (alive, stop) = channel();
        let place = path.clone();
        let beat = move || {
            let mut n_beats = 1;
            while stop.recv_timeout(BEAT_EVERY) == Err(RecvTimeoutError::Timeout) {
                n_beats += 1;
                // A beat that is lost is followed by another. Other bytes each time: on some file systems nothing written is no change.
                let _lost = fs::write(&place, format!("{n_beats}"));
            }
        };
        Ok(Self { path, heart: Some((alive, thread::spawn(beat))) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some((alive, heart)) = self.heart.take() {
            drop(alive);
            let _beats_no_more = heart.join();
        }
        let _already_gone = fs::remove_file(&self.path);
    }
}

fn session_path(home: &Path, owner: &Owner) -> PathBuf {
    home.join("sessions").join(owner.to_string())
}

/// The processes at work in a home, as far as can be known. Session files of those that are over are removed.
pub(crate) fn sessions(home: &Path) -> Vec<Owner> {
    let entries = fs::read_dir(home.join("sessions")).into_iter().flatten().flatten();
    let owners = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<Owner>().ok());
    let (over, living): (Vec<Owner>, Vec<Owner>) = owners.partition(|owner| is_over(home, owner));
    for owner in over {
        // One that lives nevertheless writes it again.
        let _already_gone = fs::remove_file(session_path(home, &owner));
    }
    living
}

/// Whether what a process left unfinished may be removed: it is dead, or it is elsewhere and has no session or was silent for long.
pub(crate) fn is_over(home: &Path, owner: &Owner) -> bool {
    owner.is_dead() || (!owner.is_near() && silence_of(home, owner).is_none_or(|silence| silence >= LONG_SILENCE))
}

/// How long ago a session was touched; none where it has no file. By the file system's clock where this process has a session, too: it
/// touches its own every few seconds.
fn silence_of(home: &Path, owner: &Owner) -> Option<Duration> {
    let now = touched(home, Owner::me()).unwrap_or_else(SystemTime::now);
    Some(now.duration_since(touched(home, owner)?).unwrap_or_default())
}

fn touched(home: &Path, owner: &Owner) -> Option<SystemTime> {
    fs::metadata(session_path(home, owner)).and_then(|metadata| metadata.modified()).ok()
}

/// Watches processes elsewhere while waiting for them.
#[derive(Debug, Default)]
pub struct Watch {
    seen: HashMap<Owner, (Option<SystemTime>, Instant)>,
}

impl Watch {
    /// Whether a holder that cannot be looked at has been silent for so long that it counts as dead.
    pub(crate) fn is_silent(&mut self, home: &Path, owner: &Owner) -> bool {
        if owner.is_near() {
            return false;
        }
        let touched = touched(home, owner);
        let entry = self.seen.entry(owner.clone()).or_insert((touched, Instant::now()));
        if entry.0 != touched {
            *entry = (touched, Instant::now());
        }
        let watched = entry.1.elapsed();
        watched > SILENCE || (watched > WATCHED && silence_of(home, owner).is_none_or(|silence| silence > SILENCE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that cannot be looked at.
    fn elsewhere() -> Owner {
        Owner { boot: "elsewhere".into(), pid: 1, start: 7 }
    }

    fn touch(home: &Path, owner: &Owner, ago: Duration) {
        let path = session_path(home, owner);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = fs::File::create(path).unwrap();
        file.set_modified(SystemTime::now() - ago).unwrap();
    }

    #[test]
    fn owners_survive_text_and_this_one_lives() {
        let me = Owner::me();
        assert_eq!(me.to_string().parse().as_ref(), Ok(me));
        assert!(!me.is_dead() && me.start > 0);
        assert!(Owner { start: me.start + 1, ..me.clone() }.is_dead(), "a pid that was given away again");
        assert!(!Owner { boot: "other".into(), ..me.clone() }.is_dead(), "one that nobody here can look at");
        assert!("host.boot.1.2".parse::<Owner>().is_err());
    }

    #[test]
    fn a_process_that_waits_to_be_reaped_is_dead() {
        let mut child = process::Command::new("true").spawn().unwrap();
        let started = Instant::now();
        while start_of(child.id()).is_some() {
            assert!(started.elapsed() < Duration::from_secs(10));
            thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_lease_belongs_to_one_until_it_lets_go() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("leases/unit");
        let lease = Lease::take(&path).unwrap().unwrap();
        assert_eq!(Lease::take(&path).unwrap().unwrap_err(), *Owner::me());
        drop(lease);
        drop(Lease::take(&path).unwrap().unwrap());
        assert!(fs::symlink_metadata(&path).is_err());
    }

    /// Whatever the machines are called: nothing of a name is looked at.
    #[test]
    fn a_lease_of_one_that_cannot_be_looked_at_is_broken_by_silence_alone() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("unit");
        symlink(Owner::dead(1).to_string(), &path).unwrap();
        drop(Lease::take(&path).unwrap().unwrap());
        let owner = elsewhere();
        symlink(owner.to_string(), &path).unwrap();
        assert_eq!(Lease::take(&path).unwrap().unwrap_err(), owner);
        let mut watch = Watch::default();
        let is_silent = |watch: &mut Watch| watch.is_silent(home.path(), &owner);
        // It is looked at for a while whatever its file says, and for long where that is young.
        for (ago, watched, expected) in
            [(0, 0, false), (0, 299, false), (0, 301, true), (299, 31, false), (400, 0, false), (400, 31, true), (86_400, 29, false)]
        {
            touch(home.path(), &owner, Duration::from_secs(ago));
            let _first_look = is_silent(&mut watch);
            let entry = watch.seen.get_mut(&owner).unwrap();
            entry.1 = Instant::now().checked_sub(Duration::from_secs(watched)).unwrap();
            assert_eq!(is_silent(&mut watch), expected, "touched {ago} s ago, watched for {watched} s");
        }
        let me = Owner::me();
        watch.seen.insert(me.clone(), (None, Instant::now().checked_sub(Duration::from_secs(900)).unwrap()));
        assert!(!watch.is_silent(home.path(), me), "one that lives where it can be seen, however busy");
    }

    #[test]
    fn what_is_unfinished_stays_as_long_as_its_process_may_live() {
        let home = tempfile::tempdir().unwrap();
        assert!(is_over(home.path(), &Owner::dead(1)) && !is_over(home.path(), Owner::me()));
        let owner = elsewhere();
        assert!(is_over(home.path(), &owner), "without a session");
        for (ago, expected) in [(0, false), (600, false), (4000, true)] {
            touch(home.path(), &owner, Duration::from_secs(ago));
            assert_eq!(is_over(home.path(), &owner), expected, "{ago} s ago");
            assert_eq!(sessions(home.path()).contains(&owner), !expected);
        }
    }

    #[test]
    fn sessions_list_who_is_at_work() {
        let home = tempfile::tempdir().unwrap();
        let session = Session::begin(home.path()).unwrap();
        fs::write(session_path(home.path(), &Owner::dead(1)), b"").unwrap();
        assert_eq!(sessions(home.path()), [Owner::me().clone()]);
        assert_eq!(fs::read_dir(home.path().join("sessions")).unwrap().count(), 1);
        drop(session);
        assert!(sessions(home.path()).is_empty());
    }
}
