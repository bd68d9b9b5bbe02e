//! Processes at work in a home, and their leases on the units that they make.
//!
//! A lease is a symbolic link `HOME/leases/KIND.FINGERPRINT` whose target identifies the holder: it is taken by one system call and is
//! never half written. It is broken only if its holder is dead. A process of the same boot and process namespace is dead if no process with
//! its pid and start time runs; any other counts as dead if its session file has not been touched for [`SILENCE`]. Host names are not used:
//! two machines may have the same. A lease that is broken wrongly costs time, never results: units are published by one rename, and the
//! second process uses the unit of the first.
#![expect(clippy::disallowed_methods, reason = "leases are not results: they need no fsync and end with the machine")]

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

/// After this time without a heartbeat, the leases of a process on another machine or of another boot are broken.
const SILENCE: Duration = Duration::from_secs(300);
/// For at least this time the process must have been watched, because clocks may be changed.
const WATCHED: Duration = Duration::from_secs(30);
/// After this time without a heartbeat, the unfinished files of such a process are removed.
const LONG_SILENCE: Duration = Duration::from_secs(12 * 300);
/// The interval of the heartbeat.
const BEAT_EVERY: Duration = Duration::from_secs(10);

/// Identifies a process by boot, process namespace, pid and start time; unique over all machines and times.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Digest of the boot id, which differs between machines, and of the process namespace, which differs between containers.
    boot: String,
    pid: u32,
    /// Start time in clock ticks since the boot.
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

    /// The number by which its machine names it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is of the same boot and process namespace as this process, so that `/proc` shows it.
    fn is_visible(&self) -> bool {
        self.boot == Self::me().boot
    }

    /// Whether the process has certainly ended. False for processes of another boot or machine, which cannot be checked.
    pub fn is_dead(&self) -> bool {
        self.is_visible() && start_of(self.pid) != Some(self.start)
    }

    /// A description for messages: `process 4711`, with its origin if it is of another machine or boot.
    pub fn words(&self) -> String {
        let origin = if self.is_visible() { "" } else { " of another machine, or of this machine before its last restart" };
        format!("process {}{origin}", self.pid)
    }

    /// A process of this boot that has ended.
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

/// The start time of a running process, in clock ticks since the boot; `None` if it has ended or is a zombie.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may contain any character.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The right to make a unit; dropping it gives it back.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
}

impl Lease {
    /// Takes a lease, or returns its holder.
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
                // Given back just now.
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

/// The holder of a lease; `None` if the lease is free. Anything else in its place counts as the lease of a dead process.
fn holder(path: &Path) -> Option<Owner> {
    let dead = || Owner { start: u64::MAX, ..Owner::me().clone() };
    match fs::read_link(path) {
        Ok(target) => Some(target.to_string_lossy().parse().unwrap_or_else(|()| dead())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(dead()),
    }
}

/// Removes the lease of a dead process. If several processes try, one succeeds; a lease that was taken in the meantime is restored.
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

/// Marks this process as at work in a home: a thread touches its session file every few seconds.
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
    /// The thread of the heartbeat; dropping the sender stops it.
    heartbeat: Option<(Sender<()>, JoinHandle<()>)>,
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
                // If it fails, the next beat follows. The bytes differ each time: some file systems keep the time if the content is the same.
                let _lost = fs::write(&place, format!("{n_beats}"));
            }
        };
        Ok(Self { path, heartbeat: Some((alive, thread::spawn(beat))) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some((alive, thread)) = self.heartbeat.take() {
            drop(alive);
            let _stopped = thread.join();
        }
        let _already_gone = fs::remove_file(&self.path);
    }
}

fn session_path(home: &Path, owner: &Owner) -> PathBuf {
    home.join("sessions").join(owner.to_string())
}

/// The processes at work in a home, as far as can be known. Session files of ended processes are removed.
pub(crate) fn sessions(home: &Path) -> Vec<Owner> {
    let entries = fs::read_dir(home.join("sessions")).into_iter().flatten().flatten();
    let owners = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<Owner>().ok());
    let (over, running): (Vec<Owner>, Vec<Owner>) = owners.partition(|owner| is_over(home, owner));
    for owner in over {
        // If the process runs after all, its next beat writes the file again.
        let _already_gone = fs::remove_file(session_path(home, &owner));
    }
    running
}

/// Whether the unfinished files of a process may be removed: it is dead, or it cannot be checked and has no session file or one that was
/// not touched for [`LONG_SILENCE`].
pub(crate) fn is_over(home: &Path, owner: &Owner) -> bool {
    owner.is_dead() || (!owner.is_visible() && silence_of(home, owner).is_none_or(|silence| silence >= LONG_SILENCE))
}

