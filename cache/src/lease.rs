//! Who is at work: names of processes, and leases on units in the making.
//!
//! A lease is a symbolic link `HOME/leases/KIND.FINGERPRINT` whose target is the holder's name: one system call takes it, and
//! it never lies half written. It is broken only when its holder is provably dead: on the same machine when that process, by
//! pid and start time, or that boot of the machine is over; on another machine when the holder's session file has not been
//! touched for [`SILENCE`] of the waiter's own clock. Losing a lease wrongly costs time, never results: a unit is published
//! by one rename, and who comes second takes what is there.
#![expect(clippy::disallowed_methods, reason = "leases are not results: they need no fsync and die with the machine")]

use std::{
    collections::HashMap,
    fmt, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process,
    str::FromStr,
    sync::OnceLock,
    time::{Duration, Instant, SystemTime},
};

use crate::{Error, Result};

/// How long another machine's session must have been silent before its leases are broken.
const SILENCE: Duration = Duration::from_secs(300);

/// The name of a process: machine, boot, pid and start time. No two processes ever share one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Of the host's name and the process namespace.
    host: String,
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
            let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            let short = |text: &str| blake3::hash(text.as_bytes()).to_hex()[..8].to_owned();
            let pid = process::id();
            Self { host: short(&format!("{host}{}", namespace.display())), boot: short(&boot), pid, start: start_of(pid).unwrap_or(0) }
        })
    }

    /// Whether the process is over for certain. Of another machine's nothing is certain.
    pub fn is_dead(&self) -> bool {
        let me = Self::me();
        self.host == me.host && (self.boot != me.boot || start_of(self.pid) != Some(self.start))
    }

    /// For people: `process 4711`, or where it is when it is elsewhere.
    pub fn words(&self) -> String {
        let elsewhere = if self.host == Self::me().host { "" } else { " of another machine" };
        format!("process {}{elsewhere}", self.pid)
    }

    /// One that died with an earlier boot of this machine.
    #[cfg(test)]
    pub(crate) fn dead(pid: u32) -> Self {
        Self { boot: "earlier".into(), pid, ..Self::me().clone() }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}.{}", self.host, self.boot, self.pid, self.start)
    }
}

impl FromStr for Owner {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.');
        let mut next = || parts.next().ok_or(());
        let (host, boot) = (next()?.to_owned(), next()?.to_owned());
        let (pid, start) = (next()?.parse().map_err(drop)?, next()?.parse().map_err(drop)?);
        Ok(Self { host, boot, pid, start })
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
    match fs::read_link(path) {
        Ok(target) => Some(target.to_string_lossy().parse().unwrap_or_else(|()| Owner { boot: String::new(), ..Owner::me().clone() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(Owner { boot: String::new(), ..Owner::me().clone() }),
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

/// A process that is at work in a home; others see that it lives as long as it says so.
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
}

impl Session {
    pub(crate) fn begin(home: &Path) -> Result<Self> {
        let path = session_path(home, Owner::me());
        let folder = home.join("sessions");
        fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
        fs::write(&path, b"").map_err(|source| Error::write(&path, source))?;
        Ok(Self { path })
    }

    /// Says that this process lives. Called every few seconds.
    pub fn beat(&self) {
        // A beat that is lost is followed by another.
        let _lost = fs::write(&self.path, b"");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _already_gone = fs::remove_file(&self.path);
    }
}

fn session_path(home: &Path, owner: &Owner) -> PathBuf {
    home.join("sessions").join(owner.to_string())
}

/// The processes at work in a home. Session files of dead ones are removed.
pub(crate) fn sessions(home: &Path) -> Vec<Owner> {
    let entries = fs::read_dir(home.join("sessions")).into_iter().flatten().flatten();
    let owners = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<Owner>().ok());
    let (dead, living): (Vec<Owner>, Vec<Owner>) = owners.partition(Owner::is_dead);
    for owner in dead {
        let _already_gone = fs::remove_file(session_path(home, &owner));
    }
    living
}

/// Whether what a process left unfinished may be removed: it is dead, or it is of another machine and has no session.
pub(crate) fn is_over(home: &Path, owner: &Owner) -> bool {
    owner.is_dead() || (owner != Owner::me() && owner.host != Owner::me().host && !session_path(home, owner).exists())
}

/// Watches processes of other machines while waiting for them.
#[derive(Debug, Default)]
pub struct Watch {
    seen: HashMap<Owner, (Option<SystemTime>, Instant)>,
}

impl Watch {
    /// Whether a holder has been silent for so long that it counts as dead.
    pub(crate) fn is_silent(&mut self, home: &Path, owner: &Owner) -> bool {
        let touched = fs::metadata(session_path(home, owner)).and_then(|metadata| metadata.modified()).ok();
        let entry = self.seen.entry(owner.clone()).or_insert((touched, Instant::now()));
        if entry.0 != touched {
            *entry = (touched, Instant::now());
        }
        entry.1.elapsed() > SILENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_survive_text_and_this_one_lives() {
        let me = Owner::me();
        assert_eq!(me.to_string().parse().as_ref(), Ok(me));
        assert!(!me.is_dead() && me.start > 0);
        assert!(Owner { start: me.start + 1, ..me.clone() }.is_dead(), "a pid that was given away again");
        assert!(Owner { boot: "other".into(), ..me.clone() }.is_dead());
        assert!(!Owner { host: "elsewhere".into(), boot: "other".into(), ..me.clone() }.is_dead());
    }

    #[test]
    fn a_process_that_waits_to_be_reaped_is_dead() {
        let mut child = process::Command::new("true").spawn().unwrap();
        let started = Instant::now();
        while start_of(child.id()).is_some() {
            assert!(started.elapsed() < Duration::from_secs(10));
            std::thread::yield_now();
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

    #[test]
    fn a_dead_process_s_lease_is_broken_and_another_machine_s_is_not() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("unit");
        symlink(Owner::dead(1).to_string(), &path).unwrap();
        drop(Lease::take(&path).unwrap().unwrap());
        let elsewhere = Owner { host: "elsewhere".into(), ..Owner::dead(1) };
        symlink(elsewhere.to_string(), &path).unwrap();
        assert_eq!(Lease::take(&path).unwrap().unwrap_err(), elsewhere);
        assert!(!Watch::default().is_silent(home.path(), &elsewhere));
        assert!(is_over(home.path(), &elsewhere) && !is_over(home.path(), Owner::me()));
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