/// The time since a session file was touched; `None` if there is none. If this process has a session in the home, the time is measured by
/// the file system's clock, from the last touch of its own session file.
pub(crate) fn silence_of(home: &Path, owner: &Owner) -> Option<Duration> {
    let now = touched(home, Owner::me()).unwrap_or_else(SystemTime::now);
    Some(now.duration_since(touched(home, owner)?).unwrap_or_default())
}

fn touched(home: &Path, owner: &Owner) -> Option<SystemTime> {
    fs::metadata(session_path(home, owner)).and_then(|metadata| metadata.modified()).ok()
}

/// Watches the heartbeats of processes on other machines while this process waits for their leases.
#[derive(Debug, Default)]
pub struct Watch {
    /// The time of the last heartbeat, and when this process first saw it.
    seen: HashMap<Owner, (Option<SystemTime>, Instant)>,
}

impl Watch {
    /// Whether a process of another machine or boot has been silent for so long that it counts as dead.
    pub(crate) fn is_silent(&mut self, home: &Path, owner: &Owner) -> bool {
        if owner.is_visible() {
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

    /// A process of another machine.
    fn of_another_machine() -> Owner {
        Owner { boot: "elsewhere".into(), pid: 1, start: 7 }
    }

    fn touch(home: &Path, owner: &Owner, ago: Duration) {
        let path = session_path(home, owner);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = fs::File::create(path).unwrap();
        file.set_modified(SystemTime::now() - ago).unwrap();
    }

    #[test]
    fn owners_can_be_parsed_and_this_process_is_alive() {
        let me = Owner::me();
        assert_eq!(me.to_string().parse().as_ref(), Ok(me));
        assert!(!me.is_dead() && me.start > 0);
        assert!(Owner { start: me.start + 1, ..me.clone() }.is_dead(), "a reused pid");
        assert!(!Owner { boot: "other".into(), ..me.clone() }.is_dead(), "a process of another boot");
        assert!("host.boot.1.2".parse::<Owner>().is_err());
    }

    #[test]
    fn a_zombie_is_dead() {
        let mut child = process::Command::new("true").spawn().unwrap();
        let started = Instant::now();
        while start_of(child.id()).is_some() {
            assert!(started.elapsed() < Duration::from_secs(10));
            thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_lease_belongs_to_one_process_until_it_is_dropped() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("leases/unit");
        let lease = Lease::take(&path).unwrap().unwrap();
        assert_eq!(Lease::take(&path).unwrap().unwrap_err(), *Owner::me());
        drop(lease);
        drop(Lease::take(&path).unwrap().unwrap());
        assert!(fs::symlink_metadata(&path).is_err());
    }

    /// Host names play no part.
    #[test]
    fn a_lease_of_another_machine_is_broken_after_silence_only() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("unit");
        symlink(Owner::dead(1).to_string(), &path).unwrap();
        drop(Lease::take(&path).unwrap().unwrap());
        let owner = of_another_machine();
        symlink(owner.to_string(), &path).unwrap();
        assert_eq!(Lease::take(&path).unwrap().unwrap_err(), owner);
        let mut watch = Watch::default();
        let is_silent = |watch: &mut Watch| watch.is_silent(home.path(), &owner);
        // It is watched for a minimum time whatever the age of its file, and for the whole silence if the file is young.
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
        assert!(!watch.is_silent(home.path(), me), "a running process of this machine, however busy");
    }

    #[test]
    fn unfinished_files_stay_as_long_as_their_process_may_run() {
        let home = tempfile::tempdir().unwrap();
        assert!(is_over(home.path(), &Owner::dead(1)) && !is_over(home.path(), Owner::me()));
        let owner = of_another_machine();
        assert!(is_over(home.path(), &owner), "without a session");
        for (ago, expected) in [(0, false), (600, false), (4000, true)] {
            touch(home.path(), &owner, Duration::from_secs(ago));
            assert_eq!(is_over(home.path(), &owner), expected, "{ago} s ago");
            assert_eq!(sessions(home.path()).contains(&owner), !expected);
        }
    }

    #[test]
    fn sessions_list_the_processes_at_work() {
        let home = tempfile::tempdir().unwrap();
        let session = Session::begin(home.path()).unwrap();
        fs::write(session_path(home.path(), &Owner::dead(1)), b"").unwrap();
        assert_eq!(sessions(home.path()), [Owner::me().clone()]);
        assert_eq!(fs::read_dir(home.path().join("sessions")).unwrap().count(), 1);
        drop(session);
        assert!(sessions(home.path()).is_empty());
    }
}
